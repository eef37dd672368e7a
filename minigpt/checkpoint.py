"""Files on disk <-> parameters: the one name table, and every way that a checkpoint can be wrong.

Hugging Face's GPT-2 keeps the layers of attention and MLP as `Conv1D`, which multiplies x @ W with
W of shape [in, out]; `nn.Linear` multiplies x @ W.T with W of shape [out, in]. So those weights are
transposed on the way in and out: as views, without a copy.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from minigpt.config import CheckpointError, GPT2Config
from minigpt.files import MOST_HEADER, open_tensors, read_json, shown, write_together

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ORIGIN = "origin.json"  # which repository and commit a downloaded folder holds
MOST_PROBLEMS = 20
"""Of a checkpoint, that an error lists; the others it counts."""

# name in the file, name in the model, shape in the file, whether it is Conv1D's
# shape: V vocab_size, P n_positions, D n_embd, Q 3 * n_embd (queries, keys, values), M the MLP's width
_WHOLE_MODEL = (
    ("wte.weight", "token_embedding.weight", "VD", False),
    ("wpe.weight", "position_embedding.weight", "PD", False),
    ("ln_f.weight", "final_norm.weight", "D", False),
    ("ln_f.bias", "final_norm.bias", "D", False),
    ("lm_head.weight", "unembed.weight", "VD", False),
)
_EVERY_BLOCK = (
    ("ln_1.weight", "attention_norm.weight", "D", False),
    ("ln_1.bias", "attention_norm.bias", "D", False),
    ("attn.c_attn.weight", "attention.qkv.weight", "DQ", True),
    ("attn.c_attn.bias", "attention.qkv.bias", "Q", False),
    ("attn.c_proj.weight", "attention.projection.weight", "DD", True),
    ("attn.c_proj.bias", "attention.projection.bias", "D", False),
    ("ln_2.weight", "mlp_norm.weight", "D", False),
    ("ln_2.bias", "mlp_norm.bias", "D", False),
    ("mlp.c_fc.weight", "mlp.expand.weight", "DM", True),
    ("mlp.c_fc.bias", "mlp.expand.bias", "M", False),
    ("mlp.c_proj.weight", "mlp.projection.weight", "MD", True),
    ("mlp.c_proj.bias", "mlp.projection.bias", "D", False),
)
_PREFIX = "transformer."
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old files carry
_OF_BLOCK = re.compile(r"h\.(0|[1-9]\d{0,8})\.(.+)")
_FLOATS = {"F16", "BF16", "F32", "F64"}


class Stored(NamedTuple):
    """How a file keeps a parameter."""

    name: str
    """In the model."""
    shape: list[int]
    """In the file."""
    conv1d: bool
    """Whether it is transposed there."""


class Layout:
    """Hugging Face's layout of a GPT-2 of some shape. Nothing of the model's size is made to look into it."""

    def __init__(self, config: GPT2Config) -> None:
        self.n_layer = config.n_layer
        self.optional = {"lm_head.weight"} if config.tie_word_embeddings else set[str]()
        width = config.n_embd
        sizes = {"V": config.vocab_size, "P": config.n_positions, "D": width, "Q": 3 * width, "M": config.mlp_width}
        self._whole, self._block = (
            {theirs: Stored(ours, [sizes[size] for size in shape], conv1d) for theirs, ours, shape, conv1d in table}
            for table in (_WHOLE_MODEL, _EVERY_BLOCK)
        )

    def get(self, theirs: str) -> Stored | None:
        """What the file's tensor of that name is; None for a name that does not belong."""
        if match := _OF_BLOCK.fullmatch(theirs):
            layer, stored = int(match[1]), self._block.get(match[2])
            return stored._replace(name=f"blocks.{layer}.{stored.name}") if stored and layer < self.n_layer else None
        return self._whole.get(theirs)

    def __iter__(self) -> Iterator[str]:
        """The names in the file, without prefix, one by one."""
        yield from self._whole
        for layer in range(self.n_layer):
            yield from (f"h.{layer}.{theirs}" for theirs in self._block)

    def missing(self, found: Set[str]) -> Iterator[str]:
        """The names that must be there and are not, one by one."""
        return (theirs for theirs in self if theirs not in found and theirs not in self.optional)

    def count_missing(self, found: Set[str]) -> int:
        """How many those are."""
        there = sum(self.get(theirs) is not None for theirs in found | self.optional)
        return len(self._whole) + self.n_layer * len(self._block) - there


