"""The rows that a loss on logits compares: examples, or the tokens of a token classifier, as (N, C) on both sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.losses.means import mean
from softlabels.types import NO_LABEL, Signals

LOWEST = -1e30  # stands for −inf: its softmax is 0 too, and a difference of two of them is 0 and not NaN


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Logits (N, C) of both sides, and the temperature: one number, or a column (N, 1)."""

    student: Tensor
    teacher: Tensor
    temperature: float | Tensor

    @property
    def log_p(self) -> Tensor:
        """(N, C): the teacher's log-probabilities at the temperature."""
        return F.log_softmax(self.teacher / self.temperature, dim=-1)

    @property
    def log_q(self) -> Tensor:
        """(N, C): the student's log-probabilities at the temperature."""
        return F.log_softmax(self.student / self.temperature, dim=-1)

    def times_squared_temperature(self, losses: Tensor) -> Tensor:
        """(N,) losses, each times the T² of its row."""
        square = self.temperature**2
        return losses * (square[:, 0] if isinstance(square, Tensor) and square.dim() else square)


def compare(student: Signals, teacher: Signals, *, temperature: float | Tensor) -> LogitRows:
    """The rows of `student` and `teacher`: B examples, or the tokens of (B, L, C) whose mask is 1.

    `temperature` is a number, or a tensor of one a row, (B,) or (B, L). Raises ConfigError where the shapes differ.
    """
    if student.logits.shape != teacher.logits.shape:
        raise ConfigError(
            f"the student's logits are {tuple(student.logits.shape)}, the teacher's {tuple(teacher.logits.shape)}: a "
            f"loss on logits needs the same rows and the same classes on both sides"
        )
    if isinstance(temperature, Tensor) and temperature.dim():
        if student.logits.dim() == 3 and temperature.dim() == 1:
            temperature = temperature[:, None].expand(student.logits.shape[:2])
        temperature = take_rows(student, temperature)[:, None]  # (N, 1)
    return LogitRows(logit_rows(student, student.logits), logit_rows(student, teacher.logits), temperature)


def logit_rows(student: Signals, logits: Tensor) -> Tensor:
    """(N, C) of (B, C) or (B, L, C), in float32 at least, without infinities below."""
    rows = take_rows(student, logits)
    return (rows if rows.dtype == torch.float64 else rows.float()).clamp(min=LOWEST)


def take_rows(student: Signals, values: Tensor) -> Tensor:
    """(N, …): `values` (B, …) as they are, or of a token classifier's (B, L, …) the tokens whose mask is 1."""
    return values[student.mask != 0] if student.logits.dim() == 3 else values


def take_labels(student: Signals) -> Tensor:
    """(N,): the label of each row, NO_LABEL where there is none. Raises ConfigError where labels are no classes."""
    if student.labels.shape != student.logits.shape[:-1]:
        raise ConfigError(
            f"this loss needs a class for each row: logits {tuple(student.logits.shape)} came with labels "
            f"{tuple(student.labels.shape)}"
        )
    return take_rows(student, student.labels)


def take_targets(student: Signals, rows: LogitRows) -> Tensor:
    """(N,): the label of each row, or where it has none the class that the teacher holds most likely."""
    labels = take_labels(student)
    return torch.where(labels == NO_LABEL, rows.teacher.argmax(dim=-1), labels)


def mean_rows(losses: Tensor) -> Tensor:
    """The mean of (N,), and 0 where there is no row."""
    return mean(losses.sum(), len(losses))


def check_classes(rows: LogitRows, loss: str, why: str) -> None:
    """Raises ConfigError where `loss` would say nothing for want of a third class."""
    classes = rows.student.shape[-1]
    if classes < 3:
        raise ConfigError(f"loss '{loss}' needs three classes or more, and there are {classes}: {why}. Take kl instead")
