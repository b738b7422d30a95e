"""Options of one student: how it is built, trained, pruned and scored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from softlabels.config.losses import Losses, Phase, TemperatureText
from softlabels.config.strict import Strict, refuse_doubled
from softlabels.types import Decay, OptimizerName


class PruneOptions(Strict):
    """What of a student is set to zero: the smallest weights, attention heads that matter least, or both."""

    magnitude: float | None = None  # a share of the weights, above 0 and below 1
    scope: Literal["matrix", "all"] = "matrix"  # the smallest of each matrix, or of all of them together
    heads: float | None = None  # a share of the heads, above 0 and below 1

    @model_validator(mode="after")
    def _something_of_it(self) -> PruneOptions:
        for name in ("magnitude", "heads"):
            share = getattr(self, name)
            if share is not None and share >= 1:
                raise ValueError(
                    f"{name} {share:g} would prune the student to nothing: give a share below 1, such as 0.5"
                )
            if share is not None and not share > 0:
                raise ValueError(f"{name} {share:g} prunes nothing: give a share above 0 and below 1, such as 0.5")
        if self.magnitude is None and self.heads is None:
            raise ValueError("say what to prune: a share of the weights (magnitude), of the heads (heads), or both")
        return self

    def say(self) -> str:
        """In a few words: 'magnitude 0.5, heads 0.25'."""
        parts = [f"{name} {share:g}" for name in ("magnitude", "heads") if (share := getattr(self, name)) is not None]
        return ", ".join(parts)


class EvaluateOptions(Strict):
    """What an evaluation tells beside a student's quality, and whether it stays in the run's folder."""

    bins: Annotated[int, Field(ge=1, le=1000)] = 15  # of the calibration error, as in Guo et al. 2017
    resamples: Annotated[int, Field(ge=0, le=1_000_000)] = 1000  # of the bootstrap intervals; 0: none
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: int = 0
    keep: bool = True
    texts: bool = True  # the rows' texts are kept with the answers


class StudentOptions(Strict):
    """How one student is built and trained."""

    student: str
    options: dict[str, Any] = {}
    losses: Losses = {"kl": 0.7, "ce": 0.3}
    temperature: TemperatureText = "1"
    phases: list[Phase] = []  # instead of `losses` and `temperature`: several trainings, one after the other
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    optimizer: OptimizerName = "adamw"  # adadelta wants --lr 1.0
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)  # share of the steps
    decay: Decay = "linear"  # of the rate, down to 0 after the warm-up; none: it stays as it is
    clip: float = Field(default=1.0, gt=0)  # largest norm of the gradient
    validation: float = Field(default=0.1, ge=0, lt=1)  # share of the rows held out where no --eval is given
    patience: int | None = Field(default=None, ge=1)  # epochs without a better score before stopping
    rows: int | None = Field(default=None, ge=2)  # learn from the first so many of the cache, for a trial
    window: int | None = Field(default=None, ge=1)  # shards whose rows are shuffled together; None: all
    seed: int = Field(default=0, ge=0, lt=2**32)  # numpy takes no larger one
    from_run: str | None = None  # a finished run, whose student is trained further; what was pruned of it stays zero
    prune: PruneOptions | None = None  # before the first step; what is pruned stays zero

    @model_validator(mode="after")
    def _one_way_of_saying(self) -> StudentOptions:
        names = [phase.name for phase in self.phases]
        refuse_doubled(names, "phases")
        said = {"losses", "temperature"} & self.model_fields_set
        if self.phases and any(getattr(self, key) != StudentOptions.model_fields[key].default for key in said):
            raise ValueError(f"'{sorted(said)[0]}' is said by the phases: leave it out beside 'phases'")
        return self

    def all_phases(self) -> list[Phase]:
        """The phases with nothing left open; one of the name 'train' where none are given."""
        phases = self.phases or [Phase(losses=self.losses, temperature=self.temperature)]
        common = ("epochs", "batch_size", "lr", "weight_decay", "warmup", "decay")
        return [
            phase.model_copy(update={key: getattr(self, key) for key in common if getattr(phase, key) is None})
            for phase in phases
        ]

    def loss_names(self) -> set[str]:
        """Of all phases."""
        return {term.loss for phase in self.all_phases() for term in phase.terms}
