"""Blocks that no pass can follow: each is refused in a sentence, and what would go wrong without a word is shown."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt import GPT2, Block, GPT2Config, Tokenizer, compare, engine, generate, passes, scaled, sensitivity, sweep
from minigpt.engine import Job
from minigpt.model import MLP, Attention
from minigpt.parameters import Native
from tests.blocks import BLOCKS, Neurons
from tests.conftest import SMALL, TINY, draw

TEXTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6]]
LONG = [[number * 7 % 90 for number in range(24)]]
HALVED = [{"blocks.1.output_scale": 0.5}]


def model_of(block: type[Block], **fields: Any) -> GPT2:
    return draw(GPT2Config(**{**SMALL, **fields}), block=block).eval()


class LooksAhead(Attention):
    """Without a mask: padding is visible."""

    def mix(self, x: Tensor, _cache: object = None) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x), scale=self.score_scale).transpose(1, 2)


class Ahead(Block):
    attention_class = LooksAhead


class Remembers(Block):
    """Adds to every stream how often it was called."""

    calls = 0

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        type(self).calls += 1
        return super().forward(x) + 0.01 * type(self).calls


class AtRandom(Block):
    """Drops out by a function, which no module shows."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return super().forward(F.dropout(x, 0.3))


class OfAllRows(Block):
    """Divides by the largest value of all rows."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return super().forward(x) / x.abs().max()


class GatedElsewhere(MLP):
    """Multiplies by a parameter of the block that it is in."""

    owner: list[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.owner[0].gate_scale


class Owner(Block):
    native = (*Block.native, Native("gate_scale"))
    mlp_class = GatedElsewhere

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.mlp.owner = [self]


IMPURE: list[tuple[type[Block], list[list[int]], list[dict[str, float]]]] = [
    (Ahead, TEXTS, HALVED),
    (Remembers, TEXTS, HALVED),
    (AtRandom, TEXTS, HALVED),
    (OfAllRows, TEXTS, [{"blocks.1.output_scale": 7.0}, {"blocks.0.mlp_scale": 0.5}]),
    (Owner, LONG, [{"blocks.2.gate_scale": 0.0}]),
]


@pytest.mark.parametrize(("block", "texts", "runs"), IMPURE, ids=lambda of: getattr(of, "__name__", ""))
def test_a_block_whose_rows_depend_on_more_than_themselves_is_refused(
    block: type[Block], texts: list[list[int]], runs: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CPU_SLAB", 24)  # a row a slab, as with long texts
    with pytest.raises(ValueError, match=rf"in a run of its own, .* So {block.__name__} does not treat every row by"):
        compare(model_of(block), texts, runs)


def test_the_sentence_has_both_numbers_the_run_the_text_and_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Ahead)
    with torch.no_grad():
        ids = torch.tensor(TEXTS[1:])
        clean = model.residuals(ids)
        with scaled(model, HALVED[0]):
            alone = float((model.residuals(ids) - clean)[2].norm())
    with pytest.raises(
        ValueError, match=f"Under intervention 0, text 1 changes depth 2 by {alone:.6g} in a run"
    ) as error:
        compare(model, TEXTS, HALVED)
    monkeypatch.setattr(passes, "check_a_run_alone", lambda *_: None)
    wrong = float(compare(model, TEXTS, HALVED).measure("frobenius", "all")[0, 2, 1])
    assert f"by {wrong:.6g} beside others" in str(error.value)
    assert abs(wrong / alone - 1) > 0.01, "without the check it would be wrong without a word"


def test_a_block_that_looks_ahead_is_right_of_texts_of_one_length() -> None:
    model, ids = model_of(Ahead), torch.tensor([TEXTS[0][:4], TEXTS[1]])
    found = compare(model, ids, HALVED).statistics.difference_sq[0]
    with torch.no_grad(), scaled(model, HALVED[0]):
        changed = model.residuals(ids)
    torch.testing.assert_close(found[:-1], (changed - model.residuals(ids)).square().sum(-1))


@pytest.mark.parametrize("block", [*BLOCKS, Neurons])
def test_blocks_that_treat_every_row_by_itself_are_let_through(block: type[Block]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = draw(GPT2Config(**SMALL), dtype=dtype, block=block)
        compare(model, TEXTS, [*HALVED, {"blocks.0.attention_scale": 1.01}, {"blocks.3.mlp_scale": -3.0}])
        sweep(model, TEXTS, (0, 2), (0.99, 2.0), "attention", positions=(1, 2))
    sensitivity(model_of(block), TEXTS)


@pytest.mark.parametrize("off", [0.5, 2.0])
def test_a_pass_may_differ_by_the_bound_and_no_more(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = passes.Gathered.statistics

    def stretched(self: passes.Gathered) -> Any:
        found = plain(self)
        found.difference_sq[0, 3, 1] *= (1 + off * 1e-3) ** 2
        return found

    monkeypatch.setattr(passes.Gathered, "statistics", stretched)
    model = model_of(Neurons)
    if off < 1:
        compare(model, TEXTS, HALVED)
    else:
        with pytest.raises(ValueError, match="changes depth 3"):
            compare(model, TEXTS, HALVED)


def test_the_run_that_is_tried_has_its_own_values_of_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shortest text, at its positions; another's values would not fit."""
    values = torch.rand(2, 7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    compare(model_of(Neurons), TEXTS, [{"blocks.2.output_scale": values}])
    monkeypatch.setattr("minigpt.alone._of_text", lambda value, _native, text, length: value[1 - text, :length][None])
    with pytest.raises(ValueError, match="changes depth 3"):
        compare(model_of(Neurons), TEXTS, [{"blocks.2.output_scale": values}])


def test_parts_of_this_library_are_not_tried(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[Job]()
    monkeypatch.setattr(passes, "check_a_run_alone", lambda job, _: tried.append(job))
    compare(model, TEXTS, HALVED)
    assert tried == []
    compare(model_of(Neurons), TEXTS, HALVED)
    assert len(tried) == 1


# What changes in place.


class OnTheSpot(Block):
    """Adds to the stream that it was given."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        x += self.attention_scale * self.attention(self.attention_norm(x))
        return self.output_scale * x


class InPlaceMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class WithInPlace(Block):
    """Its MLP changes what its attention still reads."""

    mlp_class = InPlaceMLP

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        read = self.attention_norm(x)
        mlp = self.mlp(read)
        return self.output_scale * (x + self.mlp_scale * mlp + self.attention_scale * self.attention(read))


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.residuals(torch.tensor(TEXTS[1:])),
        lambda model: compare(model, TEXTS, HALVED),
        lambda model: sensitivity(model, TEXTS),
    ],
)
def test_a_block_that_changes_its_stream_in_place_is_refused(ask: Callable[[GPT2], object]) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"OnTheSpot changes its input in place.* x = x \+"):
        ask(model_of(OnTheSpot))


def test_a_sublayer_that_changes_its_input_in_place_is_refused() -> None:
    with pytest.raises(ValueError, match="InPlaceMLP changes its input in place"):
        compare(model_of(WithInPlace), TEXTS, HALVED)


def test_a_model_runs_in_inference_mode_too(model: GPT2) -> None:
    with torch.inference_mode():
        assert model.residuals(torch.tensor(TEXTS[1:])).shape == (5, 1, 4, 36)
        compare(model, TEXTS, HALVED)
        with pytest.raises(ValueError, match="no derivatives in inference mode"):
            sensitivity(model, TEXTS)


# What a model is made of.


def test_a_module_in_two_blocks_is_refused() -> None:
    model = model_of(Block)
    model.blocks[2].attention = model.blocks[0].attention
    with pytest.raises(ValueError, match="Blocks 0 and 2 share one Attention"):
        compare(model, TEXTS, HALVED)
    model = model_of(Block)
    model.blocks[3] = model.blocks[1]  # type: ignore[index]
    with pytest.raises(ValueError, match="Blocks 1 and 3 share one Block"):
        sweep(model, TEXTS, (0,))


def test_weights_may_be_shared(small: Callable[..., GPT2]) -> None:
    model = small()
    model.blocks[2].mlp.expand.weight = model.blocks[0].mlp.expand.weight
    compare(model, TEXTS, HALVED)


@pytest.mark.parametrize("name", ["forward", "depths", "last_depth"])
def test_a_model_with_equations_of_its_own_is_refused(name: str) -> None:
    kind = type("Capped", (GPT2,), {name: lambda self, *given: getattr(super(kind, self), name)(*given)})
    with pytest.raises(ValueError, match=f"Capped has a {name} of its own"):
        sweep(kind(GPT2Config(**SMALL)).eval(), TEXTS, (0,))


class Wide(Block):
    """Its stream is of another type than its weights."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return super().forward(x).double()


def test_a_stream_of_another_type_than_the_weights_is_refused() -> None:
    model = draw(GPT2Config(**SMALL), dtype=torch.float32, block=Wide)
    with pytest.raises(ValueError, match=r"Wide returned torch\.float64; expected torch\.float32"):
        compare(model, TEXTS, HALVED)


@pytest.mark.parametrize(
    ("returned", "said"),
    [(lambda x: (x, None), "tuple"), (lambda _: None, "NoneType"), (lambda x: x[:, :2], r"\[1, 2, 36\]")],
)
def test_what_is_no_stream_is_refused(returned: Callable[[Tensor], Any], said: str) -> None:
    class Odd(Block):
        def forward(self, x: Tensor, cache: object = None) -> Tensor:
            return returned(x)

    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"Odd returned {said}; expected a stream like .*\[1, 4, 36\]"),
    ):
        model_of(Odd)(torch.tensor(TEXTS[1:]))


