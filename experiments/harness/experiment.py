"""What an experiment is: what was asked for, what it measures, and what a finished run of it holds.

    class MyExperiment(Experiment): ...       # name, question, run, measure; and what else it has
    main = command(MyExperiment)              # of `harness.command`: with the options that all share

`harness.running` runs it, and `harness.writing` writes and shows what came of it.
"""

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch

from experiments.harness.corpus import Texts
from experiments.harness.options import Options, parse_indices
from experiments.harness.output import WINDOWS
from experiments.harness.table import Row, Tables
from experiments.harness.verdicts import Verdict, counted
from experiments.page.figures import Figures
from minigpt import GPT2, Tokenizer, parity
from minigpt.model import block_name
from minigpt.parameters import Native, natives, parameter_name

PROMPT = "The old gentleman sat down by the fire, and read the letter which his daughter had sent him."
REPORT = "report.html"
FEW_ROWS = 20
"""Of the table, shown where an experiment shows nothing of its own."""
SHORTEST = 3
"""Tokens of a window: a first one, a second one, and one for the second to predict."""

Ids = Sequence[Sequence[int]]
Raw = TypeVar("Raw")
"""What an experiment's run of some texts leaves, before it is cut down to numbers per text."""
Asked = TypeVar("Asked", bound=Options)
"""The options of an experiment."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for; two runs with equal settings may replace each other's results. Experiments add fields."""

    model: str
    prompt: str | None
    dtype: str = "float32"
    device: str = "cpu"
    revision: str | None = None
    block: str | None = None
    """Of what the model is made, where it is not GPT-2's own: package.module:Name."""
    parity: bool = True
    matmul_precision: str = "highest"
    texts: Texts | None = None
    max_bytes: int | None = None
    threads: int | None = None
    """Of each process, over a corpus on CPUs: another number gives other last bits."""

    def to_json(self) -> dict[str, Any]:
        """The settings as a summary holds them."""
        return json.loads(json.dumps(asdict(self)))


class Answers(NamedTuple):
    """Two tokens after a prompt, whose logits are subtracted: the answer's less the foil's."""

    answer: int
    foil: int


@dataclass(frozen=True)
class Start(Generic[Asked]):
    """What an experiment begins with: the model, and what was asked for."""

    model: GPT2
    tokenizer: Tokenizer
    options: Asked
    device: torch.device

    def settings(self, prompt: str = PROMPT, shortest: int = SHORTEST) -> dict[str, Any]:
        """Every field of `Settings`; `prompt` is the default one, `shortest` the fewest tokens of a window."""
        asked, on_cpu = self.options, self.device.type == "cpu"
        most = default_max_bytes(self.device) if asked.texts and asked.max_bytes is None else asked.max_bytes
        given = prompt if asked.prompt is None else asked.prompt
        return {
            "model": asked.model,
            "prompt": None if asked.texts else given,
            "dtype": asked.dtype,
            "device": self.device.type,
            "revision": asked.revision,
            "block": block_name(self.model.block),
            "parity": not asked.no_parity,
            "matmul_precision": asked.matmul_precision,
            "texts": asked.texts and Texts.of(asked.texts, asked.text_column, asked.window, asked.limit, shortest),
            "max_bytes": most,
            "threads": torch.get_num_threads() if asked.texts and on_cpu else None,
        }

    def site(self, given: str) -> str:
        """A site that the model has. Raises ValueError for another."""
        return self.native(given).site

    def layers(self, given: str) -> tuple[int, ...]:
        """The layers of a list."""
        return parse_indices(given, self.model.config.n_layer, "layer")

    def positions(self, given: str) -> tuple[int, ...] | None:
        """The positions of a list, or None for `all`."""
        return None if given == "all" else parse_indices(given, self.model.config.n_positions, "position")

    def indices(self, given: str, site: str) -> tuple[int, ...] | None:
        """Which entries of a site a list names, such as heads, or None for `all`.

        Raises ValueError for a list where the site has no entries of its own.
        """
        native = self.native(site)
        if given == "all":
            return None
        if native.index is None:
            raise ValueError(f"--indices {given}: the site {site!r} is scaled as a whole, so leave --indices out.")
        return parse_indices(given, native.entries(self.model.config), native.index, "--indices")

    def native(self, site: str) -> Native:
        """The declaration of a site's scale. Raises ValueError for a site that the model does not have."""
        return natives(self.model)[parameter_name(self.model, 0, site)]


def default_max_bytes(device: torch.device) -> int:
    """Memory for a pass that does not depend on what is free, so that every run splits its cells alike."""
    return torch.cuda.mem_get_info(device)[1] // 4 if device.type == "cuda" else 2**30


