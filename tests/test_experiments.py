"""Token loss, skip a layer and sensitivity, as a person runs them: numbers beside runs of their own."""

import copy
import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from experiments import sensitivity, skip_layer
from experiments.divergence import claims
from experiments.divergence import study as divergence
from experiments.harness import writing
from experiments.harness.command import command
from experiments.harness.corpus import Texts
from experiments.harness.experiment import Checked, Experiment, Ids, Start, Study
from experiments.harness.options import Options
from experiments.harness.running import run_prompt
from experiments.harness.table import Table, Tables, by_text, of_text
from experiments.token_loss import study as token_loss
from minigpt import GPT2, Comparison, GPT2Config, Tokenizer, compare, scaled, sweep
from minigpt.model import SITES, Block
from tests.blocks import Neurons
from tests.conftest import SMALL, TINY, draw
from tests.test_study import run_main

Run = Callable[..., tuple[int, str, str]]
MODULES = {"token_loss": token_loss, "skip_layer": skip_layer, "sensitivity": sensitivity}
FORWARD = Block.forward
PROMPT, TARGET = "The old man opened the door and looked out at the", " sea"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run an experiment by name on weights/tiny, without figures and report."""
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    return lambda name, *arguments: run_main(MODULES[name].main, monkeypatch, capfd, "--model", TINY, *arguments)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty short lines: more than one shard."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    sentence = "The old man opened the door and looked out at the sea, and he was not afraid of it."
    words = sentence.split(" ")
    path.write_text("\n".join(" ".join(words[number % 9 : number % 9 + 8]) for number in range(30)))
    return path


def rows_of(folder: Path, name: str, **wanted: object) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == str(value) for key, value in wanted.items())]


def value_of(folder: Path, name: str, **wanted: object) -> float:
    (row,) = rows_of(folder, name, **wanted)
    return float(row["value"])


@pytest.fixture(scope="module")
def encoded() -> torch.Tensor:
    tokenizer = Tokenizer.from_pretrained(TINY)
    return torch.tensor([tokenizer.encode(PROMPT) + tokenizer.encode(TARGET)])


# Token loss.


def test_losses_of_text_and_target_are_those_of_a_run_of_its_own(
    run: Run, tiny: GPT2, encoded: torch.Tensor, tmp_path: Path
) -> None:
    arguments = ("--prompt", PROMPT, "--target", TARGET, "--layers", "1,9", "--factors", "0.6,2", "--site", "mlp")
    code, out, err = run("token_loss", *arguments, "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "tokens that suffer most" in out
    logits = {}
    with torch.no_grad():
        logits["clean"] = tiny(encoded)[0].double()
        with scaled(tiny, {"blocks.9.mlp_scale": 2.0}):
            logits["scaled"] = tiny(encoded)[0].double()
    losses = {name: F.cross_entropy(of[:-1], encoded[0, 1:], reduction="none") for name, of in logits.items()}
    last = {name: of[-2].log_softmax(-1) for name, of in logits.items()}
    expected = {
        "loss_clean": losses["clean"].mean(),
        "loss": losses["scaled"].mean(),
        "loss_change": losses["scaled"].mean() - losses["clean"].mean(),
        "target_loss": losses["scaled"][-1],
        "target_probability_clean": last["clean"].exp()[encoded[0, -1]],
        "target_rank": 1.0 + (last["scaled"] > last["scaled"][encoded[0, -1]]).sum(),
        "target_correlation": torch.stack([logits["clean"][-2], logits["scaled"][-2]]).corrcoef()[0, 1],
        "kl": F.kl_div(
            logits["scaled"].log_softmax(-1), logits["clean"].log_softmax(-1), reduction="none", log_target=True
        )
        .sum(-1)
        .mean(),
    }
    for name, number in expected.items():
        found = value_of(tmp_path / "out", "token_loss", metric=name, layer=9, factor=2.0)
        assert found == pytest.approx(float(number), rel=1e-4, abs=1e-6), name


def test_the_loss_of_every_token_changes_where_that_token_stands(tiny: GPT2, encoded: torch.Tensor) -> None:
    settings = token_loss.LossSettings(model="", prompt=PROMPT, layers=(1, 9), factors=(0.6, 2.0), site="mlp")
    experiment = token_loss.TokenLoss(settings)
    tokens = experiment.measure(tiny, experiment.run(tiny, encoded.tolist(), alone=True))["tokens"].at(text=0)
    losses = []
    for values in ({}, {"blocks.9.mlp_scale": 0.6}):
        with torch.no_grad(), scaled(tiny, values):
            losses.append(F.cross_entropy(tiny(encoded)[0, :-1].double(), encoded[0, 1:], reduction="none"))
    for position in range(1, encoded.shape[1]):
        found = float(tokens.at(position=position, layer=9, factor=0.6).value)
        assert found == pytest.approx(float(losses[1][position - 1] - losses[0][position - 1]), rel=1e-4, abs=1e-5)


def test_without_a_target_the_prompts_last_token_is_it(run: Run, tmp_path: Path) -> None:
    for name, arguments in (
        ("given", ["--prompt", PROMPT, "--target", TARGET]),
        ("last", ["--prompt", PROMPT + TARGET]),
    ):
        assert run("token_loss", *arguments, "--layers", "2", "--output", tmp_path / name)[0] == 0
    given, last = ((tmp_path / name / "token_loss.csv").read_text() for name in ("given", "last"))
    assert given == last


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", " unbelievableness"], "tokens ("),
        (["--target", ""], "is 0 tokens"),
        (["--target", "eyes"], "give one token: ' eyes' is one"),
        (["--site", "head"], "every head has a scale of its own"),
        (["--prompt", ""], "empty"),
        (["--factors", "nan"], "finite"),
        (["--layers", "12"], "layers 0 to 11"),
        (["--prompt", "word " * 256, "--target", " sea"], "positions"),
    ],
)
def test_token_loss_refuses_in_a_sentence(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, out, err = run("token_loss", "--output", tmp_path / "out", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not (tmp_path / "out").exists()


def values_of(factors: int, **found: list[float]) -> torch.Tensor:
    """`token_loss.MEASURES` of one text, a number for each layer, the same for every factor; 1 where none is given."""
    layers = len(next(iter(found.values())))
    rows = [torch.tensor(found.get(name, [1.0] * layers)) for name in token_loss.MEASURES]
    return torch.stack(rows)[None, :, :, None].repeat(1, 1, 1, factors)


def loss_verdicts(half: float = 0.0, factors: tuple[float, ...] = (0.6,), **found: list[float]) -> dict[int, str]:
    """Verdicts on made-up numbers, with intervals of that half width around them."""
    values = values_of(len(factors), **found)
    layers = tuple(range(values.shape[2]))
    experiment = token_loss.TokenLoss(token_loss.LossSettings(model="", prompt="", layers=layers, factors=factors))
    tables = {
        name: Table(of.axes, of.value, {"low": of.value - half, "high": of.value + half} if half else {})
        for name, of in of_text(
            token_loss.tables_of(values, {"layer": layers, "factor": factors}, torch.zeros(1))
        ).items()
    }
    study = Study(experiment.settings, {}, ["a", "b"], {}, Checked(), tables, None, None)  # type: ignore[arg-type]
    return {verdict.number: verdict.verdict for verdict in experiment.verdicts(study)}


COOLER = {"temperature": [0.8] * 4, "kl_from_clean": [0.1] * 4, "kl_after_temperature": [0.01] * 4}


@pytest.mark.parametrize(
    ("number", "found", "verdict"),
    [
        (1, {"target_correlation": [0.996, 0.994, 0.999, 0.995]}, "holds"),
        (1, {"target_correlation": [0.996, 0.98, 0.999, 0.995]}, "does not hold"),
        (2, {"target_loss_change": [-0.1, -0.2, -0.1, 0.3], **COOLER}, "holds"),
        (2, {"target_loss_change": [0.1, -0.2, 0.1, 0.3], **COOLER}, "does not hold"),
        (2, {"target_loss_change": [-0.1] * 4, **COOLER, "temperature": [1.2] * 4}, "does not hold"),
        (2, {"target_loss_change": [-0.1] * 4, **COOLER, "kl_after_temperature": [0.09] * 4}, "does not hold"),
        (3, {"target_loss_change": [-0.1, -0.2, 0.1, 0.3]}, "holds"),
        (3, {"target_loss_change": [0.3, 0.3, -0.3, -0.1]}, "does not hold"),
    ],
)
def test_token_loss_verdicts_on_known_numbers(number: int, found: dict[str, list[float]], verdict: str) -> None:
    assert loss_verdicts(**found)[number] == verdict
    assert loss_verdicts(5.0, **found)[number] == "undecided"


@pytest.mark.parametrize(
    ("factors", "decided"), [((1.0,), set()), ((1.5, 1.0), {1}), ((0.6, 1.0, 2.0), {1, 2, 3})], ids=str
)
def test_the_claims_are_about_factors_that_change_something(factors: tuple[float, ...], decided: set[int]) -> None:
    """The last two are about scaling down, as the lecture did."""
    found = loss_verdicts(factors=factors, target_loss_change=[-0.1, -0.2, -0.1, 0.3], **COOLER)
    assert {number for number, verdict in found.items() if verdict != "undecided"} == decided


def test_later_layers_are_later_whatever_the_order_of_the_option(run: Run, tmp_path: Path) -> None:
    for name, layers in (("up", "1,9"), ("down", "9,1")):
        assert run("token_loss", "--layers", layers, "--output", tmp_path / name)[0] == 0
    up, down = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("up", "down"))
    assert up["verdicts"] == down["verdicts"]
    assert up["settings"]["layers"] == down["settings"]["layers"] == [1, 9]


def test_the_summary_tells_what_else_could_have_come(
    run: Run, tiny: GPT2, encoded: torch.Tensor, tmp_path: Path
) -> None:
    assert (
        run("token_loss", "--prompt", PROMPT, "--target", TARGET, "--layers", "3", "--output", tmp_path / "out")[0] == 0
    )
    (cell,) = json.loads((tmp_path / "out" / "summary.json").read_text())["likeliest"]
    with torch.no_grad():
        best = int(tiny(encoded[:, :-1])[0, -1].argmax())
    assert cell["clean"][0][0] == Tokenizer.from_pretrained(TINY).decode([best]).replace(" ", "\u00b7")
    assert (tmp_path / "out" / "sweep.safetensors").is_file()


# Skip a layer.


def test_a_skipped_block_is_a_model_without_it(run: Run, tiny: GPT2, encoded: torch.Tensor, tmp_path: Path) -> None:
    assert run("skip_layer", "--prompt", PROMPT + TARGET, "--output", tmp_path / "out")[0] == 0
    with torch.no_grad():
        clean, x = list(tiny.depths(encoded)), tiny.embed(encoded)
        streams = [x]
        for layer, block in enumerate(tiny.blocks):
            x = x if layer in (4, 5) else block(x)
            streams.append(x)
        logits, before = (tiny.unembed(tiny.final_norm(of)) for of in (x, clean[-1]))
    for depth in (5, 6, 12):
        wanted = {"skipped": "blocks 4, 5", "depth": depth, "positions": "rest"}
        found = value_of(tmp_path / "out", "skip_layer", metric="frobenius", **wanted)
        assert found == pytest.approx(float((streams[depth] - clean[depth])[:, 1:].norm()), rel=1e-4)
        step = float((streams[depth] - streams[depth - 1])[:, 1:].norm())
        assert value_of(tmp_path / "out", "skip_layer", metric="step", **wanted) == pytest.approx(step, rel=1e-4)
    changed = float((logits.argmax(-1) != before.argmax(-1))[:, 1:].double().mean())
    found = value_of(
        tmp_path / "out", "skip_layer", metric="changed", skipped="blocks 4, 5", depth="final", positions="rest"
    )
    assert found == pytest.approx(changed)


def test_the_step_at_a_skipped_block_is_exactly_0_and_the_clean_profile_stands_beside(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("skip_layer", "--layers", "2,5,6", "--output", tmp_path / "out")
    assert code == 0
    assert "true by construction" in out
    (shown,) = (line.split() for line in out.splitlines() if line.split()[:2] == ["block", "2"])
    costs = [
        value_of(tmp_path / "out", "skip_layer", metric=metric, depth=depth, positions="rest", skipped="block 2")
        for metric, depth in (("loss_change", "final"), ("kl", "final"), ("changed", "final"), ("relative", 12))
    ]
    assert shown[2:] == [f"{cost:.4g}" for cost in costs]
    steps = rows_of(tmp_path / "out", "skip_layer", metric="step")
    assert {row["skipped"] for row in steps} == {"clean", "block 2", "block 5", "block 6", "blocks 5, 6"}
    zero = {(row["skipped"], row["depth"]) for row in steps if float(row["value"]) == 0}
    assert zero == {("block 2", "3"), ("block 5", "6"), ("block 6", "7"), ("blocks 5, 6", "6"), ("blocks 5, 6", "7")}
    assert run("skip_layer", "--layers", "5,6", "--no-pairs", "--output", tmp_path / "alone")[0] == 0
    assert {row["skipped"] for row in rows_of(tmp_path / "alone", "skip_layer")} == {"clean", "block 5", "block 6"}


def test_a_block_that_was_not_skipped_ends_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: GPT2, ids: torch.Tensor, edits: list[dict[str, float]], **named: bool) -> Comparison:
        kept = [{name: value for name, value in edit.items() if not name.endswith("mlp_scale")} for edit in edits]
        return compare(model, ids, kept, **named)

    monkeypatch.setattr(skip_layer, "compare", forgetful)
    code, _, err = run("skip_layer", "--output", tmp_path / "out")
    assert (code, "expected exactly 0" in err, (tmp_path / "out").exists()) == (1, True, False)


# Sensitivity.


def test_the_table_is_layer_by_site_and_prints_what_it_saves(run: Run, tmp_path: Path) -> None:
    code, out, err = run("sensitivity", "--measure", "frobenius", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    table = [line.split() for line in out.splitlines()]
    (header,) = (index for index, words in enumerate(table) if words[:1] == ["layer"])
    assert table[header][1:] == ["output", "attention", "mlp"]
    for layer in range(12):
        for column, site in enumerate(("output", "attention", "mlp"), start=1):
            wanted = {"metric": "frobenius", "layer": layer, "site": site, "depth": 12, "positions": "rest"}
            assert table[header + 1 + layer][column] == f"{value_of(tmp_path / 'out', 'sensitivity', **wanted):.4g}"


def test_sensitivity_is_the_slope_of_the_study(run: Run, tmp_path: Path) -> None:
    assert run("sensitivity", "--prompt", PROMPT, "--sites", "mlp", "--output", tmp_path / "out")[0] == 0
    ids = torch.tensor([Tokenizer.from_pretrained(TINY).encode(PROMPT)])
    wide = GPT2.from_pretrained(TINY, dtype=torch.float64)
    step = 1e-4
    with torch.no_grad():
        with scaled(wide, {"blocks.7.mlp_scale": 1 + step}):
            up = wide.residuals(ids)
        with scaled(wide, {"blocks.7.mlp_scale": 1 - step}):
            down = wide.residuals(ids)
    slope = ((up - down) / (2 * step))[-1, 0, 1:].norm()
    wanted = {"metric": "frobenius", "layer": 7, "site": "mlp", "depth": 12, "positions": "rest"}
    assert value_of(tmp_path / "out", "sensitivity", **wanted) == pytest.approx(float(slope), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--measure", "changed"], "expected one of frobenius"), (["--sites", "gate"], "expected one of")],
)
def test_sensitivity_refuses_in_a_sentence(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, out, err = run("sensitivity", "--output", tmp_path / "out", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


# What all of them share.


@pytest.mark.parametrize("name", MODULES)
def test_over_a_corpus_numbers_are_means_with_intervals(run: Run, texts: Path, tmp_path: Path, name: str) -> None:
    more = ["--sites", "output"] if name == "sensitivity" else ["--layers", "2,3"]
    arguments = ["--texts", texts, "--window", "16", *more, "--output", tmp_path / "out"]
    code, out, err = run(name, *arguments)
    assert (code, err) == (0, "")
    assert "30 windows" in out
    rows = rows_of(tmp_path / "out", name)
    assert {row["windows"] for row in rows} == {"30"}
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    before = (tmp_path / "out" / f"{name}.csv").read_bytes()
    (tmp_path / "out" / "windows" / "0000001.safetensors").unlink()
    assert run(name, *arguments)[0] == 0, "what is missing is measured again"
    assert (tmp_path / "out" / f"{name}.csv").read_bytes() == before
    for verdict in json.loads((tmp_path / "out" / "summary.json").read_text())["verdicts"]:
        assert "30 windows" in verdict["basis"]


def test_windows_of_another_experiment_are_refused(run: Run, texts: Path, tmp_path: Path) -> None:
    arguments = ("--texts", texts, "--window", "16", "--layers", "2", "--limit", "4", "--output", tmp_path / "out")
    assert run("skip_layer", *arguments)[0] == 0
    (tmp_path / "out" / "summary.json").unlink()
    for file in (tmp_path / "out").glob("skip_layer*"):
        file.unlink()
    code, _, err = run("token_loss", *arguments)
    assert (code, "other settings" in err, err.count("\n")) == (2, True, 1)


class Least(Experiment[Comparison]):
    """As little as an experiment can be."""

    name, question = "least", "Block 5 is halved: does it matter?"

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Comparison:
        return compare(model, ids, [{"blocks.5.output_scale": 0.5}], predictions=True)

    def measure(self, model: GPT2, raw: Comparison) -> Tables:
        return {"kl": by_text(raw.measure("kl", "rest")[0, -1])}


def test_an_experiment_of_a_few_lines_has_a_command_line_files_and_a_corpus(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main = command(Least)
    code, out, err = run_main(main, monkeypatch, capfd, "--model", TINY, "--output", tmp_path / "prompt")
    assert (code, err) == (0, "")
    assert "metric kl  value 0." in out
    assert "<td>kl</td>" in (tmp_path / "prompt" / "report.html").read_text()
    assert {path.name for path in (tmp_path / "prompt").iterdir()} == {"least.csv", "summary.json", "report.html"}
    code, _, err = run_main(
        main, monkeypatch, capfd, "--model", TINY, "--texts", texts, "--output", tmp_path / "corpus"
    )
    assert (code, err) == (0, "")
    (row,) = rows_of(tmp_path / "corpus", "least")
    assert float(row["low"]) < float(row["value"]) < float(row["high"])


BLOCK = """
from minigpt import Block

