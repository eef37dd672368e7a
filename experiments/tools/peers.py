"""The grid of the benchmark as it is computed with other tools.

Every function here fills a table [layer, factor, depth]: Frobenius norms, over all positions but the first,
of the scaled minus the clean stream, where in a cell the whole output of block `layer` is multiplied by
`factor`; depth 0 is the embeddings, depth d the raw output of block d - 1. Depths up to the layer come
before the change and are 0: nobody records them.

The libraries change the model that they are given (TransformerLens replaces modules, nnsight their forward
methods, and pyvene removes every forward hook it finds), so each gets modules of its own over the same
weights.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Scale = float | Tensor
Run = Callable[[int, Scale], list[Tensor]]
"""A layer and a factor, or factors [row, 1, 1] -> the outputs of that block, scaled, and of every later one."""
PACKAGES = {"nnsight": "nnsight", "TransformerLens": "transformer_lens", "pyvene": "pyvene"}
NO_LOGITS = torch.empty(0, dtype=torch.long)
"""As `logits_to_keep`: the unembedding runs on nothing."""


def absent() -> list[str]:
    """The libraries that are not installed."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None]


def contenders(theirs: Any, factors: Sequence[float]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Everyone who is installed: what they are called, and a function from ids [1, position] to the table."""
    missing = absent()
    runs: dict[str, Callable[..., list[Tensor]]] = {
        "transformers, GPT2LMHeadModel": partial(hooked_run, theirs),
        "transformers, GPT2Model": partial(hooked_run, theirs.transformer),
    }
    if "nnsight" not in missing:
        wrapped = nnsight_wrap(theirs)
        runs["nnsight"] = partial(nnsight_run, wrapped)
        runs["nnsight, clean blocks skipped"] = partial(nnsight_skip, wrapped)
    if "TransformerLens" not in missing:
        runs["TransformerLens bridge"] = partial(lens_run, lens_wrap(theirs))
    if "pyvene" not in missing:
        runs["pyvene"] = partial(pyvene_run, pyvene_wrap(theirs))
    found = dict[str, Callable[[Tensor], Tensor]]()
    for name, run in runs.items():
        if name.startswith("transformers"):
            found[f"{name}, factors batched from the start"] = partial(_table, batched, run, factors, repeat=True)
        found[f"{name}, one run per cell"] = partial(_table, loop, run, factors)
        found[f"{name}, factors batched"] = partial(_table, batched, run, factors)
    return found


@torch.no_grad()
def _table(
    fill: Callable[[Run, Sequence[Tensor], Sequence[float]], Tensor],
    run: Callable[..., list[Tensor]],
    factors: Sequence[float],
    ids: Tensor,
    repeat: bool = False,
) -> Tensor:
    """`repeat` gives every factor a row of ids; else the factors become rows where the block is scaled."""
    clean = run(ids, 0, 1.0)
    given = partial(run, clean=clean) if getattr(run, "func", None) is nnsight_skip else run
    return fill(partial(given, ids.expand(len(factors), -1) if repeat else ids), clean, factors)


def private(theirs: Any) -> Any:
    """A copy of the model's modules whose parameters share their storage with the original's."""
    shared = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in theirs.parameters()}
    return copy.deepcopy(theirs, shared)


def norms(scaled: Sequence[Tensor], clean: Sequence[Tensor]) -> Tensor:
    """Norm of each scaled state minus its clean one without position 0, as [row, depth]."""
    gaps = [
        torch.linalg.vector_norm(ours[:, 1:] - base[:, 1:], dim=(1, 2))
        for ours, base in zip(scaled, clean, strict=True)
    ]
    return torch.stack(gaps, dim=1)


def loop(run: Run, clean: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Fill the table with one run per cell."""
    layers = len(clean)
    table = clean[0].new_zeros(layers, len(factors), layers + 1)
    for layer in range(layers):
        for cell, factor in enumerate(factors):
            table[layer, cell, layer + 1 :] = norms(run(layer, factor), clean[layer:])[0]
    return table


def batched(run: Run, clean: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Fill the table with one run per layer, whose batch rows are the factors."""
    layers = len(clean)
    table = clean[0].new_zeros(layers, len(factors), layers + 1)
    rows = clean[0].new_tensor(factors).view(-1, 1, 1)
    for layer in range(layers):
        table[layer, :, layer + 1 :] = norms(run(layer, rows), clean[layer:])
    return table


def hooked_run(model: Any, ids: Tensor, layer: int, factor: Scale) -> list[Tensor]:
    """Correct hooks on transformers' blocks: the first returns a new tensor, and all keep what leaves their block."""
    states = list[Tensor]()

    def hook(_module: Any, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states.append(output if states else output * factor)
        return states[-1]

    blocks = model.h if hasattr(model, "h") else model.transformer.h
    handles = [block.register_forward_hook(hook) for block in blocks[layer:]]
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


def nnsight_wrap(theirs: Any) -> Any:
    """The model as an nnsight envoy tree."""
    from nnsight import NNsight  # noqa: PLC0415  an extra

    return NNsight(private(theirs))


def nnsight_run(wrapped: Any, ids: Tensor, layer: int, factor: Scale) -> list[Tensor]:
    """Outputs of block `layer` (scaled) and of every later one, in one trace that ends there."""
    from nnsight import save  # noqa: PLC0415  an extra

    blocks = list(wrapped.transformer.h)[layer:]
    with wrapped.trace(ids, use_cache=False) as tracer:
        states = save([blocks[0].output * factor])
        # A factor [row, 1, 1] turns the single row of `ids` into many here, so that the blocks
        # before it run on one row only.
        blocks[0].output = states[0]
        for block in blocks[1:]:
            states.append(block.output)
        # Leaves out the final norm and the unembedding.
        tracer.stop()
    return states


def nnsight_skip(
    wrapped: Any, ids: Tensor, layer: int, factor: Scale, clean: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The same, but no block up to `layer` runs: each is given its clean output, where that is known."""
    from nnsight import save  # noqa: PLC0415  an extra

    if clean is None:
        return nnsight_run(wrapped, ids, layer, factor)
    blocks = list(wrapped.transformer.h)
    with wrapped.trace(ids, use_cache=False) as tracer:
        states = save([clean[layer] * factor])
        for block, state in zip(blocks[:layer], clean[:layer], strict=True):
            block.skip(state)
        blocks[layer].skip(states[0])
        for block in blocks[layer + 1 :]:
            states.append(block.output)
        tracer.stop()
    return states


def lens_wrap(theirs: Any) -> Any:
    """The model as a TransformerBridge with raw weights (no compatibility mode) and no tokenizer."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module  # noqa: PLC0415  an extra

    return build_bridge_from_module(private(theirs), "GPT2LMHeadModel", hf_config=theirs.config).eval()


def lens_run(bridge: Any, ids: Tensor, layer: int, factor: Scale) -> list[Tensor]:
    """Outputs of block `layer` (scaled) and of every later one, in one run_with_hooks."""
    states: list[Tensor] = []

    def scale(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001  its name is the library's
        states.append(value * factor)
        return states[0]

    def keep(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        states.append(value)

    later = [(f"blocks.{depth}.hook_out", keep) for depth in range(layer + 1, len(bridge.blocks))]
    # `stop_at_layer` is looked at on entry to a block, so it cannot stop after the last one, and
    # return_type=None only drops the logits once they are there: hence no position for them.
    bridge.run_with_hooks(
        ids,
        return_type=None,
        fwd_hooks=[(f"blocks.{layer}.hook_out", scale), *later],
        use_cache=False,
        logits_to_keep=NO_LOGITS,
    )
    return states


@dataclass
class Pyvene:
    """One IntervenableModel per scaled layer, and the dial their interventions read the factor from."""

    models: list[Any]
    dial: SimpleNamespace


def pyvene_wrap(theirs: Any) -> Pyvene:
    """IntervenableModels that scale the output of a block and collect it and every later one."""
    import pyvene  # noqa: PLC0415  an extra

    model, dial = private(theirs), SimpleNamespace(factor=1.0)

    def scale(base: Tensor, source: None) -> Tensor:  # noqa: ARG001
        return base * dial.factor

    def at(layer: int, intervention: Any) -> dict[str, Any]:
        return {"layer": layer, "component": "block_output", "intervention": intervention}

    def collect(layer: int) -> dict[str, Any]:
        # Without keep_last_dim it flattens the positions and returns the first one only.
        return at(layer, pyvene.CollectIntervention(keep_last_dim=True))

    layers = range(theirs.config.n_layer)
    return Pyvene(
        [pyvene.IntervenableModel([at(layer, scale), *map(collect, layers[layer:])], model) for layer in layers],
        dial,
    )


def pyvene_run(wrapped: Pyvene, ids: Tensor, layer: int, factor: Scale) -> list[Tensor]:
    """Outputs of block `layer` (scaled) and of every later one, in one pyvene run."""
    wrapped.dial.factor = factor
    # pyvene writes into the block's output in place, so every row has to be there from the start.
    rows = len(factor) if isinstance(factor, Tensor) else 1
    base = {"input_ids": ids.expand(rows, -1), "logits_to_keep": NO_LOGITS}
    (_, states), _ = wrapped.models[layer](base, use_cache=False)
    return states
