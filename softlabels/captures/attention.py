"""`attention:LAYERS`: attention maps after the softmax, a map a head; quadratic in the length."""

from __future__ import annotations

from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.captures.forward import Forward, Request
from softlabels.errors import ConfigError
from softlabels.types import layer_field


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`attention.06`: H maps of L·L values a row."""
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
    """(B, H, L, L) a layer, each query row a distribution over the row's own keys."""
    return {layer_field("attention", layer): _maps(forward, layer) for layer in request.layers or ()}


def _maps(forward: Forward, layer: int) -> Tensor:
    if forward.attention_maps is not None:
        return forward.attention_maps[layer - 1]
    return forward.attention_calls[layer - 1].probabilities()
