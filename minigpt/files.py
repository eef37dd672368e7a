"""Files of strangers, read within bounds; files of our own, written whole or not at all."""

import filecmp
import json
import os
import re
import reprlib
import shutil
import socket
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

MOST_JSON = 2**20
"""Bytes of a JSON file, where nothing else is said."""
MOST_HEADER = 2**20
"""Bytes of a safetensors header, which is some 10,000 tensors; GPT-2 XL's has 70,000 bytes."""
MODE = 0o644
"""Of every file that is written."""

HARMLESS = "\n\t\u200c\u200d"
"""Characters that no terminal shows, and that may stay: the last two join letters in several scripts."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, 80, 40, 80


def shown(value: object) -> str:
    """A value that a stranger wrote, for a sentence about it: quoted, and cut where it is long."""
    return printable(_SHORT.repr(value))


def printable(text: str) -> str:
    """A text that a terminal shows as letters: control characters and halves of characters are written out."""
    return "".join(
        letter if letter.isprintable() or letter in HARMLESS else letter.encode("unicode_escape").decode()
        for letter in text
    )


def check_regular(path: Path, most: int | None = None) -> None:
    """Raise ValueError unless a path leads to a regular file, of at most so many bytes, of its own folder.

    A symbolic link may lead to a file of the same folder, or, out of a snapshot of the hub's cache, to the
    cache's `blobs`. Raises OSError when there is nothing.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file.")
    if most is not None and status.st_size > most:
        raise ValueError(f"{path} has {status.st_size} bytes; expected at most {most}.")
    home, target = path.parent.resolve(), path.resolve()
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise ValueError(f"{path} is a link out of its folder, to {target}; put the file itself there.")


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """Parse a JSON file of at most so many bytes.

    Raises OSError when it cannot be read, and ValueError when it is too large, nested too deeply, not JSON,
    not UTF-8, or gives a name twice.
    """
    check_regular(path, most)
    try:
        with path.open("rb") as file:
            return _parse(file.read(most + 1))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: readers disagree on which of two counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {shown(twice)} is there twice")
    return found


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file to read tensors from, mapped into memory: safetensors' `safe_open`.

    Its header is read first, within `MOST_HEADER`. Raises OSError when the file cannot be read and ValueError when
    it is not a whole safetensors file, or lacks what the body asks for.
    """
    check_regular(path)
    if str(path).encode("utf-8", "replace").decode() != str(path):  # half characters: bytes that are no text
        raise ValueError(f"{path} has a name that is not UTF-8, which safetensors cannot open; rename it.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MOST_HEADER))
    try:
        if length > MOST_HEADER:
            raise ValueError(f"its header would have {length} bytes, and at most {MOST_HEADER} are read")
        _parse(header)
        opened = safe_open(path, "pt")
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download it again.") from None
    with opened as tensors:
        try:
            yield tensors
        except SafetensorError as error:  # a name that is not there, for one
            raise ValueError(str(error)) from None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole, or not at all. Raises OSError when it cannot be written."""
    write_atomically(path, lambda file: save_file(tensors, file, metadata))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, or not at all. Raises OSError when it cannot be written."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Give `write` a temporary file beside `path`, then move it into place: whole, or not at all.

    What an earlier process of this machine, which is gone, was writing there is removed first. Raises OSError that
    names `path` when it cannot be written.
    """
    with _finished(path, write) as finished:
        _move(finished, path)


def write_together(
    folder: Path, files: Mapping[str, Callable[[Path], object]], key: str, stale: Iterable[str] = ()
) -> None:
    """Write files of one folder that mean something only together: all of them, or none.

    All are finished under temporary names before the first is moved. Without the file `key` the others are nothing:
    where there is more than one change, it leaves first and arrives last, so that nobody takes a mixture for either.
    Files that are `stale` leave as well. Raises OSError as `write_atomically` does.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as kept:
            finished = {name: kept.enter_context(_finished(folder / name, files[name])) for name in files}
            gone = [folder / name for name in stale if (folder / name).exists()]
            several = len(gone) + sum(not _same(finished[name], folder / name) for name in files) > 1
            *others, last = sorted(files, key=lambda name: name == key)
            with _aside(folder / key, finished[last].with_name("aside")) if several else nullcontext():
                for name in others:
                    _move(finished[name], folder / name)
                for path in gone:  # before the last, with which a mixture would count
                    path.unlink(missing_ok=True)
                _move(finished[last], folder / last)
    finally:
        if created and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def _aside(path: Path, place: Path) -> Iterator[None]:
    """Take a file out of the way; it returns where the body fails before anything has been replaced."""
    others = {other: other.stat().st_ino for other in path.parent.iterdir() if other.is_file()}
    with suppress(FileNotFoundError):
        path.replace(place)
        sync(path.parent)
    try:
        yield
    except BaseException:
        same = all(
            other.exists() and other.stat().st_ino == number for other, number in others.items() if other != path
        )
        if same and place.exists() and not path.exists():
            place.replace(path)
        raise


@contextmanager
def _finished(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """A finished file of that name in a temporary folder beside it: those who write may use others on their way."""
    _remove_abandoned(path)
    with naming(path):
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_mark(path)}{os.getpid()}-"))
    try:
        with naming(path, scratch):
            write(scratch / path.name)
            settle(scratch / path.name)
        yield scratch / path.name
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _move(finished: Path, path: Path) -> None:
    finished.replace(path)
    sync(path.parent)


@contextmanager
def naming(path: Path, scratch: Path | None = None) -> Iterator[None]:
    """Let an OSError name a path, where it names none, or one within `scratch`, which nobody knows of."""
    try:
        yield
    except SafetensorError as error:  # it reports a full disk so
        reason = re.sub(r" \(os error (\d+)\)$", "", str(error).rpartition("I/O error: ")[2])
        raise OSError(None, reason, str(path)) from None
    except OSError as error:
        if scratch and error.filename is not None and not Path(error.filename).is_relative_to(scratch):
            raise  # of what is read
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def settle(path: Path) -> None:
    """Bring a finished file onto the disk, so that a move after it cannot overtake its content."""
    if path.is_file():
        path.chmod(MODE)
    sync(path)


def sync(path: Path) -> None:
    """Bring a file onto the disk, or, where the system can, the names in a folder. Raises OSError for a file only."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _mark(path: Path) -> str:
    return f".{path.name}.writing-{socket.gethostname()}-"


def written_in(name: str) -> str | None:
    """The name of the file that was being written, where this is the name of a temporary folder of ours."""
    found = re.fullmatch(r"\.(.+)\.writing-.+-\d+-[a-z0-9_]+", name)
    return found and found[1]


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary folders of a path whose process is gone."""
    mark = _mark(path)
    for leftover in list(path.parent.iterdir()):
        process = re.fullmatch(
            re.escape(mark) + r"(\d+)-[a-z0-9_]+", leftover.name
        )  # a host's name may end in a number
        if process and not _runs(int(process[1])):
            shutil.rmtree(leftover, ignore_errors=True)


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # there is no asking without harm
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
