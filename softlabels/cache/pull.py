"""A cache at a URL comes in, a cache in a folder goes out: what is missing or differs is fetched, the manifest last.

What lies in the folder is hashed first, and fetched again where it is not what it must be; nothing that is right
travels twice. What was pulled is an ordinary cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softlabels.cache.beside import fetch_beside
from softlabels.cache.files import hash_handle, lock, sweep_temporary, sync_folder, write_file
from softlabels.cache.format import (
    EXAMPLES,
    MANIFEST,
    RECEIPT,
    TEMPORARY,
    UNFINISHED,
    Manifest,
    Receipt,
    read_manifest,
    read_receipt,
    receipt_file,
    shard_file,
    to_json,
)
from softlabels.cache.inside import open_inside
from softlabels.cache.quick import wrong_sizes
from softlabels.cache.remote import (
    FieldCard,
    Remote,
    choose_fields,
    open_remote,
    refuse_another,
    shard_file_name,
    some_fields,
    with_fields,
)
from softlabels.cache.settings import folder_receipt
from softlabels.cache.transfer import THREADS, RemoteFile, Traffic, download, in_parallel
from softlabels.errors import CacheError
from softlabels.progress import progress

_LARGEST = 1 << 36  # bytes of a small file: an output head may have gigabytes


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a pull did."""

    cache: Path
    url: str  # without anything secret
    rows: int
    fields: list[str]  # that the cache has now
    fetched_files: int
    fetched_bytes: int
    there_bytes: int  # of shards that were there already
    seconds: float


