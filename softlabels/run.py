"""Every stage of a recipe, in order; a stage whose inputs haven't changed is skipped.

corpus → teacher → (augment) → dump → students, each from soft labels and (its twin) from hard labels alone → table.
A recipe that pretrains its students does the first three once more before. Everything lies in one folder:

    teacher/  augmented.jsonl  cache/  cache-test/  students/NAME-soft-seed0/  students/NAME-hard-seed0/
    pretrain/           its own teacher/, cache/ and student/
    stages/NAME.json    what a stage was given (its fingerprint), what it found and how long it took
    results.json        the table as data
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from softlabels.augment import augment
from softlabels.cache import open_cache
from softlabels.cache.files import lock, write_file
from softlabels.config import (
    BASE,
    JOINT_NAMES,
    PRETRAINED,
    TEACHER,
    AugmentOptions,
    DumpOptions,
    JointOptions,
    StudentOptions,
    fingerprint,
)
from softlabels.corpus import Corpus, check_trainable, encode_labels, read_corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError, CorpusError
from softlabels.evaluate import evaluate
from softlabels.foresight import check_recipe, check_tasks_of_recipe
from softlabels.joint import train_joint
from softlabels.multitask import train_multitask
from softlabels.pretrained import resolve_pretrained
from softlabels.recipes import (
    CorpusChoice,
    MultiTaskRecipe,
    Pretraining,
    Recipe,
    StudentEntry,
    TeacherChoice,
    alone_options,
)
from softlabels.runs import TOGETHER
from softlabels.teacher import TeacherOptions, teacher_task, train_teacher
from softlabels.train import train_student
from softlabels.training.many_tasks import task_options
from softlabels.training.preparing import check_options
from softlabels.training.records import TrainReport
from softlabels.types import Task


@dataclass(frozen=True, slots=True)
class Row:
    """One student of the table. Figures are means over its seeds; `hard` ones belong to the twin, if there is one."""

    student: str
    seeds: int
    parameters: int
    bytes: int
    accuracy_soft: float
    macro_f1_soft: float
    accuracy_hard: float | None
    macro_f1_hard: float | None
    agreement: float
    ms: float
    times_faster: float | None  # None where the teacher is too large to be timed here
    train_seconds: float  # of one soft-label student; of students that train together, of all of them
    accuracy_alone: float | None = None  # of what trained together: the same by itself, on the same losses
    macro_f1_alone: float | None = None
    teacher_accuracy: float | None = None  # where it has a teacher of its own


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a recipe gave."""

    recipe: str
    out: str
    rows: list[Row]
    teacher_accuracy: float
    teacher_macro_f1: float
    teacher_parameters: int | None
    teacher_ms: float | None
    teacher_seconds: float  # fine-tuning (0 where the teacher was ready) and dumping: paid once
    cache_rows: int
    cache_bytes: int
    skipped: int  # stages whose inputs hadn't changed

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Stages:
    """The folder of a recipe's run, and which of its stages are done."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self.out, self.say, self.skipped = out, say, 0

    def run(
        self, name: str, inputs: Any, work: Callable[[], dict[str, Any]], *, makes: Path | None = None
    ) -> dict[str, Any]:
        """The result of stage `name`: remembered where its inputs are the same and what it `makes` is there."""
        place, key = self.out / "stages" / f"{name}.json", fingerprint(inputs)
        before = _read_json(place)
        if before is not None and before.get("fingerprint") == key and (makes is None or makes.exists()):
            self.skipped += 1
            return before["result"]
        self.say(f"{name} …")
        started = time.monotonic()
        result = work()
        # an interrupted stage that went on later counts all of its time where it kept count itself
        result.setdefault("seconds", time.monotonic() - started)
        write_file(place, json.dumps({"fingerprint": key, "result": result}, sort_keys=True, indent=1).encode())
        return result


def run_recipe(
    recipe: Recipe, *, out: Path, say: Callable[[str], None] = lambda line: None, cpu: bool = False
) -> RunResult:
    """Run `recipe` in the folder `out`. Interrupted, the same call goes on; repeated, it costs a few seconds."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        stages = _Stages(out, say)
        corpora = _Corpora(recipe.corpus, recipe.teacher)
        _check(recipe, corpora)
        teacher = _teacher(recipe.teacher, stages, corpora, cpu=cpu)
        if recipe.augment is not None:
            _augment(recipe.augment, stages, corpora, teacher, cpu=cpu)
        cache = _dump(recipe.dump, stages, "cache", corpora, "transfer", teacher=teacher, cpu=cpu)
        logits = recipe.dump.model_copy(update={"capture": ["logits"]})
        test = _dump(logits, stages, "cache-test", corpora, "test", teacher=teacher, cpu=cpu)
        starts = _Starts(base=recipe.teacher.model, teacher=teacher)
        if recipe.pretrain is not None:
            starts = replace(starts, pretrained=_pretrain(recipe.pretrain, stages, cpu=cpu))
        results: dict[str, _Found] = {}
        for entry in recipe.students:
            if entry.joint is not None:
                results |= _pair(entry, stages, corpora, cache=cache, test=test, starts=starts, cpu=cpu)
                continue
            results[entry.name] = _student(
                entry, stages, corpora, cache=cache, test=test, starts=starts, pretrain=recipe.pretrain, cpu=cpu
            )
        paid_once = teacher.seconds + cache.seconds + (starts.pretrained.seconds if starts.pretrained else 0.0)
        result = _table(recipe.name, out, results, [cache], paid_once, stages.skipped)
        write_file(out / "results.json", json.dumps(result.to_dict(), sort_keys=True, indent=1).encode())
    return result


