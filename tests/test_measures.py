"""The measures: identities that hold whatever the streams are."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt import GPT2, compare, scaled, sweep
from minigpt.measures import (
    MEASURES,
    OF_PREDICTIONS,
    POSITION_SETS,
    WRITERS,
    Measure,
    PositionSet,
    Statistics,
    inner_products,
    squared_norms,
)
from minigpt.model import SITES

EVERY = torch.arange(6)


def statistics_of(clean: torch.Tensor, changed: torch.Tensor, layer: int = 0) -> Statistics:
    """Statistics of one scaled run: streams are [place, batch, position, n_embd]."""
    cell = (None, None)
    return Statistics(
        sites=torch.tensor([[layer + 1]]),
        difference_sq=squared_norms(changed - clean)[cell],
        run_sq=squared_norms(changed)[cell],
        inner=inner_products(changed, clean)[cell],
        clean_sq=squared_norms(clean),
        lengths=torch.full((clean.shape[1],), clean.shape[2]),
        written=torch.zeros(len(WRITERS), 2, 1, 1, *clean.shape[:3], dtype=torch.float64),
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


ROOT_OF_ROUNDING = 1e-7
"""gauge_free is the root of a difference that rounds to 1e-16."""


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100), negative=st.booleans())
def test_gauge_free_is_0_for_any_global_rescaling(seed: int, scale: float, negative: bool) -> None:
    clean, _ = streams(seed)
    found = statistics_of(clean, clean * (-scale if negative else scale)).gauge_free(EVERY)
    assert float(found.max()) < ROOT_OF_ROUNDING


@settings(deadline=None)
@given(seed=st.integers(0, 10_000))
def test_gauge_free_is_the_least_distance_over_all_rescalings(seed: int) -> None:
    clean, changed = streams(seed)
    best = (clean * changed).sum(-1, keepdim=True) / changed.square().sum(-1, keepdim=True)
    least = ((best * changed - clean).norm(dim=-1) / clean.norm(dim=-1)).mean(-1)
    found = statistics_of(clean, changed)
    torch.testing.assert_close(found.gauge_free(EVERY)[0, 0], least, rtol=1e-9, atol=ROOT_OF_ROUNDING)
    for off in (0.9, 1.1):
        assert (((off * best * changed - clean).norm(dim=-1) / clean.norm(dim=-1)).mean(-1) >= least).all()


def test_nothing_is_left_of_a_stream_that_was_scaled_to_0(model: GPT2, ids: torch.Tensor) -> None:
    statistics = sweep(model, ids, (1,), (0.0,)).statistics
    assert (statistics.gauge_free(EVERY)[0, 0, 2] == 1).all()
    assert (statistics.cosine(EVERY)[0, 0, 2] == 0).all()
    for name in MEASURES:
        if name not in OF_PREDICTIONS:
            assert statistics.measure(name, "rest")[:, :, :-1].isfinite().all(), name


@pytest.mark.parametrize(("of_clean", "of_changed"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_stream_of_zeros_has_no_direction(of_clean: float, of_changed: float) -> None:
    clean, changed = streams(0)
    statistics = statistics_of(of_clean * clean, of_changed * changed)
    assert (statistics.cosine(EVERY) == 0).all()
    torch.testing.assert_close(statistics.gauge_free(EVERY), torch.ones(1, 1, 5, 1, dtype=torch.float64))


ADD_UP = {torch.float64: 1e-9, torch.float32: 1e-4}
"""What a block wrote is the difference of two streams in the model's own type, some ten times as long as it."""


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("positions", POSITION_SETS)
def test_carried_and_written_add_up(
    small: Callable[..., GPT2], ids: torch.Tensor, site: str, dtype: torch.dtype, positions: PositionSet
) -> None:
    """norm(D + w)^2 = norm(D)^2 + 2 D.w + norm(w)^2 at every block after the site; the two parts' D.w add up."""
    layers, factors = (1, 0), (0.5, 1.5, -2.0)
    result = sweep(small(dtype=dtype), ids, layers, factors, site)
    value = {name: result.measure(name, positions) for name in MEASURES if name not in OF_PREDICTIONS}
    carried, after = value["frobenius"][:, :, :-2], value["frobenius"][:, :, 1:-1]
    near = ADD_UP[dtype]
    for entry, layer in enumerate(result.layers):
        blocks = slice(layer + 1, None)
        norm, cosine = value["written"][entry, :, 1:-1][:, blocks], value["alignment"][entry, :, 1:-1][:, blocks]
        before = carried[entry, :, blocks]
        total = before**2 + 2 * cosine * before * norm + norm**2
        torch.testing.assert_close(total, after[entry, :, blocks] ** 2, rtol=near, atol=near)
        parts = sum(value[f"{part}_alignment"] * value[f"{part}_written"] for part in ("attention", "mlp"))
        torch.testing.assert_close(parts[entry, :, 1:-1][:, blocks], cosine * norm, rtol=near, atol=near)
        assert not value["written"][entry, :, : layer + 2].any()
        assert (norm > 0).all() or (site in ("query", "key") and positions == "first"), (
            "who sees one key, sees it whole"
        )
    for name in ("written", "alignment"):
        assert value[name][:, :, :-1].isfinite().all()
        assert value[name][:, :, -1].isnan().all(), "no block stands between the last depth and `final`"


