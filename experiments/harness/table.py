"""Numbers on named axes: the one place from which table, verdicts, page and tour read.

What an experiment measures of some texts is a table whose first axis is the text. Of a prompt, its one text is
kept. Over a corpus, the mean over all windows takes the text's place, and its spread comes along.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fmax, full, meshgrid, stack, tensor

from minigpt import Comparison, Sensitivity, Sweep
from minigpt.measures import POSITION_SETS, Measure

SPREAD = ("sd", "median", "q1", "q3", "low", "high")
"""What is known of a mean over windows."""
Row = dict[str, Any]
"""Names of columns and their values, one number among them."""


@dataclass(frozen=True)
class Table:
    """Numbers on named axes, each index of which has a label."""

    axes: Mapping[str, Sequence[Any]]
    """Name -> labels, in the tensor's order. A label that is a named tuple or a mapping has columns of its own."""
    value: Tensor
    """Of one text, or the mean over windows."""
    spread: Mapping[str, Tensor] = field(default_factory=dict)
    """Over windows, on the same axes: sd, median, q1, q3, and low and high, the interval of the mean."""
    windows: int | None = None
    """How many windows the numbers are means of; None for one text."""
    error: Tensor | None = None
    """How far each number is from the same one in float64, by rounding; over windows, the farthest of the first few.
    Not a number where it was not measured."""

    def __post_init__(self) -> None:
        if taken := sorted({"value", "error", "windows", *SPREAD} & self.axes.keys()):
            raise ValueError(f"An axis is called {taken[0]!r}, as a column of numbers is; give it another name.")
        shape = [len(labels) for labels in self.axes.values()]
        if list(self.value.shape) != shape:
            raise ValueError(f"The numbers have the shape {list(self.value.shape)}; the axes' labels have {shape}.")

    @property
    def low(self) -> Tensor:
        """The interval's lower end; of one text, the number itself."""
        return self.spread.get("low", self.value)

    @property
    def high(self) -> Tensor:
        """The interval's upper end; of one text, the number itself."""
        return self.spread.get("high", self.value)

    def at(self, **labels: Any) -> "Table":
        """A part, by the names of axes: one label takes its axis away, a list keeps those labels, in that order.

        Raises ValueError for an axis or a label that is not there.
        """
        part = self
        for axis, wanted in labels.items():
            part = part._at(axis, wanted)
        return part

    def _at(self, axis: str, wanted: Any) -> "Table":
        chosen = wanted if isinstance(wanted, list) else [wanted]
        index, dimension = tensor([self._index(axis, label) for label in chosen]).long(), list(self.axes).index(axis)
        part = self._with({**self.axes, axis: chosen}, lambda numbers: numbers.index_select(dimension, index))
        if isinstance(wanted, list):
            return part
        axes = {name: labels for name, labels in self.axes.items() if name != axis}
        return part._with(axes, lambda numbers: numbers.squeeze(dimension))

    def _index(self, axis: str, label: Any) -> int:
        known = list(self.axes.get(axis, ()))
        if label not in known:
            names = ", ".join(map(str, known or self.axes))
            raise ValueError(f"There is no {axis} {label!r} in this table; it has {names}.")
        return known.index(label)

    def named(self, axis: str, name: str, labels: Sequence[Any]) -> "Table":
        """The same numbers, one axis under another name and with other labels."""
        axes = {name if known == axis else known: labels if known == axis else of for known, of in self.axes.items()}
        return self._with(axes, lambda numbers: numbers)

    def split(self, axis: str, **axes: Sequence[Any]) -> "Table":
        """The same numbers, one axis as several: the last of them runs fastest."""
        shape, dimension = [len(labels) for labels in axes.values()], list(self.axes).index(axis)
        whole = dict[str, Sequence[Any]]()
        for name, labels in self.axes.items():
            whole |= axes if name == axis else {name: labels}
        return self._with(whole, lambda numbers: numbers.unflatten(dimension, shape))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Table":
        """A function of every number, such as exp, that keeps their order: an interval stays one."""
        part = self._with(self.axes, function)
        if self.error is None:
            return part
        ends = [(function(self.value + sign * self.error) - part.value).abs() for sign in (1, -1)]
        return replace(part, error=fmax(*ends))

    def beside(self, exact: "Table") -> Tensor:
        """The errors of these numbers, on their axes: how far each is from one in a more exact table.

        That table may lack some labels, whose errors are not a number. If the exact number is undefined, all of this
        number counts as error.
        """
        where = [tensor([self._index(axis, label) for label in labels]) for axis, labels in exact.axes.items()]
        at = meshgrid(*where, indexing="ij")
        error, found, expected = (
            full(self.value.shape, math.nan).double(),
            self.value[at].double(),
            exact.value.double(),
        )
        error[at] = (found - expected).abs().where(expected.isfinite(), found.abs())
        return error

    def _with(self, axes: Mapping[str, Sequence[Any]], function: Callable[[Tensor], Tensor]) -> "Table":
        spread = {name: function(numbers) for name, numbers in self.spread.items()}
        error = None if self.error is None else function(self.error)
        return Table(axes, function(self.value), spread, self.windows, error)

    def rows(self, **constants: Any) -> Iterator[Row]:
        """Tidy rows, one finite number each, after the constants' columns.

        Its error follows it, where there is one, and over windows more columns do.
        """
        beside = self.spread if self.error is None else {"error": self.error, **self.spread}
        flat = {name: numbers.flatten().tolist() for name, numbers in beside.items()}
        labels = itertools.product(*([_columns(name, of) for of in known] for name, known in self.axes.items()))
        for index, (label, value) in enumerate(zip(labels, self.value.flatten().tolist(), strict=True)):
            if math.isfinite(value):
                named = {name: of for columns in label for name, of in columns}
                more = {name: numbers[index] for name, numbers in flat.items()}
                counted = {} if self.windows is None else {"windows": self.windows}
                yield {**constants, **named, "value": value, **more, **counted}