# the evaluations of a student, one a seed: 'soft', 'hard' (its twin's), 'alone' (of what trained together)
_Found = dict[str, list[dict[str, Any]]]


def run_tasks(
    recipe: MultiTaskRecipe, *, out: Path, say: Callable[[str], None] = lambda line: None, cpu: bool = False
) -> RunResult:
    """The same for a recipe of several tasks: teacher and caches of each, then one encoder for all, and each alone.

    The table has a row a task. Everything lies in `out`: task-NAME/ with its teacher and caches, students/seed0/NAME.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        stages = _Stages(out, say)
        corpora = {task.name: _Corpora(task.corpus, task.teacher) for task in recipe.tasks}
        for task in recipe.tasks:
            check_options(task_options(recipe.student, task.name))
            _check_corpora(f"{recipe.name}, task {task.name}", task.corpus, task.teacher, corpora[task.name])
        check_tasks_of_recipe(recipe)
        caches, tests, paid_once = {}, {}, 0.0
        for task in recipe.tasks:
            read, under = corpora[task.name], f"task-{task.name}"
            teacher = _teacher(task.teacher, stages, read, cpu=cpu, under=under)
            logits = task.dump.model_copy(update={"capture": ["logits"]})
            common: dict[str, Any] = {"teacher": teacher, "cpu": cpu, "under": under}
            caches[task.name] = _dump(task.dump, stages, "cache", read, "transfer", **common)
            tests[task.name] = _dump(logits, stages, "cache-test", read, "test", **common)
            paid_once += teacher.seconds + caches[task.name].seconds
        results: dict[str, _Found] = {task.name: {"soft": [], "alone": []} for task in recipe.tasks}
        for seed in recipe.seeds:
            _together(recipe, seed, stages, corpora, caches=caches, tests=tests, results=results, cpu=cpu)
        result = _table(recipe.name, out, results, list(caches.values()), paid_once, stages.skipped)
        write_file(out / "results.json", json.dumps(result.to_dict(), sort_keys=True, indent=1).encode())
    return result


def _together(
    recipe: MultiTaskRecipe,
    seed: int,
    stages: _Stages,
    corpora: dict[str, _Corpora],
    *,
    caches: dict[str, _Made],
    tests: dict[str, _Made],
    results: dict[str, _Found],
    cpu: bool,
) -> None:
    """One encoder for all tasks, and a student for each alone, of a seed: their evaluations, added to `results`."""
    options = recipe.student.model_copy(update={"seed": seed})
    if options.options.get("init_from") == BASE:
        folder = str(resolve_pretrained(recipe.tasks[0].teacher.model))
        options = options.model_copy(update={"options": options.options | {"init_from": folder}})
    out = stages.out / "students" / f"seed{seed}"
    key = fingerprint([options.model_dump(), {name: cache.key for name, cache in caches.items()}])

    def train() -> dict[str, Any]:
        opened = {name: open_cache(cache.path) for name, cache in caches.items()}
        return _go_on(out, partial(train_multitask, opened, out=out, options=options, cpu=cpu))

    trained = stages.run(f"train-seed{seed}", key, train, makes=out / TOGETHER)
    for task in recipe.tasks:
        name, cache, test = task.name, caches[task.name], tests[task.name]
        found = stages.run(
            f"evaluate-{name}-seed{seed}",
            [key, test.key],
            partial(_evaluate, out / name, corpora[name], Path(test.path)),
        )
        results[name]["soft"].append(found | {"train_seconds": trained["seconds"]})
        if recipe.alone:
            alone = task_options(options, name)
            results[name]["alone"].append(
                _one(f"{name}-alone-seed{seed}", alone, stages, corpora[name], cache=cache, test=test, cpu=cpu)
            )


@dataclass(frozen=True, slots=True)
class _Made:
    """What a stage made: where it lies, a fingerprint of all that it follows from, and the seconds it took."""

    path: str
    key: str
    seconds: float
    found: dict[str, Any]


_STARTS = {"init_from", "init_layers", "init_head"}  # options that say what a student starts from


@dataclass(frozen=True, slots=True)
class _Starts:
    """What a student's `init_from` may name."""

    base: str  # a model's name or folder
    teacher: _Made
    pretrained: _Made | None = None


