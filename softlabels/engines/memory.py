"""Memory over a long dump: what was freed goes back to the system, and what stays is not searched again and again.

Batches differ in shape. glibc keeps the holes that their tensors leave, and a process that has no more in use than
before grows all the same: a small teacher's from 580 MB over 2,000 rows to 790 over 60,000. And Python's collector
looks at all that the process holds, most of a million objects of torch and transformers, every few thousand rows that
are made, with the interpreter's lock taken: half of the time of a dump of short rows.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_GROWTH = 48 << 20  # bytes: pages that go back must be fetched again, which at every second cost a tenth of the speed
_ROWS = 4096  # what a dump of fewer would win is less than the last search takes
_SIZES = Path("/proc/self/statm")  # pages: all, in memory, of these shared


class Trimmer:
    """Gives back what is free each time the process has grown by `growth` bytes since; nothing where that isn't known.

    It is done by the GNU C library, and the size is Linux's to tell.
    """

    def __init__(self, growth: int = _GROWTH) -> None:
        self._growth, self._least = growth, resident()
        self._trim: Any = None
        with suppress(AttributeError, OSError, TypeError):  # another C library; TypeError on Windows
            self._trim = ctypes.CDLL(None).malloc_trim

    def __call__(self) -> bool:
        """Whether anything was given back."""
        now = resident()
        if self._trim is None or now is None or self._least is None or now < self._least + self._growth:
            return False
        given = bool(self._trim(0))
        self._least = resident()
        return given


def resident() -> int | None:
    """Bytes of this process in memory that no file backs; None where the system doesn't say."""
    try:
        _, pages, shared = map(int, _SIZES.read_text().split()[:3])
    except (OSError, ValueError):
        return None
    return (pages - shared) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def spared_by_the_collector(after: int = _ROWS) -> Iterator[Callable[[int], None]]:
    """What there is once `after` rows are through is left alone by Python's collector until the block ends.

    Yields what is to be told of more rows. Circles among objects that were there by then and are dropped later stay
    until the end, in the whole process; one that has frozen objects of its own, or collects nothing, is left as it is.
    """
    told, frozen = 0, False

    def passed(rows: int) -> None:
        nonlocal told, frozen
        told += rows
        if told >= after and not frozen and gc.isenabled() and not gc.get_freeze_count():
            gc.collect()
            frozen = True  # first: a Ctrl-C may come at once
            gc.freeze()

    try:
        yield passed
    finally:
        if frozen:
            gc.unfreeze()
