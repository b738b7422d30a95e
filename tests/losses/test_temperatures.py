"""Temperatures of a row's own: their formula, their mean, and that they stay usable."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from softlabels.losses.soft_targets import kl
from softlabels.losses.temperatures import cwsm, flsw
from softlabels.types import NO_LABEL, Signals


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(kind: str, student: list[list[float]], teacher: list[list[float]]) -> list[float]:
    found = []
    for zs, zt in zip(student, teacher, strict=True):
        if kind == "flsw":
            ns, nt = (math.sqrt(sum(z * z for z in side)) + 1e-4 for side in (zs, zt))
            found.append((1 - sum(a * b for a, b in zip(zs, zt, strict=True)) / ns / nt) ** 1.5)
        else:
            powers = [math.exp(z) for z in zs]
            found.append(1 / (max(powers) / sum(powers) + 1e-3))
    return found


def temperatures(kind: str, student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> torch.Tensor:
    if kind == "flsw":
        return flsw(student, teacher, gamma=1.5, **options)
    return cwsm(student, teacher, **options)


@pytest.mark.parametrize("kind", ["flsw", "cwsm"])
def test_equal_the_formula(kind: str) -> None:
    student, teacher = logits(1, 6, 4).requires_grad_(), logits(2, 6, 4)
    got = temperatures(kind, student, teacher, base=5.0, beta=0.8)
    w = weights(kind, student.tolist(), teacher.tolist())
    assert got.tolist() == pytest.approx([5 + (sum(w) / len(w) - one) * 0.8 for one in w], rel=1e-12)
    assert not got.requires_grad and got.mean().item() == pytest.approx(5)


@pytest.mark.parametrize("kind", ["flsw", "cwsm"])
def test_tokens_have_their_own_and_padding_has_no_say(kind: str) -> None:
    student, teacher = logits(3, 2, 4, 3), logits(4, 2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    real = mask != 0
    student, teacher = (side.masked_fill(~real[:, :, None], float("nan")) for side in (student, teacher))
    options: dict[str, Any] = {"base": 4.0, "beta": 0.5}
    got = flsw(student, teacher, mask=mask, **options) if kind == "flsw" else cwsm(student, mask=mask, **options)
    flat = (student[real], teacher[real])
    wanted = flsw(*flat, **options) if kind == "flsw" else cwsm(*flat, **options)
    assert got.shape == (2, 4) and torch.allclose(got[real], wanted)
    sides = [Signals({"logits": side}, mask, torch.full((2, 4), NO_LABEL)) for side in (student, teacher)]
    rows = [Signals({"logits": side}, torch.ones(6, 1), torch.full((6,), NO_LABEL)) for side in flat]
    assert kl(*sides, temperature=got).item() == pytest.approx(kl(*rows, temperature=wanted).item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["flsw", "cwsm"])
def test_they_never_fall_to_nothing(kind: str) -> None:
    got = temperatures(kind, logits(5, 9, 4), logits(6, 9, 4), base=2.0, beta=1000.0)
    assert got.min().item() == pytest.approx(0.2)


def test_agreement_within_rounding_is_a_number() -> None:
    """cos can come out above 1, and (1 − cos) to the power of 1.5 would be NaN."""
    for seed in range(20):
        same = (1e6 * logits(seed, 50, 3)).float()
        assert bool(flsw(same, same, base=4.0, gamma=1.5).isfinite().all())
