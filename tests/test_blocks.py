"""Another block, whatever its equations: every view of the library follows the model's own forward.

Each comparison has a twin that computes with GPT-2's block on the same weights, and must not agree.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt import GPT2, Block, GPT2Config, compare, generate, passes, scaled, sensitivity, sweep
from minigpt.engine import Clean
from minigpt.measures import MEASURES, Measure, squared_norms
from minigpt.model import SITES, Attention
from minigpt.parameters import parameter_name
from minigpt.selfcheck import self_check
from minigpt.sensitivity import SENSITIVITIES
from tests.blocks import BLOCKS, Parallel, RotaryAttention
from tests.conftest import SMALL, draw, entries, value_at
from tests.test_sensitivity import STEP, TOLERANCE, central

SAME = {"rtol": 1e-12, "atol": 1e-12}  # float64
TEXTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]]
FACTORS = (0.5, 1.0, -2.0)


@pytest.fixture(params=BLOCKS, ids=lambda block: block.__name__)
def other(request: pytest.FixtureRequest) -> GPT2:
    """A small random model of another block, float64."""
    return draw(GPT2Config(**SMALL), block=request.param)


@contextmanager
def plain_equations() -> Iterator[None]:
    """The twin: the same weights under GPT-2's equations."""

    def with_mean(self: nn.RMSNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps or 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parallel, "forward", Block.forward)
        patch.setattr(RotaryAttention, "heads", Attention.heads)
        patch.setattr(nn.RMSNorm, "forward", with_mean)
        yield


def alone(model: GPT2, text: list[int], values: dict[str, float | Tensor]) -> tuple[Tensor, Tensor]:
    """Clean and changed stream at every place, each by a run of its own: [place, position, n_embd]."""
    ids = torch.tensor([text])
    with torch.no_grad():
        clean = model.residuals(ids)
        with scaled(model, values):
            changed = model.residuals(ids)
        return tuple(torch.cat([of, model.final_norm(of[-1:])])[:, 0] for of in (clean, changed))  # type: ignore[return-value]


@pytest.mark.parametrize("site", SITES)
def test_a_sweep_is_what_runs_of_their_own_give(other: GPT2, site: str) -> None:
    result = sweep(other, TEXTS, (2, 0), FACTORS, site, indices=entries(other, site, 1))
    assert not self_check(other, result).broken
    for i, layer in enumerate(result.layers):
        for j, factor in enumerate(FACTORS):
            values = {parameter_name(other, layer, site): value_at(other, site, factor)}
            for text, ids in enumerate(TEXTS):
                clean, changed = alone(other, ids, values)
                difference = (changed - clean).square().sum(-1)
                torch.testing.assert_close(
                    result.statistics.difference_sq[i, j, :, text, : len(ids)], difference, **SAME
                )


@pytest.mark.parametrize("site", SITES)
def test_a_sweep_under_the_plain_equations_is_not(other: GPT2, site: str) -> None:
    found = sweep(other, TEXTS, (1,), (0.5,), site).frobenius()
    with plain_equations():
        assert not torch.allclose(sweep(other, TEXTS, (1,), (0.5,), site).frobenius(), found, rtol=1e-3)


def test_interventions_of_many_blocks_are_what_runs_of_their_own_give(other: GPT2) -> None:
    edits: list[dict[str, float | Tensor]] = [
        {"blocks.1.attention_scale": 0.0, "blocks.1.mlp_scale": 0.0},
        {"blocks.0.attention.head_scale": value_at(other, "head", 0.0), "blocks.3.output_scale": 1.5},
        {"blocks.2.mlp_scale": -1.0},
    ]
    found = compare(other, TEXTS, edits, predictions=True, steps=True).statistics
    assert found.predictions is not None and found.steps_sq is not None
    for row, edit in enumerate(edits):
        for text, ids in enumerate(TEXTS):
            clean, changed = alone(other, ids, edit)
            torch.testing.assert_close(
                found.difference_sq[row, :, text, : len(ids)], (changed - clean).square().sum(-1), **SAME
            )
            steps = (changed[1:-1] - changed[:-2]).square().sum(-1)
            torch.testing.assert_close(found.steps_sq[row, :, text, : len(ids)], steps, **SAME)
            p, q = (other.unembed(of[-1]).log_softmax(-1) for of in (clean, changed))
            kl = (p.exp() * (p - q)).sum(-1).detach()
            torch.testing.assert_close(found.predictions.kl[row, text, : len(ids)], kl, **SAME)


