"""The linear map against `nn.Linear`: the same values, and the same behaviour wherever derivatives are asked for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from minigpt import linear
from minigpt.linear import Linear

# Two ways of adding up 24 products of numbers near 1, float32.
SAME = {"rtol": 1e-5, "atol": 1e-5}
needs_onednn = pytest.mark.skipif(linear._onednn is None, reason="this PyTorch has no oneDNN")


@pytest.fixture
def pair() -> tuple[Linear, nn.Linear]:
    """Our linear map and PyTorch's, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = Linear(24, 10), nn.Linear(24, 10)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that oneDNN's product is given."""
    seen: list[Tensor] = []
    real = linear._onednn

    def watched(x: Tensor, *rest: object) -> Tensor:
        seen.append(x)
        return real(x, *rest)

    monkeypatch.setattr(linear, "_onednn", watched)
    return seen


@needs_onednn
@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("transposed", [False, True])
def test_onednn_gives_the_values_of_nn_linear(
    pair: tuple[Linear, nn.Linear], calls: list[Tensor], shape: tuple[int, ...], transposed: bool
) -> None:
    ours, theirs = pair
    if transposed:  # as a checkpoint's [in, out] weights are loaded
        ours.weight = nn.Parameter(ours.weight.detach().T.contiguous().T)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), **SAME)
        torch.testing.assert_close(ours(x), nn.functional.linear(x, ours.weight, ours.bias), **SAME)
    assert len(calls) == 2


@needs_onednn
def test_a_map_without_a_bias_and_a_strided_input_work_too(calls: list[Tensor]) -> None:
    ours, x = Linear(24, 10, bias=False), torch.randn(4, 48)[:, ::2]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), x @ ours.weight.T, **SAME)
    assert calls


@needs_onednn
def test_pytorchs_own_switch_turns_onednn_off(
    pair: tuple[Linear, nn.Linear], calls: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    x = torch.randn(7, 24)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_nn_linears(pair: tuple[Linear, nn.Linear], calls: list[Tensor], dtype: torch.dtype) -> None:
    ours, theirs = (module.to(dtype) for module in pair)
    x = torch.randn(7, 24).to(dtype)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert not calls


def test_under_autocast_it_is_nn_linears_product(pair: tuple[Linear, nn.Linear], calls: list[Tensor]) -> None:
    ours, theirs = pair
    x = torch.randn(7, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), theirs(x))
    assert not calls


def test_gradients_reach_weights_and_inputs(pair: tuple[Linear, nn.Linear], calls: list[Tensor]) -> None:
    ours, theirs = pair
    x, y = (torch.ones(3, 24, requires_grad=True) for _ in range(2))
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(ours.bias.grad, theirs.bias.grad)
    assert not calls


@pytest.mark.parametrize("dual", ["input", "weight", "bias"])
def test_tangents_survive_where_gradients_are_off(pair: tuple[Linear, nn.Linear], dual: str) -> None:
    ours, _ = pair
    x = torch.randn(3, 24)
    parts = {"weight": ours.weight.detach(), "bias": ours.bias.detach(), "input": x}
    by_hand = {"input": ours.weight.sum(1).expand(3, -1), "weight": x.sum(1, keepdim=True).expand(-1, 10)}
    with torch.no_grad(), forward_ad.dual_level():
        parts[dual] = forward_ad.make_dual(parts[dual], torch.ones_like(parts[dual]))
        weights = {"weight": parts["weight"], "bias": parts["bias"]}
        out = forward_ad.unpack_dual(torch.func.functional_call(ours, weights, parts["input"])).tangent
    torch.testing.assert_close(out, by_hand.get(dual, torch.ones(3, 10)), **SAME)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda module, x: torch.vmap(module)(x),
    "jvp": lambda module, x: torch.func.jvp(module, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda module, x: torch.func.jacrev(module)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_work_where_gradients_are_off(pair: tuple[Linear, nn.Linear], transform: str) -> None:
    ours, theirs = pair
    x = torch.randn(3, 24)
    with torch.no_grad():
        expected = TRANSFORMS[transform](theirs, x)
        torch.testing.assert_close(TRANSFORMS[transform](ours, x), expected, **SAME)
