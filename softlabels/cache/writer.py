"""Shards in any row order: values come in as the teacher gives them, whole Arrow files with receipts go out.

The teacher works through a shard sorted by length, the file keeps the corpus's order. Since the lengths are known
before the forward pass, the place of every value in the file is too: the Arrow file is laid out with a hole where the
values go, and each batch is written straight into its place. Memory holds a batch, whatever the shard's size.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from softlabels.cache.codec import DTYPES
from softlabels.cache.files import hash_file, publish, temporary, write_file
from softlabels.cache.format import EXAMPLES, LIST_LIMIT, VERSION, FieldSpec, Receipt, receipt_file, shard_file, to_json
from softlabels.errors import CacheError
from softlabels.tokens import token_hash
from softlabels.types import TokenizedExample

_ARROW = {"float32": pa.float32(), "float16": pa.float16()}


def join_hash(examples: Sequence[TokenizedExample]) -> str:
    """What ties a field's shard to its examples: xxh3-128 over ids and token hashes, as the format says."""
    hasher = xxhash.xxh3_128()
    for example in examples:
        hasher.update(example.id.encode() + b"\0" + token_hash(example).to_bytes(8, "little"))
    return hasher.hexdigest()


def metadata(field: str, shard: int) -> dict[bytes, bytes]:
    """The schema metadata by which a shard says what it is."""
    return {b"softlabels": json.dumps({"field": field, "shard": shard, "version": VERSION}, sort_keys=True).encode()}


def field_schema(field: str, spec: FieldSpec, shard: int) -> pa.Schema:
    """The Arrow schema of a field's shard."""
    element = pa.field("item", _ARROW[spec.type], nullable=False)
    column = pa.list_(element, spec.width) if spec.kind == "row" else pa.list_(element)
    return pa.schema([pa.field(field, column, nullable=False)], metadata=metadata(field, shard))


def batch_bounds(counts: np.ndarray, *, limit: int = LIST_LIMIT) -> list[int]:
    """Where record batches begin and end, so that none has more than `limit` list values: [0, …, len(counts)]."""
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
    """A file that pyarrow writes an IPC file to; the bytes of `hole` are skipped and their position kept."""

    def __init__(self, handle: int) -> None:
        self.handle, self.position, self.closed = handle, 0, False
        self.hole, self.hole_at = 0, -1  # address of the buffer to skip, where it belongs in the file

    def write(self, data: pa.Buffer | bytes) -> int:
        size = len(data)
        if isinstance(data, pa.Buffer) and data.address == self.hole and size:
            self.hole_at = self.position
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


