"""The twins of the self-check: each breaks what one check is about, a little beyond its bound, and it is noticed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minigpt import GPT2, Block, GPT2Config, Sweep, passes, sweep
from minigpt.parameters import Native
from minigpt.selfcheck import CELL_ROUNDINGS, JUMP_ROUNDINGS, self_check
from tests.conftest import SMALL, draw

USED, ROWS, JUMP, ONE, UPSTREAM, CELL = "forward uses", "rows", "jump", "factor 1", "upstream", "norm at every depth"
TEXTS, FACTORS = [[1, 2, 3, 4, 5, 6], [7, 8, 9]], (0.5, 1.0, 1.25, 3.0)
NEAREST, FARTHEST = 2, 3
EPS = torch.finfo(torch.float64).eps


def broken(model: GPT2, result: Sweep) -> list[str]:
    """What the checks that failed are about."""
    claims = [check.claim for check in self_check(model, result).broken]
    return [next(about for about in (USED, ROWS, JUMP, ONE, UPSTREAM, CELL) if about in claim) for claim in claims]


def longer(result: Sweep, at: tuple[object, ...], roundings: float) -> Sweep:
    """A sweep in which some differences are that many roundings too long."""
    numbers = result.statistics.difference_sq.clone()
    numbers[at] *= (1 + roundings * EPS) ** 2
    return replace(result, statistics=replace(result.statistics, difference_sq=numbers))


def test_nothing_is_broken_to_begin_with(model: GPT2) -> None:
    for site in ("output", "mlp"):
        for positions in (None, (0, 2)):
            assert broken(model, sweep(model, TEXTS, (1, 2), FACTORS, site, positions=positions)) == []


@pytest.mark.parametrize("entry", [0, 1])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_cell_is_its_own_run_within_the_bound_and_no_more(model: GPT2, entry: int, depth: int) -> None:
    result = sweep(model, TEXTS, (0, 1), FACTORS, "mlp")
    at = (entry, FARTHEST, 4 - depth, 1)  # of one text, at one of the last two depths
    assert broken(model, longer(result, at, CELL_ROUNDINGS / 4)) == []
    assert broken(model, longer(result, at, 2 * CELL_ROUNDINGS)) == [CELL]


def test_the_cell_that_runs_again_is_the_farthest(model: GPT2) -> None:
    result = sweep(model, TEXTS, (1,), FACTORS, "mlp")
    assert broken(model, longer(result, (0, FARTHEST), 1e6)) == [CELL]
    assert broken(model, longer(result, (0, NEAREST), 1e6)) == [], "or every cell would run twice"


def test_a_difference_of_rounding_alone_is_not_taken_for_a_wrong_cell(model: GPT2) -> None:
    """As a silent neuron's: its own run differs by nothing, and the rows of a pass may be rounded otherwise."""
    model.blocks[1].mlp.projection.weight.data.zero_()
    model.blocks[1].mlp.projection.bias.data.zero_()
    result = sweep(model, TEXTS, (1,), FACTORS, "mlp")
    numbers, stream = result.statistics.difference_sq, result.statistics.clean_sq
    numbers[0, FARTHEST, 4] = stream[4] * EPS**2
    assert broken(model, result) == []
    numbers[0, FARTHEST, 4] = stream[4] * (10 * EPS) ** 2
    assert broken(model, result) == [CELL]


@pytest.mark.parametrize("roundings", [0.25, 4.0])
def test_a_row_must_differ_where_its_factor_moves_it_by_more_than_rounding(model: GPT2, roundings: float) -> None:
    """The farthest factor, 3, moves it eight times as far as the nearest, 1.25."""
    mlp = model.blocks[1].mlp
    scale = roundings * CELL_ROUNDINGS * EPS / abs(FACTORS[NEAREST] - 1)
    model.blocks[1].mlp_norm.register_forward_hook(lambda _module, given, _out: given[0])
    mlp.register_forward_hook(lambda _module, given, _out: given[0].flip(-1) * scale)  # a write as long as scale * u
    result = sweep(model, TEXTS, (1,), FACTORS, "mlp")
    assert broken(model, result) == []
    result.statistics.difference_sq[0, NEAREST, 2, 0, 3] = 0
    assert broken(model, result) == ([ROWS] if roundings > 1 else [])


class Idle(Block):
    """Declares a scale that its forward forgets."""

    native = (*Block.native, Native("gate_scale"))


def test_a_scale_that_forward_never_uses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "check_used", lambda _job: None)  # which refuses such a sweep
    model = draw(GPT2Config(**SMALL), block=Idle)
    assert broken(model, sweep(model, TEXTS, (1, 2), FACTORS, "gate")) == [USED]
    assert self_check(model, sweep(model, TEXTS, (2,), FACTORS, "gate")).checks[0].claim.endswith("blocks.2.gate_scale")
    assert broken(model, sweep(model, TEXTS, (1, 2), FACTORS, "mlp")) == []
    frozen = model.requires_grad_(requires_grad=False)
    assert broken(frozen, sweep(model, TEXTS, (1,), FACTORS, "gate")) == [USED]