def _check(recipe: Recipe, corpora: _Corpora) -> None:
    """What can be known to fail is told now, not after the hours that the teacher takes."""
    for entry in recipe.students:
        check_options(_options(entry, "soft", entry.seeds[0], recipe.pretrain))
    if recipe.pretrain is not None:
        check_options(recipe.pretrain.student)
    check_recipe(recipe)
    _check_corpora(recipe.name, recipe.corpus, recipe.teacher, corpora)


def _check_corpora(name: str, choice: CorpusChoice, teacher: TeacherChoice, corpora: _Corpora) -> None:
    """ConfigError or CorpusError where there is nothing to test on, or a teacher could not be trained."""
    if choice.test is None and choice.test_source is None:
        raise ConfigError(f"recipe {name}: say what to test on: corpus.test (a split) or corpus.test_source (a file)")
    test = corpora.read("test")
    if all(example.label is None for example in test.examples):
        raise CorpusError(f"test corpus {test.source} has no labelled row to score the students on")
    if teacher.train is not None:
        train = corpora.read("train")
        check_trainable(train)
        for use in ("transfer", "test"):
            encode_labels(corpora.read(use).examples, train.label_names or [])


class _Corpora:
    """The recipe's corpora, each read once."""

    def __init__(self, choice: CorpusChoice, teacher: TeacherChoice, task: Task = "sequence-classification") -> None:
        self.choice, self.training, self.task = choice, teacher.train, task
        self._read: dict[tuple[str, str | None, int | None], Corpus] = {}
        self._put: dict[str, Corpus] = {}

    def key(self, use: str) -> str:
        """A fingerprint of a corpus: of its rows, whatever file they came from."""
        corpus = self.read(use)
        return fingerprint([corpus.hash, corpus.label_names])

    def read(self, use: str) -> Corpus:
        if use in self._put:
            return self._put[use]
        source, split = self._place(use)
        rows = self._rows(use)
        if (source, split, rows) not in self._read:
            self._read[source, split, rows] = read_corpus(
                source, split=split, text=self.choice.text, label=self.choice.label, rows=rows, task=self.task
            )
        return self._read[source, split, rows]

    def put(self, use: str, corpus: Corpus) -> None:
        """From now on `corpus` is what `read(use)` gives."""
        self._put[use] = corpus

    def _place(self, use: str) -> tuple[str, str | None]:
        choice = self.choice
        if use == "test":
            return choice.test_source or choice.source, choice.test
        return choice.source, choice.train if use == "train" or choice.transfer is None else choice.transfer

    def _rows(self, use: str) -> int | None:
        if use == "test":
            return None
        if use == "train" and self.training is not None and self.training.rows is not None:
            return min(self.training.rows, self.choice.rows or self.training.rows)
        return self.choice.rows


