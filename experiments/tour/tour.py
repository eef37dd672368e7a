"""A tour in the browser, for whoever meets the inside of a transformer today.

    OMP_NUM_THREADS=1 python -m marimo run experiments/tour.py

A marimo notebook: a cell runs again when something that it reads has changed. It runs weights/tiny on the CPU, where
a second thread makes so small a model no faster, and much slower beside other work. The functions compute and draw,
the cells show. Texts and tokens are data: what shows them escapes them first. Numbers in sentences are computed from
what is shown, never written down.
"""
# mypy: allow-untyped-defs
# ruff: noqa: B018, PLR1711
# Both for the form in which marimo writes cells: no annotations, a bare name as output, a bare return.

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="From tokens to logits, one scale at a time")

with app.setup:
    from collections.abc import Mapping, Sequence
    from html import escape
    from pathlib import Path
    from typing import Any

    import altair as alt
    import marimo as mo
    import torch
    from torch import Tensor

    from experiments import claims
    from experiments.charts import FACTOR_COLOURS
    from experiments.common import encode_prompt
    from experiments.curves import Curves
    from experiments.estimates import of_text
    from experiments.figures import VISIBLE, place_names
    from experiments.runner import PROMPT
    from experiments.verdicts import Verdict
    from minigpt import GPT2, Sweep, Tokenizer, compare, scaled, sweep
    from minigpt.measures import Statistics
    from minigpt.parameters import scale_name

    TINY = Path(__file__).parents[1] / "weights" / "tiny"
    FINAL = "final norm"
    STUDIED, LOW, HIGH = 2, 0.5, 1.5
    BLUE, ORANGE = FACTOR_COLOURS[::2]
    GREY = "#808080"  # can be seen on white and on black
    ENDS = {f"factor {LOW:g}": BLUE, f"factor {HIGH:g}": ORANGE}
    LINES = alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=2, symbolSize=300)
    MONO = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;"
    CHIP = "display:inline-block;margin:2px;padding:1px 5px;border-radius:4px;background:#8080802e;text-align:center;"
    Rows = list[dict[str, Any]]


@app.cell(hide_code=True)
def _():
    mo.md("""
    # From tokens to logits, one scale at a time

    A language model of the GPT-2 kind reads a text and says which piece of text may come next. This tour shows what
    happens in between. You change one number inside the model and see how far the change travels.

    The model is `weights/tiny`. It was trained for this project, on fifteen old novels. It is small and it is not
    GPT-2: its numbers are its own. Everything below is computed on this machine while you read.
    """)
    return


@app.cell(hide_code=True)
def _():
    # In a cell of its own, so it is loaded once. Every reader has a model: `scaled` changes it for a moment.
    model, tokenizer = GPT2.from_pretrained(TINY), Tokenizer.from_pretrained(TINY)
    names = place_names(model.config.n_layer)
    return model, names, tokenizer


@app.cell(hide_code=True)
def _(model):
    mo.md(f"""
    ## 1. Tokens

    A model does not read letters. It reads **tokens**: pieces of text, each with a number, its id. This model knows
    {model.config.vocab_size} of them. Many begin with a space; the sign · stands for it below. The small number under
    a token is its **position**. Positions count from 0.

    Change the text and press Enter. The rest of the page follows.
    """)
    return


@app.cell(hide_code=True)
def _():
    text = mo.ui.text(value=PROMPT, label="Text", full_width=True)
    text
    return (text,)


@app.cell(hide_code=True)
def _(model, text, tokenizer):
    read, problem = read_prompt(tokenizer, text.value, model.config.n_positions)
    mo.stop(bool(problem), note(problem, "warn"))
    ids, tokens = torch.tensor([read]), tokenizer.tokens(read)
    mo.Html(tokens_html(tokens, read))
    return ids, tokens


