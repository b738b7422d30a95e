"""Threads beside the calling one: `Ahead` makes what it needs next, `Behind` finishes what it has made.

Both are bounded, hand over errors to the calling thread, and are gone when their `with` block ends. They wait on
`SimpleQueue`s alone: their methods are single steps in C, so that a Ctrl-C at any moment leaves no lock taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
Step = Callable[[], Any]
_IDLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class _Failed:
    """What a thread hands over instead of a result."""

    error: BaseException


class _End:
    """After the last item."""


class Ahead(Generic[T]):
    """Iterates over `items`, which a thread draws from: while one is in use, the next is made.

    `idle` is called now and then while the calling thread waits for an item; `stop` when none is wanted any more, for
    `items` that may themselves be waiting.
    """

    def __init__(
        self,
        items: Iterator[T],
        *,
        name: str,
        idle: Callable[[], object] = lambda: None,
        stop: Callable[[], object] = lambda: None,
    ) -> None:
        self._items, self._idle, self._stop = items, idle, stop
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._made: SimpleQueue[Any] = SimpleQueue()
        self._asked.put(True)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._thread.start()
        return self._iterate()

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self._asked.put(False)
        self._stop()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._asked.get():
                item = next(self._items, _End)
                self._made.put(item)
                if item is _End:
                    return
        except BaseException as error:  # belongs to the calling thread
            self._made.put(_Failed(error))

    def _iterate(self) -> Iterator[T]:
        while (item := self._next()) is not _End:
            if isinstance(item, _Failed):
                raise item.error
            self._asked.put(True)
            yield item

    def _next(self) -> Any:
        while True:
            try:
                return self._made.get(timeout=_IDLE_SECONDS)
            except Empty:
                self._idle()


class Behind:
    """A thread that takes the steps given to it, in order. At most `room` gifts wait or are in work at a time.

    `told` is called in the calling thread with whatever a step returned, unless that was None. After a step that
    failed no other is taken, and the calling thread gets its error from the next `give` or `finish`. torch's operations
    in this thread use one core: the others are the teacher's. `ended` says that no step is taken any more: the block
    has ended, or a step failed.
    """

    def __init__(self, told: Callable[[Any], None], *, room: int, name: str) -> None:
        self._told, self._room, self._outstanding = told, room, 0
        self._given: SimpleQueue[tuple[Sequence[Step], Step | None] | None] = SimpleQueue()
        self._done: SimpleQueue[Any] = SimpleQueue()
        self._stopped = False
        self.ended = False  # not whether the thread lives: a `join` that a Ctrl-C breaks off leaves that wrong
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def __enter__(self) -> Behind:
        threads = torch.get_num_threads()
        self._thread.start()
        self._done.get()  # the thread has set its own number, and with it what later threads begin with
        torch.set_num_threads(threads)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped = True
        self._given.put(None)
        self._thread.join()

    def give(self, steps: Sequence[Step], *, then: Step | None = None) -> None:
        """Have `steps` taken; waits while there is no room. Raises what an earlier step failed with.

        `then` is called in the thread once what the steps returned can be heard; it must not fail.
        """
        self.listen()
        while self._outstanding >= self._room:
            self._settle()
        self._outstanding += 1
        self._given.put((steps, then))

    def listen(self) -> None:
        """Hear what is done, without waiting for what isn't."""
        while self._outstanding and not self._done.empty():
            self._settle()

    def finish(self) -> None:
        """Wait until all that was given is done."""
        while self._outstanding:
            self._settle()

    def _settle(self) -> None:
        results = self._done.get()
        self._outstanding -= 1
        if isinstance(results, _Failed):
            raise results.error
        for result in results:
            if result is not None:
                self._told(result)

    def _work(self) -> None:
        torch.get_num_threads()  # the first call takes what the process has, whatever was set before
        torch.set_num_threads(1)
        self._done.put(None)
        try:
            while (gift := self._given.get()) is not None:
                steps, then = gift
                try:
                    results: list[Any] | _Failed = [step() for step in steps if not self._stopped]
                except BaseException as error:  # belongs to the calling thread
                    results = _Failed(error)
                del gift, steps  # first, so that the batch in them is gone when there is room for another
                self._done.put(results)
                if isinstance(results, _Failed):
                    return
                if then is not None and not self._stopped:
                    then()
        finally:
            self.ended = True
