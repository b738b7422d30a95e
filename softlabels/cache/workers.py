"""One function over many items at a time: in threads, or in processes that are forked from this one.

Threads serve where the function waits for the disk. Where most of its time is Python's they wait for each other, and
processes don't: forked, they have all that the function needs from their first moment (to import torch takes seconds),
and only items and results travel, as in torch's DataLoader.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

import torch

from softlabels.children import end_all, end_with_parent, interrupts_held_back, portable
from softlabels.errors import CacheError

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def threaded(
    function: Callable[[Item], Result], items: Sequence[Item], count: int, *, name: str
) -> Iterator[Iterator[Result]]:
    """`function` of each item, in their order, by `count` threads. Who leaves early waits for what is being done."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=f"softlabels-{name}")
    try:
        yield pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def forked(function: Callable[[Item], Result], items: Sequence[Item], count: int) -> Iterator[Iterator[Result]]:
    """The same by `count` processes, on one thread each. They end with this one, and leave a Ctrl-C to it.

    CacheError where one of them dies.
    """
    context = multiprocessing.get_context("fork")
    stop = context.Event()  # for what the pool has handed out already, and can't take back
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(function, stop))
    try:
        yield _begun(pool, items)
    except BrokenProcessPool:
        raise CacheError(
            "a process that wrote shards has died, as one does that is killed for its memory: start it again, and it "
            "goes on where it stopped"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _begun(pool: ProcessPoolExecutor, items: Sequence[Any]) -> Iterator[Any]:
    """The results of the pool, whose processes are all there; or none of them is, where one could not be forked."""
    others = set(multiprocessing.active_children())
    with interrupts_held_back():  # a pool that is interrupted before it watches its processes never ends them
        try:
            return pool.map(_call, items)
        except BaseException:
            end_all([process for process in multiprocessing.active_children() if process not in others])
            raise


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


_job: tuple[Callable[[Any], Any], Event] | None = None  # of a forked process


def _begin(function: Callable[[Any], Any], stop: Event) -> None:
    global _job
    _job = function, stop
    torch.set_num_threads(1)  # those of the parent are not here
    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
    assert _job is not None
    function, stop = _job
    if stop.is_set():
        return None  # to nobody
    try:
        return function(item)
    except BaseException as error:
        raise portable(error, instead=CacheError(f"{type(error).__name__}: {error}")) from None
