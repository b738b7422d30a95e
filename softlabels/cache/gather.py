"""Values at known places in mapped files go into padded buffers: a gather over the memory of this process.

A place is an address, counted in elements from the lowest there is, so that one call builds a field of a batch however
many shards and record batches its rows lie in. That call is torch's `index_select`: no Python a row, Python's lock free
meanwhile, torch's threads where there is enough to share. Who calls this has validated the places, and keeps the files
mapped until it returns.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
from collections import deque

import numpy as np
import torch

_LOWEST = 4096  # nothing is ever mapped below; numpy takes address 0 for no memory at all
_EXTENT = (ctypes.c_ubyte * (2**56)).from_address(_LOWEST)  # all addresses; nothing is allocated
_MEMORY = memoryview(_EXTENT).cast("B")
_ELEMENTS = {size: np.frombuffer(_MEMORY, np.dtype(f"u{size}")) for size in (1, 2, 4, 8)}
_TENSORS = {
    torch.int8: torch.from_numpy(_ELEMENTS[1].view(np.int8)),
    torch.uint8: torch.from_numpy(_ELEMENTS[1]),
    torch.int16: torch.from_numpy(_ELEMENTS[2].view(np.int16)),
    torch.int32: torch.from_numpy(_ELEMENTS[4].view(np.int32)),
    torch.float16: torch.from_numpy(_ELEMENTS[2].view(np.float16)),
    torch.bfloat16: torch.from_numpy(_ELEMENTS[2].view(np.int16)).view(torch.bfloat16),
    torch.float32: torch.from_numpy(_ELEMENTS[4].view(np.float32)),
}
_ADDRESSES = 2**47  # that a process has
_WIDEST = 32_768  # elements at a time: with more, places times elements would not fit into 63 bits
_LOOPED = 192  # ids a row: above, a slice assignment a row beats a gather of single ids
_PAGE = mmap.PAGESIZE


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
        with torch.inference_mode(False):  # what is made inside that mode could not be written to outside of it
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


def place_of(address: int, itemsize: int) -> int:
    """The place of an address that `itemsize` divides; never 0."""
    return (address - _LOWEST) // itemsize


def address_of(places: np.ndarray, itemsize: int) -> np.ndarray:
    """The addresses of places of elements of `itemsize` bytes."""
    return places * itemsize + _LOWEST


@functools.lru_cache(maxsize=64)
def _rows_of(element: torch.dtype, width: int) -> torch.Tensor:
    """(places, width): at every place a row of `width` elements, over all the memory."""
    return _TENSORS[element].as_strided((_ADDRESSES // element.itemsize, width), (1, 1))


def take_rows(places: np.ndarray, out: torch.Tensor, *, padding: np.ndarray | None = None) -> None:
    """Fill `out` (B, …) with rows of as many elements, or (B, L, W) with tokens where `padding` (B, L) says False.

    `places` (B,): where each row starts. Where `padding` is True there is none, and zeros come instead.
    """
    batch = out.shape[0]
    width = out.shape[-1] if padding is not None else out.numel() // batch
    if width > _WIDEST:
        memory, rows = _TENSORS[out.dtype], out.view(batch, -1)
        for i, start in enumerate(places.tolist()):
            count = rows.shape[1] if padding is None else width * int(np.count_nonzero(~padding[i]))
            rows[i, :count].copy_(memory[start : start + count])
            rows[i, count:].zero_()
        return
    if padding is not None:
        places = places[:, None] + np.arange(padding.shape[1]) * width  # (B, L)
        places[padding] = place_of(_zeros(width * out.element_size()), out.element_size())
        places = places.reshape(-1)
    torch.index_select(_rows_of(out.dtype, width), 0, torch.from_numpy(places), out=out.view(-1, width))


def widen_rows(places: np.ndarray, counts: np.ndarray, out: torch.Tensor, element: torch.dtype) -> None:
    """Fill `out` (B, L, W) float32 with `counts` (B,) tokens of `element`s a row, and zeros behind."""
    width, memory, wide, row = out.shape[2], _TENSORS[element], out.view(-1), out.stride(0)
    for i, (start, count) in enumerate(zip(places.tolist(), counts.tolist(), strict=True)):
        first, size = i * row, count * width
        wide[first : first + size].copy_(memory[start : start + size])
        if size < row:
            wide[first + size : first + row].zero_()


def take_ids(places: np.ndarray, lengths: np.ndarray, out: np.ndarray, element: np.dtype, *, padding: int) -> None:
    """Fill `out` (B, L) int64 with rows of `element`s, `lengths` (B,) of them each, and `padding` behind."""
    memory, longest = _ELEMENTS[element.itemsize].view(element), out.shape[1]
    if longest > _LOOPED:
        for i, (start, length) in enumerate(zip(places.tolist(), lengths.tolist(), strict=True)):
            out[i, :length] = memory[start : start + length]
            if length < longest:
                out[i, length:] = padding
        return
    columns = np.arange(longest)
    inside = columns < lengths[:, None]
    last = np.maximum(lengths - 1, 0)
    out[...] = memory[places[:, None] + np.minimum(columns, last[:, None])]  # nothing beyond the row is touched
    np.copyto(out, padding, where=~inside)


def elements_at(place: int, count: int, itemsize: int) -> np.ndarray:
    """`count` unsigned integers of `itemsize` bytes at `place`, as they lie there."""
    return _ELEMENTS[itemsize][place : place + count]


def want_pages(address: np.ndarray, size: np.ndarray) -> None:
    """Ask the system to read the pages of these places ahead; it does so while this process goes on."""
    first = address // _PAGE * _PAGE
    deque(map(_madvise, first.tolist(), (address + size - first).tolist(), itertools.repeat(mmap.MADV_WILLNEED)), 0)


def expect_random(address: int, size: int) -> None:
    """Tell the system that reading one page of this place says nothing about the next."""
    first = address // _PAGE * _PAGE
    _madvise(first, address + size - first, mmap.MADV_RANDOM)


_zero_blocks = [np.zeros(1 << 16, np.uint8)]  # never let go: another thread may be reading from one


def _zeros(size: int) -> int:
    """The address of `size` zeros, a multiple of 8."""
    if len(_zero_blocks[-1]) < size:
        _zero_blocks.append(np.zeros(2 * size, np.uint8))
    return int(_zero_blocks[-1].ctypes.data)


_madvise = ctypes.CDLL(None).madvise  # Python's lock is free during the call
_madvise.argtypes, _madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
