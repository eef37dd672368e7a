"""Decoding: the cache changes the speed, never the ids."""

from collections.abc import Callable

import pytest
import torch

from minigpt import GPT2, Block, GPT2Config, generate, scaled
from minigpt.parameters import not_neutral
from minigpt.parity import next_token_loss
from tests.blocks import BLOCKS, Parallel, Rotary, RotaryAttention
from tests.conftest import SMALL

PROMPT = [5, 17, 3]


@pytest.fixture
def model(small: Callable[..., GPT2]) -> GPT2:
    """Untied, or a random model would say the same token for ever."""
    return small(tie_word_embeddings=False)


SCALES = {
    "clean": {},
    "output": {"blocks.1.output_scale": 0.5},
    "attention": {"blocks.2.attention_scale": -1.0},
    "heads": {"blocks.0.attention.head_scale": torch.tensor([0.0, 2.0, 1.0])},
    "skipped block": {"blocks.3.attention_scale": 0.0, "blocks.3.mlp_scale": 0.0},
}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_and_uncached_give_the_same_ids(model: GPT2, scales: str, temperature: float) -> None:
    with scaled(model, SCALES[scales]):
        cached, uncached = (
            list(generate(model, PROMPT, 20, temperature, seed=3, cached=cached)) for cached in (True, False)
        )
    assert cached == uncached
    assert len(cached) == 20


