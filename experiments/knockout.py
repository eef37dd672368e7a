"""Which attention edges does the answer need? Remove them, one place at a time, and look at the answer.

    python -m experiments.knockout --prompt "The man said that" --corrupted "The woman said that" \\
        --answer " he" --foil " she"

An attention edge goes from a query to a key: through it the query's position reads the key's. The answer is read off
the last position, so its edges to the earlier positions are removed: their scores become minus infinity before the
softmax, in the clean prompt's run, and the other edges share what they had. Each edge is removed in every block alone,
and in every span of neighbouring blocks, for what one block does not read another may read again (attention knockout:
Geva et al. 2023, "Dissecting Recall of Factual Associations in Auto-Regressive Language Models", arXiv:2304.14767. Its
spans in GPT-2 XL are 9 of the 48 blocks, around each block, cut off at both ends of the model). Then every head alone
loses its edge to the tokens in which the prompts differ.

The change is that of the logit difference, answer minus foil, after the last token. `lost` is the same as a share of
the gap between the clean prompt's logit difference and the corrupted one's: at 1 the model answers as if it had read
the other prompt, and near a half as if it had read neither. The corrupted prompt takes part in nothing else. A knockout
tells what the last token reads by itself; what other positions have read for it goes on through them.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from experiments.harness.command import command, start
from experiments.harness.experiment import Checked, Ids, Start, Study
from experiments.harness.pairs import (
    BEFORE,
    BETWEEN,
    DIFFERING,
    ROUNDINGS,
    UNDECIDED,
    Pair,
    PairExperiment,
    PairOptions,
    PairSettings,
    by_block,
    chunked,
    differences,
    pair_settings,
    pairs_of,
    share_of,
    told_apart,
    top_heads,
)
from experiments.harness.table import Row, Table, Tables, by_text
from experiments.harness.verdicts import Decision, Verdict, above, all_of, below, counted, figures_of, within
from experiments.page.figures import Control, Figure, Figures, dataset, reach_of, token_labels
from minigpt import GPT2, compare_logits, logit_difference, parity, scaled

EARLIER = "all earlier tokens"
KEYS = (BEFORE, DIFFERING, BETWEEN, EARLIER)
"""What the last token is kept from reading, where positions of different pairs are not comparable."""
WIDTHS = ONE, SPAN = ("one", "span")
"""In which blocks an edge is removed: in one, or in a span around it."""
METRICS = CHANGE, LOST = ("change", "lost")
"""Of the logit difference, in logits; and how much of the gap that takes away."""
PUBLISHED = 9 / 48
"""The share of all blocks that a span takes in Geva et al. 2023, for GPT-2 XL."""
NEEDED = 0.25
"""Of the gap: a model that knew nothing of the tokens that differ would answer both prompts alike, about halfway, so
half of the gap would be lost. Edges that take half of that are needed."""
ONE_HEAD, SPARED = 0.2, 0.2
"""Of the gap: a head whose edge takes a fifth is worth a name; edges that take less than a fifth are not needed."""
TOP = 5
"""Heads that the terminal lists."""


class Cut(NamedTuple):
    """How one pair's logit difference changes, in logits."""

    edges: Tensor
    """[width, layer, key]: over the groups, then over the positions where those are shown."""
    heads: Tensor
    """[layer, head], of the edge to the tokens that differ."""


@dataclass(frozen=True)
class Knocked:
    """What is measured of some pairs."""

    pairs: list[Pair]
    ends: Tensor
    """The logit difference of the clean run and of the corrupted one: [text, 2]."""
    cuts: list[Cut]


@dataclass(frozen=True, kw_only=True)
class KnockoutOptions(PairOptions):
    """Remove attention edges of the last token."""

    span: Annotated[
        int | None, typer.Option(help="blocks of a span, an odd number; default: 9 of 48, as published")
    ] = None


