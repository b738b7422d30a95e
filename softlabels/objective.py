"""A recipe's weighted sum of losses, and what it needs from a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softlabels.cache.vocab import VocabTeacher
from softlabels.config import Temperature, parse_temperature
from softlabels.losses import FIELDS, HARD, LANGUAGE_LOSSES, LOSSES
from softlabels.types import LANGUAGE_MODELS, Signals, Task


@dataclass(frozen=True, slots=True)
class Objective:
    """Σ weight · loss(student, teacher), at the temperature that belongs to the training's progress."""

    weights: dict[str, float]
    temperature: Temperature
    language: bool = False  # the student is a language model
    vocab: VocabTeacher | None = None  # then: what turns a cache's fields into logits; None where only tokens teach

    def fields(self) -> list[str]:
        """The cache fields that the losses look at."""
        if self.language:
            return [] if self.vocab is None else self.vocab.fields
        return sorted({field for name in self.weights for field in FIELDS[name]})

    @property
    def needs_teacher(self) -> bool:
        """Whether any soft term is there; without one, only labelled rows teach anything."""
        return not set(self.weights) <= HARD

    @property
    def needs_labels(self) -> bool:
        return bool(set(self.weights) & HARD)

    def hear(self, teacher: Signals) -> Signals:
        """`teacher` with its logits over the vocabulary, where it is a language model, on the device of its labels."""
        if self.vocab is None:
            return teacher
        return replace(teacher, vocab=self.vocab(teacher, device=teacher.labels.device))

    def to(self, device: torch.device | str) -> Objective:
        """The same where the student is: an output head is moved there once."""
        return self if self.vocab is None else replace(self, vocab=self.vocab.to(device))

    def __call__(self, student: Signals, teacher: Signals, *, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every loss by itself (unweighted), after `progress` (0 to 1) of the training."""
        temperature = self.temperature.at(progress)
        losses = LANGUAGE_LOSSES if self.language else LOSSES
        parts = {name: losses[name](student, teacher, temperature=temperature) for name in self.weights}
        total = sum(weight * parts[name] for name, weight in self.weights.items())
        assert isinstance(total, Tensor)
        return total, {name: part.detach() for name, part in parts.items()}


def build_objective(
    losses: dict[str, float],
    temperature: str,
    *,
    task: Task = "sequence-classification",
    vocab: VocabTeacher | None = None,
) -> Objective:
    """The objective of `losses` (name: weight) at `temperature` ('3', '5:1', '5:1:cosine').

    `vocab` turns a cache's fields into a language model's logits.
    """
    return Objective(dict(losses), parse_temperature(temperature), task in LANGUAGE_MODELS, vocab)
