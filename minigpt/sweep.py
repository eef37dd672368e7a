"""The clean run and every scaled run in one pass.

Words of this file: a cell is one scaled run, a layer (for the site `head` a layer and a head) with a
factor; an entry is one of the layers or heads studied; a place is a depth 0 .. n_layer, or `final`.

Row 0 of the batch is the clean run. When a studied block is reached, one copy of the clean row per
factor joins the batch, scaled, and all rows go on together. So every cell starts from the clean
prefix without computing it again, and each weight is read once.

Because clean and scaled rows share the prefix, "nothing changes before the site" is true here by
construction; `self_check` computes a cell of every entry in runs of its own, to show that it is true.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigpt.checkpoint import write_atomically
from minigpt.divergence import Statistics, inner_products, squared_norms
from minigpt.model import GPT2, Block
from minigpt.scales import Site, check_site, scale_name, scaled, scales_not_one

Streams = tuple[Tensor, list[tuple[int, int]]]
"""The streams at a place, [1 + cells so far, batch, position, n_embd], clean first; and the cells, each the index of
its entry and the index of its factor."""
DEFAULT_FACTORS = tuple(round(0.5 + 0.05 * step, 2) for step in range(21))
"""0.5 to 1.5 in steps of 0.05."""
JUMP_ROUNDINGS = 4
"""The jump at the site may be off by this many roundings of the parameters' type, relative to the scaled stream:
s * x is rounded once per element; the difference and its norm, always float64, add as much again for float64 models."""
CELL_ROUNDINGS = 80
"""A cell of the pass may differ from the same cell alone by this many roundings, relative (1e-5 in float32): matrix
products over another number of rows add up in another order."""


@dataclass(frozen=True)
class Sweep:
    """A grid of scaled runs beside their clean run. Axis `layer` runs over `layers` (and `heads`)."""

    site: Site
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    """The head of each entry of `layers`, for the site `head`; else None."""
    factors: tuple[float, ...]
    ids: Tensor
    """The texts: [batch, position]."""
    statistics: Statistics

    def frobenius(self, skip: int = 1) -> Tensor:
        """Norm of scaled minus clean at every depth: [layer, factor, depth, batch].

        Positions before `skip` are left out: the first token's stream is often far larger than the
        others' and would decide the sum alone. Raises ValueError when no position is left.
        """
        if not 0 <= skip < self.ids.shape[1]:
            raise ValueError(f"skip is {skip}; the text has {self.ids.shape[1]} positions, so expected 0 to one less.")
        return self.statistics.frobenius(torch.arange(self.ids.shape[1])[skip:])[:, :, :-1]

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file, whole or not at all."""
        tensors = {name: getattr(self.statistics, name).contiguous() for name in _TENSORS}
        settings = {"site": self.site, "layers": self.layers, "heads": self.heads, "factors": self.factors}
        tensors["ids"] = self.ids.cpu().contiguous()
        write_atomically(Path(path), lambda file: save_file(tensors, file, {"sweep": json.dumps(settings)}))

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Read what `save` wrote. Raises ValueError for any other file."""
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads(file.metadata()["sweep"])
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                layers, factors, heads = tuple(settings["layers"]), tuple(settings["factors"]), settings["heads"]
                return cls(
                    site=settings["site"],
                    layers=layers,
                    heads=tuple(heads) if heads is not None else None,
                    factors=factors,
                    ids=file.get_tensor("ids"),
                    statistics=Statistics(layers, **tensors),
                )
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved sweep ({error}); expected a file written by Sweep.save.") from None


_TENSORS = ("difference", "scaled", "inner", "clean")


@torch.no_grad()
def sweep(
    model: GPT2,
    ids: Tensor,
    layers: Iterable[int] | None = None,
    factors: Sequence[float] = DEFAULT_FACTORS,
    site: Site = "output",
    heads: Iterable[int] | None = None,
    progress: Callable[[Iterable[Streams]], Iterable[Streams]] = iter,
) -> Sweep:
    """Run texts once clean and once for every layer and factor, all in one pass.

    `ids` is int64 [batch, position]; `layers` (default: all) are counted from 0; `heads` (default:
    all) only matters for the site `head`, whose axis `layer` runs over layers x heads. A factor of 1
    is not run: its cells are the clean run. `progress` wraps the n_layer + 2 places as they come, as
    tqdm does.

    Raises ValueError for a layer, head or factor out of range, for a model whose scales are not 1, and when
    a stream overflows.
    """
    model.config.check_ids(ids)
    grid = _Grid.checked(model, layers, factors, site, heads)
    shape = (len(grid.layers), len(grid.factors), model.config.n_layer + 2, *ids.shape)
    difference, scaled_norm, inner = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    clean_norm = torch.zeros(shape[2:], dtype=torch.float64)
    for place, (streams, cells) in enumerate(progress(grid.run(model, ids))):
        clean = streams[0].double()
        clean_norm[place] = squared_norms(clean)
        scaled_norm[:, :, place] = inner[:, :, place] = clean_norm[place]
        for stream, (entry, factor) in zip(streams[1:], cells, strict=True):
            changed = stream.double()
            difference[entry, factor, place] = squared_norms(changed - clean)
            scaled_norm[entry, factor, place] = squared_norms(changed)
            inner[entry, factor, place] = inner_products(changed, clean)
    _check_finite(scaled_norm, grid.factors)
    statistics = Statistics(grid.layers, difference, scaled_norm, inner, clean_norm)
    return Sweep(site, grid.layers, grid.heads, grid.factors, ids.cpu(), statistics)


def _check_finite(scaled_norm: Tensor, factors: tuple[float, ...]) -> None:
    broken = (~scaled_norm.isfinite()).nonzero()
    if len(broken):
        _, factor, place = broken[broken[:, 2].argmin()][:3].tolist()
        last = scaled_norm.shape[2] - 1
        raise ValueError(
            f"The stream is no longer finite at {'the final norm' if place == last else f'depth {place}'} under factor "
            f"{factors[factor]:g}; take a smaller factor, or float64."
        )


@dataclass(frozen=True)
class _Grid:
    """The cells to run: entries of the axis `layer`, times factors."""

    site: Site
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    factors: tuple[float, ...]

    @classmethod
    def checked(
        cls,
        model: GPT2,
        layers: Iterable[int] | None,
        factors: Sequence[float],
        site: Site,
        heads: Iterable[int] | None,
    ) -> "_Grid":
        """The grid, or a ValueError that says what is out of range."""
        changed = scales_not_one(model)
        if changed:
            raise ValueError(f"The clean run needs every scale to be 1; set {', '.join(changed)} back to 1.")
        n_layer, n_head = model.config.n_layer, model.config.n_head
        chosen = _in_range("layer", layers, n_layer)
        check_site(site)
        finite = all(math.isfinite(factor) for factor in factors)
        if not factors or not finite or len(set(factors)) < len(factors):
            raise ValueError(f"The factors are {tuple(factors)}; expected at least one, all finite, none twice.")
        if site != "head":
            if heads is not None:
                raise ValueError(f"heads were given with the site {site!r}; they belong to the site 'head'.")
            return cls(site, chosen, None, tuple(map(float, factors)))
        pairs = [(layer, head) for layer in chosen for head in _in_range("head", heads, n_head)]
        of_layer, of_head = zip(*pairs, strict=True)
        return cls(site, of_layer, of_head, tuple(map(float, factors)))

    def cells_of(self, layer: int) -> list[tuple[int, int]]:
        """The cells that leave the clean run in a block."""
        entries = [i for i, studied in enumerate(self.layers) if studied == layer]
        return [(i, j) for i in entries for j, factor in enumerate(self.factors) if factor != 1]

    def run(self, model: GPT2, ids: Tensor) -> Iterator[Streams]:
        """The streams, place by place."""
        streams, cells = model.embed(ids).unsqueeze(0), list[tuple[int, int]]()
        yield streams, cells
        for layer, block in enumerate(model.blocks):
            new = self.cells_of(layer)
            streams = self._through(model, layer, streams, new) if new else _rows_through(block, streams)
            cells = cells + new
            yield streams, cells
        yield model.final_norm(streams), cells

    def _through(self, model: GPT2, layer: int, streams: Tensor, new: list[tuple[int, int]]) -> Tensor:
        """A studied block: one scaled copy of the clean row for each new cell joins the rows."""
        block, batch = model.blocks[layer], streams.shape[1]
        factors = torch.tensor([self.factors[j] for _, j in new], dtype=streams.dtype, device=streams.device)
        if self.site == "output":  # the copies can wait until the block is done
            streams = _rows_through(block, streams)
            return torch.cat([streams, factors[:, None, None, None] * streams[:1]])
        entering = torch.cat([streams, streams[:1].expand(len(new), -1, -1, -1)])
        width = 1 if self.heads is None else model.config.n_head
        scale = entering.new_ones(len(entering), batch, 1, width)
        for row, ((entry, _), factor) in enumerate(zip(new, factors, strict=True), start=len(streams)):
            scale[row, ..., 0 if self.heads is None else self.heads[entry]] = factor
        with scaled(model, {scale_name(layer, self.site): scale.flatten(0, 1)}):
            return _rows_through(block, entering)


def _rows_through(block: Block, streams: Tensor) -> Tensor:
    """A block over [rows, batch, position, n_embd]."""
    return block(streams.flatten(0, 1)).unflatten(0, streams.shape[:2])


def _in_range(what: str, chosen: Iterable[int] | None, count: int) -> tuple[int, ...]:
    """The chosen indices, or all; ValueError when one is out of range or chosen twice."""
    indices = tuple(range(count)) if chosen is None else tuple(chosen)
    if not indices or len(set(indices)) < len(indices) or not all(0 <= index < count for index in indices):
        raise ValueError(f"The {what}s are {indices}; expected different numbers from 0 to {count - 1}.")
    return indices


@dataclass(frozen=True)
class Check:
    """One of the facts that hold for any weights, tried on a finished sweep."""

    claim: str
    passed: bool
    figure: float


@dataclass(frozen=True)
class SelfCheck:
    """All the facts tried on a sweep."""

    checks: tuple[Check, ...]
    upstream: tuple[float, ...]
    """For every entry, the largest difference before its site, of a run that shares nothing with the clean one."""

    @property
    def broken(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]


@torch.no_grad()
def self_check(model: GPT2, result: Sweep) -> SelfCheck:
    """Try a sweep against what must be true whatever the weights are; nothing here trusts the shared pass.

    For every entry the cell farthest from factor 1 is computed again by `scaled` and `residuals`, in a
    run of its own.
    """
    weight = model.final_norm.weight
    ids, rounding = result.ids.to(weight.device), torch.finfo(weight.dtype).eps
    clean = model.residuals(ids)
    upstream, error = zip(*(_cell_alone(model, result, entry, ids, clean) for entry in range(len(result.layers))))  # noqa: B905
    checks = [
        _rows_scaled(result),
        *([_jump(result, weight.dtype, rounding)] if result.site == "output" else []),
        _factor_1(model, result, ids, clean),
        Check("a run of its own changes nothing upstream of its site, bit for bit", max(upstream) == 0, max(upstream)),
        Check(
            "a run of its own gives the sweep's norm at every depth",
            max(error) <= CELL_ROUNDINGS * rounding,
            max(error),
        ),
    ]
    return SelfCheck(tuple(checks), upstream)


def _at_site(result: Sweep, numbers: Tensor) -> Tensor:
    """Numbers of every cell right after its studied block: [layer, factor, batch, position]."""
    entries = torch.arange(len(result.layers))
    return numbers[entries, :, torch.tensor(result.layers) + 1]


def _rows_scaled(result: Sweep) -> Check:
    """Every position of every row of every cell, but those of factor 1, must differ at the site."""
    differs = _at_site(result, result.statistics.difference) > 0
    expected = torch.tensor([factor != 1 for factor in result.factors])[:, None, None].expand_as(differs)
    wrong = int((differs != expected).flatten(2).any(-1).sum())
    claim = f"all {int(expected[..., 0, 0].sum())} scaled rows differ at every position, and no other row"
    return Check(claim, wrong == 0, wrong)


def _jump(result: Sweep, dtype: torch.dtype, rounding: float) -> Check:
    factors = torch.tensor(result.factors, dtype=dtype).double()[:, None, None]  # as they were applied
    norm = result.statistics.clean[torch.tensor(result.layers) + 1].sqrt()[:, None]
    departure = (_at_site(result, result.statistics.difference).sqrt() - (factors - 1).abs() * norm).abs()
    error = float((departure / (norm * factors.abs().clamp_min(rounding))).max())
    return Check("the jump at the site is |s - 1| times the stream's norm", error <= JUMP_ROUNDINGS * rounding, error)


def _factor_1(model: GPT2, result: Sweep, ids: Tensor, clean: Tensor) -> Check:
    with scaled(model, {scale_name(result.layers[0], result.site): 1.0}):
        departure = float((model.residuals(ids) - clean).abs().max())
    return Check("factor 1, run by itself, is bit-identical to the clean run", departure == 0, departure)


def _cell_alone(model: GPT2, result: Sweep, entry: int, ids: Tensor, clean: Tensor) -> tuple[float, float]:
    """Largest difference upstream, and largest relative departure from the sweep's norms, of a run of its own."""
    layer, farthest = result.layers[entry], max(range(len(result.factors)), key=lambda j: abs(result.factors[j] - 1))
    scale = torch.tensor(result.factors[farthest], dtype=torch.float64)
    if result.heads is not None:
        heads = torch.ones(model.config.n_head, dtype=torch.float64)
        scale = heads.index_fill(0, torch.tensor(result.heads[entry]), result.factors[farthest])
    with scaled(model, {scale_name(layer, result.site): scale}):
        difference = model.residuals(ids).double() - clean.double()
    alone = squared_norms(difference).sum(-1).sqrt().cpu()
    in_pass = result.frobenius(skip=0)[entry, farthest]
    error = ((alone - in_pass).abs() / alone.clamp_min(torch.finfo(torch.float64).tiny)).max()
    return float(difference[: layer + 1].abs().max()), float(error)
