"""The hub over HTTP, with the real client: a server on loopback stands for huggingface.co."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from minigpt import GPT2, Tokenizer, hub
from minigpt.config import CheckpointError
from tests.conftest import TINY
from tests.hub_server import NAME, NO_PROXY, TOKEN, Answer, Server, cut, fail, make, point_at, show_login_page

IDS = torch.arange(24).view(2, 12) * 4


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub that the client of this process is pointed at, with an empty cache and no pauses between retries."""
    server = Server()
    point_at(server.endpoint, tmp_path, monkeypatch)
    yield server
    huggingface_hub.close_session()
    server.stop()


@pytest.fixture
def published(server: Server, tmp_path: Path) -> GPT2:
    """The model that the server's repository holds, among files that are not for this library."""
    model, files = make(tmp_path / "published")
    server.push({**files, "README.md": b"# Tiny", "pytorch_model.bin": b"a pickle", "onnx/model.onnx": b"a graph"})
    return model


def same(loaded: GPT2, expected: GPT2) -> bool:
    return torch.equal(loaded(IDS), expected(IDS))


def refusal(load: Callable[[], object]) -> str:
    """The message of the CheckpointError that `load` raises: one line, with no other exception in sight."""
    with pytest.raises(CheckpointError) as caught:
        load()
    error = caught.value
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    assert "\n" not in str(error)
    return str(error)


def test_first_download_loads_the_model_and_records_the_commit(server: Server, published: GPT2) -> None:
    loaded = GPT2.from_pretrained(NAME)
    commit = server.repositories[NAME].refs["main"]
    weights = server.repositories[NAME].commits[commit]["model.safetensors"]
    assert same(loaded, published)
    assert loaded.source is not None
    assert (loaded.source.name, loaded.source.repository, loaded.source.commit) == (NAME, NAME, commit)
    assert loaded.source.sha256 == {"model.safetensors": hashlib.sha256(weights).hexdigest()}


def test_only_the_files_that_are_read_are_requested(server: Server, published: GPT2) -> None:
    GPT2.from_pretrained(NAME)
    assert server.files_asked() == {"config.json", "model.safetensors"}


def test_second_load_downloads_no_file_again(server: Server, published: GPT2) -> None:
    GPT2.from_pretrained(NAME)
    server.requests.clear()
    assert same(GPT2.from_pretrained(NAME), published)
    assert server.files_asked() == set()


def test_a_branch_that_moved_is_followed(server: Server, published: GPT2, tmp_path: Path) -> None:
    GPT2.from_pretrained(NAME)
    newer, files = make(tmp_path / "newer", seed=1)
    commit = server.push(files)
    assert same(loaded := GPT2.from_pretrained(NAME), newer)
    assert loaded.source is not None
    assert loaded.source.commit == commit
    assert same(GPT2.from_pretrained(NAME, local_files_only=True), newer)


@pytest.mark.parametrize("switch", ["local_files_only", "HF_HUB_OFFLINE"])
def test_a_cached_model_loads_offline_without_a_request(
    server: Server, published: GPT2, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    GPT2.from_pretrained(NAME)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
    assert same(GPT2.from_pretrained(NAME, local_files_only=switch == "local_files_only"), published)
    assert server.requests == []


@pytest.mark.parametrize("switch", ["local_files_only", "HF_HUB_OFFLINE"])
def test_an_uncached_model_is_refused_offline_without_a_request(
    server: Server, published: GPT2, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
    message = refusal(lambda: GPT2.from_pretrained(NAME, local_files_only=switch == "local_files_only"))
    assert f"{NAME} is no folder here and not in the local cache" in message
    assert "Did you mean" not in message
    assert server.requests == []


def test_a_folder_with_a_slip_in_its_name_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "huge"):
        (tmp_path / "weights" / name).mkdir(parents=True)
    (tmp_path / "weights" / "tinny").touch()  # a file
    monkeypatch.chdir(tmp_path)
    assert "Did you mean weights/tiny? " in refusal(lambda: GPT2.from_pretrained("weights/tiy", local_files_only=True))


def test_a_cached_model_loads_when_the_hub_is_gone(server: Server, published: GPT2) -> None:
    GPT2.from_pretrained(NAME)
    server.stop()
    assert same(GPT2.from_pretrained(NAME), published)


def test_a_cached_model_loads_when_the_hub_is_out_of_order(server: Server, published: GPT2) -> None:
    GPT2.from_pretrained(NAME)
    server.faults["/"] = repeat(fail)
    assert same(GPT2.from_pretrained(NAME), published)


def test_an_uncached_model_is_refused_when_the_hub_is_gone(server: Server, published: GPT2) -> None:
    server.stop()
    assert f"{NAME} is no folder here and not in the local cache" in refusal(lambda: GPT2.from_pretrained(NAME))


RUN_ALONE = """
import json, sys
from minigpt import GPT2
source = GPT2.from_pretrained(sys.argv[1]).source
print(json.dumps([source.commit, source.sha256]))
"""


def test_a_fresh_process_follows_the_environment_online_and_then_offline(
    server: Server, published: GPT2, tmp_path: Path
) -> None:
    def run(**settings: str) -> list[object]:
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        variables = {**clean, **NO_PROXY, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), **settings}
        command = [sys.executable, "-W", "error", "-c", RUN_ALONE, NAME]
        return json.loads(
            subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, timeout=120).stdout
        )

    first = run(HF_TOKEN=TOKEN)
    assert first[0] == server.repositories[NAME].refs["main"]
    assert {request.token for request in server.requests if "/api/models/" in request.path} == {f"Bearer {TOKEN}"}
    server.requests.clear()
    assert run(HF_HUB_OFFLINE="1") == first
    assert server.requests == []


