"""Does this model compute what Hugging Face's GPT-2 computes? Checked before any study.

Three ways, and `certify` takes the first that applies: a reference stored beside the weights, the
figures that others published for the official weights, a live run of transformers. Where a live run is
asked for, it comes on top of the others: it reads the same config.json as we do, and the others do not.

A model of another block has no counterpart in transformers: it is held against a reference of its own, where
`minigpt reference` stored one, and is "not comparable" otherwise.
"""

import copy
import hashlib
import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt import hub
from minigpt.checkpoint import CONFIG, INDEX, as_option, same_block, weight_files
from minigpt.config import ACTIVATIONS, OFFICIAL, CheckpointError, GPT2Config
from minigpt.files import open_tensors, shown, write_tensors
from minigpt.generate import generate
from minigpt.model import GPT2, Block, block_name
from minigpt.parameters import natives, not_neutral, weights

REFERENCE = "reference.safetensors"
TOLERANCES = {
    torch.float64: 1e-12,  # roundings are 1e-16; weights/tiny comes to 2e-15; the rest is room for other kernels
    torch.float32: 1e-5,  # some hundred roundings of 6e-8 lie between ids and logits
}
"""Largest difference over largest value, by the parameters' type. Half types are too coarse to tell a wrong activation
from rounding: such a model is certified in float32, and its weights must be those, rounded."""
STORED_ROUNDING = 1.2e-7
"""What rounding the reference to float32 adds."""
LIVE_TOKENS = 64
REFERENCE_TEXTS, REFERENCE_TOKENS = 2, 32
QUANTITIES = ("logits", "depths", "final", "loss")
"""What is compared, and with `ids` the tensors of a stored reference; texts of one token have no loss."""
NO_ARITHMETIC = {
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range"),  # of training
    *("bos_token_id", "eos_token_id", "reorder_and_upcast_attn"),  # of generation, and of how scores are rounded
}
"""The fields of a config that change no number here."""
IF_MEANT = (
    "If an edit of this library was meant, put it into a subclass of minigpt.Block, and give that with block= or "
    "--block (README); or run with --no-parity."
)

Run = dict[str, Tensor]
"""`QUANTITIES` by name."""


@dataclass(frozen=True)
class Certificate:
    """The outcome of a parity check."""

    verdict: Literal["certified", "failed", "not certified", "not comparable"]
    against: str
    """What the model was compared with; empty when there was nothing."""
    differences: dict[str, float] = field(default_factory=dict)
    """Name -> largest difference over largest value; published figures: largest difference, absolute."""
    tolerance: float | None = None
    problems: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    """The `fingerprint` of the model that was checked: the certificate is about these weights and no others."""
    also: str = ""
    """What else the model was compared with, and how that ended, as a sentence."""

    @property
    def passed(self) -> bool:
        """Whether the model may be called the same as the reference."""
        return self.verdict == "certified"

    @property
    def may_run(self) -> bool:
        """Whether a study of the model may run: it passed, or there is nothing that it should be the same as."""
        return self.verdict in ("certified", "not comparable")

    def holds_for(self, model: GPT2) -> bool:
        """Whether a model may run, and still has the block and the weights that it was checked with."""
        return self.may_run and self.weights == fingerprint(model)

    def sentence(self) -> str:
        """The outcome in a line."""
        also = [f"Also {self.also}"] if self.also else []
        if not self.against:
            return " ".join([f"{self.verdict}.", *self.problems, *also])
        worst = max(self.differences.items(), key=lambda item: item[1], default=None)
        figure = f"; largest difference {worst[1]:.1e} ({worst[0]})" if worst else ""
        limit = f", tolerance {self.tolerance:.1e}" if self.tolerance is not None else ""
        return " ".join([f"{self.verdict} against {self.against}{figure}{limit}.", *self.problems, *also])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: a difference that is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in self.differences.items()}
        return {**asdict(self), "differences": finite, "sentence": self.sentence()}


class CheckError(Exception):
    """A model, or a run of it, contradicts what it must agree with."""


