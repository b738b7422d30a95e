"""Losses of a language model's student: its logits at the targets of a batch, (T, V), against the teacher's there.

The teacher's logits are complete, or what a cache kept of them; `softlabels.losses.vocab` has the formulas. Where
the teacher left factors the tail is what these expect, corrected by the sampled tokens where there are any; with
samples alone the loss is unbiased by them; else the tail is one bucket. All are means over the T targets.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.losses import vocab
from softlabels.losses.means import mean
from softlabels.losses.vocab import Tail
from softlabels.truncated import TruncatedLogits
from softlabels.types import NO_LABEL, UNMASKED, Signals


def kl(student: Signals, teacher: Signals, *, temperature: float) -> Tensor:
    """T² · KL(p ‖ q); see `vocab.kl`."""
    return vocab.kl(student.logits, teacher.vocabulary, temperature=temperature, tail=_tail(teacher))


def reverse_kl(student: Signals, teacher: Signals, *, temperature: float) -> Tensor:
    """T² · KL(q ‖ p); see `vocab.reverse_kl`."""
    return vocab.reverse_kl(student.logits, teacher.vocabulary, temperature=temperature, tail=_tail(teacher))


def soft_cross_entropy(student: Signals, teacher: Signals, *, temperature: float) -> Tensor:
    """−Σ p · log q, without T²; see `vocab.cross_entropy`."""
    return vocab.cross_entropy(student.logits, teacher.vocabulary, temperature=temperature, tail=_tail(teacher))


def mse_logits(student: Signals, teacher: Signals, *, temperature: float = 1.0) -> Tensor:
    """‖zt − zs‖², summed over V; needs complete logits."""
    logits = teacher.vocabulary
    if isinstance(logits, TruncatedLogits):
        raise ConfigError("loss 'mse_logits' needs all logits: dump them with --capture vocab:exact, or take kl")
    return mean((logits - student.logits).square().sum(dim=-1).sum(), len(logits))


def ce(student: Signals, teacher: Signals, *, temperature: float = 1.0) -> Tensor:
    """Cross entropy with the tokens themselves, at T = 1 whatever `temperature` is.

    A mean over those that have a label: of a masked language model that speaks of all tokens, the masked ones.
    """
    labels = student.labels[student.labels != NO_LABEL]  # (T,)
    total = F.cross_entropy(student.logits, labels, ignore_index=UNMASKED, reduction="sum")
    return mean(total, int((labels != UNMASKED).sum()))


def _tail(teacher: Signals) -> Tail:
    logits = teacher.vocabulary
    if not isinstance(logits, TruncatedLogits):
        return "bucket"  # of complete logits nothing is left out
    if logits.factors is not None:
        return "factors"
    return "sampled" if logits.samples else "bucket"
