"""Train two layers to copy, and watch induction heads appear: how weights/copier was made.

    python -m experiments.copier --output DIR

A text is a short piece of random tokens, read over and over; now and then the reading jumps to another place of the
piece. Nothing but an earlier copy foretells the next token, and no distance back is always right: a head must find
where the present token stood before, and read what came next. That takes two heads, one after the other (Elhage et
al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, "In-context Learning and Induction
Heads"). A head of block 0 attends to the previous token, so that every position knows what stood before it; a head of
block 1 attends to the position that knows the present token.

In GPT-2 the unembedding is tied to the embedding. Here it is not: with tied ones the same heads appear later and are
less sharp.
"""

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from experiments.harness.output import alone_in
from minigpt.config import GPT2Config
from minigpt.files import write_text
from minigpt.model import GPT2
from minigpt.parity import save_reference

TOKENS = END = 32
"""Random tokens, 0 to 31; the one after them begins every text."""
SHORTEST, LONGEST = 4, 8
"""Tokens of a piece; they are all different."""
JUMPS = 0.15
"""Of a text's tokens the share before which the reading jumps."""
UNFORETOLD = 0.1
"""Weight of the loss of tokens that no earlier copy foretells, where the others' is 1."""
SHOWN, ASKED = 64, 16
"""Texts that the log asks about, and the tokens of the piece that each shows twice: more than the training had."""
LOG_EVERY = 10  # steps
LOG_FILE = "training.csv"
SHAPE = GPT2Config(
    vocab_size=TOKENS + 1,
    n_positions=40,
    n_embd=64,
    n_layer=2,
    n_head=1,
    tie_word_embeddings=False,
    bos_token_id=END,
    eos_token_id=END,
)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn; the defaults made weights/copier."""

    steps: int = 600
    batch: int = 32  # texts
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    gradient_clip: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up; linear decay to zero over the last third."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, 3 * (self.steps - step) / self.steps)


@dataclass(frozen=True)
class Logged:
    """What the log says after so many steps, of pieces that are shown twice."""

    step: int
    first_copy: float
    """Mean loss in nats per token; guessing gives log(32) = 3.47."""
    second_copy: float
    previous_token: float
    """Mean attention on the previous position, of the head of block 0 that attends to it most."""
    prefix_matching: float
    """Mean attention on the token after the present one's first copy, of block 1's head that attends to it most."""


class Batch(NamedTuple):
    """What a step learns from: [text, position] each."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    """Of the targets' losses."""


def batch_of(step: int, schedule: Schedule) -> Batch:
    """The texts of one step, drawn from (seed, step)."""
    generator = np.random.default_rng([schedule.seed, step])
    targets = read(generator, schedule.batch, SHAPE.n_positions)
    weights = torch.where(foretold(targets), 1.0, UNFORETOLD)
    return Batch(torch.cat([torch.full((len(targets), 1), END), targets[:, :-1]], 1), targets, weights)


def read(generator: np.random.Generator, texts: int, length: int, jumps: float = JUMPS) -> Tensor:
    """Texts of so many tokens: each reads a piece of its own over and over, with jumps: [text, position]."""
    sizes = generator.integers(SHORTEST, LONGEST + 1, texts)
    pieces = generator.permuted(np.tile(np.arange(TOKENS), (texts, 1)), axis=1)
    place, places = generator.integers(sizes), list[np.ndarray]()
    for jump in generator.random((length, texts)) < jumps:
        place = np.where(jump, generator.integers(sizes), (place + 1) % sizes)
        places.append(place)
    return torch.from_numpy(np.take_along_axis(pieces, np.stack(places, 1), 1))


def foretold(ids: Tensor) -> Tensor:
    """Whether a token and the one before it have stood side by side earlier in the text: [text, position]."""
    pairs = ids[:, :-1] * (TOKENS + 1) + ids[:, 1:]
    again = (pairs[:, :, None] == pairs[:, None, :]).tril(-1).any(2)
    return F.pad(again, (1, 0))


def shown_twice(texts: int = SHOWN, length: int = ASKED, seed: int = 0) -> Tensor:
    """Pieces of so many different tokens, each twice in a row: [text, 1 + 2 * length], with `END` in front."""
    generator = np.random.default_rng(seed)
    drawn = generator.permuted(np.tile(np.arange(TOKENS), (texts, 1)), axis=1)[:, :length]
    piece = torch.from_numpy(drawn)
    return torch.cat([torch.full((texts, 1), END), piece, piece], 1)


