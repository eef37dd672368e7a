"""The report: data and words without a browser, then in a real Chromium, offline, from file://."""

import copy
import csv
import functools
import html
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiments import sensitivity, skip_layer
from experiments.divergence import study as divergence
from experiments.harness import writing
from experiments.harness.corpus import Texts
from experiments.harness.experiment import PROMPT, SHORTEST
from experiments.harness.options import parse_numbers
from experiments.harness.ranks import Ranks
from experiments.harness.running import run_over_corpus, run_prompt
from experiments.page.figures import Control, Figure, Figures, standing_alone, token_labels
from experiments.token_loss import study as token_loss
from minigpt import GPT2, Sweep, Tokenizer
from tests import studies
from tests.conftest import CHROMIUM, TINY
from tests.seen import SCENE, Chart, series_of, shown
from tests.studies import ran
from tests.test_study import run_main

pytest.importorskip("altair")

HOSTILE = "</script><img src=x onerror=alert(1)> {{ 7 * 7 }} ${x} <!-- \u2028 'quoted' \"double\" & done"
BY_CELL = {"lines", "grid", "alignment", "written", "tokens"}
"""The charts that show the chosen factor."""
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium (Debian's package chromium) and playwright",
)


def study_in(folder: Path, prompt: str = PROMPT, factors: str = "0.5:1.5:0.05") -> Path:
    """The study of a prompt, written to a folder; returns its page."""
    numbers = parse_numbers(factors, "--factors")
    settings = divergence.GridSettings(model=str(TINY), prompt=prompt, layers=(2,), factors=numbers)
    experiment = divergence.Divergence(settings)
    study = run_prompt(experiment, GPT2.from_pretrained(TINY), Tokenizer.from_pretrained(TINY))
    writing.write(experiment, study, folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the default study."""
    return study_in(tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a prompt that tries to be markup."""
    return study_in(tmp_path_factory.mktemp("hostile"), HOSTILE, "0.5,1.5")


def data_of(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def test_the_page_is_one_small_file_that_fetches_nothing(default: Path) -> None:
    text = default.read_text(encoding="utf-8")
    assert default.stat().st_size < 5_000_000
    assert not re.findall(
        r"<(?:link|iframe|img|object|embed|base)\b", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    )
    assert not re.findall(r"<script[^>]*\ssrc=", text)
    assert "default-src 'none'" in text
    assert text.count("<script") == text.count("</script>") == 3


def test_the_page_says_what_ran_and_every_verdict_with_its_evidence(default: Path) -> None:
    text = default.read_text(encoding="utf-8")
    summary = json.loads((default.parent / "summary.json").read_text())
    assert summary["model"]["sha256"]["model.safetensors"] in text
    assert "certified against" in text
    assert summary["versions"]["torch"] in text
    for verdict in summary["verdicts"]:
        for words in (verdict["claim"], verdict["verdict"], verdict["sentence"], verdict["evidence"], verdict["basis"]):
            assert html.escape(words).replace("&#x27;", "&#39;") in text
    assert summary["command"] == "divergence, called from Python"
    assert summary["command"] in text


Key = tuple[int, int | None, float, int | str, str, str]
"""Layer, head, factor, depth, position set and measure of a row of divergence.csv."""
PARTS = {
    "attention": "attention_alignment",
    "MLP": "mlp_alignment",
    "both": "alignment",
    "written by attention": "attention_written",
    "written by MLP": "mlp_written",
    "written by the block": "written",
}


def written(folder: Path) -> dict[Key, dict[str, str]]:
    """The rows of divergence.csv."""
    with (folder / "divergence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (
            int(row["layer"]),
            int(row["head"]) if "head" in row else None,
            float(row["factor"]),
            row["depth"] if row["depth"] == "final" else int(row["depth"]),
            row["positions"],
            row["metric"],
        ): row
        for row in rows
    }


def on_the_page(figures: Figures) -> Iterator[tuple[str, Key, str, float | None]]:
    """Every number of the charts' data but the tokens': dataset, the row that it must stand in, column, number."""
    for name in figures.data.keys() - {"places", "tokens"}:
        for row in figures.data[name]:
            for column in ("value", "low", "high"):
                for number, place in zip(row.get(column, []), figures.places[name], strict=column in row):
                    yield name, key_of(name, row, place), column, number


def key_of(name: str, row: Any, place: str) -> Key:
    found = re.fullmatch(r"(?:head (\d+)|output|attention|MLP) of block (\d+)(?: at position 3)?", row["entry"])
    assert found is not None
    head = None if found[1] is None else int(found[1])
    if name == "tokens":
        return int(found[2]), head, row["factor"], "final", "", ""
    if name == "output":  # of the predictions, by factor
        return int(found[2]), head, float(place), "final", row["positions"], row["metric"]
    block = int(place.removeprefix("block ")) if place.startswith("block ") else None
    depth: int | str = {"embeddings": 0, "final norm": "final"}.get(place, -1) if block is None else block + 1
    metric = row["metric"] if name == "curves" else PARTS.get(row["part"], "frobenius")
    if name == "written" and row["part"] == "carried":  # into the block
        depth = int(depth) - 1
    return int(found[2]), head, row["factor"], depth, row["positions"], metric


def differing(figures: Figures, rows: dict[Key, dict[str, str]]) -> list[object]:
    """The numbers of a page that are not those of the table, to the digits shown, and those that are missing."""
    wrong, seen = list[object](), set[tuple[str, Key]]()
    for name, key, column, number in on_the_page(figures):
        before = name in ("alignment", "written") and key[5] != "frobenius" and int(key[3]) <= key[0] + 1
        expected = None if before or key not in rows else float(f"{float(rows[key][column]):.5g}")
        seen |= {(name, key)} if number is not None else set()
        wrong += [] if number == expected else [(name, key, column, number, expected)]
    for key in rows:
        if key[5] in ("frobenius", "relative", "passive", "gauge_free", "cosine"):
            wrong += [] if ("curves", key) in seen else [key]
        if key[5] in ("kl", "loss_change", "changed"):
            wrong += [] if ("output", key) in seen else [key]
        if key[5] in PARTS.values() and int(key[3]) > key[0] + 1:
            name = "written" if key[5].endswith("written") else "alignment"
            wrong += [] if (name, key) in seen else [key]
    return wrong


def shown_and_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, texts: Texts | None = None, **grid: Any
) -> tuple[Figures, dict[Key, dict[str, str]], Path]:
    """The charts' data of a study of every layer, and the rows of its table."""
    prompt = None if texts else PROMPT
    settings = divergence.GridSettings(
        model=str(TINY), prompt=prompt, texts=texts, parity=False, layers=tuple(range(12)), **grid
    )
    experiment, model, tokenizer = (
        divergence.Divergence(settings),
        GPT2.from_pretrained(TINY),
        Tokenizer.from_pretrained(TINY),
    )
    with ExitStack() as held:
        study = (
            run_over_corpus(experiment, model, tokenizer, folder, Ranks(), held)
            if texts
            else run_prompt(experiment, model, tokenizer)
        )
    assert study is not None
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    writing.write(experiment, study, folder)
    return experiment.figures(study), written(folder), folder


