"""Zeros in a student's weights: how they come in, how they stay through a training, and how many there are.

Magnitude pruning sets the smallest of a student's weights to zero (Han et al. 2015): of every matrix the same share
(Gordon et al. 2020 for BERT), or of all matrices together. Matrices are all parameters of two or more dimensions, word
vectors included; biases and norms are few, and stay. Heads: see `softlabels.heads`.

A pruned student needs no mask beside it: the mask is where its matrices are zero. Its file is as large as before, and a
forward pass as slow; what is gained shows where files are compressed, and in the heads, which `softlabels export` takes
out of the graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from softlabels.config import PruneOptions
from softlabels.errors import StudentError
from softlabels.heads import prune_heads


def prune_student(student: nn.Module, options: PruneOptions, *, importance: Tensor | None = None) -> list[str]:
    """Prune `student` in place, heads first; returns the heads that went, as LAYER.HEAD, numbered from 1.

    `importance` (layers, heads) says which heads matter; without it their weights do. StudentError where nothing would
    be left, or where `options` change nothing.
    """
    before = count_nonzero(student)
    heads = [] if options.heads is None else prune_heads(student, options.heads, importance=importance)
    if options.magnitude is not None:
        prune_by_magnitude(student, options.magnitude, together=options.scope == "all")
    if count_nonzero(student) == before:
        raise StudentError(
            f"pruning {options.say()} changes nothing: the student has {before:,} weights that are not zero, before "
            f"and after. Ask for a larger share"
        )
    return heads


@torch.no_grad()
def prune_by_magnitude(student: nn.Module, share: float, *, together: bool = False) -> None:
    """Set the `share` of the smallest weights to zero: of each matrix, or of all of them `together`.

    Weights that are zero already count. StudentError where a matrix would have nothing left.
    """
    matrices = find_matrices(student)
    masks = _masks_together(matrices, share) if together else {n: _smallest(w, share) for n, w in matrices.items()}
    for name, gone in masks.items():
        if bool((gone | (matrices[name] == 0)).all()):
            size = matrices[name].numel()
            advice = "give a smaller share, or scope 'matrix'" if together else "give a smaller share"
            raise StudentError(
                f"pruning a share of {share:g} would leave nothing of '{name}' ({size:,} weights): {advice}"
            )
    for name, gone in masks.items():
        matrices[name].masked_fill_(gone, 0.0)


def find_matrices(student: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that pruning looks at, each once, however many modules share it."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.ndim >= 2}


def _smallest(weights: Tensor, share: float) -> Tensor:
    """Where the `share` of the smallest weights is, bool in their shape: exactly so many, also among equal ones."""
    count = _count(weights.numel(), share)
    gone = torch.zeros(weights.numel(), dtype=torch.bool, device=weights.device)
    gone[weights.detach().abs().flatten().argsort(stable=True)[:count]] = True
    return gone.view(weights.shape)


def _masks_together(matrices: dict[str, nn.Parameter], share: float) -> dict[str, Tensor]:
    gone = _smallest(torch.cat([weights.detach().flatten() for weights in matrices.values()]), share)
    parts = gone.split([weights.numel() for weights in matrices.values()])
    return {name: part.view(weights.shape) for (name, weights), part in zip(matrices.items(), parts, strict=True)}


def _count(size: int, share: float) -> int:
    return math.floor(share * size + 0.5)


def keep_zeros(student: nn.Module) -> None:
    """From now on, training `student` leaves its matrices' zeros as they are: they get no gradient.

    Under any optimiser of `softlabels.optimizer` that is enough: without a gradient a weight of zero has no moments,
    and decays to zero. The gradient is masked as it arrives, before gradients are clipped.
    """
    for parameter in find_matrices(student).values():
        alive = parameter.detach() != 0
        if not bool(alive.all()):
            parameter.register_post_accumulate_grad_hook(_GradientMask(alive))


class _GradientMask:
    """Takes the gradient of a parameter's zeros away, dense or sparse."""

    def __init__(self, alive: Tensor) -> None:
        self.alive = alive  # bool, in the parameter's shape

    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        self.alive = self.alive.to(gradient.device)
        if gradient.is_sparse:  # rows of a table of word vectors
            rows = gradient.coalesce()
            values = rows.values() * self.alive[rows.indices()[0]]
            parameter.grad = torch.sparse_coo_tensor(
                rows.indices(), values, rows.shape, is_coalesced=True, check_invariants=False
            )
        else:
            gradient.mul_(self.alive)


def count_nonzero(student: nn.Module) -> int:
    """Parameters that are not zero."""
    return sum(int(torch.count_nonzero(parameter)) for parameter in student.parameters())
