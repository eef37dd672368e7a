"""Take one head or one neuron away, and ask what the model loses: every head, and some neurons of every layer.

    python -m experiments.ablation --model weights/tiny
    python -m experiments.ablation --prompt "The king took off his crown, and" --answer " he" --foil " she"

A head is taken away in two ways: what it mixed (z, before the projection) becomes zero, or its mean. The mean is taken
over all positions of all texts of a reference, position 0 among them, and is the same at every position of every text.
For a prompt the reference is the prompt; over a corpus it is the corpus's first windows, run once before all others,
and measured like the others afterwards: of a small corpus they are a large part, and what was chosen suits them best.
Zero is a value that a head may never have, so zero ablation also measures how far from home the later blocks are taken;
the mean leaves them what they are used to.

Neurons are too many to try all, so the first order says which ones to try: the derivative of the reference's loss with
respect to a neuron's shift, times mean less activation (attribution patching). The neurons with the largest estimates
of every layer are then set to their mean, one at a time, and as many random others of the same layer are the control.

After lectures of Mike X Cohen's course on language model mechanisms that silence heads. The thresholds of the verdicts
were fixed before any model was asked.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from experiments.harness.command import command, start
from experiments.harness.experiment import (
    Answers,
    Checked,
    Experiment,
    Ids,
    Settings,
    Start,
    Study,
    answers_of,
    encode_prompt,
)
from experiments.harness.options import AnswerOptions
from experiments.harness.table import Row, Table, Tables, by_text
from experiments.harness.verdicts import MOST, Verdict, counted, describe_entry, judged, readable, within
from experiments.page.figures import Control, Figure, Figures, dataset, reach_of
from minigpt import GPT2, Comparison, attribution_patching, compare, parity, patch, record, scaled
from minigpt.parameters import Values
from minigpt.patching import patched

ZERO, MEAN = "zero", "mean"
ABLATIONS = (ZERO, MEAN)
CHOSEN, RANDOM = "chosen", "random"
LOSS, KL, LOGITS = "loss_change", "kl", "logit_difference_change"
SHORT = {LOSS: "loss change", KL: "kl", LOGITS: "logits"}
UNITS = {LOSS: "loss change, nats per token", KL: "kl, nats per token", LOGITS: "change of the logit difference"}
TESTS = ("mean is cheaper", "top tenth", "chosen over random", "correlation")
"""Of every text: the share of heads whose mean costs less kl than zero; the share of the kl, of all heads at their
mean, that the tenth of the heads with the most has; the logarithm of the ratio of mean |loss change|, chosen neurons
over random ones; Pearson's correlation of estimated and real loss change, over all those neurons."""
TENTH = 0.1
TWICE = math.log(2)
"""A ratio whose logarithm is above this is more than 2. A choice that is no better than chance has a ratio near 1,
above it as often as below; twice as much is more than that, and visible in a chart."""
FORETELLS = math.sqrt(MOST)
"""Above this correlation, the square of which is the share of the variance that it explains, the estimate explains most
of the real change."""
SEED = 0
"""Of the random neurons."""
ROUNDINGS = 1000
"""Relative to the stream's norm at a position: what rounding may make of a run that ends as another one does. Each of
some tens of sums rounds, and later blocks carry the sum on, larger at times; a wrong head or bias is much more."""
SHOWN = 12
"""Heads in the terminal's table and in the chart of bars."""


class Neuron(NamedTuple):
    """A neuron that is ablated, and why."""

    layer: int
    choice: str
    neuron: int


@dataclass(frozen=True, kw_only=True)
class AblationOptions(AnswerOptions):
    """Set every head to zero and to its mean, and some neurons of every layer to their mean, one at a time."""

    neurons: Annotated[int, typer.Option(help="neurons of every layer to choose, and as many random ones")] = 8
    reference: Annotated[int, typer.Option(help="over a corpus: windows whose mean takes the place")] = 16


