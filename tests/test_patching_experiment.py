"""Experiments on pairs of prompts: every number beside a plain loop of single runs, in float64."""

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import knockout, patching
from experiments.harness import pairs, running, writing
from experiments.harness.experiment import Study
from experiments.harness.pairs import GROUPS, Pair, PairTexts, Words, differences, read_pairs
from experiments.harness.ranks import Ranks
from experiments.harness.table import Table
from experiments.knockout import CHANGE, EARLIER, KEYS, LOST, ONE, SPAN, Knockout, KnockoutSettings
from experiments.patching import ESTIMATED, HEAD, PATCHED, SITES, Patching, PatchingSettings
from minigpt import GPT2, Tokenizer, parity, patch, record, scaled
from tests.conftest import SMALL, TINY
from tests.seen import EXACT, shown
from tests.studies import LETTERS, small_model
from tests.test_study import run_main

Run = Callable[..., tuple[int, str, str]]
WORDS = Words("ab cdefg", "ab xyefg", "q", "r")
"""Of single letters: the third and the fourth token differ after the space, so there are tokens of every group."""
DIFFERING, LAST, LENGTH = [3, 4], 7, 8
OTHERS = (Words("mno pq", "mxo pq", "s", "t"), Words("hijklm", "hijxlm", "u", "v"))
N_LAYER, N_HEAD = SMALL["n_layer"], SMALL["n_head"]
LOOP = {"rtol": 1e-9, "atol": 1e-11}
"""Sums of some hundred float64 products, in another order."""


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.encoded(WORDS, LETTERS, SMALL["n_positions"])


