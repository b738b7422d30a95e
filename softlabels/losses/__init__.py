"""What a student is trained to be near to. A loss is a pure function of two `Signals`: the student's and the teacher's.

A loss on logits is called as `loss(student, teacher, temperature=T)`, one on layers as `loss(student, teacher,
layers=LayerPair(2, 6))`, one on several layers at once as `loss(student, teacher, layers=LayerGroup((2,), (3, 4)))`;
all take options of their own by name, and return a scalar: a mean over rows, tokens or texts, in which padding never
counts. A new loss is one function and one line in `LOSSES`, `_ON_LAYERS` or `_ON_GROUPS`. A penalty looks at the
student's parameters alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from softlabels.losses import language
from softlabels.losses.annealing import annealing_mse, teacher_annealing
from softlabels.losses.attention import (
    attention_ce,
    attention_kl,
    attention_mse,
    attention_scores_ce,
    attention_scores_mse,
)
from softlabels.losses.cross_layer import alp, alp_tokens, ckd, ckd_cls, ckd_unit
from softlabels.losses.decoupled import dkd
from softlabels.losses.dist import dist
from softlabels.losses.divergences import jsd, skew_kl, skew_reverse_kl, tvd
from softlabels.losses.hidden import feature_map_mse, hidden_cosine, hidden_mse, layer_output, pkd
from softlabels.losses.penalties import parameter_norm
from softlabels.losses.relations import key_relation, query_relation, value_relation
from softlabels.losses.soft_targets import (
    ce,
    kl,
    mae_logits,
    mse_logits,
    pseudo_ce,
    reverse_kl,
    soft_cross_entropy,
)
from softlabels.losses.statistics import feature_statistics, gram, nst
from softlabels.losses.transport import emd, emd_attention
from softlabels.types import LayerGroup, LayerPair, Signals


class Loss(Protocol):
    """The contract of a loss on logits. `temperature` is a number, or a tensor of one a row."""

    def __call__(self, student: Signals, teacher: Signals, *, temperature: float | Tensor) -> Tensor: ...


class LanguageLoss(Protocol):
    """The contract of a loss on a language model's logits."""

    def __call__(self, student: Signals, teacher: Signals, *, temperature: float) -> Tensor: ...


class LayerLoss(Protocol):
    """The contract of a loss on layers."""

    def __call__(self, student: Signals, teacher: Signals, *, layers: LayerPair) -> Tensor: ...


class GroupLoss(Protocol):
    """The contract of a loss on several layers of a side at once."""

    def __call__(self, student: Signals, teacher: Signals, *, layers: LayerGroup) -> Tensor: ...


class Penalty(Protocol):
    """The contract of a penalty on what the student learns with."""

    def __call__(self, parameters: Iterable[Tensor]) -> Tensor: ...


LOSSES: Mapping[str, Loss] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "mse_logits": mse_logits,
    "mae_logits": mae_logits,
    "soft_cross_entropy": soft_cross_entropy,
    "ce": ce,
    "pseudo_ce": pseudo_ce,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "dkd": dkd,
    "dist": dist,
    "annealing_mse": annealing_mse,
    "teacher_annealing": teacher_annealing,
}

HARD = frozenset({"ce"})  # need labels, and nothing of the teacher

LANGUAGE_LOSSES: Mapping[str, LanguageLoss] = {  # the same names for a language model's student
    "kl": language.kl,
    "reverse_kl": language.reverse_kl,
    "mse_logits": language.mse_logits,
    "soft_cross_entropy": language.soft_cross_entropy,
    "ce": language.ce,
}

_ON_LAYERS: Mapping[str, tuple[LayerLoss, str]] = {  # the loss, and what it looks at on both sides
    "hidden_mse": (hidden_mse, "hidden"),
    "hidden_cosine": (hidden_cosine, "hidden"),
    "pkd": (pkd, "hidden_cls"),
    "layer_output": (layer_output, "hidden"),
    "feature_map_mse": (feature_map_mse, "hidden"),
    "feature_statistics": (feature_statistics, "hidden"),
    "gram": (gram, "hidden"),
    "nst": (nst, "hidden"),
    "attention_scores_mse": (attention_scores_mse, "attention_scores"),
    "attention_scores_ce": (attention_scores_ce, "attention_scores"),
    "attention_mse": (attention_mse, "attention_probs"),
    "attention_kl": (attention_kl, "attention_probs"),
    "attention_ce": (attention_ce, "attention_probs"),
    "query_relation": (query_relation, "query"),
    "key_relation": (key_relation, "key"),
    "value_relation": (value_relation, "value"),
}
PAIR_LOSSES: Mapping[str, LayerLoss] = {name: loss for name, (loss, _) in _ON_LAYERS.items()}
TWO_LAYERS = frozenset({"gram", "nst"})  # look at the second layers of a LayerPair, `then`

_ON_GROUPS: Mapping[str, tuple[GroupLoss, str]] = {
    "alp": (alp, "hidden_cls"),
    "alp_tokens": (alp_tokens, "hidden"),
    "ckd": (ckd, "hidden"),
    "ckd_cls": (ckd_cls, "hidden_cls"),
    "ckd_unit": (ckd_unit, "hidden"),
    "emd": (emd, "hidden"),
    "emd_attention": (emd_attention, "attention_scores"),
}
GROUP_LOSSES: Mapping[str, GroupLoss] = {name: loss for name, (loss, _) in _ON_GROUPS.items()}
CONCATENATED = frozenset({"ckd", "ckd_cls", "ckd_unit"})  # look at the teacher's layers, one behind the other
WIDENED = frozenset({"ckd_unit"})  # of these: project the student's states, and not the joined ones
TRANSPORT = frozenset({"emd", "emd_attention"})  # look at all layers of both sides at once, with a weight for each

LAYER_LOSSES: Mapping[str, LayerLoss | GroupLoss] = {**PAIR_LOSSES, **GROUP_LOSSES}

PENALTIES: Mapping[str, Penalty] = {"parameter_norm": parameter_norm}

# What each loss looks at, as the methods of Signals call it: of the teacher, and of the student too.
NEEDS: Mapping[str, tuple[str, ...]] = {
    **{name: () if name in HARD else ("logits",) for name in LOSSES},
    **{name: (signal,) for name, (_, signal) in (*_ON_LAYERS.items(), *_ON_GROUPS.items())},
    **{name: () for name in PENALTIES},
}
