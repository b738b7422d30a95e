"""`pooled`: one vector a row, as the model itself sums it up.

What that is depends on the teacher. With a head: the pooler's output, which the head reads (BERT, ALBERT, ERNIE: a
dense layer and tanh over the first token). Without one, a sentence-embedding model: the mean of its last hidden state
over a row's tokens, padding excluded, not normalised; the pooler that a BERT checkpoint carries along is not what such
models were trained with. `prepare(pooling=…)` says otherwise, for models that embed by their first token.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.captures.forward import Forward, Request
from softlabels.errors import TeacherError

FIRST_LAYER = None
FORMS = ("",)
Pooling = Literal["pooler", "mean", "cls"]


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`pooled`, D values a row."""
    return {
        name: FieldSpec.model_validate({"kind": "row", "type": codec, "width": values.shape[-1]})
        for name, values in take(request, forward).items()
    }


def take(request: Request, forward: Forward) -> dict[str, Tensor]:
    """(B, D); TeacherError where the model has no pooler."""
    pooling = forward.pooling or ("mean" if forward.logits is None else "pooler")
    values = forward.pooler_output
    if pooling != "pooler" and forward.last_hidden_state is not None:
        states = forward.last_hidden_state
        values = states[:, 0] if pooling == "cls" else forward.mean(states)
    if values is None:
        raise TeacherError(
            "--capture pooled: the teacher has no pooler: capture hidden:LAYER@cls (the first token's state) or "
            "hidden:LAYER@mean (the mean over the tokens) of its last layer instead"
        )
    return {"pooled": values.flatten(1)}  # a convolutional model pools to (B, D, 1, 1)
