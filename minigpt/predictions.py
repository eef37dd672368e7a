"""What the unembedding makes of two streams: next-token distributions, compared position by position.

Logits are [row, position, vocab] and soon larger than everything else, so they come in chunks and
leave as numbers per position. Rows are runs: row 0 is the clean one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

CHUNK = 2**23
"""Logits that are held at once, a few times over: 64 MiB in float64."""
TOP = 10
"""How many of the likeliest tokens are kept."""
BETAS = (1e-2, 1e2)
"""Inverse temperatures that a fit may come to."""
FIT_STEPS, FIT_TOLERANCE = 100, 1e-10
"""Steps at the most, enough to halve the bracket of BETAS to rounding; a step this small, of log b, ends the fit."""


@dataclass(frozen=True)
class Predictions:
    """Next-token distributions beside the clean run's: [..., batch, position] each, 0 at the padding."""

    kl: Tensor
    """KL(clean, scaled) in nats."""
    loss: Tensor
    """-log probability of the text's next token, in nats; 0 at a text's last position, which has none."""
    entropy: Tensor
    """Of the distribution, in nats."""
    correlation: Tensor
    """Pearson's, of the logits with the clean ones, over the vocabulary."""
    clean_logit: Tensor
    """Mean of the clean logits under this distribution: with `entropy`, all that fitting a temperature takes."""
    likeliest: Tensor
    """The most likely next token: int64."""
    rank: Tensor
    """Of the text's next token, 1 being the most likely: int64; 0 at a text's last position."""
    top: Tensor
    """The `TOP` most likely tokens after each text's last one: int64 [..., batch, rank]."""
    top_probability: Tensor
    """Their probabilities: [..., batch, rank]."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Predictions":
        """The same with every tensor changed by a function."""
        return Predictions(*(function(tensor) for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def prediction_numbers(rows: int, tokens: int, vocab_size: int) -> int:
    """How many float64 numbers `predict` holds at its peak: logits of a chunk, what is made of them, the clean ones."""
    return 9 * min(max(CHUNK, vocab_size), rows * tokens * vocab_size) + 12 * rows * tokens


@torch.no_grad()
def predict(
    unembed: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor],
    streams: Tensor,
    ids: Tensor,
    lengths: Tensor,
) -> Predictions:
    """Compare every row's next-token distributions with row 0's.

    `streams` are [row, batch, position, n_embd] at the last depth, `ids` their texts [batch, position], `lengths`
    how many tokens of each are real. Returns tensors [row, batch, position] on the CPU.
    """
    rows, (batch, length) = len(streams), ids.shape
    following = torch.cat([ids[:, 1:], ids[:, :1]], 1).flatten()  # the last position has none, see below
    ends = (torch.arange(batch) * length + lengths.cpu() - 1).tolist()
    flat, numbers = streams.flatten(1, 2), torch.zeros(7, rows, batch * length, dtype=torch.float64)
    top = torch.zeros(rows, batch, min(TOP, _width(unembed, norm, flat)), dtype=torch.int64)
    probability = torch.zeros(top.shape, dtype=torch.float64)
    for tokens, group, clean, logits in _chunks(unembed, norm, flat):
        numbers[:, group, tokens] = _compared(clean, logits, following[tokens]).cpu()
        for text, end in enumerate(ends):
            if tokens.start <= end < tokens.stop:
                likely = logits[:, end - tokens.start].softmax(-1).topk(top.shape[-1])
                top[group, text], probability[group, text] = likely.indices.cpu(), likely.values.cpu()
    numbers, at = numbers.unflatten(2, (batch, length)), torch.arange(length)
    numbers.masked_fill_(at >= lengths.cpu()[:, None], 0.0)
    kl, loss, entropy, correlation, clean_logit, likeliest, rank = numbers
    for of_next in (loss, rank):
        of_next.masked_fill_(at >= lengths.cpu()[:, None] - 1, 0.0)
    whole = (likeliest.long(), rank.long(), top, probability)
    return Predictions(kl, loss, entropy, correlation, clean_logit, *whole)


def _width(unembed: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor], flat: Tensor) -> int:
    return unembed(norm(flat[:1, :1])).shape[-1]


def _chunks(
    unembed: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor], flat: Tensor
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Tokens, rows, the clean logits [token, vocab] and the rows' [row, token, vocab], float64, chunk by chunk."""
    at_once = max(1, CHUNK // _width(unembed, norm, flat))
    for start in range(0, flat.shape[1], at_once):
        tokens, clean = slice(start, min(start + at_once, flat.shape[1])), torch.empty(0)
        rows = max(1, at_once // (tokens.stop - start))
        for first in range(0, len(flat), rows):
            group = slice(first, min(first + rows, len(flat)))
            logits = unembed(norm(flat[group, tokens])).double()
            if first == 0:  # of the same product as the rows: what is equal stays equal to the bit
                clean = logits[0].clone()
            yield tokens, group, clean, logits


def _compared(clean: Tensor, logits: Tensor, following: Tensor) -> Tensor:
    """kl, loss, entropy, correlation, mean clean logit, likeliest token, rank of the next one: [7, row, token]."""
    log_p, log_q = clean.log_softmax(-1), logits.log_softmax(-1)
    q = log_q.exp()
    kl = torch.einsum("tv,rtv->rt", -log_p.exp(), log_q - log_p)
    log_next = log_q.gather(-1, following[None, :, None].expand(len(logits), -1, 1))
    loss, rank = -log_next.squeeze(-1), 1 + (log_q > log_next).sum(-1).double()
    entropy, clean_logit = -torch.einsum("rtv,rtv->rt", q, log_q), torch.einsum("rtv,tv->rt", q, clean)
    centred, other = clean - clean.mean(-1, keepdim=True), logits - logits.mean(-1, keepdim=True)
    spread = other.norm(dim=-1) * centred.norm(dim=-1)
    correlation = torch.einsum("rtv,tv->rt", other, centred) / spread.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.stack([kl, loss, entropy, correlation, clean_logit, logits.argmax(-1).double(), rank])


@dataclass(frozen=True)
class Temperatures:
    """How near a single temperature comes to each of some runs of a text: [run] each, float64."""

    temperature: Tensor
    """The one T for which softmax(clean logits / T) is nearest to the run's distributions."""
    kl: Tensor
    """KL(run, clean) in nats, mean over positions: the distance without a temperature."""
    kl_left: Tensor
    """KL(run, clean at that temperature) in nats, mean over positions: what no temperature explains."""


@torch.no_grad()
def fit_temperature(
    unembed: Callable[[Tensor], Tensor], final: Tensor, entropy: Tensor, clean_logit: Tensor
) -> Temperatures:
    """The single temperature that is nearest to each run's next-token distributions over a text.

    `final` is the clean stream after the final norm [position, n_embd], which `unembed` makes logits z of; `entropy`
    and `clean_logit` [run, position] are those fields of `Predictions`. With b = 1 / T the distance
    KL(q, softmax(b z)) = log sum exp(b z) - b E_q[z] - H(q) is convex in b, and its minimum is where the mean clean
    logit under both distributions is the same: the maximum-likelihood fit of an exponential family (the temperature
    as in Hinton et al. 2015, section 2). Newton's method finds it, and halves the bracket where a step would leave it.
    """
    q_mean, q_entropy = clean_logit.double().cpu().mean(1), entropy.double().cpu().mean(1)
    beta = torch.ones_like(q_mean)
    low, high = (torch.full_like(beta, bound) for bound in BETAS)
    at_1, _, _ = _moments(unembed, final, beta)
    for _ in range(FIT_STEPS):
        total, mean, variance = _moments(unembed, final, beta)
        slope = mean - q_mean
        low, high = beta.where(slope <= 0, low), beta.where(slope > 0, high)
        new = beta - slope / variance.clamp_min(torch.finfo(torch.float64).tiny)
        new = new.where((new >= low) & (new <= high), (low * high).sqrt())
        moved, beta = float((new / beta).log().abs().max()), new
        if moved < FIT_TOLERANCE:
            break
    total, _, _ = _moments(unembed, final, beta)
    kl, left = at_1 - q_mean - q_entropy, total - beta * q_mean - q_entropy
    return Temperatures(1 / beta, kl.clamp_min(0.0), left.clamp_min(0.0))


def _moments(unembed: Callable[[Tensor], Tensor], final: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over positions of log sum exp(b z), and of mean and variance of z under softmax(b z): [run] each."""
    sums = torch.zeros(3, len(beta), dtype=torch.float64)
    for chunk in final.split(max(1, CHUNK // unembed(final[:1]).shape[-1])):
        z = unembed(chunk).double()
        for run, b in enumerate(beta.tolist()):
            p = (b * z).softmax(-1)
            mean = (p * z).sum(-1)
            variance = (p * (z - mean[:, None]).square()).sum(-1)
            sums[:, run] += torch.stack([(b * z).logsumexp(-1).sum(), mean.sum(), variance.sum()]).cpu()
    total, mean, variance = sums / len(final)
    return total, mean, variance
