"""How an experiment is run: on one prompt, or on every window of a corpus.

A run certifies parity with Hugging Face, measures, and tries the measurement against what must be true of any weights.
"""

import copy
import platform
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from experiments.harness.corpus import Shards, Survey, digest_of_numbers, measure_corpus, remove_windows
from experiments.harness.digest import code_digest
from experiments.harness.experiment import Checked, Experiment, Ids, Raw, Settings, Study
from experiments.harness.output import WINDOWS, claimed
from experiments.harness.ranks import Ranks
from experiments.harness.table import Table, Tables, of_text, of_windows
from minigpt import GPT2, Sweep, Tokenizer, parity
from minigpt.model import block_name
from minigpt.passes import free_bytes
from minigpt.selfcheck import self_check

CHECKED_WINDOWS = 2
"""Of a corpus: enough to try the oracles on a batch."""
SHARE_FOR_FLOAT64 = 0.5
"""Of the memory that is free: what the weights may take once more, in float64."""


def run_prompt(experiment: Experiment[Raw], model: GPT2, tokenizer: Tokenizer) -> Study[Raw]:
    """Certify, run one prompt, check, measure.

    Raises ValueError for a prompt or a grid out of range, CheckError when parity or a self-check fails.
    """
    settings, code = experiment.settings, code_digest(experiment, model)
    ids = experiment.encode(tokenizer, model.config.n_positions)
    certificate = certify(settings, model)
    tried = _tried(experiment, model, [ids], certificate, alone=True)
    tables = _with_errors(of_text(tried.tables), tried.errors)
    _still_certified(certificate, model)
    about, tokens = describe(model), tokenizer.tokens(experiment.shown(ids))
    return Study(settings, about, tokens, {}, tried.checked, tables, tried.raw, tokenizer, code, tried.said)


def run_over_corpus(
    experiment: Experiment[Raw],
    model: GPT2,
    tokenizer: Tokenizer,
    output: Path,
    ranks: Ranks,
    held: ExitStack,
    overwrite: bool = False,
) -> Study[Raw] | None:
    """Certify, check on the first windows, measure every window, combine; None on all ranks but the first.

    `held` keeps the output folder for this run alone until it is closed: to the end of `write`.

    Raises as `run_prompt` does, and ValueError for texts that cannot be read and for windows of other settings.
    """
    settings, texts, most = experiment.settings, experiment.settings.texts, model.config.n_positions
    if texts is None or texts.window > most:
        raise ValueError(f"--window is longer than the model's {most} positions; take a shorter one.")
    code, first, known = code_digest(experiment, model), list[_Tried[Raw]](), dict[str, Any]()
    shards = Shards(output / WINDOWS, _identity(experiment, model, code))

    def prepare() -> dict[str, Any]:
        held.enter_context(claimed(output, settings.to_json(), code, overwrite, experiment.files))
        certificate = certify(settings, model)
        windows = texts.first_windows(tokenizer, CHECKED_WINDOWS)
        first.append(_tried(experiment, model, windows, certificate, alone=False))
        known["labels"] = {name: _labels(table) for name, table in first[0].tables.items()}
        return {"first_numbers": digest_of_numbers({}, {name: of.value for name, of in first[0].tables.items()})}

    def measure(windows: Ids) -> dict[str, Tensor]:
        tables = experiment.measure(model, experiment.run(model, windows, alone=False))
        labels = {name: _labels(table) for name, table in tables.items()}
        if labels != known.setdefault("labels", labels):
            raise ValueError("The labels of the tables differ between windows, so that no mean over them can be taken.")
        return {name: table.value for name, table in tables.items()}

    measured = measure_corpus(
        texts, tokenizer, shards, ranks, prepare, measure, overwrite=overwrite, quiet=not experiment.progress
    )
    if measured is None:
        return None
    (tried,), counts = first, measured[1].counts
    tables = _with_errors(_combined(model, *measured, tried.tables, tried.checked.certificate), tried.errors)
    return Study(settings, describe(model), [], counts, tried.checked, tables, tried.raw, tokenizer, code, tried.said)


@dataclass(frozen=True)
class _Tried(Generic[Raw]):
    """A prompt, or the first windows of a corpus: run, checked and measured."""

    raw: Raw
    checked: Checked
    tables: Tables
    """By text."""
    errors: dict[str, Tensor]
    """By rounding, of the tables."""
    said: str
    """What those errors are."""


def _tried(
    experiment: Experiment[Raw], model: GPT2, texts: Ids, certificate: parity.Certificate | None, alone: bool
) -> _Tried[Raw]:
    raw = experiment.run(model, texts, alone=alone)
    checked = replace(experiment.check(model, raw), certificate=certificate)
    tables = experiment.measure(model, raw)
    return _Tried(raw, checked, tables, *_rounding(experiment, model, texts, tables))


