"""The command line: what it prints, and what it answers to mistakes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt import GPT2, Tokenizer, cli, generate
from minigpt.parity import REFERENCE
from tests.conftest import TINY

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `minigpt` with arguments: exit code, standard output, standard error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minigpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return command


def test_verify_passes_on_tiny(run: Run) -> None:
    code, out, err = run("verify", TINY)
    assert (code, err) == (0, "")
    assert "certified against reference.safetensors" in out


def test_verify_prints_json(run: Run) -> None:
    code, out, _ = run("verify", TINY, "--json")
    certificate = json.loads(out)
    assert (code, certificate["verdict"]) == (0, "certified")
    assert 0 < certificate["differences"]["logits"] < certificate["tolerance"]


def test_verify_exits_1_when_the_model_is_not_the_reference(run: Run, tmp_path: Path) -> None:
    model = GPT2.from_pretrained(TINY)
    model.blocks[0].mlp.expand.weight.data *= 1.01
    model.save_pretrained(tmp_path)
    shutil.copy(TINY / REFERENCE, tmp_path)
    code, out, _ = run("verify", tmp_path)
    assert code == 1
    assert "failed" in out


def test_verify_live_asks_transformers_and_nothing_reaches_stderr(run: Run) -> None:
    code, out, err = run("verify", TINY, "--live")
    assert (code, err) == (0, "")
    assert "live run of transformers" in out


def test_generate_prints_the_text_that_the_library_gives(run: Run, tiny: GPT2) -> None:
    tokenizer = Tokenizer.from_pretrained(TINY)
    ids = tokenizer.encode("She was")
    expected = tokenizer.decode(ids + list(generate(tiny, ids, 30)))
    code, out, _ = run("generate", TINY, "--prompt", "She was", "--max-new-tokens", 30)
    assert (code, out) == (0, expected + "\n")


def test_generate_works_under_scales(run: Run) -> None:
    clean = run("generate", TINY, "--prompt", "She was")[1]
    scaled = run("generate", TINY, "--prompt", "She was", "--scale", "blocks.2.output_scale=0.3")[1]
    heads = run("generate", TINY, "--prompt", "She was", "--scale", "blocks.2.attention.head_scale=0,0,1")[1]
    assert len({clean, scaled, heads}) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "weights/none-here"], "offline mode is on"),
        (["verify", "./none-here"], "not a folder"),
        (["verify", TINY, "--dtype", "int8"], "expected one of float32"),
        (["verify", TINY, "--device", "abacus"], "abacus"),
        (["verify", TINY, "--revision", "main"], "revision"),
        (["generate", TINY, "--prompt", ""], "empty"),
        (["generate", TINY, "--prompt", "a", "--max-new-tokens", 300], "ask for 1 to"),
        (["generate", TINY, "--prompt", "a", "--scale", "blocks.2.output_scale"], "NAME=NUMBER"),
        (["generate", TINY, "--prompt", "a", "--scale", "blocks.12.output_scale=2"], "nearest names"),
        (["generate", TINY, "--prompt", "a", "--scale", "blocks.2.attention.head_scale=1,2"], "broadcasts"),
        (["download", TINY, "--to", "elsewhere"], "folder already"),
        (["generate", TINY, "--prompt", "a", "--scale", "blocks.2.output_scale=nan"], "NAME=NUMBER"),
        (["verify", TINY, "--device", "meta"], "expected one of cpu"),
        (["generate", TINY, "--prompt", "a", "--top-k", 3], "--temperature 1"),
        (["generate", TINY, "--prompt", "a", *["--scale", "blocks.2.output_scale=2"] * 2], "twice"),
        (["download", TINY], "nothing to download"),
        (["generate", TINY], "--prompt"),
        (["frobnicate"], "No such command"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(run: Run, arguments: list[object], said: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert said in " ".join(err.split())
    assert out == ""
    assert "Traceback" not in err


def test_help_names_the_three_commands(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("verify", "generate", "download"))


def test_the_installed_command_runs() -> None:
    command = [str(Path(sys.executable).parent / "minigpt"), "verify", str(TINY)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
