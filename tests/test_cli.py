"""The command line: what it prints, and what it answers to mistakes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt import GPT2, Tokenizer, cli, generate, parity
from minigpt.parity import REFERENCE
from tests.blocks import Parallel
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


PARALLEL = ("--block", "tests.blocks:Parallel")


def test_a_block_that_nothing_is_known_of_is_not_verified(run: Run) -> None:
    code, out, err = run("verify", TINY, *PARALLEL)
    assert (code, err) == (1, "")
    assert "not comparable. A modified architecture has no counterpart in transformers" in out


def test_reference_stores_what_verify_holds_later_runs_against(run: Run, tmp_path: Path) -> None:
    GPT2.from_pretrained(TINY, block=Parallel).save_pretrained(tmp_path)
    code, out, err = run("reference", tmp_path, *PARALLEL)
    assert (code, err) == (0, "")
    assert "with the block tests.blocks:Parallel computes in float64 for 2 texts of 32 tokens" in out
    code, out, _ = run("verify", tmp_path, *PARALLEL)
    assert code == 0
    assert "certified against reference.safetensors (of its own: minigpt " in out


def test_a_reference_of_gpt2_is_what_transformers_computes(run: Run, tmp_path: Path) -> None:
    GPT2.from_pretrained(TINY).save_pretrained(tmp_path)
    code, out, err = run("reference", tmp_path)
    assert (code, err) == (0, "")
    assert "holds what transformers computes" in out
    assert "certified against reference.safetensors (transformers " in run("verify", tmp_path, "--dtype", "float64")[1]


def test_a_reference_is_replaced_only_when_asked_and_is_the_same_again(run: Run, tmp_path: Path) -> None:
    GPT2.from_pretrained(TINY, block=Parallel).save_pretrained(tmp_path)
    run("reference", tmp_path, *PARALLEL)
    before = {name: tensor.clone() for name, tensor in load_file(tmp_path / REFERENCE).items()}
    code, _, err = run("reference", tmp_path, *PARALLEL)
    assert (code, "--overwrite replaces it" in err) == (2, True)
    (tmp_path / REFERENCE).write_bytes(b"old")
    assert run("reference", tmp_path, *PARALLEL)[0] == 2
    assert (tmp_path / REFERENCE).read_bytes() == b"old"
    assert run("reference", tmp_path, *PARALLEL, "--overwrite")[0] == 0
    again = load_file(tmp_path / REFERENCE)
    assert before.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_a_reference_that_cannot_be_made_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    GPT2.from_pretrained(TINY).save_pretrained(tmp_path)
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    code, _, err = run("reference", tmp_path)
    assert (code, "minigpt[parity]" in err) == (2, True)
    assert not (tmp_path / REFERENCE).exists()


def test_generate_follows_the_block(run: Run) -> None:
    plain, parallel = (run("generate", TINY, "--prompt", "She was", *block)[1] for block in ((), PARALLEL))
    assert plain != parallel


MINE = "from minigpt import Block\n\nclass Mine(Block):\n    pass\n"


def test_a_block_of_the_current_folder_is_found_behind_all_that_is_installed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "colorsys.py").write_text(MINE)  # a module of Python's own that nothing here has imported
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert "not comparable" in run("verify", TINY, "--block", "mine:Mine")[1]
    assert "has no attribute 'Mine'" in run("verify", TINY, "--block", "colorsys:Mine")[2]


@pytest.mark.parametrize("code", ["1 / 0", "import sys; sys.exit(7)", "x = (", "raise OSError('gone')"])
def test_a_block_whose_module_fails_to_run_is_a_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    (tmp_path / "failing_block.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    status, out, err = run("verify", TINY, "--block", "failing_block:Mine")
    assert (status, out) == (2, "")
    assert "'failing_block:Mine' cannot be imported (" in err
    assert "Traceback" not in err


def test_a_command_whose_output_is_closed_ends_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run("generate", TINY, "--prompt", "a", "--max-new-tokens", 2) == (0, "", "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's name must be text")
def test_a_folder_whose_name_is_no_text_is_a_sentence(run: Run, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "na\udcffme")
    code, out, err = run("verify", tmp_path / "na\udcffme")
    assert (code, out) == (2, "")
    assert "has a name that is not UTF-8" in err and "rename it" in err


def test_generate_warns_of_an_end_outside_the_vocabulary_and_verify_does_not(
    run: Run, small: Callable[..., GPT2], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning of the logger `minigpt`: outside of pytest, Python shows its sentence on standard error."""
    small(vocab_size=4096, eos_token_id=50256).save_pretrained(tmp_path)
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    assert run("verify", tmp_path)[2] == ""
    assert caplog.messages == []
    assert run("generate", tmp_path, "--prompt", "a", "--max-new-tokens", 2)[0] == 0
    assert caplog.messages == [
        "eos_token_id is 50256, outside the vocabulary of 4096 tokens; no token will end the text."
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", TINY, "--block", "tests.blocks:Nothing"], "has no attribute 'Nothing'"),
        (["verify", TINY, "--block", "tests.nothing:Block"], "No module named 'tests.nothing'"),
        (["verify", TINY, "--block", "tests.blocks"], "package.module:Name"),
        (["verify", TINY, "--block", ".blocks:Parallel"], "package.module:Name"),
        (["verify", TINY, "--block", "minigpt:GPT2"], "not a subclass of minigpt.Block"),
        (["verify", TINY, "--block", "tests.blocks:Rotary"], "declares other parameters"),
        (["verify", TINY, "--live", *PARALLEL], "no counterpart"),
        (["reference", "./none-here"], "expected the folder of a checkpoint"),
        (["reference", TINY], "--overwrite replaces it"),
        (["verify", "weights/none-here"], "offline mode is on"),
        (["verify", "./none-here"], "not a folder"),
        (["verify", TINY, "--block", "my_blocks"], "without .py; for example my_blocks:Name."),
        (["verify", TINY, "--block", "mine/my_blocks.py:Parallel"], "for example mine.my_blocks:Parallel."),
        (["verify", TINY, "--block", "mine.my_blocks.Parallel"], "for example mine.my_blocks:Parallel."),
        (["verify", TINY, "--block", ":Parallel"], "for example my_blocks:Parallel."),
        (["verify", TINY, "--dtype", "int8"], "expected one of float32"),
        (["verify", TINY, "--device", "abacus"], "abacus"),
        (["verify", TINY, "--revision", "main"], "revision"),
        (["generate", TINY, "--prompt", ""], "empty"),
        (["generate", TINY, "--prompt", "a", "--max-new-tokens", 300], "ask for 1 to"),
        (["generate", TINY, "--prompt", "a", "--scale", "blocks.2.output_scale"], "NAME=NUMBER"),
        (["generate", TINY, "--prompt", "a", "--scale", "blocks.12.output_scale=2"], "nearest names"),
        (
            ["generate", TINY, "--prompt", "a", "--scale", "blocks.2.head_scale=2"],
            "nearest names are blocks.2.attention.head_scale,",
        ),
        (["generate", TINY, "--prompt", "a", "--scale", "blocks.2.attention.head_scale=1,2"], "broadcasts"),
        (["download", TINY, "--to", "elsewhere"], "folder already"),
        (["generate", TINY, "--prompt", "a", "--scale", "blocks.2.output_scale=nan"], "NAME=NUMBER"),
        (["generate", TINY, "--prompt", "a", "--scale", "blocks.2.output_scale=1e20"], "no longer finite"),
        (["generate", TINY, "--prompt", "a", "--temperature", 1, "--seed", 2**70], "at most 64 bits"),
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


def test_help_names_the_commands(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("verify", "reference", "doctor", "generate", "download"))


def test_the_installed_command_runs() -> None:
    command = [str(Path(sys.executable).parent / "minigpt"), "verify", str(TINY)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
