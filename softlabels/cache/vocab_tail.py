"""What both codecs of truncated logits share: the tail against the top, and what neither accepts.

In: the parts of `TruncatedLogits`, from a teacher or from disk. Out: numbers to store, and back.

The tail is stored against the top: at each node the log-odds r = log(mass of the tail / mass of the top), and its slope
in β = 1/τ, which is the tail's mean of z less the top's. The tail's mass is then right to what r is rounded by, and no
rounding of the top's values has a part in it. The reader adds the log-sum-exp and mean of the top's values as they were
stored. Sample weights follow from the nodes and aren't stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from softlabels.errors import CacheError, ConfigError
from softlabels.truncated import TEMPERATURES, TruncatedLogits, sample_weights

NODES = len(TEMPERATURES)
BETAS = 1 / torch.tensor(TEMPERATURES, dtype=torch.float64)
DAMAGED = "the cache is damaged or was changed; `softlabels verify` tells which shard"


def refuse(bad: Any, what: str) -> None:
    """CacheError for the first token of `bad` (T,)."""
    if bad.any():
        raise CacheError(f"vocabulary logits of token {int(np.argmax(bad))} of those read have {what}: {DAMAGED}")


def check_ids(increasing: np.ndarray, sampled: np.ndarray, ids: np.ndarray, vocab_size: int) -> None:
    """CacheError for ids out of range or twice in the top, and for sampled ones out of range or in the top."""
    refuse((increasing[:, 0] < 0) | (increasing[:, -1] >= vocab_size), f"ids beyond {vocab_size}")
    refuse((increasing[:, 1:] <= increasing[:, :-1]).any(axis=1), "ids that come twice")
    if sampled.shape[1]:
        refuse(((sampled < 0) | (sampled >= vocab_size)).any(axis=1), f"sampled ids beyond {vocab_size}")
        refuse((sampled[:, :, None] == ids[:, None, :]).any(axis=(1, 2)), "a sampled id that is in its top")


def check_samples(truncated: TruncatedLogits) -> None:
    """ConfigError unless the samples' weights are those that the reader will compute."""
    known = sample_weights(truncated.sampled_values, truncated.tail_logsumexp)
    if not torch.allclose(known, truncated.sampled_weights, rtol=1e-2, atol=0):
        raise ConfigError(
            "sampled tail tokens whose weights aren't as drawn: encode logits as `truncate` gives them, and let "
            "the reader `use_fewer`"
        )


def assemble(ids, values, logsumexp, mean, sampled_ids, sampled_values, *, vocab_size, masked) -> TruncatedLogits:
    """float32 tensors from float64 ones, and the samples' weights."""
    if not 0 <= masked < vocab_size - ids.shape[1]:
        raise CacheError(f"{masked} padded columns of {vocab_size} leave no tail to a top {ids.shape[1]}: {DAMAGED}")
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


def top_nodes(values: Tensor) -> tuple[Tensor, Tensor]:
    """(T, N) log-sum-exp of z/τ, and mean of z, of the top `values` (T, K), highest first, float64."""
    below = values - values[:, :1]
    weights = (below[:, None, :] * BETAS.to(values.device)[:, None]).exp()  # (T, N, K)
    total = weights.sum(dim=2)
    mean = (weights * below[:, None, :]).sum(dim=2) / total
    return total.log() + values[:, :1] * BETAS.to(values.device), mean + values[:, :1]


def against_top(truncated: TruncatedLogits) -> tuple[Tensor, Tensor]:
    """(T, N) log-odds of the tail's mass against the top's, and their slopes in β, float64."""
    logsumexp, mean = top_nodes(truncated.values.double())
    return truncated.tail_logsumexp.double() - logsumexp, truncated.tail_mean.double() - mean


def to_float16(numbers: Tensor) -> np.ndarray:
    stored = numbers.cpu().numpy()
    if stored.size and not np.abs(stored).max() <= np.finfo(np.float16).max:
        raise CacheError(
            f"vocabulary logits that lie {np.abs(stored).max():.6g} apart: float16 holds 65,504. Nothing was stored; "
            f"mend the teacher, or keep 'vocab:exact'"
        )
    return stored.astype("<f2")
