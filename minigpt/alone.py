"""A pass of many runs beside one run of its own: for models of which nobody knows what their blocks do.

A pass takes for granted that a block treats every row, and every position before the later ones, by itself. GPT-2's
own parts do. A block of one's own may look at later positions, which are padding for a short text; it may keep
something from call to call, draw at random, or look at other rows.
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minigpt.engine import Job, leaves_at, primal
from minigpt.measures import squared_norms
from minigpt.model import GPT2, forward_mode
from minigpt.parameters import TEXT_AXES, Native, assigned, natives, scaled

APART, ROUNDINGS_APART = 1e-3, 300
"""A run of its own may differ from the pass by this share of its difference, and this many roundings of the stream:
what a block does otherwise shows as more, and sums in another order as less. In half types that many roundings are more
than the stream, so only float32 and float64 tell."""


def unused(model: GPT2, names: Iterable[str], ids: Tensor) -> list[str]:
    """Those of some native parameters that take no part in what the model computes: [1, position] ids are tried.

    A block may declare one that its `forward` forgets.
    """
    declared, chosen = natives(model), list(names)
    with torch.inference_mode(mode=False), torch.enable_grad():
        values = {
            name: torch.full((), declared[name].nothing, dtype=model.dtype, device=model.device, requires_grad=True)
            for name in chosen
        }
        with scaled(model, values):
            last = deque(model.depths(ids[:1].clone().to(model.device)), maxlen=1).pop().sum()
        if not last.requires_grad:
            return chosen
        gradients = torch.autograd.grad(last, list(values.values()), allow_unused=True)
    return [name for name, gradient in zip(chosen, gradients, strict=True) if gradient is None]


def check_used(job: Job) -> None:
    """Raise ValueError for native parameters that runs name and the model's `forward` does not use."""
    if forgotten := unused(job.model, job.declared, job.ids[:, : int(job.lengths[0])]):
        name = forgotten[0].rpartition(".")[2]
        raise ValueError(
            f"The model's forward does not use {', '.join(forgotten)}, so a value would do nothing; "
            f"let its module say self.act({name.rpartition('_')[0]!r}, ...)."
        )


@torch.no_grad()  # which stops backward derivatives only
def check_a_run_alone(job: Job, in_pass: Callable[[int], Tensor]) -> None:
    """Hold a pass against one run of its own, of its shortest text; `in_pass` gives a run's `difference_sq` of it.

    Raises ValueError where the two differ.
    """
    model, text = job.model, int(job.lengths.argmin())
    run = min(range(len(job.runs)), key=lambda run: (leaves_at(job.runs[run]), -run))
    length, given = int(job.lengths[text]), job.runs[run]
    values = {name: _of_text(value, job.declared[name], text, length) for name, value in given.items()}
    ids, found = job.ids[text : text + 1, :length].to(model.device), in_pass(run)[:, text].sum(-1).sqrt()
    clean = list(model.depths(ids))
    with assigned(model, values), forward_mode() if job.tangents else nullcontext():
        for depth, (x, before) in enumerate(zip(model.depths(ids), clean, strict=True)):
            difference = forward_ad.unpack_dual(x).tangent if job.tangents else x - before
            alone = 0.0 if difference is None else _norm(difference)
            least = ROUNDINGS_APART * torch.finfo(x.dtype).eps * _norm(primal(before))
            if abs(alone - float(found[depth])) > APART * alone + least:
                raise ValueError(
                    f"Under {job.named(run)}, text {text} changes depth {depth} by {alone:.6g} in a run of its own, "
                    f"and by {float(found[depth]):.6g} beside others. So {type(model.blocks[0]).__name__} does not "
                    "treat every row by itself: does it look at later positions or other texts, keep something from "
                    "call to call, draw at random, or use a native parameter outside the module that declares it?"
                )


def _norm(x: Tensor) -> float:
    return float(squared_norms(x).sum().sqrt())


def _of_text(value: Tensor, native: Native, text: int, length: int) -> Tensor:
    """A run's value for one text, cut to its positions."""
    for axis, word in enumerate(native.shape):
        if word in TEXT_AXES and value.shape[axis] > 1:
            value = value.narrow(axis, text, 1) if word == "batch" else value.narrow(axis, 0, length)
    return value
