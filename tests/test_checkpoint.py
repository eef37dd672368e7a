"""Files on disk <-> parameters: every layout, and every way that a checkpoint can be wrong."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minigpt import GPT2, Block, CheckpointError, GPT2Config, scaled
from minigpt.cache import KeyValueCache
from minigpt.checkpoint import INDEX, ORIGIN, WEIGHTS
from minigpt.files import write_atomically
from minigpt.linear import Linear
from minigpt.model import MLP
from minigpt.parameters import Native
from minigpt.parity import certify, fingerprint
from tests.blocks import BLOCKS, Parallel, RMSNorm, Rotary
from tests.conftest import SMALL, TINY

Tensors = dict[str, Tensor]
MAPS = Path("/proc/self/maps")


@pytest.fixture
def folder(model: GPT2, tmp_path: Path) -> Path:
    """A saved checkpoint."""
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a saved checkpoint."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_same(one: GPT2, other: GPT2) -> None:
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_saving_and_loading_is_bit_identical(model: GPT2, folder: Path) -> None:
    assert_same(GPT2.from_pretrained(folder, dtype=torch.float64), model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_through_transformers_is_bit_identical(
    small: Callable[..., GPT2], tmp_path: Path, tied: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    model = small(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(GPT2.from_pretrained(tmp_path / "theirs", dtype=torch.float64), model)


def test_a_small_model_of_transformers_whose_special_tokens_lie_outside_its_vocabulary_loads_and_saves_them(
    tmp_path: Path, ids: Tensor
) -> None:
    """GPT2Config(vocab_size=...) leaves 50256 for both."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 97, "n_positions": 24, "n_embd": 36, "n_head": 3, "n_layer": 2}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT2.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (50256, 50256)


