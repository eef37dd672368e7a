"""`python -m experiments.token_loss`."""

from experiments.harness.command import start
from experiments.token_loss.study import main

if __name__ == "__main__":
    start(main)
