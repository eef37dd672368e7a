"""The lens: every number beside one that is computed from the streams alone, and oracles that notice what is wrong."""

import csv
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import lens
from experiments.harness import writing
from experiments.harness.experiment import Answers, Start
from experiments.harness.ranks import Ranks
from experiments.harness.running import run_over_corpus, run_prompt
from experiments.harness.table import Table
from experiments.lens import Lens, LensOptions, Writer
from minigpt import GPT2, GPT2Config, Tokenizer, parity
from minigpt.cache import KeyValueCache
from minigpt.model import Block
from tests.blocks import BLOCKS
from tests.conftest import SMALL, TINY, draw
from tests.seen import shown
from tests.studies import LETTERS, PLACES, PROMPT, TEXTS, Ran, small_model
from tests.test_study import run_main

LAYERS, HEADS, DEPTHS = SMALL["n_layer"], SMALL["n_head"], SMALL["n_layer"] + 1
ANSWER, FOIL = "x", "k"
PAIR = Answers(*LETTERS.encode(ANSWER + FOIL))
FAST = 1e-9
"""Relative and absolute: float64, and sums in another order."""
NAMES = PLACES[:-1]


def begun(model: GPT2, **asked: Any) -> Start[LensOptions]:
    options = LensOptions(**{"no_parity": True, "dtype": "float64", **asked})
    return Start(model, LETTERS, options, torch.device("cpu"))


@cache
def of_prompt(block: type[Block] = Block, pair: bool = True) -> Ran:
    """The study of a prompt, on the small model."""
    model = small_model() if block is Block else draw(GPT2Config(**SMALL), block=block)
    words = {"answer": ANSWER, "foil": FOIL} if pair else {}
    experiment = Lens.from_options(begun(model, prompt=PROMPT, **words))
    study = run_prompt(experiment, model, LETTERS)
    return Ran(experiment, study, experiment.figures(study))


@pytest.fixture(scope="module")
def of_corpus(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The study of four texts."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    experiment = Lens.from_options(begun(small_model(), texts=folder / "texts.txt", window=16))
    with ExitStack() as held:
        study = run_over_corpus(experiment, small_model(), LETTERS, folder / "out", Ranks(), held)
    assert study is not None
    return Ran(experiment, study, experiment.figures(study))


def near(value: float) -> Any:
    return pytest.approx(value, rel=FAST, abs=FAST)


# The same from the streams alone.


@torch.no_grad()
def distributions(text: str) -> list[Tensor]:
    """What every depth would say: [position, vocab] each, through a norm and a product that are written out."""
    model, found = small_model(), []
    for x in model.residuals(torch.tensor([LETTERS.encode(text)]))[:, 0]:
        norm = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + model.config.layer_norm_epsilon
        ).sqrt()
        final = norm * model.final_norm.weight + model.final_norm.bias
        found.append((final @ model.token_embedding.weight.T).softmax(-1))
    return found


def expected_values(text: str) -> dict[str, list[float]]:
    """Every measure by depth, position by position."""
    ids, p = LETTERS.encode(text), distributions(text)
    count, found = len(ids), {metric: list[float]() for metric in lens.METRICS}
    top = [[int(of[at].argmax()) for at in range(count)] for of in p]
    for depth, q in enumerate(p):
        of_next = [float(q[at, ids[at + 1]]) for at in range(count - 1)]
        ranks = sorted(1 + int((q[at] > q[at, ids[at + 1]]).sum()) for at in range(count - 1))
        half = len(ranks) // 2
        median = ranks[half] if len(ranks) % 2 else (ranks[half - 1] + ranks[half]) / 2
        kl = [float((p[-1][at] * (p[-1][at] / q[at]).log()).sum()) for at in range(count)]
        entropy = [-float((q[at] * q[at].log()).sum()) for at in range(count)]
        agree = [top[depth][at] == top[-1][at] for at in range(count)]
        settled = [all(top[later][at] == top[-1][at] for later in range(depth, DEPTHS)) for at in range(count)]
        numbers = {
            "kl": sum(kl) / count, "entropy": sum(entropy) / count, "rank": median,
            "loss": -sum(map(math.log, of_next)) / (count - 1), "probability": sum(of_next) / (count - 1),
            "agreement": sum(agree) / count, "settled": sum(settled) / count,
        }  # fmt: skip
        for metric, value in numbers.items():
            found[metric].append(value)
    return found


def test_every_measure_of_every_depth_is_that_of_its_definition() -> None:
    table = of_prompt().study.tables["values"]
    for metric, values in expected_values(PROMPT).items():
        assert table.at(metric=metric).value.tolist() == near(values), metric


