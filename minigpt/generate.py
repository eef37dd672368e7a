"""Greedy and sampled decoding with a key-value cache."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minigpt.cache import KeyValueCache
from minigpt.model import GPT2
from minigpt.parameters import current, not_neutral


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
    and when the scales change before the last id was taken.
    """
    _check(model, ids, max_new_tokens, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    cache = KeyValueCache(len(ids) + max_new_tokens) if cached else None

    def choose(logits: Tensor) -> int:
        return int(logits.argmax()) if temperature == 0 else _draw(logits / temperature, top_k, top_p, generator)

    return _continue(model, ids, max_new_tokens, cache, choose, list(current(model).values()))


def _continue(
    model: GPT2,
    ids: list[int],
    count: int,
    cache: KeyValueCache | None,
    choose: Callable[[Tensor], int],
    scales: list[Tensor],
) -> Iterator[int]:
    device = model.device
    read = torch.tensor([ids], device=device)
    for _ in range(count):
        if not all(now is then for now, then in zip(current(model).values(), scales, strict=True)):
            raise ValueError("The scales changed while a text was generated; take all ids inside the `with scaled`.")
        with torch.no_grad():
            logits = model.unembed(model.final_norm(model.last_depth(read, cache)[0, -1]))
        token = choose(logits.float().cpu())
        yield token
        if token == model.config.eos_token_id:
            return
        new = torch.tensor([[token]], device=device)
        read = torch.cat([read, new], dim=1) if cache is None else new


def _draw(logits: Tensor, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> int:
    ordered, tokens = logits.sort(descending=True, stable=True)
    probabilities = ordered[:top_k].softmax(0)
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities[before < top_p]
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def _check(
    model: GPT2, ids: list[int], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
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
    for name, value in not_neutral(model).items():
        if value.ndim > 1 and max(value.shape[:-1]) > 1:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, other values for other rows or positions; "
                "generation needs one value for all."
            )
