"""Caches of parts of one corpus come in, one cache of all their rows goes out: part after part, every field.

The parts are what one teacher said, dumped with the same settings, of rows with different ids. The result has the same
`join` and values as one dump of the parts' rows would have; the teacher isn't needed. Values go from the files'
bytes straight to their places in the new ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from softlabels.cache.arrow import read_numbers
from softlabels.cache.build import CacheBuild, derive_cache
from softlabels.cache.combine import (
    CombineReport,
    counted,
    field_shard,
    join_of,
    new_manifest,
    open_whole,
    small_files,
    write_shards,
    write_tables,
)
from softlabels.cache.combined import CacheShare, open_several, part_of
from softlabels.cache.format import EXAMPLES, CombinedCard, Manifest, shard_file
from softlabels.cache.grouped import ShardGroup
from softlabels.cache.join import id_hashes
from softlabels.cache.reader import Cache
from softlabels.cache.settings import settings_hashes
from softlabels.cache.shards import check_lengths, count_targets, list_lengths
from softlabels.cache.unite import are_parts, unite_parts
from softlabels.cache.writer import SCALE, FieldShard, read_channels
from softlabels.errors import CacheError
from softlabels.types import TOKEN_LABELS

_OF_A_CORPUS = ("teacher/head.safetensors", "teacher/factors.safetensors")  # what fields are read with


def concatenate(caches: Sequence[str | Path], *, out: Path) -> CombineReport:
    """Write the rows of all `caches`, one cache after the other, with all their fields, into the cache `out`.

    An interrupted call goes on where it stopped. CacheError where the caches are not of one teacher, one way of
    dumping and one set of fields, or have an id in common. What `dump --part` made, each part in a folder of its own,
    becomes what one dump would have made, byte for byte.
    """
    if are_parts(caches):
        return unite_parts([Path(cache) for cache in caches], out=Path(out))
    started, opened = time.monotonic(), open_several(caches)
    for other in opened[1:]:
        _check_same(opened[0], other)
    manifest = _manifest(opened)
    pieces = _AllRows(opened, manifest)
    _check_int8(pieces)
    _check_ids(opened)
    with derive_cache(Path(out), manifest, source=opened[0].path, files=small_files(opened[0])) as build:
        new_rows = write_shards(build, PieceWriter(pieces, build).write)
        final = build.finish()
    return CombineReport(
        cache=Path(out),
        how="rows",
        choose=None,
        rows=manifest.corpus.rows,
        new_rows=new_rows,
        fields=sorted(final.fields),
        caches=[
            CacheShare(cache.shown, cache.manifest.teacher.name, None, None, cache.rows, 0, 0, 0) for cache in opened
        ],
        seconds=time.monotonic() - started,
        bytes=sum(table.total for table in final.shards.values()),
    )


# --------------------------------------------------------------------------------------------------------- checks


def _check_same(first: Cache, other: Cache) -> None:
    """CacheError where two caches are not parts of what one dump would have given."""
    one, two = _settings(first), _settings(other)
    none = "not there"
    differ = [
        f"{key} is {one.get(key, none)} and {two.get(key, none)}"
        for key in one | two
        if one.get(key, none) != two.get(key, none)
    ]
    if differ:
        raise CacheError(
            f"{first.path} and {other.path} are not parts of one dump: {'; '.join(differ)}. Dump the parts with the "
            f"same teacher and options; what several teachers say of the same rows is combined without --rows"
        )
    if first.manifest.dump.masking is not None and first.manifest.dump.masking.smoothing:
        raise CacheError(
            f"the masks of {first.path} follow from how often each token is in its corpus (--mask-smoothing), so rows "
            f"of several corpora were not masked alike: dump them as one corpus, in parts with --part"
        )
    hashes = [settings_hashes(cache.path) for cache in (first, other)]
    for name in _OF_A_CORPUS:
        if hashes[0].get(name) != hashes[1].get(name):
            raise CacheError(
                f"{first.path} and {other.path} have another {name}: their fields are read with it, each with its own. "
                f"Dump their rows as one corpus"
            )


def _settings(cache: Cache) -> dict[str, object]:
    """What the parts of one corpus have in common, by name."""
    manifest = cache.manifest
    card, dump = manifest.teacher, manifest.dump
    fields = {f"field {name}": f"{spec.kind} {spec.type} {spec.width}" for name, spec in manifest.fields.items()}
    forms = {f"form of {name}": (spec.form, spec.heads) for name, spec in manifest.fields.items()}
    return {
        "the teacher's weights": card.weights_hash,
        "task": card.task,
        "classes": card.label_names,
        "tokenizer": manifest.tokenizer_hash,
        "max_length": dump.max_length,
        "dtype": dump.dtype,
        "text": dump.text,
        "masking": dump.masking,
        **fields,
        **forms,
    }


def _check_ids(caches: Sequence[Cache]) -> None:
    """CacheError where an id is there twice."""
    hashes = np.concatenate([id_hashes(cache) for cache in caches])
    order = np.argsort(hashes, kind="stable")
    double = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if not len(double):
        return
    ends = list(accumulate(cache.rows for cache in caches))
    owners = []
    for row in order[double[0] : double[0] + 2].tolist():
        number = int(np.searchsorted(ends, row, side="right"))
        owners.append((caches[number], row - (ends[number] - caches[number].rows)))
    raise CacheError(
        f"{len(double):,} ids are in more than one cache, such as '{owners[0][0].ids[owners[0][1]]}' in "
        f"{owners[0][0].path} and {owners[1][0].path}: rows are joined by id. Dump the parts with ids that differ, or "
        f"leave out a cache that has the same rows"
    )


def _check_int8(pieces: _AllRows) -> None:
    """int8 has scales a file: rows of two files in one would have to be rounded once more."""
    int8 = [name for name, spec in pieces.manifest.fields.items() if spec.type == "int8"]
    size = pieces.manifest.dump.shard_rows
    if int8 and any(len(pieces.of(shard)) > 1 for shard in range(-(-pieces.manifest.corpus.rows // size))):
        raise CacheError(
            f"{', '.join(int8)} is int8, whose scales are those of a whole file of {size} rows: all caches but the "
            f"last must have a multiple of {size} rows, in files of so many. Dump the parts so, or with --codec float16"
        )


# ---------------------------------------------------------------------------------------------------------- plan


def _manifest(caches: Sequence[Cache]) -> Manifest:
    """The manifest of all rows, before the first shard."""
    first, cards = caches[0].manifest, [cache.manifest.corpus for cache in caches]
    splits = {card.split for card in cards}
    corpus = first.corpus.model_copy(
        update={
            "source": " + ".join(dict.fromkeys(card.source for card in cards)),
            "split": cards[0].split if len(splits) == 1 else None,
            "hash": xxhash.xxh3_128("\n".join(card.hash for card in cards).encode()).hexdigest(),
            "rows": sum(card.rows for card in cards),
            "labelled": sum(card.labelled for card in cards),
            "truncated": 0,
        }
    )
    unwritten = {"complete": False, "shard_rows": [], "shard_tokens": [], "join": "", "shards": {}}
    card = CombinedCard(how="rows", choose=None, caches=[part_of(cache, None) for cache in caches])
    return new_manifest(first.model_copy(update={"corpus": corpus, "combined": card, **unwritten}))


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of a shard of one of the caches."""

    cache: Cache
    shard: int
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop == self.cache.manifest.shard_rows[self.shard]


