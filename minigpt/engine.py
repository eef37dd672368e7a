"""One pass: a clean run of some texts and many runs beside it, through the model's own blocks.

A run is a dict of native parameters, as `scaled` takes it. It leaves the clean run at the first block that it names.
That block gets the clean row once more for each run that leaves there, with that run's values. Its modules compute such
rows only where they read something else than the clean row does. So nothing clean is computed twice, and each weight
is read once for as many rows as fit the processor's cache. The block's equations stand in its `forward` alone; what its
sublayers write is read there, by hooks. `passes.py` says how many passes there are.

Words of this file: streams are [row, batch, position, n_embd], row 0 of the first slab is the clean run; a slab is the
rows that go through a block together; a place is a depth 0 .. n_layer, or `final`. Only numbers per position leave a
place: see `Place`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pad_sequence

from minigpt.linear import Linear
from minigpt.measures import WRITERS, inner_products, squared_norms
from minigpt.model import GPT2, MLP, Attention, Block, changes_of, forward_mode, in_place, replaced, through
from minigpt.parameters import TEXT_AXES, Native, Values, assigned, block_of, check_clean, fit, natives
from minigpt.predictions import Predictions, predict

CPU_SLAB, GPU_SLAB = 1024, 65536
"""Tokens that go through a block together: on a CPU few enough to stay in its cache, on a GPU enough to fill it."""
SUM_ROUNDINGS = 4
"""A block adds what its sublayers write to the stream one after the other: so many roundings, relative, at the most."""
SQUARES = ("difference_sq", "run_sq", "inner")
"""What is kept of every row at every place, as `Statistics` has it."""
KNOWN = (GPT2, Block, Attention, MLP, Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList)
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
    tokens: Tensor | None = None
    """Those whose logits after each text's last token are kept: [batch, token]."""
    places: bool = True
    """Whether numbers are kept of every place; without them a pass gives the logits of `tokens` alone."""
    declared: Mapping[str, Native] = field(default_factory=dict)
    """Every parameter that a run names. Values have all the axes of its shape."""
    named: Callable[[int], str] = "run {}".format
    """A run in words, for errors."""

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
        tokens: Tensor | Sequence[Any] | None = None,
        places: bool = True,
        named: Callable[[int], str] = "run {}".format,
    ) -> "Job":
        """Texts and runs that fit a clean model, or a ValueError that says what does not."""
        check_clean(model)
        check_blocks(model)
        ids, lengths = padded(texts)
        model.config.check_ids(ids)
        declared, fitting = natives(model), list[dict[str, Tensor]]()
        for run in fit(model, runs):
            fitting.append({name: _with_all_axes(name, value, declared[name], ids) for name, value in run.items()})
        used = {name: declared[name] for run in fitting for name in run}
        predict = predict_logits if predictions is True else predictions or None
        wanted = None if tokens is None else _checked_tokens(tokens, len(ids), model.config.vocab_size)
        return cls(model, ids, lengths, fitting, predict, tangents, steps, wanted, places, used, named)

    @cached_property
    def known(self) -> bool:
        """Whether the model is made of this library's own parts alone, which treat every row by itself."""
        return all(type(module) in KNOWN for module in self.model.modules())

    @property
    def count(self) -> int:
        """How many places there are."""
        return len(self.model.blocks) + 2

    @cached_property
    def value_numbers(self) -> int:
        """How many numbers the values of a run hold for each token in one block, at the most."""
        most = dict[str, int]()
        for run in self.runs:
            for name, value in run.items():
                most[name] = max(most.get(name, 0), _per_token(value, self.declared[name]))
        blocks = range(-1, len(self.model.blocks))
        return max(sum(count for name, count in most.items() if block_of(name) == layer) for layer in blocks)

    def refuse(self, what: str, run: int | None) -> NoReturn:
        """Raise StreamOverflowError, in a sentence that names the run, None being the clean one."""
        whose = "in the clean run" if run is None else f"under {self.named(run)}"
        dtype = str(self.model.dtype).removeprefix("torch.")
        advice = [*(["a smaller value"] if run is not None else []), *(["float64"] if dtype != "float64" else [])]
        then = f"; take {', or '.join(advice)}" if advice else ""
        raise StreamOverflowError(f"{what} {whose}, in {dtype}{then}.")