def logit_difference(model: GPT2, ids: Sequence[int], pair: Pair) -> float:
    """After the last token."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    return float(logits[pair.answer] - logits[pair.foil])


def settings(words: Words | None = WORDS, **more: Any) -> dict[str, Any]:
    """Those of a run on the small model."""
    named = words._asdict() if words else {"clean": None}
    return {"model": "small", "prompt": named.pop("clean"), **named, "parity": False, "dtype": "float64", **more}


def of_prompt(kind: type[Any], words: Words = WORDS, **asked: Any) -> tuple[Any, Study[Any]]:
    """An experiment on one pair, and what came of it."""
    more = {"direction": "denoising"} if kind is Patching else {"span": 3}
    of = PatchingSettings if kind is Patching else KnockoutSettings
    experiment = kind(of(**settings(words, **{**more, **asked})))
    return experiment, running.run_prompt(experiment, small_model(), LETTERS)


def write_pairs(path: Path, some: Sequence[Words]) -> Path:
    path.write_text("\n".join(json.dumps(words._asdict()) for words in some) + "\n")
    return path


def of_corpus(kind: type[Any], folder: Path, some: Sequence[Words], **asked: Any) -> tuple[Any, Study[Any]]:
    """An experiment on several pairs, and what came of it."""
    texts = PairTexts.of(write_pairs(folder / "pairs.jsonl", some), "text", 16, None)
    more = {"direction": "denoising"} if kind is Patching else {"span": 3}
    of = PatchingSettings if kind is Patching else KnockoutSettings
    experiment = kind(of(**settings(None, texts=texts, **{**more, **asked})))
    with ExitStack() as held:
        study = running.run_over_corpus(experiment, small_model(), LETTERS, folder / "out", Ranks(), held)
    assert study is not None
    return experiment, study


@pytest.fixture(scope="module")
def denoised() -> tuple[Patching, Study[Any]]:
    return of_prompt(Patching)


@pytest.fixture(scope="module")
def knocked() -> tuple[Knockout, Study[Any]]:
    return of_prompt(Knockout)


# Pairs.


def test_a_pair_is_one_list_and_comes_back(pair: Pair) -> None:
    assert pair.ids == [*pair.clean, *pair.corrupted, pair.answer, pair.foil]
    assert Pair.of(pair.ids) == pair
    assert (LETTERS.decode(pair.clean), LETTERS.decode(pair.corrupted)) == WORDS[:2]
    assert LETTERS.tokens(pair.tokens) == ["q", "r"]


@pytest.mark.parametrize(
    ("clean", "corrupted", "groups"),
    [
        ("ab cdefg", "ab xyefg", [[0, 1, 2], [3, 4], [5, 6], [7]]),
        ("abcdef", "xbcyef", [[], [0, 3], [1, 2, 4], [5]]),
        ("abc", "abx", [[0, 1], [2], [], [2]]),
        ("ab", "xb", [[], [0], [], [1]]),
        ("abcd", "abxd", [[0, 1], [2], [], [3]]),
    ],
)
def test_positions_are_before_in_between_or_where_the_prompts_differ(
    clean: str, corrupted: str, groups: list[list[int]]
) -> None:
    found = Pair.encoded(Words(clean, corrupted, "q", "r"), LETTERS, 24).groups
    assert list(found) == list(GROUPS)
    assert list(found.values()) == groups


class Spaced:
    """A tokenizer of words with the space before them; a word without one is its letters."""

    def encode(self, text: str) -> list[int]:
        """One id for each."""
        return [len(of) for of in self._split(text)]

    def tokens(self, ids: list[int]) -> list[str]:
        """Something to read."""
        return [f"<{number}>" for number in ids]

    def _split(self, text: str) -> list[str]:
        first, *words = text.split(" ")
        return [*first, *(f" {word}" for word in words)]


SPACED = cast("Tokenizer", Spaced())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corrupted": "ab xyef"}, r"8 tokens \['a', 'b', ' ', 'c', 'd', 'e', 'f', 'g'\] and 7 tokens \['a', 'b', ' '"),
        ({"corrupted": "ab cdefg"}, "two prompts are the same, 'ab cdefg'"),
        ({"answer": "qq"}, r"answer 'qq' is 2 tokens \['q', 'q'\]; expected one.*space in front"),
        ({"foil": ""}, r"foil '' is 0 tokens \[\]; expected one"),
        ({"foil": " r"}, r"foil ' r' is 2 tokens \[' ', 'r'\]; expected one: give a word that is one\.$"),
        ({"foil": "q"}, "answer and the foil are both 'q'"),
        ({"clean": "a", "corrupted": "b"}, "one token each"),
        ({"clean": "a" * 25, "corrupted": "b" * 25}, "25 tokens, more than 24, the model's positions; shorten"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_a_sentence(change: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pair.encoded(WORDS._replace(**change), LETTERS, 24)


def test_an_answer_that_is_one_token_behind_a_space_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"answer 'he' is 2 tokens .*with a space in front, ' he', it is one"):
        Pair.encoded(Words("a man", "a woman", "he", " she"), SPACED, 24)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"clean": "a", "answer": 3, "foil": "b"}', "line 2 has no text in corrupted, answer; write lines such as"),
        ('["a", "b"]', "line 2 is no object with the fields clean, corrupted, answer, foil"),
        ('{"clean": ', "line 2 is not JSON"),
        ('{"clean": "ab", "corrupted": "abc", "answer": "q", "foil": "r"}', "line 2: The prompts have different len"),
        (
            json.dumps({**WORDS._asdict(), "clean": "a" * 17, "corrupted": "b" * 17}),
            "17 tokens, more than 16, --window",
        ),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", [WORDS])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=said):
        list(PairTexts.of(path, "text", 16, None).pairs(LETTERS))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"expected a \.jsonl file, with lines such as \{"):
        list(read_pairs(tmp_path / "pairs.txt"))
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        list(read_pairs(tmp_path / "pairs.jsonl"))
    (tmp_path / "pairs.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="has no line with a pair"):
        PairTexts.of(tmp_path / "pairs.jsonl", "text", 16, None).first_windows(LETTERS, 2)


def test_pairs_of_a_file_are_windows_taken_whole(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", [WORDS, *OTHERS])
    path.write_text(path.read_text().replace("\n", "\n\n"))
    texts, expected = PairTexts.of(path, "text", 16, None), [Pair.encoded(of, LETTERS, 24) for of in (WORDS, *OTHERS)]
    counts = {"texts": 0, "windows": 0, "tokens": 0, "skipped": 0}
    assert [Pair.of(ids) for ids in texts.windows(LETTERS, counts)] == expected
    assert counts == {"texts": 3, "windows": 3, "tokens": 8 + 6 + 6, "skipped": 0}
    assert [number for number, _ in texts.pairs(LETTERS)] == [1, 3, 5]
    assert texts.first_windows(LETTERS, 2) == [of.ids for of in expected[:2]]
    limited = PairTexts.of(path, "text", 16, 2)
    assert [Pair.of(ids) for ids in limited.windows(LETTERS)] == expected[:2]


def test_the_two_logit_differences_are_the_models(pair: Pair) -> None:
    found, model = differences(small_model(), pair), small_model()
    assert found == pytest.approx([logit_difference(model, of, pair) for of in (pair.clean, pair.corrupted)], rel=1e-9)


def test_pairs_that_the_model_does_not_tell_apart_are_named_by_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [WORDS, *OTHERS]
    both = [differences(small_model(), Pair.encoded(of, LETTERS, 24)) for of in some]
    gaps = [abs(clean - corrupted) for clean, corrupted in both]
    texts = PairTexts.of(write_pairs(tmp_path / "pairs.jsonl", some), "text", 16, None)
    monkeypatch.setattr(pairs, "LEAST_GAP", min(gaps) * 0.999)
    pairs.check_told_apart(small_model(), LETTERS, texts)
    smallest = sorted(range(3), key=gaps.__getitem__)
    monkeypatch.setattr(pairs, "LEAST_GAP", (gaps[smallest[1]] + gaps[smallest[2]]) / 2)
    named = ", ".join(str(1 + number) for number in sorted(smallest[:2]))
    with pytest.raises(ValueError, match=f"two prompts of line {named} apart"):
        pairs.check_told_apart(small_model(), LETTERS, texts)
    monkeypatch.setattr(pairs, "LEAST_GAP", gaps[0] + 1e-9)
    limited = PairTexts.of(tmp_path / "pairs.jsonl", "text", 16, 1)
    with pytest.raises(ValueError, match="two prompts of line 1 apart"):
        pairs.check_told_apart(small_model(), LETTERS, limited)


# Patching beside a plain loop.


def patched_by_hand(site: str, layer: int, other: list[int], where: Tensor) -> dict[str, Tensor]:
    """Scale and shift, written out: `where` is 1 at what is replaced, of positions or of heads."""
    path = f"blocks.{layer}.attention.head" if site == HEAD else f"blocks.{layer}.{site}"
    values = record(small_model(), [other], [path])[path]
    mask = where.double()[None, None, :, None] if site == HEAD else where.double()[None, :, None]
    scale = (1 - mask)[..., 0] if site == HEAD else 1 - mask
    return {f"{path}_scale": scale, f"{path}_shift": mask * values}


def loop(site: str, layer: int, where: Tensor, pair: Pair, direction: str) -> float:
    """The share of the gap, from one run inside `scaled`."""
    clean, corrupted = (logit_difference(small_model(), ids, pair) for ids in (pair.clean, pair.corrupted))
    base, other = (pair.corrupted, pair.clean) if direction == "denoising" else (pair.clean, pair.corrupted)
    with scaled(small_model(), patched_by_hand(site, layer, other, where)):
        found = logit_difference(small_model(), base, pair)
    if direction == "denoising":
        return (found - corrupted) / (clean - corrupted)
    return (clean - found) / (clean - corrupted)


def one_hot(size: int, at: Sequence[int]) -> Tensor:
    return torch.zeros(size).index_fill(0, torch.tensor(list(at)), 1.0)


PLACES: dict[Any, list[int]] = {
    "tokens that differ": DIFFERING,
    "tokens between": [5, 6],
    "last token": [LAST],
    **{at: [at] for at in range(LENGTH)},
}


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_share_is_that_of_a_run_by_itself(pair: Pair, direction: str) -> None:
    experiment, study = of_prompt(Patching, direction=direction)
    table = experiment.shares(study).at(method=PATCHED)
    assert list(table.axes["at"]) == list(PLACES)
    for site, layer, at in itertools.product(SITES, range(N_LAYER), PLACES):
        expected = loop(site, layer, one_hot(LENGTH, PLACES[at]), pair, direction)
        assert float(table.at(site=site, layer=layer, at=at).value) == pytest.approx(expected, rel=1e-8, abs=1e-10)
    heads = study.tables["heads"].at(method=PATCHED)
    for layer, head in itertools.product(range(N_LAYER), range(N_HEAD)):
        expected = loop(HEAD, layer, one_hot(N_HEAD, [head]), pair, direction)
        assert float(heads.at(layer=layer, head=head).value) == pytest.approx(expected, rel=1e-8, abs=1e-10)
    moved = "share recovered" if direction == "denoising" else "share lost"
    assert list(study.tables["values"].axes["metric"]) == [moved]


def test_an_output_patched_at_every_later_depth_is_a_run_from_there(pair: Pair, denoised: Any) -> None:
    """Without the library's own patches: the blocks are run by hand."""
    model, (experiment, study) = small_model(), denoised
    clean, corrupted = (list(model.depths(torch.tensor([ids]))) for ids in (pair.clean, pair.corrupted))
    ends = [logit_difference(model, ids, pair) for ids in (pair.clean, pair.corrupted)]
    for layer in range(N_LAYER):
        x = corrupted[layer + 1].clone()
        x[:, DIFFERING] = clean[layer + 1][:, DIFFERING]
        with torch.no_grad():
            for block in model.blocks[layer + 1 :]:
                x = block(x)
            logits = model.unembed(model.final_norm(x))[0, -1]
        expected = (float(logits[pair.answer] - logits[pair.foil]) - ends[1]) / (ends[0] - ends[1])
        found = experiment.shares(study).at(method=PATCHED, site="output", layer=layer, at="tokens that differ")
        assert float(found.value) == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_estimates_are_the_slope_of_a_little_patching(pair: Pair, denoised: Any) -> None:
    model, (experiment, study), little = small_model(), denoised, 1e-4
    clean, corrupted = (logit_difference(model, ids, pair) for ids in (pair.clean, pair.corrupted))

    def slope(site: str, layer: int, where: Tensor) -> float:
        ends = []
        for amount in (little, -little):
            with scaled(model, patched_by_hand(site, layer, pair.clean, amount * where.double())):
                ends.append(logit_difference(model, pair.corrupted, pair))
        return (ends[0] - ends[1]) / (2 * little) / (clean - corrupted)

    table = experiment.shares(study).at(method=ESTIMATED)
    for site, layer, at in itertools.product(SITES, (0, 2), PLACES):
        expected = slope(site, layer, one_hot(LENGTH, PLACES[at]))
        assert float(table.at(site=site, layer=layer, at=at).value) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    heads = study.tables["heads"].at(method=ESTIMATED)
    for layer, head in itertools.product((0, 2), range(N_HEAD)):
        expected = slope(HEAD, layer, one_hot(N_HEAD, [head]))
        assert float(heads.at(layer=layer, head=head).value) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_agreement_is_of_the_positions_from_the_first_that_differs(denoised: Any) -> None:
    experiment, study = denoised
    agreement, shares = study.tables["agreement"], experiment.shares(study)
    for site in (*SITES, HEAD):
        table = study.tables["heads"] if site == HEAD else shares.at(site=site, at=[3, 4, 5, 6, 7])
        one, other = (table.at(method=method).value.flatten().numpy() for method in (PATCHED, ESTIMATED))
        assert float(agreement.at(metric="correlation", site=site).value) == pytest.approx(
            np.corrcoef(one, other)[0, 1]
        )
        assert float(agreement.at(metric="largest error", site=site).value) == pytest.approx(abs(one - other).max())


