"""`--lecture NAME`, and the page that lists the lectures: docs/lectures.md."""

import importlib
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from experiments.divergence import study as divergence
from experiments.harness import writing
from experiments.harness.experiment import Experiment
from tests.conftest import ROOT, TINY
from tests.test_study import run_main

PAGE = (ROOT / "docs" / "lectures.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`python -m (experiments\.\w+) --lecture (\w+)`", PAGE)
SCALING = "hiddenStates_scalingImpact"


def experiment_of(module: str) -> type[Experiment[Any]]:
    """The experiment that a module runs as a command."""
    home = next(name for name in (f"{module}.study", module) if (ROOT / f"{name.replace('.', '/')}.py").exists())
    found = [of for of in vars(importlib.import_module(home)).values() if isinstance(of, type)]
    (kind,) = [of for of in found if issubclass(of, Experiment) and of.__module__ == home]
    return kind


def test_the_page_lists_every_lecture_that_an_experiment_knows_once() -> None:
    known = {(module, name) for module in {module for module, _ in COMMANDS} for name in experiment_of(module).lectures}
    assert sorted(COMMANDS) == sorted(known)
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize(("module", "name"), COMMANDS)
def test_a_lecture_sets_options_that_the_experiment_has(module: str, name: str) -> None:
    kind = experiment_of(module)
    assert {*kind.lectures[name]} <= {field.name for field in fields(kind.options)}
    assert kind.lectures[name]["model"] in ("gpt2", "gpt2-medium")


def test_a_lecture_gives_the_settings_that_are_not_typed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    given = ("--lecture", SCALING, "--model", TINY, "--output", tmp_path / "out", "--layers", "1", "--factors", "0.5")
    code, _, _ = run_main(divergence.main, monkeypatch, capfd, *given)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    assert (code, found["prompt"]) == (0, "Duct tape will very useful after the apocalypse.")
    assert (found["layers"], found["factors"], found["site"]) == ([1], [0.5], "output")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--lecture skipAlayer", f"--lecture skipAlayer: divergence reproduces {SCALING}; docs/lectures.md lists"),
        (f"--lecture {SCALING} --texts a.txt", "--lecture brings a prompt, and --texts was given"),
    ],
)
def test_a_lecture_that_cannot_be_given_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], given: str, said: str
) -> None:
    code, _, err = run_main(divergence.main, monkeypatch, capfd, *shlex.split(given), "--model", TINY)
    assert (code, said in err) == (2, True)


def test_the_pages_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "lectures.md", "exec"), names)
    printed = capsys.readouterr().out
    moved = [float(of) for of in re.findall(r"predictions (\S+) nats", printed)]
    assert len(moved) == len(names["lectures"]) and min(moved) > 0, "every change reaches the predictions"
