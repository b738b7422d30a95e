"""Every recipe on real text, from one cache a task: what students gain by their teacher.

Run it:  make bench      or  python -m tests.bench.bench_quality [--tasks sst2,…] [--recipes hinton,…] [--seeds 3]
                             [--jobs 2] [--folder DIR] [--small]

A task is a shared corpus: some labelled rows, from which the teacher and the students' hard-label twins learn, and more
of its rows without their labels; the teacher reads all of them once, into one cache with its logits, hidden states,
queries, keys and values, from which every recipe trains. The teacher is the demo's MiniLM, fine-tuned; for tnews a BERT
of 6 layers, 192 wide, trained from nothing. Some learn from labelled rows that students and twins don't have: tnews's
from 20,000, for want of the texts that others were pretrained on, and Twitter's from 2,000, since the 1,000 alone make
it no better than three of its layers. Test rows whose text is also in the training split are left out.

A recipe is as it lies in pipeline/, with these changes, so that one cache serves all: what it pretrains on a cache of
its own is a phase before its others, from the task's cache (minilm, minilm-v2), or left out (tinybert, whose next
phase has the same losses; distilbert and mobilebert's 'language', which need a language model); nothing is augmented,
for there are unlabelled rows; mobilebert's student is as deep and wide as MiniLM, and 'progressive' trains its
embeddings first, which can't be the teacher's.

Recipes that look at layers learn from the first rows of the cache only, LAYER_ROWS of them, labelled ones first: they
cost ten times as much a row. So that they take as many steps as their twins, their epochs are LAYER_EPOCHS times the
recipe's (mobilebert's, which are more, as they are), of tasks with many classes times `longer`. The others have as many
steps as their twins too, where the recipe has fewer epochs.

The share closed is (student − twin) / (teacher − twin) in accuracy, on means over seeds; the twin is the same student,
trained on the labelled rows' labels alone for TWIN_EPOCHS (a transformer, TWIN_EPOCHS_OF_TRANSFORMERS). Of student and
twin the epoch counts that was best on DEV more labelled rows; their word vectors, where the recipe fits some, are the
same, fitted on all texts of the training split (the papers take GloVe's). With --folder a broken run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CORPORA = Path(__file__).parents[3] / "shared" / "corpora"
CAPTURES = ["logits", "hidden:all", "qkv:all"]
MINILM, LENGTH = "all-MiniLM-L6-v2", 64
LAYER_ROWS, LAYER_EPOCHS, DEV = 2000, 2, 300
EPOCHS = {"distilled-bilstm": 12}  # 30 in the paper; the recipe, which augments its rows, has 3
TWIN_EPOCHS, TWIN_EPOCHS_OF_TRANSFORMERS = 20, 8
DKD_NEEDS = 3  # classes; so does dist


@dataclass(frozen=True)
class Task:
    """A corpus, and how much of it is used."""

    labelled: int
    unlabelled: int
    test: int
    epochs: int  # of the teacher
    chinese: bool = False
    of_teacher: int = 0  # more labelled rows, which the teacher alone learns from
    longer: int = 1  # times as many epochs for transformers and their twins, which take longer to tell many classes


TASKS = {
    "sst2": Task(labelled=1000, unlabelled=5000, test=1821, epochs=3),
    "twitter_financial_sentiment": Task(labelled=1000, unlabelled=2000, test=2000, epochs=6, of_teacher=2000),
    "banking77": Task(labelled=1500, unlabelled=1500, test=2000, epochs=10, longer=3),
    "tnews": Task(labelled=1500, unlabelled=1500, test=2000, epochs=5, chinese=True, of_teacher=20_000, longer=2),
}
SMALL = Task(labelled=200, unlabelled=100, test=100, epochs=1)
# of several teachers, students or tasks, or held against another counterpart: bench_beyond has these
BEYOND = {"alp-kd", "assistant", "ckd", "compression", "emd", "ensemble", "federated", "joint", "multitask"}
BEYOND |= {"progressive", "quickstart", "taylor-fo"}
RATES = ("optimizer", "lr", "weight_decay", "warmup", "decay")
NO_START = ("init_from", "init_layers")
FROM_BASE = ("pkd-skip", "pkd-last", "distilbert")  # they start from the base model, and so do their twins


@dataclass(frozen=True)
class Job:
    """One student to train and score."""

    task: str
    recipe: str
    student: str
    kind: str  # soft or hard
    seed: int
    options: dict[str, Any]
    twin: str  # the name of the twin that it is held against

    @property
    def name(self) -> str:
        return (
            f"{self.twin}-seed{self.seed}" if self.kind == "hard" else f"{self.recipe}-{self.student}-seed{self.seed}"
        )


def rows_of(name: str, split: str) -> list[dict[str, Any]]:
    path = CORPORA / name / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if not row.get("in_train")]


def write_task(name: str, task: Task, folder: Path) -> None:
    """train.jsonl, transfer.jsonl (they, then unlabelled ones), teacher.jsonl (they and more), dev and test.jsonl."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(name, "train")
    if name == "sst2":  # many rows are a word or two
        rows = [row for row in rows if len(row["text"].split()) >= 5]
    order = np.random.default_rng(0).permutation(len(rows))
    chosen = [rows[i] for i in order[: task.labelled + task.unlabelled]]
    beside = [rows[i] for i in order[len(chosen) : len(chosen) + DEV]]
    more = [rows[i] for i in order[len(chosen) + DEV :][: task.of_teacher]]
    test_split = "dev" if name == "tnews" else "test"
    test = rows_of(name, test_split)
    held = [test[i] for i in np.random.default_rng(1).permutation(len(test))[: task.test]]
    labelled, dev, more, tested = (
        [{"text": row["text"], "label": str(row["label"])} for row in part]
        for part in (chosen[: task.labelled], beside, more, held)
    )
    bare = [{"text": row["text"]} for row in chosen[task.labelled :]]
    files = {"train": labelled, "transfer": labelled + bare, "dev": dev, "test": tested, "teacher": labelled + more}
    for file, content in files.items():
        lines = [json.dumps({"id": f"{file}-{i}", **row}, ensure_ascii=False) for i, row in enumerate(content)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def chinese_tokenizer(folder: Path) -> Path:
    from transformers import BertTokenizer

    if not folder.exists():
        vocab = CORPORA / "bert_vocabs" / "raw" / "bert-base-chinese-vocab.txt"
        BertTokenizer(str(vocab), model_max_length=LENGTH).save_pretrained(folder)
    return folder


def write_vectors(name: str, teacher: Path, file: Path) -> None:
    """Word vectors of the teacher's tokens, fitted on all texts of the training split, as a word2vec text file."""
    import numpy as np
    from transformers import AutoTokenizer

    from softlabels.students.fitted_vectors import fit_word_vectors

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = [row["text"] for row in rows_of(name, "train")]
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=LENGTH)["input_ids"]
    vectors = fit_word_vectors((np.array(row) for row in ids if row), rows=len(tokenizer), width=300)
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    found = np.flatnonzero(vectors.found)
    lines = [f"{words[row]} {' '.join(f'{value:.4g}' for value in vectors.vectors[row])}" for row in found]
    file.write_text("\n".join([f"{len(lines)} 300", *lines]) + "\n", encoding="utf-8")


