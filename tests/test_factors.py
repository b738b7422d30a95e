"""A teacher's factors: what they expect of a tail, against the truth and against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.factors import LogitFactors, fit_factors

VOCABULARY, TRUE_RANK = 300, 6


def logits(positions: int, *, seed: int, noise: float = 0.0) -> Tensor:
    """Of rank TRUE_RANK but for a mean, a shift a position and `noise`."""
    fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    mean = torch.randn(VOCABULARY, generator=fixed) * 2
    loadings = torch.randn(VOCABULARY, TRUE_RANK, generator=fixed)
    c = torch.randn(positions, TRUE_RANK, generator=own)
    shift = torch.randn(positions, 1, generator=own) * 10
    return shift + mean + c @ loadings.T + noise * torch.randn(positions, VOCABULARY, generator=own)


def tail_off(factors: LogitFactors, z: Tensor, *, k: int, temperature: float) -> float:
    """The mean total variation between the tail and what is expected of it, both made to sum to 1."""
    values, ids = z.topk(k, dim=1)
    true = (z / temperature).scatter(1, ids, -math.inf).softmax(1)
    expected = factors.expect(ids, values, tail_mean=(true * z).sum(1), temperature=temperature)
    assert bool(torch.isneginf(expected.gather(1, ids)).all())
    return (true - expected.softmax(1)).abs().sum(1).mean().item() / 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_logits_of_low_rank_follow_from_their_top(temperature: float) -> None:
    factors = fit_factors(logits(200, seed=1), rank=16)
    assert TRUE_RANK <= factors.loadings.shape[1] <= TRUE_RANK + 1  # a component more may be the shifts' rounding
    assert tail_off(factors, logits(50, seed=2), k=16, temperature=temperature) < 0.05


def test_more_factors_expect_better() -> None:
    sample, other = logits(300, seed=3, noise=0.1), logits(50, seed=4, noise=0.1)
    off = [tail_off(fit_factors(sample, rank=rank), other, k=24, temperature=2.0) for rank in (2, 4, 6)]
    assert off == sorted(off, reverse=True) and off[-1] < 0.4 * off[0]


def test_from_the_top_follows_the_posterior_mean() -> None:
    """By the slow way: the prior of the shift very wide, the joint Gaussian conditioned on the top, float64.

    The tail's mean is given as what it is expected to be, and so changes nothing.
    """
    z = logits(3, seed=5, noise=0.3).double()
    factors = fit_factors(logits(100, seed=6, noise=0.3), rank=4)
    values, ids = z.topk(9, dim=1)
    mean, loadings, noise = factors.mean.double(), factors.loadings.double(), factors.noise.double()
    covariance = loadings @ loadings.T + torch.diag(noise) + 1e6
    for row in range(3):
        known = ids[row]
        gain = covariance[:, known] @ torch.linalg.inv(covariance[known][:, known])
        wanted = (mean + gain @ (values[row] - mean[known])).clamp(max=values[row, -1].item())
        r = (wanted / 1.5 + noise / (2 * 1.5**2)).scatter(0, known, -math.inf).softmax(0)
        tail_mean = (r * (wanted + noise / 1.5)).sum()[None]
        expected = factors.expect(ids[row][None], values[row][None], tail_mean=tail_mean, temperature=1.5)[0]
        wanted = wanted / 1.5 + noise / (2 * 1.5**2)
        outside = torch.ones(VOCABULARY, dtype=torch.bool).scatter(0, known, False)
        assert torch.allclose(expected[outside], wanted[outside], atol=2e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_tails_mean_is_heeded(temperature: float) -> None:
    """With the true one the tail is expected better than with one that is off, whose mean goes along."""
    z, factors = logits(60, seed=11, noise=0.2), fit_factors(logits(300, seed=12, noise=0.2), rank=6)
    values, ids = z.topk(12, dim=1)
    true = (z / temperature).scatter(1, ids, -math.inf).softmax(1)
    mean, off, means = (true * z).sum(1), [], []
    for wrong in (0.0, 0.5, -0.5):
        scores = factors.expect(ids, values, tail_mean=mean + wrong, temperature=temperature)
        r, expected = scores.softmax(1), scores * temperature - factors.noise / (2 * temperature)
        off.append((true - r).abs().sum(1).mean().item())
        means.append((r * expected.scatter(1, ids, 0.0)).sum(1).mean().item())
    assert off[0] < min(off[1:]) and means[2] < means[0] < means[1]


def test_a_shift_changes_nothing() -> None:
    factors = fit_factors(logits(100, seed=7), rank=8)
    values, ids = logits(4, seed=8).topk(10, dim=1)
    one, other = (
        factors.expect(ids, values + shift, tail_mean=values[:, -1] - 2 + shift, temperature=2.0).softmax(1)
        for shift in (0.0, 40.0)
    )
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("positions", [1, 2])
def test_of_few_positions_or_constant_ones(positions: int) -> None:
    for sample in (logits(positions, seed=9), torch.zeros(positions, VOCABULARY)):
        factors = fit_factors(sample, rank=32)
        assert factors.loadings.shape[1] < positions or not sample.any()
        assert bool((factors.noise > 0).all())
        values, ids = logits(5, seed=10).topk(3, dim=1)
        expected = factors.expect(ids, values, tail_mean=values[:, -1] - 3, temperature=1.0)
        assert bool(torch.isfinite(expected.softmax(1)).all())


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ConfigError, match="0 rows"):
        fit_factors(torch.empty(0, 10), rank=2)
    with pytest.raises(ConfigError, match="every logit finite"):
        fit_factors(torch.full((2, 10), math.nan), rank=2)
