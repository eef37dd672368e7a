"""`python -m experiments.benchmark`: the benchmark, see `experiments.tools.benchmark`."""

import typer

from experiments.tools.benchmark import main
from minigpt import cli

if __name__ == "__main__":
    cli.run(lambda: typer.run(main))