class Loud(Block):
    def forward(self, x, *cache):
        return x + 2 * (super().forward(x, *cache) - x)
"""


def test_a_block_of_ones_own_is_run_and_its_code_counts(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "loud.py").write_text(BLOCK)
    arguments = ("skip_layer", "--prompt", PROMPT, "--layers", "2", "--block", "loud:Loud", "--output")
    code, out, err = run(*arguments, tmp_path / "out")
    assert (code, err) == (0, "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["block"] == "loud:Loud"
    assert summary["parity"]["verdict"] == "not comparable"
    assert "GPT2LMHeadModel" not in json.dumps(summary)
    assert "parity: not comparable" in out
    ids = torch.tensor([Tokenizer.from_pretrained(TINY).encode(PROMPT)])
    model = GPT2.from_pretrained(TINY)
    with torch.no_grad():
        x = model.embed(ids)
        step = float((2 * (model.blocks[0](x) - x))[:, 1:].norm())
    wanted = {"skipped": "clean", "metric": "step", "depth": 1}
    assert value_of(tmp_path / "out", "skip_layer", **wanted) == pytest.approx(step, rel=1e-4)
    (tmp_path / "loud.py").write_text(BLOCK.replace("2 *", "3 *"))
    assert "the code has changed since" in run(*arguments, tmp_path / "out")[2]


@pytest.mark.parametrize("name", ["nowhere:Loud", "minigpt:Loud", "minigpt:GPT2", "minigpt"])
def test_a_block_that_is_none_is_a_sentence(run: Run, tmp_path: Path, name: str) -> None:
    code, out, err = run("skip_layer", "--block", name, "--output", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "The block" in err


def stretched(self: Block, x: torch.Tensor, *cache: Any) -> torch.Tensor:
    """A block that writes a little more than it would, and nothing where it would write nothing."""
    return x + 1.01 * (FORWARD(self, x, *cache) - x)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("corpus", [False, True])
def test_what_other_code_measured_is_refused_and_with_overwrite_measured_again(
    run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: bool, killed: bool
) -> None:
    """Of a run that was finished, and of one that was killed before its summary was written."""
    asked = ("--texts", texts, "--window", "16", "--limit", "20") if corpus else ("--prompt", PROMPT)
    arguments, folder = ("skip_layer", *asked, "--layers", "2", "--no-parity", "--quiet", "--output"), tmp_path / "out"
    assert run(*arguments, folder)[0] == 0
    if killed:
        for path in folder.glob("s*.*"):
            path.unlink()
    before = files_in(folder)
    monkeypatch.setattr(Block, "forward", stretched)
    if corpus or not killed:
        code, out, err = run(*arguments, folder)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "the code has changed since" in err
        assert files_in(folder) == before
    assert run(*arguments, folder, "--overwrite")[0] == 0
    assert run(*arguments, tmp_path / "fresh")[0] == 0
    again, fresh = files_in(folder), files_in(tmp_path / "fresh")
    assert again.keys() == fresh.keys()
    assert {name for name in fresh if again[name] != fresh[name]} <= {"summary.json"}, "it quotes the command"
    assert again["skip_layer.csv"] != before.get("skip_layer.csv")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MODULES)
def test_memory_that_is_too_little_is_a_sentence(run: Run, tmp_path: Path, name: str) -> None:
    code, out, err = run(name, "--max-bytes", "1000", "--output", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "max_bytes is 1000" in err


class Ranked(Least):
    """Names its columns after what it finds in the texts at hand."""

    def measure(self, model: GPT2, raw: Comparison) -> Tables:
        return {"found": by_text(torch.zeros(len(raw.lengths), 2), token=[*map(int, raw.ids[0, :2])])}


def test_labels_that_depend_on_the_texts_are_refused_over_a_corpus(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A mean over windows would mix numbers of different things."""
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    arguments = ("--model", TINY, "--texts", texts, "--no-parity", "--output", tmp_path / "out")
    code, _, err = run_main(command(Ranked), monkeypatch, capfd, *arguments)
    assert (code, "labels of the tables differ between windows" in err) == (2, True)


