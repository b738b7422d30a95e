"""What each process of `test_processes.py` runs: trainings from the caches of PLACE, one after the other.

Run it:  torchrun --nproc_per_node 2 -m tests.training.train_in_processes PLACE OUT [CASE ...]
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from softlabels import train
from softlabels.cache import open_cache
from softlabels.checkpoint import save_checkpoint
from softlabels.config import StudentOptions
from softlabels.errors import StudentError
from softlabels.progress import quiet
from softlabels.training.processes import find_processes

# every student without dropout: its draws are each process's own
CASES: dict[str, dict[str, Any]] = {
    "rows": {  # a table of word vectors, whose gradients are sparse; few of the rows have a label
        "student": "bilstm",
        "options": {"embedding_dim": 8, "hidden_size": 8, "fc_size": 8, "dropout": 0.0},
        "losses": {"kl": 0.7, "ce": 0.3},
        "temperature": "flsw:4",
        "clip": 0.5,
        "epochs": 2,
    },
    "layers": {  # two phases; projections and layer weights beside the student; rows that are looked at together
        "student": "transformer",
        "optimizer": "sgd",  # Adam would make steps of what is rounding: the gradient of a key's bias, which is 0
        "lr": 0.05,
        "options": {"init_from": "teacher", "init_layers": [2], "layers": 1},
        "phases": [
            {
                "name": "intermediate",
                "losses": [
                    {"loss": "hidden_mse", "map": "uniform", "project": "linear"},
                    {"loss": "emd", "map": "all", "options": {"update": True}},
                    {"loss": "value_relation", "map": "final"},
                    {"loss": "attention_kl", "map": "final"},
                ],
                "epochs": 2,
            },
            {"name": "prediction", "losses": {"dist": 1, "ce": 1}, "epochs": 2},
        ],
    },
    "words": {  # a language model, a term for each token
        "student": "transformer",
        "optimizer": "sgd",
        "lr": 0.05,
        "options": {"init_from": "language", "init_layers": [1], "layers": 1},
        "losses": {"kl": 0.5, "ce": 0.5},
        "temperature": "2",
        "epochs": 2,
    },
}
CACHES = {"rows": "cache", "layers": "cache", "words": "language-cache"}


def train_case(name: str, place: Path, out: Path, *, resume: bool = False) -> None:
    """One of `CASES`, from its cache in `place` into the run folder `out`."""
    given = {"batch_size": 16, "lr": 5e-3, "seed": 3, "validation": 0.2} | CASES[name]
    if (start := given["options"].get("init_from")) is not None:
        given["options"] = given["options"] | {"init_from": str(place / start)}
    options = StudentOptions.model_validate(given)
    with quiet():
        train.train_student(open_cache(place / CACHES[name]), out=out, options=options, resume=resume, cpu=True)


class Stop(Exception):
    """After the first checkpoint."""


def stopped_and_resumed(name: str, place: Path, out: Path) -> None:
    """The same, which stops after its first epoch and is called again."""

    def save_and_stop(*arguments: Any) -> None:
        save_checkpoint(*arguments)
        raise Stop

    setattr(train, "save_checkpoint", save_and_stop)  # noqa: B010  # a function's place, to mypy
    try:
        train_case(name, place, out)
    except Stop:
        setattr(train, "save_checkpoint", save_checkpoint)  # noqa: B010
        train_case(name, place, out, resume=True)


def add_uneven_gradients(out: Path) -> None:
    """Of three parameters the first has a gradient in the first process alone, the second in the others, as with
    LayerDrop; the third in none. What each process has of the sums goes into a file of its own."""
    processes = find_processes(cpu=True)
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[min(processes.rank, 1)].grad = torch.full((2,), 1.0 + processes.rank)
    processes.add_gradients(parameters)
    sums = [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]
    (out / f"sums-{processes.rank}.json").write_text(json.dumps(sums))


def end_in_one_process(place: Path, out: Path) -> None:
    """The last process meets a full disk at its first checkpoint; what each was told goes into a file of its own."""
    processes = find_processes(cpu=True)

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if processes.rank == processes.count - 1:
        setattr(Accelerator, "save_state", fail)  # noqa: B010
    try:
        train_case("rows", place, out / "ended")
    except StudentError as error:
        (out / f"told-{processes.rank}.txt").write_text(str(error))
        sys.stdout.flush()
        os._exit(0)  # as a process ends whose error was told


if __name__ == "__main__":
    place, out = Path(sys.argv[1]), Path(sys.argv[2])
    add_uneven_gradients(out)
    for case in CASES:
        train_case(case, place, out / case)
    stopped_and_resumed("layers", place, out / "resumed")
    end_in_one_process(place, out)
