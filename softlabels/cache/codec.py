"""How a field's values lie on disk: the element types, what a value loses in them, and what they refuse."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.errors import CacheError

DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_TORCH = {"float32": torch.float32, "float16": torch.float16}
LARGEST = {"float32": float(np.finfo(np.float32).max), "float16": float(np.finfo(np.float16).max)}


def encode(values: Tensor, spec: FieldSpec, *, field: str, ids: list[str]) -> np.ndarray:
    """`values` (B, …) in the field's type, on the CPU. CacheError names the examples with a value that has no place.

    float16 keeps 11 significant bits and refuses values beyond ±65,504; NaN and infinities are refused everywhere:
    they are the sign of a broken teacher, and one of them would spoil a whole training.
    """
    largest = LARGEST[spec.type]
    flat = values.reshape(len(values), -1)
    worst = flat.abs().amax(dim=1)  # (B,); NaN spreads
    bad = ~(worst <= largest)
    if bool(bad.any()):
        rows = bad.nonzero().flatten().tolist()
        names = ", ".join(ids[row] for row in rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
        if bool(torch.isfinite(flat[rows]).all()):
            raise CacheError(
                f"field '{field}' has values beyond ±{largest:.0f}, which {spec.type} cannot hold, in example(s) "
                f"{names}: dump with --codec float32"
            )
        raise CacheError(
            f"the teacher gave NaN or infinite values in field '{field}' for example(s) {names}: its weights or its "
            f"precision are broken. Nothing was stored for their shard; mend the teacher or try --dtype float32"
        )
    return values.to(_TORCH[spec.type]).cpu().contiguous().numpy()
