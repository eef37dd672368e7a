"""How much memory a pass is thought to take, and how texts and runs are split by it: numbers counted by hand."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt import GPT2, GPT2Config, engine, passes, predictions
from minigpt.engine import Job
from minigpt.passes import estimate_bytes, free_bytes, plan
from minigpt.predictions import prediction_numbers
from tests.conftest import SMALL

RUNS = [{"blocks.1.output_scale": factor} for factor in (0.5, 1.5, 2.0, 3.0, 4.0)]
WIDTH, LINEAR = 36, ((36, 108), (36, 36), (36, 144), (144, 36))
"""Of the small model: its stream, and what its linear maps read and make."""


def job_of(model: GPT2, texts: int = 3, length: int = 8, runs: Any = RUNS, **asked: Any) -> Job:
    return Job.checked(model, [[*range(length)]] * texts, runs, **asked)


def counted(tokens: int, rows: int, in_slab: int, itemsize: int) -> int:
    """The bytes of a pass without predictions: streams; a slab's activations and the clean row's; a weight that is
    rearranged; and in float64 the differences of a slab, twice, and of every row and token 4 numbers and two of
    each of three writers, twice."""
    streams = rows * tokens * WIDTH
    of_slab = in_slab * tokens * (2 * (108 + 36 + 144 + 36) + 12 * WIDTH)
    of_clean = tokens * (36 + 108 + 36 + 36 + 36 + 144 + 144 + 36 + 12 * WIDTH)
    wide = 2 * in_slab * tokens * WIDTH + 2 * rows * tokens * (4 + 2 * 3)
    return (streams + of_slab + of_clean + 36 * 144) * itemsize + 8 * wide


@pytest.mark.parametrize(("texts", "rows"), [(1, 2), (3, 6), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_estimate_is_what_a_pass_holds(
    small: Callable[..., GPT2], monkeypatch: pytest.MonkeyPatch, texts: int, rows: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(engine, "CPU_SLAB", 3 * texts * 8)  # three rows
    job = job_of(small(dtype=dtype))
    assert estimate_bytes(job, texts, 8, rows) == counted(texts * 8, rows, min(3, rows), dtype.itemsize)


def test_a_slab_holds_one_row_at_least(small: Callable[..., GPT2], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CPU_SLAB", 5)
    assert estimate_bytes(job_of(small()), 1, 8, 4) == counted(8, 4, 1, 8)


@pytest.mark.parametrize(
    ("shapes", "numbers"),
    [
        ({"blocks.1.output_shift": (1, 8, 36)}, 36),
        ({"blocks.1.output_shift": (36,), "blocks.1.mlp.neuron_shift": (3, 1, 144), "blocks.2.mlp_shift": (36,)}, 180),
        ({"blocks.2.attention.score_shift": (1, 3, 8, 8)}, 24),
        ({"embedding_scale": (1, 8, 1), "embedding_shift": (1, 8, 36)}, 37),
    ],
)
def test_values_that_are_tensors_come_on_top(model: GPT2, shapes: dict[str, tuple[int, ...]], numbers: int) -> None:
    job = job_of(
        model, runs=[{name: torch.ones(shape)} for name, shape in shapes.items()] + [{"blocks.3.mlp_scale": 0.0}]
    )
    assert estimate_bytes(job, 1, 8, 3) == counted(8, 3, 3, 8) + 3 * 3 * 8 * numbers * 8


def test_predictions_and_tangents_come_on_top(model: GPT2) -> None:
    plain = estimate_bytes(job_of(model), 1, 8, 2)
    asked = estimate_bytes(job_of(model, predictions=True), 1, 8, 2)
    assert asked == plain + 8 * prediction_numbers(2, 8, SMALL["vocab_size"])
    streams_and_activations = counted(8, 2, 2, 1) - 36 * 144 - 8 * (2 * 2 * 8 * WIDTH + 2 * 2 * 8 * 10)
    assert estimate_bytes(job_of(model, tangents=True), 1, 8, 2) == plain + 8 * streams_and_activations


def test_predictions_take_nine_chunks_and_twelve_numbers_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "CHUNK", 1000)
    assert prediction_numbers(2, 3, 100) == 9 * 600 + 12 * 6
    assert prediction_numbers(7, 5, 100) == 9 * 1000 + 12 * 35
    assert prediction_numbers(7, 5, 1200) == 9 * 1200 + 12 * 35


def split(job: Job, most: int | None) -> list[tuple[int, int]]:
    """How many texts and runs every pass has."""
    return [(len(part.ids), len(part.runs)) for part in plan(job, most)]


def test_texts_are_split_before_runs_and_evenly(model: GPT2) -> None:
    job = job_of(model)
    needed = {(texts, rows): estimate_bytes(job, texts, 8, rows) for texts in (1, 2, 3) for rows in range(2, 7)}
    assert split(job, needed[3, 6]) == [(3, 5)]
    assert split(job, needed[3, 6] - 1) == [(2, 5), (1, 5)]
    assert split(job, needed[2, 6] - 1) == [(1, 5)] * 3
    assert split(job, needed[1, 6] - 1) == [(1, 3), (1, 2)] * 3, "not 4 and 1"
    assert split(job, needed[1, 3]) == [(1, 2), (1, 2), (1, 1)] * 3
    assert split(job, needed[1, 2]) == [(1, 1)] * 15
    with pytest.raises(ValueError, match=f"max_bytes is {needed[1, 2] - 1}; one text of 8 tokens .* {needed[1, 2]}"):
        plan(job, needed[1, 2] - 1)


def test_a_job_without_runs_needs_room_for_the_clean_one_alone(model: GPT2) -> None:
    job = job_of(model, runs=[])
    needed = estimate_bytes(job, 1, 8, 1)
    assert split(job, needed) == [(1, 0)] * 3
    with pytest.raises(ValueError, match=f"takes {needed}"):
        plan(job, needed - 1)


def test_texts_of_more_tokens_than_a_slab_go_one_by_one(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CPU_SLAB", 16)
    assert split(job_of(model), None) == [(2, 5), (1, 5)]
    monkeypatch.setattr(engine, "CPU_SLAB", 7)
    assert split(job_of(model), None) == [(1, 5)] * 3


def test_a_quarter_of_what_is_free_is_taken(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(model)
    needed = estimate_bytes(job, 3, 8, 6)
    monkeypatch.setattr(passes, "free_bytes", lambda _: 4 * needed)
    assert split(job, None) == [(3, 5)]
    monkeypatch.setattr(passes, "free_bytes", lambda _: 4 * needed - 4)
    assert split(job, None) == [(2, 5), (1, 5)]
    monkeypatch.setattr(passes, "free_bytes", lambda _: 8)
    with pytest.raises(ValueError, match="A quarter of the memory that is free is 2"):
        plan(job, None)


def test_runs_are_in_the_order_in_which_they_leave_and_texts_are_cut_to_their_own_length(model: GPT2) -> None:
    runs = [{f"blocks.{layer}.output_scale": 0.5} for layer in (3, 0, 2, 1)]
    job = Job.checked(model, [[1, 2, 3, 4, 5], [1, 2, 3], [1, 2]], runs)
    (part,) = plan(job, None)
    assert list(part.runs) == [1, 3, 2, 0]
    alone = plan(job, estimate_bytes(job, 1, 5, 5))
    assert [part.ids.shape[1] for part in alone] == [5, 3, 2]
    assert [part.lengths.tolist() for part in alone] == [[5], [3], [2]]


class Files:
    """What the system says of its memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **said: str | None) -> None:
        self.said, plain = said, Path.read_text

        def read(path: Path, *given: Any, **named: Any) -> str:
            if not str(path).startswith(("/proc/meminfo", "/sys/fs/cgroup")):
                return plain(path, *given, **named)
            if (text := self.said.get(path.name.replace(".", "_"))) is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(Path, "read_text", read)


