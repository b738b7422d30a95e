"""Truncated logits `packed`: 111 bytes a token for the top 32 of 50,257, tail and a sampled token included.

In: `TruncatedLogits` of T tokens. Out: one (T, bytes) uint8 array, and back. A token's bytes depend on (V, k, samples,
value_bits) alone, `Packing`, so its place follows from its number. No Python runs per token.

A token's bits, most significant first, with zeros up to a whole byte; r and f(β) as in vocab_tail.py and truncated.py:

    24   the highest logit, a float32 without its last byte (rounded: relative error 2⁻¹⁶)
     8   b: the step of the values is 2^(b/8 − 20)
    65   r at the nodes, −30 to 15, in 8,192 cells equal in C(r) = 60·sigmoid(r) + 0.69·r: the tail's mass is within
         9e-5, and where it is near 0 or 1 r is still within 0.0081, for what lies between the nodes
    35   the tail's means at the nodes, of 9, 9, 8, 5 and 4 bits: equal cells of what convexity leaves, the interval
         between the slopes of the chords of f(β)
    ids, the set in increasing order, Elias-Fano: u bits, then k × l lower bits. Bit (id >> l) + i of the u is set for
         the i-th id. l is what makes (V, k) smallest; 0.6 bits an id above the entropy of such a set
    k × value_bits   steps below the highest logit, in order of ids. The order of the top is that of the values, equal
         ones by id
    s × (⌈log2 V⌉ + 16)   sampled ids, then how far each lies below the smallest of the top, float16
The step is as small as the token's range allows. With 10 bits values are within 0.02 for a range z_1 − z_k up to 37,
with 9 bits up to 18; beyond, the step widens: `value_errors` tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from softlabels.cache.vocab_tail import (
    BETAS,
    DAMAGED,
    NODES,
    against_top,
    assemble,
    check_ids,
    check_samples,
    refuse,
    to_float16,
    top_nodes,
)
from softlabels.errors import CacheError, ConfigError
from softlabels.truncated import TruncatedLogits

VALUE_BITS = 10
_ODDS_BITS, _SAMPLE_BITS = 13, 16
_MEAN_BITS = (9, 9, 8, 5, 4)  # at each node: the wider the interval in β, the more a slope's error matters
ODDS = (-30.0, 15.0)  # the log-odds that are told apart
MEAN_CELLS = 2 ** torch.tensor(_MEAN_BITS)


@dataclass(frozen=True)
class Packing:
    """The layout of packed tokens: what has to be known to read them, and what follows from it."""

    vocab_size: int
    k: int
    samples: int = 0
    value_bits: int = VALUE_BITS

    def __post_init__(self) -> None:
        if not (1 <= self.k < self.vocab_size <= 1 << 25 and self.samples >= 0 and 1 <= self.value_bits <= 16):
            raise ConfigError(f"{self} can't be: 1 ≤ k < vocab_size ≤ 2²⁵, samples ≥ 0, 1 to 16 value bits")

    @cached_property
    def low_bits(self) -> int:
        """l, the smallest of those that give the fewest bits."""
        return min(range(32), key=lambda bits: self.k * bits + ((self.vocab_size - 1) >> bits))

    @property
    def high_bits(self) -> int:
        return self.k + ((self.vocab_size - 1) >> self.low_bits)

    @cached_property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(count, bits of each) of the parts, in order."""
        return {
            "level": (1, 24),
            "step": (1, 8),
            "odds": (NODES, _ODDS_BITS),
            **{f"mean{node}": (1, bits) for node, bits in enumerate(_MEAN_BITS)},
            "high": (self.high_bits, 1),
            "low": (self.k, self.low_bits),
            "codes": (self.k, self.value_bits),
            "sampled_ids": (self.samples, (self.vocab_size - 1).bit_length()),
            "sampled_values": (self.samples, _SAMPLE_BITS),
        }

    @property
    def bits(self) -> int:
        return sum(count * bits for count, bits in self.widths.values())

    @property
    def bytes(self) -> int:
        """A token's."""
        return -(-self.bits // 8)


def packed_samples(vocab_size: int, k: int, *, room: int, value_bits: int = VALUE_BITS) -> int:
    """How many sampled tail tokens fit into `room` bytes a token; ConfigError where not even none does."""
    bare = Packing(vocab_size, k, 0, value_bits)
    if bare.bytes > room:
        raise ConfigError(f"packed top {k} of {vocab_size} takes {bare.bytes} B a token, more than {room}")
    return (room * 8 - bare.bits) // ((vocab_size - 1).bit_length() + _SAMPLE_BITS)


def pack(truncated: TruncatedLogits, *, value_bits: int = VALUE_BITS) -> np.ndarray:
    """(T, bytes) uint8, `Packing(V, k, samples, value_bits).bytes` wide.

    CacheError: a range of values beyond any step (10⁶ or more). ConfigError: see `check_samples`.
    """
    packing = Packing(truncated.vocab_size, truncated.k, truncated.samples, value_bits)
    check_samples(truncated)
    order = truncated.ids.argsort(dim=1)
    ids = truncated.ids.gather(1, order).cpu().numpy()  # (T, K), increasing
    values = truncated.values.double()
    level = _round_level(truncated.values[:, 0].float().cpu().numpy())
    gaps = (values[:, :1] - values).gather(1, order).cpu().numpy()  # (T, K)
    step_codes = _step_codes(gaps.max(axis=1, initial=0), packing)
    steps = _steps(step_codes)
    codes = np.minimum(np.rint(gaps / steps[:, None]), (1 << value_bits) - 1).astype(np.int64)
    stored = torch.from_numpy(_levels(level)[:, None] - steps[:, None] * np.sort(codes, axis=1))  # as unpack has it

    odds, slopes = (part.cpu() for part in against_top(truncated))
    odds_codes = _odds_codes(odds)
    top_logsumexp, top_mean = top_nodes(stored)
    below, above = chords(top_logsumexp + _odds(odds_codes), stored[:, -1], truncated.tail_count)
    within = (top_mean + slopes - below) / (above - below).clamp(min=1e-12)
    mean_codes = (within.clamp(0, 1) * MEAN_CELLS).long().clamp(max=MEAN_CELLS - 1).numpy()
    sampled = (stored[:, -1:] - truncated.sampled_values.double().cpu()).clamp(min=0)
    high = np.zeros((len(ids), packing.high_bits), np.uint8)
    np.put_along_axis(high, (ids >> packing.low_bits) + np.arange(packing.k), 1, axis=1)
    return _to_bytes(
        packing,
        {
            "level": level[:, None],
            "step": step_codes[:, None],
            "odds": odds_codes.numpy(),
            **{f"mean{node}": mean_codes[:, node : node + 1] for node in range(NODES)},
            "high": high,
            "low": ids & ((1 << packing.low_bits) - 1),
            "codes": codes,
            "sampled_ids": truncated.sampled_ids.cpu().numpy(),
            "sampled_values": to_float16(sampled).view(np.uint16).astype(np.int64),
        },
    )


def unpack(packed: np.ndarray, packing: Packing, *, masked: int = 0) -> TruncatedLogits:
    """What `pack` made, (T, bytes) uint8. CacheError: bytes that it can't have made; ids are always in range."""
    parts = _from_bytes(packing, packed)
    level, high = parts["level"][:, 0], parts["high"]
    refuse(~np.isfinite(_levels(level)), "a highest logit that is no number")
    refuse(high.sum(axis=1) != packing.k, f"a set that isn't of {packing.k} ids")
    upper = np.nonzero(high)[1].reshape(len(high), packing.k) - np.arange(packing.k)
    ids = (upper << packing.low_bits) | parts["low"]
    check_ids(ids, parts["sampled_ids"], ids, packing.vocab_size)
    codes = parts["codes"]
    refuse(codes.min(axis=1) != 0, "no highest value")
    order = codes.astype(np.uint16).argsort(axis=1, kind="stable")  # equal ones by id; 16 bits sort by radix
    codes, ids = np.take_along_axis(codes, order, axis=1), np.take_along_axis(ids, order, axis=1)
    values = torch.from_numpy(_levels(level)[:, None] - _steps(parts["step"][:, 0])[:, None] * codes)

    top_logsumexp, _ = top_nodes(values)
    logsumexp = top_logsumexp + _odds(torch.from_numpy(parts["odds"]))
    below, above = chords(logsumexp, values[:, -1], packing.vocab_size - packing.k - masked)
    mean_codes = np.hstack([parts[f"mean{node}"] for node in range(NODES)])
    within = (torch.from_numpy(mean_codes) + 0.5) / MEAN_CELLS
    gaps = parts["sampled_values"].astype(np.uint16).view(np.float16)
    refuse(~((gaps >= 0) & np.isfinite(gaps)).all(axis=1), "sampled values above the top's")
    return assemble(
        torch.from_numpy(ids),
        values,
        logsumexp,
        below + within * (above - below),
        torch.from_numpy(parts["sampled_ids"]),
        values[:, -1:] - torch.from_numpy(gaps.astype(np.float64)),
        vocab_size=packing.vocab_size,
        masked=masked,
    )


def value_errors(packed: np.ndarray, packing: Packing) -> np.ndarray:
    """(T,) the most by which a token's values may be off against its highest: half its step."""
    return _steps(_from_bytes(packing, packed)["step"][:, 0]) / 2


def _to_bytes(packing: Packing, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    bits = np.zeros((len(parts["level"]), packing.bytes * 8), np.uint8)
    start = 0
    for name, (count, width) in packing.widths.items():
        shifts = np.arange(width - 1, -1, -1)
        bits[:, start : start + count * width] = ((parts[name][:, :, None] >> shifts) & 1).reshape(
            len(bits), count * width
        )
        start += count * width
    return np.packbits(bits, axis=1)


def _from_bytes(packing: Packing, packed: np.ndarray) -> dict[str, np.ndarray]:
    """Each part as (T, count) int64."""
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != packing.bytes:
        raise CacheError(
            f"packed vocabulary logits are {packed.shape} {packed.dtype}; {packing} has {packing.bytes} bytes a token: "
            f"{DAMAGED}"
        )
    padded = np.pad(packed, ((0, 0), (0, 3))).astype(np.uint32)
    words = padded[:, :-3] << 24 | padded[:, 1:-2] << 16 | padded[:, 2:-1] << 8 | padded[:, 3:]  # from every byte on
    parts, start = {}, 0
    for name, (count, width) in packing.widths.items():
        places = start + width * np.arange(count)
        shifts = (32 - width - places % 8).astype(np.uint32)
        parts[name] = ((words[:, places // 8] >> shifts) & np.uint32((1 << width) - 1)).astype(np.int64)
        start += count * width
    unused = packed[:, -1] & ((1 << (-start % 8)) - 1)
    refuse(unused != 0, "something in its padding")
    return parts


# ---------------------------------------------------------------------------------------------------------- parts


def _cells(odds: Tensor) -> Tensor:
    """How many cells lie below each log-odds; their density is what the mass needs plus what the logarithm needs."""
    low, high = (60 * torch.tensor(end, dtype=torch.float64).sigmoid() + 0.69 * end for end in ODDS)
    return (60 * odds.double().sigmoid() + 0.69 * odds - low) / (high - low) * (1 << _ODDS_BITS)


def _odds_codes(odds: Tensor) -> Tensor:
    return _cells(odds.clamp(*ODDS)).long().clamp(max=(1 << _ODDS_BITS) - 1)


def _odds(codes: Tensor) -> Tensor:
    """Log-odds at the middle of each code's cell."""
    return _odds_table()[codes]


@cache
def _odds_table() -> Tensor:
    """(8192,) by bisection: `_cells` has no closed inverse."""
    low, high = (torch.full((1 << _ODDS_BITS,), end, dtype=torch.float64) for end in ODDS)
    middles = torch.arange(1 << _ODDS_BITS) + 0.5
    for _ in range(50):
        middle = (low + high) / 2
        above = _cells(middle) > middles
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low


def chords(logsumexp: Tensor, smallest: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(T, N) the least and the most that f' can be at each node: the slopes of the chords to its neighbours.

    f is convex. Beyond the coldest node the most is the `smallest` (T,) of the top: no tail token is higher.
    """
    start = torch.full_like(logsumexp[:, :1], float(np.log(count)))
    points = torch.cat([logsumexp, start], dim=1)  # at the nodes, then at β = 0
    betas = torch.cat([BETAS, torch.zeros(1, dtype=torch.float64)])
    chords = (points[:, :-1] - points[:, 1:]) / (betas[:-1] - betas[1:])  # (T, N), from each node to the next hotter
    above = torch.cat([torch.maximum(smallest[:, None], chords[:, :1]), chords[:, :-1]], dim=1)
    return chords, torch.maximum(above, chords)


def _step_codes(ranges: np.ndarray, packing: Packing) -> np.ndarray:
    """(T,) the number of the smallest step that spans each of `ranges` (T,)."""
    wanted = ranges / ((1 << packing.value_bits) - 1)
    codes = np.ceil(8 * (np.log2(np.maximum(wanted, 2.0**-20)) + 20)).astype(np.int64)
    if codes.size and codes.max() > 255:
        raise CacheError(
            f"top logits that lie {ranges.max():.6g} apart: no step of the packed codec is as wide. Nothing was "
            f"stored; mend the teacher, or keep 'vocab:exact'"
        )
    return codes


def _steps(codes: np.ndarray) -> np.ndarray:
    return 2.0 ** (codes / 8 - 20)


def _round_level(levels: np.ndarray) -> np.ndarray:
    """(T,) the upper 24 bits of each float32, rounded."""
    return ((levels.astype("<f4").view("<u4").astype(np.int64) + 0x80) >> 8) & 0xFFFFFF


def _levels(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.uint32) << np.uint32(8)).view(np.float32).astype(np.float64)
