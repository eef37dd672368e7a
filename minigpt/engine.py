"""Many scaled runs beside their clean run, in one pass, or in as few as memory allows.

Words of this file: an entry is one of the layers (for the site `head` a layer and a head) studied; a
cell is one scaled run, an entry with a factor; a place is a depth 0 .. n_layer, or `final`.

Row 0 of the streams is the clean run. A cell joins them when its site is reached, and starts from
the clean row: for a site inside a block from the clean write, which is computed once. So no clean
block is computed twice, and each weight is read once for as many rows as fit the processor's cache.
Only numbers per position leave a place: see `Place`.
"""

import logging
import math
import operator
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minigpt.measures import WRITTEN
from minigpt.model import GPT2, Attention, Block
from minigpt.parameters import not_neutral, parameter_name
from minigpt.predictions import Predictions, predict, prediction_numbers

logger = logging.getLogger("minigpt")
Cell = tuple[int, int]
"""The index of an entry, and the index of a factor."""
CPU_SLAB, GPU_SLAB = 1024, 65536
"""Tokens that go through a block together: on a CPU few enough to stay in its cache, on a GPU enough to fill it."""
SLABS_AT_ONCE = 4
"""Of runs that cannot share a prefix."""
SHARE_OF_FREE_MEMORY = 0.25
"""What a sweep may take where nothing else is asked for."""


@dataclass(frozen=True)
class Grid:
    """What is to be run: entries times factors."""

    site: str
    layers: tuple[int, ...]
    """Of every entry."""
    heads: tuple[int, ...] | None
    """Of every entry, for the site `head`; else None."""
    factors: tuple[float, ...]
    positions: tuple[int, ...] | None = None
    """The positions that alone are scaled; None for all."""
    predictions: bool = False
    """Whether the next-token distributions are compared, which takes the unembedding."""

    @classmethod
    def checked(
        cls,
        model: GPT2,
        layers: Iterable[int] | None,
        factors: Sequence[float],
        site: str,
        heads: Iterable[int] | None,
        positions: Iterable[int] | None,
        length: int,
        predictions: bool = False,
    ) -> "Grid":
        """The grid for a model and texts of up to `length` tokens, or a ValueError that says what is out of range."""
        changed = not_neutral(model)
        if changed:
            raise ValueError(f"The clean run needs every scale to be 1; set {', '.join(changed)} back to 1.")
        chosen = _in_range("layer", layers, model.config.n_layer)
        where = None if positions is None else _in_range("position", positions, length)
        parameter_name(model, 0, site)
        numbers = tuple(map(float, factors))
        if not numbers or not all(map(math.isfinite, numbers)) or len(set(numbers)) < len(numbers):
            raise ValueError(f"The factors are {numbers}; expected at least one, all finite, none twice.")
        dtype = model.dtype
        for factor, applied in zip(numbers, torch.tensor(numbers, dtype=dtype).tolist(), strict=True):
            if applied == 1 != factor:
                raise ValueError(f"The factor {factor!r} is 1 in {dtype} and changes nothing; take one farther off.")
        if site != "head":
            if heads is not None:
                raise ValueError(f"heads were given with the site {site!r}; they belong to the site 'head'.")
            return cls(site, chosen, None, numbers, where, predictions)
        pairs = [(layer, head) for layer in chosen for head in _in_range("head", heads, model.config.n_head)]
        of_layer, of_head = zip(*pairs, strict=True)
        return cls(site, of_layer, of_head, numbers, where, predictions)

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
    written: Tensor
    """At depth d + 1, what block d wrote otherwise than in the clean run, the numbers that `WRITTEN` names: [number,
    cell, batch, position]. Zero up to the cell's site, at depth 0 and at `final`."""
    predictions: Predictions | None = None
    """At `final`, where they are asked for: rows are the clean run and then the cells."""