def certify(model: GPT2, live: bool = False) -> Certificate:
    """Compare a model with the first of: a stored reference, published figures, transformers.

    `live` asks for the run of transformers on top of the others; where one of two fails, the certificate does. The
    model's native parameters must be neutral. The checkpoint is read once more: weights that are not its own fail, and
    without it nothing is certified. A checkpoint of an official name fails where its config is not the official one. A
    model of a block of one's own is compared with a reference of its own, or not comparable.

    Raises ValueError when a native parameter is not neutral, and when `live` is asked for without transformers or of
    an architecture that transformers has not.
    """
    if changed := not_neutral(model):
        raise ValueError(f"Parity is a claim about the clean model; set {', '.join(changed)} back.")
    if live and (name := _own_name(model)):
        raise ValueError(f"A live check asks transformers, which has no counterpart of {name}.")
    own = fingerprint(model)
    try:
        stored = fingerprint(_again(model, model.dtype)) if model.source else own
        certificate = replace(_compared(model, live), weights=own)
    except CheckpointError as error:  # the folder is gone, or another one now, or too odd for transformers
        return Certificate("not certified", "", problems=(str(error),), weights=own)
    if stored == own:
        return certificate
    where = model.source.directory if model.source else ""
    edited = f"The weights in memory are not those in {where}, rounded to {model.dtype}."
    return replace(certificate, verdict="failed", problems=(*certificate.problems, edited))


def _own_name(model: GPT2) -> str | None:
    """The name of what makes a model another architecture than GPT-2, its block or its class; None for GPT-2."""
    kind = type(model)
    return block_name(model.block) if kind is GPT2 else f"{kind.__module__}:{kind.__qualname__}"


def _again(model: GPT2, dtype: torch.dtype) -> GPT2:
    """A model as its checkpoint has it; a copy of one that has none."""
    if model.source is None:
        return copy.deepcopy(model).to(dtype)
    loaded = type(model).from_pretrained(model.source.directory, dtype=dtype, block=model.block)
    loaded.source = model.source
    return loaded


def _compared(model: GPT2, live: bool) -> Certificate:
    if type(model) is not GPT2:
        return Certificate("not comparable", "", problems=(_SUBCLASS,), versions=installed("minigpt", "torch"))
    if model.dtype not in TOLERANCES:
        return _in_float32(model, live)
    known = _against_known(model)
    if model.block is not Block:
        return known or _not_comparable(model)
    if known and not live:
        return known
    run = _against_transformers(model, live)
    if known is None:
        return run
    first, second = (run, known) if known.passed else (known, run)
    return replace(first, also=second.sentence())


_SUBCLASS = (
    "A subclass of GPT2 has no counterpart in transformers, whatever it changes. Put what is different into a subclass "
    "of minigpt.Block, and give that with block=: then a reference can be stored and held against it."
)


def _against_known(model: GPT2) -> Certificate | None:
    """What is known of a model without a run of transformers: its reference, or what was published; None without."""
    stored = model.source.directory / REFERENCE if model.source else None
    official = official_name(model) if model.block is Block else None
    if official and (wrong := _unlike(model.config, official)):
        return _certificate(f"the published size of {official}", {}, None, wrong)
    if stored and stored.exists():
        try:
            about = _about(stored)
        except (OSError, ValueError) as error:
            return _broken(stored, error)
        if same_block(about.get("block"), block_name(model.block)):
            return _against_stored(model, stored)
    return _against_published(model) if official == "gpt2" else None


def _about(path: Path) -> dict[str, str]:
    """What a stored reference says of itself."""
    with open_tensors(path) as stored:
        return stored.metadata() or {}


def _not_comparable(model: GPT2) -> Certificate:
    name = str(block_name(model.block))
    option, before = as_option(name)
    problem = (
        f"A modified architecture has no counterpart in transformers, and there is no reference of the block {name}. "
        f"`minigpt reference DIRECTORY --block {option}` stores what it computes today, so that later runs can be held "
        f"against it.{before}"
    )
    return Certificate("not comparable", "", problems=(problem,), versions=installed("minigpt", "torch"))


