"""Hostile checkpoints are refused: by a sentence, within a second, before anything large is allocated."""

import ast
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigpt import GPT2, Block, CheckpointError
from minigpt.checkpoint import MOST_PROBLEMS
from minigpt.model import block_named
from tests import hostile
from tests.blocks import BLOCKS, Parallel
from tests.conftest import ROOT

SECOND, MEGABYTES_200 = 1.0, 200 * 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(name: str) -> int:
    """Bytes of this process, by Linux's own count."""
    return 1024 * next(int(row.split()[1]) for row in STATUS.read_text().splitlines() if row.startswith(name))


def cost_of(load: Callable[[], object]) -> tuple[float, int]:
    """Seconds of processor time, and how far the memory in use rose at its highest."""
    try:
        CLEAR.write_text("5")  # the peak starts anew
        before = memory("VmRSS")
    except OSError:
        before = -1
    begun = time.process_time()
    load()
    seconds = time.process_time() - begun
    return seconds, memory("VmHWM") - before if before >= 0 else 0


@pytest.mark.parametrize("name", hostile.CASES)
def test_a_hostile_checkpoint_ends_in_a_sentence_soon_and_without_much_memory(tmp_path: Path, name: str) -> None:
    spoil, sentence = hostile.CASES[name]
    folder = tmp_path / "checkpoint"
    hostile.build(folder)
    spoil(folder)

    def load() -> None:
        with pytest.raises(CheckpointError) as caught:
            GPT2.from_pretrained(folder)
        said = str(caught.value)
        assert sentence in said
        assert all(letter.isprintable() or letter == "\n" for letter in said)
        assert len(said) < 10_000
        assert said.count("\n") <= 3 * (MOST_PROBLEMS + 1)

    seconds, rose = cost_of(load)
    # Not how fast it is, but that the work has a bound: processor time, which other programs do not lengthen.
    assert seconds < SECOND
    assert rose < MEGABYTES_200
    assert not (tmp_path / "owned").exists() and not Path("owned").exists()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("values", [{"n_layer": 2**31 - 1}, {"n_embd": 2**31 - 1, "n_head": 1}, {"n_inner": 2**31 - 1}])
def test_a_config_beyond_all_bounds_builds_nothing_of_another_block(
    tmp_path: Path, block: type[Block], values: dict[str, int]
) -> None:
    torch.manual_seed(0)
    GPT2(hostile.SHAPE, block).save_pretrained(tmp_path)
    hostile.change_config(tmp_path, **values)

    def load() -> None:
        with pytest.raises(CheckpointError):
            GPT2.from_pretrained(tmp_path, block=block)

    seconds, rose = cost_of(load)
    assert seconds < SECOND
    assert rose < MEGABYTES_200


def test_there_are_at_least_forty_of_them() -> None:
    assert len(hostile.CASES) >= 40


def test_what_is_spoiled_is_a_whole_checkpoint_before(tmp_path: Path) -> None:
    hostile.build(tmp_path)
    assert GPT2.from_pretrained(tmp_path).config == hostile.SHAPE


@pytest.mark.skipif(not os.access(CLEAR, os.W_OK), reason="needs Linux's count of the highest memory in use")
def test_a_loader_that_allocates_first_and_looks_then_is_found(tmp_path: Path) -> None:
    _, rose = cost_of(lambda: bytearray(os.urandom(1)) * (300 * 2**20))
    assert rose > MEGABYTES_200


def test_a_link_from_a_snapshot_to_the_caches_blobs_is_followed(tmp_path: Path) -> None:
    """As huggingface_hub keeps its downloads."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    hostile.build(snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(tmp_path / "models--a--b" / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert GPT2.from_pretrained(snapshot).config == hostile.SHAPE


def test_a_link_within_the_folder_and_a_link_to_the_folder_are_followed(tmp_path: Path) -> None:
    hostile.build(tmp_path / "real")
    (tmp_path / "real" / "model.safetensors").rename(tmp_path / "real" / "weights")
    (tmp_path / "real" / "model.safetensors").symlink_to("weights")
    (tmp_path / "alias").symlink_to("real")
    assert GPT2.from_pretrained(tmp_path / "alias").config == hostile.SHAPE


OWNED = "from pathlib import Path\nPath('owned').touch()\nfrom minigpt import Block as Stranger\n"


def test_a_block_that_a_config_names_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its module lies where Python would find it: whoever loads a checkpoint gives the block."""
    hostile.build(tmp_path / "checkpoint")
    (tmp_path / "strange.py").write_text(OWNED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    hostile.name_a_block(tmp_path / "checkpoint", "strange:Stranger")
    for block in (Block, Parallel):
        with pytest.raises(CheckpointError, match="saved with the block strange:Stranger"):
            GPT2.from_pretrained("checkpoint", block=block)
    assert "strange" not in sys.modules
    assert not Path("owned").exists()
    block_named("strange:Stranger")
    assert Path("owned").exists(), "such a module would do harm when it is imported"


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize(
    "path", sorted(path for part in ("minigpt", "experiments") for path in (ROOT / part).rglob("*.py"))
)
def test_no_pickle_is_ever_read(path: Path) -> None:
    """Not by these modules, and not by torch.load or numpy.load, which may read one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} | {
                str(getattr(node, "module", "")).split(".")[0]
            }
            assert not names & PICKLES
            assert not (isinstance(node, ast.ImportFrom) and any(alias.name == "load" for alias in node.names))
        if isinstance(node, ast.Attribute) and node.attr == "load":
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            assert owner in {"checkpoint", "Sweep", "dist"}, f"line {node.lineno}: {ast.unparse(node)}"
