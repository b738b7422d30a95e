"""Queries, keys and values of every attention layer, taken through transformers' attention interface.

`tap(model)` sets one model to the registered function `softlabels_tap`, which computes attention as SDPA does and shows
what it was called with to the `Tap` given to that call of the model (`model(**inputs, softlabels_tap=Tap())`). Without
one it is plain SDPA, so other calls and other models are not touched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from softlabels.errors import TeacherError

NAME = "softlabels_tap"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer's attention was called with."""

    query: Tensor  # (B, H, L, K)
    key: Tensor  # (B, Hk, L, K); Hk < H with grouped queries
    value: Tensor  # (B, Hk, L, K)
    mask: (
        Tensor | None
    )  # (B or 1, 1 or H, L, L), boolean (True: attend) or added to the scores; None: nothing is masked
    scaling: float
    causal: bool  # no mask was needed, and later keys are hidden all the same

    def probabilities(self) -> Tensor:
        """softmax(QKᵀ·scaling + mask), (B, H, L, L): what eager attention returns."""
        key = self.key
        if key.shape[1] != self.query.shape[1]:
            key = key.repeat_interleave(self.query.shape[1] // key.shape[1], dim=1)
        scores = (self.query @ key.transpose(-1, -2)).float() * self.scaling
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, torch.finfo(scores.dtype).min)
        elif self.mask is not None:
            scores = scores + self.mask
        elif self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)


@dataclass(eq=False, slots=True)
class Tap:
    """Collects the attention calls of one forward pass, in layer order."""

    calls: list[AttentionCall] = field(default_factory=list)


def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    tap_of_call = kwargs.pop(NAME, None)
    if tap_of_call is not None:
        if kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
            raise TeacherError(
                f"{type(module).__name__} adds a position bias or caps its attention scores, which this version cannot "
                f"take through Q and K: capture logits and hidden states only"
            )
        scaling = kwargs.get("scaling")
        causal = kwargs.get("is_causal")
        tap_of_call.calls.append(
            AttentionCall(
                query,
                key,
                value,
                attention_mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                bool(getattr(module, "is_causal", False) if causal is None else causal),
            )
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def tap(model: PreTrainedModel) -> None:
    """Let `model`, and no other, answer to `softlabels_tap=`."""
    AttentionInterface.register(NAME, _tapped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = copy.deepcopy(model.config)  # models made from one config object would share the setting
    for module in model.modules():
        if getattr(module, "config", None) is model.config and module is not model:
            module.__dict__["config"] = config
    model.config = config
    model.set_attn_implementation(NAME)
