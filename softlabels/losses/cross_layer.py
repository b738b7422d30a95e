"""Losses between one layer of the student and several of the teacher's: a mixture of them, or all of them joined.

Padding never counts. Where the student's states are narrower than the teacher's they come to `alp` already projected;
`ckd` projects the teacher's joined states to the student's width, and `ckd_unit` the student's to that of the joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabels.losses.padding import (
    States,
    check_widths,
    compare_cls,
    compare_states,
    mean_over_tokens,
    product,
)
from softlabels.types import LayerGroup, LayerPair, Signals


def alp(student: Signals, teacher: Signals, *, layers: LayerGroup) -> Tensor:
    """Mean over texts and D of (hs − Σj wj htj)², wj = softmax over j of hs · htj, h the state of [CLS].

    ALP-KD (Passban et al. 2021, arXiv 2012.14022): a layer of the student attends to all of the teacher's (map: all),
    or to those of its bucket (ALP-NO; map: buckets). Gradients pass through the weights too.
    """
    return _to_mixture([compare_cls(student, teacher, pair, "alp") for pair in _pairs(layers)])


def alp_tokens(student: Signals, teacher: Signals, *, layers: LayerGroup) -> Tensor:
    """`alp` of every token, each with weights of its own; the mean is over all tokens of the batch."""
    return _to_mixture([compare_states(student, teacher, pair, "alp_tokens") for pair in _pairs(layers)])


def ckd(
    student: Signals, teacher: Signals, *, layers: LayerGroup, combine: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean over tokens and D of (hs − c)², c = W [ht1; ht2; …] + b of the bucket's states, one behind the other.

    CKD (Wu et al. 2020, arXiv 2010.03034), by concatenation; `combine`, from the bucket's width to the student's, is
    the linear map, which learns with the student. The paper's is for translation, where every token counts. What the
    map learns the student need not: see `ckd_unit`.
    """
    states = [compare_states(student, teacher, pair, "ckd", widths=False) for pair in _pairs(layers)]
    return _to_bucket(states, layers, combine, "ckd")


def ckd_cls(
    student: Signals, teacher: Signals, *, layers: LayerGroup, combine: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`ckd` of [CLS] alone; the mean is over texts."""
    states = [compare_cls(student, teacher, pair, "ckd_cls", widths=False) for pair in _pairs(layers)]
    return _to_bucket(states, layers, combine, "ckd_cls")


def ckd_unit(
    student: Signals, teacher: Signals, *, layers: LayerGroup, combine: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean over tokens of ‖u(W hs + b) − u([ht1; ht2; …])‖², u(x) = x / ‖x‖: CKD as its authors' code has it.

    There the linear map, `combine`, is the student's, to the bucket's width, so that the student has to hold what the
    bucket says; in `ckd` the map alone can bring both together.
    """
    states = [compare_states(student, teacher, pair, "ckd_unit", widths=False) for pair in _pairs(layers)]
    ours, joined = states[0].student, torch.cat([side.teacher for side in states], dim=-1)
    if combine is not None:
        ours = combine(ours)
    check_widths(ours, joined, "ckd_unit", layers)
    apart = F.normalize(ours, dim=-1) - F.normalize(joined, dim=-1)
    return mean_over_tokens(apart.square().sum(dim=-1), states[0].mask)


def _pairs(layers: LayerGroup) -> list[LayerPair]:
    (own,) = layers.student
    return [LayerPair(own, theirs) for theirs in layers.teacher]


def _to_mixture(states: Sequence[States]) -> Tensor:
    ours = states[0].student  # (B, D) or (B, L, D)
    theirs = torch.stack([side.teacher for side in states], dim=-2)  # (B, …, J, D)
    weights = product(theirs, ours.unsqueeze(-1)).squeeze(-1).softmax(dim=-1)  # (B, …, J)
    mixture = product(weights.unsqueeze(-2), theirs).squeeze(-2)
    return mean_over_tokens((ours - mixture).square().mean(dim=-1), states[0].mask)


def _to_bucket(
    states: Sequence[States], layers: LayerGroup, combine: Callable[[Tensor], Tensor] | None, loss: str
) -> Tensor:
    ours = states[0].student
    joined = torch.cat([side.teacher for side in states], dim=-1)  # (B, …, Σ Dt)
    if combine is not None:
        joined = combine(joined)
    check_widths(ours, joined, loss, layers)
    return mean_over_tokens((ours - joined).square().mean(dim=-1), states[0].mask)
