"""Processes that one process starts and that work for it alone: how they end, and how an error of theirs gets home."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A Ctrl-C comes after the block, and never to the processes that are started inside: they inherit the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """For a thread of a child: nobody holds the parent's lock once it is gone, so nothing may be written any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def portable(error: BaseException, *, instead: Exception) -> BaseException:
    """The error, or `instead` where it cannot be sent to another process."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return instead


def end_all(processes: Sequence[BaseProcess]) -> None:
    """End them all at once; who has not gone after ten seconds is killed."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
