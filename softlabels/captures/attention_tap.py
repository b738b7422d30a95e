"""Queries, keys and values of every attention layer, taken through transformers' attention interface.

`tap(model)` sets one model to the registered function `softlabels_tap`, which computes attention as SDPA does and shows
what it was called with to the `Tap` given to that call of the model (`model(**inputs, softlabels_tap=Tap())`). Without
one it is plain SDPA, so other calls and other models are not touched. It works for teachers and students alike:
gradients flow through everything that was taken.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from softlabels.errors import ConfigError, TeacherError
from softlabels.types import MASKED

NAME = "softlabels_tap"
Role = Literal["self", "decoder", "cross"]

_CROSS = re.compile(r"cross|enc\w*att", re.IGNORECASE)  # crossattention, cross_attn, encoder_attn, EncDecAttention


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer's attention was called with."""

    query: Tensor  # (B, H, L, K)
    key: Tensor  # (B, Hk, L, K); Hk < H with grouped queries
    value: Tensor  # (B, Hk, L, K)
    mask: Tensor | None  # (B or 1, 1 or H, L, L), True: attend, or added to the scores; None: nothing is masked
    scaling: float
    causal: bool = False  # no mask was needed, and later keys are hidden all the same
    position_bias: Tensor | None = None  # (B or 1, H, L, L), added to the scores (T5)
    softcap: float | None = None  # scores s become softcap·tanh(s / softcap) (gemma 2)

    def scores(self) -> Tensor:
        """cap(QKᵀ·scaling) + position bias, (B, H, L, L), in float32 even where the model runs in half precision.

        A key that its query may not look at (padding, a later token, one outside of the window) has MASKED, so the
        softmax over the last dimension is `probabilities()` in any case.
        """
        width = torch.promote_types(self.query.dtype, torch.float32)
        key = self.key.to(width).transpose(-1, -2).unsqueeze(2)  # (B, Hk, 1, K, L)
        with torch.autocast(self.query.device.type, enabled=False):  # it would round the scores, as SDPA does not
            query = self.query.to(width).unflatten(1, (self.key.shape[1], -1))  # (B, Hk, H / Hk, L, K)
            scores = (query @ key).flatten(1, 2) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.position_bias is not None:
            scores = scores + self.position_bias
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, MASKED)
        elif self.mask is not None:
            scores = scores + self.mask
        elif self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, MASKED)
        return scores.masked_fill(scores < MASKED / 2, MASKED)  # of an added mask

    def probabilities(self) -> Tensor:
        """softmax(scores()), (B, H, L, L): what eager attention returns, before dropout."""
        return self.scores().softmax(dim=-1)


class Tap:
    """The attention calls of one forward pass, by layer, numbered from 1. Closed when the pass is over.

    Closed, it takes nothing more, so layers that gradient checkpointing computes again are not seen twice. It is no
    dataclass, for wrappers such as FSDP make copies of these on their way to the model.
    """

    def __init__(self, layers: frozenset[int] | None = None) -> None:
        """`layers`: which to keep; None: all. What is not kept is freed as without a tap."""
        self.layers = layers
        self.calls: dict[Role, dict[int, AttentionCall]] = {"self": {}, "decoder": {}, "cross": {}}
        self.counts: dict[Role, int] = {"self": 0, "decoder": 0, "cross": 0}  # of all layers, kept or not
        self.state: Literal["new", "open", "closed"] = "new"
        self.roles: dict[int, Role] = {}  # of a decoder's modules, by id

    @property
    def self_attention(self) -> dict[int, AttentionCall]:
        """The layers of the model; of an encoder-decoder model, those of its encoder."""
        return self.calls["self"]

    @property
    def decoder(self) -> dict[int, AttentionCall]:
        """The decoder's attention to itself, of an encoder-decoder model."""
        return self.calls["decoder"]

    @property
    def cross(self) -> dict[int, AttentionCall]:
        """The decoder's attention to the encoder; keys and values are as long as the encoder's input."""
        return self.calls["cross"]

    def record(self, module: nn.Module, call: AttentionCall) -> None:
        """Keep `call` of `module`, if its layer is wanted."""
        role = self.roles.get(id(module), "self")
        self.counts[role] += 1
        layer = self.counts[role]
        if self.layers is None or layer in self.layers:
            self.calls[role][layer] = call


