"""What only the official weights can show. Needs the network: run with `-m official`."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from experiments import divergence
from experiments.harness.options import parse_numbers
from minigpt import GPT2, Tokenizer, generate, parity

pytestmark = pytest.mark.official
FIGURES: dict[str, Any] = parity.published_figures()
POSITIONS = 64


@pytest.fixture(scope="module")
def gpt2() -> GPT2:
    """The official 124M model."""
    return GPT2.from_pretrained("gpt2")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.from_pretrained("gpt2")


def test_the_published_figures_certify_it(gpt2: GPT2) -> None:
    certificate = parity.certify(gpt2)
    assert certificate.passed, certificate.sentence()
    assert certificate.against == "published figures of gpt2"


def test_a_live_run_certifies_it(gpt2: GPT2) -> None:
    assert parity.certify(gpt2, live=True).passed


@pytest.mark.parametrize("case", FIGURES["tokenizer"]["cases"], ids=lambda case: case["text"])
def test_the_tokenizer_gives_the_published_ids(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("case", FIGURES["greedy"], ids=lambda case: case["prompt"])
def test_greedy_continuations_are_the_published_ones(gpt2: GPT2, tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert tokenizer.encode(case["prompt"]) == case["ids"]
    new = list(generate(gpt2, case["ids"], case.get("new_tokens", 40)))
    expected = case.get("continuation") or tokenizer.decode(case["continuation_ids"])
    assert tokenizer.decode(new).startswith(expected)


def test_ten_training_steps_give_the_published_losses() -> None:
    published = FIGURES["training_loss"]
    model = GPT2.from_pretrained("gpt2").train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    tokens = torch.tensor(published["tokens"])
    inputs, targets = tokens[:256].view(4, POSITIONS), tokens[1:257]
    for expected in published["losses"]:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets)
        assert loss.item() == pytest.approx(expected, abs=published["tolerance"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_stream_grows_with_depth_as_published(gpt2: GPT2, tokenizer: Tokenizer) -> None:
    published = FIGURES["residual_std"]
    ids = torch.tensor([tokenizer.encode((Path(__file__).parents[1] / "LICENSE").read_text())[:POSITIONS]])
    with torch.no_grad():
        std = gpt2.residuals(ids)[1:, 0].std(-1)
    ratios = [*(std[:, 1:].mean(1) / torch.tensor(published["rest"])), *(std[:, 0] / torch.tensor(published["first"]))]
    assert all(abs(math.log(ratio)) < math.log(1.25) for ratio in ratios), "a quarter: it depends on the text"


def test_the_study_runs_on_it(gpt2: GPT2, tokenizer: Tokenizer, tmp_path: Path) -> None:
    factors = parse_numbers("0.5:1.5:0.05", "--factors")
    settings = divergence.Settings(
        "gpt2", divergence.PROMPT, (2,), factors, "output", "float32", "cpu", None, parity=True
    )
    study = divergence.run_study(settings, gpt2, tokenizer)
    divergence.write(study, tmp_path / "results")
    assert {verdict.number: verdict.verdict for verdict in study.verdicts}[1] == "true by construction"
