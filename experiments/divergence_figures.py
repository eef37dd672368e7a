"""The divergence study's charts and the data behind them."""

from collections.abc import Iterator
from typing import Any

import torch

from experiments import charts
from experiments.curves import Curves
from experiments.estimates import Estimate
from experiments.figures import Control, Figure, Figures, likeliest_cells, place_names, rounded, token_labels
from experiments.runner import Study
from minigpt import Sweep
from minigpt.measures import POSITION_SETS, UNITS, Measure

SHOWN: dict[Measure, str] = {
    "frobenius": "norm of the change (frobenius)",
    "relative": "change beside the stream's norm (relative)",
    "gauge_free": "change that no rescaling explains (gauge_free)",
    "cosine": "cosine of scaled and clean (cosine)",
}
"""The measures that have a value at every depth, and what an axis calls them."""
SETS = {"rest": "all but the first token", "all": "all tokens", "first": "the first token"}
MOST_NUMBERS = 500_000
"""In a page: about 4 MB. Of larger grids layers and factors are left out, evenly."""
OUTPUT: dict[Measure, tuple[str, str]] = {
    "kl": ("What reaches the predictions", "How far the next-token distributions are from the clean ones."),
    "loss_change": ("What it does to the loss", "Orange: the text's tokens became less likely."),
    "changed": ("Which predictions change", "Where the most likely next token is another."),
}
"""Measures of predictions: title and note of each chart."""
PARTS = {"attention": "attention_", "MLP": "mlp_", "both": ""}


def figures(study: Study[Any], curves: Curves) -> Figures:
    """All the charts: of a prompt over every layer, over a corpus over the studied ones."""
    shown = Shown.of(study, curves)
    data = shown.data()
    of_blocks = dict.fromkeys(("alignment", "written"), shown.blocks)
    factors = [f"{factor:g}" for factor in shown.factors]
    named = {"curves": shown.places, "tokens": shown.places, "output": factors, **of_blocks}
    return Figures(
        figures=[
            *shown.charts_of_curves(),
            *shown.charts_of_blocks(),
            *shown.charts_of_output(),
            *shown.charts_of_tokens(),
        ],
        data=data,
        places={name: places for name, places in named.items() if name in data},
        controls=shown.controls(),
        titles={name: _title(name) for name in SHOWN},
        predictions=shown.predictions(),
        predictions_title="The ten most likely tokens after the text",
    )


def _title(name: Measure) -> str:
    return f"{SHOWN[name]}, {UNITS[name]}" if name in UNITS else SHOWN[name]


