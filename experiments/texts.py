"""Texts of a file, cut into windows of tokens."""

import csv
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt import Tokenizer

COUNTS = ("texts", "windows", "tokens", "skipped")
"""What `Texts.count` counts."""


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
