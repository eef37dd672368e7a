"""Any scales, together, as many interventions as you like: each a run beside the clean one.

`sweep` is for grids of layers and factors. Here every intervention is a dict of scales, as `scaled` takes
it; the runs are rows of one batch, for a scale can hold a value per row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.engine import is_out_of_memory, logger, rows_at_once
from minigpt.measures import Measure, PositionSet, Statistics, inner_products, squared_norms
from minigpt.model import GPT2
from minigpt.parameters import block_of, not_neutral, scaled
from minigpt.predictions import Predictions, predict
from minigpt.sweep import padded

Intervention = Mapping[str, float | Tensor]
"""Names of scales and their values: numbers, or tensors that broadcast against [1, position, n_embd or n_head]."""


@dataclass(frozen=True)
class Comparison:
    """Some interventions beside the clean run of the same texts."""

    statistics: Statistics
    """Axis `layer` runs over the interventions, axis `factor` has one entry. Its `layers` are the last layers that an
    intervention touches: `passive` carries the difference from there. What blocks wrote is not kept."""
    steps_sq: Tensor
    """Squared norm of what every block made of the stream, x_{d+1} - x_d: [intervention, block, batch, position]."""
    clean_steps_sq: Tensor
    """Of the clean run: [block, batch, position]."""

    def measure(self, name: Measure, positions: PositionSet) -> Tensor:
        """A measure by name over a set of positions: [intervention, place, batch]; raises as `Statistics.measure`."""
        return self.statistics.measure(name, positions)[:, 0]


@torch.no_grad()
def compare(
    model: GPT2,
    ids: Tensor | Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
    predictions: bool = False,
    max_bytes: int | None = None,
) -> Comparison:
    """Run texts clean and under every intervention, and keep numbers per position.

    `ids` are texts as `sweep` takes them. A few runs form a batch, at most `max_bytes` large, each batch with its own
    clean row, so that what is compared stood in the same products; one that runs out of memory is halved and run
    again, as in `sweep`. `predictions` asks for the next-token distributions, which take the unembedding.

    Raises ValueError for no intervention, for an unknown scale, for a shape that does not fit, for a model whose
    scales are not 1, for a stream that overflows, and when `max_bytes` is too little for one run beside the clean one.
    """
    ids, lengths = padded(ids)
    model.config.check_ids(ids)
    if changed := not_neutral(model):
        raise ValueError(f"The clean run needs every scale to be 1; set {', '.join(changed)} back to 1.")
    if not interventions or not all(interventions):
        raise ValueError(
            "There is no intervention, or an empty one; give dicts such as {'blocks.2.output_scale': 0.5}."
        )
    device = model.device
    at_once = rows_at_once(model, ids.numel(), max_bytes, least=2) - 1

    def run(some: Sequence[Intervention]) -> _Part:
        return _Part.run(model, ids.to(device), lengths, some, predictions)

    chunks = [interventions[start : start + at_once] for start in range(0, len(interventions), at_once)]
    parts = [part for chunk in chunks for part in _in_memory(run, chunk)]
    return _join(model, parts, interventions, lengths)


def _in_memory(run: Callable[[Sequence[Intervention]], "_Part"], some: Sequence[Intervention]) -> list["_Part"]:
    """Run some interventions together, and in halves where memory runs out, which a warning says."""
    try:
        return [run(some)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    if len(some) == 1:
        raise ValueError("The memory is too little for one intervention beside the clean run; shorten the texts.")
    logger.warning(
        "Out of memory with %d interventions beside the clean run; they are halved and run again.", len(some)
    )
    half = len(some) // 2
    return _in_memory(run, some[:half]) + _in_memory(run, some[half:])


@dataclass(frozen=True)
class _Part:
    """What one batch gave; row 0 of every tensor is the clean run."""

    numbers: Tensor
    """Squared norm of the difference, of the stream, and their inner product: [3, row, place, batch, position]."""
    steps: Tensor
    predictions: Predictions | None

    @classmethod
    def run(
        cls, model: GPT2, ids: Tensor, lengths: Tensor, interventions: Sequence[Intervention], predictions: bool
    ) -> "_Part":
        """One forward pass of the clean run and these interventions, reduced to numbers depth by depth."""
        shape = (1 + len(interventions), *ids.shape, model.config.n_embd)
        numbers, steps, before = list[Tensor](), list[Tensor](), torch.empty(0)
        with scaled(model, _by_row(interventions, ids)):
            for depth, stream in enumerate(model.depths(ids.repeat(shape[0], 1))):
                streams = stream.expand(shape[0] * shape[1], -1, -1).reshape(shape)
                numbers.append(_numbers(streams))
                steps += [squared_norms(streams.double() - before)] if depth else []
                before = streams
        numbers.append(_numbers(model.final_norm(before)))
        predicted = predict(model.unembed, model.final_norm, before, ids, lengths) if predictions else None
        padding = (torch.arange(ids.shape[1]) >= lengths[:, None]).to(ids.device)
        of_places, of_blocks = (torch.stack(of, -3).masked_fill(padding, 0.0).cpu() for of in (numbers, steps))
        return cls(of_places, of_blocks, predicted)


def _numbers(streams: Tensor) -> Tensor:
    x = streams.double()
    return torch.stack([squared_norms(x - x[:1]), squared_norms(x), inner_products(x, x[:1])])


def _by_row(interventions: Sequence[Intervention], ids: Tensor) -> dict[str, Tensor]:
    """Every scale that an intervention names, as [row, position or 1, width or 1]: 1 where it is not named."""
    batch, length = ids.shape
    values = {name: [torch.ones(1, 1, 1)] * (1 + len(interventions)) for one in interventions for name in one}
    for row, intervention in enumerate(interventions, start=1):
        for name, value in intervention.items():
            tensor = torch.as_tensor(value, dtype=torch.float64).cpu()
            values[name][row] = tensor.reshape((1,) * (3 - tensor.ndim) + tensor.shape)
    return {name: _stacked(name, rows, batch, length) for name, rows in values.items()}


def _stacked(name: str, rows: Sequence[Tensor], batch: int, length: int) -> Tensor:
    """One tensor for all rows and texts. Raises ValueError for shapes that differ in more than being 1."""
    try:
        together = torch.broadcast_tensors(*rows)
    except RuntimeError:
        together = ()
    if not together or together[0].ndim != 3 or together[0].shape[0] != 1 or together[0].shape[1] not in (1, length):
        shapes = ", ".join(str(list(row.shape)) for row in rows[1:])
        raise ValueError(f"{name} has values of shape {shapes}; expected numbers, or [1, position, width] each.")
    return torch.cat(together).repeat_interleave(batch, 0)


def _join(model: GPT2, parts: Sequence[_Part], interventions: Sequence[Intervention], lengths: Tensor) -> Comparison:
    """The batches on one axis of interventions."""
    difference, norm, inner = torch.cat([part.numbers[:, 1:] for part in parts], 1).unsqueeze(2)
    broken = (~norm.isfinite()).nonzero()
    if len(broken):
        raise ValueError(
            f"Intervention {int(broken[0][0])} makes the stream overflow; take smaller scales, or float64."
        )
    layers = tuple(max(block_of(name) for name in intervention) for intervention in interventions)
    found = [part.predictions for part in parts if part.predictions]
    joined = (
        [torch.cat([getattr(of, name)[1:] for of in found])[:, None] for name in found[0].tensors()] if found else []
    )
    statistics = Statistics(
        layers,
        difference,
        norm,
        inner,
        parts[0].numbers[1, 0],
        lengths,
        predictions=Predictions(*joined) if found else None,
        clean_predictions=found[0].map(lambda rows: rows[0]) if found else None,
    )
    return Comparison(statistics, torch.cat([part.steps[1:] for part in parts]), parts[0].steps[0])