def test_what_lies_before_the_first_difference_carries_nothing(denoised: Any) -> None:
    experiment, study = denoised
    assert float(experiment.shares(study).at(at=[0, 1, 2]).value.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", [Patching, Knockout])
def test_little_memory_for_values_gives_the_same_numbers(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    most, whole = 3 * LENGTH * SMALL["n_embd"] * 8, of_prompt(kind)[1]
    module, seen = {Patching: patching, Knockout: knockout}[kind], list[int]()
    compared, recorded = module.compare_logits, record

    def watched(model: GPT2, ids: Any, interventions: Sequence[dict[str, Tensor]], *more: Any) -> Any:
        seen.append(sum(value.nbytes for of in interventions for value in of.values() if isinstance(value, Tensor)))
        return compared(model, ids, interventions, *more)

    def watched_record(*given: Any) -> Any:
        values = recorded(*given)
        seen.append(sum(value.nbytes for value in values.values()))
        return values

    monkeypatch.setattr(pairs, "MOST_BYTES", most)
    monkeypatch.setattr(module, "compare_logits", watched)
    if kind is Patching:
        monkeypatch.setattr(module, "record", watched_record)
    monkeypatch.setattr(kind, "check", lambda *_: running.Checked())
    split = of_prompt(kind)[1]
    for name, table in whole.tables.items():
        torch.testing.assert_close(split.tables[name].value, table.value, equal_nan=True, **LOOP)
    scales = 3 * LENGTH * N_HEAD * 8
    assert max(seen) <= most + scales, "values of patches and of records, but for the scales"
    assert len(seen) >= 10


# Oracles.


def test_the_oracles_of_patching_hold_and_say_how_well(denoised: Any) -> None:
    first, second = denoised[1].checked.checks
    assert first["figure"] <= 1
    assert second["figure"] <= patching.ROUNDINGS / 4


@pytest.mark.parametrize("sabotage", ["another position", "another run", "a little less"])
def test_a_sabotaged_patch_is_noticed(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(site: str, values: Tensor, **where: Any) -> dict[str, Tensor]:
        if sabotage == "another position" and "positions" in where:
            where["positions"] = [max(0, at - 1) for at in where["positions"]]
        if sabotage == "another run":
            values = values + 1e-6
        return patch(site, values, **where, **({"amount": 0.999999} if sabotage == "a little less" else {}))

    monkeypatch.setattr(patching, "patch", wrong)
    with pytest.raises(parity.CheckError, match=r"it is not so that .* roundings, 80 are allowed"):
        of_prompt(Patching)


@pytest.mark.parametrize("sabotage", ["another key", "not minus infinity", "another query", "all heads at once"])
def test_a_sabotaged_knockout_is_noticed(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = knockout.knock

    def wrong(pair: Pair, keys: Sequence[int], blocks: Sequence[int], *heads: int) -> dict[str, Tensor]:
        if sabotage == "another key":
            keys = [max(0, key - 1) for key in keys]
        found = {name: shift.clone() for name, shift in right(pair, keys, blocks, *heads).items()}
        for shift in found.values():
            if sabotage == "not minus infinity":
                shift.clamp_(min=-20)
            if sabotage == "another query":
                shift[:, :, -2, 0] = -torch.inf
            if sabotage == "all heads at once":
                shift[:, :, -1, -1] = -0.01
        return found

    monkeypatch.setattr(knockout, "knock", wrong)
    with pytest.raises(parity.CheckError, match="it is not so that"):
        of_prompt(Knockout)


def test_a_table_in_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Knockout._changes
    monkeypatch.setattr(Knockout, "_changes", lambda *given: right(*given)[::-1])
    with pytest.raises(parity.CheckError, match="changes the logit difference as the table says"):
        of_prompt(Knockout)


# Knockout beside a plain loop.


def cut_by_hand(pair: Pair, keys: Sequence[int], blocks: Sequence[int], head: int | None = None) -> float:
    """The change of the logit difference, from one run inside `scaled`."""
    shift = torch.zeros(1, N_HEAD, LENGTH, LENGTH, dtype=torch.float64)
    for key in keys:
        shift[0, range(N_HEAD) if head is None else [head], LENGTH - 1, key] = -torch.inf
    with scaled(small_model(), {f"blocks.{block}.attention.score_shift": shift for block in blocks}):
        found = logit_difference(small_model(), pair.clean, pair)
    return found - logit_difference(small_model(), pair.clean, pair)


CUT: dict[Any, list[int]] = {
    "tokens before": [0, 1, 2],
    "tokens that differ": DIFFERING,
    "tokens between": [5, 6],
    EARLIER: [*range(7)],
    **{key: [key] for key in range(7)},
}
SPANS = [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
"""Of three blocks around each of four."""


def test_every_change_is_that_of_a_run_by_itself(pair: Pair, knocked: Any) -> None:
    _, study = knocked
    table = study.tables["values"].at(metric=CHANGE)
    assert list(table.axes["key"]) == list(CUT)
    for layer, key in itertools.product(range(N_LAYER), CUT):
        for blocks, cut in ((ONE, [layer]), (SPAN, SPANS[layer])):
            found = float(table.at(blocks=blocks, layer=layer, key=key).value)
            assert found == pytest.approx(cut_by_hand(pair, CUT[key], cut), rel=1e-8, abs=1e-10)
    heads = study.tables["heads"].at(metric=CHANGE)
    for layer, head in itertools.product(range(N_LAYER), range(N_HEAD)):
        expected = cut_by_hand(pair, DIFFERING, [layer], head)
        assert float(heads.at(layer=layer, head=head).value) == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_what_is_lost_is_the_change_as_a_share_of_the_gap(pair: Pair, knocked: Any) -> None:
    clean, corrupted = (logit_difference(small_model(), ids, pair) for ids in (pair.clean, pair.corrupted))
    for name in ("values", "heads"):
        change, lost = (knocked[1].tables[name].at(metric=metric).value for metric in (CHANGE, LOST))
        torch.testing.assert_close(lost, -change / (clean - corrupted), **LOOP)


@pytest.mark.parametrize(("n_layer", "span"), [(48, 9), (36, 7), (24, 5), (12, 3), (6, 1), (4, 1), (1, 1)])
def test_a_span_is_the_published_share_of_the_blocks(n_layer: int, span: int) -> None:
    assert knockout.published_span(n_layer) == span


def test_a_pattern_of_zeros_and_shares_is_held_against_the_clean_one() -> None:
    clean = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]).expand(1, 2, 3, 3)
    cut = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.375, 0.625]]).expand(1, 2, 3, 3)
    assert knockout.off_by(cut, clean, [0]) < 1e-7
    assert knockout.off_by(clean, clean, [0]) == pytest.approx(0.16)
    assert knockout.off_by(cut.flip(2), clean, [0]) > 0.1


