"""The tour: it runs from start to end, shows what the library computes, and shows texts as texts."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from experiments.page.figures import place_names
from minigpt import GPT2, Sweep, Tokenizer, compare, patch, record, scaled, sweep
from minigpt.parameters import natives
from tests.conftest import CHROMIUM, ROOT, TINY

pytest.importorskip("marimo", reason="the tour needs marimo: pip install -e '.[tour]'")
pytest.importorskip("vl_convert")

from experiments.divergence import claims
from experiments.divergence.study import Divergence, GridSettings
from experiments.harness import pairs
from experiments.harness.options import parse_numbers
from experiments.harness.running import run_prompt
from experiments.tools import copier
from experiments.tour import charts, tour
from tests import seen
from tests.seen import Chart, rgb

HOSTILE = "</script><img src=x onerror=alert(1)> **bold** <b>x</b> $x$ &amp;"
TITLES = [
    "From tokens to logits, one scale at a time",
    "1. Tokens",
    "2. The residual stream",
    "3. The three equations of a block",
    "4. Change a scale yourself",
    "5. Put something else there",
    "6. Five claims",
    *(f"Claim {number}" for number in range(1, 1 + len(claims.CLAIMS))),
    "7. How two heads learn to copy",
    "8. Where to go next",
]
CHARTS, NOTES = 17, 11
"""Of a page on which every cell has run."""
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
PATIENCE = 30
"""Seconds, for what takes one or two on a machine that has nothing else to do."""


class Tour(NamedTuple):
    """What the cells define, with every slider where it starts; and what they show, each kind in its order."""

    defined: dict[str, Any]
    charts: list[Chart]
    notes: list[str]
    tables: list[tuple[list[str], list[str]]]


@pytest.fixture(scope="module")
def toured() -> Tour:
    """The tour, run once."""
    specifications, notes, tables = list[dict[str, Any]](), list[str](), list[Any]()
    sized, note, table_html = charts.sized, charts.note, charts.table_html
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "sized", lambda chart: (chart := sized(chart), specifications.append(chart.to_dict()))[0])
        patch.setattr(charts, "note", lambda sentence, *kind: (notes.append(sentence), note(sentence, *kind))[1])
        patch.setattr(charts, "table_html", lambda *words: (tables.append(words), table_html(*words))[1])
        defined = dict(tour.app.run()[1])
    return Tour(
        defined, [seen.drawn({**of, "width": 600}) for of in specifications], [of for of in notes if of], tables
    )


@pytest.fixture(scope="module")
def shown(toured: Tour) -> dict[str, Any]:
    """What the cells define."""
    return toured.defined


@pytest.fixture(scope="module")
def drawn(toured: Tour) -> list[Chart]:
    """The charts that they show."""
    return toured.charts


@pytest.fixture(scope="module")
def result(shown: dict[str, Any], tiny: GPT2) -> Sweep:
    """A run of its own of what the claims are about, with more blocks and in another order of the factors."""
    factors = parse_numbers("0.5:1.5:0.05", "--factors")[::-1]
    return sweep(tiny, shown["ids"], [5, 2], factors, predictions=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TINY)


def figures(model: GPT2, ids: torch.Tensor, **moved: float) -> dict[str, float]:
    """The numbers below the sliders, where some were moved."""
    at_rest = {"block": 2, "output": 1.0, "attention": 1.0, "mlp": 1.0, "head": 0, "head_scale": 1.0}
    scales = charts.scales_of(model, **{**at_rest, **moved})
    comparison, names = compare(model, ids, [scales], predictions=True), place_names(model.config.n_layer)
    site = names[int(moved.get("block", 2)) + 1]
    return charts.figures_of(comparison, charts.compared(comparison, names), site)


PLACES = ["embeddings", *(f"block {layer}" for layer in range(12)), "final norm"]
ROUNDING = {"rel": 2e-3, "abs": 2e-4}
"""The tour runs other products than the run that it is compared with: in float32 the last digits differ."""
Read = dict[tuple[str, str], float]


def read(chart: Chart, label: str = "series") -> Read:
    """The numbers of lines, and of the diamonds at the final norm, by what tells the lines apart and by place."""
    diamonds = [mark for mark in chart.of("symbol") if chart.x.label(mark.x) == "final norm"]
    found: Read = {}
    for mark in chart.of("line") + diamonds:
        key = (mark.said[label], chart.x.label(mark.x))
        assert key not in found
        assert (key[1] == "final norm") == (mark.kind == "symbol"), "the final norm is no depth"
        if mark.said.get("series", mark.said.get("factor")) in chart.legend:
            assert mark.colour == chart.legend[mark.said.get("series", mark.said.get("factor"))]
        found[key] = chart.y.number(mark.middle)
    assert list(chart.x.labels) == PLACES
    return found


def expected(result: Sweep, metric: Any, positions: Any = "rest") -> dict[str, torch.Tensor]:
    """A measure after scaling block 2, by factor: [place]."""
    values = result.measure(metric, positions)[1, :, :, 0]
    return {f"{factor:g}": of for factor, of in zip(result.factors, values, strict=True)}


def same(found: dict[Any, float], numbers: dict[Any, Any]) -> None:
    """The same numbers at the same labels; what has no number has no mark."""
    wanted = {key: float(value) for key, value in numbers.items() if not torch.as_tensor(value).isnan()}
    assert set(found) == set(wanted)
    scale = max(map(abs, wanted.values()))
    assert found == pytest.approx(wanted, rel=ROUNDING["rel"], abs=ROUNDING["abs"] * scale)


def by_place(**series: torch.Tensor) -> dict[tuple[str, str], Any]:
    return {(name, place): of for name, values in series.items() for place, of in zip(PLACES, values, strict=True)}


def test_the_chart_of_norms_has_a_line_for_each_position(toured: Tour, shown: dict[str, Any], tiny: GPT2) -> None:
    chart, ids = toured.charts[0], shown["ids"]
    with torch.no_grad():
        depths = tiny.residuals(ids)[:, 0].double()
        final = tiny.final_norm(tiny.residuals(ids)[-1:])[:, 0].double()
    norms = torch.cat([depths, final]).norm(dim=-1)  # [place, position]
    same(read(chart, "position"), by_place(**{str(position): of for position, of in enumerate(norms.T)}))
    for mark in chart.of("line"):
        position = int(mark.said["position"])
        assert mark.said["series"] == ("other positions" if position else "position 0")
        assert mark.said["token"].strip() == shown["tokens"][position].strip()
    assert (chart.y.title, list(chart.legend)) == ("norm of the stream", ["other positions", "position 0"])
    others, ratio = norms[:-1, 1:].mean(1), norms[:-1, 0] / norms[:-1, 1:].mean(1)
    peak = int(ratio.argmax())
    assert toured.notes[0] == (
        f"The mean norm of the other positions is {others[0]:.3g} at the embeddings and {others[-1]:.3g} after the "
        f"last block. Position 0 stands out most at depth {peak} ({PLACES[peak]}): {ratio[peak]:.3g} times that mean."
    )


def test_the_charts_below_the_sliders_are_those_of_the_run(drawn: list[Chart], result: Sweep) -> None:
    frobenius, relative = drawn[1:3]
    same(read(frobenius), by_place(frobenius=expected(result, "frobenius")["0.5"]))
    of_run, passive = expected(result, "relative")["0.5"], expected(result, "passive")["0.5"]
    same(read(relative), by_place(relative=of_run, passive=passive))
    assert [chart.y.title for chart in (frobenius, relative)] == ["frobenius", "relative"]
    dashed = {mark.said["series"] for mark in relative.of("line") if mark.item["strokeDash"] != [1, 0]}
    assert dashed == {"passive"}


RUNS = ("clean text", "other text", "scaling to 0.5", "steering", "patching", "removing the edge")
PAIR = pairs.Words(pairs.PROMPT, pairs.CORRUPTED, pairs.ANSWER, pairs.FOIL)


def difference_of(model: GPT2, ids: list[int], pair: pairs.Pair, **values: torch.Tensor) -> float:
    """Logit of the answer minus logit of the foil after a text, in a run of its own; of a name `__` is a dot."""
    with torch.no_grad(), scaled(model, {name.replace("__", "."): of for name, of in values.items()}):
        logits = model(torch.tensor([ids]))[0, -1].double()
    return float(logits[pair.answer] - logits[pair.foil])


def streams(model: GPT2, pair: pairs.Pair) -> list[torch.Tensor]:
    """Of both texts every depth: [depth, position, n_embd]."""
    with torch.no_grad():
        return [model.residuals(torch.tensor([ids]))[:, 0] for ids in (pair.clean, pair.corrupted)]


def patched_by_hand(model: GPT2, pair: pairs.Pair, both: list[torch.Tensor], block: int, position: int) -> float:
    """The clean run where what it lacks to the other text's stream is added; `both` are the streams."""
    clean, other = (of[block + 1] for of in both)
    shift = torch.zeros_like(clean[None])
    shift[0, position] = other[position] - clean[position]
    return difference_of(model, pair.clean, pair, **{f"blocks__{block}__output_shift": shift})


