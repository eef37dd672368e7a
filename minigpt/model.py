"""GPT-2, from token ids to logits, in one file.

Axes, everywhere: [batch, position, n_embd] for the residual stream, [batch, n_head, position,
head_width] inside attention. Depth 0 of the stream is the embeddings, depth d the output of block
d - 1, depth n_layer the raw output of the last block. The stream after the final norm is `final`.
"""

import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from minigpt import checkpoint, hub
from minigpt.cache import KeyValueCache
from minigpt.config import ACTIVATIONS, CheckpointError, GPT2Config, read_config
from minigpt.linear import Linear
from minigpt.parameters import Native, NativeModule, assigned, declare, law, natives, not_neutral, scaled_sites, weights


@contextmanager
def replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Give a module another method while the body runs."""
    own = vars(module).get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)


def forward_mode() -> AbstractContextManager[None]:
    """Attention by plain products: fused kernels have no forward-mode derivative."""
    return sdpa_kernel(SDPBackend.MATH)


HEADS = ("batch", "position", "n_head", "head_width")


class Attention(NativeModule):
    """W_O concat(head_scale[h] * z_h + head_shift[h]) + b_O, with z_h the causal attention of head h.

    Its queries, keys and values have a scale and a shift of their own, its scores a shift.
    """

    native: ClassVar[tuple[Native, ...]] = (
        *law("head", HEADS, index="head", optional=False),
        *law("query", HEADS, index="head"),
        *law("key", HEADS, index="head"),
        *law("value", HEADS, index="head"),
        Native("score_shift", ("batch", "n_head", "query", "key"), neutral=0.0, index="head", optional=True),
    )
    head_scale: Tensor

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.projection = Linear(config.n_embd, config.n_embd)
        declare(self, self.native, config)
        # reorder_and_upcast_attn asks for scores in float32, which the fused attention keeps anyway.
        self.score_scale = 1 / math.sqrt(config.head_width) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.score_scale /= layer + 1

    def heads(self, x: Tensor, start: int = 0) -> list[Tensor]:  # noqa: ARG002  rotary positions need the start
        """Queries, keys and values of positions from `start` on, each [batch, n_head, position, head_width]."""
        return [part.unflatten(2, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2)]

    def pattern(self, x: Tensor) -> Tensor:
        """The weights of every mixture, [batch, n_head, query, key]: `mix` with the identity as values gives them.

        Raises ValueError for an attention of one's own whose `mix` does not take its values from `heads`.
        """
        q, k, _ = self.heads(x)
        identity = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        asked = list[Tensor]()

        def heads(x: Tensor, *_: int) -> list[Tensor]:
            asked.append(x)
            return [q, k, identity]

        of_values: dict[str, Tensor | None] = {name: None for name in natives(self) if name.startswith("value_")}
        with replaced(self, "heads", heads), assigned(self, of_values):
            weights = self.mix(x).transpose(1, 2)
        if not asked:
            raise ValueError(f"{type(self).__name__}.mix does not ask `heads` for its values; override `pattern` too.")
        return weights

    def mix(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """What every head read, a mixture of values: [batch, position, n_head, head_width]."""
        parts = zip(("query", "key", "value"), self.heads(x, cache.seen if cache is not None else 0), strict=True)
        q, k, v = (self.act(site, of.transpose(1, 2)).transpose(1, 2) for site, of in parts)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        mask, causal = self._mask(q, k), q.shape[2] > 1
        dual = any(forward_ad.unpack_dual(of).tangent is not None for of in (q, k, v, mask) if of is not None)
        with forward_mode() if dual else nullcontext():
            z = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=self.score_scale
            )
        return z.transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores where somebody shifts them: minus infinity for a key that no query may see."""
        if self._parameters.get("score_shift") is None:
            return None
        queries, keys = q.shape[2], k.shape[2]
        later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
        mask = self.act("score", torch.zeros_like(later, dtype=q.dtype).masked_fill(later, -torch.inf))
        if bool((mask.amax(-1) == -torch.inf).any()):
            query = int((mask.amax(-1) == -torch.inf).nonzero()[0, -1])
            raise ValueError(
                f"score_shift leaves query {query} of block {self.layer} without a key; every query needs one whose "
                "shift is not minus infinity, at its own position or before."
            )
        return mask

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """What attention writes into the stream, from its normed copy; both [batch, position, n_embd]."""
        return self.projection(self.act("head", self.mix(x, cache)).flatten(2))