@pytest.mark.parametrize(
    "grid",
    [
        {"factors": (0.5, 0.75, 1.0, 1.5)},
        {"factors": (1.5, 0.0), "site": "attention"},
        {"factors": (0.5, 1.5), "site": "mlp", "positions": (3,)},
        {"factors": (0.5, 1.5), "site": "head", "indices": (2, 0)},
        {"factors": (0.5, 1.5), "predictions": False},
    ],
    ids=str,
)
def test_every_number_of_the_page_is_one_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: dict[str, Any]
) -> None:
    figures, rows, folder = shown_and_written(tmp_path / "out", monkeypatch, **grid)
    assert differing(figures, rows) == []
    check_tokens(figures, Sweep.load(folder / "sweep.safetensors"))


def check_tokens(figures: Figures, result: Sweep) -> None:
    """The norm of every token's change, beside the sweep that was saved."""
    norms = result.statistics.difference_sq[:, :, :, 0].sqrt()  # [layer, factor, place, position]
    rows = figures.data["tokens"]
    assert len(rows) == norms[:, :, 0].numel()
    for row in rows:
        layer, head, factor = key_of("tokens", row, "final norm")[:3]
        entry = [*zip(result.layers, result.heads or [None] * 12, strict=True)].index((layer, head))
        of_token = norms[entry, result.factors.index(factor), :, int(row["token"].split()[0])]
        assert row["value"] == [float(f"{number:.5g}") for number in of_token.tolist()]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[Figures, dict[Key, dict[str, str]]]:
    """The charts' data of a study, and the rows of its table."""
    with pytest.MonkeyPatch.context() as patch:
        return shown_and_written(tmp_path_factory.mktemp("right"), patch, factors=(0.5, 0.75, 1.5))[:2]


