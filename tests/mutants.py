"""Mutation testing of all that computes: does a test notice every small change of the code?

    make mutants
    python -m tests.mutants [--files minigpt/sweep.py experiments/harness/table.py] [--limit 200 --seed 1]

needs Linux and hours for all. The mutants are
those of cosmic-ray's operators. Left out are those that do not compile, and those that only type checkers can see.
Everything heavy is imported once; each mutant is a forked child that writes the changed file into a copy of the
repository, imports the code from there and runs pytest: first the quick tests of that file, and the others when these
pass. Exit code 1 when fewer than 95 % are killed, or when one survives that `EQUIVALENT` does not argue.
"""

import argparse
import ast
import contextlib
import gc
import importlib
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAVY = ("numpy", "pytest", "hypothesis", "torch.func", "torch._dynamo", "safetensors.torch", "tokenizers", "typer")
HEAVY += ("transformers.models.gpt2.modeling_gpt2", "transformers.generation", "huggingface_hub.hf_api")
CORE = ("test_compare", "test_sensitivity", "test_blocks", "test_sweep", "test_measures")
STUDY = ("test_study", "test_report", "test_experiments")
QUICK = {
    "minigpt/engine.py": ("test_alone", "test_compare", "test_sweep", "test_limits"),
    "minigpt/passes.py": ("test_passes", "test_compare", "test_sweep", "test_limits"),
    "minigpt/alone.py": ("test_alone",),
    "minigpt/measures.py": ("test_measures", "test_sweep"),
    "minigpt/predictions.py": ("test_predictions", "test_passes", "test_measures"),
    "minigpt/sensitivity.py": ("test_sensitivity",),
    "minigpt/sweep.py": ("test_sweep",),
    "minigpt/compare.py": ("test_compare", "test_alone"),
    "minigpt/parameters.py": ("test_parameters", "test_patching", "test_compare"),
    "minigpt/model.py": ("test_model", "test_patching", "test_parameters"),
    "minigpt/patching.py": ("test_patching",),
    "minigpt/readouts.py": ("test_readouts",),
    "minigpt/checkpoint.py": ("test_checkpoint",),
    "minigpt/selfcheck.py": ("test_selfcheck", "test_sweep", "test_limits"),
    "experiments/harness/table.py": ("test_table", "test_verdicts"),
    "experiments/harness/verdicts.py": ("test_verdicts", "test_study"),
    "experiments/harness/corpus.py": ("test_corpus",),
    "experiments/divergence/claims.py": ("test_verdicts", "test_study"),
    "experiments/divergence/rows.py": ("test_study",),
    "experiments/token_loss/study.py": ("test_verdicts", "test_experiments"),
    "experiments/skip_layer.py": ("test_experiments",),
    "experiments/behaviour.py": ("test_behaviour",),
    "experiments/harness/pairs.py": ("test_patching_experiment",),
    "experiments/patching.py": ("test_patching_experiment",),
    "experiments/knockout.py": ("test_patching_experiment",),
    "experiments/ablation.py": ("test_ablation",),
    "experiments/lens.py": ("test_lens",),
    "experiments/steering.py": ("test_steering",),
    "experiments/page/figures.py": ("test_charts",),
}
"""The mutated files, and the tests that run first on their mutants, in that order."""
OTHERS = {
    "minigpt/engine.py": (
        "test_blocks",
        "test_patching",
        "test_passes",
        "test_sensitivity",
        "test_predictions",
        "test_measures",
    ),
    "minigpt/passes.py": (
        "test_blocks",
        "test_patching",
        "test_alone",
        "test_sensitivity",
        "test_predictions",
        "test_measures",
    ),
    "minigpt/alone.py": ("test_blocks", "test_compare"),
    "minigpt/measures.py": ("test_predictions", "test_compare", "test_sensitivity"),
    "minigpt/predictions.py": ("test_compare", "test_sweep", "test_blocks"),
    "minigpt/sensitivity.py": ("test_blocks",),
    "minigpt/sweep.py": ("test_alone", "test_predictions", *CORE),
    "minigpt/compare.py": ("test_blocks",),
    "minigpt/parameters.py": ("test_alone", "test_model", "test_generate", "test_checkpoint", *CORE),
    "minigpt/model.py": ("test_alone", "test_cli", "test_predictions", "test_checkpoint", "test_generate", *CORE),
    "minigpt/patching.py": ("test_readouts",),
    "minigpt/readouts.py": ("test_patching",),
    "minigpt/checkpoint.py": ("test_hub", "test_parity"),
    "minigpt/selfcheck.py": ("test_doctor",),
    "experiments/harness/table.py": STUDY,
    "experiments/harness/verdicts.py": ("test_experiments",),
    "experiments/harness/corpus.py": ("test_experiments",),
    "experiments/divergence/claims.py": ("test_report",),
    "experiments/divergence/rows.py": ("test_charts", "test_report"),
    "experiments/token_loss/study.py": ("test_charts",),
    "experiments/skip_layer.py": ("test_charts",),
    "experiments/behaviour.py": ("test_train",),
    "experiments/harness/pairs.py": ("test_house",),
    "experiments/patching.py": ("test_house",),
    "experiments/knockout.py": ("test_house",),
    "experiments/ablation.py": ("test_experiments",),
    "experiments/lens.py": ("test_experiments",),
    "experiments/steering.py": (),
    "experiments/page/figures.py": ("test_report", "test_table"),
}
"""The tests that run on a mutant when those pass."""
SLOW = ("measured_peak", "runs_out_of_memory_is_halved_and_says_so", "full_shape", "published_figures")
SLOW += (
    "certif",
    "fingerprint",
    "half_types",
    "sabotage",
    "training",
    "torchrun",
    "killed",
    "without_much_memory",
    "browser",
    "controls_ask_for",
    "words_of_a_page",
    "ranks",
)
"""Parts of the names of tests that run on no mutant: they start processes, take a model of GPT-2 small's size, or ask
whether other errors are noticed."""
MOST_SECONDS, TIMES = 900, 4
"""The tests may take so long on the code as it is, and so many times as long on a mutant. More counts as killed: a run
that hangs fails too."""
MEMORY = 6 * 2**30
"""Bytes that a mutant may take beyond what the imports took."""
LEAST_KILLED = 0.95


