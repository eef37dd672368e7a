"""What the tour's cells show: charts, tables and sentences, of the rows that the study measures.

Texts and tokens are data: what shows them escapes them first. Numbers in sentences are computed from what is shown,
never written down. Tables here have an axis `place`, with the names that the page gives the depths.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any, NamedTuple

import altair as alt
import marimo as mo
import torch
from torch import Tensor

from experiments.divergence import claims
from experiments.divergence.rows import measured
from experiments.harness.experiment import encode_prompt
from experiments.harness.pairs import DIFFERING, LEAST_GAP, Pair, Words, differences, share_of
from experiments.harness.table import Table, Tables, by_measure, of_text
from experiments.harness.verdicts import Verdict
from experiments.knockout import knock
from experiments.page.charts import FACTOR_COLOURS
from experiments.page.figures import VISIBLE, reach_of, token_labels
from experiments.tools import copier
from minigpt import GPT2, Comparison, Sweep, Tokenizer, compare_logits, logit_difference, patch, record, scaled
from minigpt.measures import Measure
from minigpt.parameters import Values, parameter_name

FINAL = "final norm"
STUDIED, LOW, HIGH = 2, 0.5, 1.5
BLUE, ORANGE = FACTOR_COLOURS[::2]
GREY = "#808080"  # can be seen on white and on black
ENDS = {f"factor {LOW:g}": BLUE, f"factor {HIGH:g}": ORANGE}
FACTORS = dict(zip(ENDS, (LOW, HIGH), strict=True))
LINES = alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=2, symbolSize=300)
MONO = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;"
CHIP = "display:inline-block;margin:2px;padding:1px 5px;border-radius:4px;background:#8080802e;text-align:center;"
COMPARED: tuple[Measure, ...] = ("frobenius", "relative", "passive", "kl")
TEXTS = ("clean text", "other text")
CHANGES = (f"scaling to {LOW:g}", "steering", "patching", "removing the edge")
"""What is done to the clean text, at one place."""
LONGEST = 64
"""Tokens of a text that is patched everywhere: as many columns of a heat map as have room for their names."""
Rows = list[dict[str, Any]]


def read_prompt(tokenizer: Tokenizer, text: str, n_positions: int) -> tuple[list[int], str]:
    """The ids of a text and nothing, or no ids and a sentence that says what is wrong with it."""
    try:
        return encode_prompt(tokenizer, text, n_positions), ""
    except ValueError as error:
        return [], str(error)


def visible(token: str) -> str:
    """A token as HTML that shows its very characters, spaces and line ends too."""
    return escape(token.translate(VISIBLE))


def tokens_html(tokens: Sequence[str], ids: Sequence[int]) -> str:
    """Tokens in a row, each above its position."""
    chips = [
        f'<span style="{CHIP}" title="id {number}"><span style="{MONO}">{visible(token)}</span>'
        f'<br><small style="color:{GREY}">{position}</small></span>'
        for position, (token, number) in enumerate(zip(tokens, ids, strict=True))
    ]
    return f'<div class="tour-tokens">{"".join(chips)}</div>'


def note(sentence: str, kind: Any = "neutral") -> mo.Html:
    """A sentence that was computed, or that quotes the reader, in a box; nothing in it is markup."""
    return mo.callout(mo.Html(f'<div class="tour-note">{escape(sentence)}</div>'), kind=kind)


@torch.no_grad()
def stream_norms(model: GPT2, ids: Tensor) -> Tensor:
    """Norm of the clean stream of the first text: [place, position]."""
    depths = model.residuals(ids)
    return torch.cat([depths, model.final_norm(depths[-1:])])[:, 0].double().norm(dim=-1)


def norms_chart(norms: Tensor, tokens: Sequence[str], names: Sequence[str]) -> Any:
    """The norm of every position's stream by depth."""
    colours = {"other positions": GREY, "position 0": ORANGE}
    rows = Rows()
    for position in [*range(1, len(tokens)), 0]:  # the last one lies on top
        series = "other positions" if position else "position 0"
        of_position = Table({"place": names}, norms[:, position])
        rows += of_position.rows(series=series, position=position, token=tokens[position])
    return by_depth(rows, names, "norm of the stream", named_colours(colours), strokeWidth=alt.value(1.2))


