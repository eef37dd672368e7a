"""What an experiment is, and what its run consists of; an experiment itself says what it measures and what follows.

A run certifies parity with Hugging Face, measures one prompt, or every window of a corpus, tries the
measurement against what must be true of any weights, judges the claims, and writes a summary, a table,
figures and a report, all or nothing.

    class MyExperiment(Experiment): ...       # name, question, run, measure; and what else it has
    main = command(MyExperiment)              # of `harness.command`: with the options that all share
"""

import csv
import importlib.util
import itertools
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import typer
from torch import Tensor

from experiments.harness.corpus import (
    BOOTSTRAP,
    Shards,
    Survey,
    Texts,
    digest_of_numbers,
    measure_corpus,
    remove_windows,
)
from experiments.harness.digest import code_digest
from experiments.harness.options import Options, parse_indices
from experiments.harness.output import SUMMARY, WINDOWS, claimed, results_in, sha256_of
from experiments.harness.ranks import Ranks
from experiments.harness.table import Row, Tables, of_text, of_windows
from experiments.harness.verdicts import Verdict, lines_of
from experiments.page.figures import Figures, save_figures
from minigpt import GPT2, Sweep, Tokenizer, parity
from minigpt.files import printable
from minigpt.model import block_name
from minigpt.parameters import parameter_name
from minigpt.selfcheck import self_check

PROMPT = "The old gentleman sat down by the fire, and read the letter which his daughter had sent him."
REPORT = "report.html"
CHECKED_WINDOWS = 2
"""Of a corpus: enough to try the oracles on a batch."""
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
        parameter_name(self.model, 0, given)
        return given

    def layers(self, given: str) -> tuple[int, ...]:
        """The layers of a list."""
        return parse_indices(given, self.model.config.n_layer, "layer")

    def indices(self, given: str, what: str) -> tuple[int, ...] | None:
        """The indices of a list, or None for `all`: of heads or positions."""
        count = {"head": self.model.config.n_head, "position": self.model.config.n_positions}[what]
        return None if given == "all" else parse_indices(given, count, what)


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
            return f"mean over {self.counts['windows']} windows, with its 95 % interval"
        return f"one prompt of {len(self.tokens)} tokens"


class Experiment(ABC, Generic[Raw]):
    """One question about a model. Subclasses say what to run, what to keep of every text, and what follows."""

    name: ClassVar[str]
    """Of the table (name.csv), of the figures (name_*.png), and of the folder in results/."""
    question: ClassVar[str]
    """In one sentence: the report's title."""
    options: ClassVar[type[Options]] = Options
    """The options of its command line."""

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
        return (*_tables_and_charts(self.name), "sweep.safetensors", REPORT, WINDOWS)


def run_prompt(experiment: Experiment[Raw], model: GPT2, tokenizer: Tokenizer) -> Study[Raw]:
    """Certify, run one prompt, check, measure.

    Raises ValueError for a prompt or a grid out of range, CheckError when parity or a self-check fails.
    """
    settings, code = experiment.settings, code_digest(experiment, model)
    ids = experiment.encode(tokenizer, model.config.n_positions)
    certificate = certify(settings, model)
    raw = experiment.run(model, [ids], alone=True)
    checked = _checked(experiment, model, raw, certificate)
    tables = of_text(experiment.measure(model, raw))
    _still_certified(certificate, model)
    return Study(settings, describe(model), tokenizer.tokens(ids), {}, checked, tables, raw, tokenizer, code)


