"""How fast `verify` reads beside a plain read of the same files: `python -m tests.bench.bench_verify [GIGABYTES]`.

Warm: the files are in the page cache. Cold: they were just dropped from it. Medians of 5, the contestants in turn.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from softlabels.cache.build import CacheBuild
from softlabels.cache.files import write_file
from softlabels.cache.format import MANIFEST, to_json
from softlabels.cache.verify import verify_cache
from softlabels.cache.writer import FieldShard, join_hash, write_examples
from softlabels.progress import quiet
from tests.cache.made import VOCABULARY, manifest_of, rows_of

WIDTH, LENGTH, SHARD_ROWS = 768, 64, 1024  # a shard has 100 MB
ROUNDS = 5


def make(folder: Path, gigabytes: float) -> list[Path]:
    shards = max(int(gigabytes * 1e9 / (2 * WIDTH * LENGTH * SHARD_ROWS)), 1)
    rows = rows_of([LENGTH] * (shards * SHARD_ROWS))
    fields = {"hidden.01": {"kind": "token", "type": "float16", "width": WIDTH}}
    build = CacheBuild(folder, manifest_of(rows, fields, shard_rows=SHARD_ROWS))
    values = torch.randn(SHARD_ROWS, LENGTH, WIDTH)
    for shard in build.shards():
        part = rows[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        write_examples(folder, part, shard=shard, vocab_size=VOCABULARY, token_types=True, text=True)
        tokens = np.full(len(part), LENGTH)
        writer = FieldShard(folder, "hidden.01", build.manifest.fields["hidden.01"], shard=shard, tokens=tokens)
        for start in range(0, len(part), 64):
            writer.write(np.arange(start, start + 64), values[start : start + 64], ids=["x"] * 64)
        writer.commit(join_hash(part))
    write_file(folder / MANIFEST, to_json(build.manifest))
    build.finish()
    return sorted(folder.glob("*/*.arrow"))


def plain_read(files: list[Path]) -> None:
    view = memoryview(bytearray(1 << 20))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(view):
                pass


def drop(files: list[Path]) -> None:
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main(gigabytes: float) -> None:
    with tempfile.TemporaryDirectory() as place, quiet():
        folder = Path(place)
        files = make(folder, gigabytes)
        size = sum(path.stat().st_size for path in files)
        contestants: dict[str, Callable[[], object]] = {
            "plain read": lambda: plain_read(files),
            "verify": lambda: verify_cache(folder),
        }
        print(f"{len(files)} files, {size / 1e9:.1f} GB, {os.cpu_count()} cores; MB/s, median of {ROUNDS}")
        for state in ("warm", "cold"):
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(ROUNDS):
                for name, run in contestants.items():
                    if state == "cold":
                        drop(files)
                    started = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - started)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            for name, median in medians.items():
                ratio = medians["plain read"] / median
                print(f"{state}  {name:10}  {size / median / 1e6:8.0f}  {ratio:.2f} of the plain read")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
