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
from pathlib import Path
from typing import Any, Protocol

from softlabels.cache.files import lock, sync_folder
from softlabels.cache.format import TEMPORARY, receipt_file, shard_file
from softlabels.cache.urls import hide, redact
from softlabels.errors import CacheError, ConfigError

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

    def begin(self) -> None:
        """Let workers write; those of any other dump no longer."""
        fs, root = open_store(self.url)
        for path in fs.glob(f"{root}/{LEASE}*"):
            fs.rm_file(path)
        fs.pipe_file(f"{root}/{self.lease}", b"\n")

    def end(self) -> None:
        """Take the lease back."""
        fs, root = open_store(self.url)
        with suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{self.lease}")

    def check(self) -> None:
        fs, root = open_store(self.url)
        if not fs.exists(f"{root}/{self.lease}"):
            raise CacheError(
                f"{redact(self.url)} is another place here than where the dump was started, or another has begun"
            )

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        _sweep_scratch()
        with ExitStack() as held:
            yield _make_scratch(held)

    def deliver(self, scratch: Path, fields: Sequence[str], shard: int) -> dict[str, bytes]:
        self.check()
        fs, root = open_store(self.url)
        receipts = {}
        for field in fields:
            data, receipt = shard_file(scratch, field, shard), receipt_file(scratch, field, shard)
            receipts[field] = receipt.read_bytes()
            fs.makedirs(f"{root}/{field}", exist_ok=True)  # nothing where there are only objects
            fs.put_file(str(data), f"{root}/{field}/{data.name}")
            fs.pipe_file(f"{root}/{field}/{receipt.name}", receipts[field])
            data.unlink()
            receipt.unlink()
        return receipts


def open_store(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it; ConfigError where nothing is known to open it.

    What others do there is seen at once: listings aren't kept.
    """
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{redact(url)}: {hide(str(error), url)}") from None
    return fs, root.rstrip("/")


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
