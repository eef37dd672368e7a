"""Pairs of prompts: a clean one and a corrupted one of as many tokens, and two answers of which each calls for one.

    python -m experiments.patching --prompt "The man said that" --corrupted "The woman said that" \\
        --answer " he" --foil " she"
    python -m experiments.patching --texts pairs.jsonl

A line of such a file is {"clean": ..., "corrupted": ..., "answer": ..., "foil": ...}. The harness knows texts as lists
of token ids, so a pair is one list: the clean prompt's ids, the corrupted one's, the answer, the foil.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from experiments.harness.corpus import COUNTS, Texts
from experiments.harness.experiment import Experiment, Ids, Raw, Settings, Start, Study
from experiments.harness.options import AnswerOptions
from experiments.harness.table import Table
from experiments.harness.verdicts import Decision, above, all_of, below, figures_of, within
from minigpt import GPT2, Tokenizer, logit_difference

PROMPT = "The man could not sleep that night, and in the morning"
CORRUPTED = "The woman could not sleep that night, and in the morning"
ANSWER, FOIL = " he", " she"
"""The default pair, from the items of experiments/behaviour.py. Of those of ten tokens and more, this is the one that
weights/tiny told apart best: its two logit differences lay farthest from 0, on both sides. All of its words are common
enough to be single tokens, of GPT-2 as well."""
FIELDS = ("clean", "corrupted", "answer", "foil")
"""Of a line of a file of pairs."""
GROUPS = ("tokens before", "tokens that differ", "tokens between", "last token")
"""Positions before the first that differs; those in which the prompts differ; the others after it and before the last
one; the last one, which may differ too. Where positions cannot be compared between pairs, these stand in their place.
"""
BEFORE, DIFFERING, BETWEEN, LAST = GROUPS
LEAST_GAP = 0.1
"""Logits. Where the two prompts' logit differences are nearer to each other, the odds of the answer hardly depend on
the prompt (exp(0.1) = 1.1), and a share of that gap is rounding and noise: it is undefined."""
TOLD_APART = 1.0
"""Logits: a gap above this changes the odds of the answer by more than a factor e."""
ROUNDINGS = 80
"""An oracle may be off by so many roundings of the largest number that enters it; the self-check of sweeps allows as
many."""


UNDECIDED = "The interval includes the threshold, or the share is undefined, so it is undecided."
"""What is said of a share that decides nothing."""
MOST_BYTES = 2**26
"""Of recorded values, and of the values of interventions, held at once: 64 MiB each, whatever prompt and model."""


class Words(NamedTuple):
    """A pair in words."""

    clean: str
    corrupted: str
    answer: str
    foil: str


class Pair(NamedTuple):
    """A pair as token ids."""

    clean: list[int]
    corrupted: list[int]
    answer: int
    foil: int

    @classmethod
    def of(cls, ids: Sequence[int]) -> "Pair":
        """Take a list apart that `ids` has made."""
        length = len(ids) // 2 - 1
        return cls(list(ids[:length]), list(ids[length : 2 * length]), ids[-2], ids[-1])

    @classmethod
    def encoded(
        cls, words: Words, tokenizer: Tokenizer, n_positions: int, most: str = "the model's positions"
    ) -> "Pair":
        """The tokens of a pair.

        Raises ValueError for prompts that are equal, of different lengths, of one token, or longer than `n_positions`
        (`most` says what these are), and for answers that are equal or not one token each.
        """
        clean, corrupted = (tokenizer.encode(text) for text in (words.clean, words.corrupted))
        _check_prompts(words, tokenizer, clean, corrupted)
        if len(clean) > n_positions:
            raise ValueError(f"The prompts have {len(clean)} tokens, more than {n_positions}, {most}; shorten them.")
        answer, foil = (_single(tokenizer, name, getattr(words, name)) for name in ("answer", "foil"))
        if answer == foil:
            raise ValueError(f"The answer and the foil are both {words.answer!r}; give two different tokens.")
        return cls(clean, corrupted, answer, foil)

    @property
    def ids(self) -> list[int]:
        """All in one list: clean, corrupted, answer, foil."""
        return [*self.clean, *self.corrupted, self.answer, self.foil]

    @property
    def tokens(self) -> list[int]:
        """Whose logits are compared."""
        return [self.answer, self.foil]

    @property
    def groups(self) -> dict[str, list[int]]:
        """The positions of every group of `GROUPS`; empty where this pair has none."""
        last = len(self.clean) - 1
        differing = [at for at in range(last + 1) if self.clean[at] != self.corrupted[at]]
        between = [at for at in range(differing[0], last) if at not in differing]
        return dict(zip(GROUPS, ([*range(differing[0])], differing, between, [last]), strict=True))


def _check_prompts(words: Words, tokenizer: Tokenizer, clean: list[int], corrupted: list[int]) -> None:
    if len(clean) != len(corrupted):
        raise ValueError(
            f"The prompts have different lengths: {len(clean)} tokens {tokenizer.tokens(clean)} and {len(corrupted)} "
            f"tokens {tokenizer.tokens(corrupted)}; word them so that they have as many."
        )
    if clean == corrupted:
        raise ValueError(f"The two prompts are the same, {words.clean!r}; there is nothing in which they differ.")
    if len(clean) < 2:
        raise ValueError(f"The prompts {words.clean!r} and {words.corrupted!r} are one token each; give longer ones.")


def _single(tokenizer: Tokenizer, name: str, text: str) -> int:
    """The one token of an answer. Raises ValueError where there are more or none, with what would do."""
    ids = tokenizer.encode(text)
    if len(ids) == 1:
        return ids[0]
    spaced = f" {text.lstrip()}"
    better = text and spaced != text and len(tokenizer.encode(spaced)) == 1
    then = f"with a space in front, {spaced!r}, it is one" if better else "give a word that is one"
    tail = "" if better or text.startswith(" ") else "; most words are one only with a space in front"
    raise ValueError(f"The {name} {text!r} is {len(ids)} tokens {tokenizer.tokens(ids)}; expected one: {then}{tail}.")


# Of the command line, and from files.


@dataclass(frozen=True, kw_only=True)
class PairOptions(AnswerOptions):
    """The options of experiments on pairs; `--prompt` is the clean one, and calls for the answer."""

    corrupted: Annotated[str | None, typer.Option(help="a prompt of as many tokens that calls for the foil")] = None


@dataclass(frozen=True, kw_only=True)
class PairSettings(Settings):
    """What a prompt is compared with; None over a corpus, where every line says it."""

    corrupted: str | None = None
    answer: str | None = None
    foil: str | None = None

    @property
    def words(self) -> Words:
        """The pair that is not a corpus's."""
        return Words(*(given or "" for given in (self.prompt, self.corrupted, self.answer, self.foil)))