@dataclass(frozen=True)
class Source:
    """Where a model's weights came from."""

    name: str
    repository: str | None
    commit: str | None
    """The resolved commit of a hub download; None, like `repository`, for a folder of unknown origin."""
    files: tuple[Path, ...]
    stamps: tuple[tuple[int, int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", tuple(_stamp(file) for file in self.files))

    @property
    def directory(self) -> Path:
        """The folder that holds the weight files."""
        return self.files[0].parent

    @cached_property
    def sha256(self) -> dict[str, str]:
        """File name -> sha256 of each weight file, computed when first asked for.

        Raises CheckpointError when a file has changed since the model was loaded.
        """
        digests = {}
        for file, stamp in zip(self.files, self.stamps, strict=True):
            if not file.exists() or _stamp(file) != stamp:
                raise CheckpointError(f"{file} has changed since the model was loaded; load the model again.")
            with file.open("rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return digests


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def weight_files(directory: Path, repository: str | None = None) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint: the single one, or the shards that the index names.

    `repository` is the hub id that the folder holds, if it is known.

    Raises CheckpointError when there are none, or when the index is broken or names a missing shard.
    """
    if (directory / WEIGHTS).exists():
        return (directory / WEIGHTS,)
    if not (directory / INDEX).exists():
        raise CheckpointError(_no_weights(directory, repository))
    try:
        shards = sorted({str(shard) for shard in read_json(directory / INDEX, MOST_HEADER)["weight_map"].values()})
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{directory / INDEX} is not an index of shards ({error}); download it again.") from None
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"{directory / INDEX} names shards outside its folder: {shown(outside)}.")
    there = {path.name for path in directory.iterdir()}  # a stranger's name may be too strange to ask for
    missing = [shard for shard in shards if shard not in there]
    if missing or not shards:
        raise CheckpointError(
            f"{directory / INDEX} names shards that are missing: {shown(missing)}; download it again."
        )
    return tuple(directory / shard for shard in shards)


def _no_weights(directory: Path, repository: str | None) -> str:
    name = repository or str(directory)
    return (
        f"{name} has no {WEIGHTS} and no {INDEX}. A pytorch_model.bin is not read: it is a pickle, which can run "
        "any code while it loads. If that is all there is and you trust it, convert it once with transformers: "
        f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained('converted')"
    )


def load(files: tuple[Path, ...], config: GPT2Config, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Read weight files into a state dict, which lacks only the scales.

    Files are memory-mapped: a float32 file loaded as float32 on the CPU is not copied. A tied unembedding
    may be absent, or equal to the embedding.

    Raises CheckpointError, listing every missing and unexpected name, wrong shape or type and
    non-finite value at once, `MOST_PROBLEMS` of each kind. No value is read of a tensor that does not fit.
    """
    layout = Layout(config)
    with ExitStack() as opened:
        found, problems = _inventory(files, opened)
        misfits = {theirs: problem for theirs, of in found.items() if (problem := _misfit(theirs, *of, layout))}
        if not problems:  # an unreadable file would make everything in it "missing"
            absent = (f"missing: {theirs}" for theirs in layout.missing(found.keys()))
            problems += _listed(absent, layout.count_missing(found.keys()), "are missing")
        problems += _listed(misfits.values(), len(misfits), "do not fit")
        state, broken = _read({theirs: of for theirs, of in found.items() if theirs not in misfits}, layout, dtype)
    problems += _listed(broken, len(broken), "are not finite")
    embedding = state.get("token_embedding.weight")
    if config.tie_word_embeddings and embedding is not None:
        unembedding = state.setdefault("unembed.weight", embedding)
        if unembedding is not embedding and not torch.equal(unembedding, embedding):
            problems.append("lm_head.weight differs from wte.weight, but config.json sets tie_word_embeddings")
    if problems:
        raise CheckpointError("\n  ".join([f"{files[0].parent} cannot be used:", *problems]))
    return {name: tensor.to(device) for name, tensor in state.items()}


def _read(found: dict[str, tuple[Any, str]], layout: Layout, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[str]]:
    """Name in the model -> tensor, of names that belong; and which have values that are not finite."""
    state, broken = dict[str, Tensor](), list[str]()
    for theirs, (file, key) in found.items():
        stored = layout.get(theirs)
        if stored is None:
            continue
        tensor = file.get_tensor(key)
        state[stored.name] = tensor = (tensor.t() if stored.conv1d else tensor).to(dtype)
        # The sum is quick, and not finite where a value is not; only where it is not are the values looked at.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            broken.append(f"not finite: {theirs}, read as {dtype}")
    return state, broken


def _listed(problems: Iterable[str], count: int, what: str) -> list[str]:
    """The first few problems of a kind, and how many more there are."""
    more = count - MOST_PROBLEMS
    return [*itertools.islice(problems, MOST_PROBLEMS), *([f"and {more} more {what}"] if more > 0 else [])]


def _inventory(files: tuple[Path, ...], opened: ExitStack) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """Name without prefix -> (open file, its key), for every tensor but the masks; and what is wrong with the files."""
    found, problems, twice = dict[str, tuple[Any, str]](), list[str](), list[str]()
    for file in files:
        try:
            stored = opened.enter_context(open_tensors(file))
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        for key in stored.keys():  # noqa: SIM118  safe_open is not a mapping
            theirs = key.removeprefix(_PREFIX)
            if theirs in found:
                twice.append(f"{_short(theirs)} is there twice, with and without {_PREFIX!r} or in two shards")
            elif not _BUFFERS.fullmatch(theirs):
                found[theirs] = stored, key
    return found, problems + _listed(twice, len(twice), "are there twice")


def _misfit(theirs: str, file: Any, key: str, layout: Layout) -> str | None:
    expected = layout.get(theirs)
    if expected is None:
        return f"unexpected: {_short(theirs)}"
    stored = file.get_slice(key)
    if stored.get_shape() != expected.shape:
        return f"wrong shape: {theirs} is {shown(stored.get_shape())}, config.json asks for {expected.shape}"
    if stored.get_dtype() not in _FLOATS:
        return f"wrong type: {theirs} is {stored.get_dtype()}, expected one of {', '.join(sorted(_FLOATS))}"
    return None


def _short(name: str) -> str:
    """A tensor's name, as it is where it is a plain one."""
    return name if re.fullmatch(r"[\w.]{1,80}", name, re.ASCII) else shown(name)


def save(directory: Path, config: GPT2Config, state: dict[str, Tensor]) -> None:
    """Write a state dict in Hugging Face's layout: model.safetensors and config.json, both or none.

    Raises ValueError when a scale is not 1, and CheckpointError when the folder cannot be written.
    """
    layout, tensors = Layout(config), {}
    for theirs in layout:
        stored = layout.get(theirs)
        if stored is not None and theirs not in layout.optional:
            tensor = state[stored.name].detach().cpu()
            prefix = "" if theirs == "lm_head.weight" else _PREFIX
            tensors[prefix + theirs] = (tensor.t() if stored.conv1d else tensor).contiguous()
    dtype = str(state["token_embedding.weight"].dtype).removeprefix("torch.")
    text = json.dumps({**config.to_dict(), "dtype": dtype}, indent=2) + "\n"
    files: dict[str, Callable[[Path], object]] = {
        WEIGHTS: lambda file: save_file(tensors, file, {"format": "pt"}),
        CONFIG: lambda file: file.write_text(text, encoding="utf-8"),
    }
    try:
        write_together(directory, files, key=CONFIG, stale=[ORIGIN])  # these weights are no longer the hub's
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}.") from None
