"""Next-token distributions, beside PyTorch's own formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt import GPT2, predictions, scaled, sweep
from minigpt.predictions import Predictions, fit_temperature, predict

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def logits_of(model: GPT2, ids: torch.Tensor, scales: dict[str, float] | None = None) -> torch.Tensor:
    """Logits [batch, position, vocab] of a run of its own."""
    with torch.no_grad(), scaled(model, scales or {}):
        return model(ids)


@pytest.fixture
def found(model: GPT2, ids: torch.Tensor) -> tuple[Predictions, torch.Tensor, torch.Tensor]:
    """Predictions of one cell of a sweep, and the logits, clean and scaled, of runs of their own."""
    statistics = sweep(model, ids, (1, 2), (0.3, 1.0), predictions=True).statistics
    assert statistics.predictions is not None
    cell = statistics.predictions.map(lambda tensor: tensor[1, 0])
    return cell, logits_of(model, ids), logits_of(model, ids, {"blocks.2.output_scale": 0.3})


def test_every_number_is_its_definition(
    found: tuple[Predictions, torch.Tensor, torch.Tensor], ids: torch.Tensor
) -> None:
    cell, clean, changed = found
    p, q = clean.log_softmax(-1), changed.log_softmax(-1)
    torch.testing.assert_close(cell.kl, F.kl_div(q, p, log_target=True, reduction="none").sum(-1), **TIGHT)
    losses = F.cross_entropy(changed[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(cell.loss[:, :-1], losses, **TIGHT)
    assert not cell.loss[:, -1].any()
    torch.testing.assert_close(cell.entropy, torch.distributions.Categorical(logits=changed).entropy(), **TIGHT)
    pairs = torch.stack([clean, changed], 2).flatten(0, 1)
    torch.testing.assert_close(cell.correlation.flatten(), torch.stack([x.corrcoef()[0, 1] for x in pairs]), **TIGHT)
    torch.testing.assert_close(cell.clean_logit, (q.exp() * clean).sum(-1), **TIGHT)
    assert torch.equal(cell.likeliest, changed.argmax(-1))
    order = changed[:, :-1].argsort(-1, descending=True)
    assert torch.equal(cell.rank[:, :-1], 1 + (order == ids[:, 1:, None]).int().argmax(-1))
    assert not cell.rank[:, -1].any()
    likely = changed[:, -1].softmax(-1).topk(10)
    assert torch.equal(cell.top, likely.indices)
    torch.testing.assert_close(cell.top_probability, likely.values, **TIGHT)


def test_kl_the_other_way_round_is_another_number(found: tuple[Predictions, torch.Tensor, torch.Tensor]) -> None:
    cell, clean, changed = found
    other = F.kl_div(clean.log_softmax(-1), changed.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert not torch.allclose(cell.kl, other, rtol=1e-3)


def test_factor_1_is_the_clean_run(model: GPT2, ids: torch.Tensor) -> None:
    statistics = sweep(model, ids, (1,), (0.5, 1.0), predictions=True).statistics
    assert statistics.predictions is not None
    assert statistics.clean_predictions is not None
    for name, tensor in statistics.predictions.tensors().items():
        assert torch.equal(tensor[0, 1], statistics.clean_predictions.tensors()[name])
    assert not statistics.predictions.kl[0, 1].any()
    assert statistics.predictions.kl[0, 0].min() > 0


@pytest.mark.parametrize("chunk", [1, 97, 500])
def test_chunks_give_what_one_chunk_gives(
    model: GPT2, ids: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [ids[0].tolist(), ids[1, :4].tolist()]
    whole = sweep(model, texts, (1, 2), (0.5, 1.5), predictions=True).statistics.predictions
    monkeypatch.setattr(predictions, "CHUNK", chunk)
    parts = sweep(model, texts, (1, 2), (0.5, 1.5), predictions=True).statistics.predictions
    assert whole is not None
    assert parts is not None
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], tensor, rtol=1e-9, atol=1e-9)


def test_nothing_is_kept_of_the_padding(model: GPT2, ids: torch.Tensor) -> None:
    lengths = torch.tensor([10, 3])
    streams = torch.stack([model.last_depth(ids), 2 * model.last_depth(ids)]).detach()
    found = predict(model.unembed, model.final_norm, streams, ids, lengths)
    for name in ("kl", "loss", "entropy", "correlation", "clean_logit", "likeliest", "rank"):
        numbers = getattr(found, name)
        assert not numbers[:, 1, 3:].any(), name
        assert numbers[1, 0, :9].any(), name
    for name in ("loss", "rank"):
        assert not getattr(found, name)[:, [0, 1], [9, 2]].any()
        assert getattr(found, name)[:, [0, 1], [8, 1]].all()


def test_logits_are_never_held_all_at_once(model: GPT2, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    largest, unembed = 0, model.unembed.forward

    def watched(x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        logits = unembed(x)
        largest = max(largest, logits.numel())
        return logits

    monkeypatch.setattr(predictions, "CHUNK", 1000)
    streams = torch.randn(9, 2, 10, 36, dtype=torch.float64)
    predict(watched, model.final_norm, streams, ids, torch.tensor([10, 10]))
    assert 0 < largest <= 1000


def test_a_sweep_without_predictions_says_how_to_get_them(model: GPT2, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="predictions=True"):
        sweep(model, ids, (1,), (0.5,)).statistics.measure("kl", "rest")


def same(logits: torch.Tensor) -> torch.Tensor:
    """An unembedding for a stream that is logits already."""
    return logits


def numbers_of(logits: torch.Tensor, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy, and mean clean logit, of softmax(logits) [run, position, vocab]."""
    q = logits.softmax(-1)
    return -(q * q.log()).sum(-1), (q * clean).sum(-1)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.2, 8))
