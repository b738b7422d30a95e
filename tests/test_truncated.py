"""Truncated logits against the complete ones: the top is the top, the tail's mass is right at every temperature."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softlabels.errors import ConfigError, TeacherError
from softlabels.truncated import (
    SAMPLE_TEMPERATURES,
    TEMPERATURES,
    concatenate,
    sample_weights,
    tail_logsumexp_at,
    tail_mass_at,
    tail_mean_at,
    truncate,
    use_fewer,
)

ASKED = [0.5, 0.6, 0.7, 0.8, 1.0, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0]
HOT = [9.0, 12.0, 20.0, 100.0]


def language_logits(positions: int, vocab_size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits shaped like a language model's: a wide bulk far from 0, and a few candidates high above it."""
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.randn(positions, vocab_size, generator=generator, dtype=torch.float64) * 2.2 - 35
    heights = torch.rand(positions, 1, generator=generator, dtype=torch.float64) * 12
    return (bulk + heights * torch.rand(positions, vocab_size, generator=generator).double() ** 40).to(dtype)


def true_tail(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """(T,) log-sum-exp of z/τ over the columns not in `ids`, in float64."""
    rest = logits.double().scatter(1, ids, -math.inf)
    return (rest / temperature).logsumexp(dim=1)


def true_mass(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return (true_tail(logits, ids, temperature) - (logits.double() / temperature).logsumexp(dim=1)).exp()


# -------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("temperature", ASKED)
def test_the_tails_mean_is_right_at_every_temperature(temperature: float) -> None:
    logits = language_logits(20, 3000)
    truncated = truncate(logits, k=32)
    p = (logits.double().scatter(1, truncated.ids, -math.inf) / temperature).softmax(1)
    off = (tail_mean_at(truncated, temperature) - (p * logits.double()).sum(1)).abs().max().item()
    assert off < (1e-4 if temperature in TEMPERATURES else 0.05)


def test_the_top_is_sorted_and_the_nodes_are_exact() -> None:
    logits = language_logits(9, 700, dtype=torch.float64)
    got = truncate(logits, k=20)
    order = logits.argsort(dim=1, descending=True)
    assert torch.equal(got.ids, order[:, :20]) and torch.equal(got.values, logits.gather(1, order)[:, :20])
    assert (got.k, got.samples, got.vocab_size, got.tail_count) == (20, 0, 700, 680)
    for row in range(9):
        tail = [logits[row, v].item() for v in order[row, 20:].tolist()]
        for node, temperature in enumerate(TEMPERATURES):
            powers = [math.exp((z - max(tail)) / temperature) for z in tail]
            mean = sum(a * z for a, z in zip(powers, tail, strict=True)) / sum(powers)
            assert got.tail_logsumexp[row, node].item() == pytest.approx(
                math.log(sum(powers)) + max(tail) / temperature, abs=1e-9
            )
            assert got.tail_mean[row, node].item() == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_is_enough_for_the_nodes(dtype: torch.dtype) -> None:
    logits = language_logits(40, 3000, dtype=dtype)
    got = truncate(logits, k=32)
    exact = truncate(logits.double(), k=32)
    assert got.values.dtype == got.tail_mean.dtype == torch.float32
    assert torch.equal(got.values.double(), exact.values)
    assert torch.allclose(got.tail_logsumexp.double(), exact.tail_logsumexp, atol=2e-5)
    assert torch.allclose(got.tail_mean.double(), exact.tail_mean, atol=2e-5)


def test_the_same_in_chunks_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, draws = language_logits(11, 500), torch.rand(11, 3, generator=torch.Generator().manual_seed(1))
    whole = truncate(logits, k=8, samples=3, draws=draws)
    parts = concatenate([truncate(logits[a:b], k=8, samples=3, draws=draws[a:b]) for a, b in [(0, 4), (4, 5), (5, 11)]])
    monkeypatch.setattr("softlabels.truncated._CHUNK", {"cpu": 1100})
    chunked = truncate(logits, k=8, samples=3, draws=draws)
    for other in (parts, chunked):
        assert torch.equal(whole.ids, other.ids) and torch.equal(whole.sampled_ids, other.sampled_ids)
        assert torch.allclose(whole.tail_logsumexp, other.tail_logsumexp, atol=1e-5)
        assert torch.allclose(whole.sampled_weights, other.sampled_weights, rtol=1e-4)


def test_no_positions() -> None:
    got = truncate(torch.empty(0, 50), k=4, samples=2, generator=torch.Generator())
    assert got.ids.shape == (0, 4) and got.sampled_weights.shape == (0, 2) and got.tail_mean.shape == (0, 5)
    assert tail_logsumexp_at(use_fewer(got, 2), 1.3).shape == (0,)


# ------------------------------------------------------------------------------------------- at any temperature


@pytest.mark.parametrize("temperature", ASKED + HOT)
def test_tail_mass_at_any_temperature(temperature: float) -> None:
    logits = language_logits(200, 4000)
    got = truncate(logits, k=32)
    error = (tail_mass_at(got, temperature) - true_mass(logits, got.ids, temperature)).abs().max().item()
    assert error < (2e-6 if temperature in TEMPERATURES else 6e-4)


def test_the_interpolant_goes_through_values_and_slopes() -> None:
    got = truncate(language_logits(5, 900, dtype=torch.float64), k=10)
    for node, temperature in enumerate(TEMPERATURES):
        for side in (-1e-6, 1e-6):
            if temperature == 0.5 and side > 0:
                continue
            near = tail_logsumexp_at(got, 1 / (1 / temperature + side))
            slope = (near - got.tail_logsumexp[:, node]) / side
            assert torch.allclose(slope, got.tail_mean[:, node], rtol=1e-4)


def test_the_interpolant_is_that_polynomial() -> None:
    """Between τ = 1 and 2, against the degree-7 polynomial in x = 1/(1 + β), found by solving for its coefficients."""
    got = truncate(language_logits(5, 900, dtype=torch.float64), k=10)
    edge = got.values[:, -1:]
    powers = torch.arange(8, dtype=torch.float64)
    betas = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=torch.float64)  # τ = 4, 2, 1, 0.5
    x = (1 / (1 + betas))[:, None]
    matrix = torch.cat([x**powers, powers * x ** (powers - 1).clamp(min=0)])
    values = got.tail_logsumexp[:, [3, 2, 1, 0]] - betas * edge
    slopes = (got.tail_mean[:, [3, 2, 1, 0]] - edge) / (-1 / (1 + betas) ** 2)
    coefficients = torch.linalg.solve(matrix, torch.cat([values, slopes], dim=1).T)
    beta = 1 / 1.3
    expected = ((1 / (1 + beta)) ** powers) @ coefficients + beta * edge[:, 0]
    assert torch.allclose(tail_logsumexp_at(got, 1.3), expected, atol=1e-8)


def test_infinitely_hot_is_the_count() -> None:
    got = truncate(language_logits(4, 640, dtype=torch.float64), k=40)
    assert torch.allclose(tail_logsumexp_at(got, 1e9), torch.full((4,), math.log(600), dtype=torch.float64), atol=1e-6)
    assert torch.allclose(tail_mass_at(got, 1e9), torch.full((4,), 600 / 640, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.49, 0.0, -1.0, math.nan, math.inf])
def test_colder_than_the_lowest_node_is_refused(temperature: float) -> None:
    got = truncate(language_logits(2, 64), k=4)
    with pytest.raises(ConfigError, match=r"give one from 0\.5 up"):
        tail_logsumexp_at(got, temperature)


# --------------------------------------------------------------------------------------------------------- fewer


@pytest.mark.parametrize("fewer", [1, 5, 31])
def test_fewer_is_as_if_truncated_so(fewer: int) -> None:
    logits = language_logits(30, 2000, dtype=torch.float64)
    got, direct = use_fewer(truncate(logits, k=32), fewer), truncate(logits, k=fewer)
    assert torch.equal(got.ids, direct.ids) and got.tail_count == direct.tail_count
    assert torch.allclose(got.tail_logsumexp, direct.tail_logsumexp, atol=1e-9)
    assert torch.allclose(got.tail_mean, direct.tail_mean, atol=1e-9)


def test_fewer_samples_stay_unbiased() -> None:
    """Over every possible sample, as below; the moved tokens have weight 1."""
    logits = language_logits(1, 40, dtype=torch.float64)
    got = use_fewer(every_sample(logits, k=9, samples=3), 5)
    g = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    chances = proposals(logits, 9, 3)
    drawn, moved = got.sampled_ids[:, :3], got.sampled_ids[:, 3:]
    estimate = (chances * got.sampled_weights[:, :3] * g[drawn]).sum() + g[moved[0]].sum()
    assert torch.equal(got.sampled_weights[:, 3:], torch.ones(31, 4, dtype=torch.float64))
    assert estimate.item() == pytest.approx(g.sum().item() - g[got.ids[0]].sum().item(), rel=1e-10)


@pytest.mark.parametrize("k", [0, 9])
def test_more_than_there_are(k: int) -> None:
    with pytest.raises(ConfigError, match="give 1 to 8"):
        use_fewer(truncate(language_logits(2, 64), k=8), k)


# ------------------------------------------------------------------------------------------------------- samples


def proposals(logits: Tensor, k: int, samples: int) -> Tensor:
    """(V − k, samples): the chance of each tail token, in order of ids, to be sample s."""
    ids = logits[0].topk(k).indices
    tail = logits[0].scatter(0, ids, -math.inf)
    tail = tail[~torch.isinf(tail)]
    return torch.stack([torch.softmax(tail / SAMPLE_TEMPERATURES[s % 4], dim=0) for s in range(samples)], dim=1)


def every_sample(logits: Tensor, k: int, samples: int):
    """One position, as often as it has tail tokens; the samples of row v are all the v-th tail token."""
    from dataclasses import replace

    count = logits.shape[1] - k
    base = truncate(logits.expand(count, -1), k=k)
    outside = torch.ones(logits.shape[1], dtype=torch.bool).scatter(0, base.ids[0], False)
    ids = outside.nonzero().expand(-1, samples)
    values = logits[0][ids]
    return replace(
        base,
        sampled_ids=ids,
        sampled_values=values,
        sampled_weights=sample_weights(values, base.tail_logsumexp),
    )


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 7])
def test_weights_are_unbiased(samples: int) -> None:
    """E Σ_s w_s·g(v_s) = Σ_s Σ_v chance_s(v)·w(v)·g(v), summed over every v, is Σ g(v) over the tail."""
    logits = language_logits(1, 60, dtype=torch.float64)
    every = every_sample(logits, k=6, samples=samples)
    g = torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expectation = (proposals(logits, 6, samples) * every.sampled_weights * g[every.sampled_ids]).sum().item()
    assert expectation == pytest.approx(g.sum().item() - g[every.ids[0]].sum().item(), rel=1e-10)


