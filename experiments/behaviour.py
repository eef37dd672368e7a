"""What a checkpoint has learnt of the things that people study in GPT-2: the same questions for every model.

    python -m experiments.behaviour --model weights/tiny --texts held_out.jsonl --window 256

Of every text: how much attention each head leaves on position 0, how long the stream is there beside the other
positions, and the loss by position; with the text as it is, and with <|endoftext|> in front. Of the model itself, on
items that are the same every time: does it copy from a sequence that it has seen (induction), does a pronoun or a verb
agree with its subject, does it close a quotation that is open? The thresholds of the verdicts were fixed before any
model was asked.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.harness.command import command, start
from experiments.harness.corpus import summarise
from experiments.harness.experiment import Experiment, Ids, Settings, Start, Study
from experiments.harness.options import Options
from experiments.harness.table import Row, Table, Tables, by_text
from experiments.harness.verdicts import Decision, Verdict, above, all_of, below, within
from experiments.page.figures import Control, Figure, Figures, dataset, place_names
from minigpt import GPT2, Tokenizer

PASSAGE = (
    "The carriage stopped before a tall house at the end of the street, and an old servant came out with a lamp. He "
    'looked at us for a moment without a word. "You are late," he said at last; "my master has gone to bed." We told '
    "him that the horses had been tired, that the rain had not ceased since the morning, and that we had lost the road "
    "twice. He shook his head, but he let us in, and led us up the stairs to a large cold room, where a fire had been "
    "made and a table laid for two."
)
"""The default text, written for this."""
AS_IT_IS, AFTER_END = "the text alone", "<|endoftext|> in front"
FIRST_BUCKETS = (
    (1, 1),
    (2, 2),
    (3, 4),
    (5, 8),
    (9, 16),
    (17, 32),
    (33, 64),
    (65, 128),
    (129, 256),
    (257, 512),
    (513, 1023),
)
"""Positions whose losses are averaged, the first and the last of each."""
RESTS = 0.3
"""A head whose mean share of attention on position 0 is above this rests there: the threshold of Gu et al. 2024, "When
Attention Sink Emerges in Language Models", section 3."""
RESTING_HEADS, MASSIVE, GAIN, RIGHT = 0.2, 10.0, 1.5, 0.9
"""What the claims ask for: a share of heads, a ratio of norms, nats per token, a share of items."""
SEQUENCES, MOST_COPIED, SEED = 64, 64, 0
"""Random sequences that are shown twice, and their tokens."""


# The items.


class Item(NamedTuple):
    """A text and two ways to go on, of which one agrees with it."""

    kind: str
    text: str
    agrees: str
    foil: str


SUBJECTS = (
    ("The old gentleman", "The old lady"),
    ("The man", "The woman"),
    ("The boy", "The girl"),
    ("My father", "My mother"),
    ("My uncle", "My aunt"),
    ("Her brother", "His sister"),
    ("Her husband", "His wife"),
    ("The king", "The queen"),
    ("The prince", "The princess"),
    ("The count", "The countess"),
    ("John", "Mary"),
    ("Richard", "Emma"),
    ("Nicholas", "Elizabeth"),
    ("Charles", "Jane"),
)
PRONOUN_TEXTS = (
    "{} opened the door, and",
    "{} said that",
    "{} was very tired, for",
    "{} looked at the letter, and then",
    "{} sat down by the fire, because",
    "{} could not sleep that night, and in the morning",
    "{} knew very well what",
    "{} left the room as soon as",
    "{} promised to come again when",
)
REFLEXIVE_TEXTS = ("{} was talking to", "{} sat down and said to")
NOUNS = (
    ("man", "men"),
    ("woman", "women"),
    ("boy", "boys"),
    ("girl", "girls"),
    ("child", "children"),
    ("horse", "horses"),
    ("house", "houses"),
    ("door", "doors"),
    ("letter", "letters"),
    ("friend", "friends"),
    ("servant", "servants"),
    ("window", "windows"),
)
VERB_TEXTS = (
    "The {}",
    "The {} in the room",
    "The {} of the old gentleman",
    "The {} of the two sisters",
    "The {} that I had seen before",
    "I saw that the {}",
)
QUOTED = (
    "I am very glad to see you",
    "You must not go out in the rain",
    "There is nothing to be done",
    "I do not know what you mean",
    "We shall be there before night",
    "It is a very long way",
    "You have been very kind to me",
    "He has not come back yet",
    "I will never forget it",
    "That is all I have to say",
    "Let us go home",
    "I think so too",
    "She is a great deal better",
    "You are quite right",
    "I have no doubt of it",
    "Nobody knows where he is",
    "It was my own fault",
    "I should like to see him",
    "They are all gone",
    "Do not be afraid",
)


