"""The stages of a recipe's students: what they start from, their training, their scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from softlabels.cache import open_cache
from softlabels.config import ASSISTANT, BASE, PRETRAINED, TEACHER, StudentOptions, fingerprint
from softlabels.errors import ConfigError
from softlabels.evaluate import evaluate
from softlabels.pretrained import resolve_pretrained
from softlabels.recipes import Pretraining, StudentEntry, on_labels_alone, plain_options
from softlabels.running.corpora import Corpora
from softlabels.runs import RECORD, TOGETHER
from softlabels.stages import Made, Stages
from softlabels.train import train_student
from softlabels.training.records import TrainReport


@dataclass(frozen=True, slots=True)
class Starts:
    """What a student's `init_from` may name."""

    base: str  # a model's name or folder
    teacher: Made
    pretrained: Made | None = None
    assistant: Made | None = None


_Report = TypeVar("_Report")
_STARTS = {"init_from", "init_layers", "init_head"}  # options that say what a student starts from


def options_of(entry: StudentEntry, kind: str, seed: int, pretrain: Pretraining | None) -> StudentOptions:
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


def start_from(options: StudentOptions, starts: Starts) -> StudentOptions:
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


def pretrained_key(starts: Starts) -> str | None:
    """The fingerprint of the distilled student that students may start from, if there is one."""
    return starts.pretrained.key if starts.pretrained else None


def train_stage(
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


def score_stage(name: str, made: Made, stages: Stages, corpora: Corpora, test: Made) -> dict[str, Any]:
    """The evaluation of a student, with the seconds that its training took."""
    work = partial(evaluate_run, Path(made.path), corpora, Path(test.path))
    return stages.run(f"evaluate-{name}", [made.key, test.key], work) | {"train_seconds": made.seconds}


def train_run(cache: Path, run: Path, options: StudentOptions, *, cpu: bool) -> dict[str, Any]:
    """Train one student into the folder `run`, as a stage; see `_in_folder` for what is there already."""
    report = _in_folder(run, RECORD, partial(train_student, open_cache(cache), out=run, options=options, cpu=cpu))
    return {"seconds": report.train_seconds, "epochs": report.epochs, "rows": report.rows}


def train_together(out: Path, train: Callable[..., dict[str, TrainReport]]) -> dict[str, Any]:
    """The same for what trains together in `out`."""
    reports = _in_folder(out, TOGETHER, train)
    return {"seconds": max(report.train_seconds for report in reports.values())}


def _in_folder(out: Path, receipt: str, train: Callable[..., _Report]) -> _Report:
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


def evaluate_run(run: Path, corpora: Corpora, cache: Path, *, others: Sequence[Path] = ()) -> dict[str, Any]:
    """The scores on the test corpus, whose cache is `cache`, of `run`, or of the average of it and `others`."""
    return evaluate(run, corpora.read("test"), cache=open_cache(cache), others=others).to_dict()