def exchanged(rows: list[dict[str, Any]], column: str) -> None:
    """Every label of an axis in the place of the next."""
    labels = sorted({row[column] for row in rows})
    for row in rows:
        row[column] = labels[(labels.index(row[column]) + 1) % len(labels)]


def arrays(rows: list[dict[str, Any]], change: Callable[[list[Any]], list[Any]]) -> None:
    for row in rows:
        row["value"] = change(row["value"])


SABOTAGES: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "reversed": lambda rows: arrays(rows, lambda values: values[::-1]),
    "off by one": lambda rows: arrays(rows, lambda values: [*values[-1:], *values[:-1]]),
    "one row lacks": lambda rows: rows.pop(),
    "off by a thousandth": lambda rows: arrays(rows, lambda values: [of and of * 1.001 for of in values]),
    **{column: partial(exchanged, column=column) for column in ("entry", "factor", "positions", "metric", "part")},
}


@pytest.mark.parametrize("name", ["curves", "alignment", "written", "output"])
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_an_axis_that_is_not_the_tables_is_noticed(
    right: tuple[Figures, dict[Key, dict[str, str]]], name: str, sabotage: str
) -> None:
    figures = replace(right[0], data=copy.deepcopy(dict(right[0].data)))
    assert differing(figures, right[1]) == []
    rows: Any = figures.data[name]
    if sabotage in ("entry", "factor", "positions", "metric", "part") and sabotage not in rows[0]:
        pytest.skip("this data has no such axis")
    SABOTAGES[sabotage](rows)
    assert differing(figures, right[1])


def test_every_number_of_a_corpus_page_is_one_of_the_table_with_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("The old man opened the door.\nThe sea was quiet.\nHe was not afraid of it.\n")
    texts = Texts.of(tmp_path / "texts.txt", "text", 16, None, SHORTEST)
    figures, rows, _ = shown_and_written(tmp_path / "out", monkeypatch, texts, factors=(0.5, 1.5))
    assert differing(figures, rows) == []
    assert len({column for _, _, column, _ in on_the_page(figures)}) == 3


def test_places_go_by_name_and_axes_have_units(default: Path) -> None:
    found = data_of(default)
    assert found["places"]["curves"] == ["embeddings", *(f"block {layer}" for layer in range(12)), "final norm"]
    assert "units of the stream" in found["titles"]["frobenius"]
    for figure in found["figures"]:
        assert len(figure["alt"]) > 40
        assert '"title":' in json.dumps(figure["spec"])


def test_a_png_and_the_page_are_one_chart() -> None:
    spec = {"data": {"name": "rows"}, "params": [{"name": "factor", "value": 1}], "mark": "bar", "title": "{measure}"}
    figure = Figure("a", "A chart", "alt", "note", spec)
    control = Control("factor", "factor", [(0.5, "half"), (1, "one")], 0.5)
    measure = Control("measure", "measure", [("kl", "kl")], "kl")
    figures = Figures([figure], {"rows": [{"value": [1, 2]}]}, {"rows": ["a", "b"]}, [control, measure], {"kl": "nats"})
    found = standing_alone(figures, figure)
    assert found["params"] == [{"name": "factor", "value": 0.5}]
    assert found["datasets"] == {"rows": [{"value": [1, 2], "place": ["a", "b"]}]}
    assert found["title"]["subtitle"] == ["factor: half"]


def test_a_hostile_prompt_stays_data(hostile: Path) -> None:
    text = hostile.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 3
    assert "<img" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "\u2028" not in re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0]
    labels = {row["token"] for row in data_of(hostile)["data"]["tokens"]}
    tokens = json.loads((hostile.parent / "summary.json").read_text())["tokens"]
    assert labels == set(token_labels(tokens)), "shown as they are"


