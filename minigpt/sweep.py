"""The clean run and every scaled run of a grid: layers, or heads, times factors."""

import json
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.config import GPT2Config
from minigpt.engine import Job, padded
from minigpt.files import open_tensors, write_tensors
from minigpt.measures import WRITERS, Labels, Result, Statistics
from minigpt.model import GPT2
from minigpt.parameters import Native, Values, natives, parameter_name
from minigpt.passes import Cells, Progress, run
from minigpt.predictions import Predictions

DEFAULT_FACTORS = tuple(round(0.5 + 0.05 * step, 2) for step in range(21))
"""0.5 to 1.5 in steps of 0.05."""


@dataclass(frozen=True, repr=False)
class Sweep(Result):
    """A grid of scaled runs beside their clean run. The axes of its measures: layer, factor, place, batch."""

    site: str
    layers: tuple[int, ...]
    """Of every entry of the axis `layer`."""
    indices: tuple[int, ...] | None
    """Of every entry, where the site has an index of its own, such as the head; else None."""
    index: str | None
    """What that index counts: `head`."""
    factors: tuple[float, ...]
    positions: tuple[int, ...] | None = None
    """The positions that alone were scaled; None for all."""

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The head of each entry, for the site `head`; else None."""
        return self.indices if self.index == "head" else None

    @property
    def axes(self) -> tuple[Labels, ...]:
        """Layers, with the index where there is one, and factors."""
        indices = [{}] * len(self.layers) if self.indices is None else [{str(self.index): of} for of in self.indices]
        layers = [{"site": self.site, "layer": layer, **of} for layer, of in zip(self.layers, indices, strict=True)]
        return layers, [{"factor": factor} for factor in self.factors]

    @property
    def not_run(self) -> tuple[float, ...]:
        """The factors that needed no run: 1 changes nothing, so its cells are the clean run."""
        return tuple(factor for factor in self.factors if factor == 1)

    def intervention(self, model: GPT2, entry: int, factor: float) -> Values:
        """What a cell did to the model, as `scaled` takes it."""
        name = parameter_name(model, self.layers[entry], self.site)
        index = None if self.indices is None else self.indices[entry]
        at = natives(model)[name], model.config, factor, index, self.positions, self.ids.shape[1]
        return {name: _value(*at)}

    def of_layers(self, layers: Iterable[int]) -> "Sweep":
        """The part of the grid that scaled these layers, in their order.

        Raises ValueError for a layer that was not scaled, and for one that is named twice.
        """
        layers = tuple(layers)
        if len(set(layers)) < len(layers):
            raise ValueError(f"The layers are {layers}; expected different numbers.")
        entries = [entry for layer in layers for entry in self._entries_of(layer)]
        indices = self.indices and tuple(self.indices[entry] for entry in entries)
        chosen = tuple(self.layers[entry] for entry in entries)
        return replace(self, layers=chosen, indices=indices, statistics=self.statistics.of_entries(entries))

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
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder; expected the name of a file in it, such as sweep.safetensors.")
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
                sites = _sites(settings["layers"], len(settings["factors"]))
                statistics = Statistics(sites, *tensors, *predictions)
                loaded = cls(file.get_tensor("ids"), statistics, **settings)
                loaded._check_shapes()
                return loaded
        except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a saved sweep ({error}); expected a file written by Sweep.save.") from None

    def _check_shapes(self) -> None:
        """Raise ValueError unless every tensor has the shape that the grid asks for, as those of a file may not."""
        found, places = self.statistics, tuple(self.statistics.clean_sq.shape)
        cells = (len(self.layers), len(self.factors), *places)
        expected = {"difference_sq": cells, "run_sq": cells, "inner": cells, "written": (len(WRITERS), 2, *cells)}
        expected["lengths"] = places[1:2]
        wrong = [name for name, shape in expected.items() if tuple(getattr(found, name).shape) != shape]
        if wrong or len(places) != 3 or tuple(self.ids.shape) != places[1:]:
            raise ValueError(f"{', '.join(wrong or ['ids'])} of another shape than its grid")
        if not isinstance(self.site, str) or not all(0 <= layer < places[0] - 2 for layer in self.layers):
            raise ValueError("a site or layers that no model has")


_TENSORS = ("difference_sq", "run_sq", "inner", "clean_sq", "lengths", "written")
_PREDICTIONS = ("predictions", "clean_predictions")
_SETTINGS = ("site", "layers", "indices", "index", "factors", "positions")


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
    positions: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    predictions: bool = False,
    max_bytes: int | None = None,
    progress: Progress | None = None,
    indices: Iterable[int] | None = None,
) -> Sweep:
    """Run texts once clean and once for every layer and factor, in one pass where memory allows.

    `ids` is int64 [batch, position], or a list of texts, each a list of token ids: those of different lengths
    are padded on the right, which no real position sees, and the padding counts nowhere. `layers` (default:
    all) are counted from 0. At a site with an index of its own the axis `layer` runs over layers x `indices`
    (default: all); `heads` are the indices of the site `head`. `positions` (default: all) are scaled, the others are
    not. A factor of 1 is not run: its cells are the clean run. With `predictions` the next-token distributions are
    compared too, which takes the unembedding of every run. `max_bytes` (default: a quarter of what is free) bounds the
    memory, beside the model and the result: the grid is split into passes, each with its own clean run. A pass that
    still runs out of memory is halved and repeated, which the logger `minigpt` says.
    `progress` wraps the n_layer + 2 places of every pass as they come, as tqdm does.

    Raises ValueError for a layer, head, position or factor out of range, for a model that is not clean, when a stream
    overflows, and when `max_bytes` is too little for a single cell.
    """
    texts, _ = padded(ids)
    model.config.check_ids(texts)
    entries = _entries(model, layers, site, heads, indices)
    numbers = _checked_factors(factors, model.dtype)
    where = None if positions is None else _in_range("position", positions, texts.shape[1])
    cells = [(i, j) for i in range(len(entries)) for j, factor in enumerate(numbers) if factor != 1]
    names = [parameter_name(model, layer, site) for layer, _ in entries]
    native = natives(model)[names[0]]
    runs = [
        {names[i]: _value(native, model.config, numbers[j], entries[i][1], where, texts.shape[1])} for i, j in cells
    ]
    job = Job.checked(model, ids, runs, predictions, named=lambda one: f"factor {numbers[cells[one][1]]:g}")
    at = tuple(torch.tensor(cells, dtype=torch.int64).reshape(-1, 2).unbind(1))
    grid = Cells((len(entries), len(numbers)), at)
    chosen = tuple(layer for layer, _ in entries)
    statistics = replace(run(job, grid, max_bytes, progress), sites=_sites(chosen, len(numbers)))
    own = tuple(int(index or 0) for _, index in entries) if native.index else None
    return Sweep(texts.cpu(), statistics, site, chosen, own, native.index, numbers, where)


def _sites(layers: Sequence[int], factors: int) -> Tensor:
    """The depth at which a scale has acted, of factor 1 too: [layer, factor]."""
    return torch.tensor(layers)[:, None].expand(-1, factors) + 1


def _value(
    native: Native, config: GPT2Config, factor: float, index: int | None, positions: Sequence[int] | None, length: int
) -> float | Tensor:
    """A factor as a parameter's value: at all positions or at some, of all entries of the site's index or of one."""
    if positions is None and index is None:
        return factor
    shape, at = [1] * len(native.shape), list[Any]([slice(None)] * len(native.shape))
    if positions is not None and "position" not in native.shape:
        raise ValueError(f"positions were given with the site {native.site!r}, whose values have none.")
    if positions is not None:
        axis = native.shape.index("position")
        shape[axis], at[axis] = length, list(positions)
    if index is not None:
        shape[native.indexed_axis], at[native.indexed_axis] = native.entries(config), index
    value = torch.full(shape, native.neutral, dtype=torch.float64)
    value[tuple(at)] = factor
    return value


def _entries(
    model: GPT2, layers: Iterable[int] | None, site: str, heads: Iterable[int] | None, indices: Iterable[int] | None
) -> list[tuple[int, int | None]]:
    """Layers, each with the entries of the site's index, or None."""
    chosen = _in_range("layer", layers, model.config.n_layer)
    native = natives(model)[parameter_name(model, 0, site)]
    if heads is not None and native.index != "head":
        raise ValueError(f"heads were given with the site {site!r}, which has none.")
    if heads is not None and indices is not None:
        raise ValueError("heads and indices were both given; they are the same thing, so give one of them.")
    if native.index is None:
        if indices is not None:
            raise ValueError(f"indices were given with the site {site!r}, which has none.")
        return [(layer, None) for layer in chosen]
    of_site = _in_range(native.index, heads if indices is None else indices, native.entries(model.config))
    return [(layer, index) for layer in chosen for index in of_site]