def run_over_corpus(
    experiment: Experiment[Raw],
    model: GPT2,
    tokenizer: Tokenizer,
    output: Path,
    ranks: Ranks,
    held: ExitStack,
    overwrite: bool = False,
) -> Study[Raw] | None:
    """Certify, check on the first windows, measure every window, combine; None on all ranks but the first.

    `held` keeps the output folder for this run alone until it is closed: to the end of `write`.

    Raises as `run_prompt` does, and ValueError for texts that cannot be read and for windows of other settings.
    """
    settings, texts, most = experiment.settings, experiment.settings.texts, model.config.n_positions
    if texts is None or texts.window > most:
        raise ValueError(f"--window is longer than the model's {most} positions; take a shorter one.")
    tried, code = list[tuple[Raw, Checked, Tables]](), code_digest(experiment, model)

    def prepare() -> dict[str, Any]:
        held.enter_context(claimed(output, settings.to_json(), code, overwrite, experiment.files))
        certificate = certify(settings, model)
        raw = experiment.run(model, texts.first_windows(tokenizer, CHECKED_WINDOWS), alone=False)
        tables = experiment.measure(model, raw)
        tried.append((raw, _checked(experiment, model, raw, certificate), tables))
        return {"first_numbers": digest_of_numbers({}, {name: table.value for name, table in tables.items()})}

    shards = Shards(output / WINDOWS, _identity(experiment, model, code))

    def measure(windows: Ids) -> dict[str, Tensor]:
        tables = experiment.measure(model, experiment.run(model, windows, alone=False))
        return {name: table.value for name, table in tables.items()}

    measured = measure_corpus(
        texts, tokenizer, shards, ranks, prepare, measure, overwrite=overwrite, quiet=not experiment.progress
    )
    if measured is None:
        return None
    (raw, checked, axes), counts = tried[0], measured[1].counts
    tables = _combined(model, *measured, axes, checked.certificate)
    return Study(settings, describe(model), [], counts, checked, tables, raw, tokenizer, code)


def _combined(
    model: GPT2, shards: Shards, survey: Survey, axes: Tables, certificate: parity.Certificate | None
) -> Tables:
    """What all shards make together, on the axes of what was measured of the first windows."""
    try:
        _still_certified(certificate, model)
    except parity.CheckError:
        remove_windows(shards.folder)  # or a later run would take the windows up
        raise
    return of_windows(axes, shards.combine(survey), survey.counts["windows"])


def _identity(experiment: Experiment[Any], model: GPT2, code: str) -> dict[str, Any]:
    """All that decides the numbers of a window, but for the windows: what it takes to go on with another run's."""
    asked = experiment.settings.to_json()
    asked = {name: value for name, value in asked.items() if name not in ("model", "parity", "revision")}
    asked["texts"] = {name: value for name, value in asked["texts"].items() if name != "path"}
    cuda = experiment.settings.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    origin = {"weights": parity.fingerprint(model), "versions": versions(), "processor": where, "code": code}
    return {"experiment": experiment.name, **asked, **origin, "arithmetic": _arithmetic()}


def _arithmetic() -> dict[str, Any]:
    """PyTorch's switches by which the same product comes out otherwise."""
    cuda = torch.backends.cuda
    return {
        "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float16 sums": str(cuda.matmul.allow_fp16_reduced_precision_reduction),
        "bfloat16 sums": str(cuda.matmul.allow_bf16_reduced_precision_reduction),
        "attention": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()],
    }


def certify(settings: Settings, model: GPT2) -> parity.Certificate | None:
    """The parity certificate, where one is asked for; CheckError when the model fails.

    A model with blocks of its own has nothing to be compared with, and runs.
    """
    certificate = parity.certify(model) if settings.parity else None
    if certificate and not certificate.may_run:
        raise parity.CheckError(f"parity {certificate.sentence()} The study does not run; --no-parity overrides this.")
    return certificate


def _still_certified(certificate: parity.Certificate | None, model: GPT2) -> None:
    """Raise CheckError when the weights are no longer those that were certified."""
    if certificate and certificate.passed and not certificate.holds_for(model):
        raise parity.CheckError(
            "the weights were edited after the model was certified, so the certificate says nothing about these "
            "numbers. Edit first and certify then; --no-parity runs without."
        )


def _checked(experiment: Experiment[Raw], model: GPT2, raw: Raw, certificate: parity.Certificate | None) -> Checked:
    found = experiment.check(model, raw)
    return Checked(certificate, found.checks, found.details)


def self_checked(model: GPT2, result: Sweep) -> Checked:
    """Try a sweep against what must be true of any weights. Raises CheckError when it is not."""
    tried = self_check(model, result)
    if tried.broken:
        found = "; ".join(f"{check.claim}: {check.figure}" for check in tried.broken)
        raise parity.CheckError(f"the sweep contradicts what must be true of any weights: {found}.")
    return Checked(None, [asdict(check) for check in tried.checks], {"upstream": tried.upstream})


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    packages = ("minigpt", "torch", "numpy", "safetensors", "tokenizers", "transformers")
    return {"python": platform.python_version(), **parity.installed(*packages)}


