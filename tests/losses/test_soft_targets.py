"""Logit losses against slow float64 references written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from softlabels.losses import FIELDS, HARD, LOSSES
from softlabels.types import NO_LABEL, Signals


def signals(logits: torch.Tensor, labels: list[int] | None = None) -> Signals:
    rows = len(logits)
    mask = torch.ones(rows, 1, dtype=torch.int64)
    return Signals({"logits": logits}, mask, torch.tensor(labels if labels is not None else [NO_LABEL] * rows))


def softmax(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    powers = [math.exp((value - top) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def reference(name: str, student: torch.Tensor, teacher: torch.Tensor, labels: list[int], temperature: float) -> float:
    total = 0.0
    for zs, zt, label in zip(student.tolist(), teacher.tolist(), labels, strict=True):
        p, q = softmax(zt, temperature), softmax(zs, temperature)
        if name == "kl":
            total += temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        elif name == "reverse_kl":
            total += temperature**2 * sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))
        elif name == "soft_cross_entropy":
            total += -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        elif name == "mse_logits":
            total += sum((a - b) ** 2 for a, b in zip(zt, zs, strict=True))
        elif label != NO_LABEL:
            total += -math.log(softmax(zs, 1.0)[label])
    return total / len(labels)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
def test_equals_the_formula_in_float64(name: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(7, 5, generator=generator, dtype=torch.float64) * 4
    teacher = torch.randn(7, 5, generator=generator, dtype=torch.float64) * 4
    labels = [0, 4, NO_LABEL, 2, 2, NO_LABEL, 1]
    got = LOSSES[name](signals(student, labels), signals(teacher, labels), temperature=temperature)
    assert got.item() == pytest.approx(reference(name, student, teacher, labels, temperature), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    labels = [1, NO_LABEL, 3]

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](signals(logits, labels), signals(teacher, labels), temperature=2.5)

    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("name", ["kl", "mse_logits"])
def test_nothing_is_lost_between_equals(name: str) -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(5)) * 10
    assert LOSSES[name](signals(logits), signals(logits.clone()), temperature=4.0).item() == pytest.approx(
        0.0, abs=1e-5
    )


def test_soft_cross_entropy_is_the_entropy_between_equals() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits / 2).entropy().mean()
    got = LOSSES["soft_cross_entropy"](signals(logits), signals(logits), temperature=2.0)
    assert got.item() == pytest.approx(entropy.item(), rel=1e-12)


def test_kl_gradient_keeps_its_size_as_the_temperature_grows() -> None:
    """Hinton's T²: at a high T the gradient is that of ‖zt − zs‖²/(2C) of centred logits, whatever T is."""
    generator = torch.Generator().manual_seed(7)
    teacher, start = torch.randn(1, 6, generator=generator).double(), torch.randn(1, 6, generator=generator).double()

    def gradient(temperature: float) -> torch.Tensor:
        student = start.clone().requires_grad_()
        LOSSES["kl"](signals(student), signals(teacher), temperature=temperature).backward()
        assert student.grad is not None
        return student.grad

    centred = ((start - start.mean()) - (teacher - teacher.mean())) / 6
    assert torch.allclose(gradient(1e4), centred, atol=1e-3)
    assert torch.allclose(gradient(1e5), centred, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_stay_finite(name: str) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = LOSSES[name](signals(student, [1]), signals(torch.tensor([[-1e4, 1e4, 0.0]]), [1]), temperature=0.5)
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_a_batch_without_labels_has_no_hard_term() -> None:
    student = torch.randn(4, 3, requires_grad=True)
    loss = LOSSES["ce"](signals(student), signals(student.detach()), temperature=1.0)
    loss.backward()
    assert loss.item() == 0.0 and student.grad is not None and not student.grad.any()


def test_every_soft_loss_says_what_it_reads() -> None:
    assert {name for name in LOSSES if not FIELDS[name]} == set(HARD)
