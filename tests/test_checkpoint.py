"""Checkpoints hold every weight, however it lies in memory, and go back into the models that they came from."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softlabels.checkpoint import Progress, restore, save_checkpoint
from softlabels.errors import StudentError

MODEL = "model.safetensors"


class Student(nn.Module):
    """An LSTM whose weights are parts of one storage with gaps, as cuDNN lays them; its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 4, bidirectional=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        weights = list(self.lstm.parameters())
        storage, start = torch.zeros(sum(weight.numel() + 32 for weight in weights)), 32
        for weight in weights:
            part = storage[start : start + weight.numel()].view_as(weight)
            part.copy_(weight.detach())
            weight.data = part
            start += weight.numel() + 32


@pytest.fixture
def trained() -> tuple[Student, Accelerator]:
    """A student and a projection beside it, prepared."""
    accelerator, student = Accelerator(cpu=True), Student()
    for module in (student, nn.Linear(4, 4)):
        accelerator.prepare_model(module, evaluation_mode=True)
    return student, accelerator


def moved(accelerator: Accelerator) -> list[dict[str, Tensor]]:
    """The weights of all modules, which then get others."""
    before = [copy.deepcopy(dict(module.state_dict())) for module in accelerator._models]
    with torch.no_grad():
        for module in accelerator._models:
            for weight in module.parameters():
                weight.add_(1)
    return before


def test_every_weight_comes_back(trained: tuple[Student, Accelerator], tmp_path: Path) -> None:
    student, accelerator = trained
    save_checkpoint(tmp_path, student, accelerator, Progress(epoch=1, best_epoch=1))
    before = moved(accelerator)
    restore(tmp_path, accelerator, Progress(epoch=1))
    assert len(accelerator._models) == len(before) == 2
    for module, weights in zip(accelerator._models, before, strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert student.head.weight is student.embedding.weight
    kept = load_file(tmp_path / "checkpoint" / MODEL)
    assert len(kept) == len(student.state_dict()) - 1  # tied weights once


def test_a_checkpoint_that_lacks_weights_is_refused(trained: tuple[Student, Accelerator], tmp_path: Path) -> None:
    student, accelerator = trained
    save_checkpoint(tmp_path, student, accelerator, Progress(epoch=1, best_epoch=1))
    file = tmp_path / "checkpoint" / MODEL
    kept = load_file(file)
    save_file({name: value for name, value in kept.items() if "bias_hh" not in name}, file)
    with pytest.raises(
        StudentError, match=r"lacks lstm\.bias_hh_l0, lstm\.bias_hh_l0_reverse, .*delete the run's folder"
    ):
        restore(tmp_path, accelerator, Progress(epoch=1))
    save_file(kept | {"lstm.extra": torch.zeros(2)}, file)
    with pytest.raises(StudentError, match=r"has lstm\.extra, which the student has not: delete"):
        restore(tmp_path, accelerator, Progress(epoch=1))
    save_file(kept | {"lstm.bias_hh_l0": torch.zeros(2)}, file)
    with pytest.raises(StudentError, match=r"does not fit the student \(.*size mismatch.*\): delete"):
        restore(tmp_path, accelerator, Progress(epoch=1))
    file.write_bytes(b"no weights")
    with pytest.raises(StudentError, match=r"model\.safetensors is damaged .*train the student again"):
        restore(tmp_path, accelerator, Progress(epoch=1))
