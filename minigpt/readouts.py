"""What to read from a run: logit differences, the logit lens, who wrote a logit, and what patches would do."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from minigpt.engine import padded
from minigpt.model import GPT2, Attention
from minigpt.parameters import block_of, check_clean, scaled
from minigpt.patching import record

SUM_TOLERANCE, SUM_ROUNDINGS = 1e-3, 16
"""Contributions may miss the logit by this share of their sizes, in float32 the rounding of hundreds of terms, and in
half types by so many roundings; a write that was not counted is larger."""


def logit_difference(logits: Tensor, answers: int | Sequence[int], foils: int | Sequence[int]) -> Tensor:
    """Mean logit of the answers minus mean logit of the foils: [..., vocab] -> [...].

    Raises ValueError for a token outside the vocabulary, and where there is none.
    """
    return _mean_logit(logits, answers) - _mean_logit(logits, foils)


def _mean_logit(logits: Tensor, tokens: int | Sequence[int]) -> Tensor:
    size, chosen = logits.shape[-1], torch.as_tensor(tokens).flatten().tolist()
    if not chosen or not all(type(token) is int and 0 <= token < size for token in chosen):
        raise ValueError(f"The tokens are {chosen}; expected some from 0 to {size - 1}.")
    return logits[..., chosen].mean(-1)


@torch.no_grad()
def logit_lens(model: GPT2, ids: Tensor | Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """The logits that every depth would give, through the model's own final norm: [batch, position, vocab], depth by
    depth (logit lens: nostalgebraist 2020). Those of the last depth are the model's own.

    `ids` is int64 [batch, position], or a list of texts, which are padded on the right.
    """
    for x in model.depths(padded(ids)[0].to(model.device)):
        yield model.unembed(model.final_norm(x))


@torch.no_grad()
def direct_attribution(
    model: GPT2, ids: Tensor | Sequence[Sequence[int]], tokens: Tensor, foils: Tensor | None = None
) -> dict[str, Tensor]:
    """What everything that writes into the stream adds to the logits of some tokens, directly.

    `tokens` is int64 [batch, position], or what broadcasts to that; with `foils` it is the difference of both tokens'
    logits. The final norm is taken as the linear map that it is at this run's own scale, so the contributions add up
    to the logit (direct logit attribution: Elhage et al. 2021; Wang et al. 2023). Under `embedding`, `blocks.L.mlp`
    and, for the heads together, `blocks.L.attention.head` there is [batch, position], of the heads [batch, position,
    n_head]. Biases stand under their own names: `blocks.L.attention.projection.bias`, `final_norm.bias`.

    Raises ValueError for a model that is not clean, for a final norm that is neither LayerNorm nor RMSNorm, and for
    blocks that write something else than what attention and MLP return.
    """
    check_clean(model)
    texts = padded(ids)[0].to(model.device)
    for wanted in (tokens, foils):
        _check_tokens(wanted, texts, model.config.vocab_size)
    unembedding = model.unembed.weight[tokens] - (0 if foils is None else model.unembed.weight[foils])
    x = model.last_depth(texts)
    unembedding = unembedding.expand_as(x)
    direction, bias = _through_norm(model.final_norm, x, unembedding)
    found = dict[str, Tensor]()
    for site, written in record(model, texts, ["embedding", *_writers(model)]).items():
        if site.endswith(".head"):
            found |= _of_heads(model, site, written, direction)
        else:
            found[site] = torch.linalg.vecdot(written, direction)
    if bias is not None:
        found["final_norm.bias"] = bias
    _check_sum(found, torch.linalg.vecdot(model.final_norm(x), unembedding))
    return found


def _check_tokens(tokens: Tensor | None, texts: Tensor, size: int) -> None:
    """Raise ValueError for what is no token id of every position of every text."""
    if tokens is None:
        return
    sizes = zip(reversed(tokens.shape), reversed(texts.shape), strict=False)
    fits = tokens.ndim in (0, 2) and all(found in (1, there) for found, there in sizes)
    if not fits or tokens.dtype != torch.int64 or not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(
            f"The tokens are {tokens!r}; expected int64 ids from 0 to {size - 1}: one, or [batch, position] for texts "
            f"{list(texts.shape)}."
        )


def _writers(model: GPT2) -> Iterator[str]:
    """The sites of what is written, block by block: heads, where attention is made of them as GPT-2's is."""
    for layer, block in enumerate(model.blocks):
        of_heads = type(block.attention).forward is Attention.forward
        yield f"blocks.{layer}.attention.head" if of_heads else f"blocks.{layer}.attention"
        yield f"blocks.{layer}.mlp"