def _checked_factors(factors: Sequence[float], dtype: torch.dtype) -> tuple[float, ...]:
    """The factors as numbers, or a ValueError for what is none, is there twice, or is 1 in the model's type."""
    if isinstance(factors, str) or not isinstance(factors, Iterable):
        example = [0.5, 2.0] if isinstance(factors, str) else [factors]
        raise ValueError(f"The factors are {factors!r}; expected several numbers, such as {example}.")
    numbers = tuple(map(float, factors))
    if not numbers or not all(map(math.isfinite, numbers)) or len(set(numbers)) < len(numbers):
        raise ValueError(f"The factors are {numbers}; expected at least one, all finite, none twice.")
    for factor, applied in zip(numbers, torch.tensor(numbers, dtype=dtype).tolist(), strict=True):
        if applied == 1 != factor:
            raise ValueError(f"The factor {factor!r} is 1 in {dtype} and changes nothing; take one farther off.")
    return numbers


def _in_range(what: str, chosen: Iterable[int] | None, count: int) -> tuple[int, ...]:
    """The chosen indices, or all; ValueError when one is out of range or chosen twice."""
    if chosen is not None and not isinstance(chosen, Iterable):
        raise ValueError(f"The {what}s are {chosen!r}; expected several, such as [{chosen!r}].")
    indices = tuple(range(count)) if chosen is None else tuple(map(operator.index, chosen))
    if not indices or len(set(indices)) < len(indices) or not all(0 <= index < count for index in indices):
        named = ", ".join(map(str, indices)) or "none"
        raise ValueError(f"The {what}s are {named}; expected different numbers from 0 to {count - 1}.")
    return indices