def norms_sentence(norms: Tensor, names: Sequence[str]) -> str:
    """What the chart of norms shows, in numbers."""
    first, others = norms[:-1, 0], norms[:-1, 1:].mean(1)
    ratio = first / others
    peak = int(ratio.argmax())
    return (
        f"The mean norm of the other positions is {others[0]:.3g} at the embeddings and {others[-1]:.3g} after the "
        f"last block. Position 0 stands out most at depth {peak} ({names[peak]}): {ratio[peak]:.3g} times that mean."
    )


def named_colours(colours: Mapping[str, str]) -> alt.Color:
    """A colour for every series, and a legend above the chart."""
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color("series:N", scale=scale, title=None, legend=LINES)


def factor_colours() -> alt.Color:
    """As in the study's figures: blue below 1, grey at 1, orange above."""
    legend = alt.Legend(orient="top", format=".2~f", values=[LOW, (LOW + 1) / 2, 1, (1 + HIGH) / 2, HIGH])
    scale = alt.Scale(domain=(LOW, 1, HIGH), range=FACTOR_COLOURS, interpolate="rgb")
    return alt.Color("factor:Q", scale=scale, legend=legend)


def place_axis(names: Sequence[str]) -> alt.X:
    """The places by name; all of them, also those without a number."""
    axis = alt.Axis(labelAngle=-50, grid=False, labelOverlap=False)
    return alt.X("place:N", scale=alt.Scale(domain=list(names)), title=None, axis=axis)


def by_depth(rows: Rows, names: Sequence[str], title: str, colour: alt.Color, **encoding: Any) -> Any:
    """Lines over the depths, one for each set of labels; diamonds at the final norm, which is no depth."""
    labels = [key for key in rows[0] if key not in ("place", "value")]
    top = max(row["value"] for row in rows)
    shared = {
        "x": place_axis(names),
        "y": alt.Y("value:Q", title=title, scale=alt.Scale(domain=(0, 1.08 * top or 1), nice=False)),
        "color": colour,
        "detail": [f"{label}:N" for label in labels],
        "tooltip": [*(f"{label}:N" for label in labels), "place:N", alt.Tooltip("value:Q", format=".4g")],
    }
    depths, final = (alt.Data(values=[row for row in rows if (row["place"] == FINAL) is at]) for at in (False, True))
    lines = alt.Chart(depths).mark_line(point=alt.OverlayMarkDef(size=20)).encode(**shared, **encoding)
    diamonds = alt.Chart(final).mark_point(shape="diamond", size=45, filled=True, opacity=1).encode(**shared)
    return sized(lines + diamonds)


def sized(chart: Any) -> Any:
    """As wide as the page, and without vega's menu, which offers to open the chart on a site elsewhere."""
    chart = chart.properties(width="container", height=250, usermeta={"embedOptions": {"actions": False}})
    return chart.configure_view(stroke=None).configure_axis(labelFontSize=11, titleFontSize=12)


def scales_of(
    model: GPT2, block: int, output: float, attention: float, mlp: float, head: int, head_scale: float
) -> dict[str, float | Tensor]:
    """The sliders' values as `scaled` and `compare` take them."""
    heads = torch.ones(model.config.n_head)
    heads[head] = round(head_scale, 2)
    numbers = [round(value, 2) for value in (output, attention, mlp)]  # the browser counts 0.1, 0.15000000000000002
    names = [parameter_name(model, block, site) for site in ("output", "attention", "mlp", "head")]
    return dict(zip(names, [*numbers, heads], strict=True))