@dataclass(frozen=True, kw_only=True)
class AblationSettings(Settings):
    """What is ablated, and what the means are of."""

    neurons: int = 8
    answer: str | None = None
    foil: str | None = None
    reference: int | None = None
    """Windows; None for a prompt, which is its own reference."""
    means: str = ""
    """The sha256 of the reference's means and of the neurons that were chosen."""


# The reference.


@dataclass(frozen=True)
class Reference:
    """What takes a head's or a neuron's place, and the neurons that are ablated."""

    heads: Tensor
    """Mean of what every head mixed, before the projection: [layer, head, head_width], float64."""
    units: Tensor
    """Mean of every neuron after the activation: [layer, neuron], float64."""
    neurons: tuple[Neuron, ...]
    """Layer by layer, the chosen ones first."""
    texts: int
    positions: int
    """How many the means are of."""

    @property
    def words(self) -> str:
        """What the means are of."""
        return f"means over {counted(self.positions, 'position')} of {counted(self.texts, 'text')}"

    @property
    def digest(self) -> str:
        """The sha256 of all that decides a run."""
        total = hashlib.sha256(repr(self.neurons).encode())
        for of in (self.heads, self.units):
            total.update(of.numpy().tobytes())
        return total.hexdigest()


def refer(model: GPT2, texts: Ids, neurons: int) -> Reference:
    """Take the means over all positions of some texts, and choose so many neurons of every layer.

    Raises ValueError for more neurons than a layer has room for.
    """
    width, layers = model.config.mlp_width, range(model.config.n_layer)
    if not 0 <= neurons <= width // 2:
        raise ValueError(
            f"--neurons is {neurons}; a layer has {width} neurons, and as many random ones are drawn beside the chosen "
            f"ones: expected 0 to {width // 2}."
        )
    sites, sums = [*map(head_site, layers), *map(neuron_site, layers)], dict[str, Tensor]()
    for text in texts:
        for site, of in record(model, [text], sites).items():
            sums[site] = sums.get(site, 0) + of[0].double().sum(0).cpu()
    positions = sum(map(len, texts))
    heads, units = (torch.stack([sums[of(layer)] for layer in layers]) / positions for of in (head_site, neuron_site))
    chosen = tuple(_choose(estimates(model, texts, units).mean(0), neurons)) if neurons else ()
    return Reference(heads, units, chosen, len(texts), positions)


def estimates(model: GPT2, texts: Ids, units: Tensor) -> Tensor:
    """Of every text and neuron the loss change, in nats per token, when it is set to its mean, to first order:
    [text, layer, neuron], float64."""
    sites = {neuron_site(layer): of.to(model.device, model.dtype) for layer, of in enumerate(units)}
    found = list[Tensor]()
    for text in texts:
        ids = torch.tensor([text], device=model.device)

        def loss(logits: Tensor, ids: Tensor = ids) -> Tensor:
            return F.cross_entropy(logits[0, :-1], ids[0, 1:])

        of_sites = attribution_patching(model, ids, sites, loss, by_coordinate=True).values()
        found.append(torch.stack([of[0].double().sum(0).cpu() for of in of_sites]))
    return torch.stack(found)


def _choose(estimated: Tensor, count: int) -> Iterator[Neuron]:
    """Of estimates [layer, neuron], the largest ones of every layer, of either sign, and as many random others."""
    generator = np.random.default_rng(SEED)
    for layer, of in enumerate(estimated):
        chosen = of.abs().topk(count).indices.tolist()
        others = np.setdiff1d(np.arange(len(of)), chosen)
        drawn = generator.choice(others, count, replace=False).tolist()
        yield from (Neuron(layer, CHOSEN, neuron) for neuron in chosen)
        yield from (Neuron(layer, RANDOM, neuron) for neuron in drawn)


# The interventions.


def head_site(layer: int) -> str:
    """What every head of a layer mixed."""
    return f"blocks.{layer}.attention.head"


def neuron_site(layer: int) -> str:
    """A layer's neurons, after the activation."""
    return f"blocks.{layer}.mlp.neuron"


