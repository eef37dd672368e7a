"""The one-pass sweep against runs of its cells alone."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minigpt import GPT2, Sweep, scaled, sweep
from minigpt.engine import Job, Pass, Place, StreamOverflowError
from minigpt.linear import Linear
from minigpt.measures import MEASURES, POSITION_SETS
from minigpt.model import SITES
from minigpt.parameters import parameter_name
from minigpt.passes import estimate_bytes, free_bytes, plan
from minigpt.selfcheck import self_check
from minigpt.sweep import DEFAULT_FACTORS
from tests.conftest import ROOT, SMALL, entries, value_at

FACTORS = (0.5, 1.0, 1.5, -2.0)
SAME = {"rtol": 1e-11, "atol": 1e-11}  # float64: the pass's larger batch may round otherwise


def alone(model: GPT2, ids: Tensor, name: str, value: float | Tensor) -> tuple[Tensor, Tensor]:
    """Clean and scaled stream at every place, each by a run of its own."""
    with torch.no_grad():
        clean = model.residuals(ids)
        clean = torch.cat([clean, model.final_norm(clean[-1:])])
        with scaled(model, {name: value}):
            changed = model.residuals(ids)
        return clean, torch.cat([changed, model.final_norm(changed[-1:])])


@pytest.mark.parametrize("site", SITES)
def test_every_cell_is_what_a_run_of_its_own_gives(model: GPT2, ids: Tensor, site: str) -> None:
    result = sweep(model, ids, (3, 1), FACTORS, site, indices=entries(model, site, 2, 0))
    for i, (layer, index) in enumerate(zip(result.layers, result.indices or [0] * len(result.layers), strict=True)):
        for j, factor in enumerate(FACTORS):
            value = value_at(model, site, factor, index)
            clean, changed = alone(model, ids, parameter_name(model, layer, site), value)
            statistics = result.statistics
            torch.testing.assert_close(statistics.difference_sq[i, j], (changed - clean).square().sum(-1), **SAME)
            torch.testing.assert_close(statistics.run_sq[i, j], changed.square().sum(-1), **SAME)
            torch.testing.assert_close(statistics.inner[i, j], (changed * clean).sum(-1), **SAME)
            torch.testing.assert_close(statistics.clean_sq, clean.square().sum(-1), **SAME)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("positions", [(4,), (0, 3, 9)])
def test_positions_that_alone_are_scaled_are_a_column_of_the_scale(
    model: GPT2, ids: Tensor, site: str, positions: tuple[int, ...]
) -> None:
    result = sweep(model, ids, (1,), FACTORS, site, indices=entries(model, site, 2), positions=positions)
    whole = torch.as_tensor(value_at(model, site, 0.0, 2), dtype=torch.float64)
    scale = torch.ones(1, 10, whole.numel(), dtype=torch.float64)
    for j, factor in enumerate(FACTORS):
        scale[:, positions, int(whole.argmin())] = factor
        clean, changed = alone(model, ids, parameter_name(model, 1, site), scale)
        torch.testing.assert_close(result.statistics.difference_sq[0, j], (changed - clean).square().sum(-1), **SAME)
    assert not broken(model, result)
    # fact 5: what comes before the first scaled position cannot know of it; the pass's products may round otherwise
    assert result.statistics.difference_sq[..., : positions[0]].sum() < 1e-24


def test_texts_of_different_lengths_are_what_each_is_alone(model: GPT2, ids: Tensor) -> None:
    texts = [ids[0, :4].tolist(), ids[1].tolist(), ids[0, 3:].tolist()]
    together = sweep(model, texts, (1, 2), FACTORS, predictions=True)
    assert together.lengths.tolist() == [4, 10, 7]
    for i, text in enumerate(texts):
        by_itself = sweep(model, torch.tensor([text]), (1, 2), FACTORS, predictions=True)
        for name in MEASURES:
            for positions in POSITION_SETS:
                expected = by_itself.statistics.measure(name, positions)[..., 0]
                found = together.statistics.measure(name, positions)[..., i]
                # the root of a difference, and cosines of small writes: a rounding of 1e-16 counts as 1e-8
                near = {"rtol": 1e-7, "atol": 1e-7} if name == "gauge_free" or "alignment" in name else SAME
                torch.testing.assert_close(found, expected, equal_nan=True, **near)
        torch.testing.assert_close(together.frobenius(skip=2)[..., i], by_itself.frobenius(skip=2)[..., 0], **SAME)
    assert not broken(model, together)


def test_padding_counts_nowhere_whatever_stands_in_it(
    model: GPT2, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [ids[0, :4].tolist(), ids[1].tolist()]
    before = sweep(model, texts, (1,), FACTORS).statistics
    monkeypatch.setattr(sys.modules["minigpt.engine"], "pad_sequence", partial(pad_sequence, padding_value=96))
    after = sweep(model, texts, (1,), FACTORS)
    assert after.ids[0, 5] == 96
    assert torch.equal(before.difference_sq, after.statistics.difference_sq)
    assert not after.statistics.clean_sq[:, 0, 4:].any()


def test_a_stream_that_sees_the_padding_would_be_noticed(model: GPT2, ids: Tensor) -> None:
    text = ids[:1, :4]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], 1)  # on the left: every position sees it
    on_the_left = sweep(model, padded, (1,), FACTORS).statistics.difference_sq[..., 3:]
    assert not torch.allclose(on_the_left, sweep(model, text, (1,), FACTORS).statistics.difference_sq, **SAME)


@pytest.mark.parametrize("site", ["output", "attention", "head", "neuron"])
def test_the_result_does_not_depend_on_the_split_into_passes(small: Callable[..., GPT2], site: str) -> None:
    model, texts = small(dtype=torch.float32), [list(range(length)) for length in (9, 5, 7, 2, 9)]
    whole = sweep(model, texts, (3, 1), FACTORS, site)
    job = Job.checked(
        model, texts, [whole.intervention(model, i, j) for i in range(len(whole.layers)) for j in FACTORS]
    )
    least = estimate_bytes(job, 1, 9, 2)
    for max_bytes in (least, least + 20_000, 2 * least):
        parts = plan(job, max_bytes)
        assert len(parts) > 1
        assert all(estimate_bytes(job, *part.ids.shape, 1 + len(part.runs)) <= max_bytes for part in parts)
        split = sweep(model, texts, (3, 1), FACTORS, site, max_bytes=max_bytes)
        torch.testing.assert_close(split.frobenius(), whole.frobenius(), rtol=1e-5, atol=1e-5)
        assert not broken(model, split)
    with pytest.raises(ValueError, match=f"max_bytes is {least - 1}; one text of 9 tokens .* takes {least}"):
        sweep(model, texts, (3, 1), FACTORS, site, max_bytes=least - 1)


@pytest.mark.parametrize("site", ["output", "attention", "mlp", "head"])
def test_only_what_remains_of_the_blocks_is_run(
    model: GPT2, ids: Tensor, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[Linear, int] = dict.fromkeys((module for module in model.modules() if isinstance(module, Linear)), 0)
    product = Linear.forward

    def counted(self: Linear, x: Tensor) -> Tensor:
        rows[self] += x.shape[0]
        return product(self, x)

    monkeypatch.setattr(Linear, "forward", counted)
    sweep(model, ids, (1, 2), FACTORS, site, heads=(0,) if site == "head" else None)
    whole = torch.tensor([1, 1, 4, 7])  # the clean run, and three factors of each layer behind it: factor 1 is not run
    leaving = torch.tensor([0, 3, 3, 0])
    maps = [[block.attention.qkv, block.attention.projection, block.mlp.expand] for block in model.blocks]
    qkv, projection, expand = torch.tensor([[rows[of] for of in block] for block in maps]).T
    assert qkv.tolist() == (2 * whole).tolist()
    assert projection.tolist() == (2 * (whole + leaving * (site == "head"))).tolist()
    assert expand.tolist() == (2 * (whole + leaving * (site in ("attention", "head")))).tolist()
    assert rows[model.unembed] == 0


MEASURED = """
import sys, torch
from minigpt import GPT2, GPT2Config
from minigpt.engine import Job
from minigpt.passes import estimate_bytes, plan
from minigpt.parameters import parameter_name

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

