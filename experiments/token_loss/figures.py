"""The charts of the token-loss experiment and the data behind them."""

from typing import Any

from experiments.harness.experiment import Study
from experiments.harness.table import Table
from experiments.page import charts
from experiments.page.figures import (
    Control,
    Figure,
    Figures,
    dataset,
    label_of,
    likeliest_cells,
    reach_of,
    token_labels,
)

NATS = "change of the loss, nats"
LOSSES = {"loss_change": "the whole text", "target_loss_change": "the target"}
CORRELATIONS = {"correlation": "mean over the text", "target_correlation": "where the target is predicted"}
KL = {"kl_from_clean": "kl(scaled, clean)", "kl_after_temperature": "left after the best temperature"}


def figures(study: Study[Any]) -> Figures:
    """Loss, correlation and temperature by layer; of a prompt also the tokens that suffer, and what could come."""
    table = study.tables["values"]
    factors = table.axes["factor"]
    names = [f"block {layer}" for layer in table.axes["layer"]]
    shown = _bars(names, factors[0], study.windows is not None)
    data: dict[str, Any] = {"layers": _layers(table, names)}
    factor = Control("factor", "factor", [(of, label_of(of)) for of in factors], factors[0])
    if study.counts:
        return Figures(shown, data, {}, [factor])
    layer = Control("layer", "scaled (in the table below)", [(name, name) for name in names], names[0])
    tokens, labels = study.tables["tokens"], token_labels(study.tokens)
    rows = ({**row, "token": labels[row["position"]]} for row in tokens.rows())
    data["tokens"] = dataset(rows, "layer", tokens.axes["layer"])
    cells = likeliest_cells(study.raw.before, study.tokenizer)
    likeliest = [{**cell, "layer": names[cell["layer"]], "factor": factors[cell["factor"]]} for cell in cells]
    title = "The ten most likely tokens where the target should come"
    shown.append(_token_map(names, factors[0], labels[1:], reach_of(data["tokens"])))
    return Figures(shown, data, {"tokens": names}, [layer, factor], {}, likeliest, title)


def _bars(names: list[str], factor: float, intervals: bool) -> list[Figure]:
    """A chart for each kind of bar."""
    kinds = {
        "loss": (LOSSES, NATS, "Which layers matter for the loss",
                 "Below 0, scaling the layer makes the tokens that come likelier; above 0, less likely."),
        "correlation": (CORRELATIONS, "correlation", "How much the logits keep their pattern",
                        "1 is the same pattern, up to a factor and a shift of all logits."),
        "temperature": (KL, "kl, nats per token", "Is it just a temperature?",
                        "Were scaling the same as a temperature, the second bar would be 0."),
    }  # fmt: skip
    shown = []
    for kind, (parts, title, heading, note) in kinds.items():
        filters = ["datum.factor == factor", f"datum.kind == '{kind}'"]
        spec = charts.bars_by_layer(
            "layers", filters, names, "scaled", title, {"factor": factor}, intervals, list(parts.values())
        )
        alt = f"Bars for every scaled layer: {title}, of {' and of '.join(parts.values())}."
        shown.append(Figure(kind, heading, alt, note, spec))
    return shown


def _token_map(names: list[str], factor: float, tokens: list[str], reach: float) -> Figure:
    row = charts.rows_axis("token", "position and token", tokens)
    chosen, filters = {"factor": factor}, ["datum.factor == factor"]
    spec = charts.heat_map("tokens", filters, names, row, NATS, chosen, len(tokens), reach=reach, x_title="scaled")
    alt = "A heat map of the change of every token's loss: a row for each token, a column for each scaled layer."
    return Figure("tokens", "Which tokens suffer", alt, "Orange: the token became less likely.", spec)


def _layers(table: Table, names: list[str]) -> list[dict[str, Any]]:
    found = []
    for kind, parts in (("loss", LOSSES), ("correlation", CORRELATIONS), ("temperature", KL)):
        shown = table.at(metric=list(parts)).named("metric", "part", list(parts.values()))
        found += dataset(shown.named("layer", "place", names).rows(kind=kind))
    return found
