"""Someone else's Arrow file, checked before anything in it is followed. Mapped bytes come in, a table goes out.

pyarrow believes much of what a file says: it unpacks what calls itself compressed to any size, builds as many columns
as are named, and hands out list offsets that point anywhere. So the file's own table of contents (a flatbuffer) is read
here first, every position checked against the bytes that are there: only what the cache format allows goes on to
pyarrow, and what comes back is bounds-checked once more. After that no offset can lead out of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabels.errors import CacheError

_MAGIC = b"ARROW1"
_RECORD_BATCH = 3  # of the union MessageHeader
_MOST_COLUMNS, _MOST_KEYS = 16, 16  # of a schema, and of its metadata; the format needs seven and one
_U8, _I16, _U16, _I32, _U32, _I64 = (struct.Struct(f"<{form}") for form in "BhHiIq")
_BLOCK = struct.Struct("<qi4xq")  # of the footer: where a message is, bytes of its metadata, bytes of its body


class _Damaged(Exception):
    """What is wrong with a file, without its name."""


def read_table(data: pa.Buffer, wanted: Callable[[pa.Schema], pa.Schema], *, where: Path) -> pa.Table:
    """The table in the Arrow IPC file `data`, over its memory, nothing copied.

    `wanted` gives the schema that the file must have, metadata included, from the one that it has. CacheError says
    what is wrong, and nothing has been followed, unpacked or allocated by then that isn't bounded by the file's size.
    """
    try:
        _check_layout(memoryview(data))
        file = pa.ipc.open_file(data)
        if not file.schema.equals(wanted(file.schema), check_metadata=True):
            raise _Damaged("it does not have the columns that the manifest says: it is of another place or damaged")
        table = file.read_all()
        for column in table.columns:
            for chunk in column.chunks:
                _check_chunk(chunk, data)
        table.validate(full=True)  # what is left: that texts are UTF-8
    except (_Damaged, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CacheError(f"{where} is damaged: {_first_line(error)}") from None
    return table


def read_numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(N,) the numbers of a column, over its memory and not to be written; a copy where it has several chunks.

    Of a column of lists those of all lists, one after the other. ValueError where it has nulls. It is what pyarrow's
    own `to_numpy` gives, but for half a second: that imports pandas, whatever it is asked for.
    """
    chunks, kind = column.chunks if isinstance(column, pa.ChunkedArray) else [column], column.type
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        chunks, kind = [chunk.flatten() for chunk in chunks], kind.value_type
    kind = np.dtype(kind.to_pandas_dtype())
    parts = [_view_numbers(chunk, kind) for chunk in chunks]
    found = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, kind), *parts])
    found.flags.writeable = False
    return found


def _view_numbers(chunk: pa.Array, kind: np.dtype) -> np.ndarray:
    if chunk.null_count:
        raise ValueError("a column with nulls is not all numbers")
    memory = chunk.buffers()[1]
    if memory is None or not len(chunk):
        return np.empty(0, kind)
    return np.frombuffer(memory, kind, count=chunk.offset + len(chunk))[chunk.offset :]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ------------------------------------------------------------------------------------- the file's table of contents


