"""Scale one layer, and ask what becomes of the loss: of the whole text, and of the token that should come.

    python -m experiments.token_loss --prompt "She took his hand and looked into his" --target " eyes"

After a lecture of Mike X Cohen's course on language model mechanisms (token loss, GPT-2 medium, factor 0.6).
Its claims: the logits stay near a correlation of 0.995; most layers lower the target's loss, as a lower
temperature would; the loss rises when later layers are scaled. A lower temperature would keep the order of
the tokens and only sharpen the distribution: the best one is fitted, and what it leaves unexplained is said.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor

from experiments.harness.command import command
from experiments.harness.experiment import Checked, Experiment, Ids, Settings, Start, Study, encode_prompt, one_token
from experiments.harness.options import Layers, Options, parse_numbers
from experiments.harness.running import self_checked
from experiments.harness.table import Row, Table, Tables, by_text
from experiments.harness.verdicts import (
    MOST,
    NEAR_0995,
    UNCHANGED,
    Decision,
    Verdict,
    above,
    all_of,
    below,
    counted,
    figures_of,
    readable,
    within,
)
from experiments.page.figures import Figures, label_of, likeliest_cells
from minigpt import GPT2, Sweep, Tokenizer, sweep
from minigpt.engine import predict_logits
from minigpt.predictions import Predictions, fit_temperature

PROMPT, TARGET = "She took his hand and looked into his", " face"
MEASURES = (
    "loss_clean", "loss", "loss_change", "kl", "changed", "correlation",
    "target_loss_clean", "target_loss", "target_loss_change", "target_correlation",
    "target_probability_clean", "target_probability", "target_rank_clean", "target_rank",
    "temperature", "kl_from_clean", "kl_after_temperature",
)  # fmt: skip
"""Of the text, means over positions, losses in nats per token; then of the target, the text's last token."""
PRINTED = (
    "target_loss_change", "target_probability", "target_rank", "loss_change", "target_correlation", "temperature",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossOptions(Options):
    """Scale one layer after the other, and report the loss of the text and of its last token, the target."""

    target: Annotated[str | None, typer.Option(help="the token that should follow the prompt")] = None
    layers: Layers = "all"
    factors: Annotated[str, typer.Option(help="0.6 | 0:2:0.5, both ends included")] = "0.6"
    site: Annotated[str, typer.Option(help="a site that has one scale a layer, such as attention")] = "output"


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """The layers and factors that were asked for."""

    layers: tuple[int, ...]
    factors: tuple[float, ...]
    site: str = "output"
    target: str | None = None


@dataclass(frozen=True)
class Runs:
    """The grid on some texts, and on the prompt without its target."""

    result: Sweep
    before: Sweep | None = None


class TokenLoss(Experiment[Runs]):
    """What scaling a layer does to the next-token loss."""

    name = "token_loss"
    question = "One layer is scaled: what becomes of the loss, and of the token that should come?"
    options = LossOptions
    lectures: ClassVar[Mapping[str, Mapping[str, str | bool]]] = {
        "CCscalingTargetLoss": {
            "model": "gpt2-medium",
            "prompt": "I have no special talent. I am only passionately",
            "target": " curious",
            "factors": "0.6",
            "site": "output",
        }
    }
    settings: LossSettings

    @classmethod
    def from_options(cls, begin: Start[LossOptions]) -> "TokenLoss":
        """The layers and the target that were asked for."""
        asked, shared = begin.options, begin.settings(prompt=PROMPT)
        if shared["texts"] and asked.target is not None:
            raise ValueError("--target belongs to a prompt; over a corpus the target is each window's last token.")
        if what := begin.native(asked.site).index:
            raise ValueError(
                f"--site {asked.site}: every {what} has a scale of its own there, and this experiment scales whole "
                "layers; take a site such as output."
            )
        target = TARGET if asked.target is None and shared["prompt"] == PROMPT else asked.target
        settings = LossSettings(
            **shared,
            layers=tuple(sorted(begin.layers(asked.layers))),
            factors=parse_numbers(asked.factors, "--factors"),
            site=begin.site(asked.site),
            target=target,
        )
        return cls(settings)

    def encode(self, tokenizer: Tokenizer, n_positions: int) -> list[int]:
        """The prompt with its target; without one, the prompt's last token is the target."""
        ids = encode_prompt(tokenizer, (self.settings.prompt or ""), n_positions)
        if self.settings.target is None:
            return ids
        target = one_token(tokenizer, self.settings.target, "--target")
        if len(ids) == n_positions:
            raise ValueError(f"The prompt fills all {n_positions} positions; shorten it to leave one for the target.")
        return [*ids, target]

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Runs:
        """The grid on texts with their targets; of a prompt also without, to see what else could have come."""
        asked = self.settings
        grid = (asked.layers, asked.factors, asked.site)
        runs = [
            sweep(model, texts, *grid, predictions=True, max_bytes=asked.max_bytes)
            for texts in [ids, [text[:-1] for text in ids]][: 1 + alone]
        ]
        return Runs(*runs)

    def measure(self, model: GPT2, raw: Runs) -> Tables:
        """`MEASURES` [text, metric, layer, factor]; what decides the claims [text, test, factor]; and of a prompt the
        loss change of every token but the first [text, position, layer, factor]."""
        (scaled, clean), texts = _predictions(raw.result), torch.arange(len(raw.result.lengths))
        shape, at = scaled.kl.shape[:3], raw.result.lengths - 2  # the position that predicts the target
        of_text = {name: raw.result.measure(name, "all")[:, :, -1] for name in ("kl", "changed", "correlation")}
        count = raw.result.lengths - 1
        loss, loss_clean = scaled.loss.sum(-1) / count, (clean.loss.sum(-1) / count).expand(shape)
        target, target_clean = scaled.loss[..., texts, at], clean.loss[texts, at].expand(shape)
        found = {
            **of_text, "loss": loss, "loss_clean": loss_clean, "loss_change": loss - loss_clean,
            "target_loss": target, "target_loss_clean": target_clean, "target_loss_change": target - target_clean,
            "target_correlation": scaled.correlation[..., texts, at],
            "target_probability": (-target).exp(), "target_probability_clean": (-target_clean).exp(),
            "target_rank": scaled.rank[..., texts, at].double(),
            "target_rank_clean": clean.rank[texts, at].double().expand(shape),
            **_temperatures(model, raw.result),
        }  # fmt: skip
        values = torch.stack([found[name] for name in MEASURES]).movedim(-1, 0)
        axes = {"layer": raw.result.layers, "factor": raw.result.factors}
        tables = tables_of(values, axes, _rounding(model, raw.result))
        if self.settings.texts is None:
            changes = (scaled.loss - clean.loss)[..., :-1].permute(2, 3, 0, 1)
            tables["tokens"] = by_text(changes, position=range(1, changes.shape[1] + 1), **axes)
        return tables

    def check(self, model: GPT2, raw: Runs) -> Checked:
        """Try the sweep against what must be true of any weights."""
        return self_checked(model, raw.result)

    def rows(self, study: Study[Runs]) -> Iterator[Row]:
        """Every measure of every layer and factor."""
        return study.tables["values"].rows(model=self.settings.model, site=self.settings.site)

    def verdicts(self, study: Study[Runs]) -> list[Verdict]:
        """The lecture's three claims, each over all layers that ran; the last two are about factors below 1."""
        decisions = (self._correlation(study), self._target(study), self._later(study))
        return [
            Verdict.of(number, claim, decision, study.basis)
            for number, (claim, decision) in enumerate(zip(CLAIMS, decisions, strict=True), start=1)
        ]

    def _correlation(self, study: Study[Runs]) -> Decision:
        changed = [factor for factor in self.settings.factors if factor != 1]
        if not changed:
            return Decision("undecided", "Only factor 1 was run, which changes nothing.")
        found = study.tables["values"].at(metric="target_correlation", factor=changed)
        outcome = all_of(above(found, NEAR_0995), below(found, NEAR_0995))
        least, layer = float(found.value.min()), self.settings.layers[int(found.value.min(1).values.argmin())]
        said = f"The lowest correlation is {least:.3g}, when layer {layer} is scaled. Above {NEAR_0995} counts as near."
        sentence = {
            "holds": "The logits keep their pattern, whichever layer is scaled.",
            "does not hold": "Scaling some layers changes the pattern of the logits.",
            "undecided": "Some intervals include the threshold, so it is undecided whether the logits keep their "
            "pattern, whichever layer is scaled.",
        }[outcome]
        return Decision(outcome, sentence, said, figures_of(target_correlation=found), "the target's")

    def _below_1(self, study: Study[Runs]) -> Table | None:
        """What decides the last two claims, for the factors below 1: [test, factor]."""
        chosen = [factor for factor in self.settings.factors if factor < 1]
        return study.tables["tests"].at(factor=chosen) if chosen else None

    def _target(self, study: Study[Runs]) -> Decision:
        found = self._below_1(study)
        if found is None:
            return Decision("undecided", "No factor below 1 was run, and the claim is about those.")
        lower, cooler, explained = (found.at(test=test) for test in TESTS[:3])
        factor = found.axes["factor"][0]
        sure, never = (torch.stack([of(test, MOST) for test in (lower, cooler, explained)]) for of in (above, below))
        outcome = all_of(sure, never)
        share = explained.at(factor=factor)
        said = (
            f"At factor {label_of(factor)}, {self._share(lower)} lower the target's loss, and the fitted temperature "
            f"is below 1 for {self._share(cooler)}. {_explained_in_words(share)} Above {MOST} counts as most."
        )
        sentence = {
            "holds": "Scaling most layers makes the target likelier, mostly by sharpening the distribution.",
            "does not hold": NOT_LOWER if bool(never[0].any()) else NOT_A_TEMPERATURE,
            "undecided": NO_CHANGE if bool(explained.value.isnan().any()) else OPEN_SHARES,
        }[outcome]
        shares = {"share_of_layers_that_lower_it": lower, "share_of_layers_cooler": cooler}
        figures = figures_of(**shares, share_of_kl_explained=explained)
        return Decision(outcome, sentence, said, figures, "the target's; all for the temperature")

    def _share(self, layers: Table) -> str:
        """A share of layers, in words, at the first factor."""
        count, share = len(self.settings.layers), layers.at(factor=layers.axes["factor"][0])
        if layers.spread:
            return f"a share of {within(share)} of the layers"
        return f"{round(float(share.value) * count)} of {counted(count, 'layer')}"

    def _later(self, study: Study[Runs]) -> Decision:
        found = self._below_1(study)
        if found is None or len(self.settings.layers) < 2:
            return Decision(
                "undecided", "This takes a factor below 1 and at least two layers, one later than the other."
            )
        later, earlier = (found.at(test=test) for test in TESTS[3:])
        factor = found.axes["factor"][0]
        outcome = all_of(above(later, UNCHANGED), below(later, UNCHANGED))
        said = (
            f"At factor {label_of(factor)}, scaling a layer of the later half changes the target's loss by "
            f"{within(later.at(factor=factor))} nats on average, and scaling one of the earlier half by "
            f"{within(earlier.at(factor=factor))} nats."
        )
        sentence = {
            "holds": "Scaling later layers makes the target less likely.",
            "does not hold": "Scaling later layers does not make the target less likely.",
            "undecided": "Some intervals include 0, so it is undecided whether scaling later layers makes the target "
            "less likely.",
        }[outcome]
        return Decision(outcome, sentence, said, figures_of(later_half=later, earlier_half=earlier), "the target's")

    def save(self, study: Study[Runs], folder: Path) -> None:
        """The sweep of a prompt, number for number."""
        if not study.counts:
            study.raw.result.save(folder / "sweep.safetensors")

    def summary(self, study: Study[Runs]) -> dict[str, Any]:
        """Of a prompt, the likeliest tokens where the target should come, clean and for every layer and factor."""
        return {} if study.raw.before is None else {"likeliest": likeliest_cells(study.raw.before, study.tokenizer)}

    def lines(self, study: Study[Runs], columns: int) -> Iterator[str]:  # noqa: ARG002
        """Losses, rank and correlation by layer, for the first factor; and the tokens that suffer most."""
        layers, factor = self.settings.layers, self.settings.factors[0]
        shown = study.tables["values"].at(factor=factor)
        names = ("loss_clean", "target_loss_clean", "target_rank_clean")
        clean = {name: float(shown.at(metric=name, layer=layers[0]).value) for name in names}
        yield (
            f"clean: loss of the text {clean['loss_clean']:.4g} nats per token, of the target "
            f"{clean['target_loss_clean']:.4g} nats (rank {clean['target_rank_clean']:g})"
        )
        yield f"{self.settings.site} scaled by {label_of(factor)}:"
        yield f"{'layer':>5}  " + "".join(f"{name.replace('_', ' '):>20}" for name in PRINTED)
        for layer in layers:
            values = shown.at(layer=layer, metric=list(PRINTED)).value.tolist()
            yield f"{layer:>5}  " + "".join(f"{readable(value):>20}" for value in values)
        if not study.counts:
            yield from self._suffering(study)
        yield ""

    def _suffering(self, study: Study[Runs], most: int = 5) -> Iterator[str]:
        changes = study.tables["tokens"].at(factor=self.settings.factors[0])  # [position, layer]
        worst = changes.value.mean(1).topk(min(most, len(study.tokens) - 1))
        named = (
            f"{study.tokens[changes.axes['position'][index]]!r} {change:+.3g}"
            for change, index in zip(worst.values, worst.indices.tolist(), strict=True)
            if change > 0
        )
        yield f"tokens that suffer most, mean over the layers, nats: {', '.join(named) or 'none'}"

    def figures(self, study: Study[Runs]) -> Figures:
        """The report's charts."""
        from experiments.token_loss.figures import figures  # noqa: PLC0415  an extra

        return figures(study)


TESTS = ("lower", "cooler", "explained", "later half", "earlier half")
"""Per text and factor: share of layers that lower the target's loss, share with a temperature below 1, share of kl
that temperatures explain (not a number where there is no kl), mean change of the target's loss over the later and over
the earlier half of the layers. A layer whose kl is rounding alone changes no loss, and has no temperature."""
NOT_LOWER = "Scaling a layer does not make the target likelier for most layers."
NOT_A_TEMPERATURE = "Scaling most layers makes the target likelier, but not as a lower temperature would."
NO_CHANGE = "For some factor or text, scaling changes no prediction, so a temperature has nothing to explain."
OPEN_SHARES = "Some intervals include the threshold, so it is undecided whether these are most."
KL_ROUNDINGS = 4
"""A sum of float64 numbers as large as the logits is off by about so many roundings."""
CLAIMS = (
    "The logits stay near a correlation of 0.995",
    "Most layers lower the target's loss, as a lower temperature would",
    "The loss rises when later layers are scaled",
)


def _temperatures(model: GPT2, result: Sweep) -> dict[str, Tensor]:
    """The best single temperature for each text and cell, and what it leaves: [layer, factor, text] each."""
    scaled, clean = _predictions(result)
    shape, fits = result.statistics.difference_sq.shape[:2], []
    for text, length in enumerate(result.lengths.tolist()):
        ids, lengths = result.ids[text : text + 1, :length].to(model.device), torch.tensor([length])
        with torch.no_grad():
            streams = model.last_depth(ids)[None]
            final = model.final_norm(streams[0])[0]
        # The sweep's clean run may be rounded otherwise than this one, which is no change of temperature.
        own = predict_logits(model, streams, ids, lengths)
        entropy, clean_logit = (
            (getattr(scaled, name) - getattr(clean, name))[:, :, text, :length] + getattr(own, name)[0, 0]
            for name in ("entropy", "clean_logit")
        )
        fit = fit_temperature(model.unembed, final, entropy.flatten(0, 1), clean_logit.flatten(0, 1))
        fits.append(torch.stack([fit.temperature, fit.kl, fit.kl_left]).unflatten(1, shape))
    names = ("temperature", "kl_from_clean", "kl_after_temperature")
    return dict(zip(names, torch.stack(fits, -1), strict=True))


def _predictions(result: Sweep) -> tuple[Predictions, Predictions]:
    """The runs', and the clean run's."""
    scaled, clean = result.statistics.predictions, result.statistics.clean_predictions
    if scaled is None or clean is None:
        raise ValueError("This sweep kept no predictions; run it with predictions=True.")
    return scaled, clean


def _rounding(model: GPT2, result: Sweep) -> Tensor:
    """The kl, in nats, that rounding alone makes between two distributions: [text].

    Logits z that are off by r = eps z are no farther apart than r^2 / 2 (Hoeffding's lemma); and a kl is a difference
    of numbers as large as logits.
    """
    logits = _predictions(result)[1].clean_logit.abs().amax(-1)
    off = torch.finfo(model.dtype).eps * logits
    return torch.maximum(off.square() / 2, KL_ROUNDINGS * torch.finfo(torch.float64).eps * logits)


def _explained_in_words(share: Table) -> str:
    if bool(share.value.isnan()):
        where = " in some windows" if share.spread else ""
        return f"How much of the kl the best temperatures explain is undefined:{where} there is no kl beyond rounding."
    return f"The best temperatures explain {within(share)} of the kl and leave the rest."


def tables_of(values: Tensor, axes: Mapping[str, Sequence[Any]], rounding: Tensor) -> Tables:
    """`values`, `MEASURES` [text, metric, layer, factor], and `tests`, what decides the claims: `TESTS` [text, test,
    factor]. `rounding` [text] is the kl that rounding alone makes."""
    of = {name: values[:, index] for index, name in enumerate(MEASURES)}  # [text, layer, factor]
    moved, half = of["kl_from_clean"] > rounding[:, None, None], values.shape[2] // 2
    change, kl, left = (
        of[name].where(moved, 0.0) for name in ("target_loss_change", "kl_from_clean", "kl_after_temperature")
    )
    cooler = (of["temperature"] < 1) & moved
    shares = ((change < 0).double().mean(1), cooler.double().mean(1), 1 - left.sum(1) / kl.sum(1))
    tests = torch.stack([*shares, change[:, half:].mean(1), change[:, : max(half, 1)].mean(1)], 1)
    return {
        "values": by_text(values, metric=MEASURES, **axes),
        "tests": by_text(tests, test=TESTS, factor=axes["factor"]),
    }


main = command(TokenLoss)
