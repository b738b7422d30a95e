"""Vocabulary losses against slow float64 references; the bucket's and the samples' promises."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.factors import LogitFactors, fit_factors
from softlabels.losses import vocab
from softlabels.truncated import (
    SAMPLE_TEMPERATURES,
    TEMPERATURES,
    TruncatedLogits,
    sample_weights,
    tail_logsumexp_at,
    tail_mean_at,
    truncate,
)

LOSSES: dict[str, Any] = {
    "kl": vocab.kl,
    "reverse_kl": vocab.reverse_kl,
    "cross_entropy": vocab.cross_entropy,
}
BETWEEN = [0.5, 0.7, 1.0, 1.3, 3.0, 8.0, 20.0]


def logits(positions: int, vocab_size: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(positions, vocab_size, generator=generator, dtype=torch.float64) * scale


def factors_of(vocab_size: int) -> LogitFactors:
    """Of other logits than those that are looked at: what they expect is off."""
    return fit_factors(logits(40, vocab_size, 100), rank=5)


def softmax(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    powers = [math.exp((value - top) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def formula(name: str, p: list[float], q: list[float], temperature: float) -> float:
    """Of one position, over the outcomes given."""
    if name == "kl":
        return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
    if name == "reverse_kl":
        return temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True) if b)
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True) if a)


def reference(name: str, student: Tensor, teacher: Tensor, temperature: float, k: int | None = None) -> float:
    """The mean over positions; with `k`, of the teacher's top k and the rest as one."""
    total = 0.0
    for zs, zt in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(zt, temperature), softmax(zs, temperature)
        if k is not None:
            order = sorted(range(len(zt)), key=lambda v: -zt[v])
            p = [p[v] for v in order[:k]] + [sum(p[v] for v in order[k:])]
            q = [q[v] for v in order[:k]] + [sum(q[v] for v in order[k:])]
        total += formula(name, p, q, temperature)
    return total / len(student)


# -------------------------------------------------------------------------------------------- the right figures


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.3, *BETWEEN])
def test_full_logits_equal_the_formula(name: str, temperature: float) -> None:
    student, teacher = logits(5, 30, 1), logits(5, 30, 2)
    got = LOSSES[name](student, teacher, temperature=temperature)
    assert got.item() == pytest.approx(reference(name, student, teacher, temperature), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", BETWEEN)
def test_bucket_equals_the_formula(name: str, temperature: float) -> None:
    student, teacher = logits(5, 200, 3), logits(5, 200, 4)
    got = LOSSES[name](student, truncate(teacher, k=12), temperature=temperature, tail="bucket")
    rel = 1e-9 if temperature in TEMPERATURES else 2e-3  # the tail's mass is interpolated
    assert got.item() == pytest.approx(reference(name, student, teacher, temperature, k=12), rel=rel)


def every_sample(teacher: Tensor, k: int, samples: int) -> TruncatedLogits:
    """One position as often as it has tail tokens: the samples of row v are all the v-th tail token."""
    count = teacher.shape[1] - k
    base = truncate(teacher.expand(count, -1), k=k)
    outside = torch.ones(teacher.shape[1], dtype=torch.bool).scatter(0, base.ids[0], False)
    ids = outside.nonzero().expand(-1, samples)
    values = teacher[0][ids]
    return replace(
        base, sampled_ids=ids, sampled_values=values, sampled_weights=sample_weights(values, base.tail_logsumexp)
    )


def expectation(
    name: str, student: Tensor, teacher: Tensor, temperature: float, samples: int, tail: str = "sampled"
) -> float:
    """The exact expectation over all draws of the loss at one position.

    The loss is linear in the samples, so sample s can be taken alone: its share of row v's loss (where every sample is
    token v, hence the weights of `samples` equal ones) with the chance that sample s is v.
    """
    every = replace(every_sample(teacher, 6, samples), factors=factors_of(teacher.shape[1]))
    tokens = every.sampled_values[:, 0]
    without = replace(every, sampled_weights=torch.zeros_like(every.sampled_weights))
    top = LOSSES[name](student, row(without, 0), temperature=temperature, tail=tail).item()
    total = top
    for s in range(samples):
        chances = torch.softmax(tokens / SAMPLE_TEMPERATURES[s % 4], dim=0).tolist()
        for v, chance in enumerate(chances):
            loss = LOSSES[name](student, row(every, v), temperature=temperature, tail=tail).item()
            total += chance * (loss - top) / samples
    return total


def row(truncated: TruncatedLogits, v: int) -> TruncatedLogits:
    parts = {
        name: getattr(truncated, name)[v : v + 1]
        for name in TruncatedLogits.__dataclass_fields__
        if isinstance(getattr(truncated, name), Tensor)
    }
    return replace(truncated, **parts)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("tail", "samples"), [("sampled", 1), ("sampled", 3), ("sampled", 5), ("factors", 2)])
