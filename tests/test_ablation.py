"""Heads and neurons taken away: every number beside a run of its own, and oracles that notice what is wrong."""

import csv
import itertools
import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import ablation
from experiments.ablation import CHOSEN, KL, LOGITS, LOSS, MEAN, RANDOM, ZERO, Ablation, AblationOptions, Neuron, refer
from experiments.harness import writing
from experiments.harness.experiment import Answers, Start
from experiments.harness.ranks import Ranks
from experiments.harness.running import run_over_corpus, run_prompt
from experiments.harness.table import Table
from minigpt import GPT2, GPT2Config, Tokenizer, parity, scaled
from minigpt.model import Block
from tests.blocks import BLOCKS
from tests.conftest import SMALL, TINY, draw
from tests.seen import shown
from tests.studies import LETTERS, PROMPT, TEXTS, Ran, small_model
from tests.test_study import run_main

LAYERS, HEADS, WIDTH, NEURONS = SMALL["n_layer"], SMALL["n_head"], 4 * SMALL["n_embd"], 2
ANSWER, FOIL = "x", "k"
PAIR = Answers(*LETTERS.encode(ANSWER + FOIL))
FAST = 1e-9
"""Relative and absolute: float64, and the sums of one run in another order."""
PLACES = list(itertools.product(range(LAYERS), range(HEADS)))


def begun(model: GPT2, **asked: Any) -> Start[AblationOptions]:
    options = AblationOptions(**{"neurons": NEURONS, "no_parity": True, "dtype": "float64", **asked})
    return Start(model, LETTERS, options, torch.device("cpu"))


@cache
def of_prompt(block: type[Block] = Block) -> Ran:
    """The study of a prompt, on the small model."""
    model = small_model() if block is Block else draw(GPT2Config(**SMALL), block=block)
    experiment = Ablation.from_options(begun(model, prompt=PROMPT, answer=ANSWER, foil=FOIL))
    study = run_prompt(experiment, model, LETTERS)
    return Ran(experiment, study, experiment.figures(study))


