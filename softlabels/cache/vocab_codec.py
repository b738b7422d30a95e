"""How truncated logits lie on disk: `plain`, arrays that read as they are, and `packed`, half the bytes.

In: `TruncatedLogits` of T tokens. Out: plain, arrays (T, width) of narrow types by name; packed, one (T, bytes) uint8
array. And back. A token's bytes depend on (V, k, samples) alone, so its place follows from its number.

The tail is stored against the top: at each node the log-odds r = log(mass of the tail / mass of the top), and its slope
in β = 1/τ, which is the tail's mean of z less the top's. The tail's mass is then right to what r is rounded by (float16
rounding of r moves it by at most 1.1e-4), and no rounding of the top's values has a part in it. The reader adds the
log-sum-exp and mean of the top's values as they were stored. Sample weights follow from the nodes and aren't stored.

plain, a token:
    ids             k × uint16 (V ≤ 65,536) or int32    highest logit first
    values          k × float16     z − level: 0, then below. A softmax reads them as they are
    level           1 × float32     the highest logit
    tail            10 × float16    r at the five nodes, then its slopes
    sampled_ids     s × uint16 or int32
    sampled_values  s × float16     z − the smallest of the top's stored logits
all but the first two are 24 bytes and 4 (or 6) a sample: 32 with `plain_samples(V)` of them.

packed, a token, most significant bit first, with zeros up to a whole byte:
    24   the highest logit, a float32 without its last byte (rounded: relative error 2⁻¹⁷)
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softlabels.cache.codec import id_type
from softlabels.errors import CacheError, ConfigError
from softlabels.truncated import TEMPERATURES, TruncatedLogits, sample_weights

NODES = len(TEMPERATURES)
PLAIN_TAIL_BYTES = 32  # the most that a token's plain tail takes: all but ids and values
VALUE_BITS = 10
_ODDS_BITS, _SAMPLE_BITS = 13, 16
_MEAN_BITS = (9, 9, 8, 5, 4)  # at each node: the wider the interval in β, the more a slope's error matters
_ODDS = (-30.0, 15.0)  # the log-odds that are told apart
_MEAN_CELLS = 2 ** torch.tensor(_MEAN_BITS)
_BETAS = 1 / torch.tensor(TEMPERATURES, dtype=torch.float64)

Arrays = Mapping[str, np.ndarray]


# ---------------------------------------------------------------------------------------------------------- plain


def plain_samples(vocab_size: int) -> int:
    """How many sampled tail tokens `plain` has room for: 2 with 16-bit ids, 1 with 32-bit ones."""
    return (PLAIN_TAIL_BYTES - 4 - 2 * 2 * NODES) // (id_type(vocab_size).itemsize + 2)


def to_plain(truncated: TruncatedLogits) -> dict[str, np.ndarray]:
    """The arrays of the table above. CacheError: values that float16 can't hold; ConfigError: see `_check_samples`."""
    if truncated.samples > plain_samples(truncated.vocab_size):
        raise ConfigError(
            f"{truncated.samples} sampled tail tokens a position: plain has room for "
            f"{plain_samples(truncated.vocab_size)} of a vocabulary of {truncated.vocab_size} in {PLAIN_TAIL_BYTES} B; "
            f"take as many, or the packed codec"
        )
    _check_samples(truncated)
    integer = id_type(truncated.vocab_size)
    level = truncated.values[:, :1].float()
    values = _float16(truncated.values.double() - level)  # (T, K)
    stored = level.double() + torch.from_numpy(values).double().to(level.device)
    return {
        "ids": truncated.ids.cpu().numpy().astype(integer),
        "values": values,
        "level": level.cpu().numpy().astype("<f4"),
        "tail": _float16(torch.cat([*against_top(truncated)], dim=1)),
        "sampled_ids": truncated.sampled_ids.cpu().numpy().astype(integer),
        "sampled_values": _float16((truncated.sampled_values.double() - stored[:, -1:]).clamp(max=0)),
    }


