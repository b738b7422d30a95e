"""A cache as a `datasets.Dataset`: the mapped files go in as they are, and out as columns side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from torch import Tensor

from softlabels.cache.arrow import read_numbers
from softlabels.cache.codec import decode
from softlabels.cache.format import EXAMPLES, FieldSpec, shard_file
from softlabels.cache.writer import SCALE, read_channels
from softlabels.config import fingerprint

if TYPE_CHECKING:
    import datasets

    from softlabels.cache.reader import Cache


def to_datasets(cache: Cache, fields: Sequence[str] | None = None) -> datasets.Dataset:
    """The columns of `examples` and of `fields` (all by default) as a Dataset, a row for each row of the cache.

    float32 and float16 fields, ids, labels and texts are not copied: the Dataset's columns are the mapped files, which
    take address space and no memory. bfloat16 and int8 fields are decoded to float32, which takes memory for all their
    values. Token fields are flat lists of L·width values, as in the files. What copies a Dataset (`map` with several
    processes, `save_to_disk`) copies this one as well.
    """
    import datasets

    names = sorted(cache.fields if fields is None else fields)
    cache.require(names, why="to_datasets")
    tables = []
    for shard in range(len(cache.manifest.shard_rows)):
        examples = cache.table(EXAMPLES, shard)
        columns = {name: _plain(examples.column(name)) for name in examples.schema.names}
        columns |= {name: _decoded(cache, name, shard) for name in names}
        tables.append(pa.table(columns))
    # a fingerprint of our own: theirs would read every value of every file
    return datasets.Dataset(pa.concat_tables(tables), fingerprint=fingerprint([cache.identity(), names]))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same memory under a type that allows nulls: `datasets` knows no other, and would copy to get there."""
    kind = column.type
    if pa.types.is_list(kind):
        plain = pa.list_(kind.value_type)
        return pa.chunked_array([pa.ListArray.from_arrays(p.offsets, p.values, type=plain) for p in column.chunks])
    if pa.types.is_fixed_size_list(kind):
        plain = pa.list_(kind.value_type, kind.list_size)
        return pa.chunked_array([pa.FixedSizeListArray.from_arrays(p.values, type=plain) for p in column.chunks])
    return column


def _decoded(cache: Cache, field: str, shard: int) -> pa.ChunkedArray:
    """A field's column of one shard as numbers that mean what they say."""
    table, spec = cache.table(field, shard), cache.fields[field]
    column = table.column(field)
    if spec.type == "bfloat16":
        return pa.chunked_array([_like(part, decode(_vectors(part, spec), spec)) for part in column.chunks])
    if spec.type == "int8":
        channels = read_channels(table.schema, spec.width, where=shard_file(cache.path, field, shard))[None]
        parts = []
        for part, scale in zip(column.chunks, table.column(SCALE).chunks, strict=True):
            scales = read_numbers(scale if spec.kind == "row" else scale.values).copy()
            parts.append(_like(part, decode(_vectors(part, spec), spec, scales=scales, channels=channels)))
        return pa.chunked_array(parts)
    return _plain(column)


def _vectors(part: pa.Array, spec: FieldSpec) -> np.ndarray:
    """(vectors, width): the stored elements of a list column."""
    return read_numbers(part.values).reshape(-1, spec.width).copy()


def _like(part: pa.Array, values: Tensor) -> pa.Array:
    """`values` as a column with the rows of `part`."""
    flat = pa.array(values.numpy().reshape(-1))
    if pa.types.is_fixed_size_list(part.type):
        return pa.FixedSizeListArray.from_arrays(flat, part.type.list_size)
    return pa.ListArray.from_arrays(part.offsets, flat)
