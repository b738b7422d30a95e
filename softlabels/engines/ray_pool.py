"""Pieces of work over a pool of Ray actors: items come in, their results go out, whoever dies meanwhile.

Ray starts the actors, finds them room and says when one is gone; the loop here only hands items out. A worker that dies
is replaced and what it had is done again. An item that keeps failing is given up and named, and the rest goes on. What
an item is, and what is done with it, is the caller's affair: shards of a dump, trials of a sweep.
"""

from __future__ import annotations

import errno
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from softlabels.engines.ray_cluster import Room
from softlabels.errors import SoftlabelsError, TeacherError

T = TypeVar("T")
TRIES = 3  # of an item with no other in work beside it
_UNSTARTED = 3  # workers that die before they can work, one after another, for each that is wanted
_STREAK = 20  # items given up, one after another
_TICK = 0.5  # seconds between two looks at the clock, while nothing happens
_PATIENCE = 900.0  # seconds without any worker that can work
_FAREWELL = 5.0  # seconds that killed workers get to be gone
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # another try would meet the same


class Worker(Protocol):
    """What lives in an actor."""

    def do(self, item: Any) -> Any:
        """The result of one item; called by up to `depth` threads at a time."""


OpenWorker = Callable[[], Worker]  # pickled, and called once in each actor


@dataclass(frozen=True, slots=True)
class GivenUp(Generic[T]):
    """An item that no worker could do."""

    item: T
    reason: str


