"""Corpus runs: texts into windows, windows into shards, shards shared by ranks that may be killed."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from experiments.divergence import study as divergence
from experiments.harness import writing
from experiments.harness.corpus import (
    SHARD_WINDOWS,
    STATISTICS,
    Shards,
    Survey,
    Texts,
    batched,
    digest_of,
    digest_of_numbers,
    read_texts,
    remove_windows,
    summarise,
)
from experiments.harness.experiment import SHORTEST
from minigpt import GPT2, GPT2Config, Tokenizer, sweep
from minigpt.files import open_tensors, write_tensors
from tests.conftest import ROOT, SMALL, TINY, draw
from tests.fuzzing import Corpus, contents, letters
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
        ("a.csv", b"text,text\none two three,b\n", "the column 'text' twice"),
        ("a.json", b'[{"text": "one"}]\n', "ends in .json; expected .txt (text by line), .jsonl or .csv"),
        ("a.TSV", b"text\none two three\n", "ends in .TSV"),
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
    counts = texts.survey(tokenizer).counts
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
        assert few.survey(tokenizer).counts["windows"] == len(windows[:limit])
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


def made_up(count: int) -> tuple[Survey, list[list[list[int]]]]:
    """So many windows of two tokens, and the same shard by shard."""
    windows = [[number, number + 1] for number in range(count)]
    shards = list(batched(iter(windows)))
    return Survey({"windows": count}, [digest_of(shard) for shard in shards]), shards


def test_columns_combined_in_groups_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, (survey, windows) = Shards(tmp_path / "windows", {"a": 1}), made_up(37)
    assert shards.open(survey, overwrite=False) == []
    generator = torch.Generator().manual_seed(0)
    for number, of in enumerate(windows):
        shards.write(number, of, {"x": torch.randn(len(of), 2, 90, generator=generator, dtype=torch.float64)})
    assert shards.open(survey, overwrite=False) == [0, 1, 2]
    whole = shards.combine(survey)["x"]
    monkeypatch.setattr("experiments.harness.corpus.MOST_NUMBERS", 1)
    for statistic, values in shards.combine(survey)["x"].items():
        torch.testing.assert_close(values, whole[statistic], rtol=1e-12, atol=1e-12)
    assert whole["mean"].shape == (2, 90)


@pytest.mark.parametrize("count", [4, 80])
def test_combining_holds_no_more_for_more_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    most, held = 2**12, list[int]()
    monkeypatch.setattr("experiments.harness.corpus.MOST_NUMBERS", most)
    monkeypatch.setattr("experiments.harness.corpus.FEWEST_COLUMNS", 1)
    monkeypatch.setattr("experiments.harness.corpus.RESAMPLES", 10)

    def watched(shards: list[np.ndarray]) -> np.ndarray:
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        held.append(sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces))
        return summarise(shards)

    monkeypatch.setattr("experiments.harness.corpus.summarise", watched)
    shards, (survey, windows) = Shards(tmp_path, {"a": 1}), made_up(count * SHARD_WINDOWS)
    shards.open(survey, overwrite=False)
    for number, of in enumerate(windows):
        shards.write(number, of, {"x": torch.ones(SHARD_WINDOWS, 100)})
    tracemalloc.start()
    shards.combine(survey)
    tracemalloc.stop()
    assert len(held) > 1
    assert max(held) < 3 * 8 * most  # bytes: a group of columns, and the statistics; all of the 80 shards are 1 MB


def rows_of(folder: Path, **wanted: object) -> list[dict[str, str]]:
    with (folder / "divergence.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[name] == str(value) for name, value in wanted.items())]


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the tokenizer of weights/tiny: what ranks do does not depend on the model."""
    folder = tmp_path_factory.mktemp("model") / "four_blocks"
    vocab_size = Tokenizer.from_pretrained(TINY).vocab_size
    draw(GPT2Config(**{**SMALL, "vocab_size": vocab_size}), dtype=torch.float32).save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, four_blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert launch(corpus, four_blocks, folder, ranks=1).wait() == 0, said(folder)
    return folder


