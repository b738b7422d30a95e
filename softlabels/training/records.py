"""What a training gave, and the run.json that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from softlabels.cache import Cache
from softlabels.cache.combined import CombinedCache
from softlabels.checkpoint import Progress
from softlabels.config import StudentOptions, package_versions
from softlabels.runs import Pruned, Run, RunRecord
from softlabels.students.linear import LinearStudent
from softlabels.teaching_rows import labelled_rows
from softlabels.training.learner import Stretch


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training did."""

    run: Path
    rows: int
    labelled: int
    epochs: int
    best_epoch: int | None
    validation: dict[str, float]
    train_seconds: float  # in the training itself, resumed parts included
    seconds: float  # of this call


@dataclass(frozen=True, slots=True)
class Outcome:
    """A trained student, as it was in its best epoch."""

    student: PreTrainedModel | LinearStudent
    epochs: int
    best_epoch: int | None
    validation: dict[str, float]
    history: list[dict[str, float]]
    seconds: float
    pruned: Pruned | None = None


def outcome_of(student: PreTrainedModel, state: Progress, pruned: Pruned | None = None) -> Outcome:
    """The outcome of epochs that went as `state` says; `student` has the weights of the best one."""
    best = next(entry for entry in state.history if entry["epoch"] == state.best_epoch)
    validation = {name: value for name, value in best.items() if name not in ("epoch", "phase", "train/loss")}
    return Outcome(
        student.eval().cpu(), state.epoch, state.best_epoch, validation, state.history, state.seconds, pruned
    )


def make_record(
    cache: Cache,
    options: StudentOptions,
    stretches: Sequence[Stretch],
    outcome: Outcome,
    *,
    together: dict[str, Any] | None = None,
    source: Run | None = None,
) -> RunRecord:
    """run.json of a student that learned from `cache`, `together` with others where that is said."""
    splits, last = [stretch.split for stretch in stretches], stretches[-1]
    return RunRecord(
        student=options.student,
        options=options.options if source is None else source.record.options,
        label_names=cache.label_names,
        task=cache.manifest.teacher.task,
        max_length=cache.manifest.dump.max_length,
        losses={term.name: term.weight.end for term in last.objective.terms},
        temperature=last.phase.temperature,
        phases=[phase.model_dump(exclude_defaults=True) for phase in options.phases],
        seed=options.seed,
        epochs_run=outcome.epochs,
        best_epoch=outcome.best_epoch,
        train_seconds=outcome.seconds,
        train_rows=max(len(split.train) for split in splits),
        labelled_rows=max(int(labelled_rows(cache)[split.train].sum()) for split in splits),
        validation=outcome.validation,
        history=outcome.history,
        cache=_cache_card(cache),
        together=together or {},
        pruned=outcome.pruned,
        versions=package_versions("torch", "transformers", "scikit-learn"),
    )


def make_report(run: Path, record: RunRecord, *, seconds: float) -> TrainReport:
    """What `record` says, with the seconds of this call."""
    return TrainReport(
        run=run,
        rows=record.train_rows,
        labelled=record.labelled_rows,
        epochs=record.epochs_run,
        best_epoch=record.best_epoch,
        validation=record.validation,
        train_seconds=record.train_seconds,
        seconds=seconds,
    )


def _cache_card(cache: Cache) -> dict[str, Any]:
    card = cache.manifest.teacher
    found: dict[str, Any] = {
        "path": cache.shown,
        "teacher": card.name,
        "weights_hash": card.weights_hash,
        "identity": cache.identity(),
    }
    if isinstance(cache, CombinedCache):
        found["combined"] = [asdict(share) for share in cache.combination.shares()]
    return found
