"""Any native parameters, together, as many interventions as you like: each a run beside the clean one.

`sweep` is for grids of layers and factors. Here every intervention is a dict of parameters, as `scaled` takes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from minigpt.engine import Job
from minigpt.measures import Labels, Result
from minigpt.model import GPT2
from minigpt.parameters import Values
from minigpt.passes import Cells, Progress, run, run_for_logits


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Some interventions beside the clean run of the same texts. The axes of its measures: intervention, place, batch.

    `passive` carries the difference on from the last block that an intervention names. What blocks write counts from
    the block after the first one: in a block that the intervention names as well, what its values did is part of it.
    """

    @property
    def axes(self) -> tuple[Labels, ...]:
        """The interventions, by their number."""
        return ([{"intervention": number} for number in range(len(self.statistics.sites))],)

    @property
    def steps_sq(self) -> Tensor:
        """Squared norm of what every block adds to the stream: [intervention, block, batch, position].

        Raises ValueError where it was not asked for.
        """
        return _kept(self.statistics.steps_sq, "What blocks add to the stream was", "steps=True")

    @property
    def clean_steps_sq(self) -> Tensor:
        """The same of the clean run: [block, batch, position]."""
        return _kept(self.statistics.clean_steps_sq, "What blocks add to the stream was", "steps=True")

    @property
    def logits(self) -> Tensor:
        """Logits of the chosen tokens, after each text's last one: [intervention, batch, token], float64.

        Raises ValueError where no tokens were chosen.
        """
        return _kept(self.statistics.logits, "Logits were", "tokens=[...]")

    @property
    def clean_logits(self) -> Tensor:
        """The same of the clean run: [batch, token]."""
        return _kept(self.statistics.clean_logits, "Logits were", "tokens=[...]")


def _kept(found: Tensor | None, what: str, ask: str) -> Tensor:
    if found is None:
        raise ValueError(f"{what} not kept; compare with {ask}.")
    return found


def _check_interventions(interventions: Sequence[Values]) -> None:
    """Raise ValueError for what is no list of dicts, and where there is none, or an empty one."""
    if isinstance(interventions, Mapping) or not all(isinstance(of, Mapping) for of in interventions):
        raise ValueError("The interventions are not a list of dicts; for a single one give [intervention].")
    if not interventions or not all(interventions):
        raise ValueError(
            "There is no intervention, or an empty one; give dicts such as {'blocks.2.output_scale': 0.5}."
        )


def compare(
    model: GPT2,
    ids: Tensor | Sequence[Sequence[int]],
    interventions: Sequence[Values],
    predictions: bool = False,
    max_bytes: int | None = None,
    progress: Progress | None = None,
    steps: bool = False,
    tokens: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Comparison:
    """Run texts clean and under every intervention, and keep numbers per position.

    `ids`, `max_bytes` and `progress` are as in `sweep`. A value is a number or a tensor that broadcasts against
    [batch, position, n_embd], as in `scaled`. `predictions` asks for the next-token
    distributions, which take the unembedding; `steps` for the norm of what every block adds to the stream; `tokens`
    [token] or [batch, token] for the logits of these tokens alone, after each text's last one.

    Raises ValueError for no intervention, for an unknown parameter, for a shape that does not fit, for a model that is
    not clean, for a stream that overflows, and when `max_bytes` is too little for one run beside the clean one.
    """
    _check_interventions(interventions)
    job = Job.checked(
        model, ids, interventions, predictions, steps=steps, tokens=tokens, named="intervention {}".format
    )
    return Comparison(job.ids.cpu(), run(job, Cells.in_a_row(len(interventions)), max_bytes, progress))


def compare_logits(
    model: GPT2,
    ids: Tensor | Sequence[Sequence[int]],
    interventions: Sequence[Values],
    tokens: Tensor | Sequence[int] | Sequence[Sequence[int]],
    max_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The logits of some tokens after each text's last one, clean [batch, token] and under every intervention
    [intervention, batch, token], float64.

    What `compare(..., tokens=tokens)` has as `clean_logits` and `logits`, without the numbers of every place: for
    grids of patches. Arguments and errors are those of `compare`.
    """
    _check_interventions(interventions)
    job = Job.checked(model, ids, interventions, tokens=tokens, places=False, named="intervention {}".format)
    if job.known:
        return run_for_logits(job, max_bytes)
    found = compare(model, ids, interventions, max_bytes=max_bytes, tokens=tokens)  # which tries a run alone
    return found.clean_logits, found.logits