@app.function
def read_prompt(tokenizer: Tokenizer, text: str, n_positions: int) -> tuple[list[int], str]:
    """The ids of a text and nothing, or no ids and a sentence that says what is wrong with it."""
    try:
        return encode_prompt(tokenizer, text, n_positions), ""
    except ValueError as error:
        return [], str(error)


@app.function
def visible(token: str) -> str:
    """A token as HTML that shows its very characters, spaces and line ends too."""
    return escape(token.translate(VISIBLE))


@app.function
def tokens_html(tokens: Sequence[str], ids: Sequence[int]) -> str:
    """Tokens in a row, each above its position."""
    chips = [
        f'<span style="{CHIP}" title="id {number}"><span style="{MONO}">{visible(token)}</span>'
        f'<br><small style="color:{GREY}">{position}</small></span>'
        for position, (token, number) in enumerate(zip(tokens, ids, strict=True))
    ]
    return f'<div class="tour-tokens">{"".join(chips)}</div>'


@app.function
def note(sentence: str, kind: Any = "neutral") -> mo.Html:
    """A sentence that was computed, or that quotes the reader, in a box; nothing in it is markup."""
    return mo.callout(mo.Html(f'<div class="tour-note">{escape(sentence)}</div>'), kind=kind)


@app.cell(hide_code=True)
def _(model):
    mo.md(f"""
    ## 2. The residual stream

    Every position has a vector: a list of {model.config.n_embd} numbers. All of them together are the **residual
    stream**. It is a running sum:

    - It starts as the **embeddings**: a vector for the token plus a vector for the position.
    - Then come {model.config.n_layer} **blocks**, counted from 0. Each reads the stream and adds to it.
    - A place along the way is a **depth**. Depth 0 is the embeddings, depth d is what block d - 1 leaves.
    - The **final norm** comes after the last block. It brings all vectors to a like length. It is no depth.
    - The **unembedding** makes one number for every token of the vocabulary: the **logits**. A softmax turns them
      into probabilities of the next token.

    The chart shows the norm, which is the length, of every position's vector. Position 0 is drawn apart. It sees no
    other token, and in many models its vector is far longer than the others.
    """)
    return


@app.cell(hide_code=True)
def _(ids, model, names, tokens):
    norms = stream_norms(model, ids)
    mo.vstack([norms_chart(norms, tokens, names), note(norms_sentence(norms, names))])
    return


@app.function
@torch.no_grad()
def stream_norms(model: GPT2, ids: Tensor) -> Tensor:
    """Norm of the clean stream of the first text: [place, position]."""
    depths = model.residuals(ids)
    return torch.cat([depths, model.final_norm(depths[-1:])])[:, 0].double().norm(dim=-1)


@app.function
def norms_chart(norms: Tensor, tokens: Sequence[str], names: Sequence[str]) -> Any:
    """The norm of every position's stream by depth."""
    colours = {"other positions": GREY, "position 0": ORANGE}
    rows = Rows()
    for position in [*range(1, len(tokens)), 0]:  # the last one lies on top
        series = "other positions" if position else "position 0"
        rows += rows_of(norms[:, position], names, series=series, position=position, token=tokens[position])
    return by_depth(rows, names, "norm of the stream", named_colours(colours), strokeWidth=alt.value(1.2))


@app.function
def norms_sentence(norms: Tensor, names: Sequence[str]) -> str:
    """What the chart of norms shows, in numbers."""
    first, others = norms[:-1, 0], norms[:-1, 1:].mean(1)
    ratio = first / others
    peak = int(ratio.argmax())
    return (
        f"The mean norm of the other positions is {others[0]:.3g} at the embeddings and {others[-1]:.3g} after the "
        f"last block. Position 0 stands out most at depth {peak} ({names[peak]}): {ratio[peak]:.3g} times that mean."
    )


