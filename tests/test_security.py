"""SECURITY.md says what strangers could try; every row names the test that shows what stops them."""

import ast
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from experiments.divergence import study as divergence
from experiments.divergence.study import Divergence, GridSettings
from experiments.harness import command, experiment, running, writing
from experiments.harness.corpus import Shards, Survey, Texts, digest_of
from experiments.harness.ranks import Ranks
from minigpt import GPT2, CheckpointError, Sweep, Tokenizer, cli, hub, parity, sweep
from minigpt.files import MODE, open_tensors, printable, shown, write_atomically
from tests.conftest import ROOT, TINY
from tests.hub_server import NAME, Server, make, point_at

STEERING = {
    "clear the screen": "\x1b[2J",
    "write the title": "\x1b]0;owned\x07",
    "go back and write over": "\rError: none",
    "turn the direction": "\u202egnp.exe",
    "half a character": "\ud800",
    "eight-bit controls": "\x9b31m",
}


def rows() -> list[list[str]]:
    """The cells of SECURITY.md's table."""
    lines = [line for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[1][:40])
def test_every_row_of_the_table_names_a_test_that_exists(row: list[str]) -> None:
    assert len(row) == 4 and all(row)
    file, _, name = row[3].strip("` |").partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# Sentences.


@pytest.mark.parametrize("case", STEERING)
def test_a_sentence_holds_nothing_that_steers_a_terminal(
    case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = f"a name {STEERING[case]} in a file"
    for said in (printable(text), shown(text), str(CheckpointError(text))):
        assert said.isprintable()

    def fail() -> None:
        raise ValueError(text)

    with pytest.raises(SystemExit):
        cli.run(fail)
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err[:-1].isprintable()


def test_what_a_strangers_files_say_is_shown_without_steering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The reference's metadata, and the tokens of a tokenizer."""
    shutil.copytree(TINY, tmp_path / "model")
    with open_tensors(tmp_path / "model" / "reference.safetensors") as file:
        about = {**file.metadata(), "transformers": "\x1b]0;owned\x07\nforged: certified"}
    save_file(
        load_file(tmp_path / "model" / "reference.safetensors"), tmp_path / "model" / "reference.safetensors", about
    )
    parsed = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    parsed["added_tokens"][0]["content"] = "\x1b[2J"
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(parsed))
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    for arguments in (["verify", str(tmp_path / "model")], ["--output", str(tmp_path / "out")]):
        prompt = ["--model", str(tmp_path / "model"), "--prompt", "so \x1b[2J it", "--factors", "0.5"]
        monkeypatch.setattr(sys, "argv", ["minigpt", *arguments, *([] if arguments[0] == "verify" else prompt)])
        with pytest.raises(SystemExit) as stopped:
            cli.main() if arguments[0] == "verify" else cli.run(divergence.main)
        out = capfd.readouterr().out
        assert not stopped.value.code
        assert all(line.isprintable() for line in out.splitlines())
        assert not any(line.startswith("forged") for line in out.splitlines())


def test_letters_of_every_script_stay_as_they_are() -> None:
    assert printable("naïve 漢字 🙂 שלום\nnext") == "naïve 漢字 🙂 שלום\nnext"


def test_what_is_shown_of_a_value_is_short() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, list(range(10**6)), {str(i): i for i in range(10**4)}, 10**4000, deep):
        assert len(shown(value)) < 200


# Result files.


