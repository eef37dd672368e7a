"""The native parameters: each is declared once, in the module that uses it, and all else is made from that.

A site is a place in the model where something acts. One law holds at each: a <- scale * a + shift.

    embedding_scale, embedding_shift             the stream at depth 0
    blocks.2.output_scale, ..._shift             the whole output of block 2
    blocks.2.attention_scale, ..._shift          what its attention writes into the stream
    blocks.2.mlp_scale, ..._shift                what its MLP writes into the stream
    blocks.2.attention.head_scale, ..._shift     what each head mixed, before the projection
    blocks.2.attention.query_scale, ..._shift    likewise key and value: what the scores and the mixtures are made of
    blocks.2.attention.score_shift               the scores before the softmax; minus infinity removes an edge
    blocks.2.mlp.neuron_scale, ..._shift         the MLP's hidden layer, after the activation

attention_scale = mlp_scale = 0 skips a block. Zeroing every head leaves the projection's bias in the stream;
zeroing attention_scale removes it too.

A module lists its native parameters in `native`, makes them with `declare`, and uses them in its `forward`: `act` is
the law. Their names, the values that `scaled` takes, the sites of `sweep`, the columns of tables and the sentences of
errors follow.
"""

import difflib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from minigpt.config import GPT2Config

Values = Mapping[str, float | Tensor]
"""Names of native parameters and their values: what one run does to a model."""
STREAM = ("batch", "position", "n_embd")
TEXT_AXES = {"batch": "texts", "position": "positions", "query": "queries", "key": "keys"}
"""The words of a shape that depend on the texts, and what there are several of; the others are fields of the config."""


COLUMNS = (
    *("model", "site", "layer", "factor", "depth", "positions", "metric", "text", "intervention"),
    *("value", "error", "sd", "median", "q1", "q3", "low", "high", "windows"),
)
"""What other columns of a table of results are called."""


@dataclass(frozen=True)
class Native:
    """The declaration of one native parameter of a module."""

    name: str
    """SITE_scale or SITE_shift: what it acts on, and how."""
    shape: tuple[str, ...] = STREAM
    """What a value broadcasts against, in words: of `TEXT_AXES`, `batch` first, and fields of the config."""
    neutral: float = 1.0
    """The value that changes nothing."""
    index: str | None = None
    """What one entry is called if each has its own value: head, for example. Entries lie on the first axis that is a
    field of the config."""
    optional: bool = False
    """Whether it is None until it is given a value. Until then it takes part in nothing, and costs nothing."""

    def __post_init__(self) -> None:
        if self.shape[:1] != ("batch",) or (self.index and set(self.shape) <= set(TEXT_AXES)):
            raise ValueError(
                f"{self.name} is declared with the shape {self.shape}; expected `batch` first, and where entries have "
                "values of their own, an axis that is a field of the config."
            )
        if self.index in COLUMNS:
            raise ValueError(f"{self.name} is declared with the index {self.index!r}, which tables use otherwise.")
        expected = {"scale": 1.0, "shift": 0.0}.get(self.name.rpartition("_")[2], self.neutral)
        if self.neutral != expected:
            raise ValueError(
                f"{self.name} is declared neutral at {self.neutral:g}; it must be neutral at {expected:g}."
            )

    @property
    def site(self) -> str:
        """What it acts on: `output` of `output_scale`."""
        return self.name.rpartition("_")[0]

    def sizes(self, config: GPT2Config) -> list[int | None]:
        """The shape in numbers; None for the axes of the texts."""
        return [getattr(config, axis, None) for axis in self.shape]

    @property
    def indexed_axis(self) -> int:
        """The axis of the entries, where there is an index."""
        return next(axis for axis, word in enumerate(self.shape) if word not in TEXT_AXES)

    def entries(self, config: GPT2Config) -> int:
        """How many entries of their own the site has: heads, say. 1 where there is no index."""
        return cast("int", self.sizes(config)[self.indexed_axis]) if self.index else 1

    @property
    def nothing(self) -> float:
        """The neutral value that changes no bit: -0.0 of a shift, for 0.0 added to -0.0 is 0.0."""
        return self.neutral or -0.0

    def neutral_value(self, config: GPT2Config) -> Tensor:
        """The value that changes nothing, with an axis for every one from the entries on."""
        sizes = [size or 1 for size in self.sizes(config)[self.indexed_axis :]] if self.index else []
        return torch.full(sizes, self.nothing)