class MLP(NativeModule):
    """Two linear maps with the activation between them."""

    native: ClassVar[tuple[Native, ...]] = law("neuron", ("batch", "position", "mlp_width"))

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.expand = Linear(config.n_embd, config.mlp_width)
        self.activation = ACTIVATIONS[config.activation_function]
        self.projection = Linear(config.mlp_width, config.n_embd)
        declare(self, self.native, config)

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP writes into the stream, from its normed copy; both [batch, position, n_embd]."""
        return self.projection(self.act("neuron", self.activation(self.expand(x))))


class Block(NativeModule):
    """One layer: attention and MLP each read a normed copy of the stream and write into it.

    A subclass with a `forward` of its own is another architecture: `GPT2(config, block=...)` is made of it, and every
    experiment follows. Its attributes replace the parts.
    """

    native: ClassVar[tuple[Native, ...]] = (
        *law("output", optional=False),
        *law("attention", optional=False),
        *law("mlp", optional=False),
    )
    attention_scale: Tensor
    mlp_scale: Tensor
    output_scale: Tensor
    position_embedding: ClassVar[bool] = True
    """Whether the model adds an embedding of the position to that of the token."""
    norm: ClassVar[type[nn.Module]] = nn.LayerNorm
    """Makes the norm layers, that at the model's end too, of n_embd and an epsilon."""
    attention_class: ClassVar[type[Attention]] = Attention
    mlp_class: ClassVar[type[MLP]] = MLP

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = self.norm(config.n_embd, config.layer_norm_epsilon)
        self.attention = self.attention_class(config, layer)
        self.mlp_norm = self.norm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = self.mlp_class(config)
        declare(self, self.native, config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """The stream after this block, from the stream before it; both [batch, position, n_embd]."""
        u = x + self.act("attention", self.attention(self.attention_norm(x), cache))
        y = u + self.act("mlp", self.mlp(self.mlp_norm(u)))
        return self.act("output", y)


def through(block: Block, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
    """The stream after a block. Raises ValueError for a block that returns no stream, or changes the one before it."""
    before = changes_of(x)
    out = block(x, cache) if cache is not None else block(x)
    if changes_of(x) != before:
        raise ValueError(f"{in_place(block)} x = x + ... is right where x += ... is not.")
    if not isinstance(out, Tensor) or out.shape[1:] != x.shape[1:]:
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{type(block).__name__} returned {found}; expected a stream like the one that it read, {list(x.shape)}."
        )
    return out


def changes_of(x: Tensor) -> int:
    """How often a tensor was changed in place; of one made in inference mode PyTorch does not know."""
    return 0 if x.is_inference() else x._version


def in_place(module: nn.Module) -> str:
    """What is wrong with a module that writes into what it reads."""
    return f"{type(module).__name__} changes its input in place, which may still be read: let it make a new tensor."


SITES = scaled_sites((*Block.native, *Attention.native, *MLP.native))
"""The sites of GPT-2's block; `parameters.sites_of` tells those of a model."""


def block_named(name: str) -> type[Block]:
    """The subclass of Block that `package.module:Name` names, imported: its module's code runs.

    Raises ValueError when there is none.
    """
    module, _, leaf = name.partition(":")
    if not (module and leaf) or module.endswith(".py") or "/" in module:
        path, _, last = module.removesuffix(".py").replace("/", ".").strip(".").rpartition(".")
        named = leaf or (last if last[:1].isupper() else "Name")
        path = path if named == last else f"{path}.{last}".strip(".")
        raise ValueError(
            f"The block {name!r} is not package.module:Name, without .py; for example {path or 'my_blocks'}:{named}."
        )
    try:
        found = attrgetter(leaf)(importlib.import_module(module))
    except (Exception, SystemExit) as error:  # of any kind: it is the module's own code that runs
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"The block {name!r} cannot be imported ({reason}); expected package.module:Name.") from error
    if not (isinstance(found, type) and issubclass(found, Block)):
        raise ValueError(f"The block {name!r} is not a subclass of minigpt.Block.")
    return found