class TwoGates(Block):
    """The same name in two modules."""

    mlp_class = type("A", (MLP,), {"native": (Native("gate_scale"),)})
    native = (*Block.native, Native("gate_scale"))


def test_a_site_that_two_modules_have_is_refused_by_its_names() -> None:
    names = "blocks.0.gate_scale, blocks.0.mlp.gate_scale"
    with pytest.raises(ValueError, match=f"site is 'gate', which several modules have: {names}"):
        sweep(model_of(TwoGates), TEXTS, (0,), site="gate")


@pytest.mark.parametrize("index", ["layer", "factor", "value", "low", "text"])
def test_an_index_may_not_be_called_as_another_column_is(index: str) -> None:
    with pytest.raises(ValueError, match=f"with the index '{index}', which tables use otherwise"):
        Native("gate_scale", ("batch", "position", "n_head"), index=index)


# What blocks write.


class Clamped(Block):
    """Within bounds that the clean stream keeps to."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return super().forward(x).clamp(-self.most, self.most)

    most = 1e9


def test_a_block_that_writes_otherwise_than_its_sublayers_off_the_clean_run_alone_has_no_parts() -> None:
    model = model_of(Clamped)
    with torch.no_grad():
        Clamped.most = float(model.residuals(torch.tensor(LONG)).abs().max()) + 1e-3
        found = compare(model, LONG, [{"blocks.0.output_scale": 5.0}, {"blocks.0.output_scale": 0.99}])
        ids = torch.tensor(LONG)
        clean = model.residuals(ids)
        with scaled(model, {"blocks.0.output_scale": 5.0}):
            changed = model.residuals(ids)
    difference = changed - clean
    for depth in range(2, 5):
        expected = float((difference[depth] - difference[depth - 1]).norm())
        assert float(found.measure("written", "all")[0, depth, 0]) == pytest.approx(expected, rel=1e-10)
    assert found.measure("attention_written", "all")[0, 2:5].isnan().all()
    assert found.measure("attention_written", "all")[1, 2:5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_of_the_same_equations_has_parts_in_half_types_too(dtype: torch.dtype) -> None:
    model = draw(GPT2Config(**SMALL), dtype=dtype, block=type("Same", (Block,), {}))
    found = compare(model, LONG, [{"blocks.0.output_scale": 0.5}])
    for part in ("attention_written", "mlp_written"):
        assert found.measure(part, "all")[0, 2:5].isfinite().all()


class ScalesWhatIsRead(Block):
    """The scale of attention acts on what attention reads."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        u = x + self.attention(self.attention_scale * self.attention_norm(x))
        return self.output_scale * (u + self.mlp_scale * self.mlp(self.mlp_norm(u)))