def law(
    site: str, shape: tuple[str, ...] = STREAM, index: str | None = None, optional: bool = True
) -> tuple[Native, Native]:
    """The scale and the shift of a site: a <- scale * a + shift.

    `shape` is that of what it acts on. Entries with an index have one scale each: their last axis has none of its own.
    `optional` says whether the scale is; a shift always is.
    """
    whole = shape[:-1] if index else shape
    return (
        Native(f"{site}_scale", whole, index=index, optional=optional),
        Native(f"{site}_shift", shape, neutral=0.0, index=index, optional=True),
    )


class NativeModule(nn.Module):
    """A module with native parameters."""

    native: ClassVar[tuple[Native, ...]] = ()

    def act(self, site: str, a: Tensor) -> Tensor:
        """scale * a + shift at one of the module's sites, [batch, position, ...]; what is None takes no part."""
        for name in (f"{site}_scale", f"{site}_shift"):
            value: Tensor | None = self._parameters.get(name)
            if value is not None:
                words = {native.name: native.shape for native in self.native}[name]
                value = value[(..., *[None] * (a.ndim - len(words)))]  # one factor for the whole width of a head
                a = value * a if name.endswith("scale") else a + value
        return a


def declare(module: nn.Module, declared: Iterable[Native], config: GPT2Config) -> None:
    """Give a module its native parameters, at their neutral values, or none: no optimiser moves them."""
    for native in {native.name: native for native in declared}.values():
        value = None if native.optional else nn.Parameter(native.neutral_value(config), requires_grad=False)
        module.register_parameter(native.name, value)


def natives(model: nn.Module) -> dict[str, Native]:
    """Full name -> declaration of every native parameter of a model, or of a block, in the order of its modules."""
    return {
        f"{path}.{native.name}" if path else native.name: native
        for path, module in model.named_modules()
        for native in getattr(module, "native", ())
    }


def sites_of(model: nn.Module) -> tuple[str, ...]:
    """The sites that the blocks of a model have a scale for."""
    return tuple(dict.fromkeys(scaled_sites(natives(_blocks(model)[0]).values())))


def scaled_sites(declared: Iterable[Native]) -> tuple[str, ...]:
    """The sites of those declarations that are of scales."""
    return tuple(native.site for native in declared if native.name == f"{native.site}_scale")


def parameter_name(model: nn.Module, layer: int, site: str = "output") -> str:
    """The full name of the scale of a block's site. Raises ValueError for a site that does not exist."""
    declared = natives(_blocks(model)[layer]).items()
    names = [f"blocks.{layer}.{name}" for name, native in declared if native.name == f"{site}_scale"]
    if len(names) > 1:
        raise ValueError(f"site is {site!r}, which several modules have: {', '.join(names)}. Give them other names.")
    if not names:
        raise ValueError(f"site is {site!r}; expected one of {', '.join(sites_of(model))}.")
    return names[0]


def block_of(name: str) -> int:
    """The block that a native parameter belongs to; -1 for one that acts before all blocks."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


def current(model: nn.Module) -> dict[str, Tensor | None]:
    """The tensors that stand for the native parameters now, by name; None for one that nobody set."""
    places = {name: _place(model, name) for name in natives(model)}
    return {name: registry[leaf] for name, (registry, leaf) in places.items()}


def not_neutral(model: nn.Module) -> dict[str, Tensor]:
    """The native parameters whose value is not neutral, by name: empty for a clean model."""
    values, declared = current(model).items(), natives(model)
    return {name: of for name, of in values if of is not None and not bool((of == declared[name].neutral).all())}


def check_clean(model: nn.Module) -> None:
    """Raise ValueError, naming them, when native parameters are not neutral; and when dropout would draw at random."""
    if any(isinstance(of, _DropoutNd) and of.training and of.p > 0 for of in model.modules()):
        raise ValueError(
            "The model has dropout and is in training mode: every run would be another; call model.eval()."
        )
    if changed := not_neutral(model):
        declared = natives(model)
        back = ", ".join(f"{name} back to {declared[name].neutral:g}" for name in changed)
        raise ValueError(f"The clean run needs every native parameter to be neutral; set {back}.")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's state but the native parameters: what a checkpoint holds."""
    declared = natives(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in declared}


