"""The clean run and every scaled run of a grid: layers, or heads, times factors."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minigpt.engine import Cell, Grid, Place, plan, run_passes
from minigpt.files import open_tensors, write_tensors
from minigpt.measures import WRITTEN, Measure, PositionSet, Statistics
from minigpt.model import GPT2
from minigpt.predictions import Predictions

DEFAULT_FACTORS = tuple(round(0.5 + 0.05 * step, 2) for step in range(21))
"""0.5 to 1.5 in steps of 0.05."""
Progress = Callable[[Iterable[Place], int], Iterable[Place]]
"""Wraps the places of all passes as they come; the number says how many there will be."""


class StreamOverflowError(ValueError):
    """A scaled stream left the range of the model's type: the message says where, and under which factor."""


@dataclass(frozen=True)
class Sweep:
    """A grid of scaled runs beside their clean run. Axis `layer` runs over `layers` (and `heads`)."""

    site: str
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

    def of_layers(self, layers: Iterable[int]) -> "Sweep":
        """The part of the grid that scaled these layers, in their order.

        Raises ValueError for a layer that was not scaled, and for one that is named twice.
        """
        layers = tuple(layers)
        if len(set(layers)) < len(layers):
            raise ValueError(f"The layers are {layers}; expected different numbers.")
        entries = [entry for layer in layers for entry in self._entries_of(layer)]
        heads = self.heads and tuple(self.heads[entry] for entry in entries)
        chosen = tuple(self.layers[entry] for entry in entries)
        return replace(self, layers=chosen, heads=heads, statistics=self.statistics.of_entries(entries))

    def measure(self, name: Measure, positions: PositionSet) -> Tensor:
        """A measure by name over a set of positions: [layer, factor, place, batch]; raises as `Statistics.measure`."""
        return self.statistics.measure(name, positions)

    def _entries_of(self, layer: int) -> list[int]:
        found = [entry for entry, other in enumerate(self.layers) if other == layer]
        if not found:
            raise ValueError(f"Layer {layer} was not scaled; this sweep has {', '.join(map(str, self.layers))}.")
        return found

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
        for prefix in _PREDICTIONS:
            kept = getattr(self.statistics, prefix)
            if kept is not None:
                tensors |= {f"{prefix}.{name}": tensor.contiguous() for name, tensor in kept.tensors().items()}
        settings = {name: getattr(self, name) for name in _SETTINGS}
        tensors["ids"] = self.ids.cpu().contiguous()
        write_tensors(Path(path), tensors, {"sweep": json.dumps(settings)})

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Read what `save` wrote. Raises ValueError for any other file."""
        try:
            with open_tensors(Path(path)) as file:
                found = json.loads(file.metadata()["sweep"])
                settings = {name: _frozen(found[name]) for name in _SETTINGS}
                tensors = [file.get_tensor(name) for name in _TENSORS]
                predictions = [_read_predictions(file, prefix) for prefix in _PREDICTIONS]
                statistics = Statistics(settings["layers"], *tensors, *predictions)
                loaded = cls(**settings, ids=file.get_tensor("ids"), statistics=statistics)
                loaded._check_shapes()
                return loaded
        except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a saved sweep ({error}); expected a file written by Sweep.save.") from None

    def _check_shapes(self) -> None:
        """Raise ValueError unless every tensor has the shape that the grid asks for, as those of a file may not."""
        found, places = self.statistics, tuple(self.statistics.clean_sq.shape)
        cells = (len(self.layers), len(self.factors), *places)
        expected = {"difference_sq": cells, "run_sq": cells, "inner": cells, "written": (len(WRITTEN), *cells)}
        expected["lengths"] = places[1:2]
        wrong = [name for name, shape in expected.items() if tuple(getattr(found, name).shape) != shape]
        if wrong or len(places) != 3 or tuple(self.ids.shape) != places[1:]:
            raise ValueError(f"{', '.join(wrong or ['ids'])} of another shape than its grid")


_TENSORS = ("difference_sq", "run_sq", "inner", "clean_sq", "lengths", "written")
_PREDICTIONS = ("predictions", "clean_predictions")
_SETTINGS = ("site", "layers", "heads", "factors", "positions")


def _read_predictions(file: Any, prefix: str) -> Predictions | None:
    if not any(key.startswith(f"{prefix}.") for key in file.keys()):  # noqa: SIM118  a file of tensors, no dict
        return None
    return Predictions(*(file.get_tensor(f"{prefix}.{field.name}") for field in fields(Predictions)))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def sweep(
    model: GPT2,
    ids: Tensor | Sequence[Sequence[int]],
    layers: Iterable[int] | None = None,
    factors: Sequence[float] = DEFAULT_FACTORS,
    site: str = "output",
    heads: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    predictions: bool = False,
    max_bytes: int | None = None,
    progress: Progress = lambda places, _: places,
) -> Sweep:
    """Run texts once clean and once for every layer and factor, in one pass where memory allows.

    `ids` is int64 [batch, position], or a list of texts, each a list of token ids: those of different lengths
    are padded on the right, which no real position sees, and the padding counts nowhere. `layers` (default:
    all) are counted from 0; `heads` (default: all) only matters for the site `head`, whose axis `layer` runs
    over layers x heads. `positions` (default: all) are scaled, the others are not. A factor of 1 is not
    run: its cells are the clean run. With `predictions` the next-token distributions are compared too, which
    takes the unembedding of every run. `max_bytes` (default: a quarter of what is free) bounds the memory,
    beside the model and the result: the grid is split into passes, each with its own clean run. A pass that
    still runs out of memory is halved and repeated, which the logger `minigpt` says.
    `progress` wraps the n_layer + 2 places of every pass as they come, as tqdm does.

    Raises ValueError for a layer, head, position or factor out of range, for a model whose scales are not 1,
    when a stream overflows, and when `max_bytes` is too little for a single cell.
    """
    ids, lengths = padded(ids)
    model.config.check_ids(ids)
    grid = Grid.checked(model, layers, factors, site, heads, positions, ids.shape[1], predictions)
    passes = plan(model, grid, ids, lengths, max_bytes)
    places = progress(run_passes(passes), len(passes) * (model.config.n_layer + 2))
    statistics = _collect(places, grid, model.config.n_layer + 2, lengths, ids.shape[1])
    return Sweep(site, grid.layers, grid.heads, grid.factors, ids.cpu(), statistics, grid.positions)


def padded(texts: Tensor | Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Texts as one tensor [batch, position], and their lengths [batch]. Raises ValueError for an empty text."""
    if isinstance(texts, Tensor):
        full = texts.shape[1] if texts.ndim == 2 else 0  # another shape is refused by the config's check
        return texts, torch.full((len(texts),) if texts.ndim else (0,), full)
    if isinstance(texts, str) or not all(isinstance(text, Sequence) and not isinstance(text, str) for text in texts):
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
    written = torch.zeros(len(WRITTEN), *shape, dtype=torch.float64)
    clean, ran = torch.zeros(shape[2:], dtype=torch.float64), torch.zeros(shape[:3], dtype=torch.bool)
    predicted = Gathered(shape[:2], shape[3:])
    for place in places:
        within = slice(place.clean.shape[1])
        clean[place.index, place.texts, within] = place.clean
        if place.cells:
            entries, factors = torch.tensor(place.cells).unbind(1)
            ran[entries, factors, place.index] = True
            written[:, entries, factors, place.index, place.texts, within] = place.written
            for into, numbers in ((difference, place.difference), (scaled, place.scaled), (inner, place.inner)):
                into[entries, factors, place.index, place.texts, within] = numbers
        if place.predictions:
            predicted.add(place.predictions, place.cells, place.texts)
    for index in range(count):
        waiting = ~ran[:, :, index]
        scaled[:, :, index][waiting] = inner[:, :, index][waiting] = clean[index]
    padding = torch.arange(length) >= lengths[:, None]
    for numbers in (difference, scaled, inner, clean, written):
        numbers.masked_fill_(padding, 0.0)
    _check_finite(scaled, grid.factors)
    predictions, clean_predictions = predicted.finished()
    return Statistics(grid.layers, difference, scaled, inner, clean, lengths, written, predictions, clean_predictions)


