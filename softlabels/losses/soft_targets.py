"""The plain losses on the logits of a classifier: against the teacher's logits, or against labels.

Logits are (B, C), or (B, L, C) of a token classifier, where tokens of padding don't count. p is the teacher's
distribution at temperature T, q the student's, z logits. All are means over rows: examples, or tokens. `temperature`
may be a tensor of one a row, as `softlabels.losses.temperatures` makes them. A −inf of both sides counts nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softlabels.losses.rows import compare, logit_rows, mean_rows, take_labels, take_targets
from softlabels.types import NO_LABEL, Signals


def kl(student: Signals, teacher: Signals, *, temperature: float | Tensor) -> Tensor:
    """T² · KL(p ‖ q), summed over C, mean over rows (Hinton et al. 2015, section 2).

    Gradients with respect to the logits shrink as 1/T²; the factor T² keeps them comparable to those of `ce`.
    """
    rows = compare(student, teacher, temperature=temperature)
    return mean_rows(rows.times_squared_temperature(divergence(rows.log_p, rows.log_q)))


def reverse_kl(student: Signals, teacher: Signals, *, temperature: float | Tensor) -> Tensor:
    """T² · KL(q ‖ p), summed over C, mean over rows (Gu et al. 2024, "MiniLLM", section 2.1)."""
    rows = compare(student, teacher, temperature=temperature)
    return mean_rows(rows.times_squared_temperature(divergence(rows.log_q, rows.log_p)))


def mse_logits(student: Signals, teacher: Signals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """‖zt − zs‖², summed over C, mean over rows (Tang et al. 2019, equation 5). No temperature enters."""
    rows = compare(student, teacher, temperature=1.0)
    return mean_rows((rows.teacher - rows.student).square().sum(dim=-1))


def mae_logits(student: Signals, teacher: Signals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """|zt − zs|, mean over C and over rows. No temperature enters.

    What FedMD's parties learn the consensus by (Li and Wang 2019, arXiv:1910.03581; the mean over C is their code's).
    """
    rows = compare(student, teacher, temperature=1.0)
    return mean_rows((rows.teacher - rows.student).abs().mean(dim=-1))


def soft_cross_entropy(
    student: Signals, teacher: Signals, *, temperature: float | Tensor, mean_over_classes: bool = False
) -> Tensor:
    """−Σ p · log q, summed over C, mean over rows, without T².

    The prediction loss of TinyBERT (Jiao et al. 2020, equation 10), which takes T = 1. Its released code divides
    by C as well; the paper does not. `mean_over_classes` does as the code.
    """
    rows = compare(student, teacher, temperature=temperature)
    loss = -mean_rows((rows.log_p.exp() * rows.log_q).sum(dim=-1))
    return loss / rows.student.shape[-1] if mean_over_classes else loss


def ce(student: Signals, teacher: Signals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Cross entropy with the labels, at T = 1 whatever `temperature` is. A row without a label counts 0.

    Divided by all rows, not by the labelled ones: so w·ce + v·kl is the mean over rows of what each row contributes,
    and a single labelled row in a batch does not weigh as much as all the unlabelled ones together.
    """
    logits = logit_rows(student, student.logits)  # (N, C)
    return mean_rows(F.cross_entropy(logits, take_labels(student), ignore_index=NO_LABEL, reduction="none"))


def pseudo_ce(student: Signals, teacher: Signals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Cross entropy with the label, or where a row has none with the class that the teacher holds most likely.

    At T = 1 whatever `temperature` is; mean over rows. The hard term beside `mse_logits` of Tang et al. 2019
    ("Distillation Objective"), whose augmented rows have no labels.
    """
    rows = compare(student, teacher, temperature=1.0)
    return mean_rows(F.cross_entropy(rows.student, take_targets(student, rows), reduction="none"))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) over the last dimension, of log-probabilities (…, C)."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