def code_of(scales: Mapping[str, float | Tensor]) -> str:
    """Python that does what the sliders do; scales of 1 are left out."""
    lines = list[str]()
    for name, value in scales.items():
        if isinstance(value, Tensor) and bool((value != 1).any()):
            lines.append(f'    "{name}": torch.tensor({[round(number, 2) for number in value.tolist()]}),')
        elif not isinstance(value, Tensor) and value != 1:
            lines.append(f'    "{name}": {value:g},')
    return running("\n".join(["change = {", *lines, "}"]))


def running(change: str) -> str:
    """Python that runs the model under a change, after the lines that make it."""
    return f"{change}\nwith torch.no_grad(), scaled(model, change):\n    logits = model(ids)"


def compared(comparison: Comparison, names: Sequence[str]) -> Table:
    """`COMPARED` of the first intervention on the first text, all positions but the first: [metric, place]."""
    table = by_measure(comparison, COMPARED, run=[0]).at(text=0, positions="rest", run=0)
    return table.named("depth", "place", names)


def figures_of(comparison: Comparison, table: Table, site: str) -> dict[str, float]:
    """What a change comes to: numbers by the label that the page gives them; `site` is the place after it."""
    last, predictions = table.axes["place"][-2], comparison.statistics.predictions
    shown = {
        "mean KL, all positions but the first (nats)": ("kl", FINAL),
        "frobenius after the scaled block": ("frobenius", site),
        "frobenius after the last block": ("frobenius", last),
        "relative after the last block": ("relative", last),
    }
    numbers = {label: float(table.at(metric=name, place=place).value) for label, (name, place) in shown.items()}
    after = {"KL after the text (nats)": float(predictions.kl.flatten(0, -2)[0, -1])} if predictions else {}
    return {**after, **numbers}


def figures_html(figures: Mapping[str, float]) -> str:
    """Numbers side by side, each above its label."""
    boxes = [
        f'<div style="flex:1 1 110px"><div class="tour-figure" style="font-size:1.4rem">{value:.3g}</div>'
        f'<div style="font-size:0.8rem;line-height:1.2;color:{GREY}">{escape(label)}</div></div>'
        for label, value in figures.items()
    ]
    return f'<div style="display:flex;flex-wrap:wrap;gap:14px">{"".join(boxes)}</div>'


def relative_chart(table: Table, runs: Mapping[str, Table], colours: Mapping[str, str]) -> Any:
    """`relative` by place of some runs, by name; dashed, `passive` of `table`: [metric, place] each."""
    names, colours = table.axes["place"], {"passive": GREY, **colours}
    rows = [*table.at(metric="passive").rows(series="passive")]
    for name, run in runs.items():
        rows += run.at(metric="relative").rows(series=name)
    dashes = alt.Scale(domain=list(colours), range=[[5, 4]] + [[1, 0]] * len(runs))
    dash = alt.StrokeDash("series:N", scale=dashes, title=None, legend=LINES)
    return by_depth(rows, names, "relative", named_colours(colours), strokeDash=dash)


def likely_of(comparison: Comparison, tokenizer: Tokenizer) -> list[list[tuple[int, str, float]]]:
    """The most likely tokens after the first text, as id, text and probability, of the clean and of the scaled run."""
    found = comparison.statistics.clean_predictions, comparison.statistics.predictions
    tables = [(of.top.flatten().tolist(), of.top_probability.flatten().tolist()) for of in found if of]
    return [list(zip(top, tokenizer.tokens(top), probability, strict=True)) for top, probability in tables]


