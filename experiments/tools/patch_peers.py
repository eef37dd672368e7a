"""The patching grid of the benchmark as it is computed with other tools.

Two texts of the same length. While one runs, a piece of the other's activations is put in the place of its own: the
block's output at one position (`output`), or one head's mixture of values at all positions (`head`). Every function
here fills a table [layer, position or head] with the difference of two tokens' logits after the last position.

Everyone records the other text's activations anew each time, as part of what is timed, and computes the logits of the
last position alone, where the tool lets one say so. As in `peers`, each library gets modules of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.tools.peers import absent, lens_wrap, nnsight_wrap, private
from minigpt import GPT2, compare_logits, patch, record

Kind = Literal["output", "head"]
KINDS: tuple[Kind, ...] = ("output", "head")
SITES = {"output": "output", "head": "attention.head"}
Grid = Callable[[Tensor, Tensor], Tensor]
"""Ids of the text that runs and of the other one, [1, position] each -> the table."""
LAST = {"use_cache": False, "logits_to_keep": 1}
"""How transformers is told to keep no cache, and to compute the logits of the last position alone."""


def ours(model: GPT2, kind: Kind, tokens: tuple[int, int], ids: Tensor, other: Tensor) -> Tensor:
    """The table by `record` and a single `compare_logits`."""
    sites = [f"blocks.{layer}.{SITES[kind]}" for layer in range(model.config.n_layer)]
    values, count = record(model, other, sites), ids.shape[1] if kind == "output" else model.config.n_head
    edits = [
        patch(site, of, positions=[entry]) if kind == "output" else patch(site, of, heads=[entry])
        for site, of in values.items()
        for entry in range(count)
    ]
    logits = compare_logits(model, ids, edits, tokens)[1][:, 0]
    return (logits[:, 0] - logits[:, 1]).unflatten(0, (len(sites), count))


@dataclass(frozen=True)
class Patches:
    """All patches of one grid."""

    kind: Kind
    tokens: tuple[int, int]
    layers: int
    masks: Tensor
    """Where each patch puts the other text's numbers: bool [entry, position or 1, n_embd]."""

    @classmethod
    def of(cls, theirs: Any, kind: Kind, tokens: tuple[int, int], positions: int) -> "Patches":
        """Of a transformers model."""
        config = theirs.config
        masks = torch.eye(positions, dtype=torch.bool)[:, :, None].expand(-1, -1, config.n_embd)
        if kind == "head":
            heads = torch.eye(config.n_head, dtype=torch.bool)
            masks = heads.repeat_interleave(config.n_embd // config.n_head, 1)[:, None]
        return cls(kind, tokens, config.n_layer, masks.to(theirs.device))

    def difference(self, logits: Tensor) -> Tensor:
        """Of the two tokens, after the last position: [row, position, vocab] -> [row]."""
        return logits[:, -1, self.tokens[0]] - logits[:, -1, self.tokens[1]]


Record = Callable[[Any, Patches, Tensor], list[Tensor]]
"""A model, patches and the other text's ids -> its activations, by layer."""
Run = Callable[[Any, Patches, Tensor, Sequence[Tensor], int, slice], Tensor]
"""A model, patches, ids, those activations, a layer, and which of its patches -> a number for each of them."""


def contenders(theirs: Any, kind: Kind, tokens: tuple[int, int]) -> dict[str, Grid]:
    """Everyone who is installed: what they are called, and a function that fills the table."""
    missing, hooked, each = absent(), (hook_record, hook_run), "one run per patch"
    batched = "a layer's patches as one batch"
    found: dict[str, Callable[..., Tensor]] = {
        f"transformers, {each}": partial(loop, hooked, theirs),
        f"transformers, {batched}": partial(by_layer, hooked, theirs),
        "transformers, the whole grid as one batch": partial(at_once, theirs),
    }
    if "nnsight" not in missing:
        traced, wrapped = (nnsight_record, nnsight_run), nnsight_wrap(theirs)
        found[f"nnsight, {each}"] = partial(loop, traced, wrapped)
        found[f"nnsight, {batched}"] = partial(by_layer, traced, wrapped)
        found["nnsight, an invoke for each patch of a layer"] = partial(
            by_layer, (nnsight_record, nnsight_invokes), nnsight_rows(theirs)
        )
    if "TransformerLens" not in missing:
        bridge = lens_wrap(theirs)
        found[f"TransformerLens bridge, its patching module, {each}"] = partial(lens_patching, bridge)
        found[f"TransformerLens bridge, {batched}"] = partial(by_layer, (lens_record, lens_run), bridge)
    if "pyvene" not in missing:
        models = pyvene_wrap(theirs, kind)
        found[f"pyvene, {each}"] = partial(pyvene_grid, models, together=False)
        found[f"pyvene, {batched}"] = partial(pyvene_grid, models, together=True)
    return {name: partial(_table, fill, theirs, kind, tokens) for name, fill in found.items()}


@torch.no_grad()
def _table(
    fill: Callable[..., Tensor], theirs: Any, kind: Kind, tokens: tuple[int, int], ids: Tensor, other: Tensor
) -> Tensor:
    return fill(Patches.of(theirs, kind, tokens, ids.shape[1]), ids, other)


def loop(tool: tuple[Record, Run], model: Any, of: Patches, ids: Tensor, other: Tensor) -> Tensor:
    """One run for each patch."""
    record_with, run = tool
    values, entries = record_with(model, of, other), range(len(of.masks))
    rows = [
        [run(model, of, ids, values, layer, slice(entry, entry + 1)) for entry in entries] for layer in range(of.layers)
    ]
    return torch.stack([torch.cat(row) for row in rows])


def by_layer(tool: tuple[Record, Run], model: Any, of: Patches, ids: Tensor, other: Tensor) -> Tensor:
    """One run for each layer, whose rows are its patches."""
    record_with, run = tool
    values = record_with(model, of, other)
    rows = [run(model, of, ids, values, layer, slice(None)) for layer in range(of.layers)]
    return torch.stack(rows)


# transformers.


def hooked(model: Any, of: Patches, layer: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Hang a function of the activation into a block; what it returns takes the activation's place."""
    block = model.transformer.h[layer]
    if of.kind == "output":
        return block.register_forward_hook(lambda _module, _inputs, output: change(output))
    return block.attn.c_proj.register_forward_pre_hook(lambda _module, inputs: (change(inputs[0]),))


def hook_logits(model: Any, of: Patches, ids: Tensor, changes: Sequence[Callable[[Tensor], Tensor] | None]) -> Tensor:
    """The logits of a run, with a function for every layer that has one."""
    handles = [hooked(model, of, layer, change) for layer, change in enumerate(changes) if change]
    try:
        logits: Tensor = model(ids, **LAST).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


def hook_record(model: Any, of: Patches, other: Tensor) -> list[Tensor]:
    """The other text's activations, by layer: [1, position, n_embd]."""
    found = list[Tensor]()

    def keep(activation: Tensor) -> Tensor:
        found.append(activation)
        return activation

    hook_logits(model, of, other, [keep] * of.layers)
    return found


def hook_run(model: Any, of: Patches, ids: Tensor, values: Sequence[Tensor], layer: int, some: slice) -> Tensor:
    """Rows appear where the activation is patched: what comes before runs once."""
    changes: list[Callable[[Tensor], Tensor] | None] = [None] * of.layers
    changes[layer] = lambda activation: torch.where(of.masks[some], values[layer], activation)
    return of.difference(hook_logits(model, of, ids, changes))


def at_once(model: Any, of: Patches, ids: Tensor, other: Tensor) -> Tensor:
    """All patches of all layers as rows of one batch, from the start."""
    values, count = hook_record(model, of, other), len(of.masks)

    def change(layer: int, activation: Tensor) -> Tensor:
        rows = slice(layer * count, (layer + 1) * count)
        patched = activation.clone()
        patched[rows] = torch.where(of.masks, values[layer], activation[rows])
        return patched

    every = ids.expand(of.layers * count, -1)
    logits = hook_logits(model, of, every, [partial(change, layer) for layer in range(of.layers)])
    return of.difference(logits).unflatten(0, (of.layers, count))


# nnsight.


def nnsight_record(wrapped: Any, of: Patches, other: Tensor) -> list[Tensor]:
    """The other text's activations, in one trace."""
    from nnsight import save  # noqa: PLC0415  an extra

    blocks = list(wrapped.transformer.h)
    with wrapped.trace(other, **LAST):
        found = save([])
        for block in blocks:
            found.append(block.output if of.kind == "output" else block.attn.c_proj.input)
    return [value.clone() for value in found]


def nnsight_run(wrapped: Any, of: Patches, ids: Tensor, values: Sequence[Tensor], layer: int, some: slice) -> Tensor:
    """One trace, in which rows appear where the activation is patched."""
    from nnsight import save  # noqa: PLC0415  an extra

    block, masks, value = wrapped.transformer.h[layer], of.masks[some], values[layer]
    with wrapped.trace(ids, **LAST):
        if of.kind == "output":
            block.output = torch.where(masks, value, block.output)
        else:
            block.attn.c_proj.input = torch.where(masks, value, block.attn.c_proj.input)
        logits = save(wrapped.lm_head.output)
    return of.difference(logits)


def nnsight_rows(theirs: Any) -> Any:
    """The model as an envoy tree that takes several invokes as one batch, in the way that its base class asks for."""
    from nnsight import NNsight  # noqa: PLC0415  an extra

    class Rows(NNsight):  # type: ignore[misc]
        """Inputs are tensors of ids, all of one length."""

        def _batch_size(self, *inputs: Any, **named: Any) -> int:  # noqa: ARG002  named: for the whole run
            return len(inputs[0]) if inputs else 0

        def _batch(self, invokes: list[tuple[Any, Any]], fn: Any) -> tuple[Any, Any]:  # noqa: ARG002
            return (torch.cat([inputs[0] for inputs, _ in invokes]),), dict(invokes[0][1])

    return Rows(private(theirs))


def nnsight_invokes(
    wrapped: Any, of: Patches, ids: Tensor, values: Sequence[Tensor], layer: int, some: slice
) -> Tensor:
    """One trace with an invoke for each patch: they run as one batch, from the start."""
    from nnsight import save  # noqa: PLC0415  an extra

    block, value, masks = wrapped.transformer.h[layer], values[layer], of.masks[some]
    with wrapped.trace(**LAST) as tracer:
        logits = save([])
        for mask in masks:
            with tracer.invoke(ids):
                if of.kind == "output":
                    block.output = torch.where(mask, value, block.output)
                else:
                    block.attn.c_proj.input = torch.where(mask, value, block.attn.c_proj.input)
                logits.append(wrapped.lm_head.output)
    return of.difference(torch.cat(list(logits)))


# TransformerLens.


def lens_name(of: Patches, layer: int) -> str:
    """The hook's name."""
    return f"blocks.{layer}.hook_out" if of.kind == "output" else f"blocks.{layer}.attn.hook_z"


def lens_record(bridge: Any, of: Patches, other: Tensor) -> list[Tensor]:
    """The other text's activations, by layer: [1, position, n_embd]."""
    names = [lens_name(of, layer) for layer in range(of.layers)]
    _, cache = bridge.run_with_cache(other, names_filter=names, use_cache=False)
    return [cache[name].flatten(2) for name in names]


def lens_run(bridge: Any, of: Patches, ids: Tensor, values: Sequence[Tensor], layer: int, some: slice) -> Tensor:
    """One run_with_hooks, in which rows appear where the activation is patched."""

    def change(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001  its name is the library's
        patched = torch.where(of.masks[some], values[layer], activation.flatten(2))
        return patched.unflatten(2, activation.shape[2:])

    return of.difference(bridge.run_with_hooks(ids, fwd_hooks=[(lens_name(of, layer), change)], **LAST))


def lens_patching(bridge: Any, of: Patches, ids: Tensor, other: Tensor) -> Tensor:
    """The functions of `transformer_lens.patching`: they run once for each patch, and compute all logits."""
    from transformer_lens import patching  # noqa: PLC0415  an extra

    setattr(patching, "tqdm", lambda items: items)  # noqa: B010  no bars
    _, cache = bridge.run_with_cache(other)

    def metric(logits: Tensor) -> Tensor:
        return of.difference(logits)[0]

    if of.kind == "head":
        found: Tensor = patching.get_act_patch_attn_head_out_all_pos(bridge, ids, cache, metric)
    else:
        axes, setter = ("layer", "pos"), patching.layer_pos_patch_setter
        found = patching.generic_activation_patch(bridge, ids, cache, metric, setter, "resid_post", axes)
    return found


# pyvene.


def pyvene_wrap(theirs: Any, kind: Kind) -> list[Any]:
    """An IntervenableModel for each layer, which interchanges a position of the block's output, or a head."""
    import pyvene  # noqa: PLC0415  an extra

    model = private(theirs)
    at = {"component": "block_output", "unit": "pos"}
    if kind == "head":
        at = {"component": "head_attention_value_output", "unit": "h"}
    swap = {**at, "max_number_of_units": 1, "intervention_type": pyvene.VanillaIntervention}
    return [
        pyvene.IntervenableModel(pyvene.IntervenableConfig([{**swap, "layer": layer}]), model)
        for layer in range(theirs.config.n_layer)
    ]


def pyvene_grid(models: Sequence[Any], of: Patches, ids: Tensor, other: Tensor, together: bool) -> Tensor:
    """An interchange run for each patch, or for each layer with a row for each patch.

    The other text is its source, and runs every time.
    """
    count = len(of.masks)
    groups = [list(range(count))] if together else [[entry] for entry in range(count)]
    rows = []
    for model in models:
        found = []
        for entries in groups:
            base, source = ({"input_ids": text.expand(len(entries), -1), **LAST} for text in (ids, other))
            where = [[[entry] for entry in entries]]
            _, out = model(base, [source], {"sources->base": (where, where)})
            found.append(of.difference(out.logits))
        rows.append(torch.cat(found))
    return torch.stack(rows)
