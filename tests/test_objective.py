"""The objective is the weighted sum it says it is, in value and in gradient, at the temperature of the moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from softlabels.config import Phase
from softlabels.errors import CacheError, ConfigError
from softlabels.objective import Objective, fill_in
from softlabels.types import NO_LABEL, Signals

LABELS = [0, 2, NO_LABEL, 1]


def build_objective(losses: dict[str, float], temperature: str) -> Objective:
    phase = Phase(losses=losses, temperature=temperature)
    terms = fill_in(phase, "sequence-classification", student_layers=None, teacher_layers=lambda: 0)
    return Objective(terms, [])


def signals(seed: int, **changes: Any) -> Signals:
    """Logits (4, 3) of one side, in float64."""
    logits = 3 * torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Signals({"logits": logits, **changes}, torch.ones(4, 1), torch.tensor(LABELS))


def reference(name: str, student: Signals, teacher: Signals, temperature: float) -> float:
    """The loss written from its formula, row by row."""
    total = 0.0
    for zs, zt, label in zip(student.logits, teacher.logits, LABELS, strict=True):
        p, q = (torch.softmax(z / temperature, 0) for z in (zt, zs))
        if name == "kl":
            total += temperature**2 * float((p * (p.log() - q.log())).sum())
        elif name == "reverse_kl":
            total += temperature**2 * float((q * (q.log() - p.log())).sum())
        elif name == "mse_logits":
            total += float(((zt - zs) ** 2).sum())
        elif name == "soft_cross_entropy":
            total += float(-(p * q.log()).sum())
        elif label != NO_LABEL:
            total += float(-torch.softmax(zs, 0)[label].log())
    return total / len(LABELS)


@pytest.mark.parametrize("temperature", ["1", "3"])
def test_the_weighted_sum_and_its_parts(temperature: str) -> None:
    student, teacher = signals(0), signals(1)
    weights = {"kl": 0.7, "reverse_kl": 0.4, "mse_logits": 0.01, "soft_cross_entropy": 2.0, "ce": 0.3}
    total, parts = build_objective(weights, temperature)(student, teacher, progress=0.5)
    for name, part in parts.items():
        assert part.item() == pytest.approx(reference(name, student, teacher, float(temperature)), rel=1e-12)
        assert not part.requires_grad
    assert total.item() == pytest.approx(sum(weights[name] * part.item() for name, part in parts.items()), rel=1e-12)


def test_the_gradient_of_a_mix_is_the_sum_of_the_gradients() -> None:
    teacher = signals(1)
    weights = {"kl": 0.7, "mse_logits": 0.01, "soft_cross_entropy": 2.0, "ce": 0.3}

    def gradient(chosen: dict[str, float]) -> torch.Tensor:
        logits = signals(0).logits.clone().requires_grad_()
        student = Signals({"logits": logits}, torch.ones(4, 1), torch.tensor(LABELS))
        loss, _ = build_objective(chosen, "4:2")(student, teacher, progress=0.25)
        (found,) = torch.autograd.grad(loss, logits)
        return found

    alone = sum((weight * gradient({name: 1.0}) for name, weight in weights.items()), torch.zeros(4, 3))
    assert torch.allclose(gradient(weights), alone, rtol=1e-12, atol=1e-15)
    assert gradient({"ce": 1.0})[2].abs().max() == 0  # the row without a label
    assert gradient(weights)[2].abs().max() > 0  # learns from the teacher all the same


def test_the_temperature_follows_the_progress() -> None:
    student, teacher = signals(0), signals(1)
    for schedule, at in (
        ("3", {0.0: 3, 0.4: 3, 1.0: 3}),
        ("5:1", {0.0: 5, 0.25: 4, 1.0: 1}),
        ("5:1:cosine", {0.0: 5, 0.5: 3, 1.0: 1}),
        ("5:1:step", {0.0: 5, 0.49: 5, 0.5: 1}),
    ):
        for progress, temperature in at.items():
            loss, _ = build_objective({"kl": 1.0}, schedule)(student, teacher, progress=progress)
            assert loss.item() == pytest.approx(reference("kl", student, teacher, temperature), rel=1e-9)
    hard = [build_objective({"ce": 1.0}, "5:1")(student, teacher, progress=p)[0].item() for p in (0.0, 1.0)]
    assert hard[0] == hard[1]  # labels have no temperature


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    logits = signals(0).logits.clone().requires_grad_()
    student = Signals({"logits": logits}, torch.ones(4, 1), torch.tensor(LABELS))
    loss, _ = build_objective({"kl": 1.0, "mse_logits": 1.0}, "2")(student, signals(0), progress=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("losses", "needs_teacher", "needs_labels"),
    [
        ({"ce": 1.0}, False, True),
        ({"kl": 1.0}, True, False),
        ({"kl": 0.7, "ce": 0.3}, True, True),
        ({"kl": 1.0, "mse_logits": 1.0, "soft_cross_entropy": 1.0}, True, False),
    ],
)
def test_what_an_objective_needs(losses: dict[str, float], needs_teacher: bool, needs_labels: bool) -> None:
    objective = build_objective(losses, "1")
    assert (objective.needs_teacher, objective.needs_labels) == (needs_teacher, needs_labels)


def test_hard_labels_alone_never_look_at_the_teacher() -> None:
    nothing = Signals({}, torch.ones(4, 1), torch.tensor(LABELS))
    loss, parts = build_objective({"ce": 1.0}, "5:1")(signals(0), nothing, progress=0.0)
    labelled = [row for row, label in enumerate(LABELS) if label != NO_LABEL]
    wanted = functional.cross_entropy(signals(0).logits[labelled], torch.tensor(LABELS)[labelled], reduction="sum") / 4
    assert loss.item() == pytest.approx(wanted.item()) and set(parts) == {"ce"}
    with pytest.raises(CacheError, match="asks for field 'logits'"):
        build_objective({"kl": 1.0}, "1")(signals(0), nothing, progress=0.0)


def test_a_temperature_that_is_none_is_refused() -> None:
    for text in ("0", "-1", "5:0", "nan", "inf", "warm", "1:2:3:4", "5:1:sine"):
        with pytest.raises(ConfigError, match="temperature"):
            build_objective({"kl": 1.0}, text)
