"""Files on disk <-> parameters: the one name table, and every way that a checkpoint can be wrong.

Hugging Face's GPT-2 keeps the layers of attention and MLP as `Conv1D`, which multiplies x @ W with
W of shape [in, out]; `nn.Linear` multiplies x @ W.T with W of shape [out, in]. So those weights are
transposed on the way in and out: as views, without a copy.
"""

import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from minigpt.config import CheckpointError, GPT2Config
from minigpt.files import MOST_HEADER, open_tensors, printable, read_json, shown, write_together

logger = logging.getLogger("minigpt")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ORIGIN = "origin.json"  # which repository and commit a downloaded folder holds
MOST_PROBLEMS = 20
"""Of a checkpoint, that an error lists; the others it counts."""

# name in the model -> name in Hugging Face's files
_WHOLE_MODEL = {
    "token_embedding.weight": "wte.weight",
    "position_embedding.weight": "wpe.weight",
    "final_norm.weight": "ln_f.weight",
    "final_norm.bias": "ln_f.bias",
    "unembed.weight": "lm_head.weight",
}
_EVERY_BLOCK = {
    "attention_norm.weight": "ln_1.weight",
    "attention_norm.bias": "ln_1.bias",
    "attention.qkv.weight": "attn.c_attn.weight",
    "attention.qkv.bias": "attn.c_attn.bias",
    "attention.projection.weight": "attn.c_proj.weight",
    "attention.projection.bias": "attn.c_proj.bias",
    "mlp_norm.weight": "ln_2.weight",
    "mlp_norm.bias": "ln_2.bias",
    "mlp.expand.weight": "mlp.c_fc.weight",
    "mlp.expand.bias": "mlp.c_fc.bias",
    "mlp.projection.weight": "mlp.c_proj.weight",
    "mlp.projection.bias": "mlp.c_proj.bias",
}
_CONV1D = {"attention.qkv.weight", "attention.projection.weight", "mlp.expand.weight", "mlp.projection.weight"}
_PREFIX = "transformer."
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old files carry
_FLOATS = {"F16", "BF16", "F32", "F64"}
_EMBEDDING, _UNEMBEDDING = "token_embedding.weight", "unembed.weight"


class Stored(NamedTuple):
    """How a file keeps a parameter."""

    name: str
    """In the model."""
    shape: list[int]
    """In the file."""
    conv1d: bool = False
    """Whether it is transposed there."""


class Layout:
    """Under which names, and in which shapes, a checkpoint keeps the weights that a model declares.

    `shapes` are those of a model of one block: every block of a model holds the same parameters. Nothing of the
    model's own size is made to look into a layout. `own` is minigpt's own layout, for a block that is not GPT-2's:
    the model's names and shapes as they are. Otherwise it is Hugging Face's; `block` is the name of the block.
    """

    def __init__(
        self, config: GPT2Config, shapes: Mapping[str, list[int]], block: str | None = None, own: bool = False
    ) -> None:
        self.n_layer, self.block, self.own = config.n_layer, block, own
        self._of_block = re.compile(rf"{'blocks' if own else 'h'}\.(0|[1-9]\d{{0,8}})\.(.+)")
        first = "blocks.0."
        whole = {name: shape for name, shape in shapes.items() if not name.startswith(first)}
        of_block = {name.removeprefix(first): shape for name, shape in shapes.items() if name.startswith(first)}
        self._whole = _table(whole, {} if own else _WHOLE_MODEL)
        self._block = _table(of_block, {} if own else _EVERY_BLOCK)
        self.embedding, self.unembedding = (name if own else _WHOLE_MODEL[name] for name in (_EMBEDDING, _UNEMBEDDING))
        self.tied = config.tie_word_embeddings
        self.optional = {self.unembedding} if self.tied else set[str]()

    def name_of(self, key: str) -> str:
        """The name of a file's tensor without the prefix that Hugging Face's may have."""
        return key if self.own else key.removeprefix(_PREFIX)

    def key_of(self, theirs: str) -> str:
        """The name that a file is written with: with that prefix, but for the unembedding's."""
        return theirs if self.own or theirs == self.unembedding else _PREFIX + theirs

    def ignores(self, theirs: str) -> bool:
        """Whether a file may hold a tensor of that name which is no parameter."""
        return not self.own and _BUFFERS.fullmatch(theirs) is not None

    def get(self, theirs: str) -> Stored | None:
        """What the file's tensor of that name is; None for a name that does not belong."""
        if match := self._of_block.fullmatch(theirs):
            layer, stored = int(match[1]), self._block.get(match[2])
            return stored._replace(name=f"blocks.{layer}.{stored.name}") if stored and layer < self.n_layer else None
        return self._whole.get(theirs)

    def __iter__(self) -> Iterator[str]:
        """The names in the file, without prefix, one by one."""
        yield from self._whole
        for layer in range(self.n_layer):
            yield from (f"{'blocks' if self.own else 'h'}.{layer}.{theirs}" for theirs in self._block)

    def missing(self, found: Set[str]) -> Iterator[str]:
        """The names that must be there and are not, one by one."""
        return (theirs for theirs in self if theirs not in found and theirs not in self.optional)

    def count_missing(self, found: Set[str]) -> int:
        """How many those are."""
        there = sum(self.get(theirs) is not None for theirs in found | self.optional)
        return len(self._whole) + self.n_layer * len(self._block) - there


