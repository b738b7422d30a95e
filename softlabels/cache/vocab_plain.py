"""Truncated logits as `plain` arrays: narrow types that read without decoding.

In: `TruncatedLogits` of T tokens. Out: arrays (T, width) by name, and back. A token:

    ids             k × uint16 (V ≤ 65,536) or int32    highest logit first
    values          k × float16     z − level: 0, then below. A softmax reads them as they are
    level           1 × float32     the highest logit
    tail            10 × float16    log-odds r of the tail at the five nodes, then its slopes (see vocab_tail.py)
    sampled_ids     s × uint16 or int32
    sampled_values  s × float16     z − the smallest of the top's stored logits
All but the first two are 24 bytes and 4 (or 6) a sample: at most 32 with `plain_samples(V)` of them. Rounding r to
float16 moves the tail's mass by at most 1.1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from softlabels.cache.codec import id_type
from softlabels.cache.vocab_tail import (
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

TAIL_BYTES = 32  # the most that a token's tail takes: all but ids and values

Arrays = Mapping[str, np.ndarray]


def plain_samples(vocab_size: int) -> int:
    """How many sampled tail tokens `plain` has room for: 2 with 16-bit ids, 1 with 32-bit ones."""
    return (TAIL_BYTES - 4 - 2 * 2 * NODES) // (id_type(vocab_size).itemsize + 2)


def to_plain(truncated: TruncatedLogits) -> dict[str, np.ndarray]:
    """The arrays of the table above. CacheError: values that float16 can't hold; ConfigError: see `check_samples`."""
    if truncated.samples > plain_samples(truncated.vocab_size):
        raise ConfigError(
            f"{truncated.samples} sampled tail tokens a position: plain has room for "
            f"{plain_samples(truncated.vocab_size)} of a vocabulary of {truncated.vocab_size} in {TAIL_BYTES} B; "
            f"take as many, or the packed codec"
        )
    check_samples(truncated)
    integer = id_type(truncated.vocab_size)
    level = truncated.values[:, :1].float()
    values = to_float16(truncated.values.double() - level)  # (T, K)
    stored = level.double() + torch.from_numpy(values).double().to(level.device)
    return {
        "ids": truncated.ids.cpu().numpy().astype(integer),
        "values": values,
        "level": level.cpu().numpy().astype("<f4"),
        "tail": to_float16(torch.cat([*against_top(truncated)], dim=1)),
        "sampled_ids": truncated.sampled_ids.cpu().numpy().astype(integer),
        "sampled_values": to_float16((truncated.sampled_values.double() - stored[:, -1:]).clamp(max=0)),
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
        raise CacheError(f"plain vocabulary logits of shapes {shapes} don't fit together: {DAMAGED}")
    refuse(~np.isfinite(np.hstack([tail, level])).all(axis=1), "a tail that is no number")
    refuse(values[:, 0] != 0, "a highest value that isn't 0")
    refuse(~(values[:, 1:] <= values[:, :-1]).all(axis=1), "values that aren't sorted")
    refuse(~np.isfinite(values[:, -1]), "infinite values")
    check_ids(np.sort(ids, axis=1), sampled_ids, ids, vocab_size)
    gaps = torch.from_numpy(arrays["sampled_values"].astype(np.float64))
    refuse(~((gaps <= 0) & gaps.isfinite()).all(dim=1).numpy(), "sampled values above the top's")
    absolute = torch.from_numpy(level.astype(np.float64)) + torch.from_numpy(values.astype(np.float64))
    odds = torch.from_numpy(tail.astype(np.float64))
    top_logsumexp, top_mean = top_nodes(absolute)
    return assemble(
        torch.from_numpy(ids),
        absolute,
        top_logsumexp + odds[:, :NODES],
        top_mean + odds[:, NODES:],
        torch.from_numpy(sampled_ids),
        absolute[:, -1:] + gaps,
        vocab_size=vocab_size,
        masked=masked,
    )