class Early(Block):
    """Uses a scale in the first block alone."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.layer = layer

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        scale = self.attention_scale if self.layer == 0 else 1.0
        u = x + scale * self.attention(self.attention_norm(x))
        return self.output_scale * (u + self.mlp_scale * self.mlp(self.mlp_norm(u)))


def test_a_scale_that_some_blocks_never_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "check_used", lambda _job: None)
    model = draw(GPT2Config(**SMALL), block=Early)
    (check,) = self_check(model, sweep(model, TEXTS, (0, 2, 3), FACTORS, "attention")).broken
    assert (check.claim, check.figure) == ("the model's forward uses blocks.2.attention_scale", 2)


def test_a_sweep_is_checked_in_inference_mode_too(model: GPT2) -> None:
    with torch.inference_mode():
        assert broken(model, sweep(model, torch.tensor([[1, 2, 3]]), (1,), FACTORS, "mlp")) == []


def test_a_sweep_of_the_place_beside_is_noticed(model: GPT2) -> None:
    result = sweep(model, TEXTS, (1,), FACTORS, "mlp")
    numbers = result.statistics.difference_sq
    late = replace(result, statistics=replace(result.statistics, difference_sq=numbers.roll(1, 2)))
    assert CELL in broken(model, late)
    assert CELL in broken(model, replace(result, layers=(2,)))
    early = replace(result, statistics=replace(result.statistics, difference_sq=numbers.roll(-1, 2)))
    assert CELL in broken(model, early)


@pytest.mark.parametrize("where", [(0, 0), (1, 3)], ids=["first", "last"])
@pytest.mark.parametrize("position", [(0, 5), (1, 2)], ids=["long text", "short text"])
def test_a_jump_is_s_minus_1_within_its_bound_and_no_more(
    model: GPT2, where: tuple[int, int], position: tuple[int, int]
) -> None:
    """One position of one text; the bound is of s x, and the difference is abs(s - 1) x."""
    result, (entry, factor) = sweep(model, TEXTS, (1, 2), FACTORS), where
    at = (entry, factor, result.layers[entry] + 1, *position)
    s = FACTORS[factor]
    bound = JUMP_ROUNDINGS * (s + abs(s - 1)) / abs(s - 1)
    assert broken(model, longer(result, at, bound / 4)) == []
    assert broken(model, longer(result, at, 2 * bound))[:1] == [JUMP]
    assert broken(model, longer(result, (*at[:2], at[2] + 1, *at[3:]), 2 * bound)) == [], "the jump is at the site"


@pytest.mark.parametrize("row", [(0, 0, 0), (1, 3, 1), (0, 2, 0)])
def test_a_row_that_was_not_scaled_at_one_position_is_noticed(model: GPT2, row: tuple[int, int, int]) -> None:
    result = sweep(model, TEXTS, (1, 2), FACTORS, "mlp")
    numbers, (entry, factor, text) = result.statistics.difference_sq, row
    for last in (1, 2):
        numbers[entry, factor, result.layers[entry] + 1, text, len(TEXTS[text]) - last] = 0
        assert self_check(model, result).checks[1].figure == 1, "rows are counted, not positions"
    assert ROWS in broken(model, result)
    assert self_check(model, result).checks[1].figure == 1


def test_a_row_of_factor_1_that_changed_is_noticed(model: GPT2) -> None:
    result = sweep(model, TEXTS, (1, 2), FACTORS, "mlp")
    result.statistics.difference_sq[1, 1, 3, 1, 0] = 1e-300
    assert broken(model, result) == [ROWS]


@pytest.mark.parametrize("site", ["output", "mlp", "attention", "head"])
def test_positions_that_were_ignored_are_noticed(model: GPT2, site: str) -> None:
    everywhere, some = (sweep(model, TEXTS, (1,), FACTORS, site, positions=at) for at in (None, (1,)))
    assert CELL in broken(model, replace(everywhere, positions=(1,)))
    assert {ROWS, CELL} <= set(broken(model, replace(some, positions=None)))
    if site == "output":
        assert JUMP in broken(model, replace(everywhere, positions=(1,)))


class Touched(Block):
    """Adds a hair to the stream when a scale is set, to what it is anyway."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        out = super().forward(x)
        neutral = bool((self.mlp_scale == 1).all())
        return out + 1e-9 if neutral and not isinstance(self.mlp_scale, nn.Parameter) else out


def test_a_factor_1_that_is_not_bit_identical_is_noticed_and_nothing_else() -> None:
    model = draw(GPT2Config(**SMALL), block=Touched)
    assert broken(model, sweep(model, TEXTS, (1, 2), (0.5, 3.0), "mlp")) == [ONE]


@pytest.mark.parametrize("early", [0, 1])
def test_a_run_that_changes_what_lies_before_its_site_is_noticed(model: GPT2, early: int) -> None:
    """Also by the very block before it."""
    result, plain = sweep(model, TEXTS, (2,), (0.5, 3.0), "mlp"), model.blocks[early].forward

    def reached(x: Tensor, cache: object = None) -> Tensor:
        return plain(x) + (0 if isinstance(model.blocks[2].mlp_scale, nn.Parameter) else 1e-12)

    model.blocks[early].forward = reached  # type: ignore[method-assign]
    assert UPSTREAM in broken(model, result)
    assert 0 < self_check(model, result).upstream[0] < 1e-9
