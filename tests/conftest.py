"""Models and texts that the tests share; nothing here touches the network."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

if "official" not in sys.argv:  # before huggingface_hub is imported, which reads it once
    os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from minigpt import GPT2, Block, GPT2Config
from minigpt.parameters import natives, parameter_name

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""For the tests of pages; they are skipped where there is none."""
ROOT = Path(__file__).parents[1]
TINY = ROOT / "weights" / "tiny"
SMALL = {"vocab_size": 97, "n_positions": 24, "n_embd": 36, "n_head": 3, "n_layer": 4}


def draw(
    config: GPT2Config,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    std: float = 0.2,
    block: type[Block] = Block,
) -> GPT2:
    """A model whose every weight matters: biases and norms are drawn too, and drawn large."""
    model = GPT2(config, block).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn + 1 if name.endswith("norm.weight") else drawn)
    return model


def value_at(model: GPT2, site: str, factor: float, index: int = 1) -> float | torch.Tensor:
    """A factor as the value of a site's scale: of one entry alone, head 1, say, where the site has several."""
    native = natives(model)[parameter_name(model, 0, site)]
    if native.index is None:
        return factor
    return torch.ones(native.entries(model.config), dtype=torch.float64).index_fill(0, torch.tensor(index), factor)


def entries(model: GPT2, site: str, *indices: int) -> tuple[int, ...] | None:
    """Those entries of a site, where it has several: what `sweep` takes as `indices`."""
    return indices if natives(model)[parameter_name(model, 0, site)].index else None


@pytest.fixture
def small() -> Callable[..., GPT2]:
    """Make a small random model; arguments are fields of GPT2Config."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, block: type[Block] = Block, **fields: object) -> GPT2:
        return draw(GPT2Config(**{**SMALL, **fields}), seed, dtype, block=block)

    return make


@pytest.fixture
def model(small: Callable[..., GPT2]) -> GPT2:
    """A small random model in float64."""
    return small()


@pytest.fixture
def ids() -> torch.Tensor:
    """Two random texts of ten tokens."""
    return torch.randint(SMALL["vocab_size"], (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny() -> GPT2:
    """The embedded checkpoint, float32. Shared: tests leave it as it is."""
    return GPT2.from_pretrained(TINY)