def test_the_table_holds_means_over_windows_of_what_each_window_gives_alone(
    expected: Path, corpus: Path, tokenizer: Tokenizer, four_blocks: Path
) -> None:
    model = GPT2.from_pretrained(four_blocks)
    windows = list(Texts.of(corpus, "text", 16, None, SHORTEST).windows(tokenizer))
    alone = torch.stack([sweep(model, [ids], (2,), (0.5,)).frobenius()[0, 0, :, 0] for ids in windows])
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
    assert summary["corpus"] == Texts.of(corpus, "text", 16, None, SHORTEST).survey(tokenizer).counts
    assert summary["settings"]["texts"]["path"] == str(corpus)
    assert len(summary["settings"]["texts"]["sha256"]) == 64
    assert summary["settings"]["threads"] == 1
    assert summary["interval"] == {"of": "mean", "quantiles": [0.025, 0.975], "resamples": 1000, "seed": 0}
    assert len(summary["verdicts"]) == 5
    assert "prompt of" not in json.dumps(summary)
    assert not (expected / "sweep.safetensors").exists()


# Ranks, and runs that are killed.


def launch(
    corpus: Path, model: Path, output: Path, ranks: int, *arguments: str, restarts: int = 0
) -> subprocess.Popen[bytes]:
    """The study under torchrun, one thread a rank; what it says goes into a file beside the output."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    study = ["-m", "experiments.divergence", "--model", str(model), "--texts", str(corpus), *GRID]
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
    corpus: Path, four_blocks: Path, expected: Path, tmp_path: Path, ranks: int
) -> None:
    launcher = launch(corpus, four_blocks, tmp_path / "out", ranks)
    assert launcher.wait() == 0, said(tmp_path / "out")
    assert numbers_of(tmp_path / "out") == numbers_of(expected)
    assert shards_in(expected) > 20


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="ranks are found through Linux's /proc")


@needs_proc
def test_a_killed_run_goes_on_where_it_stopped_and_ends_the_same(
    corpus: Path, four_blocks: Path, expected: Path, tmp_path: Path
) -> None:
    """SIGKILL of one rank, of all ranks, and of torchrun with them; then the same command again."""
    folder, total, stopped = tmp_path / "out", shards_in(expected), [0]
    for victims in ("one rank", "all ranks", "torchrun and all"):
        launcher = launch(corpus, four_blocks, folder, 2)
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
    launcher = launch(corpus, four_blocks, folder, 2)
    assert launcher.wait() == 0, said(folder)
    assert numbers_of(folder) == numbers_of(expected)
    assert all((folder / "windows" / name).stat().st_mtime_ns == when for name, when in finished.items())
    assert not list(folder.rglob(".*"))


def try_to_kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@needs_proc
def test_torchrun_restarts_a_run_whose_rank_was_killed(
    corpus: Path, four_blocks: Path, expected: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    launcher = launch(corpus, four_blocks, folder, 2, "--overwrite", restarts=1)
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
    for name in ("summary.json", "divergence.csv"):  # as if it had been killed at the end
        (folder / name).unlink()
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
    Shards(folder / "windows", {"a": 1}).open(made_up(1)[0], overwrite=False)
    code, _, err = run("--factors", "0.5", "--output", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert (folder / "windows" / "settings.json").exists()


def test_what_a_kill_leaves_in_the_windows_folder_goes_and_what_somebody_else_put_there_stays(tmp_path: Path) -> None:
    """Also what is hidden: not every name with a dot is ours."""
    folder, (survey, _), left = tmp_path / "windows", made_up(1), list[Path]()

    def stop(_: dict[str, torch.Tensor], file: Path, __: dict[str, str]) -> None:
        file.write_bytes(b"half")
        left.append(Path(shutil.copytree(file.parent, tmp_path / file.parent.name)))

    shards = Shards(folder, {"a": 1})
    assert shards.open(survey, overwrite=False) == []
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ValueError):
        patch.setattr("minigpt.files.save_file", stop)
        shards.write(0, [[0, 1]], {"x": torch.ones(1, 2)})
    for number, leftover in enumerate(left):
        shutil.move(leftover, folder / leftover.name.replace(f"-{os.getpid()}-", f"-{2**22 + number}-"))
    mine = {".gitignore", ".0000000.safetensors.swp", ".notes", "0000000.safetensors.bak", "1.safetensors"}
    for name in mine:
        (folder / name).write_text("mine")
    shutil.rmtree(shards.path(0), ignore_errors=True)
    shards.path(0).unlink(missing_ok=True)
    assert left and len(list(folder.iterdir())) == len(mine) + 2
    assert shards.open(survey, overwrite=False) == []
    assert {path.name for path in folder.iterdir()} == {"settings.json", *mine}


def test_a_mistake_under_torchrun_is_said_once_and_ends_all_ranks(
    corpus: Path, four_blocks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert launch(corpus, four_blocks, folder, 2).wait() != 0
    assert said(folder).count("holds other files") == 1
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_prompt_replaces_a_corpus_run_with_all_its_windows(run: Run, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run("--texts", corpus, *GRID, "--limit", "1", "--output", folder)[0] == 0
    assert run("--factors", "0.5", "--output", folder)[0] == 2
    assert run("--factors", "0.5", "--output", folder, "--overwrite")[0] == 0
    assert not (folder / "windows").exists()


# What lies there already is believed where it is what was written, and not otherwise.


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Forty windows, measured; some of their numbers are rightly undefined."""
    run = Corpus(tmp_path_factory.mktemp("small"))
    undefined = load_file(run.output / "windows" / "0000001.safetensors")["even length"].isnan()
    assert undefined.any() and not undefined.all()
    return run


