"""Losses on hidden states (B, L, D), token by token. Layer 0 is the embedding output.

Padding never counts. Where the student's states are narrower than the teacher's they come here already projected.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softlabels.losses.padding import compare_cls, compare_states, mean_over_tokens
from softlabels.types import LayerPair, Signals


def hidden_mse(student: Signals, teacher: Signals, *, layers: LayerPair) -> Tensor:
    """Mean over tokens and D of (hs − ht)² (Jiao et al. 2020, "TinyBERT", equations 8 and 9; layer 0: embeddings).

    The mean is over all tokens of the batch. TinyBERT's released code counts padding too.
    """
    states = compare_states(student, teacher, layers, "hidden_mse")
    return mean_over_tokens((states.student - states.teacher).square().mean(dim=-1), states.mask)


def hidden_cosine(student: Signals, teacher: Signals, *, layers: LayerPair) -> Tensor:
    """Mean over the batch's tokens of 1 − cos(hs, ht) (Sanh et al. 2019, "DistilBERT")."""
    states = compare_states(student, teacher, layers, "hidden_cosine")
    return mean_over_tokens(1 - F.cosine_similarity(states.student, states.teacher, dim=-1), states.mask)


def pkd(student: Signals, teacher: Signals, *, layers: LayerPair, mean_over_width: bool = False) -> Tensor:
    """Mean over texts of ‖hs/‖hs‖ − ht/‖ht‖‖², h the state of [CLS] (Sun et al. 2019, "Patient Knowledge …").

    The released code takes the mean over D as well, as does `mean_over_width`; its weights (10 to 1000) allow for it.
    """
    states = compare_cls(student, teacher, layers, "pkd")
    ours, theirs = (F.normalize(side, dim=-1) for side in (states.student, states.teacher))  # (B, D)
    loss = mean_over_tokens((ours - theirs).square().sum(dim=-1), states.mask)
    return loss / ours.shape[-1] if mean_over_width else loss


def layer_output(student: Signals, teacher: Signals, *, layers: LayerPair) -> Tensor:
    """½ · mean over tokens and D of (f − f*)², f the output of the student's layer and f* of the teacher's.

    The first term of 'Taylor-FO' distillation, whose other one is `parameter_norm`: half of `hidden_mse`, so that the
    gradient in f is the mean residual f − f* itself.
    """
    states = compare_states(student, teacher, layers, "layer_output")
    return mean_over_tokens((states.student - states.teacher).square().mean(dim=-1), states.mask) / 2


def feature_map_mse(student: Signals, teacher: Signals, *, layers: LayerPair) -> Tensor:
    """Mean over tokens and D of (n(hs) − n(ht))², n a layer norm without weights.

    MobileBERT's feature map transfer (Sun et al. 2020, section 3.5), which the paper splits into this and
    `feature_statistics`. The released code weighs it 100 against 1 for the attention, and counts padding too.
    """
    states = compare_states(student, teacher, layers, "feature_map_mse")
    width = states.teacher.shape[-1:]
    ours, theirs = (F.layer_norm(side, width, eps=1e-12) for side in (states.student, states.teacher))
    return mean_over_tokens((ours - theirs).square().mean(dim=-1), states.mask)