def test_float64_weights_never_pass_through_float32(model: GPT2, folder: Path) -> None:
    loaded = GPT2.from_pretrained(folder, dtype=torch.float64)
    weight = loaded.token_embedding.weight
    assert not torch.equal(weight, weight.float().double())
    assert torch.equal(weight, model.token_embedding.weight)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_asked_dtype_is_what_is_loaded_whatever_the_file_holds(
    model: GPT2, folder: Path, stored: torch.dtype
) -> None:
    edit(folder, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    loaded = GPT2.from_pretrained(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    expected = model.token_embedding.weight.to(stored).float()
    assert torch.equal(loaded.token_embedding.weight, expected)


def test_keys_without_the_prefix_and_old_mask_buffers_are_read(model: GPT2, folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
        tensors["h.3.attn.masked_bias"] = torch.tensor(-1e4)

    edit(folder, change)
    assert_same(GPT2.from_pretrained(folder, dtype=torch.float64), model)


def shard(folder: Path) -> None:
    """Split a saved checkpoint in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def test_shards_are_read_through_their_index(model: GPT2, folder: Path) -> None:
    shard(folder)
    loaded = GPT2.from_pretrained(folder, dtype=torch.float64)
    assert_same(loaded, model)
    assert loaded.source is not None
    assert len(loaded.source.sha256) == 2


def test_a_stored_unembedding_equal_to_the_embedding_is_tied(model: GPT2, folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    loaded = GPT2.from_pretrained(folder)
    assert loaded.unembed.weight is loaded.token_embedding.weight


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of mapped files")
def test_weights_are_mapped_from_the_file_not_copied(small: Callable[..., GPT2], tmp_path: Path) -> None:
    small(dtype=torch.float32).save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    mapped = [line.split()[0].split("-") for line in MAPS.read_text().splitlines() if str(tmp_path / WEIGHTS) in line]
    regions = [range(int(start, 16), int(end, 16)) for start, end in mapped]
    weights = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    assert all(any(weight.data_ptr() in region for region in regions) for weight in weights)


def test_an_edit_in_memory_does_not_reach_the_file(small: Callable[..., GPT2], tmp_path: Path) -> None:
    small(dtype=torch.float32).save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with torch.no_grad():
        GPT2.from_pretrained(tmp_path).blocks[0].attention.qkv.weight.fill_(7.0)
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_saving_over_the_file_that_the_weights_are_mapped_from_keeps_them(
    small: Callable[..., GPT2], tmp_path: Path
) -> None:
    model = small(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert_same(loaded, model)
    assert_same(GPT2.from_pretrained(tmp_path), model)


def test_the_source_says_where_the_weights_came_from(folder: Path) -> None:
    source = GPT2.from_pretrained(folder).source
    assert source is not None
    assert source.directory == folder
    assert source.commit is None
    assert re.fullmatch("[0-9a-f]{64}", source.sha256[WEIGHTS])


def test_a_file_that_changed_after_loading_has_no_hash(folder: Path) -> None:
    source = GPT2.from_pretrained(folder).source
    edit(folder, lambda tensors: tensors["transformer.wte.weight"].fill_(0))
    with pytest.raises(CheckpointError, match="changed since"):
        assert source is not None and source.sha256


WRONG: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "missing and unexpected, all": (
        lambda t: [t.pop("transformer.h.1.ln_2.bias"), t.pop("transformer.ln_f.weight"), t.update(extra=torch.ones(1))],
        ["missing: h.1.ln_2.bias", "missing: ln_f.weight", "unexpected: extra"],
    ),
    "wrong shape, both": (
        lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.ones(108, 36)}),
        [r"wrong shape: h.0.attn.c_attn.weight is \[108, 36\], config.json asks for \[36, 108\]"],
    ),
    "a block too many": (
        lambda t: t.update({"transformer.h.4.ln_1.weight": torch.ones(36)}),
        ["unexpected: h.4.ln_1.weight"],
    ),
    "a block far too many": (
        lambda t: t.update({"transformer.h.40.ln_1.weight": torch.ones(36)}),
        ["unexpected: h.40.ln_1.weight"],
    ),
    "not a number": (
        lambda t: t["transformer.h.2.mlp.c_fc.bias"].__setitem__(3, torch.nan),
        ["not finite: h.2.mlp.c_fc.bias"],
    ),
    "infinite": (lambda t: t["transformer.wpe.weight"].__setitem__((1, 1), -torch.inf), ["not finite: wpe.weight"]),
    "finite only in float64": (lambda t: t["transformer.wpe.weight"].fill_(1e300), ["not finite: wpe.weight"]),
    "integers": (
        lambda t: t.update({"transformer.ln_f.bias": torch.ones(36, dtype=torch.int32)}),
        ["wrong type: ln_f.bias is I32"],
    ),
    "an unembedding of its own under tied embeddings": (
        lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}),
        ["lm_head.weight differs"],
    ),
    "with and without prefix": (
        lambda t: t.update({"ln_f.bias": t["transformer.ln_f.bias"].clone()}),
        ["ln_f.bias is there twice"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_everything_wrong_is_listed_at_once(folder: Path, case: str) -> None:
    change, sentences = WRONG[case]
    edit(folder, change)
    with pytest.raises(CheckpointError) as error:
        GPT2.from_pretrained(folder)
    problems = str(error.value).split("\n  ")[1:]
    assert len(problems) == len(sentences), problems
    assert all(any(re.match(sentence, problem) for problem in problems) for sentence in sentences), problems


def test_an_untied_model_needs_its_unembedding(small: Callable[..., GPT2], tmp_path: Path) -> None:
    small(tie_word_embeddings=False).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"\xff" * 8, b"\x10\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_not_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file") as error:
        GPT2.from_pretrained(folder)
    assert "missing" not in str(error.value)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder: Path, share: float) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        GPT2.from_pretrained(folder)


def test_an_index_that_names_a_missing_shard_is_refused(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        GPT2.from_pretrained(folder)


def test_an_index_that_points_out_of_its_folder_is_refused(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(folder: Path, text: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        GPT2.from_pretrained(folder)


def test_a_pickle_is_refused_with_the_reason_and_the_way_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle") as error:
        GPT2.from_pretrained(folder)
    assert f"from_pretrained({str(folder)!r}).save_pretrained(" in str(error.value)


def test_another_architecture_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    with pytest.raises(CheckpointError, match="'opt'"):
        GPT2.from_pretrained(folder)


def test_a_scale_that_is_not_1_is_never_dropped(model: GPT2, tmp_path: Path) -> None:
    with scaled(model, {"blocks.2.output_scale": 0.5}), pytest.raises(ValueError, match=r"blocks\.2\.output_scale"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(model: GPT2, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file cannot be written: [A-Z][a-z ]+\.$"):
        model.save_pretrained(tmp_path / "file")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def write(file: Path) -> None:
        file.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_saved_weights_no_longer_claim_the_hubs_commit(model: GPT2, folder: Path) -> None:
    (folder / ORIGIN).write_text(json.dumps({"repository": "some/model", "commit": "0" * 40}))
    before = GPT2.from_pretrained(folder).source
    assert before is not None and (before.repository, before.commit) == ("some/model", "0" * 40)
    model.save_pretrained(folder)
    after = GPT2.from_pretrained(folder).source
    assert after is not None and (after.repository, after.commit) == (None, None)


# Blocks of one's own: a checkpoint holds what the model declares.


def test_a_checkpoint_of_gpt2_loads_into_every_block_with_its_parameters(tiny: GPT2) -> None:
    model = GPT2.from_pretrained(TINY, block=Parallel)
    assert_same(model, tiny)
    ids = torch.arange(8)[None]
    block, read = model.blocks[0], model.blocks[0].attention_norm(model.embed(ids))
    expected = model.embed(ids) + block.attention(read) + block.mlp(read)
    torch.testing.assert_close(model.residuals(ids)[1], expected)
    assert (model(ids) - tiny(ids)).abs().max() > 1


@pytest.mark.parametrize(
    ("block", "wrong", "count"),
    [(RMSNorm, r"unexpected: h\.0\.ln_1\.bias", 9), (Rotary, r"unexpected: wpe\.weight", 1)],
)
def test_a_block_with_other_parameters_refuses_a_checkpoint_of_gpt2_and_says_why(
    folder: Path, block: type[Block], wrong: str, count: int
) -> None:
    with pytest.raises(CheckpointError, match=wrong) as error:
        GPT2.from_pretrained(folder, block=block)
    *problems, last = str(error.value).split("\n  ")[1:]
    assert len(problems) == count
    assert last == f"The block tests.blocks:{block.__name__} declares other parameters than the file holds."


def test_a_block_with_the_same_parameters_is_not_blamed_for_a_broken_value(folder: Path) -> None:
    edit(folder, lambda tensors: tensors["transformer.wpe.weight"].fill_(torch.nan))
    with pytest.raises(CheckpointError) as error:
        GPT2.from_pretrained(folder, block=Parallel)
    assert "declares other" not in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_of_another_block_is_saved_and_loaded_bit_for_bit(
    small: Callable[..., GPT2], ids: Tensor, tmp_path: Path, block: type[Block], tied: bool
) -> None:
    model = small(block=block, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path, dtype=torch.float64, block=block)
    assert_same(loaded, model)
    assert torch.equal(loaded(ids), model(ids))
    assert (loaded.unembed.weight is loaded.token_embedding.weight) == tied
    assert loaded.source is not None
    assert re.fullmatch("[0-9a-f]{64}", loaded.source.sha256[WEIGHTS])
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(tensor.shape == model.get_parameter(name).shape for name, tensor in tensors.items())


@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_of_another_block_does_not_pass_for_hugging_faces_gpt2(
    small: Callable[..., GPT2], ids: Tensor, tmp_path: Path, block: type[Block]
) -> None:
    transformers = pytest.importorskip("transformers")
    model = small(block=block)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("minigpt", ["minigpt.GPT2"])
    assert config["block"] == f"tests.blocks:{block.__name__}"
    with pytest.raises(ValueError, match="minigpt"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs, told = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["unexpected_keys"]) == set(load_file(tmp_path / WEIGHTS)), "not one of its tensors is taken"
    assert (theirs(ids).logits - model(ids)).abs().max() > 1


def test_a_plain_model_says_that_it_is_gpt2(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert "block" not in config


@pytest.mark.parametrize("given", [Block, RMSNorm])
def test_a_checkpoint_that_names_its_block_is_refused_without_it(
    small: Callable[..., GPT2], tmp_path: Path, given: type[Block]
) -> None:
    small(block=Parallel).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"saved with the block tests\.blocks:Parallel") as error:
        GPT2.from_pretrained(tmp_path, block=given)
    assert "GPT2.from_pretrained(..., block=Parallel), or --block tests.blocks:Parallel." in str(error.value)
    assert ("tests.blocks:RMSNorm was given" in str(error.value)) == (given is RMSNorm)


def test_a_block_of_a_script_is_to_be_moved_into_a_file(
    small: Callable[..., GPT2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No option can name a class of `__main__`."""
    monkeypatch.setattr(Parallel, "__module__", "__main__")
    small(block=Parallel).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as error:
        GPT2.from_pretrained(tmp_path)
    first = "First move its class from the script or notebook into a file my_blocks.py."
    assert str(error.value).endswith(f"or --block my_blocks:Parallel. {first}")
    problem = certify(small(block=Parallel)).problems[0]
    assert "`minigpt reference DIRECTORY --block my_blocks:Parallel`" in problem
    assert problem.endswith(first)


def test_a_block_of_the_same_name_in_another_module_is_taken_and_said_once(
    small: Callable[..., GPT2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small(block=Parallel).save_pretrained(tmp_path)
    GPT2.from_pretrained(tmp_path, block=Parallel)
    assert caplog.messages == []
    monkeypatch.setattr(Parallel, "__module__", "elsewhere")
    for _ in range(2):
        assert GPT2.from_pretrained(tmp_path, block=Parallel).block is Parallel
    (said,) = caplog.messages
    assert f"{tmp_path} was saved with the block tests.blocks:Parallel, and elsewhere:Parallel has its name" in said
    assert "`minigpt verify` tells" in said
    monkeypatch.setattr(Parallel, "__module__", "zoo")
    GPT2.from_pretrained(tmp_path, block=Parallel)
    assert "and zoo:Parallel has its name" in caplog.messages[1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"block": 5}, "block is 5; expected the name"),
        ({"block": "Parallel"}, "block is 'Parallel'; expected the name"),
        ({"block": "a:\x1b[2J"}, "expected the name"),
        ({"block": None}, "block is None; expected the name"),
        ({"model_type": "gpt2"}, "but model_type is 'gpt2'"),
        ({"model_type": ["minigpt"]}, "model_type is"),
    ],
)
def test_a_block_that_is_named_wrongly_is_refused(
    small: Callable[..., GPT2], tmp_path: Path, values: dict[str, object], said: str
) -> None:
    small(block=Parallel).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(CheckpointError, match=said):
        GPT2.from_pretrained(tmp_path, block=Parallel)


OWN_WRONG: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop("blocks.1.mlp_norm.weight"), r"missing: blocks\.1\.mlp_norm\.weight"),
    "unexpected": (lambda t: t.update({"blocks.1.gate": torch.ones(1)}), r"unexpected: blocks\.1\.gate"),
    "a block too many": (lambda t: t.update({"blocks.4.mlp_norm.weight": torch.ones(36)}), r"unexpected: blocks\.4"),
    "transposed": (
        lambda t: t.update({"blocks.0.attention.qkv.weight": torch.ones(36, 108)}),
        r"wrong shape: blocks\.0\.attention\.qkv\.weight is \[36, 108\], config\.json asks for \[108, 36\]",
    ),
    "a name of GPT-2's": (
        lambda t: t.update({"transformer.wte.weight": t.pop("token_embedding.weight")}),
        "unexpected",
    ),
    "a mask of GPT-2's": (lambda t: t.update({"h.0.attn.bias": torch.ones(1)}), r"unexpected: h\.0\.attn\.bias"),
    "with a prefix": (
        lambda t: t.update({"transformer.final_norm.weight": t.pop("final_norm.weight")}),
        r"missing: final_norm\.weight\n  unexpected: transformer\.final_norm\.weight",
    ),
    "an unembedding of its own": (
        lambda t: t.update({"unembed.weight": t["token_embedding.weight"] + 1}),
        r"unembed\.weight differs from token_embedding\.weight",
    ),
}