def _checked_tokens(tokens: Tensor | Sequence[Any], texts: int, size: int) -> Tensor:
    """Tokens for every text: [batch, token]."""
    try:
        found = torch.as_tensor(tokens)
    except (TypeError, ValueError):
        found = torch.empty(0, 0, 0)
    if found.ndim not in (1, 2) or found.dtype != torch.int64 or (found.ndim == 2 and len(found) not in (1, texts)):
        raise ValueError(f"The tokens are {tokens!r}; expected token ids [token], or [batch, token] for {texts} texts.")
    if not found.numel() or not 0 <= int(found.min()) <= int(found.max()) < size:
        raise ValueError(f"The tokens are {found.tolist()}; expected at least one, from 0 to {size - 1}.")
    return found.expand(texts, -1)


def _per_token(value: Tensor, native: Native) -> int:
    """How many numbers a value holds for a token; 0 of one number for all."""
    behind = [
        size for size, word in zip(value.shape, native.shape, strict=True) if word not in ("batch", "position", "query")
    ]
    return math.prod(behind) if value.numel() > 1 else 0


def predict_logits(model: GPT2, streams: Tensor, ids: Tensor, lengths: Tensor) -> Predictions:
    """Every row's next-token distributions beside row 0's."""
    return predict(model.unembed, model.final_norm, streams, ids, lengths)


