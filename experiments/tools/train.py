"""Train a small GPT-2 from nothing on a folder of plain text: how weights/tiny was made.

    python -m experiments.train --corpus DIR --output DIR

The folder's *.txt files are read in the order of their names. The last twentieth of
each is held out. A run that is stopped goes on where its last checkpoint was, to the same losses.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from experiments.harness.output import alone_in
from minigpt import cli
from minigpt.config import GPT2Config
from minigpt.files import open_tensors, write_tensors, write_text
from minigpt.model import GPT2, block_name
from minigpt.parity import save_reference

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 1 / 20
HELD_OUT_WINDOWS = 300
STATE_FILE = "training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
REFERENCE_TOKENS = 64
SAVE_EVERY = 200  # steps
REPORT_EVERY = 500  # steps

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn; the defaults made weights/tiny."""

    tokens: int = 24_000_000
    batch: int = 16  # windows
    window: int = 256  # tokens
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    decay_share: float = 0.3  # of all steps, at the end, down to zero
    weight_decay: float = 0.1  # on matrices
    gradient_clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps in the whole training."""
        return max(1, self.tokens // (self.batch * self.window))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, a plateau, linear decay to zero."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, (self.steps - step) / max(1.0, self.decay_share * self.steps))
        return self.learning_rate * warm * decay


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


def split(texts: list[str], tokenizer: tokenizers.Tokenizer, window: int) -> tuple[Tensor, Tensor]:
    """Training and held-out token ids: the first 19/20 and the last 1/20 of every text.

    Raises ValueError when either part is shorter than a window and one token.
    """
    end = tokenizer.encode(END_OF_TEXT).ids
    parts: tuple[list[int], list[int]] = ([], [])
    for text in texts:
        ids = tokenizer.encode(text).ids
        cut = round(len(ids) * (1 - HELD_OUT_SHARE))
        for part, share in zip(parts, (ids[:cut], ids[cut:]), strict=True):
            part += [*end, *share]
    if min(map(len, parts)) <= window:
        raise ValueError(
            f"The corpus has {len(parts[0])} tokens to learn from and {len(parts[1])} held out; each part must be "
            f"longer than a window of {window}: bring more text."
        )
    return torch.tensor(parts[0]), torch.tensor(parts[1])


def windows(ids: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets, each [len(starts), length]."""
    index = starts[:, None] + torch.arange(length + 1)
    return ids[index[:, :-1]], ids[index[:, 1:]]


