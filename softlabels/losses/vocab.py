"""Losses over a vocabulary: the student's logits (T, V) against a teacher's, complete or truncated, at T positions.

The teacher is a tensor (T, V) or a `TruncatedLogits`. Of the latter the top k enter one by one, and the tail
- `tail="bucket"`: as one more outcome on both sides; how the student spreads its own tail is left to it. By the
  log-sum inequality this is at most the loss on full logits;
- `tail="sampled"`: by its sampled tokens s and their weights, Σ_s w_s·g(p_s, q_s) for a loss Σ g(p, q). The expectation
  is the loss on full logits, its gradient's too;
- `tail="factors"`: token by token, as the teacher's factors expect it from the top k (`softlabels.factors`): r, which
  has the tail's true mass. Where there are samples they correct it,

      Σ_tail g(r, q) + Σ_s w_s·(g(p_s, q_s) − g(r_s, q_s))

  which has the same expectation as "sampled", and the less noise the nearer r is to p: r is a control variate (Owen
  2013, "Monte Carlo theory, methods and examples", section 8.9). Without samples it is biased by what r misses.
None renormalises p inside the top k, which would teach the student that the tail is impossible.

p is the teacher's distribution at temperature τ, q the student's. Each loss is the mean over the T positions (0 where
there is none). Each is summed as Σ (p·log(p/q) − p + q) or alike: over all outcomes −p + q adds nothing, but each term
is now ≥ 0 and 0 where p = q, so that under "sampled" samples add no noise, in value or gradient, where the student
equals the teacher (Schulman 2020, "Approximating KL divergence", k3). The price is noise where it is far from it, as
every student is at first: a token that is drawn though p is small has a weight of 1/p, times q. Under "factors" q
enters for the whole tail and the weights meet only p − r; what noise there is stays where the student nears p.

A −inf of both sides (a padded vocabulary) counts nothing. Where only one has it the loss is what the formula says, in
places +∞: trim the vocabularies to the same ids first. Student logits of 16 bits are raised to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabels.errors import ConfigError
from softlabels.losses.means import mean
from softlabels.truncated import TruncatedLogits, tail_logsumexp_at, tail_mean_at

Tail = Literal["bucket", "sampled", "factors"]


def kl(student: Tensor, teacher: Tensor | TruncatedLogits, *, temperature: float, tail: Tail = "bucket") -> Tensor:
    """τ² · KL(p ‖ q), mean over positions (Hinton et al. 2015, section 2)."""
    parts = _outcomes(student, teacher, temperature, tail)
    return _mean(parts, lambda at: _product(at.log_p, at.log_p - at.log_q) - at.p + at.q) * temperature**2


def reverse_kl(
    student: Tensor, teacher: Tensor | TruncatedLogits, *, temperature: float, tail: Tail = "bucket"
) -> Tensor:
    """τ² · KL(q ‖ p), mean over positions (Gu et al. 2024, "MiniLLM", section 2.1, at each position)."""
    parts = _outcomes(student, teacher, temperature, tail)
    return _mean(parts, lambda at: _product(at.log_q, at.log_q - at.log_p) - at.q + at.p) * temperature**2


def cross_entropy(
    student: Tensor, teacher: Tensor | TruncatedLogits, *, temperature: float, tail: Tail = "bucket"
) -> Tensor:
    """−Σ p · log q, mean over positions, without τ²: `kl` / τ² plus the teacher's entropy, the tail's as `tail` has it.

    −Σ p·log q itself would have more noise from samples; −p + q is added as in `kl`.
    """
    parts = _outcomes(student, teacher, temperature, tail)
    return _mean(parts, lambda at: -_product(at.log_p, at.log_q) - at.p + at.q)


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """A part of what a loss sums over: (T, O) log-probabilities of both sides, and weights where they are samples."""

    log_p: Tensor
    log_q: Tensor
    weights: Tensor | None = None  # (T, O); None: 1

    @property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @property
    def q(self) -> Tensor:
        return self.log_q.exp()


def _mean(parts: Sequence[_Outcomes], terms: Callable[[_Outcomes], Tensor]) -> Tensor:
    """The weighted sum of `terms` (T, O) over the outcomes of all parts, its mean over the positions."""
    sums = [(terms(part) if part.weights is None else terms(part) * part.weights).sum() for part in parts]
    return mean(torch.stack(sums).sum(), len(parts[0].log_p))


def _product(log_mass: Tensor, other: Tensor) -> Tensor:
    """exp(log_mass) · other, and 0 where there is no mass, whatever the other is; so are the gradients."""
    return log_mass.exp() * other.masked_fill(torch.isneginf(log_mass), 0)


def _outcomes(student: Tensor, teacher: Tensor | TruncatedLogits, temperature: float, tail: Tail) -> list[_Outcomes]:
    """Both sides at `temperature`, over the V tokens; or over the top k, and the tail as `tail` has it."""
    if tail not in get_args(Tail):
        raise ConfigError(f"tail '{tail}' of a vocabulary loss: there are 'bucket', 'sampled' and 'factors'")
    student = student if student.dtype == torch.float64 else student.float()
    if isinstance(teacher, Tensor):
        _check_shape(student, *teacher.shape)
        if not temperature > 0:
            raise ConfigError(f"temperature {temperature} of a vocabulary loss: give one above 0")
        log_p = F.log_softmax(teacher.to(student.dtype) / temperature, dim=1)
        return [_Outcomes(log_p, F.log_softmax(student / temperature, dim=1))]
    _check_shape(student, len(teacher.ids), teacher.vocab_size)
    rest = tail_logsumexp_at(teacher, temperature).to(student.dtype)  # (T,)
    log_p = _with_rest(teacher.values.to(student.dtype) / temperature, rest)
    student_tail = student.scatter(1, teacher.ids, float("-inf")).div_(temperature)  # (T, V)
    student_rest = student_tail.logsumexp(dim=1)  # (T,)
    log_q = _with_rest(student.gather(1, teacher.ids) / temperature, student_rest)  # (T, K + 1)
    if tail == "bucket":
        return [_Outcomes(log_p, log_q)]
    top = _Outcomes(log_p[:, :-1], log_q[:, :-1])
    # log p = z/τ − log Z; Z is had from the rest, whose log p is known
    log_p_sampled = teacher.sampled_values.to(student.dtype) / temperature + (log_p[:, -1] - rest)[:, None]
    weights = teacher.sampled_weights.to(student.dtype)
    if tail == "sampled":
        if not teacher.samples:
            raise ConfigError("tail 'sampled' needs sampled tail tokens, which this teacher was truncated without")
        log_q_sampled = student_tail.gather(1, teacher.sampled_ids) + (log_q[:, -1] - student_rest)[:, None]
        return [top, _Outcomes(log_p_sampled, log_q_sampled, weights)]
    log_r = _expected_tail(teacher, temperature, student.dtype, log_p[:, -1])  # (T, V)
    log_q_tail = student_tail + (log_q[:, -1] - student_rest)[:, None]
    log_q_sampled = log_q_tail.gather(1, teacher.sampled_ids)
    log_r_sampled = log_r.gather(1, teacher.sampled_ids)
    return [
        top,
        _Outcomes(log_r, log_q_tail),
        _Outcomes(log_p_sampled, log_q_sampled, weights),
        _Outcomes(log_r_sampled, log_q_sampled, -weights),
    ]


def _expected_tail(teacher: TruncatedLogits, temperature: float, dtype: torch.dtype, log_mass: Tensor) -> Tensor:
    """(T, V) log r: what the factors expect of the tail's tokens, scaled to its mass (T,); −inf in the top."""
    if teacher.factors is None:
        raise ConfigError("tail 'factors' needs the teacher's factors: dump with --capture vocab:topk=…,factors=32")
    if teacher.factors.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"factors of {teacher.factors.vocab_size} tokens and logits of {teacher.vocab_size}: they are of different "
            f"teachers"
        )
    mean = tail_mean_at(teacher, temperature).to(dtype)
    expected = teacher.factors.expect(teacher.ids, teacher.values.to(dtype), tail_mean=mean, temperature=temperature)
    return expected.log_softmax(dim=1) + log_mass[:, None]


def _with_rest(top: Tensor, rest: Tensor) -> Tensor:
    """(T, K + 1) log-probabilities from the scores of the top (T, K) and the log-sum-exp of the rest (T,)."""
    return F.log_softmax(torch.cat([top, rest[:, None]], dim=1), dim=1)


def _check_shape(student: Tensor, positions: int, vocab_size: int) -> None:
    if tuple(student.shape) != (positions, vocab_size):
        raise ConfigError(
            f"the student's logits are {tuple(student.shape)}, the teacher's ({positions}, {vocab_size}): one row a "
            f"position and one vocabulary on both sides; trim padded columns first"
        )