def test_samples_are_drawn_with_the_chances_that_their_weights_suppose() -> None:
    """50,000 draws of one position against the four proposals, by a chi-squared test at 5 standard deviations."""
    logits, rows = language_logits(1, 300), 50_000
    draws = torch.rand(rows, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got = truncate(logits.expand(rows, -1), k=10, samples=4, draws=draws)
    kept = torch.ones(300, dtype=torch.bool).scatter(0, got.ids[0], False)
    chances = proposals(logits.double(), 10, 4)
    for s in range(4):
        counts = torch.bincount(got.sampled_ids[:, s], minlength=300)
        assert counts[~kept].sum() == 0
        expected = chances[:, s] * rows
        chi = ((counts[kept] - expected) ** 2 / expected)[expected > 5].sum().item()
        freedom = int((expected > 5).sum())
        assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom) + 5
    assert torch.equal(got.sampled_values, logits.expand(rows, -1).gather(1, got.sampled_ids))


@pytest.mark.parametrize("draw", [0.0, 1e-300, 0.5, 1.0 - 2**-53])
def test_extreme_draws_stay_in_the_tail(draw: float) -> None:
    logits = language_logits(20, 1000)
    logits[:, :3] = -math.inf
    logits[:, -3:] = -math.inf
    logits[:, 3] = 5  # the first column that isn't padding is in the top
    got = truncate(logits, k=5, samples=4, draws=torch.full((20, 4), draw, dtype=torch.float64))
    assert bool(torch.isfinite(got.sampled_values).all()) and bool(torch.isfinite(got.sampled_weights).all())
    assert not (got.sampled_ids[:, :, None] == got.ids[:, None, :]).any()


