"""Questions about behaviour: each beside a hand-made model whose answer is known, and beside numbers of its own."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import behaviour
from experiments.behaviour import Answer, agreement, agrees, closes, copies, induction_heads, observe, repeated, resting
from experiments.harness import writing
from experiments.harness.experiment import Settings
from experiments.harness.running import run_prompt
from minigpt import GPT2, Block, GPT2Config, Tokenizer
from minigpt.model import Attention
from tests.conftest import SMALL, TINY, draw
from tests.test_study import run_main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def random_model(tokenizer: Tokenizer) -> GPT2:
    """A small random model of the tokenizer's vocabulary, float64."""
    fields = {**SMALL, "vocab_size": tokenizer.vocab_size, "n_positions": 160, "eos_token_id": tokenizer.vocab_size - 1}
    return draw(GPT2Config(**fields))


class Told:
    """A model that gives the logits it is told: whatever a text is, by a function of its ids."""

    def __init__(self, config: GPT2Config, says: Callable[[list[int]], Tensor]) -> None:
        self.config, self.says, self.device = config, says, torch.device("cpu")

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [batch, position, vocab]."""
        return torch.stack([torch.stack([self.says(row[: at + 1]) for at in range(len(row))]) for row in ids.tolist()])


def told(tokenizer: Tokenizer, says: Callable[[str], dict[str, float]]) -> Any:
    """A model whose logits for some words follow from the text; the others' are 0."""

    def logits(ids: list[int]) -> Tensor:
        found = torch.zeros(tokenizer.vocab_size)
        for word, value in says(tokenizer.decode(ids[1:])).items():
            found[tokenizer.encode(word)[0]] = value
        return found

    config = GPT2Config(**{**SMALL, "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.vocab_size - 1})
    return Told(config, logits)


# The items.


def test_there_are_more_than_two_hundred_pairs_and_all_differ() -> None:
    pairs = agreement()
    assert len(pairs) > 200
    assert len({item for pair in pairs for item in pair}) == 2 * len(pairs)


def test_the_texts_of_a_pair_differ_in_their_subject_and_swap_their_answers() -> None:
    for first, second in agreement():
        assert (first.kind, first.agrees, first.foil) == (second.kind, second.foil, second.agrees)
        assert first.text != second.text
        ends = [item.text.split()[-1] for item in (first, second)]
        assert ends[0] == ends[1] or first.kind == "verb"


def test_tiny_knows_every_answer_as_one_token(tokenizer: Tokenizer) -> None:
    assert {len(tokenizer.encode(word)) for pair in agreement() for item in pair for word in item[2:]} == {1}


# Agreement and quotations.


def test_a_model_that_knows_the_subjects_is_always_right(tokenizer: Tokenizer) -> None:
    known = {item.text: {item.agrees: 1.0} for pair in agreement() for item in pair}
    answers = agrees(told(tokenizer, lambda text: known.get(text, {})), tokenizer)
    assert [answer.value for answer in answers] == [1, 1, 1, 1]
    assert [answer.items for answer in answers] == [452, 308, 144, 226]
    wrong = {item.text: {item.foil: 1.0} for pair in agreement() for item in pair}
    assert [answer.value for answer in agrees(told(tokenizer, lambda text: wrong.get(text, {})), tokenizer)] == [
        0,
        0,
        0,
        0,
    ]


def test_a_model_that_always_says_he_is_right_of_every_second_text_and_moved_by_no_subject(
    tokenizer: Tokenizer,
) -> None:
    answers = agrees(told(tokenizer, lambda _: {" he": 1.0, " himself": 1.0, " was": 2.0}), tokenizer)
    assert [answer.value for answer in answers] == [0.5, 0.5, 0.5, 0.0]


def test_a_subject_can_move_the_odds_without_turning_them(tokenizer: Tokenizer) -> None:
    def says(text: str) -> dict[str, float]:
        more = 1.0 if any(text.startswith(f"{his} ") for his, _ in behaviour.SUBJECTS) else 0.0
        return {" he": 5 + more, " himself": 5 + more, " was": 1.0}

    answers = {answer.question: answer.value for answer in agrees(told(tokenizer, says), tokenizer)}
    assert answers["agreement, pronoun"] == 0.5
    assert answers["agreement, the subject moves the odds"] == pytest.approx(154 / 226)


def test_words_that_are_several_tokens_are_left_out_and_counted(tokenizer: Tokenizer) -> None:
    class Coarse:
        vocab_size = tokenizer.vocab_size

        def encode(self, text: str) -> list[int]:
            return [1, 2] if text == " herself" else tokenizer.encode(text)

    known = {item.text: {item.agrees: 1.0} for pair in agreement() for item in pair}
    first, *_ = agrees(told(tokenizer, lambda text: known.get(text, {})), Coarse())  # type: ignore[arg-type]
    assert (first.items, first.left_out) == (452 - 2 * 28, 2 * 28)


def test_a_quotation_is_closed_by_any_token_that_holds_its_mark(tokenizer: Tokenizer) -> None:
    for mark in ('"', ',"', '."'):
        closing = told(tokenizer, lambda text, mark=mark: {mark: 9.0 if text.startswith('"') else 8.0})
        assert closes(closing, tokenizer).value == 1
        opening = told(tokenizer, lambda text, mark=mark: {mark: 8.0 if text.startswith('"') else 9.0})
        assert closes(opening, tokenizer).value == 0
    another = told(tokenizer, lambda text: {' "': 9.0 if text.startswith('"') else 8.0})
    assert closes(another, tokenizer).value == 0, "it opens another one"


def test_an_answer_is_a_mean_with_its_interval() -> None:
    answer = Answer.of("q", "u", [True] * 30 + [False] * 10)
    assert (answer.value, answer.items) == (0.75, 40)
    assert answer.low < 0.75 - 0.08
    assert answer.high > 0.75 + 0.08
    deviation = math.sqrt(0.75 * 0.25 / 40)
    assert answer.high - answer.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert math.isnan(Answer.of("q", "u", []).value)


# Induction.


def test_a_random_sequence_comes_twice_after_the_end_of_a_text(random_model: GPT2) -> None:
    ids, length = repeated(random_model)
    assert ids.shape == (64, 1 + 2 * length) == (64, 129)
    assert set(ids[:, 0].tolist()) == {random_model.config.eos_token_id}
    assert torch.equal(ids[:, 1 : 1 + length], ids[:, 1 + length :])
    assert not (ids[:, 1:] == random_model.config.eos_token_id).any()
    assert len(ids[:, 1:].unique()) > 2000


def test_the_gain_is_the_loss_of_the_first_copy_less_that_of_the_second(random_model: GPT2) -> None:
    ids, length = repeated(random_model)
    with torch.no_grad():
        losses = F.cross_entropy(random_model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    first = losses[:, 1:length].mean(1)  # of the tokens but the first, which nothing can foretell in either copy
    second = losses[:, length + 1 : 2 * length].mean(1)
    answer = copies(random_model)
    assert answer.value == pytest.approx(float((first - second).mean()), rel=1e-9)
    assert answer.items == 64
    assert answer.low <= answer.value <= answer.high


class Copies(Attention):
    """Attends to the token after the last token like this one, wherever there is one."""

    def pattern(self, x: Tensor) -> Tensor:
        """Only of two copies after one token: [batch, n_head, query, key]."""
        length = (x.shape[1] - 1) // 2
        weights = torch.eye(x.shape[1], dtype=x.dtype).repeat(len(x), self.n_head, 1, 1)
        query = torch.arange(length + 1, 2 * length + 1)
        if self.layer == 1:
            weights[:, 2, query] = 0
            weights[:, 2, query, query - length + 1] = 1
            weights[:, 0, query[0]] = 0
            weights[:, 0, query[0], query[0] - length + 1] = 1
        return weights


def test_a_head_that_copies_is_found_and_no_other() -> None:
    model = draw(GPT2Config(**{**SMALL, "eos_token_id": 96}))
    for block in model.blocks:
        block.attention.__class__ = Copies
    found = induction_heads(model)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[1, 2] = 1
    expected[1, 0] = 1 / repeated(model)[1]  # at the first token of the second copy alone
    torch.testing.assert_close(found.double(), expected)


# Texts.


def test_what_is_observed_of_a_text_is_what_the_model_does(random_model: GPT2) -> None:
    texts = [[5, 6, 7, 8, 9, 10, 11], [30, 31, 32]]
    found = observe(random_model, texts)
    end = random_model.config.eos_token_id
    for number, text in enumerate(texts):
        for start, ids in enumerate((text, [end, *text])):
            whole = torch.tensor([ids])
            with torch.no_grad():
                patterns, streams = random_model.attention_patterns(whole), random_model.residuals(whole)
                logits = random_model(whole)
            torch.testing.assert_close(found.attention[number, start], patterns[:, 0, :, 1:, 0].mean(-1))
            norms = streams[:, 0].norm(dim=-1)
            torch.testing.assert_close(found.norms[number, start], norms[:, 0] / norms[:, 1:].mean(1))
            losses = F.cross_entropy(logits[0, :-1], whole[0, 1:], reduction="none")[start:]
            expected = [float(losses[first - 1 : last].mean()) for first, last in behaviour.FIRST_BUCKETS[:4]]
            torch.testing.assert_close(
                found.losses[number, start, :4], torch.tensor(expected).double(), equal_nan=True, rtol=1e-5, atol=1e-5
            )
    assert found.losses[0].isnan().sum() == 2 * (len(behaviour.FIRST_BUCKETS) - 4)


def test_a_text_of_all_positions_loses_its_last_token_to_the_end_in_front() -> None:
    model = draw(GPT2Config(**{**SMALL, "eos_token_id": 96}))
    text = [*range(24)]
    whole, cut = observe(model, [text]).losses[0, 1], observe(model, [text[:-1]]).losses[0, 1]
    torch.testing.assert_close(whole, cut, equal_nan=True)


def test_a_model_without_an_end_of_text_is_seen_as_it_is_alone() -> None:
    model = draw(GPT2Config(**SMALL))  # GPT-2's end of text lies far outside of 97 tokens
    assert behaviour.end_of_text(model) == []
    found = observe(model, [[1, 2, 3, 4]])
    assert (found.attention.shape[1], found.norms.shape[1], found.losses.shape[1]) == (1, 1, 1)
    tables = behaviour.Behaviour(Settings(model="", prompt="")).measure(model, found)
    assert {tuple(table.axes["start"]) for table in tables.values()} == {(behaviour.AS_IT_IS,)}
    assert set(repeated(model)[0][:, 0].tolist()) == {0}


def test_heads_rest_on_position_0_above_the_threshold() -> None:
    attention = torch.zeros(2, 1, 4)
    attention[:, 0] = torch.tensor([[0.5, 0.2, 0.29, 0.9], [0.2, 0.2, 0.3, 0.9]])
    assert resting(attention) == 0.5


def test_buckets_of_positions_leave_none_out() -> None:
    pairs = behaviour.FIRST_BUCKETS
    assert [first for first, _ in pairs[1:]] == [last + 1 for _, last in pairs[:-1]]
    assert (pairs[0][0], pairs[-1][1]) == (1, 1023)


# The experiment.


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Ask weights/tiny, without figures and report."""
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    arguments = ("--model", TINY, "--output", tmp_path / "out")
    return lambda *more: run_main(behaviour.main, monkeypatch, capfd, *arguments, *more)


def rows_in(folder: Path, metric: str) -> list[dict[str, str]]:
    with (folder / "behaviour.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["metric"] == metric]


def test_terminal_table_and_summary_say_the_same_of_a_prompt(
    run: Run, tmp_path: Path, tiny: GPT2, tokenizer: Tokenizer
) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    found = observe(tiny, [tokenizer.encode(behaviour.PASSAGE)])
    shares = rows_in(tmp_path / "out", "attention on position 0")
    assert len(shares) == 2 * 12 * 3
    for row in shares:
        start = [behaviour.AS_IT_IS, behaviour.AFTER_END].index(row["start"])
        expected = float(found.attention[0, start, int(row["layer"]), int(row["head"])])
        assert float(row["value"]) == pytest.approx(expected, rel=1e-5)
    for start, front in enumerate((behaviour.AS_IT_IS, behaviour.AFTER_END)):
        said = out[out.index(f"{front}:") :]
        assert f"{int((found.attention[0, start] > 0.3).sum())} of 36" in said[:200]
        peak = int(found.norms[0, start].argmax())
        assert f"{float(found.norms[0, start, peak]):.3g} times the others' (depth {peak})" in said[:200]
    answers = {row["question"]: row for row in rows_in(tmp_path / "out", "answer")}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {of["question"]: of["value"] for of in summary["answers"]} == {
        question: float(row["value"]) for question, row in answers.items()
    }
    for question, row in answers.items():
        assert f"{question}  {float(row['value']):.3g} (" in out
    np.testing.assert_allclose(summary["induction_heads"], induction_heads(tiny).numpy(), rtol=1e-5)


def test_over_texts_every_window_is_a_whole_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join([behaviour.PASSAGE] * 3 + ["A short line."]))
    code, _, err = run("--texts", tmp_path / "texts.txt", "--window", "32")
    assert (code, err) == (0, "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["corpus"]["windows"] == 3 * (120 // 32)
    positions = {row["position"] for row in rows_in(tmp_path / "out", "loss")}
    assert positions == {"1", "2", "3-4", "5-8", "9-16", "17-32"}


@pytest.mark.parametrize(
    ("value", "verdict"),
    [((0.92, 0.905, 0.95), "holds"), ((0.92, 0.89, 0.95), "undecided"), ((0.8, 0.7, 0.9), "does not hold")],
)
def test_an_answer_decides_by_its_whole_interval(value: Sequence[float], verdict: str) -> None:
    decision = behaviour._answered(Answer("agreement", "share of texts", *value, items=40), 0.9)
    assert decision.verdict == verdict


@pytest.mark.parametrize(
    ("resting_heads", "verdict"), [(7, "does not hold"), (8, "holds"), (36, "holds"), (0, "does not hold")]
)
def test_a_fifth_of_the_heads_must_rest(resting_heads: int, verdict: str) -> None:
    shares = torch.full((36,), 0.3)
    shares[:resting_heads] = 0.31
    table = behaviour.Table({"layer": range(12), "head": range(3)}, shares.reshape(12, 3))
    decision = behaviour._rest(table)
    assert decision.verdict == verdict
    assert f"{resting_heads} of 36 heads" in decision.evidence


@pytest.mark.parametrize(("ratio", "verdict"), [(10.1, "holds"), (9.9, "does not hold")])
def test_a_first_token_is_massive_at_its_largest_depth(ratio: float, verdict: str) -> None:
    norms = torch.ones(5).index_fill(0, torch.tensor(3), ratio)
    decision = behaviour._massive(behaviour.Table({"depth": range(5)}, norms))
    assert decision.verdict == verdict
    assert "(depth 3)" in decision.evidence


def test_a_block_of_ones_own_is_asked_too(tokenizer: Tokenizer) -> None:
    class Silent(Block):
        """Writes nothing."""

        def forward(self, x: Tensor, cache: object = None) -> Tensor:
            return x + 0 * self.attention(self.attention_norm(x)) + 0 * self.mlp(self.mlp_norm(x))

    fields = {**SMALL, "vocab_size": tokenizer.vocab_size, "n_positions": 64, "eos_token_id": tokenizer.vocab_size - 1}
    model = draw(GPT2Config(**fields), block=Silent)
    model.position_embedding.weight.data.zero_()
    found = {answer.question: answer.value for answer in behaviour.answers(model, tokenizer)}
    at_the_end = sum(text.endswith("{}") for text in behaviour.VERB_TEXTS) * len(behaviour.NOUNS)
    assert 0 < found["agreement, the subject moves the odds"] <= at_the_end / 226, "nothing but the last word counts"
    assert found["agreement, pronoun"] == 0.5


def test_every_number_of_the_charts_is_one_of_the_tables(random_model: GPT2, tokenizer: Tokenizer) -> None:
    settings = Settings(model="", prompt=behaviour.PASSAGE, parity=False)
    asked, heads = behaviour.answers(random_model, tokenizer), induction_heads(random_model)
    study = run_prompt(behaviour.Behaviour(settings, asked, heads), random_model, tokenizer)
    figures = behaviour.Behaviour(settings, asked, heads).figures(study)
    found = observe(random_model, [tokenizer.encode(behaviour.PASSAGE)])
    starts = [behaviour.AS_IT_IS, behaviour.AFTER_END]

    def close(values: object, expected: Tensor) -> None:
        torch.testing.assert_close(torch.tensor(values).double(), expected.double(), rtol=1e-4, atol=1e-9)

    blocks = [f"block {layer}" for layer in range(4)]
    assert [(row["start"], row["block"]) for row in figures.data["attention"]] == [
        (start, block) for start in starts for block in blocks
    ]
    close([row["value"] for row in figures.data["attention"]], found.attention[0].flatten(0, 1))
    assert figures.places["attention"] == figures.places["induction"] == ["0", "1", "2"]
    assert [row["part"] for row in figures.data["norms"]] == starts
    close([row["value"] for row in figures.data["norms"]], found.norms[0])
    assert figures.places["norms"] == ["embeddings", *blocks]
    buckets = ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65-128"]
    assert [(row["part"], row["place"]) for row in figures.data["loss"]] == [
        (start, bucket) for start in starts for bucket in buckets
    ]
    close([row["value"] for row in figures.data["loss"]], found.losses[0, :, : len(buckets)].flatten())
    assert [row["block"] for row in figures.data["induction"]] == blocks
    close([row["value"] for row in figures.data["induction"]], heads)
    shares = [answer for answer in asked if answer.unit.startswith("share")]
    assert [row["place"] for row in figures.data["answers"]] == [answer.question for answer in shares]
    for row, answer in zip(figures.data["answers"], shares, strict=True):
        assert (row["value"], row["low"], row["high"]) == (answer.value, answer.low, answer.high)
    assert [control.value for control in figures.controls] == [behaviour.AFTER_END]
