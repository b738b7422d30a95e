"""A dump on Ray's workers that share one GPU: what a local dump on it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.cache import open_cache
from softlabels.config import DumpOptions, RayOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

pytest.importorskip("ray", reason="Ray is not installed: pip install 'softlabels[ray]'")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_two_workers_share_a_gpu(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    rows = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(TEXTS * 4)]
    corpus = Corpus(source="made", split=None, examples=rows, label_names=LABEL_NAMES)
    options = DumpOptions(capture=["logits", "hidden:1,2"], shard_rows=16, codec="float32")

    def run(name: str, **where: Any) -> Any:
        dump(corpus, teacher=str(teacher), out=tmp_path / name, options=options, **where)
        return open_cache(tmp_path / name)

    local = run("local", device="cuda")
    shared = run("shared", ray=RayOptions(workers=2, gpus_per_worker=0.5))
    numbers, names = np.arange(len(rows)), list(local.fields)
    one, two = local.signals(numbers, names), shared.signals(numbers, names)
    assert max(float((one.get(name) - two.get(name)).abs().max()) for name in names) < 1e-5
