"""What only the official weights can show. Needs the network: run with `-m official`."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from experiments.divergence.study import Divergence, GridSettings
from experiments.harness import experiment as harness
from experiments.harness import running, writing
from experiments.harness.options import parse_numbers
from minigpt import GPT2, GPT2Config, Tokenizer, generate, hub, parity
from minigpt.config import OFFICIAL
from tests.conftest import ROOT, TINY

official = pytest.mark.official
FIGURES: dict[str, Any] = parity.published_figures()
POSITIONS = 64


# What the official weights are put through: functions, so that weights/tiny can go through them as well.


def certified(name: str, live: bool) -> parity.Certificate:
    """The certificate of a checkpoint."""
    return parity.certify(GPT2.from_pretrained(name), live)


def continued(name: str, prompt: str, count: int) -> tuple[list[int], str]:
    """The ids of a prompt, and the text of its greedy continuation."""
    tokenizer = Tokenizer.from_pretrained(name)
    ids = tokenizer.encode(prompt)
    return ids, tokenizer.decode(list(generate(GPT2.from_pretrained(name), ids, count)))


def training_losses(name: str, tokens: torch.Tensor, steps: int) -> list[float]:
    """The loss before each step of AdamW on the same four rows."""
    model = GPT2.from_pretrained(name).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    inputs, targets = tokens[:256].view(4, POSITIONS), tokens[1:257]
    losses = list[float]()
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@torch.no_grad()
def deviations(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream's standard deviation after every block: of the first token, and the mean over the others."""
    text = (ROOT / "LICENSE").read_text()
    ids = torch.tensor([Tokenizer.from_pretrained(name).encode(text)[:POSITIONS]])
    std = GPT2.from_pretrained(name).residuals(ids)[1:, 0].std(-1)
    return std[:, 0], std[:, 1:].mean(1)


def verdicts(name: str, folder: Path) -> dict[int, str]:
    """The classic study, written into a folder: the number of each claim, and its verdict."""
    factors = parse_numbers("0.5:1.5:0.05", "--factors")
    experiment = Divergence(GridSettings(model=name, prompt=harness.PROMPT, layers=(2,), factors=factors))
    study = running.run_prompt(experiment, GPT2.from_pretrained(name), Tokenizer.from_pretrained(name))
    writing.write(experiment, study, folder)
    return {verdict.number: verdict.verdict for verdict in writing.verdicts(experiment, study)}


def test_what_the_official_weights_are_put_through_runs_on_tiny(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a network must not find out that these functions no longer run."""
    name = str(TINY)
    assert certified(name, live=False).passed
    ids, text = continued(name, FIGURES["greedy"][0]["prompt"], 5)
    assert ids and text
    losses = training_losses(name, torch.tensor(FIGURES["training_loss"]["tokens"]) % 4096, 2)
    assert losses[1] < losses[0]
    first, rest = deviations(name)
    assert first.shape == rest.shape == (12,)
    monkeypatch.setattr(writing, "_draw", lambda *_: None)  # the charts take longer than all the rest
    assert verdicts(name, tmp_path / "results")[1] == "true by construction"
    assert (tmp_path / "results" / "summary.json").exists()


@official
def test_the_published_figures_certify_gpt2() -> None:
    certificate = certified("gpt2", live=False)
    assert certificate.passed, certificate.sentence()
    assert certificate.against == "published figures of gpt2"


@official
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_config_on_the_hub_is_the_one_that_certificates_ask_for(name: str) -> None:
    folder = hub.find(name, files=("config.json",)).directory
    assert parity._unlike(GPT2Config.from_file(folder / "config.json"), name) == []


@official
def test_a_live_run_certifies_gpt2() -> None:
    certificate = certified("gpt2", live=True)
    assert certificate.passed, certificate.sentence()
    assert certificate.also.startswith("certified against published figures of gpt2")


@official
@pytest.mark.parametrize("case", FIGURES["tokenizer"]["cases"], ids=lambda case: case["text"])
def test_the_tokenizer_gives_the_published_ids(case: dict[str, Any]) -> None:
    assert Tokenizer.from_pretrained("gpt2").encode(case["text"]) == case["ids"]


@official
@pytest.mark.parametrize("case", FIGURES["greedy"], ids=lambda case: case["prompt"])
def test_greedy_continuations_are_the_published_ones(case: dict[str, Any]) -> None:
    ids, text = continued("gpt2", case["prompt"], case.get("new_tokens", 40))
    assert ids == case["ids"]
    expected = case.get("continuation") or Tokenizer.from_pretrained("gpt2").decode(case["continuation_ids"])
    assert text.startswith(expected)


@official
def test_ten_training_steps_give_the_published_losses() -> None:
    published = FIGURES["training_loss"]
    losses = training_losses("gpt2", torch.tensor(published["tokens"]), len(published["losses"]))
    assert losses == pytest.approx(published["losses"], abs=published["tolerance"])


@official
def test_the_stream_grows_with_depth_as_published() -> None:
    first, rest = deviations("gpt2")
    published = FIGURES["residual_std"]
    ratios = [*(rest / torch.tensor(published["rest"])), *(first / torch.tensor(published["first"]))]
    assert all(abs(math.log(ratio)) < math.log(1.25) for ratio in ratios), "a quarter: it depends on the text"


@official
def test_the_study_runs_on_gpt2(tmp_path: Path) -> None:
    assert verdicts("gpt2", tmp_path / "results")[1] == "true by construction"
