"""A corpus: texts cut into windows, windows measured in shards, by one process or by many.

    torchrun --nproc-per-node 2 -m experiments.divergence --texts corpus.txt

Texts are cut into windows, and windows into shards of a fixed size. Ranks share the shards; what is
measured stays per window, and every finished shard is a file. So a run that was killed goes on where it
stopped, and ends with the same bits on any number of ranks (with equal threads each: the sums inside a
matrix product depend on them).
"""

import csv
import hashlib
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from experiments.harness.ranks import Ranks
from minigpt import Tokenizer
from minigpt.files import open_tensors, read_json, write_tensors, write_text

COUNTS = ("texts", "windows", "tokens", "skipped")
"""What `Texts.count` counts."""
SHARD_WINDOWS = 16
"""Windows that are measured and written together."""
RESAMPLES, SEED = 1000, 0
"""Of the bootstrap."""
INTERVAL = (0.025, 0.975)
BOOTSTRAP = {"of": "mean", "quantiles": INTERVAL, "resamples": RESAMPLES, "seed": SEED}
"""How `low` and `high` come about, for a summary."""
MOST_NUMBERS = 2**20
"""Numbers held at once when windows are combined: 8 MiB."""
FEWEST_COLUMNS = 64
"""Combined together even where they are more numbers than that, from 16,384 windows on (0.5 KB a window): every group
of columns reads all shards again."""
STATISTICS = ("mean", "sd", "median", "q1", "q3", "low", "high")
"""Over windows: mean, standard deviation, median, quartiles, and the bootstrap interval (95 %) of the mean."""

Windows = Sequence[Sequence[int]]
Measure = Callable[[Windows], dict[str, Tensor]]
"""Token ids of some windows -> tensors whose first axis is the window."""


# Texts and windows.


@dataclass(frozen=True)
class Texts:
    """Where the windows come from."""

    path: str
    sha256: str
    column: str
    """The field of a JSON line, or the column of a CSV file, that holds the text."""
    window: int
    """Most tokens of a window."""
    limit: int | None
    """Most windows; None for all."""
    shortest: int = 2
    """Pieces of fewer tokens are skipped."""

    @classmethod
    def of(cls, path: Path, column: str, window: int, limit: int | None, shortest: int = 2) -> "Texts":
        """Raises ValueError for a file that is not there and for numbers that leave nothing to measure."""
        if not path.is_file():
            raise ValueError(f"--texts {path} is not a file; give a .txt, .jsonl or .csv file.")
        if window < shortest:
            raise ValueError(f"--window is {window}; expected {shortest} tokens or more to have something to measure.")
        if limit is not None and limit < 1:
            raise ValueError(f"--limit is {limit}; expected 1 window or more.")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(str(path), digest, column, window, limit, shortest)

    def windows(self, tokenizer: Tokenizer) -> Iterator[list[int]]:
        """Token ids of every window, one text after the other."""
        kept = (piece for pieces in self._pieces(tokenizer) for piece in pieces if len(piece) >= self.shortest)
        return itertools.islice(kept, self.limit)

    def first_windows(self, tokenizer: Tokenizer, count: int) -> list[list[int]]:
        """The first few windows. Raises ValueError when there is none."""
        found = list(itertools.islice(self.windows(tokenizer), count))
        if not found:
            raise ValueError(f"--texts {self.path}: no text has {self.shortest} tokens or more.")
        return found

    def count(self, tokenizer: Tokenizer) -> dict[str, int]:
        """How many texts, windows and tokens there are; `skipped` pieces are too short."""
        counts = dict.fromkeys(COUNTS, 0)
        for pieces in self._pieces(tokenizer):
            if counts["windows"] == self.limit:
                break
            counts["texts"] += 1
            for piece in pieces:
                if counts["windows"] == self.limit:
                    break
                kept = len(piece) >= self.shortest
                counts["skipped"] += not kept
                counts["windows"] += kept
                counts["tokens"] += kept * len(piece)
        return counts

    def _pieces(self, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
        """Every text's tokens, cut into windows."""
        for number, text in enumerate(read_texts(Path(self.path), self.column), start=1):
            try:
                ids = tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"--texts {self.path}, text {number}: {error}") from None
            yield [ids[start : start + self.window] for start in range(0, max(1, len(ids)), self.window)]


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of a file, one at a time: JSON lines (.jsonl, .ndjson), CSV (.csv), or else one text a line.

    Raises ValueError for a file that is not UTF-8, is not what its name says, or lacks the column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in (".jsonl", ".ndjson"):
                yield from _of_json_lines(file, path, column)
            elif path.suffix.lower() == ".csv":
                yield from _of_csv(file, path, column)
            else:
                yield from (line.rstrip("\r\n") for line in file)
    except UnicodeDecodeError as error:
        raise ValueError(f"--texts {path} is not UTF-8 ({error.reason}); convert it.") from None


