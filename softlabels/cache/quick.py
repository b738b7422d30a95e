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

import numpy as np

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
    names = [shard_name(shard) for shard in range(len(manifest.shard_rows))]
    for field in fields:
        found, wanted = _sizes(folder / field, names), manifest.shards[field].all_sizes()
        for shard in np.flatnonzero(found != wanted).tolist():
            size = int(found[shard])
            yield WrongSize(field, shard, None if size == _NO_FILE else size, int(wanted[shard]))


def unlisted_shards(
    folder: Path, fields: Sequence[str], shards: Sequence[int], *, receipts_alone: bool = False
) -> dict[int, list[str]]:
    """Of each of `shards` that lacks any, the fields whose folder doesn't list its receipt with its file beside it.

    With `receipts_alone` they need no file: the shards lie elsewhere. One listing a field; no file is opened.
    """
    receipts = {receipt_name(shard): shard for shard in shards}
    files = {} if receipts_alone else {shard_name(shard): shard for shard in shards}
    lacking: dict[int, list[str]] = {}
    for field in fields:
        try:
            names = set(os.listdir(folder / field))
        except (FileNotFoundError, NotADirectoryError):
            names = set()
        for shard in {receipts[name] for name in receipts.keys() - names} | {
            files[name] for name in files.keys() - names
        }:
            lacking.setdefault(shard, []).append(field)
    return dict(sorted(lacking.items()))


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


_NO_FILE = -1


def _sizes(folder: Path, names: Sequence[str]) -> np.ndarray:
    """(names,) int64: bytes of each file in `folder`; `_NO_FILE` where there is none, or a link, or no plain file."""
    sizes = np.full(len(names), _NO_FILE, np.int64)
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # none, or a link, or a file
        return sizes
    try:
        for number, name in enumerate(names):
            sizes[number] = _size(place, name)
    finally:
        os.close(place)
    return sizes


def _size(place: int, name: str) -> int:
    """Bytes of a file in an open folder, or `_NO_FILE`."""
    try:
        status = os.stat(name, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        return _NO_FILE
    return status.st_size if stat.S_ISREG(status.st_mode) else _NO_FILE
