"""DIST: the student need not give the teacher's probabilities, only ones that go with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabels.losses.means import all_rows, mean, share_of_all_rows
from softlabels.losses.rows import check_classes, compare
from softlabels.types import Signals


def dist(
    student: Signals, teacher: Signals, *, temperature: float | Tensor, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """beta · mean over rows of 1 − r(over classes) + gamma · mean over classes of 1 − r(over rows), without T².

    r is Pearson's correlation of the two sides' probabilities at `temperature` (Huang et al. 2022, "Knowledge
    Distillation from A Stronger Teacher"; `ce` is added at weight 1). Its released code multiplies
    by T². The second term sees how the rows of a batch differ: it needs batches of some size. A row or class in which
    the teacher's probabilities don't vary teaches nothing and counts 0; where only the student's don't, r is 0 and has
    no gradient, so that a student whose outputs are all equal needs another loss beside this one. Raises ConfigError
    with fewer than three classes.
    """
    rows = compare(student, teacher, temperature=temperature)
    check_classes(rows, "dist", "two probabilities always correlate by 1 or −1, whose gradient is 0")
    p, q = rows.log_p.exp(), rows.log_q.exp()  # (N, C)
    within = _distances(p, q)
    between = _distances(all_rows(p).T, all_rows(q).T)
    return beta * mean(within.sum(), len(within)) + gamma * share_of_all_rows(between.mean())


def _distances(teacher: Tensor, student: Tensor) -> Tensor:
    """(N,) from (N, M) twice: 1 − r, r over the second dimension."""
    a, b = _standardise(teacher), _standardise(student)
    return a.square().sum(dim=1) - (a * b).sum(dim=1)  # 0 − 0 where the teacher doesn't vary


def _standardise(values: Tensor) -> Tensor:
    """Each row without its mean, of length 1; zeros where it varies by no more than its rounding does."""
    if not values.numel():
        return values
    centred = values - values.mean(dim=1, keepdim=True)
    noise = 4 * torch.finfo(values.dtype).eps * values.norm(dim=1, keepdim=True)
    constant = centred.norm(dim=1, keepdim=True) <= noise
    return F.normalize(torch.where(constant, 0, centred), dim=1, eps=torch.finfo(values.dtype).tiny)
