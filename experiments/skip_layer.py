"""Skip a block, or two neighbours, and ask what the others make of it.

    python -m experiments.skip_layer --model weights/tiny

After a lecture of Mike X Cohen's course on language model mechanisms (skip a layer): a block whose attention and MLP
write nothing returns its input, so attention_scale = mlp_scale = 0 skips it. The norm of the change between
neighbouring depths is then exactly 0 there, and stands beside the clean run's elsewhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import typer

from experiments.harness.command import command, start
from experiments.harness.experiment import Checked, Experiment, Ids, Settings, Start, Study
from experiments.harness.options import Layers, Options
from experiments.harness.table import Row, Tables, by_measure, by_text
from experiments.harness.verdicts import Decision, Verdict, readable
from experiments.page.figures import Control, Figure, Figures, dataset, place_names
from minigpt import GPT2, Comparison, compare, parity
from minigpt.measures import Measure

MEASURES: tuple[Measure, ...] = ("frobenius", "relative", "gauge_free", "kl", "loss_change", "changed")
COSTS: dict[Measure, str] = {
    "loss_change": "loss change, nats per token",
    "kl": "kl, nats per token",
    "changed": "share of positions",
}
CLEAN = "clean"
PARTS = (CLEAN, "skipped")
"""The lines of what every block adds, as the chart names them."""


@dataclass(frozen=True, kw_only=True)
class SkipOptions(Options):
    """Skip every layer alone, and every pair of neighbours among them."""

    layers: Layers = "all"
    no_pairs: Annotated[bool, typer.Option("--no-pairs", help="skip single blocks only")] = False


@dataclass(frozen=True, kw_only=True)
class SkipSettings(Settings):
    """The blocks that are skipped."""

    layers: tuple[int, ...]
    pairs: bool = True


class SkipLayer(Experiment[Comparison]):
    """Blocks that write nothing."""

    name = "skip_layer"
    question = "A block is skipped: what do the others make of it?"
    options = SkipOptions
    lectures: ClassVar[Mapping[str, Mapping[str, str | bool]]] = {
        "skipAlayer": {"model": "gpt2", "layers": "5", "no_pairs": True}
    }
    settings: SkipSettings

    @classmethod
    def from_options(cls, begin: Start[SkipOptions]) -> "SkipLayer":
        """The blocks that were asked for."""
        chosen = begin.layers(begin.options.layers)
        return cls(SkipSettings(**begin.settings(), layers=chosen, pairs=not begin.options.no_pairs))

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
        return compare(model, ids, edits, predictions=True, max_bytes=self.settings.max_bytes, steps=True)

    def measure(self, model: GPT2, raw: Comparison) -> Tables:
        """`values` [text, positions, metric, skipped, depth]; `steps` [text, skipped, depth], the norm, over all
        positions but the first, of what every block adds, the clean run's first; `added` [text, skipped], the largest
        norm that a skipped block adds at any position."""
        blocks, skipped = range(1, model.config.n_layer + 1), list(self.skipped)
        steps = torch.cat([raw.clean_steps_sq[None], raw.steps_sq])[..., 1:].sum(-1).sqrt()
        added = torch.stack(
            [of[list(blocks)].amax((0, 2)) for of, blocks in zip(raw.steps_sq, self.skipped.values(), strict=True)]
        )
        return {
            "values": by_measure(raw, MEASURES, skipped=skipped),
            "steps": by_text(steps.movedim(-1, 0), skipped=[CLEAN, *skipped], depth=blocks),
            "added": by_text(added.sqrt().T, skipped=skipped),
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
        yield from study.tables["values"].rows(model=self.settings.model)
        yield from study.tables["steps"].rows(model=self.settings.model, positions="rest", metric="step")

    def verdicts(self, study: Study[Comparison]) -> list[Verdict]:
        """The lecture's observation."""
        added = float(study.tables["added"].value.max())
        decision = Decision(
            "true by construction" if added == 0 else "does not hold",
            "A block whose attention and MLP write nothing returns its input: the stream is the same on both sides.",
            f"The norm of the change between the depths around a skipped block is {added:g}, at every position.",
            {"largest_norm_at_a_skipped_block": added},
            "all",
        )
        return [Verdict.of(1, "Nothing changes between the depths around a skipped block", decision, study.basis)]

    def lines(self, study: Study[Comparison], columns: int) -> Iterator[str]:  # noqa: ARG002
        """What skipping costs, all positions but the first."""
        rest, last = study.tables["values"].at(positions="rest"), study.n_layer
        found = {name: rest.at(metric=name, depth="final") for name in ("loss_change", "kl", "changed")}
        found["relative, last depth"] = rest.at(metric="relative", depth=last)
        yield f"{'skipped':>14}  " + "".join(f"{name:>22}" for name in found)
        for skipped in self.skipped:
            values = (float(table.at(skipped=skipped).value) for table in found.values())
            yield f"{skipped:>14}  " + "".join(f"{readable(value):>22}" for value in values)
        yield ""

    def figures(self, study: Study[Comparison]) -> Figures:
        """The report's charts."""
        return _figures(study, list(self.skipped))


def _skip(*blocks: int) -> dict[str, float]:
    return {f"blocks.{block}.{part}_scale": 0.0 for block in blocks for part in ("attention", "mlp")}


def _figures(study: Study[Comparison], names: list[str]) -> Figures:
    from experiments.page import charts  # noqa: PLC0415  an extra

    places = place_names(study.n_layer)
    blocks, chosen, spread = places[1:-1], {"skipped": _shown(names)}, study.windows is not None
    rest, title = "Over all tokens but the first.", "change beside the stream's norm (relative)"
    step = "norm of what a block adds, units of the stream"
    steps = charts.parts_by_block("steps", ["datum.skipped == skipped"], blocks, step, chosen, PARTS)
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
    return Figures(shown, _data(study, names), {"steps": blocks, "change": places}, [control])


def _data(study: Study[Comparison], names: list[str]) -> dict[str, Any]:
    """The datasets of the charts."""
    rest, steps = study.tables["values"].at(positions="rest"), study.tables["steps"]
    change, depths = rest.at(metric="relative"), rest.axes["depth"]
    costs = rest.at(metric=list(COSTS), depth="final").named("skipped", "place", names)
    clean = list(steps.at(skipped=CLEAN).rows())
    pairs = (
        [*({"part": PARTS[0], "skipped": name, **row} for row in clean),
         *steps.at(skipped=name).rows(part=PARTS[1], skipped=name)]
        for name in names
    )  # fmt: skip
    return {
        "change": dataset(change.rows(), "depth", depths),
        "cost": dataset(costs.rows()),
        "steps": dataset((row for pair in pairs for row in pair), "depth", steps.axes["depth"]),
    }


def _shown(names: list[str]) -> str:
    """The intervention that a page shows first: the lecture's, where it was run."""
    return "block 5" if "block 5" in names else names[0]


main = command(SkipLayer)

if __name__ == "__main__":
    start(main)
