"""A cache behind a URL while it is dumped: what says how it stands is kept in a folder here, its shards never are.

The folder begins with what lies there already (the manifest, the small folders, the receipt of every shard whose data
is whole) and gets the receipts of the shards that workers bring in. It is sent back in an order by which a reader never
finds a manifest that speaks of what isn't there: small folders, a first manifest; then the shards; the last manifest.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softlabels.cache.delivery import StorePlace, new_lease, open_store
from softlabels.cache.files import write_file
from softlabels.cache.format import (
    MANIFEST,
    MANIFEST_LIMIT,
    RECEIPT,
    RECEIPT_LIMIT,
    read_receipt,
    receipt_file,
)
from softlabels.cache.settings import FOLDERS, settings_files
from softlabels.cache.urls import hide, redact
from softlabels.errors import CacheError, SoftlabelsError

_SHARD = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.@-]*)/([0-9]{5,})\.(arrow|json)")
_SETTING = re.compile(rf"({'|'.join(FOLDERS)})(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")
_AT_ONCE = 1000  # receipts fetched at a time
_LARGEST = 16 << 30  # bytes of a file in a small folder: a head over a vocabulary is the largest


class Store:
    """The cache at `place.url`, and the `folder` here that stands for it."""

    def __init__(self, place: StorePlace, folder: Path) -> None:
        self.place, self.folder = place, folder
        self._sent: dict[str, bytes | int] = {}  # what is there: the two files of the root, sizes of the others

    def fetch(self) -> None:
        """What is there already; of a shard only if its data has the size that its receipt says."""
        with _told(self.place.url):
            fs, root = open_store(self.place.url)
            sizes = _sizes(fs, root)
            for name, limit in ((MANIFEST, MANIFEST_LIMIT), (RECEIPT, MANIFEST_LIMIT)):
                if name in sizes:
                    _refuse_large(name, sizes[name], limit)
                    data: bytes = fs.cat_file(f"{root}/{name}")
                    self._sent[name] = data
                    write_file(self.folder / name, data)
            for name, size in sizes.items():
                if _SETTING.fullmatch(name):
                    _refuse_large(name, size, _LARGEST)
                    self._sent[name] = size
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    fs.get_file(f"{root}/{name}", str(self.folder / name))
            self._fetch_receipts(fs, root, sizes)

    def _fetch_receipts(self, fs: Any, root: str, sizes: Mapping[str, int]) -> None:
        names = [
            name
            for name, size in sizes.items()
            if (match := _SHARD.fullmatch(name)) and match[3] == "json" and size <= RECEIPT_LIMIT
        ]
        for start in range(0, len(names), _AT_ONCE):
            found = fs.cat([f"{root}/{name}" for name in names[start : start + _AT_ONCE]], on_error="omit")
            for path, data in found.items():
                field, number = path.split("/")[-2:]
                shard = int(number.removesuffix(".json"))
                self.keep({field: data}, shard)
                receipt = read_receipt(self.folder, field, shard)
                if receipt is None or sizes.get(f"{field}/{shard:05d}.arrow") != receipt.bytes:
                    receipt_file(self.folder, field, shard).unlink()

    def keep(self, receipts: Mapping[str, bytes], shard: int) -> None:
        """Note that a shard of some fields is there."""
        for field, data in receipts.items():
            path = receipt_file(self.folder, field, shard)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)  # to be seen by this process alone: nothing to sync

    def begin(self) -> None:
        """Send the small folders and the first manifest, and let workers write."""
        with _told(self.place.url):
            fs, root = open_store(self.place.url)
            for name in (name for part in FOLDERS for name in settings_files(self.folder, part)):
                if self._sent.get(name) != (self.folder / name).stat().st_size:
                    fs.makedirs(f"{root}/{name.rpartition('/')[0]}", exist_ok=True)
                    fs.put_file(str(self.folder / name), f"{root}/{name}")
            fs.makedirs(root, exist_ok=True)
            self._send(fs, root, MANIFEST)
            self.place.begin()

    def finish(self) -> None:
        """Send what `CacheBuild.finish` has written."""
        with _told(self.place.url):
            fs, root = open_store(self.place.url)
            if self._sent.get(MANIFEST) != (self.folder / MANIFEST).read_bytes() and RECEIPT in self._sent:
                fs.rm_file(f"{root}/{RECEIPT}")  # at no moment it speaks of another manifest
                del self._sent[RECEIPT]
            self._send(fs, root, MANIFEST)
            self._send(fs, root, RECEIPT)

    def _send(self, fs: Any, root: str, name: str) -> None:
        data = (self.folder / name).read_bytes()
        if self._sent.get(name) != data:
            fs.pipe_file(f"{root}/{name}", data)
            self._sent[name] = data


@contextmanager
def mirror(url: str) -> Iterator[Store]:
    """The cache at `url`, its folder here gone when the block ends. CacheError: the store can't be reached."""
    place = StorePlace(url.rstrip("/"), new_lease())
    with tempfile.TemporaryDirectory(prefix="softlabels-store-") as folder:
        store = Store(place, Path(folder))
        store.fetch()
        try:
            yield store
        finally:
            with _told(url):
                place.end()


def _sizes(fs: Any, root: str) -> dict[str, int]:
    """Every file's size by its path below `root`; none where there is nothing."""
    found = fs.find(root, detail=True)
    return {path[len(root) + 1 :]: int(facts["size"]) for path, facts in found.items() if path.startswith(f"{root}/")}


def _refuse_large(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise CacheError(f"{name} has {size} bytes, more than any can have ({limit}): it is damaged")


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Stores fail in as many ways as there are stores."""
    try:
        yield
    except SoftlabelsError:
        raise
    except Exception as error:
        words = " ".join(hide(str(error), url).split())[:300]
        raise CacheError(f"{redact(url)} can't be read or written: {type(error).__name__}: {words}") from error
