"""What several teachers say together: their logits of the same rows come in, one teacher's logits go out.

For teachers t with logits z_t and weights w_t of sum 1, and p_t = softmax(z_t):

    logits          z = Σ w_t z_t                 softmax(z) is the normalised geometric mean of the p_t; at a
                                                  temperature T it is that of the softmax(z_t / T)
    probabilities   z = log Σ w_t p_t             softmax(z) is their mean at T = 1, which teaches what the mean of the
                                                  teachers' KL losses does; at another T it is that mean softened, and
                                                  not the mean of the softmax(z_t / T)
    median          z_c = median over t of z_tc   class by class; of an even number the mean of the two in the middle

Instead of a mean, a row may take the logits of one teacher as they are: of the one with the highest p_t on the row's
label (`choose` "label"; rows without a label take the mean), or of the one with the least entropy of p_t ("entropy");
of equals the first. Where teachers say something of every token, "row" means token. FedMD takes the mean of logits, as
does FedDF (Lin et al. 2020, eq. 3); ensembles are taught either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels.config import CombineOptions
from softlabels.errors import ConfigError
from softlabels.types import IMAGES, NO_LABEL, Task

ONE_IS_RIGHT = ("sequence-classification", "token-classification", IMAGES)  # tasks whose logits are a softmax's
MIXABLE = (*ONE_IS_RIGHT, "multi-label-classification", "regression")  # tasks with logits
_FAINTEST = 1e-290  # a mean probability below it has lost digits, or all: it is computed by its logarithm


@dataclass(frozen=True, slots=True)
class Mixing:
    """The rule: `options` with a weight for each teacher and, of each, where its classes stand in the result's."""

    options: CombineOptions
    weights: tuple[float, ...]  # of sum 1
    orders: tuple[tuple[int, ...] | None, ...]  # class c of the result is class orders[t][c] of teacher t; None: c

    def mix(self, said: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """(…, C) float32 from the teachers' (…, C) each, `aligned`; `labels` (…) are class numbers or NO_LABEL.

        Labels are asked for only to `choose` by them.

        Computed in float64, each row for itself, with the classes outermost: sums over a few classes are then as fast
        as any.
        """
        if self.options.choose == "entropy":
            values = _stack(said)  # (C, T, …)
            logs = values.log_softmax(0)
            entropies = -(logs.exp() * logs).sum(0)  # (T, …)
            mixed = _pick(values, entropies.argmin(0))
        elif self.options.choose == "label":
            if labels is None:
                raise ValueError("choosing a teacher by the label needs labels")
            known = labels != NO_LABEL
            values = _stack(said)
            wanted = labels.clamp(min=0)[None, None].expand(1, *values.shape[1:])
            on_label = values.log_softmax(0).gather(0, wanted)[0]  # (T, …)
            mixed = torch.where(known, _pick(values, on_label.argmax(0)), self._mean(said))
        else:
            mixed = self._mean(said)
        return mixed.movedim(0, -1).to(torch.float32, memory_format=torch.contiguous_format)

    def align(self, teacher: int, values: Tensor) -> Tensor:
        """Teacher number `teacher`'s (…, C) with the classes in the result's order."""
        order = self.orders[teacher]
        return values if order is None else values[..., list(order)]

    def _mean(self, said: Sequence[Tensor]) -> Tensor:
        """(C, …) of the teachers' (…, C) each."""
        values = _stack(said)
        if self.options.mean == "median":
            ordered, middle = values.sort(1).values, values.shape[1] // 2
            return (ordered[:, (values.shape[1] - 1) // 2] + ordered[:, middle]) / 2
        weights = torch.tensor(self.weights, dtype=torch.float64).view(-1, *[1] * (values.ndim - 2))  # (T, …)
        if self.options.mean == "logits":
            return (weights * values).sum(1)
        values.sub_(values.amax(0)).exp_()  # in place: fresh memory for each step takes as long as the steps
        shares = values.mul_(weights / values.sum(0)).sum(1)  # (C, …): half the time of the sum of logarithms
        if shares.numel() and shares.min() >= _FAINTEST:
            return shares.log_()
        exact = (_stack(said).log_softmax(0) + weights.log()).logsumexp(1)
        return torch.where(shares < _FAINTEST, exact, shares.log())


def _stack(said: Sequence[Tensor]) -> Tensor:
    """(C, T, …) float64, the classes outermost, of the teachers' (…, C) each."""
    return torch.stack(list(said)).movedim(-1, 0).to(torch.float64, memory_format=torch.contiguous_format)


def _pick(values: Tensor, teacher: Tensor) -> Tensor:
    """(C, …) of the (C, T, …) `values`: at each place those of the `teacher` (…)."""
    return values.gather(1, teacher[None, None].expand(len(values), 1, *teacher.shape))[:, 0]


def plan_mixing(options: CombineOptions, task: Task, names: Sequence[Sequence[str]]) -> Mixing:
    """The rule for teachers of `task` whose classes are called `names`, the same ones for all.

    ConfigError where the options do not fit the number of teachers, or the task.
    """
    if task not in ONE_IS_RIGHT and (options.mean == "probabilities" or options.choose is not None):
        asked = f"choose {options.choose}" if options.choose else "the mean of probabilities"
        raise ConfigError(
            f"{asked} is for classes of which one is right, and these teachers are for {task}: take the mean or the "
            f"median of their logits"
        )
    orders = [tuple(part.index(name) for name in names[0]) if list(part) != list(names[0]) else None for part in names]
    return Mixing(options, tuple(options.shares(len(names))), tuple(orders))