# Sites and indices as the model declares them.


@pytest.fixture(scope="module")
def neurons() -> GPT2:
    """A small random model whose MLPs have five neurons, each with a scale; float64, the tokenizer's vocabulary."""
    vocabulary = Tokenizer.from_pretrained(TINY).vocab_size
    return draw(GPT2Config(**{**SMALL, "vocab_size": vocabulary, "n_inner": 5}), block=Neurons)


def study_of(experiment: Experiment[Any], model: GPT2) -> Study[Any]:
    return run_prompt(experiment, model, Tokenizer.from_pretrained(TINY))


def begun(model: GPT2, options: Options) -> Start[Any]:
    return Start(model, Tokenizer.from_pretrained(TINY), options, torch.device("cpu"))


def test_a_site_whose_index_counts_neurons_has_a_column_of_that_name(neurons: GPT2) -> None:
    options = divergence.GridOptions(
        prompt=PROMPT, layers="1", factors="0,2", site="gain", indices="3,0", no_parity=True, dtype="float64"
    )
    study = study_of(experiment := divergence.Divergence.from_options(begun(neurons, options)), neurons)
    rows = list(experiment.rows(study))
    assert list(rows[0]) == ["model", "site", "layer", "neuron", "factor", "depth", "positions", "metric", "value"]
    assert {(row["site"], row["layer"], row["neuron"]) for row in rows} == {("gain", 1, 3), ("gain", 1, 0)}
    ids = torch.tensor([Tokenizer.from_pretrained(TINY).encode(PROMPT)])
    silenced = torch.ones(5, dtype=torch.float64).index_fill(0, torch.tensor([3]), 0)
    with torch.no_grad():
        clean = neurons.residuals(ids)
        with scaled(neurons, {"blocks.1.mlp.gain_scale": silenced}):
            expected = float((neurons.residuals(ids) - clean)[4, 0, 1:].norm())
    wanted = {"neuron": 3, "factor": 0.0, "depth": 4, "positions": "rest", "metric": "frobenius"}
    (found,) = (row["value"] for row in rows if wanted.items() <= row.items())
    assert found == pytest.approx(expected, rel=1e-12)
    assert [verdict.to_json()["neuron"] for verdict in experiment.verdicts(study)] == [3] * 5 + [0] * 5
    assert "gain of neuron 3 of block 1" in "\n".join(experiment.lines(study, 100))


