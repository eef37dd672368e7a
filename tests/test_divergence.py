"""The measures: identities that hold whatever the streams are."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt import GPT2, sweep
from minigpt.divergence import MEASURES, POSITION_SETS, Statistics, inner_products, squared_norms

EVERY = torch.arange(6)


def statistics_of(clean: torch.Tensor, changed: torch.Tensor, layer: int = 0) -> Statistics:
    """Statistics of one scaled run: streams are [place, batch, position, n_embd]."""
    cell = (None, None)
    return Statistics(
        layers=(layer,),
        difference=squared_norms(changed - clean)[cell],
        scaled=squared_norms(changed)[cell],
        inner=inner_products(changed, clean)[cell],
        clean=squared_norms(clean),
        lengths=torch.full((clean.shape[1],), clean.shape[2]),
    )


def streams(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, changed = torch.randn(2, 5, 1, 6, 12, generator=generator, dtype=torch.float64)
    changed[0] = clean[0]
    return clean, changed


@settings(deadline=None)
@given(seed=st.integers(0, 10_000))
def test_measures_are_their_definitions(seed: int) -> None:
    clean, changed = streams(seed)
    statistics = statistics_of(clean, changed)
    frobenius = (changed - clean).flatten(2).norm(dim=2)
    cosine = torch.nn.functional.cosine_similarity(clean, changed, dim=-1).mean(-1)
    torch.testing.assert_close(statistics.frobenius(EVERY)[0, 0], frobenius)
    torch.testing.assert_close(statistics.relative(EVERY)[0, 0], frobenius / clean.flatten(2).norm(dim=2))
    torch.testing.assert_close(statistics.cosine(EVERY)[0, 0], cosine)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000))
def test_squares_of_first_and_rest_add_up_to_all(seed: int) -> None:
    statistics = statistics_of(*streams(seed))
    parts = {positions: statistics.measure("frobenius", positions) for positions in POSITION_SETS}
    torch.testing.assert_close(parts["first"] ** 2 + parts["rest"] ** 2, parts["all"] ** 2)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), site=st.integers(0, 3))
def test_relative_equals_passive_where_nothing_reacted(seed: int, site: int) -> None:
    clean, _ = streams(seed)
    change = torch.randn(1, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    changed = clean.clone()
    changed[site + 1 :] += change
    statistics = statistics_of(clean, changed, layer=site)
    passive = statistics.passive(EVERY)[0, 0, :-1]
    torch.testing.assert_close(passive, statistics.relative(EVERY)[0, 0, :-1])
    assert not passive[: site + 1].any()


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
def test_cosine_is_blind_to_length(seed: int, scale: float) -> None:
    clean, changed = streams(seed)
    torch.testing.assert_close(
        statistics_of(clean, scale * changed).cosine(EVERY), statistics_of(clean, changed).cosine(EVERY)
    )


def test_passive_is_the_jump_over_the_streams_norm(small: Callable[..., GPT2], ids: torch.Tensor) -> None:
    result = sweep(small(), ids, (1,), (0.5, 1.5))
    statistics = result.statistics
    norms = statistics.clean_norm(torch.arange(10))
    expected = 0.5 * norms[2] / norms[2:-1]
    torch.testing.assert_close(statistics.measure("passive", "all")[0, 0, 2:-1], expected)
    assert statistics.measure("passive", "all")[..., -1, :].isnan().all()


def test_large_values_keep_small_differences() -> None:
    x = torch.full((1, 4096), 3000.0)
    assert squared_norms(x).item() == 4096 * 3000.0**2
    y = x + 0.25  # exact in float32; its square is lost beside 9e6 unless sums are float64
    assert (inner_products(x, y) - squared_norms(x)).item() == 4096 * 3000.0 * 0.25


def test_a_single_token_has_no_rest(model: GPT2) -> None:
    statistics = sweep(model, torch.tensor([[3]]), (1,), (0.5,)).statistics
    assert (statistics.measure("frobenius", "all")[:, :, 2:] > 0).all()
    with pytest.raises(ValueError, match="one token"):
        statistics.measure("frobenius", "rest")


def test_every_measure_has_the_same_axes(model: GPT2, ids: torch.Tensor) -> None:
    statistics = sweep(model, ids, (0, 2, 3), (0.5, 1.0)).statistics
    for name in MEASURES:
        assert statistics.measure(name, "rest").shape == (3, 2, 6, 2)
