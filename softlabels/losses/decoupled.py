"""Decoupled knowledge distillation: what the teacher says of the right class, and what of the others, weighed apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabels.losses.rows import LOWEST, check_classes, compare, mean_rows, take_targets
from softlabels.losses.soft_targets import divergence
from softlabels.types import Signals


def dkd(
    student: Signals, teacher: Signals, *, temperature: float | Tensor, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """T² · (alpha · KL over (target, rest) + beta · KL over the other classes, renormalised), mean over rows.

    Zhao et al. 2022, "Decoupled Knowledge Distillation", which weighs the two apart; T² is in its code. The
    target is the label; of a row without one, the class that the teacher holds most likely. With alpha = 1 and beta
    the teacher's mass outside of the target, row by row, it would be `kl`. The paper takes T = 4, adds `ce` at weight 1
    and raises this loss's weight from 0 over 20 epochs. Raises ConfigError with fewer than three classes.
    """
    rows = compare(student, teacher, temperature=temperature)
    check_classes(rows, "dkd", "outside of the target only one is left, so that its second term is always 0")
    target = take_targets(student, rows)[:, None]  # (N, 1)
    log_p, log_q = rows.log_p, rows.log_q
    losses = alpha * divergence(_target_and_rest(log_p, target), _target_and_rest(log_q, target))
    losses = losses + beta * divergence(_others(log_p, target), _others(log_q, target))
    return mean_rows(rows.times_squared_temperature(losses))


def _target_and_rest(log_mass: Tensor, target: Tensor) -> Tensor:
    """(N, 2): the log-probabilities of the target and of any other class."""
    rest = log_mass.scatter(1, target, LOWEST).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_mass.gather(1, target), rest], dim=1)


def _others(log_mass: Tensor, target: Tensor) -> Tensor:
    """(N, C): log-probabilities given that the class is not the target, which has LOWEST."""
    return F.log_softmax(log_mass.scatter(1, target, LOWEST), dim=1)