def make_teacher(name: str, task: Task, folder: Path) -> dict[str, Any]:
    """Teacher and caches of a task, made where they are missing; what they cost and scored."""
    from softlabels.config import DumpOptions
    from softlabels.corpus import read_corpus
    from softlabels.dump import dump
    from softlabels.progress import quiet
    from softlabels.teacher import TeacherOptions, train_teacher

    done = folder / "teacher.done.json"
    if done.exists():
        return json.loads(done.read_text())
    write_task(name, task, folder)
    settings: dict[str, Any] = {"epochs": task.epochs, "lr": 2e-4, "max_length": LENGTH}
    model = MINILM
    if task.chinese:
        model = "bert-mini"
        sizes = {"layers": 6, "hidden_size": 192, "heads": 12, "intermediate_size": 768}
        tokenizer = str(chinese_tokenizer(folder / "tokenizer"))
        settings |= {"lr": 5e-4, "batch_size": 64, "from_scratch": True, "tokenizer": tokenizer, "options": sizes}
    with quiet():
        train = read_corpus(folder / "teacher.jsonl")
        options = TeacherOptions(device="cpu", **settings)
        report = train_teacher(train, model=model, out=folder / "teacher", options=options)
        whole = dump(
            read_corpus(folder / "transfer.jsonl"),
            teacher=str(folder / "teacher"),
            out=folder / "cache",
            options=DumpOptions(capture=CAPTURES, max_length=LENGTH),
            device="cpu",
        )
        tested = dump(
            read_corpus(folder / "test.jsonl"),
            teacher=str(folder / "teacher"),
            out=folder / "cache-test",
            options=DumpOptions(capture=["logits"], max_length=LENGTH),
            device="cpu",
        )
    write_vectors(name, folder / "teacher", folder / "vectors.txt")
    found = {"tuning": report.seconds, "dump": whole.seconds, "bytes": whole.bytes, "test_dump": tested.seconds}
    done.write_text(json.dumps(found))
    return found


