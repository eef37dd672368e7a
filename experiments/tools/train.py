"""Train a small GPT-2 from nothing on a folder of plain text.

    python -m experiments.train --corpus DIR --output DIR

The folder's *.txt files are read in the order of their names. Every twentieth stretch of 4,096 tokens of each is held
out. Every window begins with <|endoftext|>. A run that is stopped goes on where its last checkpoint was, to the same
bits on the same machine.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm import tqdm

from experiments.behaviour import copies, observe, resting
from experiments.harness.output import alone_in
from minigpt import cli
from minigpt.config import GPT2Config
from minigpt.files import open_tensors, write_tensors, write_text
from minigpt.model import GPT2, block_name
from minigpt.parity import save_reference

END_OF_TEXT = "<|endoftext|>"
STRETCH, HELD_OUT, EVERY = 4096, 7, 20
"""Tokens; of every so many stretches of a text the one of that number is held out. Of a text of fewer than nine
stretches, a stretch is a ninth."""
HELD_OUT_WINDOWS = 128
"""Windows of the held-out loss while the training runs; at its end all of them count."""
OBSERVED_WINDOWS = 4
"""Held-out windows whose attention and norms are looked at while the training runs."""
STATE_FILE, LOG_FILE, HELD_OUT_FILE = "training.safetensors", "training.csv", "held_out.jsonl"
MOMENTS = ("exp_avg", "exp_avg_sq")
REFERENCE_TOKENS = 64
SAVE_EVERY = 200  # steps
REPORT_EVERY = 500  # steps

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn."""

    tokens: int = 32_000_000
    batch: int = 8  # windows
    window: int = 512  # tokens, <|endoftext|> among them
    learning_rate: float = 2e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1  # on matrices that read from the stream
    dropout: float = 0.1  # of what attention and MLP write
    repeat: float = 0.125  # share of windows in which a stretch comes a second time
    gradient_clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps in the whole training."""
        return max(1, self.tokens // (self.batch * self.window))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then linear decay to zero."""
        warm = (step + 1) / max(1, self.warmup_steps)
        decay = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * min(1.0, warm, decay)


@dataclass(frozen=True)
class Logged:
    """What the log says at a step."""

    step: int
    training_loss: float
    """Nats per token, the mean since the last entry, under dropout."""
    held_out_loss: float
    resting_heads: float
    """Share of heads that rest on position 0, as `experiments.behaviour` counts them."""
    norm_of_position_0: float
    """Over the others' mean, at the depth where it is largest."""
    induction_gain: float
    """Nats per token."""


