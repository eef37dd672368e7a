"""Files on disk <-> parameters: the one name table, and every way that a checkpoint can be wrong.

Hugging Face's GPT-2 keeps the layers of attention and MLP as `Conv1D`, which multiplies x @ W with
W of shape [in, out]; `nn.Linear` multiplies x @ W.T with W of shape [out, in]. So those weights are
transposed on the way in and out: as views, without a copy.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigpt.config import CheckpointError, GPT2Config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ORIGIN = "origin.json"  # which repository and commit a downloaded folder holds

# name in the file, name in the model, whether Conv1D's [in, out] is stored
_WHOLE_MODEL = (
    ("wte.weight", "token_embedding.weight", False),
    ("wpe.weight", "position_embedding.weight", False),
    ("ln_f.weight", "final_norm.weight", False),
    ("ln_f.bias", "final_norm.bias", False),
    ("lm_head.weight", "unembed.weight", False),
)
_EVERY_BLOCK = (
    ("ln_1.weight", "attention_norm.weight", False),
    ("ln_1.bias", "attention_norm.bias", False),
    ("attn.c_attn.weight", "attention.qkv.weight", True),
    ("attn.c_attn.bias", "attention.qkv.bias", False),
    ("attn.c_proj.weight", "attention.projection.weight", True),
    ("attn.c_proj.bias", "attention.projection.bias", False),
    ("ln_2.weight", "mlp_norm.weight", False),
    ("ln_2.bias", "mlp_norm.bias", False),
    ("mlp.c_fc.weight", "mlp.expand.weight", True),
    ("mlp.c_fc.bias", "mlp.expand.bias", False),
    ("mlp.c_proj.weight", "mlp.projection.weight", True),
    ("mlp.c_proj.bias", "mlp.projection.bias", False),
)
_PREFIX = "transformer."
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old files carry
_FLOATS = {"F16", "BF16", "F32", "F64"}


def names(n_layer: int) -> dict[str, tuple[str, bool]]:
    """Name in the file -> (name in the model, stored transposed), for a model of `n_layer` blocks."""
    table = {theirs: (ours, conv1d) for theirs, ours, conv1d in _WHOLE_MODEL}
    for layer in range(n_layer):
        table |= {f"h.{layer}.{theirs}": (f"blocks.{layer}.{ours}", conv1d) for theirs, ours, conv1d in _EVERY_BLOCK}
    return table


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
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,)
    if not (directory / INDEX).is_file():
        raise CheckpointError(_no_weights(directory, repository))
    try:
        weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{directory / INDEX} is not an index of shards; download it again.") from None
    outside = [shard for shard in shards if Path(shard).name != shard]
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if outside or missing or not shards:
        raise CheckpointError(
            f"{directory / INDEX} names shards that are missing ({missing}) or outside its folder ({outside}); "
            "download the checkpoint again."
        )
    return tuple(directory / shard for shard in shards)


def _no_weights(directory: Path, repository: str | None) -> str:
    name = repository or str(directory)
    return (
        f"{name} has no {WEIGHTS} and no {INDEX}. A pytorch_model.bin is not read: it is a pickle, which can run "
        "any code while it loads. If that is all there is and you trust it, convert it once with transformers: "
        f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained('converted')"
    )


def load(
    files: tuple[Path, ...],
    config: GPT2Config,
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Read weight files into a state dict with the names and shapes of `shapes`.

    Files are memory-mapped: a float32 file loaded as float32 on the CPU is not copied. Scales are
    not in the files and become 1; a tied unembedding may be absent, or equal to the embedding.

    Raises CheckpointError, listing every missing and unexpected name, wrong shape or type and
    non-finite value at once.
    """
    table = names(config.n_layer)
    state = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items() if is_scale(name)}
    with ExitStack() as opened:
        found, problems = _inventory(files, opened)
        if not problems:  # an unreadable file would make everything in it "missing"
            optional = {"lm_head.weight"} if config.tie_word_embeddings else set[str]()
            problems += [f"missing: {theirs}" for theirs in table if theirs not in found and theirs not in optional]
        for theirs, (file, key) in found.items():
            if problem := _misfit(theirs, file.get_slice(key), table, shapes):
                problems.append(problem)
                continue
            ours, conv1d = table[theirs]
            stored = file.get_tensor(key)
            state[ours] = tensor = (stored.t() if conv1d else stored).to(dtype)
            # The sum is quick, and not finite where a value is not; only where it is not are the values looked at.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                problems.append(f"not finite: {theirs}, read as {dtype}")
    embedding = state.get("token_embedding.weight")
    if config.tie_word_embeddings and embedding is not None:
        unembedding = state.setdefault("unembed.weight", embedding)
        if unembedding is not embedding and not torch.equal(unembedding, embedding):
            problems.append("lm_head.weight differs from wte.weight, but config.json sets tie_word_embeddings")
    if problems:
        raise CheckpointError("\n  ".join([f"{files[0].parent} cannot be used:", *problems]))
    return {name: tensor.to(device) for name, tensor in state.items()}