def _of_heads(model: GPT2, site: str, z: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """What the heads of a layer, each through its own columns of the projection, and the projection's bias add."""
    projection = model.blocks[block_of(site)].attention.projection
    found = {site: torch.linalg.vecdot(z, (direction @ projection.weight).view_as(z))}
    if projection.bias is not None:
        found[f"{site.removesuffix('.head')}.projection.bias"] = direction @ projection.bias
    return found


def _through_norm(norm: nn.Module, x: Tensor, unembedding: Tensor) -> tuple[Tensor, Tensor | None]:
    """The final norm at the scale that it has on x, carried over to the other side: norm(x) . u = x . direction + bias.

    Both are of every position: [batch, position, n_embd] and [batch, position].
    """
    kind, known = type(norm).__name__, (nn.LayerNorm.forward, nn.RMSNorm.forward)
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm) or type(norm).forward not in known:
        raise ValueError(f"The final norm is {kind}; its scale can be held fixed only of LayerNorm and RMSNorm.")
    read = unembedding if norm.weight is None else unembedding * norm.weight
    if isinstance(norm, nn.RMSNorm):
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        return read * (x.square().mean(-1, keepdim=True) + eps).rsqrt(), None
    scale = (x.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
    bias = None if norm.bias is None else unembedding @ norm.bias
    return (read - read.mean(-1, keepdim=True)) * scale, bias


def _check_sum(found: dict[str, Tensor], logits: Tensor) -> None:
    """Raise ValueError where contributions do not add up to the logits."""
    terms = [of if of.ndim == logits.ndim else of.sum(-1) for of in found.values()]
    apart, size = (sum(terms) - logits).abs(), sum(of.abs() for of in terms)
    tolerance = max(SUM_TOLERANCE, SUM_ROUNDINGS * torch.finfo(logits.dtype).eps)
    if not bool((apart <= tolerance * size).all()):
        raise ValueError(
            f"The contributions miss the logits by up to {float(apart.max()):.3g}: the blocks write something else "
            "than what attention and MLP return, so nobody can be said to have written it."
        )


def attribution_patching(
    model: GPT2,
    ids: Tensor | Sequence[Sequence[int]],
    values: Mapping[str, Tensor],
    metric: Callable[[Tensor], Tensor],
    by_coordinate: bool = False,
) -> dict[str, Tensor]:
    """What patching every entry of some sites would do to a metric, to first order, from one derivative.

    `values` are what to patch with, by site, as `record` gives them, or what broadcasts to that. `metric` makes numbers
    of the logits [batch, position, vocab]; their sum is differentiated, by the sites' shifts. Returns, for every site,
    (value - clean) times the derivative, summed over the last axis: [batch, position], for heads [batch, position,
    n_head] (Nanda 2023, "Attribution patching"). With `by_coordinate` nothing is summed: at a site of neurons every
    neuron has its own, [batch, position, mlp_width]. It says nothing of what is not linear: compare it with `patch`.

    Raises ValueError as `record` does, for a model that is not clean, for values of another shape than the texts make,
    and for a metric that does not depend on the logits.
    """
    check_clean(model)
    texts = padded(ids)[0].to(model.device)
    clean = record(model, texts, values)
    for site, of in clean.items():
        sizes = zip(reversed(values[site].shape), reversed(of.shape), strict=False)
        if values[site].ndim > of.ndim or any(given not in (1, there) for given, there in sizes):
            raise ValueError(
                f"The values for {site} have the shape {list(values[site].shape)}; "
                f"expected one that broadcasts to {list(of.shape)}."
            )
    with torch.inference_mode(mode=False), torch.enable_grad():
        shifts = {site: torch.zeros_like(of).requires_grad_() for site, of in clean.items()}
        with scaled(model, {f"{site}_shift": shift for site, shift in shifts.items()}):
            total = torch.as_tensor(metric(model(texts.clone()))).sum()
        if not total.requires_grad:
            raise ValueError("The metric does not depend on the logits; give a function that is made of them.")
        gradients = torch.autograd.grad(total, list(shifts.values()), materialize_grads=True)
    found = {site: (values[site] - clean[site]) * gradient for site, gradient in zip(clean, gradients, strict=True)}
    return found if by_coordinate else {site: of.sum(-1) for site, of in found.items()}
