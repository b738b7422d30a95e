"""`hidden:LAYERS`: hidden states a token; `hidden:LAYERS@cls`: only the first token's, a row."""

from __future__ import annotations

from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.captures.forward import Forward, Request
from softlabels.types import layer_field


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`hidden.06` a layer, D values a token; or `hidden.06@cls`, D values a row."""
    kind = "row" if request.pooled else "token"
    return {
        name: FieldSpec.model_validate({"kind": kind, "type": codec, "width": values.shape[-1]})
        for name, values in take(request, forward).items()
    }


def take(request: Request, forward: Forward) -> dict[str, Tensor]:
    """(B, L, D) a layer, or (B, D) with @cls. Layer 0 is the embedding output."""
    states, suffix = forward.hidden_states or (), f"@{request.pooled}" if request.pooled else ""
    return {
        layer_field("hidden", layer) + suffix: states[layer][:, 0] if request.pooled else states[layer]
        for layer in request.layers or ()
    }
