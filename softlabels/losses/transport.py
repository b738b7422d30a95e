"""Losses between all layers of the student and all of the teacher's, matched by optimal transport.

BERT-EMD (Li et al. 2020, arXiv 2010.06133): every layer has a weight; the weights of the student's are carried to
those of the teacher's at the least cost, where carrying one unit from layer i to j costs what their states differ. The
loss is that cost. What flows where is solved exactly for each batch, and is a constant to the gradient, as in the
released code (which by the envelope theorem changes nothing, wherever the cheapest flow is the only one).

Weights are uniform, or given as lists (they are scaled to sum to 1), and with `update` they move after each step by the
paper's cost attention: see `LayerWeights`. Two deviations: scores and hidden states, two terms here, have weights of
their own (the code's `separate`; by default it takes the mean of both), and padding counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from softlabels.losses.attention import Heads, compare_scores, scores_mean_square
from softlabels.losses.means import sum_over_parts
from softlabels.losses.padding import compare_states, mean_over_tokens
from softlabels.types import LayerGroup, LayerPair, Signals

_LEAST_SHARE = 1e-6  # of all unit costs: a layer that costs less counts as this, or its weight would be infinite


class LayerWeights(nn.Module):
    """The weight of each layer of both sides, each side's summing to 1; kept in checkpoints where they move."""

    student: Tensor  # (M,)
    teacher: Tensor  # (N,)

    def __init__(
        self,
        layers: LayerGroup,
        student: Sequence[float] | None = None,
        teacher: Sequence[float] | None = None,
        *,
        update: bool = False,
    ) -> None:
        super().__init__()
        self.moves = update
        for name, given, count in (
            ("student", student, len(layers.student)),
            ("teacher", teacher, len(layers.teacher)),
        ):
            weights = torch.tensor([1.0] * count if given is None else list(given), dtype=torch.float32)
            self.register_buffer(name, weights / weights.sum())

    def update(self, flow: np.ndarray, costs: np.ndarray) -> None:
        """Cost attention: a layer weighs 1/C, scaled to sum to 1; C is what a unit of it cost to carry.

        C_i = Σj flow_ij · cost_ij / weight_i. So does one version of the released code; another takes the softmax of
        ΣC/C_i. There a layer that costs nothing loses its weight for good; here it gets the most.
        """
        paid = flow * costs
        for weights, total in ((self.student, paid.sum(axis=1)), (self.teacher, paid.sum(axis=0))):
            before = weights.double().cpu().numpy()
            unit = np.divide(total, before, out=np.zeros_like(total), where=before > 0)
            if not (np.isfinite(unit).all() and unit.sum() > 0):
                continue  # a batch of padding alone, or a training that is about to be given up
            now = np.where(before > 0, 1 / np.maximum(unit, _LEAST_SHARE * unit.sum()), 0.0)
            weights.copy_(torch.from_numpy(now / now.sum()))


def emd(
    student: Signals,
    teacher: Signals,
    *,
    layers: LayerGroup,
    student_weights: list[float] | None = None,
    teacher_weights: list[float] | None = None,
    update: bool = False,
    weights: LayerWeights | None = None,
) -> Tensor:
    """Σij flow_ij · cost_ij, cost_ij the `hidden_mse` of layers i and j; see the module for the flow.

    `weights` is what moves from step to step; without it a call starts from the given ones.
    """
    if weights is None:
        weights = LayerWeights(layers, student_weights, teacher_weights, update=update)
    across, down = _margins(layers)
    ours = [compare_states(student, teacher, pair, "emd").student for pair in down]
    there = [compare_states(student, teacher, pair, "emd") for pair in across]
    mask = there[0].mask

    def cost(own: Tensor, other: Tensor) -> Tensor:
        return mean_over_tokens((own - other).square().mean(dim=-1), mask)

    return _carry(ours, [states.teacher for states in there], cost, weights)


def emd_attention(
    student: Signals,
    teacher: Signals,
    *,
    layers: LayerGroup,
    student_weights: list[float] | None = None,
    teacher_weights: list[float] | None = None,
    update: bool = False,
    heads: Heads = "each",
    weights: LayerWeights | None = None,
) -> Tensor:
    """As `emd`, cost_ij the `attention_scores_mse` of layers i and j."""
    if weights is None:
        weights = LayerWeights(layers, student_weights, teacher_weights, update=update)
    across, down = _margins(layers)
    ours = [compare_scores(student, teacher, pair, heads, "emd_attention")[0] for pair in down]
    theirs = [compare_scores(student, teacher, pair, heads, "emd_attention")[1] for pair in across]
    return _carry(ours, theirs, partial(scores_mean_square, mask=student.mask), weights)


def _margins(layers: LayerGroup) -> tuple[list[LayerPair], list[LayerPair]]:
    """Pairs in which each of the teacher's layers is once, and each of the student's: enough to look at all of them."""
    across = [LayerPair(layers.student[0], theirs) for theirs in layers.teacher]
    return across, [LayerPair(ours, layers.teacher[0]) for ours in layers.student]


def _carry(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    cost: Callable[[Tensor, Tensor], Tensor],
    weights: LayerWeights,
) -> Tensor:
    with torch.no_grad():  # at most M + N − 1 of the M · N costs have a flow, and only these a gradient
        known = torch.stack([torch.stack([cost(own, other) for other in theirs]) for own in ours])
        known = sum_over_parts(known)
    costs = known.double().cpu().numpy()  # (M, N)
    flow = solve_transport(costs, weights.student.double().cpu().numpy(), weights.teacher.double().cpu().numpy())
    total = torch.stack([float(flow[i, j]) * cost(ours[i], theirs[j]) for i, j in np.argwhere(flow > 0)]).sum()
    if weights.moves and torch.is_grad_enabled():  # not while a student is validated
        weights.update(flow, costs)
    return total


def solve_transport(costs: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> np.ndarray:
    """The flow (M, N) of least Σ flow · costs, none below 0, that takes `supply` (M,) away and brings `demand` (N,).

    Both are scaled to sum to 1. Exact: a linear program. Where all costs are equal, or one of them is no number, it is
    the outer product.
    """
    from scipy.optimize import linprog  # a third of a second, for those who need it

    supply, demand = supply / supply.sum(), demand / demand.sum()
    rows, columns = costs.shape
    spread = costs - costs.min() if np.isfinite(costs).all() else np.zeros_like(costs)  # a shift moves no flow
    if 1 in costs.shape or not spread.any():
        return np.outer(supply, demand)
    sums = np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    wanted = np.concatenate([supply, demand])
    # the last sum follows from the others; costs between 0 and 1, since the solver's tolerance is absolute
    found = linprog((spread / spread.max()).ravel(), A_eq=sums[:-1], b_eq=wanted[:-1], method="highs")
    assert found.status == 0, found.message  # there is always a flow, and none costs less than 0
    return np.clip(found.x, 0, None).reshape(rows, columns)