@pytest.fixture(scope="module")
def of_corpus(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The study of four texts, the means of which are those of the first two."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    experiment = Ablation.from_options(begun(small_model(), texts=folder / "texts.txt", window=16, reference=2))
    with ExitStack() as held:
        study = run_over_corpus(experiment, small_model(), LETTERS, folder / "out", Ranks(), held)
    assert study is not None
    return Ran(experiment, study, experiment.figures(study))


def table(ran: Ran, name: str, **at: Any) -> Table:
    return ran.study.tables[name].at(**at)


# Plain runs.


class Inside:
    """What a text's heads mix and its neurons do, computed by the model's own parts, one after the other."""

    def __init__(self, model: GPT2, text: str) -> None:
        streams, self.z, self.neurons = model.residuals(torch.tensor([LETTERS.encode(text)])), [], []
        for block, x in zip(model.blocks, streams, strict=False):
            read = block.attention_norm(x)
            self.z.append(block.attention.mix(read)[0])  # [position, head, head_width]
            u = x + block.attention(read)
            self.neurons.append(block.mlp.activation(block.mlp.expand(block.mlp_norm(u)))[0])  # [position, neuron]


def means_of(texts: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Of every layer, the mean over all positions of all texts: [head, head_width], and [neuron]."""
    inside = [Inside(small_model(), text) for text in texts]
    z = [torch.cat([of.z[layer] for of in inside]).mean(0) for layer in range(LAYERS)]
    return z, [torch.cat([of.neurons[layer] for of in inside]).mean(0) for layer in range(LAYERS)]


def logits_of(text: str, values: Mapping[str, Any]) -> Tensor:
    with torch.no_grad(), scaled(small_model(), values):
        return small_model()(torch.tensor([LETTERS.encode(text)]))[0]


def measured(text: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Loss change, kl and change of the logit difference of one run."""
    clean, run, following = logits_of(text, {}), logits_of(text, values), torch.tensor(LETTERS.encode(text))[1:]
    loss = F.cross_entropy(run[:-1], following) - F.cross_entropy(clean[:-1], following)
    kl = F.kl_div(run.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    change = (run - clean)[-1]
    return {LOSS: float(loss), KL: float(kl), LOGITS: float(change[PAIR.answer] - change[PAIR.foil])}


def without_head(layer: int, head: int, how: str, z: list[Tensor]) -> dict[str, Tensor]:
    site, scale = f"blocks.{layer}.attention.head", torch.ones(HEADS)
    scale[head] = 0
    if how == ZERO:
        return {f"{site}_scale": scale}
    shift = torch.zeros(HEADS, SMALL["n_embd"] // HEADS, dtype=torch.float64)
    shift[head] = z[layer][head]
    return {f"{site}_scale": scale, f"{site}_shift": shift}


def with_neuron(layer: int, neuron: int, means: list[Tensor], amount: float = 1.0) -> dict[str, Tensor]:
    """A neuron moved by a share of the way to its mean."""
    scale, shift = torch.ones(WIDTH).double(), torch.zeros(WIDTH).double()
    scale[neuron], shift[neuron] = 1 - amount, amount * means[layer][neuron]
    return {f"blocks.{layer}.mlp.neuron_scale": scale, f"blocks.{layer}.mlp.neuron_shift": shift}


def near(value: float) -> Any:
    return pytest.approx(value, rel=FAST, abs=FAST)


# Numbers of a prompt.


@pytest.mark.parametrize("how", [ZERO, MEAN])
def test_every_head_of_every_layer_is_that_of_a_run_of_its_own(how: str) -> None:
    z, _ = means_of((PROMPT,))
    for layer, head in PLACES:
        expected = measured(PROMPT, without_head(layer, head, how, z))
        for metric, value in expected.items():
            found = table(of_prompt(), "heads", metric=metric, ablation=how, layer=layer, head=head)
            assert float(found.value) == near(value), (metric, layer, head)


def test_all_heads_of_a_layer_at_zero_leave_the_bias_of_the_projection() -> None:
    for layer in range(LAYERS):
        bias = small_model().blocks[layer].attention.projection.bias
        site = f"blocks.{layer}.attention"
        expected = measured(PROMPT, {f"{site}_scale": 0.0, f"{site}_shift": bias})
        for metric, value in expected.items():
            assert float(table(of_prompt(), "layers", metric=metric, layer=layer).value) == near(value)


def test_every_neuron_is_that_of_a_run_of_its_own() -> None:
    _, means = means_of((PROMPT,))
    labels = of_prompt().study.tables["neurons"].axes["neuron"]
    assert len(labels) == LAYERS * 2 * NEURONS
    for of in labels:
        expected = measured(PROMPT, with_neuron(of.layer, of.neuron, means))
        for metric, value in expected.items():
            assert float(table(of_prompt(), "neurons", metric=metric, neuron=of).value) == near(value)


def test_an_estimate_is_the_slope_at_which_the_loss_leaves_its_clean_value() -> None:
    _, means = means_of((PROMPT,))
    step = 1e-4
    for of in of_prompt().study.tables["estimates"].axes["neuron"]:
        ahead, back = (
            measured(PROMPT, with_neuron(of.layer, of.neuron, means, amount))[LOSS] for amount in (step, -step)
        )
        found = float(table(of_prompt(), "estimates", neuron=of).value)
        assert found == pytest.approx((ahead - back) / (2 * step), rel=1e-4, abs=1e-8)


def test_the_clean_logit_difference_is_that_after_the_last_token() -> None:
    last = logits_of(PROMPT, {})[-1]
    assert float(of_prompt().study.tables["logit_difference"].value) == near(float(last[PAIR.answer] - last[PAIR.foil]))


# The reference and the choice.


def test_means_are_over_all_positions_of_all_texts() -> None:
    z, neurons = means_of(TEXTS)
    found = refer(small_model(), [LETTERS.encode(text) for text in TEXTS], 0)
    torch.testing.assert_close(found.heads, torch.stack(z))
    torch.testing.assert_close(found.units, torch.stack(neurons))
    assert (found.texts, found.positions) == (len(TEXTS), sum(map(len, TEXTS)))


def test_the_largest_estimates_of_a_layer_are_chosen_whatever_their_sign_and_others_are_drawn() -> None:
    estimated = torch.tensor([[0.1, -5.0, 0.2, 3.0, 0.0, 0.3], [9.0, 0.1, 0.1, 0.2, -0.3, 0.0]])
    found = [*ablation._choose(estimated, 2)]
    assert found[:2] == [Neuron(0, CHOSEN, 1), Neuron(0, CHOSEN, 3)]
    assert found[4:6] == [Neuron(1, CHOSEN, 0), Neuron(1, CHOSEN, 4)]
    for layer, chosen in ((0, {1, 3}), (1, {0, 4})):
        drawn = [of.neuron for of in found if of.layer == layer and of.choice == RANDOM]
        assert len(set(drawn)) == 2
        assert not set(drawn) & chosen
    assert found == [*ablation._choose(estimated, 2)], "the same ones every time"


def test_neurons_are_chosen_by_the_mean_of_the_estimates_over_the_reference() -> None:
    texts = [LETTERS.encode(text) for text in TEXTS]
    found = refer(small_model(), texts, NEURONS)
    every = torch.stack([ablation.estimates(small_model(), [text], found.units)[0] for text in texts]).mean(0)
    for layer in range(LAYERS):
        chosen = [of.neuron for of in found.neurons if of.layer == layer and of.choice == CHOSEN]
        assert chosen == every[layer].abs().argsort(descending=True)[:NEURONS].tolist()


def test_over_a_corpus_the_means_are_of_the_first_windows_and_stay_the_same(of_corpus: Ran) -> None:
    z, means = means_of(TEXTS[:2])
    for layer, head in PLACES:
        runs = [measured(text, without_head(layer, head, MEAN, z)) for text in TEXTS]
        for metric in (LOSS, KL):
            found = table(of_corpus, "heads", metric=metric, ablation=MEAN, layer=layer, head=head)
            assert float(found.value) == near(sum(run[metric] for run in runs) / len(TEXTS))
            assert float(found.low) <= float(found.value) <= float(found.high)
    of = of_corpus.study.tables["neurons"].axes["neuron"][-1]
    runs = [measured(text, with_neuron(of.layer, of.neuron, means)) for text in TEXTS]
    found = table(of_corpus, "neurons", metric=LOSS, neuron=of)
    assert float(found.value) == near(sum(run[LOSS] for run in runs) / len(TEXTS))


def test_the_means_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    one, two = (
        Ablation.from_options(begun(small_model(), texts=tmp_path / "texts.txt", reference=count)).settings
        for count in (1, 2)
    )
    assert (one.reference, two.reference) == (1, 2)
    assert one.means != two.means
    again = Ablation.from_options(begun(small_model(), texts=tmp_path / "texts.txt", reference=2)).settings
    assert again == two


# The oracles.


def error_when(broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> str:
    experiment = Ablation.from_options(begun(small_model(), prompt=PROMPT, neurons=0))
    broken(monkeypatch)
    with pytest.raises(parity.CheckError) as raised:
        run_prompt(experiment, small_model(), LETTERS)
    return str(raised.value)


def test_both_oracles_hold_to_rounding() -> None:
    checks = of_prompt().study.checked.checks
    assert len(checks) == 2
    assert all(check["passed"] and check["figure"] < 1e-12 for check in checks)


def test_a_dropped_bias_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = error_when(lambda patch: patch.setattr(ablation, "_bias", lambda *_: 0.0), monkeypatch)
    assert "bias alone, but the streams differ by" in said


def test_a_head_that_was_not_taken_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = ablation.silent
    said = error_when(
        lambda patch: patch.setattr(ablation, "silent", lambda layer, heads, n: silent(layer, [*heads][:1], n)),
        monkeypatch,
    )
    assert "bias alone" in said


@pytest.mark.parametrize("site", ["head", "neuron"])
def test_values_at_another_ones_place_are_noticed(monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    record = ablation.record

    def rolled(*given: Any) -> dict[str, Tensor]:
        return {name: of.roll(1, 2) if name.endswith(site) else of for name, of in record(*given).items()}

    said = error_when(lambda patch: patch.setattr(ablation, "record", rolled), monkeypatch)
    assert "own values change nothing, but" in said


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_ones_own_pass_the_oracles(block: type[Block]) -> None:
    assert all(check["passed"] for check in of_prompt(block).study.checked.checks)


# What is judged.


def test_tests_of_a_text_are_what_they_are_called() -> None:
    zero, mean = torch.arange(1.0, 13.0).view(4, 3), torch.full((4, 3), 0.5)
    mean[0], mean[2, 1], mean[3, 2] = (
        3.0,
        20.0,
        30.0,
    )  # those at 3 are not cheaper, nor are 20 beside 8 and 30 beside 12
    neurons = [Neuron(0, CHOSEN, 5), Neuron(0, RANDOM, 1), Neuron(1, CHOSEN, 2), Neuron(1, RANDOM, 0)]
    changes, estimated = torch.tensor([[4.0, -1.0, -8.0, 0.5]]), torch.tensor([[3.0, 1.0, -9.0, 0.0]])
    found = ablation._tests(torch.stack([zero, mean])[None], changes, estimated, neurons)[0]
    cheaper = sum(float(m) < float(z) for m, z in zip(mean.flatten(), zero.flatten(), strict=True)) / 12
    assert float(found[0]) == cheaper == 7 / 12
    assert float(found[1]) == pytest.approx(50 / float(mean.sum())), "a tenth of 12 heads are 2"
    assert float(found[2]) == pytest.approx(math.log(6 / 0.75))
    expected = torch.corrcoef(torch.cat([changes, estimated]))[0, 1]
    assert float(found[3]) == pytest.approx(float(expected))


def judged_at(test: int, value: float, low: float, high: float) -> str:
    ends = {"low": torch.tensor(low), "high": torch.tensor(high)}
    return ablation.DECIDE[ablation.TESTS[test]](Table({}, torch.tensor(value), ends)).verdict


@pytest.mark.parametrize(("test", "threshold"), [(0, 0.5), (1, 0.5), (2, math.log(2)), (3, math.sqrt(0.5))])
def test_every_claim_can_come_out_either_way(test: int, threshold: float) -> None:
    assert judged_at(test, threshold + 0.1, threshold + 0.01, threshold + 0.2) == "holds"
    assert judged_at(test, threshold - 0.1, threshold - 0.2, threshold - 0.01) == "does not hold"
    assert judged_at(test, threshold, threshold - 0.01, threshold + 0.01) == "undecided"
    assert judged_at(test, math.nan, math.nan, math.nan) == "undecided"


def test_verdicts_rest_on_the_tests_of_their_claim() -> None:
    ran = of_prompt()
    verdicts, tests = ran.experiment.verdicts(ran.study), ran.study.tables["tests"]
    assert [of.claim for of in verdicts] == list(ablation.CLAIMS)
    names = ("share_of_heads", "share_of_kl", "ratio", "correlation")
    for verdict, test, name in zip(verdicts, ablation.TESTS, names, strict=True):
        value = float(tests.at(test=test).value)
        assert verdict.figures[name] == near(math.exp(value) if name == "ratio" else value)
        assert f"{verdict.figures[name]:.3g}" in verdict.evidence


def test_without_neurons_only_heads_are_asked() -> None:
    experiment = Ablation.from_options(begun(small_model(), prompt=PROMPT, neurons=0))
    study = run_prompt(experiment, small_model(), LETTERS)
    assert set(study.tables) == {"heads", "layers", "tests"}
    assert [of.claim for of in experiment.verdicts(study)] == list(ablation.CLAIMS[:2])
    assert [of.name for of in experiment.figures(study).figures] == [LOSS, KL, "top"]


# What is asked.


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"neurons": -1}, "--neurons is -1; a layer has 144 neurons"),
        ({"neurons": 73}, "expected 0 to 72"),
        ({"answer": "x"}, "--answer was given without --foil"),
        ({"foil": "x"}, "--foil was given without --answer"),
        ({"answer": "xy", "foil": "k"}, "--answer 'xy' is 2 tokens (x | y); give one token"),
        ({"answer": "x", "foil": ""}, "--foil '' is 0 tokens"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "abcdefghijklmnopqrstuvwxyz"}, "26 tokens; the model has 24 positions"),
    ],
)
def test_a_mistake_is_a_sentence(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^[-A-Z]") as raised:
        Ablation.from_options(begun(small_model(), **{"prompt": PROMPT, **asked}))
    assert said in str(raised.value)


def test_mistakes_over_a_corpus_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    start = partial(begun, small_model(), texts=tmp_path / "texts.txt")
    with pytest.raises(ValueError, match="--reference is 0; expected 1 window or more"):
        Ablation.from_options(start(reference=0))
    with pytest.raises(ValueError, match="belong to a prompt"):
        Ablation.from_options(start(answer="x", foil="k"))
    (tmp_path / "texts.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 2)
    too_long = Ablation.from_options(start(window=40))
    with ExitStack() as held, pytest.raises(ValueError, match="--window is longer than the model's 24 positions"):
        run_over_corpus(too_long, small_model(), LETTERS, tmp_path / "out", Ranks(), held)


# What a person sees.


def test_rows_name_every_number_once() -> None:
    ran = of_prompt()
    rows = [*ran.experiment.rows(ran.study)]
    keys = [
        tuple(row.get(name) for name in ("metric", "ablation", "layer", "head", "choice", "neuron")) for row in rows
    ]
    assert (
        len(set(keys)) == len(keys) == 3 * (2 * len(PLACES) + LAYERS + 2 * NEURONS * LAYERS) + 2 * NEURONS * LAYERS + 4
    )
    for row in rows:
        if row["metric"] == KL and row.get("head") == 1:
            at = {name: row[name] for name in ("metric", "ablation", "layer", "head")}
            assert row["value"] == float(table(ran, "heads", **at).value)


def test_the_terminal_names_the_heads_with_the_most_kl_first() -> None:
    ran = of_prompt()
    lines = [*ran.experiment.lines(ran.study, 100)]
    kl = {at: float(table(ran, "heads", metric=KL, ablation=MEAN, layer=at[0], head=at[1]).value) for at in PLACES}
    order = sorted(PLACES, key=lambda at: -kl[at])
    shown = [line for line in lines if "head " in line and "block" in line]
    assert len(shown) == min(ablation.SHOWN, len(PLACES))
    for line, (layer, head) in zip(shown, order, strict=False):
        named, *numbers = line.strip().split("  ", 1)
        assert named == f"block {layer}, head {head}"
        expected = [
            float(table(ran, "heads", metric=metric, ablation=how, layer=layer, head=head).value)
            for metric in (LOSS, KL, LOGITS)
            for how in (ZERO, MEAN)
        ]
        assert [float(number) for number in numbers[0].split()] == [float(f"{of:.4g}") for of in expected]
    (clean,) = (line for line in lines if "less that of" in line)
    assert clean.endswith(f"{float(ran.study.tables['logit_difference'].value):.3g}")


def test_the_terminal_says_what_neurons_come_to() -> None:
    ran = of_prompt()
    lines = [*ran.experiment.lines(ran.study, 100)]
    for choice in (CHOSEN, RANDOM):
        labels = [of for of in ran.study.tables["neurons"].axes["neuron"] if of.choice == choice]
        real = {of: float(table(ran, "neurons", metric=LOSS, neuron=of).value) for of in labels}
        estimated = [abs(float(table(ran, "estimates", neuron=of).value)) for of in labels]
        sizes = [sum(map(abs, real.values())) / len(real), sum(estimated) / len(estimated)]
        most = max(real, key=lambda of: abs(real[of]))
        (line,) = (line for line in lines if line.strip().startswith(choice))
        assert line.split()[1:4] == [str(len(labels)), *(f"{of:.3g}" for of in sizes)]
        assert line.endswith(f"block {most.layer}, neuron {most.neuron}: {real[most]:.3g}")


@pytest.mark.parametrize(("metric", "how"), [*itertools.product((LOSS, KL, LOGITS), (ZERO, MEAN))])
def test_the_maps_show_every_head_where_it_is(metric: str, how: str) -> None:
    ran = of_prompt()
    cells = shown(ran.figures, metric, ablation=how).cells()
    expected = {
        (f"block {layer}", str(head)): float(
            table(ran, "heads", metric=metric, ablation=how, layer=layer, head=head).value
        )
        for layer, head in PLACES
    }
    assert cells == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_page_and_terminal_say_what_the_means_are_of(of_corpus: Ran) -> None:
    said = f"means over {len(TEXTS[0]) + len(TEXTS[1])} positions of 2 texts"
    assert of_corpus.figures.controls[0].label == f"set to ({said})"
    assert said in of_corpus.experiment.lines(of_corpus.study, 100)


def test_the_bars_show_the_heads_that_matter_most_with_their_intervals(of_corpus: Ran) -> None:
    for ran in (of_prompt(), of_corpus):
        chart = shown(ran.figures, "top")
        expected = {
            (f"block {layer}, head {head}", how): float(
                table(ran, "heads", metric=KL, ablation=how, layer=layer, head=head).value
            )
            for layer, head in ablation.top_heads(ran.study.tables["heads"])
            for how in (ZERO, MEAN)
        }
        assert chart.bars() == pytest.approx(expected, rel=1e-3, abs=1e-4 * chart.y.reach)
    rows = {(row["place"], row["part"]): row for row in of_corpus.figures.data["top"]}
    for layer, head in ablation.top_heads(of_corpus.study.tables["heads"]):
        of = table(of_corpus, "heads", metric=KL, ablation=MEAN, layer=layer, head=head)
        row = rows[f"block {layer}, head {head}", MEAN]
        assert (row["low"], row["high"]) == pytest.approx((float(of.low), float(of.high)), rel=1e-4)


def test_the_points_lie_at_estimate_and_real_change(of_corpus: Ran) -> None:
    for ran in (of_prompt(), of_corpus):
        chart = shown(ran.figures, "neurons")
        names = {colour: word for word, colour in chart.legend.items()}
        found = {}
        for mark in chart.of("symbol"):
            said = mark.said
            of = Neuron(int(said["layer"]), said["part"], int(said["neuron"]))
            assert names[mark.colour] == of.choice
            found[of] = (chart.x.number(float(mark.item["x"])), chart.y.number(float(mark.item["y"])))
        assert set(found) == set(ran.study.tables["neurons"].axes["neuron"])
        for of, (estimate, real) in found.items():
            assert estimate == pytest.approx(float(table(ran, "estimates", neuron=of).value), abs=1e-3 * chart.x.reach)
            expected = float(table(ran, "neurons", metric=LOSS, neuron=of).value)
            assert real == pytest.approx(expected, abs=1e-3 * chart.y.reach)


# As a person runs it.


def test_a_run_of_tiny_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, tiny: GPT2
) -> None:
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    prompt, folder = "The king took off his crown, and", tmp_path / "out"
    asked = (
        "--model",
        TINY,
        "--prompt",
        prompt,
        "--neurons",
        1,
        "--answer",
        " he",
        "--foil",
        " she",
        "--output",
        folder,
    )
    code, out, err = run_main(ablation.main, monkeypatch, capfd, *asked)
    assert (code, err) == (0, "")
    summary = json.loads((folder / "summary.json").read_text())
    tokenizer = Tokenizer.from_pretrained(TINY)
    ids = tokenizer.encode(prompt)
    assert summary["reference"]["positions"] == len(ids)
    assert summary["settings"]["means"] == summary["reference"]["sha256"]
    assert [check["passed"] for check in summary["checks"]] == [True, True]
    with (folder / "ablation.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    (row,) = (
        row for row in rows if (row["metric"], row["ablation"], row["layer"], row["head"]) == (LOGITS, ZERO, "3", "2")
    )
    scale = torch.tensor([1.0, 1.0, 0.0])
    with torch.no_grad():
        clean = tiny(torch.tensor([ids]))[0, -1]
        with scaled(tiny, {"blocks.3.attention.head_scale": scale}):
            run = tiny(torch.tensor([ids]))[0, -1]
    he, she = (tokenizer.encode(word)[0] for word in (" he", " she"))
    assert float(row["value"]) == pytest.approx(float((run - clean)[he] - (run - clean)[she]), abs=1e-4)
    assert f"logit of ' he' less that of ' she': {float(clean[he] - clean[she]):.3g}" in out


def test_one_pass_gives_what_many_give() -> None:
    ran = of_prompt()
    experiment = Ablation(
        replace(ran.experiment.settings, max_bytes=600_000), ran.experiment.reference, ran.experiment.pair
    )
    again = run_prompt(experiment, small_model(), LETTERS)
    for name, of in ran.study.tables.items():
        torch.testing.assert_close(again.tables[name].value, of.value, rtol=1e-8, atol=1e-10)
