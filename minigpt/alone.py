"""A pass of many runs beside one run of its own: for models of which nobody knows what their blocks do.

A pass takes for granted that a block treats every row, and every position before the later ones, by itself. GPT-2's
own parts do. A block of one's own may look at later positions, which are padding for a short text; it may keep
something from call to call, draw at random, or look at other rows.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minigpt.engine import Job, leaves_at, primal
from minigpt.measures import squared_norms
from minigpt.model import forward_mode
from minigpt.parameters import TEXT_AXES, Native, assigned

APART, ROUNDINGS_APART = 1e-3, 300
"""A run of its own may differ from the pass by this share of its difference, and this many roundings of the stream:
what a block does otherwise shows as more, and sums in another order as less. In half types that many roundings are more
than the stream, so only float32 and float64 tell."""


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
