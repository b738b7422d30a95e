"""`logits`: a classifier's scores before the softmax, complete and float32, so that any temperature can be applied."""

from __future__ import annotations

from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.captures.forward import Forward, Request


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`logits`, a row of C values; always float32, whatever the codec."""
    return {"logits": FieldSpec(kind="row", type="float32", width=forward.logits.shape[-1])}


def take(request: Request, forward: Forward) -> dict[str, Tensor]:
    """(B, C) float32."""
    return {"logits": forward.logits.float()}
