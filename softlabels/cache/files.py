"""Crash-safe files: temporary name, sync, rename; and one writer a folder.

What comes in are bytes or a function that writes them; what goes out is a file that is whole or not there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