@dataclass(frozen=True)
class Mutant:
    """One change of one line of a file."""

    file: str
    line: int
    operator: str
    source: str
    """The whole changed file."""
    before: str
    after: str
    """The line, and what it became, without their indentation."""


def specifications_of(file: str) -> list[Any]:
    """What cosmic-ray would change in a file, one change each: quick, for nothing is changed yet."""
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import WorkDB, use_db

    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/session.sqlite", WorkDB.Mode.create) as session:
        init([ROOT / file], session, {})
        return [mutation for item in session.work_items for mutation in item.mutations]


def mutants_of(file: str, specifications: Sequence[Any], most: int, seed: int) -> list[Mutant]:
    """Some of a file's mutants that differ for Python, at random, but the same ones of a seed: at most so many."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source, found = (ROOT / file).read_text(), list[Mutant]()
    for made in random.Random(seed).sample(list(specifications), len(specifications)):
        if len(found) == most:
            break
        changed = mutate_code(source, get_operator(made.operator_name)(**made.operator_args), made.occurrence)
        if changed is not None and meaning(changed) not in (None, meaning(source)):
            number, before, after = first_difference(source, changed)
            found.append(Mutant(file, number, made.operator_name.split("/")[1], changed, before, after))
    return found


def meaning(source: str) -> str | None:
    """A file as Python runs it, without annotations; None where it does not compile."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of `is` beside a literal
            compile(source, "mutant", "exec")
    except SyntaxError:
        return None
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def first_difference(source: str, changed: str) -> tuple[int, str, str]:
    """The number of the first line that changed, and the line before and after, without indentation."""
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    number, (before, after) = next((i, pair) for i, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
    return number, before.strip(), after.strip()


@contextlib.contextmanager
def copy_of_the_repository() -> Iterator[Path]:
    """A temporary folder with the files that git knows or would add, as they are now."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        yield Path(folder)


def passes(tree: Path, tests: Sequence[str], seconds: float) -> bool:
    """Whether the tests pass on the copy, in a forked child, within so many seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            code = tested(tree, tests)
        finally:  # in no case back into the code of the parent, whose copy it would remove
            os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)  # also what its tests started
    os.waitpid(child, 0)
    return False


