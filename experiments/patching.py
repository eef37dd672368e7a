"""Where in the model is what two prompts differ in? Patch every place with the other prompt's values, and look.

    python -m experiments.patching --prompt "The man said that" --corrupted "The woman said that" \\
        --answer " he" --foil " she"

The clean prompt calls for the answer, the corrupted one for the foil; the logit difference is the logit of the answer
minus that of the foil, after the last token. Denoising, the default, puts values of the clean run into the corrupted
run, at one place at a time, and asks what share of the two prompts' gap comes back: a place that recovers it is enough.
Noising puts corrupted values into the clean run, and asks what share is lost: a place that loses it is needed
(activation patching: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2; Heimersheim and
Nanda 2024, "How to use and interpret activation patching", compare the two directions).

Places are the output, the attention write and the MLP write of every block at every position, or over a corpus of pairs
at groups of positions; and every head, at all positions together. Beside each share stands what attribution patching
estimates of it from one derivative. The default pair is the one that the items of experiments/behaviour.py told apart
best on weights/tiny: see harness/pairs.py.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import typer
from torch import Tensor

from experiments.harness.command import command, start
from experiments.harness.experiment import Checked, Ids, Start, Study
from experiments.harness.pairs import (
    BETWEEN,
    DIFFERING,
    LAST,
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
from experiments.harness.verdicts import Decision, Verdict, above, all_of, below, figures_of, within
from experiments.page.figures import Control, Figure, Figures, dataset, reach_of, token_labels
from minigpt import GPT2, attribution_patching, compare_logits, logit_difference, parity, patch, record

SITES = ("output", "attention", "mlp")
"""What is patched at positions: a block's output, and what its attention and its MLP write."""
HEAD = "head"
METHODS = ("patched", "estimated")
"""A share measured by patching, and the same estimated by attribution patching."""
PATCHED, ESTIMATED = METHODS
SHOWN_GROUPS = (DIFFERING, BETWEEN, LAST)
"""Before the first token that differs both runs are the same, and nothing can be patched."""
DIRECTIONS = {"denoising": "recovered", "noising": "lost"}
"""What is patched into what, and what became of the gap."""
DONE = {
    "denoising": "Values of the clean run were put into the corrupted run.",
    "noising": "Values of the corrupted run were put into the clean run.",
}
CARRIES = 0.9
"""Of the gap: a place that moves this share carries nearly all of it, and leaves a tenth for everything else."""
ONE_HEAD = 0.2
"""Of the gap: a single head that moves a fifth is worth a name; of dozens of heads, equal parts would be smaller."""
AGREES = 0.9
"""A correlation above this leaves less than a fifth of the variance unexplained (1 - 0.9 squared = 0.19)."""
INDIRECT_OBJECT = {
    "model": "gpt2",
    "prompt": "When Mary and John went to the store, John gave a drink to",
    "corrupted": "When Mary and John went to the store, Mary gave a drink to",
    "answer": " Mary",
    "foil": " John",
}
"""Indirect object identification, with the example of Wang et al. 2023, "Interpretability in the Wild", section 2."""
TOP = 5
"""Heads that the terminal lists."""


class Grid(NamedTuple):
    """The logit differences of one pair's patched runs, and what attribution patching estimates of them."""

    at: dict[str, Tensor]
    """Site -> [method, layer, place]: over the groups, then over the positions where those are shown."""
    heads: Tensor
    """[method, layer, head]."""


@dataclass(frozen=True)
class Patched:
    """What is measured of some pairs: shares of the gap, as changes from the run that is patched."""

    pairs: list[Pair]
    ends: Tensor
    """The logit difference of the clean run and of the corrupted one: [text, 2]."""
    grids: list[Grid]


@dataclass(frozen=True, kw_only=True)
class PatchingOptions(PairOptions):
    """Patch every place of one prompt's run with the other prompt's values."""

    direction: Annotated[
        str, typer.Option(help="denoising: clean values into the corrupted run | noising: the other way round")
    ] = "denoising"


@dataclass(frozen=True, kw_only=True)
class PatchingSettings(PairSettings):
    """Which run is patched."""

    direction: str = "denoising"


