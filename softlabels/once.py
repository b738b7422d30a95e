"""What several trainings in one process would compute again, computed once: word vectors above all.

Nothing is kept but inside `computing_once()`. What is kept must not draw from torch's random numbers, or the second
training would draw others than it does alone; and it is shared, so that nobody may change it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Value = TypeVar("Value")

_kept: ContextVar[dict[Hashable, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def computing_once() -> Iterator[None]:
    """Inside, `once` keeps what it made."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def once(key: Hashable, make: Callable[[], Value]) -> Value:
    """`make()`; or inside `computing_once()`, what it gave the first time for this `key`."""
    kept = _kept.get()
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]
