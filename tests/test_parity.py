"""The same numbers as Hugging Face's GPT-2; and the same comparison fails when anything is off."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minigpt import GPT2, Block, GPT2Config, generate, parity, scaled
from minigpt.checkpoint import ORIGIN, WEIGHTS, Source
from minigpt.config import ACTIVATIONS, OFFICIAL, CheckpointError
from minigpt.model import MLP, SITES
from minigpt.parameters import block_of, natives, parameter_name
from tests.blocks import BLOCKS, Parallel, RMSNorm, Rotary
from tests.conftest import SMALL, TINY, draw

EXACT = parity.TOLERANCES[torch.float64]
SMALL_SHAPE_LOGITS = 2e-4
"""Absolute, float32, on logits of some tens: 124M parameters, 12 blocks, sums over 768 and 3072 terms."""

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"activation_function": name} for name in ACTIVATIONS},
    "n_inner": {"n_inner": 50},
    "scores not scaled": {"scale_attn_weights": False},
    "scores scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "both score options": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_word_embeddings": False},
    "one head": {"n_head": 1},
    "one block": {"n_layer": 1},
    "large epsilon": {"layer_norm_epsilon": 0.1},
}


def twin(model: GPT2, folder: Path) -> Any:
    """Hugging Face's model with the same weights, by way of a saved checkpoint."""
    model.save_pretrained(folder)
    return parity.load_transformers(folder, next(model.parameters()).dtype)


def worst(model: GPT2, theirs: Any, ids: Tensor) -> float:
    """Largest relative difference of any quantity."""
    return max(parity.differences(parity.run(model, ids), parity.run_transformers(theirs, ids)).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_matches(small: Callable[..., GPT2], ids: Tensor, tmp_path: Path, variant: str) -> None:
    model = small(**VARIANTS[variant])
    assert worst(model, twin(model, tmp_path), ids) < EXACT


@settings(max_examples=25, deadline=None)
@given(
    n_head=st.integers(1, 5),
    width=st.integers(1, 9),
    n_layer=st.integers(1, 3),
    vocab_size=st.integers(2, 60),
    n_inner=st.none() | st.integers(1, 40),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_odd_configurations_match_clean_and_under_every_scale_and_shift_at_once(
    n_head: int,
    width: int,
    n_layer: int,
    vocab_size: int,
    n_inner: int | None,
    activation: str,
    flags: tuple[bool, bool, bool],
    seed: int,
) -> None:
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=9,
        n_embd=n_head * width,
        n_layer=n_layer,
        n_head=n_head,
        n_inner=n_inner,
        activation_function=activation,
        scale_attn_weights=flags[0],
        scale_attn_by_inverse_layer_idx=flags[1],
        tie_word_embeddings=flags[2],
    )
    model = draw(config, seed)
    ids = torch.randint(vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed))
    layer = seed % n_layer
    with TemporaryDirectory() as folder:
        theirs = twin(model, Path(folder))
        assert worst(model, theirs, ids) < EXACT
        laws = {site: drawn_law(model, site, layer, ids, seed) for site in EVERY_SITE}
        for site, values in laws.items():
            edit_by_law(theirs, site, layer, values)
        with scaled(model, {name: value for values in laws.values() for name, value in values.items()}):
            assert worst(model, theirs, ids) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_upcast_scores_match(small: Callable[..., GPT2], ids: Tensor, tmp_path: Path, dtype: torch.dtype) -> None:
    model = small(reorder_and_upcast_attn=True, dtype=dtype)
    assert worst(model, twin(model, tmp_path), ids) < parity.TOLERANCES[dtype]


@pytest.mark.parametrize("length", [2, SMALL["n_positions"]])
def test_shortest_and_longest_texts_match(model: GPT2, tmp_path: Path, length: int) -> None:
    ids = torch.arange(length)[None] * 3 % SMALL["vocab_size"]
    assert worst(model, twin(model, tmp_path), ids) < EXACT


def test_a_single_token_matches(model: GPT2, tmp_path: Path) -> None:
    ids = torch.tensor([[11]])
    theirs = parity.run_transformers(twin(model, tmp_path), ids)
    assert theirs.pop("loss").isnan()
    assert max(parity.differences(parity.run(model, ids), theirs).values()) < EXACT