class FieldShard:
    """One shard of one field while it is written. `put` rows in any order, then `commit`; or `discard`."""

    def __init__(
        self, folder: Path, field: str, spec: FieldSpec, *, shard: int, tokens: np.ndarray, limit: int = LIST_LIMIT
    ) -> None:
        self.path = shard_file(folder, field, shard)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.receipt_path = receipt_file(folder, field, shard)
        self.spec, self.tokens = spec, tokens
        self.counts = np.array([spec.values(int(length)) for length in tokens], dtype=np.int64)
        self.written = np.zeros(len(tokens), dtype=bool)
        self.handle = os.open(temporary(self.path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self.places = self._lay_out(field_schema(field, spec, shard), limit)  # byte position of every row's values
        except BaseException:
            self.discard()
            raise

    def _lay_out(self, schema: pa.Schema, limit: int) -> np.ndarray:
        size = DTYPES[self.spec.type].itemsize
        places = np.zeros(len(self.counts), dtype=np.int64)
        layout = _Layout(self.handle)
        bounds = batch_bounds(self.counts, limit=limit)
        with pa.ipc.new_file(pa.PythonFile(layout, mode="w"), schema) as writer:
            for start, stop in itertools.pairwise(bounds):
                ends = np.cumsum(self.counts[start:stop])
                total = int(ends[-1])
                # memory that is never touched takes no room; it only stands for the values in the layout
                values = pa.py_buffer(mmap.mmap(-1, max(total * size, 1)))
                layout.hole = values.address
                writer.write_batch(pa.record_batch([self._column(schema, values, ends, total)], schema=schema))
                places[start:stop] = layout.hole_at + (ends - self.counts[start:stop]) * size
        os.ftruncate(self.handle, layout.position)
        self.size = layout.position
        return places

    def _column(self, schema: pa.Schema, values: pa.Buffer, ends: np.ndarray, total: int) -> pa.Array:
        flat = pa.Array.from_buffers(
            _ARROW[self.spec.type], total, [None, values.slice(0, total * DTYPES[self.spec.type].itemsize)]
        )
        column = schema.field(0).type
        if self.spec.kind == "row":
            return pa.Array.from_buffers(column, len(ends), [None], children=[flat])
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        return pa.Array.from_buffers(column, len(ends), [None, pa.py_buffer(offsets)], children=[flat])

    def put(self, row: int, values: np.ndarray) -> None:
        """Write row `row`, in the field's type and as many values as its length asks for."""
        data = np.ascontiguousarray(values, dtype=DTYPES[self.spec.type])
        if data.size != self.counts[row]:
            raise ValueError(f"row {row} needs {self.counts[row]} values, got {data.size}")
        view, place = memoryview(data.data).cast("B"), int(self.places[row])
        while len(view):
            count = os.pwrite(self.handle, view, place)
            view, place = view[count:], place + count
        self.written[row] = True

    def commit(self, join: str) -> Receipt:
        """Sync, give the file its name, then write the receipt: its existence says that the shard is whole."""
        if not self.written.all():
            raise ValueError(f"{int((~self.written).sum())} rows of {self.path} were never written")
        os.fsync(self.handle)
        receipt = Receipt(
            rows=len(self.tokens),
            tokens=int(self.tokens.sum()),
            bytes=self.size,
            xxh3_128=hash_file(temporary(self.path)),
            join=join,
        )
        os.close(self.handle)
        self.handle = -1
        publish(self.path)
        write_file(self.receipt_path, to_json(receipt))
        return receipt

    def discard(self) -> None:
        """Forget the shard; nothing of it stays."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1
            temporary(self.path).unlink(missing_ok=True)


def examples_schema(shard: int, *, vocab_size: int, token_types: bool, text: bool) -> pa.Schema:
    """The Arrow schema of an `examples` shard."""
    columns = {"id": pa.string(), "token_hash": pa.uint64()}
    columns["input_ids"] = _list_type(pa.uint16() if vocab_size <= 65_536 else pa.int32())
    if token_types:
        columns["token_type_ids"] = _list_type(pa.uint8())
    columns["label"] = pa.int32()
    if text:
        columns |= {"text": pa.string(), "text_b": pa.string()}
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
    return pa.schema(fields, metadata=metadata(EXAMPLES, shard))


def _list_type(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", element, nullable=False))


def examples_batch(examples: Sequence[TokenizedExample], schema: pa.Schema) -> pa.RecordBatch:
    """The `examples` columns of one shard, those that `schema` asks for."""
    columns = []
    for field in schema:
        if field.name == "input_ids":
            columns.append(_list_column([example.input_ids for example in examples], field.type))
        elif field.name == "token_type_ids":
            columns.append(_list_column([_types_of(example) for example in examples], field.type))
        else:
            columns.append(pa.array([_VALUES[field.name](example) for example in examples], field.type))
    return pa.record_batch(columns, schema=schema)


_VALUES: dict[str, Callable[[TokenizedExample], Any]] = {
    "id": lambda example: example.id,
    "token_hash": token_hash,
    "label": lambda example: example.label,
    "text": lambda example: example.text,
    "text_b": lambda example: example.text_b or "",
}


def _types_of(example: TokenizedExample) -> np.ndarray:
    types = example.token_type_ids
    return np.zeros(len(example.input_ids), np.uint8) if types is None else types


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
    truncated: int = 0,
) -> Receipt:
    """Write and commit one shard of `examples`; `truncated` of them were cut."""
    schema = examples_schema(shard, vocab_size=vocab_size, token_types=token_types, text=text)
    batch = examples_batch(examples, schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue()
    write_file(shard_file(folder, EXAMPLES, shard), data)
    receipt = Receipt(
        rows=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        bytes=len(data),
        xxh3_128=xxhash.xxh3_128(data).hexdigest(),
        join=join_hash(examples),
        truncated=truncated,
    )
    write_file(receipt_file(folder, EXAMPLES, shard), to_json(receipt))
    return receipt