@dataclass(frozen=True, kw_only=True)
class KnockoutSettings(PairSettings):
    """How many neighbouring blocks a span has."""

    span: int


class Knockout(PairExperiment[Knocked]):
    """Edges of the last token, removed in single blocks, in spans of blocks, and in single heads."""

    name = "knockout"
    question = "Which attention edges does the answer need?"
    options = KnockoutOptions
    settings: KnockoutSettings

    @classmethod
    def from_options(cls, begin: Start[KnockoutOptions]) -> "Knockout":
        """Raises ValueError for a span that has no middle or is no span, and as `pair_settings` does."""
        span, n_layer = begin.options.span, begin.model.config.n_layer
        if span is not None and (span < 1 or span % 2 == 0):
            raise ValueError(f"--span is {span}; expected an odd number of blocks, so that one is in the middle.")
        return cls(KnockoutSettings(**pair_settings(begin), span=published_span(n_layer) if span is None else span))

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Knocked:  # noqa: ARG002
        """Every pair by itself: positions differ between pairs."""
        pairs = pairs_of(ids)
        ends = torch.tensor([differences(model, pair) for pair in pairs], dtype=torch.float64)
        return Knocked(pairs, ends, [self._cut(model, pair) for pair in pairs])

    def keys(self, pair: Pair) -> dict[Any, list[int]]:
        """The keys that are removed together: those of the groups, and of a single pair every earlier position."""
        last = len(pair.clean) - 1
        groups = {**pair.groups, EARLIER: [*range(last)]}
        found: dict[Any, list[int]] = {name: [key for key in groups[name] if key < last] for name in KEYS}
        return found | ({at: [at] for at in range(last)} if self.alone else {})

    def blocks(self, layer: int, width: str, n_layer: int) -> range:
        """The blocks in which edges are removed: one, or a span around it, cut off at both ends of the model."""
        reach = self.settings.span // 2 if width == SPAN else 0
        return range(max(0, layer - reach), min(n_layer, layer + reach + 1))

    def _cut(self, model: GPT2, pair: Pair) -> Cut:
        n_layer, n_head, keys = model.config.n_layer, model.config.n_head, self.keys(pair)
        shape = (len(WIDTHS), n_layer, len(keys))
        edges = torch.full(shape, torch.nan, dtype=torch.float64)
        wanted = {
            (i, layer, k): knock(pair, positions, self.blocks(layer, width, n_layer))
            for layer in range(n_layer)
            for i, width in enumerate(WIDTHS)
            for k, positions in enumerate(keys.values())
            if positions
        }
        for where, change in zip(wanted, self._changes(model, pair, list(wanted.values())), strict=True):
            edges[where] = change
        heads = torch.full((n_layer, n_head), torch.nan, dtype=torch.float64)
        if keys[DIFFERING]:
            grid = [(layer, head) for layer in range(n_layer) for head in range(n_head)]
            of_heads = [knock(pair, keys[DIFFERING], [layer], head, n_head) for layer, head in grid]
            heads = torch.tensor(self._changes(model, pair, of_heads), dtype=torch.float64).view(n_layer, n_head)
        return Cut(edges, heads)

    def _changes(self, model: GPT2, pair: Pair, knockouts: Sequence[dict[str, Tensor]]) -> list[float]:
        """How far each moves the clean prompt's logit difference."""
        found = list[float]()
        size = max(sum(of.numel() * of.element_size() for of in values.values()) for values in knockouts)
        for some in chunked(knockouts, size):
            clean, cut = compare_logits(model, [pair.clean], some, pair.tokens, self.settings.max_bytes)
            found += logit_difference(cut - clean, 0, 1)[:, 0].tolist()
        return found

    def measure(self, model: GPT2, raw: Knocked) -> Tables:
        """`values` [text, metric, blocks, layer, key] and `heads` [text, metric, layer, head]; `ends` [text, run], of
        logit differences; `there` [text, key], whether the pair has such a token."""
        layers, heads = range(model.config.n_layer), range(model.config.n_head)
        gaps = [float(clean - corrupted) for clean, corrupted in raw.ends]

        def both(changes: list[Tensor]) -> Tensor:
            lost = [share_of(-change, gap) for change, gap in zip(changes, gaps, strict=True)]
            return torch.stack([torch.stack(changes), torch.stack(lost)], 1)

        ends = torch.cat([raw.ends, raw.ends[:, :1] - raw.ends[:, 1:]], 1)
        there = [[float(bool(positions)) for positions in self.keys(pair).values()] for pair in raw.pairs]
        keys = list(self.keys(raw.pairs[0]))
        return {
            "values": by_text(
                both([cut.edges for cut in raw.cuts]), metric=METRICS, blocks=WIDTHS, layer=layers, key=keys
            ),
            "heads": by_text(both([cut.heads for cut in raw.cuts]), metric=METRICS, layer=layers, head=heads),
            "ends": by_text(ends, run=["clean", "corrupted", "gap"]),
            "there": by_text(torch.tensor(there, dtype=torch.float64), key=keys),
        }

    def check(self, model: GPT2, raw: Knocked) -> Checked:
        """Where an edge is removed, the pattern must be the clean one with a zero there, and the rest shared out in
        proportion; and a run by itself must change as the table says. Raises CheckError otherwise."""
        off = [self._oracles(model, pair, cut) for pair, cut in zip(raw.pairs, raw.cuts, strict=True)]
        claims = {
            "a removed edge has no weight at all": max(of[0] for of in off),
            "the last token's other weights are the clean ones over what is left, and every other token's are as they "
            "were, in the first block affected": max(of[1] for of in off),
            "a knockout that runs by itself changes the logit difference as the table says": max(of[2] for of in off),
        }
        allowed = (0, ROUNDINGS, ROUNDINGS)
        for (claim, figure), most in zip(claims.items(), allowed, strict=True):
            if not figure <= most:
                raise parity.CheckError(f"it is not so that {claim}: {figure:.3g} roundings, {most} are allowed.")
        return Checked(None, [{"claim": claim, "passed": True, "figure": of} for claim, of in claims.items()])

    def _oracles(self, model: GPT2, pair: Pair, cut: Cut) -> tuple[float, float, float]:
        """Weight of removed edges; how far the others' weights are off, and the logit difference, in roundings."""
        eps, ids = torch.finfo(model.dtype).eps, torch.tensor([pair.clean], device=model.device)
        weight, off, apart = 0.0, 0.0, 0.0
        keys = self.keys(pair)
        name = DIFFERING if keys[DIFFERING] else EARLIER
        with torch.no_grad():
            logits = model(ids)[0, -1, pair.tokens].double()
            clean = list(model.patterns(ids))
            for layer in range(model.config.n_layer):
                with scaled(model, knock(pair, keys[name], [layer])):
                    (pattern,) = islice(model.patterns(ids), layer, layer + 1)
                    changed = model(ids)[0, -1, pair.tokens].double()
                weight = max(weight, float(pattern[:, :, -1, keys[name]].abs().max()))
                off = max(off, off_by(pattern, clean[layer], keys[name]) / eps)
                moved = logit_difference(changed - logits, 0, 1)
                found = cut.edges[WIDTHS.index(ONE), layer, list(keys).index(name)]
                apart = max(apart, float((moved.cpu() - found).abs()))
        return weight, off, apart / (eps * max(1.0, float(logits.abs().max())))

    def rows(self, study: Study[Knocked]) -> Iterator[Row]:
        """Every change, in logits and as a share of the gap; the logit differences."""
        model = self.settings.model
        yield from study.tables["values"].rows(model=model)
        yield from study.tables["heads"].rows(model=model, blocks=ONE, key=DIFFERING)
        yield from study.tables["ends"].rows(model=model, metric="logit difference")

    def verdicts(self, study: Study[Knocked]) -> list[Verdict]:
        """Which edges are needed, by thresholds that were fixed before any model was asked."""
        ends, spans = study.tables["ends"], study.tables["values"].at(metric=LOST, blocks=SPAN)
        decided = [
            ("The model tells the two prompts apart", told_apart(ends.at(run="clean"), ends.at(run="gap"))),
            ("The last token reads the tokens that differ", _needed(spans.at(key=DIFFERING), self.settings.span)),
            (
                "It needs no other group of tokens by itself",
                _spared({name: spans.at(key=name) for name in (BEFORE, BETWEEN)}, study),
            ),
            ("A single head reads a fifth of it", _one_head(study.tables["heads"].at(metric=LOST))),
        ]
        return [Verdict.of(number, claim, of, study.basis) for number, (claim, of) in enumerate(decided, start=1)]

    def lines(self, study: Study[Knocked], columns: int) -> Iterator[str]:
        """The change by block at the groups of keys, in spans of blocks, and the heads whose edge counts most."""
        yield from self.ends_in_words(study)
        edges = study.tables["values"].at(metric=CHANGE, blocks=SPAN, key=list(KEYS))
        span = counted(self.settings.span, "block")
        yield f"change of that, in logits, where the last token does not read the others, in {span} around each:"
        yield from by_block(edges, "key")
        yield from self.undefined_in_words(study, "key", KEYS)
        lost = study.tables["heads"].at(metric=LOST)
        found = ", ".join(f"{name} {within(table)}" for name, table in top_heads(lost, TOP))
        yield from textwrap.wrap(f"share of the gap lost with a head's edge to the {DIFFERING}: {found}", columns)
        yield ""

    def figures(self, study: Study[Knocked]) -> Figures:
        """The report's charts."""
        return _figures(self, study)


