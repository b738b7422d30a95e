"""Which rows of several caches are the same ones: caches come in, the rows that all have come out, and where they lie.

Rows are the same whose id and token hash are. Where two caches' texts were read by other tokenizers, cut at another
length, or have token types in one alone (BERT's do, DistilBERT's of the same vocabulary don't), no token hash can
agree: there it is id and text, or, where a cache holds no texts, the id alone of one and the same corpus.

Caches with the same `join` in their manifests have the same rows in the same order, and nothing is read. Else each row
is known by two hashes of 64 bits, and found by a binary search: 16 bytes a row of the first cache and of the one that
is looked up, 8 bytes a row for each that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from softlabels.cache.arrow import read_numbers
from softlabels.cache.format import EXAMPLES, Manifest
from softlabels.cache.reader import Cache
from softlabels.cache.shards import open_shard
from softlabels.errors import CacheError

BY_TOKENS, BY_TEXT, BY_ID = "id and token hash", "id and text", "id alone, of one corpus"


@dataclass(frozen=True, slots=True)
class Matched:
    """Where the rows of the first cache lie in another one."""

    by: str  # what they were told by
    rows: np.ndarray | None  # (N,) int64: the other's row for each of the first's, -1 for none; None: the same rows
    shared: int

    @property
    def aligned(self) -> bool:
        """Whether both have the same rows, shard by shard."""
        return self.rows is None


@dataclass(frozen=True, slots=True)
class Join:
    """The rows that all caches have."""

    kept: np.ndarray | None  # (K,) int64 rows of the first cache, ascending; None: all
    matched: tuple[Matched, ...]  # of each cache but the first
    rows: int

    def rows_of(self, cache: int, wanted: np.ndarray) -> np.ndarray:
        """The rows of cache number `cache` that are rows `wanted` of the join."""
        own = wanted if self.kept is None else self.kept[wanted]
        if cache == 0:
            return own
        theirs = self.matched[cache - 1].rows
        return own if theirs is None else theirs[own]


def join_caches(caches: Sequence[Cache]) -> Join:
    """The rows that all of `caches` have, in the first one's order; CacheError where there are none."""
    first, keys = caches[0], _Keys(caches[0])
    matched = tuple(_match(first, other, keys) for other in caches[1:])
    here = np.ones(first.rows, dtype=bool)
    for found in matched:
        if found.rows is not None:
            here &= found.rows >= 0
    kept = np.flatnonzero(here)
    if not len(kept):
        shares = ", ".join(f"{found.shared:,}" for found in matched)
        raise CacheError(
            f"no row is in all of the {len(caches)} caches (with {first.path} they share {shares}): leave out a cache "
            f"that has other rows, or dump one corpus with every teacher"
        )
    return Join(None if len(kept) == first.rows else kept, matched, len(kept))


def told_by(first: Cache, other: Cache) -> str:
    """By what rows of two caches are told to be the same; CacheError where nothing can tell."""
    one, two = first.manifest, other.manifest
    if _reading(one) == _reading(two):
        return BY_TOKENS
    if one.dump.text and two.dump.text:
        return BY_TEXT
    if one.corpus.hash == two.corpus.hash:
        return BY_ID
    bare = first if not one.dump.text else other
    raise CacheError(
        f"the rows of {first.path} and {other.path} cannot be told to be the same: they were read by other tokenizers "
        f"(or cut at other lengths, or with token types in one alone), {bare.path} holds no texts, and their corpora "
        f"({one.corpus.source} and {two.corpus.source}) differ. Dump them with texts, or from one corpus"
    )


def _reading(manifest: Manifest) -> tuple[str, int, bool]:
    """What a text's token hash depends on beside the text."""
    return manifest.tokenizer_hash, manifest.dump.max_length, manifest.teacher.token_types


