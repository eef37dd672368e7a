"""The benchmark compares like with like: whoever is timed computes the same numbers as minigpt."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from experiments.tools import benchmark, patch_peers, peers
from minigpt import GPT2, patch, record, scaled, sweep

FACTORS = (0.5, 1.0, 1.5)


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=48, n_head=4, vocab_size=97, n_positions=16)).eval()


@pytest.fixture(scope="module")
def ours(theirs: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    folder = tmp_path_factory.mktemp("model")
    theirs.config.eos_token_id = theirs.config.bos_token_id = None
    theirs.save_pretrained(folder)
    return GPT2.from_pretrained(folder)


def test_every_contender_that_is_installed_computes_the_sweeps_norms(theirs: GPT2LMHeadModel, ours: GPT2) -> None:
    ids = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = sweep(ours, ids, factors=FACTORS).frobenius()[..., 0]
    found = peers.contenders(theirs, FACTORS)
    assert len(found) >= 6
    for name, run in found.items():
        norms = run(ids)
        assert norms.shape == (3, 3, 4), name
        assert benchmark.agrees(norms, expected, 1e-4), name
        assert not benchmark.agrees(norms * 1.001, expected, 1e-4), name
        assert not benchmark.agrees(norms.roll(1, dims=2), expected, 1e-4), name  # one depth late, as hooks have been


PAIR = torch.randint(97, (2, 1, 9), generator=torch.Generator().manual_seed(1))
COUNTS = {"output": 9, "head": 4}


@torch.no_grad()
@pytest.mark.parametrize("kind", patch_peers.KINDS)
def test_our_grid_of_patches_is_a_plain_loop_of_scaled_runs(kind: patch_peers.Kind, ours: GPT2) -> None:
    ids, other = PAIR
    found = patch_peers.ours(ours, kind, (3, 5), ids, other)
    assert found.shape == (3, COUNTS[kind])
    for layer in range(3):
        site = f"blocks.{layer}.output" if kind == "output" else f"blocks.{layer}.attention.head"
        values = record(ours, other, [site])[site]
        for entry in range(COUNTS[kind]):
            chosen: Any = {"positions": [entry]} if kind == "output" else {"heads": [entry]}
            with scaled(ours, patch(site, values, **chosen)):
                logits = ours(ids)[0, -1]
            assert float(found[layer, entry]) == pytest.approx(float(logits[3] - logits[5]), abs=1e-5)


@pytest.mark.parametrize("kind", patch_peers.KINDS)
def test_every_contender_that_is_installed_fills_the_same_grid_of_patches(
    kind: patch_peers.Kind, theirs: GPT2LMHeadModel, ours: GPT2
) -> None:
    ids, other = PAIR
    expected = patch_peers.ours(ours, kind, (3, 5), ids, other)
    found = patch_peers.contenders(theirs, kind, (3, 5))
    assert len(found) >= 3
    for name, run in found.items():
        table = run(ids, other)
        assert benchmark.agrees_within_range(table, expected, 1e-4), name
        assert not benchmark.agrees_within_range(table + 1e-3 * (expected.max() - expected.min()), expected, 1e-4), name
        assert not benchmark.agrees_within_range(table.roll(1, dims=0), expected, 1e-4), name
        assert not benchmark.agrees_within_range(table.roll(1, dims=1), expected, 1e-4), name
        assert not benchmark.agrees_within_range(table[:, :-1], expected, 1e-4), name


def test_the_section_of_patches_names_everyone_and_who_computes_something_else(
    theirs: GPT2LMHeadModel, ours: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(given: Any, kind: patch_peers.Kind, tokens: tuple[int, int]) -> dict[str, patch_peers.Grid]:
        return {**CONTENDERS(given, kind, tokens), "another": lambda ids, other: CONTENDERS(given, kind, (0, 1))[
            "transformers, the whole grid as one batch"
        ](ids, other)}  # fmt: skip

    monkeypatch.setattr(patch_peers, "contenders", wrong)

    def pair(positions: int, texts: int = 1) -> torch.Tensor:
        return torch.randint(97, (texts, positions), generator=torch.Generator().manual_seed(positions))

    bench = SimpleNamespace(ours=ours, heads=theirs, repetitions=2, tolerance=1e-4, ids=pair)
    text = benchmark.patching(cast("benchmark.Bench", bench))
    assert "### 3 layers x 16 positions, the block's output" in text
    assert "### 3 layers x 4 heads, at all positions" in text
    assert text.count("| another | other numbers: its time means nothing |") == 2
    assert text.count("| transformers, one run per patch | **") == 2
    assert text.count(f"| {benchmark.PATCHED} | **1** |") == 2


CONTENDERS = patch_peers.contenders


def test_the_arithmetic_of_the_grid_is_counted_from_the_blocks_that_remain(ours: GPT2) -> None:
    shapes = benchmark.product_shapes(ours.config, positions=5)
    assert [rows for rows, *_ in shapes[::4]] == [5, 55, 105]  # ten factors of eleven change something
    per_token = sum(into * out for _, into, out in shapes[:4])
    block = ours.blocks[0]
    maps = (block.attention.qkv, block.attention.projection, block.mlp.expand, block.mlp.projection)
    assert per_token == sum(module.weight.numel() for module in maps)


def test_the_work_of_a_window_counts_the_clean_run_and_twenty_factors_after_the_site(ours: GPT2) -> None:
    maps = (module for module in ours.blocks[0].modules() if isinstance(module, torch.nn.Linear))
    per_token = 2 * sum(module.weight.numel() for module in maps)
    config = replace(ours.config, n_layer=12)
    assert benchmark.window_work(config, positions=7) == (3 * 12 + 24 * 9) * 7 * per_token


def test_a_table_is_markdown() -> None:
    assert benchmark.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
