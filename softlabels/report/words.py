"""What a report says in words and in its table: which student to ship, how sure that is, all figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softlabels.report.students import (
    Held,
    Student,
    accuracy_of,
    pareto_front,
)


@dataclass(frozen=True, slots=True)
class HeadLine:
    """Which student to ship, and what speaks for and against it."""

    name: str
    path: str
    facts: list[str]
    caveats: list[str]


@dataclass(frozen=True, slots=True)
class Row:
    """A student's line in the table; means over its seeds."""

    number: str
    name: str
    about: str
    seeds: str
    accuracy: float | None
    spread: float | None
    interval: str
    macro_f1: float | None
    ece: float | None
    agreement: float | None
    milliseconds: float | None
    faster: float | None
    bytes: float | None
    size: str
    parameters: int | None
    verdict: str
    on_front: bool


def headline(students: Sequence[Student], held: Sequence[Held]) -> HeadLine:
    """Ship the most accurate student. It is always on the Pareto front; what is as good and cheaper is named too."""
    best = students[0]
    found = best.found
    facts = [
        f"accuracy {_percent(found.accuracy)}{_within(best)} on {found.rows:,} rows",
        f"macro-F1 {_percent(found.macro_f1)}",
    ]
    if found.fidelity is not None and found.fidelity.teacher_accuracy is not None:
        gap = 100 * (found.accuracy - found.fidelity.teacher_accuracy)
        facts.append(
            f"its teacher: {_percent(found.fidelity.teacher_accuracy)} ({gap:+.1f} points)".replace("(-", "(−")
        )
    speed = f"{show_ms(best.milliseconds)} a text on one CPU thread"
    if found.latency.times_faster is not None:
        speed += f", {show_times(found.latency.times_faster)} the teacher's speed"
    facts += [speed, f"{show_bytes(found.bytes)}, {found.parameters:,} parameters"]
    return HeadLine(best.name, str(best.chosen.path), facts, _caveats(students, held))


def _caveats(students: Sequence[Student], held: Sequence[Held]) -> list[str]:
    best, caveats = students[0], []
    as_good = [item for item in held if item.as_good]
    if as_good:
        names = ", ".join(f"{item.student.name} (p {show_p(item.p)})" for item in as_good[:6])
        more = f" and {len(as_good) - 6} more" if len(as_good) > 6 else ""
        caveats.append(f"Not distinguishable from {names}{more}, on these {best.found.rows:,} rows.")
        faster = min(as_good, key=lambda item: item.student.milliseconds).student
        smaller = min(as_good, key=lambda item: item.student.bytes).student
        if faster.milliseconds < 0.8 * best.milliseconds:
            times = best.milliseconds / faster.milliseconds
            caveats.append(
                f"Of these, {faster.name} is {times:.1f} times faster ({show_ms(faster.milliseconds)} a text)."
            )
        if smaller.bytes < 0.8 * best.bytes:
            times = best.bytes / smaller.bytes
            caveats.append(f"Of these, {smaller.name} is {times:.1f} times smaller ({show_bytes(smaller.bytes)}).")
    elif held:
        caveats.append("Better than every other student here by more than chance.")
    if best.chosen_by:
        caveats.append(
            f"Of its {len(best.members)} seeds this run is {best.chosen_by}; their accuracies are "
            f"{', '.join(f'{100 * value:.1f}' for value in best.each(accuracy_of))} %."
        )
    if len(students) > 1:
        caveats.append(f"It was picked as the best of {len(students)} on the same rows, which flatters it a little.")
    return caveats


def table_rows(students: Sequence[Student], held: Sequence[Held]) -> list[Row]:
    """A line for each student, the most accurate first."""
    verdicts = [""] + [f"{'as good' if item.as_good else 'worse'}, p {show_p(item.p)}" for item in held]
    fronts = set(pareto_front([(s.milliseconds, s.accuracy) for s in students]))
    fronts |= set(pareto_front([(s.bytes, s.accuracy) for s in students]))
    return [
        Row(
            number=str(number + 1),
            name=student.name,
            about=_about(student),
            seeds=str(len(student.members)),
            accuracy=student.accuracy,
            spread=student.spread(accuracy_of),
            interval=_within(student).strip(" ,"),
            macro_f1=student.mean(lambda found: found.macro_f1),
            ece=student.mean(lambda found: None if found.calibration is None else found.calibration.ece),
            agreement=student.mean(lambda found: None if found.fidelity is None else found.fidelity.agreement),
            milliseconds=student.milliseconds,
            faster=student.mean(lambda found: found.latency.times_faster),
            bytes=student.bytes,
            size=show_bytes(student.bytes),
            parameters=student.found.parameters,
            verdict=verdict,
            on_front=number in fronts,
        )
        for number, (student, verdict) in enumerate(zip(students, verdicts, strict=True))
    ]


def _about(student: Student) -> str:
    """Kind, losses and temperature."""
    record = student.chosen.record
    kind = record.student
    if record.exported is not None:
        kind += " in ONNX" + (" int8" if record.exported.int8 else "")
    losses = " + ".join(f"{weight:g} {name}" for name, weight in record.losses.items())
    phases = f", {len(record.phases)} phases" if len(record.phases) > 1 else ""
    return f"{kind}; {losses}; T {record.temperature}{phases}"


def _within(student: Student) -> str:
    about = student.found.intervals.get("accuracy")
    return "" if about is None else f" ({100 * about.low:.1f} to {100 * about.high:.1f})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def show_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def show_ms(value: float) -> str:
    return f"{value:.3g} ms"


def show_times(value: float) -> str:
    return f"{value:.0f} times" if value >= 10 else f"{value:.1f} times"


def show_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
