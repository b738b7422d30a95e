"""Parquet and Arrow files and the datasets library's tables, some rows at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softlabels.corpora.tables import CHUNK_BYTES, Source, Table, first_line
from softlabels.errors import CorpusError

if TYPE_CHECKING:
    import pyarrow as pa


def read_parquet(path: Path, limit: int | None, chunk: int | None) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    @contextlib.contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"corpus {path} cannot be read as Parquet: {first_line(error)}") from error

    def open_file() -> pq.ParquetFile:
        # buffered: or a whole group's columns are read at a time, which may be the file
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=0 if chunk is None else 1 << 20)

    with told():
        schema, facts = open_file().schema_arrow, open_file().metadata
        size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
    if not facts.num_rows:
        raise CorpusError(f"corpus {path} has no rows")
    rows = _rows_at_a_time(size, facts.num_rows, chunk)

    def tables(names: Sequence[str]) -> Iterator[pa.Table]:
        with told():
            if rows is None:
                yield open_file().read(columns=list(names))
                return
            for batch in open_file().iter_batches(batch_size=rows, columns=list(names)):
                yield pa.Table.from_batches([batch])

    return _arrow_source(f"corpus {path}", schema, tables, limit, folder=path.parent)


def read_arrow(path: Path, limit: int | None, chunk: int | None) -> Source:
    """An Arrow IPC file, or the stream format, which datasets saves under the same suffix."""
    import pyarrow as pa

    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        try:
            # mapped where it is streamed: a file may be one batch
            with pa.OSFile(str(path)) if chunk is None else pa.memory_map(str(path)) as file:
                is_file = file.read(6) == b"ARROW1"
                file.seek(0)
                yield pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"corpus {path} cannot be read as Arrow: {first_line(error)}") from error

    def tables(names: Sequence[str]) -> Iterator[pa.Table]:
        with opened() as reader:
            if chunk is None:
                yield reader.read_all()
                return
            numbers = range(getattr(reader, "num_record_batches", 0))
            for batch in map(reader.get_batch, numbers) if numbers else reader:
                rows = _rows_at_a_time(batch.nbytes, batch.num_rows, chunk) or 1
                for start in range(0, batch.num_rows, rows):
                    yield pa.Table.from_batches([batch.slice(start, rows)])

    with opened() as reader:
        schema = reader.schema
    return _arrow_source(f"corpus {path}", schema, tables, limit, folder=path.parent)


def dataset_source(dataset: Any, *, where: str, limit: int | None = None, chunk: int | None = None) -> Source:
    """The rows of one split, a datasets.Dataset, with the names of its classes."""
    rows = _rows_at_a_time(dataset_bytes(dataset), len(dataset), chunk) or max(len(dataset), 1)

    def tables(names: Sequence[str]) -> Iterator[pa.Table]:
        kept = dataset.select_columns([name for name in names if name in dataset.column_names]).with_format("arrow")
        for start in range(0, len(kept), rows):
            yield kept[start : start + rows]

    features = {name: getattr(feature, "feature", feature) for name, feature in dataset.features.items()}
    class_names = {name: feature.names for name, feature in features.items() if getattr(feature, "names", None)}
    source = _arrow_source(where, dataset.features.arrow_schema, tables, limit)
    return Source(where, source.names, source.chunks, class_names)


def dataset_bytes(dataset: Any) -> int:
    """What a datasets.Dataset holds, about."""
    table = dataset.data
    return int(table.nbytes * (len(dataset) / max(table.num_rows, 1)))


def _rows_at_a_time(size: int, rows: int, chunk: int | None) -> int | None:
    return None if chunk is None else max(min(chunk, CHUNK_BYTES * rows // max(size, 1)), 1)


def _arrow_source(
    where: str,
    schema: pa.Schema,
    tables: Callable[[Sequence[str]], Iterator[pa.Table]],
    limit: int | None,
    folder: Path = Path(),
) -> Source:
    def chunks(names: Sequence[str]) -> Iterator[Table]:
        first = 0
        for table in tables(names):
            kept = table if limit is None else table.slice(0, limit - first)
            if kept.num_rows:
                yield _arrow_table(kept, where, first)
            first += kept.num_rows
            if first == limit:
                return

    return Source(where, schema.names, chunks, class_names_of(schema), folder=folder)


def _arrow_table(table: pa.Table, where: str, first: int) -> Table:
    def column(name: str) -> list[Any]:
        try:
            return table.column(name).to_pylist()
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where}: column '{name}' is not UTF-8: {error}") from error

    return Table(table.num_rows, column, lambda row: f"row {first + row}", first)


def class_names_of(schema: pa.Schema) -> dict[str, list[str]]:
    """Column → its classes, from the metadata that datasets leaves in a schema."""
    metadata = (schema.metadata or {}).get(b"huggingface", b"{}")
    class_names = {}
    with contextlib.suppress(ValueError, LookupError, AttributeError, TypeError):  # anyone may write metadata
        for name, feature in json.loads(metadata)["info"]["features"].items():
            if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
                feature = feature["feature"]  # of each item of a list
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
                class_names[name] = [str(label) for label in feature["names"]]
    return class_names