class Shown:
    """What a page shows of a study: its curves, and of a prompt also its tokens and predictions."""

    def __init__(self, study: Study[Any], curves: Curves, whole: Sweep | None) -> None:
        self.study, self.curves, self.whole = study, curves, whole
        self.places = place_names(study.n_layer)
        self.blocks = self.places[1:-1]
        of_cell = len(self.places) * (len(POSITION_SETS) * (len(SHOWN) + 8) + (len(study.tokens) if whole else 0))
        most = max(1, MOST_NUMBERS // of_cell)
        self.studied = study_entry(study, curves)
        chosen = _thinned(range(len(curves.layers)), most)
        self.shown = sorted({*chosen, self.studied})
        self.entries = [curves.where(entry) for entry in self.shown]
        self.factors = [curves.factors[j] for j in _thinned(range(len(curves.factors)), most // len(self.shown))]

    @classmethod
    def of(cls, study: Study[Any], curves: Curves) -> "Shown":
        """Of a prompt every layer that ran, over a corpus the studied ones."""
        if study.counts:
            return cls(study, curves, None)
        return cls(study, Curves.of_text(study.raw.whole), study.raw.whole)

    @property
    def params(self) -> dict[str, Any]:
        """The controls' names and first values."""
        return {control.name: control.value for control in self.controls()}

    def controls(self) -> list[Control]:
        """Layer, factor, measure, position set; of a prompt also whether position 0 is shown among the tokens."""
        farthest = max(self.factors, key=lambda factor: abs(factor - 1))
        controls = [
            Control("layer", "scaled", [(entry, entry) for entry in self.entries], self.curves.where(self.studied)),
            Control("factor", "factor", [(factor, f"{factor:g}") for factor in self.factors], farthest),
            Control("measure", "measure", list(SHOWN.items()), "frobenius"),
            Control("positions", "tokens", list(SETS.items()), "rest"),
        ]
        if self.whole:
            first = [(True, "shown"), (False, "left out")]
            controls.append(Control("first", "first token in the token map", first, False))
        return controls

    def _chosen(self, *names: str) -> dict[str, Any]:
        return {name: value for name, value in self.params.items() if name in names}

    @property
    def _every_layer(self) -> str:
        """A note where the page shows more layers than were asked for."""
        more = self.whole and len(self.whole.layers) > len(self.study.raw.result.layers)
        return " Every layer was run for this chart; the table has the ones that were asked for." if more else ""

    def charts_of_curves(self) -> list[Figure]:
        """The lines, the image factor x place, and the grid layer x place."""
        return [self._lines(), self._image(), *([self._grid()] if len(self.entries) > 1 else [])]

    def _lines(self) -> Figure:
        """A measure by place, a line for each factor."""
        over = "" if self.curves.windows is None else " Bands are the 95 % interval of the mean over windows."
        chosen, bands = self._chosen("layer", "factor", "measure", "positions"), self.curves.windows is not None
        return Figure(
            "lines",
            "The change at every place",
            "Lines, one for each factor, of the chosen measure by place in the residual stream, from the embeddings "
            "over every block to the final norm. Before the scaled block nothing is changed; at it the change begins.",
            "A line is a factor, the chosen one thick; the dashed rule marks the scaled block's output. The final norm "
            "stands apart, for it is no block. Dashes, for the relative measure: what it would be if no later block "
            f"reacted (passive); a line above them is amplified, one below them repaired.{over}",
            charts.lines_by_place(self.places, self.factors, "datum.entry == layer", chosen, bands),
        )

    def _image(self) -> Figure:
        """A measure of every factor at every place."""
        site = "datum.entry == layer"
        filters = [site, "datum.positions == positions", "datum.metric == measure"]
        chosen, row = self._chosen("layer", "measure", "positions"), charts.rows_axis("factor", "factor", kind="O")
        return Figure(
            "image",
            "The same numbers, factor by place",
            "A heat map of the chosen measure: a row for each factor, a column for each place.",
            "Each row is one line of the chart above.",
            charts.heat_map("curves", filters, self.places, row, "{measure}", chosen, len(self.factors), site),
        )

    def _grid(self) -> Figure:
        """A measure of every layer at one factor."""
        filters = ["datum.factor == factor", "datum.positions == positions", "datum.metric == measure"]
        chosen = self._chosen("factor", "measure", "positions")
        row = charts.rows_axis("entry", "scaled", self.entries)
        return Figure(
            "grid",
            "Every layer scaled, by place",
            "A heat map of the chosen measure at the chosen factor: a row for each scaled layer, a column for "
            "each place.",
            "Read along a row: what became of one layer's change. Below the diagonal nothing has happened yet."
            f"{self._every_layer}",
            charts.heat_map("curves", filters, self.places, row, "{measure}", chosen, len(self.entries)),
        )

    def charts_of_blocks(self) -> list[Figure]:
        """What every later block carries and what it writes otherwise."""
        blocks, chosen = self.blocks, self._chosen("layer", "factor", "positions")
        filters = ["datum.entry == layer", "datum.factor == factor", "datum.positions == positions"]
        alignment = Figure(
            "alignment",
            "Which blocks repair, which amplify",
            "Bars for every block after the scaled one: the cosine of the change that it carries with what it writes "
            "otherwise, for its attention, its MLP, and both together.",
            "Below 0 a block takes back some of the change that reaches it; above 0 it adds to it; near 0 what it "
            "writes otherwise is new.",
            charts.parts_by_block("alignment", filters, blocks, "cosine of carried and written", chosen, bars=True),
        )
        written = Figure(
            "written",
            "Carried against written, block by block",
            "Lines by block: the norm of the change carried into it, and of what the block, its attention and its "
            "MLP write otherwise than in the clean run.",
            "Where the written lines are small beside the carried one, the change passes through almost as it is.",
            charts.parts_by_block("written", filters, blocks, "norm, units of the stream", chosen, bars=False),
        )
        return [alignment, written]

    def charts_of_output(self) -> list[Figure]:
        """How much of a change reaches the predictions, where they were compared."""
        if "kl" not in self.curves.measures:
            return []
        shown = []
        factors, site = [f"{factor:g}" for factor in self.factors], self.curves.site == "output"
        for metric, (title, note) in OUTPUT.items():
            row = charts.rows_axis("entry", "scaled", self.entries)
            filters = [f"datum.metric == '{metric}'", "datum.positions == positions"]
            spec = charts.heat_map(
                "output", filters, factors, row, f"{metric}, {UNITS[metric]}", self._chosen("positions"),
                len(self.entries), reach=self._reach() if metric == "loss_change" else None, x_title="factor",
            )  # fmt: skip
            alt = f"A heat map of {metric}, {UNITS[metric]}: a row for each scaled layer, a column for each factor."
            last = " Scaling the last block's output does nothing here: the final norm undoes it." * (
                site and metric == "kl"
            )
            shown.append(Figure(metric, title, alt, f"{note}{last}{self._every_layer}", spec))
        return shown

    def charts_of_tokens(self) -> list[Figure]:
        """The change of every token at every place; of a prompt only."""
        if not self.whole:
            return []
        tokens = token_labels(self.study.tokens)
        filters = ["datum.entry == layer", "datum.factor == factor", "first || datum.position > 0"]
        return [
            Figure(
                "tokens",
                "Where in the text",
                "A heat map of the norm of scaled minus clean: a row for each token of the prompt, a column for "
                "each place.",
                "A dot is a space. The first token, which others attend to when they need nothing, can outshine "
                "the rest: switch it on.",
                charts.heat_map(
                    "tokens",
                    filters,
                    self.places,
                    charts.rows_axis("token", "position and token", tokens),
                    "norm of scaled minus clean, units of the stream",
                    self._chosen("layer", "factor", "first"),
                    len(tokens),
                    "datum.entry == layer",
                ),
            )
        ]

    def data(self) -> dict[str, Any]:
        """The datasets that the charts name."""
        sites = [
            {"entry": entry, "place": self.places[layer + 1]}
            for entry, layer in zip(self.entries, [self.curves.layers[entry] for entry in self.shown], strict=True)
        ]
        found = {"curves": list(self._curves()), "places": sites, **self._blocks()}
        if "kl" in self.curves.measures:
            found["output"] = list(self._output())
        return {**found, "tokens": list(self._tokens(self.whole))} if self.whole else found

    def _cells(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for entry, name in zip(self.shown, self.entries, strict=True):
            for factor in self.factors:
                yield entry, self.curves.factors.index(factor), {"entry": name, "factor": factor}

    def _curves(self) -> Iterator[dict[str, Any]]:
        for positions in POSITION_SETS:
            for metric in (*SHOWN, "passive"):
                estimate = self.curves.estimate(metric, positions)
                for entry, factor, named in self._cells():
                    yield {**named, "positions": positions, "metric": metric, **_array(estimate, entry, factor)}

    def _blocks(self) -> dict[str, list[dict[str, Any]]]:
        """Alignment by part, and the norms of what is carried and written."""
        found: dict[str, list[dict[str, Any]]] = {"alignment": [], "written": []}
        for positions in POSITION_SETS:
            carried = self.curves.estimate("frobenius", positions).map(lambda values: values[..., :-2])
            for entry, factor, named in self._cells():
                site = self.curves.layers[entry] + 1
                row = {**named, "positions": positions}
                found["written"].append({**row, "part": "carried", **_array(carried, entry, factor, site)})
                for part, prefix in PARTS.items():
                    norm, cosine = (
                        self.curves.estimate(f"{prefix}{of}", positions).map(lambda values: values[..., 1:-1])  # type: ignore[arg-type]
                        for of in ("written", "alignment")
                    )
                    who = {"both": "written by the block"}.get(part, f"written by {part}")
                    found["written"].append({**row, "part": who, **_array(norm, entry, factor, site)})
                    found["alignment"].append({**row, "part": part, **_array(cosine, entry, factor, site)})
        return found

    def _reach(self) -> float:
        """The largest change of the loss, either way, in nats."""
        return max(float(self.curves.of("loss_change", of)[..., -1].nan_to_num().abs().max()) for of in POSITION_SETS)

    def _output(self) -> Iterator[dict[str, Any]]:
        at = [self.curves.factors.index(factor) for factor in self.factors]
        for metric in OUTPUT:
            for positions in POSITION_SETS:
                values = self.curves.of(metric, positions)[:, at, -1]
                for entry, name in zip(self.shown, self.entries, strict=True):
                    numbers = rounded(values[entry].tolist())
                    yield {"entry": name, "positions": positions, "metric": metric, "value": numbers}

    def _tokens(self, whole: Sweep) -> Iterator[dict[str, Any]]:
        norms = whole.statistics.difference_sq[:, :, :, 0].sqrt()
        for entry, factor, named in self._cells():
            for position, label in enumerate(token_labels(self.study.tokens)):
                numbers = rounded(norms[entry, factor, :, position].tolist())
                yield {**named, "position": position, "token": label, "value": numbers}

    def predictions(self) -> list[dict[str, Any]]:
        """Of every shown cell the likeliest tokens after the text, clean and scaled; none without predictions."""
        if not self.whole:
            return []
        found = {(cell["layer"], cell["factor"]): cell for cell in likeliest_cells(self.whole, self.study.tokenizer)}
        cells = ((found.get((entry, factor)), named) for entry, factor, named in self._cells())
        return [{**cell, "layer": named["entry"], "factor": named["factor"]} for cell, named in cells if cell]


def study_entry(study: Study[Any], curves: Curves) -> int:
    """The first studied entry among those shown."""
    result = study.raw.result
    wanted = (result.layers[0], result.heads and result.heads[0])
    heads = curves.heads or [None] * len(curves.layers)
    return list(zip(curves.layers, heads, strict=True)).index(wanted)


def _array(estimate: Estimate, entry: int, factor: int, first: int = 0) -> dict[str, Any]:
    """A cell's numbers by place, and its interval where there is one; null before the first that counts."""
    parts = {"value": estimate.value, **({"low": estimate.low, "high": estimate.high} if estimate.spread else {})}
    return {name: [None] * first + rounded(tensor[entry, factor, first:].tolist()) for name, tensor in parts.items()}


def _thinned(indices: range, most: int) -> list[int]:
    """At most so many of some indices, two or more, evenly chosen, the first and the last among them."""
    if len(indices) <= most:
        return list(indices)
    return list(dict.fromkeys(torch.linspace(0, len(indices) - 1, max(2, most)).round().long().tolist()))