# What is removed.


def published_span(n_layer: int) -> int:
    """The odd number of blocks that is nearest to the published share of all."""
    return 2 * round((n_layer * PUBLISHED - 1) / 2) + 1 if n_layer * PUBLISHED > 1 else 1


def knock(
    pair: Pair, keys: Sequence[int], blocks: Sequence[int], head: int | None = None, n_head: int = 1
) -> dict[str, Tensor]:
    """The intervention that removes the last token's edges to some keys in some blocks, of all heads or of one."""
    length = len(pair.clean)
    shift = torch.zeros(1, 1 if head is None else n_head, length, length)
    shift[0, slice(None) if head is None else head, -1, list(keys)] = -torch.inf
    return {f"blocks.{block}.attention.score_shift": shift for block in blocks}


def off_by(pattern: Tensor, clean: Tensor, keys: Sequence[int]) -> float:
    """How far a pattern [batch, n_head, query, key] is from the clean one without the last query's weights at some
    keys, the others in proportion. Both sides are taken times what is left, which may be near 0."""
    expected, found = clean.double().clone(), pattern.double().clone()
    expected[:, :, -1, list(keys)] = 0
    found[:, :, -1] *= expected[:, :, -1].sum(-1, keepdim=True)
    return float((found - expected).abs().max())


