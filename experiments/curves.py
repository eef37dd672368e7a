"""What a study measured, by depth: of one prompt, or over the windows of a corpus."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minigpt import Sweep
from minigpt.divergence import MEASURES, POSITION_SETS, Measure, PositionSet
from minigpt.scales import Site


def measure(result: Sweep) -> dict[str, Tensor]:
    """All that a study keeps of a sweep, per text, float64.

    `values` [text, position set, measure, layer, factor, place]; `norms` [text, 3, place] of the clean stream:
    norm of position 0, mean norm of the others, and the root of their summed squares.
    """
    statistics = result.statistics
    values = [[statistics.measure(name, positions) for name in MEASURES] for positions in POSITION_SETS]
    first, others = statistics.clean[..., :1].sqrt(), statistics.clean[..., 1:].sqrt()
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
    values: Tensor
    """[position set, measure, layer, factor, place]"""
    norms: Tensor
    """[3, place], see `measure`."""
    spread: dict[str, Tensor] = field(default_factory=dict)
    """Over windows: a statistic's name -> its values, on the axes of `values`."""
    windows: int | None = None
    """How many there were; None for a prompt."""
    positions: tuple[int, ...] | None = None
    """The positions that alone were scaled; None for all."""

    @classmethod
    def of_text(cls, result: Sweep) -> "Curves":
        """The curves of a sweep's first text."""
        measured = measure(result)
        grid = (result.site, result.layers, result.heads, result.factors)
        return cls(*grid, measured["values"][0], measured["norms"][0], positions=result.positions)

    @classmethod
    def of_windows(cls, shape: Sweep, combined: dict[str, dict[str, Tensor]], windows: int) -> "Curves":
        """The means over windows, from `Shards.combine`; `shape` is any sweep of the same grid."""
        spread = dict(combined["values"])
        values, norms = spread.pop("mean"), combined["norms"]["mean"]
        grid = (shape.site, shape.layers, shape.heads, shape.factors)
        return cls(*grid, values, norms, spread, windows, shape.positions)

    def of(self, name: Measure, positions: PositionSet) -> Tensor:
        """A measure over a set of positions: [layer, factor, place]."""
        return self.values[POSITION_SETS.index(positions), MEASURES.index(name)]

    def where(self, entry: int) -> str:
        """What was scaled in an entry, in words."""
        part = f"head {self.heads[entry]}" if self.heads else {"mlp": "MLP"}.get(self.site, self.site)
        block = f"{part} of block {self.layers[entry]}"
        if self.positions is None:
            return block
        return f"{block} at position{'s' * (len(self.positions) > 1)} {', '.join(map(str, self.positions))}"

    def rows(self, model: str) -> Iterator[dict[str, Any]]:
        """Tidy rows, one number each; over windows more columns follow it."""
        places = [*map(str, range(self.values.shape[-1] - 1)), "final"]
        index = torch.cartesian_prod(*(torch.arange(size) for size in self.values.shape))
        flat = {name: values.flatten().tolist() for name, values in self.spread.items()}
        numbers = zip(index.tolist(), self.values.flatten().tolist(), strict=True)
        for row, ((positions, name, entry, factor, place), value) in enumerate(numbers):
            if MEASURES[name] == "passive" and places[place] == "final":
                continue
            yield {
                "model": model,
                "site": self.site,
                "layer": self.layers[entry],
                **({"head": self.heads[entry]} if self.heads else {}),
                "factor": self.factors[factor],
                "depth": places[place],
                "positions": POSITION_SETS[positions],
                "metric": MEASURES[name],
                "value": value,
                **{name: values[row] for name, values in flat.items()},
                **({} if self.windows is None else {"windows": self.windows}),
            }


def describe_entry(layer: int, head: int | None) -> str:
    """A block, or a head of it, in words."""
    return f"block {layer}" if head is None else f"block {layer}, head {head}"
