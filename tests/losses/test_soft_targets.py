"""Logit losses against slow float64 references written from their formulas."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from softlabels.errors import ConfigError
from softlabels.losses import HARD, LAYER_LOSSES, LOSSES, NEEDS, PENALTIES
from softlabels.losses.annealing import annealing_mse
from softlabels.types import NO_LABEL, Signals
from tests.losses.logit_references import reference


def signals(logits: torch.Tensor, labels: list[int] | None = None) -> Signals:
    rows = len(logits)
    mask = torch.ones(rows, 1, dtype=torch.int64)
    return Signals({"logits": logits}, mask, torch.tensor(labels if labels is not None else [NO_LABEL] * rows))


# Options with which a loss takes every temperature here.
CALLS: dict[str, Any] = {**LOSSES, "annealing_mse": partial(annealing_mse, max_temperature=25.0)}
LABELLED = {"ce", "dkd", "pseudo_ce", "teacher_annealing"}  # the rest is 0 between equals, or an entropy
DISTANCES = [name for name in LOSSES if name not in {*LABELLED, "soft_cross_entropy", "annealing_mse"}] + ["dkd"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
def test_equals_the_formula_in_float64(name: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(7, 5, generator=generator, dtype=torch.float64) * 4
    teacher = torch.randn(7, 5, generator=generator, dtype=torch.float64) * 4
    labels = [0, 4, NO_LABEL, 2, 2, NO_LABEL, 1]
    got = CALLS[name](signals(student, labels), signals(teacher, labels), temperature=temperature)
    wanted = reference(name, student.tolist(), teacher.tolist(), labels, [temperature] * 7)
    assert wanted > 0 and got.item() == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "annealing_mse"])
def test_equals_the_formula_below_temperature_1(name: str) -> None:
    generator = torch.Generator().manual_seed(13)
    student, teacher = (torch.randn(4, 3, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    labels = [0, NO_LABEL, 2, 1]
    got = CALLS[name](signals(student, labels), signals(teacher, labels), temperature=0.5)
    wanted = reference(name, student.tolist(), teacher.tolist(), labels, [0.5] * 4)
    assert got.item() == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_a_temperature_a_row(name: str) -> None:
    generator = torch.Generator().manual_seed(14)
    student, teacher = (torch.randn(4, 3, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    labels, temperatures = [0, NO_LABEL, 2, 1], [1.0, 2.5, 4.0, 20.0]
    temperature = torch.tensor(temperatures, dtype=torch.float64)
    got = CALLS[name](signals(student, labels), signals(teacher, labels), temperature=temperature)
    wanted = reference(name, student.tolist(), teacher.tolist(), labels, temperatures)
    assert got.shape == () and got.item() == pytest.approx(wanted, rel=1e-11)
    same = CALLS[name](signals(student, labels), signals(teacher, labels), temperature=torch.full((4,), 3.0))
    assert same.item() == pytest.approx(
        CALLS[name](signals(student, labels), signals(teacher, labels), temperature=3.0).item(), rel=1e-6
    )


def tokens(seed: int, lengths: list[int], *, extra: int = 0, junk: float = 50.0) -> Signals:
    """A token classifier's logits (B, L, 3), junk at padding, some tokens without a label."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    logits = torch.randn(len(lengths), longest, 3, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(0, 3, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
    labels[:, 0] = NO_LABEL
    logits, labels = F.pad(logits, (0, 0, 0, extra)), F.pad(labels, (0, extra), value=1)
    mask = (torch.arange(longest + extra) < torch.tensor(lengths)[:, None]).long()
    return Signals({"logits": logits.masked_fill(mask[:, :, None] == 0, junk)}, mask, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_classifiers_rows_are_its_tokens(name: str) -> None:
    student, teacher = tokens(1, [3, 0, 4]), tokens(2, [3, 0, 4])
    real = student.mask != 0
    flat = student.logits[real].tolist(), teacher.logits[real].tolist()
    got = CALLS[name](student, teacher, temperature=2.0).item()
    assert got == pytest.approx(reference(name, *flat, student.labels[real].tolist(), [2.0] * 7), rel=1e-11)
    junk = [tokens(seed, [3, 0, 4], extra=3, junk=float("nan")) for seed in (1, 2)]
    assert CALLS[name](*junk, temperature=2.0).item() == pytest.approx(got, rel=1e-12)
    a_text = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    wanted = reference(name, *flat, student.labels[real].tolist(), [1.0] * 3 + [4.0] * 4)
    assert CALLS[name](student, teacher, temperature=a_text).item() == pytest.approx(wanted, rel=1e-11)
    a_token = a_text[:, None].expand(3, 4)
    assert CALLS[name](student, teacher, temperature=a_token).item() == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_but_padding_costs_nothing(name: str) -> None:
    both = tokens(3, [2, 2])
    logits = both.logits.clone().requires_grad_()
    student = Signals({"logits": logits}, torch.zeros_like(both.mask), both.labels)
    loss = CALLS[name](student, tokens(4, [2, 2]), temperature=2.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [2.5, torch.tensor([1.5, 2.5, 4.0], dtype=torch.float64)])
def test_gradients_are_those_of_the_loss(name: str, temperature: float | torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    labels = [1, NO_LABEL, 3]

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return CALLS[name](signals(logits, labels), signals(teacher, labels), temperature=temperature)

    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("name", DISTANCES)
def test_equals_cost_nothing_and_pull_nowhere(name: str) -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    student = logits.clone().requires_grad_()
    loss = LOSSES[name](signals(student), signals(logits), temperature=4.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-12) and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_that_both_sides_exclude_changes_nothing(name: str) -> None:
    """−inf on both sides; of losses over classes as such (dist, means over them) the value must only be finite."""
    generator = torch.Generator().manual_seed(15)
    student, teacher = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = [0, 1, NO_LABEL, 2, 1]
    without = CALLS[name](signals(student, labels), signals(teacher, labels), temperature=2.0).item()
    student, teacher = (F.pad(side, (0, 1), value=float("-inf")) for side in (student, teacher))
    student.requires_grad_()
    loss = CALLS[name](signals(student, labels), signals(teacher, labels), temperature=2.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert bool(gradient.isfinite().all()) and bool(loss.isfinite())
    if name not in ("dist", "annealing_mse", "mae_logits"):
        assert loss.item() == pytest.approx(without, rel=1e-9)


@pytest.mark.parametrize(
    "name", ["kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "dkd", "soft_cross_entropy"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_first(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(16)
    student, teacher = (torch.randn(5, 4, generator=generator).to(dtype) for _ in range(2))
    got = LOSSES[name](signals(student), signals(teacher), temperature=3.0)
    wanted = LOSSES[name](signals(student.double()), signals(teacher.double()), temperature=3.0)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_other_classes_are_refused() -> None:
    for name in LOSSES:
        if name not in HARD:
            with pytest.raises(ConfigError, match=r"student's logits are \(2, 3\), the teacher's \(2, 4\)"):
                LOSSES[name](signals(torch.zeros(2, 3)), signals(torch.zeros(2, 4)), temperature=1.0)


@pytest.mark.parametrize("name", sorted(LABELLED))
def test_labels_of_another_kind_are_refused(name: str) -> None:
    student = replace(signals(torch.zeros(2, 3)), labels=torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"a class for each row: logits \(2, 3\) came with labels \(2, 3\)"):
        LOSSES[name](student, signals(torch.zeros(2, 3)), temperature=1.0)


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
    temperature = 1.0 if name == "annealing_mse" else 0.5
    loss = LOSSES[name](signals(student, [1]), signals(torch.tensor([[-1e4, 1e4, 0.0]]), [1]), temperature=temperature)
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_a_batch_without_labels_has_no_hard_term() -> None:
    student = torch.randn(4, 3, requires_grad=True)
    loss = LOSSES["ce"](signals(student), signals(student.detach()), temperature=1.0)
    loss.backward()
    assert loss.item() == 0.0 and student.grad is not None and not student.grad.any()


def test_every_soft_loss_says_what_it_reads() -> None:
    assert {name for name in NEEDS if not NEEDS[name]} == {*HARD, *PENALTIES}
    assert NEEDS.keys() == LOSSES.keys() | LAYER_LOSSES.keys() | PENALTIES.keys()