def from_plain(arrays: Arrays, vocab_size: int, *, masked: int = 0) -> TruncatedLogits:
    """What `to_plain` made. CacheError: arrays that it can't have made, ids beyond the vocabulary among them."""
    ids, values, level = arrays["ids"].astype(np.int64), arrays["values"], arrays["level"]
    tail, sampled_ids = arrays["tail"], arrays["sampled_ids"].astype(np.int64)
    shapes = {name: array.shape for name, array in arrays.items()}
    if (
        len({len(array) for array in arrays.values()}) > 1
        or ids.shape != values.shape
        or sampled_ids.shape != arrays["sampled_values"].shape
        or level.shape[1:] != (1,)
        or tail.shape[1:] != (2 * NODES,)
    ):
        raise CacheError(f"plain vocabulary logits of shapes {shapes} don't fit together: {_DAMAGED}")
    _refuse(~np.isfinite(np.hstack([tail, level])).all(axis=1), "a tail that is no number")
    _refuse(values[:, 0] != 0, "a highest value that isn't 0")
    _refuse(~(values[:, 1:] <= values[:, :-1]).all(axis=1), "values that aren't sorted")
    _refuse(~np.isfinite(values[:, -1]), "infinite values")
    _check_ids(np.sort(ids, axis=1), sampled_ids, ids, vocab_size)
    gaps = torch.from_numpy(arrays["sampled_values"].astype(np.float64))
    _refuse(~((gaps <= 0) & gaps.isfinite()).all(dim=1).numpy(), "sampled values above the top's")
    absolute = torch.from_numpy(level.astype(np.float64)) + torch.from_numpy(values.astype(np.float64))
    odds = torch.from_numpy(tail.astype(np.float64))
    top_logsumexp, top_mean = _nodes(absolute)
    return _assemble(
        torch.from_numpy(ids),
        absolute,
        top_logsumexp + odds[:, :NODES],
        top_mean + odds[:, NODES:],
        torch.from_numpy(sampled_ids),
        absolute[:, -1:] + gaps,
        vocab_size=vocab_size,
        masked=masked,
    )


