"""Folders that `dump --part` filled come in, the cache that one dump would have made goes out, byte for byte.

Each holds some shards of one cache, unfinished. Files are copied as they are, each held against its receipt.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import xxhash

from softlabels.cache.build import CacheBuild, derive_cache
from softlabels.cache.combine import CombineReport, write_shards
from softlabels.cache.combined import CacheShare
from softlabels.cache.files import publish, temporary, write_file
from softlabels.cache.format import (
    EXAMPLES,
    MANIFEST,
    Manifest,
    identity,
    load_receipt,
    read_manifest,
    receipt_file,
    shard_file,
    to_json,
)
from softlabels.cache.grouped import ShardGroup
from softlabels.cache.inside import open_inside
from softlabels.cache.settings import settings_hashes
from softlabels.errors import CacheError

_CHUNK = 1 << 20


def are_parts(caches: Sequence[str | Path]) -> bool:
    """Whether these are several caches, none of them finished."""
    places = [Path(cache) for cache in caches]
    there = len(places) > 1 and all((place / MANIFEST).is_file() for place in places)
    return there and not any(read_manifest(place).complete for place in places)


def unite_parts(places: Sequence[Path], *, out: Path) -> CombineReport:
    """Put the shards that lie in `places` into one cache at `out`; an interrupted call goes on where it stopped.

    CacheError where they are not of one dump, or not all shards are there.
    """
    started, manifests = time.monotonic(), [read_manifest(place) for place in places]
    for place, manifest in zip(places[1:], manifests[1:], strict=True):
        _check_same(places[0], manifests[0], place, manifest)
    first = CacheBuild(places[0], manifests[0])
    owners = _find(places, manifests[0], first.shards())
    files = sorted(settings_hashes(places[0]))
    with derive_cache(out, manifests[0], source=places[0], files=files) as build:

        def write(shard: int, missing: Sequence[str], _group: ShardGroup) -> None:
            for field in missing:
                _copy_shard(owners[field, shard], build.folder, field, shard)

        new_rows = write_shards(build, write)
        final = build.finish()
    rows: Counter[Path] = Counter()
    for shard, count in enumerate(final.shard_rows):
        rows[owners[EXAMPLES, shard]] += count
    return CombineReport(
        cache=out,
        how="rows",
        choose=None,
        rows=final.corpus.rows,
        new_rows=new_rows,
        fields=sorted(final.fields),
        caches=[CacheShare(str(place), final.teacher.name, None, None, rows[place], 0, 0, 0) for place in places],
        seconds=time.monotonic() - started,
        bytes=sum(table.total for table in final.shards.values()),
    )


def _check_same(place: Path, manifest: Manifest, other: Path, second: Manifest) -> None:
    """CacheError where two folders are not of one dump. Who came by the teacher under which name is no matter."""
    one, two = identity(manifest), identity(second)
    one |= {f"field {name}": spec for name, spec in manifest.fields.items()}
    two |= {f"field {name}": spec for name, spec in second.fields.items()}
    differ = [f"{key} is {one.get(key)} and {two.get(key)}" for key in one | two if one.get(key) != two.get(key)]
    if differ:
        raise CacheError(
            f"{place} and {other} are both unfinished, and not parts of one dump: {'; '.join(differ)}. Finish them "
            f"first, or give all parts the same corpus, teacher and options"
        )


def _find(places: Sequence[Path], manifest: Manifest, shards: range) -> dict[tuple[str, int], Path]:
    """Where each shard of each field lies; CacheError where one is nowhere."""
    owners: dict[tuple[str, int], Path] = {}
    for field in (EXAMPLES, *manifest.fields):
        there = [set(os.listdir(place / field)) if (place / field).is_dir() else set() for place in places]
        for shard in shards:
            names = {shard_file(Path(), field, shard).name, receipt_file(Path(), field, shard).name}
            owner = next((place for place, held in zip(places, there, strict=True) if names <= held), None)
            if owner is not None:
                owners[field, shard] = owner
    lacking = [shard for shard in shards if any((field, shard) not in owners for field in (EXAMPLES, *manifest.fields))]
    if lacking:
        size = manifest.dump.shard_rows
        raise CacheError(
            f"{len(lacking)} of {len(shards)} shards are in none of these folders, or not with all fields: "
            f"{_ranges(lacking)}, of {size} rows each. Dump the parts that have them, or name their folders too"
        )
    return owners


def _ranges(numbers: Sequence[int]) -> str:
    """'0 to 3, 7'; the first few of them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(str(start) if start == stop else f"{start} to {stop}" for start, stop in runs[:5])
    return shown + (" and more" if len(runs) > 5 else "")


def _copy_shard(source: Path, folder: Path, field: str, shard: int) -> None:
    """One file and its receipt; CacheError where the one is not what the other says."""
    receipt, path = load_receipt(source, field, shard), shard_file(folder, field, shard)
    path.parent.mkdir(exist_ok=True)
    hasher, size = xxhash.xxh3_128(), 0
    made = os.open(temporary(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        with (
            open(made, "wb", buffering=0) as copy,
            open(open_inside(source, field, path.name), "rb", buffering=0) as taken,
        ):
            while data := taken.read(_CHUNK):
                hasher.update(data)
                size += len(data)
                view = memoryview(data)
                while len(view):
                    view = view[copy.write(view) :]
            os.fsync(made)
        if (size, hasher.hexdigest()) != (receipt.bytes, receipt.xxh3_128):
            raise CacheError(
                f"{shard_file(source, field, shard)} is not the file that its receipt speaks of: give "
                f"`softlabels verify {source} --repair`, and dump that part again"
            )
        publish(path)
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise
    write_file(receipt_file(folder, field, shard), to_json(receipt))
