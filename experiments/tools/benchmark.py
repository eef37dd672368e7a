"""Speed and memory of the sweep, beside transformers and the tools for interventions.

    make bench

Everything runs on random weights in GPT-2 small's shape, made once: speed does not depend on their
values. What is compared takes turns within one process, and medians are reported, so a machine that is
busy for a while slows all alike. Every contender's norms are compared with the sweep's before a time of
it is believed. Writes BENCHMARKS.md.
"""

import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from experiments.harness.corpus import SHARD_WINDOWS
from experiments.page.figures import label_of
from experiments.tools import patch_peers, peers
from minigpt import GPT2, GPT2Config, cli, generate, sweep
from minigpt.config import OFFICIAL
from minigpt.files import write_text
from minigpt.linear import Linear
from minigpt.parity import installed

ROOT = Path(__file__).parents[2]
FACTORS = tuple(round(0.5 + 0.1 * step, 1) for step in range(11))
POSITIONS = (16, 64, 256)
ALL_UP_TO, MOST_UP_TO = 16, 64
"""Positions up to which everyone, and all but `SLOW`, take part: beyond, a repetition of all would take minutes."""
SLOW = (
    "GPT2LMHeadModel, factors",
    "pyvene",
    "nnsight, factors",
    "skipped, one run",
    "bridge, one run",
    "nnsight, one run",
)
SLOWER = ("from the start", "bridge")
OURS = "minigpt, one pass"
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Relative to a layer's largest norm: a contender whose norms are farther from the sweep's computed another thing."""
MIB = 2**20

Table = list[list[str]]
Contenders = dict[str, Callable[[], Tensor | None]]
Times = dict[str, list[float]]


# Timing.


def taking_turns(contenders: dict[str, Callable[[], Any]], repetitions: int) -> Times:
    """Seconds of every repetition of everyone, one after the other and round again; each runs once before, untimed."""
    for run in contenders.values():
        run()
    times: Times = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, run in contenders.items():
            times[name].append(timed(run)[0])
    return times


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    result = run()
    synchronise()
    return time.perf_counter() - start, result


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(times: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(times)


def spread(times: Sequence[float]) -> str:
    """The median, and the fastest and the slowest."""
    return f"{median(times):.3g} ({min(times):.3g} .. {max(times):.3g})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# The sections of the report.


class Bench:
    """What all sections share: the models, made once, and how often everything is repeated."""

    def __init__(
        self,
        folder: Path,
        repetitions: int,
        device: str = "cpu",
        shape: str = "gpt2",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.folder, self.repetitions, self.device, self.tolerance = folder, repetitions, device, AGREEMENT[dtype]
        GPT2(OFFICIAL[shape]).save_pretrained(folder)
        self.ours = GPT2.from_pretrained(folder, device=device, dtype=dtype)
        transformers = quiet_transformers()
        self.heads = transformers.GPT2LMHeadModel.from_pretrained(folder).to(device, dtype).eval()
        self.others = peers.contenders(self.heads, FACTORS)
        self.classic = self.others["transformers, GPT2Model, one run per cell"]

    def ids(self, positions: int, texts: int = 1) -> Tensor:
        """Random tokens: [texts, positions]."""
        generator = torch.Generator().manual_seed(positions)
        return torch.randint(self.ours.config.vocab_size, (texts, positions), generator=generator).to(self.device)

    def contenders(self, positions: int) -> Contenders:
        """Everyone who computes the grid's norms, by name."""
        ids = self.ids(positions)
        found: Contenders = {OURS: lambda: sweep(self.ours, ids, factors=FACTORS).frobenius()[..., 0]}
        found |= {name: partial(run, ids) for name, run in self.others.items()}
        return {name: run for name, run in found.items() if runs_at(name, positions)}


