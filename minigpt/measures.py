"""Per-position statistics of two streams -> measures of how far apart they are.

Axes: [layer, factor, place, batch, position] for what differs between scaled runs, [place, batch,
position] for the clean run. A place is a depth 0 .. n_layer, or `final`, which stands last.
Streams may be float32; squares are summed in float64.

Over a set of positions a stream counts as one long vector, all its positions' vectors joined: norms are
Frobenius norms, and cosines of carried and written are cosines of those long vectors. `cosine`,
`gauge_free` and the measures of predictions are means over positions.

What no measure here can see by itself: whether later blocks would make up for a change that they have not met.
Removed parts of a model are often compensated by later ones (self-repair: McGrath et al. 2023, "The Hydra
Effect"; Rushing and Nanda 2024, "Explorations of Self-Repair in Language Models"), which blocks do it
differs by depth (Lad et al. 2024, "The Remarkable Robustness of LLMs: Stages of Inference?").
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from minigpt.predictions import Predictions

PositionSet = Literal["all", "first", "rest"]
POSITION_SETS: tuple[PositionSet, ...] = get_args(PositionSet)
Measure = Literal[
    "frobenius",
    "relative",
    "passive",
    "gauge_free",
    "cosine",
    "written",
    "attention_written",
    "mlp_written",
    "alignment",
    "attention_alignment",
    "mlp_alignment",
    "kl",
    "loss_change",
    "changed",
    "correlation",
]
MEASURES: tuple[Measure, ...] = get_args(Measure)
OF_PREDICTIONS: tuple[Measure, ...] = ("kl", "loss_change", "changed", "correlation")
"""The measures that take the unembedding."""
WRITTEN = ("attention_written", "mlp_written", "parts_inner", "attention_carried", "mlp_carried")
"""What a sweep keeps of every block's writes; see `Statistics`."""
UNITS: dict[Measure, str] = {
    **dict.fromkeys(("frobenius", "written", "attention_written", "mlp_written"), "units of the stream"),
    **dict.fromkeys(("kl", "loss_change"), "nats per token"),
    "changed": "share of positions",
}
"""Of the measures that have one; the others are ratios and cosines."""


def squared_norms(x: Tensor) -> Tensor:
    """Squared norm of every position's vector: [..., n_embd] -> [...], summed in float64."""
    return inner_products(x, x)


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of every position's vectors: [..., n_embd] twice -> [...], summed in float64."""
    return (x.double() * y.double()).sum(-1)