def test_white_space_and_control_characters_can_be_seen() -> None:
    assert token_labels(["a b", "\n", "\t", "\x00"]) == ["0 a\u00b7b", "1 \u23ce", "2 \u2409", "3 \u2400"]


def test_a_prompt_of_control_characters_still_draws(tmp_path: Path) -> None:
    study_in(tmp_path, "a\x0cb \x1b[31m c\x00 d\x7f", "0.5")
    svg = (tmp_path / "divergence_tokens.svg").read_text()
    assert "\u240c" in svg
    assert not set(svg) & {"\x0c", "\x1b", "\x00"}


def test_large_grids_leave_factors_out_and_keep_the_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    divergence_figures = importlib.import_module("experiments.divergence.figures")
    monkeypatch.setattr(divergence_figures, "MOST_NUMBERS", 12 * 14 * (3 * 15 + 20) * 5)
    page = study_in(tmp_path)
    factors = [value for value, _ in data_of(page)["controls"][1]["options"]]
    assert len(factors) == 5
    assert (factors[0], factors[-1]) == (0.5, 1.5)
    with (tmp_path / "divergence.csv").open(newline="") as file:
        assert len({row["factor"] for row in csv.DictReader(file)}) == 21, "the table keeps them all"


# In Chromium.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; the tests here hold its only window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield started
        started.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a page offline; whatever it says on the console, any dialog and any request fail the test."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def opened(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        viewport = {"width": width, "height": 900}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def drawn(page: Any) -> dict[str, str]:
    """Every chart's SVG, by name."""
    return dict(
        page.eval_on_selector_all(".chart", "all => all.map(c => [c.dataset.figure, c.querySelector('svg').outerHTML])")
    )


@needs_chromium
def test_the_page_opens_offline_without_a_word_on_the_console_and_draws_every_chart(
    default: Path, open_page: Open
) -> None:
    charts = drawn(open_page(default))
    assert set(charts) == {*BY_CELL, "image", "kl", "loss_change", "changed"}
    for name, svg in charts.items():
        assert svg.count("<path") > 5, name
    assert "final norm" in charts["lines"]
    assert "19 ." in charts["tokens"]
    assert "0 The" not in charts["tokens"]


@needs_chromium
@pytest.mark.parametrize(
    ("control", "label", "changes"),
    [
        ("layer", "output of block 7", {*BY_CELL, "image"} - {"grid"}),
        ("measure", "change beside the stream's norm (relative)", {"lines", "image", "grid"}),
        ("positions", "all tokens", {*BY_CELL, "image", "kl", "loss_change", "changed"} - {"tokens"}),
        ("first", "shown", {"tokens"}),
        ("factor", None, BY_CELL),
    ],
)
def test_every_control_changes_the_charts_that_it_is_about(
    default: Path, open_page: Open, control: str, label: str | None, changes: set[str]
) -> None:
    page = open_page(default)
    before, table = drawn(page), page.inner_text("#likeliest")
    if label is None:
        page.focus("input[name=factor]")
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        assert page.inner_text("output") == "0.7"
    else:
        page.select_option(f"select[name={control}]", label=label)
    page.wait_for_timeout(700)
    after = drawn(page)
    assert {name for name in before if before[name] != after[name]} == changes
    assert (page.inner_text("#likeliest") != table) == (control in ("layer", "factor"))


