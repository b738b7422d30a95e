"""The page of a report: students come in, what each part of the page shows goes out, and then the page itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import mean
from typing import Any

import jinja2

from softlabels import __version__
from softlabels.progress import progress
from softlabels.report.answers import DifferingRow, count_confusions, find_differing, most_confused
from softlabels.report.curves import find_curves
from softlabels.report.figures import (
    History,
    TeacherPoint,
    draw_confusion,
    draw_curve,
    draw_reliability,
    draw_scatter,
    draw_training,
)
from softlabels.report.gather import Gathered, LeftOut
from softlabels.report.students import Held, Student
from softlabels.report.svg import SERIES, plain
from softlabels.report.words import HeadLine, Row, headline, show_bytes, table_rows
from softlabels.scoring.figures import Slice

_MOST_RELIABILITIES, _MOST_CONFUSIONS, _MOST_CURVES, _MOST_CONFUSED = 8, 4, 8, 15


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure and the words above it."""

    title: str
    svg: str
    note: str = ""
    large: bool = False


@dataclass(frozen=True, slots=True)
class Legend:
    """A student's colour in the training curves."""

    name: str
    color: int | None  # None: the grey of all others


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that the template shows."""

    title: str
    corpus: str
    rows: int
    runs: int
    head: HeadLine
    table: list[Row]
    teacher_row: Row | None
    notes: list[str]  # to be read before the figures are compared
    scatters: list[Drawing]
    curves: list[Drawing]
    training: list[Drawing]
    legend: list[Legend]
    confusions: list[Drawing]
    other_confusions: list[Drawing]
    confused: list[list[str]]
    class_numbers: list[str]  # the classes, where figures call them by number
    reliabilities: list[Drawing]
    slices: list[Slice]
    differing: list[DifferingRow]
    has_texts: bool
    teacher_ms: float | None  # what latencies are told for
    provenance: list[tuple[str, str]]
    settings: list[tuple[str, list[tuple[str, str]], list[str]]]  # student, its settings, its runs
    left_out: list[LeftOut]


def render(page: Page) -> str:
    """The page as HTML. Whatever came from runs and corpora is escaped by the template."""
    folder = files("softlabels.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f}"
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return template.render(page=page, version=__version__, **parts)


def describe(
    found: Gathered, students: Sequence[Student], held: Sequence[Held], *, title: str | None, differing: int
) -> Page:
    """What the page shows of `students`, the most accurate first, each but that one `held` against it."""
    best = students[0]
    card, rows = best.chosen.kept.card, best.chosen.kept.rows
    teacher = _teacher(students)
    with progress(None, description="draw", unit="figures") as update:
        draw = _Drawer(update)
        own, other = _confusions(students, draw)
        own_counts = count_confusions(rows, rows.student)
        teacher_counts = None if rows.teacher is None else count_confusions(rows, rows.teacher)
        return Page(
            title=title or f"{best.found.corpus}: {len(students)} student{'s' * (len(students) > 1)}",
            corpus=best.found.corpus,
            rows=best.found.rows,
            runs=len(found.members),
            head=headline(students, held),
            table=table_rows(students, held),
            teacher_row=teacher,
            notes=_notes(students, found),
            scatters=_scatters(students, draw),
            curves=[
                draw(curve.label, draw_curve, f"curve{i}", curve, note=_more(curve.more, "line"))
                for i, curve in enumerate(find_curves(students)[:_MOST_CURVES])
            ],
            training=_training(students, draw),
            legend=_legend(students),
            confusions=own,
            other_confusions=other,
            confused=most_confused(own_counts, teacher_counts, card.label_names, _MOST_CONFUSED),
            class_numbers=card.label_names if len(card.label_names) > 12 else [],
            reliabilities=_reliabilities(students, draw),
            slices=[part for part in best.found.slices if part.by == "length"],
            differing=find_differing(rows, card.label_names, differing),
            has_texts=rows.texts is not None,
            teacher_ms=best.teacher_ms,
            provenance=_provenance(students),
            settings=[
                (
                    student.name,
                    [(key, str(value)) for key, value in sorted(student.settings.items())],
                    [f"seed {member.record.seed}: {member.path}" for member in student.members],
                )
                for student in students
            ],
            left_out=found.left_out,
        )


class _Drawer:
    """Draws, and counts what is drawn."""

    def __init__(self, update: Callable[[int], object]) -> None:
        self.update = update

    def __call__(
        self, title: str, figure: Callable[..., str], *arguments: Any, note: str = "", large: bool = False, **more: Any
    ) -> Drawing:
        drawing = Drawing(title, figure(*arguments, **more), note, large)
        self.update(1)
        return drawing


def _more(count: int, what: str) -> str:
    return f"{count} more {what}{'s' * (count > 1)} not shown" if count else ""


# ---------------------------------------------------------------------------------------------------------- drawings


def _teacher(students: Sequence[Student]) -> Row | None:
    """The teacher's line of the table; None where nothing, or of several teachers, is known."""
    known = [s for s in students if s.found.fidelity is not None and s.found.fidelity.teacher_accuracy is not None]
    hashes = {s.chosen.kept.card.teacher.weights_hash for s in known if s.chosen.kept.card.teacher is not None}
    if len(hashes) != 1:
        return None
    found = known[0].found
    assert found.fidelity is not None
    times = [value for s in students for value in s.each(lambda each: each.latency.teacher_ms)]
    if found.latency.teacher_ms is not None and students[0].teacher_ms is not None:
        times = [students[0].teacher_ms]
    parameters = found.latency.teacher_parameters
    return Row(
        number="T",
        name="teacher",
        about="",
        seeds="",
        accuracy=found.fidelity.teacher_accuracy,
        spread=None,
        interval="",
        macro_f1=found.fidelity.teacher_macro_f1,
        ece=None if found.teacher_calibration is None else found.teacher_calibration.ece,
        agreement=None,
        milliseconds=mean(times) if times else None,
        faster=None,
        bytes=None if parameters is None else 4.0 * parameters,
        size="–" if parameters is None else f"≈ {show_bytes(4.0 * parameters)}",
        parameters=parameters,
        verdict="",
        on_front=False,
    )