def test_settled_leaves_out_what_is_lost_again() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 5, 3], [1, 2, 9], [1, 2, 3]])[:, None]
    some = torch.zeros(4, 1, 3, dtype=torch.float64)
    numbers = dict.fromkeys(("kl", "loss", "entropy", "correlation", "clean_logit", "top", "top_probability"), some)
    found = lens._values(lens.Predictions(**numbers, likeliest=ids, rank=some.long()))
    values = dict(zip(lens.METRICS, found, strict=True))
    assert values["agreement"].tolist() == near([1, 2 / 3, 2 / 3, 1])
    assert values["settled"].tolist() == near([1 / 3, 1 / 3, 2 / 3, 1])


def test_the_last_depth_is_the_prediction_itself() -> None:
    values = of_prompt().study.tables["values"].at(depth=LAYERS)
    assert float(values.at(metric="kl").value) == near(0)
    assert float(values.at(metric="agreement").value) == float(values.at(metric="settled").value) == 1


def test_over_a_corpus_every_measure_is_a_mean_over_windows_with_its_interval(of_corpus: Ran) -> None:
    table, windows = of_corpus.study.tables["values"], [expected_values(text) for text in TEXTS]
    for metric in lens.METRICS:
        for depth in range(DEPTHS):
            found, runs = table.at(metric=metric, depth=depth), [window[metric][depth] for window in windows]
            assert float(found.value) == near(sum(runs) / len(runs))
            assert min(runs) - FAST <= float(found.low) <= float(found.value) + FAST
            assert float(found.value) - FAST <= float(found.high) <= max(runs) + FAST


def test_tokens_of_a_prompt_are_by_position_and_depth() -> None:
    ids, p, table = LETTERS.encode(PROMPT), distributions(PROMPT), of_prompt().study.tables["tokens"]
    for depth, q in enumerate(p):
        for at in range(len(ids)):
            found = {
                metric: float(table.at(metric=metric, position=at, depth=depth).value) for metric in lens.PER_TOKEN
            }
            assert found["top_probability"] == near(float(q[at].max()))
            if at == len(ids) - 1:
                assert math.isnan(found["rank"])
                assert math.isnan(found["probability"])
            else:
                assert found["probability"] == near(float(q[at, ids[at + 1]]))
                assert found["rank"] == 1 + int((q[at] > q[at, ids[at + 1]]).sum())


# Who wrote it.


@torch.no_grad()
def expected_contributions(text: str, pair: Answers) -> dict[Writer, float]:
    """What every vector that is written into the stream at the last position does to the difference, one at a time."""
    model, ids = small_model(), torch.tensor([LETTERS.encode(text)])
    streams, written, width = model.residuals(ids), dict[Writer, Tensor](), SMALL["n_embd"] // HEADS
    written[Writer("embedding")] = streams[0, 0, -1]
    for layer, (block, x) in enumerate(zip(model.blocks, streams, strict=False)):
        z, projection = block.attention.mix(block.attention_norm(x))[0, -1], block.attention.projection
        for head in range(HEADS):
            columns = slice(head * width, (head + 1) * width)
            written[Writer("head", layer, head)] = projection.weight[:, columns] @ z[head]
        written[Writer("attention bias", layer)] = projection.bias
        u = x + block.attention(block.attention_norm(x))
        written[Writer("mlp", layer)] = block.mlp(block.mlp_norm(u))[0, -1]
    deviation = (streams[-1, 0, -1].var(correction=0) + model.config.layer_norm_epsilon).sqrt()
    unembed, norm = (
        model.token_embedding.weight[pair.answer] - model.token_embedding.weight[pair.foil],
        model.final_norm,
    )
    found = {writer: float(((of - of.mean()) / deviation * norm.weight) @ unembed) for writer, of in written.items()}
    return {**found, Writer("final norm's bias"): float(norm.bias @ unembed)}


@torch.no_grad()
def last_logits(text: str) -> Tensor:
    return small_model()(torch.tensor([LETTERS.encode(text)]))[0, -1]


def likeliest_two(text: str) -> Answers:
    return Answers(*last_logits(text).argsort(descending=True)[:2].tolist())


@pytest.mark.parametrize("given", [True, False])
def test_every_contribution_is_that_of_what_was_written(given: bool) -> None:
    pair = PAIR if given else likeliest_two(PROMPT)
    table = of_prompt(pair=given).study.tables["attribution"]
    expected = expected_contributions(PROMPT, pair)
    assert set(table.axes["writer"]) == set(expected)
    for writer, value in expected.items():
        assert float(table.at(writer=writer).value) == near(value), writer


