"""The study's figures, as PNG and SVG."""

from pathlib import Path
from typing import Any

import altair as alt

from experiments.curves import Curves

LINES, IMAGE, RELATIVE = "divergence_lines", "divergence_image", "divergence_relative"
FORMATS = ("png", "svg")
MARK = "#222222"  # the edited block
FACTOR_COLOURS = ("#08519c", "#b0b0b0", "#b34700")  # below 1, at 1, above 1: blue and orange stay apart for all eyes
WIDTH, HEIGHT = 620, 340  # pixels
FINAL_WIDTH = 46  # pixels

Rows = list[dict[str, Any]]


def draw(rows: Rows, curves: Curves, about: str, folder: Path) -> None:
    """Draw the tidy rows of a study: its first studied site, all positions but the first; `about` says of what."""
    head = {"head": curves.heads[0]} if curves.heads else {}
    shown = [
        row
        for row in rows
        if row["layer"] == curves.layers[0] and row["positions"] == "rest" and head.items() <= row.items()
    ]
    where = curves.where(0)
    if len(curves.layers) > 1:
        about += f"; site 1 of {len(curves.layers)}, the others are in divergence.csv"
    charts = {
        LINES: lines(_of(shown, "frobenius"), curves, alt.Title(f"Change after scaling the {where}", subtitle=about)),
        IMAGE: image(_of(shown, "frobenius"), curves, alt.Title(f"Change after scaling the {where}", subtitle=about)),
        RELATIVE: relative(
            shown, curves, alt.Title(f"Change relative to the stream, scaling the {where}", subtitle=about)
        ),
    }
    for name, chart in charts.items():
        for kind in FORMATS:
            chart.save(folder / f"{name}.{kind}", scale_factor=2 if kind == "png" else 1)


def lines(rows: Rows, curves: Curves, title: alt.Title) -> alt.HConcatChart:
    """The difference by depth, a line for each factor; `final` stands apart, for it is no block's output."""
    depths, final = _split(rows)
    top = max(row["value"] if curves.windows is None else row["high"] for row in rows)
    y = alt.Y("value:Q", title="Frobenius norm of scaled minus clean").scale(domain=(0, top * 1.08), nice=False)
    drawn = (
        alt.Chart(alt.Data(values=depths))
        .mark_line(point=alt.OverlayMarkDef(size=14))
        .encode(x=_depth_axis(curves), y=y, color=_factor_colour(rows), detail="factor:Q")
    )
    points = (
        alt.Chart(alt.Data(values=final))
        .mark_tick(thickness=2, width=FINAL_WIDTH * 0.6)
        .encode(x=_final_axis(), y=y.axis(None), color=_factor_colour(rows))
    )
    return _side_by_side(_mark_site(curves) + _band(depths, curves) + drawn, points, title)


def _band(depths: Rows, curves: Curves) -> alt.Chart:
    """The interval of the mean over windows; nothing for a prompt."""
    shown = depths if curves.windows is not None else []
    band = alt.Chart(alt.Data(values=shown)).mark_area(opacity=0.25)
    x, y, low = _depth_axis(curves), alt.Y("high:Q"), alt.Y2("low:Q")
    return band.encode(x=x, y=y, y2=low, color=_factor_colour(depths), detail="factor:Q")


def image(rows: Rows, curves: Curves, title: alt.Title) -> alt.HConcatChart:
    """The same numbers as an image, factor x depth."""
    depths, final = _split(rows)
    top = max(row["value"] for row in rows)
    y = alt.Y("factor:O", title="factor", sort="descending")
    colour = alt.Color("value:Q", title=["Frobenius", "norm"]).scale(scheme="viridis", domain=(0, top))
    cells = (
        alt.Chart(alt.Data(values=depths))
        .mark_rect()
        .encode(x=_depth_axis(curves, kind="O"), y=y.axis(labelOverlap=True, grid=False), color=colour)
    )
    column = alt.Chart(alt.Data(values=final)).mark_rect().encode(x=_final_axis(), y=y.axis(None), color=colour)
    site = alt.Chart(alt.Data(values=[{"depth": curves.layers[0] + 1}])).mark_rule(color="white", strokeDash=[4, 3])
    return _side_by_side(cells + site.encode(x=_depth_axis(curves, kind="O")), column, title)


