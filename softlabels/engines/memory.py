"""Memory that was freed goes back to the system now and then, so that a dump does not grow with its corpus.

Batches differ in shape. glibc keeps the holes that their tensors leave, and a process that has no more in use than
before grows all the same: a small teacher's from 580 MB over 2,000 rows to 790 over 60,000; like this, 600 and 647.
"""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress
from typing import Any

_SECONDS = 20.0  # between two times: pages that go back must be fetched again, which at every second cost a tenth


class Trimmer:
    """Gives back what is free, each time it is called after a while; does nothing where the C library isn't glibc."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds, self._last = seconds, time.monotonic()
        self._trim: Any = None
        with suppress(AttributeError, OSError, TypeError):  # another C library; TypeError on Windows
            self._trim = ctypes.CDLL(None).malloc_trim

    def __call__(self) -> bool:
        """Whether anything was given back."""
        now = time.monotonic()
        if self._trim is None or now - self._last < self._seconds:
            return False
        self._last = now
        return bool(self._trim(0))
