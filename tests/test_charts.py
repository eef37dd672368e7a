"""The charts: every number that can be read off one is the number that belongs there.

A chart is drawn, and read as a person reads it: marks by the labels of the axes, colours by the legend (see
`tests/seen.py`). What should stand there comes from runs of the library, without the experiment's tables.
"""

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("altair")

from experiments.harness import writing
from experiments.harness.options import parse_indices
from experiments.page import charts, report
from experiments.page.figures import VISIBLE, Figure, Figures, label_of, reach_of, rounded
from minigpt import Sweep, compare, sensitivity, sweep
from minigpt.measures import MEASURES
from tests import seen
from tests.seen import Chart, Mark, settings, shown
from tests.studies import BLOCKS, KINDS, LETTERS, PLACES, PROMPT, TEXTS, Ran, ran, small_model

SETS = ("rest", "all", "first")
TITLES = {
    "frobenius": "norm of the change (frobenius), units of the stream",
    "relative": "change beside the stream's norm (relative)",
    "gauge_free": "change that no rescaling explains (gauge_free)",
    "cosine": "cosine of scaled and clean (cosine)",
}
PARTS = {"attention": "attention_alignment", "MLP": "mlp_alignment", "both": "alignment"}
WRITTEN = {
    "carried": "frobenius",
    "written by attention": "attention_written",
    "written by MLP": "mlp_written",
    "written by the block": "written",
}
EVERY = [("layers", False), ("layers", True), ("heads", False)]
"""Studies of `KINDS`, and whether over a corpus."""
ENTRIES = {
    "layers": [f"output of block {layer}" for layer in range(4)],
    "heads": [f"head {head} of block {layer} at position 3" for layer in (2, 0) for head in (2, 0)],
    "mlp": [f"MLP of block {layer}" for layer in range(4)],
}
"""Of a prompt's page, in its order: every layer, or the heads that were asked for."""
LAYERS = {"layers": (2, 0), "heads": (2, 2, 0, 0), "mlp": (1,), "near": (1,)}


def texts_of(corpus: bool) -> list[list[int]]:
    """The ids of all windows, or of the prompt."""
    return [LETTERS.encode(text) for text in (TEXTS if corpus else [PROMPT])]


def layers_of(name: str, corpus: bool) -> Sequence[int]:
    """The layer of every entry that a page shows."""
    return LAYERS[name] if corpus or name == "heads" else range(4)


def entries_of(name: str, corpus: bool) -> list[str]:
    """The entries that a page shows, by name."""
    return [ENTRIES[name][layer] for layer in LAYERS[name]] if corpus and name != "heads" else ENTRIES[name]


@cache
def run_of(name: str, corpus: bool) -> Sweep:
    """A run of its own of what a page shows."""
    asked = {"indices": None, "positions": None, "site": "output", **KINDS[name][2]}
    layers = sorted(set(layers_of(name, corpus)), key=list(layers_of(name, corpus)).index)
    return sweep(small_model(), texts_of(corpus), **{**asked, "layers": layers}, predictions=True)


@cache
def expected(name: str, corpus: bool, metric: Any, positions: Any) -> Tensor:
    """A measure, of the prompt or its mean over windows: [entry, factor, place]."""
    return run_of(name, corpus).measure(metric, positions).mean(-1)


def ends_of(run: Ran, metric: str, positions: str) -> list[Tensor]:
    """Lower and upper end of a corpus measure's interval: [entry, factor, place]."""
    table = run.study.tables["values"]
    index = (list(table.axes["positions"]).index(positions), list(table.axes["metric"]).index(metric))
    return [table.spread[end][index] for end in ("low", "high")]


def same(found: dict[Any, float], expected: dict[Any, Any]) -> None:
    """The same numbers at the same labels, to a page's digits; what has no number has no mark."""
    numbers = {label: float(value) for label, value in expected.items() if math.isfinite(value)}
    assert set(found) == set(numbers)
    reach = max(map(abs, numbers.values()), default=0)
    assert found == pytest.approx(numbers, rel=seen.EXACT, abs=seen.PIXEL * reach + 1e-12)


def said(points: dict[tuple[str, str], Mark], chart: Chart) -> dict[tuple[str, str], float]:
    """The numbers of points, by the axis."""
    return {key: chart.y.number(point.middle) for key, point in points.items()}


def of_metric(name: str, corpus: bool, metric: str, chosen: dict[str, Any]) -> Tensor:
    """A measure as the controls ask for it: [entry, factor, place]."""
    return expected(name, corpus, metric, chosen.get("positions", "rest"))


# The divergence study.