@dataclass(frozen=True)
class PairTexts(Texts):
    """A file of pairs, one JSON object a line; `window` is the most tokens of a prompt."""

    def windows(self, tokenizer: Tokenizer, counts: dict[str, int] | None = None) -> Iterator[list[int]]:
        """Every pair as one list of ids. A pair is taken whole; `tokens` counts those of the clean prompts."""
        counts = dict.fromkeys(COUNTS, 0) if counts is None else counts
        for _, pair in self.pairs(tokenizer):
            counts["texts"] += 1
            counts["windows"] += 1
            counts["tokens"] += len(pair.clean)
            yield pair.ids
            if counts["windows"] == self.limit:
                return

    def first_windows(self, tokenizer: Tokenizer, count: int) -> list[list[int]]:
        """The first few pairs. Raises ValueError when there is none."""
        if not (found := [ids for ids, _ in zip(self.windows(tokenizer), range(count), strict=False)]):
            raise ValueError(f"--texts {self.path} has no line with a pair; give one such as {_EXAMPLE}.")
        return found

    def pairs(self, tokenizer: Tokenizer) -> Iterator[tuple[int, Pair]]:
        """Every line's number and pair."""
        for number, words in read_pairs(Path(self.path)):
            try:
                yield number, Pair.encoded(words, tokenizer, self.window, "--window")
            except ValueError as error:
                raise ValueError(f"--texts {self.path}, line {number}: {error}") from None


