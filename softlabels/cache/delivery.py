"""How a shard that was written elsewhere comes into its cache: the data first, the receipt last, never half of either.

A worker of a cluster writes a shard into a folder of its own, in the ordinary way. From there it is renamed into a
cache on the same file system, or sent into a store behind a URL (s3://, sftp://, file://) that fsspec knows.

A **lease** is a small file in the cache that says which dump writes there. The next dump removes it, so that a worker
that has outlived its own dump, on a machine that lost touch, delivers nothing any more.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from softlabels.cache.files import lock, sync_folder
from softlabels.cache.format import TEMPORARY, receipt_file, shard_file
from softlabels.cache.urls import Place as UrlPlace
from softlabels.cache.urls import redact
from softlabels.errors import CacheError

LEASE = f"{TEMPORARY}lease-"
_SCRATCH = "softlabels-dump-"  # in the system's temporary folder


class Place(Protocol):
    """Where a cache lies, as a worker sees it; pickled."""

    def check(self) -> None:
        """CacheError where the dump that gave this place is over, or the place can't be seen from here."""

    def scratch(self) -> Any:
        """A context: the folder to write shards in."""

    def deliver(self, scratch: Path, fields: Sequence[str], shard: int) -> dict[str, bytes]:
        """Bring a shard of `fields` in; its receipts, by field."""


def new_lease() -> str:
    """A lease's name."""
    return f"{LEASE}{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class FolderPlace:
    """A folder that every worker sees under the same path."""

    folder: Path  # absolute
    lease: str

    def begin(self) -> None:
        """Let workers write, under the folder's lock."""
        (self.folder / self.lease).touch()

    def end(self, fields: Sequence[str]) -> None:
        """Sync what workers have renamed in the folders of `fields`; from now on nothing is brought in any more."""
        (self.folder / self.lease).unlink(missing_ok=True)
        for field in fields:
            if (self.folder / field).is_dir():
                sync_folder(self.folder / field)

    def check(self) -> None:
        if not (self.folder / self.lease).is_file():
            raise CacheError(
                f"{self.folder} is another folder here than where the dump was started, or another dump has begun "
                f"there: with several machines --out must lie on a file system that all of them share, or be a URL "
                f"(s3://…)"
            )

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        folder = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"  # swept by the next dump, whatever happens here
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def deliver(self, scratch: Path, fields: Sequence[str], shard: int) -> dict[str, bytes]:
        self.check()
        receipts = {}
        for field in fields:
            data = shard_file(self.folder, field, shard)
            receipts[field] = receipt_file(scratch, field, shard).read_bytes()
            if not data.parent.is_dir():
                data.parent.mkdir(exist_ok=True)
                sync_folder(self.folder)
            receipt_file(self.folder, field, shard).unlink(missing_ok=True)  # says nothing about the file that comes
            os.replace(shard_file(scratch, field, shard), data)
        for field in fields:
            sync_folder(self.folder / field)  # first: a power cut must not leave a receipt without its data
            os.replace(receipt_file(scratch, field, shard), receipt_file(self.folder, field, shard))
        return receipts


@dataclass(frozen=True, slots=True)
class StorePlace:
    """A store behind a URL. What opens it (keys, an endpoint) is in each worker's own environment."""

    url: str
    lease: str

    @property
    def place(self) -> UrlPlace:
        """The store as this process reaches it; errors as `softlabels.cache.urls` tells them."""
        return _open_place(self.url)

    def begin(self) -> None:
        """Let workers write; those of any other dump no longer."""
        for name in self.place.list(""):
            if name.startswith(LEASE):
                self.place.remove(name)
        self.place.put_bytes(self.lease, b"\n")

    def end(self) -> None:
        """Take the lease back."""
        self.place.remove(self.lease)

    def check(self) -> None:
        try:
            self.place.size(self.lease)
        except FileNotFoundError:
            raise CacheError(
                f"{redact(self.url)} is another place here than where the dump was started, or another has begun"
            ) from None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        _sweep_scratch()
        with ExitStack() as held:
            yield _make_scratch(held)

    def deliver(self, scratch: Path, fields: Sequence[str], shard: int) -> dict[str, bytes]:
        self.check()
        receipts = {}
        for field in fields:
            data, receipt = shard_file(scratch, field, shard), receipt_file(scratch, field, shard)
            receipts[field] = receipt.read_bytes()
            self.place.make_folder(field)
            self.place.put_file(data, f"{field}/{data.name}", tell=lambda count: None)
            self.place.put_bytes(f"{field}/{receipt.name}", receipts[field])
            data.unlink()
            receipt.unlink()
        return receipts


@lru_cache(maxsize=8)
def _open_place(url: str) -> UrlPlace:
    """One for all calls of a process: it connects, and learns how the way is, once."""
    return UrlPlace(url)


def _make_scratch(held: ExitStack) -> Path:
    """A folder that is locked until this process is gone, however it goes, and that is removed with `held`."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        with suppress(CacheError, FileNotFoundError):
            held.enter_context(lock(folder))
            if folder.is_dir():  # else the sweep of a worker that starts too was faster than the lock
                held.callback(shutil.rmtree, folder, ignore_errors=True)
                return folder


def _sweep_scratch() -> None:
    """Remove what killed workers left on this machine."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(CacheError, OSError), lock(folder):
            shutil.rmtree(folder, ignore_errors=True)
