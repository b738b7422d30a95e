"""A sweep against separate runs: 4 temperatures x 3 weights x 3 seeds of the BiLSTM on 5,000 rows of SST-2.

Run it:  make bench      or  python -m tests.bench.bench_sweep [--cache DIR] [--folder DIR] [--sample 6] [--epochs N]
                             [--plain] [--small]

The student is the one of the recipe `hinton` (word vectors fitted on the rows, batches of 64, 3 epochs); with --plain
the BiLSTM as it is without a recipe (random word vectors, batches of 32, 10 epochs unless --epochs says otherwise).
SST-2's dev split is --eval, its test split is what is scored in the end.

separate   what a user would do without `sweep`: `softlabels train-student … && softlabels evaluate …`, one after the
           other, with the threads that they take by default. A sample of the 36, spread over temperatures, weights and
           seeds, half of it before the sweep and half after; the time of all is 36 times the median.
sweep      one `softlabels sweep … --test …` of all 36, from the start of the process to its end.

Results: of each trial in the sample the test accuracy of both ways, and beside it the spread over seeds in the sweep.
The cache is taken from --cache, or made: the demo's MiniLM is fine-tuned on the first 1,000 rows for one epoch, and
dumped over the 5,000.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet

ROOT = Path(__file__).parents[2]
CORPUS = ROOT.parent / "shared" / "corpora" / "sst2"
ROWS, TEACHER_ROWS = 5000, 1000
TEMPERATURES, WEIGHTS, SEEDS = (1, 2, 4, 8), (0.3, 0.5, 0.7), (0, 1, 2)
LIMIT = 0.5
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Case:
    """What both ways share."""

    cache: Path
    folder: Path
    base: list[str]  # options of both commands


@dataclass(frozen=True)
class Cost:
    """In seconds, from the start of a process to its end; the CPU time of all its threads and processes moves less
    with what else the machine does.
    """

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def adopt_orphans() -> None:
    """Processes whose parent ends become this one's children, so that their CPU time can be asked for (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def command(*words: str | Path) -> Cost:
    """What `softlabels …` costs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SOFTLABELS_QUIET": "1"}
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # a user's shell has none
        environment.pop(name, None)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-m", "softlabels", *map(str, words)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\nfailed: {done.stderr}")
    with suppress(ChildProcessError):
        while True:  # the fork server of a sweep ends after it
            os.waitpid(-1, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def write_rows(folder: Path, rows: int) -> None:
    """train.jsonl, few.jsonl, dev.jsonl and test.jsonl: the last two without what is also in the training split."""
    for name, split, most in (
        ("train", "train", rows),
        ("few", "train", min(rows, TEACHER_ROWS)),
        *((split, split, None) for split in ("dev", "test")),
    ):
        lines = (CORPUS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:most]
        kept = [line for line in lines if not json.loads(line).get("in_train")]
        (folder / f"{name}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")


def make_cache(folder: Path) -> Path:
    if not (folder / "cache" / "receipt.json").exists():
        print("fine-tuning a teacher and dumping …", flush=True)
        length = ["--max-length", "64"]
        shutil.rmtree(folder / "teacher", ignore_errors=True)
        command(
            "train-teacher", folder / "few.jsonl", "--model", "all-MiniLM-L6-v2", "--epochs", "1", "--lr", "2e-4",
            *length, "--out", folder / "teacher",
        )  # fmt: skip
        command("dump", folder / "train.jsonl", "--teacher", folder / "teacher", *length, "--out", folder / "cache")
    return folder / "cache"


def run_separately(case: Case, temperature: float, weight: float, seed: int) -> dict[str, Any]:
    """One of the 36, as a user would train and score it."""
    out = case.folder / "separate" / f"t{temperature}-kl{weight}-seed{seed}"
    shutil.rmtree(out, ignore_errors=True)
    losses = ["--loss", f"kl={weight}", "--loss", f"ce={round(1 - weight, 2)}"]
    cost = command(
        "train-student", case.cache, *case.base, "--temperature", str(temperature), *losses, "--seed", str(seed),
        "--eval", case.folder / "dev.jsonl", "--out", out,
    )  # fmt: skip
    cost += command("evaluate", out, case.folder / "test.jsonl")
    from softlabels.corpus import read_corpus
    from softlabels.runs import load_run
    from softlabels.sweeping.training import score

    accuracy = score(load_run(out), read_corpus(str(case.folder / "test.jsonl")))["accuracy"]
    print(
        f"  T={temperature} kl={weight} seed {seed}: {cost.wall:.1f} s, CPU {cost.cpu:.1f} s, "
        f"test accuracy {accuracy:.4f}",
        flush=True,
    )
    return {"key": (temperature, weight, seed), "cost": cost, "accuracy": accuracy}


def run_sweep(case: Case, seeds: tuple[int, ...]) -> tuple[Cost, dict[tuple[float, float, int], float]]:
    """What all cost together, and each trial's test accuracy."""
    out = case.folder / "sweep"
    shutil.rmtree(out, ignore_errors=True)
    losses = ",".join(f"{{kl: {weight}, ce: {round(1 - weight, 2)}}}" for weight in WEIGHTS)
    cost = command(
        "sweep", case.cache, *case.base, "--temperature", ",".join(map(str, TEMPERATURES)), "--set", f"losses={losses}",
        "--seeds", ",".join(map(str, seeds)), "--eval", case.folder / "dev.jsonl", "--test", case.folder / "test.jsonl",
        "--out", out,
    )  # fmt: skip
    rows = pyarrow.parquet.read_table(out / "results.parquet").to_pylist()
    found = {
        (row["temperature"], json.loads(row["losses"])["kl"], row["seed"]): row["test_accuracy"]
        for row in rows
        if row["status"] == "done"
    }
    assert len(found) == len(rows) == len(TEMPERATURES) * len(WEIGHTS) * len(seeds), "a trial failed"
    print(f"  sweep of {len(found)}: {cost.wall:.1f} s, CPU {cost.cpu:.1f} s", flush=True)
    return cost, found


