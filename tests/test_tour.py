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
from typing import Any

import pytest
import torch

from experiments.page.figures import place_names
from minigpt import GPT2, Tokenizer, compare, scaled, sweep
from tests.conftest import CHROMIUM, ROOT, TINY

pytest.importorskip("marimo", reason="the tour needs marimo: pip install -e '.[tour]'")

from experiments.divergence import claims
from experiments.divergence.study import Divergence, GridSettings
from experiments.harness.options import parse_numbers
from experiments.harness.running import run_prompt
from experiments.tour import charts, tour

HOSTILE = "</script><img src=x onerror=alert(1)> **bold** <b>x</b> $x$ &amp;"
TITLES = [
    "From tokens to logits, one scale at a time",
    "1. Tokens",
    "2. The residual stream",
    "3. The three equations of a block",
    "4. Change a scale yourself",
    "5. Five claims",
    *(f"Claim {number}" for number in range(1, 1 + len(claims.CLAIMS))),
    "6. Where to go next",
]
CHARTS, NOTES = 10, 8
"""Of a page on which every cell has run."""
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
PATIENCE = 30
"""Seconds, for what takes one or two on a machine that has nothing else to do."""


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What the cells define, with every slider where it starts."""
    return dict(tour.app.run()[1])


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


def takes_a_hostile_prompt(page: Any, dialogs: list[str]) -> None:
    """It is shown to the letter, and nothing of it becomes an element."""
    page.get_by_label("Text").fill(HOSTILE)
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
    page.get_by_label("Text").fill("<")
    page.keyboard.press("Enter")
    page.get_by_text("The prompt '<' is one token").wait_for()
    assert page.locator("h1, h2, h3").count() == len(TITLES)
