"""Kills at any moment: what has a final name is whole, and the same command again ends the work.

The work is done by children of one process that has imported everything, so that a kill costs milliseconds. Ten of
the thirty moments are spread over the whole work, ten over the times between the child's touches of its folder, both
by SIGKILL from outside; the last ten are just before it moves or removes something.
"""

import gc
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import typer

from experiments.divergence import study as divergence
from experiments.harness import corpus, digest, writing
from experiments.tools import train
from minigpt import GPT2, CheckpointError, GPT2Config, checkpoint, cli, files, hub
from minigpt.checkpoint import CONFIG, ORIGIN, WEIGHTS
from minigpt.files import open_tensors
from tests.conftest import ROOT, TINY
from tests.hub_server import NAME, SHAPE, Files, Server, make, point_at

if not hasattr(os, "fork"):
    pytest.skip("children are forked", allow_module_level=True)

KILLS = 30
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir"}
"""Audit events of Python by which a folder is changed."""
TOUCHES = CHANGES | {"open", "os.chmod", "os.listdir", "os.scandir", "shutil.rmtree", "shutil.copyfile", "tests.wrote"}
"""And those by which a folder is read, and files in it are written."""
TRAINING = "--n-layer 1 --n-embd 12 --n-head 2 --n-positions 8 --vocab-size 270 --batch 4 --warmup-steps 10"
STEPS = 4

Call = tuple[Callable[..., object], *tuple[object, ...]]


# Children, and what they do.


