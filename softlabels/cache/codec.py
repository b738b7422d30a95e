"""How a field's values lie on disk: the element types, what a value loses in them, and what they refuse.

Padded batches as the teacher gives them come in, arrays of stored elements go out; and back, for the reader. The format
says what the elements mean; how int8's channel scales are chosen is said here, since a reader need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.errors import CacheError

Overflow = Literal["refuse", "clip"]

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),  # neither numpy nor Arrow has the type: its bits
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
}
LARGEST = {
    "float32": torch.finfo(torch.float32).max,
    "float16": torch.finfo(torch.float16).max,
    "bfloat16": torch.finfo(torch.bfloat16).max,
    "int8": 1e30,  # any number would do for the scales; this one keeps their arithmetic finite
}
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAMPLE = 1024  # vectors from which the channel scales of an int8 shard are measured


def id_type(vocab_size: int) -> np.dtype:
    """How token ids of such a vocabulary are stored: the narrowest integer of whole bytes that reads fast."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch in its stored form."""

    values: np.ndarray  # (B, …) of the type in DTYPES
    scales: np.ndarray | None  # int8: (B, L) of a token field, (B,) of a row field, float32


def fits(values: Tensor, spec: FieldSpec) -> bool:
    """Whether all of `values`, padding too, is within the field's type: one pass that makes nothing. NaN never is.

    Where it says no, `in_range` finds out what is wrong: often only padding, which may hold anything.
    """
    if not values.numel():
        return True
    least, most = torch.aminmax(values)
    return -LARGEST[spec.type] <= float(least) and float(most) <= LARGEST[spec.type]


def in_range(
    values: Tensor, spec: FieldSpec, *, field: str, ids: Sequence[str], overflow: Overflow
) -> tuple[Tensor, int]:
    """`values` (B, …) with nothing beyond the field's type, and how many were clipped for it.

    What is beyond (±65,504 for float16) is refused, by a CacheError that names the examples, or set to the largest
    value and counted. NaN and infinities are always refused: they are the sign of a broken teacher, and one of them
    would spoil a whole training.
    """
    largest = LARGEST[spec.type]
    flat = values.reshape(len(values), -1)
    worst = flat.abs().amax(dim=1)  # (B,); NaN spreads
    bad = ~(worst <= largest)
    if not bool(bad.any()):
        return values, 0
    infinite = ~torch.isfinite(worst)
    if bool(infinite.any()):
        raise CacheError(
            f"the teacher gave NaN or infinite values in field '{field}' for example(s) {_names(infinite, ids)}: its "
            f"weights or its precision are broken. Nothing was stored for their shard; mend the teacher or try "
            f"--dtype float32"
        )
    if overflow == "refuse":
        others = "--codec float32 or bfloat16" if spec.type != "float32" else "--dtype float32"
        raise CacheError(
            f"field '{field}' has values beyond ±{largest:.6g}, which {spec.type} cannot hold, in example(s) "
            f"{_names(bad, ids)}: dump with {others}, or clip and count them with --overflow clip"
        )
    return values.clamp(-largest, largest), int((flat[bad].abs() > largest).sum())


def encode(values: Tensor, spec: FieldSpec, *, channels: np.ndarray | None = None) -> Encoded:
    """`values` (B, …), all `in_range`, in the field's type, on the CPU.

    Relative rounding error of a value: float16 2⁻¹¹, bfloat16 2⁻⁸ (to nearest, ties to even). int8 needs `channels`
    (width,), see `measure_channels`: a vector x is stored as q = round(x / channels / scale) with scale =
    max|x / channels| / 127, so nothing is ever clipped, whatever the channels.
    """
    if spec.type != "int8":
        return Encoded(to_stored(values, spec).cpu().contiguous().numpy().view(DTYPES[spec.type]), None)
    assert channels is not None
    scaled = values.float() / torch.from_numpy(channels).to(values.device)
    scale = scaled.abs().amax(dim=-1) / 127  # (B, L) or (B,)
    divisor = torch.where(scale > 0, scale, 1.0)[..., None]  # a vector of zeros stays one
    quantised = (scaled / divisor).round().clamp(-127, 127).to(torch.int8)
    return Encoded(quantised.cpu().contiguous().numpy(), scale.cpu().contiguous().numpy())


