"""Files and data sets as tables: a path comes in, a `Source` of columns and rows goes out.

A source gives its rows as one `Table`, or, where it may be larger than memory, as many small ones in turn.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from softlabels.errors import CorpusError

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 4096  # at most so many rows of a streamed source are held at a time …
CHUNK_BYTES = 16 << 20  # … and about so much text
_LONGEST = 1 << 28  # bytes of a line, and characters of a field, of a streamed file
_SHOWN = 5  # at most so many bad rows, labels or columns are listed in a message

R = TypeVar("R")


@dataclass(frozen=True)
class Table:
    """Some rows of a source. `column` gives a column's values, None where a row has none."""

    rows: int
    column: Callable[[str], list[Any]]
    place: Callable[[int], str]  # row of this table -> "line 12" or "row 11"
    first: int = 0  # number of its first row in the source


@dataclass(frozen=True)
class Source:
    """What every format is read as. `chunks` reads the rows anew each time, of the columns that it is given."""

    where: str  # how messages call it
    names: list[str]  # of the columns
    chunks: Callable[[Sequence[str]], Iterator[Table]]
    class_names: dict[str, list[str]] = field(default_factory=dict)  # of columns that hold class indices
    split: str | None = None
    folder: Path = Path()  # from which paths in it lead on

    def column(self, name: str) -> list[Any]:
        """All values of one column."""
        return [value for table in self.chunks([name]) for value in table.column(name)]


