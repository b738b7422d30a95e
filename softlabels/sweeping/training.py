"""One trial: its options come in, a run folder and its figures go out. Whatever runs many of them calls this."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score

from softlabels.cache import Cache, open_cache
from softlabels.cache.combined import open_combined
from softlabels.config import CombineOptions, StudentOptions
from softlabels.corpus import Corpus, encode_labels
from softlabels.errors import SoftlabelsError
from softlabels.once import computing_once
from softlabels.progress import quiet
from softlabels.runs import RECORD, Run, load_run
from softlabels.students import student_inputs
from softlabels.students.linear import LinearStudent
from softlabels.sweeping.outcomes import TRIALS, Outcome, failed
from softlabels.sweeping.space import Trial
from softlabels.train import train_student
from softlabels.training.preparing import find_stretches, read_source, student_spec
from softlabels.training.validation import held_out_batches
from softlabels.types import NO_LABEL

Figures = dict[str, float | int | None]


@dataclass(frozen=True)
class Setting:
    """What all trials of a sweep share; picklable, so that a process or another machine can be given it."""

    out: Path  # of the sweep
    caches: tuple[Path, ...]
    combining: CombineOptions
    validation: Corpus | None = None  # chooses each trial's best epoch, and gives the metric
    test: Corpus | None = None  # scored too, and chooses nothing
    cpu: bool = False


def open_caches(setting: Setting) -> Cache:
    """The cache, or what several say together."""
    if len(setting.caches) == 1:
        return open_cache(setting.caches[0])
    return open_combined(list(setting.caches), setting.combining)


@contextmanager
def trainer(setting: Setting) -> Iterator[Callable[[Trial], Outcome]]:
    """Yields what trains one trial after the other in this process: one reader, one set of word vectors for all.

    What is wrong with a trial (it diverges, its student can't be built) is its outcome, and raises nothing.
    """
    cache = open_caches(setting)
    with computing_once(), quiet():
        yield lambda trial: _try(trial, setting, cache)


def _try(trial: Trial, setting: Setting, cache: Cache) -> Outcome:
    try:
        figures = _train(trial, setting, cache)
    except OSError:  # a full disk is no fault of the trial's, and would fail the others too
        raise
    except Exception as error:  # whatever torch or a library says of one student, the others go on
        told = str(error) if isinstance(error, SoftlabelsError) else f"{type(error).__name__}: {error}"
        return failed(trial, told.strip() or type(error).__name__)
    run = f"{TRIALS}/{trial.name}"
    return Outcome(
        trial.name, trial.point.name, trial.options.seed, trial.point.changes, "done", figures=figures, run=run
    )


def _train(trial: Trial, setting: Setting, cache: Cache) -> Figures:
    started = time.monotonic()
    folder = setting.out / TRIALS / trial.name
    if not (folder / RECORD).exists():  # a kill may have come between its run and its outcome
        train_student(
            cache, out=folder, options=trial.options, validation=setting.validation, resume=True, cpu=setting.cpu
        )
    run = load_run(folder)
    record = run.record
    figures: Figures = {}
    if setting.validation is not None:
        figures |= score(run, setting.validation)
    elif record.task == "sequence-classification" and trial.options.validation:
        figures |= score_held_out(run, cache, trial.options, folder)
    if "loss" in record.validation:
        figures["loss"] = record.validation["loss"]
    if setting.test is not None:
        figures |= {f"test_{name}": value for name, value in score(run, setting.test).items()}
    figures = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
    return figures | {
        "epochs_run": record.epochs_run,
        "best_epoch": record.best_epoch,
        "parameters": run.parameters,
        "bytes": run.size_on_disk,
        "train_seconds": record.train_seconds,
        "seconds": time.monotonic() - started,
    }


def score(run: Run, corpus: Corpus) -> Figures:
    """Accuracy and macro-F1 on the labelled rows of `corpus`, as `softlabels evaluate` gives them."""
    labels = np.array(encode_labels(corpus.examples, run.label_names))
    rows = np.flatnonzero(labels != NO_LABEL)
    said = run.logits([corpus.examples[int(row)] for row in rows]).argmax(axis=1)
    return _quality(labels[rows], said, classes=len(run.label_names))


def _quality(labels: np.ndarray, said: np.ndarray, *, classes: int) -> Figures:
    macro = f1_score(labels, said, labels=list(range(classes)), average="macro", zero_division=0.0)
    return {"accuracy": float(accuracy_score(labels, said)), "macro_f1": float(macro)}


def score_held_out(run: Run, cache: Cache, options: StudentOptions, folder: Path) -> Figures:
    """On the rows that the training held out: agreement with the teacher; quality, on those with a label."""
    source = read_source(options, cache, folder.parent)
    spec = student_spec(cache, options)
    split = find_stretches(cache, options, spec, validation=None, source=source)[-1].split
    if not len(split.held_out):
        return {}
    if isinstance(run.student, LinearStudent):
        texts, rows = cache.texts(), split.held_out
        said = run.student.logits([texts[row][0] for row in rows], pairs=[texts[row][1] for row in rows]).argmax(1)
    else:
        assert isinstance(run.student, torch.nn.Module)
        found = []
        with torch.inference_mode():
            for batch in held_out_batches(cache, split, []):
                logits = run.student(**student_inputs(run.student, batch.tokens)).logits
                found.append((np.array(batch.rows), logits.argmax(-1).numpy()))
        rows, said = (np.concatenate(part) for part in zip(*found, strict=True))
    figures: Figures = {}
    if "logits" in cache.fields:
        figures["agreement"] = float((cache.column("logits")[rows].argmax(1) == said).mean())
    labelled = cache.labels[rows] != NO_LABEL
    if labelled.any():
        figures |= _quality(cache.labels[rows][labelled], said[labelled], classes=len(run.label_names))
    return figures