@pytest.mark.parametrize(("name", "corpus"), EVERY)
def test_a_line_is_a_factor_and_stands_at_every_place_where_the_table_has_it(name: str, corpus: bool) -> None:
    run, entries, layers = ran(name, corpus), entries_of(name, corpus), layers_of(name, corpus)
    factors = KINDS[name][2]["factors"]
    for chosen in settings(run.figures, ("layer", "factor", "measure", "positions")):
        chart, entry = shown(run.figures, "lines", **chosen), entries.index(chosen["layer"])
        values, passive = (of_metric(name, corpus, of, chosen)[entry] for of in (chosen["measure"], "passive"))
        numbers = {
            (label_of(factor), place): values[j, k]
            for j, factor in enumerate(factors)
            for k, place in enumerate(PLACES)
        }
        if chosen["measure"] == "relative":
            j, label = factors.index(chosen["factor"]), f"{label_of(chosen['factor'])} dashed"
            numbers |= {(label, PLACES[k]): passive[j, k] for k in range(5) if passive[j, k] > 0}
        points = chart.lines()
        same(said(points, chart), numbers)
        assert list(chart.x.labels) == PLACES
        assert (chart.x.title, chart.y.title) == ("place in the residual stream", TITLES[chosen["measure"]])
        assert chart.rules() == [PLACES[layers[entry] + 1]]
        thick = {key[0].removesuffix(" dashed") for key, point in points.items() if point.item.get("strokeWidth") == 3}
        assert thick == {label_of(chosen["factor"])}
        assert {point.kind for key, point in points.items() if key[1] == "final norm"} <= {"rect"}
        assert {point.kind for key, point in points.items() if key[1] != "final norm"} == {"line"}


@pytest.mark.parametrize(("name", "corpus"), EVERY)
def test_a_lines_colour_is_its_factors_in_the_legend(name: str, corpus: bool) -> None:
    chart, factors = shown(ran(name, corpus).figures, "lines"), KINDS[name][2]["factors"]
    assert list(chart.legend) == [label_of(factor) for factor in sorted(factors, reverse=True)]
    assert chart.legend_title == "factor"
    for (factor, _), point in chart.lines().items():
        assert point.colour == chart.legend[factor]
    reach, (blue, grey, orange) = (
        max(abs(factor - 1) for factor in factors),
        ((43, 123, 217), (154, 163, 173), (217, 105, 30)),
    )
    for label, colour in chart.legend.items():
        off, end = abs(float(label) - 1) / reach, orange if float(label) > 1 else blue
        mixed = [a + (b - a) * off for a, b in zip(grey, end, strict=True)]
        assert seen.rgb(colour) == pytest.approx(mixed, abs=1)


@pytest.mark.parametrize("name", ["layers", "heads"])
def test_a_band_is_the_interval_of_the_chosen_factor_and_measure(name: str) -> None:
    run, factors, entries = ran(name, corpus=True), KINDS[name][2]["factors"], entries_of(name, corpus=True)
    for chosen in settings(run.figures, ("layer", "factor", "measure", "positions")):
        chart, j = shown(run.figures, "lines", **chosen), factors.index(chosen["factor"])
        low, high = (
            of[entries.index(chosen["layer"]), j] for of in ends_of(run, chosen["measure"], chosen["positions"])
        )
        band = chart.of("area")
        for end, numbers in (("y", low), ("y2", high)):
            ends = {chart.x.label(mark.x): chart.y.number(mark.item[end]) for mark in band}
            same(ends, dict(zip(PLACES[:-1], numbers, strict=False)))
        assert {mark.colour for mark in band} == {chart.legend[label_of(chosen["factor"])]}
        assert bool((low <= high).all())
    assert not shown(ran(name).figures, "lines").of("area")


@pytest.mark.parametrize(("name", "corpus"), EVERY)
def test_the_image_has_a_row_for_each_factor_the_largest_on_top(name: str, corpus: bool) -> None:
    run, entries, factors = ran(name, corpus), entries_of(name, corpus), KINDS[name][2]["factors"]
    for chosen in settings(run.figures, ("layer", "measure", "positions")):
        chart, entry = shown(run.figures, "image", **chosen), entries.index(chosen["layer"])
        values = of_metric(name, corpus, chosen["measure"], chosen)[entry]
        numbers = {
            (label_of(factor), place): values[j, k]
            for j, factor in enumerate(factors)
            for k, place in enumerate(PLACES)
        }
        same(chart.cells(), numbers)
        assert list(chart.y.labels) == [label_of(factor) for factor in sorted(factors, reverse=True)]
        assert (list(chart.x.labels), chart.x.title, chart.y.title) == (
            PLACES,
            "place in the residual stream",
            "factor",
        )
        assert chart.legend_title == TITLES[chosen["measure"]]
        assert chart.rules() == [PLACES[layers_of(name, corpus)[entry] + 1]]


@pytest.mark.parametrize(("name", "corpus"), EVERY)
def test_the_grid_has_a_row_for_each_entry_in_the_order_of_the_table(name: str, corpus: bool) -> None:
    run, entries, factors = ran(name, corpus), entries_of(name, corpus), KINDS[name][2]["factors"]
    if len(entries) == 1:
        assert "grid" not in {figure.name for figure in run.figures.figures}, "the lines show it all"
        return
    for chosen in settings(run.figures, ("factor", "measure", "positions")):
        chart, j = shown(run.figures, "grid", **chosen), factors.index(chosen["factor"])
        values = of_metric(name, corpus, chosen["measure"], chosen)[:, j]
        same(
            chart.cells(),
            {(entry, place): values[i, k] for i, entry in enumerate(entries) for k, place in enumerate(PLACES)},
        )
        assert (list(chart.x.labels), list(chart.y.labels)) == (PLACES, entries)
        assert (chart.x.title, chart.y.title) == ("place in the residual stream", "scaled")
        assert chart.legend_title == TITLES[chosen["measure"]]
        assert not chart.rules()