def test_the_loss_is_transformers_own_as_far_as_it_keeps_it(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    theirs = twin(model, tmp_path)(ids, labels=ids).loss  # float32, whatever the model's type
    torch.testing.assert_close(parity.run(model, ids)["loss"].float(), theirs.float(), rtol=1e-6, atol=0)


def test_gradients_of_all_weights_match(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    theirs = twin(model, tmp_path)
    parity.next_token_loss(theirs(ids).logits, ids).backward()
    parity.next_token_loss(model(ids), ids).backward()
    compared = 0
    layout = GPT2._layout(model.config, Block, own=False)
    for name, (ours, _, conv1d) in ((name, layout.get(name)) for name in layout):
        if name == "lm_head.weight":
            continue
        expected = theirs.transformer.get_parameter(name).grad
        found = model.get_parameter(ours).grad
        assert found is not None
        difference = (found.T if conv1d else found) - expected
        assert difference.abs().max() < EXACT * max(1, expected.abs().max()), name
        compared += 1
    assert compared == sum(parameter.requires_grad for parameter in model.parameters())


def test_greedy_generation_matches_with_both_caches(small: Callable[..., GPT2], tmp_path: Path) -> None:
    model = small(tie_word_embeddings=False)  # tied, a random model says one token for ever
    theirs = twin(model, tmp_path)
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=19, do_sample=False)
    ours = list(generate(model, prompt[0].tolist(), 19))
    assert ours == expected[0, 5:].tolist()
    assert len(set(ours)) > 5


def test_gpt2_smalls_full_shape_matches_in_float32(tmp_path: Path) -> None:
    model = draw(GPT2Config(), dtype=torch.float32, std=0.05)
    ids = torch.randint(50257, (1, 16), generator=torch.Generator().manual_seed(0))
    theirs = parity.run_transformers(twin(model, tmp_path), ids)
    model = GPT2.from_pretrained(tmp_path)  # as it will be used: mapped from the file
    ours = parity.run(model, ids)
    assert 5 < theirs["logits"].abs().max() < 500
    assert (ours["logits"] - theirs["logits"]).abs().max() < SMALL_SHAPE_LOGITS
    assert max(parity.differences(ours, theirs).values()) < parity.TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_matches_a_live_run(dtype: torch.dtype) -> None:
    certificate = parity.certify(GPT2.from_pretrained(TINY, dtype=dtype), live=True)
    assert certificate.passed, certificate
    assert set(certificate.differences) == {"logits", "depths", "final", "loss"}


# The scaled model against a correct edit by hook.


def edit(theirs: Any, site: str, layer: int, change: Callable[[Tensor], Tensor]) -> None:
    """Put a function where a site is in Hugging Face's model. It gets heads on an axis of their own."""
    block, heads = theirs.transformer.h[layer], theirs.config.n_head

    def by_head(x: Tensor) -> Tensor:
        return change(x.unflatten(-1, (heads, -1))).flatten(-2)

    def of_three(which: int, x: Tensor) -> Tensor:
        parts = list(x.chunk(3, -1))
        parts[which] = by_head(parts[which])
        return torch.cat(parts, -1)

    def masked(_module: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        length = inputs[0].shape[1] if inputs else named["hidden_states"].shape[1]
        causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
        return inputs, {**named, "attention_mask": change(causal)}

    if site in (parts := ("query", "key", "value")):
        which = parts.index(site)
        block.attn.c_attn.register_forward_hook(lambda _module, _inputs, output: of_three(which, output))
        return
    {
        "embedding": lambda: theirs.transformer.drop.register_forward_hook(lambda _m, _given, out: change(out)),
        "output": lambda: block.register_forward_hook(lambda _m, _given, out: change(out)),
        "attention": lambda: block.attn.register_forward_hook(lambda _m, _given, out: (change(out[0]), *out[1:])),
        "mlp": lambda: block.mlp.register_forward_hook(lambda _m, _given, out: change(out)),
        "neuron": lambda: block.mlp.c_proj.register_forward_pre_hook(lambda _m, given: (change(given[0]),)),
        "head": lambda: block.attn.c_proj.register_forward_pre_hook(lambda _m, given: (by_head(given[0]),)),
        "score": lambda: block.attn.register_forward_pre_hook(masked, with_kwargs=True),
    }[site]()


def hook_in(theirs: Any, site: str, layer: int, factor: float, head: int) -> None:
    """Edit Hugging Face's model as a scale would: of one head where the site has several."""

    def change(x: Tensor) -> Tensor:
        scale = torch.ones(x.shape[2:] if x.ndim == 4 else (), dtype=torch.float64)
        (scale[head] if x.ndim == 4 else scale).fill_(factor)
        return x * scale

    edit(theirs, site, layer, change)


def value_of(model: GPT2, site: str, factor: float, head: int) -> float | Tensor:
    """The value of a scale that does the same."""
    if natives(model)[parameter_name(model, 0, site)].index is None:
        return factor
    return torch.ones(model.config.n_head, dtype=torch.float64).index_fill(0, torch.tensor(head), factor)


EVERY_SITE = ("embedding", *SITES, "score")


def drawn_law(model: GPT2, site: str, layer: int, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """A scale and a shift of every text, position and unit; of the scores a shift that knocks out one edge."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    sizes = {"batch": len(ids)} | dict.fromkeys(("position", "query", "key"), ids.shape[1])
    for name, native in natives(model).items():
        if native.site == site and block_of(name) in (layer, -1):
            shape = [sizes.get(word) or getattr(model.config, word) for word in native.shape]
            found[name] = torch.randn(shape, dtype=torch.float64, generator=generator)
    if site == "score":
        next(iter(found.values()))[0, -1, -1, 0] = -torch.inf
    return found


def edit_by_law(theirs: Any, site: str, layer: int, values: dict[str, Tensor]) -> None:
    """The same in Hugging Face's model."""
    scale, shift = (next((of for name, of in values.items() if name.endswith(how)), None) for how in ("scale", "shift"))

    def change(x: Tensor) -> Tensor:
        factor = 1.0 if scale is None else scale[..., None] if x.ndim == scale.ndim + 1 else scale
        return x * factor + (0.0 if shift is None else shift)

    edit(theirs, site, layer, change)


@pytest.mark.parametrize("site", EVERY_SITE)
@pytest.mark.parametrize("layer", [0, 3])
def test_scales_and_shifts_match_a_correct_edit(
    model: GPT2, ids: Tensor, tmp_path: Path, site: str, layer: int
) -> None:
    values, theirs = drawn_law(model, site, layer, ids, seed=layer), twin(model, tmp_path)
    assert len(values) == (1 if site == "score" else 2)
    edit_by_law(theirs, site, layer, values)
    for name in values:
        with scaled(model, {other: of for other, of in values.items() if other != name}):
            assert worst(model, theirs, ids) > 1e-3, f"a run without {name} passes for one with it"
    with scaled(model, values):
        assert worst(model, theirs, ids) < EXACT


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_scaled_runs_match_a_correct_hook(model: GPT2, ids: Tensor, tmp_path: Path, site: str, layer: int) -> None:
    theirs = twin(model, tmp_path)
    clean = parity.run_transformers(theirs, ids)
    hook_in(theirs, site, layer, 0.4, head=1)
    expected = parity.run_transformers(theirs, ids)
    with scaled(model, {parameter_name(model, layer, site): value_of(model, site, 0.4, head=1)}):
        found = parity.run(model, ids)
    assert max(parity.differences(found, expected).values()) < EXACT
    # the captures see the edited layer, and the raw last block
    changed = (expected["depths"] - clean["depths"]).flatten(1).norm(dim=1)
    assert (changed[: layer + 1] == 0).all()
    assert (changed[layer + 1 :] > 0).all()
    assert not torch.allclose(expected["depths"][-1], expected["final"])


def test_a_hook_on_the_wrong_layer_does_not_match(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    theirs = twin(model, tmp_path)
    hook_in(theirs, "output", 1, 0.4, head=0)
    with scaled(model, {"blocks.2.output_scale": 0.4}):
        assert worst(model, theirs, ids) > 1e-3


# What the classic notebook's hooks do on today's transformers: the README says so, and here it stays true.


def test_a_hook_that_unpacks_a_tuple_raises_in_the_next_block(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    theirs = twin(model, tmp_path)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden, *rest = output
        return (hidden.clone() * 0.5, *rest)

    theirs.transformer.h[2].register_forward_hook(hook)
    with pytest.raises(TypeError):
        theirs(ids)


def test_an_in_place_hook_scales_the_first_row_of_the_batch_only(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    theirs = twin(model, tmp_path)
    clean = parity.run_transformers(theirs, ids)["depths"]

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        output[0].mul_(0.5)

    theirs.transformer.h[2].register_forward_hook(hook)
    changed = parity.run_transformers(theirs, ids)["depths"]
    assert torch.equal(changed[3, 0], 0.5 * clean[3, 0])
    assert torch.equal(changed[3, 1], clean[3, 1])


def test_hidden_states_miss_an_edit_made_after_a_clean_run(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    theirs = twin(model, tmp_path)
    clean = theirs(ids, output_hidden_states=True).hidden_states
    theirs.transformer.h[2].register_forward_hook(lambda _module, _inputs, output: output * 0.5)
    changed = theirs(ids, output_hidden_states=True).hidden_states
    assert (changed[3] - clean[3]).norm() == 0, "the edited layer reports no difference"
    assert (changed[4] - clean[4]).norm() > 0, "it appears one layer late"


def test_the_last_hidden_state_is_after_the_final_norm(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    theirs = twin(model, tmp_path)
    last = theirs(ids, output_hidden_states=True).hidden_states[-1]
    ours = parity.run(model, ids)
    torch.testing.assert_close(last, ours["final"], rtol=1e-11, atol=1e-11)
    assert (last - ours["depths"][-1]).abs().max() > 0.1


# Sabotage: each must fail the comparison that the model passes.


def _replace_activation(model: GPT2) -> None:
    for block in model.blocks:
        block.mlp.activation = ACTIVATIONS["gelu"]


def _untranspose(model: GPT2) -> None:
    weight = model.blocks[1].attention.projection.weight
    weight.data = weight.data.T.clone()


def _shift_positions(model: GPT2) -> None:
    model.position_embedding.weight.data = model.position_embedding.weight.data.roll(1, 0)


def _swap_norms(model: GPT2) -> None:
    first, second = model.blocks[:2]
    first.mlp_norm, second.mlp_norm = second.mlp_norm, first.mlp_norm


def _sharpen_epsilon(model: GPT2) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


SABOTAGE: dict[str, Callable[[GPT2], object]] = {
    "erf GELU for tanh": _replace_activation,
    "dropped projection bias": lambda model: model.blocks[2].attention.projection.bias.data.zero_(),
    "untransposed Conv1D": _untranspose,
    "epsilon 1e-6 for 1e-5": _sharpen_epsilon,
    "one position off": _shift_positions,
    "norm of the wrong block": _swap_norms,
}


@pytest.mark.parametrize("sabotage", SABOTAGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sabotage_is_noticed(
    small: Callable[..., GPT2], ids: Tensor, tmp_path: Path, sabotage: str, dtype: torch.dtype
) -> None:
    # weights of GPT-2's own size, where an epsilon weighs as it does in real streams
    model = draw(GPT2Config(**SMALL), dtype=dtype, std=0.05)
    theirs = twin(model, tmp_path)
    assert worst(model, theirs, ids) < parity.TOLERANCES[dtype]
    SABOTAGE[sabotage](model)
    assert worst(model, theirs, ids) > parity.TOLERANCES[dtype]


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_sabotage_of_tiny_is_not_certified(sabotage: str) -> None:
    model = GPT2.from_pretrained(TINY)
    SABOTAGE[sabotage](model)
    found = parity.certify(model)
    assert not found.passed
    assert max(found.differences.values()) > found.tolerance, "the numbers notice, not only the digest"


# Certificates.


def test_a_stored_reference_is_the_first_choice(tiny: GPT2) -> None:
    certificate = parity.certify(tiny)
    assert certificate.passed
    assert "reference.safetensors" in certificate.against
    assert max(certificate.differences.values()) < certificate.tolerance


def test_one_weight_changed_by_a_hundredth_is_not_certified(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / WEIGHTS)
    weight = tensors["transformer.h.5.mlp.c_fc.weight"]
    weight.view(-1)[weight.abs().argmax()] *= 1.01
    save_file(tensors, tmp_path / "copy" / WEIGHTS, {"format": "pt"})
    certificate = parity.certify(GPT2.from_pretrained(tmp_path / "copy"))
    assert certificate.verdict == "failed"
    assert "not those that the reference was computed with" in certificate.sentence()


def test_weights_edited_in_memory_are_not_certified() -> None:
    model = GPT2.from_pretrained(TINY)
    with torch.no_grad():
        model.blocks[11].mlp.projection.weight[0, 0] += 1e-3
    assert not parity.certify(model).passed


def test_a_reference_of_another_model_fails_with_a_sentence(model: GPT2, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    shutil.copy(TINY / parity.REFERENCE, tmp_path)
    certificate = parity.certify(GPT2.from_pretrained(tmp_path))
    assert certificate.verdict == "failed"
    assert "belongs to another model" in certificate.sentence()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_certified_in_float32_and_as_their_rounding(dtype: torch.dtype) -> None:
    model = GPT2.from_pretrained(TINY, dtype=dtype)
    certificate = parity.certify(model)
    assert certificate.passed
    assert certificate.against.endswith("in float32")
    with torch.no_grad():
        model.blocks[3].attention.projection.bias.zero_()
    assert "rounded to" in parity.certify(model).sentence()


def test_a_half_model_of_no_file_is_certified_live(small: Callable[..., GPT2]) -> None:
    assert parity.certify(small(dtype=torch.bfloat16)).passed


def test_a_difference_that_is_not_finite_is_null_in_json(model: GPT2) -> None:
    certificate = parity.Certificate("failed", "nothing", {"logits": float("inf"), "depths": 0.5})
    assert json.loads(json.dumps(certificate.to_dict(), allow_nan=False))["differences"] == {
        "logits": None,
        "depths": 0.5,
    }


def test_without_reference_and_figures_a_live_run_decides(model: GPT2) -> None:
    certificate = parity.certify(model)
    assert certificate.passed
    assert "live run of transformers" in certificate.against


def test_without_anything_to_compare_with_nothing_is_certified(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    assert parity.certify(model).verdict == "not certified"
    with pytest.raises(ValueError, match=r"minigpt\[parity\]"):
        parity.certify(model, live=True)


def test_a_scaled_model_is_not_asked(model: GPT2) -> None:
    with scaled(model, {"blocks.0.output_scale": 2.0}), pytest.raises(ValueError, match="clean model"):
        parity.certify(model)


@pytest.fixture(scope="module")
def official_shape(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    """A model that claims to be openai-community/gpt2, with random weights."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(bos_token_id=50256, eos_token_id=50256))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    model.source = Source("gpt2", "openai-community/gpt2", "0" * 40, (folder / WEIGHTS,))
    return model


def figures_of(model: GPT2) -> dict[str, Any]:
    """The published figures, with the values this model gives in the place of the official ones."""
    figures = json.loads(json.dumps(parity.published_figures()))
    with torch.no_grad():
        for entry in figures["logits"]:
            logits = model(torch.tensor([entry["ids"]]))[0].double()
            entry["logits"] = logits[entry["position"], entry["vocab"]].tolist()
            if "mean_over_all_positions_and_vocab" in entry:
                entry["mean_over_all_positions_and_vocab"] = float(logits.mean())
        for entry in figures["final"]:
            final = model.final_norm(model.residuals(torch.tensor([entry["ids"]]))[-1])
            entry["first_five"] = final[0, entry["position"], :5].tolist()
        for entry in figures["argmax"]:
            entry["next"] = model(torch.tensor([entry["ids"]]))[0].argmax(-1).tolist()
        for entry in figures["greedy"]:
            if "continuation_ids" in entry:
                entry["continuation_ids"] = list(generate(model, entry["ids"], len(entry["continuation_ids"])))
    return figures


def test_random_weights_miss_the_published_figures(official_shape: GPT2) -> None:
    certificate = parity.certify(official_shape)
    assert certificate.against == "published figures of gpt2"
    assert certificate.verdict == "failed"
    assert certificate.differences["logits"] > 1


def test_published_figures_are_compared_to_their_tolerance(official_shape: GPT2) -> None:
    figures = figures_of(official_shape)
    assert parity.published_differences(official_shape, figures)[1] == []
    figures["logits"][0]["logits"][3] += 0.002
    figures["final"][0]["first_five"][0] += 0.02
    figures["argmax"][0]["next"][0] += 1
    figures["greedy"][0]["continuation_ids"][-1] += 1
    figures["logits"][0]["mean_over_all_positions_and_vocab"] += 0.002
    assert len(parity.published_differences(official_shape, figures)[1]) == 5


def test_published_figures_are_of_the_right_shape_and_plausible() -> None:
    figures = parity.published_figures()
    assert figures["parameter_count"]["gpt2"] == 124439808
    for entry in figures["logits"]:
        assert len(entry["vocab"]) == len(entry["logits"])
        assert all(-200 < value < 0 for value in entry["logits"])
        assert 0 < entry["tolerance"] <= 0.01
    for kind in ("logits", "argmax", "final", "greedy", "training_loss", "tokenizer", "residual_std", "perplexity"):
        entries = figures[kind] if isinstance(figures[kind], list) else [figures[kind]]
        assert all(entry["source"] for entry in entries)


OFF: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads": ("gpt2", {"n_head": 6}, "config.json sets n_head to 6; gpt2 has 12"),
    "heads of the largest": ("gpt2-xl", {"n_head": 20}, "sets n_head to 20; gpt2-xl has 25"),
    "activation": ("gpt2", {"activation_function": "gelu"}, "sets activation_function to 'gelu'; gpt2 has 'gelu_new'"),
    "epsilon": ("distilgpt2", {"layer_norm_epsilon": 1e-6}, "sets layer_norm_epsilon to 1e-06; distilgpt2 has 1e-05"),
    "scores": ("gpt2-medium", {"scale_attn_weights": False}, "sets scale_attn_weights to False; gpt2-medium has True"),
    "scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx to True; gpt2 has False"),
    "unembedding": ("gpt2-large", {"tie_word_embeddings": False}, "tie_word_embeddings to False; gpt2-large has True"),
    "layers": ("gpt2", {"n_layer": 11}, "sets n_layer to 11; gpt2 has 12"),
    "hidden layer": ("gpt2", {"n_inner": 3000}, "sets n_inner to 3000; gpt2 has 3072"),
}


@pytest.mark.parametrize("case", OFF)
def test_an_official_name_with_another_config_is_told_which_field_is_wrong(case: str) -> None:
    name, fields, said = OFF[case]
    (sentence,) = parity._unlike(dataclasses.replace(OFFICIAL[name], **fields), name)
    assert said in sentence


@pytest.mark.parametrize("name", OFFICIAL)
def test_fields_that_change_no_number_and_other_words_for_the_same_are_as_official(name: str) -> None:
    fields: dict[str, Any] = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "reorder_and_upcast_attn": True,
        "n_inner": 4 * OFFICIAL[name].n_embd,
        "activation_function": "gelu_pytorch_tanh",
    }
    assert parity._unlike(dataclasses.replace(OFFICIAL[name], **fields), name) == []


@pytest.mark.parametrize("live", [False, True])
def test_a_download_of_an_official_name_with_another_config_is_not_certified(
    small: Callable[..., GPT2], tmp_path: Path, live: bool
) -> None:
    """Though a live run reads the same config and agrees; the folder says whose weights it holds."""
    small(dtype=torch.float32).save_pretrained(tmp_path)
    assert parity.certify(GPT2.from_pretrained(tmp_path), live=True).passed
    origin = {"repository": "openai-community/gpt2-xl", "commit": "0" * 40}
    (tmp_path / ORIGIN).write_text(json.dumps(origin))
    certificate = parity.certify(GPT2.from_pretrained(tmp_path), live=live)
    assert certificate.verdict == "failed"
    assert "sets n_head to 3; gpt2-xl has 25" in certificate.sentence()
    assert ("Also certified against a live run" in certificate.sentence()) == live


@pytest.mark.parametrize("fields", [{"vocab_size": 1}, {"n_embd": 1, "n_head": 1}, {"n_embd": 3, "n_inner": 1}])
def test_the_smallest_models_are_certified_though_some_of_their_numbers_are_all_0(
    small: Callable[..., GPT2], tmp_path: Path, fields: dict[str, int]
) -> None:
    model = small(**fields)
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.zeros_(norm.bias)
    model.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path, dtype=torch.float64)
    certificate = parity.certify(loaded)
    assert certificate.passed, certificate.sentence()
    assert certificate.holds_for(loaded)


def test_a_difference_from_what_is_all_0_is_seen() -> None:
    zero = {"loss": torch.zeros(3)}
    assert parity.differences(zero, zero) == {"loss": 0.0}
    assert parity.differences({"loss": torch.tensor([0.0, 0.25, 0.0])}, zero) == {"loss": 0.25}


# What a live run can see, and what it cannot.


def test_a_live_run_says_once_that_both_read_the_same_config(model: GPT2, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for live in (False, True):
        sentence = parity.certify(GPT2.from_pretrained(tmp_path), live).sentence()
        assert sentence.count("which read the same config.json as minigpt") == 1
    assert "config.json" not in parity.certify(model).sentence(), "a model of no file"


@pytest.mark.parametrize("fields", [{"n_head": 6}, {"activation_function": "gelu"}, {"layer_norm_epsilon": 0.1}])
def test_a_wrong_config_that_a_live_run_shares_fails_the_stored_reference(
    small: Callable[..., GPT2], tmp_path: Path, fields: dict[str, object]
) -> None:
    folder = referenced(tmp_path, small(dtype=torch.float32))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    certificate = parity.certify(GPT2.from_pretrained(folder), live=True)
    assert certificate.verdict == "failed"
    assert certificate.against.startswith(parity.REFERENCE)
    assert certificate.also.startswith("certified against a live run of transformers")
    (folder / parity.REFERENCE).unlink()
    assert parity.certify(GPT2.from_pretrained(folder), live=True).passed, "nothing else tells"


def test_a_live_run_that_fails_is_not_outweighed_by_a_reference(tiny: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = parity.Certificate("failed", "a live run")
    monkeypatch.setattr(parity, "_against_transformers", lambda model, required: failed)
    certificate = parity.certify(tiny, live=True)
    assert (certificate.verdict, certificate.against) == ("failed", "a live run")
    assert certificate.also.startswith("certified against reference.safetensors")


HARMLESS: dict[str, dict[str, object]] = {
    "a whole number": {"initializer_range": 1, "layer_norm_epsilon": 1},
    "words": {"use_cache": "no", "summary_type": 5, "dtype": "float99", "torch_dtype": []},
    "other types": {"id2label": 3, "rope_parameters": 1, "attribute_map": {}, "architectures": 7},
    "what transformers would act upon": {"transformers_weights": "other.safetensors", "auto_map": {"AutoModel": "x.y"}},
    "properties": {"name_or_path": 5, "use_return_dict": 1, "hidden_size": "wide", "num_labels": -1},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_fields_that_change_no_number_do_not_disturb_a_live_run(
    small: Callable[..., GPT2], tmp_path: Path, case: str
) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **HARMLESS[case]}))
    (tmp_path / "generation_config.json").write_text("[1")
    (tmp_path / "adapter_config.json").write_text("[1")
    certificate = parity.certify(GPT2.from_pretrained(tmp_path, dtype=torch.float64), live=True)
    assert certificate.passed, certificate.sentence()
    parity.save_reference(tmp_path, torch.arange(9)[None])
    assert parity.certify(GPT2.from_pretrained(tmp_path)).passed


def test_transformers_reads_the_weights_itself_also_from_shards(model: GPT2, tmp_path: Path) -> None:
    theirs = twin(model, tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = parity.load_transformers(tmp_path / "shards", torch.float64)
    for name, weight in theirs.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight)
    assert torch.equal(loaded.transformer.wte.weight, model.token_embedding.weight)


@pytest.mark.parametrize("kind", [TypeError, RuntimeError, AssertionError])
def test_whatever_transformers_raises_is_a_sentence(
    small: Callable[..., GPT2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    transformers = pytest.importorskip("transformers")

    def fail(*_: object, **__: object) -> None:
        raise kind("first line\nsecond")

    small().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", fail)
    certificate = parity.certify(GPT2.from_pretrained(tmp_path), live=True)
    assert certificate.verdict == "not certified"
    assert f"cannot run this model ({kind.__name__}: first line)." in certificate.sentence()
    with pytest.raises(CheckpointError, match="cannot run this model"):
        parity.save_reference(tmp_path, torch.arange(9)[None])


# A subclass of the whole model.


class Doubled(GPT2):
    """Another model, though its block, its shape and its weights are GPT-2's."""

    def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
        return 2 * super().forward(ids, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_of_gpt2_is_not_certified_as_gpt2(tiny: GPT2, dtype: torch.dtype) -> None:
    model = Doubled.from_pretrained(TINY, dtype=dtype)
    certificate = parity.certify(model)
    assert certificate.verdict == "not comparable"
    assert "Put what is different into a subclass of minigpt.Block" in certificate.sentence()
    assert certificate.holds_for(model)
    assert not parity.certify(tiny).holds_for(model), "the certificate of a GPT2 is of no subclass"
    with pytest.raises(ValueError, match=r"no counterpart of .*:Doubled"):
        parity.certify(model, live=True)
    with torch.no_grad():
        model.blocks[0].mlp.expand.bias[0] += 1
    assert parity.certify(model).verdict == "failed"


# The certificate is bound to the weights in memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_that_are_edited_after_loading_are_not_certified(dtype: torch.dtype) -> None:
    """Also an edit that no compared number shows: a position that the reference does not reach."""
    model = GPT2.from_pretrained(TINY, dtype=dtype)
    assert parity.certify(model).passed
    with torch.no_grad():
        model.position_embedding.weight[200, 7] += 1
    certificate = parity.certify(model)
    assert certificate.verdict == "failed"
    assert f"The weights in memory are not those in {TINY}" in certificate.sentence()


def test_an_edit_makes_a_certificate_void_and_taking_it_back_restores_it(tiny: GPT2) -> None:
    certificate, weight = parity.certify(tiny), tiny.blocks[3].mlp.expand.weight
    assert certificate.holds_for(tiny)
    before = weight[5, 5].clone()
    try:
        with torch.no_grad():
            weight[5, 5] = torch.nextafter(before, before + 1)
        assert not certificate.holds_for(tiny)
    finally:
        with torch.no_grad():
            weight[5, 5] = before
    assert certificate.holds_for(tiny)


def test_a_certificate_of_one_model_does_not_hold_for_another(tiny: GPT2, model: GPT2) -> None:
    assert not parity.certify(tiny).holds_for(model)
    failed = parity.Certificate("failed", "anything", weights=parity.fingerprint(model))
    assert not failed.holds_for(model)


def test_the_fingerprint_sees_the_shape_and_every_weight_but_no_scale(small: Callable[..., GPT2]) -> None:
    expected = parity.fingerprint(small())
    assert parity.fingerprint(small(layer_norm_epsilon=1e-6)) != expected
    for name, _ in small().named_parameters():
        changed = small()
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[0] += 1e-9
        assert (parity.fingerprint(changed) == expected) == (name in natives(changed)), name


# A library that was edited, and blocks of one's own.


def test_an_edited_library_fails_and_is_told_where_an_edit_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "forward", Parallel.forward)
    certificate = parity.certify(GPT2.from_pretrained(TINY))
    assert certificate.verdict == "failed"
    assert not certificate.may_run
    assert "put it into a subclass of minigpt.Block" in certificate.sentence()


def test_wrong_weights_are_not_taken_for_an_edit_of_the_library() -> None:
    model = GPT2.from_pretrained(TINY)
    with torch.no_grad():
        model.blocks[11].mlp.projection.weight += 1e-2
    assert "subclass" not in parity.certify(model).sentence()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_without_a_reference_of_its_own_is_not_comparable(dtype: torch.dtype) -> None:
    """Beside the weights lies a reference that transformers computed: it says nothing of this architecture."""
    model = GPT2.from_pretrained(TINY, dtype=dtype, block=Parallel)
    certificate = parity.certify(model)
    assert certificate.verdict == "not comparable"
    assert (certificate.passed, certificate.may_run, certificate.holds_for(model)) == (False, True, True)
    assert "no counterpart in transformers" in certificate.sentence()
    assert "`minigpt reference DIRECTORY --block tests.blocks:Parallel`" in certificate.sentence()
    with torch.no_grad():
        model.blocks[3].mlp.expand.bias[5] += 1
    assert not certificate.holds_for(model)
    assert parity.certify(model).verdict == "failed", "the weights are not those of the file any more"


@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_of_another_block_that_was_never_saved_is_not_comparable(
    small: Callable[..., GPT2], block: type[Block]
) -> None:
    assert parity.certify(small(block=block)).verdict == "not comparable"


def test_transformers_is_not_asked_about_another_block(small: Callable[..., GPT2]) -> None:
    with pytest.raises(ValueError, match=r"no counterpart of tests\.blocks:Parallel"):
        parity.certify(small(block=Parallel), live=True)


def referenced(folder: Path, model: GPT2, block: type[Block] = Block) -> Path:
    """A folder with a saved model and a reference of its own."""
    model.save_pretrained(folder)
    parity.save_reference(folder, parity.reference_ids(model.config), block)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_reference_of_its_own_certifies_a_block(
    small: Callable[..., GPT2], tmp_path: Path, block: type[Block], dtype: torch.dtype
) -> None:
    folder = referenced(tmp_path, small(block=block, dtype=torch.float32), block)
    model = GPT2.from_pretrained(folder, dtype=dtype, block=block)
    certificate = parity.certify(model)
    assert certificate.passed, certificate
    assert certificate.holds_for(model)
    name = f"of its own: minigpt {certificate.versions['minigpt']}, block tests.blocks:{block.__name__}"
    assert name in certificate.sentence()


def _serial(block: type[Block]) -> None:
    block.forward = Block.forward  # type: ignore[method-assign]


def _without_bias(block: type[Block]) -> None:
    honest = block.forward

    def forward(self: Block, x: Tensor, cache: Any = None) -> Tensor:
        self.mlp.projection.bias = nn.Parameter(torch.zeros_like(self.mlp.projection.bias))
        return honest(self, x, cache)

    block.forward = forward  # type: ignore[method-assign]


def _erf(block: type[Block]) -> None:
    class Erf(MLP):
        def __init__(self, config: GPT2Config) -> None:
            super().__init__(config)
            self.activation = ACTIVATIONS["gelu"]

    block.mlp_class = Erf


@pytest.mark.parametrize("sabotage", [_serial, _without_bias, _erf])
def test_a_block_that_was_edited_since_fails_its_reference(
    small: Callable[..., GPT2], tmp_path: Path, sabotage: Callable[[type[Block]], None]
) -> None:
    kind = type("Parallel", (Parallel,), {"__module__": "mine", "__qualname__": "Parallel"})
    folder = referenced(tmp_path, small(block=kind, dtype=torch.float32), kind)
    assert parity.certify(GPT2.from_pretrained(folder, block=kind)).passed
    sabotage(kind)
    certificate = parity.certify(GPT2.from_pretrained(folder, block=kind))
    assert certificate.verdict == "failed"
    assert certificate.differences["logits"] > 2 * certificate.tolerance


def test_a_reference_applies_to_the_block_that_it_names_alone(tiny: GPT2, tmp_path: Path) -> None:
    """Nor does it help to write another name into it: the numbers are of one block."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    path = tmp_path / parity.REFERENCE
    parity.save_reference(tmp_path, parity.reference_ids(tiny.config), Parallel)
    assert parity.certify(GPT2.from_pretrained(tmp_path, block=Parallel)).passed
    plain = GPT2.from_pretrained(tmp_path)
    assert "live run" in parity.certify(plain).against
    about = {**_metadata(path), "transformers": "5.0"}
    del about["block"]
    save_file(load_file(path), path, about)
    assert parity.certify(plain).verdict == "failed"
    assert parity.certify(GPT2.from_pretrained(tmp_path, block=Parallel)).verdict == "not comparable"
    shutil.copy(TINY / parity.REFERENCE, path)
    save_file(load_file(path), path, {**_metadata(path), "minigpt": "0.1", "block": "tests.blocks:Parallel"})
    assert parity.certify(GPT2.from_pretrained(tmp_path, block=Parallel)).verdict == "failed"


def _metadata(path: Path) -> dict[str, str]:
    with parity.open_tensors(path) as stored:
        return stored.metadata()


@pytest.mark.parametrize("content", [b"", b"garbage" * 9])
@pytest.mark.parametrize("block", [Block, Parallel])
def test_a_broken_reference_fails_whatever_the_block(tmp_path: Path, content: bytes, block: type[Block]) -> None:
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / parity.REFERENCE).write_bytes(content)
    certificate = parity.certify(GPT2.from_pretrained(tmp_path, block=block))
    assert (certificate.verdict, "is broken" in certificate.sentence()) == ("failed", True)


@pytest.mark.parametrize("n_positions", [1, 2])
def test_a_reference_of_the_shortest_texts_certifies(
    small: Callable[..., GPT2], tmp_path: Path, n_positions: int
) -> None:
    for block in (Block, Rotary):
        folder = referenced(tmp_path / block.__name__, small(block=block, n_positions=n_positions), block)
        certificate = parity.certify(GPT2.from_pretrained(folder, dtype=torch.float64, block=block))
        assert certificate.passed, certificate
        assert ("loss" in certificate.differences) == (n_positions > 1)


def test_numbers_that_are_not_finite_are_no_reference(small: Callable[..., GPT2], tmp_path: Path) -> None:
    class Overflowing(Parallel):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            return super().forward(x, cache) * torch.inf

    model = small(block=Overflowing)
    with pytest.raises(ValueError, match="not finite"):
        referenced(tmp_path, model, Overflowing)
    assert not (tmp_path / parity.REFERENCE).exists()


@pytest.mark.parametrize("persistent", [True, False])
def test_the_fingerprint_sees_what_is_kept_beside_the_weights(small: Callable[..., GPT2], persistent: bool) -> None:
    found = list[str]()
    for value in (1.0, 1.0, 2.0):
        model = small()
        model.blocks[1].register_buffer("table", torch.full((3,), value), persistent=persistent)
        found.append(parity.fingerprint(model))
    assert found[0] == found[1] != found[2]


def test_the_fingerprint_sees_the_block(small: Callable[..., GPT2]) -> None:
    plain, parallel = small(), small(block=Parallel)
    assert parity.digest(plain) == parity.digest(parallel)
    assert parity.fingerprint(plain) != parity.fingerprint(parallel)
    assert not parity.certify(parallel).holds_for(plain)


def test_without_its_checkpoint_a_block_is_not_certified(small: Callable[..., GPT2], tmp_path: Path) -> None:
    folder = referenced(tmp_path / "saved", small(block=RMSNorm), RMSNorm)
    model = GPT2.from_pretrained(folder, block=RMSNorm)
    shutil.rmtree(folder)
    assert parity.certify(model).verdict == "not certified"
    with pytest.raises(CheckpointError):
        parity.save_reference(tmp_path, parity.reference_ids(model.config), RMSNorm)
