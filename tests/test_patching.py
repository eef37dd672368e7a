"""What runs at every site, and what happens when it is put somewhere else, beside edits written out by hand."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minigpt import (
    GPT2,
    Block,
    GPT2Config,
    compare,
    compare_logits,
    engine,
    freeze,
    generate,
    patch,
    path_patch,
    record,
    scaled,
)
from minigpt.model import SITES, Attention
from minigpt.parameters import Native, declare, law, natives
from minigpt.patching import patched
from tests.blocks import Parallel
from tests.conftest import SMALL

SAME = {"rtol": 1e-12, "atol": 1e-12}
OTHER = torch.randint(SMALL["vocab_size"], (2, 10), generator=torch.Generator().manual_seed(2))
OF_HEADS = ("head", "query", "key", "value")
WITHIN = dict.fromkeys(OF_HEADS, "attention.") | {"neuron": "mlp."}
EVERY = ["embedding", *(f"blocks.2.{WITHIN.get(site, '')}{site}" for site in SITES)]


@pytest.fixture
def other() -> Tensor:
    """Two texts beside those of `ids`, as long."""
    return OTHER


def logits_under(model: GPT2, ids: Tensor, values: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), scaled(model, values):
        return model(ids)


# What is recorded.


def test_streams_are_recorded_as_they_are_at_their_depth(model: GPT2, ids: Tensor) -> None:
    names = ["embedding", *(f"blocks.{layer}.output" for layer in range(4))]
    for depth, found in enumerate(record(model, ids, names).values()):
        assert torch.equal(found, model.residuals(ids)[depth]), depth


def test_writes_heads_and_neurons_are_what_the_block_is_made_of(model: GPT2, ids: Tensor) -> None:
    found, block = record(model, ids, EVERY), model.blocks[2]
    x = model.residuals(ids)[2]
    q, k, v = (found[f"blocks.2.attention.{site}"] for site in ("query", "key", "value"))
    fused = block.attention.qkv(block.attention_norm(x))
    torch.testing.assert_close(torch.cat([of.flatten(2) for of in (q, k, v)], 2), fused, **SAME)
    scores = torch.einsum("bqhw,bkhw->bhqk", q, k) * block.attention.score_scale
    weights = scores.masked_fill(torch.ones(10, 10, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    z = torch.einsum("bhqk,bkhw->bqhw", weights, v)
    torch.testing.assert_close(found["blocks.2.attention.head"], z, **SAME)
    attention = block.attention.projection(z.flatten(2))
    torch.testing.assert_close(found["blocks.2.attention"], attention, **SAME)
    neurons = block.mlp.activation(block.mlp.expand(block.mlp_norm(x + attention)))
    torch.testing.assert_close(found["blocks.2.mlp.neuron"], neurons, **SAME)
    torch.testing.assert_close(found["blocks.2.mlp"], block.mlp.projection(neurons), **SAME)
    torch.testing.assert_close(found["blocks.2.output"], x + attention + block.mlp.projection(neurons), **SAME)


@pytest.mark.parametrize("site", EVERY)
def test_what_a_site_gives_is_recorded_after_its_own_scale_and_shift(model: GPT2, ids: Tensor, site: str) -> None:
    clean = record(model, ids, [site])[site]
    with scaled(model, {f"{site}_scale": -2.0, f"{site}_shift": 0.25}):
        torch.testing.assert_close(record(model, ids, [site])[site], -2.0 * clean + 0.25, **SAME)
    assert torch.equal(record(model, ids, [site])[site], clean)


def test_only_what_was_asked_for_is_kept_and_no_later_block_runs(
    model: GPT2, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, forward = list[int](), Block.forward

    def counted(self: Block, *given: object) -> Tensor:
        ran.append(self.attention.layer)
        return forward(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Block, "forward", counted)
    found = record(model, ids, ["blocks.1.mlp", "blocks.0.attention.key"])
    assert list(found) == ["blocks.1.mlp", "blocks.0.attention.key"]
    assert ran == [0, 1]
    record(model, ids, ["embedding"])
    assert ran == [0, 1]
    assert not any(of.requires_grad for of in found.values())


def test_texts_of_several_lengths_are_recorded_each_as_alone(model: GPT2) -> None:
    texts = [[1, 2, 3, 4, 5], [6, 7]]
    together = record(model, texts, ["blocks.3.attention.head"])["blocks.3.attention.head"]
    for row, text in enumerate(texts):
        alone = record(model, [text], ["blocks.3.attention.head"])["blocks.3.attention.head"]
        torch.testing.assert_close(together[row, : len(text)], alone[0], **SAME)


# What a patch does.


@pytest.mark.parametrize("site", EVERY)
def test_a_patch_from_the_run_itself_changes_no_bit(model: GPT2, ids: Tensor, site: str) -> None:
    own = record(model, ids, [site])[site]
    clean = model(ids)
    assert torch.equal(logits_under(model, ids, patch(site, own)), clean)
    heads = [0, 2] if own.ndim == 4 else None
    assert torch.equal(logits_under(model, ids, patch(site, own, [0, 4], heads)), clean)
    mixed = logits_under(model, ids, patch(site, own, amount=0.3))
    torch.testing.assert_close(mixed, clean, **SAME)


@pytest.mark.parametrize("site", EVERY)
@pytest.mark.parametrize("amount", [1.0, 0.4])
def test_a_patch_puts_the_others_values_there_and_nowhere_else(
    model: GPT2, ids: Tensor, other: Tensor, site: str, amount: float
) -> None:
    mine, theirs = (record(model, of, [site])[site] for of in (ids, other))
    heads = [1] if mine.ndim == 4 else None
    there = torch.zeros_like(mine, dtype=torch.bool)
    there[:, [3, 6]] = True
    if heads:
        there[:, :, [0, 2]] = False
    with scaled(model, patch(site, theirs, [3, 6], heads, amount)):
        found = record(model, ids, [site])[site]
    torch.testing.assert_close(found, torch.where(there, (1 - amount) * mine + amount * theirs, mine), **SAME)
    assert torch.equal(found[~there], mine[~there])


def test_a_mean_over_texts_and_positions_is_one_value_for_all(model: GPT2, ids: Tensor) -> None:
    """[n_head, head_width]: axes of texts and positions come in front, also where there are as many positions."""
    site = "blocks.1.attention.head"
    mean = record(model, ids[:, :3], [site])[site].mean((0, 1))
    with scaled(model, patch(site, mean, heads=[2])):
        found = record(model, ids[:, :3], [site])[site]
    torch.testing.assert_close(found[:, :, 2], mean[2].expand(2, 3, -1), **SAME)
    assert torch.equal(found[:, :, :2], record(model, ids[:, :3], [site])[site][:, :, :2])


@pytest.mark.parametrize("site", EVERY)
def test_a_patched_run_beside_others_is_what_it_is_alone(model: GPT2, ids: Tensor, other: Tensor, site: str) -> None:
    theirs = record(model, other, [site])[site]
    runs = [patch(site, theirs), *(patch(site, theirs, [at]) for at in range(10))]
    tokens = torch.tensor([[3, 50], [7, 9]])
    found = compare(model, ids, runs, tokens=tokens)
    for row, values in enumerate(runs):
        expected = logits_under(model, ids, values)[:, -1].gather(1, tokens)
        torch.testing.assert_close(found.logits[row], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.clean_logits, model(ids)[:, -1].gather(1, tokens).detach(), rtol=1e-10, atol=1e-10)


def test_patching_the_last_output_whole_gives_the_other_run(model: GPT2, ids: Tensor, other: Tensor) -> None:
    for site in ("embedding", "blocks.0.output", "blocks.3.output"):
        theirs = record(model, other, [site])[site]
        torch.testing.assert_close(logits_under(model, ids, patch(site, theirs)), model(other), **SAME)


def test_tokens_of_padded_texts_are_read_after_each_ones_last(model: GPT2) -> None:
    texts, runs = [[1, 2, 3, 4, 5], [6, 7]], [{"blocks.1.mlp_shift": 0.3}, {"embedding_scale": 0.5}]
    found = compare(model, texts, runs, tokens=[4, 11, 90])
    assert found.logits.shape == (2, 2, 3)
    for row, values in enumerate(runs):
        for text, tokens in enumerate(texts):
            with torch.no_grad(), scaled(model, values):
                expected = model(torch.tensor([tokens]))[0, -1, [4, 11, 90]]
            torch.testing.assert_close(found.logits[row, text], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("block", [Block, Parallel])
def test_logits_alone_are_those_that_come_with_the_places(
    small: Callable[..., GPT2], block: type[Block], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CPU_SLAB", rows * 10)
    model, texts = small(block=block), [[1, 2, 3, 4, 5], [6, 7]]
    runs = [{"blocks.3.mlp_scale": 0.0}, {"embedding_scale": 0.5}, {"blocks.1.output_scale": 0.5}]
    clean, found = compare_logits(model, texts, runs, [[4, 11], [90, 3]])
    beside = compare(model, texts, runs, tokens=[[4, 11], [90, 3]])
    assert (clean.shape, found.shape) == ((2, 2), (3, 2, 2))
    torch.testing.assert_close(clean, beside.clean_logits, **SAME)
    torch.testing.assert_close(found, beside.logits, **SAME)
    assert (found - clean).abs().min() > 1e-6
    for row in range(3):  # a run is the same in whatever company
        torch.testing.assert_close(
            compare_logits(model, texts, runs[row : row + 1], [4, 3])[1][0, 0, 0], found[row, 0, 0]
        )


def test_logits_alone_are_refused_as_with_the_places(small: Callable[..., GPT2], ids: Tensor) -> None:
    model = small(dtype=torch.float32)
    for values, said in (
        ({"blocks.1.output_scale": 1e25}, "too large for the norm layers of block 2 under intervention 0"),
        ({"blocks.3.output_scale": 1e25}, "too large for the final norm under intervention 0"),
    ):
        with pytest.raises(ValueError, match=said):
            compare_logits(model, ids, [values], [1])
    with pytest.raises(ValueError, match="There is no intervention"):
        compare_logits(model, ids, [], [1])
    least = "max_bytes is 1000; one text of 10 tokens with one run beside the clean one takes"
    with pytest.raises(ValueError, match=least):
        compare_logits(model, ids, [{"embedding_scale": 2.0}], [1], max_bytes=1000)


# Edges.


def test_a_knocked_out_edge_leaves_the_rest_of_the_pattern_renormalised(model: GPT2, ids: Tensor) -> None:
    edge = torch.zeros(1, 3, 10, 10)
    edge[:, 1, 6, 2] = -torch.inf
    clean = model.attention_patterns(ids)
    with torch.no_grad(), scaled(model, {"blocks.1.attention.score_shift": edge}):
        found = model.attention_patterns(ids)
    expected = clean[1].clone()
    expected[:, 1, 6, 2] = 0
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(found[1], expected, **SAME)
    assert torch.equal(found[0], clean[0])
    assert (found[2] - clean[2]).abs().amax((0, 1, 3))[6:].max() > 0
    z = torch.einsum("bhqk,bkhw->bqhw", expected, record(model, ids, ["blocks.1.attention.value"]).popitem()[1])
    by_hand = logits_under(model, ids, patch("blocks.1.attention.head", z))
    torch.testing.assert_close(logits_under(model, ids, {"blocks.1.attention.score_shift": edge}), by_hand, **SAME)
    without = logits_under(model, ids, {"blocks.1.attention.score_shift": edge.nan_to_num(neginf=-1.0)})
    assert not torch.allclose(without, by_hand, rtol=1e-3)


def test_a_shift_of_scores_is_added_before_the_softmax(model: GPT2, ids: Tensor) -> None:
    shift = torch.randn(2, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    clean = model.attention_patterns(ids)[1]
    with torch.no_grad(), scaled(model, {"blocks.1.attention.score_shift": shift}):
        found = model.attention_patterns(ids)[1]
    later = torch.ones(10, 10, dtype=torch.bool).triu(1)
    expected = (clean.log() + shift).masked_fill(later, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, expected, **SAME)


@pytest.mark.parametrize("run", [scaled, lambda model, values: compare(model, OTHER, [values])])
def test_a_query_without_a_key_is_refused(model: GPT2, run: Callable[..., object]) -> None:
    edges = torch.zeros(1, 1, 10, 10)
    edges[..., 4, :5] = -torch.inf
    values = {"blocks.2.attention.score_shift": edges}
    with pytest.raises(ValueError, match="score_shift leaves query 4 of block 2 without a key"):
        if run is scaled:
            logits_under(model, OTHER, values)
        else:
            run(model, values)


def test_a_pattern_does_not_depend_on_what_is_done_to_the_values(model: GPT2, ids: Tensor) -> None:
    clean = model.attention_patterns(ids)[1]
    values = {"blocks.1.attention.value_scale": 3.0, "blocks.1.attention.value_shift": torch.ones(12)}
    with torch.no_grad(), scaled(model, values):
        torch.testing.assert_close(model.attention_patterns(ids)[1], clean, **SAME)
    with torch.no_grad(), scaled(model, {"blocks.1.attention.query_scale": 0.0}):
        flat = torch.ones(10, 10, dtype=torch.float64).tril()
        expected = (flat / flat.sum(-1, keepdim=True)).expand(2, 3, -1, -1)
        torch.testing.assert_close(model.attention_patterns(ids)[1], expected, **SAME)


# Frozen writes and paths.


def test_frozen_layers_carry_the_difference_unchanged(model: GPT2, ids: Tensor) -> None:
    values = {"blocks.0.output_scale": 0.5, **freeze(model, ids, [1, 2, 3])}
    clean = model.residuals(ids)
    with torch.no_grad(), scaled(model, values):
        changed = model.residuals(ids)
    for depth in range(2, 5):
        torch.testing.assert_close(changed[depth] - clean[depth], changed[1] - clean[1], **SAME)
    alone = logits_under(model, ids, {"blocks.0.output_scale": 0.5})
    assert not torch.allclose(alone, logits_under(model, ids, values), rtol=1e-3), "later blocks react"
    assert set(freeze(model, ids)) == {
        f"blocks.{layer}.{part}_{how}"
        for layer in range(4)
        for part in ("attention", "mlp")
        for how in ("scale", "shift")
    }


@pytest.mark.parametrize(
    "receiver", ["blocks.2.attention.query", "blocks.3.mlp", "blocks.3.attention", "blocks.3.output"]
)
def test_a_path_is_what_a_freeze_by_hand_gives(model: GPT2, ids: Tensor, other: Tensor, receiver: str) -> None:
    """One head of block 0 sends; every write in between is the clean one, computed here without the library's sites."""
    site, layer = "blocks.0.attention.head", int(receiver.split(".")[1])
    sender = patch(site, record(model, other, [site])[site], heads=[1])
    found = path_patch(model, ids, sender, [receiver])
    assert set(found) == {f"{receiver}_scale", f"{receiver}_shift"}
    z, theirs = (record(model, of, [site])[site] for of in (ids, other))
    z[:, :, 1] = theirs[:, :, 1]
    sent = model.blocks[0].attention.projection(z.flatten(2)) - record(model, ids, ["blocks.0.attention"]).popitem()[1]
    block, x = model.blocks[layer], model.residuals(ids)[layer] + sent
    if receiver.endswith("query"):
        expected = block.attention.heads(block.attention_norm(x))[0].transpose(1, 2)
    elif receiver.endswith("attention"):
        expected = block.attention(block.attention_norm(x))
    elif receiver.endswith("mlp"):
        clean = record(model, ids, [f"blocks.{layer}.attention"]).popitem()[1]
        expected = block.mlp(block.mlp_norm(x + clean))
    else:
        expected = model.residuals(ids)[layer + 1] + sent
    torch.testing.assert_close(found[f"{receiver}_shift"], expected, **SAME)
    assert not found[f"{receiver}_scale"].any()
    with scaled(model, sender):
        reached_anyhow = record(model, ids, [receiver])[receiver]
    assert not torch.allclose(reached_anyhow, expected, rtol=1e-3), "by other paths more arrives"


