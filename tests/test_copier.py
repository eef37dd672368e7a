"""The model that copies: what it learns from, the two scores, and the stored one, whose heads do what is claimed."""

import hashlib
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import Tensor

from experiments.tools import copier
from experiments.tools.copier import END, SHAPE, Logged, Schedule, copy_losses, shown_twice
from minigpt import GPT2, parity, scaled
from tests.conftest import ROOT
from tests.test_study import run_main

COPIER = ROOT / "weights" / "copier"
LIMIT = 1e-5
"""Losses and shares of attention, in float32, of one machine beside another's."""


@pytest.fixture(scope="module")
def stored() -> GPT2:
    return GPT2.from_pretrained(COPIER)


@pytest.fixture(scope="module")
def fresh() -> GPT2:
    torch.manual_seed(0)
    return GPT2(SHAPE).eval()


def patterns_of(model: GPT2) -> Tensor:
    with torch.no_grad():
        return model.attention_patterns(shown_twice())


# What is learnt from.


def test_a_text_without_jumps_is_a_piece_again_and_again() -> None:
    for text in copier.read(np.random.default_rng(0), 50, 40, jumps=0.0).tolist():
        size = len(set(text))
        assert copier.SHORTEST <= size <= copier.LONGEST
        assert len(set(text[:size])) == size
        assert text[size:] == text[:-size]


def test_a_text_with_jumps_leaves_its_piece_for_another_place_of_it() -> None:
    broken = 0
    texts = copier.read(np.random.default_rng(0), 50, 400, jumps=0.15).tolist()
    for text in texts:
        size, after = len(set(text)), dict[int, list[int]]()
        for one, other in pairwise(text):
            after.setdefault(one, []).append(other)
        assert copier.SHORTEST <= size <= copier.LONGEST
        goes_on = {one: max(set(others), key=others.count) for one, others in after.items()}
        assert len(set(goes_on.values())) == size, "each token of the piece follows one other"
        broken += sum(goes_on[one] != other for one, other in pairwise(text))
    share = broken / (50 * 399)
    assert 0.15 * (1 - 1 / copier.SHORTEST) - 0.02 < share < 0.15, (
        "a jump lands where the reading goes on, now and then"
    )


def test_lengths_and_tokens_are_all_drawn() -> None:
    texts = copier.read(np.random.default_rng(0), 400, 40, jumps=0.0)
    assert {len(set(text)) for text in texts.tolist()} == set(range(copier.SHORTEST, copier.LONGEST + 1))
    assert set(texts.flatten().tolist()) == set(range(copier.TOKENS))


def test_a_token_is_foretold_where_it_followed_the_same_one_before() -> None:
    ids = torch.tensor([[1, 2, 3, 1, 2, 2, 1, 3, 1], [5, 5, 5, 4, 5, 4, 5, 5, 0]])
    assert copier.foretold(ids).int().tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 1, 1, 1, 0]]


def test_a_batch_is_drawn_from_its_seed_and_its_step_alone() -> None:
    one, same = copier.batch_of(3, Schedule()), copier.batch_of(3, Schedule())
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.targets, copier.batch_of(4, Schedule()).targets)
    assert not torch.equal(one.targets, copier.batch_of(3, Schedule(seed=1)).targets)


def test_inputs_are_the_targets_one_later_and_a_weight_belongs_to_its_target() -> None:
    inputs, targets, weights = copier.batch_of(0, Schedule(batch=5))
    assert inputs.shape == targets.shape == weights.shape == (5, SHAPE.n_positions)
    assert (inputs[:, 0] == END).all()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(weights, torch.where(copier.foretold(targets), 1.0, copier.UNFORETOLD))
    assert 0 < float((weights == 1).float().mean()) < 1


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    schedule = Schedule(steps=300, learning_rate=1.0, warmup_steps=50)
    rates = [schedule.rate(step) for step in range(300)]
    assert rates[0] == 0.02 and rates[49:200] == [1.0] * 151
    assert rates[250] == pytest.approx(0.5) and rates[-1] == pytest.approx(0.01)


# The scores.


