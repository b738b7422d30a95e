"""A run and texts come in, the student's class for each goes out. An exported run is used without loading torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softlabels.errors import StudentError
from softlabels.runs import load_run
from softlabels.types import Example


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a student says of one text."""

    text: str
    label: str
    probability: float
    probabilities: dict[str, float]


def predict(run: Path, texts: Sequence[str | tuple[str, str]]) -> list[Prediction]:
    """The student's class for every text (or pair of texts), with its probability (softmax of its logits, T = 1)."""
    student = load_run(run)
    if student.record.task != "sequence-classification":
        raise StudentError(f"{run} is a {student.record.task} student: it has no classes to predict")
    examples = [
        Example(str(i), text, None) if isinstance(text, str) else Example(str(i), text[0], text[1])
        for i, text in enumerate(texts)
    ]
    logits = student.logits(examples)  # (N, C)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    rows = (powers / powers.sum(axis=1, keepdims=True)).tolist()
    names = student.label_names
    best = [max(range(len(names)), key=row.__getitem__) for row in rows]
    return [
        Prediction(example.text, names[i], row[i], dict(zip(names, row, strict=True)))
        for example, row, i in zip(examples, rows, best, strict=True)
    ]