def silent(layer: int, heads: Sequence[int], n_head: int) -> Values:
    """Some heads of a layer at zero."""
    return {f"{head_site(layer)}_scale": torch.ones(n_head).index_fill(0, torch.tensor(heads), 0.0)}


def head_at(layer: int, head: int, means: Tensor) -> Values:
    """One head of a layer at its mean, of the means [head, head_width], at every position."""
    return patch(head_site(layer), means[None, None], heads=[head])


def neuron_at(layer: int, neuron: int, means: Tensor) -> Values:
    """One neuron of a layer at its mean, of the means [neuron], at every position."""
    there, site = torch.arange(len(means)) == neuron, neuron_site(layer)
    return {f"{site}_scale": (~there).to(means), f"{site}_shift": means.where(there, -0.0)}


@dataclass(frozen=True)
class Ablated:
    """All runs of some texts beside their clean run."""

    result: Comparison
    """Layer by layer all heads at zero; then head by head zero; head by head the mean; and the neurons."""
    estimates: Tensor
    """Of the ablated neurons: [text, neuron]."""


class Ablation(Experiment[Ablated]):
    """Heads and neurons, taken away one at a time."""

    name = "ablation"
    question = "Which heads and neurons does the model need?"
    options = AblationOptions
    lectures: ClassVar[Mapping[str, Mapping[str, str | bool]]] = {
        name: {"model": "gpt2", "prompt": "The capital of France is", "answer": " Paris", "foil": " London"}
        for name in ("ablateHeadTokenPrediction", "CCtokenPredictionHeads")
    }
    settings: AblationSettings

    def __init__(self, settings: AblationSettings, reference: Reference, pair: Answers | None = None) -> None:
        super().__init__(settings)
        self.reference, self.pair = reference, pair

    @classmethod
    def from_options(cls, begin: Start[AblationOptions]) -> "Ablation":
        """The heads are all; the neurons are chosen here, by the reference."""
        asked, shared, config = begin.options, begin.settings(), begin.model.config
        begin.site("head"), begin.site("neuron")  # or the model's block has none, which is said
        pair, texts, windows = answers_of(begin), shared["texts"], None
        if texts:
            if asked.reference < 1:
                raise ValueError(f"--reference is {asked.reference}; expected 1 window or more to take the mean of.")
            windows = texts.first_windows(begin.tokenizer, asked.reference)
            # A window that is too long is refused, in its own words, by the run that is about to begin.
            referred = [window[: config.n_positions] for window in windows]
        else:
            referred = [encode_prompt(begin.tokenizer, shared["prompt"], config.n_positions)]
        reference = refer(begin.model, referred, asked.neurons)
        settings = AblationSettings(
            **shared,
            neurons=asked.neurons,
            answer=asked.answer,
            foil=asked.foil,
            reference=windows and len(windows),
            means=reference.digest,
        )
        return cls(settings, reference, pair)

    def edits(self, model: GPT2) -> list[Values]:
        """Every intervention, in the order of `Ablated.result`."""
        every, means = range(model.config.n_head), self.reference.heads
        pairs = [(layer, head) for layer in range(model.config.n_layer) for head in every]
        return [
            *(silent(layer, every, len(every)) for layer in range(model.config.n_layer)),
            *(silent(layer, [head], len(every)) for layer, head in pairs),
            *(head_at(layer, head, means[layer]) for layer, head in pairs),
            *(neuron_at(of.layer, of.neuron, self.reference.units[of.layer]) for of in self.reference.neurons),
        ]

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Ablated:  # noqa: ARG002
        """All interventions beside the clean run, and what the first order says of the neurons."""
        edits, most, neurons = self.edits(model), self.settings.max_bytes, self.reference.neurons
        result = compare(model, ids, edits, predictions=True, max_bytes=most, tokens=self.pair)
        if not neurons:
            return Ablated(result, torch.empty(len(ids), 0))
        estimated = estimates(model, ids, self.reference.units)
        layers, units = torch.tensor([(of.layer, of.neuron) for of in neurons]).T
        return Ablated(result, estimated[:, layers, units])

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured of every run."""
        return (LOSS, KL, LOGITS) if self.pair else (LOSS, KL)

    def measure(self, model: GPT2, raw: Ablated) -> Tables:
        """`heads` [text, metric, ablation, layer, head], `layers` [text, metric, layer] with all heads at zero,
        `neurons` [text, metric, neuron], their `estimates` [text, neuron], and `tests` [text, test]; with a pair also
        the clean `logit_difference` [text]."""
        result, layers, heads = raw.result, range(model.config.n_layer), range(model.config.n_head)
        changes = [result.measure("loss_change", "all")[:, -1], result.measure("kl", "all")[:, -1]]
        if self.pair:
            clean = result.clean_logits[:, 0] - result.clean_logits[:, 1]
            changes.append(result.logits[..., 0] - result.logits[..., 1] - clean)
        values = torch.stack(changes).movedim(-1, 0)  # [text, metric, run]
        count, neurons = len(layers) * len(heads), self.reference.neurons
        whole, of_heads, of_neurons = values.split([len(layers), 2 * count, len(neurons)], -1)
        single = of_heads.unflatten(-1, (2, len(layers), len(heads)))
        tables = {
            "heads": by_text(single, metric=self.metrics, ablation=ABLATIONS, layer=layers, head=heads),
            "layers": by_text(whole, metric=self.metrics, layer=layers),
            "tests": by_text(_tests(single[:, 1], of_neurons[:, 0], raw.estimates, neurons), test=_asked(neurons)),
        }
        if neurons:
            tables["neurons"] = by_text(of_neurons, metric=self.metrics, neuron=neurons)
            tables["estimates"] = by_text(raw.estimates, neuron=neurons)
        return tables if not self.pair else {**tables, "logit_difference": by_text(clean)}

    def check(self, model: GPT2, raw: Ablated) -> Checked:
        """Two facts about any weights: what all heads at zero leave, and what a value in its own place changes."""
        tolerance = ROUNDINGS * torch.finfo(model.dtype).eps
        tried = [
            ("with all heads of a layer at zero, attention writes its projection's bias alone", _apart(model, raw)),
            ("heads and neurons at their own values change nothing", _own_values(model, raw.result)),
        ]
        checks = [{"claim": claim, "passed": error <= tolerance, "figure": error} for claim, error in tried]
        if broken := [check for check in checks if not check["passed"]]:
            found = "; ".join(f"{check['claim']}, but the streams differ by {check['figure']:.2g}" for check in broken)
            raise parity.CheckError(f"{found} of their norm, more than {tolerance:.2g}, which rounding explains.")
        return Checked(None, checks)

    def rows(self, study: Study[Ablated]) -> Iterator[Row]:
        """Every head (all of a layer as head `all`), every neuron, real and estimated, and the tests."""
        tables, model = study.tables, self.settings.model
        yield from tables["heads"].rows(model=model)
        yield from tables["layers"].rows(model=model, ablation=ZERO, head="all")
        for name, metric in (("neurons", {}), ("estimates", {"metric": "estimated_loss_change"})):
            if name in tables:
                yield from tables[name].rows(model=model, ablation=MEAN, **metric)
        for test, table in ((test, tables["tests"].at(test=test)) for test in tables["tests"].axes["test"]):
            yield from table.rows(model=model, metric=test)

    def summary(self, study: Study[Ablated]) -> dict[str, Any]:  # noqa: ARG002
        """What the means are of."""
        reference = self.reference
        return {"reference": {"texts": reference.texts, "positions": reference.positions, "sha256": reference.digest}}

    def verdicts(self, study: Study[Ablated]) -> list[Verdict]:
        """The claims about heads, and where neurons were ablated those about neurons."""
        tests = study.tables["tests"]
        decided = [decide(tests.at(test=test)) for test, decide in DECIDE.items() if test in tests.axes["test"]]
        claims = zip(CLAIMS, decided, strict=False)
        return [Verdict.of(number, claim, of, study.basis) for number, (claim, of) in enumerate(claims, start=1)]

    def lines(self, study: Study[Ablated], columns: int) -> Iterator[str]:  # noqa: ARG002
        """The heads that matter most, and what the neurons come to."""
        reference, heads = self.reference, study.tables["heads"]
        yield reference.words
        if self.pair:
            clean = study.tables["logit_difference"]
            yield f"logit of {self.settings.answer!r} less that of {self.settings.foil!r}: {within(clean)}"
        shown = [(metric, of) for metric in self.metrics for of in ABLATIONS]
        yield f"{'head':>16}  " + "".join(f"{SHORT[metric]} {of}".rjust(18) for metric, of in shown)
        for layer, head in top_heads(heads):
            at = heads.at(layer=layer, head=head)
            numbers = (float(at.at(metric=metric, ablation=of).value) for metric, of in shown)
            named = describe_entry(layer, {"head": head})
            yield f"{named:>16}  " + "".join(f"{readable(number):>18}" for number in numbers)
        if "neurons" in study.tables:
            yield from _neurons_in_words(study.tables)
        yield ""

    def figures(self, study: Study[Ablated]) -> Figures:
        """The report's charts."""
        return _figures(study, self.metrics, self.reference)


