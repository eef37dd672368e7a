"""What a report consists of besides words: charts, the data they share, and the controls that choose among it.

A chart is a Vega-Lite specification whose parameters are named like the controls, so that the page, the PNG
and the SVG are one chart, and differ only in who sets the parameters.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt import Sweep, Tokenizer

LIGHT, DARK = "light", "dark"
WIDTH = 760  # pixels, of the PNG and the SVG; a page makes charts as wide as it is itself
DIGITS = 5
"""Significant ones, of the numbers in a page: more than an eye sees, and fewer bytes."""
NUMBERS_SHOWN = ("value", "low", "high")
NUMBERS = (*NUMBERS_SHOWN, "error", "sd", "median", "q1", "q3", "windows")
"""The columns of a table's row that hold numbers, and those of them that charts show."""
VISIBLE = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421, ord(" "): 0xB7, ord("\n"): 0x23CE}
"""Control characters and white space as signs that can be seen: a file of SVG may not hold the first."""


@dataclass(frozen=True)
class Control:
    """One choice that a reader has, and the charts' parameter of the same name."""

    name: str
    label: str
    options: Sequence[tuple[str | float | bool, str]]
    """Value and label of each."""
    value: str | float | bool
    """The first one shown."""


@dataclass(frozen=True)
class Figure:
    """A chart with what a page says around it."""

    name: str
    title: str
    alt: str
    """What the chart shows, for those who do not see it."""
    note: str
    """How to read it."""
    spec: Mapping[str, Any]
    """Vega-Lite; {measure} in it stands for the chosen measure's name and unit."""


@dataclass(frozen=True)
class Figures:
    """All the charts of a report."""

    figures: Sequence[Figure] = ()
    data: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """The datasets that charts name. A row's numbers are arrays over places, which `places` names."""
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of every dataset whose numbers are arrays: what they are of; charts find it in each row as `place`."""
    controls: Sequence[Control] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    """Of every choice of the control `measure`: its axis title, with the unit."""
    predictions: Sequence[Mapping[str, Any]] = ()
    """Rows with the controls' names, and `clean` and `scaled`: lists of (token, probability)."""
    predictions_title: str = ""


def save_figures(figures: Figures, prefix: str, folder: Path) -> None:
    """Every chart as PNG and SVG, with its controls at their first value."""
    import vl_convert  # noqa: PLC0415  an extra

    for figure in figures.figures:
        spec = standing_alone(figures, figure)
        svg = vl_convert.vegalite_to_svg(spec)
        (folder / f"{prefix}_{figure.name}.svg").write_text(svg, encoding="utf-8")
        png = vl_convert.svg_to_png(svg, scale=2)
        (folder / f"{prefix}_{figure.name}.png").write_bytes(png)


def standing_alone(figures: Figures, figure: Figure) -> dict[str, Any]:
    """A chart with its data in it, titled, on white."""
    chosen = {control.name: control.value for control in figures.controls}
    text = json.dumps(figure.spec).replace("{measure}", figures.titles.get(str(chosen.get("measure")), ""))
    spec = json.loads(text)
    for parameter in spec.get("params", []):
        parameter["value"] = chosen.get(parameter["name"], parameter.get("value"))
    named = {spec.get("data", {}).get("name"), *(layer.get("data", {}).get("name") for layer in spec.get("layer", []))}
    brought = {name: with_places(figures, name) for name in figures.data if name in named}
    spec["datasets"] = {**spec.get("datasets", {}), **brought}
    said = [
        f"{control.label}: {label}"
        for control in figures.controls
        for value, label in control.options
        if value == control.value and any(of["name"] == control.name for of in spec.get("params", []))
    ]
    title = {"text": figure.title, "subtitle": ["; ".join(said)] if said else [], "anchor": "start"}
    return {**spec, "title": title, "width": WIDTH, "config": {**config(LIGHT), "background": "white"}}


