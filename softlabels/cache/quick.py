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

from softlabels.cache.format import Manifest, receipt_name, shard_name


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
            try:
                status = os.stat(name, dir_fd=place, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                sizes[number] = status.st_size
    finally:
        os.close(place)
    return sizes