def tap(model: PreTrainedModel) -> None:
    """Let `model`, and no other, answer to `softlabels_tap=`. ValueError where its architecture refuses."""
    AttentionInterface.register(NAME, _tapped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    own_configs(model)
    model.set_attn_implementation(NAME)
    if _open not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_open, with_kwargs=True)
        model.register_forward_hook(_close, with_kwargs=True, always_call=True)


def own_configs(model: PreTrainedModel) -> None:
    """Give `model` configs of its own: models made from one config object share it, and the setting in it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None:  # parts that shared a config, or a part of one, share its copy
            module.__dict__["config"] = copy.deepcopy(config, copies)


def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    sink: Tap | None = kwargs.pop(NAME, None)
    softcap = kwargs.pop("softcap", None)
    taken = sink is not None and sink.state != "closed"
    if not taken and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling, causal = kwargs.get("scaling"), kwargs.get("is_causal")
    call = AttentionCall(
        query,
        key,
        value,
        attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=attention_mask is None and bool(getattr(module, "is_causal", True) if causal is None else causal),
        position_bias=kwargs.get("position_bias"),
        softcap=softcap,
    )
    if sink is not None and taken:
        if sink.state == "new":
            raise ConfigError("softlabels_tap= goes to the model that was tapped, not to a part of it")
        if kwargs.get("s_aux") is not None:
            raise TeacherError("its attention has sinks, which take a share of every distribution")
        sink.record(module, call)
    if softcap is not None:  # SDPA cannot cap scores
        return _capped_attention(call, dropout=kwargs.get("dropout", 0.0)), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _capped_attention(call: AttentionCall, *, dropout: float) -> Tensor:
    maps = nn.functional.dropout(call.probabilities().to(call.value.dtype), p=dropout)  # 0 unless the model trains
    maps = maps.unflatten(1, (call.value.shape[1], -1))  # (B, Hk, H / Hk, L, L)
    return (maps @ call.value.unsqueeze(2)).flatten(1, 2).transpose(1, 2).contiguous()  # (B, L, H, K)


def _open(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a call of a tapped model: what would go wrong in silence is refused."""
    sink: Tap | None = kwargs.get(NAME)
    if sink is None:
        return
    if sink.state != "new":
        raise ConfigError("a Tap takes one forward pass: give a new one to each call of the model")
    if model.training and torch.is_grad_enabled() and any(map(_is_reentrant, model.modules())):
        raise ConfigError(
            f"{type(model).__name__} has gradient checkpointing with use_reentrant=True, under which queries, keys and "
            f"values lose their gradients: enable it with use_reentrant=False"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        sink.roles = dict(_decoder_roles(model.named_modules(), encoder=model.get_encoder()))  # type: ignore[operator]
    sink.state = "open"


def _close(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    sink: Tap | None = kwargs.get(NAME)
    if sink is not None:
        sink.state = "closed"


def _is_reentrant(module: nn.Module) -> bool:
    if not getattr(module, "gradient_checkpointing", False):
        return False
    settings = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return settings.get("use_reentrant") is not False


def _decoder_roles(modules: Iterable[tuple[str, nn.Module]], *, encoder: nn.Module) -> Iterable[tuple[int, Role]]:
    """What the attention of each module outside of `encoder` would be, going by its name."""
    encoding = {id(module) for module in encoder.modules()}
    for name, module in modules:
        if id(module) not in encoding:
            yield id(module), "cross" if any(map(_CROSS.search, name.split("."))) else "decoder"