def _labels(table: Table) -> dict[str, list[Any]]:
    """Of every axis but the texts'."""
    return {axis: list(of) for axis, of in table.axes.items() if axis != "text"}


def _with_errors(tables: Tables, errors: dict[str, Tensor]) -> Tables:
    return {name: replace(table, error=errors.get(name)) for name, table in tables.items()}


def _rounding(experiment: Experiment[Any], model: GPT2, texts: Ids, tables: Tables) -> tuple[dict[str, Tensor], str]:
    """The errors by rounding of what was measured of some texts, and in words what they are: the same experiment again,
    in float64.

    The weights are those in use. Of several texts the largest error counts, so there is no axis of the texts. Where a
    page shows more than was asked for, only what was asked for has errors.
    """
    none, dtype = "No errors by rounding were measured", str(model.dtype).removeprefix("torch.")
    if model.dtype == torch.float64:
        return {}, f"{none}: everything was computed in float64."
    if model.device.type == "mps":
        return {}, f"{none}: MPS has no float64."
    needed = 8 * sum(weight.numel() for weight in model.parameters())
    if needed > SHARE_FOR_FLOAT64 * free_bytes(model.device):
        return {}, f"{none}: in float64 the model takes {needed / 2**30:.3g} GiB, and there is not enough memory."
    exact = copy.deepcopy(model).to(torch.float64)
    again = experiment.measure(exact, experiment.run(exact, texts, alone=False))
    errors = {name: table.beside(again[name]).amax(0) for name, table in tables.items() if name in again}
    of = f", the largest of the first {len(texts)} windows" if experiment.settings.texts else ""
    return errors, f"Errors by rounding{of}: the same numbers in {dtype} and in float64."


def _combined(
    model: GPT2, shards: Shards, survey: Survey, axes: Tables, certificate: parity.Certificate | None
) -> Tables:
    """What all shards make together, on the axes of what was measured of the first windows."""
    try:
        _still_certified(certificate, model)
    except parity.CheckError:
        remove_windows(shards.folder)  # or a later run would take the windows up
        raise
    return of_windows(axes, shards.combine(survey), survey.counts["windows"])


def _identity(experiment: Experiment[Any], model: GPT2, code: str) -> dict[str, Any]:
    """All that decides the numbers of a window, but for the windows: what it takes to go on with another run's."""
    asked = experiment.settings.to_json()
    asked = {name: value for name, value in asked.items() if name not in ("model", "parity", "revision")}
    asked["texts"] = {name: value for name, value in asked["texts"].items() if name != "path"}
    cuda = experiment.settings.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    origin = {"weights": parity.fingerprint(model), "versions": versions(), "processor": where, "code": code}
    return {"experiment": experiment.name, **asked, **origin, "arithmetic": _arithmetic()}


def _arithmetic() -> dict[str, Any]:
    """PyTorch's switches by which the same product comes out otherwise."""
    cuda = torch.backends.cuda
    return {
        "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float16 sums": str(cuda.matmul.allow_fp16_reduced_precision_reduction),
        "bfloat16 sums": str(cuda.matmul.allow_bf16_reduced_precision_reduction),
        "attention": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()],
    }


def certify(settings: Settings, model: GPT2) -> parity.Certificate | None:
    """The parity certificate, where one is asked for; CheckError when the model fails.

    A model with blocks of its own has nothing to be compared with, and runs.
    """
    certificate = parity.certify(model) if settings.parity else None
    if certificate and not certificate.may_run:
        raise parity.CheckError(f"parity {certificate.sentence()} The study does not run; --no-parity overrides this.")
    return certificate


def _still_certified(certificate: parity.Certificate | None, model: GPT2) -> None:
    """Raise CheckError when the weights are no longer those that were certified."""
    if certificate and certificate.passed and not certificate.holds_for(model):
        raise parity.CheckError(
            "the weights were edited after the model was certified, so the certificate says nothing about these "
            "numbers. Edit first and certify then; --no-parity runs without."
        )


def self_checked(model: GPT2, result: Sweep) -> Checked:
    """Try a sweep against what must be true of any weights. Raises CheckError when it is not."""
    tried = self_check(model, result)
    if tried.broken:
        found = "; ".join(f"{check.claim}: {check.figure}" for check in tried.broken)
        raise parity.CheckError(f"the sweep contradicts what must be true of any weights: {found}.")
    return Checked(None, [asdict(check) for check in tried.checks], {"upstream": tried.upstream})


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    packages = ("minigpt", "torch", "numpy", "safetensors", "tokenizers", "transformers")
    return {"python": platform.python_version(), **parity.installed(*packages)}


def describe(model: GPT2) -> dict[str, Any]:
    """What ran: the checkpoint's origin and hashes, and the model's shape."""
    origin: dict[str, Any] = {}
    if source := model.source:
        origin = {"name": source.name, "repository": source.repository, "commit": source.commit}
        origin["sha256"] = source.sha256
    return {**origin, "config": model.config.to_dict(block_name(model.block))}
