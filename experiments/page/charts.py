"""The kinds of chart that figures are made of, in Altair."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import altair as alt

FACTOR_COLOURS = ("#2b7bd9", "#9aa3ad", "#d9691e")  # below 1, at 1, above 1: blue and orange stay apart for all eyes
TWO_AND_BOTH = ("#2b7bd9", "#d9691e", "#7a8490")
PAIR = ("#2b7bd9", "#d9691e", "#2a8f6b", "#8a5bb5")
HEIGHT = 320  # pixels
MAP_WIDTH = 640
"""Pixels of a heat map without its axis, about; words in its cells are cut at their share of it."""
ROW = 17
"""Pixels of a heat map's row."""

WITHIN_ERROR = "isValid(datum.error) && abs(datum.value) <= datum.error"
"""Whether a number is no larger than its error."""
Filter = str
"""A Vega expression over `datum` and the parameters."""


def place_axis(names: Sequence[str], title: str = "place in the residual stream") -> alt.X:
    """The places, in order, by name: few labels where there are many."""
    axis = alt.Axis(labelAngle=-90 if len(names) > 8 else -45, labelOverlap="greedy", grid=False, title=title)
    return alt.X("place:N", sort=list(names), axis=axis).scale(domain=list(names))


def _chart(data: str, filters: Sequence[Filter], arrays: Sequence[str] = ()) -> alt.Chart:
    chart = alt.Chart(alt.NamedData(data))
    for condition in filters:
        chart = chart.transform_filter(condition)
    return chart.transform_flatten(list(arrays)) if arrays else chart


def _params(chart: Any, params: Mapping[str, Any], height: int | None = HEIGHT) -> dict[str, Any]:
    declared = [alt.param(name=name, value=value) for name, value in params.items()]
    spec = chart.add_params(*declared).properties(width="container", height=height or HEIGHT).to_dict()
    for unwanted in ("config", "$schema"):
        spec.pop(unwanted, None)
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", **spec}