class Patching(PairExperiment[Patched]):
    """Every place of a run, patched with the values of another prompt's."""

    name = "patching"
    question = "Where in the model is what the two prompts differ in?"
    options = PatchingOptions
    lectures: ClassVar[Mapping[str, Mapping[str, str | bool]]] = dict.fromkeys(
        ("patchingIOI", "attention_IOI", "CCperHeadIOI"), INDIRECT_OBJECT
    )
    settings: PatchingSettings

    @classmethod
    def from_options(cls, begin: Start[PatchingOptions]) -> "Patching":
        """Raises ValueError for another direction, and as `pair_settings` does."""
        direction = begin.options.direction
        if direction not in DIRECTIONS:
            raise ValueError(f"--direction is {direction!r}; expected {' or '.join(DIRECTIONS)}.")
        return cls(PatchingSettings(**pair_settings(begin), direction=direction))

    @property
    def moved(self) -> str:
        """What the shares are, in a word: recovered or lost."""
        return DIRECTIONS[self.settings.direction]

    @property
    def metric(self) -> str:
        """What the shares are called in the table."""
        return f"share {self.moved}"

    def shares(self, study: Study[Patched]) -> Table:
        """The shares by method, site, layer and place."""
        return study.tables["values"].at(metric=self.metric)

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Patched:  # noqa: ARG002
        """Every pair by itself: positions differ between pairs."""
        pairs = pairs_of(ids)
        ends = torch.tensor([differences(model, pair) for pair in pairs], dtype=torch.float64)
        return Patched(pairs, ends, [self._grid(model, pair) for pair in pairs])

    def places(self, pair: Pair) -> dict[Any, list[int]]:
        """What is patched together: the groups, and of a single pair every position too."""
        groups: dict[Any, list[int]] = {name: pair.groups[name] for name in SHOWN_GROUPS}
        return groups | ({at: [at] for at in range(len(pair.clean))} if self.alone else {})

    def base_and_other(self, pair: Pair) -> tuple[list[int], list[int]]:
        """The prompt whose run is patched, and the prompt whose values are put into it."""
        return (pair.corrupted, pair.clean) if self.settings.direction == "denoising" else (pair.clean, pair.corrupted)

    def _grid(self, model: GPT2, pair: Pair) -> Grid:
        """How far the logit difference moves, by patching and as estimated."""
        places, n_layer, n_head = self.places(pair), model.config.n_layer, model.config.n_head
        at = {site: torch.full((2, n_layer, len(places)), torch.nan, dtype=torch.float64) for site in SITES}
        heads = torch.empty(2, n_layer, n_head, dtype=torch.float64)
        for chosen in chunked(sites_of(model), bytes_of_values(model, len(pair.clean))):
            values = record(model, [self.base_and_other(pair)[1]], chosen)
            found = self._moved(model, pair, values)
            estimated = estimates(model, self.base_and_other(pair)[0], pair, values)
            for site in chosen:
                layer, leaf = layer_of(site), site.rpartition(".")[2]
                if leaf == HEAD:
                    heads[:, layer] = torch.stack([found[site], estimated[site].sum(0)])
                    continue
                sums = [estimated[site][positions].sum() for positions in places.values() if positions]
                there = torch.tensor([bool(positions) for positions in places.values()])
                at[leaf][:, layer, there] = torch.stack([found[site], torch.stack(sums)])
        return Grid(at, heads)

    def _moved(self, model: GPT2, pair: Pair, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """By site, how far every patch moves the logit difference: of every place that is not empty, or every head."""
        wanted = [(site, part) for site in values for part in self._parts(model, pair, site)]
        found: dict[str, list[float]] = {site: [] for site in values}
        size = max(of.numel() * of.element_size() for of in values.values())
        for some in chunked(wanted, size):
            patches = [patch(site, values[site], **part) for site, part in some]
            moved = self._run(model, pair, patches)
            for (site, _), change in zip(some, moved, strict=True):
                found[site].append(change)
        return {site: torch.tensor(changes, dtype=torch.float64) for site, changes in found.items()}

    def _parts(self, model: GPT2, pair: Pair, site: str) -> list[dict[str, list[int]]]:
        """What is patched of a site, as `patch` takes it."""
        if site.endswith(f".{HEAD}"):
            return [{"heads": [head]} for head in range(model.config.n_head)]
        return [{"positions": positions} for positions in self.places(pair).values() if positions]

    def _run(self, model: GPT2, pair: Pair, patches: Sequence[dict[str, Tensor]]) -> list[float]:
        """How far patches of the base run move its logit difference."""
        base, _ = self.base_and_other(pair)
        clean, patched = compare_logits(model, [base], patches, pair.tokens, self.settings.max_bytes)
        moved = logit_difference(patched - clean, 0, 1)
        return [float(change) for change in moved[:, 0]]

    def measure(self, model: GPT2, raw: Patched) -> Tables:
        """`values` [text, metric, method, site, layer, at] and `heads` [text, method, layer, head], shares of the gap;
        `agreement` [text, metric, site], of the estimates with the measured shares; `ends` [text, run], of logit
        differences; `there` [text, at], whether the pair has such a token."""
        labels = list(self.places(raw.pairs[0]))
        layers, heads = range(model.config.n_layer), range(model.config.n_head)
        gaps = self._gaps(raw)
        shares = torch.stack(
            [
                share_of(torch.stack([grid.at[site] for site in SITES], 1), gap)
                for grid, gap in zip(raw.grids, gaps, strict=True)
            ]
        )
        of_heads = torch.stack([share_of(grid.heads, gap) for grid, gap in zip(raw.grids, gaps, strict=True)])
        there = [[float(bool(positions)) for positions in self.places(pair).values()] for pair in raw.pairs]
        agreement = torch.stack([self._agreement(*of) for of in zip(raw.pairs, shares, of_heads, strict=True)])
        ends = torch.cat([raw.ends, raw.ends[:, :1] - raw.ends[:, 1:]], 1)
        return {
            "values": by_text(
                shares.unsqueeze(1), metric=[self.metric], method=METHODS, site=SITES, layer=layers, at=labels
            ),
            "heads": by_text(of_heads, method=METHODS, layer=layers, head=heads),
            "agreement": by_text(agreement, metric=["correlation", "largest error"], site=[*SITES, HEAD]),
            "ends": by_text(ends, run=["clean", "corrupted", "gap"]),
            "there": by_text(torch.tensor(there, dtype=torch.float64), at=labels),
        }

    def _gaps(self, raw: Patched) -> list[float]:
        """The other run's logit difference minus that of the run that is patched, of every pair."""
        sign = 1.0 if self.settings.direction == "denoising" else -1.0
        return [sign * float(clean - corrupted) for clean, corrupted in raw.ends]

    def _agreement(self, pair: Pair, shares: Tensor, heads: Tensor) -> Tensor:
        """Correlation of estimates and measured shares, and the largest error: [metric, site].

        Of positions, those from the first on that differs: before it both are 0. Of a corpus's pair, the groups.
        """
        places = list(self.places(pair))
        first = len(pair.groups["tokens before"])
        kept = [
            index
            for index, label in enumerate(places)
            if (label >= first if isinstance(label, int) else not self.alone and pair.groups[label])
        ]
        grids = [*shares[..., kept].unbind(1), heads]
        both = [(grid[0].flatten(), grid[1].flatten()) for grid in grids]
        correlation = [torch.corrcoef(torch.stack(pair_of))[0, 1] for pair_of in both]
        return torch.stack([torch.stack(correlation), torch.stack([(one - other).abs().max() for one, other in both])])

    def check(self, model: GPT2, raw: Patched) -> Checked:
        """Values of the very run change nothing, and the last block's output at the last position is all that the
        logits after it are made of. Raises CheckError where rounding does not explain what is found."""
        off = [self._oracles(model, pair, ends) for pair, ends in zip(raw.pairs, raw.ends, strict=True)]
        claims = {
            "patching a run with its own values moves the logit difference by no more than rounding": max(
                own for own, _ in off
            ),
            "patching the last block's output at the last position gives the other prompt's logit difference, but for "
            "rounding": max(other for _, other in off),
        }
        for claim, figure in claims.items():
            if not figure <= ROUNDINGS:
                raise parity.CheckError(f"it is not so that {claim}: {figure:.3g} roundings, {ROUNDINGS} are allowed.")
        checks = [{"claim": claim, "passed": True, "figure": figure} for claim, figure in claims.items()]
        return Checked(None, checks)

    def _oracles(self, model: GPT2, pair: Pair, ends: Tensor) -> tuple[float, float]:
        """How far both oracles are off, in roundings of the largest logit: 0 where nothing is off."""
        base, other = self.base_and_other(pair)
        middle, last = f"blocks.{model.config.n_layer // 2}", f"blocks.{model.config.n_layer - 1}.output"
        sites = [f"{middle}.{site}" for site in (*SITES, f"attention.{HEAD}")]
        itself = [patch(site, values) for site, values in record(model, [base], sites).items()]
        whole = patch(last, record(model, [other], [last])[last], positions=[len(base) - 1])
        moved = self._run(model, pair, [*itself, whole])
        expected = float(ends[0] - ends[1]) * (1.0 if self.settings.direction == "denoising" else -1.0)
        logits, _ = compare_logits(model, [base, other], [{"embedding_scale": 1.0}], pair.tokens)
        unit = torch.finfo(model.dtype).eps * max(float(logits.abs().max()), 1.0)
        return max(map(abs, moved[:-1])) / unit, abs(moved[-1] - expected) / unit

    def rows(self, study: Study[Patched]) -> Iterator[Row]:
        """Every share, by patching and as estimated; how both agree; the logit differences."""
        model = self.settings.model
        yield from study.tables["values"].rows(model=model)
        yield from study.tables["heads"].rows(model=model, metric=self.metric, site=HEAD)
        yield from study.tables["agreement"].rows(model=model)
        yield from study.tables["ends"].rows(model=model, metric="logit difference")

    def verdicts(self, study: Study[Patched]) -> list[Verdict]:
        """Where it is, by thresholds that were fixed before any model was asked."""
        ends, output = study.tables["ends"], self.shares(study).at(method=PATCHED, site="output")
        before_last = study.n_layer - 2
        late = output.at(layer=before_last, at=LAST) if before_last >= 0 else None
        decided = [
            ("The model tells the two prompts apart", told_apart(ends.at(run="clean"), ends.at(run="gap"))),
            (
                "Behind block 0 it is at the tokens in which the prompts differ",
                _carried(output.at(layer=0, at=DIFFERING), f"the output of block 0 at the {DIFFERING}", self.moved),
            ),
            (
                "Before the last block it is at the last token",
                _carried(late, f"the output of block {before_last} at the {LAST}", self.moved),
            ),
            ("A single head carries a fifth of it", _one_head(study.tables["heads"].at(method=PATCHED), self.moved)),
            ("Attribution patching finds what patching finds", _agrees(study.tables["agreement"])),
        ]
        return [Verdict.of(number, claim, of, study.basis) for number, (claim, of) in enumerate(decided, start=1)]

    def lines(self, study: Study[Patched], columns: int) -> Iterator[str]:
        """Logit differences, the shares of outputs by layer at the groups, the heads that move most."""
        yield from self.ends_in_words(study)
        shares = self.shares(study).at(method=PATCHED, site="output", at=list(SHOWN_GROUPS))
        yield f"{self.settings.direction}: share of the gap {self.moved}, by patching the output of a block:"
        yield from by_block(shares, "at")
        yield from self.undefined_in_words(study, "at", SHOWN_GROUPS)
        heads = study.tables["heads"].at(method=PATCHED)
        found = ", ".join(f"{name} {within(table)}" for name, table in top_heads(heads, TOP))
        yield from textwrap.wrap(f"the same, by patching a head at all positions: {found}", columns)
        yield ""

    def figures(self, study: Study[Patched]) -> Figures:
        """The report's charts."""
        return _figures(self, study)


# What is patched, in pieces.


def sites_of(model: GPT2) -> list[str]:
    """All sites that are patched, block by block."""
    leaves = (*SITES, f"attention.{HEAD}")
    return [f"blocks.{layer}.{leaf}" for layer in range(model.config.n_layer) for leaf in leaves]


def layer_of(site: str) -> int:
    """The block of a site."""
    return int(site.split(".")[1])


def bytes_of_values(model: GPT2, positions: int) -> int:
    """What the values of one site take, of one prompt."""
    return positions * model.config.n_embd * model.dtype.itemsize


def estimates(model: GPT2, base: list[int], pair: Pair, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What attribution patching says of the logit difference: by site [position], of heads [position, head]."""

    def metric(logits: Tensor) -> Tensor:
        return logit_difference(logits[:, -1], pair.answer, pair.foil)

    return {site: of[0].double().cpu() for site, of in attribution_patching(model, [base], values, metric).items()}


# What follows.


def _carried(share: Table | None, where: str, moved: str) -> Decision:
    if share is None:
        return Decision("undecided", "The model has a single block, so there is nothing before the last one.")
    outcome = all_of(above(share, CARRIES), below(share, CARRIES))
    return Decision(
        outcome,
        {
            "holds": "That place alone carries nearly all of it.",
            "does not hold": "That place alone does not carry it: a part of it is elsewhere.",
        }.get(outcome, UNDECIDED),
        f"Patching {where}, {within(share)} of the gap is {moved}; the claim needs {CARRIES}.",
        figures_of(share=share),
        "all",
    )


def _one_head(heads: Table, moved: str) -> Decision:
    (name, most), *_ = top_heads(heads, 1)
    outcome = all_of(above(heads, ONE_HEAD).any(), below(heads, ONE_HEAD).all())
    return Decision(
        outcome,
        {
            "holds": f"One head moves much of it: {name}.",
            "does not hold": "No head does it alone; many do it together, or the MLPs do.",
        }.get(outcome, UNDECIDED),
        f"The largest share is that of {name}, patched at all positions: {within(most)} of the gap is {moved}; the "
        f"claim needs {ONE_HEAD}.",
        {"head": name, **figures_of(share=most)},
        "all",
    )


def _agrees(agreement: Table) -> Decision:
    correlation, error = agreement.at(metric="correlation"), agreement.at(metric="largest error")
    outcome = all_of(above(correlation, AGREES), below(correlation, AGREES))
    said = "; ".join(
        f"{site}: correlation {within(correlation.at(site=site))}, largest error {within(error.at(site=site))}"
        for site in correlation.axes["site"]
    )
    return Decision(
        outcome,
        {
            "holds": "One derivative would have told the same places.",
            "does not hold": "At some sites the model is too far from linear: patch there, and do not estimate.",
        }.get(outcome, UNDECIDED),
        f"{said}; the claim needs a correlation of {AGREES} at each, and errors are shares of the gap.",
        figures_of(correlation=correlation, largest_error=error),
        "all",
    )


# The page.


def _figures(experiment: Patching, study: Study[Patched]) -> Figures:
    from experiments.page import charts  # noqa: PLC0415  an extra

    shares, heads = experiment.shares(study), study.tables["heads"]
    labels: list[Any] = [at for at in shares.axes["at"] if isinstance(at, int)] or list(SHOWN_GROUPS)
    columns = token_labels(study.tokens) if experiment.alone else list(SHOWN_GROUPS)
    blocks = [f"block {layer}" for layer in shares.axes["layer"]]
    unit, row = f"share of the gap {experiment.moved}", charts.rows_axis("block", "block", blocks)
    at = dataset(shares.at(at=labels).named("layer", "block", blocks).rows(), "at", labels)
    of_heads = dataset(heads.named("layer", "block", blocks).rows(), "head", heads.axes["head"])
    head_names = [str(head) for head in heads.axes["head"]]
    chosen, filters = {"site": SITES[0], "method": PATCHED}, ["datum.site == site", "datum.method == method"]
    x = "token of the prompts, with its position" if experiment.alone else "tokens"
    places = charts.heat_map("at", filters, columns, row, unit, chosen, len(blocks), reach=reach_of(at), x_title=x)
    chosen, filters = {"method": PATCHED}, ["datum.method == method"]
    by_head = charts.heat_map(
        "heads", filters, head_names, row, unit, chosen, len(blocks), reach=reach_of(of_heads), x_title="head"
    )
    both = _scatter(shares.at(at=labels).named("at", "place", columns), heads)
    points = charts.points("both", ["datum.site == of"], [f"{word} share" for word in METHODS], {"of": SITES[0]})
    note = f"1 is the whole gap between the two prompts. {DONE[experiment.settings.direction]}"
    every_head, rows = f"Every head patched at all positions. {note}", "A heat map: a row for each block"
    each = "A point for every place: across, the share by patching; up, the share that attribution patching estimates."
    drawn = [
        Figure("places", "Where it is", f"{rows}, a column for each token: {unit}.", note, places),
        Figure("heads", "Which heads carry it", f"{rows}, a column for each head: {unit}.", every_head, by_head),
        Figure("estimates", "Estimated beside patched", each, "On the line both are the same.", points),
    ]
    names = {"output": "output of the block", "attention": "attention write", "mlp": "MLP write", HEAD: "head"}
    controls = [
        Control("site", "patched", [(site, names[site]) for site in SITES], SITES[0]),
        Control("method", "share", [(PATCHED, "by patching"), (ESTIMATED, "as estimated")], PATCHED),
        Control("of", "points of", [(site, names[site]) for site in (*SITES, HEAD)], SITES[0]),
    ]
    data = {"at": at, "heads": of_heads, "both": both}
    return Figures(drawn, data, {"at": columns, "heads": head_names}, controls)


def _scatter(shares: Table, heads: Table) -> list[dict[str, Any]]:
    """A row for every place that has both shares: its name, the share by patching and the estimate."""
    names = [f"head {head}" for head in heads.axes["head"]]
    of_heads = heads.named("head", "place", names)
    found = list[dict[str, Any]]()
    for site, table in [*((site, shares.at(site=site)) for site in SITES), (HEAD, of_heads)]:
        both = [dataset(table.at(method=method).rows()) for method in METHODS]
        for measured, estimate in zip(*both, strict=True):
            name = f"block {measured['layer']}, {measured['place']}"
            found.append({"site": site, "place": name, "x": measured["value"], "y": estimate["value"]})
    return found


main = command(Patching)

if __name__ == "__main__":
    start(main)
