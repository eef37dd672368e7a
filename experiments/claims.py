"""The five claims of the classic study, each judged on the model at hand.

The claims, in the order of the lecture and the article that retells it:

1. Nothing changes upstream of the site.
2. The difference jumps at the site.
3. It keeps growing through the later layers: the norm layers downstream do not heal it.
4. With the first token included it is about an order of magnitude larger.
5. It drops slightly at the last block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.curves import Curves, describe_entry

ORDER_OF_MAGNITUDE = math.sqrt(10)
"""A ratio above this is nearer to 10 than to 1 on a logarithmic scale: "about an order of magnitude"."""
JUMP_TOLERANCE = 0.01
"""Relative to the stream's norm: a jump this near to |s - 1| times it is that, also where bfloat16 rounds the factor;
the sweep's own check is far stricter."""

Outcome = Literal["holds", "does not hold", "true by construction", "undecided"]
Figures = dict[str, float | list[float]]
Decision = tuple[Outcome, str, Figures]
"""The outcome, a sentence, the figures."""


@dataclass(frozen=True)
class Verdict:
    """What became of one claim at one site, and the figures that decided."""

    number: int
    layer: int
    head: int | None
    claim: str
    verdict: Outcome
    sentence: str
    figures: Figures

    @property
    def where(self) -> str:
        """The site in words."""
        return describe_entry(self.layer, self.head)

    def to_json(self) -> dict[str, Any]:
        """For summary.json, which knows no NaN: a figure that is not finite becomes null."""
        return {**asdict(self), "figures": {name: _finite(value) for name, value in self.figures.items()}}


