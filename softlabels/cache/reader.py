"""A finished cache as padded batches, straight from the mapped files: no Python per value, no copy of what isn't asked.

`open_cache` reads the manifest only. A shard is mapped when a row of it is first wanted, checked once, and stays
mapped while it is among the most recently used.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from softlabels.cache.arrow import read_numbers
from softlabels.cache.batches import LABELS, BatchReader, CacheBatch
from softlabels.cache.codec import decode
from softlabels.cache.format import EXAMPLES, FieldSpec, Manifest, read_manifest, read_settings, shard_file
from softlabels.cache.gather import Buffers, FreshBuffers
from softlabels.cache.loader import READ_AHEAD, CacheLoader, LoadOptions, PickedRows
from softlabels.cache.shards import check_lengths, check_size, count_targets, open_shard
from softlabels.cache.urls import is_url
from softlabels.cache.writer import SCALE, read_channels
from softlabels.config import fingerprint
from softlabels.errors import CacheError
from softlabels.tokens import shuffled_batches, windowed_batches
from softlabels.types import IMAGES, SEQ2SEQ, TOKEN_LABELS, VECTOR_LABELS, Signals, TokenBatch, TokenSequence

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from softlabels.cache.stream import ShardStore

# Seconds after which a mapped file's size is looked at again: a file that was cut short under the reader is told, where
# touching its mapped memory would kill the process. What is cut in these last moments still does.
LOOK_AGAIN = 0.05
_LOOK_AT_ALL = 64  # open files at the most, for which that takes no more than a hundredth of the time
_AHEAD = 16  # shards of a cache at a URL that are asked for before they are read
_PLACED = 1 << 16  # rows whose places are worked out at a time
_OPEN_SHARDS = 8192  # mapped at a time; the system commonly allows a process 65,530 mappings


def open_cache(path: str | Path, *, cache_size: int | None = None) -> Cache:
    """The finished cache at `path`, ready to read. Costs the manifest, not the size of the cache.

    A URL is read without pulling it: shards come when they are wanted, into a local cache of at most `cache_size` bytes
    (by default $SOFTLABELS_CACHE_SIZE, or 10 GB); see `softlabels.cache.stream`.
    """
    if is_url(path):
        return _open_url(str(path), cache_size)
    folder = Path(path)
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise CacheError(
            f"{folder} is unfinished: give the same `softlabels dump` (or pull) command again, and it goes on where it "
            f"stopped"
        )
    return Cache(folder, manifest)


def _open_url(url: str, cache_size: int | None) -> Cache:
    from softlabels.cache.remote import open_remote
    from softlabels.cache.stream import open_store

    store = open_store(open_remote(url), limit=cache_size)
    return Cache(store.folder, store.manifest, store)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Lists:
    """A list column of one shard: row r's values are `values[starts[r]:starts[r + 1]]` of record batch `batch[r]`."""

    values: list[np.ndarray]
    starts: list[np.ndarray]
    bounds: np.ndarray  # first row of each record batch, and the number of rows

    def row(self, row: int) -> np.ndarray:
        if len(self.values) == 1:
            return self.values[0][self.starts[0][row] : self.starts[0][row + 1]]
        batch = int(np.searchsorted(self.bounds, row, side="right")) - 1
        row -= int(self.bounds[batch])
        return self.values[batch][self.starts[batch][row] : self.starts[batch][row + 1]]