class Gathered:
    """The predictions of all passes, as they come, on the axes of a sweep."""

    def __init__(self, cells: tuple[int, ...], texts: tuple[int, ...]) -> None:
        self.cells, self.texts = cells, texts
        self.of_cells: dict[str, Tensor] = {}
        self.of_clean: dict[str, Tensor] = {}
        self.ran = torch.zeros(cells, dtype=torch.bool)

    def add(self, found: Predictions, cells: Sequence[Cell], texts: slice) -> None:
        """Take in what one pass found: row 0 is the clean run, the others are cells."""
        for name, rows in found.tensors().items():
            last = rows.shape[2] if name.startswith("top") else self.texts[1]  # ranks, or positions
            if name not in self.of_clean:
                self.of_clean[name] = rows.new_zeros(self.texts[0], last)
                self.of_cells[name] = rows.new_zeros(*self.cells, self.texts[0], last)
            self.of_clean[name][texts, : rows.shape[2]] = rows[0]
            for (entry, factor), row in zip(cells, rows[1:], strict=True):
                self.of_cells[name][entry, factor, texts, : rows.shape[2]] = row
                self.ran[entry, factor] = True

    def finished(self) -> tuple[Predictions | None, Predictions | None]:
        """Of the cells, those that needed no run being the clean run, and of the clean run."""
        if not self.of_clean:
            return None, None
        for name, clean in self.of_clean.items():
            self.of_cells[name][~self.ran] = clean
        return Predictions(**self.of_cells), Predictions(**self.of_clean)


def _check_finite(scaled_norm: Tensor, factors: tuple[float, ...]) -> None:
    broken = (~scaled_norm.isfinite()).nonzero()
    if len(broken):
        _, factor, place = broken[broken[:, 2].argmin()][:3].tolist()
        last = scaled_norm.shape[2] - 1
        raise StreamOverflowError(
            f"The stream is no longer finite at {'the final norm' if place == last else f'depth {place}'} under factor "
            f"{factors[factor]:g}; take a smaller factor, or float64."
        )