def test_a_pair_that_differs_in_its_last_token_has_no_such_edge() -> None:
    experiment, study = of_prompt(Knockout, Words("abcdef", "abcdex", "q", "r"))
    table = study.tables["values"]
    assert bool(table.at(key="tokens that differ").value.isnan().all())
    assert bool(table.at(key=EARLIER).value.isfinite().all())
    assert bool(study.tables["heads"].value.isnan().all())
    said = "\n".join(experiment.lines(study, 100))
    assert "tokens that differ: undefined, the pair has none." in said
    assert [of.verdict for of in experiment.verdicts(study)][1::2] == ["undecided", "undecided"]


# Undefined shares, and corpora.


def test_no_change_is_no_share_without_a_sign() -> None:
    for gap in (2.0, -2.0):
        for nothing in (0.0, -0.0):
            assert str(float(pairs.share_of(torch.tensor(nothing), gap))) == "0.0"
    assert float(pairs.share_of(torch.tensor(1.0), -2.0)) == -0.5
    assert math.isnan(float(pairs.share_of(torch.tensor(1.0), -0.09)))


@pytest.mark.parametrize("kind", [Patching, Knockout])
def test_shares_of_hardly_any_gap_are_undefined_in_words(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "LEAST_GAP", 1e9)
    experiment, study = of_prompt(kind)
    rows = list(experiment.rows(study))
    assert not [row for row in rows if str(row["metric"]).startswith(("share", "lost"))]
    assert [row["value"] for row in rows if row["metric"] == "logit difference"]
    assert "undefined: the logit differences are less than 1000000000.0 apart" in "\n".join(
        experiment.lines(study, 100)
    )
    assert {of.verdict for of in experiment.verdicts(study)[1:]} == {"undecided"}