def test_a_receiver_before_the_sender_gets_what_it_has(model: GPT2, ids: Tensor) -> None:
    found = path_patch(model, ids, {"blocks.3.mlp_scale": 0.0}, ["blocks.1.mlp"])
    assert torch.equal(logits_under(model, ids, found), model(ids))


# The law itself.


def test_a_parameter_that_nobody_set_is_not_there_and_takes_no_part(model: GPT2) -> None:
    a = torch.randn(2, 10, 36)
    assert model.blocks[0].output_shift is None and model.blocks[0].attention.query_scale is None
    assert model.blocks[0].attention.act("query", a) is a and model.act("embedding", a) is a
    assert not [name for name in model.state_dict() if name.endswith("shift")]


def test_a_shift_of_nothing_changes_no_bit_of_a_negative_zero(model: GPT2) -> None:
    a = torch.tensor([[[-0.0, 0.0]]])
    for native in (*Block.native, *Attention.native):
        assert (native.nothing == native.neutral) and str(native.nothing) in ("1.0", "-0.0")
    assert str((a + -0.0).tolist()) == str(a.tolist())
    with scaled(model, {"blocks.0.output_shift": -0.0}):
        assert str(model.blocks[0].act("output", a).tolist()) == str(a.tolist())


@pytest.mark.parametrize("site", EVERY)
@pytest.mark.parametrize("how", ["scale", "shift"])
def test_generation_is_the_same_with_and_without_a_cache(small: Callable[..., GPT2], site: str, how: str) -> None:
    model = small(tie_word_embeddings=False)
    native = natives(model)[f"{site}_{how}"]
    sizes = [
        1 if word in ("batch", "position") else size
        for word, size in zip(native.shape, native.sizes(model.config), strict=True)
    ]
    value = 8 * torch.randn(
        [size or 1 for size in sizes], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    clean = list(generate(model, [5, 17, 3], 12))
    with scaled(model, {f"{site}_{how}": value}):
        cached, uncached = (list(generate(model, [5, 17, 3], 12, cached=cached)) for cached in (True, False))
    assert cached == uncached
    assert cached != clean or (site, how) == ("blocks.2.attention.key", "shift"), "a softmax does not see that one"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.1.output_shift", (1, 3, 36)),
        ("blocks.1.attention.head_shift", (1, 3, 1, 1)),
        ("blocks.1.attention.score_shift", (3, 3)),
        ("blocks.1.attention.score_shift", (1, 1, 1, 3)),
        ("embedding_scale", (2, 1, 1)),
    ],
)
def test_generation_refuses_values_that_differ_between_positions(
    model: GPT2, name: str, shape: tuple[int, ...]
) -> None:
    with (
        scaled(model, {name: torch.full(shape, 0.5)}),
        pytest.raises(
            ValueError, match=rf"{name} has shape {re.escape(str(list(shape)))}, other values for other rows or"
        ),
    ):
        next(generate(model, [5, 17, 3], 2))