def test_samples_are_unbiased(name: str, temperature: float, tail: str, samples: int) -> None:
    student, teacher = logits(1, 50, 5), logits(1, 50, 6)
    truth = LOSSES[name](student, teacher, temperature=temperature).item()
    assert expectation(name, student, teacher, temperature, samples, tail) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("tail", "temperature"), [("sampled", 1.3), ("sampled", 2.0), ("factors", 2.0)])
def test_drawn_samples_come_out_right_in_the_mean(name: str, tail: str, temperature: float) -> None:
    """20,000 draws in float32: each entry of the mean gradient within 5 standard errors of the full loss's."""
    rows = 20_000
    start, teacher = logits(1, 80, 7, 2.0), logits(1, 80, 8, 2.0)
    truncated = truncate(teacher.float().expand(rows, -1), k=8, samples=3, generator=torch.Generator().manual_seed(9))
    truncated = replace(truncated, factors=factors_of(80))
    many = start.float().repeat(rows, 1).requires_grad_()
    LOSSES[name](many, truncated, temperature=temperature, tail=tail).backward()
    full = start.clone().requires_grad_()
    LOSSES[name](full, teacher, temperature=temperature).backward()
    assert many.grad is not None and full.grad is not None
    each = many.grad.double() * rows  # the loss is the mean over rows
    error = (each.mean(0) - full.grad[0]).abs()
    assert bool((error < 5 * each.std(0) / math.sqrt(rows) + 1e-3 * full.grad.abs().max()).all())


# ------------------------------------------------------------------------------------------------------ promises


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3, 4.0])
def test_without_samples_the_tail_is_what_the_factors_expect(name: str, temperature: float) -> None:
    """The loss is that of full logits whose tail is r, of the teacher's mass."""
    student, teacher = logits(5, 60, 30), logits(5, 60, 31)
    truncated = replace(truncate(teacher, k=8), factors=factors_of(60))
    mean = tail_mean_at(truncated, temperature)
    expected = factors_of(60).expect(truncated.ids, truncated.values, tail_mean=mean, temperature=temperature)
    top = truncated.values / temperature
    rest = tail_logsumexp_at(truncated, temperature)[:, None]
    r = (expected.log_softmax(1) + rest).scatter(1, truncated.ids, top)  # scores at the temperature
    assert torch.allclose(r.logsumexp(1), torch.cat([top, rest], dim=1).logsumexp(1))
    got = LOSSES[name](student, truncated, temperature=temperature, tail="factors").item()
    assert got == pytest.approx(reference(name, student, r * temperature, temperature), rel=1e-8)


def test_the_nearer_the_factors_the_less_noise() -> None:
    """Of logits of low rank, which the top gives away, samples have nothing to correct; without factors they have."""
    rows, draw = 200, torch.Generator().manual_seed(5)
    base, loadings = logits(1, 120, 32), logits(3, 120, 33, 1.0)
    made = base + torch.randn(101, 3, generator=draw, dtype=torch.float64) @ loadings
    teacher, student = made[:1], logits(1, 120, 34, 0.5)
    truncated = truncate(teacher.expand(rows, -1), k=12, samples=2, generator=draw)
    truncated = replace(truncated, factors=fit_factors(made[1:], rank=3))
    spread = {}
    for tail in ("sampled", "factors"):
        many = student.repeat(rows, 1).requires_grad_()
        vocab.kl(many, truncated, temperature=2.0, tail=tail).backward()
        assert many.grad is not None
        spread[tail] = many.grad.var(dim=0).sum().item()
    assert spread["factors"] < 0.01 * spread["sampled"]


