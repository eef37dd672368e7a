"""A tour in the browser, for whoever meets the inside of a transformer today.

    OMP_NUM_THREADS=1 python -m marimo run experiments/tour/tour.py

A marimo notebook: a cell runs again when something that it reads has changed. It runs weights/tiny on the CPU, where
a second thread makes so small a model no faster, and much slower beside other work. `charts.py` beside this file
draws, and the cells show.
"""
# mypy: allow-untyped-defs
# ruff: noqa: B018, PLR1711
# Both for the form in which marimo writes cells: no annotations, a bare name as output, a bare return.

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="From tokens to logits, one scale at a time")

with app.setup:
    from pathlib import Path

    import marimo as mo
    import torch

    from experiments.divergence import claims
    from experiments.harness.experiment import PROMPT
    from experiments.harness.pairs import ANSWER, CORRUPTED, DIFFERING, FOIL
    from experiments.harness.pairs import PROMPT as CLEAN
    from experiments.page.figures import place_names
    from experiments.tools import copier
    from experiments.tour import charts
    from experiments.tour.charts import BLUE, ENDS, HIGH, LOW, STUDIED
    from minigpt import GPT2, Tokenizer, compare, sweep

    TINY, COPIER = (Path(__file__).parents[2] / "weights" / name for name in ("tiny", "copier"))


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
    read, problem = charts.read_prompt(tokenizer, text.value, model.config.n_positions)
    mo.stop(bool(problem), charts.note(problem, "warn"))
    ids, tokens = torch.tensor([read]), tokenizer.tokens(read)
    mo.Html(charts.tokens_html(tokens, read))
    return ids, tokens


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
    clean = charts.stream_norms(model, ids)
    mo.vstack([charts.norms_chart(clean, tokens, names), charts.note(charts.norms_sentence(clean, names))])
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## 3. The three equations of a block

    The stream $x$ enters a block. Three lines later it leaves:

    $$
    \begin{aligned}
    u &= x + s_{\text{attention}}\,\mathrm{attention}(\mathrm{norm}(x)) + t_{\text{attention}} \\
    y &= u + s_{\text{mlp}}\,\mathrm{mlp}(\mathrm{norm}(u)) + t_{\text{mlp}} \\
    \mathrm{out} &= s_{\text{output}}\,y + t_{\text{output}}
    \end{aligned}
    $$

    *Attention* lets a position read from itself and from earlier positions. It has several **heads**, and each reads
    in its own way. With $z_h$ for what head $h$ has read:

    $$
    \mathrm{attention} = W_O\,\mathrm{concat}_h(s_{\text{head},h}\,z_h + t_{\text{head},h}) + b_O
    $$

    The *MLP* works on every position by itself. A place where you can act is a **site**. One law holds at every site:
    $a \leftarrow s\,a + t$. The **scale** $s$ is 1 until you change it, the **shift** $t$ is 0. Then they change
    nothing, not even the last bit. They are called after their site: `output_scale`, `output_shift`.

    | site | what it is |
    |:---|:---|
    | `embedding` | the stream before the first block |
    | `output` | the whole stream as it leaves the block, with all that was written before |
    | `attention` | only what this block's attention adds; a scale of 0 removes it |
    | `mlp` | only what this block's MLP adds; a scale of 0 removes it |
    | `head` | what one head brings, before $W_O$ mixes the heads |
    | `query`, `key`, `value` | what attention is made of: a query is compared with keys, and values are what is read |
    | `score` | how well query and key match; it has a shift alone, and at minus infinity the key is not read |
    | `neuron` | one unit of the MLP's hidden layer |

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
    names,
    output_slider,
):
    scales = charts.scales_of(
        model,
        block.value,
        output_slider.value,
        attention_slider.value,
        mlp_slider.value,
        head.value,
        head_slider.value,
    )
    comparison = compare(model, ids, [scales], predictions=True)
    change = charts.compared(comparison, names)
    figures = charts.figures_of(comparison, change, names[block.value + 1])
    mo.Html(charts.figures_html(figures))
    return change, comparison, scales