def quiet_transformers() -> Any:
    """transformers, without its progress bars and advice."""
    import transformers  # noqa: PLC0415  an extra

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def runs_at(name: str, positions: int) -> bool:
    """Whether a contender takes part: the slow ones that are no tool's best do so on the shortest text only."""
    if positions <= ALL_UP_TO:
        return True
    slow = SLOW if positions <= MOST_UP_TO else (*SLOW, *SLOWER)
    return not any(name_part in name for name_part in slow)


def grids(bench: Bench, positions: Sequence[int]) -> str:
    """The same grid by everyone: seconds, and how many times as long as the sweep."""
    text = ""
    for count in positions:
        times, wrong = believed(bench.contenders(count), bench.repetitions, partial(agrees, tolerance=bench.tolerance))
        text += f"\n### {count} positions\n\n" + beside_ours(times, wrong)
        echo(text.rsplit("###", 1)[1])
    return text


def believed(
    contenders: Contenders, repetitions: int, agree: Callable[[Tensor | None, Tensor | None], bool]
) -> tuple[Times, set[str]]:
    """Seconds of every repetition of everyone, in turns, and whose numbers were once not those of the first of them."""
    times: Times = {name: [] for name in contenders}
    expected, wrong = None, set[str]()
    for _ in range(repetitions):
        for name, run in contenders.items():  # minigpt comes first
            seconds, found = timed(run)
            times[name].append(seconds)
            expected = found if expected is None else expected
            wrong |= set() if agree(found, expected) else {name}
    return times, wrong


def beside_ours(times: Times, wrong: set[str]) -> str:
    """The table of everyone, the fastest first: how many times as long as the first of them they take."""
    ours = next(iter(times.values()))
    rows = [
        [name, f"**{ratio(seconds, ours):.3g}**", spread(seconds)]
        for name, seconds in sorted(times.items(), key=lambda item: median(item[1]))
        if name not in wrong
    ]
    rows += [[name, "other numbers: its time means nothing", ""] for name in sorted(wrong)]
    return table(["", "times as long", "seconds: median (range)"], rows)


def agrees(norms: Tensor | None, ours: Tensor | None, tolerance: float) -> bool:
    """Whether the norms of a contender are the sweep's, within a tolerance relative to a layer's largest norm."""
    if norms is None or ours is None or norms.shape != ours.shape:
        return False
    return bool(((norms.double().cpu() - ours).abs() <= tolerance * ours.amax((1, 2), keepdim=True)).all())


PATCHED = "minigpt, record and one compare_logits"
PATCH_POSITIONS = 16
PATCHING = """One pair of texts of {positions} random tokens. While one runs, a piece of the other's activations takes
the place of its own, and the difference of two tokens' logits after the last position is kept. Everyone records the
other text's activations anew each time, and is compared with minigpt's numbers every time. "A layer's patches as one
batch" makes rows where the activation is patched, so that what comes before runs once; pyvene makes them from the
start, and so does "an invoke for each patch", which is nnsight's own way to a batch. pyvene runs the other text again
in every run. "Its patching module" is `transformer_lens.patching`, which computes the logits of all positions.
"""
PATCH_TITLES: dict[patch_peers.Kind, str] = {
    "output": "{layers} layers x {positions} positions, the block's output",
    "head": "{layers} layers x {heads} heads, at all positions",
}


def patching(bench: Bench) -> str:
    """The same grids of patches by everyone."""
    config, text = bench.ours.config, PATCHING.format(positions=PATCH_POSITIONS)
    for kind, title in PATCH_TITLES.items():
        named = title.format(layers=config.n_layer, positions=PATCH_POSITIONS, heads=config.n_head)
        agree = partial(agrees_within_range, tolerance=bench.tolerance)
        times, wrong = believed(patch_contenders(bench, kind), bench.repetitions, agree)
        text += f"\n### {named}\n\n" + beside_ours(times, wrong)
        echo(text.rsplit("###", 1)[1])
    return text