def of_writes(carried: torch.Tensor, attention: torch.Tensor, mlp: torch.Tensor) -> Statistics:
    """Statistics of one text, [position, n_embd], whose block 1 carries a difference and writes so much otherwise."""
    norms = squared_norms(carried).expand(1, 1, 4, 1, -1)
    writes = torch.stack([attention + mlp, attention, mlp])
    written = torch.stack([squared_norms(writes), inner_products(carried, writes)], 1)[:, :, None, None, None, None]
    lengths = torch.tensor([len(carried)])
    return Statistics(
        torch.ones(1, 1, dtype=torch.int64),
        norms,
        norms,
        norms,
        norms[0, 0],
        lengths,
        written.expand(-1, -1, 1, 1, 4, 1, -1),
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_no_cosine_leaves_its_range_by_a_rounding(sign: int) -> None:
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parallel = sign * x / 3
    raw = inner_products(x, parallel) / (squared_norms(x) * squared_norms(parallel)).sqrt()
    assert raw.abs().max() > 1, "the rounding that is meant"
    streams_of = statistics_of(x[None, None], parallel[None, None])
    writes = of_writes(x, parallel, torch.zeros_like(x))
    cosines = [streams_of.cosine(torch.tensor([position]))[0, 0, 0, 0] for position in range(300)]
    cosines += [writes.alignment(torch.tensor([position]))[0, 0, 2, 0] for position in range(300)]
    assert torch.stack(cosines).abs().max() == 1
    assert torch.stack(cosines).mul(sign).min() > 1 - 1e-12


def test_what_was_measured_is_not_exchanged_by_accident(model: GPT2, ids: torch.Tensor) -> None:
    result = sweep(model, ids, (1,), (0.5,))
    with pytest.raises(FrozenInstanceError):
        result.statistics.difference_sq = result.statistics.run_sq  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        result.factors = (2.0,)  # type: ignore[misc]


def test_what_a_sublayer_writes_otherwise_is_what_its_module_returns_otherwise(model: GPT2, ids: torch.Tensor) -> None:
    writes: list[torch.Tensor] = []
    for block in model.blocks:
        for module in (block.attention, block.mlp):
            module.register_forward_hook(lambda _module, _inputs, output: writes.append(output))
    with torch.no_grad():
        clean = model.residuals(ids)
        with scaled(model, {"blocks.1.output_scale": 0.5}):
            changed = model.residuals(ids)
    by_clean, by_scaled = torch.stack(writes).unflatten(0, (2, 4, 2))  # [run, block, sublayer, batch, position, n_embd]
    otherwise = (by_scaled - by_clean)[:, :, :, 1:]
    statistics = sweep(model, ids, (1,), (0.5,)).statistics
    carried = (changed - clean)[:, :, 1:]
    for block in (2, 3):
        for sublayer, part in enumerate(("attention", "mlp")):
            w, d = otherwise[block, sublayer].flatten(1), carried[block].flatten(1)
            norm = statistics.measure(f"{part}_written", "rest")[0, 0, block + 1]
            torch.testing.assert_close(norm, w.norm(dim=1), rtol=1e-9, atol=1e-9)
            cosine = statistics.measure(f"{part}_alignment", "rest")[0, 0, block + 1]
            expected = torch.nn.functional.cosine_similarity(d, w, dim=1)
            torch.testing.assert_close(cosine, expected, rtol=1e-9, atol=1e-9)


def test_a_block_that_takes_the_change_back_repairs_and_one_that_repeats_it_amplifies(
    small: Callable[..., GPT2], ids: torch.Tensor
) -> None:
    """Block 2 is made to write minus, and plus, its own input: the mirror of one is the other."""
    found = []
    for sign in (-1.0, 1.0):
        model = small(activation_function="relu", n_inner=72)
        block = model.blocks[2]
        for parameter in (*block.attention.parameters(), *block.mlp.parameters()):
            if parameter.requires_grad:
                parameter.data.zero_()
        block.mlp_norm.weight.data.fill_(1.0)
        eye = torch.eye(36, dtype=torch.float64)
        block.mlp.expand.weight.data.copy_(torch.cat([eye, -eye]))  # relu(x) - relu(-x) = x
        block.mlp.projection.weight.data.copy_(sign * torch.cat([eye, -eye], 1))
        found.append(sweep(model, ids, (1,), (0.9,), "mlp").statistics.measure("alignment", "rest")[0, 0, 3])
    assert (found[0] < -0.5).all()
    torch.testing.assert_close(found[0], -found[1])


@pytest.mark.parametrize("factor", [0.01, 0.5, 3.0, 100.0])
def test_kl_is_0_after_the_last_block_up_to_the_norms_epsilon(
    small: Callable[..., GPT2], ids: torch.Tensor, factor: float
) -> None:
    def kl(epsilon: float) -> float:
        model = small(layer_norm_epsilon=epsilon)
        statistics = sweep(model, ids, (2, 3), (factor,), predictions=True).statistics
        found = statistics.measure("kl", "all")[:, 0, -1]
        assert (found[0] > 1e-6).all(), "earlier blocks are read by a later one"
        return float(found[1].max())

    assert kl(1e-12) < 1e-12
    assert kl(1.0) > 1e-6, "the epsilon is what is left"


@pytest.mark.parametrize(("positions", "kept"), [("all", slice(None)), ("first", slice(1)), ("rest", slice(1, None))])
def test_measures_of_predictions_are_means_over_the_positions_of_each_text(
    model: GPT2, ids: torch.Tensor, positions: PositionSet, kept: slice
) -> None:
    texts = [ids[0].tolist(), ids[1, :6].tolist()]
    statistics = sweep(model, texts, (1,), (0.3,), predictions=True).statistics
    for row, text in enumerate(map(torch.tensor, texts)):
        with torch.no_grad():
            clean = model(text[None])[0]
            with scaled(model, {"blocks.1.output_scale": 0.3}):
                changed = model(text[None])[0]
        p, q = clean.log_softmax(-1), changed.log_softmax(-1)
        before, after = (-x[:-1].gather(1, text[1:, None])[:, 0] for x in (p, q))  # the last token has no next one
        expected = {
            "kl": (p.exp() * (p - q)).sum(-1),
            "loss_change": after - before,
            "changed": (p.argmax(-1) != q.argmax(-1)).double(),
            "correlation": torch.stack([torch.stack(pair).corrcoef()[0, 1] for pair in zip(p, q, strict=True)]),
        }
        for name in OF_PREDICTIONS:
            found = statistics.measure(name, positions)[0, 0, :, row]
            torch.testing.assert_close(found[-1], expected[name][kept].mean(), rtol=1e-9, atol=1e-9)
            assert found[:-1].isnan().all(), "they exist at `final` only"
    assert 0 < statistics.measure("changed", "all")[0, 0, -1].min() < 1


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


def test_a_single_token_beside_a_longer_text_has_no_rest_either(model: GPT2) -> None:
    statistics = sweep(model, [[3], [3, 4, 5]], (1,), (0.5,)).statistics
    assert (statistics.measure("frobenius", "first")[:, :, 2:] > 0).all()
    with pytest.raises(ValueError, match="one token"):
        statistics.measure("frobenius", "rest")


@pytest.mark.parametrize(("name", "positions"), [("clean_norm", "rest"), ("norm", "all"), ("kl", "last")])
def test_a_measure_or_a_set_that_does_not_exist_is_a_sentence(
    model: GPT2, ids: torch.Tensor, name: Measure, positions: PositionSet
) -> None:
    with pytest.raises(ValueError, match="There is no measure"):
        sweep(model, ids, (1,), (0.5,), predictions=True).statistics.measure(name, positions)


def test_every_measure_has_the_same_axes(model: GPT2, ids: torch.Tensor) -> None:
    statistics = sweep(model, ids, (0, 2, 3), (0.5, 1.0), predictions=True).statistics
    for name in MEASURES:
        assert statistics.measure(name, "rest").shape == (3, 2, 6, 2)


@pytest.mark.parametrize(
    ("texts", "sets"), [([[1, 2], [3]], {"all", "first"}), ([[1, 2], [3, 4]], {"all", "first", "rest"})]
)
def test_rows_leave_a_set_out_that_a_text_has_not(model: GPT2, texts: list[list[int]], sets: set[str]) -> None:
    rows = compare(model, texts, [{"blocks.0.output_scale": 0.5}]).rows()
    assert {row["positions"] for row in rows} == sets
