"""`attention:LAYERS`: attention probabilities, a map a head; `@scores`: the scores before the softmax.

Both are quadratic in the length. Scores are QKᵀ·scaling, soft-capped where the model does that (Gemma 2), plus the
position bias (T5), as eager attention would compute them. A pair that the model does not let meet (a later token
under causal attention, one outside of a layer's window) has the score MASKED (-65504, see `softlabels.types`) under
every codec: it is a finite number, the softmax over a stored row is the layer's probabilities, and a loss that
compares scores can tell these pairs (below MASKED / 2) and leave them out. Padding is not stored.

Models that compute attention outside of transformers' interface (MPNet, DeBERTa-v2, BLOOM, RoFormer) are run in eager
mode and give probabilities only. Of encoder-decoder models (T5, BART) the maps are the encoder's to itself; the
decoder's and the cross attention have no place in a cache, but a `Tap` sees them.
"""

from __future__ import annotations

from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.captures.forward import Forward, Request
from softlabels.errors import ConfigError
from softlabels.types import layer_field

FIRST_LAYER = 1
FORMS = ("", "scores")


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`attention.06` or `attention.06@scores`: H maps of L·L values a row."""
    if codec == "int8":
        raise ConfigError(
            "--codec int8 keeps a scale for each vector, and attention maps have none: dump them with --codec float16, "
            "or capture qkv:LAYERS, from which the maps follow"
        )
    specs = {}
    for name, maps in take(request, forward).items():
        heads = maps.shape[1]
        specs[name] = FieldSpec.model_validate({"kind": "pair", "type": codec, "width": heads, "heads": heads})
    return specs


def take(request: Request, forward: Forward) -> dict[str, Tensor]:
    """(B, H, L, L) a layer: each query row a distribution over the row's own keys, or its scores."""
    suffix = f"@{request.form}" if request.form else ""
    return {
        layer_field("attention", layer) + suffix: _maps(forward, layer, request.form) for layer in request.layers or ()
    }


def _maps(forward: Forward, layer: int, form: str) -> Tensor:
    if forward.attention_maps:
        return forward.attention_maps[layer - 1]
    call = forward.attention_calls[layer]
    return call.scores() if form == "scores" else call.probabilities()
