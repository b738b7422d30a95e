"""Losses on attention (B, H, L, L): scores before the softmax, or the probabilities after it.

Padding counts neither as key nor as query. Both sides must have the same number of heads, or `heads="mean"` compares
the means over heads. Where logarithms of probabilities are needed they are taken from the scores, or from queries and
keys, if these are there, and else from the map, as if no probability were below 1e-30.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.losses.padding import (
    check_heads,
    check_tokens,
    mean_over_pairs,
    mean_over_texts,
    mean_over_tokens,
    token_pairs,
    without_padded_queries,
)
from softlabels.losses.soft_targets import divergence
from softlabels.types import MASKED, LayerPair, Signals

Heads = Literal["each", "mean"]


def attention_scores_mse(student: Signals, teacher: Signals, *, layers: LayerPair, heads: Heads = "each") -> Tensor:
    """Mean over heads and pairs of tokens of (As − At)², A = QKᵀ/√K (Jiao et al. 2020, "TinyBERT", equation 7).

    The mean is over all pairs of the batch whose score neither side masks: a later token under causal attention doesn't
    count. TinyBERT's released code counts these and padding, as 0. With `heads="mean"` it is TextBrewer's
    `attention_mse_sum` but for the factor H², since that one sums over heads.
    """
    ours, theirs = compare_scores(student, teacher, layers, heads, "attention_scores_mse")
    return scores_mean_square(ours, theirs, student.mask)


def scores_mean_square(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """The mean of (ours − theirs)², (B, H, L, L) each, over pairs of tokens that neither side masks; `mask` (B, L)."""
    seen = (ours > MASKED / 2) & (theirs > MASKED / 2)
    return mean_over_pairs((ours - theirs).square(), seen & token_pairs(mask))


def attention_scores_ce(student: Signals, teacher: Signals, *, layers: LayerPair, heads: Heads = "mean") -> Tensor:
    """−Σ p · log q, mean over tokens; p and q are the softmax of the scores, or of their mean over heads.

    The latter is TextBrewer's `attention_ce_mean`; `attention_ce(heads="mean")` averages probabilities instead. With
    `heads="each"` it is `attention_ce`.
    """
    ours, theirs = compare_scores(student, teacher, layers, heads, "attention_scores_ce")
    entropy = -(theirs.softmax(dim=-1) * ours.log_softmax(dim=-1)).sum(dim=-1)  # (B, H, L)
    return mean_over_tokens(entropy, _token_mask(student, entropy))


def attention_mse(student: Signals, teacher: Signals, *, layers: LayerPair, heads: Heads = "each") -> Tensor:
    """Mean over heads and the batch's pairs of tokens of (as − at)², a the probabilities (TextBrewer)."""
    ours, theirs = _probs(student, layers.student), _probs(teacher, layers.teacher)
    _check(ours, theirs, layers, heads, "attention_mse")
    if heads == "mean":
        ours, theirs = (side.mean(dim=1, keepdim=True) for side in (ours, theirs))
    return mean_over_pairs((ours - theirs).square(), token_pairs(student.mask))


def attention_kl(student: Signals, teacher: Signals, *, layers: LayerPair, heads: Heads = "each") -> Tensor:
    """1/(H·|x|) Σ over heads and queries of KL(at ‖ as), mean over texts.

    Wang et al. 2020, "MiniLM", where the layers are the last ones; Sun et al. 2020, "MobileBERT", section 3.5
    (whose code leaves out the teacher's entropy, and counts padding). A pair that both sides mask counts 0.
    """
    maps = _compare_maps(student, teacher, layers, heads, "attention_kl")
    return mean_over_texts(divergence(maps.log_p, maps.log_q), maps.mask)


def attention_ce(student: Signals, teacher: Signals, *, layers: LayerPair, heads: Heads = "each") -> Tensor:
    """−Σ over keys of at · log as, mean over heads and the batch's tokens (TextBrewer)."""
    maps = _compare_maps(student, teacher, layers, heads, "attention_ce")
    return mean_over_tokens(-(maps.log_p.exp() * maps.log_q).sum(dim=-1), maps.mask)


@dataclass(frozen=True, slots=True)
class _Maps:
    """Logarithms of the teacher's and the student's maps, (B, H, L, L), H = 1 where they are means; `mask` (B, L)."""

    log_p: Tensor
    log_q: Tensor
    mask: Tensor


def _compare_maps(student: Signals, teacher: Signals, layers: LayerPair, heads: Heads, loss: str) -> _Maps:
    log_q, log_p = _log_probs(student, layers.student), _log_probs(teacher, layers.teacher)
    _check(log_q, log_p, layers, heads, loss)
    if heads == "mean":
        log_q, log_p = (side.logsumexp(dim=1, keepdim=True) - math.log(side.shape[1]) for side in (log_q, log_p))
    return _Maps(log_p, log_q, _token_mask(student, log_q))


def _log_probs(signals: Signals, layer: int) -> Tensor:
    if signals.has_scores(layer):
        return _scores(signals, layer).log_softmax(dim=-1)
    return _probs(signals, layer).clamp(min=1e-30).log()


def _probs(signals: Signals, layer: int) -> Tensor:
    if signals.has_scores(layer):
        return _scores(signals, layer).softmax(dim=-1)
    return without_padded_queries(signals.attention_probs(layer), signals.mask)


def _scores(signals: Signals, layer: int) -> Tensor:
    return without_padded_queries(signals.attention_scores(layer), signals.mask)


def compare_scores(
    student: Signals, teacher: Signals, layers: LayerPair, heads: Heads, loss: str
) -> tuple[Tensor, Tensor]:
    """The student's scores and the teacher's, (B, H, L, L), or with H = 1 their means over heads."""
    ours, theirs = _scores(student, layers.student), _scores(teacher, layers.teacher)
    _check(ours, theirs, layers, heads, loss)
    return (_mean_scores(ours), _mean_scores(theirs)) if heads == "mean" else (ours, theirs)


def _mean_scores(scores: Tensor) -> Tensor:
    """(B, 1, L, L), MASKED where any head masks."""
    masked = (scores < MASKED / 2).any(dim=1, keepdim=True)
    return scores.mean(dim=1, keepdim=True).masked_fill(masked, MASKED)


def _check(ours: Tensor, theirs: Tensor, layers: LayerPair, heads: Heads, loss: str) -> None:
    if heads not in ("each", "mean"):
        raise ConfigError(f"loss '{loss}': heads is '{heads}', and there are 'each' and 'mean'")
    check_tokens(ours, theirs, loss, layers, tokens=(0, 2, 3))
    if heads == "each":
        check_heads(ours, theirs, loss, layers, instead="compare their means with heads: mean, or take relations")


def _token_mask(student: Signals, like: Tensor) -> Tensor:
    return (student.mask != 0).to(like.dtype)
