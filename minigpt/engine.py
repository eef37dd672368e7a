"""Many runs beside their clean run, through the model's own blocks, in as few passes as memory allows.

A run is a dict of native parameters, as `scaled` takes it. It leaves the clean run at the first block that it names.
That block gets the clean row once for each run that leaves there, with these runs' values, [run, 1, 1], and what it
computes of the clean row alone is remembered. So no clean block is computed twice, and each weight is read once for as
many rows as fit the processor's cache. The block's equations stand in its `forward` alone; what its sublayers write is
read there, by hooks.

Words of this file: streams are [row, batch, position, n_embd], row 0 of the first slab is the clean run; a slab is the
rows that go through a block together; a place is a depth 0 .. n_layer, or `final`. Only numbers per position leave a
place: see `Place`.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pad_sequence

from minigpt.measures import WRITERS, Statistics, inner_products, squared_norms
from minigpt.model import GPT2, Block
from minigpt.parameters import Values, assigned, block_of, check_clean, fit, natives
from minigpt.predictions import Predictions, predict, prediction_numbers

logger = logging.getLogger("minigpt")
CPU_SLAB, GPU_SLAB = 1024, 65536
"""Tokens that go through a block together: on a CPU few enough to stay in its cache, on a GPU enough to fill it."""
MALLOC_KEEPS = 2**25 - 2**16
"""Bytes. The C library gives freed memory back, and every page of it costs again when it is next used. Having freed
a piece of almost 32 MiB it keeps twice as much (mallopt(3), M_MMAP_THRESHOLD: the threshold adjusts itself)."""
SHARE_OF_FREE_MEMORY = 0.25
"""What a computation may take where nothing else is asked for."""
SQUARES = ("difference_sq", "run_sq", "inner")
"""What is kept of every row at every place, as `Statistics` has it."""
Progress = Callable[[Iterable["Place"], int], Iterable["Place"]]
"""Wraps the places of all passes as they come; the number says how many there will be."""
Norm = Callable[[Tensor], Tensor]
Predict = Callable[[GPT2, Tensor, Tensor, Tensor], Predictions]
"""Streams at the last depth, their ids and lengths -> what is kept of the predictions: [row, batch, position]."""


@dataclass(frozen=True)
class Job:
    """What is to be run, and what is kept of it."""

    model: GPT2
    ids: Tensor
    """Padded on the right: [batch, position]."""
    lengths: Tensor
    """How many tokens each text has: [batch]."""
    runs: Sequence[Mapping[str, Tensor]]
    predict: Predict | None = None
    """What reads the last depth, where predictions are asked for."""
    tangents: bool = False
    """Whether the values are dual numbers, and a run's tangent stands in the place of its difference."""
    steps: bool = False
    """Whether the norm of what every block adds is kept."""
    neutral: Mapping[str, Tensor] = field(default_factory=dict)
    """The neutral value of every parameter that a run names."""

    @classmethod
    def checked(
        cls,
        model: GPT2,
        texts: Tensor | Sequence[Sequence[int]],
        runs: Sequence[Values],
        predictions: bool | Predict = False,
        *,
        tangents: bool = False,
        steps: bool = False,
    ) -> "Job":
        """Texts and runs that fit a clean model, or a ValueError that says what does not."""
        check_clean(model)
        ids, lengths = padded(texts)
        model.config.check_ids(ids)
        fitting, declared = fit(model, runs), natives(model)
        for name, value in (item for run in fitting for item in run.items()):
            if block_of(name) < 0:
                raise ValueError(f"{name} acts before the blocks; only `scaled` takes it.")
            _check_axes(name, value, declared[name].shape, ids)
        names = {name for run in fitting for name in run}
        neutral = {
            name: torch.full((1,) * len(declared[name].shape), declared[name].neutral, dtype=model.dtype).to(
                model.device
            )
            for name in names
        }
        predict = predict_logits if predictions is True else predictions or None
        return cls(model, ids, lengths, fitting, predict, tangents, steps, neutral)

    @property
    def count(self) -> int:
        """How many places there are."""
        return len(self.model.blocks) + 2


