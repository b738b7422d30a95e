"""Files between a folder and a `Place`: in parallel, with retries, resumed where they stopped, checksummed on arrival.

What comes in is a list of files with their sizes and hashes; what goes out are files that are whole, or an error.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from softlabels.cache.files import hash_file, publish, temporary
from softlabels.cache.format import TEMPORARY
from softlabels.cache.planes import unpack_file
from softlabels.cache.urls import Failed, Patience, Place, _Stopped
from softlabels.errors import CacheError

THREADS = 8  # files at a time
_LEAST, _FIRST, _MOST = 1 << 18, 1 << 22, 1 << 25  # bytes asked for at a time
_SECONDS = 2.0  # that one request is meant to take: so much is lost where a connection breaks
_HASHED = 1 << 20
_FAREWELL = 10.0  # seconds that the others have to end, all together, once one has failed

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that is to come: where it lies, how many bytes travel, and what they must become."""

    name: str  # inside the place
    size: int  # bytes that travel
    xxh3_128: str  # of the file, unpacked
    packed: bool = False
    unpacked: int = 0  # bytes of the file, where it travels packed


class Traffic:
    """Bytes that were moved, told to a progress bar from any thread; and the wish to stop, heard in all of them."""

    def __init__(self, update: Callable[[int], Any] | None = None) -> None:
        self._update, self._lock = update, threading.Lock()
        self.stopped = threading.Event()
        self.moved = 0

    def add(self, count: int) -> None:
        """`count` bytes travelled; negative ones will travel again."""
        if self.stopped.is_set():
            raise _Stopped
        with self._lock:
            self.moved += count
            if self._update is not None and count:
                self._update(count)

    def skip(self, count: int) -> None:
        """`count` bytes were there already: the bar counts them, the traffic does not."""
        with self._lock:
            if self._update is not None and count:
                self._update(count)


def in_parallel(act: Callable[[T], R], tasks: Sequence[T], traffic: Traffic, *, threads: int = THREADS) -> Iterator[R]:
    """`act` of every task, some at a time, results as they come. The first error stops all, and comes out.

    Threads of its own that a Ctrl-C need not wait for: a file that is not whole yet has another name.
    """
    waiting, done = iter(tasks), queue.SimpleQueue[tuple[R | None, BaseException | None]]()
    lock = threading.Lock()

    def work() -> None:
        while not traffic.stopped.is_set():
            with lock:
                task = next(waiting, None)
            if task is None:
                return
            try:
                done.put((act(task), None))
            except BaseException as error:  # belongs to who waits for it
                done.put((None, error))
                return

    workers = [
        threading.Thread(target=work, name=f"softlabels-transfer-{n}", daemon=True) for n in range(max(threads, 1))
    ]
    workers = workers[: max(1, len(tasks))]
    for worker in workers:
        worker.start()
    try:
        for _ in range(len(tasks)):
            result, error = done.get()
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
    except Exception:
        traffic.stopped.set()
        until = time.monotonic() + _FAREWELL
        for worker in workers:  # what they still write is not to meet what is done about the error
            worker.join(timeout=max(until - time.monotonic(), 0))
        raise
    finally:
        traffic.stopped.set()


def download(place: Place, file: RemoteFile, target: Path, *, traffic: Traffic) -> None:
    """Bring `file` to `target`, whole and with the right hash, or not at all. What arrived of it before is kept.

    Bytes come in order, so that a part is always a beginning: its name says of which bytes. CacheError where the file
    is missing there, or is not what it should be, twice. What another process has brought meanwhile is not fetched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{TEMPORARY}{target.name}.{file.xxh3_128[:16]}{'.packed' if file.packed else ''}")
    with _locked(part) as handle:
        if not os.fstat(handle).st_size and target.is_file() and hash_file(target) == file.xxh3_128:
            part.unlink()
            traffic.skip(file.size)
            return
        for last in (False, True):
            found = _fetch(place, file, handle, traffic)
            if file.packed:
                found = unpack_file(handle, temporary(target), size=file.unpacked)
            if found == file.xxh3_128:
                break
            os.ftruncate(handle, 0)
            if last:
                part.unlink(missing_ok=True)
                temporary(target).unlink(missing_ok=True)
                raise CacheError(
                    f"{place.shown}/{file.name} is not the file that was pushed: its checksum is wrong. Have it pushed "
                    f"again with --check, which puts back what is damaged"
                )
            traffic.add(-file.size)
        if not file.packed:
            os.fsync(handle)
            os.replace(part, temporary(target))
        publish(target)
        if file.packed:
            part.unlink()  # last: killed before, nothing has to come again


@contextmanager
def _locked(part: Path) -> Iterator[int]:
    """The open file of a part, for this process and thread alone."""
    while True:
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, part):  # not finished by another meanwhile
                yield handle
                return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _fetch(place: Place, file: RemoteFile, handle: int, traffic: Traffic) -> str:
    """Fetch what is missing of the part in `handle`; the xxh3-128 of all of it."""
    hasher = xxhash.xxh3_128()
    have = min(os.fstat(handle).st_size, file.size)
    os.ftruncate(handle, have)
    os.lseek(handle, 0, os.SEEK_SET)
    view = memoryview(bytearray(_HASHED))
    while count := os.readv(handle, [view]):
        hasher.update(view[:count])
    traffic.skip(have)
    patience, ask = Patience(), min(place.ask or _FIRST, _MOST)
    while have < file.size:
        stop = min(have + ask, file.size)
        data, seconds = _ask(place, file, have, stop, patience)
        if traffic.stopped.is_set():
            raise _Stopped
        if data is None:
            place.ask = ask = max(_LEAST, ask // 4)
            continue
        if stop - have == ask:
            place.ask = ask = int(min(_MOST, max(_LEAST, min(4 * ask, ask * _SECONDS / seconds))))
        _write_all(handle, data, have)
        hasher.update(data)
        have += len(data)
        traffic.add(len(data))
        patience.progressed()
    return hasher.hexdigest()


def _write_all(handle: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(handle, view, place)
        view, place = view[count:], place + count


def _ask(place: Place, file: RemoteFile, start: int, stop: int, patience: Patience) -> tuple[bytes | None, float]:
    """The bytes from `start` to `stop`, or more of them, and the seconds that took; None: it failed this time."""
    began = time.monotonic()
    try:
        found = place.try_once(lambda fs: _cat(place, fs, file, start, stop), patience)
    except FileNotFoundError:
        raise CacheError(
            f"{place.shown} lacks {file.name}, which its manifest names: have the cache pushed again"
        ) from None
    return None if isinstance(found, Failed) else found, max(time.monotonic() - began, 1e-3)


def _cat(place: Place, fs: Any, file: RemoteFile, start: int, stop: int) -> bytes:
    data = place.cat(fs, file.name, start, stop, most=file.size - start)
    if len(data) < stop - start:  # a connection that ended early without a word
        raise ConnectionError(f"{len(data)} bytes came instead of {stop - start}")
    return data
