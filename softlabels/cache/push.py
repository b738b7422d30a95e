"""A cache comes in, its fields lie at a URL in the end: what is missing there is sent, the manifest last.

How it lies there, and why pushes at the same time do no harm, says `softlabels.cache.remote`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from softlabels.cache.beside import put_beside
from softlabels.cache.files import hash_handle, lock
from softlabels.cache.format import (
    EXAMPLES,
    MANIFEST,
    Manifest,
    load_folder_receipt,
    read_manifest,
    read_receipt,
    shard_file,
    to_json,
)
from softlabels.cache.inside import open_inside
from softlabels.cache.planes import STRIDES, pack_file
from softlabels.cache.remote import (
    CARD,
    PACKED,
    DamagedCard,
    FieldCard,
    Remote,
    base_of,
    checked_files,
    choose_fields,
    folder_of,
    packed_name,
    publish_manifest,
    read_card,
    read_remote_manifest,
    refuse_another,
    shard_file_name,
    small_folders,
    some_fields,
)
from softlabels.cache.settings import settings_hashes
from softlabels.cache.transfer import THREADS, RemoteFile, Traffic, download, in_parallel
from softlabels.cache.urls import Place
from softlabels.errors import CacheError
from softlabels.progress import progress

# Packing is tried for fields of so many bytes, once so many bytes have shown how fast the way is.
_WORTH_A_TRIAL, _SHOWS_THE_SPEED = 1 << 26, 1 << 23
_PAYS = 0.9  # of the time, and of the bytes


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push did."""

    cache: Path
    url: str  # without anything secret
    fields: list[str]  # that are there now, of those that were asked for
    sent_files: int
    sent_bytes: int
    there_bytes: int  # of shards that were there already
    packed: dict[str, float]  # field → share of its bytes that travelled, of those that were packed
    seconds: float


@dataclass(slots=True)
class _Shards:
    """One field on its way."""

    name: str
    folder: str  # at the place
    card: FieldCard | None  # of a field that is whole there
    there: dict[str, int | None]  # files in the folder, where it is not whole yet
    stride: int = 0  # of packed shards; 0: as they are
    packed: dict[int, int] = field(default_factory=dict)  # shard → bytes


def push(
    cache: str | Path,
    url: str,
    *,
    fields: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    compress: bool | None = None,
    check: bool = False,
    threads: int = THREADS,
) -> PushReport:
    """Put the finished cache at the folder `cache` to `url`, any that fsspec knows: all of it, or some `fields`.

    Only shards that are missing there travel, `threads` at a time; an interrupted push goes on with the same call. A
    place that holds another cache is refused (CacheError), saying what differs; of the same cache, fields are added.
    `compress` packs the shards of float fields (see planes.py), None only where that makes the push faster. `check`
    reads back what is there already, and sends again what is damaged.
    """
    started, folder = time.monotonic(), Path(cache)
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise CacheError(f"{folder} is unfinished: give the command that began it again, and push it then")
    mine = some_fields(manifest, choose_fields(manifest, fields, layers, where=f"cache {folder}"))
    place = Place(url)
    place.refuse_read_only()
    with lock(folder, shared=True):
        _refuse_occupied(place, mine)
        total = sum(table.total for table in mine.shards.values())
        with progress(total, description="push", unit="bytes") as update:
            work = _Push(folder, mine, place, Traffic(update), threads=threads, check=check)
            work.put_small_files()
            work.put_shards(compress)
            work.put_cards()
        put_beside(folder, place, publish_manifest(place, mine))
    return PushReport(
        cache=folder,
        url=place.shown,
        fields=sorted(mine.fields),
        sent_files=work.files,
        sent_bytes=work.traffic.moved,
        there_bytes=work.there_bytes,
        packed=work.shares(),
        seconds=time.monotonic() - started,
    )


def _refuse_occupied(place: Place, mine: Manifest) -> None:
    """CacheError where the place holds another cache, or one that no push put there."""
    there = read_remote_manifest(place)
    if there is None:
        return
    refuse_another(mine, there, where=place.shown, remedy="Push to another URL, or remove what is there")
    try:
        read_card(place, there, EXAMPLES)
    except DamagedCard:
        pass  # a push put it there
    except FileNotFoundError:
        raise CacheError(
            f"{place.shown} holds a cache's folder that was copied there as it is: it can be pulled, but nothing is "
            f"added to it. Push to another URL"
        ) from None


