"""A dump on a Ray cluster that loses a node and gets another.

In a module of its own: Ray can't simulate nodes in a process that is connected to a cluster, as test_ray's is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engines.test_devices import contents
from tests.engines.test_ray import PATIENCE, actors, await_, needs_ray, receipts, started, write_rows
from tests.models import save_teacher


@needs_ray
@pytest.mark.slow
def test_a_node_that_is_lost_and_another_that_comes(tmp_path: Path) -> None:
    """The cluster is simulated on this machine, its workers are real; the driver joins it by its address."""
    from ray.cluster_utils import Cluster

    teacher, rows = save_teacher(tmp_path / "teacher"), write_rows(tmp_path / "rows.jsonl")
    environment_before = dict(os.environ)
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": {"worker_niceness": 0}}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = cluster.add_node(num_cpus=1)
        out = tmp_path / "cache"
        process = started(
            rows, teacher, out, "--engine", "ray", "--address", cluster.address, "--workers", "2", "--json"
        )
        raylet = second.all_processes["raylet"][0].process.pid
        await_(lambda: actors(psutil.Process(raylet)) and receipts(out) >= 4, "no worker came to the second node")
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        told, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        report = json.loads(told)
        assert len(report["lost"]) == 1, report
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(environment_before)
    started(rows, teacher, tmp_path / "local", "--cpu").communicate(timeout=PATIENCE)
    assert contents(out) == contents(tmp_path / "local")