class _Keys:
    """The ids of a cache and what else tells its rows, as sorted hashes; made when they are first asked for."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._sorted: np.ndarray | None = None
        self._order = np.empty(0, np.int64)
        self._content: dict[str, np.ndarray] = {}

    def find(self, other: Cache, by: str) -> np.ndarray:
        """(N,) int64: for each row the row of `other` that is the same, or -1."""
        if self._sorted is None:
            names = id_hashes(self.cache)
            self._order = np.argsort(names, kind="stable")
            self._sorted = names[self._order]
            refuse_doubled(self._sorted, self.cache)
        if by not in self._content:
            self._content[by] = _contents(self.cache, by)
        names = id_hashes(other)
        refuse_doubled(np.sort(names), other)
        at = np.minimum(np.searchsorted(self._sorted, names), len(self._sorted) - 1)
        theirs = np.flatnonzero(self._sorted[at] == names)
        mine = self._order[at[theirs]]
        same = self._content[by][mine] == _contents(other, by)[theirs]
        rows = np.full(self.cache.rows, -1, np.int64)
        rows[mine[same]] = theirs[same]
        if not same.any():
            self._refuse(other, by, ids=len(theirs))
        return rows

    def _refuse(self, other: Cache, by: str, *, ids: int) -> None:
        first, differ = self.cache, "no id"
        if ids:
            differ = f"{ids:,} ids, but with other {'texts' if by == BY_TEXT else 'tokens'} in every one"
        raise CacheError(
            f"{other.path} shares no row with {first.path}: {differ}. Their corpora are "
            f"{_corpus(other)} and {_corpus(first)}: dump one corpus with every teacher, its rows under the same ids, "
            f"or leave this cache out"
        )


def _corpus(cache: Cache) -> str:
    card = cache.manifest.corpus
    return card.source + (f":{card.split}" if card.split else "")


def _match(first: Cache, other: Cache, keys: _Keys) -> Matched:
    by = told_by(first, other)
    if by == BY_TOKENS and _same_rows(first, other):
        return Matched(by, None, first.rows)
    rows = keys.find(other, by)
    if first.manifest.shard_rows == other.manifest.shard_rows and np.array_equal(rows, np.arange(first.rows)):
        return Matched(by, None, first.rows)
    return Matched(by, rows, int((rows >= 0).sum()))


def _same_rows(first: Cache, other: Cache) -> bool:
    one, two = first.manifest, other.manifest
    return one.join == two.join and one.shard_rows == two.shard_rows


def id_hashes(cache: Cache) -> np.ndarray:
    """(N,) uint64: xxh3-64 of every row's id."""
    return _hashes(cache, ["id"])


def refuse_doubled(ordered: np.ndarray, cache: Cache) -> None:
    """CacheError where two of the sorted hashes of a cache's ids are one."""
    if (ordered[1:] == ordered[:-1]).any():
        raise CacheError(f"cache {cache.path} has an id twice: `softlabels verify` says where. Dump it again")


def _contents(cache: Cache, by: str) -> np.ndarray:
    """(N,) uint64: what must be the same of two rows of one id."""
    if by == BY_ID:
        return np.zeros(cache.rows, np.uint64)
    if by == BY_TEXT:
        return _hashes(cache, ["text", "text_b"])
    return np.concatenate([read_numbers(table.column("token_hash")) for table in _examples(cache)])


def _hashes(cache: Cache, columns: Sequence[str]) -> np.ndarray:
    """(N,) uint64: xxh3-64 over the texts of `columns` of each row, a zero byte between."""
    parts = []
    for table in _examples(cache):
        values = [table.column(name).cast(pa.binary()).to_pylist() for name in columns]
        joined = values[0] if len(values) == 1 else map(b"\0".join, zip(*values, strict=True))
        parts.append(np.fromiter(map(xxhash.xxh3_64_intdigest, joined), np.uint64, table.num_rows))
    return np.concatenate(parts)


def _examples(cache: Cache):
    """The shards of `examples` in turn, none of them kept mapped."""
    for shard in range(len(cache.manifest.shard_rows)):
        cache.have(EXAMPLES, shard)
        yield open_shard(cache.path, cache.manifest, EXAMPLES, shard)
