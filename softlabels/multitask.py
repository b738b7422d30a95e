"""STAGE 2, of several tasks: one encoder with a head a task, from one cache a task.

In every step a task is drawn ∝ rows^power (0.75 as in BAM, Clark et al. 2019), and the encoder learns from a batch of
its cache by its losses; by default teacher annealing, from the teacher's distribution to the labels, as BAM does. With
cross entropy on soft and hard targets it is MT-DNN with knowledge distillation (Liu et al. 2019). The teachers may
differ, and so may the classes; the tokenizer may not, since one encoder reads for all.

An epoch has as many steps as the tasks' batches together. Which tasks are drawn, and in which order a task's rows come,
follows from the seed alone: a task goes on in a later epoch where it stopped in an earlier one.

Each task is saved as an ordinary run, `out/TASK`, with the whole encoder: it is evaluated and used like any other. The
encoder of the epoch that is best on all tasks together is saved, so that it is the same in all of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedModel

from softlabels.cache import Cache
from softlabels.cache.batches import CacheBatch
from softlabels.cache.loader import CacheLoader, LoadOptions
from softlabels.checkpoint import Progress, best_weights, drop_checkpoint, restore, run_folder, save_checkpoint
from softlabels.config import MultiTaskOptions, StudentOptions
from softlabels.corpus import Corpus
from softlabels.optimizer import ParameterGroup
from softlabels.progress import progress
from softlabels.runs import TOGETHER, save_run, write_together
from softlabels.students import StudentSpec, build_student
from softlabels.training.learner import (
    Learner,
    Stretch,
    find_groups,
    forward,
    is_exhausted,
    make_optimizer,
    put_back,
    refuse_divergence,
    refuse_lost_weights,
    refuse_several,
    set_up,
    start_accelerator,
    steps_an_epoch,
    take_step,
    try_out,
)
from softlabels.training.many_tasks import check_tasks, share_encoder, task_options
from softlabels.training.preparing import find_stretches, student_spec
from softlabels.training.processes import Processes, find_processes
from softlabels.training.records import TrainReport, make_record, make_report, outcome_of
from softlabels.training.validation import note_epoch, validate


def train_multitask(
    caches: Mapping[str, Cache],
    *,
    out: Path,
    options: MultiTaskOptions,
    validation: Mapping[str, Corpus] | None = None,
    resume: bool = False,
    cpu: bool = False,
) -> dict[str, TrainReport]:
    """Train one encoder for the tasks that `caches` names into the run folders `out/TASK`.

    `validation` has a labelled corpus for every task: the mean accuracy picks the best epoch; without it
    `options.validation` of each task's rows is held out, and the mean of their objectives decides. `resume` goes on
    after the last whole epoch, to the same result. ConfigError or CacheError where the tasks do not fit together.
    """
    started = time.monotonic()
    out = Path(out)
    refuse_several(find_processes(cpu=cpu), "a student of several tasks")
    check_tasks(caches, options, validation)
    tasks = _prepare_tasks(caches, options, validation or {})
    with run_folder(out, _configuration(caches, options, validation or {}), resume=resume, receipt=TOGETHER):
        state = _train(tasks, options, out=out, cpu=cpu)
        reports = {name: _save(task, options, state, list(caches), out / name, started) for name, task in tasks.items()}
        write_together(out, list(reports))
        drop_checkpoint(out)
    return reports


@dataclass(frozen=True, slots=True)
class _Task:
    """A task with what it was found to be, and its student, whose encoder is everyone's."""

    name: str
    cache: Cache
    options: StudentOptions  # as if it were trained alone
    stretch: Stretch
    student: PreTrainedModel

    @property
    def rows(self) -> np.ndarray:
        return self.stretch.split.train


def _prepare_tasks(
    caches: Mapping[str, Cache], options: MultiTaskOptions, validation: Mapping[str, Corpus]
) -> dict[str, _Task]:
    """Every task with its student, on two rows of its cache tried out; nothing is trained yet."""
    chosen = {name: task_options(options, name) for name in caches}
    specs = {name: _spec(caches, name, chosen[name]) for name in caches}
    stretches = {
        name: find_stretches(cache, chosen[name], specs[name], validation=validation.get(name))[0]
        for name, cache in caches.items()
    }
    rows = {name: stretch.split.train for name, stretch in stretches.items()}
    used = np.unique(np.concatenate([cache.used_ids(rows[name]) for name, cache in caches.items()]))
    students = {}
    set_seed(options.seed)
    for name, spec in specs.items():
        tokens = replace(
            spec,
            used_ids=used,
            sequences=lambda: chain.from_iterable(cache.sequences(rows[one]) for one, cache in caches.items()),
        )
        students[name] = build_student(options.student, tokens)
    share_encoder(students)
    tasks = {name: _Task(name, cache, chosen[name], stretches[name], students[name]) for name, cache in caches.items()}
    for task in tasks.values():
        try_out(task.student, task.cache, [task.stretch])
    return tasks


