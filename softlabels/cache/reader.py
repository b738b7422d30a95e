"""A finished cache as padded batches, straight from the mapped files: no Python per value, no copy of what isn't asked.

`open_cache` reads the manifest only. A shard is mapped when a row of it is first wanted, checked once, and stays
mapped while it is among the most recently used.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from softlabels.cache.codec import DTYPES, decode
from softlabels.cache.format import EXAMPLES, FieldSpec, Manifest, read_manifest, read_settings, shard_file
from softlabels.cache.shards import check_lengths, check_size, open_shard
from softlabels.cache.writer import SCALE, read_channels
from softlabels.config import fingerprint
from softlabels.errors import CacheError
from softlabels.types import Signals, TokenBatch

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

# Seconds after which a mapped file's size is looked at again: a file that was cut short under the reader is told, where
# touching its mapped memory would kill the process. What is cut in these last moments still does.
LOOK_AGAIN = 0.05
_OPEN_SHARDS = 8192  # mapped at a time; the system commonly allows a process 65,530 mappings


def open_cache(path: str | Path) -> Cache:
    """The finished cache at `path`, ready to read. Costs the manifest, not the size of the cache."""
    folder = Path(path)
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise CacheError(
            f"{folder} is unfinished: give the same `softlabels dump` command again, and it goes on where it stopped"
        )
    return Cache(folder, manifest)


@dataclass(frozen=True, slots=True)
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

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.rows: int = manifest.corpus.rows
        self.fields: dict[str, FieldSpec] = manifest.fields
        self._shards: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._looked: dict[tuple[str, int], float] = {}  # when a shard's file was last seen to be whole
        self._lists: dict[tuple[str, int, str], _Lists] = {}

    def __len__(self) -> int:
        return self.rows

    @property
    def label_names(self) -> list[str]:
        return self.manifest.teacher.label_names

    def require(self, fields: Sequence[str], *, why: str) -> None:
        """CacheError where a field is missing, with the option of `dump` that would add it."""
        for field in fields:
            if field not in self.fields:
                have = ", ".join(sorted(self.fields)) or "no field"
                raise CacheError(
                    f"{why} needs {field}; cache {self.path} holds {have}. Dump it with --capture {capture_of(field)}"
                )

    # ------------------------------------------------------------------------------------------- whole columns

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int32: tokens of every row."""
        lists = [self._column_lists(EXAMPLES, "input_ids", shard) for shard in self._all_shards()]
        return np.concatenate([np.diff(starts) for shard in lists for starts in shard.starts]).astype(np.int32)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64: class of every row, NO_LABEL for none."""
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
        if not self.manifest.dump.text:
            raise CacheError(
                f"cache {self.path} holds no texts: it was dumped with --no-text. Dump it again without, into another "
                f"folder"
            )
        return [(a, b or None) for a, b in zip(self._strings("text"), self._strings("text_b"), strict=True)]

    def column(self, field: str) -> np.ndarray:
        """(N, width): a `row` field of every row, such as all logits."""
        if self.fields[field].kind != "row":
            raise ValueError(f"'{field}' has no value a row: read it batch by batch")
        spec, parts = self.fields[field], []
        for shard in self._all_shards():
            table = self._shard(field, shard)
            stored = np.concatenate([_flat(chunk).reshape(-1, spec.width) for chunk in table.column(0).chunks])
            if spec.type == "int8":
                scales, channels = table.column(SCALE).to_numpy().copy(), self._channels_of(field, shard)
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

        return load_tokenizer(self.path)

    # ------------------------------------------------------------------------------------------------- batches

    def tokens(self, rows: np.ndarray) -> TokenBatch:
        """The padded token batch of `rows`."""
        lengths = self.lengths[rows]
        shape = (len(rows), int(lengths.max()))
        ids = np.full(shape, self.manifest.teacher.pad_token_id, dtype=np.int64)
        types = np.zeros(shape, dtype=np.int64) if self.manifest.teacher.token_types else None
        for i, (shard, row) in enumerate(self._places(rows)):
            ids[i, : lengths[i]] = self._column_lists(EXAMPLES, "input_ids", shard).row(row)
            if types is not None:
                types[i, : lengths[i]] = self._column_lists(EXAMPLES, "token_type_ids", shard).row(row)
        mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)  # (B, L)
        return TokenBatch(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            None if types is None else torch.from_numpy(types),
            torch.from_numpy(self.labels[rows]),
        )

    def signals(self, rows: np.ndarray, fields: Sequence[str]) -> Signals:
        """The teacher's `fields` for `rows` as padded float32 tensors; padding is zero."""
        lengths = self.lengths[rows]
        mask = torch.from_numpy((np.arange(int(lengths.max())) < lengths[:, None]).astype(np.int64))
        tensors = {field: self._padded(field, rows, lengths) for field in fields}
        return Signals(tensors, mask, torch.from_numpy(self.labels[rows]))

    def _padded(self, field: str, rows: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        spec, longest = self.fields[field], int(lengths.max())
        shape = {"row": (spec.width,), "token": (longest, spec.width), "pair": (spec.width, longest, longest)}[
            spec.kind
        ]
        for shard in {shard for shard, _ in self._places(rows)}:
            self.table(field, shard)  # its checks come first: until then `width` is only a number in a stranger's file
        out = np.zeros((len(rows), *shape), dtype=DTYPES[spec.type])
        for i, (shard, row) in enumerate(self._places(rows)):
            length = int(lengths[i])
            if spec.kind == "row":
                out[i] = self._rows(field, shard).row(row)
            elif spec.kind == "token":
                out[i, :length] = self._column_lists(field, field, shard).row(row).reshape(length, spec.width)
            else:
                out[i, :, :length, :length] = (
                    self._column_lists(field, field, shard).row(row).reshape(-1, length, length)
                )
        values = decode(out, spec, scales=self._scales(field, rows, lengths), channels=self._channels(field, rows))
        if spec.kind == "token" and spec.heads:
            return values.unflatten(2, (spec.heads, -1)).transpose(1, 2)  # (B, H, L, K)
        return values

    def _scales(self, field: str, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """Of an int8 field the scale of every vector: (B, L) with zero padding, or (B,) of a row field."""
        spec = self.fields[field]
        if spec.type != "int8":
            return None
        if spec.kind == "row":
            return np.concatenate([self._rows(field, shard, SCALE).row(row) for shard, row in self._places(rows)])
        out = np.zeros((len(rows), int(lengths.max())), np.float32)
        for i, (shard, row) in enumerate(self._places(rows)):
            out[i, : lengths[i]] = self._column_lists(field, SCALE, shard).row(row)
        return out

    def _channels(self, field: str, rows: np.ndarray) -> np.ndarray | None:
        """Of an int8 field (B, width): the channel scales of each row's shard."""
        if self.fields[field].type != "int8":
            return None
        return np.stack([self._channels_of(field, shard) for shard, _ in self._places(rows)])

    def _channels_of(self, field: str, shard: int) -> np.ndarray:
        table, key = self._shard(field, shard), (field, shard, "channels")
        if key not in self._lists:  # as a list column of one row
            channels = read_channels(table.schema, self.fields[field].width, where=shard_file(self.path, field, shard))
            self._lists[key] = _Lists([channels], [np.array([0, len(channels)])], np.array([0, 1]))
        return self._lists[key].row(0)

    def _places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        size = self.manifest.dump.shard_rows
        return [(int(row) // size, int(row) % size) for row in rows]

    # -------------------------------------------------------------------------------------------------- shards

    def _all_shards(self) -> range:
        return range(len(self.manifest.shard_rows))

    def _shard(self, field: str, shard: int) -> pa.Table:
        """The mapped, checked table of one shard, least recently used ones let go."""
        key, now = (field, shard), time.monotonic()
        if key in self._shards:
            self._shards.move_to_end(key)
            if now - self._looked[key] > LOOK_AGAIN:
                check_size(self.path, self.manifest, field, shard)
                self._looked[key] = now
            return self._shards[key]
        table = open_shard(self.path, self.manifest, field, shard)
        self._shards[key], self._looked[key] = table, now
        if len(self._shards) > _OPEN_SHARDS:
            old, _ = self._shards.popitem(last=False)
            del self._looked[old]
            for column in list(self._lists):
                if column[:2] == old:
                    del self._lists[column]
        return table

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
                tokens = self.lengths[first : first + self.manifest.shard_rows[shard]]
                check_lengths(table, field, self.fields[field], tokens, where=shard_file(self.path, field, shard))
            self._lists[key] = lists
        return self._lists[key]

    def _rows(self, field: str, shard: int, column: str = "") -> _Lists:
        """A column of as many values in every row, as lists: the field itself, or the scales of an int8 row field."""
        table = self._shard(field, shard)
        key = (field, shard, column)
        if key not in self._lists:
            chunks, width = table.column(column or field).chunks, 1 if column else self.fields[field].width
            bounds = np.cumsum([0, *(len(chunk) for chunk in chunks)])
            starts = [np.arange(len(chunk) + 1) * width for chunk in chunks]
            values = [chunk.to_numpy() if column else _flat(chunk) for chunk in chunks]
            self._lists[key] = _Lists(values, starts, bounds)
        return self._lists[key]

    def _flat_column(self, column: str) -> np.ndarray:
        return np.concatenate([self._shard(EXAMPLES, shard).column(column).to_numpy() for shard in self._all_shards()])

    def _strings(self, column: str) -> list[str]:
        return [
            value for shard in self._all_shards() for value in self._shard(EXAMPLES, shard).column(column).to_pylist()
        ]


def _flat(chunk: pa.Array) -> np.ndarray:
    """The values of a list column as one array over the mapped memory."""
    return chunk.values.to_numpy(zero_copy_only=True)


def capture_of(field: str) -> str:
    """The `--capture` option that gives `field`: 'query.06' comes from 'qkv:6'."""
    kind, _, layer = field.partition(".")
    layer, at, pooled = layer.partition("@")
    if not layer:
        return kind
    kind = "qkv" if kind in ("query", "key", "value") else kind
    return f"{kind}:{int(layer)}{at}{pooled}"
