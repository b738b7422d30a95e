"""Crash-safe files: temporary name, sync, rename; and one writer a folder.

What comes in are bytes or a function that writes them; what goes out is a file that is whole or not there.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import xxhash

from softlabels.cache.format import TEMPORARY
from softlabels.errors import CacheError

_CHUNK = 8 << 20  # bytes read at a time when hashing


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


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary(path), "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise
    publish(path)


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, as 32 hex characters."""
    hasher = xxhash.xxh3_128()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            hasher.update(view[:count])
    return hasher.hexdigest()


def sweep_temporary(folder: Path) -> None:
    """Remove what a killed writer left in the field folders of a cache. Only under `lock`."""
    for path in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"*/{TEMPORARY}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One writer in `folder` at a time. The system frees the lock of a dead process, so none is ever stale."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(
                f"{folder} is being written by another process: wait for it, or choose another --out"
            ) from None
        yield
    finally:
        os.close(handle)


def map_file(path: Path, size: int) -> pa.Buffer:
    """The first `size` bytes of a file, mapped read-only for as long as the buffer or a view of it lives.

    It keeps no file descriptor, of which a process commonly has 1,024: `pyarrow.memory_map` keeps one a file, and
    Python's `mmap` duplicates the one that it is given.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        if address in (None, _MAP_FAILED):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
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
