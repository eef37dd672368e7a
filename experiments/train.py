"""`python -m experiments.train`: the training, see `experiments/tools/train.py`."""

import runpy

runpy.run_module("experiments.tools.train", run_name="__main__")