def test_a_list_of_entries_is_of_what_the_site_counts(neurons: GPT2) -> None:
    start = begun(neurons, Options())
    assert start.indices("4,0", "gain") == (4, 0)
    assert start.indices("2", "head") == (2,)
    assert start.indices("all", "gain") is start.indices("all", "mlp") is None
    with pytest.raises(ValueError, match=r"--indices 5: 5 is not a neuron; the model has neurons 0 to 4\."):
        start.indices("5", "gain")
    with pytest.raises(ValueError, match="'mlp' is scaled as a whole, so leave --indices out"):
        start.indices("0", "mlp")
    with pytest.raises(
        ValueError, match="expected one of output, attention, mlp, head, query, key, value, neuron, gain"
    ):
        start.site("gate")


def test_sensitivities_have_a_column_for_all_that_indices_count(neurons: GPT2) -> None:
    options = sensitivity.SensitivityOptions(prompt=PROMPT, sites="mlp,gain,head", measure="frobenius", no_parity=True)
    experiment = sensitivity.Sensitivities.from_options(begun(neurons, options))
    study = study_of(experiment, neurons)
    rows = list(experiment.rows(study))
    assert list(rows[0]) == ["model", "positions", "metric", "layer", "site", "neuron", "head", "depth", "value"]
    labels = {(row["site"], row["neuron"], row["head"]) for row in rows}
    assert labels == {("mlp", "", ""), *(("gain", n, "") for n in range(5)), *(("head", "", h) for h in range(3))}
    found = {
        (row["site"], row["neuron"]): row["value"]
        for row in rows
        if {"layer": 2, "metric": "frobenius", "positions": "rest", "depth": 4}.items() <= row.items()
    }
    ids, ends = torch.tensor([Tokenizer.from_pretrained(TINY).encode(PROMPT)]), []
    for step in (1e-5, -1e-5):
        value = torch.ones(5, dtype=torch.float64).index_add(0, torch.tensor([4]), torch.tensor([step]).double())
        with torch.no_grad(), scaled(neurons, {"blocks.2.mlp.gain_scale": value}):
            ends.append(neurons.residuals(ids)[4, 0, 1:])
    assert found["gain", 4] == pytest.approx(float((ends[0] - ends[1]).norm()) / 2e-5, rel=1e-6)
    lines = [line.split() for line in experiment.lines(study, 200)]
    assert lines[1] == [
        "layer",
        "mlp",
        *" ".join(f"gain of neuron {n}" for n in range(5)).split(),
        *["head", "0", "head", "1", "head", "2"],
    ]
    assert lines[4][6] == f"{found['gain', 4]:.4g}"


