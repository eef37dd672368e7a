"""The clean run and every scaled run of a grid: layers, or heads, times factors."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minigpt.checkpoint import write_atomically
from minigpt.divergence import Statistics
from minigpt.fanout import Grid, Place, plan
from minigpt.model import GPT2
from minigpt.scales import Site

DEFAULT_FACTORS = tuple(round(0.5 + 0.05 * step, 2) for step in range(21))
"""0.5 to 1.5 in steps of 0.05."""
Progress = Callable[[Iterable[Place], int], Iterable[Place]]
"""Wraps the places of all passes as they come; the number says how many there will be."""


@dataclass(frozen=True)
class Sweep:
    """A grid of scaled runs beside their clean run. Axis `layer` runs over `layers` (and `heads`)."""

    site: Site
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    """The head of each entry of `layers`, for the site `head`; else None."""
    factors: tuple[float, ...]
    ids: Tensor
    """The texts, padded on the right: [batch, position]."""
    statistics: Statistics
    positions: tuple[int, ...] | None = None
    """The positions that alone were scaled; None for all."""

    @property
    def lengths(self) -> Tensor:
        """How many tokens each text has: [batch]."""
        return self.statistics.lengths

    @property
    def not_run(self) -> tuple[float, ...]:
        """The factors that needed no run: 1 changes nothing, so its cells are the clean run."""
        return tuple(factor for factor in self.factors if factor == 1)

    def frobenius(self, skip: int = 1) -> Tensor:
        """Norm of scaled minus clean at every depth: [layer, factor, depth, batch].

        Positions before `skip` are left out: the first token's stream is often far larger than the
        others' and would decide the sum alone. Raises ValueError when no position of a text is left.
        """
        shortest = int(self.lengths.min())
        if not 0 <= skip < shortest:
            raise ValueError(f"skip is {skip}; the text has {shortest} positions, so expected 0 to one less.")
        return self.statistics.frobenius(torch.arange(self.ids.shape[1])[skip:])[:, :, :-1]

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file, whole or not at all."""
        tensors = {name: getattr(self.statistics, name).contiguous() for name in _TENSORS}
        settings = {name: getattr(self, name) for name in _SETTINGS}
        tensors["ids"] = self.ids.cpu().contiguous()
        write_atomically(Path(path), lambda file: save_file(tensors, file, {"sweep": json.dumps(settings)}))

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Read what `save` wrote. Raises ValueError for any other file."""
        try:
            with safe_open(path, "pt") as file:
                found = json.loads(file.metadata()["sweep"])
                settings = {name: _frozen(found[name]) for name in _SETTINGS}
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                statistics = Statistics(settings["layers"], **tensors)
                return cls(**settings, ids=file.get_tensor("ids"), statistics=statistics)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved sweep ({error}); expected a file written by Sweep.save.") from None


_TENSORS = ("difference", "scaled", "inner", "clean", "lengths")
_SETTINGS = ("site", "layers", "heads", "factors", "positions")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def sweep(
    model: GPT2,
    ids: Tensor | Sequence[Sequence[int]],
    layers: Iterable[int] | None = None,
    factors: Sequence[float] = DEFAULT_FACTORS,
    site: Site = "output",
    heads: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    max_bytes: int | None = None,
    progress: Progress = lambda places, _: places,
) -> Sweep:
    """Run texts once clean and once for every layer and factor, in one pass where memory allows.

    `ids` is int64 [batch, position], or a list of texts, each a list of token ids: those of different lengths
    are padded on the right, which no real position sees, and the padding counts nowhere. `layers` (default:
    all) are counted from 0; `heads` (default: all) only matters for the site `head`, whose axis `layer` runs
    over layers x heads. `positions` (default: all) are scaled, the others are not. A factor of 1 is not
    run: its cells are the clean run. `max_bytes` (default: a quarter of what is free) bounds the memory,
    beside the model and the result: the grid is split into passes, each with its own clean run.
    `progress` wraps the n_layer + 2 places of every pass as they come, as tqdm does.

    Raises ValueError for a layer, head, position or factor out of range, for a model whose scales are not 1,
    when a stream overflows, and when `max_bytes` is too little for a single cell.
    """
    ids, lengths = padded(ids)
    model.config.check_ids(ids)
    grid = Grid.checked(model, layers, factors, site, heads, positions, ids.shape[1])
    passes = plan(model, grid, ids, lengths, max_bytes)
    places = progress((place for part in passes for place in part.places()), len(passes) * (model.config.n_layer + 2))
    statistics = _collect(places, grid, model.config.n_layer + 2, lengths, ids.shape[1])
    return Sweep(site, grid.layers, grid.heads, grid.factors, ids.cpu(), statistics, grid.positions)


def padded(texts: Tensor | Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Texts as one tensor [batch, position], and their lengths [batch]. Raises ValueError for an empty text."""
    if isinstance(texts, Tensor):
        full = texts.shape[1] if texts.ndim == 2 else 0  # another shape is refused by the config's check
        return texts, torch.full((len(texts),) if texts.ndim else (0,), full)
    if not all(isinstance(text, Sequence) for text in texts):
        raise ValueError("The texts are not lists of token ids; for a single text give [ids], a list that holds it.")
    lengths = [len(text) for text in texts]
    if not lengths or not min(lengths):
        raise ValueError(
            f"The texts have {lengths} tokens; expected at least one text, and in each at least one token."
        )
    rows = [torch.as_tensor(text, dtype=torch.int64) for text in texts]
    return pad_sequence(rows, batch_first=True), torch.tensor(lengths)


def _collect(places: Iterable[Place], grid: Grid, count: int, lengths: Tensor, length: int) -> Statistics:
    """The numbers of all places on their axes; cells that have not left the clean run are the clean run."""
    shape = (len(grid.layers), len(grid.factors), count, len(lengths), length)
    difference, scaled, inner = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    clean, ran = torch.zeros(shape[2:], dtype=torch.float64), torch.zeros(shape[:3], dtype=torch.bool)
    for place in places:
        within = slice(place.clean.shape[1])
        clean[place.index, place.texts, within] = place.clean
        if place.cells:
            entries, factors = torch.tensor(place.cells).unbind(1)
            ran[entries, factors, place.index] = True
            for into, numbers in ((difference, place.difference), (scaled, place.scaled), (inner, place.inner)):
                into[entries, factors, place.index, place.texts, within] = numbers
    for index in range(count):
        waiting = ~ran[:, :, index]
        scaled[:, :, index][waiting] = inner[:, :, index][waiting] = clean[index]
    padding = torch.arange(length) >= lengths[:, None]
    for numbers in (difference, scaled, inner, clean):
        numbers.masked_fill_(padding, 0.0)
    _check_finite(scaled, grid.factors)
    return Statistics(grid.layers, difference, scaled, inner, clean, lengths)


def _check_finite(scaled_norm: Tensor, factors: tuple[float, ...]) -> None:
    broken = (~scaled_norm.isfinite()).nonzero()
    if len(broken):
        _, factor, place = broken[broken[:, 2].argmin()][:3].tolist()
        last = scaled_norm.shape[2] - 1
        raise ValueError(
            f"The stream is no longer finite at {'the final norm' if place == last else f'depth {place}'} under factor "
            f"{factors[factor]:g}; take a smaller factor, or float64."
        )