def with_places(figures: Figures, name: str) -> list[dict[str, Any]]:
    """A dataset with its places in every row, as charts want it."""
    places = figures.places.get(name)
    return [{**row, "place": places} if places else dict(row) for row in figures.data[name]]


def config(theme: str) -> dict[str, Any]:
    """What a theme gives every chart: ink, grid and type."""
    ink, faint = ("#1d2530", "#d5dae1") if theme == LIGHT else ("#e6e9ee", "#3c4654")
    axis = {"labelColor": ink, "titleColor": ink, "tickColor": faint, "domainColor": faint, "gridColor": faint}
    return {
        "background": None,
        "view": {"stroke": None},
        "axis": {**axis, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
        "legend": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontWeight": "normal"},
        "title": {"color": ink, "subtitleColor": ink},
        "rule": {"color": ink},
        "text": {"color": ink},
        "font": "system-ui, sans-serif",
    }


def rounded(number: float | None) -> float | None:
    """A number for a page; one that is not finite becomes null."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.{DIGITS}g}")


def dataset(
    rows: Iterable[Mapping[str, Any]],
    along: str = "",
    labels: Sequence[Any] = (),
    shown: Sequence[str] = NUMBERS_SHOWN,
    **constants: Any,
) -> list[dict[str, Any]]:
    """A chart's data, of a table's tidy rows, after the constants.

    Rows that differ in the column `along` alone become one, whose numbers are arrays over its labels: null where there
    is no row. Without `along` every row stays one. `shown` are the columns of numbers that the charts need.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    place = {label: index for index, label in enumerate(labels)}
    for row in rows:
        named = {name: of for name, of in row.items() if name not in (along, *NUMBERS)}
        into = found.setdefault(tuple(named.values()), {**constants, **named})
        for name in (name for name in shown if name in row or name == "error"):
            if along:
                into.setdefault(name, [None] * len(labels))[place[row[along]]] = rounded(row.get(name))
            else:
                into[name] = rounded(row.get(name))
    return list(found.values())


def reach_of(rows: Iterable[Mapping[str, Any]]) -> float:
    """The largest absolute value of a dataset's rows, for a scale around 0; 1 where there is none but 0."""
    return max((abs(number) for row in rows for number in row["value"] if number is not None), default=0.0) or 1.0


def label_of(number: float) -> str:
    """A number as a label: as short as it can be and still read back as that number, so that no two look alike."""
    return next(text for digits in range(6, 18) if float(text := f"{number:.{digits}g}") == number)


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Tokens with their positions, white space made visible: all different, and in order."""
    return [f"{position} {token.translate(VISIBLE)}" for position, token in enumerate(tokens)]


def likeliest_cells(result: Sweep, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Of every cell of a sweep of one text, the likeliest tokens after it, clean and scaled, with their probabilities;
    none without predictions. `layer` and `factor` are indices on the sweep's axes."""
    scaled, clean = result.statistics.predictions, result.statistics.clean_predictions
    if scaled is None or clean is None:
        return []
    before = _likeliest(tokenizer, clean.top[0], clean.top_probability[0])
    return [
        {
            "layer": layer,
            "factor": factor,
            "clean": before,
            "scaled": _likeliest(tokenizer, scaled.top[layer, factor, 0], scaled.top_probability[layer, factor, 0]),
        }
        for layer in range(len(result.layers))
        for factor in range(len(result.factors))
    ]


def _likeliest(tokenizer: Tokenizer, ids: Tensor, probabilities: Tensor) -> list[tuple[str, float | None]]:
    """Tokens and their probabilities, white space made visible."""
    texts = (token.translate(VISIBLE) for token in tokenizer.tokens(ids.tolist()))
    return list(zip(texts, map(rounded, probabilities.tolist()), strict=True))


def place_names(n_layer: int) -> list[str]:
    """Labels of the places: what stands in the stream there."""
    return ["embeddings", *(f"block {layer}" for layer in range(n_layer)), "final norm"]
