"""A cache of 1e10 tokens, with as many files as it would have: what it costs to open, claim, check and plan with it.

Run it:  python -m tests.bench.bench_scale [--shards 100000] [--fields 20] [--runs 3]     some minutes, 1 GB of disk

The shards are links to a few small files (a file system allows some 65,000 to each), so that every name, size and
receipt is there while nothing has to be dumped; nothing below reads a shard. Four things that come before any work:

    open     `open_cache`: the manifest, parsed and checked
    claim    a dump that goes on where it was stopped: what is left of stopped writers, and what is missing
    verify   `verify --quick`: the manifest, the tokenizer, and every file by its name and size
    pull     `pull --plan` of one field, into a folder that has the rows and another: what is there, here, and missing

The wanted: under 10 s each, and neither time nor memory growing faster than the number of shards. Each figure is the
median of some fresh processes; memory is what a step adds to the peak of its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softlabels.cache.build import tokenizer_hash
from softlabels.cache.format import (
    EXAMPLES,
    MANIFEST,
    RECEIPT,
    UNFINISHED,
    Manifest,
    Receipt,
    receipt_name,
    shard_name,
    to_json,
)
from softlabels.cache.remote import some_fields
from softlabels.cache.settings import folder_receipt, load_tokenizer
from tests.bench.bench_manifest import FIELDS, ROWS, SHARDS, manifest_of
from tests.models import tiny_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = ("open", "claim", "verify", "pull")
SECONDS, SLACK = 10.0, 1.25  # the limit of a step; how much more than its share of the shards a step may take
LINKS, BYTES, TOKENS = 50_000, 64, 25  # links to one file; bytes of each; tokens of a row
HERE = ["hidden.00"]  # what the folder of a colleague has, who pulls `logits`
LEFT = 10  # every tenth shard of `logits` is still to be dumped when a dump goes on

_MEASURE = """
import json, resource, sys, time
from pathlib import Path
from softlabels.cache.build import build_cache
from softlabels.cache.format import read_manifest
from softlabels.cache.pull import plan_pull
from softlabels.cache.reader import open_cache
from softlabels.cache.settings import load_tokenizer
from softlabels.cache.verify import verify_cache
from tests.bench.bench_manifest import peak

def claim(folder):
    with build_cache(folder, read_manifest(folder), tokenizer=load_tokenizer(folder), config=None) as build:
        return len(build.all_missing(build.own_shards()))

def verify(folder):
    verdict = verify_cache(folder, quick=True)
    return [fault.message for fault in verdict.faults] or len(verdict.fields)

def pull(folder):
    plan = plan_pull(f"file://{folder}", folder.with_name("here"), fields=["logits"])
    return [plan.fetch_files, plan.there_files]

def opened(folder):
    return len(open_cache(folder).manifest.shard_rows)

steps = {"open": opened, "claim": claim, "verify": verify, "pull": pull}
step, folder = steps[sys.argv[1]], Path(sys.argv[2])
load_tokenizer(folder)  # its imports
before, started = peak(), time.perf_counter()
found = step(folder)
print(json.dumps([time.perf_counter() - started, peak() - before, found]))
"""


class Made:
    """A cache's folder that grows; and one beside it, of a colleague who has its rows and a field."""

    def __init__(self, folder: Path, fields: int) -> None:
        self.folder, self.fields, self.shards = folder, fields, 0
        receipt = Receipt(rows=ROWS, tokens=ROWS * TOKENS, bytes=BYTES, xxh3_128="0" * 32, join="0" * 32)
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
        self._files = _sources(folder.with_name("shard"), b"x" * BYTES)
        self._receipts = _sources(folder.with_name("receipt"), to_json(receipt))

    def grow(self, shards: int) -> tuple[bytes, bytes]:
        """Every file of `shards` shards is there; the manifest when all is finished, and while it is dumped."""
        content = manifest_of(shards, self.fields)
        for table in content["shards"].values():
            table["sizes"] = f"{BYTES:012x}" * shards
        hashed = tokenizer_hash(load_tokenizer(self.folder))
        content |= {"shard_tokens": [ROWS * TOKENS] * shards, "tokenizer_hash": hashed}
        manifest = Manifest.model_validate(content)
        here, theirs = some_fields(manifest, HERE), self.folder.with_name("here")
        places = [self.folder / field for field in (EXAMPLES, *manifest.fields)]
        for place in [*places, *(theirs / field for field in (EXAMPLES, *here.fields))]:
            place.mkdir(parents=True, exist_ok=True)
            for shard in range(self.shards, shards):
                os.link(next(self._files), place / shard_name(shard))
                os.link(next(self._receipts), place / receipt_name(shard))
        (theirs / MANIFEST).write_bytes(to_json(here))
        self.shards = shards
        return to_json(manifest), to_json(manifest.model_copy(update=UNFINISHED))


