"""How far a figure might be off for the choice of its rows: the percentile bootstrap (Efron 1979).

Rows are drawn anew with replacement, the figure is taken of each drawing, and the middle of what came out is the
interval. All figures see the same drawings, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from softlabels.scoring.calibration import bin_numbers
from softlabels.scoring.figures import Interval

Statistic = Callable[[np.ndarray], np.ndarray]  # rows drawn (R, N) -> the figure of each drawing (R,)
_AT_ONCE = 4_000_000  # row numbers drawn at a time: 32 MB


def bootstrap(
    rows: int, statistics: Mapping[str, Statistic], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """The interval of each of `statistics`, over `resamples` drawings of `rows` rows; none where `resamples` is 0.

    ECE is a sum of magnitudes, which chance only adds to: its interval lies high on few rows.
    """
    if not resamples or not rows:
        return {}
    drawings = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    at_once = max(1, _AT_ONCE // rows)
    for start in range(0, resamples, at_once):
        drawn = drawings.integers(0, rows, (min(at_once, resamples - start), rows))  # (R, N)
        for name, statistic in statistics.items():
            found[name].append(statistic(drawn))
    tails = [(1 - level) / 2, (1 + level) / 2]
    bounds = {name: np.quantile(np.concatenate(parts), tails).clip(0, 1) for name, parts in found.items()}
    return {
        name: Interval(float(low), float(high), level=level, resamples=resamples, seed=seed)
        for name, (low, high) in bounds.items()
    }


def share_of(hits: np.ndarray) -> Statistic:
    """The share of rows that `hits` (N,) is true for: accuracy, or agreement."""
    numbers = hits.astype(np.float32)
    return lambda drawn: numbers[drawn].mean(axis=1, dtype=np.float64)


def macro_f1_of(labels: np.ndarray, predicted: np.ndarray, classes: int) -> Statistic:
    """Macro-F1 over all `classes`; one that neither occurs nor is said counts as 0, as in scikit-learn."""
    cells, numbers = np.unique(labels.astype(np.int64) * classes + predicted, return_inverse=True)
    truth, said = np.eye(classes)[cells // classes], np.eye(classes)[cells % classes]  # (K, C)

    def statistic(drawn: np.ndarray) -> np.ndarray:
        counts = _sums(numbers[drawn], len(cells))  # (R, K)
        right, both = counts @ (truth * said), counts @ (truth + said)  # (R, C)
        return np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0).mean(axis=1)

    return statistic


def ece_of(sure: np.ndarray, right: np.ndarray, bins: int) -> Statistic:
    """The calibration error in `bins` bins of equal width, of probabilities `sure` (N,) and hits `right` (N,)."""
    numbers, gaps = bin_numbers(sure, bins), right - sure

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return np.abs(_sums(numbers[drawn], bins, gaps[drawn])).sum(axis=1) / drawn.shape[1]

    return statistic


def _sums(numbers: np.ndarray, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    """(R, count) float64: of each line of `numbers` (R, N) how often every number occurs, or its summed weights."""
    lines = np.arange(len(numbers))[:, None] * count + numbers
    flat = None if weights is None else weights.ravel()
    return np.bincount(lines.ravel(), flat, minlength=len(numbers) * count).reshape(-1, count).astype(np.float64)
