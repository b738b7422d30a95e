"""How fast caches are combined beside reading and writing the same bytes, and how much memory that takes.

Run it:  python -m tests.bench.bench_combine [--rows 1000000] [--caches 8] [--rounds 3] [--folder DIR] [--only combine]
                                                   [--cold]

Contestants take turns, each in a process of its own, so that its peak memory can be told; only the work is timed, not
the imports. The plain ones read every byte of all the caches' files, 1 MB at a time, and write as many bytes as the
result has, into as many files; "synced" also syncs each file and its folder, as a crash-safe writer must. Where the
files of all caches but the first are not read (their examples, when the rows are the same), combining may be faster.
With --cold no file is in the system's memory before a contestant reads it: what the disk can do shows only then.

    combine     mean of probabilities of caches with the same rows in the same files
    shuffled    the same, of which one has its rows in another order: they are joined by hashes and gathered
    rows        as many caches of parts of the corpus, put together row after row (--rows)

Peak memory, of the largest process, is told for a tenth of the rows too: flat is what does not grow with them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from softlabels.cache.build import CacheBuild

CLASSES, LENGTHS, SHARD_ROWS = 3, (8, 32), 4096
CONTESTANTS = ("plain", "synced", "combine", "shuffled", "rows")


# ------------------------------------------------------------------------------------------------ making the caches


def make(
    folder: Path, *, rows: range, seed: int, order: np.ndarray | None = None, examples: Path | None = None
) -> None:
    """A cache of `rows` of one corpus, or of these rows in another order; the logits are the seed's.

    The files of its examples are those of the cache `examples`, where that is given: they are the same.
    """
    import pyarrow as pa

    from softlabels.cache.build import derive_cache
    from softlabels.cache.combine import join_of, write_tables
    from softlabels.cache.format import load_receipt
    from softlabels.cache.grouped import ShardGroup
    from softlabels.cache.members import token_hashes
    from softlabels.cache.writer import examples_schema
    from softlabels.progress import quiet
    from tests.cache.made import VOCABULARY, manifest_of, rows_of

    fields = {"logits": {"kind": "row", "type": "float32", "width": CLASSES}}
    manifest = manifest_of(rows_of([4]), fields, shard_rows=SHARD_ROWS)
    card = manifest.teacher.model_copy(update={"name": f"teacher {seed}", "label_names": ["a", "b", "c"]})
    corpus = manifest.corpus.model_copy(update={"rows": len(rows), "labelled": len(rows), "hash": str(rows)})
    manifest = manifest.model_copy(update={"teacher": card, "corpus": corpus})
    numbers = np.arange(rows.start, rows.stop)
    numbers = numbers if order is None else numbers[order]
    with quiet(), derive_cache(folder, manifest, source=folder, files=[]) as build:
        if examples is not None:
            shutil.copytree(examples / "examples", folder / "examples", copy_function=os.link)
        for shard in build.shards():
            part = numbers[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
            lengths = LENGTHS[0] + part % (LENGTHS[1] - LENGTHS[0])
            said = np.random.default_rng([seed, int(part.min())]).normal(size=(len(part), CLASSES)).astype(np.float32)
            if examples is not None:
                join = load_receipt(examples, "examples", shard).join
                write_logits(build, shard, lengths, said, join)
                continue
            ends = np.concatenate([[0], np.cumsum(lengths)])
            place = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)  # of each token in its row
            ids = ((np.repeat(part, lengths) * 7 + place * 3) % VOCABULARY).astype(np.uint16)
            schema = examples_schema(shard, vocab_size=VOCABULARY, token_types=True, text=True)
            offsets = pa.array(ends.astype(np.int32))
            columns = {
                "id": pa.array(np.char.add("train/", part.astype(str))),
                "token_hash": pa.array(np.zeros(len(part), np.uint64)),
                "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids), type=schema.field("input_ids").type),
                "token_type_ids": pa.ListArray.from_arrays(
                    offsets, pa.array(np.zeros(len(ids), np.uint8)), type=schema.field("token_type_ids").type
                ),
                "label": pa.array((part % CLASSES).astype(np.int32)),
                "text": pa.array(np.char.add("the words of a text of this number: ", part.astype(str))),
                "text_b": pa.array([""] * len(part)),
            }
            table = pa.table([columns[name] for name in schema.names], schema=schema)
            hashes = pa.array(token_hashes(table, card))
            table = table.set_column(1, schema.field("token_hash"), hashes)
            join = join_of([table])
            with ShardGroup(folder) as group:
                write_tables(group, [table], shard, join=join, truncated=0)
            write_logits(build, shard, lengths, said, join)
        build.finish()


def write_logits(build: CacheBuild, shard: int, lengths: np.ndarray, said: np.ndarray, join: str) -> None:
    from softlabels.cache.combine import field_shard

    with field_shard(build, "logits", shard, lengths) as writer:
        writer.put_run(0, said.reshape(-1), rows=len(lengths))
        writer.commit(join)


def make_all(folder: Path, rows: int, caches: int, only: Sequence[str]) -> None:
    cut = [rows * n // caches for n in range(caches + 1)]
    for number in range(caches):
        make(folder / f"same-{number}", rows=range(rows), seed=number, examples=folder / "same-0" if number else None)
        if "rows" in only:
            make(folder / f"part-{number}", rows=range(cut[number], cut[number + 1]), seed=0)
    if "shuffled" in only:
        make(folder / "shuffled", rows=range(rows), seed=1, order=np.random.default_rng(0).permutation(rows))


# ------------------------------------------------------------------------------------------------------- contestants


def inputs(contestant: str, folder: Path, caches: int) -> list[Path]:
    if contestant == "rows":
        return [folder / f"part-{number}" for number in range(caches)]
    same = [folder / f"same-{number}" for number in range(caches)]
    return [same[0], folder / "shuffled", *same[2:]] if contestant == "shuffled" else same


def sizes_of(cache: Path, pattern: str = "*/*.arrow") -> list[int]:
    return [path.stat().st_size for path in sorted(cache.glob(pattern))]


def plain(caches: Sequence[Path], like: Path, out: Path, *, sync: bool) -> None:
    """Read the caches' files; write files of the sizes of `like`'s."""
    view = memoryview(bytearray(1 << 20))
    for cache in caches:
        for path in sorted(cache.glob("*/*.arrow")):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(view):
                    pass
    out.mkdir()
    folder = os.open(out, os.O_RDONLY)
    for number, size in enumerate(sizes_of(like)):
        with open(out / str(number), "wb", buffering=0) as file:
            for at in range(0, size, len(view)):
                file.write(view[: min(len(view), size - at)])
            if sync:
                os.fsync(file.fileno())
        if sync:
            os.fsync(folder)
    os.close(folder)


def evict(caches: Sequence[Path]) -> None:
    """Have the system forget what it read of the caches."""
    for cache in caches:
        for path in cache.glob("*/*"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)  # what isn't written yet would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def work(contestant: str, folder: Path, out: Path, caches: int) -> dict[str, float]:
    """Run one contestant in this process: seconds, bytes read and written, memory before and at its peak (MB)."""
    import resource

    from softlabels.cache.combine import combine
    from softlabels.cache.concatenate import concatenate
    from softlabels.config import CombineOptions
    from softlabels.progress import quiet

    given = inputs(contestant, folder, caches)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    started = time.perf_counter()
    with quiet():
        if contestant in ("plain", "synced"):
            plain(given, folder / "same-0", out, sync=contestant == "synced")
        elif contestant == "rows":
            concatenate(given, out=out)
        else:
            combine(given, out=out, options=CombineOptions(mean="probabilities"))
    seconds = time.perf_counter() - started
    peak = max(resource.getrusage(of).ru_maxrss for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1000
    read = sum(sum(sizes_of(cache)) for cache in given)
    written = sum(sizes_of(out, "*" if contestant in ("plain", "synced") else "*/*.arrow"))
    return {"seconds": seconds, "bytes": read + written, "before": before, "peak": peak}


def measure(contestant: str, folder: Path, caches: int, *, cold: bool) -> dict[str, float]:
    if cold:
        evict(inputs(contestant, folder, caches))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-m", __spec__.name, "--work", contestant, "--folder", str(folder)]
        done = subprocess.run(
            [*command, "--out", str(Path(place) / "out"), "--caches", str(caches)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--caches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="beside plain and synced")
    parser.add_argument("--cold", action="store_true", help="read from the disk, and not from memory")
    parser.add_argument("--work", choices=CONTESTANTS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.work:
        print(json.dumps(work(asked.work, asked.folder, asked.out, asked.caches)))
        return
    only = ["plain", "synced", *(name for name in CONTESTANTS[2:] if name in asked.only.split(","))]
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        told: dict[int, dict[str, dict[str, float]]] = {}
        for rows in (asked.rows // 10, asked.rows):
            folder = Path(place) / str(rows)
            make_all(folder, rows, asked.caches, only)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in only}
            for _ in range(asked.rounds if rows == asked.rows else 1):
                for name in only:
                    found[name].append(measure(name, folder, asked.caches, cold=asked.cold))
            told[rows] = {
                name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                for name, runs in found.items()
            }
        few, many = told[asked.rows // 10], told[asked.rows]
        print(f"{asked.caches} caches of {asked.rows:,} rows, {CLASSES} classes, {os.cpu_count()} cores")
        print(
            f"{'':10}{'seconds':>9}{'MB':>8}{'MB/s':>8}{'of synced':>11}{'of plain':>10}   MB of memory: before, peak"
        )
        for name, run in many.items():
            rate = run["bytes"] / run["seconds"] / 1e6
            of = [rate / (many[other]["bytes"] / many[other]["seconds"] / 1e6) for other in ("synced", "plain")]
            print(
                f"{name:10}{run['seconds']:9.2f}{run['bytes'] / 1e6:8.0f}{rate:8.0f}{of[0]:11.2f}{of[1]:10.2f}"
                f"   {run['before']:.0f}, {run['peak']:.0f}  (a tenth of the rows: {few[name]['peak']:.0f})"
            )


if __name__ == "__main__":
    main()