def _state_of(model: str) -> Any:
    """What shows that the files of a local model have changed; None for a name."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _teacher(choice: TeacherChoice, stages: _Stages, corpora: _Corpora, *, cpu: bool, under: str = "") -> _Made:
    """The teacher: as it is, or fine-tuned."""
    if choice.train is None:
        return _Made(choice.model, fingerprint([choice.model, _state_of(choice.model)]), 0.0, {})
    key = fingerprint([choice.model_dump(), _state_of(choice.model), corpora.key("train")])
    out = stages.out / under / "teacher"
    options = TeacherOptions(**choice.train.model_dump(exclude={"rows"}), device="cpu" if cpu else None)

    def work() -> dict[str, Any]:
        report = train_teacher(corpora.read("train"), model=choice.model, out=out, options=options)
        return {"seconds": report.seconds}

    found = stages.run(_stage(under, "teacher"), key, work, makes=out / "config.json")
    return _Made(str(out), key, found["seconds"], found)


def _dump(
    options: DumpOptions,
    stages: _Stages,
    name: str,
    corpora: _Corpora,
    use: str,
    *,
    teacher: _Made,
    cpu: bool,
    under: str = "",
) -> _Made:
    out = stages.out / under / name
    key = fingerprint([teacher.key, corpora.key(use), options.model_dump()])

    def work() -> dict[str, Any]:
        report = dump(corpora.read(use), teacher=teacher.path, out=out, options=options, device="cpu" if cpu else None)
        return {"rows": report.rows, "bytes": report.bytes, "truncated": report.truncated}

    found = stages.run(_stage(under, name), key, work, makes=out / "manifest.json")
    return _Made(str(out), key, found["seconds"], found)


def _augment(options: AugmentOptions, stages: _Stages, corpora: _Corpora, teacher: _Made, *, cpu: bool) -> None:
    """A larger transfer set takes the place of the recipe's."""
    file = stages.out / "augmented.jsonl"

    def work() -> dict[str, Any]:
        file.unlink(missing_ok=True)  # of other inputs
        report = augment(
            corpora.read("transfer"), out=file, options=options, teacher=teacher.path, device="cpu" if cpu else None
        )
        return {"rows": report.rows}

    stages.run("augment", [teacher.key, corpora.key("transfer"), options.model_dump()], work, makes=file)
    corpora.put("transfer", read_corpus(file))


def _stage(under: str, name: str) -> str:
    return f"{under}-{name}" if under else name


def _pretrain(recipe: Pretraining, stages: _Stages, *, cpu: bool) -> _Made:
    """The student of an earlier distillation; its seconds are those of everything that it took."""
    under = "pretrain"
    tuning = recipe.teacher.train
    task = tuning.task if tuning is not None else teacher_task(recipe.teacher.model, recipe.dump.task)
    corpora = _Corpora(recipe.corpus, recipe.teacher, task)
    teacher = _teacher(recipe.teacher, stages, corpora, cpu=cpu, under=under)
    cache = _dump(recipe.dump, stages, "cache", corpora, "transfer", teacher=teacher, cpu=cpu, under=under)
    starts = _Starts(base=recipe.teacher.model, teacher=teacher)
    options = _started(recipe.student, starts)
    run = stages.out / under / "student"
    key = fingerprint([options.model_dump(), cache.key])
    work = partial(_train, Path(cache.path), run, options, cpu=cpu)
    found = stages.run(_stage(under, "student"), key, work, makes=run / "run.json")
    return _Made(str(run), key, teacher.seconds + cache.seconds + found["seconds"], found)


def _student(
    entry: StudentEntry,
    stages: _Stages,
    corpora: _Corpora,
    *,
    cache: _Made,
    test: _Made,
    starts: _Starts,
    pretrain: Pretraining | None,
    cpu: bool,
) -> _Found:
    """The evaluations of a student and of its hard-label twin, one a seed each."""
    found: _Found = {"soft": [], "hard": []}
    for kind in ("soft", "hard") if entry.hard_twin else ("soft",):
        for seed in entry.seeds:
            options = _started(_options(entry, kind, seed, pretrain), starts)
            name = f"{entry.name}-{kind}-seed{seed}"
            run = stages.out / "students" / name
            pretrained = starts.pretrained.key if starts.pretrained and kind == "soft" else None
            key = fingerprint([options.model_dump(), cache.key, *([pretrained] if pretrained else [])])
            trained = stages.run(
                f"train-{name}", key, partial(_train, Path(cache.path), run, options, cpu=cpu), makes=run / "run.json"
            )
            evaluated = stages.run(
                f"evaluate-{name}", [key, test.key], partial(_evaluate, run, corpora, Path(test.path))
            )
            found[kind].append(evaluated | {"train_seconds": trained["seconds"]})
    return found