def to_stored(values: Tensor, spec: FieldSpec) -> Tensor:
    """`values`, all `in_range`, as `encode` stores them, on the device where they are; not for int8.

    bfloat16 comes as the int16 of its bits.
    """
    stored = values.to(_TORCH[spec.type])
    return stored.view(torch.int16) if spec.type == "bfloat16" else stored


def rounding(values: Tensor, spec: FieldSpec, *, channels: np.ndarray | None = None) -> Tensor:
    """The most by which `encode` and `decode` may move each of `values`, which are `in_range`: half a step of the type.

    int8 needs the shard's `channels` (width,); the last dimension of `values` is then a vector's.
    """
    sizes = values.abs()
    if spec.type == "int8":
        assert channels is not None
        scales = torch.from_numpy(channels).to(values.device)
        steps = (sizes / scales).amax(dim=-1, keepdim=True) / 127 * scales
        return steps * 0.501  # a scale is rounded to float32
    if spec.type == "float16":
        return sizes * 2.0**-11 + 2.0**-25
    return sizes * 2.0**-8 if spec.type == "bfloat16" else torch.zeros_like(sizes)


def decode(
    stored: np.ndarray,
    spec: FieldSpec,
    *,
    scales: np.ndarray | None = None,
    channels: np.ndarray | None = None,
) -> Tensor:
    """Stored elements as float32. int8: `scales` is (B, L) or (B,); `channels` (B or 1, width), of each row's shard."""
    if spec.type == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).float()
    values = torch.from_numpy(stored).float()
    if spec.type != "int8":
        return values
    assert scales is not None and channels is not None
    by_row = torch.from_numpy(channels).reshape(len(channels), *[1] * (values.ndim - 2), -1)
    return values.mul_(torch.from_numpy(scales)[..., None]).mul_(by_row)


def measure_channels(sample: Sequence[np.ndarray], width: int) -> np.ndarray:
    """(width,) float32: how large each channel is beside the others, from the first SAMPLE vectors of a shard.

    It is the root mean square over vectors scaled to length 1. A channel's maximum would follow a single huge token,
    which is what the scale of a token is for: on MiniLM's hidden states this leaves 0.75 % error, maxima 0.76 to
    0.94 %; with one token of 3,000 in one channel, 0.75 against 2.9 %. Quiet channels count as at least a quarter of
    the median, so that one that wakes up after the sample costs its token two bits. Computed in float64 and rounded
    to 8 significant bits, so that no order of summation shows in the bytes.
    """
    vectors = np.concatenate([part.reshape(-1, width) for part in sample])[:SAMPLE].astype(np.float64)
    lengths = np.sqrt(np.square(vectors).sum(axis=1))
    vectors = vectors[lengths > 0] / lengths[lengths > 0, None]
    if not len(vectors):
        return np.ones(width, np.float32)
    size = np.sqrt(np.square(vectors).mean(axis=0))
    size = np.maximum(size, max(np.median(size) / 4, size.mean() / 1024))
    return torch.from_numpy(size).to(torch.bfloat16).float().numpy()


def without_padding(values: Tensor, spec: FieldSpec, lengths: np.ndarray) -> Tensor:
    """Zero where there is only padding, which is never stored and may hold anything, NaN included."""
    if spec.kind == "row":
        return values
    inside = torch.arange(values.shape[-1 if spec.kind == "pair" else 1], device=values.device)
    real = inside < torch.from_numpy(lengths).to(values.device)[:, None]  # (B, L)
    if spec.kind == "token":
        return values.masked_fill(~real[:, :, None], 0.0)
    return values.masked_fill(~(real[:, None, :, None] & real[:, None, None, :]), 0.0)


def _names(rows: Tensor, ids: Sequence[str]) -> str:
    numbers = rows.nonzero().flatten().tolist()
    return ", ".join(ids[row] for row in numbers[:5]) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
