"""The table of a recipe's students, and all that a run of it gave."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from softlabels.compression import CompressedRow
from softlabels.stages import Made


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


# the evaluations of a student, one a seed: 'soft', 'hard' (its twin's), 'alone' (of what trained together), 'direct'
# (from the teacher's own cache and not an assistant's), and what 'compressed' ones gave
Found = dict[str, list[Any]]


def make_table(
    name: str, out: Path, results: dict[str, Found], caches: list[Made], teacher_seconds: float, skipped: int
) -> RunResult:
    """The result of a run; `results` are the evaluations of each row's students, `skipped` stages were done before."""
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


def _row(student: str, found: Found, *, teacher_accuracy: float | None) -> Row:
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