@pytest.mark.parametrize("case", OWN_WRONG)
def test_what_is_wrong_with_a_checkpoint_of_another_block_is_listed(
    small: Callable[..., GPT2], tmp_path: Path, case: str
) -> None:
    change, said = OWN_WRONG[case]
    small(block=RMSNorm).save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=said):
        GPT2.from_pretrained(tmp_path, block=RMSNorm)


@pytest.mark.parametrize(("first", "second"), [(Block, RMSNorm), (RMSNorm, Block), (RMSNorm, Rotary)])
def test_saving_over_a_checkpoint_of_another_block_leaves_nothing_of_it(
    small: Callable[..., GPT2], tmp_path: Path, first: type[Block], second: type[Block]
) -> None:
    small(block=first).save_pretrained(tmp_path)
    model = small(block=second)
    model.save_pretrained(tmp_path)
    assert_same(GPT2.from_pretrained(tmp_path, dtype=torch.float64, block=second), model)
    with pytest.raises(CheckpointError):
        GPT2.from_pretrained(tmp_path, block=first)


class Gated(Block):
    """A parameter of its own, a native one of its own, and a table that no checkpoint holds."""

    native = (*Block.native, Native("gate_shift", neutral=0.0))
    gate_shift: Tensor
    table: Tensor

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.gate = nn.Parameter(torch.full((config.n_embd,), 0.5))
        self.register_buffer("table", torch.arange(config.n_embd) / config.n_embd, persistent=False)
        self.offset = torch.tensor(0.25)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        return super().forward(x, cache) + self.gate * (self.table + self.offset) + self.gate_shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_of_ones_own_are_saved_and_what_is_kept_beside_them_is_made_again(
    small: Callable[..., GPT2], ids: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = small(block=Gated, dtype=dtype)
    model.save_pretrained(tmp_path)
    random = torch.get_rng_state()
    loaded = GPT2.from_pretrained(tmp_path, dtype=dtype, block=Gated)
    assert torch.equal(torch.get_rng_state(), random), "nobody's draws change"
    assert_same(loaded, model)
    assert loaded.blocks[1].get_buffer("table").dtype == dtype
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("absent", [0, 1, 7, 22, 53])
def test_what_is_missing_is_counted_as_it_is_listed(small: Callable[..., GPT2], absent: int) -> None:
    model = small()
    layout = GPT2._layout(model.config, Block, own=False)
    names = [theirs for theirs in layout if theirs not in layout.optional]
    found = set(names[absent:]) | {"h.99.ln_1.weight", "lm_head.weight"}
    assert layout.count_missing(found) == len(list(layout.missing(found))) == min(absent, len(names))


class Drawn(Block):
    """A random table that no checkpoint holds."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.register_buffer("table", torch.randn(config.n_embd), persistent=False)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        return super().forward(x, cache) + self.table


def test_a_table_that_would_come_out_otherwise_is_not_left_behind(small: Callable[..., GPT2], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"No checkpoint holds blocks\.0\.table, .*, and a new Drawn makes that otherwise"
    ):
        small(block=Drawn).save_pretrained(tmp_path)
    model = small(block=Gated)
    model.blocks[2].offset += 1  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"No checkpoint holds blocks\.2\.offset, and a new Gated"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


class Lazy(Block):
    """Makes its table when it is first called, as long as the text."""

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        self.kept = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None]
        return super().forward(x, cache) + self.kept


def test_what_a_forward_makes_for_itself_is_no_part_of_a_model(
    small: Callable[..., GPT2], ids: Tensor, tmp_path: Path
) -> None:
    model = small(block=Lazy)
    before = fingerprint(model)
    model(ids)
    assert fingerprint(model) == before
    model.save_pretrained(tmp_path)
    assert torch.equal(GPT2.from_pretrained(tmp_path, dtype=torch.float64, block=Lazy)(ids), model(ids))


def test_a_table_may_have_other_last_bits_and_no_other_digits(small: Callable[..., GPT2], tmp_path: Path) -> None:
    model = small(block=Gated)
    model.blocks[1].get_buffer("table")[5] *= 1 + 1e-15
    model.save_pretrained(tmp_path / "near")
    model.blocks[1].get_buffer("table")[5] *= 1 + 1e-12
    with pytest.raises(ValueError, match=r"No checkpoint holds blocks\.1\.table"):
        model.save_pretrained(tmp_path / "far")


@pytest.mark.parametrize("name", ["blocks.1.gate_shift", "blocks.1.mlp_scale", "blocks.0.attention.head_scale"])
def test_no_native_parameter_is_ever_dropped(small: Callable[..., GPT2], tmp_path: Path, name: str) -> None:
    model = small(block=Gated)
    with scaled(model, {name: 0.5}), pytest.raises(ValueError, match=f"not neutral.*{re.escape(name)}"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_parameter_that_gpt2_has_not_is_missing_from_its_checkpoints(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: h\.3\.gate") as error:
        GPT2.from_pretrained(folder, block=Gated)
    assert "Gated declares other parameters" in str(error.value)


class Shared(Block):
    """One norm for both sublayers: two names for the same weights."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.mlp_norm = self.attention_norm


def test_weights_with_two_names_are_saved_under_both(small: Callable[..., GPT2], ids: Tensor, tmp_path: Path) -> None:
    model = small(block=Shared)
    model.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path, dtype=torch.float64, block=Shared)
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.blocks[1].mlp_norm is loaded.blocks[1].attention_norm


