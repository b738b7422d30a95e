"""Rows of a cache go in, padded tensors come out: found by address, copied once, decoded where the type asks for it.

What moves is known before anything does: shapes from the lengths, places from the tables. Long rows are copied one by
one, which threads can share; short ones (ids, logits, scales) are gathered all at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from softlabels.cache.codec import DTYPES
from softlabels.cache.format import EXAMPLES, FieldSpec, shard_file
from softlabels.cache.gather import (
    SHORT,
    Buffers,
    Copies,
    array_at,
    copy_rows,
    in_parts,
    take_short_rows,
    widen_rows,
)
from softlabels.cache.places import Found, MappedColumn, RowPlaces, Run, physical_memory
from softlabels.cache.writer import SCALE
from softlabels.errors import CacheError
from softlabels.types import Signals, TokenBatch

if TYPE_CHECKING:
    from softlabels.cache.reader import Cache

_STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
_DECODED_AT_ONCE = 1 << 20  # bytes of stored values: they are still in the processor's cache when they are decoded


@dataclass(frozen=True, slots=True)
class CacheBatch:
    """Rows of a cache as padded tensors: what the student reads, and what the teacher said."""

    rows: np.ndarray  # (B,) int64, row numbers of the cache
    tokens: TokenBatch
    teacher: Signals

    def to(self, device: torch.device | str) -> CacheBatch:
        """The same batch on another device."""
        return CacheBatch(self.rows, self.tokens.to(device), self.teacher.to(device))

    def pin_memory(self) -> CacheBatch:
        """The same batch in page-locked memory; torch's DataLoader asks for it."""
        tokens, teacher = self.tokens, self.teacher
        types = None if tokens.token_type_ids is None else tokens.token_type_ids.pin_memory()
        mask, labels = tokens.attention_mask.pin_memory(), tokens.labels.pin_memory()
        fields = {name: value.pin_memory() for name, value in teacher.fields.items()}
        return CacheBatch(
            self.rows, TokenBatch(tokens.input_ids.pin_memory(), mask, types, labels), Signals(fields, mask, labels)
        )


@dataclass(slots=True)
class _Rows:
    """The rows of one batch and their lengths."""

    numbers: np.ndarray  # (B,) int64
    lengths: np.ndarray  # (B,) int64
    longest: int
    total: int  # of the lengths
    asked: bool  # their pages were asked for, some batches ago