def _in_float32(model: GPT2, live: bool) -> Certificate:
    """Certify what a half-precision model was rounded from: the checkpoint, or where there is none its own weights."""
    certificate = _compared(_again(model, torch.float32).to(model.device), live)
    return replace(certificate, against=f"{certificate.against}, in float32" if certificate.against else "")


def official_name(model: GPT2) -> str | None:
    """The short name of the official checkpoint that a model was loaded from, if it was."""
    repository = model.source.repository if model.source else None
    return {long: short for short, long in hub.ALIASES.items()}.get(repository or "")


def _unlike(config: GPT2Config, name: str) -> list[str]:
    """A sentence for every field in which a config computes something else than the official one of that name."""
    found, expected = (_arithmetic(of) for of in (config, OFFICIAL[name]))
    return [
        f"config.json sets {field} to {shown(value)}; {name} has {shown(expected[field])}: download it again."
        for field, value in found.items()
        if value != expected[field]
    ]


def _arithmetic(config: GPT2Config) -> dict[str, Any]:
    """The fields that change a number, and one value for all that compute the same."""
    same = (name for name, function in ACTIVATIONS.items() if function is ACTIVATIONS[config.activation_function])
    alike = asdict(replace(config, n_inner=config.mlp_width, activation_function=next(same)))
    return {name: value for name, value in alike.items() if name not in NO_ARITHMETIC}


@torch.no_grad()
def run(model: GPT2, ids: Tensor) -> Run:
    """Everything that is compared, of this model: ids are int64 [batch, position]."""
    depths = model.residuals(ids)
    final = model.final_norm(depths[-1])
    logits = model.unembed(final)
    return {"logits": logits, "depths": depths, "final": final, "loss": next_token_loss(logits, ids)}


def load_transformers(directory: Path, dtype: torch.dtype) -> Any:
    """Hugging Face's GPT2LMHeadModel with the weights of a folder, with attention written out, not fused.

    It reads the weights itself. Of the folder's other files it sees none, but the config as we have read it: fields
    that change no number could still change what transformers does, or end it. Raises CheckpointError where it fails.
    """
    config, files = GPT2Config.from_file(directory / CONFIG), weight_files(directory)
    # transformers' written-out upcast refuses every type but float32.
    attention = "sdpa" if config.reorder_and_upcast_attn and dtype != torch.float32 else "eager"
    with tempfile.TemporaryDirectory() as scratch, _quiet_transformers() as transformers:
        Path(scratch, CONFIG).write_text(json.dumps(config.to_dict()), encoding="utf-8")
        for file in (*files, *directory.glob(INDEX)):
            Path(scratch, file.name).symlink_to(file.resolve())
        return transformers.GPT2LMHeadModel.from_pretrained(scratch, dtype=dtype, attn_implementation=attention).eval()


@torch.no_grad()
def run_transformers(model: Any, ids: Tensor) -> Run:
    """Everything that is compared, of Hugging Face's model.

    Depths are caught at each block's own output, after any hook that is there already:
    `output_hidden_states` holds the stream after the final norm in place of the last block's.
    """
    caught: list[Tensor] = []
    blocks, norm = model.transformer.h, model.transformer.ln_f
    hooks = [blocks[0].register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))]
    hooks += [b.register_forward_hook(lambda _module, _inputs, output: caught.append(output)) for b in (*blocks, norm)]
    try:
        with _quiet_transformers():
            logits = model(ids).logits
    finally:
        for hook in hooks:
            hook.remove()
    *depths, final = caught
    # Not transformers' own loss: that one is computed in float32 whatever the model's type.
    return {"logits": logits, "depths": torch.stack(depths), "final": final, "loss": next_token_loss(logits, ids)}


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token loss in nats per token; not a number for a text of one token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def differences(ours: Run, theirs: Run) -> dict[str, float]:
    """Largest absolute difference over largest absolute value, for every quantity that `theirs` holds.

    Where all values are 0, as the loss of a vocabulary of one token is, it is the difference itself.
    """
    result = {}
    for name, their in theirs.items():
        expected = their.double()
        largest = expected.abs().max()
        error = (ours[name].to(expected.device).double() - expected).abs().max() / (largest or 1)
        result[name] = float(error.nan_to_num(torch.inf))
    return result


