# Every target sets itself up: a virtual environment in .venv, made once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup study tour test check fuzz mutants bench release-check

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv, about a minute with a fast connection"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

study: $(READY)
	$(BIN)/python -m experiments.divergence --output results/study --overwrite

# One thread: a slider's change is small, and a second thread would only wait.
tour: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m marimo run experiments/tour/tour.py --host 127.0.0.1

# One thread each: the tests share the cores among themselves.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --cov=minigpt

# The peers bring many packages: they get an environment of their own.
.venv-bench/.ready: pyproject.toml constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@echo "installing minigpt and its peers into .venv-bench, a few minutes"
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

bench: .venv-bench/.ready
	.venv-bench/bin/python -m experiments.benchmark

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Guided by coverage, for as long as asked; atheris has no build for every system, so it comes only with this.
SECONDS ?= 60
.venv/.fuzz: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	touch $@

fuzz: .venv/.fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(SECONDS)

# Hours: every mutant of what computes against the tests; python -m tests.mutants --files takes some.
.venv/.mutants: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	touch $@

mutants: .venv/.mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

# What must hold before a version is tagged; installs PyTorch once more, in a temporary folder.
release-check: $(READY)
	$(BIN)/python -m tests.release_check