@pytest.mark.parametrize("site", SITES)
def test_what_blocks_write_is_what_their_sublayers_return(other: GPT2, site: str) -> None:
    ids, values = TEXTS[0], {parameter_name(other, 1, site): value_at(other, site, 0.5)}
    writes: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
    for block in other.blocks:
        for part, kept in writes.items():
            getattr(block, part).register_forward_hook(lambda _module, _given, out, kept=kept: kept.append(out[0]))
    clean, changed = alone(other, ids, values)
    of_runs = {part: (torch.stack(kept[:4]), torch.stack(kept[4:])) for part, kept in writes.items()}
    result = sweep(other, [ids], (1,), (0.5,), site, indices=entries(other, site, 1))
    for block in (2, 3):
        carried = (changed - clean)[block, 1:].flatten()
        whole = (changed - clean)[block + 1, 1:].flatten() - carried
        parts = {part: (run - before)[block, 1:].flatten() for part, (before, run) in of_runs.items()}
        for name, write in {"": whole, **{f"{part}_": of for part, of in parts.items()}}.items():
            at = (0, 0, block + 1, 0)
            norm, alignment = (
                result.measure(measure_named(f"{name}{of}"), "rest")[at] for of in ("written", "alignment")
            )
            torch.testing.assert_close(norm, write.norm(), rtol=1e-9, atol=1e-9)
            cosine = torch.nn.functional.cosine_similarity(carried, write, dim=0)
            torch.testing.assert_close(alignment, cosine, rtol=1e-7, atol=1e-7)


def measure_named(name: str) -> Measure:
    return next(of for of in MEASURES if of == name)


@pytest.mark.parametrize("site", SITES)
def test_sensitivities_are_difference_quotients(other: GPT2, site: str) -> None:
    found = sensitivity(other, TEXTS, [site])
    result = sweep(other, TEXTS, None, (math.exp(STEP), math.exp(-STEP)), site, predictions=True)
    for name in SENSITIVITIES:
        if name in ("gauge_free", "kl", "correlation") and site == "output":
            continue  # flat there: what is left is rounding over the step
        up, down = result.measure(name, "rest").unbind(1)
        torch.testing.assert_close(
            found.measure(name, "rest"), central(name, up, down), equal_nan=True, rtol=TOLERANCE, atol=1e-5
        )


@pytest.mark.parametrize("site", SITES)
def test_interventions_and_sensitivities_under_the_plain_equations_are_not(other: GPT2, site: str) -> None:
    def both() -> list[Tensor]:
        edit = {parameter_name(other, 1, site): value_at(other, site, 0.5)}
        return [
            of.measure("frobenius", "rest") for of in (compare(other, TEXTS, [edit]), sensitivity(other, TEXTS, [site]))
        ]

    found = both()
    with plain_equations():
        for one, twin in zip(found, both(), strict=True):
            assert not torch.allclose(twin, one, rtol=1e-3)


def test_an_edit_of_the_blocks_own_forward_is_followed_as_a_subclass_is(model: GPT2) -> None:
    parallel = draw(GPT2Config(**SMALL), block=Parallel)
    expected = [sweep(parallel, TEXTS, None, FACTORS, site).frobenius() for site in SITES]
    derived = sensitivity(parallel, TEXTS, SITES).measure("frobenius", "rest")
    plain = [sweep(model, TEXTS, None, FACTORS, site).frobenius() for site in SITES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", Parallel.forward)
        found = [sweep(model, TEXTS, None, FACTORS, site).frobenius() for site in SITES]
        assert torch.equal(sensitivity(model, TEXTS, SITES).measure("frobenius", "rest"), derived)
    for one, other, unedited in zip(found, expected, plain, strict=True):
        assert torch.equal(one, other)
        assert not torch.allclose(one, unedited, rtol=1e-3)


def test_attention_patterns_are_of_what_attention_reads(other: GPT2) -> None:
    ids = torch.tensor(TEXTS[:1])
    read = list[Tensor]()
    for block in other.blocks:
        block.attention.register_forward_pre_hook(lambda _module, given: read.append(given[0]))
    patterns = other.attention_patterns(ids)
    for layer, block in enumerate(other.blocks):
        attention = block.attention
        q, k, v = attention.heads(read[layer])
        torch.testing.assert_close(patterns[layer] @ v, attention.mix(read[layer]).transpose(1, 2), **SAME)
        assert q.shape == k.shape


def test_attention_patterns_follow_a_mixture_of_ones_own(small: Callable[..., GPT2]) -> None:
    class Sharp(Attention):
        """Scores three times as large, mixed without the fused kernel."""

        def mix(self, x: Tensor, cache: object = None) -> Tensor:
            q, k, v = self.heads(x)
            scores = 3 * self.score_scale * q @ k.transpose(2, 3)
            future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
            return (scores.masked_fill(future, -math.inf).softmax(3) @ v).transpose(1, 2)

    class Sharpened(Block):
        attention_class = Sharp

    ids, plain, model = torch.tensor(TEXTS[:1]), small(), small(block=Sharpened)
    patterns = model.attention_patterns(ids)
    torch.testing.assert_close(patterns.sum(-1), torch.ones_like(patterns[..., 0]), **SAME)
    cubed = plain.attention_patterns(ids)[0] ** 3  # three times the scores is the weights' third power, normed
    torch.testing.assert_close(patterns[0], cubed / cubed.sum(-1, keepdim=True), **SAME)
    assert not torch.allclose(patterns[0], plain.attention_patterns(ids)[0], rtol=1e-2)


def test_an_attention_that_mixes_other_values_than_its_heads_has_no_pattern(small: Callable[..., GPT2]) -> None:
    class Odd(Attention):
        """Mixes what it reads, whatever its heads say."""

        def mix(self, x: Tensor, cache: object = None) -> Tensor:
            return x.unflatten(2, (self.n_head, -1))

    class OddBlock(Block):
        attention_class = Odd

    with pytest.raises(ValueError, match=r"Odd.mix does not ask `heads` for its values; override `pattern` too"):
        small(block=OddBlock).attention_patterns(torch.tensor(TEXTS[:1]))


def test_a_block_with_dropout_is_refused_in_training_mode(small: Callable[..., GPT2]) -> None:
    class Dropping(Block):
        """With dropout behind its attention."""

        def __init__(self, config: GPT2Config, layer: int) -> None:
            super().__init__(config, layer)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, cache: object = None) -> Tensor:
            return super().forward(self.drop(x))

    model = small(block=Dropping)
    with pytest.raises(ValueError, match=r"call model\.eval"):
        sweep(model.train(), TEXTS, (1,), (0.5,))
    assert not self_check(model.eval(), sweep(model, TEXTS, (1,), (0.5,))).broken


