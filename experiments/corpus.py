"""A measurement repeated over the windows of a corpus, by one process or by many.

    torchrun --nproc-per-node 2 -m experiments.divergence --texts corpus.txt

Texts are cut into windows, and windows into shards of a fixed size. Ranks share the shards; what is
measured stays per window, and every finished shard is a file. So a run that was killed goes on where it
stopped, and ends with the same bits on any number of ranks (with equal threads each: the sums inside a
matrix product depend on them).
"""

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__
from tqdm import tqdm

from experiments.texts import COUNTS, Texts
from minigpt import Tokenizer
from minigpt.files import open_tensors, read_json, write_tensors, write_text

SHARD_WINDOWS = 16
"""Windows that are measured and written together."""
RESAMPLES, SEED = 1000, 0
"""Of the bootstrap."""
INTERVAL = (0.025, 0.975)
BOOTSTRAP = {"of": "mean", "quantiles": INTERVAL, "resamples": RESAMPLES, "seed": SEED}
"""How `low` and `high` come about, for a summary."""
PATIENCE = timedelta(days=30)
"""A rank may wait as long as another works; one that dies is noticed by torchrun, which ends them all."""
MOST_NUMBERS = 2**20
"""Numbers held at once when windows are combined: 8 MiB."""
FEWEST_COLUMNS = 64
"""Combined together even where they are more numbers than that, from 16,384 windows on (0.5 KB a window): every group
of columns reads all shards again."""
STATISTICS = ("mean", "sd", "median", "q1", "q3", "low", "high")
"""Over windows: mean, standard deviation, median, quartiles, and the bootstrap interval (95 %) of the mean."""

Windows = Sequence[Sequence[int]]
Measure = Callable[[Windows], dict[str, Tensor]]
"""Token ids of some windows -> tensors whose first axis is the window."""


def rank_device(device: torch.device) -> torch.device:
    """The GPU of this rank, where torchrun started several on one machine."""
    if device.type != "cuda" or not dist.is_torchelastic_launched():
        return device
    local, ranks, there = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if ranks > there or (device.index is not None and ranks > 1):
        raise ValueError(f"{ranks} processes need a GPU each, and here are {there}: start fewer, with --device cuda.")
    return torch.device("cuda", local) if device.index is None else device


def default_max_bytes(device: torch.device) -> int:
    """Memory for a pass that does not depend on what is free, so that every run splits its cells alike."""
    return torch.cuda.mem_get_info(device)[1] // 4 if device.type == "cuda" else 2**30


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    def from_first(self, prepare: Callable[[], list[int]]) -> list[int]:
        """Numbers that rank 0 prepares while the others wait; they leave without a word when it fails."""
        numbers = list[int]()
        if self.rank == 0:
            try:
                numbers = prepare()
            except BaseException:
                self._broadcast(torch.tensor([-1]))
                raise
        length = int(self._broadcast(torch.tensor([len(numbers)])))
        if length < 0:
            raise SystemExit(1)
        return self._broadcast(torch.tensor(numbers or [0] * length, dtype=torch.int64)).tolist()

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world == 1:
            return
        here = torch.zeros(1, device=self.device)
        try:
            dist.all_reduce(here)
        except RuntimeError:  # another rank is gone; torchrun says which
            raise SystemExit(1) from None
        here.item()  # NCCL lets the host go on before the GPUs have met

    def _broadcast(self, numbers: Tensor) -> Tensor:
        numbers = numbers.to(self.device)
        if self.world > 1 and numbers.numel():
            dist.broadcast(numbers, src=0)
        return numbers


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, joined by PyTorch's process group; one alone where it started none."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=_store(), rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield Ranks(rank, world, str(device))
    finally:
        dist.destroy_process_group()