def read_source(path: Path, *, limit: int | None = None, chunk: int | None = None) -> Source:
    """The first `limit` rows of a file, by its suffix; in memory as one table, or with a `chunk` so many at a time."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise CorpusError(f"corpus {path} is in no format that is read here: {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise CorpusError(f"corpus {path} is empty")
    return reader(path, limit, chunk)


def column_source(columns: dict[str, list[Any]], *, where: str, split: str | None = None) -> Source:
    """Lists in memory as a source."""
    rows = len(next(iter(columns.values()), []))
    table = Table(rows, columns.__getitem__, "row {}".format)
    return Source(where, list(columns), lambda _: iter([table]), split=split)


def list_some(items: Sequence[object], noun: str = "") -> str:
    """'column a', 'columns a, b', 'a, b, c, d, e and 7 more'."""
    listed = ", ".join(str(item) for item in items[:_SHOWN])
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{noun}{'s' if len(items) != 1 else ''} {listed}{more}" if noun else listed + more


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------- text files


@dataclass(frozen=True, slots=True)
class _Record(Generic[R]):
    """A row as its format has it."""

    line: int  # its first
    row: R
    size: int  # characters, roughly


def _lines(path: Path) -> Iterator[str]:
    """The file's lines with their ends, which are all \\n; CorpusError at the first byte that isn't UTF-8."""
    offset = 0
    with path.open("rb") as file:
        start = file.peek(2)[:2]
        number = 0
        while data := file.readline(_LONGEST):
            number += 1
            if len(data) == _LONGEST and not data.endswith(b"\n"):
                raise CorpusError(
                    f"corpus {path}, line {number} is longer than {_LONGEST >> 20} MB: put a row on a line"
                )
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                utf16 = " (it looks like UTF-16)" if start in (b"\xff\xfe", b"\xfe\xff") else ""
                raise CorpusError(
                    f"corpus {path}, line {number}: byte {data[error.start]:#04x} at offset {offset + error.start} is "
                    f"not UTF-8{utf16}. Save the file as UTF-8"
                ) from error
            yield text.removeprefix("\ufeff") if number == 1 else text
            offset += len(data)


def _chunked(
    records: Iterator[_Record[R]], pick: Callable[[R, str], Any], *, rows: int | None, limit: int | None
) -> Iterator[Table]:
    """The first `limit` records as tables of at most so many `rows`; as one without."""
    first, size, kept = 0, 0, []
    for record in records:
        kept.append(record)
        size += record.size
        full = first + len(kept) == limit
        if full or (rows is not None and (len(kept) >= rows or size >= CHUNK_BYTES)):
            yield _table_of(kept, pick, first)
            first, size, kept = first + len(kept), 0, []
        if full:
            return
    if kept:
        yield _table_of(kept, pick, first)


def _table_of(records: list[_Record[R]], pick: Callable[[R, str], Any], first: int) -> Table:
    return Table(
        len(records),
        lambda name: [pick(record.row, name) for record in records],
        lambda row: f"line {records[row].line}",
        first,
    )


def _record_source(
    path: Path, records: Callable[[], Iterator[_Record[R]]], pick: Callable[[R, str], Any], names: list[str],
    limit: int | None, chunk: int | None,
) -> Source:  # fmt: skip
    """A file of records; without a `chunk` they are parsed now, and kept."""
    where = f"corpus {path}"
    if chunk is not None:
        return Source(where, names, lambda _: _chunked(records(), pick, rows=chunk, limit=limit), folder=path.parent)
    tables = list(_chunked(records(), pick, rows=None, limit=limit))
    if not tables:
        raise CorpusError(f"{where} has no rows")
    return Source(where, names, lambda _: iter(tables), folder=path.parent)


def _read_jsonl(path: Path, limit: int | None, chunk: int | None) -> Source:
    """A column is what any row names, so a file that is streamed is read twice."""
    names: dict[str, None] = {}
    kept: list[_Record[dict[str, Any]]] = []
    for number, record in enumerate(_json_records(path), start=1):
        names.update(dict.fromkeys(record.row))
        if chunk is None:
            kept.append(record)
        if number == limit:
            break
    if not names:
        raise CorpusError(f"corpus {path} has no rows")
    again = (lambda: _json_records(path)) if chunk is not None else (lambda: iter(kept))
    return _record_source(path, again, dict.get, list(names), limit, chunk)


def _json_records(path: Path) -> Iterator[_Record[dict[str, Any]]]:
    decoder = json.JSONDecoder(object_pairs_hook=_object_of_pairs)
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            row = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            deque(lines, maxlen=0)  # a byte that isn't UTF-8 is told first, wherever it is
            fault = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise CorpusError(f"corpus {path}, line {number} is not JSON as expected: {fault}") from error
        if not isinstance(row, dict):
            raise CorpusError(f'corpus {path}, line {number} is not a JSON object such as {{"text": "…", "label": 0}}')
        yield _Record(number, row, len(line))


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json.loads alone would keep the last of two values under one name, in silence."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the column '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return row


def _read_txt(path: Path, limit: int | None, chunk: int | None) -> Source:
    return _record_source(path, lambda: _text_records(path), lambda row, _: row, ["text"], limit, chunk)


def _text_records(path: Path) -> Iterator[_Record[str]]:
    """Every line, but for blank ones at the end; between texts they are bad rows."""
    blank: list[_Record[str]] = []
    for number, line in enumerate(_lines(path), start=1):
        record = _Record(number, line.removesuffix("\n").removesuffix("\r"), len(line))
        blank.append(record)
        if record.row.strip():
            yield from blank
            blank = []


def _read_csv(path: Path, limit: int | None, chunk: int | None) -> Source:
    return _delimited_source(path, ",", quoted=True, limit=limit, chunk=chunk)


def _read_tsv(path: Path, limit: int | None, chunk: int | None) -> Source:
    """Tab-separated, with quotes around fields as spreadsheets and pandas write them, or without such a rule.

    In the second kind a quotation mark is a character like any other. A file is of the first kind if every
    field with a quotation mark is wholly quoted, unless that puts line breaks into fields without need.
    """
    return _delimited_source(path, "\t", quoted=_is_quoted_tsv(path, limit), limit=limit, chunk=chunk)


def _is_quoted_tsv(path: Path, limit: int | None) -> bool:
    with path.open("rb") as file:
        if not any(b'"' in block for block in iter(lambda: file.read(1 << 20), b"")):
            return False
    ends: dict[bool, int | None] = {}  # the line of the last row; None where there is no row
    for quoted in (True, False):
        with contextlib.suppress(CorpusError):
            source = _delimited_source(path, "\t", quoted=quoted, limit=limit, chunk=CHUNK_ROWS)
            places = [table.place(-1) for table in source.chunks([])]
            ends[quoted] = int(places[-1].split()[1]) if places else None
    if len(ends) == 2:
        return ends[True] is not None and ends[True] == ends[False] and _wholly_quoted(path)
    return next(iter(ends)) if ends else _wholly_quoted(path)


_QUOTED_TSV = re.compile(r'(?:(?:"(?:[^"]|"")*+"|[^"\t\r\n]*+)(?:[\t\r\n]|\Z))*+')  # possessive: lines may be long
_PLAIN, _INSIDE = re.compile(r'[^"\t\r\n]*+'), re.compile(r'[^"]*+(?:""[^"]*+)*+')


def _wholly_quoted(path: Path) -> bool:
    """Whether every field of a tab-separated file that has a quotation mark is quoted, over line breaks too."""
    inside = False
    for line in _lines(path):
        if not inside and _QUOTED_TSV.fullmatch(line):
            continue
        at = 0
        while at < len(line):
            if inside:
                at = _end(_INSIDE, line, at)
                if at == len(line):
                    break
                inside, at = False, at + 1  # past the closing mark
                if at < len(line) and line[at] not in "\t\r\n":
                    return False
                at += 1
            elif line[at] == '"':
                inside, at = True, at + 1
            else:
                at = _end(_PLAIN, line, at)
                if line[at : at + 1] == '"':
                    return False
                at += 1
    return not inside


def _end(pattern: re.Pattern[str], line: str, at: int) -> int:
    found = pattern.match(line, at)
    assert found is not None  # these match nothing too
    return found.end()


def _delimited_source(path: Path, delimiter: str, *, quoted: bool, limit: int | None, chunk: int | None) -> Source:
    """Rows of as many fields as the first line has names."""
    names = next(_csv_records(path, delimiter, quoted=quoted), _Record(1, [], 0)).row
    column = {name: number for number, name in reversed(list(enumerate(names)))}

    def records() -> Iterator[_Record[list[str]]]:
        found = _csv_records(path, delimiter, quoted=quoted)
        next(found, None)
        for record in found:
            if len(record.row) != len(names):
                raise CorpusError(
                    f"corpus {path}, line {record.line}: {len(record.row)} field{'s' if len(record.row) != 1 else ''} "
                    f"where the first line names {len(names)} column{'s' if len(names) != 1 else ''}. Quote texts that "
                    f"hold the separator or a line break"
                )
            yield record

    return _record_source(path, records, lambda row, name: row[column[name]], names, limit, chunk)


def _csv_records(path: Path, delimiter: str, *, quoted: bool) -> Iterator[_Record[list[str]]]:
    """Every row that isn't blank, the first of them with the names."""
    # the default refuses a text of 128 kB; without any limit a mark left open takes the rest of the file into memory
    limit = csv.field_size_limit(min(path.stat().st_size + 1, _LONGEST))
    start = 1
    try:
        lines = _csv_lines(path)
        if quoted:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        else:
            reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
        for row in reader:
            if row:
                yield _Record(start, row, sum(map(len, row)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise CorpusError(
            f"corpus {path}, line {start}: {error} (is a quotation mark left open or not doubled?)"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines that may end with \\r alone, too."""
    for line in _lines(path):
        if "\r" in line[:-2]:
            yield from io.StringIO(line, newline="")
        else:
            yield line


# -------------------------------------------------------------------------------------------------- Arrow and kin


def _read_parquet(path: Path, limit: int | None, chunk: int | None) -> Source:
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


def _read_arrow(path: Path, limit: int | None, chunk: int | None) -> Source:
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


READERS: dict[str, Callable[[Path, int | None, int | None], Source]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
}