class Cache:
    """A finished cache. Rows are numbered from 0 in the corpus's order."""

    def __init__(self, path: Path, manifest: Manifest, store: ShardStore | None = None) -> None:
        self.path, self.manifest = path, manifest
        self.store = store  # of a cache at a URL: brings the shards to `path`
        self._mapped = 0  # bytes of its shards that are mapped
        self.rows: int = manifest.corpus.rows
        self.fields: dict[str, FieldSpec] = manifest.fields
        self._shards: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._looked: dict[str, np.ndarray] = {}  # of a field (shards,): when each file was last seen to be whole
        self._all_whole_until = 0.0
        self._lists: dict[tuple[str, int, str], _Lists] = {}

    def __len__(self) -> int:
        return self.rows

    @property
    def shown(self) -> str:
        """Where the cache is, for people: its folder, or its URL without anything secret."""
        return str(self.path) if self.store is None else self.store.url

    @property
    def given(self) -> str | Path:
        """What `open_cache` opens this cache by; of one at a URL with what may be secret of it."""
        return self.path if self.store is None else self.store.remote.place.given

    @property
    def label_names(self) -> list[str]:
        return self.manifest.teacher.label_names

    def require(self, fields: Sequence[str], *, why: str) -> None:
        """CacheError where a field is missing, with the option of `dump` that would add it."""
        for field in fields:
            if field not in self.fields:
                have = ", ".join(sorted(self.fields)) or "no field"
                raise CacheError(
                    f"{why} needs {field}; cache {self.shown} holds {have}. Dump it with --capture {capture_of(field)}"
                )

    # ------------------------------------------------------------------------------------------- whole columns

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int32: tokens of every row."""
        lists = [self._column_lists(EXAMPLES, "input_ids", shard) for shard in self._all_shards(EXAMPLES)]
        return np.concatenate([np.diff(starts) for shard in lists for starts in shard.starts]).astype(np.int32)

    @cached_property
    def targets(self) -> np.ndarray | None:
        """(N,) int64: tokens of every row that have a label, as in a language model's cache; None where none can."""
        if self.manifest.teacher.task not in TOKEN_LABELS:
            return None
        return np.concatenate([count_targets(self._shard(EXAMPLES, shard)) for shard in self._all_shards(EXAMPLES)])

    @cached_property
    def decoder_starts(self) -> np.ndarray | None:
        """(N,) int64: what the decoder reads before the targets; None where the teacher is no encoder-decoder."""
        if self.manifest.teacher.task != SEQ2SEQ:
            return None
        return self._flat_column("decoder_start").astype(np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64: class of every row, NO_LABEL for none; of a task with other labels, see `batch`."""
        return self._flat_column("label").astype(np.int64)

    @cached_property
    def token_hashes(self) -> np.ndarray:
        """(N,) uint64: the token hash of every row."""
        return self._flat_column("token_hash")

    @cached_property
    def ids(self) -> list[str]:
        """The id of every row."""
        return self._strings("id")

    def texts(self) -> list[tuple[str, str | None]]:
        """(text, text_b) of every row; CacheError where the cache was dumped without texts."""
        if self.manifest.teacher.task == IMAGES:
            raise CacheError(f"cache {self.shown} is of images: it holds no texts")
        if not self.manifest.dump.text:
            raise CacheError(
                f"cache {self.shown} holds no texts: it was dumped with --no-text. Dump it again without, into another "
                f"folder"
            )
        return [(a, b or None) for a, b in zip(self._strings("text"), self._strings("text_b"), strict=True)]

    def column(self, field: str) -> np.ndarray:
        """(N, width): a `row` field of every row, such as all logits."""
        if self.fields[field].kind != "row":
            raise ValueError(f"'{field}' has no value a row: read it batch by batch")
        spec, parts = self.fields[field], []
        for shard in self._all_shards(field):
            table = self._shard(field, shard)
            stored = np.concatenate([_flat(chunk).reshape(-1, spec.width) for chunk in table.column(0).chunks])
            if spec.type == "int8":
                scales, channels = read_numbers(table.column(SCALE)).copy(), self.channels_of(field, shard)
                parts.append(decode(stored, spec, scales=scales, channels=channels[None]).numpy())
            else:
                parts.append(decode(stored, spec).numpy() if spec.type == "bfloat16" else stored)
        return np.concatenate(parts)

    def used_ids(self, rows: np.ndarray) -> np.ndarray:
        """The distinct token ids of `rows`, sorted."""
        seen = np.zeros(self.manifest.teacher.vocab_size, dtype=bool)
        for shard, row in self._places(rows):
            seen[self._column_lists(EXAMPLES, "input_ids", shard).row(row)] = True
        return np.flatnonzero(seen)

    def sequences(self, rows: np.ndarray) -> Iterator[TokenSequence]:
        """The tokens of each of `rows` in turn, read as they are asked for."""
        for shard, row in self._places(rows):
            ids = self._column_lists(EXAMPLES, "input_ids", shard).row(row).astype(np.int32)
            types = None
            if self.manifest.teacher.token_types:
                types = self._column_lists(EXAMPLES, "token_type_ids", shard).row(row)
            yield TokenSequence(ids, types)

    def identity(self) -> str:
        """One hash that two caches share only if they hold the same rows, fields and values."""
        return fingerprint([self.manifest.join, {name: t.xxh3_128 for name, t in self.manifest.shards.items()}])

    def table(self, field: str, shard: int) -> pa.Table:
        """A shard of a field (or of `examples`) as it lies on disk, mapped and checked."""
        table = self._shard(field, shard)
        if field in self.fields and self.fields[field].kind != "row":
            self._column_lists(field, field, shard)  # as many values in every row as its tokens ask for
        return table

    def to_datasets(self, fields: Sequence[str] | None = None) -> datasets.Dataset:
        """The cache as a `datasets.Dataset`, without a copy where that is possible; see `softlabels.cache.interop`."""
        from softlabels.cache.interop import to_datasets

        return to_datasets(self, fields)

    def teacher_config(self) -> dict[str, Any]:
        """The teacher's config.json; empty where the teacher ran elsewhere and left none."""
        try:
            return read_settings(self.path, "teacher", "config.json")
        except FileNotFoundError:
            return {}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, from the cache; CacheError where it is damaged, or asks for code to be loaded."""
        from softlabels.cache.settings import load_tokenizer

        if self.manifest.teacher.task == IMAGES:
            raise CacheError(f"cache {self.shown} is of images: it has no tokenizer, but an image processor")
        return load_tokenizer(self.path)

    # ------------------------------------------------------------------------------------------------- batches

    def tokens(self, rows: Sequence[int] | np.ndarray) -> TokenBatch:
        """The padded token batch of `rows`."""
        return self.reader.tokens(self.reader.select(rows), FreshBuffers())

    def signals(self, rows: Sequence[int] | np.ndarray, fields: Sequence[str]) -> Signals:
        """The teacher's `fields` for `rows` as padded float32 tensors; padding is zero."""
        reader, out = self.reader, FreshBuffers()
        chosen = reader.select(rows)
        tensors = reader.signals(chosen, fields, out, as_stored=False)
        return Signals(tensors, reader.mask(chosen, out), reader.labels(chosen, out))

    def batch(
        self,
        rows: Sequence[int] | np.ndarray,
        fields: Sequence[str],
        *,
        out: Buffers | None = None,
        as_stored: bool = False,
    ) -> CacheBatch:
        """`tokens` and `signals` of `rows` at once.

        `out` takes memory that is used again: the batch is then good until the next one is built in it. `as_stored`
        hands out float16 and bfloat16 as they are, for a device to widen them; int8 comes as float32 all the same.
        torch's threads share the copying (`torch.set_num_threads`).
        """
        return self.reader.batch(rows, fields, out=out or FreshBuffers(), as_stored=as_stored)

    def loader(
        self,
        rows: Sequence[int] | np.ndarray,
        fields: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        epoch: int = 0,
        window: int | None = None,
        options: LoadOptions | None = None,
    ) -> CacheLoader:
        """One epoch of training over `rows`: shuffled batches of similar lengths, read ahead by a thread.

        The order follows from `seed` and `epoch` alone. `window` shuffles within that many shards at a time instead of
        all, for a cache that is larger than memory and on a disk that is slow at random reads; what this does to the
        mixing is said at `softlabels.tokens.windowed_batches`.
        """
        rows, rng = np.asarray(rows, np.int64), np.random.default_rng([seed, epoch])
        lengths, group = self.lengths[rows], 50
        if window is None and self.store is not None and (room := self.store.window(fields)) is not None:
            # batches of `group` are shuffled once more, and some are read ahead: that needs shards beside the window
            size = self.manifest.dump.shard_rows
            group = max(1, min(group, room // 4 * size // batch_size))
            window = max(1, room - -(-(group + READ_AHEAD) * batch_size // size))
        if window is None:
            batches = shuffled_batches(lengths, batch_size=batch_size, rng=rng)
        else:
            shards = rows // self.manifest.dump.shard_rows
            batches = windowed_batches(lengths, shards, batch_size=batch_size, rng=rng, window=window, group=group)
        return CacheLoader(self, PickedRows(rows, batches), fields, options or LoadOptions())

    @cached_property
    def reader(self) -> BatchReader:
        """Builds the batches."""
        return BatchReader(self, open_shards=_OPEN_SHARDS if self._most_mapped == math.inf else 0)

    @property
    def _most_mapped(self) -> float:
        """Bytes that may be mapped; of a cache at a URL, mapped files still take room after they were removed."""
        if self.store is None or self.store.bytes_of((EXAMPLES, *self.fields)) <= self.store.limit:
            return math.inf
        return 0.75 * self.store.limit

    def __reduce__(self) -> tuple[Callable[..., Cache], tuple[Any, ...]]:
        """To another process goes the path: it maps the files itself, and shares their memory."""
        if self.store is not None:
            return _open_url, (self.given, self.store.limit)
        return open_cache, (self.path,)

    def channels_of(self, field: str, shard: int) -> np.ndarray:
        """(width,) the channel scales of a shard of an int8 field."""
        table, key = self._shard(field, shard), (field, shard, "channels")
        if key not in self._lists:  # as a list column of one row
            channels = read_channels(table.schema, self.fields[field].width, where=shard_file(self.path, field, shard))
            self._lists[key] = _Lists([channels], [np.array([0, len(channels)])], np.array([0, 1]))
        return self._lists[key].row(0)

    def _places(self, rows: np.ndarray) -> Iterator[tuple[int, int]]:
        """(shard, row in it) of each of `rows`."""
        size = self.manifest.dump.shard_rows
        for start in range(0, len(rows), _PLACED):
            for row in rows[start : start + _PLACED].tolist():
                yield row // size, row % size

    # -------------------------------------------------------------------------------------------------- shards

    def _all_shards(self, field: str) -> Iterator[int]:
        """The numbers of all shards, of which `field` is read one after the other."""
        count = len(self.manifest.shard_rows)
        for shard in range(count):
            if self.store is not None:
                self.store.ahead((field, coming) for coming in range(shard, min(shard + _AHEAD, count)))
            yield shard

    def have(self, field: str, shard: int) -> None:
        """See that the shard's file is in the folder: of a cache at a URL it may have to come first."""
        if self.store is not None:
            self.store.fetch(field, shard)

    def _shard(self, field: str, shard: int) -> pa.Table:
        """The mapped, checked table of one shard, least recently used ones let go."""
        key = (field, shard)
        if key in self._shards:
            self._shards.move_to_end(key)
            self.look_again(field, np.array([shard * self.manifest.dump.shard_rows]))
            return self._shards[key]
        self.have(field, shard)
        table = open_shard(self.path, self.manifest, field, shard)
        self._shards[key] = table
        self._mapped += self.manifest.shards[field].size(shard)
        if field not in self._looked:
            self._looked[field] = np.zeros(len(self.manifest.shard_rows))
        self._looked[field][shard] = time.monotonic()
        while len(self._shards) > _OPEN_SHARDS or (len(self._shards) > 1 and self._mapped > self._most_mapped):
            old, _ = self._shards.popitem(last=False)
            self._mapped -= self.manifest.shards[old[0]].size(old[1])
            for column in list(self._lists):
                if column[:2] == old:
                    del self._lists[column]
        return table

    def look_again(self, field: str, rows: np.ndarray) -> None:
        """CacheError where a mapped file that these rows lie in was cut short since it was last looked at.

        Where few files are open, all of them are looked at, so that most batches ask only for the time.
        """
        now = time.monotonic()
        if now < self._all_whole_until:
            return
        if len(self._shards) <= _LOOK_AT_ALL:
            for known, shard in list(self._shards):
                check_size(self.path, self.manifest, known, shard)
            self._all_whole_until = now + LOOK_AGAIN
            return
        looked, shards = self._looked[field], rows // self.manifest.dump.shard_rows
        for shard in np.unique(shards[looked[shards] < now - LOOK_AGAIN]).tolist():
            check_size(self.path, self.manifest, field, shard)
            looked[shard] = now

    def column_lists(self, field: str, column: str, shard: int) -> _Lists:
        """A column of one shard, its rows' lengths checked: of `examples`, a field itself, or its scales."""
        if field != EXAMPLES and self.fields[field].kind == "row":
            return self._rows(field, shard, "" if column == field else column)
        if column == LABELS and self.manifest.teacher.task in VECTOR_LABELS:
            return self._rows(field, shard, column)
        return self._column_lists(field, column, shard)

    def _column_lists(self, field: str, column: str, shard: int) -> _Lists:
        table = self._shard(field, shard)
        key = (field, shard, column)
        if key not in self._lists:
            chunks = table.column(column).chunks
            bounds = np.cumsum([0, *(len(chunk) for chunk in chunks)])
            starts = [np.frombuffer(c.buffers()[1], np.int32)[c.offset : c.offset + len(c) + 1] for c in chunks]
            lists = _Lists([_flat(chunk) for chunk in chunks], starts, bounds)
            if field != EXAMPLES:
                first = shard * self.manifest.dump.shard_rows
                rows, spec = slice(first, first + self.manifest.shard_rows[shard]), self.fields[field]
                targets = self.targets[rows] if spec.kind == "target" and self.targets is not None else None
                check_lengths(
                    table, field, spec, self.lengths[rows], targets, where=shard_file(self.path, field, shard)
                )
            self._lists[key] = lists
        return self._lists[key]

    def _rows(self, field: str, shard: int, column: str = "") -> _Lists:
        """A column of as many values in every row, as lists: the field itself, or the scales of an int8 row field."""
        table = self._shard(field, shard)
        key = (field, shard, column)
        if key not in self._lists:
            chunks = table.column(column or field).chunks
            listed = pa.types.is_fixed_size_list(chunks[0].type)
            width = chunks[0].type.list_size if listed else 1
            bounds = np.cumsum([0, *(len(chunk) for chunk in chunks)])
            starts = [np.arange(len(chunk) + 1) * width for chunk in chunks]
            values = [_flat(chunk) if listed else read_numbers(chunk) for chunk in chunks]
            self._lists[key] = _Lists(values, starts, bounds)
        return self._lists[key]

    def _flat_column(self, column: str) -> np.ndarray:
        shards = self._all_shards(EXAMPLES)
        return np.concatenate([read_numbers(self._shard(EXAMPLES, shard).column(column)) for shard in shards])

    def _strings(self, column: str) -> list[str]:
        return [
            value
            for shard in self._all_shards(EXAMPLES)
            for value in self._shard(EXAMPLES, shard).column(column).to_pylist()
        ]


def _flat(chunk: pa.Array) -> np.ndarray:
    """The values of a list column as one array over the mapped memory."""
    return read_numbers(chunk.values)


def capture_of(field: str, spec: FieldSpec | None = None) -> str:
    """The `--capture` option that gives `field`: 'query.06' comes from 'qkv:6'. `spec`, where it is known."""
    if field.startswith("vocab_"):
        return f"vocab:{spec.form}" if spec is not None and spec.form else "vocab:topk=64"
    kind, _, layer = field.partition(".")
    layer, at, pooled = layer.partition("@")
    if not layer:
        return kind
    kind = "qkv" if kind in ("query", "key", "value") else kind
    return f"{kind}:{int(layer)}{at}{pooled}"
