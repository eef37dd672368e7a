"""Steering: every number beside a plain loop of runs, and the oracle beside runs that go wrong."""

import csv
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import steering
from experiments.behaviour import end_of_text
from experiments.harness import writing
from experiments.harness.experiment import Study
from experiments.harness.running import run_prompt
from experiments.harness.table import Table
from experiments.steering import (
    KINDS,
    NAMES,
    Contrast,
    Directions,
    Pair,
    Plan,
    Response,
    Steering,
    SteeringSettings,
    check_plan,
    check_runs,
    encoded,
    respond,
    tokens_of,
)
from minigpt import GPT2, GPT2Config, Tokenizer, compare, parity, scaled
from tests.conftest import SMALL, TINY, draw
from tests.seen import shown
from tests.test_study import run_main

Run = Callable[..., tuple[int, str, str]]
LAYERS, DOSES = (2, 0), (0.5, 1.0, 3.0)
PROMPT = "The old gentleman sat down by the fire."
CONTRAST = Contrast(
    (Pair("The girl said that", "The boy said"), Pair("Mary knew", "John knew very well")),
    (Pair("The queen said that", "The king said that"), Pair("My aunt knew", "My uncle knew very")),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def random_model(tokenizer: Tokenizer) -> GPT2:
    """A small random model of the tokenizer's vocabulary, float64."""
    fields = {**SMALL, "vocab_size": tokenizer.vocab_size, "n_positions": 64, "eos_token_id": tokenizer.vocab_size - 1}
    return draw(GPT2Config(**fields))


@pytest.fixture(scope="module")
def plan(random_model: GPT2, tokenizer: Tokenizer) -> Plan:
    return Plan(Directions.of(random_model, tokenizer, CONTRAST, LAYERS), DOSES)


@pytest.fixture(scope="module")
def experiment(random_model: GPT2, tokenizer: Tokenizer) -> Steering:
    settings = SteeringSettings(model="small", prompt=PROMPT, parity=False, layers=LAYERS, doses=DOSES)
    return Steering.of(random_model, tokenizer, settings, CONTRAST)


@pytest.fixture(scope="module")
def study(experiment: Steering, random_model: GPT2, tokenizer: Tokenizer) -> Study[Any]:
    return run_prompt(experiment, random_model, tokenizer)


@torch.no_grad()
def ends(model: GPT2, tokenizer: Tokenizer, text: str, depth: int) -> Tensor:
    """The stream of a text that runs by itself, at its last position."""
    ids = torch.tensor([[*end_of_text(model), *tokenizer.encode(text)]])
    return model.residuals(ids)[depth, 0, -1].double()


def steer(layer: int, vector: Tensor, length: int, everywhere: bool = False) -> dict[str, Tensor]:
    """A vector at every position but the first."""
    shift = torch.zeros(1, length, len(vector), dtype=vector.dtype)
    shift[:, 0 if everywhere else 1 :] = vector
    return {f"blocks.{layer}.output_shift": shift}


def runs_of(plan: Plan) -> list[tuple[int, int, int, Tensor]]:
    """The indices of layer, vector and dose, and what is added, of every run, in a plain loop."""
    vectors = plan.directions.vectors
    indices = itertools.product(range(len(plan.directions.layers)), range(len(NAMES)), range(len(plan.doses)))
    return [(layer, name, dose, plan.doses[dose] * vectors[layer, name]) for layer, name, dose in indices]


# What a direction is made from.


def test_no_held_apart_subject_or_text_makes_the_built_in_direction() -> None:
    contrast = Contrast.built_in()
    assert (len(contrast.made_from), len(contrast.held_apart)) == (9 * 5, 5 * 4)
    parts = [set(), set()]  # type: list[set[str]]
    for subjects, pairs in zip(parts, (contrast.made_from, contrast.held_apart), strict=True):
        for positive, negative in pairs:
            texts = [text for text in steering.PRONOUN_TEXTS if negative.endswith(text.removeprefix("{}"))]
            assert len(texts) == 1
            his, hers = (of.removesuffix(texts[0].removeprefix("{}")) for of in (negative, positive))
            assert (his, hers) in steering.SUBJECTS
            subjects |= {his, hers, texts[0]}
    assert not parts[0] & parts[1]


def test_every_fourth_pair_of_a_file_is_held_apart(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps({"negative": f"n{i}", "positive": f"p{i}", "more": 1}) for i in range(9)))
    contrast = Contrast.read(path)
    assert contrast.held_apart == (Pair("p3", "n3"), Pair("p7", "n7"))
    assert contrast.made_from == tuple(Pair(f"p{i}", f"n{i}") for i in (0, 1, 2, 4, 5, 6, 8))