@pytest.mark.parametrize("kind", ["tag", "branch", "commit"])
def test_a_revision_is_a_tag_a_branch_or_a_commit(server: Server, published: GPT2, tmp_path: Path, kind: str) -> None:
    other, files = make(tmp_path / "other", seed=1)
    commit = server.push(files, "v2", "refs/pr/1")
    revision = {"tag": "v2", "branch": "refs/pr/1", "commit": commit}[kind]
    loaded = GPT2.from_pretrained(NAME, revision=revision)
    assert same(loaded, other)
    assert not same(loaded, published)
    assert loaded.source is not None
    assert loaded.source.commit == commit


def test_a_wrong_revision_is_named(server: Server, published: GPT2) -> None:
    assert "no revision 'v9'" in refusal(lambda: GPT2.from_pretrained(NAME, revision="v9"))


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    assert "'v2' was given with the folder" in refusal(lambda: hub.find(tmp_path, revision="v2"))


def test_a_repository_that_is_not_there_is_named(server: Server) -> None:
    assert "no folder and no hub repository someone/else" in refusal(lambda: GPT2.from_pretrained("someone/else"))


@pytest.mark.parametrize(
    "name",
    ["two words", "a--b/c", "too/many/parts", "./nowhere", "/nowhere", Path("nowhere"), "~no-such-user/x", "x" * 300],
)
def test_what_can_be_no_hub_id_and_is_no_folder_is_refused_without_a_request(server: Server, name: str | Path) -> None:
    message = refusal(lambda: hub.find(name))
    assert str(name) in message
    assert "is not a folder" in message or "neither a folder nor a hub id" in message
    assert server.requests == []