def digest(model: GPT2) -> str:
    """sha256 over the weights in memory, as float32: the same for every file layout that holds them."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights(model).items()):
        total.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def fingerprint(model: GPT2) -> str:
    """sha256 over what the model is made of, its shape and every bit of the weights, whatever they were loaded from."""
    total = hashlib.sha256(f"{_own_name(model)} {block_name(model.block)} {model.config!r}".encode())
    for name, tensor in sorted((weights(model) | model.lasting()).items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_reference(directory: Path, ids: Tensor, block: type[Block] = Block) -> None:
    """Write reference.safetensors beside a checkpoint: what is computed for `ids` in float64.

    Transformers computes it where the block is GPT-2's, and this library itself for any other. Raises ValueError where
    a value is not finite, CheckpointError for a broken checkpoint, and OSError when the file cannot be written.
    """
    if block is Block:
        expected = run_transformers(load_transformers(directory, torch.float64), ids)
        about = {"transformers": version("transformers")}
    else:
        expected = run(GPT2.from_pretrained(directory, dtype=torch.float64, block=block), ids)
        about = {"minigpt": version("minigpt"), "block": str(block_name(block))}
    tensors = {name: expected[name].float().contiguous() for name in _quantities(ids)}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{', '.join(broken)} of {directory} are not finite; nothing can be held against them.")
    about |= {"weights": digest(GPT2.from_pretrained(directory, block=block)), "torch": version("torch")}
    write_tensors(directory / REFERENCE, {"ids": ids, **tensors}, about)


def reference_ids(config: GPT2Config) -> Tensor:
    """The texts of a reference, where nobody chose any: random, and the same every time."""
    shape = (REFERENCE_TEXTS, min(REFERENCE_TOKENS, config.n_positions))
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def has_transformers() -> bool:
    """Whether transformers is installed: an extra."""
    return importlib.util.find_spec("transformers") is not None


def _quantities(ids: Tensor) -> tuple[str, ...]:
    return QUANTITIES if ids.shape[1] > 1 else QUANTITIES[:-1]


def _broken(path: Path, error: Exception) -> Certificate:
    return _certificate(REFERENCE, {}, None, [f"{path} is broken or belongs to another model: {error}."])


def _against_stored(model: GPT2, path: Path) -> Certificate:
    try:
        with open_tensors(path) as stored:
            about = stored.metadata() or {}
            ids = stored.get_tensor("ids")
            model.config.check_ids(ids)
            expected = {name: stored.get_tensor(name) for name in _quantities(ids)}
        against = f"{REFERENCE} ({_origin(model, about)})"
        if expected["logits"].shape != (*ids.shape, model.config.vocab_size):
            raise ValueError("the logits are of other texts")
    except (OSError, LookupError, ValueError) as error:
        return _broken(path, error)
    ours = run(model, ids.to(model.device))
    problems = [f"{name} have another shape." for name in expected if ours[name].shape != expected[name].shape]
    if problems:
        return _certificate(against, {}, None, [*problems, f"{path} belongs to another model."])
    if digest(model) != about.get("weights"):
        problems.append("The weights are not those that the reference was computed with.")
    return _certificate(against, differences(ours, expected), TOLERANCES[model.dtype] + STORED_ROUNDING, problems)


def _origin(model: GPT2, about: dict[str, str]) -> str:
    """What wrote a reference, in words."""
    if model.block is Block:
        return f"transformers {shown(about['transformers'])[1:-1]}"
    return f"of its own: minigpt {shown(about['minigpt'])[1:-1]}, block {shown(about['block'])[1:-1]}"


def _against_transformers(model: GPT2, required: bool) -> Certificate:
    if not has_transformers():
        if required:
            raise ValueError("A live check needs transformers; install it with: pip install 'minigpt[parity]'.")
        return Certificate(
            "not certified", "", problems=("There is no stored reference, no published figure, and no transformers.",)
        )
    generator = torch.Generator().manual_seed(0)
    length = min(LIVE_TOKENS, model.config.n_positions)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    with tempfile.TemporaryDirectory() as scratch:
        directory = model.source.directory if model.source else Path(scratch)
        if model.source is None:
            model.save_pretrained(directory)
        expected = run_transformers(load_transformers(directory, model.dtype), ids)
    if length == 1:
        del expected["loss"]
    found = differences(run(model, ids.to(model.device)), expected)
    both = ", which read the same config.json as minigpt" if model.source else ""
    against = f"a live run of transformers {version('transformers')}{both}"
    return _certificate(against, found, TOLERANCES[model.dtype], [])


def published_figures() -> dict[str, Any]:
    """Figures that others published for the official weights, each with its source."""
    return json.loads(files("minigpt").joinpath("published_gpt2.json").read_text(encoding="utf-8"))


def _against_published(model: GPT2) -> Certificate:
    found, problems = published_differences(model, published_figures())
    return _certificate("published figures of gpt2", found, None, [*problems, IF_MEANT] if problems else [])


@torch.no_grad()
def published_differences(model: GPT2, figures: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Largest absolute difference by kind of figure, and a sentence for each figure that is missed.

    Each figure is held to the tolerance published with it; likeliest tokens and greedy continuations
    must be equal.
    """
    found, problems = dict[str, float](), list[str]()
    native = natives(model)
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in native)
    if count != figures["parameter_count"]["gpt2"]:
        problems.append(f"The model has {count} parameters; gpt2 has {figures['parameter_count']['gpt2']}.")
        return found, problems

    def compare(kind: str, ours: Tensor, entry: dict[str, Any], expected: list[float]) -> None:
        error = float((ours.double().cpu() - torch.tensor(expected, dtype=torch.float64)).abs().max())
        found[kind] = max(found.get(kind, 0.0), error)
        if not error <= entry["tolerance"]:
            problems.append(
                f"{kind} of {entry['ids']} differ by {error:.1e}, more than {entry['tolerance']} ({entry['source']})."
            )

    for entry in figures["logits"]:
        logits = model(_row(model, entry["ids"]))[0]
        compare("logits", logits[entry["position"], entry["vocab"]], entry, entry["logits"])
        if mean := entry.get("mean_over_all_positions_and_vocab"):
            compare("mean logit", logits.double().mean().reshape(1), entry, [mean])
    for entry in figures["final"]:
        final = model.final_norm(model.residuals(_row(model, entry["ids"]))[-1])[0]
        compare("final", final[entry["position"], : len(entry["first_five"])], entry, entry["first_five"])
    problems += _published_tokens(model, figures)
    return found, problems