site, texts, length, predictions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
model = GPT2(GPT2Config(n_embd=384, n_layer=3, n_head=6, n_positions=length, vocab_size=4096))
heads = [torch.ones(6).index_fill(0, torch.tensor(head), 0.0) for head in range(6)]
values = heads if site == "head" else [0.5 + 0.1 * i for i in range(9)]
names = [parameter_name(model, layer, site) for layer in range(3)]
runs = [{name: value} for name in names for value in values]
if site == "neuron":  # patched: a scale at every position, and a shift of every neuron there
    shift, scale = torch.randn(1, length, 1536), torch.rand(1, length, 1)
    runs = [{name: scale, name.replace("scale", "shift"): shift} for name in names for _ in range(9)]
ids = torch.zeros(texts, length, dtype=torch.long)
scalars = [{name: 0.5} for name in names]
for _ in plan(Job.checked(model, ids[:, :8], scalars, predictions), None)[0].places():
    pass  # what every process loads once
job = Job.checked(model, ids, runs, predictions)
(part,) = plan(job, None)
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
for _ in part.places():
    pass
estimate = estimate_bytes(job, texts, length, 1 + len(part.runs))
print((kilobytes("VmHWM") - before) * 1024 / estimate)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("site", "texts", "length", "predictions"),
    [
        ("output", 1, 1024, False),
        ("head", 2, 128, False),
        ("mlp", 8, 128, False),
        ("mlp", 8, 128, True),
        ("neuron", 1, 512, False),
    ],
)
def test_the_measured_peak_is_at_most_a_little_above_the_estimate(
    site: str, texts: int, length: int, predictions: bool
) -> None:
    command = [sys.executable, "-c", MEASURED, site, str(texts), str(length), str(predictions)]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert 0.3 < ratio <= 1.3