def _store() -> Store:
    """Where the ranks find each other.

    torchrun's own store outlives a restart, and with it the addresses of ranks that are gone
    (github.com/pytorch/pytorch/issues/135712): every attempt gets names of its own.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    master = not shared and os.environ["RANK"] == "0"
    store = TCPStore(address, port, is_master=master, wait_for_workers=False, timeout=PATIENCE)
    return PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store) if shared else store


@dataclass(frozen=True)
class Shards:
    """The finished shards of one run, in a folder of their own within the output folder."""

    folder: Path
    settings: dict[str, Any]
    """All that decides the numbers."""

    @property
    def fingerprint(self) -> str:
        """A hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def open(self, overwrite: bool) -> list[int]:
        """The numbers of the shards that are there already.

        Leftovers of a write that was killed are removed. Raises ValueError when shards of other settings lie in the
        folder, unless those are to be overwritten; shards of these settings are always kept.
        """
        described = self.folder / "settings.json"
        other = self._other_settings(described)
        if other and not overwrite:
            raise ValueError(
                f"{self.folder} holds windows of a run with other settings ({', '.join(other)}); choose another "
                "--output, or add --overwrite."
            )
        if other:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        text = json.dumps(self.settings, indent=2) + "\n"
        write_text(described, text)
        return self.finished()

    def _other_settings(self, described: Path) -> list[str]:
        """The names of the settings in which the folder's shards differ from these; empty for an empty folder."""
        if not self.folder.exists() or not any(path for path in self.folder.iterdir() if path.name[0] != "."):
            return []
        try:
            found = read_json(described)
            return sorted(name for name in {*found, *self.settings} if found.get(name) != self.settings.get(name))
        except (OSError, ValueError, AttributeError, TypeError):
            return ["they are not described"]

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{number:07d}.safetensors"

    def write(self, number: int, measured: dict[str, Tensor]) -> None:
        """Write a shard whole, or not at all: every tensor as [window, column]."""
        shapes = {name: list(values.shape[1:]) for name, values in measured.items()}
        flat = {name: values.flatten(1).contiguous() for name, values in measured.items()}
        # one key: safetensors writes several in no fixed order, and equal runs shall write equal files
        metadata = {"shard": json.dumps({"settings": self.fingerprint, "shapes": shapes})}
        write_tensors(self.path(number), flat, metadata)

    def finished(self) -> list[int]:
        """The numbers of the shards that are there, whichever rank wrote them."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]" * 7 + ".safetensors"))

    def combine(self, windows: int) -> dict[str, dict[str, Tensor]]:
        """Over so many windows: name -> statistic -> tensor, without the window axis. See `STATISTICS`."""
        with self._opened(0) as (file, shapes):
            for name, shape in shapes.items():
                if file.get_slice(name).get_shape()[1:] != [math.prod(shape)]:
                    raise ValueError(f"{name} has another shape than the file says")
        return {name: self._combine(name, shape, shards_of(windows)) for name, shape in shapes.items()}

    def _combine(self, name: str, shape: list[int], count: int) -> dict[str, Tensor]:
        columns = math.prod(shape)
        step = max(FEWEST_COLUMNS, MOST_NUMBERS // (count * SHARD_WINDOWS))
        groups = [
            summarise([self._columns(number, name, start, start + step) for number in range(count)])
            for start in range(0, columns, step)
        ]
        whole = np.concatenate(groups, axis=1)
        return {
            statistic: torch.from_numpy(values).reshape(shape)
            for statistic, values in zip(STATISTICS, whole, strict=True)
        }

    def _columns(self, number: int, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Some columns of a shard: [window, column]. Raises ValueError for a file of another run."""
        with self._opened(number) as (file, _):
            return file.get_slice(name)[:, start:stop].double().numpy()

    @contextmanager
    def _opened(self, number: int) -> Iterator[tuple[Any, dict[str, list[int]]]]:
        """A shard, and the shapes of a window's numbers. Raises ValueError where it cannot be used."""
        path = self.path(number)
        try:
            with open_tensors(path) as file:
                about = json.loads(file.metadata()["shard"])
                if about["settings"] != self.fingerprint:
                    raise ValueError("it belongs to a run with other settings")
                yield file, about["shapes"]
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it and run again.") from None


def summarise(shards: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """`STATISTICS` of every column, over the windows of all shards: [window, column] each -> [statistic, column].

    The interval is that of a bootstrap in which every window counts a Poisson(1) number of times, drawn for each
    shard from its own seed (Chamandy et al. 2012, "Estimating Uncertainty for Massive Data Streams", section 3):
    unlike draws with replacement, it needs no more than one shard at a time. Windows count as independent, also
    those of one text: of a few long texts the interval is too narrow.
    """
    values = np.concatenate(shards)
    sums, weights = np.zeros((RESAMPLES, values.shape[1])), np.zeros((RESAMPLES, 1))
    for number, shard in enumerate(shards):
        times = np.random.default_rng((SEED, number)).poisson(1.0, (RESAMPLES, len(shard))).astype(np.float64)
        sums += times @ shard
        weights += times.sum(axis=1, keepdims=True)
    drawn = weights[:, 0] > 0  # of very few windows, a resample may count none
    means = sums[drawn] / weights[drawn]
    sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)
    quartiles = np.quantile(values, (0.5, 0.25, 0.75), axis=0)
    return np.stack([values.mean(axis=0), sd, *quartiles, *np.quantile(means, INTERVAL, axis=0)])


def measure_corpus(
    texts: Texts,
    tokenizer: Tokenizer,
    shards: Shards,
    ranks: Ranks,
    prepare: Callable[[], object],
    measure: Measure,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, int]:
    """Measure every window that has not been measured yet, shared among the ranks; returns `Texts.count`.

    `prepare` runs on rank 0 first, and stops all ranks by raising. Returns when all ranks are done.
    """

    def first() -> list[int]:
        prepare()
        return [*texts.count(tokenizer).values(), *shards.open(overwrite)]

    numbers = ranks.from_first(first)
    counts, finished = dict(zip(COUNTS, numbers, strict=False)), set(numbers[len(COUNTS) :])
    windows = counts["windows"]
    missing = [number for number in range(shards_of(windows)) if number not in finished]
    mine = set(missing[ranks.rank :: ranks.world])
    hidden = quiet or ranks.rank > 0 or None  # None: hidden where there is no terminal
    with tqdm(
        total=windows, initial=min(windows, len(finished) * SHARD_WINDOWS), unit="window", leave=False, disable=hidden
    ) as bar:
        for number, shard in enumerate(batched(texts.windows(tokenizer))):
            if number in mine:
                shards.write(number, measure(shard))
                bar.update(min(windows, len(shards.finished()) * SHARD_WINDOWS) - bar.n)
    ranks.wait()
    return counts


def shards_of(windows: int) -> int:
    """How many shards so many windows make."""
    return -(-windows // SHARD_WINDOWS)


def batched(windows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Windows, shard by shard."""
    while shard := list(itertools.islice(windows, SHARD_WINDOWS)):
        yield shard
