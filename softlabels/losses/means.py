"""The mean that a loss ends in: a sum over rows, tokens or pairs of them, divided by how many there are.

One process holds the whole batch, and a mean is a quotient. Where several processes hold a part of the batch each,
`in_parts` divides by the count of all parts: what each of them computes is then its share of the batch's loss. Shares
add up to the loss of the whole batch, and their gradients to its gradient, however unevenly rows, labels and tokens
lie. What looks at the rows of a batch together asks for all of them (`all_rows`, `sum_over_parts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor


class Parts(Protocol):
    """The processes among which a batch is divided."""

    @property
    def count(self) -> int: ...

    @property
    def has_rows(self) -> bool:
        """Whether this one has a part of the batch; the rows of one that has none only keep step, and count 0."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' `values`, without gradient."""

    def rows(self, values: Tensor) -> Tensor:
        """All processes' rows of `values` (N, …), this one's with their gradient."""


_parts: ContextVar[Parts | None] = ContextVar("parts", default=None)


@contextmanager
def in_parts(parts: Parts) -> Iterator[None]:
    """Inside, losses are shares of the whole batch's; every process must compute the same ones, in one order."""
    token = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(token)


def mean(total: Tensor, count: Tensor | int) -> Tensor:
    """`total / count`, both scalars, and 0 where there is nothing to count; in parts, over the count of all."""
    parts = _parts.get()
    if parts is None:
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
    counted = torch.as_tensor(count, device=total.device)
    if not parts.has_rows:
        total, counted = total * 0, counted * 0
    return total / parts.total(counted).clamp(min=1)


def sum_over_parts(values: Tensor) -> Tensor:
    """`values`, sums over the rows that are here, summed over all parts; without gradient there."""
    parts = _parts.get()
    if parts is None:
        return values
    values = values.detach()
    return parts.total(values if parts.has_rows else values * 0)


def all_rows(values: Tensor) -> Tensor:
    """(N, …) of all parts, in any order; a gradient reaches the rows that are here."""
    parts = _parts.get()
    return values if parts is None else parts.rows(values)


def share_of_all_rows(value: Tensor) -> Tensor:
    """What is computed of `all_rows` everywhere is of each part one share; each has the gradient of its own rows."""
    parts = _parts.get()
    return value if parts is None else value - value.detach() * (1 - 1 / parts.count)


def share(value: Tensor) -> Tensor:
    """A value that is the same in every process, gradient included, as a share of it."""
    parts = _parts.get()
    return value if parts is None else value / parts.count
