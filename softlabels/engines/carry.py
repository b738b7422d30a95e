"""Values on their way from the device to their file, without the calling thread ever waiting for either.

On the CPU there is no way to go: they are checked, converted and written as they are. On a GPU they are measured and
converted right behind the forward pass, and copied into pinned memory by a stream of their own; the thread that writes
waits for that copy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softlabels.cache.codec import LARGEST, to_stored
from softlabels.cache.format import FieldSpec
from softlabels.cache.writer import FieldShard


@dataclass(slots=True)
class Carried:
    """A batch's values, `{field: (B, …)}`. What is staged of them is on the CPU once `copied` has happened."""

    values: dict[str, Tensor]  # as the captures gave them, on the device
    staged: dict[str, _Staged]
    copied: Any | None  # torch.cuda.Event

    def write(self, writers: Mapping[str, FieldShard], numbers: np.ndarray, *, ids: Sequence[str]) -> None:
        """Write the batch to rows `numbers` of the shard that `writers` make; errors as `FieldShard.write` has them."""
        if self.copied is not None:
            self.copied.synchronize()
        for field, writer in writers.items():
            staged = self.staged.get(field)
            if staged is not None and staged.fits():
                writer.write_stored(numbers, staged.stored)
            else:  # on the CPU, of int8, or out of range: then only padding may be
                writer.write(numbers, self.values[field].cpu(), ids=ids)


@dataclass(frozen=True, slots=True)
class _Staged:
    """A field's batch in its stored form, and what says whether that form could hold it."""

    stored: Tensor  # (B, …) as `to_stored` gives it
    extremes: Tensor  # (2,) float32: the least and the largest value, padding counted; NaN if there is one
    largest: float

    def fits(self) -> bool:
        least, most = self.extremes.tolist()
        return -self.largest <= least and most <= self.largest


class Carrier:
    """Takes batches off `device`. No more than `slots` of them may be on their way: their memory is used in turn.

    `staged` is for tests: the way of a GPU, taken on the CPU.
    """

    def __init__(self, device: torch.device, specs: Mapping[str, FieldSpec], *, slots: int, staged: bool = False):
        self._cuda = device.type == "cuda"
        carried = {field: spec for field, spec in specs.items() if spec.type != "int8" and spec.kind != "target"}
        self._specs = carried if self._cuda or staged else {}  # the rest the thread that writes fetches itself
        self._slots: list[dict[str, Tensor]] = [{} for _ in range(slots)]
        self._turn = 0
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    def leave(self, values: dict[str, Tensor]) -> Carried:
        """Send `values` on their way; returns at once. They may not be written to any more."""
        ready = {
            field: (torch.stack(torch.aminmax(tensor)).float(), to_stored(tensor, self._specs[field]))
            for field, tensor in values.items()
            if field in self._specs and tensor.numel()
        }
        slot, self._turn = self._slots[self._turn], (self._turn + 1) % len(self._slots)
        if self._stream is None:
            return Carried(values, self._copy(ready, slot), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            staged = self._copy(ready, slot)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        for extremes, stored in ready.values():  # their memory is another stream's: not before the copy may it be free
            extremes.record_stream(self._stream)
            stored.record_stream(self._stream)
        return Carried(values, staged, copied)

    def _copy(self, ready: dict[str, tuple[Tensor, Tensor]], slot: dict[str, Tensor]) -> dict[str, _Staged]:
        return {
            field: _Staged(
                self._place(slot, field, stored).copy_(stored, non_blocking=self._cuda),
                self._place(slot, f"{field} extremes", extremes).copy_(extremes, non_blocking=self._cuda),
                LARGEST[self._specs[field].type],
            )
            for field, (extremes, stored) in ready.items()
        }

    def _place(self, slot: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        """Memory of the slot, used again and again, in the shape and type of `like`."""
        size = like.numel() * like.element_size()
        if name not in slot or len(slot[name]) < size:
            slot[name] = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        return slot[name][:size].view(like.dtype).view(like.shape)
