"""The command line: minigpt verify | reference | doctor | generate | download.

Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from minigpt import hub, model, parity
from minigpt.doctor import Finding, examine
from minigpt.files import printable
from minigpt.generate import generate
from minigpt.parameters import scaled
from minigpt.tokenizer import Tokenizer

app = typer.Typer(
    help="GPT-2 by hand, with a scale on every block, head and sublayer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
DEVICES = ("cpu", "cuda", "mps")
TRUSTED = ("cpu", "cuda")
"""The devices that may be used untried. MPS has given wrong numbers without a word; nor can it pass `doctor` today, for
it has no float64, in which differences are measured."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="a folder, gpt2 | gpt2-medium | ..., or a hub id")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of the hub")]
Offline = Annotated[bool, typer.Option("--offline", help="use the local cache only")]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, mps (only if it passes doctor), or auto: cuda if present, else cpu")
]
Dtype = Annotated[str, typer.Option(help=" | ".join(DTYPES))]
Block = Annotated[
    str | None, typer.Option(metavar="package.module:Name", help="a subclass of minigpt.Block to make the model of")
]


def pick_device(name: str) -> torch.device:
    """A device by name; `auto` is CUDA if present, else the CPU. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in DEVICES:
        raise ValueError(f"The device is {name!r}; expected one of {', '.join(DEVICES)}, or auto.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("The device 'mps' cannot be used here: PyTorch finds none.")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def load_model(
    name: str, block: str | None, device: str, dtype: str, revision: str | None = None, offline: bool = False
) -> model.GPT2:
    """The model that the options ask for. Raises ValueError, CheckpointError among them, for one that cannot be had."""
    made_of, where = pick_block(block), pick_device(device)
    return model.GPT2.from_pretrained(name, revision, where, pick_dtype(dtype), offline, made_of)


def admit(loaded: model.GPT2) -> model.GPT2:
    """The model, if its device may be used untried or passes `doctor` here and now. Raises CheckError otherwise."""
    device = loaded.device.type
    if device not in TRUSTED:
        off = [finding for finding in examine(loaded) if finding.passed is False]
        if off:
            said = "; ".join(f"{finding.name}: {finding.said}" for finding in off)
            raise parity.CheckError(f"{device} cannot be believed here, take cpu. {said}")
    return loaded


def pick_dtype(name: str) -> torch.dtype:
    """A parameter type by name. Raises ValueError for an unknown one."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def pick_block(name: str | None) -> type[model.Block]:
    """A block by its name, package.module:Name, also of the current folder; without a name GPT-2's own.

    Its module's code runs. Raises ValueError when there is none.
    """
    if name is None:
        return model.Block
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that nothing here stands in for a package that is installed
    return model.block_named(name)


def parse_scale(text: str) -> tuple[str, Tensor]:
    """`blocks.2.output_scale=0.5`, or one number per head: `blocks.2.attention.head_scale=1,0,1`."""
    name, _, values = text.partition("=")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"--scale {text!r} is not NAME=NUMBER, such as blocks.2.output_scale=0.5.")
    return name, torch.tensor(numbers[0] if len(numbers) == 1 else numbers, dtype=torch.float64)


