"""Read every depth as if it were the last: when does the model know the next token, and who wrote it?

    python -m experiments.lens --model weights/tiny
    python -m experiments.lens --prompt "The king took off his crown, and" --answer " he" --foil " she"

The logit lens puts the stream of every depth through the final norm and the unembedding (nostalgebraist 2020). What it
shows is what the stream would say if no block came after; a model need not keep its thoughts in that form. Of every
depth: how far its prediction is from the model's own, what it gives to the token that comes, and how many positions
have their final token already.

Direct logit attribution takes the last position's logit difference apart: the likeliest token's logit less that of the
runner-up, or of any two tokens, is the sum of what the embedding, every head, every MLP and the biases wrote (Elhage et
al. 2021). The final norm counts as the linear map that it is at that position. What a writer makes others write is
theirs, not its own: ablation asks for that.

The thresholds of the verdicts were fixed before any model was asked.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from experiments.harness.command import command, start
from experiments.harness.experiment import Answers, Checked, Experiment, Ids, Settings, Start, Study, answers_of
from experiments.harness.options import AnswerOptions
from experiments.harness.table import Row, Table, Tables, by_text
from experiments.harness.verdicts import (
    MOST,
    UNCHANGED,
    Decision,
    Verdict,
    above,
    all_of,
    below,
    figures_of,
    judged,
    readable,
    within,
)
from experiments.page.figures import VISIBLE, Figure, Figures, dataset, place_names, reach_of, rounded, token_labels
from minigpt import GPT2, direct_attribution, logit_lens, parity
from minigpt.engine import predict_logits
from minigpt.predictions import Predictions

METRICS = ("kl", "entropy", "loss", "probability", "rank", "agreement", "settled")
"""Of every depth: means over positions of KL(final prediction, this depth's), of its entropy, of the next token's loss,
all in nats, and of its probability; the median of its rank, 1 being the likeliest; the share of positions whose
likeliest token is the final one; and the share where it is so from this depth on."""
PRINTED = ("kl", "entropy", "rank", "probability", "agreement", "settled")
PER_TOKEN = ("rank", "probability", "top_probability")
"""Of every depth and position of a prompt: of the token that comes, and of the likeliest one."""
EMBEDDING, HEAD, ATTENTION, MLP = "embedding", "head", "attention", "mlp"
ATTENTION_BIAS, NORM_BIAS = "attention bias", "final norm's bias"
SUM_ROUNDINGS = 100
"""Relative to the sum of all sizes: contributions are products of some hundred numbers, and each product rounds."""
LAST_IS_OWN = "the last depth's logits are the model's own, bit for bit"
SAME_LENS = "the loss at every depth is that of the lens's logits"
ADDS_UP = "what all writers add to the logit difference adds up to it"
SHOWN = 10
"""Writers in the terminal and in the chart of bars."""


class Writer(NamedTuple):
    """What writes into the stream."""

    writer: str
    layer: int | str = ""
    head: int | str = ""

    @property
    def words(self) -> str:
        """For a reader: `block 3, head 1`."""
        if self.writer == HEAD:
            return f"block {self.layer}, head {self.head}"
        return f"block {self.layer}, {self.writer}" if self.layer != "" else self.writer


@dataclass(frozen=True, kw_only=True)
class LensOptions(AnswerOptions):
    """Read every depth through the final norm and the unembedding, and take the last logit difference apart."""

    no_attribution: Annotated[
        bool,
        typer.Option("--no-attribution", help="leave out who wrote the logits, as for blocks that cannot be split"),
    ] = False


@dataclass(frozen=True, kw_only=True)
class LensSettings(Settings):
    """Whose logits are taken apart."""

    answer: str | None = None
    foil: str | None = None
    attribution: bool = True


@dataclass(frozen=True)
class Read:
    """What is read of one text."""

    ids: Tensor
    """[1, position]."""
    depths: Predictions
    """Of every depth, beside the model's own: [depth, 1, position]."""
    top_probability: Tensor
    """Of the likeliest token at every depth: [depth, position]."""
    pair: Answers
    """The tokens whose logits after the text are subtracted."""
    logit_difference: float
    contributions: Mapping[Writer, float]
    """What each writer adds to it; none where that was not asked for."""


class Lens(Experiment[list[Read]]):
    """The logit lens, and who wrote the prediction."""

    name = "lens"
    question = "When does the model know the next token?"
    options = LensOptions
    settings: LensSettings

    def __init__(self, settings: LensSettings, pair: Answers | None = None) -> None:
        super().__init__(settings)
        self.pair = pair

    @classmethod
    def from_options(cls, begin: Start[LensOptions]) -> "Lens":
        """The tokens that were asked for, or else the likeliest two of every text."""
        asked, shared = begin.options, begin.settings()
        pair, attribution = answers_of(begin), not asked.no_attribution
        return cls(LensSettings(**shared, answer=asked.answer, foil=asked.foil, attribution=attribution), pair)

    def run(self, model: GPT2, ids: Ids, alone: bool) -> list[Read]:  # noqa: ARG002
        """Every text by itself."""
        return [self._read(model, torch.tensor([text], device=model.device)) for text in ids]

    @torch.no_grad()
    def _read(self, model: GPT2, ids: Tensor) -> Read:
        streams = model.residuals(ids)
        beside = torch.cat([streams[-1:], streams])  # row 0 is what the others are compared with
        predictions = predict_logits(model, beside, ids, torch.tensor([ids.shape[1]])).map(lambda of: of[1:])
        largest = [logits[0].double().softmax(-1).amax(-1).cpu() for logits in logit_lens(model, ids)]
        logits = model(ids)[0, -1].double()
        pair = self.pair or Answers(*logits.topk(2).indices.tolist())
        difference = float(logits[pair.answer] - logits[pair.foil])
        found = contributions(model, ids, pair) if self.settings.attribution else {}
        return Read(ids, predictions, torch.stack(largest), pair, difference, found)

    def measure(self, model: GPT2, raw: list[Read]) -> Tables:
        """`values` [text, metric, depth], `fall` [text, depth] of the kl in every block; where it was asked for,
        `attribution` [text, writer], `parts` [text, writer], sums over all of a kind, and `difference` [text, of];
        and of a prompt `tokens` [text, metric, position, depth]."""
        depths, last = range(model.config.n_layer + 1), model.config.n_layer
        values = torch.stack([_values(read.depths) for read in raw])
        kl = values[:, METRICS.index("kl")]
        tables = {
            "values": by_text(values, metric=METRICS, depth=depths),
            "fall": by_text(kl[:, :-1] - kl[:, 1:], depth=range(1, last + 1)),
        }
        if self.settings.attribution:
            tables |= _attributed(raw)
        if self.settings.texts is None:
            (read,) = raw
            tokens = torch.stack(
                [read.depths.rank[:, 0].double(), (-read.depths.loss[:, 0]).exp(), read.top_probability]
            )
            tokens[:2, :, -1] = torch.nan  # nothing comes after the last one
            positions = range(tokens.shape[2])
            tables["tokens"] = by_text(tokens.mT[None], metric=PER_TOKEN, position=positions, depth=depths)
        return tables

    def check(self, model: GPT2, raw: list[Read]) -> Checked:
        """The last depth is the model's own prediction, the depths are the lens's, and contributions add up."""
        rounding = SUM_ROUNDINGS * torch.finfo(model.dtype).eps
        tried = [
            (LAST_IS_OWN, max(_unlike(model, read) for read in raw), 0.0),
            (SAME_LENS, max(_other_loss(model, read) for read in raw), rounding),
        ]
        if self.settings.attribution:
            tried.append((ADDS_UP, max(map(_missing, raw)), rounding))
        checks = [{"claim": claim, "passed": error <= most, "figure": error} for claim, error, most in tried]
        if broken := [check for check in checks if not check["passed"]]:
            found = "; ".join(f"{check['claim']}, but the two differ by {check['figure']:.2g}" for check in broken)
            raise parity.CheckError(f"the lens contradicts what must be true of any weights: {found}.")
        return Checked(None, checks)

    def rows(self, study: Study[list[Read]]) -> Iterator[Row]:
        """Every measure of every depth; every contribution; of a prompt every position, with the likeliest token."""
        model, tables = self.settings.model, study.tables
        yield from tables["values"].rows(model=model)
        if "attribution" in tables:
            yield from tables["attribution"].rows(model=model, metric="contribution")
            for of in tables["difference"].axes["of"]:
                yield from tables["difference"].at(of=of).rows(model=model, metric=of)
        if "tokens" in tables:
            likeliest = _likeliest(study)
            for row in tables["tokens"].rows(model=model):
                yield {**row, "top": likeliest[row["depth"]][row["position"]]}

    def verdicts(self, study: Study[list[Read]]) -> list[Verdict]:
        """The claims, the last of which needs the attribution."""
        tables, depth = study.tables, settled_by(study.n_layer)
        decided = [
            ("The kl to the final prediction falls in every block", _falls(tables["fall"])),
            (
                "Half of the positions have their final token by two thirds of the depth",
                _settled(tables["values"].at(metric="settled", depth=depth), depth),
            ),
        ]
        if "parts" in tables:
            decided.append(("MLPs write more of the answer than attention", _mlp_or_attention(tables["parts"])))
        return [Verdict.of(number, claim, of, study.basis) for number, (claim, of) in enumerate(decided, start=1)]

    def summary(self, study: Study[list[Read]]) -> dict[str, Any]:
        """Of a prompt, the two tokens whose logits are taken apart."""
        return {} if study.counts else {"pair": study.tokenizer.tokens(list(study.raw[0].pair))}

    def lines(self, study: Study[list[Read]], columns: int) -> Iterator[str]:  # noqa: ARG002
        """The measures by depth, and who wrote the difference."""
        values, names = study.tables["values"], place_names(study.n_layer)[:-1]
        likeliest = _likeliest(study) if "tokens" in study.tables else []
        yield (
            f"{'':>10}  " + "".join(f"{name:>14}" for name in PRINTED) + ("  likeliest at the end" if likeliest else "")
        )
        for depth, name in enumerate(names):
            numbers = (float(values.at(metric=metric, depth=depth).value) for metric in PRINTED)
            end = f"  {likeliest[depth][-1]!r}" if likeliest else ""
            yield f"{name:>10}  " + "".join(f"{readable(number):>14}" for number in numbers) + end
        if "attribution" in study.tables:
            yield from _written(study)
        yield ""

    def figures(self, study: Study[list[Read]]) -> Figures:
        """The report's charts."""
        return _figures(study)


# What is measured.


@torch.no_grad()
def contributions(model: GPT2, ids: Tensor, pair: Answers) -> dict[Writer, float]:
    """What everything that writes into the stream adds to the logit difference after one text [1, position]."""
    answer, foil = (torch.tensor([[token]], device=model.device) for token in pair)
    found = dict[Writer, float]()
    for name, of in direct_attribution(model, ids, answer, foil).items():
        at_the_end = of[0, -1].double().cpu()
        if name.endswith(".head"):
            found |= {Writer(HEAD, _layer(name), head): float(part) for head, part in enumerate(at_the_end)}
        else:
            found[_writer(name)] = float(at_the_end)
    return found


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _writer(name: str) -> Writer:
    """Of a name that `direct_attribution` gives, but the heads'."""
    if not name.startswith("blocks."):
        return Writer(EMBEDDING if name == "embedding" else NORM_BIAS)
    return Writer(ATTENTION_BIAS if name.endswith(".bias") else name.split(".")[2], _layer(name))


def _values(of: Predictions) -> Tensor:
    """`METRICS` of one text: [metric, depth]."""
    kl, entropy, loss, rank, likeliest = (part[:, 0] for part in (of.kl, of.entropy, of.loss, of.rank, of.likeliest))
    agreement = likeliest == likeliest[-1]
    settled = agreement.flip(0).cumprod(0).flip(0)
    loss, rank = loss[:, :-1], rank[:, :-1].double()  # nothing comes after the last token
    found = {
        "kl": kl.mean(-1), "entropy": entropy.mean(-1), "loss": loss.mean(-1), "probability": (-loss).exp().mean(-1),
        "rank": rank.quantile(0.5, -1), "agreement": agreement.double().mean(-1), "settled": settled.double().mean(-1),
    }  # fmt: skip
    return torch.stack([found[metric] for metric in METRICS])


PARTS = (EMBEDDING, ATTENTION, MLP, NORM_BIAS)
PART_OF = {HEAD: ATTENTION, ATTENTION_BIAS: ATTENTION}


def _attributed(raw: Sequence[Read]) -> Tables:
    """`attribution`, `parts` and `difference`."""
    writers = list(raw[0].contributions)
    found = torch.tensor([[read.contributions[writer] for writer in writers] for read in raw], dtype=torch.float64)
    kinds = [PART_OF.get(writer.writer, writer.writer) for writer in writers]
    parts = [found[:, torch.tensor([kind == part for kind in kinds])].sum(1) for part in PARTS]
    logits = torch.tensor([read.logit_difference for read in raw], dtype=torch.float64)
    return {
        "attribution": by_text(found, writer=writers),
        "parts": by_text(torch.stack([*parts, parts[2] - parts[1]], 1), writer=(*PARTS, "mlp less attention")),
        "difference": by_text(torch.stack([logits, found.sum(1)], 1), of=("logit_difference", "sum_of_contributions")),
    }


# What is checked.


@torch.no_grad()
def _unlike(model: GPT2, read: Read) -> float:
    """The largest difference between the lens's last logits and the model's."""
    for last in logit_lens(model, read.ids):  # noqa: B007  only the last ones count
        pass
    return float((last - model(read.ids)).abs().max())


@torch.no_grad()
def _other_loss(model: GPT2, read: Read) -> float:
    """The largest difference between the losses that were measured and those of the lens's logits, beside the logits'
    size."""
    found, following = 0.0, read.ids[0, 1:, None]
    for depth, logits in enumerate(logit_lens(model, read.ids)):
        rows = logits[0, :-1].double()
        loss = (rows.logsumexp(-1) - rows.gather(-1, following)[:, 0]).cpu()
        apart = (loss - read.depths.loss[depth, 0, :-1]).abs().max()
        found = max(found, float(apart) / max(1.0, float(rows.abs().max())))
    return found


def _missing(read: Read) -> float:
    """How far the contributions' sum is from the logit difference, beside the sum of their sizes."""
    parts = read.contributions.values()
    return abs(sum(parts) - read.logit_difference) / (sum(map(abs, parts)) or 1.0)


# What is judged.


def settled_by(n_layer: int) -> int:
    """The depth of the second claim: two thirds, rounded down."""
    return 2 * n_layer // 3


def _falls(fall: Table) -> Decision:
    outcome = all_of(above(fall, UNCHANGED), below(fall, UNCHANGED))
    rises = [f"block {depth - 1}" for depth in fall.axes["depth"] if float(fall.at(depth=depth).value) <= UNCHANGED]
    sentence = {
        "holds": "Every block brings what the stream would say nearer to the final prediction.",
        "does not hold": "Some blocks take what the stream would say farther from the final prediction.",
        "undecided": "Some intervals include 0, so it is undecided whether the kl falls in every block.",
    }[outcome]
    which = ", ".join(rises) or "none"
    return Decision(outcome, sentence, f"Blocks in which the kl does not fall: {which}.", figures_of(fall=fall), "all")


def _settled(share: Table, depth: int) -> Decision:
    return judged(
        share, MOST,
        "Most positions have made up their mind before the last third of the blocks.",
        "Most positions make up their mind in the last third of the blocks.",
        f"At depth {depth}, the output of block {depth - 1}, a share of {within(share)} of the positions has its final "
        f"token, and keeps it. The claim asks for more than {MOST}.",
        settled=share,
    )  # fmt: skip


def _mlp_or_attention(parts: Table) -> Decision:
    mlp, attention, more = (parts.at(writer=name) for name in (MLP, ATTENTION, "mlp less attention"))
    return judged(
        more, UNCHANGED,
        "MLPs write more of the difference than attention does.",
        "Attention writes at least as much of the difference as MLPs do.",
        f"All MLPs add {within(mlp)} to the logit difference, all attention {within(attention)}; that is "
        f"{within(more)} more.",
        mlp=mlp, attention=attention, mlp_less_attention=more,
    )  # fmt: skip


# What is shown.


def _likeliest(study: Study[list[Read]]) -> list[list[str]]:
    """Of a prompt, the likeliest token of every depth after every position."""
    return [study.tokenizer.tokens(of.tolist()) for of in study.raw[0].depths.likeliest[:, 0]]


def _of_what(study: Study[list[Read]]) -> str:
    """The logit difference in words."""
    if study.counts:
        return "logit of every window's likeliest next token less that of its runner-up"
    answer, foil = study.tokenizer.tokens(list(study.raw[0].pair))
    return f"logit of {answer!r} less that of {foil!r}, after the prompt"


def largest(attribution: Table) -> list[Writer]:
    """The writers that add most, of either sign, the first the most."""
    order = attribution.value.abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
    return [attribution.axes["writer"][index] for index in order]


def _written(study: Study[list[Read]]) -> Iterator[str]:
    tables = study.tables
    logits, total = (tables["difference"].at(of=of) for of in tables["difference"].axes["of"])
    yield f"{_of_what(study)}: {within(logits)}; all contributions together: {within(total)}"
    parts = (f"{part} {within(tables['parts'].at(writer=part))}" for part in PARTS)
    yield f"of that: {'; '.join(parts)}"
    for writer in largest(tables["attribution"]):
        yield f"{writer.words:>24}  {within(tables['attribution'].at(writer=writer))}"


BY_DEPTH = {
    "kl": (("kl", "entropy"), "nats per token", "How far from the final prediction",
           "The kl to the model's own prediction, and the entropy of what the depth itself would say."),
    "probability": (("probability",), "probability", "What the token that comes is given",
                    "Mean over positions."),
    "rank": (("rank",), "rank", "The rank of the token that comes",
             "Median over positions; 1 is the likeliest."),
    "agreement": (("agreement", "settled"), "share of positions", "When the final token is there",
                  "Agreement: the likeliest token is the final one. Settled: and stays so at all later depths."),
}  # fmt: skip
"""Charts by depth: their metrics, unit, title and note."""


def _figures(study: Study[list[Read]]) -> Figures:
    shown, data, places = list[Figure](), dict[str, Any](), dict[str, Sequence[str]]()
    if "tokens" in study.tables:
        data["tokens"] = _token_rows(study)
        places["tokens"] = token_labels(study.tokens)
        shown.append(_token_map(study, places["tokens"]))
    for name in BY_DEPTH:
        figure, data[name] = _by_depth(study, name)
        shown.append(figure)
    if "attribution" in study.tables:
        figure, data["attribution"] = _bars(study)
        shown.append(figure)
        map_figure, data["heads"], places["heads"] = _heads(study)
        shown += [map_figure] if data["heads"] else []
    return Figures(shown, data, {name: of for name, of in places.items() if data[name]})


def _token_rows(study: Study[list[Read]]) -> list[dict[str, Any]]:
    """A row for each depth: the likeliest token's probability after every position, and the token."""
    names, likeliest = place_names(study.n_layer)[:-1], _likeliest(study)
    table = study.tables["tokens"].at(metric="top_probability")
    return [
        {
            "depth": name,
            "value": [rounded(of) for of in table.at(depth=depth).value.tolist()],
            "token": [token.translate(VISIBLE) for token in likeliest[depth]],
        }
        for depth, name in enumerate(names)
    ]


def _token_map(study: Study[list[Read]], labels: Sequence[str]) -> Figure:
    from experiments.page import charts  # noqa: PLC0415  an extra

    names = place_names(study.n_layer)[:-1]
    row, unit = charts.rows_axis("depth", "depth", names[::-1]), "probability of the likeliest token"
    spec = charts.heat_map("tokens", [], labels, row, unit, {}, len(names), x_title="position and token", words="token")
    alt = (
        "A heat map: a row for each depth, the last on top, a column for each position; cells say the likeliest token."
    )
    note = (
        "From the bottom up: what each depth would say next after the token below. The top row is the model's answer."
    )
    return Figure("tokens", "What every depth would say next", alt, note, spec)


def _by_depth(study: Study[list[Read]], name: str) -> tuple[Figure, list[dict[str, Any]]]:
    from experiments.page import charts  # noqa: PLC0415  an extra

    metrics, unit, title, note = BY_DEPTH[name]
    places, table = place_names(study.n_layer)[:-1], study.tables["values"].at(metric=list(metrics))
    parts = metrics if len(metrics) > 1 else ()
    spec = charts.bars_by_layer(name, [], places, "depth", unit, {}, study.windows is not None, parts)
    rows = dataset(table.named("metric", "part", metrics).named("depth", "place", places).rows())
    return Figure(name, title, f"Bars by depth: {' and '.join(metrics)}.", note, spec), rows


def _bars(study: Study[list[Read]]) -> tuple[Figure, list[dict[str, Any]]]:
    """The parts, and the writers that add most."""
    from experiments.page import charts  # noqa: PLC0415  an extra

    attribution = study.tables["attribution"]
    chosen = largest(attribution)
    names = [writer.words for writer in chosen]
    spec = charts.bars_by_layer("attribution", [], names, "writer", "logits", {}, study.windows is not None)
    total, logits = (study.tables["difference"].at(of=of) for of in ("sum_of_contributions", "logit_difference"))
    note = f"All writers together add {within(total)}; the {_of_what(study)}, is {within(logits)}."
    alt = "Bars for the writers that add most to the logit difference."
    rows = dataset(attribution.at(writer=chosen).named("writer", "place", names).rows())
    return Figure("attribution", "Who wrote the prediction", alt, note, spec), rows


def _heads(study: Study[list[Read]]) -> tuple[Figure, list[dict[str, Any]], list[str]]:
    """The heads' contributions, a row for each block that has them, and its MLP's beside them."""
    from experiments.page import charts  # noqa: PLC0415  an extra

    table = study.tables["attribution"]
    kinds = [writer for writer in table.axes["writer"] if writer.writer in (HEAD, MLP)]
    columns = list(dict.fromkeys(_column(writer) for writer in sorted(kinds, key=lambda of: of.writer == MLP)))
    found = {(writer.layer, _column(writer)): rounded(float(table.at(writer=writer).value)) for writer in kinds}
    layers = range(study.n_layer)
    rows = [
        {"block": f"block {layer}", "value": [found.get((layer, column)) for column in columns]} for layer in layers
    ]
    row = charts.rows_axis("block", "block", [of["block"] for of in rows])
    unit, reach = "contribution, logits", reach_of(rows)
    spec = charts.heat_map("heads", [], columns, row, unit, {}, len(rows), reach=reach, x_title="writer")
    alt = (
        "A heat map: a row for each block, a column for each head and one for the MLP: what it adds to the difference."
    )
    note = "Orange: it speaks for the answer; blue: for the other token."
    return Figure("heads", "Every head and every MLP", alt, note, spec), rows, columns


def _column(writer: Writer) -> str:
    return MLP if writer.writer == MLP else f"head {writer.head}"


main = command(Lens)

if __name__ == "__main__":
    start(main)