@pytest.fixture
def killed(small_run: Corpus) -> Iterator[Corpus]:
    """The same, as if it had been killed before its results were there."""
    for name in ("summary.json", "tiny.csv"):
        (small_run.output / name).unlink()
    yield small_run
    small_run.restore()


SPOILT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "five of sixteen windows": lambda values: values[:5],
    "no window": lambda values: values[:0],
    "windows twice": lambda values: torch.cat([values, values]),
    "truth values": lambda values: values.bool(),
    "whole numbers": lambda values: values.long(),
    "half the digits": lambda values: values.float(),
    "ten times as much": lambda values: values * 10,
    "one undefined": lambda values: values.index_fill(0, torch.tensor(3), torch.nan),
    "more columns": lambda values: torch.cat([values, values], 1),
    "fewer columns": lambda values: values[:, 1:],
    "another order": lambda values: values.flip(0),
    "one axis": lambda values: values.flatten(),
    "no axis": lambda values: values.sum(),
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", SPOILT)
def test_a_shard_that_is_not_what_was_written_is_named_and_measured_again(
    killed: Corpus, case: str, number: int
) -> None:
    path = killed.output / "windows" / f"000000{number}.safetensors"
    with open_tensors(path) as file:
        about = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, "change": SPOILT[case](tensors["change"]).contiguous()}, path, about)
    assert path.read_bytes() != killed.whole[f"windows/{path.name}"]
    said = check_measured_again(killed)
    assert said.startswith(f"Warning: {path} is not what this run wrote there (its digest is another).")
    assert said.endswith(" Its windows are measured again.\n") and said.count("\n") == 1


@pytest.mark.parametrize(
    "case", ["torn", "empty", "another shard's", "other windows", "other metadata", "without a digest"]
)
def test_a_shard_that_says_something_else_is_named_and_measured_again(killed: Corpus, case: str) -> None:
    path, whole = killed.output / "windows" / "0000001.safetensors", killed.whole
    with open_tensors(path) as file:
        about = json.loads(file.metadata()["shard"])
    content = {"torn": path.read_bytes()[:-8], "empty": b"", "another shard's": whole["windows/0000000.safetensors"]}
    others = {
        "other windows": {**about, "windows": [0, 15]},
        "other metadata": {**about, "shapes": {**about["shapes"], "change": [1]}},
        "without a digest": {name: value for name, value in about.items() if name != "digest"},
    }
    if case in content:
        path.write_bytes(content[case])
    else:
        save_file(load_file(path), path, {"shard": json.dumps(others[case])})
    said = check_measured_again(killed)
    assert said.startswith(f"Warning: {path} is not what this run wrote there (")
    assert said.count("\n") == 1


@pytest.mark.parametrize("windows", [[0, 14], [0, 16], [1, 15], [-1, 15]])
def test_a_shard_of_other_windows_is_measured_again_whichever_they_are(killed: Corpus, windows: list[int]) -> None:
    """Fewer, more, later or earlier ones: with a digest that is right."""
    path = killed.output / "windows" / "0000000.safetensors"
    with open_tensors(path) as file:
        about = {**json.loads(file.metadata()["shard"]), "windows": windows}
    about["digest"] = digest_of_numbers({name: of for name, of in about.items() if name != "digest"}, load_file(path))
    save_file(load_file(path), path, {"shard": json.dumps(about)})
    assert f"Warning: {path} is not what this run wrote there (it holds other windows)" in check_measured_again(killed)


def test_a_shard_beyond_the_texts_is_not_looked_at(killed: Corpus) -> None:
    shutil.copy(killed.output / "windows" / "0000000.safetensors", killed.output / "windows" / "0000007.safetensors")
    code, said = killed.run()
    assert (code, said) == (0, "")


class Bar:
    """What a progress bar is told."""

    shown: ClassVar[list["Bar"]] = []

    def __init__(self, *, total: int, initial: int, unit: str, leave: bool, disable: bool | None) -> None:
        self.total, self.n, self.unit, self.disable, self.seen = total, initial, unit, disable, [initial]
        self.shown.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, more: int) -> None:
        self.n += more
        self.seen.append(self.n)