def padded(texts: Tensor | Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Texts as one tensor [batch, position], and their lengths [batch]. Raises ValueError for an empty text."""
    if isinstance(texts, Tensor):
        full = texts.shape[1] if texts.ndim == 2 else 0  # another shape is refused by the config's check
        return texts, torch.full((len(texts),) if texts.ndim else (0,), full)
    if not isinstance(texts, Sequence) or not all(map(is_a_text, texts)):
        raise ValueError(
            "The texts are not lists of token ids; for a single text give [ids], a list that holds it, with "
            "ids = tokenizer.encode(text)."
        )
    lengths = [len(text) for text in texts]
    if not lengths or not min(lengths):
        raise ValueError(
            f"The texts have {lengths} tokens; expected at least one text, and in each at least one token."
        )
    rows = [torch.as_tensor(text, dtype=torch.int64) for text in texts]
    return pad_sequence(rows, batch_first=True), torch.tensor(lengths)


def is_a_text(text: object) -> bool:
    """Whether something is a list of whole numbers."""
    if not isinstance(text, Sequence) or isinstance(text, str):
        return False
    return all(isinstance(token, Integral) and not isinstance(token, bool) for token in text)


def check_blocks(model: GPT2) -> None:
    """Raise ValueError for a model whose blocks a pass cannot run one by one, each with values of its own."""
    kind, followed = type(model), ("forward", "depths", "last_depth")
    other = [name for name in followed if getattr(kind, name) is not getattr(GPT2, name)]
    if other:
        raise ValueError(
            f"{kind.__name__} has a {other[0]} of its own, which no pass follows: put what is different into a "
            "subclass of minigpt.Block, and give that with block=."
        )
    known = dict[int, int]()
    for layer, block in enumerate(model.blocks):
        for module in (of for of in block.modules() if natives(of)):
            if known.setdefault(id(module), layer) != layer:
                raise ValueError(
                    f"Blocks {known[id(module)]} and {layer} share one {type(module).__name__}, which has native "
                    "parameters: its values would act in both. Share its weights instead."
                )


def _with_all_axes(name: str, value: Tensor, native: Native, ids: Tensor) -> Tensor:
    """A value with an axis for every word of the parameter's shape.

    Raises ValueError where it has another number of texts or positions than there are.
    """
    whole = value.reshape((1,) * (len(native.shape) - value.ndim) + tuple(value.shape))
    there = {word: ids.shape[word != "batch"] for word in native.shape if word in TEXT_AXES}
    if any(whole.shape[native.shape.index(word)] not in (1, count) for word, count in there.items()):
        expected = " by ".join(f"1 or {count} {TEXT_AXES[word]}" for word, count in there.items())
        raise ValueError(
            f"{name} has a value of shape {list(value.shape)}; expected a number, or {expected}: "
            f"[{', '.join(native.shape)}]."
        )
    return whole


class StreamOverflowError(ValueError):
    """A stream left the range of the model's type: the message says where, and in which run."""


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
    """Of the clean run and then of those runs, as `Statistics` of measures.py has them: [row, ..., batch, position].
    What a block wrote is there only of the runs that left before it."""
    predictions: Predictions | None = None
    """At `final`, where they are asked for: rows are the clean run and then the runs."""
    logits: Tensor | None = None
    """At `final`, of the job's tokens, where there are some: [row, batch, token], float64."""


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
        model, predict = self.job.model, self.job.predict
        gone = sum(leaves_at(self.job.runs[run]) < 0 for run in self.runs)
        shape = (1 + len(self.runs), *self.ids.shape, model.config.n_embd)
        streams = torch.zeros(shape, dtype=model.dtype, device=model.device)
        if self.job.tangents:
            streams = forward_ad.make_dual(streams, torch.zeros_like(streams))
        with assigned(model, _each(self._values(-1, [None, *self.runs[:gone]]), len(self.ids))):
            streams[: 1 + gone] = model.embed(self.ids.repeat(1 + gone, 1)).view_as(streams[: 1 + gone])
        if self.job.places:
            yield self._place(0, streams[: 1 + gone])
        for layer, block in enumerate(model.blocks):
            here, gone = 1 + gone, sum(leaves_at(self.job.runs[run]) <= layer for run in self.runs)
            found = self._through(layer, block, streams[: 1 + gone], here)
            if self.job.places:
                yield self._place(layer + 1, streams[: 1 + gone], found=found)
        predictions = predict(model, streams, self.ids, self.lengths) if predict else None
        logits = None if self.job.tokens is None else self._logits(streams, self.job.tokens)
        if self.job.places:
            last = self._place(len(model.blocks) + 1, streams, model.final_norm, predictions=predictions)
            yield replace(last, logits=logits)
        else:
            yield Place(self.texts, len(model.blocks) + 1, self.runs, {}, logits=logits)

    def _logits(self, streams: Tensor, tokens: Tensor) -> Tensor:
        """The logits of some tokens [batch, token] after each text's last one: [row, batch, token]."""
        model, texts = self.job.model, torch.arange(len(self.ids))
        with self._within_range(model.final_norm, "the final norm", [None, *self.runs]):
            ends = model.final_norm(streams[:, texts, self.lengths - 1].flatten(0, 1)).double()
        weights = model.unembed.weight[tokens[self.texts].to(model.device)].double()
        return torch.einsum("rbe,bte->rbt", ends.unflatten(0, streams.shape[:2]), weights).cpu()

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

    def _through(self, layer: int, block: Block, streams: Tensor, left: int) -> dict[str, Tensor]:
        """Bring the streams through a block, in place.

        `left` rows have left the clean run already; the others leave it in this block, and start as copies of the clean
        row. Returns, of the first group, how what the block wrote differs from the clean run, and of all rows the norm
        of what it added, by the names that `Statistics` has for it.
        """
        streams[left:] = streams[0]
        runs: list[int | None] = [None, *self.runs[: len(streams) - 1]]
        shared = None
        if left < len(streams) and not self.job.tangents:
            shared = Shared(block, len(self.ids), self._named(layer, runs))
        written, steps, clean = list[Tensor](), list[Tensor](), None
        for start, slab in self._slabs(streams):
            of_slab = runs[start : start + len(slab)]
            before = of_slab[: max(0, left - start)]
            values = self._values(layer, of_slab)
            with (
                _observed(block) as writes,
                self._within_range(block, f"the norm layers of block {layer}", of_slab),
                shared.among(len(slab), len(slab) - len(before), first=start == 0) if shared else nullcontext(),
                forward_mode() if self.job.tangents else nullcontext(),
            ):
                out = _call(block, slab, values)
            if before and self.job.places:
                parts = _writes(writes, slab, len(before), values)
                clean = clean or Clean.of(slab, out, parts)
                there = clean.writes.keys() <= parts.keys()  # a slab may not need a sublayer
                parts = {part: parts[part] for part in clean.writes} if there else {}
                names = [set(self._named(layer, [run])) for run in before]
                written.append(self._written(clean, slab[: len(before)], out[: len(before)], parts, names))
            steps += [squared_norms(out - slab)] if self.job.steps else []
            slab.copy_(out)
        return {name: torch.cat(found).double() for name, found in (("written", written), ("steps_sq", steps)) if found}

    @contextmanager
    def _within_range(self, module: nn.Module, where: str, runs: Sequence[int | None]) -> Iterator[None]:
        """While the body runs, raise StreamOverflowError where a norm layer gets numbers that it cannot square.

        Their sum of squares would be infinite, and the layer would return its bias: a finite number, and a wrong one.
        """

        def check(_: nn.Module, given: tuple[Any, ...]) -> None:
            x = primal(given[0])
            most = largest_normed(x.dtype, x.shape[-1])
            low, high = torch.aminmax(x)
            if not (-most <= float(low) and float(high) <= most):
                beyond = (~(x.abs().flatten(1).amax(1) <= most)).nonzero()[0]
                self.job.refuse(f"The stream is too large for {where}", runs[int(beyond) // len(self.ids)])

        kinds = (nn.LayerNorm, nn.RMSNorm, type(self.job.model.final_norm))
        with ExitStack() as hooks:
            for norm in (of for of in module.modules() if isinstance(of, kinds)):
                hooks.callback(norm.register_forward_pre_hook(check).remove)
            yield

    def _slabs(self, streams: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The rows in slabs that go through a block together, each with the number of its first row."""
        return ((start, streams[start : start + self._rows]) for start in range(0, len(streams), self._rows))

    @property
    def _rows(self) -> int:
        """How many rows go through a block together."""
        return max(1, slab_tokens(self.ids.device) // self.ids.numel())

    def _values(self, layer: int, runs: Sequence[int | None]) -> dict[str, Tensor]:
        """Name in the block -> values of some rows (None is the clean run), neutral where a run does not name it.

        [row, text or 1, position or 1, ...]; empty where none of the runs names a parameter of the block.
        """
        prefix, model = _prefix(layer), self.job.model
        given = [{} if run is None else self.job.runs[run] for run in runs]
        found = dict[str, Tensor]()
        for name in (prefix + leaf for leaf in self._named(layer, runs)):
            native = self.job.declared[name]
            neutral = torch.full((1,) * len(native.shape), native.nothing, dtype=model.dtype, device=model.device)
            rows = [self._cut(run.get(name, neutral), native.shape) for run in given]
            found[name.removeprefix(prefix)] = torch.stack(torch.broadcast_tensors(*rows))
        return found

    def _named(self, layer: int, runs: Sequence[int | None]) -> list[str]:
        """The parameters of a block that some runs name, by their names in the block."""
        given = (self.job.runs[run] for run in runs if run is not None)
        named = dict.fromkeys(name for run in given for name in run if block_of(name) == layer)
        return [name.removeprefix(_prefix(layer)) for name in named]

    def _cut(self, value: Tensor, words: Sequence[str]) -> Tensor:
        """A value of the texts and positions of this pass."""
        for axis, word in enumerate(words):
            if word in TEXT_AXES and value.shape[axis] > 1:
                texts = self.texts if word == "batch" else slice(self.ids.shape[1])
                value = value[(slice(None),) * axis + (texts,)]
        return value

    def _difference(self, x: Tensor, clean: Tensor) -> Tensor:
        """What of x is not the clean one, or its tangent."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if not self.job.tangents:
            return x.to(wide) - clean.to(wide)
        tangent = forward_ad.unpack_dual(x).tangent
        return (torch.zeros_like(x) if tangent is None else tangent).to(wide)

    def _written(
        self, clean: "Clean", before: Tensor, after: Tensor, parts: Mapping[str, Tensor], names: Sequence[set[str]]
    ) -> Tensor:
        """What a block, its attention and its MLP wrote otherwise than in the clean run: [row, writer, 2, batch,
        position], the two numbers of `Statistics.written`; not a number for a sublayer that the block does not have.

        The block's own write is the sum of its sublayers'. The difference of the streams before and after it would hold
        their rounding too, which can be larger than the write. It is taken only where there are no such parts, for rows
        whose run names parameters of the block, `names`, which may act on more than what the sublayers write, and for
        rows of a block of one's own that wrote something else: those have no parts.
        """
        carried, acted = self._difference(before, clean.before), [row for row, of in enumerate(names) if of]
        writes = {f"{part}_written": self._difference(write, clean.writes[part]) for part, write in parts.items()}
        if not parts or acted or not self.job.known:
            by_streams = self._difference(after, clean.after) - carried
        written = _total(writes.values()) if parts else by_streams
        if parts and not self.job.known:
            other = self._apart(by_streams, written, (before, after, *parts.values()))
            of_parts = {f"{part}_{how}" for part in parts for how in ("scale", "shift")}
            other[[row for row in acted if not names[row] <= of_parts]] = False
            written[other] = by_streams[other]
            for write in writes.values():
                write[other] = torch.nan
        if acted:
            written[acted] = by_streams[acted]
        writes["written"] = written
        numbers = carried.new_full((len(carried), len(WRITERS), 2, *carried.shape[1:-1]), torch.nan)
        for index, write in ((index, writes[writer]) for index, writer in enumerate(WRITERS) if writer in writes):
            numbers[:, index, 0] = torch.linalg.vecdot(write, write)
            numbers[:, index, 1] = torch.linalg.vecdot(carried, write)
        return numbers

    def _apart(self, by_streams: Tensor, by_parts: Tensor, terms: Sequence[Tensor]) -> Tensor:
        """Which rows wrote something else than their sublayers did: [row]."""
        sizes = [forward_ad.unpack_dual(of).tangent if self.job.tangents else of for of in terms]
        rounding = torch.finfo(terms[0].dtype).eps ** 2 * sum(squared_norms(of) for of in sizes if of is not None)
        return (squared_norms(by_streams - by_parts) > (2 * SUM_ROUNDINGS) ** 2 * rounding).flatten(1).any(1)

    def _place(
        self,
        index: int,
        streams: Tensor,
        norm: nn.Module | None = None,
        found: Mapping[str, Tensor] | None = None,
        predictions: Predictions | None = None,
    ) -> Place:
        """The numbers of a place, of streams that are normed first where it is `final`."""
        clean, parts, runs = torch.empty(0), list[Tensor](), [None, *self.runs]
        for start, slab in self._slabs(streams):
            if norm is None:
                read = slab
            else:
                with self._within_range(norm, "the final norm", runs[start : start + len(slab)]):
                    read = norm(slab.flatten(0, 1)).view_as(slab)
            clean = clean if parts else primal(read[0]).double()
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
        """Of the slab that it stands first in.

        Sublayers count as writers where what they return adds up, at every position, to what the block writes: with a
        norm behind them, say, it does not.
        """
        x, y, parts = before[0].clone(), after[0].clone(), {part: write[0].clone() for part, write in writes.items()}
        terms = [primal(y).double(), *(-primal(term).double() for term in (x, *parts.values()))]
        rounding = torch.finfo(x.dtype).eps ** 2 * sum(squared_norms(term) for term in terms)
        add_up = squared_norms(reduce(torch.add, terms)) <= SUM_ROUNDINGS**2 * rounding
        return cls(x, y, parts if bool(add_up.all()) else {})


class Shared:
    """What the modules of a block make of the clean row, for the runs that leave it there.

    A matrix product rounds differently when other rows stand beside it. So if a row's input equals the clean row's bit
    for bit, it gets the clean row's result instead of a new one. Runs that leave a block late in it share all before,
    bit for bit, and nothing clean is computed twice. Modules in which any run changes a parameter are left out.
    """

    def __init__(self, block: Block, texts: int, changed: Iterable[str]) -> None:
        owners = {f"{name.rpartition('.')[0]}." for name in changed}
        self.modules = [
            module
            for path, module in block.named_modules()
            if any(weight.ndim > 1 for weight in module.parameters())  # the others do no product
            and path
            and not any(owner.startswith(f"{path}.") for owner in owners)
        ]
        self.texts = texts
        self.clean: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        """What each module read and made of the clean row, which stands first in the first slab."""

    @contextmanager
    def among(self, rows: int, new: int, first: bool) -> Iterator[None]:
        """While a slab of so many rows goes through the block, whose last ones are of runs that leave here."""
        with ExitStack() as replacements:
            for module in self.modules:
                forward = partial(self._forward, module, module.forward, rows * self.texts, new * self.texts, first)
                replacements.enter_context(replaced(module, "forward", forward))
            yield

    def _forward(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        rows: int,
        new: int,
        first: bool,
        *given: Any,
        **named: Any,
    ) -> Any:
        """What a module makes of a slab; of the last rows, where they repeat the clean one, what it made of that."""
        x = _only_tensor(given, named)
        if x is None or len(x) != rows:
            return forward(*given, **named)
        before = changes_of(x)
        out = self._shared(module, partial(forward, **named), x, rows - new, first, given[1:])
        if changes_of(x) != before:
            raise ValueError(in_place(module))
        return out

    def _shared(
        self, module: nn.Module, forward: Callable[..., Any], x: Tensor, old: int, first: bool, more: tuple[Any, ...]
    ) -> Any:
        rows, texts = len(x), self.texts
        if first:
            repeats = _repeats(x[old:], x[:texts])
            out = forward(x[:old] if repeats else x, *more)
            if not isinstance(out, Tensor) or len(out) != (old if repeats else rows):
                return forward(x, *more) if repeats else out
            made = out[:texts]
            self.clean.setdefault(module, []).append((x[:texts].clone(), made.clone()))
            return torch.cat([out, _repeated(made, rows - old)]) if repeats else out
        for clean, made in self.clean.get(module, []):
            if _repeats(x[old:], clean):
                computed = [forward(x[:old], *more)] if old else []
                return torch.cat([*computed, _repeated(made, rows - old)])
        return forward(x, *more)


def _repeats(x: Tensor, clean: Tensor) -> bool:
    """Whether rows x are the clean row, of every text, again and again: at least once."""
    return len(x) > 0 and x.shape[1:] == clean.shape[1:] and torch.equal(x, _repeated(clean, len(x)))


def _repeated(clean: Tensor, rows: int) -> Tensor:
    """The clean row of every text, to so many rows of texts."""
    return clean.expand(rows // len(clean), *clean.shape).flatten(0, 1)


def _only_tensor(given: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a module gets, where all else is None, as a cache may be."""
    first, *others = given or (None,)
    none_else = all(of is None for of in (*others, *named.values()))
    return first if isinstance(first, Tensor) and first.ndim and none_else else None


def _total(writes: Iterable[Tensor]) -> Tensor:
    """The sum, as a tensor of its own."""
    first, *others = writes
    return reduce(torch.add, others, first) if others else first.clone()


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


def _writes(
    returned: Mapping[str, Sequence[Tensor]], slab: Tensor, rows: int, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the sublayers wrote into the first rows of a slab: all that each returned, under its scale and shift."""
    found = dict[str, Tensor]()
    for part, tensors in returned.items():
        if all(of.numel() == slab.numel() for of in tensors):
            write = reduce(torch.add, (of.reshape(slab.shape)[:rows] for of in tensors))
            scale, shift = (values.get(f"{part}_{how}") for how in ("scale", "shift"))
            write = write if scale is None else write * scale[:rows]
            found[part] = write if shift is None else write + shift[:rows]
    return found


def _prefix(layer: int) -> str:
    """What the names of a block's parameters begin with; -1 is what comes before all blocks."""
    return "" if layer < 0 else f"blocks.{layer}."


def _each(values: Mapping[str, Tensor], texts: int) -> dict[str, Tensor]:
    """Values [row, text or 1, ...] for every text of every row: [row * text, ...]."""
    return {name: value.expand(-1, texts, *value.shape[2:]).flatten(0, 1) for name, value in values.items()}


def _call(block: Block, slab: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """A slab through a block under values for every row."""
    with assigned(block, _each(values, slab.shape[1])):
        out = through(block, slab.flatten(0, 1))
    if out.dtype != slab.dtype:
        raise ValueError(f"{type(block).__name__} returned {out.dtype}; expected {slab.dtype}, as the weights are.")
    return out.view_as(slab)


def leaves_at(run: Mapping[str, Tensor]) -> int:
    """The first block that a run names; -1 where it names what comes before all blocks."""
    return min(map(block_of, run))


def primal(x: Tensor) -> Tensor:
    """A tensor without its tangent."""
    return forward_ad.unpack_dual(x).primal


def largest_normed(dtype: torch.dtype, width: int) -> float:
    """Numbers up to this size can be squared and added up by a norm layer of that width, which never does it in less
    than float32."""
    return math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max / width) / 2


def slab_tokens(device: torch.device) -> int:
    """How many tokens go through a block together."""
    return CPU_SLAB if device.type == "cpu" else GPU_SLAB
