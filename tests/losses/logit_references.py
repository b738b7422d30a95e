"""Losses on logits, once more, slowly: loops over plain numbers, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

from softlabels.types import NO_LABEL

Vector = list[float]


def reference(
    name: str, student: list[Vector], teacher: list[Vector], labels: Sequence[int], temperatures: Sequence[float]
) -> float:
    """The mean over rows of the loss `name`, with its default options; of annealing_mse, max_temperature = 25."""
    if name == "dist":
        return correlations(student, teacher, temperatures)
    total = 0.0
    for zs, zt, label, temperature in zip(student, teacher, labels, temperatures, strict=True):
        total += one_row(name, zs, zt, label, temperature)
    return total / len(labels)


def softmax(row: Vector, temperature: float = 1.0) -> Vector:
    top = max(row)
    powers = [math.exp((value - top) / temperature) for value in row]
    return [power / math.fsum(powers) for power in powers]


def kl(p: Vector, q: Vector) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def mix(p: Vector, q: Vector, share: float) -> Vector:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def one_row(name: str, zs: Vector, zt: Vector, label: int, temperature: float) -> float:
    p, q = softmax(zt, temperature), softmax(zs, temperature)
    target = zt.index(max(zt)) if label == NO_LABEL else label
    if name == "kl":
        return temperature**2 * kl(p, q)
    if name == "reverse_kl":
        return temperature**2 * kl(q, p)
    if name == "soft_cross_entropy":
        return -math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True))
    if name == "mse_logits":
        return math.fsum((a - b) ** 2 for a, b in zip(zt, zs, strict=True))
    if name == "mae_logits":
        return math.fsum(abs(a - b) for a, b in zip(zt, zs, strict=True)) / len(zt)
    if name == "ce":
        return 0.0 if label == NO_LABEL else -math.log(softmax(zs)[label])
    if name == "pseudo_ce":
        return -math.log(softmax(zs)[target])
    if name == "jsd":
        middle = mix(p, q, 0.5)
        return 0.5 * kl(p, middle) + 0.5 * kl(q, middle)
    if name == "skew_kl":
        return kl(p, mix(p, q, 0.1))
    if name == "skew_reverse_kl":
        return kl(q, mix(q, p, 0.1))
    if name == "tvd":
        return math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    if name == "dkd":
        return temperature**2 * decoupled(p, q, target)
    if name == "annealing_mse":
        phi = 1 - (temperature - 1) / 25
        return math.fsum((b - phi * a) ** 2 for a, b in zip(zt, zs, strict=True))
    if name == "teacher_annealing":
        wanted = [0.5 * (c == target) + 0.5 * a for c, a in enumerate(softmax(zt))]
        return -math.fsum(a * math.log(b) for a, b in zip(wanted, softmax(zs), strict=True))
    raise AssertionError(f"no reference for {name}")


def decoupled(p: Vector, q: Vector, target: int) -> float:
    others = [c for c in range(len(p)) if c != target]
    rest_p, rest_q = math.fsum(p[c] for c in others), math.fsum(q[c] for c in others)
    first = kl([p[target], rest_p], [q[target], rest_q])
    second = kl([p[c] / rest_p for c in others], [q[c] / rest_q for c in others])
    return 1.0 * first + 8.0 * second


def correlations(student: list[Vector], teacher: list[Vector], temperatures: Sequence[float]) -> float:
    p = [softmax(row, temperature) for row, temperature in zip(teacher, temperatures, strict=True)]
    q = [softmax(row, temperature) for row, temperature in zip(student, temperatures, strict=True)]
    over_classes = [1 - pearson(a, b) for a, b in zip(p, q, strict=True)]
    columns = zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)
    over_rows = [1 - pearson(list(a), list(b)) for a, b in columns]
    return sum(over_classes) / len(over_classes) + sum(over_rows) / len(over_rows)


def pearson(a: Vector, b: Vector) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    a, b = [x - mean_a for x in a], [x - mean_b for x in b]
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(math.fsum(x * x for x in a) * math.fsum(x * x for x in b))
