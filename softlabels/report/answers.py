"""What student and teacher said, row by row: confusions, and the rows in which they differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from softlabels.evaluations import KeptRows

_LONGEST_TEXT = 400  # signs of a text that is shown


@dataclass(frozen=True, slots=True)
class DifferingRow:
    """A row, what each side said of it and how sure it was, and KL(teacher ‖ student) in nats."""

    id: str
    text: str
    label: str
    teacher: str
    teacher_sure: float
    student: str
    student_sure: float
    kl: float


def count_confusions(rows: KeptRows, logits: np.ndarray) -> np.ndarray:
    """(C, C): of the rows of each label (down), how often each class was said (across)."""
    known = (rows.labels >= 0) & ~np.isnan(logits).any(axis=1)
    classes = logits.shape[1]
    cells = rows.labels[known].astype(np.int64) * classes + logits[known].argmax(axis=1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def most_confused(student: np.ndarray, teacher: np.ndarray | None, names: Sequence[str], most: int) -> list[list[str]]:
    """[label, said instead, how often by the student, and by the teacher], the student's most frequent first."""
    wrong = student.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(cell), len(names)) for cell in order]
    return [
        [names[i], names[j], f"{wrong[i, j]:,}", "–" if teacher is None else f"{teacher[i, j]:,}"]
        for i, j in pairs
        if wrong[i, j]
    ]


def find_differing(rows: KeptRows, names: Sequence[str], most: int) -> list[DifferingRow]:
    """The rows with the largest KL(teacher ‖ student) at T = 1."""
    if rows.teacher is None or not most:
        return []
    known = np.flatnonzero(~np.isnan(rows.teacher).any(axis=1))
    teacher = log_softmax(rows.teacher[known].astype(np.float64), axis=1)
    student = log_softmax(rows.student[known].astype(np.float64), axis=1)
    gaps = np.where(np.isfinite(teacher), np.exp(teacher) * (teacher - student), 0.0).sum(axis=1)
    found = []
    for at in np.argsort(-gaps, kind="stable")[:most]:
        row = int(known[at])
        text = "" if rows.texts is None else rows.texts[row]
        found.append(
            DifferingRow(
                id=rows.ids[row],
                text=text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…",
                label=names[rows.labels[row]] if rows.labels[row] >= 0 else "",
                teacher=names[int(teacher[at].argmax())],
                teacher_sure=float(np.exp(teacher[at].max())),
                student=names[int(student[at].argmax())],
                student_sure=float(np.exp(student[at].max())),
                kl=float(gaps[at]),
            )
        )
    return found
