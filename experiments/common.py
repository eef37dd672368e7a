"""What every experiment's command line shares: lists and ranges, the text, the output folder."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minigpt import Tokenizer
from minigpt.files import naming, read_json, settle, sync

SUMMARY = "summary.json"
MOST_SUMMARY = 64 * 2**20
"""Bytes of a summary that is read."""
LOCK = ".lock"
SCRATCH = ".writing."
MOST_NUMBERS = 10_000
"""Of a range: enough for any curve, few enough not to fill the memory by a slip of the finger."""


def parse_indices(text: str, count: int, what: str) -> tuple[int, ...]:
    """`2`, `2,5`, `0:11:1` or `all`: of layers, heads or positions. Raises ValueError for anything else."""
    if text == "all":
        return tuple(range(count))
    indices, option = [], f"--{what}s"
    for value in parse_numbers(text, option, "all, a list such as 2,5 or a range such as 0:11:1"):
        if value != int(value) or not 0 <= value < count:
            raise ValueError(f"{option} {text}: {value:g} is not a {what}; the model has {what}s 0 to {count - 1}.")
        indices.append(int(value))
    return tuple(indices)


def parse_numbers(
    text: str, option: str, expected: str = "finite numbers such as 0.5,2 or a range such as 0.5:1.5:0.05"
) -> tuple[float, ...]:
    """Numbers and ranges START:STOP:STEP, both ends included, separated by commas.

    Raises ValueError when a part is neither, or is not finite.
    """
    return tuple(value for part in text.split(",") for value in _numbers_of(part, option, text, expected))


def _numbers_of(part: str, option: str, text: str, expected: str) -> list[float]:
    try:
        numbers = [float(number) for number in part.split(":")]
    except ValueError:
        numbers = []
    if not all(math.isfinite(number) for number in numbers) or len(numbers) not in (1, 3):
        raise ValueError(f"{option} {text!r}: expected {expected}.")
    if len(numbers) == 1:
        return numbers
    start, stop, step = numbers
    if step <= 0 or stop < start:
        raise ValueError(f"{option} {text}: a range goes up, START:STOP:STEP with STEP above 0.")
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > MOST_NUMBERS:
        raise ValueError(f"{option} {text}: {count} numbers are more than {MOST_NUMBERS}; take a larger STEP.")
    # twelve digits: 0.5 + 10 * 0.05 is 1, not 1.0000000000000002
    return [round(start + step * index, 12) for index in range(count)]


def encode_prompt(tokenizer: Tokenizer, prompt: str, n_positions: int) -> list[int]:
    """Token ids of a prompt that leaves something to measure.

    Raises ValueError for an empty prompt, a single token, and one longer than the model's positions.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("The prompt is empty; give a sentence.")
    if len(ids) == 1:
        raise ValueError(f"The prompt {prompt!r} is one token; nothing is left without the first: give a longer one.")
    if len(ids) > n_positions:
        raise ValueError(f"The prompt has {len(ids)} tokens; the model has {n_positions} positions: shorten it.")
    return ids


def check_output(folder: Path, settings: dict[str, Any], overwrite: bool, own: Sequence[str]) -> None:
    """Refuse, with a ValueError, a folder that cannot be written or that holds anything but this very run.

    Files by the patterns `own` that stand there without a summary are the remains of a run that was killed.
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
        found = read_json(folder / SUMMARY, MOST_SUMMARY)["settings"]
    except (OSError, ValueError, LookupError, TypeError):
        names = ", ".join(sorted(path.name for path in foreign)[:3])
        raise ValueError(
            f"--output {folder} holds other files ({names}), which --overwrite would leave where they are; "
            "choose another folder, or add --overwrite."
        ) from None
    if found != settings:
        raise ValueError(f"--output {folder} holds a run with other settings; choose another, or add --overwrite.")


@contextmanager
def claimed(folder: Path, settings: dict[str, Any], overwrite: bool, own: Sequence[str]) -> Iterator[None]:
    """Hold an output folder for this run alone. Raises ValueError as `check_output` and `alone_in` do."""
    check_output(folder, settings, overwrite, own)
    with alone_in(folder):
        check_output(folder, settings, overwrite, own)  # another run may have ended between
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