@app.command()
def verify(
    model: ModelName,
    live: Annotated[
        bool, typer.Option("--live", help="compare with a run of transformers, whatever else there is")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the certificate as JSON")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    block: Block = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Check that a model computes what Hugging Face's GPT-2 computes; exit code 1 if that is not certain.

    A model of another block is held against a reference of its own, where `minigpt reference` stored one.
    """
    certificate = parity.certify(load_model(model, block, device, dtype, revision, offline), live)
    if as_json:
        typer.echo(json.dumps({"model": model, **certificate.to_dict()}, indent=2))
    else:
        typer.echo(f"{model}: {certificate.sentence()}")
        for name, difference in certificate.differences.items():
            typer.echo(f"  {name:<12} {difference:.2e}")
    raise typer.Exit(0 if certificate.passed else 1)


@app.command()
def reference(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="the folder of a checkpoint")],
    block: Block = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the reference that is there")] = False,
) -> None:
    """Store what a checkpoint computes today, so that `verify` can hold later runs against it.

    Transformers computes it, or this library itself for another block.
    """
    path, made_of = directory / parity.REFERENCE, pick_block(block)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a folder; expected the folder of a checkpoint.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already; --overwrite replaces it.")
    if made_of is model.Block and not parity.has_transformers():
        raise ValueError("A reference of GPT-2 needs transformers; install it with: pip install 'minigpt[parity]'.")
    ids = parity.reference_ids(model.GPT2.from_pretrained(directory, block=made_of).config)
    parity.save_reference(directory, ids, made_of)
    by = "transformers" if made_of is model.Block else f"minigpt {version('minigpt')} with the block {block}"
    typer.echo(f"{path} holds what {by} computes in float64 for {ids.shape[0]} texts of {ids.shape[1]} tokens")


@app.command()
def doctor(
    model: ModelName,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    block: Block = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Check that the numbers of this very machine can be believed; exit code 1 if something is off."""
    loaded = load_model(model, block, device, dtype, revision, offline)
    findings = list[Finding]()
    for finding in examine(loaded):
        findings.append(finding)
        if not as_json:
            mark = {True: "ok ", False: "OFF", None: "   "}[finding.passed]
            typer.echo(f"{mark} {finding.name}: {printable(finding.said)}")
    tried = [finding for finding in findings if finding.passed is not None]
    off = [finding.name for finding in tried if not finding.passed]
    verdict = f"something is off: {', '.join(dict.fromkeys(off))}." if off else f"all {len(tried)} checks hold here."
    if as_json:
        said = {"model": model, "findings": [asdict(finding) for finding in findings], "verdict": verdict}
        typer.echo(json.dumps(said, indent=2))
    else:
        typer.echo(f"\n{model}: {verdict}")
    raise typer.Exit(1 if off else 0)


@app.command("generate")
def generate_command(
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="draw from the k likeliest tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the fewest tokens that reach this probability")] = None,
    seed: Annotated[int | None, typer.Option(help="of the draws")] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="NAME=NUMBER, such as blocks.2.output_scale=0.5; a head_scale takes one per head: 0,1,1"),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    block: Block = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Continue a text, clean or under any scales."""
    scales = dict(parse_scale(text) for text in scale or [])
    if len(scales) < len(scale or []):
        raise ValueError("--scale names the same scale twice; give each one once.")
    if temperature == 0 and (top_k, top_p, seed) != (None, None, None):
        raise ValueError("--top-k, --top-p and --seed draw nothing at temperature 0; add --temperature 1.")
    loaded = admit(load_model(model, block, device, dtype, revision, offline))
    tokenizer = Tokenizer.from_pretrained(model, revision, offline)
    ids = tokenizer.encode(prompt)
    with scaled(loaded, scales):
        new = generate(loaded, ids, max_new_tokens, temperature, top_k, top_p, seed)
        first = next(new)  # so that a refusal comes before the prompt is shown
        typer.echo(printable(prompt), nl=False)
        for text in tokenizer.stream(token for token in chain([first], new) if token != loaded.config.eos_token_id):
            typer.echo(printable(text), nl=False)
    typer.echo()


@app.command()
def download(
    model: ModelName,
    to: Annotated[Path | None, typer.Option(help="a folder to copy the checkpoint into, such as weights/gpt2")] = None,
    revision: Revision = None,
) -> None:
    """Fetch a checkpoint from the hub into the cache, or into a folder."""
    found = hub.find(model, revision) if to is None else hub.download(model, to, revision)
    if found.repository is None:
        raise ValueError(f"{model} is a folder already; nothing to download.")
    typer.echo(f"{found.repository} at commit {found.commit} is in {found.directory}")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"minigpt {version('minigpt')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and leave")] = False,
) -> None: ...


def run(command: Callable[[], object]) -> None:
    """Run a command line; a failed check or a user's mistake becomes a sentence and its exit code."""
    rank = os.environ.get("RANK", "0")  # set by torchrun
    who = "" if rank == "0" else f"rank {rank}: "
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
    except parity.CheckError as error:
        typer.echo(f"{who}Check failed: {printable(str(error))}", err=True)
        sys.exit(1)
    except (ValueError, OSError) as error:
        typer.echo(f"{who}Error: {printable(_said(error))}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as leaving:  # typer makes 130 of an interrupt
        if isinstance(leaving, SystemExit) and leaving.code != INTERRUPTED:
            raise
        typer.echo(f"{who}Interrupted.", err=True)
        sys.exit(INTERRUPTED)


def _said(error: ValueError | OSError) -> str:
    """What went wrong; the system's own errors without their number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."


def main() -> None:
    """Entry point of the `minigpt` command."""
    run(app)
