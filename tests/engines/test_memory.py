"""Freed memory goes back to the system, and not too often."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from softlabels.engines.memory import Trimmer


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim")
def test_what_is_free_goes_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 100_000, 1000  # each below the size that the system is asked for directly
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        libc.free(block)
    before = resident()
    assert Trimmer(seconds=0)()
    assert before - resident() > size * count / 2
    libc.free(blocks[-1])


def test_not_twice_in_a_moment() -> None:
    assert not Trimmer(seconds=3600)()


def resident() -> int:
    """Bytes of this process in memory."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