@pytest.mark.parametrize("given", [True, False])
def test_the_contributions_add_up_to_the_logit_difference(given: bool) -> None:
    pair, found = PAIR if given else likeliest_two(PROMPT), of_prompt(pair=given).study.tables["difference"]
    logits = last_logits(PROMPT)
    expected = float(logits[pair.answer] - logits[pair.foil])
    assert found.value.tolist() == near([expected, expected])
    assert given or expected > 0


def test_the_parts_are_sums_over_all_of_a_kind() -> None:
    parts, sums = of_prompt().study.tables["parts"], dict.fromkeys(lens.PARTS, 0.0)
    for writer, value in expected_contributions(PROMPT, PAIR).items():
        sums[{"head": "attention", "attention bias": "attention"}.get(writer.writer, writer.writer)] += value
    assert parts.axes["writer"] == (*sums, "mlp less attention")
    assert parts.value.tolist() == near([*sums.values(), sums["mlp"] - sums["attention"]])


def test_over_a_corpus_every_window_has_a_pair_of_its_own(of_corpus: Ran) -> None:
    windows = [expected_contributions(text, likeliest_two(text)) for text in TEXTS]
    table = of_corpus.study.tables["attribution"]
    for writer in table.axes["writer"]:
        assert float(table.at(writer=writer).value) == near(sum(of[writer] for of in windows) / len(windows))


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_ones_own_pass_the_oracles(block: type[Block]) -> None:
    assert all(check["passed"] for check in of_prompt(block).study.checked.checks)


def test_blocks_that_cannot_be_taken_apart_are_read_without() -> None:
    class Doubled(Block):
        """Writes twice what attention and MLP return."""

        def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
            return x + 2 * (super().forward(x, cache) - x)

    model = draw(GPT2Config(**SMALL), block=Doubled)
    with pytest.raises(ValueError, match="nobody can be said to have written it"):
        run_prompt(Lens.from_options(begun(model, prompt=PROMPT)), model, LETTERS)
    without = Lens.from_options(begun(model, prompt=PROMPT, no_attribution=True))
    study = run_prompt(without, model, LETTERS)
    assert set(study.tables) == {"values", "fall", "tokens"}
    assert len(study.checked.checks) == len(without.verdicts(study)) == 2
    assert [of.name for of in without.figures(study).figures] == ["tokens", *lens.BY_DEPTH]
    assert not any("contributions" in line for line in without.lines(study, 100))


# The oracles.


