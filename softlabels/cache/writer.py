"""Shards in any row order: values come in as the teacher gives them, whole Arrow files with receipts go out.

The teacher works through a shard sorted by length, the file keeps the corpus's order. Since the lengths are known
before the forward pass, the place of every value in the file is too: the Arrow file is laid out with a hole where the
values go, and each batch is written straight into its place. Memory holds a batch, whatever the shard's size; of an
int8 field also the first SAMPLE vectors of the shard, from which its channel scales are measured.
"""

from __future__ import annotations

import base64
import itertools
import json
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from torch import Tensor

from softlabels.cache.codec import (
    DTYPES,
    SAMPLE,
    Overflow,
    encode,
    fits,
    id_type,
    in_range,
    measure_channels,
    without_padding,
)
from softlabels.cache.files import hash_file, publish, temporary, write_file
from softlabels.cache.format import (
    EXAMPLES,
    LIST_LIMIT,
    VERSION,
    WHOLE,
    FieldSpec,
    Receipt,
    TeacherCard,
    receipt_file,
    shard_file,
    to_json,
)
from softlabels.cache.grouped import ShardGroup
from softlabels.errors import CacheError
from softlabels.tokens import token_hash
from softlabels.types import TOKEN_LABELS, VECTOR_LABELS, TokenizedExample

_ARROW = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "bfloat16": pa.uint16(),
    "int8": pa.int8(),
    **{name: pa.type_for_alias(name) for name in WHOLE},
}
SCALE = "scale"  # the column of an int8 field's scales


def join_hash(examples: Sequence[TokenizedExample]) -> str:
    """What ties a field's shard to its examples: xxh3-128 over ids and token hashes, as the format says."""
    hasher = xxhash.xxh3_128()
    for example in examples:
        hasher.update(example.id.encode() + b"\0" + token_hash(example).to_bytes(8, "little"))
    return hasher.hexdigest()


def metadata(field: str, shard: int, *, channels: np.ndarray | None = None) -> dict[bytes, bytes]:
    """The schema metadata by which a shard says what it is; `channels` are the channel scales of an int8 field."""
    facts: dict[str, Any] = {"field": field, "shard": shard, "version": VERSION}
    if channels is not None:
        facts["channels"] = base64.b64encode(channels.astype("<f4").tobytes()).decode()
    return {b"softlabels": json.dumps(facts, sort_keys=True).encode()}


def field_schema(field: str, spec: FieldSpec, shard: int, *, channels: np.ndarray | None = None) -> pa.Schema:
    """The Arrow schema of a field's shard."""
    element = pa.field("item", _ARROW[spec.type], nullable=False)
    column = pa.list_(element, spec.width) if spec.kind == "row" else pa.list_(element)
    columns = [pa.field(field, column, nullable=False)]
    if spec.type == "int8":
        scale = pa.float32() if spec.kind == "row" else _list_type(pa.float32())
        columns.append(pa.field(SCALE, scale, nullable=False))
    return pa.schema(columns, metadata=metadata(field, shard, channels=channels))


def read_channels(schema: pa.Schema, width: int, *, where: Path) -> np.ndarray:
    """(width,) the channel scales in the metadata of an int8 field's shard; CacheError where none fit."""
    try:
        facts = json.loads((schema.metadata or {}).get(b"softlabels", b"{}"))
        channels = np.frombuffer(base64.b64decode(facts["channels"], validate=True), "<f4").copy()
    except (ValueError, TypeError, KeyError, RecursionError):
        channels = np.empty(0, np.float32)
    if len(channels) != width or not bool(np.all((channels > 0) & np.isfinite(channels))):
        raise CacheError(f"{where} has no {width} channel scales in its schema's metadata: it is damaged")
    return channels


def batch_bounds(counts: np.ndarray, *, limit: int = LIST_LIMIT) -> list[int]:
    """Where record batches begin and end, so that none has more than `limit` list values: [0, …, len(counts)]."""
    if int(counts.sum()) <= limit:  # as it nearly always is
        return [0, len(counts)]
    bounds, total = [0], 0
    for row, count in enumerate(counts.tolist()):
        if count > limit:
            raise CacheError(
                f"one row has {count} values, more than an Arrow list holds ({limit}): give a smaller --max-length"
            )
        if total + count > limit:
            bounds.append(row)
            total = 0
        total += count
    return [*bounds, len(counts)]


