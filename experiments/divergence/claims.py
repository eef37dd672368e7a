"""The five claims of the classic study, each judged on the model at hand.

The claims, in the order of the lecture and the article that retells it:

1. Nothing changes upstream of the site.
2. The difference jumps at the site.
3. It keeps growing through the later layers: the norm layers downstream do not heal it.
4. With the first token included it is about an order of magnitude larger.
5. It drops slightly at the last block.

What decides is measured per text (`evidence`), so that over a corpus it has an interval.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.divergence.rows import Scaled, index_of, layer_of, scaled_in
from experiments.harness.table import Table, Tables, by_text
from experiments.harness.verdicts import (
    JUMP_TOLERANCE,
    MOST,
    ORDER_OF_MAGNITUDE,
    UNCHANGED,
    Decision,
    Outcome,
    Verdict,
    above,
    all_of,
    below,
    counted,
    figures_of,
    within,
)
from experiments.page.figures import label_of
from minigpt import Sweep
from minigpt.measures import Measure

GROWTH = {
    "holds": "Later blocks add to the change, and turn it away from anything that a norm layer could undo.",
    "does not hold": "For at least one factor, the later blocks take back some of the change.",
    "undecided": "Some intervals include the threshold, so it is undecided whether the later blocks add to the change "
    "for every factor.",
}
DILUTED = (
    "The change grows, but the stream outgrows it, so that in direction, which is all that a block reads, it shrinks: "
    "dilution, not repair."
)
TURNED_BACK = (
    "The change grows in length, but turns back towards the clean direction, and direction is all that a block reads."
)
UNCHANGED_SOMEWHERE = "For some factor or text, scaling changes nothing: this claim has no change to follow."
WHO = ("position_0", "others")
ALONE_MEASURES: tuple[Measure, ...] = ("frobenius", "kl")
"""What is measured when position 0 alone is scaled, and all the others alone: the norm at the last depth, over all
positions, and kl over all positions."""
UNITS_ALONE: dict[Measure, str] = {"frobenius": "", "kl": " nats"}


def evidence(table: Table, rounding: float = 0.0) -> Tables:
    """What decides the claims, per text, from the rows of some texts: over all positions but the first unless named.

    Axes [text, layer, factor]: `growth`, log of the difference at the last depth over that at the site, which
    is also log of `relative` over `passive`; `rising`, the share of later blocks in which it grows; `dilution`, log
    of `relative` at the last depth over that at the site; `turning`, `gauge_free` at the last depth less that after
    the first block that could react; `last_block`, log of what that block multiplies the difference by.
    `with_first` [text, layer, factor, depth]: log of the difference over all positions over that over the rest;
    `with_first_mean` [text, layer] its mean over factors and over depths from the site on. A log of 0 is not a number,
    and neither is any log where the change at the site is no larger than `rounding` times the stream.
    """
    names = (("frobenius", "rest"), ("frobenius", "all"), ("relative", "rest"), ("gauge_free", "rest"))
    rest, everything, relative, gauge = (table.at(metric=name, positions=of).value for name, of in names)
    last, site = rest.shape[-1] - 2, torch.tensor([layer_of(scaled) + 1 for scaled in table.axes["layer"]])
    later = torch.arange(1, last + 1) > site[:, None]  # [layer, block]: whether the block comes after the site
    rest = rest.where((_at(relative, site) > rounding)[..., None], 0.0)
    rises = (rest[..., 1:-1] > rest[..., :-2]) & later[:, None]
    axes = {"layer": table.axes["layer"], "factor": table.axes["factor"]}
    found = {
        "growth": _log(rest[..., last], _at(rest, site)),
        "rising": rises.sum(-1) / later.sum(1)[:, None],
        "dilution": _log(relative[..., last], _at(relative, site)),
        "turning": gauge[..., last] - _at(gauge, (site + 1).clamp_max(last)),
        "last_block": _log(rest[..., last], rest[..., last - 1]),
    }
    with_first = _log(everything, rest)[..., :-1]
    return {
        **{name: by_text(values, **axes) for name, values in found.items()},
        "with_first": by_text(with_first, **axes, depth=range(last + 1)),
        "with_first_mean": by_text(_mean_from_site(with_first, site, axes["factor"]), layer=axes["layer"]),
    }


def _at(values: Tensor, depth: Tensor) -> Tensor:
    """Numbers [text, layer, factor, depth] at a depth of every layer's own."""
    return values.gather(-1, depth[:, None, None].expand(*values.shape[:-1], 1)).squeeze(-1)


def _mean_from_site(values: Tensor, site: Tensor, factors: Sequence[float]) -> Tensor:
    """Mean of [text, layer, factor, depth] over the factors that are not 1, and over depths from the site on."""
    changed = [j for j, factor in enumerate(factors) if factor != 1]
    after = torch.arange(values.shape[-1]) >= site[:, None]
    return values[:, :, changed].where(after[:, None], 0.0).sum((2, 3)) / (len(changed) * after.sum(1))


