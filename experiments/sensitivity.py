"""The infinitesimal sweep: how every measure starts to move when a scale leaves 1, for every layer and site.

    python -m experiments.sensitivity --model weights/tiny --measure kl

One table, layer x site, from a few forward-mode passes; no factor is chosen. See `Sensitivity.measure` for what
each number is: a first derivative with respect to log s, and for kl and correlation, which start flat, a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, get_args

import torch
import typer
from torch import Tensor

from experiments.commandline import command, start
from experiments.estimates import Estimate, Row, axis
from experiments.figures import Control, Figure, Figures, place_names, rounded
from experiments.runner import Experiment, Ids, Settings, Start, Study
from minigpt import GPT2, Sensitivity, sensitivity
from minigpt.measures import OF_PREDICTIONS, POSITION_SETS, Measure
from minigpt.parameters import SITES, Site, check_site
from minigpt.sensitivity import SENSITIVITIES

UNITS: dict[str, str] = {"kl": "nats per (log s)^2", "correlation": "per (log s)^2", "loss_change": "nats per log s"}
"""Of the derivatives; the others are per log s."""


@dataclass(frozen=True, kw_only=True)
class SensitivitySettings(Settings):
    """The sites that are differentiated."""

    sites: tuple[Site, ...]


class Sensitivities(Experiment[Sensitivity]):
    """Derivatives of every measure with respect to every scale."""

    name = "sensitivity"
    question = "Every scale is moved a little: what does each measure do?"
    settings: SensitivitySettings
    printed: Measure = "kl"
    """The measure whose table the terminal and the page show first."""

    @classmethod
    def from_options(
        cls,
        begin: Start,
        *,
        measure: Annotated[str, typer.Option(help=f"the table to print: {' | '.join(SENSITIVITIES)}")] = "kl",
        sites: Annotated[str, typer.Option(help="output,attention,mlp, and head for every head")] = ",".join(SITES[:3]),
    ) -> "Sensitivities":
        """Differentiate every measure with respect to every layer's scales, at 1."""
        if measure not in SENSITIVITIES:
            raise ValueError(f"--measure is {measure!r}; expected one of {', '.join(SENSITIVITIES)}.")
        chosen = tuple(dict.fromkeys(check_site(site) for site in sites.split(",")))
        named: Measure = next(name for name in get_args(Measure) if name == measure)
        experiment = cls(SensitivitySettings(**begin.settings(), sites=chosen))
        experiment.printed = named
        return experiment

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Sensitivity:  # noqa: ARG002
        """All derivatives of some texts."""
        return sensitivity(model, ids, self.settings.sites, self.settings.max_bytes)

    def measure(self, model: GPT2, raw: Sensitivity) -> dict[str, Tensor]:  # noqa: ARG002
        """`values` [text, position set, measure, scale, place]."""
        values = [[raw.measure(name, positions) for name in SENSITIVITIES] for positions in POSITION_SETS]
        return {"values": torch.stack([torch.stack(of_set) for of_set in values]).movedim(-1, 0)}

    def rows(self, study: Study[Sensitivity]) -> Iterator[Row]:
        """Every derivative at every place."""
        scales = [
            {"layer": scale.layer, "site": scale.site, "head": "" if scale.head is None else scale.head}
            for scale in study.raw.scales
        ]
        places = axis("depth", [*range(study.n_layer + 1), "final"])
        axes = [axis("positions", POSITION_SETS), axis("metric", SENSITIVITIES), scales, places]
        return ({"model": self.settings.model, **row} for row in study.measured["values"].rows(axes, study.windows))

    def table(self, study: Study[Sensitivity], name: Measure) -> tuple[list[str], Estimate]:
        """The columns (sites, and heads), and a measure [layer, column] over all positions but the first: of
        predictions at the end, of the stream at the last depth."""
        place = -1 if name in OF_PREDICTIONS else -2
        values = study.measured["values"].at(POSITION_SETS.index("rest"), SENSITIVITIES.index(name))
        first = [scale for scale in study.raw.scales if scale.layer == 0]
        columns = [scale.site if scale.head is None else f"head {scale.head}" for scale in first]
        return columns, values.map(lambda tensor: tensor[:, place].unflatten(0, (-1, len(columns))))

    def lines(self, study: Study[Sensitivity], columns: int) -> Iterator[str]:
        """The table layer x site of the chosen measure."""
        names, values = self.table(study, self.printed)
        shown = names[: max(1, (columns - 7) // 12)]
        left_out = f"; {len(names) - len(shown)} more columns are in sensitivity.csv" if len(shown) < len(names) else ""
        yield f"{self.printed}, {_unit(self.printed)}, all positions but the first, at the end{left_out}:"
        yield f"{'layer':>5}  " + "".join(f"{name:>12}" for name in shown)
        for layer, row in enumerate(values.value.tolist()):
            yield f"{layer:>5}  " + "".join(f"{value:>12.4g}" for value in row[: len(shown)])

    def figures(self, study: Study[Sensitivity]) -> Figures:
        """Layer x site, of each measure."""
        from experiments import charts  # noqa: PLC0415  an extra

        layers, rows = place_names(study.n_layer)[1:-1], []
        for name in SENSITIVITIES:
            columns, values = self.table(study, name)
            rows += [
                {"metric": name, "site": site, "value": rounded(values.value[:, index].tolist())}
                for index, site in enumerate(columns)
            ]
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
        return Figures([figure], {"table": rows}, {"table": layers}, [control], titles)


def _unit(name: str) -> str:
    return UNITS.get(name, "per log s")


main = command(Sensitivities.from_options)

if __name__ == "__main__":
    start(main)