def test_sublayers_that_read_only_clean_rows_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "check_a_run_alone", lambda *_: None)
    monkeypatch.setattr(passes, "check_used", lambda _: None)
    rows = {"attention": 0, "mlp": 0}

    class Counted(Block):
        """Counts the rows that go through what it is made of."""

        def __init__(self, config: GPT2Config, layer: int) -> None:
            super().__init__(config, layer)
            for part in rows:
                module = getattr(self, part)
                module.activation = partial(self.count, part, getattr(module, "activation", None))
                if part == "attention":
                    module.mix = partial(self.counted_mix, module.mix)

        def counted_mix(self, mix: Callable[..., Tensor], x: Tensor, _cache: object = None) -> Tensor:
            return self.count("attention", mix, x)

        @staticmethod
        def count(part: str, function: Callable[..., Tensor], x: Tensor) -> Tensor:
            rows[part] += len(x)
            return function(x)

    model = small_of(Counted)
    # one clean row in four blocks, and two runs in the two after the scaled one; in that one only where they differ
    for site, (attention, mlp) in {"output": (8, 8), "mlp": (8, 8), "attention": (8, 10), "head": (10, 10)}.items():
        rows.update(attention=0, mlp=0)
        sweep(model, TEXTS[:1], (1,), (0.5, 1.5), site, indices=entries(model, site, 1))
        assert rows == {"attention": attention, "mlp": mlp}, site


def small_of(block: type[Block]) -> GPT2:
    return draw(GPT2Config(**SMALL), block=block)


def test_a_model_continues_a_text_with_and_without_a_cache_under_a_scale(other: GPT2) -> None:
    with scaled(other, {"blocks.1.mlp_scale": 0.5}):
        texts = [list(generate(other, TEXTS[0], 8, cached=cached)) for cached in (True, False)]
    assert texts[0] == texts[1]


def test_a_sublayer_by_another_name_leaves_only_the_blocks_own_write(small: Callable[..., GPT2]) -> None:
    class Renamed(Block):
        """Its MLP is called otherwise: what it writes cannot be told from the rest."""

        def __init__(self, config: GPT2Config, layer: int) -> None:
            super().__init__(config, layer)
            self.feed = self.mlp
            del self.mlp

        def forward(self, x: Tensor, cache: object = None) -> Tensor:
            u = x + self.attention_scale * self.attention(self.attention_norm(x))
            return self.output_scale * (u + self.mlp_scale * self.feed(self.mlp_norm(u)))

    renamed, plain = draw(GPT2Config(**SMALL), block=Renamed), small()
    found, expected = (sweep(model, TEXTS, (1,), (0.5,)) for model in (renamed, plain))
    for name in ("frobenius", "written", "alignment"):
        shape = found.measure(measure_named(name), "rest").shape
        assert shape == expected.measure(measure_named(name), "rest").shape
        assert found.measure(measure_named(name), "rest")[0, 0, 3:-1].isfinite().all()
    assert found.measure("mlp_written", "rest")[0, 0, 3:].isnan().all()
    assert found.measure("attention_written", "rest")[0, 0, 3:].isnan().all()
    assert found.measure("mlp_alignment", "rest")[0, 0, 3:].isnan().all()