@pytest.mark.parametrize("tail", ["bucket", "sampled", "factors", "full"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_loss(name: str, tail: str) -> None:
    student, teacher = logits(2, 14, 10, 1.0).requires_grad_(), logits(2, 14, 11, 1.0)
    truncated = truncate(teacher, k=4, samples=2, generator=torch.Generator().manual_seed(1))
    truncated = replace(truncated, factors=factors_of(14))

    def loss(student: Tensor) -> Tensor:
        if tail == "full":
            return LOSSES[name](student, teacher, temperature=1.7)
        return LOSSES[name](student, truncated, temperature=1.7, tail=tail)

    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("tail", ["bucket", "sampled", "full"])
@pytest.mark.parametrize("temperature", BETWEEN)
@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_nothing_is_lost_between_equals(name: str, temperature: float, tail: str) -> None:
    """Nor is there a gradient; between the nodes both are as small as the interpolation's error, squared."""
    teacher = logits(20, 2000, 12, 2.5)
    student = teacher.clone().requires_grad_()
    truncated = truncate(teacher, k=16, samples=3, generator=torch.Generator().manual_seed(2))
    if tail == "full":
        loss = LOSSES[name](student, teacher, temperature=temperature)
    else:
        loss = LOSSES[name](student, truncated, temperature=temperature, tail=tail)
    loss.backward()
    exact = tail == "full" or temperature in TEMPERATURES
    assert abs(loss.item()) < (1e-12 if exact else 1e-5)
    assert student.grad is not None and student.grad.abs().max().item() * 20 < (1e-9 if exact else 3e-3)


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_bucket_is_below_the_full_loss_and_nears_it(name: str, temperature: float) -> None:
    student, teacher = logits(6, 300, 13), logits(6, 300, 14)
    full = LOSSES[name](student, teacher, temperature=temperature).item()
    buckets = [LOSSES[name](student, truncate(teacher, k=k), temperature=temperature).item() for k in (1, 10, 100, 299)]
    assert buckets == sorted(buckets)
    assert buckets[-1] == pytest.approx(full, rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_tail_is_never_renormalised_away(temperature: float) -> None:
    """A student that has the teacher's ratios inside the top k, and nothing outside, isn't at the optimum."""
    teacher = logits(4, 200, 15)
    truncated = truncate(teacher, k=10)
    student = torch.full_like(teacher, -1e3).scatter(1, truncated.ids, truncated.values).requires_grad_()
    vocab.kl(student, truncated, temperature=temperature).backward()
    grad = student.grad
    assert grad is not None
    mass = torch.softmax(teacher / temperature, 1).gather(1, truncated.ids).sum(1)
    pulled_down = grad.gather(1, truncated.ids).sum(1) * 4 / temperature
    assert torch.allclose(pulled_down, 1 - mass, atol=1e-6)


def test_temperature_squared_keeps_the_gradient() -> None:
    teacher, start = logits(3, 40, 16), logits(3, 40, 17)
    truncated = truncate(teacher, k=10)
    sizes = []
    for temperature in (1e3, 1e4):
        student = start.clone().requires_grad_()
        vocab.kl(student, truncated, temperature=temperature).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-2)


# ------------------------------------------------------------------------------------------------ hard numbers


@pytest.mark.parametrize("tail", ["bucket", "sampled", "full"])
@pytest.mark.parametrize("name", LOSSES)
def test_padded_entries_count_nothing(name: str, tail: str) -> None:
    student, teacher = logits(5, 60, 18), logits(5, 60, 19)
    pad = torch.full((5, 4), -math.inf, dtype=torch.float64)
    values = []
    for columns in ([], [pad]):
        live = torch.cat([student, *columns], dim=1).requires_grad_()
        wide = torch.cat([teacher, *columns], dim=1)
        draws = torch.rand(5, 2, generator=torch.Generator().manual_seed(3))
        target = wide if tail == "full" else truncate(wide, k=7, samples=2, draws=draws)
        options = {} if tail == "full" else {"tail": tail}
        loss = LOSSES[name](live, target, temperature=2.0, **options)
        loss.backward()
        assert live.grad is not None and bool(torch.isfinite(live.grad).all())
        assert not live.grad[:, 60:].any()
        values.append(loss.item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("name", ["kl", "cross_entropy"])
def test_the_student_may_give_what_the_teacher_has_not(name: str) -> None:
    """The teacher's −inf alone: p = 0 adds nothing, finite loss and gradient."""
    teacher, student = logits(3, 20, 20), logits(3, 20, 21).requires_grad_()
    teacher[:, 15:] = -math.inf
    for target in (teacher, truncate(teacher, k=5)):
        loss = LOSSES[name](student, target, temperature=1.0)
        (grad,) = torch.autograd.grad(loss, student)
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("tail", ["bucket", "sampled", "factors", "full"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sixteen_bits_and_large_logits_stay_finite(name: str, tail: str, dtype: torch.dtype) -> None:
    teacher = (logits(4, 100, 22) * 100).float()
    student = (logits(4, 100, 23) * 100).to(dtype).requires_grad_()
    truncated = truncate(teacher, k=9, samples=2, generator=torch.Generator().manual_seed(4))
    truncated = replace(truncated, factors=factors_of(100))
    if tail == "full":
        loss = LOSSES[name](student, teacher, temperature=0.5)
    else:
        loss = LOSSES[name](student, truncated, temperature=0.5, tail=tail)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None and bool(torch.isfinite(loss)) and bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("name", LOSSES)
def test_no_positions_cost_nothing(name: str) -> None:
    student = torch.randn(0, 30, requires_grad=True)
    truncated = replace(truncate(torch.empty(0, 30), k=3), factors=factors_of(30))
    for tail in ("bucket", "factors"):
        loss = LOSSES[name](student, truncated, temperature=2.0, tail=tail)
        loss.backward()
        assert loss.item() == 0.0


# ----------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_asked() -> None:
    student, teacher = logits(3, 20, 24), truncate(logits(3, 20, 25), k=5)
    with pytest.raises(ConfigError, match=r"0\.5 up"):
        vocab.kl(student, teacher, temperature=0.4)
    with pytest.raises(ConfigError, match="above 0"):
        vocab.kl(student, logits(3, 20, 25), temperature=0.0)
    with pytest.raises(ConfigError, match="sampled tail tokens"):
        vocab.kl(student, teacher, temperature=1.0, tail="sampled")
    with pytest.raises(ConfigError, match="'bucket', 'sampled' and 'factors'"):
        vocab.kl(student, teacher, temperature=1.0, tail="uniform")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="factors=32"):
        vocab.kl(student, teacher, temperature=1.0, tail="factors")
    with pytest.raises(ConfigError, match="of different teachers"):
        vocab.kl(student, replace(teacher, factors=factors_of(21)), temperature=1.0, tail="factors")
    for wrong in (student[:2], student[:, :19]):
        with pytest.raises(ConfigError, match=r"the teacher's \(3, 20\)"):
            vocab.kl(wrong, teacher, temperature=1.0)
        with pytest.raises(ConfigError, match=r"the teacher's \(3, 20\)"):
            vocab.kl(wrong, logits(3, 20, 25), temperature=1.0)


def test_the_teacher_gets_no_gradient_and_is_left_alone() -> None:
    student, full = logits(3, 20, 26).requires_grad_(), logits(3, 20, 27)
    teacher = truncate(full, k=5, samples=1, generator=torch.Generator())
    before = [teacher.values.clone(), tail_logsumexp_at(teacher, 1.3)]
    copy = student.detach().clone()
    vocab.kl(student, teacher, temperature=1.3, tail="sampled").backward()
    assert torch.equal(teacher.values, before[0]) and torch.equal(tail_logsumexp_at(teacher, 1.3), before[1])
    assert torch.equal(student, copy)
