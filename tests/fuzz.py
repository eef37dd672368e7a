"""Fuzz what reads files of strangers, guided by coverage: `make fuzz SECONDS=60`, or

    python -m tests.fuzz --seconds 60 --target loader

Inputs that break something are saved in tests/crashes, where tests/test_fuzz.py runs them ever after. What is worth
going on from is kept in results/fuzz. The number of executions and the coverage (`cov`, in branches) are printed.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import atheris

with atheris.instrument_imports(include=["minigpt", "experiments"], enable_loader_override=False):
    from tests import fuzzing

KEPT = Path("results/fuzz")
STRANGE = (None, True, -1, 0, 1, 2, 2**31, 2**63, 2**64, 10**400, 1.5, 1e308, float("inf"), float("nan"), "", "gpt2")
STRANGE += ("F32", "BF16", "I64", "\ud800", "\x1b[2J", "../x", [], {}, [0, 0], [[[]]], [0, 2**63], {"a": None})


def main() -> None:
    """Run every target for its share of the time, each in a process of its own; exit code 1 when one breaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--target", choices=fuzzing.TARGETS)
    parser.add_argument("--folder", type=Path, help="for the files that are read; made, and removed, where not given")
    asked = parser.parse_args()
    if asked.folder:
        fuzz(asked.target, asked.seconds, asked.folder)
    targets = [asked.target] if asked.target else list(fuzzing.TARGETS)
    codes = [_in_a_process(target, max(1, asked.seconds // len(targets))) for target in targets]
    sys.exit(int(any(codes)))


def _in_a_process(target: str, seconds: int) -> int:
    """Atheris ends its process, and so cannot clean up; returns the exit code."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # millions of small files are written
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        own = ["--target", target, "--seconds", str(seconds), "--folder", folder]
        return subprocess.run([sys.executable, "-m", "tests.fuzz", *own], check=False).returncode


def fuzz(target: str, seconds: int, folder: Path) -> None:
    """Fuzz one target; does not return."""
    kept = KEPT / target
    kept.mkdir(parents=True, exist_ok=True)
    fuzzing.CRASHES.mkdir(exist_ok=True)
    run = fuzzing.TARGETS[target](folder)
    for number, seed in enumerate(run.seeds()):
        (kept / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=8192", "-timeout=10"]
    options += [f"-artifact_prefix={fuzzing.CRASHES}/{target}-", str(kept)]
    mutated = partial(mutate, seeds=run.seeds())
    atheris.Setup(["fuzz", *options], lambda data: run(data) and None, custom_mutator=mutated)
    atheris.Fuzz()


def mutate(data: bytes, most: int, seed: int, seeds: Sequence[bytes]) -> bytes:
    """Change a byte somewhere, as every fuzzer does, or a value within the JSON: few changed bytes are still JSON.

    Half of the time of a whole file: the fuzzer itself keeps only the shortest input that reaches a branch.
    """
    random = Random(seed)
    data = data if random.random() < 0.5 else random.choice(seeds)
    start = 9 if data[:1] == b"\2" else 1  # of a whole safetensors file: after the header's length
    try:
        parsed, end = json.JSONDecoder().raw_decode(data[start:].decode("latin-1"))
        places = list(_places(parsed))
    except (ValueError, RecursionError):
        places = []
    if not places or random.random() < 0.3:
        return atheris.Mutate(data, most)
    for _ in range(random.choice((1, 1, 2, 4))):
        _change(random, *random.choice(places))
    written = json.dumps(parsed, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    if random.random() < 0.1:
        written = written.replace(b"{", b'{"n_layer": 1, ', 1)  # a name twice
    length = len(written).to_bytes(8, "little") if start > 1 else b""
    return (data[:1] + length + written + data[start + end :])[:most]


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _change(random: Random, container: Any, key: Any) -> None:
    try:
        match random.randrange(4):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[random.choice(("n_inner", "wte.weight", "__metadata__", str(key) + "x"))] = container[key]
            case _:
                container[key] = copy.deepcopy(random.choice(STRANGE))
    except LookupError:  # an earlier change took it away
        pass


if __name__ == "__main__":
    main()
