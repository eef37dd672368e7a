"""Many scaled runs beside their clean run, in one pass, or in as few as memory allows.

Words of this file: an entry is one of the layers (for the site `head` a layer and a head) studied; a
cell is one scaled run, an entry with a factor; a place is a depth 0 .. n_layer, or `final`.

Row 0 of the streams is the clean run. A cell joins them when its site is reached, and starts from
the clean row: for a site inside a block from the clean write, which is computed once. So no clean
block is computed twice, each weight is read once for all rows, and what is compared stood in the
same products. Only numbers per position leave a place: see `Place`.
"""

import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minigpt.model import GPT2, Attention, Block
from minigpt.scales import Site, check_site, scales_not_one

Cell = tuple[int, int]
"""The index of an entry, and the index of a factor."""
CPU_SLAB, GPU_SLAB = 1024, 65536
"""Tokens that go through a sublayer together: on a CPU few enough to stay in its cache, on a GPU enough to fill it."""
SHARE_OF_FREE_MEMORY = 0.25
"""What a sweep may take where nothing else is asked for."""


@dataclass(frozen=True)
class Grid:
    """What is to be run: entries times factors."""

    site: Site
    layers: tuple[int, ...]
    """Of every entry."""
    heads: tuple[int, ...] | None
    """Of every entry, for the site `head`; else None."""
    factors: tuple[float, ...]
    positions: tuple[int, ...] | None = None
    """The positions that alone are scaled; None for all."""

    @classmethod
    def checked(
        cls,
        model: GPT2,
        layers: Iterable[int] | None,
        factors: Sequence[float],
        site: Site,
        heads: Iterable[int] | None,
        positions: Iterable[int] | None,
        length: int,
    ) -> "Grid":
        """The grid for a model and texts of up to `length` tokens, or a ValueError that says what is out of range."""
        changed = scales_not_one(model)
        if changed:
            raise ValueError(f"The clean run needs every scale to be 1; set {', '.join(changed)} back to 1.")
        chosen = _in_range("layer", layers, model.config.n_layer)
        where = None if positions is None else _in_range("position", positions, length)
        check_site(site)
        numbers = tuple(map(float, factors))
        if not numbers or not all(map(math.isfinite, numbers)) or len(set(numbers)) < len(numbers):
            raise ValueError(f"The factors are {numbers}; expected at least one, all finite, none twice.")
        dtype = model.final_norm.weight.dtype
        for factor, applied in zip(numbers, torch.tensor(numbers, dtype=dtype).tolist(), strict=True):
            if applied == 1 != factor:
                raise ValueError(f"The factor {factor!r} is 1 in {dtype} and changes nothing; take one farther off.")
        if site != "head":
            if heads is not None:
                raise ValueError(f"heads were given with the site {site!r}; they belong to the site 'head'.")
            return cls(site, chosen, None, numbers, where)
        pairs = [(layer, head) for layer in chosen for head in _in_range("head", heads, model.config.n_head)]
        of_layer, of_head = zip(*pairs, strict=True)
        return cls(site, of_layer, of_head, numbers, where)

    @property
    def entries(self) -> range:
        """The indices of the entries."""
        return range(len(self.layers))

    def cells(self) -> list[Cell]:
        """The cells that need a run, in the order in which they join: factor 1 is the clean run itself."""
        entries = sorted(self.entries, key=self.layers.__getitem__)
        return [(i, j) for i in entries for j, factor in enumerate(self.factors) if factor != 1]


def _in_range(what: str, chosen: Iterable[int] | None, count: int) -> tuple[int, ...]:
    """The chosen indices, or all; ValueError when one is out of range or chosen twice."""
    indices = tuple(range(count)) if chosen is None else tuple(map(operator.index, chosen))
    if not indices or len(set(indices)) < len(indices) or not all(0 <= index < count for index in indices):
        raise ValueError(f"The {what}s are {indices}; expected different numbers from 0 to {count - 1}.")
    return indices


@dataclass(frozen=True)
class Place:
    """What leaves a pass at one place: numbers per position, float64."""

    texts: slice
    """Which of the texts went through this pass."""
    index: int
    """A depth, or n_layer + 1 for `final`."""
    cells: Sequence[Cell]
    """The cells that have joined."""
    difference: Tensor
    """Squared norm of scaled minus clean: [cell, batch, position]."""
    scaled: Tensor
    """Squared norm of the scaled stream, same axes."""
    inner: Tensor
    """Inner product of the scaled and the clean stream, same axes."""
    clean: Tensor
    """Squared norm of the clean stream: [batch, position]."""