def test_a_scale_that_does_not_multiply_what_a_sublayer_returns_is_not_taken_to() -> None:
    model, run = model_of(ScalesWhatIsRead), {"blocks.0.output_scale": 0.5, "blocks.2.attention_scale": 0.3}
    found, ids = compare(model, LONG, [run]), torch.tensor(LONG)
    with torch.no_grad():
        clean = model.residuals(ids)
        with scaled(model, run):
            difference = model.residuals(ids) - clean
    for depth in (2, 3, 4):
        expected = float((difference[depth] - difference[depth - 1]).norm())
        assert float(found.measure("written", "all")[0, depth, 0]) == pytest.approx(expected, rel=1e-10)
    parts = found.measure("attention_written", "all")[0, :, 0]
    assert parts[3].isnan()
    assert parts[[2, 4]].isfinite().all()


class OnlyAttention(Block):
    """One sublayer: what the block writes is what that one writes, of a run that names the block as well."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return self.output_scale * (x + self.attention_scale * self.attention(self.attention_norm(x)))


def test_what_an_only_sublayer_writes_is_not_taken_for_what_its_block_does() -> None:
    model, run = model_of(OnlyAttention), {"blocks.0.output_scale": 0.5, "blocks.1.output_scale": 3.0}
    found, ids = compare(model, LONG, [run]), torch.tensor(LONG)
    reads = list[Tensor]()
    model.blocks[1].attention.register_forward_hook(lambda _module, _given, out: reads.append(out))
    with torch.no_grad():
        model.residuals(ids)
        with scaled(model, run):
            model.residuals(ids)
    expected = float((reads[1] - reads[0]).norm())
    assert float(found.measure("attention_written", "all")[0, 2, 0]) == pytest.approx(expected, rel=1e-10)


class Turned(Attention):
    """Returns as many numbers as the stream has, in another order in memory."""

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return super().forward(x).transpose(1, 2).contiguous()


class TurnedBack(Block):
    attention_class = Turned

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        u = x + self.attention_scale * self.attention(self.attention_norm(x)).transpose(1, 2)
        return self.output_scale * (u + self.mlp_scale * self.mlp(self.mlp_norm(u)))


def test_a_sublayer_that_returns_another_shape_is_followed_but_has_no_write() -> None:
    model, ids = model_of(TurnedBack), torch.tensor(LONG)
    found = compare(model, LONG, HALVED)
    with torch.no_grad():
        clean = model.residuals(ids)
        with scaled(model, HALVED[0]):
            expected = (model.residuals(ids) - clean).square().sum(-1)
    torch.testing.assert_close(found.statistics.difference_sq[0, :-1], expected)
    assert found.measure("attention_written", "all")[0, 3:5].isnan().all()


class Fused(Attention):
    """Calls the fused kernel itself."""

    def mix(self, x: Tensor, _cache: object = None) -> Tensor:
        q, k, v = self.heads(x)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.score_scale).transpose(1, 2)


def test_derivatives_go_through_a_mixture_of_ones_own(model: GPT2) -> None:
    fused = model_of(type("Own", (Block,), {"attention_class": Fused}))
    fused.load_state_dict(model.state_dict())
    for name in ("frobenius", "kl"):
        expected = sensitivity(model, TEXTS).measure(name, "rest")
        torch.testing.assert_close(sensitivity(fused, TEXTS).measure(name, "rest"), expected, equal_nan=True)


# Mistakes.


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda model: sweep(model, [[1.5, 2.7, 3]]), "not lists of token ids"),
        (lambda model: sweep(model, [[True, False, True]]), "not lists of token ids"),
        (lambda model: sweep(model, None), "not lists of token ids"),
        (lambda model: sweep(model, TEXTS, layers=2), r"layers are 2; expected several, such as \[2\]"),
        (
            lambda model: sweep(model, TEXTS, factors=0.5),
            r"factors are 0\.5; expected several numbers, such as \[0\.5\]",
        ),
        (lambda model: sweep(model, TEXTS, positions=0), "positions are 0; expected several"),
        (
            lambda model: compare(model, TEXTS, HALVED[0]),
            r"not a list of dicts; for a single one give \[intervention\]",
        ),
        (lambda model: compare(model, TEXTS, [[("blocks.1.output_scale", 0.5)]]), "not a list of dicts"),
        (lambda model: compare(model, TEXTS, [{"blocks.1.output_scale": 1j}]), "expected real numbers"),
        (lambda model: compare(model, TEXTS, [{"blocks.1.output_scale": 10**400}]), "expected a number"),
        (
            lambda model: sweep(model, TEXTS, factors="0.5:1.5"),
            r"'0\.5:1\.5'; expected several numbers, such as \[0\.5, 2",
        ),
        (
            lambda model: sweep(model, TEXTS, positions=(1, 40)),
            "positions are 1, 40; expected different numbers from 0",
        ),
        (lambda model: sweep(model, "The old man"), r"ids = tokenizer\.encode\(text\)"),
        (
            lambda model: next(generate(model, torch.tensor(TEXTS[:1]), 2)),
            "prompt is a Tensor; expected a list of token",
        ),
        (lambda model: next(generate(model, "The old", 2)), "prompt is a str; expected a list of token ids"),
        (
            lambda model: GPT2(model.config, block="Parallel"),
            "block is 'Parallel'; expected a subclass of minigpt.Block",
        ),
        (
            lambda _: GPT2.from_pretrained(TINY, block=Block(GPT2Config(**SMALL), 0)),
            r"expected a subclass of minigpt\.Block, the class",
        ),
        (lambda _: Tokenizer.from_pretrained(TINY).encode(["a"]), "text is a list; expected a string"),
        (
            lambda _: Tokenizer.from_pretrained(TINY).decode(torch.tensor([1])),
            "ids are a Tensor; expected a list of numb",
        ),
    ],
)
def test_a_mistake_is_a_sentence(model: GPT2, ask: Callable[[GPT2], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ask(model)


def test_a_result_says_in_a_line_what_it_is(model: GPT2) -> None:
    said = {
        repr(sweep(model, TEXTS, (0, 2), (0.5, 1.0, 2.0))),
        repr(compare(model, TEXTS, HALVED)),
        repr(sensitivity(model, TEXTS)),
    }
    assert all(len(line) < 400 and "\n" not in line and "frobenius" in line for line in said)
    assert any("<Sweep: 2 x 3 runs beside the clean one, 6 places, " in line for line in said)


def test_a_single_site_may_be_named_without_a_list(model: GPT2) -> None:
    assert sensitivity(model, TEXTS, "mlp").scales == sensitivity(model, TEXTS, ["mlp"]).scales


class Repeats(Attention):
    """Its values are [batch, position]: they have none of the text's positions."""

    native = (Native("tail_scale", ("batch", "n_head"), index="head"),)

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return self.projection((self.tail_scale[..., None, :, None] * self.mix(x)).flatten(2))


def test_positions_at_a_site_without_them_are_refused() -> None:
    model = model_of(type("Own", (Block,), {"attention_class": Repeats}))
    with pytest.raises(ValueError, match="positions were given with the site 'tail', whose values have none"):
        sweep(model, TEXTS, (0,), (0.5,), "tail", positions=(1,))


def test_a_sweep_is_not_saved_in_the_place_of_a_folder(model: GPT2, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="is a folder; expected the name of a file in it"):
        sweep(model, TEXTS, (0,), (0.5,)).save(tmp_path)