def tested(tree: Path, tests: Sequence[str]) -> int:
    """pytest's exit code on the copy; to be called in a child, whose output goes nowhere."""
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silence, stream)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))  # V8 reserves far more addresses
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "minigpt", "experiments")]:
        del sys.modules[name]
    import hypothesis
    import pytest

    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # a counterexample need not be the smallest
    hypothesis.settings.register_profile("mutants", database=None, derandomize=True, phases=phases)
    hypothesis.settings.load_profile("mutants")
    files = [f"tests/{name}.py" for name in tests]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--disable-plugin-autoload"]
    return int(pytest.main([*options, "-k", f"not ({' or '.join(SLOW)})", *files]))


def killed(tree: Path, mutant: Mutant, seconds: float) -> bool:
    """Whether a test fails on a mutant, or takes longer than that; the copy is put back afterwards."""
    path = tree / mutant.file
    original = path.read_text()
    try:
        write(path, mutant.source)
        return not (passes(tree, QUICK[mutant.file], seconds) and passes(tree, OTHERS[mutant.file], seconds))
    finally:
        write(path, original)


def write(path: Path, source: str) -> None:
    """Write a file, and remove its bytecode, which Python would take for that of the next source of the same second."""
    path.write_text(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


@dataclass(frozen=True)
class Equivalent:
    """A mutant that no test can tell from the code, and why."""

    file: str
    operator: str
    line: str
    """The whole line, without indentation."""
    became: str
    """A part of the changed line that the line has not."""
    reason: str

    def is_for(self, mutant: Mutant) -> bool:
        """Whether this is the mutant meant."""
        same = (self.file, self.operator, self.line) == (mutant.file, mutant.operator, mutant.before)
        return same and self.became in mutant.after and self.became not in mutant.before


_EMPTY = "if len(index) == 0 or not bool((index[0] < self.lengths).all()):"
_MEAN = "return values[..., positions].where(real, 0.0).sum(-1) / real.sum(-1)"
_TWO_AXES = "`real` has two axes: the last one is number 1."
_FULL = "full = texts.shape[1] if texts.ndim == 2 else 0  # another shape is refused by the config's check"
_REFUSED = "The lengths of a tensor that is not [batch, position]: all callers refuse it right after, with check_ids."
_TWICE = "if len(set(layers)) < len(layers):"
_SMALL = "CPython has one object for each integer up to 256: more blocks than any model has."
_COMPARE, _NUMBER = "ReplaceComparisonOperator_", "NumberReplacer"

EQUIVALENT = (
    Equivalent(
        "experiments/behaviour.py",
        _NUMBER,
        "patterns = [pattern[0, :, 1:, 0].double().mean(-1).cpu() for pattern in model.patterns(ids)]",
        "[ -1, :",
        "There is one text: the first is the last.",
    ),
    Equivalent(
        "experiments/page/figures.py",
        f"{_COMPARE}Eq_GtE",
        'ink, faint = ("#1d2530", "#d5dae1") if theme == LIGHT else ("#e6e9ee", "#3c4654")',
        ">= LIGHT",
        "Of the two words, light comes after dark.",
    ),
    Equivalent("minigpt/measures.py", f"{_COMPARE}Eq_LtE", _EMPTY, "<= 0", "A length is never negative."),
    Equivalent(
        "minigpt/measures.py", f"{_COMPARE}Lt_NotEq", _EMPTY, "!= self", "index[0] is 0 or 1, and a length at least 1."
    ),
    Equivalent(
        "minigpt/measures.py",
        f"{_COMPARE}Gt_NotEq",
        "return self._mean(sine.where(self.run_sq > 0, 1.0), positions)",
        "!= 0",
        "A squared norm is not negative, and a sweep refuses streams that are not finite.",
    ),
    Equivalent(
        "minigpt/measures.py",
        f"{_COMPARE}Gt_GtE",
        "longer = self.run_sq > self.clean_sq",
        ">=",
        "Where both norms are equal, the two differences are each other's negative, and are squared.",
    ),
    Equivalent("minigpt/measures.py", "ReplaceUnaryOperator_USub_UAdd", _MEAN, "real.sum(+1)", _TWO_AXES),
    Equivalent("minigpt/measures.py", "ReplaceUnaryOperator_Delete_USub", _MEAN, "real.sum(1)", _TWO_AXES),
    Equivalent("minigpt/engine.py", f"{_COMPARE}Eq_GtE", _FULL, ">= 2", _REFUSED),
    Equivalent("minigpt/engine.py", _NUMBER, _FULL, "else 1", _REFUSED),
    Equivalent("minigpt/engine.py", _NUMBER, _FULL, "else -1", _REFUSED),
    Equivalent(
        "minigpt/engine.py",
        _NUMBER,
        "return texts, torch.full((len(texts),) if texts.ndim else (0,), full)",
        "( 1,)",
        _REFUSED,
    ),
    Equivalent(
        "minigpt/engine.py",
        f"{_COMPARE}Eq_LtE",
        'return CPU_SLAB if device.type == "cpu" else GPU_SLAB',
        '<= "cpu"',
        "No other kind of device comes before cpu in the alphabet.",
    ),
    Equivalent(
        "minigpt/engine.py",
        f"{_COMPARE}Gt_LtE",
        "if any(weight.ndim > 1 for weight in module.parameters())  # the others do no product",
        "<= 1",
        "Norm layers are shared then, and layers without a bias are not: to the same numbers.",
    ),
    Equivalent(
        "minigpt/predictions.py",
        "ReplaceBinaryOperator_Pow_BitAnd",
        "CHUNK = 2**23",
        "2&23",
        "How many logits are held at once; a test counts them under another value.",
    ),
    Equivalent(
        "minigpt/predictions.py",
        f"{_COMPARE}Lt_LtE",
        "if moved < FIT_TOLERANCE:",
        "<=",
        "A step of exactly the tolerance is none that Newton's method takes.",
    ),
    Equivalent(
        "minigpt/passes.py",
        "ReplaceBinaryOperator_Sub_BitOr",
        "MALLOC_KEEPS = 2**25 - 2**16",
        "|",
        "It makes the C library keep memory, which moves no number.",
    ),
    Equivalent(
        "minigpt/passes.py",
        "ReplaceBinaryOperator_Add_LShift",
        "width, streams = model.config.n_embd, 1 + job.tangents",
        "1 << job",
        "1 + False is 1 << False, and 1 + True is 1 << True.",
    ),
    Equivalent(
        "minigpt/selfcheck.py",
        _NUMBER,
        "JUMP_ROUNDINGS = 4",
        "5",
        "A bound of that size: tests try a quarter of it, and twice as much.",
    ),
    Equivalent(
        "experiments/harness/corpus.py",
        "ReplaceBinaryOperator_FloorDiv_Sub",
        "missing = [number for number in range(-(-windows // SHARD_WINDOWS)) if number not in finished]",
        "- SHARD_WINDOWS",
        "Numbers of shards that the texts have not are met by nobody.",
    ),
    Equivalent(
        "experiments/harness/corpus.py",
        "ReplaceBinaryOperator_Pow_Mul",
        "MOST_NUMBERS = 2**20",
        "2*20",
        "How many numbers are combined at a time: memory, and no number.",
    ),
    Equivalent(
        "experiments/harness/corpus.py",
        "ReplaceBinaryOperator_Mul_Sub",
        "step = max(FEWEST_COLUMNS, MOST_NUMBERS // (len(survey.shards) * SHARD_WINDOWS))",
        "- SHARD_WINDOWS",
        "How many columns are combined at a time: memory, and no number.",
    ),
    Equivalent(
        "minigpt/checkpoint.py",
        _NUMBER,
        'text = json.dumps({**config.to_dict(layout.block if layout.own else None), "dtype": dtype}, indent=2) + "\\n"',
        "indent= 1",
        "How a file is indented.",
    ),
    Equivalent(
        "experiments/harness/corpus.py",
        "ReplaceTrueWithFalse",
        "for statistic, values in zip(STATISTICS, whole, strict=True)",
        "strict=False",
        "`summarise` gives one row for each.",
    ),
    Equivalent(
        "minigpt/sensitivity.py",
        "ReplaceBinaryOperator_FloorDiv_Add",
        "at_once = max(1, CHUNK // (rows * model.config.vocab_size))",
        "CHUNK +",
        "How many positions go together; all are computed one by one.",
    ),
    Equivalent(
        "minigpt/sweep.py", f"{_COMPARE}Lt_NotEq", _TWICE, "!=", "A set has no more members than what it was made of."
    ),
    Equivalent("minigpt/sweep.py", f"{_COMPARE}Lt_IsNot", _TWICE, "is not", f"As != does; {_SMALL}"),
    Equivalent(
        "minigpt/sweep.py",
        _NUMBER,
        "DEFAULT_FACTORS = tuple(round(0.5 + 0.05 * step, 2) for step in range(21))",
        ", 3)",
        "Multiples of 0.05 are the same floats rounded to two digits and to three.",
    ),
    Equivalent(
        "minigpt/model.py",
        f"{_COMPARE}Gt_NotEq",
        "mask, causal = self._mask(q, k), q.shape[2] > 1",
        "!= 1",
        "There is at least one position: the config refuses empty ids.",
    ),
)


def main() -> int:
    """Run the mutants, and print what survives."""
    arguments = options()
    known = {file: specifications_of(file) for file in arguments.files}
    share = min(1.0, (arguments.limit or math.inf) / sum(map(len, known.values())))
    made = {file: mutants_of(file, of, math.ceil(share * len(of)), arguments.seed) for file, of in known.items()}
    mutants = [mutant for found in made.values() for mutant in found]
    with copy_of_the_repository() as tree:
        limits = prepare(tree, arguments.files)
        survivors = [mutant for mutant in watched(mutants) if not killed(tree, mutant, limits[mutant.file])]
    for file, found in made.items():
        alive = sum(mutant.file == file for mutant in survivors)
        print(f"{file}: {len(found)} mutants ran, of {len(known[file])} changes; {len(found) - alive} killed")
    unargued = report(survivors)
    share = 1 - len(survivors) / len(mutants)
    print(
        f"{len(mutants)} mutants, {share:.1%} killed, {len(survivors)} survived, {unargued} of them without a reason."
    )
    return 1 if unargued or share < LEAST_KILLED else 0


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--files", nargs="+", choices=QUICK, default=list(QUICK), help="the files to mutate")
    parser.add_argument("--limit", type=int, help="run a sample of so many, every file's in proportion")
    parser.add_argument("--seed", type=int, default=0, help="of the sample: another one has other mutants")
    return parser.parse_args()


def prepare(tree: Path, chosen: Sequence[str]) -> dict[str, float]:
    """Import what every child needs; see that the tests pass on the code as it is, and fail on code that raises.

    Returns how many seconds the tests of each file may take.
    """
    limits = dict[str, float]()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage at its end: not ours, in every child
    for file in chosen:
        began = time.monotonic()
        if not passes(tree, [*QUICK[file], *OTHERS[file]], MOST_SECONDS):
            raise SystemExit(f"The tests of {file} fail on the code as it is; nothing can be learnt from its mutants.")
        limits[file] = TIMES * (time.monotonic() - began)
        if not killed(tree, Mutant(file, 1, "", "raise RuntimeError", "", ""), limits[file]):
            raise SystemExit(f"The tests of {file} pass on a file that only raises: they do not import the copy.")
    return limits


def watched(mutants: Sequence[Mutant]) -> Iterator[Mutant]:
    """The mutants, one by one, with a line on standard error now and then."""
    began = time.monotonic()
    for count, mutant in enumerate(mutants):
        if count % 10 == 0:
            print(f"{count} of {len(mutants)}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        yield mutant


def report(survivors: Sequence[Mutant]) -> int:
    """Print the survivors; how many of them nobody argued."""
    unargued = 0
    for mutant in survivors:
        reason = next((argued.reason for argued in EQUIVALENT if argued.is_for(mutant)), None)
        unargued += reason is None
        print(f"{mutant.file}:{mutant.line} {mutant.operator}: {reason or 'SURVIVED'}")
        print(f"    {mutant.before}\n    {mutant.after}")
    return unargued


if __name__ == "__main__":
    sys.exit(main())
