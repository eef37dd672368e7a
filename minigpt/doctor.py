"""Can the numbers of this machine be believed? What computes them, and all that must hold of them, tried here."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minigpt import parity
from minigpt.model import GPT2
from minigpt.passes import is_out_of_memory
from minigpt.selfcheck import self_check
from minigpt.sweep import sweep

TOKENS = 32
"""Of the random texts that are run."""
REPETITIONS = 3
FAILURES = (RuntimeError, TypeError, NotImplementedError, ValueError, MemoryError)
FACTORS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    said: str
    passed: bool | None = None
    """None where there is nothing to hold it against."""


@torch.no_grad()
def examine(model: GPT2) -> Iterator[Finding]:
    """Look at a machine through a model, one finding after the other: what runs, and whether it can be believed.

    The model is as it was loaded, its native parameters neutral. What fails to run at all is a finding that does not
    pass.
    """
    yield from _circumstances(model)
    yield _attempt("attention", lambda: _attention(model))
    for dtype in (torch.float32, torch.float64):
        yield _attempt(f"parity in {dtype}".replace("torch.", ""), lambda dtype=dtype: _parity(model, dtype))  # type: ignore[misc]
    yield from _oracles(model)
    yield _attempt(f"{REPETITIONS} runs are bit-identical", lambda: _repeated(model))


def _circumstances(model: GPT2) -> Iterator[Finding]:
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _processor()
    yield Finding("device", f"{model.device.type}: {name}")
    yield Finding("dtype", str(model.dtype).removeprefix("torch."))
    yield Finding("threads", str(torch.get_num_threads()))
    yield Finding("versions", ", ".join(f"{name} {number}" for name, number in _versions().items()))
    precision = torch.get_float32_matmul_precision()
    yield Finding("float32 matrix products", f"precision {precision}; expected highest", precision == "highest")


def _versions() -> dict[str, str]:
    packages = parity.installed("minigpt", "torch", "safetensors", "tokenizers", "transformers")
    return {"python": platform.python_version(), **packages}


def _processor() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(row.partition(": ")[2] for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def _attempt(name: str, look: Callable[[], tuple[str, bool | None]]) -> Finding:
    """A finding, also where looking fails: a device can lack a type or an operation."""
    try:
        return Finding(name, *look())
    except FAILURES as error:
        return Finding(name, *_failed(error))


def _failed(error: Exception) -> tuple[str, bool | None]:
    """What a failure says; a lack of memory says nothing about the numbers."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"cannot run here: {reason}", None if is_out_of_memory(error) else False


def _attention(model: GPT2) -> tuple[str, bool]:
    """Whether torch's attention agrees with the plain products, in the model's shape, and which one it is."""
    config, length = model.config, _ids(model).shape[1]
    shape = (3, 2, config.n_head, length, config.head_width)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = drawn.to(model.dtype).to(model.device)
    found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    apart = float((found.double() - plain.double()).abs().max() / plain.double().abs().max())
    limit = (4 if q.dtype.itemsize == 2 else 100) * torch.finfo(q.dtype).eps
    kind = "the plain products" if torch.equal(found, plain) else "a fused kernel"
    said = f"{kind} ({', '.join(_kernels(model))}); {apart:.1e} from the plain products, at most {limit:.1e} expected"
    return said, apart <= limit


def _kernels(model: GPT2) -> list[str]:
    """The kernels that torch may choose from."""
    if model.device.type != "cuda":
        return ["torch's own choice"]
    cuda = torch.backends.cuda
    enabled = {
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "cuDNN": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return [name for name, on in enabled.items() if on]


def _parity(model: GPT2, dtype: torch.dtype) -> tuple[str, bool | None]:
    """The certificate of the model's checkpoint in that type, on the model's device."""
    if model.source is None:
        raise ValueError("the model was not loaded from a checkpoint")
    device = model.device
    loaded = GPT2.from_pretrained(model.source.directory, device=device, dtype=dtype, block=model.block)
    loaded.source = model.source
    certificate = parity.certify(loaded)
    return certificate.sentence(), certificate.passed if certificate.against else None


def _oracles(model: GPT2) -> Iterator[Finding]:
    """What must be true of a sweep whatever the weights are."""
    last = model.config.n_layer - 1
    try:
        found = self_check(model, sweep(model, _ids(model), sorted({0, last // 2, last}), FACTORS))
    except FAILURES as error:
        yield Finding("sweep", *_failed(error))
        return
    for check in found.checks:
        yield Finding("sweep", f"{check.claim}: {check.figure:.3g}", check.passed)


def _repeated(model: GPT2) -> tuple[str, bool]:
    ids = _ids(model)

    def once() -> tuple[Tensor, Tensor]:
        return model(ids), sweep(model, ids, [0], FACTORS).statistics.difference_sq

    first = once()
    same = all(
        torch.equal(one, other) for _ in range(REPETITIONS - 1) for one, other in zip(first, once(), strict=True)
    )
    return "logits and a sweep" if same else "logits or a sweep differ from run to run", same


def _ids(model: GPT2) -> Tensor:
    """Two random texts, the same every time."""
    length = min(TOKENS, model.config.n_positions)
    drawn = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return drawn.to(model.device)
