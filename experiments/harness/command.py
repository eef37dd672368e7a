"""The command line of an experiment: its own options and those that all share, as one command."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
import typer.main

from experiments.harness.digest import code_digest
from experiments.harness.experiment import REPORT, Experiment, Raw, Start, Study
from experiments.harness.options import Options
from experiments.harness.output import WINDOWS, claimed
from experiments.harness.ranks import Ranks, joined_ranks, rank_device
from experiments.harness.running import run_over_corpus, run_prompt
from experiments.harness.writing import show, write
from minigpt import GPT2, Tokenizer, cli

PRECISIONS = ("highest", "high", "medium")


def command(kind: type[Experiment[Any]]) -> Callable[[], None]:
    """The command line of an experiment: every field of `kind.options` is an option, its own ones first."""
    app = typer.Typer(add_completion=False)
    app.command()(kind.options)
    parsed = typer.main.get_command(app)
    shared, made = {field.name for field in fields(Options)}, parsed.callback or kind.options
    parsed.params.sort(key=lambda parameter: parameter.name in shared)
    parsed.callback = lambda **given: _main(kind, made(**given))
    lecture = next(parameter for parameter in parsed.params if parameter.name == "lecture")
    lecture.is_eager, lecture.callback = True, lambda context, _option, name: _as_in_the_lecture(kind, context, name)
    return parsed


def _as_in_the_lecture(kind: type[Experiment[Any]], context: Any, name: str | None) -> str | None:
    """Take a lecture's settings for defaults. Raises ValueError for a lecture that the experiment does not know."""
    if name is not None and name not in kind.lectures:
        known = ", ".join(kind.lectures) or "none"
        raise ValueError(f"--lecture {name}: {kind.name} reproduces {known}; docs/lectures.md lists the others.")
    context.default_map = dict(kind.lectures[name]) if name else None
    return name


def start(main: Callable[[], None]) -> None:
    """Run a command line made by `command`; a mistake becomes a sentence and its exit code."""
    cli.run(main)


def _main(kind: type[Experiment[Any]], options: Options) -> None:
    if options.matmul_precision not in PRECISIONS:
        expected = ", ".join(PRECISIONS)
        raise ValueError(f"--matmul-precision is {options.matmul_precision!r}; expected one of {expected}.")
    if options.texts and options.lecture:
        raise ValueError("--lecture brings a prompt, and --texts was given; a run takes one of them.")
    if options.texts and options.prompt is not None:
        raise ValueError("--prompt and --texts were both given; a run takes one of them.")
    torch.set_float32_matmul_precision(options.matmul_precision)
    begin = _begin(options)
    experiment = kind.from_options(begin)
    experiment.command, experiment.progress = _as_typed(experiment.name), not options.quiet
    folder = options.output or Path("results") / experiment.name
    with ExitStack() as held:
        with joined_ranks(begin.device) as ranks:
            study = _run(experiment, begin, folder, ranks, options.overwrite, held)
        if study is not None:
            _report(experiment, study, folder, options.quiet)


def _begin(options: Options) -> Start[Any]:
    """Load the model and its tokenizer."""
    at = rank_device(cli.pick_device(options.device))
    model, revision, offline = options.model, options.revision, options.offline
    block, dtype = cli.pick_block(options.block), cli.pick_dtype(options.dtype)
    loaded = cli.admit(GPT2.from_pretrained(model, revision, at, dtype, offline, block))
    return Start(loaded, Tokenizer.from_pretrained(model, revision, offline), options, at)


def _run(
    experiment: Experiment[Raw], begin: Start[Any], output: Path, ranks: Ranks, overwrite: bool, held: ExitStack
) -> Study[Raw] | None:
    if experiment.settings.texts:
        return run_over_corpus(experiment, begin.model, begin.tokenizer, output, ranks, held, overwrite)
    if ranks.world > 1:
        raise ValueError("A prompt runs in one process; torchrun shares the windows of --texts among several.")
    own = [name for name in experiment.files if name != WINDOWS]
    code = code_digest(experiment, begin.model)
    held.enter_context(claimed(output, experiment.settings.to_json(), code, overwrite, own))
    if (output / WINDOWS).exists() and not overwrite:
        raise ValueError(
            f"{output / WINDOWS} holds an unfinished corpus run; choose another --output, or add --overwrite."
        )
    return run_prompt(experiment, begin.model, begin.tokenizer)


def _report(experiment: Experiment[Raw], study: Study[Raw], folder: Path, quiet: bool) -> None:
    names = write(experiment, study, folder)
    if not quiet:
        print("\n".join(show(experiment, study, shutil.get_terminal_size((100, 24)).columns)))
        print(f"\nwritten to {folder}: {', '.join(names)}")
        if REPORT in names:
            print(f"open {folder / REPORT} in a browser")


def _as_typed(name: str) -> str:
    """The command that was given, as one would type it again; torchrun's own options but the number of processes
    cannot be seen from here."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of the module that was run with -m
    module = ["-m", spec.name.removesuffix(".__main__") if spec else f"experiments.{name}", *sys.argv[1:]]
    if not dist.is_torchelastic_launched():
        return _quoted("python", *module)
    launcher = _quoted("torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *module)
    return f"OMP_NUM_THREADS={torch.get_num_threads()} {launcher}"


def _quoted(*words: str) -> str:
    """A shell's command line; a word that could steer the terminal into which it is pasted is written out as $'...'."""
    escaped = ["".join(f"\\U{ord(it):08x}" if it in "\\'" or not it.isprintable() else it for it in w) for w in words]
    return " ".join(
        shlex.quote(word) if word.isprintable() else f"$'{safe}'" for word, safe in zip(words, escaped, strict=True)
    )
