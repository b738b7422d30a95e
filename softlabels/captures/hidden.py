"""`hidden:LAYERS`: hidden states a token; `@cls`: only the first token's, a row; `@mean`: the mean over a row's tokens.

Layer 0 is the embedding output, layer i the output of layer i, as transformers' `output_hidden_states` gives them. The
last layer holds a trap: most decoder models (GPT-2, Llama, Qwen2, OPT, GPT-NeoX, BLOOM, Gemma 2, T5) and ModernBERT
normalise once more behind their last layer, and there transformers replaces that layer's output by the normalised
state. So `hidden:12` of a 12-layer GPT-2 is what the output head reads, while `hidden:11` is raw, of another scale; a
loss that maps a student's layer to the last one compares with a normalised state, and the raw output of the last layer
is not to be had. BERT and its kin normalise inside every layer, and have no such step. ViT normalises behind its last
layer too, but there transformers leaves the raw state.

Of encoder-decoder models (T5, BART) the layers are the encoder's; the decoder's are not captured.
"""

from __future__ import annotations

from torch import Tensor

from softlabels.cache.format import FieldSpec
from softlabels.captures.forward import Forward, Request
from softlabels.types import layer_field

FIRST_LAYER = 0
FORMS = ("", "cls", "mean")


def fields(request: Request, forward: Forward, *, codec: str) -> dict[str, FieldSpec]:
    """`hidden.06` a layer, D values a token; or `hidden.06@cls` or `hidden.06@mean`, D values a row."""
    kind = "row" if request.form else "token"
    return {
        name: FieldSpec.model_validate({"kind": kind, "type": codec, "width": values.shape[-1]})
        for name, values in take(request, forward).items()
    }


def take(request: Request, forward: Forward) -> dict[str, Tensor]:
    """(B, L, D) a layer, or (B, D) with @cls and @mean. The mean counts special tokens, but no padding."""
    suffix = f"@{request.form}" if request.form else ""
    return {
        layer_field("hidden", layer) + suffix: _reduce(forward, forward.hidden(layer), request.form)
        for layer in request.layers or ()
    }


def _reduce(forward: Forward, states: Tensor, form: str) -> Tensor:
    if form == "cls":
        return states[:, 0]
    return forward.mean(states) if form == "mean" else states
