"""The divergence study's charts and the data behind them."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from experiments.divergence.rows import Scaled, in_words, layer_of, scaled_in
from experiments.harness.experiment import Study
from experiments.harness.table import Row, Table
from experiments.page import charts
from experiments.page.figures import (
    NUMBERS_SHOWN,
    Control,
    Figure,
    Figures,
    dataset,
    label_of,
    likeliest_cells,
    place_names,
    reach_of,
    token_labels,
)
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
ALIGNMENTS: dict[Measure, str] = {"attention_alignment": "attention", "mlp_alignment": "MLP", "alignment": "both"}
WRITTEN: dict[Measure, str] = {
    "attention_written": "written by attention",
    "mlp_written": "written by MLP",
    "written": "written by the block",
}
CARRIED = "carried"
"""The parts of what a block does, as the charts name them."""


def figures(study: Study[Any], site: str, positions: tuple[int, ...] | None) -> Figures:
    """All the charts: of a prompt over every layer that ran, over a corpus over the studied ones."""
    shown = Shown(study, site, positions)
    data = shown.data
    of_blocks = dict.fromkeys(("alignment", "written"), shown.blocks)
    named = {"curves": shown.places, "tokens": shown.places, "output": shown.columns, **of_blocks}
    return Figures(
        figures=[*shown.of_curves(), *shown.of_blocks(), *shown.of_output(), *shown.of_tokens()],
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
    """What a page shows of a study: the rows of its table, and of a prompt also its tokens and predictions."""

    def __init__(self, study: Study[Any], site: str, positions: tuple[int, ...] | None) -> None:
        self.study, self.site = study, site
        self.whole: Sweep | None = None if study.counts else study.raw.whole
        table = study.tables["values"]
        self.places = place_names(study.n_layer)
        self.blocks = self.places[1:-1]
        most = max(1, MOST_NUMBERS // self._numbers_of_a_cell)
        known, factors = list(table.axes["layer"]), list(table.axes["factor"])
        studied = scaled_in(study.raw.result)[0]
        chosen = {*_thinned(range(len(known)), most), known.index(studied)}
        self.shown: list[Scaled] = [known[index] for index in sorted(chosen)]
        self.entries = [in_words(scaled, site, positions) for scaled in self.shown]
        self.studied = in_words(studied, site, positions)
        self.factors: list[float] = [factors[j] for j in _thinned(range(len(factors)), most // len(self.shown))]
        self.columns = [label_of(factor) for factor in self.factors]

    @property
    def _numbers_of_a_cell(self) -> int:
        """About how many numbers a page shows of one layer at one factor; alignments come with their error."""
        of_set = 1 + len(SHOWN) + 2 * len(ALIGNMENTS) + 1 + len(WRITTEN)  # `passive` and what is carried come on top
        kept = len(NUMBERS_SHOWN) if self.study.counts else 1
        return len(self.places) * (kept * len(POSITION_SETS) * of_set + (len(self.study.tokens) if self.whole else 0))

    @cached_property
    def table(self) -> Table:
        """What is shown of the study's table: [positions, metric, layer, factor, depth]."""
        return self.study.tables["values"].at(layer=self.shown, factor=self.factors)

    @property
    def params(self) -> dict[str, Any]:
        """The controls' names and first values."""
        return {control.name: control.value for control in self.controls()}

    def controls(self) -> list[Control]:
        """Layer, factor, measure, position set; of a prompt also whether position 0 is shown among the tokens."""
        farthest = max(self.factors, key=lambda factor: abs(factor - 1))
        controls = [
            Control("layer", "scaled", [(entry, entry) for entry in self.entries], self.studied),
            Control("factor", "factor", list(zip(self.factors, self.columns, strict=True)), farthest),
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

    def of_curves(self) -> list[Figure]:
        """The lines, the image factor x place, and the grid layer x place."""
        return [self._lines(), self._image(), *([self._grid()] if len(self.entries) > 1 else [])]

    def _lines(self) -> Figure:
        """A measure by place, a line for each factor."""
        over = "" if self.study.windows is None else " Bands are the 95 % interval of the mean over windows."
        chosen, bands = self._chosen("layer", "factor", "measure", "positions"), self.study.windows is not None
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
            "Everything that was scaled, by place",
            "A heat map of the chosen measure at the chosen factor: a row for each scaled layer, a column for "
            "each place.",
            "Read along a row: what became of one change. Before the scaled block's own place nothing has happened yet."
            f"{self._every_layer}",
            charts.heat_map("curves", filters, self.places, row, "{measure}", chosen, len(self.entries)),
        )

    def of_blocks(self) -> list[Figure]:
        """What every later block carries and what it writes otherwise."""
        blocks, chosen = self.blocks, self._chosen("layer", "factor", "positions")
        filters = ["datum.entry == layer", "datum.factor == factor", "datum.positions == positions"]
        cosine, norm, parts = "cosine of carried and written", "norm, units of the stream", list(ALIGNMENTS.values())
        alignment = Figure(
            "alignment",
            "Which blocks repair, which amplify",
            "Bars for every block after the scaled one: the cosine of the change that it carries with what it writes "
            "otherwise, for its attention, its MLP, and both together.",
            "Below 0 a block takes back some of the change that reaches it; above 0 it adds to it; near 0 what it "
            "writes otherwise is new. A bar is faint if it is no longer than its error by rounding: "
            "its sign means nothing.",
            charts.parts_by_block(
                "alignment", filters, blocks, cosine, chosen, parts, reach_of(self.data["alignment"])
            ),
        )
        written = Figure(
            "written",
            "Carried against written, block by block",
            "Lines by block: the norm of the change carried into it, and of what the block, its attention and its "
            "MLP write otherwise than in the clean run.",
            "Where the written lines are small beside the carried one, the change passes through almost as it is. "
            "Nothing is carried into the scaled block and those before it.",
            charts.parts_by_block("written", filters, blocks, norm, chosen, [CARRIED, *WRITTEN.values()]),
        )
        return [alignment, written]

    def of_output(self) -> list[Figure]:
        """How much of a change reaches the predictions, where they were compared."""
        if "kl" not in self.table.axes["metric"]:
            return []
        shown, reach = [], reach_of(row for row in self.data["output"] if row["metric"] == "loss_change")
        for metric, (title, note) in OUTPUT.items():
            row = charts.rows_axis("entry", "scaled", self.entries)
            filters = [f"datum.metric == '{metric}'", "datum.positions == positions"]
            spec = charts.heat_map(
                "output", filters, self.columns, row, f"{metric}, {UNITS[metric]}", self._chosen("positions"),
                len(self.entries), reach=reach if metric == "loss_change" else None, x_title="factor",
            )  # fmt: skip
            alt = f"A heat map of {metric}, {UNITS[metric]}: a row for each scaled layer, a column for each factor."
            last = " Scaling the last block's output does nothing here: the final norm undoes it." * (
                self.site == "output" and metric == "kl"
            )
            shown.append(Figure(metric, title, alt, f"{note}{last}{self._every_layer}", spec))
        return shown

    def of_tokens(self) -> list[Figure]:
        """The change of every token at every place; of a prompt only."""
        if not self.whole:
            return []
        tokens, chosen = token_labels(self.study.tokens), self._chosen("layer", "factor", "first")
        filters = ["datum.entry == layer", "datum.factor == factor", "first || datum.position > 0"]
        row, title = charts.rows_axis("token", "position and token", tokens), "norm of scaled minus clean"
        unit, site = f"{title}, {UNITS['frobenius']}", "datum.entry == layer"
        alt = f"A heat map of the {title}: a row for each token of the prompt, a column for each place."
        note = (
            "A dot is a space. The first token, which others attend to when they need nothing, can outshine the rest: "
            "switch it on."
        )
        spec = charts.heat_map("tokens", filters, self.places, row, unit, chosen, len(tokens), site)
        return [Figure("tokens", "Where in the text", alt, note, spec)]

    @cached_property
    def data(self) -> dict[str, Any]:
        """The datasets that the charts name."""
        places = [self.places[layer_of(scaled) + 1] for scaled in self.shown]
        sites = [{"entry": entry, "place": place} for entry, place in zip(self.entries, places, strict=True)]
        found = {"curves": self._curves(), "places": sites, **self._of_blocks()}
        if "kl" in self.table.axes["metric"]:
            found["output"] = self._output()
        return {**found, "tokens": self._tokens()} if self.whole else found

    def _named(self, table: Table) -> Table:
        """Numbers with the layers by the names that the page gives them."""
        return table.named("layer", "entry", self.entries)

    def _curves(self) -> list[dict[str, Any]]:
        rows = self._named(self.table.at(metric=[*SHOWN, "passive"])).rows()
        return dataset(rows, "depth", self.table.axes["depth"])

    def _of_blocks(self) -> dict[str, list[dict[str, Any]]]:
        """Alignment by part, and the norms of what is carried into a block, and of what it writes."""
        blocks, depths = range(self.study.n_layer), self.table.axes["depth"]
        read = self.table.at(depth=list(depths[:-2])).named("depth", "block", blocks)
        wrote = self.table.at(depth=list(depths[1:-1])).named("depth", "block", blocks)
        carried = self._named(read.at(metric=["frobenius"]).named("metric", "part", [CARRIED])).rows()
        written, alignment = (
            self._later(wrote.at(metric=list(parts)).named("metric", "part", list(parts.values())))
            for parts in (WRITTEN, ALIGNMENTS)
        )
        return {
            "alignment": dataset(alignment, "block", blocks, (*NUMBERS_SHOWN, "error")),
            "written": dataset((*carried, *written), "block", blocks),
        }

    def _later(self, table: Table) -> Iterator[Row]:
        """The rows of the blocks after what was scaled."""
        layers = {entry: layer_of(scaled) for entry, scaled in zip(self.entries, self.shown, strict=True)}
        rows = self._named(table).rows()
        return (row for row in rows if row["block"] > layers[row["entry"]])

    def _output(self) -> list[dict[str, Any]]:
        rows = self._named(self.table.at(metric=list(OUTPUT), depth="final")).rows()
        return dataset(rows, "factor", self.factors)

    def _tokens(self) -> list[dict[str, Any]]:
        table, labels = self.study.tables["tokens"], token_labels(self.study.tokens)
        rows = self._named(table.at(layer=self.shown, factor=self.factors)).rows()
        named = ({**row, "token": labels[row["position"]]} for row in rows)
        return dataset(named, "depth", table.axes["depth"])

    def predictions(self) -> list[dict[str, Any]]:
        """Of every shown cell the likeliest tokens after the text, clean and scaled; none without predictions."""
        if not self.whole:
            return []
        names, factors = dict(zip(self.shown, self.entries, strict=True)), self.whole.factors
        known = [names.get(scaled) for scaled in scaled_in(self.whole)]
        cells = likeliest_cells(self.whole, self.study.tokenizer)
        named = ({**cell, "layer": known[cell["layer"]], "factor": factors[cell["factor"]]} for cell in cells)
        return [cell for cell in named if cell["layer"] and cell["factor"] in self.factors]


def _thinned(indices: range, most: int) -> list[int]:
    """At most so many of some indices, two or more, evenly chosen, the first and the last among them."""
    if len(indices) <= most:
        return list(indices)
    return list(dict.fromkeys(torch.linspace(0, len(indices) - 1, max(2, most)).round().long().tolist()))
