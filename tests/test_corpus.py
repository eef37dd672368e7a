"""Corpus runs: texts into windows, windows into shards, shards shared by ranks that may be killed."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.divergence import study as divergence
from experiments.harness import writing
from experiments.harness.corpus import SHARD_WINDOWS, STATISTICS, Shards, Texts, batched, read_texts, summarise
from experiments.harness.experiment import SHORTEST
from minigpt import GPT2, Tokenizer, sweep
from tests.conftest import ROOT, TINY
from tests.test_study import run_main

Run = Callable[..., tuple[int, str, str]]
SENTENCE = "The old man opened the door and looked out at the sea, and he was not afraid of it. "
GRID = ("--window", "16", "--factors", "0.5,0.8,1.5", "--no-parity", "--no-predictions")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the study on weights/tiny with these arguments added, without drawing."""
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    return lambda *arguments: run_main(divergence.main, monkeypatch, capfd, "--model", TINY, *arguments)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text a line, of growing length: more than 20 shards of windows of 16 tokens."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    words = (SENTENCE * 3).split(" ")
    lines = [" ".join(words[number % 11 : number % 11 + 3 + number % 37]) for number in range(260)]
    path.write_text("\n".join([*lines, "", "a"]) + "\n")
    return path


# Texts and windows.


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    texts = ["One, two.", 'He said "no".', "drei \N{LATIN SMALL LETTER U WITH DIAERESIS}ber vier", ""]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in texts) + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(text, ensure_ascii=False) for text in texts), "utf-8")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([str(number), text] for number, text in enumerate(texts))])
    for name in ("a.txt", "a.jsonl", "b.jsonl", "a.csv"):
        assert list(read_texts(tmp_path / name, "text")) == texts, name


