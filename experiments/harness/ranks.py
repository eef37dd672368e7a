"""The processes that torchrun started, and what one of them needs to know of the others."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

PATIENCE = timedelta(days=30)
"""A rank may wait as long as another works; one that dies is noticed by torchrun, which ends them all."""


def rank_device(device: torch.device) -> torch.device:
    """The GPU of this rank, where torchrun started several on one machine."""
    if device.type != "cuda" or not dist.is_torchelastic_launched():
        return device
    local, ranks, there = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if ranks > there or (device.index is not None and ranks > 1):
        raise ValueError(f"{ranks} processes need a GPU each, and here are {there}: start fewer, with --device cuda.")
    return torch.device("cuda", local) if device.index is None else device


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
