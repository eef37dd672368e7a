"""Per-position statistics of two streams -> measures of how far apart they are.

Axes: [layer, factor, place, batch, position] for what differs between scaled runs, [place, batch,
position] for the clean run. A place is a depth 0 .. n_layer, or `final`, which stands last.
Streams may be float32; squares are summed in float64.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

PositionSet = Literal["all", "first", "rest"]
POSITION_SETS: tuple[PositionSet, ...] = get_args(PositionSet)
Measure = Literal["frobenius", "relative", "passive", "cosine"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


def squared_norms(x: Tensor) -> Tensor:
    """Squared norm of every position's vector: [..., n_embd] -> [...], summed in float64."""
    return inner_products(x, x)


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of every position's vectors: [..., n_embd] twice -> [...], summed in float64."""
    return (x.double() * y.double()).sum(-1)


@dataclass(frozen=True)
class Statistics:
    """What a sweep keeps of its streams: three numbers per position, place and cell, and the clean norms."""

    layers: tuple[int, ...]
    difference: Tensor
    """Squared norm of scaled minus clean: [layer, factor, place, batch, position]."""
    scaled: Tensor
    """Squared norm of the scaled stream, same axes."""
    inner: Tensor
    """Inner product of the scaled and the clean stream, same axes."""
    clean: Tensor
    """Squared norm of the clean stream: [place, batch, position]."""
    lengths: Tensor
    """How many positions each text has: [batch]. All numbers above are 0 at the padding after them."""

    def frobenius(self, positions: Tensor) -> Tensor:
        """sqrt(sum over positions of norm(D)^2), in units of the stream: [layer, factor, place, batch].

        Blind to what the change means: a change of the stream's length alone, which the final norm
        removes, counts as much as a change of direction.
        """
        return self.difference[..., positions].sum(-1).sqrt()

    def clean_norm(self, positions: Tensor) -> Tensor:
        """sqrt(sum over positions of norm(x)^2) of the clean stream: [place, batch]."""
        return self.clean[..., positions].sum(-1).sqrt()

    def relative(self, positions: Tensor) -> Tensor:
        """`frobenius` divided by the clean stream's norm at the same place; 0 is no change.

        The stream's norm grows with depth (Heimersheim and Turner 2023, "Residual stream norms grow
        exponentially over the forward pass"), so a constant difference shrinks in this measure:
        compare it with `passive`.
        """
        return self.frobenius(positions) / self.clean_norm(positions)

    def passive(self, positions: Tensor) -> Tensor:
        """What `relative` would be if no block after the site reacted: the difference at the site, carried along.

        For the output site that is abs(s - 1) * norm at the site / norm at the place. Zero before the
        site; not a number at `final`, where the norm layer, not a block, comes between.
        """
        at_site = self.frobenius(positions)[torch.arange(len(self.layers)), :, torch.tensor(self.layers) + 1]
        carried = at_site[:, :, None, :] / self.clean_norm(positions)
        before = torch.arange(carried.shape[2]) <= torch.tensor(self.layers)[:, None]
        carried[before[:, None, :, None].expand_as(carried)] = 0.0
        carried[:, :, -1] = torch.nan
        return carried

    def cosine(self, positions: Tensor) -> Tensor:
        """Mean over positions of the cosine between scaled and clean stream, -1 to 1; blind to length."""
        real = positions < self.lengths[:, None]
        cosines = (self.inner / (self.scaled * self.clean).sqrt())[..., positions]
        return (cosines.where(real, 0.0).sum(-1) / real.sum(-1)).clamp(-1.0, 1.0)

    def measure(self, name: Measure, positions: PositionSet) -> Tensor:
        """A measure by name over a set of positions: [layer, factor, place, batch].

        Raises ValueError when the set is empty: a single token has no `rest`.
        """
        index = torch.arange(self.clean.shape[-1])[
            {"all": slice(None), "first": slice(1), "rest": slice(1, None)}[positions]
        ]
        if len(index) == 0 or not bool((index[0] < self.lengths).all()):
            raise ValueError(
                f"There is no position in the set {positions!r} of a text of one token; use a longer text."
            )
        return getattr(self, name)(index)
