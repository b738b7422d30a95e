"""A run and a labelled corpus come in; quality, fidelity to the teacher, size and latency go out.

The teacher's side comes from a cache of the same corpus: the teacher itself is not needed. What was found stays in the
run's folder (see `softlabels.evaluations`), where `report` and tests against other runs read it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from softlabels.averages import Average, average_runs, mean_logits
from softlabels.cache import Cache
from softlabels.config import EvaluateOptions, package_versions
from softlabels.corpus import Corpus, encode_labels
from softlabels.errors import CacheError, CorpusError, StudentError
from softlabels.evaluations import (
    FOLDER,
    KeptEvaluation,
    KeptRows,
    TeacherCard,
    evaluation_name,
    is_current,
    keep_evaluation,
    kept_names,
    read_card,
    read_kept,
    run_fingerprint,
)
from softlabels.runs import Run, load_run, read_record
from softlabels.scoring.calibration import calibrate
from softlabels.scoring.figures import Evaluation, PairedTest
from softlabels.scoring.latency import measure_latency
from softlabels.scoring.mcnemar import mcnemar
from softlabels.scoring.sides import (
    Sides,
    against_teacher,
    calibrate_teacher,
    fidelity_of,
    intervals_of,
    macro_f1,
    slices_of,
)
from softlabels.tokens import token_hash, tokenize
from softlabels.types import NO_LABEL

_FIGURES = ("precision", "recall", "f1-score", "support")


def evaluate(
    run: Path,
    corpus: Corpus,
    *,
    cache: Cache | None = None,
    others: Sequence[Path] = (),
    against: Sequence[Path] = (),
    options: EvaluateOptions | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> Evaluation:
    """Score the student in `run` on the labelled rows of `corpus`; with a `cache` of it, against its teacher too.

    With `others`, runs of the same classes, what is scored is the mean of the probabilities of all, and `alone` tells
    each one's accuracy; nothing is kept of it then, since no one run's folder is its place. McNemar's test is against
    each run of `against`. `say` is told where the run's folder can't be written to.
    """
    options = options or EvaluateOptions()
    paths = [run, *others]
    members = [load_run(path) for path in paths]
    student = average_runs(members) if others else members[0]
    labels = np.array(encode_labels(corpus.examples, student.label_names))
    rows = np.flatnonzero(labels != NO_LABEL)
    if not len(rows):
        raise CorpusError(f"corpus {corpus.source} has no labelled row to score against: give one with labels")
    each = [member.logits(corpus.examples) for member in members]
    logits = mean_logits(each) if others else each[0]  # (N, C)
    if not np.isfinite(logits).all():
        raise StudentError(
            f"the student in {run} gives numbers that are not finite: its training went wrong; train it again"
        )
    lengths, unit = _lengths(members[0], corpus, cache)
    teacher = None if cache is None else _teacher_logits(student, corpus, cache)
    sides = Sides(student.label_names, labels, lengths, unit, logits, teacher)
    right = logits[rows].argmax(axis=1) == labels[rows]
    averages = _averages(labels[rows], logits[rows].argmax(axis=1), len(sides.names))
    found = Evaluation(
        run=" + ".join(str(path) for path in paths),
        corpus=corpus.source if corpus.split is None else f"{corpus.source}:{corpus.split}",
        rows=len(rows),
        accuracy=float(right.mean()),
        macro_f1=averages["macro avg"]["f1-score"],
        classes=_class_scores(labels[rows], logits[rows].argmax(axis=1), sides.names),
        averages=averages,
        fidelity=fidelity_of(sides),
        parameters=student.parameters,
        nonzero=student.nonzero,
        bytes=student.size_on_disk,
        latency=measure_latency(student, [corpus.examples[int(row)] for row in rows], cache),
        alone={
            str(path): float(accuracy_score(labels[rows], own[rows].argmax(axis=1)))
            for path, own in zip(paths, each, strict=True)
            if others
        },
        calibration=calibrate(logits[rows], labels[rows], bins=options.bins),
        teacher_calibration=calibrate_teacher(sides, options),
        intervals=intervals_of(sides, options),
        tests=[*against_teacher(sides), *(_against_run(sides, path, corpus) for path in against)],
        slices=slices_of(sides),
    )
    if not options.keep or others:
        return found
    return _keep(run, members[0], corpus, cache, found, sides, texts=options.texts, say=say)


def _class_scores(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """scikit-learn's figures of every class the model knows, those without a row included (support 0)."""
    columns = precision_recall_fscore_support(labels, predicted, labels=range(len(names)), zero_division=0.0)
    rows = np.stack(columns, axis=1).astype(float).tolist()  # (C, 4)
    return {name: dict(zip(_FIGURES, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def _averages(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, dict[str, float]]:
    """The same over all classes: each counting as much ('macro avg'), or as often as it occurs ('weighted avg')."""
    found = {}
    for average in ("macro", "weighted"):
        figures = precision_recall_fscore_support(
            labels, predicted, labels=range(classes), average=average, zero_division=0.0
        )
        values = [float(figure) for figure in figures[:3]]
        found[f"{average} avg"] = dict(zip(_FIGURES, [*values, float(len(labels))], strict=True))
    return found


# --------------------------------------------------------------------------------------------------------- fidelity


def _teacher_logits(student: Run | Average, corpus: Corpus, cache: Cache) -> np.ndarray:
    """(N, C) float32: what the teacher says of the corpus's rows; NaN of those that the cache does not have."""
    cache.require(["logits"], why="fidelity")
    if cache.label_names != student.label_names:
        raise CacheError(
            f"cache {cache.shown} has the classes {cache.label_names}, the student {student.label_names}: "
            f"give a cache of the student's own teacher"
        )
    shared, theirs = _join(corpus, cache)
    logits = np.full((len(corpus.examples), len(student.label_names)), np.nan, dtype=np.float32)
    logits[shared] = cache.column("logits")[theirs]
    return logits


def score_teacher(cache: Cache) -> dict[str, float] | None:
    """Accuracy and macro-F1 of a cache's logits on its labelled rows; None where no row has a label."""
    rows = cache.labels != NO_LABEL
    if not rows.any():
        return None
    truth, said = cache.labels[rows], cache.column("logits")[rows].argmax(axis=1)
    return {"accuracy": float(accuracy_score(truth, said)), "macro_f1": macro_f1(truth, said, cache.label_names)}


def _join(corpus: Corpus, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """Rows of corpus and cache that are the same example: same id and same tokens."""
    tokens = tokenize(cache.tokenizer(), corpus.examples, max_length=cache.manifest.dump.max_length).examples
    rows = {
        (name, number): row
        for row, (name, number) in enumerate(zip(cache.ids, cache.token_hashes.tolist(), strict=True))
    }
    pairs = [(i, rows[key]) for i, example in enumerate(tokens) if (key := (example.id, token_hash(example))) in rows]
    if not pairs:
        raise CacheError(
            f"no row of {corpus.source} is in cache {cache.shown} (by id and tokens): "
            f"dump this corpus with the student's teacher and give that cache"
        )
    return np.array([i for i, _ in pairs]), np.array([row for _, row in pairs])


# ------------------------------------------------------------------------------------- intervals, tests and slices


def _against_run(sides: Sides, path: Path, corpus: Corpus) -> PairedTest:
    """The other run's answers are those that it kept of this corpus, or are made now."""
    record = read_record(path)
    if record.label_names != sides.names:
        raise StudentError(
            f"{path} has the classes {', '.join(record.label_names)}, and not {', '.join(sides.names)}: "
            f"only runs of the same classes can be tested against each other"
        )
    name = evaluation_name(corpus.source, corpus.split, corpus.hash)
    kept = name in kept_names(path) and is_current(read_card(path, name), record, corpus.hash)
    logits = read_kept(path, name).rows.student if kept else load_run(path).logits(corpus.examples)
    rows = sides.labelled
    own, theirs = (side[rows].argmax(axis=1) == sides.labels[rows] for side in (sides.student, logits))
    return mcnemar(own, theirs, against=str(path))


def _lengths(student: Run, corpus: Corpus, cache: Cache | None) -> tuple[np.ndarray, Literal["tokens", "words"]]:
    """How long each row is: in tokens of the teacher, or else of the student; in words, if it has no tokenizer."""
    tokenizer, limit = student.tokenizer, student.record.max_length
    if cache is not None:
        tokenizer, limit = cache.tokenizer(), cache.manifest.dump.max_length
    if tokenizer is None:
        texts = (f"{example.text} {example.text_b or ''}" for example in corpus.examples)
        return np.array([len(text.split()) for text in texts], dtype=np.int32), "words"
    rows = tokenize(tokenizer, corpus.examples, max_length=limit).examples
    return np.array([len(row.input_ids) for row in rows], dtype=np.int32), "tokens"


# ---------------------------------------------------------------------------------------------------------- keeping


def _keep(
    path: Path,
    run: Run,
    corpus: Corpus,
    cache: Cache | None,
    found: Evaluation,
    sides: Sides,
    *,
    texts: bool,
    say: Callable[[str], None],
) -> Evaluation:
    """`found`, kept in the run's folder; or, where that can't be written to, `say` is told."""
    name = evaluation_name(corpus.source, corpus.split, corpus.hash)
    found = replace(found, kept=str(path / FOLDER / f"{name}.json"))
    teacher = None
    if cache is not None:
        said = cache.manifest.teacher
        teacher = TeacherCard(name=said.name, weights_hash=said.weights_hash, cache=cache.identity())
    card = KeptEvaluation(
        run=run_fingerprint(run.record),
        corpus_hash=corpus.hash,
        corpus_rows=len(corpus.examples),
        label_names=sides.names,
        length_unit=sides.unit,
        teacher=teacher,
        versions=package_versions("torch", "transformers", "scikit-learn"),
        rows_hash="0" * 32,
        figures=found,
    )
    rows = KeptRows(
        ids=[example.id for example in corpus.examples],
        texts=["\n".join(filter(None, (e.text, e.text_b))) for e in corpus.examples] if texts else None,
        labels=sides.labels.astype(np.int32),
        lengths=sides.lengths,
        student=sides.student,
        teacher=sides.teacher,
    )
    try:
        keep_evaluation(path, name, card, rows)
    except OSError as error:
        say(f"the evaluation is not kept in {path}: {error.strerror or error}")
        return replace(found, kept=None)
    return found
