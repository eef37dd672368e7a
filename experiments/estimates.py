"""Numbers of one text, or means over the windows of a corpus with their intervals; and the tidy rows they make."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Row = dict[str, Any]
Axis = Sequence[Mapping[str, Any]]
"""For every index of a tensor's axis, the columns that name it, such as {"layer": 2, "head": 0}."""


@dataclass(frozen=True)
class Estimate:
    """A tensor of numbers."""

    value: Tensor
    """Of one text, or the mean over windows."""
    spread: dict[str, Tensor] = field(default_factory=dict)
    """Over windows, on the same axes: sd, median, q1, q3, and low and high, the interval of the mean."""

    @property
    def low(self) -> Tensor:
        """The interval's lower end; of one text, the number itself."""
        return self.spread.get("low", self.value)

    @property
    def high(self) -> Tensor:
        """The interval's upper end; of one text, the number itself."""
        return self.spread.get("high", self.value)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Estimate":
        """A part of it: the function only chooses or reorders elements, or keeps their order, as exp does."""
        return Estimate(function(self.value), {name: function(tensor) for name, tensor in self.spread.items()})

    def at(self, *index: int) -> "Estimate":
        """The part at an index."""
        return self.map(lambda tensor: tensor[index])

    def rows(self, axes: Sequence[Axis], windows: int | None = None) -> Iterator[Row]:
        """Tidy rows, one finite number each; over windows more columns follow it."""
        flat = {name: tensor.flatten().tolist() for name, tensor in self.spread.items()}
        labels = itertools.product(*axes)
        for index, (label, value) in enumerate(zip(labels, self.value.flatten().tolist(), strict=True)):
            if math.isfinite(value):
                named = {name: of for columns in label for name, of in columns.items()}
                spread = {name: values[index] for name, values in flat.items()}
                yield {**named, "value": value, **spread, **({} if windows is None else {"windows": windows})}


Estimates = dict[str, Estimate]


def of_text(measured: Mapping[str, Tensor]) -> Estimates:
    """Of tensors whose first axis is the text: the first text's numbers."""
    return {name: Estimate(tensor[0]) for name, tensor in measured.items()}


def of_windows(combined: Mapping[str, Mapping[str, Tensor]]) -> Estimates:
    """Of what `Shards.combine` gives."""
    return {
        name: Estimate(statistics["mean"], {other: of for other, of in statistics.items() if other != "mean"})
        for name, statistics in combined.items()
    }


def axis(column: str, labels: Sequence[Any]) -> Axis:
    """An axis that one column names."""
    return [{column: label} for label in labels]
