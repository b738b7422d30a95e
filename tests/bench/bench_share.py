"""push and pull through an S3 server on loopback beside s3fs's own put and get of the same files.

    python -m tests.bench.bench_share [--mb 1024] [--repeats 3]

The server is moto in a process of its own; each turn runs all four, so that a busy machine is busy for all. Rates are
medians, in MB/s of the cache's files. s3fs alone checks nothing on arrival, puts no manifest and syncs no file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from softlabels.cache.pull import pull
from softlabels.cache.push import push
from tests.cache.made import rows_of, write_cache
from tests.servers import s3_server

SHARD_MB = 32


def make_cache(folder: Path, megabytes: int) -> int:
    """A cache of float16 hidden states in shards of 32 MB; its bytes."""
    length, width, shard_rows = 16, 1000, 1000
    rows = rows_of([length] * (megabytes * 10**6 // (2 * length * width)))
    value = np.random.default_rng(0).normal(size=(length, width)).astype(np.float32)
    fields = {"hidden.06": {"kind": "token", "type": "float16", "width": width}}
    manifest = write_cache(folder, rows, fields, {"hidden.06": [value] * len(rows)}, shard_rows=shard_rows)
    return sum(table.total for table in manifest.shards.values())


def timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"SOFTLABELS_QUIET": "1"}
    seconds: dict[str, list[float]] = {name: [] for name in ("s3fs put", "push", "s3fs get", "pull")}
    with tempfile.TemporaryDirectory(prefix="softlabels-bench-") as place:
        cache = Path(place, "cache")
        size = make_cache(cache, options.mb)
        for turn in range(options.repeats):
            with s3_server() as port:  # a new one: moto keeps all in memory
                os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
                import boto3
                import s3fs

                boto3.client("s3").create_bucket(Bucket="bench")
                fs = s3fs.S3FileSystem(skip_instance_cache=True)
                back = [Path(place, f"back-{turn}-{name}") for name in ("s3fs", "pull")]
                acts: dict[str, Callable[[], object]] = {
                    "s3fs put": partial(fs.put, f"{cache}/", "bench/plain/", recursive=True),
                    "push": partial(push, cache, "s3://bench/pushed", compress=False),
                    "s3fs get": partial(fs.get, "bench/plain/", f"{back[0]}/", recursive=True),
                    "pull": partial(pull, "s3://bench/pushed", back[1]),
                }
                for name, act in acts.items():
                    seconds[name].append(timed(act))
                for folder in back:
                    shutil.rmtree(folder)
    rates = {name: size / 1e6 / statistics.median(found) for name, found in seconds.items()}
    print(f"{size / 1e6:,.0f} MB in shards of {SHARD_MB} MB, {options.repeats} turns")
    for name, other in (("push", "s3fs put"), ("pull", "s3fs get")):
        ratio = rates[name] / rates[other]
        print(f"{name:5} {rates[name]:7.1f} MB/s   {other:9} {rates[other]:7.1f} MB/s   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