def _table(shapes: Mapping[str, list[int]], names: Mapping[str, str]) -> dict[str, Stored]:
    """Name in the file -> what it is; a parameter that GPT-2 has not keeps its own name, and its shape."""
    table = dict[str, Stored]()
    for name, shape in shapes.items():
        conv1d = name in names and name in _CONV1D
        table[names.get(name, name)] = Stored(name, shape[::-1] if conv1d else shape, conv1d)
    return table


def same_block(stored: str | None, name: str | None) -> bool:
    """Whether the block that a file names may be that one: a class of that name. None is GPT-2's own block.

    The module does not count. It moves, from a notebook to a file, say, and no name tells what a class computes
    today. A stored reference does, and it is held against a block of the same name whatever its module.
    """
    if stored is None or name is None:
        return stored is name
    return stored.partition(":")[2] == name.partition(":")[2]


def check_block(directory: Path, stored: str | None, given: str | None) -> None:
    """Raise CheckpointError unless a checkpoint that names its block is to be loaded with that block.

    It is never imported by the name that the file gives: that would run a stranger's code. For a class of the same
    name in another module, the logger `minigpt` says so.
    """
    if stored is None or same_block(stored, given):
        if stored is not None and stored != given:
            _say_that_it_moved(directory, stored, given)
        return
    arrived = f"the block {given} was given" if given else "no block was given"
    option, before = as_option(stored)
    raise CheckpointError(
        f"{directory} was saved with the block {stored}, and {arrived}. If you trust that block's code, import it and "
        f"give it: GPT2.from_pretrained(..., block={re.split('[:.]', stored)[-1]}), or --block {option}.{before}"
    )


def as_option(block: str) -> tuple[str, str]:
    """What --block takes for a block of that name, and what must be done before: a script's class has no module."""
    module, _, name = block.partition(":")
    if module != "__main__":
        return block, ""
    return f"my_blocks:{name}", " First move its class from the script or notebook into a file my_blocks.py."


@cache
def _say_that_it_moved(directory: Path, stored: str, given: str | None) -> None:
    """Once for each folder: parity loads a model again."""
    logger.warning(
        "%s was saved with the block %s, and %s has its name but is of another module. Whether it computes the same, "
        "`minigpt verify` tells, where a reference was stored.",
        *(printable(str(name)) for name in (directory, stored, given)),
    )


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