def runs_by_hand(model: GPT2, pair: pairs.Pair, block: int, position: int, head: int | None) -> dict[str, float]:
    """The logit differences of all runs at a place, each in a run of its own."""
    clean, other = streams(model, pair)
    length, at = len(pair.clean), f"blocks__{block}__output"
    scale, shift = torch.ones(1, length, 1), torch.zeros_like(clean[:1])
    scale[0, position] = 0.5
    shift[0, position] = other[block + 1].mean(0) - clean[block + 1].mean(0)
    edge = torch.zeros(1, model.config.n_head, length, length)
    for of in range(model.config.n_head) if head is None else [head]:
        edge[0, of, length - 1, position] = -torch.inf
    found = (
        difference_of(model, pair.clean, pair),
        difference_of(model, pair.corrupted, pair),
        difference_of(model, pair.clean, pair, **{f"{at}_scale": scale}),
        difference_of(model, pair.clean, pair, **{f"{at}_shift": shift}),
        patched_by_hand(model, pair, [clean, other], block, position),
        difference_of(model, pair.clean, pair, **{f"blocks__{block}__attention__score_shift": edge}),
    )
    return dict(zip(RUNS, found, strict=True))


def shares_by_hand(model: GPT2, pair: pairs.Pair) -> torch.Tensor:
    """Patching every block's output at every position: [block, position]."""
    clean, other = (difference_of(model, ids, pair) for ids in (pair.clean, pair.corrupted))
    both, places = streams(model, pair), range(len(pair.clean))
    rows = [
        [(patched_by_hand(model, pair, both, block, at) - clean) / (other - clean) for at in places]
        for block in range(model.config.n_layer)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(scope="module")
def exact() -> GPT2:
    """The tour's model in float64."""
    return GPT2.from_pretrained(TINY, dtype=torch.float64)


def bars_across(chart: Chart) -> dict[str, float]:
    """The numbers of bars from left to right, by their names."""
    found = {}
    for bar in chart.of("rect"):
        ends = chart.x.number(bar.item["x"]), chart.x.number(bar.item["x"] + bar.item["width"])
        assert min(map(abs, ends)) == pytest.approx(0, abs=1e-3), "a bar begins at 0"
        found[chart.y.label(bar.middle)] = max(ends, key=abs)
        assert bar.colour == (charts.GREY if "text" in chart.y.label(bar.middle) else charts.BLUE)
    return found


def test_the_bars_of_the_chosen_place_are_runs_by_themselves(toured: Tour, exact: GPT2) -> None:
    chart, pair = toured.charts[3], toured.defined["pair"]
    position = pair.groups[pairs.DIFFERING][0]
    wanted = runs_by_hand(exact, pair, 2, position, None)
    same(bars_across(chart), wanted)
    assert list(chart.y.labels) == list(RUNS)
    (line,) = chart.of("rule")
    assert chart.x.number(line.x) == pytest.approx(wanted["clean text"], rel=2e-3)
    assert chart.x.title == "logit of ' he' minus logit of ' she'"
    assert toured.notes[1] == charts.answers_sentence(toured.defined["answers"])


def test_the_heat_map_is_a_loop_of_runs(toured: Tour, exact: GPT2, tokenizer: Tokenizer) -> None:
    chart, pair = toured.charts[4], toured.defined["pair"]
    wanted, tokens = shares_by_hand(exact, pair), tokenizer.tokens(pair.clean)
    places = [f"{at} {token.replace(' ', '·')}" for at, token in enumerate(tokens)]
    places[1] = "1 ·man | ·woman"
    same(
        chart.cells(),
        {(f"block {of}", places[at]): wanted[of, at] for of in range(len(wanted)) for at in range(len(places))},
    )
    assert list(chart.x.labels) == list(toured.defined["places"]) == places
    assert list(chart.y.labels) == [f"block {of}" for of in range(len(wanted))]
    assert chart.legend_title == "share of the way to the other text's answer"
    low, high = chart.ends
    assert low == -high
    assert toured.notes[2] == charts.recovered_sentence(toured.defined["shares"])


SMALL_PAIR = pairs.Pair([5, 6, 7, 8, 9], [5, 6, 70, 8, 9], 11, 12)
NAMES = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("head", [None, 0, 2])
@pytest.mark.parametrize(("block", "position"), [(0, 2), (1, 4), (2, 0), (3, 3)])
def test_any_block_position_and_head_can_be_chosen(model: GPT2, block: int, position: int, head: int | None) -> None:
    wanted = runs_by_hand(model, SMALL_PAIR, block, position, head)
    found = charts.answers_of(model, SMALL_PAIR, charts.changes_at(model, SMALL_PAIR, block, position, head))
    assert list(found.axes["run"]) == list(RUNS)
    assert found.value.tolist() == pytest.approx(list(wanted.values()), abs=1e-9)
    moved = {name: of - wanted["clean text"] for name, of in wanted.items() if name in RUNS[2:]}
    strongest = max(moved, key=lambda name: abs(moved[name]))
    assert charts.answers_sentence(found) == (
        f"The logit difference is {wanted['clean text']:.3g} after the clean text and {wanted['other text']:.3g} after "
        f"the other one. Of the four interventions, {strongest} moves it most: by {moved[strongest]:+.3g}, to "
        f"{wanted[strongest]:.3g}."
    )


def test_where_nothing_moves_the_answer_the_sentence_says_so(model: GPT2) -> None:
    """What the last block leaves at an earlier position is read by nobody."""
    changes = charts.changes_at(model, SMALL_PAIR, 3, 1, None)
    idle = dict.fromkeys(charts.CHANGES, changes["scaling to 0.5"])
    said = charts.answers_sentence(charts.answers_of(model, SMALL_PAIR, idle))
    assert said.endswith("None of the four interventions moves it at this place.")


def test_the_shares_of_any_model_are_a_loop_of_runs(model: GPT2) -> None:
    wanted = shares_by_hand(model, SMALL_PAIR)
    found = charts.recovered(model, SMALL_PAIR, NAMES)
    assert list(found.axes.items()) == [("block", [f"block {of}" for of in range(4)]), ("place", NAMES)]
    torch.testing.assert_close(found.value, wanted, rtol=0, atol=1e-9)
    assert found.value[:, :2].abs().max() < 1e-9, "before the token that differs both runs are one"
    wanted[3, 4] = -torch.inf
    block, at = divmod(int(wanted.argmax()), 5)
    said = f"Patching recovers most at block {block}, position {NAMES[at]}: {wanted[block, at]:.3g} of the way."
    assert charts.recovered_sentence(found).startswith(said)


def test_texts_that_are_not_told_apart_have_no_shares_but_a_sentence(model: GPT2) -> None:
    with torch.no_grad():
        model.unembed.weight[12] = model.unembed.weight[11]
    shares = charts.recovered(model, SMALL_PAIR, NAMES)
    assert charts.recovered_sentence(shares).startswith("The logit differences after the two texts are less than 0.1")
    assert charts.recovered_chart(shares).text == ""


@pytest.mark.parametrize("head", [None, 1])
def test_the_code_of_every_intervention_makes_its_very_bits(model: GPT2, head: int | None) -> None:
    changes = charts.changes_at(model, SMALL_PAIR, 1, 2, head)
    torch.set_default_dtype(torch.float64)
    ids, other = (torch.tensor([of]) for of in (SMALL_PAIR.clean, SMALL_PAIR.corrupted))
    try:
        for change in changes.values():
            names: dict[str, Any] = {"torch": torch, "scaled": scaled, "record": record, "patch": patch}
            names |= {"model": model, "ids": ids, "other": other}
            exec(charts.running(change.code), names)
            assert names["change"].keys() == change.values.keys()
            with torch.no_grad(), scaled(model, change.values):
                assert torch.equal(names["logits"], model(ids))
    finally:
        torch.set_default_dtype(torch.float32)
    shown = charts.codes_of(changes)
    assert re.findall(r"^\*(.*)\*:$", shown, re.MULTILINE) == list(RUNS[2:])
    assert re.findall(r"```python\n(.*?)\n```", shown, re.DOTALL) == [
        charts.running(of.code) for of in changes.values()
    ]


def test_the_places_of_a_pair_have_both_tokens_where_they_differ(tokenizer: Tokenizer) -> None:
    pair, problem = charts.read_pair(tokenizer, PAIR._asdict(), 256)
    assert pair and not problem
    places = charts.pair_places(tokenizer, pair)
    assert list(places.values()) == list(range(len(pair.clean)))
    assert [name for name in places if "|" in name] == ["1 ·man | ·woman"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"corrupted": "The woman could not"}, ("different lengths: 12 tokens", "and 4 tokens")),
        ({"clean": "The", "corrupted": "A"}, ("'The' and 'A' are one token each",)),
        ({"clean": "", "corrupted": ""}, ("The two prompts are the same, ''",)),
        (
            {"clean": "the " * 70, "corrupted": "a " + "the " * 69},
            ("more than 64, the most that this section patches",),
        ),
        ({"answer": "nevertheless he"}, ("The answer 'nevertheless he' is",)),
        ({"foil": pairs.ANSWER}, ("The answer and the foil are both ' he'",)),
        ({"clean": "\ud800 a"}, ("Unicode",)),
        ({"corrupted": HOSTILE}, ("different lengths", "tokens")),
    ],
)
def test_a_bad_pair_gets_a_sentence_and_stops_its_section_alone(
    changed: dict[str, str], says: tuple[str, ...], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, notes = {**PAIR._asdict(), **changed}, list[str]()
    pair, problem = charts.read_pair(tokenizer, words, 256)
    assert pair is None
    assert all(of in problem for of in says)
    assert problem.endswith(".") and "\n" not in problem
    if changed == {"corrupted": HOSTILE}:
        monkeypatch.setattr(charts, "note", lambda sentence, *_: notes.append(sentence))
        defined = tour.app.run(defs={"pair_texts": SimpleNamespace(value=words)})[1]
        assert problem in notes
        assert "shares" not in defined and "answers" not in defined and "rest" in defined


def test_hostile_texts_of_a_pair_stay_texts(tokenizer: Tokenizer) -> None:
    words = {**PAIR._asdict(), "clean": f"{HOSTILE} he", "corrupted": f"{HOSTILE} she"}
    defined = tour.app.run(defs={"pair_texts": SimpleNamespace(value=words)})[1]
    names = list(defined["places"])
    assert names[-1].endswith("·he | ·she")
    assert [name.split(" ", 1)[1] for name in names[:-1]] == [
        token.replace(" ", "·") for token in tokenizer.tokens(tokenizer.encode(HOSTILE))
    ]
    assert not any(part in charts.codes_of(defined["changes"]) for part in ("script", "img", "<"))
    assert defined["shares"].axes["place"] == names


def test_the_table_of_sites_has_every_site(tiny: GPT2) -> None:
    table = (ROOT / "experiments" / "tour" / "tour.py").read_text()
    named = [site for row in re.findall(r"^ +\| (`.*?) \|", table, re.MULTILINE) for site in re.findall("`(.*?)`", row)]
    assert sorted(named) == sorted({native.site for native in natives(tiny).values()})


def test_the_lines_of_the_claims_are_the_factors(drawn: list[Chart], result: Sweep) -> None:
    for chart, metric in ((drawn[5], "frobenius"), (drawn[8], "gauge_free")):
        same(read(chart, "factor"), by_place(**expected(result, metric)))
        assert (chart.y.title, list(chart.legend)) == (metric, ["0.5", "0.75", "1", "1.25", "1.5"])
        blue, _, grey, _, orange = map(rgb, chart.legend.values())
        assert (blue.index(max(blue)), orange.index(max(orange))) == (2, 0), "blue below 1, orange above"
        assert max(grey) - min(grey) < 30


def test_the_jump_lies_on_its_line(drawn: list[Chart], result: Sweep) -> None:
    chart, length = drawn[6], result.statistics.clean_sq[3, 0, 1:].sum().sqrt()
    points = {mark.said["factor"]: mark for mark in chart.of("symbol")}
    lines = {mark.said["factor"]: mark for mark in chart.of("line")}
    same(
        {of: chart.y.number(mark.middle) for of, mark in points.items()},
        {of: v[3] for of, v in expected(result, "frobenius").items()},
    )
    same(
        {of: chart.y.number(mark.middle) for of, mark in lines.items()},
        {of: abs(float(of) - 1) * length for of in points},
    )
    for of, mark in (*points.items(), *lines.items()):
        assert chart.x.number(mark.x) == pytest.approx(float(of), abs=1e-3)
    assert (chart.x.title, chart.y.title) == ("factor", "frobenius at the site")


def test_relative_of_both_ends_stands_beside_passive(drawn: list[Chart], result: Sweep) -> None:
    relative = expected(result, "relative")
    ends = {"factor 0.5": relative["0.5"], "factor 1.5": relative["1.5"]}
    same(read(drawn[7]), by_place(passive=expected(result, "passive")["0.5"], **ends))
    assert drawn[7].legend == {"passive": "#808080", "factor 0.5": charts.BLUE, "factor 1.5": charts.ORANGE}


@pytest.mark.parametrize(("index", "metric", "first"), [(9, "alignment", 4), (12, "frobenius", 11)])
def test_bars_of_both_ends_stand_at_their_places(
    drawn: list[Chart], result: Sweep, index: int, metric: str, first: int
) -> None:
    chart, values = drawn[index], expected(result, metric)
    last = len(PLACES) - (metric == "alignment")
    names = {colour: name for name, colour in chart.legend.items()}
    found = {}
    for bar in chart.of("rect"):
        top, bottom = chart.y.number(bar.top), chart.y.number(bar.bottom)
        found[names[bar.colour], chart.x.label(bar.x)] = top if abs(top) > abs(bottom) else bottom
    places = range(first, last)
    same(found, {(f"factor {end}", PLACES[k]): values[end][k] for end in ("0.5", "1.5") for k in places})
    assert list(chart.x.labels) == PLACES[first:last]
    assert all(of == ["factor 0.5", "factor 1.5"] for of in chart.side_by_side().values())
    assert chart.y.title == metric


def test_the_first_token_is_with_and_without(drawn: list[Chart], result: Sweep) -> None:
    both = {
        f"with{name} position 0": expected(result, "frobenius", of)["0.5"]
        for name, of in (("", "all"), ("out", "rest"))
    }
    same(read(drawn[10]), by_place(**both))
    clean = result.statistics.clean_sq[:, 0].sqrt()  # [place, position]
    same(read(drawn[11]), by_place(**{"position 0": clean[:, 0], "mean of the others": clean[:, 1:].mean(1)}))
    assert (drawn[10].y.title, drawn[11].y.title) == ("frobenius, factor 0.5", "norm of the clean stream")


def test_the_last_sentence_has_the_lengths_and_the_shares(toured: Tour, result: Sweep) -> None:
    numbers = [float(of) for of in re.findall(r"(?<=[ (])\d+\.?\d*(?=[ ,.])", toured.notes[8])]
    clean = result.statistics.clean_sq[-2:, 0, 1:].sum(-1).sqrt()
    relative = expected(result, "relative")
    wanted = [*clean, 0.5, *relative["0.5"][-2:], 1.5, *relative["1.5"][-2:]]
    assert numbers == pytest.approx([float(of) for of in wanted], rel=6e-3)


def test_the_sentence_on_alignment_has_its_numbers(toured: Tour, result: Sweep) -> None:
    sentence = toured.notes[5]
    for factor in ("0.5", "1.5"):
        part = sentence[sentence.index(f"At factor {factor}") :]
        later = expected(result, "alignment")[factor][4:-1]
        strongest = int(later.abs().argmax())
        direction = expected(result, "gauge_free")[factor][-2]
        assert f"{int((later < 0).sum())} of the 9 later blocks" in part
        assert f"The strongest is block {3 + strongest} with {later[strongest]:.2g}" in part
        assert f"After the last block gauge_free is {direction:.3g}." in part


def test_every_claim_has_the_verdict_of_the_study(toured: Tour, tiny: GPT2, tokenizer: Tokenizer) -> None:
    factors = parse_numbers("0.5:1.5:0.05", "--factors")
    settings = GridSettings(model=str(TINY), prompt=tour.PROMPT, parity=False, layers=(2,), factors=factors)
    experiment = Divergence(settings)
    verdicts = experiment.verdicts(run_prompt(experiment, tiny, tokenizer))
    for said, verdict in zip([toured.notes[of] for of in (3, 4, 6, 7, 9)], verdicts, strict=True):
        assert said.startswith(f"On this text: {verdict.verdict}. {verdict.sentence} ")
        assert said.split()[-6:] == verdict.evidence.split()[-6:]


def test_the_curves_of_the_copying_model_are_its_log(drawn: list[Chart]) -> None:
    log = copier.read_log(ROOT / "weights" / "copier" / copier.LOG_FILE)
    for chart, title, fields in (
        (drawn[13], "loss, nats per token", {"first copy": "first_copy", "second copy": "second_copy"}),
        (
            drawn[14],
            "share of attention",
            {"previous token, block 0": "previous_token", "prefix matching, block 1": "prefix_matching"},
        ),
    ):
        found = {(mark.said["series"], mark.said["step"]): mark for mark in chart.of("line")}
        assert set(found) == {(name, f"{entry.step:,}") for name in fields for entry in log}
        for entry in log:
            for name, field in fields.items():
                mark = found[name, f"{entry.step:,}"]
                assert chart.y.number(mark.middle) == pytest.approx(getattr(entry, field), abs=2e-3)
                assert chart.x.number(mark.x) == pytest.approx(entry.step, abs=1)
                assert mark.colour == chart.legend[name]
        assert (chart.x.title, chart.y.title) == ("step", title)


def test_the_patterns_of_the_copying_model_are_its_heads(toured: Tour) -> None:
    model, ids = toured.defined["copies"], copier.shown_twice(1, 8)
    with torch.no_grad():
        patterns = model.attention_patterns(ids)
    heads = copier.previous_token(patterns)[0].argmax(), copier.prefix_matching(patterns)[1].argmax()
    for chart, layer, head in zip(toured.charts[15:17], (0, 1), heads, strict=True):
        assert chart.legend_title == f"attention of head {head} in block {layer}"
        cells = {(chart.y.label(of.middle), chart.x.label(of.x)): of for of in chart.of("rect")}
        places = list(chart.x.labels)
        assert places == list(chart.y.labels) and len(cells) == 17 * 17
        assert places[1].split()[1] == places[9].split()[1] != places[2].split()[1], "the piece is there twice"
        for query in range(17):
            for key in range(17):
                said = float(cells[places[query], places[key]].said[chart.legend_title])
                assert said == pytest.approx(float(patterns[layer, 0, head, query, key]), abs=1e-3)


def test_without_the_first_head_the_sentence_says_that_copying_is_gone(toured: Tour) -> None:
    model, head = toured.defined["copies"], toured.defined["previous"]
    _, whole, found = charts.copying(model, head, 1.0)
    assert toured.notes[10] == charts.copying_sentence(1.0, whole, found)
    assert whole == copier.copy_losses(model, copier.shown_twice())[1]
    pattern, loss, lost = charts.copying(model, head, 0.0)
    assert loss > 2 > 0.2 > whole and lost < 0.2 < 0.5 < found
    said = charts.copying_sentence(0.0, loss, lost)
    assert said.startswith(f"At a scale of 0 the second copy costs {loss:.3g} nats per token; guessing costs 3.47.")
    assert f"leaves {lost:.2g} of its attention" in said
    scales = torch.ones(model.config.n_head)
    scales[head] = 0
    with torch.no_grad(), scaled(model, {"blocks.0.attention.head_scale": scales}):
        assert torch.equal(pattern, model.attention_patterns(copier.shown_twice(1, 8))[:, 0])


def test_the_tokens_of_the_copying_model_have_a_character_each() -> None:
    assert charts.letters([32, 0, 25, 26, 31]) == ["\u00b7", "A", "Z", "1", "6"]
    assert len(set(charts.letters(range(33)))) == 33


def test_tokens_stand_above_their_positions_and_have_their_ids() -> None:
    row = charts.tokens_html(["a", " b", "c"], [7, 5, 9])
    found = re.findall(r'title="id (\d+)"><span[^>]*>(.*?)</span><br><small[^>]*>(\d+)</small>', row)
    assert found == [("7", "a", "0"), ("5", "\u00b7b", "1"), ("9", "c", "2")]


def test_the_rankings_show_what_became_of_a_rank() -> None:
    clean, other = [(1, "a", 0.5), (2, "b", 0.25)], [(2, "b", 0.75), (3, "c", 0.125)]
    rows = re.findall("<tr>(.*?)</tr>", charts.likely_html(clean, other))
    cells = [[text_of(cell) for cell in re.findall("<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]
    assert cells == [
        ["", "clean", "scaled", "clean rank"],
        ["1", "a0.500", "b0.750", "2"],
        ["2", "b0.250", "c0.125", "new"],
    ]
    widths = [float(width) for width in re.findall(r"40 ([\d.]+)%, transparent", rows[1] + rows[2])]
    assert widths == [66.7, 100.0, 33.3, 16.7]


def test_a_figure_stands_above_its_label_and_a_value_below_its_name() -> None:
    html = charts.figures_html({"one": 1.2345, "two": 0.5})
    assert re.findall(r'tour-figure"[^>]*>([^<]*)</div><div[^>]*>([^<]*)</div>', html) == [
        ("1.23", "one"),
        ("0.5", "two"),
    ]
    head, body = re.findall("<tr>(.*?)</tr>", charts.table_html(["a", "b"], ["1", "2"]))
    assert (re.findall(">([^<]+)</th>", head), re.findall(">([^<]+)</td>", body)) == (["a", "b"], ["1", "2"])


def test_upstream_ends_with_the_site_itself(toured: Tour, shown: dict[str, Any], tiny: GPT2) -> None:
    with torch.no_grad():
        clean = tiny.residuals(shown["ids"])
        with scaled(tiny, {"blocks.2.output_scale": 0.5}):
            largest = (tiny.residuals(shown["ids"]) - clean).abs().amax((1, 2, 3))
    assert shown["upstream"] == pytest.approx(largest[:4].tolist())
    assert toured.tables == [(PLACES[:4], [f"{number:.3g}" for number in largest[:4].tolist()])]


def environment(home: Path) -> dict[str, str]:
    """Of a process of its own: nobody's settings, and no way out of this machine for what asks for a proxy."""
    folders = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"), str(home))
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": "127.0.0.1,localhost"}
    settings = {"PYTHONPATH": str(ROOT), "MARIMO_SKIP_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **folders, **proxies, **settings}


def test_it_runs_as_a_script_without_a_word(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "experiments/tour/tour.py"]
    ran = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_figures_are_those_of_a_direct_computation(shown: dict[str, Any], tiny: GPT2) -> None:
    ids = shown["ids"]
    with torch.no_grad():
        clean, clean_logits = tiny.residuals(ids)[:, 0, 1:].double(), tiny(ids)[0].double().log_softmax(-1)
        with scaled(tiny, {"blocks.2.output_scale": 0.5}):
            other, logits = tiny.residuals(ids)[:, 0, 1:].double(), tiny(ids)[0].double().log_softmax(-1)
    difference = (other - clean).flatten(1).norm(dim=1)
    kl = (clean_logits.exp() * (clean_logits - logits)).sum(-1)
    expected = [kl[-1], kl[1:].mean(), difference[3], difference[-1], difference[-1] / clean[-1].norm()]
    assert list(shown["figures"].values()) == pytest.approx([float(value) for value in expected], rel=1e-4)
    frobenius = shown["change"].at(metric="frobenius").value[:-1]
    assert frobenius.tolist() == pytest.approx(difference.tolist(), rel=1e-4)


def test_the_ten_tokens_are_those_of_a_direct_computation(
    shown: dict[str, Any], tiny: GPT2, tokenizer: Tokenizer
) -> None:
    for of, factor in zip(shown["likely"], (1.0, 0.5), strict=True):
        with torch.no_grad(), scaled(tiny, {"blocks.2.output_scale": factor}):
            top = tiny(shown["ids"])[0, -1].softmax(-1).topk(10)
        numbers, tokens, probabilities = map(list, zip(*of, strict=True))
        assert (numbers, tokens) == (top.indices.tolist(), tokenizer.tokens(top.indices.tolist()))
        assert probabilities == pytest.approx(top.values.tolist(), rel=1e-4)


def test_every_slider_changes_every_figure(shown: dict[str, Any], tiny: GPT2) -> None:
    at_rest = figures(tiny, shown["ids"])
    assert set(at_rest.values()) == {0.0}
    found = [figures(tiny, shown["ids"], **{name: 0.5}) for name in ("output", "attention", "mlp", "head_scale")]
    found += [figures(tiny, shown["ids"], head_scale=0.5, head=1), figures(tiny, shown["ids"], output=0.5, block=3)]
    for label in at_rest:
        values = [of[label] for of in found]
        assert all(value > 0 for value in values)
        assert len(set(values)) == len(values)


def test_the_code_shown_does_what_the_sliders_do(shown: dict[str, Any], tiny: GPT2) -> None:
    scales = charts.scales_of(tiny, 4, 1.0, 0.15000000000000002, 1.0, 2, 0.3)
    names: dict[str, Any] = {"torch": torch, "scaled": scaled, "model": tiny, "ids": shown["ids"]}
    exec(charts.code_of(scales), names)
    assert list(names["change"]) == ["blocks.4.attention_scale", "blocks.4.attention.head_scale"]
    with torch.no_grad(), scaled(tiny, scales):
        assert torch.equal(names["logits"], tiny(shown["ids"]))


def test_the_places_are_named_by_what_wrote_last(shown: dict[str, Any]) -> None:
    assert shown["names"] == ["embeddings", *(f"block {layer}" for layer in range(12)), "final norm"]


def test_the_sentence_on_alignment_names_the_blocks_that_repair(shown: dict[str, Any], tiny: GPT2) -> None:
    result, names = sweep(tiny, shown["ids"], [2]), shown["names"]
    sentence = charts.alignment_sentence(shown["rest"])
    values = result.measure("alignment", "rest")[0, :, :, 0]
    for factor in (0.5, 1.5):
        part = sentence[sentence.index(f"At factor {factor:g}") :].split(" The strongest")[0]
        negative = values[result.factors.index(factor)] < 0
        assert re.findall(r"block \d+", part) == [
            name for name, is_negative in zip(names, negative, strict=True) if is_negative
        ]


def test_its_numbers_are_the_rows_of_the_study(shown: dict[str, Any], tiny: GPT2, tokenizer: Tokenizer) -> None:
    """Of a study that ran every layer; what comes from other products differs by rounding."""
    factors = parse_numbers("0.5:1.5:0.05", "--factors")
    settings = GridSettings(model=str(TINY), prompt=tour.PROMPT, parity=False, layers=(2,), factors=factors)
    study = run_prompt(Divergence(settings), tiny, tokenizer)
    table = study.tables["values"].at(layer=2)
    assert table.axes["factor"] == shown["everywhere"].axes["factor"]
    torch.testing.assert_close(shown["everywhere"].value, table.value, rtol=1e-3, atol=1e-4, equal_nan=True)
    norms = study.tables["norms"].value
    torch.testing.assert_close(shown["norms"].value, norms, rtol=1e-6, atol=0)


def test_the_verdicts_are_about_the_five_claims(shown: dict[str, Any]) -> None:
    assert len(shown["verdicts"]) == len(claims.CLAIMS)
    assert shown["verdicts"][0].startswith("On this text: true by construction.")
    assert shown["upstream"][:-1] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("The", "is one token"),
        ("word " * 300, "the model has 256 positions"),
        ("\ud800 a", "Unicode"),
    ],
)
def test_a_bad_prompt_gets_a_sentence_and_stops_the_rest(text: str, says: str, tokenizer: Tokenizer) -> None:
    ids, problem = charts.read_prompt(tokenizer, text, 256)
    assert ids == []
    assert says in problem
    assert problem.endswith(".") and "\n" not in problem
    defined = tour.app.run(defs={"text": SimpleNamespace(value=text)})[1]
    assert "rest" not in defined and "change" not in defined


def test_the_shortest_prompt_runs() -> None:
    defined = tour.app.run(defs={"text": SimpleNamespace(value="The old")})[1]
    assert defined["ids"].shape == (1, 2)
    assert len(defined["verdicts"]) == len(claims.CLAIMS)


def test_the_longest_prompt_runs(tiny: GPT2, tokenizer: Tokenizer) -> None:
    ids, problem = charts.read_prompt(tokenizer, "the " * 255, 256)
    assert (len(ids), problem) == (256, "")
    assert figures(tiny, torch.tensor([ids]), output=0.5)["KL after the text (nats)"] > 0


def text_of(html: str) -> str:
    """What a browser shows of it."""
    return unescape(re.sub(r"<[^>]*>", "", html))


def test_texts_are_never_markup(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.tokens(tokenizer.encode(HOSTILE))
    row = charts.tokens_html(tokens, range(len(tokens)))
    whole = charts.tokens_html([HOSTILE], [0])
    table = charts.likely_html([(0, HOSTILE, 0.5)], [(1, HOSTILE, 0.25)])
    sentence = json.loads(unescape(re.findall("data-html='([^']*)'", charts.note(HOSTILE).text)[0]))
    for html in (row, whole, table, sentence):
        assert not re.search("<(script|img|b|strong|/script)[ >]", html)
    assert all(token.replace(" ", "·") in text_of(row) for token in tokens)
    assert HOSTILE.replace(" ", "·") in text_of(whole)
    assert text_of(table).count(HOSTILE.replace(" ", "·")) == 2
    assert text_of(sentence) == HOSTILE


@contextmanager
def served(home: Path) -> Iterator[tuple[str, Path]]:
    """The tour as an app on a free port of this machine: its address and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--headless", "--port", str(port), "--host", "127.0.0.1", "--no-token"]
    command = [sys.executable, "-m", "marimo", "run", "experiments/tour/tour.py", *options]
    log = home / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=ROOT, env=environment(home), stdout=file, stderr=file)
        try:
            wait_for(port, server, log)
            yield f"http://127.0.0.1:{port}", log
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        else:
            return


def test_a_browser_shows_it_moves_it_and_cannot_be_tricked_by_it(
    tmp_path: Path, tiny: GPT2, tokenizer: Tokenizer
) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    if CHROMIUM is None:
        pytest.skip("the browser test needs Chromium (Debian's package chromium)")
    arguments = [
        *QUIET,
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        *["--no-sandbox"] * (os.getuid() == 0),
    ]
    with served(tmp_path) as (address, log), playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        outside, dialogs, broken = list[str](), list[str](), list[str]()
        page.on("request", lambda request: outside.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(address)
        is_whole(page)
        moves(page, tiny, tokenizer)
        moves_the_place(page)
        takes_a_hostile_pair(page, dialogs)
        takes_a_hostile_prompt(page, dialogs)
        refuses_a_prompt_of_one_token(page)
        browser.close()
        assert not [url for url in outside if not url.startswith((address, "data:", "blob:"))]
        assert not broken
        assert "Traceback" not in log.read_text()


def is_whole(page: Any) -> None:
    """Every heading, chart and sentence is there: a cell that failed would leave a gap."""
    page.locator(".tour-note").nth(NOTES - 1).wait_for()
    page.locator(".vega-embed svg, .vega-embed canvas").nth(CHARTS - 1).wait_for()
    headings = page.locator("h1, h2, h3").all_inner_texts()
    assert len(headings) == len(TITLES)
    assert all(heading.startswith(title) for heading, title in zip(headings, TITLES, strict=True))
    assert page.locator("marimo-tex .katex").count() > 0


def moves(page: Any, tiny: GPT2, tokenizer: Tokenizer) -> None:
    """A key moves a slider by one step, and the page shows what the library computes there."""
    kl = page.locator(".tour-figure").first
    ids = torch.tensor([tokenizer.encode(tour.PROMPT)])
    before, after = (f"{next(iter(figures(tiny, ids, output=value).values())):.3g}" for value in (0.5, 0.55))
    assert kl.inner_text() == before != after
    page.get_by_role("slider").first.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text(after, exact=True).first.wait_for()
    assert kl.inner_text() == after


def moves_the_place(page: Any) -> None:
    """Another block, position and head are chosen, and the code below has them."""
    for label, option in (("Block of the place", "block 5"), ("Position", "3 ·not"), ("Edge of", "head 1")):
        page.get_by_label(label, exact=True).select_option(label=option)
    for code in ('patch("blocks.5.output", values, positions=[3])', "shift[:, 1, -1, 3] = -torch.inf"):
        page.wait_for_function("code => document.body.innerText.includes(code)", arg=code)


def takes_a_hostile_pair(page: Any, dialogs: list[str]) -> None:
    """While one text is changed and the other not yet, there is a sentence; then both are shown to the letter."""
    for label, word in (("Clean", " he"), ("Other", " she")):
        page.get_by_label(label, exact=True).fill(HOSTILE.partition(" **")[0] + word)  # fewer tokens, fewer patches
        page.keyboard.press("Enter")
        if label == "Clean":
            page.get_by_text("The prompts have different lengths").wait_for()
    page.locator("option", has_text="·he | ·she").wait_for(state="attached")
    page.locator(".tour-note").nth(NOTES - 1).wait_for()
    page.locator(".vega-embed svg, .vega-embed canvas").nth(CHARTS - 1).wait_for()
    assert page.locator("img[src=x]").count() == 0
    assert not dialogs


def takes_a_hostile_prompt(page: Any, dialogs: list[str]) -> None:
    """It is shown to the letter, and nothing of it becomes an element."""
    page.get_by_label("Text", exact=True).fill(HOSTILE)
    page.keyboard.press("Enter")
    shown = "text => [...document.querySelectorAll('.tour-tokens span span')].map(e => e.innerText).join('') === text"
    page.wait_for_function(shown, arg=HOSTILE.replace(" ", "·"))
    tokens = page.locator(".tour-tokens")
    page.locator(".tour-note").nth(NOTES - 1).wait_for()
    assert tokens.locator("img, b, strong, script, marimo-tex").count() == 0
    assert page.locator("img[src=x]").count() == 0
    assert not dialogs


def refuses_a_prompt_of_one_token(page: Any) -> None:
    """With a sentence that quotes it to the letter, while the headings stay."""
    page.get_by_label("Text", exact=True).fill("<")
    page.keyboard.press("Enter")
    page.get_by_text("The prompt '<' is one token").wait_for()
    assert page.locator("h1, h2, h3").count() == len(TITLES)