def _of_json_lines(lines: Iterable[str], path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--texts {path}, line {number} is not JSON: {error}.") from None
        text = found.get(column) if isinstance(found, dict) else found
        if not isinstance(text, str):
            raise ValueError(f"--texts {path}, line {number} has no text in {column!r}; name the field: --text-column.")
        yield text


def _of_csv(lines: Iterable[str], path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(lines, strict=True)
    try:
        if column not in (reader.fieldnames or []):
            names = ", ".join(map(repr, reader.fieldnames or []))
            raise ValueError(f"--texts {path} has no column {column!r}, but {names}; name it with --text-column.")
        yield from (row[column] or "" for row in reader)
    except csv.Error as error:
        raise ValueError(f"--texts {path}, line {reader.line_num} is not CSV: {error}.") from None


# Windows that were measured.


@dataclass(frozen=True)
class Shards:
    """The finished shards of one run, in a folder of their own within the output folder."""

    folder: Path
    settings: dict[str, Any]
    """All that decides the numbers."""

    @property
    def fingerprint(self) -> str:
        """A hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def open(self, overwrite: bool) -> list[int]:
        """The numbers of the shards that are there already.

        Leftovers of a write that was killed are removed. Raises ValueError when shards of other settings lie in the
        folder, unless those are to be overwritten; shards of these settings are always kept.
        """
        described = self.folder / "settings.json"
        other = self._other_settings(described)
        if other == ["code"] and not overwrite:
            raise ValueError(
                f"{self.folder} holds windows of this run, but the code has changed since; choose another --output, or "
                "add --overwrite to measure again."
            )
        if other and not overwrite:
            raise ValueError(
                f"{self.folder} holds windows of a run with other settings ({', '.join(other)}); choose another "
                "--output, or add --overwrite."
            )
        if other:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        text = json.dumps(self.settings, indent=2) + "\n"
        write_text(described, text)
        return self.finished()

    def _other_settings(self, described: Path) -> list[str]:
        """The names of the settings in which the folder's shards differ from these; empty for an empty folder."""
        if not self.folder.exists() or not any(path for path in self.folder.iterdir() if path.name[0] != "."):
            return []
        try:
            found = read_json(described)
            return sorted(name for name in {*found, *self.settings} if found.get(name) != self.settings.get(name))
        except (OSError, ValueError, AttributeError, TypeError):
            return ["they are not described"]

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{number:07d}.safetensors"

    def write(self, number: int, measured: dict[str, Tensor]) -> None:
        """Write a shard whole, or not at all: every tensor as [window, column]."""
        shapes = {name: list(values.shape[1:]) for name, values in measured.items()}
        flat = {name: values.reshape(len(values), -1).contiguous() for name, values in measured.items()}
        # one key: safetensors writes several in no fixed order, and equal runs shall write equal files
        metadata = {"shard": json.dumps({"settings": self.fingerprint, "shapes": shapes})}
        write_tensors(self.path(number), flat, metadata)

    def finished(self) -> list[int]:
        """The numbers of the shards that are there, whichever rank wrote them."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]" * 7 + ".safetensors"))

    def combine(self, windows: int) -> dict[str, dict[str, Tensor]]:
        """Over so many windows: name -> statistic -> tensor, without the window axis. See `STATISTICS`."""
        with self._opened(0) as (file, shapes):
            for name, shape in shapes.items():
                if file.get_slice(name).get_shape()[1:] != [math.prod(shape)]:
                    raise ValueError(f"{name} has another shape than the file says")
        return {name: self._combine(name, shape, shards_of(windows)) for name, shape in shapes.items()}

    def _combine(self, name: str, shape: list[int], count: int) -> dict[str, Tensor]:
        columns = math.prod(shape)
        step = max(FEWEST_COLUMNS, MOST_NUMBERS // (count * SHARD_WINDOWS))
        groups = [
            summarise([self._columns(number, name, start, start + step) for number in range(count)])
            for start in range(0, columns, step)
        ]
        whole = np.concatenate(groups, axis=1)
        return {
            statistic: torch.from_numpy(values).reshape(shape)
            for statistic, values in zip(STATISTICS, whole, strict=True)
        }

    def _columns(self, number: int, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Some columns of a shard: [window, column]. Raises ValueError for a file of another run."""
        with self._opened(number) as (file, _):
            return file.get_slice(name)[:, start:stop].double().numpy()

    @contextmanager
    def _opened(self, number: int) -> Iterator[tuple[Any, dict[str, list[int]]]]:
        """A shard, and the shapes of a window's numbers. Raises ValueError where it cannot be used."""
        path = self.path(number)
        try:
            with open_tensors(path) as file:
                about = json.loads(file.metadata()["shard"])
                if about["settings"] != self.fingerprint:
                    raise ValueError("it belongs to a run with other settings")
                yield file, about["shapes"]
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it and run again.") from None


def summarise(shards: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """`STATISTICS` of every column, over the windows of all shards: [window, column] each -> [statistic, column].

    The interval is that of a bootstrap in which every window counts a Poisson(1) number of times, drawn for each
    shard from its own seed (Chamandy et al. 2012, "Estimating Uncertainty for Massive Data Streams", section 3):
    unlike draws with replacement, it needs no more than one shard at a time. Windows count as independent, also
    those of one text: of a few long texts the interval is too narrow.
    """
    values = np.concatenate(shards)
    sums, weights = np.zeros((RESAMPLES, values.shape[1])), np.zeros((RESAMPLES, 1))
    for number, shard in enumerate(shards):
        times = np.random.default_rng((SEED, number)).poisson(1.0, (RESAMPLES, len(shard))).astype(np.float64)
        sums += times @ shard
        weights += times.sum(axis=1, keepdims=True)
    drawn = weights[:, 0] > 0  # of very few windows, a resample may count none
    means = sums[drawn] / weights[drawn]
    sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)
    quartiles = np.quantile(values, (0.5, 0.25, 0.75), axis=0)
    return np.stack([values.mean(axis=0), sd, *quartiles, *np.quantile(means, INTERVAL, axis=0)])


def measure_corpus(
    texts: Texts,
    tokenizer: Tokenizer,
    shards: Shards,
    ranks: Ranks,
    prepare: Callable[[], object],
    measure: Measure,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, int]:
    """Measure every window that has not been measured yet, shared among the ranks; returns `Texts.count`.

    `prepare` runs on rank 0 first, and stops all ranks by raising. Returns when all ranks are done.
    """

    def first() -> list[int]:
        prepare()
        return [*texts.count(tokenizer).values(), *shards.open(overwrite)]

    numbers = ranks.from_first(first)
    counts, finished = dict(zip(COUNTS, numbers, strict=False)), set(numbers[len(COUNTS) :])
    windows = counts["windows"]
    missing = [number for number in range(shards_of(windows)) if number not in finished]
    mine = set(missing[ranks.rank :: ranks.world])
    hidden = quiet or ranks.rank > 0 or None  # None: hidden where there is no terminal
    with tqdm(
        total=windows, initial=min(windows, len(finished) * SHARD_WINDOWS), unit="window", leave=False, disable=hidden
    ) as bar:
        for number, shard in enumerate(batched(texts.windows(tokenizer))):
            if number in mine:
                shards.write(number, measure(shard))
                bar.update(min(windows, len(shards.finished()) * SHARD_WINDOWS) - bar.n)
    ranks.wait()
    return counts


def shards_of(windows: int) -> int:
    """How many shards so many windows make."""
    return -(-windows // SHARD_WINDOWS)


def batched(windows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Windows, shard by shard."""
    while shard := list(itertools.islice(windows, SHARD_WINDOWS)):
        yield shard