class Sharing(Block):
    """All blocks have one weight between them (as in ALBERT), each under its own name."""

    first: ClassVar[Block]

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        if layer == 0:
            type(self).first = self
        else:
            self.mlp.expand.weight = self.first.mlp.expand.weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_parameter_that_blocks_share_is_one_again_when_it_is_loaded(
    small: Callable[..., GPT2], ids: Tensor, tmp_path: Path, tied: bool
) -> None:
    model = small(block=Sharing, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path, dtype=torch.float64, block=Sharing)
    assert torch.equal(loaded(ids), model(ids))
    assert all(block.mlp.expand.weight is loaded.blocks[0].mlp.expand.weight for block in loaded.blocks)
    assert (loaded.unembed.weight is loaded.token_embedding.weight) == tied
    with torch.no_grad():
        for of in (model, loaded):
            of.blocks[2].mlp.expand.weight += 1
    assert torch.equal(loaded(ids), model(ids)), "an edit of one is an edit of all"


def test_several_values_for_a_parameter_that_blocks_share_are_refused(
    small: Callable[..., GPT2], tmp_path: Path, folder: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"one parameter of blocks\.0\.mlp\.expand\.weight and .*several values"):
        GPT2.from_pretrained(folder, block=Sharing)


class Own(MLP):
    """A gate that its block draws, a layer of GPT-2's that it makes of another class, and a name that means nothing."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.gate = Linear(config.n_embd, config.mlp_width)
        self.expand = nn.Linear(config.n_embd, config.mlp_width)  # type: ignore[assignment]
        for layer in (self.gate, self.expand):
            nn.init.constant_(layer.weight, 0.75)
            nn.init.constant_(layer.bias, 0.5)


class Drawing(Block):
    """With parameters named as GPT-2's, which are none of them."""

    mlp_class = Own

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.projection = nn.Linear(config.n_embd, config.n_embd)
        self.table = nn.Embedding(3, config.n_embd)
        nn.init.ones_(self.projection.weight)
        nn.init.ones_(self.table.weight)