def _one(
    name: str,
    options: StudentOptions,
    stages: _Stages,
    corpora: _Corpora,
    *,
    cache: _Made,
    test: _Made,
    cpu: bool,
) -> dict[str, Any]:
    """The evaluation of one student, `students/NAME`."""
    run, key = stages.out / "students" / name, fingerprint([options.model_dump(), cache.key])
    work = partial(_train, Path(cache.path), run, options, cpu=cpu)
    trained = stages.run(f"train-{name}", key, work, makes=run / "run.json")
    evaluated = stages.run(f"evaluate-{name}", [key, test.key], partial(_evaluate, run, corpora, Path(test.path)))
    return evaluated | {"train_seconds": trained["seconds"]}


def _pair(
    entry: StudentEntry, stages: _Stages, corpora: _Corpora, *, cache: _Made, test: _Made, starts: _Starts, cpu: bool
) -> dict[str, _Found]:
    """The evaluations of two students that train together, of their average, and of each by itself and these averaged.

    One row of the table each: NAME/global, NAME/local, NAME/average.
    """
    assert entry.joint is not None
    rows: dict[str, _Found] = {name: {"soft": [], "alone": []} for name in (*JOINT_NAMES, "average")}
    for seed in entry.seeds:
        chosen = entry.joint_options(seed=seed)
        students = {name: _started(options, starts) for name, options in chosen.students.items()}
        chosen = chosen.model_copy(update={"students": students})
        name = f"{entry.name}-joint-seed{seed}"
        out, key = (
            stages.out / "students" / name,
            fingerprint([chosen.model_dump(), cache.key, _pretrained_key(starts)]),
        )

        def train(out: Path = out, chosen: JointOptions = chosen) -> dict[str, Any]:
            return _go_on(out, partial(train_joint, open_cache(cache.path), out=out, options=chosen, cpu=cpu))

        trained = stages.run(f"train-{name}", key, train, makes=out / TOGETHER)
        runs = {student: out / student for student in JOINT_NAMES}
        found = _alone_and_averaged(name, runs, [key, test.key], stages, corpora, test)
        for student, evaluated in found.items():
            rows[student]["soft"].append(evaluated | {"train_seconds": trained["seconds"]})
        if entry.joint.alone:
            runs = {student: stages.out / "students" / f"{entry.name}-{student}-seed{seed}" for student in JOINT_NAMES}
            keys = []
            for student, run in runs.items():
                options = alone_options(chosen, student)
                keys.append(fingerprint([options.model_dump(), cache.key, _pretrained_key(starts)]))
                work = partial(_train, Path(cache.path), run, options, cpu=cpu)
                stages.run(f"train-{run.name}", keys[-1], work, makes=run / "run.json")
            found = _alone_and_averaged(f"{entry.name}-seed{seed}", runs, [*keys, test.key], stages, corpora, test)
            for student, evaluated in found.items():
                rows[student]["alone"].append(evaluated)
    return {f"{entry.name}/{student}": found for student, found in rows.items()}


def _alone_and_averaged(
    name: str, runs: dict[str, Path], inputs: Any, stages: _Stages, corpora: _Corpora, test: _Made
) -> dict[str, dict[str, Any]]:
    """The evaluations of each of `runs` and, as 'average', of all together."""
    found = {}
    for student in (*runs, "average"):
        one, *others = list(runs.values()) if student == "average" else [runs[student]]
        work = partial(_evaluate, one, corpora, Path(test.path), others=others)
        found[student] = stages.run(f"evaluate-{name}-{student}", inputs, work)
    return found


def _pretrained_key(starts: _Starts) -> str | None:
    return starts.pretrained.key if starts.pretrained else None


def _options(entry: StudentEntry, kind: str, seed: int, pretrain: Pretraining | None) -> StudentOptions:
    """The options of a student, or of its twin: the same student, which learns from labels alone.

    Where the student starts from what its teacher knows of the task, the twin starts from the pretrained model; where
    it starts from a distilled student, the twin is of that one's shape, and starts as that one did.
    """
    changes: dict[str, Any] = {"seed": seed}
    if kind == "hard":
        options = dict(entry.options)
        if options.get("init_from") == PRETRAINED and pretrain is not None:
            options = pretrain.student.options | {key: options[key] for key in options.keys() - _STARTS}
        if options.get("init_from") == TEACHER:
            options["init_from"] = BASE
        changes |= {"losses": {"ce": 1.0}, "temperature": "1", "phases": [], "options": options}
        changes["lr"] = entry.all_phases()[-1].lr  # the one at which it learns to answer
        changes["epochs"] = entry.hard_epochs or sum(phase.epochs or 0 for phase in entry.all_phases())
    common = {name: getattr(entry, name) for name in StudentOptions.model_fields}
    return StudentOptions(**(common | changes))