def agreement() -> list[tuple[Item, Item]]:
    """Pairs of texts that differ in their subject alone: what agrees in one is the foil in the other."""
    pronouns = [(text, " he", " she") for text in PRONOUN_TEXTS]
    pronouns += [(text, " himself", " herself") for text in REFLEXIVE_TEXTS]
    found = [
        (Item("pronoun", text.format(his), he, she), Item("pronoun", text.format(hers), she, he))
        for (text, he, she), (his, hers) in itertools.product(pronouns, SUBJECTS)
    ]
    return found + [
        (Item("verb", text.format(one), " was", " were"), Item("verb", text.format(many), " were", " was"))
        for text, (one, many) in itertools.product(VERB_TEXTS, NOUNS)
    ]


# What is asked of the model itself.


@dataclass(frozen=True)
class Answer:
    """The answer to one question: a mean over items, with its interval."""

    question: str
    unit: str
    value: float
    low: float
    high: float
    items: int
    left_out: int = 0
    """Items whose words are not single tokens of this model."""

    @classmethod
    def of(cls, question: str, unit: str, values: Sequence[float] | Tensor, left_out: int = 0) -> "Answer":
        """The mean of some values and its bootstrap interval, in which items count as independent."""
        found = np.asarray(values, dtype=np.float64)[:, None]
        if not len(found):
            return cls(question, unit, float("nan"), float("nan"), float("nan"), 0, left_out)
        summary = summarise([found])[:, 0]
        return cls(question, unit, float(summary[0]), float(summary[-2]), float(summary[-1]), len(found), left_out)

    @property
    def table(self) -> Table:
        """As a number with an interval."""
        ends = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in (("low", self.low), ("high", self.high))
        }
        return Table({}, torch.tensor(self.value, dtype=torch.float64), ends)


@torch.no_grad()
def answers(model: GPT2, tokenizer: Tokenizer) -> list[Answer]:
    """All questions that need no text of the user's."""
    return [*agrees(model, tokenizer), closes(model, tokenizer), copies(model)]


def agrees(model: GPT2, tokenizer: Tokenizer) -> list[Answer]:
    """Share of texts after which the word that agrees is likelier than the other, by kind, and of pairs in which
    the other subject moves the odds the right way."""
    margins, known, left_out = dict[str, list[tuple[float, float]]](), list[tuple[Item, Item]](), 0
    for pair in agreement():
        if all(len(tokenizer.encode(word)) == 1 for item in pair for word in (item.agrees, item.foil)):
            known.append(pair)
        else:
            left_out += len(pair)
    texts = dict.fromkeys(item.text for pair in known for item in pair)
    after = dict(zip(texts, _after(model, [tokenizer.encode(text) for text in texts]), strict=True))

    def margin(item: Item) -> float:
        (agrees,), (foil,) = tokenizer.encode(item.agrees), tokenizer.encode(item.foil)
        return float(after[item.text][agrees] - after[item.text][foil])

    for first, second in known:
        margins.setdefault(first.kind, []).append((margin(first), margin(second)))
    every = [pair for pairs in margins.values() for pair in pairs]
    right = {f"agreement, {kind}": [margin > 0 for pair in pairs for margin in pair] for kind, pairs in margins.items()}
    return [
        Answer.of("agreement", "share of texts", [margin > 0 for pair in every for margin in pair], left_out),
        *(Answer.of(name, "share of texts", values) for name, values in right.items()),
        Answer.of("agreement, the subject moves the odds", "share of pairs", [sum(pair) > 0 for pair in every]),
    ]