@pytest.mark.parametrize(("name", "corpus"), EVERY)
def test_blocks_after_the_scaled_one_have_their_alignment_by_part(name: str, corpus: bool) -> None:
    run, entries, factors = ran(name, corpus), entries_of(name, corpus), KINDS[name][2]["factors"]
    reach = max(
        float(expected(name, corpus, metric, of)[i, :, layer + 2 :].nan_to_num().abs().max())
        for metric in PARTS.values()
        for of in SETS
        for i, layer in enumerate(layers_of(name, corpus))
        if layer < 3
    )
    for chosen in settings(run.figures, ("layer", "factor", "positions")):
        i, j = entries.index(chosen["layer"]), factors.index(chosen["factor"])
        layer, chart = layers_of(name, corpus)[i], shown(run.figures, "alignment", **chosen)
        numbers = {
            (f"block {block}", part): of_metric(name, corpus, metric, chosen)[i, j, block + 1]
            for part, metric in PARTS.items()
            for block in range(layer + 1, 4)
        }
        same(chart.bars(), numbers)
        assert (list(chart.x.labels), list(chart.legend)) == (BLOCKS, list(PARTS))
        assert (chart.x.title, chart.y.title) == ("block", "cosine of carried and written")
        assert all(parts == list(PARTS) for parts in chart.side_by_side().values())
        top, bottom = chart.y.number(0), chart.y.number(320)  # the same for all choices, and around 0
        assert reach * (1 - seen.EXACT) <= top < 2 * reach
        assert top == pytest.approx(-bottom)


@pytest.mark.parametrize(("name", "corpus"), EVERY)
def test_what_is_carried_is_the_change_that_enters_a_block_and_what_is_written_the_blocks_own(
    name: str, corpus: bool
) -> None:
    run, entries, factors = ran(name, corpus), entries_of(name, corpus), KINDS[name][2]["factors"]
    for chosen in settings(run.figures, ("layer", "factor", "positions")):
        i, j = entries.index(chosen["layer"]), factors.index(chosen["factor"])
        layer, chart = layers_of(name, corpus)[i], shown(run.figures, "written", **chosen)
        numbers = {
            (part, f"block {block}"): of_metric(name, corpus, metric, chosen)[i, j, block + (part != "carried")]
            for part, metric in WRITTEN.items()
            for block in range(4)
            if part == "carried" or block > layer
        }
        points = chart.lines()
        same(said(points, chart), numbers)
        assert all(point.colour == chart.legend[part] for (part, _), point in points.items())
        assert (list(chart.x.labels), list(chart.legend)) == (BLOCKS, list(WRITTEN))
        assert (chart.x.title, chart.y.title) == ("block", "norm, units of the stream")


UNITS = {"kl": "nats per token", "loss_change": "nats per token", "changed": "share of positions"}


@pytest.mark.parametrize(("name", "corpus"), [*EVERY, ("mlp", False)])
@pytest.mark.parametrize("metric", UNITS)
def test_what_reaches_the_predictions_stands_by_entry_and_factor(name: str, corpus: bool, metric: str) -> None:
    run, entries, factors = ran(name, corpus), entries_of(name, corpus), KINDS[name][2]["factors"]
    for chosen in settings(run.figures, ("positions",)):
        chart, values = shown(run.figures, metric, **chosen), of_metric(name, corpus, metric, chosen)[:, :, -1]
        same(
            chart.cells(),
            {(entry, label_of(of)): values[i, j] for i, entry in enumerate(entries) for j, of in enumerate(factors)},
        )
        assert (list(chart.x.labels), list(chart.y.labels)) == ([label_of(of) for of in factors], entries)
        assert (chart.x.title, chart.y.title) == ("factor", "scaled")
        assert chart.legend_title == f"{metric}, {UNITS[metric]}"
        if metric == "loss_change":
            reach = max(float(expected(name, corpus, metric, of)[:, :, -1].nan_to_num().abs().max()) for of in SETS)
            assert chart.ends == pytest.approx((-reach, reach), rel=1e-4)
            assert chart.shade(reach)[0] > chart.shade(reach)[2], "orange: less likely"