@contextmanager
def scaled(model: nn.Module, values: Values) -> Generator[Any]:
    """Run the body of a `with` statement under other values, and restore them, also after an error.

    A value is a number, or a tensor that broadcasts against what the parameter acts on: [batch, position, n_embd],
    for a head_scale [batch, position, n_head], for a head_shift [batch, position, n_head, head_width]. [rows, 1, 1]
    gives every row its own factor, [1, position, 1] every position its own. Gradients flow to a tensor that asks for
    them.

        with scaled(model, {"blocks.2.output_scale": 0.5}):
            logits = model(ids)

    Raises ValueError for an unknown name, listing the nearest ones, for a shape that cannot fit, and for not a number.
    """
    (fitting,) = fit(model, [values])
    with assigned(model, fitting):
        yield model


@contextmanager
def assigned(module: nn.Module, values: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Set native parameters of a model, or of a block, to tensors that fit, and restore them."""
    places = {name: _place(module, name) for name in values}
    before = {name: registry[leaf] for name, (registry, leaf) in places.items()}
    try:
        for name, (registry, leaf) in places.items():
            # The registry takes any tensor; `setattr` would insist on a Parameter, which cuts gradients.
            registry[leaf] = values[name]
        yield
    finally:
        for name, (registry, leaf) in places.items():
            registry[leaf] = before[name]


def fit(model: nn.Module, runs: Sequence[Values]) -> list[dict[str, Tensor]]:
    """The values of some runs as tensors of the model's type and device.

    Raises ValueError for an unknown name, listing the nearest ones, for what is no number or tensor, and for a shape
    that cannot broadcast.
    """
    known, like = natives(model), next(model.parameters())
    for name in (name for values in runs for name in values if name not in known):
        nearest = sorted(known, key=lambda other: -_likeness(name, other))[:4]
        raise ValueError(f"There is no parameter {name!r}; the nearest names are {', '.join(nearest)}.")
    config = cast("GPT2Config", model.config)
    return [{name: _fitting(name, value, known[name], like, config) for name, value in of.items()} for of in runs]


def _likeness(name: str, other: str) -> float:
    """How alike two full names are; the last part counts once more, for a path is easily left out."""
    pairs = ((name, other), (name.rpartition(".")[2], other.rpartition(".")[2]))
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)


def _fitting(name: str, value: float | Tensor, native: Native, like: Tensor, config: GPT2Config) -> Tensor:
    if isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex()):
        raise ValueError(f"{name} was given {value!r}; expected real numbers.")
    try:
        tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} was given {value!r}; expected a number or a tensor.") from None
    if bool((tensor.isnan() | (tensor == torch.inf)).any()) and native.name.endswith("shift"):
        raise ValueError(f"{name} was given infinity, or not a number; expected numbers.")
    if bool(tensor.isnan().any()):
        raise ValueError(f"{name} was given not a number; expected numbers.")
    sizes = native.sizes(config)
    behind = zip(reversed(tensor.shape), reversed(sizes), strict=False)
    if tensor.ndim > len(sizes) or any(size is not None and found not in (1, size) for found, size in behind):
        against = ", ".join(word if size is None else str(size) for word, size in zip(native.shape, sizes, strict=True))
        example = ", ".join(["rows", *("1" for _ in native.shape[1:])])
        raise ValueError(
            f"{name} was given a tensor of shape {list(tensor.shape)}; "
            f"expected one that broadcasts to [{against}], such as [{example}]."
        )
    return tensor


def _place(module: nn.Module, name: str) -> tuple[dict[str, Tensor | None], str]:
    """The dict of a module that holds a parameter, and the key in it."""
    path, _, leaf = name.rpartition(".")
    return cast("dict[str, Tensor | None]", module.get_submodule(path)._parameters), leaf


def _blocks(model: nn.Module) -> nn.ModuleList:
    return cast("nn.ModuleList", model.blocks)
