"""Several runs as one student: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softlabels.errors import StudentError
from softlabels.runs import Run
from softlabels.types import Example


@dataclass(frozen=True)
class Average:
    """Runs of the same classes, asked together."""

    members: list[Run]

    @property
    def label_names(self) -> list[str]:
        return self.members[0].label_names

    @property
    def parameters(self) -> int:
        """Of all of them."""
        return sum(run.parameters for run in self.members)

    @property
    def nonzero(self) -> int:
        """Of all of them, those that are not zero."""
        return sum(run.nonzero for run in self.members)

    @property
    def size_on_disk(self) -> int:
        """Bytes of all of them."""
        return sum(run.size_on_disk for run in self.members)

    def logits(self, examples: Sequence[Example], *, batch_size: int = 64) -> np.ndarray:
        """(N, C) float32: the logarithm of the mean of the members' probabilities (softmax, T = 1)."""
        return mean_logits([run.logits(examples, batch_size=batch_size) for run in self.members])


def average_runs(runs: Sequence[Run]) -> Average:
    """`runs` as one student; StudentError where their classes differ, in name or order."""
    first = runs[0]
    for run in runs[1:]:
        if run.label_names != first.label_names:
            raise StudentError(
                f"these runs can't be averaged: {run.path} has the classes {', '.join(run.label_names)}; {first.path} "
                f"has {', '.join(first.label_names)}. Average runs of one task, with its classes in one order"
            )
    return Average(list(runs))


def mean_logits(logits: Sequence[np.ndarray]) -> np.ndarray:
    """(N, C) float32: log of the mean of the softmax of each (N, C) of `logits`."""
    stacked = np.stack(logits).astype(np.float64)  # (M, N, C)
    stacked -= np.logaddexp.reduce(stacked, axis=-1, keepdims=True)
    return (np.logaddexp.reduce(stacked, axis=0) - np.log(len(stacked))).astype(np.float32)
