"""What every format is read as: columns and rows.

A source gives its rows as one `Table`, or, where it may be larger than memory, as many small ones in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHUNK_ROWS = 4096  # at most so many rows of a streamed source are held at a time …
CHUNK_BYTES = 16 << 20  # … and about so much text
_SHOWN = 5  # at most so many bad rows, labels or columns are listed in a message


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
