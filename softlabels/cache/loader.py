"""Batches of a cache in a known order, each built while the last one is used: by a thread, or by torch's DataLoader.

A thread and not worker processes: what copies memory holds no lock, and a batch need not travel between processes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from softlabels.cache.batches import CacheBatch
from softlabels.cache.format import EXAMPLES
from softlabels.cache.gather import Buffers, FreshBuffers

if TYPE_CHECKING:
    from softlabels.cache.reader import Cache

_READY = 1  # batches that wait for the consumer, while one more is being built and one is in use
_FETCHED_AHEAD = 100  # batches whose shards are asked for, of a cache at a URL
READ_AHEAD = 8  # batches whose pages are asked for before they are copied


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How batches are built; nothing here changes a value."""

    prefetch: bool = True  # by a thread, while the last one is used
    reuse: bool = False  # memory is used again: a batch is good until the next one is asked for
    pin: bool = False  # page-locked memory, for a GPU's copies
    as_stored: bool = False  # float16 and bfloat16 as they are, for a device to widen them


@dataclass(frozen=True, slots=True)
class PickedRows(Sequence[np.ndarray]):
    """Batches of `rows`, by their places in it; the row numbers of a batch are made when it is asked for."""

    rows: np.ndarray  # (N,)
    places: list[np.ndarray]  # of each batch

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:  # an int, or a slice, which gives a list
        if isinstance(index, slice):
            return [self.rows[places] for places in self.places[index]]
        return self.rows[self.places[index]]


class CacheLoader:
    """Iterates over `batches` of row numbers as `CacheBatch`es. May be iterated again, also at the same time."""

    def __init__(
        self, cache: Cache, batches: Sequence[np.ndarray], fields: Sequence[str], options: LoadOptions
    ) -> None:
        self.cache, self.batches, self.fields, self.options = cache, batches, list(fields), options

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Generator[CacheBatch, None, None]:
        return _prefetched(self._build(), _READY) if self.options.prefetch else self._build()

    def _build(self) -> Generator[CacheBatch, None, None]:
        options, reader = self.options, self.cache.reader
        memory = [Buffers(pin=options.pin) for _ in range(2 + _READY if options.prefetch else 1)]
        coming = self._coming_shards()
        for rows in self.batches[: READ_AHEAD - 1]:
            coming(0)
            reader.expect(rows, self.fields)
        for number, rows in enumerate(self.batches):
            coming(number)
            if number + READ_AHEAD - 1 < len(self.batches):
                reader.expect(self.batches[number + READ_AHEAD - 1], self.fields)
            out = memory[number % len(memory)] if options.reuse else FreshBuffers(pin=options.pin)
            yield reader.batch(rows, self.fields, out=out, as_stored=options.as_stored, asked=True)

    def _coming_shards(self) -> Callable[[int], None]:
        """What to call with each batch's number: of a cache at a URL it asks for the shards of batches to come."""
        store, size = self.cache.store, self.cache.manifest.dump.shard_rows
        if store is None:
            return lambda number: None
        seen: set[int] = set()
        order: list[tuple[int, int]] = []  # of each shard the batch that needs it first
        for number, rows in enumerate(self.batches):
            for shard in np.unique(rows // size).tolist():
                if shard not in seen:
                    seen.add(shard)
                    order.append((number, shard))
        names = [EXAMPLES, *self.fields]

        def ask(number: int) -> None:
            while order and order[0][0] < number:
                order.pop(0)
            soon = (shard for first, shard in order if first < number + _FETCHED_AHEAD)
            store.ahead((name, shard) for shard in soon for name in names)

        return ask


@dataclass(frozen=True, slots=True)
class _End:
    """No batch comes any more: all were built, or `error` came up."""

    error: BaseException | None


def _prefetched(batches: Iterator[CacheBatch], ready: int) -> Generator[CacheBatch, None, None]:
    """`batches`, built by a thread that is ahead by `ready`. It ends soon after this iterator, finished or dropped.

    Nothing here waits for the thread to end: a garbage collection may drop this iterator while a lock is held that the
    thread wants.
    """
    waiting: queue.SimpleQueue[CacheBatch | _End] = queue.SimpleQueue()
    room = threading.Semaphore(ready + 2)  # one in use, one being built, and those that wait
    dropped = threading.Event()

    def work() -> None:
        end = _End(None)
        try:
            while room.acquire() and not dropped.is_set():
                batch = next(batches, end)
                waiting.put(batch)
                if batch is end:
                    return
        except BaseException as error:  # belongs to the consumer
            waiting.put(_End(error))

    threading.Thread(target=work, name="softlabels-prefetch", daemon=True).start()
    try:
        while not isinstance(item := waiting.get(), _End):
            yield item
            room.release()
        if item.error is not None:
            raise item.error
    finally:
        dropped.set()
        room.release()


class CacheDataset(torch.utils.data.Dataset[CacheBatch]):
    """A cache for torch's DataLoader, which asks for whole batches:

        DataLoader(CacheDataset(cache, ["logits"]), batch_size=32, shuffle=True, collate_fn=CacheDataset.collate)

    Item i is row `rows[i]`, a batch of one. `Cache.loader` does the same with less padding and without processes.
    """

    def __init__(
        self,
        cache: Cache,
        fields: Sequence[str],
        *,
        rows: Sequence[int] | np.ndarray | None = None,
        as_stored: bool = False,
    ) -> None:
        self.cache, self.fields, self.as_stored = cache, list(fields), as_stored
        self.rows = np.arange(cache.rows) if rows is None else np.asarray(rows, np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CacheBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> CacheBatch:
        return self.cache.batch(self.rows[np.asarray(indices, np.int64)], self.fields, as_stored=self.as_stored)

    @staticmethod
    def collate(batch: Any) -> Any:
        """What DataLoader does with a batch that is one already."""
        return batch