@needs_chromium
def test_the_table_of_predictions_is_that_of_the_chosen_cell(default: Path, open_page: Open) -> None:
    page = open_page(default)
    rows = page.eval_on_selector_all("#likeliest tr", "rows => rows.map(r => [...r.cells].map(c => c.textContent))")
    assert len(rows) == 10
    shown = data_of(default)["predictions"]
    (cell,) = (row for row in shown if (row["layer"], row["factor"]) == ("output of block 2", 0.5))
    assert [row[1] for row in rows] == [token for token, _ in cell["clean"]]
    assert [row[3] for row in rows] == [token for token, _ in cell["scaled"]]
    assert [float(row[4]) for row in rows] == pytest.approx([value for _, value in cell["scaled"]], rel=0.01)


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_is_legible_at_both_widths_and_in_both_themes(
    default: Path, open_page: Open, width: int, scheme: str
) -> None:
    page = open_page(default, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.eval_on_selector_all(".chart svg", "all => all.map(s => s.getBoundingClientRect().right)")
    assert max(wide) <= width
    ink, paper = (
        [int(part) for part in re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{of}"))[:3]]
        for of in ("color", "backgroundColor")
    )
    assert contrast(ink, paper) > 7
    label = page.evaluate("document.querySelector('.chart svg text').getAttribute('fill')")
    assert contrast([int(label[index : index + 2], 16) for index in (1, 3, 5)], paper) > 7
    sizes = page.eval_on_selector_all(
        ".chart svg text", "all => all.map(t => parseFloat(getComputedStyle(t).fontSize))"
    )
    assert min(sizes) >= 11
    page.click("#theme")
    page.wait_for_timeout(700)
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != f"rgb({', '.join(map(str, paper))})"


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2's contrast ratio of two sRGB colours."""

    def luminance(colour: list[int]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@needs_chromium
def test_a_hostile_prompt_is_inert(hostile: Path, open_page: Open) -> None:
    page = open_page(hostile)
    assert page.locator("img").count() == 0
    tokens = page.eval_on_selector_all(".tokens li", "all => all.map(of => of.lastChild.textContent).join('')")
    bytes_of_one_character = HOSTILE.replace("\u2028", "\ufffd" * 3)
    assert tokens == bytes_of_one_character.replace(" ", "\u00b7"), "letter for letter: no template, no entity, no tag"
    page.select_option("select[name=first]", label="shown")
    page.wait_for_timeout(500)
    assert page.locator("img").count() == 0


@needs_chromium
def test_the_policy_stops_a_script_that_would_get_in_all_the_same(browser: Any, default: Path) -> None:
    page = browser.new_page()
    page.goto(default.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
    page.wait_for_timeout(500)
    assert page.evaluate("window.hacked") is None
    page.close()


@needs_chromium
@pytest.mark.parametrize("module", [token_loss, skip_layer, sensitivity])
def test_the_other_experiments_pages_open_too(
    module: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, open_page: Open
) -> None:
    code, _, err = run_main(module.main, monkeypatch, capfd, "--model", TINY, "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    page = open_page(tmp_path / "out" / "report.html", 390)
    assert drawn(page)
    for control in page.locator("select").all():
        before = drawn(page), page.inner_text("main")
        control.select_option(index=3)
        page.wait_for_timeout(500)
        assert (drawn(page), page.inner_text("main")) != before
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@needs_chromium
def test_a_corpus_page_has_bands_and_no_tokens(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, open_page: Open
) -> None:
    (tmp_path / "texts.txt").write_text("The old man opened the door.\nThe sea was quiet.\nHe was not afraid of it.\n")
    arguments = ("--model", TINY, "--texts", tmp_path / "texts.txt", "--factors", "0.5,1.5", "--layers", "2,3")
    code, _, err = run_main(divergence.main, monkeypatch, capfd, *arguments, "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    page = open_page(tmp_path / "out" / "report.html")
    charts = drawn(page)
    assert "mark-area" in charts["lines"]
    assert "tokens" not in charts
    page.select_option("select[name=layer]", index=1)
    page.wait_for_timeout(500)
    assert drawn(page)["lines"] != charts["lines"]
    assert "is too narrow to be trusted" in page.inner_text("#verdicts + ol, .verdicts")


# Every number of a page, in Chromium: its charts beside the saved ones, which tests/test_charts.py compares with runs
# of the library; its words beside summary.json.

PATIENCE = 20
"""Seconds, for a chart that takes a tenth of one on a machine that has nothing else to do."""
OPENED = [("layers", False), ("heads", True), ("token_loss", False), ("skip_layer", True), ("sensitivity", False)]
"""Studies of `KINDS`, and whether over a corpus."""
TOOLTIPS = {
    "lines": "factor", "image": "factor", "grid": "entry", "alignment": "part", "written": "part", "tokens": "token",
    "kl": "entry", "changed": "entry", "loss_change": "entry", "steps": "part", "change": "skipped", "table": "site",
}  # fmt: skip
"""What a mark's tooltip has besides its place and its number."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """The page of a small study, in the folder of its results."""

    @functools.cache
    def made(name: str, corpus: bool) -> Path:
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "save_figures", lambda *_: None)
            writing.write(ran(name, corpus).experiment, ran(name, corpus).study, folder)
        return folder / "report.html"

    return made


def read(chart: Chart) -> dict[str, Any]:
    """All that can be read off a chart."""
    kinds = {mark.kind for mark in chart.marks}
    heat_map = not chart.legends or "legend-gradient" in json.dumps(chart.legends)
    found: dict[str, Any] = {
        "axes": (chart.x.title, list(chart.x.labels), chart.y.title),
        "legend": chart.legend_title if heat_map else chart.legend,
        "rules": chart.rules(),
    }
    if "line" in kinds:
        found |= {"lines": {key: chart.y.number(mark.middle) for key, mark in chart.lines().items()}}
        found |= {"thick": {series_of(mark) for mark in chart.of("line") if mark.item["strokeWidth"] == 3}}
        found |= {"band": {chart.x.label(mark.x): chart.y.number(mark.bottom) for mark in chart.of("area")}}
    elif chart.legends and heat_map:
        found |= {"cells": chart.cells(), "rows": list(chart.y.labels)}
    else:
        found |= {"bars": chart.bars(), "whiskers": [chart.y.number(rule.top) for rule in chart.of("rule")]}
    return found


def alike(one: Any, other: Any) -> bool:
    """The same, whatever the width of the chart is."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == pytest.approx(other, rel=1e-4, abs=1e-6)) if isinstance(one, float) else one == other


def scene(page: Any, figure: str) -> Chart:
    return Chart(page.eval_on_selector(f"[data-figure={figure}]", SCENE))


def choose(page: Any, control: Control, value: Any) -> None:
    """Move a control there."""
    field, labels = page.locator(f"#controls [name={control.name}]"), [label for _, label in control.options]
    index = [of for of, _ in control.options].index(value)
    if field.get_attribute("type") == "range":
        field.fill(str(index))
        assert page.inner_text("#controls output") == labels[index]
    else:
        assert field.locator("option").all_inner_texts() == labels
        field.select_option(index=index)


def steps(figures: Figures) -> list[tuple[Control | None, dict[str, Any]]]:
    """From the controls' first values to their last, one control after the other: what moves, and what then holds."""
    chosen = {control.name: control.value for control in figures.controls}
    found: list[tuple[Control | None, dict[str, Any]]] = [(None, dict(chosen))]
    for control in figures.controls:
        if len(control.options) > 1:
            chosen[control.name] = next(value for value, _ in control.options[::-1] if value != control.value)
            found.append((control, dict(chosen)))
    return found


@needs_chromium
@pytest.mark.parametrize(("name", "corpus"), OPENED)
def test_the_charts_of_a_page_and_its_predictions_are_those_that_the_controls_ask_for(
    pages: Callable[[str, bool], Path], open_page: Open, name: str, corpus: bool
) -> None:
    page, figures = open_page(pages(name, corpus)), ran(name, corpus).figures
    cells = {(row["layer"], row["factor"]): row for row in figures.predictions}
    for control, chosen in steps(figures):
        if control:
            choose(page, control, chosen[control.name])
        if cells:
            has_predictions(page, cells[chosen["layer"], chosen["factor"]])
        for figure in figures.figures:
            expected, until = read(shown(figures, figure.name, **chosen)), time.monotonic() + PATIENCE
            while not alike(read(chart := scene(page, figure.name)), expected) and time.monotonic() < until:
                page.wait_for_timeout(20)
            assert alike(read(chart), expected), (figure.name, chosen)
            has_tooltips(chart, TOOLTIPS.get(figure.name))


def has_tooltips(chart: Chart, label: str | None) -> None:
    """What a mark says when one points at it are its labels and its number."""
    for mark in chart.marks:
        if mark.kind in ("rect", "symbol", "line"):
            names = {"place", "value"} | ({label} if label in mark.said else set())
            names |= {"error by rounding"} & set(mark.said)
            tooltip = {name: str(value) for name, value in mark.item["tooltip"].items()}
            assert set(tooltip) == names
            assert tooltip.items() <= mark.said.items()


def has_predictions(page: Any, row: Any) -> None:
    """The table of predictions is that of a cell."""
    texts = page.eval_on_selector_all("#likeliest tr", "rows => rows.map(r => [...r.cells].map(c => c.textContent))")
    assert [of[0] for of in texts] == [str(rank) for rank in range(1, 11)]
    for column, which in ((1, "clean"), (3, "scaled")):
        assert [(of[column], float(of[column + 1])) for of in texts] == [
            (token, pytest.approx(value, rel=5e-3)) for token, value in row[which]
        ]
    widths = page.eval_on_selector_all("#likeliest .bar", "all => all.map(bar => parseFloat(bar.style.width))")
    shares = [value for pair in zip(row["clean"], row["scaled"], strict=True) for _, value in pair]
    assert widths == pytest.approx([60 * share / max(shares) for share in shares], rel=1e-3)


@needs_chromium
@pytest.mark.parametrize(("name", "corpus"), OPENED[:3])
def test_the_words_of_a_page_are_those_of_its_summary(
    pages: Callable[[str, bool], Path], open_page: Open, name: str, corpus: bool
) -> None:
    path = pages(name, corpus)
    page, summary = open_page(path), json.loads((path.parent / "summary.json").read_text())
    sites = list(dict.fromkeys(verdict["where"] for verdict in summary["verdicts"]))
    lists = page.locator("ol.verdicts").all()
    assert len(lists) == len(sites)
    headings = page.locator("h2#verdicts ~ h3").all_inner_texts()
    assert headings[: len(sites)] == (sites if len(sites) > 1 else [])
    for site, shown_list in zip(sites, lists, strict=True):
        of_site = [verdict for verdict in summary["verdicts"] if verdict["where"] == site]
        for verdict, item in zip(of_site, shown_list.locator("> li").all(), strict=True):
            assert item.inner_text().split() == words_of(verdict).split()
            assert item.get_attribute("class") == CLASSES[verdict["verdict"]]
    checks = page.locator("#run ~ details li").all_text_contents()
    assert checks == [check["claim"] for check in summary["checks"]]
    tokens = page.locator(".tokens li").all_inner_texts()
    letters = [letter.replace(" ", "\u00b7") for letter in studies.PROMPT]
    says_what_was_run(page, name, corpus)
    assert tokens == ([] if corpus else [f"{position}{letter}" for position, letter in enumerate(letters)])


CLASSES = {"holds": "holds", "does not hold": "fails", "true by construction": "built", "undecided": "undecided"}
MARKS = {"holds": "\u2713", "does not hold": "\u2717", "true by construction": "=", "undecided": "?"}


def words_of(verdict: dict[str, Any]) -> str:
    """A verdict as a page words it."""
    outcome = verdict["verdict"]
    return (
        f"{verdict['number']}. {verdict['claim']} {MARKS[outcome]} {outcome}. {verdict['sentence']} "
        f"{verdict['evidence']} ({verdict['basis']}; positions: {verdict['positions']})"
    )


FACTS = {
    "layers": {"site": "output", "layers": "2, 0", "factors": "0.75, 1.75, 1, 0.5"},
    "heads": {"site": "head", "layers": "2, 0", "factors": "0.75, 1.75, 1", "indices": "2, 0", "positions": "3"},
    "token_loss": {"site": "output", "layers": "0, 2, 3", "factors": "2, 0.6"},
}


def says_what_was_run(page: Any, name: str, corpus: bool) -> None:
    """The facts above the verdicts."""
    names, values = (page.locator(f"#run ~ dl {tag}").all_inner_texts() for tag in ("dt", "dd"))
    facts = dict(zip(names, values, strict=True))
    texts = {of: facts.pop(of) for of in ("texts", "corpus") if of in facts}
    assert facts == {
        "model": "small: 4 blocks, 36 wide, 3 heads",
        "parity with Hugging Face": "not checked (--no-parity)",
        "computed in": "float64 on cpu",
        **FACTS[name],
    }
    assert set(texts) == ({"texts", "corpus"} if corpus else set())
    if corpus:
        assert texts["corpus"] == "4 texts, 4 windows, 29 tokens, 0 skipped"
        assert "texts.txt, sha256 " in texts["texts"]
    basis = "mean over 4 windows, with its 95 % interval" if corpus else "one prompt of 8 tokens"
    assert page.inner_text("header p") == f"small, {basis}."