# What follows.


def _needed(spans: Table, span: int) -> Decision:
    peak = int(spans.value.nan_to_num(-torch.inf).argmax())
    most = spans.at(layer=peak)
    outcome = all_of(above(spans, NEEDED).any(), below(spans, NEEDED).all())
    return Decision(
        outcome,
        {
            "holds": "Without those edges most of what tells the prompts apart does not arrive.",
            "does not hold": "It arrives without those edges too: by other positions, or by several spans of blocks.",
        }.get(outcome, UNDECIDED),
        f"Most is lost in the span of {counted(span, 'block')} around block {peak}: {within(most)} of the gap; the "
        f"claim needs {NEEDED}.",
        {"block": peak, **figures_of(lost=spans)},
        "last",
    )


def _spared(spans: dict[str, Table], study: Study[Knocked]) -> Decision:
    """About the groups that every pair has."""
    known = {name: of for name, of in spans.items() if float(study.tables["there"].at(key=name).value) == 1}
    if not known:
        return Decision("undecided", "No pair has other tokens, or not all of them have.", positions="last")
    small = torch.stack([below(of, SPARED).all() for of in known.values()])
    large = torch.stack([above(of, SPARED).any() for of in known.values()])
    said = "; ".join(f"{name}: at most {within(_largest(of))}" for name, of in known.items())
    outcome = all_of(small, large)
    return Decision(
        outcome,
        {
            "holds": "Kept from reading them, the model prefers the answer nearly as much as before, or more.",
            "does not hold": "It is read from other tokens too, which may have read it before.",
        }.get(outcome, UNDECIDED),
        f"Without its edges to a group, the last token loses this share of the gap: {said}. The claim needs less than "
        f"{SPARED} for every span.",
        figures_of(**{name.replace(" ", "_"): of for name, of in known.items()}),
        "last",
    )


