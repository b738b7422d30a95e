"""Whether a classifier is as right as it is sure. Logits and labels come in, errors of calibration go out.

The reliability diagram and the expected calibration error (ECE) of Guo et al. 2017, eq. 2 and 3: of the most likely
class, in bins of its probability; and the same error in bins of as many rows each (Nguyen and O'Connor 2015).
"""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

from softlabels.scoring.figures import Bin, Calibration


def calibrate(logits: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> Calibration:
    """How well the probabilities of `logits` (N, C), softmax at T = 1, fit `labels` (N,), none of them missing."""
    logs = log_softmax(logits.astype(np.float64), axis=1)  # (N, C)
    sure, right = confidence(logits), logits.argmax(axis=1) == labels
    numbers = bin_numbers(sure, bins)
    diagram = [_bin(i, bins, sure[numbers == i], right[numbers == i]) for i in range(bins)]
    wanted = np.zeros_like(logs)
    wanted[np.arange(len(labels)), labels] = 1
    nll = float(-logs[np.arange(len(labels)), labels].mean())
    return Calibration(
        bins=bins,
        ece=calibration_error(numbers, sure, right, bins),
        ece_equal_mass=calibration_error(_equal_mass(sure, bins), sure, right, bins),
        brier=float(((np.exp(logs) - wanted) ** 2).sum(axis=1).mean()),
        nll=nll if np.isfinite(nll) else None,
        confidence=float(sure.mean()),
        diagram=diagram,
    )


def confidence(logits: np.ndarray) -> np.ndarray:
    """(N,) float64: the probability of the most likely class."""
    return np.exp(log_softmax(logits.astype(np.float64), axis=1).max(axis=1))


def bin_numbers(sure: np.ndarray, bins: int) -> np.ndarray:
    """(N,) of 0 to bins - 1: which of `bins` equal parts of (0, 1] a probability lies in; each holds its upper end."""
    return np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)


def calibration_error(numbers: np.ndarray, sure: np.ndarray, right: np.ndarray, bins: int) -> float:
    """Σ over bins of n_b/N · |accuracy_b − confidence_b|, which is |Σ of a bin's (right − sure)| / N."""
    return float(np.abs(np.bincount(numbers, weights=right - sure, minlength=bins)).sum() / len(sure))


def _equal_mass(sure: np.ndarray, bins: int) -> np.ndarray:
    """(N,): the bins of as many rows each, or one more; rows of one probability may part."""
    numbers = np.empty(len(sure), dtype=np.int64)
    for number, rows in enumerate(np.array_split(np.argsort(sure, kind="stable"), bins)):
        numbers[rows] = number
    return numbers


def _bin(number: int, bins: int, sure: np.ndarray, right: np.ndarray) -> Bin:
    filled = len(sure) > 0
    return Bin(
        lower=number / bins,
        upper=(number + 1) / bins,
        rows=len(sure),
        confidence=float(sure.mean()) if filled else None,
        accuracy=float(right.mean()) if filled else None,
    )
