"""Derivatives through the scales, beside central differences of whole sweeps."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minigpt import GPT2, scaled, sensitivity, sweep
from minigpt.measures import POSITION_SETS, Measure
from minigpt.model import SITES
from minigpt.parameters import natives, parameter_name
from minigpt.sensitivity import SENSITIVITIES

TEXTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10]]
STEP = 1e-4
TOLERANCE = 1e-4
"""Relative; central differences are off by the square of the step, and by rounding over the step."""
ROOT_OF_ROUNDING = 1e-8
"""gauge_free at an output site, where it is 0: the root of 1e-16. The step divides it."""


def central(name: Measure, up: Tensor, down: Tensor) -> Tensor:
    """The difference quotient that belongs to a measure, of its values at log s = STEP and -STEP."""
    if name == "kl":
        return (up + down) / STEP**2
    if name == "correlation":
        return (up + down - 2) / STEP**2
    if name == "loss_change":
        return (up - down) / (2 * STEP)
    return (up + down) / (2 if name.endswith("alignment") else 2 * STEP)


@pytest.mark.parametrize("name", SENSITIVITIES)
@pytest.mark.parametrize("site", SITES)
def test_derivatives_agree_with_central_differences(model: GPT2, site: str, name: Measure) -> None:
    found = sensitivity(model, TEXTS, [site])
    factors = (math.exp(STEP), math.exp(-STEP))
    statistics = sweep(model, TEXTS, None, factors, site, predictions=True).statistics
    # the last block's output scale moves predictions only by the norm's epsilon: too little to divide by STEP^2
    kept = slice(0, -1 if site == "output" and name in ("kl", "correlation") else None)
    for positions in POSITION_SETS:
        up, down = statistics.measure(name, positions).unbind(1)
        expected, derivative = central(name, up, down)[kept], found.measure(name, positions)[kept]
        noise = ROOT_OF_ROUNDING / STEP if name == "gauge_free" else 1e-6
        torch.testing.assert_close(derivative, expected, equal_nan=True, rtol=TOLERANCE, atol=noise)


def test_a_derivative_of_another_layer_does_not_agree(model: GPT2) -> None:
    found = sensitivity(model, TEXTS, ["mlp"]).measure("frobenius", "rest")
    assert not torch.allclose(found[1], found[2], rtol=0.01)


def test_every_layer_and_site_comes_at_once(model: GPT2) -> None:
    found = sensitivity(model, TEXTS, SITES)
    scales = sum(natives(model)[parameter_name(model, 0, site)].entries(model.config) for site in SITES)
    assert scales >= 3 + 3  # output, attention, mlp and three heads
    assert found.measure("frobenius", "rest").shape == (4 * scales, 6, 2)
    assert [scale.index for scale in found.scales if scale.site == "head" and scale.layer == 1] == [0, 1, 2]


def test_an_only_head_without_a_bias_moves_all_that_its_attention_moves(small: Callable[..., GPT2]) -> None:
    model = small(n_head=1)
    with_bias = sensitivity(model, TEXTS, ["attention", "head"])
    for block in model.blocks:
        block.attention.projection.bias.data.zero_()
    without = sensitivity(model, TEXTS, ["attention", "head"])
    assert [scale.site for scale in without.scales] == ["attention", "head"] * 4
    for name in SENSITIVITIES:
        values = without.measure(name, "rest")
        torch.testing.assert_close(values[::2], values[1::2], equal_nan=True, rtol=1e-9, atol=1e-9)
    moved = with_bias.measure("frobenius", "rest")
    assert not torch.allclose(moved[::2], moved[1::2], rtol=1e-3), "the bias is attention's, no head's"


@pytest.mark.parametrize("name", ["changed", "cosine", "nonsense"])
def test_what_has_no_derivative_is_refused(model: GPT2, name: Measure) -> None:
    with pytest.raises(ValueError, match="no sensitivity"):
        sensitivity(model, TEXTS).measure(name, "rest")


@pytest.mark.parametrize("sites", [[], ["mlp", "mlp"]])
def test_sites_that_leave_nothing_to_do_are_refused(model: GPT2, sites: list[str]) -> None:
    with pytest.raises(ValueError, match="expected different ones"):
        sensitivity(model, TEXTS, sites)


def test_a_model_that_is_not_clean_is_refused(model: GPT2) -> None:
    with scaled(model, {"blocks.0.mlp_scale": 0.5}), pytest.raises(ValueError, match="back to 1"):
        sensitivity(model, TEXTS)


def test_a_site_with_an_index_has_a_column_of_its_own(model: GPT2) -> None:
    (labels,) = sensitivity(model, [[1, 2, 3]], ("mlp", "head")).axes
    assert labels[:4] == [
        {"layer": 0, "site": "mlp", "head": ""},
        *({"layer": 0, "site": "head", "head": head} for head in range(3)),
    ]


def test_positions_in_chunks_give_what_all_at_once_give(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    whole = sensitivity(model, texts, ("mlp",))
    monkeypatch.setattr(sys.modules["minigpt.sensitivity"], "CHUNK", 1000)  # the package names the function so
    parts = sensitivity(model, texts, ("mlp",))
    for name in ("kl", "loss_change", "correlation"):
        torch.testing.assert_close(parts.measure(name, "rest"), whole.measure(name, "rest"), equal_nan=True)