# What is checked.


def _apart(model: GPT2, raw: Ablated) -> float:
    """How far the runs with a layer's heads at zero are from runs in which its attention writes its bias, relative to
    the clean stream's norm, at the place and position where it is most."""
    result, found = raw.result, 0.0
    ids, real = result.ids.to(model.device), torch.arange(result.ids.shape[1]) < result.lengths[:, None]
    clean = _streams(model, ids)
    for layer in range(model.config.n_layer):
        site = f"blocks.{layer}.attention"
        with scaled(model, {f"{site}_scale": 0.0, f"{site}_shift": _bias(model, layer)}):
            expected = (_streams(model, ids) - clean).norm(dim=-1)
        error = (result.statistics.difference_sq[layer].sqrt() - expected).abs() / clean.norm(dim=-1)
        found = max(found, float(error[:, real].max()))
    return found


@torch.no_grad()
def _streams(model: GPT2, ids: Tensor) -> Tensor:
    """Every depth and `final`: [place, batch, position, n_embd], float64, on the CPU."""
    depths = model.residuals(ids)
    return torch.cat([depths, model.final_norm(depths[-1:])]).double().cpu()


def _bias(model: GPT2, layer: int) -> float | Tensor:
    """What attention writes when nothing reaches its projection."""
    bias = model.blocks[layer].attention.projection.bias
    return 0.0 if bias is None else bias.detach()