def test_a_shift_that_stays_is_neither_saved_nor_clean(model: GPT2, ids: Tensor) -> None:
    model.blocks[1].output_shift = torch.nn.Parameter(torch.ones(36, dtype=torch.float64), requires_grad=False)
    with pytest.raises(ValueError, match=r"set blocks\.1\.output_shift back to 0"):
        compare(model, ids, [{"blocks.0.mlp_scale": 0.0}])
    with pytest.raises(ValueError, match=r"cannot be saved.*blocks\.1\.output_shift"):
        model.save_pretrained("nowhere")


# What is refused.


class Own(Block):
    """Uses its scales by hand, and no shift."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        u = x + self.attention_scale * self.attention(self.attention_norm(x))
        return self.output_scale * (u + self.mlp_scale * self.mlp(self.mlp_norm(u)))


def test_a_value_that_a_block_of_ones_own_would_not_use_is_refused(small: Callable[..., GPT2], ids: Tensor) -> None:
    model = small(block=Own)
    compare(model, ids, [{"blocks.1.output_scale": 0.5, "blocks.2.attention.query_shift": 1.0}])
    said = (
        r"does not use blocks\.2\.mlp_shift, so a value would do nothing; let its module say self\.act\('mlp', \.\.\.\)"
    )
    with pytest.raises(ValueError, match=said):
        compare(model, ids, [{"blocks.1.output_scale": 0.5}, {"blocks.2.mlp_shift": 1.0}])
    with pytest.raises(
        ValueError, match=r"does not reach blocks\.1\.output through `act`; let its module say self\.act\('out"
    ):
        record(model, ids, ["blocks.1.output"])
    assert record(model, ids, ["blocks.1.mlp.neuron"])["blocks.1.mlp.neuron"].shape == (2, 10, 144)


class Plain(torch.nn.Module):
    """Declares a site, and is no module of this library's kind."""

    native = law("gate")

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        declare(self, self.native, config)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_site_of_a_module_without_the_law_is_a_sentence(small: Callable[..., GPT2], ids: Tensor) -> None:
    model = small(block=type("Gated", (Block,), {"mlp_class": Plain}))
    with pytest.raises(ValueError, match=r"does not reach blocks\.1\.mlp\.gate through `act`"):
        record(model, ids, ["blocks.1.mlp.gate"])


