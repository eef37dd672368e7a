"""How far the numbers hold: extreme factors, streams near the norm's epsilon, long texts, short types."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minigpt import GPT2, Sweep, scaled, sweep
from minigpt.engine import StreamOverflowError
from minigpt.measures import MEASURES, POSITION_SETS
from minigpt.model import SITES
from minigpt.selfcheck import self_check
from tests.conftest import ROOT, TINY

SIZES = (1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e6)
FACTORS = (0.0, *SIZES, *(-size for size in SIZES))
NOT_A_NUMBER_ON_PURPOSE = {
    "passive": "final",
    "written": "final",
    "alignment": "final",
    "kl": "depths",
    "loss_change": "depths",
    "changed": "depths",
    "correlation": "depths",
}
"""Measures by the end of their names, and the places where they do not exist."""


def measures(result: Sweep) -> Iterator[tuple[str, Tensor]]:
    """Every measure over every set of positions, at the places where it exists."""
    for name in MEASURES:
        for positions in POSITION_SETS:
            values = result.statistics.measure(name, positions)
            missing = next((places for end, places in NOT_A_NUMBER_ON_PURPOSE.items() if name.endswith(end)), "")
            yield (
                f"{name} over {positions}",
                {"final": values[:, :, :-1], "depths": values[:, :, -1:]}.get(missing, values),
            )


def assert_finite(result: Sweep) -> None:
    """Every number of every measure is one, and within the range that its docstring gives."""
    for name, values in measures(result):
        assert torch.isfinite(values).all(), name
        if name.startswith(("cosine", "correlation")) or "alignment" in name:
            assert values.abs().max() <= 1 + 1e-12, name
        elif not name.startswith("loss_change"):
            assert values.min() >= 0, name
        if name.startswith(("gauge_free", "changed")):
            assert values.max() <= 1, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", SITES)
def test_factors_from_a_millionth_to_a_million_of_either_sign_and_zero_give_finite_numbers(
    small: Callable[..., GPT2], ids: Tensor, site: str, dtype: torch.dtype
) -> None:
    assert_finite(sweep(small(dtype=dtype), ids, (0, 2, 3), FACTORS, site, predictions=True))


@pytest.mark.parametrize("site", SITES)
def test_the_oracles_hold_under_extreme_factors(model: GPT2, ids: Tensor, site: str) -> None:
    assert self_check(model, sweep(model, ids, (0, 3), FACTORS, site)).broken == []


def test_the_jump_is_exact_from_a_millionth_to_a_million(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids, (1,), FACTORS)
    clean = result.statistics.clean_sq[2].sum(-1).sqrt()
    for index, factor in enumerate(FACTORS):
        jump = result.frobenius(skip=0)[0, index, 2]
        torch.testing.assert_close(jump, abs(factor - 1) * clean, rtol=1e-12, atol=0.0)


def test_all_scales_at_zero_leave_a_stream_of_zeros_and_the_norms_bias(model: GPT2, ids: Tensor) -> None:
    zero = dict.fromkeys(map("blocks.{}.output_scale".format, range(4)), 0.0)
    with torch.no_grad(), scaled(model, zero):
        assert (model.residuals(ids)[1:] == 0).all()
        expected = model.unembed(model.final_norm.bias).expand_as(model(ids))
        torch.testing.assert_close(model(ids), expected)
    assert_finite(sweep(model, ids, range(4), (0.0,), predictions=True))


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1e-2])
def test_streams_near_the_norms_epsilon_and_far_below_it_give_finite_numbers(
    small: Callable[..., GPT2], ids: Tensor, size: float
) -> None:
    """The root of epsilon is 3e-3: from there on down the norm passes the stream on instead of norming it."""
    model = small()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embedding" in name or name.endswith(("projection.weight", "projection.bias")):
                weight *= size
    result = sweep(model, ids, (0, 3), (0.0, 0.5, -2.0), predictions=True)
    assert result.statistics.clean_sq[:-1].max().sqrt() < 40 * size
    assert_finite(result)
    assert self_check(model, result).broken == []


def test_a_stream_of_zeros_has_no_relative_change_and_no_warning(small: Callable[..., GPT2], ids: Tensor) -> None:
    model = small()
    with torch.no_grad():
        for weight in (model.token_embedding.weight, model.position_embedding.weight):
            weight.zero_()
        for block in model.blocks:
            for layer in (block.attention.projection, block.mlp.projection):
                layer.weight.zero_()
                layer.bias.zero_()
    result = sweep(model, ids, (1,), (0.5,))
    assert (result.statistics.difference_sq == 0).all()
    assert (result.statistics.measure("frobenius", "all") == 0).all()
    broken = self_check(model, result).broken
    assert [check.claim.partition(" rows")[0] for check in broken] == ["all 1 scaled"]  # scaling zeros changes none


def test_a_text_as_long_as_gpt2_reads_gives_finite_numbers(small: Callable[..., GPT2]) -> None:
    model = small(dtype=torch.float32, n_positions=1024, n_layer=2)
    ids = torch.randint(97, (1, 1024), generator=torch.Generator().manual_seed(0))
    result = sweep(model, ids, (0, 1), (0.0, 0.5, -1e6), predictions=True)
    assert_finite(result)
    assert self_check(model, result).broken == []
    with pytest.raises(ValueError, match="1025 positions; the model has 1024"):
        sweep(model, torch.zeros(1, 1025, dtype=torch.long))


OVERFLOWS = [
    (torch.float16, 1e6, "depth 2"),
    (torch.bfloat16, 1e38, "depth 2"),
    (torch.float32, 1e38, "depth 2"),
    (torch.float64, 1e308, "depth 2"),
]


@pytest.mark.parametrize(("dtype", "factor", "where"), OVERFLOWS)
def test_a_stream_that_overflows_names_the_depth_and_the_factor(
    small: Callable[..., GPT2], ids: Tensor, dtype: torch.dtype, factor: float, where: str
) -> None:
    model = small(dtype=dtype)
    with torch.no_grad():
        model.token_embedding.weight *= 100
    for sign in (1, -1):
        with pytest.raises(StreamOverflowError) as error:
            sweep(model, ids, (1,), (0.5, sign * factor), predictions=True)
        assert f"no longer finite at {where} under factor {sign * factor:g}" in str(error.value)


def test_a_stream_that_overflows_later_than_its_site_is_named_by_where_it_does(
    small: Callable[..., GPT2], ids: Tensor
) -> None:
    model = small(dtype=torch.float32)
    with torch.no_grad():
        model.blocks[2].mlp.projection.weight *= 1e38
    with pytest.raises(StreamOverflowError, match="at depth 3 in the clean run; take float64"):
        sweep(model, ids, (0,), (0.5,))


def study(folder: Path, factors: str) -> tuple[int, str, str]:
    """The study with every warning of Python, numpy and torch made an error: exit code, output, errors."""
    command = [sys.executable, "-W", "error", "-m", "experiments.divergence", "--model", str(TINY)]
    command += ["--factors", factors, "--output", str(folder), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_the_study_says_nothing_on_stderr_under_extreme_factors(tmp_path: Path) -> None:
    assert study(tmp_path / "out", "0,1e-6,0.001,1000,1e6,-1e-6,-1,-1e6") == (0, "", "")


def test_a_study_that_overflows_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """1e30 itself is a float32; the next norm's square is not."""
    code, out, err = study(tmp_path / "out", "0.5,1e30")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "The stream is no longer finite at depth 4 under factor 1e+30; take a smaller one, or float64." in err
    assert not (tmp_path / "out").exists()


def test_what_counts_as_finite_would_notice_a_number_that_is_not(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids, (0,), (0.5,), predictions=True)
    assert_finite(result)
    result.statistics.difference_sq[0, 0, 2, 0, 3] = math.nan
    with pytest.raises(AssertionError, match="frobenius over all"):
        assert_finite(result)