def test_a_csv_field_may_hold_many_lines_and_another_column_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('body,id\n"one\ntwo",1\nthree,2\n')
    assert list(read_texts(tmp_path / "a.csv", "body")) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "one"}\n', "line 1 has no text in 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "no text in 'text'"),
        ("a.csv", b"id,body\n1,one\n", "no column 'text', but 'id', 'body'"),
        ("a.csv", b"", "no column 'text'"),
        ("a.csv", b'text\n"one', "is not CSV"),
        ("a.txt", b"caf\xe9 au lait\n", "not UTF-8"),
        ("a.txt", b"\n\n", "no text has 3 tokens"),
    ],
)
def test_texts_that_cannot_be_read_are_a_sentence(
    run: Run, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    code, out, err = run("--texts", tmp_path / name, *GRID, "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--texts", "nowhere.txt"], "is not a file"),
        (["--window", "1"], "3 tokens or more"),
        (["--window", "1000"], "positions"),
        (["--limit", "0"], "1 window or more"),
        (["--matmul-precision", "low"], "highest, high, medium"),
        (["--max-bytes", "1000"], "max_bytes is 1000"),
        (["--heads", "0"], "scaled as a whole"),
        (["--prompt", "The sea."], "one of them"),
        (["--positions", "16"], "17 tokens or more"),
    ],
)
def test_a_mistake_is_a_sentence(run: Run, corpus: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, out, err = run("--texts", corpus, *GRID, "--output", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "out").exists()


def test_windows_are_the_texts_cut_and_short_pieces_are_counted(tokenizer: Tokenizer, corpus: Path) -> None:
    texts = Texts.of(corpus, "text", 16, None)
    encoded = [tokenizer.encode(text) for text in read_texts(corpus, "text")]
    expected = [ids[start : start + 16] for ids in encoded for start in range(0, len(ids), 16)]
    windows = list(texts.windows(tokenizer))
    assert windows == [piece for piece in expected if len(piece) > 1]
    counts = texts.count(tokenizer)
    short = sum(len(piece) < 2 for piece in expected) + 1  # and the empty text
    assert counts == {
        "texts": 262,
        "windows": len(windows),
        "tokens": sum(map(len, windows)),
        "skipped": short,
    }
    assert short > 1
    for limit in (1, 20, 10_000):
        few = Texts.of(corpus, "text", 16, limit)
        assert list(few.windows(tokenizer)) == windows[:limit]
        assert few.count(tokenizer)["windows"] == len(windows[:limit])
    assert [len(shard) for shard in batched(iter(windows))][:-1] == [SHARD_WINDOWS] * (len(windows) // SHARD_WINDOWS)


# What is made of the windows.


def test_the_statistics_are_their_definitions() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (500, 3))
    found = dict(zip(STATISTICS, summarise(np.array_split(values, 40)), strict=True))
    np.testing.assert_allclose(found["mean"], values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["sd"], values.std(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose([found["q1"], found["median"], found["q3"]], np.percentile(values, [25, 50, 75], axis=0))
    # the bootstrap's interval is near the textbook's, 1.96 standard errors to each side
    error = 1.96 * found["sd"] / np.sqrt(len(values))
    np.testing.assert_allclose(found["high"] - found["mean"], error, rtol=0.15)
    np.testing.assert_allclose(found["mean"] - found["low"], error, rtol=0.15)


def test_the_bootstrap_is_reproducible_and_one_window_is_no_error() -> None:
    shards = np.array_split(np.random.default_rng(1).normal(size=(50, 2)), 4)
    assert np.array_equal(summarise(shards), summarise(shards))
    one = dict(zip(STATISTICS, summarise([np.array([[2.0, np.nan]])]), strict=True))
    assert (one["low"][0], one["mean"][0], one["high"][0]) == (2, 2, 2)
    assert np.isnan(one["sd"]).all()
    assert np.isnan(one["mean"][1])


def test_columns_combined_in_groups_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(tmp_path / "windows", {"a": 1})
    assert shards.open(overwrite=False) == []
    generator = torch.Generator().manual_seed(0)
    for number, count in enumerate((16, 16, 5)):
        shards.write(number, {"x": torch.randn(count, 2, 90, generator=generator, dtype=torch.float64)})
    assert shards.open(overwrite=False) == [0, 1, 2]
    whole = shards.combine(37)["x"]
    monkeypatch.setattr("experiments.harness.corpus.MOST_NUMBERS", 1)
    for statistic, values in shards.combine(37)["x"].items():
        torch.testing.assert_close(values, whole[statistic], rtol=1e-12, atol=1e-12)
    assert whole["mean"].shape == (2, 90)


def test_combining_holds_no_more_for_more_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.harness.corpus.MOST_NUMBERS", 2**12)
    monkeypatch.setattr("experiments.harness.corpus.FEWEST_COLUMNS", 1)
    peaks = []
    for count in (4, 80):
        shards = Shards(tmp_path / str(count), {"a": 1})
        shards.open(overwrite=False)
        for number in range(count):
            shards.write(number, {"x": torch.ones(SHARD_WINDOWS, 400)})
        tracemalloc.start()  # NumPy's arrays are counted
        shards.combine(count * SHARD_WINDOWS)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]  # twenty times the windows; 4 MB in all


def rows_of(folder: Path, **wanted: object) -> list[dict[str, str]]:
    with (folder / "divergence.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[name] == str(value) for name, value in wanted.items())]


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert launch(corpus, folder, ranks=1).wait() == 0, said(folder)
    return folder


def test_the_table_holds_means_over_windows_of_what_each_window_gives_alone(
    expected: Path, corpus: Path, tokenizer: Tokenizer, tiny: GPT2
) -> None:
    windows = list(Texts.of(corpus, "text", 16, None, SHORTEST).windows(tokenizer))
    alone = torch.stack([sweep(tiny, [ids], (2,), (0.5,)).frobenius()[0, 0, :, 0] for ids in windows])
    rows = rows_of(expected, factor=0.5, positions="rest", metric="frobenius")[:-1]
    assert {row["windows"] for row in rows} == {str(len(windows))}
    for column, values in (
        ("value", alone.mean(0)),
        ("sd", alone.std(0)),
        ("median", torch.from_numpy(np.median(alone.numpy(), axis=0))),
    ):
        found = torch.tensor([float(row[column]) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-6)
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)


def test_the_summary_says_which_texts_ran(expected: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    summary = json.loads((expected / "summary.json").read_text())
    assert summary["corpus"] == Texts.of(corpus, "text", 16, None, SHORTEST).count(tokenizer)
    assert summary["settings"]["texts"]["path"] == str(corpus)
    assert len(summary["settings"]["texts"]["sha256"]) == 64
    assert summary["settings"]["threads"] == 1
    assert summary["interval"] == {"of": "mean", "quantiles": [0.025, 0.975], "resamples": 1000, "seed": 0}
    assert len(summary["verdicts"]) == 5
    assert "prompt of" not in json.dumps(summary)
    assert not (expected / "sweep.safetensors").exists()


# Ranks, and runs that are killed.


def launch(corpus: Path, output: Path, ranks: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[bytes]:
    """The study under torchrun, one thread a rank; what it says goes into a file beside the output."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    study = ["-m", "experiments.divergence", "--model", str(TINY), "--texts", str(corpus), *GRID]
    with output.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*torchrun, f"--max-restarts={restarts}", *study, "--quiet", "--output", str(output), *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def said(output: Path) -> str:
    return output.with_suffix(".log").read_text()


def numbers_of(folder: Path) -> dict[str, bytes]:
    """The files that hold numbers, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.[cs][sa][vf]*"))}


def shards_in(folder: Path) -> int:
    return len(list((folder / "windows").glob("[0-9]*.safetensors")))


def ranks_of(launcher: subprocess.Popen[bytes]) -> Iterator[int]:
    """The process ids of torchrun's ranks."""
    for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
        for child in children.read_text().split():
            if b"experiments.divergence" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield int(child)


def wait_for_shards(launcher: subprocess.Popen[bytes], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while shards_in(folder) < count:
        assert launcher.poll() is None, said(folder)
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_result_is_bit_identical_for_any_number_of_ranks(
    corpus: Path, expected: Path, tmp_path: Path, ranks: int
) -> None:
    launcher = launch(corpus, tmp_path / "out", ranks)
    assert launcher.wait() == 0, said(tmp_path / "out")
    assert numbers_of(tmp_path / "out") == numbers_of(expected)
    assert shards_in(expected) > 20


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="ranks are found through Linux's /proc")


@needs_proc
def test_a_killed_run_goes_on_where_it_stopped_and_ends_the_same(corpus: Path, expected: Path, tmp_path: Path) -> None:
    """SIGKILL of one rank, of all ranks, and of torchrun with them; then the same command again."""
    folder, total, stopped = tmp_path / "out", shards_in(expected), [0]
    for victims in ("one rank", "all ranks", "torchrun and all"):
        launcher = launch(corpus, folder, 2)
        wait_for_shards(launcher, folder, stopped[-1] + 2)
        ranks = list(ranks_of(launcher))
        assert len(ranks) == 2
        if victims == "torchrun and all":
            os.killpg(launcher.pid, signal.SIGKILL)
        for rank in ranks[: 1 if victims == "one rank" else 2]:
            try_to_kill(rank)
        assert launcher.wait() != 0
        assert not (folder / "summary.json").exists()
        stopped.append(shards_in(folder))
    assert 0 < stopped[1] < stopped[2] < stopped[3] < total
    finished = {path.name: path.stat().st_mtime_ns for path in (folder / "windows").glob("[0-9]*.safetensors")}
    launcher = launch(corpus, folder, 2)
    assert launcher.wait() == 0, said(folder)
    assert numbers_of(folder) == numbers_of(expected)
    assert all((folder / "windows" / name).stat().st_mtime_ns == when for name, when in finished.items())
    assert not list(folder.rglob(".*"))


def try_to_kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@needs_proc
def test_torchrun_restarts_a_run_whose_rank_was_killed(corpus: Path, expected: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    launcher = launch(corpus, folder, 2, "--overwrite", restarts=1)
    wait_for_shards(launcher, folder, 2)
    try_to_kill(next(ranks_of(launcher)))
    assert shards_in(folder) < shards_in(expected)
    assert launcher.wait() == 0, said(folder)
    assert numbers_of(folder) == numbers_of(expected)


def test_windows_that_lack_a_scaled_position_are_skipped(run: Run, corpus: Path, tmp_path: Path) -> None:
    arguments = ("--texts", corpus, *GRID, "--positions", "3,9", "--output", tmp_path / "out")
    assert run(*arguments)[0] == 0
    counts = json.loads((tmp_path / "out" / "summary.json").read_text())["corpus"]
    assert counts["skipped"] > 20
    assert {row["windows"] for row in rows_of(tmp_path / "out")} == {str(counts["windows"])}


def test_windows_of_other_settings_are_refused_unless_overwritten(run: Run, corpus: Path, tmp_path: Path) -> None:
    folder, other = (
        tmp_path / "out",
        ("--texts", corpus, "--window", "16", "--factors", "0.7", "--no-parity", "--no-predictions"),
    )
    assert run("--texts", corpus, *GRID, "--limit", "20", "--output", folder)[0] == 0
    (folder / "summary.json").unlink()  # as if it had been killed at the end
    code, _, err = run(*other, "--limit", "20", "--output", folder)
    assert (code, "other settings (factors)" in err, err.count("\n")) == (2, True, 1)
    assert run(*other, "--limit", "20", "--output", folder, "--overwrite")[0] == 0
    assert {row["factor"] for row in rows_of(folder)} == {"0.7"}


@pytest.mark.parametrize("summary", [True, False])
def test_a_prompt_does_not_touch_a_corpus_run_that_was_killed(
    run: Run, corpus: Path, tmp_path: Path, summary: bool
) -> None:
    """Also where the prompt's own summary still stands, which a killed --overwrite leaves behind."""
    folder = tmp_path / "out"
    if summary:
        assert run("--factors", "0.5", "--output", folder)[0] == 0
    Shards(folder / "windows", {"a": 1}).open(overwrite=False)
    code, _, err = run("--factors", "0.5", "--output", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert (folder / "windows" / "settings.json").exists()


def test_what_a_kill_leaves_in_the_windows_folder_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "windows"
    folder.mkdir()
    (folder / ".settings.json.x.json").write_text("half")
    (folder / ".0000003.safetensors.x.safetensors").write_bytes(b"half")
    assert Shards(folder, {"a": 1}).open(overwrite=False) == []
    assert {path.name for path in folder.iterdir()} == {"settings.json"}


def test_a_mistake_under_torchrun_is_said_once_and_ends_all_ranks(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert launch(corpus, folder, 2).wait() != 0
    assert said(folder).count("holds other files") == 1
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_prompt_replaces_a_corpus_run_with_all_its_windows(run: Run, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run("--texts", corpus, *GRID, "--limit", "1", "--output", folder)[0] == 0
    assert run("--factors", "0.5", "--output", folder)[0] == 2
    assert run("--factors", "0.5", "--output", folder, "--overwrite")[0] == 0
    assert not (folder / "windows").exists()


def test_a_broken_shard_is_a_sentence(run: Run, corpus: Path, tmp_path: Path) -> None:
    arguments = ("--texts", corpus, *GRID, "--limit", "20", "--output", tmp_path / "out")
    assert run(*arguments)[0] == 0
    (tmp_path / "out" / "windows" / "0000001.safetensors").write_bytes(b"torn")
    code, _, err = run(*arguments)
    assert (code, "0000001.safetensors cannot be read" in err, err.count("\n")) == (2, True, 1)


PEAK = """
from experiments.divergence.study import main
from minigpt import cli
try:
    cli.run(main)
except SystemExit as stopped:
    assert not stopped.code, stopped.code
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@needs_proc
def test_memory_does_not_grow_with_the_number_of_windows(corpus: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.txt"
    many.write_text(corpus.read_text() * 8)
    peaks = []
    for limit in (100, 800):
        arguments = ["--model", str(TINY), "--texts", str(many), "--window", "8", "--factors", "0.5", "--no-parity"]
        arguments += ["--limit", str(limit), "--quiet", "--output", str(tmp_path / str(limit))]
        command = [sys.executable, "-c", PEAK, *arguments]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout))
    assert peaks[1] < peaks[0] * 1.05  # the streams of 700 windows would be 85 MB