def compare(case: Case, sample: int, seeds: tuple[int, ...]) -> None:
    every = list(product(TEMPERATURES, WEIGHTS, seeds))
    chosen = [every[round(i * (len(every) - 1) / max(sample - 1, 1))] for i in range(sample)]
    before, after = chosen[: (sample + 1) // 2], chosen[(sample + 1) // 2 :]
    separate = [run_separately(case, *key) for key in before]
    together, accuracies = run_sweep(case, seeds)
    separate += [run_separately(case, *key) for key in after]
    count = len(every)
    each = Cost(*(statistics.median(getattr(run["cost"], kind) for run in separate) for kind in ("wall", "cpu")))
    ratio, of_cpu = together.wall / (each.wall * count), together.cpu / (each.cpu * count)
    print(
        f"\nseparate   {each.wall:.1f} s each (median of {sample}; CPU {each.cpu:.1f} s), "
        f"{each.wall * count:.0f} s for all"
    )
    print(
        f"sweep      {together.wall:.0f} s: {ratio:.3f} of it; at most {LIMIT}: {'ok' if ratio <= LIMIT else 'MISSED'} "
        f"(CPU {together.cpu / count:.1f} s a trial, {of_cpu:.3f} of it)"
    )
    spread = [
        statistics.stdev([accuracies[t, w, seed] for seed in seeds])
        for t in TEMPERATURES
        for w in WEIGHTS
        if len(seeds) > 1
    ]
    off = [abs(run["accuracy"] - accuracies[run["key"]]) for run in separate]
    same = sum(value == 0 for value in off)
    print(
        f"results    {same} of {sample} the same test accuracy; off at most {max(off):.4f}, "
        f"mean {statistics.mean(off):.4f}"
    )
    if spread:
        print(f"           sample standard deviation over seeds, mean of the points: {statistics.mean(spread):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="of the first 5,000 rows of SST-2's training split")
    parser.add_argument("--folder", type=Path, help="work here, and leave it")
    parser.add_argument("--sample", type=int, default=6, help="separate runs, of the 36")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--plain", action="store_true", help="the BiLSTM without a recipe")
    parser.add_argument("--small", action="store_true", help="500 rows, one epoch, one seed, two separate runs")
    given = parser.parse_args()
    adopt_orphans()
    if not CORPUS.is_dir():
        print(f"skipped: there is no {CORPUS}")
        return
    seeds, sample, epochs = (SEEDS[:1], 2, 1) if given.small else (SEEDS, given.sample, given.epochs)
    base = ["--student", "bilstm"] if given.plain else ["--recipe", "hinton"]
    base += [] if epochs is None else ["--epochs", str(epochs)]
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder, 500 if given.small else ROWS)
        cache = given.cache or make_cache(folder)
        print(f"{' '.join(base)}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
        compare(Case(cache, folder, base), sample, seeds)


if __name__ == "__main__":
    main()