class Pieces(Protocol):
    """Which rows of which shards each shard of a result consists of."""

    caches: Sequence[Cache]

    def of(self, shard: int) -> list[Piece]: ...


class _AllRows:
    """All rows of several caches."""

    def __init__(self, caches: Sequence[Cache], manifest: Manifest) -> None:
        self.caches, self.manifest = caches, manifest
        self.starts = [0, *accumulate(cache.rows for cache in caches)]  # of each cache, among all rows

    def of(self, shard: int) -> list[Piece]:
        size = self.manifest.dump.shard_rows
        first, last = shard * size, min((shard + 1) * size, self.starts[-1])
        return [
            piece
            for cache, start in zip(self.caches, self.starts, strict=False)
            for piece in cut_pieces(cache, max(first - start, 0), min(last - start, cache.rows))
        ]


def cut_pieces(cache: Cache, first: int, last: int) -> Iterator[Piece]:
    """Rows `first` to before `last` of a cache, shard by shard; none where `last` comes before."""
    size = cache.manifest.dump.shard_rows
    while first < last:
        shard, start = divmod(first, size)
        stop = min(size, start + last - first)
        yield Piece(cache, shard, start, stop)
        first += stop - start


# --------------------------------------------------------------------------------------------------------- writing


class PieceWriter:
    """Writes the shards of a result. `counts`: of a cache's field what each shard's receipt counts, as `counted`."""

    def __init__(
        self, pieces: Pieces, build: CacheBuild, *, counts: Mapping[tuple[Path, str], Mapping[int, int]] | None = None
    ) -> None:
        self.pieces, self.build = pieces, build
        self.counted = counts or {
            (cache.path, field): dict(enumerate(counted(cache, field)))
            for cache in pieces.caches
            for field in (EXAMPLES, *cache.fields)
        }

    def write(self, shard: int, missing: Sequence[str], group: ShardGroup) -> None:
        pieces = self.pieces.of(shard)
        whole = [open_whole(piece.cache, EXAMPLES, piece.shard) for piece in pieces]
        tables = [
            table.slice(piece.start, piece.stop - piece.start) for table, piece in zip(whole, pieces, strict=True)
        ]
        join = _known_join(pieces) or join_of(tables)
        if EXAMPLES in missing:
            write_tables(group, tables, shard, join=join, truncated=self._count(EXAMPLES, pieces))
        tokens = [list_lengths(table, "input_ids") for table in whole]
        has_targets = self.build.manifest.teacher.task in TOKEN_LABELS
        targets = [count_targets(table) if has_targets else None for table in whole]
        for field in missing:
            if field == EXAMPLES:
                continue
            with field_shard(self.build, field, shard, _rows(tokens, pieces), _rows(targets, pieces)) as writer:
                first = 0
                for piece, length, target in zip(pieces, tokens, targets, strict=True):
                    self._copy(writer, field, piece, first, length, target)
                    first += piece.stop - piece.start
                writer.clipped = self._count(field, pieces)
                writer.commit(join)

    def _copy(
        self,
        writer: FieldShard,
        field: str,
        piece: Piece,
        first: int,
        tokens: np.ndarray,
        targets: np.ndarray | None,
    ) -> None:
        """The rows of a piece to row `first` of the new shard and on; of its shard, `tokens` and `targets` a row."""
        spec, table = writer.spec, open_whole(piece.cache, field, piece.shard)
        where = shard_file(piece.cache.path, field, piece.shard)
        check_lengths(table, field, spec, tokens, targets, where=where)
        if spec.type == "int8":
            writer.channels = read_channels(table.schema, spec.width, where=where)
        for batch in table.slice(piece.start, piece.stop - piece.start).to_batches():
            scales = read_numbers(batch.column(SCALE)) if spec.type == "int8" else None
            writer.put_run(first, read_numbers(batch.column(field)), scales=scales, rows=len(batch))
            first += len(batch)

    def _count(self, field: str, pieces: Sequence[Piece]) -> int:
        """What the receipts of these shards count; a shard's count goes where the first of its rows goes."""
        first = [piece for piece in pieces if piece.start == 0 or self._is_first(piece)]
        return sum(self.counted[piece.cache.path, field].get(piece.shard, 0) for piece in first)

    def _is_first(self, piece: Piece) -> bool:
        """Whether the rows before it in its shard are in no shard of the result."""
        first = self.pieces.of(0)[0]
        return (piece.cache.path, piece.shard, piece.start) == (first.cache.path, first.shard, first.start)


def _rows(values: Sequence[np.ndarray | None], pieces: Sequence[Piece]):
    """What is known of the rows of each piece's shard, of the pieces alone; None where nothing is."""
    parts = [part[piece.start : piece.stop] for part, piece in zip(values, pieces, strict=True) if part is not None]
    return np.concatenate(parts) if parts else None


def _known_join(pieces: Sequence[Piece]) -> str | None:
    """The `join` of a shard that is one of the caches' own."""
    piece = pieces[0]
    if len(pieces) > 1 or not piece.is_whole:
        return None
    return piece.cache.manifest.join[32 * piece.shard : 32 * piece.shard + 32]
