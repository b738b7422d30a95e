"""Several caches as one, without a new one on disk: their logits are mixed batch by batch as they are read.

`plan_combination` says whether caches can be combined, and how; `open_combined` gives a `Cache` of it for a training.
Rows are those that all caches have, in the first one's order; all but `logits` is the first one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash

from softlabels.cache.batches import CacheBatch
from softlabels.cache.format import CombinedCard, CombinedPart, FieldSpec, Manifest
from softlabels.cache.gather import Buffers, FreshBuffers
from softlabels.cache.join import BY_TOKENS, Join, join_caches, told_by
from softlabels.cache.mixing import MIXABLE, Mixing, plan_mixing
from softlabels.cache.reader import Cache, open_cache
from softlabels.cache.urls import is_url
from softlabels.config import CombineOptions, fingerprint
from softlabels.errors import CacheError, ConfigError
from softlabels.types import NO_LABEL, TOKEN_LABELS, VECTOR_LABELS, Signals, TokenBatch, TokenSequence

LOGITS = "logits"
_AT_ONCE = 1 << 16  # rows that `column` mixes at a time


@dataclass(frozen=True, slots=True)
class CacheShare:
    """One of the caches, and how its rows and the first one's overlap."""

    cache: str  # its folder, or its URL without anything secret
    teacher: str
    weight: float | None
    joined_by: str | None  # None: nothing was joined
    rows: int
    shared: int  # of the first cache's rows, those that it has
    lacks: int  # of the first cache's rows, those that it has not
    left_out: int  # of its own rows, those that are not in the result


