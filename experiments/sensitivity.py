"""The infinitesimal sweep: how every measure starts to move when a scale leaves 1, for every layer and site.

    python -m experiments.sensitivity --model weights/tiny --measure kl

One table, layer x site, from a few forward-mode passes; no factor is chosen. See `Sensitivity.measure` for what
each number is: a first derivative with respect to log s, and for kl and correlation, which start flat, a second.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from experiments.harness.command import command, start
from experiments.harness.experiment import Experiment, Ids, Settings, Start, Study
from experiments.harness.options import Options
from experiments.harness.table import Row, Table, Tables, by_measure
from experiments.harness.verdicts import readable, site_in_words
from experiments.page.figures import Control, Figure, Figures, dataset, place_names
from minigpt import GPT2, Sensitivity, sensitivity
from minigpt.measures import OF_PREDICTIONS, Measure
from minigpt.model import SITES
from minigpt.sensitivity import DEFAULT_SITES, SENSITIVITIES

UNITS: dict[str, str] = {"kl": "nats per (log s)^2", "correlation": "per (log s)^2", "loss_change": "nats per log s"}
"""Of the derivatives; the others are per log s."""


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(Options):
    """Differentiate every measure with respect to every layer's scales, at 1."""

    measure: Annotated[str, typer.Option(help=f"the table to print: {' | '.join(SENSITIVITIES)}")] = "kl"
    sites: Annotated[str, typer.Option(help=f"some of {','.join(SITES)}, or others of the model's block")] = ",".join(
        DEFAULT_SITES
    )


@dataclass(frozen=True, kw_only=True)
class SensitivitySettings(Settings):
    """The sites that are differentiated."""

    sites: tuple[str, ...]


class Sensitivities(Experiment[Sensitivity]):
    """Derivatives of every measure with respect to every scale."""

    name = "sensitivity"
    question = "Every scale is moved a little: what does each measure do?"
    options = SensitivityOptions
    settings: SensitivitySettings
    printed: Measure = "kl"
    """The measure whose table the terminal and the page show first."""

    @classmethod
    def from_options(cls, begin: Start[SensitivityOptions]) -> "Sensitivities":
        """The sites that were asked for, and the measure to print."""
        asked = begin.options
        if asked.measure not in SENSITIVITIES:
            raise ValueError(f"--measure is {asked.measure!r}; expected one of {', '.join(SENSITIVITIES)}.")
        chosen = tuple(dict.fromkeys(begin.site(site) for site in asked.sites.split(",")))
        experiment = cls(SensitivitySettings(**begin.settings(), sites=chosen))
        experiment.printed = next(name for name in SENSITIVITIES if name == asked.measure)
        return experiment

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Sensitivity:  # noqa: ARG002
        """All derivatives of some texts."""
        return sensitivity(model, ids, self.settings.sites, self.settings.max_bytes)

    def measure(self, model: GPT2, raw: Sensitivity) -> Tables:  # noqa: ARG002
        """`values` [text, positions, metric, scale, depth]; the columns of a scale are those of the result's axes."""
        return {"values": by_measure(raw, SENSITIVITIES, scale=raw.axes[0])}

    def rows(self, study: Study[Sensitivity]) -> Iterator[Row]:
        """Every derivative at every place."""
        return study.tables["values"].rows(model=self.settings.model)

    def table(self, study: Study[Sensitivity], name: Measure) -> Table:
        """A measure over all positions but the first: of predictions at the end, of the stream at the last depth.

        [layer, site]; where a site has several entries, each is one, such as `head 3`.
        """
        depth = "final" if name in OF_PREDICTIONS else study.n_layer
        values, layers = study.tables["values"].at(positions="rest", metric=name, depth=depth), range(study.n_layer)
        first = [scale for scale in values.axes["scale"] if scale["layer"] == 0]
        sites = [_site_of(scale) for scale in first]
        return values.split("scale", layer=layers, site=sites)

    def lines(self, study: Study[Sensitivity], columns: int) -> Iterator[str]:
        """The table layer x site of the chosen measure."""
        table = self.table(study, self.printed)
        names = table.axes["site"]
        width = 2 + max(10, *map(len, names))
        count = max(1, (columns - 7) // width)
        left_out = f"; sensitivity.csv has {len(names) - count} more columns" if count < len(names) else ""
        yield f"{self.printed}, {_unit(self.printed)}, all positions but the first, at the end{left_out}:"
        yield f"{'layer':>5}  " + "".join(f"{name:>{width}}" for name in names[:count])
        for layer, row in enumerate(table.value.tolist()):
            yield f"{layer:>5}  " + "".join(f"{readable(value):>{width}}" for value in row[:count])

    def figures(self, study: Study[Sensitivity]) -> Figures:
        """Layer x site, of each measure."""
        from experiments.page import charts  # noqa: PLC0415  an extra

        layers, tables = place_names(study.n_layer)[1:-1], {name: self.table(study, name) for name in SENSITIVITIES}
        rows = [row for name, table in tables.items() for row in table.rows(metric=name)]
        columns = tables[self.printed].axes["site"]
        chosen = {"measure": self.printed}
        row = charts.rows_axis("site", "site", columns)
        filters = ["datum.metric == measure"]
        spec = charts.heat_map("table", filters, layers, row, "{measure}", chosen, len(columns), x_title="layer")
        alt = "A heat map of the chosen measure's derivative: a row for each site, a column for each layer."
        note = (
            "Of the stream's measures at the last depth; over all tokens but the first. "
            "kl and correlation start flat: theirs is the second derivative."
        )
        control = Control("measure", "measure", [(name, name) for name in SENSITIVITIES], self.printed)
        titles: dict[str, str] = {name: f"{name}, {_unit(name)}" for name in SENSITIVITIES}
        figure = Figure("table", "Which scales matter", alt, note, spec)
        return Figures(
            [figure], {"table": dataset(rows, "layer", range(study.n_layer))}, {"table": layers}, [control], titles
        )


def _site_of(scale: Mapping[str, Any]) -> str:
    """The site of a label of the axis `scale`, in words."""
    return site_in_words(
        scale["site"], {name: of for name, of in scale.items() if name not in ("layer", "site") and of != ""}
    )


def _unit(name: str) -> str:
    return UNITS.get(name, "per log s")


main = command(Sensitivities)

if __name__ == "__main__":
    start(main)