@app.cell(hide_code=True)
def _(change, names):
    frobenius = list(change.at(metric="frobenius").rows(series="frobenius"))
    mo.vstack(
        [
            charts.by_depth(frobenius, names, "frobenius", charts.named_colours({"frobenius": BLUE})),
            charts.relative_chart(change, {"relative": change}, {"relative": BLUE}),
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
def _(comparison, tokenizer):
    likely = charts.likely_of(comparison, tokenizer)
    mo.Html(charts.likely_html(*likely))
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
    mo.md(f"```python\n{charts.code_of(scales)}\n```")
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## 5. Put something else there

    A scale makes what is there larger or smaller. With a shift you can put something else there. Take it from another
    text: one with as many tokens, in which a word differs. The first text is the **clean** one. It calls for the
    **answer**, and the other text calls for the **foil**. After the last token, the logit of the answer minus that of
    the foil is the **logit difference**. Above 0 the model prefers the answer, below 0 the foil.
    """)
    return


@app.cell(hide_code=True)
def _():
    pair_texts = mo.md("{clean}\n\n{corrupted}\n\n{answer} {foil}").batch(
        clean=mo.ui.text(value=CLEAN, label="Clean", full_width=True),
        corrupted=mo.ui.text(value=CORRUPTED, label="Other", full_width=True),
        answer=mo.ui.text(value=ANSWER, label="Answer, one token"),
        foil=mo.ui.text(value=FOIL, label="Foil, one token"),
    )
    pair_texts
    return (pair_texts,)


@app.cell(hide_code=True)
def _(model, pair_texts, tokenizer):
    pair, pair_problem = charts.read_pair(tokenizer, pair_texts.value, model.config.n_positions)
    mo.stop(bool(pair_problem), charts.note(pair_problem, "warn"))
    return (pair,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    Choose a place: a block, and a position. Four things are done there, each by itself, in the run of the clean text:

    - **Scaling.** The block's output at this position is halved.
    - **Steering.** A direction is added to the block's output at this position. It is the mean of the stream there,
      over all positions, of the other text minus that of the clean one.
      The mean thins out what a single token does.
    - **Patching.** The block's output at this position is replaced by what it is in the other text: the scale is 0
      there, and the shift is the other text's value.
    - **Removing an edge.** An edge is the way from one position to another that it reads. In this block the last
      position cannot read this one: all heads lose the edge, or the head that you choose.
    """)
    return


@app.cell(hide_code=True)
def _(model):
    place_block = mo.ui.dropdown(
        {f"block {n}": n for n in range(model.config.n_layer)}, f"block {STUDIED}", label="Block of the place"
    )
    edge_head = mo.ui.dropdown(
        {"all heads": None, **{f"head {n}": n for n in range(model.config.n_head)}}, "all heads", label="Edge of"
    )
    return edge_head, place_block


@app.cell(hide_code=True)
def _(pair, tokenizer):
    places = charts.pair_places(tokenizer, pair)
    place_position = mo.ui.dropdown(places, list(places)[pair.groups[DIFFERING][0]], label="Position")
    return place_position, places


@app.cell(hide_code=True)
def _(edge_head, place_block, place_position):
    mo.hstack([place_block, place_position, edge_head], justify="start", wrap=True)
    return


@app.cell(hide_code=True)
def _(edge_head, model, pair, pair_texts, place_block, place_position):
    changes = charts.changes_at(model, pair, place_block.value, place_position.value, edge_head.value)
    answers = charts.answers_of(model, pair, changes)
    mo.vstack([charts.answers_chart(answers, pair_texts.value), charts.note(charts.answers_sentence(answers))])
    return answers, changes


@app.cell(hide_code=True)
def _():
    mo.md("""
    Now every place is patched, one at a time. A share of 0 means that the answer is as after the clean text. At 1 the
    model answers as it does after the other text.

    *What to look at:* before the first token that differs both runs are the same, and the share is 0. In the
    embeddings only the tokens that differ tell the two texts apart. After the last block only the last position
    counts. In between, attention carries the difference from position to position, and you see in which blocks.
    """)
    return


@app.cell(hide_code=True)
def _(model, pair, places):
    shares = charts.recovered(model, pair, list(places))
    mo.vstack([charts.recovered_chart(shares), charts.note(charts.recovered_sentence(shares))])
    return (shares,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    This is what was done at the place that you chose, in Python. `ids` are the tokens of the clean text, `other` those
    of the other one.
    """)
    return


@app.cell(hide_code=True)
def _(changes):
    mo.md(charts.codes_of(changes))
    return


@app.cell(hide_code=True)
def _():
    mo.md(f"""
    ## 6. Five claims

    The study of this project tests five claims of a lecture. The lecture scaled the output of block {STUDIED} by
    factors from {LOW:g} to {HIGH:g} and followed the change to the end of the model. The value given to
    a scale is its **factor**.

    Here it is done on your text of section 1, so the verdicts are about that text and this model. The sliders and
    choices above play no part. All measures leave position 0 out, unless they say otherwise.
    """)
    return


@app.cell(hide_code=True)
def _(ids, model, names):
    result = sweep(model, ids, [STUDIED], predictions=True)
    alone = [
        sweep(model, ids, [STUDIED], (LOW, HIGH), positions=only, predictions=True)
        for only in ([0], range(1, ids.shape[1]))
    ]
    upstream = charts.differences_up_to(model, ids, STUDIED, LOW)
    tables = charts.tables_of(result, alone)
    judged = claims.judge(tables, result.site, result.positions, [max(upstream[:-1])], "this text")
    verdicts = [charts.verdict_sentence(verdict) for verdict in judged]
    study, norms = (tables[name].named("depth", "place", names) for name in ("values", "norms"))
    everywhere = study.at(layer=STUDIED)
    rest = everywhere.at(positions="rest")
    return everywhere, norms, rest, upstream, verdicts


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
def _(names, rest, upstream, verdicts):
    mo.vstack(
        [
            charts.by_depth(list(rest.at(metric="frobenius").rows()), names, "frobenius", charts.factor_colours()),
            mo.Html(charts.table_html(names[: len(upstream)], [f"{value:.3g}" for value in upstream])),
            charts.note(verdicts[0]),
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
def _(names, norms, rest, verdicts):
    at_site = rest.at(metric="frobenius", place=names[STUDIED + 1])
    length = float(norms.at(of="of the others together", place=names[STUDIED + 1]).value)
    mo.vstack([charts.jump_chart(at_site, length), charts.note(verdicts[1])])
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
def _(rest):
    charts.relative_chart(rest.at(factor=LOW), charts.at_the_ends(rest), ENDS)
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
def _(names, rest):
    charts.by_depth(list(rest.at(metric="gauge_free").rows()), names, "gauge_free", charts.factor_colours())
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
def _(rest, verdicts):
    mo.vstack([charts.alignment_chart(rest), charts.note(charts.alignment_sentence(rest)), charts.note(verdicts[2])])
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
def _(everywhere, norms, verdicts):
    mo.vstack([charts.first_token_chart(everywhere), charts.clean_norms_chart(norms), charts.note(verdicts[3])])
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
def _(norms, rest, verdicts):
    mo.vstack(
        [charts.last_places_chart(rest), charts.note(charts.final_sentence(rest, norms)), charts.note(verdicts[4])]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(f"""
    ## 7. How two heads learn to copy

    This section has a model of its own, `weights/copier`: two blocks, with one head each, trained in a minute on
    pieces of random tokens that come again and again. Nothing but an earlier copy foretells the next token. It is
    asked here about pieces of {copier.ASKED} tokens that are shown twice.

    *What to look at:* the loss of the first copy never falls below that of a guess. The loss of the second copy does,
    after a hundred steps in which it hardly moves. In the second chart are two heads that appear in the same
    steps:

    - A **previous-token head** in block 0. Each position reads the token before it.
    - An **induction head** in block 1. It looks for the position that read the present token: the one after its first
      copy. What stands there comes next. The share of attention there is called **prefix matching**.
    """)
    return


@app.cell(hide_code=True)
def _():
    copies = GPT2.from_pretrained(COPIER)
    log = copier.read_log(COPIER / copier.LOG_FILE)
    previous, induction = charts.copying_heads(copies)
    mo.vstack([charts.losses_chart(log), charts.scores_chart(log)])
    return copies, induction, previous


@app.cell(hide_code=True)
def _(induction, previous):
    mo.md(f"""
    Here is what head {previous} of block 0 and head {induction} of block 1 attend to, on a piece of
    {copier.LONGEST} tokens that is shown twice. Each row is a position that reads. In block 0 the bright cells lie
    just below the diagonal. In block 1, from the second copy on, they lie on the token after the first copy.

    Now take the previous-token head away: move its scale to 0. The induction head of block 1 is as it was, but the
    positions no longer know what stood before them. It finds nothing, and the copying is gone.
    """)
    return


@app.cell(hide_code=True)
def _(previous):
    copy_slider = mo.ui.slider(
        0.0, 2.0, 0.05, 1.0, label=f"`head_scale` of head {previous} in block 0", show_value=True, full_width=True
    )
    copy_slider
    return (copy_slider,)


@app.cell(hide_code=True)
def _(copies, copy_slider, induction, previous):
    attention, second_loss, matching = charts.copying(copies, previous, copy_slider.value)
    _letters = charts.letters(copier.shown_twice(1, copier.LONGEST)[0].tolist())
    mo.vstack(
        [
            charts.note(charts.copying_sentence(copy_slider.value, second_loss, matching)),
            charts.pattern_chart(attention[0, previous], _letters, f"attention of head {previous} in block 0"),
            charts.pattern_chart(attention[1, induction], _letters, f"attention of head {induction} in block 1"),
        ]
    )
    return attention, matching, second_loss


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## 8. Where to go next

    - `minigpt/model.py` is the whole model in one file. Read `Block.forward` beside the equations above.
    - `make study` runs the five claims with every check and writes tables and figures to `results/study`.
    - `.venv/bin/python -m experiments.divergence --help` shows other sites, other blocks, other models, and whole
      collections of texts. One sentence proves little.
    - `.venv/bin/python -m experiments.patching` patches every place and every head, and takes collections of pairs.
      `experiments.knockout` removes edges, `experiments.ablation` removes heads and neurons, `experiments.steering`
      makes a direction from many pairs and asks what it costs, `experiments.lens` reads a prediction at every depth.
    - `.venv/bin/minigpt generate weights/tiny --prompt "The old man" --scale blocks.2.output_scale=0.5` writes a text
      with a scale changed.
    - `.venv/bin/python -m experiments.copier --output results/copier` trains the model that copies, while you wait.
    - `minigpt/measures.py` says of every measure what it is for and what it cannot see.
    - The README has ten lines of Python to start from, and an intervention with several scales at once.
    """)
    return


if __name__ == "__main__":
    app.run()