@dataclass(slots=True)
class Report(Generic[T]):
    """What became of the items that have no result, and of workers."""

    given_up: list[GivenUp[T]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # a line for each worker that died
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Watch(Generic[T]):
    """What the caller hears, in its own thread."""

    name: Callable[[T], str]  # 'shard 7'
    done: Callable[[T, Any], object]  # an item and its result
    changed: Callable[[int, int], object] = lambda workers, retries: None  # workers that can work; retries so far
    given_up: Callable[[GivenUp[T]], object] = lambda one: None  # as soon as an item is


def run_items(
    items: Iterable[T], open_worker: OpenWorker, *, room: Room, total: int, depth: int, watch: Watch[T]
) -> Report[T]:
    """Do all `items`, `total` of them, in a connected process, on `room.workers` actors or fewer where that is enough.

    `depth` items may be at a worker at a time. A SoftlabelsError of an item is not tried again, since it would be the
    same; anything else is, and a dying worker counts as that, TRIES times with no other item beside it. Raised are what
    keeps a worker from opening, and a full disk; TeacherError where workers only ever die, or items only ever fail.
    Where some machines can't start any, those that work go on without them.
    """
    pool = _Pool(open_worker, room, depth, watch, iter(items), total)
    try:
        pool.work()
    finally:
        pool.close()
    return pool.report


# -------------------------------------------------------------------------------------------------- the one that deals


@dataclass(eq=False, slots=True)
class _Member:
    """A worker as the pool sees it."""

    actor: Any
    ready: bool = False
    host: str = ""


@dataclass(eq=False, slots=True)
class _Call(Generic[T]):
    """Something asked of a worker: to open (no entry), or to do an item."""

    member: _Member
    entry: _Entry[T] | None
    shared: bool  # another item was at the worker meanwhile: which of them failed can't be told


@dataclass(eq=False, slots=True)
class _Entry(Generic[T]):
    item: T
    tries: int = 0  # alone
    alone: bool = False  # it failed once: nothing is done beside it any more


class _Pool(Generic[T]):
    def __init__(
        self, open_worker: OpenWorker, room: Room, depth: int, watch: Watch[T], items: Any, total: int
    ) -> None:
        self.open_worker, self.room, self.depth, self.watch = open_worker, room, depth, watch
        self.items, self.left = items, total  # left: without a result, and not given up
        self.again: deque[_Entry[T]] = deque()
        self.fresh: deque[_Entry[T]] = deque()
        self.members: list[_Member] = []
        self.calls: dict[Any, _Call[T]] = {}
        self.report: Report[T] = Report()
        self.unstarted = self.streak = self.completed = 0
        self.since = time.monotonic()  # when there was a worker last

    def work(self) -> None:
        for _ in range(min(self.room.workers, self.left)):
            self._start()
        while self.left:
            self._hand_out()
            self._listen()

    def _start(self) -> None:
        import ray

        remote: Any = ray.remote(_Actor)
        member = _Member(
            remote.options(
                num_cpus=self.room.cpus,
                num_gpus=self.room.gpus,
                max_restarts=0,  # retries are counted here, or they would have no end
                max_task_retries=0,
                max_concurrency=self.depth,
                scheduling_strategy="SPREAD",
            ).remote()
        )
        self.members.append(member)
        self.calls[member.actor.open.remote(self.open_worker)] = _Call(member, None, False)

    def _hand_out(self) -> None:
        for member in self.members:
            while member.ready and (entry := self._choose(member)) is not None:
                beside = [call for call in self.calls.values() if call.member is member]
                for call in beside:
                    call.shared = True
                ref = member.actor.do.remote(entry.item)
                self.calls[ref] = _Call(member, entry, bool(beside))

    def _choose(self, member: _Member) -> _Entry[T] | None:
        """What a worker is to do next, if anything. What failed is tried again first, beside nothing."""
        at_work = [call.entry for call in self.calls.values() if call.member is member and call.entry is not None]
        if self.again:
            return None if at_work else self.again.popleft()
        while len(self.fresh) <= len(self.members):
            if (drawn := next(islice(self.items, 1), None)) is None:
                break
            self.fresh.append(_Entry(drawn))
        # a second one in advance, while enough are left for the others
        spare = len(self.fresh) > len(self.members) and len(at_work) < self.depth
        if not self.fresh or (at_work and (not spare or any(entry.alone for entry in at_work))):
            return None
        return self.fresh.popleft()

    def _listen(self) -> None:
        import ray

        if any(member.ready for member in self.members):
            self.since = time.monotonic()
        elif time.monotonic() - self.since > _PATIENCE:
            raise TeacherError(
                f"no worker could start for {_PATIENCE / 60:.0f} minutes: the cluster has no room for one of "
                f"{self.room.cpus:g} CPU(s) and {self.room.gpus:g} GPU(s). What was committed is kept"
            )
        refs = list(self.calls)
        if not ray.wait(refs, num_returns=1, timeout=_TICK)[0]:
            return
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        answers = {ref: _fetch(ref) for ref in ready}
        for ref in sorted(ready, key=lambda ref: not isinstance(answers[ref], _Done)):  # what is done counts first
            if (call := self.calls.pop(ref, None)) is not None:  # else it went with its worker
                self._hear(call, answers[ref])

    def _hear(self, call: _Call[T], answer: _Done | _Raised) -> None:
        member, entry = call.member, call.entry
        if isinstance(answer, _Done):
            if entry is None:
                member.ready, member.host = True, answer.result
            else:
                self.left -= 1
                self.streak = 0
                self.unstarted = self.unstarted if self._is_vain() else 0
                self.completed += 1
                self.watch.done(entry.item, answer.result)
        elif isinstance(answer.error, OSError) and answer.error.errno in _HOPELESS:
            raise answer.error
        elif isinstance(answer.error, SoftlabelsError):
            if entry is None:  # no other worker would fare better
                raise _placed(answer.error, answer.host)
            self._failed(call, str(answer.error), final=True)
        else:
            self._bury(call, answer)
        self._tell()

    def _bury(self, first: _Call[T], answer: _Raised) -> None:
        """A worker died, or may no longer be trusted: it is replaced, and what it had is done again."""
        import ray

        member = first.member
        ray.kill(member.actor, no_restart=True)
        self.members.remove(member)
        held = [first, *(call for call in self.calls.values() if call.member is member)]
        self.calls = {ref: call for ref, call in self.calls.items() if call.member is not member}
        entries = [call.entry for call in held if call.entry is not None]
        where = f" on {member.host}" if member.host else ""
        what = f" in {self.watch.name(entries[0].item)}" if entries else " before it could work"
        self.report.lost.append(f"a worker{where} {answer.reason}{what}")
        for call in held:
            if call.entry is not None:
                self._failed(call, f"its worker{where} {answer.reason}", final=False)
        if not entries:
            self.unstarted += 1
            if self._is_vain() and not any(other.ready for other in self.members):
                raise TeacherError(
                    f"{self.unstarted} workers died one after another before they could work; the last one "
                    f"{answer.reason}. What was committed is kept"
                )
        if len(self.members) < min(self.room.workers, self.left) and (entries or not self._is_vain()):
            self._start()

    def _is_vain(self) -> bool:
        """Whether so many have died before they could work that those that can are not to wait for others."""
        return self.unstarted >= max(_UNSTARTED * self.room.workers, 2 * _UNSTARTED)

    def _failed(self, call: _Call[T], reason: str, *, final: bool) -> None:
        """Once more, or never again."""
        entry = call.entry
        assert entry is not None
        entry.alone = True
        entry.tries += not call.shared
        if call.shared or (not final and entry.tries < TRIES):
            self.again.append(entry)
            self.report.retries += 1
            return
        self.report.given_up.append(GivenUp(entry.item, reason))
        self.watch.given_up(self.report.given_up[-1])
        self.left -= 1
        self.streak += 1
        if self.streak >= _STREAK or (not self.completed and self.streak >= TRIES and self.left):
            raise TeacherError(
                f"{self.streak} failed one after another, up to {self.watch.name(entry.item)}: {reason}. "
                f"What was committed is kept"
            )

    def _tell(self) -> None:
        self.watch.changed(sum(member.ready for member in self.members), self.report.retries)

    def close(self) -> None:
        """End the workers, and wait until they are gone: none may write any more."""
        import ray

        refs = []
        for member in self.members:
            ray.kill(member.actor, no_restart=True)
            refs.append(member.actor.open.remote(None))  # fails as soon as Ray knows that the actor is dead
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=_FAREWELL)


