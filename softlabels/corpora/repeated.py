"""Rows that come several times, each time under another id, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

from softlabels.corpora.spooled_rows import SpooledRows
from softlabels.types import Example


class RepeatedRows(Sequence[Example]):
    """Every one of `rows` so many `times`, with the ids 'x#0', 'x#1', …"""

    def __init__(self, rows: Sequence[Example], times: int) -> None:
        self.rows, self.times = rows, times

    def __len__(self) -> int:
        return len(self.rows) * self.times

    def __iter__(self) -> Iterator[Example]:
        return (replace(row, id=f"{row.id}#{number}") for row in self.rows for number in range(self.times))

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        row, number = self.rows[places // self.times], places % self.times
        return replace(row, id=f"{row.id}#{number}")


def has_unique_ids(examples: Sequence[Example]) -> bool:
    """Whether the rows' ids are known to differ, so that nobody need look at them all."""
    return isinstance(examples.rows if isinstance(examples, RepeatedRows) else examples, SpooledRows)