def error_when(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> str:
    monkeypatch.setattr(lens, name, value)
    with pytest.raises(parity.CheckError) as raised:
        run_prompt(Lens.from_options(begun(small_model(), prompt=PROMPT)), small_model(), LETTERS)
    return str(raised.value)


def test_the_last_depths_logits_are_equal_bit_for_bit() -> None:
    first, *others = of_prompt().study.checked.checks
    assert (first["claim"], first["figure"]) == (lens.LAST_IS_OWN, 0.0)
    assert all(check["passed"] and check["figure"] < 1e-12 for check in others)


def test_a_lens_without_the_final_norm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(model: GPT2, ids: Tensor) -> Iterator[Tensor]:
        with torch.no_grad():
            yield from (model.unembed(x) for x in model.depths(ids))

    assert lens.LAST_IS_OWN in error_when(monkeypatch, "logit_lens", bare)


def test_depths_in_another_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = lens.predict_logits

    def turned(model: GPT2, streams: Tensor, *given: Any) -> lens.Predictions:
        return predict(model, torch.cat([streams[:1], streams[1:].roll(1, 0)]), *given)

    said = error_when(monkeypatch, "predict_logits", turned)
    assert lens.SAME_LENS in said
    assert lens.LAST_IS_OWN not in said


def test_a_writer_that_was_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lens.contributions

    def fewer(*given: Any) -> dict[Writer, float]:
        return {writer: of for writer, of in whole(*given).items() if writer != Writer("head", 2, 1)}

    assert lens.ADDS_UP in error_when(monkeypatch, "contributions", fewer)


# What is judged.


def table_of(value: float, low: float, high: float, **axes: Any) -> Table:
    shape = [len(labels) for labels in axes.values()]
    ends = {name: torch.full(shape, of) for name, of in (("low", low), ("high", high))}
    return Table(axes, torch.full(shape, value), ends)


CASES = [((0.1, 0.01, 0.2), "holds"), ((-0.1, -0.2, -0.01), "does not hold"), ((0.0, -0.01, 0.01), "undecided")]


@pytest.mark.parametrize(("around", "verdict"), CASES)
def test_every_claim_can_come_out_either_way(around: tuple[float, ...], verdict: str) -> None:
    assert lens._falls(table_of(*around, depth=range(1, 4))).verdict == verdict
    assert lens._settled(table_of(*(0.5 + of for of in around)), 2).verdict == verdict
    parts = table_of(*around, writer=["mlp", "attention", "mlp less attention"])
    assert lens._mlp_or_attention(parts).verdict == verdict


def test_one_block_that_takes_farther_away_decides() -> None:
    fall = Table({"depth": range(1, 4)}, torch.tensor([0.5, -0.1, 0.2]))
    decision = lens._falls(fall)
    assert decision.verdict == "does not hold"
    assert decision.evidence.endswith("does not fall: block 1.")


@pytest.mark.parametrize(("layers", "depth"), [(12, 8), (4, 2), (1, 0), (48, 32)])
def test_two_thirds_of_the_depth(layers: int, depth: int) -> None:
    assert lens.settled_by(layers) == depth


def test_verdicts_rest_on_the_numbers_of_their_claim() -> None:
    ran, kl = of_prompt(), expected_values(PROMPT)["kl"]
    fall, settled, more = ran.experiment.verdicts(ran.study)
    assert fall.figures["fall"] == near([before - after for before, after in itertools.pairwise(kl)])
    assert settled.figures["settled"] == near(expected_values(PROMPT)["settled"][2])
    parts = ran.study.tables["parts"]
    for name, figure in (("mlp", "mlp"), ("attention", "attention"), ("mlp less attention", "mlp_less_attention")):
        assert more.figures[figure] == near(float(parts.at(writer=name).value))


# What is asked.


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"answer": "x"}, "--answer was given without --foil"),
        ({"answer": "x", "foil": "kk"}, "--foil 'kk' is 2 tokens (k | k); give one token"),
    ],
)
def test_a_mistake_is_a_sentence(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^--") as raised:
        Lens.from_options(begun(small_model(), prompt=PROMPT, **asked))
    assert said in str(raised.value)


# What a person sees.


def test_rows_name_every_number_once_with_the_likeliest_token() -> None:
    ran, p = of_prompt(), distributions(PROMPT)
    rows, count = [*ran.experiment.rows(ran.study)], len(PROMPT)
    keys = [tuple(row.get(key) for key in ("metric", "depth", "position", "writer", "layer", "head")) for row in rows]
    expected = len(lens.METRICS) * DEPTHS + len(expected_contributions(PROMPT, PAIR)) + 2 + DEPTHS * (3 * count - 2)
    assert len(set(keys)) == len(keys) == expected
    tops = {(row["depth"], row["position"]): row["top"] for row in rows if row["metric"] == "top_probability"}
    assert tops == {
        (depth, at): LETTERS.decode([int(q[at].argmax())]) for depth, q in enumerate(p) for at in range(count)
    }


def test_the_terminal_shows_every_depth_and_the_sum() -> None:
    ran = of_prompt()
    lines, values = [*ran.experiment.lines(ran.study, 100)], expected_values(PROMPT)
    tops = [LETTERS.decode([int(q[-1].argmax())]) for q in distributions(PROMPT)]
    for depth, name in enumerate(NAMES):
        line = lines[1 + depth].strip()
        assert line.startswith(name)
        assert line.endswith(repr(tops[depth]))
        numbers = line.removeprefix(name).removesuffix(repr(tops[depth])).split()
        found = [values[metric][depth] for metric in lens.PRINTED]
        assert [float(of) for of in numbers] == pytest.approx(found, rel=1e-3, abs=1e-9)
    logits = last_logits(PROMPT)
    said = f"{float(logits[PAIR.answer] - logits[PAIR.foil]):.3g}"
    assert (
        f"logit of {ANSWER!r} less that of {FOIL!r}, after the prompt: {said}; all contributions together: {said}"
        in lines
    )
    contributions = expected_contributions(PROMPT, PAIR)
    order = sorted(contributions, key=lambda writer: -abs(contributions[writer]))[: lens.SHOWN]
    listed = [line.strip().rsplit("  ", 1) for line in lines[-1 - lens.SHOWN : -1]]
    assert listed == [[writer.words, f"{contributions[writer]:.3g}"] for writer in order]


def test_the_map_of_tokens_says_what_every_depth_would_say() -> None:
    ran, p = of_prompt(), distributions(PROMPT)
    chart = shown(ran.figures, "tokens")
    assert list(chart.y.labels) == NAMES[::-1], "the last depth is on top"
    assert chart.ends == (0.0, 1.0)
    labels = list(chart.x.labels)
    expected = {
        (name, labels[at]): float(q[at].max()) for name, q in zip(NAMES, p, strict=True) for at in range(len(PROMPT))
    }
    assert chart.cells() == pytest.approx(expected, rel=1e-4)
    words = {(chart.y.label(mark.middle), chart.x.label(mark.x)): mark.item["text"] for mark in chart.of("text")}
    for name, q in zip(NAMES, p, strict=True):
        for at, label in enumerate(labels):
            assert words[name, label] == LETTERS.decode([int(q[at].argmax())]).replace(" ", "\u00b7").replace(
                "\x7f", "\u2421"
            )


def test_the_bars_by_depth_are_the_measures(of_corpus: Ran) -> None:
    for ran in (of_prompt(), of_corpus):
        for name, (metrics, *_) in lens.BY_DEPTH.items():
            chart, values = shown(ran.figures, name), ran.study.tables["values"]
            expected = {
                (place, *([metric] if len(metrics) > 1 else [])): float(values.at(metric=metric, depth=depth).value)
                for metric in metrics
                for depth, place in enumerate(NAMES)
            }
            assert chart.bars() == pytest.approx(expected, rel=1e-3, abs=1e-4 * chart.y.reach)


def test_the_charts_of_writers_are_the_contributions(of_corpus: Ran) -> None:
    for ran in (of_prompt(), of_corpus):
        table = ran.study.tables["attribution"]
        values = {writer: float(table.at(writer=writer).value) for writer in table.axes["writer"]}
        order = sorted(values, key=lambda writer: -abs(values[writer]))[: lens.SHOWN]
        chart = shown(ran.figures, "attribution")
        assert list(chart.x.labels) == [writer.words for writer in order]
        expected = {(writer.words,): values[writer] for writer in order}
        assert chart.bars() == pytest.approx(expected, rel=1e-3, abs=1e-4 * chart.y.reach)
        cells = {
            (f"block {writer.layer}", "mlp" if writer.writer == "mlp" else f"head {writer.head}"): value
            for writer, value in values.items()
            if writer.writer in ("head", "mlp")
        }
        assert shown(ran.figures, "heads").cells() == pytest.approx(cells, rel=1e-4, abs=1e-9)


def test_the_page_says_the_sum_beside_the_difference() -> None:
    (figure,) = (of for of in of_prompt().figures.figures if of.name == "attribution")
    logits = last_logits(PROMPT)
    said = f"{float(logits[PAIR.answer] - logits[PAIR.foil]):.3g}"
    assert figure.note.startswith(f"All writers together add {said};")
    assert figure.note.endswith(f"is {said}.")


# As a person runs it.


def test_a_run_of_tiny_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, tiny: GPT2
) -> None:
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    prompt, folder = "The king took off his crown, and", tmp_path / "out"
    code, out, err = run_main(lens.main, monkeypatch, capfd, "--model", TINY, "--prompt", prompt, "--output", folder)
    assert (code, err) == (0, "")
    summary = json.loads((folder / "summary.json").read_text())
    tokenizer = Tokenizer.from_pretrained(TINY)
    with torch.no_grad():
        logits = tiny(torch.tensor([tokenizer.encode(prompt)]))[0, -1]
    values, top = logits.topk(2)
    assert summary["pair"] == tokenizer.tokens(top.tolist())
    assert [check["passed"] for check in summary["checks"]] == [True] * 3
    with (folder / "lens.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    parts = [float(row["value"]) for row in rows if row["metric"] == "contribution"]
    (difference,) = (float(row["value"]) for row in rows if row["metric"] == "logit_difference")
    assert difference == pytest.approx(float(values[0] - values[1]), abs=1e-5)
    assert sum(parts) == pytest.approx(difference, abs=1e-4)
    assert f"after the prompt: {difference:.3g}" in out


def test_settings_without_a_pair_are_those_of_the_likeliest_two() -> None:
    experiment = of_prompt(pair=False).experiment
    assert (experiment.settings.answer, experiment.settings.foil) == (None, None)
    named = Lens(replace(experiment.settings, answer=ANSWER, foil=FOIL), likeliest_two(PROMPT))
    study = run_prompt(named, small_model(), LETTERS)
    torch.testing.assert_close(
        study.tables["attribution"].value, of_prompt(pair=False).study.tables["attribution"].value, rtol=0, atol=0
    )