@app.function
def rows_of(values: Tensor, names: Sequence[str], **labels: Any) -> Rows:
    """A chart's rows, of numbers by place. What is not a number gets none: a measure that a place does not have."""
    known = values.isfinite().tolist()
    numbers = zip(names, values.tolist(), known, strict=True)
    return [{"place": name, "value": value, **labels} for name, value, is_known in numbers if is_known]


@app.function
def named_colours(colours: Mapping[str, str]) -> alt.Color:
    """A colour for every series, and a legend above the chart."""
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color("series:N", scale=scale, title=None, legend=LINES)


@app.function
def factor_colours() -> alt.Color:
    """As in the study's figures: blue below 1, grey at 1, orange above."""
    legend = alt.Legend(orient="top", format=".2~f", values=[LOW, (LOW + 1) / 2, 1, (1 + HIGH) / 2, HIGH])
    scale = alt.Scale(domain=(LOW, 1, HIGH), range=FACTOR_COLOURS, interpolate="rgb")
    return alt.Color("factor:Q", scale=scale, legend=legend)


@app.function
def place_axis(names: Sequence[str]) -> alt.X:
    """The places by name; all of them, also those without a number."""
    axis = alt.Axis(labelAngle=-50, grid=False, labelOverlap=False)
    return alt.X("place:N", scale=alt.Scale(domain=list(names)), title=None, axis=axis)


@app.function
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


@app.function
def sized(chart: Any) -> Any:
    """As wide as the page, and without vega's menu, which offers to open the chart on a site elsewhere."""
    chart = chart.properties(width="container", height=250, usermeta={"embedOptions": {"actions": False}})
    return chart.configure_view(stroke=None).configure_axis(labelFontSize=11, titleFontSize=12)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 3. The three equations of a block

    The stream $x$ enters a block. Three lines later it leaves:

    $$
    \begin{aligned}
    u &= x + s_{\text{attention}}\,\mathrm{attention}(\mathrm{norm}(x)) \\
    y &= u + s_{\text{mlp}}\,\mathrm{mlp}(\mathrm{norm}(u)) \\
    \mathrm{out} &= s_{\text{output}}\,y
    \end{aligned}
    $$

    *Attention* lets a position read from itself and from earlier positions. It has several **heads**, and each reads
    in its own way. With $z_h$ for what head $h$ has read:

    $$
    \mathrm{attention} = W_O\,\mathrm{concat}_h(s_{\text{head},h}\,z_h) + b_O
    $$

    The *MLP* works on every position by itself. Each $s$ is a **scale**, a number that is 1 until you change it. At 1
    it changes nothing, not even the last bit.

    | scale | what it multiplies |
    |:---|:---|
    | `output_scale` | the whole stream as it leaves the block, with all that was written before |
    | `attention_scale` | only what this block's attention adds; 0 removes it |
    | `mlp_scale` | only what this block's MLP adds; 0 removes it |
    | `head_scale` | what one head brings, before $W_O$ mixes the heads |

    There are two traps. To skip a block, set `attention_scale` and `mlp_scale` to 0: an `output_scale` of 0 erases the
    stream. And with every head at 0, the bias $b_O$ is still added; an `attention_scale` of 0 removes it too.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## 4. Change a scale yourself

    Choose a block and move its scales. The model runs twice, **clean** with all scales at 1 and **scaled** with
    yours. Below the sliders you see what became different. The arrow keys move a slider by one step.
    """)
    return


@app.cell(hide_code=True)
def _(model):
    block = mo.ui.dropdown({f"block {n}": n for n in range(model.config.n_layer)}, f"block {STUDIED}", label="Block")
    head = mo.ui.dropdown({f"head {n}": n for n in range(model.config.n_head)}, "head 0", label="Head")
    return block, head


@app.cell(hide_code=True)
def _():
    def _slider(name: str, value: float = 1.0) -> mo.ui.slider:
        return mo.ui.slider(0.0, 2.0, 0.05, value, label=f"`{name}`", show_value=True, full_width=True)

    output_slider, attention_slider = _slider("output_scale", LOW), _slider("attention_scale")
    mlp_slider, head_slider = _slider("mlp_scale"), _slider("head_scale")
    return attention_slider, head_slider, mlp_slider, output_slider


@app.cell(hide_code=True)
def _(attention_slider, block, head, head_slider, mlp_slider, output_slider):
    mo.vstack([block, output_slider, attention_slider, mlp_slider, head, head_slider])
    return


@app.cell(hide_code=True)
def _(
    attention_slider,
    block,
    head,
    head_slider,
    ids,
    mlp_slider,
    model,
    output_slider,
):
    scales = scales_of(
        model.config.n_head,
        block.value,
        output_slider.value,
        attention_slider.value,
        mlp_slider.value,
        head.value,
        head_slider.value,
    )
    statistics = compare(model, ids, [scales], predictions=True).statistics
    figures = figures_of(statistics)
    mo.Html(figures_html(figures))
    return scales, statistics


@app.cell(hide_code=True)
def _(names, statistics):
    mo.vstack(
        [
            by_depth(frobenius_rows(statistics, names), names, "frobenius", named_colours({"frobenius": BLUE})),
            relative_chart(statistics, names, {"relative": BLUE}),
        ]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    `frobenius` is the length of the difference of the two streams, over all positions but the first. `relative`
    divides it by the length of the clean stream at the same place. `passive` is what `relative` would be if no later
    block reacted. Where `relative` lies above `passive`, the later blocks made the change larger.

    Does the change reach the output? These are the ten most likely tokens after the text, in both runs. The last
    column says which rank the scaled run's token has in the clean list.
    """)
    return


