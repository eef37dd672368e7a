"""The doctor: a machine whose numbers can be believed passes, and every way of lying is found."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minigpt import GPT2, Block, cli, parity
from minigpt.doctor import Finding, examine
from minigpt.selfcheck import Check, SelfCheck
from tests.blocks import BLOCKS
from tests.conftest import TINY

Run = Callable[..., tuple[int, str, str]]
Sabotage = Callable[[pytest.MonkeyPatch], object]
HONEST = F.scaled_dot_product_attention


@pytest.fixture
def minigpt(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minigpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run


def test_a_sound_machine_passes_every_check(minigpt: Run) -> None:
    code, out, err = minigpt("doctor", TINY)
    assert (code, err) == (0, "")
    for name in ("device", "dtype", "threads", "float32 matrix products", "attention", "3 runs are bit-identical"):
        assert name in out
    assert "parity in float32: certified" in out
    assert "parity in float64: certified" in out
    assert out.count("ok  sweep: ") == 6
    assert "all 11 checks hold here." in out


def test_the_findings_come_as_json_too(minigpt: Run) -> None:
    code, out, _ = minigpt("doctor", TINY, "--json", "--dtype", "float64")
    said = json.loads(out)
    assert code == 0
    assert {"name": "dtype", "said": "float64", "passed": None} in said["findings"]
    assert said["verdict"] == "all 11 checks hold here."


def less_precise(_: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("medium")


def wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused kernel that leaves out the last key, as one with a bug at its edge would."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        found = HONEST(q, k, v, **options)
        if torch.backends.cuda.flash_sdp_enabled():  # the plain products are right
            found = found.clone()
            found[..., -1, :] = v[..., -2, :]
        return found

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def forgetful_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong everywhere alike: the kernel agrees with the plain products, and both are wrong."""
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **options: HONEST(q, k, v * 1.001, **options)
    )


def restless_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that come out otherwise in every run, in the last bits."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        found = HONEST(q, k, v, **options)
        return found * (1 + 1e-7 * torch.randn(()).to(found.dtype))

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def broken_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check("the jump at the site is |s - 1| times the stream's norm", False, 0.1)
    monkeypatch.setattr("minigpt.doctor.self_check", lambda *_: SelfCheck((check,), ()))


def no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that lacks the type."""
    load = GPT2.from_pretrained

    def from_pretrained(*arguments: Any, **options: Any) -> GPT2:
        if torch.float64 in (*arguments, *options.values()):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return load(*arguments, **options)

    monkeypatch.setattr(GPT2, "from_pretrained", from_pretrained)


SABOTAGES: dict[str, tuple[Sabotage, set[str]]] = {
    "less precise products": (less_precise, {"float32 matrix products"}),
    "a wrong kernel": (wrong_attention, {"attention", "parity in float32", "parity in float64"}),
    "wrong everywhere alike": (forgetful_attention, {"parity in float32", "parity in float64"}),
    "other sums in every run": (restless_products, {"3 runs are bit-identical"}),
    "an oracle that is contradicted": (broken_oracle, {"sweep"}),
    "a device without float64": (no_float64, {"parity in float64"}),
}


@pytest.fixture
def highest() -> Iterator[None]:
    """Give the precision of products back."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("case", SABOTAGES)
def test_what_lies_is_named_and_the_exit_code_is_1(
    minigpt: Run, monkeypatch: pytest.MonkeyPatch, highest: None, case: str
) -> None:
    sabotage, names = SABOTAGES[case]
    sabotage(monkeypatch)
    code, out, _ = minigpt("doctor", TINY)
    off = {line[4:].partition(":")[0] for line in out.splitlines() if line.startswith("OFF ")}
    assert code == 1
    assert names <= off
    assert "something is off: " in out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_wrong_kernel_is_found_in_half_types_too(minigpt: Run, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    assert minigpt("doctor", TINY, "--dtype", dtype)[0] == 0
    wrong_attention(monkeypatch)
    code, out, _ = minigpt("doctor", TINY, "--dtype", dtype)
    assert (code, "OFF attention" in out) == (1, True)


def test_a_model_that_nothing_can_be_compared_with_is_not_off_for_that(
    small: Callable[..., GPT2], tmp_path: Path, minigpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(dtype=torch.float32).save_pretrained(tmp_path)
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    code, out, _ = minigpt("doctor", tmp_path)
    assert code == 0
    assert "    parity in float32: not certified." in out


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_ones_own_is_examined_as_well(
    small: Callable[..., GPT2], tmp_path: Path, minigpt: Run, block: type[Block]
) -> None:
    small(block=block, dtype=torch.float32).save_pretrained(tmp_path)
    code, out, err = minigpt("doctor", tmp_path, "--block", f"tests.blocks:{block.__name__}")
    assert (code, err) == (0, "")
    assert "ok  attention: " in out
    assert "    parity in float64: not comparable. A modified architecture" in out


def test_a_lack_of_memory_says_nothing_about_the_numbers(minigpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("minigpt.doctor.sweep", sweep)
    code, out, _ = minigpt("doctor", TINY)
    assert (code, "    sweep: cannot run here: MemoryError" in out) == (0, True)


def test_a_model_without_a_checkpoint_has_no_parity(model: GPT2) -> None:
    found = {finding.name: finding for finding in examine(model.float())}
    assert found["parity in float32"] == Finding(
        "parity in float32", "cannot run here: the model was not loaded from a checkpoint", False
    )
    assert found["attention"].passed


# Devices.


def test_auto_never_takes_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cli.pick_device("auto").type in ("cpu", "cuda")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="here is one")
def test_mps_that_is_not_there_is_a_sentence(minigpt: Run) -> None:
    code, _, err = minigpt("verify", TINY, "--device", "mps")
    assert (code, err.count("\n")) == (2, 1)
    assert "The device 'mps' cannot be used here" in err


def test_a_device_of_no_known_kind_is_refused_in_our_own_words(minigpt: Run) -> None:
    assert minigpt("verify", TINY, "--device", "tpu") == (
        2,
        "",
        "Error: The device is 'tpu'; expected one of cpu, cuda, mps, or auto.\n",
    )


def test_a_device_that_is_not_trusted_untried_is_used_when_it_passes(
    minigpt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "TRUSTED", ())
    code, out, err = minigpt("generate", TINY, "--prompt", "The old man", "--max-new-tokens", "2")
    assert (code, err) == (0, "")
    assert out.startswith("The old man")


def test_a_device_that_fails_is_not_used(minigpt: Run, tiny: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "TRUSTED", ())
    forgetful_attention(monkeypatch)
    code, out, err = minigpt("generate", TINY, "--prompt", "The old man")
    assert (code, out) == (1, "")
    assert "Check failed: cpu cannot be believed here, take cpu. parity in float32: failed" in err
    with pytest.raises(parity.CheckError):
        cli.admit(tiny)


def test_the_version_is_told(minigpt: Run) -> None:
    code, out, _ = minigpt("--version")
    assert (code, out.split()[0]) == (0, "minigpt")
