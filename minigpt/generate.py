"""Greedy and sampled decoding with a key-value cache."""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minigpt.cache import KeyValueCache
from minigpt.engine import is_a_text
from minigpt.model import GPT2
from minigpt.parameters import TEXT_AXES, current, natives, not_neutral

logger = logging.getLogger("minigpt")


def generate(
    model: GPT2,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    cached: bool = True,
) -> Iterator[int]:
    """Yield the ids that continue `ids`, one by one, up to and including the end-of-text id.

    Temperature 0 takes the likeliest token; above 0 the logits are divided by it and a token is
    drawn, from the `top_k` likeliest, and from the fewest whose probabilities reach `top_p`
    (Holtzman et al. 2020, section 3.1). With and without the cache the ids are the same, under any
    scale.

    Raises ValueError for settings out of range, for a text that would outgrow the model's
    positions, for a scale that differs between rows or positions, which new positions do not have,
    when the scales change before the last id was taken, and when a logit is not finite.
    An end-of-text id outside the vocabulary ends nothing, which the logger `minigpt` says.
    """
    _check(model, ids, max_new_tokens, temperature, top_k, top_p, seed)
    end, size = model.config.eos_token_id, model.config.vocab_size
    if end is not None and end >= size:
        logger.warning(
            "eos_token_id is %d, outside the vocabulary of %d tokens; no token will end the text.", end, size
        )
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    cache = KeyValueCache(len(ids) + max_new_tokens) if cached else None

    def choose(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        # In float64 and below the largest, so that no temperature is too small to divide by.
        return _draw((logits.double() - logits.max()) / temperature, top_k, top_p, generator)

    return _continue(model, ids, max_new_tokens, cache, choose, list(current(model).values()))


def _continue(
    model: GPT2,
    ids: list[int],
    count: int,
    cache: KeyValueCache | None,
    choose: Callable[[Tensor], int],
    values: list[Tensor | None],
) -> Iterator[int]:
    device = model.device
    read, text = torch.tensor([ids], device=device), list(ids)
    for _ in range(count):
        if not all(now is then for now, then in zip(current(model).values(), values, strict=True)):
            raise ValueError(
                "The native parameters changed while a text was generated; take all ids inside the `with scaled`."
            )
        logits, sound = _read(model, read, cache)
        if not sound:
            raise ValueError(_not_finite(model, torch.tensor([text], device=device)))
        token = choose(logits.float().cpu())
        text.append(token)
        yield token
        if token == model.config.eos_token_id:
            return
        new = torch.tensor([[token]], device=device)
        read = torch.cat([read, new], dim=1) if cache is None else new


@torch.no_grad()
def _read(model: GPT2, ids: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, bool]:
    """The logits after the last of these ids, and whether all on the way to them was finite."""
    sound = torch.tensor(True, device=ids.device)
    for x in model.depths(ids, cache):
        sound &= _squares(x).isfinite().all()
    logits = model.unembed(model.final_norm(x[0, -1]))
    return logits, bool(sound & logits.isfinite().all())


def _squares(x: Tensor) -> Tensor:
    """What a norm layer divides by, but for a root: where they overflow, it makes finite numbers that are wrong."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1)


@torch.no_grad()
def _not_finite(model: GPT2, ids: Tensor) -> str:
    """Where a run of these ids stops being finite, and what to do."""
    broken = (depth for depth, x in enumerate(model.depths(ids)) if not _squares(x).isfinite().all())
    depth, changed = next(broken, None), ", ".join(not_neutral(model))
    what = "the logits" if depth is None else f"the squares of the stream at depth {depth}"
    then = f"under {changed}; take smaller values, or" if changed else "in the clean run; take"
    return f"After {ids.shape[1]} tokens {what} are no longer finite {then} float64."


def _draw(logits: Tensor, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> int:
    ordered, tokens = logits.sort(descending=True, stable=True)
    probabilities = ordered[:top_k].softmax(0)
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities[before < top_p]
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def _check(
    model: GPT2,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    if not is_a_text(ids):
        raise ValueError(
            f"The prompt is a {type(ids).__name__}; expected a list of token ids, such as tokenizer.encode(text)."
        )
    room = model.config.n_positions - len(ids)
    if not ids:
        raise ValueError("The prompt is empty; give at least one token, such as <|endoftext|>.")
    if max_new_tokens < 1 or max_new_tokens > room:
        raise ValueError(
            f"{max_new_tokens} new tokens were asked for after {len(ids)}; the model has "
            f"{model.config.n_positions} positions, so ask for 1 to {room}."
            if room > 0
            else f"The prompt has {len(ids)} tokens; the model has {model.config.n_positions} positions: shorten it."
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or a finite number above.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a share above 0, up to 1.")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; expected an integer of at most 64 bits.")
    for name, value in not_neutral(model).items():
        words = natives(model)[name].shape
        behind = zip(reversed(value.shape), reversed(words), strict=False)
        if any(size > 1 and word in TEXT_AXES for size, word in behind):
            raise ValueError(
                f"{name} has shape {list(value.shape)}, other values for other rows or positions; "
                "generation needs one value for all."
            )