@pytest.mark.parametrize("scales", ["clean", "output", "heads"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_generates_the_same_with_and_without_a_cache(
    small: Callable[..., GPT2], block: type[Block], scales: str
) -> None:
    model = small(block=block, tie_word_embeddings=False)
    with scaled(model, SCALES[scales]):
        cached, uncached = (list(generate(model, PROMPT, 20, cached=cached)) for cached in (True, False))
    assert cached == uncached
    assert len(set(cached)) > 2


def test_a_rotation_that_forgets_where_it_is_gives_other_ids(small: Callable[..., GPT2]) -> None:
    class Forgetful(RotaryAttention):
        def heads(self, x: torch.Tensor, start: int = 0) -> list[torch.Tensor]:
            return super().heads(x)

    class ForgetfulRotary(Rotary):
        attention_class = Forgetful

    model = small(block=ForgetfulRotary, tie_word_embeddings=False)
    cached, uncached = (list(generate(model, PROMPT, 20, cached=cached)) for cached in (True, False))
    assert cached != uncached


@pytest.mark.parametrize("block", [Block, *BLOCKS])
def test_every_block_can_be_trained(block: type[Block], ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**SMALL), block)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = list[float]()
    for _ in range(20):
        loss = next_token_loss(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    unused = {name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None}
    assert all(block is Parallel and "mlp_norm" in name for name in unused)
    assert losses[-1] < 0.5 * losses[0]
    assert not not_neutral(model)


def test_scales_reach_the_generated_text(model: GPT2) -> None:
    clean = list(generate(model, PROMPT, 20))
    with scaled(model, SCALES["output"]):
        assert list(generate(model, PROMPT, 20)) != clean


def test_greedy_takes_the_likeliest_token_each_time(model: GPT2) -> None:
    ids = list(PROMPT)
    for token in generate(model, PROMPT, 12):
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)


def test_a_seed_repeats_and_another_does_not(model: GPT2) -> None:
    draws = [list(generate(model, PROMPT, 20, 1.5, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_the_first_of_top_k_or_a_tiny_top_p_is_greedy(model: GPT2) -> None:
    greedy = list(generate(model, PROMPT, 15))
    assert list(generate(model, PROMPT, 15, 2.0, top_k=1, seed=0)) == greedy
    assert list(generate(model, PROMPT, 15, 2.0, top_p=1e-9, seed=0)) == greedy


def test_draws_follow_the_distribution_within_top_k(model: GPT2) -> None:
    probabilities = (model(torch.tensor([PROMPT]))[0, -1] / 5).softmax(0)
    top = probabilities.topk(3)
    drawn = torch.tensor([next(generate(model, PROMPT, 1, 5.0, top_k=3, seed=seed)) for seed in range(600)])
    assert set(drawn.tolist()) == set(top.indices.tolist())
    for token, expected in zip(top.indices, top.values / top.values.sum(), strict=True):
        share = (drawn == token).double().mean()
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 600).sqrt()  # four standard errors


def test_the_end_of_text_ends_the_text(small: Callable[..., GPT2], model: GPT2) -> None:
    endless = list(generate(model, PROMPT, 20))
    last = next(i for i, token in enumerate(endless) if i and token not in endless[:i])
    ending = small(tie_word_embeddings=False, eos_token_id=endless[last])
    assert list(generate(ending, PROMPT, 20)) == endless[: last + 1]


def test_an_end_outside_the_vocabulary_ends_nothing_and_is_said_once(
    small: Callable[..., GPT2], model: GPT2, caplog: pytest.LogCaptureFixture
) -> None:
    odd = small(tie_word_embeddings=False, eos_token_id=50256, bos_token_id=50256)
    assert caplog.messages == [], "nothing but a generated text needs it"
    assert list(generate(odd, PROMPT, 20)) == list(generate(model, PROMPT, 20))
    assert caplog.messages == [
        "eos_token_id is 50256, outside the vocabulary of 97 tokens; no token will end the text."
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("factor", [1e20, -1e38])
def test_numbers_that_are_not_finite_are_a_sentence_and_no_token(
    small: Callable[..., GPT2], temperature: float, factor: float
) -> None:
    """At 1e20 the squares alone overflow, and the norm layers would make finite numbers of them, all wrong."""
    model = small(tie_word_embeddings=False, dtype=torch.float32)
    with scaled(model, {"blocks.1.output_scale": factor}):
        new = generate(model, PROMPT, 5, temperature, seed=0)
        said = (
            r"After 3 tokens the squares of the stream at depth 2 are no longer finite under blocks\.1\.output_scale;"
        )
        with pytest.raises(ValueError, match=said):
            next(new)


def test_an_overflow_that_comes_later_names_how_many_tokens_were_read(small: Callable[..., GPT2]) -> None:
    model = small(tie_word_embeddings=False)
    expected = list(generate(model, PROMPT, 5))
    with torch.no_grad():
        model.position_embedding.weight[len(PROMPT) + 2] = torch.inf
    new = generate(model, PROMPT, 5)
    assert [next(new) for _ in range(3)] == expected[:3]
    with pytest.raises(ValueError, match=r"After 6 tokens .* at depth 0 are no longer finite in the clean run"):
        next(new)


def test_an_unembedding_that_overflows_is_not_blamed_on_the_stream(small: Callable[..., GPT2]) -> None:
    model = small(tie_word_embeddings=False, dtype=torch.float32)
    with torch.no_grad():
        model.unembed.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"the logits are no longer finite in the clean run; take float64\."):
        next(generate(model, PROMPT, 5))


def test_a_temperature_too_small_to_divide_by_takes_the_likeliest_token(model: GPT2) -> None:
    greedy = list(generate(model, PROMPT, 10))
    for temperature in (1e-30, 5e-324):
        assert list(generate(model, PROMPT, 10, temperature, seed=0)) == greedy


@pytest.mark.parametrize(
    ("ids", "settings", "said"),
    [
        ([], {}, "empty"),
        (PROMPT, {"max_new_tokens": 22}, "ask for 1 to 21"),
        ([1] * 24, {}, "shorten"),
        (PROMPT, {"temperature": -1.0}, "temperature"),
        (PROMPT, {"temperature": float("nan")}, "temperature"),
        (PROMPT, {"top_k": 0}, "top_k"),
        (PROMPT, {"top_p": 1.5}, "top_p"),
        (PROMPT, {"seed": 2**70}, "at most 64 bits"),
    ],
)
def test_settings_out_of_range_are_refused(model: GPT2, ids: list[int], settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generate(model, ids, **{"max_new_tokens": 5, **settings})  # at the call, not at the first id


def test_a_scale_that_differs_by_position_is_refused(model: GPT2) -> None:
    with scaled(model, {"blocks.1.output_scale": torch.rand(1, 3, 1)}), pytest.raises(ValueError, match="one value"):
        generate(model, PROMPT, 5)


def test_scales_that_change_on_the_way_are_refused(model: GPT2) -> None:
    with scaled(model, SCALES["output"]):
        new = generate(model, PROMPT, 5)
        next(new)
    with pytest.raises(ValueError, match="inside the `with scaled`"):
        next(new)
