"""What losses on layers have in common: both sides of the same tokens, and means in which padding never counts.

Padding is overwritten before anything is computed, so that whatever stands there, NaN included, changes neither the
loss nor its gradient. A text of padding alone counts nothing, and a batch of such texts has the loss 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.losses.means import mean
from softlabels.types import LayerGroup, LayerPair, Signals


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of both sides, (B, L, Ds) and (B, L, Dt), 0 at padding, and `mask` (B, L), 1. for a token.

    Or of [CLS] alone: (B, Ds), (B, Dt) and (B,).
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor


def compare_states(student: Signals, teacher: Signals, layers: LayerPair, loss: str, *, widths: bool = True) -> States:
    """The hidden states that `layers` names. Raises ConfigError where tokens, or (with `widths`) widths differ."""
    ours, theirs = student.hidden(layers.student), teacher.hidden(layers.teacher)
    check_tokens(ours, theirs, loss, layers, tokens=(0, 1))
    if widths:
        check_widths(ours, theirs, loss, layers)
    mask = student.mask != 0
    return States(without_padding(ours, mask), without_padding(theirs, mask), mask.to(wide(ours).dtype))


def compare_cls(student: Signals, teacher: Signals, layers: LayerPair, loss: str, *, widths: bool = True) -> States:
    """As `compare_states`, of [CLS] alone: (B, Ds) and (B, Dt), and `mask` (B,), 0. for a text of padding alone."""
    ours, theirs = student.hidden_cls(layers.student), teacher.hidden_cls(layers.teacher)
    check_tokens(ours, theirs, loss, layers, tokens=(0,))
    if widths:
        check_widths(ours, theirs, loss, layers)
    texts = (student.mask != 0).any(dim=1)  # such a text has no [CLS]
    ours, theirs = (wide(states).masked_fill(~texts[:, None], 0) for states in (ours, theirs))
    return States(ours, theirs, texts.to(ours.dtype))


def check_tokens(
    ours: Tensor, theirs: Tensor, loss: str, layers: LayerPair | LayerGroup, *, tokens: tuple[int, ...]
) -> None:
    """Raises ConfigError where the dimensions `tokens` of the two differ: they must be of the same tokens."""
    if [ours.shape[i] for i in tokens] != [theirs.shape[i] for i in tokens]:
        raise ConfigError(
            f"loss '{loss}' on {places(layers)}: the student's are {tuple(ours.shape)}, the teacher's "
            f"{tuple(theirs.shape)}; both must be of the same texts, in the teacher's tokens"
        )


def check_widths(ours: Tensor, theirs: Tensor, loss: str, layers: LayerPair | LayerGroup) -> None:
    """Raises ConfigError where the last dimensions of the two differ."""
    if ours.shape[-1] != theirs.shape[-1]:
        raise ConfigError(
            f"loss '{loss}' on {places(layers)}: the student's states are {ours.shape[-1]} wide, the teacher's "
            f"{theirs.shape[-1]}; give the term a `project` (linear, relu or tanh)"
        )


def check_heads(ours: Tensor, theirs: Tensor, loss: str, layers: LayerPair, *, instead: str) -> None:
    """Raises ConfigError where the heads of (B, H, …) differ in number; `instead` says what to do then."""
    if ours.shape[1] != theirs.shape[1]:
        raise ConfigError(
            f"loss '{loss}' on {places(layers)}: the student has {ours.shape[1]} heads, the teacher "
            f"{theirs.shape[1]}; {instead}"
        )


def without_padding(values: Tensor, mask: Tensor) -> Tensor:
    """(B, L, …) in float32 at least, 0 where `mask` (B, L) is False."""
    return wide(values).masked_fill(~mask.view(*mask.shape, *[1] * (values.dim() - 2)), 0)


def without_padded_queries(maps: Tensor, mask: Tensor) -> Tensor:
    """(B, H, L, L) in float32 at least, 0 where the query is padding."""
    return wide(maps).masked_fill(mask[:, None, :, None] == 0, 0)


def wide(values: Tensor) -> Tensor:
    """In float32 at least: sums of squares over a batch overflow 16 bits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of (B, L) or (B, H, L) over all tokens of the batch (and heads); of (B,) over its texts."""
    if values.dim() == 3:
        values = values.mean(dim=1)
    return mean((values * mask).sum(), mask.sum())


def mean_over_texts(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over texts of 1/(H·|x|) Σ over heads and tokens, of (B, H, L); |x| is a text's own length."""
    lengths = mask.sum(dim=1)  # (B,)
    texts = (values.mean(dim=1) * mask).sum(dim=1) / lengths.clamp(min=1)
    return mean(texts.sum(), (lengths > 0).sum())


def mean_over_pairs(values: Tensor, pairs: Tensor) -> Tensor:
    """The mean of (B, H, L, L) over where `pairs`, which broadcasts to it, is True."""
    counted = pairs.expand_as(values)
    return mean(values.masked_fill(~counted, 0).sum(), counted.sum())


def token_pairs(mask: Tensor) -> Tensor:
    """(B, 1, L, L), True where neither the query nor the key is padding."""
    tokens = mask != 0
    return tokens[:, None, :, None] & tokens[:, None, None, :]


def product(first: Tensor, second: Tensor) -> Tensor:
    """Their matrix product, in their own precision: autocast would round what is about to be subtracted."""
    with torch.autocast(first.device.type, enabled=False):
        return first @ second


def places(layers: LayerPair | LayerGroup) -> str:
    """For messages: which layers these are."""
    if isinstance(layers, LayerGroup):
        ours, theirs = (", ".join(map(str, side)) for side in (layers.student, layers.teacher))
        return f"layer {ours} of the student and {theirs} of the teacher"
    return f"layer {layers.student} of the student and {layers.teacher} of the teacher"
