"""What is read from a run: each readout beside its definition, written out."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minigpt import (
    GPT2,
    Block,
    attribution_patching,
    direct_attribution,
    logit_difference,
    logit_lens,
    patch,
    record,
    scaled,
)
from tests.blocks import Parallel, RMSNorm
from tests.conftest import SMALL

SAME = {"rtol": 1e-12, "atol": 1e-12}
OTHER = torch.randint(SMALL["vocab_size"], (2, 10), generator=torch.Generator().manual_seed(2))


def test_a_logit_difference_is_of_two_tokens_or_of_two_means() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0, 8.0], [3.0, 0.0, 5.0, 1.0]])
    assert logit_difference(logits, 3, 0).tolist() == [7.0, -2.0]
    assert logit_difference(logits, [1, 2], [0, 3]).tolist() == [-1.5, 0.5]
    for tokens, said in (
        ([], "The tokens are []"),
        (4, "The tokens are [4]; expected some from 0 to 3"),
        ([5], "[5]"),
        ([-1], "[-1]"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            logit_difference(logits, 0, tokens)


# The lens.


def test_the_lens_reads_every_depth_through_the_final_norm_and_ends_with_the_models_own_logits(
    model: GPT2, ids: Tensor
) -> None:
    found = list(logit_lens(model, ids))
    assert len(found) == 5 and not found[0].requires_grad
    norm, weight = model.final_norm, model.unembed.weight
    for depth, (logits, x) in enumerate(zip(found, model.residuals(ids), strict=True)):
        centred = x - x.mean(-1, keepdim=True)
        final = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(logits, final @ weight.T, **SAME, msg=f"depth {depth}")
    assert torch.equal(found[-1], model(ids))
    assert not torch.allclose(found[-2], found[-1], rtol=1e-2)


def test_the_lens_reads_texts_of_several_lengths(model: GPT2) -> None:
    for together, alone in zip(logit_lens(model, [[1, 2, 3], [4, 5]]), logit_lens(model, [[4, 5]]), strict=True):
        torch.testing.assert_close(together[1, :2], alone[0], **SAME)


# Direct attribution.


def summed(found: dict[str, Tensor]) -> Tensor:
    return sum((of.sum(-1) if of.ndim == 3 else of for of in found.values()), torch.zeros(()))


@pytest.mark.parametrize("block", [Block, Parallel, RMSNorm])
@pytest.mark.parametrize("foils", [None, torch.tensor([[11], [40]])])
def test_contributions_add_up_to_the_logits(
    small: Callable[..., GPT2], ids: Tensor, block: type[Block], foils: Tensor | None
) -> None:
    model, tokens = small(block=block, tie_word_embeddings=False), OTHER
    found = direct_attribution(model, ids, tokens, foils)
    logits = model(ids).detach()
    expected = logits.gather(-1, tokens[..., None])[..., 0]
    if foils is not None:
        expected = expected - logits.gather(-1, foils.expand(2, 10)[..., None])[..., 0]
    torch.testing.assert_close(summed(found), expected, **SAME)
    names = ["embedding"]
    for layer in range(4):
        of_block = ("attention.head", "attention.projection.bias", "mlp")
        names += [f"blocks.{layer}.{name}" for name in of_block]
    assert list(found) == [*names, *([] if block is RMSNorm else ["final_norm.bias"])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contributions_add_up_in_other_types_as_well_as_they_round(
    small: Callable[..., GPT2], ids: Tensor, dtype: torch.dtype
) -> None:
    exact = summed(direct_attribution(small(), ids, OTHER))
    found = summed(direct_attribution(small(dtype=dtype), ids, OTHER))
    torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=40 * torch.finfo(dtype).eps)


def test_a_difference_of_a_token_from_itself_is_made_of_nothing(model: GPT2, ids: Tensor) -> None:
    found = direct_attribution(model, ids, torch.tensor(7), torch.tensor(7))
    assert not any(of.any() for of in found.values())


def test_each_contribution_is_its_write_through_the_norm_held_fixed(model: GPT2, ids: Tensor) -> None:
    """Taken out of the stream that the final norm reads, with the norm's scale of the whole stream."""
    found, x = direct_attribution(model, ids, torch.tensor(7)), model.residuals(ids)[-1]
    scale = (x.var(-1, correction=0, keepdim=True) + model.final_norm.eps).rsqrt()

    def alone(write: Tensor) -> Tensor:
        return ((write - write.mean(-1, keepdim=True)) * scale * model.final_norm.weight) @ model.unembed.weight[7]

    values = record(model, ids, ["embedding", "blocks.2.mlp", "blocks.1.attention.head"])
    torch.testing.assert_close(found["embedding"], alone(values["embedding"]), **SAME)
    torch.testing.assert_close(found["blocks.2.mlp"], alone(values["blocks.2.mlp"]), **SAME)
    projection = model.blocks[1].attention.projection
    for head in range(3):
        z = torch.zeros_like(values["blocks.1.attention.head"])
        z[:, :, head] = values["blocks.1.attention.head"][:, :, head]
        of_head = alone(z.flatten(2) @ projection.weight.T)
        torch.testing.assert_close(found["blocks.1.attention.head"][..., head], of_head, **SAME)
    torch.testing.assert_close(found["blocks.1.attention.projection.bias"], alone(projection.bias.expand_as(x)), **SAME)


class Clamped(Block):
    """What it writes into the stream is not what its sublayers return."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        u = x + self.act("attention", self.attention(self.attention_norm(x)))
        return self.act("output", (u + self.act("mlp", self.mlp(self.mlp_norm(u)))).clamp(-0.5, 0.5))


class Scaling(nn.Module):
    """A norm layer of which nobody knows what its scale is."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), eps))

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