def _sources(place: Path, content: bytes) -> Iterator[Path]:
    """Files of this content to link to, none too often."""
    number = 0
    while True:
        path = place.with_name(f"{place.name}-{number}")
        path.write_bytes(content)
        yield from (path for _ in range(LINKS))
        number += 1


def measure(folder: Path, step: str, runs: int) -> tuple[float, float, Any]:
    """Median seconds and median bytes of `step`, and what it found."""
    found = []
    for _ in range(runs):
        arguments = [sys.executable, "-c", _MEASURE, step, str(folder)]
        found.append(json.loads(subprocess.run(arguments, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout))
    return statistics.median(run[0] for run in found), statistics.median(run[1] for run in found), found[0][2]


def measure_all(made: Made, *, shards: int, runs: int) -> dict[str, tuple[float, float]]:
    """Of every step, seconds and bytes at this size."""
    finished, begun = made.grow(shards)
    folder, figures = made.folder, {}
    left = [folder / "logits" / receipt_name(shard) for shard in range(0, shards, LEFT)]
    wanted = {"open": shards, "claim": len(left), "verify": made.fields, "pull": [shards, 2 * shards]}
    for step in STEPS:
        (folder / MANIFEST).write_bytes(begun if step == "claim" else finished)
        (folder / RECEIPT).write_bytes(to_json(folder_receipt(folder, finished)))
        for path in left if step == "claim" else []:
            path.rename(folder / path.name)
        seconds, size, found = measure(folder, step, runs)
        if found != wanted[step]:
            raise SystemExit(f"{step} found {found}, not {wanted[step]}")
        for path in left if step == "claim" else []:
            (folder / path.name).rename(path)
        figures[step] = seconds, size
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--fields", type=int, default=FIELDS)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    sizes = [given.shards // 4, given.shards // 2, given.shards]
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        made = Made(Path(name) / "cache", given.fields)
        for shards in sizes:
            figures[shards] = measure_all(made, shards=shards, runs=given.runs)
            found = [f"{step} {seconds:.2f} s" for step, (seconds, _) in figures[shards].items()]
            print(f"{shards:,} shards: {', '.join(found)}", file=sys.stderr, flush=True)
    files, tokens = (given.fields + 1) * given.shards, given.shards * ROWS * TOKENS
    print(f"{tokens:.0e} tokens: {files:,} shard files and as many receipts; medians of {given.runs}")
    print(f"{'':<10}" + "".join(f"{f'{shards:,} shards':>24}" for shards in sizes) + f"{'growth':>18}")
    for step in STEPS:
        cells = [f"{figures[shards][step][0]:.2f} s {figures[shards][step][1] / 1e6:,.0f} MB" for shards in sizes]
        (time_half, size_half), (time_whole, size_whole) = figures[sizes[1]][step], figures[sizes[2]][step]
        growth = time_whole / time_half, size_whole / max(size_half, 1)
        fits = time_whole < SECONDS and all(factor < 2 * SLACK for factor in growth)
        verdict = f"  {'holds' if fits else 'OVER'}: under {SECONDS:.0f} s, growth under {2 * SLACK}x"
        print(
            f"{step:<10}"
            + "".join(f"{cell:>24}" for cell in cells)
            + f"{growth[0]:>9.2f}x {growth[1]:>6.2f}x"
            + verdict
        )


if __name__ == "__main__":
    main()