def likely_html(clean: Sequence[tuple[int, str, float]], scaled_run: Sequence[tuple[int, str, float]]) -> str:
    """Two rankings side by side, probabilities as numbers and as bars."""
    top = max(probability for _, _, probability in [*clean, *scaled_run])
    ranks = {number: rank for rank, (number, _, _) in enumerate(clean, start=1)}

    def cell(token: str, probability: float, colour: str) -> str:
        bar = f"linear-gradient(to right, {colour}40 {100 * probability / top:.1f}%, transparent 0)"
        return (
            f'<td style="padding:2px 6px;background:{bar}"><span style="{MONO}">{visible(token)}</span>'
            f'<span style="float:right">{probability:.3f}</span></td>'
        )

    lines = [
        f'<tr><td style="color:{GREY}">{rank}</td>{cell(*one[1:], GREY)}{cell(*other[1:], BLUE)}'
        f'<td style="padding-left:8px;color:{GREY}">{ranks.get(other[0], "new")}</td></tr>'
        for rank, (one, other) in enumerate(zip(clean, scaled_run, strict=True), start=1)
    ]
    titles = "".join(f'<th style="text-align:left">{title}</th>' for title in ("", "clean", "scaled", "clean rank"))
    columns = '<col style="width:2em"><col><col><col style="width:5.5em">'
    style = "width:100%;table-layout:fixed;border-collapse:separate;border-spacing:4px 2px;font-size:0.9rem"
    rows = f"<tr>{titles}</tr>{''.join(lines)}"
    return f'<table class="tour-likely" style="{style}"><colgroup>{columns}</colgroup>{rows}</table>'


def read_pair(tokenizer: Tokenizer, words: Mapping[str, str], n_positions: int) -> tuple[Pair | None, str]:
    """Two texts and two answers as tokens and nothing, or no pair and a sentence that says what is wrong with it."""
    most = min(LONGEST, n_positions)
    try:
        return Pair.encoded(Words(**words), tokenizer, most, "the most that this section patches"), ""
    except ValueError as error:
        return None, str(error)


def pair_places(tokenizer: Tokenizer, pair: Pair) -> dict[str, int]:
    """Every position by its name: the number and the token, or both texts' tokens where they differ."""
    names = token_labels(tokenizer.tokens(pair.clean))
    for at in pair.groups[DIFFERING]:
        names[at] += f" | {tokenizer.decode([pair.corrupted[at]]).translate(VISIBLE)}"
    return {name: at for at, name in enumerate(names)}


class Change(NamedTuple):
    """One intervention: what `compare_logits` takes, and Python that makes it."""

    values: Values
    code: str
    """It leaves the values in `change`; `ids` and `other` are the two texts, [1, position]."""


def changes_at(model: GPT2, pair: Pair, block: int, position: int, head: int | None) -> dict[str, Change]:
    """The interventions of `CHANGES` at one place, by name; `head` is the one whose edge is removed, None for all."""
    site = f"blocks.{block}.output"
    mine, theirs = (record(model, [text], [site])[site] for text in (pair.clean, pair.corrupted))
    made = (
        _scaling(site, mine, position),
        _steering(site, mine, theirs, position),
        _patching(site, theirs, position),
        _removing(model, pair, block, position, head),
    )
    return dict(zip(CHANGES, made, strict=True))


def _scaling(site: str, stream: Tensor, position: int) -> Change:
    scale = torch.ones_like(stream[..., :1])
    scale[:, position] = LOW
    code = (
        f"scale = torch.ones({_sizes(scale)})  # [text, position, n_embd]\nscale[:, {position}] = {LOW:g}\n"
        f'change = {{"{site}_scale": scale}}'
    )
    return Change({f"{site}_scale": scale}, code)


def _steering(site: str, mine: Tensor, theirs: Tensor, position: int) -> Change:
    shift = torch.zeros_like(mine)
    shift[:, position] = theirs.mean(1) - mine.mean(1)
    code = (
        f'mine = record(model, ids, ["{site}"])["{site}"]  # [text, position, n_embd]\n'
        f'theirs = record(model, other, ["{site}"])["{site}"]\n'
        f"shift = torch.zeros_like(mine)\nshift[:, {position}] = theirs.mean(1) - mine.mean(1)\n"
        f'change = {{"{site}_shift": shift}}'
    )
    return Change({f"{site}_shift": shift}, code)


def _patching(site: str, theirs: Tensor, position: int) -> Change:
    code = (
        f'values = record(model, other, ["{site}"])["{site}"]\nchange = patch("{site}", values, positions=[{position}])'
    )
    return Change(patch(site, theirs, positions=[position]), code)