def _own_values(model: GPT2, result: Comparison) -> float:
    """What it changes to put heads and neurons where they are, relative to the clean stream's norm, at the most."""
    layers, ids = range(model.config.n_layer), result.ids.to(model.device)
    edits = [patched(record(model, ids, map(site, layers))) for site in (head_site, neuron_site)]
    statistics = compare(model, ids, edits).statistics
    return float((statistics.difference_sq / statistics.clean_sq).max().sqrt())


# What is judged.


def _asked(neurons: Sequence[Neuron]) -> tuple[str, ...]:
    """The tests that a run has: those of neurons where there are some."""
    return TESTS if neurons else TESTS[:2]


def _tests(kl: Tensor, changes: Tensor, estimated: Tensor, neurons: Sequence[Neuron]) -> Tensor:
    """`TESTS` of every text, of the heads' kl [text, ablation, layer, head], of the neurons' loss changes and of the
    estimates of these, [text, neuron]: [text, test]."""
    zero, mean = kl.double().flatten(2).unbind(1)
    top = mean.topk(math.ceil(TENTH * mean.shape[1])).values.sum(1) / mean.sum(1)
    found = [(mean < zero).double().mean(1), top]
    if neurons:
        chosen = torch.tensor([of.choice == CHOSEN for of in neurons])
        sizes = [changes[:, which].abs().mean(1) for which in (chosen, ~chosen)]
        pairs = zip(estimated.double(), changes.double(), strict=True)
        found += [(sizes[0] / sizes[1]).log(), torch.stack([torch.corrcoef(torch.stack(of))[0, 1] for of in pairs])]
    return torch.stack(found, 1)


