"""Where students differ in one setting alone, how accurate they are as a function of it: temperatures, weights, any."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from softlabels.report.students import Student, accuracy_of

MOST_LINES = 6
_NAMES = {
    "temperature": "temperature",
    "lr": "learning rate",
    "batch_size": "batch size, rows",
    "epochs": "epochs",
    "rows": "rows of the cache",
    "weight_decay": "weight decay",
}


@dataclass(frozen=True, slots=True)
class Point:
    """A setting's value, and the accuracy of the student with it: the mean, the least and the best of its seeds."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """Students that have everything else in common; `name` says what that is, where there are several lines."""

    name: str
    points: list[Point]


@dataclass(frozen=True, slots=True)
class Curve:
    """A setting, and the lines along it."""

    setting: str
    label: str  # of the axis
    lines: list[Line]
    more: int = 0  # lines that were left out


def find_curves(students: Sequence[Student]) -> list[Curve]:
    """A curve for each setting that takes two values or more between students alike in all others.

    Weights of losses are taken together: what counts is a loss's share of their sum, so that 0.7 and 0.3 against 0.5
    and 0.5 is one step along one curve.
    """
    keys = sorted({key for student in students for key in student.settings})
    first = [key for key in ("temperature",) if key in keys]
    others = [key for key in keys if key not in first and not key.startswith("losses.")]
    curves = [_along(students, key) for key in first]
    curves.append(_along_weights(students))
    curves += [_along(students, key) for key in others]
    return [curve for curve in curves if curve is not None]


def _along(students: Sequence[Student], key: str) -> Curve | None:
    families: dict[str, list[tuple[float, Student]]] = defaultdict(list)
    for student in students:
        value = _number(student.settings.get(key))
        if value is not None:
            families[_rest(student, [key])].append((value, student))
    return _curve(key, _NAMES.get(key, key.replace("_", " ")), families)


def _along_weights(students: Sequence[Student]) -> Curve | None:
    weights = {id(student): _weights(student) for student in students}
    names = sorted({name for found in weights.values() for name in found})
    for name in [*(n for n in names if n != "ce"), *(n for n in names if n == "ce")]:
        families: dict[str, list[tuple[float, Student]]] = defaultdict(list)
        for student in students:
            found = weights[id(student)]
            total = sum(found.values())
            if total <= 0:
                continue
            rest = {other: round(weight / max(total - found.get(name, 0), 1e-12), 6) for other, weight in found.items()}
            rest.pop(name, None)
            keys = [key for key in student.settings if key.startswith("losses.")]
            if name in found and not rest:  # the whole sum: the end of every line
                rest = {other: 1.0 for other in names if other != name} if len(names) == 2 else rest
            families[json.dumps([_rest(student, keys), rest], sort_keys=True)].append(
                (found.get(name, 0.0) / total, student)
            )
        curve = _curve("losses", f"share of {name} in the loss", families)
        if curve is not None:
            return curve
    return None


def _weights(student: Student) -> dict[str, float]:
    """Loss -> weight, as far as they are plain numbers."""
    found = {}
    for key, value in student.settings.items():
        if key.startswith("losses."):
            number = _number(value)
            if number is None or number < 0:
                return {}
            found[key.removeprefix("losses.")] = number
    return found


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < 1e12 else None


def _rest(student: Student, keys: Sequence[str]) -> str:
    """Everything but `keys`; runs of other teachers and exports of other kinds never share a line."""
    rest = {key: value for key, value in student.settings.items() if key not in keys}
    return json.dumps([rest, student.chosen.record.cache.get("identity")], sort_keys=True, default=str)


def _curve(setting: str, label: str, families: dict[str, list[tuple[float, Student]]]) -> Curve | None:
    lines = [family for family in families.values() if len({x for x, _ in family}) > 1]
    if not lines:
        return None
    lines.sort(key=lambda family: (-len(family), -max(student.accuracy for _, student in family)))
    shown = lines[:MOST_LINES]
    names = _line_names([family[0][1] for family in shown], setting)
    drawn = [Line(name, _points(family)) for name, family in zip(names, shown, strict=True)]
    return Curve(setting, label, drawn, len(lines) - len(shown))


def _points(family: Sequence[tuple[float, Student]]) -> list[Point]:
    points = []
    for x in sorted({x for x, _ in family}):
        values = [value for at, student in family if at == x for value in student.each(accuracy_of)]
        points.append(Point(x, mean(values), min(values), max(values)))
    return points


def _line_names(students: Sequence[Student], along: str) -> list[str]:
    """What tells the lines apart, in the settings in which they differ; nothing where there is one line."""
    if len(students) == 1:
        return [""]
    keys = sorted({key for s in students for key in s.settings if key != along and not key.startswith(f"{along}.")})
    differ = [key for key in keys if len({json.dumps(s.settings.get(key)) for s in students}) > 1]
    names = [
        ", ".join(f"{key.removeprefix('losses.')} {s.settings.get(key, '–')}" for key in differ[:3]) for s in students
    ]
    return names if len(set(names)) == len(names) else [s.name for s in students]
