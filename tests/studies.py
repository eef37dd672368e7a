"""A small study of every kind, on a random model: each is run once, and shared by the tests of what a person sees.

Layers, factors, heads and pairs are in no natural order and in unequal numbers, so that an axis that is reversed,
sorted or taken for another is another.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from experiments import sensitivity, skip_layer
from experiments.divergence import study as divergence
from experiments.harness import experiment as harness
from experiments.harness import running
from experiments.harness.corpus import Texts
from experiments.harness.ranks import Ranks
from experiments.page.figures import Figures
from experiments.token_loss import study as token_loss
from minigpt import GPT2, GPT2Config, Tokenizer
from tests.conftest import SMALL, draw

PROMPT = "ab cdefg"
TEXTS = ("ab cdef", "ghi jkl", "mnopqr", "stu vwxyz")
LAYERS = SMALL["n_layer"]
PLACES = ["embeddings", *(f"block {layer}" for layer in range(LAYERS)), "final norm"]
BLOCKS = PLACES[1:-1]
FACTORS, NEAR = (0.75, 1.75, 1.0, 0.5), (0.9999999, 1.0000001)


class Letters:
    """A tokenizer whose tokens are single characters."""

    vocab_size = SMALL["vocab_size"]

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return [ord(letter) - 32 for letter in text]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The characters of some ids."""
        return [chr(number + 32) for number in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return "".join(self.tokens(ids))


LETTERS = cast("Tokenizer", Letters())


class Ran(NamedTuple):
    """A finished study."""

    experiment: harness.Experiment[Any]
    study: harness.Study[Any]
    figures: Figures


@cache
def small_model() -> GPT2:
    """The model of all of them, in float64."""
    return draw(GPT2Config(**SMALL))


KINDS: dict[str, tuple[type[harness.Experiment[Any]], type[harness.Settings], dict[str, Any]]] = {
    "near": (divergence.Divergence, divergence.GridSettings, {"layers": (1,), "factors": NEAR}),
    "layers": (divergence.Divergence, divergence.GridSettings, {"layers": (2, 0), "factors": FACTORS}),
    "heads": (
        divergence.Divergence,
        divergence.GridSettings,
        {"layers": (2, 0), "factors": FACTORS[:3], "site": "head", "indices": (2, 0), "positions": (3,)},
    ),
    "mlp": (divergence.Divergence, divergence.GridSettings, {"layers": (1,), "factors": FACTORS[:2], "site": "mlp"}),
    "token_loss": (
        token_loss.TokenLoss,
        token_loss.LossSettings,
        {"layers": (0, 2, 3), "factors": (2.0, 0.6)},
    ),
    "near_loss": (token_loss.TokenLoss, token_loss.LossSettings, {"layers": (1, 2), "factors": NEAR}),
    "skip_layer": (skip_layer.SkipLayer, skip_layer.SkipSettings, {"layers": (3, 0, 1)}),
    "sensitivity": (
        sensitivity.Sensitivities,
        sensitivity.SensitivitySettings,
        {"sites": ("mlp", "output", "head", "attention")},
    ),
}
"""Experiment, its settings, and what is asked of it."""


@cache
def ran(name: str, corpus: bool = False) -> Ran:
    """A study of a prompt, or of `TEXTS`."""
    kind, of, asked = KINDS[name]
    settings = partial(of, model="small", parity=False, dtype="float64", **asked)
    if not corpus:
        experiment = kind(settings(prompt=PROMPT))
        study = running.run_prompt(experiment, small_model(), LETTERS)
        return Ran(experiment, study, experiment.figures(study))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        path = Path(folder) / "texts.txt"
        path.write_text("\n".join(TEXTS))
        texts = Texts.of(path, "text", 16, None, harness.SHORTEST)
        experiment = kind(settings(prompt=None, texts=texts))
        found = running.run_over_corpus(experiment, small_model(), LETTERS, Path(folder) / "out", Ranks(), held)
    assert found is not None
    return Ran(experiment, found, experiment.figures(found))