def test_what_is_free_is_less_than_the_machine_has(tmp_path: Path) -> None:
    assert 0 < free_bytes(torch.device("cpu")) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_sweep_of_another_layer_is_not_the_same(model: GPT2, ids: Tensor) -> None:
    clean, changed = alone(model, ids, "blocks.2.output_scale", 0.5)
    wrong = sweep(model, ids, (1,), (0.5,)).statistics.difference_sq[0, 0]
    assert not torch.allclose(wrong, (changed - clean).square().sum(-1), **SAME)


def test_frobenius_has_the_contracts_axes_and_leaves_positions_out(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids, (0, 2), FACTORS)
    clean, changed = alone(model, ids, "blocks.2.output_scale", -2.0)
    for skip in (0, 1, 4):
        norms = result.frobenius(skip=skip)
        assert norms.shape == (2, 4, SMALL["n_layer"] + 1, 2)
        expected = (changed - clean)[:-1, :, skip:].flatten(2).norm(dim=2)
        torch.testing.assert_close(norms[1, 3], expected, **SAME)


def test_factor_1_and_places_before_the_site_are_exactly_clean(model: GPT2, ids: Tensor) -> None:
    statistics = sweep(model, ids, (2,), FACTORS).statistics
    assert sweep(model, ids, (2,), FACTORS).not_run == (1.0,)
    assert not statistics.difference_sq[0, 1].any()
    assert not statistics.difference_sq[0, :, :3].any()
    assert (statistics.difference_sq[0, [0, 2, 3], 3:] > 0).all()


def test_the_default_is_every_layer_and_21_factors(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids[:1, :4])
    assert result.layers == (0, 1, 2, 3)
    assert len(result.factors) == len(DEFAULT_FACTORS) == 21
    assert result.factors[10] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("site", SITES)
def test_self_check_passes(small: Callable[..., GPT2], ids: Tensor, site: str, dtype: torch.dtype) -> None:
    model = small(dtype=dtype)
    result = sweep(model, ids, (1, 3), FACTORS, site)
    tried = self_check(model, result)
    assert not tried.broken, tried
    assert len(tried.checks) == (6 if site == "output" else 5)
    assert tried.upstream == (0.0,) * len(result.layers)