@dataclass(frozen=True)
class Statistics:
    """What a sweep keeps of its streams: a few numbers per position, place and cell, and the clean norms."""

    layers: tuple[int, ...]
    difference_sq: Tensor
    """Squared norm of scaled minus clean: [layer, factor, place, batch, position]."""
    run_sq: Tensor
    """Squared norm of the scaled stream, same axes."""
    inner: Tensor
    """Inner product of the scaled and the clean stream, same axes."""
    clean_sq: Tensor
    """Squared norm of the clean stream: [place, batch, position]."""
    lengths: Tensor
    """How many positions each text has: [batch]. All numbers here are 0 at the padding after them."""
    written: Tensor | None = None
    """Of every block after the site, which carries the difference D and writes a + m more, its attention's and its
    MLP's part: a.a, m.m, a.m, D.a and D.m, in the order of `WRITTEN`; block d's stand at place d + 1:
    [number, layer, factor, place, batch, position]. None where it was not kept."""
    predictions: Predictions | None = None
    """Of the scaled runs, where they were asked for: [layer, factor, batch, position]."""
    clean_predictions: Predictions | None = None
    """Of the clean run: [batch, position]."""

    def frobenius(self, positions: Tensor) -> Tensor:
        """sqrt(sum over positions of norm(D)^2): [layer, factor, place, batch].

        In units of the stream, from 0. The measure of the study's lecture. Blind to what the change means: a change
        of the stream's length alone, which the final norm removes, counts as much as a change of direction; a few
        dimensions of outsized values can decide it alone (rogue dimensions: Timkey and van Schijndel 2021, "All
        Bark and No Bite"), and so can a first token of massive norm (Sun et al. 2024, "Massive Activations in Large
        Language Models"), on which heads rest attention that they need nowhere else (attention sinks: Xiao et al. 2023,
        "Efficient Streaming Language Models with Attention Sinks"; Gu et al. 2024, "When Attention Sink Emerges").
        """
        return self.difference_sq[..., positions].sum(-1).sqrt()

    def clean_norm(self, positions: Tensor) -> Tensor:
        """sqrt(sum over positions of norm(x)^2) of the clean stream: [place, batch]. In units of the stream."""
        return self.clean_sq[..., positions].sum(-1).sqrt()

    def relative(self, positions: Tensor) -> Tensor:
        """`frobenius` divided by the clean stream's norm at the same place.

        A ratio from 0 (no change). The stream's norm grows with depth (Heimersheim and Turner 2023, "Residual
        stream norms grow exponentially over the forward pass"), so a constant difference shrinks in this
        measure. Blind to why: dilution by later writes looks like repair; compare it with `passive`.
        """
        return self.frobenius(positions) / self.clean_norm(positions)

    def passive(self, positions: Tensor) -> Tensor:
        """What `relative` would be if no block after the site reacted: the difference at the site, carried along.

        A ratio from 0; for the output site it is abs(s - 1) * norm at the site / norm at the place. Blind to
        everything that later blocks do, by intent: it is what to compare `relative` with. Both divide by the same
        clean norm, which grows with depth (Heimersheim and Turner 2023). Zero before the site; not a number at
        `final`, where the norm layer, not a block, comes between.
        """
        at_site = self.frobenius(positions)[torch.arange(len(self.layers)), :, torch.tensor(self.layers) + 1]
        carried = at_site[:, :, None, :] / self.clean_norm(positions)
        before = torch.arange(carried.shape[2]) <= torch.tensor(self.layers)[:, None]
        carried[before[:, None, :, None].expand_as(carried)] = 0.0
        carried[:, :, -1] = torch.nan
        return carried

    def gauge_free(self, positions: Tensor) -> Tensor:
        """Mean over positions of min over c of norm(c x' - x) / norm(x) = sqrt(1 - cosine^2).

        A ratio from 0 (x' is x, made longer or shorter) to 1 (nothing of x is left in x'). Blind to a global
        rescaling of a position, as every norm layer is up to its epsilon, also to one by a negative number. The
        stream's length is no part of what blocks read: scaling the output of block l equals dividing all later
        writes (the same observation as Heimersheim and Turner's 2023, that growing writes must outgrow the stream).
        """
        # sin^2 = (|D|^2 - <v, D>^2 / |v|^2) / |w|^2, with v the shorter of x and x', w the longer: for small D this
        # keeps the digits that 1 - cosine^2 loses.
        longer = self.run_sq > self.clean_sq
        along = (self.inner - self.clean_sq).where(longer, self.run_sq - self.inner)
        shorter = _positive(torch.minimum(self.run_sq, self.clean_sq))
        across = (self.difference_sq - along.square() / shorter).clamp_min(0.0)
        sine = (across / _positive(torch.maximum(self.run_sq, self.clean_sq))).sqrt()
        # Nothing of x is left in an x' of zeros.
        return self._mean(sine.where(self.run_sq > 0, 1.0), positions)

    def cosine(self, positions: Tensor) -> Tensor:
        """Mean over positions of <x, x'> / (norm(x) norm(x')).

        From -1 to 1 (the same direction). Blind to length; in streams with a few outsized dimensions it says
        little about the others (Timkey and van Schijndel 2021), and it moves little for small changes:
        `gauge_free` is its sine. 0 where one of the two is zero.
        """
        return self._mean((self.inner / _positive(self.run_sq * self.clean_sq).sqrt()).clamp(-1.0, 1.0), positions)

    def written_norm(self, positions: Tensor, part: str = "written") -> Tensor:
        """Frobenius norm of w, what a block writes otherwise than in the clean run; D_{d+1} = D_d + w.

        In units of the stream, from 0; block d's stands at place d + 1, and is 0 up to the site and not a number at
        `final`. `part` is `written`, or `attention_written`, `mlp_written` for the two sublayers', which add up as
        vectors. Blind to direction: `alignment` says whether w undoes or adds to what was carried. A block whose
        write is unchanged although its input is not has repaired nothing, it has not noticed.
        """
        return self._without_final(self._written_products(positions)[part].sqrt())

    def alignment(self, positions: Tensor, part: str = "written") -> Tensor:
        """Cosine of D_d, the difference that a block carries, and w, what it writes otherwise than in the clean run.

        From -1 to 1: negative, the block repairs; positive, it amplifies; near 0 with a large `written_norm`, it
        does new damage. norm(D_{d+1})^2 = norm(D_d)^2 + 2 alignment norm(D_d) norm(w) + norm(w)^2. Places and parts
        as in `written_norm`; the sublayers' parts add up: alignment * norm = the sum of the two parts' products.
        The sign of one block's answer is what self-repair is made of (McGrath et al. 2023; Rushing and Nanda
        2024). Blind to position: one position's repair offsets another's damage. 0 where nothing was carried.
        """
        carried = self.difference_sq[..., positions].sum(-1).roll(1, 2)
        inner = self._written_products(positions)
        along = {"attention_written": inner["attention_carried"], "mlp_written": inner["mlp_carried"]}
        along["written"] = along["attention_written"] + along["mlp_written"]
        cosine = along[part] / _positive(carried * inner[part]).sqrt()
        return self._without_final(cosine.clamp(-1.0, 1.0))

    def kl(self, positions: Tensor) -> Tensor:
        """Mean over positions of KL(clean next-token distribution, scaled), at `final` only.

        In nats per token, from 0 (Kullback and Leibler 1951). It sees what reaches the output and nothing else: a
        change that only later positions read is invisible at its own. The mean is decided by few positions where
        most change little.
        """
        return self._at_final(self._of_predictions().kl, positions)

    def loss_change(self, positions: Tensor) -> Tensor:
        """Mean over positions of the next token's loss, scaled minus clean, at `final` only.

        In nats per token, of either sign: a worse distribution can still suit this text. The last position has no
        next token. Blind to every token but the one that comes. Not a number where the set has no next token.
        """
        scaled, clean = self._of_predictions(), self._of_predictions(clean=True)
        return self._at_final(scaled.loss - clean.loss, positions, self.lengths - 1)

    def changed(self, positions: Tensor) -> Tensor:
        """Share of positions whose most likely next token is another, at `final` only.

        From 0 to 1. Blind to everything below the first rank; where two tokens are nearly as likely, a
        hair's breadth decides.
        """
        scaled, clean = self._of_predictions(), self._of_predictions(clean=True)
        return self._at_final((scaled.likeliest != clean.likeliest).double(), positions)

    def correlation(self, positions: Tensor) -> Tensor:
        """Mean over positions of Pearson's correlation of the logits, scaled with clean, at `final` only.

        From -1 to 1. The measure of the token-loss lecture. Blind to a temperature (all logits multiplied)
        and to a shift of all of them; tens of thousands of unlikely tokens decide it, hardly the likely ones.
        """
        return self._at_final(self._of_predictions().correlation, positions)

    def measure(self, name: Measure, positions: PositionSet) -> Tensor:
        """A measure by name over a set of positions: [layer, factor, place, batch].

        Raises ValueError for another name or set, when the set is empty (a single token has no `rest`), and for a
        measure of predictions, or of what blocks write, when that was not kept.
        """
        if name not in MEASURES or positions not in POSITION_SETS:
            expected = f"{', '.join(MEASURES)}, over {', '.join(POSITION_SETS)}"
            raise ValueError(f"There is no measure {name!r} over {positions!r}; expected one of {expected}.")
        index = torch.arange(self.clean_sq.shape[-1])[
            {"all": slice(None), "first": slice(1), "rest": slice(1, None)}[positions]
        ]
        if len(index) == 0 or not bool((index[0] < self.lengths).all()):
            raise ValueError(
                f"There is no position in the set {positions!r} of a text of one token; use a longer text."
            )
        if name.endswith("written"):
            return self.written_norm(index, name)
        if name.endswith("alignment"):
            return self.alignment(index, name.replace("alignment", "written"))
        return getattr(self, name)(index)

    def of_entries(self, entries: Sequence[int]) -> "Statistics":
        """The statistics of some entries of the axis `layer`, in the order given."""
        chosen = list(entries)
        return replace(
            self,
            layers=tuple(self.layers[entry] for entry in chosen),
            difference_sq=self.difference_sq[chosen],
            run_sq=self.run_sq[chosen],
            inner=self.inner[chosen],
            written=None if self.written is None else self.written[:, chosen],
            predictions=self.predictions and self.predictions.map(lambda tensor: tensor[chosen]),
        )

    def _of_predictions(self, clean: bool = False) -> Predictions:
        found = self.clean_predictions if clean else self.predictions
        if found is None:
            raise ValueError("This sweep kept no predictions; run it with predictions=True.")
        return found

    def _written_products(self, positions: Tensor) -> dict[str, Tensor]:
        """`WRITTEN`, and `written`, the squared norm of both parts together: [layer, factor, place, batch] each."""
        if self.written is None:
            raise ValueError("What blocks write was not kept here; a sweep keeps it.")
        inner = dict(zip(WRITTEN, self.written[..., positions].sum(-1), strict=True))
        whole = inner["attention_written"] + inner["mlp_written"] + 2 * inner["parts_inner"]
        return {**inner, "written": whole.clamp_min(0.0)}  # the sum of three can round below it

    def _mean(self, values: Tensor, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean over the positions of a set that a text has: [..., batch, position] -> [..., batch]."""
        real = positions < (self.lengths if lengths is None else lengths)[:, None]
        return values[..., positions].where(real, 0.0).sum(-1) / real.sum(-1)

    def _at_final(self, values: Tensor, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """A mean that exists at `final` only, on the places' axis: [layer, factor, place, batch]."""
        placed = values.new_full(self.difference_sq.shape[:-1], torch.nan)
        placed[:, :, -1] = self._mean(values, positions, lengths)
        return placed

    @staticmethod
    def _without_final(values: Tensor) -> Tensor:
        values[:, :, -1] = torch.nan
        return values


def _positive(x: Tensor) -> Tensor:
    """For a divisor: 0 / 0 shall be 0."""
    return x.clamp_min(torch.finfo(torch.float64).tiny)
