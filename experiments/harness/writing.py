"""What a finished run leaves: summary, table, figures and report, written all or nothing, and lines for a terminal."""

import csv
import importlib.util
import itertools
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer

from experiments.harness.corpus import BOOTSTRAP, remove_windows
from experiments.harness.experiment import FEW_ROWS, REPORT, Experiment, Raw, Study
from experiments.harness.output import SUMMARY, WINDOWS, results_in, sha256_of
from experiments.harness.running import versions
from experiments.harness.verdicts import Verdict, counted, lines_of
from experiments.page.figures import save_figures
from minigpt.files import printable


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
        "rounding": {"about": study.rounding, "largest_error": largest_errors(study)},
        **experiment.summary(study),
        "verdicts": [verdict.to_json() for verdict in verdicts(experiment, study)],
        "versions": versions(),
        "code": study.code,
        "threads": torch.get_num_threads(),
        "command": experiment.command,
    }


def largest_errors(study: Study[Any]) -> dict[str, dict[str, float]]:
    """By table and, where it has several, by measure: the largest error by rounding of the numbers that have one."""
    found = dict[str, dict[str, float]]()
    for name, table in study.tables.items():
        for metric in table.axes.get("metric", [None]):
            error = (table if metric is None else table.at(metric=metric)).error
            if error is not None and bool(error.isfinite().any()):
                found.setdefault(name, {})[metric or name] = float(error[error.isfinite()].max())
    return found


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
        f"{counted(counts['windows'], 'window')} of up to {settings.texts.window} tokens ({counts['tokens']} tokens of "
        f"{counted(counts['texts'], 'text')}; {counted(counts['skipped'], 'piece')} of fewer than "
        f"{settings.texts.shortest} tokens left out)"
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
    yield from _rounding_in_words(study, columns)
    yield from experiment.lines(study, columns)
    yield from lines_of(verdicts(experiment, study), columns)


def _rounding_in_words(study: Study[Any], columns: int) -> Iterator[str]:
    """The largest error of every measure; of an experiment without the table `values`, of every table."""
    found = largest_errors(study)
    errors = found.get("values") or {name: error for table in found.values() for name, error in table.items()}
    figures = (
        "; the largest are " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) if errors else ""
    )
    yield from textwrap.wrap(f"{study.rounding.removesuffix('.')}{figures}.", columns, subsequent_indent="  ")
