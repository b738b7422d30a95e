"""Some rows of a cache at a URL come in, a cache of these rows alone goes out.

The shards that the rows lie in are fetched, whole; their rows become the new cache's, in shards of the same size. The
result is as a dump of these rows would have it, but for `corpus.hash`, which is made of the whole corpus's and the row
numbers. So later pulls of the same rows add fields, and of other rows are refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import xxhash

from softlabels.cache.build import derive_cache, refuse_another
from softlabels.cache.combine import small_files, write_shards
from softlabels.cache.concatenate import Piece, PieceWriter, cut_pieces
from softlabels.cache.files import lock
from softlabels.cache.format import EXAMPLES, MANIFEST, UNFINISHED, Manifest, read_manifest, read_receipt
from softlabels.cache.members import labelled_rows
from softlabels.cache.pull import Fetched, PullReport, fetch_shard, make_report
from softlabels.cache.reader import Cache
from softlabels.cache.remote import Remote, some_fields
from softlabels.cache.shards import count_targets, list_lengths
from softlabels.cache.stream import ShardStore, open_store
from softlabels.cache.transfer import Traffic, in_parallel
from softlabels.errors import CacheError, ConfigError
from softlabels.progress import progress
from softlabels.types import TOKEN_LABELS


def check_rows(rows: tuple[int | None, int | None], total: int, *, where: str) -> tuple[int, int]:
    """The first row and the one after the last; ConfigError where there are no such rows."""
    first, last = rows[0] or 0, total if rows[1] is None else rows[1]
    if not 0 <= first < last <= total:
        raise ConfigError(
            f"rows {first}:{last}: the cache at {where} has the rows 0:{total}. Ask for some of these, the "
            f"smaller number first"
        )
    return first, last


def shards_of(manifest: Manifest, span: tuple[int, int]) -> range:
    """The shards that rows `span[0]` to before `span[1]` lie in."""
    size = manifest.dump.shard_rows
    return range(span[0] // size, -(-span[1] // size))


def pull_rows(
    remote: Remote, folder: Path, fields: Sequence[str], span: tuple[int, int], *, threads: int, started: float
) -> PullReport:
    """Fetch rows `span[0]` to before `span[1]` of `fields` into the cache at `folder`; see `softlabels.cache.pull`."""
    wanted = Remote(remote.place, some_fields(remote.manifest, fields), remote.named)
    refuse_rows(wanted.manifest, folder, span)  # before anything is fetched
    drafts = folder.resolve().with_name(f".tmp-pull-{folder.resolve().name}")  # whole shards, until they are cut
    drafts.mkdir(parents=True, exist_ok=True)
    with lock(drafts):  # another pull of the same rows would have them removed under its hands
        store = open_store(wanted, folder=drafts)
        source = Cache(drafts, wanted.manifest, store)
        fetched = _fetch(source, store, span, threads=threads)
        manifest = _manifest(source, span)
        with derive_cache(folder, manifest, source=drafts, files=small_files(source)) as build:
            pieces = _Rows(source, manifest, span)
            write_shards(build, PieceWriter(pieces, build, counts=_counts(source, span)).write, description="cut")
            final = build.finish()
        shutil.rmtree(drafts)
    return make_report(remote, folder, final, fetched, started=started)


def refuse_rows(manifest: Manifest, folder: Path, span: tuple[int, int]) -> None:
    """ConfigError where the rows of a cache can't be cut so, CacheError where `folder` holds something else."""
    _refuse_int8(manifest, span[0])
    _refuse_other_rows(manifest, folder, span)
    refuse_another(folder, _planned(manifest, span))


def _refuse_other_rows(manifest: Manifest, folder: Path, span: tuple[int, int]) -> None:
    """CacheError, in plainer words than those of `refuse_another`, where the folder holds other rows."""
    if not (folder / MANIFEST).is_file():
        return
    held = read_manifest(folder).corpus
    if held.hash != _rows_hash(manifest, span):
        raise CacheError(
            f"{folder} holds {held.source}, and rows {span[0]}:{span[1]} of {manifest.corpus.source} are others: a "
            f"folder holds one range of rows, to which later pulls add fields. Choose another folder"
        )


