"""The study: scale the output of an early block, and follow the change to the last layer.

    python -m experiments.divergence --model weights/tiny --layers 2 --factors 0.5:1.5:0.05

After a lecture of Mike X Cohen's course on language model mechanisms (notebook
part6_hiddenStates_scalingImpact). Parity with Hugging Face is certified first; the sweep is checked
against what must be true of any weights; then five claims about the change get a verdict each.
"""

import csv
import importlib.util
import json
import platform
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from experiments import claims
from experiments.common import (
    SUMMARY,
    check_output,
    encode_prompt,
    parse_indices,
    parse_numbers,
    results_in,
)
from experiments.corpus import BOOTSTRAP, Ranks, Shards, default_max_bytes, joined_ranks, measure_corpus, rank_device
from experiments.curves import Curves, describe_entry, measure
from experiments.texts import Texts
from minigpt import GPT2, Sweep, Tokenizer, cli, parity, sweep
from minigpt.fanout import Place
from minigpt.scales import Site, check_site
from minigpt.selfcheck import CellError, rounding_errors, self_check

PROMPT = "The old gentleman sat down by the fire, and read the letter which his daughter had sent him."
WINDOWS = "windows"
"""The folder within the output folder that holds what a corpus run has measured so far."""
FILES = ("divergence*", "sweep.safetensors", WINDOWS)
"""What a run writes besides its summary."""
PRECISIONS = ("highest", "high", "medium")
CHECKED_WINDOWS = 2
"""Of a corpus: enough to try the oracles on a batch."""


@dataclass(frozen=True)
class Settings:
    """What was asked for; two runs with equal settings may replace each other's results."""

    model: str
    prompt: str | None
    layers: tuple[int, ...]
    factors: tuple[float, ...]
    site: Site
    dtype: str
    device: str
    revision: str | None
    parity: bool
    heads: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    matmul_precision: str = "highest"
    texts: Texts | None = None
    max_bytes: int | None = None
    threads: int | None = None
    """Of each process, over a corpus on CPUs: another number gives other last bits."""

    def to_json(self) -> dict[str, Any]:
        """The settings as a summary holds them."""
        return json.loads(json.dumps(asdict(self)))

    def sweep(self, model: GPT2, ids: torch.Tensor | Sequence[Sequence[int]], progress: bool = False) -> Sweep:
        """Run the grid on some texts."""
        bar = partial(_bar, progress)
        grid = (self.layers, self.factors, self.site, self.heads, self.positions)
        return sweep(model, ids, *grid, max_bytes=self.max_bytes, progress=bar)


@dataclass(frozen=True)
class Checked:
    """What was tried before the study's numbers are believed."""

    certificate: parity.Certificate | None
    checks: list[dict[str, Any]]
    upstream: tuple[float, ...]
    """For every entry, the largest difference before its site, of a run that shares nothing with the clean one."""
    rounding: list[CellError] = field(default_factory=list)
    """In half precision, or with products in a lower one: a few cells beside float32."""