@app.cell(hide_code=True)
def _(statistics, tokenizer):
    likely = likely_of(statistics, tokenizer)
    mo.Html(likely_html(*likely))
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    **KL** says how far the scaled distribution is from the clean one, in **nats**. It is 0 when they are the same.

    This is your change in Python:
    """)
    return


@app.cell(hide_code=True)
def _(scales):
    mo.md(f"```python\n{code_of(scales)}\n```")
    return


@app.function
def scales_of(
    n_head: int, block: int, output: float, attention: float, mlp: float, head: int, head_scale: float
) -> dict[str, float | Tensor]:
    """The sliders' values as `scaled` and `compare` take them."""
    heads = torch.ones(n_head)
    heads[head] = round(head_scale, 2)
    numbers = [round(value, 2) for value in (output, attention, mlp)]  # the browser counts 0.1, 0.15000000000000002
    names = [scale_name(block, site) for site in ("output", "attention", "mlp", "head")]
    return dict(zip(names, [*numbers, heads], strict=True))


@app.function
def code_of(scales: Mapping[str, float | Tensor]) -> str:
    """Python that does what the sliders do; scales of 1 are left out."""
    lines = list[str]()
    for name, value in scales.items():
        if isinstance(value, Tensor) and bool((value != 1).any()):
            lines.append(f'    "{name}": torch.tensor({[round(number, 2) for number in value.tolist()]}),')
        elif not isinstance(value, Tensor) and value != 1:
            lines.append(f'    "{name}": {value:g},')
    return "\n".join(
        ["change = {", *lines, "}", "with torch.no_grad(), scaled(model, change):", "    logits = model(ids)"]
    )


@app.function
def rest_of(statistics: Statistics) -> Tensor:
    """All positions of the first text but the first one."""
    return torch.arange(1, int(statistics.lengths[0]))


