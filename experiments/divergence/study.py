"""The study: scale the output of an early block, and follow the change to the last layer.

    python -m experiments.divergence --model weights/tiny --layers 2 --factors 0.5:1.5:0.05

After a lecture of Mike X Cohen's course on language model mechanisms (notebook
part6_hiddenStates_scalingImpact). Parity with Hugging Face is certified first; the sweep is checked
against what must be true of any weights; then five claims about the change get a verdict each.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from tqdm import tqdm

from experiments.divergence import claims
from experiments.divergence.rows import FIRST, LAST, columns_of, in_words, layer_of, measured, scaled_in, tokens_of
from experiments.harness.command import command
from experiments.harness.experiment import SHORTEST, Checked, Experiment, Ids, Settings, Start, Study
from experiments.harness.options import SITE, Layers, Options, parse_numbers
from experiments.harness.running import self_checked
from experiments.harness.table import Row, Table, Tables
from experiments.harness.verdicts import Verdict
from experiments.harness.writing import can_draw
from experiments.page.figures import Figures, label_of
from minigpt import GPT2, Sweep, sweep
from minigpt.engine import StreamOverflowError
from minigpt.parameters import natives, parameter_name

MOST_CELLS = 4_000_000
"""Layers x factors x places x positions of a sweep that only the report needs: its numbers take about 250 MB."""

ROUNDINGS = 1
"""Where a scale acts within a block, a difference of so many roundings of the stream after it is no change."""


@dataclass(frozen=True, kw_only=True)
class GridOptions(Options):
    """Scale a site of some layers by some factors, and follow the change to the last layer."""

    layers: Layers = "2"
    factors: Annotated[str, typer.Option(help="0.5,2 | 0.5:1.5:0.05, both ends included")] = "0.5:1.5:0.05"
    site: Annotated[str, typer.Option(help=SITE)] = "output"
    indices: Annotated[
        str, typer.Option("--indices", "--heads", help="of a site that has several, such as head: all | 0,3")
    ] = "all"
    positions: Annotated[str, typer.Option(help="the positions that alone are scaled: all | 0,3")] = "all"
    no_predictions: Annotated[
        bool, typer.Option("--no-predictions", help="leave out kl and loss, which take the unembedding")
    ] = False


@dataclass(frozen=True, kw_only=True)
class GridSettings(Settings):
    """The grid that was asked for."""

    layers: tuple[int, ...]
    factors: tuple[float, ...]
    site: str = "output"
    indices: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    predictions: bool = True

    def sweep(self, model: GPT2, ids: Ids, progress: bool = False, **other: Any) -> Sweep:
        """Run the grid on some texts; `other` replaces fields of it."""
        asked = {
            name: getattr(self, name) for name in ("layers", "factors", "site", "indices", "positions", "predictions")
        }
        return sweep(model, ids, **{**asked, **other}, max_bytes=self.max_bytes, progress=partial(_bar, progress))


@dataclass(frozen=True)
class Runs:
    """The sweeps of some texts."""

    result: Sweep
    whole: Sweep
    """Of every layer, for a prompt's report; else the same."""
    alone: tuple[Sweep, ...]
    """Position 0 scaled alone, and all the others alone, by `claims.alone_factors`; none where positions were given."""


