"""Does adding a direction change what the model says, and what does it cost?

    python -m experiments.steering --model weights/tiny --layers 2,5,8 --texts held_out.jsonl

A direction is made from pairs of texts that differ in one thing: for every layer, the mean over pairs of the difference
of the stream after that block (site `blocks.L.output`), at the last position of each text. A steered run adds dose
times the direction to that stream (`output_shift`). The unit of a dose is the direction itself: dose 1 adds what tells
the two kinds of text apart on average, and the table says how long that is beside the stream. Adding a difference of
streams is activation addition (Turner et al. 2023, "Activation Addition: Steering Language Models Without
Optimization"); taking the mean over pairs is contrastive activation addition (Rimsky et al. 2024, "Steering Llama 2 via
Contrastive Activation Addition", section 3).

The answer is read after prompts that took no part in making the direction. Beside it stand two controls: the direction
with the opposite sign, and random directions of the same norm. The cost is what the same runs do to the prediction of
another text. The thresholds of the verdicts were fixed before any model was asked.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from experiments.behaviour import PRONOUN_TEXTS, SUBJECTS, end_of_text
from experiments.harness.command import command, start
from experiments.harness.corpus import STATISTICS, summarise
from experiments.harness.experiment import Checked, Experiment, Ids, Settings, Start, Study
from experiments.harness.options import Layers, Options, parse_numbers
from experiments.harness.table import Row, Table, Tables, by_measure, by_text
from experiments.harness.verdicts import (
    FEWEST_WINDOWS,
    UNCHANGED,
    Decision,
    Outcome,
    Verdict,
    above,
    all_of,
    below,
    counted,
    figures_of,
    readable,
    within,
)
from experiments.page.figures import Control, Figure, Figures, dataset, label_of, reach_of, rounded
from minigpt import GPT2, Comparison, Tokenizer, compare, compare_logits, parity, record, scaled
from minigpt.measures import Measure

SHE, HE = (" she", " her"), (" he", " his")
"""The words that tell the built-in pairs apart."""
KINDS = ("direction", "opposite", "random")
"""What is added: the direction, the same with the opposite sign, and directions drawn at random of the same norm."""
DRAWS, SEED = 3, 0
"""Random directions of every layer. One alone could hit or miss the answer by chance."""
NAMES = (*KINDS[:2], *(f"random {draw}" for draw in range(DRAWS)))
"""Every vector of a layer that is run."""
COSTS: tuple[Measure, ...] = ("loss_change", "kl")
GROWS_TO = 4.0
"""The claims are about doses up to here. Beyond, the stream is mostly the direction, and the final norm, which removes
lengths, lets no answer grow for ever."""
TIMES_RANDOM = 3.0
"""A direction that does less than this many times what a random one does may owe it to its length."""
CHEAP = 0.5
"""Nats per token: a perplexity less than 1.65 times as large."""
EVERY = 4
"""Of a file's pairs every fourth is held apart."""
ROUNDINGS = 4
"""Relative, of the sums that make a steered stream and its difference from the clean one."""
SAME = 1e-5
"""Of the stream's norm: so far apart are two float32 runs of one text in different batches, so a mean difference below
it is rounding."""
TEXTS_AT_ONCE = 64
"""Of those that a direction is made from."""
HELD_SUBJECTS, HELD_TEXTS = SUBJECTS[1::3], PRONOUN_TEXTS[1::2]
"""Of the built-in pairs: neither these subjects nor these texts take part in making the direction."""


# What a direction is made from.


class Pair(NamedTuple):
    """Two texts that differ in one thing."""

    positive: str
    negative: str


@dataclass(frozen=True)
class Contrast:
    """Pairs of texts of two kinds."""

    made_from: tuple[Pair, ...]
    """The direction is the mean difference of these."""
    held_apart: tuple[Pair, ...]
    """After the negative texts of these the answer is read. None of their texts is among the others."""

    @classmethod
    def built_in(cls) -> "Contrast":
        """Sentences about a woman and about a man, as `behaviour` has them."""
        subjects, texts = ([of for of in SUBJECTS if of not in HELD_SUBJECTS], HELD_SUBJECTS), HELD_TEXTS
        others = [text for text in PRONOUN_TEXTS if text not in texts]
        return cls(*(_about(*of) for of in zip(subjects, (others, texts), strict=True)))

    @classmethod
    def read(cls, path: Path) -> "Contrast":
        """The pairs of a file of JSON lines with the fields `positive` and `negative`; every fourth is held apart.

        Raises ValueError for a file that cannot be read as that, for fewer pairs than four, for a pair of equal texts,
        and where a text that is held apart takes part in making the direction.
        """
        if not path.is_file():
            raise ValueError(f"--contrast {path} is not a file; give JSON lines with the fields positive and negative.")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--contrast {path} is not UTF-8 ({error.reason}); convert it.") from None
        pairs = [_pair(line, f"--contrast {path}, line {at}") for at, line in enumerate(lines, 1) if line.strip()]
        if len(pairs) < EVERY:
            raise ValueError(f"--contrast {path} has {counted(len(pairs), 'pair')}; expected {EVERY} or more.")
        held = tuple(pairs[EVERY - 1 :: EVERY])
        made = tuple(pair for number, pair in enumerate(pairs, 1) if number % EVERY)
        if shared := {text for pair in made for text in pair} & {text for pair in held for text in pair}:
            raise ValueError(
                f"--contrast {path}: {min(shared)!r} stands in a pair that makes the direction and in one that is held "
                "apart (every fourth); leave one of them out."
            )
        return cls(made, held)


