"""Small runs for tests of what is done with runs: a student that is its teacher, and students made by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from sklearn.metrics import precision_recall_fscore_support
from transformers import AutoModelForSequenceClassification

from softlabels.cache import Cache, open_cache
from softlabels.config import DumpOptions, EvaluateOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.evaluations import (
    KeptEvaluation,
    KeptRows,
    TeacherCard,
    evaluation_name,
    keep_evaluation,
    run_fingerprint,
)
from softlabels.runs import RunRecord, read_record, save_run
from softlabels.scoring.calibration import calibrate
from softlabels.scoring.figures import Evaluation, Latency
from softlabels.scoring.sides import Sides, calibrate_teacher, fidelity_of, intervals_of
from softlabels.students.linear import LinearStudent, fit_linear
from softlabels.teacher import load_teacher
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

ROWS = [Example(f"row-{i}", text, None, name if i % 4 else None) for i, (text, name) in enumerate(TEXTS)]


def corpus_of(examples: list[Example], label_names: list[str] | None = None) -> Corpus:
    return Corpus("made", None, examples, label_names or LABEL_NAMES)


def record(student: str, *, label_names: Sequence[str] = LABEL_NAMES, seed: int = 0) -> RunRecord:
    return RunRecord(
        student=student,
        options={},
        label_names=list(label_names),
        max_length=64,
        losses={"kl": 1.0},
        temperature="1",
        seed=seed,
        epochs_run=1,
        best_epoch=1,
        train_seconds=1.0,
        train_rows=len(TEXTS),
        labelled_rows=0,
        validation={},
        cache={},
        versions={},
    )


@dataclass(frozen=True)
class Taught:
    """A cache of ROWS, and the run of a student that is its very teacher."""

    cache: Cache
    twin: Path


def make_taught(folder: Path) -> Taught:
    """In `folder`: teacher/, cache/ and twin/."""
    teacher = save_teacher(folder / "teacher")
    wide = {name: value * 4 for name, value in load_file(teacher / "model.safetensors").items()}
    save_file(wide, teacher / "model.safetensors", metadata={"format": "pt"})  # else it says the same of every text
    dump(corpus_of(ROWS), teacher=str(teacher), out=folder / "cache", options=DumpOptions(shard_rows=16))
    student = AutoModelForSequenceClassification.from_pretrained(teacher)
    save_run(folder / "twin", student, record("transformer"), tokenizer=load_teacher(str(teacher)).tokenizer)
    return Taught(open_cache(folder / "cache"), folder / "twin")


def by_words(out: Path, logits: Mapping[str, Sequence[float]], of: RunRecord | None = None) -> Path:
    """A run in `out` that gives a text the sum of the logits of the words in it that it knows."""
    of = of or record("linear")
    words = sorted(logits)
    fitted = fit_linear(
        words,
        num_labels=len(of.label_names),
        logits=np.zeros((len(words), len(of.label_names))),
        options={"min_df": 1, "char_ngrams": 0, "word_ngrams": 1},
    )
    terms = fitted.vocabularies[0].terms
    weights = np.array([logits[term] for term in terms], dtype=np.float32)
    save_run(out, LinearStudent(fitted.vocabularies, False, weights, np.zeros(len(of.label_names), np.float32)), of)
    return out


def kept_run(
    out: Path,
    student: np.ndarray,
    labels: np.ndarray,
    *,
    teacher: np.ndarray | None = None,
    of: RunRecord | None = None,
    corpus: str = "test.jsonl",
    texts: Sequence[str] | None = None,
    ms: float = 2.0,
    teacher_ms: float = 20.0,
) -> Path:
    """A run in `out` and its evaluation: what `evaluate` leaves of a student with the logits `student` (N, C)."""
    of = of or record("linear")
    by_words(out, {"the": [0.0] * len(of.label_names)}, of)
    sides = Sides(of.label_names, labels, np.full(len(labels), 7), "words", student, teacher)
    said = student.argmax(axis=1)
    columns = precision_recall_fscore_support(labels, said, labels=range(len(of.label_names)), zero_division=0.0)
    names = ("precision", "recall", "f1-score", "support")
    of_class = np.stack(columns, axis=1).astype(float).tolist()
    figures = Evaluation(
        run=str(out),
        corpus=corpus,
        rows=len(labels),
        accuracy=float((said == labels).mean()),
        macro_f1=float(np.mean(columns[2])),
        classes={name: dict(zip(names, row, strict=True)) for name, row in zip(of.label_names, of_class, strict=True)},
        averages={},
        fidelity=fidelity_of(sides),
        parameters=1000,
        nonzero=1000,
        bytes=50_000,
        latency=Latency(
            ms, None if teacher is None else teacher_ms, None if teacher is None else 10**6, 50, "a processor"
        ),
        calibration=calibrate(student, labels),
        teacher_calibration=calibrate_teacher(sides, EvaluateOptions()),
        intervals=intervals_of(sides, EvaluateOptions(resamples=50)),
    )
    told = hashlib.md5(corpus.encode() + labels.tobytes()).hexdigest()
    card = KeptEvaluation(
        run=run_fingerprint(read_record(out)),
        corpus_hash=told,
        corpus_rows=len(labels),
        label_names=of.label_names,
        length_unit="words",
        teacher=None if teacher is None else TeacherCard(name="teacher", weights_hash="0" * 32, cache="0" * 24),
        versions={},
        rows_hash="0" * 32,
        figures=figures,
    )
    rows = KeptRows(
        ids=[f"row-{i}" for i in range(len(labels))],
        texts=None if texts is None else list(texts),
        labels=labels.astype(np.int32),
        lengths=sides.lengths.astype(np.int32),
        student=student.astype(np.float32),
        teacher=None if teacher is None else teacher.astype(np.float32),
    )
    keep_evaluation(out, evaluation_name(corpus, None, told), card, rows)
    return out
