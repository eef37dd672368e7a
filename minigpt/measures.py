"""Per-position statistics of two streams -> measures of how far apart they are.

Axes: [*run, place, batch, position] for what differs between runs, [place, batch, position] for the clean run. A place
is a depth 0 .. n_layer, or `final`, which stands last. The axes of the runs are the caller's: layer and factor of a
sweep, interventions, scales. Streams may be float32; squares are summed in float64, but for what blocks write: in the
model's type, or float32 where that is shorter.

Over a set of positions a stream counts as one long vector, all its positions' vectors joined: norms are
Frobenius norms, and cosines of carried and written are cosines of those long vectors. `cosine`,
`gauge_free` and the measures of predictions are means over positions.

What no measure here can see by itself: whether later blocks would make up for a change that they have not met.
Removed parts of a model are often compensated by later ones (self-repair: McGrath et al. 2023, "The Hydra
Effect"; Rushing and Nanda 2024, "Explorations of Self-Repair in Language Models"), which blocks do it
differs by depth (Lad et al. 2024, "The Remarkable Robustness of LLMs: Stages of Inference?").
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

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
WRITERS: tuple[Measure, ...] = ("written", "attention_written", "mlp_written")
"""What a block writes: all together, and its sublayers, whose names are those of the block's modules."""
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
    """What is kept of some runs' streams: a few numbers per position, place and run, and the clean norms."""

    sites: Tensor
    """The depth at which all that a run does has acted: [*run]."""
    difference_sq: Tensor
    """Squared norm of run minus clean: [*run, place, batch, position]."""
    run_sq: Tensor
    """Squared norm of the run's stream, same axes."""
    inner: Tensor
    """Inner product of the run's and the clean stream, same axes."""
    clean_sq: Tensor
    """Squared norm of the clean stream: [place, batch, position]."""
    lengths: Tensor
    """How many positions each text has: [batch]. All numbers here are 0 at the padding after them."""
    written: Tensor
    """Of every block after the first that a run names, which carries the difference D and writes w otherwise than in
    the clean run: w.w and D.w, for the block and for each sublayer, in the order of `WRITERS`; block d's stand at place
    d + 1: [writer, 2, *run, place, batch, position]."""
    predictions: Predictions | None = None
    """Of the runs, where they were asked for: [*run, batch, position]."""
    clean_predictions: Predictions | None = None
    """Of the clean run: [batch, position]."""
    steps_sq: Tensor | None = None
    """Squared norm of what every block made of the stream, x_{d+1} - x_d, where it was asked for: [*run, block, batch,
    position]."""
    clean_steps_sq: Tensor | None = None
    """Of the clean run: [block, batch, position]."""
    logits: Tensor | None = None
    """Of some tokens, after each text's last one, where they were asked for: [*run, batch, token]."""
    clean_logits: Tensor | None = None
    """Of the clean run: [batch, token]."""

    def frobenius(self, positions: Tensor) -> Tensor:
        """sqrt(sum over positions of norm(D)^2): [*run, place, batch].

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
        whole, sites = self.frobenius(positions), self.sites[..., None, None]
        carried = torch.take_along_dim(whole, sites, dim=-2) / self.clean_norm(positions)
        before = torch.arange(carried.shape[-2])[:, None] < sites
        return self._without_final(carried.masked_fill(before, 0.0))

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
        vectors in blocks whose parameters are neutral; not a number for a sublayer that the block lacks. Blind to
        direction: `alignment` says whether w undoes or adds to what was carried. A block whose write is unchanged
        although its input is not has repaired nothing, it has not noticed.
        """
        write_sq, _ = self._written(positions, part)
        return self._without_final(write_sq.sqrt())

    def alignment(self, positions: Tensor, part: str = "written") -> Tensor:
        """Cosine of D_d, the difference that a block carries, and w, what it writes otherwise than in the clean run.

        From -1 to 1: negative, the block repairs; positive, it amplifies; near 0 with a large `written_norm`, it
        does new damage. norm(D_{d+1})^2 = norm(D_d)^2 + 2 alignment norm(D_d) norm(w) + norm(w)^2. Places and parts
        as in `written_norm`; the sublayers' parts add up: alignment * norm = the sum of the two parts' products.
        The sign of one block's answer is what self-repair is made of (McGrath et al. 2023; Rushing and Nanda
        2024). Blind to position: one position's repair offsets another's damage. 0 where nothing was carried.
        """
        carried_sq = self.difference_sq[..., positions].sum(-1).roll(1, -2)
        write_sq, inner = self._written(positions, part)
        return self._without_final((inner / _positive(carried_sq * write_sq).sqrt()).clamp(-1.0, 1.0))

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
        """A measure by name over a set of positions: [*run, place, batch].

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
        """The statistics of some entries of the first axis of the runs, in the order given."""
        chosen = list(entries)
        return replace(
            self,
            sites=self.sites[chosen],
            difference_sq=self.difference_sq[chosen],
            run_sq=self.run_sq[chosen],
            inner=self.inner[chosen],
            written=self.written[:, :, chosen],
            predictions=self.predictions and self.predictions.map(lambda tensor: tensor[chosen]),
            steps_sq=None if self.steps_sq is None else self.steps_sq[chosen],
            logits=None if self.logits is None else self.logits[chosen],
        )

    def _of_predictions(self, clean: bool = False) -> Predictions:
        found = self.clean_predictions if clean else self.predictions
        if found is None:
            raise ValueError("No predictions were kept; run with predictions=True.")
        return found

    def _written(self, positions: Tensor, part: str) -> tuple[Tensor, Tensor]:
        """w.w and D.w of a writer, summed over positions: [*run, place, batch] each."""
        write_sq, inner = self.written[list[str](WRITERS).index(part)][..., positions].sum(-1)
        return write_sq, inner

    def _mean(self, values: Tensor, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean over the positions of a set that a text has: [..., batch, position] -> [..., batch]."""
        real = positions < (self.lengths if lengths is None else lengths)[:, None]
        return values[..., positions].where(real, 0.0).sum(-1) / real.sum(-1)

    def _at_final(self, values: Tensor, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """A mean that exists at `final` only, on the places' axis: [*run, place, batch]."""
        placed = values.new_full(self.difference_sq.shape[:-1], torch.nan)
        placed[..., -1, :] = self._mean(values, positions, lengths)
        return placed

    @staticmethod
    def _without_final(values: Tensor) -> Tensor:
        values[..., -1, :] = torch.nan
        return values


Labels = Sequence[Mapping[str, Any]]
"""For every index of an axis, the columns of a table that name it, such as {"layer": 2, "head": 0}."""


def tidy(axes: Sequence[Labels], values: Tensor) -> Iterator[dict[str, Any]]:
    """A row for each finite number of a tensor, named by the labels of its axes."""
    for labels, value in zip(itertools.product(*axes), values.flatten().tolist(), strict=True):
        if math.isfinite(value):
            yield {**{column: of for label in labels for column, of in label.items()}, "value": value}


@dataclass(frozen=True, repr=False)
class Result:
    """Some runs beside their clean run: what `sweep`, `compare` and `sensitivity` return."""

    ids: Tensor
    """The texts, padded on the right: [batch, position]."""
    statistics: Statistics

    def __repr__(self) -> str:
        runs, (texts, most) = " x ".join(str(len(labels)) for labels in self.axes), self.ids.shape
        return (
            f"<{type(self).__name__}: {runs} runs beside the clean one, {len(self.places)} places, {texts} texts of up "
            f"to {most} tokens; .measure(name, positions) of {', '.join(self.measures)}>"
        )

    @property
    def axes(self) -> tuple[Labels, ...]:
        """What the axes of the runs are, each index named as in a table."""
        raise NotImplementedError

    @property
    def lengths(self) -> Tensor:
        """How many tokens each text has: [batch]."""
        return self.statistics.lengths

    @property
    def places(self) -> Labels:
        """The names of the places: depths 0 .. n_layer, and `final`."""
        return [*({"depth": depth} for depth in range(len(self.statistics.clean_sq) - 1)), {"depth": "final"}]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The names of the measures that it has: without predictions there are fewer."""
        return tuple(name for name in MEASURES if self.statistics.predictions or name not in OF_PREDICTIONS)

    def measure(self, name: Measure, positions: PositionSet) -> Tensor:
        """A measure by name over a set of positions: the axes of the runs, then [place, batch].

        Raises ValueError as `Statistics.measure` does.
        """
        return self.statistics.measure(name, positions)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Tidy rows, one finite number each: position set, measure, run, place and text."""
        texts = [{"text": text} for text in range(len(self.lengths))]
        sets = [of for of in POSITION_SETS if of != "rest" or int(self.lengths.min()) > 1]
        for positions in sets:
            for name in self.measures:
                for row in tidy((*self.axes, self.places, texts), self.measure(name, positions)):
                    yield {"positions": positions, "metric": name, **row}


def _positive(x: Tensor) -> Tensor:
    """For a divisor: 0 / 0 shall be 0."""
    return x.clamp_min(torch.finfo(torch.float64).tiny)
