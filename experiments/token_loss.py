"""Scale one layer, and ask what becomes of the loss: of the whole text, and of the token that should come.

    python -m experiments.token_loss --prompt "She took his hand and looked into his" --target " eyes"

After a lecture of Mike X Cohen's course on language model mechanisms (token loss, GPT-2 medium, factor 0.6).
Its claims: the logits stay near a correlation of 0.995; most layers lower the target's loss, as a lower
temperature would; the loss rises when later layers are scaled. A lower temperature would keep the order of
the tokens and only sharpen the distribution: the best one is fitted, and what it leaves unexplained is said.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from experiments.commandline import command, start
from experiments.common import encode_prompt, parse_indices, parse_numbers
from experiments.estimates import Estimate, Row, axis
from experiments.figures import Figures, likeliest_cells
from experiments.runner import Checked, Experiment, Ids, Settings, Start, Study, self_checked
from experiments.verdicts import (
    MOST,
    NEAR_0995,
    UNCHANGED,
    Decision,
    Verdict,
    above,
    all_of,
    below,
    figures_of,
    within,
)
from minigpt import GPT2, Sweep, Tokenizer, sweep
from minigpt.parameters import Site, check_site
from minigpt.predictions import fit_temperature

PROMPT, TARGET = "She took his hand and looked into his", " face"
MEASURES = (
    "loss_clean", "loss", "loss_change", "kl", "changed", "correlation",
    "target_loss_clean", "target_loss", "target_loss_change", "target_correlation",
    "target_probability_clean", "target_probability", "target_rank_clean", "target_rank",
    "temperature", "kl_from_clean", "kl_after_temperature",
)  # fmt: skip
"""Of the text, means over positions, losses in nats per token; then of the target, the text's last token."""


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """The layers and factors that were asked for."""

    layers: tuple[int, ...]
    factors: tuple[float, ...]
    site: Site = "output"
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
    settings: LossSettings

    @classmethod
    def from_options(
        cls,
        begin: Start,
        *,
        target: Annotated[str | None, typer.Option(help="the token that should follow the prompt")] = None,
        layers: Annotated[str, typer.Option(help="2 | 2,5 | all; counted from 0")] = "all",
        factors: Annotated[str, typer.Option(help="0.6 | 0:2:0.5, both ends included")] = "0.6",
        site: Annotated[str, typer.Option(help="output | attention | mlp")] = "output",
    ) -> "TokenLoss":
        """Scale one layer after the other, and report the loss of the text and of its last token, the target."""
        common = begin.settings(prompt=PROMPT)
        if common["texts"] and target is not None:
            raise ValueError("--target belongs to a prompt; over a corpus the target is each window's last token.")
        if site == "head":
            raise ValueError("--site head: this experiment scales whole layers; take output, attention or mlp.")
        target = TARGET if target is None and common["prompt"] == PROMPT else target
        in_order = tuple(sorted(parse_indices(layers, begin.model.config.n_layer, "layer")))
        numbers = parse_numbers(factors, "--factors")
        return cls(LossSettings(**common, layers=in_order, factors=numbers, site=check_site(site), target=target))

    def encode(self, tokenizer: Tokenizer, n_positions: int) -> list[int]:
        """The prompt with its target; without one, the prompt's last token is the target."""
        ids = encode_prompt(tokenizer, (self.settings.prompt or ""), n_positions)
        if self.settings.target is None:
            return ids
        target = tokenizer.encode(self.settings.target)
        if len(target) != 1:
            parts, spaced = " | ".join(tokenizer.tokens(target)), f" {self.settings.target}"
            hint = f": {spaced!r} is one" if len(tokenizer.encode(spaced)) == 1 else ""
            raise ValueError(
                f"--target {self.settings.target!r} is {len(target)} tokens ({parts}); give one token{hint}."
            )
        if len(ids) == n_positions:
            raise ValueError(f"The prompt fills all {n_positions} positions; shorten it to leave one for the target.")
        return ids + target

    def run(self, model: GPT2, ids: Ids, alone: bool) -> Runs:
        """The grid on texts with their targets; of a prompt also without, to see what else could have come."""
        asked = self.settings
        grid = (asked.layers, asked.factors, asked.site)
        runs = [
            sweep(model, texts, *grid, predictions=True, max_bytes=asked.max_bytes)
            for texts in [ids, [text[:-1] for text in ids]][: 1 + alone]
        ]
        return Runs(*runs)

    def measure(self, model: GPT2, raw: Runs) -> dict[str, Tensor]:
        """`MEASURES` [text, measure, layer, factor], and what decides the claims [text, claim's test, factor]."""
        statistics, texts = raw.result.statistics, torch.arange(len(raw.result.lengths))
        scaled, clean = statistics.predictions, statistics.clean_predictions
        if scaled is None or clean is None:
            raise ValueError("This sweep kept no predictions; run it with predictions=True.")
        shape, at = scaled.kl.shape[:3], raw.result.lengths - 2  # the position that predicts the target
        of_text = {name: statistics.measure(name, "all")[:, :, -1] for name in ("kl", "changed", "correlation")}
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
        return {"values": values, "tests": _tests(values)}

    def check(self, model: GPT2, raw: Runs) -> Checked:
        """Try the sweep against what must be true of any weights."""
        return self_checked(model, raw.result)

    def rows(self, study: Study[Runs]) -> Iterator[Row]:
        """Every measure of every layer and factor."""
        labels = {"model": self.settings.model, "site": self.settings.site}
        axes = [axis("metric", MEASURES), axis("layer", self.settings.layers), axis("factor", self.settings.factors)]
        return ({**labels, **row} for row in study.measured["values"].rows(axes, study.windows))

    def of(self, study: Study[Runs], name: str) -> Estimate:
        """A measure: [layer, factor]."""
        return study.measured["values"].at(MEASURES.index(name))

    def verdicts(self, study: Study[Runs]) -> list[Verdict]:
        """The lecture's three claims, each over all layers that ran; the last two are about factors below 1."""
        decisions = (self._correlation(study), self._target(study), self._later(study))
        return [
            Verdict.of(number, claim, decision, study.basis)
            for number, (claim, decision) in enumerate(zip(CLAIMS, decisions, strict=True), start=1)
        ]

    def _correlation(self, study: Study[Runs]) -> Decision:
        changed = [j for j, factor in enumerate(self.settings.factors) if factor != 1]
        if not changed:
            return Decision("undecided", "Only factor 1 was run, which changes nothing.")
        found = self.of(study, "target_correlation").map(lambda tensor: tensor[:, changed])
        outcome = all_of(above(found, NEAR_0995), below(found, NEAR_0995))
        least, layer = float(found.value.min()), self.settings.layers[int(found.value.min(1).values.argmin())]
        said = f"The lowest correlation is {least:.3g}, layer {layer}; above {NEAR_0995} counts as near."
        sentence = {
            "holds": "The logits keep their pattern, whichever layer is scaled.",
            "does not hold": "Scaling some layers changes the pattern of the logits.",
            "undecided": "The intervals leave open whether all layers keep the pattern.",
        }[outcome]
        return Decision(outcome, sentence, said, figures_of(target_correlation=found), "the target's")

    def _below_1(self, study: Study[Runs]) -> tuple[Estimate, float] | None:
        """What decides the last two claims, for the factors below 1 [test, factor], and the first of these."""
        chosen = [j for j, factor in enumerate(self.settings.factors) if factor < 1]
        if not chosen:
            return None
        return study.measured["tests"].map(lambda tensor: tensor[:, chosen]), self.settings.factors[chosen[0]]

    def _target(self, study: Study[Runs]) -> Decision:
        found = self._below_1(study)
        if found is None:
            return Decision("undecided", "No factor below 1 was run, and the claim is about those.")
        lower, cooler, explained = (found[0].at(index) for index in range(3))
        sure, never = (torch.stack([of(test, MOST) for test in (lower, cooler, explained)]) for of in (above, below))
        outcome = all_of(sure, never)
        said = (
            f"At factor {found[1]:g}, {self._share(lower)} lower the target's loss, and the fitted temperature is "
            f"below 1 for {self._share(cooler)}; the best temperatures explain {within(explained.at(0))} of the kl and "
            f"leave the rest. Above {MOST} counts as most."
        )
        sentence = {
            "holds": "Most layers make the target likelier, and mostly by sharpening the distribution.",
            "does not hold": NOT_LOWER if bool(never[0].any()) else NOT_A_TEMPERATURE,
            "undecided": "The intervals leave one of the shares open.",
        }[outcome]
        shares = {"share_of_layers_that_lower_it": lower, "share_of_layers_cooler": cooler}
        figures = figures_of(**shares, share_of_kl_explained=explained)
        return Decision(outcome, sentence, said, figures, "the target's; all for the temperature")

    def _share(self, layers: Estimate) -> str:
        """A share of layers, in words, at the first factor."""
        count = len(self.settings.layers)
        if layers.spread:
            return f"a share of {within(layers.at(0))} of the layers"
        return f"{round(float(layers.value[0]) * count)} of {count} layers"

    def _later(self, study: Study[Runs]) -> Decision:
        found = self._below_1(study)
        if found is None or len(self.settings.layers) < 2:
            return Decision("undecided", "It takes a factor below 1, and two layers, of which one is later.")
        later, earlier = found[0].at(3), found[0].at(4)
        outcome = all_of(above(later, UNCHANGED), below(later, UNCHANGED))
        said = (
            f"Scaling a layer of the later half changes the target's loss by {within(later.at(0))} nats on average, at "
            f"factor {found[1]:g}; one of the earlier half by {within(earlier.at(0))}."
        )
        sentence = {
            "holds": "Scaling later layers makes the target less likely.",
            "does not hold": "Scaling later layers does not make the target less likely.",
            "undecided": "The interval holds 0.",
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
        wanted = (
            "target_loss_change",
            "target_probability",
            "target_rank",
            "loss_change",
            "target_correlation",
            "temperature",
        )
        clean = {
            name: float(self.of(study, name).value[0, 0])
            for name in ("loss_clean", "target_loss_clean", "target_rank_clean")
        }
        yield (
            f"clean: loss of the text {clean['loss_clean']:.4g} nats per token, of the target "
            f"{clean['target_loss_clean']:.4g} nats (rank {clean['target_rank_clean']:g})"
        )
        yield f"{self.settings.site} scaled by {self.settings.factors[0]:g}:"
        yield f"{'layer':>5}  " + "".join(f"{name.replace('_', ' '):>20}" for name in wanted)
        for entry, layer in enumerate(self.settings.layers):
            yield f"{layer:>5}  " + "".join(f"{float(self.of(study, name).value[entry, 0]):>20.4g}" for name in wanted)
        if not study.counts:
            yield from self._suffering(study)
        yield ""

    def token_changes(self, study: Study[Runs]) -> Tensor:
        """Of a prompt the loss change of every token but the first: [layer, factor, position - 1], nats."""
        scaled, clean = study.raw.result.statistics.predictions, study.raw.result.statistics.clean_predictions
        if scaled is None or clean is None:
            raise ValueError("This sweep kept no predictions; run it with predictions=True.")
        return (scaled.loss - clean.loss)[:, :, 0, :-1]

    def _suffering(self, study: Study[Runs], most: int = 5) -> Iterator[str]:
        worst = self.token_changes(study)[:, 0].mean(0).topk(min(most, len(study.tokens) - 1))
        named = (
            f"{study.tokens[index + 1]!r} {change:+.3g}"
            for change, index in zip(worst.values, worst.indices.tolist(), strict=True)
        )
        yield f"tokens that suffer most, mean over the layers, nats: {', '.join(named)}"

    def figures(self, study: Study[Runs]) -> Figures:
        """The report's charts."""
        from experiments.token_loss_figures import figures  # noqa: PLC0415  an extra

        return figures(self, study)


NOT_LOWER = "Scaling most layers does not make the target likelier."
NOT_A_TEMPERATURE = "Most layers make the target likelier, but not as a lower temperature would."
CLAIMS = (
    "The logits stay near a correlation of 0.995",
    "Most layers lower the target's loss, as a lower temperature would",
    "The loss rises when later layers are scaled",
)


def _temperatures(model: GPT2, result: Sweep) -> dict[str, Tensor]:
    """The best single temperature for each text and cell, and what it leaves: [layer, factor, text] each."""
    scaled, shape, fits = result.statistics.predictions, result.statistics.difference_sq.shape[:2], []
    if scaled is None:
        raise ValueError("This sweep kept no predictions; run it with predictions=True.")
    for text, length in enumerate(result.lengths.tolist()):
        ids = result.ids[text, :length].to(model.device)
        with torch.no_grad():
            final = model.final_norm(model.last_depth(ids[None]))[0]
        numbers = (of[:, :, text, :length].flatten(0, 1) for of in (scaled.entropy, scaled.clean_logit))
        fit = fit_temperature(model.unembed, final, *numbers)
        fits.append(torch.stack([fit.temperature, fit.kl, fit.kl_left]).unflatten(1, shape))
    names = ("temperature", "kl_from_clean", "kl_after_temperature")
    return dict(zip(names, torch.stack(fits, -1), strict=True))


def _tests(values: Tensor) -> Tensor:
    """Per text and factor: share of layers that lower the target's loss, share with a temperature below 1, share of
    kl that temperatures explain, mean change of the target's loss over the later and the earlier half of the
    layers: [text, 5, factor]."""
    of = {name: values[:, index] for index, name in enumerate(MEASURES)}
    change, half = of["target_loss_change"], values.shape[2] // 2
    kl, left = of["kl_from_clean"].sum(1), of["kl_after_temperature"].sum(1)
    explained = (1 - left / kl).nan_to_num(0.0)  # factor 1 changes nothing, and nothing is explained
    shares = ((change < 0).double().mean(1), (of["temperature"] < 1).double().mean(1), explained)
    return torch.stack([*shares, change[:, half:].mean(1), change[:, : max(half, 1)].mean(1)], 1)


main = command(TokenLoss.from_options)

if __name__ == "__main__":
    start(main)
