"""Losses on what hidden states (B, L, D) add up to: their mean and variance, and how they go together.

Padding never counts.
"""

from __future__ import annotations

from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.losses.means import mean
from softlabels.losses.padding import (
    States,
    compare_states,
    mean_over_pairs,
    mean_over_tokens,
    places,
    product,
    token_pairs,
)
from softlabels.types import LayerPair, Signals

_FEWER = 2  # times as many channels as tokens: products of tokens are then the shorter way


def feature_statistics(
    student: Signals,
    teacher: Signals,
    *,
    layers: LayerPair,
    mean_weight: float = 1.0,
    variance_weight: float = 1.0,
) -> Tensor:
    """mean_weight · (ms − mt)² + variance_weight · |vs − vt|, mean over tokens; m and v: a token's mean and variance.

    The other part of MobileBERT's feature map transfer (Sun et al. 2020, section 3.5), beside `feature_map_mse`: the
    paper says only that statistics are split off; the square and the absolute value are its code's, which weighs the
    two 5000 and 5 (against 100 and 1 for the feature map and the attention). They are taken over D, and widths may
    differ.
    """
    states = compare_states(student, teacher, layers, "feature_statistics", widths=False)
    means = states.student.mean(dim=-1) - states.teacher.mean(dim=-1)  # (B, L)
    variances = states.student.var(dim=-1, correction=0) - states.teacher.var(dim=-1, correction=0)
    return mean_over_tokens(mean_weight * means.square() + variance_weight * variances.abs(), states.mask)


def gram(student: Signals, teacher: Signals, *, layers: LayerPair) -> Tensor:
    """Mean over texts and entries of (Gs − Gt)², G = H1ᵀH2 / |x| (D, D): how channels of two layers go together.

    TextBrewer's `gram` (or `fsp`), after Yim et al. 2017, "A Gift from Knowledge Distillation". H1 is of `layers`, H2
    of `layers.then`.
    """
    first, second = _two_layers(student, teacher, layers, "gram")
    lengths = first.mask.sum(dim=1)  # (B,)
    width, other = first.student.shape[-1], second.student.shape[-1]
    ours, theirs = (first.student, second.student), (first.teacher, second.teacher)
    if first.mask.shape[1] * _FEWER < min(width, other):
        squares = _square_distance(ours, theirs) / (width * other)
    else:
        grams = [product(a.transpose(1, 2), b) for a, b in (ours, theirs)]  # (B, D1, D2)
        squares = (grams[0] - grams[1]).square().mean(dim=(1, 2))
    texts = squares / lengths.clamp(min=1).square()  # (B,)
    return mean(texts.sum(), (lengths > 0).sum())


def _square_distance(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Tensor:
    """(B,) ‖S1ᵀS2 − T1ᵀT2‖² of (B, L, D) each, by way of L × L: ⟨A1ᵀA2, B1ᵀB2⟩ is the sum of (A1B1ᵀ) · (A2B2ᵀ).

    In float64, for what is subtracted is much larger than what is left where both sides are alike.
    """

    def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
        first, second = (product(a, b.transpose(1, 2)) for a, b in zip(one, other, strict=True))
        return (first * second).sum(dim=(1, 2))

    own, their = ((a.double(), b.double()) for a, b in (ours, theirs))
    distance = inner(own, own) - 2 * inner(own, their) + inner(their, their)
    return distance.clamp(min=0).to(ours[0].dtype)


def nst(student: Signals, teacher: Signals, *, layers: LayerPair) -> Tensor:
    """Mean over pairs of tokens of a text of (Ss − St)², S = H1H2ᵀ / D (L, L): how tokens of two layers go together.

    TextBrewer's `nst` (or `mmd`), after Huang and Wang 2017, "Like What You Like". H1 is of `layers`, H2 of
    `layers.then`; D is each side's own, and may differ. Given a mask, TextBrewer's code divides by L in place of D,
    padding included.
    """
    first, second = _two_layers(student, teacher, layers, "nst", widths=False)
    ours = _similarity(first.student, second.student, "student", layers)
    theirs = _similarity(first.teacher, second.teacher, "teacher", layers)
    return mean_over_pairs((ours - theirs).square()[:, None], token_pairs(first.mask))


def _two_layers(
    student: Signals, teacher: Signals, layers: LayerPair, loss: str, *, widths: bool = True
) -> tuple[States, States]:
    first = compare_states(student, teacher, layers, loss, widths=widths)
    then = layers.then
    return first, first if then is None else compare_states(student, teacher, then, loss, widths=widths)


def _similarity(first: Tensor, second: Tensor, side: str, layers: LayerPair) -> Tensor:
    """(B, L, L) from (B, L, D) twice."""
    if first.shape[-1] != second.shape[-1]:
        raise ConfigError(
            f"loss 'nst' on {places(layers)}: the {side}'s two layers are {first.shape[-1]} and {second.shape[-1]} "
            f"wide; it multiplies one by the other, so choose layers of one width"
        )
    return product(first, second.transpose(1, 2)) / second.shape[-1]