@pytest.mark.parametrize("name", ["layers", "heads"])
def test_the_token_map_has_a_row_for_each_token_from_the_first_down(name: str) -> None:
    run, factors, entries = ran(name), KINDS[name][2]["factors"], ENTRIES[name]
    norms = run_of(name, False).statistics.difference_sq[:, :, :, 0].sqrt()  # [entry, factor, place, position]
    tokens = [f"{position} {letter}".replace("  ", " \u00b7") for position, letter in enumerate(PROMPT)]
    for chosen in settings(run.figures, ("layer", "factor", "first")):
        i, j = entries.index(chosen["layer"]), factors.index(chosen["factor"])
        chart, left_out = shown(run.figures, "tokens", **chosen), 0 if chosen["first"] else 1
        numbers = {
            (token, place): norms[i, j, k, position]
            for position, token in list(enumerate(tokens))[left_out:]
            for k, place in enumerate(PLACES)
        }
        same(chart.cells(), numbers)
        assert (list(chart.x.labels), list(chart.y.labels)) == (PLACES, tokens[left_out:])
        assert (chart.x.title, chart.y.title) == ("place in the residual stream", "position and token")
        assert chart.legend_title == "norm of scaled minus clean, units of the stream"
        assert chart.rules() == [PLACES[layers_of(name, False)[i] + 1]]


@pytest.mark.parametrize(("name", "corpus"), [*EVERY, ("mlp", False)])
def test_a_page_opens_on_what_was_asked_for_and_offers_all_that_it_has(name: str, corpus: bool) -> None:
    controls = {control.name: control for control in ran(name, corpus).figures.controls}
    options = {of: list(control.options) for of, control in controls.items()}
    factors, entries = KINDS[name][2]["factors"], entries_of(name, corpus)
    assert options["layer"] == [(entry, entry) for entry in entries]
    assert controls["layer"].value == ENTRIES[name][0 if name == "heads" else LAYERS[name][0]]
    assert options["factor"] == [(factor, label_of(factor)) for factor in factors]
    assert controls["factor"].value == 1.75
    assert [f"{text}, units of the stream" if of == "frobenius" else text for of, text in options["measure"]] == [
        TITLES[str(of)] for of, _ in options["measure"]
    ]
    assert options["positions"] == [
        ("rest", "all but the first token"),
        ("all", "all tokens"),
        ("first", "the first token"),
    ]
    assert ("first" in options) != corpus
    assert options.get("first", [(True, "shown")])[0] == (True, "shown")


@pytest.mark.parametrize("name", ["layers", "heads", "mlp"])
def test_the_likeliest_tokens_of_a_cell_are_those_of_its_run(name: str) -> None:
    run, statistics = ran(name), run_of(name, False).statistics
    factors, cells = (
        KINDS[name][2]["factors"],
        {(row["layer"], row["factor"]): row for row in ran(name).figures.predictions},
    )
    assert set(cells) == {(entry, factor) for entry in ENTRIES[name] for factor in factors}
    assert statistics.predictions and statistics.clean_predictions and not ran(name, corpus=True).figures.predictions
    for (entry, factor), row in cells.items():
        i, j = ENTRIES[name].index(entry), factors.index(factor)
        for which, of in (("clean", statistics.clean_predictions), ("scaled", statistics.predictions)):
            at = (0,) if which == "clean" else (i, j, 0)
            letters = [token.replace(" ", "\u00b7") for token in LETTERS.tokens(of.top[at].tolist())]
            assert [token for token, _ in row[which]] == [shown_as(token) for token in letters]
            assert [p for _, p in row[which]] == pytest.approx(of.top_probability[at].tolist(), rel=seen.EXACT)
            assert sorted((p for _, p in row[which]), reverse=True) == [p for _, p in row[which]]
    assert run.figures.predictions_title == "The ten most likely tokens after the text"


def shown_as(token: str) -> str:
    """A token of the small model's last ids, which are control characters, as a page shows it."""
    return {"\x7f": "\u2421"}.get(token, token)


# Token loss.

LOSS_LAYERS, LOSS_FACTORS = (0, 2, 3), (2.0, 0.6)
BARS = {
    "loss": ({"the whole text": "loss_change", "the target": "target_loss_change"}, "change of the loss, nats"),
    "correlation": (
        {"mean over the text": "correlation", "where the target is predicted": "target_correlation"},
        "correlation",
    ),
    "temperature": (
        {"kl(scaled, clean)": "kl_from_clean", "left after the best temperature": "kl_after_temperature"},
        "kl, nats per token",
    ),
}
"""Of each chart: what its bars are called, and the axis."""


def row_of(run: Ran, **labels: object) -> dict[str, Any]:
    """The one row of the file with these labels."""
    (found,) = (
        row for row in run.experiment.rows(run.study) if all(row.get(name) == label for name, label in labels.items())
    )
    return found


