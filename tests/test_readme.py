"""The README keeps its promises: its Python runs, its commands and files exist."""

import re
import subprocess
import sys

import pytest
import torch

from minigpt import GPT2, scaled
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line and not line.startswith("#")
]


def test_the_python_runs_from_top_to_bottom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "tensor([[" in printed
    parallel, ids = names["parallel"], names["ids"]
    assert isinstance(parallel, GPT2) and isinstance(ids, torch.Tensor)
    for site in ("output", "attention", "mlp"):  # the figures of the other block are what its own runs give
        with torch.no_grad():
            clean = parallel.residuals(ids)
            with scaled(parallel, {f"blocks.2.{site}_scale": 0.5}):
                norm = float((parallel.residuals(ids) - clean)[-1, :, 1:].norm())
        (said,) = re.findall(rf"^{site} tensor\((.*?),? ?(?:dtype=.*)?\)$", printed, re.MULTILINE)
        assert float(said) == pytest.approx(norm, rel=1e-3)


def test_there_is_python_and_there_are_commands() -> None:
    assert sum(kind == "python" for kind, _ in BLOCKS) >= 2
    assert {"make study", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_exist(command: str) -> None:
    words = [word for word in command.split() if not word.startswith("OMP_NUM_THREADS=")]
    if words[0].endswith("torchrun"):  # its own options, then -m and the module
        words = ["python", *words[words.index("-m") :]]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "git":
        return
    else:
        options = {word for word in words if word.startswith("--")}
        program = program_of(words)
        shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        assert all(option in shown for option in options), shown


def program_of(words: list[str]) -> list[str]:
    """The command without its arguments, by this Python."""
    if words[0].endswith("minigpt"):
        return [sys.executable, "-c", "from minigpt.cli import main; main()", words[1]]
    assert words[0].endswith("python"), words
    return [sys.executable, *words[1:3]]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_the_files_that_it_links_to_exist(path: str) -> None:
    assert (ROOT / path).exists()
