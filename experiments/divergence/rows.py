"""What the divergence study measures: the rows of its table, and what names their axes."""

from collections import namedtuple
from typing import Any

import torch

from experiments.harness.table import Tables, by_measure, by_text
from experiments.harness.verdicts import describe_entry, site_in_words
from minigpt import Sweep
from minigpt.measures import MEASURES, OF_PREDICTIONS

Scaled = int | Any
"""A layer; or, where heads of it were scaled, say, a named tuple of layer and head."""
FIRST, LAST = ("model", "site"), ("factor", "depth", "positions", "metric")
"""Columns of divergence.csv, in order; between them what was scaled."""
NORMS = ("of position 0", "mean of the others", "of the others together")


def scaled_in(result: Sweep) -> list[Scaled]:
    """What was scaled in each entry of a sweep."""
    if result.indices is None:
        return [*result.layers]
    return [*map(namedtuple("Entry", ("layer", str(result.index))), result.layers, result.indices)]


def layer_of(scaled: Scaled) -> int:
    """The layer of a head, or itself."""
    return int(columns_of(scaled)["layer"])


def index_of(scaled: Scaled) -> dict[str, int]:
    """Which head, say, by that name, where one was scaled."""
    return {name: number for name, number in columns_of(scaled).items() if name != "layer"}


def columns_of(scaled: Scaled) -> dict[str, int]:
    """What was scaled, as columns of the table."""
    return {"layer": scaled} if isinstance(scaled, int) else scaled._asdict()


def in_words(scaled: Scaled, site: str, positions: tuple[int, ...] | None) -> str:
    """What was scaled, in words."""
    block = f"{site_in_words({'mlp': 'MLP'}.get(site, site), index_of(scaled))} of {describe_entry(layer_of(scaled))}"
    if positions is None:
        return block
    return f"{block} at position{'s' * (len(positions) > 1)} {', '.join(map(str, positions))}"


def measured(result: Sweep) -> Tables:
    """What a sweep of some texts gives.

    `values`: every measure [text, positions, metric, layer, factor, depth]; `norms` of the clean stream, by `NORMS`
    [text, of, depth].
    """
    names = [name for name in MEASURES if result.statistics.predictions or name not in OF_PREDICTIONS]
    values = by_measure(result, names, layer=scaled_in(result), factor=result.factors)
    clean = result.statistics.clean_sq  # [place, text, position]
    first, others = clean[..., :1].sqrt(), clean[..., 1:].sqrt()
    mean = others.sum(-1, keepdim=True) / (result.lengths[:, None] - 1)
    norms = torch.cat([first, mean, others.square().sum(-1, keepdim=True).sqrt()], -1).permute(1, 2, 0)
    return {"values": values, "norms": by_text(norms, of=NORMS, depth=values.axes["depth"])}


def tokens_of(result: Sweep) -> Tables:
    """`tokens`, the norm of the difference at every position [text, position, layer, factor, depth]."""
    norms = result.statistics.difference_sq.sqrt().permute(3, 4, 0, 1, 2)
    depths = [*range(norms.shape[-1] - 1), "final"]
    axes = {"position": range(norms.shape[1]), "layer": scaled_in(result), "factor": result.factors}
    return {"tokens": by_text(norms, **axes, depth=depths)}
