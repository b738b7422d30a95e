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
    expected = factors.expect(ids, values, temperature=temperature)
    assert bool(torch.isneginf(expected.gather(1, ids)).all())
    true = (z / temperature).scatter(1, ids, -math.inf).softmax(1)
    return (true - expected.softmax(1)).abs().sum(1).mean().item() / 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_logits_of_low_rank_follow_from_their_top(temperature: float) -> None:
    factors = fit_factors(logits(200, seed=1), rank=16)
    assert TRUE_RANK <= factors.loadings.shape[1] <= TRUE_RANK + 1  # a component more may be the shifts' rounding
    assert tail_off(factors, logits(50, seed=2), k=16, temperature=temperature) < 0.05


def test_more_factors_expect_better() -> None:
    sample, other = logits(300, seed=3, noise=0.1), logits(50, seed=4, noise=0.1)
    off = [tail_off(fit_factors(sample, rank=rank), other, k=24, temperature=2.0) for rank in (0, 2, 4, 6)]
    assert off == sorted(off, reverse=True) and off[-1] < 0.4 * off[0]


def test_the_expectation_is_the_posterior_mean() -> None:
    """By the slow way: the prior of the shift very wide, the joint Gaussian conditioned on the top, float64."""
    z = logits(3, seed=5, noise=0.3).double()
    factors = fit_factors(logits(100, seed=6, noise=0.3), rank=4)
    values, ids = z.topk(9, dim=1)
    expected = factors.expect(ids, values, temperature=1.5)
    mean, loadings, noise = factors.mean.double(), factors.loadings.double(), factors.noise.double()
    covariance = loadings @ loadings.T + torch.diag(noise) + 1e6
    for row in range(3):
        known = ids[row]
        gain = covariance[:, known] @ torch.linalg.inv(covariance[known][:, known])
        wanted = (mean + gain @ (values[row] - mean[known])).clamp(max=values[row, -1].item())
        wanted = wanted / 1.5 + noise / (2 * 1.5**2)
        outside = torch.ones(VOCABULARY, dtype=torch.bool).scatter(0, known, False)
        assert torch.allclose(expected[row][outside], wanted[outside], atol=2e-3)


def test_a_shift_changes_nothing() -> None:
    factors = fit_factors(logits(100, seed=7), rank=8)
    values, ids = logits(4, seed=8).topk(10, dim=1)
    one, other = (factors.expect(ids, values + shift, temperature=2.0).softmax(1) for shift in (0.0, 40.0))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("positions", [1, 2])
def test_of_few_positions_or_constant_ones(positions: int) -> None:
    for sample in (logits(positions, seed=9), torch.zeros(positions, VOCABULARY)):
        factors = fit_factors(sample, rank=32)
        assert factors.loadings.shape[1] < positions or not sample.any()
        assert bool((factors.noise > 0).all())
        values, ids = logits(5, seed=10).topk(3, dim=1)
        assert bool(torch.isfinite(factors.expect(ids, values, temperature=1.0).softmax(1)).all())


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ConfigError, match="0 rows"):
        fit_factors(torch.empty(0, 10), rank=2)
    with pytest.raises(ConfigError, match="every logit finite"):
        fit_factors(torch.full((2, 10), math.nan), rank=2)