@dataclass(frozen=True)
class CleanBlock:
    """What a block made of the clean run, [batch, position, n_embd] each: what new cells start from."""

    x: Tensor
    """The stream before the block, float64 as `u` and `y`."""
    u: Tensor
    """After attention has written."""
    y: Tensor
    """After the MLP has written."""
    attention: Tensor
    mlp: Tensor
    """What they wrote."""
    z: Tensor
    """What every head mixed: [batch, position, n_head, head_width]."""


@dataclass(frozen=True)
class Pass:
    """A clean run of some texts, and some cells of the grid beside it."""

    model: GPT2
    grid: Grid
    texts: slice
    ids: Tensor
    """Their tokens: [batch, position]."""
    cells: Sequence[Cell]
    lengths: Tensor
    """How many tokens each text has: [batch]."""

    @torch.no_grad()
    def places(self) -> Iterator[Place]:
        """Run, and yield the numbers of every place, from depth 0 to `final`."""
        model, weight = self.model, self.model
        shape = (1 + len(self.cells), *self.ids.shape, model.config.n_embd)
        streams = torch.empty(shape, dtype=model.dtype, device=model.device)
        streams[0] = model.embed(self.ids)
        begun, scratch = 1, self._scratch()
        yield self._place(0, streams[:begun], scratch)
        for layer, block in enumerate(model.blocks):
            new = [cell for cell in self.cells if self.grid.layers[cell[0]] == layer]
            written = self._run_block(block, streams[:begun], streams[begun : begun + len(new)], new, scratch)
            begun += len(new)
            yield self._place(layer + 1, streams[:begun], scratch, written=written)
        last = len(model.blocks) + 1
        yield self._place(last, streams, scratch, model.final_norm, predictions=self._predict(streams))

    def halves(self) -> list["Pass"]:
        """The same cells on the same texts in two passes. Raises ValueError when there is one of each."""
        if len(self.cells) > 1:
            half = len(self.cells) // 2
            return [replace(self, cells=cells) for cells in (self.cells[:half], self.cells[half:])]
        if len(self.ids) == 1:
            raise ValueError(f"The memory is too little for one scaled run of {self.ids.shape[1]} tokens; shorten it.")
        half, first, last = len(self.ids) // 2, self.texts.start, self.texts.stop
        return [
            replace(self, texts=slice(first, first + half), ids=self.ids[:half], lengths=self.lengths[:half]),
            replace(self, texts=slice(first + half, last), ids=self.ids[half:], lengths=self.lengths[half:]),
        ]

    def _run_block(
        self, block: Block, streams: Tensor, joining: Tensor, new: Sequence[Cell], scratch: Tensor
    ) -> Tensor:
        """u = x + attention(norm(x)); y = u + mlp(norm(u)); in place, slab by slab, and then new cells join.

        Returns the numbers that `WRITTEN` names, of all cells: [number, cell, batch, position].
        """
        shape = (1 + len(self.cells), len(WRITTEN), *self.ids.shape)
        numbers = torch.zeros(shape, dtype=torch.float64, device=streams.device)
        clean: CleanBlock | None = None
        for slab, into in zip(self._slabs(streams), self._slabs(numbers[: len(streams)]), strict=True):
            carried, by_attention, by_mlp, product = scratch[:, : len(slab)]
            carried.copy_(slab)
            z = block.attention.mix(block.attention_norm(slab.flatten(0, 1)))
            attention = block.attention.projection(z.flatten(2)).view_as(slab)
            by_attention.copy_(slab.add_(attention))
            mlp = block.mlp(block.mlp_norm(slab.flatten(0, 1))).view_as(slab)
            by_mlp.copy_(slab.add_(mlp))
            if clean is None:  # the first slab holds the clean row, which everything else is compared with
                rows = (carried, by_attention, by_mlp, attention, mlp)
                x, u, y, attention_row, mlp_row = (row[0].clone() for row in rows)
                clean = CleanBlock(x, u, y, attention_row, mlp_row, z[: self.ids.shape[0]].clone())
            by_mlp.sub_(clean.y).sub_(by_attention.sub_(clean.u))
            by_attention.sub_(carried.sub_(clean.x))
            _written(carried, by_attention, by_mlp, product, into)
        if clean is not None and new:
            self._start(block, joining, new, clean)
        return numbers[1:].transpose(0, 1)

    def _start(self, block: Block, joining: Tensor, new: Sequence[Cell], clean: "CleanBlock") -> None:
        """Fill the rows of new cells, which leave the clean run at this block's site."""
        entries, site = self.grid.entries, self.grid.site
        x, u, y = (stream.to(joining.dtype) for stream in (clean.x, clean.u, clean.y))
        if site == "output":
            self._join(joining, new, dict.fromkeys(entries, y), 0)
        elif site == "mlp":
            self._join(joining, new, dict.fromkeys(entries, clean.mlp), u)
        else:
            if site == "attention":
                self._join(joining, new, dict.fromkeys(entries, clean.attention), x)
            else:
                self._join(joining, new, self._head_writes(block.attention, clean.z, new), u, less=1)
            for slab in self._slabs(joining):
                slab.add_(block.mlp(block.mlp_norm(slab.flatten(0, 1))).view_as(slab))

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
        streams = self.model
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
        self,
        index: int,
        streams: Tensor,
        scratch: Tensor,
        norm: Callable[[Tensor], Tensor] = lambda x: x,
        written: Tensor | None = None,
        predictions: Predictions | None = None,
    ) -> Place:
        """The numbers per position of the streams, normed first where it is asked for."""
        clean = norm(streams[0]).double()
        numbers = torch.empty(len(streams), 3, *self.ids.shape, dtype=torch.float64, device=streams.device)
        for slab, into in zip(self._slabs(streams), self._slabs(numbers), strict=True):
            x, y = scratch[:2, : len(slab)]
            x.copy_(norm(slab))
            torch.sum(torch.sub(x, clean, out=y).square_(), -1, out=into[:, 0])
            torch.sum(torch.mul(x, clean, out=y), -1, out=into[:, 2])
            torch.sum(x.square_(), -1, out=into[:, 1])
        difference, scaled, inner = numbers[1:].cpu().unbind(1)
        cells = self.cells[: len(difference)]
        if written is None:
            written = torch.zeros(len(WRITTEN), len(cells), *self.ids.shape, dtype=torch.float64)
        written = written[:, : len(cells)].cpu()
        return Place(self.texts, index, cells, difference, scaled, inner, numbers[0, 1].cpu(), written, predictions)

    def _predict(self, streams: Tensor) -> Predictions | None:
        if not self.grid.predictions:
            return None
        return predict(self.model.unembed, self.model.final_norm, streams, self.ids, self.lengths)

    def _scratch(self) -> Tensor:
        """Room for a slab in float64, four times: new memory for every slab would cost more than the sums."""
        rows = min(1 + len(self.cells), _rows_of_slab(self.ids.numel(), self.ids.device))
        shape = (4, rows, *self.ids.shape, self.model.config.n_embd)
        return torch.empty(shape, dtype=torch.float64, device=self.ids.device)