def patch_contenders(bench: Bench, kind: patch_peers.Kind) -> Contenders:
    """Everyone who fills a grid of patches, by name."""
    (ids, other), (answer, foil) = bench.ids(PATCH_POSITIONS, texts=2).split(1), bench.ids(2)[0].tolist()
    tokens = (answer, foil)
    found: Contenders = {PATCHED: partial(patch_peers.ours, bench.ours, kind, tokens, ids, other)}
    others = patch_peers.contenders(bench.heads, kind, tokens)
    return {**found, **{name: partial(run, ids, other) for name, run in others.items()}}


def agrees_within_range(found: Tensor | None, ours: Tensor | None, tolerance: float) -> bool:
    """Whether the numbers of a contender are minigpt's, within a tolerance relative to the range of the whole grid."""
    if found is None or ours is None or found.shape != ours.shape:
        return False
    return bool(((found.double().cpu() - ours).abs() <= tolerance * (ours.max() - ours.min())).all())


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Of two medians."""
    return median(slower) / median(faster)


def bfloat16(bench: Bench) -> str:
    """The grid in bfloat16 beside GPT2Model's loop in float32, and how far its norms are off."""
    half, ids = GPT2.from_pretrained(bench.folder, device=bench.device, dtype=torch.bfloat16), bench.ids(16)
    times = taking_turns(
        {
            "loop": lambda: bench.classic(ids),
            "float32": lambda: sweep(bench.ours, ids, factors=FACTORS),
            "bfloat16": lambda: sweep(half, ids, factors=FACTORS),
        },
        bench.repetitions,
    )
    rows = _apart(*(sweep(model, ids, factors=FACTORS).frobenius() for model in (half, bench.ours)))
    loop, full = ratio(times["loop"], times["bfloat16"]), ratio(times["float32"], times["bfloat16"])
    return (
        f"The grid at 16 positions takes {median(times['bfloat16']):.3g} s: **{loop:.3g} times faster** than "
        f"GPT2Model in float32, one run per cell, and {full:.3g} times faster than the sweep in float32. Its "
        "norms differ from float32's by up to (relative, all depths from the site on):\n\n"
        + table(["", "factor", "error"], rows)
    )