VALUES = torch.zeros(2, 10, 3, 12)
WRONG = {
    "an unknown site": (
        lambda model, ids: record(model, ids, ["blocks.1.outputs"]),
        "There is no site 'blocks.1.outputs'; the nearest ones are blocks.1.output,",
    ),
    "a block that is not there": (
        lambda model, ids: record(model, ids, ["blocks.9.output"]),
        "There is no site 'blocks.9.output'",
    ),
    "whole numbers as values": (
        lambda *_: patch("blocks.1.output", VALUES[..., 0].long(), amount=0.5),
        "expected real numbers, a tensor as",
    ),
    "too many axes": (
        lambda *_: patch("blocks.1.output", VALUES),
        "have the shape [2, 10, 3, 12]; expected at most 3 axes",
    ),
    "a position for all texts": (
        lambda *_: patch("blocks.1.output", torch.zeros(36), [0]),
        "The positions are [0], and the values are the same for all",
    ),
    "half a position": (lambda *_: patch("blocks.1.output", VALUES[..., 0], [1.5]), "expected several whole numbers"),
    "positions as a number": (
        lambda *_: patch("blocks.1.output", VALUES[..., 0], 1),
        "The positions are 1; expected several",
    ),
    "senders in two blocks": (
        lambda model, ids: path_patch(
            model, ids, {"blocks.0.mlp_scale": 0.0, "blocks.1.attention.head_scale": 0.0}, ["blocks.3.output"]
        ),
        "The sender acts within blocks.0.mlp, blocks.1.attention; give the change of one sublayer at a time",
    ),
    "infinity": (
        lambda model, ids: compare(model, ids, [{"blocks.1.attention.score_shift": float("inf")}]),
        "blocks.1.attention.score_shift was given infinity",
    ),
    "tokens in letters": (
        lambda model, ids: compare(model, ids, [{"embedding_scale": 2.0}], tokens="ab"),
        "The tokens are 'ab'; expected token ids",
    ),
    "no site": (lambda model, ids: record(model, ids, []), "There is no site to record; give some, such as"),
    "scores": (
        lambda model, ids: record(model, ids, ["blocks.1.attention.score"]),
        "blocks.1.attention.score is never stored; `model.attention_patterns` gives",
    ),
    "ids out of range": (lambda model, _: record(model, [[97]], ["embedding"]), "97"),
    "a number as values": (
        lambda *_: patch("blocks.1.output", 0.0),
        "The values for blocks.1.output are 0.0; expected real numbers, a tensor as",
    ),
    "a position beyond": (
        lambda *_: patch("blocks.1.output", VALUES[..., 0], [10]),
        "The positions are [10]; the values are given for 10, so expected some from 0 to 9",
    ),
    "a head beyond": (
        lambda *_: patch("blocks.1.attention.head", VALUES, heads=[-1]),
        "The heads are [-1]; the values are given for 3",
    ),
    "no position": (lambda *_: patch("blocks.1.output", VALUES[..., 0], []), "The positions are []"),
    "heads of a stream": (
        lambda *_: patch("blocks.1.output", VALUES[..., 0], heads=[0]),
        "heads were given with blocks.1.output, which has none",
    ),
    "one value for all positions": (
        lambda *_: patch("blocks.1.output", VALUES[:, :1, 0], [2]),
        "The positions are [2], and the values are the same for all; expand them",
    ),
    "another length": (
        lambda model, ids: compare(model, ids, [patch("blocks.1.output", torch.zeros(1, 9, 36))]),
        "expected a number, or 1 or 2 texts by 1 or 10 positions",
    ),
    "another width": (
        lambda model, ids: compare(model, ids, [patch("blocks.1.output", torch.zeros(1, 10, 35))]),
        "expected one that broadcasts to [batch, position, 36]",
    ),
    "not a number": (
        lambda model, ids: compare(model, ids, [{"blocks.1.output_shift": float("nan")}]),
        "blocks.1.output_shift was given infinity, or not a number",
    ),
    "a token beyond": (
        lambda model, ids: compare(model, ids, [{"embedding_scale": 2.0}], tokens=[97]),
        "The tokens are [97]; expected at least one, from 0 to 96",
    ),
    "tokens of three texts": (
        lambda model, ids: compare(model, ids, [{"embedding_scale": 2.0}], tokens=[[1], [2], [3]]),
        "for 2 texts",
    ),
    "logits that were not kept": (
        lambda model, ids: compare(model, ids, [{"embedding_scale": 2.0}]).logits,
        "Logits were not kept; compare with tokens=[...]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_refused_in_a_sentence(model: GPT2, ids: Tensor, case: str) -> None:
    call, said = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(said)):
        call(model, ids)


def test_the_four_nearest_sites_are_named(model: GPT2, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="the nearest ones are") as refused:
        record(model, ids, ["blocks.1.outputs"])
    named = str(refused.value).partition("nearest ones are ")[2].removesuffix(".").split(", ")
    assert len(named) == 4 and named[0] == "blocks.1.output"


def test_a_law_is_a_scale_and_a_shift_of_one_site() -> None:
    scale, shift = law("gate", ("batch", "position", "mlp_width"))
    assert (scale, shift) == (
        Native("gate_scale", ("batch", "position", "mlp_width"), optional=True),
        Native("gate_shift", ("batch", "position", "mlp_width"), neutral=0.0, optional=True),
    )
    scale, shift = law("head", ("batch", "position", "n_head", "head_width"), index="head", optional=False)
    assert (scale.shape, scale.optional, shift.optional) == (("batch", "position", "n_head"), False, True)


def test_patches_of_several_sites_are_one_intervention(model: GPT2, ids: Tensor, other: Tensor) -> None:
    values = record(model, other, ["blocks.0.mlp", "blocks.2.attention"])
    both = patch("blocks.0.mlp", values["blocks.0.mlp"]) | patch("blocks.2.attention", values["blocks.2.attention"])
    assert patched(values).keys() == both.keys()
    assert torch.equal(logits_under(model, ids, patched(values)), logits_under(model, ids, both))