class _Flat:
    """A flatbuffer: tables of optional fields, found by offsets, each of which is checked before it is followed."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.size = data, len(data)

    def number(self, form: struct.Struct, at: int) -> int:
        if at < 0 or at + form.size > self.size:
            raise _Damaged("an offset in its table of contents leads out of it")
        return form.unpack_from(self.data, at)[0]

    def root(self) -> int:
        return self.number(_U32, 0)

    def field(self, table: int, index: int) -> int:
        """Where field `index` of the table at `table` lies; 0 where it has none."""
        vtable = table - self.number(_I32, table)
        if 4 + 2 * index >= self.number(_U16, vtable):
            return 0
        offset = self.number(_U16, vtable + 4 + 2 * index)
        return table + offset if offset else 0

    def follow(self, at: int) -> int:
        """The table or vector that the offset at `at` leads to."""
        return at + self.number(_U32, at)

    def vector(self, table: int, index: int, size: int) -> tuple[int, int]:
        """(first element, how many) of a vector of `size`-byte elements; (0, 0) where there is none."""
        at = self.field(table, index)
        if not at:
            return 0, 0
        start = self.follow(at)
        count = self.number(_U32, start)
        if start + 4 + count * size > self.size:
            raise _Damaged("a list in its table of contents is longer than the file")
        return start + 4, count


def _check_layout(data: memoryview) -> None:
    """The footer names record batches that lie one after the other inside the file, none of them compressed."""
    size = len(data)
    if size < 24 or bytes(data[:6]) != _MAGIC or bytes(data[-6:]) != _MAGIC:
        raise _Damaged("it is no Arrow file, or was cut")
    length = struct.unpack_from("<i", data, size - 10)[0]
    end = size - 10 - length
    if length <= 0 or end < 8:
        raise _Damaged("its footer is longer than the file")
    footer = _Flat(data[end : size - 10])
    root = footer.root()
    schema = footer.field(root, 1)
    if not schema:
        raise _Damaged("it has no schema")
    _check_schema(footer, footer.follow(schema))
    if footer.vector(root, 2, _BLOCK.size)[1]:
        raise _Damaged("it has dictionaries, which no cache has")
    if footer.vector(root, 4, 4)[1] > _MOST_KEYS:
        raise _Damaged("it has more metadata than any cache")
    first, count = footer.vector(root, 3, _BLOCK.size)
    before = 8
    for block in range(count):
        at, head, body = _BLOCK.unpack_from(footer.data, first + block * _BLOCK.size)
        if at < before or at % 8 or head < 16 or body < 0 or at + head + body > end:
            raise _Damaged("a record batch lies outside of the file, or in another one")
        _check_message(data[at : at + head], body)
        before = at + head + body


def _check_schema(flat: _Flat, schema: int) -> None:
    """Few columns, at most lists deep, so that what pyarrow builds from them is small; no dictionary, no extension."""
    endianness = flat.field(schema, 0)
    if endianness and flat.number(_I16, endianness):
        raise _Damaged("its numbers are big-endian")
    if flat.vector(schema, 2, 4)[1] > _MOST_KEYS:
        raise _Damaged("it has more metadata than any cache")
    first, count = flat.vector(schema, 1, 4)
    if count > _MOST_COLUMNS:
        raise _Damaged(f"it has {count} columns")
    for column in range(count):
        field = flat.follow(first + 4 * column)
        _check_field(flat, field)
        item, children = flat.vector(field, 5, 4)
        if children > 1:
            raise _Damaged("it has nested columns")
        if children:
            child = flat.follow(item)
            _check_field(flat, child)
            if flat.vector(child, 5, 4)[1]:
                raise _Damaged("it has nested columns")


def _check_field(flat: _Flat, field: int) -> None:
    if flat.field(field, 4):
        raise _Damaged("it has dictionaries, which no cache has")
    if flat.vector(field, 6, 4)[1]:  # an extension type says so here, and may bring code that builds it
        raise _Damaged("it has column metadata, which no cache has")


def _check_message(data: memoryview, body: int) -> None:
    """A record batch whose buffers lie inside its body of `body` bytes, not compressed, without nulls."""
    mark, length = struct.unpack_from("<Ii", data, 0)
    if mark != 0xFFFFFFFF or length + 8 != len(data):
        raise _Damaged("a record batch has no valid head")
    flat = _Flat(data[8:])
    message = flat.root()
    kind, header, size = flat.field(message, 1), flat.field(message, 2), flat.field(message, 3)
    if not (kind and header) or flat.number(_U8, kind) != _RECORD_BATCH:
        raise _Damaged("a record batch is something else")
    if (flat.number(_I64, size) if size else 0) != body or flat.vector(message, 4, 4)[1] > _MOST_KEYS:
        raise _Damaged("a record batch has another size than the footer says")
    batch = flat.follow(header)
    rows = flat.field(batch, 0)
    if not rows or flat.number(_I64, rows) < 1:
        raise _Damaged("a record batch has no rows")
    if flat.field(batch, 3):
        raise _Damaged("it is compressed, which no cache is")
    nodes = _pairs(flat, batch, 1)  # (length, nulls) of every column and list element
    if len(nodes) > 2 * _MOST_COLUMNS or (nodes < 0).any() or nodes[:, 1].any():
        raise _Damaged("a record batch has nulls or negative lengths")
    buffers = _pairs(flat, batch, 2)  # (position in the body, bytes)
    inside = (buffers >= 0).all(axis=1) & (buffers[:, 0] % 8 == 0)
    inside &= (buffers[:, 0] <= body) & (buffers[:, 1] <= body - np.minimum(buffers[:, 0], body))
    if len(buffers) > 4 * _MOST_COLUMNS or not inside.all():
        raise _Damaged("a buffer lies outside of its record batch")


def _pairs(flat: _Flat, table: int, index: int) -> np.ndarray:
    """(N, 2) int64: a vector of structs of two numbers."""
    first, count = flat.vector(table, index, 16)
    return np.frombuffer(flat.data[first : first + 16 * count], "<i8").reshape(count, 2)


# ---------------------------------------------------------------------------------------------- what pyarrow made of it


def _check_chunk(chunk: pa.Array, data: pa.Buffer) -> None:
    """Every value of `chunk` lies in the memory of `data`, offsets only rise, and none is beyond the values."""
    if chunk.null_count or chunk.offset:
        raise _Damaged("it has nulls")
    for buffer in chunk.buffers():
        inside = buffer is None or data.address <= buffer.address <= data.address + data.size - buffer.size
        if not inside and buffer.size:
            raise _Damaged("a column lies outside of the file")
    kind = chunk.type
    if pa.types.is_list(kind):
        _check_offsets(chunk, len(chunk.values))
        _check_numbers(chunk.values)
    elif pa.types.is_string(kind):
        texts = chunk.buffers()[2]
        _check_offsets(chunk, 0 if texts is None else texts.size)
    elif pa.types.is_fixed_size_list(kind):
        if len(chunk.values) != len(chunk) * kind.list_size:
            raise _Damaged("a column is shorter or longer than its rows")
        _check_numbers(chunk.values)
    else:
        _check_numbers(chunk)


def _check_numbers(chunk: pa.Array) -> None:
    values = chunk.buffers()[1]
    if (
        chunk.null_count
        or chunk.offset
        or len(chunk) * chunk.type.bit_width > 8 * (0 if values is None else values.size)
    ):
        raise _Damaged("a column is shorter than its rows")


def _check_offsets(chunk: pa.Array, end: int) -> None:
    buffer = chunk.buffers()[1]
    if buffer is None or buffer.size < 4 * (len(chunk) + 1) or buffer.size % 4:
        raise _Damaged("a column has fewer offsets than rows, or half an offset")
    offsets = np.frombuffer(buffer, "<i4", count=len(chunk) + 1)
    if offsets[0] < 0 or offsets[-1] > end or (offsets[1:] < offsets[:-1]).any():
        raise _Damaged("a list's offsets lead out of its values")