class _Layout:
    """A file that pyarrow writes an IPC file to; the bytes of `holes` are skipped and their positions kept."""

    def __init__(self, handle: int) -> None:
        self.handle, self.position, self.closed = handle, 0, False
        self.holes: dict[int, int] = {}  # address of a buffer to skip → where it belongs in the file

    def hole(self, size: int) -> pa.Buffer:
        """Memory that is never touched takes no room, nor is any promised; it only stands for `size` bytes."""
        untouched = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
        buffer = pa.py_buffer(untouched)
        self.holes[buffer.address] = 0
        return buffer.slice(0, size)

    def write(self, data: pa.Buffer | bytes) -> int:
        size = len(data)
        if isinstance(data, pa.Buffer) and data.address in self.holes and size:
            self.holes[data.address] = self.position
        else:
            view = memoryview(data)
            while len(view):
                view = view[os.pwrite(self.handle, view, self.position + size - len(view)) :]
        self.position += size
        return size

    def tell(self) -> int:
        return self.position

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class _Column:
    """One column of numbers while it is laid out: how many elements each row has, and where they go in the file."""

    def __init__(self, kind: pa.DataType, element: np.dtype, counts: np.ndarray) -> None:
        self.kind, self.element, self.counts = kind, element, counts
        self.places = np.zeros(len(counts), dtype=np.int64)  # byte position of every row

    def array(self, layout: _Layout, start: int, stop: int) -> pa.Array:
        """The column of one record batch, rows `start` to `stop`, over a hole."""
        ends = np.cumsum(self.counts[start:stop])
        total = int(ends[-1])
        hole = layout.hole(total * self.element.itemsize)
        if not pa.types.is_list(self.kind) and not pa.types.is_fixed_size_list(self.kind):
            return pa.Array.from_buffers(self.kind, total, [None, hole])
        flat = pa.Array.from_buffers(self.kind.value_type, total, [None, hole])
        offsets = pa.py_buffer(np.concatenate([[0], ends]).astype(np.int32))
        buffers = [None, offsets] if pa.types.is_list(self.kind) else [None]
        return pa.Array.from_buffers(self.kind, stop - start, buffers, children=[flat])

    def settle(self, first_byte: int, start: int, stop: int) -> None:
        """Where the hole of rows `start` to `stop` came to lie."""
        counts = self.counts[start:stop]
        self.places[start:stop] = first_byte + (np.cumsum(counts) - counts) * self.element.itemsize