def predict_logits(model: GPT2, streams: Tensor, ids: Tensor, lengths: Tensor) -> Predictions:
    """Every row's next-token distributions beside row 0's."""
    return predict(model.unembed, model.final_norm, streams, ids, lengths)


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


def _check_axes(name: str, value: Tensor, words: Sequence[str], ids: Tensor) -> None:
    """Raise ValueError where a value has another number of texts or positions than there are."""
    found = (1,) * (len(words) - value.ndim) + tuple(value.shape)
    if found[0] not in (1, ids.shape[0]) or found[1] not in (1, ids.shape[1]):
        raise ValueError(
            f"{name} has a value of shape {list(value.shape)}; expected a number, or 1 or {ids.shape[0]} texts by 1 or "
            f"{ids.shape[1]} positions: [{', '.join(words)}]."
        )


@dataclass(frozen=True)
class Place:
    """What leaves a pass at one place: numbers per position, on the CPU."""

    texts: slice
    """Which of the texts went through this pass."""
    index: int
    """A depth, or n_layer + 1 for `final`."""
    runs: Sequence[int]
    """The runs that have left the clean one."""
    numbers: Mapping[str, Tensor]
    """Of the clean run and then of those runs, as `Statistics` has them: [row, ..., batch, position]. What a block
    wrote is there only of the runs that left before it."""
    predictions: Predictions | None = None
    """At `final`, where they are asked for: rows are the clean run and then the runs."""


