"""The output folder: which files are a run's, and what becomes of the others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.harness.output import SUMMARY, alone_in, check_output, results_in, sha256_of
from tests.fuzzing import contents

OWN = ("n.csv", "n_*.png", "report.html")
SETTINGS = {"a": 1}


def write(folder: Path, **files: str) -> None:
    """A run that writes some files, which its summary names."""
    with results_in(folder) as scratch:
        for name, content in files.items():
            (scratch / name.replace("__", ".")).write_text(content)
        named = {path.name: sha256_of(path) for path in scratch.iterdir()}
        (scratch / SUMMARY).write_text(json.dumps({"settings": SETTINGS, "code": "code", "files": named}))


def check(folder: Path, overwrite: bool = False) -> None:
    check_output(folder, SETTINGS, "code", overwrite, OWN)


def test_the_files_of_the_last_run_leave_with_its_summary_and_all_others_stay(tmp_path: Path) -> None:
    """Others: under names like a run's, under a run's name but changed since, and links."""
    write(tmp_path, n__csv="1", n_old__png="old", n_edited__png="old")
    for name in ("n_mine.png", "notes.txt", "n_edited.png"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "n_linked.png").symlink_to("n_old.png")
    write(tmp_path, n__csv="2", n_new__png="new")
    there = contents(tmp_path)
    del there[SUMMARY]
    mine = dict.fromkeys(("n_mine.png", "notes.txt", "n_edited.png"), b"mine")
    assert there == {"n.csv": b"2", "n_new.png": b"new", "n_linked.png": b"n_old.png", **mine}


def test_a_summary_reaches_no_file_outside_its_folder_and_none_that_it_only_names(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "x").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    names = dict.fromkeys(
        ("../x", str(tmp_path / "x"), "", ".", "..", "a\0b", "\ud800", "x" * 5000), sha256_of(tmp_path / "x")
    )
    (folder / SUMMARY).write_text(json.dumps({"files": {**names, "notes.txt": "0" * 64}}))
    write(folder, n__csv="1")
    assert (tmp_path / "x").read_text() == (folder / "notes.txt").read_text() == "mine"
    for files in ([], "x", {"n.csv": 3}, None):
        (folder / SUMMARY).write_text(json.dumps({"files": files}))
        write(folder, n__csv="1")


@pytest.mark.parametrize("stop", range(6))
def test_a_run_that_is_stopped_while_its_files_move_leaves_nothing_that_the_next_one_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    write(tmp_path, n__csv="1", n_a__png="old", n_b__png="old")
    (tmp_path / "n_mine.png").write_text("mine")
    left, replace, unlink = [stop], Path.replace, Path.unlink

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*arguments: object, **named: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return change(*arguments, **named)

        return changed

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", counted(replace))
        patch.setattr(Path, "unlink", counted(unlink))
        write(tmp_path, n__csv="2", n_b__png="new", n_c__png="new")
    assert stop == 0 or not (tmp_path / SUMMARY).exists()
    (tmp_path / "n_mine.png").rename(tmp_path.parent / f"kept{stop}")
    check(tmp_path)  # what is there is known to be a run's
    (tmp_path.parent / f"kept{stop}").rename(tmp_path / "n_mine.png")
    write(tmp_path, n__csv="3")
    there = contents(tmp_path)
    del there[SUMMARY]
    assert there == {"n.csv": b"3", "n_mine.png": b"mine"}


@pytest.mark.parametrize("name", ["n.csv", "report.html", "n_mine.png"])
def test_files_that_no_run_has_written_are_not_taken_for_a_runs_by_their_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds other files \({name}\)"):
        check(tmp_path)
    check(tmp_path, overwrite=True)


def test_a_file_of_the_run_that_was_changed_since_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path, n__csv="1", n_a__png="old")
    (tmp_path / "n_mine.png").write_text("mine")
    check(tmp_path)
    for name in ("n.csv", "n_a.png"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=rf"holds {name}, not as this run wrote it"):
            check(tmp_path)
        check(tmp_path, overwrite=True)
        (tmp_path / name).write_bytes(before)


@pytest.mark.parametrize("name", [SUMMARY, "n.csv", "n_a.png", "report.html", ".lock", "windows"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_or_a_folder_in_the_place_of_a_runs_file_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    for make in (lambda path: path.symlink_to("nowhere"), lambda path: path.mkdir()):
        make(tmp_path / name)
        if name == "windows" and (tmp_path / name).is_dir():
            check_output(tmp_path, SETTINGS, "code", overwrite, (*OWN, name))
        else:
            with pytest.raises(ValueError, match="where a run has a f"):
                check_output(tmp_path, SETTINGS, "code", overwrite, (*OWN, "windows"))
        shutil.rmtree(tmp_path / name) if not (tmp_path / name).is_symlink() else (tmp_path / name).unlink()


def test_a_file_that_cannot_be_replaced_is_noticed_before_anything_is(tmp_path: Path) -> None:
    write(tmp_path, n__csv="1")
    (tmp_path / "n_a.png").mkdir()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"n_a\.png is another kind of file"):
        write(tmp_path, n__csv="2", n_a__png="new")
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """Also by what holds a folder without results, such as the training."""
    (tmp_path / "theirs").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match="is a link"), alone_in(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / ".lock").is_symlink()
    assert (tmp_path / "theirs").read_text() == "mine"


def test_the_output_folder_itself_may_be_a_link_to_a_folder(tmp_path: Path) -> None:
    """It is what was typed; a link to nothing is a sentence."""
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    check(tmp_path / "out")
    write(tmp_path / "out", n__csv="1")
    assert (tmp_path / "real" / "n.csv").read_text() == "1"
    shutil.rmtree(tmp_path / "real")
    with pytest.raises(ValueError, match="is a link to nothing"):
        check(tmp_path / "out")
