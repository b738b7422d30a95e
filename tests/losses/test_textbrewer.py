"""Losses equal TextBrewer's own functions where the formula is the same; where it is another, these tests say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from textbrewer import losses as theirs
from textbrewer.schedulers import cwsm_temperature_scheduler_builder, flsw_temperature_scheduler_builder
from torch import Tensor

from softlabels.losses import PAIR_LOSSES
from softlabels.losses.attention import attention_ce, attention_mse, attention_scores_ce, attention_scores_mse
from softlabels.losses.soft_targets import mse_logits, soft_cross_entropy
from softlabels.losses.statistics import nst
from softlabels.losses.temperatures import cwsm, flsw
from softlabels.types import NO_LABEL, LayerPair, Signals
from tests.losses.ragged import side, with_maps

LENGTHS = (5, 2, 4)  # a text of padding alone makes TextBrewer's gram NaN
LAYERS = LayerPair(1, 2)


def logits(seed: int, rows: int = 8, classes: int = 5) -> Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def signals(values: Tensor) -> Signals:
    return Signals({"logits": values}, torch.ones(len(values), 1), torch.full((len(values),), NO_LABEL))


def sides() -> tuple[Signals, Signals]:
    return side(1, lengths=LENGTHS), side(2, lengths=LENGTHS)


@pytest.mark.parametrize("temperature", [1.0, 4.0, torch.linspace(1, 6, 8)])
def test_kd_ce(temperature: float | Tensor) -> None:
    ours = soft_cross_entropy(signals(logits(1)), signals(logits(2)), temperature=temperature)
    assert ours.item() == pytest.approx(theirs.kd_ce_loss(logits(1), logits(2), temperature).item(), rel=1e-5)


def test_kd_mse_is_a_mean_over_classes_too_and_at_a_temperature() -> None:
    """The Distilled BiLSTM's (Tang et al. 2019) sums over classes and has no temperature."""
    ours = mse_logits(signals(logits(1)), signals(logits(2)))
    assert ours.item() / 5 == pytest.approx(theirs.kd_mse_loss(logits(1), logits(2)).item(), rel=1e-5)
    assert ours.item() / 5 / 3**2 == pytest.approx(theirs.kd_mse_loss(logits(1), logits(2), 3.0).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "function", "second"),
    [
        ("hidden_mse", theirs.hid_mse_loss, False),
        ("hidden_cosine", theirs.cos_loss, False),
        ("pkd", theirs.pkd_loss, False),
        ("gram", theirs.fsp_loss, True),
    ],
)
def test_hidden_states(name: str, function: Callable[..., Tensor], second: bool) -> None:
    student, teacher = sides()
    layers = LayerPair(1, 2, then=LayerPair(2, 0)) if second else LAYERS
    inputs: list[Any] = [student.hidden(1), teacher.hidden(2)]
    if second:
        inputs = [[student.hidden(1), student.hidden(2)], [teacher.hidden(2), teacher.hidden(0)]]
    ours = PAIR_LOSSES[name](student, teacher, layers=layers)
    assert ours.item() == pytest.approx(function(*inputs, mask=student.mask).item(), rel=1e-5)


def test_nst_divides_by_the_length_once_there_is_a_mask() -> None:
    """Without a mask TextBrewer divides H1H2ᵀ by D, as here; with one by L, padding included."""
    layers = LayerPair(1, 2, then=LayerPair(2, 0))
    student, teacher = (side(seed, lengths=(4, 4)) for seed in (1, 2))
    inputs = [[student.hidden(1), student.hidden(2)], [teacher.hidden(2), teacher.hidden(0)]]
    assert nst(student, teacher, layers=layers).item() == pytest.approx(theirs.mmd_loss(*inputs).item(), rel=1e-5)
    student, teacher = sides()
    inputs = [[student.hidden(1), student.hidden(2)], [teacher.hidden(2), teacher.hidden(0)]]
    width, longest = 6, 5
    ours = nst(student, teacher, layers=layers).item() * (width / longest) ** 2
    assert ours == pytest.approx(theirs.mmd_loss(*inputs, mask=student.mask).item(), rel=1e-5)


def test_attention_mse_on_scores_or_on_maps() -> None:
    student, teacher = sides()
    ours = attention_scores_mse(student, teacher, layers=LAYERS)
    inputs = student.attention_scores(1), teacher.attention_scores(2)
    assert ours.item() == pytest.approx(theirs.att_mse_loss(*inputs, mask=student.mask).item(), rel=1e-5)
    student, teacher = with_maps(student, 1), with_maps(teacher, 2)
    ours = attention_mse(student, teacher, layers=LAYERS)
    maps = student.attention_probs(1), teacher.attention_probs(2)
    assert ours.item() == pytest.approx(theirs.att_mse_loss(*maps, mask=student.mask).item(), rel=1e-5)


def test_attention_mse_sum_is_the_mean_over_heads_times_their_number_squared() -> None:
    student, teacher = sides()
    heads = 2
    ours = attention_scores_mse(student, teacher, layers=LAYERS, heads="mean").item() * heads**2
    inputs = student.attention_scores(1), teacher.attention_scores(2)
    assert ours == pytest.approx(theirs.att_mse_sum_loss(*inputs, mask=student.mask).item(), rel=1e-5)


def test_attention_ce_takes_scores_in_which_padded_keys_are_masked() -> None:
    """TextBrewer takes the softmax of whatever it is given: of maps it would be a softmax twice."""
    student, teacher = sides()
    inputs = student.attention_scores(1), teacher.attention_scores(2)
    ours = attention_ce(student, teacher, layers=LAYERS)
    assert ours.item() == pytest.approx(theirs.att_ce_loss(*inputs, mask=student.mask).item(), rel=1e-5)
    maps = with_maps(student, 1), with_maps(teacher, 2)
    assert attention_ce(*maps, layers=LAYERS).item() == pytest.approx(ours.item(), rel=1e-5)
    twice = theirs.att_ce_loss(maps[0].attention_probs(1), maps[1].attention_probs(2), mask=student.mask)
    assert twice.item() != pytest.approx(ours.item(), rel=1e-2)


def test_attention_ce_mean_averages_scores_before_the_softmax() -> None:
    student, teacher = sides()
    inputs = student.attention_scores(1), teacher.attention_scores(2)
    wanted = theirs.att_ce_mean_loss(*inputs, mask=student.mask).item()
    assert attention_scores_ce(student, teacher, layers=LAYERS).item() == pytest.approx(wanted, rel=1e-5)
    of_maps = attention_ce(student, teacher, layers=LAYERS, heads="mean")
    assert of_maps.item() != pytest.approx(wanted, rel=1e-3)  # the mean of probabilities is another map


@pytest.mark.parametrize("base", [2.0, 8.0])
def test_adaptive_temperatures(base: float) -> None:
    student, teacher = logits(3), logits(4)
    for beta, gamma in ((1.0, 1.0), (1.0, 2.0), (0.5, 0.5)):
        wanted = flsw_temperature_scheduler_builder(beta, gamma)(student, teacher, base)
        assert torch.allclose(flsw(student, teacher, base=base, beta=beta, gamma=gamma), wanted, atol=1e-5)
        wanted = cwsm_temperature_scheduler_builder(beta)(student, teacher, base)
        assert torch.allclose(cwsm(student, teacher, base=base, beta=beta), wanted, atol=1e-5)