CLAIMS = (
    "A head's mean in its place costs less than zero, for most heads",
    "A tenth of the heads has half of the cost",
    "The chosen neurons matter more than twice as much as random ones",
    "The estimate foretells most of what ablation does",
)


def _cheaper(share: Table) -> Any:
    return judged(
        share, MOST,
        "What later blocks are used to costs less than nothing at all.",
        "Zero costs no more than the mean for most heads.",
        f"Of the heads, a share of {within(share)} has less kl at its mean than at zero. Above {MOST} counts as most.",
        share_of_heads=share,
    )  # fmt: skip


def _concentrated(share: Table) -> Any:
    return judged(
        share, MOST,
        "A few heads carry most of what single heads carry.",
        "What single heads carry is spread over more than a tenth of them.",
        f"In a text, the tenth of the heads with the most kl at their mean has a share of {within(share)} of the kl of "
        f"all heads. The claim asks for {MOST}.",
        share_of_kl=share,
    )  # fmt: skip


def _better_than_chance(log_ratio: Table) -> Any:
    ratio = log_ratio.map(torch.exp)
    return judged(
        log_ratio, TWICE,
        "The first order finds neurons that matter.",
        "The first order finds no neurons that matter so much more than others.",
        f"The mean size of the loss change is {within(ratio)} times as large for the chosen neurons as for the random "
        "ones. The claim asks for more than 2.",
        ratio=ratio,
    )  # fmt: skip


def _foretold(correlation: Table) -> Any:
    return judged(
        correlation, FORETELLS,
        "A derivative says most of what ablating a neuron does.",
        "A derivative does not say most of what ablating a neuron does.",
        f"Within a text, estimated and real loss change have a correlation of {within(correlation)}. Above "
        f"{FORETELLS:.3g} the estimate explains more than half of the variance.",
        correlation=correlation,
    )  # fmt: skip


DECIDE = dict(zip(TESTS, (_cheaper, _concentrated, _better_than_chance, _foretold), strict=True))
"""The decision about every test."""


# What is shown.


def top_heads(heads: Table) -> list[tuple[int, int]]:
    """Layer and head of those with the most kl at their mean, the first the most."""
    kl = heads.at(metric=KL, ablation=MEAN).value
    order = kl.flatten().argsort(descending=True, stable=True)[:SHOWN].tolist()
    return [divmod(index, kl.shape[1]) for index in order]


def _neurons_in_words(tables: Tables) -> Iterator[str]:
    yield "neurons at their mean, loss change in nats per token:"
    yield f"{'':>16}  {'neurons':>10}{'mean size':>14}{'estimated':>14}  largest"
    for choice in (CHOSEN, RANDOM):
        labels = [of for of in tables["neurons"].axes["neuron"] if of.choice == choice]
        real = tables["neurons"].at(metric=LOSS, neuron=labels)
        estimated = tables["estimates"].at(neuron=labels)
        sizes = "".join(f"{float(of.value.abs().mean()):>14.3g}" for of in (real, estimated))
        most = labels[int(real.value.abs().argmax())]
        named = f"{describe_entry(most.layer, {'neuron': most.neuron})}: {within(real.at(neuron=most))}"
        yield f"{choice:>16}  {len(labels):>10}{sizes}  {named}"
    yield f"correlation of estimated and real loss change: {within(tables['tests'].at(test=TESTS[3]))}"