def test_token_loss_scales_whole_layers_and_skips_are_of_any_block(neurons: GPT2) -> None:
    options = token_loss.LossOptions(prompt=PROMPT, site="gain", no_parity=True)
    with pytest.raises(ValueError, match="--site gain: every neuron has a scale of its own there"):
        token_loss.TokenLoss.from_options(begun(neurons, options))
    whole = token_loss.TokenLoss.from_options(begun(neurons, replace(options, site="mlp")))
    assert {row["layer"] for row in whole.rows(study_of(whole, neurons))} == {0, 1, 2, 3}
    skipped = skip_layer.SkipLayer.from_options(begun(neurons, skip_layer.SkipOptions(prompt=PROMPT, no_parity=True)))
    assert skipped.verdicts(study_of(skipped, neurons))[0].verdict == "true by construction"


@pytest.mark.parametrize("name", ["divergence", "sensitivity"])
def test_the_help_names_the_sites_that_the_model_declares(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main = {"divergence": divergence.main, "sensitivity": sensitivity.main}[name]
    code, out, _ = run_main(main, monkeypatch, capfd, "--help")
    separator = {"divergence": " | ", "sensitivity": ","}[name]
    assert (code, separator.join(SITES) in out) == (0, True)


# The shortest texts, and texts of unequal lengths.


def test_what_two_tokens_cannot_have_is_undefined_in_words(run: Run, tmp_path: Path) -> None:
    """Of two tokens, the second has no successor whose loss could change."""
    for name, arguments in (("skip_layer", ["--layers", "2"]), ("sensitivity", ["--measure", "loss_change"])):
        code, out, err = run(name, "--prompt", "The sea", *arguments, "--output", tmp_path / name)
        assert (code, err) == (0, "")
        assert "undefined" in out
        assert "nan" not in out
    code, out, err = run("token_loss", "--prompt", "The sea", "--output", tmp_path / "loss")
    assert (code, err) == (0, "")
    assert "nan" not in out


def test_a_factor_that_changes_no_prediction_explains_nothing_in_words(neurons: GPT2) -> None:
    """The last block's output scale without an epsilon, which the final norm takes back whole."""
    model = copy.deepcopy(neurons)
    model.final_norm.eps = 0.0
    options = token_loss.LossOptions(prompt=PROMPT, layers="3", factors="0.5", no_parity=True)
    experiment = token_loss.TokenLoss.from_options(begun(model, options))
    study = study_of(experiment, model)
    verdict = experiment.verdicts(study)[1]
    assert (verdict.verdict, verdict.figures["share_of_kl_explained"]) == ("does not hold", [None])
    assert "no kl beyond rounding" in verdict.evidence
    assert (
        "0 of 1 layer lower the target's loss, and the fitted temperature is below 1 for 0 of 1 layer"
        in verdict.evidence
    )
    json.dumps(writing.summary(experiment, study), allow_nan=False)


def test_a_silent_neuron_leaves_no_change_to_judge(neurons: GPT2) -> None:
    """A rectified neuron that is never above 0: whatever its scale, the two runs are the same."""
    model = GPT2(replace(neurons.config, activation_function="relu"), block=Neurons).double()
    model.blocks[1].mlp.expand.bias.data[3] = -1e3
    grid = {"layers": (1,), "factors": (0.5, 2.0), "site": "gain", "indices": (3, 0)}
    experiment = divergence.Divergence(divergence.GridSettings(model="", prompt=PROMPT, parity=False, **grid))
    verdicts = experiment.verdicts(study_of(experiment, model))
    silent = {of.number: of for of in verdicts if of.index == {"neuron": 3}}
    found = {number: verdict.verdict for number, verdict in silent.items()}
    assert found == {1: "true by construction", 2: "does not hold", 3: "undecided", 4: "undecided", 5: "undecided"}
    assert {silent[number].sentence for number in (3, 4, 5)} == {claims.UNCHANGED_SOMEWHERE}
    assert "undecided" not in {of.verdict for of in verdicts if of.index == {"neuron": 0}}


UNEQUAL = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19], [20, 21, 22, 23]]
"""The second is the shortest window of a corpus."""
ROUNDED = {
    **dict.fromkeys(("gauge_free", "turning"), 1e-7),
    **dict.fromkeys(("alignment", "attention_alignment", "mlp_alignment"), 1e-9),
}
"""Absolute, in float64: the root of a difference that is 1e-16 where only lengths differ; cosines with a write that is
almost none. All else is the same to 1e-12 and to 1e-11 of itself: a small kl is a difference of numbers near 10."""