def jobs_of(task_name: str, task: Task, recipes: list[str], seeds: int, folder: Path, scale: int) -> Iterator[Job]:
    """Every student of every recipe, and each twin once."""
    from softlabels.config import fingerprint
    from softlabels.recipes import read_recipe

    for recipe_name in recipes:
        recipe = read_recipe(recipe_name)
        for entry in recipe.students:
            if (recipe_name, entry.name) == ("mobilebert", "language"):
                continue  # needs a language model
            options = entry.model_dump(exclude_unset=True)
            for key in ("name", "hard_twin", "hard_epochs", "seeds", "compress"):
                options.pop(key, None)
            options["options"] = fit_student(recipe_name, entry.options, recipe, task, folder)
            if recipe.pretrain is not None and recipe_name in ("minilm", "minilm-v2"):
                before = recipe.pretrain.student.model_dump(exclude_unset=True)["phases"]
                own = options.pop("phases", None) or [
                    {"name": "task", "losses": options.pop("losses"), "temperature": options.pop("temperature", "1")}
                ]
                options["phases"] = [*before, *own]
            if recipe_name in EPOCHS:
                options["epochs"] = EPOCHS[recipe_name]
            phases = options.get("phases") or [options]
            if recipe_name == "mobilebert" and entry.name == "progressive":
                phases[0]["losses"].append({"loss": "hidden_mse", "map": "embeddings"})
            if options["student"] == "transformer":
                options["rows"] = LAYER_ROWS
                times = task.longer * (1 if recipe_name == "mobilebert" else LAYER_EPOCHS)
                least = as_many_layer_steps(task) if len(phases) == 1 else 1
                epochs = task.longer * TWIN_EPOCHS_OF_TRANSFORMERS
            else:
                times, least, epochs = 1, as_many_steps(task), TWIN_EPOCHS
            for settings in phases:
                usual = settings.get("epochs", options.get("epochs", 1))
                settings["epochs"] = max(1, times * max(usual, least) // scale)
            epochs = max(1, epochs // scale)
            hard: dict[str, Any] = {key: options[key] for key in ("student", "batch_size", *RATES) if key in options}
            start = {k: v for k, v in options["options"].items() if k not in NO_START or recipe_name in FROM_BASE}
            hard |= {"options": start, "losses": {"ce": 1.0}, "epochs": epochs}
            key = json.dumps(hard, sort_keys=True)
            twin = f"twin-{entry.student}-{fingerprint(key)[:8]}"  # the same whichever recipes are asked for
            for seed in range(seeds):
                yield Job(task_name, recipe_name, entry.name, "soft", seed, options | {"seed": seed}, twin)
                yield Job(task_name, recipe_name, entry.name, "hard", seed, hard | {"seed": seed}, twin)


def as_many_steps(task: Task) -> int:
    """Epochs of all rows in which a student takes as many steps as its twin does of the labelled ones."""
    return -(-TWIN_EPOCHS * task.labelled // (task.labelled + task.unlabelled))


def as_many_layer_steps(task: Task) -> int:
    """The same of LAYER_ROWS rows, before they are multiplied by LAYER_EPOCHS and `longer`."""
    return -(-TWIN_EPOCHS_OF_TRANSFORMERS * task.labelled // (LAYER_ROWS * LAYER_EPOCHS))


def fit_student(name: str, given: dict[str, Any], recipe: Any, task: Task, folder: Path) -> dict[str, Any]:
    """The student's options for the task's teacher: see the module."""
    from softlabels.pretrained import resolve_pretrained

    options = dict(given)
    if options.get("word_vectors") == "fit":
        options["word_vectors"] = str(folder / "vectors.txt")
    if options.get("init_from") == "pretrained" and name != "distilbert":  # its shape is the pretrained one's
        options = dict(recipe.pretrain.student.options)
    if name == "mobilebert":
        wide = {"hidden_size": 192, "intra_bottleneck_size": 48} if task.chinese else {"hidden_size": 384}
        options |= {"layers": 6, "heads": 12, "intra_bottleneck_size": 96, **wide}
        options = {key: value for key, value in options.items() if key not in (*NO_START, "init_head")}  # a BERT's
    if name == "distilbert":
        options |= {"init_from": "base", "init_layers": [1, 3, 5]}
    if options.get("init_from") == "base":
        options["init_from"] = str(folder / "teacher" if task.chinese else resolve_pretrained(MINILM))
    elif options.get("init_from") in ("teacher", "pretrained"):
        options["init_from"] = str(folder / "teacher")
    return options


def run_job(job: Job, folder: str, until: float) -> dict[str, Any] | None:
    """Train and score one student, in a process of its own; None where it would start after `until`."""
    import torch

    from softlabels.cache import open_cache
    from softlabels.config import StudentOptions
    from softlabels.corpus import read_corpus
    from softlabels.evaluate import evaluate
    from softlabels.progress import quiet
    from softlabels.runs import load_run
    from softlabels.train import train_student

    torch.set_num_threads(1)
    place = Path(folder) / job.task
    result = place / "results" / f"{job.name}.json"
    if result.exists():
        return json.loads(result.read_text())
    if time.time() > until:
        return None
    options = StudentOptions.model_validate(job.options)
    out = place / "runs" / job.name
    with quiet():
        if not (out / "run.json").exists():  # a bench that was stopped may have trained it and not scored it
            train_student(
                open_cache(place / "cache"),
                out=out,
                options=options,
                validation=read_corpus(place / "dev.jsonl"),
                resume=True,
                cpu=True,
            )
        found = evaluate(out, read_corpus(place / "test.jsonl"), cache=open_cache(place / "cache-test")).to_dict()
    figures = {
        "accuracy": found["accuracy"],
        "macro_f1": found["macro_f1"],
        "parameters": found["parameters"],
        "ms": found["latency"]["ms"],
        "seconds": load_run(out).record.train_seconds,
        "agreement": found["fidelity"]["agreement"],
        "teacher": found["fidelity"]["teacher_accuracy"],
        "teacher_f1": found["fidelity"]["teacher_macro_f1"],
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(figures))
    return figures


def mean_of(found: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(item[key] for item in found)


def print_task(name: str, cost: dict[str, Any], jobs: list[Job], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The task's table; per recipe and student its gain over the twin, and the share closed."""
    some = next(iter(found.values()))
    teacher = some["teacher"]
    print(
        f"\n{name}: teacher {100 * teacher:.1f} accuracy, {100 * some['teacher_f1']:.1f} macro-F1; tuned in "
        f"{cost['tuning']:.0f} s, dumped in {cost['dump']:.0f} s into {cost['bytes'] / 1e6:,.0f} MB"
    )
    print(
        f"{'recipe':<24}{'student':<14}{'acc soft':>9}{'±':>5}{'acc hard':>9}{'F1 soft':>9}{'F1 hard':>9}{'closed':>8}"
        f"{'agree':>7}{'parameters':>12}{'ms':>7}{'train s':>9}{'seeds':>6}"
    )
    gains: dict[str, Any] = {}
    for recipe, student in dict.fromkeys((job.recipe, job.student) for job in jobs):
        mine = [job for job in jobs if (job.recipe, job.student) == (recipe, student)]
        soft = [found[job.name] for job in mine if job.kind == "soft" and job.name in found]
        hard = [found[job.name] for job in mine if job.kind == "hard" and job.name in found]
        if not soft or not hard:
            continue
        acc, twin = mean_of(soft, "accuracy"), mean_of(hard, "accuracy")
        spread = statistics.pstdev([item["accuracy"] for item in soft])
        closed = (acc - twin) / (teacher - twin) if teacher > twin else float("nan")
        gains[f"{recipe}/{student}"] = {"gain": acc - twin, "closed": closed, "soft": acc, "hard": twin}
        print(
            f"{recipe:<24}{student:<14}{100 * acc:>9.1f}{100 * spread:>5.1f}{100 * twin:>9.1f}"
            f"{100 * mean_of(soft, 'macro_f1'):>9.1f}{100 * mean_of(hard, 'macro_f1'):>9.1f}{closed:>8.0%}"
            f"{100 * mean_of(soft, 'agreement'):>7.1f}{soft[0]['parameters']:>12,}{mean_of(soft, 'ms'):>7.2f}"
            f"{mean_of(soft, 'seconds'):>9.1f}{len(soft):>6}",
            flush=True,
        )
    return gains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--recipes", default=None, help="by default all of one teacher and student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=None, help="what is made stays there, and a broken run goes on")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no student after so many minutes a task")
    parser.add_argument("--small", action="store_true", help="a few hundred rows: to see that it runs")
    given = parser.parse_args()
    if not (CORPORA / "sst2").is_dir():
        print(f"skipped: no folder {CORPORA / 'sst2'}")
        return
    os.environ["SOFTLABELS_QUIET"] = "1"
    from softlabels.recipes import recipes_folder

    names = sorted(path.stem for path in recipes_folder().glob("*.yaml") if path.stem not in BEYOND)
    recipes = given.recipes.split(",") if given.recipes else names
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        every: dict[str, dict[str, Any]] = {}
        for name in given.tasks.split(","):
            task = TASKS[name]
            if given.small:
                task = Task(SMALL.labelled, SMALL.unlabelled, SMALL.test, SMALL.epochs, task.chinese)
            cost = make_teacher(name, task, folder / name)
            classes = len({str(row["label"]) for row in map(json.loads, (folder / name / "train.jsonl").open())})
            wanted = [r for r in recipes if classes >= DKD_NEEDS or r not in ("dkd", "dist")]
            jobs = list(jobs_of(name, task, wanted, given.seeds, folder / name, 4 if given.small else 1))
            # seed by seed: what a limit of time cuts off is the last seeds, not the last recipes
            unique = {job.name: job for job in sorted(jobs, key=lambda job: job.seed)}
            found: dict[str, dict[str, Any]] = {}
            began = time.monotonic()
            with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:  # torch's threads don't fork
                until = time.time() + 60 * given.minutes
                waiting = {pool.submit(run_job, job, str(folder), until): job for job in unique.values()}
                for future in as_completed(waiting):
                    job = waiting[future]
                    try:
                        if (figures := future.result()) is not None:
                            found[job.name] = figures
                    except Exception as error:  # one student that can't be trained doesn't end the others
                        print(f"{name} {job.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            print(
                f"\n{len(found)} of {len(unique)} students in {time.monotonic() - began:.0f} s, {given.jobs} at a time"
            )
            every[name] = print_task(name, cost, jobs, found)
        print(f"\n{'mean over tasks':<38}{'gain':>7}{'closed':>8}  tasks")
        for key in dict.fromkeys(key for gains in every.values() for key in gains):
            mine = [gains[key] for gains in every.values() if key in gains]
            shares = [item["closed"] for item in mine if item["closed"] == item["closed"]]
            closed = statistics.mean(shares) if shares else float("nan")
            print(f"{key:<38}{100 * mean_of(mine, 'gain'):>+7.1f}{closed:>8.0%}  {len(mine)}")


if __name__ == "__main__":
    main()