class FieldShard:
    """One shard of one field while it is written. `write` batches in any order, then `commit`; or `discard`."""

    def __init__(
        self,
        folder: Path,
        field: str,
        spec: FieldSpec,
        *,
        shard: int,
        tokens: np.ndarray,
        targets: np.ndarray | None = None,
        overflow: Overflow = "refuse",
        limit: int = LIST_LIMIT,
    ) -> None:
        self.path = shard_file(folder, field, shard)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.receipt_path = receipt_file(folder, field, shard)
        self.field, self.spec, self.shard, self.tokens, self.overflow = field, spec, shard, tokens, overflow
        self.counts = spec.values(tokens, targets)
        self.bounds = batch_bounds(self.counts, limit=limit)
        self.written = np.zeros(len(tokens), dtype=bool)
        self.clipped = 0
        self.channels: np.ndarray | None = None  # (width,) of int8, once they are measured
        self._waiting: list[_Batch] = []  # of int8, until then
        schema = field_schema(field, spec, shard)
        self._columns = [_Column(schema.field(0).type, DTYPES[spec.type], self.counts)]
        if spec.type == "int8":
            scales = np.ones(len(tokens), np.int64) if spec.kind == "row" else tokens.astype(np.int64)
            self._columns.append(_Column(schema.field(1).type, np.dtype("<f4"), scales))
        self.receipt_path.unlink(missing_ok=True)  # of a file that was lost or damaged: it says nothing about this one
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        self.handle = os.open(temporary(self.path), flags, 0o666)
        try:
            self._lay_out()
        except BaseException:
            self.discard()
            raise

    def _lay_out(self) -> None:
        """Write all of the file but the values. Done again with other channel scales, it changes nothing else."""
        # placeholders of the same length, until the real ones are known
        channels = np.ones(self.spec.width, np.float32) if self.channels is None else self.channels
        schema = field_schema(
            self.field, self.spec, self.shard, channels=channels if self.spec.type == "int8" else None
        )
        layout = _Layout(self.handle)
        with pa.ipc.new_file(pa.PythonFile(layout, mode="w"), schema) as writer:
            for start, stop in itertools.pairwise(self.bounds):
                layout.holes = {}
                arrays = [column.array(layout, start, stop) for column in self._columns]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
                for column, place in zip(self._columns, layout.holes.values(), strict=True):
                    column.settle(place, start, stop)
        os.ftruncate(self.handle, layout.position)
        self.size = layout.position

    def write(self, rows: np.ndarray, values: Tensor, *, ids: Sequence[str]) -> None:
        """Write the padded batch `values` (B, …), as a capture gives it, to `rows`; a target field's is flat, (T, W).

        CacheError names those of `ids` (B) that have values which the field's type cannot hold. Where all of them
        fit, as they nearly always do, values are read once for that, converted once, and written from there.
        """
        if self.spec.kind == "target":
            self._write_targets(rows, values, ids=ids)
            return
        self._check_shape(rows, values)
        if not fits(values, self.spec):
            real = without_padding(values, self.spec, self.tokens[rows])
            values, clipped = in_range(real, self.spec, field=self.field, ids=ids, overflow=self.overflow)
            self.clipped += clipped
        batch = _Batch(rows, values)
        if self.spec.type == "int8" and self.channels is None:
            self._waiting.append(batch)
            vectors = self.tokens if self.spec.kind == "token" else np.ones(len(self.tokens), np.int64)
            if sum(int(vectors[waiting.rows].sum()) for waiting in self._waiting) < SAMPLE:
                return
            self._measure()
        else:
            self._write(batch)

    def _write_targets(self, rows: np.ndarray, values: Tensor, *, ids: Sequence[str]) -> None:
        """Vectors a target, row after row."""
        targets = self.counts[rows] // self.spec.width
        if self.spec.type in WHOLE:
            stored = values.cpu().numpy()
            element = np.iinfo(DTYPES[self.spec.type])
            if stored.size and not (element.min <= stored.min() and stored.max() <= element.max):
                raise ValueError(f"'{self.field}' has numbers beyond {self.spec.type}")
            stored = stored.astype(DTYPES[self.spec.type])
        else:
            owners = [name for name, count in zip(ids, targets.tolist(), strict=True) for _ in range(count)]
            values, clipped = in_range(values, self.spec, field=self.field, ids=owners, overflow=self.overflow)
            self.clipped += clipped
            stored = encode(values, self.spec, channels=None).values
        if len(stored) != targets.sum():
            raise ValueError(f"'{self.field}' has {len(stored)} vectors for {targets.sum()} targets")
        for row, part in zip(rows.tolist(), np.split(stored, np.cumsum(targets)[:-1]), strict=True):
            self.put(row, part)

    def write_stored(self, rows: np.ndarray, stored: Tensor) -> None:
        """Write the padded batch `stored` (B, …) of the CPU, known to fit, as `to_stored` gives it."""
        self._check_shape(rows, stored)
        array = stored.contiguous().numpy()
        self._write_rows(self._columns[0], rows, array.view(DTYPES[self.spec.type]))
        self.written[rows] = True

    def _check_shape(self, rows: np.ndarray, values: Tensor) -> None:
        longest = int(self.tokens[rows].max(initial=0))
        size = values.shape[-2] if self.spec.kind != "row" and values.ndim > 2 else longest
        shape = {"row": (), "token": (size,), "pair": (size, size)}[self.spec.kind]
        shape = (*shape, self.spec.width) if self.spec.kind != "pair" else (self.spec.width, *shape)
        if tuple(values.shape) != (len(rows), *shape) or size < longest:
            raise ValueError(
                f"{len(rows)} rows of up to {longest} tokens of '{self.field}', a {self.spec.kind} field of width "
                f"{self.spec.width}, do not lie in values of shape {tuple(values.shape)}"
            )

    def _measure(self) -> None:
        """Fix the channel scales by the vectors that came first, and write what waited for them."""
        waiting, self._waiting = self._waiting, []
        sample = [
            vectors[: self.tokens[row]] if self.spec.kind == "token" else vectors[None]
            for batch in waiting
            for row, vectors in zip(batch.rows.tolist(), batch.values.float().cpu().numpy(), strict=True)
        ]
        self.channels = measure_channels(sample, self.spec.width)
        for batch in waiting:
            self._write(batch)

    def _write(self, batch: _Batch) -> None:
        encoded = encode(batch.values, self.spec, channels=self.channels)
        arrays = [encoded.values] if encoded.scales is None else [encoded.values, encoded.scales]
        for column, array in zip(self._columns, arrays, strict=True):
            self._write_rows(column, batch.rows, array)
        self.written[batch.rows] = True

    def _write_rows(self, column: _Column, rows: np.ndarray, array: np.ndarray) -> None:
        """Write the padded `array` (B, …), of stored elements: what is real of a row straight from where it lies."""
        whole = _bytes_of(array)
        stride = array.nbytes // max(len(array), 1)
        sizes, places = column.counts[rows] * column.element.itemsize, column.places[rows]
        for i, (row, size, place) in enumerate(zip(rows.tolist(), sizes.tolist(), places.tolist(), strict=True)):
            view = whole[i * stride : i * stride + size]
            if self.spec.kind == "pair" and size < stride:  # padding lies between its values too
                length = int(self.tokens[row])
                view = _bytes_of(np.ascontiguousarray(array[i, :, :length, :length]))
            self._write_at(view, place)

    def _write_at(self, view: memoryview, place: int) -> None:
        while len(view):
            count = os.pwrite(self.handle, view, place)
            view, place = view[count:], place + count

    def put(self, row: int, values: np.ndarray, *, scales: np.ndarray | None = None) -> None:
        """Write row `row`, in the field's stored type and as many values as its length asks for."""
        for column, given in zip(self._columns, [values] if scales is None else [values, scales], strict=True):
            # a float is never cast to the integers that stand for one
            data = np.ascontiguousarray(np.asarray(given).astype(column.element, casting="same_kind", copy=False))
            if data.size != column.counts[row]:
                raise ValueError(f"row {row} needs {column.counts[row]} values, got {data.size}")
            self._write_at(data.data.cast("B"), int(column.places[row]))
        self.written[row] = True

    def put_run(self, first: int, values: np.ndarray, *, scales: np.ndarray | None = None, rows: int) -> None:
        """Write `rows` rows from row `first` on: all their values one after the other, in the field's stored type."""
        for column, given in zip(self._columns, [values] if scales is None else [values, scales], strict=True):
            data = np.ascontiguousarray(np.asarray(given).astype(column.element, casting="same_kind", copy=False))
            if data.size != column.counts[first : first + rows].sum():
                raise ValueError(f"rows {first} to {first + rows} of '{self.field}' need other than {data.size} values")
            view, done = _bytes_of(data), 0
            for start, stop in itertools.pairwise(self.bounds):  # rows of one record batch lie side by side
                start, stop = max(start, first), min(stop, first + rows)
                if start < stop:
                    size = int(column.counts[start:stop].sum()) * column.element.itemsize
                    self._write_at(view[done : done + size], int(column.places[start]))
                    done += size
        self.written[first : first + rows] = True

    def commit(self, join: str) -> Receipt:
        """Sync, give the file its name, then write the receipt: its existence says that the shard is whole."""
        if self._waiting:
            self._measure()
        if not self.written.all():
            raise ValueError(f"{int((~self.written).sum())} rows of {self.path} were never written")
        if self.channels is not None:
            self._lay_out()
        os.fsync(self.handle)
        receipt = Receipt(
            rows=len(self.tokens),
            tokens=int(self.tokens.sum()),
            bytes=self.size,
            xxh3_128=hash_file(temporary(self.path)),
            join=join,
            clipped=self.clipped,
        )
        publish(self.path)
        self._close()
        write_file(self.receipt_path, to_json(receipt))
        return receipt

    def discard(self) -> None:
        """Forget the shard; nothing of it stays."""
        self._waiting = []
        if self.handle >= 0:
            temporary(self.path).unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        handle, self.handle = self.handle, -1  # first, so that a Ctrl-C in between can't have it closed twice
        os.close(handle)


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.data.cast("B") if array.size else memoryview(b"")


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some rows of a shard, their values in range; what is in their padding is never stored."""

    rows: np.ndarray
    values: Tensor


def labels_type(card: TeacherCard) -> pa.DataType | None:
    """What `labels` of `examples` is for such a teacher; None where there is none."""
    if card.task in TOKEN_LABELS:
        return _list_type(pa.int32())
    if card.task in VECTOR_LABELS:
        return pa.list_(pa.field("item", pa.float32(), nullable=False), len(card.label_names))
    return None


def examples_schema(
    shard: int,
    *,
    vocab_size: int,
    token_types: bool,
    text: bool,
    labels: pa.DataType | None = None,
    targets: bool = False,
) -> pa.Schema:
    """The Arrow schema of an `examples` shard; `labels` as `labels_type` gives it, `targets`: rows have one."""
    columns = {"id": pa.string(), "token_hash": pa.uint64()}
    columns["input_ids"] = _list_type(pa.from_numpy_dtype(id_type(vocab_size)))
    if token_types:
        columns["token_type_ids"] = _list_type(pa.uint8())
    columns["label"] = pa.int32()
    if labels is not None:
        columns["labels"] = labels
    if targets:
        columns["decoder_start"] = pa.int32()
    if text:
        columns |= {"text": pa.string(), "text_b": pa.string()} | ({"target": pa.string()} if targets else {})
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
    return pa.schema(fields, metadata=metadata(EXAMPLES, shard))


def _list_type(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", element, nullable=False))


def encode_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Buffer:
    """The bytes of a shard's file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def encode_rows(field: str, spec: FieldSpec, shard: int, values: np.ndarray) -> pa.Buffer:
    """The bytes of a shard of a `row` field from its (rows, width) `values`, in the field's type, which is not int8.

    To the last byte what `FieldShard` writes, in memory: for shards of few values.
    """
    if spec.kind != "row" or spec.type == "int8":
        raise ValueError(f"'{field}' is a {spec.kind} field of {spec.type}: `FieldShard` writes it")
    if values.dtype != DTYPES[spec.type] or values.shape[1:] != (spec.width,):
        raise ValueError(f"'{field}' is {spec.width} of {spec.type} a row, not {values.shape[1:]} of {values.dtype}")
    schema = field_schema(field, spec, shard)
    column = schema.field(0).type
    flat = pa.Array.from_buffers(column.value_type, values.size, [None, pa.py_buffer(np.ascontiguousarray(values))])
    rows = pa.Array.from_buffers(column, len(values), [None], children=[flat])
    return encode_batches([pa.record_batch([rows], schema=schema)], schema)


