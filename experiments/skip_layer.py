"""Skip a block, or two neighbours, and ask what the others make of it.

    python -m experiments.skip_layer --model weights/tiny

After a lecture of Mike X Cohen's course on language model mechanisms (skip a layer): a block whose attention and MLP
write nothing returns its input, so attention_scale = mlp_scale = 0 skips it. The norm of the change between
neighbouring depths is then exactly 0 there, and stands beside the clean run's elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from experiments.commandline import command, start
from experiments.common import parse_indices
from experiments.estimates import Estimate, Row, axis
from experiments.figures import Control, Figure, Figures, place_names, rounded
from experiments.runner import Checked, Experiment, Ids, Settings, Start, Study
from experiments.verdicts import Decision, Verdict
from minigpt import GPT2, Comparison, compare, parity
from minigpt.measures import POSITION_SETS, Measure, PositionSet

MEASURES: tuple[Measure, ...] = ("frobenius", "relative", "gauge_free", "kl", "loss_change", "changed")
COSTS: dict[Measure, str] = {
    "loss_change": "loss change, nats per token",
    "kl": "kl, nats per token",
    "changed": "share of positions",
}
CLEAN = "clean"


@dataclass(frozen=True, kw_only=True)
class SkipSettings(Settings):
    """The blocks that are skipped."""

    layers: tuple[int, ...]
    pairs: bool = True


class SkipLayer(Experiment[Comparison]):
    """Blocks that write nothing."""

    name = "skip_layer"
    question = "A block is skipped: what do the others make of it?"
    settings: SkipSettings

    @classmethod
    def from_options(
        cls,
        begin: Start,
        *,
        layers: Annotated[str, typer.Option(help="2 | 2,5 | all; counted from 0")] = "all",
        no_pairs: Annotated[bool, typer.Option("--no-pairs", help="skip single blocks only")] = False,
    ) -> "SkipLayer":
        """Skip every layer alone, and every pair of neighbours among them."""
        chosen = parse_indices(layers, begin.model.config.n_layer, "layer")
        return cls(SkipSettings(**begin.settings(), layers=chosen, pairs=not no_pairs))

    @property
    def skipped(self) -> dict[str, tuple[int, ...]]:
        """Every intervention by name: the blocks that are skipped together."""
        layers = self.settings.layers
        alone = {f"block {layer}": (layer,) for layer in layers}
        pairs = {f"blocks {layer}, {layer + 1}": (layer, layer + 1) for layer in sorted(layers) if layer + 1 in layers}
        return {**alone, **(pairs if self.settings.pairs else {})}

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Comparison:  # noqa: ARG002
        """All interventions beside the clean run."""
        edits = [_skip(*blocks) for blocks in self.skipped.values()]
        return compare(model, ids, edits, predictions=True, max_bytes=self.settings.max_bytes)

    def measure(self, model: GPT2, raw: Comparison) -> dict[str, Tensor]:  # noqa: ARG002
        """`values` [text, set, measure, intervention, place]; `steps` [text, 1 + intervention, block], the norm, over
        all positions but the first, of what every block adds, the clean run's first; `added` [text, intervention],
        the largest norm that a skipped block adds at any position."""
        values = [[raw.measure(name, of) for name in MEASURES] for of in POSITION_SETS]
        steps = torch.cat([raw.clean_steps_sq[None], raw.steps_sq])[..., 1:].sum(-1).sqrt()
        added = torch.stack(
            [of[list(blocks)].amax((0, 2)) for of, blocks in zip(raw.steps_sq, self.skipped.values(), strict=True)]
        )
        return {
            "values": torch.stack([torch.stack(of) for of in values]).movedim(-1, 0),
            "steps": steps.movedim(-1, 0),
            "added": added.sqrt().T,
        }

    def check(self, model: GPT2, raw: Comparison) -> Checked:  # noqa: ARG002
        """A skipped block must add exactly nothing, in every text; CheckError when it does."""
        added = [float(raw.steps_sq[row, list(blocks)].max()) for row, blocks in enumerate(self.skipped.values())]
        if max(added) != 0:
            raise parity.CheckError(f"a skipped block adds {max(added) ** 0.5} to the stream; expected exactly 0.")
        claim = "a skipped block adds exactly nothing to the stream, at every position"
        return Checked(None, [{"claim": claim, "passed": True, "figure": max(added)}])

    def rows(self, study: Study[Comparison]) -> Iterator[Row]:
        """Every measure of every intervention at every place, and what every block adds (metric `step`)."""
        labels = {"model": self.settings.model}
        places = axis("depth", [*range(study.n_layer + 1), "final"])
        axes = [axis("positions", POSITION_SETS), axis("metric", MEASURES), axis("skipped", list(self.skipped)), places]
        for row in study.measured["values"].rows(axes, study.windows):
            yield {**labels, **row}
        blocks = axis("depth", range(1, study.n_layer + 1))
        for row in study.measured["steps"].rows([axis("skipped", [CLEAN, *self.skipped]), blocks], study.windows):
            yield {**labels, "positions": "rest", "metric": "step", **row}

    def verdicts(self, study: Study[Comparison]) -> list[Verdict]:
        """The lecture's observation."""
        added = float(study.measured["added"].value.max())
        decision = Decision(
            "true by construction" if added == 0 else "does not hold",
            "A block whose attention and MLP write nothing returns its input: the stream is the same on both sides.",
            f"The norm of the change between the depths around a skipped block is {added:g}, at every position.",
            {"largest_norm_at_a_skipped_block": added},
            "all",
        )
        return [Verdict.of(1, "Nothing changes between the depths around a skipped block", decision, study.basis)]

    def of(self, study: Study[Comparison], name: Measure, positions: PositionSet = "rest") -> Estimate:
        """A measure: [intervention, place]."""
        where = POSITION_SETS.index(positions)
        return study.measured["values"].at(where, MEASURES.index(name))

    def lines(self, study: Study[Comparison], columns: int) -> Iterator[str]:  # noqa: ARG002
        """What skipping costs, all positions but the first."""
        found = {name: self.of(study, name).value[:, -1] for name in ("loss_change", "kl", "changed")}
        found["relative, last depth"] = self.of(study, "relative").value[:, -2]
        yield f"{'skipped':>14}  " + "".join(f"{name:>22}" for name in found)
        for row, name in enumerate(self.skipped):
            yield f"{name:>14}  " + "".join(f"{float(values[row]):>22.4g}" for values in found.values())
        yield ""

    def figures(self, study: Study[Comparison]) -> Figures:
        """The report's charts."""
        return _figures(self, study)


