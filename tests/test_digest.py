"""The digest of the code: what Python runs counts, however it came about, and prose does not."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.divergence.study import Divergence, GridSettings
from experiments.harness import digest
from experiments.harness.digest import code_digest
from experiments.skip_layer import SkipLayer
from minigpt import GPT2
from minigpt.model import MLP, Block
from tests.conftest import ROOT

STUDY = Divergence(GridSettings(model="", prompt="", layers=(2,), factors=(0.5,)))
FORWARD = Block.forward
CODE = '''"""A module."""
def double(x: int) -> int:
    """Twice."""
    return 2 * x
LIMIT = 3
"""A limit."""
'''
OTHER_PROSE = '''"""Another."""

def double(x: int) -> int:  # why
    return (2
            * x)

LIMIT = 3
'''


@pytest.mark.parametrize(
    ("changed", "same"), [(OTHER_PROSE, True), (CODE.replace("2", "3"), False), (CODE.replace("= 3", "= 4"), False)]
)
def test_prose_and_layout_of_a_file_do_not_count_and_every_constant_does(
    tmp_path: Path, changed: str, same: bool
) -> None:
    (tmp_path / "one.py").write_text(CODE)
    (tmp_path / "other.py").write_text(changed)
    one, other = (digest._of_file(tmp_path / name) for name in ("one.py", "other.py"))
    assert (one == other) == same


def test_every_module_counts_but_those_that_draw_show_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {folder.name for folder in digest.LEFT_OUT} == {"page", "tour", "tools"}
    monkeypatch.setattr(digest, "PACKAGES", (tmp_path,))
    monkeypatch.setattr(digest, "LEFT_OUT", (tmp_path / "page",))
    found = list[str]()
    for name in ("model.py", "harness/table.py", "page/charts.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
        found.append(digest._of_packages.__wrapped__())
    assert found[0] != found[1] == found[2] == found[3]


def test_every_process_finds_the_same_digest(tmp_path: Path, model: GPT2) -> None:
    code = (
        "from tests.test_digest import STUDY, code_digest; from tests.conftest import SMALL; "
        "from minigpt import GPT2, GPT2Config; print(code_digest(STUDY, GPT2(GPT2Config(**SMALL))))"
    )
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert said.strip() == code_digest(STUDY, model)


def test_another_experiment_has_another_digest(model: GPT2) -> None:
    assert code_digest(STUDY, model) != code_digest(SkipLayer(STUDY.settings), model)


def scaled_by(factor: float) -> Callable[[Any, Tensor], Tensor]:
    """A forward that differs from another one by a number alone that it has closed over."""

    def forward(self: Block, x: Tensor) -> Tensor:
        return factor * FORWARD(self, x)

    return forward


def patched_class(model: GPT2, patch: pytest.MonkeyPatch, factor: float) -> None:
    patch.setattr(Block, "forward", scaled_by(factor))


def patched_module_of_a_block(model: GPT2, patch: pytest.MonkeyPatch, factor: float) -> None:
    patch.setattr(MLP, "forward", scaled_by(factor))


def patched_instance(model: GPT2, patch: pytest.MonkeyPatch, factor: float) -> None:
    model.blocks[1].forward = MethodType(scaled_by(factor), model.blocks[1])  # type: ignore[method-assign]


def subclass(model: GPT2, patch: pytest.MonkeyPatch, factor: float) -> None:
    model.blocks[1].__class__ = type("Own", (Block,), {"forward": scaled_by(factor), "__module__": "nowhere"})


def patched_experiment(model: GPT2, patch: pytest.MonkeyPatch, factor: float) -> None:
    patch.setattr(Divergence, "measure", scaled_by(factor))


@pytest.mark.parametrize(
    "change", [patched_class, patched_module_of_a_block, patched_instance, subclass, patched_experiment]
)
def test_code_that_was_changed_at_run_time_counts(
    model: GPT2, monkeypatch: pytest.MonkeyPatch, change: Callable[[GPT2, pytest.MonkeyPatch, float], None]
) -> None:
    found = [code_digest(STUDY, model)]
    for factor in (0.5, 0.6):
        change(model, monkeypatch, factor)
        found.append(code_digest(STUDY, model))
    assert len(set(found)) == 3


def test_the_file_of_a_block_from_elsewhere_counts(
    model: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a function of it that no class holds."""
    monkeypatch.syspath_prepend(tmp_path)
    text = "from minigpt.model import Block\ndef double(x): return 2 * x\nclass Own(Block): pass\n"
    (tmp_path / "block_of_mine.py").write_text(text)
    model.blocks[0].__class__ = __import__("block_of_mine").Own
    before = code_digest(STUDY, model)
    (tmp_path / "block_of_mine.py").write_text(text.replace("2", "3"))
    assert code_digest(STUDY, model) != before