def _started(options: StudentOptions, starts: _Starts) -> StudentOptions:
    """`options` with the folder that `init_from` stands for."""
    start = options.options.get("init_from")
    if start not in (BASE, TEACHER, PRETRAINED):
        return options
    if start == PRETRAINED:
        assert starts.pretrained is not None  # Recipe asks for it
        folder = starts.pretrained.path
    else:
        folder = str(resolve_pretrained(starts.base if start == BASE else starts.teacher.path))
    return options.model_copy(update={"options": options.options | {"init_from": folder}})


def _train(cache: Path, run: Path, options: StudentOptions, *, cpu: bool) -> dict[str, Any]:
    if (run / "run.json").exists():  # a finished student of other inputs: it belongs to this folder, and is cheap
        shutil.rmtree(run)
    try:
        report = train_student(open_cache(cache), out=run, options=options, resume=True, cpu=cpu)
    except ConfigError:
        if not (run / "options.json").exists():
            raise
        shutil.rmtree(run)  # an unfinished student of another configuration
        report = train_student(open_cache(cache), out=run, options=options, cpu=cpu)
    return {"seconds": report.train_seconds, "epochs": report.epochs, "rows": report.rows}


def _go_on(out: Path, train: Callable[..., dict[str, TrainReport]]) -> dict[str, Any]:
    """The same for what trains together in `out`."""
    if (out / TOGETHER).exists():
        shutil.rmtree(out)
    try:
        reports = train(resume=True)
    except ConfigError:
        if not (out / "options.json").exists():
            raise
        shutil.rmtree(out)
        reports = train()
    return {"seconds": max(report.train_seconds for report in reports.values())}


def _evaluate(run: Path, corpora: _Corpora, cache: Path, *, others: Sequence[Path] = ()) -> dict[str, Any]:
    return evaluate(run, corpora.read("test"), cache=open_cache(cache), others=others).to_dict()


def _table(
    name: str, out: Path, results: dict[str, _Found], caches: list[_Made], teacher_seconds: float, skipped: int
) -> RunResult:
    every = [item for found in results.values() for kind in found.values() for item in kind]
    teachers = {student: found["soft"][0]["fidelity"]["teacher_accuracy"] for student, found in results.items()}
    several = len(caches) > 1
    rows = [
        _row(student, found, teacher_accuracy=teachers[student] if several else None)
        for student, found in results.items()
    ]
    return RunResult(
        recipe=name,
        out=str(out),
        rows=rows,
        teacher_accuracy=mean(teachers.values()),
        teacher_macro_f1=mean(found["soft"][0]["fidelity"]["teacher_macro_f1"] for found in results.values()),
        teacher_parameters=every[0]["latency"]["teacher_parameters"],
        teacher_ms=_mean_of_known([item["latency"]["teacher_ms"] for item in every]),
        teacher_seconds=teacher_seconds,
        cache_rows=sum(cache.found["rows"] for cache in caches),
        cache_bytes=sum(cache.found["bytes"] for cache in caches),
        skipped=skipped,
    )


def _row(student: str, found: _Found, *, teacher_accuracy: float | None) -> Row:
    soft = found["soft"]
    others = {
        f"{key}_{kind}": mean(item[key] for item in found[kind]) if found.get(kind) else None
        for key in ("accuracy", "macro_f1")
        for kind in ("hard", "alone")
    }
    return Row(
        student=student,
        seeds=len(soft),
        parameters=soft[0]["parameters"],
        bytes=round(mean(item["bytes"] for item in soft)),
        accuracy_soft=mean(item["accuracy"] for item in soft),
        macro_f1_soft=mean(item["macro_f1"] for item in soft),
        agreement=mean(item["fidelity"]["agreement"] for item in soft),
        ms=mean(item["latency"]["ms"] for item in soft),
        times_faster=_mean_of_known([item["times_faster"] for item in soft]),
        train_seconds=mean(item["train_seconds"] for item in soft),
        teacher_accuracy=teacher_accuracy,
        **others,
    )


def _mean_of_known(figures: list[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return mean(known) if known else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
