"""Whether two classifiers that answered the same rows differ by more than chance: McNemar's test (1947), exact."""

from __future__ import annotations

import numpy as np
from scipy.stats import binomtest

from softlabels.scoring.figures import PairedTest


def mcnemar(right: np.ndarray, other: np.ndarray, *, against: str) -> PairedTest:
    """The test of `right` against `other`, each (N,) whether a row's answer is its label, rows in one order.

    Rows that both have right, or neither, say nothing. Of the others each is a toss of a fair coin if the two are as
    good: the p-value is the two-sided binomial one, exact for any number of them.
    """
    right, other = right.astype(bool), other.astype(bool)
    only_this, only_other = int((right & ~other).sum()), int((other & ~right).sum())
    uneven = only_this + only_other
    return PairedTest(
        against=against,
        rows=len(right),
        both=int((right & other).sum()),
        only_this=only_this,
        only_other=only_other,
        neither=int((~right & ~other).sum()),
        difference=(only_this - only_other) / len(right),
        p=min(1.0, float(binomtest(only_this, uneven, 0.5).pvalue)) if uneven else 1.0,
    )
