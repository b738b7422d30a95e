"""What passes between a teacher's forward pass and the captures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from softlabels.captures.attention_tap import AttentionCall


@dataclass(frozen=True, slots=True)
class Request:
    """One `--capture`: which signal, of which layers (None: all), pooled to the first token ('cls') or not ('')."""

    capture: str
    layers: tuple[int, ...] | None = ()
    pooled: str = ""


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass of the teacher over a batch."""

    logits: Tensor  # (B, C)
    hidden_states: tuple[Tensor, ...] | None  # layers + 1 of (B, L, D), the embedding output first
    attention_calls: list[AttentionCall]  # a call a layer, empty unless tapped
    attention_maps: tuple[Tensor, ...] | None  # a layer (B, H, L, L), where the model gives maps itself
    mask: Tensor  # (B, L)