def pull(
    url: str,
    folder: str | Path,
    *,
    fields: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    rows: tuple[int | None, int | None] | None = None,
    threads: int = THREADS,
) -> PullReport:
    """Fetch the cache at `url` into `folder`: all of it, or some `fields`, or of these the `rows` from A to before B.

    An interrupted pull goes on with the same call, in the middle of a file; later ones add fields. CacheError where
    the folder holds another cache, saying what differs, or where what comes is not what was pushed.
    """
    started, folder = time.monotonic(), Path(folder)
    remote = open_remote(url)
    chosen = choose_fields(remote.manifest, fields, layers, where=f"the cache at {remote.place.shown}")
    if rows is not None:
        from softlabels.cache.cut import check_rows, pull_rows

        span = check_rows(rows, remote.manifest.corpus.rows, where=remote.place.shown)
        if span != (0, remote.manifest.corpus.rows):
            return pull_rows(remote, folder, chosen, span, threads=threads, started=started)
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    with lock(folder):
        final = _begin(folder, remote, chosen)
        work = fetch_fields(remote, folder, final, threads=threads)
        finish(folder, final)
        fetch_beside(remote, folder, final)
    return make_report(remote, folder, final, work, started=started)


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull would fetch."""

    cache: Path
    url: str  # without anything secret
    fields: list[str]  # that would be fetched
    rows: int  # of the shards that would be fetched
    there_files: int  # that are there and as long as they must be; what a pull finds changed in them, it fetches again
    there_bytes: int
    fetch_files: int
    fetch_bytes: int  # as they travel: fewer than they take here where they were packed


def plan_pull(
    url: str,
    folder: str | Path,
    *,
    fields: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    rows: tuple[int | None, int | None] | None = None,
) -> PullPlan:
    """What `pull` with the same arguments would fetch; nothing is written, and no byte of a shard read.

    Of some `rows`, every shard that they lie in counts as missing. Raises what `pull` would.
    """
    folder = Path(folder)
    remote = open_remote(url)
    chosen = choose_fields(remote.manifest, fields, layers, where=f"the cache at {remote.place.shown}")
    shards, whole = range(len(remote.manifest.shard_rows)), True
    if rows is not None:
        from softlabels.cache.cut import check_rows, refuse_rows, shards_of

        span = check_rows(rows, remote.manifest.corpus.rows, where=remote.place.shown)
        whole = span == (0, remote.manifest.corpus.rows)
        if not whole:
            refuse_rows(some_fields(remote.manifest, chosen), folder, span)
        shards = shards_of(remote.manifest, span)
    goes_on = whole and folder.is_dir()
    wanted = some_fields(remote.manifest, chosen)
    if goes_on:
        wanted = _wanted(folder, _previous(folder), remote, chosen)
    names = [EXAMPLES, *(name for name in sorted(wanted.fields) if name in remote.manifest.fields)]
    files, there, missing, travels = len(names) * len(shards), 0, 0, 0
    for name in names:
        table, card = remote.manifest.shards[name], remote.card(name)
        lacking = {wrong.shard for wrong in wrong_sizes(folder, remote.manifest, [name])} if goes_on else set(shards)
        there += sum(table.size(shard) for shard in shards if shard not in lacking)
        missing += len(lacking)
        travels += sum(remote.shard_size(name, shard, card) for shard in lacking)
    return PullPlan(
        cache=folder,
        url=remote.place.shown,
        fields=names[1:],
        rows=sum(remote.manifest.shard_rows[shard] for shard in shards),
        there_files=files - missing,
        there_bytes=there,
        fetch_files=missing,
        fetch_bytes=travels,
    )


def _begin(folder: Path, remote: Remote, chosen: Sequence[str]) -> Manifest:
    """The manifest that the folder will have; while it is fetched, and if it had none, an unfinished one is there."""
    previous = _previous(folder)
    final = _wanted(folder, previous, remote, chosen)
    if previous is None or not previous.complete:
        write_file(folder / MANIFEST, to_json(final.model_copy(update=UNFINISHED)))
    return final


def _wanted(folder: Path, previous: Manifest | None, remote: Remote, chosen: Sequence[str]) -> Manifest:
    """The manifest that the folder will have with the `chosen` fields; CacheError where they can't be put there."""
    wanted = some_fields(remote.manifest, chosen)
    if previous is None:
        return wanted
    shown = remote.place.shown
    refuse_another(previous, remote.manifest, where=shown, remedy=f"{folder} is left as it is: choose another folder")
    if previous.complete:
        own = {name: (spec, previous.shards[name]) for name, spec in previous.fields.items()}
        return with_fields(
            previous, {name: (wanted.fields[name], wanted.shards[name]) for name in chosen if name not in own}
        )
    foreign = sorted(previous.fields.keys() - remote.manifest.fields.keys())
    if foreign:
        raise CacheError(
            f"{folder} is an unfinished cache with {', '.join(foreign)}, which {shown} has not: finish its dump first, "
            f"or choose another folder"
        )
    return some_fields(remote.manifest, sorted({*chosen, *previous.fields}))  # it goes on with all it was to have


def _previous(folder: Path) -> Manifest | None:
    """The manifest that the folder has; CacheError where it holds links, or anything that is no cache."""
    for path in folder.iterdir():
        if path.is_symlink():
            raise CacheError(f"{path} is a link, and a pull follows none: put the real folder in its place")
    if os.path.lexists(folder / MANIFEST):
        return read_manifest(folder)
    strangers = sorted(path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY))
    if strangers:
        raise CacheError(
            f"{folder} is not empty and no cache (it holds {', '.join(strangers[:5])}): choose another folder"
        )
    return None


@dataclass(slots=True)
class Fetched:
    """What one pull brought."""

    traffic: Traffic
    files: int = 0
    there_bytes: int = 0

    def count(self, came: int) -> None:
        """One shard: bytes that came, or below 0 those that were there."""
        self.files += came > 0
        self.there_bytes -= min(came, 0)


def make_report(remote: Remote, folder: Path, final: Manifest, work: Fetched, *, started: float) -> PullReport:
    """What the pull of `final` into `folder` did, begun at `started` by the monotonic clock."""
    return PullReport(
        cache=folder,
        url=remote.place.shown,
        rows=final.corpus.rows,
        fields=sorted(final.fields),
        fetched_files=work.files,
        fetched_bytes=work.traffic.moved,
        there_bytes=work.there_bytes,
        seconds=time.monotonic() - started,
    )