@pytest.mark.parametrize("at_once", [1, 64])
def test_a_direction_is_the_mean_difference_at_the_last_position_after_the_block(
    random_model: GPT2, tokenizer: Tokenizer, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "TEXTS_AT_ONCE", at_once)
    found = Directions.of(random_model, tokenizer, CONTRAST, LAYERS)
    for index, layer in enumerate(LAYERS):
        pairs = [[ends(random_model, tokenizer, text, layer + 1) for text in pair] for pair in CONTRAST.made_from]
        expected = sum(positive - negative for positive, negative in pairs) / len(pairs)
        torch.testing.assert_close(found.vectors[index, 0], expected)
        norms = [float(stream.norm()) for pair in pairs for stream in pair]
        assert float(found.stream[index]) == pytest.approx(sum(norms) / len(norms))
        assert float(found.norms[index]) == pytest.approx(float(expected.norm()))


def test_the_vectors_of_a_layer_are_equally_long_and_the_random_ones_its_own(
    plan: Plan, random_model: GPT2, tokenizer: Tokenizer
) -> None:
    vectors = plan.directions.vectors
    assert vectors.shape == (2, 5, 36)
    torch.testing.assert_close(vectors.norm(dim=-1), vectors.norm(dim=-1)[:, :1].expand(-1, 5))
    assert torch.equal(vectors[:, 1], -vectors[:, 0])
    unit = F.normalize(vectors[:, 2:].flatten(0, 1), dim=-1)
    assert float((unit @ unit.T - torch.eye(6)).abs().max()) < 0.6, "six directions, all different"
    alone = Directions.of(random_model, tokenizer, CONTRAST, (0,)).vectors
    assert torch.equal(alone[0, 2:], vectors[1, 2:]), "whichever other layers are asked for"


# The numbers.


@torch.no_grad()
def test_the_answer_changes_as_in_a_plain_loop_of_scaled_runs(
    random_model: GPT2, tokenizer: Tokenizer, plan: Plan
) -> None:
    answers, foils = ([tokenizer.encode(word)[0] for word in words] for words in ((" she", " her", " said"), (" he",)))

    def answer(text: str, values: dict[str, Tensor]) -> float:
        ids = torch.tensor([[*end_of_text(random_model), *tokenizer.encode(text)]])
        with scaled(random_model, values):
            logits = random_model(ids)[0, -1]
        return float(logits[answers].mean() - logits[foils].mean())

    positive, negative = (encoded(random_model, tokenizer, texts) for texts in zip(*CONTRAST.held_apart, strict=True))
    found = respond(random_model, (negative, positive), (answers, foils), plan)
    assert found.change.shape == (2, 3, 4, 2)
    for prompt, pair in enumerate(CONTRAST.held_apart):
        clean = answer(pair.negative, {})
        assert float(found.clean[prompt]) == pytest.approx(clean, abs=1e-9)
        assert float(found.swapped[prompt]) == pytest.approx(answer(pair.positive, {}) - clean, abs=1e-9)
        expected = torch.zeros(2, len(NAMES), 4)
        for layer, name, dose, vector in runs_of(plan):
            values = steer(LAYERS[layer], vector, len(negative[prompt]))
            expected[layer, name, 1 + dose] = answer(pair.negative, values) - clean
        torch.testing.assert_close(found.change[:, :2, :, prompt].float(), expected[:, :2], rtol=1e-5, atol=1e-6)
        random = expected[:, 2:].square().mean(1).sqrt()
        torch.testing.assert_close(found.change[:, 2, :, prompt].float(), random, rtol=1e-5, atol=1e-6)
        assert len(expected.flatten().unique()) == 2 * 5 * 3 + 1, "every run does something else"


