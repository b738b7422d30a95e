"""`logits`: a classifier's scores before the softmax, complete and float32, so that any temperature can be applied."""

from __future__ import annotations

from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.captures.forward import Forward, Request
from softlabels.errors import TeacherError

FIRST_LAYER = None
FORMS = ("",)


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`logits`, C values a row, or a token where the teacher labels tokens; always float32, whatever the codec."""
    values = take(request, forward)["logits"]
    kind = "token" if values.ndim == 3 else "row"
    return {"logits": FieldSpec.model_validate({"kind": kind, "type": "float32", "width": values.shape[-1]})}


def take(request: Request, forward: Forward) -> dict[str, Tensor]:
    """(B, C), or (B, L, C) of a teacher that labels tokens; float32. TeacherError where the model has no head."""
    if forward.logits is None:
        raise TeacherError("the teacher has no head, so it gives no logits: capture pooled or hidden:LAYERS instead")
    return {"logits": forward.logits.float()}
