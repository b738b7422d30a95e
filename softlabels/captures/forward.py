"""What passes between a teacher's forward pass and the captures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from softlabels.captures.attention_tap import AttentionCall
from softlabels.errors import TeacherError


class Batch(Protocol):
    """What a teacher reads: a `TokenBatch`, or images, which have no padding."""

    @property
    def attention_mask(self) -> Tensor | None: ...  # (B, L)

    def model_inputs(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Request:
    """One `--capture`: which signal, of which layers (None: all), in which form ('' or what stands behind the @)."""

    capture: str
    layers: tuple[int, ...] | None = ()
    form: str = ""


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass of the teacher over a batch. Of an encoder-decoder model the layers are the encoder's."""

    logits: Tensor | None  # (B, C), (B, L, V) or of a decoder (B, M, V); None: the model has no head
    hidden_states: tuple[Tensor | None, ...]  # layers + 1 of (B, L, D), the embedding output first; empty: not taken
    last_hidden_state: Tensor | None  # (B, L, D), what the body hands to a head; None: not taken
    pooler_output: Tensor | None  # (B, D); None: the body has no pooler, or it was not taken
    attention_calls: dict[int, AttentionCall]  # by layer, numbered from 1; empty unless tapped
    attention_maps: tuple[Tensor, ...]  # a layer (B, H, L, L), where the model gives maps itself; else empty
    pooling: str  # how `pooled` is pooled, '' to go by the model
    mask: Tensor | None  # (B, L), 1 for a token; None: no row has padding (images)
    input_ids: Tensor | None = None  # (B, L)
    targets: Tensor | None = None  # (B, L or M) bool, tokens that have a label; then logits are (T, V), of these alone
    head_states: Tensor | None = None  # (T, D), what the output head saw; None: not taken
    vocab_size: int = 0  # of the tokenizer; a head may have more columns

    def mean(self, states: Tensor) -> Tensor:
        """(B, D) float32, the mean of the (B, L, D) `states` over a row's tokens, special ones too, padding not."""
        states = states.float()
        if self.mask is None:
            return states.mean(dim=1)
        weights = self.mask.to(states.dtype).unsqueeze(-1)  # (B, L, 1)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def hidden(self, layer: int) -> Tensor:
        """(B, L, D) of `layer`; TeacherError where the model gave no vector a token there."""
        states = self.hidden_states[layer] if layer < len(self.hidden_states) else None
        if states is None:
            raise TeacherError(
                f"hidden:{layer}: the teacher gave {len(self.hidden_states)} hidden states, and not this one: "
                f"capture other layers, or logits"
            )
        if states.ndim != 3 or (self.mask is not None and states.shape[1] != self.mask.shape[1]):
            raise TeacherError(
                f"hidden:{layer}: the teacher has no vector a token there, but states of the shape "
                f"{tuple(states.shape)}: capture other layers, or logits"
            )
        return states
