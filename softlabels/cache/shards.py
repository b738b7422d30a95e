"""One shard of one field: its file found, mapped and checked against what the manifest says. Nothing is trusted.

What comes in is a place in a cache, what goes out is a table over the file's bytes whose offsets all lie inside it. The
reader and `verify` both open shards here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabels.cache.arrow import read_numbers, read_table
from softlabels.cache.files import map_file
from softlabels.cache.format import EXAMPLES, MANIFEST, FieldSpec, Manifest, shard_file, shard_name
from softlabels.cache.inside import open_inside
from softlabels.cache.writer import SCALE, examples_schema, field_schema, labels_type, read_channels
from softlabels.errors import CacheError
from softlabels.types import LANGUAGE_MODELS, NO_LABEL, SEQ2SEQ, TOKEN_LABELS, UNMASKED, VECTOR_LABELS

SMALL = 1 << 24  # bytes of a shard that who goes through it once reads, and does not map


def open_shard(folder: Path, manifest: Manifest, field: str, shard: int) -> pa.Table:
    """The mapped, checked table of a shard of a finished cache; CacheError says which file, and what is wrong."""
    return read_shard(map_shard(folder, manifest, field, shard), folder, manifest, field, shard)


def map_shard(folder: Path, manifest: Manifest, field: str, shard: int) -> pa.Buffer:
    """The bytes of a shard of a finished cache, mapped; as many as the manifest says, and else unchecked."""
    with _open_sized(folder, manifest, field, shard) as (handle, size):
        return map_file(handle, size)


def load_shard(folder: Path, manifest: Manifest, field: str, shard: int) -> pa.Buffer:
    """The same for who goes through a shard once: of few bytes, which are read in a third of the time of mapping."""
    with _open_sized(folder, manifest, field, shard) as (handle, size):
        if size > SMALL:
            return map_file(handle, size)
        data, done = np.empty(size, np.uint8), 0
        while count := os.readv(handle, [data.data[done:]]):
            done += count
        _compare_size(folder, field, shard, done, size)  # it may have shrunk in between
        return pa.py_buffer(data)


def expect_shard(folder: Path, manifest: Manifest, field: str, shard: int) -> None:
    """Have the system read a shard ahead that `load_shard` is to read; what is wrong with it is told there."""
    if manifest.shards[field].size(shard) > SMALL:
        return
    with suppress(OSError, CacheError):
        handle = open_inside(folder, field, shard_name(shard))
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


@contextmanager
def _open_sized(folder: Path, manifest: Manifest, field: str, shard: int) -> Iterator[tuple[int, int]]:
    """A shard's open file and its bytes; CacheError where it is missing, or not as long as the manifest says."""
    name, wanted = shard_name(shard), manifest.shards[field].size(shard)
    try:
        handle = open_inside(folder, field, name)
    except FileNotFoundError:
        raise CacheError(
            f"cache {folder} lacks {name} of field '{field}': copy it from where the cache came from"
        ) from None
    try:
        _compare_size(folder, field, shard, os.fstat(handle).st_size, wanted)
        yield handle, wanted
    finally:
        os.close(handle)


def read_shard(data: pa.Buffer, folder: Path, manifest: Manifest, field: str, shard: int) -> pa.Table:
    """The checked table in the bytes of a shard."""
    path = shard_file(folder, field, shard)
    table = read_table(data, lambda found: wanted_schema(manifest, field, shard, found, where=path), where=path)
    if table.num_rows != manifest.shard_rows[shard]:
        raise CacheError(f"{path} has {table.num_rows} rows, not the {manifest.shard_rows[shard]} that {MANIFEST} says")
    if field == EXAMPLES:
        _check_examples(table, manifest, path)
    return table


def check_size(folder: Path, manifest: Manifest, field: str, shard: int) -> None:
    """CacheError where the file has shrunk or grown since: touching mapped memory that is gone kills the process."""
    path = shard_file(folder, field, shard)
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return  # removed or replaced: what is mapped stays
    _compare_size(folder, field, shard, size, manifest.shards[field].size(shard))


def _compare_size(folder: Path, field: str, shard: int, size: int, wanted: int) -> None:
    if size != wanted or not size:
        raise CacheError(
            f"{shard_file(folder, field, shard)} has {size} bytes, not the {wanted} that {MANIFEST} says: it is "
            f"damaged. `softlabels verify` lists all that is"
        )