def _figures(study: Study[Ablated], metrics: Sequence[str], reference: Reference) -> Figures:
    heads = study.tables["heads"]
    blocks = [f"block {layer}" for layer in heads.axes["layer"]]
    columns = [str(head) for head in heads.axes["head"]]
    maps = {metric: _map_rows(heads.at(metric=metric), blocks) for metric in metrics}
    shown = [_map(metric, maps[metric], blocks, columns) for metric in metrics]
    data, places = {**maps, "top": _top_rows(heads)}, dict.fromkeys(metrics, columns)
    shown.append(_top(data["top"], study.windows is not None))
    if "neurons" in study.tables:
        data["neurons"] = _neuron_rows(study.tables)
        shown.append(_points(data["neurons"], study.windows is not None))
    control = Control("ablation", f"set to ({reference.words})", [(of, of) for of in ABLATIONS], MEAN)
    return Figures(shown, data, places, [control])


def _map_rows(table: Table, blocks: Sequence[str]) -> list[dict[str, Any]]:
    """Rows by ablation and block, arrays over heads."""
    return dataset(table.named("layer", "block", blocks).rows(), "head", table.axes["head"])


def _map(metric: str, rows: list[dict[str, Any]], blocks: Sequence[str], heads: Sequence[str]) -> Figure:
    from experiments.page import charts  # noqa: PLC0415  an extra

    reach = None if metric == KL else reach_of(rows)
    row, chosen = charts.rows_axis("block", "block", blocks), {"ablation": MEAN}
    filters, count = ["datum.ablation == ablation"], len(blocks)
    spec = charts.heat_map(metric, filters, heads, row, UNITS[metric], chosen, count, reach=reach, x_title="head")
    title, note = {
        LOSS: ("What a head does for the loss", "Orange: without the head the text is less likely."),
        KL: ("How far the prediction moves without a head", "In whatever direction; mean over all positions."),
        LOGITS: (
            "What a head does for the answer",
            "After the prompt's last token: logit of the answer less that of the foil. Blue: the head speaks for the "
            "answer, for without it the difference is smaller.",
        ),
    }[metric]
    alt = f"A heat map: a row for each block, a column for each head, {UNITS[metric]} when it is ablated."
    return Figure(metric, title, alt, note, spec)


def _top_rows(heads: Table) -> list[dict[str, Any]]:
    """Of the heads that matter most: `place` and `part`, with intervals."""
    found, kl = list[dict[str, Any]](), heads.at(metric=KL)
    for layer, head in top_heads(heads):
        of = kl.at(layer=layer, head=head)
        found += dataset(of.named("ablation", "part", ABLATIONS).rows(), place=describe_entry(layer, {"head": head}))
    return found


def _top(rows: list[dict[str, Any]], intervals: bool) -> Figure:
    from experiments.page import charts  # noqa: PLC0415  an extra

    names = list(dict.fromkeys(row["place"] for row in rows))
    spec = charts.bars_by_layer("top", [], names, "head", UNITS[KL], {}, intervals, ABLATIONS)
    alt = "Bars for the heads that matter most: the kl with the head at zero and at its mean."
    note = "In the order of the kl at the mean."
    return Figure("top", "The heads that matter most", alt, note, spec)


def _neuron_rows(tables: Tables) -> list[dict[str, Any]]:
    """A row for each neuron: which one it is, `estimate`, and the real loss change as `value`."""
    estimated = dataset(tables["estimates"].rows())
    real = dataset(tables["neurons"].at(metric=LOSS).rows())
    return [{**of, "part": of["choice"], "estimate": other["value"]} for of, other in zip(real, estimated, strict=True)]


def _points(rows: list[dict[str, Any]], intervals: bool) -> Figure:
    from experiments.page import charts  # noqa: PLC0415  an extra

    names = ("value", "estimate", *(("low", "high") if intervals else ()))
    reach = 1.05 * max(abs(row[name]) for row in rows for name in names) or 1.0
    titles = ("estimated loss change, nats per token", "real loss change, nats per token")
    spec = charts.estimates("neurons", *titles, (CHOSEN, RANDOM), reach, ("layer", "neuron"), intervals)
    alt = "A point for each neuron: the loss change that the first order foretells, and the one that ablation makes."
    note = "On the dashed line the estimate is right. Random neurons of the same layers are the control."
    return Figure("neurons", "Neurons: estimate against ablation", alt, note, spec)


main = command(Ablation)

if __name__ == "__main__":
    start(main)
