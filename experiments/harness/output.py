"""The output folder: held by one run at a time, and written all or nothing."""

import os
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
LOCK = ".lock"
SCRATCH = ".writing."


def check_output(folder: Path, settings: dict[str, Any], code: str, overwrite: bool, own: Sequence[str]) -> None:
    """Refuse, with a ValueError, a folder that cannot be written or that holds anything but this very run.

    `code` is the digest of what computes the numbers. Files by the patterns `own` that stand there without a summary
    are the remains of a run that was killed.
    """
    parent = folder if folder.exists() else next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ValueError(f"--output {folder}: {parent} is not a folder.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--output {folder}: {parent} cannot be written; choose another folder.")
    if overwrite or not folder.exists():
        return
    own = (SCRATCH + "*", LOCK, *own)
    foreign = [path for path in folder.iterdir() if not any(path.match(pattern) for pattern in own)]
    if not foreign:
        return
    try:
        found = read_json(folder / SUMMARY, MOST_SUMMARY)
        found_settings, found_code = found["settings"], found.get("code")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        names = ", ".join(sorted(path.name for path in foreign)[:3])
        raise ValueError(
            f"--output {folder} holds other files ({names}), which --overwrite would leave where they are; "
            "choose another folder, or add --overwrite."
        ) from None
    if found_settings != settings:
        raise ValueError(f"--output {folder} holds a run with other settings; choose another, or add --overwrite.")
    if found_code != code:
        raise ValueError(
            f"--output {folder} holds this run, but the code has changed since; choose another folder, or add "
            "--overwrite to measure again."
        )


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
def results_in(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """A scratch folder whose files move into `folder` when the body ends well; after an error nothing stays.

    The summary leaves first and arrives last, so a folder with a summary is a finished run. Files of an
    earlier run, by `patterns`, leave with it: no old figure stands beside new numbers.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{SCRATCH}*"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=SCRATCH))
    try:
        with naming(folder, scratch):
            yield scratch
            for file in scratch.iterdir():
                settle(file)
        (folder / SUMMARY).unlink(missing_ok=True)
        sync(folder)
        for pattern in patterns:
            for old in folder.glob(pattern):
                if not old.is_dir():
                    old.unlink()
                elif old.name == pattern:  # a folder goes only by its whole name
                    shutil.rmtree(old)
        for file in sorted(scratch.iterdir(), key=lambda file: (file.name == SUMMARY, file.name)):
            file.replace(folder / file.name)
        sync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if created and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