def encode_prompt(tokenizer: Tokenizer, prompt: str, n_positions: int) -> list[int]:
    """Token ids of a prompt that leaves something to measure.

    Raises ValueError for an empty prompt, a single token, and one longer than the model's positions.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("The prompt is empty; give a sentence.")
    if len(ids) == 1:
        raise ValueError(f"The prompt {prompt!r} is one token; nothing is left without the first: give a longer one.")
    if len(ids) > n_positions:
        raise ValueError(f"The prompt has {len(ids)} tokens; the model has {n_positions} positions: shorten it.")
    return ids


def one_token(tokenizer: Tokenizer, text: str, option: str) -> int:
    """The token that an option names. Raises ValueError for a text of several, or of none."""
    ids = tokenizer.encode(text)
    if len(ids) == 1:
        return ids[0]
    parts, spaced = " | ".join(tokenizer.tokens(ids)), f" {text}"
    hint = f": {spaced!r} is one" if len(tokenizer.encode(spaced)) == 1 else ""
    raise ValueError(f"{option} {text!r} is {len(ids)} tokens ({parts}); give one token{hint}.")


def answers_of(begin: Start[Any]) -> Answers | None:
    """The tokens of --answer and --foil, where they were given.

    Raises ValueError for one without the other, over a corpus, and for what is not one token.
    """
    options = begin.options
    if options.answer is None and options.foil is None:
        return None
    if options.texts:
        raise ValueError("--answer and --foil belong to a prompt; over a corpus every text goes on in its own way.")
    if options.answer is None or options.foil is None:
        given, missing = ("--foil", "--answer") if options.answer is None else ("--answer", "--foil")
        raise ValueError(f"{given} was given without {missing}; a logit difference takes two tokens: give both.")
    answer, foil = (one_token(begin.tokenizer, getattr(options, name), f"--{name}") for name in Answers._fields)
    return Answers(answer, foil)


@dataclass(frozen=True)
class Checked:
    """What was tried before the numbers are believed."""

    certificate: parity.Certificate | None = None
    checks: list[dict[str, Any]] = field(default_factory=list)
    """Claims about any weights, each with `passed` and `figure`."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the experiment's verdicts and summary need of them."""


@dataclass(frozen=True)
class Study(Generic[Raw]):
    """A finished run, and all that its files are made of."""

    settings: Settings
    model: dict[str, Any]
    tokens: list[str]
    """Of the prompt; empty over a corpus."""
    counts: dict[str, int]
    """Texts, windows, tokens and pieces skipped; empty for a prompt."""
    checked: Checked
    tables: Tables
    """All numbers that were measured; what is shown, judged and written reads them here."""
    raw: Raw
    """Of the prompt; over a corpus, of the windows that were checked."""
    tokenizer: Tokenizer
    code: str = ""
    """The digest of the code that computed the numbers."""
    rounding: str = ""
    """What the tables' errors are, in words."""

    @property
    def windows(self) -> int | None:
        """How many windows the numbers are means of; None for a prompt."""
        return self.counts["windows"] if self.counts else None

    @property
    def n_layer(self) -> int:
        """How many blocks the model has."""
        return int(self.model["config"]["n_layer"])

    @property
    def basis(self) -> str:
        """What the numbers rest on, in words."""
        if self.counts:
            return f"mean over {counted(self.counts['windows'], 'window')}, with its 95 % interval"
        return f"one prompt of {len(self.tokens)} tokens"


class Experiment(ABC, Generic[Raw]):
    """One question about a model. Subclasses say what to run, what to keep of every text, and what follows."""

    name: ClassVar[str]
    """Of the table (name.csv), of the figures (name_*.png), and of the folder in results/."""
    question: ClassVar[str]
    """In one sentence: the report's title."""
    options: ClassVar[type[Options]] = Options
    """The options of its command line."""
    lectures: ClassVar[Mapping[str, Mapping[str, str | bool]]] = {}
    """What `--lecture NAME` sets: options and their values. What is typed beside it wins."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.progress = False
        """Whether a bar is shown while it runs."""
        self.command = f"{self.name}, called from Python"
        """How the run was started, as one would type it again."""

    @classmethod
    def from_options(cls, begin: Start[Any]) -> "Experiment[Raw]":
        """The experiment that was asked for. Raises ValueError for options that make no sense."""
        return cls(Settings(**begin.settings()))

    def encode(self, tokenizer: Tokenizer, n_positions: int) -> list[int]:
        """The prompt's token ids. Raises ValueError for one that leaves nothing to measure, or is too long."""
        return encode_prompt(tokenizer, self.settings.prompt or "", n_positions)

    def shown(self, ids: Sequence[int]) -> list[int]:
        """The tokens of the encoded prompt that terminal, page and summary show; here all of them."""
        return list(ids)

    @abstractmethod
    def run(self, model: GPT2, ids: Ids, alone: bool) -> Raw:
        """Run some texts; `alone` says that they are the one prompt, of which a report can show more."""

    @abstractmethod
    def measure(self, model: GPT2, raw: Raw) -> Tables:
        """The numbers to keep of every text: tables whose first axis is the text, as `by_text` makes them."""

    def check(self, model: GPT2, raw: Raw) -> Checked:  # noqa: ARG002  for those who override it
        """Try a run against what must be true of any weights. Raises CheckError when it is not."""
        return Checked()

    def rows(self, study: Study[Raw]) -> Iterator[Row]:
        """The rows of the file, one number each; here of all tables, with their names as `metric`."""
        for name, table in study.tables.items():
            yield from table.rows(metric=name)

    def verdicts(self, study: Study[Raw]) -> list[Verdict]:  # noqa: ARG002
        """What became of each claim."""
        return []

    def lines(self, study: Study[Raw], columns: int) -> Iterator[str]:  # noqa: ARG002
        """What the terminal shows above the verdicts, at most so many characters wide; here the first rows."""
        for row in itertools.islice(self.rows(study), FEW_ROWS):
            yield "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )

    def figures(self, study: Study[Raw]) -> Figures:  # noqa: ARG002
        """The charts of the report, which are also saved as PNG and SVG."""
        return Figures()

    def summary(self, study: Study[Raw]) -> dict[str, Any]:  # noqa: ARG002
        """What summary.json says beyond what all experiments say."""
        return {}

    def save(self, study: Study[Raw], folder: Path) -> None:
        """Write further files into a folder."""

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of all that a run writes besides its summary."""
        return (f"{self.name}.csv", f"{self.name}_*.png", f"{self.name}_*.svg", "sweep.safetensors", REPORT, WINDOWS)
