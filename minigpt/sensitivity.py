"""The infinitesimal sweep: how every measure starts to move when a scale leaves 1.

Forward-mode differentiation through the scales: a scale is a dual number 1 + e, and every stream comes with its
derivative J. A scale is a run like any other, with J in the place of the difference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minigpt.engine import Job
from minigpt.measures import MEASURES, Labels, Measure, PositionSet, Result, inner_products, squared_norms
from minigpt.model import GPT2
from minigpt.parameters import Native, natives, parameter_name, sites_of
from minigpt.passes import Cells, Progress, run
from minigpt.predictions import CHUNK, Predictions

NONE: tuple[Measure, ...] = ("changed", "cosine")
"""The measures that have no derivative: a count; and one whose first is 0, and whose second is the square of
`gauge_free`'s."""
SENSITIVITIES: tuple[Measure, ...] = tuple(name for name in MEASURES if name not in NONE)


DEFAULT_SITES = ("output", "attention", "mlp")


@dataclass(frozen=True)
class Scale:
    """One scale of a model."""

    layer: int
    site: str
    index: int | None = None
    """Of the site's entry, such as a head, where the site has several."""


@dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """How measures start to move with log s, for every scale s of a model by itself.

    In its statistics J = dx / dlog s stands for the difference: near s = 1 the run's stream is x + J log s.
    """

    scales: tuple[Scale, ...]
    counted: Mapping[str, str]
    """What the index of a site counts, for every site that has one: {"head": "head"}."""

    @property
    def axes(self) -> tuple[Labels, ...]:
        """The scales: layer, site, and a column for all that indices count, empty where a site has no such index."""
        words = dict.fromkeys(self.counted.values())
        return ([{"layer": of.layer, "site": of.site, **self._entry(of, words)} for of in self.scales],)

    def _entry(self, scale: Scale, words: Iterable[str]) -> dict[str, Any]:
        return {word: scale.index if self.counted.get(scale.site) == word else "" for word in words}

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The measures that have a derivative."""
        return SENSITIVITIES

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
        return super().measure(name, positions)


def sensitivity(
    model: GPT2,
    ids: Tensor | Sequence[Sequence[int]],
    sites: Iterable[str] = DEFAULT_SITES,
    max_bytes: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Differentiate texts' streams and predictions with respect to log s of every scale, at s = 1.

    `ids`, `max_bytes` and `progress` are as in `sweep`. A site with an index adds all its entries: every head.

    Raises ValueError for a site that does not exist, ids out of range, a model that is not clean, and when
    `max_bytes` is too little for a single scale.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("PyTorch takes no derivatives in inference mode; use torch.no_grad() in its place.")
    chosen = [sites] if isinstance(sites, str) else list(sites)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"The sites are {chosen}; expected different ones of {', '.join(sites_of(model))}, at least one."
        )
    declared = {site: natives(model)[parameter_name(model, 0, site)] for site in chosen}
    entries = {site: range(of.entries(model.config)) if of.index else (None,) for site, of in declared.items()}
    layers = range(model.config.n_layer)
    scales = tuple(Scale(layer, site, index) for layer in layers for site in chosen for index in entries[site])
    counted = {site: of.index for site, of in declared.items() if of.index}
    with forward_ad.dual_level():
        runs = [{parameter_name(model, of.layer, of.site): _dual(model, declared[of.site], of.index)} for of in scales]
        job = Job.checked(model, ids, runs, _derivatives, tangents=True, named="scale {}".format)
        statistics = run(job, Cells.in_a_row(len(scales)), max_bytes, progress)
    return Sensitivity(job.ids.cpu(), statistics, scales, counted)


def _dual(model: GPT2, native: Native, index: int | None) -> Tensor:
    """The neutral value of a scale, or of one entry of it, with derivative 1."""
    one = native.neutral_value(model.config).to(model.device, model.dtype)
    tangent = torch.ones_like(one)
    if index is not None:
        tangent = torch.zeros_like(one).index_fill_(0, torch.tensor([index], device=model.device), 1)
    return forward_ad.make_dual(one, tangent)


def _derivatives(model: GPT2, dual: Tensor, ids: Tensor, lengths: Tensor) -> Predictions:
    """Of every row: Fisher information as `kl`, the loss's derivative, the second derivative of the correlation."""
    rows, following = len(dual), torch.cat([ids[:, 1:], ids[:, :1]], 1).flatten()  # the last has none, see below
    flat, parts = dual.flatten(1, 2), list[Tensor]()
    at_once = max(1, CHUNK // (rows * model.config.vocab_size))
    for start in range(0, flat.shape[1], at_once):
        tokens = slice(start, start + at_once)
        z, dz = (of.double() for of in forward_ad.unpack_dual(model.unembed(model.final_norm(flat[:, tokens]))))
        p = z.softmax(-1)
        mean = (p * dz).sum(-1, keepdim=True)
        fisher = (p * (dz - mean).square()).sum(-1)
        loss = mean.squeeze(-1) - dz.gather(-1, following[tokens][None, :, None].expand(rows, -1, 1)).squeeze(-1)
        centred, moved = z - z.mean(-1, keepdim=True), dz - dz.mean(-1, keepdim=True)
        spread = squared_norms(centred).clamp_min(torch.finfo(torch.float64).tiny)  # 0 / 0 shall be 0
        along = inner_products(centred, moved).square() / spread
        parts.append(torch.stack([fisher, loss, -(squared_norms(moved) - along) / spread]))
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    fisher, loss, correlation = torch.cat(parts, -1).unflatten(-1, ids.shape).cpu().masked_fill(padding, 0.0)
    loss[:, torch.arange(len(ids)), lengths - 1] = 0.0
    no_token = torch.zeros(rows, len(ids), 1)
    none = dict.fromkeys(("top", "top_probability"), no_token) | dict.fromkeys(
        ("entropy", "clean_logit", "likeliest", "rank"), torch.zeros_like(fisher)
    )
    return Predictions(kl=fisher, loss=loss, correlation=correlation, **none)