@app.function
def figures_of(statistics: Statistics) -> dict[str, float]:
    """What a change comes to: numbers by the label that the page gives them; all positions but the first."""
    rest, site = rest_of(statistics), statistics.layers[0] + 1
    frobenius, relative, kl = (
        measure(rest)[0, 0, :, 0] for measure in (statistics.frobenius, statistics.relative, statistics.kl)
    )
    last = torch.tensor([int(statistics.lengths[0]) - 1])
    return {
        "KL after the text (nats)": float(statistics.kl(last)[0, 0, -1, 0]),
        "mean KL, all positions but the first (nats)": float(kl[-1]),
        "frobenius after the scaled block": float(frobenius[site]),
        "frobenius after the last block": float(frobenius[-2]),
        "relative after the last block": float(relative[-2]),
    }


@app.function
def figures_html(figures: Mapping[str, float]) -> str:
    """Numbers side by side, each above its label."""
    boxes = [
        f'<div style="flex:1 1 110px"><div class="tour-figure" style="font-size:1.4rem">{value:.3g}</div>'
        f'<div style="font-size:0.8rem;line-height:1.2;color:{GREY}">{escape(label)}</div></div>'
        for label, value in figures.items()
    ]
    return f'<div style="display:flex;flex-wrap:wrap;gap:14px">{"".join(boxes)}</div>'


@app.function
def frobenius_rows(statistics: Statistics, names: Sequence[str]) -> Rows:
    """The difference of the first run by place."""
    return rows_of(statistics.frobenius(rest_of(statistics))[0, 0, :, 0], names, series="frobenius")


@app.function
def relative_chart(statistics: Statistics, names: Sequence[str], runs: Mapping[str, str]) -> Any:
    """`relative` of the first and the last run, named in `runs` with their colours; dashed, `passive` of the first."""
    rest, colours = rest_of(statistics), {"passive": GREY, **runs}
    relative, passive = statistics.relative(rest)[0, :, :, 0], statistics.passive(rest)[0, :, :, 0]
    rows = rows_of(passive[0], names, series="passive")
    for run, values in zip(runs, (relative[0], relative[-1]), strict=False):
        rows += rows_of(values, names, series=run)
    dashes = alt.Scale(domain=list(colours), range=[[5, 4]] + [[1, 0]] * len(runs))
    dash = alt.StrokeDash("series:N", scale=dashes, title=None, legend=LINES)
    return by_depth(rows, names, "relative", named_colours(colours), strokeDash=dash)


@app.function
def likely_of(statistics: Statistics, tokenizer: Tokenizer) -> list[list[tuple[int, str, float]]]:
    """The most likely tokens after the first text, as id, text and probability, of the clean and of the scaled run."""
    found = statistics.clean_predictions, statistics.predictions
    tables = [(of.top.flatten().tolist(), of.top_probability.flatten().tolist()) for of in found if of]
    return [list(zip(top, tokenizer.tokens(top), probability, strict=True)) for top, probability in tables]


@app.function
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


@app.cell(hide_code=True)
def _():
    mo.md(f"""
    ## 5. Five claims

    The study of this project tests five claims of a lecture. The lecture scaled the output of block {STUDIED} by
    factors from {LOW:g} to {HIGH:g} and followed the change to the end of the model. The place where a scale acts is
    its **site**, the value given to it is its **factor**.

    Here it is done on your text, so the verdicts are about your text and this model. The sliders above play no part.
    All measures leave position 0 out, unless they say otherwise.
    """)
    return


@app.cell(hide_code=True)
def _(ids, model):
    result = sweep(model, ids, [STUDIED], predictions=True)
    alone = [
        sweep(model, ids, [STUDIED], (LOW, HIGH), positions=only, predictions=True)
        for only in ([0], range(1, ids.shape[1]))
    ]
    upstream = differences_up_to(model, ids, STUDIED, LOW)
    verdicts = [verdict_sentence(verdict) for verdict in judged(result, alone, max(upstream[:-1]))]
    return result, upstream, verdicts


@app.function
@torch.no_grad()
def differences_up_to(model: GPT2, ids: Tensor, block: int, factor: float) -> list[float]:
    """Largest difference at every depth up to the site, of two runs that share nothing."""
    clean = model.residuals(ids)
    with scaled(model, {scale_name(block): factor}):
        difference = model.residuals(ids) - clean
    return difference[: block + 2].abs().amax(dim=(1, 2, 3)).tolist()