def closes(model: GPT2, tokenizer: Tokenizer) -> Answer:
    """Share of sentences after which a closing quotation mark is likelier where one was opened than where none was.

    It closes in any token that holds the mark and does not begin with a space: GPT-2's vocabulary has `,"` too.
    """
    marks = [
        token
        for token, text in enumerate(tokenizer.tokens([*range(tokenizer.vocab_size)]))
        if '"' in text and text[0] != " "
    ]
    marks = [token for token in marks if token < model.config.vocab_size]
    opened, plain = (
        _after(model, [tokenizer.encode(f"{mark}{said}") for said in QUOTED]).softmax(-1)[:, marks].sum(1)
        for mark in ('"', "")
    )
    return Answer.of("quotations closed", "share of sentences", (opened > plain).tolist())


def copies(model: GPT2) -> Answer:
    """How much less a random sequence surprises when it comes again: mean loss, first time less second time."""
    first, again = copy_losses(model)
    return Answer.of("induction gain", "nats per token", (first - again).tolist())


@torch.no_grad()
def copy_losses(model: GPT2) -> tuple[Tensor, Tensor]:
    """Mean loss of the tokens of random sequences when they come first, and when they come again: [sequence] each.

    The first token of each is left out: nothing foretells it either time. The induction of Olsson et al. 2022,
    "In-context Learning and Induction Heads".
    """
    ids, length = repeated(model)
    losses = torch.cat([losses_of(model, some)[:, 1:] for some in ids.split(8)])
    return losses[:, : length - 1].mean(1), losses[:, length:].mean(1)


