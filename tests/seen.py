"""Charts as a person sees them: numbers are read off the marks by the axes and legends, not taken from the data.

Vega's scene graph says where every mark, label and title lies, and in which colour. vl-convert draws it without a
browser, and in a browser it hangs on the elements of the SVG; both have the same form, and are read here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import vl_convert

from experiments.page.figures import Figures, standing_alone

Node = Mapping[str, Any]
Numbers = dict[tuple[str, ...], float]
"""What is read off a chart, by the labels that it stands at."""
EXACT = 5e-5
"""Relative: pages hold numbers of five digits."""
PIXEL = 1e-4
"""Of an axis: how far a mark may lie from its number, which is exact but for the five digits."""
SHADE = 12
"""Of 255: the stops of a legend's gradient are joined by straight lines, and the scale of colours is not."""
SCENE = """element => {
  const kept = ["x", "y", "x2", "y2", "width", "height", "fill", "stroke", "strokeWidth", "strokeDash", "opacity",
    "text", "description", "tooltip", "defined", "orient"];
  const of_item = item => Object.fromEntries([
    ...kept.filter(name => item[name] !== undefined).map(name => [name, item[name]]),
    ...(item.items ? [["items", item.items.map(of_mark)]] : []),
  ]);
  const of_mark = mark => ({ marktype: mark.marktype, role: mark.role, items: mark.items.map(of_item) });
  let item = [...element.querySelectorAll("svg *")].map(of => of.__data__).find(of => of && of.mark);
  while (item.mark.group) item = item.mark.group;
  return of_mark(item.mark);
}"""
"""JavaScript that takes the scene graph from the SVG that a browser shows."""


def number(text: str) -> float:
    """A number as Vega writes it."""
    return float(text.replace("\u2212", "-").replace(",", ""))


@dataclass(frozen=True)
class Axis:
    """An axis: its title, and the pixel of every label, in order."""

    title: str
    labels: Mapping[str, float]

    def label(self, pixel: float) -> str:
        """The label that a mark stands at."""
        found = min(self.labels, key=lambda text: abs(self.labels[text] - pixel))
        steps = [abs(one - other) for one, other in pairwise(self.labels.values())]
        assert abs(self.labels[found] - pixel) < 0.5 * min(steps, default=1e9), f"{pixel} is at no label of {self}"
        return found

    def number(self, pixel: float) -> float:
        """The number that a pixel stands for, by the first label and the last."""
        numbers = [(number(text), at) for text, at in self.labels.items()]
        (first, start), (last, end) = numbers[0], numbers[-1]
        if len(numbers) == 1:  # an axis of one number, 0, where nothing changes
            assert pixel == start, f"{pixel} is at no label of {self}"
            return first
        return first + (last - first) * (pixel - start) / (end - start)

    @property
    def reach(self) -> float:
        """From the first label's number to the last one's."""
        numbers = [number(text) for text in self.labels]
        return max(numbers) - min(numbers)


@dataclass(frozen=True)
class Mark:
    """A mark, or a point of a line."""

    kind: str
    item: Node

    @property
    def x(self) -> float:
        """The middle."""
        return float(self.item["x"]) + float(self.item.get("width", 0)) / 2

    @property
    def top(self) -> float:
        """The upper end's pixel."""
        return float(self.item.get("y", 0))

    @property
    def bottom(self) -> float:
        """The lower end's pixel."""
        return float(self.item.get("y2", self.top + self.item.get("height", 0)))

    @property
    def middle(self) -> float:
        """The middle's pixel, from top to bottom."""
        return (self.top + self.bottom) / 2

    @property
    def colour(self) -> str:
        """Of the line or the area."""
        return str(self.item.get("fill") or self.item["stroke"])

    @property
    def said(self) -> dict[str, str]:
        """What a screen reader says: every field's title and value, those of the tooltip among them."""
        return dict(part.split(": ", 1) for part in self.item.get("description", "").split("; ") if ": " in part)


