"""The infinitesimal sweep: how every measure starts to move when a scale leaves 1.

Forward-mode differentiation through the scales: a scale is a dual number 1 + e, and every stream comes
with its derivative J. The runs of many sites are rows of one batch, one site each, so a few passes give
the whole table of layers and sites.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minigpt.engine import rows_at_once
from minigpt.measures import MEASURES, Measure, PositionSet, Statistics, inner_products, squared_norms
from minigpt.model import GPT2, Block
from minigpt.parameters import not_neutral, parameter_name, scaled
from minigpt.predictions import CHUNK, Predictions
from minigpt.sweep import padded

NONE: tuple[Measure, ...] = ("changed", "cosine")
"""The measures that have no derivative: a count; and one whose first is 0, and whose second is `gauge_free`'s "
"square."""
SENSITIVITIES: tuple[Measure, ...] = tuple(name for name in MEASURES if name not in NONE)


class Scale(NamedTuple):
    """One scale of a model."""

    layer: int
    site: str
    head: int | None = None


@dataclass(frozen=True)
class Sensitivity:
    """How measures start to move with log s, for every scale s of a model by itself."""

    scales: tuple[Scale, ...]
    _statistics: Statistics
    """With J = dx / dlog s in the place of the difference, for near s = 1 the scaled stream is x + J log s."""

    def measure(self, name: Measure, positions: PositionSet) -> Tensor:
        """A measure's derivative at s = 1, per unit of log s: [scale, place, batch], places as in `Statistics`.

        `frobenius`, `relative`, `passive`, `gauge_free` and what is `written` are norms: 0 at s = 1, they grow with
        abs(log s) at the rate given here. `loss_change` moves through 0: its derivative. `kl` and `correlation`
        start flat, for they are at their best at s = 1: given is the second derivative, and kl is about
        value (log s)^2 / 2; that is the Fisher information of log s (Kullback and Leibler 1951, section 6). An
        `alignment` is the cosine's limit.

        Raises ValueError for a measure that has no derivative, and for an empty set of positions.
        """
        if name not in SENSITIVITIES:
            raise ValueError(f"{name!r} has no sensitivity; expected one of {', '.join(SENSITIVITIES)}.")
        return self._statistics.measure(name, positions)[:, 0]


@torch.no_grad()  # which stops backward derivatives only
def sensitivity(
    model: GPT2,
    ids: Tensor | Sequence[Sequence[int]],
    sites: Iterable[str] = ("output", "attention", "mlp"),
    max_bytes: int | None = None,
) -> Sensitivity:
    """Differentiate texts' streams and predictions with respect to log s of every scale, at s = 1.

    `ids` are texts as `sweep` takes them. The site `head` adds every head of every layer. `max_bytes` bounds a pass.

    Raises ValueError for a site that does not exist, ids out of range, a model whose scales are not 1, and when
    `max_bytes` is too little for a single scale.
    """
    ids, lengths = padded(ids)
    model.config.check_ids(ids)
    if changed := not_neutral(model):
        raise ValueError(f"The derivatives are taken at 1; set {', '.join(changed)} back to 1.")
    scales = _scales(model, list(sites))
    device = model.device
    at_once = rows_at_once(model, ids.numel(), max_bytes, streams=2)
    parts = [
        _differentiate(model, ids.to(device), lengths, scales[start : start + at_once])
        for start in range(0, len(scales), at_once)
    ]
    return Sensitivity(scales, _as_statistics(scales, lengths, parts))