def _finite(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def judge(curves: Curves, upstream: Sequence[float]) -> list[Verdict]:
    """Every claim's verdict for every entry of the sweep: of its text, or of the mean over its windows.

    `upstream` is, for every entry, the largest difference before its site of a run that shares nothing
    with the clean one.
    """
    verdicts = list[Verdict]()
    for entry, layer in enumerate(curves.layers):
        case = Case.of(curves, entry, upstream[entry])
        head = curves.heads[entry] if curves.heads else None
        for number, (claim, decide) in enumerate(CLAIMS, start=1):
            verdicts.append(Verdict(number, layer, head, claim, *_decide(decide, case)))
    return verdicts


@dataclass(frozen=True)
class Case:
    """The curves of one entry over the factors that are not 1: [factor, depth], `rest` unless named."""

    output: bool
    """Whether the whole output of a block was scaled, at every position."""
    first_alone: bool
    """Whether nothing but position 0 was scaled."""
    site: int
    """The depth right after the studied block."""
    factors: list[float]
    rest: Tensor
    everything: Tensor
    relative: Tensor
    final: Tensor
    """[factor], of the stream after the final norm."""
    first: Tensor
    """Norm of position 0's clean stream: [depth]."""
    others: Tensor
    """Mean norm of the other positions': [depth]."""
    norm_at_site: float
    """Norm of the clean stream at the site."""
    upstream: float
    """Largest difference before the site, of a run that shares nothing with the clean one."""

    @classmethod
    def of(cls, curves: Curves, entry: int, upstream: float) -> "Case":
        """The curves of one entry of the axis `layer`."""
        changed = [j for j, factor in enumerate(curves.factors) if factor != 1]
        site, rest = curves.layers[entry] + 1, curves.of("frobenius", "rest")[entry, changed]
        return cls(
            output=curves.site == "output" and curves.positions is None,
            first_alone=curves.positions == (0,),
            site=site,
            factors=[curves.factors[j] for j in changed],
            rest=rest[:, :-1],
            everything=curves.of("frobenius", "all")[entry, changed, :-1],
            relative=curves.of("relative", "rest")[entry, changed, :-1],
            final=rest[:, -1],
            first=curves.norms[0, :-1],
            others=curves.norms[1, :-1],
            norm_at_site=float(curves.norms[2, site]),
            upstream=upstream,
        )


def _verdict(holds: bool) -> Outcome:
    return "holds" if holds else "does not hold"


def _upstream(case: Case) -> Decision:
    sentence = (
        "Blocks before the site read the same numbers in both runs, whatever the weights are. "
        f"A run of its own differs there by {case.upstream:g}."
    )
    outcome: Outcome = "true by construction" if case.upstream == 0 else "does not hold"
    return outcome, sentence, {"largest_upstream_difference": case.upstream}


def _jump(case: Case) -> Decision:
    """By construction for the output site; for a site inside the block, the difference must be above 0."""
    jump = case.rest[:, case.site]
    figures: Figures = {"factors": case.factors, "jump": jump.tolist()}
    if not case.output:
        sentence = f"From 0 before the block to {jump[0]:.4g} after it at factor {case.factors[0]:g}."
        return _verdict(bool((jump > 0).all())), sentence, figures
    distance = (torch.tensor(case.factors, dtype=torch.float64) - 1).abs()
    sentence = (
        f"The difference at depth {case.site} is what was put there, |s - 1| times the stream's norm, whatever the "
        f"weights are: {jump[0]:.4g} at factor {case.factors[0]:g}."
    )
    agrees = bool(
        ((jump - distance * case.norm_at_site).abs() <= JUMP_TOLERANCE * case.norm_at_site).all() and (jump > 0).all()
    )
    return "true by construction" if agrees else "does not hold", sentence, figures


def _growth(case: Case) -> Decision:
    """Holds if, for every factor, the raw difference is larger at the last depth than at the site and rises in more
    than half of the blocks between.

    Larger at the last depth is the same as `relative` above `passive` there: both divide by the same clean
    norm, so the blocks added to the change and did not repair it. Whether it also grew beside the stream,
    which grows by itself, is dilution, another question: the sentence says it.
    """
    growth = case.rest[:, -1] / case.rest[:, case.site]
    rising = (case.rest[:, case.site + 1 :] > case.rest[:, case.site : -1]).double().mean(1)
    dilution = case.relative[:, -1] / case.relative[:, case.site]
    held = (growth > 1) & (rising > 0.5)
    first, last = case.factors[0], case.factors[-1]
    sentence = (
        "Counts as growing: larger at the last depth than at the site, and rising in more than half of the blocks "
        f"between. That is so for {int(held.sum())} of {len(case.factors)} factors. The multiplier from site to last "
        f"depth, above 1 where the later blocks amplify the change, is {growth[0]:.3g} at factor {first:g} and "
        f"{growth[-1]:.3g} at factor {last:g}; beside the stream, which grows by itself, it is {dilution[0]:.3g} "
        f"and {dilution[-1]:.3g}."
    )
    figures: Figures = {
        "factors": case.factors,
        "raw_last_over_site": growth.tolist(),
        "share_of_later_blocks_where_raw_grows": rising.tolist(),
        "relative_last_over_site": dilution.tolist(),
    }
    return _verdict(bool(held.all())), sentence, figures


def _first_token(case: Case) -> Decision:
    ratios = (case.everything[:, case.site :] / case.rest[:, case.site :]).median(0).values
    norms = case.first / case.others
    peak = int(norms.argmax())
    sentence = (
        f"With the first token the difference is {ratios[0]:.3g} times as large at the site and {ratios[-1]:.3g} at "
        f"the last depth; above {ORDER_OF_MAGNITUDE:.2g} counts as an order of magnitude. The first token's stream is "
        f"at most {norms[peak]:.3g} times the others' mean norm (depth {peak})."
    )
    figures: Figures = {
        "all_over_rest_by_depth_from_site": ratios.tolist(),
        "norm_of_position_0_by_depth": case.first.tolist(),
        "mean_norm_of_other_positions_by_depth": case.others.tolist(),
    }
    return _verdict(bool(ratios.median() > ORDER_OF_MAGNITUDE)), sentence, figures


def _last_block(case: Case) -> Decision:
    change = case.rest[:, -1] / case.rest[:, -2]
    dropping, count = int((change < 1).sum()), len(case.factors)
    sentence = (
        f"In the last block the raw difference is multiplied by {change[0]:.3g} at factor {case.factors[0]:g} and "
        f"{change[-1]:.3g} at factor {case.factors[-1]:g}; it drops for {dropping} of {count} factors, and the claim "
        f"needs all. After the final norm, which transformers lists in the last block's place, it is "
        f"{case.final[0]:.3g} at factor {case.factors[0]:g}, where the raw one is {case.rest[0, -1]:.3g}."
    )
    figures: Figures = {
        "factors": case.factors,
        "raw_before_last_block": case.rest[:, -2].tolist(),
        "raw_after_last_block": case.rest[:, -1].tolist(),
        "after_final_norm": case.final.tolist(),
    }
    return _verdict(dropping == count), sentence, figures


CLAIMS: tuple[tuple[str, Callable[[Case], Decision]], ...] = (
    ("Nothing changes upstream of the site", _upstream),
    ("The difference jumps at the site", _jump),
    ("It keeps growing downstream and is not healed", _growth),
    ("With the first token it is about an order of magnitude larger", _first_token),
    ("It drops at the last block", _last_block),
)


def _decide(decide: Callable[[Case], Decision], case: Case) -> Decision:
    if not case.factors:
        return "undecided", "Only factor 1 was run, which changes nothing.", {}
    if case.first_alone and decide is not _upstream:
        return "undecided", "Nothing but position 0 was scaled, and the claims are about the other positions.", {}
    if decide in (_growth, _last_block) and case.site == case.rest.shape[1] - 1:
        return "undecided", "The scaled block is the last one: no block comes after it.", {}
    return decide(case)
