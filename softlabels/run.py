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

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from softlabels.cache import open_cache
from softlabels.cache.files import lock
from softlabels.compression import Distilled, Tools, check_chains, compress, tabulate
from softlabels.config import BASE, JOINT_NAMES, JointOptions, fingerprint
from softlabels.foresight import check_recipe, check_tasks_of_recipe, shape_assistant
from softlabels.joint import train_joint
from softlabels.multitask import train_multitask
from softlabels.pretrained import resolve_pretrained
from softlabels.recipes import MultiTaskRecipe, Pretraining, Recipe, StudentEntry, alone_options, plain_options
from softlabels.running.corpora import Corpora, check_teacher_rows, check_test
from softlabels.running.students import (
    Starts,
    evaluate_run,
    options_of,
    pretrained_key,
    score_stage,
    start_from,
    train_run,
    train_stage,
    train_together,
)
from softlabels.running.table import Found, RunResult, make_table
from softlabels.running.teaching import (
    Taught,
    accuracy_of,
    augment_corpus,
    combine_caches,
    make_cache,
    make_teacher,
    other_teacher,
    own_corpora,
    stage_name,
)
from softlabels.runs import TOGETHER
from softlabels.stages import Made, Stages
from softlabels.teacher import teacher_task
from softlabels.training.many_tasks import task_options
from softlabels.training.preparing import check_options


