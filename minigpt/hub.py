"""A name -> a local directory. huggingface_hub does the download, the cache, the offline mode, the token."""

import difflib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from minigpt.checkpoint import CONFIG, ORIGIN
from minigpt.config import CheckpointError
from minigpt.files import read_json, write_together

ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "reference.safetensors",
    "tokenizer_config.json",
    *TOKENIZER_FILES,
)
DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES}


class Found(NamedTuple):
    """A local directory, and the hub repository and commit that it holds, where they are known."""

    directory: Path
    repository: str | None
    commit: str | None


def find(
    name_or_path: str | Path,
    revision: str | None = None,
    local_files_only: bool = False,
    files: tuple[str, ...] = FILES,
) -> Found:
    """The local directory of a checkpoint.

    A directory is used as it is and never touches the network. Anything else is a short name
    (`gpt2`, ...) or a hub id: `files` of it are downloaded into huggingface_hub's cache.

    Raises CheckpointError when there is no such directory, repository or revision, when access is gated, when
    the hub cannot be reached and the cache does not hold the files, or when a file is not as it was announced.
    """
    name = str(name_or_path)
    if _is_folder(name):
        path = Path(name).expanduser()
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} was given with the folder {path}; it needs a hub id.")
        return Found(path, *_origin(path))
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name!r} is not a folder; expected a folder, {', '.join(ALIASES)}, or a hub id.")
    repository = ALIASES.get(name, name)
    known = {announced for file in _cached(repository) if (announced := _announced(file))}
    try:
        with _impatient():
            snapshot = snapshot_download(
                repository, revision=revision, local_files_only=local_files_only, allow_patterns=list(files)
            )
    except Exception as error:  # the client and its transfer engine raise many kinds, bare RuntimeError among them
        offline = local_files_only or constants.HF_HUB_OFFLINE
        raise CheckpointError(_explain(error, repository, revision, offline)) from None
    finally:
        wrong = [file.name for file in _cached(repository) if _announced(file) not in known and not _is_right(file)]
    if wrong:
        raise CheckpointError(_altered(repository, wrong))
    return Found(Path(snapshot), repository, Path(snapshot).name)


@contextmanager
def _impatient() -> Iterator[None]:
    """Let no request wait for ever: the client sets no limit on some, and a hub that is silent would hold us.

    The limit is on silence, not on the whole; it is the client's of this process, also for others who use it now.
    """

    def limit(request: Any) -> None:
        limits = request.extensions.setdefault("timeout", {})
        for step in ("connect", "read", "write", "pool"):
            if limits.get(step) is None:
                limits[step] = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)

    hooks = get_session().event_hooks
    get_session().event_hooks = {**hooks, "request": [*hooks.get("request", []), limit]}
    try:
        yield
    finally:
        get_session().event_hooks = hooks


def _cached(repository: str) -> list[Path]:
    """The files of a repository in the client's cache; none of what can be no repository."""
    try:
        folder = repo_folder_name(repo_id=repository, repo_type="model")
    except HFValidationError:
        return []
    return sorted(Path(constants.HF_HUB_CACHE, folder, "snapshots").glob("*/*"))


def _announced(file: Path) -> str | None:
    """The sha256 that the hub announced of a large file in the cache: the name of the blob that it links to."""
    name = file.readlink().name if file.is_symlink() else ""
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def _is_right(file: Path, copy: Path | None = None) -> bool:
    """Whether a file in the cache, or a copy of it, has the sha256 that was announced; if not, the cache forgets it.

    The client itself counts bytes and does not compare them.
    """
    announced = _announced(file)
    if announced is None or not file.exists():
        return True
    with (copy or file).open("rb") as stream:
        right = hashlib.file_digest(stream, "sha256").hexdigest() == announced
    if not right:
        (file.parent.parent.parent / "blobs" / announced).unlink(missing_ok=True)
        file.unlink()
    return right


def _altered(repository: str, names: Iterable[str]) -> str:
    return f"{', '.join(names)} of {repository} did not arrive as the hub announced it (another sha256); try again."


def _copy(repository: str, file: Path, to: Path) -> None:
    shutil.copyfile(file, to)
    if not _is_right(file, to):
        raise CheckpointError(_altered(repository, [file.name]))


def _is_folder(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().is_dir()
    except (OSError, RuntimeError):  # too long for a path, or an unknown user after ~
        return False


def download(name: str, to: Path, revision: str | None = None) -> Found:
    """Fetch a hub checkpoint into the folder `to`, with a note of its repository and commit beside it.

    Raises CheckpointError as `find` does, and when `to` cannot be written or holds another checkpoint.
    """
    found = find(name, revision)
    if found.repository is None:
        raise CheckpointError(f"{name} is a folder already; expected {', '.join(ALIASES)}, or a hub id.")
    if _is_folder(str(to)) and _matching(to) and _origin(to)[0] != found.repository:
        raise CheckpointError(f"{to} holds a checkpoint that is not {found.repository}; choose another folder.")
    origin = json.dumps({"repository": found.repository, "commit": found.commit}, indent=2) + "\n"
    files: dict[str, Callable[[Path], object]] = {ORIGIN: lambda file: file.write_text(origin, encoding="utf-8")}
    files |= {file.name: partial(_copy, found.repository, file) for file in _matching(found.directory)}
    try:
        stale = {file.name for file in _matching(to)} - files.keys() if to.exists() else set()
        write_together(to, files, key=CONFIG, stale=stale)
    except OSError as error:
        raise CheckpointError(f"{to} cannot be written: {error.strerror or error}.") from None
    return Found(to, found.repository, found.commit)


def _matching(directory: Path) -> list[Path]:
    """The files of a folder that belong to a checkpoint, whatever else lies there."""
    return sorted(file for pattern in FILES for file in directory.glob(pattern))


def _origin(directory: Path) -> tuple[str | None, str | None]:
    """The repository and commit that `download` noted in a folder."""
    try:
        noted = read_json(directory / ORIGIN)
        return str(noted["repository"]), str(noted["commit"])
    except (OSError, ValueError, LookupError, TypeError):
        return None, None


def _folders_like(name: str) -> list[str]:
    """The folders beside the one of that name, if it were one, whose names are much like it."""
    parent = Path(name).parent
    try:
        beside = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return []
    return [str(parent / near) for near in difflib.get_close_matches(Path(name).name, beside)]


def _explain(error: Exception, repository: str, revision: str | None, offline: bool) -> str:
    where = f"{repository} (revision {revision})" if revision else repository
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the hub did answer; what it said is the better reason
    reason = str(error).partition("\n")[0]
    match error:
        case HFValidationError():
            return f"{repository!r} is neither a folder nor a hub id such as openai-community/gpt2."
        case GatedRepoError():
            return f"{repository} is gated: ask for access on its page, then set HF_TOKEN or run `hf auth login`."
        case RevisionNotFoundError():
            return f"{repository} has no revision {revision!r}; name a branch, a tag or a full commit."
        case RepositoryNotFoundError():
            return f"There is no folder and no hub repository {repository}; if it is private, set HF_TOKEN."
        case EntryNotFoundError():
            reason = "offline mode is on" if offline else "the hub cannot be reached"
            then = "Give a folder, or download it where there is a network and copy it here."
            if alike := _folders_like(repository):
                then = f"Did you mean {' or '.join(alike)}? {then}"
            return f"{where} is no folder here and not in the local cache, and {reason}. {then}"
        case _:
            disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
            then = f"look at the cache, {constants.HF_HUB_CACHE}, and try again" if disk else "try again"
            return f"The download of {where} failed ({type(error).__name__}: {reason}); {then}, or give a folder."