def spoil(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, or leave out, tensors of a saved sweep."""
    with open_tensors(path) as file:
        about = file.metadata()
    found: dict[str, torch.Tensor | None] = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, about)


HOSTILE_SWEEPS: dict[str, dict[str, torch.Tensor | None]] = {
    "without the clean norms": {"clean_sq": None},
    "without the texts": {"ids": None},
    "fewer cells": {"difference_sq": torch.zeros(1, 1, 6, 2, 10, dtype=torch.float64)},
    "no axes": {"clean_sq": torch.zeros((), dtype=torch.float64)},
    "other texts": {"ids": torch.zeros(3, 10, dtype=torch.long)},
    "other lengths": {"lengths": torch.zeros(7, dtype=torch.long)},
    "half of the predictions": {"predictions.loss": torch.zeros(1)},
    "other writes": {"written": torch.zeros(1, dtype=torch.float64)},
}


@pytest.mark.parametrize("case", HOSTILE_SWEEPS)
def test_a_hostile_sweep_is_a_sentence(model: GPT2, ids: torch.Tensor, tmp_path: Path, case: str) -> None:
    path = tmp_path / "sweep.safetensors"
    sweep(model, ids, (0, 1), (0.5, 2.0)).save(path)
    assert Sweep.load(path).layers == (0, 1)
    spoil(path, **HOSTILE_SWEEPS[case])
    with pytest.raises(ValueError, match="is not a saved sweep"):
        Sweep.load(path)


SUMMARIES = {
    "nested deeply": b'{"settings": ' + b"[" * 100_000,
    "no object": b"[1]",
    "not UTF-8": b"\xff\xfe",
    "another type inside": b'{"settings": 3, "experiment": ["../../x"]}',
    "a name that leads away": b'{"settings": {}, "experiment": "../../x"}',
    "a name that many files begin with": b'{"settings": {}, "experiment": "n"}',
}


@pytest.mark.parametrize("case", SUMMARIES)
def test_a_hostile_result_file_is_a_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A summary in the output folder, and with --overwrite it is replaced, and nothing outside is touched."""
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    for name in ("x.csv", "deep/out/notes.txt", "deep/out/numbers.csv", "deep/out/n_thesis/thesis.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    folder = tmp_path / "deep" / "out"
    (folder / "summary.json").write_bytes(SUMMARIES[case])
    arguments = ["experiment", "--model", str(TINY), "--factors", "0.5", "--quiet", "--output", str(folder)]
    for more, expected in ([], (2, 1)), (["--overwrite"], (0, 0)):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.run(divergence.main)
        assert (stopped.value.code or 0, capfd.readouterr().err.count("\n")) == expected
    assert {path.name for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"mine"} == {
        "x.csv",
        "notes.txt",
        "numbers.csv",
        "thesis.txt",
    }
    assert json.loads((folder / "summary.json").read_text())["experiment"] == "divergence"


@pytest.mark.parametrize("shape", [[10**12], [2, 3, 10**9], [], "x", [-1]])
def test_a_shard_that_claims_another_shape_is_a_sentence(tmp_path: Path, shape: object) -> None:
    """With the right settings: their hash is no secret."""
    shards, windows = Shards(tmp_path, {"a": 1}), [[1, 2], [3, 4]]
    shards.write(0, windows, {"value": torch.zeros(2, 2, 3, dtype=torch.float64)})
    with open_tensors(shards.path(0)) as file:
        about = json.loads(file.metadata()["shard"])
    save_file(load_file(shards.path(0)), shards.path(0), {"shard": json.dumps({**about, "shapes": {"value": shape}})})
    with pytest.raises(ValueError, match="is not what this run wrote there"):
        shards.combine(Survey({"windows": 2}, [digest_of(windows)]))


# Files that are written.


def test_a_file_is_whole_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[str]()
    sync, replace = __import__("os").fsync, Path.replace
    monkeypatch.setattr("minigpt.files.os.fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("rename"), replace(self, to))[1])
    write_atomically(tmp_path / "a.txt", lambda file: file.write_text("new"))
    assert order == ["sync", "rename", "sync"]  # the file, then its name, then the folder
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == MODE


def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    def write(file: Path) -> None:
        names.append(file.parent.name)
        file.write_text("new")

    def leave(process: int) -> Path:
        leftover = tmp_path / re.sub(r"-\d+-", f"-{process}-", names[-1])
        leftover.mkdir()
        return leftover

    names = list[str]()
    write_atomically(tmp_path / "a.txt", write)
    gone, alive, mine = leave(2**22 + 5), leave(1), tmp_path / ".a.txt.swp"
    mine.write_text("of an editor")
    write_atomically(tmp_path / "a.txt", write)
    assert not gone.exists()
    assert alive.exists() and mine.exists()


# The hub.


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub on loopback."""
    server = Server()
    point_at(server.endpoint, tmp_path, monkeypatch)
    yield server
    huggingface_hub.close_session()
    server.stop()


LEADING_AWAY = (
    "../../escaped.safetensors",
    "model-/../../../../escaped-of-1.safetensors",
    "/tmp/model-1-of-1.safetensors",
    "model-..\\..\\escaped-of-1.safetensors",
)


@pytest.mark.parametrize("name", LEADING_AWAY)
def test_a_repository_whose_files_lead_out_of_the_cache_writes_nothing_there(
    server: Server, tmp_path: Path, name: str
) -> None:
    files = make(tmp_path / "made")[1]
    server.push({**files, name: b"escaped"})
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    try:
        hub.download(NAME, tmp_path / "to" / "folder")
    except CheckpointError as error:
        assert "\n" not in str(error)
    escaped = [path for path in tmp_path.rglob("*escaped*") if "snapshots" not in path.parts and path.is_file()]
    assert escaped == []
    after = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert all(path.is_relative_to(tmp_path / "to") for path in after - before)
    assert not Path("/tmp/model-1-of-1.safetensors").exists()


def test_a_hub_that_says_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and is silent; the client itself has no limit for these requests, and would wait here."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        point_at(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        with pytest.raises(CheckpointError, match="cannot be reached"):
            hub.find(NAME)
    huggingface_hub.close_session()


# Wrong numbers.


class Edited(Divergence):
    """A study that edits the weights between the certificate and the numbers."""

    def run(self, model: GPT2, ids: Sequence[Sequence[int]], alone: bool) -> Sweep:
        with torch.no_grad():
            model.blocks[7].mlp.expand.weight[0, 0] += 1e-4
        return super().run(model, ids, alone)


@pytest.mark.parametrize(("kind", "refused"), [(Divergence, False), (Edited, True)])
def test_weights_that_are_edited_during_a_study_make_its_certificate_void(
    kind: Callable[[GridSettings], Divergence], refused: bool
) -> None:
    study = kind(GridSettings(model=str(TINY), prompt=experiment.PROMPT, layers=(2,), factors=(0.5,)))
    model, tokenizer = GPT2.from_pretrained(TINY), Tokenizer.from_pretrained(TINY)
    if not refused:
        assert running.run_prompt(study, model, tokenizer).checked.certificate is not None
        return
    with pytest.raises(parity.CheckError, match="edited after the model was certified"):
        running.run_prompt(study, model, tokenizer)


def test_windows_of_edited_weights_are_not_taken_up_by_a_later_run(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("The old man opened the door and saw the sea.\n" * 4)
    texts = Texts.of(tmp_path / "texts.txt", "text", 8, None, experiment.SHORTEST)

    def run(kind: type[Divergence], folder: str) -> experiment.Study[Sweep] | None:
        settings = GridSettings(model=str(TINY), prompt=None, layers=(2,), factors=(0.5,), texts=texts)
        model, tokenizer = GPT2.from_pretrained(TINY), Tokenizer.from_pretrained(TINY)
        with ExitStack() as held:
            return running.run_over_corpus(kind(settings), model, tokenizer, tmp_path / folder, Ranks(), held)

    with pytest.raises(parity.CheckError, match="edited after"):
        run(Edited, "out")
    again, fresh = run(Divergence, "out"), run(Divergence, "fresh")
    assert again is not None and fresh is not None
    for name, estimate in again.tables.items():
        torch.testing.assert_close(estimate.value, fresh.tables[name].value, rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_that_is_gone_certifies_nothing(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    model = GPT2.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    certificate = parity.certify(model)
    assert certificate.verdict == "not certified"
    assert "is not a folder" in certificate.sentence()


def test_a_save_that_fails_between_its_files_leaves_the_old_checkpoint(
    model: GPT2, small: Callable[..., GPT2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system that lets no file be replaced while it is mapped."""
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    replace = Path.replace

    def refuse(self: Path, to: Path) -> Path:
        if to.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(to))
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(CheckpointError, match="cannot be written"):
        small(seed=1, layer_norm_epsilon=0.5).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_command_to_repeat_a_run_can_be_pasted_into_a_shell_whatever_its_prompt_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = "it's \x1b[201~ \u202e a\tnew\nline \\ é"
    monkeypatch.setattr(sys, "argv", ["experiment", "--prompt", prompt, "--factors", "0.5"])
    typed = command._as_typed("divergence")
    assert typed.isprintable()
    shown = f"printf '%s\\0' {typed}"
    words = subprocess.run(["bash", "-c", shown], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout
    assert words.decode().split("\0")[-4:-1] == [prompt, "--factors", "0.5"]