def _removing(model: GPT2, pair: Pair, block: int, position: int, head: int | None) -> Change:
    values = knock(pair, [position], [block], head, model.config.n_head)
    ((name, shift),) = values.items()
    code = (
        f"shift = torch.zeros({_sizes(shift)})  # [text, head, query, key]\n"
        f'shift[:, {":" if head is None else head}, -1, {position}] = -torch.inf\nchange = {{"{name}": shift}}'
    )
    return Change(values, code)


def _sizes(value: Tensor) -> str:
    return ", ".join(map(str, value.shape))


def codes_of(changes: Mapping[str, Change]) -> str:
    """Python of every change, as Markdown; there is no text of the reader's in it."""
    return "\n\n".join(f"*{name}*:\n\n```python\n{running(change.code)}\n```" for name, change in changes.items())


def answers_of(model: GPT2, pair: Pair, changes: Mapping[str, Change]) -> Table:
    """The logit difference, answer minus foil, after both texts and after the clean one under each change: [run]."""
    done = [change.values for change in changes.values()]
    texts, changed = compare_logits(model, [pair.clean, pair.corrupted], done, pair.tokens)
    found = torch.cat([logit_difference(of, 0, 1) for of in (texts, changed[:, 0])])
    return Table({"run": [*TEXTS, *changes]}, found)


def answers_chart(found: Table, words: Mapping[str, str]) -> Any:
    """A bar for every run, and a dashed line where the clean text's ends."""
    runs, title = found.axes["run"], f"logit of {words['answer']!r} minus logit of {words['foil']!r}"
    colours = alt.Scale(domain=list(runs), range=[GREY] * len(TEXTS) + [BLUE] * len(CHANGES))
    across = alt.X("value:Q", title=title)
    encoding = {
        "y": alt.Y("run:N", title=None, sort=list(runs), axis=alt.Axis(labelLimit=200)),
        "color": alt.Color("run:N", scale=colours, legend=None),
        "tooltip": ["run:N", alt.Tooltip("value:Q", format=".4g")],
    }
    bars_of = alt.Chart(alt.Data(values=list(found.rows()))).mark_bar().encode(x=across, **encoding)
    clean = alt.Chart(alt.Data(values=[{"value": float(found.at(run=TEXTS[0]).value)}]))
    return sized(bars_of + clean.mark_rule(strokeDash=[5, 4], color=GREY).encode(x=across))


def answers_sentence(found: Table) -> str:
    """Which intervention moves the answer most, in numbers."""
    (clean, other), after = found.value[: len(TEXTS)].tolist(), found.at(run=list(CHANGES)).value.tolist()
    strongest, ends = max(zip(CHANGES, after, strict=True), key=lambda run: abs(run[1] - clean))
    texts = f"The logit difference is {clean:.3g} after the clean text and {other:.3g} after the other one."
    if ends == clean:
        return f"{texts} None of the four interventions moves it at this place."
    return f"{texts} Of the four interventions, {strongest} moves it most: by {ends - clean:+.3g}, to {ends:.3g}."


def recovered(model: GPT2, pair: Pair, places: Sequence[str]) -> Table:
    """The share of the way to the other text's logit difference that patching a block's output at one position goes:
    [block, place]; not a number where the texts are less than `LEAST_GAP` apart."""
    sites = [f"blocks.{block}.output" for block in range(model.config.n_layer)]
    values = record(model, [pair.corrupted], sites)
    patches = [patch(site, values[site], positions=[at]) for site in sites for at in range(len(places))]
    before, after = compare_logits(model, [pair.clean], patches, pair.tokens)
    moved = logit_difference(after - before, 0, 1).view(len(sites), len(places))
    clean, other = differences(model, pair)
    blocks = [f"block {block}" for block in range(len(sites))]
    return Table({"block": blocks, "place": list(places)}, share_of(moved, other - clean))


