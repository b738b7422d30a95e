"""What a student is trained to be near to. A loss is a pure function of two `Signals`: the student's and the teacher's.

Every loss is called as `loss(student, teacher, temperature=T)` and returns a scalar: the mean over the rows of the
batch. A new loss is one function and one line in `LOSSES`; if it looks at more of the teacher than the logits,
`FIELDS` says which fields of the cache it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from softlabels.losses import language
from softlabels.losses.soft_targets import ce, kl, mse_logits, reverse_kl, soft_cross_entropy
from softlabels.types import Signals


class Loss(Protocol):
    """The contract of a loss."""

    def __call__(self, student: Signals, teacher: Signals, *, temperature: float) -> Tensor: ...


LOSSES: Mapping[str, Loss] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "mse_logits": mse_logits,
    "soft_cross_entropy": soft_cross_entropy,
    "ce": ce,
}

LANGUAGE_LOSSES: Mapping[str, Loss] = {  # the same names for a language model's student
    "kl": language.kl,
    "reverse_kl": language.reverse_kl,
    "mse_logits": language.mse_logits,
    "soft_cross_entropy": language.soft_cross_entropy,
    "ce": language.ce,
}

HARD = frozenset({"ce"})  # need labels, and nothing of the teacher

FIELDS: Mapping[str, tuple[str, ...]] = {name: () if name in HARD else ("logits",) for name in LOSSES}
