"""The house: imports point one way, and transformers stays outside."""

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY

ORDER = (
    ("files", "cache", "linear"),
    ("config",),
    ("parameters",),
    ("checkpoint",),
    ("hub",),
    ("model", "predictions"),
    ("tokenizer", "measures"),
    ("generate", "engine"),
    ("sweep",),
    ("selfcheck", "compare", "sensitivity"),
    ("parity",),
    ("doctor",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imported_by(name: str) -> set[str]:
    """The modules of the library that one of them imports."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "minigpt" / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "minigpt":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minigpt."):
            found.add(str(node.module).split(".")[1])
    return found


def test_the_order_names_every_module() -> None:
    modules = {path.stem for path in (ROOT / "minigpt").glob("*.py")} - {"__init__"}
    assert modules == set(LEVEL)


@pytest.mark.parametrize("name", LEVEL)
def test_imports_point_one_way(name: str) -> None:
    assert all(LEVEL[other] < LEVEL[name] for other in imported_by(name))


def packages_of(path: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


def test_only_parity_imports_transformers_and_nothing_of_the_library_an_extra() -> None:
    for path in (ROOT / "minigpt").glob("*.py"):
        allowed = {"transformers"} if path.stem == "parity" else set()
        assert packages_of(path) & {"transformers", "altair", "tqdm", "experiments", "tests"} == allowed


def test_experiments_never_import_tests() -> None:
    assert not any("tests" in packages_of(path) for path in (ROOT / "experiments").glob("*.py"))


def test_importing_the_library_imports_neither_transformers_nor_altair() -> None:
    code = "import sys, minigpt, minigpt.cli; print([m for m in ('transformers', 'altair') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_checkpoint_names_appear_in_checkpoint_alone() -> None:
    for path in (ROOT / "minigpt").glob("*.py"):
        text = path.read_text()
        assert ("c_attn" in text or '"wte' in text) == (path.stem == "checkpoint")


def test_the_embedded_checkpoint_is_the_one_that_its_readme_describes() -> None:
    digest = hashlib.sha256((TINY / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (ROOT / "weights" / "README.md").read_text()
