"""Values to patch with: what ran at a site, and the interventions that put it somewhere else.

    clean, other = (torch.tensor([tokenizer.encode(text)]) for text in (one, another))
    values = record(model, other, ["blocks.3.output"])["blocks.3.output"]
    grid = compare(model, clean, [patch("blocks.3.output", values, positions=[at]) for at in range(clean.shape[1])])

A site is named like its parameters, without `_scale` and `_shift`: `embedding`, `blocks.3.output`, `blocks.3.attention`
(what it writes), `blocks.3.attention.head` (what each head mixed), `blocks.3.mlp.neuron`. Everything here is a dict of
native parameters, as `scaled` and `compare` take it. Two dicts go together with `|` where they name different sites.
"""

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from minigpt.engine import padded
from minigpt.model import GPT2, replaced
from minigpt.parameters import NativeModule, Values, block_of, natives, scaled

WRITES = ("attention", "mlp")
"""The sites of what a block writes into the stream."""
OF_HEADS = ("head", "query", "key", "value")
"""Sites whose values have an axis of heads, and one scale for each."""


@torch.no_grad()
def record(model: GPT2, ids: Tensor | Sequence[Sequence[int]], sites: Iterable[str]) -> dict[str, Tensor]:
    """What runs at some sites: under each site's name [batch, position, n_embd].

    At the sites of heads, queries, keys and values it is [batch, position, n_head, head_width], at `neuron`
    [batch, position, mlp_width]. The model may be clean, or inside `scaled`: what is recorded is what the rest of the
    model reads, after the site's own scale and shift. Nothing else is kept, and no block runs after the last one asked
    for. `ids` is int64 [batch, position], or a list of texts, which are padded on the right.

    Raises ValueError for a site that does not exist, listing the nearest ones, and for one that the model's `forward`
    does not reach through `act`.
    """
    texts, chosen = padded(ids)[0], [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
    _check_sites(model, chosen)
    found = dict[str, Tensor]()
    with ExitStack() as replacements:
        for site in chosen:
            path, _, leaf = site.rpartition(".")
            module = model.get_submodule(path)
            if isinstance(module, NativeModule):
                keep = partial(_keep, module.act, found, site, leaf)
                replacements.enter_context(replaced(module, "act", keep))
        last = max(map(block_of, chosen))
        for _ in islice(model.depths(texts.to(model.device)), last + 2):
            pass
    if missing := [site for site in chosen if site not in found]:
        leaf = missing[0].rpartition(".")[2]
        raise ValueError(
            f"The model's forward does not reach {missing[0]} through `act`; "
            f"let its module say self.act({leaf!r}, ...)."
        )
    return {site: found[site] for site in chosen}


def _keep(
    act: Callable[[str, Tensor], Tensor], found: dict[str, Tensor], name: str, leaf: str, site: str, a: Tensor
) -> Tensor:
    """Do what `act` does, and keep what it makes of one site."""
    out = act(site, a)
    if site == leaf:
        found[name] = out.clone()
    return out


def _check_sites(model: GPT2, sites: Sequence[str]) -> None:
    known = list(dict.fromkeys(name.rpartition("_")[0] for name in natives(model)))
    if not sites:
        raise ValueError("There is no site to record; give some, such as ['blocks.3.output'].")
    for site in sites:
        if site.endswith("attention.score"):
            raise ValueError(f"{site} is never stored; `model.attention_patterns` gives what the scores come to.")
        if site not in known:
            nearest = difflib.get_close_matches(site, known, 4, 0.0)
            raise ValueError(f"There is no site {site!r}; the nearest ones are {', '.join(nearest)}.")


def patch(
    site: str,
    values: Tensor,
    positions: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    amount: float = 1.0,
) -> dict[str, Tensor]:
    """The intervention that puts other values at a site: its scale is 1 - amount there, its shift amount * values.

    `values` is what `record` returns, or what broadcasts to that from the right: zeros for zero ablation, a mean over
    texts for mean ablation, another text's for resampling. `positions` and `heads` (default: all) say where; elsewhere
    nothing changes. `amount` 1 replaces, less mixes. To patch values from another position, move them there first.

    With amount 1 and values of the very run that is patched nothing changes: 0 * a + values is `values`, to the last
    bit. They are that run's only if it has the same shape: products over another number of rows round otherwise.

    Raises ValueError where `positions` or `heads` are out of range, or the values are the same for all of them, and
    for values that are no real numbers.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise ValueError(
            f"The values for {site} are {values!r}; expected real numbers, a tensor as `record` returns it."
        )
    of_heads = site.rpartition(".")[2] in OF_HEADS
    if heads is not None and not of_heads:
        raise ValueError(f"heads were given with {site}, which has none.")
    axes = 4 if of_heads else 3
    if values.ndim > axes:
        raise ValueError(f"The values for {site} have the shape {list(values.shape)}; expected at most {axes} axes.")
    values = values.reshape((1,) * (axes - values.ndim) + tuple(values.shape))
    there = torch.ones(*values.shape[:-1], dtype=torch.bool, device=values.device)  # [batch, position] or with head
    if positions is not None:
        chosen = _chosen("positions", positions, values.shape[1]).to(values.device)
        there &= chosen[:, None] if of_heads else chosen
    if heads is not None:
        there &= _chosen("heads", heads, values.shape[2]).to(values.device)
    scale = torch.ones_like(there, dtype=values.dtype).masked_fill(there, 1.0 - amount)
    shift = (amount * values).masked_fill(~there.unsqueeze(-1), -0.0)
    return {f"{site}_scale": scale if of_heads else scale.unsqueeze(-1), f"{site}_shift": shift}


def _chosen(what: str, chosen: Iterable[int], size: int) -> Tensor:
    """Which of so many entries are chosen: bool [entry]."""
    try:
        indices = list(map(operator.index, chosen))
    except TypeError:
        raise ValueError(f"The {what} are {chosen!r}; expected several whole numbers, such as [0].") from None
    if size == 1:
        raise ValueError(f"The {what} are {indices}, and the values are the same for all; expand them to every entry.")
    if not indices or not all(0 <= index < size for index in indices):
        raise ValueError(
            f"The {what} are {indices}; the values are given for {size}, so expected some from 0 to {size - 1}."
        )
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(indices), True)


def freeze(
    model: GPT2, ids: Tensor | Sequence[Sequence[int]], layers: Iterable[int] | None = None
) -> dict[str, Tensor]:
    """The intervention under which attention and MLP of some layers (default: all) write what they write now.

    Whatever else is done, these layers do not react to it.
    """
    chosen = range(model.config.n_layer) if layers is None else layers
    recorded = record(model, ids, [f"blocks.{layer}.{write}" for layer in chosen for write in WRITES])
    return patched(recorded)


def patched(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The intervention that puts all these values at their sites, whole."""
    return {name: value for site, of in values.items() for name, value in patch(site, of).items()}


def path_patch(
    model: GPT2, ids: Tensor | Sequence[Sequence[int]], sender: Values, receivers: Iterable[str]
) -> dict[str, Tensor]:
    """The intervention that lets a change reach some sites directly, and by no other path.

    `sender` is what changes, such as a head patched with its values on another text. For every receiver the model
    runs with the sender changed and all other attention and MLP writes frozen; what arrives at the receiver is
    recorded. The intervention puts that there, and changes nothing else (path patching: Wang et al. 2023, section 3.1;
    Goldowsky-Dill et al. 2023). A receiver that lies before the sender gets what it has.

    Raises ValueError as `record` and `scaled` do, and for a sender within several sublayers: the later one would react
    to the earlier one.
    """
    frozen, found = freeze(model, ids), dict[str, Tensor]()
    owners = list(dict.fromkeys(name.rpartition("_")[0] for name in frozen if _within(name, sender)))
    if len(owners) > 1:
        raise ValueError(f"The sender acts within {', '.join(owners)}; give the change of one sublayer at a time.")
    for receiver in [receivers] if isinstance(receivers, str) else receivers:
        own = {name for name in frozen if name.startswith(f"{receiver}_") or _within(name, sender)}
        with scaled(model, {name: value for name, value in frozen.items() if name not in own} | dict(sender)):
            found |= record(model, ids, [receiver])
    return patched(found)


def _within(name: str, sender: Values) -> bool:
    """Whether a write is the sender's own: that of block 2's attention, of a head in it."""
    write = name.rpartition("_")[0]
    return any(of.startswith((f"{write}_", f"{write}.")) for of in sender)
