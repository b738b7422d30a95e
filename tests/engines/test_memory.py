"""Freed memory goes back to the system when there is much of it."""

from __future__ import annotations

import ctypes

import pytest

from softlabels.engines.memory import Trimmer, resident


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim") or resident() is None, reason="needs glibc, and Linux's /proc"
)
def test_what_is_free_goes_back_once_it_is_much() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    trim = Trimmer(growth=50_000_000)
    assert not trim()  # it has not grown
    size, count = 100_000, 1000  # each below the size that the system is asked for directly
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        libc.free(block)
    before = resident()
    assert trim() and not trim()
    after = resident()
    assert before is not None and after is not None and before - after > size * count / 2
    libc.free(blocks[-1])
