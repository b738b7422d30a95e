"""Every stage of a recipe, in order; a stage whose inputs haven't changed is skipped.

corpus → teacher → (augment) → dump → students, each from soft labels and (its twin) from hard labels alone → table.
A recipe that pretrains its students does the first three once more before; of several teachers each has stages of its
own as far as the dump, and their caches are combined. With assistants, each is trained from the cache before it and
dumped as the teacher of the next. Everything lies in one folder:

    teacher/  augmented.jsonl  cache/  cache-test/  students/NAME-soft-seed0/  students/NAME-hard-seed0/
    pretrain/           its own teacher/, cache/ and student/
    teacher-1/          of several teachers the first one's teacher/, cache/ and cache-test/; the others likewise
    assistants/NAME/    the assistant's run, student/, and its cache/; students/NAME-direct-seed0/ did without
    stages/NAME.json    what a stage was given (its fingerprint), what it found and how long it took
    results.json        the table as data
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from softlabels.augment import augment
from softlabels.cache import open_cache
from softlabels.cache.combine import combine
from softlabels.cache.files import lock, write_file
from softlabels.compression import CompressedRow, Distilled, Tools, check_chains, compress, tabulate
from softlabels.config import (
    ASSISTANT,
    BASE,
    JOINT_NAMES,
    PRETRAINED,
    TEACHER,
    AugmentOptions,
    CombineOptions,
    DumpOptions,
    JointOptions,
    StudentOptions,
    fingerprint,
)
from softlabels.corpus import Corpus, check_trainable, encode_labels, read_corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError, CorpusError
from softlabels.evaluate import evaluate, score_teacher
from softlabels.foresight import check_recipe, check_tasks_of_recipe, shape_assistant
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
    on_labels_alone,
    plain_options,
)
from softlabels.runs import RECORD, TOGETHER
from softlabels.stages import Made, Stages
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
    compressed: list[CompressedRow] = field(default_factory=list)  # of the students with `compress`
    # of several teachers the accuracy of each; `teacher_accuracy` is then that of what they say together
    teacher_accuracies: list[float | None] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_recipe(
    recipe: Recipe, *, out: Path, say: Callable[[str], None] = lambda line: None, cpu: bool = False
) -> RunResult:
    """Run `recipe` in the folder `out`. Interrupted, the same call goes on; repeated, it costs a few seconds."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        stages = Stages(out, say)
        corpora = _Corpora(recipe.corpus, recipe.teacher)
        _check(recipe, corpora)
        under = "teacher-1" if recipe.teachers else ""
        corpora_of_first = _own_corpora(recipe, 0, corpora) if recipe.teachers else corpora
        teacher = _teacher(recipe.teacher, stages, corpora_of_first, cpu=cpu, under=under)
        if recipe.augment is not None:
            _augment(recipe.augment, stages, corpora, teacher, cpu=cpu)
        cache = _dump(recipe.dump, stages, "cache", corpora, "transfer", teacher=teacher, cpu=cpu, under=under)
        logits = recipe.dump.model_copy(update={"capture": ["logits"]})
        test = _dump(logits, stages, "cache-test", corpora, "test", teacher=teacher, cpu=cpu, under=under)
        taught_by = [_Taught(teacher, cache, test)]
        if recipe.teachers:
            taught_by += [_others(recipe, n, stages, corpora, cpu=cpu) for n in range(1, len(recipe.teachers))]
            cache, test = _combine(recipe, stages, taught_by)
        starts = _Starts(base=recipe.teacher.model, teacher=teacher)
        if recipe.pretrain is not None:
            starts = replace(starts, pretrained=_pretrain(recipe.pretrain, stages, cpu=cpu))
        hops = _assistants(recipe, stages, corpora, first=cache, test=test, starts=starts, cpu=cpu)
        results: dict[str, _Found] = {f"assistant {hop.name}": {"soft": [hop.evaluated]} for hop in hops}
        if hops:
            starts = replace(starts, assistant=hops[-1].run)
        last, compressed = hops[-1].cache if hops else cache, []
        for entry in recipe.students:
            if entry.joint is not None:
                results |= _pair(entry, stages, corpora, cache=last, test=test, starts=starts, cpu=cpu)
                continue
            found = _student(
                entry,
                stages,
                corpora,
                cache=last,
                direct=cache,
                test=test,
                starts=starts,
                pretrain=recipe.pretrain,
                cpu=cpu,
            )
            results[entry.name] = {kind: found[kind] for kind in ("soft", "hard")}
            if found["direct"]:
                results[f"{entry.name}, from the teacher"] = {"soft": found["direct"], "hard": found["hard"]}
            if entry.compress:
                compressed += tabulate(entry.name, entry.compress, found["soft"], found["compressed"])
        paid_once = teacher.seconds + cache.seconds + (starts.pretrained.seconds if starts.pretrained else 0.0)
        if recipe.teachers:
            paid_once += sum(each.teacher.seconds for each in taught_by[1:]) + sum(e.cache.seconds for e in taught_by)
        paid_once += sum(hop.run.seconds + hop.cache.seconds for hop in hops)
        result = _table(recipe.name, out, results, [cache], paid_once, stages.skipped)
        result = replace(result, compressed=compressed)
        if recipe.teachers:
            result = replace(result, teacher_accuracies=[_accuracy(Path(each.test.path)) for each in taught_by])
        write_file(out / "results.json", json.dumps(result.to_dict(), sort_keys=True, indent=1).encode())
    return result


