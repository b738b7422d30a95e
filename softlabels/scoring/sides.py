"""A student's answers beside its teacher's, on the same rows: what can be said of them in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score

from softlabels.config import EvaluateOptions
from softlabels.scoring.calibration import calibrate, confidence
from softlabels.scoring.figures import Calibration, Fidelity, Interval, PairedTest, Slice
from softlabels.scoring.intervals import Statistic, bootstrap, ece_of, macro_f1_of, share_of
from softlabels.scoring.mcnemar import mcnemar
from softlabels.scoring.slices import Answers, slice_by_label, slice_by_length
from softlabels.types import NO_LABEL


@dataclass(frozen=True)
class Sides:
    """What was asked, and what both sides said."""

    names: list[str]  # of the classes
    labels: np.ndarray  # (N,), NO_LABEL where there is none
    lengths: np.ndarray  # (N,), in `unit`
    unit: Literal["tokens", "words"]
    student: np.ndarray  # (N, C) float32 logits
    teacher: np.ndarray | None  # (N, C) float32, NaN in rows that the cache does not have

    @property
    def labelled(self) -> np.ndarray:
        """Row numbers."""
        return np.flatnonzero(self.labels != NO_LABEL)

    @property
    def shared(self) -> np.ndarray:
        """Row numbers of what the teacher has answered too."""
        return np.flatnonzero(~np.isnan(self.teacher).any(axis=1)) if self.teacher is not None else np.array([], int)


def fidelity_of(sides: Sides) -> Fidelity | None:
    shared = sides.shared
    if sides.teacher is None:
        return None
    teacher = torch.from_numpy(sides.teacher[shared]).double().log_softmax(-1)  # (S, C)
    own = torch.from_numpy(sides.student[shared]).double().log_softmax(-1)
    says = teacher.argmax(-1).numpy()
    labelled = sides.labels[shared] != NO_LABEL
    truth = sides.labels[shared][labelled]
    gaps = torch.where(teacher > -torch.inf, teacher.exp() * (teacher - own), 0.0)
    return Fidelity(
        rows=len(shared),
        agreement=float((own.argmax(-1) == teacher.argmax(-1)).double().mean()),
        kl=float(gaps.sum(-1).mean()),
        teacher_accuracy=float(accuracy_score(truth, says[labelled])) if len(truth) else None,
        teacher_macro_f1=macro_f1(truth, says[labelled], sides.names) if len(truth) else None,
    )


def macro_f1(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    return float(f1_score(truth, predicted, labels=list(range(len(names))), average="macro", zero_division=0.0))


def calibrate_teacher(sides: Sides, options: EvaluateOptions) -> Calibration | None:
    rows = np.intersect1d(sides.labelled, sides.shared)
    if sides.teacher is None or not len(rows):
        return None
    return calibrate(sides.teacher[rows], sides.labels[rows], bins=options.bins)


def intervals_of(sides: Sides, options: EvaluateOptions) -> dict[str, Interval]:
    """Of accuracy, macro-F1 and ECE over the labelled rows; of the agreement over those of the teacher."""
    rows, shared = sides.labelled, sides.shared
    labels, logits = sides.labels[rows], sides.student[rows]
    said = logits.argmax(axis=1)
    statistics: dict[str, Statistic] = {
        "accuracy": share_of(said == labels),
        "macro_f1": macro_f1_of(labels, said, len(sides.names)),
        "ece": ece_of(confidence(logits), said == labels, options.bins),
    }
    drawing = {"resamples": options.resamples, "seed": options.seed}
    found = bootstrap(len(rows), statistics, level=options.level, **drawing)
    if sides.teacher is not None:
        same = sides.student[shared].argmax(axis=1) == sides.teacher[shared].argmax(axis=1)
        found |= bootstrap(len(shared), {"agreement": share_of(same)}, level=options.level, **drawing)
    return found


def against_teacher(sides: Sides) -> list[PairedTest]:
    rows = np.intersect1d(sides.labelled, sides.shared)
    if sides.teacher is None or not len(rows):
        return []
    own, theirs = (side[rows].argmax(axis=1) == sides.labels[rows] for side in (sides.student, sides.teacher))
    return [mcnemar(own, theirs, against="teacher")]


def slices_of(sides: Sides) -> list[Slice]:
    rows = sides.labelled
    teacher = np.full(len(sides.labels), -1)
    if sides.teacher is not None:
        teacher[sides.shared] = sides.teacher[sides.shared].argmax(axis=1)
    answers = Answers(sides.labels[rows], sides.student[rows].argmax(axis=1), teacher[rows])
    by_length = slice_by_length(answers, sides.lengths[rows], unit=sides.unit)
    return [*by_length, *slice_by_label(answers, sides.names)]
