"""The dump on a GPU: what the CPU says, by the way off the device that only a GPU has.

The same way is taken on the CPU by tests/engines/test_local.py; the speed is measured by
`python -m tests.bench.bench_dump --device cuda`, see there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.cache import open_cache
from softlabels.cache.reader import Cache
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import DumpReport, dump
from softlabels.errors import CacheError
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROWS = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(TEXTS * 10)]
CAPTURES = ["logits", "hidden:all", "hidden:2@cls", "qkv:2", "attention:1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


def run(teacher: Path, out: Path, *, device: str | None = None, devices: list[str] | None = None, **changes: Any):
    options = {"capture": CAPTURES, "shard_rows": 64, "batch_tokens": 512, "codec": "float32"} | changes
    corpus = Corpus(source="made", split=None, examples=ROWS, label_names=LABEL_NAMES)
    given = DumpOptions.model_validate(options)
    report: DumpReport = dump(corpus, teacher=str(teacher), out=out, options=given, device=device, devices=devices)
    assert report.rows == len(ROWS)
    return open_cache(out)


def largest_difference(one: Cache, other: Cache) -> float:
    rows, names = np.arange(len(one)), list(one.fields)
    first, second = one.signals(rows, names), other.signals(rows, names)
    return max(float((first.get(name) - second.get(name)).abs().max()) for name in names)


@pytest.mark.parametrize(("codec", "bound"), [("float32", 1e-3), ("float16", 1e-2), ("bfloat16", 5e-2)])
def test_a_gpu_says_what_the_cpu_says(teacher: Path, tmp_path: Path, codec: str, bound: float) -> None:
    """To the rounding of the codec and, where it is on, of TF32."""
    cpu = run(teacher, tmp_path / "cpu", device="cpu")
    gpu = run(teacher, tmp_path / "gpu", device="cuda", codec=codec)
    assert largest_difference(cpu, gpu) < bound


def test_a_gpu_says_the_same_twice(teacher: Path, tmp_path: Path) -> None:
    """Pinned memory is used again and again: a batch written too late would show here."""
    one, two = (run(teacher, tmp_path / name, device="cuda", batch_tokens=128) for name in ("one", "two"))
    assert largest_difference(one, two) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_a_gpu(teacher: Path, tmp_path: Path, dtype: str) -> None:
    exact = run(teacher, tmp_path / "exact", device="cuda")
    half = run(teacher, tmp_path / "half", device="cuda", dtype=dtype)
    assert 0 < largest_difference(exact, half) < 0.2


def test_int8_on_a_gpu(teacher: Path, tmp_path: Path) -> None:
    captures = ["logits", "hidden:all"]
    exact = run(teacher, tmp_path / "exact", device="cuda", capture=captures)
    small = run(teacher, tmp_path / "small", device="cuda", capture=captures, codec="int8")
    assert largest_difference(exact, small) < 0.2


def test_two_processes_on_gpus(teacher: Path, tmp_path: Path) -> None:
    devices = ["cuda:0", f"cuda:{torch.cuda.device_count() - 1}"]
    one = run(teacher, tmp_path / "one", device="cuda")
    assert largest_difference(one, run(teacher, tmp_path / "two", devices=devices)) < 1e-4


def test_what_does_not_fit_is_named(teacher: Path, tmp_path: Path) -> None:
    from softlabels.teacher import load_teacher

    live = load_teacher(str(teacher), device="cpu")
    with torch.no_grad():
        dict(live.model.named_parameters())["bert.encoder.layer.1.output.LayerNorm.weight"].mul_(1e6)
    live.model.save_pretrained(tmp_path / "loud")
    live.tokenizer.save_pretrained(tmp_path / "loud")
    with pytest.raises(CacheError, match=r"beyond ±65504, which float16 cannot hold, in example\(s\) row-"):
        run(tmp_path / "loud", tmp_path / "cache", device="cuda", codec="float16")
    assert list((tmp_path / "cache").rglob(".tmp-*")) == []
