"""The output folder: held by one run at a time, and written all or nothing."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minigpt.files import naming, read_json, settle, sync

SUMMARY = "summary.json"
MOST_SUMMARY = 64 * 2**20
"""Bytes of a summary that is read."""
WINDOWS = "windows"
"""The folder within the output folder that holds what a corpus run has measured so far."""
LOCK = ".lock"
SCRATCH = re.compile(r"\.writing\.[a-z0-9_]{8}")
"""Folders of files that are not in their places yet; of a run that was killed, they say what it put there."""
FORMER = "former.json"
"""In such a folder: the summary of the run that is being replaced."""


def check_output(folder: Path, settings: dict[str, Any], code: str, overwrite: bool, own: Sequence[str]) -> None:
    """Refuse, with a ValueError, a folder that cannot be written or that holds anything but this very run.

    `code` is the digest of what computes the numbers, and `own` the patterns of all names that a run may give. A file
    under one of them counts as a run's where a summary gives its sha256; any other is replaced with `overwrite` only. A
    link, or a folder in a file's place, is never replaced.
    """
    parent = folder if folder.exists() else next(path for path in folder.absolute().parents if path.exists())
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"--output {folder} is a link to nothing; remove it, or choose another folder.")
    if not parent.is_dir():
        raise ValueError(f"--output {folder}: {parent} is not a folder.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--output {folder}: {parent} cannot be written; choose another folder.")
    there = sorted(folder.iterdir()) if folder.exists() else []
    for path in there:
        if any(path.match(pattern) for pattern in (SUMMARY, LOCK, *own)):
            check_kind(path, folder=path.name == WINDOWS)
    if there and not overwrite:
        _check_this_run(folder, there, settings, code, own)


def _check_this_run(
    folder: Path, there: Sequence[Path], settings: dict[str, Any], code: str, own: Sequence[str]
) -> None:
    of_runs = _of_runs(folder)
    others = [path for path in there if path.name not in {LOCK, *of_runs} and not SCRATCH.fullmatch(path.name)]
    others = [path for path in others if path.name != WINDOWS or WINDOWS not in own]
    if not others:
        return
    try:
        found = read_json(folder / SUMMARY, MOST_SUMMARY)
        found_settings, found_code = found["settings"], found.get("code")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        names = ", ".join(path.name for path in others[:3])
        raise ValueError(
            f"--output {folder} holds other files ({names}), which --overwrite would leave where they are, but for "
            "those that it writes anew; choose another folder, or add --overwrite."
        ) from None
    if found_settings != settings:
        raise ValueError(f"--output {folder} holds a run with other settings; choose another, or add --overwrite.")
    if found_code != code:
        raise ValueError(
            f"--output {folder} holds this run, but the code has changed since; choose another folder, or add "
            "--overwrite to measure again."
        )
    listed = {*_listed(folder / SUMMARY), *own} - {WINDOWS}
    if changed := [path.name for path in others if path.name in listed]:
        raise ValueError(
            f"--output {folder} holds {', '.join(changed)}, not as this run wrote it; choose another folder, or add "
            "--overwrite."
        )


def check_kind(path: Path, folder: bool = False) -> None:
    """Raise ValueError for what is neither missing nor a regular file, or folder, itself: a run follows no links."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() if folder else path.is_file())):
        kind = "a link" if path.is_symlink() else "another kind of file"
        raise ValueError(
            f"{path} is {kind}, where a run has a {'folder' if folder else 'file'} of its own; move it away, or choose "
            "another --output."
        )


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(summary: Path) -> dict[str, str]:
    """Name -> sha256 of the files that a run has written, by its summary."""
    try:
        found = read_json(summary, MOST_SUMMARY)["files"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {name: digest for name, digest in found if isinstance(digest, str) and name != SUMMARY}


def _of_runs(folder: Path) -> set[str]:
    """The names of files that stand there as a run wrote them: the last one, and those that were killed meanwhile."""
    summaries = [folder / SUMMARY, *(path / name for path in _scratches(folder) for name in (SUMMARY, FORMER))]
    listed = {entry for summary in summaries for entry in _listed(summary).items()}
    files = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    named = {name for name, _ in listed}
    return {path.name for path in files if path.name in named and (path.name, sha256_of(path)) in listed}


def _scratches(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if SCRATCH.fullmatch(path.name) and not path.is_symlink()]


@contextmanager
def claimed(folder: Path, settings: dict[str, Any], code: str, overwrite: bool, own: Sequence[str]) -> Iterator[None]:
    """Hold an output folder for this run alone. Raises ValueError as `check_output` and `alone_in` do."""
    check_output(folder, settings, code, overwrite, own)
    with alone_in(folder):
        check_output(folder, settings, code, overwrite, own)  # another run may have ended between
        yield


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, made where there is none, for this process alone; the lock ends with the process.

    Raises ValueError when another process holds it. A folder that was made here and stays empty is removed.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    check_kind(folder / LOCK)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder} is in use by another run; wait for it, or choose another --output.") from None
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows an open file stays; an unlinked one locks nobody out
            (folder / LOCK).unlink()
        lock.release()
        if created and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def results_in(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into `folder` when the body ends well; after an error nothing stays.

    The summary leaves first and arrives last, so a folder with a summary is a finished run. The files of an earlier
    run, as its summary names them, leave with it: no old figure stands beside new numbers.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".writing."))
    try:
        with naming(folder, scratch):
            yield scratch
            for file in scratch.iterdir():
                settle(file)
                check_kind(folder / file.name)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        if created and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    with naming(folder, scratch):
        _replace(folder, scratch)


def _replace(folder: Path, scratch: Path) -> None:
    """Put the scratch folder's files in the place of an earlier run's. Until all is done, it says which they are."""
    new, old = sorted(scratch.iterdir(), key=lambda file: (file.name == SUMMARY, file.name)), _of_runs(folder)
    with suppress(FileNotFoundError):
        (folder / SUMMARY).replace(scratch / FORMER)
    sync(folder)
    for name in old - {file.name for file in new}:
        (folder / name).unlink()
    for file in new:
        file.replace(folder / file.name)
    sync(folder)
    for path in _scratches(folder):
        shutil.rmtree(path, ignore_errors=True)
