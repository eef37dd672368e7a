"""GPT2Config: checked on construction, read from and written to config.json."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt import GPT2, CheckpointError, GPT2Config
from minigpt.config import ACTIVATIONS, OFFICIAL, read_config
from minigpt.parity import published_figures


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": True}, "n_layer"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"n_inner": -4}, "n_inner"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"activation_function": "gelu_newish"}, "gelu_new,"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": [50256]}, "eos_token_id"),
        ({"bos_token_id": "<|endoftext|>"}, "bos_token_id"),
    ],
)
def test_a_value_that_cannot_be_right_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GPT2Config(**fields)


def test_a_whole_number_for_a_real_one_is_read_as_that_real_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"layer_norm_epsilon": 1, "initializer_range": 0}')
    config = GPT2Config.from_file(tmp_path / "config.json")
    assert config == GPT2Config(layer_norm_epsilon=1.0, initializer_range=0.0)
    assert (type(config.layer_norm_epsilon), type(config.initializer_range)) == (float, float)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "minigpt"}, "block is None"),
        ({"model_type": "minigpt", "block": 5}, "block is 5"),
        ({"model_type": "gpt2", "block": "mine:Block"}, "block is 'mine:Block'"),
    ],
)
def test_another_architecture_is_refused_by_the_field_that_says_so(values: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GPT2Config.from_dict(values)


@given(
    n_head=st.integers(1, 8),
    width=st.integers(1, 64),
    n_layer=st.integers(1, 50),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    tied=st.booleans(),
)
def test_writing_and_reading_gives_the_same_config(
    n_head: int, width: int, n_layer: int, activation: str, tied: bool
) -> None:
    config = GPT2Config(
        n_head=n_head,
        n_embd=n_head * width,
        n_layer=n_layer,
        activation_function=activation,
        tie_word_embeddings=tied,
    )
    for block in (None, "mine:Block"):
        assert GPT2Config.from_dict(json.loads(json.dumps(config.to_dict(block)))) == config


PUBLISHED_SIZES = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
    "distilgpt2": (6, 768, 12),
}
"""Layers, width and heads. Layers and widths: Radford et al. 2019, table 2; heads: n_head of OpenAI's hparams.json, and
num_heads in keras-hub's gpt2_presets.py. distilgpt2: its model card on the hub, "12 heads" and "6 layers"."""
VOCABULARY, CONTEXT = 50257, 1024
"""Radford et al. 2019, section 2.3: "The vocabulary is expanded to 50,257", "the context size from 512 to 1024"."""
DISTILGPT2_MILLIONS = 82
"""Parameters, by its model card."""


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_sizes_are_the_published_ones(name: str) -> None:
    config = OFFICIAL[name]
    assert (config.n_layer, config.n_embd, config.n_head) == PUBLISHED_SIZES[name]
    assert (config.vocab_size, config.n_positions) == (VOCABULARY, CONTEXT)
    assert (config.mlp_width, config.tie_word_embeddings) == (4 * config.n_embd, True)


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_a_model_of_an_official_size_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = GPT2(OFFICIAL[name])
    count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)  # a tied one counts once
    published = published_figures()["parameter_count"]
    assert count == published[name] if name in published else round(count / 1e6) == DISTILGPT2_MILLIONS


@pytest.mark.parametrize("text", ["{", "[]", "null", "\xff", '{"n_layer": 1e9}', '{"a":' * 3000])
def test_a_broken_file_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GPT2Config.from_file(path)


def test_a_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        GPT2Config.from_file(tmp_path / "config.json")


def test_a_config_says_of_which_block_the_model_is(tmp_path: Path) -> None:
    for block in (None, "package.module:Name", "__main__:test.<locals>.Name"):
        (tmp_path / "config.json").write_text(json.dumps(GPT2Config().to_dict(block)))
        assert read_config(tmp_path / "config.json") == (GPT2Config(), block)
