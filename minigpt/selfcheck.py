"""What must be true of every sweep, whatever the weights are, tried on a finished one.

Clean and scaled rows of a pass share their prefix, so "nothing changes before the site" is true
there by construction. Here a cell of every entry is computed again in a run of its own, by `scaled` and
`residuals`, which share nothing with the pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.alone import unused
from minigpt.measures import squared_norms
from minigpt.model import GPT2
from minigpt.parameters import parameter_name, scaled
from minigpt.sweep import Sweep

JUMP_ROUNDINGS = 4
"""The jump at the site may be off by this many roundings: s * x is rounded once per element in the parameters' type;
the difference and its norm, always float64, are rounded as much again, relative to the difference."""
CELL_ROUNDINGS = 80
"""A cell of the pass may differ from the same cell alone by this many roundings, relative (1e-5 in float32): matrix
products over another number of rows add up in another order."""
LEAST_SHARE = 1 / CELL_ROUNDINGS
"""Differences smaller than this share of the stream's norm are compared with that share instead: one rounding of the
stream is in each of them. A silent neuron's difference is nothing else."""


@dataclass(frozen=True)
class Check:
    """One of the facts that hold for any weights, tried on a finished sweep."""

    claim: str
    passed: bool
    figure: float


@dataclass(frozen=True)
class SelfCheck:
    """All the facts tried on a sweep."""

    checks: tuple[Check, ...]
    upstream: tuple[float, ...]
    """For every entry, the largest difference before its site, of a run that shares nothing with the clean one."""

    @property
    def broken(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]


@torch.no_grad()
def self_check(model: GPT2, result: Sweep) -> SelfCheck:
    """Try a sweep against what must be true whatever the weights are; nothing here trusts the shared pass.

    For every entry the cell farthest from factor 1 is computed again by `scaled` and `depths`, in a
    run of its own.
    """
    ids, rounding = result.ids.to(model.device), torch.finfo(model.dtype).eps
    clean = list(model.depths(ids))
    alone = [_cell_alone(model, result, entry, ids, clean) for entry in range(len(result.layers))]
    upstream, error = tuple(cell.upstream for cell in alone), [cell.error for cell in alone]
    checks = [
        _used(model, result, ids),
        _rows_scaled(result, torch.stack([cell.moved for cell in alone]), rounding),
        *([_jump(result, model.dtype, rounding)] if result.site == "output" else []),
        _factor_1(model, result, ids, clean),
        Check("a run of its own changes nothing upstream of its site, bit for bit", max(upstream) == 0, max(upstream)),
        Check(
            "a run of its own gives the sweep's norm at every depth",
            max(error) <= CELL_ROUNDINGS * rounding,
            max(error),
        ),
    ]
    return SelfCheck(tuple(checks), upstream)


def _at_site(result: Sweep, numbers: Tensor) -> Tensor:
    """Numbers of every cell right after its studied block: [layer, factor, batch, position]."""
    entries = torch.arange(len(result.layers))
    return numbers[entries, :, torch.tensor(result.layers) + 1]


def _applied(result: Sweep, factor: float) -> Tensor:
    """What every position was multiplied by: [position], float64."""
    if result.positions is None:
        return torch.full((result.ids.shape[1],), factor, dtype=torch.float64)
    ones = torch.ones(result.ids.shape[1], dtype=torch.float64)
    return ones.index_fill_(0, torch.tensor(result.positions), factor)


def _real(result: Sweep) -> Tensor:
    """Which positions are a text's own, and not padding: [batch, position]."""
    return torch.arange(result.ids.shape[1]) < result.lengths[:, None]


def _used(model: GPT2, result: Sweep, ids: Tensor) -> Check:
    """Every scale must take part in what the model computes: a block may declare one that its `forward` forgets."""
    names = list(dict.fromkeys(parameter_name(model, layer, result.site) for layer in result.layers))
    forgotten = unused(model, names, ids)
    which = forgotten[0] if forgotten else names[0] + " and the others" * (len(names) > 1)
    return Check(f"the model's forward uses {which}", not forgotten, len(forgotten))


