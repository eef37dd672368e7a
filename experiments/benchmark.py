"""`python -m experiments.benchmark`: the benchmark, see `experiments/tools/benchmark.py`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("experiments.tools.benchmark", run_name="__main__")
