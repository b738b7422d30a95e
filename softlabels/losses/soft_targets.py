"""Losses on the logits of a classifier: the student's (B, C) against the teacher's, or against labels.

p is the teacher's distribution at temperature T, q the student's, z logits. All are means over the B rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softlabels.types import NO_LABEL, Signals


def kl(student: Signals, teacher: Signals, *, temperature: float) -> Tensor:
    """T² · KL(p ‖ q), summed over C, mean over rows (Hinton et al. 2015, section 2).

    Gradients with respect to the logits shrink as 1/T²; the factor T² keeps them comparable to those of `ce`.
    """
    p = F.log_softmax(teacher.logits / temperature, dim=-1)  # (B, C)
    q = F.log_softmax(student.logits / temperature, dim=-1)  # (B, C)
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def reverse_kl(student: Signals, teacher: Signals, *, temperature: float) -> Tensor:
    """T² · KL(q ‖ p), summed over C, mean over rows (Gu et al. 2024, "MiniLLM", section 2.1)."""
    p = F.log_softmax(teacher.logits / temperature, dim=-1)  # (B, C)
    q = F.log_softmax(student.logits / temperature, dim=-1)  # (B, C)
    return F.kl_div(p, q, log_target=True, reduction="batchmean") * temperature**2


def mse_logits(student: Signals, teacher: Signals, *, temperature: float = 1.0) -> Tensor:
    """‖zt − zs‖², summed over C, mean over rows (Tang et al. 2019, equation 5). No temperature enters."""
    return (teacher.logits - student.logits).square().sum(dim=-1).mean()


def soft_cross_entropy(student: Signals, teacher: Signals, *, temperature: float) -> Tensor:
    """−Σ p · log q, summed over C, mean over rows, without T².

    The prediction loss of TinyBERT (Jiao et al. 2020, equation 10), which takes T = 1. Its released code divides
    by C as well; the paper does not, nor does this.
    """
    p = F.softmax(teacher.logits / temperature, dim=-1)  # (B, C)
    q = F.log_softmax(student.logits / temperature, dim=-1)  # (B, C)
    return -(p * q).sum(dim=-1).mean()


def ce(student: Signals, teacher: Signals, *, temperature: float = 1.0) -> Tensor:
    """Cross entropy with the labels, at T = 1 whatever `temperature` is. A row without a label counts 0.

    Divided by all B rows, not by the labelled ones: so w·ce + v·kl is the mean over rows of what each row contributes,
    and a single labelled row in a batch does not weigh as much as all the unlabelled ones together.
    """
    losses = F.cross_entropy(student.logits, student.labels, ignore_index=NO_LABEL, reduction="none")  # (B,)
    return losses.mean()
