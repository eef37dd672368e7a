"""A hub on loopback, which answers the real client as huggingface.co does, on good days and bad."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from minigpt import GPT2, GPT2Config

NAME, TOKEN = "someone/tiny-gpt2", "hf_secret"
SHAPE = GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_head=3, n_layer=2)
NO_PROXY = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits are whole sets of files; refs are branches and tags."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False


@dataclass
class Request:
    path: str
    token: str | None
    range: str | None


class HubError(Exception):
    """An answer with the hub's error headers."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class Answer(BaseHTTPRequestHandler):
    """One request: the routes of the hub that a download uses, and of the file store behind it."""

    protocol_version = "HTTP/1.1"
    server: "Server"
    sent = 1.0  # the part of a body that leaves before the connection is closed
    extra = 0  # bytes that the header counts and the body does not have
    altered = False  # a bit of the body is another one
    silent = False  # after the body's part nothing more happens, until the server stops

    def do_GET(self) -> None:
        self.server.requests.append(Request(self.path, self.headers["Authorization"], self.headers["Range"]))
        for part, faults in self.server.faults.items():
            if part in self.path and (fault := next(faults, None)):
                return fault(self)
        return self.answer()

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self) -> None:
        try:
            self.route(unquote(urlsplit(self.path).path))
        except HubError as error:
            self.send(error.status, error.headers)

    def route(self, path: str) -> None:
        if match := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            repository, commit = self.look_up(*match.groups())
            siblings = [{"rfilename": file} for file in repository.commits[commit]]
            self.send_json({"id": match[1], "sha": commit, "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/(.+?)/tree/(.+)", path):
            repository, commit = self.look_up(*match.groups())
            self.send_json([listed(file, content) for file, content in repository.commits[commit].items()])
        elif match := re.fullmatch(r"/(store/)?(.+?)/resolve/(.+?)/(.+)", path):
            self.send_file(bool(match[1]), *match.groups()[1:])
        else:
            self.send(404)

    def look_up(self, name: str, revision: str) -> tuple[Repository, str]:
        if name not in self.server.repositories:
            raise HubError(401, "RepoNotFound", "Repository not found")
        repository = self.server.repositories[name]
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def send_file(self, from_store: bool, name: str, revision: str, file: str) -> None:
        repository, commit = self.look_up(name, revision)
        if file not in repository.commits[commit]:
            raise HubError(404, "EntryNotFound", "Entry not found")
        content = repository.commits[commit][file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if from_store:
            self.send_part(content)
        elif repository.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise HubError(403, "GatedRepo", "Access to this model is restricted")
        elif is_large(file):
            linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
            # Another host name, as the real store's: the client must not take its token there.
            location = f"http://localhost:{self.server.server_port}/store{self.path}"
            self.send(302, {"X-Repo-Commit": commit, "Location": location, **linked})
        else:
            self.send(200, {"X-Repo-Commit": commit, "ETag": etag}, content)

    def send_part(self, content: bytes) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.send(206 if start else 200, part, content[start:])

    def send_json(self, value: object) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + self.extra))
        self.send_header("Connection", "close")  # or an idle connection would outlive a stopped server
        self.end_headers()
        if self.altered and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.command == "GET":
            self.wfile.write(body[: int(self.sent * len(body))])
        if self.silent:
            self.server.stopped.wait()

    def log_message(self, *_: object) -> None:
        pass


Fault = Callable[[Answer], None]


def fail(answer: Answer) -> None:
    answer.send(500, {"Content-Type": "text/plain"}, b"out of order")


def cut(answer: Answer) -> None:
    answer.sent = 0.5
    answer.answer()


def show_login_page(answer: Answer) -> None:
    answer.send(200, {"Content-Type": "text/html"}, b"<html>Welcome to the hotel's network</html>")


def listed(file: str, content: bytes) -> dict[str, object]:
    """A file as the hub's tree lists it."""
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}} if is_large(file) else {}
    return {"type": "file", "path": file, "size": len(content), "oid": digest[:40], **lfs}


def is_large(file: str) -> bool:
    return file.endswith((".safetensors", ".bin", ".onnx"))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: dict[str, Iterator[Fault]] = {}  # part of a path -> what happens instead, request by request
        self.stopped = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def push(self, files: Files, *refs: str, name: str = NAME) -> str:
        """Commit files to a repository; returns the commit."""
        commit = hashlib.sha1(b"".join(files.values())).hexdigest()
        repository = self.repositories.setdefault(name, Repository())
        repository.commits[commit] = files
        repository.refs |= dict.fromkeys(refs or ("main",), commit)
        return commit

    def files_asked(self) -> set[str]:
        return {request.path.rpartition("/")[2] for request in self.requests if "/resolve/" in request.path}

    def was_asked(self, part: str) -> bool:
        return any(part in request.path for request in self.requests)

    def stop(self) -> None:
        if self.thread.is_alive():
            self.stopped.set()
            self.shutdown()
            self.thread.join()
            self.server_close()


def point_at(endpoint: str, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the client of this process know no other hub, with an empty cache and no pauses between retries."""
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": False,
        "DOWNLOAD_CHUNK_SIZE": 1024,  # so that a cut download of a small file leaves a part behind
    }.items():
        patch.setattr(constants, name, value)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        patch.delenv(variable, raising=False)
    for variable, value in {**NO_PROXY, "HF_HOME": str(home)}.items():  # HF_HOME: hf_xet reads it itself
        patch.setenv(variable, value)
    for module in ("utils._http", "file_download"):
        patch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda _: None))
    huggingface_hub.close_session()  # the client that is kept read the proxies when it was made


def make(folder: Path, seed: int = 0, **fields: float) -> tuple[GPT2, Files]:
    """A small random model as loaded from a folder, and the files there; `fields` are those of its shape."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        GPT2(replace(SHAPE, **fields)).save_pretrained(folder)
    return GPT2.from_pretrained(folder), {file.name: file.read_bytes() for file in folder.iterdir()}
