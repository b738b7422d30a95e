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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from softlabels.children import end_with_parent
from softlabels.errors import CacheError

Item = TypeVar("Item")
Result = TypeVar("Result")
Pool = TypeVar("Pool", bound=Executor)


@contextmanager
def threaded(
    function: Callable[[Item], Result], items: Sequence[Item], count: int, *, name: str
) -> Iterator[Iterator[Result]]:
    """`function` of each item, in their order, by `count` threads. Who leaves early waits for what is being done."""
    with _ended(ThreadPoolExecutor(count, thread_name_prefix=f"softlabels-{name}")) as pool:
        yield pool.map(function, items)


@contextmanager
def forked(function: Callable[[Item], Result], items: Sequence[Item], count: int) -> Iterator[Iterator[Result]]:
    """The same by `count` processes, on one thread each. They end with this one, and leave a Ctrl-C to it.

    CacheError where one of them dies.
    """
    context = multiprocessing.get_context("fork")
    with _ended(ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(function,))) as pool:
        try:
            yield pool.map(_call, items)
        except BrokenProcessPool:
            raise CacheError(
                "a process that wrote shards has died, as one does that is killed for its memory: start it again, and "
                "it goes on where it stopped"
            ) from None


@contextmanager
def _ended(pool: Pool) -> Iterator[Pool]:
    """The pool, of which nothing is begun any more once the block ends."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def processes_for(count: int) -> int:
    """How many of `count` processes that also wait for the disk are of use; 1 where this one is better not forked."""
    safe = (
        sys.platform == "linux"
        and threading.current_thread() is threading.main_thread()
        and not multiprocessing.current_process().daemon  # it may have no children
        and not torch.cuda.is_initialized()
    )
    cores = len(os.sched_getaffinity(0)) if safe else 1
    return min(count, 2 * cores) if cores > 1 else 1


_function: Callable[[Any], Any] | None = None  # of a forked process


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # those of the parent are not here
    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
