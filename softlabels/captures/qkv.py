"""`qkv:LAYERS`: queries, keys and values of a layer's heads, as attention takes them (rotated, where positions rotate).

Relations among queries, keys or values follow from them for any model; scores and maps for models whose attention is
softmax(QKᵀ / √K) over the row (BERT and its kin). Causal attention, windows, soft caps, position biases and other
scalings are not in Q and K: `attention:LAYERS@scores` has them. Of encoder-decoder models the layers are the encoder's.
"""

from __future__ import annotations

from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.captures.forward import Forward, Request
from softlabels.types import layer_field

FIRST_LAYER = 1
FORMS = ("",)
_PARTS = ("query", "key", "value")


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`query.06`, `key.06`, `value.06`: heads·K values a token. Grouped keys and values have fewer heads."""
    specs = {}
    for layer in request.layers or ():
        for part in _PARTS:
            heads, width = _heads(forward, layer, part).shape[1::2]
            specs[layer_field(part, layer)] = FieldSpec.model_validate(
                {"kind": "token", "type": codec, "width": heads * width, "heads": heads}
            )
    return specs


def take(request: Request, forward: Forward) -> dict[str, Tensor]:
    """(B, L, H·K) a part and layer, heads outermost."""
    return {
        layer_field(part, layer): _heads(forward, layer, part).transpose(1, 2).flatten(2)
        for layer in request.layers or ()
        for part in _PARTS
    }


def _heads(forward: Forward, layer: int, part: str) -> Tensor:
    return getattr(forward.attention_calls[layer], part)  # (B, H, L, K)