def recovered_chart(shares: Table) -> Any:
    """The shares as a heat map, around 0; nothing where there are none."""
    rows = list(shares.rows())
    reach = reach_of([{"value": [row["value"] for row in rows]}])
    scale = alt.Scale(scheme="blueorange", domain=[-reach, reach])
    title = "share of the way to the other text's answer"
    x, y = ("place", "position, and its token in both texts"), ("block", "output of")
    return heat_map(rows, x, y, title, scale) if rows else mo.Html("")


def recovered_sentence(shares: Table) -> str:
    """Where patching recovers most, in numbers."""
    if bool(shares.value.isnan().any()):
        return (
            f"The logit differences after the two texts are less than {LEAST_GAP:g} apart, so a share of that means "
            "nothing. Take texts or answers that the model tells apart."
        )
    asked = shares.value.clone()
    asked[-1, -1] = -torch.inf
    block, at = divmod(int(asked.argmax()), asked.shape[1])
    return (
        f"Patching recovers most at {shares.axes['block'][block]}, position {shares.axes['place'][at]}: "
        f"{asked[block, at]:.3g} of the way. The last block at the last position is not counted: what stands there is "
        "all that the logits are made of."
    )


def heat_map(rows: Rows, across: tuple[str, str], down: tuple[str, str], title: str, scale: alt.Scale) -> Any:
    """A cell for each row of two fields, each given with its axis' title, in the order of the rows."""
    axis = alt.Axis(labelOverlap=False, grid=False, labelLimit=120)
    legend = alt.Legend(orient="top", titleLimit=500)
    encoding = {
        "x": alt.X(f"{across[0]}:N", title=across[1], sort=None, axis=axis),
        "y": alt.Y(f"{down[0]}:N", title=down[1], sort=None, axis=axis),
        "color": alt.Color("value:Q", title=title, scale=scale, legend=legend),
        "tooltip": [f"{down[0]}:N", f"{across[0]}:N", alt.Tooltip("value:Q", format=".4g")],
    }
    return sized(alt.Chart(alt.Data(values=rows)).mark_rect().encode(**encoding))


def tables_of(result: Sweep, alone: Sequence[Sweep]) -> Tables:
    """What the study measures of the first text; `alone` are position 0 scaled alone and the others alone."""
    tables = measured(result)
    return of_text({**tables, **claims.evidence(tables["values"]), **claims.alone(alone)})


@torch.no_grad()
def differences_up_to(model: GPT2, ids: Tensor, block: int, factor: float) -> list[float]:
    """Largest difference at every depth up to the site, of two runs that share nothing."""
    clean = model.residuals(ids)
    with scaled(model, {parameter_name(model, block): factor}):
        difference = model.residuals(ids) - clean
    return difference[: block + 2].abs().amax(dim=(1, 2, 3)).tolist()


def verdict_sentence(verdict: Verdict) -> str:
    """The study's verdict on a claim, as it prints it."""
    return f"On this text: {verdict.verdict}. {verdict.sentence} {verdict.evidence}"


def table_html(names: Sequence[str], values: Sequence[str]) -> str:
    """Values in a row, each below its name."""
    style = 'style="padding:2px 14px 2px 0;text-align:left"'
    head, body = (
        "".join(f"<{tag} {style}>{escape(word)}</{tag}>" for word in words)
        for tag, words in (("th", names), ("td", values))
    )
    return f'<table style="font-size:0.9rem"><tr>{head}</tr><tr>{body}</tr></table>'


def jump_chart(at_site: Table, length: float) -> Any:
    """`frobenius` right after the site [factor], and as it must be, for a clean stream so long."""
    rows = [{**row, "expected": abs(row["factor"] - 1) * length} for row in at_site.rows()]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("factor:Q", scale=alt.Scale(domain=(LOW, HIGH), padding=8), axis=alt.Axis(grid=False, tickCount=5)),
        tooltip=["factor:Q", alt.Tooltip("value:Q", format=".4g"), alt.Tooltip("expected:Q", format=".4g")],
    )
    line = base.mark_line(color=GREY).encode(y=alt.Y("expected:Q", title="frobenius at the site"))
    return sized(
        line + base.mark_point(filled=True, size=45, opacity=1).encode(y="value:Q", color=factor_colours().legend(None))
    )


