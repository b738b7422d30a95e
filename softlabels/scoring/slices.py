"""How good a student is on parts of the rows: the short and the long, and each label's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import f1_score

from softlabels.scoring.figures import Slice

PARTS = 4  # of the lengths: quarters of the rows, as near as equal lengths allow


@dataclass(frozen=True, slots=True)
class Answers:
    """What student and teacher said of the same labelled rows; `teacher` is -1 where nothing is known of it."""

    labels: np.ndarray  # (N,)
    student: np.ndarray  # (N,)
    teacher: np.ndarray  # (N,)


def slice_by_length(answers: Answers, lengths: np.ndarray, *, unit: str, parts: int = PARTS) -> list[Slice]:
    """Slices of `lengths` (N,) between their quantiles; equal lengths stay together, so there may be fewer."""
    edges = np.unique(np.quantile(lengths, np.arange(1, parts) / parts, method="inverted_cdf"))
    numbers = np.searchsorted(edges, lengths, side="left")
    slices = []
    for number in np.unique(numbers):
        rows = numbers == number
        low, high = int(lengths[rows].min()), int(lengths[rows].max())
        name = f"{low} {unit}" if low == high else f"{low} to {high} {unit}"
        truth, said = answers.labels[rows], answers.student[rows]
        f1 = float(f1_score(truth, said, average="macro", zero_division=0.0))
        slices.append(_slice("length", name, answers, rows, f1))
    return slices


def slice_by_label(answers: Answers, names: Sequence[str]) -> list[Slice]:
    """A slice for the rows of each label, also where there is none."""
    f1 = f1_score(answers.labels, answers.student, labels=range(len(names)), average=None, zero_division=0.0)
    slices = []
    for number, name in enumerate(names):
        rows = answers.labels == number
        slices.append(_slice("label", name, answers, rows, float(f1[number]) if rows.any() else None))
    return slices


def _slice(by, name: str, answers: Answers, rows: np.ndarray, f1: float | None) -> Slice:
    labels, student, teacher = answers.labels[rows], answers.student[rows], answers.teacher[rows]
    known = teacher >= 0
    return Slice(
        by=by,
        name=name,
        rows=len(labels),
        accuracy=_mean(student == labels),
        f1=f1,
        agreement=_mean((student == teacher)[known]),
        teacher_accuracy=_mean((teacher == labels)[known]),
    )


def _mean(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if len(hits) else None