_EXAMPLE = json.dumps(Words(PROMPT, CORRUPTED, ANSWER, FOIL)._asdict())


def read_pairs(path: Path) -> Iterator[tuple[int, Words]]:
    """The pairs of a file of JSON lines, each with its line's number.

    Raises ValueError for a file that is not one, and for a line that lacks a field.
    """
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ValueError(f"--texts {path}: expected a .jsonl file, with lines such as {_EXAMPLE}.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _words(line, f"--texts {path}, line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"--texts {path} is not UTF-8 ({error.reason}); convert it.") from None


def _words(line: str, where: str) -> Words:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no object with the fields {', '.join(FIELDS)}; write lines such as {_EXAMPLE}.")
    if missing := [name for name in FIELDS if not isinstance(found.get(name), str)]:
        raise ValueError(f"{where} has no text in {', '.join(missing)}; write lines such as {_EXAMPLE}.")
    return Words(*(found[name] for name in FIELDS))


def pair_settings(begin: Start[Any]) -> dict[str, Any]:
    """Every field of `PairSettings`. Raises ValueError for half a pair, and for one beside a corpus."""
    asked = begin.options
    given = {f"--{name}": getattr(asked, name) for name in ("prompt", "corrupted", "answer", "foil")}
    missing = [name for name, of in given.items() if of is None]
    if asked.texts and len(missing) < len(given):
        raise ValueError("--texts brings both prompts, the answer and the foil of every pair; leave the options out.")
    if 0 < len(missing) < len(given):
        raise ValueError(f"{', '.join(missing)} not given; a pair needs {', '.join(given)}, or none for the default.")
    settings = begin.settings(PROMPT)
    if not asked.texts:
        words = Words(*given.values()) if not missing else Words(PROMPT, CORRUPTED, ANSWER, FOIL)
        return {**settings, "corrupted": words.corrupted, "answer": words.answer, "foil": words.foil}
    if asked.text_column != AnswerOptions.text_column:
        raise ValueError(f"--text-column is for texts; a line of pairs has the fields {', '.join(FIELDS)}.")
    texts = PairTexts.of(asked.texts, asked.text_column, asked.window, asked.limit)
    check_told_apart(begin.model, begin.tokenizer, texts)
    return {**settings, "texts": texts}


def check_told_apart(model: GPT2, tokenizer: Tokenizer, texts: PairTexts) -> None:
    """Raise ValueError, with the numbers of their lines, for pairs whose gap is below `LEAST_GAP`.

    A share of their gap is undefined, and so would be every mean over the corpus.
    """
    if texts.window > model.config.n_positions:
        return  # the run refuses that
    found = list[str]()
    for count, (number, pair) in enumerate(texts.pairs(tokenizer), start=1):
        clean, corrupted = differences(model, pair)
        if abs(clean - corrupted) < LEAST_GAP:
            found.append(str(number))
        if count == texts.limit:
            break
    if found:
        raise ValueError(
            f"--texts {texts.path}: this model hardly tells the two prompts of line {', '.join(found)} apart (their "
            f"logit differences are less than {LEAST_GAP} apart), so no share of that can be taken; leave them out."
        )


# What is measured of a pair.


@torch.no_grad()
def differences(model: GPT2, pair: Pair) -> tuple[float, float]:
    """The logit of the answer minus that of the foil, after the clean prompt and after the corrupted one."""
    both = torch.tensor([pair.clean, pair.corrupted], device=model.device)
    model.config.check_ids(torch.tensor([pair.tokens]))
    ends = model.final_norm(model.last_depth(both)[:, -1]).double()
    logits = ends @ model.unembed.weight[pair.tokens].double().T
    clean, corrupted = logit_difference(logits, 0, 1).tolist()
    return clean, corrupted


def share_of(change: torch.Tensor, gap: float) -> torch.Tensor:
    """A change of the logit difference as a share of the gap; not a number where that is below `LEAST_GAP`."""
    if abs(gap) < LEAST_GAP:
        return torch.full_like(change, torch.nan)
    return change / gap + 0.0  # nothing of a negative gap is -0.0, which reads badly


