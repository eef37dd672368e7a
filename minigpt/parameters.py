"""The names of the scales, and `scaled`, which sets them for a while.

    blocks.2.output_scale              the whole output of block 2
    blocks.2.attention_scale           what its attention writes into the stream
    blocks.2.mlp_scale                 what its MLP writes into the stream
    blocks.2.attention.head_scale      [n_head]: what each head brings, before the projection

attention_scale = mlp_scale = 0 skips a block. Zeroing every head leaves the projection's bias in
the stream; zeroing attention_scale removes it too.
"""

import difflib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from minigpt.checkpoint import is_scale
from minigpt.config import GPT2Config
from minigpt.model import GPT2

Site = Literal["output", "attention", "mlp", "head"]
SITES: tuple[Site, ...] = get_args(Site)


def check_site(name: str) -> Site:
    """The site of that name. Raises ValueError for one that does not exist."""
    for site in SITES:
        if site == name:
            return site
    raise ValueError(f"site is {name!r}; expected one of {', '.join(SITES)}.")


def scale_name(layer: int, site: Site = "output") -> str:
    """The name of a block's scale. Raises ValueError for a site that does not exist."""
    check_site(site)
    return f"blocks.{layer}.attention.head_scale" if site == "head" else f"blocks.{layer}.{site}_scale"


def scale_names(config: GPT2Config) -> list[str]:
    """The names of all scales of a model, block by block."""
    return [scale_name(layer, site) for layer in range(config.n_layer) for site in SITES]


@contextmanager
def scaled(model: GPT2, scales: Mapping[str, float | Tensor]) -> Generator[GPT2]:
    """Run the body of a `with` statement under other scales, and restore them, also after an error.

    A value is a number, or a tensor that broadcasts against the stream [batch, position, n_embd]
    (for a head_scale against [batch, position, n_head]): [rows, 1, 1] gives every row its own
    factor, [1, position, 1] every position its own. Gradients flow to a tensor that asks for them.

        with scaled(model, {"blocks.2.output_scale": 0.5}):
            logits = model(ids)

    Raises ValueError for an unknown name, listing the nearest ones, and for a shape that cannot fit.
    """
    places = {name: _registry(model, name) for name in scales}
    values = {name: _fitting(model, name, value, *places[name]) for name, value in scales.items()}
    before = {name: registry[leaf] for name, (registry, leaf) in places.items()}
    try:
        for name, (registry, leaf) in places.items():
            # The registry takes any tensor; `setattr` would insist on a Parameter, which cuts gradients.
            registry[leaf] = values[name]
        yield model
    finally:
        for name, (registry, leaf) in places.items():
            registry[leaf] = before[name]


def current_scales(model: GPT2) -> list[Tensor]:
    """The tensors that stand for the scales now, in the order of `scale_names`."""
    return [
        scale
        for block in model.blocks
        for scale in (block.output_scale, block.attention_scale, block.mlp_scale, block.attention.head_scale)
    ]


def scales_not_one(model: GPT2) -> dict[str, Tensor]:
    """The scales whose value is not 1, by name: empty for a clean model."""
    parameters = model.named_parameters()
    return {name: value for name, value in parameters if is_scale(name) and not bool((value == 1).all())}


def _registry(model: GPT2, name: str) -> tuple[dict[str, Tensor], str]:
    """The dict of a module that holds a scale, and the key in it."""
    known = scale_names(model.config)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=4, cutoff=0.0)
        raise ValueError(f"There is no scale {name!r}; the nearest names are {', '.join(nearest)}.")
    path, _, leaf = name.rpartition(".")
    return cast("dict[str, Tensor]", model.get_submodule(path)._parameters), leaf


def _fitting(model: GPT2, name: str, value: float | Tensor, registry: dict[str, Tensor], leaf: str) -> Tensor:
    """The value as a tensor like the scale, or a ValueError when its shape cannot broadcast."""
    try:
        tensor = torch.as_tensor(value, dtype=registry[leaf].dtype, device=registry[leaf].device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} was given {value!r}; expected a number or a tensor.") from None
    width = model.config.n_head if name.endswith("head_scale") else model.config.n_embd
    if tensor.ndim > 3 or (tensor.ndim and tensor.shape[-1] not in (1, width)):
        raise ValueError(
            f"{name} was given a tensor of shape {list(tensor.shape)}; "
            f"expected one that broadcasts to [batch, position, {width}], such as [rows, 1, 1]."
        )
    return tensor