def at_the_ends(table: Table) -> dict[str, Table]:
    """Of a table with factors, what belongs to the lowest and to the highest, with their names."""
    return {name: table.at(factor=factor) for name, factor in FACTORS.items()}


def bars(rows: Rows, names: Sequence[str], title: str) -> Any:
    """Bars by place, one for each of the two ends of the factors."""
    encoding = {
        "x": place_axis(names),
        "xOffset": alt.XOffset("series:N", scale=alt.Scale(domain=list(ENDS))),
        "y": alt.Y("value:Q", title=title),
        "color": named_colours(ENDS).legend(orient="top"),
        "tooltip": ["series:N", "place:N", alt.Tooltip("value:Q", format=".4g")],
    }
    return sized(alt.Chart(alt.Data(values=rows)).mark_bar().encode(**encoding))


def later_blocks(table: Table) -> list[str]:
    """The places that blocks after the scaled one have written."""
    return list(table.axes["place"][STUDIED + 2 : -1])


def alignment_chart(table: Table) -> Any:
    """Which blocks after the site repair, and which amplify."""
    later = later_blocks(table)
    ends = at_the_ends(table.at(metric="alignment", place=later))
    return bars([row for name, of in ends.items() for row in of.rows(series=name)], later, "alignment")


def alignment_sentence(table: Table) -> str:
    """The blocks that repair, and how far the direction has moved."""
    later, sentences = later_blocks(table), list[str]()
    for name, of in at_the_ends(table).items():
        signs = dict(zip(later, of.at(metric="alignment", place=later).value.tolist(), strict=True))
        direction = float(of.at(metric="gauge_free", place=later[-1]).value)
        repairing = [block for block, value in signs.items() if value < 0]
        strongest = max(signs, key=lambda block: abs(signs[block]))
        sentences.append(
            f"At {name}, {len(repairing)} of the {len(signs)} later blocks have a negative alignment"
            f"{' (' + ', '.join(repairing) + ')' if repairing else ''}. The strongest is {strongest} with "
            f"{signs[strongest]:.2g}. After the last block gauge_free is {direction:.3g}."
        )
    return " ".join(sentences)


def first_token_chart(table: Table) -> Any:
    """The difference at the lowest factor, with and without position 0: of a table with sets of positions."""
    colours = {"with position 0": ORANGE, "without position 0": BLUE}
    shown = table.at(metric="frobenius", factor=LOW, positions=["all", "rest"])
    rows = list(shown.named("positions", "series", list(colours)).rows())
    return by_depth(rows, table.axes["place"], f"frobenius, factor {LOW:g}", named_colours(colours))


def clean_norms_chart(norms: Table) -> Any:
    """The clean stream's norm: of position 0, and the mean of the others."""
    colours = {"position 0": ORANGE, "mean of the others": GREY}
    shown = norms.at(of=["of position 0", "mean of the others"]).named("of", "series", list(colours))
    return by_depth(list(shown.rows()), norms.axes["place"], "norm of the clean stream", named_colours(colours))


def last_places_chart(table: Table) -> Any:
    """The difference before and after the last block, and after the final norm."""
    places = list(table.axes["place"][-3:])
    ends = at_the_ends(table.at(metric="frobenius", place=places))
    return bars([row for name, of in ends.items() for row in of.rows(series=name)], places, "frobenius")


def final_sentence(table: Table, norms: Table) -> str:
    """How long the streams are that the last bars are differences of."""
    ends = list(table.axes["place"][-2:])
    last, final = norms.at(of="of the others together", place=ends).value.tolist()
    relative = {name: of.value.tolist() for name, of in at_the_ends(table.at(metric="relative", place=ends)).items()}
    beside = ", ".join(
        f"at {name} {raw:.3g} before it and {normed:.3g} after it" for name, (raw, normed) in relative.items()
    )
    return (
        f"The clean stream of all positions but the first is {last:.4g} long before the final norm and {final:.4g} "
        f"after it. Beside the stream, the change is: {beside}."
    )


