"""The command line of an experiment: the options that all share, and its own."""

import inspect
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from experiments.common import claimed
from experiments.corpus import Ranks, default_max_bytes, joined_ranks, rank_device
from experiments.runner import REPORT, WINDOWS, Experiment, Raw, Start, Study, run_over_corpus, run_prompt, show, write
from experiments.texts import Texts
from minigpt import GPT2, Tokenizer, cli

PRECISIONS = ("highest", "high", "medium")

Model = Annotated[str, typer.Option(help="a folder, gpt2 | gpt2-medium | ..., or a hub id")]


def command(build: Callable[..., Experiment[Any]]) -> Callable[..., None]:
    """The command line of an experiment: `build(start, *, ...)` makes it, and its keywords are further options."""
    own = [
        parameter
        for parameter in inspect.signature(build).parameters.values()
        if parameter.kind == parameter.KEYWORD_ONLY
    ]
    shared = inspect.signature(_main).parameters
    parameters = [*own, *(of for of in shared.values() if of.name not in ("build", "own"))]

    def main(**given: Any) -> None:
        _main(build, {of.name: given.pop(of.name) for of in own}, **given)

    main.__doc__ = build.__doc__
    main.__signature__ = inspect.Signature([of.replace(kind=of.KEYWORD_ONLY) for of in parameters])  # type: ignore[attr-defined]
    main.__annotations__ = {of.name: of.annotation for of in parameters}
    return main


def _main(
    build: Callable[..., Experiment[Any]],
    own: dict[str, Any],
    model: Model = "weights/tiny",
    prompt: Annotated[str | None, typer.Option(help="the text to run; there is a default one")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="a corpus instead: one text a line (.txt), JSON lines (.jsonl), or .csv")
    ] = None,
    text_column: Annotated[str, typer.Option(help="the field of a JSON line, or the CSV column")] = "text",
    window: Annotated[int, typer.Option(help="longer texts are cut into windows of so many tokens")] = 64,
    limit: Annotated[int | None, typer.Option(help="stop after so many windows")] = None,
    output: Annotated[Path | None, typer.Option(help="folder for the results; default: results/ and the name")] = None,
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
    given = dict(locals())
    if matmul_precision not in PRECISIONS:
        raise ValueError(f"--matmul-precision is {matmul_precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if texts and prompt is not None:
        raise ValueError("--prompt and --texts were both given; a run takes one of them.")
    torch.set_float32_matmul_precision(matmul_precision)
    at = rank_device(cli.pick_device(device))
    begin = _begin(at, **{name: given[name] for name in inspect.signature(_begin).parameters if name in given})
    experiment = build(begin, **own)
    experiment.command, experiment.progress = _as_typed(experiment.name), not quiet
    folder = output or Path("results") / experiment.name
    with ExitStack() as held:
        with joined_ranks(at) as ranks:
            study = _run(experiment, begin, folder, ranks, overwrite, held)
        if study is not None:
            _report(experiment, study, folder, quiet)


def _report(experiment: Experiment[Raw], study: Study[Raw], folder: Path, quiet: bool) -> None:
    names = write(experiment, study, folder)
    if not quiet:
        print("\n".join(show(experiment, study, shutil.get_terminal_size((100, 24)).columns)))
        print(f"\nwritten to {folder}: {', '.join(names)}")
        if REPORT in names:
            print(f"open {folder / REPORT} in a browser")


def _begin(
    at: torch.device,
    model: str,
    prompt: str | None,
    texts: Path | None,
    text_column: str,
    window: int,
    limit: int | None,
    dtype: str,
    matmul_precision: str,
    max_bytes: int | None,
    revision: str | None,
    offline: bool,
    no_parity: bool,
) -> Start:
    """Load the model, and keep what was asked for."""
    common = {
        "model": model,
        "dtype": dtype,
        "device": at.type,
        "revision": revision,
        "parity": not no_parity,
        "matmul_precision": matmul_precision,
        "max_bytes": default_max_bytes(at) if texts and max_bytes is None else max_bytes,
        "threads": torch.get_num_threads() if texts and at.type == "cpu" else None,
    }
    loaded = cli.admit(GPT2.from_pretrained(model, revision, at, cli.pick_dtype(dtype), offline))
    tokenizer = Tokenizer.from_pretrained(model, revision, offline)

    def corpus(shortest: int) -> Texts | None:
        return Texts.of(texts, text_column, window, limit, shortest) if texts else None

    return Start(loaded, tokenizer, common, prompt, corpus)


def _as_typed(name: str) -> str:
    """The command that was given, as one would type it again; torchrun's own options but the number of processes
    cannot be seen from here."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of the module that was run with -m
    module = ["-m", spec.name if spec else f"experiments.{name}", *sys.argv[1:]]
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


def _run(
    experiment: Experiment[Raw], begin: Start, output: Path, ranks: Ranks, overwrite: bool, held: ExitStack
) -> Study[Raw] | None:
    if experiment.settings.texts:
        return run_over_corpus(experiment, begin.model, begin.tokenizer, output, ranks, held, overwrite)
    if ranks.world > 1:
        raise ValueError("A prompt runs in one process; torchrun shares the windows of --texts among several.")
    own = [name for name in experiment.files if name != WINDOWS]
    held.enter_context(claimed(output, experiment.settings.to_json(), overwrite, own))
    if (output / WINDOWS).exists() and not overwrite:
        raise ValueError(
            f"{output / WINDOWS} holds an unfinished corpus run; choose another --output, or add --overwrite."
        )
    return run_prompt(experiment, begin.model, begin.tokenizer)


def start(main: Callable[..., None]) -> None:
    """Run a command line made by `command`; a mistake becomes a sentence and its exit code."""
    cli.run(lambda: typer.run(main))