class _Push:
    """One push: what it found there, and what it sends."""

    def __init__(
        self, folder: Path, manifest: Manifest, place: Place, traffic: Traffic, *, threads: int, check: bool
    ) -> None:
        self.folder, self.manifest, self.place, self.traffic = folder, manifest, place, traffic
        self.threads, self.check = threads, check
        self.small = checked_files(_small_hashes(folder), str(folder))
        self.files = self.there_bytes = 0
        self.fields = [self._look(name) for name in (EXAMPLES, *manifest.fields)]

    def _look(self, name: str) -> _Shards:
        """What of a field is there already."""
        folder = folder_of(self.manifest, name)
        try:
            return _Shards(name, folder, read_card(self.place, self.manifest, name), {})
        except FileNotFoundError:
            pass
        except DamagedCard:
            if not self.check:
                raise
        return _Shards(name, folder, None, self.place.list(folder))

    # -------------------------------------------------------------------------------------------- small files

    def put_small_files(self) -> None:
        """The tokenizer and the like, in folders named by what they hold."""
        where = small_folders(self.small)
        for part in sorted({place.rpartition("/")[0] for place in where.values()}):
            there = self.place.list(part)
            names = [name for name, place in where.items() if place.rpartition("/")[0] == part]
            self.place.make_folder(part)
            for name in names:
                file = self.folder / name
                size = file.stat().st_size
                right = there.get(file.name) == size
                if right and self.check:
                    right = self._arrives(RemoteFile(where[name], size, self.small[name]))
                if not right:
                    self.place.put_file(file, where[name], tell=lambda count: None)
                    self.files += 1

    # ------------------------------------------------------------------------------------------------- shards

    def put_shards(self, compress: bool | None) -> None:
        """The examples first, which show how fast the way is; then all the others together."""
        began = time.monotonic()
        self._put(self.fields[:1])
        speed = self.traffic.moved / max(time.monotonic() - began, 1e-6)
        if self.traffic.moved < _SHOWS_THE_SPEED:
            speed = 0.0
        for shards in self.fields[1:]:
            shards.stride = self._stride(shards, compress, speed)
        self._put(self.fields[1:])

    def _stride(self, shards: _Shards, compress: bool | None, speed: float) -> int:
        """How a field's shards are packed; 0 where they travel as they are."""
        stride = STRIDES.get(self.manifest.fields[shards.name].type, 0)
        if shards.card is not None:
            return stride if shards.card.packed is not None else 0
        if compress is not None or not stride:
            return stride if compress else 0
        if shards.there:  # a push that was interrupted goes on as it began
            return stride if any(name.endswith(PACKED) for name in shards.there) else 0
        if not speed or self.manifest.shards[shards.name].total < _WORTH_A_TRIAL:
            return 0
        with tempfile.TemporaryDirectory(prefix="softlabels-") as drafts:
            began = time.monotonic()
            size = self._pack(shards, 0, stride, Path(drafts, "trial"))
            whole = self.manifest.shards[shards.name].size(0)
            packing = (time.monotonic() - began) / min(self.threads, os.cpu_count() or 1)
            as_it_is, packed = whole / speed, size / speed + packing
        return stride if size < _PAYS * whole and packed < _PAYS * as_it_is else 0

    def _put(self, fields: Sequence[_Shards]) -> None:
        for shards in fields:
            self.place.make_folder(shards.folder)
        numbers = range(len(self.manifest.shard_rows))
        tasks = [(shards, shard) for shards in fields for shard in numbers if not self._is_there(shards, shard)]
        with tempfile.TemporaryDirectory(prefix="softlabels-") as drafts:
            traffic = Traffic(self.traffic.add)
            for _ in in_parallel(
                lambda task: self._put_shard(*task, Path(drafts), traffic), tasks, traffic, threads=self.threads
            ):
                self.files += 1

    def _is_there(self, shards: _Shards, shard: int) -> bool:
        """Whether a shard need not be sent; its folder is named by its bytes, so its size says that it is whole."""
        size = self.manifest.shards[shards.name].size(shard)
        if shards.card is not None:
            if shards.card.packed is not None:
                shards.packed[shard] = shards.card.packed[shard]
        elif not shards.stride:
            if shards.there.get(shard_file_name(shard)) != size:
                return False
        else:
            start = f"{shard_file_name(shard)}."
            for name, found in shards.there.items():
                if found and name == packed_name(shard_file_name(shard), found) and name.startswith(start):
                    shards.packed[shard] = found
            if shard not in shards.packed:
                return False
        if self.check and not self._is_whole(shards, shard):
            return False
        self.there_bytes += shards.packed.get(shard, size)
        self.traffic.skip(size)
        return True

    def _is_whole(self, shards: _Shards, shard: int) -> bool:
        """Whether what is there has the right bytes: all of them are read."""
        card = self._card(shards) if shards.card is None and not shards.stride else shards.card
        file = Remote(self.place, self.manifest, named=True).shard(shards.name, shard, card)
        if shards.card is None and shards.stride:
            return False  # of an interrupted push: sent again rather than trusted
        return self._arrives(file)

    def _arrives(self, file: RemoteFile) -> bool:
        """Whether a file that is there has the right bytes."""
        with tempfile.TemporaryDirectory(prefix="softlabels-") as drafts:
            try:
                download(self.place, file, Path(drafts, "file"), traffic=Traffic())
            except CacheError:
                return False
        return True

    def _put_shard(self, shards: _Shards, shard: int, drafts: Path, traffic: Traffic) -> None:
        name, size = f"{shards.folder}/{shard_file_name(shard)}", self.manifest.shards[shards.name].size(shard)
        if not shards.stride:
            self._check_hash(shards.name, shard)
            self.place.put_file(shard_file(self.folder, shards.name, shard), name, tell=traffic.add)
            return
        draft = drafts / f"{shards.name}-{shard}"
        packed = self._pack(shards, shard, shards.stride, draft)
        self.place.put_file(draft, packed_name(name, packed), tell=traffic.add)
        draft.unlink()
        shards.packed[shard] = packed
        self.traffic.skip(size - packed)

    def _check_hash(self, name: str, shard: int) -> int:
        """An open descriptor's worth of trust: CacheError where a shard is not what was written."""
        handle = open_inside(self.folder, name, shard_file_name(shard))
        try:
            right = hash_handle(handle) == self.manifest.shards[name].hash(shard)
        finally:
            os.close(handle)
        if not right:
            raise CacheError(
                f"{shard_file(self.folder, name, shard)} is not the file that was written, and is not pushed: "
                f"`softlabels verify {self.folder}` lists all that is damaged"
            )
        return shard

    def _pack(self, shards: _Shards, shard: int, stride: int, draft: Path) -> int:
        self._check_hash(shards.name, shard)
        handle = open_inside(self.folder, shards.name, shard_file_name(shard))
        try:
            return pack_file(handle, draft, stride=stride)
        finally:
            os.close(handle)

    # -------------------------------------------------------------------------------------------------- cards

    def put_cards(self) -> None:
        """field.json of every field that has none yet, once the server says that its shards have their sizes."""
        for shards in self.fields:
            card = self._card(shards)
            if shards.card is not None and shards.card.packed == card.packed:
                continue
            there = self.place.list(shards.folder)
            for shard in range(len(self.manifest.shard_rows)):
                size = shards.packed.get(shard, self.manifest.shards[shards.name].size(shard))
                name = shard_file_name(shard)
                name = packed_name(name, size) if shards.stride else name
                if there.get(name) != size:
                    raise CacheError(
                        f"{self.place.shown}/{shards.folder}/{name} has {there.get(name)} bytes there instead of "
                        f"{size:,}: give the same command again"
                    )
            self.place.put_bytes(f"{shards.folder}/{CARD}", to_json(card))

    def _card(self, shards: _Shards) -> FieldCard:
        manifest, name = self.manifest, shards.name
        numbers = range(len(manifest.shard_rows))
        return FieldCard(
            format="softlabels-field",
            version=1,
            cache=base_of(manifest),
            field=name,
            spec=manifest.fields.get(name),
            table=manifest.shards[name],
            counted=_counted(self.folder, manifest, name),
            files=self.small,
            packed=[shards.packed[shard] for shard in numbers] if shards.stride else None,
        )

    def shares(self) -> dict[str, float]:
        """Of each packed field, which share of its bytes lies there."""
        packed = [shards for shards in self.fields if shards.stride and shards.packed]
        totals = {shards.name: self.manifest.shards[shards.name].total for shards in packed}
        return {shards.name: sum(shards.packed.values()) / totals[shards.name] for shards in packed}


def _small_hashes(folder: Path) -> dict[str, str]:
    """The small files with their hashes; CacheError where they are not those that receipt.json names."""
    hashes = settings_hashes(folder)
    try:
        wanted = {name: value for name, value in load_folder_receipt(folder).files.items() if name != MANIFEST}
    except FileNotFoundError:
        return hashes
    if wanted != hashes:
        name = min(name for name in wanted.keys() | hashes.keys() if wanted.get(name) != hashes.get(name))
        raise CacheError(
            f"{folder / name} is not the file that was written, and is not pushed: `softlabels verify {folder}` lists "
            f"all that is damaged"
        )
    return hashes


def _counted(folder: Path, manifest: Manifest, name: str) -> list[int]:
    """What each shard's receipt counts; nothing where there is nothing to count."""
    total = manifest.corpus.truncated if name == EXAMPLES else manifest.shards[name].clipped
    if not total:
        return []
    receipts = [read_receipt(folder, name, shard) for shard in range(len(manifest.shard_rows))]
    known = [receipt.truncated + receipt.clipped for receipt in receipts if receipt is not None]
    return known if len(known) == len(receipts) and sum(known) == total else [total] + [0] * (len(receipts) - 1)
