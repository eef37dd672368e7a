"""`python -m experiments.train`: the training, see `experiments/tools/train.py`."""

import typer

from experiments.tools.train import main
from minigpt import cli

if __name__ == "__main__":
    cli.run(lambda: typer.run(main))
