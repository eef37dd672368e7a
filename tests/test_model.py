"""The model by itself: shapes, its own consistency, refusals."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minigpt import GPT2, GPT2Config, scaled
from minigpt.cache import KeyValueCache
from minigpt.model import Attention
from minigpt.parameters import natives, not_neutral
from tests.conftest import ROOT, SMALL


def test_the_model_names_no_checkpoint() -> None:
    lines = (ROOT / "minigpt" / "model.py").read_text().splitlines()
    assert not any("gpt2-" in line or "distil" in line for line in lines)


def test_logits_are_the_unembedded_final_norm_of_the_last_depth(model: GPT2, ids: Tensor) -> None:
    residuals = model.residuals(ids)
    assert residuals.shape == (SMALL["n_layer"] + 1, 2, 10, SMALL["n_embd"])
    assert torch.equal(model.unembed(model.final_norm(residuals[-1])), model(ids))


def test_depth_0_is_the_embeddings_and_each_depth_is_its_block_of_the_one_before(model: GPT2, ids: Tensor) -> None:
    residuals = model.residuals(ids)
    assert torch.equal(residuals[0], model.embed(ids))
    for layer, block in enumerate(model.blocks):
        assert torch.equal(residuals[layer + 1], block(residuals[layer]))


def test_an_embedding_is_the_tokens_plus_that_of_its_position(model: GPT2, ids: Tensor) -> None:
    tokens, positions = model.token_embedding.weight, model.position_embedding.weight
    embedded = model.embed(ids)
    for t in range(10):
        assert torch.equal(embedded[:, t], tokens[ids[:, t]] + positions[t])
        assert torch.equal(model.embed(ids[:, [t]], start=t), embedded[:, [t]])


@pytest.mark.parametrize(("by_width", "width"), [(True, math.sqrt(12)), (False, 1.0)])
@pytest.mark.parametrize(("by_layer", "numbers"), [(True, [1, 2, 3, 4]), (False, [1, 1, 1, 1])])
def test_scores_are_divided_as_the_config_asks(
    small: Callable[..., GPT2], by_width: bool, width: float, by_layer: bool, numbers: list[int]
) -> None:
    model = small(scale_attn_weights=by_width, scale_attn_by_inverse_layer_idx=by_layer)
    found = [block.attention.score_scale for block in model.blocks]
    assert found == pytest.approx([1 / (width * number) for number in numbers])


@torch.no_grad()
def departure_of_patterns(model: GPT2, ids: Tensor) -> float:
    """Largest difference between patterns @ values, projected, and what the fused attention writes."""
    departure = 0.0
    for pattern, block, x in zip(model.attention_patterns(ids), model.blocks, model.residuals(ids), strict=False):
        normed = block.attention_norm(x)
        z = (pattern @ block.attention.heads(normed)[2]).transpose(1, 2).flatten(2)
        difference = block.attention.projection(z) - block.attention(normed)
        departure = max(departure, float(difference.abs().max()))
    return departure


def test_patterns_are_the_weights_of_the_fused_attention(model: GPT2, ids: Tensor) -> None:
    patterns = model.attention_patterns(ids)
    assert patterns.shape == (4, 2, 3, 10, 10)
    torch.testing.assert_close(patterns.sum(-1), torch.ones_like(patterns.sum(-1)))
    assert (patterns.triu(1) == 0).all()
    assert departure_of_patterns(model, ids) < 1e-12


def test_patterns_of_another_scale_are_noticed(model: GPT2, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Attention.pattern

    def sharpened(self: Attention, x: Tensor) -> Tensor:
        self.score_scale *= 1.01
        pattern = plain(self, x)
        self.score_scale /= 1.01
        return pattern

    monkeypatch.setattr(Attention, "pattern", sharpened)
    assert departure_of_patterns(model, ids) > 1e-6


def test_patterns_of_a_batch_of_interventions_have_its_rows(model: GPT2, ids: Tensor) -> None:
    with scaled(model, {"blocks.1.output_scale": torch.rand(3, 1, 1)}):
        assert model.attention_patterns(ids[:1]).shape == (4, 3, 3, 10, 10)


def test_one_block_and_one_head_are_enough(ids: Tensor) -> None:
    model = GPT2(GPT2Config(vocab_size=97, n_positions=10, n_embd=8, n_head=1, n_layer=1))
    assert model.residuals(ids).shape == (2, 2, 10, 8)
    assert model(ids).isfinite().all()


def test_no_position_sees_a_later_one(model: GPT2, ids: Tensor) -> None:
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % SMALL["vocab_size"]
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-12, atol=1e-12)
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-3


def test_cached_steps_give_the_logits_of_one_pass(model: GPT2, ids: Tensor) -> None:
    cache = KeyValueCache(10)
    steps = [model(ids[:, :4], cache), *(model(ids[:, [t]], cache) for t in range(4, 10))]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids), rtol=1e-10, atol=1e-10)


def test_fresh_weights_are_drawn_as_gpt2s_were() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_embd=96, n_head=3, n_layer=8, vocab_size=500, n_positions=64))
    assert model.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.blocks[7].mlp.projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
    assert model.unembed.weight is model.token_embedding.weight
    assert not model.blocks[3].mlp.expand.bias.any()


def test_scales_are_parameters_that_no_optimiser_moves(model: GPT2) -> None:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, native in natives(model).items() if not native.optional}
    assert frozen >= {"blocks.3.output_scale", "blocks.0.attention.head_scale"}
    assert not not_neutral(model)


def test_dropout_is_never_applied(small: Callable[..., GPT2], ids: Tensor) -> None:
    model = small(resid_pdrop=0.9, embd_pdrop=0.9, attn_pdrop=0.9).train()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.zeros(3, dtype=torch.long), r"shape \[3\]"),
        ([1, 2, 3], "torch.tensor"),
        (torch.zeros(1, 3), "float32"),
        (torch.zeros(1, 3, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 0, dtype=torch.long), "not empty"),
        (torch.zeros(1, 25, dtype=torch.long), "25 positions"),
        (torch.full((1, 2), 97), "97"),
        (torch.full((1, 2), -1), "-1"),
    ],
)
def test_ids_that_cannot_be_read_are_refused(model: GPT2, bad: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model(bad)


def test_a_cache_in_use_takes_one_position_at_a_time(model: GPT2, ids: Tensor) -> None:
    cache = KeyValueCache(10)
    model(ids[:, :3], cache)
    with pytest.raises(ValueError, match="one new position"):
        model(ids[:, 3:6], cache)


def test_a_cache_that_is_full_says_so(model: GPT2, ids: Tensor) -> None:
    cache = KeyValueCache(3)
    model(ids[:, :3], cache)
    with pytest.raises(ValueError, match="made for 3"):
        model(ids[:, 3:4], cache)