def _scatters(students: Sequence[Student], draw: _Drawer) -> list[Drawing]:
    teacher = _teacher(students)
    points: list[TeacherPoint | None] = [None, None]
    if teacher is not None and teacher.accuracy is not None:
        if teacher.milliseconds is not None:
            points[0] = TeacherPoint(teacher.milliseconds, teacher.accuracy)
        if teacher.bytes is not None:
            points[1] = TeacherPoint(teacher.bytes / 1e6, teacher.accuracy)
    return [
        draw(
            "Accuracy and latency",
            draw_scatter,
            "latency",
            students,
            lambda student: student.milliseconds,
            "latency of one text on one CPU thread, ms",
            teacher=points[0],
        ),
        draw(
            "Accuracy and size",
            draw_scatter,
            "size",
            students,
            lambda student: student.bytes / 1e6,
            "size on disk, MB",
            teacher=points[1],
        ),
    ]


_PANELS = {
    "accuracy": ("Validation", "validation accuracy, %"),
    "loss": ("Validation", "validation loss"),
    "train/loss": ("Training", "training loss"),
}


def _training(students: Sequence[Student], draw: _Drawer) -> list[Drawing]:
    drawings = []
    for number, (key, (title, label)) in enumerate(_PANELS.items()):
        scale = 100 if key == "accuracy" else 1
        histories = [History(s.name, _lines(s, key, scale)) for s in students]
        if any(len(line) > 1 for history in histories for line in history.lines):
            drawings.append(draw(title, draw_training, f"training{number}", histories, label))
    return drawings


def _lines(student: Student, key: str, scale: float) -> list[list[tuple[float, float]]]:
    lines = [
        [(entry["epoch"], scale * entry[key]) for entry in member.record.history if key in entry and "epoch" in entry]
        for member in student.members
    ]
    return [line for line in lines if line]


def _legend(students: Sequence[Student]) -> list[Legend]:
    """Only of students that trained epoch by epoch."""
    shown = [
        Legend(f"{i + 1}. {student.name}", i)
        for i, student in enumerate(students[: len(SERIES)])
        if any(member.record.history for member in student.members)
    ]
    return [*shown, *([Legend("all others", None)] if len(students) > len(SERIES) else [])]


