"""Values at known places in mapped files go into padded buffers: one copy a row, or one gather for many short rows.

A place is an address in this process's memory, so that a batch is built in one pass however many shards and record
batches its rows lie in. Who calls this has validated the places and keeps the files mapped until it returns.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

SHORT = 2048  # bytes a row: below, a gather of all elements at once beats a copy a row
_LOOPED = 192  # elements a row: above, a slice assignment a row beats that gather
_LOWEST = 4096  # nothing is ever mapped below; numpy takes address 0 for no memory at all
_EXTENT = (ctypes.c_ubyte * (2**56)).from_address(_LOWEST)  # all addresses; nothing is allocated
_MEMORY = memoryview(_EXTENT).cast("B")
_ELEMENTS = {size: np.frombuffer(_MEMORY, np.dtype(f"u{size}")) for size in (1, 2, 4, 8)}
_TENSORS = {
    torch.int8: torch.from_numpy(_ELEMENTS[1].view(np.int8)),
    torch.float16: torch.from_numpy(_ELEMENTS[2].view(np.float16)),
    torch.bfloat16: torch.from_numpy(_ELEMENTS[2].view(np.int16)).view(torch.bfloat16),
    torch.float32: torch.from_numpy(_ELEMENTS[4].view(np.float32)),
}
_PIECE = 32_768  # numbers: more than that, torch would share out among threads of its own, which costs more here
_PAGE = mmap.PAGESIZE


@dataclass(slots=True)  # not frozen: that costs a microsecond, and a batch makes some
class Copies:
    """Rows to copy: `size[i]` bytes from `source[i]` to `target[i]`, then `padding[i]` bytes of zeros, if any."""

    target: np.ndarray
    source: np.ndarray
    size: np.ndarray
    padding: np.ndarray | None


class Buffers:
    """Memory that batches are built in, used again for the next one. `pin`: page-locked, for a GPU's copies.

    What a call hands out is overwritten by the next call with the same name.
    """

    def __init__(self, *, pin: bool = False) -> None:
        self.pin = pin
        self._blocks: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._last: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `shape` with whatever values; the memory grows to the largest shape asked for."""
        last = self._last.get((name, dtype))
        if last is not None and last.shape == shape:
            return last
        count = math.prod(shape)
        block = self._blocks.get((name, dtype))
        if block is None or len(block) < count:
            room = count if block is None else max(count, len(block) * 5 // 4)  # few steps to the longest batch
            block = torch.empty(room, dtype=dtype, pin_memory=self.pin)
            self._blocks[name, dtype] = block
        tensor = self._last[name, dtype] = block[:count].view(shape)
        return tensor


class FreshBuffers(Buffers):
    """Memory of its own for every batch."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.pin)


def take_short_rows(
    source: np.ndarray, counts: np.ndarray | None, out: np.ndarray, element: np.dtype, *, padding: int = 0
) -> None:
    """Fill `out` (B, N) with rows of `element`s at addresses `source` (B,); `counts` (B,) of them are there, or all.

    The rest is `padding`. Elements are unsigned integers or of `out`'s own type: their bits are moved, not their
    meaning, unless `out` is wider.
    """
    places = (source - _LOWEST) // element.itemsize
    memory = _ELEMENTS[element.itemsize]
    bits = out if out.dtype != element else out.view(memory.dtype)
    width = out.shape[1]
    if counts is not None and width > _LOOPED:
        for i, (place, count) in enumerate(zip(places.tolist(), counts.tolist(), strict=True)):
            bits[i, :count] = memory[place : place + count]
            if count < width:
                out[i, count:] = padding
        return
    columns = np.arange(width)
    if counts is None:
        bits[...] = memory[places[:, None] + columns]
        return
    inside = columns < counts[:, None]
    last = np.maximum(counts - 1, 0)
    bits[...] = memory[places[:, None] + np.minimum(columns, last[:, None])]  # nothing beyond the row is touched
    np.copyto(out, padding, where=~inside)


def copy_rows(copies: Copies, *, shared: bool) -> None:
    """Do `copies`. `shared`: let other threads of this process run meanwhile, which costs a little a row."""
    if shared:
        target, source, size = (part.tolist() for part in (copies.target, copies.source, copies.size))
        deque(map(_memmove, target, source, size), maxlen=0)
        _clear_padding(copies)
        return
    memory, source, target = _MEMORY, copies.source - _LOWEST, copies.target - _LOWEST
    ends = (target + copies.size).tolist()
    for start, end, first, last in zip(
        target.tolist(), ends, source.tolist(), (source + copies.size).tolist(), strict=True
    ):
        memory[start:end] = memory[first:last]
    if copies.padding is not None:
        zeros = _zeros(int(copies.padding.max()))
        for end, padding in zip(ends, copies.padding.tolist(), strict=True):
            memory[end : end + padding] = zeros[:padding]


def _clear_padding(copies: Copies) -> None:
    """While other threads run."""
    if copies.padding is not None:
        ends = (copies.target + copies.size).tolist()
        deque(map(_memset, ends, itertools.repeat(0), copies.padding.tolist()), maxlen=0)


def widen_rows(
    copies: Copies,
    stored: torch.dtype,
    width: int,
    *,
    scales: Sequence[torch.Tensor] | None = None,
    channels: Sequence[torch.Tensor] | None = None,
) -> None:
    """As `copy_rows`, with vectors of `width` `stored` numbers at the source and float32 at the target.

    `size` is that of the target. int8 is multiplied by a row's `scales` (L, 1) and then by its `channels` (width,), as
    the format says. A piece is widened while it is in the processor's nearest cache; other threads run meanwhile.
    """
    wide, memory = _TENSORS[torch.float32], _TENSORS[stored]
    row, first, last = _pieces(copies.size // (4 * width), max(_PIECE // width, 1))
    target = (copies.target[row] - _LOWEST) // 4
    source = (copies.source[row] - _LOWEST) // stored.itemsize
    places = zip(
        (target + first * width).tolist(),
        (target + last * width).tolist(),
        (source + first * width).tolist(),
        (source + last * width).tolist(),
        strict=True,
    )
    if scales is None or channels is None:
        for start, stop, begin, end in places:
            wide[start:stop].copy_(memory[begin:end])
    else:
        for (start, stop, begin, end), i, j, k in zip(places, row.tolist(), first.tolist(), last.tolist(), strict=True):
            values = wide[start:stop].copy_(memory[begin:end]).view(-1, width)
            values.mul_(scales[i][j:k]).mul_(channels[i])
    _clear_padding(copies)


def _pieces(lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `lengths` in pieces of `most` at the most: the row, the first and the end of each piece."""
    counts = -(-lengths // most)
    row = np.repeat(np.arange(len(lengths)), counts)
    first = (np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)) * most
    return row, first, np.minimum(first + most, lengths[row])


def array_at(address: int, count: int, element: np.dtype) -> np.ndarray:
    """`count` elements at `address`, as they lie there."""
    first = address - _LOWEST
    return _ELEMENTS[1][first : first + count * element.itemsize].view(element)


def want_pages(address: np.ndarray, size: np.ndarray) -> None:
    """Ask the system to read the pages of these places ahead; it does so while this process goes on."""
    first = address // _PAGE * _PAGE
    deque(map(_madvise, first.tolist(), (address + size - first).tolist(), itertools.repeat(mmap.MADV_WILLNEED)), 0)


def expect_random(address: int, size: int) -> None:
    """Tell the system that reading one page of this place says nothing about the next."""
    first = address // _PAGE * _PAGE
    _madvise(first, address + size - first, mmap.MADV_RANDOM)


def in_parts(work: Callable[[int, int], None], weights: np.ndarray, *, threads: int) -> None:
    """`work(start, stop)` over the rows, each thread with a run of rows of about the same total weight."""
    if threads <= 1 or len(weights) < 2:
        work(0, len(weights))
        return
    total = np.cumsum(weights)
    wanted = np.arange(1, threads) * (int(total[-1]) / threads)
    bounds = sorted({0, *(np.searchsorted(total, wanted) + 1).clip(max=len(weights)).tolist(), len(weights)})
    first, *others = list(itertools.pairwise(bounds))
    waiting = [_pool().submit(work, *part) for part in others]
    try:
        work(*first)
    finally:  # nobody may write into the buffers once this returns
        errors = [future.exception() for future in waiting]
    for error in errors:
        if error is not None:
            raise error


_cached_zeros = memoryview(bytes(1 << 20))
_threads: list[ThreadPoolExecutor] = []  # one pool for all caches, made when it is first wanted


def _zeros(count: int) -> memoryview:
    global _cached_zeros
    if count > len(_cached_zeros):
        _cached_zeros = memoryview(bytes(count))  # never written: the system gives no memory for it
    return _cached_zeros


def _pool() -> ThreadPoolExecutor:
    if not _threads:
        _threads.append(ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="softlabels-gather"))
    return _threads[0]


os.register_at_fork(after_in_child=_threads.clear)  # a forked child has none of its parent's threads

_libc = ctypes.CDLL(None)  # through it, Python's lock is free during the call
_memmove, _memset, _madvise = _libc.memmove, _libc.memset, _libc.madvise
_memmove.argtypes, _memmove.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None
_memset.argtypes, _memset.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), None
_madvise.argtypes, _madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
