"""A cache behind a URL while it is dumped: what says how it stands is kept in a folder here, its shards never are.

The folder begins with what lies there already (the manifest, the small folders, the receipt of every shard whose data
is whole) and gets the receipts of the shards that workers bring in. It is sent back in an order by which a reader never
finds a manifest that speaks of what isn't there: small folders, a first manifest; then the shards; the last manifest.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from softlabels.cache.delivery import StorePlace, new_lease
from softlabels.cache.files import write_file
from softlabels.cache.format import (
    EXAMPLES,
    FIELD_NAME,
    MANIFEST,
    MANIFEST_LIMIT,
    RECEIPT,
    RECEIPT_LIMIT,
    TEMPORARY,
    read_receipt,
    receipt_file,
    shard_name,
)
from softlabels.cache.settings import FOLDERS, settings_files
from softlabels.cache.transfer import THREADS, Traffic, in_parallel
from softlabels.cache.urls import Place
from softlabels.errors import CacheError, SoftlabelsError

_RECEIPT = re.compile(rf"({FIELD_NAME.pattern})/([0-9]{{5}}|[1-9][0-9]{{5,}})\.json")
_SETTING = re.compile(rf"({'|'.join(FOLDERS)})(/[A-Za-z0-9_-][A-Za-z0-9_.-]*){{1,4}}")
_PUSHED = re.compile(rf"{EXAMPLES}-[0-9a-f]{{16}}")  # the folder that `softlabels push` makes
_DEEPEST = 4  # folders around a file of a small one
_AT_ONCE = 64  # receipts fetched at a time, where one connection carries all
_LARGEST = 16 << 30  # bytes of a file in a small folder: a head over a vocabulary is the largest


class Store:
    """The cache at `lease.url`, and the `folder` here that stands for it."""

    def __init__(self, lease: StorePlace, folder: Path) -> None:
        self.place, self.folder = lease, folder
        self.begun = False
        self._sent: dict[str, bytes | int] = {}  # what is there: the two files of the root, sizes of the others
        self._wrong: list[str] = []  # there and to go: halves, what a dump that never began left, receipts of no shard

    @property
    def _there(self) -> Place:
        return self.place.place

    def fetch(self) -> None:
        """What is there already; of a shard only if its data has the size that its receipt says.

        CacheError: what is there is no cache that a dump can go on with.
        """
        self._there.refuse_read_only()
        root = self._there.list("")
        self._refuse_strangers(root)
        sizes = _sizes(self._there, root)
        settings = [name for name in sizes if _SETTING.fullmatch(name)]
        self._wrong += [name for name in sizes if name.rpartition("/")[2].startswith(TEMPORARY)]
        if MANIFEST not in root:  # of a dump that was killed before it put one: nobody knows what of it is whole
            self._wrong += settings
            return
        for name in (MANIFEST, RECEIPT):
            if name in sizes:
                data = self._there.read(name, limit=MANIFEST_LIMIT)
                self._sent[name] = data
                write_file(self.folder / name, data)
        for name in settings:
            if sizes[name] > _LARGEST:
                raise CacheError(f"{name} has {sizes[name]:,} bytes, more than any can have ({_LARGEST:,}): refused")
            self._sent[name] = sizes[name]
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._there.get_file(name, self.folder / name, size=sizes[name])
        self._fetch_receipts(sizes)

    def _refuse_strangers(self, root: Mapping[str, int | None]) -> None:
        if any(_PUSHED.fullmatch(name) for name in root):
            raise CacheError(
                f"{self._there.shown} holds a cache that was pushed there, which no dump can go on with: give another "
                f"--out, or dump into a folder and push the fields that are new"
            )
        strangers = sorted(name for name in root if name not in FOLDERS and not name.startswith(TEMPORARY))
        if strangers and MANIFEST not in root:
            raise CacheError(
                f"{self._there.shown} is not empty and no cache (it holds {', '.join(strangers[:5])}): choose another "
                f"--out"
            )

    def _fetch_receipts(self, sizes: Mapping[str, int]) -> None:
        names = [name for name, size in sizes.items() if _RECEIPT.fullmatch(name) and size <= RECEIPT_LIMIT]
        threads = _AT_ONCE if self._there.is_asynchronous else THREADS
        for name, data in in_parallel(self._read_receipt, names, Traffic(), threads=threads):
            field, _, file = name.partition("/")
            shard = int(file.removesuffix(".json"))
            self.keep({field: data}, shard)
            receipt = read_receipt(self.folder, field, shard)
            if receipt is None or sizes.get(f"{field}/{shard_name(shard)}") != receipt.bytes:
                receipt_file(self.folder, field, shard).unlink()
                self._wrong.append(name)  # or it would speak of the data that comes, until its own does

    def _read_receipt(self, name: str) -> tuple[str, bytes]:
        try:
            return name, self._there.read(name, limit=RECEIPT_LIMIT)
        except FileNotFoundError:  # it went just now
            return name, b""

    def keep(self, receipts: Mapping[str, bytes], shard: int) -> None:
        """Note that a shard of some fields is there."""
        for field, data in receipts.items():
            path = receipt_file(self.folder, field, shard)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)  # to be seen by this process alone: nothing to sync

    def begin(self) -> None:
        """Send the small folders and the first manifest, and let workers write."""
        there, own = self._there, [name for part in FOLDERS for name in settings_files(self.folder, part)]
        there.make_folder("")
        self.begun = True
        self.place.begin()  # the leases among `_wrong` went with it
        for name in self._wrong:
            if name not in own:
                there.remove(name)
        for name in own:
            if self._sent.get(name) != (self.folder / name).stat().st_size:
                there.make_folder(name.rpartition("/")[0])
                there.put_file(self.folder / name, name, tell=lambda count: None)
        self._send(MANIFEST)

    def finish(self) -> None:
        """Send what `CacheBuild.finish` has written."""
        if self._sent.get(MANIFEST) != (self.folder / MANIFEST).read_bytes() and RECEIPT in self._sent:
            self._there.remove(RECEIPT)  # at no moment it speaks of another manifest
            del self._sent[RECEIPT]
        self._send(MANIFEST)
        self._send(RECEIPT)

    def _send(self, name: str) -> None:
        data = (self.folder / name).read_bytes()
        if self._sent.get(name) != data:
            self._there.put_bytes(name, data)
            self._sent[name] = data


@contextmanager
def mirror(url: str) -> Iterator[Store]:
    """The cache at `url`, its folder here gone when the block ends.

    CacheError, ConfigError: the store can't be reached, or holds what no dump can go on with.
    """
    lease = StorePlace(url.rstrip("/"), new_lease())
    with tempfile.TemporaryDirectory(prefix="softlabels-store-") as folder:
        store = Store(lease, Path(folder))
        store.fetch()
        try:
            yield store
        except BaseException:
            if store.begun:
                with suppress(SoftlabelsError):  # what went wrong before is what is told
                    lease.end()
            raise
        if store.begun:
            lease.end()


def _sizes(place: Place, root: Mapping[str, int | None]) -> dict[str, int]:
    """Every file's size by its path, in the root and in the folders that a cache has."""
    sizes = {name: size for name, size in root.items() if size is not None}
    waiting = [name for name, size in root.items() if size is None and FIELD_NAME.fullmatch(name)]
    while waiting:
        folder = waiting.pop()
        for name, size in place.list(folder).items():
            path = f"{folder}/{name}"
            if size is not None:
                sizes[path] = size
            elif folder.split("/")[0] in FOLDERS and path.count("/") < _DEEPEST:
                waiting.append(path)
    return sizes