def test_what_a_block_draws_itself_stays_as_it_has_drawn_it() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**SMALL, initializer_range=0.5), Drawing)
    for block in model.blocks:
        own = dict(block.named_parameters())
        for name in ("mlp.gate", "mlp.expand"):
            assert (own[f"{name}.weight"] == 0.75).all() and (own[f"{name}.bias"] == 0.5).all()
        assert (own["projection.weight"] == 1).all() and (own["table.weight"] == 1).all()


def test_the_layers_of_gpt2_are_drawn_as_radford_et_al_did() -> None:
    """Deviation initializer_range, divided by sqrt(2 * n_layer) where a layer writes into the stream; biases are 0."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=500, n_positions=200, n_embd=96, n_head=3, n_layer=4, initializer_range=0.5)
    for block in (Block, Drawing):
        model = GPT2(config, block)
        for name, weight in model.named_parameters():
            if re.search(r"(attention|mlp)\.projection\.weight", name):
                assert float(weight.detach().std()) == pytest.approx(0.5 / 8**0.5, rel=0.03), name
            elif re.search(r"embedding\.weight|qkv\.weight|unembed\.weight", name):
                assert float(weight.detach().std()) == pytest.approx(0.5, rel=0.03), name
            elif re.search(r"(qkv|attention\.projection|mlp\.projection)\.bias", name):
                assert not weight.any(), name


def test_a_subclass_of_gpt2_is_not_saved_as_gpt2(tmp_path: Path) -> None:
    class Mine(GPT2):
        def forward(self, ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
            return -super().forward(ids, cache)

    with pytest.raises(ValueError, match=r"Mine is a subclass of GPT2.*subclass of minigpt\.Block"):
        Mine(GPT2Config(**SMALL)).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Uneven(Block):
    """Only the first block has a norm before its MLP."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        if layer:
            self.mlp_norm = nn.Identity()


def test_blocks_that_differ_from_each_other_are_refused(
    small: Callable[..., GPT2], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"must hold the same parameters.*blocks\.1\.mlp_norm\.weight"):
        small(block=Uneven).save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="must hold the same parameters"):
        GPT2.from_pretrained(folder, block=Uneven)
    for width in (30, 40):
        model = small()
        model.blocks[2].mlp_norm = nn.LayerNorm(width)
        with pytest.raises(ValueError, match=r"these are not in all: .*blocks\.2\.mlp_norm\.weight"):
            model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Counting(Block):
    """Integers among what is saved."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))


def test_integers_that_could_not_be_read_back_are_refused(small: Callable[..., GPT2], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="persistent=False"):
        small(block=Counting).save_pretrained(tmp_path / "new")