# the evaluations of a student, one a seed: 'soft', 'hard' (its twin's), 'alone' (of what trained together), 'direct'
# (from the teacher's own cache and not an assistant's), and what 'compressed' ones gave
_Found = dict[str, list[Any]]
Report = TypeVar("Report")


def run_tasks(
    recipe: MultiTaskRecipe, *, out: Path, say: Callable[[str], None] = lambda line: None, cpu: bool = False
) -> RunResult:
    """The same for a recipe of several tasks: teacher and caches of each, then one encoder for all, and each alone.

    The table has a row a task. Everything lies in `out`: task-NAME/ with its teacher and caches, students/seed0/NAME.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        stages = Stages(out, say)
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
    stages: Stages,
    corpora: dict[str, _Corpora],
    *,
    caches: dict[str, Made],
    tests: dict[str, Made],
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
        return _train_together(out, partial(train_multitask, opened, out=out, options=options, cpu=cpu))

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
            alone = f"{name}-alone-seed{seed}"
            run = stages.out / "students" / alone
            made = _trained(f"train-{alone}", run, task_options(options, name), stages, cache=cache, cpu=cpu)
            results[name]["alone"].append(_scored(alone, made, stages, corpora[name], test))


_STARTS = {"init_from", "init_layers", "init_head"}  # options that say what a student starts from


@dataclass(frozen=True, slots=True)
class _Starts:
    """What a student's `init_from` may name."""

    base: str  # a model's name or folder
    teacher: Made
    pretrained: Made | None = None
    assistant: Made | None = None


def _check(recipe: Recipe, corpora: _Corpora) -> None:
    """What can be known to fail is told now, not after the hours that the teacher takes."""
    for entry in recipe.students:
        check_options(_options(entry, "soft", entry.seeds[0], recipe.pretrain))
        check_chains(entry.compress)
    for options in ([recipe.pretrain.student] if recipe.pretrain else []) + recipe.assistants:
        check_options(options)
    check_recipe(recipe)
    _check_corpora(recipe.name, recipe.corpus, recipe.teacher, corpora)
    for number, choice in enumerate(recipe.teachers):
        if choice.train is None or not choice.train.from_scratch:
            resolve_pretrained(choice.model)  # the last of several would else be missed after the others' training
        _check_trainable(choice, _own_corpora(recipe, number, corpora), corpora)


def _check_corpora(name: str, choice: CorpusChoice, teacher: TeacherChoice, corpora: _Corpora) -> None:
    """ConfigError or CorpusError where there is nothing to test on, or a teacher could not be trained."""
    if choice.test is None and choice.test_source is None:
        raise ConfigError(f"recipe {name}: say what to test on: corpus.test (a split) or corpus.test_source (a file)")
    test = corpora.read("test")
    if all(example.label is None for example in test.examples):
        raise CorpusError(f"test corpus {test.source} has no labelled row to score the students on")
    _check_trainable(teacher, corpora, corpora)