Tables = dict[str, Table]


def _columns(axis: str, label: Any) -> list[tuple[str, Any]]:
    columns = label._asdict() if hasattr(label, "_asdict") else label
    return list(columns.items()) if isinstance(columns, Mapping) else [(axis, label)]


def by_text(value: Tensor, **axes: Sequence[Any]) -> Table:
    """Numbers of some texts: [text, ...], the other axes with their labels."""
    return Table({"text": range(len(value)), **axes}, value)


def by_measure(result: Sweep | Comparison | Sensitivity, names: Sequence[Measure], **axes: Sequence[Any]) -> Table:
    """Measures over every set of positions: [text, positions, metric, ..., depth], in between the runs' own axes."""
    values = stack([stack([result.measure(name, of) for name in names]) for of in POSITION_SETS]).movedim(-1, 0)
    depths = [*range(values.shape[-1] - 1), "final"]
    return by_text(values, positions=POSITION_SETS, metric=names, **axes, depth=depths)


def of_text(tables: Mapping[str, Table]) -> Tables:
    """The numbers of the only text. Raises ValueError for a table of several."""
    if several := [name for name, table in tables.items() if len(table.axes["text"]) != 1]:
        raise ValueError(f"{several[0]!r} has {len(tables[several[0]].axes['text'])} texts, and one was run.")
    return {name: table.at(text=0) for name, table in tables.items()}


def of_windows(tables: Mapping[str, Table], combined: Mapping[str, Mapping[str, Tensor]], windows: int) -> Tables:
    """What `Shards.combine` gives for so many windows, on the axes that the tables of a few windows have."""
    found = {}
    for name, statistics in combined.items():
        axes = {axis: labels for axis, labels in tables[name].axes.items() if axis != "text"}
        spread = {other: numbers for other, numbers in statistics.items() if other != "mean"}
        found[name] = Table(axes, statistics["mean"], spread, windows)
    return found
