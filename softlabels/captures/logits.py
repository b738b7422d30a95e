"""`logits`: a classifier's scores before the softmax, complete and float32, so that any temperature can be applied."""

from __future__ import annotations

from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.captures.forward import Forward, Request
from softlabels.errors import TeacherError

FIRST_LAYER = None
FORMS = ("",)


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`logits`, a row of C values; always float32, whatever the codec."""
    return {
        name: FieldSpec(kind="row", type="float32", width=v.shape[-1]) for name, v in take(request, forward).items()
    }


def take(request: Request, forward: Forward) -> dict[str, Tensor]:
    """(B, C) float32; TeacherError where the model has no head."""
    if forward.logits is None:
        raise TeacherError("the teacher has no head, so it gives no logits: capture pooled or hidden:LAYERS instead")
    return {"logits": forward.logits.float()}