def load(files: tuple[Path, ...], layout: Layout, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Read weight files into a state dict, which lacks only the native parameters.

    Files are memory-mapped: a float32 file loaded as float32 on the CPU is not copied. A tied unembedding
    may be absent, or equal to the embedding.

    Raises CheckpointError, listing every missing and unexpected name, wrong shape or type and
    non-finite value at once, `MOST_PROBLEMS` of each kind. No value is read of a tensor that does not fit.
    """
    with ExitStack() as opened:
        found, problems = _inventory(files, layout, opened)
        misfits = {theirs: problem for theirs, of in found.items() if (problem := _misfit(theirs, *of, layout))}
        missing = 0
        if not problems:  # an unreadable file would make everything in it "missing"
            missing = layout.count_missing(found.keys())
            problems += _listed(
                (f"missing: {theirs}" for theirs in layout.missing(found.keys())), missing, "are missing"
            )
        problems += _listed(misfits.values(), len(misfits), "do not fit")
        state, broken = _read({theirs: of for theirs, of in found.items() if theirs not in misfits}, layout, dtype)
    problems += _listed(broken, len(broken), "are not finite")
    if layout.tied and _tied_apart(state):
        problems.append(
            f"{layout.unembedding} differs from {layout.embedding}, but config.json sets tie_word_embeddings"
        )
    if layout.block and (missing or misfits):
        problems.append(f"The block {layout.block} declares other parameters than the file holds.")
    if problems:
        raise CheckpointError("\n  ".join([f"{files[0].parent} cannot be used:", *problems]))
    return {name: tensor.to(device) for name, tensor in state.items()}


def _tied_apart(state: dict[str, Tensor]) -> bool:
    """Whether a tied unembedding is there and not equal to the embedding; where it is absent, it is that."""
    embedding = state.get(_EMBEDDING)
    if embedding is None:
        return False
    unembedding = state.setdefault(_UNEMBEDDING, embedding)
    return unembedding is not embedding and not torch.equal(unembedding, embedding)


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


def _inventory(
    files: tuple[Path, ...], layout: Layout, opened: ExitStack
) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """Name without prefix -> (open file, its key), for every tensor but the masks; and what is wrong with the files."""
    found, problems, twice = dict[str, tuple[Any, str]](), list[str](), list[str]()
    for file in files:
        try:
            stored = opened.enter_context(open_tensors(file))
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        for key in stored.keys():  # noqa: SIM118  safe_open is not a mapping
            theirs = layout.name_of(key)
            if theirs in found:
                twice.append(f"{_short(theirs)} is there twice, with and without {_PREFIX!r} or in two shards")
            elif not layout.ignores(theirs):
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


def save(directory: Path, config: GPT2Config, state: dict[str, Tensor], layout: Layout) -> None:
    """Write a state dict and its config: model.safetensors and config.json, both or none.

    Raises ValueError for a model that no checkpoint can hold, and CheckpointError when the folder cannot be written.
    """
    check_alike(state, layout)
    if integers := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise ValueError(
            f"A checkpoint holds floating-point numbers alone; {shown(integers)} are none. "
            "Register a buffer that can be made again with persistent=False."
        )
    kept = {theirs: stored for theirs in layout if (stored := layout.get(theirs)) and theirs not in layout.optional}
    tensors = {layout.key_of(theirs): _as_stored(state[stored.name], stored) for theirs, stored in kept.items()}
    shared = Counter(tensor.data_ptr() for tensor in tensors.values())  # a file holds each under its own name
    tensors = {key: t.clone() if shared[t.data_ptr()] > 1 else t for key, t in tensors.items()}
    dtype = str(state[_EMBEDDING].dtype).removeprefix("torch.")
    text = json.dumps({**config.to_dict(layout.block if layout.own else None), "dtype": dtype}, indent=2) + "\n"
    about = {"format": "minigpt" if layout.own else "pt"}
    files: dict[str, Callable[[Path], object]] = {
        WEIGHTS: lambda file: save_file(tensors, file, about),
        CONFIG: lambda file: file.write_text(text, encoding="utf-8"),
    }
    try:
        write_together(directory, files, key=CONFIG, stale=[ORIGIN])  # these weights are no longer the hub's
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}.") from None


def _as_stored(tensor: Tensor, stored: Stored) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.t() if stored.conv1d else tensor).contiguous()


def check_alike(state: dict[str, Tensor], layout: Layout) -> None:
    """Raise ValueError unless a model declares in every block what its layout says of one."""
    places = {stored.name: stored for theirs in layout if (stored := layout.get(theirs))}
    if odd := [name for name in {**state, **places} if not _fits(state.get(name), places.get(name))]:
        raise ValueError(f"Every block of a model must hold the same parameters; these are not in all: {shown(odd)}.")


def check_shared(shared: Iterable[list[str]], state: Mapping[str, Tensor], block: str | None) -> None:
    """Raise CheckpointError where a checkpoint has several values for what a model makes one parameter of."""
    for first, *others in shared:
        if apart := [name for name in others if name in state and not torch.equal(state[name], state[first])]:
            raise CheckpointError(
                f"The block {block} makes one parameter of {first} and {shown(apart)}, but the checkpoint has several "
                "values for it. Load it with a block that keeps them apart."
            )


def _fits(tensor: Tensor | None, stored: Stored | None) -> bool:
    if tensor is None or stored is None:
        return False
    return list(tensor.shape) == (stored.shape[::-1] if stored.conv1d else stored.shape)
