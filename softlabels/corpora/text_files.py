"""Text files, line by line: jsonl, csv, tsv and txt."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from softlabels.corpora.tables import CHUNK_BYTES, CHUNK_ROWS, Source, Table
from softlabels.errors import CorpusError

_LONGEST = 1 << 28  # bytes of a line, and characters of a field, of a streamed file

R = TypeVar("R")


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


def read_jsonl(path: Path, limit: int | None, chunk: int | None) -> Source:
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


def read_txt(path: Path, limit: int | None, chunk: int | None) -> Source:
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


def read_csv(path: Path, limit: int | None, chunk: int | None) -> Source:
    return _delimited_source(path, ",", quoted=True, limit=limit, chunk=chunk)


def read_tsv(path: Path, limit: int | None, chunk: int | None) -> Source:
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