class Nursery:
    """A process with everything imported, and one thread, which forks a child for every piece of work."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.test_kills import nurse; nurse()"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == 1, "more threads than one: a fork would copy their locks"

    def start(self, log: Path, *calls: Call) -> int:
        """Let a child make some calls, one after another; its standard error goes into a file. Returns its id."""
        named = [[module_of(function), function.__name__, *map(str, arguments)] for function, *arguments in calls]
        return self._ask({"log": str(log), "calls": named})

    def wait(self, child: int) -> int:
        """The exit code of a child when it has ended; below 0 for a signal."""
        return self._ask(child)

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, question: object) -> int:
        assert self.process.stdin is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


def module_of(function: Callable[..., object]) -> str:
    """Where any process finds a function: pytest imports tests by another name."""
    return f"tests.{function.__module__.removeprefix('tests.')}"


def nurse() -> None:
    """The nursery's life: for calls it answers with a child's process id, for a process id with its exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    torch.set_num_threads(1)
    import_late_modules()
    digest._of_packages()  # which every child would take half a second for
    gc.freeze()  # or every child copies what its first collection looks at
    threads = Path("/proc/self/task")
    print(len(list(threads.iterdir())) if threads.exists() else 1, file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(question, 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                live(**question)
        print(answer, file=answers, flush=True)


def import_late_modules() -> None:
    """Import what the works import late, so that no child has to: the first child tells. It may start threads."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder))
            for work in (study, training):
                with suppress(SystemExit):
                    work(f"{folder}/out", folder)
        os.write(writer, " ".join(sys.modules).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        for name in file.read().split():
            with suppress(Exception):
                importlib.import_module(name)
    os.wait()


def live(log: str, calls: list[list[str]]) -> None:
    """A child's life, which ends here."""
    code: Any = 1
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    try:
        for module, name, *arguments in calls:
            getattr(importlib.import_module(module), name)(*arguments)
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def lay_out(home: Path) -> None:
    """A model for the study, texts for a corpus run, and a corpus for the training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2(GPT2Config(vocab_size=4096, n_positions=32, n_embd=12, n_head=2, n_layer=3)).save_pretrained(home / "m")
    shutil.copyfile(TINY / "tokenizer.json", home / "m" / "tokenizer.json")
    (home / "corpus").mkdir()
    lines = [f"Seven sheep and {count} dogs went over the hill.\n" for count in range(60)]
    (home / "corpus" / "book.txt").write_text("".join(lines))


def study(output: str, home: str, *options: str) -> None:
    """The study of a small model, without the drawings and with few resamples, which take longer than all the rest."""
    writing._draw, corpus.RESAMPLES = lambda *_: None, 50
    divergence.can_draw = lambda: False
    own = ["--model", f"{home}/m", "--output", output, "--no-parity", "--no-predictions", "--factors", "0.8"]
    sys.argv = ["study", *own, *options]
    cli.run(divergence.main)


def training(output: str, home: str) -> None:
    """A short training that saves its state at every second step; without the reference, which takes transformers."""
    train.SAVE_EVERY, train.HELD_OUT_WINDOWS, train.save_reference = 2, 20, lambda *_: None
    own = ["--corpus", f"{home}/corpus", "--output", output, "--tokens", str(STEPS * 32)]
    sys.argv = ["train", *own, *TRAINING.split()]
    cli.run(lambda: typer.run(train.main))


def download(output: str, home: str, endpoint: str, revision: str, name: str = NAME) -> None:
    """`minigpt download` from a hub on loopback."""
    point_at(endpoint, Path(home), pytest.MonkeyPatch())
    sys.argv = ["minigpt", "download", name, "--to", output, "--revision", revision]
    cli.main()


def save(output: str, seed: str, epsilon: str) -> None:
    """A model's `save_pretrained`."""
    torch.manual_seed(int(seed))
    model = GPT2(replace(SHAPE, layer_norm_epsilon=float(epsilon)))
    cli.run(lambda: model.save_pretrained(output))


def save_as_downloaded(output: str) -> None:
    """Another model, with a note of where it came from."""
    with suppress(SystemExit):
        save(output, "0", "1e-5")
    (Path(output) / ORIGIN).write_text(json.dumps({"repository": NAME, "commit": "0" * 40}))


# What is done to them.


def at_every_touch(folder: str, then: Callable[[int, str], object]) -> None:
    """Call `then` with a number and the event whenever this process is about to touch a folder or what is in it."""
    touched = itertools.count()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in TOUCHES and any(str(argument).startswith(folder) for argument in arguments):
            then(next(touched), event)

    sys.addaudithook(hook)


def note_touches(folder: str, notes: str) -> None:
    file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    at_every_touch(folder, lambda _, event: os.write(file, f"{time.monotonic()} {event}\n".encode()))


def signal_at_touch(folder: str, number: str, name: str = "SIGKILL") -> None:
    at_every_touch(folder, lambda touch, _: touch == int(number) and os.kill(os.getpid(), signal.Signals[name]))


def write_in_place() -> None:
    """Sabotage: everything is written under its final name, half by half."""

    def write_slowly(path: Path, write: Callable[[Path], object]) -> None:
        with tempfile.TemporaryDirectory() as elsewhere:
            whole = Path(elsewhere) / path.name
            write(whole)
            content = whole.read_bytes()
        half = len(content) // 2
        with path.open("wb", buffering=0) as file:
            for part in (content[:half], content[half:]):
                file.write(part)
                sys.audit("tests.wrote", str(path))

    @contextmanager
    def results_in_place(folder: Path) -> Iterator[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder

    files.write_atomically = write_slowly
    writing.results_in = results_in_place
    write_one_by_one()


def write_one_by_one() -> None:
    """Sabotage: what belongs together is written file by file."""

    def each(folder: Path, contents: Mapping[str, Callable[[Path], object]], **_: object) -> None:
        for name, write in contents.items():
            files.write_atomically(folder / name, write)

    hub.write_together = checkpoint.write_together = each


# What must hold.


class Case:
    """One kind of work in one folder, from an old run to a new one, and how what it leaves is checked."""

    def __init__(
        self, kind: str, nursery: Nursery, home: Path, folder: Path, work: Call, old: Call | None, check: "Check"
    ) -> None:
        self.kind, self.nursery, self.home, self.folder, self.work, self.check = (
            kind,
            nursery,
            home,
            folder,
            work,
            check,
        )
        self.log, self.before, self.notes = home / "log", home / "before", home / "touches"
        if old:
            assert self.run(work=old) == 0, self.said
            shutil.copytree(self.folder, self.before)
        self.old = contents(self.folder)
        begun = time.monotonic()
        assert self.run((note_touches, self.folder, self.notes)) == 0, self.said
        self.duration = time.monotonic() - begun
        notes = [line.split() for line in self.notes.read_text().splitlines()]
        self.touches = [float(moment) - begun for moment, _ in notes]
        self.changes = [number for number, (_, event) in enumerate(notes) if event in CHANGES]
        self.new = contents(self.folder)
        assert seen(self.folder) == self.new, "nothing hidden stays"

    @property
    def said(self) -> str:
        return self.log.read_text()

    def run(self, *first: Call, work: Call | None = None) -> int:
        """The command to its end, after some other calls; its exit code."""
        return self.nursery.wait(self.nursery.start(self.log, *first, work or self.work))

    def lay_old(self) -> None:
        """Nothing but the old run's files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.before.exists():
            shutil.copytree(self.before, self.folder)

    def moments(self, random: Random) -> Iterator[float | int]:
        """Seconds after the start, or the number of a touch."""
        changes = itertools.cycle(random.sample(self.changes, len(self.changes)))
        for _ in range(KILLS // 3):
            yield random.uniform(0, self.duration)
            start = random.randrange(len(self.touches) - 1)
            yield random.uniform(*self.touches[start : start + 2])
            yield next(changes)

    def kill(self, moment: float | int, *first: Call) -> bool:
        """Start from the old run and kill at a moment; whether it was not too late."""
        self.lay_old()
        shutil.rmtree(self.home / "cache", ignore_errors=True)  # of the hub
        if isinstance(moment, int):
            return self.run(*first, (signal_at_touch, self.folder, moment)) < 0
        begun = time.monotonic()
        child = self.nursery.start(self.log, *first, self.work)
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        os.kill(child, signal.SIGKILL)
        return self.nursery.wait(child) < 0

    def check_end(self) -> None:
        """The same command, without any cleaning by hand, leaves what an undisturbed run leaves, and no more."""
        assert self.run() == 0, self.said
        assert contents(self.folder) == self.new

    def notices(self, sabotage: Callable[[], None]) -> bool:
        """Whether one of thirty kills is noticed when the work is sabotaged."""
        self.lay_old()
        assert self.run((sabotage,), (note_touches, self.folder, self.notes)) == 0, self.said
        touches = range(len(self.notes.read_text().splitlines()))
        for touch in Random(0).sample(touches, min(KILLS, len(touches))):
            self.kill(touch, (sabotage,))
            try:
                self.check(self, seen(self.folder))
            except (AssertionError, ValueError):  # a file that cannot be read is noticed, too
                return True
        return False


Check = Callable[[Case, Files], None]
"""Looks at the files with final names that were left."""


def contents(folder: Path) -> Files:
    """Every file below a folder, byte for byte; of a file, itself."""
    found = folder.rglob("*") if folder.is_dir() else [folder]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found) if path.is_file()}


def seen(folder: Path) -> Files:
    """The files with final names."""
    return {
        name: content for name, content in contents(folder).items() if "." not in {part[0] for part in Path(name).parts}
    }


def check_whole(case: Case, there: Files) -> None:
    for name, content in there.items():
        assert content in (case.old.get(name), case.new.get(name)), f"{name} is neither the old one nor the new one"


def check_checkpoint(case: Case, there: Files) -> None:
    """Every file is whole, and together they are the old model, the new one, or refused; no other claims an origin."""
    check_whole(case, there)
    try:
        GPT2.from_pretrained(case.folder)
    except CheckpointError as error:
        assert CONFIG not in there
        assert "no config.json" in str(error) or not there
        return
    pair = [there[CONFIG], there[WEIGHTS]]
    assert pair in [[run[CONFIG], run[WEIGHTS]] for run in (case.old, case.new) if run], "a mixture"
    if ORIGIN in there:
        assert there in (case.old, case.new)


def check_study(case: Case, there: Files) -> None:
    """Every file is whole, and with a summary they are a finished run."""
    check_whole(case, there)
    if "summary.json" in there:
        assert there in (case.old, case.new)


def check_training(case: Case, there: Files) -> None:
    """The state is one on the way of the undisturbed run, and every other file is its."""
    there = dict(there)
    if there.pop(train.STATE_FILE, None):
        before, whole = (losses_in(folder / train.STATE_FILE) for folder in (case.folder, case.home / "whole"))
        assert before == whole[: len(before)]
        assert len(before) in range(2, STEPS + 1, 2)
    check_whole(case, there)
    if CONFIG in there:
        GPT2.from_pretrained(case.folder)


def losses_in(state: Path) -> list[float]:
    with open_tensors(state) as file:
        return file.get_tensor("losses").tolist()


def case_of(kind: str, nursery: Nursery, server: Server, home: Path, folder: Path | None = None) -> Case:
    """A case of some kind, in a folder of its own."""
    out = folder or home / "out"
    lay_out(home)
    fetch, texts = (download, out, home, server.endpoint), ("--texts", home / "corpus" / "book.txt")
    work, old, check = {
        "save": ((save, out, 1, 1e-3), (save_as_downloaded, out), check_checkpoint),
        "download": ((*fetch, "new"), (*fetch, "old"), check_checkpoint),
        "study": ((study, out, home, "--overwrite"), (study, out, home, "--factors", "0.5"), check_study),
        "corpus": ((study, out, home, *texts, "--window", 16, "--limit", 40), None, check_study),
        "training": ((training, out, home), None, check_training),
    }[kind]
    words = {"tokenizer.json": b"old", "vocab.json": b"{}", "merges.txt": b""}
    server.push({**make(home / "0", 0, layer_norm_epsilon=1e-5)[1], **words}, "old")
    server.push({**make(home / "1", 1, layer_norm_epsilon=1e-3)[1], "tokenizer.json": b"new"}, "new")
    case = Case(kind, nursery, home, out, work, old, check)
    shutil.copytree(out, home / "whole")
    return case


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def make_case(nursery: Nursery, tmp_path: Path) -> Iterator[Callable[[str], Case]]:
    server = Server()
    yield lambda kind: case_of(kind, nursery, server, tmp_path)
    server.stop()


@pytest.mark.parametrize("kind", ["save", "download", "study", "training"])
def test_thirty_kills_leave_whole_files_and_the_same_command_ends_the_work(
    make_case: Callable[[str], Case], kind: str
) -> None:
    case, kills = make_case(kind), 0
    for moment in case.moments(Random(0)):
        while not case.kill(moment):  # it was faster this time
            moment = min(moment, case.duration) / 2
        kills += 1
        case.check(case, seen(case.folder))
        case.check_end()
    assert kills == KILLS


@pytest.mark.parametrize("kind", ["save", "download", "study", "training"])
def test_a_writer_in_place_does_not_survive_thirty_kills(make_case: Callable[[str], Case], kind: str) -> None:
    assert make_case(kind).notices(write_in_place)


@pytest.mark.parametrize("kind", ["save", "download"])
def test_files_that_change_one_by_one_do_not_survive_thirty_kills(make_case: Callable[[str], Case], kind: str) -> None:
    assert make_case(kind).notices(write_one_by_one)