def _rows_hash(manifest: Manifest, span: tuple[int, int]) -> str:
    return xxhash.xxh3_128(f"{manifest.corpus.hash}\n{span[0]}:{span[1]}".encode()).hexdigest()


def _refuse_int8(manifest: Manifest, first: int) -> None:
    """int8 has scales a file: rows of two files in one would have to be rounded once more."""
    int8, size = [name for name, spec in manifest.fields.items() if spec.type == "int8"], manifest.dump.shard_rows
    if int8 and first % size:
        raise ConfigError(
            f"{', '.join(int8)} is int8, whose scales are those of a whole file of {size} rows: the first row must be "
            f"a multiple of {size}, such as {first // size * size}"
        )


def _fetch(source: Cache, store: ShardStore, span: tuple[int, int], *, threads: int) -> Fetched:
    """Fetch the shards that the rows lie in."""
    shards = shards_of(source.manifest, span)
    names = [EXAMPLES, *source.fields]
    total = sum(source.manifest.shards[name].size(shard) for name in names for shard in shards)
    with progress(total, description="pull", unit="bytes") as update:
        work = Fetched(Traffic(update))
        tasks = [(name, shard) for name in names for shard in shards]
        for came in in_parallel(
            lambda task: fetch_shard(store.remote, source.path, *task, store.card(task[0]), work.traffic),
            tasks,
            work.traffic,
            threads=threads,
        ):
            work.count(came)
    return work


def _manifest(source: Cache, span: tuple[int, int]) -> Manifest:
    """The manifest of the rows, before the first shard."""
    planned, task, labelled = _planned(source.manifest, span), source.manifest.teacher.task, 0
    for piece in cut_pieces(source, *span):
        table = source.table(EXAMPLES, piece.shard)
        rows = count_targets(table) > 0 if task in TOKEN_LABELS else labelled_rows(table, task)
        labelled += int(rows[piece.start : piece.stop].sum())
    return planned.model_copy(update={"corpus": planned.corpus.model_copy(update={"labelled": labelled})})


def _planned(manifest: Manifest, span: tuple[int, int]) -> Manifest:
    """The manifest of the rows as far as it is known before any of them is here: how many are labelled is not."""
    card = manifest.corpus
    corpus = card.model_copy(
        update={
            "source": f"{card.source}[{span[0]}:{span[1]}]",
            "hash": _rows_hash(manifest, span),
            "rows": span[1] - span[0],
            "labelled": 0,
            "truncated": 0,
        }
    )
    return manifest.model_copy(update={"corpus": corpus, **UNFINISHED})


def _counts(source: Cache, span: tuple[int, int]) -> dict[tuple[Path, str], dict[int, int]]:
    """Rows cut to max_length and values clipped, of every shard that the rows lie in.

    Which of a shard's rows were cut is not kept; those that were are as long as can be. Which values were clipped is
    not kept either: of a shard that is cut here, all count.
    """
    counts: dict[tuple[Path, str], dict[int, int]] = {}
    for name in (EXAMPLES, *source.fields):
        of_field = counts[source.path, name] = {}
        for piece in cut_pieces(source, *span):
            receipt = read_receipt(source.path, name, piece.shard)
            count = 0 if receipt is None else receipt.truncated + receipt.clipped
            if name == EXAMPLES and count:
                lengths = list_lengths(source.table(EXAMPLES, piece.shard), "input_ids")[piece.start : piece.stop]
                count = min(count, int((lengths >= source.manifest.dump.max_length).sum()))
            of_field[piece.shard] = count
    return counts


class _Rows:
    """Which rows of which shards each shard of the result consists of."""

    def __init__(self, source: Cache, manifest: Manifest, span: tuple[int, int]) -> None:
        self.source, self.manifest, self.span = source, manifest, span
        self.caches: Sequence[Cache] = [source]

    def of(self, shard: int) -> list[Piece]:
        size = self.manifest.dump.shard_rows
        first = self.span[0] + shard * size
        return list(cut_pieces(self.source, first, min(first + size, self.span[1])))
