"""A batch in parts: what each part computes of every loss adds up to the loss of the whole batch, and so do gradients.

Parts are threads here, which meet at a barrier as processes do at a collective; `tests/training` has real processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from softlabels.losses import CONCATENATED, GROUP_LOSSES, LANGUAGE_LOSSES, LOSSES, PAIR_LOSSES, TRANSPORT
from softlabels.losses.means import in_parts, share
from softlabels.losses.penalties import parameter_norm
from softlabels.losses.temperatures import cwsm, flsw
from softlabels.losses.transport import LayerWeights
from softlabels.types import NO_LABEL, Signals
from tests.losses.ragged import LAYERS, side
from tests.losses.test_cross_layer import ALL, ONE, bucket_map

PARTS = [2, 3, 6]  # of 4 rows: with 3 one has but a text of padding alone, with 6 two have no row at all
ROWS, CLASSES = 4, 5

Compute = Callable[[Signals, Signals], Tensor]


class Meeting:
    """Where so many threads tell each other their values."""

    def __init__(self, count: int) -> None:
        self.barrier, self.said = threading.Barrier(count, timeout=30), [torch.zeros(0)] * count

    def all_of(self, rank: int, values: Tensor) -> list[Tensor]:
        self.said[rank] = values
        self.barrier.wait()
        heard = list(self.said)
        self.barrier.wait()  # before anyone says the next thing
        return heard


@dataclass(frozen=True)
class Thread:
    """One part of a batch, as `softlabels.losses.means.Parts` has it."""

    meeting: Meeting
    rank: int
    count: int
    has_rows: bool

    def total(self, values: Tensor) -> Tensor:
        return torch.stack(self.meeting.all_of(self.rank, values.detach())).sum(dim=0)

    def rows(self, values: Tensor) -> Tensor:
        heard = self.meeting.all_of(self.rank, values.detach() if self.has_rows else values.detach()[:0])
        if not self.has_rows:
            return torch.cat(heard) + values.sum() * 0
        return torch.cat([values if rank == self.rank else other for rank, other in enumerate(heard)])


def part_of(signals: Signals, rank: int, count: int) -> Signals:
    """Every `count`-th row; the first one where there is none."""
    mine = list(range(rank, len(signals.mask), count)) or [0]
    fields = {name: values[mine] for name, values in signals.fields.items()}
    return replace(signals, fields=fields, mask=signals.mask[mine], labels=signals.labels[mine])


def in_threads(count: int, compute: Callable[[Thread], list[Tensor]], rows: int = ROWS) -> list[Tensor]:
    """The sums over all parts of the tensors that each computes."""
    meeting = Meeting(count)

    def work(rank: int) -> list[Tensor]:
        thread = Thread(meeting, rank, count, has_rows=rank < rows)
        with in_parts(thread):
            return compute(thread)

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(work, range(count)))
    return [torch.stack([each[i] for each in found]).sum(dim=0) for i in range(len(found[0]))]


def check(loss: Compute, student: Signals, teacher: Signals, count: int) -> None:
    """The loss and the gradients in the student's fields: whole, and as sums over parts."""
    names = list(student.fields)
    leaves = {name: values.clone().requires_grad_() for name, values in student.fields.items()}
    student = replace(student, fields=leaves)

    def value_and_gradients(value: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(value, [leaves[name] for name in names], allow_unused=True)
        zeros = [torch.zeros_like(leaves[name]) for name in names]
        gradients = [zero if one is None else one for one, zero in zip(found, zeros, strict=True)]
        return [value.detach(), *gradients]

    def compute(thread: Thread) -> list[Tensor]:
        mine, theirs = (part_of(signals, thread.rank, count) for signals in (student, teacher))
        return value_and_gradients(loss(mine, theirs))

    whole, parts = value_and_gradients(loss(student, teacher)), in_threads(count, compute)
    assert whole[0] != 0 and any(gradient.any() for gradient in whole[1:])
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


def logits(seed: int) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((ROWS, CLASSES), generator=generator, dtype=torch.float64)
    return Signals({"logits": values}, torch.ones(ROWS, 1), torch.tensor([2, NO_LABEL, NO_LABEL, 0]))


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_on_logits(name: str, count: int) -> None:
    check(lambda ours, theirs: LOSSES[name](ours, theirs, temperature=2.0), logits(1), logits(2), count)


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("rule", ["flsw", "cwsm"])
def test_temperatures_of_their_own_for_each_row(rule: str, count: int) -> None:
    def loss(ours: Signals, theirs: Signals) -> Tensor:
        found = (
            flsw(ours.logits, theirs.logits, base=4.0, beta=2.0)
            if rule == "flsw"
            else cwsm(ours.logits, base=4.0, beta=2.0)
        )
        return LOSSES["kl"](ours, theirs, temperature=found)

    check(loss, logits(1), logits(2), count)


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_on_layers(name: str, count: int) -> None:
    check(lambda ours, theirs: PAIR_LOSSES[name](ours, theirs, layers=LAYERS), side(1), side(2), count)


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_losses_on_several_layers(name: str, count: int) -> None:
    moved: list[LayerWeights] = []
    bucket = bucket_map(name)  # once: its seed is the process's, which threads would take from each other

    def loss(ours: Signals, theirs: Signals) -> Tensor:
        found: Callable[..., Tensor] = GROUP_LOSSES[name]
        if name in CONCATENATED:
            return found(ours, theirs, layers=ONE, combine=bucket)
        if name not in TRANSPORT:
            return found(ours, theirs, layers=ONE)
        moved.append(LayerWeights(ALL, [1.0, 2.0], update=True))
        return found(ours, theirs, layers=ALL, weights=moved[-1])

    check(loss, side(1), side(2), count)
    for weights in moved[1:]:  # those of the parts move as those of the whole, which come first
        torch.testing.assert_close(weights.student, moved[0].student)
        torch.testing.assert_close(weights.teacher, moved[0].teacher)


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("name", LANGUAGE_LOSSES)
def test_losses_of_language_models(name: str, count: int) -> None:
    """Rows have 3, 0, 1 and 2 targets."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn((6, 7), generator=generator, dtype=torch.float64) for _ in range(2))
    row = torch.tensor([0, 0, 0, 2, 3, 3])
    labels = torch.full((ROWS, 3), NO_LABEL)
    for target, place in enumerate([(0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (3, 1)]):
        labels[place] = target
    leaf = ours.requires_grad_()

    def value_and_gradient(rows: list[int]) -> list[Tensor]:
        here = torch.isin(row, torch.tensor(rows))
        mask = torch.ones(len(rows), 3)
        student = Signals({"logits": leaf[here]}, mask, labels[rows])
        loss: Any = LANGUAGE_LOSSES[name]
        value = loss(student, Signals({}, mask, labels[rows], vocab=theirs[here]), temperature=2.0)
        return [value.detach(), *torch.autograd.grad(value, [leaf])]

    whole = value_and_gradient([0, 1, 2, 3])
    parts = in_threads(count, lambda thread: value_and_gradient(list(range(thread.rank, ROWS, count)) or [0]))
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


def test_a_penalty_is_paid_once() -> None:
    weights = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def compute(thread: Thread | None = None) -> list[Tensor]:
        value = share(parameter_norm([weights]))
        return [value.detach(), *torch.autograd.grad(value, [weights])]

    for one, two in zip(compute(), in_threads(3, compute), strict=True):
        torch.testing.assert_close(two, one)
