"""A temperature for each row, from what the student says of it now (Wen et al. 2019, "Preparing Lessons").

As TextBrewer has them: base + (mean(w) − w) · beta, w a row's weight; the mean of the temperatures is `base`. Detached:
no gradient flows through a temperature. Logits are (B, C), or (B, L, C) of a token classifier, whose tokens have one
each; `mask` (B, L) then says which of them the mean counts. Results go to a loss as its `temperature`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.losses.means import sum_over_parts

LOWEST_SHARE = 0.1  # of `base`: TextBrewer's own could reach 0 or less with a large beta, which turns the loss over


def flsw(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    base: float,
    beta: float = 1.0,
    gamma: float = 2.0,
    mask: Tensor | None = None,
) -> Tensor:
    """(B,) or (B, L): w = (1 − cos(zs, zt))^gamma, so rows on which the two disagree get a lower temperature.

    Norms have 1e-4 added to them, as TextBrewer's.
    """
    student, teacher = (_unit(logits.detach()) for logits in (student_logits, teacher_logits))
    disagreement = 1 - (student * teacher).sum(dim=-1)
    return _spread(disagreement.clamp(min=0) ** gamma, base=base, beta=beta, mask=mask)  # rounding can go below 0


def cwsm(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    base: float,
    beta: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """(B,) or (B, L): w = 1 / (max q + 1e-3), so rows of which the student is unsure get a lower temperature.

    q is the student's distribution at T = 1; the teacher's logits are not looked at.
    """
    confidence = _wide(student_logits.detach()).softmax(dim=-1).amax(dim=-1)
    return _spread(1 / (confidence + 1e-3), base=base, beta=beta, mask=mask)


def _spread(weights: Tensor, *, base: float, beta: float, mask: Tensor | None) -> Tensor:
    counted = torch.ones_like(weights) if mask is None or weights.dim() == 1 else mask.to(weights.dtype)
    total, count = torch.where(counted != 0, weights, 0).sum(), counted.sum()
    mean = sum_over_parts(total) / sum_over_parts(count).clamp(min=1)
    return (base + (mean - weights) * beta).clamp(min=LOWEST_SHARE * base)


def _unit(logits: Tensor) -> Tensor:
    logits = _wide(logits)
    return logits / (logits.norm(dim=-1, keepdim=True) + 1e-4)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