def check_block(block: object) -> None:
    """Raise ValueError for what no model can be made of."""
    if not (isinstance(block, type) and issubclass(block, Block)):
        raise ValueError(f"block is {block!r}; expected a subclass of minigpt.Block, the class itself.")


def block_name(block: type[Block]) -> str | None:
    """What `block_named` takes and a checkpoint states: package.module:Name; None for GPT-2's own block."""
    return None if block is Block else f"{block.__module__}:{block.__qualname__}"


def kept_beside(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that modules keep and no checkpoint holds, by name: tables of angles, say."""
    found = dict[str, Tensor]()
    for path, module in model.named_modules():
        kept = {name: of for name, of in module._buffers.items() if name in module._non_persistent_buffers_set}
        kept |= {name: of for name, of in vars(module).items() if isinstance(of, Tensor)}
        found |= {f"{path}.{name}" if path else name: of for name, of in kept.items() if of is not None}
    return found


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tables are the same up to rounding: another device's sines have other last bits."""
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one.cpu(), other.cpu())
    rounding = 16 * torch.finfo(one.dtype).eps
    return torch.allclose(one.cpu().double(), other.cpu().double(), rtol=rounding, atol=rounding)


class _Undrawn(TorchFunctionMode):
    """While it is on, modules draw no numbers. Drawing without memory would import PyTorch's compiler, for a second."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, given: Sequence[Any] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if getattr(function, "__module__", None) == nn.init.__name__ or function in (Tensor.normal_, Tensor.uniform_):
            return given[0] if given else named["tensor"]
        return function(*given, **named)


class GPT2(NativeModule):
    """GPT-2 with a scale and a shift wherever something acts: see `parameters.py`.

    `GPT2(config)` draws fresh weights as Hugging Face does: normal with deviation `initializer_range`, divided by
    sqrt(2 * n_layer) for the projections that write into the stream (after Radford et al. 2019, section 2.3).
    `block` is what it is made of: a subclass of `Block`, where the architecture is another. What a block adds to
    GPT-2's layers, or makes of another class than `minigpt.linear.Linear`, keeps the weights that the block gave it.
    """

    native: ClassVar[tuple[Native, ...]] = law("embedding")

    def __init__(self, config: GPT2Config, block: type[Block] = Block) -> None:
        super().__init__()
        check_block(block)
        self.config, self.block = config, block
        declare(self, self.native, config)
        self.source: checkpoint.Source | None = None
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if block.position_embedding:
            self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)
        # A ModuleList; the annotation tells type checkers what is in it.
        self.blocks: Sequence[Block] = nn.ModuleList(block(config, layer) for layer in range(config.n_layer))  # type: ignore[assignment]
        self.final_norm = block.norm(config.n_embd, config.layer_norm_epsilon)
        self.unembed = Linear(config.n_embd, config.vocab_size, bias=False)
        self._tie()
        self._draw_weights()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type, and so that of the stream."""
        return self.token_embedding.weight.dtype

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """Depth 0, of int64 ids [batch, position] from position `start` on; ValueError for ids out of range."""
        self.config.check_ids(ids, start)
        if not self.block.position_embedding:
            return self.act("embedding", self.token_embedding(ids))
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        return self.act("embedding", self.token_embedding(ids) + self.position_embedding(positions))

    def depths(self, ids: Tensor, cache: KeyValueCache | None = None) -> Iterator[Tensor]:
        """The stream at depth 0, 1, ... n_layer, one at a time: [batch, position, n_embd] each."""
        x = self.embed(ids, cache.seen if cache is not None else 0)
        yield x
        for block in self.blocks:
            x = through(block, x, cache)
            yield x
        if cache is not None:
            cache.seen += ids.shape[1]

    def residuals(self, ids: Tensor) -> Tensor:
        """Every depth of the stream, raw: [n_layer + 1, batch, position, n_embd]."""
        return torch.stack(torch.broadcast_tensors(*self.depths(ids)))

    def attention_patterns(self, ids: Tensor) -> Tensor:
        """What every head attends to: [n_layer, batch, n_head, query, key], rows summing to 1."""
        return torch.stack(torch.broadcast_tensors(*self.patterns(ids)))

    def patterns(self, ids: Tensor) -> Iterator[Tensor]:
        """The same, one block at a time: [batch, n_head, query, key] each."""
        read = list[Tensor]()

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            read.append(given[0])

        hooks = [block.attention.register_forward_pre_hook(keep) for block in self.blocks]
        try:
            self.last_depth(ids)
        finally:
            for hook in hooks:
                hook.remove()
        yield from (block.attention.pattern(x) for block, x in zip(self.blocks, read, strict=True))

    def last_depth(self, ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """The raw output of the last block: [batch, position, n_embd]."""
        for x in self.depths(ids, cache):  # noqa: B007  only the newest depth stays in memory
            pass
        return x

    def forward(self, ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits [batch, position, vocab_size] of int64 ids [batch, position]; raises as `embed` does."""
        return self.unembed(self.final_norm(self.last_depth(ids, cache)))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
        block: type[Block] = Block,
    ) -> "GPT2":
        """Load a checkpoint: a directory, a short name, or a hub id.

        `revision` is a branch, tag or commit of the hub; `dtype` the parameters' type, whatever the file holds.
        `block` is what the model is made of. A checkpoint of GPT-2 loads into every block that declares the same
        parameters; one that was saved with a block of one's own names it, and needs it here.
        Raises CheckpointError, listing all that is wrong. `model.source` then says where the weights came from.
        """
        check_block(block)
        found = hub.find(name_or_path, revision, local_files_only)
        config, stored = read_config(found.directory / checkpoint.CONFIG)
        checkpoint.check_block(found.directory, stored, block_name(block))
        files = checkpoint.weight_files(found.directory, found.repository)
        try:
            layout = cls._layout(config, block, own=stored is not None)
        except RuntimeError as error:  # sizes beyond what torch can count
            raise CheckpointError(f"No model of the shape in {found.directory} can be made: {error}.") from None
        state = checkpoint.load(files, layout, dtype, torch.device(device))
        model = cls._empty(config, block, torch.device(device))
        checkpoint.check_alike(weights(model), layout)
        declared = natives(model).items()
        neutral = {name: of.neutral_value(config).to(device, dtype) for name, of in declared if not of.optional}
        shared = model._shared()
        checkpoint.check_shared(shared, state, block_name(block))
        model.load_state_dict(state | neutral, assign=True)
        for first, *others in shared:
            for module, _, leaf in (name.rpartition(".") for name in others):
                model.get_submodule(module).register_parameter(leaf, model.get_parameter(first))
        model.source = checkpoint.Source(str(name_or_path), found.repository, found.commit, files)
        return model.to(device, dtype).eval()  # what the block keeps beside its weights

    def save_pretrained(self, directory: str | Path) -> None:
        """Write what `from_pretrained` loads back, and transformers too where the block is GPT-2's own.

        Raises ValueError when a native parameter is not neutral and for a subclass of GPT2, which a checkpoint cannot
        name, and CheckpointError when it cannot be written.
        """
        if type(self) is not GPT2:
            raise ValueError(
                f"{type(self).__name__} is a subclass of GPT2, and its checkpoint would pass for GPT-2's. Put what is "
                "different into a subclass of minigpt.Block, and give that with block=: a checkpoint names it."
            )
        if changed := {name: value.tolist() for name, value in not_neutral(self).items()}:
            raise ValueError(
                "Native parameters that are not neutral cannot be saved, for a checkpoint has no place for them: "
                f"{changed}. Set them back."
            )
        self._check_kept_beside()
        layout = self._layout(self.config, self.block, own=self.block is not Block)
        checkpoint.save(Path(directory), self.config, weights(self), layout)

    def lasting(self) -> dict[str, Tensor]:
        """What is kept beside the weights, without what a forward made for itself: registered buffers, and tensors that
        a new model has too."""
        if not (kept := kept_beside(self)):
            return {}
        with torch.device("meta"), _Undrawn():
            fresh = kept_beside(type(self)(self.config, self.block))
        return {name: of for name, of in kept.items() if name in fresh or name in dict(self.named_buffers())}

    def _check_kept_beside(self) -> None:
        """Raise ValueError for tensors that no checkpoint holds, and that the block does not make again as they are."""
        kept, made = self.lasting(), list[dict[str, Tensor]]()
        for seed in (0, 1) if kept else ():  # a table that is drawn comes out otherwise
            with torch.random.fork_rng(), torch.device("cpu"):
                torch.manual_seed(seed)
                made.append(kept_beside(type(self)(self.config, self.block).to(self.dtype)))
        other = [name for name, of in kept.items() if not all(name in new and _alike(of, new[name]) for new in made)]
        if other:
            raise ValueError(
                f"No checkpoint holds {', '.join(other)}, and a new {self.block.__name__} makes that otherwise. "
                "Register what it needs as a buffer, or as a parameter."
            )

    @classmethod
    def _layout(cls, config: GPT2Config, block: type[Block], own: bool) -> checkpoint.Layout:
        """Where a checkpoint keeps the weights that such a model declares: looked up in one block, made of nothing."""
        with torch.device("meta"), _Undrawn():
            one = cls(replace(config, n_layer=1), block)
        shapes = {name: list(tensor.shape) for name, tensor in weights(one).items()}
        return checkpoint.Layout(config, shapes, block_name(block), own)

    @classmethod
    def _empty(cls, config: GPT2Config, block: type[Block], device: torch.device) -> "GPT2":
        """A model to put weights into: nothing is drawn or allocated, unless the block keeps more than its weights."""
        with torch.device("meta"), _Undrawn():
            model = cls(config, block)
        if not kept_beside(model):
            return model
        with torch.random.fork_rng(), device:
            return cls(config, block)

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.unembed.weight = self.token_embedding.weight

    def _shared(self) -> list[list[str]]:
        """The names of every parameter that has several, as a tied unembedding has."""
        names = defaultdict[int, list[str]](list)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        return [group for group in names.values() if len(group) > 1]

    def _draw_weights(self) -> None:
        sublayers = [module for module in self.modules() if isinstance(module, Attention | MLP)]
        writing = {getattr(sublayer, "projection", None) for sublayer in sublayers}
        others = {getattr(sublayer, name, None) for sublayer in sublayers for name in ("qkv", "expand")}
        others |= {getattr(self, name, None) for name in ("token_embedding", "position_embedding", "unembed")}
        std = self.config.initializer_range
        for module in self.modules():
            if module in writing | others and isinstance(module, Linear | nn.Embedding):
                nn.init.normal_(
                    module.weight, std=std / math.sqrt(2 * self.config.n_layer) if module in writing else std
                )
                if isinstance(module, Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
