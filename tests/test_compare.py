"""Interventions of any scales, beside runs of their own."""

import re
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from minigpt import GPT2, Block, GPT2Config, compare, scaled, sweep
from minigpt.measures import MEASURES, POSITION_SETS
from minigpt.parameters import Native, block_of, natives
from tests.blocks import BLOCKS, Neurons
from tests.conftest import SMALL, draw

SAME = {"rtol": 1e-10, "atol": 1e-10}
TEXTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10]]


def edits() -> list[dict[str, float | torch.Tensor]]:
    """A skipped block, a head removed from the third token on, an output scaled at one position."""
    heads = torch.ones(1, 6, 3)
    heads[:, 2:, 1] = 0
    only_4 = torch.ones(1, 6, 1)
    only_4[:, 4] = 0.5
    return [
        {"blocks.1.attention_scale": 0.0, "blocks.1.mlp_scale": 0.0},
        {"blocks.2.attention.head_scale": heads, "blocks.0.mlp_scale": 1.5},
        {"blocks.3.output_scale": only_4},
    ]


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_every_intervention_is_what_a_run_of_its_own_gives(
    model: GPT2, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["minigpt.engine"], "CPU_SLAB", 12 * rows)
    found = compare(model, TEXTS, edits(), predictions=True, steps=True)
    for text, ids in enumerate(TEXTS):
        real = len(ids)
        for row, edit in enumerate(edits()):
            cut = {name: value[:, :real] if isinstance(value, torch.Tensor) else value for name, value in edit.items()}
            with torch.no_grad():
                clean = model.residuals(torch.tensor([ids]))[:, 0]
                with scaled(model, cut):
                    changed, logits = model.residuals(torch.tensor([ids]))[:, 0], model(torch.tensor([ids]))[0]
            difference = found.statistics.difference_sq[row, :-1, text]
            torch.testing.assert_close(difference[:, :real], (changed - clean).square().sum(-1), **SAME)
            assert not difference[:, real:].any()
            steps = (changed[1:] - changed[:-1]).square().sum(-1)
            torch.testing.assert_close(found.statistics.steps_sq[row, :, text, :real], steps, **SAME)
            assert found.statistics.predictions is not None
            assert torch.equal(found.statistics.predictions.likeliest[row, text, :real], logits.argmax(-1))


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_runs_that_meet_in_a_block_do_not_change_each_other(
    model: GPT2, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some leave the clean run where others, which left it before, change what lies within a module of the block."""
    monkeypatch.setattr(sys.modules["minigpt.engine"], "CPU_SLAB", 12 * rows)
    heads = torch.tensor([0.5, 1.0, 2.0])
    runs: list[dict[str, float | torch.Tensor]] = [
        {"blocks.1.output_scale": 0.5, "blocks.2.attention.head_scale": heads},
        {"blocks.2.output_scale": 0.3},
        {"blocks.2.mlp_scale": 0.0, "blocks.3.attention.head_scale": 2 * heads},
        {"blocks.0.mlp_scale": 1.5, "blocks.2.attention_scale": 0.0},
        {"blocks.3.attention_scale": -1.0},
    ]
    found = compare(model, TEXTS, runs)
    for row, values in enumerate(runs):
        alone = compare(model, TEXTS, [values])
        for name in ("frobenius", "written", "attention_alignment"):
            torch.testing.assert_close(
                found.measure(name, "all")[row], alone.measure(name, "all")[0], equal_nan=True, rtol=1e-8, atol=1e-10
            )
        with torch.no_grad(), scaled(model, values):
            changed = model.residuals(torch.tensor(TEXTS[:1]))[:, 0]
        clean = model.residuals(torch.tensor(TEXTS[:1]))[:, 0].detach()
        torch.testing.assert_close(
            found.statistics.difference_sq[row, :-1, 0], (changed - clean).square().sum(-1), **SAME
        )


@pytest.mark.parametrize("block", [Block, *BLOCKS, Neurons])
@pytest.mark.parametrize("seed", range(4))
def test_random_interventions_are_what_runs_of_their_own_give(
    block: type[Block], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any parameters, values of any shape, texts of any length, slabs of any size."""
    drawn, model = Random(seed), draw(GPT2Config(**SMALL), block=block)
    texts = [[drawn.randrange(97) for _ in range(drawn.randint(2, 8))] for _ in range(drawn.randint(1, 3))]
    most = max(map(len, texts))
    monkeypatch.setattr(sys.modules["minigpt.engine"], "CPU_SLAB", drawn.choice([1, 2, 3, 100]) * most * len(texts))
    declared = natives(model)

    def value(native: Native) -> float | torch.Tensor:
        if drawn.random() < 0.4:
            return drawn.choice([0.0, 0.5, 1.0, -1.5])
        counts = {"batch": len(texts)} | dict.fromkeys(("position", "query", "key"), most)
        sizes = [drawn.choice([1, counts.get(word) or getattr(model.config, word)]) for word in native.shape]
        return torch.randn(sizes, dtype=torch.float64)

    names = [drawn.sample(list(declared), drawn.randint(1, 4)) for _ in range(drawn.randint(1, 7))]
    runs = [{name: value(declared[name]) for name in some} for some in names]
    found = compare(model, texts, runs).statistics
    for row, run in enumerate(runs):
        first = 1 + min(map(block_of, run))
        for text, ids in enumerate(texts):
            own = {name: of_text(of, declared[name], text, len(ids)) for name, of in run.items()}
            with torch.no_grad(), scaled(model, own):
                changed = model.residuals(torch.tensor([ids]))[:, 0]
            difference = changed - model.residuals(torch.tensor([ids]))[:, 0].detach()
            at = (row, slice(None, -1), text, slice(len(ids)))
            torch.testing.assert_close(found.difference_sq[at], difference.square().sum(-1), **SAME)
            wrote = (difference[1:] - difference[:-1])[first:]
            products = wrote.square().sum(-1), (difference[:-1][first:] * wrote).sum(-1)
            for numbers, expected in zip(found.written[0], products, strict=True):
                torch.testing.assert_close(numbers[at][1 + first :], expected, rtol=1e-7, atol=1e-9)


def of_text(value: float | torch.Tensor, native: Native, text: int, length: int) -> float | torch.Tensor:
    """What of a value is meant for one text."""
    if isinstance(value, torch.Tensor):
        value = value[text : text + 1] if len(value) > 1 else value
        for axis, word in enumerate(native.shape):
            if word in ("position", "query", "key") and value.shape[axis] > 1:
                value = value.narrow(axis, 0, length)
    return value


def test_a_skipped_block_changes_nothing_between_its_depths(model: GPT2) -> None:
    statistics = compare(model, TEXTS, edits(), steps=True).statistics
    assert statistics.steps_sq is not None and statistics.clean_steps_sq is not None
    assert not statistics.steps_sq[0, 1].any()
    assert statistics.clean_steps_sq[1, 0].min() > 0
    assert statistics.sites.tolist() == [2, 3, 4]


def test_a_grid_is_a_special_case(model: GPT2) -> None:
    one = compare(model, TEXTS, [{"blocks.1.output_scale": 0.5}], predictions=True)
    grid = sweep(model, TEXTS, (1,), (0.5,), predictions=True)
    for name in MEASURES:
        for positions in POSITION_SETS:
            expected = grid.measure(name, positions)[0]
            torch.testing.assert_close(one.measure(name, positions), expected, equal_nan=True, rtol=0, atol=0)


def test_memory_can_be_bounded(model: GPT2) -> None:
    whole = compare(model, TEXTS, edits()).statistics.difference_sq
    least = int(re.findall(r"takes (\d+)", str(refusal(model, 1)))[0])
    torch.testing.assert_close(compare(model, TEXTS, edits(), max_bytes=least).statistics.difference_sq, whole, **SAME)
    assert "one text of 6 tokens with one run beside the clean one" in str(refusal(model, least - 1))


def refusal(model: GPT2, max_bytes: int) -> ValueError:
    with pytest.raises(ValueError, match="max_bytes") as refused:
        compare(model, TEXTS, edits(), max_bytes=max_bytes)
    return refused.value


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ([], "no intervention"),
        ([{}], "empty"),
        ([{"blocks.1.outptu_scale": 0.5}], "nearest names"),
        ([{"blocks.1.output_scale": torch.ones(3, 1, 1)}], "1 or 2 texts by 1 or 6 positions"),
        ([{"blocks.1.output_scale": torch.ones(3, 1)}], "1 or 2 texts by 1 or 6 positions"),
        ([{"blocks.1.output_scale": 1e200}], "no longer finite at depth 2 under intervention 0"),
    ],
)
def test_a_mistake_is_a_sentence(model: GPT2, edit: list[dict[str, float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compare(model, TEXTS, edit)


def test_a_model_that_is_not_clean_is_refused(model: GPT2) -> None:
    with scaled(model, {"blocks.0.mlp_scale": 0.5}), pytest.raises(ValueError, match="back to 1"):
        compare(model, TEXTS, [{"blocks.1.mlp_scale": 0.0}])


def test_a_value_may_differ_between_texts(model: GPT2) -> None:
    both = torch.tensor([0.5, 2.0])[:, None, None]
    found = compare(model, TEXTS, [{"blocks.1.attention_scale": both}]).measure("frobenius", "rest")[0]
    for text, value in enumerate((0.5, 2.0)):
        alone = compare(model, TEXTS[text : text + 1], [{"blocks.1.attention_scale": value}])
        torch.testing.assert_close(found[:, text], alone.measure("frobenius", "rest")[0, :, 0], **SAME)


def test_what_is_not_named_keeps_its_neutral_value_whatever_that_is(small: Callable[..., GPT2]) -> None:
    """A block with a level of neutral value 2: a run that does not name it must not see another."""

    class Cooled(Block):
        native = (*Block.native, Native("cooling", neutral=2.0))
        cooling: torch.Tensor

        def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
            return self.cooling / 2 * super().forward(x, cache)

    model = draw(GPT2Config(**SMALL), block=Cooled)
    named = {"blocks.2.cooling": 1.0, "blocks.1.mlp_scale": 0.5}
    both = compare(model, TEXTS, [named, {"blocks.1.mlp_scale": 0.5}]).measure("frobenius", "all")
    alone = compare(model, TEXTS, [{"blocks.1.mlp_scale": 0.5}]).measure("frobenius", "all")
    torch.testing.assert_close(both[1], alone[0], **SAME)
    assert not torch.allclose(both[0, -2], alone[0, -2])


def test_rows_name_every_number(model: GPT2) -> None:
    found = compare(model, TEXTS, edits(), predictions=True)
    rows = list(found.rows())
    for row in rows[:: len(rows) // 97]:
        place = -1 if row["depth"] == "final" else row["depth"]
        value = found.measure(row["metric"], row["positions"])[row["intervention"], place, row["text"]]
        assert row["value"] == float(value)
    numbers = [found.measure(name, positions) for name in MEASURES for positions in POSITION_SETS]
    assert len(rows) == sum(int(of.isfinite().sum()) for of in numbers)
