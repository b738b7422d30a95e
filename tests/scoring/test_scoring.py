"""Calibration, intervals, McNemar's test and slices equal slow references written from their definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from softlabels.scoring.calibration import bin_numbers, calibrate, confidence
from softlabels.scoring.intervals import bootstrap, ece_of, macro_f1_of, share_of
from softlabels.scoring.mcnemar import mcnemar
from softlabels.scoring.slices import Answers, slice_by_label, slice_by_length


def answers(rows: int = 300, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and labels (N,) that agree somewhat more often than by chance; the last class never occurs."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - 1, rows)
    logits = rng.normal(size=(rows, classes)).astype(np.float32) * 2
    logits[np.arange(rows), labels] += 1.5
    return logits, labels


# ------------------------------------------------------------------------------------------------------- calibration


def slow_softmax(row: np.ndarray) -> list[float]:
    powers = [math.exp(float(value)) for value in row]
    return [power / math.fsum(powers) for power in powers]


@pytest.mark.parametrize("bins", [1, 7, 15, 100])
def test_calibration_equals_a_slow_reference(bins):
    logits, labels = answers()
    found = calibrate(logits, labels, bins=bins)
    rows = [(slow_softmax(row), int(label)) for row, label in zip(logits, labels, strict=True)]
    sure = [max(shares) for shares, _ in rows]
    right = [shares.index(max(shares)) == label for shares, label in rows]
    ece = 0.0
    for number in range(bins):
        inside = [i for i in range(len(rows)) if number / bins < sure[i] <= (number + 1) / bins]
        bar = found.diagram[number]
        assert bar.rows == len(inside)
        if inside:
            mean_sure, share = (
                math.fsum(sure[i] for i in inside) / len(inside),
                sum(right[i] for i in inside) / len(inside),
            )
            assert (bar.confidence, bar.accuracy) == (pytest.approx(mean_sure), pytest.approx(share))
            ece += len(inside) / len(rows) * abs(share - mean_sure)
        else:
            assert (bar.confidence, bar.accuracy) == (None, None)
    assert found.ece == pytest.approx(ece)
    order, even = sorted(range(len(rows)), key=lambda i: sure[i]), 0.0
    for number in range(bins):
        start = number * (len(rows) // bins) + min(number, len(rows) % bins)
        part = order[start : start + len(rows) // bins + (number < len(rows) % bins)]
        even += abs(math.fsum(right[i] - sure[i] for i in part)) / len(rows)
    assert found.ece_equal_mass == pytest.approx(even)
    brier = [math.fsum((share - (c == label)) ** 2 for c, share in enumerate(shares)) for shares, label in rows]
    assert found.brier == pytest.approx(math.fsum(brier) / len(rows))
    assert found.nll == pytest.approx(math.fsum(-math.log(shares[label]) for shares, label in rows) / len(rows))


def test_calibration_of_answers_that_can_be_told_by_heart():
    sure = math.log(9)  # 0.9 of two classes
    found = calibrate(np.array([[sure, 0], [sure, 0], [0, sure], [0, sure]]), np.array([0, 0, 1, 0]), bins=10)
    assert found.ece == pytest.approx(0.15) and found.confidence == pytest.approx(0.9)
    assert sum(bar.rows for bar in found.diagram) == 4
    certain = calibrate(np.array([[1e4, 0.0]]), np.array([1]))
    assert (certain.ece, certain.brier, certain.nll) == (1.0, 2.0, pytest.approx(1e4))
    impossible = calibrate(np.array([[0.0, -np.inf]]), np.array([1]))
    assert impossible.nll is None and impossible.brier == 2.0


def test_a_bin_holds_its_upper_end():
    assert bin_numbers(np.array([0.0, 0.1, 0.100001, 0.5, 0.51, 1.0]), 10).tolist() == [0, 0, 1, 4, 5, 9]


# --------------------------------------------------------------------------------------------------------- intervals


def test_intervals_equal_one_resample_after_the_other():
    logits, labels = answers(rows=120)
    said, sure = logits.argmax(1), confidence(logits)
    statistics = {
        "accuracy": share_of(said == labels),
        "macro_f1": macro_f1_of(labels, said, 4),
        "ece": ece_of(sure, said == labels, 15),
    }
    found = bootstrap(120, statistics, resamples=200, level=0.9, seed=7)
    drawn = np.random.default_rng(7).integers(0, 120, (200, 120))
    slow = {
        "accuracy": [np.mean(said[rows] == labels[rows]) for rows in drawn],
        "macro_f1": [
            f1_score(labels[rows], said[rows], labels=range(4), average="macro", zero_division=0.0) for rows in drawn
        ],
        "ece": [calibrate(logits[rows], labels[rows]).ece for rows in drawn],
    }
    for name, values in slow.items():
        low, high = np.quantile(values, [0.05, 0.95])
        assert (found[name].low, found[name].high) == (pytest.approx(low), pytest.approx(high)), name
        assert low < high and (found[name].level, found[name].resamples, found[name].seed) == (0.9, 200, 7)


def test_intervals_are_those_of_scipy():
    """scipy draws other resamples; with many of them both come to the same."""
    logits, labels = answers(rows=400)
    right = (logits.argmax(1) == labels).astype(float)
    found = bootstrap(400, {"accuracy": share_of(right > 0)}, resamples=8000)["accuracy"]
    wanted = stats.bootstrap((right,), np.mean, n_resamples=8000, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == (pytest.approx(wanted.low, abs=0.006), pytest.approx(wanted.high, abs=0.006))


def test_resamples_in_several_pieces_are_the_same(monkeypatch):
    right = np.arange(50) % 3 > 0
    at_once = bootstrap(50, {"accuracy": share_of(right)}, resamples=101)
    monkeypatch.setattr("softlabels.scoring.intervals._AT_ONCE", 500)
    assert bootstrap(50, {"accuracy": share_of(right)}, resamples=101) == at_once
    assert bootstrap(50, {"accuracy": share_of(right)}, resamples=0) == {}


# ----------------------------------------------------------------------------------------------------------- McNemar


@pytest.mark.parametrize(("only_this", "only_other"), [(0, 0), (1, 0), (3, 3), (9, 2), (2, 9), (40, 21), (300, 370)])
def test_mcnemar_equals_the_binomial_sum(only_this, only_other):
    right = np.array([True] * only_this + [False] * only_other + [True] * 5 + [False] * 7)
    other = np.array([False] * only_this + [True] * only_other + [True] * 5 + [False] * 7)
    found = mcnemar(right, other, against="runs/other")
    tosses, fewer = only_this + only_other, min(only_this, only_other)
    tail = sum(Fraction(math.comb(tosses, heads), 2**tosses) for heads in range(fewer + 1))
    assert found.p == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)
    assert (found.both, found.only_this, found.only_other, found.neither) == (5, only_this, only_other, 7)
    assert found.difference == pytest.approx(right.mean() - other.mean())
    assert mcnemar(other, right, against="").p == pytest.approx(found.p)


# ------------------------------------------------------------------------------------------------------------ slices


def test_slices_by_length_cover_every_row_once():
    logits, labels = answers()
    lengths = np.random.default_rng(1).integers(3, 40, len(labels))
    teacher = np.where(np.arange(len(labels)) % 5 == 0, -1, labels)
    said = Answers(labels, logits.argmax(1), teacher)
    found = slice_by_length(said, lengths, unit="tokens")
    assert len(found) == 4 and sum(part.rows for part in found) == len(labels)
    for part in found:
        low, high = (int(word) for word in part.name.removesuffix(" tokens").split(" to "))
        rows = [i for i in range(len(labels)) if low <= lengths[i] <= high]
        assert part.rows == len(rows) and 50 < part.rows < 100
        assert part.accuracy == pytest.approx(sum(said.student[i] == labels[i] for i in rows) / len(rows))
        assert part.f1 == pytest.approx(f1_score(labels[rows], said.student[rows], average="macro", zero_division=0.0))
        known = [i for i in rows if teacher[i] >= 0]
        assert part.agreement == pytest.approx(sum(said.student[i] == teacher[i] for i in known) / len(known))
        assert part.teacher_accuracy == 1.0


def test_equal_lengths_stay_together():
    labels = np.zeros(10, dtype=int)
    said = Answers(labels, labels, np.full(10, -1))
    (one,) = slice_by_length(said, np.full(10, 7), unit="words")
    assert (one.name, one.rows, one.accuracy, one.agreement) == ("7 words", 10, 1.0, None)
    short, long = slice_by_length(said, np.array([1] * 9 + [50]), unit="tokens")
    assert [(short.name, short.rows), (long.name, long.rows)] == [("1 tokens", 9), ("50 tokens", 1)]


def test_slices_by_label():
    logits, labels = answers()
    said = logits.argmax(1)
    found = slice_by_label(Answers(labels, said, labels), ["a", "b", "c", "never"])
    for number, part in enumerate(found[:3]):
        rows = labels == number
        hits = int((rows & (said == number)).sum())
        assert (part.name, part.rows) == ("abc"[number], rows.sum())
        assert part.accuracy == part.agreement == pytest.approx(hits / rows.sum())
        assert part.f1 == pytest.approx(2 * hits / (rows.sum() + (said == number).sum()))
    assert (found[3].rows, found[3].accuracy, found[3].f1, found[3].agreement) == (0, None, None, None)