def repeated(model: GPT2) -> tuple[Tensor, int]:
    """`SEQUENCES` random sequences, each twice after <|endoftext|>, and how long one is: [sequence, position].

    <|endoftext|> itself is not drawn; where a model has none, token 0 takes its place.
    """
    config = model.config
    length = min(MOST_COPIED, (config.n_positions - 1) // 2)
    (end,) = end_of_text(model) or [0]
    drawn = torch.from_numpy(np.random.default_rng(SEED).integers(0, config.vocab_size - 1, (SEQUENCES, length)))
    drawn += drawn >= end
    ids = torch.cat([torch.full((SEQUENCES, 1), end), drawn, drawn], 1)
    return ids.to(model.device), length


@torch.no_grad()
def induction_heads(model: GPT2) -> Tensor:
    """Of every head the share of attention, in the second copy of a random sequence, on the token after the same token
    in the first copy: [layer, head]. The prefix matching of Olsson et al. 2022."""
    ids, length = repeated(model)
    query = torch.arange(length + 1, 2 * length + 1, device=ids.device)
    return torch.stack(
        [pattern[:, :, query, query - length + 1].mean((0, 2)) for pattern in model.patterns(ids[:8])]
    ).cpu()


def _after(model: GPT2, texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the next token of every text, with <|endoftext|> in front: [text, vocab], float64."""
    found = torch.empty(len(texts), model.config.vocab_size, dtype=torch.float64)
    for length in {len(text) for text in texts}:
        alike = [number for number, text in enumerate(texts) if len(text) == length]
        ids = torch.tensor([[*end_of_text(model), *texts[number]] for number in alike], device=model.device)
        found[alike] = model(ids)[:, -1].double().cpu()
    return found


def end_of_text(model: GPT2) -> list[int]:
    """<|endoftext|>, where it is in the model's vocabulary."""
    end = model.config.eos_token_id
    return [end] if end is not None and end < model.config.vocab_size else []


def losses_of(model: GPT2, ids: Tensor) -> Tensor:
    """Loss of every token but the first, in nats: [batch, position - 1], float64."""
    logits = model(ids)[:, :-1].double()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


# What is measured of every text.


@dataclass(frozen=True)
class Observed:
    """What is measured of some texts."""

    attention: Tensor
    """Mean share of attention on position 0, of every query but the first: [text, start, layer, head]."""
    norms: Tensor
    """Norm of the stream at position 0 over the others' mean: [text, start, depth]."""
    losses: Tensor
    """Mean loss of the tokens of each bucket of positions: [text, start, bucket]; not a number beyond the text."""


@torch.no_grad()
def observe(model: GPT2, ids: Ids) -> Observed:
    """Run every text by itself, as it is and, where the model has one, with <|endoftext|> in front."""
    fronts = [[], end_of_text(model)] if end_of_text(model) else [[]]
    found = [[_observe_one(model, text, front) for front in fronts] for text in ids]
    parts = zip(*(zip(*starts, strict=True) for starts in found), strict=True)
    return Observed(*(torch.stack([torch.stack(starts) for starts in part]) for part in parts))


def _observe_one(model: GPT2, text: Sequence[int], front: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([[*front, *text][: model.config.n_positions]], device=model.device)
    patterns = [pattern[0, :, 1:, 0].double().mean(-1).cpu() for pattern in model.patterns(ids)]
    norms = [depth[0].double().norm(dim=-1).cpu() for depth in model.depths(ids)]
    losses = losses_of(model, ids)[0, len(front) :].cpu()  # of the text's tokens but its first
    return (
        torch.stack(patterns),
        torch.stack([norm[0] / norm[1:].mean() for norm in norms]),
        torch.stack([losses[first - 1 : last].mean() for first, last in FIRST_BUCKETS]),
    )


def _bucket(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def resting(attention: Tensor) -> float:
    """The share of heads that rest on position 0, of `Observed.attention` of one start, [text, layer, head]."""
    return float((attention.mean(0) > RESTS).double().mean())


# The experiment.


@dataclass(frozen=True, kw_only=True)
class BehaviourOptions(Options):
    """Ask a checkpoint what it has learnt of the things that people study in GPT-2."""


class Behaviour(Experiment[Observed]):
    """The questions, asked of one checkpoint."""

    name = "behaviour"
    question = "What has this model learnt of the things that people study in GPT-2?"
    options = BehaviourOptions

    def __init__(self, settings: Settings, asked: Sequence[Answer] = (), heads: Tensor | None = None) -> None:
        super().__init__(settings)
        self.asked, self.heads = asked, heads

    @classmethod
    def from_options(cls, begin: Start[BehaviourOptions]) -> "Behaviour":
        """Over texts every window is a whole one, so that each has every position."""
        settings = Settings(**begin.settings(PASSAGE, shortest=begin.options.window))
        return cls(settings, answers(begin.model, begin.tokenizer), induction_heads(begin.model))

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Observed:  # noqa: ARG002
        """What is measured of every text."""
        return observe(model, ids)

    def measure(self, model: GPT2, raw: Observed) -> Tables:
        """`attention` [text, start, layer, head], `norms` [text, start, depth], `loss` [text, start, position]."""
        starts, config = (AS_IT_IS, AFTER_END)[: raw.attention.shape[1]], model.config
        return {
            "attention": by_text(raw.attention, start=starts, layer=range(config.n_layer), head=range(config.n_head)),
            "norms": by_text(raw.norms, start=starts, depth=range(config.n_layer + 1)),
            "loss": by_text(raw.losses, start=starts, position=[_bucket(*ends) for ends in FIRST_BUCKETS]),
        }

    def rows(self, study: Study[Observed]) -> Iterator[Row]:
        """Every number of every text, and every answer (metric `answer`)."""
        yield from study.tables["attention"].rows(model=self.settings.model, metric="attention on position 0")
        yield from study.tables["norms"].rows(model=self.settings.model, metric="norm of position 0 over the others'")
        yield from study.tables["loss"].rows(model=self.settings.model, metric="loss")
        for answer in self.asked:
            yield {"model": self.settings.model, "metric": "answer", **asdict(answer)}

    def summary(self, study: Study[Observed]) -> dict[str, Any]:  # noqa: ARG002
        """The answers, and how well each head finds the token after an earlier copy."""
        heads = [] if self.heads is None else self.heads.tolist()
        return {"answers": [asdict(answer) for answer in self.asked], "induction_heads": heads}

    def lines(self, study: Study[Observed], columns: int) -> Iterator[str]:  # noqa: ARG002
        """The answers, and of the texts what the claims rest on."""
        for answer in self.asked:
            left_out = f", {answer.left_out} left out" if answer.left_out else ""
            yield f"{answer.question:>40}  {within(answer.table):<26} {answer.unit} ({answer.items} items{left_out})"
        for front in study.tables["norms"].axes["start"]:
            yield f"{front}:"
            shares = study.tables["attention"].at(start=front).value
            resting, heads = int((shares > RESTS).sum()), shares.numel()
            yield f"{'heads that rest on position 0':>40}  {resting} of {heads}"
            norms = study.tables["norms"].at(start=front)
            peak = int(norms.value.argmax())
            yield f"{'largest norm of position 0':>40}  {within(norms.at(depth=peak))} times the others' (depth {peak})"
            for position, loss in self._losses(study, front).items():
                yield f"{f'loss at position {position}':>40}  {within(loss)} nats per token"
        yield ""

    @staticmethod
    def _losses(study: Study[Observed], front: str) -> dict[str, Table]:
        """The loss by position, of the positions that the texts have."""
        table = study.tables["loss"].at(start=front)
        found = {position: table.at(position=position) for position in table.axes["position"]}
        return {position: loss for position, loss in found.items() if bool(loss.value.isfinite())}

    def verdicts(self, study: Study[Observed]) -> list[Verdict]:
        """What the model has of GPT-2's behaviour, each beside a threshold."""
        asked, last = {answer.question: answer for answer in self.asked}, study.tables["norms"].axes["start"][-1]
        decided = [
            ("A fifth of the heads rest on the first token", _rest(study.tables["attention"].at(start=last))),
            ("The first token's stream is massive", _massive(study.tables["norms"].at(start=last))),
            *(
                (claim, _answered(asked[question], threshold))
                for claim, question, threshold in ASKED
                if question in asked
            ),
        ]
        return [Verdict.of(number, claim, of, study.basis) for number, (claim, of) in enumerate(decided, start=1)]

    def figures(self, study: Study[Observed]) -> Figures:
        """The report's charts."""
        return _figures(study, self.asked, self.heads)


ASKED = (
    ("A random sequence surprises less when it comes again", "induction gain", GAIN),
    ("Pronouns and verbs agree with their subject", "agreement", RIGHT),
    ("An open quotation is closed", "quotations closed", RIGHT),
)
"""The claims about answers: the question, and the threshold that its answer must pass."""


def _rest(shares: Table) -> Decision:
    sure, never = above(shares, RESTS).double().mean(), below(shares, RESTS).double().mean()
    outcome = all_of(sure >= RESTING_HEADS, never > 1 - RESTING_HEADS)
    return Decision(
        outcome,
        {
            "holds": "Heads that need nothing look at the first token.",
            "does not hold": "Few heads look there most.",
        }.get(outcome, SENTENCES["undecided"]),
        f"{int(above(shares, RESTS).sum())} of {shares.value.numel()} heads leave more than {RESTS} of their attention "
        f"on position 0; the claim needs a share of {RESTING_HEADS}.",
        {"share_of_attention_on_position_0": shares.value.tolist()},
        "all",
    )


def _massive(norms: Table) -> Decision:
    peak = int(norms.value.nan_to_num(0.0).argmax())
    most = norms.at(depth=peak)
    outcome = all_of(above(most, MASSIVE), below(most, MASSIVE))
    return Decision(
        outcome,
        {
            "holds": "It makes every measure over all positions one of that token.",
            "does not hold": "The first token is not much longer than the others.",
        }.get(outcome, SENTENCES["undecided"]),
        f"It is at most {within(most)} times as long as the others' mean (depth {peak}); the claim needs {MASSIVE:g}.",
        {"norm_of_position_0_over_the_others": norms.value.tolist()},
        "all",
    )


def _answered(answer: Answer, threshold: float) -> Decision:
    said = f"{answer.question}: {within(answer.table)}, {answer.unit}; "
    outcome = all_of(above(answer.table, threshold), below(answer.table, threshold))
    evidence, basis = f"{said}the claim needs {threshold:g}.", f"{answer.items} items"
    return Decision(outcome, SENTENCES[outcome], evidence, {"answer": asdict(answer)}, "all", basis)


SENTENCES = {
    "holds": "The model does what the claim says.",
    "does not hold": "The model does it too seldom, or too little.",
    "undecided": "The interval includes the threshold, or there is nothing to count, so it is undecided.",
}


Drawn = tuple[Figure, list[dict[str, Any]], list[str] | None]
"""A chart, its rows, and what their numbers are of where they are arrays."""


def _figures(study: Study[Observed], asked: Sequence[Answer], heads: Tensor | None) -> Figures:
    drawn = [_attention(study), _norms(study), _loss(study)]
    drawn += [_induction(heads)] if heads is not None else []
    drawn += [_shares(shares)] if (shares := [of for of in asked if of.unit.startswith("share") and of.items]) else []
    data = {figure.name: rows for figure, rows, _ in drawn}
    places = {figure.name: along for figure, _, along in drawn if along}
    starts = list(study.tables["attention"].axes["start"])
    control = Control("start", "texts", [(front, front) for front in starts], starts[-1])
    return Figures([figure for figure, _, _ in drawn], data, places, [control])


def _by_head(name: str, title: str, alt: str, note: str, unit: str, table: Table, start: str | None) -> Drawn:
    """A heat map of numbers of heads, a row for each block; with `start`, of the texts that the control chooses."""
    from experiments.page import charts  # noqa: PLC0415  an extra

    blocks = [f"block {layer}" for layer in table.axes["layer"]]
    heads, row = [str(head) for head in table.axes["head"]], charts.rows_axis("block", "block", blocks)
    filters, chosen = (["datum.start == start"], {"start": start}) if start else ([], {})
    spec = charts.heat_map(name, filters, heads, row, unit, chosen, len(blocks), x_title="head")
    rows = dataset(table.named("layer", "block", blocks).rows(), "head", table.axes["head"])
    return (
        Figure(name, title, f"A heat map: a row for each block, a column for each head, {alt}.", note, spec),
        rows,
        heads,
    )


def _attention(study: Study[Observed]) -> Drawn:
    table, unit = study.tables["attention"], "share of attention on position 0"
    title, note = "Which heads rest on the first token", "Mean over all queries but the first, which has no choice."
    return _by_head("attention", title, f"the mean {unit}", note, unit, table, table.axes["start"][-1])


def _induction(heads: Tensor) -> Drawn:
    table = Table({"layer": range(heads.shape[0]), "head": range(heads.shape[1])}, heads.double())
    unit = "share of attention on the token after the earlier copy"
    note = "Of random sequences that are shown twice; heads that copy so are called induction heads."
    return _by_head("induction", "Which heads copy", f"the {unit}", note, unit, table, None)


def _norms(study: Study[Observed]) -> Drawn:
    from experiments.page import charts  # noqa: PLC0415  an extra

    table, places = study.tables["norms"], place_names(study.n_layer)[:-1]
    starts, unit = list(table.axes["start"]), "norm of position 0 over the others'"
    alt = "Lines by place: the norm of the stream at position 0 over the mean of the other positions'."
    spec = charts.parts_by_block("norms", [], places, unit, {}, starts)
    note = "At 1 the first token is like the others."
    rows = dataset(table.named("start", "part", starts).rows(), "depth", table.axes["depth"])
    return Figure("norms", "How long the first token's stream is", alt, note, spec), rows, places


def _loss(study: Study[Observed]) -> Drawn:
    from experiments.page import charts  # noqa: PLC0415  an extra

    table, buckets = study.tables["loss"], list(Behaviour._losses(study, AS_IT_IS))
    starts, spread = list(table.axes["start"]), study.windows is not None
    spec = charts.bars_by_layer("loss", [], buckets, "position", "loss, nats per token", {}, spread, starts)
    alt = "Bars for groups of positions: the mean loss of their tokens."
    shown = table.at(position=buckets).named("start", "part", starts).named("position", "place", buckets)
    note = "What comes later has more to go on."
    return Figure("loss", "Loss by position", alt, note, spec), dataset(shown.rows()), None


def _shares(asked: Sequence[Answer]) -> Drawn:
    from experiments.page import charts  # noqa: PLC0415  an extra

    rows = [{"place": of.question, "value": of.value, "low": of.low, "high": of.high} for of in asked]
    names = [answer.question for answer in asked]
    spec = charts.bars_by_layer("answers", [], names, "question", "share right", {}, intervals=True)
    alt = "Bars for every question: the share of items that the model gets right, with its interval."
    return Figure("answers", "Agreement and quotations", alt, "Half would be chance.", spec), rows, None


main = command(Behaviour)

if __name__ == "__main__":
    start(main)
