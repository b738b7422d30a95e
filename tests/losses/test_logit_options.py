"""The options of losses on logits, their ends, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from softlabels.errors import ConfigError
from softlabels.losses.annealing import annealing_mse, teacher_annealing
from softlabels.losses.decoupled import dkd
from softlabels.losses.dist import dist
from softlabels.losses.divergences import jsd, skew_kl, skew_reverse_kl
from softlabels.losses.soft_targets import ce, kl, mse_logits, reverse_kl, soft_cross_entropy
from softlabels.types import NO_LABEL, Signals


def pair(seed: int, rows: int = 6, classes: int = 4) -> tuple[Signals, Signals]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    student, teacher = (
        Signals(
            {"logits": 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)},
            torch.ones(rows, 1),
            labels,
        )
        for _ in range(2)
    )
    return student, teacher


def with_logits(signals: Signals, logits: torch.Tensor) -> Signals:
    return replace(signals, fields={"logits": logits})


# ------------------------------------------------------------------------------------------------ divergences


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_jsd_ends_in_the_two_kls(temperature: float) -> None:
    student, teacher = pair(1)
    square = temperature**2
    forward = kl(student, teacher, temperature=temperature).item() / square
    backward = reverse_kl(student, teacher, temperature=temperature).item() / square
    assert jsd(student, teacher, temperature=temperature, beta=0).item() == pytest.approx(forward, rel=1e-12)
    assert jsd(student, teacher, temperature=temperature, beta=1).item() == pytest.approx(backward, rel=1e-12)
    near = jsd(student, teacher, temperature=temperature, beta=1e-6).item() / 1e-6
    assert near == pytest.approx(forward, rel=1e-3)
    near = jsd(student, teacher, temperature=temperature, beta=1 - 1e-6).item() / 1e-6
    assert near == pytest.approx(backward, rel=1e-3)


def test_jsd_mixes_by_beta_and_is_symmetric_at_a_half() -> None:
    student, teacher = pair(2)
    for beta in (0.1, 0.5, 0.9):
        turned = jsd(teacher, student, temperature=2.0, beta=1 - beta).item()
        assert jsd(student, teacher, temperature=2.0, beta=beta).item() == pytest.approx(turned, rel=1e-12)


def test_skewed_kls_are_kls_without_skew_and_bounded_with_it() -> None:
    student, teacher = pair(3)
    forward, backward = (loss(student, teacher, temperature=1.0).item() for loss in (kl, reverse_kl))
    assert skew_kl(student, teacher, temperature=1.0, skew=0).item() == pytest.approx(forward, rel=1e-12)
    assert skew_reverse_kl(student, teacher, temperature=1.0, skew=0).item() == pytest.approx(backward, rel=1e-12)
    apart = (with_logits(side, side.logits * 1e3) for side in (student, teacher))
    student, teacher = apart
    assert kl(student, teacher, temperature=1.0).item() > 100
    for loss in (skew_kl, skew_reverse_kl):
        assert loss(student, teacher, temperature=1.0, skew=0.1).item() <= -math.log(0.1)


@pytest.mark.parametrize(("loss", "option"), [(jsd, "beta"), (skew_kl, "skew"), (skew_reverse_kl, "skew")])
def test_shares_outside_of_their_range_are_refused(loss, option) -> None:
    student, teacher = pair(4)
    for value in (-0.1, 1.1, float("nan"), *([1.0] if option == "skew" else [])):
        with pytest.raises(ConfigError, match=f"{option} is {value}, and must be a share"):
            loss(student, teacher, temperature=1.0, **{option: value})


# ---------------------------------------------------------------------------------------------- dkd and dist


def test_dkd_is_kl_cut_in_two() -> None:
    """KL = TCKD + (1 − p_target) · NCKD, row by row (Zhao et al. 2022)."""
    student, teacher = pair(5, rows=1)
    rest = 1 - F.softmax(teacher.logits / 3, dim=-1)[0, 0].item()
    assert dkd(student, teacher, temperature=3.0, alpha=1, beta=rest).item() == pytest.approx(
        kl(student, teacher, temperature=3.0).item(), rel=1e-10
    )


def test_without_a_label_the_teachers_choice_is_the_target() -> None:
    student, teacher = pair(6)
    chosen = teacher.logits.argmax(dim=-1)
    unlabelled = replace(student, labels=torch.full_like(chosen, NO_LABEL))
    labelled = replace(student, labels=chosen)
    for loss in (dkd, teacher_annealing):
        assert loss(unlabelled, teacher, temperature=2.0).item() == loss(labelled, teacher, temperature=2.0).item()
        assert loss(student, teacher, temperature=2.0).item() != loss(labelled, teacher, temperature=2.0).item()


def test_dkd_of_a_certain_teacher_is_finite() -> None:
    student, teacher = (with_logits(side, side.logits.float() * 1e4) for side in pair(7))
    student.logits.requires_grad_()
    loss = dkd(student, teacher, temperature=1.0)
    loss.backward()
    assert bool(loss.isfinite()) and student.logits.grad is not None and bool(student.logits.grad.isfinite().all())


@pytest.mark.parametrize(("loss", "why"), [(dkd, "always 0"), (dist, "correlate by 1 or −1")])
@pytest.mark.parametrize("classes", [1, 2])
def test_two_classes_are_refused_with_the_reason(loss, why, classes) -> None:
    student, teacher = pair(8, classes=classes)
    with pytest.raises(ConfigError, match=f"three classes or more, and there are {classes}: .*{why}.*Take kl instead"):
        loss(student, teacher, temperature=1.0)


def test_dist_weighs_its_two_terms() -> None:
    student, teacher = pair(9)
    rows = dist(student, teacher, temperature=2.0, beta=1, gamma=0).item()
    classes = dist(student, teacher, temperature=2.0, beta=0, gamma=1).item()
    assert dist(student, teacher, temperature=2.0, beta=2, gamma=3).item() == pytest.approx(2 * rows + 3 * classes)


def test_dist_asks_for_no_more_than_a_line() -> None:
    """Probabilities a·p + b, with one a > 0 and b, correlate as the teacher's own do."""
    student, teacher = pair(10)
    p = F.softmax(teacher.logits, dim=-1)
    squeezed = with_logits(student, (0.3 * p + 0.7 / 4).log())
    assert dist(squeezed, teacher, temperature=1.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_of_what_does_not_vary_is_finite_and_still(dtype: torch.dtype) -> None:
    student, teacher = (with_logits(side, side.logits.to(dtype)) for side in pair(11))
    one = [replace(side, fields={"logits": side.logits[:1]}, labels=side.labels[:1]) for side in (student, teacher)]
    assert dist(*one, temperature=1.0, beta=0).item() == 0  # classes have no two rows to correlate over
    assert dist(student, with_logits(teacher, torch.full_like(teacher.logits, 0.3)), temperature=1.0).item() == 0
    flat = torch.full_like(student.logits, 0.3).requires_grad_()
    loss = dist(with_logits(student, flat), teacher, temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2) and flat.grad is not None and not flat.grad.any()


def test_dist_sees_classes_of_tiny_probability() -> None:
    """What varies is told from rounding by its own size, not by a fixed epsilon."""
    student, teacher = pair(12)
    rare = torch.tensor([0.0, 0.0, 0.0, -40.0], dtype=torch.float64)
    same = with_logits(student, teacher.logits + rare)
    assert dist(same, same, temperature=1.0).item() == pytest.approx(0, abs=1e-9)
    other = with_logits(student, student.logits + rare)
    alone = dist(other, same, temperature=1.0, beta=0).item() * 4
    p, q = (F.softmax(side.logits, dim=-1)[:, 3] for side in (same, other))
    assert p.max() < 1e-12
    rare_part = 1 - torch.corrcoef(torch.stack([p, q]))[0, 1].item()
    rest = sum(
        1 - torch.corrcoef(torch.stack([F.softmax(s.logits, dim=-1)[:, c] for s in (same, other)]))[0, 1].item()
        for c in range(3)
    )
    assert alone == pytest.approx(rest + rare_part, rel=1e-9)


# ------------------------------------------------------------------------------------------------- annealing


def test_annealing_mse_starts_faint_and_ends_at_the_teachers_logits() -> None:
    student, teacher = pair(13)
    assert annealing_mse(student, teacher, temperature=1.0).item() == pytest.approx(
        mse_logits(student, teacher).item(), rel=1e-12
    )
    faint = with_logits(teacher, teacher.logits / 7)
    assert annealing_mse(student, teacher, temperature=7.0).item() == pytest.approx(
        mse_logits(student, faint).item(), rel=1e-12
    )
    for temperature in (0.5, 7.5):
        with pytest.raises(
            ConfigError, match=f"temperature {temperature}: it must be 1 to max_temperature, which is 7"
        ):
            annealing_mse(student, teacher, temperature=temperature)


def test_teacher_annealing_goes_from_the_teacher_to_the_labels() -> None:
    student, teacher = pair(14)
    soft = soft_cross_entropy(student, teacher, temperature=1.0).item()
    hard = ce(student, teacher).item()
    for share in (0.0, 0.25, 1.0):
        got = teacher_annealing(student, teacher, temperature=9.0, share=share).item()
        assert got == pytest.approx(share * hard + (1 - share) * soft, rel=1e-12)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=f"share is {share}"):
            teacher_annealing(student, teacher, share=share)


def test_soft_cross_entropy_as_tinyberts_code_has_it() -> None:
    student, teacher = pair(15)
    paper = soft_cross_entropy(student, teacher, temperature=1.0).item()
    code = soft_cross_entropy(student, teacher, temperature=1.0, mean_over_classes=True).item()
    assert code == pytest.approx(paper / 4, rel=1e-12)
