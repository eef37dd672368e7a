"""Blocks of one's own, for every test that asks whether the library follows a changed architecture."""

import torch
from torch import Tensor, nn

from minigpt.cache import KeyValueCache
from minigpt.model import MLP, Attention, Block
from minigpt.parameters import Native


class Parallel(Block):
    """Attention and MLP read the same normed stream (as in GPT-J): GPT-2's parameters, put together otherwise."""

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        read = self.attention_norm(x)
        written = self.act("attention", self.attention(read, cache)) + self.act("mlp", self.mlp(read))
        return self.act("output", x + written)


class RMSNorm(Block):
    """Norm layers without a mean and without a bias: fewer parameters than GPT-2's."""

    norm = nn.RMSNorm


class RotaryAttention(Attention):
    """Queries and keys are turned by an angle that grows with the position (Su et al. 2021, section 3.2.2)."""

    def heads(self, x: Tensor, start: int = 0) -> list[Tensor]:
        q, k, v = super().heads(x, start)
        return [turned(q, start), turned(k, start), v]


def turned(x: Tensor, start: int) -> Tensor:
    """[batch, n_head, position, head_width]; coordinate i is turned together with i + head_width / 2."""
    half = x.shape[3] // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    positions = torch.arange(start, start + x.shape[2], device=x.device, dtype=x.dtype)
    cos, sin = (angles := positions[:, None] * speeds).cos(), angles.sin()
    one, other = x.split(half, dim=3)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=3)


class Rotary(Block):
    """Positions enter the scores of attention alone: there is no embedding of them."""

    attention_class = RotaryAttention
    position_embedding = False


class NeuronMLP(MLP):
    """Every neuron has a gain of its own, before the activation."""

    native = (*MLP.native, Native("gain_scale", ("batch", "position", "mlp_width"), index="neuron"))
    gain_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act("neuron", self.activation(self.gain_scale * self.expand(x))))


class Neurons(Block):
    """GPT-2's block with one more site, whose index counts neurons."""

    mlp_class = NeuronMLP


BLOCKS: tuple[type[Block], ...] = (Parallel, RMSNorm, Rotary)
