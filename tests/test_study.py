"""The divergence study as a person runs it: its numbers, its files, its refusals."""

import copy
import csv
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.divergence import claims
from experiments.divergence import study as divergence
from experiments.divergence.rows import NORMS, measured
from experiments.harness import writing
from experiments.harness.experiment import PROMPT
from experiments.harness.options import parse_indices, parse_numbers
from experiments.harness.output import results_in
from experiments.harness.running import run_prompt
from experiments.harness.table import Table, Tables, of_text
from experiments.harness.verdicts import Decision, Verdict
from minigpt import GPT2, Sweep, Tokenizer, cli, parity, sweep
from minigpt.measures import Statistics, inner_products, squared_norms
from tests.conftest import TINY

Run = Callable[..., tuple[int, str, str]]
FILES = {
    "summary.json",
    "divergence.csv",
    "sweep.safetensors",
    "report.html",
    *(
        f"divergence_{name}.{kind}"
        for name in ("lines", "image", "grid", "alignment", "written", "kl", "loss_change", "changed", "tokens")
        for kind in ("png", "svg")
    ),
}


def run_main(
    main: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Run an experiment's command line: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["experiment", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    captured = capfd.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


@pytest.fixture
def run_whole(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the study on weights/tiny with these arguments added."""
    return lambda *arguments: run_main(divergence.main, monkeypatch, capfd, "--model", TINY, *arguments)


@pytest.fixture
def run(run_whole: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same without the figures and the report, which take longer than all the rest."""
    monkeypatch.setattr(writing, "_draw", lambda *_: None)
    return run_whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the default study."""
    folder = tmp_path_factory.mktemp("study") / "results"
    factors = parse_numbers("0.5:1.5:0.05", "--factors")
    settings = divergence.GridSettings(model=str(TINY), prompt=PROMPT, layers=(2,), factors=factors)
    experiment = divergence.Divergence(settings)
    study = run_prompt(experiment, GPT2.from_pretrained(TINY), Tokenizer.from_pretrained(TINY))
    writing.write(experiment, study, folder)
    return folder


def rows_of(folder: Path, **wanted: object) -> list[dict[str, str]]:
    """The rows of divergence.csv with these values."""
    with (folder / "divergence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]


def test_the_study_writes_its_files_and_nothing_else(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES
    assert (finished / "divergence_lines.png").read_bytes().startswith(b"\x89PNG")
    assert "scaled: output of block 2" in (finished / "divergence_lines.svg").read_text()


def test_the_table_is_tidy_and_whole(finished: Path) -> None:
    columns = ["model", "site", "layer", "factor", "depth", "positions", "metric", "value", "error"]
    assert list(rows_of(finished)[0]) == columns
    # 21 factors, 3 position sets; 13 depths and final for four measures, 13 depths for passive and for six of what
    # blocks write, final alone for four of predictions, but that the loss of the last token's successor has no number
    assert len(rows_of(finished)) == 21 * 3 * (4 * 14 + 7 * 13 + 4)
    assert all(math.isfinite(float(row["value"])) for row in rows_of(finished))


def test_an_independent_computation_with_a_hook_gives_the_same_frobenius(finished: Path) -> None:
    theirs = parity.load_transformers(TINY, torch.float32)
    ids = torch.tensor([Tokenizer.from_pretrained(TINY).encode(PROMPT)])
    clean = streams_by_hook(theirs, ids, 1.0)
    for factor in (0.5, 0.75, 1.5):
        expected = (streams_by_hook(theirs, ids, factor) - clean)[:, 0, 1:].flatten(1).norm(dim=1)
        rows = rows_of(finished, factor=factor, positions="rest", metric="frobenius")
        found = torch.tensor([float(row["value"]) for row in rows])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def streams_by_hook(theirs: Any, ids: torch.Tensor, factor: float) -> torch.Tensor:
    """Every depth and the final norm of transformers' model with block 2 edited by a hook."""
    hook = theirs.transformer.h[2].register_forward_hook(lambda _module, _inputs, output: output * factor)
    result = parity.run_transformers(theirs, ids)
    hook.remove()
    return torch.cat([result["depths"], result["final"][None]])


def test_the_summary_says_what_ran_and_what_came_of_it(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["parity"]["verdict"] == "certified"
    assert re.fullmatch("[0-9a-f]{64}", summary["model"]["sha256"]["model.safetensors"])
    assert all(check["passed"] for check in summary["checks"])
    assert [verdict["number"] for verdict in summary["verdicts"]] == [1, 2, 3, 4, 5]
    assert summary["versions"]["torch"] == torch.__version__
    assert "".join(summary["tokens"]) == PROMPT


def test_the_saved_sweep_holds_the_numbers_of_the_table(finished: Path) -> None:
    saved = Sweep.load(finished / "sweep.safetensors").frobenius(skip=1)[0, 0, :, 0]
    rows = rows_of(finished, factor=0.5, positions="rest", metric="frobenius")
    assert saved.tolist() == [float(row["value"]) for row in rows[:-1]]


def test_the_terminal_shows_the_saved_numbers(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--factors", "0.5,1.5", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    for place in (3, 12):
        line = next(line for line in out.splitlines() if line.split()[:1] == [str(place)])
        saved = [row["value"] for row in rows_of(tmp_path / "out", depth=place, positions="rest", metric="frobenius")]
        assert line.split()[1:3] == [f"{float(value):.2f}" for value in saved]
    assert all(f"{number}. " in out for number in range(1, 6))
    assert "certified against" in out


def test_without_altair_the_numbers_come_without_figures_and_without_old_ones(
    run_whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_whole("--factors", "0.5", "--output", tmp_path / "out")[0] == 0
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "altair" else find(name))
    code, _, err = run_whole("--factors", "0.5", "--output", tmp_path / "out")
    assert (code, "No figures" in err) == (0, True)
    without = {name for name in FILES if "divergence_" not in name and name != "report.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == without


def test_quiet_prints_nothing(run: Run, tmp_path: Path) -> None:
    assert run("--factors", "0.5", "--quiet", "--output", tmp_path / "out") == (0, "", "")


@pytest.mark.parametrize("site", ["attention", "mlp", "head"])
def test_every_site_runs(run: Run, tmp_path: Path, site: str) -> None:
    code, out, err = run("--site", site, "--layers", "0,11", "--factors", "0,1,2", "--output", tmp_path / "out")
    assert (code, err) == (0, ""), out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["verdicts"]) == 5 * (6 if site == "head" else 2)
    last = [verdict for verdict in summary["verdicts"] if verdict["layer"] == 11]
    assert {verdict["verdict"] for verdict in last if verdict["number"] in (3, 5)} == {"undecided"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", " the"], "one token"),
        (["--prompt", "word " * 300], "shorten"),
        (["--layers", "12"], "layers 0 to 11"),
        (["--layers", "2.5"], "not a layer"),
        (["--layers", "two"], "expected all, a list"),
        (["--factors", "1e38"], "no longer finite at depth 3 under factor 1e+38"),
        (["--layers", "2,2"], "different numbers"),
        (["--factors", "nan"], "finite"),
        (["--factors", "0.5,0.5"], "none twice"),
        (["--factors", "0:1:0.00001"], "larger STEP"),
        (["--factors", "0.5:inf:0.1"], "finite"),
        (["--factors", "1.5:0.5:0.1"], "goes up"),
        (["--site", "gate"], "expected one of output"),
        (["--dtype", "float8"], "expected one of float32"),
        (["--model", "./nowhere"], "not a folder"),
    ],
)
def test_a_mistake_is_a_sentence_and_nothing_is_written(
    run: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, out, err = run("--output", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_runs_folder_is_refused_unless_overwritten(run_whole: Run, tmp_path: Path) -> None:
    run = run_whole
    folder = tmp_path / "out"
    assert run("--factors", "0.5", "--output", folder)[0] == 0
    assert run("--factors", "0.5", "--output", folder)[0] == 0, "the same run replaces its own results"
    before = (folder / "divergence.csv").read_text()
    code, _, err = run("--factors", "0.7", "--output", folder)
    assert code == 2
    assert "--overwrite" in err
    assert (folder / "divergence.csv").read_text() == before
    assert run("--factors", "0.7", "--output", folder, "--overwrite")[0] == 0
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_folder_of_other_files_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = run("--output", tmp_path)
    assert (code, "holds other files (thesis.txt), which --overwrite would leave" in err) == (2, True)
    code, _, err = run("--output", tmp_path / "thesis.txt" / "results")
    assert (code, "is not a folder" in err) == (2, True)


def test_a_model_that_is_not_certified_is_refused_unless_asked_for(run: Run, tmp_path: Path) -> None:
    model = GPT2.from_pretrained(TINY)
    model.blocks[0].mlp.expand.weight.data *= 1.01
    model.save_pretrained(tmp_path / "model")
    for name in (parity.REFERENCE, "tokenizer.json"):
        (tmp_path / "model" / name).write_bytes((TINY / name).read_bytes())
    arguments = ("--model", tmp_path / "model", "--factors", "0.5", "--output", tmp_path / "out")
    code, _, err = run(*arguments)
    assert (code, "does not run" in err, (tmp_path / "out").exists()) == (1, True, False)
    assert run(*arguments, "--no-parity")[0] == 0
    assert "not checked" in json.loads((tmp_path / "out" / "summary.json").read_text())["parity"]


def test_a_model_that_cannot_be_compared_runs_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = parity.Certificate("not comparable", "", problems=("Its blocks are not GPT-2's.",))
    monkeypatch.setattr(parity, "certify", lambda _: certificate)
    code, out, err = run("--factors", "0.5", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "parity: not comparable. Its blocks are not GPT-2's." in out
    said = json.loads((tmp_path / "out" / "summary.json").read_text())["parity"]
    assert said["verdict"] == "not comparable"


def test_an_interrupted_write_leaves_the_finished_run(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), results_in(tmp_path) as scratch:
        (scratch / "summary.json").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "old"


def test_lists_and_ranges() -> None:
    assert parse_indices("all", 3, "layer") == (0, 1, 2)
    assert parse_indices("2,0", 3, "layer") == (2, 0)
    factors = parse_numbers("0.5:1.5:0.05", "--factors")
    assert len(factors) == 21
    assert (factors[0], factors[10], factors[20]) == (0.5, 1.0, 1.5)
    assert parse_numbers("0:1:0.4,-2", "--factors") == (0.0, 0.4, 0.8, -2.0)


def test_a_sweep_that_contradicts_the_oracles_ends_with_exit_code_1(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **named: Any) -> Sweep:
        result = sweep(*arguments, **named)
        result.statistics.difference_sq[:, 0, 3] *= 1.01
        return result

    monkeypatch.setattr(divergence, "sweep", broken)
    code, _, err = run("--output", tmp_path / "out")
    assert (code, "the jump at the site" in err, (tmp_path / "out").exists()) == (1, True, False)


def test_every_half_type_runs(run: Run, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        code, out, err = run("--dtype", dtype, "--factors", "0.5,1.5", "--output", tmp_path / dtype)
        assert (code, err) == (0, "")
        assert "in float32" in out
        rounding = json.loads((tmp_path / dtype / "summary.json").read_text())["rounding"]
        half = GPT2.from_pretrained(TINY, dtype=getattr(torch, dtype))
        ids = [Tokenizer.from_pretrained(TINY).encode(PROMPT)]
        found, exact = (
            sweep(model, ids, [2], (0.5, 1.5)).frobenius() for model in (half, copy.deepcopy(half).double())
        )
        of_rest = rounding["largest_error"]["values"]["frobenius"]
        assert of_rest >= float((found - exact).abs().max()) > 0.01
        assert f"the same numbers in {dtype} and in float64; the largest are frobenius" in " ".join(out.split())


def test_every_number_of_the_file_has_the_distance_to_a_study_in_float64_as_its_error(run: Run, tmp_path: Path) -> None:
    """Two studies by themselves: what the first says of its errors is what the second shows."""

    def rows(dtype: str) -> dict[tuple[str, ...], dict[str, str]]:
        assert run("--dtype", dtype, "--factors", "0.5,1.1", "--output", tmp_path / dtype)[0] == 0
        with (tmp_path / dtype / "divergence.csv").open() as file:
            return {
                tuple(row[name] for name in ("factor", "depth", "positions", "metric")): row
                for row in csv.DictReader(file)
            }

    found, exact = rows("float32"), rows("float64")
    assert found.keys() == exact.keys() and "error" not in next(iter(exact.values()))
    for cell, row in found.items():
        assert float(row["error"]) == pytest.approx(abs(float(row["value"]) - float(exact[cell]["value"])), abs=1e-9)
    largest = json.loads((tmp_path / "float32" / "summary.json").read_text())["rounding"]["largest_error"]["values"]
    for name in ("frobenius", "attention_alignment"):
        assert largest[name] == max(float(row["error"]) for cell, row in found.items() if cell[3] == name)
    # what the block after the site makes otherwise of a stream s times as long is rounding, but for the norm's epsilon
    noise = found["0.5", "4", "rest", "attention_alignment"]
    assert 0.3 * abs(float(noise["value"])) < float(noise["error"])


def test_a_block_whose_answer_is_no_larger_than_its_error_neither_repairs_nor_amplifies() -> None:
    labels = {
        "layer": [0],
        "factor": [0.5],
        "positions": ["rest"],
        "metric": ["alignment"],
        "depth": [*range(5), "final"],
    }
    value = torch.tensor([0.0, 0.0, -0.3, 0.2, -0.1, math.nan], dtype=torch.float64).view(1, 1, 1, 1, 6)
    for error, expected in ((None, ("1, 3", "2", "none")), (0.15, ("1", "2", "3")), (0.25, ("1", "none", "2, 3"))):
        errors = None if error is None else torch.full_like(value, error)
        case = claims.Case({"values": Table(labels, value, error=errors)}, 0, "output", None, 0.0)
        assert claims._signs(case) == expected


def test_positions_and_heads_can_be_chosen(run: Run, tmp_path: Path) -> None:
    grid = ("--site", "head", "--heads", "0,2", "--positions", "3", "--factors", "0,1", "--output", tmp_path / "out")
    assert run(*grid)[0] == 0
    assert {row["head"] for row in rows_of(tmp_path / "out")} == {"0", "2"}
    settings = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    assert (settings["indices"], settings["positions"]) == ([0, 2], [3])
    first = [
        float(row["value"]) for row in rows_of(tmp_path / "out", positions="first", metric="frobenius", factor=0.0)
    ]
    assert max(first) < 1e-5  # position 0 cannot know of position 3
    assert run(*grid[:-2], "--positions", "3,90", "--output", tmp_path / "other")[0] == 2


def test_verdicts_know_which_positions_were_scaled(run: Run, tmp_path: Path) -> None:
    for positions, outcomes in (("3", {2: "holds"}), ("0", {2: "undecided", 3: "undecided", 5: "undecided"})):
        code, out, _ = run("--positions", positions, "--factors", "0.5,1.5", "--output", tmp_path / positions)
        assert code == 0
        verdicts = json.loads((tmp_path / positions / "summary.json").read_text())["verdicts"]
        found = {verdict["number"]: verdict["verdict"] for verdict in verdicts}
        assert outcomes.items() <= found.items()
        assert f"at position {positions}" in out


def test_the_precision_of_products_and_what_was_not_run_are_recorded(run: Run, tmp_path: Path) -> None:
    try:
        assert run("--matmul-precision", "medium", "--factors", "0.5,1", "--output", tmp_path / "out")[0] == 0
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["matmul_precision"] == "medium"
    assert summary["factors_not_run"] == [1.0]
    assert summary["threads"] == torch.get_num_threads()


# Verdicts on streams whose verdicts are known.

FLAT = [2.0] * 5


def evidence_of(
    curves: list[list[float]], norms: list[float], first: float = 1.0, across: Sequence[float] = (0.5,)
) -> Sweep:
    """A sweep of block 0 scaled by 0.5 and 1.5, over three positions.

    `curves` are the differences of one position, for each factor, by depth and at `final`; `norms` the stream's.
    Position 0 has `first` times both. `across` is the share of the difference that is at a right angle to the
    stream, by depth, or everywhere.
    """
    weight = torch.tensor([first, 1.0, 1.0], dtype=torch.float64)
    length = torch.tensor(norms, dtype=torch.float64)[:, None, None] * weight  # [place, batch, position]
    clean = torch.stack([length, torch.zeros_like(length)], -1)
    share = torch.tensor(across, dtype=torch.float64).expand(len(norms))[:, None, None]
    size = torch.tensor(curves, dtype=torch.float64)[None, ..., None, None] * weight
    change = torch.stack([size * (1 - share.square()).sqrt(), size * share], -1)  # [layer, factor, *clean's axes]
    changed = clean + change
    statistics = Statistics(
        torch.ones(1, 2, dtype=torch.int64),
        squared_norms(change),
        squared_norms(changed),
        inner_products(changed, clean),
        squared_norms(clean),
        torch.tensor([3]),
        torch.zeros(3, 2, *size.shape, dtype=torch.float64),
    )
    ids = torch.zeros(1, 3, dtype=torch.long)
    return Sweep(ids, statistics, "output", (0,), None, None, (0.5, 1.5))


def judged(result: Sweep, upstream: float = 0.0, spread: float = 0.0) -> dict[int, str]:
    """Verdicts on a sweep of one layer; `spread` makes intervals of that half width around all that is measured."""
    verdicts = verdicts_on(tables_of(result, spread), result, upstream)
    return {verdict.number: verdict.verdict for verdict in verdicts}


def tables_of(result: Sweep, spread: float = 0.0) -> Tables:
    """What the study makes of a sweep's first text."""
    tables = measured(result)
    found = of_text({**tables, **claims.evidence(tables["values"])})
    if not spread:
        return found
    return {
        name: Table(of.axes, of.value, {"low": of.value - spread, "high": of.value + spread})
        for name, of in found.items()
    }


def verdicts_on(tables: Tables, result: Sweep, upstream: float = 0.0) -> list[Verdict]:
    return claims.judge(tables, result.site, result.positions, [upstream], "a made-up stream")


def verdicts_of(
    curves: list[list[float]], norms: list[float], first: float = 1.0, upstream: float = 0.0
) -> dict[int, str]:
    """Verdicts on made-up streams, see `evidence_of`."""
    return judged(evidence_of(curves, norms, first), upstream)


def both(curve: list[float]) -> list[list[float]]:
    return [curve, curve]


def test_a_change_that_keeps_growing_is_not_healed() -> None:
    assert verdicts_of(both([0, 1, 2, 3, 2]), [4.0] * 5)[3] == "holds"


def test_growth_that_the_stream_outgrows_is_called_dilution() -> None:
    result = evidence_of(both([0, 1, 1.5, 2, 2]), [3, 3, 4, 8, 1])
    verdict = verdicts_on(tables_of(result), result)[2]
    assert verdict.verdict == "does not hold"
    assert "dilution" in verdict.sentence
    assert verdict.figures["relative_over_passive"] == pytest.approx([2.0, 2.0])
    assert verdict.figures["relative_last_over_site"] == pytest.approx([0.75, 0.75])


def test_a_change_that_shrinks_is_healed() -> None:
    assert verdicts_of(both([0, 1, 0.8, 0.5, 2]), FLAT)[3] == "does not hold"


def test_a_change_that_grows_in_length_and_turns_back_is_healed() -> None:
    growing = both([0, 1, 2, 3, 2])
    assert judged(evidence_of(growing, [4.0] * 5, across=(0, 0.1, 0.2, 0.3, 0)))[3] == "holds"
    result = evidence_of(growing, [4.0] * 5, across=(0, 0.9, 0.2, 0.01, 0))
    verdict = verdicts_on(tables_of(result), result)[2]
    assert verdict.verdict == "does not hold"
    assert "turns back" in verdict.sentence, "the stream did not outgrow it"


def test_a_spike_does_not_keep_growing() -> None:
    assert verdicts_of(both([0, 1, 9, 8, 7, 2, 1]), [20.0] * 7)[3] == "does not hold"


def test_factors_that_disagree_do_not_hold() -> None:
    assert verdicts_of([[0, 1, 2, 3, 4], [0, 1, 0.9, 0.8, 4]], FLAT)[3] == "does not hold"


@pytest.mark.parametrize(("first", "verdict"), [(42.0, "holds"), (1.6, "does not hold")])
def test_the_first_token_decides_claim_4(first: float, verdict: str) -> None:
    assert verdicts_of(both([0, 1, 2, 3, 4]), FLAT, first)[4] == verdict


def test_only_the_raw_last_block_decides_claim_5() -> None:
    assert verdicts_of(both([0, 1, 2, 3, 0.1]), FLAT)[5] == "does not hold", "final is far below: no block"
    assert verdicts_of(both([0, 1, 2, 1.9, 5]), FLAT)[5] == "holds"
    assert verdicts_of([[0, 1, 2, 1.9, 5], [0, 1, 2, 2.1, 5]], FLAT)[5] == "does not hold"


def test_claims_1_and_2_are_true_by_construction_only_where_the_figures_agree() -> None:
    curve = [0, 1, 2, 3, 4]
    agreeing = verdicts_of(both(curve), FLAT)
    assert {agreeing[1], agreeing[2]} == {"true by construction"}
    assert verdicts_of(both(curve), FLAT, upstream=1e-9)[1] == "does not hold"
    assert verdicts_of(both([0, 1.1, 2, 3, 4]), FLAT)[2] == "does not hold"
    assert verdicts_of(both([0, 0, 0, 0, 0]), FLAT)[2] == "does not hold"


@pytest.mark.parametrize(
    ("number", "curve", "first", "narrow"),
    [
        (3, [0, 1, 2, 3, 4], 1.0, "holds"),
        (3, [0, 1, 0.8, 0.5, 2], 1.0, "does not hold"),
        (4, [0, 1, 2, 3, 4], 42.0, "holds"),
        (4, [0, 1, 2, 3, 4], 1.0, "does not hold"),
        (5, [0, 1, 2, 1.5, 5], 1.0, "holds"),
        (5, [0, 1, 2, 2.5, 5], 1.0, "does not hold"),
    ],
)
def test_an_interval_that_holds_the_threshold_leaves_a_claim_undecided(
    number: int, curve: list[float], first: float, narrow: str
) -> None:
    result = evidence_of(both(curve), [4.0] * 5, first)
    assert judged(result, spread=0.01)[number] == narrow
    assert judged(result, spread=3.0)[number] == "undecided"


def test_nothing_can_keep_growing_in_a_single_block(model: GPT2, ids: torch.Tensor) -> None:
    """One later block: `gauge_free` of an output scale starts from 0 at the site, so that it rises whatever happens."""
    result = sweep(model, ids[:1], (2,), (0.5,))
    assert judged(result)[3] == "undecided"
    assert judged(result)[5] != "undecided"


def test_few_windows_decide_nothing_that_rests_on_an_interval() -> None:
    verdict = Verdict.of(3, "", Decision("holds", ""), "")
    assert [verdict.over(windows).verdict for windows in (None, 1, 19, 20)] == [
        "holds",
        "undecided",
        "undecided",
        "holds",
    ]
    built = Verdict.of(1, "", Decision("true by construction", ""), "")
    assert built.over(1).verdict == "true by construction"


def test_factor_1_alone_decides_nothing(model: GPT2, ids: torch.Tensor) -> None:
    assert set(judged(sweep(model, ids[:1], (1,), (1.0,))).values()) == {"undecided"}


@pytest.mark.parametrize("n_layer", [4, 5])
def test_the_first_token_is_followed_from_the_site_to_the_last_depth(
    small: Callable[..., GPT2], ids: torch.Tensor, n_layer: int
) -> None:
    result = sweep(small(n_layer=n_layer), ids[:1], (1,), (0.5,))
    verdicts = claims.judge(tables_of(result), "output", None, [0.0], "one prompt")
    (found,) = verdicts[3].figures["all_over_rest_by_depth_from_site"]
    ratio = result.measure("frobenius", "all") / result.measure("frobenius", "rest")
    assert found == pytest.approx(ratio[0, 0, 2 : n_layer + 1, 0].tolist())


def test_evidence_is_made_of_the_measures(model: GPT2, ids: torch.Tensor) -> None:
    result = sweep(model, ids, (1,), (0.5, 1.5), predictions=True)
    table = measured(result)["values"]
    found = claims.evidence(table) | claims.alone([result, result])
    relative, passive = (result.measure(name, "rest")[0, :, 4] for name in ("relative", "passive"))
    torch.testing.assert_close(found["growth"].at(layer=1).value.exp(), (relative / passive).T)
    alone = found["alone"].at(layer=1, who="position_0", metric="kl").value
    torch.testing.assert_close(alone, result.measure("kl", "all")[0, :, -1].T)
    ratio = result.measure("frobenius", "all") / result.measure("frobenius", "rest")
    with_first = found["with_first"].at(layer=1, depth=[2, 3, 4]).value.exp()
    torch.testing.assert_close(with_first, ratio[0, :, 2:5].permute(2, 0, 1))
    assert {name: table.value.shape[0] for name, table in found.items()} == dict.fromkeys(found, 2)


def test_scaling_position_0_alone_is_told_from_scaling_the_others(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    figures = summary["verdicts"][3]["figures"]
    assert figures["alone_factors"] == [0.5, 1.5]
    ids = torch.tensor([Tokenizer.from_pretrained(TINY).encode(PROMPT)])
    model = GPT2.from_pretrained(TINY)
    for who, positions in (("position_0", [0]), ("others", range(1, ids.shape[1]))):
        alone = sweep(model, ids, [2], [0.5, 1.5], positions=positions, predictions=True).statistics
        assert figures[f"{who}_alone_frobenius"] == pytest.approx(
            alone.measure("frobenius", "all")[0, :, 12, 0].tolist()
        )
        assert figures[f"{who}_alone_kl"] == pytest.approx(alone.measure("kl", "all")[0, :, -1, 0].tolist())


def test_norms_of_the_clean_stream_are_of_position_0_and_of_each_texts_others(model: GPT2) -> None:
    texts = [[1, 2, 3, 4], [5, 6]]
    norms = measured(sweep(model, texts, (1,), (0.5,)))["norms"]
    for number, text in enumerate(texts):
        with torch.no_grad():
            expected = model.residuals(torch.tensor([text]))[:, 0].norm(dim=-1)
        found = {of: norms.at(text=number, of=of, depth=[*range(5)]).value for of in NORMS}
        torch.testing.assert_close(found["of position 0"], expected[:, 0])
        torch.testing.assert_close(found["mean of the others"], expected[:, 1:].mean(1))
        torch.testing.assert_close(found["of the others together"], expected[:, 1:].norm(dim=1))