def examples_batch(examples: Sequence[TokenizedExample], schema: pa.Schema) -> pa.RecordBatch:
    """The `examples` columns of one shard, those that `schema` asks for."""
    columns = []
    for field in schema:
        if field.name == "input_ids":
            columns.append(_list_column([example.input_ids for example in examples], field.type))
        elif field.name == "token_type_ids":
            columns.append(_list_column([_types_of(example) for example in examples], field.type))
        elif field.name == "labels":
            columns.append(_labels_column(examples, field.type))
        else:
            columns.append(pa.array([_VALUES[field.name](example) for example in examples], field.type))
    return pa.record_batch(columns, schema=schema)


_VALUES: dict[str, Callable[[TokenizedExample], Any]] = {
    "id": lambda example: example.id,
    "token_hash": token_hash,
    "label": lambda example: example.label,
    "text": lambda example: example.text,
    "text_b": lambda example: example.text_b or "",
    "target": lambda example: example.target,
    "decoder_start": lambda example: example.decoder_start,
}


def _types_of(example: TokenizedExample) -> np.ndarray:
    types = example.token_type_ids
    return np.zeros(len(example.input_ids), np.uint8) if types is None else types


def _labels_column(examples: Sequence[TokenizedExample], kind: pa.DataType) -> pa.Array:
    rows = [example.labels for example in examples if example.labels is not None]
    if len(rows) != len(examples):
        raise ValueError("every row of this task needs `labels`")
    if pa.types.is_list(kind):
        return _list_column(rows, kind)
    flat = pa.array(np.concatenate(rows).astype(np.float32), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def _list_column(rows: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = pa.array(np.concatenate(rows).astype(kind.value_type.to_pandas_dtype()), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def write_examples(
    folder: Path,
    examples: Sequence[TokenizedExample],
    *,
    shard: int,
    vocab_size: int,
    token_types: bool,
    text: bool,
    labels: pa.DataType | None = None,
    targets: bool = False,
    truncated: int = 0,
) -> Receipt:
    """Write and commit one shard of `examples`; `truncated` of them were cut."""
    schema = examples_schema(
        shard, vocab_size=vocab_size, token_types=token_types, text=text, labels=labels, targets=targets
    )
    data = encode_batches([examples_batch(examples, schema)], schema)
    tokens = sum(len(example.input_ids) for example in examples)
    with ShardGroup(folder) as group:
        return group.put(
            EXAMPLES, shard, data, rows=len(examples), tokens=tokens, join=join_hash(examples), truncated=truncated
        )
