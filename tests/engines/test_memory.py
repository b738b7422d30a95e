"""Freed memory goes back to the system when there is much of it, and Python's collector leaves alone what stays."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator

import pytest

from softlabels.engines.memory import Trimmer, resident, spared_by_the_collector


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


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


class Node:
    """Part of a circle, which only the collector can free."""

    def __init__(self) -> None:
        self.me = self


def test_after_so_many_rows_what_is_there_is_left_alone_and_what_comes_is_not(nothing_frozen: None) -> None:
    with spared_by_the_collector(after=10) as passed:
        passed(9)
        assert gc.get_freeze_count() == 0
        garbage = weakref.ref(Node())
        passed(1)
        assert garbage() is None  # it is no part of what stays
        frozen = gc.get_freeze_count()
        assert frozen > 10_000 and len(gc.get_objects()) < frozen / 10
        later = weakref.ref(Node())
        passed(10)
        gc.collect()
        assert later() is None
    assert gc.get_freeze_count() == 0


def test_it_is_undone_after_an_error_and_a_process_that_froze_its_own_keeps_it(nothing_frozen: None) -> None:
    with pytest.raises(KeyboardInterrupt), spared_by_the_collector(after=1) as passed:
        passed(1)
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with spared_by_the_collector(after=1) as passed:
            passed(1)
            assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
    gc.freeze()
    before = gc.get_freeze_count()
    with spared_by_the_collector(after=1) as passed:
        passed(1)
        assert gc.get_freeze_count() <= before
    assert before / 2 < gc.get_freeze_count() <= before
