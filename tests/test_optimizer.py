"""The optimisers: torch's own where every row has a gradient, rows alone where a gradient is sparse, and clipping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from softlabels.config import StudentOptions
from softlabels.errors import StudentError
from softlabels.optimizer import ParameterGroup, build_optimizer, clip_gradients
from softlabels.training.learner import make_optimizer
from softlabels.types import OptimizerName

NAMES: list[OptimizerName] = ["adamw", "adadelta", "sgd"]
RATES = {"adamw": 1e-2, "adadelta": 1.0, "sgd": 1e-1}
DENSE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adadelta": lambda groups, lr: torch.optim.Adadelta(groups, lr=lr, rho=0.95),
    "sgd": torch.optim.SGD,
}
ROWS = 12


class Model(nn.Module):
    """A table of word vectors, its mean, and a layer with a bias."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, 5, padding_idx=0, sparse=sparse)
        self.layer = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.table(ids).mean(1))


def batches(words: list[int], count: int = 8) -> list[Tensor]:
    """Batches (4, 6) that hold each of `words`, some of them more than once."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.tensor((words * 24)[:24])[torch.randperm(24, generator=generator)].reshape(4, 6) for _ in range(count)
    ]


def train(model: Model, optimizer: Any, given: list[Tensor], schedule: Any = None) -> None:
    for ids in given:
        loss = nn.functional.cross_entropy(model(ids), torch.arange(4) % 3)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def split(model: Model, decay: float) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": [model.layer.bias], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rows_that_are_in_every_batch_move_as_under_torchs_dense_optimiser(name, decay):
    given = batches(list(range(1, ROWS)))
    ours, theirs = Model(sparse=True), Model(sparse=False)
    # a padding row has no gradient: dense decay would still shrink it
    theirs.table.weight.data[0] = ours.table.weight.data[0] = 0.0
    train(ours, build_optimizer(ours, name=name, lr=RATES[name], weight_decay=decay), given)
    train(theirs, DENSE[name](split(theirs, decay), lr=RATES[name]), given)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert not torch.equal(ours.table.weight, Model(sparse=True).table.weight)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_in_no_batch_stay_as_they_are(name):
    model = Model(sparse=True)
    before = model.table.weight.detach().clone()
    optimizer = build_optimizer(model, name=name, lr=RATES[name], weight_decay=0.1)
    train(model, optimizer, batches([2, 3, 7]))
    moved = (model.table.weight != before).all(1)
    assert moved.nonzero().flatten().tolist() == [2, 3, 7]
    for kept in optimizer.state[model.table.weight].values():
        if kept.ndim == 2:
            assert (kept != 0).any(1).nonzero().flatten().tolist() == [2, 3, 7]


def test_moments_of_an_absent_row_wait():
    model = Model(sparse=True)
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1)
    train(model, optimizer, batches([2, 3], count=3))
    then = {name: value[2].clone() for name, value in optimizer.state[model.table.weight].items() if value.ndim == 2}
    weights = model.table.weight[2].detach().clone()
    train(model, optimizer, batches([3, 4], count=3))
    assert torch.equal(model.table.weight[2], weights)
    state = optimizer.state[model.table.weight]
    assert all(torch.equal(state[name][2], value) for name, value in then.items()) and len(then) == 2
    assert state["step"].item() == 6  # of the table: what bias correction counts


def test_groups_have_learning_rates_of_their_own_and_frozen_parameters_none():
    model, projection = Model(sparse=True), nn.Linear(3, 2)
    model.layer.weight.requires_grad_(False)
    groups = [ParameterGroup(list(projection.parameters()), 5.0), ParameterGroup(list(model.table.parameters()), 0.1)]
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.3, groups=groups)
    found = {
        id(parameter): (round(group["lr"], 9), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        id(model.layer.bias): (1e-2, 0.0),
        id(projection.weight): (5e-2, 0.3),
        id(projection.bias): (5e-2, 0.0),
        id(model.table.weight): (1e-3, 0.3),
    }
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 10)
    optimizer.step()
    schedule.step()
    assert [round(group["lr"], 9) for group in optimizer.param_groups] == [9e-3, 4.5e-2, 4.5e-2, 9e-4]


@pytest.mark.parametrize(("decay", "last"), [("linear", [1.0, 0.75, 0.5, 0.25]), ("none", [1.0, 1.0, 1.0, 1.0])])
def test_a_rate_grows_and_then_falls_or_stays(decay: str, last: list[float]):
    """Of a phase that says so itself, and of one that leaves it to the options."""
    own, common = {"losses": {"ce": 1}, "decay": decay}, {"losses": {"ce": 1}}
    for choice in ({"phases": [own]}, {"phases": [common], "decay": decay}):
        options = StudentOptions.model_validate({"student": "bilstm", "lr": 1.0, "warmup": 0.5, **choice})
        optimizer, schedule = make_optimizer(Model(sparse=False), options.all_phases()[0], options, [], steps=8)
        rates = []
        for _ in range(8):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == [0, 0.25, 0.5, 0.75, *last]


def test_what_cannot_be_optimised_is_refused():
    model = Model(sparse=True)
    twice = [ParameterGroup([model.layer.bias], 1.0), ParameterGroup([model.layer.bias], 2.0)]
    with pytest.raises(StudentError, match="two of the optimiser's groups"):
        build_optimizer(model, lr=1e-2, weight_decay=0.0, groups=twice)
    with pytest.raises(StudentError, match="every one is frozen"):
        build_optimizer(model.requires_grad_(False), lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_training_equals_an_uninterrupted_one(name, tmp_path: Path):
    """Through Accelerate's `prepare`, `save_state` and `load_state`, with a schedule."""
    given = batches([1, 2, 3, 5], count=4) + batches([3, 4, 8], count=4)

    def begin() -> tuple[Accelerator, Any, Any, Any]:
        model = Model(sparse=True)
        optimizer = build_optimizer(model, name=name, lr=RATES[name], weight_decay=0.1)
        accelerator = Accelerator(cpu=True)
        schedule = get_linear_schedule_with_warmup(optimizer, 2, 8)
        return (accelerator, *accelerator.prepare(model, optimizer, schedule))

    _, whole, optimizer, schedule = begin()
    train(whole, optimizer, given, schedule)
    accelerator, first, optimizer, schedule = begin()
    train(first, optimizer, given[:5], schedule)
    accelerator.save_state(str(tmp_path / "checkpoint"))
    accelerator, second, optimizer, schedule = begin()
    accelerator.load_state(str(tmp_path / "checkpoint"))
    train(second, optimizer, given[5:], schedule)
    for one, two in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("largest", [0.05, 100.0])