@pytest.mark.parametrize("token", [None, "hf_stranger"])
def test_a_gated_repository_asks_for_a_token(
    server: Server, published: GPT2, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    server.repositories[NAME].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = refusal(lambda: GPT2.from_pretrained(NAME))
    assert f"{NAME} is gated" in message
    assert "HF_TOKEN" in message


def test_the_token_opens_a_gated_repository_and_is_not_sent_to_the_file_store(
    server: Server, published: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories[NAME].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(GPT2.from_pretrained(NAME), published)
    tokens = {request.path.startswith("/store/"): request.token for request in server.requests if NAME in request.path}
    assert tokens == {False: f"Bearer {TOKEN}", True: None}


def test_a_token_that_no_header_can_carry_is_refused(
    server: Server, published: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_…")  # as copied from a page that shortens it
    assert NAME in refusal(lambda: GPT2.from_pretrained(NAME))


def test_a_repository_with_a_pickle_only_is_refused_with_the_way_to_convert_it(server: Server, tmp_path: Path) -> None:
    files = make(tmp_path / "made")[1]
    server.push({"config.json": files["config.json"], "pytorch_model.bin": b"a pickle"})
    message = refusal(lambda: GPT2.from_pretrained(NAME))
    assert "no model.safetensors" in message
    assert "pickle" in message
    assert "convert it once" in message
    assert server.files_asked() == {"config.json"}


def test_a_repository_without_a_config_is_refused(server: Server, tmp_path: Path) -> None:
    files = make(tmp_path / "made")[1]
    server.push({"model.safetensors": files["model.safetensors"]})
    assert "no config.json" in refusal(lambda: GPT2.from_pretrained(NAME))


def test_shards_and_their_index_are_downloaded(server: Server, tmp_path: Path) -> None:
    model, files = make(tmp_path / "made")
    tensors = list(safetensors.torch.load(files.pop("model.safetensors")).items())
    shards = {"model-00001-of-00002.safetensors": tensors[:5], "model-00002-of-00002.safetensors": tensors[5:]}
    index = {"weight_map": {name: shard for shard, part in shards.items() for name, _ in part}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    server.push({**files, **{shard: safetensors.torch.save(dict(part)) for shard, part in shards.items()}})
    loaded = GPT2.from_pretrained(NAME)
    assert same(loaded, model)
    assert loaded.source is not None
    assert set(loaded.source.sha256) == set(shards)


def test_a_download_that_is_cut_once_is_resumed_where_it_stopped(server: Server, published: GPT2) -> None:
    server.faults["/store/"] = iter([cut])
    assert same(GPT2.from_pretrained(NAME), published)
    ranges = [request.range for request in server.requests if "/store/" in request.path]
    assert ranges[0] is None
    assert re.fullmatch(r"bytes=[1-9]\d*-", str(ranges[1]))


def test_a_download_that_is_cut_for_good_is_refused_and_never_taken_for_whole(server: Server, published: GPT2) -> None:
    server.faults["/store/"] = repeat(cut)
    assert f"The download of {NAME} failed" in refusal(lambda: GPT2.from_pretrained(NAME))
    assert "not in the local cache" in refusal(lambda: GPT2.from_pretrained(NAME, local_files_only=True))
    server.faults.clear()
    assert same(GPT2.from_pretrained(NAME), published)


@pytest.mark.parametrize("where", ["/revision/", "/tree/", "/resolve/", "/store/"])
def test_a_hub_out_of_order_is_told_in_one_sentence(server: Server, published: GPT2, where: str) -> None:
    server.faults[where] = repeat(fail)
    assert NAME in refusal(lambda: GPT2.from_pretrained(NAME))
    assert server.was_asked(where)


@pytest.mark.parametrize("where", ["/revision/", "/tree/", "/resolve/", "/store/"])
def test_a_login_page_in_place_of_the_hub_is_told_in_one_sentence(server: Server, published: GPT2, where: str) -> None:
    server.faults[where] = repeat(show_login_page)
    assert NAME in refusal(lambda: GPT2.from_pretrained(NAME))
    assert server.was_asked(where)


def test_a_transfer_that_xet_gives_up_is_told_in_one_sentence(server: Server, published: GPT2) -> None:
    pytest.importorskip("hf_xet")
    server.faults["/resolve/"] = repeat(send_to_xet)
    server.faults["/xet-token"] = repeat(give_xet_token)
    server.faults["/reconstructions/"] = repeat(lambda answer: answer.send(403))
    assert NAME in refusal(lambda: GPT2.from_pretrained(NAME))
    assert server.was_asked("/reconstructions/")


def send_to_xet(answer: Answer) -> None:
    commit = answer.server.repositories[NAME].refs["main"]
    route = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{answer.server.endpoint}/xet-token"}
    answer.send(200, {"X-Repo-Commit": commit, "ETag": '"b"', "X-Linked-Size": "1000", **route})


def give_xet_token(answer: Answer) -> None:
    token = {"X-Xet-Access-Token": "token", "X-Xet-Token-Expiration": "4000000000"}
    answer.send(200, {"X-Xet-Cas-Url": answer.server.endpoint, **token})


def test_a_short_name_stands_for_its_repository(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no folder has that name
    model, files = make(tmp_path / "made")
    server.push(files, name="openai-community/gpt2")
    loaded = GPT2.from_pretrained("gpt2")
    assert same(loaded, model)
    assert loaded.source is not None
    assert (loaded.source.name, loaded.source.repository) == ("gpt2", "openai-community/gpt2")
    assert server.repositories.keys() == {"openai-community/gpt2"}


def test_a_downloaded_folder_knows_its_origin_and_needs_no_network(
    server: Server, published: GPT2, tmp_path: Path
) -> None:
    commit = server.repositories[NAME].refs["main"]
    folder = tmp_path / "copies" / "tiny"
    assert hub.download(NAME, folder) == (folder, NAME, commit)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "origin.json"}
    assert not any(file.is_symlink() for file in folder.iterdir())
    server.requests.clear()
    assert hub.find(folder) == (folder, NAME, commit)
    loaded = GPT2.from_pretrained(folder)
    assert same(loaded, published)
    assert loaded.source is not None
    assert (loaded.source.repository, loaded.source.commit) == (NAME, commit)
    assert server.requests == []


def test_a_download_takes_its_own_files_from_a_cache_that_others_filled(
    server: Server, published: GPT2, tmp_path: Path
) -> None:
    huggingface_hub.snapshot_download(NAME)
    hub.download(NAME, tmp_path / "tiny")
    names = {file.name for file in (tmp_path / "tiny").iterdir()}
    assert names == {"config.json", "model.safetensors", "origin.json"}


def test_a_download_of_a_revision_is_noted_by_its_commit(server: Server, published: GPT2, tmp_path: Path) -> None:
    commit = server.push(make(tmp_path / "other", seed=1)[1], "v2")
    assert hub.download(NAME, tmp_path / "tiny", revision="v2").commit == commit
    assert hub.find(tmp_path / "tiny").commit == commit


def test_a_download_into_a_used_folder_leaves_no_old_weights_beside_the_new(
    server: Server, published: GPT2, tmp_path: Path
) -> None:
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    assert "choose another folder" in refusal(lambda: hub.download(NAME, tmp_path))
    (tmp_path / "origin.json").write_text(json.dumps({"repository": NAME, "commit": "an older one"}))
    hub.download(NAME, tmp_path)
    names = {file.name for file in tmp_path.iterdir() if file.is_file()}
    assert names == {"config.json", "model.safetensors", "origin.json", "notes.txt"}
    assert same(GPT2.from_pretrained(tmp_path), published)


def test_a_download_into_what_is_no_folder_is_refused(server: Server, published: GPT2, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert "taken cannot be written" in refusal(lambda: hub.download(NAME, tmp_path / "taken"))


def test_a_download_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    assert "is a folder already" in refusal(lambda: hub.download(str(tmp_path / "from"), tmp_path / "to"))


@pytest.mark.parametrize("note", [None, "", "[]", "{}", '{"repository": "a/b"}', "null", "\x00"])
def test_a_folder_without_a_whole_note_has_no_known_origin(tmp_path: Path, note: str | None) -> None:
    if note is not None:
        (tmp_path / "origin.json").write_text(note)
    assert hub.find(tmp_path) == (tmp_path, None, None)


@pytest.fixture
def words(server: Server, published: GPT2) -> Server:
    """The published model with a tokenizer beside it."""
    repository = server.repositories[NAME]
    tokenizer = (TINY / "tokenizer.json").read_bytes()
    server.push({**repository.commits[repository.refs["main"]], "tokenizer.json": tokenizer})
    return server


def test_a_tokenizer_is_downloaded_without_the_weights(words: Server) -> None:
    expected = Tokenizer.from_pretrained(TINY).encode("three one two")
    assert Tokenizer.from_pretrained(NAME).encode("three one two") == expected
    assert words.files_asked() == {"tokenizer.json"}


def test_a_cached_tokenizer_is_not_taken_for_a_cached_model(words: Server) -> None:
    Tokenizer.from_pretrained(NAME)
    assert "not in the local cache" in refusal(lambda: GPT2.from_pretrained(NAME, local_files_only=True))


def test_a_cached_model_brings_its_tokenizer_along(words: Server) -> None:
    GPT2.from_pretrained(NAME)
    words.requests.clear()
    tokenizer = Tokenizer.from_pretrained(NAME, local_files_only=True)
    assert tokenizer.encode("two") == Tokenizer.from_pretrained(TINY).encode("two")
    assert words.requests == []


def test_a_repository_without_a_tokenizer_is_refused(server: Server, published: GPT2) -> None:
    assert "no tokenizer.json" in refusal(lambda: Tokenizer.from_pretrained(NAME))