class Chart:
    """A chart, read from its scene graph."""

    def __init__(self, scene: Node) -> None:
        self.parts: list[Node] = scene["items"][0]["items"]
        self.marks = [mark for part in self.parts if part["role"] in ("mark", "scope") for mark in _marks(part)]
        axes = [_axis(part) for part in self.parts if part["role"] == "axis"]
        self.x, self.y = (next(axis for side, axis in axes if side == wanted and axis) for wanted in ("bottom", "left"))
        self.legends = [part for part in self.parts if part["role"] == "legend"]

    def of(self, kind: str) -> list[Mark]:
        """The marks of a kind."""
        return [mark for mark in self.marks if mark.kind == kind]

    @property
    def legend_title(self) -> str:
        """What stands above the legend."""
        return " ".join(item["text"] for legend in self.legends for item in _items(legend, "legend-title"))

    @property
    def legend(self) -> dict[str, str]:
        """The legend's words and their colours, in order."""
        symbols, words = (
            [item for legend in self.legends for item in _items(legend, f"legend-{of}")] for of in ("symbol", "label")
        )
        return {word["text"]: symbol["fill"] for word, symbol in zip(words, symbols, strict=True)}

    @property
    def ends(self) -> tuple[float, float]:
        """The numbers at both ends of the legend's gradient; the same where all numbers are."""
        labels = {item["text"]: item["x"] for legend in self.legends for item in _items(legend, "legend-label")}
        if len(labels) == 1:
            return number(*labels), number(*labels)
        scale = Axis("", labels)
        return scale.number(0), scale.number(self._gradient()["width"])

    def _gradient(self) -> Node:
        (found,) = (item for legend in self.legends for item in _items(legend, "legend-gradient"))
        return found

    def shade(self, value: float) -> list[float]:
        """The colour that the legend's gradient has at a number: red, green, blue."""
        low, high = self.ends
        at = (value - low) / (high - low) if low < high else 0.5 + value - low
        assert -PIXEL <= at <= 1 + PIXEL, f"{value} is not in the legend, which goes from {low} to {high}"
        at = min(max(at, 0.0), 1.0)
        stops = [(stop["offset"], rgb(stop["color"])) for stop in self._gradient()["fill"]["stops"]]
        (start, one), (end, other) = next(pair for pair in pairwise(stops) if at <= pair[1][0])
        return [a + (b - a) * (at - start) / (end - start) for a, b in zip(one, other, strict=True)]

    def cells(self) -> Numbers:
        """A heat map's numbers by row and column: they are said, and the colour that they have is the legend's."""
        found: Numbers = {}
        for cell in self.of("rect"):
            if cell.said[self.legend_title] == "null":
                continue
            value = number(cell.said[self.legend_title])
            row, column = self.y.label(cell.middle), self.x.label(cell.x)
            shade = zip(self.shade(value), rgb(cell.colour), strict=True)
            assert max(abs(one - other) for one, other in shade) <= SHADE, (row, column, value, cell.colour)
            assert (row, column) not in found
            assert row in cell.said.values(), "the tooltip has the row"
            assert (cell.said["place"], number(cell.said["value"])) == (column, _close(value))
            found[row, column] = value
        return found

    def lines(self) -> dict[tuple[str, str], Mark]:
        """The points of lines, and the ticks beside them, by colour or dash of the line and by place."""
        found: dict[tuple[str, str], Mark] = {}
        for point in [mark for mark in self.of("line") if mark.item.get("defined", True)] + self.of("rect"):
            key = (series_of(point), self.x.label(point.x))
            assert key not in found
            assert self.y.number(point.middle) == _near(number(point.said["value"]), self.y)
            assert point.said["place"] == key[1]
            found[key] = point
        return found

    def bars(self) -> Numbers:
        """A bar chart's numbers by place and by what its colour means."""
        names = {colour: text for text, colour in self.legend.items()} if self.legends else {}
        found: Numbers = {}
        for bar in self.of("rect"):
            top, bottom = self.y.number(bar.top), self.y.number(bar.bottom)
            value = top if abs(bottom) <= abs(top) else bottom
            assert min(abs(top), abs(bottom)) == _near(0, self.y), "a bar begins at 0"
            key = (self.x.label(bar.x), *([names[bar.colour]] if names else []))
            assert key not in found
            assert (bar.said["place"], number(bar.said["value"])) == (key[0], _near(value, self.y))
            assert not names or bar.said["part"] == key[1]
            found[key] = value
        return found

    def side_by_side(self) -> dict[str, list[str]]:
        """The colours of the bars of each place, from left to right, by the legend's words."""
        names, found = {colour: text for text, colour in self.legend.items()}, dict[str, list[str]]()
        for bar in sorted(self.of("rect"), key=lambda bar: bar.x):
            found.setdefault(self.x.label(bar.x), []).append(names[bar.colour])
        return found

    def rules(self) -> list[str]:
        """The places of the upright dashed lines."""
        return [self.x.label(rule.x) for rule in self.of("rule") if "strokeDash" in rule.item]