def _confusions(students: Sequence[Student], draw: _Drawer) -> tuple[list[Drawing], list[Drawing]]:
    """Of the teacher and the student to ship, side by side; and of the next ones."""
    rows, names = students[0].chosen.kept.rows, students[0].chosen.kept.card.label_names
    first: list[Drawing] = []
    if rows.teacher is not None:
        counts = count_confusions(rows, rows.teacher)
        first.append(draw("Teacher", draw_confusion, "confusionT", counts, names, "the teacher"))
    others: list[Drawing] = []
    for number, student in enumerate(students[:_MOST_CONFUSIONS]):
        kept = student.chosen.kept.rows
        counts = count_confusions(kept, kept.student)
        drawing = draw(
            f"{number + 1}. {student.name}", draw_confusion, f"confusion{number}", counts, names, plain(student.name)
        )
        (first if number == 0 else others).append(drawing)
    return first, others


def _reliabilities(students: Sequence[Student], draw: _Drawer) -> list[Drawing]:
    drawings = []
    teacher = students[0].found.teacher_calibration
    if teacher is not None:
        title = f"Teacher: ECE {100 * teacher.ece:.1f} %"
        drawings.append(draw(title, draw_reliability, "reliabilityT", teacher, "the teacher"))
    for number, student in enumerate(students[: _MOST_RELIABILITIES - len(drawings)]):
        found = student.found.calibration
        if found is not None:
            title = f"{number + 1}. {student.name}: ECE {100 * found.ece:.1f} %"
            drawings.append(draw(title, draw_reliability, f"reliability{number}", found, plain(student.name)))
    return drawings


# ------------------------------------------------------------------------------------------------------------- words


def _notes(students: Sequence[Student], found: Gathered) -> list[str]:
    cards = [member.kept.card for student in students for member in student.members]
    machines = sorted({card.figures.latency.machine or "an unnamed one" for card in cards})
    teachers = {card.teacher.weights_hash for card in cards if card.teacher is not None}
    notes = []
    if len(machines) > 1 and students[0].teacher_ms is None:
        notes.append(
            f"Latencies were measured on different processors ({', '.join(machines)}): they can't be compared. "
            f"Evaluate all runs on one."
        )
    if len(teachers) > 1:
        notes.append(
            f"The students were held against {len(teachers)} different teachers; none is drawn as the teacher."
        )
    lacking = sum(card.teacher is None for card in cards)
    if lacking:
        notes.append(
            f"{lacking} of {len(cards)} runs were evaluated without a cache: nothing is known of their teacher. "
            f"Evaluate them with --cache."
        )
    if found.left_out:
        count = len(found.left_out)
        notes.append(f"{count} {'run is' if count == 1 else 'runs are'} not shown; the end of the page says why.")
    return notes


def _provenance(students: Sequence[Student]) -> list[tuple[str, str]]:
    """Facts that all runs share are said once; where they differ, all values are."""

    def each(values: Sequence[str | None]) -> str:
        return ", ".join(dict.fromkeys(value for value in values if value)) or "–"

    members = [member for student in students for member in student.members]
    cards, caches = [m.kept.card for m in members], [m.record.cache for m in members]
    return [
        ("test corpus", each([card.figures.corpus for card in cards])),
        ("its content", f"xxh3-128 {each([card.corpus_hash for card in cards])}, {cards[0].corpus_rows:,} rows"),
        ("teacher", each([str(cache.get("teacher", "")) for cache in caches])),
        ("teacher's weights", each([str(cache.get("weights_hash", "")) for cache in caches])),
        ("caches trained from", each([f"{c.get('path')} ({c.get('identity')})" if c else None for c in caches])),
        ("caches of the test", each([card.teacher.cache if card.teacher else None for card in cards])),
        ("trained with", each([_versions(m.record.versions) for m in members])),
        ("evaluated with", each([_versions(card.versions) for card in cards])),
        ("latency measured on", each([card.figures.latency.machine for card in cards]) + ", one thread"),
    ]


def _versions(versions: dict[str, str]) -> str:
    return " ".join(f"{name} {version}" for name, version in versions.items())