def test_pieces_are_shown_twice_and_no_token_comes_twice_in_one() -> None:
    ids = shown_twice(7, 16)
    assert ids.shape == (7, 33)
    assert (ids[:, 0] == END).all()
    assert torch.equal(ids[:, 1:17], ids[:, 17:])
    assert all(len(set(text)) == 16 for text in ids[:, 1:17].tolist())
    assert torch.equal(ids, shown_twice(7, 16)) and not torch.equal(ids, shown_twice(7, 16, seed=1))


def attending(key_of: Callable[[int], int], length: int = 5) -> Tensor:
    """Patterns of one head of one block whose queries leave all attention on one key: [1, 1, 1, query, key]."""
    queries = range(2 * length + 1)
    return torch.eye(len(queries))[[max(0, key_of(query)) for query in queries]][None, None, None]


@pytest.mark.parametrize(("back", "share"), [(0, 0.0), (1, 1.0), (2, 0.1), (3, 0.1)])
def test_the_score_of_previous_tokens_is_one_for_the_position_before(back: int, share: float) -> None:
    """Who looks farther back than the text reaches looks at position 0, which is the one before position 1."""
    assert float(copier.previous_token(attending(lambda query: query - back))) == pytest.approx(share)


@pytest.mark.parametrize(("after", "share"), [(-1, 0.0), (0, 0.0), (1, 1.0), (2, 0.0)])
def test_prefix_matching_is_one_for_the_token_after_the_first_copy(after: int, share: float) -> None:
    """Of pieces of five tokens the copy of position q is position q - 5."""
    assert float(copier.prefix_matching(attending(lambda query: query - 5 + after))) == share


def test_prefix_matching_counts_the_second_copy_alone_and_all_of_it() -> None:
    """A head that looks there from the last three positions only, and one that does so from the first copy only."""
    late = attending(lambda query: query - 4 if query >= 8 else 0)
    early = attending(lambda query: query - 4 if query <= 5 else 0)
    assert float(copier.prefix_matching(late)) == pytest.approx(3 / 5)
    assert float(copier.prefix_matching(early)) == 0


def test_scores_belong_to_their_layer_and_head() -> None:
    before, after, none = (attending(of)[0, 0, 0] for of in (lambda q: q - 1, lambda q: q - 4, lambda q: q))
    patterns = torch.stack([torch.stack([none, before]), torch.stack([after, none])])[:, None]  # [layer, 1, head, ...]
    assert copier.previous_token(patterns).tolist() == [[0, 1], [pytest.approx(0.1), 0]]
    assert copier.prefix_matching(patterns).tolist() == [[0, 0], [1, 0]]


def test_copy_losses_are_those_of_the_tokens_that_may_be_known(fresh: GPT2) -> None:
    ids = shown_twice(3, 4)
    with torch.no_grad():
        chances = fresh(ids).log_softmax(-1)
    said = [[-float(chances[text, at - 1, ids[text, at]]) for at in range(1, 9)] for text in range(3)]
    first, second = (np.mean([losses[start : start + 3] for losses in said]) for start in (1, 5))
    assert copy_losses(fresh, ids) == pytest.approx((first, second), rel=LIMIT)


# The training, and what it leaves.


def test_a_short_training_leaves_a_certified_checkpoint_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(
        lambda: typer.run(copier.main), monkeypatch, capfd, "--output", tmp_path / "out", "--steps", 13
    )
    assert code == 0, err
    model, log = GPT2.from_pretrained(tmp_path / "out"), copier.read_log(tmp_path / "out" / copier.LOG_FILE)
    assert [entry.step for entry in log] == [0, 10, 13]
    assert log[-1].first_copy < log[0].first_copy < math.log(SHAPE.vocab_size) + 0.1
    assert parity.certify(model).passed
    assert f"the stored checkpoint, {copier.in_words(copier.logged(model, 13))}" in out
    assert copier.logged(model, 13).second_copy == pytest.approx(log[-1].second_copy, rel=1e-3)  # float16
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in COPIER.iterdir()}


def test_a_log_comes_back_as_it_was_written(tmp_path: Path) -> None:
    log = [Logged(0, 3.5, 3.25, 0.1, 0.0), Logged(10, 1 / 3, 0.2, 1e-9, 0.7)]
    copier.write_log(tmp_path / "log.csv", log)
    assert copier.read_log(tmp_path / "log.csv") == log
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == (
        "step,first_copy,second_copy,previous_token,prefix_matching"
    )