def series_of(mark: Mark) -> str:
    """What tells a line from the others: the factor, or the part, and whether it is dashed."""
    said = mark.said
    dashed = mark.item.get("strokeDash", [1, 0]) != [1, 0]
    return said.get("part", said.get("factor", "")) + " dashed" * dashed


def rgb(colour: str) -> list[int]:
    """Red, green and blue of `#rrggbb` or `rgb(r, g, b)`."""
    if colour.startswith("#"):
        return [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


def _near(value: float, axis: Axis) -> Any:
    import pytest

    return pytest.approx(value, rel=1e-3, abs=PIXEL * axis.reach)


def _close(value: float) -> Any:
    import pytest

    return pytest.approx(value, rel=1e-3, abs=1e-12)


def _marks(part: Node) -> Iterator[Mark]:
    """The marks of a part; a line's are in a group of their own."""
    for item in part["items"]:
        if part["marktype"] == "group":
            for inner in item.get("items", []):
                yield from _marks(inner)
        else:
            yield Mark(part["marktype"], item)


def _items(node: Node, role: str) -> Iterator[Node]:
    """The items of all marks with a role, in order."""
    for item in node["items"]:
        if node.get("role") == role:
            yield item
        for inner in item.get("items", []):
            yield from _items(inner, role)


def _axis(part: Node) -> tuple[str, Axis | None]:
    """An axis and its side; none of a grid."""
    side, labels = part["items"][0]["orient"], list(_items(part, "axis-label"))
    if not labels:
        return side, None
    title = " ".join(item["text"] for item in _items(part, "axis-title"))
    along = "x" if side in ("bottom", "top") else "y"
    ordered = sorted(labels, key=lambda item: item[along])
    texts = {str(item["text"]): float(item[along]) for item in ordered}
    assert len(texts) == len(labels), f"labels collide: {[item['text'] for item in labels]}"
    return side, Axis(title, texts)


def shown(figures: Figures, name: str, **chosen: Any) -> Chart:
    """A figure with some controls set."""
    controls = [replace(control, value=chosen.get(control.name, control.value)) for control in figures.controls]
    (figure,) = (figure for figure in figures.figures if figure.name == name)
    return drawn(standing_alone(replace(figures, controls=controls), figure))


def drawn(specification: Mapping[str, Any]) -> Chart:
    """A chart as vl-convert draws it."""
    return Chart(vl_convert.vegalite_to_scenegraph(dict(specification))["scenegraph"])


def settings(figures: Figures, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every value of each control, the others at their first; and all at their last value."""
    controls = {control.name: control for control in figures.controls if control.name in names}
    first = {name: control.value for name, control in controls.items()}
    single = [{**first, name: value} for name, control in controls.items() for value, _ in control.options]
    last = {name: control.options[-1][0] for name, control in controls.items()}
    return [each for index, each in enumerate([first, *single, last]) if each not in [first, *single, last][:index]]