def _written(carried: Tensor, by_attention: Tensor, by_mlp: Tensor, product: Tensor, into: Tensor) -> None:
    """The inner products that `WRITTEN` names, of differences of streams: [row, batch, position, n_embd], float64."""
    pairs = {
        "attention_written": (by_attention, by_attention),
        "mlp_written": (by_mlp, by_mlp),
        "parts_inner": (by_attention, by_mlp),
        "attention_carried": (carried, by_attention),
        "mlp_carried": (carried, by_mlp),
    }
    for index, name in enumerate(WRITTEN):
        torch.sum(torch.mul(*pairs[name], out=product), -1, out=into[:, index])


def plan(model: GPT2, grid: Grid, ids: Tensor, lengths: Tensor, max_bytes: int | None) -> list[Pass]:
    """The passes that run every cell on every text, each within `max_bytes` (default: a share of what is free).

    Texts are split before cells are, for every pass runs its texts clean. Raises ValueError when one text with
    one cell needs more.
    """
    device = model.device
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
        Pass(
            model,
            grid,
            chosen,
            ids[chosen, : int(lengths[chosen].max())].to(device),
            cells[start : start + per_pass],
            lengths[chosen],
        )
        for chosen in (slice(first, min(first + texts, len(ids))) for first in range(0, len(ids), texts))
        for start in range(0, max(1, len(cells)), per_pass)
    ]


