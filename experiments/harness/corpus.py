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
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from experiments.harness.output import check_kind
from experiments.harness.ranks import Ranks
from experiments.harness.table import SPREAD
from minigpt import Tokenizer
from minigpt.files import open_tensors, printable, read_json, write_tensors, write_text, written_in

COUNTS = ("texts", "windows", "tokens", "skipped")
"""What a `Survey` counts."""
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
STATISTICS = ("mean", *SPREAD)
"""Over windows: mean, standard deviation, median, quartiles, and the bootstrap interval (95 %) of the mean."""

NOT_READ = (".json", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".xz", ".bz2", ".pdf", ".html", ".docx")
"""Ends of files that hold no text a line."""
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
    def of(cls, path: Path, column: str, window: int, limit: int | None, shortest: int = 2) -> Self:
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

    def windows(self, tokenizer: Tokenizer, counts: dict[str, int] | None = None) -> Iterator[list[int]]:
        """Token ids of every window, one text after the other; `counts` grows by what was met, see `Survey`."""
        counts = dict.fromkeys(COUNTS, 0) if counts is None else counts
        for pieces in self._pieces(tokenizer):
            counts["texts"] += 1
            for piece in pieces:
                if len(piece) < self.shortest:
                    counts["skipped"] += 1
                    continue
                counts["windows"] += 1
                counts["tokens"] += len(piece)
                yield piece
                if counts["windows"] == self.limit:
                    return

    def first_windows(self, tokenizer: Tokenizer, count: int) -> list[list[int]]:
        """The first few windows. Raises ValueError when there is none."""
        found = list(itertools.islice(self.windows(tokenizer), count))
        if not found:
            raise ValueError(f"--texts {self.path}: no text has {self.shortest} tokens or more.")
        return found

    def survey(self, tokenizer: Tokenizer) -> "Survey":
        """Count all windows, and take the digests of their token ids."""
        counts = dict.fromkeys(COUNTS, 0)
        return Survey(counts, [digest_of(windows) for windows in batched(self.windows(tokenizer, counts))])

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
            if path.suffix.lower() in NOT_READ:
                raise ValueError(f"--texts {path} ends in {path.suffix}; expected .txt (text by line), .jsonl or .csv.")
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
        if list(reader.fieldnames or []).count(column) > 1:
            raise ValueError(f"--texts {path} has the column {column!r} twice; rename one.")
        yield from (row[column] or "" for row in reader)
    except csv.Error as error:
        raise ValueError(f"--texts {path}, line {reader.line_num} is not CSV: {error}.") from None


@dataclass(frozen=True)
class Survey:
    """What a file of texts holds for a model."""

    counts: dict[str, int]
    """How many texts, windows and tokens there are; `skipped` pieces are too short."""
    shards: list[str]
    """A digest of the token ids of every shard's windows."""

    @property
    def token_ids(self) -> str:
        """A digest of all windows."""
        return hashlib.sha256("".join(self.shards).encode()).hexdigest()

    def range_of(self, number: int) -> list[int]:
        """The first and the last window of a shard."""
        first = number * SHARD_WINDOWS
        return [first, min(first + SHARD_WINDOWS, self.counts["windows"]) - 1]


def digest_of(windows: Windows) -> str:
    """The sha256 of some windows' token ids."""
    return hashlib.sha256(json.dumps([list(window) for window in windows]).encode()).hexdigest()


# Windows that were measured.


