"""What Ray's workers are worth, and what sharing out costs.

Run it:  python -m tests.bench.bench_ray [--only pair,overhead,tiny] [--rows N] [--turns N] [--shards N]

The teacher is a small BERT with random weights (6 layers of 384, MiniLM's shape); the corpus is
../shared/corpora/sst2, found beside the repository, or sentences made of its words where that is missing.

pair      rows/s of 2 workers against 1, one thread each, on this machine (wanted: 1.8 times on two free cores). The
          clock runs between the first shard (of each) and the last that came in: start-up is said beside it.
overhead  milliseconds that the process that shares out takes for a shard of 4,096 rows (wanted: under 20), its workers
          doing nothing: what is sent, and what is told.
tiny      a whole dump of 10,000 shards of one row; it is complete if all of them are there.

Its figures mean something on a machine that does nothing else: its load is printed first, every turn beside the median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from softlabels.cache.format import read_manifest
from softlabels.config import DumpOptions, RayOptions
from softlabels.corpus import Corpus, read_corpus
from softlabels.dump import dump
from softlabels.engines import ray_shards
from softlabels.engines.local import ShardTask
from softlabels.engines.ray_cluster import connect
from softlabels.engines.ray_pool import Watch, run_items
from softlabels.engines.ray_shards import Parcel
from softlabels.progress import quiet
from softlabels.tasks import TaskLabels
from softlabels.types import Example
from tests.models import TEXTS, save_teacher

SST2 = Path(__file__).parents[3] / "shared" / "corpora" / "sst2"
PARTS = ("pair", "overhead", "tiny")
SHARD_ROWS = 256


class Nothing:
    """A worker that answers at once."""

    def do(self, parcel: Parcel) -> int:
        return parcel.task.shard


def sentences(count: int) -> Corpus:
    """The first rows of SST-2, again and again where there are fewer; no labels."""
    texts = [row.text for row in read_corpus(str(SST2), split="train").examples] if SST2.is_dir() else []
    if not texts:
        print("../shared/corpora/sst2 is missing: other sentences")
        texts = [text for text, _ in TEXTS]
    rows = [Example(f"{number}", texts[number % len(texts)]) for number in range(count)]
    return Corpus(source="bench", split=None, examples=rows, label_names=None)


def timed(corpus: Corpus, teacher: Path, out: Path, workers: int, shard_rows: int) -> tuple[float, float]:
    """Rows a second between the first and the last shard, and seconds until the first."""
    came: list[float] = []
    plain = ray_shards.run_items

    def noting(items: Any, open_worker: Any, *, watch: Watch[Any], **rest: Any) -> Any:
        def done(task: Any, result: Any) -> None:
            came.append(time.monotonic())
            watch.done(task, result)

        return plain(items, open_worker, watch=Watch(watch.name, done, watch.changed), **rest)

    ray_shards.run_items = noting
    begun = time.monotonic()
    try:
        options = DumpOptions(shard_rows=shard_rows, batch_tokens=2048)
        ray = RayOptions(workers=workers, gpus_per_worker=0)
        dump(corpus, teacher=str(teacher), out=out, options=options, ray=ray)
    finally:
        ray_shards.run_items = plain
    # the first shard of each worker comes with its start: from there on, all that are left are timed
    shards, timed_from = len(came), workers
    rows = (shards - timed_from) * shard_rows
    return rows / (came[-1] - came[timed_from - 1]), came[0] - begun


def pair(folder: Path, rows: int, turns: int) -> None:
    corpus = sentences(rows // SHARD_ROWS * SHARD_ROWS)
    tokenizer_texts = [row.text for row in corpus.examples[:2000]]
    teacher = save_teacher(folder / "teacher", texts=tokenizer_texts, layers=6, hidden=384, heads=12, num_labels=2)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(turns):
        for workers in speeds:
            speed, start = timed(corpus, teacher, folder / f"{workers}-{turn}", workers, SHARD_ROWS)
            speeds[workers].append(speed)
            load = os.getloadavg()[0]
            print(f"{workers} worker(s): {speed:7.1f} rows/s; first shard after {start:4.1f} s; load {load:.1f}")
    one, two = (statistics.median(speeds[workers]) for workers in (1, 2))
    print(f"pair: 2 workers {two:.1f} rows/s, 1 worker {one:.1f}: {two / one:.2f} times (wanted 1.8)")


def overhead(shards: int = 200) -> None:
    corpus = sentences(4096)
    labels = TaskLabels([-100] * 4096)
    tasks = [Parcel(ShardTask(number, corpus.examples, labels, ["examples", "logits"])) for number in range(shards)]
    with connect(RayOptions(workers=2, gpus_per_worker=0)) as room:
        came: list[tuple[float, float]] = []
        watch: Watch[Parcel] = Watch(repr, lambda parcel, told: came.append((time.monotonic(), time.process_time())))
        run_items(tasks, Nothing, room=room, total=shards, depth=3, watch=watch)
    wall, cpu = ((came[-1][which] - came[0][which]) / (shards - 1) * 1e3 for which in (0, 1))
    print(f"overhead: {wall:.1f} ms a shard of 4,096 rows, {cpu:.1f} of them the driver's CPU (wanted: under 20)")


def tiny(folder: Path, shards: int) -> None:
    teacher = save_teacher(folder / "tiny", layers=1, hidden=16, heads=2)
    started = time.monotonic()
    speed, _ = timed(sentences(shards), teacher, folder / "tiny-cache", 2, 1)
    manifest = read_manifest(folder / "tiny-cache")
    whole = manifest.complete and len(manifest.shard_rows) == shards
    seconds = time.monotonic() - started
    print(f"tiny: {shards} shards, complete: {whole}; {speed:.0f} shards/s, {seconds:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--shards", type=int, default=10_000)
    given = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # of the workers: tokenising too is one thread's
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with quiet(), tempfile.TemporaryDirectory() as folder:
        for part in given.only.split(","):
            if part == "pair":
                pair(Path(folder), given.rows, given.turns)
            elif part == "overhead":
                overhead()
            elif part == "tiny":
                tiny(Path(folder), given.shards)
            else:
                parser.error(f"--only {part}: there are {', '.join(PARTS)}")


if __name__ == "__main__":
    main()