def test_clipping_counts_a_row_that_comes_twice_once(largest):
    ours, theirs = Model(sparse=True), Model(sparse=False)
    ids = torch.tensor([[1, 1, 2, 3, 3, 3]] * 4)
    for model in (ours, theirs):
        nn.functional.cross_entropy(model(ids), torch.arange(4) % 3).backward()
    norm = clip_gradients(ours.parameters(), largest)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), largest)
    torch.testing.assert_close(norm, expected)
    assert ours.table.weight.grad is not None and ours.table.weight.grad.is_sparse
    assert (norm > largest) == (largest < 1)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.to_dense() if one.grad.is_sparse else one.grad, two.grad)


def test_a_gradient_that_is_no_number_is_told_by_the_norm():
    model = Model(sparse=True)
    model(torch.tensor([[1, 2]])).sum().mul(float("inf")).backward()
    assert not torch.isfinite(clip_gradients(model.parameters(), 1.0))


def test_a_closure_is_called_and_its_loss_returned():
    model = Model(sparse=True)
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.0)
    before = model.table.weight.detach().clone()

    def closure() -> Tensor:
        loss = model(torch.tensor([[1, 2]])).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0  # type: ignore[arg-type, attr-defined]
    assert (model.table.weight != before).any(1).nonzero().flatten().tolist() == [1, 2]
