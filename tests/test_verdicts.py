"""The rules by which claims are judged, on made-up numbers on both sides of every threshold."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.divergence import claims
from experiments.divergence.rows import NORMS
from experiments.harness.experiment import Checked, Study
from experiments.harness.table import Table, by_text, of_text
from experiments.harness.verdicts import (
    FEWEST_WINDOWS,
    JUMP_TOLERANCE,
    MOST,
    NEAR_0995,
    ORDER_OF_MAGNITUDE,
    UNCHANGED,
    Decision,
    Verdict,
    above,
    all_of,
    below,
    counted,
    describe_entry,
    figures_of,
    lines_of,
    readable,
    site_in_words,
    within,
)
from experiments.skip_layer import SkipLayer, SkipSettings
from experiments.token_loss import study as token_loss
from minigpt.measures import MEASURES, POSITION_SETS

NUDGE = 1e-9
N_LAYER, LAYER, FACTORS = 6, 1, (0.5, 1.0, 1.5, 2.0)
CHANGED = [0, 2, 3]
"""Where the factors are that are not 1."""
AXES: dict[str, Sequence[Any]] = {"layer": [LAYER], "factor": FACTORS}
DEPTHS = [*range(N_LAYER + 1), "final"]
THRESHOLDS = {"growth": UNCHANGED, "rising": MOST, "turning": UNCHANGED}
SURE = {"growth": 0.7, "rising": 0.75, "turning": 0.2, "dilution": 0.4, "last_block": -0.3}
"""Evidence for which claims 3 and 5 hold."""


def double(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def interval(value: Tensor, half: float = 0.0) -> Table:
    """Numbers of layer and factor, with intervals of that half width."""
    return Table(AXES, value, {"low": value - half, "high": value + half} if half else {}, 30 if half else None)


def moved(table: Table, index: int, low: float, value: float, high: float) -> Table:
    """The same with another interval around the number of one factor."""
    spread = {"low": table.low.clone(), "high": table.high.clone()}
    changed, spread["low"][0, index], spread["high"][0, index] = table.value.clone(), low, high
    changed[0, index] = value
    return Table(table.axes, changed, spread, table.windows)


def evidence(half: float = 0.01) -> dict[str, Table]:
    """Tables of one layer for which claims 3, 4 and 5 hold, and 2 is true by construction; all numbers differ."""
    step = torch.arange(len(FACTORS)) / 1000
    found = {name: interval((sure + step)[None].double(), half) for name, sure in SURE.items()}
    for name in found:  # factor 1 changes nothing, and would hold against every claim
        found[name] = moved(found[name], 1, -9.0, -9.0, 9.0)
    shape = [len(POSITION_SETS), len(MEASURES), 1, len(FACTORS), len(DEPTHS)]
    values = 1 + torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = double([[7.0, 9, 50, 8, 6, 5, 4, 3], [2, 3, 4, 2, 2, 2, 2, 2], [4, 5, 10, 4, 4, 4, 4, 4]])
    frobenius = MEASURES.index("frobenius")
    values[POSITION_SETS.index("rest"), frobenius, 0, :, LAYER + 1] = 10 * (torch.tensor(FACTORS) - 1).abs().double()
    with_first = torch.arange(len(FACTORS) * (N_LAYER + 1)).view(1, len(FACTORS), -1).double() / 10
    mean = double([1.3])
    return {
        **found,
        "values": Table({"positions": POSITION_SETS, "metric": MEASURES, **AXES, "depth": DEPTHS}, values),
        "norms": Table({"of": NORMS, "depth": DEPTHS}, norms),
        "with_first": Table({**AXES, "depth": DEPTHS[:-1]}, with_first),
        "with_first_mean": Table({"layer": [LAYER]}, mean, {"low": mean - half, "high": mean + half}),
    }


def judged(tables: dict[str, Table], site: str = "output", upstream: float = 0.0) -> dict[int, Verdict]:
    return {of.number: of for of in claims.judge(tables, site, None, [upstream], "made up")}


def outcomes(tables: dict[str, Table]) -> dict[int, str]:
    return {number: verdict.verdict for number, verdict in judged(tables).items()}


# The divergence study's five.


def test_the_made_up_evidence_is_sure() -> None:
    construction = "true by construction"
    assert outcomes(evidence()) == {1: construction, 2: construction, 3: "holds", 4: "holds", 5: "holds"}


@pytest.mark.parametrize("index", CHANGED)
@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(NUDGE, 1.0, "holds"), (0.0, 1.0, "undecided"), (-1.0, NUDGE, "undecided"), (-1.0, 0.0, "does not hold")],
)
def test_growth_rests_on_every_test_at_every_factor_by_its_interval_alone(
    name: str, index: int, low: float, high: float, outcome: str
) -> None:
    """Bounds are given relative to the threshold; the mean between them does not count."""
    at = THRESHOLDS[name]
    for value in (-2.0, 2.0):
        tables = evidence()
        tables[name] = moved(tables[name], index, at + low, value, at + high)
        assert outcomes(tables) == {**outcomes(evidence()), 3: outcome}


@pytest.mark.parametrize("index", CHANGED)
@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(-1.0, 0.0, "holds"), (-1.0, NUDGE, "undecided"), (0.0, 1.0, "undecided"), (NUDGE, 1.0, "does not hold")],
)
def test_the_last_block_must_take_back_for_every_factor(index: int, low: float, high: float, outcome: str) -> None:
    for value in (-2.0, 2.0):
        tables = evidence()
        tables["last_block"] = moved(tables["last_block"], index, low, value, high)
        verdict = judged(tables)[5]
        assert verdict.verdict == outcome
        dropping = 3 if outcome == "holds" else 2
        assert f"It drops for {dropping} of 3 factors" in verdict.evidence


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(NUDGE, 1.0, "holds"), (0.0, 1.0, "undecided"), (-1.0, NUDGE, "undecided"), (-1.0, 0.0, "does not hold")],
)
def test_the_first_token_is_judged_by_the_interval_of_its_mean(low: float, high: float, outcome: str) -> None:
    tables, at = evidence(), ORDER_OF_MAGNITUDE
    one = {"low": double([at + low]), "high": double([at + high])}
    tables["with_first_mean"] = Table({"layer": [LAYER]}, double([0.0]), one)
    assert outcomes(tables) == {**outcomes(evidence()), 4: outcome}


def test_about_an_order_of_magnitude_is_nearer_to_10_than_to_1() -> None:
    assert math.exp(ORDER_OF_MAGNITUDE) == pytest.approx(10**0.5)
    assert (UNCHANGED, MOST, NEAR_0995, JUMP_TOLERANCE, FEWEST_WINDOWS) == (0, 0.5, 0.99, 0.01, 20)


@pytest.mark.parametrize("index", CHANGED)
@pytest.mark.parametrize(("off", "agrees"), [(0.99, True), (-0.99, True), (1.01, False), (-1.01, False)])
def test_a_jump_is_the_factors_within_its_tolerance(index: int, off: float, agrees: bool) -> None:
    tables = evidence()
    rest, frobenius = POSITION_SETS.index("rest"), MEASURES.index("frobenius")
    tables["values"].value[rest, frobenius, 0, index, LAYER + 1] += off * JUMP_TOLERANCE * 10
    assert outcomes(tables)[2] == ("true by construction" if agrees else "does not hold")
    assert judged(tables, "mlp")[2].verdict == "holds", "of another site it is whatever it is"
    tables["values"].value[rest, frobenius, 0, index, LAYER + 1] = 0
    for site in ("output", "mlp"):
        verdict = judged(tables, site)[2]
        assert (verdict.verdict, verdict.sentence) == (
            "does not hold",
            "For some factor or text, nothing changes at the site.",
        )


def test_a_change_upstream_is_no_construction_and_says_so() -> None:
    verdict = judged(evidence(), upstream=1e-30)[1]
    assert verdict.verdict == "does not hold"
    assert "differs between the two runs" in verdict.sentence
    assert verdict.evidence.endswith("1e-30.")
    assert verdict.figures == {"largest_difference_upstream": 1e-30}


@pytest.mark.parametrize(("name", "number"), [("growth", 3), ("dilution", 3), ("last_block", 5)])
@pytest.mark.parametrize("index", CHANGED)
def test_a_ratio_of_nothing_to_nothing_leaves_its_claim_undecided_in_words(name: str, number: int, index: int) -> None:
    tables = evidence()
    tables[name] = moved(tables[name], index, math.nan, math.nan, math.nan)
    verdict = judged(tables)[number]
    of_jump = {2: "does not hold"} if name == "growth" else {}  # its ratio starts at the site
    assert outcomes(tables) == {**outcomes(evidence()), **of_jump, number: "undecided"}
    assert verdict.sentence == claims.UNCHANGED_SOMEWHERE


def test_growth_is_called_dilution_only_where_the_stream_outgrows_it() -> None:
    for index in CHANGED:
        tables = evidence()
        tables["turning"] = moved(tables["turning"], index, -1, -1, -1)
        assert judged(tables)[3].sentence == claims.TURNED_BACK
        tables["dilution"] = moved(tables["dilution"], index, -1, -1, 0)
        assert judged(tables)[3].sentence == claims.DILUTED
        tables["dilution"] = moved(tables["dilution"], index, -1, -1, NUDGE)
        assert judged(tables)[3].sentence == claims.TURNED_BACK
        other = next(of for of in CHANGED if of != index)
        tables["dilution"] = moved(evidence()["dilution"], other, -1, -1, -1)
        assert judged(tables)[3].sentence == claims.TURNED_BACK, "another factor's dilution explains nothing"
        tables["growth"] = moved(tables["growth"], other, -1, -1, 0)
        assert judged(tables)[3].sentence == "For at least one factor, the later blocks take back some of the change."


def test_the_growth_verdict_quotes_its_own_figures() -> None:
    tables = evidence()
    tables["rising"] = moved(tables["rising"], 2, 0.4, 0.45, 0.6)
    found = judged(tables)[3]
    ends = [[math.exp(at + off) for off in (0, -0.01, 0.01)] for at in (0.7, 0.703, 0.4)]
    at_first, at_last, beside = (f"{mean:.3g} ({low:.3g} to {high:.3g})" for mean, low, high in ends)
    for part in (
        "for 2 of 3 factors",
        f"passive, is multiplied by {at_first} at factor 0.5 and {at_last} at factor 2.",
        f"grows as well, it is multiplied by {beside} at factor 0.5",
        "gauge_free rises by 0.2 (0.19 to 0.21) at factor 0.5 and 0.203 (0.193 to 0.213) at factor 2.",
    ):
        assert part in found.evidence
    figures = found.figures
    assert figures["factors"] == [0.5, 1.5, 2.0]
    assert figures["relative_over_passive"] == pytest.approx([math.exp(0.7 + step) for step in (0, 0.002, 0.003)])
    assert figures["relative_over_passive_low"] == pytest.approx([math.exp(0.69 + step) for step in (0, 0.002, 0.003)])
    assert figures["relative_last_over_site_high"] == pytest.approx(
        [math.exp(0.41 + step) for step in (0, 0.002, 0.003)]
    )
    assert figures["share_of_later_blocks_where_it_rises"] == pytest.approx([0.75, 0.45, 0.753])
    assert figures["gauge_free_rise"] == pytest.approx([0.2, 0.202, 0.203])
    values = tables["values"].value[POSITION_SETS.index("rest"), :, 0][:, CHANGED]
    for name in ("alignment", "attention_alignment", "mlp_alignment"):
        assert figures[f"{name}_by_block"] == values[MEASURES.index(name)][:, 1 : N_LAYER + 1].tolist()


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.2, -NUDGE, "repair for every factor: 4; that amplify for every factor: none; that do neither: 2, 3, 5."),
        (NUDGE, 0.2, "repair for every factor: none; that amplify for every factor: 4; that do neither: 2, 3, 5."),
        (-0.2, 0.0, "repair for every factor: none; that amplify for every factor: none; that do neither: 2, 3, 4, 5."),
        (0.0, 0.2, "repair for every factor: none; that amplify for every factor: none; that do neither: 2, 3, 4, 5."),
    ],
)
def test_a_block_repairs_or_amplifies_by_all_of_its_interval_at_every_factor(
    low: float, high: float, said: str
) -> None:
    tables = evidence()
    values, place = tables["values"], 4 + 1  # block 4's
    spread = {"low": torch.full_like(values.value, -1.0), "high": torch.full_like(values.value, 1.0)}
    cell = (POSITION_SETS.index("rest"), MEASURES.index("alignment"), 0, CHANGED, place)
    spread["low"][cell], spread["high"][cell] = low, high
    tables["values"] = Table(values.axes, values.value, spread, 30)
    assert said in judged(tables)[3].evidence
    spread["low"][(*cell[:3], 2, place)], spread["high"][(*cell[:3], 2, place)] = -1, 1
    assert "that do neither: 2, 3, 4, 5." in judged(tables)[3].evidence, "one factor is enough"


def test_the_jump_first_token_and_last_block_verdicts_quote_their_own_figures() -> None:
    tables, rest, frobenius = evidence(), POSITION_SETS.index("rest"), MEASURES.index("frobenius")
    tables["alone"] = Table(
        {"who": claims.WHO, "metric": ["frobenius", "kl"], "layer": [LAYER], "factor": [0.5, 2.0]},
        double([[[[11.0, 12]], [[0.13, 0.14]]], [[[15.0, 16]], [[0.17, 0.18]]]]),
    )
    found = judged(tables)
    curve = tables["values"].value[rest, frobenius, 0]
    assert found[2].evidence == "The jump is 5 at factor 0.5 and 10 at factor 2."
    assert found[2].figures == {"factors": [0.5, 1.5, 2.0], "jump": [5.0, 5.0, 10.0], "norm_at_site": 10.0}
    first = found[4]
    assert f"{math.exp(1.3):.3g} ({math.exp(1.29):.3g} to {math.exp(1.31):.3g}) times as large" in first.evidence
    assert "at most 12.5 times the others' mean norm (depth 2)" in first.evidence  # 50 / 4
    assert (
        "At factor 0.5, scaling position 0 alone moves the last depth by 11, and the kl of all predictions by 0.13 "
        "nats. Scaling all the others alone moves the last depth by 15, and the kl of all predictions by 0.17 nats."
    ) in first.evidence
    assert first.positions == "all"
    assert first.figures["alone_factors"] == [0.5, 2.0]
    assert first.figures["position_0_alone_kl"] == [0.13, 0.14]
    assert first.figures["others_alone_frobenius"] == [15.0, 16.0]
    assert first.figures["norm_of_position_0_by_depth"] == [7, 9, 50, 8, 6, 5, 4]
    assert first.figures["mean_norm_of_other_positions_by_depth"] == [2, 3, 4, 2, 2, 2, 2]
    expected = tables["with_first"].value[0, CHANGED, LAYER + 1 :].exp()
    torch.testing.assert_close(double(first.figures["all_over_rest_by_depth_from_site"]), expected)
    last = found[5]
    assert f"multiplies the raw difference by {math.exp(-0.3):.3g}" in last.evidence
    assert (
        f"it is {curve[0, -2]:.3g} after the last block, and {curve[0, -1]:.3g} after the final norm" in last.evidence
    )
    for name, place in (("raw_before_last_block", -3), ("raw_after_last_block", -2), ("after_final_norm", -1)):
        assert last.figures[name] == curve[CHANGED, place].tolist()
    assert last.figures["last_block_multiplies_by"][-1] == pytest.approx(math.exp(-0.297))


@pytest.mark.parametrize(("layer", "undecided"), [(N_LAYER - 1, {3, 5}), (N_LAYER - 2, {3}), (N_LAYER - 3, set[int]())])
def test_what_comes_after_the_site_decides_what_can_be_asked(layer: int, undecided: set[int]) -> None:
    tables = evidence()
    for name, table in tables.items():
        if "layer" in table.axes:
            tables[name] = table.named("layer", "layer", [layer])
    verdicts = judged(tables)
    assert {number for number, verdict in verdicts.items() if verdict.verdict == "undecided"} == undecided
    assert {verdict.layer for verdict in verdicts.values()} == {layer}


def test_evidence_is_what_its_definitions_say() -> None:
    """Of random curves, by loops: two texts, two layers, two factors and 1."""
    factors, layers, places = (0.5, 1.0, 3.0), (0, 2), N_LAYER + 2
    shape = [2, len(POSITION_SETS), len(MEASURES), 2, 3, places]
    values = 1 + torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    axes = {"positions": POSITION_SETS, "metric": MEASURES, "layer": layers, "factor": factors, "depth": DEPTHS}
    found = claims.evidence(by_text(values, **axes))
    for text in range(2):
        for i, layer in enumerate(layers):
            means = []
            for j, factor in enumerate(factors):

                def curve(name: str, positions: str, cell: tuple[int, int, int] = (text, i, j)) -> list[float]:
                    of = values[cell[0], POSITION_SETS.index(positions), [*MEASURES].index(name), cell[1], cell[2]]  # type: ignore[arg-type, call-overload]
                    return of.tolist()

                rest, everything = curve("frobenius", "rest"), curve("frobenius", "all")
                site, last = layer + 1, N_LAYER
                rises = [rest[block + 1] > rest[block] for block in range(layer + 1, N_LAYER)]
                gauge, relative = curve("gauge_free", "rest"), curve("relative", "rest")
                expected = {
                    "growth": math.log(rest[last] / rest[site]),
                    "rising": sum(rises) / len(rises),
                    "dilution": math.log(relative[last] / relative[site]),
                    "turning": gauge[last] - gauge[site + 1],
                    "last_block": math.log(rest[last] / rest[last - 1]),
                }
                for name, number in expected.items():
                    assert float(found[name].value[text, i, j]) == pytest.approx(number), name
                with_first = [math.log(of / others) for of, others in zip(everything, rest, strict=True)][:-1]
                assert found["with_first"].value[text, i, j].tolist() == pytest.approx(with_first)
                means += with_first[site:] if factor != 1 else []
            assert float(found["with_first_mean"].value[text, i]) == pytest.approx(sum(means) / len(means))


def test_a_log_of_nothing_is_not_a_number_and_leaves_the_others_alone() -> None:
    numbers = claims._log(torch.tensor([0.0, 1, 0, 2]), torch.tensor([0.0, 0, 1, 1]))
    assert numbers[:3].isnan().all()
    assert float(numbers[3]) == pytest.approx(math.log(2))


def test_a_difference_at_the_site_that_is_rounding_has_no_ratios() -> None:
    shape = [1, len(POSITION_SETS), len(MEASURES), 1, 2, N_LAYER + 2]
    values = torch.rand(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 1
    values[:, :, MEASURES.index("relative"), :, :, LAYER + 1] = double([1e-6, 1.01e-6])
    axes = {"positions": POSITION_SETS, "metric": MEASURES, "layer": [LAYER], "factor": [0.5, 2.0], "depth": DEPTHS}
    found = claims.evidence(by_text(values, **axes), rounding=1e-6)
    for name in ("growth", "last_block"):
        assert found[name].value.isfinite().tolist() == [[[False, True]]], name
    assert found["with_first_mean"].value.isnan().all()
    assert all(table.value.isfinite().all() for table in claims.evidence(by_text(values, **axes)).values())


# Token loss.


def loss_verdicts(
    tests: dict[str, Sequence[tuple[float, float]]] | None = None,
    correlation: Sequence[Sequence[tuple[float, float]]] = (((0.995, 0.999),) * 2,) * 2,
    factors: tuple[float, ...] = (0.6, 1.0, 0.8, 2.0),
    layers: tuple[int, ...] = (1, 7),
    exact: bool = False,
) -> dict[int, Verdict]:
    """Of intervals: `tests` for factors 0.6 and 0.8, the correlation [layer, factor] of the same two."""
    sure = {
        "lower": [(0.6, 0.7)] * 2,
        "cooler": [(0.61, 0.71)] * 2,
        "explained": [(0.62, 0.72)] * 2,
        "later half": [(0.1, 0.2)] * 2,
        "earlier half": [(-0.4, -0.3)] * 2,
    }
    given = {**sure, **(tests or {})}
    bounds = torch.full((len(token_loss.TESTS), len(factors), 2), -7.0).double()
    pattern = torch.full((len(layers), len(factors), 2), 0.9999).double()
    for index, factor in enumerate((0.6, 0.8)):
        if factor in factors:
            at = factors.index(factor)
            bounds[:, at] = double([given[test][index] for test in token_loss.TESTS])
            pattern[:, at] = double([of[index] for of in correlation][: len(layers)])
    pattern[:, [at for at, factor in enumerate(factors) if factor == 1]] = -1  # nothing is asked of factor 1
    axes: dict[str, Sequence[Any]] = {"layer": layers, "factor": factors}
    whole = {"test": token_loss.TESTS, "factor": factors}

    def table(of: dict[str, Sequence[Any]], ends: Tensor) -> Table:
        return Table(of, ends.mean(-1), {} if exact else {"low": ends[..., 0], "high": ends[..., 1]})

    experiment = token_loss.TokenLoss(token_loss.LossSettings(model="", prompt="", layers=layers, factors=factors))
    tables = {"tests": table(whole, bounds), "values": table({"metric": ["target_correlation"], **axes}, pattern[None])}
    study = Study(experiment.settings, {}, ["a", "b"], {}, Checked(), tables, None, None)  # type: ignore[arg-type]
    return {verdict.number: verdict for verdict in experiment.verdicts(study)}


def test_a_layer_is_cooler_where_its_temperature_is_below_1_and_it_moved_something() -> None:
    values = torch.zeros(1, len(token_loss.MEASURES), 4, 1, dtype=torch.float64)
    of = {name: values[0, index, :, 0] for index, name in enumerate(token_loss.MEASURES)}
    of["temperature"].copy_(double([0.5, 1.0, 0.9, 1.5]))
    of["kl_from_clean"].copy_(double([0.2, 0.2, 1e-9, 0.2]))
    tables = token_loss.tables_of(values, {"layer": range(4), "factor": [0.6]}, double([1e-6]))
    assert tables["tests"].value[0, token_loss.TESTS.index("cooler"), 0] == 0.25, "at exactly 1 it is not cooler"


BOTH = [(NUDGE, 1.0, "holds"), (0.0, 1.0, "undecided"), (-1.0, NUDGE, "undecided"), (-1.0, 0.0, "does not hold")]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize(("low", "high", "outcome"), BOTH)
def test_every_correlation_counts(layer: int, factor: int, low: float, high: float, outcome: str) -> None:
    cells = [[(0.995, 0.999)] * 2, [(0.995, 0.999)] * 2]
    cells[layer][factor] = (NEAR_0995 + low, NEAR_0995 + high)
    found = loss_verdicts(correlation=cells)
    assert {number: verdict.verdict for number, verdict in found.items()} == {1: outcome, 2: "holds", 3: "holds"}


@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize(
    ("test", "threshold", "number"),
    [("lower", MOST, 2), ("cooler", MOST, 2), ("explained", MOST, 2), ("later half", UNCHANGED, 3)],
)
@pytest.mark.parametrize(("low", "high", "outcome"), BOTH)
def test_every_share_counts_at_every_factor(
    test: str, threshold: float, number: int, factor: int, low: float, high: float, outcome: str
) -> None:
    changed = [(0.6, 0.7)] * 2
    changed[factor] = (threshold + low, threshold + high)
    found = loss_verdicts({test: changed})
    assert {of: verdict.verdict for of, verdict in found.items()} == {1: "holds", 2: "holds", 3: "holds"} | {
        number: outcome
    }
    if outcome == "does not hold" and number == 2:
        expected = token_loss.NOT_LOWER if test == "lower" else token_loss.NOT_A_TEMPERATURE
        assert found[2].sentence == expected


def test_the_earlier_half_decides_nothing_and_is_told() -> None:
    found = loss_verdicts({"earlier half": [(-9.0, 9.0)] * 2})
    assert found[3].verdict == "holds"
    assert found[3].evidence == (
        "At factor 0.6, scaling a layer of the later half changes the target's loss by 0.15 (0.1 to 0.2) nats on "
        "average, and scaling one of the earlier half by 0 (-9 to 9) nats."
    )
    assert found[3].figures["later_half"] == pytest.approx([0.15, 0.15])
    assert found[3].figures["earlier_half_low"] == [-9, -9]


def test_token_loss_quotes_its_own_figures() -> None:
    found = loss_verdicts(
        {"cooler": [(0.5, 1.0), (0.9, 0.9)]}, correlation=[[(0.995, 0.999), (0.97, 0.98)], [(0.995, 0.999)] * 2]
    )
    assert "lowest correlation is 0.975, when layer 1 is scaled" in found[1].evidence
    assert found[1].figures["target_correlation"][0] == pytest.approx([0.997, 0.975, 0.9999])
    assert "a share of 0.65 (0.6 to 0.7) of the layers lower the target's loss" in found[2].evidence
    assert "below 1 for a share of 0.75 (0.5 to 1) of the layers" in found[2].evidence
    assert "explain 0.67 (0.62 to 0.72) of the kl" in found[2].evidence
    assert found[2].figures["share_of_layers_that_lower_it"] == pytest.approx([0.65, 0.65])
    assert found[2].figures["share_of_layers_cooler_low"] == [0.5, 0.9]
    assert found[2].figures["share_of_kl_explained_high"] == [0.72, 0.72]
    of_text = loss_verdicts({"lower": [(0.5, 0.5)] * 2, "cooler": [(1.0, 1.0)] * 2}, exact=True)
    assert "At factor 0.6, 1 of 2 layers lower the target's loss" in of_text[2].evidence
    assert "below 1 for 2 of 2 layers" in of_text[2].evidence
    assert of_text[2].verdict == "does not hold", "a half is not most"


def test_a_share_of_no_kl_is_undefined_in_words() -> None:
    found = loss_verdicts({"explained": [(math.nan, math.nan), (0.6, 0.7)]})[2]
    assert (found.verdict, found.sentence) == ("undecided", token_loss.NO_CHANGE)
    assert "no kl beyond rounding" in found.evidence
    assert found.figures["share_of_kl_explained"][0] is None
    assert "nan" not in found.evidence
    lower = loss_verdicts({"explained": [(math.nan, math.nan)] * 2, "lower": [(0.1, 0.2)] * 2})[2]
    assert (lower.verdict, lower.sentence) == ("does not hold", token_loss.NOT_LOWER)
    open_share = loss_verdicts({"explained": [(0.4, 0.6)] * 2})[2]
    assert (open_share.verdict, open_share.sentence) == ("undecided", token_loss.OPEN_SHARES)


def test_a_single_layer_has_no_later_half_and_factors_from_1_on_lower_nothing() -> None:
    assert loss_verdicts(layers=(3,))[3].verdict == "undecided"
    found = {number: verdict.verdict for number, verdict in loss_verdicts(factors=(1.0, 2.0)).items()}
    assert found == {1: "holds", 2: "undecided", 3: "undecided"}


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_what_decides_is_made_of_the_layers_numbers(layers: int) -> None:
    """Of random numbers, by loops; a layer whose kl is rounding alone neither lowers the loss nor cools."""
    generator, rounding = torch.Generator().manual_seed(layers), [0.1, 0.2]
    values = torch.rand(2, len(token_loss.MEASURES), layers, 2, generator=generator, dtype=torch.float64)
    row = {name: index for index, name in enumerate(token_loss.MEASURES)}
    values[:, row["target_loss_change"]] -= 0.5
    values[:, row["temperature"]] += 0.5
    values[0, row["kl_from_clean"], 0, 0] = 0.05
    tables = token_loss.tables_of(values, {"layer": range(layers), "factor": [0.5, 0.6]}, torch.tensor(rounding))
    for text in range(2):
        for factor in range(2):
            cells = [{name: float(values[text, row[name], layer, factor]) for name in row} for layer in range(layers)]
            moved = [cell for cell in cells if cell["kl_from_clean"] > rounding[text]]
            changes = [cell["target_loss_change"] if cell in moved else 0.0 for cell in cells]
            later, earlier = changes[layers // 2 :], changes[: max(layers // 2, 1)]
            kl = sum(cell["kl_from_clean"] for cell in moved)
            left = sum(cell["kl_after_temperature"] for cell in moved)
            expected = [
                sum(change < 0 for change in changes) / layers,
                sum(cell["temperature"] < 1 for cell in moved) / layers,
                1 - left / kl if kl else math.nan,
                sum(later) / len(later),
                sum(earlier) / len(earlier),
            ]
            found = tables["tests"].at(text=text).value[:, factor].tolist()
            assert found == pytest.approx(expected, nan_ok=True)
    assert tables["values"].value is values


# Skip a layer.


@pytest.mark.parametrize(
    ("added", "verdict"), [((0.0, 0.0, 0.0), "true by construction"), ((0, 3e-9, 0), "does not hold")]
)
def test_one_skipped_block_that_adds_something_is_no_construction(added: tuple[float, ...], verdict: str) -> None:
    experiment = SkipLayer(SkipSettings(model="", prompt="", layers=(0, 1)))
    tables = {"added": Table({"skipped": list(experiment.skipped)}, double(added))}
    study = Study(experiment.settings, {}, ["a", "b"], {}, Checked(), tables, None, None)  # type: ignore[arg-type]
    (found,) = experiment.verdicts(study)
    assert found.verdict == verdict
    assert found.figures == {"largest_norm_at_a_skipped_block": max(added)}
    assert f"is {max(added):g}, at every" in found.evidence


# What they are made of.


def test_a_threshold_itself_is_below_and_not_above() -> None:
    table = Table({"factor": [1, 2, 3]}, double([0.5, 0.5 + NUDGE, 0.5 - NUDGE]))
    assert above(table, 0.5).tolist() == [False, True, False]
    assert below(table, 0.5).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("true", "false", "outcome"),
    [
        ([1, 1], [0, 0], "holds"),
        ([1, 0], [0, 0], "undecided"),
        ([0, 0], [0, 0], "undecided"),
        ([1, 0], [0, 1], "does not hold"),
        ([0, 0], [0, 1], "does not hold"),
    ],
)
def test_one_sure_no_is_enough_and_every_yes_is_needed(true: list[int], false: list[int], outcome: str) -> None:
    assert all_of(torch.tensor(true).bool(), torch.tensor(false).bool()) == outcome


def test_numbers_are_written_with_their_intervals_and_the_undefined_in_words() -> None:
    low, value, high = (torch.tensor(of) for of in (1.0, 2.3456, 3.0))
    assert within(Table({}, value)) == "2.35"
    assert within(Table({}, value, {"low": low, "high": high}), 2) == "2.3 (1 to 3)"
    assert within(Table({}, torch.tensor(math.nan), {"low": low, "high": high})) == "undefined"
    assert (readable(math.nan), readable(0.00012345678), readable(12345.678, 3)) == (
        "undefined",
        "0.0001235",
        "1.23e+04",
    )
    assert [counted(count, "window") for count in (0, 1, 2)] == ["0 windows", "1 window", "2 windows"]
    figures = figures_of(a=Table({}, value), b=Table({"of": [1]}, value[None], {"low": low[None], "high": high[None]}))
    assert list(figures) == ["a", "b", "b_low", "b_high"]
    assert (figures["b_low"], figures["b_high"]) == ([1.0], [3.0])


def test_a_site_is_named_by_what_its_index_counts() -> None:
    assert site_in_words("output", {}) == "output"
    assert site_in_words("head", {"head": 3}) == "head 3"
    assert site_in_words("query", {"head": 3}) == "query of head 3"
    assert describe_entry(2, {"neuron": 7}) == "block 2, neuron 7"


def test_verdicts_say_where_and_know_no_number_that_json_does_not() -> None:
    figures = {"one": math.nan, "many": [[1.0, math.inf], [2]], "name": "x"}
    of_neuron = Verdict.of(3, "It grows", Decision("holds", "Yes.", "1 of 1.", figures), "a prompt", 2, {"neuron": 7})
    said = of_neuron.to_json()
    assert said["figures"] == {"one": None, "many": [[1.0, None], [2]], "name": "x"}
    assert (said["layer"], said["neuron"], said["where"]) == (2, 7, "block 2, neuron 7")
    assert "head" not in said and "index" not in said
    assert (said["basis"], said["positions"], said["number"]) == ("a prompt", "rest", 3)
    own = Verdict.of(1, "", Decision("holds", "", basis="its own"), "a prompt")
    assert (own.basis, own.where) == ("its own", "all layers")
    other = Verdict.of(3, "It grows", Decision("undecided", "Who knows?"), "a prompt", 4)
    assert list(lines_of([of_neuron, other], 40)) == [
        "3. It grows: holds (a prompt).",
        "   Yes.",
        "   1 of 1.",
        "block 4: 3 undecided",
    ]


def test_intervals_over_few_windows_decide_nothing_and_say_why() -> None:
    for outcome in ("holds", "does not hold", "undecided", "true by construction"):
        verdict = Verdict.of(3, "", Decision(outcome, "why"), "")  # type: ignore[arg-type]
        for windows in (None, 1, FEWEST_WINDOWS - 1, FEWEST_WINDOWS):
            few = windows in (1, FEWEST_WINDOWS - 1) and outcome in ("holds", "does not hold")
            assert verdict.over(windows).verdict == ("undecided" if few else outcome)
            assert (verdict.over(windows).sentence == "why") is not few
    assert "over 1 window is" in Verdict.of(3, "", Decision("holds", ""), "").over(1).sentence


def test_every_operation_takes_the_spread_along_and_mixes_up_no_end() -> None:
    """Ends are the mean less 0.1 and plus 0.2, so that no two numbers are equal."""
    value = torch.arange(12.0).view(3, 4).double()
    table = Table(
        {"layer": [2, 0, 5], "depth": [0, 1, 2, "final"]}, value, {"low": value - 0.1, "high": value + 0.2}, 30
    )
    same: Callable[[Tensor], Tensor] = lambda numbers: numbers  # noqa: E731
    steps = {
        "at": (table.at(layer=[5, 2], depth=1), torch.tensor([9.0, 1.0])),
        "named": (table.named("layer", "block", ["a", "b", "c"]).at(block="b"), torch.tensor([4.0, 5, 6, 7])),
        "split": (table.split("depth", half=[0, 1], of=["x", "y"]).at(half=1, of="x"), torch.tensor([2.0, 6, 10])),
        "map": (table.map(lambda numbers: 2 * numbers).map(same).at(layer=0, depth="final"), torch.tensor(14.0)),
    }
    for name, (found, expected) in steps.items():
        factor = 2 if name == "map" else 1
        assert torch.equal(found.value, expected.double()), name
        torch.testing.assert_close(found.low, expected.double() - 0.1 * factor)
        torch.testing.assert_close(found.high, expected.double() + 0.2 * factor)
        assert found.windows == 30
    (row, *_) = table.at(layer=[5], depth=["final"]).rows(model="m")
    names = ("model", "layer", "depth", "value", "low", "high", "windows")
    assert list(row.items()) == list(zip(names, ("m", 5, "final", 11.0, 10.9, 11.2, 30), strict=True))
    alone = Table({}, torch.tensor(3.0))
    assert alone.low is alone.value is alone.high
    assert of_text({"a": by_text(value[:1], of=range(4))})["a"].value.tolist() == [0, 1, 2, 3]