@dataclass(frozen=True)
class Study:
    """A finished study: its curves, and everything that was concluded from them."""

    settings: Settings
    model: dict[str, Any]
    tokens: list[str]
    """Of the prompt; empty over a corpus."""
    counts: dict[str, int]
    """Texts, windows, tokens and pieces skipped; empty for a prompt."""
    checked: Checked
    curves: Curves
    result: Sweep
    """Of the prompt; over a corpus, of the windows that were checked."""

    @property
    def verdicts(self) -> list[claims.Verdict]:
        """Every claim's verdict for every studied site."""
        return claims.judge(self.curves, self.checked.upstream)

    def summary(self) -> dict[str, Any]:
        """All but the numbers by depth, for summary.json."""
        certificate = self.checked.certificate
        return {
            "settings": self.settings.to_json(),
            "model": self.model,
            **({"tokens": self.tokens} if self.tokens else {"corpus": self.counts, "interval": BOOTSTRAP}),
            "parity": certificate.to_dict() if certificate else "not checked (--no-parity)",
            "factors_not_run": list(self.result.not_run),  # the clean run itself
            "checks": self.checked.checks,
            **({"rounding": [asdict(error) for error in self.checked.rounding]} if self.checked.rounding else {}),
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    packages = ("minigpt", "torch", "numpy", "safetensors", "tokenizers", "transformers")
    return {"python": platform.python_version(), **parity.installed(*packages)}


def run_study(settings: Settings, model: GPT2, tokenizer: Tokenizer, progress: bool = False) -> Study:
    """Certify, sweep one prompt, check, judge.

    Raises ValueError for a prompt or a grid out of range, CheckError when parity or a self-check fails.
    """
    ids = encode_prompt(tokenizer, settings.prompt or "", model.config.n_positions)
    certificate = certify(settings, model)
    result = settings.sweep(model, torch.tensor([ids], device=model.final_norm.weight.device), progress)
    checked = check(settings, model, result, certificate)
    return Study(settings, describe(model), tokenizer.tokens(ids), {}, checked, Curves.of_text(result), result)


def run_over_corpus(
    settings: Settings, model: GPT2, tokenizer: Tokenizer, output: Path, ranks: Ranks, overwrite: bool, progress: bool
) -> Study | None:
    """Certify, check on the first windows, measure every window, combine, judge; None on all ranks but the first.

    Raises as `run_study` does, and ValueError for texts that cannot be read and for windows of other settings.
    """
    texts, tried = settings.texts, list[tuple[Sweep, Checked]]()
    if texts is None or texts.window > model.config.n_positions:
        raise ValueError(
            f"--window is longer than the model's {model.config.n_positions} positions; take a shorter one."
        )

    def prepare() -> None:
        check_output(output, settings.to_json(), overwrite, FILES)
        certificate = certify(settings, model)
        first = texts.first_windows(tokenizer, CHECKED_WINDOWS)
        result = settings.sweep(model, first)
        tried.append((result, check(settings, model, result, certificate)))

    shards = Shards(output / WINDOWS, _identity(settings, model))
    counts = measure_corpus(
        texts,
        tokenizer,
        shards,
        ranks,
        prepare,
        lambda windows: measure(settings.sweep(model, windows)),
        overwrite=overwrite,
        quiet=not progress,
    )
    if not tried:
        return None
    ((result, checked),) = tried
    curves = Curves.of_windows(result, shards.combine(counts["windows"]), counts["windows"])
    return Study(settings, describe(model), [], counts, checked, curves, result)


def _identity(settings: Settings, model: GPT2) -> dict[str, Any]:
    """All that decides the numbers of a window: what it takes to go on with another run's."""
    asked = {name: value for name, value in settings.to_json().items() if name not in ("model", "parity", "revision")}
    asked["texts"] = {name: value for name, value in asked["texts"].items() if name != "path"}
    where = torch.cuda.get_device_name() if settings.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {**asked, "sha256": describe(model).get("sha256"), "versions": versions(), "processor": where}


def certify(settings: Settings, model: GPT2) -> parity.Certificate | None:
    """The parity certificate, where one is asked for; CheckError when the model fails."""
    certificate = parity.certify(model) if settings.parity else None
    if certificate and not certificate.passed:
        raise parity.CheckError(f"parity {certificate.sentence()} The study does not run; --no-parity overrides this.")
    return certificate


def check(settings: Settings, model: GPT2, result: Sweep, certificate: parity.Certificate | None) -> Checked:
    """Try a sweep against what must be true of any weights, and half precision against float32."""
    tried = self_check(model, result)
    if tried.broken:
        found = "; ".join(f"{check.claim}: {check.figure}" for check in tried.broken)
        raise parity.CheckError(f"the sweep contradicts what must be true of any weights: {found}.")
    lower = settings.dtype in ("bfloat16", "float16") or settings.matmul_precision != "highest"
    rounding = _rounding(settings, model, result) if lower else []
    return Checked(certificate, [asdict(check) for check in tried.checks], tried.upstream, rounding)


def _rounding(settings: Settings, model: GPT2, result: Sweep) -> list[CellError]:
    """A few cells beside float32 with products in full precision."""
    device = model.final_norm.weight.device
    torch.set_float32_matmul_precision("highest")
    try:
        exact = GPT2.from_pretrained(settings.model, settings.revision, device, local_files_only=True)
        return rounding_errors(exact, result)
    finally:
        torch.set_float32_matmul_precision(settings.matmul_precision)


def _bar(shown: bool, places: Iterable[Place], total: int) -> Iterable[Place]:
    return tqdm(places, total=total, unit="depth", leave=False, disable=None if shown else True)


def describe(model: GPT2) -> dict[str, Any]:
    """What ran: the checkpoint's origin and hashes, and the model's shape."""
    origin: dict[str, Any] = {}
    if source := model.source:
        origin = {"name": source.name, "repository": source.repository, "commit": source.commit}
        origin["sha256"] = source.sha256
    return {**origin, "config": model.config.to_dict()}


def write(study: Study, folder: Path) -> list[str]:
    """Write every result into a folder, all or nothing; returns the files' names."""
    rows = list(study.curves.rows(study.settings.model))
    with results_in(folder, [name for name in FILES if name != WINDOWS or not study.counts]) as scratch:
        with (scratch / "divergence.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        if not study.counts:
            study.result.save(scratch / "sweep.safetensors")
        _draw(rows, study, scratch)
        (scratch / SUMMARY).write_text(json.dumps(study.summary(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return sorted(path.name for path in scratch.iterdir())


def _draw(rows: list[dict[str, Any]], study: Study, folder: Path) -> None:
    """The figures, where the libraries that draw them are installed."""
    if not all(importlib.util.find_spec(package) for package in ("altair", "vl_convert")):
        typer.echo("No figures are drawn: install Altair with pip install -e '.[report]'.", err=True)
        return
    from experiments import report  # noqa: PLC0415  an extra

    about = (
        f"mean over {study.counts['windows']} windows and its 95 % interval, the first token of each left out"
        if study.counts
        else f"{len(study.tokens)} tokens, the first left out"
    )
    report.draw(rows, study.curves, f"{study.settings.model}, {about}", folder)


def print_study(study: Study, columns: int) -> None:
    """Parity, the table depth x factor of the first entry, its verdicts, and the others' in a line each."""
    settings, checked, verdicts = study.settings, study.checked, study.verdicts
    shape = f"{study.model['config']['n_layer']} blocks, {study.model['config']['n_embd']} wide"
    counts = study.counts
    ran = (
        f"{counts['windows']} windows of up to {settings.texts.window} tokens ({counts['tokens']} tokens of "
        f"{counts['texts']} texts; {counts['skipped']} pieces of less than {settings.texts.shortest} skipped)"
        if settings.texts
        else f"prompt of {len(study.tokens)} tokens:"
    )
    print(f"{settings.model} ({shape}, {settings.dtype}, {settings.device}), {ran}")
    if study.tokens:
        print(f"  {' | '.join(study.tokens)}")
    print(f"parity: {checked.certificate.sentence() if checked.certificate else 'not checked (--no-parity)'}")
    print("checks, all hold:")
    for check in checked.checks:
        print(f"  - {check['claim']}")
    for error in checked.rounding:
        where = describe_entry(error.layer, error.head)
        print(f"  {settings.dtype} beside float32, {where}, factor {error.factor:g}: off by up to {error.error:.2g}")
    print()
    _print_table(study.curves, columns)
    for verdict in verdicts[: len(claims.CLAIMS)]:
        print(f"{verdict.number}. {verdict.claim}: {verdict.verdict}.")
        print(textwrap.fill(verdict.sentence, columns, initial_indent="   ", subsequent_indent="   "))
    for start in range(len(claims.CLAIMS), len(verdicts), len(claims.CLAIMS)):
        others = verdicts[start : start + len(claims.CLAIMS)]
        print(f"{others[0].where}: " + "; ".join(f"{verdict.number} {verdict.verdict}" for verdict in others))


def _print_table(curves: Curves, columns: int) -> None:
    """The difference by depth, for as many factors as the terminal has room for."""
    values = curves.of("frobenius", "rest")[0]
    shown = _spread(len(curves.factors), (columns - 24) // 8)
    of = "" if curves.windows is None else f", mean of {curves.windows} windows"
    print(f"Frobenius norm of scaled minus clean{of}, all positions but the first; scaled: {curves.where(0)}")
    print(
        f"({len(shown)} of {len(curves.factors)} factors, 1 of {len(curves.layers)} sites; all are in divergence.csv):"
    )
    print(f"{'depth':>10}  " + "".join(f"{curves.factors[j]:>8g}" for j in shown))
    for place in range(values.shape[1]):
        name = {0: "embeddings", values.shape[1] - 1: "final"}.get(place, str(place))
        mark = "  <- scaled" if place == curves.layers[0] + 1 else ""
        print(f"{name:>10}  " + "".join(f"{values[j, place]:8.2f}" for j in shown) + mark)
    print()


def _spread(count: int, room: int) -> range:
    """Evenly spaced indices, at most `room` of them, with the first and, where steps allow it, the last."""
    last = max(1, count - 1)
    step = next((step for step in range(1, last + 1) if last % step == 0 and last // step < room), last)
    return range(0, count, step)


def main(
    model: Annotated[str, typer.Option(help="a folder, gpt2 | gpt2-medium | ..., or a hub id")] = "weights/tiny",
    prompt: Annotated[str | None, typer.Option(help=f"the text to run; default: {PROMPT}")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="a corpus instead: one text a line (.txt), JSON lines (.jsonl), or .csv")
    ] = None,
    text_column: Annotated[str, typer.Option(help="the field of a JSON line, or the CSV column")] = "text",
    window: Annotated[int, typer.Option(help="longer texts are cut into windows of so many tokens")] = 64,
    limit: Annotated[int | None, typer.Option(help="stop after so many windows")] = None,
    layers: Annotated[str, typer.Option(help="2 | 2,5 | all; counted from 0")] = "2",
    factors: Annotated[str, typer.Option(help="0.5,2 | 0.5:1.5:0.05, both ends included")] = "0.5:1.5:0.05",
    site: Annotated[str, typer.Option(help="output | attention | mlp | head")] = "output",
    heads: Annotated[str, typer.Option(help="for the site head: all | 0,3")] = "all",
    positions: Annotated[str, typer.Option(help="the positions that alone are scaled: all | 0,3")] = "all",
    output: Annotated[Path, typer.Option(help="folder for the results")] = Path("results/divergence"),
    device: cli.Device = "auto",
    dtype: cli.Dtype = "float32",
    matmul_precision: Annotated[str, typer.Option(help="of float32 products: highest | high | medium")] = "highest",
    max_bytes: Annotated[
        int | None, typer.Option(help="memory for a pass; default: a quarter of what is free, over a corpus 1 GiB")
    ] = None,
    revision: cli.Revision = None,
    offline: cli.Offline = False,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="run a model that is not certified")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another run's results")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing")] = False,
) -> None:
    """Scale a site of some layers by some factors, and follow the change to the last layer."""
    if matmul_precision not in PRECISIONS:
        raise ValueError(f"--matmul-precision is {matmul_precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if texts and prompt is not None:
        raise ValueError("--prompt and --texts were both given; a run takes one of them.")
    torch.set_float32_matmul_precision(matmul_precision)
    at = rank_device(cli.pick_device(device))
    loaded = GPT2.from_pretrained(model, revision, at, cli.pick_dtype(dtype), offline)
    tokenizer = Tokenizer.from_pretrained(model, revision, offline)
    at_positions = None if positions == "all" else parse_indices(positions, loaded.config.n_positions, "position")
    shortest = max(2, 1 + max(at_positions or [0]))  # a window holds all of them, and more than its first token
    corpus = Texts.of(texts, text_column, window, limit, shortest) if texts else None
    settings = Settings(
        model=model,
        prompt=None if corpus else PROMPT if prompt is None else prompt,
        layers=parse_indices(layers, loaded.config.n_layer, "layer"),
        factors=parse_numbers(factors, "--factors"),
        site=check_site(site),
        dtype=dtype,
        device=at.type,
        revision=revision,
        parity=not no_parity,
        heads=None if heads == "all" else parse_indices(heads, loaded.config.n_head, "head"),
        positions=at_positions,
        matmul_precision=matmul_precision,
        texts=corpus,
        max_bytes=default_max_bytes(at) if corpus and max_bytes is None else max_bytes,
        threads=torch.get_num_threads() if corpus and at.type == "cpu" else None,
    )
    with joined_ranks(at) as ranks:
        study = _run(settings, loaded, tokenizer, output, ranks, overwrite, progress=not quiet)
    if study is None:
        return
    names = write(study, output)
    if not quiet:
        print_study(study, shutil.get_terminal_size((100, 24)).columns)
        print(f"\nwritten to {output}: {', '.join(names)}")


def _run(
    settings: Settings, model: GPT2, tokenizer: Tokenizer, output: Path, ranks: Ranks, overwrite: bool, progress: bool
) -> Study | None:
    if settings.texts:
        return run_over_corpus(settings, model, tokenizer, output, ranks, overwrite, progress)
    if ranks.world > 1:
        raise ValueError("A prompt runs in one process; torchrun shares the windows of --texts among several.")
    check_output(output, settings.to_json(), overwrite, FILES[:-1])
    if (output / WINDOWS).exists() and not overwrite:
        raise ValueError(
            f"{output / WINDOWS} holds an unfinished corpus run; choose another --output, or add --overwrite."
        )
    return run_study(settings, model, tokenizer, progress)


if __name__ == "__main__":
    cli.run(lambda: typer.run(main))