def alone(results: Sequence[Sweep]) -> Tables:
    """`ALONE_MEASURES` of position 0 scaled alone, and of the others alone: [text, who, metric, layer, factor]."""
    if not results:
        return {}
    names = ALONE_MEASURES if results[0].statistics.predictions else ALONE_MEASURES[:1]
    last = {"frobenius": -2, "kl": -1}
    values = [torch.stack([of.measure(name, "all")[:, :, last[name]] for name in names]) for of in results]
    axes = {"who": WHO, "metric": names, "layer": scaled_in(results[0]), "factor": results[0].factors}
    return {"alone": by_text(torch.stack(values).movedim(-1, 0), **axes)}


def _log(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Log of a ratio; not a number where one of the two is 0, or both are, as before the site."""
    ratio = (numerator / denominator).log()
    return ratio.where(ratio.isfinite(), torch.nan)


@dataclass(frozen=True)
class Case:
    """All that the claims about one site are judged on: axis `factor` runs over the factors that are not 1."""

    tables: Tables
    """What `measured`, `evidence` and `alone` give, of one text or over windows."""
    scaled: Scaled
    site: str
    positions: tuple[int, ...] | None
    upstream: float
    """Largest difference before the site, of a run that shares nothing with the clean one."""

    @property
    def layer(self) -> int:
        """The scaled block."""
        return layer_of(self.scaled)

    @property
    def n_layer(self) -> int:
        """How many blocks there are."""
        return len(self.tables["values"].axes["depth"]) - 2

    @property
    def factors(self) -> list[float]:
        """The factors that are not 1."""
        return [factor for factor in self.tables["values"].axes["factor"] if factor != 1]

    def of(self, name: str) -> Table:
        """Evidence about this site: [factor, ...], or a single number where it is a mean over factors."""
        table = self.tables[name].at(layer=self.scaled)
        return table.at(factor=self.factors) if "factor" in table.axes else table

    def measure(self, name: Measure) -> Table:
        """A measure over all positions but the first: [factor, depth]."""
        return self.of("values").at(metric=name, positions="rest")

    def by_block(self, name: Measure) -> Table:
        """A measure of what blocks write: [factor, block]."""
        return self.measure(name).at(depth=[*range(1, self.n_layer + 1)])

    def norm(self, of: str) -> Tensor:
        """One of `NORMS` of the clean stream, by depth."""
        return self.tables["norms"].at(of=of, depth=[*range(self.n_layer + 1)]).value


def judge(
    tables: Tables, site: str, positions: tuple[int, ...] | None, upstream: Sequence[float], basis: str
) -> list[Verdict]:
    """Every claim's verdict for everything that was scaled: of its text, or over its windows.

    `tables` holds what `measured`, `evidence` and `alone` give; `upstream` is, for every entry, the largest difference
    before its site of a run that shares nothing with the clean one; `basis` says what the numbers rest on.
    """
    verdicts = list[Verdict]()
    for scaled, largest in zip(tables["values"].axes["layer"], upstream, strict=True):
        case = Case(tables, scaled, site, positions, largest)
        for number, (claim, decide) in enumerate(CLAIMS, start=1):
            decision = _decide(decide, case)
            verdicts.append(Verdict.of(number, claim, decision, basis, layer_of(scaled), index_of(scaled)))
    return verdicts


def _decide(decide: Callable[[Case], Decision], case: Case) -> Decision:
    if not case.factors:
        return Decision("undecided", "Only factor 1 was run, which changes nothing.")
    if case.positions == (0,) and decide is not _upstream:
        return Decision("undecided", "Only position 0 was scaled, and this claim is about the other positions.")
    if decide in (_growth, _last_block) and case.layer == case.n_layer - 1:
        return Decision("undecided", "The scaled block is the last one: no block comes after it.")
    if decide is _growth and case.layer == case.n_layer - 2:
        return Decision("undecided", "Only one block comes after the scaled one: nothing can keep growing.")
    if not all(bool(case.of(name).value.isfinite().all()) for name in RATIOS.get(decide, ())):
        return Decision("undecided", UNCHANGED_SOMEWHERE)
    return decide(case)


def _ends(case: Case, table: Table, digits: int = 3) -> str:
    """A figure at the first and the last factor, in words."""
    ends = dict.fromkeys((case.factors[0], case.factors[-1]))
    return " and ".join(f"{within(table.at(factor=factor), digits)} at factor {label_of(factor)}" for factor in ends)


def _upstream(case: Case) -> Decision:
    holds = case.upstream == 0
    sentence = (
        "Blocks before the site read the same numbers in both runs, whatever the weights are."
        if holds
        else "A block before the site differs between the two runs, and no weights can explain that."
    )
    said = f"In a run of its own, the largest difference before the site is {case.upstream:g}."
    outcome: Outcome = "true by construction" if holds else "does not hold"
    basis = "" if case.tables["values"].windows is None else "a run of its own over the first windows"
    return Decision(outcome, sentence, said, {"largest_difference_upstream": case.upstream}, "all", basis)


def _jump(case: Case) -> Decision:
    place = case.layer + 1
    curve, norm = case.measure("frobenius").at(depth=place), float(case.norm("of the others together")[place])
    jump, figures = curve.value, {"factors": case.factors, **figures_of(jump=curve), "norm_at_site": norm}
    said, jumps = f"The jump is {_ends(case, curve)}.", bool(((jump > 0) & case.of("growth").value.isfinite()).all())
    if not jumps:
        return Decision("does not hold", "For some factor or text, nothing changes at the site.", said, figures)
    if case.site != "output" or case.positions is not None:
        return Decision("holds", "What was scaled has changed, and the stream that it is part of.", said, figures)
    expected = (torch.tensor(case.factors, dtype=torch.float64) - 1).abs() * norm
    if bool(((jump - expected).abs() > JUMP_TOLERANCE * norm).any()):
        return Decision(
            "does not hold", "The jump is not what multiplying the stream by s must make it.", said, figures
        )
    sentence = (
        "Multiplying the stream by s changes it by s - 1 times itself: the jump is that, whatever the weights are."
    )
    return Decision("true by construction", sentence, said, figures)


def _growth(case: Case) -> Decision:
    """Holds if, for every factor, later blocks add to the difference, in most of them, and turn it too.

    Three figures: the difference grows from the site to the last depth, which is the same as `relative` above
    `passive` there; it rises in most of the blocks between; and `gauge_free`, which no rescaling can move, is
    larger at the end than after the first block that could react.
    """
    growth, rising, turning, dilution = (case.of(name) for name in ("growth", "rising", "turning", "dilution"))
    tests = ((growth, UNCHANGED), (rising, MOST), (turning, UNCHANGED))
    sure = torch.stack([above(table, threshold) for table, threshold in tests])
    never = torch.stack([below(table, threshold) for table, threshold in tests])
    outcome = all_of(sure, never)
    sentence = GROWTH[outcome]
    if bool(sure[:2].all()) and bool(never[2].any()):
        diluted = bool((never[2] & below(dilution, UNCHANGED)).any())
        sentence = DILUTED if diluted else TURNED_BACK
    repair, amplify, other = _signs(case)
    said = (
        f"The change keeps growing, and turns farther away, for {int(sure.all(0).sum())} of "
        f"{counted(len(case.factors), 'factor')}. From the site to the last depth its norm, and so relative over "
        f"passive, is multiplied by {_ends(case, growth.map(torch.exp))}. Relative to the stream, which grows as well, "
        f"it is multiplied by {_ends(case, dilution.map(torch.exp))}. gauge_free rises by {_ends(case, turning)}. A "
        f"block repairs if what it writes points against the change that it carries, and amplifies if it points along "
        f"it. Blocks that repair for every factor: {repair}; that amplify for every factor: {amplify}; that do "
        f"neither: {other}."
    )
    alignments: tuple[Measure, ...] = ("alignment", "attention_alignment", "mlp_alignment")
    parts = {f"{name}_by_block": case.by_block(name) for name in alignments}
    multipliers = {"relative_over_passive": growth.map(torch.exp), "relative_last_over_site": dilution.map(torch.exp)}
    figures = {
        "factors": case.factors,
        **figures_of(**multipliers, share_of_later_blocks_where_it_rises=rising, gauge_free_rise=turning),
        **figures_of(**parts),
    }
    return Decision(outcome, sentence, said, figures)


def _signs(case: Case) -> tuple[str, ...]:
    """The later blocks whose answer is negative for every factor, positive for every factor, and the others."""
    answers, blocks = case.by_block("alignment"), range(case.layer + 1, case.n_layer)
    error = torch.zeros_like(answers.value) if answers.error is None else answers.error.nan_to_num(0.0)
    repair = [block for block in blocks if bool((answers.high[:, block] < -error[:, block]).all())]
    amplify = [block for block in blocks if bool((answers.low[:, block] > error[:, block]).all())]
    other = [block for block in blocks if block not in (*repair, *amplify)]
    return tuple(", ".join(map(str, found)) or "none" for found in (repair, amplify, other))


def _first_token(case: Case) -> Decision:
    """Holds if with position 0 the difference is nearer to 10 times as large than to once, on average over factors
    and over depths from the site on."""
    ratios = case.of("with_first").at(depth=[*range(case.layer + 1, case.n_layer + 1)])
    mean = case.of("with_first_mean")
    outcome = all_of(above(mean, ORDER_OF_MAGNITUDE), below(mean, ORDER_OF_MAGNITUDE))
    first, others = case.norm("of position 0"), case.norm("mean of the others")
    share = first / others
    peak = int(share.argmax())
    sentence = {
        "holds": "The first token's stream is so long that its change drowns the others'.",
        "does not hold": "The first token does not make the change larger by an order of magnitude.",
        "undecided": "The interval includes the threshold, so it is undecided whether the first token makes the change "
        "larger by an order of magnitude.",
    }[outcome]
    said = (
        f"With the first token the difference is {within(mean.map(torch.exp))} times as large, averaged over depths "
        f"and factors; above {math.exp(ORDER_OF_MAGNITUDE):.2g} counts as an order of magnitude. The first token's "
        f"stream is at most {share[peak]:.3g} times the others' mean norm (depth {peak}).{_alone_in_words(case)}"
    )
    figures = {
        "factors": case.factors,
        **figures_of(all_over_rest=mean.map(torch.exp), all_over_rest_by_depth_from_site=ratios.map(torch.exp)),
        "norm_of_position_0_by_depth": first.tolist(),
        "mean_norm_of_other_positions_by_depth": others.tolist(),
        **_alone(case),
    }
    return Decision(outcome, sentence, said, figures, "all")


def alone_factors(factors: Sequence[float]) -> tuple[float, ...]:
    """The factors for which position 0, and the others, are scaled alone: the smallest and the largest but 1."""
    changed = [factor for factor in factors if factor != 1]
    return tuple(dict.fromkeys((min(changed), max(changed)))) if changed else ()


def _alone(case: Case) -> dict[str, object]:
    """The figures of position 0 scaled alone and of the others alone, at `alone_factors`."""
    if "alone" not in case.tables:
        return {}
    found = case.tables["alone"].at(layer=case.scaled)
    named = {f"{who}_alone_{name}": found.at(who=who, metric=name) for who in WHO for name in found.axes["metric"]}
    return {"alone_factors": list(found.axes["factor"]), **figures_of(**named)}


def _alone_in_words(case: Case) -> str:
    if "alone" not in case.tables:
        return ""
    found = case.tables["alone"].at(layer=case.scaled)
    factor, names = found.axes["factor"][0], found.axes["metric"]
    first, others = (
        [within(found.at(who=who, metric=name, factor=factor)) + UNITS_ALONE[name] for name in names] for who in WHO
    )
    between = ", and the kl of all predictions by "
    return (
        f" At factor {label_of(factor)}, scaling position 0 alone moves the last depth by {between.join(first)}. "
        f"Scaling all the others alone moves the last depth by {between.join(others)}."
    )


def _last_block(case: Case) -> Decision:
    change = case.of("last_block")
    outcome = all_of(below(change, UNCHANGED), above(change, UNCHANGED))
    curve = case.measure("frobenius").value
    dropping = int(below(change, UNCHANGED).sum())
    sentence = {
        "holds": "The last block takes back a part of the change.",
        "does not hold": "The last block does not take back a part of the change for every factor. The final norm can "
        "make it look as if it did.",
        "undecided": "Some intervals include the threshold, so it is undecided whether the last block takes back a "
        "part of the change.",
    }[outcome]
    said = (
        f"The last block multiplies the raw difference by {_ends(case, change.map(torch.exp))}. It drops for "
        f"{dropping} of {counted(len(case.factors), 'factor')}, and the claim needs all. At factor "
        f"{label_of(case.factors[0])} it is {curve[0, -2]:.3g} after the last block, and {curve[0, -1]:.3g} after the "
        f"final norm, which transformers lists in the last block's place."
    )
    figures = {
        "factors": case.factors,
        **figures_of(last_block_multiplies_by=change.map(torch.exp)),
        "raw_before_last_block": curve[:, -3].tolist(),
        "raw_after_last_block": curve[:, -2].tolist(),
        "after_final_norm": curve[:, -1].tolist(),
    }
    return Decision(outcome, sentence, said, figures)


CLAIMS: tuple[tuple[str, Callable[[Case], Decision]], ...] = (
    ("Nothing changes upstream of the site", _upstream),
    ("The difference jumps at the site", _jump),
    ("It keeps growing downstream and is not healed", _growth),
    ("With the first token it is about an order of magnitude larger", _first_token),
    ("It drops at the last block", _last_block),
)
RATIOS: dict[Callable[[Case], Decision], tuple[str, ...]] = {
    _growth: ("growth", "dilution"),
    _first_token: ("with_first_mean",),
    _last_block: ("last_block",),
}
"""The evidence that each decision rests on and that is not a number where nothing changes."""