SETTINGS = "settings.json"
FOLLOWING = ("first_numbers", "token_ids")
"""What a run adds to its settings when it has looked at its texts."""
DESCRIBES = "windows_of_a_run"
"""The one name in that file: no other program's settings look like it."""
OWN = re.compile(re.escape(SETTINGS) + r"|\d{7}\.safetensors")
"""The names of all files in a folder of shards."""


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

    def open(self, survey: Survey, overwrite: bool) -> list[int]:
        """The numbers of the shards that are there already, and hold what this run wrote of these windows.

        A shard that holds anything else is named on standard error, and not among them. Leftovers of writes that were
        killed are removed. Raises ValueError when shards of other settings lie in the folder, unless those are to be
        overwritten, and for files that no run has described.
        """
        self._check_settings(overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.folder)
        write_text(self.folder / SETTINGS, json.dumps({DESCRIBES: self.settings}, indent=2) + "\n")
        return [number for number in self.finished() if number < len(survey.shards) and self._holds(number, survey)]

    def _check_settings(self, overwrite: bool) -> None:
        """Raise ValueError for a folder that is not this run's, or, with `overwrite`, not a run's."""
        found = described(self.folder)
        if found is None:
            return
        other = sorted(name for name in {*found, *self.settings} if found.get(name) != self.settings.get(name))
        if other and overwrite:
            for number in self.finished():
                self.path(number).unlink()
        elif other:  # the windows follow from the other settings, and the numbers from both
            other = [name for name in other if name not in FOLLOWING] or other[-1:]
            holds = {
                "code": "windows of this run, but the code has changed since",
                "first_numbers": "windows of this run, but the first ones now come out otherwise, by something that "
                "is no setting: the processor, a library, a random draw",
            }.get(" ".join(other), f"windows of a run with other settings ({', '.join(other)})")
            raise ValueError(
                f"{self.folder} holds {holds}; choose another --output, or add --overwrite to measure again."
            )

    def joined(self) -> "Shards":
        """The run that another process opened. Raises ValueError where this process would compute something else."""
        found = described(self.folder) or {}
        if other := sorted(name for name, value in self.settings.items() if found.get(name) != value):
            raise ValueError(
                f"This process differs from the first one ({', '.join(other)}), so that windows would come out "
                "otherwise; start all of them alike, on machines that are alike."
            )
        return Shards(self.folder, found)

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{number:07d}.safetensors"

    def write(self, number: int, windows: Windows, measured: dict[str, Tensor]) -> None:
        """Write a shard whole, or not at all: every tensor as [window, column], and what tells it from any other.

        Raises ValueError for a table that has not one row for each window.
        """
        for name, values in measured.items():
            if len(values) != len(windows):
                raise ValueError(
                    f"The table {name!r} has {len(values)} rows of {len(windows)} windows; expected one each."
                )
        first = number * SHARD_WINDOWS
        about = {
            "run": self.fingerprint,
            "windows": [first, first + len(windows) - 1],
            "token_ids": digest_of(windows),
            "shapes": {name: list(values.shape[1:]) for name, values in measured.items()},
        }
        flat = {name: values.reshape(len(values), -1).contiguous().cpu() for name, values in measured.items()}
        # one key: safetensors writes several in no fixed order, and equal runs shall write equal files
        metadata = {"shard": json.dumps({**about, "digest": digest_of_numbers(about, flat)})}
        write_tensors(self.path(number), flat, metadata)

    def finished(self) -> list[int]:
        """The numbers of the shards that are there, whichever rank wrote them."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]" * 7 + ".safetensors"))

    def combine(self, survey: Survey) -> dict[str, dict[str, Tensor]]:
        """Over all windows: name -> statistic -> tensor, without the window axis. See `STATISTICS`.

        Raises ValueError for a shard that does not hold what this run wrote of its windows.
        """
        shapes = self._shapes(0, survey)
        for number in range(1, len(survey.shards)):
            if (other := self._shapes(number, survey)) != shapes:
                raise ValueError(f"{self.path(number)} has tables of the shapes {other}, and the first shard {shapes}.")
        return {name: self._combine(name, shape, survey) for name, shape in shapes.items()}

    def _combine(self, name: str, shape: list[int], survey: Survey) -> dict[str, Tensor]:
        columns = math.prod(shape)
        step = max(FEWEST_COLUMNS, MOST_NUMBERS // (len(survey.shards) * SHARD_WINDOWS))
        groups = [self._summarised(name, start, start + step, survey) for start in range(0, columns, step)]
        whole = np.concatenate(groups, axis=1)
        return {
            statistic: torch.from_numpy(values).reshape(shape)
            for statistic, values in zip(STATISTICS, whole, strict=True)
        }

    def _summarised(self, name: str, start: int, stop: int, survey: Survey) -> NDArray[np.float64]:
        shards = [self._columns(number, name, start, stop) for number in range(len(survey.shards))]
        if (found := sum(map(len, shards))) != survey.counts["windows"]:
            raise ValueError(
                f"{self.folder} holds {found} windows of {name!r}; the texts have {survey.counts['windows']}."
            )
        return summarise(shards)

    def _columns(self, number: int, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Some columns of a shard: [window, column]."""
        with open_tensors(self.path(number)) as file:
            return file.get_slice(name)[:, start:stop].double().numpy()

    def _holds(self, number: int, survey: Survey) -> bool:
        """Whether a shard can be used; where it cannot, that is said on standard error."""
        try:
            self._shapes(number, survey)
        except ValueError as error:
            typer.echo(printable(f"Warning: {error} Its windows are measured again."), err=True)
            return False
        return True

    def _shapes(self, number: int, survey: Survey) -> dict[str, list[int]]:
        """The shapes of a window's numbers. Raises ValueError for a shard that holds anything but what was written."""
        path = self.path(number)
        try:
            with open_tensors(path) as file:
                about = json.loads(file.metadata()["shard"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            if about.pop("digest") != digest_of_numbers(about, tensors):
                raise ValueError("its digest is another")
            if about["run"] != self.fingerprint:
                raise ValueError("it belongs to a run with other settings")
            if [about["windows"], about["token_ids"]] != [survey.range_of(number), survey.shards[number]]:
                raise ValueError("it holds other windows")
        except (OSError, LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not what this run wrote there ({error}).") from None
        return about["shapes"]


def digest_of_numbers(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The sha256 of some tensors, with their names, types and shapes, and of what is said about them."""
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, values in sorted(tensors.items()):
        total.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        total.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def described(folder: Path) -> dict[str, Any] | None:
    """The settings of the run whose shards lie in a folder; None where there are none.

    Raises ValueError for files under the names of shards that no run has described, and for links: those are not ours.
    """
    check_kind(folder, folder=True)
    own = sorted(path for path in folder.iterdir() if OWN.fullmatch(path.name)) if folder.exists() else []
    for path in own:
        check_kind(path)
    if not own:
        return None
    try:
        found = read_json(folder / SETTINGS)[DESCRIBES]
    except (OSError, LookupError, TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{folder} holds {own[0].name}, and no {SETTINGS} that a run has written; move that away, or choose "
            "another --output."
        )
    return found


def remove_windows(folder: Path) -> None:
    """Remove a run's shards, and their folder where nothing else is in it; what no run has described stays."""
    try:
        if described(folder) is None:
            return
    except ValueError:
        return
    _remove_leftovers(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == SETTINGS):  # last: it says whose the rest is
        if OWN.fullmatch(path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _remove_leftovers(folder: Path) -> None:
    """Of writes that were killed: this run holds the folder, so nobody else writes."""
    for path in folder.iterdir():
        if OWN.fullmatch(written_in(path.name) or "") and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


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
    prepare: Callable[[], dict[str, Any]],
    measure: Measure,
    *,
    overwrite: bool,
    quiet: bool,
) -> tuple[Shards, Survey] | None:
    """Measure every window that has not been measured yet, shared among the ranks.

    `prepare` runs on rank 0 first, stops all ranks by raising, and returns what it adds to the settings of `shards`;
    the windows' token ids are added as well. Returns these shards and what they hold on rank 0, None on the others,
    when all ranks are done.
    """
    opened = list[tuple[Shards, Survey]]()

    def first() -> list[int]:
        more, survey = prepare(), texts.survey(tokenizer)
        whole = Shards(shards.folder, {**shards.settings, **more, "token_ids": survey.token_ids})
        opened.append((whole, survey))
        return [survey.counts["windows"], *whole.open(survey, overwrite)]

    windows, *finished = ranks.from_first(first)
    mine = opened[0][0] if opened else shards.joined()
    _measure_missing(texts.windows(tokenizer), windows, set(finished), mine, ranks, measure, quiet)
    ranks.wait()
    return opened[0] if opened else None


def _measure_missing(
    found: Iterator[list[int]],
    windows: int,
    finished: set[int],
    shards: Shards,
    ranks: Ranks,
    measure: Measure,
    quiet: bool,
) -> None:
    missing = [number for number in range(-(-windows // SHARD_WINDOWS)) if number not in finished]
    mine = set(missing[ranks.rank :: ranks.world])
    hidden = quiet or ranks.rank > 0 or None  # None: hidden where there is no terminal
    with tqdm(
        total=windows, initial=min(windows, len(finished) * SHARD_WINDOWS), unit="window", leave=False, disable=hidden
    ) as bar:
        for number, shard in enumerate(batched(found)):
            if number in mine:
                shards.write(number, shard, measure(shard))
                bar.update(min(windows, len(shards.finished()) * SHARD_WINDOWS) - bar.n)


def batched(windows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Windows, shard by shard."""
    while shard := list(itertools.islice(windows, SHARD_WINDOWS)):
        yield shard