# --------------------------------------------------------------------------------------------------------- packed


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

    CacheError: a range of values beyond any step (10⁶ or more). ConfigError: see `_check_samples`.
    """
    packing = Packing(truncated.vocab_size, truncated.k, truncated.samples, value_bits)
    _check_samples(truncated)
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
    top_logsumexp, top_mean = _nodes(stored)
    below, above = _chords(top_logsumexp + _odds(odds_codes), stored[:, -1], truncated.tail_count)
    within = (top_mean + slopes - below) / (above - below).clamp(min=1e-12)
    mean_codes = (within.clamp(0, 1) * _MEAN_CELLS).long().clamp(max=_MEAN_CELLS - 1).numpy()
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
            "sampled_values": _float16(sampled).view(np.uint16).astype(np.int64),
        },
    )


def unpack(packed: np.ndarray, packing: Packing, *, masked: int = 0) -> TruncatedLogits:
    """What `pack` made, (T, bytes) uint8. CacheError: bytes that it can't have made; ids are always in range."""
    parts = _from_bytes(packing, packed)
    level, high = parts["level"][:, 0], parts["high"]
    _refuse(~np.isfinite(_levels(level)), "a highest logit that is no number")
    _refuse(high.sum(axis=1) != packing.k, f"a set that isn't of {packing.k} ids")
    upper = np.nonzero(high)[1].reshape(len(high), packing.k) - np.arange(packing.k)
    ids = (upper << packing.low_bits) | parts["low"]
    _check_ids(ids, parts["sampled_ids"], ids, packing.vocab_size)
    codes = parts["codes"]
    _refuse(codes.min(axis=1) != 0, "no highest value")
    order = codes.astype(np.uint16).argsort(axis=1, kind="stable")  # equal ones by id; 16 bits sort by radix
    codes, ids = np.take_along_axis(codes, order, axis=1), np.take_along_axis(ids, order, axis=1)
    values = torch.from_numpy(_levels(level)[:, None] - _steps(parts["step"][:, 0])[:, None] * codes)

    top_logsumexp, _ = _nodes(values)
    logsumexp = top_logsumexp + _odds(torch.from_numpy(parts["odds"]))
    below, above = _chords(logsumexp, values[:, -1], packing.vocab_size - packing.k - masked)
    mean_codes = np.hstack([parts[f"mean{node}"] for node in range(NODES)])
    within = (torch.from_numpy(mean_codes) + 0.5) / _MEAN_CELLS
    gaps = parts["sampled_values"].astype(np.uint16).view(np.float16)
    _refuse(~((gaps >= 0) & np.isfinite(gaps)).all(axis=1), "sampled values above the top's")
    return _assemble(
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
            f"{_DAMAGED}"
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
    _refuse(unused != 0, "something in its padding")
    return parts


# ------------------------------------------------------------------------------------------------------- rounding


@dataclass(frozen=True, slots=True)
class Rounding:
    """The most by which a codec may have moved what it keeps of each token, float64."""

    values: Tensor  # (T, K)
    odds: Tensor  # (T, N), of `against_top`
    slopes: Tensor  # (T, N)
    samples: Tensor  # (T, S), values of sampled tokens
    odds_range: tuple[float, float] = (-float("inf"), float("inf"))  # log-odds beyond are kept as its ends


def plain_rounding(read: TruncatedLogits) -> Rounding:
    """Of `read`, as `from_plain` gave it."""
    odds, slopes = against_top(read)
    exact = _read_rounding(read)
    values = _half_step(read.values.double() - read.values[:, :1].double()) + exact
    return Rounding(
        values=values,
        odds=_half_step(odds) + exact / TEMPERATURES[0],
        slopes=_half_step(slopes) + 2 * exact,
        samples=_half_step(read.sampled_values.double() - read.values[:, -1:].double()) + values[:, -1:] + exact,
    )


def packed_rounding(read: TruncatedLogits, packed: np.ndarray, packing: Packing) -> Rounding:
    """Of `read`, as `unpack` gave it from `packed`.

    A mean is kept in a cell between chords that move with the log-odds and with the top's rounding.
    """
    odds, _ = against_top(read)
    exact, level = _read_rounding(read), read.values[:, :1].double()
    step = torch.from_numpy(value_errors(packed, packing))[:, None]  # (T, 1)
    values = (step + level.abs() * 2.0**-16 + exact).expand(read.values.shape)
    off = values[:, :1]
    below, above = _chords(read.tail_logsumexp.double(), read.values[:, -1].double(), read.tail_count)
    betas = torch.cat([_BETAS, torch.zeros(1, dtype=torch.float64)])
    shift = (2 * _ODDS_OFF + 3 * off) / (betas[:-1] - betas[1:])
    top = off * (1 + _BETAS * (level - read.values[:, -1:].double()))  # by which the top's own mean may have moved
    slopes = (above - below) / (2 * _MEAN_CELLS) + shift + top
    lost = ((odds < _ODDS[0] + 2 * _ODDS_OFF) | (odds > _ODDS[1] - 2 * _ODDS_OFF)).any(dim=1, keepdim=True)
    return Rounding(
        values=values,
        odds=_ODDS_OFF + exact / TEMPERATURES[0],
        slopes=slopes.masked_fill(lost, float("inf")),
        samples=_half_step(read.sampled_values.double() - read.values[:, -1:].double()) + off + exact,
        odds_range=_ODDS,
    )


_ODDS_OFF = 0.0081  # of packed log-odds: half of the widest cell


def _half_step(numbers: Tensor) -> Tensor:
    """By how much float16 moves `numbers`, given as it left them."""
    return numbers.abs() * (2.0**-11 * 1.001) + 2.0**-25


def _read_rounding(read: TruncatedLogits) -> Tensor:
    """(T, 1): what is read is float32, a rounding of its own."""
    return read.values.double().abs().amax(dim=1, keepdim=True) * 2.0**-21


# ---------------------------------------------------------------------------------------------------------- parts


_DAMAGED = "the cache is damaged or was changed; `softlabels verify` tells which shard"


def _refuse(bad: Any, what: str) -> None:
    """CacheError for the first token of `bad` (T,)."""
    if bad.any():
        raise CacheError(f"vocabulary logits of token {int(np.argmax(bad))} of those read have {what}: {_DAMAGED}")


def _check_ids(increasing: np.ndarray, sampled: np.ndarray, ids: np.ndarray, vocab_size: int) -> None:
    """CacheError for ids out of range or twice in the top, and for sampled ones out of range or in the top."""
    _refuse((increasing[:, 0] < 0) | (increasing[:, -1] >= vocab_size), f"ids beyond {vocab_size}")
    _refuse((increasing[:, 1:] <= increasing[:, :-1]).any(axis=1), "ids that come twice")
    if sampled.shape[1]:
        _refuse(((sampled < 0) | (sampled >= vocab_size)).any(axis=1), f"sampled ids beyond {vocab_size}")
        _refuse((sampled[:, :, None] == ids[:, None, :]).any(axis=(1, 2)), "a sampled id that is in its top")


def _check_samples(truncated: TruncatedLogits) -> None:
    """ConfigError unless the samples' weights are those that the reader will compute."""
    known = sample_weights(truncated.sampled_values, truncated.tail_logsumexp)
    if not torch.allclose(known, truncated.sampled_weights, rtol=1e-2, atol=0):
        raise ConfigError(
            "sampled tail tokens whose weights aren't as drawn: encode logits as `truncate` gives them, and let "
            "the reader `use_fewer`"
        )


def _assemble(ids, values, logsumexp, mean, sampled_ids, sampled_values, *, vocab_size, masked) -> TruncatedLogits:
    """float32 tensors from float64 ones, and the samples' weights."""
    if not 0 <= masked < vocab_size - ids.shape[1]:
        raise CacheError(f"{masked} padded columns of {vocab_size} leave no tail to a top {ids.shape[1]}: {_DAMAGED}")
    return TruncatedLogits(
        ids=ids,
        values=values.float(),
        tail_logsumexp=logsumexp.float(),
        tail_mean=mean.float(),
        sampled_ids=sampled_ids,
        sampled_values=sampled_values.float(),
        sampled_weights=sample_weights(sampled_values, logsumexp).float(),
        vocab_size=vocab_size,
        masked=masked,
    )


def _nodes(values: Tensor) -> tuple[Tensor, Tensor]:
    """(T, N) log-sum-exp of z/τ, and mean of z, of the top `values` (T, K), highest first, float64."""
    below = values - values[:, :1]
    weights = (below[:, None, :] * _BETAS.to(values.device)[:, None]).exp()  # (T, N, K)
    total = weights.sum(dim=2)
    mean = (weights * below[:, None, :]).sum(dim=2) / total
    return total.log() + values[:, :1] * _BETAS.to(values.device), mean + values[:, :1]


def against_top(truncated: TruncatedLogits) -> tuple[Tensor, Tensor]:
    """(T, N) log-odds of the tail's mass against the top's, and their slopes in β, float64."""
    logsumexp, mean = _nodes(truncated.values.double())
    return truncated.tail_logsumexp.double() - logsumexp, truncated.tail_mean.double() - mean


def _float16(numbers: Tensor) -> np.ndarray:
    stored = numbers.cpu().numpy()
    if stored.size and not np.abs(stored).max() <= np.finfo(np.float16).max:
        raise CacheError(
            f"vocabulary logits that lie {np.abs(stored).max():.6g} apart: float16 holds 65,504. Nothing was stored; "
            f"mend the teacher, or keep 'vocab:exact'"
        )
    return stored.astype("<f2")


def _cells(odds: Tensor) -> Tensor:
    """How many cells lie below each log-odds; their density is what the mass needs plus what the logarithm needs."""
    low, high = (60 * torch.tensor(end, dtype=torch.float64).sigmoid() + 0.69 * end for end in _ODDS)
    return (60 * odds.double().sigmoid() + 0.69 * odds - low) / (high - low) * (1 << _ODDS_BITS)


def _odds_codes(odds: Tensor) -> Tensor:
    return _cells(odds.clamp(*_ODDS)).long().clamp(max=(1 << _ODDS_BITS) - 1)


def _odds(codes: Tensor) -> Tensor:
    """Log-odds at the middle of each code's cell."""
    return _odds_table()[codes]


@cache
def _odds_table() -> Tensor:
    """(8192,) by bisection: `_cells` has no closed inverse."""
    low, high = (torch.full((1 << _ODDS_BITS,), end, dtype=torch.float64) for end in _ODDS)
    middles = torch.arange(1 << _ODDS_BITS) + 0.5
    for _ in range(50):
        middle = (low + high) / 2
        above = _cells(middle) > middles
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low


def _chords(logsumexp: Tensor, smallest: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(T, N) the least and the most that f' can be at each node: the slopes of the chords to its neighbours.

    f is convex. Beyond the coldest node the most is the `smallest` (T,) of the top: no tail token is higher.
    """
    start = torch.full_like(logsumexp[:, :1], float(np.log(count)))
    points = torch.cat([logsumexp, start], dim=1)  # at the nodes, then at β = 0
    betas = torch.cat([_BETAS, torch.zeros(1, dtype=torch.float64)])
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