def by_step(log: Sequence[copier.Logged], colours: Mapping[str, str], names: Mapping[str, str], title: str) -> Any:
    """Lines over a training's steps: the log's fields, by the names that the legend gives them."""
    rows = [
        {"series": name, "step": entry.step, "value": asdict(entry)[field]}
        for field, name in names.items()
        for entry in log
    ]
    encoding = {
        "x": alt.X("step:Q", axis=alt.Axis(grid=False)),
        "y": alt.Y("value:Q", title=title),
        "color": named_colours(colours),
        "tooltip": ["series:N", "step:Q", alt.Tooltip("value:Q", format=".4g")],
    }
    return sized(alt.Chart(alt.Data(values=rows)).mark_line(point=alt.OverlayMarkDef(size=8)).encode(**encoding))


def losses_chart(log: Sequence[copier.Logged]) -> Any:
    """How the losses of both copies went."""
    names = {"first_copy": "first copy", "second_copy": "second copy"}
    return by_step(log, dict(zip(names.values(), (GREY, ORANGE), strict=True)), names, "loss, nats per token")


def scores_chart(log: Sequence[copier.Logged]) -> Any:
    """How the two scores of heads went."""
    names = {"previous_token": "previous token, block 0", "prefix_matching": "prefix matching, block 1"}
    return by_step(log, dict(zip(names.values(), (BLUE, ORANGE), strict=True)), names, "share of attention")


@torch.no_grad()
def copying_heads(model: GPT2) -> tuple[int, int]:
    """Block 0's head that attends most to the previous token, and block 1's that matches prefixes best."""
    patterns = model.attention_patterns(copier.shown_twice())
    return int(copier.previous_token(patterns)[0].argmax()), int(copier.prefix_matching(patterns)[1].argmax())


@torch.no_grad()
def copying(model: GPT2, head: int, scale: float) -> tuple[Tensor, float, float]:
    """What a model does whose block 0 has one head scaled: its attention on the first short text, [layer, head, query,
    key], its loss of second copies in nats per token, and its best prefix matching in block 1."""
    scales = torch.ones(model.config.n_head)
    scales[head] = round(scale, 2)
    with scaled(model, {parameter_name(model, 0, "head"): scales}):
        ids = copier.shown_twice()
        found = copier.prefix_matching(model.attention_patterns(ids))[1].max()
        short = model.attention_patterns(copier.shown_twice(1, copier.LONGEST))[:, 0]
        return short, copier.copy_losses(model, ids)[1], float(found)


def pattern_chart(pattern: Tensor, tokens: Sequence[str], title: str) -> Any:
    """What one head attends to, [query, key]: a row for each query."""
    names = [f"{position} {token}" for position, token in enumerate(tokens)]
    rows = list(Table({"query": names, "key": names}, pattern).rows())
    x, y = ("key", "position that is read, and its token"), ("query", "position that reads")
    return heat_map(rows, x, y, title, alt.Scale(scheme="viridis", domain=[0, 1]))


def letters(ids: Sequence[int]) -> list[str]:
    """The random tokens as characters; the one that begins every text as a dot."""
    return ["\u00b7" if number == copier.END else "ABCDEFGHIJKLMNOPQRSTUVWXYZ123456"[number] for number in ids]


def copying_sentence(scale: float, loss: float, found: float) -> str:
    """What a scaled head of block 0 does to copying, in numbers."""
    return (
        f"At a scale of {scale:g} the second copy costs {loss:.3g} nats per token; guessing costs "
        f"{math.log(copier.TOKENS):.3g}. The best head of block 1 leaves {found:.2g} of its attention on the token "
        "after the first copy."
    )