class Divergence(Experiment[Runs]):
    """The study of one grid."""

    name = "divergence"
    question = "A block's output is scaled: does the change heal or grow on its way to the last layer?"
    options = GridOptions
    lectures: ClassVar[Mapping[str, Mapping[str, str | bool]]] = {
        "hiddenStates_scalingImpact": {
            "model": "gpt2",
            "prompt": "Duct tape will very useful after the apocalypse.",
            "layers": "2",
            "factors": "0.5:1.5:0.05",
            "site": "output",
        }
    }
    settings: GridSettings

    @classmethod
    def from_options(cls, begin: Start[GridOptions]) -> "Divergence":
        """The grid that was asked for; a window of a corpus holds every scaled position."""
        asked = begin.options
        at = begin.positions(asked.positions)
        settings = GridSettings(
            **begin.settings(shortest=max(SHORTEST, 1 + max(at or [0]))),
            layers=begin.layers(asked.layers),
            factors=parse_numbers(asked.factors, "--factors"),
            site=begin.site(asked.site),
            indices=begin.indices(asked.indices, asked.site),
            positions=at,
            predictions=not asked.no_predictions,
        )
        return cls(settings)

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Runs:
        """The grid, and position 0 alone beside the others alone; of a prompt every layer, for the report."""
        asked = self.settings
        whole = self._every_layer(model, ids) if alone and can_draw() else None
        result = whole.of_layers(asked.layers) if whole else asked.sweep(model, ids, self.progress)
        factors, length = claims.alone_factors(asked.factors), int(result.lengths.max())
        wanted = ((0,), range(1, length)) if asked.positions is None and factors and length > 1 else ()
        return Runs(
            result, whole or result, tuple(asked.sweep(model, ids, factors=factors, positions=only) for only in wanted)
        )

    def _every_layer(self, model: GPT2, ids: Ids) -> Sweep | None:
        """The grid with every layer, for the report; None for a site's entries, and if it is too large or overflows."""
        n_layer, scale = model.config.n_layer, natives(model)[parameter_name(model, 0, self.settings.site)]
        if scale.index or n_layer * len(self.settings.factors) * (n_layer + 2) * len(ids[0]) > MOST_CELLS:
            return None
        try:
            return self.settings.sweep(model, ids, self.progress, layers=None)
        except StreamOverflowError:
            return None

    def measure(self, model: GPT2, raw: Runs) -> Tables:
        """The rows of every layer that ran, and what decides the claims about those that were asked for."""
        tables = measured(raw.whole)
        asked, acts_on_stream = tables["values"].at(layer=scaled_in(raw.result)), self.settings.site == "output"
        rounding = 0.0 if acts_on_stream else ROUNDINGS * torch.finfo(model.dtype).eps
        tokens = {} if self.settings.texts else tokens_of(raw.whole)
        return {**tables, **tokens, **claims.evidence(asked, rounding), **claims.alone(raw.alone)}

    def check(self, model: GPT2, raw: Runs) -> Checked:
        """Try the sweep against what must be true of any weights."""
        return self_checked(model, raw.result)

    def table(self, study: Study[Runs]) -> Table:
        """Every measure of every cell that was asked for: [positions, metric, layer, factor, depth]."""
        return study.tables["values"].at(layer=scaled_in(study.raw.result))

    def rows(self, study: Study[Runs]) -> Iterator[Row]:
        """Every measure of every cell at every place."""
        columns = (*FIRST, *columns_of(scaled_in(study.raw.result)[0]), *LAST)
        for row in self.table(study).rows(model=self.settings.model, site=self.settings.site):
            yield {**{name: row[name] for name in columns}, **row}

    def verdicts(self, study: Study[Runs]) -> list[Verdict]:
        """Every claim's verdict for every studied site."""
        tables, asked = {**study.tables, "values": self.table(study)}, self.settings
        return claims.judge(tables, asked.site, asked.positions, study.checked.details["upstream"], study.basis)

    def summary(self, study: Study[Runs]) -> dict[str, Any]:
        """The factors that needed no run."""
        return {"factors_not_run": list(study.raw.result.not_run)}

    def save(self, study: Study[Runs], folder: Path) -> None:
        """The sweep of a prompt, number for number."""
        if not study.counts:
            study.raw.result.save(folder / "sweep.safetensors")

    def lines(self, study: Study[Runs], columns: int) -> Iterator[str]:
        """The table depth x factor of the first entry."""
        yield ""
        yield from self._by_depth(study, columns)

    def _by_depth(self, study: Study[Runs], columns: int) -> Iterator[str]:
        """The difference by depth of the first entry, for as many factors as the terminal has room for."""
        table, asked = self.table(study), self.settings
        first, factors = table.axes["layer"][0], table.axes["factor"]
        values = table.at(metric="frobenius", positions="rest", layer=first).value
        names, where = [label_of(factor) for factor in factors], in_words(first, asked.site, asked.positions)
        wide = max(8, 1 + max(map(len, names)))
        shown = spread(len(factors), (columns - 24) // wide)
        of, sites = "" if study.windows is None else f", mean of {study.windows} windows", len(table.axes["layer"])
        yield f"Frobenius norm of scaled minus clean{of}, all positions but the first; scaled: {where}"
        yield f"({len(shown)} of {len(factors)} factors, 1 of {sites} sites; all are in divergence.csv):"
        yield f"{'depth':>10}  " + "".join(f"{names[j]:>{wide}}" for j in shown)
        for place, depth in enumerate(table.axes["depth"]):
            mark = f"  <- {where}, scaled" if place == layer_of(first) + 1 else ""
            yield f"{depth or 'embeddings':>10}  " + "".join(f"{values[j, place]:{wide}.2f}" for j in shown) + mark
        yield ""

    def figures(self, study: Study[Runs]) -> Figures:
        """The report's charts."""
        from experiments.divergence.figures import figures  # noqa: PLC0415  an extra

        return figures(study, self.settings.site, self.settings.positions)


def _bar(shown: bool, places: Iterable[Any], total: int) -> Iterable[Any]:
    return tqdm(places, total=total, unit="depth", leave=False, disable=None if shown else True)


def spread(count: int, room: int) -> range:
    """Evenly spaced indices, at most `room` of them, with the first and, where steps allow it, the last."""
    last = max(1, count - 1)
    step = next((step for step in range(1, last + 1) if last % step == 0 and last // step < room), last)
    return range(0, count, step)


main = command(Divergence)