@app.function
def judged(result: Sweep, alone: Sequence[Sweep], upstream: float) -> list[Verdict]:
    """The study's verdicts; `alone` are position 0 scaled alone and the others alone."""
    return claims.judge(Curves.of_text(result), of_text(claims.evidence(result, alone)), [upstream], "this text")


@app.function
def verdict_sentence(verdict: Verdict) -> str:
    """The study's verdict on a claim, as it prints it."""
    return f"On this text: {verdict.verdict}. {verdict.sentence} {verdict.evidence}"


@app.cell(hide_code=True)
def _():
    mo.md(f"""
    ### Claim 1: nothing changes upstream of the site

    *The claim:* all depths before the site are the same in both runs. A block reads what earlier blocks have written,
    never what later ones will write.

    *What to look at:* each line is a factor. All of them lie at 0 up to block {STUDIED - 1}. The table has the largest
    difference of any single number of the stream, at factor {LOW:g}.
    """)
    return


@app.cell(hide_code=True)
def _(names, result, upstream, verdicts):
    mo.vstack(
        [
            by_depth(factor_rows(result, "frobenius", names), names, "frobenius", factor_colours()),
            mo.Html(table_html(names[: len(upstream)], [f"{value:.3g}" for value in upstream])),
            note(verdicts[0]),
        ]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ### Claim 2: the difference jumps at the site

    *The claim:* the difference is suddenly large right after the scaled block. It has to be. The scaled stream is
    $s\,x$ there and the clean one is $x$. Their difference is $(s - 1)\,x$, and its length $|s - 1|$ times that of $x$.

    *What to look at:* the points are measured. The line is $|s - 1|$ times the length of the clean stream. The jump
    says nothing about what the model has learnt.
    """)
    return


@app.cell(hide_code=True)
def _(result, verdicts):
    mo.vstack([jump_chart(result), note(verdicts[1])])
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    ### Claim 3: the difference keeps growing and is not healed

    *The claim:* after the site the difference grows on, and the norms on the way do not take it back. The chart of
    claim 1 shows how `frobenius` goes on. But the stream grows too: a change can grow and yet matter less and less.

    *What to look at first:* `relative` against `passive`. If no block reacted, the two would be equal. Where
    `relative` lies above, later blocks have added to the change. Where it lies below, they have taken some of it back.
    """)
    return


@app.cell(hide_code=True)
def _(names, result):
    relative_chart(result.statistics, names, ENDS)
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    *Then:* `gauge_free`. Every block reads the stream through a norm, which removes its length. `gauge_free` is blind
    to length too. It sees the direction alone, from 0 (the same) to 1 (nothing of it is left). Right after the site it
    is 0: the scale has changed the length of the stream, not its direction.
    """)
    return


@app.cell(hide_code=True)
def _(names, result):
    by_depth(factor_rows(result, "gauge_free", names), names, "gauge_free", factor_colours())
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    *Last:* `alignment`, block by block. A block that reads a changed stream writes something else than in the clean
    run. `alignment` is the cosine of this with the change that came in. A negative bar **repairs**, a positive bar
    **amplifies**. A bar near 0 does neither: what the block writes differently points elsewhere and is new damage.
    """)
    return


@app.cell(hide_code=True)
def _(names, result, verdicts):
    mo.vstack([alignment_chart(result, names), note(alignment_sentence(result, names)), note(verdicts[2])])
    return


@app.cell(hide_code=True)
def _():
    mo.md(f"""
    ### Claim 4: with the first token it is about ten times larger

    *The claim:* with position 0 the difference is about an order of magnitude larger, so it is better left out. In
    some models the vector of position 0 is so long that it decides the sum alone.

    *What to look at:* in the first chart, at factor {LOW:g}, how far the two lines lie apart. The second chart has the
    reason: the length of the clean stream at position 0 beside the others.
    """)
    return