@pytest.mark.parametrize("kind", ["divergence", "token_loss", "skip_layer", "sensitivity"])
def test_windows_of_unequal_lengths_give_what_each_gives_alone(kind: str, model: GPT2) -> None:
    shared = {"model": "", "prompt": None, "texts": Texts("", "", "text", 7, None, 3), "parity": False}
    grid = {"layers": (1, 3), "factors": (0.5, 1.0, 1.5)}
    made: dict[str, Callable[[], Experiment[Any]]] = {
        "divergence": lambda: divergence.Divergence(divergence.GridSettings(**shared, **grid)),
        "token_loss": lambda: token_loss.TokenLoss(token_loss.LossSettings(**shared, **grid)),
        "skip_layer": lambda: skip_layer.SkipLayer(skip_layer.SkipSettings(**shared, layers=(1, 2))),
        "sensitivity": lambda: sensitivity.Sensitivities(sensitivity.SensitivitySettings(**shared, sites=SITES)),
    }
    experiment = made[kind]()
    together = numbers_of(experiment.measure(model, experiment.run(model, UNEQUAL, alone=False)))
    for text, ids in enumerate(UNEQUAL):
        alone = numbers_of(experiment.measure(model, experiment.run(model, [ids], alone=False)))
        assert alone.keys() == together.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(
                together[name][text], expected[0], equal_nan=True, rtol=1e-11, atol=ROUNDED.get(name, 1e-12)
            )