def _inventory(files: tuple[Path, ...], opened: ExitStack) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """Name without prefix -> (open file, its key), for every tensor but the masks; and what is wrong with the files."""
    found, problems = dict[str, tuple[Any, str]](), list[str]()
    for file in files:
        try:
            stored = opened.enter_context(safe_open(file, "pt"))
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name} is not a whole safetensors file ({error}); download it again")
            continue
        for key in stored.keys():  # noqa: SIM118  safe_open is not a mapping
            theirs = key.removeprefix(_PREFIX)
            if theirs in found:
                problems.append(f"{theirs} is there twice, with and without {_PREFIX!r} or in two shards")
            elif not _BUFFERS.fullmatch(theirs):
                found[theirs] = stored, key
    return found, problems


def _misfit(theirs: str, stored: Any, table: dict[str, tuple[str, bool]], shapes: dict[str, torch.Size]) -> str | None:
    if theirs not in table:
        return f"unexpected: {theirs}"
    ours, conv1d = table[theirs]
    expected = list(shapes[ours])
    expected = expected[::-1] if conv1d else expected
    if stored.get_shape() != expected:
        return f"wrong shape: {theirs} is {stored.get_shape()}, config.json asks for {expected}"
    if stored.get_dtype() not in _FLOATS:
        return f"wrong type: {theirs} is {stored.get_dtype()}, expected one of {', '.join(sorted(_FLOATS))}"
    return None


def save(directory: Path, config: GPT2Config, state: dict[str, Tensor]) -> None:
    """Write a state dict in Hugging Face's layout: model.safetensors, then config.json, each whole.

    Raises ValueError when a scale is not 1, and CheckpointError when the folder cannot be written.
    """
    changed = {name: value.tolist() for name, value in state.items() if is_scale(name) and not (value == 1).all()}
    if changed:
        raise ValueError(
            f"Scales that are not 1 cannot be saved, the layout has no place for them: {changed}. Reset them."
        )
    table = names(config.n_layer)
    if config.tie_word_embeddings:
        del table["lm_head.weight"]
    tensors = {}
    for theirs, (ours, conv1d) in table.items():
        tensor = state[ours].detach().cpu()
        prefix = "" if theirs == "lm_head.weight" else _PREFIX
        tensors[prefix + theirs] = (tensor.t() if conv1d else tensor).contiguous()
    dtype = str(state["token_embedding.weight"].dtype).removeprefix("torch.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ORIGIN).unlink(missing_ok=True)  # these weights are no longer the hub's
        write_atomically(directory / WEIGHTS, lambda file: save_file(tensors, file, {"format": "pt"}))
        text = json.dumps({**config.to_dict(), "dtype": dtype}, indent=2) + "\n"
        write_atomically(directory / "config.json", lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}.") from None


def is_scale(name: str) -> bool:
    """Whether a parameter's name is that of a scale."""
    return name.endswith("_scale")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Give `write` a temporary file beside `path`, then move it into place: whole, or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
