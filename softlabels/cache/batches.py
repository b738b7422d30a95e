"""Rows of a cache go in, padded tensors come out: found by address, copied once, decoded where the type asks for it.

What moves is known before anything does: shapes from the lengths, places from the tables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from softlabels.cache.codec import DTYPES, id_type
from softlabels.cache.format import EXAMPLES, WHOLE, FieldSpec, shard_file
from softlabels.cache.gather import Buffers, elements_at, take_ids, take_rows, widen_rows
from softlabels.cache.places import Found, MappedColumn, RowPlaces, Run, physical_memory
from softlabels.cache.writer import SCALE
from softlabels.errors import CacheError
from softlabels.tokens import shift_right
from softlabels.types import NO_LABEL, SEQ2SEQ, TOKEN_LABELS, VECTOR_LABELS, Signals, TokenBatch

if TYPE_CHECKING:
    from softlabels.cache.reader import Cache

LABELS = "labels"  # the column of `examples` for labels that are not one class a row
_STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "uint16": torch.int16,  # the same bits; torch does little with its own uint16
    "int32": torch.int32,
}
_WIDENED_BY_ROW = 4096  # numbers in a row: from there on its work outweighs a few calls
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
        tokens = self.tokens.each(torch.Tensor.pin_memory)
        fields = {name: value.pin_memory() for name, value in self.teacher.fields.items()}
        return CacheBatch(self.rows, tokens, Signals(fields, tokens.attention_mask, tokens.labels))


@dataclass(slots=True)
class _Rows:
    """The rows of one batch and their lengths."""

    numbers: np.ndarray  # (B,) int64
    lengths: np.ndarray  # (B,) int64
    longest: int
    padding: np.ndarray | None  # (B, L) bool, True behind a row's end; None where all rows are as long
    targets: np.ndarray | None  # (B,) int64, tokens that have a label; None where the task has none
    asked: bool  # their pages were asked for, some batches ago


class BatchReader:
    """Builds the batches of one cache; knows where the rows of the columns lie that were asked for."""

    def __init__(self, cache: Cache, *, open_shards: int) -> None:
        self.cache = cache
        files = len(cache.manifest.shard_rows) * (1 + len(cache.fields))
        self.lengths = cache.lengths.astype(np.int64)
        self.targets = cache.targets
        self.steady = files <= open_shards  # otherwise mapped shards are let go, and looked up for every batch
        self.places: dict[tuple[str, str], RowPlaces] = {}
        self.lock = threading.Lock()  # one thread at a time opens shards

    # ------------------------------------------------------------------------------------------------- the parts

    def select(self, rows: Sequence[int] | np.ndarray, *, asked: bool = False) -> _Rows:
        """Checked row numbers with their lengths."""
        numbers = np.asarray(rows, dtype=np.int64)
        if numbers.ndim != 1 or not len(numbers):
            raise ValueError("a batch needs at least one row number")
        if numbers.view(np.uint64).max() >= self.cache.rows:  # negative numbers are large ones there
            raise IndexError(
                f"the cache has rows 0 to {self.cache.rows - 1}, asked for {numbers.min()} to {numbers.max()}"
            )
        lengths = self.lengths[numbers]
        longest, padding = int(lengths.max()), None
        if int(lengths.min()) < longest:
            padding = np.arange(longest) >= lengths[:, None]
        targets = None if self.targets is None else self.targets[numbers]
        return _Rows(numbers, lengths, longest, padding, targets, asked)

    def batch(
        self,
        rows: Sequence[int] | np.ndarray,
        fields: Sequence[str],
        *,
        out: Buffers,
        as_stored: bool,
        asked: bool = False,
    ) -> CacheBatch:
        """Everything about `rows`; `asked`: after `expect` of the same rows."""
        chosen = self.select(rows, asked=asked)
        tokens = self.tokens(chosen, out)
        teacher = self.signals(chosen, fields, out, as_stored=as_stored)
        return CacheBatch(chosen.numbers, tokens, Signals(teacher, tokens.attention_mask, tokens.labels))

    def tokens(self, rows: _Rows, out: Buffers) -> TokenBatch:
        card = self.cache.manifest.teacher
        shape = (len(rows.numbers), rows.longest)
        ids = out.take("input_ids", shape, torch.int64)
        element = id_type(card.vocab_size)
        found = self._find(EXAMPLES, "input_ids", rows, lambda: rows.lengths * element.itemsize)
        take_ids(found.places, rows.lengths, ids.numpy(), element, padding=card.pad_token_id)
        types = None
        if card.token_types:
            types = out.take("token_type_ids", shape, torch.int64)
            found = self._find(EXAMPLES, "token_type_ids", rows, lambda: rows.lengths)
            take_ids(found.places, rows.lengths, types.numpy(), np.dtype("u1"), padding=0)
        labels = self.labels(rows, out)
        return TokenBatch(ids, self.mask(rows, out), types, labels, self.decoder_inputs(rows, labels, out))

    def mask(self, rows: _Rows, out: Buffers) -> torch.Tensor:
        mask = out.take("mask", (len(rows.numbers), rows.longest), torch.int64)  # (B, L)
        if rows.padding is None:
            return mask.fill_(1)
        np.logical_not(rows.padding, out=mask.numpy(), casting="unsafe")
        return mask

    def labels(self, rows: _Rows, out: Buffers) -> torch.Tensor:
        card = self.cache.manifest.teacher
        if card.task in VECTOR_LABELS:  # (B, C)
            labels = out.take("labels", (len(rows.numbers), len(card.label_names)), torch.float32)
            take_rows(self._find(EXAMPLES, LABELS, rows, lambda: rows.lengths).places, labels)
            return labels
        if card.task in TOKEN_LABELS:  # (B, L), or (B, M) of the targets
            counts = rows.targets if card.task == SEQ2SEQ and rows.targets is not None else rows.lengths
            labels = out.take("labels", (len(rows.numbers), int(counts.max())), torch.int64)
            found = self._find(EXAMPLES, LABELS, rows, lambda: 4 * counts)
            take_ids(found.places, counts, labels.numpy(), np.dtype("<i4"), padding=NO_LABEL)
            return labels
        labels = out.take("labels", (len(rows.numbers),), torch.int64)
        self.cache.labels.take(rows.numbers, out=labels.numpy(), mode="clip")  # "clip" needs no second buffer
        return labels

    def decoder_inputs(self, rows: _Rows, labels: torch.Tensor, out: Buffers) -> torch.Tensor | None:
        """(B, M) what the teacher's decoder read: `labels` (B, M), shifted; None where the teacher has none."""
        starts = self.cache.decoder_starts
        if starts is None:
            return None
        shifted = out.take("decoder_input_ids", tuple(labels.shape), torch.int64)
        pad = self.cache.manifest.teacher.pad_token_id
        shift_right(labels.numpy(), starts[rows.numbers], out=shifted.numpy(), pad_token_id=pad)
        return shifted

    def signals(self, rows: _Rows, fields: Sequence[str], out: Buffers, *, as_stored: bool) -> dict[str, torch.Tensor]:
        """The padded tensors of `fields`."""
        tensors = {}
        for field in fields:
            spec = self.cache.fields[field]
            found = self._find(field, field, rows, partial(_sizes, spec, rows))
            # only now: until a shard's checks have passed, `width` is a number in a stranger's file
            dtype = _given_type(spec, as_stored=as_stored)
            tensor = out.take(field, _shape(spec, rows), dtype)
            if dtype == _STORED[spec.type]:
                _copy(spec, rows, found.places, tensor, slice(None))
            else:
                self._decode(field, rows, found.places, tensor)
            if spec.kind == "token" and spec.heads:
                tensor = tensor.unflatten(2, (spec.heads, -1)).transpose(1, 2)  # (B, H, L, K)
            tensors[field] = tensor
        return tensors

    def _decode(self, field: str, rows: _Rows, places: np.ndarray, tensor: torch.Tensor) -> None:
        """Stored values into float32, as `codec.decode` does it."""
        spec = self.cache.fields[field]
        stored_type, shape = _STORED[spec.type], tensor.shape[1:]
        if spec.kind == "token" and spec.type != "int8" and spec.width * rows.longest >= _WIDENED_BY_ROW:
            widen_rows(places, rows.lengths, tensor, stored_type)
            return
        scales = self._scales(field, rows) if spec.type == "int8" else None
        channels = self._channels(field, rows) if spec.type == "int8" else None
        step = max(1, _DECODED_AT_ONCE // max(shape.numel() * stored_type.itemsize, 1))
        for first in range(0, tensor.shape[0], step):
            part = slice(first, min(first + step, tensor.shape[0]))
            stored = _scratch().take("stored", (part.stop - first, *shape), stored_type)
            _copy(spec, rows, places, stored, part)
            values = tensor[part].copy_(stored)
            if spec.type == "uint16":
                values.bitwise_and_(0xFFFF)
            if scales is not None and channels is not None:
                values.mul_(scales[part]).mul_(channels[part] if len(channels) > 1 else channels)

    def _scales(self, field: str, rows: _Rows) -> torch.Tensor:
        """Of an int8 field the scale of every vector: (B, L, 1) with zero padding, or (B, 1) of a row field."""
        found = self._find(field, SCALE, rows, lambda: rows.lengths * 4)  # a few more bytes than a row field has
        if self.cache.fields[field].kind == "row":
            scales = torch.empty(len(rows.numbers), 1)
            take_rows(found.places, scales)
        else:
            scales = torch.empty(len(rows.numbers), rows.longest, 1)
            take_rows(found.places, scales, padding=rows.padding)
        return scales

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
            self.column(field, field).find(chosen.numbers, partial(_sizes, self.cache.fields[field], chosen))

    # ---------------------------------------------------------------------------------------------------- places

    def column(self, field: str, name: str) -> RowPlaces:
        """The places of a column; made when it is first asked for."""
        places = self.places.get((field, name))
        if places is None:
            places = self.places[field, name] = RowPlaces(
                self.cache.rows,
                self.cache.manifest.dump.shard_rows,
                lambda shard: self._map(field, name, shard),
                itemsize=self._itemsize(field, name),
                lock=self.lock,
                steady=self.steady,
                ask=None if field == EXAMPLES else self._ask(field),
            )
        return places

    def _find(self, field: str, name: str, rows: _Rows, sizes: Callable[[], np.ndarray]) -> Found:
        """The places of a batch's rows in a column whose files are still as long as when they were mapped."""
        found = self.column(field, name).find(rows.numbers, sizes, asked=rows.asked)
        self.cache.look_again(field, rows.numbers)
        return found

    def _itemsize(self, field: str, name: str) -> int:
        if field == EXAMPLES:
            if name == LABELS:
                return 4
            return 1 if name == "token_type_ids" else id_type(self.cache.manifest.teacher.vocab_size).itemsize
        return 4 if name == SCALE else DTYPES[self.cache.fields[field].type].itemsize

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


def _copy(spec: FieldSpec, rows: _Rows, places: np.ndarray, out: torch.Tensor, part: slice) -> None:
    """The stored elements of the batch's rows `part` into `out`, padded with zeros."""
    if spec.kind == "target":
        assert rows.targets is not None
        before = np.cumsum(rows.targets) - rows.targets
        place = np.arange(int(rows.targets.sum())) - np.repeat(before, rows.targets)  # of each target in its row
        take_rows((np.repeat(places, rows.targets) + place * spec.width)[part], out)
    elif spec.kind == "pair" and int(rows.lengths[part].min()) < rows.longest:
        _copy_maps(spec, rows, places, out, part)
    elif spec.kind == "token" and rows.padding is not None:
        take_rows(places[part], out, padding=rows.padding[part])
    else:
        take_rows(places[part], out)


def _copy_maps(spec: FieldSpec, rows: _Rows, places: np.ndarray, out: torch.Tensor, part: slice) -> None:
    """Maps of L x L values into the corner of maps that are as large as the longest row's."""
    itemsize = out.element_size()
    bits = out.view({2: torch.int16, 4: torch.int32}[itemsize]).numpy()
    for i, (place, length) in enumerate(zip(places[part].tolist(), rows.lengths[part].tolist(), strict=True)):
        maps = elements_at(place, spec.width * length * length, itemsize).reshape(spec.width, length, length)
        bits[i, :, :length, :length] = maps
        bits[i, :, :length, length:] = 0
        bits[i, :, length:] = 0


_local = threading.local()


def _scratch() -> Buffers:
    """This thread's memory for stored values on their way to be decoded."""
    if not hasattr(_local, "buffers"):
        _local.buffers = Buffers()
    return _local.buffers


def _given_type(spec: FieldSpec, *, as_stored: bool) -> torch.dtype:
    """Of the tensor that is handed out: whole numbers come as int64, but bytes stay bytes."""
    if spec.type in WHOLE:
        return torch.uint8 if spec.type == "uint8" else torch.int64
    return _STORED[spec.type] if as_stored and spec.type != "int8" else torch.float32


def _shape(spec: FieldSpec, rows: _Rows) -> tuple[int, ...]:
    batch, longest = len(rows.numbers), rows.longest
    if spec.kind == "row":
        return (batch, spec.width)  # (B, C)
    if spec.kind == "target":
        assert rows.targets is not None
        return (int(rows.targets.sum()), spec.width)  # (T, W)
    return (batch, longest, spec.width) if spec.kind == "token" else (batch, spec.width, longest, longest)


def _sizes(spec: FieldSpec, rows: _Rows) -> np.ndarray:
    """(B,) int64: bytes of each row as they are stored."""
    return DTYPES[spec.type].itemsize * spec.values(rows.lengths, rows.targets)