def fetch_fields(remote: Remote, folder: Path, final: Manifest, *, threads: int) -> Fetched:
    """Fetch every file of the cache that is missing in `folder` or differs, of the fields that the place has."""
    names = [EXAMPLES, *(name for name in sorted(final.fields) if name in remote.manifest.fields)]
    cards = {name: remote.card(name) for name in names}
    total = sum(final.shards[name].total for name in names)
    with progress(total, description="pull", unit="bytes") as update:
        work = Fetched(Traffic(update))
        work.files += fetch_small_files(remote, folder, list(cards.values()))
        tasks = [(name, shard) for name in names for shard in range(len(final.shard_rows))]
        for came in in_parallel(
            lambda task: fetch_shard(remote, folder, *task, cards[task[0]], work.traffic),
            tasks,
            work.traffic,
            threads=threads,
        ):
            work.count(came)
    return work


def fetch_small_files(remote: Remote, folder: Path, cards: Sequence[FieldCard | None]) -> int:
    """Fetch the tokenizer and the like, where they are missing or differ; how many files came."""
    came = 0
    for name, (where, value) in remote.small_files(cards).items():
        parts = name.split("/")
        if _hash_inside(folder, *parts) == value:
            continue
        place = folder
        for part in parts[:-1]:
            place = place / part
            if place.is_symlink():
                raise CacheError(f"{place} is a link, and a pull follows none: put the real folder in its place")
        size = _size_there(remote, where)
        download(remote.place, RemoteFile(where, size, value), folder.joinpath(*parts), traffic=Traffic())
        came += 1
    return came


def _size_there(remote: Remote, name: str) -> int:
    try:
        size = remote.place.size(name)
    except FileNotFoundError:
        raise CacheError(f"{remote.place.shown} lacks {name}: have the cache pushed again") from None
    if size > _LARGEST:
        raise CacheError(f"{remote.place.shown}/{name} has {size:,} bytes: refused")
    return size


def fetch_shard(remote: Remote, folder: Path, name: str, shard: int, card: FieldCard | None, traffic: Traffic) -> int:
    """Fetch a shard and write its receipt; the bytes that came, or what was there, below 0."""
    size, wanted = remote.manifest.shards[name].size(shard), remote.manifest.shards[name].hash(shard)
    receipt = remote.receipt(name, shard, card)
    here = receipt_file(folder, name, shard)
    if _hash_inside(folder, name, shard_file_name(shard)) == wanted:
        traffic.skip(size)
        came = -size
    else:
        here.unlink(missing_ok=True)  # says nothing about the file that comes
        file = remote.shard(name, shard, card)
        download(remote.place, file, shard_file(folder, name, shard), traffic=traffic)
        traffic.skip(size - file.size)
        came = file.size
    if came > 0 or not _says(read_receipt(folder, name, shard), receipt):
        write_file(here, to_json(receipt))
    return came


def _says(here: Receipt | None, receipt: Receipt) -> bool:
    """Whether a receipt says of a shard what it should; what it counts may be more exact here than there."""
    return here is not None and receipt == here.model_copy(
        update={"truncated": receipt.truncated, "clipped": receipt.clipped}
    )


def _hash_inside(folder: Path, *names: str) -> str | None:
    """The hash of a file of the folder; None where it isn't there."""
    try:
        handle = open_inside(folder, *names)
    except FileNotFoundError:
        return None
    try:
        return hash_handle(handle)
    finally:
        os.close(handle)


def finish(folder: Path, final: Manifest) -> None:
    """Put the manifest, and then the receipt of the folder."""
    sweep_temporary(folder)
    data = to_json(final)
    (folder / RECEIPT).unlink(missing_ok=True)  # at no moment it speaks of another manifest
    write_file(folder / MANIFEST, data)
    write_file(folder / RECEIPT, to_json(folder_receipt(folder, data)))
