"""Targets that change as the training goes on: from the teacher's faint opinion to its own, or to the labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.losses.rows import compare, mean_rows, take_targets
from softlabels.types import Signals


def annealing_mse(
    student: Signals, teacher: Signals, *, temperature: float | Tensor, max_temperature: float = 7.0
) -> Tensor:
    """‖zs − Φ(T) · zt‖² with Φ(T) = 1 − (T − 1) / max_temperature, summed over C, mean over rows.

    The first stage of Annealing-KD (Jafari et al. 2021), where T is a whole number that falls from
    max_temperature to 1, a few epochs each; the second stage is `ce` alone, from the best weights of the first. The
    student's logits have no temperature, and there is no T². Raises ConfigError where T is not in [1, max_temperature].
    """
    if not isinstance(temperature, Tensor) and not 1 <= temperature <= max_temperature:
        raise ConfigError(
            f"loss 'annealing_mse' at temperature {temperature:g}: it must be 1 to max_temperature, which is "
            f"{max_temperature:g}; give the loss the max_temperature that the schedule starts from"
        )
    rows = compare(student, teacher, temperature=temperature)
    share = 1 - (rows.temperature - 1) / max_temperature  # a number or (N, 1)
    return mean_rows((rows.student - share * rows.teacher).square().sum(dim=-1))


def teacher_annealing(
    student: Signals, teacher: Signals, *, temperature: float | Tensor = 1.0, share: float = 0.5
) -> Tensor:
    """Cross entropy with share · y + (1 − share) · p, mean over rows, at T = 1 whatever `temperature` is.

    BAM (Clark et al. 2019), where `share` grows from 0 to 1 linearly over the training. y is the label; of
    a row without one, the class that the teacher holds most likely.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"loss 'teacher_annealing': share is {share}, and must be 0 to 1, the part of the labels")
    rows = compare(student, teacher, temperature=1.0)
    soft = -(rows.log_p.exp() * rows.log_q).sum(dim=-1)  # (N,)
    hard = F.cross_entropy(rows.student, take_targets(student, rows), reduction="none")  # (N,)
    return mean_rows(share * hard + (1 - share) * soft)
