"""Random bytes in the place of strangers' files: a fixed number, from a fixed seed. `make fuzz` tries far more."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt import GPT2, Block
from tests.blocks import Rotary
from tests.fuzzing import CRASHES, TARGETS, Loader, Texts, WrongError

FIXED = settings(
    derandomize=True, deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["n_layer", "n_embd", "n_head", "vocab_size", "layer_norm_epsilon", "model_type", "block", "x"]
)


@pytest.fixture(scope="module", params=[Block, Rotary], ids=lambda block: block.__name__)
def loader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """The loader over a small checkpoint of GPT-2's block, and of another."""
    return Loader(tmp_path_factory.mktemp("loader"), request.param)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """The readers of texts."""
    return Texts(tmp_path_factory.mktemp("texts"))


@FIXED
@given(st.integers(0, 3), st.data())
def test_a_valid_file_with_some_bytes_changed_is_loaded_or_refused(
    loader: Loader, kind: int, data: st.DataObject
) -> None:
    content = bytearray(loader.seeds()[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(1, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    loader(bytes(content))


@FIXED
@given(st.dictionaries(FIELDS, JSON, max_size=3))
def test_a_config_with_any_values_is_loaded_or_refused(loader: Loader, values: dict[str, object]) -> None:
    config = json.loads(loader.whole["config.json"])
    loader(b"\0" + json.dumps({**config, **values}).encode())


@FIXED
@given(st.data())
def test_a_header_with_any_value_changed_is_loaded_or_refused(loader: Loader, data: st.DataObject) -> None:
    header = json.loads(loader.header)
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    if field and name != "__metadata__":
        header[name][field] = data.draw(JSON)
    else:
        header[name] = data.draw(JSON)
    loader(b"\1" + json.dumps(header).encode())


@FIXED
@given(JSON)
def test_an_index_of_any_content_is_loaded_or_refused(loader: Loader, content: object) -> None:
    loader(b"\3" + json.dumps({"weight_map": content}).encode())


@FIXED
@given(
    st.integers(0, 2), st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace"))
)
def test_texts_of_any_bytes_are_read_or_refused(texts: Texts, kind: int, content: bytes) -> None:
    texts(bytes([kind]) + content)


def test_whole_files_are_taken(loader: Loader, texts: Texts) -> None:
    assert all(loader(seed) for seed in loader.seeds())
    assert all(texts(seed) for seed in texts.seeds())


@pytest.mark.parametrize("file", sorted(CRASHES.glob("*-*")), ids=lambda file: file.name[:24])
def test_what_once_broke_something_no_longer_does(file: Path, tmp_path: Path) -> None:
    TARGETS[file.name.partition("-")[0]](tmp_path)(file.read_bytes())


def test_a_loader_that_lets_an_error_through_is_found(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Path, block: type[Block]) -> GPT2:
        raise KeyError("n_layer")

    monkeypatch.setattr(GPT2, "from_pretrained", load)
    with pytest.raises(KeyError):
        loader(loader.seeds()[0])


def test_a_reader_that_lets_control_characters_through_is_found(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise ValueError("a line \x1b[2J that clears the screen")

    monkeypatch.setattr("tests.fuzzing.read_texts", read)
    with pytest.raises(WrongError):
        texts(b"\0{}")
