"""Peak memory of a dump of many rows against one of few: it must not grow with the corpus.

Run it:  python -m tests.bench.bench_memory [ROWS] [--train]
The wanted: 5,000,000 rows within 1.2 times of 50,000. Rows have 3 to 8 words, ids of their own and a class; the teacher
has one layer; a dump is a command in a process of its own, whose peak is what the system says (VmHWM). Half an hour on
one core, and 2 GB of disk; `ROWS` takes fewer. `--train` then trains a student on each cache, one epoch: of it the
peak of anonymous memory is told, as the pages of a mapped cache are the system's to take back.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.models import LABEL_NAMES, TEXTS, save_teacher

FEW, MANY, LIMIT = 50_000, 5_000_000, 1.2

_MEASURE = """
import sys, threading, time
def peak(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
own = 0
def watch():
    global own
    while True:
        own = max(own, peak("RssAnon"))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
from softlabels.cli import main
try:
    main(sys.argv[1:])
finally:
    print(peak("VmHWM"), max(own, peak("RssAnon")), file=sys.stderr)
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One command."""

    seconds: float
    peak: int  # bytes resident, mapped files too
    own: int  # of which the process's own


def write_rows(path: Path, rows: int) -> Path:
    """Rows of random words from the tests' texts, written one after the other."""
    draw, words = random.Random(0), sorted({word for text, _ in TEXTS for word in text.split()})
    with path.open("w") as file:
        for number in range(rows):
            text = " ".join(draw.choices(words, k=draw.randint(3, 8)))
            file.write(json.dumps({"id": f"row-{number}", "text": text, "label": draw.choice(LABEL_NAMES)}) + "\n")
    return path


def measure(folder: Path, *arguments: str) -> Measured:
    """A `softlabels` command in a fresh process, in `folder`; its messages are shown where it fails."""
    root = Path(__file__).parents[2]
    kept = {"SOFTLABELS_CACHE": str(folder / "kept"), "PYTHONPATH": str(root), "SOFTLABELS_QUIET": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments],
        cwd=folder,
        env=os.environ | kept,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    peak, own = map(int, done.stderr.splitlines()[-1].split())
    return Measured(time.monotonic() - started, peak, own)


def main() -> None:
    given = [word for word in sys.argv[1:] if word != "--train"]
    counts = [FEW, int(given[0]) if given else MANY]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", layers=1, hidden=16, heads=2)
        dumps = []
        print(f"{'':<24}{'rows':>12}{'seconds':>10}{'peak MB':>10}{'own MB':>10}", flush=True)
        for rows in counts:
            file = write_rows(folder / f"{rows}.jsonl", rows)
            options = ["--teacher", "teacher", "--capture", "logits", "--batch-tokens", "16384", "--devices", "cpu"]
            dumps.append(measure(folder, "dump", file.name, "--out", f"cache-{rows}", *options))
            _print("dump", rows, dumps[-1])
        again = measure(folder, "dump", file.name, "--out", f"cache-{rows}", *options)
        _print("the same command again", rows, again)
        if "--train" in sys.argv:
            for rows in counts:
                student = ["--student", "word_average", "--epochs", "1", "--batch-size", "512"]
                trained = measure(folder, "train-student", f"cache-{rows}", "--out", f"run-{rows}", *student)
                _print("train-student", rows, trained)
    ratio = dumps[1].peak / dumps[0].peak
    print(f"the larger dump's peak is {ratio:.2f} times the smaller one's (at most {LIMIT})")
    if ratio > LIMIT:
        raise SystemExit(1)


def _print(what: str, rows: int, found: Measured) -> None:
    print(f"{what:<24}{rows:>12,}{found.seconds:>10.0f}{found.peak / 1e6:>10.0f}{found.own / 1e6:>10.0f}", flush=True)


if __name__ == "__main__":
    main()