def _spec(caches: Mapping[str, Cache], name: str, options: StudentOptions) -> StudentSpec:
    """What the task's cache asks of a student that reads the longest rows and all token types of any, and starts like
    the first one's.
    """
    configs = [cache.teacher_config() for cache in caches.values()]
    longest = max(cache.manifest.dump.max_length for cache in caches.values())
    types = max(config.get("type_vocab_size") or 0 for config in configs)
    config = configs[0] | ({"type_vocab_size": types} if types else {})
    return replace(student_spec(caches[name], options), max_length=longest, teacher_config=config)


# ---------------------------------------------------------------------------------------------------------- drawing


def draw_tasks(sizes: Mapping[str, int], *, power: float, steps: int, seed: int, epoch: int) -> list[str]:
    """The task of each of an epoch's steps, each drawn ∝ size^power by itself, from the seed and the epoch's number."""
    weights = np.array(list(sizes.values()), dtype=np.float64) ** power
    rng = np.random.default_rng([seed, epoch, len(sizes)])
    return [list(sizes)[number] for number in rng.choice(len(sizes), size=steps, p=weights / weights.sum())]


def _batches(task: _Task, *, batch_size: int, seed: int, skip: int, count: int) -> list[np.ndarray]:
    """Row numbers of the task's batches `skip` … `skip + count − 1`, its passes over the rows one after the other."""
    found: list[np.ndarray] = []
    turn, skip = divmod(skip, steps_an_epoch(task.stretch))
    while len(found) < skip + count:
        found += task.cache.loader(task.rows, [], batch_size=batch_size, seed=seed, epoch=turn).batches
        turn += 1
    return found[skip : skip + count]


class _Draws:
    """Which task each step of an epoch is of, and its rows."""

    def __init__(self, tasks: Mapping[str, _Task], options: MultiTaskOptions) -> None:
        self.tasks, self.options = tasks, options
        self.sizes = {name: len(task.rows) for name, task in tasks.items()}
        self.steps = sum(steps_an_epoch(task.stretch) for task in tasks.values())  # of an epoch
        self._counts: dict[int, Counter[str]] = {}

    def of(self, epoch: int) -> list[str]:
        """The task of each step."""
        return draw_tasks(self.sizes, power=self.options.power, steps=self.steps, seed=self.options.seed, epoch=epoch)

    def counts(self, epoch: int) -> Counter[str]:
        """How often each task is drawn; worked out once an epoch."""
        if epoch not in self._counts:
            self._counts[epoch] = Counter(self.of(epoch))
        return self._counts[epoch]

    def loader(self, name: str, epoch: int) -> CacheLoader:
        """The task's batches of the epoch, from where it stopped in the epochs before."""
        before = sum(self.counts(earlier)[name] for earlier in range(epoch))
        task, options = self.tasks[name], self.options
        batches = _batches(
            task, batch_size=options.batch_size, seed=options.seed, skip=before, count=self.counts(epoch)[name]
        )
        return CacheLoader(task.cache, batches, task.stretch.objective.fields, LoadOptions(reuse=True))


# ---------------------------------------------------------------------------------------------------------- the loop


def _train_epoch(
    tasks: Mapping[str, _Task],
    learners: Mapping[str, Learner],
    draws: _Draws,
    options: MultiTaskOptions,
    *,
    state: Progress,
    update,
) -> float:
    """One step for each task that is drawn; the mean loss."""
    body = _body(tasks)
    body.train()
    names, total = draws.of(state.epoch), 0.0
    with ExitStack() as closed:
        batches: dict[str, Iterator[CacheBatch]] = {
            name: closed.enter_context(closing(iter(draws.loader(name, state.epoch)))) for name in set(names)
        }
        for name in names:
            task, learner = tasks[name], learners[name]
            batch = next(batches[name]).to(learner.accelerator.device)
            student_says = forward(learner.run, batch.tokens)
            done = state.step / max(learner.steps - 1, 1)
            loss, _ = learner.objective(student_says, batch.teacher, progress=done)
            take_step(learner, loss, clip=options.clip, phase=task.stretch.phase, state=state)
            learner.accelerator.log({f"train/{name}/loss": loss.item()}, step=state.step)
            state.step += 1
            total += loss.item()
            update(1, loss=loss.item())
    refuse_lost_weights(body, next(iter(tasks.values())).stretch.phase, state)
    return total / len(names)