@dataclass(frozen=True, slots=True)
class Combination:
    """Caches that fit each other, the rows that they share, and how their logits become one's."""

    caches: tuple[Cache, ...]
    join: Join
    mixing: Mixing
    spec: FieldSpec  # of the mixed logits

    def read(self, teacher: int, rows: np.ndarray) -> torch.Tensor:
        """What cache number `teacher` says of `rows` of the join, (B, C) or padded (B, L, C), classes in order."""
        reader = self.caches[teacher].reader
        chosen = reader.select(self.join.rows_of(teacher, rows))
        values = reader.signals(chosen, [LOGITS], FreshBuffers(), as_stored=False)[LOGITS]
        return self.mixing.align(teacher, values)

    def card(self) -> CombinedCard:
        """What the manifest says of it."""
        options = self.mixing.options
        free = options.mean == "median" or options.choose == "entropy"  # of weights
        parts = [
            part_of(cache, None if free else weight)
            for cache, weight in zip(self.caches, self.mixing.weights, strict=True)
        ]
        return CombinedCard(how=options.mean, choose=options.choose, caches=parts)

    def shares(self) -> list[CacheShare]:
        """Of each cache how its rows and the first one's overlap."""
        first, shares = self.caches[0], []
        for number, (cache, part) in enumerate(zip(self.caches, self.card().caches, strict=True)):
            found = self.join.matched[number - 1] if number else None
            shared = first.rows if found is None else found.shared
            shares.append(
                CacheShare(
                    cache=cache.shown,
                    teacher=part.teacher,
                    weight=part.weight,
                    joined_by=None if found is None else found.by,
                    rows=cache.rows,
                    shared=shared,
                    lacks=first.rows - shared,
                    left_out=cache.rows - self.join.rows,
                )
            )
        return shares

    def manifest(self, fields: dict[str, FieldSpec]) -> Manifest:
        """The manifest of a cache of it, before its first shard."""
        first, card = self.caches[0].manifest, self.card()
        teacher = first.teacher.model_copy(
            update={
                "name": " + ".join(part.teacher for part in card.caches),
                "weights_hash": f"combined-{fingerprint(card.model_dump())}",
            }
        )
        corpus: dict[str, Any] = {"rows": self.join.rows, "truncated": 0}
        if self.join.kept is not None:
            chosen = xxhash.xxh3_128(first.corpus.hash.encode() + self.join.kept.astype("<i8").tobytes())
            corpus |= {"labelled": self._labelled(), "hash": chosen.hexdigest()}
        unwritten = {"complete": False, "shard_rows": [], "shard_tokens": [], "join": "", "shards": {}}
        return first.model_copy(
            update={
                "teacher": teacher,
                "corpus": first.corpus.model_copy(update=corpus),
                "fields": fields,
                "combined": card,
                **unwritten,
            }
        )

    def _labelled(self) -> int:
        """Rows of the join with a label, as a dump of them would count."""
        cache, rows = self.caches[0], self.join.rows_of(0, np.arange(self.join.rows))
        task = cache.manifest.teacher.task
        if task in TOKEN_LABELS:
            assert cache.targets is not None
            return int((cache.targets[rows] > 0).sum())
        if task not in VECTOR_LABELS:
            return int((cache.labels[rows] != NO_LABEL).sum())
        parts = [cache.signals(part, []).labels for part in np.array_split(rows, -(-len(rows) // _AT_ONCE))]
        return sum(int((~part.isnan()).all(1).sum()) for part in parts if part is not None)


def part_of(cache: Cache, weight: float | None) -> CombinedPart:
    """How the manifest names one of the caches that another was made of."""
    card = cache.manifest.teacher
    return CombinedPart(
        teacher=card.name,
        weights_hash=card.weights_hash,
        tokenizer_hash=cache.manifest.tokenizer_hash,
        label_names=card.label_names,
        identity=cache.identity(),
        rows=cache.rows,
        weight=weight,
    )


def open_several(paths: Sequence[str | Path], *, cache_size: int | None = None) -> list[Cache]:
    """The finished caches at `paths`; ConfigError where there are fewer than two, or one is named twice."""
    if len(paths) < 2:
        raise ConfigError("combining takes two caches or more: name them one after the other")
    places = [str(path) if is_url(path) else Path(path).resolve() for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError(f"cache {paths[number]} is named twice: to have it count for more, give --weights")
    return [open_cache(path, cache_size=cache_size) for path in paths]


def plan_combination(caches: Sequence[Cache], options: CombineOptions) -> Combination:
    """How `caches` are combined. CacheError says what differs where they can't be, ConfigError what `options` ask."""
    first = caches[0]
    options.shares(len(caches))
    for cache in caches:
        _check_alone(cache)
    for other in caches[1:]:
        _check_pair(first, other)
    mixing = plan_mixing(options, first.manifest.teacher.task, [cache.label_names for cache in caches])
    spec = first.fields[LOGITS].model_copy(update={"type": "float32"})
    return Combination(tuple(caches), join_caches(caches), mixing, spec)


def _check_alone(cache: Cache) -> None:
    task = cache.manifest.teacher.task
    if task not in MIXABLE:
        raise CacheError(
            f"cache {cache.path} is of a teacher for {task}, which has no logits of classes: what can be combined are "
            f"logits of {', '.join(MIXABLE)}"
        )
    cache.require([LOGITS], why="combining caches")
    width, names = cache.fields[LOGITS].width, cache.label_names
    if width != len(names):
        raise CacheError(f"cache {cache.path} has {width} logits and {len(names)} classes: it is damaged")


def _check_pair(first: Cache, other: Cache) -> None:
    """CacheError where two caches do not speak of the same things."""
    one, two = first.manifest.teacher, other.manifest.teacher
    if one.task != two.task:
        raise CacheError(
            f"cache {first.path} is of a teacher for {one.task} and {other.path} of one for {two.task}: only caches "
            f"of one task can be combined"
        )
    if set(one.label_names) != set(two.label_names) or len(one.label_names) != len(two.label_names):
        lacking = [
            f"{cache.path} lacks {_some(sorted(missing))}"
            for cache, missing in (
                (other, set(one.label_names) - set(two.label_names)),
                (first, set(two.label_names) - set(one.label_names)),
            )
            if missing
        ]
        raise CacheError(
            f"caches {first.path} and {other.path} have other classes ({'; '.join(lacking) or 'another number'}). "
            f"Classes are joined by their names, in any order: give the teachers' configs the same id2label and dump "
            f"again, or import with the same --label-names"
        )
    if one.label_names != two.label_names and len(set(one.label_names)) < len(one.label_names):
        raise CacheError(
            f"caches {first.path} and {other.path} have two classes of one name, in another order: nothing can tell "
            f"which is which. Give each class a name of its own and dump again"
        )
    kinds = first.fields[LOGITS].kind, other.fields[LOGITS].kind
    if kinds[0] != kinds[1]:
        raise CacheError(f"{first.path} has logits of kind {kinds[0]}, {other.path} of kind {kinds[1]}")
    if kinds[0] != "row" and told_by(first, other) != BY_TOKENS:
        raise CacheError(
            f"caches {first.path} and {other.path} have logits for every token, of different tokens (their tokenizers "
            f"or their max_length differ, or one alone has token types): dump again with teachers of one tokenizer, "
            f"cut at the same length. Other tokenizers are for logits of whole texts"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ------------------------------------------------------------------------------------------------- as it is read


def open_combined(
    paths: Sequence[str | Path], options: CombineOptions | None = None, *, cache_size: int | None = None
) -> CombinedCache:
    """Several caches as one for a training, mixed as they are read; CacheError where they can't be.

    `cache_size` is for those at a URL, see `open_cache`.
    """
    return CombinedCache(plan_combination(open_several(paths, cache_size=cache_size), options or CombineOptions()))


class CombinedCache(Cache):
    """What `combine` would write, for reading: the same rows, logits and identity of teacher; nothing is on disk.

    A row number is one of the join. All but `logits` is read from the first cache.
    """

    def __init__(self, combination: Combination) -> None:
        self.first = combination.caches[0]
        self.combination = combination
        super().__init__(self.first.path, combination.manifest(self.first.fields | {LOGITS: combination.spec}))

    def overlap(self) -> list[str]:
        """A line for each cache that has other rows than the result; none where all have the same."""
        return [
            f"{share.cache}: {share.shared:,} of its {share.rows:,} rows are in {self.first.shown}, which has "
            f"{share.lacks:,} more; {share.left_out:,} are left out"
            if number
            else f"{share.cache}: {self.rows:,} of its {share.rows:,} rows are in all caches; the others are left out"
            for number, share in enumerate(self.combination.shares())
            if share.lacks or share.left_out
        ]

    def _own(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of the first cache."""
        return self.combination.join.rows_of(0, self._checked(rows))

    def _checked(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        numbers = np.asarray(rows, np.int64)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self.rows):
            raise IndexError(f"the caches share rows 0 to {self.rows - 1}; {numbers.min()} to {numbers.max()} asked")
        return numbers

    @cached_property
    def _all(self) -> np.ndarray:
        return self._own(np.arange(self.rows))

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.first.lengths[self._all]

    @cached_property
    def targets(self) -> np.ndarray | None:
        return None if self.first.targets is None else self.first.targets[self._all]

    @cached_property
    def decoder_starts(self) -> np.ndarray | None:
        return None  # no encoder-decoder has logits of classes

    @cached_property
    def labels(self) -> np.ndarray:
        return self.first.labels[self._all]

    @cached_property
    def token_hashes(self) -> np.ndarray:
        return self.first.token_hashes[self._all]

    @cached_property
    def ids(self) -> list[str]:
        names = self.first.ids
        return [names[row] for row in self._all.tolist()]

    def texts(self) -> list[tuple[str, str | None]]:
        texts = self.first.texts()
        return [texts[row] for row in self._all.tolist()]

    def column(self, field: str) -> np.ndarray:
        if field != LOGITS:
            return self.first.column(field)[self._all]
        if self.fields[LOGITS].kind != "row":
            raise ValueError(f"'{field}' has no value a row: read it batch by batch")
        every = np.arange(self.rows)
        parts = [self.signals(every[at : at + _AT_ONCE], [LOGITS]) for at in range(0, self.rows, _AT_ONCE)]
        return np.concatenate([part.logits.numpy() for part in parts])

    def used_ids(self, rows: np.ndarray) -> np.ndarray:
        return self.first.used_ids(self._own(rows))

    def sequences(self, rows: np.ndarray) -> Iterator[TokenSequence]:
        return self.first.sequences(self._own(rows))

    def identity(self) -> str:
        """One hash of the identities of all caches and of the rule."""
        assert self.manifest.combined is not None
        return fingerprint(self.manifest.combined.model_dump())

    def table(self, field: str, shard: int) -> pa.Table:
        raise CacheError(
            "caches that are combined as they are read have no files: write them with `softlabels combine`"
        )

    def tokens(self, rows: Sequence[int] | np.ndarray) -> TokenBatch:
        return self.first.tokens(self._own(rows))

    def signals(self, rows: Sequence[int] | np.ndarray, fields: Sequence[str]) -> Signals:
        return self.batch(rows, fields).teacher

    def batch(
        self,
        rows: Sequence[int] | np.ndarray,
        fields: Sequence[str],
        *,
        out: Buffers | None = None,
        as_stored: bool = False,
    ) -> CacheBatch:
        return self.reader.batch(rows, fields, out=out or FreshBuffers(), as_stored=as_stored)

    @cached_property
    def reader(self) -> CombinedReader:  # type: ignore[override]  # the part of a BatchReader that batches need
        return CombinedReader(self)

    def __reduce__(self) -> tuple[Callable[..., Cache], tuple[list[str | Path], CombineOptions]]:
        return open_combined, ([cache.given for cache in self.combination.caches], self.combination.mixing.options)


class CombinedReader:
    """Builds the batches of a `CombinedCache`."""

    def __init__(self, cache: CombinedCache) -> None:
        self.cache = cache

    def batch(
        self,
        rows: Sequence[int] | np.ndarray,
        fields: Sequence[str],
        *,
        out: Buffers,
        as_stored: bool,
        asked: bool = False,
    ) -> CacheBatch:
        """Everything about `rows`, as `BatchReader.batch` gives it."""
        cache, numbers = self.cache, self.cache._checked(rows)
        others = [field for field in fields if field != LOGITS]
        batch = cache.first.reader.batch(cache._own(numbers), others, out=out, as_stored=as_stored, asked=asked)
        tensors = dict(batch.teacher.fields)
        if LOGITS in fields:
            mixed = self._logits(numbers, batch.tokens)
            tensors[LOGITS] = out.take(LOGITS, tuple(mixed.shape), torch.float32).copy_(mixed)
        return CacheBatch(numbers, batch.tokens, Signals(tensors, batch.teacher.mask, batch.teacher.labels))

    def _logits(self, rows: np.ndarray, tokens: TokenBatch) -> torch.Tensor:
        plan = self.cache.combination
        said = [plan.read(number, rows) for number in range(len(plan.caches))]
        labels = tokens.labels
        if labels is None or labels.shape != said[0].shape[:-1]:  # numbers, of which none is a class
            labels = torch.full(said[0].shape[:-1], NO_LABEL)
        mixed = plan.mixing.mix(said, labels)
        return mixed if mixed.ndim == 2 else mixed * tokens.attention_mask[..., None]

    def expect(self, rows: Sequence[int] | np.ndarray, fields: Sequence[str]) -> None:
        """Have the system read the pages of `rows` ahead."""
        plan, numbers = self.cache.combination, self.cache._checked(rows)
        for number, cache in enumerate(plan.caches):
            wanted = [field for field in fields if field == LOGITS or number == 0]
            cache.reader.expect(plan.join.rows_of(number, numbers), wanted)
