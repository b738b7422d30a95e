"""A cache's files by name and size alone: seconds where hashing them takes hours, or reading their receipts minutes.

What a copy that was broken off leaves is found, and what a disk changed is not: `softlabels.cache.verify` reads the
bytes. Two million files are told from each other without a path object for each.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from softlabels.cache.format import Manifest, Receipt, load_receipt_at, receipt_name, shard_name
from softlabels.cache.inside import open_folder
from softlabels.errors import CacheError


@dataclass(frozen=True, slots=True)
class WrongSize:
    """A shard's file that isn't there, or is not as long as the manifest says."""

    field: str
    shard: int
    bytes: int | None  # None: it isn't there, or is no file
    wanted: int


def wrong_sizes(folder: Path, manifest: Manifest, fields: Sequence[str]) -> Iterator[WrongSize]:
    """Every shard of `fields` whose file has not the size that the manifest says, in order. No byte is read."""
    for field in fields:
        table = manifest.shards[field]
        try:
            place = os.open(folder / field, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # none, or a link, or a file
            yield from (WrongSize(field, shard, None, table.size(shard)) for shard in range(len(table)))
            continue
        try:
            for shard in range(len(table)):
                found, wanted = _size(place, shard_name(shard)), table.size(shard)
                if found != wanted:
                    yield WrongSize(field, shard, found, wanted)
        finally:
            os.close(place)


def listed_shards(folder: Path, field: str, *, receipts_alone: bool = False) -> set[str]:
    """The receipts' names in a field's folder that have a shard beside them, by one listing; no file is opened.

    With `receipts_alone` they need none: the shards lie elsewhere.
    """
    try:
        names = set(os.listdir(folder / field))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    suffix, shard_suffix = receipt_name(0).removeprefix("00000"), shard_name(0).removeprefix("00000")
    receipts = {name for name in names if name.endswith(suffix)}
    return receipts if receipts_alone else {name for name in receipts if name[: -len(suffix)] + shard_suffix in names}


def whole_receipts(
    folder: Path, field: str, shards: Sequence[int], *, receipts_alone: bool = False
) -> Iterator[Receipt | None]:
    """The receipt of each of `shards`; None where there is none that can be read, or the shard is not as long as it.

    With `receipts_alone` nothing is asked of the shards: they lie elsewhere.
    """
    try:
        place = open_folder(folder, field)
    except (FileNotFoundError, CacheError):
        yield from (None for _ in shards)
        return
    try:
        for shard in shards:
            try:
                receipt = load_receipt_at(place, receipt_name(shard))
            except (FileNotFoundError, CacheError):
                yield None
                continue
            whole = receipts_alone or _size(place, shard_name(shard)) == receipt.bytes
            yield receipt if whole else None
    finally:
        os.close(place)


def _size(place: int, name: str) -> int | None:
    try:
        status = os.stat(name, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
