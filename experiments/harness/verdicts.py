"""What became of a claim: an outcome, the figures that decided it, and sentences to read.

A figure decides by the side of a threshold on which it lies: of one text the number itself, over a corpus
the whole interval of its mean. If the interval includes the threshold, the figure decides nothing, and neither does
a figure that is undefined, such as a ratio of 0 to 0.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from experiments.harness.table import Table

# The thresholds of all experiments.
UNCHANGED = 0.0
"""A logarithm of a ratio, a difference, or a loss change above it is growth; below it, shrinking."""
MOST = 0.5
"""A share above it is most: of blocks, of layers, of the kl."""
ORDER_OF_MAGNITUDE = math.log(math.sqrt(10))
"""A ratio whose logarithm is above this is nearer to 10 than to 1: "about an order of magnitude"."""
JUMP_TOLERANCE = 0.01
"""Relative to the stream's norm: a jump this near to |s - 1| times it is that, also where bfloat16 rounds the factor;
the sweep's own check is far stricter."""
NEAR_0995 = 0.99
"""A correlation above this is within twice the distance that 0.995 has from 1."""
FEWEST_WINDOWS = 20
"""A bootstrap of fewer draws its interval from too few values: it comes out too narrow, of one window it has no
width."""

Outcome = Literal["holds", "does not hold", "true by construction", "undecided"]


@dataclass(frozen=True)
class Decision:
    """A claim's outcome and what it rests on."""

    verdict: Outcome
    sentence: str
    """For a student: what happened."""
    evidence: str = ""
    """The figures that decided, in words."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Name -> number or list; over a corpus name_low and name_high beside it are its interval."""
    positions: str = "rest"
    """The position set that the figures are of."""
    basis: str = ""
    """What it rests on, where that is not what all the study's numbers rest on."""


@dataclass(frozen=True)
class Verdict:
    """What became of one claim at one site."""

    number: int
    claim: str
    verdict: Outcome
    sentence: str
    evidence: str
    positions: str
    basis: str
    """One prompt, or how many windows."""
    figures: dict[str, Any]
    layer: int | None = None
    """Where the scale acted; None for a claim about all layers."""
    index: Mapping[str, int] = field(default_factory=dict)
    """Which entry of the site it acted on, where it has several: {"head": 3}."""

    @classmethod
    def of(
        cls,
        number: int,
        claim: str,
        decision: Decision,
        basis: str,
        layer: int | None = None,
        index: Mapping[str, int] | None = None,
    ) -> "Verdict":
        """A decision about a numbered claim."""
        figures = {name: _finite(value) for name, value in decision.figures.items()}
        parts = (decision.verdict, decision.sentence, decision.evidence, decision.positions)
        return cls(number, claim, *parts, decision.basis or basis, figures, layer, index or {})

    @property
    def where(self) -> str:
        """The site in words."""
        return "all layers" if self.layer is None else describe_entry(self.layer, self.index)

    def to_json(self) -> dict[str, Any]:
        """For summary.json."""
        named = {name: value for name, value in asdict(self).items() if name != "index"}
        return {**named, **self.index, "where": self.where}

    def over(self, windows: int | None) -> "Verdict":
        """The same, undecided where it rests on intervals over too few windows."""
        if windows is None or windows >= FEWEST_WINDOWS or self.verdict not in ("holds", "does not hold"):
            return self
        sentence = (
            f"An interval over {counted(windows, 'window')} is too narrow to be trusted; it takes {FEWEST_WINDOWS} "
            "windows or more."
        )
        return replace(self, verdict="undecided", sentence=sentence)


def describe_entry(layer: int, index: Mapping[str, int] | None = None) -> str:
    """A block, or a head of it, say, in words."""
    return ", ".join([f"block {layer}", *(f"{what} {number}" for what, number in (index or {}).items())])


def site_in_words(site: str, index: Mapping[str, int]) -> str:
    """A site, or an entry of it: `mlp`, `head 3`; `query of head 3`, where the index counts something else."""
    entry = ", ".join(f"{what} {number}" for what, number in index.items())
    return entry if site in index else f"{site} of {entry}" if entry else site


def counted(count: int, what: str) -> str:
    """`1 window`, `2 windows`."""
    return f"{count} {what}{'s' * (count != 1)}"


def readable(value: float, digits: int = 4) -> str:
    """A number for a reader, who is told in words that there is none."""
    return "undefined" if math.isnan(value) else f"{value:.{digits}g}"


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a figure that is not finite becomes null."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def figures_of(**tables: Table) -> dict[str, Any]:
    """Numbers as figures: the values, and over a corpus their intervals."""
    figures: dict[str, Any] = {}
    for name, table in tables.items():
        figures[name] = table.value.tolist()
        if table.spread:
            figures |= {f"{name}_low": table.low.tolist(), f"{name}_high": table.high.tolist()}
    return figures


def above(table: Table, threshold: float) -> Tensor:
    """Which numbers lie above a threshold with all of their interval: bool."""
    return table.low > threshold


def below(table: Table, threshold: float) -> Tensor:
    """Which numbers lie at or below a threshold with all of their interval: bool."""
    return table.high <= threshold


def all_of(true: Tensor, false: Tensor) -> Outcome:
    """The outcome of a claim about every one of some figures: `true` and `false` say which of them are sure."""
    if bool(true.all()):
        return "holds"
    return "does not hold" if bool(false.any()) else "undecided"


def judged(figure: Table, threshold: float, holds: str, fails: str, evidence: str, **more: Table) -> Decision:
    """The decision about a claim that one figure is above a threshold; `more` are the figures to keep, by name."""
    outcome = all_of(above(figure, threshold), below(figure, threshold))
    undecided = "The interval includes the threshold, so it is undecided."
    if bool(figure.value.isnan()):
        undecided = "The figure is undefined here, so it decides nothing."
    sentence = {"holds": holds, "does not hold": fails, "undecided": undecided}[outcome]
    return Decision(outcome, sentence, evidence, figures_of(**more), "all")


def within(table: Table, digits: int = 3) -> str:
    """A single number in words, with its interval where it has one."""
    value = float(table.value)
    if not table.spread or math.isnan(value):
        return readable(value, digits)
    return f"{readable(value, digits)} ({readable(float(table.low), digits)} to {readable(float(table.high), digits)})"


def lines_of(verdicts: Sequence[Verdict], columns: int) -> Iterator[str]:
    """Verdicts for a terminal: the first site's in full, the others' in a line each."""
    sites = list(dict.fromkeys(verdict.where for verdict in verdicts))
    for verdict in verdicts:
        if verdict.where == sites[0]:
            yield f"{verdict.number}. {verdict.claim}: {verdict.verdict} ({verdict.basis})."
            for text in (verdict.sentence, verdict.evidence):
                if text:
                    yield textwrap.fill(text, columns, initial_indent="   ", subsequent_indent="   ")
    for site in sites[1:]:
        others = [verdict for verdict in verdicts if verdict.where == site]
        yield f"{site}: " + "; ".join(f"{verdict.number} {verdict.verdict}" for verdict in others)