def _check_trainable(teacher: TeacherChoice, own: _Corpora, corpora: _Corpora) -> None:
    """CorpusError where a teacher can't be trained on its `own` rows, or knows none of the labels of the others."""
    if teacher.train is not None:
        train = own.read("train")
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


def _teacher(choice: TeacherChoice, stages: Stages, corpora: _Corpora, *, cpu: bool, under: str = "") -> Made:
    """The teacher: as it is, or fine-tuned."""
    if choice.train is None:
        return Made(choice.model, fingerprint([choice.model, _state_of(choice.model)]), 0.0, {})
    key = fingerprint([choice.model_dump(), _state_of(choice.model), corpora.key("train")])
    out = stages.out / under / "teacher"
    options = TeacherOptions(**choice.train.model_dump(exclude={"rows"}), device="cpu" if cpu else None)

    def work() -> dict[str, Any]:
        report = train_teacher(corpora.read("train"), model=choice.model, out=out, options=options)
        return {"seconds": report.seconds}

    found = stages.run(_stage(under, "teacher"), key, work, makes=out / "config.json")
    return Made(str(out), key, found["seconds"], found)


def _dump(
    options: DumpOptions,
    stages: Stages,
    name: str,
    corpora: _Corpora,
    use: str,
    *,
    teacher: Made,
    cpu: bool,
    under: str = "",
) -> Made:
    out = stages.out / under / name
    key = fingerprint([teacher.key, corpora.key(use), options.model_dump()])

    def work() -> dict[str, Any]:
        report = dump(corpora.read(use), teacher=teacher.path, out=out, options=options, device="cpu" if cpu else None)
        return {"rows": report.rows, "bytes": report.bytes, "truncated": report.truncated}

    found = stages.run(_stage(under, name), key, work, makes=out / "manifest.json")
    return Made(str(out), key, found["seconds"], found)


@dataclass(frozen=True, slots=True)
class _Taught:
    """One of several teachers, and what it said."""

    teacher: Made
    cache: Made
    test: Made


def _own_corpora(recipe: Recipe, number: int, corpora: _Corpora) -> _Corpora:
    """What one of several teachers is trained on: of the recipe's corpus its own rows, or a corpus of its own."""
    choice = recipe.teachers[number]
    if choice.corpus is None and choice.train == recipe.teacher.train:
        return corpora
    return _Corpora(choice.corpus or recipe.corpus, choice)


def _others(recipe: Recipe, number: int, stages: Stages, corpora: _Corpora, *, cpu: bool) -> _Taught:
    """Of several teachers one that is not the first: it says of the same rows what it thinks."""
    entry, under = recipe.teachers[number], f"teacher-{number + 1}"
    choice = TeacherChoice(model=entry.model, train=entry.train)  # a teacher of another weight is the same one
    teacher = _teacher(choice, stages, _own_corpora(recipe, number, corpora), cpu=cpu, under=under)
    dumped = partial(_dump, recipe.dump, stages, teacher=teacher, cpu=cpu, under=under)
    return _Taught(teacher, dumped("cache", corpora, "transfer"), dumped("cache-test", corpora, "test"))


def _combine(recipe: Recipe, stages: Stages, taught_by: list[_Taught]) -> tuple[Made, Made]:
    """The caches of what all teachers say together: of the transfer rows, and of the test's."""
    options = recipe.combine_options()

    def combined(name: str, parts: list[Made], options: CombineOptions) -> Made:
        out, key = stages.out / name, fingerprint([options.model_dump(), *(part.key for part in parts)])

        def work() -> dict[str, Any]:
            shutil.rmtree(out, ignore_errors=True)  # of other inputs: it is made again in a moment
            report = combine([part.path for part in parts], out=out, options=options)
            return {"rows": report.rows, "bytes": report.bytes}

        found = stages.run(name, key, work, makes=out / "manifest.json")
        return Made(str(out), key, found["seconds"], found)

    blind = options  # a teacher that is chosen by the label of a test row would have looked at the answer
    if options.choose == "label":
        blind = options.model_copy(update={"choose": None})
    return (
        combined("cache", [each.cache for each in taught_by], options),
        combined("cache-test", [each.test for each in taught_by], blind),
    )


