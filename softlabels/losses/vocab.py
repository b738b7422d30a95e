"""Losses over a vocabulary: the student's logits (T, V) against a teacher's, complete or truncated, at T positions.

The teacher is a tensor (T, V) or a `TruncatedLogits`. Of the latter the top k enter one by one, and the tail
- `tail="bucket"`: as one more outcome on both sides; how the student spreads its own tail is left to it. By the
  log-sum inequality this is at most the loss on full logits;
- `tail="sampled"`: by its sampled tokens and their weights; the expectation is the loss on full logits.
Neither renormalises p inside the top k, which would teach the student that the tail is impossible.

p is the teacher's distribution at temperature τ, q the student's. Each loss is the mean over the T positions (0 where
there is none). Each is summed as Σ (p·log(p/q) − p + q) or alike: over all outcomes −p + q adds nothing, but each term
is now ≥ 0 and 0 where p = q, so that samples add no noise, in value or gradient, where the student equals the teacher
(Schulman 2020, "Approximating KL divergence", k3).

A −inf of both sides (a padded vocabulary) counts nothing. Where only one has it the loss is what the formula says, in
places +∞: trim the vocabularies to the same ids first. Student logits of 16 bits are raised to float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.truncated import TruncatedLogits, tail_logsumexp_at

Tail = Literal["bucket", "sampled"]


def kl(student: Tensor, teacher: Tensor | TruncatedLogits, *, temperature: float, tail: Tail = "bucket") -> Tensor:
    """τ² · KL(p ‖ q), mean over positions (Hinton et al. 2015, section 2)."""
    at = _outcomes(student, teacher, temperature, tail)
    return at.mean(_product(at.log_p, at.log_p - at.log_q) - at.p + at.q) * temperature**2


def reverse_kl(
    student: Tensor, teacher: Tensor | TruncatedLogits, *, temperature: float, tail: Tail = "bucket"
) -> Tensor:
    """τ² · KL(q ‖ p), mean over positions (Gu et al. 2024, "MiniLLM", section 2.1, at each position)."""
    at = _outcomes(student, teacher, temperature, tail)
    return at.mean(_product(at.log_q, at.log_q - at.log_p) - at.q + at.p) * temperature**2


def cross_entropy(
    student: Tensor, teacher: Tensor | TruncatedLogits, *, temperature: float, tail: Tail = "bucket"
) -> Tensor:
    """−Σ p · log q, mean over positions, without τ²: `kl` / τ² plus the teacher's entropy, the tail's as `tail` has it.

    −Σ p·log q itself would have more noise from samples; −p + q is added as in `kl`.
    """
    at = _outcomes(student, teacher, temperature, tail)
    return at.mean(-_product(at.log_p, at.log_q) - at.p + at.q)


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """What a loss sums over: (T, O) log-probabilities of both sides, and weights where some outcomes are samples."""

    log_p: Tensor
    log_q: Tensor
    weights: Tensor | None = None

    @property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @property
    def q(self) -> Tensor:
        return self.log_q.exp()

    def mean(self, terms: Tensor) -> Tensor:
        weighted = terms if self.weights is None else terms * self.weights
        return weighted.sum() / max(len(terms), 1)


def _product(log_mass: Tensor, other: Tensor) -> Tensor:
    """exp(log_mass) · other, and 0 where there is no mass, whatever the other is; so are the gradients."""
    return log_mass.exp() * other.masked_fill(torch.isneginf(log_mass), 0)


def _outcomes(student: Tensor, teacher: Tensor | TruncatedLogits, temperature: float, tail: Tail) -> _Outcomes:
    """Both sides at `temperature`, over the V tokens, the top k and a bucket, or the top k and the samples."""
    if tail not in ("bucket", "sampled"):
        raise ConfigError(f"tail '{tail}' of a vocabulary loss: there are 'bucket' and 'sampled'")
    student = student if student.dtype == torch.float64 else student.float()
    if isinstance(teacher, Tensor):
        _check_shape(student, *teacher.shape)
        if not temperature > 0:
            raise ConfigError(f"temperature {temperature} of a vocabulary loss: give one above 0")
        log_p = F.log_softmax(teacher.to(student.dtype) / temperature, dim=1)
        return _Outcomes(log_p, F.log_softmax(student / temperature, dim=1))
    _check_shape(student, len(teacher.ids), teacher.vocab_size)
    rest = tail_logsumexp_at(teacher, temperature).to(student.dtype)  # (T,)
    log_p = _with_rest(teacher.values.to(student.dtype) / temperature, rest)
    student_rest = student.scatter(1, teacher.ids, float("-inf")).div_(temperature).logsumexp(dim=1)  # (T,)
    log_q = _with_rest(student.gather(1, teacher.ids) / temperature, student_rest)  # (T, K + 1)
    if tail == "bucket":
        return _Outcomes(log_p, log_q)
    if not teacher.samples:
        raise ConfigError("tail 'sampled' needs sampled tail tokens, which this teacher was truncated without")
    # log p = z/τ − log Z; Z is had from the rest, whose log p is known
    log_p_sampled = teacher.sampled_values.to(student.dtype) / temperature + (log_p[:, -1] - rest)[:, None]
    log_q_sampled = student.gather(1, teacher.sampled_ids) / temperature + (log_q[:, -1] - student_rest)[:, None]
    weights = torch.cat([torch.ones_like(log_p[:, :-1]), teacher.sampled_weights.to(student.dtype)], dim=1)
    return _Outcomes(
        torch.cat([log_p[:, :-1], log_p_sampled], dim=1), torch.cat([log_q[:, :-1], log_q_sampled], dim=1), weights
    )


def _with_rest(top: Tensor, rest: Tensor) -> Tensor:
    """(T, K + 1) log-probabilities from the scores of the top (T, K) and the log-sum-exp of the rest (T,)."""
    return F.log_softmax(torch.cat([top, rest[:, None]], dim=1), dim=1)


def _check_shape(student: Tensor, positions: int, vocab_size: int) -> None:
    if tuple(student.shape) != (positions, vocab_size):
        raise ConfigError(
            f"the student's logits are {tuple(student.shape)}, the teacher's ({positions}, {vocab_size}): one row a "
            f"position and one vocabulary on both sides; trim padded columns first"
        )
