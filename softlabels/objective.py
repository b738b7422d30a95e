"""A recipe's weighted sum of losses, and what it needs from a cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from softlabels.config import Temperature, parse_temperature
from softlabels.losses import FIELDS, HARD, LOSSES
from softlabels.types import Signals


@dataclass(frozen=True, slots=True)
class Objective:
    """Σ weight · loss(student, teacher), at the temperature that belongs to the training's progress."""

    weights: dict[str, float]
    temperature: Temperature

    def fields(self) -> list[str]:
        """The cache fields that the losses look at."""
        return sorted({field for name in self.weights for field in FIELDS[name]})

    @property
    def needs_teacher(self) -> bool:
        """Whether any soft term is there; without one, only labelled rows teach anything."""
        return not set(self.weights) <= HARD

    @property
    def needs_labels(self) -> bool:
        return bool(set(self.weights) & HARD)

    def __call__(self, student: Signals, teacher: Signals, *, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every loss by itself (unweighted), after `progress` (0 to 1) of the training."""
        temperature = self.temperature.at(progress)
        parts = {name: LOSSES[name](student, teacher, temperature=temperature) for name in self.weights}
        total = sum(weight * parts[name] for name, weight in self.weights.items())
        assert isinstance(total, Tensor)
        return total, {name: part.detach() for name, part in parts.items()}


def build_objective(losses: dict[str, float], temperature: str) -> Objective:
    """The objective of `losses` (name: weight) at `temperature` ('3', '5:1', '5:1:cosine')."""
    return Objective(dict(losses), parse_temperature(temperature))
