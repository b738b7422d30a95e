"""Options of trainings with two students, or with several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from softlabels.config.losses import Losses, LossTerm, Phase, TemperatureText
from softlabels.config.schedules import AdaptiveTemperature, parse_schedule, parse_temperature
from softlabels.config.strict import Strict
from softlabels.config.students import StudentOptions

JOINT_NAMES = ("global", "local")  # of two students that train together


class Couple(Strict):
    """What draws two students together: each learns from the other as it is now (see `softlabels.joint`)."""

    kl: float | str = 1.0  # weight of the mutual KL, or a schedule: '0:1'
    l2: float | str = 0.0  # weight of the squared distance of their logits, or a schedule
    temperature: str = "1"  # of the mutual KL

    @field_validator("temperature", mode="before")
    @classmethod
    def _temperature(cls, value: Any) -> str:
        if isinstance(parse_temperature(value), AdaptiveTemperature):
            raise ValueError(f"two students have one temperature for all rows, such as 2 or '5:1'; not '{value}'")
        return str(value)

    @field_validator("kl", "l2")
    @classmethod
    def _weight(cls, value: float | str) -> float | str:
        weight = parse_schedule(value, what="weight")
        if min(weight.start, weight.end) < 0:
            raise ValueError(f"a weight is 0 or more; not {value}")
        return value

    @property
    def teaches(self) -> bool:
        """Whether a student that nothing else teaches to answer would learn it from the other, to the end."""
        return any(parse_schedule(weight, what="weight").end > 0 for weight in (self.kl, self.l2))


class JointOptions(Strict):
    """How two students are built, trained together and coupled."""

    students: dict[str, StudentOptions]
    couple: Couple = Couple()

    @model_validator(mode="after")
    def _fits(self) -> JointOptions:
        if sorted(self.students) != sorted(JOINT_NAMES):
            raise ValueError(
                f"two students train together, called {' and '.join(JOINT_NAMES)}; there are "
                f"{', '.join(self.students) or 'none'}"
            )
        one, other = (self.students[name] for name in JOINT_NAMES)
        for name in JOINT_NAMES:
            _refuse_alone(self.students[name], ("prune", "from_run"), f"student '{name}' of two")
        phases = {name: self.students[name].all_phases() for name in JOINT_NAMES}
        for name, found in phases.items():
            if len(found) > 1 or found[0].progressive:
                raise ValueError(
                    f"student '{name}' has several phases, and students train together in one: give it 'losses', or "
                    f"one phase that is not progressive"
                )
        shared = {key: (getattr(one, key), getattr(other, key)) for key in ("seed", "rows", "validation", "patience")}
        first, second = (found[0] for found in phases.values())
        shared |= {key: (getattr(first, key), getattr(second, key)) for key in ("epochs", "batch_size")}
        for key, (mine, theirs) in shared.items():
            if mine != theirs:
                raise ValueError(
                    f"the two students see the same batches, so '{key}' must be one for both: it is {mine} for "
                    f"{JOINT_NAMES[0]} and {theirs} for {JOINT_NAMES[1]}"
                )
        return self


def _refuse_alone(student: StudentOptions, keys: Sequence[str], who: str) -> None:
    """ValueError for an option that only a student which trains by itself can have."""
    for key in keys:
        if getattr(student, key) is not None:
            raise ValueError(f"{who} can't have '{key}', which is for a student by itself: leave it out")


class TaskChoice(Strict):
    """What one task of several has for itself."""

    losses: Losses | None = None  # None: as for all tasks
    temperature: TemperatureText | None = None


ANNEALED = [LossTerm(loss="teacher_annealing", options={"share": "0:1"})]  # BAM, Clark et al. 2019


class MultiTaskOptions(StudentOptions):
    """How one encoder with a head a task is built and trained; `losses` are those of every task.

    By default teacher annealing: from the teacher's distribution to the labels, linearly over the training.
    """

    losses: Losses = ANNEALED
    power: float = Field(default=0.75, ge=0, le=1)  # a task is drawn ∝ rows^power; 1: as its rows, 0: all alike
    tasks: dict[str, TaskChoice] = {}  # what differs for some

    @model_validator(mode="after")
    def _one_phase(self) -> MultiTaskOptions:
        _refuse_alone(self, ("prune", "from_run", "window"), "a student of several tasks")
        if self.phases:
            raise ValueError("several tasks train in one phase: give 'losses' and no 'phases'")
        if self.rows is not None:
            raise ValueError("'rows' would cut every task to as many rows: dump smaller caches instead")
        return self

    def phase_of(self, task: str) -> Phase:
        """The one phase of `task`."""
        own = self.tasks.get(task, TaskChoice())
        phase = self.all_phases()[0]
        return phase.model_copy(
            update={"losses": own.losses or phase.losses, "temperature": own.temperature or phase.temperature}
        )