def test_a_temperature_is_found_and_leaves_nothing(seed: int, temperature: float) -> None:
    clean = 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fitted = fit_temperature(same, clean, *numbers_of((clean / temperature)[None], clean))
    assert float(fitted.temperature) == pytest.approx(temperature, rel=1e-6)
    assert float(fitted.kl_left) < 1e-12


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_no_other_temperature_is_nearer(seed: int) -> None:
    clean, changed = 3 * torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    changed = clean + changed / 3
    fitted = fit_temperature(same, clean, *numbers_of(changed[None], clean))

    def distance(temperature: float) -> float:
        p, q = (clean / temperature).log_softmax(-1), changed.log_softmax(-1)
        return float(F.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean())

    best = float(fitted.temperature)
    assert float(fitted.kl_left) == pytest.approx(distance(best))
    assert float(fitted.kl) == pytest.approx(distance(1.0))
    assert all(distance(best * other) >= distance(best) for other in (0.99, 1.01, 0.5, 2.0))


@pytest.mark.parametrize("added", [-200.0, 200.0])
def test_a_constant_added_to_all_logits_changes_no_fit(added: float) -> None:
    clean, changed = 3 * torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = fit_temperature(same, clean, *numbers_of(changed[None], clean))
    found = fit_temperature(same, clean + added, *numbers_of(changed[None], clean + added))
    for name in ("temperature", "kl", "kl_left"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_a_distribution_that_is_no_temperature_of_the_clean_one_leaves_kl() -> None:
    clean = torch.tensor([[4.0, 2.0, 0.0]], dtype=torch.float64)
    fitted = fit_temperature(same, clean, *numbers_of(clean.flip(-1)[None], clean))
    assert float(fitted.kl_left) > 0.1


def test_the_fit_of_many_runs_in_chunks_is_the_fit_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, *changed = 3 * torch.randn(5, 7, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    entropy, mean = numbers_of(torch.stack(changed), clean)
    alone = [fit_temperature(same, clean, entropy[[run]], mean[[run]]) for run in range(4)]
    monkeypatch.setattr(predictions, "CHUNK", 80)
    together = fit_temperature(same, clean, entropy, mean)
    for name in ("temperature", "kl", "kl_left"):
        expected = torch.cat([getattr(fit, name) for fit in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spread", [0.0, 1e3])
def test_distributions_without_a_temperature_end_at_the_bounds(spread: float) -> None:
    clean = 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    far = clean * spread  # uniform, or all on one token
    q = far.softmax(-1)
    entropy, mean = -(q * far.log_softmax(-1)).nan_to_num().sum(-1), (q * clean).sum(-1)
    fitted = fit_temperature(same, clean, entropy[None], mean[None])
    assert float(fitted.temperature) == pytest.approx(100 if spread == 0 else 0.01, rel=0.01)