@torch.no_grad()
def test_the_cost_is_that_of_a_plain_loop_of_scaled_runs(
    random_model: GPT2, tokenizer: Tokenizer, plan: Plan, study: Study[Any]
) -> None:
    ids = torch.tensor([tokenizer.encode(PROMPT)])

    def predicted(values: dict[str, Tensor]) -> Tensor:
        with scaled(random_model, values):
            return random_model(ids)[0, 1:].log_softmax(-1)

    clean, expected = predicted({}), torch.zeros(2, 2, len(NAMES), 4, dtype=torch.float64)
    for layer, name, dose, vector in runs_of(plan):
        steered = predicted(steer(LAYERS[layer], vector, ids.shape[1]))
        loss = F.nll_loss(steered[:-1], ids[0, 2:]) - F.nll_loss(clean[:-1], ids[0, 2:])
        expected[0, layer, name, 1 + dose] = loss
        expected[1, layer, name, 1 + dose] = (clean.exp() * (clean - steered)).sum(-1).mean()
    table = study.tables["cost"]
    assert [list(axis) for axis in table.axes.values()] == [
        ["loss_change", "kl"],
        [2, 0],
        [*KINDS],
        [0, *DOSES],
    ]
    torch.testing.assert_close(table.value[:, :, :2], expected[:, :, :2])
    torch.testing.assert_close(table.value[:, :, 2], expected[:, :, 2:].mean(2))


def test_the_tables_over_prompts_are_named_as_their_numbers_lie(experiment: Steering) -> None:
    response, alone = (
        Response(torch.tensor([-1.0, -3.0]), torch.randn(2, 3, 4, 2).double(), torch.tensor([2.0, 3.0])),
        experiment,
    )
    found = Steering(alone.settings, alone.plan, response, CONTRAST)
    for (i, layer), (j, added), (k, dose) in itertools.product(
        enumerate(LAYERS), enumerate(KINDS), enumerate((0.0, *DOSES))
    ):
        value = found.change.at(layer=layer, added=added, dose=dose).value
        assert float(value) == pytest.approx(float(response.change[i, j, k].mean()))
    change = response.change
    for (i, layer), (k, dose) in itertools.product(enumerate(LAYERS), enumerate(DOSES)):
        at = {"layer": layer, "dose": dose}
        assert float(found.answer.at(**at).value) == pytest.approx(-2 + float(change[i, 0, k + 1].mean()))
        step = change[i, 0, k + 1] - change[i, 0, k]
        assert float(found.steps.at(**at).value) == pytest.approx(float(step.mean()))
        margin = change[i, 0, k + 1] - 3 * change[i, 2, k + 1]
        assert float(found.margin.at(**at).value) == pytest.approx(float(margin.mean()))
    assert float(found.swapped.value) == 2.5


def test_an_interval_over_prompts_is_that_of_their_mean() -> None:
    values = torch.stack([torch.arange(40.0), torch.ones(40)])
    found = steering.over_prompts(values, layer=["a", "b"])
    assert found.value.tolist() == [19.5, 1.0]
    width = float(found.high[0] - found.low[0])
    assert width == pytest.approx(2 * 1.96 * float(torch.arange(40.0).std(correction=0)) / math.sqrt(40), rel=0.1)
    assert (float(found.low[1]), float(found.high[1])) == pytest.approx((1, 1))


# The oracle.


def compared(model: GPT2, plan: Plan, ids: Tensor) -> Any:
    return compare(model, ids, plan.interventions(model, ids.shape[1]), predictions=True)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_run_is_what_it_says(random_model: GPT2, plan: Plan, everywhere: bool, dtype: torch.dtype) -> None:
    model, ids = draw(random_model.config, dtype=dtype), torch.arange(14).reshape(2, 7)
    chosen = replace(plan, everywhere=everywhere)
    assert len(check_plan(model, chosen, ids)) == 2
    raw = compared(model, chosen, ids)
    assert check_runs(chosen, raw, dtype) < 2 * torch.finfo(dtype).eps * float(raw.statistics.run_sq.max().sqrt())
    at_first = raw.statistics.difference_sq[:, :, :, 0].amax((1, 2))
    assert bool((at_first > 0).all()) == everywhere
    assert bool((at_first == 0).all()) != everywhere


def half(plan: Plan, model: GPT2, layer: int, vector: Tensor, length: int) -> dict[str, Tensor]:
    return SHIFT(plan, model, layer, vector / 2, length)


def elsewhere(plan: Plan, model: GPT2, layer: int, vector: Tensor, length: int) -> dict[str, Tensor]:
    return SHIFT(plan, model, layer + 1, vector, length)


def earlier(plan: Plan, model: GPT2, layer: int, vector: Tensor, length: int) -> dict[str, Tensor]:
    return SHIFT(plan, model, max(0, layer - 1), vector, length)


