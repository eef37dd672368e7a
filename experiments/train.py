"""`python -m experiments.train`: the training, see `experiments/tools/train.py`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("experiments.tools.train", run_name="__main__")
