"""GPT2Config: checked on construction, read from and written to config.json."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt import CheckpointError, GPT2Config
from minigpt.config import ACTIVATIONS, OFFICIAL, read_config


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
        ({"eos_token_id": 50257}, "eos_token_id"),
    ],
)
def test_a_value_that_cannot_be_right_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GPT2Config(**fields)


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


def test_the_official_sizes_have_the_published_parameter_counts() -> None:
    def count(config: GPT2Config) -> int:
        d = config.n_embd
        return (config.vocab_size + config.n_positions) * d + config.n_layer * (12 * d * d + 13 * d) + 2 * d

    published = json.loads((Path(__file__).parents[1] / "minigpt" / "published_gpt2.json").read_text())
    for name, config in OFFICIAL.items():
        assert count(config) == published["parameter_count"].get(name, 81912576)  # distilgpt2 is not listed


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