def _rows_scaled(result: Sweep, moved: Tensor, rounding: float) -> Check:
    """Every scaled position must differ at the site by more than rounding where its run alone does, and nothing of
    factor 1 may.

    `moved` is how far the farthest factor alone moves each position, over the stream's norm: [layer, batch, position].
    Nearer factors move it less; a silent neuron moves nothing.
    """
    differs = _at_site(result, result.statistics.difference_sq) > 0
    distance = torch.stack([_applied(result, factor) for factor in result.factors]).sub(1).abs()[:, None]
    share = distance / distance.max().clamp_min(torch.finfo(torch.float64).tiny)
    expected = (share * moved[:, None] > CELL_ROUNDINGS * rounding) & _real(result)
    unchanged = torch.tensor([factor == 1 for factor in result.factors])[:, None, None]
    wrong = int(((expected & ~differs) | (unchanged & differs)).flatten(2).any(-1).sum())
    where = "every position" if result.positions is None else "every scaled position"
    count = int(expected.flatten(2).any(-1).sum())
    return Check(
        f"all {count} rows that a run of its own moves differ at {where}, and no row of factor 1", wrong == 0, wrong
    )


def _jump(result: Sweep, dtype: torch.dtype, rounding: float) -> Check:
    as_applied = torch.tensor(result.factors, dtype=dtype).tolist()
    factors = torch.stack([_applied(result, factor) for factor in as_applied])[:, None]  # [factor, 1, position]
    norm = result.statistics.clean_sq[torch.tensor(result.layers) + 1].sqrt()[:, None]
    departure = (_at_site(result, result.statistics.difference_sq).sqrt() - (factors - 1).abs() * norm).abs()
    in_float64 = torch.finfo(torch.float64).eps / rounding
    allowed = norm * (factors.abs() + (factors - 1).abs() * in_float64)
    relative = departure / allowed.clamp_min(torch.finfo(torch.float64).tiny)
    error = float(relative.where(_real(result), 0.0).max())
    return Check("the jump at the site is |s - 1| times the stream's norm", error <= JUMP_ROUNDINGS * rounding, error)


def _factor_1(model: GPT2, result: Sweep, ids: Tensor, clean: list[Tensor]) -> Check:
    with scaled(model, result.intervention(model, 0, 1.0)):
        departure = max(float((x - same).abs().max()) for x, same in zip(model.depths(ids), clean, strict=True))
    return Check("factor 1, run by itself, is bit-identical to the clean run", departure == 0, departure)


@dataclass(frozen=True)
class _Alone:
    """What a cell of a sweep is in a run of its own."""

    upstream: float
    """The largest difference before the site."""
    error: float
    """The largest departure of the sweep's norms from it, relative."""
    moved: Tensor
    """The norm of the difference right after the studied block, over the stream's: [batch, position]."""


def _cell_alone(model: GPT2, result: Sweep, entry: int, ids: Tensor, clean: list[Tensor]) -> _Alone:
    """The cell farthest from factor 1 in a run of its own."""
    layer, farthest = result.layers[entry], max(range(len(result.factors)), key=lambda j: abs(result.factors[j] - 1))
    real, in_pass = _real(result), result.statistics.difference_sq[entry, farthest]
    upstream, error, moved, tiny = 0.0, 0.0, torch.zeros(()), torch.finfo(torch.float64).tiny
    with scaled(model, result.intervention(model, entry, result.factors[farthest])):
        for depth, (x, before) in enumerate(zip(model.depths(ids), clean, strict=True)):
            alone_sq, stream_sq = (squared_norms(of).cpu().where(real, 0.0) for of in (x.double() - before, before))
            alone, stream = alone_sq.sum(-1).sqrt(), stream_sq.sum(-1).sqrt()
            apart = (alone - in_pass[depth].sum(-1).sqrt()).abs()
            apart /= torch.maximum(alone, LEAST_SHARE * stream).clamp_min(tiny)
            error = max(error, float(apart.max()))
            if depth <= layer:
                upstream = max(upstream, float((x - before).abs().max()))
            if depth == layer + 1:
                moved = (alone_sq / stream_sq.clamp_min(tiny)).sqrt()
    return _Alone(upstream, error, moved)