class PairExperiment(Experiment[Raw]):
    """An experiment on pairs."""

    settings: PairSettings

    def encode(self, tokenizer: Tokenizer, n_positions: int) -> list[int]:
        """The pair as one list of ids. Raises ValueError as `Pair.encoded` does."""
        return Pair.encoded(self.settings.words, tokenizer, n_positions).ids

    def shown(self, ids: Sequence[int]) -> list[int]:
        """The clean prompt's tokens."""
        return Pair.of(ids).clean

    @property
    def alone(self) -> bool:
        """Whether there is one pair, of which every position can be shown."""
        return self.settings.texts is None

    def ends_in_words(self, study: Study[Raw]) -> Iterator[str]:
        """The logit differences after both prompts, from the table `ends`, for a terminal."""
        clean, corrupted = (within(study.tables["ends"].at(run=run)) for run in ("clean", "corrupted"))
        asked = self.settings
        if not self.alone:
            yield f"logit of the answer minus that of the foil: {clean} after clean prompts,"
            yield f"  {corrupted} after corrupted ones"
            return
        yield f"logit of {asked.answer!r} minus that of {asked.foil!r}: {clean} after {asked.prompt!r},"
        yield f"  {corrupted} after {asked.corrupted!r}"

    def undefined_in_words(self, study: Study[Raw], axis: str, groups: Sequence[str]) -> Iterator[str]:
        """Why numbers are undefined, where they are: from the tables `ends` and `there`."""
        if self.alone and abs(float(study.tables["ends"].at(run="gap").value)) < LEAST_GAP:
            yield f"Shares of the gap are undefined: the logit differences are less than {LEAST_GAP} apart."
        for group in groups:
            share = float(study.tables["there"].at(**{axis: group}).value)
            if share < 1:
                lacking = round((1 - share) * (study.windows or 1))
                whose = "the pair has" if self.alone else f"of {study.windows} pairs {lacking} have"
                yield f"{group}: undefined, {whose} none."


def pairs_of(ids: Ids) -> list[Pair]:
    """The pairs of some windows."""
    return [Pair.of(text) for text in ids]


def told_apart(clean: Table, gap: Table) -> Decision:
    """Whether the model gives the clean prompt another logit difference than the corrupted one, in the right sense."""
    outcome = all_of(above(gap, TOLD_APART), below(gap, TOLD_APART))
    sentences = {
        "holds": "The two prompts move the model to the answers that they call for.",
        "does not hold": "The model hardly tells the two prompts apart, or the wrong way round: the shares say little.",
    }
    return Decision(
        outcome,
        sentences.get(outcome, "The interval includes the threshold."),
        f"The logit difference is {within(clean)} after the clean prompt, and {within(gap)} more than after the "
        f"corrupted one; the claim needs {TOLD_APART:g}.",
        figures_of(clean=clean, gap=gap),
        "last",
    )


def top_heads(heads: Table, count: int) -> list[tuple[str, Table]]:
    """The heads with the largest numbers of a table [layer, head], by name, largest first."""
    n_head = len(heads.axes["head"])
    order = heads.value.flatten().nan_to_num(-torch.inf).argsort(descending=True, stable=True)[:count].tolist()
    places = [divmod(index, n_head) for index in order]
    return [(f"head {head} of block {layer}", heads.at(layer=layer, head=head)) for layer, head in places]


def chunked(items: Sequence[Any], bytes_each: int) -> Iterator[list[Any]]:
    """The items in order, so many at a time that they take `MOST_BYTES` at most; one at least."""
    count = max(1, MOST_BYTES // bytes_each)
    for first in range(0, len(items), count):
        yield list(items[first : first + count])


def by_block(table: Table, axis: str) -> Iterator[str]:
    """A table [layer, ...] for a terminal: a line for each block, a column for each label of the other axis."""
    others, layers = list(table.axes[axis]), table.axes["layer"]
    rows = [["", *map(str, others)]]
    rows += [[f"block {layer}", *(within(table.at(layer=layer, **{axis: of})) for of in others)] for layer in layers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
