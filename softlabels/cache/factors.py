"""teacher/factors.safetensors: what a teacher's logits usually look like, for the tails of truncated ones."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from softlabels.cache.files import write_file
from softlabels.cache.inside import read_tensors
from softlabels.errors import CacheError
from softlabels.factors import LogitFactors

FACTORS = "factors.safetensors"


def save_factors(folder: Path, factors: LogitFactors) -> None:
    """Write the factors into the cache at `folder`, whole or not at all; those that are there are left.

    CacheError where float16 can't hold them.
    """
    path = folder / "teacher" / FACTORS
    if path.is_file():
        return
    loadings = factors.loadings.half().contiguous()
    if not bool(torch.isfinite(loadings).all()):
        raise CacheError(
            f"logits that vary by {float(factors.loadings.abs().max()):.6g}: float16 holds 65,504. Nothing was stored; "
            f"mend the teacher, or leave factors out of --capture vocab:topk=…"
        )
    write_file(path, save({"mean": factors.mean.contiguous(), "loadings": loadings, "noise": factors.noise}))


def factors_size(vocab_size: int, rank: int) -> int:
    """Bytes of the numbers of `rank` factors: the file has a header beside them."""
    return vocab_size * (2 * rank + 8)


def load_factors(folder: Path, *, vocab_size: int, rank: int) -> LogitFactors:
    """The factors, at most `rank`, of the cache at `folder`; CacheError where they are missing or not right."""
    path = folder / "teacher" / FACTORS
    most = factors_size(vocab_size, rank) + (1 << 20)
    tensors = read_tensors(folder, FACTORS, most=most, what=f"{rank} factors of {vocab_size} tokens")
    mean, loadings, noise = tensors.get("mean"), tensors.get("loadings"), tensors.get("noise")
    if mean is None or loadings is None or noise is None:
        raise CacheError(f"{path} is damaged: it lacks mean, loadings or noise")
    right = mean.dtype == noise.dtype == torch.float32 and loadings.dtype == torch.float16
    right = right and mean.shape == noise.shape == (vocab_size,)
    right = right and loadings.ndim == 2 and len(loadings) == vocab_size and loadings.shape[1] <= rank
    if not right:
        raise CacheError(f"{path} holds no {rank} factors of {vocab_size} tokens: it is of another teacher")
    if not all(bool(torch.isfinite(part).all()) for part in (mean, loadings, noise)) or not bool((noise > 0).all()):
        raise CacheError(f"{path} is damaged: it holds numbers that are not finite, or noise that is not above 0")
    return LogitFactors(mean, loadings.float(), noise)