@dataclass(frozen=True)
class Pass:
    """A clean run of some texts, and some of the runs beside it."""

    job: Job
    texts: slice
    ids: Tensor
    lengths: Tensor
    runs: Sequence[int]
    """In the order in which they leave the clean run."""

    @torch.no_grad()  # which stops backward derivatives only
    def places(self) -> Iterator[Place]:
        """Run, and yield the numbers of every place, from depth 0 to `final`."""
        model, predict, gone = self.job.model, self.job.predict, 0
        streams = torch.zeros(1 + len(self.runs), *self.ids.shape, model.config.n_embd, dtype=model.dtype).to(
            model.device
        )
        if self.job.tangents:
            streams = forward_ad.make_dual(streams, torch.zeros_like(streams))
        streams[0] = model.embed(self.ids)
        yield self._place(0, streams[:1])
        for layer, block in enumerate(model.blocks):
            new = [run for run in self.runs if _leaves_at(self.job.runs[run]) == layer]
            here, gone = 1 + gone, gone + len(new)
            found = self._through(layer, block, streams[:here], streams[here : 1 + gone], new)
            yield self._place(layer + 1, streams[: 1 + gone], found=found)
        predictions = predict(model, streams, self.ids, self.lengths) if predict else None
        yield self._place(len(model.blocks) + 1, streams, model.final_norm, predictions=predictions)

    def halves(self) -> list["Pass"]:
        """The same runs on the same texts in two passes. Raises ValueError when there is one of each."""
        if len(self.runs) > 1:
            half = len(self.runs) // 2
            return [replace(self, runs=runs) for runs in (self.runs[:half], self.runs[half:])]
        if len(self.ids) == 1:
            raise ValueError(f"The memory is too little for one run of {self.ids.shape[1]} tokens; shorten it.")
        half, first, last = len(self.ids) // 2, self.texts.start, self.texts.stop
        return [
            replace(self, texts=slice(first, first + half), ids=self.ids[:half], lengths=self.lengths[:half]),
            replace(self, texts=slice(first + half, last), ids=self.ids[half:], lengths=self.lengths[half:]),
        ]

    def _through(
        self, layer: int, block: Block, streams: Tensor, joining: Tensor, new: Sequence[int]
    ) -> dict[str, Tensor]:
        """Bring the streams through a block, in place, and let new runs leave the clean one in it.

        Returns what the block wrote and added, by the names that `Statistics` has for it.
        """
        memory = CleanLeaves(block, len(self.ids)) if new and not self.job.tangents else None
        runs: list[int | None] = [None, *self.runs[: len(streams) - 1]]
        written, steps, clean = list[Tensor](), list[Tensor](), None
        for start, slab in self._slabs(streams):
            values = self._values(layer, runs[start : start + len(slab)])
            with _observed(block) as writes, memory.recorded() if memory and clean is None else nullcontext():
                out = _call(block, slab, values)
            parts = {
                part: _write(found, values.get(f"{part}_scale"), slab)
                for part, found in writes.items()
                if all(of.numel() == slab.numel() for of in found)
            }
            clean = clean or Clean.of(slab, out, parts)
            parts = {part: parts[part] for part in clean.writes}
            written.append(self._written(clean, slab, out, parts))
            steps += [squared_norms(out - slab)] if self.job.steps else []
            slab.copy_(out)
        if new and clean:
            self._leave(layer, block, clean.before, joining, new, memory)
            steps += [squared_norms(joining - clean.before)] if self.job.steps else []
        return {name: torch.cat(found).double() for name, found in (("written", written), ("steps_sq", steps)) if found}

    def _leave(
        self, layer: int, block: Block, x: Tensor, joining: Tensor, new: Sequence[int], memory: "CleanLeaves | None"
    ) -> None:
        """Fill the streams of runs that leave the clean one at this block, of the clean stream x before it.

        Text by text: as many views of its clean row as there are runs, and values [run, 1, 1]. Leaves that are given
        the clean row alone remember what they made of it.
        """
        at_once = max(1, _slab_tokens(x.device) // x.shape[1])
        for start in range(0, len(new), at_once):
            rows, values = joining[start : start + at_once], self._values(layer, new[start : start + at_once])
            for text in range(len(x)):
                own = {name: value[:, min(text, value.shape[1] - 1)] for name, value in values.items()}
                with memory.recalled(text) if memory else nullcontext(), assigned(block, own):
                    rows[:, text] = block(x[text].expand(len(rows), *x.shape[1:]))

    def _slabs(self, streams: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The rows in slabs that go through a block together, each with the number of its first row."""
        return ((start, streams[start : start + self._rows]) for start in range(0, len(streams), self._rows))

    @property
    def _rows(self) -> int:
        """How many rows go through a block together."""
        return max(1, _slab_tokens(self.ids.device) // self.ids.numel())

    def _values(self, layer: int, runs: Sequence[int | None]) -> dict[str, Tensor]:
        """Name in the block -> values of some rows (None is the clean run), neutral where a run does not name it.

        [row, text or 1, position or 1, ...]; empty where none of the runs names a parameter of the block.
        """
        prefix = f"blocks.{layer}."
        given = [{} if run is None else self.job.runs[run] for run in runs]
        found = dict[str, Tensor]()
        for name in dict.fromkeys(name for run in given for name in run if name.startswith(prefix)):
            neutral = self.job.neutral[name]
            rows = [self._cut(run.get(name, neutral), neutral.ndim) for run in given]
            found[name.removeprefix(prefix)] = torch.stack(torch.broadcast_tensors(*rows))
        return found

    def _cut(self, value: Tensor, axes: int) -> Tensor:
        """A value as [text or 1, position or 1, ...], of the texts and positions of this pass."""
        value = value.reshape((1,) * (axes - value.ndim) + tuple(value.shape))
        value = value[self.texts] if value.shape[0] > 1 else value
        return value[:, : self.ids.shape[1]] if value.shape[1] > 1 else value

    def _difference(self, x: Tensor, clean: Tensor) -> Tensor:
        """What of x is not the clean one, or its tangent."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if not self.job.tangents:
            return x.to(wide) - clean.to(wide)
        tangent = forward_ad.unpack_dual(x).tangent
        return (torch.zeros_like(x) if tangent is None else tangent).to(wide)

    def _written(self, clean: "Clean", before: Tensor, after: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """What a block, its attention and its MLP wrote otherwise than in the clean run: [row, writer, 2, batch,
        position], the two numbers of `Statistics.written`; not a number for a sublayer that the block does not have."""
        carried = self._difference(before, clean.before)
        writes = {"written": self._difference(after, clean.after) - carried}
        writes |= {f"{part}_written": self._difference(write, clean.writes[part]) for part, write in parts.items()}
        numbers = carried.new_full((len(carried), len(WRITERS), 2, *carried.shape[1:-1]), torch.nan)
        for index, write in ((index, writes[writer]) for index, writer in enumerate(WRITERS) if writer in writes):
            numbers[:, index, 0] = torch.linalg.vecdot(write, write)
            numbers[:, index, 1] = torch.linalg.vecdot(carried, write)
        return numbers

    def _place(
        self,
        index: int,
        streams: Tensor,
        norm: Norm = lambda x: x,
        found: Mapping[str, Tensor] | None = None,
        predictions: Predictions | None = None,
    ) -> Place:
        """The numbers of a place, of streams that are normed first where it is `final`."""
        clean, parts = torch.empty(0), list[Tensor]()
        for _, slab in self._slabs(streams):
            read = norm(slab.flatten(0, 1)).view_as(slab)
            clean = clean if parts else _primal(read[0]).double()
            parts.append(self._numbers(read, clean))
        numbers = {**dict(zip(SQUARES, torch.cat(parts, 1), strict=True)), **(found or {})}
        on_cpu = {name: of.cpu() for name, of in numbers.items()}
        return Place(self.texts, index, self.runs[: len(streams) - 1], on_cpu, predictions)

    def _numbers(self, slab: Tensor, clean: Tensor) -> Tensor:
        """`SQUARES` of every row: [3, row, batch, position]; to first order, where tangents stand for the runs."""
        x, y = self._scratch[:, : len(slab)]
        numbers = x.new_empty(3, *x.shape[:-1])
        difference, run, inner = numbers
        if self.job.tangents:
            x.copy_(self._difference(slab, clean))
            torch.sum(torch.mul(x, clean, out=y), -1, out=inner)
            torch.sum(x.square_(), -1, out=difference)
            run.copy_(inner_products(clean, clean))
            inner.add_(run)
            return numbers
        x.copy_(slab)
        torch.sum(torch.sub(x, clean, out=y).square_(), -1, out=difference)
        torch.sum(torch.mul(x, clean, out=y), -1, out=inner)
        torch.sum(x.square_(), -1, out=run)
        return numbers

    @cached_property
    def _scratch(self) -> Tensor:
        """Room for a slab in float64, twice: new memory for every slab would cost more than the sums."""
        shape = (2, min(1 + len(self.runs), self._rows), *self.ids.shape, self.job.model.config.n_embd)
        return torch.empty(shape, dtype=torch.float64, device=self.ids.device)


@dataclass(frozen=True)
class Clean:
    """The clean row at one block: [batch, position, n_embd] each."""

    before: Tensor
    after: Tensor
    writes: Mapping[str, Tensor]
    """What the sublayers wrote."""

    @classmethod
    def of(cls, before: Tensor, after: Tensor, writes: Mapping[str, Tensor]) -> "Clean":
        """Of the slab that it stands first in; sublayers count as writers where what they return adds up to the block's
        own write, which of a norm behind them, say, it does not."""
        x, y, parts = before[0].clone(), after[0].clone(), {part: write[0].clone() for part, write in writes.items()}
        left = _primal(y).double() - _primal(x).double() - sum(_primal(write).double() for write in parts.values())
        add_up = squared_norms(left).sum() <= torch.finfo(x.dtype).eps * squared_norms(_primal(y)).sum()
        return cls(x, y, parts if add_up else {})


class CleanLeaves:
    """What the leaf modules of a block made of the clean row, for the runs that leave it there.

    A product of few rows rounds otherwise than one of many. So a leaf that is given the very bits that it was given in
    the clean run gives back what it gave there: runs that leave a block late in it share all before, bit for bit.
    """

    def __init__(self, block: Block, texts: int) -> None:
        self.leaves = [leaf for leaf in block.modules() if not any(leaf.children()) and not natives(leaf)]
        self.texts = texts
        self.seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what the leaves read and make of the clean row, which stands first."""

        def keep(leaf: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            if len(given) == 1 and all(
                isinstance(of, Tensor) and of.shape[:1] >= (self.texts,) for of in (*given, made)
            ):
                self.seen.setdefault(leaf, []).append((given[0][: self.texts].clone(), made[: self.texts].clone()))

        with ExitStack() as hooks:
            for leaf in self.leaves:
                hooks.callback(leaf.register_forward_hook(keep).remove)
            yield

    @contextmanager
    def recalled(self, text: int) -> Iterator[None]:
        """Let the leaves remember, of one text."""
        with ExitStack() as restored:
            for leaf, seen in self.seen.items():
                own = leaf.__dict__.get("forward")
                leaf.forward = partial(_remembering, leaf.forward, [(x[text], made[text]) for x, made in seen])
                restored.callback(setattr if own else delattr, leaf, "forward", *([own] if own else []))
            yield


def _remembering(forward: Callable[..., Any], seen: Sequence[tuple[Tensor, Tensor]], *given: Any, **named: Any) -> Any:
    """What was made of this input before, where all rows are the clean one; else what is made of it now."""
    if len(given) == 1 and not named and isinstance(given[0], Tensor):
        for x, made in seen:
            if given[0].shape[1:] == x.shape and torch.equal(given[0], x.expand_as(given[0])):
                return made.expand(len(given[0]), *made.shape).clone()
    return forward(*given, **named)


@contextmanager
def _observed(block: Block) -> Iterator[dict[str, list[Tensor]]]:
    """What the sublayers return while the body runs, by name."""
    found: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for writer in WRITERS[1:]:
            module = getattr(block, part := writer.removesuffix("_written"), None)
            if isinstance(module, nn.Module):
                hooks.callback(module.register_forward_hook(partial(_keep, found, part)).remove)
        yield found


def _keep(found: dict[str, list[Tensor]], part: str, _module: nn.Module, _given: Any, out: Any) -> None:
    if isinstance(out, Tensor):
        found.setdefault(part, []).append(out)


def _write(found: Sequence[Tensor], scale: Tensor | None, like: Tensor) -> Tensor:
    """What a sublayer wrote into the streams: all that it returned, times its scale where that is not neutral."""
    write = torch.stack(list(found)).sum(0).view_as(like) if len(found) > 1 else found[0].view_as(like)
    return write if scale is None else write * scale


def _call(block: Block, slab: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """A slab through a block under values for every row."""
    texts = slab.shape[1]
    each = {name: value.expand(-1, texts, *value.shape[2:]).flatten(0, 1) for name, value in values.items()}
    with assigned(block, each):
        return block(slab.flatten(0, 1)).view_as(slab)


def _leaves_at(run: Mapping[str, Tensor]) -> int:
    """The first block that a run names."""
    return min(map(block_of, run))


def _primal(x: Tensor) -> Tensor:
    return forward_ad.unpack_dual(x).primal


class StreamOverflowError(ValueError):
    """A stream left the range of the model's type: the message says where, and in which run."""


@dataclass(frozen=True)
class Cells:
    """Where the numbers of each run belong: on axes of the caller's."""

    shape: tuple[int, ...]
    at: tuple[Tensor, ...]
    """Of every axis, the index of each run: int64 [run]. Cells that no run fills are the clean run."""
    named: Callable[[int], str]
    """A run in words, for errors."""

    @classmethod
    def in_a_row(cls, count: int, what: str) -> "Cells":
        """One axis, a cell for each run."""
        return cls((count,), (torch.arange(count),), lambda run: f"{what} {run}")


def run(job: Job, cells: Cells, max_bytes: int | None = None, progress: Progress | None = None) -> Statistics:
    """Run a job, and put its numbers on the axes of the cells.

    Raises ValueError when `max_bytes` is too little for one run, and StreamOverflowError.
    """
    passes = plan(job, max_bytes)
    with suppress(MemoryError, RuntimeError):  # where so much is not to be had, it is not worth having
        torch.empty(MALLOC_KEEPS, dtype=torch.uint8)
    gathered = Gathered(job, cells)
    places = run_passes(passes, gathered.add)
    for _ in progress(places, len(passes) * job.count) if progress else places:
        pass
    return gathered.statistics()


class Gathered:
    """The numbers of all passes, as they come: of the clean run, and of every cell."""

    def __init__(self, job: Job, cells: Cells) -> None:
        self.job, self.cells = job, cells
        self.clean: dict[str, Tensor] = {}
        self.found: dict[str, Tensor] = {}
        self.left = torch.zeros(*cells.shape, job.count, dtype=torch.bool)
        """Whether a cell has left the clean run: [*cell, place]."""

    def add(self, place: Place) -> None:
        """Take in a place. Raises StreamOverflowError where a stream is not finite."""
        rows: tuple[Any, ...] = tuple(axis[list(place.runs)] for axis in self.cells.at)
        self.left[(*rows, place.index)] = True
        for name, numbers in place.numbers.items():
            padding = torch.arange(numbers.shape[-1]) >= self.job.lengths.cpu()[place.texts, None]
            real = numbers.masked_fill(padding, 0.0)
            if name in SQUARES and not real.isfinite().all():
                raise StreamOverflowError(self._said(place, real))
            self._put(name, real, rows, place.texts, (place.index,))
        for name, numbers in place.predictions.tensors().items() if place.predictions else ():
            self._put(name, numbers, rows, place.texts)

    def _put(
        self, name: str, numbers: Tensor, rows: tuple[Tensor, ...], texts: slice, at: tuple[int, ...] = ()
    ) -> None:
        """Numbers [row, ..., batch, position or rank], at a place where there are some at every place."""
        if name not in self.clean:
            last = numbers.shape[-1] if name.startswith("top") else self.job.ids.shape[1]
            shape = (*[self.job.count for _ in at], *numbers.shape[1:-2], len(self.job.ids), last)
            self.clean[name], self.found[name] = numbers.new_zeros(shape), numbers.new_zeros(*self.cells.shape, *shape)
        within: tuple[Any, ...] = (*at, ..., texts, slice(numbers.shape[-1]))
        self.clean[name][within] = numbers[0]
        cells = tuple(axis[: len(numbers) - 1] for axis in rows)
        self.found[name][cells + within] = numbers[1:]

    def _said(self, place: Place, numbers: Tensor) -> str:
        """Where a stream overflowed, and in which run."""
        where = "the final norm" if place.index == self.job.count - 1 else f"depth {place.index}"
        row = int((~numbers.isfinite()).nonzero()[0, 0])
        if not row:
            return f"The stream is no longer finite at {where} in the clean run; take float64."
        whose = self.cells.named(place.runs[row - 1])
        return f"The stream is no longer finite at {where} under {whose}; take a smaller one, or float64."

    def statistics(self) -> Statistics:
        """All the numbers; cells that have not left the clean run are the clean run."""
        axes, names = len(self.cells.shape), [of.name for of in fields(Predictions) if of.name in self.clean]
        for name, clean in self.clean.items():
            for place in range(self.job.count) if name not in names else [-1]:
                found, expected = self.found[name], clean
                if name not in names:
                    found, expected = found.select(axes, place), clean[place]
                found[~self.left[..., place]] = expected
        predictions = [Predictions(**{name: of[name] for name in names}) if names else None for of in self.both]
        steps = [of["steps_sq"].narrow(-3, 1, self.job.count - 2) if self.job.steps else None for of in self.both]
        written = self.found["written"].movedim((axes + 1, axes + 2), (0, 1))
        squares = [self.found[name] for name in SQUARES]
        clean_sq, lengths = self.clean["run_sq"], self.job.lengths
        return Statistics(self._sites(), *squares, clean_sq, lengths, written, *predictions, *steps)  # type: ignore[call-arg, arg-type]

    @property
    def both(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The numbers of the cells, and of the clean run."""
        return self.found, self.clean

    def _sites(self) -> Tensor:
        """The depth at which all that a run names has acted: [*cell]; 0 for a cell that no run fills."""
        sites = torch.zeros(self.cells.shape, dtype=torch.int64)
        sites[self.cells.at] = torch.tensor([1 + max(map(block_of, run)) for run in self.job.runs], dtype=torch.int64)
        return sites


def plan(job: Job, max_bytes: int | None) -> list[Pass]:
    """The passes that run everything on every text, each within `max_bytes` (default: a share of what is free).

    Texts are split before runs are, for every pass runs its texts clean. Raises ValueError when one text with one run
    needs more.
    """
    allowed = int(free_bytes(job.model.device) * SHARE_OF_FREE_MEMORY) if max_bytes is None else max_bytes
    order = sorted(range(len(job.runs)), key=lambda run: _leaves_at(job.runs[run]))
    length = job.ids.shape[1]

    def fits(texts: int, rows: int) -> bool:
        return estimate_bytes(job, texts, length, rows) <= allowed

    most = min(len(job.ids), max(1, _slab_tokens(job.model.device) // length))
    texts = next((texts for texts in range(most, 1, -1) if fits(texts, 1 + len(order))), 1)
    rows = next((rows for rows in range(1 + len(order), 1, -1) if fits(texts, rows)), 1)
    if not fits(texts, rows) or (order and rows == 1):
        needed = estimate_bytes(job, 1, length, min(2, 1 + len(order)))
        what = "max_bytes is" if max_bytes is not None else "A quarter of the memory that is free is"
        raise ValueError(
            f"{what} {allowed}; one text of {length} tokens with one run beside the clean one takes {needed}. "
            "Give more with max_bytes, or a shorter text."
        )
    per_pass = math.ceil(len(order) / math.ceil(len(order) / (rows - 1))) if order else 1
    return [
        Pass(
            job,
            chosen,
            job.ids[chosen, : int(job.lengths[chosen].max())].to(job.model.device),
            job.lengths[chosen],
            order[start : start + per_pass],
        )
        for chosen in (slice(first, min(first + texts, len(job.ids))) for first in range(0, len(job.ids), texts))
        for start in range(0, max(1, len(order)), per_pass)
    ]


def run_passes(passes: Sequence[Pass], take: Callable[[Place], object]) -> Iterator[Place]:
    """The places of all passes, each taken in. A pass that runs out of memory is halved and repeated, with a warning.

    Places that it had yielded come again. Raises ValueError when one run of one text is too much.
    """
    waiting = list(reversed(passes))
    while waiting:
        part = waiting.pop()
        if not (yield from _whole(part, take)):
            waiting += reversed(part.halves())  # out here the failed pass's tensors are gone
            logger.warning(
                "Out of memory with %d runs of %d texts beside the clean run; they are halved and run again.",
                len(part.runs),
                len(part.ids),
            )


def _whole(part: Pass, take: Callable[[Place], object]) -> Generator[Place, None, bool]:
    """The places of a pass; returns whether the memory was enough for them."""
    try:
        for place in part.places():
            take(place)
            yield place
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA has a RuntimeError of its own for it, CPUs have only words."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


def estimate_bytes(job: Job, texts: int, positions: int, rows: int) -> int:
    """What a pass of so many rows takes at its peak, the model itself left out.

    The streams of all rows; of one slab, and of the clean row, what the block's linear maps make, and the differences;
    the numbers per position; and what oneDNN takes to rearrange a weight. Memory that one sublayer frees does not
    always serve the next, so both count. With tangents there are two of every number.
    """
    model, tokens = job.model, texts * positions
    width, streams = model.config.n_embd, 1 + job.tangents
    linear = [(of.in_features, of.out_features) for of in model.blocks[0].modules() if isinstance(of, nn.Linear)]
    slab = min(rows, max(1, _slab_tokens(model.device) // tokens)) * tokens
    activations = slab * (2 * sum(out for _, out in linear) + 12 * width)
    activations += tokens * (sum(given + out for given, out in linear) + 8 * width)  # what is kept of the clean row
    kept = rows * tokens * width
    rearranged = max((given * out for given, out in linear), default=0)
    in_float64 = 2 * slab * width + 2 * rows * tokens * (4 + 2 * len(WRITERS))
    in_float64 += prediction_numbers(rows, tokens, model.config.vocab_size) if job.predict else 0
    return ((kept + activations) * streams + rearranged) * model.dtype.itemsize + in_float64 * 8


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