def _skip(*blocks: int) -> dict[str, float]:
    return {f"blocks.{block}.{part}_scale": 0.0 for block in blocks for part in ("attention", "mlp")}


def _figures(experiment: SkipLayer, study: Study[Comparison]) -> Figures:
    from experiments import charts  # noqa: PLC0415  an extra

    names, places = list(experiment.skipped), place_names(study.n_layer)
    blocks, chosen, spread = places[1:-1], {"skipped": _shown(names)}, study.windows is not None
    rest, title = "Over all tokens but the first.", "change beside the stream's norm (relative)"
    step = "norm of what a block adds, units of the stream"
    steps = charts.parts_by_block("steps", ["datum.skipped == skipped"], blocks, step, chosen, bars=False)
    row = charts.rows_axis("skipped", "skipped", names)
    change = charts.heat_map("change", [], places, row, title, {}, len(names))
    steps_alt = "Lines by block: the norm of what it adds to the stream, clean and with the chosen block skipped."
    change_alt = "A heat map: a row for each skipped block or pair, a column for each place in the stream."
    shown = [
        Figure("steps", "What every block adds", steps_alt, f"A skipped block adds exactly 0. {rest}", steps),
        Figure("change", "The change at every place", change_alt, f"What became of the missing writes. {rest}", change),
    ]
    for metric, label in COSTS.items():
        bars = charts.bars_by_layer("cost", [f"datum.metric == '{metric}'"], names, "skipped", label, {}, spread)
        alt = f"Bars for every skipped block, or pair of neighbours: {label}."
        shown.append(Figure(metric, f"What skipping costs: {metric.replace('_', ' ')}", alt, rest, bars))
    control = Control("skipped", "skipped", [(name, name) for name in names], _shown(names))
    return Figures(shown, _data(experiment, study, names), {"steps": blocks, "change": places}, [control])


def _data(experiment: SkipLayer, study: Study[Comparison], names: list[str]) -> dict[str, Any]:
    """The datasets of the charts."""
    steps, relative = study.measured["steps"].value, experiment.of(study, "relative").value
    data: dict[str, Any] = {"steps": [], "cost": []}
    data["change"] = [{"skipped": name, "value": rounded(relative[row].tolist())} for row, name in enumerate(names)]
    for index, name in enumerate(names):
        for part, row in (("clean", 0), ("skipped", index + 1)):
            data["steps"].append({"part": part, "skipped": name, "value": rounded(steps[row].tolist())})
        for metric in COSTS:
            at = experiment.of(study, metric).at(index, -1)
            value, low, high = rounded([float(at.value), float(at.low), float(at.high)])
            data["cost"].append({"metric": metric, "place": name, "value": value, "low": low, "high": high})
    return data


def _shown(names: list[str]) -> str:
    """The intervention that a page shows first: the lecture's, where it was run."""
    return "block 5" if "block 5" in names else names[0]


main = command(SkipLayer.from_options)

if __name__ == "__main__":
    start(main)