class Squashed(Block):
    """Another norm."""

    norm = Scaling


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Clamped, "The contributions miss the logits by up to"),
        (Squashed, "The final norm is Scaling; its scale can be held fixed only of LayerNorm and RMSNorm"),
    ],
)
def test_writes_that_cannot_be_told_apart_are_refused(
    small: Callable[..., GPT2], ids: Tensor, block: type[Block], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        direct_attribution(small(block=block), ids, OTHER)


def test_a_model_that_is_not_clean_is_refused(model: GPT2, ids: Tensor) -> None:
    with (
        scaled(model, {"blocks.1.output_shift": 1.0}),
        pytest.raises(ValueError, match=r"set blocks\.1\.output_shift back"),
    ):
        direct_attribution(model, ids, OTHER)


# Attribution patching.


def difference(logits: Tensor) -> Tensor:
    return logit_difference(logits[:, -1], 3, 50)


@pytest.mark.parametrize("site", ["embedding", "blocks.1.output", "blocks.2.attention.head", "blocks.2.mlp.neuron"])
def test_an_attribution_is_the_slope_of_a_patch(model: GPT2, ids: Tensor, site: str) -> None:
    values = record(model, OTHER, [site])
    found = attribution_patching(model, ids, values, difference)[site]
    heads = range(3) if values[site].ndim == 4 else (None,)
    assert found.shape == ((2, 10, 3) if values[site].ndim == 4 else (2, 10))
    step = 1e-4
    for at in (0, 4, 9):
        for head in heads:

            def read(amount: float, at: int = at, head: int | None = head) -> Tensor:
                edit = patch(site, values[site], [at], None if head is None else [head], amount)
                with torch.no_grad(), scaled(model, edit):
                    return difference(model(ids))

            central = (read(step) - read(-step)) / (2 * step)
            expected = found[:, at] if head is None else found[:, at, head]
            torch.testing.assert_close(expected, central, rtol=1e-6, atol=1e-8)


def test_attributions_of_several_sites_are_those_of_each_alone(model: GPT2, ids: Tensor) -> None:
    sites = ["blocks.0.output", "blocks.3.attention"]
    values = record(model, OTHER, sites)
    with torch.no_grad():
        both = attribution_patching(model, ids, values, difference)
    for site in sites:
        alone = attribution_patching(model, ids, {site: values[site]}, difference)[site]
        torch.testing.assert_close(both[site], alone, **SAME)
    with torch.inference_mode():
        torch.testing.assert_close(attribution_patching(model, ids, values, difference), both, **SAME)


WRONG = {
    "a metric of nothing": (
        lambda m, x: attribution_patching(m, x, {"embedding": ZERO}, lambda _: 3),
        "does not depend on",
    ),
    "values of another length": (
        lambda m, x: attribution_patching(m, x[:, :5], {"embedding": ZERO}, difference),
        "have the shape [2, 10, 36]; expected one that broadcasts to [2, 5, 36]",
    ),
    "a token beyond": (lambda m, x: direct_attribution(m, x, torch.tensor(97)), "expected int64 ids from 0 to 96"),
    "half a token": (lambda m, x: direct_attribution(m, x, torch.tensor(0.5)), "expected int64 ids"),
    "a token for each text": (
        lambda m, x: direct_attribution(m, x, torch.tensor([1, 2])),
        "or [batch, position] for texts",
    ),
    "a foil beyond": (lambda m, x: direct_attribution(m, x, torch.tensor(1), torch.tensor(-1)), "expected int64 ids"),
    "True": (lambda m, x: logit_difference(m(x), 0, True), "The tokens are [True]"),
}
ZERO = torch.zeros(2, 10, 36, dtype=torch.float64)


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_refused_in_a_sentence(model: GPT2, ids: Tensor, case: str) -> None:
    call, said = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(said)):
        call(model, ids)


def test_attributions_ask_for_a_clean_model(model: GPT2, ids: Tensor) -> None:
    values = record(model, OTHER, ["blocks.1.output"])
    with scaled(model, {"blocks.1.output_shift": 1.0}), pytest.raises(ValueError, match="needs every native parameter"):
        attribution_patching(model, ids, values, difference)


class Own(nn.LayerNorm):
    """Not what its class does."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_norm_with_a_forward_of_its_own_is_not_taken_for_its_class(small: Callable[..., GPT2], ids: Tensor) -> None:
    with pytest.raises(ValueError, match="The final norm is Own; its scale can be held fixed only of"):
        direct_attribution(small(block=type("Normed", (Block,), {"norm": Own})), ids, OTHER)


def test_one_value_for_all_texts_and_positions_is_attributed_everywhere(model: GPT2, ids: Tensor) -> None:
    mean = record(model, OTHER, ["blocks.1.mlp.neuron"])["blocks.1.mlp.neuron"].mean((0, 1))
    one, whole = (
        attribution_patching(model, ids, {"blocks.1.mlp.neuron": of}, difference)["blocks.1.mlp.neuron"]
        for of in (mean, mean.expand(2, 10, -1))
    )
    assert torch.equal(one, whole) and one.shape == (2, 10)


def test_an_attribution_to_the_run_itself_is_nothing(model: GPT2, ids: Tensor) -> None:
    own = record(model, ids, ["blocks.1.output"])
    assert not attribution_patching(model, ids, own, difference)["blocks.1.output"].any()
    other = record(model, OTHER, ["blocks.1.output"])
    assert attribution_patching(model, ids, other, difference)["blocks.1.output"].all()
