"""Hostile and broken checkpoints, as code that builds them. Each must end in a CheckpointError, quickly and cheaply.

Every function below gets a whole, valid checkpoint in a folder and spoils it; its docstring says what it tries.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minigpt import GPT2, GPT2Config
from minigpt.checkpoint import INDEX, WEIGHTS

SHAPE = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_head=2, n_layer=2)
Spoil = Callable[[Path], object]
CASES: dict[str, tuple[Spoil, str]] = {}
"""Name -> what spoils a checkpoint, and a part of the sentence that must come."""


def build(folder: Path) -> None:
    """A whole checkpoint."""
    torch.manual_seed(0)
    GPT2(SHAPE).save_pretrained(folder)


def case(sentence: str) -> Callable[[Spoil], Spoil]:
    """Register a hostile checkpoint."""

    def register(spoil: Spoil) -> Spoil:
        CASES[spoil.__name__] = (spoil, sentence)
        return spoil

    return register


def change_config(folder: Path, **values: object) -> None:
    """Give fields of config.json other values."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def name_a_block(folder: Path, name: str) -> None:
    """Let a checkpoint claim that it was saved with a block of that name."""
    change_config(folder, model_type="minigpt", block=name)


def _raw_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)


def _parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the body of the weights."""
    whole = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def _write(folder: Path, header: object, body: bytes, length: int | None = None) -> None:
    """Weights with this header: JSON, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)


