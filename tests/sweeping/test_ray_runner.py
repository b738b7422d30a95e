"""Sweeps on a Ray cluster: the students of one process, failures as rows, and a worker that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from softlabels.cli import _guarded
from softlabels.config import CombineOptions, RayOptions
from softlabels.engines.ray_cluster import Room
from softlabels.sweeping.ray_runner import open_trainer
from softlabels.sweeping.training import Setting
from tests.engines.test_ray import needs_ray
from tests.test_sweep import FIXED, cache, same, swept, table

__all__ = ["cache"]  # a fixture
TWO = RayOptions(workers=2, gpus_per_worker=0)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.slow
@needs_ray
def test_trials_on_a_cluster_are_those_of_one_process(cache: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as each worker has
    try:
        here = swept(cache, tmp_path / "here")
    finally:
        torch.set_num_threads(before)
    axes = {"temperature": [1, 2, 4], "lr": [5e-3, 1e30]}  # the second one diverges
    fixed = {key: value for key, value in FIXED.items() if key != "lr"}
    there = swept(cache, tmp_path / "there", axes=axes, fixed=fixed, runner=None, ray=TWO)
    assert len(there.trials) == 6 and len(there.failed) == 3
    wanted = {row["temperature"]: row for row in table(here)}
    for row in table(there):
        if row["lr"] == FIXED["lr"]:
            alone = wanted[row["temperature"]]
            assert (row["status"], row["accuracy"]) == ("done", alone["accuracy"])
            assert same(tmp_path / "there" / row["run"], tmp_path / "here" / alone["run"])
        else:
            assert row["status"] == "failed" and "smaller --lr" in row["error"]
    again = swept(cache, tmp_path / "there", axes=axes, fixed=fixed, runner=None, ray=TWO)
    assert again.skipped == 3 and len(again.failed) == 3


@pytest.mark.slow
@needs_ray
def test_a_killed_worker_is_replaced(cache: Path, tmp_path: Path) -> None:
    """Whichever trial it was at is tried again."""
    killed: list[int] = []
    over = threading.Event()

    def kill_one() -> None:
        while not over.is_set():
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "ray::_Actor.do" in " ".join(process.cmdline()) and not killed:
                        time.sleep(0.2)
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
            time.sleep(0.05)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        fixed = FIXED | {"epochs": 20}
        result = swept(cache, tmp_path / "sweep", fixed=fixed, runner=None, ray=TWO)
    finally:
        over.set()
        thread.join()
    assert killed and len(result.trials) == 3 and not result.failed


def test_without_a_share_of_a_gpu_a_trial_is_on_the_cpu(tmp_path: Path) -> None:
    """Ray hides no GPU from an actor that was promised none."""
    setting = Setting(tmp_path, (tmp_path / "cache",), CombineOptions())
    wanted = {0.0: True, 0.5: False, 1.0: False}
    assert {gpus: open_trainer(setting, Room(2, 2, 1.0, gpus)).setting.cpu for gpus in wanted} == wanted
    assert open_trainer(replace(setting, cpu=True), Room(2, 2, 1.0, 1.0)).setting.cpu


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--engine", "rya"], "Did you mean 'ray'"),
        (["--workers", "2"], "--workers is of a Ray cluster: add --engine ray"),
        (["--engine", "ray", "--jobs", "2"], "give --workers"),
        (["--engine", "ray", "--optuna", "2"], "give --optuna without --engine ray"),
    ],
)
def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], told: str) -> None:
    command = ["sweep", str(tmp_path / "cache"), "--student", "bilstm", "--temperature", "1,2", "--out", str(tmp_path)]
    assert _guarded([*command, *more], debug=False) == 2
    assert told in capsys.readouterr().err
