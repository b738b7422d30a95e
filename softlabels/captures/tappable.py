"""Whether a model's attention can be tapped, found out on a small batch instead of from a list of architectures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softlabels.captures.attention_tap import AttentionCall, Tap, tap
from softlabels.captures.forward import Batch
from softlabels.errors import SoftlabelsError
from softlabels.types import MASKED

_REFUSALS = (ValueError, TypeError, KeyError)  # of architectures without the interface, or without such a keyword


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """No autocast and no rounding of matrix products inside, so that two ways to the same number can be compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def eager_maps(model: PreTrainedModel, probe: Batch) -> tuple[Tensor, ...]:
    """The model's own maps of `probe`, one a layer, (B, H, L, L); empty where it has others or none."""
    try:
        model.set_attn_implementation("eager")
        maps = own_maps(model(**probe.model_inputs(), output_attentions=True, return_dict=True))
    except _REFUSALS:
        return ()
    whole = all(layer is not None and layer.ndim == 4 and layer.shape[-1] == layer.shape[-2] for layer in maps)
    return maps if whole and len(maps) == model.config.num_hidden_layers else ()


def own_maps(output: Any) -> tuple[Tensor, ...]:
    """The attention maps in a model's output; the encoder's, where there are several."""
    maps = getattr(output, "encoder_attentions", None)
    return (getattr(output, "attentions", None) if maps is None else maps) or ()


def why_not_tapped(model: PreTrainedModel, probe: Batch, *, maps: tuple[Tensor, ...]) -> str:
    """Why Q, K and V of this architecture cannot be taken, or ''; the model is left tapped.

    Every layer must be seen, and where the model gives `maps` of `probe`, those that follow from Q and K must be the
    same: an architecture that changes scores in a way of its own is not misread in silence.
    """
    layers = model.config.num_hidden_layers
    sink = Tap()
    try:
        tap(model)
        model(**probe.model_inputs(), softlabels_tap=sink)
    except SoftlabelsError as error:
        return str(error)
    except _REFUSALS:
        pass
    seen = sink.counts["self"]
    if seen != layers:
        share = f"{seen} of its {layers} layers" if seen else "none of its layers"
        return f"its attention bypasses transformers' attention interface ({share} can be seen there)"
    for layer, theirs in enumerate(maps, start=1):
        off = _excess(sink.self_attention[layer], theirs, probe.attention_mask)
        if theirs.dtype == torch.float32 and not off < 1e-3:  # half precision is too coarse to tell
            return f"its attention is no function of Q and K alone (layer {layer} is off by {off:.2g})"
    return ""


def _excess(call: AttentionCall, theirs: Tensor, mask: Tensor | None) -> float:
    """How far the maps of `call` are from `theirs` (B, H, L, L) at real tokens, beyond what rounding can do."""
    scores = call.scores()
    off = (scores.softmax(dim=-1) - theirs).abs()
    if mask is not None:
        off = off * mask[:, None, :, None] * mask[:, None, None, :]
    return float(off.max() - 1e-5 * scores[scores > MASKED / 2].abs().max())