def _accuracy(cache: Path) -> float | None:
    scores = score_teacher(open_cache(cache))
    return None if scores is None else scores["accuracy"]


def _augment(options: AugmentOptions, stages: Stages, corpora: _Corpora, teacher: Made, *, cpu: bool) -> None:
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
    return f"{under}-{name}".replace("/", "-") if under else name


def _pretrain(recipe: Pretraining, stages: Stages, *, cpu: bool) -> Made:
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
    made = _trained(_stage(under, "student"), run, options, stages, cache=cache, cpu=cpu)
    return replace(made, seconds=teacher.seconds + cache.seconds + made.seconds)


@dataclass(frozen=True, slots=True)
class _Hop:
    """An assistant: its run, the cache that it was dumped to, and how it did itself."""

    name: str
    run: Made
    cache: Made
    evaluated: dict[str, Any]


def _assistants(
    recipe: Recipe, stages: Stages, corpora: _Corpora, *, first: Made, test: Made, starts: _Starts, cpu: bool
) -> list[_Hop]:
    """From the teacher down, each trained from the cache of the one before and dumped to one of its own."""
    hops: list[_Hop] = []
    cache = first
    for assistant in recipe.assistants:
        shaped = shape_assistant(assistant, recipe, open_cache(Path(cache.path)).teacher_config())
        options = _started(plain_options(assistant, {"options": shaped}), starts)
        under = f"assistants/{assistant.name}"
        run = stages.out / under / "student"
        name = f"assistant-{assistant.name}"
        made = _trained(name, run, options, stages, cache=cache, cpu=cpu)
        evaluated = _scored(name, made, stages, corpora, test)
        dumped = assistant.dump or recipe.dump
        cache = _dump(dumped, stages, "cache", corpora, "transfer", teacher=made, cpu=cpu, under=under)
        hops.append(_Hop(assistant.name, made, cache, evaluated))
        starts = replace(starts, assistant=made)
    return hops


def _student(
    entry: StudentEntry,
    stages: Stages,
    corpora: _Corpora,
    *,
    cache: Made,
    direct: Made,
    test: Made,
    starts: _Starts,
    pretrain: Pretraining | None,
    cpu: bool,
) -> _Found:
    """The evaluations of a student, of its twins, and of what `compress` makes of it, one a seed each.

    'hard' learned from labels alone, 'direct' from the teacher's own cache and not from that of an assistant.
    """
    found: _Found = {"soft": [], "hard": [], "direct": [], "compressed": []}
    tools = Tools(
        stages.run,
        train=partial(train_run, Path(cache.path), cpu=cpu),
        evaluate=lambda run: _evaluate(run, corpora, Path(test.path)),
        cache=Path(cache.path),
        test_key=test.key,
    )
    wanted = {"soft": True, "hard": entry.hard_twin, "direct": entry.direct_twin}
    for kind in (kind for kind, asked in wanted.items() if asked):
        source = direct if kind == "direct" else cache
        for seed in entry.seeds:
            options = _started(_options(entry, kind, seed, pretrain), starts)
            name = f"{entry.name}-{kind}-seed{seed}"
            run = stages.out / "students" / name
            started = _pretrained_key(starts) if kind != "hard" else None
            made = _trained(f"train-{name}", run, options, stages, cache=source, started=started, cpu=cpu)
            found[kind].append(_scored(name, made, stages, corpora, test))
            if kind == "soft" and entry.compress:
                found["compressed"].append(compress(Distilled(run, made.key, options), entry.compress, tools))
    return found


def _trained(
    stage: str,
    run: Path,
    options: StudentOptions,
    stages: Stages,
    *,
    cache: Made,
    started: str | None = None,
    cpu: bool,
) -> Made:
    """A student in the folder `run`; `started` is the fingerprint of the distilled one that it starts from, if any."""
    key = fingerprint([options.model_dump(), cache.key, *([started] if started else [])])
    work = partial(train_run, Path(cache.path), run, options, cpu=cpu)
    found = stages.run(stage, key, work, makes=run / RECORD)
    return Made(str(run), key, found["seconds"], found)