def _train(tasks: Mapping[str, _Task], options: MultiTaskOptions, *, out: Path, cpu: bool) -> Progress:
    """Epochs with validation, checkpoints and early stopping; afterwards the students are as in the best epoch."""
    body, draws, state = _body(tasks), _Draws(tasks, options), Progress.of(out)
    attention = {name: task.student.config._attn_implementation for name, task in tasks.items()}
    accelerator = start_accelerator(out, cpu=cpu)
    learners = _make_learners(tasks, options, accelerator, find_processes(cpu=cpu), steps=options.epochs * draws.steps)
    restore(out, accelerator, state)
    done = state.epoch * draws.steps
    with progress(options.epochs * draws.steps, description="train all tasks", unit="steps", done=done) as update:
        while state.epoch < options.epochs and not is_exhausted(state, options):
            began = time.monotonic()
            loss = _train_epoch(tasks, learners, draws, options, state=state, update=update)
            each = {name: validate(task.cache, task.stretch, learners[name]) for name, task in tasks.items()}
            note_epoch(state, _mean_scores(each), {"train/loss": loss, **_by_task(each)})
            _refuse_lost(tasks, each, state)
            accelerator.log(_by_task(each), step=state.step)
            state.seconds += time.monotonic() - began
            save_checkpoint(out, body, accelerator, state)
    accelerator.end_training()
    accelerator.free_memory()
    body.load_state_dict(best_weights(out), strict=True)
    for name, task in tasks.items():
        put_back(task.student, attention[name])
    return state


def _make_learners(
    tasks: Mapping[str, _Task], options: MultiTaskOptions, accelerator: Accelerator, processes: Processes, *, steps: int
) -> dict[str, Learner]:
    """A learner a task, all with the one optimiser that moves the encoder, the heads and the projections."""
    body = _body(tasks).to(accelerator.device)
    set_ups, groups = {}, list[ParameterGroup]()
    for name, task in tasks.items():
        probe = task.cache.tokens(task.rows[:2]).to(accelerator.device)
        run, objective = set_up(task.student, task.stretch, task.cache, probe)
        for module in objective.modules():
            module.to(accelerator.device)
        if objective.projections is not None:
            groups += find_groups(task.student, task.stretch.phase, objective)
        set_ups[name] = (run, objective)
    optimizer, schedule = make_optimizer(body, options.all_phases()[0], options, groups, steps=steps)
    _, optimizer, schedule = accelerator.prepare(body, optimizer, schedule)
    for _, objective in set_ups.values():
        for module in objective.modules():
            accelerator.prepare(module)
    return {
        name: Learner(run, objective, accelerator, optimizer, schedule, steps, processes)
        for name, (run, objective) in set_ups.items()
    }


def _body(tasks: Mapping[str, _Task]) -> nn.ModuleList:
    """All students as one module; the encoder is in it once for each, and is one."""
    return nn.ModuleList([task.student for task in tasks.values()])


def _mean_scores(each: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """The mean over the tasks, of what all of them have."""
    keys = set.intersection(*(set(scores) for scores in each.values()))
    return {key: sum(scores[key] for scores in each.values()) / len(each) for key in sorted(keys)}


def _by_task(each: Mapping[str, dict[str, float]]) -> dict[str, float]:
    return {f"{name}/{key}": value for name, scores in each.items() for key, value in scores.items()}


def _refuse_lost(tasks: Mapping[str, _Task], each: Mapping[str, dict[str, float]], state: Progress) -> None:
    for name, scores in each.items():
        loss = torch.tensor(scores.get("loss", 0.0))
        refuse_divergence(loss, f"the validation loss of task '{name}'", tasks[name].stretch.phase, state)


# ---------------------------------------------------------------------------------------------------------- the runs


def _save(
    task: _Task, options: MultiTaskOptions, state: Progress, names: list[str], out: Path, started: float
) -> TrainReport:
    """The run of one task; its validation is its own, not the mean."""
    outcome = outcome_of(task.student, state)
    start = f"{task.name}/"
    own = {key.removeprefix(start): value for key, value in outcome.validation.items() if key.startswith(start)}
    together = {"as": task.name, "with": [name for name in names if name != task.name], "power": options.power}
    record = make_record(task.cache, task.options, [task.stretch], replace(outcome, validation=own), together=together)
    save_run(out, task.student, record, tokenizer=task.cache.tokenizer())
    return make_report(out, record, seconds=time.monotonic() - started)


def _configuration(
    caches: Mapping[str, Cache], options: MultiTaskOptions, validation: Mapping[str, Corpus]
) -> dict[str, Any]:
    """What decides the result: two trainings with the same one may share a folder."""
    return options.model_dump() | {
        "caches": {name: cache.identity() for name, cache in caches.items()},
        "eval": {name: corpus.hash for name, corpus in validation.items()},
    }