def describe(model: GPT2) -> dict[str, Any]:
    """What ran: the checkpoint's origin and hashes, and the model's shape."""
    origin: dict[str, Any] = {}
    if source := model.source:
        origin = {"name": source.name, "repository": source.repository, "commit": source.commit}
        origin["sha256"] = source.sha256
    return {**origin, "config": model.config.to_dict(block_name(model.block))}


def summary(experiment: Experiment[Raw], study: Study[Raw]) -> dict[str, Any]:
    """All but the numbers themselves, for summary.json."""
    certificate = study.checked.certificate
    return {
        "experiment": experiment.name,
        "settings": study.settings.to_json(),
        "model": study.model,
        **({"tokens": study.tokens} if study.tokens else {"corpus": study.counts, "interval": BOOTSTRAP}),
        "parity": certificate.to_dict() if certificate else "not checked (--no-parity)",
        "checks": study.checked.checks,
        **experiment.summary(study),
        "verdicts": [verdict.to_json() for verdict in verdicts(experiment, study)],
        "versions": versions(),
        "code": study.code,
        "threads": torch.get_num_threads(),
        "command": experiment.command,
    }


def verdicts(experiment: Experiment[Raw], study: Study[Raw]) -> list[Verdict]:
    """What became of each claim; over too few windows for an interval, undecided."""
    return [verdict.over(study.windows) for verdict in experiment.verdicts(study)]


def write(experiment: Experiment[Raw], study: Study[Raw], folder: Path) -> list[str]:
    """Write every result into a folder, all or nothing; returns the files' names."""
    rows = list(experiment.rows(study))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    said = summary(experiment, study)
    with results_in(folder) as scratch:
        with (scratch / f"{experiment.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        experiment.save(study, scratch)
        _draw(experiment, study, said, scratch)
        said["files"] = {path.name: sha256_of(path) for path in sorted(scratch.iterdir())}
        (scratch / SUMMARY).write_text(json.dumps(said, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if not study.counts:
        remove_windows(folder / WINDOWS)
    return sorted([*said["files"], SUMMARY])


def _tables_and_charts(name: str) -> list[str]:
    """Patterns of an experiment's files, narrow enough to leave a stranger's alone."""
    return [f"{name}.csv", f"{name}_*.png", f"{name}_*.svg"]


def can_draw() -> bool:
    """Whether the libraries that draw the figures and the report are installed."""
    return all(importlib.util.find_spec(package) for package in ("altair", "vl_convert"))


def _draw(experiment: Experiment[Raw], study: Study[Raw], said: dict[str, Any], folder: Path) -> None:
    """The figures and the report, where the libraries that draw them are installed."""
    if not can_draw():
        typer.echo("No figures and no report: install Altair with pip install -e '.[report]'.", err=True)
        return
    from experiments.page import report  # noqa: PLC0415  an extra

    figures = experiment.figures(study)
    save_figures(figures, experiment.name, folder)
    rows = list(itertools.islice(experiment.rows(study), FEW_ROWS)) if not figures.figures else []
    page = report.page(experiment.question, said, figures, study.basis, rows)
    (folder / REPORT).write_text(page, encoding="utf-8")


def show(experiment: Experiment[Raw], study: Study[Raw], columns: int) -> Iterator[str]:
    """What the terminal shows of a finished run, line by line."""
    settings, checked = study.settings, study.checked
    shape = f"{study.n_layer} blocks, {study.model['config']['n_embd']} wide"
    counts = study.counts
    ran = (
        f"{counts['windows']} windows of up to {settings.texts.window} tokens ({counts['tokens']} tokens of "
        f"{counts['texts']} texts; {counts['skipped']} pieces of less than {settings.texts.shortest} skipped)"
        if settings.texts
        else f"prompt of {len(study.tokens)} tokens:"
    )
    yield f"{settings.model} ({shape}, {settings.dtype}, {settings.device}), {ran}"
    if study.tokens:
        yield "  " + printable(" | ".join(study.tokens)).replace("\n", "\\n").replace("\t", "\\t")
    yield f"parity: {checked.certificate.sentence() if checked.certificate else 'not checked (--no-parity)'}"
    if checked.checks:
        yield "checks, all hold:"
        yield from (f"  - {check['claim']}" for check in checked.checks)
    yield from experiment.lines(study, columns)
    yield from lines_of(verdicts(experiment, study), columns)
