"""A full disk, a folder that is gone, a hub out of order, two runs at once: a sentence each, and nothing in halves."""

import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from random import Random
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import get_session

from experiments.tools import train
from experiments.tools.train import STATE_FILE
from minigpt import CheckpointError, hub
from tests.conftest import ROOT
from tests.hub_server import NAME, Answer, Fault, Files, Server, fail, make, point_at
from tests.test_kills import (
    Case,
    Nursery,
    at_every_touch,
    case_of,
    check_whole,
    contents,
    download,
    losses_in,
    seen,
    signal_at_touch,
    study,
)

KINDS = ("save", "download", "study", "corpus", "training")
UNFINISHED = ("corpus", "training")
"""Kinds that keep what is done so far."""
INTERRUPTED = 130
A_SENTENCE = 1024
"""Bytes, in which it fits."""
HOW = "; wait for it, or choose another --output."


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def hub_there() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module", params=KINDS)
def whole_case(
    request: pytest.FixtureRequest, nursery: Nursery, hub_there: Server, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    return case_of(request.param, nursery, hub_there, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def case(whole_case: Case) -> Case:
    """A kind of work before it begins."""
    whole_case.lay_old()
    return whole_case


def only(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("whole_case", kinds, indirect=True)


def refusal(case: Case, code: int) -> str:
    """What a command said that could not do its work: one sentence, after what the hub's client says of its own."""
    assert code == 2, case.said
    assert "Traceback" not in case.said
    sentences = [line for line in case.said.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1
    assert case.said.endswith(sentences[0] + "\n")
    assert case.said == sentences[0] + "\n" or "Fetching" in case.said
    return sentences[0]


# Disks.


def limit_files(most: str) -> None:
    """Let no file of this process grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), int(most)))


def test_a_file_that_may_not_grow_is_a_sentence_and_nothing_changes(case: Case) -> None:
    said = refusal(case, case.run((limit_files, A_SENTENCE)))
    assert str(case.folder) in said
    assert "File too large" in said
    assert contents(case.folder) == case.old or case.kind in UNFINISHED
    case.check_end()


@only("download")
def test_a_cache_that_cannot_grow_is_named_and_nothing_changes(case: Case) -> None:
    cache = case.home / "cache"
    shutil.rmtree(cache)
    said = refusal(case, case.run((limit_files, A_SENTENCE)))
    assert "File too large" in said
    assert str(cache) in said
    assert contents(case.folder) == case.old
    assert not list(cache.rglob("*incomplete"))
    case.check_end()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of one megabyte; needs the right to mount."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module", params=KINDS)
def whole_case_on_disk(
    request: pytest.FixtureRequest,
    nursery: Nursery,
    hub_there: Server,
    tmp_path_factory: pytest.TempPathFactory,
    disk: Path,
) -> Iterator[Case]:
    case = case_of(request.param, nursery, hub_there, tmp_path_factory.mktemp("on_disk"), disk / "out")
    yield case
    shutil.rmtree(case.folder, ignore_errors=True)


@pytest.fixture
def case_on_disk(whole_case_on_disk: Case) -> Case:
    whole_case_on_disk.lay_old()
    return whole_case_on_disk


def test_a_full_disk_is_a_sentence_and_where_there_is_room_again_the_work_goes_on(case_on_disk: Case) -> None:
    case, refused = case_on_disk, 0
    ballast = case.folder.parent / "ballast"
    for room in (0, 8192, 32768):
        case.lay_old()
        fill(ballast, room)
        code = case.run()
        if code:
            said = refusal(case, code)
            assert str(case.folder) in said
            assert "No space left on device" in said
            case.check(case, contents(case.folder))
            refused += 1
        assert not code or contents(case.folder) == case.old or case.kind in UNFINISHED
        ballast.unlink()
        case.check_end()
    assert refused


def fill(ballast: Path, room: int) -> None:
    """Leave so many bytes of a disk."""
    with ballast.open("wb", buffering=0) as file:
        left = os.statvfs(ballast)
        file.write(bytes(left.f_bavail * left.f_frsize - room))


def test_a_disk_that_is_read_only_is_a_sentence(case_on_disk: Case) -> None:
    case, disk = case_on_disk, case_on_disk.folder.parent
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        assert str(case.folder) in refusal(case, case.run())
        assert contents(case.folder) == case.old
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def test_a_folder_without_write_permission_is_a_sentence(case: Case) -> None:
    case.folder.mkdir(exist_ok=True)
    case.folder.chmod(0o500)
    if os.access(case.folder, os.W_OK):
        pytest.skip("root may write everywhere")
    try:
        assert str(case.folder) in refusal(case, case.run())
        assert contents(case.folder) == case.old
    finally:
        case.folder.chmod(0o700)


def test_a_folder_that_is_a_file_is_a_sentence(case: Case) -> None:
    shutil.rmtree(case.folder, ignore_errors=True)
    case.folder.write_text("a file")
    try:
        assert str(case.folder) in refusal(case, case.run())
        assert case.folder.read_text() == "a file"
    finally:
        case.folder.unlink()


def remove_at_touch(folder: str, number: str) -> None:
    at_every_touch(folder, lambda touch, _: touch == int(number) and shutil.rmtree(folder, ignore_errors=True))


def test_a_folder_that_is_removed_meanwhile_is_a_sentence_or_made_again(case: Case) -> None:
    for touch in Random(0).sample(range(len(case.touches)), 6):
        case.lay_old()
        code = case.run((remove_at_touch, case.folder, touch))
        if code:
            refusal(case, code)
        there = contents(case.folder)
        check_whole(case, there) if case.kind == "corpus" else case.check(case, there)  # a summary needs no windows
    case.check_end()


# Hubs.


def stall(answer: Answer) -> None:
    answer.server.stopped.wait()


def stall_midway(answer: Answer) -> None:
    answer.sent, answer.silent = 0.5, True
    answer.answer()


def drop(answer: Answer) -> None:
    answer.connection.shutdown(socket.SHUT_RDWR)


def put_off(answer: Answer) -> None:
    answer.send(429)


def put_off_for_an_hour(answer: Answer) -> None:
    answer.send(429, {"Retry-After": "3600"})


def announce_more(answer: Answer) -> None:
    answer.extra = 10
    answer.answer()


def announce_less(answer: Answer) -> None:
    answer.extra = -10
    answer.answer()


def send_another(answer: Answer) -> None:
    answer.altered = True
    answer.answer()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    """Two commits of a model."""
    return [make(tmp_path_factory.mktemp("made"), seed, layer_norm_epsilon=10 ** (seed - 5))[1] for seed in (0, 1)]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A hub that the client of this process is pointed at."""
    server = Server()
    point_at(server.endpoint, tmp_path, monkeypatch)
    yield server
    huggingface_hub.close_session()
    server.stop()


@pytest.mark.parametrize("where", ["/revision/", "/tree/", "/resolve/", "/store/"])
@pytest.mark.parametrize(
    "fault", [stall, stall_midway, drop, fail, put_off, put_off_for_an_hour, announce_more, announce_less, send_another]
)
def test_a_download_from_a_hub_out_of_order_is_a_sentence_and_changes_nothing(
    client: Server, published: list[Files], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Fault, where: str
) -> None:
    old, new = published
    client.push(old)
    hub.download(NAME, tmp_path / "to")
    before = contents(tmp_path / "to")
    shutil.rmtree(tmp_path / "cache")  # the client takes what it has where it cannot ask for more
    client.push(new)
    client.requests.clear()
    client.faults[where] = repeat(fault)
    with monkeypatch.context() as patch:
        hurry(patch, where)
        with pytest.raises(CheckpointError, match=NAME) as refused:
            hub.download(NAME, tmp_path / "to")
    assert "\n" not in str(refused.value)
    assert client.was_asked(where)
    assert contents(tmp_path / "to") == before
    client.faults.clear()
    hub.download(NAME, tmp_path / "to")
    there = contents(tmp_path / "to")
    assert there.pop("origin.json") != before["origin.json"]
    assert there == new


def hurry(patch: pytest.MonkeyPatch, where: str) -> None:
    """Let the client wait a moment for what is asked there, and as long as ever for the rest."""

    def limit(request: Any) -> None:
        if where in request.url.path:
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), 0.05)

    hooks = get_session().event_hooks
    patch.setattr(get_session(), "event_hooks", {**hooks, "request": [*hooks["request"], limit]})


# Interrupts.


@only("study", "corpus", "training")
def test_an_interrupt_says_so_and_the_same_command_goes_on(case: Case) -> None:
    for touch in Random(0).sample(range(len(case.touches)), 4):
        case.lay_old()
        assert case.run((signal_at_touch, case.folder, touch, "SIGINT")) == INTERRUPTED, case.said
        assert case.said == "Interrupted.\n"
        case.check(case, seen(case.folder))
        case.check_end()


@only("corpus", "training")
def test_what_was_finished_before_an_interrupt_is_kept(case: Case) -> None:
    """Shards as files, steps as a state from which the same command goes on."""
    assert case.run((signal_at_touch, case.folder, 2 * len(case.touches) // 3, "SIGINT")) == INTERRUPTED
    kept = {path: path.stat().st_ino for path in case.folder.rglob("0*.safetensors")}
    steps = 0 if case.kind == "corpus" else len(losses_in(case.folder / STATE_FILE))
    assert kept or steps
    assert case.run((refuse_steps_before, steps)) == 0, case.said
    assert contents(case.folder) == case.new
    assert all(path.stat().st_ino == inode for path, inode in kept.items())


def refuse_steps_before(first: str) -> None:
    take = train.take_step

    def take_new(*arguments: Any) -> float:
        assert arguments[-1] >= int(first)
        return take(*arguments)

    train.take_step = take_new


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux's /proc tells when torch is being loaded")
@pytest.mark.parametrize(
    ("program", "later"),
    [
        ((sys.executable, "-m", "experiments.divergence"), 0.0),
        ((sys.executable, "-m", "experiments.divergence"), 0.5),
        ((sys.executable, "-m", "experiments.train"), 0.1),
        ((str(Path(sys.executable).parent / "minigpt"),), 0.0),
        ((str(Path(sys.executable).parent / "minigpt"),), 0.5),
    ],
)
def test_an_interrupt_while_a_program_is_still_importing_says_so(
    tmp_path: Path, program: tuple[str, ...], later: float
) -> None:
    command = [*program, "--output", str(tmp_path / "out")]
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listening
    ) as process:
        while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.002)
        time.sleep(later)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate() == (None, "Interrupted.\n")
        assert process.returncode == INTERRUPTED


# Two at once.


def stop_at_touch(folder: str, number: str) -> None:
    def stop(touch: int, _: str) -> None:
        if touch == int(number):
            os.write(2, b"stopped")
            os.kill(os.getpid(), signal.SIGSTOP)

    at_every_touch(folder, stop)


@only("study", "corpus", "training")
def test_a_folder_in_use_is_refused_and_free_as_soon_as_its_user_was_killed(case: Case) -> None:
    log = case.home / "first"
    log.unlink(missing_ok=True)
    first = case.nursery.start(log, (stop_at_touch, case.folder, len(case.touches) // 2), case.work)
    try:
        while "stopped" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.005)
        before = contents(case.folder)
        assert refusal(case, case.run()) == f"Error: {case.folder} is in use by another run{HOW}"
        assert contents(case.folder) == before
    finally:
        os.kill(first, signal.SIGKILL)
        case.nursery.wait(first)
    case.check_end()


@only("study", "corpus", "training")
def test_of_two_at_the_same_moment_one_is_refused_or_comes_after_the_other(case: Case) -> None:
    random, log, work = Random(0), case.home / "first", case.work
    other = (*work, "--factors", "0.6") if case.kind == "study" else work
    assert case.run(work=other) == 0
    ends = [case.new, contents(case.folder)]
    for _ in range(4):
        case.lay_old()
        first = case.nursery.start(log, other)
        time.sleep(random.choice((0, random.uniform(0, case.duration))))
        codes = [case.run(), case.nursery.wait(first)]
        assert sorted(codes) in ([0, 0], [0, 2]), case.said + log.read_text()
        for code, said in zip(codes, (case.said, log.read_text()), strict=True):
            assert said == (f"Error: {case.folder} is in use by another run{HOW}\n" if code else "")
        assert contents(case.folder) in ends


# What is written, and where.


def allow_everything() -> None:
    os.umask(0)


def test_no_file_may_be_written_by_others_whatever_the_umask(case: Case) -> None:
    assert case.run((allow_everything,)) == 0
    files = [path for path in case.folder.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def enter(folder: str) -> None:
    os.chdir(folder)


@pytest.mark.parametrize("text", ["../../x", "a/b", "con", "a\0b", "a\nb", "/x", "~/x", "x" * 5000, "\udcff", "-"])
@only("study")
def test_no_prompt_and_no_name_of_a_model_leads_out_of_the_output_folder(
    case: Case, hub_there: Server, text: str
) -> None:
    home, deep = case.home, case.home / "deep" / "er"
    deep.mkdir(parents=True, exist_ok=True)
    before = outside(case)
    for work in (
        (study, case.folder, home, "--overwrite", "--prompt", f"{text} {text}"),
        (study, case.folder, home, "--overwrite", "--model", text),
        (download, home / "to", home, hub_there.endpoint, "main", text),
    ):
        assert case.run((enter, deep), work=work) in (0, 2), case.said
        assert "Traceback" not in case.said
        assert outside(case) == before


def outside(case: Case) -> set[str]:
    inside = {name for name in contents(case.home) if Path(name).parts[0] not in {"out", "log", "to", "cache"}}
    return inside | {str(path) for path in case.home.parent.iterdir()}