@pytest.mark.parametrize("corpus", [False, True])
@pytest.mark.parametrize("kind", BARS)
def test_a_layers_bars_are_its_numbers_in_the_file(corpus: bool, kind: str) -> None:
    run, (parts, title) = ran("token_loss", corpus), BARS[kind]
    for factor in LOSS_FACTORS:
        chart = shown(run.figures, kind, factor=factor)
        rows = {
            (f"block {layer}", part): row_of(run, layer=layer, factor=factor, metric=metric)
            for layer in LOSS_LAYERS
            for part, metric in parts.items()
        }
        same(chart.bars(), {key: row["value"] for key, row in rows.items()})
        assert list(chart.x.labels) == [f"block {layer}" for layer in LOSS_LAYERS]
        assert (chart.x.title, chart.y.title, list(chart.legend)) == ("scaled", title, list(parts))
        assert all(of == list(parts) for of in chart.side_by_side().values())
        intervals_of_bars(chart, rows, corpus)


def intervals_of_bars(chart: Chart, rows: dict[Any, dict[str, Any]], corpus: bool) -> None:
    """Every bar has its interval in its middle, over a corpus."""
    middles = {round(bar.x, 6): bar for bar in chart.of("rect")}
    whiskers = {round(rule.x, 6): rule for rule in chart.of("rule") if rule.item.get("strokeWidth") == 2}
    assert set(whiskers) == (set(middles) if corpus else set())
    names = {colour: text for text, colour in chart.legend.items()} if chart.legends else {}
    for end, column in (("y", "low"), ("y2", "high")):
        ends = {}
        for middle, rule in whiskers.items():
            of = [names[middles[middle].colour]] if names else []
            ends[chart.x.label(middles[middle].x), *of] = chart.y.number(rule.item[end])
        same(ends, {key: row[column] for key, row in rows.items()} if corpus else {})


@pytest.mark.parametrize("corpus", [False, True])
def test_the_loss_of_the_file_is_that_of_a_sweep(corpus: bool) -> None:
    run = ran("token_loss", corpus)
    result = sweep(small_model(), texts_of(corpus), LOSS_LAYERS, LOSS_FACTORS, predictions=True)
    scaled, clean = result.statistics.predictions, result.statistics.clean_predictions
    assert scaled is not None and clean is not None
    ends, texts = result.lengths - 2, torch.arange(len(result.lengths))
    change = (scaled.loss - clean.loss)[:, :, texts, ends].mean(-1)
    for i, layer in enumerate(LOSS_LAYERS):
        for j, factor in enumerate(LOSS_FACTORS):
            of_target = row_of(run, layer=layer, factor=factor, metric="target_loss_change")
            of_text = row_of(run, layer=layer, factor=factor, metric="loss_change")
            assert of_target["value"] == pytest.approx(float(change[i, j]))
            assert of_text["value"] == pytest.approx(float(result.measure("loss_change", "all")[i, j, -1].mean()))


def test_the_map_of_suffering_tokens_is_the_change_of_each_tokens_own_loss() -> None:
    run, ids = ran("token_loss"), torch.tensor(texts_of(corpus=False))
    result = sweep(small_model(), ids, LOSS_LAYERS, LOSS_FACTORS, predictions=True)
    scaled, clean = result.statistics.predictions, result.statistics.clean_predictions
    assert scaled is not None and clean is not None
    change = (scaled.loss - clean.loss)[:, :, 0]  # [layer, factor, position that predicts]
    tokens = [f"{position} {letter}".replace("  ", " \u00b7") for position, letter in enumerate(PROMPT)]
    for j, factor in enumerate(LOSS_FACTORS):
        chart = shown(run.figures, "tokens", factor=factor)
        numbers = {
            (tokens[position], f"block {layer}"): change[i, j, position - 1]
            for position in range(1, len(tokens))
            for i, layer in enumerate(LOSS_LAYERS)
        }
        same(chart.cells(), numbers)
        assert list(chart.y.labels) == tokens[1:]
        assert list(chart.x.labels) == [f"block {layer}" for layer in LOSS_LAYERS]
        assert (chart.x.title, chart.y.title) == ("scaled", "position and token")
        assert chart.legend_title == "change of the loss, nats"
        reach = float(change[:, :, :-1].abs().max())
        assert chart.ends == pytest.approx((-reach, reach), rel=1e-4)
        assert chart.shade(reach)[0] > chart.shade(reach)[2], "orange: less likely"


def test_token_loss_offers_its_factors_and_what_could_have_come() -> None:
    run = ran("token_loss")
    before = sweep(small_model(), [texts_of(corpus=False)[0][:-1]], LOSS_LAYERS, LOSS_FACTORS, predictions=True)
    scaled = before.statistics.predictions
    assert scaled is not None
    cells = {(row["layer"], row["factor"]): row for row in run.figures.predictions}
    assert len(cells) == 6
    for i, layer in enumerate(LOSS_LAYERS):
        for j, factor in enumerate(LOSS_FACTORS):
            of = cells[f"block {layer}", factor]["scaled"]
            assert [p for _, p in of] == pytest.approx(scaled.top_probability[i, j, 0].tolist(), rel=seen.EXACT)
    controls = {control.name: control for control in run.figures.controls}
    assert list(controls["factor"].options) == [(2.0, "2"), (0.6, "0.6")]
    assert list(controls["layer"].options) == [(f"block {layer}", f"block {layer}") for layer in LOSS_LAYERS]
    assert (controls["factor"].value, controls["layer"].value) == (2.0, "block 0")
    assert [control.name for control in ran("token_loss", corpus=True).figures.controls] == ["factor"]