@pytest.mark.parametrize("kept", ["buffer", "tensor", "list", "dict"])
def test_what_a_module_keeps_beside_its_weights_counts(model: GPT2, kept: str) -> None:
    """A table of angles, say: no checkpoint holds it, and it decides the numbers."""
    block, found = model.blocks[1], list[str]()
    for value in (1.0, 1.0, 2.0):
        if kept == "buffer":
            block.register_buffer("table", torch.full((3,), value), persistent=False)
        else:
            block.table = {"tensor": torch.full((3,), value), "list": [[value]], "dict": {"angle": value}}[kept]
        found.append(code_digest(STUDY, model))
    assert found[0] == found[1] != found[2]


def test_weights_do_not_count(model: GPT2) -> None:
    before = code_digest(STUDY, model)
    with torch.no_grad():
        model.final_norm.weight += 1
    assert code_digest(STUDY, model) == before


HELPER = "SIZE = 2\ndef double(x): return SIZE * x\ndef other(x): return x\n"
BLOCK = (
    "from minigpt.model import Block\nimport torch\nfrom torch import nn\nfrom functools import partial\n"
    "{imports}\nclass Own(Block):\n    temperature = 0.7\n    norm = nn.LayerNorm\n"
    "    def forward(self, x, cache=None):\n        return super().forward(x) * {call}(1) * LIMIT + DIRECTION[0]\n"
    "LIMIT = 3\nUNUSED = 4\nDIRECTION = torch.ones(2)\n"
)
CHANGES: dict[str, tuple[str, bool]] = {
    "nothing": ("pass", False),
    "a number of the class": ("Own.temperature = 0.8", True),
    "a part of the class": ("Own.norm = nn.RMSNorm", True),
    "a part with an argument": ("Own.norm = partial(nn.LayerNorm, eps=0.5)", True),
    "a global number": ("globals().update(LIMIT=5)", True),
    "a global direction": ("DIRECTION[1] = 2", True),
    "a global that nothing names": ("globals().update(UNUSED=5)", False),
    "what a function of another module does": ("helper.double.__code__ = (lambda x: 5 * x).__code__", True),
    "a number that it names": ("helper.SIZE = 3", True),
    "a function that nothing calls": ("helper.other.__code__ = (lambda x: 5 * x).__code__", False),
    "a base class": ("Own.__bases__[0].extra = 3", True),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize(
    ("imports", "call"),
    [("import helper_of_mine as helper", "helper.double"), ("from helper_of_mine import double", "double")],
)
def test_what_a_notebooks_class_names_counts_and_nothing_else(
    model: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, imports: str, call: str
) -> None:
    """Defined in a module without a file, as `__main__` of a notebook is."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_mine.py").write_text(HELPER)
    monkeypatch.delitem(sys.modules, "helper_of_mine", raising=False)
    notebook = ModuleType("notebook_of_mine")
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    exec(BLOCK.format(imports=imports, call=call), vars(notebook))
    monkeypatch.setattr(Block, "extra", 2, raising=False)
    vars(notebook)["helper"] = sys.modules["helper_of_mine"]
    model.blocks[0].__class__ = vars(notebook)["Own"]
    before = code_digest(STUDY, model)
    assert code_digest(STUDY, model) == before
    change, counts = CHANGES[case]
    exec(change, vars(notebook))
    assert (code_digest(STUDY, model) != before) == counts


def test_a_number_of_one_module_counts(model: GPT2) -> None:
    found = {code_digest(STUDY, model)}
    for temperature in (0.5, 0.6):
        model.blocks[1].temperature = temperature  # type: ignore[assignment]
        found.add(code_digest(STUDY, model))
    assert len(found) == 3
