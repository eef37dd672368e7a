"""The options that all experiments share, and how lists and ranges are written.

An experiment with options of its own derives a class from `Options`: every field is an option.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from experiments.page.figures import label_of
from minigpt import cli
from minigpt.model import SITES

MOST_NUMBERS = 10_000
"""Of a range: enough for any curve, few enough not to fill the memory by a slip of the finger."""


Layers = Annotated[str, typer.Option(help="2 | 2,5 | all; counted from 0")]
SITE = f"{' | '.join(SITES)}, or another one that the model's block declares"
"""The help of an option for a site."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run the experiment with the options that all experiments share."""

    model: Annotated[str, typer.Option(help="a folder, gpt2 | gpt2-medium | ..., or a hub id")] = "weights/tiny"
    prompt: Annotated[str | None, typer.Option(help="the text to run; there is a default one")] = None
    texts: Annotated[
        Path | None, typer.Option(help="a corpus instead: one text a line (.txt), JSON lines (.jsonl), or .csv")
    ] = None
    text_column: Annotated[str, typer.Option(help="the field of a JSON line, or the CSV column")] = "text"
    window: Annotated[int, typer.Option(help="longer texts are cut into windows of so many tokens")] = 64
    limit: Annotated[int | None, typer.Option(help="stop after so many windows")] = None
    output: Annotated[Path | None, typer.Option(help="folder for the results; default: results/ and the name")] = None
    device: cli.Device = "auto"
    dtype: cli.Dtype = "float32"
    matmul_precision: Annotated[str, typer.Option(help="of float32 products: highest | high | medium")] = "highest"
    max_bytes: Annotated[
        int | None, typer.Option(help="memory for a pass; default: a quarter of what is free, over a corpus 1 GiB")
    ] = None
    block: cli.Block = None
    revision: cli.Revision = None
    offline: cli.Offline = False
    no_parity: Annotated[bool, typer.Option("--no-parity", help="run a model that is not certified")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another run's results")] = False
    lecture: Annotated[
        str | None, typer.Option(help="the model, prompt and settings of a lecture: docs/lectures.md names them")
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing")] = False


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(Options):
    """Options of an experiment that subtracts the logits of two tokens after a prompt."""

    answer: Annotated[str | None, typer.Option(help="the token after the prompt whose logit counts, as ' he'")] = None
    foil: Annotated[str | None, typer.Option(help="the token whose logit is subtracted from that, as ' she'")] = None


def parse_indices(text: str, count: int, what: str, option: str = "") -> tuple[int, ...]:
    """`2`, `2,5`, `0:11:1` or `all`: of layers, positions, or the entries of a site, such as heads.

    `option` is the one that was given; by default it is named after what is counted. Raises ValueError for anything
    else.
    """
    if text == "all":
        return tuple(range(count))
    indices, option = [], option or f"--{what}s"
    for value in parse_numbers(text, option, "all, a list such as 2,5 or a range such as 0:11:1"):
        if value != int(value) or not 0 <= value < count:
            raise ValueError(
                f"{option} {text}: {label_of(value)} is not a {what}; the model has {what}s 0 to {count - 1}."
            )
        indices.append(int(value))
    return tuple(indices)


def parse_numbers(
    text: str, option: str, expected: str = "finite numbers such as 0.5,2 or a range such as 0.5:1.5:0.05"
) -> tuple[float, ...]:
    """Numbers and ranges START:STOP:STEP, both ends included, separated by commas.

    Raises ValueError when a part is neither, or is not finite.
    """
    return tuple(value for part in text.split(",") for value in _numbers_of(part, option, text, expected))


def _numbers_of(part: str, option: str, text: str, expected: str) -> list[float]:
    try:
        numbers = [float(number) for number in part.split(":")]
    except ValueError:
        numbers = []
    if not all(math.isfinite(number) for number in numbers) or len(numbers) not in (1, 3):
        raise ValueError(f"{option} {text!r}: expected {expected}.")
    if len(numbers) == 1:
        return numbers
    start, stop, step = numbers
    if step <= 0 or stop < start:
        raise ValueError(f"{option} {text}: a range goes up, START:STOP:STEP with STEP above 0.")
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > MOST_NUMBERS:
        raise ValueError(f"{option} {text}: {count} numbers are more than {MOST_NUMBERS}; take a larger STEP.")
    # twelve digits: 0.5 + 10 * 0.05 is 1, not 1.0000000000000002
    return [round(start + step * index, 12) for index in range(count)]