def test_a_block_that_counts_its_rows_is_computed_rightly() -> None:
    class Counting(Block):
        """Takes as many rows of what its attention left as x has."""

        def forward(self, x: Tensor, cache: object = None) -> Tensor:
            u = x + self.attention_scale * self.attention(self.attention_norm(x))
            return self.output_scale * (u + self.mlp_scale * self.mlp(self.mlp_norm(u)[: len(x)]))

    model = draw(GPT2Config(**SMALL), block=Counting)
    for site in SITES:
        result = sweep(model, TEXTS, (1, 2), (0.5, 1.5, 0.50001), site, indices=entries(model, site, 1))
        assert not self_check(model, result).broken
        for factor in result.factors:
            values = {parameter_name(model, 1, site): value_at(model, site, factor)}
            clean, changed = alone(model, TEXTS[0], values)
            expected = (changed - clean).square().sum(-1)
            found = result.statistics.difference_sq[0, result.factors.index(factor), :, 0]
            torch.testing.assert_close(found, expected, **SAME)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("first", [1.0, 100.0])
def test_writes_that_do_not_add_up_to_the_blocks_own_are_not_reported(dtype: torch.dtype, first: float) -> None:
    class Normed(Block):
        """A norm stands behind its attention: what that returns is not what is written."""

        def forward(self, x: Tensor, cache: object = None) -> Tensor:
            u = x + self.attention_scale * self.attention_norm(self.attention(x))
            return self.output_scale * (u + self.mlp_scale * self.mlp(self.mlp_norm(u)))

    model = draw(GPT2Config(**SMALL), block=Normed)
    with torch.no_grad():
        model.position_embedding.weight[0] *= first  # a first token that is much longer than the others
    result = sweep(model.to(dtype), TEXTS, (1,), (0.5,))
    assert result.measure("written", "rest")[0, 0, 3:-1].isfinite().all()
    for name in ("attention_written", "mlp_written", "attention_alignment"):
        assert result.measure(measure_named(name), "rest")[0, 0, 3:].isnan().all()


@pytest.mark.parametrize(("roundings", "add_up"), [(0.0, True), (3.0, True), (5.0, False)])
def test_sublayers_add_up_within_four_roundings(roundings: float, add_up: bool) -> None:
    drawn = torch.randn(4, 1, 2, 3, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, attention, mlp, away = drawn
    size = sum(squared_norms(of) for of in (x, x + attention + mlp, attention, mlp)).sqrt()[..., None]
    off = roundings * torch.finfo(torch.float64).eps * size * away / away.norm(dim=-1, keepdim=True)
    found = Clean.of(x, x + attention + mlp + off, {"attention": attention, "mlp": mlp})
    assert (found.writes.keys() == {"attention", "mlp"}) == add_up


def test_nothing_adds_up_to_nothing() -> None:
    nothing = torch.zeros(1, 2, 3, 36)
    assert Clean.of(nothing, nothing, {"attention": nothing}).writes.keys() == {"attention"}


class Twice(Block):
    """Attends to every row two times over, and takes the first half: more rows than the slab has."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        read = self.attention_norm(x)
        attended = self.attention(torch.cat([read, read]))[: len(x)]
        u = x + self.attention_scale * attended
        return self.output_scale * (u + self.mlp_scale * self.mlp(self.mlp_norm(u)))


def test_a_sublayer_that_reads_more_rows_than_there_are_is_computed_rightly() -> None:
    model = small_of(Twice)
    runs: list[dict[str, float | Tensor]] = [{"blocks.1.mlp_scale": 0.5}, {"blocks.1.output_scale": 2.0}]
    found = compare(model, TEXTS[:1], runs).statistics.difference_sq
    for number, run in enumerate(runs):
        clean, changed = alone(model, TEXTS[0], run)
        torch.testing.assert_close(found[number, :-1, 0], (changed - clean)[:-1].square().sum(-1), **SAME)


class Placed(Attention):
    """Asks for the position of what it reads."""

    def heads(self, x: Tensor, start: int = 0) -> list[Tensor]:
        STARTS.append(start)
        return super().heads(x, start)


STARTS = list[int]()


def test_positions_are_counted_from_0_and_go_on_behind_a_cache() -> None:
    model = small_of(type("Own", (Block,), {"attention_class": Placed}))
    STARTS.clear()
    model(torch.tensor(TEXTS[:1]))
    assert STARTS == [0] * 4
    STARTS.clear()
    list(generate(model, [1, 2, 3], 3))
    assert STARTS == [0] * 4 + [3] * 4 + [4] * 4
    assert Attention.heads.__defaults__ == (0,), "for those who call it without"