@pytest.mark.parametrize("kind", [Patching, Knockout])
def test_over_a_corpus_every_number_is_the_mean_of_the_pairs(kind: type[Any], tmp_path: Path) -> None:
    some, (_, study) = (WORDS, OTHERS[0]), of_corpus(kind, tmp_path, (WORDS, OTHERS[0]))
    alone = [of_prompt(kind, words)[1] for words in some]
    axis = "at" if kind is Patching else "key"
    groups = list(patching.SHOWN_GROUPS if kind is Patching else KEYS)
    assert list(study.tables["values"].axes[axis]) == groups
    for name in ("values", "heads", "ends"):
        each = [of.tables[name].at(**({axis: groups} if name == "values" else {})).value for of in alone]
        torch.testing.assert_close(study.tables[name].value, torch.stack(each).mean(0), equal_nan=True, **LOOP)
    assert study.tables["values"].windows == 2
    assert study.tokens == []


def test_a_group_that_a_pair_does_not_have_is_not_a_number_and_says_so(tmp_path: Path) -> None:
    some = [WORDS, OTHERS[0], Words("abcd", "abxd", "q", "r")]
    experiment, study = of_corpus(Patching, tmp_path, some)
    table = experiment.shares(study)
    assert bool(table.at(at="tokens between").value.isnan().all())
    assert bool(table.at(at=["tokens that differ", "last token"]).value.isfinite().all())
    assert "tokens between: undefined, of 3 pairs 1 have none." in list(experiment.lines(study, 100))
    assert bool(study.tables["agreement"].value.isfinite().all())
    figures = experiment.figures(study)
    cells = shown(figures, "places").cells()
    assert {column for _, column in cells} == {"tokens that differ", "last token"}