def run_passes(passes: Sequence[Pass]) -> Iterator[Place]:
    """The places of all passes. One that runs out of memory is halved and repeated, and a warning is logged.

    Places that it had yielded come again. Raises ValueError when one scaled run of one text is too much.
    """
    waiting = list(reversed(passes))
    while waiting:
        part = waiting.pop()
        if not (yield from _whole(part)):
            waiting += reversed(part.halves())  # out here the failed pass's tensors are gone
            logger.warning(
                "Out of memory with %d scaled runs of %d texts beside the clean run; they are halved and run again.",
                len(part.cells),
                len(part.ids),
            )


def _whole(part: Pass) -> Generator[Place, None, bool]:
    """The places of a pass; returns whether the memory was enough for them."""
    try:
        yield from part.places()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA has a RuntimeError of its own for it, CPUs have only words."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


def estimate_bytes(model: GPT2, grid: Grid, texts: int, positions: int, rows: int) -> int:
    """What a pass of so many rows takes at its peak, the model itself left out.

    The streams of all rows; of one slab the activations, and its float64 copies; the numbers per position; and
    what oneDNN takes to rearrange a weight. Memory that one sublayer frees does not always serve the next, so
    both count.
    """
    config = model.config
    tokens = texts * positions
    slab = min(rows, _rows_of_slab(tokens, model.device)) * tokens
    attention = 8 * config.n_embd  # norm; queries, keys, values; mixed; scaled; write; a copy of the clean row
    mlp = 3 * config.n_embd + 2 * config.mlp_width  # norm; before and after the activation; write; the copy
    heads = tokens * config.n_embd * (config.n_head if grid.heads else 0)
    streams = rows * tokens * config.n_embd
    rearranged = config.n_embd * max(config.mlp_width, 3 * config.n_embd)
    in_float64 = 4 * slab * config.n_embd + 4 * tokens * config.n_embd + 2 * rows * tokens * (3 + len(WRITTEN))
    in_float64 += prediction_numbers(rows, tokens, config.vocab_size) if grid.predictions else 0
    return (streams + slab * (attention + mlp) + heads + rearranged) * model.dtype.itemsize + in_float64 * 8


def _rows_of_slab(tokens: int, device: torch.device) -> int:
    """How many rows of so many tokens go through a sublayer together."""
    return max(1, _slab_tokens(device) // tokens)


def rows_at_once(model: GPT2, tokens: int, max_bytes: int | None, least: int = 1, streams: int = 1) -> int:
    """How many rows of so many tokens go through a whole model together, `least` or more, within `max_bytes`.

    `streams` is 2 where every number comes with its derivative. Raises ValueError when `least` rows need more.
    """
    config = model.config
    row = (
        tokens * (11 * config.n_embd + 2 * config.mlp_width) * model.dtype.itemsize * streams
        + tokens * 6 * config.n_embd * 8
    )
    if max_bytes is not None and least * row > max_bytes:
        raise ValueError(
            f"max_bytes is {max_bytes}; {least} runs of {tokens} tokens take {least * row}. "
            "Give more with max_bytes, or fewer or shorter texts."
        )
    # A few slabs: a batch has a clean row of its own, which would otherwise be half of it.
    wanted = max(least, SLABS_AT_ONCE * _slab_tokens(model.device) // tokens)
    return wanted if max_bytes is None else min(wanted, max_bytes // row)


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