def _scored(name: str, made: Made, stages: Stages, corpora: _Corpora, test: Made) -> dict[str, Any]:
    """The evaluation of a student, with the seconds that its training took."""
    work = partial(_evaluate, Path(made.path), corpora, Path(test.path))
    return stages.run(f"evaluate-{name}", [made.key, test.key], work) | {"train_seconds": made.seconds}


def _pair(
    entry: StudentEntry, stages: Stages, corpora: _Corpora, *, cache: Made, test: Made, starts: _Starts, cpu: bool
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
            return _train_together(out, partial(train_joint, open_cache(cache.path), out=out, options=chosen, cpu=cpu))

        trained = stages.run(f"train-{name}", key, train, makes=out / TOGETHER)
        runs = {student: out / student for student in JOINT_NAMES}
        found = _alone_and_averaged(name, runs, [key, test.key], stages, corpora, test)
        for student, evaluated in found.items():
            rows[student]["soft"].append(evaluated | {"train_seconds": trained["seconds"]})
        if entry.joint.alone:
            runs = {student: stages.out / "students" / f"{entry.name}-{student}-seed{seed}" for student in JOINT_NAMES}
            keys = []
            for student, run in runs.items():
                options, started = alone_options(chosen, student), _pretrained_key(starts)
                made = _trained(f"train-{run.name}", run, options, stages, cache=cache, started=started, cpu=cpu)
                keys.append(made.key)
            found = _alone_and_averaged(f"{entry.name}-seed{seed}", runs, [*keys, test.key], stages, corpora, test)
            for student, evaluated in found.items():
                rows[student]["alone"].append(evaluated)
    return {f"{entry.name}/{student}": found for student, found in rows.items()}


def _alone_and_averaged(
    name: str, runs: dict[str, Path], inputs: Any, stages: Stages, corpora: _Corpora, test: Made
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
        if options.get("init_from") in (TEACHER, ASSISTANT):
            options["init_from"] = BASE
        changes |= on_labels_alone(entry, entry.hard_epochs) | {"options": options}
    return plain_options(entry, changes)


def _started(options: StudentOptions, starts: _Starts) -> StudentOptions:
    """`options` with the folder that `init_from` stands for."""
    start = options.options.get("init_from")
    if start not in (BASE, TEACHER, PRETRAINED, ASSISTANT):
        return options
    if start in (PRETRAINED, ASSISTANT):
        made = starts.pretrained if start == PRETRAINED else starts.assistant
        assert made is not None  # Recipe asks for it
        folder = made.path
    else:
        folder = str(resolve_pretrained(starts.base if start == BASE else starts.teacher.path))
    return options.model_copy(update={"options": options.options | {"init_from": folder}})


def train_run(cache: Path, run: Path, options: StudentOptions, *, cpu: bool) -> dict[str, Any]:
    """Train one student into the folder `run`, as a stage; see `_in_folder` for what is there already."""
    report = _in_folder(run, RECORD, partial(train_student, open_cache(cache), out=run, options=options, cpu=cpu))
    return {"seconds": report.train_seconds, "epochs": report.epochs, "rows": report.rows}


def _train_together(out: Path, train: Callable[..., dict[str, TrainReport]]) -> dict[str, Any]:
    """The same for what trains together in `out`."""
    reports = _in_folder(out, TOGETHER, train)
    return {"seconds": max(report.train_seconds for report in reports.values())}


def _in_folder(out: Path, receipt: str, train: Callable[..., Report]) -> Report:
    """`train` in the folder `out`, which belongs to it: an unfinished training of the same configuration goes on.

    What is finished (it has the `receipt`), or of another configuration, makes room: it is of other inputs, and cheap.
    """
    if (out / receipt).exists():
        shutil.rmtree(out)
    try:
        return train(resume=True)
    except ConfigError:
        if not (out / "options.json").exists():
            raise
        shutil.rmtree(out)
        return train()


def _evaluate(run: Path, corpora: _Corpora, cache: Path, *, others: Sequence[Path] = ()) -> dict[str, Any]:
    return evaluate(run, corpora.read("test"), cache=open_cache(cache), others=others).to_dict()


def _table(
    name: str, out: Path, results: dict[str, _Found], caches: list[Made], teacher_seconds: float, skipped: int
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
