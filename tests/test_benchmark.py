"""The benchmark compares like with like: whoever is timed computes the sweep's norms."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from experiments.tools import benchmark, peers
from minigpt import GPT2, sweep

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
