"""The one-pass sweep against runs of its cells alone."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minigpt import GPT2, Sweep, scaled, sweep
from minigpt.scales import SITES, Site, scale_name
from minigpt.sweep import DEFAULT_FACTORS, Streams, self_check
from tests.conftest import SMALL

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
def test_every_cell_is_what_a_run_of_its_own_gives(model: GPT2, ids: Tensor, site: Site) -> None:
    result = sweep(model, ids, (3, 1), FACTORS, site)
    heads = result.heads or [None] * len(result.layers)
    for i, (layer, head) in enumerate(zip(result.layers, heads, strict=True)):
        for j, factor in enumerate(FACTORS):
            value = factor if head is None else torch.ones(3).index_fill(0, torch.tensor(head), factor)
            clean, changed = alone(model, ids, scale_name(layer, site), value)
            statistics = result.statistics
            torch.testing.assert_close(statistics.difference[i, j], (changed - clean).square().sum(-1), **SAME)
            torch.testing.assert_close(statistics.scaled[i, j], changed.square().sum(-1), **SAME)
            torch.testing.assert_close(statistics.inner[i, j], (changed * clean).sum(-1), **SAME)
            torch.testing.assert_close(statistics.clean, clean.square().sum(-1), **SAME)


def test_a_sweep_of_another_layer_is_not_the_same(model: GPT2, ids: Tensor) -> None:
    clean, changed = alone(model, ids, "blocks.2.output_scale", 0.5)
    wrong = sweep(model, ids, (1,), (0.5,)).statistics.difference[0, 0]
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
    assert not statistics.difference[0, 1].any()
    assert not statistics.difference[0, :, :3].any()
    assert (statistics.difference[0, [0, 2, 3], 3:] > 0).all()


def test_the_default_is_every_layer_and_21_factors(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids[:1, :4])
    assert result.layers == (0, 1, 2, 3)
    assert len(result.factors) == len(DEFAULT_FACTORS) == 21
    assert result.factors[10] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("site", SITES)
def test_self_check_passes(small: Callable[..., GPT2], ids: Tensor, site: Site, dtype: torch.dtype) -> None:
    model = small(dtype=dtype)
    tried = self_check(model, sweep(model, ids, (1, 3), FACTORS, site))
    assert not tried.broken, tried
    assert len(tried.checks) == (5 if site == "output" else 4)
    assert tried.upstream == (0.0,) * (6 if site == "head" else 2)


def broken(model: GPT2, result: Sweep) -> list[str]:
    """The first words of every check that a sweep breaks."""
    return [" ".join(check.claim.split()[:2]) for check in self_check(model, result).broken]


def test_self_check_notices_a_jump_that_is_off(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids, (1,), FACTORS)
    result.statistics.difference[0, 0, 2] *= 1 + 1e-12  # float64: a few roundings
    assert broken(model, result) == ["the jump"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_self_check_still_notices_a_jump_twice_too_large(
    small: Callable[..., GPT2], ids: Tensor, dtype: torch.dtype
) -> None:
    model = small(dtype=dtype)
    result = sweep(model, ids, (1,), (0.95,))
    assert not broken(model, result)
    result.statistics.difference[0, 0, 2] *= 4
    assert "the jump" in broken(model, result)


@pytest.mark.parametrize(
    "unscaled",
    [(0, 0), (0, 0, slice(None), 1), (0, 0, slice(None), slice(None), slice(1, None)), (1, 2, slice(None), 0, 9)],
    ids=["no row", "not the second row", "only position 0", "not the last position of one row"],
)
def test_self_check_notices_rows_that_were_not_scaled(model: GPT2, ids: Tensor, unscaled: tuple[object, ...]) -> None:
    result = sweep(model, ids, (1, 2), FACTORS, "mlp")
    result.statistics.difference[unscaled] = 0
    assert "all 6" in broken(model, result)


def test_self_check_notices_a_factor_1_that_changed_something(model: GPT2, ids: Tensor) -> None:
    result = sweep(model, ids, (1,), FACTORS, "mlp")
    result.statistics.difference[0, 1, 2, 0, 3] = 1e-9
    assert "all 3" in broken(model, result)


@pytest.mark.parametrize("entry", [0, 1])
def test_self_check_notices_a_wrong_cell_of_any_entry(model: GPT2, ids: Tensor, entry: int) -> None:
    result = sweep(model, ids, (1, 2), FACTORS)
    result.statistics.difference[entry, 3, 4] *= 1.0001
    assert broken(model, result) == ["a run"]


@pytest.mark.parametrize("skip", [-1, 10, 99])
def test_leaving_out_every_position_is_refused(model: GPT2, ids: Tensor, skip: int) -> None:
    with pytest.raises(ValueError, match="10 positions"):
        sweep(model, ids, (1,), (0.5,)).frobenius(skip=skip)


def test_progress_sees_every_place(model: GPT2, ids: Tensor) -> None:
    seen: list[int] = []

    def watch(places: Iterable[Streams]) -> Iterator[Streams]:
        for streams, cells in places:
            seen.append(len(cells))
            yield streams, cells

    sweep(model, ids, (1, 2), FACTORS, progress=watch)
    assert seen == [0, 0, 3, 6, 6, 6]


@pytest.mark.parametrize("site", SITES)
def test_a_model_of_one_block_can_be_swept(small: Callable[..., GPT2], ids: Tensor, site: Site) -> None:
    model = small(n_layer=1)
    result = sweep(model, ids, factors=(0.0, 2.0), site=site)
    assert result.frobenius().shape[2] == 2
    assert not broken(model, result)


def test_saving_and_loading_gives_the_same_sweep(model: GPT2, ids: Tensor, tmp_path: Path) -> None:
    result = sweep(model, ids, (0, 3), FACTORS, "head", heads=(2, 0))
    result.save(tmp_path / "sweep.safetensors")
    loaded = Sweep.load(tmp_path / "sweep.safetensors")
    assert (loaded.site, loaded.layers, loaded.heads, loaded.factors) == ("head", (0, 0, 3, 3), (2, 0, 2, 0), FACTORS)
    assert torch.equal(loaded.ids, ids)
    assert torch.equal(loaded.frobenius(), result.frobenius())


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
        ({"site": "neuron"}, "neuron"),
        ({"heads": (0,)}, "site 'head'"),
        ({"site": "head", "heads": (3,)}, "from 0 to 2"),
    ],
)
def test_a_grid_out_of_range_is_refused(model: GPT2, ids: Tensor, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sweep(model, ids, **arguments)


def test_a_model_that_is_not_clean_is_refused(model: GPT2, ids: Tensor) -> None:
    with scaled(model, {"blocks.0.mlp_scale": 0.5}), pytest.raises(ValueError, match=r"blocks\.0\.mlp_scale"):
        sweep(model, ids)
