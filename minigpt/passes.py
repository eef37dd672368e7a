"""All passes of a job: as few as memory allows, and what they give together.

A pass that runs out of memory is halved and run again. The numbers of all passes are gathered on axes of the caller's.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.alone import check_a_run_alone, check_used
from minigpt.engine import SQUARES, Job, Pass, Place, leaves_at, slab_tokens
from minigpt.measures import WRITERS, Statistics
from minigpt.parameters import block_of
from minigpt.predictions import Predictions, prediction_numbers

logger = logging.getLogger("minigpt")
MALLOC_KEEPS = 2**25 - 2**16
"""Bytes. The C library gives freed memory back, and every page of it costs again when it is next used. Having freed
a piece of almost 32 MiB it keeps twice as much (mallopt(3), M_MMAP_THRESHOLD: the threshold adjusts itself)."""
SHARE_OF_FREE_MEMORY = 0.25
"""What a computation may take where nothing else is asked for."""
Progress = Callable[[Iterable[Place], int], Iterable[Place]]
"""Wraps the places of all passes as they come; the number says how many there will be."""


@dataclass(frozen=True)
class Cells:
    """Where the numbers of each run belong: on axes of the caller's."""

    shape: tuple[int, ...]
    at: tuple[Tensor, ...]
    """Of every axis, the index of each run: int64 [run]. Cells that no run fills are the clean run."""

    @classmethod
    def in_a_row(cls, count: int) -> "Cells":
        """One axis, a cell for each run."""
        return cls((count,), (torch.arange(count),))


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
    found = gathered.statistics()
    if job.runs and not job.known:
        check_used(job)
        check_a_run_alone(job, lambda run: found.difference_sq[tuple(int(axis[run]) for axis in cells.at)])
    return found


def run_for_logits(job: Job, max_bytes: int | None = None) -> tuple[Tensor, Tensor]:
    """Run a job that keeps no places: the logits of its tokens in the clean run [batch, token], and in every run.

    Raises as `run` does.
    """
    gathered = Gathered(job, Cells.in_a_row(len(job.runs)))
    for _ in run_passes(plan(job, max_bytes), gathered.add):
        pass
    return gathered.clean["logits"], gathered.found["logits"]


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
            self._check(real, place, what="The stream is", missing=name not in SQUARES)
            self._put(name, real, rows, place.texts, (place.index,))
        for name, numbers in place.predictions.tensors().items() if place.predictions else ():
            self._check(numbers, place, what="The predictions are")
            self._put(name, numbers, rows, place.texts)
        if place.logits is not None:
            self._check(place.logits, place, what="The logits are")
            self._put("logits", place.logits, rows, place.texts)

    def _put(
        self, name: str, numbers: Tensor, rows: tuple[Tensor, ...], texts: slice, at: tuple[int, ...] = ()
    ) -> None:
        """Numbers [row, ..., batch, position or rank], at a place where there are some at every place."""
        if name not in self.clean:
            last = numbers.shape[-1] if name.startswith(("top", "logits")) else self.job.ids.shape[1]
            shape = (*[self.job.count for _ in at], *numbers.shape[1:-2], len(self.job.ids), last)
            self.clean[name], self.found[name] = numbers.new_zeros(shape), numbers.new_zeros(*self.cells.shape, *shape)
        within: tuple[Any, ...] = (*at, ..., texts, slice(numbers.shape[-1]))
        self.clean[name][within] = numbers[0]
        cells = tuple(axis[: len(numbers) - 1] for axis in rows)
        self.found[name][cells + within] = numbers[1:]

    def _check(self, numbers: Tensor, place: Place, what: str, missing: bool = False) -> None:
        """Raise StreamOverflowError, which says where and in which run, for numbers that are not finite.

        `missing`: not a number says that there is none.
        """
        bad = numbers.isinf() if missing else ~numbers.isfinite()
        if bool(bad.any()):
            where = "the final norm" if place.index == self.job.count - 1 else f"depth {place.index}"
            row = int(bad.nonzero()[0, 0])
            self.job.refuse(f"{what} no longer finite at {where}", place.runs[row - 1] if row else None)

    def statistics(self) -> Statistics:
        """All the numbers; cells that have not left the clean run are the clean run."""
        axes, names = len(self.cells.shape), [of.name for of in fields(Predictions) if of.name in self.clean]
        for name, clean in self.clean.items():
            at_every_place = name not in (*names, "logits")
            for place in range(self.job.count) if at_every_place else [-1]:
                found, expected = self.found[name], clean
                if at_every_place:
                    found, expected = found.select(axes, place), clean[place]
                found[~self.left[..., place]] = expected

        def of(numbers: dict[str, Tensor]) -> dict[str, Any]:
            kept = Predictions(**{name: numbers[name] for name in names}) if names else None
            steps = numbers["steps_sq"].narrow(-3, 1, self.job.count - 2) if self.job.steps else None
            return {"predictions": kept, "steps_sq": steps, "logits": numbers.get("logits")}

        return Statistics(
            sites=self._sites(),
            difference_sq=self.found["difference_sq"],
            run_sq=self.found["run_sq"],
            inner=self.found["inner"],
            clean_sq=self.clean["run_sq"],
            lengths=self.job.lengths,
            written=self.found["written"].movedim((axes + 1, axes + 2), (0, 1)),
            **of(self.found),
            **{f"clean_{name}": kept for name, kept in of(self.clean).items()},
        )

    def _sites(self) -> Tensor:
        """The depth at which all that a run names has acted: [*cell]; 0 for a cell that no run fills."""
        sites = torch.zeros(self.cells.shape, dtype=torch.int64)
        sites[self.cells.at] = torch.tensor([1 + max(map(block_of, run)) for run in self.job.runs], dtype=torch.int64)
        return sites


def plan(job: Job, max_bytes: int | None) -> list[Pass]:
    """The passes that run everything on every text, each within `max_bytes` (default: a share of what is free).

    Texts are split before runs, because every pass has to run its texts clean as well. Raises ValueError when one text
    with one run needs more.
    """
    allowed = int(free_bytes(job.model.device) * SHARE_OF_FREE_MEMORY) if max_bytes is None else max_bytes
    order = sorted(range(len(job.runs)), key=lambda run: leaves_at(job.runs[run]))
    length = job.ids.shape[1]

    def fits(texts: int, rows: int) -> bool:
        return estimate_bytes(job, texts, length, rows) <= allowed

    most = min(len(job.ids), max(1, slab_tokens(job.model.device) // length))
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
    values that are tensors, stacked, and what they make; the numbers per position; and what oneDNN takes to rearrange a
    weight. Memory that one sublayer frees does not always serve the next, so both count. With tangents there are two of
    every number.
    """
    model, tokens = job.model, texts * positions
    width, streams = model.config.n_embd, 1 + job.tangents
    linear = [(of.in_features, of.out_features) for of in model.blocks[0].modules() if isinstance(of, nn.Linear)]
    slab = min(rows, max(1, slab_tokens(model.device) // tokens)) * tokens
    activations = slab * (2 * sum(out for _, out in linear) + 12 * width)
    activations += tokens * (sum(given + out for given, out in linear) + 12 * width)  # what is kept of the clean row
    kept = rows * tokens * width
    activations += 3 * slab * job.value_numbers
    rearranged = max((given * out for given, out in linear), default=0)
    in_float64 = 2 * slab * width + 2 * rows * tokens * (4 + 2 * len(WRITERS))
    in_float64 += prediction_numbers(rows, tokens, model.config.vocab_size) if job.predict else 0
    return ((kept + activations) * streams + rearranged) * model.dtype.itemsize + in_float64 * 8


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