def batch_of(step: int, ids: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The windows of one step: drawn from (seed, step) alone, so that a resumed run sees the same."""
    generator = np.random.default_rng([schedule.seed, step])
    starts = torch.from_numpy(generator.integers(0, len(ids) - schedule.window, schedule.batch))
    return windows(ids, starts, schedule.window)


@torch.no_grad()
def held_out_loss(model: GPT2, ids: Tensor, window: int) -> float:
    """Mean next-token loss, in nats per token, over windows evenly spaced in the held-out text."""
    starts = torch.linspace(0, len(ids) - window - 1, HELD_OUT_WINDOWS).long()
    device = next(model.parameters()).device
    total = 0.0
    for chunk in starts.split(20):
        inputs, targets = (part.to(device) for part in windows(ids, chunk, window))
        total += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / (len(starts) * window)


def make_optimizer(model: GPT2, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW over every weight, decaying the matrices only; the scales are not trained."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": schedule.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


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


def save_state(path: Path, model: GPT2, optimizer: torch.optim.AdamW, losses: list[float], settings: str) -> None:
    """Write all that a resumed run needs: weights, both moments, the losses so far."""
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in trained(model):
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        for moment in MOMENTS:
            # a parameter that the block does not use has no gradient, and no moments
            found = optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
            tensors[f"{moment}/{name}"] = found.contiguous()
    write_tensors(path, tensors, {"settings": settings})


def load_state(path: Path, model: GPT2, optimizer: torch.optim.AdamW, settings: str) -> list[float]:
    """Take up a saved state; returns the losses so far, one for each step done.

    Raises ValueError when the state was written by a run with other settings, or is broken.
    """
    try:
        return _read_state(path, model, optimizer, settings)
    except (RuntimeError, TypeError) as error:  # of another shape
        raise ValueError(f"{path} is broken ({error}); remove it to start anew.") from None


def _read_state(path: Path, model: GPT2, optimizer: torch.optim.AdamW, settings: str) -> list[float]:
    with open_tensors(path) as file:
        found = (file.metadata() or {}).get("settings")
        if found != settings:
            raise ValueError(f"{path} belongs to a run with other settings ({found}); choose another --output.")
        losses = file.get_tensor("losses").tolist()
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
    return losses


def trained(model: GPT2) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that the optimiser moves, each once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def train(
    model: GPT2, train_ids: Tensor, held_out_ids: Tensor, schedule: Schedule, output: Path, settings: str
) -> None:
    """Run the schedule from wherever `output` stands, saving as it goes."""
    optimizer, losses = make_optimizer(model, schedule), []
    state = output / STATE_FILE
    if state.exists():
        losses = load_state(state, model, optimizer, settings)
    started, first = time.monotonic(), len(losses)
    bar = tqdm(range(first, schedule.steps), initial=first, total=schedule.steps, unit="step", disable=None)
    loss_of = torch.compile(mean_loss) if compiled(model) else mean_loss
    for step in bar:
        losses.append(take_step(model, optimizer, loss_of, batch_of(step, train_ids, schedule), schedule, step))
        rate = (step + 1 - first) * schedule.batch * schedule.window / (time.monotonic() - started)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_second=f"{rate:.0f}")
        done = step + 1 == schedule.steps
        if done or (step + 1) % SAVE_EVERY == 0:
            save_state(state, model, optimizer, losses, settings)
        if done or (step + 1) % REPORT_EVERY == 0:
            held_out = held_out_loss(model, held_out_ids, schedule.window)
            recent = sum(losses[-REPORT_EVERY:]) / len(losses[-REPORT_EVERY:])
            tqdm.write(
                f"step {step + 1}/{schedule.steps}: training loss {recent:.4f}, held-out loss {held_out:.4f} "
                f"nats per token, {rate:.0f} tokens/s",
                file=sys.stdout,
            )
            sys.stdout.flush()


def export(model: GPT2, tokenizer: tokenizers.Tokenizer, held_out_ids: Tensor, window: int, output: Path) -> None:
    """Write the finished checkpoint, float16, with tokenizer, losses and reference."""
    with open_tensors(output / STATE_FILE) as file:
        losses = file.get_tensor("losses").tolist()
    lines = [f"{step},{loss}" for step, loss in enumerate(losses, start=1)]
    text = "\n".join(["step,nats_per_token", *lines]) + "\n"
    write_text(output / "losses.csv", text)
    write_text(output / "tokenizer.json", tokenizer.to_str(pretty=True))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    text = json.dumps({**about, "model_max_length": window}, indent=2) + "\n"
    write_text(output / "tokenizer_config.json", text)
    model.half().save_pretrained(output)
    stored = GPT2.from_pretrained(output, block=model.block)
    save_reference(output, held_out_ids[None, : min(REFERENCE_TOKENS, window)], model.block)
    loss = held_out_loss(stored, held_out_ids, window)
    print(f"held-out loss of the stored checkpoint: {loss:.4f} nats per token")


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
    n_layer: int = 12,
    n_embd: int = 192,
    n_head: int = 3,
    n_positions: Annotated[int, typer.Option(help="tokens per window")] = 256,
    vocab_size: int = 4096,
    seed: int = 0,
    device: str = "cpu",
    block: cli.Block = None,
    compile_blocks: Annotated[bool, typer.Option("--compile", help="faster; needs a C++ compiler")] = False,
) -> None:
    """Train a tokenizer and a GPT-2, or a model of another block, on a folder of text."""
    schedule = Schedule(tokens, batch, n_positions, learning_rate, warmup_steps, seed=seed)
    texts = read_corpus(corpus)
    tokenizer = train_tokenizer(texts, vocab_size)
    train_ids, held_out_ids = split(texts, tokenizer, n_positions)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    made_of = cli.pick_block(block)
    stated = config.to_dict(block_name(made_of))
    settings = json.dumps({"config": stated, "schedule": asdict(schedule), "compile": compile_blocks})
    torch.manual_seed(seed)
    model = GPT2(config, made_of).to(cli.pick_device(device))
    if compile_blocks:
        for layer in model.blocks:
            layer.compile()
    print(f"{len(train_ids)} training tokens, {len(held_out_ids)} held-out tokens, {schedule.steps} steps", flush=True)
    with alone_in(output):
        train(model, train_ids, held_out_ids, schedule, output, settings)
        export(model, tokenizer, held_out_ids, n_positions, output)


if __name__ == "__main__":
    cli.run(lambda: typer.run(main))