# Skip a layer.

SKIPPED = {"block 3": (3,), "block 0": (0,), "block 1": (1,), "blocks 0, 1": (0, 1)}
COSTS = {"loss_change": "loss change, nats per token", "kl": "kl, nats per token", "changed": "share of positions"}


@cache
def skips(corpus: bool) -> Any:
    """Every block of `SKIPPED` skipped, by the library."""
    edits = [
        {f"blocks.{block}.{part}_scale": 0.0 for block in blocks for part in ("attention", "mlp")}
        for blocks in SKIPPED.values()
    ]
    return compare(small_model(), texts_of(corpus), edits, predictions=True, steps=True)


@pytest.mark.parametrize("corpus", [False, True])
def test_the_steps_of_the_clean_run_and_of_the_skipped_one_are_told_apart(corpus: bool) -> None:
    run, found = ran("skip_layer", corpus), skips(corpus)
    clean = found.clean_steps_sq[..., 1:].sum(-1).sqrt().mean(-1)  # [block]
    skipped = found.steps_sq[..., 1:].sum(-1).sqrt().mean(-1)  # [intervention, block]
    for i, name in enumerate(SKIPPED):
        chart = shown(run.figures, "steps", skipped=name)
        numbers = {("clean", block): clean[k] for k, block in enumerate(BLOCKS)}
        numbers |= {("skipped", block): skipped[i, k] for k, block in enumerate(BLOCKS)}
        points = chart.lines()
        same(said(points, chart), numbers)
        assert all(point.colour == chart.legend[part] for (part, _), point in points.items())
        assert (list(chart.x.labels), list(chart.legend)) == (BLOCKS, ["clean", "skipped"])
        assert (chart.x.title, chart.y.title) == ("block", "norm of what a block adds, units of the stream")
        zero = {
            place for (part, place), point in points.items() if part == "skipped" and chart.y.number(point.middle) == 0
        }
        assert zero == {f"block {block}" for block in SKIPPED[name]}


@pytest.mark.parametrize("corpus", [False, True])
def test_the_change_by_skipped_block_is_over_all_positions_but_the_first(corpus: bool) -> None:
    chart, values = (
        shown(ran("skip_layer", corpus).figures, "change"),
        skips(corpus).measure("relative", "rest").mean(-1),
    )
    same(
        chart.cells(), {(name, place): values[i, k] for i, name in enumerate(SKIPPED) for k, place in enumerate(PLACES)}
    )
    assert (list(chart.x.labels), list(chart.y.labels)) == (PLACES, list(SKIPPED))
    assert (chart.x.title, chart.y.title) == ("place in the residual stream", "skipped")
    assert chart.legend_title == TITLES["relative"]


@pytest.mark.parametrize("corpus", [False, True])
@pytest.mark.parametrize("metric", COSTS)
def test_what_skipping_costs_is_read_off_the_predictions(corpus: bool, metric: Any) -> None:
    run = ran("skip_layer", corpus)
    chart, values = shown(run.figures, metric), skips(corpus).measure(metric, "rest")[:, -1].mean(-1)
    same(chart.bars(), {(name,): values[i] for i, name in enumerate(SKIPPED)})
    assert list(chart.x.labels) == list(SKIPPED)
    assert (chart.x.title, chart.y.title) == ("skipped", COSTS[metric])
    labels = {"metric": metric, "positions": "rest", "depth": "final"}
    intervals_of_bars(chart, {(name,): row_of(run, skipped=name, **labels) for name in SKIPPED}, corpus)


def test_skip_layer_offers_all_that_was_skipped() -> None:
    (control,) = ran("skip_layer").figures.controls
    assert list(control.options) == [(name, name) for name in SKIPPED]
    assert (control.name, control.value) == ("skipped", "block 3")


# Sensitivity.


@pytest.mark.parametrize("corpus", [False, True])
def test_sensitivity_has_a_row_for_each_site_and_a_column_for_each_layer(corpus: bool) -> None:
    run = ran("sensitivity", corpus)
    found = sensitivity(small_model(), texts_of(corpus), ("mlp", "output", "head", "attention"))
    names = [scale.site if scale.index is None else f"head {scale.index}" for scale in found.scales]
    sites = ["mlp", "output", "head 0", "head 1", "head 2", "attention"]
    units = {"kl": "nats per (log s)^2", "correlation": "per (log s)^2", "loss_change": "nats per log s"}
    (control,) = run.figures.controls
    assert control.value == "kl"
    for metric, _ in control.options:
        place = 5 if metric in ("kl", "correlation", "loss_change") else 4
        values = found.measure(metric, "rest")[:, place].mean(-1)  # type: ignore[arg-type]
        chart = shown(run.figures, "table", measure=metric)
        same(
            chart.cells(),
            {(name, f"block {scale.layer}"): of for name, scale, of in zip(names, found.scales, values, strict=True)},
        )
        assert (list(chart.x.labels), list(chart.y.labels)) == (BLOCKS, sites)
        assert (chart.x.title, chart.y.title) == ("layer", "site")
        assert chart.legend_title == f"{metric}, {units.get(str(metric), 'per log s')}"


