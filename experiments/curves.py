"""What the divergence study measured, by depth: of one prompt, or over the windows of a corpus."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.estimates import Axis, Estimate, Row, axis
from experiments.verdicts import describe_entry
from minigpt import Sweep
from minigpt.measures import MEASURES, OF_PREDICTIONS, POSITION_SETS, Measure, PositionSet
from minigpt.parameters import Site


def measure(result: Sweep) -> dict[str, Tensor]:
    """The curves of a sweep, per text, float64.

    `values` [text, position set, measure, layer, factor, place]; `norms` [text, 3, place] of the clean stream:
    norm of position 0, mean norm of the others, and the root of their summed squares.
    """
    statistics = result.statistics
    names = [name for name in MEASURES if statistics.predictions or name not in OF_PREDICTIONS]
    values = [[statistics.measure(name, positions) for name in names] for positions in POSITION_SETS]
    first, others = statistics.clean_sq[..., :1].sqrt(), statistics.clean_sq[..., 1:].sqrt()
    mean = others.sum(-1, keepdim=True) / (result.lengths[:, None] - 1)
    norms = torch.cat([first, mean, others.square().sum(-1, keepdim=True).sqrt()], -1)  # [place, text, 3]
    return {
        "values": torch.stack([torch.stack(of_set) for of_set in values]).movedim(-1, 0),
        "norms": norms.permute(1, 2, 0),
    }


@dataclass(frozen=True)
class Curves:
    """The measures of every cell at every place: of one text, or their mean over windows."""

    site: Site
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    factors: tuple[float, ...]
    values: Estimate
    """[position set, measure, layer, factor, place]"""
    norms: Estimate
    """[3, place], see `measure`."""
    windows: int | None = None
    """How many there were; None for a prompt."""
    positions: tuple[int, ...] | None = None
    """The positions that alone were scaled; None for all."""

    @classmethod
    def of_grid(cls, grid: Sweep, values: Estimate, norms: Estimate, windows: int | None) -> "Curves":
        """Curves on the axes of a sweep of the same grid."""
        return cls(grid.site, grid.layers, grid.heads, grid.factors, values, norms, windows, grid.positions)

    @classmethod
    def of_text(cls, result: Sweep) -> "Curves":
        """The curves of a sweep's first text."""
        measured = measure(result)
        return cls.of_grid(result, Estimate(measured["values"][0]), Estimate(measured["norms"][0]), None)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The names on the axis of measures: without predictions there are fewer."""
        return tuple(MEASURES[: self.values.value.shape[1]])

    @property
    def places(self) -> list[str]:
        """The names of the places: 0 .. n_layer, and `final`."""
        return [*map(str, range(self.values.value.shape[-1] - 1)), "final"]

    @property
    def entries(self) -> Axis:
        """The layers, or layers and heads, that were scaled, as columns of a table."""
        heads = self.heads or [None] * len(self.layers)
        pairs = zip(self.layers, heads, strict=True)
        return [{"layer": layer} if head is None else {"layer": layer, "head": head} for layer, head in pairs]

    def of(self, name: Measure, positions: PositionSet) -> Tensor:
        """A measure over a set of positions: [layer, factor, place]."""
        return self.estimate(name, positions).value

    def estimate(self, name: Measure, positions: PositionSet) -> Estimate:
        """A measure over a set of positions, with its interval: [layer, factor, place]."""
        return self.values.map(lambda values: values[POSITION_SETS.index(positions), MEASURES.index(name)])

    def where(self, entry: int) -> str:
        """What was scaled in an entry, in words."""
        part = f"head {self.heads[entry]}" if self.heads else {"mlp": "MLP"}.get(self.site, self.site)
        block = f"{part} of {describe_entry(self.layers[entry], None)}"
        if self.positions is None:
            return block
        return f"{block} at position{'s' * (len(self.positions) > 1)} {', '.join(map(str, self.positions))}"

    def rows(self, model: str) -> Iterator[Row]:
        """Tidy rows, one number each; over windows more columns follow it."""
        measures = axis("metric", self.measures)
        axes = [axis("positions", POSITION_SETS), measures, self.entries, axis("factor", self.factors)]
        columns = [
            "model",
            "site",
            "layer",
            *(["head"] if self.heads else []),
            "factor",
            "depth",
            "positions",
            "metric",
        ]
        for row in self.values.rows([*axes, axis("depth", self.places)], self.windows):
            named = {"model": model, "site": self.site, **row}
            yield {**{name: named[name] for name in columns}, **named}