def _published_tokens(model: GPT2, figures: dict[str, Any]) -> list[str]:
    problems = list[str]()
    for entry in figures["argmax"]:
        if model(_row(model, entry["ids"]))[0].argmax(-1).tolist() != entry["next"]:
            problems.append(f"The likeliest tokens after {entry['ids']} are not {entry['next']} ({entry['source']}).")
    for entry in figures["greedy"]:
        expected = entry.get("continuation_ids")
        if expected and list(generate(model, entry["ids"], len(expected))) != expected:
            problems.append(f"The greedy continuation of {entry['prompt']!r} is another ({entry['source']}).")
    return problems


def _certificate(against: str, found: dict[str, float], tolerance: float | None, problems: list[str]) -> Certificate:
    over = [name for name, error in found.items() if tolerance is not None and error > tolerance]
    said = [*problems, *(f"{name} differ by more than the tolerance." for name in over)]
    if over and not problems:  # the weights are right, so the arithmetic is another
        said.append(IF_MEANT)
    versions = installed("minigpt", "torch", "transformers")
    return Certificate("failed" if said else "certified", against, found, tolerance, tuple(said), versions)


def installed(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    return {package: version(package) for package in packages if importlib.util.find_spec(package)}


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """transformers, imported only here, without its progress bars and remarks; what it raises is a CheckpointError."""
    import transformers  # noqa: PLC0415  slow to import, and an extra

    logging = transformers.utils.logging
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield transformers
    except Exception as error:  # of any kind: it checks a config by several libraries
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise CheckpointError(f"transformers {version('transformers')} cannot run this model ({reason}).") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _row(model: GPT2, ids: list[int]) -> Tensor:
    return torch.tensor([ids], device=model.device)
