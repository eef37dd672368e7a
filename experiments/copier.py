"""`python -m experiments.copier`: two layers learn to copy, see `experiments/tools/copier.py`."""

import typer

from experiments.tools.copier import main
from minigpt import cli

if __name__ == "__main__":
    cli.run(lambda: typer.run(main))
