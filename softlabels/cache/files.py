"""Crash-safe files: temporary name, sync, rename; one writer a folder; checksums; files mapped into memory.

What comes in are bytes; what goes out is a file that is whole or not there.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TextIO

import pyarrow as pa
import xxhash

from softlabels.cache.format import TEMPORARY
from softlabels.errors import CacheError

_CHUNK = 1 << 20  # bytes read at a time when hashing: what was just copied is still in the processor's cache


def temporary(path: Path) -> Path:
    """The name a file has until it is whole."""
    return path.with_name(TEMPORARY + path.name)


def publish(path: Path) -> None:
    """Give the finished, synced temporary file its real name, durably."""
    os.replace(temporary(path), path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path`, whole or not at all."""
    with FileGroup() as group:
        group.write(path, data)


class FileGroup:
    """Files that get their names together, at the end of a `with` block. Each is whole then, or not there.

    Where the block fails none is there; where giving names does, some may be. A folder is synced once for all that came
    into it, and the files' own syncs find them on their way to the disk: a third of the time of one after the other,
    where they are small. Each is open until then, so a group is of tens of files.
    """

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Write `data` to what will be `path`."""
        if path in self._open:
            raise ValueError(f"{path} is written already")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(temporary(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            self._open[path] = handle
            view = memoryview(data)
            while len(view):
                view = view[os.write(handle, view) :]
        except BaseException:
            self._forget(path)
            raise

    def publish(self) -> None:
        """Sync what was written and give it its names."""
        if len(self._open) > 1 and _start_writing is not None:
            for handle in self._open.values():
                _start_writing(handle, 0, 0, _WRITE)
        for handle in self._open.values():
            os.fsync(handle)
        folders = {path.parent for path in self._open}
        for path in list(self._open):
            os.replace(temporary(path), path)
            self._close(path)
        for folder in folders:
            sync_folder(folder)

    def discard(self) -> None:
        """Remove what has no name yet."""
        for path in list(self._open):
            self._forget(path)

    def _forget(self, path: Path) -> None:
        temporary(path).unlink(missing_ok=True)
        if path in self._open:
            self._close(path)

    def _close(self, path: Path) -> None:
        os.close(self._open.pop(path))  # out of the dict first: a Ctrl-C in between can't have it closed twice

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self.discard()


@contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to write piece by piece; at `path` when the block ends well, and nowhere when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(temporary(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        with open(handle, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(handle)
        publish(path)
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, as 32 hex characters."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return hash_handle(handle)
    finally:
        os.close(handle)


def hash_handle(handle: int, done: Callable[[int], object] | None = None) -> str:
    """xxh3-128 of an open file; `done` is told the bytes of each piece."""
    hasher = xxhash.xxh3_128()
    view = memoryview(bytearray(_CHUNK))
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # twice the usual read-ahead
    while count := os.readv(handle, [view]):
        hasher.update(view[:count])
        if done is not None:
            done(count)
    return hasher.hexdigest()


def sweep_temporary(folder: Path) -> None:
    """Remove what a killed writer left in the field folders of a cache. Only under `lock`."""
    for path in temporary_files(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def temporary_files(folder: Path, *, inside: bool = True) -> list[Path]:
    """What a writer has begun or a killed one left: in `folder` and, `inside`, in its folders, links not followed."""
    with os.scandir(folder) as entries:
        found = list(entries)
    left = [Path(entry.path) for entry in found if entry.name.startswith(TEMPORARY)]
    for place in [Path(entry.path) for entry in found if inside and entry.is_dir(follow_symlinks=False)]:
        if not place.name.startswith(TEMPORARY):
            left += [place / name for name in os.listdir(place) if name.startswith(TEMPORARY)]
    return sorted(left)


@contextmanager
def lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """One writer in `folder` at a time, or any number that only look (`shared`) and no writer.

    The system frees the lock of a dead process, so none is ever stale.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(
                f"{folder} is being written by another process: wait for it"
                + ("" if shared else " (or for its `verify`), or choose another --out")
            ) from None
        yield
    finally:
        os.close(handle)


def map_file(file: Path | int, size: int) -> pa.Buffer:
    """The first `size` bytes of a file, mapped read-only for as long as the buffer or a view of it lives.

    `file` is its path, or a descriptor of it that stays the caller's. None is kept: a process commonly has 1,024.
    `pyarrow.memory_map` keeps one a file, and Python's `mmap` duplicates the one that it is given.
    """
    handle = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
    try:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        if address in (None, _MAP_FAILED):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        if handle is not file:
            os.close(handle)
    return pa.foreign_buffer(address, size, base=_Mapping(address, size))


class _Mapping:
    """Owns mapped memory: what holds it as its base keeps the memory mapped."""

    def __init__(self, address: int, size: int) -> None:
        weakref.finalize(self, _libc.munmap, address, size).atexit = False  # at exit, the system frees it


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,  # off_t
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and wait for nothing
_start_writing = getattr(_libc, "sync_file_range", None)  # Linux's
if _start_writing is not None:
    _start_writing.argtypes = (ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_uint)