def _about(subjects: Sequence[tuple[str, str]], texts: Sequence[str]) -> tuple[Pair, ...]:
    return tuple(Pair(text.format(hers), text.format(his)) for text in texts for his, hers in subjects)


def _pair(line: str, where: str) -> Pair:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from None
    texts = [found.get(field) if isinstance(found, dict) else None for field in Pair._fields]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{where} lacks a text in one of the fields positive and negative.")
    if texts[0] == texts[1]:
        raise ValueError(f"{where} has the same text twice, {texts[0]!r}; expected two that differ.")
    return Pair(*map(str, texts))


def encoded(model: GPT2, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids, with <|endoftext|> in front where the model has one: it takes the place of the first token.

    Raises ValueError for a text of which nothing is left without its first token, and for one that is too long.
    """
    found, most = [[*end_of_text(model), *tokenizer.encode(text)] for text in texts], model.config.n_positions
    for text, ids in zip(texts, found, strict=True):
        if not 2 <= len(ids) <= most:
            raise ValueError(f"The text {text!r} comes to {counted(len(ids), 'token')}; expected 2 to {most}.")
    return found


def tokens_of(tokenizer: Tokenizer, answers: Sequence[str], foils: Sequence[str]) -> tuple[list[int], list[int]]:
    """The tokens of two sets of words. Raises ValueError for a word that is not one token, or is in both."""
    found = []
    for option, words in (("--answers", answers), ("--foils", foils)):
        ids = [tokenizer.encode(word) for word in words]
        for word, of in zip(words, ids, strict=True):
            if len(of) != 1:
                raise ValueError(
                    f"{option}: {word!r} is {len(of)} tokens of this model; expected words of one token each, with the "
                    "space in front that they have within a text, separated by commas."
                )
        found.append([token for (token,) in ids])
    if both := set(answers) & set(foils):
        raise ValueError(f"{min(both)!r} is an answer and a foil; expected two sets of words without a common one.")
    return found[0], found[1]


# Directions, and the runs that add them.


@dataclass(frozen=True)
class Directions:
    """What is added at some layers."""

    layers: tuple[int, ...]
    vectors: Tensor
    """Float64 [layer, vector, n_embd]; the vectors are called `NAMES`, and those of a layer are equally long."""
    stream: Tensor
    """Mean norm of the stream where the direction was read: [layer]."""

    @property
    def norms(self) -> Tensor:
        """Of the direction: [layer]."""
        return self.vectors[:, 0].norm(dim=-1)

    @classmethod
    def of(cls, model: GPT2, tokenizer: Tokenizer, contrast: Contrast, layers: Sequence[int]) -> "Directions":
        """The directions of a model. Raises ValueError where the two kinds of text do not differ in a stream."""
        kinds = [encoded(model, tokenizer, texts) for texts in zip(*contrast.made_from, strict=True)]
        positive, negative = (last_streams(model, texts, layers) for texts in kinds)
        mean, stream = (positive - negative).mean(1), torch.cat([positive, negative], 1).norm(dim=-1).mean(1)
        for layer, norm in zip(layers, (mean.norm(dim=-1) / stream).tolist(), strict=True):
            if norm < SAME:
                raise ValueError(
                    f"After block {layer} the two kinds of text do not differ on average, at the last position: there "
                    "is no direction between them. Give pairs of which the first text is always of the same kind."
                )
        drawn = torch.stack([_drawn(layer, mean.shape[-1]) for layer in layers]) * mean.norm(dim=-1)[:, None, None]
        return cls(tuple(layers), torch.cat([mean[:, None], -mean[:, None], drawn], 1), stream)


def last_streams(model: GPT2, texts: Ids, layers: Sequence[int]) -> Tensor:
    """The stream after some blocks, at the last position of each text: [layer, text, n_embd], float64."""
    sites, found = [f"blocks.{layer}.output" for layer in layers], list[Tensor]()
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[first : first + TEXTS_AT_ONCE]
        ends = [len(text) - 1 for text in some]
        values = record(model, some, sites)
        found.append(torch.stack([values[site][range(len(some)), ends].double().cpu() for site in sites]))
    return torch.cat(found, 1)


def _drawn(layer: int, width: int) -> Tensor:
    """Random unit vectors: [draw, width]. They do not depend on which other layers are asked for."""
    drawn = torch.from_numpy(np.random.default_rng((SEED, layer)).standard_normal((DRAWS, width)))
    return F.normalize(drawn, dim=-1)


@dataclass(frozen=True)
class Plan:
    """The steered runs: every vector of every layer at every dose above 0, the doses running fastest."""

    directions: Directions
    doses: tuple[float, ...]
    """Above 0, in rising order."""
    everywhere: bool = False
    """Whether the first position is steered too. By default it is not: its stream is often an attention sink, of a norm
    and a use of its own (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks")."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[layer, vector, dose]."""
        return len(self.directions.layers), len(NAMES), len(self.doses)

    @property
    def added(self) -> Tensor:
        """Dose times vector of every run: [layer, vector, dose, n_embd], float64."""
        return self.directions.vectors[:, :, None] * torch.tensor(self.doses, dtype=torch.float64)[:, None]

    def interventions(self, model: GPT2, length: int) -> list[dict[str, Tensor]]:
        """What every run does to texts of so many positions, as `compare` takes it."""
        layers = zip(self.directions.layers, self.added.flatten(1, 2), strict=True)
        return [self.shift(model, layer, vector, length) for layer, vectors in layers for vector in vectors]

    def shift(self, model: GPT2, layer: int, vector: Tensor, length: int) -> dict[str, Tensor]:
        """The intervention that adds a vector after a block. Where it is 0 it is -0.0, which changes no bit."""
        shift = vector.to(model.device, model.dtype).expand(1, length, -1).clone()
        if not self.everywhere:
            shift[:, 0] = 0
        return {f"blocks.{layer}.output_shift": shift.where(shift != 0, -0.0)}


# What must be true of any weights.


def check_plan(model: GPT2, plan: Plan, ids: Tensor) -> list[dict[str, Any]]:
    """Try the interventions on texts [batch, position], each by itself. Raises CheckError where one goes wrong.

    Dose 0 must change no bit of the logits. After the block, every vector at the largest dose must give the clean
    stream plus dose times that vector, to the last bit, and at the first position nothing, where that is left out.
    """
    ids, width, length = ids.to(model.device), model.config.n_embd, ids.shape[1]
    logits, layers = model(ids), plan.directions.layers
    clean = record(model, ids, [f"blocks.{layer}.output" for layer in layers])
    for (site, x), layer, vectors in zip(clean.items(), layers, plan.added[:, :, -1], strict=True):
        with scaled(model, plan.shift(model, layer, torch.zeros(width), length)):
            if not _same_bits(model(ids), logits):
                raise parity.CheckError(f"dose 0 after block {layer} changes the logits; expected the same bits.")
        for name, vector in zip(NAMES, vectors, strict=True):
            expected = x + vector.to(x)
            if not plan.everywhere:
                expected[:, 0] = x[:, 0]
            with scaled(model, plan.shift(model, layer, vector, length)):
                if not torch.equal(record(model, ids, [site])[site], expected):
                    raise parity.CheckError(
                        f"after block {layer} the stream steered by {name!r} is not the clean one plus dose times it."
                    )
    return [
        {"claim": "a dose of 0 changes no bit of the logits, at every layer", "passed": True, "figure": 0.0},
        {"claim": "after the block, a steered stream is the clean one plus dose * vector, to the last bit",
         "passed": True, "figure": 0.0},
    ]  # fmt: skip


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


def check_runs(plan: Plan, raw: Comparison, dtype: torch.dtype) -> float:
    """How far, in units of the stream, the measured differences at the site are from dose times the direction's norm.

    Raises CheckError where that is more than rounding in `dtype`, where a depth before the site differs at all, and
    where the first position does although it is left out.
    """
    count = len(plan.directions.layers)
    found, run = (of.sqrt().unflatten(0, (count, -1)) for of in (raw.statistics.difference_sq, raw.statistics.run_sq))
    real, worst = torch.arange(found.shape[-1]) < raw.lengths[:, None], 0.0
    for index, (layer, added) in enumerate(zip(plan.directions.layers, plan.added, strict=True)):
        there, site = found[index, :, layer + 1], raw.statistics.clean_sq[layer + 1].sqrt()
        expected = added.flatten(0, 1).norm(dim=-1)[:, None, None] * real
        if not plan.everywhere:
            expected[..., 0] = 0
        allowed = ROUNDINGS * torch.finfo(dtype).eps * (run[index, :, layer + 1] + site + expected)
        apart = (there - expected).abs()
        before = float(found[index, :, : layer + 1].max())
        if before > 0 or bool((apart > allowed.where(expected > 0, 0.0)).any()):
            raise parity.CheckError(
                f"a steered stream differs from the clean one by up to {before:g} before block {layer} writes, and "
                f"after it by {float(apart.max()):g} more or less than dose times the direction's norm; expected 0."
            )
        worst = max(worst, float(apart.max()))
    return worst


# What the model says.


@dataclass(frozen=True)
class Response:
    """The answers after the prompts that are held apart, in logits: mean of the answers' less mean of the foils'."""

    clean: Tensor
    """[prompt]."""
    change: Tensor
    """What steering adds to it, dose 0 first: [layer, kind, dose, prompt]. Of the random directions it is the root mean
    square over the draws, for none of them has a sign that means something."""
    swapped: Tensor
    """What the other text of the pair adds to it, without any steering: [prompt]."""


def respond(
    model: GPT2,
    texts: tuple[Ids, Ids],
    tokens: tuple[Sequence[int], Sequence[int]],
    plan: Plan,
    max_bytes: int | None = None,
) -> Response:
    """Read the answers after prompts, `texts[0]`, and what the other texts of their pairs, `texts[1]`, do to them.

    `tokens` are those of the answers and of the foils. Raises CheckError as `check_runs` does.
    """
    prompts, others = texts
    wanted = [*tokens[0], *tokens[1]]
    edits = [plan.interventions(model, max(map(len, of))) for of in texts]
    raw = compare(model, prompts, edits[0], max_bytes=max_bytes, tokens=wanted)
    check_runs(plan, raw, model.dtype)
    clean = _difference(raw.clean_logits, len(tokens[0]))
    swapped = _difference(compare_logits(model, others, edits[1][-1:], wanted)[0], len(tokens[0])) - clean
    change = (_difference(raw.logits, len(tokens[0])) - clean).unflatten(0, plan.shape)
    return Response(clean, from_dose_0(by_kind(change, of_random=_root_mean_square), 2), swapped)


def _difference(logits: Tensor, answers: int) -> Tensor:
    """Mean of the first logits less mean of the others: [..., token] -> [...]."""
    return logits[..., :answers].mean(-1) - logits[..., answers:].mean(-1)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean(1, keepdim=True).sqrt()


def _mean(values: Tensor) -> Tensor:
    return values.mean(1, keepdim=True)


def by_kind(values: Tensor, of_random: Callable[[Tensor], Tensor]) -> Tensor:
    """[layer, vector, ...] -> [layer, kind, ...]: the random directions become one."""
    return torch.cat([values[:, :2], of_random(values[:, 2:])], 1)


def from_dose_0(change: Tensor, axis: int) -> Tensor:
    """The changes with those of dose 0 in front, which are 0: it is the clean run, as `check_plan` tries."""
    return torch.cat([torch.zeros_like(change.narrow(axis, 0, 1)), change], axis)


def over_prompts(values: Tensor, **axes: Sequence[Any]) -> Table:
    """The mean over prompts, on the last axis, with its bootstrap interval, in which prompts count as independent."""
    flat = summarise([values.reshape(-1, values.shape[-1]).T.double().numpy()])
    found = {name: torch.from_numpy(of).reshape(values.shape[:-1]) for name, of in zip(STATISTICS, flat, strict=True)}
    return Table(axes, found.pop("mean"), found)


# The experiment.


@dataclass(frozen=True, kw_only=True)
class SteeringOptions(Options):
    """Add a direction after every layer, at several doses, and ask what the model says."""

    layers: Layers = "all"
    doses: Annotated[str, typer.Option(help="numbers above 0; dose 1 adds the direction itself")] = "0.5,1,2,4,8"
    contrast: Annotated[
        Path | None, typer.Option(help="pairs of your own: JSON lines with positive, negative; every 4th is held apart")
    ] = None
    answers: Annotated[str | None, typer.Option(help="words towards which is steered; default: ' she, her'")] = None
    foils: Annotated[str | None, typer.Option(help="words that they are held against; default: ' he, his'")] = None
    everywhere: Annotated[bool, typer.Option("--everywhere", help="steer the first position too")] = False


@dataclass(frozen=True, kw_only=True)
class SteeringSettings(Settings):
    """What is added, where, and what is asked."""

    layers: tuple[int, ...]
    doses: tuple[float, ...]
    """Above 0, in rising order."""
    answers: tuple[str, ...] = SHE
    foils: tuple[str, ...] = HE
    contrast: str | None = None
    """The file of the pairs; None for the built-in ones."""
    contrast_sha256: str | None = None
    everywhere: bool = False


def _words(given: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(given.split(",")) if given else default


class Steering(Experiment[Comparison]):
    """Directions that are added to the stream."""

    name = "steering"
    question = "Does adding a direction change what the model says, and what does it cost?"
    options = SteeringOptions
    settings: SteeringSettings

    def __init__(self, settings: SteeringSettings, plan: Plan, response: Response, contrast: Contrast) -> None:
        super().__init__(settings)
        self.plan, self.contrast, self.prompts = plan, contrast, len(response.clean)
        self.doses = [0.0, *plan.doses]
        layers = list(plan.directions.layers)
        self.change = over_prompts(response.change, layer=layers, added=KINDS, dose=self.doses)
        """What steering adds to the answer."""
        self.answer = over_prompts(response.clean + response.change[:, 0], layer=layers, dose=self.doses)
        """The answer under the direction."""
        self.steps = over_prompts(response.change[:, 0].diff(dim=1), layer=layers, dose=plan.doses)
        """What every dose adds to the change of the dose before it."""
        margin = response.change[:, 0] - TIMES_RANDOM * response.change[:, 2]
        self.margin = over_prompts(margin, layer=layers, dose=self.doses)
        """How much farther the direction moves the answer than `TIMES_RANDOM` random ones do."""
        self.swapped = over_prompts(response.swapped)
        """What the other text of the pair adds to the answer."""

    @classmethod
    def of(cls, model: GPT2, tokenizer: Tokenizer, settings: SteeringSettings, contrast: Contrast) -> "Steering":
        """Make the directions, and ask for the answers. Raises ValueError for texts and words that do not fit."""
        tokens = tokens_of(tokenizer, settings.answers, settings.foils)
        positive, negative = (encoded(model, tokenizer, texts) for texts in zip(*contrast.held_apart, strict=True))
        plan = Plan(Directions.of(model, tokenizer, contrast, settings.layers), settings.doses, settings.everywhere)
        response = respond(model, (negative, positive), tokens, plan, settings.max_bytes)
        return cls(settings, plan, response, contrast)

    @classmethod
    def from_options(cls, begin: Start[SteeringOptions]) -> "Steering":
        """The runs that were asked for."""
        asked, doses = begin.options, parse_numbers(begin.options.doses, "--doses")
        if min(doses) < 0 or max(doses) == 0:
            raise ValueError(
                f"--doses {asked.doses}: expected numbers above 0; the opposite direction is run at every dose anyway."
            )
        if asked.contrast and not (asked.answers and asked.foils):
            raise ValueError("--contrast needs --answers and --foils: words that tell its two kinds of text apart.")
        contrast = Contrast.read(asked.contrast) if asked.contrast else Contrast.built_in()
        settings = SteeringSettings(
            **begin.settings(),
            layers=tuple(dict.fromkeys(begin.layers(asked.layers))),
            doses=tuple(sorted({dose for dose in doses if dose > 0})),
            answers=_words(asked.answers, SHE),
            foils=_words(asked.foils, HE),
            contrast=str(asked.contrast) if asked.contrast else None,
            contrast_sha256=hashlib.sha256(asked.contrast.read_bytes()).hexdigest() if asked.contrast else None,
            everywhere=asked.everywhere,
        )
        return cls.of(begin.model, begin.tokenizer, settings, contrast)

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Comparison:  # noqa: ARG002
        """All steered runs of some texts beside the clean one."""
        edits = self.plan.interventions(model, max(map(len, ids)))
        return compare(model, ids, edits, predictions=True, max_bytes=self.settings.max_bytes)

    def measure(self, model: GPT2, raw: Comparison) -> Tables:  # noqa: ARG002
        """`cost` [text, metric, layer, added, dose]: over all positions but the first; of the random directions the
        mean over the draws."""
        table = by_measure(raw, COSTS, run=range(len(raw.axes[0]))).at(positions="rest", depth="final")
        layers, vectors, doses = self.plan.shape
        by_run = table.split("run", layer=self.plan.directions.layers, vector=NAMES, dose=self.plan.doses).value
        values = from_dose_0(by_kind(by_run.reshape(-1, vectors, doses), of_random=_mean), 2)
        shape = (*by_run.shape[:2], layers, len(KINDS), 1 + doses)
        axes = {"layer": list(self.plan.directions.layers), "added": KINDS, "dose": self.doses}
        return {"cost": by_text(values.reshape(shape), metric=COSTS, **axes)}

    def check(self, model: GPT2, raw: Comparison) -> Checked:
        """Dose 0 must be the clean run, and at the site the difference dose times the direction; CheckError if not."""
        checks, apart = check_plan(model, self.plan, raw.ids), check_runs(self.plan, raw, model.dtype)
        claim = "at the site every measured difference is as long as dose * direction, by rounding; before it is 0"
        return Checked(None, [*checks, {"claim": claim, "passed": True, "figure": apart}])

    def rows(self, study: Study[Comparison]) -> Iterator[Row]:
        """The costs, the answers after the prompts, and how long the directions are."""
        model, prompts = {"model": self.settings.model}, {"prompts": self.prompts}
        yield from study.tables["cost"].rows(**model, positions="rest")
        yield from self.change.rows(**model, metric="answer change", **prompts)
        yield from self.answer.rows(**model, metric="answer", added=KINDS[0], **prompts)
        yield from self.swapped.rows(**model, metric="answer change", added="the other text", **prompts)
        for layer, norm, stream in self._lengths():
            yield {**model, "metric": "norm of the direction", "layer": layer, "value": norm}
            yield {**model, "metric": "norm of the stream", "layer": layer, "value": stream}

    def _lengths(self) -> Iterator[tuple[int, float, float]]:
        """Layer, norm of the direction, and the stream's."""
        found = self.plan.directions
        return zip(found.layers, found.norms.tolist(), found.stream.tolist(), strict=True)

    def summary(self, study: Study[Comparison]) -> dict[str, Any]:  # noqa: ARG002
        """What the direction was made from, and what was asked."""
        clean = self.answer.at(layer=self.plan.directions.layers[0], dose=0.0)
        return {
            "pairs": [pair._asdict() for pair in self.contrast.made_from],
            "held_apart": [pair._asdict() for pair in self.contrast.held_apart],
            "answers": figures_of(clean=clean, change_by_the_other_text=self.swapped),
        }

    @property
    def claimed(self) -> list[float]:
        """The doses that the claims are about."""
        return [dose for dose in self.plan.doses if dose <= GROWS_TO]

    def turns_at(self, layer: int) -> float | None:
        """The first dose at which the answers outweigh the foils with all of the interval; None where none does."""
        sure = above(self.answer.at(layer=layer), UNCHANGED)
        return next((dose for dose, turned in zip(self.doses, sure.tolist(), strict=True) if turned), None)

    def verdicts(self, study: Study[Comparison]) -> list[Verdict]:
        """What steering does at every layer."""
        decided = [
            (number, claim, layer, judge(self, study, layer))
            for layer in self.plan.directions.layers
            for number, (claim, judge) in enumerate(CLAIMS, start=1)
        ]
        return [Verdict.of(number, claim, of, study.basis, layer) for number, claim, layer, of in decided]

    def lines(self, study: Study[Comparison], columns: int) -> Iterator[str]:  # noqa: ARG002
        """Every layer's direction: how long it is, how far it moves the answer, and what turning it costs."""
        dose = max(self.claimed, default=self.plan.doses[0])
        answers, foils = ("/".join(map(str.strip, words)) for words in (self.settings.answers, self.settings.foils))
        clean = self.answer.at(layer=self.plan.directions.layers[0], dose=0.0)
        yield f"{answers} over {foils}, after {counted(self.prompts, 'prompt')} held apart: {within(clean)} logits"
        yield f"the other text of each pair adds {within(self.swapped)}; steering adds, at dose {label_of(dose)}:"
        names = ("norm", "of stream", *KINDS, "turns at", "loss change", "kl")
        yield f"{'layer':>5}" + "".join(f"{name:>12}" for name in names)
        for layer, norm, stream in self._lengths():
            change, turns = self.change.at(layer=layer, dose=dose), self.turns_at(layer)
            costs = study.tables["cost"].at(layer=layer, added=KINDS[0], dose=turns).value if turns else [np.nan] * 2
            numbers = [norm, norm / stream, *change.value.tolist()]
            at = "never" if turns is None else f"dose {label_of(turns)}"
            said = [*(readable(value, 3) for value in numbers), at, *(readable(float(of), 3) for of in costs)]
            yield f"{layer:>5}" + "".join(f"{word:>12}" for word in said).replace("undefined", "        -")
        yield "loss change and kl: of the text, in nats per token, at the dose that turns the answer"
        yield ""

    def figures(self, study: Study[Comparison]) -> Figures:
        """The report's charts."""
        return _figures(self, study)


# The verdicts.


def _grows(of: Steering, study: Study[Comparison], layer: int) -> Decision:  # noqa: ARG001
    steps = of.steps.at(layer=layer)
    growing = itertools.takewhile(lambda pair: pair[1], zip(of.plan.doses, above(steps, UNCHANGED), strict=True))
    reached = max((dose for dose, _ in growing), default=0.0)
    claimed, change = steps.at(dose=of.claimed), of.change.at(layer=layer, added=KINDS[0])
    return _judged(
        of,
        all_of(above(claimed, UNCHANGED), below(claimed, UNCHANGED)),
        ("More of the direction says more.", "At some dose, more of the direction does not say more."),
        f"{_at_doses(change)}; it surely grows up to dose {label_of(reached)}.",
        {**figures_of(change=change.at(dose=of.claimed), step=claimed), "grows_up_to": reached},
    )


def _beyond_random(of: Steering, study: Study[Comparison], layer: int) -> Decision:  # noqa: ARG001
    margin, change = of.margin.at(layer=layer, dose=of.claimed), of.change.at(layer=layer)
    random = _listed(change.at(added=KINDS[2]))
    return _judged(
        of,
        all_of(above(margin, UNCHANGED), below(margin, UNCHANGED)),
        ("The direction counts, not its length.", "At some dose its length alone may do as much."),
        f"{_at_doses(change.at(added=KINDS[0]))}; random directions: {random} (root mean square of {DRAWS}).",
        figures_of(**{kind: change.at(added=kind, dose=of.claimed) for kind in (KINDS[0], KINDS[2])}),
    )


def _opposite(of: Steering, study: Study[Comparison], layer: int) -> Decision:  # noqa: ARG001
    change = of.change.at(layer=layer, added=KINDS[1])
    claimed = change.at(dose=of.claimed)
    return _judged(
        of,
        all_of(below(claimed, UNCHANGED), above(claimed, UNCHANGED)),
        ("The sign of the direction decides.", "At some dose both signs move the answer the same way."),
        f"{_at_doses(change)}.",
        figures_of(change=claimed),
    )


def _cheap(of: Steering, study: Study[Comparison], layer: int) -> Decision:
    turns, clean = of.turns_at(layer), of.answer.at(layer=layer, dose=0.0)
    if not bool(below(clean, UNCHANGED)):
        said = f"Without steering the answer is {within(clean)} logits, not surely below 0."
        return Decision("undecided", "There is no answer to turn.", said, figures_of(clean=clean), "last", _basis(of))
    if turns is None:
        said = f"Without steering the answer is {within(clean)} logits, and at no dose surely above 0."
        return _judged(of, "does not hold", ("", "No dose turns the answer."), said, figures_of(clean=clean))
    cost = study.tables["cost"].at(metric="loss_change", layer=layer, added=KINDS[0], dose=turns)
    return _judged(
        of,
        all_of(below(cost, CHEAP), above(cost, CHEAP)),
        ("The answer turns, and the text is still predicted.", "What turns the answer spoils the prediction of text."),
        f"Dose {label_of(turns)} turns the answer; there the text's loss rises by {within(cost)} nats per token.",
        {**figures_of(loss_change=cost), "turns_at": turns},
        f"{_basis(of)}; cost: {study.basis}",
    )


CLAIMS: tuple[tuple[str, Callable[[Steering, Study[Comparison], int], Decision]], ...] = (
    (f"The answer moves farther with every dose up to {GROWS_TO:g}", _grows),
    (f"It moves at least {TIMES_RANDOM:g} times as far as by a random direction of the same norm", _beyond_random),
    ("The opposite direction moves it the other way", _opposite),
    (f"The answer turns at a dose that costs the text less than {CHEAP:g} nats per token", _cheap),
)


def _judged(
    of: Steering, outcome: Outcome, sentences: tuple[str, str], evidence: str, figures: dict[str, Any], basis: str = ""
) -> Decision:
    """A decision from intervals over prompts; undecided over too few prompts, or where no dose was asked about.

    `sentences` are for a claim that holds, and for one that does not. `basis` is given where a cost counts as well.
    """
    by_outcome = dict(zip(("holds", "does not hold"), sentences, strict=True))
    sentence = by_outcome.get(outcome, "An interval includes the threshold, so it is undecided.")
    if of.prompts < FEWEST_WINDOWS:
        outcome = "undecided"
        sentence = f"An interval over {counted(of.prompts, 'prompt')} is too narrow; it takes {FEWEST_WINDOWS} or more."
    elif not of.claimed:
        outcome, sentence = "undecided", f"No dose up to {GROWS_TO:g} was run."
    return Decision(outcome, sentence, evidence, figures, "rest" if basis else "last", basis or _basis(of))


def _basis(of: Steering) -> str:
    return f"mean over {counted(of.prompts, 'prompt')} held apart, with its 95 % interval"


def _at_doses(change: Table) -> str:
    """The changes at every dose, in words."""
    return f"At doses {', '.join(map(label_of, change.axes['dose'][1:]))} it moves by {_listed(change)} logits"


def _listed(change: Table) -> str:
    return ", ".join(readable(value, 3) for value in change.value.tolist()[1:])


# The page.


def _figures(of: Steering, study: Study[Comparison]) -> Figures:
    layers = [f"block {layer}" for layer in of.plan.directions.layers]
    change, cost = of.change.named("layer", "layer", layers), study.tables["cost"].named("layer", "layer", layers)
    by_dose = dataset(change.at(added=KINDS[0]).rows(), "dose", of.doses)
    data = {
        "response": dataset(change.named("added", "part", KINDS).rows()),
        "layers": by_dose,
        "cost": dataset(cost.named("added", "part", KINDS).rows()),
        "against": list(_against(change, cost.at(metric="loss_change"))),
    }
    first = layers[len(layers) // 2]
    control = Control("layer", "layer", [(layer, layer) for layer in layers], first)
    shown = [*_of_answers(of, layers, first, reach_of(by_dose)), *_of_costs(first, study.windows is not None)]
    return Figures(shown, data, {"layers": [label_of(dose) for dose in of.doses]}, [control])


def _against(change: Table, cost: Table) -> Iterator[Row]:
    """Every run's change of the answer beside its cost."""
    costs = {(row["layer"], row["added"], row["dose"]): row["value"] for row in cost.rows()}
    for row in change.rows():
        run = (row["layer"], row["added"], row["dose"])
        named = dict(zip(("layer", "part", "dose"), run, strict=True))
        yield {**named, "value": rounded(row["value"]), "cost": rounded(costs[run])}


DOSE = "dose, in lengths of the direction"
CHOSEN = "datum.layer == layer"


def _of_answers(of: Steering, layers: Sequence[str], first: str, reach: float) -> list[Figure]:
    from experiments.page import charts  # noqa: PLC0415  an extra

    title, swapped = "change of the answer, logits", float(of.swapped.value)
    lines = charts.lines_by_number("response", [CHOSEN], ("dose", DOSE), title, {"layer": first}, KINDS, True, swapped)
    row = charts.rows_axis("layer", "layer", layers)
    doses = [label_of(dose) for dose in of.doses]
    cells = charts.heat_map("layers", [], doses, row, title, {}, len(layers), reach=reach, x_title=DOSE)
    note = (
        f"Means over {counted(of.prompts, 'prompt')} held apart, with their 95 % intervals. Of the random directions, "
        "which are as long, it is the root mean square. The dashed line is what the other text of each pair does."
    )
    return [
        Figure(
            "response",
            "Dose and answer",
            "Lines by dose: how far the direction, the opposite one and random ones move the answer.",
            note,
            lines,
        ),
        Figure(
            "layers",
            "The answer, layer by layer",
            "A heat map: a row for each layer, a column for each dose, the change of the answer.",
            "Under the direction itself.",
            cells,
        ),
    ]


def _of_costs(first: str, spread: bool) -> list[Figure]:
    from experiments.page import charts  # noqa: PLC0415  an extra

    chosen, found = {"layer": first}, []
    for metric, title, unit in (
        ("loss_change", "What it costs: loss", "loss change of the text, nats per token"),
        ("kl", "What it costs: kl", "kl of the text's predictions, nats per token"),
    ):
        filters = [CHOSEN, f"datum.metric == '{metric}'"]
        spec = charts.lines_by_number("cost", filters, ("dose", DOSE), unit, chosen, KINDS, spread)
        alt = f"Lines by dose: {unit}, under the direction, the opposite one and random ones."
        note = "Over all tokens but the first; of the random directions the mean."
        found.append(Figure(metric, title, alt, note, spec))
    x = ("cost", "loss change of the text, nats per token")
    spec = charts.lines_by_number("against", [CHOSEN], x, "change of the answer, logits", chosen, KINDS, False)
    alt = "Lines through the doses: the change of the answer against the loss change of the text."
    note = "Every point is a dose. The best steering goes up, and not to the right."
    return [*found, Figure("against", "Answer against cost", alt, note, spec)]


main = command(Steering)

if __name__ == "__main__":
    start(main)