def test_the_clean_prompts_tokens_are_shown(denoised: Any, knocked: Any) -> None:
    for _, study in (denoised, knocked):
        assert study.tokens == list(WORDS.clean)


# Verdicts.


def number(value: float, low: float | None = None, high: float | None = None) -> Table:
    ends = {} if low is None else {"low": torch.tensor(low), "high": torch.tensor(high)}
    return Table({}, torch.tensor(value), ends)


@pytest.mark.parametrize(
    ("share", "verdict"),
    [
        (number(0.91), "holds"),
        (number(0.9), "does not hold"),
        (number(math.nan), "undecided"),
        (number(0.95, 0.89, 0.99), "undecided"),
        (number(0.95, 0.91, 0.99), "holds"),
    ],
)
def test_a_place_carries_it_above_nine_tenths(share: Table, verdict: str) -> None:
    decision = patching._carried(share, "the output of block 0", "recovered")
    assert decision.verdict == verdict
    assert "block 0" in decision.evidence


@pytest.mark.parametrize(("gap", "verdict"), [(1.1, "holds"), (1.0, "does not hold"), (-3.0, "does not hold")])
def test_prompts_are_told_apart_by_more_than_one_logit_in_the_right_sense(gap: float, verdict: str) -> None:
    assert pairs.told_apart(number(0.5), number(gap)).verdict == verdict


def by_head(values: Sequence[Sequence[float]]) -> Table:
    return Table({"layer": range(len(values)), "head": range(len(values[0]))}, torch.tensor(values))


@pytest.mark.parametrize("decide", [lambda heads: patching._one_head(heads, "lost"), knockout._one_head])
@pytest.mark.parametrize(
    ("values", "verdict", "name"),
    [
        ([[0.0, 0.1, 0.1], [0.1, 0.0, 0.21]], "holds", "head 2 of block 1"),
        ([[0.0, 0.2, 0.1], [0.1, 0.0, 0.11]], "does not hold", "head 1 of block 0"),
        ([[math.nan, 0.1, 0.0], [0.3, 0.0, 0.0]], "holds", "head 0 of block 1"),
    ],
)
def test_a_single_head_is_named(decide: Any, values: list[list[float]], verdict: str, name: str) -> None:
    decision = decide(by_head(values))
    assert (decision.verdict, decision.figures["head"]) == (verdict, name)
    assert name in decision.evidence


@pytest.mark.parametrize(
    ("correlation", "verdict"),
    [([0.95, 0.91, 0.99, 0.92], "holds"), ([0.95, 0.9, 0.99, 0.92], "does not hold")],
)
def test_estimates_agree_when_they_do_at_every_site(correlation: list[float], verdict: str) -> None:
    table = Table({"metric": ["correlation", "largest error"], "site": [*SITES, HEAD]}, torch.tensor([correlation] * 2))
    assert patching._agrees(table).verdict == verdict


@pytest.mark.parametrize(
    ("lost", "verdict", "peak"),
    [([0.1, 0.26, 0.2], "holds", 1), ([0.1, 0.2, 0.25], "does not hold", 2), ([math.nan] * 3, "undecided", 0)],
)
def test_edges_are_needed_when_a_quarter_is_lost_in_a_span(lost: list[float], verdict: str, peak: int) -> None:
    decision = knockout._needed(Table({"layer": range(3)}, torch.tensor(lost)), 3)
    assert (decision.verdict, decision.figures["block"]) == (verdict, peak)


@pytest.mark.parametrize(
    ("before", "between", "verdict"),
    [
        ([0.1, 0.2], [0.0, -3.0], "holds"),
        ([0.1, 0.21], [0.0, 0.1], "does not hold"),
        ([0.1, 0.1], [0.0, 0.3], "does not hold"),
    ],
)
def test_other_tokens_are_not_needed_below_a_fifth(
    before: list[float], between: list[float], verdict: str, knocked: Any
) -> None:
    spans = {
        name: Table({"layer": range(2)}, torch.tensor(of))
        for name, of in (("tokens before", before), ("tokens between", between))
    }
    assert knockout._spared(spans, knocked[1]).verdict == verdict


