"""A run and a labelled corpus come in; quality, fidelity to the teacher, size and latency go out.

The teacher's side comes from a cache of the same corpus. Its latency is measured on a model of its configuration with
random weights, since the time of a forward pass does not depend on them: the teacher itself is not needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from softlabels.averages import Average, average_runs, mean_logits
from softlabels.cache import Cache
from softlabels.corpus import Corpus, encode_labels
from softlabels.errors import CacheError, CorpusError
from softlabels.runs import Run, load_run
from softlabels.students.exported import OnnxStudent
from softlabels.tokens import pad_batch, token_hash, tokenize
from softlabels.types import NO_LABEL, Example

_FIGURES = ("precision", "recall", "f1-score", "support")
_LATENCY_TEXTS = 50
_LARGEST_TIMED = 2_000_000_000  # parameters; building a larger teacher only to time it would fill the memory


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near a student is to its teacher on the rows that corpus and cache share."""

    rows: int
    agreement: float  # share of rows with the same class
    kl: float  # mean KL(teacher ‖ student) at T = 1, in nats
    teacher_accuracy: float | None  # None where no shared row has a label
    teacher_macro_f1: float | None


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds for one text alone on one CPU thread, tokenisation included: the median over `texts` texts."""

    ms: float
    teacher_ms: float | None
    teacher_parameters: int | None
    texts: int

    @property
    def times_faster(self) -> float | None:
        return None if self.teacher_ms is None else self.teacher_ms / self.ms


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found. `classes` maps a class to precision, recall, f1-score and support."""

    run: str
    corpus: str
    rows: int  # with a label
    accuracy: float
    macro_f1: float
    classes: dict[str, dict[str, float]]
    averages: dict[str, dict[str, float]]
    fidelity: Fidelity | None
    parameters: int
    nonzero: int  # of the parameters; fewer where the student was pruned
    bytes: int
    latency: Latency
    alone: dict[str, float] = field(default_factory=dict)  # of an average: each run's accuracy by itself

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return asdict(self) | {"times_faster": self.latency.times_faster}


def evaluate(run: Path, corpus: Corpus, *, cache: Cache | None = None, others: Sequence[Path] = ()) -> Evaluation:
    """Score the student in `run` on the labelled rows of `corpus`; with a `cache` of it, against its teacher too.

    With `others`, runs of the same classes, what is scored is the mean of the probabilities of all, and `alone` tells
    each one's accuracy.
    """
    paths = [run, *others]
    members = [load_run(path) for path in paths]
    student = average_runs(members) if others else members[0]
    labels = np.array(encode_labels(corpus.examples, student.label_names))
    rows = np.flatnonzero(labels != NO_LABEL)
    if not len(rows):
        raise CorpusError(f"corpus {corpus.source} has no labelled row to score against: give one with labels")
    each = [member.logits(corpus.examples) for member in members]
    logits = mean_logits(each) if others else each[0]  # (N, C)
    predicted = logits[rows].argmax(axis=1)
    averages = _averages(labels[rows], predicted, len(student.label_names))
    return Evaluation(
        run=" + ".join(str(path) for path in paths),
        corpus=corpus.source if corpus.split is None else f"{corpus.source}:{corpus.split}",
        rows=len(rows),
        accuracy=float(accuracy_score(labels[rows], predicted)),
        macro_f1=averages["macro avg"]["f1-score"],
        classes=_class_scores(labels[rows], predicted, student.label_names),
        averages=averages,
        fidelity=None if cache is None else _fidelity(student, corpus, logits, cache, labels),
        parameters=student.parameters,
        nonzero=student.nonzero,
        bytes=student.size_on_disk,
        latency=_latency(student, [corpus.examples[int(row)] for row in rows], cache),
        alone={
            str(path): float(accuracy_score(labels[rows], own[rows].argmax(axis=1)))
            for path, own in zip(paths, each, strict=True)
            if others
        },
    )


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