def _as_statistics(
    scales: Sequence[Scale], lengths: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Statistics:
    """What `_differentiate` gave for all scales, with derivatives where a sweep has differences."""
    numbers = torch.cat([part[0] for part in parts], 1)[:, :, None]
    predicted = torch.cat([part[1] for part in parts], 1)[:, :, None]
    change, along, written, clean = numbers[0], numbers[1], numbers[2:], parts[0][2]
    layers = torch.tensor([scale.layer for scale in scales])
    # The jump at the site is not a write that answers to anything.
    answers = (torch.arange(len(clean)) > layers[:, None] + 1)[:, None, :, None, None]
    flat = Predictions(**{field.name: torch.zeros(1) for field in fields(Predictions)})
    fisher, loss, correlation = predicted
    return Statistics(
        tuple(layers.tolist()),
        difference_sq=change,
        run_sq=clean.expand_as(change),
        inner=clean + along,
        clean_sq=clean,
        lengths=lengths,
        written=written * answers,
        predictions=replace(flat, kl=fisher, loss=loss, correlation=correlation),
        clean_predictions=flat,
    )


def _scales(model: GPT2, sites: Sequence[str]) -> tuple[Scale, ...]:
    if not sites or len(set(sites)) < len(sites):
        raise ValueError(f"The sites are {sites}; expected different ones ones, at least one.")
    heads = {site: range(model.config.n_head) if site == "head" else (None,) for site in sites}
    layers = range(model.config.n_layer)
    return tuple(Scale(layer, site, head) for layer in layers for site in sites for head in heads[site])


def _differentiate(model: GPT2, ids: Tensor, lengths: Tensor, scales: Sequence[Scale]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch with a row for every scale: see `_numbers` [7, row, place, batch, position]; of predictions [3, row,
    batch, position]; and x.x [place, batch, position]."""
    rows, padding = len(scales), torch.arange(ids.shape[1]) >= lengths[:, None]
    numbers, norms, before = list[Tensor](), list[Tensor](), torch.empty(0)
    with forward_ad.dual_level(), scaled(model, _dual_scales(model, scales, len(ids))):
        for depth, stream in enumerate(model.depths(ids.repeat(rows, 1))):
            dual = stream.expand(rows * len(ids), -1, -1)
            x, j = _unpacked(dual, rows)
            numbers.append(_numbers(x, j, *(_writes(model.blocks[depth - 1], before, j, rows) if depth else ())))
            norms.append(squared_norms(x[0]))
            before = dual
        x, j = _unpacked(model.final_norm(dual), rows)
        numbers.append(_numbers(x, j))
        norms.append(squared_norms(x[0]))
        predicted = torch.cat(list(_predictions(model, dual, ids, rows)), -1).unflatten(-1, ids.shape)
    predicted[1, :, torch.arange(len(ids)), lengths - 1] = 0.0
    whole = torch.stack(numbers, 2).cpu().masked_fill(padding, 0.0)
    return whole, predicted.cpu().masked_fill(padding, 0.0), torch.stack(norms).cpu().masked_fill(padding, 0.0)


def _writes(block: Block, before: Tensor, after: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """J before a block, and the derivatives of its attention write and its MLP write: [row, batch, position, n_embd].

    True of blocks after the site, whose own scales are 1.
    """
    _, carried = _unpacked(before, rows)
    _, attention = _unpacked(block.attention(block.attention_norm(before)), rows)
    return carried, attention, after - carried - attention


def _numbers(x: Tensor, j: Tensor, *writes: Tensor) -> Tensor:
    """J.J, x.J, and of what a block carries and writes the products that `WRITTEN` names, 0 where no block stands:
    [7, row, batch, position]."""
    carried, a, m = writes or [torch.zeros_like(j)] * 3
    pairs = ((j, j), (x, j), (a, a), (m, m), (a, m), (carried, a), (carried, m))
    return torch.stack([inner_products(*pair) for pair in pairs])


def _dual_scales(model: GPT2, scales: Sequence[Scale], batch: int) -> dict[str, Tensor]:
    """Every scale that is asked for: 1 in all rows, with derivative 1 in its own."""
    tangents = dict[str, Tensor]()
    for row, scale in enumerate(scales):
        width = 1 if scale.head is None else model.config.n_head
        shape = (len(scales), batch, 1, width)
        tangent = tangents.setdefault(
            parameter_name(model, scale.layer, scale.site), torch.zeros(shape, dtype=model.dtype, device=model.device)
        )
        tangent[row, :, :, scale.head or 0] = 1
    return {
        name: forward_ad.make_dual(torch.ones_like(tangent.flatten(0, 1)), tangent.flatten(0, 1))
        for name, tangent in tangents.items()
    }


def _unpacked(dual: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A stream and its derivative: [row, batch, position, n_embd] each, float64."""
    primal, tangent = forward_ad.unpack_dual(dual)
    tangent = torch.zeros_like(primal) if tangent is None else tangent
    return primal.unflatten(0, (rows, -1)).double(), tangent.unflatten(0, (rows, -1)).double()


def _predictions(model: GPT2, dual: Tensor, ids: Tensor, rows: int) -> Iterator[Tensor]:
    """Of some positions at a time: Fisher information, d loss, second derivative of correlation: [3, row, token]."""
    following = torch.cat([ids[:, 1:], ids[:, :1]], 1).flatten()  # the last position's counts nowhere
    flat = dual.unflatten(0, (rows, -1)).flatten(1, 2)
    at_once = max(1, CHUNK // (rows * model.config.vocab_size))
    for start in range(0, flat.shape[1], at_once):
        tokens = slice(start, start + at_once)
        z, dz = _unpacked(model.unembed(model.final_norm(flat[:, tokens])), rows)
        z, dz = z.flatten(1, 2), dz.flatten(1, 2)
        p = z.softmax(-1)
        mean = (p * dz).sum(-1, keepdim=True)
        fisher = (p * (dz - mean).square()).sum(-1)
        loss = mean.squeeze(-1) - dz.gather(-1, following[tokens][None, :, None].expand(rows, -1, 1)).squeeze(-1)
        centred, moved = z - z.mean(-1, keepdim=True), dz - dz.mean(-1, keepdim=True)
        along = inner_products(centred, moved).square() / squared_norms(centred)
        yield torch.stack([fisher, loss, -(squared_norms(moved) - along) / squared_norms(centred)])
