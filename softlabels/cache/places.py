"""Where every row of a column lies in this process's memory, and which of it to read ahead.

A column's table has a place a row (see `softlabels.cache.gather`): 0 while the row's shard is not mapped, negative
while the system has never been asked to read the row's pages ahead. Looking up a batch is then one indexing, whatever
the number of shards.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from softlabels.cache.gather import address_of, expect_random, place_of, want_pages

_SMALL = 1 << 20  # bytes of a shard's column: below, it is read ahead as a whole


@dataclass(frozen=True, slots=True)
class Run:
    """The part of a column that lies in one piece: a record batch of one shard."""

    address: int
    size: int  # bytes
    starts: np.ndarray  # (rows + 1,) where each row starts, in elements
    itemsize: int

    def rows(self) -> np.ndarray:
        """(rows,) int64: the place of each row."""
        return place_of(self.address, self.itemsize) + self.starts[:-1].astype(np.int64)


@dataclass(frozen=True, slots=True)
class MappedColumn:
    """One column of one shard in memory, for as long as `owner` lives."""

    runs: list[Run]
    owner: Any


@dataclass(slots=True)
class Found:
    """The places of a batch's rows, good for as long as this object lives."""

    places: np.ndarray  # (B,) int64
    owners: list[Any]


class RowPlaces:
    """The places of one column's rows. `open_column(shard)` maps a shard; `steady`: no shard is ever let go again.

    `ask`: whether rows' pages are read ahead: None for never, "once" where all rows fit into memory, else "always".
    """

    def __init__(
        self,
        rows: int,
        shard_rows: int,
        open_column: Callable[[int], MappedColumn],
        *,
        itemsize: int,
        lock: threading.Lock,
        steady: bool,
        ask: str | None,
    ) -> None:
        self.places = np.zeros(rows, np.int64)  # untouched parts take no memory
        self.itemsize = itemsize
        self.shard_rows, self.open_column, self.steady, self.ask = shard_rows, open_column, steady, ask
        self._noted: dict[int, weakref.ref[Any]] = {}  # the owner of each shard's places
        self._lock = lock

    def find(self, rows: np.ndarray, sizes: Callable[[], np.ndarray], *, asked: bool = False) -> Found:
        """The places of `rows`, of `sizes()` bytes. Pages never asked for are asked for, unless `asked`: they were."""
        if self.steady:
            places = self.places[rows]
            if places.min() > 0:  # as it nearly always is
                return Found(places, [])
        found = self._mapped(rows)
        unasked = found.places < 0
        if not unasked.any():
            return found
        places = np.abs(found.places)
        if not asked:
            want_pages(address_of(places[unasked], self.itemsize), sizes()[unasked])
        if self.ask == "once":
            self.places[rows[unasked]] = places[unasked]
        return Found(places, found.owners)

    def _mapped(self, rows: np.ndarray) -> Found:
        if self.steady:
            found = self.places[rows]
            if found.all():
                return Found(found, [])
        with self._lock:
            found, owners, shards = np.empty(len(rows), np.int64), [], rows // self.shard_rows
            for shard in np.unique(shards).tolist():
                column = self.open_column(shard)
                self._note(shard, column)
                owners.append(column.owner)
                here = shards == shard
                found[here] = self.places[rows[here]]
            return Found(found, owners)

    def _note(self, shard: int, column: MappedColumn) -> None:
        if shard in self._noted and self._noted[shard]() is column.owner:
            return
        sign = 1
        for run in column.runs if self.ask is not None else []:
            if run.size < _SMALL:
                want_pages(np.array([run.address]), np.array([run.size]))
            else:
                expect_random(run.address, run.size)
                sign = -1
        places = np.concatenate([run.rows() for run in column.runs])
        first = shard * self.shard_rows
        self.places[first : first + len(places)] = sign * places
        self._noted[shard] = weakref.ref(column.owner)


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