def relative(rows: Rows, curves: Curves, title: alt.Title) -> alt.LayerChart:
    """The difference over the stream's own norm; dashed, what it would be if no later block reacted."""
    measured, passive = _split(_of(rows, "relative"))[0], _of(rows, "passive")
    y = alt.Y("value:Q", title="norm of the difference / norm of the clean stream")
    y = y.scale(domain=(0, max(row["value"] for row in measured) * 1.1), nice=False)
    encoding = {"x": _depth_axis(curves), "y": y, "color": _factor_colour(rows), "detail": "factor:Q"}
    solid = alt.Chart(alt.Data(values=measured)).mark_line(point=alt.OverlayMarkDef(size=14)).encode(**encoding)
    after = [row for row in passive if int(row["depth"]) > curves.layers[0]]
    dashed = alt.Chart(alt.Data(values=after)).mark_line(strokeDash=[5, 4], strokeWidth=1.2, color=MARK)
    dashed = dashed.encode(x=encoding["x"], y=encoding["y"], detail="factor:Q")
    passive_label = "dashed: the change at the site carried along by blocks that do not react (passive)"
    title.subtitle = [title.subtitle, passive_label]
    chart = (_mark_site(curves) + dashed + solid).properties(width=WIDTH, height=HEIGHT)
    return _styled(chart.properties(title=title))


def _of(rows: Rows, metric: str) -> Rows:
    return [row for row in rows if row["metric"] == metric]


def _split(rows: Rows) -> tuple[Rows, Rows]:
    """Rows at a depth, with the depth as a number, and rows at `final`."""
    depths = [{**row, "depth": int(row["depth"])} for row in rows if row["depth"] != "final"]
    return depths, [row for row in rows if row["depth"] == "final"]


def _depth_axis(curves: Curves, kind: str = "Q") -> alt.X:
    n_layer = curves.norms.shape[1] - 2
    axis = alt.Axis(
        values=list(range(n_layer + 1)),
        labelExpr="datum.value == 0 ? 'embeddings' : datum.value",
        labelAngle=0,
        grid=False,
        title="depth (d = output of block d - 1)",
    )
    x = alt.X(f"depth:{kind}", axis=axis)
    return x.scale(domain=(0, n_layer), nice=False, padding=12) if kind == "Q" else x


def _final_axis() -> alt.X:
    return alt.X("depth:N", title=None, axis=alt.Axis(labelAngle=0, labelExpr="['final', 'norm']"))


def _factor_colour(rows: Rows) -> alt.Color:
    reach = max(abs(row["factor"] - 1) for row in rows) or 1.0
    scale = alt.Scale(domain=(1 - reach, 1, 1 + reach), range=FACTOR_COLOURS)
    run = sorted({row["factor"] for row in rows}, reverse=True)
    legend = alt.Legend(format="~g", values=run[:: max(1, (len(run) - 1) // 4)])
    return alt.Color("factor:Q", title="factor", scale=scale, legend=legend)


def _mark_site(curves: Curves) -> alt.LayerChart:
    site = alt.Chart(alt.Data(values=[{"depth": curves.layers[0] + 1, "label": f"block {curves.layers[0]} scaled"}]))
    rule = site.mark_rule(color=MARK, strokeDash=[2, 3]).encode(x=_depth_axis(curves))
    text = site.mark_text(align="left", dx=5, dy=8, color=MARK).encode(x="depth:Q", y=alt.value(0), text="label:N")
    return rule + text


def _side_by_side(depths: alt.LayerChart, final: alt.Chart, title: alt.Title) -> alt.HConcatChart:
    both = alt.hconcat(
        depths.properties(width=WIDTH, height=HEIGHT), final.properties(width=FINAL_WIDTH, height=HEIGHT), spacing=14
    )
    return _styled(both.properties(title=title))


def _styled(chart: Any) -> Any:
    return (
        chart.configure_view(stroke=None)
        .configure(background="white")
        .configure_axis(labelFontSize=11, titleFontSize=12)
    )
