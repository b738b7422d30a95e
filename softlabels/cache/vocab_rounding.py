"""By how much the codecs of truncated logits may have moved what they keep: a cache is held to that by its teacher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softlabels.cache.vocab_packed import MEAN_CELLS, ODDS, Packing, chords, value_errors
from softlabels.cache.vocab_tail import BETAS, against_top
from softlabels.truncated import TEMPERATURES, TruncatedLogits


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
    below, above = chords(read.tail_logsumexp.double(), read.values[:, -1].double(), read.tail_count)
    betas = torch.cat([BETAS, torch.zeros(1, dtype=torch.float64)])
    shift = (2 * _ODDS_OFF + 3 * off) / (betas[:-1] - betas[1:])
    top = off * (1 + BETAS * (level - read.values[:, -1:].double()))  # by which the top's own mean may have moved
    slopes = (above - below) / (2 * MEAN_CELLS) + shift + top
    lost = ((odds < ODDS[0] + 2 * _ODDS_OFF) | (odds > ODDS[1] - 2 * _ODDS_OFF)).any(dim=1, keepdim=True)
    return Rounding(
        values=values,
        odds=_ODDS_OFF + exact / TEMPERATURES[0],
        slopes=slopes.masked_fill(lost, float("inf")),
        samples=_half_step(read.sampled_values.double() - read.values[:, -1:].double()) + off + exact,
        odds_range=ODDS,
    )


_ODDS_OFF = 0.0081  # of packed log-odds: half of the widest cell


def _half_step(numbers: Tensor) -> Tensor:
    """By how much float16 moves `numbers`, given as it left them."""
    return numbers.abs() * (2.0**-11 * 1.001) + 2.0**-25


def _read_rounding(read: TruncatedLogits) -> Tensor:
    """(T, 1): what is read is float32, a rounding of its own."""
    return read.values.double().abs().amax(dim=1, keepdim=True) * 2.0**-21
