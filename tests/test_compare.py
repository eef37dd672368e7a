"""Interventions of any scales, beside runs of their own."""

import re
import sys
from typing import Any

import pytest
import torch

from minigpt import GPT2, compare, scaled, sweep
from minigpt.measures import POSITION_SETS

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


@pytest.mark.parametrize("rows", [2, 3, 100])
def test_every_intervention_is_what_a_run_of_its_own_gives(
    model: GPT2, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["minigpt.compare"], "rows_at_once", lambda *_, **__: rows)
    found = compare(model, TEXTS, edits(), predictions=True)
    for text, ids in enumerate(TEXTS):
        real = len(ids)
        for row, edit in enumerate(edits()):
            cut = {name: value[:, :real] if isinstance(value, torch.Tensor) else value for name, value in edit.items()}
            with torch.no_grad():
                clean = model.residuals(torch.tensor([ids]))[:, 0]
                with scaled(model, cut):
                    changed, logits = model.residuals(torch.tensor([ids]))[:, 0], model(torch.tensor([ids]))[0]
            difference = found.statistics.difference_sq[row, 0, :-1, text]
            torch.testing.assert_close(difference[:, :real], (changed - clean).square().sum(-1), **SAME)
            assert not difference[:, real:].any()
            steps = (changed[1:] - changed[:-1]).square().sum(-1)
            torch.testing.assert_close(found.steps_sq[row, :, text, :real], steps, **SAME)
            assert found.statistics.predictions is not None
            assert torch.equal(found.statistics.predictions.likeliest[row, 0, text, :real], logits.argmax(-1))


def test_a_skipped_block_changes_nothing_between_its_depths(model: GPT2) -> None:
    found = compare(model, TEXTS, edits())
    assert not found.steps_sq[0, 1].any()
    assert found.clean_steps_sq[1, 0].min() > 0
    assert found.statistics.layers == (1, 2, 3)


def test_a_grid_is_a_special_case(model: GPT2) -> None:
    one = compare(model, TEXTS, [{"blocks.1.output_scale": 0.5}], predictions=True).statistics
    grid = sweep(model, TEXTS, (1,), (0.5,), predictions=True).statistics
    for name in ("frobenius", "relative", "passive", "gauge_free", "cosine", "kl", "loss_change", "changed"):
        for positions in POSITION_SETS:
            expected = grid.measure(name, positions)
            torch.testing.assert_close(one.measure(name, positions), expected, equal_nan=True, rtol=1e-9, atol=1e-7)
    with pytest.raises(ValueError, match="not kept"):
        compare(model, TEXTS, [{"blocks.1.output_scale": 0.5}]).statistics.measure("alignment", "rest")


def test_memory_can_be_bounded(model: GPT2) -> None:
    whole = compare(model, TEXTS, edits()).statistics.difference_sq
    least = int(re.findall(r"take (\d+)", str(refusal(model, 1)))[0])
    torch.testing.assert_close(compare(model, TEXTS, edits(), max_bytes=least).statistics.difference_sq, whole, **SAME)
    assert "2 runs of 12 tokens" in str(refusal(model, least - 1))


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
        ([{"blocks.1.output_scale": torch.ones(2, 1, 1)}], "expected numbers"),
        ([{"blocks.1.output_scale": torch.ones(3, 1)}], "expected numbers"),
        ([{"blocks.1.output_scale": 1e200}], "overflow"),
    ],
)
def test_a_mistake_is_a_sentence(model: GPT2, edit: list[dict[str, float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compare(model, TEXTS, edit)


def test_a_model_that_is_not_clean_is_refused(model: GPT2) -> None:
    with scaled(model, {"blocks.0.mlp_scale": 0.5}), pytest.raises(ValueError, match="to be 1"):
        compare(model, TEXTS, [{"blocks.1.mlp_scale": 0.0}])


def test_a_batch_that_runs_out_of_memory_is_halved_and_gives_the_same(
    model: GPT2, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, whole, most = compare(model, TEXTS, edits()), sys.modules["minigpt.compare"]._Part.run, [1]

    def run(*arguments: Any) -> Any:
        if len(arguments[3]) > most[0]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return whole(*arguments)

    monkeypatch.setattr(sys.modules["minigpt.compare"]._Part, "run", run)
    found = compare(model, TEXTS, edits())
    torch.testing.assert_close(found.statistics.difference_sq, expected.statistics.difference_sq, **SAME)
    torch.testing.assert_close(found.steps_sq, expected.steps_sq, **SAME)
    assert [record.args for record in caplog.records] == [(3,), (2,)]
    most[0] = 0
    with pytest.raises(ValueError, match="too little for one intervention"):
        compare(model, TEXTS, edits())
