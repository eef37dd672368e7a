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
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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
    parse_layers,
    parse_numbers,
    results_in,
)
from minigpt import GPT2, Sweep, Tokenizer, cli, parity, sweep
from minigpt.divergence import MEASURES, POSITION_SETS, Measure, PositionSet
from minigpt.fanout import Place
from minigpt.scales import Site, check_site
from minigpt.selfcheck import self_check

PROMPT = "The old gentleman sat down by the fire, and read the letter which his daughter had sent him."


@dataclass(frozen=True)
class Settings:
    """What was asked for; two runs with equal settings may replace each other's results."""

    model: str
    prompt: str
    layers: tuple[int, ...]
    factors: tuple[float, ...]
    site: Site
    dtype: str
    device: str
    revision: str | None
    parity: bool

    def to_json(self) -> dict[str, Any]:
        """The settings as a summary holds them."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Study:
    """A finished study: the sweep, and everything that was concluded from it."""

    settings: Settings
    model: dict[str, Any]
    tokens: list[str]
    certificate: parity.Certificate | None
    checks: list[dict[str, Any]]
    result: Sweep
    verdicts: list[claims.Verdict]

    def summary(self) -> dict[str, Any]:
        """All but the numbers per position, for summary.json."""
        return {
            "settings": self.settings.to_json(),
            "model": self.model,
            "tokens": self.tokens,
            "parity": self.certificate.to_dict() if self.certificate else "not checked (--no-parity)",
            "checks": self.checks,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "versions": {
                "python": platform.python_version(),
                **parity.installed("minigpt", "torch", "numpy", "safetensors", "tokenizers", "transformers"),
            },
        }


def run_study(settings: Settings, model: GPT2, tokenizer: Tokenizer, progress: bool = False) -> Study:
    """Certify, sweep, check, judge.

    Raises ValueError for a prompt or a grid out of range, CheckError when parity or a self-check fails.
    """
    ids = encode_prompt(tokenizer, settings.prompt, model.config.n_positions)
    certificate = parity.certify(model) if settings.parity else None
    if certificate and not certificate.passed:
        raise parity.CheckError(f"parity {certificate.sentence()} The study does not run; --no-parity overrides this.")
    row = torch.tensor([ids], device=model.final_norm.weight.device)
    result = sweep(model, row, settings.layers, settings.factors, settings.site, progress=partial(_bar, progress))
    tried = self_check(model, result)
    if tried.broken:
        found = "; ".join(f"{check.claim}: {check.figure}" for check in tried.broken)
        raise parity.CheckError(f"the sweep contradicts what must be true of any weights: {found}.")
    return Study(
        settings=settings,
        model=describe(model),
        tokens=tokenizer.tokens(ids),
        certificate=certificate,
        checks=[asdict(check) for check in tried.checks],
        result=result,
        verdicts=claims.judge(result, tried.upstream),
    )


def _bar(shown: bool, places: Iterable[Place], total: int) -> Iterable[Place]:
    return tqdm(places, total=total, unit="depth", leave=False, disable=None if shown else True)


def describe(model: GPT2) -> dict[str, Any]:
    """What ran: the checkpoint's origin and hashes, and the model's shape."""
    origin: dict[str, Any] = {}
    if source := model.source:
        origin = {"name": source.name, "repository": source.repository, "commit": source.commit}
        origin["sha256"] = source.sha256
    return {**origin, "config": model.config.to_dict()}


def table(study: Study) -> list[dict[str, Any]]:
    """The tidy rows of divergence.csv: one number each."""
    result, rows = study.result, []
    for positions in POSITION_SETS:
        for measure in MEASURES:
            values = result.statistics.measure(measure, positions)[..., 0]
            rows += _rows(study, measure, positions, values)
    return rows


def _rows(study: Study, measure: Measure, positions: PositionSet, values: torch.Tensor) -> list[dict[str, Any]]:
    result = study.result
    places = [*map(str, range(values.shape[2] - 1)), "final"]
    heads = [{"head": head} for head in result.heads] if result.heads else [{} for _ in result.layers]
    return [
        {
            "model": study.settings.model,
            "site": result.site,
            "layer": layer,
            **heads[i],
            "factor": factor,
            "depth": place,
            "positions": positions,
            "metric": measure,
            "value": values[i, j, k].item(),
        }
        for i, layer in enumerate(result.layers)
        for j, factor in enumerate(result.factors)
        for k, place in enumerate(places)
        if not (measure == "passive" and place == "final")
    ]


def write(study: Study, folder: Path) -> list[str]:
    """Write every result into a folder, all or nothing; returns the files' names."""
    rows = table(study)
    with results_in(folder, "divergence*") as scratch:
        with (scratch / "divergence.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        study.result.save(scratch / "sweep.safetensors")
        _draw(rows, study.result, scratch)
        (scratch / SUMMARY).write_text(json.dumps(study.summary(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return sorted(path.name for path in scratch.iterdir())


def _draw(rows: list[dict[str, Any]], result: Sweep, folder: Path) -> None:
    """The figures, where the libraries that draw them are installed."""
    if not all(importlib.util.find_spec(package) for package in ("altair", "vl_convert")):
        typer.echo("No figures are drawn: install Altair with pip install -e '.[report]'.", err=True)
        return
    from experiments import report  # noqa: PLC0415  an extra

    report.draw(rows, result, folder)


def print_study(study: Study, columns: int) -> None:
    """Parity, the table depth x factor of the first entry, its verdicts, and the others' in a line each."""
    result, settings = study.result, study.settings
    shape = f"{study.model['config']['n_layer']} blocks, {study.model['config']['n_embd']} wide"
    print(f"{settings.model} ({shape}, {settings.dtype}, {settings.device}), prompt of {len(study.tokens)} tokens:")
    print(f"  {' | '.join(study.tokens)}")
    print(f"parity: {study.certificate.sentence() if study.certificate else 'not checked (--no-parity)'}")
    print("checks, all hold:")
    for check in study.checks:
        print(f"  - {check['claim']}")
    print()
    _print_table(result, columns)
    for verdict in study.verdicts[: len(claims.CLAIMS)]:
        print(f"{verdict.number}. {verdict.claim}: {verdict.verdict}.")
        print(textwrap.fill(verdict.sentence, columns, initial_indent="   ", subsequent_indent="   "))
    for start in range(len(claims.CLAIMS), len(study.verdicts), len(claims.CLAIMS)):
        others = study.verdicts[start : start + len(claims.CLAIMS)]
        print(f"{others[0].where}: " + "; ".join(f"{verdict.number} {verdict.verdict}" for verdict in others))


def _print_table(result: Sweep, columns: int) -> None:
    """The difference by depth, for as many factors as the terminal has room for."""
    values = result.statistics.measure("frobenius", "rest")[0, ..., 0]
    shown = _spread(len(result.factors), (columns - 24) // 8)
    where = claims.where(result, 0)
    print(f"Frobenius norm of scaled minus clean, all positions but the first, {result.site} of {where} scaled")
    print(
        f"({len(shown)} of {len(result.factors)} factors, 1 of {len(result.layers)} sites; all are in divergence.csv):"
    )
    print(f"{'depth':>10}  " + "".join(f"{result.factors[j]:>8g}" for j in shown))
    for place in range(values.shape[1]):
        name = {0: "embeddings", values.shape[1] - 1: "final"}.get(place, str(place))
        mark = "  <- scaled" if place == result.layers[0] + 1 else ""
        print(f"{name:>10}  " + "".join(f"{values[j, place]:8.2f}" for j in shown) + mark)
    print()


def _spread(count: int, room: int) -> range:
    """Evenly spaced indices, at most `room` of them, with the first and, where steps allow it, the last."""
    last = max(1, count - 1)
    step = next((step for step in range(1, last + 1) if last % step == 0 and last // step < room), last)
    return range(0, count, step)


def main(
    model: Annotated[str, typer.Option(help="a folder, gpt2 | gpt2-medium | ..., or a hub id")] = "weights/tiny",
    prompt: Annotated[str, typer.Option(help="the text to run")] = PROMPT,
    layers: Annotated[str, typer.Option(help="2 | 2,5 | all; counted from 0")] = "2",
    factors: Annotated[str, typer.Option(help="0.5,2 | 0.5:1.5:0.05, both ends included")] = "0.5:1.5:0.05",
    site: Annotated[str, typer.Option(help="output | attention | mlp | head")] = "output",
    output: Annotated[Path, typer.Option(help="folder for the results")] = Path("results/divergence"),
    device: cli.Device = "auto",
    dtype: cli.Dtype = "float32",
    revision: cli.Revision = None,
    offline: cli.Offline = False,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="run a model that is not certified")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another run's results")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing")] = False,
) -> None:
    """Scale a site of some layers by some factors, and follow the change to the last layer."""
    loaded = GPT2.from_pretrained(model, revision, cli.pick_device(device), cli.pick_dtype(dtype), offline)
    settings = Settings(
        model=model,
        prompt=prompt,
        layers=parse_layers(layers, loaded.config.n_layer),
        factors=parse_numbers(factors, "--factors"),
        site=check_site(site),
        dtype=dtype,
        device=str(loaded.final_norm.weight.device),
        revision=revision,
        parity=not no_parity,
    )
    check_output(output, settings.to_json(), overwrite)
    study = run_study(settings, loaded, Tokenizer.from_pretrained(model, revision, offline), progress=not quiet)
    names = write(study, output)
    if not quiet:
        print_study(study, shutil.get_terminal_size((100, 24)).columns)
        print(f"\nwritten to {output}: {', '.join(names)}")


if __name__ == "__main__":
    cli.run(lambda: typer.run(main))