def test_verdicts_read_the_blocks_that_they_name(denoised: Any, knocked: Any) -> None:
    experiment, study = denoised
    shares = experiment.shares(study).at(method=PATCHED, site="output")
    found = experiment.verdicts(study)
    assert found[1].figures["share"] == float(shares.at(layer=0, at="tokens that differ").value)
    assert found[2].figures["share"] == float(shares.at(layer=N_LAYER - 2, at="last token").value)
    spans = knocked[1].tables["values"].at(metric=LOST, blocks=SPAN, key="tokens that differ")
    assert knocked[0].verdicts(knocked[1])[1].figures["lost"] == spans.value.tolist()


# What a person sees.


def same(found: dict[Any, float], expected: dict[Any, Any]) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(float(value), rel=EXACT, abs=1e-9)


TOKENS = [f"{at} {'·' if letter == ' ' else letter}" for at, letter in enumerate(WORDS.clean)]
BLOCKS = [f"block {layer}" for layer in range(N_LAYER)]


def test_the_heat_maps_of_patching_show_the_table(denoised: Any) -> None:
    experiment, study = denoised
    figures, shares = experiment.figures(study), experiment.shares(study)
    for site, method in itertools.product(SITES, (PATCHED, ESTIMATED)):
        table = shares.at(site=site, method=method)
        cells = shown(figures, "places", site=site, method=method).cells()
        places = itertools.product(range(N_LAYER), range(LENGTH))
        same(cells, {(BLOCKS[of], TOKENS[at]): table.at(layer=of, at=at).value for of, at in places})
    for method in (PATCHED, ESTIMATED):
        table, cells = study.tables["heads"].at(method=method), shown(figures, "heads", method=method).cells()
        heads = itertools.product(range(N_LAYER), range(N_HEAD))
        same(cells, {(BLOCKS[of], str(head)): table.at(layer=of, head=head).value for of, head in heads})
    assert shown(figures, "places").legend_title == "share of the gap recovered"


def test_a_point_is_a_place_with_both_shares(denoised: Any) -> None:
    experiment, study = denoised
    figures = experiment.figures(study)
    for site in (*SITES, HEAD):
        chart = shown(figures, "estimates", of=site)
        heads = site == HEAD
        table = study.tables["heads"] if heads else experiment.shares(study).at(site=site, at=list(range(LENGTH)))
        both = [table.at(method=method).value.flatten().tolist() for method in (PATCHED, ESTIMATED)]
        names = [f"block {of}, head {head}" for of in range(N_LAYER) for head in range(N_HEAD)]
        names = names if heads else [f"block {of}, {token}" for of in range(N_LAYER) for token in TOKENS]
        points = {mark.said["place"]: mark for mark in chart.of("symbol")}
        assert set(points) == set(names)
        for name, measured, estimated in zip(names, *both, strict=True):
            mark = points[name]
            reach = max(chart.x.reach, chart.y.reach)
            assert chart.x.number(float(mark.item["x"])) == pytest.approx(measured, abs=1e-3 * reach)
            assert chart.y.number(mark.top) == pytest.approx(estimated, abs=1e-3 * reach)
        assert (chart.x.title, chart.y.title) == ("patched share", "estimated share")


def test_the_heat_maps_of_knockout_show_the_table(knocked: Any) -> None:
    experiment, study = knocked
    figures = experiment.figures(study)
    for blocks in (ONE, SPAN):
        table = study.tables["values"].at(metric=CHANGE, blocks=blocks)
        cells = shown(figures, "keys", blocks=blocks).cells()
        places = itertools.product(range(N_LAYER), range(LENGTH - 1))
        same(cells, {(BLOCKS[of], TOKENS[key]): table.at(layer=of, key=key).value for of, key in places})
    table, cells = study.tables["heads"].at(metric=CHANGE), shown(figures, "heads").cells()
    heads = itertools.product(range(N_LAYER), range(N_HEAD))
    same(cells, {(BLOCKS[of], str(head)): table.at(layer=of, head=head).value for of, head in heads})
    assert [label for _, label in figures.controls[0].options] == ["3 blocks around each", "each block alone"]


def test_the_terminal_has_a_line_for_each_block_and_the_heads_in_order(denoised: Any, knocked: Any) -> None:
    experiment, study = denoised
    table = experiment.shares(study).at(method=PATCHED, site="output", at=list(patching.SHOWN_GROUPS))
    cut = knocked[1].tables["values"].at(metric=CHANGE, blocks=SPAN, key=list(KEYS))
    for ran, values, name in ((experiment, table, "at"), (knocked[0], cut, "key")):
        lines = list(ran.lines(denoised[1] if ran is experiment else knocked[1], 100))
        head = next(line for line in lines if "tokens that differ" in line and "block" not in line and ":" not in line)
        assert [head.index(label) for label in values.axes[name]] == sorted(map(head.index, values.axes[name]))
        for layer in range(N_LAYER):
            (line,) = (line for line in lines if line.strip().startswith(f"block {layer} "))
            said = [float(word) for word in line.split()[2:]]
            assert said == pytest.approx(values.at(layer=layer).value.tolist(), rel=6e-3)
    heads = study.tables["heads"].at(method=PATCHED)
    values = [float(of.value) for _, of in pairs.top_heads(heads, 5)]
    assert values == sorted(heads.value.flatten().tolist(), reverse=True)[:5]
    assert pairs.top_heads(heads, 1)[0][0] in " ".join(experiment.lines(study, 100))


