"""One dump shared out over machines without anyone who shares it out: `--part 3/8` is the third eighth of the shards.

Which shards a part has follows from the corpus's rows alone, so no part needs to know of another. In a folder of their
own the shards of a part are an unfinished cache of the whole corpus, and `combine --rows` puts such folders together.
In one folder for all, parts keep out of each other's way by locks on a file beside the manifest, `.tmp-parts`: each
holds the bytes that are the numbers of its shards, and one more while it reads and writes what all share. They are
POSIX locks, which the system frees when a process dies and which network file systems (NFS, Lustre, GPFS) know. Whoever
finds all shards whole completes the cache and removes the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from softlabels.cache.files import lock, temporary_files
from softlabels.cache.format import TEMPORARY
from softlabels.cache.settings import FOLDERS
from softlabels.errors import CacheError, ConfigError

_LOCK = TEMPORARY + "parts"
_TALK = 1 << 60  # the byte that is held while what all parts share is read and written
_HERE = _TALK + 1  # the byte that every living part shares
_BUSY = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number`, from 1, of `of`."""

    number: int
    of: int

    def shards(self, count: int) -> range:
        """Which of `count` shards it has: neighbours, so that parts in their order are the corpus in its order."""
        return range((self.number - 1) * count // self.of, self.number * count // self.of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def parse_part(text: str) -> Part:
    """'3/8' as a part; ConfigError where it is none."""
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", text, re.ASCII)
    if found is None:
        raise ConfigError(f"--part {text}: write 3/8 for the third of eight parts")
    part = Part(int(found[1]), int(found[2]))
    if not 1 <= part.number <= part.of:
        raise ConfigError(f"--part {text}: there are parts 1/{max(part.of, 1)} to {max(part.of, 1)}/{max(part.of, 1)}")
    return part


@dataclass(frozen=True, slots=True)
class Claim:
    """The shards that this process alone may write, in a folder that others write too."""

    folder: Path
    shards: range
    handle: int  # of the lock file; whoever closes it gives up the claim

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other part reads or writes what all share; waits for its turn, which takes moments."""
        _lock(self.handle, fcntl.F_WRLCK, _TALK, wait=True)
        try:
            yield
        finally:
            _lock(self.handle, fcntl.F_UNLCK, _TALK)

    def leave(self) -> None:
        """The cache is complete; the last one here removes the lock file. To be called `alone`."""
        if _lock(self.handle, fcntl.F_WRLCK, _HERE):
            (self.folder / _LOCK).unlink(missing_ok=True)
        else:
            _lock(self.handle, fcntl.F_UNLCK, _HERE)  # within `alone`: the other one will not find this one here

    def sweep(self, *, shared: bool) -> None:
        """Remove what a killed process left of these shards; and, when `alone`, of what is `shared`."""
        for path in temporary_files(self.folder):
            if path.parent == self.folder or path.parent.name in FOLDERS:
                ours = shared and path.name != _LOCK and not path.is_dir()  # a folder's draft is written anew
            else:
                number = path.name.removeprefix(TEMPORARY).split(".")[0]
                ours = number.isdecimal() and int(number) in self.shards
            if ours:
                path.unlink(missing_ok=True)


@contextmanager
def claim_shards(folder: Path, shards: range) -> Iterator[Claim]:
    """Until the block ends, nobody else writes `shards` of the cache in `folder`; other parts may write others.

    CacheError where another process writes them, or all of the cache, or where the file system has no locks.
    """
    with lock(folder, shared=True):
        handle = _open(folder)
        try:
            if not _lock(handle, fcntl.F_WRLCK, shards.start, len(shards)):
                raise CacheError(
                    f"another process is dumping shards of {folder} that this part has too: it is given twice, "
                    f"or not all have the same number of parts. Wait for it, or stop it"
                )
            yield Claim(folder, shards, handle)
        finally:
            os.close(handle)


def refuse_parts(folder: Path) -> None:
    """CacheError where a part is being written, maybe on another machine."""
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not _lock(handle, fcntl.F_WRLCK, _HERE):
            raise CacheError(
                f"{folder} is being written by a `dump --part`, maybe on another machine: wait for it, or choose "
                f"another --out"
            )
    finally:
        os.close(handle)


def _open(folder: Path) -> int:
    """The lock file, with this process known to be here."""
    while True:
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _lock(handle, fcntl.F_RDLCK, _HERE, wait=True)
            try:
                there = os.stat(folder / _LOCK, follow_symlinks=False)
            except FileNotFoundError:
                there = None
            if there is not None and os.path.samestat(there, os.fstat(handle)):
                return handle
        except BaseException as error:
            os.close(handle)
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                raise CacheError(
                    f"the file system of {folder} has no locks, without which parts cannot share a folder: give each "
                    f"part an --out of its own, and put them together with softlabels combine --rows"
                ) from None
            raise
        os.close(handle)  # it was removed in between, by the last part of before


def _lock(handle: int, kind: int, first: int, count: int = 1, *, wait: bool = False) -> bool:
    """Lock or unlock `count` bytes from `first` on; False where another process holds one and `wait` is false."""
    if not count:  # as no bytes; to the system it would mean all
        return True
    # of the open file, not of the process: closing another descriptor of it frees nothing
    asked = struct.pack("hhqqi4x", kind, os.SEEK_SET, first, count, 0)
    try:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, asked)
    except OSError as error:
        if error.errno in _BUSY and not wait:
            return False
        raise
    return True
