"""What goes beyond one teacher and one student, on real text: each set-up against its plain counterpart.

Run it:  make bench      or  python -m tests.bench.bench_beyond [--tasks sst2,…] [--parts ensemble,…] [--seeds 3]
                             [--jobs 2] [--folder DIR] [--small]

Tasks, teachers and caches are bench_quality's (with its --folder they are taken from there). Students look at the first
ROWS rows of the cache, labelled ones first, and are scored on the task's test rows; what was best on its development
rows counts. 'plain' is what the set-up is held against:

ensemble     a BiLSTM from the mean of three teachers' probabilities      plain: from the first one's cache
federated    three parties with uneven classes, a BiLSTM each             plain: on the party's own labels alone
joint        two students of two layers that learn from each other        plain: each by itself, on the same losses; one
             whose losses are on layers alone, and which the other teaches to answer, then learns that from the teacher
multitask    one small transformer for all tasks, annealed                plain: one for each task, annealed
assistant    a transformer of 2 layers, 96 wide, by way of an assistant   plain: from the teacher's own cache
alp-kd, ckd, emd, taylor-fo, progressive    3 of MiniLM's layers          plain: as many epochs of KL (and CE) alone
compression  a BiLSTM pruned, distilled again, quantised                  plain: as it was distilled
heads        3 of MiniLM's layers, a quarter of their heads pruned        plain: as it was distilled
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.bench.bench_quality import CORPORA, LENGTH, MINILM, SMALL, TASKS, make_teacher

ROWS, TEACHERS, PARTIES = 2000, 3, 3
BILSTM: dict[str, Any] = {
    "student": "bilstm",
    "losses": {"kl": 1.0},
    "temperature": "2",
    "batch_size": 64,
    "lr": 3e-3,
    "epochs": 4,
}
NARROW = {"layers": 2, "hidden_size": 96, "heads": 12, "intermediate_size": 384}
CROSS_LAYER = ("alp-kd", "ckd", "emd", "taylor-fo", "progressive")
TWO_TASKS = ("sst2", "twitter_financial_sentiment")

Figures = dict[str, float]  # accuracy, macro_f1; of compression bytes and ms too


@dataclass(frozen=True)
class Place:
    """A task's folder, with its caches and corpora, and the one that this student's seed may fill."""

    task: Path
    out: Path
    seed: int

    def train(self, name: str, *, cache: Any = None, **options: Any) -> Figures:
        """The scores of a student that is trained into `out/name`."""
        from softlabels.cache import open_cache
        from softlabels.config import StudentOptions
        from softlabels.corpus import read_corpus
        from softlabels.train import train_student

        chosen = {"rows": ROWS} | options | {"seed": self.seed}  # a recipe's options have one of their own
        if chosen["student"] == "bilstm" and "from_run" not in chosen:
            chosen["options"] = {"word_vectors": str(self.task / "vectors.txt")} | chosen.get("options", {})
        train_student(
            cache or open_cache(self.task / "cache"),
            out=self.out / name,
            options=StudentOptions.model_validate(chosen),
            validation=read_corpus(self.task / "dev.jsonl"),
            cpu=True,
        )
        return self.score(self.out / name)

    def score(self, run: Path, *, others: tuple[Path, ...] = ()) -> Figures:
        from softlabels.corpus import read_corpus
        from softlabels.evaluate import evaluate

        found = evaluate(run, read_corpus(self.task / "test.jsonl"), others=others)
        return {
            "accuracy": found.accuracy,
            "macro_f1": found.macro_f1,
            "bytes": found.bytes,
            "ms": found.latency.ms,
        }


# ------------------------------------------------------------------------------------------------------- the parts


def ensemble(place: Place) -> dict[str, Figures]:
    from softlabels.cache.combined import open_combined
    from softlabels.config import CombineOptions

    caches = [place.task / "cache", *(place.task / f"cache-{number}" for number in range(2, TEACHERS + 1))]
    together = open_combined(caches, CombineOptions(mean="probabilities"))
    return {"plain": place.train("one", **BILSTM), "three": place.train("three", cache=together, **BILSTM)}


def make_other_teachers(task: Path, epochs: int) -> None:
    """The second and third teacher of `ensemble`: other seeds, other rates; and their caches."""
    from softlabels.config import DumpOptions
    from softlabels.corpus import read_corpus
    from softlabels.dump import dump
    from softlabels.teacher import TeacherOptions, train_teacher

    for number in range(2, TEACHERS + 1):
        if (task / f"cache-{number}" / "receipt.json").exists():
            continue
        options = TeacherOptions(epochs=epochs, lr=[1e-4, 3e-4][number % 2], max_length=LENGTH, seed=number)
        teacher = task / f"teacher-{number}"
        train_teacher(read_corpus(task / "teacher.jsonl"), model=MINILM, out=teacher, options=options)
        dump(
            read_corpus(task / "transfer.jsonl"),
            teacher=str(teacher),
            out=task / f"cache-{number}",
            options=DumpOptions(capture=["logits"], max_length=LENGTH),
            device="cpu",
        )


def federated(place: Place) -> dict[str, Figures]:
    from softlabels.federated import run_federation
    from softlabels.recipes import FederatedRecipe

    common = place.out / "common.jsonl"
    lines = (place.task / "transfer.jsonl").read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if "label" not in json.loads(line)][: ROWS - 500]
    common.write_text("\n".join(bare) + "\n", encoding="utf-8")
    recipe = FederatedRecipe.model_validate(
        {
            "name": "bench",
            "corpus": {
                "source": str(place.task / "train.jsonl"),
                "common_source": str(common),
                "test_source": str(place.task / "test.jsonl"),
            },
            "parties": {"count": PARTIES, "skew": 0.5, "rows": 300, "seed": place.seed},
            "teacher": {"model": MINILM, "train": {"epochs": 4, "lr": 2e-4, "max_length": LENGTH}},
            "dump": {"max_length": LENGTH},
            "student": BILSTM | {"options": {"word_vectors": str(place.task / "vectors.txt")}, "seed": place.seed},
            "hard_epochs": 20,
        }
    )
    found = run_federation(recipe, out=place.out / "run", cpu=True)

    def mean(key: str) -> float:
        return statistics.mean(getattr(row, key) for row in found.rows)

    return {
        "plain": {"accuracy": mean("alone_accuracy"), "macro_f1": mean("alone_macro_f1")},
        "together": {"accuracy": mean("accuracy"), "macro_f1": mean("macro_f1")},
        "their teachers": {"accuracy": mean("teacher_accuracy")},
        "consensus": {"accuracy": found.consensus_accuracy[-1]},
    }


def joint(place: Place) -> dict[str, Figures]:
    from softlabels.cache import open_cache
    from softlabels.corpus import read_corpus
    from softlabels.joint import train_joint
    from softlabels.pretrained import resolve_pretrained
    from softlabels.recipes import alone_options, joint_of_recipe
    from softlabels.train import train_student

    options = joint_of_recipe("joint", None, seed=place.seed)
    start = {"init_from": str(resolve_pretrained(MINILM))}  # what the recipe calls base
    students = {
        name: each.model_copy(update={"rows": ROWS, "options": each.options | start})
        for name, each in options.students.items()
    }
    options = options.model_copy(update={"students": students})
    cache, dev = open_cache(place.task / "cache"), read_corpus(place.task / "dev.jsonl")
    train_joint(cache, out=place.out / "pair", options=options, validation=dev, cpu=True)
    for name in students:
        alone = alone_options(options, name)
        train_student(cache, out=place.out / f"alone-{name}", options=alone, validation=dev, cpu=True)
    found: dict[str, Figures] = {}
    for title, prefix in (("plain", place.out / "alone-"), ("together", place.out / "pair/")):
        runs = [Path(f"{prefix}{name}" if title == "plain" else prefix / name) for name in ("global", "local")]
        for name, run in zip(("global", "local"), runs, strict=True):
            found[f"{title} {name}"] = place.score(run)
        found[f"{title} average"] = place.score(runs[0], others=(runs[1],))
    return found


def multitask(place: Place) -> dict[str, Figures]:
    """Of all tasks at once, in the folder of the first: 'TASK plain' and 'TASK together'."""
    from softlabels.cache import open_cache
    from softlabels.config import MultiTaskOptions
    from softlabels.corpus import read_corpus
    from softlabels.multitask import train_multitask
    from softlabels.training.many_tasks import task_options

    folders = {name: place.task.parent / name for name in TWO_TASKS}
    options = MultiTaskOptions(
        student="transformer", options={"layers": 2}, batch_size=64, lr=1e-3, epochs=5, seed=place.seed
    )
    train_multitask(
        {name: open_cache(folder / "cache") for name, folder in folders.items()},
        out=place.out / "both",
        options=options,
        validation={name: read_corpus(folder / "dev.jsonl") for name, folder in folders.items()},
        cpu=True,
    )
    found: dict[str, Figures] = {}
    for name, folder in folders.items():
        there = replace(place, task=folder)
        alone = task_options(options, name).model_dump(exclude_unset=True) | {"rows": None}
        found[f"{name} plain"] = there.train(f"alone-{name}", **alone)
        found[f"{name} together"] = there.score(place.out / "both" / name)
    return found


def assistant(place: Place) -> dict[str, Figures]:
    from softlabels.cache import open_cache
    from softlabels.config import DumpOptions
    from softlabels.corpus import read_corpus
    from softlabels.dump import dump
    from softlabels.recipes import read_recipe

    recipe = read_recipe("assistant")
    phases = [phase.model_dump(exclude_unset=True) for phase in recipe.assistants[0].phases]
    common = {"student": "transformer", "phases": phases, "batch_size": 32}
    between = place.train("assistant", **common, options=NARROW | {"layers": 6})
    whole = read_corpus(place.task / "transfer.jsonl")
    dump(
        replace(whole, examples=whole.examples[:ROWS]),
        teacher=str(place.out / "assistant"),
        out=place.out / "cache",
        options=DumpOptions(capture=["logits", "qkv:6"], max_length=LENGTH),
        device="cpu",
    )
    return {
        "assistant": between,
        "plain": place.train("direct", **common, options=NARROW),
        "by the assistant": place.train("hop", cache=open_cache(place.out / "cache"), **common, options=NARROW),
    }


def cross_layer(place: Place) -> dict[str, Figures]:
    from softlabels.pretrained import resolve_pretrained
    from softlabels.recipes import student_of_recipe

    found: dict[str, Figures] = {}
    start = {"init_from": str(resolve_pretrained(MINILM)), "layers": 3}
    for name in CROSS_LAYER:
        options = student_of_recipe(name, None).model_dump(exclude_unset=True)
        found[name] = place.train(name, **options | {"options": start})
    plain = {"student": "transformer", "options": start, "batch_size": 32, "lr": 1e-4, "epochs": 2}
    found["plain kl + ce, T = 5"] = place.train("plain-5", **plain, losses={"kl": 0.5, "ce": 0.5}, temperature="5")
    found["plain kl, T = 1"] = place.train("plain-1", **plain, losses={"kl": 1.0})
    return found


def compression(place: Place) -> dict[str, Figures]:
    from softlabels.config import PruneOptions
    from softlabels.export import export
    from softlabels.prune import prune

    half = PruneOptions(magnitude=0.5)
    found = {"plain": place.train("distilled", **BILSTM)}
    again = {key: value for key, value in BILSTM.items() if key != "options"} | {"epochs": 2, "lr": 1e-3}
    prune(place.out / "distilled", out=place.out / "pruned", options=half)
    found["pruned"] = place.score(place.out / "pruned")
    found["pruned, distilled again"] = place.train("again", **again, from_run=str(place.out / "pruned"))
    found["pruned first, then distilled"] = place.train("first", **BILSTM, prune={"magnitude": 0.5})
    for name in ("distilled", "again", "first"):
        export(place.out / name, out=place.out / f"{name}-int8", int8=True)
    found["int8"] = place.score(place.out / "distilled-int8")
    found["pruned, distilled again, int8"] = place.score(place.out / "again-int8")
    found["pruned first, then distilled, int8"] = place.score(place.out / "first-int8")
    export(place.out / "distilled", out=place.out / "onnx")
    found["onnx"] = place.score(place.out / "onnx")
    return found


def heads(place: Place) -> dict[str, Figures]:
    from softlabels.cache import open_cache
    from softlabels.config import PruneOptions
    from softlabels.export import export
    from softlabels.pretrained import resolve_pretrained
    from softlabels.prune import prune

    start = {"init_from": str(resolve_pretrained(MINILM)), "layers": 3}
    common = {"student": "transformer", "losses": {"kl": 1.0}, "batch_size": 32}
    found = {"plain": place.train("distilled", **common, options=start, lr=2e-4, epochs=6)}
    quarter, cache = PruneOptions(heads=0.25), open_cache(place.task / "cache")
    prune(place.out / "distilled", out=place.out / "pruned", options=quarter, cache=cache)
    found["pruned"] = place.score(place.out / "pruned")
    found["pruned, distilled again"] = place.train(
        "again", **common, from_run=str(place.out / "pruned"), lr=1e-4, epochs=2
    )
    found["pruned first, then distilled"] = place.train(
        "first", **common, options=start, lr=2e-4, epochs=6, prune={"heads": 0.25}
    )
    for title, run, int8 in (
        ("onnx", "distilled", False),
        ("int8", "distilled", True),
        ("pruned, distilled again, onnx", "again", False),
        ("pruned, distilled again, int8", "again", True),
    ):
        export(place.out / run, out=place.out / f"{run}-{int8}", int8=int8)
        found[title] = place.score(place.out / f"{run}-{int8}")
    return found


PARTS: dict[str, Callable[[Place], dict[str, Figures]]] = {
    "ensemble": ensemble,
    "federated": federated,
    "joint": joint,
    "multitask": multitask,
    "assistant": assistant,
    "cross-layer": cross_layer,
    "compression": compression,
    "heads": heads,
}


# -------------------------------------------------------------------------------------------------- running them


def run_part(part: str, task: str, seed: int, folder: str) -> dict[str, Figures]:
    """One part with one seed, in a process of its own; remembered where the folder is kept."""
    import torch

    from softlabels.progress import quiet

    torch.set_num_threads(1)
    place = Place(Path(folder) / task, Path(folder) / task / "beyond" / f"{part}-seed{seed}", seed)
    result = place.out.with_suffix(".json")
    if result.exists():
        return json.loads(result.read_text())
    shutil.rmtree(place.out, ignore_errors=True)
    place.out.mkdir(parents=True)
    started = time.monotonic()
    with quiet():
        found = PARTS[part](place)
    print(f"{task} {part} seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    result.write_text(json.dumps(found))
    shutil.rmtree(place.out)  # its models: the figures are what is wanted
    return found


def print_part(part: str, task: str, found: list[dict[str, Figures]]) -> None:
    print(f"\n{part}, {task}, {len(found)} seeds")
    for name in found[0]:
        figures = [one[name] for one in found]
        accuracies = [100 * one["accuracy"] for one in figures]
        line = f"  {name:<38}{statistics.mean(accuracies):>7.1f} ±{statistics.pstdev(accuracies):>4.1f}"
        if "macro_f1" in figures[0]:
            line += f"   F1 {100 * statistics.mean(one['macro_f1'] for one in figures):>5.1f}"
        if part in ("compression", "heads"):
            line += f"   {statistics.mean(one['bytes'] for one in figures) / 1e6:>6.1f} MB"
            line += f"   {statistics.median(one['ms'] for one in figures):>6.2f} ms"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TWO_TASKS))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=None, help="what is made stays there, and a broken run goes on")
    parser.add_argument("--small", action="store_true", help="a few hundred rows: to see that it runs")
    given = parser.parse_args()
    if not (CORPORA / "sst2").is_dir():
        print(f"skipped: no folder {CORPORA / 'sst2'}")
        return
    if unknown := set(given.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    os.environ["SOFTLABELS_QUIET"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder, parts = given.folder or Path(temporary), given.parts.split(",")
        tasks = given.tasks.split(",")
        for name in dict.fromkeys([*tasks, *(TWO_TASKS if "multitask" in parts else ())]):
            sizes = replace(SMALL, chinese=TASKS[name].chinese) if given.small else TASKS[name]
            make_teacher(name, sizes, folder / name)
            if "ensemble" in parts and name in tasks:
                make_other_teachers(folder / name, sizes.epochs)
        jobs = [
            (part, task, seed)
            for seed in range(given.seeds)
            for part in parts
            for task in (tasks[:1] if part == "multitask" else tasks)
        ]
        found: dict[tuple[str, str], list[dict[str, Figures]]] = {}
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:  # torch's threads don't fork
            waiting = {pool.submit(run_part, *job, str(folder)): job for job in jobs}
            for future in as_completed(waiting):
                part, task, seed = waiting[future]
                try:
                    found.setdefault((part, task), []).append(future.result())
                except Exception as error:  # one part that fails doesn't end the others
                    print(f"{task} {part} seed {seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        for (part, task), figures in sorted(found.items()):
            print_part(part, task, figures)


if __name__ == "__main__":
    main()
