"""What a scale does, to the bit: the five facts that hold for any weights, and `scaled` itself."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, jvp

from minigpt import GPT2, Block, GPT2Config, compare, scaled
from minigpt.model import SITES, Attention
from minigpt.parameters import Native, natives, not_neutral, parameter_name, sites_of
from tests.conftest import SMALL, TINY, draw

EPSILON_DEPARTURE = 1e-5
"""Fact 4 on weights/tiny: a norm's epsilon of 1e-5 beside a stream's variance, which is above 1 from block 1 on,
moves a normed vector by at most 5e-6 relative; later blocks may double it."""


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), layer=st.integers(0, 3), factor=st.floats(-2, 3).filter(lambda s: s != 1))
def test_depths_before_the_site_are_bit_identical(seed: int, layer: int, factor: float) -> None:
    model, ids = _model_and_ids(seed)
    clean = model.residuals(ids)
    with scaled(model, {f"blocks.{layer}.output_scale": factor}):
        residuals = model.residuals(ids)
    assert torch.equal(residuals[: layer + 1], clean[: layer + 1])
    assert not torch.equal(residuals[layer + 1], clean[layer + 1])


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), layer=st.integers(0, 3), factor=st.floats(-2, 3))
def test_at_the_site_the_output_is_multiplied_exactly(seed: int, layer: int, factor: float) -> None:
    model, ids = _model_and_ids(seed)
    clean = model.residuals(ids)[layer + 1]
    with scaled(model, {f"blocks.{layer}.output_scale": factor}):
        site = model.residuals(ids)[layer + 1]
    assert torch.equal(site, factor * clean)
    jump = (site - clean).norm()
    torch.testing.assert_close(jump, abs(factor - 1) * clean.norm(), rtol=1e-12, atol=1e-12)


def test_neutral_values_are_bit_identical(model: GPT2, ids: Tensor) -> None:
    clean = model.residuals(ids)
    for name, native in natives(model).items():
        with scaled(model, {name: native.neutral}):
            assert torch.equal(model.residuals(ids), clean), name
    with scaled(model, {name: native.neutral for name, native in natives(model).items()}):
        assert torch.equal(model.residuals(ids), clean)


def test_unit_scales_are_bit_identical_to_a_block_without_scales(model: GPT2, ids: Tensor) -> None:
    x = model.embed(ids)
    for block in model.blocks:
        u = x + block.attention(block.attention_norm(x))
        plain = u + block.mlp(block.mlp_norm(u))
        assert torch.equal(block(x), plain)
        x = plain


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.5, 4.0])
def test_scaling_an_output_is_dividing_every_later_write(
    small: Callable[..., GPT2], ids: Tensor, factor: float
) -> None:
    model = small(layer_norm_epsilon=1e-15)
    assert _departure_from_fact_4(model, ids, factor) < 1e-9


def test_on_tiny_fact_4_departs_by_no_more_than_the_epsilon_explains(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = GPT2.from_pretrained(TINY, dtype=torch.float64)
    ids = torch.randint(tiny.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    departure = max(_departure_from_fact_4(tiny, ids, factor) for factor in (0.5, 1.5))
    with capsys.disabled():
        print(
            f"\nscaling an output against dividing every later write, on weights/tiny with layer_norm_epsilon "
            f"{tiny.config.layer_norm_epsilon}: departure {departure:.2e}"
        )
    assert 0 < departure < EPSILON_DEPARTURE


def test_scaling_one_position_leaves_every_earlier_one_bit_identical(model: GPT2, ids: Tensor) -> None:
    factors = torch.ones(1, 10, 1)
    factors[:, 4] = 0.5
    clean = model.residuals(ids)
    with scaled(model, {"blocks.1.output_scale": factors}):
        residuals = model.residuals(ids)
    assert torch.equal(residuals[:, :, :4], clean[:, :, :4])
    assert ((residuals - clean)[3:, :, 4:].norm(dim=-1) > 0).all()


@pytest.mark.parametrize("site", ["output_scale", "attention_scale", "mlp_scale", "attention.head_scale"])
def test_a_batch_of_interventions_is_one_pass(model: GPT2, ids: Tensor, site: str) -> None:
    factors = [0.5, 1.0, -1.5]
    name = f"blocks.2.{site}"
    with scaled(model, {name: torch.tensor(factors).view(3, 1, 1)}):
        together = model.residuals(ids[:1])
    for row, factor in enumerate(factors):
        with scaled(model, {name: factor}):
            alone = model.residuals(ids[:1])[:, 0]
        torch.testing.assert_close(together[:, row], alone, rtol=1e-12, atol=1e-12)


def test_a_block_without_its_writes_passes_the_stream_on(model: GPT2, ids: Tensor) -> None:
    with scaled(model, {"blocks.2.attention_scale": 0, "blocks.2.mlp_scale": 0}):
        residuals = model.residuals(ids)
    assert torch.equal(residuals[3], residuals[2])


def test_zeroed_heads_leave_the_projection_bias(model: GPT2, ids: Tensor) -> None:
    block = model.blocks[0]
    normed = block.attention_norm(model.embed(ids))
    with scaled(model, {"blocks.0.attention.head_scale": 0.0}):
        write = block.attention(normed)
    torch.testing.assert_close(write, block.attention.projection.bias.expand_as(write))


def test_heads_add_up_to_the_attention_write(model: GPT2, ids: Tensor) -> None:
    block = model.blocks[1]
    normed = block.attention_norm(model.residuals(ids)[1])
    parts = []
    for head in torch.eye(3):
        with scaled(model, {"blocks.1.attention.head_scale": head}):
            parts.append(block.attention(normed) - block.attention.projection.bias)
    torch.testing.assert_close(sum(parts) + block.attention.projection.bias, block.attention(normed))


def test_scales_are_restored_also_after_an_error_and_when_nested(model: GPT2, ids: Tensor) -> None:
    clean, before = model(ids), dict(model.named_parameters())
    with pytest.raises(KeyError), scaled(model, {"blocks.0.output_scale": 2.0}):
        with scaled(model, {"blocks.0.output_scale": 3.0, "blocks.1.mlp_scale": 0.0}):
            assert model.blocks[0].output_scale == 3
        assert model.blocks[0].output_scale == 2
        assert model.blocks[1].mlp_scale == 1
        raise KeyError
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(ids), clean)


def test_an_unknown_name_lists_the_nearest(model: GPT2) -> None:
    with pytest.raises(ValueError, match=r"blocks\.2\.output_scale"), scaled(model, {"blocks.2.ouput_scale": 0.5}):
        pass
    with pytest.raises(ValueError, match="no parameter"), scaled(model, {"blocks.4.output_scale": 0.5}):
        pass


def test_as_many_near_names_are_listed_as_a_block_has_scales(model: GPT2) -> None:
    with pytest.raises(ValueError, match="no parameter") as refused, scaled(model, {"blocks.7.output_scale": 0.5}):
        pass
    assert sum(name in str(refused.value) for name in natives(model)) == 4


def test_every_name_follows_from_the_declarations(model: GPT2) -> None:
    names = [parameter_name(model, layer, site) for layer in range(4) for site in SITES]
    assert [name for name in natives(model) if name.endswith("_scale")] == ["embedding_scale", *names]
    assert {f"{name.removesuffix('scale')}shift" for name in names} <= set(natives(model))
    assert sites_of(model) == SITES
    assert SITES[:4] == ("output", "attention", "mlp", "head")
    read = json.loads('"head"')  # other letters in memory, the same site
    assert parameter_name(model, 2, read) == "blocks.2.attention.head_scale"
    with pytest.raises(ValueError, match="site is 'nonsense'; expected one of output, attention, mlp, head"):
        parameter_name(model, 0, "nonsense")


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2, 2), (1, 1, 1, 1), (2, 10, 7)])
def test_a_shape_that_cannot_broadcast_is_refused(model: GPT2, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="broadcasts"), scaled(model, {"blocks.2.output_scale": torch.ones(shape)}):
        pass


def test_a_value_that_is_no_number_is_refused(model: GPT2) -> None:
    with pytest.raises(ValueError, match="a number or a tensor"), scaled(model, {"blocks.2.output_scale": "half"}):  # type: ignore[dict-item]
        pass


def test_not_neutral_finds_them_all(model: GPT2) -> None:
    assert not not_neutral(model)
    heads = torch.tensor([1, 0, 1])
    changed = {"blocks.2.output_scale": 0.5, "blocks.1.mlp_scale": 2.0, "blocks.0.attention.head_scale": heads}
    with scaled(model, changed):
        assert set(not_neutral(model)) == set(changed)


OF_TWO_BLOCKS = [name for name in natives(GPT2(GPT2Config(**SMALL))) if not re.match(r"blocks\.[^03]", name)]


@pytest.mark.parametrize("name", OF_TWO_BLOCKS)
def test_the_gradient_of_a_parameter_agrees_with_central_differences(model: GPT2, ids: Tensor, name: str) -> None:
    native, generator = natives(model)[name], torch.Generator().manual_seed(0)
    sizes = [
        size or {"batch": 1}.get(word, ids.shape[1])
        for word, size in zip(native.shape, native.sizes(model.config), strict=True)
    ]
    value = torch.full(sizes, native.neutral, dtype=torch.float64).requires_grad_()
    with scaled(model, {name: value}):
        (gradient,) = torch.autograd.grad(_score(model, ids), value)
    assert gradient.any()
    step = 1e-5
    for _ in range(3):
        direction = torch.randn(sizes, dtype=torch.float64, generator=generator)
        _, forward = jvp(lambda s: _functional(model, ids, name, s), (value.detach(),), (direction,))
        high, low = (_functional(model, ids, name, value.detach() + sign * step * direction) for sign in (1, -1))
        central = (high - low) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), central, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(forward, central, rtol=1e-6, atol=1e-9)


def test_functional_call_with_a_scales_name_is_scaled(model: GPT2, ids: Tensor) -> None:
    with scaled(model, {"blocks.1.mlp_scale": 0.3}):
        expected = model(ids)
    assert torch.equal(
        functional_call(model, {"blocks.1.mlp_scale": torch.tensor(0.3, dtype=torch.float64)}, (ids,)), expected
    )


def _model_and_ids(seed: int) -> tuple[GPT2, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return draw(GPT2Config(**SMALL), seed), torch.randint(SMALL["vocab_size"], (2, 7), generator=generator)


def _departure_from_fact_4(model: GPT2, ids: Tensor, factor: float) -> float:
    """Largest relative difference between scaling the output of block 1 and dividing every later write."""
    n_layer = model.config.n_layer
    divided = {
        f"blocks.{layer}.{site}": 1 / factor for layer in range(2, n_layer) for site in ("attention_scale", "mlp_scale")
    }
    with torch.no_grad(), scaled(model, {"blocks.1.output_scale": factor}):
        by_output = model.residuals(ids)
        final = model.final_norm(by_output[-1])
    with torch.no_grad(), scaled(model, divided):
        by_writes = model.residuals(ids)
        final_by_writes = model.final_norm(by_writes[-1])
    streams = (by_output[2:] - factor * by_writes[2:]).norm() / by_output[2:].norm()
    return max(float(streams), float((final - final_by_writes).norm() / final.norm()))


def _score(model: GPT2, ids: Tensor) -> Tensor:
    return model(ids).log_softmax(-1)[..., 5].mean()


def _functional(model: GPT2, ids: Tensor, name: str, scale: Tensor) -> Tensor:
    logits = functional_call(model, {name: scale}, (ids,))
    return logits.log_softmax(-1)[..., 5].mean()


class Edged(Attention):
    """Adds to the scores: a parameter whose second axis is no position."""

    native = (*Attention.native, Native("score_shift", ("batch", "n_head", "query", "key"), neutral=0.0, index="head"))
    score_shift: torch.Tensor

    def mix(self, x: torch.Tensor, cache: object = None) -> torch.Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(2, 3) * self.score_scale + self.score_shift
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(3) @ v).transpose(1, 2)


class EdgedBlock(Block):
    attention_class = Edged


def test_the_axes_of_a_value_are_what_the_declaration_says(small: Callable[..., GPT2]) -> None:
    """Texts of three lengths in passes of two: a value is cut at its queries and keys, and never at its heads."""
    model, texts = small(block=EdgedBlock), [[1, 2, 3, 4], [5, 6, 7], [8, 9]]
    shift = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    name = "blocks.1.attention.score_shift"
    whole = compare(model, texts, [{name: shift}, {name: shift[:1, :1]}])
    for text, ids in enumerate(texts):
        for run, value in enumerate((shift[text], shift[0, :1])):
            of_text = value[:, : len(ids), : len(ids)]
            with torch.no_grad():
                clean = model.residuals(torch.tensor([ids]))
                with scaled(model, {name: of_text}):
                    expected = (model.residuals(torch.tensor([ids])) - clean).square().sum((1, 2, 3)).sqrt()
            found = whole.measure("frobenius", "all")[run, :-1, text]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="1 or 3 texts by 1 or 4 queries by 1 or 4 keys"):
        compare(model, texts, [{name: shift[:, :, :3]}])
    assert natives(model)[name].entries(model.config) == 3


@pytest.mark.parametrize(
    "declared",
    [{"shape": ("position", "n_embd")}, {"shape": ("batch", "position"), "index": "token"}, {"shape": ()}],
)
def test_a_declaration_without_texts_or_without_entries_is_refused(declared: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected `batch` first"):
        Native("gate_scale", **declared)