def factor_colour(factors: Sequence[float]) -> alt.Color:
    """Blue below 1, orange above, grey near it."""
    reach = max((abs(factor - 1) for factor in factors), default=1.0) or 1.0
    run = sorted(set(factors), reverse=True)
    whole = "'' + datum.value"  # every digit of the number: with fewer, two factors could look alike
    values = run[:: max(1, (len(run) - 1) // 4)]
    legend = alt.Legend(labelExpr=whole, values=values, orient="top", direction="horizontal")
    scale = alt.Scale(domain=(1 - reach, 1, 1 + reach), range=FACTOR_COLOURS, interpolate="rgb")
    return alt.Color("factor:Q", title="factor", scale=scale, legend=legend)


def lines_by_place(
    names: Sequence[str], factors: Sequence[float], site: Filter, params: Mapping[str, Any], intervals: bool
) -> dict[str, Any]:
    """A measure by place, a line for each factor, the chosen one in front; `final norm` stands apart: it is no block.

    The dataset `curves` has rows with arrays `value` and `place` (and `low`, `high`); `site` picks the scaled place.
    """
    also = "measure == 'relative' && datum.metric == 'passive' && datum.factor == factor"
    filters = ["datum.entry == layer", "datum.positions == positions", f"datum.metric == measure || ({also})"]
    arrays = ["value", "place", *(["low", "high"] if intervals else [])]
    curves = _chart("curves", filters, arrays).transform_filter("datum.metric != 'passive' || datum.value > 0")
    x, y, colour = place_axis(names), alt.Y("value:Q", title="{measure}").scale(zero=True), factor_colour(factors)
    opacity = alt.condition("datum.factor == factor", alt.value(1.0), alt.value(0.55))
    width = alt.condition("datum.factor == factor", alt.value(3), alt.value(1))
    dash = alt.condition("datum.metric == 'passive'", alt.value([5, 4]), alt.value([1, 0]))
    depths, final = (curves.transform_filter(f"datum.place {sign} 'final norm'") for sign in ("!=", "=="))
    tooltip = [alt.Tooltip("factor:N"), alt.Tooltip("place:N"), alt.Tooltip("value:Q", format=".4g")]
    encoding = {"x": x, "y": y, "color": colour, "opacity": opacity, "tooltip": tooltip}
    drawn = depths.mark_line().encode(**encoding, strokeWidth=width, strokeDash=dash, detail=["factor:Q", "metric:N"])
    marks = [_site_rule(names, site), drawn, final.mark_tick(thickness=2).encode(**encoding)]
    if intervals:
        band = depths.transform_filter("datum.factor == factor && datum.metric == measure")
        marks.insert(1, band.mark_area(opacity=0.3).encode(x=x, y=alt.Y("low:Q"), y2=alt.Y2("high:Q"), color=colour))
    return _params(alt.layer(*marks), params)


def _site_rule(names: Sequence[str], site: Filter, on_map: bool = False) -> alt.Chart:
    """A dashed line where the scaled block's output stands."""
    sites = _chart("places", [site])
    rule = sites.mark_rule(strokeDash=[2, 3], color="white") if on_map else sites.mark_rule(strokeDash=[2, 3])
    return rule.encode(x=place_axis(names))


def heat_map(
    data: str,
    filters: Sequence[Filter],
    names: Sequence[str],
    row: alt.Y,
    title: str,
    params: Mapping[str, Any],
    rows: int,
    site: Filter | None = None,
    reach: float | None = None,
    x_title: str = "place in the residual stream",
    words: str | None = None,
) -> dict[str, Any]:
    """A row for each of something, a column for each place, or block; dark is small.

    `reach` is the largest absolute value of numbers of both signs: blue is below 0, orange above. `words` is an array
    of the data that is written into the cells, of numbers from 0 to 1.
    """
    scale = alt.Scale(scheme="viridis") if reach is None else alt.Scale(scheme="blueorange", domain=[-reach, reach])
    if words:  # dark and light stay where they are, and so does the ink
        scale = alt.Scale(scheme="viridis", domain=[0, 1])
    legend = alt.Legend(orient="top", direction="horizontal", gradientLength=220, titleLimit=500)
    colour = alt.Color("value:Q", title=title, scale=scale, legend=legend)
    cells = _chart(data, filters, ["value", "place", *([words] if words else [])])
    of_row = alt.Tooltip(str(cast("dict[str, Any]", row.to_dict())["field"]), type="nominal")
    tooltip = [of_row, alt.Tooltip("place:N"), alt.Tooltip("value:Q", format=".4g")]
    if words:
        tooltip.insert(2, alt.Tooltip(words, type="nominal"))
    chart = cells.mark_rect().encode(x=place_axis(names, x_title), y=row, color=colour, tooltip=tooltip)
    marks = [chart] if site is None else [chart, _site_rule(names, site, on_map=True)]
    if words:
        ink = alt.condition("datum.value > 0.6", alt.value("black"), alt.value("white"))
        text = cells.mark_text(fontSize=9, limit=max(20, round(MAP_WIDTH / len(names))))
        marks.append(text.encode(x=place_axis(names, x_title), y=row, text=alt.Text(words, type="nominal"), color=ink))
    return _params(alt.layer(*marks), params, max(90, ROW * rows))


def rows_axis(field: str, title: str, order: Sequence[Any] | None = None, kind: str = "N") -> alt.Y:
    """The rows of a heat map; `order` from top to bottom."""
    axis = alt.Axis(labelOverlap=True, grid=False, labelLimit=140, title=title, titlePadding=12)
    return alt.Y(f"{field}:{kind}", axis=axis, sort=list(order) if order is not None else "descending")


def parts_by_block(
    data: str,
    filters: Sequence[Filter],
    blocks: Sequence[str],
    y: str,
    params: Mapping[str, Any],
    parts: Sequence[str],
    reach: float | None = None,
) -> dict[str, Any]:
    """Several norms as lines, by block; or, with `reach`, two parts and both together as bars beside each other.

    `reach` is the largest absolute value of all rows: the axis stays where it is, also where no row is chosen. A bar
    that is no longer than its `error` is faint.
    """
    x = place_axis(blocks, "block")
    chart = _chart(data, filters, ["value", "place", *([] if reach is None else ["error"])])
    tooltip = [alt.Tooltip("part:N"), alt.Tooltip("place:N"), alt.Tooltip("value:Q", format=".4g")]
    legend = alt.Legend(orient="top", direction="horizontal", title=None, labelLimit=400)
    height = alt.Y("value:Q", title=y)
    if reach is None:
        colour = alt.Color("part:N", scale=alt.Scale(domain=list(parts), range=list(PAIR)), legend=legend)
        drawn = chart.mark_line(point=True).encode(x=x, y=height, color=colour, tooltip=tooltip)
        return _params(alt.layer(drawn), params)
    colour = alt.Color("part:N", scale=alt.Scale(domain=list(parts), range=list(TWO_AND_BOTH)), legend=legend)
    drawn = chart.mark_bar().encode(
        x=x,
        y=height.scale(domain=[-reach, reach]),
        color=colour,
        xOffset=alt.XOffset("part:N", sort=list(parts)),
        opacity=alt.condition(WITHIN_ERROR, alt.value(0.25), alt.value(1.0)),
        tooltip=[*tooltip, alt.Tooltip("error:Q", title="error by rounding", format=".2g")],
    )
    zero = alt.Chart(alt.InlineData(values=[{"value": 0}])).mark_rule().encode(y="value:Q")
    return _params(alt.layer(drawn, zero), params)


def bars_by_layer(
    data: str,
    filters: Sequence[Filter],
    names: Sequence[str],
    x_title: str,
    y_title: str,
    params: Mapping[str, Any],
    intervals: bool,
    parts: Sequence[str] = (),
) -> dict[str, Any]:
    """A bar for each layer, or intervention; with its interval over windows. `parts` stand side by side."""
    x, tooltip = place_axis(names, x_title), [alt.Tooltip("place:N"), alt.Tooltip("value:Q", format=".4g")]
    chart = _chart(data, filters)
    encoding: dict[str, Any] = {"x": x, "y": alt.Y("value:Q", title=y_title), "tooltip": tooltip}
    if parts:
        legend = alt.Legend(orient="top", direction="horizontal", title=None, labelLimit=400)
        encoding["color"] = alt.Color("part:N", scale=alt.Scale(domain=list(parts), range=list(PAIR)), legend=legend)
        encoding["xOffset"] = alt.XOffset("part:N", sort=list(parts))
    else:
        encoding["color"] = alt.value(PAIR[0])
    marks = [chart.mark_bar().encode(**encoding)]
    if intervals:
        rule = {name: of for name, of in encoding.items() if name in ("x", "xOffset")}
        marks.append(chart.mark_rule(strokeWidth=2).encode(**rule, y=alt.Y("low:Q"), y2=alt.Y2("high:Q")))
    zero = alt.Chart(alt.InlineData(values=[{"value": 0}])).mark_rule().encode(y="value:Q")
    return _params(alt.layer(*marks, zero), params)


def points(data: str, filters: Sequence[Filter], titles: Sequence[str], params: Mapping[str, Any]) -> dict[str, Any]:
    """A point for each row, at its numbers `x` and `y`, which `titles` name; a dashed line where both are equal."""
    x, y = (alt.Axis(title=title, grid=True) for title in titles)
    tooltip = [alt.Tooltip("place:N"), *(alt.Tooltip(f"{name}:Q", title=title, format=".4g")
               for name, title in zip("xy", titles, strict=True))]  # fmt: skip
    chart = _chart(data, filters)
    drawn = chart.mark_point(filled=True, size=40, opacity=0.7, color=PAIR[0])
    drawn = drawn.encode(x=alt.X("x:Q", axis=x), y=alt.Y("y:Q", axis=y), tooltip=tooltip)
    equal = chart.mark_line(strokeDash=[4, 4], color=TWO_AND_BOTH[2]).encode(x="x:Q", y=alt.Y("x:Q"))
    return _params(alt.layer(equal, drawn), params)


def estimates(
    data: str, x_title: str, y_title: str, parts: Sequence[str], reach: float, tooltip: Sequence[str], intervals: bool
) -> dict[str, Any]:
    """A point for each row by its `estimate` and its `value`, coloured by `part`; on the dashed line both are equal.

    `reach` is the largest absolute value of both; `tooltip` names the fields that say which row a point is.
    """
    chart, scale = _chart(data, []), alt.Scale(domain=[-reach, reach])
    x = alt.X("estimate:Q", title=x_title, scale=scale, axis=alt.Axis(tickCount=7))
    y = alt.Y("value:Q", title=y_title, scale=scale)
    legend = alt.Legend(orient="top", direction="horizontal", title=None, labelLimit=400)
    colour = alt.Color("part:N", scale=alt.Scale(domain=list(parts), range=list(PAIR)), legend=legend)
    said = [
        *(alt.Tooltip(f"{name}:N") for name in ("part", *tooltip)),
        *(alt.Tooltip(f"{name}:Q", format=".4g") for name in ("estimate", "value")),
    ]
    ends = alt.Chart(alt.InlineData(values=[{"estimate": end, "value": end} for end in (-reach, reach)]))
    equal = ends.mark_line(strokeDash=[4, 4], color="#9aa3ad", strokeWidth=1).encode(x=x, y=y)
    marks = [equal, chart.mark_point(filled=True, size=40).encode(x=x, y=y, color=colour, tooltip=said)]
    if intervals:
        marks.insert(1, chart.mark_rule(opacity=0.4).encode(x=x, y=alt.Y("low:Q", scale=scale), y2=alt.Y2("high:Q")))
    return _params(alt.layer(*marks), {})


def lines_by_number(
    data: str,
    filters: Sequence[Filter],
    x: tuple[str, str],
    y_title: str,
    params: Mapping[str, Any],
    parts: Sequence[str],
    intervals: bool,
    reference: float | None = None,
) -> dict[str, Any]:
    """Lines with a point for each dose, in the doses' order, along another number: `x` is its field and its title.

    The dataset has rows with `part`, `dose`, `value` (and `low`, `high`), and that field. `reference` is a dashed
    level.
    """
    chart, (field, x_title) = _chart(data, filters), x
    across = alt.X(f"{field}:Q", title=x_title)
    legend = alt.Legend(orient="top", direction="horizontal", title=None, labelLimit=400)
    colour = alt.Color("part:N", scale=alt.Scale(domain=list(parts), range=list(PAIR[: len(parts)])), legend=legend)
    numbers = [alt.Tooltip(f"{name}:Q", format=".4g") for name in dict.fromkeys((field, "value"))]
    tooltip = [alt.Tooltip("part:N"), alt.Tooltip("dose:N"), *numbers]
    height = alt.Y("value:Q", title=y_title)
    drawn = chart.mark_line(point=True).encode(x=across, y=height, color=colour, order="dose:Q", tooltip=tooltip)
    marks: list[Any] = [drawn, alt.Chart(alt.InlineData(values=[{"value": 0}])).mark_rule().encode(y="value:Q")]
    if intervals:
        band = chart.mark_area(opacity=0.2).encode(x=across, y=alt.Y("low:Q"), y2=alt.Y2("high:Q"), color=colour)
        marks.append(band)  # behind the lines it would make the legend pale
    if reference is not None:
        level = alt.Chart(alt.InlineData(values=[{"value": reference}]))
        marks.append(level.mark_rule(strokeDash=[6, 4]).encode(y="value:Q"))
    return _params(alt.layer(*marks), params)