def broken(model: GPT2, result: Sweep) -> list[str]:
    """The first words of every check that a sweep breaks."""
    return [" ".join(check.claim.split()[:2]) for check in self_check(model, result).broken]


def test_self_check_notices_a_jump_that_is_off(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids, (1,), FACTORS)
    result.statistics.difference_sq[0, 0, 2] *= 1 + 1e-12  # float64: a few roundings
    assert broken(model, result) == ["the jump"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_self_check_still_notices_a_jump_twice_too_large(
    small: Callable[..., GPT2], ids: Tensor, dtype: torch.dtype
) -> None:
    model = small(dtype=dtype)
    result = sweep(model, ids, (1,), (0.95,))
    assert not broken(model, result)
    result.statistics.difference_sq[0, 0, 2] *= 4
    assert "the jump" in broken(model, result)


@pytest.mark.parametrize(
    "unscaled",
    [(0, 0), (0, 0, slice(None), 1), (0, 0, slice(None), slice(None), slice(1, None)), (1, 2, slice(None), 0, 9)],
    ids=["no row", "not the second row", "only position 0", "not the last position of one row"],
)
def test_self_check_notices_rows_that_were_not_scaled(model: GPT2, ids: Tensor, unscaled: tuple[object, ...]) -> None:
    result = sweep(model, ids, (1, 2), FACTORS, "mlp")
    result.statistics.difference_sq[unscaled] = 0
    assert "all 6" in broken(model, result)


def test_self_check_notices_a_factor_1_that_changed_something(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids, (1,), FACTORS, "mlp")
    result.statistics.difference_sq[0, 1, 2, 0, 3] = 1e-9
    assert "all 3" in broken(model, result)


@pytest.mark.parametrize("entry", [0, 1])
def test_self_check_notices_a_wrong_cell_of_any_entry(model: GPT2, ids: Tensor, entry: int) -> None:
    result = sweep(model, ids, (1, 2), FACTORS)
    result.statistics.difference_sq[entry, 3, 4] *= 1.0001
    assert broken(model, result) == ["a run"]


@pytest.mark.parametrize("site", ["output", "head"])
def test_the_part_of_some_layers_is_what_a_sweep_of_them_gives(model: GPT2, ids: Tensor, site: str) -> None:
    part = sweep(model, ids, (0, 2, 3), FACTORS, site, predictions=True).of_layers(iter((3, 0)))
    by_itself = sweep(model, ids, (3, 0), FACTORS, site, predictions=True)
    assert (part.layers, part.heads, part.factors) == (by_itself.layers, by_itself.heads, by_itself.factors)
    for name in MEASURES:
        found, expected = (result.statistics.measure(name, "rest") for result in (part, by_itself))
        # cosines of small writes: a rounding of 1e-16 counts as 1e-8
        near = {"rtol": 1e-7, "atol": 1e-7} if name == "gauge_free" or "alignment" in name else SAME
        torch.testing.assert_close(found, expected, equal_nan=True, **near)


def test_a_part_needs_layers_that_were_scaled_each_once(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids, (0, 2), (0.5,))
    with pytest.raises(ValueError, match=r"Layer 1 was not scaled; this sweep has 0, 2\."):
        result.of_layers([0, 1])
    with pytest.raises(ValueError, match="different numbers"):
        result.of_layers([2, 2])


@pytest.mark.parametrize("skip", [-1, 10, 99])
def test_leaving_out_every_position_is_refused(model: GPT2, ids: Tensor, skip: int) -> None:
    with pytest.raises(ValueError, match="10 positions"):
        sweep(model, ids, (1,), (0.5,)).frobenius(skip=skip)


@pytest.mark.parametrize("n_layer", [2, 3, 4])
def test_progress_sees_every_place(small: Callable[..., GPT2], ids: Tensor, n_layer: int) -> None:
    seen: list[int] = []

    def watch(places: Iterable[Place], total: int) -> Iterator[Place]:
        for place in places:
            seen.append(len(place.runs))
            yield place
        assert total == len(seen)

    sweep(small(n_layer=n_layer), ids, (0, 1), FACTORS, progress=watch)
    assert seen == [0, 3, *[6] * n_layer]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_a_model_of_few_blocks_can_be_swept(small: Callable[..., GPT2], ids: Tensor, site: str, n_layer: int) -> None:
    model = small(n_layer=n_layer)
    result = sweep(model, ids, factors=(0.0, 2.0), site=site)
    assert result.frobenius().shape[2] == n_layer + 1
    assert not broken(model, result)


def test_saving_and_loading_gives_the_same_sweep(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    result = sweep(model, ids, (0, 3), FACTORS, "head", heads=(2, 0), positions=(1, 2))
    result.save(tmp_path / "sweep.safetensors")
    loaded = Sweep.load(tmp_path / "sweep.safetensors")
    assert (loaded.site, loaded.layers, loaded.heads, loaded.factors) == ("head", (0, 0, 3, 3), (2, 0, 2, 0), FACTORS)
    assert torch.equal(loaded.ids, ids)
    assert loaded.positions == (1, 2)
    assert loaded.lengths.tolist() == [10, 10]
    assert torch.equal(loaded.frobenius(), result.frobenius())


def test_a_loaded_sweep_has_every_measure_of_the_saved_one(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    result = sweep(model, [ids[0].tolist(), ids[1, :4].tolist()], (0, 3), FACTORS, predictions=True)
    result.save(tmp_path / "sweep.safetensors")
    loaded = Sweep.load(tmp_path / "sweep.safetensors")
    for name in MEASURES:
        found, expected = (part.statistics.measure(name, "all") for part in (loaded, result))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def as_file(result: Sweep, path: Path, **tensors: Tensor) -> Path:
    """A file of a sweep with other tensors in it."""
    ids = tensors.pop("ids", result.ids)
    replace(result, ids=ids, statistics=replace(result.statistics, **tensors)).save(path)
    return path


@pytest.mark.parametrize("name", ["difference_sq", "run_sq", "inner", "clean_sq", "written", "lengths", "ids"])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("more", [-1, 1])
def test_a_file_with_a_tensor_of_another_shape_than_its_grid_is_not_a_sweep(
    model: GPT2, ids: Tensor, tmp_path: Path, name: str, axis: int, more: int
) -> None:
    result = sweep(model, ids, (0, 3), (0.5,))
    tensor = result.ids if name == "ids" else getattr(result.statistics, name)
    index = torch.arange(tensor.shape[axis] + more).clamp(max=tensor.shape[axis] - 1)
    path = as_file(result, tmp_path / "sweep.safetensors", **{name: tensor.index_select(axis, index)})
    blamed = (
        "difference_sq, run_sq, inner, written" if name == "clean_sq" else name
    )  # its places are what the others follow
    with pytest.raises(ValueError, match=rf"not a saved sweep \({blamed} of another shape than its grid"):
        Sweep.load(path)


@pytest.mark.parametrize("change", [lambda tensor: tensor[..., 0], lambda tensor: tensor[..., None]])
def test_a_file_with_an_axis_more_or_less_throughout_is_not_a_sweep(
    model: GPT2, ids: Tensor, tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    result = sweep(model, ids, (0, 3), (0.5,))
    names = ("difference_sq", "run_sq", "inner", "clean_sq", "written")
    changed = {name: change(getattr(result.statistics, name)) for name in names}
    with pytest.raises(ValueError, match="another shape than its grid"):
        Sweep.load(as_file(result, tmp_path / "sweep.safetensors", ids=change(ids), **changed))


@pytest.mark.parametrize("changed", [{"site": 5}, {"layers": (4,)}, {"layers": (-1,)}])
def test_a_file_with_a_site_or_layers_that_no_model_has_is_not_a_sweep(
    model: GPT2, ids: Tensor, tmp_path: Path, changed: dict[str, Any]
) -> None:
    replace(sweep(model, ids, (0,), (0.5,)), **changed).save(tmp_path / "sweep.safetensors")
    with pytest.raises(ValueError, match="a site or layers that no model has"):
        Sweep.load(tmp_path / "sweep.safetensors")


@pytest.mark.parametrize("content", [b"", b"no sweep", b"\x02\0\0\0\0\0\0\0{}"])
def test_another_file_is_not_a_sweep(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sweep.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a saved sweep"):
        Sweep.load(tmp_path / "sweep.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layers": (4,)}, "from 0 to 3"),
        ({"layers": (-1,)}, "from 0 to 3"),
        ({"layers": (2, 2)}, "different"),
        ({"layers": ()}, "layers"),
        ({"factors": ()}, "at least one"),
        ({"factors": (0.5, float("inf"))}, "finite"),
        ({"factors": (0.5, 0.5)}, "twice"),
        ({"ids": [1, 2, 3]}, "not lists of token ids"),
        ({"site": "nonsense"}, "nonsense"),
        ({"heads": (0,)}, "site 'output', which has none"),
        ({"site": "head", "heads": (0,), "indices": (1,)}, "both given"),
        ({"site": "head", "heads": (3,)}, "from 0 to 2"),
        ({"positions": (10,)}, "positions are 10; .* from 0 to 9"),
        ({"positions": ()}, "positions"),
        ({"ids": []}, "at least one text"),
        ({"ids": [[1, 2], []]}, "at least one token"),
        ({"ids": [[1, 97]]}, "0 to 96"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, "batch, position"),
        ({"ids": torch.tensor(3)}, "batch, position"),
    ],
)
def test_a_grid_out_of_range_is_refused(model: GPT2, ids: Tensor, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sweep(model, **{"ids": ids, **arguments})


def test_a_factor_that_the_models_type_rounds_to_1_is_refused(small: Callable[..., GPT2], ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"factor 0\.999 is 1 in torch.bfloat16"):
        sweep(small(dtype=torch.bfloat16), ids, (1,), (0.5, 0.999))
    assert sweep(small(dtype=torch.float32), ids, (1,), (0.5, 0.999)).frobenius()[0, 1, 2].min() > 0


def test_numpys_numbers_are_numbers(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    result = sweep(model, ids, np.arange(2), np.linspace(0.5, 1.5, 3))
    result.save(tmp_path / "sweep.safetensors")
    assert (result.layers, result.factors) == ((0, 1), (0.5, 1.0, 1.5))
    assert result.of_layers(np.arange(1, 2)).layers == (1,)


def test_a_stream_that_overflows_says_where_first_and_under_which_factor(
    small: Callable[..., GPT2], ids: Tensor
) -> None:
    model = small(dtype=torch.float32)
    with pytest.raises(StreamOverflowError, match=r"depth 2 under factor 3e\+38, in float32; take a smaller value"):
        sweep(model, ids, (3, 1), (0.5, 3e38))
    model.final_norm.weight.data.fill_(3e38)
    with pytest.raises(StreamOverflowError, match="at the final norm in the clean run, in float32; take float64"):
        sweep(model, ids, (1,), (0.5,))


def test_a_model_that_is_not_clean_is_refused(model: GPT2, ids: Tensor) -> None:
    with scaled(model, {"blocks.0.mlp_scale": 0.5}), pytest.raises(ValueError, match=r"blocks\.0\.mlp_scale"):
        sweep(model, ids)


@pytest.mark.parametrize("texts", ["The old man", ["The old man", "a door"]])
def test_texts_that_are_not_encoded_are_a_sentence(model: GPT2, texts: Any) -> None:
    with pytest.raises(ValueError, match="not lists of token ids"):
        sweep(model, texts)


# A pass that runs out of memory.

FAR_BEYOND = """
import json, resource, sys, torch
from minigpt import GPT2, GPT2Config, sweep
model = GPT2(GPT2Config(vocab_size=50, n_positions=256, n_embd=64, n_head=2, n_layer=2))
ids = torch.randint(50, (2, 256))
sweep(model, ids, factors=[0.5])  # so that everything that loads late is there
used = 1024 * next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, resource.RLIM_INFINITY))
result = sweep(model, ids, factors=[0.5 + step / 200 for step in range(int(sys.argv[1]))], max_bytes=2**60)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
again = sweep(model, ids, factors=result.factors)
torch.testing.assert_close(result.statistics.difference_sq, again.statistics.difference_sq, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory, and to read how much is used")
def test_a_pass_that_runs_out_of_memory_is_halved_and_says_so() -> None:
    command = [sys.executable, "-W", "error", "-c", FAR_BEYOND, "75"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "Out of memory with 150 runs of 2 texts beside the clean run; they are halved" in done.stderr


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, type[Exception], str], list[int]]:
    """Let every pass with more rows of texts than so many fail at its last place; the rows of all passes are listed."""

    def limit(most: int, kind: type[Exception], message: str) -> list[int]:
        whole, seen = Pass.places, list[int]()

        def places(self: Pass) -> Iterator[Place]:
            seen.append(len(self.runs) * len(self.ids))
            for place in whole(self):
                if place.index == 3 and seen[-1] > most:
                    raise kind(message)
                yield place

        monkeypatch.setattr(Pass, "places", places)
        return seen

    return limit


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (MemoryError, ""),
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_halved_passes_give_the_same_numbers(
    model: GPT2, ids: Tensor, little_memory: Callable[..., list[int]], kind: type[Exception], message: str
) -> None:
    asked = {"layers": [1, 0], "factors": FACTORS, "predictions": True}
    expected = sweep(model, ids, **asked)
    seen = little_memory(1, kind, message)
    found = sweep(model, ids, **asked)
    assert seen[0] == 12
    assert seen.count(1) == 12  # down to one cell of one text
    for name in ("difference_sq", "run_sq", "inner", "clean_sq", "written"):
        one, other = getattr(found.statistics, name), getattr(expected.statistics, name)
        torch.testing.assert_close(one, other, **SAME)
    assert found.statistics.predictions is not None and expected.statistics.predictions is not None
    torch.testing.assert_close(found.statistics.predictions.kl, expected.statistics.predictions.kl, **SAME)


UNEQUAL = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16, 17]]


@pytest.mark.parametrize("most", [1, 7], ids=["down to one cell of one text", "down to some"])
def test_halved_passes_of_texts_of_unequal_lengths_give_what_each_text_gives_alone(
    model: GPT2, little_memory: Callable[..., list[int]], most: int
) -> None:
    """The second is the shortest that is allowed; likeliest tokens are those after each text's own last one."""
    asked = {"layers": [1, 0], "factors": FACTORS, "predictions": True}
    expected = [sweep(model, [text], **asked).statistics for text in UNEQUAL]
    seen = little_memory(most, MemoryError, "")
    found = sweep(model, UNEQUAL, **asked).statistics
    assert seen[0] == 18
    for text, alone in enumerate(expected):
        for name in MEASURES:
            for positions in POSITION_SETS:
                near = {"rtol": 1e-7, "atol": 1e-7} if name == "gauge_free" or "alignment" in name else SAME
                one, other = (of.measure(name, positions) for of in (found, alone))
                torch.testing.assert_close(one[..., text], other[..., 0], equal_nan=True, **near)
        assert found.predictions is not None and alone.predictions is not None
        for name, tensor in alone.predictions.tensors().items():
            other = getattr(found.predictions, name)[:, :, text, : tensor.shape[-1]]
            torch.testing.assert_close(other, tensor[:, :, 0], **SAME)


def test_memory_that_is_too_little_for_one_run_is_a_sentence(
    model: GPT2, ids: Tensor, little_memory: Callable[..., list[int]]
) -> None:
    little_memory(0, MemoryError, "")
    with pytest.raises(ValueError, match="too little for one run of 10 tokens"):
        sweep(model, ids, factors=[0.5])


def test_another_error_is_not_taken_for_a_lack_of_memory(
    model: GPT2, ids: Tensor, little_memory: Callable[..., list[int]]
) -> None:
    seen = little_memory(0, RuntimeError, "Expected all tensors to be on the same device")
    with pytest.raises(RuntimeError, match="same device"):
        sweep(model, ids, factors=[0.5])
    assert len(seen) == 1