CPU = torch.device("cpu")


def test_what_is_free_is_what_the_machine_says(monkeypatch: pytest.MonkeyPatch) -> None:
    Files(monkeypatch, meminfo="MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n")
    assert free_bytes(CPU) == 5000 * 1024


def test_without_a_word_of_the_machine_half_of_its_memory_is_taken_for_free(monkeypatch: pytest.MonkeyPatch) -> None:
    Files(monkeypatch)
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    assert free_bytes(CPU) == math.floor(half)


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [(10_000, 4_000, 1_000, 7_000), (10_000, 9_000, 0, 1_000), (1_000, 4_000, 500, 0), (10**9, 1, 0, 5000 * 1024)],
)
def test_a_containers_limit_counts_too(
    monkeypatch: pytest.MonkeyPatch, limit: int, used: int, cached: int, free: int
) -> None:
    said = {"memory_max": str(limit), "memory_current": str(used)}
    Files(monkeypatch, meminfo="MemAvailable: 5000 kB\n", memory_stat=f"anon 7\ninactive_file {cached}\n", **said)
    assert free_bytes(CPU) == free


def test_a_container_without_a_limit_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Files(monkeypatch, meminfo="MemAvailable: 5000 kB\n", memory_max="max", memory_current="4", memory_stat="anon 7\n")
    assert free_bytes(CPU) == 5000 * 1024


def test_the_small_models_maps_are_those_counted_here() -> None:
    block = GPT2(GPT2Config(**SMALL)).blocks[0]
    found = [(of.in_features, of.out_features) for of in block.modules() if isinstance(of, torch.nn.Linear)]
    assert tuple(found) == LINEAR