@dataclass(frozen=True)
class Pass:
    """A clean run of some texts, and some cells of the grid beside it."""

    model: GPT2
    grid: Grid
    texts: slice
    ids: Tensor
    """Their tokens: [batch, position]."""
    cells: Sequence[Cell]

    @torch.no_grad()
    def places(self) -> Iterator[Place]:
        """Run, and yield the numbers of every place, from depth 0 to `final`."""
        model, weight = self.model, self.model.final_norm.weight
        shape = (1 + len(self.cells), *self.ids.shape, model.config.n_embd)
        streams = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        streams[0] = model.embed(self.ids)
        begun, scratch = 1, self._scratch()
        yield self._place(0, streams[:begun], scratch)
        for layer, block in enumerate(model.blocks):
            new = [cell for cell in self.cells if self.grid.layers[cell[0]] == layer]
            end = begun + len(new)
            self._attend(block, streams[:begun], streams[begun:end], new)
            begun = end if self.grid.site in ("attention", "head") else begun
            self._transform(block, streams[:begun], streams[begun:end], new)
            begun = end
            yield self._place(layer + 1, streams[:begun], scratch)
        yield self._place(len(model.blocks) + 1, streams, scratch, model.final_norm)

    def _attend(self, block: Block, streams: Tensor, joining: Tensor, new: Sequence[Cell]) -> None:
        """u = x + attention(norm(x)), in place; cells of the sites `attention` and `head` join at u."""
        attention = block.attention
        # Last slab first: the clean row's comes at the end, and what it computed is what the new cells start from.
        for slab in reversed(self._slabs(streams)):
            z = attention.mix(block.attention_norm(slab.flatten(0, 1)))
            write = attention.projection(z.flatten(2)).view_as(slab)
            x = slab[0].clone()
            slab.add_(write)
        if self.grid.site == "attention":
            self._join(joining, new, dict.fromkeys(self.grid.entries, write[0]), x)
        if self.grid.site == "head":
            self._join(joining, new, self._head_writes(attention, z[: len(x)], new), slab[0], less=1)

    def _transform(self, block: Block, streams: Tensor, joining: Tensor, new: Sequence[Cell]) -> None:
        """y = u + mlp(norm(u)), in place; cells of the sites `mlp` and `output` join at y."""
        for slab in reversed(self._slabs(streams)):  # the clean row's at the end, as above
            write = block.mlp(block.mlp_norm(slab.flatten(0, 1))).view_as(slab)
            u = slab[0].clone()
            slab.add_(write)
        if self.grid.site == "mlp":
            self._join(joining, new, dict.fromkeys(self.grid.entries, write[0]), u)
        if self.grid.site == "output":
            self._join(joining, new, dict.fromkeys(self.grid.entries, slab[0]), 0)

    def _join(
        self, rows: Tensor, cells: Sequence[Cell], parts: Mapping[int, Tensor], rest: Tensor | float, less: int = 0
    ) -> None:
        """Fill the rows of new cells: the rest of the clean stream plus (factor - less) times the entry's part."""
        for row, (entry, factor) in zip(rows, cells, strict=True):
            torch.mul(parts[entry], self._multipliers[factor] - less, out=row).add_(rest)

    def _head_writes(self, attention: Attention, z: Tensor, new: Sequence[Cell]) -> dict[int, Tensor]:
        """What the head of each new entry writes, of z [batch, position, n_head, head_width], by entry."""
        columns = attention.projection.weight.unflatten(1, (attention.n_head, -1))
        heads = {entry: self.grid.heads[entry] for entry, _ in new} if self.grid.heads else {}
        return {entry: z[:, :, head] @ columns[:, head].T for entry, head in heads.items()}

    @cached_property
    def _multipliers(self) -> Tensor:
        """Every factor, as a column that multiplies a stream: [factor, 1 or position, 1]."""
        streams = self.model.final_norm.weight
        factors = torch.tensor(self.grid.factors, dtype=streams.dtype, device=streams.device)[:, None, None]
        if self.grid.positions is None:
            return factors
        at = [position for position in self.grid.positions if position < self.ids.shape[1]]
        only = torch.ones_like(factors).repeat(1, self.ids.shape[1], 1)
        only[:, at] = factors
        return only

    def _slabs(self, streams: Tensor) -> Sequence[Tensor]:
        """The rows in slabs that go through a sublayer together."""
        return streams.split(_rows_of_slab(self.ids.numel(), streams.device))

    def _place(
        self, index: int, streams: Tensor, scratch: Tensor, norm: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Place:
        """The numbers per position of the streams, normed first where it is asked for."""
        clean = norm(streams[0]).double()
        numbers = torch.empty(len(streams), 3, *self.ids.shape, dtype=torch.float64, device=streams.device)
        for slab, into in zip(self._slabs(streams), self._slabs(numbers), strict=True):
            x, y = scratch[:, : len(slab)]
            x.copy_(norm(slab))
            torch.sum(torch.sub(x, clean, out=y).square_(), -1, out=into[:, 0])
            torch.sum(torch.mul(x, clean, out=y), -1, out=into[:, 2])
            torch.sum(x.square_(), -1, out=into[:, 1])
        difference, scaled, inner = numbers[1:].cpu().unbind(1)
        cells = self.cells[: len(difference)]
        return Place(self.texts, index, cells, difference, scaled, inner, numbers[0, 1].cpu())

    def _scratch(self) -> Tensor:
        """Room for a slab in float64, twice: new memory for every slab would cost more than the sums."""
        rows = min(1 + len(self.cells), _rows_of_slab(self.ids.numel(), self.ids.device))
        shape = (2, rows, *self.ids.shape, self.model.config.n_embd)
        return torch.empty(shape, dtype=torch.float64, device=self.ids.device)


def plan(model: GPT2, grid: Grid, ids: Tensor, lengths: Tensor, max_bytes: int | None) -> list[Pass]:
    """The passes that run every cell on every text, each within `max_bytes` (default: a share of what is free).

    Texts are split before cells are, for every pass runs its texts clean. Raises ValueError when one text with
    one cell needs more.
    """
    device = model.final_norm.weight.device
    allowed = int(free_bytes(device) * SHARE_OF_FREE_MEMORY) if max_bytes is None else max_bytes
    cells, length = grid.cells(), ids.shape[1]

    def fits(texts: int, rows: int) -> bool:
        return estimate_bytes(model, grid, texts, length, rows) <= allowed

    most = min(len(ids), max(1, _slab_tokens(device) // length))
    texts = next((texts for texts in range(most, 1, -1) if fits(texts, 1 + len(cells))), 1)
    rows = next((rows for rows in range(1 + len(cells), 1, -1) if fits(texts, rows)), 1)
    if not fits(texts, rows) or (cells and rows == 1):
        needed = estimate_bytes(model, grid, 1, length, min(2, 1 + len(cells)))
        what = "max_bytes is" if max_bytes is not None else "A quarter of the memory that is free is"
        raise ValueError(
            f"{what} {allowed}; one text of {length} tokens with one scaled run beside it takes {needed}. "
            "Give more with max_bytes, or a shorter text."
        )
    per_pass = math.ceil(len(cells) / math.ceil(len(cells) / (rows - 1))) if cells else 1
    return [
        Pass(model, grid, chosen, ids[chosen, : int(lengths[chosen].max())].to(device), cells[start : start + per_pass])
        for chosen in (slice(first, min(first + texts, len(ids))) for first in range(0, len(ids), texts))
        for start in range(0, max(1, len(cells)), per_pass)
    ]


def estimate_bytes(model: GPT2, grid: Grid, texts: int, positions: int, rows: int) -> int:
    """What a pass of so many rows takes at its peak, the model itself left out.

    The streams of all rows; of one slab the activations, and its float64 copies; the numbers per position; and
    what oneDNN takes to rearrange a weight. Memory that one sublayer frees does not always serve the next, so
    both count.
    """
    config, weight = model.config, model.final_norm.weight
    tokens = texts * positions
    slab = min(rows, _rows_of_slab(tokens, weight.device)) * tokens
    attention = 8 * config.n_embd  # norm; queries, keys, values; mixed; scaled; write; a copy of the clean row
    mlp = 3 * config.n_embd + 2 * config.mlp_width  # norm; before and after the activation; write; the copy
    heads = tokens * config.n_embd * (config.n_head if grid.heads else 0)
    streams = rows * tokens * config.n_embd
    rearranged = config.n_embd * max(config.mlp_width, 3 * config.n_embd)
    in_float64 = 2 * slab * config.n_embd + tokens * config.n_embd + 2 * rows * tokens * 3
    return (streams + slab * (attention + mlp) + heads + rearranged) * weight.itemsize + in_float64 * 8


def _rows_of_slab(tokens: int, device: torch.device) -> int:
    """How many rows of so many tokens go through a sublayer together."""
    return max(1, _slab_tokens(device) // tokens)


def _slab_tokens(device: torch.device) -> int:
    return CPU_SLAB if device.type == "cpu" else GPU_SLAB


def free_bytes(device: torch.device) -> int:
    """Memory that a new computation may take: of the GPU, or of the machine and of the container it may run in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * next(int(row.split()[1]) for row in rows if row.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of what is there
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        details = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    files = int(details.get("inactive_file", 0))  # cached, and given up when memory is asked for
    return min(free, max(0, limit - used + files))