# Labels.


@pytest.mark.parametrize(
    ("number", "label"),
    [(0.5, "0.5"), (1.0, "1"), (0.9999999, "0.9999999"), (1.0000001, "1.0000001"), (1e-7, "1e-07"), (-2.0, "-2"),
     (0.1 + 0.2, "0.30000000000000004"), (1 / 3, "0.3333333333333333"), (1e22, "1e+22"), (0.0, "0")],
)  # fmt: skip
def test_a_label_is_as_short_as_reads_back_as_the_number(number: float, label: str) -> None:
    assert label_of(number) == label
    assert float(label) == number


NEAR = ["0.9999999", "1.0000001"]


def test_factors_that_are_nearly_the_same_are_told_apart_in_charts_and_controls() -> None:
    figures = ran("near").figures
    lines, image = shown(figures, "lines"), shown(figures, "image")
    assert list(lines.legend) == list(image.y.labels) == NEAR[::-1]
    assert {factor for factor, _ in lines.lines()} == {row for row, _ in image.cells()} == set(NEAR)
    for name in ("kl", "loss_change", "changed"):
        assert list(shown(figures, name).x.labels) == NEAR
    for of in (figures, ran("near_loss").figures):
        (factor,) = (control for control in of.controls if control.name == "factor")
        assert [label for _, label in factor.options] == NEAR


def test_factors_that_are_nearly_the_same_are_told_apart_in_words_and_in_the_terminal() -> None:
    run, loss = ran("near"), ran("near_loss")
    said = [verdict.evidence for verdict in run.experiment.verdicts(run.study)]
    assert all("factor 0.9999999" in sentence for sentence in said[1:])
    assert all("factor 1.0000001" in sentence for sentence in (said[1], said[2], said[4]))
    assert "At factor 0.9999999 it is" in said[4]
    with pytest.raises(ValueError, match=r"2\.0000001 is not a layer"):
        parse_indices("2.0000001", 4, "layer")
    assert "scaled by 0.9999999:" in "\n".join(loss.experiment.lines(loss.study, 80))
    assert sum("At factor 0.9999999," in said.evidence for said in loss.experiment.verdicts(loss.study)) == 2
    assert dict(report._facts(writing.summary(run.experiment, run.study)))["factors"] == ", ".join(NEAR)


@pytest.mark.parametrize(("name", "labels"), [("near", NEAR), ("layers", ["0.75", "1.75", "1", "0.5"])])
def test_the_terminal_has_a_column_for_each_factor_and_a_line_for_each_depth(name: str, labels: list[str]) -> None:
    run = ran(name)
    lines = list(run.experiment.lines(run.study, 80))
    (header,) = (index for index, line in enumerate(lines) if line.split() == ["depth", *labels])
    layer = LAYERS[name][0]
    values = run_of(name, False).measure("frobenius", "rest")[layer, :, :, 0]  # [factor, place]
    edges = [word.end() for word in re.finditer(r"\S+", lines[header])][1:]
    for place, depth in enumerate(["embeddings", "1", "2", "3", "4", "final"]):
        line = lines[header + 1 + place]
        assert line.split()[0] == depth
        columns = [line[start:end] for start, end in zip([10, *edges], edges, strict=False)]
        assert [text.strip() for text in columns] == [f"{number:.2f}" for number in values[:, place]]
        assert line[edges[-1] :].strip() == (f"<- output of block {layer}, scaled" if place == layer + 1 else "")


def test_the_numbers_of_a_page_have_five_digits_and_what_is_not_finite_is_null() -> None:
    assert [rounded(of) for of in (1.234567, -0.000012345678, math.inf, math.nan)] == [1.2346, -1.2346e-05, None, None]


def test_the_specification_has_no_number_that_json_has_not() -> None:
    for name in KINDS:
        json.dumps([figure.spec for figure in ran(name).figures.figures], allow_nan=False)


# The file and the terminal.


@pytest.mark.parametrize(("name", "corpus"), EVERY)
def test_every_row_of_the_file_is_a_number_of_the_run_and_none_is_left_out(name: str, corpus: bool) -> None:
    run, factors = ran(name, corpus), KINDS[name][2]["factors"]
    found = {}
    for row in run.experiment.rows(run.study):
        key = (row["positions"], row["metric"], (row["layer"], row.get("head")), row["factor"], row["depth"])
        assert key not in found
        found[key] = row["value"]
    layers = layers_of(name, corpus)
    entries = list(zip(layers, (2, 0, 2, 0) if name == "heads" else [None] * len(layers), strict=True))
    asked = [entry for entry in entries if entry[0] in LAYERS[name]]
    wanted = {
        (positions, metric, entry, factor, depth): float(expected(name, corpus, metric, positions)[i, j, k])
        for positions in SETS
        for metric in MEASURES
        for i, entry in enumerate(entries)
        if entry in asked
        for j, factor in enumerate(factors)
        for k, depth in enumerate([0, 1, 2, 3, 4, "final"])
    }
    assert found == pytest.approx({key: of for key, of in wanted.items() if math.isfinite(of)}, rel=1e-9, abs=1e-12)