# The command line.


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Ask weights/tiny, without figures and report."""
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    arguments = ("--model", TINY, "--output", tmp_path / "out")
    yield lambda module, *more: run_main(module.main, monkeypatch, capfd, *arguments, *more)


SHORT = ("--prompt", "The man said that", "--corrupted", "The woman said that", "--answer", " he", "--foil", " she")


@pytest.mark.parametrize("module", [patching, knockout])
def test_table_summary_and_terminal_say_the_same_of_tiny(module: Any, run: Run, tmp_path: Path, tiny: GPT2) -> None:
    code, out, err = run(module, *SHORT)
    assert (code, err) == (0, "")
    with (tmp_path / "out" / f"{module.__name__.rpartition('.')[2]}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["run"]: float(row["value"]) for row in rows if row["metric"] == "logit difference"}
    tokenizer = Tokenizer.from_pretrained(TINY)
    pair = Pair.encoded(Words(*SHORT[1::2]), tokenizer, 64)
    ends = [logit_difference(tiny, ids, pair) for ids in (pair.clean, pair.corrupted)]
    assert [found["clean"], found["corrupted"], found["gap"]] == pytest.approx([*ends, ends[0] - ends[1]], abs=1e-4)
    assert f"logit of ' he' minus that of ' she': {found['clean']:.3g} after 'The man said that'," in out
    assert f"{found['corrupted']:.3g} after 'The woman said that'" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tokens"] == tokenizer.tokens(pair.clean)
    assert [check["passed"] for check in summary["checks"]] == [True] * len(summary["checks"])
    assert summary["settings"]["corrupted"] == "The woman said that"
    values = [row for row in rows if row["metric"] not in ("logit difference", "correlation", "largest error")]
    assert all(float(row["error"]) < 1e-3 for row in values)
    places = 3 + len(pair.clean) if module is patching else 2 * (4 + len(pair.clean) - 1)
    empty = [group for group, positions in pair.groups.items() if not positions]
    assert empty == []
    expected = 2 * 12 * (3 * places + 3) if module is patching else 2 * 12 * (places + 3)
    assert len(values) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "The man"), "--corrupted, --answer, --foil not given; a pair needs --prompt"),
        (("--texts", "pairs.jsonl", "--foil", " she"), "--texts brings both prompts"),
        (("--texts", "pairs.jsonl", "--text-column", "x"), "--text-column is for texts"),
        ((*SHORT[:3], "The two women said that", *SHORT[4:]), "The prompts have different lengths: 4 tokens"),
        ((*SHORT[:5], " he she", *SHORT[6:]), "The answer ' he she' is 2 tokens"),
        ((*SHORT[:7], " he"), "The answer and the foil are both ' he'"),
    ],
)
def test_what_cannot_be_a_pair_is_a_sentence(
    arguments: tuple[str, ...], said: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", [Words(*SHORT[1::2])])
    code, out, err = run(patching, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        (patching, ("--direction", "up"), "--direction is 'up'; expected denoising or noising."),
        (knockout, ("--span", "2"), "--span is 2; expected an odd number of blocks"),
        (knockout, ("--span", "-1"), "--span is -1; expected an odd number of blocks"),
    ],
)
def test_an_option_out_of_range_is_a_sentence(module: Any, arguments: tuple[str, ...], said: str, run: Run) -> None:
    code, _, err = run(module, *arguments)
    assert code == 2
    assert said in err


def test_the_default_pair_fits_tiny_and_is_told_apart(tiny: GPT2) -> None:
    tokenizer = Tokenizer.from_pretrained(TINY)
    pair = Pair.encoded(Words(pairs.PROMPT, pairs.CORRUPTED, pairs.ANSWER, pairs.FOIL), tokenizer, 64)
    assert all(pair.groups.values())
    clean, corrupted = differences(tiny, pair)
    assert clean > 0 > corrupted


def test_a_corpus_of_pairs_runs_from_the_command_line(run: Run, tmp_path: Path) -> None:
    some = [Words(f"The {one} said that", f"The {other} said that", " he", " she") for one, other in SUBJECTS]
    write_pairs(tmp_path / "pairs.jsonl", some)
    code, out, err = run(knockout, "--texts", tmp_path / "pairs.jsonl", "--span", "5")
    assert (code, err) == (0, "")
    assert "in 5 blocks around each" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["corpus"]["windows"] == 2
    assert {of["verdict"] for of in summary["verdicts"]} == {"undecided"}, "two windows are too few"


SUBJECTS = (("man", "woman"), ("boy", "girl"))