def test_a_step_moves_the_weights_that_it_should_at_its_rate() -> None:
    torch.manual_seed(0)
    model, schedule = GPT2(SHAPE), Schedule(steps=10, batch=2)
    optimizer, before = torch.optim.AdamW(model.parameters(), weight_decay=0.0), model.unembed.weight.clone()
    copier.take_step(model, optimizer, copier.batch_of(0, schedule), schedule, 0)
    moved = (model.unembed.weight - before).detach().abs().max()
    assert float(moved) == pytest.approx(schedule.rate(0), rel=1e-2)  # Adam's first step is the rate


# The stored model.


def test_the_stored_model_is_the_one_that_its_readme_describes_and_is_small() -> None:
    content = (COPIER / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() in (ROOT / "weights" / "README.md").read_text()
    assert len(content) < 2**20


def test_the_stored_model_is_plain_gpt2_and_matches_its_reference(stored: GPT2) -> None:
    assert parity.certify(stored).passed
    assert stored.config == SHAPE


def test_the_stored_model_has_a_previous_token_head_and_induction_heads(stored: GPT2, fresh: GPT2) -> None:
    patterns, others = patterns_of(stored), patterns_of(fresh)
    assert float(copier.previous_token(patterns)[0].max()) > 0.5
    assert float(copier.previous_token(patterns[..., :17, :17])[0].max()) > 0.9, "sharp in the first copy"
    assert float(copier.prefix_matching(patterns)[1].max()) > 0.5
    assert float(copier.prefix_matching(patterns)[0].max()) < 0.1, "no head of block 0 can know"
    assert float(copier.previous_token(others).max()) < 0.15
    assert float(copier.prefix_matching(others).max()) < 0.1


def test_the_stored_model_copies_and_a_fresh_one_guesses(stored: GPT2, fresh: GPT2) -> None:
    first, second = copy_losses(stored, shown_twice(seed=1))
    assert second < 0.2 < math.log(copier.TOKENS) < first
    assert copy_losses(fresh, shown_twice()) == pytest.approx((math.log(SHAPE.vocab_size),) * 2, abs=0.1)


@pytest.mark.parametrize("length", [3, 10, 19])
def test_the_stored_model_copies_pieces_of_any_length(stored: GPT2, length: int) -> None:
    """No fixed distance back does it: the training had 4 to 8 tokens."""
    assert copy_losses(stored, shown_twice(length=length))[1] < 0.2


def test_without_its_previous_token_head_the_model_does_not_copy(stored: GPT2) -> None:
    """The head of block 1 is as it was, and finds nothing."""
    ids = shown_twice()
    with scaled(stored, {"blocks.0.attention.head_scale": 0.0}):
        second, found = copy_losses(stored, ids)[1], copier.prefix_matching(patterns_of(stored))[1]
    assert second > math.log(copier.TOKENS) - 0.1, "no better than a guess"
    assert float(found) < 0.1
    assert copy_losses(stored, ids)[1] < 0.2


def test_the_previous_token_head_is_needed_for_what_it_writes_into_keys_alone(stored: GPT2) -> None:
    """Without the head of block 1 the one of block 0 copies nothing by itself."""
    with scaled(stored, {"blocks.1.attention.head_scale": 0.0}):
        assert copy_losses(stored, shown_twice())[1] > 2


def test_the_log_shows_a_plateau_and_then_a_fall_as_the_heads_appear(stored: GPT2) -> None:
    log = copier.read_log(COPIER / copier.LOG_FILE)
    assert [entry.step for entry in log] == list(range(0, Schedule.steps + 1, copier.LOG_EVERY))
    copied = next(entry for entry in log if entry.second_copy < 0.5)
    plateau = [entry for entry in log if entry.second_copy > 3.2]
    assert len(plateau) >= 8
    assert max(entry.prefix_matching for entry in plateau) < 0.35 < 0.5 < copied.prefix_matching
    assert max(entry.previous_token for entry in plateau) < 0.2 < 0.4 < copied.previous_token
    assert all(entry.first_copy > math.log(copier.TOKENS) - 0.1 for entry in log)
    last = copier.logged(stored, log[-1].step)
    assert (last.second_copy, last.previous_token, last.prefix_matching) == pytest.approx(
        (log[-1].second_copy, log[-1].previous_token, log[-1].prefix_matching), rel=0.05, abs=0.002
    )