def numbers_after(lines: list[str], first: str) -> list[str]:
    """The words of the one line that begins so, after its beginning."""
    (line,) = (line for line in lines if re.match(rf"\s*{re.escape(first)}\s\s", line))
    return line.strip().removeprefix(first).split()


@pytest.mark.parametrize("corpus", [False, True])
def test_the_terminal_of_token_loss_has_a_line_for_each_layer(corpus: bool) -> None:
    run = ran("token_loss", corpus)
    lines = list(run.experiment.lines(run.study, 80))
    names = [
        "target_loss_change",
        "target_probability",
        "target_rank",
        "loss_change",
        "target_correlation",
        "temperature",
    ]
    header = next(line for line in lines if line.split()[:1] == ["layer"])
    assert re.split(r"\s{2,}", header.strip())[1:] == [name.replace("_", " ") for name in names]
    for layer in LOSS_LAYERS:
        wanted = [row_of(run, layer=layer, factor=2.0, metric=name)["value"] for name in names]
        assert numbers_after(lines, str(layer)) == [f"{number:.4g}" for number in wanted]
    clean = [
        row_of(run, layer=0, factor=2.0, metric=f"{name}_clean")["value"]
        for name in ("loss", "target_loss", "target_rank")
    ]
    assert lines[0] == (
        f"clean: loss of the text {clean[0]:.4g} nats per token, of the target {clean[1]:.4g} nats (rank {clean[2]:g})"
    )
    assert lines[1] == "output scaled by 2:"


def test_the_tokens_that_suffer_most_are_named_with_their_own_change() -> None:
    run = ran("token_loss")
    result = sweep(small_model(), texts_of(corpus=False), LOSS_LAYERS, LOSS_FACTORS, predictions=True)
    scaled, clean = result.statistics.predictions, result.statistics.clean_predictions
    assert scaled is not None and clean is not None
    change = (scaled.loss - clean.loss)[:, 0, 0, :-1].mean(0)  # [position that predicts]
    worst = sorted(range(len(change)), key=lambda position: -float(change[position]))[:5]
    assert change[worst[0]] > 0 > change.min(), "tokens that gain are not named"
    said = ", ".join(f"{PROMPT[at + 1]!r} {change[at]:+.3g}" for at in worst if change[at] > 0)
    assert f"tokens that suffer most, mean over the layers, nats: {said}" in list(run.experiment.lines(run.study, 80))


@pytest.mark.parametrize("corpus", [False, True])
def test_the_terminal_of_skip_layer_has_a_line_for_each_skip(corpus: bool) -> None:
    run, found = ran("skip_layer", corpus), skips(corpus)
    lines = list(run.experiment.lines(run.study, 80))
    places = {"loss_change": -1, "kl": -1, "changed": -1, "relative": 4}
    assert re.split(r"\s{2,}", lines[0].strip()) == ["skipped", "loss_change", "kl", "changed", "relative, last depth"]
    for i, name in enumerate(SKIPPED):
        wanted = [float(found.measure(of, "rest")[i, place].mean()) for of, place in places.items()]
        assert [float(number) for number in numbers_after(lines, name)] == pytest.approx(wanted, rel=6e-4)


def test_a_bar_that_is_no_longer_than_its_error_is_faint() -> None:
    blocks, data = ["block 0", "block 1"], {"attention": ([0.5, -0.1], [0.2, 0.3]), "MLP": ([0.4, -0.2], [None, 0.1])}
    spec = charts.parts_by_block("d", [], blocks, "cosine", {}, ["attention", "MLP", "both"], 1.0)
    rows = [{"part": part, "value": values, "error": errors} for part, (values, errors) in data.items()]
    chart = shown(Figures([Figure("bars", "", "", "", spec)], {"d": rows}, {"d": blocks}), "bars")
    found = {
        (mark.said["place"], mark.said["part"]): mark.item.get("opacity", 1)
        for mark in chart.marks
        if "part" in mark.said
    }
    faint = ("block 1", "attention")
    assert {key for key, opacity in found.items() if opacity < 0.5} == {faint}
    assert len(found) == 4


def test_a_scale_around_0_reaches_as_far_as_its_numbers_and_is_never_empty() -> None:
    assert reach_of([{"value": [0.5, None, -2.0]}, {"value": [1.0]}]) == 2.0
    assert reach_of([{"value": [None]}]) == reach_of([]) == reach_of([{"value": [0.0]}]) == 1.0


def test_every_control_character_has_a_picture() -> None:
    assert {VISIBLE[code] for code in range(0x20) if code != ord("\n")} == {*range(0x2400, 0x2420)} - {0x240A}
