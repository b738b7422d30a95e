"""Divergences between KL(p ‖ q) and KL(q ‖ p), and beside them. Inputs and means as in `soft_targets`.

None is multiplied by T², as in their papers, which take T = 1; `kl` and `reverse_kl` are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.losses.rows import compare, mean_rows
from softlabels.losses.soft_targets import divergence
from softlabels.types import Signals


def jsd(student: Signals, teacher: Signals, *, temperature: float | Tensor, beta: float = 0.5) -> Tensor:
    """beta · KL(p ‖ m) + (1 − beta) · KL(q ‖ m) with m = beta · p + (1 − beta) · q, without T².

    The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, "On-Policy Distillation of Language Models").
    At the ends, where the formula is 0, it is what the limits there are proportional to: KL(p ‖ q) at beta = 0,
    KL(q ‖ p) at 1.
    """
    _check_share("jsd", "beta", beta)
    rows = compare(student, teacher, temperature=temperature)
    log_p, log_q = rows.log_p, rows.log_q
    if beta in (0, 1):
        return mean_rows(divergence(log_p, log_q) if beta == 0 else divergence(log_q, log_p))
    middle = _mix(log_p, log_q, share=beta)
    return mean_rows(beta * divergence(log_p, middle) + (1 - beta) * divergence(log_q, middle))


def skew_kl(student: Signals, teacher: Signals, *, temperature: float | Tensor, skew: float = 0.1) -> Tensor:
    """KL(p ‖ skew · p + (1 − skew) · q), mean over rows, without T² (Ko et al. 2024, "DistiLLM", section 3.1).

    At most −log(skew), however far apart the two are.
    """
    _check_share("skew_kl", "skew", skew, below=1)
    rows = compare(student, teacher, temperature=temperature)
    return mean_rows(divergence(rows.log_p, _mix(rows.log_p, rows.log_q, share=skew)))


def skew_reverse_kl(student: Signals, teacher: Signals, *, temperature: float | Tensor, skew: float = 0.1) -> Tensor:
    """KL(q ‖ skew · q + (1 − skew) · p), mean over rows, without T² (Ko et al. 2024, "DistiLLM", section 3.1)."""
    _check_share("skew_reverse_kl", "skew", skew, below=1)
    rows = compare(student, teacher, temperature=temperature)
    return mean_rows(divergence(rows.log_q, _mix(rows.log_q, rows.log_p, share=skew)))


def tvd(student: Signals, teacher: Signals, *, temperature: float | Tensor) -> Tensor:
    """½ Σ |p − q|, the total variation distance, mean over rows, without T² (Wen et al. 2023, "f-divergence")."""
    rows = compare(student, teacher, temperature=temperature)
    return mean_rows((rows.log_p.exp() - rows.log_q.exp()).abs().sum(dim=-1) / 2)


def _mix(log_a: Tensor, log_b: Tensor, *, share: float) -> Tensor:
    """log(share · a + (1 − share) · b): probabilities are mixed, not their logarithms."""
    if share == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _check_share(loss: str, option: str, value: float, *, below: float = math.inf) -> None:
    if not (0 <= value <= 1 and value < below):
        upper = "below 1" if below == 1 else "1 at most"
        raise ConfigError(f"loss '{loss}': {option} is {value}, and must be a share: 0 or more, {upper}")
