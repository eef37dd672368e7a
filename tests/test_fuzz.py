"""Random bytes in the place of strangers' files: a fixed number, from a fixed seed. `make fuzz` tries far more."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.harness.corpus import Shards, Survey
from minigpt import GPT2, Block
from minigpt.files import open_tensors
from tests.blocks import Rotary
from tests.fuzzing import CRASHES, TARGETS, Loader, Resume, Texts, WrongError

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


@pytest.fixture(scope="module")
def resume(tmp_path_factory: pytest.TempPathFactory) -> Resume:
    """A finished corpus run, to be damaged."""
    return Resume(tmp_path_factory.mktemp("resume"))


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


def test_a_damaged_output_folder_gives_the_right_numbers_or_a_sentence(resume: Resume) -> None:
    """Every damage to every file once."""
    ends = [resume(seed) for seed in resume.seeds()]
    assert resume(b"\0") and resume(b"\1")
    assert 0.2 < sum(ends) / len(ends) < 0.9


@settings(FIXED, max_examples=40)
@given(st.binary(min_size=4, max_size=10))
def test_an_output_folder_with_several_damages_gives_the_right_numbers_or_a_sentence(
    resume: Resume, damages: bytes
) -> None:
    resume(damages)


def believe(shards: Shards, number: int, survey: Survey) -> dict[str, list[int]]:
    with open_tensors(shards.path(number)) as file:
        return json.loads(file.metadata()["shard"])["shapes"]


def follow(path: Path, folder: bool = False) -> None:
    pass


def remove_what_is_hidden(folder: Path) -> None:
    for path in folder.glob(".*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "sabotage"),
    [
        ("experiments.harness.corpus.Shards._shapes", believe),
        ("experiments.harness.corpus.check_kind", follow),
        ("experiments.harness.corpus._remove_leftovers", remove_what_is_hidden),
    ],
)
def test_a_run_that_believes_or_removes_too_much_is_found(
    resume: Resume, monkeypatch: pytest.MonkeyPatch, name: str, sabotage: Callable[..., object]
) -> None:
    monkeypatch.setattr(name, sabotage)
    if sabotage is follow:
        monkeypatch.setattr("experiments.harness.output.check_kind", follow)
    with pytest.raises(WrongError):
        for seed in resume.seeds():
            resume(seed)


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