def _entry(folder: Path, field: str, value: object, name: str = "transformer.ln_f.bias") -> None:
    header, body = _parts(folder)
    header[name][field] = value
    _write(folder, header, body)


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _shards(folder: Path, weight_map: object) -> None:
    (folder / WEIGHTS).replace(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# The header of the weights.


@case("its header would have 9223372036854775808 bytes")
def header_length_of_2_to_the_63(folder: Path) -> None:
    _write(folder, *_parts(folder), length=2**63)


@case("its header would have 18446744073709551615 bytes")
def header_length_of_minus_one(folder: Path) -> None:
    _write(folder, *_parts(folder), length=2**64 - 1)


@case("its header would have 1073741824 bytes")
def header_length_of_a_gigabyte_in_a_file_that_claims_to_have_it(folder: Path) -> None:
    _write(folder, *_parts(folder), length=2**30)
    os.truncate(folder / WEIGHTS, 2**30 + 8)


@case("is not a whole safetensors file")
def header_length_beyond_the_file(folder: Path) -> None:
    _write(folder, *_parts(folder), length=2**22)


@case("is not a whole safetensors file")
def header_of_no_bytes(folder: Path) -> None:
    _write(folder, b"", b"")


@case("is not a whole safetensors file")
def header_shorter_than_its_length(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x10\0\0")


@case("the name 't0' is there twice")
def header_with_a_name_twice_among_sixty_thousand(folder: Path) -> None:
    names = [f"t{number % 60_000}" for number in range(60_001)]
    _write(folder, ("{" + ",".join(f'"{name}":{{}}' for name in names) + "}").encode(), b"")


@case("nested too deeply")
def header_nested_a_thousand_deep(folder: Path) -> None:
    _write(folder, b'{"a":' * 1000 + b"0" + b"}" * 1000, b"")


@case("nested too deeply")
def header_nested_a_million_deep(folder: Path) -> None:
    _write(folder, b"[" * 1_000_000, b"")


@case("is not a whole safetensors file")
def header_that_is_a_list(folder: Path) -> None:
    _write(folder, b"[1, 2]", b"")


@case("is not a whole safetensors file")
def header_that_is_not_utf8(folder: Path) -> None:
    _write(folder, b'{"\xff\xfe": {}}', b"")


@case("the name 'transformer.ln_f.bias' is there twice")
def header_with_a_name_twice(folder: Path) -> None:
    header, body = _parts(folder)
    again = json.dumps(header)[:-1] + ', "transformer.ln_f.bias": ' + json.dumps(header["transformer.ln_f.bias"]) + "}"
    _write(folder, again.encode(), body)


def _many(folder: Path, count: int) -> None:
    nothing = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    _write(folder, ("{" + ",".join(f'"t{number}":{nothing}' for number in range(count)) + "}").encode(), b"")


@case("and 7980 more do not fit")
def header_of_eight_thousand_tensors(folder: Path) -> None:
    _many(folder, 8_000)


@case("its header would have 5788891 bytes")
def header_of_a_hundred_thousand_tensors(folder: Path) -> None:
    _many(folder, 100_000)


@case("is not a whole safetensors file")
def metadata_that_is_no_dictionary(folder: Path) -> None:
    header, body = _parts(folder)
    _write(folder, {**header, "__metadata__": [1]}, body)


# Offsets, shapes, types.


@case("is not a whole safetensors file")
def offsets_that_overlap(folder: Path) -> None:
    _entry(folder, "data_offsets", [0, 32])


@case("is not a whole safetensors file")
def offsets_out_of_the_file(folder: Path) -> None:
    _entry(folder, "data_offsets", [2**40, 2**40 + 32])


@case("is not a whole safetensors file")
def offsets_that_run_backwards(folder: Path) -> None:
    _entry(folder, "data_offsets", [32, 0])


@case("is not a whole safetensors file")
def offsets_below_zero(folder: Path) -> None:
    _entry(folder, "data_offsets", [-32, 0])


@case("is not a whole safetensors file")
def offsets_that_are_fractions(folder: Path) -> None:
    _entry(folder, "data_offsets", [0.5, 32.5])


@case("is not a whole safetensors file")
def shape_whose_product_overflows(folder: Path) -> None:
    _entry(folder, "shape", [2**32, 2**32, 2**32])


@case("is not a whole safetensors file")
def shape_whose_product_overflows_to_the_right_size(folder: Path) -> None:
    _entry(folder, "shape", [2**61 + 1, 8])


@case("is not a whole safetensors file")
def shape_below_zero(folder: Path) -> None:
    _entry(folder, "shape", [-8])


@case("wrong shape: ln_f.bias is [0]")
def shape_of_size_zero(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.update({"transformer.ln_f.bias": torch.ones(0)}))


@case("wrong shape: ln_f.bias is [1, 1, 1")
def shape_of_a_hundred_axes(folder: Path) -> None:
    _entry(folder, "shape", [1] * 99 + [8])


@case("is not a whole safetensors file")
def type_that_needs_more_bytes_than_there_are(folder: Path) -> None:
    _entry(folder, "dtype", "F64")


@case("wrong type: ln_f.bias is I32")
def type_of_integers(folder: Path) -> None:
    _entry(folder, "dtype", "I32")


@case("is not a whole safetensors file")
def type_that_does_not_exist(folder: Path) -> None:
    _entry(folder, "dtype", "PICKLE")


# Names and values.


@case(r"unexpected: '\x1b[2J\x1b]0;owned\x07'")
def name_that_steers_the_terminal(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.update({"\x1b[2J\x1b]0;owned\x07": torch.ones(1)}))


@case("unexpected: 'xxxxx")
def name_of_half_a_megabyte(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.update({"x" * 2**19: torch.ones(1)}))


@case("ln_f.bias is there twice")
def name_with_and_without_the_prefix(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.update({"ln_f.bias": tensors["transformer.ln_f.bias"].clone()}))


@case("unexpected: h.999999999.ln_1.weight")
def name_of_a_block_far_away(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.update({"h.999999999.ln_1.weight": torch.ones(8)}))


@case("not finite: wte.weight")
def value_that_is_not_a_number(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors["transformer.wte.weight"].view(-1)[7].fill_(torch.nan))


@case("not finite: wpe.weight")
def values_infinite_that_add_up_to_no_number(folder: Path) -> None:
    values = torch.tensor([torch.inf, -torch.inf])
    _tensors(folder, lambda tensors: tensors["transformer.wpe.weight"].view(-1)[:2].copy_(values))


@case("not finite: ln_f.bias")
def value_that_only_float64_can_hold(folder: Path) -> None:
    big = torch.full((8,), 1e300, dtype=torch.float64)
    _tensors(folder, lambda tensors: tensors.update({"transformer.ln_f.bias": big}))


# Files and links.


@case("names shards that are missing")
def shard_that_is_missing(folder: Path) -> None:
    _shards(folder, {"wte.weight": "model-00002-of-00002.safetensors"})


@case("names shards outside its folder")
def shard_outside_the_folder(folder: Path) -> None:
    _shards(folder, {"wte.weight": "../../../etc/passwd"})


@case("names shards outside its folder")
def shard_by_an_absolute_path(folder: Path) -> None:
    _shards(folder, {"wte.weight": "/etc/passwd"})


@case("names shards that are missing")
def shard_with_a_name_that_no_file_can_have(folder: Path) -> None:
    _shards(folder, {"wte.weight": "\0" * 5000, "wpe.weight": "\ud800"})


@case("is not an index of shards")
def index_that_is_a_list(folder: Path) -> None:
    _shards(folder, ["model-00001-of-00001.safetensors"])


@case("is not an index of shards")
def index_nested_a_million_deep(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_bytes(b'{"weight_map": ' * 500_000)


@case("is a link out of its folder")
def weights_that_are_a_link_to_a_file_elsewhere(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.safetensors"
    (folder / WEIGHTS).replace(elsewhere)
    (folder / WEIGHTS).symlink_to(elsewhere)


@case("is a link out of its folder")
def shard_that_is_a_link_to_a_file_elsewhere(folder: Path) -> None:
    _shards(folder, {"wte.weight": "model-00001-of-00001.safetensors"})
    elsewhere = folder.parent / "elsewhere.safetensors"
    (folder / "model-00001-of-00001.safetensors").replace(elsewhere)
    (folder / "model-00001-of-00001.safetensors").symlink_to("../elsewhere.safetensors")


@case("is a link out of its folder")
def config_that_is_a_link_to_a_file_elsewhere(folder: Path) -> None:
    (folder / "config.json").replace(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


@case("is a link out of its folder")
def link_out_of_what_only_looks_like_the_hubs_cache(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.json"
    (folder / "config.json").replace(elsewhere)
    (folder / "blobs").mkdir()
    (folder / "config.json").symlink_to(elsewhere)


@case("is not a regular file")
def config_that_never_ends(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


@case("is not a regular file")
def config_that_is_a_pipe_without_a_writer(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@case("is not a regular file")
def weights_that_are_a_pipe_without_a_writer(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@case("is not a regular file")
def weights_that_are_a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


@case("It is a pickle".lower())
def weights_as_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")


@case("is not a whole safetensors file")
def pickle_under_the_name_of_the_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")


# config.json


@case("are missing")
def config_of_a_thousand_million_blocks(folder: Path) -> None:
    change_config(folder, n_layer=10**9)


@case("wrong shape")
def config_a_million_wide(folder: Path) -> None:
    change_config(folder, n_embd=10**6)


@case("n_embd is 100000000000000000")
def config_wider_than_can_be_counted(folder: Path) -> None:
    change_config(folder, n_embd=10**300, n_head=1)


@case("n_positions is 0")
def config_without_positions(folder: Path) -> None:
    change_config(folder, n_positions=0)


@case("n_layer is -1")
def config_of_less_than_no_blocks(folder: Path) -> None:
    change_config(folder, n_layer=-1)


@case("n_embd must be a multiple of n_head")
def config_of_heads_that_do_not_fit(folder: Path) -> None:
    change_config(folder, n_head=3)


@case("layer_norm_epsilon is -1e-05")
def config_with_an_epsilon_below_zero(folder: Path) -> None:
    change_config(folder, layer_norm_epsilon=-1e-5)


@case("layer_norm_epsilon is nan")
def config_with_an_epsilon_that_is_no_number(folder: Path) -> None:
    change_config(folder, layer_norm_epsilon=float("nan"))


@case("layer_norm_epsilon is 1000000")
def config_with_an_epsilon_of_four_hundred_digits(folder: Path) -> None:
    change_config(folder, layer_norm_epsilon=10**400)


@case("n_layer is '2'")
def config_with_strings_for_numbers(folder: Path) -> None:
    change_config(folder, n_layer="2")


@case("n_layer is True")
def config_with_truth_for_a_number(folder: Path) -> None:
    change_config(folder, n_layer=True)


@case("activation_function is ['gelu_new']")
def config_with_a_list_for_the_activation(folder: Path) -> None:
    change_config(folder, activation_function=["gelu_new"])


@case("model_type is 'llama'")
def config_of_another_model(folder: Path) -> None:
    change_config(folder, model_type="llama")


@case(r"model_type is '\x1b[31m")
def config_that_steers_the_terminal(folder: Path) -> None:
    change_config(folder, model_type="\x1b[31m" + "x" * 10_000)


@case("eos_token_id is 1000000")
def config_with_an_end_beyond_all_bounds(folder: Path) -> None:
    change_config(folder, eos_token_id=10**300)


@case("add_cross_attention is set")
def config_with_a_feature_that_changes_the_arithmetic(folder: Path) -> None:
    change_config(folder, add_cross_attention=True)


@case("nested too deeply")
def config_nested_a_thousand_deep(folder: Path) -> None:
    _raw_config(folder, b'{"a":' * 1000 + b"0" + b"}" * 1000)


@case("the name 'n_layer' is there twice")
def config_with_a_name_twice(folder: Path) -> None:
    _raw_config(folder, (folder / "config.json").read_bytes().replace(b"{", b'{"n_layer": 1,', 1))


@case("has 1073741824 bytes")
def config_of_a_gigabyte_of_spaces(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.write(b" " * 2**24)
        file.truncate(2**30)


@case("is not valid JSON")
def config_that_is_not_utf8(folder: Path) -> None:
    _raw_config(folder, b'{"model_type": "gpt\xff2"}')


@case("is not valid JSON")
def config_in_utf16(folder: Path) -> None:
    _raw_config(folder, (folder / "config.json").read_text().encode("utf-16"))


@case("is not valid JSON")
def config_of_no_bytes(folder: Path) -> None:
    _raw_config(folder, b"")


@case("is not valid JSON")
def config_with_a_number_of_a_million_digits(folder: Path) -> None:
    _raw_config(folder, b'{"n_layer": ' + b"9" * 1_000_000 + b"}")


@case("holds a list")
def config_that_is_a_list(folder: Path) -> None:
    _raw_config(folder, b"[]")


@case("No model of the shape")
def config_of_more_values_than_can_be_counted(folder: Path) -> None:
    change_config(folder, n_embd=2**31 - 1, n_head=1)


@case("was saved with the block os:system")
def config_that_names_a_block_to_import(folder: Path) -> None:
    name_a_block(folder, "os:system")


@case(r"block is '\x1b[2J")
def config_with_a_block_that_steers_the_terminal(folder: Path) -> None:
    name_a_block(folder, "\x1b[2J:" + "x" * 10_000)


@case("block is {'a': 1}")
def config_with_a_block_that_is_no_name(folder: Path) -> None:
    change_config(folder, model_type="minigpt", block={"a": 1})


@case("block is 'os:system', but model_type is 'gpt2'")
def config_of_gpt2_with_a_block(folder: Path) -> None:
    change_config(folder, block="os:system")