def wanted_schema(manifest: Manifest, field: str, shard: int, found: pa.Schema, *, where: Path) -> pa.Schema:
    """The schema that the shard's file must have; the channel scales of an int8 field are the file's own."""
    card = manifest.teacher
    if field == EXAMPLES:
        return examples_schema(
            shard,
            vocab_size=card.vocab_size,
            token_types=card.token_types,
            text=manifest.dump.text,
            labels=labels_type(card),
            targets=card.task == SEQ2SEQ,
        )
    spec = manifest.fields[field]
    channels = read_channels(found, spec.width, where=where) if spec.type == "int8" else None
    return field_schema(field, spec, shard, channels=channels)


def _check_examples(table: pa.Table, manifest: Manifest, path: Path) -> None:
    """Token ids and labels stay in their tables: a student indexes its embedding with them."""
    card = manifest.teacher
    labels = read_numbers(table.column("label"))
    real = labels[labels != NO_LABEL]
    for chunk in table.column("input_ids").chunks:
        ids = read_numbers(chunk.values)
        if len(ids) and (ids.min() < 0 or ids.max() >= card.vocab_size):
            raise CacheError(f"{path} has token ids beyond the vocabulary of {card.vocab_size}: it is damaged")
    if len(real) and (real.min() < 0 or real.max() >= len(card.label_names)):
        raise CacheError(f"{path} has labels beyond the {len(card.label_names)} classes: it is damaged")
    if card.token_types and not np.array_equal(list_lengths(table, "input_ids"), list_lengths(table, "token_type_ids")):
        raise CacheError(f"{path} has rows with more or fewer token types than tokens: it is damaged")
    if card.task in TOKEN_LABELS:
        _check_token_labels(table, manifest, path)
    elif card.task in VECTOR_LABELS:
        for chunk in table.column("labels").chunks:
            if np.isinf(read_numbers(chunk.values)).any():
                raise CacheError(f"{path} has infinite labels: it is damaged")


def _check_token_labels(table: pa.Table, manifest: Manifest, path: Path) -> None:
    card = manifest.teacher
    most = card.vocab_size if card.task in LANGUAGE_MODELS else len(card.label_names)
    if card.task == SEQ2SEQ:
        starts, counts = read_numbers(table.column("decoder_start")), list_lengths(table, "labels")
        if ((starts < 0) | (starts >= most)).any() or not np.array_equal(counts, count_targets(table)):
            raise CacheError(f"{path} has target texts with tokens that are none below {most}: it is damaged")
        if not counts.all():
            raise CacheError(f"{path} has rows without a target text: it is damaged")
    elif not np.array_equal(list_lengths(table, "input_ids"), list_lengths(table, "labels")):
        raise CacheError(f"{path} has rows with more or fewer labels than tokens: it is damaged")
    masking = manifest.dump.masking
    none = [NO_LABEL, UNMASKED] if masking is not None and masking.targets == "all" else [NO_LABEL]
    for chunk in table.column("labels").chunks:
        labels = read_numbers(chunk.values)
        if ((labels >= most) | ((labels < 0) & ~np.isin(labels, none))).any():
            told = " or ".join(map(str, none))
            raise CacheError(f"{path} has token labels that are neither {told} nor below {most}: it is damaged")


def count_targets(table: pa.Table) -> np.ndarray:
    """(rows,) int64: how many tokens of every row of an `examples` shard have a label."""
    counts = []
    for chunk in table.column("labels").chunks:
        offsets = np.frombuffer(chunk.buffers()[1], "<i4", count=len(chunk) + 1)
        before = np.concatenate([[0], np.cumsum(read_numbers(chunk.values) != NO_LABEL)])
        counts.append(before[offsets[1:]] - before[offsets[:-1]])
    return np.concatenate(counts)


def list_lengths(table: pa.Table, column: str) -> np.ndarray:
    """(rows,) how many values every row of a list column has."""
    chunks = table.column(column).chunks
    offsets = [np.frombuffer(chunk.buffers()[1], "<i4", count=len(chunk) + 1) for chunk in chunks]
    return np.concatenate([np.diff(part) for part in offsets])


def check_lengths(
    table: pa.Table, field: str, spec: FieldSpec, tokens: np.ndarray, targets: np.ndarray | None = None, *, where: Path
) -> None:
    """CacheError where a row has not as many values as its tokens ask for: reshaping would mix rows."""
    if spec.kind == "row":
        return
    fits = np.array_equal(list_lengths(table, field), spec.values(tokens, targets))
    if fits and spec.type == "int8":
        fits = np.array_equal(list_lengths(table, SCALE), tokens)
    if not fits:
        raise CacheError(f"{where} does not belong to the examples of this cache: row lengths differ")
