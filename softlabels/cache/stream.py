"""A cache at a URL read without pulling it: shards come when they are wanted, into a local folder that stays bounded.

The folder ($SOFTLABELS_CACHE, by default ~/.cache/softlabels) is shared by all caches and processes. What was not used
for longest goes first; a shard that is mapped when its file goes stays readable, so no process disturbs another.
"""

from __future__ import annotations

import os
import queue
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from softlabels.cache.format import EXAMPLES, TEMPORARY, Manifest, shard_file, to_json
from softlabels.cache.pull import fetch_small_files
from softlabels.cache.remote import FieldCard, Remote
from softlabels.cache.transfer import Traffic, download, in_parallel
from softlabels.errors import CacheError, ConfigError

SIZE = 10_000_000_000  # bytes on this machine's disk, by default
_THREADS = 8
_RECENT = 64  # shards, of those that were asked for last
_STALE = 86_400.0  # seconds after which the part of a file that came is not waited for any more
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_WINDOW = 0.6  # of the room, for the shards whose rows are mixed; the others are those that come


def parse_size(text: str) -> int:
    """'10GB' → bytes; ConfigError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?[bB]?)\s*", text)
    unit = found[2].upper() if found else ""
    unit = unit if unit in _UNITS else f"{unit}B"
    if found is None or unit not in _UNITS or not 0 < float(found[1]) < 1e18:
        raise ConfigError(f"a cache size of '{text[:40]}': give a number with a unit, such as 20GB or 500MB")
    return int(float(found[1]) * _UNITS[unit])


def local_room() -> Path:
    """Where shards of caches at URLs are kept on this machine."""
    return Path(os.environ.get("SOFTLABELS_CACHE") or "~/.cache/softlabels").expanduser() / "shards"


@dataclass(slots=True)
class _Coming:
    """A shard on its way."""

    there: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class ShardStore:
    """The shards of one cache at a URL, as far as they are here. `fetch` one, or say what will be wanted: `ahead`.

    `room` is the folder that stays below `limit` bytes, of which `folder` is this cache's. Safe to use from threads.
    """

    def __init__(self, remote: Remote, folder: Path, *, room: Path, limit: int) -> None:
        self.remote, self.folder, self.room, self.limit = remote, folder, room, limit
        self.url = remote.place.shown
        names = [EXAMPLES, *remote.manifest.fields]
        self._cards: dict[str, FieldCard | None] = dict.fromkeys(names)
        if remote.named:
            found = in_parallel(lambda name: (name, remote.card(name)), names, Traffic(), threads=_THREADS)
            self._cards |= dict(found)
        self._lock, self._making_room = threading.Lock(), threading.Lock()
        self._coming: dict[tuple[str, int], _Coming] = {}
        self._asked: OrderedDict[tuple[str, int], None] = OrderedDict()  # the last ones
        self._came: set[tuple[str, int]] = set()
        self._waiting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._workers = self._reserved = 0
        self._said: set[str] = set()

    def card(self, name: str) -> FieldCard | None:
        """What the place says of a field, where it was pushed."""
        return self._cards[name]

    def prepare(self) -> None:
        """Fetch the tokenizer and the like."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(0)  # another process may have had a larger one
        fetch_small_files(self.remote, self.folder, [self._cards[name] for name in self._cards])

    @property
    def manifest(self) -> Manifest:
        return self.remote.manifest

    def bytes_of(self, fields: Iterable[str]) -> int:
        """Bytes of all shards of these fields."""
        return sum(self.manifest.shards[name].total for name in fields)

    def window(self, fields: Iterable[str]) -> int | None:
        """How many shards' rows can be mixed at a time where these fields are read; None where all of them fit.

        CacheError where not even two shards have room. What the window does is said once, on stderr.
        """
        size, count = self.bytes_of({EXAMPLES, *fields}), len(self.manifest.shard_rows)
        if size <= 0.9 * self.limit:
            return None
        window = int(_WINDOW * self.limit / (size / count))
        if window < 2:
            least = int(2 * size / count / _WINDOW) + 1
            raise CacheError(
                f"{self.url}: the local cache of {_show(self.limit)} has no room for two shards of what is read "
                f"here. Give --cache-size {-(-least // 10**6)}MB or more, or pull the cache"
            )
        self._say(
            f"{self.url}: what is read here has {_show(size)}, more than the local cache of "
            f"{_show(self.limit)}: rows are shuffled within at most {window} of {count} shards at a time, and every "
            f"epoch fetches them again. To fetch them once, pull these fields, or give --cache-size "
            f"{-(-int(size / 0.9) // 10**6)}MB"
        )
        return window

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            sys.stderr.write(line + "\n")

    # ----------------------------------------------------------------------------------------------- fetching

    def fetch(self, name: str, shard: int) -> None:
        """Return when the shard's file is here; CacheError where it can't be had."""
        key = (name, shard)
        while True:
            with self._lock:
                self._asked[key] = None
                self._asked.move_to_end(key)
                while len(self._asked) > _RECENT:
                    self._asked.popitem(last=False)
                if self._is_here(key):
                    return
                coming = self._coming.get(key)
                mine = coming is None
                if coming is None:
                    coming = self._coming[key] = _Coming()
            if mine:
                self._bring(key, coming)
            else:
                coming.there.wait()
            if coming.error is not None:
                raise coming.error

    def ahead(self, places: Iterable[tuple[str, int]]) -> None:
        """Begin to fetch what will be wanted, in this order, as far as there is room beside what is in use."""
        left = int((1 - _WINDOW) * self.limit)
        for key in places:
            left -= self.manifest.shards[key[0]].size(key[1])
            if left < 0 and self.bytes_of(self._cards) > self.limit:
                return
            with self._lock:
                if key in self._coming or self._is_here(key):
                    continue
                self._coming[key] = _Coming()
                if self._workers < _THREADS:
                    self._workers += 1
                    threading.Thread(target=self._work, name="softlabels-stream", daemon=True).start()
                self._waiting.put(key)  # under the lock: a worker that leaves sees it, or was seen to be gone

    def _work(self) -> None:
        while True:
            try:
                key = self._waiting.get(timeout=1.0)
            except queue.Empty:
                with self._lock:
                    if self._waiting.empty():
                        self._workers -= 1
                        return
                continue
            self._bring(key, self._coming[key])

    def _bring(self, key: tuple[str, int], coming: _Coming) -> None:
        (name, shard), size = key, 0
        try:
            file = self.remote.shard(name, shard, self._cards[name])
            size = self.manifest.shards[name].size(shard)
            self._make_room(size)
            download(self.remote.place, file, shard_file(self.folder, name, shard), traffic=Traffic())
            if key in self._came and not self._said:
                self._say(
                    f"{self.url}: shards are fetched again, for the local cache of {_show(self.limit)} has no room "
                    f"for all that is read. Pull the fields that you need, or give a larger --cache-size"
                )
            self._came.add(key)
        except BaseException as error:
            coming.error = error
        finally:
            with self._lock:
                self._coming.pop(key, None)
                self._reserved -= size
            coming.there.set()

    def _is_here(self, key: tuple[str, int]) -> bool:
        path = shard_file(self.folder, *key)
        try:
            whole = path.stat().st_size == self.manifest.shards[key[0]].size(key[1])
            if whole:
                os.utime(path)
        except OSError:
            return False
        return whole

    # --------------------------------------------------------------------------------------------------- room

    def _make_room(self, size: int) -> None:
        """Remove what was not used for longest until `size` bytes more have room, as far as that is possible."""
        with self._making_room:
            files = sorted(_files_in(self.room))
            with self._lock:
                self._reserved += size  # for all that is on its way, until it is a file or has failed
                total = sum(count for _, count, _ in files) + self._reserved
            kept: set[Path] = self._recent() if total > self.limit else set()
            for used, count, path in files:
                if total <= self.limit:
                    return
                is_part = path.name.startswith(TEMPORARY)
                if path in kept or (is_part and time.time() - used < _STALE):
                    continue
                if (is_part or path.suffix == ".arrow") and path.parent.parent.parent == self.room:
                    with suppress(FileNotFoundError):
                        path.unlink()
                    total -= count

    def _recent(self) -> set[Path]:
        """The files that were asked for last, in half of the room: whoever asked for them is about to open them."""
        kept: set[Path] = set()
        left = self.limit // 2
        with self._lock:
            keys = [*self._coming, *reversed(self._asked)]
        for key in keys:
            left -= self.manifest.shards[key[0]].size(key[1])
            if left < 0 and kept:
                break
            kept.add(shard_file(self.folder, *key))
        return kept


def _show(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


def _files_in(room: Path) -> Iterable[tuple[float, int, Path]]:
    """When each shard here was used last, its bytes, and where it lies."""
    for place, _, names in os.walk(room):
        for name in names:
            with suppress(OSError):
                path = Path(place, name)
                told = path.stat()
                yield told.st_mtime, told.st_size, path


def open_store(remote: Remote, *, limit: int | None = None, folder: Path | None = None) -> ShardStore:
    """The shards of a cache at a URL, in this machine's local cache; or all of them in a `folder` of their own."""
    if folder is not None:
        store = ShardStore(remote, folder, room=folder, limit=1 << 60)
    else:
        room = local_room()
        if limit is None:
            given = os.environ.get("SOFTLABELS_CACHE_SIZE")
            limit = parse_size(given) if given else SIZE
        mark = xxhash.xxh3_128(to_json(remote.manifest)).hexdigest()  # another manifest may have other shards
        store = ShardStore(remote, room / mark, room=room, limit=limit)
    store.prepare()
    return store
