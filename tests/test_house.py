"""The house: imports point one way, and transformers stays outside."""

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutants
from tests.conftest import ROOT, TINY

ORDER = (
    ("interrupts", "files", "cache", "linear"),
    ("config",),
    ("parameters",),
    ("checkpoint",),
    ("hub",),
    ("model", "predictions"),
    ("tokenizer", "measures"),
    ("engine",),
    ("generate", "alone"),
    ("passes",),
    ("sweep", "patching"),
    ("selfcheck", "compare", "sensitivity", "readouts"),
    ("parity",),
    ("doctor",),
    ("cli",),
)
EXPERIMENTS = (
    ("page.charts", "page.figures"),
    ("page.report",),
    ("harness.table", "harness.options", "harness.output", "harness.ranks", "harness.digest"),
    ("harness.verdicts", "harness.corpus"),
    ("harness.experiment",),
    ("harness.running", "harness.pairs"),
    ("harness.writing",),
    ("harness.command",),
    ("divergence.rows", "token_loss.figures"),
    ("divergence.claims", "divergence.figures"),
    ("divergence.study", "token_loss.study", "skip_layer", "sensitivity", "behaviour"),
    ("patching", "knockout", "ablation", "lens", "steering"),
    ("divergence.__main__", "token_loss.__main__"),
    ("tools.peers", "tools.train", "tools.copier"),
    ("tour.charts",),
    ("tour.tour", "tools.patch_peers"),
    ("tools.benchmark",),
    ("tour.__main__", "train", "copier", "benchmark"),
)
"""Page, harness, questions; then the tour, and the tools."""


def levels(order: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    """Module -> how high it stands."""
    return {name: level for level, names in enumerate(order) for name in names}


ORDERS = {"minigpt": levels(ORDER), "experiments": levels(EXPERIMENTS)}
MODULES = [(package, name) for package, known in ORDERS.items() for name in known]


def path_of(package: str, name: str) -> Path:
    return ROOT / package / f"{name.replace('.', '/')}.py"


def imported_by(package: str, name: str) -> set[str]:
    """The modules of a package that one of them imports, anywhere in it, also within a function."""
    found, known = set(), ORDERS[package]
    for node in ast.walk(ast.parse(path_of(package, name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
            module = str(node.module).partition(".")[2]
            inner = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {module} if module in known else inner & set(known)
    return found


@pytest.mark.parametrize("package", ORDERS)
def test_the_order_names_every_module(package: str) -> None:
    folder = ROOT / package
    modules = {".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")}
    assert {name for name in modules if not name.endswith("__init__")} == set(ORDERS[package])


@pytest.mark.parametrize(("package", "name"), MODULES)
def test_imports_point_one_way(package: str, name: str) -> None:
    order = ORDERS[package]
    assert all(order[other] < order[name] for other in imported_by(package, name))


def test_the_imports_of_a_function_and_of_a_part_of_a_package_are_seen() -> None:
    assert {"divergence.figures", "divergence.claims", "harness.table"} <= imported_by(
        "experiments", "divergence.study"
    )
    assert {"page.report", "page.figures"} <= imported_by("experiments", "harness.writing")
    assert "hub" in imported_by("minigpt", "parity")


def test_no_package_of_experiments_imports_a_module_when_it_is_imported() -> None:
    for path in (ROOT / "experiments").glob("*/__init__.py"):
        assert packages_of(path) == set()


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
    assert not any("tests" in packages_of(path) for path in (ROOT / "experiments").rglob("*.py"))


def test_importing_the_library_imports_neither_transformers_nor_altair() -> None:
    code = "import sys, minigpt, minigpt.cli; print([m for m in ('transformers', 'altair') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_loading_and_sweeping_do_not_import_the_compiler() -> None:
    """It takes a second, which nobody should wait for."""
    code = f"import sys, minigpt; model = minigpt.GPT2.from_pretrained({str(TINY)!r}); minigpt.sweep(model, [[1, 2]]); "
    code += "print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_checkpoint_names_appear_in_checkpoint_alone() -> None:
    for path in (ROOT / "minigpt").glob("*.py"):
        text = path.read_text()
        assert ("c_attn" in text or '"wte' in text) == (path.stem == "checkpoint")


def test_the_embedded_checkpoint_is_the_one_that_its_readme_describes() -> None:
    digest = hashlib.sha256((TINY / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (ROOT / "weights" / "README.md").read_text()


@pytest.mark.parametrize("argued", mutants.EQUIVALENT, ids=lambda argued: f"{argued.file} {argued.became}")
def test_a_mutant_that_is_argued_is_one_of_a_line_that_stands(argued: mutants.Equivalent) -> None:
    lines = {line.strip() for line in (ROOT / argued.file).read_text().splitlines()}
    assert argued.line in lines
    assert argued.file in mutants.QUICK


def test_the_tests_that_mutants_meet_exist() -> None:
    named = {name for tests in (*mutants.QUICK.values(), *mutants.OTHERS.values()) for name in tests}
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in named)
    assert set(mutants.QUICK) == set(mutants.OTHERS)
    assert all((ROOT / file).exists() for file in mutants.QUICK)