def test_the_seed_decides() -> None:
    logits = language_logits(50, 400)
    one, same, other = (
        truncate(logits, k=4, samples=2, generator=torch.Generator().manual_seed(seed)).sampled_ids
        for seed in (7, 7, 8)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


# ------------------------------------------------------------------------------------------ padding and bad input


@pytest.mark.parametrize("padding", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_padded_columns_hold_nothing(padding: float) -> None:
    logits = language_logits(6, 512)
    padded = torch.cat([logits, torch.full((6, 40), padding)], dim=1)
    got, bare = truncate(padded, k=16), truncate(logits, k=16)
    assert (got.vocab_size, got.masked, got.tail_count) == (552, 40, bare.tail_count)
    assert torch.allclose(got.tail_logsumexp, bare.tail_logsumexp, atol=1e-5)
    assert torch.allclose(got.tail_mean, bare.tail_mean, atol=1e-5)
    assert torch.allclose(tail_logsumexp_at(got, 30.0), tail_logsumexp_at(bare, 30.0), atol=1e-5)


def test_padding_that_changes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = language_logits(6, 512)
    logits[4, 7] = -math.inf
    with pytest.raises(ConfigError, match="same columns at every position"):
        truncate(logits, k=16)
    monkeypatch.setattr("softlabels.truncated._CHUNK", {"cpu": 512})
    with pytest.raises(ConfigError, match="same at every position"):
        truncate(logits, k=16)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits(value: float) -> None:
    logits = language_logits(6, 512)
    logits[3, 100] = value
    with pytest.raises(TeacherError, match="NaN or infinite"):
        truncate(logits, k=16)


def test_no_tail_is_refused() -> None:
    with pytest.raises(ConfigError, match="give 1 to 63"):
        truncate(language_logits(2, 64), k=64)
    logits = language_logits(2, 64)
    logits[:, 8:] = -math.inf
    with pytest.raises(ConfigError, match="smaller k"):
        truncate(logits, k=8)
    assert truncate(logits, k=7).tail_count == 1


def test_samples_need_a_seed() -> None:
    with pytest.raises(ConfigError, match="generator"):
        truncate(language_logits(2, 64), k=8, samples=1)
    with pytest.raises(ConfigError, match="draws are"):
        truncate(language_logits(2, 64), k=8, samples=1, draws=torch.rand(2, 3))


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(0, 30),
    offset=st.floats(-500, 500),
    vocab_size=st.integers(3, 700),
    k=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    temperature=st.sampled_from(TEMPERATURES),
)
def test_any_logits_at_the_nodes(
    scale: float, offset: float, vocab_size: int, k: int, seed: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, vocab_size, generator=generator) * scale + offset
    got = truncate(logits, k=min(k, vocab_size - 1), samples=2, generator=generator)
    truth = true_mass(logits, got.ids, temperature)
    assert torch.allclose(tail_mass_at(got, temperature).double(), truth, atol=3e-4 if abs(offset) > 100 else 3e-5)
    assert bool((got.sampled_values <= got.values[:, -1:]).all())