def _fetch(ref: Any) -> _Done | _Raised:
    import ray

    try:
        answer: _Done | _Raised = ray.get(ref)
        return answer
    except ray.exceptions.RayError as error:
        return _Raised(_how(error), None, "")


def _how(error: Exception) -> str:
    """What became of a worker, in a few of Ray's many words."""
    text = str(error).strip()
    if "node running low on memory" in text or "OutOfMemory" in type(error).__name__:
        return "was ended by Ray because its machine ran low on memory"
    if "node has died" in text or "node died" in text or "Actor's node" in text:
        return "was lost with its machine"
    if "creation task" in text or "Error" in text.splitlines()[-1]:  # the last line of a traceback
        return f"could not run: {text.splitlines()[-1].strip()[:300]}"
    return "died"


def _placed(error: SoftlabelsError, host: str) -> SoftlabelsError:
    """The same, saying where, if that isn't here."""
    return error if host in ("", platform.node()) else type(error)(f"on {host}: {error}")


# ------------------------------------------------------------------------------------------------------------ an actor


@dataclass(frozen=True, slots=True)
class _Done:
    result: Any


@dataclass(frozen=True, slots=True)
class _Raised:
    """Errors go back as values: Ray would log them, and wrap them in its own."""

    reason: str  # 'raised ValueError: …'
    error: Exception | None  # where it is one that says more to the caller, and can be pickled
    host: str


class _Actor:
    """The process of a worker."""

    def open(self, open_worker: OpenWorker) -> _Done | _Raised:
        return _answer(lambda: self._open(open_worker))

    def _open(self, open_worker: OpenWorker) -> str:
        self.worker = open_worker()
        return platform.node()

    def do(self, item: Any) -> _Done | _Raised:
        return _answer(lambda: self.worker.do(item))


def _answer(call: Callable[[], Any]) -> _Done | _Raised:
    try:
        return _Done(call())
    except Exception as error:
        words = f"raised {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return _Raised(words, _plain(error), platform.node())


def _plain(error: Exception) -> Exception | None:
    if isinstance(error, SoftlabelsError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        place = None if error.filename is None else os.fspath(error.filename)
        return OSError(error.errno, os.strerror(error.errno), place)
    return None