class BatchReader:
    """Builds the batches of one cache; knows where the rows of the columns lie that were asked for."""

    def __init__(self, cache: Cache, *, open_shards: int) -> None:
        self.cache = cache
        files = len(cache.manifest.shard_rows) * (1 + len(cache.fields))
        self.steady = files <= open_shards  # otherwise mapped shards are let go, and looked up for every batch
        self.places: dict[tuple[str, str], RowPlaces] = {}
        self.lock = threading.Lock()  # one thread at a time opens shards

    # ------------------------------------------------------------------------------------------------- the parts

    def select(self, rows: Sequence[int] | np.ndarray, *, asked: bool = False) -> _Rows:
        """Checked row numbers with their lengths."""
        numbers = np.asarray(rows, dtype=np.int64)
        if numbers.ndim != 1 or not len(numbers):
            raise ValueError("a batch needs at least one row number")
        if numbers.min() < 0 or numbers.max() >= self.cache.rows:
            raise IndexError(
                f"the cache has rows 0 to {self.cache.rows - 1}, asked for {numbers.min()} to {numbers.max()}"
            )
        lengths = self.cache.lengths[numbers].astype(np.int64)
        return _Rows(numbers, lengths, int(lengths.max()), int(lengths.sum()), asked)

    def batch(
        self,
        rows: Sequence[int] | np.ndarray,
        fields: Sequence[str],
        *,
        out: Buffers,
        as_stored: bool,
        threads: int,
        asked: bool = False,
    ) -> CacheBatch:
        """Everything about `rows`; `asked`: after `expect` of the same rows."""
        chosen = self.select(rows, asked=asked)
        tokens = self.tokens(chosen, out)
        teacher = self.signals(chosen, fields, out, as_stored=as_stored, threads=threads)
        return CacheBatch(chosen.numbers, tokens, Signals(teacher, tokens.attention_mask, tokens.labels))

    def tokens(self, rows: _Rows, out: Buffers) -> TokenBatch:
        card = self.cache.manifest.teacher
        shape = (len(rows.numbers), rows.longest)
        ids = out.take("input_ids", shape, torch.int64)
        element = np.dtype("<u2") if card.vocab_size <= 65_536 else np.dtype("<i4")
        self._short(EXAMPLES, "input_ids", rows, ids.numpy(), element, rows.lengths, padding=card.pad_token_id)
        types = None
        if card.token_types:
            types = out.take("token_type_ids", shape, torch.int64)
            self._short(EXAMPLES, "token_type_ids", rows, types.numpy(), np.dtype("u1"), rows.lengths)
        return TokenBatch(ids, self.mask(rows, out), types, self.labels(rows, out))

    def mask(self, rows: _Rows, out: Buffers) -> torch.Tensor:
        mask = out.take("mask", (len(rows.numbers), rows.longest), torch.int64)  # (B, L)
        if rows.total == mask.numel():
            return mask.fill_(1)
        np.less(np.arange(rows.longest), rows.lengths[:, None], out=mask.numpy(), casting="unsafe")
        return mask

    def labels(self, rows: _Rows, out: Buffers) -> torch.Tensor:
        labels = out.take("labels", (len(rows.numbers),), torch.int64)
        self.cache.labels.take(rows.numbers, out=labels.numpy(), mode="clip")  # "clip" needs no second buffer
        return labels

    def signals(
        self, rows: _Rows, fields: Sequence[str], out: Buffers, *, as_stored: bool, threads: int
    ) -> dict[str, torch.Tensor]:
        """The padded tensors of `fields`; long rows of all of them are shared among `threads`."""
        tensors, long = {}, []
        for field in fields:
            spec = self.cache.fields[field]
            dtype = _STORED[spec.type] if as_stored and spec.type != "int8" else torch.float32
            tensor = out.take(field, _shape(spec, rows), dtype)
            job = self._job(field, rows, tensor, shared=threads > 1)
            if job.short:
                job.run(0, len(rows.numbers))
            else:
                long.append(job)
            if spec.kind == "token" and spec.heads:
                tensor = tensor.unflatten(2, (spec.heads, -1)).transpose(1, 2)  # (B, H, L, K)
            tensors[field] = tensor

        def work(start: int, stop: int) -> None:
            for job in long:
                job.run(start, stop)

        if long:
            in_parts(work, rows.lengths + 1, threads=threads)
        return tensors

    def _job(self, field: str, rows: _Rows, tensor: torch.Tensor, *, shared: bool) -> _Job:
        spec = self.cache.fields[field]
        counts = _counts(spec, rows)
        sizes = counts * DTYPES[spec.type].itemsize
        found = self.column(field, field).find(rows.numbers, sizes, asked=rows.asked)
        scales, channels = (
            (self._scales(field, rows), self._channels(field, rows)) if spec.type == "int8" else (None, None)
        )
        return _Job(spec, rows, tensor, found, counts, sizes, scales=scales, channels=channels, shared=shared)

    def _scales(self, field: str, rows: _Rows) -> torch.Tensor:
        """Of an int8 field the scale of every vector: (B, L, 1) with zero padding, or (B, 1) of a row field."""
        by_row = self.cache.fields[field].kind == "row"
        scales = np.empty((len(rows.numbers), 1 if by_row else rows.longest), np.float32)
        self._short(field, SCALE, rows, scales, np.dtype("<f4"), None if by_row else rows.lengths)
        return torch.from_numpy(scales if by_row else scales[:, :, None])

    def _channels(self, field: str, rows: _Rows) -> torch.Tensor:
        """Of an int8 field the channels of each row's shard: (B or 1, 1, width); of a row field (B or 1, width)."""
        shards, which = np.unique(rows.numbers // self.cache.manifest.dump.shard_rows, return_inverse=True)
        channels = np.stack([self.cache.channels_of(field, shard) for shard in shards.tolist()])
        channels = channels[which] if len(shards) > 1 else channels
        return torch.from_numpy(channels if self.cache.fields[field].kind == "row" else channels[:, None])

    def expect(self, rows: Sequence[int] | np.ndarray, fields: Sequence[str]) -> None:
        """Have the system read the pages of `rows` ahead."""
        chosen = self.select(rows)
        for field in fields:
            spec = self.cache.fields[field]
            sizes = _counts(spec, chosen) * DTYPES[spec.type].itemsize
            self.column(field, field).find(chosen.numbers, sizes)

    # ---------------------------------------------------------------------------------------------------- places

    def column(self, field: str, name: str) -> RowPlaces:
        """The places of a column; made when it is first asked for."""
        places = self.places.get((field, name))
        if places is None:
            places = self.places[field, name] = RowPlaces(
                self.cache.rows,
                self.cache.manifest.dump.shard_rows,
                lambda shard: self._map(field, name, shard),
                lock=self.lock,
                steady=self.steady,
                ask=None if field == EXAMPLES else self._ask(field),
            )
        return places

    def _ask(self, field: str) -> str:
        opened = {field, *(known for known, _ in self.places)}
        fits = sum(self.cache.manifest.shards[name].total for name in opened) < physical_memory() // 2
        return "once" if fits else "always"

    def _map(self, field: str, name: str, shard: int) -> MappedColumn:
        lists = self.cache.column_lists(field, name, shard)
        runs = []
        for values, starts in zip(lists.values, lists.starts, strict=True):
            address = values.__array_interface__["data"][0]
            if address % values.itemsize:
                raise CacheError(f"{shard_file(self.cache.path, field, shard)} has values at odd places: it is damaged")
            runs.append(Run(address, values.nbytes, starts, values.itemsize))
        return MappedColumn(runs, lists)

    def _short(
        self,
        field: str,
        name: str,
        rows: _Rows,
        out: np.ndarray,
        element: np.dtype,
        counts: np.ndarray | None,
        padding: int = 0,
    ) -> None:
        """Fill `out` (B, N) with the column's elements, all at once."""
        places = self.column(field, name)
        found = places.find(rows.numbers, rows.lengths * element.itemsize)  # a few more bytes than a row field has
        take_short_rows(found.addresses, counts, out, element, padding=padding)


class _Job:
    """One field of one batch: its rows' values on the way into `tensor`."""

    def __init__(
        self,
        spec: FieldSpec,
        rows: _Rows,
        tensor: torch.Tensor,
        found: Found,
        counts: np.ndarray,
        sizes: np.ndarray,
        *,
        scales: torch.Tensor | None,
        channels: torch.Tensor | None,
        shared: bool,
    ) -> None:
        self.spec, self.rows, self.tensor, self.found = spec, rows, tensor, found
        self.counts, self.sizes, self.scales, self.channels, self.shared = counts, sizes, scales, channels, shared
        self.stored = _STORED[spec.type]
        self.ragged = spec.kind != "row" and rows.total < rows.longest * len(sizes)
        values = spec.width * {"row": len(sizes), "token": rows.total, "pair": 0}[spec.kind]
        self.short = spec.kind != "pair" and values * self.stored.itemsize < SHORT * len(sizes)

    def run(self, start: int, stop: int) -> None:
        """Rows `start` to `stop` of the batch."""
        if self.tensor.dtype == self.stored:
            self._copy(self.tensor[start:stop], start, stop)
            return
        if self.spec.kind == "token" and not self.short:
            self._widen(start, stop)
            return
        shape = self.tensor.shape[1:]
        step = max(1, _DECODED_AT_ONCE // max(shape.numel() * self.stored.itemsize, 1))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            stored = _scratch().take("stored", (last - first, *shape), self.stored)
            self._copy(stored, first, last)
            self._decode(stored, first, last)

    def _widen(self, start: int, stop: int) -> None:
        """Long rows of a token field, each decoded on its way."""
        row = self.tensor.stride(0) * 4
        sizes = self.counts[start:stop] * 4
        places = self.tensor.data_ptr() + np.arange(start, stop) * row
        padding = row - sizes if self.ragged else None
        copies = Copies(places, self.found.addresses[start:stop], sizes, padding)
        if self.scales is None or self.channels is None:
            widen_rows(copies, self.stored, self.spec.width)
            return
        scales = self.scales[start:stop].unbind()  # of (L, 1)
        channels = self.channels[:, 0].unbind()  # of (width,)
        parts = channels[start:stop] if len(channels) > 1 else channels * (stop - start)
        widen_rows(copies, self.stored, self.spec.width, scales=scales, channels=parts)

    def _decode(self, stored: torch.Tensor, start: int, stop: int) -> None:
        """As `codec.decode` does it, into place."""
        values = self.tensor[start:stop].copy_(stored)
        if self.scales is not None and self.channels is not None:
            values.mul_(self.scales[start:stop])
            values.mul_(self.channels[start:stop] if len(self.channels) > 1 else self.channels)

    def _copy(self, target: torch.Tensor, start: int, stop: int) -> None:
        """The stored elements of rows `start` to `stop` into `target`, padded with zeros."""
        addresses, count = self.found.addresses[start:stop], stop - start
        if self.short:
            bits = target.view(_BITS[self.stored.itemsize]).numpy().reshape(count, -1)
            counts = None if self.spec.kind == "row" else self.counts[start:stop]
            take_short_rows(addresses, counts, bits, bits.dtype)
        elif self.spec.kind == "pair" and int(self.rows.lengths[start:stop].min()) < self.rows.longest:
            self._copy_maps(target, start, stop)
        else:
            size = target.nbytes // count
            first = target.data_ptr()
            sizes, places = self.sizes[start:stop], np.arange(first, first + count * size, size)
            copy_rows(Copies(places, addresses, sizes, size - sizes if self.ragged else None), shared=self.shared)

    def _copy_maps(self, target: torch.Tensor, start: int, stop: int) -> None:
        """Maps of L x L values into the corner of maps that are as large as the longest row's."""
        bits = target.view(_BITS[self.stored.itemsize]).numpy()
        for i, row in enumerate(range(start, stop)):
            length, address = int(self.rows.lengths[row]), int(self.found.addresses[row])
            maps = array_at(address, int(self.counts[row]), bits.dtype).reshape(self.spec.width, length, length)
            bits[i, :, :length, :length] = maps
            bits[i, :, :length, length:] = 0
            bits[i, :, length:] = 0


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_local = threading.local()


def _scratch() -> Buffers:
    """This thread's memory for stored values on their way to be decoded."""
    if not hasattr(_local, "buffers"):
        _local.buffers = Buffers()
    return _local.buffers


def _shape(spec: FieldSpec, rows: _Rows) -> tuple[int, ...]:
    batch, longest = len(rows.numbers), rows.longest
    if spec.kind == "row":
        return (batch, spec.width)  # (B, C)
    return (batch, longest, spec.width) if spec.kind == "token" else (batch, spec.width, longest, longest)


def _counts(spec: FieldSpec, rows: _Rows) -> np.ndarray:
    """(B,) int64: values in each row."""
    if spec.kind == "row":
        return np.full(len(rows.numbers), spec.width, np.int64)
    return spec.width * (rows.lengths if spec.kind == "token" else rows.lengths * rows.lengths)