def _fidelity(student: Run | Average, corpus: Corpus, logits: np.ndarray, cache: Cache, labels: np.ndarray) -> Fidelity:
    cache.require(["logits"], why="fidelity")
    if cache.label_names != student.label_names:
        raise CacheError(
            f"cache {cache.path} has the classes {cache.label_names}, the student {student.label_names}: "
            f"give a cache of the student's own teacher"
        )
    shared, theirs = _join(corpus, cache)
    teacher = torch.from_numpy(cache.column("logits")[theirs]).double().log_softmax(-1)  # (N, C)
    own = torch.from_numpy(logits[shared]).double().log_softmax(-1)
    says = teacher.argmax(-1).numpy()
    labelled = labels[shared] != NO_LABEL
    truth = labels[shared][labelled]
    return Fidelity(
        rows=len(shared),
        agreement=float((own.argmax(-1) == teacher.argmax(-1)).double().mean()),
        kl=float((teacher.exp() * (teacher - own)).sum(-1).mean()),
        teacher_accuracy=float(accuracy_score(truth, says[labelled])) if len(truth) else None,
        teacher_macro_f1=_macro_f1(truth, says[labelled], student.label_names) if len(truth) else None,
    )


def score_teacher(cache: Cache) -> dict[str, float] | None:
    """Accuracy and macro-F1 of a cache's logits on its labelled rows; None where no row has a label."""
    rows = cache.labels != NO_LABEL
    if not rows.any():
        return None
    truth, said = cache.labels[rows], cache.column("logits")[rows].argmax(axis=1)
    return {"accuracy": float(accuracy_score(truth, said)), "macro_f1": _macro_f1(truth, said, cache.label_names)}


def _macro_f1(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    return float(f1_score(truth, predicted, labels=list(range(len(names))), average="macro", zero_division=0.0))


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
            f"no row of {corpus.source} is in cache {cache.path} (by id and tokens): "
            f"dump this corpus with the student's teacher and give that cache"
        )
    return np.array([i for i, _ in pairs]), np.array([row for _, row in pairs])


# -------------------------------------------------------------------------------------------------------- latency


def _latency(student: Run | Average, examples: Sequence[Example], cache: Cache | None) -> Latency:
    """Student and teacher take turns on the same texts, so that a busy machine slows both."""
    step = max(1, len(examples) // _LATENCY_TEXTS)
    chosen = list(examples[::step][:_LATENCY_TEXTS])
    teacher = None if cache is None else _teacher_clock(cache)
    mine: list[float] = []
    theirs: list[float] = []
    threads = torch.get_num_threads()
    warm = len(chosen[:3])  # texts that are only there to warm up
    if isinstance(student, Average):
        student = replace(student, members=[_on_one_thread(run) for run in student.members])
    else:
        student = _on_one_thread(student)
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be measured instead
    try:
        for example in (*chosen[:warm], *chosen):
            mine.append(_milliseconds(partial(student.logits, [example])))
            if teacher is not None:
                theirs.append(_milliseconds(partial(teacher.answer, example)))
    finally:
        torch.set_num_threads(threads)
    return Latency(
        ms=statistics.median(mine[warm:]),
        teacher_ms=statistics.median(theirs[warm:]) if theirs else None,
        teacher_parameters=None if teacher is None else teacher.parameters,
        texts=len(chosen),
    )


def _on_one_thread(run: Run) -> Run:
    """ONNX Runtime has threads of its own, which torch's setting does not reach."""
    if not isinstance(run.student, OnnxStudent):
        return run
    return replace(run, student=run.student.with_threads(1))


def _milliseconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


@dataclass(frozen=True, slots=True)
class _TeacherClock:
    answer: Callable[[Example], Any]
    parameters: int


def _teacher_clock(cache: Cache) -> _TeacherClock | None:
    """A model of the teacher's shape with random weights; None where it is unknown, too large, or needs code."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not cache.teacher_config():
        return None
    try:
        config = AutoConfig.from_pretrained(cache.path / "teacher", local_files_only=True, trust_remote_code=False)
    except ValueError:  # of an architecture that transformers doesn't have, or only with code from elsewhere
        return None
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForSequenceClassification.from_config(config).parameters())
    if size > _LARGEST_TIMED:
        return None
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer, limit = cache.tokenizer(), cache.manifest.dump.max_length

    @torch.no_grad()
    def answer(example: Example) -> torch.Tensor:
        tokens = tokenize(tokenizer, [example], max_length=limit).examples
        return model(**pad_batch(tokens, pad_token_id=cache.manifest.teacher.pad_token_id).model_inputs()).logits

    return _TeacherClock(answer, size)