@torch.no_grad()
def copy_losses(model: GPT2, ids: Tensor) -> tuple[float, float]:
    """Mean loss of the first copy and of the second, in nats per token, of ids as `shown_twice` makes them.

    The first token of each is left out: nothing foretells it.
    """
    length = ids.shape[1] // 2
    losses = F.cross_entropy(model(ids)[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")
    return float(losses[:, 1:length].mean()), float(losses[:, length + 1 :].mean())


def previous_token(patterns: Tensor) -> Tensor:
    """Mean attention on the position before the query, over all queries but the first: [layer, head].

    `patterns` are [layer, batch, head, query, key].
    """
    return patterns.diagonal(-1, 3, 4).mean((1, 3))


def prefix_matching(patterns: Tensor) -> Tensor:
    """Mean attention of the second copy on the position after the same token in the first: [layer, head].

    `patterns` are of ids as `shown_twice` makes them. Olsson et al. 2022, "prefix matching".
    """
    length = patterns.shape[3] // 2
    return patterns.diagonal(1 - length, 3, 4)[..., 2:].mean((1, 3))


@torch.no_grad()
def logged(model: GPT2, step: int) -> Logged:
    """What the model does after so many steps."""
    ids = shown_twice()
    patterns = model.attention_patterns(ids)
    before, after = previous_token(patterns)[0].max(), prefix_matching(patterns)[1].max()
    return Logged(step, *copy_losses(model, ids), float(before), float(after))


def train(schedule: Schedule) -> tuple[GPT2, list[Logged]]:
    """A model that has learnt to copy, and how it came to."""
    torch.manual_seed(schedule.seed)
    model, log = GPT2(SHAPE), list[Logged]()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(schedule.steps + 1):
        if step % LOG_EVERY == 0 or step == schedule.steps:
            log.append(logged(model, step))
        if step < schedule.steps:
            take_step(model, optimizer, batch_of(step, schedule), schedule, step)
        if step % (10 * LOG_EVERY) == 0:
            print(in_words(log[-1]), flush=True)
    return model.eval(), log


def take_step(model: GPT2, optimizer: torch.optim.AdamW, batch: Batch, schedule: Schedule, step: int) -> None:
    """One step of the optimiser."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    losses = F.cross_entropy(model(batch.inputs).transpose(1, 2), batch.targets, reduction="none")
    optimizer.zero_grad(set_to_none=True)
    ((losses * batch.weights).sum() / batch.weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
    optimizer.step()


def in_words(entry: Logged) -> str:
    """An entry of the log as a sentence."""
    return (
        f"step {entry.step}: loss of the first copy {entry.first_copy:.3f}, of the second {entry.second_copy:.3f} nats "
        f"per token; attention on the previous token {entry.previous_token:.2f} in block 0, on the token after the "
        f"first copy {entry.prefix_matching:.2f} in block 1"
    )


def write_log(path: Path, log: list[Logged]) -> None:
    """Write the log as CSV, whole or not at all."""
    names = ",".join(field.name for field in fields(Logged))
    write_text(path, "\n".join([names, *(",".join(map(str, asdict(entry).values())) for entry in log)]) + "\n")


def read_log(path: Path) -> list[Logged]:
    """A log that `write_log` wrote."""
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [Logged(int(step), *map(float, rest)) for step, *rest in rows]


def main(
    output: Annotated[Path, typer.Option(help="folder for the checkpoint and the log")],
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = Schedule.steps,
    learning_rate: float = Schedule.learning_rate,
    seed: Annotated[int, typer.Option(min=0)] = Schedule.seed,
) -> None:
    """Train two layers to copy, in a minute, and write the checkpoint, float16, and its log."""
    with alone_in(output):
        started = time.monotonic()
        model, log = train(Schedule(steps, learning_rate=learning_rate, seed=seed))
        seconds = time.monotonic() - started
        model.half().save_pretrained(output)
        save_reference(output, shown_twice(2), model.block)
        write_log(output / LOG_FILE, log)
    print(f"{seconds:.0f} seconds; the stored checkpoint, {in_words(logged(model.float(), steps))}")