def _largest(spans: Table) -> Table:
    return spans.at(layer=int(spans.value.nan_to_num(-torch.inf).argmax()))


def _one_head(heads: Table) -> Decision:
    (name, most), *_ = top_heads(heads, 1)
    outcome = all_of(above(heads, ONE_HEAD).any(), below(heads, ONE_HEAD).all())
    return Decision(
        outcome,
        {
            "holds": f"One head's edge counts: {name}.",
            "does not hold": "No head's edge counts by itself; heads read it together, or in several steps.",
        }.get(outcome, UNDECIDED),
        f"Most is lost with the edge of {name} to the {DIFFERING}: {within(most)} of the gap; the claim needs "
        f"{ONE_HEAD}.",
        {"head": name, **figures_of(lost=most)},
        "last",
    )


# The page.


def _figures(experiment: Knockout, study: Study[Knocked]) -> Figures:
    from experiments.page import charts  # noqa: PLC0415  an extra

    edges, heads = (study.tables[name].at(metric=CHANGE) for name in ("values", "heads"))
    keys: list[Any] = [key for key in edges.axes["key"] if isinstance(key, int)] or list(KEYS)
    columns = token_labels(study.tokens)[:-1] if experiment.alone else list(KEYS)
    blocks, unit = [f"block {layer}" for layer in edges.axes["layer"]], "change of the logit difference, logits"
    row, head_names = charts.rows_axis("block", "block", blocks), [str(head) for head in heads.axes["head"]]
    by_key = dataset(edges.at(key=keys).named("layer", "block", blocks).rows(), "key", keys)
    by_head = dataset(heads.named("layer", "block", blocks).rows(), "head", heads.axes["head"])
    filters, chosen, x = ["datum.blocks == blocks"], {"blocks": SPAN}, "key that the last token does not read"
    of_keys = charts.heat_map(
        "keys", filters, columns, row, unit, chosen, len(blocks), reach=reach_of(by_key), x_title=x
    )
    of_heads = charts.heat_map(
        "heads", [], head_names, row, unit, {}, len(blocks), reach=reach_of(by_head), x_title="head"
    )
    note = "Below 0 the answer loses against the foil. A span stands at its middle block."
    alt = f"A heat map: a row for each block, a column for each key: the {unit}."
    of_one = f"A heat map: a row for each block, a column for each head: the {unit}."
    drawn = [
        Figure("keys", "Which tokens the last one needs to read", alt, note, of_keys),
        Figure("heads", f"Which heads need their edge to the {DIFFERING}", of_one, "One head at a time.", of_heads),
    ]
    span = f"{counted(experiment.settings.span, 'block')} around each"
    control = Control("blocks", "removed in", [(SPAN, span), (ONE, "each block alone")], SPAN)
    return Figures(drawn, {"keys": by_key, "heads": by_head}, {"keys": columns, "heads": head_names}, [control])


main = command(Knockout)

if __name__ == "__main__":
    start(main)