def test_the_bar_counts_windows_and_begins_with_those_that_are_there(
    killed: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.harness.corpus.tqdm", Bar)
    (killed.output / "windows" / "0000001.safetensors").unlink()
    Bar.shown.clear()
    assert killed.run()[0] == 0
    (bar,) = Bar.shown
    assert (bar.total, bar.unit, bar.seen) == (40, "window", [32, 40])
    for number in (0, 1, 2):
        (killed.output / "windows" / f"000000{number}.safetensors").unlink()
    for name in ("summary.json", "tiny.csv"):
        (killed.output / name).unlink()
    assert killed.run()[0] == 0
    assert Bar.shown[1].seen == [0, 16, 32, 40]


def check_measured_again(run: Corpus) -> str:
    """The same command ends with the numbers of an undisturbed run, byte for byte; returns what it said."""
    code, said = run.run()
    assert code == 0
    assert_same(contents(run.output), run.whole)
    return said


def assert_same(there: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Name by name: a comparison of all bytes that fails takes minutes to be shown."""
    assert sorted(there) == sorted(expected)
    assert [name for name in expected if there[name] != expected[name]] == []


def test_a_shard_that_was_spoilt_while_the_run_went_on_is_a_sentence(tmp_path: Path) -> None:
    shards, (survey, windows) = Shards(tmp_path / "windows", {"a": 1}), made_up(40)
    shards.open(survey, overwrite=False)
    for number, of in enumerate(windows):
        shards.write(number, of, {"x": torch.ones(len(of), 2)})
    shards.combine(survey)
    shards.path(1).write_bytes(shards.path(0).read_bytes())
    with pytest.raises(ValueError, match=r"0000001.safetensors is not what this run wrote there \(it holds other win"):
        shards.combine(survey)


def test_windows_that_are_missing_are_not_counted(tmp_path: Path) -> None:
    """Not even where a shard's digest fits: its writer may be wrong."""
    shards, (survey, windows) = Shards(tmp_path / "windows", {"a": 1}), made_up(37)
    shards.open(survey, overwrite=False)
    for number, of in enumerate(windows):
        shards.write(number, of, {"x": torch.ones(len(of), 2)})
    with open_tensors(shards.path(1)) as file:
        about = json.loads(file.metadata()["shard"])
    del about["digest"]
    short = {"x": torch.ones(5, 2)}
    write_tensors(shards.path(1), short, {"shard": json.dumps({**about, "digest": digest_of_numbers(about, short)})})
    with pytest.raises(ValueError, match="holds 26 windows of 'x'; the texts have 37"):
        shards.combine(survey)


@pytest.mark.parametrize(
    ("shape", "said"), [((5, 2), "'x' has 5 rows of 16 windows"), ((16, 3), r"shapes \{'x': \[3\]\}, and the first")]
)
def test_tables_that_do_not_fit_the_windows_or_each_other_are_a_sentence(
    tmp_path: Path, shape: tuple[int, int], said: str
) -> None:
    shards, (survey, windows) = Shards(tmp_path / "windows", {"a": 1}), made_up(32)
    shards.open(survey, overwrite=False)
    shards.write(0, windows[0], {"x": torch.ones(16, 2)})
    with pytest.raises(ValueError, match=said):
        shards.write(1, windows[1], {"x": torch.ones(shape)})
        shards.combine(survey)


# What decides the numbers.


def other_letters() -> Tokenizer:
    """A tokenizer that reads every text as the same number of other ids."""
    parsed = json.loads(letters().backend.to_str())
    vocab = parsed["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parsed)))


def test_windows_of_another_tokenizer_are_not_taken_up(killed: Corpus) -> None:
    (killed.output / "windows" / "0000001.safetensors").unlink()
    before = contents(killed.output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(killed, "tokenizer", other_letters())
        code, said = killed.run()
        assert (code, "run with other settings (token_ids)" in said) == (2, True)
        assert_same(contents(killed.output), before)
        assert killed.run(overwrite=True) == (0, "")
        others = contents(killed.output)
    assert killed.run(overwrite=True) == (0, "")
    assert_same(contents(killed.output), killed.whole)
    assert others["tiny.csv"] != killed.whole["tiny.csv"]


def without_onednn(patch: pytest.MonkeyPatch, run: Corpus) -> None:
    patch.setattr(torch.backends.mkldnn, "enabled", False)


def with_rougher_products(patch: pytest.MonkeyPatch, run: Corpus) -> None:
    patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")


def with_a_hook(patch: pytest.MonkeyPatch, run: Corpus) -> None:
    patch.setattr(run.model.blocks[1], "_forward_hooks", OrderedDict({0: lambda _, __, out: out * 1.5}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_onednn, "other settings (arithmetic)"),
        (with_rougher_products, "other settings (arithmetic)"),
        (with_a_hook, "the first ones now come out otherwise"),
    ],
)
def test_windows_that_would_now_come_out_otherwise_are_not_taken_up(
    killed: Corpus, change: Callable[[pytest.MonkeyPatch, Corpus], None], named: str
) -> None:
    before = contents(killed.output)
    with pytest.MonkeyPatch.context() as patch:
        change(patch, killed)
        code, said = killed.run()
    assert (code, named in said, said.count("\n")) == (2, True, 1)
    assert_same(contents(killed.output), before)


def test_a_rank_that_would_compute_something_else_is_refused(tmp_path: Path) -> None:
    survey, _ = made_up(1)
    first = Shards(tmp_path / "windows", {"processor": "one", "threads": 1, "token_ids": survey.token_ids})
    first.open(survey, overwrite=False)
    alike = Shards(first.folder, {"processor": "one", "threads": 1}).joined()
    assert alike.fingerprint == first.fingerprint
    with pytest.raises(ValueError, match=r"differs from the first one \(processor\)"):
        Shards(first.folder, {"processor": "another", "threads": 1}).joined()


# Whose files are whose.


def test_windows_behind_a_link_are_neither_deleted_nor_written(killed: Corpus) -> None:
    folder = killed.output.parent / "theirs"
    shutil.move(killed.output / "windows", folder)
    (folder / ".hidden").write_text("mine")
    (killed.output / "windows").symlink_to(folder)
    before = contents(folder)
    for overwrite in (False, True):
        code, said = killed.run(overwrite)
        assert (code, f"{killed.output / 'windows'} is a link" in said, said.count("\n")) == (2, True, 1)
        assert_same(contents(folder), before)
    shutil.rmtree(folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["summary.json", "tiny.csv", ".lock", "windows/settings.json", "windows/0000001.safetensors"]
)
def test_no_link_in_the_output_folder_is_followed_or_replaced(killed: Corpus, name: str, overwrite: bool) -> None:
    """Not even where what it leads to would be right."""
    path, target = killed.output / name, killed.output.parent / "theirs"
    target.write_bytes(path.read_bytes() if path.exists() else b"")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    before = target.read_bytes()
    code, said = killed.run(overwrite)
    assert (code, f"{path} is a link" in said, said.count("\n")) == (2, True, 1)
    assert path.is_symlink() and target.read_bytes() == before
    target.unlink()


def test_overwriting_a_run_leaves_what_it_did_not_write(killed: Corpus) -> None:
    """Also under names that look like a run's."""
    names = ("notes.txt", "tiny_mine.png", "windows/notes.txt", "windows/.gitignore", "windows/7.safetensors")
    for name in names:
        (killed.output / name).write_text("mine")
    described = killed.output / "windows" / "settings.json"
    described.write_text(described.read_text().replace('"dtype": "float32"', '"dtype": "float64"'))
    assert killed.run()[0] == 2
    assert killed.run(overwrite=True) == (0, "")
    assert all((killed.output / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("settings", [None, "{}", "[", '{"editor.fontSize": 12}', '{"windows_of_a_run": 3}'])
def test_a_folder_of_shards_that_no_run_has_described_is_left_alone(tmp_path: Path, settings: str | None) -> None:
    (tmp_path / "0000000.safetensors").write_bytes(b"mine")
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"no settings\.json that a run has written; move that away"):
        Shards(tmp_path, {"a": 1}).open(made_up(1)[0], overwrite=True)
    remove_windows(tmp_path)
    assert contents(tmp_path) == before


PEAK = """
from experiments.divergence.study import main
from experiments.harness import writing
from minigpt import cli
writing._draw = lambda *_: None
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
    for limit in (60, 1260):
        arguments = ["--model", str(TINY), "--texts", str(many), "--window", "8", "--factors", "0.5", "--no-parity"]
        arguments += ["--no-predictions", "--limit", str(limit), "--quiet", "--output", str(tmp_path / str(limit))]
        command = [sys.executable, "-c", PEAK, *arguments]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout))
    assert (peaks[1] - peaks[0]) * 1024 < 36e6  # the streams of 1200 windows would be 147 MB: a quarter of that