class Part(NamedTuple):
    """The tokens to learn from, or those held out."""

    ids: Tensor
    """[token]"""
    starts: Tensor
    """Where windows begin: enough tokens follow within the same stretch, or run of stretches."""


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE as GPT-2's, with <|endoftext|> as its last entry."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def split(texts: list[str], tokenizer: tokenizers.Tokenizer, window: int) -> tuple[Part, Part]:
    """What is learnt from, where a window may begin at every token, and what is held out, in windows side by side.

    Raises ValueError when either has no window.
    """
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    for text in texts:
        ids = tokenizer.encode(text).ids
        length = min(STRETCH, max(1, len(ids) // (HELD_OUT + 2)))
        for number, start in enumerate(range(0, len(ids), length)):
            held = number % EVERY == HELD_OUT
            if held or number % EVERY == HELD_OUT + 1 or start == 0:
                parts[held].append([])
            parts[held][-1].extend(ids[start : start + length])
    learned, held_out = (_part(runs, window, step) for runs, step in zip(parts, (1, window), strict=True))
    if not min(len(learned.starts), len(held_out.starts)):
        raise ValueError(
            f"The corpus has {len(learned.ids)} tokens to learn from and {len(held_out.ids)} held out; neither may be "
            f"shorter than a window of {window}: bring more text."
        )
    return learned, held_out


def _part(runs: list[list[int]], window: int, step: int) -> Part:
    """Runs of tokens that follow each other, as one, with a window's start at every so many tokens of each."""
    starts, first = list[Tensor](), 0
    for run in runs:
        starts.append(torch.arange(first, first + max(0, len(run) - window + 1), step))
        first += len(run)
    return Part(torch.tensor([token for run in runs for token in run]), torch.cat(starts) if starts else torch.empty(0))


def windows(part: Part, starts: Tensor, length: int, end: int, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Inputs, with <|endoftext|> in front, and next-token targets, each [len(starts), length].

    `order` says which of a window's tokens stand where: [len(starts), length].
    """
    targets = part.ids[starts[:, None] + (torch.arange(length) if order is None else order)]
    return torch.cat([torch.full((len(starts), 1), end), targets[:, :-1]], 1), targets


def batch_of(step: int, part: Part, schedule: Schedule, end: int) -> tuple[Tensor, Tensor]:
    """The windows of one step: drawn from (seed, step) alone, so that a resumed run sees the same."""
    generator = np.random.default_rng([schedule.seed, step])
    chosen = torch.from_numpy(generator.integers(0, len(part.starts), schedule.batch))
    order = [_order(schedule.window, generator, schedule.repeat) for _ in chosen]
    return windows(part, part.starts[chosen], schedule.window, end, torch.stack(order))


def _order(length: int, generator: np.random.Generator, repeat: float) -> Tensor:
    """The order of a window's tokens: as they are, or in a share of the windows with a stretch once more, later on.

    A stretch has an eighth to a half of the window's tokens; what no longer fits is left out. Novels repeat little,
    and a model that never sees a passage again does not learn to copy.
    """
    if generator.random() >= repeat:
        return torch.arange(length)
    count = int(generator.integers(length // 8, length // 2 + 1))
    begin = int(generator.integers(0, length - 2 * count + 1))
    again = int(generator.integers(begin + count, length - count + 1))
    parts = (torch.arange(again), torch.arange(begin, begin + count), torch.arange(again, length - count))
    return torch.cat(parts)


@torch.no_grad()
def held_out_loss(model: GPT2, part: Part, window: int, most: int | None = None) -> float:
    """Mean next-token loss, in nats per token, over at most so many windows, evenly spaced."""
    starts = part.starts[_spaced(len(part.starts), most)]
    total = 0.0
    for chunk in starts.split(8):
        inputs, targets = (of.to(model.device) for of in windows(part, chunk, window, _end(model)))
        total += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / (len(starts) * window)


def _spaced(count: int, most: int | None) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most or count)).round().long()


def _end(model: GPT2) -> int:
    """<|endoftext|>, which every training's config names."""
    return int(model.config.eos_token_id or 0)


def make_optimizer(model: GPT2, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW over every weight. Only matrices that read from the stream decay: what writes into it may grow."""
    reading = [w for name, w in trained(model) if w.ndim >= 2 and _reads(name)]
    others = [w for name, w in trained(model) if not (w.ndim >= 2 and _reads(name))]
    groups = [
        {"params": reading, "weight_decay": schedule.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _reads(name: str) -> bool:
    """Whether a matrix of that name reads from the stream: no embedding does, and no projection into it."""
    return name.startswith("blocks.") and not name.endswith("projection.weight")


def drop(model: GPT2, share: float) -> None:
    """Let what attention and MLP write drop out while the model is in training mode, in any block that has both."""

    def hook(module: nn.Module, _given: Any, out: Any) -> Any:
        return F.dropout(out, share, module.training) if isinstance(out, Tensor) else out

    for block in model.blocks if share else ():
        for name in ("attention", "mlp"):
            if isinstance(sublayer := getattr(block, name, None), nn.Module):
                sublayer.register_forward_hook(hook)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss in nats per token, computed in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def take_step(
    model: GPT2,
    optimizer: torch.optim.AdamW,
    loss_of: Loss,
    batch: tuple[Tensor, Tensor],
    schedule: Schedule,
    step: int,
) -> float:
    """One optimiser step; returns its loss in nats per token."""
    torch.manual_seed(schedule.seed * 2**32 + step)  # of what drops out, so that a resumed run drops the same
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    device = next(model.parameters()).device
    inputs, targets = (part.to(device) for part in batch)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(inputs)
    loss = loss_of(logits, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
    optimizer.step()
    return loss.item()


@dataclass
class Progress:
    """How far a training has come."""

    losses: list[float]
    """Of every step."""
    log: list[Logged]


def save_state(path: Path, model: GPT2, optimizer: torch.optim.AdamW, progress: Progress, settings: str) -> None:
    """Write all that a resumed run needs: weights, both moments, the losses and the log so far."""
    log = [list(asdict(entry).values()) for entry in progress.log]
    tensors = {"losses": torch.tensor(progress.losses, dtype=torch.float64)}
    tensors["log"] = torch.tensor(log, dtype=torch.float64).reshape(-1, len(fields(Logged)))
    for name, parameter in trained(model):
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        for moment in MOMENTS:
            # a parameter that the block does not use has no gradient, and no moments
            found = optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
            tensors[f"{moment}/{name}"] = found.contiguous()
    write_tensors(path, tensors, {"settings": settings})


def load_state(path: Path, model: GPT2, optimizer: torch.optim.AdamW, settings: str) -> Progress:
    """Take up a saved state; returns how far it had come.

    Raises ValueError when the state was written by a run with other settings, or is broken.
    """
    try:
        return _read_state(path, model, optimizer, settings)
    except (RuntimeError, TypeError) as error:  # of another shape
        raise ValueError(f"{path} is broken ({error}); remove it to start anew.") from None


def _read_state(path: Path, model: GPT2, optimizer: torch.optim.AdamW, settings: str) -> Progress:
    with open_tensors(path) as file:
        found = (file.metadata() or {}).get("settings")
        if found != settings:
            raise ValueError(f"{path} belongs to a run with other settings ({found}); choose another --output.")
        losses = file.get_tensor("losses").tolist()
        log = [Logged(int(step), *rest) for step, *rest in file.get_tensor("log").tolist()]
        for name, parameter in trained(model):
            for part in ("weight", *MOMENTS):  # copying would broadcast, and the fused optimiser reads beyond the end
                shape = file.get_slice(f"{part}/{name}").get_shape()
                if shape != list(parameter.shape):
                    raise TypeError(f"{part}/{name} is {shape}, not {list(parameter.shape)}")
            parameter.data.copy_(file.get_tensor(f"weight/{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(len(losses)), device=parameter.device),
                **{moment: file.get_tensor(f"{moment}/{name}").to(parameter.device) for moment in MOMENTS},
            }
    return Progress(losses, log)


def trained(model: GPT2) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that the optimiser moves, each once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def train(model: GPT2, learned: Part, held_out: Part, schedule: Schedule, output: Path, settings: str) -> Progress:
    """Run the schedule from wherever `output` stands, saving as it goes; returns the losses and the log."""
    optimizer, progress = make_optimizer(model, schedule), Progress([], [])
    state = output / STATE_FILE
    if state.exists():
        progress = load_state(state, model, optimizer, settings)
    started, first = time.monotonic(), len(progress.losses)
    bar = tqdm(range(first, schedule.steps), initial=first, total=schedule.steps, unit="step", disable=None)
    loss_of = torch.compile(mean_loss) if compiled(model) else mean_loss
    for step in bar:
        batch = batch_of(step, learned, schedule, _end(model))
        progress.losses.append(take_step(model, optimizer, loss_of, batch, schedule, step))
        rate = (step + 1 - first) * schedule.batch * schedule.window / (time.monotonic() - started)
        bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", tokens_per_second=f"{rate:.0f}")
        done = step + 1 == schedule.steps
        if done or (step + 1) % REPORT_EVERY == 0:
            progress.log.append(logged(model, held_out, schedule, progress))
            tqdm.write(f"{_in_words(progress.log[-1], schedule)}, {rate:.0f} tokens/s", file=sys.stdout)
            sys.stdout.flush()
        if done or (step + 1) % SAVE_EVERY == 0:
            save_state(state, model, optimizer, progress, settings)
    return progress


def logged(model: GPT2, held_out: Part, schedule: Schedule, progress: Progress) -> Logged:
    """What the model does after the steps so far."""
    with _as_written(model):
        return _logged(model, held_out, schedule, progress)


@contextmanager
def _as_written(model: GPT2) -> Iterator[None]:
    """While the body runs, nothing drops out, and no block is compiled: who looks into one needs its hooks."""
    compiled = [block._compiled_call_impl for block in model.blocks]
    for block in model.eval().blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in zip(model.train().blocks, compiled, strict=True):
            block._compiled_call_impl = call


def _logged(model: GPT2, held_out: Part, schedule: Schedule, progress: Progress) -> Logged:
    seen = progress.log[-1].step if progress.log else 0
    recent = progress.losses[seen:] or progress.losses[-1:]
    starts = held_out.starts[_spaced(len(held_out.starts), OBSERVED_WINDOWS)]
    texts = windows(held_out, starts, schedule.window, _end(model))[1].tolist()
    found = observe(model, [text[:-1] for text in texts])
    return Logged(
        step=len(progress.losses),
        training_loss=sum(recent) / len(recent),
        held_out_loss=held_out_loss(model, held_out, schedule.window, HELD_OUT_WINDOWS),
        resting_heads=resting(found.attention[:, 1]),
        norm_of_position_0=float(found.norms[:, 1].mean(0).max()),
        induction_gain=copies(model).value,
    )


def _in_words(entry: Logged, schedule: Schedule) -> str:
    return (
        f"step {entry.step}/{schedule.steps}: training loss {entry.training_loss:.4f}, held-out loss "
        f"{entry.held_out_loss:.4f} nats per token, {entry.resting_heads:.0%} of heads rest on position 0, its norm is "
        f"{entry.norm_of_position_0:.3g} times the others', induction gain {entry.induction_gain:.3f} nats"
    )


def export(
    model: GPT2, tokenizer: tokenizers.Tokenizer, held_out: Part, progress: Progress, window: int, output: Path
) -> None:
    """Write the finished checkpoint, float16, with tokenizer, log and reference, and the held-out texts beside it."""
    names = [field.name for field in fields(Logged)]
    lines = [",".join(names), *(",".join(map(str, asdict(entry).values())) for entry in progress.log)]
    write_text(output / LOG_FILE, "\n".join(lines) + "\n")
    write_text(output / "tokenizer.json", tokenizer.to_str(pretty=True))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    text = json.dumps({**about, "model_max_length": window}, indent=2) + "\n"
    write_text(output / "tokenizer_config.json", text)
    model.half().save_pretrained(output)
    stored, whole = GPT2.from_pretrained(output, block=model.block), windows(held_out, held_out.starts, window, 0)[1]
    texts = tokenizer.decode_batch(whole.tolist(), skip_special_tokens=False)
    write_text(output / HELD_OUT_FILE, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    save_reference(output, whole[:1, : min(REFERENCE_TOKENS, window)], model.block)
    loss = held_out_loss(stored, held_out, window)
    bits = loss * whole.numel() / sum(map(len, texts)) / math.log(2)
    print(
        f"held-out loss of the stored checkpoint, over {len(texts)} windows: {loss:.4f} nats per token, "
        f"{bits:.4f} bits per character"
    )


def compiled(model: GPT2) -> bool:
    """Whether the blocks were handed to torch.compile."""
    return model.blocks[0]._compiled_call_impl is not None


def read_corpus(folder: Path) -> list[str]:
    """The texts of a folder's *.txt files, in the order of their names.

    Raises ValueError when there are none.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    if not texts:
        raise ValueError(f"{folder} holds no *.txt file; expected a folder of plain text.")
    return texts


def main(
    corpus: Annotated[Path, typer.Option(help="folder of *.txt files")],
    output: Annotated[Path, typer.Option(help="folder for the checkpoint; a stopped run there goes on")],
    tokens: Annotated[int, typer.Option(help="tokens to train on")] = Schedule.tokens,
    batch: Annotated[int, typer.Option(help="windows per step")] = Schedule.batch,
    learning_rate: float = Schedule.learning_rate,
    warmup_steps: int = Schedule.warmup_steps,
    weight_decay: Annotated[float, typer.Option(help="of matrices that read from the stream")] = Schedule.weight_decay,
    dropout: Annotated[float, typer.Option(help="share of what attention and MLP write")] = Schedule.dropout,
    repeat: Annotated[float, typer.Option(help="share of windows in which a stretch comes again")] = Schedule.repeat,
    n_layer: int = 12,
    n_embd: int = 192,
    n_head: int = 3,
    n_positions: Annotated[int, typer.Option(help="tokens per window")] = Schedule.window,
    vocab_size: int = 4096,
    seed: int = 0,
    device: str = "cpu",
    block: cli.Block = None,
    compile_blocks: Annotated[bool, typer.Option("--compile", help="faster; needs a C++ compiler")] = False,
) -> None:
    """Train a tokenizer and a GPT-2, or a model of another block, on a folder of text."""
    shares = {"dropout": dropout, "repeat": repeat}
    if wrong := [name for name, share in shares.items() if not 0 <= share < 1]:
        raise ValueError(f"--{wrong[0]} is {shares[wrong[0]]:g}; expected a share from 0 to below 1.")
    schedule = Schedule(
        tokens, batch, n_positions, learning_rate, warmup_steps, weight_decay, dropout, repeat, seed=seed
    )
    texts = read_corpus(corpus)
    tokenizer = train_tokenizer(texts, vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = GPT2Config(vocab_size, n_positions, n_embd, n_layer, n_head, bos_token_id=end, eos_token_id=end)
    torch.manual_seed(seed)
    model = GPT2(config, cli.pick_block(block)).to(cli.pick_device(device))
    drop(model, dropout)
    for layer in model.blocks if compile_blocks else ():
        layer.compile()
    run(model, tokenizer, split(texts, tokenizer, n_positions), schedule, output)


def run(
    model: GPT2, tokenizer: tokenizers.Tokenizer, parts: tuple[Part, Part], schedule: Schedule, output: Path
) -> None:
    """Train a model from wherever `output` stands, and write its checkpoint."""
    learned, held_out = parts
    count = f"{len(learned.ids)} training tokens, {len(held_out.ids)} held-out tokens, {schedule.steps} steps"
    stated = {"config": model.config.to_dict(block_name(model.block)), "schedule": asdict(schedule)}
    tokens = hashlib.sha256(b"".join(part.ids.numpy().tobytes() for part in parts)).hexdigest()
    settings = json.dumps({**stated, "compile": compiled(model), "tokens": tokens})
    print(count, flush=True)
    with alone_in(output):
        progress = train(model, learned, held_out, schedule, output, settings)
        export(model, tokenizer, held_out, progress, schedule.window, output)
