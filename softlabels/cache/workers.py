"""One function over many items at a time: in threads, or in processes that are forked from this one.

Threads serve where the function waits for the disk. Where most of its time is Python's they wait for each other, and
processes don't: forked, they have all that the function needs from their first moment (to import torch takes seconds),
and only items and results travel, as in torch's DataLoader.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import torch

from softlabels.children import end_with_parent
from softlabels.errors import CacheError

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def threaded(
    function: Callable[[Item], Result], items: Sequence[Item], count: int, *, name: str
) -> Iterator[Iterator[Result]]:
    """`function` of each item, in their order, by `count` threads. Who leaves early waits for what is being done."""
    with (
        ThreadPoolExecutor(count, thread_name_prefix=f"softlabels-{name}") as pool,
        closing(_generator(pool.map(function, items))) as results,
    ):
        yield results


@contextmanager
def forked(function: Callable[[Item], Result], items: Sequence[Item], count: int) -> Iterator[Iterator[Result]]:
    """The same by `count` processes, on one thread each. They end with this one, and leave a Ctrl-C to it.

    CacheError where one of them dies.
    """
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(function,)) as pool,
        closing(_generator(pool.map(_call, items))) as results,
    ):
        try:
            yield results
        except BrokenProcessPool:
            raise CacheError(
                "a process that wrote shards has died, as one does that is killed for its memory: start it again, and "
                "it goes on where it stopped"
            ) from None


def processes_for(count: int) -> int:
    """How many processes of at most `count` are of use where each also waits for the disk; 1: this one is not forked."""
    safe = (
        sys.platform == "linux"
        and threading.current_thread() is threading.main_thread()
        and not multiprocessing.current_process().daemon  # it may have no children
        and not torch.cuda.is_initialized()
    )
    cores = len(os.sched_getaffinity(0)) if safe else 1
    return min(count, 2 * cores) if cores > 1 else 1


_function: Callable[[Any], Any] | None = None  # of a forked process


def _generator(results: Iterator[Result]) -> Generator[Result, None, None]:
    """What `Executor.map` gives; once it is closed, what was not begun isn't done any more."""
    yield from results


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # those of the parent are not here
    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