@app.cell(hide_code=True)
def _(names, result, verdicts):
    mo.vstack([first_token_chart(result, names), clean_norms_chart(result, names), note(verdicts[3])])
    return


@app.cell(hide_code=True)
def _(names):
    mo.md(f"""
    ### Claim 5: it drops at the last block

    *The claim:* the last block makes the difference a little smaller. But the list of hidden states that the lecture
    used ends with the stream after the final norm, and the raw output of the last block is not in it. So the drop may
    be the norm's doing and not the block's.

    *What to look at:* compare {names[-3]} with {names[-2]}. Both are depths. The final norm gives the stream another
    length, so its bars are measured with another ruler.
    """)
    return


@app.cell(hide_code=True)
def _(names, result, verdicts):
    mo.vstack([last_places_chart(result, names), note(final_sentence(result)), note(verdicts[4])])
    return


@app.function
def factor_rows(result: Sweep, measure: str, names: Sequence[str]) -> Rows:
    """A measure by place, for every factor."""
    values = getattr(result.statistics, measure)(rest_of(result.statistics))[0, :, :, 0]
    return [row for j, factor in enumerate(result.factors) for row in rows_of(values[j], names, factor=factor)]


@app.function
def table_html(names: Sequence[str], values: Sequence[str]) -> str:
    """Values in a row, each below its name."""
    style = 'style="padding:2px 14px 2px 0;text-align:left"'
    head, body = (
        "".join(f"<{tag} {style}>{escape(word)}</{tag}>" for word in words)
        for tag, words in (("th", names), ("td", values))
    )
    return f'<table style="font-size:0.9rem"><tr>{head}</tr><tr>{body}</tr></table>'


@app.function
def jump_chart(result: Sweep) -> Any:
    """The difference right after the site, measured and as it must be, for every factor."""
    site, rest = result.layers[0] + 1, rest_of(result.statistics)
    length = float(result.statistics.clean_norm(rest)[site, 0])
    measured = result.statistics.frobenius(rest)[0, :, site, 0].tolist()
    rows = [
        {"factor": factor, "value": value, "expected": abs(factor - 1) * length}
        for factor, value in zip(result.factors, measured, strict=True)
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("factor:Q", scale=alt.Scale(domain=(LOW, HIGH), padding=8), axis=alt.Axis(grid=False, tickCount=5)),
        tooltip=["factor:Q", alt.Tooltip("value:Q", format=".4g"), alt.Tooltip("expected:Q", format=".4g")],
    )
    line = base.mark_line(color=GREY).encode(y=alt.Y("expected:Q", title="frobenius at the site"))
    return sized(
        line + base.mark_point(filled=True, size=45, opacity=1).encode(y="value:Q", color=factor_colours().legend(None))
    )


@app.function
def at_the_ends(result: Sweep, values: Tensor) -> list[tuple[str, Tensor]]:
    """Of values [factor, ...], those of the lowest and the highest factor, with their names."""
    return [(name, values[result.factors.index(factor)]) for name, factor in zip(ENDS, (LOW, HIGH), strict=True)]


@app.function
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


@app.function
def alignment_chart(result: Sweep, names: Sequence[str]) -> Any:
    """Which blocks after the site repair, and which amplify."""
    values = result.statistics.alignment(rest_of(result.statistics))[0, :, :, 0]
    later = slice(result.layers[0] + 2, -1)
    rows = [row for name, of in at_the_ends(result, values) for row in rows_of(of[later], names[later], series=name)]
    return bars(rows, names[later], "alignment")