def _apart(found: Tensor, exact: Tensor) -> list[list[str]]:
    """Largest relative differences of norms [layer, factor, depth, batch] over depths: of the first, the middle and the
    last block, by the factors nearest to 1 and farthest from it."""
    apart = ((found - exact).abs() / exact).nan_to_num(0.0).flatten(2).amax(2)
    by_distance = sorted((factor for factor in FACTORS if factor != 1), key=lambda factor: abs(factor - 1))
    return [
        [f"block {layer}", label_of(factor), f"{float(apart[layer, FACTORS.index(factor)]):.2g}"]
        for layer in (0, len(apart) // 2, len(apart) - 1)
        for factor in (by_distance[0], by_distance[-1])
    ]


def products(bench: Bench) -> str:
    """The sweep's arithmetic rate beside plain matrix products of the same shapes."""
    rows = []
    for positions in (16, 64):
        ids, shapes = bench.ids(positions), product_shapes(bench.ours.config, positions)
        inputs = {shape: torch.randn(shape[0], shape[1]) for shape in shapes}
        maps = {shape[1:]: Linear(*shape[1:], bias=False) for shape in shapes}

        @torch.no_grad()
        def plain(onednn: bool, shapes: Any = shapes, inputs: Any = inputs, maps: Any = maps) -> None:
            for shape in shapes:
                if onednn:
                    maps[shape[1:]](inputs[shape])
                else:
                    F.linear(inputs[shape], maps[shape[1:]].weight)

        runs: dict[str, Callable[[], Any]] = {
            "sweep": partial(sweep, bench.ours, ids, factors=FACTORS),
            "own": partial(own_product, bench, ids),
            "torch": partial(plain, onednn=False),
            "onednn": partial(plain, onednn=True),
        }
        times = taking_turns(runs, bench.repetitions)
        work = sum(2 * rows * into * out for rows, into, out in shapes) / 1e9
        rate = {name: work / median(seconds) for name, seconds in times.items()}
        rows.append(
            [
                str(positions),
                *(f"{rate[name]:.0f}" for name in ("sweep", "own", "torch", "onednn")),
                *(f"**{rate['sweep'] / rate[name]:.0%}**" for name in ("torch", "onednn")),
                f"{rate['own'] / rate['torch']:.0%}",
            ]
        )
    head = ["positions", "sweep", "sweep without oneDNN", "nn.Linear's product (MKL)", "oneDNN's product"]
    head += ["sweep / nn.Linear's", "sweep / oneDNN's", "without oneDNN / nn.Linear's"]
    return table([*head], rows)


def own_product(bench: Bench, ids: Tensor) -> None:
    """The sweep on the matrix product that everyone else uses."""
    setattr(torch.backends.mkldnn, "enabled", False)  # noqa: B010  declared as another type
    try:
        sweep(bench.ours, ids, factors=FACTORS)
    finally:
        setattr(torch.backends.mkldnn, "enabled", True)  # noqa: B010


def product_shapes(config: GPT2Config, positions: int) -> list[tuple[int, int, int]]:
    """Rows, in and out of every matrix product that the grid needs, and nothing else."""
    changing = sum(factor != 1 for factor in FACTORS)
    width, inner = config.n_embd, config.mlp_width
    return [
        ((1 + changing * layer) * positions, *shape)
        for layer in range(config.n_layer)
        for shape in ((width, 3 * width), (width, width), (width, inner), (inner, width))
    ]


def single_pass(bench: Bench) -> str:
    """One clean forward pass, generation, and loading, beside transformers."""
    rows = [*_forward(bench), *_generation(bench), *_loading(bench)]
    return table(["", "minigpt", "transformers", "times better"], rows)


@torch.no_grad()
def _forward(bench: Bench) -> Table:
    rows = []
    for positions in (16, 256, 1024):
        ids = bench.ids(positions)
        runs: dict[str, Callable[[], Any]] = {
            "ours": partial(bench.ours, ids),
            "theirs": partial(bench.heads, ids, use_cache=False),
        }
        rows.append(_beside(f"forward pass, {positions} positions, s", taking_turns(runs, bench.repetitions)))
    return rows


def _generation(bench: Bench) -> Table:
    rows, exactly = [], {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    for positions in (16, 256):
        ids = bench.ids(positions)
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda ids=ids: list(generate(bench.ours, ids[0].tolist(), NEW_TOKENS)),  # type: ignore[misc]
            "theirs": partial(bench.heads.generate, ids, do_sample=False, **exactly),
        }
        times = taking_turns(runs, bench.repetitions)
        name = f"{NEW_TOKENS} tokens generated, greedy and cached, after {positions}: tokens/s"
        speeds = [NEW_TOKENS / median(times[who]) for who in ("ours", "theirs")]
        rows.append([name, *(f"{speed:.3g}" for speed in speeds), f"**{speeds[0] / speeds[1]:.3g}**"])
    return rows


@torch.no_grad()
def _loading(bench: Bench) -> Table:
    loaders = {"ours": GPT2.from_pretrained, "theirs": quiet_transformers().GPT2LMHeadModel.from_pretrained}
    ids, rows = bench.ids(16).cpu(), []
    loading: dict[str, Callable[[], Any]] = {who: partial(load, bench.folder) for who, load in loaders.items()}
    running: dict[str, Callable[[], Any]] = {who: partial(_load_and_run, load, ids) for who, load in loading.items()}
    for name, runs in (("loading from safetensors", loading), ("loading and a first pass of 16 positions", running)):
        rows.append(_beside(f"{name}, s", taking_turns(runs, bench.repetitions)))
    for name, task in (("loading", "load"), ("loading and a first pass", "load and run")):
        peaks = [measured_memory(bench.folder, f"{side} {task}", 16) for side in ("minigpt", "transformers")]
        rows.append([f"{name}: peak memory, MiB", *(f"{peak:.0f}" for peak in peaks), f"**{peaks[1] / peaks[0]:.3g}**"])
    return rows


def _load_and_run(load: Callable[[], Any], ids: Tensor) -> None:
    load()(ids)


NEW_TOKENS = 32


def _beside(name: str, times: Times) -> list[str]:
    return [name, spread(times["ours"]), spread(times["theirs"]), f"**{ratio(times['theirs'], times['ours']):.3g}**"]


def growth(bench: Bench) -> str:
    """Seconds of a sweep of one layer as positions, factors and texts grow."""
    runs: dict[str, Callable[[], Any]] = {}
    for positions in (16, 64, 256, 1024):
        runs[f"{positions} positions, 11 factors, 1 text"] = partial(_one_layer, bench, positions, 11, 1)
    for factors in (1, 21, 81):
        runs[f"64 positions, {factors} factors, 1 text"] = partial(_one_layer, bench, 64, factors, 1)
    for texts in (4, 16):
        runs[f"64 positions, 11 factors, {texts} texts"] = partial(_one_layer, bench, 64, 11, texts)
    times = taking_turns(runs, bench.repetitions)
    return table(["block 2 scaled", "seconds: median (range)"], [[name, spread(t)] for name, t in times.items()])


def _one_layer(bench: Bench, positions: int, factors: int, texts: int) -> None:
    values = [0.5 + step / factors for step in range(factors)]
    sweep(bench.ours, bench.ids(positions, texts), (2,), [value if value != 1 else 0.999 for value in values])


# Memory, each in a process of its own.

MEMORY = """
import sys, torch, transformers
from experiments.tools import benchmark
from minigpt import GPT2, sweep

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

folder, what, positions = sys.argv[1], sys.argv[2], int(sys.argv[3])
side, _, task = what.partition(" ")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
load = GPT2.from_pretrained if side == "minigpt" else transformers.GPT2LMHeadModel.from_pretrained
ids = torch.randint(50257, (1, positions), generator=torch.Generator().manual_seed(0))
torch.set_grad_enabled(False)
run = None
if not task.startswith("load"):
    run = benchmark.memory_task(load(folder), task)
    run(ids[:, :8])  # every weight and every library is in memory from here on
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
if task.startswith("load"):
    model = load(folder)
    if task.endswith("run"):
        model(ids)
else:
    run(ids)
print((kilobytes("VmHWM") - before) / 1024)
"""


def memory_task(model: Any, task: str) -> Callable[[Tensor], Any]:
    """One of the things whose peak memory is measured, as a function of ids [1, position]."""
    if task == "study":
        return lambda ids: sweep(model, ids, (2,))
    if task == OURS:
        return lambda ids: sweep(model, ids, factors=FACTORS)
    if task == "cell":
        return partial(one_cell, model)
    if task == "cell without logits":
        return partial(one_cell, model.transformer)
    return peers.contenders(model, FACTORS)[task]


@torch.no_grad()
def one_cell(model: Any, ids: Tensor) -> None:
    """A clean and a scaled run of transformers, all hidden states kept, as the study is usually done."""
    clean = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    blocks = model.h if hasattr(model, "h") else model.transformer.h
    handle = blocks[2].register_forward_hook(lambda _module, _inputs, output: output * 0.5)
    changed = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    peers.norms(changed, clean)


def measured_memory(folder: Path, what: str, positions: int) -> float:
    """Peak memory, in MiB, above what was there before."""
    command = [sys.executable, "-c", MEMORY, str(folder), what, str(positions)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {what!r} failed: {done.stderr[-2000:]}")
    echo(f"  memory of {what!r}: {done.stdout.split()[-1]} MiB")
    return float(done.stdout.split()[-1])


def memory(bench: Bench) -> str:
    """Peak memory of the study at 1024 positions, and of everyone's grid."""
    long = [
        ["minigpt: the default study, 21 factors at once", "minigpt study"],
        ["transformers, GPT2LMHeadModel: one clean and one scaled run with output_hidden_states", "transformers cell"],
        ["transformers, GPT2Model: the same", "transformers cell without logits"],
    ]
    rows = [[name, f"{measured_memory(bench.folder, what, 1024):.0f}"] for name, what in long]
    text = table(["1024 positions, block 2 scaled", "MiB above the loaded model"], rows)
    grid = [[OURS, f"minigpt {OURS}"], *([name, f"transformers {name}"] for name in bench.others if runs_at(name, 64))]
    rows = [[name, f"{measured_memory(bench.folder, what, 64):.0f}"] for name, what in grid]
    return text + "\n" + table(["12 layers x 11 factors, 64 positions", "MiB above the loaded model"], rows)


# A corpus.


def corpus(bench: Bench) -> str:
    """Windows a second of the default study, by one process and by two, and what a large table would cost."""
    text = bench.folder / "texts.txt"
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    text.write_text("\n".join(" ".join(words[i % 400 : i % 400 + 300]) for i in range(60)), encoding="utf-8")
    (bench.folder / "tokenizer.json").write_bytes((ROOT / "weights" / "tiny" / "tokenizer.json").read_bytes())
    rates = {ranks: windows_per_second(bench.folder, text, ranks) for ranks in (1, 2)}
    rows = [[str(ranks), f"{rate:.3g}"] for ranks, rate in rates.items()]
    small, xl = (window_work(OFFICIAL[name]) for name in ("gpt2", "gpt2-xl"))
    core_hours = 1e6 / (rates[2] / 2) * (xl / small) / 3600
    return table(["processes, one thread each", "windows a second"], rows) + (
        "\nThe default study without predictions (block 2, 21 factors; position 0 and the others alone at two) "
        f"in GPT-2 small's shape, windows of 64 tokens. A window takes GPT-2 XL {xl / small:.3g} times the arithmetic; "
        f"at the rate of two processes a table over a million windows is {core_hours:,.0f} core-hours: computed, not "
        "run.\n"
    )


def window_work(config: GPT2Config, positions: int = 64, factors: int = 20) -> float:
    """Floating-point operations of the default study on one window, the products of the blocks alone.

    Three sweeps, each with its clean run; those of position 0 and of the others alone have two factors each.
    """
    rows = 3 * config.n_layer + (factors + 4) * (config.n_layer - 3)
    return rows * positions * 2.0 * (4 * config.n_embd**2 + 2 * config.n_embd * config.mlp_width)


def windows_per_second(model: Path, texts: Path, ranks: int) -> float:
    """From when the first shards of all ranks were there to when the last one was."""
    rounds = 3
    with tempfile.TemporaryDirectory() as scratch:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        study = ["-m", "experiments.divergence", "--model", str(model), "--texts", str(texts)]
        study += ["--no-parity", "--no-predictions", "--quiet"]
        arguments = ["--limit", str(SHARD_WINDOWS * ranks * rounds), "--output", f"{scratch}/out"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [*torchrun, *study, *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        ends = sorted(path.stat().st_mtime for path in Path(scratch, "out", "windows").glob("*.safetensors"))
    return SHARD_WINDOWS * ranks * (rounds - 1) / (ends[-1] - ends[ranks - 1])


# A GPU.


def on_gpu(repetitions: int) -> str:
    """The grid at 64 and 1024 positions, in float32 and bfloat16, for two shapes."""
    if not torch.cuda.is_available():
        return "No GPU was at hand.\n"
    text = f"{torch.cuda.get_device_name()}.\n"
    for shape, dtype in itertools.product(("gpt2", "gpt2-xl"), AGREEMENT):
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(Path(scratch), repetitions, "cuda", shape, dtype)
            text += f"\n{shape}, {str(dtype).removeprefix('torch.')}:\n" + grids(bench, (64, 1024))
    return text


def machine() -> str:
    """What this ran on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) / MIB for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0.0)
    packages = ("minigpt", "torch", "transformers", "nnsight", "transformer_lens", "pyvene")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(installed(*packages).items()))
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads. Python {platform.python_version()}, {versions}."
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def echo(text: str) -> None:
    """Show a section as soon as it is there."""
    typer.echo(text)


INTRODUCTION = """# Benchmarks

Written by `make bench` on {date}; nothing here is typed by hand. {machine}

Random weights in GPT-2 small's shape (124 million parameters), float32, on the CPU. Contenders take turns within one
process, {repetitions} times each; "times as long" divides medians.{absent} In the grid of factors everyone computes the
Frobenius norms of all depths, and is compared with minigpt's every time. "Factors batched" multiplies the scaled
block's output by all factors, so that rows appear there; "from the start" gives every factor a row of tokens, as one
writes it first. Who is missing beyond {all_up_to} positions was left out for time, and not measured.
"""


def main(
    output: Annotated[Path, typer.Option(help="the report")] = Path("BENCHMARKS.md"),
    repetitions: Annotated[int, typer.Option(help="of everything; the medians are reported")] = 5,
    positions: Annotated[str, typer.Option(help="of the grid's text")] = ",".join(map(str, POSITIONS)),
    sections: Annotated[str, typer.Option(help="measure only those whose title begins so: The grid,Growth")] = "",
) -> None:
    """Measure everything, or some sections anew, and write the report."""
    missing = "".join(f" Not installed here, so absent: {name}." for name in peers.absent())
    report = {"": introduction(repetitions, missing), **sections_of(output)}
    if not sections:
        report[""] = introduction(repetitions, missing)
    stamp = f"{stamp_of(repetitions)}\n\n" if sections else ""  # the introduction's is that of the others
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), repetitions)
        measures: dict[str, Callable[[], str]] = {
            "The grid: 12 layers x 11 factors": lambda: grids(bench, [int(count) for count in positions.split(",")]),
            "Patching": lambda: patching(bench),
            "bfloat16": lambda: bfloat16(bench),
            "Matrix products, GFLOP/s": lambda: products(bench),
            "One pass, loading, generation": lambda: single_pass(bench),
            "Growth": lambda: growth(bench),
            "Peak memory": lambda: memory(bench),
            "Over a corpus": lambda: corpus(bench),
            "On a GPU": lambda: on_gpu(repetitions),
        }
        for title, measure in measures.items():
            if title.startswith(tuple(sections.split(","))):
                echo(f"## {title}")
                report[title] = stamp + measure().strip()
                echo(report[title])
                text = [
                    f"## {name}\n\n{report[name]}" if name else report[name]
                    for name in ["", *measures]
                    if name in report
                ]
                write_text(output, "\n\n".join(text) + "\n")


def stamp_of(repetitions: int) -> str:
    """When, where and how often a section was measured by itself."""
    return f"Measured on {date.today().isoformat()}, in {repetitions} turns. {machine()}"


def introduction(repetitions: int, absent: str) -> str:
    """What was measured, on what, and how."""
    today = date.today().isoformat()
    return INTRODUCTION.format(
        date=today, machine=machine(), repetitions=repetitions, absent=absent, all_up_to=ALL_UP_TO
    ).strip()


def sections_of(report: Path) -> dict[str, str]:
    """The sections of a report that is there already, by title."""
    parts = re.split(r"^## (.*)\n", report.read_text(encoding="utf-8") if report.exists() else "", flags=re.MULTILINE)
    return {title: text.strip() for title, text in zip(parts[1::2], parts[2::2], strict=True)}


if __name__ == "__main__":
    cli.run(lambda: typer.run(main))