def run_recipe(
    recipe: Recipe, *, out: Path, say: Callable[[str], None] = lambda line: None, cpu: bool = False
) -> RunResult:
    """Run `recipe` in the folder `out`. Interrupted, the same call goes on; repeated, it costs a few seconds."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        stages = Stages(out, say)
        corpora = Corpora(recipe.corpus, recipe.teacher)
        _check(recipe, corpora)
        under = "teacher-1" if recipe.teachers else ""
        corpora_of_first = own_corpora(recipe, 0, corpora) if recipe.teachers else corpora
        teacher = make_teacher(recipe.teacher, stages, corpora_of_first, cpu=cpu, under=under)
        if recipe.augment is not None:
            augment_corpus(recipe.augment, stages, corpora, teacher, cpu=cpu)
        cache = make_cache(recipe.dump, stages, "cache", corpora, "transfer", teacher=teacher, cpu=cpu, under=under)
        logits = recipe.dump.model_copy(update={"capture": ["logits"]})
        test = make_cache(logits, stages, "cache-test", corpora, "test", teacher=teacher, cpu=cpu, under=under)
        taught_by = [Taught(teacher, cache, test)]
        if recipe.teachers:
            taught_by += [other_teacher(recipe, n, stages, corpora, cpu=cpu) for n in range(1, len(recipe.teachers))]
            cache, test = combine_caches(recipe, stages, taught_by)
        starts = Starts(base=recipe.teacher.model, teacher=teacher)
        if recipe.pretrain is not None:
            starts = replace(starts, pretrained=_pretrain(recipe.pretrain, stages, cpu=cpu))
        hops = _assistants(recipe, stages, corpora, first=cache, test=test, starts=starts, cpu=cpu)
        results: dict[str, Found] = {f"assistant {hop.name}": {"soft": [hop.evaluated]} for hop in hops}
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
        result = make_table(recipe.name, out, results, [cache], paid_once, stages.skipped)
        result = replace(result, compressed=compressed)
        if recipe.teachers:
            result = replace(result, teacher_accuracies=[accuracy_of(Path(each.test.path)) for each in taught_by])
        stages.finish(result.to_dict())
    return result


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
        corpora = {task.name: Corpora(task.corpus, task.teacher) for task in recipe.tasks}
        for task in recipe.tasks:
            check_options(task_options(recipe.student, task.name))
            check_test(f"{recipe.name}, task {task.name}", task.corpus, corpora[task.name])
            check_teacher_rows(task.teacher, corpora[task.name], corpora[task.name])
        check_tasks_of_recipe(recipe)
        caches, tests, paid_once = {}, {}, 0.0
        for task in recipe.tasks:
            read, under = corpora[task.name], f"task-{task.name}"
            teacher = make_teacher(task.teacher, stages, read, cpu=cpu, under=under)
            logits = task.dump.model_copy(update={"capture": ["logits"]})
            common: dict[str, Any] = {"teacher": teacher, "cpu": cpu, "under": under}
            caches[task.name] = make_cache(task.dump, stages, "cache", read, "transfer", **common)
            tests[task.name] = make_cache(logits, stages, "cache-test", read, "test", **common)
            paid_once += teacher.seconds + caches[task.name].seconds
        results: dict[str, Found] = {task.name: {"soft": [], "alone": []} for task in recipe.tasks}
        for seed in recipe.seeds:
            _together(recipe, seed, stages, corpora, caches=caches, tests=tests, results=results, cpu=cpu)
        result = make_table(recipe.name, out, results, list(caches.values()), paid_once, stages.skipped)
        stages.finish(result.to_dict())
    return result


def _together(
    recipe: MultiTaskRecipe,
    seed: int,
    stages: Stages,
    corpora: dict[str, Corpora],
    *,
    caches: dict[str, Made],
    tests: dict[str, Made],
    results: dict[str, Found],
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
        return train_together(out, partial(train_multitask, opened, out=out, options=options, cpu=cpu))

    trained = stages.run(f"train-seed{seed}", key, train, makes=out / TOGETHER)
    for task in recipe.tasks:
        name, cache, test = task.name, caches[task.name], tests[task.name]
        found = stages.run(
            f"evaluate-{name}-seed{seed}",
            [key, test.key],
            partial(evaluate_run, out / name, corpora[name], Path(test.path)),
        )
        results[name]["soft"].append(found | {"train_seconds": trained["seconds"]})
        if recipe.alone:
            alone = f"{name}-alone-seed{seed}"
            run = stages.out / "students" / alone
            made = train_stage(f"train-{alone}", run, task_options(options, name), stages, cache=cache, cpu=cpu)
            results[name]["alone"].append(score_stage(alone, made, stages, corpora[name], test))


def _check(recipe: Recipe, corpora: Corpora) -> None:
    """What can be known to fail is told now, not after the hours that the teacher takes."""
    for entry in recipe.students:
        check_options(options_of(entry, "soft", entry.seeds[0], recipe.pretrain))
        check_chains(entry.compress)
    for options in ([recipe.pretrain.student] if recipe.pretrain else []) + recipe.assistants:
        check_options(options)
    check_recipe(recipe)
    check_test(recipe.name, recipe.corpus, corpora)
    if not recipe.teachers:
        check_teacher_rows(recipe.teacher, corpora, corpora)
    for number, choice in enumerate(recipe.teachers):
        if choice.train is None or not choice.train.from_scratch:
            resolve_pretrained(choice.model)  # the last of several would else be missed after the others' training
        check_teacher_rows(choice, own_corpora(recipe, number, corpora), corpora)


def _pretrain(recipe: Pretraining, stages: Stages, *, cpu: bool) -> Made:
    """The student of an earlier distillation; its seconds are those of everything that it took."""
    under = "pretrain"
    tuning = recipe.teacher.train
    task = tuning.task if tuning is not None else teacher_task(recipe.teacher.model, recipe.dump.task)
    corpora = Corpora(recipe.corpus, recipe.teacher, task)
    teacher = make_teacher(recipe.teacher, stages, corpora, cpu=cpu, under=under)
    cache = make_cache(recipe.dump, stages, "cache", corpora, "transfer", teacher=teacher, cpu=cpu, under=under)
    starts = Starts(base=recipe.teacher.model, teacher=teacher)
    options = start_from(recipe.student, starts)
    run = stages.out / under / "student"
    made = train_stage(stage_name(under, "student"), run, options, stages, cache=cache, cpu=cpu)
    return replace(made, seconds=teacher.seconds + cache.seconds + made.seconds)


@dataclass(frozen=True, slots=True)
class _Hop:
    """An assistant: its run, the cache that it was dumped to, and how it did itself."""

    name: str
    run: Made
    cache: Made
    evaluated: dict[str, Any]


def _assistants(
    recipe: Recipe, stages: Stages, corpora: Corpora, *, first: Made, test: Made, starts: Starts, cpu: bool
) -> list[_Hop]:
    """From the teacher down, each trained from the cache of the one before and dumped to one of its own."""
    hops: list[_Hop] = []
    cache = first
    for assistant in recipe.assistants:
        shaped = shape_assistant(assistant, recipe, open_cache(Path(cache.path)).teacher_config())
        options = start_from(plain_options(assistant, {"options": shaped}), starts)
        under = f"assistants/{assistant.name}"
        run = stages.out / under / "student"
        name = f"assistant-{assistant.name}"
        made = train_stage(name, run, options, stages, cache=cache, cpu=cpu)
        evaluated = score_stage(name, made, stages, corpora, test)
        dumped = assistant.dump or recipe.dump
        cache = make_cache(dumped, stages, "cache", corpora, "transfer", teacher=made, cpu=cpu, under=under)
        hops.append(_Hop(assistant.name, made, cache, evaluated))
        starts = replace(starts, assistant=made)
    return hops


def _student(
    entry: StudentEntry,
    stages: Stages,
    corpora: Corpora,
    *,
    cache: Made,
    direct: Made,
    test: Made,
    starts: Starts,
    pretrain: Pretraining | None,
    cpu: bool,
) -> Found:
    """The evaluations of a student, of its twins, and of what `compress` makes of it, one a seed each.

    'hard' learned from labels alone, 'direct' from the teacher's own cache and not from that of an assistant.
    """
    found: Found = {"soft": [], "hard": [], "direct": [], "compressed": []}
    tools = Tools(
        stages.run,
        train=partial(train_run, Path(cache.path), cpu=cpu),
        evaluate=lambda run: evaluate_run(run, corpora, Path(test.path)),
        cache=Path(cache.path),
        test_key=test.key,
    )
    wanted = {"soft": True, "hard": entry.hard_twin, "direct": entry.direct_twin}
    for kind in (kind for kind, asked in wanted.items() if asked):
        source = direct if kind == "direct" else cache
        for seed in entry.seeds:
            options = start_from(options_of(entry, kind, seed, pretrain), starts)
            name = f"{entry.name}-{kind}-seed{seed}"
            run = stages.out / "students" / name
            started = pretrained_key(starts) if kind != "hard" else None
            made = train_stage(f"train-{name}", run, options, stages, cache=source, started=started, cpu=cpu)
            found[kind].append(score_stage(name, made, stages, corpora, test))
            if kind == "soft" and entry.compress:
                found["compressed"].append(compress(Distilled(run, made.key, options), entry.compress, tools))
    return found


def _pair(
    entry: StudentEntry, stages: Stages, corpora: Corpora, *, cache: Made, test: Made, starts: Starts, cpu: bool
) -> dict[str, Found]:
    """The evaluations of two students that train together, of their average, and of each by itself and these averaged.

    One row of the table each: NAME/global, NAME/local, NAME/average.
    """
    assert entry.joint is not None
    rows: dict[str, Found] = {name: {"soft": [], "alone": []} for name in (*JOINT_NAMES, "average")}
    for seed in entry.seeds:
        chosen = entry.joint_options(seed=seed)
        students = {name: start_from(options, starts) for name, options in chosen.students.items()}
        chosen = chosen.model_copy(update={"students": students})
        name = f"{entry.name}-joint-seed{seed}"
        out, key = (
            stages.out / "students" / name,
            fingerprint([chosen.model_dump(), cache.key, pretrained_key(starts)]),
        )

        def train(out: Path = out, chosen: JointOptions = chosen) -> dict[str, Any]:
            return train_together(out, partial(train_joint, open_cache(cache.path), out=out, options=chosen, cpu=cpu))

        trained = stages.run(f"train-{name}", key, train, makes=out / TOGETHER)
        runs = {student: out / student for student in JOINT_NAMES}
        found = _alone_and_averaged(name, runs, [key, test.key], stages, corpora, test)
        for student, evaluated in found.items():
            rows[student]["soft"].append(evaluated | {"train_seconds": trained["seconds"]})
        if entry.joint.alone:
            runs = {student: stages.out / "students" / f"{entry.name}-{student}-seed{seed}" for student in JOINT_NAMES}
            keys = []
            for student, run in runs.items():
                options, started = alone_options(chosen, student), pretrained_key(starts)
                made = train_stage(f"train-{run.name}", run, options, stages, cache=cache, started=started, cpu=cpu)
                keys.append(made.key)
            found = _alone_and_averaged(f"{entry.name}-seed{seed}", runs, [*keys, test.key], stages, corpora, test)
            for student, evaluated in found.items():
                rows[student]["alone"].append(evaluated)
    return {f"{entry.name}/{student}": found for student, found in rows.items()}


def _alone_and_averaged(
    name: str, runs: dict[str, Path], inputs: Any, stages: Stages, corpora: Corpora, test: Made
) -> dict[str, dict[str, Any]]:
    """The evaluations of each of `runs` and, as 'average', of all together."""
    found = {}
    for student in (*runs, "average"):
        one, *others = list(runs.values()) if student == "average" else [runs[student]]
        work = partial(evaluate_run, one, corpora, Path(test.path), others=others)
        found[student] = stages.run(f"evaluate-{name}-{student}", inputs, work)
    return found