def at_the_first(plan: Plan, model: GPT2, layer: int, vector: Tensor, length: int) -> dict[str, Tensor]:
    return SHIFT(replace(plan, everywhere=True), model, layer, vector, length)


def not_at_the_last(plan: Plan, model: GPT2, layer: int, vector: Tensor, length: int) -> dict[str, Tensor]:
    ((name, shift),) = SHIFT(plan, model, layer, vector, length).items()
    return {name: torch.cat([shift[:, :-1], torch.zeros_like(shift[:, -1:])], 1)}


SHIFT = Plan.shift


@pytest.mark.parametrize("wrong", [half, elsewhere, earlier, at_the_first, not_at_the_last])
def test_a_run_that_adds_something_else_is_refused(
    random_model: GPT2, plan: Plan, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(14).reshape(2, 7)
    monkeypatch.setattr(Plan, "shift", wrong)
    with pytest.raises(parity.CheckError, match="a steered stream differs from the clean one"):
        check_runs(plan, compared(random_model, plan, ids), torch.float64)
    with pytest.raises(parity.CheckError, match="the stream steered by 'direction' is not the clean one plus"):
        check_plan(random_model, plan, ids)


def test_a_direction_that_is_turned_round_and_a_dose_0_that_adds_something_are_refused(
    random_model: GPT2, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(14).reshape(2, 7)
    monkeypatch.setattr(Plan, "shift", lambda *given: SHIFT(*given[:3], -given[3], given[4]))
    with pytest.raises(parity.CheckError, match="steered by 'direction' is not"):
        check_plan(random_model, plan, ids)
    monkeypatch.setattr(Plan, "shift", lambda *given: SHIFT(*given[:3], given[3] + 1e-9, given[4]))
    with pytest.raises(parity.CheckError, match="dose 0 after block 2 changes the logits"):
        check_plan(random_model, plan, ids)


def test_a_vector_of_zeros_changes_no_sign_of_a_zero(random_model: GPT2, plan: Plan) -> None:
    ((_, shift),) = plan.shift(random_model, 1, torch.zeros(36), 3).items()
    assert bool((shift == 0).all())
    assert bool(shift.signbit().all())


# Verdicts.


def judged(experiment: Steering, change: Tensor, clean: Tensor, costs: Any = (0.1,), doses: Any = DOSES) -> list[Any]:
    """The verdicts on answers [kind, dose, prompt] at a single layer; `costs` are mean, and the interval's ends."""
    settings = replace(experiment.settings, layers=(2,), doses=doses)
    directions = replace(experiment.plan.directions, layers=(2,), vectors=experiment.plan.directions.vectors[:1])
    of = Steering(
        settings, replace(experiment.plan, directions=directions, doses=doses), Response(clean, change[None], clean),
        CONTRAST,
    )  # fmt: skip
    axes = {"metric": steering.COSTS, "layer": [2], "added": KINDS, "dose": [0.0, *doses]}
    whole = [torch.full((2, 1, 3, 1 + len(doses)), float(cost)) for cost in costs]
    spread = dict(zip(("low", "high"), whole[1:], strict=True)) if len(whole) > 1 else {}
    fake: Any = type("", (), {"tables": {"cost": Table(axes, whole[0], spread)}, "basis": "one prompt"})
    return of.verdicts(fake)


def steered(direction: Any, opposite: Any, random: Any, prompts: int = 20) -> Tensor:
    """[kind, dose, prompt], every prompt alike, dose 0 first."""
    return torch.tensor([[0.0, *direction], [0.0, *opposite], [0.0, *random]])[..., None].repeat(1, 1, prompts)


@pytest.mark.parametrize(
    ("direction", "opposite", "random", "expected"),
    [
        ((1, 2, 3), (-1, -2, -3), (0.3, 0.6, 0.9), ["holds"] * 3),
        ((1, 2, 1.9), (-1, -2, -3), (0.3, 0.6, 0.6), ["does not hold", "holds", "holds"]),
        ((1, 2, 3), (-1, -2, 0.1), (0.3, 0.6, 0.9), ["holds", "holds", "does not hold"]),
        ((1, 2, 3), (-1, -2, -3), (0.3, 0.7, 0.9), ["holds", "does not hold", "holds"]),
        ((-1, -2, -3), (1, 2, 3), (0, 0, 0), ["does not hold"] * 3),
    ],
)
def test_answers_that_are_sure_decide(
    experiment: Steering, direction: Any, opposite: Any, random: Any, expected: list[str]
) -> None:
    found = judged(experiment, steered(direction, opposite, random), torch.full((20,), -9.0))
    assert [verdict.verdict for verdict in found[:3]] == expected
    assert {verdict.layer for verdict in found} == {2}
    shown = ", ".join(f"{value:.3g}" for value in direction)
    assert f"At doses 0.5, 1, 3 it moves by {shown} logits" in found[0].evidence


def test_an_answer_that_differs_between_prompts_is_undecided(experiment: Steering) -> None:
    change = steered((1, 2, 3), (-1, -2, -3), (0.3, 0.6, 0.9), 40)
    change[0, 3, ::2] = -1.1  # the mean moves less than 0.1 beyond the dose before
    change[0, 3, 1::2] = 5.2
    found = judged(experiment, change, torch.full((40,), -9.0))
    assert [verdict.verdict for verdict in found[:2]] == ["undecided", "undecided"]
    assert "grows up to dose 1." in found[0].evidence


def test_doses_beyond_four_decide_nothing_and_too_few_prompts_neither(experiment: Steering) -> None:
    change, clean = steered((1, 2, 1), (-1, -2, 1), (0.3, 0.6, 9)), torch.full((20,), -9.0)
    beyond = judged(experiment, change, clean, doses=(1.0, 4.0, 4.5))
    assert [verdict.verdict for verdict in beyond[:3]] == ["holds"] * 3
    assert "grows up to dose 4." in beyond[0].evidence
    none = judged(experiment, change, clean, doses=(5.0, 6.0, 7.0))
    assert [verdict.verdict for verdict in none[:3]] == ["undecided"] * 3
    few = judged(experiment, change[..., :19], clean[:19], doses=(1.0, 4.0, 4.5))
    assert {verdict.verdict for verdict in few} == {"undecided"}
    assert "An interval over 19 prompts is too narrow" in few[0].sentence


@pytest.mark.parametrize(
    ("clean", "costs", "expected", "said"),
    [
        (-1.5, (0.4,), "holds", "Dose 1 turns the answer; there the text's loss rises by 0.4 nats"),
        (-1.5, (0.6,), "does not hold", "rises by 0.6 nats"),
        (-1.5, (0.4, 0.3, 0.6), "undecided", "rises by 0.4 (0.3 to 0.6) nats"),
        (-2.5, (0.4,), "holds", "Dose 3 turns"),
        (-3.5, (0.4,), "does not hold", "at no dose surely above 0"),
        (0.5, (0.4,), "undecided", "not surely below 0"),
    ],
)
def test_the_cost_counts_at_the_first_dose_that_turns_the_answer(
    experiment: Steering, clean: float, costs: Any, expected: str, said: str
) -> None:
    change = steered((1, 2, 3), (-1, -2, -3), (0.3, 0.6, 0.9))
    verdict = judged(experiment, change, torch.full((20,), clean), costs)[3]
    assert verdict.verdict == expected
    assert said in verdict.evidence


# What a person sees.


def test_every_number_of_the_charts_is_one_of_the_tables(experiment: Steering, study: Study[Any]) -> None:
    figures = experiment.figures(study)
    layers = ["block 2", "block 0"]
    assert [value for value, _ in figures.controls[0].options] == layers
    for layer, name in zip(LAYERS, layers, strict=True):
        for figure, table in (("response", experiment.change), ("loss_change", study.tables["cost"]),
                              ("kl", study.tables["cost"])):  # fmt: skip
            chart = shown(figures, figure, layer=name)
            wanted = table.at(layer=layer) if figure == "response" else table.at(layer=layer, metric=figure)
            assert list(chart.legend) == list(KINDS)
            points = {(mark.said["part"], float(mark.said["dose"])): mark for mark in chart.of("symbol")}
            assert len(points) == 3 * 4
            for added, dose in itertools.product(KINDS, (0.0, *DOSES)):
                mark = points[added, dose]
                value = float(wanted.at(added=added, dose=dose).value)
                near = 2e-3 * chart.y.reach
                assert chart.y.number(mark.middle) == pytest.approx(value, rel=1e-3, abs=near)
                assert chart.x.number(float(mark.item["x"])) == pytest.approx(dose, abs=1e-3)
                assert mark.colour == chart.legend[added]
        chart = shown(figures, "against", layer=name)
        points = {(mark.said["part"], float(mark.said["dose"])): mark for mark in chart.of("symbol")}
        assert len(points) == 3 * 4
        for added, dose in itertools.product(KINDS, (0.0, *DOSES)):
            mark, at = points[added, dose], {"layer": layer, "added": added, "dose": dose}
            cost = float(study.tables["cost"].at(metric="loss_change", **at).value)
            value = float(experiment.change.at(**at).value)
            assert chart.x.number(float(mark.item["x"])) == pytest.approx(cost, rel=1e-3, abs=2e-3 * chart.x.reach)
            assert chart.y.number(mark.middle) == pytest.approx(value, rel=1e-3, abs=2e-3 * chart.y.reach)
    cells = shown(figures, "layers").cells()
    for (layer, name), dose in itertools.product(zip(LAYERS, layers, strict=True), (0.0, *DOSES)):
        value = float(experiment.change.at(layer=layer, added="direction", dose=dose).value)
        assert cells[name, f"{dose:g}"] == pytest.approx(value, rel=1e-3, abs=1e-6)


def test_the_band_and_the_dashed_line_are_the_interval_and_the_other_text(
    experiment: Steering, study: Study[Any]
) -> None:
    chart = shown(experiment.figures(study), "response", layer="block 0")
    dashed = [rule for rule in chart.of("rule") if "strokeDash" in rule.item]
    assert len(dashed) == 1
    swapped = float(experiment.swapped.value)
    assert chart.y.number(dashed[0].top) == pytest.approx(swapped, abs=2e-3 * chart.y.reach)
    band = [mark for mark in chart.of("area") if mark.colour == chart.legend["direction"]]
    table = experiment.change.at(layer=0, added="direction")
    found = [(chart.y.number(mark.top), chart.y.number(mark.bottom)) for mark in band]
    for (one, other), low, high in zip(found, table.low.tolist(), table.high.tolist(), strict=True):
        assert sorted((one, other)) == pytest.approx([low, high], abs=2e-3 * chart.y.reach)


def write_pairs(path: Path) -> Path:
    pairs = [*CONTRAST.made_from, Pair("Emma said", "Richard said"), CONTRAST.held_apart[0]]
    path.write_text("\n".join(json.dumps(pair._asdict()) for pair in pairs))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Steer weights/tiny, without figures and report."""
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    arguments = ("--model", TINY, "--output", tmp_path / "out", "--no-parity", "--layers", "7,3", "--doses", "2,1")
    return lambda *more: run_main(steering.main, monkeypatch, capfd, *arguments, *more)


def rows_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "steering.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_terminal_and_summary_say_the_same(run: Run, tmp_path: Path, tiny: GPT2, tokenizer: Tokenizer) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl")
    code, out, err = run("--contrast", path, "--answers", " she, her", "--foils", " he", "--prompt", PROMPT)
    assert (code, err) == (0, "")
    contrast = Contrast.read(path)
    directions = Directions.of(tiny, tokenizer, contrast, (7, 3))
    (prompt,) = encoded(tiny, tokenizer, [contrast.held_apart[0].negative])
    (she,), (her,), (he,) = (tokenizer.encode(word) for word in (" she", " her", " he"))
    vector = 2 * directions.vectors[1, 0].float()
    found = []
    for values in ({}, steer(3, vector, len(prompt))):
        with torch.no_grad(), scaled(tiny, values):
            logits = tiny(torch.tensor([prompt]))[0, -1].double()
        found.append(float((logits[she] + logits[her]) / 2 - logits[he]))
    rows = rows_in(tmp_path / "out")
    (row,) = [
        row for row in rows
        if (row["metric"], row["layer"], row["added"], row["dose"]) == ("answer change", "3", "direction", "2.0")
    ]  # fmt: skip
    assert float(row["value"]) == pytest.approx(found[1] - found[0], abs=1e-4)
    assert row["prompts"] == "1"
    (norm,) = [row for row in rows if (row["metric"], row["layer"]) == ("norm of the direction", "3")]
    assert float(norm["value"]) == pytest.approx(float(directions.norms[1]))
    line = next(line for line in out.splitlines() if line.split()[:1] == ["3"]).split()
    shown = [float(norm["value"]), float(norm["value"]) / float(directions.stream[1]), float(row["value"])]
    assert line[1:4] == [f"{value:.3g}" for value in shown]
    assert f"she/her over he, after 1 prompt held apart: {found[0]:.3g}" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["answers"]["clean"] == pytest.approx(found[0], abs=1e-4)
    assert len(summary["checks"]) == 3
    assert summary["held_apart"] == [contrast.held_apart[0]._asdict()]
    assert {row["dose"] for row in rows if row["metric"] == "kl"} == {"0.0", "1.0", "2.0"}
    assert all(float(row["value"]) == 0 for row in rows if row["dose"] == "0.0" and row["metric"] != "answer")


def test_over_texts_the_cost_is_the_mean_of_the_windows(run: Run, tmp_path: Path) -> None:
    texts = ["We told him that the horses had been tired.", "He shook his head, but he let us in, and led us up."]
    more = ("--contrast", write_pairs(tmp_path / "pairs.jsonl"), "--answers", " she", "--foils", " he")
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    alone = list[dict[tuple[str, ...], float]]()
    for given in (("--prompt", texts[0]), ("--prompt", texts[1]), ("--texts", tmp_path / "texts.txt")):
        code, _, err = run(*more, *map(str, given), "--overwrite")
        assert (code, err) == (0, "")
        kept = [row for row in rows_in(tmp_path / "out") if row["metric"] in steering.COSTS]
        names = ("metric", "layer", "added", "dose")
        alone.append({tuple(row[name] for name in names): float(row["value"]) for row in kept})
    assert len(alone[0]) == 2 * 2 * 3 * 3
    for key, mean in alone[2].items():
        assert mean == pytest.approx((alone[0][key] + alone[1][key]) / 2, rel=1e-3, abs=1e-5)


def test_a_run_that_adds_half_fails_its_check(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "shift", half)
    code, _, err = run()
    assert code == 1
    assert "a steered stream differs from the clean one" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--doses", "-1,2"), "--doses -1,2: expected numbers above 0; the opposite direction is run"),
        (("--doses", "0"), "--doses 0: expected numbers above 0"),
        (("--doses", "x"), "--doses 'x': expected finite numbers"),
        (("--answers", " she,unheard of"), "--answers: 'unheard of' is"),
        (("--foils", " she"), "' she' is an answer and a foil"),
        (("--contrast", "nowhere.jsonl", "--answers", " a", "--foils", " b"), "--contrast nowhere.jsonl is not a file"),
        (("--contrast", "nowhere.jsonl"), "--contrast needs --answers and --foils"),
    ],
)
def test_options_that_make_no_sense_are_told_in_a_sentence(run: Run, arguments: tuple[str, ...], said: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "line 1 is not JSON"),
        (["", "[1, 2]"], "line 2 lacks a text in one of the fields positive and negative"),
        (['{"positive": "a", "negative": ""}'], "line 1 lacks a text"),
        (['{"positive": "a", "negative": "a"}'], "line 1 has the same text twice, 'a'"),
        ([f'{{"positive": "p{i}", "negative": "n{i}"}}' for i in range(3)], "has 3 pairs; expected 4 or more"),
        ([f'{{"positive": "p{i % 3}", "negative": "n{i}"}}' for i in range(4)], "'p0' stands in a pair that makes"),
    ],
)
def test_a_file_of_pairs_that_cannot_be_used_is_told_in_a_sentence(tmp_path: Path, lines: list[str], said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=said):
        Contrast.read(path)


def test_pairs_that_are_not_utf_8_are_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        Contrast.read(tmp_path / "pairs.jsonl")


def test_texts_that_do_not_fit_the_model_are_told_in_a_sentence(random_model: GPT2, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="comes to 1 token; expected 2 to 64"):
        encoded(random_model, tokenizer, [""])
    with pytest.raises(ValueError, match="expected 2 to 64"):
        encoded(random_model, tokenizer, ["a b c d " * 40])
    assert encoded(random_model, tokenizer, [" she"]) == [[*end_of_text(random_model), *tokenizer.encode(" she")]]
    assert tokens_of(tokenizer, (" he", " her"), (" she",)) == (
        [tokenizer.encode(word)[0] for word in (" he", " her")],
        tokenizer.encode(" she"),
    )


def test_kinds_that_do_not_differ_are_told_in_a_sentence(random_model: GPT2, tokenizer: Tokenizer) -> None:
    same = replace(CONTRAST, made_from=(Pair("a b", "c d"), Pair("c d", "a b")))
    with pytest.raises(ValueError, match="After block 0 the two kinds of text do not differ"):
        Directions.of(random_model, tokenizer, same, (0,))
