"""The shape of a model: Hugging Face's field names for GPT-2, checked when they are set."""

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minigpt.files import printable, read_json, shown

Activation = Callable[[torch.Tensor], torch.Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be used: the message says what was found, what was expected, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # a name in a stranger's file could steer the terminal


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_fast(x: torch.Tensor) -> torch.Tensor:
    # sqrt(2/pi) cut to ten digits, as in the code that this activation's checkpoints were trained with.
    return 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": _gelu_tanh,  # OpenAI's GPT-2
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": F.gelu,  # the erf form: not what the official weights were trained with
    "gelu_fast": _gelu_fast,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


MOST = 2**31 - 1
"""Of any dimension: the largest that every library below can count."""
OWN = "minigpt"
"""The model_type of a checkpoint whose block is not GPT-2's."""
_BLOCK_NAME = re.compile(r"[\w.]{1,200}:[\w.<>]{1,200}")


@dataclass(frozen=True)
class GPT2Config:
    """Every number that fixes a GPT-2's shape and arithmetic; the defaults are the 124M model's.

    The fields have the names and meanings of Hugging Face's `GPT2Config`. Dropout probabilities
    are kept for the round trip and never applied. No run reads `bos_token_id`; `eos_token_id` ends a generated text.
    Both may lie outside the vocabulary, as transformers leaves them where only `vocab_size` was chosen.

    Raises ValueError, naming the field, when a value cannot be right.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            _check_positive_integer(name, getattr(self, name))
        if self.n_inner is not None:
            _check_positive_integer("n_inner", self.n_inner)
        for field in fields(self):
            if field.type is float:
                _check_number(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, float(getattr(self, field.name)))  # JSON's 1 is a whole number
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                raise ValueError(f"{field.name} is {shown(getattr(self, field.name))}; expected true or false.")
        for name in ("bos_token_id", "eos_token_id"):
            _check_token_id(name, getattr(self, name))
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd is {self.n_embd} and n_head is {self.n_head}; n_embd must be a multiple of n_head."
            )
        if self.activation_function not in list(ACTIVATIONS):  # a list: what cannot be a key may be asked for
            raise ValueError(
                f"activation_function is {shown(self.activation_function)}; expected one of {', '.join(ACTIVATIONS)}."
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    def check_ids(self, ids: torch.Tensor, start: int = 0) -> None:
        """Raise ValueError unless ids are integers [batch, position] that this shape can read from position `start`."""
        if not isinstance(ids, torch.Tensor):
            raise ValueError(f"ids are a {type(ids).__name__}; expected a tensor: torch.tensor([ids]) for one text.")
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
            raise ValueError(
                f"ids are {ids.dtype} of shape {list(ids.shape)}; expected int64 of shape [batch, position], not empty."
            )
        if start and ids.shape[1] > 1:
            raise ValueError(f"{ids.shape[1]} new positions arrived; a cache in use takes one new position at a time.")
        end = start + ids.shape[1]
        if end > self.n_positions:
            raise ValueError(f"The text reaches {end} positions; the model has {self.n_positions}: shorten it.")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"ids run from {low} to {high}; expected 0 to {self.vocab_size - 1} (vocab_size - 1).")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPT2Config":
        """Read the fields of a config.json; fields that do not touch the arithmetic are ignored.

        Of which block the model is made is not part of its shape: `read_config` tells it.
        Raises ValueError, naming the field, for another architecture or a feature that is not built here.
        """
        _check_architecture(values)
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_file(cls, path: Path) -> "GPT2Config":
        """Read a config.json; raises CheckpointError when it is absent, broken or not GPT-2's."""
        return read_config(path)[0]

    def to_dict(self, block: str | None = None) -> dict[str, Any]:
        """The fields as config.json holds them, readable by Hugging Face transformers.

        With the name of a block that is not GPT-2's, they claim to be no more than a model of this library.
        """
        if block is None:
            return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **asdict(self)}
        return {"model_type": OWN, "architectures": ["minigpt.GPT2"], "block": block, **asdict(self)}


def read_config(path: Path) -> tuple[GPT2Config, str | None]:
    """The shape that a config.json states, and the name of the model's block, where that is not GPT-2's.

    Raises CheckpointError when the file is absent, broken or of another architecture.
    """
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no config.json; expected a folder with config.json and model.safetensors."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{error} Download or write it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected an object of named fields.")
    try:
        return GPT2Config.from_dict(values), values.get("block")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_architecture(values: dict[str, Any]) -> None:
    model_type, block = values.get("model_type", "gpt2"), values.get("block")
    if model_type not in ("gpt2", OWN):
        raise ValueError(f"model_type is {shown(model_type)}; only 'gpt2' can be loaded, and {OWN!r}.")
    if model_type == "gpt2" and block is not None:
        raise ValueError(f"block is {shown(block)}, but model_type is 'gpt2', whose block has no name; remove one.")
    if model_type == OWN and not (isinstance(block, str) and _BLOCK_NAME.fullmatch(block)):
        raise ValueError(f"block is {shown(block)}; expected the name of one: package.module:Name.")
    for name in ("add_cross_attention", "is_encoder_decoder", "quantization_config", "pruned_heads"):
        if values.get(name):
            raise ValueError(f"{name} is set to {shown(values[name])}; it is not supported, only a plain GPT-2 is.")


def _check_positive_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise ValueError(f"{name} is {shown(value)}; expected an integer from 1 to {MOST}.")


def _check_number(name: str, value: object) -> None:
    # A comparison, for it takes whole numbers of any size, and is false for what is not a number.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} is {shown(value)}; expected a finite number of at least 0.")


def _check_token_id(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST):
        raise ValueError(f"{name} is {shown(value)}; expected an integer from 0 to {MOST}, or null.")


OFFICIAL: dict[str, GPT2Config] = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "distilgpt2": GPT2Config(n_layer=6),
}
"""The short names and the shapes they stand for."""