def numbers_of(tables: Tables) -> dict[str, torch.Tensor]:
    """Every table's numbers by its name, of several measures by theirs: [text, ...] each."""
    found = dict[str, torch.Tensor]()
    for name, table in tables.items():
        for metric in table.axes.get("metric", ()):
            found[f"{metric} of {name}" if name == "alone" else metric] = table.at(metric=metric).value
        if "metric" not in table.axes:
            found[name] = table.value
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_factor_1_has_no_temperature_in_a_batch_of_unequal_lengths(tiny: GPT2, dtype: torch.dtype) -> None:
    """The clean run of the batch is rounded otherwise than that of the text alone, which temperatures are fitted to."""
    model = tiny if dtype == torch.float32 else GPT2.from_pretrained(TINY, dtype=dtype)
    settings = token_loss.LossSettings(model="", prompt=None, layers=(0, 11), factors=(1.0,))
    experiment = token_loss.TokenLoss(settings)
    values = experiment.measure(model, experiment.run(model, UNEQUAL, alone=False))["values"]
    assert float((values.at(metric="temperature").value - 1).abs().max()) < 1e-12
    for name in ("kl_from_clean", "kl_after_temperature"):
        assert float(values.at(metric=name).value.max()) < 1e-12


def test_what_counts_as_rounding_is_the_kl_that_rounding_makes(tiny: GPT2, encoded: torch.Tensor) -> None:
    """Logits that are off by one rounding of float32, up or down; in float64, the sums that make a kl of nothing."""
    bound = token_loss._rounding(tiny, sweep(tiny, encoded, [0], [0.5], predictions=True))
    with torch.no_grad():
        logits = tiny(encoded)[0].double()
    signs = torch.randint(2, logits.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    p = logits.log_softmax(-1)
    mean = (p.exp() * logits).sum(-1).abs().max()
    q = (logits + signs * mean * torch.finfo(torch.float32).eps).log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).max())
    assert kl <= float(bound) < 4 * kl
    wide = GPT2.from_pretrained(TINY, dtype=torch.float64)
    same = sweep(wide, encoded, [0, 5], [1.0], predictions=True)
    bound, found = token_loss._rounding(wide, same), token_loss._temperatures(wide, same)
    assert float(found["kl_from_clean"].max()) <= float(bound) < 1e-13
    assert float(bound) > torch.finfo(torch.float64).eps * float(mean), (
        "a sum of such numbers may be off by more than one"
    )


def test_a_target_over_a_corpus_is_refused(run: Run, texts: Path, tmp_path: Path) -> None:
    code, _, err = run("token_loss", "--texts", texts, "--target", " sea", "--output", tmp_path / "out")
    assert (code, "each window's last token" in err) == (2, True)
