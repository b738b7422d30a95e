"""Penalties: what a student pays for its parameters themselves, whatever it says. They need nothing of a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from softlabels.losses.padding import wide


def parameter_norm(parameters: Iterable[Tensor], *, of: Literal["all", "matrices"] = "all") -> Tensor:
    """½ · Σ θ² over the parameters that learn (those that require a gradient); `matrices` leaves out biases and norms.

    The second term of 'Taylor-FO' distillation (the first is `layer_output`), with λ the term's weight: the gradient is
    λθ. Under Adam that is not `weight_decay`, which is decoupled: this one goes through the moments, as losses do.
    Projections are not counted, and a table of word vectors is, so that its gradient is no longer sparse.
    """
    learning = [theta for theta in parameters if theta.requires_grad and (of == "all" or theta.dim() > 1)]
    if not learning:
        return torch.zeros(())
    return torch.stack([wide(theta).square().sum() for theta in learning]).sum() / 2
