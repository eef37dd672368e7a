"""`python -m experiments.divergence`."""

from experiments.divergence.study import main
from experiments.harness.command import start

if __name__ == "__main__":
    start(main)