@app.function
def alignment_sentence(result: Sweep, names: Sequence[str]) -> str:
    """The blocks that repair, and how far the direction has moved."""
    rest, later = rest_of(result.statistics), slice(result.layers[0] + 2, -1)
    alignment, gauge_free = (
        at_the_ends(result, measure(rest)[0, :, :, 0])
        for measure in (result.statistics.alignment, result.statistics.gauge_free)
    )
    sentences = list[str]()
    for (name, of), (_, direction) in zip(alignment, gauge_free, strict=True):
        signs = dict(zip(names[later], of[later].tolist(), strict=True))
        repairing = [block for block, value in signs.items() if value < 0]
        strongest = max(signs, key=lambda block: abs(signs[block]))
        sentences.append(
            f"At {name}, {len(repairing)} of the {len(signs)} later blocks have a negative alignment"
            f"{' (' + ', '.join(repairing) + ')' if repairing else ''}. The strongest is {strongest} with "
            f"{signs[strongest]:.2g}. After the last block gauge_free is {direction[-2]:.3g}."
        )
    return " ".join(sentences)


@app.function
def first_token_chart(result: Sweep, names: Sequence[str]) -> Any:
    """The difference at the lowest factor, with and without position 0."""
    statistics, index = result.statistics, result.factors.index(LOW)
    sets = {"with position 0": torch.arange(int(result.lengths[0])), "without position 0": rest_of(statistics)}
    rows = [
        row
        for name, positions in sets.items()
        for row in rows_of(statistics.frobenius(positions)[0, index, :, 0], names, series=name)
    ]
    colours = dict(zip(sets, (ORANGE, BLUE), strict=True))
    return by_depth(rows, names, f"frobenius, factor {LOW:g}", named_colours(colours))


@app.function
def clean_norms_chart(result: Sweep, names: Sequence[str]) -> Any:
    """The clean stream's norm: of position 0, and the mean of the others."""
    norms = result.statistics.clean_sq[:, 0].sqrt()
    colours = {"position 0": ORANGE, "mean of the others": GREY}
    rows = [
        *rows_of(norms[:, 0], names, series="position 0"),
        *rows_of(norms[:, 1:].mean(1), names, series="mean of the others"),
    ]
    return by_depth(rows, names, "norm of the clean stream", named_colours(colours))


@app.function
def last_places_chart(result: Sweep, names: Sequence[str]) -> Any:
    """The difference before and after the last block, and after the final norm."""
    values = result.statistics.frobenius(rest_of(result.statistics))[0, :, -3:, 0]
    rows = [row for name, of in at_the_ends(result, values) for row in rows_of(of, names[-3:], series=name)]
    return bars(rows, names[-3:], "frobenius")


@app.function
def final_sentence(result: Sweep) -> str:
    """How long the streams are that the last bars are differences of."""
    rest = rest_of(result.statistics)
    _, last, final = result.statistics.clean_norm(rest)[-3:, 0].tolist()
    relative = at_the_ends(result, result.statistics.relative(rest)[0, :, -2:, 0])
    beside = ", ".join(f"at {name} {raw:.3g} before it and {normed:.3g} after it" for name, (raw, normed) in relative)
    return (
        f"The clean stream of all positions but the first is {last:.4g} long before the final norm and {final:.4g} "
        f"after it. Beside the stream, the change is: {beside}."
    )


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## 6. Where to go next

    - `minigpt/model.py` is the whole model in one file. Read `Block.forward` beside the equations above.
    - `make study` runs the five claims with every check and writes tables and figures to `results/study`.
    - `.venv/bin/python -m experiments.divergence --help` shows other sites, other blocks, other models, and whole
      collections of texts. One sentence proves little.
    - `.venv/bin/minigpt generate weights/tiny --prompt "The old man" --scale blocks.2.output_scale=0.5` writes a text
      with a scale changed.
    - `minigpt/measures.py` says of every measure what it is for and what it cannot see.
    - The README has ten lines of Python to start from, and an intervention with several scales at once.
    """)
    return


if __name__ == "__main__":
    app.run()
