"""The optimisers: torch's own, for parameters with dense gradients and for tables of which a batch uses few rows.

A student and its options go in, one `torch.optim.Optimizer` comes out. A word-vector table's gradient is sparse: it
names the rows of the batch. Under dense AdamW such a table costs more than the rest of a recurrent student's step
together, though nearly all of its rows have no gradient. Here only the batch's rows are read and written, and so are
their moments ("lazy" Adam); everything else goes through torch's own step, AdamW's being fused.

What that changes, for a table's rows that are not in the batch: under dense AdamW their moments shrink, they go on
moving by what is left of them, and they decay. Here nothing of them moves: their moments wait as they are for the next
batch that has the row, and weight decay reaches a row only in the steps that have it (a word seen in 1 % of the steps
decays 1 % as often). Bias correction counts the steps of the table, as dense AdamW and `torch.optim.SparseAdam` do.
Where every row is in every batch, the result is that of torch's dense optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from softlabels.errors import StudentError
from softlabels.types import OptimizerName

ADADELTA_RHO = 0.95  # of the Distilled BiLSTM (Tang et al. 2019), with lr 1.0

Group = dict[str, Any]  # one of an optimiser's `param_groups`
# (table (V, D), its rows in the batch (R,), their gradients (R, D), the table's state, its group): steps these rows
RowRule = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor], Group], None]


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters whose learning rate is `lr_scale` times the optimiser's: projections, slow lower layers."""

    parameters: Sequence[nn.Parameter]
    lr_scale: float


def build_optimizer(
    student: nn.Module,
    *,
    name: OptimizerName = "adamw",
    lr: float,
    weight_decay: float,
    groups: Sequence[ParameterGroup] = (),
) -> torch.optim.Optimizer:
    """The optimiser of `student` and of `groups`, whose parameters may lie outside it; frozen ones are left out.

    A parameter of the student that is in no group has `lr` itself. Biases and norms (of one dimension or none) get no
    weight decay, which is decoupled under 'adamw' and a part of the gradient under 'adadelta' (rho 0.95) and 'sgd'
    (plain, without momentum). Sparse gradients: see the module. StudentError where nothing can be trained, or where a
    parameter is in two groups.
    """
    elsewhere = [parameter for group in groups for parameter in group.parameters]
    grouped = {id(parameter) for parameter in elsewhere}
    if len(grouped) < len(elsewhere):
        raise StudentError("a parameter is in two of the optimiser's groups: its learning rate would be ambiguous")
    rest = [parameter for parameter in student.parameters() if id(parameter) not in grouped]
    settings: list[Group] = []
    for group in (ParameterGroup(rest, 1.0), *groups):
        trained = [parameter for parameter in group.parameters if parameter.requires_grad]
        for decay, members in (
            (weight_decay, [parameter for parameter in trained if parameter.ndim > 1]),
            (0.0, [parameter for parameter in trained if parameter.ndim <= 1]),
        ):
            if members:
                settings.append({"params": members, "lr": lr * group.lr_scale, "weight_decay": decay})
    if not settings:
        raise StudentError("the student has no parameter to train: every one is frozen")
    if name == "adadelta":
        return RowAdadelta(settings, lr=lr, rho=ADADELTA_RHO)
    if name == "sgd":
        return RowSGD(settings, lr=lr)
    optimizer = RowAdamW(settings, lr=lr, fused=True)
    # a gradient scaler then undoes its scale itself: the fused kernel would, for its own parameters only
    optimizer._step_supports_amp_scaling = False
    return optimizer


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float) -> Tensor:
    """Scale all gradients down to a common 2-norm of at most `largest_norm`; returns the norm before, a scalar.

    A sparse gradient is summed up by rows first (a row that comes twice has one gradient) and stays sparse. A norm that
    is not finite says that a gradient isn't; the gradients are worth nothing then.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    norm = get_total_norm(values)
    scale = (largest_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for value in values:
        value.mul_(scale.to(value.device))
    return norm


# --------------------------------------------------------------------------------------- torch's optimisers, by rows


class RowAdamW(torch.optim.AdamW):
    """torch's AdamW, lazy where a gradient is sparse."""

    def step(self, closure: Any = None) -> Any:
        with _rows_apart(self, _adamw_rows, closure) as loss:
            super().step()
        return loss


class RowAdadelta(torch.optim.Adadelta):
    """torch's Adadelta, lazy where a gradient is sparse."""

    def step(self, closure: Any = None) -> Any:
        with _rows_apart(self, _adadelta_rows, closure) as loss:
            super().step()
        return loss


class RowSGD(torch.optim.SGD):
    """torch's SGD without momentum; where a gradient is sparse, only its rows decay."""

    def step(self, closure: Any = None) -> Any:
        with _rows_apart(self, _sgd_rows, closure) as loss:
            super().step()
        return loss


@contextmanager
def _rows_apart(optimizer: torch.optim.Optimizer, rule: RowRule, closure: Any) -> Iterator[Any]:
    """Step every sparse gradient by `rule`, and hide it from torch's dense step inside. Yields the closure's loss."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    hidden: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        for group in optimizer.param_groups:
            for table in group["params"]:
                if table.grad is not None and table.grad.is_sparse:
                    gradient = table.grad.coalesce()
                    rule(table, gradient.indices()[0], gradient.values(), optimizer.state[table], group)
                    hidden.append((table, gradient))
                    table.grad = None
    try:
        yield loss
    finally:
        for table, gradient in hidden:
            table.grad = gradient


def _adamw_rows(table: Tensor, rows: Tensor, gradients: Tensor, state: dict[str, Tensor], group: Group) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, of some rows; the state is the fused AdamW's own."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=table.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
    beta1, beta2 = group["betas"]
    state["step"] += 1
    steps = state["step"].item()
    mean = state["exp_avg"][rows].lerp_(gradients, 1 - beta1)
    square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    state["exp_avg"].index_copy_(0, rows, mean)
    state["exp_avg_sq"].index_copy_(0, rows, square)
    spread = square.div_(1 - beta2**steps).sqrt_().add_(group["eps"])
    weights = table[rows].mul_(1 - group["lr"] * group["weight_decay"])
    table.index_copy_(0, rows, weights.addcdiv_(mean, spread, value=-group["lr"] / (1 - beta1**steps)))


def _adadelta_rows(table: Tensor, rows: Tensor, gradients: Tensor, state: dict[str, Tensor], group: Group) -> None:
    """Zeiler 2012, algorithm 1, of some rows."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["square_avg"], state["acc_delta"] = torch.zeros_like(table), torch.zeros_like(table)
    rho, eps = group["rho"], group["eps"]
    state["step"] += 1
    weights = table[rows]
    gradients = gradients.add(weights, alpha=group["weight_decay"])
    square = state["square_avg"][rows].mul_(rho).addcmul_(gradients, gradients, value=1 - rho)
    moved = state["acc_delta"][rows]
    delta = moved.add(eps).sqrt_().div_(square.add(eps).sqrt_()).mul_(gradients)
    state["square_avg"].index_copy_(0, rows, square)
    state["acc_delta"].index_copy_(0, rows, moved.mul_(rho).addcmul_(delta, delta, value=1 - rho))
    table.index_copy_(0, rows, weights.sub_(delta, alpha=group["lr"]))


def _sgd_rows(table: Tensor, rows: Tensor, gradients: Tensor, state: dict[str, Tensor], group: Group) -> None:
    weights = table[rows].mul_(1 - group["lr"] * group["weight_decay"])
    table.index_copy_(0, rows, weights.sub_(gradients, alpha=group["lr"]))
