"""How far the numbers hold: extreme factors, streams near the norm's epsilon, long texts, short types."""

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minigpt import GPT2, Sweep, compare, scaled, sensitivity, sweep
from minigpt.engine import StreamOverflowError
from minigpt.measures import MEASURES, POSITION_SETS
from minigpt.model import SITES
from minigpt.parameters import parameter_name
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
    assert self_check(model, result).broken == [], "scaling zeros changes none"


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
    with pytest.raises(StreamOverflowError, match="at depth 3 in the clean run, in float32; take float64"):
        sweep(model, ids, (0,), (0.5,))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("exponent", (12, 15, 16, 17, 18, 19, 20, 23))
def test_a_factor_gives_what_float64_gives_or_is_refused(
    small: Callable[..., GPT2], ids: Tensor, site: str, exponent: int
) -> None:
    """Somewhere on the way the sum of squares in a norm layer overflows: the stream would be finite and wrong."""
    exact, model, grid = small(), small(dtype=torch.float32), ((1,), (-(10.0**exponent),), site)
    try:
        found = sweep(model, ids, *grid, predictions=True)
    except StreamOverflowError as error:
        assert exponent >= 16
        assert re.search(f"norm layers of block [12] under factor -1e.{exponent}, in float32", str(error))
        with pytest.raises(StreamOverflowError):
            compare(model, ids, [{parameter_name(model, 1, site): -(10.0**exponent)}])
    else:
        assert exponent <= 19 or site in ("query", "key"), "a softmax of huge scores is 0 and 1, in any type"
        expected = sweep(exact, ids, *grid, predictions=True)
        for name in ("kl", "gauge_free", "relative"):
            torch.testing.assert_close(
                found.measure(name, "all"), expected.measure(name, "all"), equal_nan=True, rtol=1e-2, atol=1e-4
            )


def test_without_the_limit_a_factor_gives_another_number_quietly(
    small: Callable[..., GPT2], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["minigpt.engine"], "largest_normed", lambda *_: math.inf)
    grid = (ids, (1,), (1e20,))
    exact, found = (sweep(small(dtype=dtype), *grid, predictions=True) for dtype in (torch.float64, torch.float32))
    kl, expected = (of.measure("kl", "all")[0, 0, -1] for of in (found, exact))
    assert kl.isfinite().all() and not torch.allclose(kl, expected, rtol=0.1)


def test_a_stream_too_large_within_a_block_is_refused_although_the_depths_are_small(
    small: Callable[..., GPT2], ids: Tensor
) -> None:
    both = {"blocks.2.attention_scale": 1e22, "blocks.2.output_scale": 1e-22}
    with pytest.raises(StreamOverflowError, match="norm layers of block 2 under intervention 1"):
        compare(small(dtype=torch.float32), ids, [{"blocks.2.output_scale": 1e-22}, both])
    assert_finite_of(compare(small(), ids, [both]).measure("frobenius", "all"))


def test_the_last_norm_is_asked_too(small: Callable[..., GPT2], ids: Tensor) -> None:
    with pytest.raises(StreamOverflowError, match=r"too large for the final norm under factor 1e\+21"):
        sweep(small(dtype=torch.float32), ids, (3,), (0.5, 1e21))


def test_sensitivities_that_are_not_finite_are_a_sentence(small: Callable[..., GPT2], ids: Tensor) -> None:
    model = small(dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        model.unembed.weight.mul_(1e38).mul_(5)
    with pytest.raises(StreamOverflowError, match="The predictions are no longer finite at the final norm"):
        sensitivity(model, ids)


def assert_finite_of(values: Tensor) -> None:
    assert values.isfinite().all()


def study(folder: Path, factors: str) -> tuple[int, str, str]:
    """The study with every warning of Python, numpy and torch made an error: exit code, output, errors."""
    command = [sys.executable, "-W", "error", "-m", "experiments.divergence", "--model", str(TINY)]
    command += ["--factors", factors, "--output", str(folder), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_the_study_says_nothing_on_stderr_under_extreme_factors(tmp_path: Path) -> None:
    assert study(tmp_path / "out", "0,1e-6,1e6,-1e6") == (0, "", "")


def test_a_study_that_overflows_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """1e30 itself is a float32; its square is not."""
    code, out, err = study(tmp_path / "out", "0.5,1e30")
    assert (code, out, err.count("\n")) == (2, "", 1)
    said = "too large for the norm layers of block 3 under factor 1e+30, in float32; take a smaller value, or float64."
    assert said in err
    assert not (tmp_path / "out").exists()


def test_what_counts_as_finite_would_notice_a_number_that_is_not(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids, (0,), (0.5,), predictions=True)
    assert_finite(result)
    result.statistics.difference_sq[0, 0, 2, 0, 3] = math.nan
    with pytest.raises(AssertionError, match="frobenius over all"):
        assert_finite(result)
