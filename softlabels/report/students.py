"""Runs that differ in their seed alone are one student. Which of them to ship, and which are as good as that one."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from softlabels.report.gather import Member
from softlabels.scoring.figures import Evaluation, PairedTest
from softlabels.scoring.mcnemar import mcnemar

ALPHA = 0.05
_LARGEST_OPTIONS = 1 << 20  # bytes
_NO_SETTING = {"seed", "eval", "from_files", "cache"}  # of options.json: the seed, and what names an input


@dataclass(frozen=True)
class Student:
    """The runs of one configuration, one a seed."""

    name: str
    members: list[Member]
    settings: dict[str, Any]  # flat: 'losses.kl' -> 0.7; without the seed
    chosen: Member  # the run of it to ship
    chosen_by: str  # how it was chosen among the seeds; empty where there is but one
    teacher_ms: float | None = None  # what latencies are told for; see `find_teacher_ms`

    @property
    def found(self) -> Evaluation:
        """What was found of the chosen run."""
        return self.chosen.kept.card.figures

    def each(self, figure: Callable[[Evaluation], float | None]) -> list[float]:
        """A figure of every seed that has it."""
        values = [figure(member.kept.card.figures) for member in self.members]
        return [value for value in values if value is not None]

    def mean(self, figure: Callable[[Evaluation], float | None]) -> float | None:
        values = self.each(figure)
        return mean(values) if values else None

    def spread(self, figure: Callable[[Evaluation], float | None]) -> float | None:
        """The standard deviation over the seeds; None of a single one."""
        values = self.each(figure)
        return stdev(values) if len(values) > 1 else None

    @property
    def accuracy(self) -> float:
        return mean(self.each(accuracy_of))

    @property
    def milliseconds(self) -> float:
        """For one text; where the teacher was timed beside every run, on a machine that needs `teacher_ms` for it."""
        if self.teacher_ms is not None:
            return mean(self.teacher_ms / times for times in self.each(lambda found: found.latency.times_faster))
        return mean(self.each(lambda found: found.latency.ms))

    @property
    def bytes(self) -> float:
        return mean(self.each(bytes_of))


def accuracy_of(found: Evaluation) -> float:
    return found.accuracy


def bytes_of(found: Evaluation) -> float:
    return float(found.bytes)


def find_teacher_ms(members: Sequence[Member]) -> float | None:
    """The least that the teacher took for a text in any evaluation; None where it was not timed in each, as the same.

    Runs are evaluated at different hours on machines that do other things too: the same student may take three times as
    long. Its teacher, timed in turns with it, then does as well, so that the ratio holds; latencies are told by it.
    """
    cards = [member.kept.card for member in members]
    hashes = {None if card.teacher is None else card.teacher.weights_hash for card in cards}
    times = [card.figures.latency.teacher_ms for card in cards if card.figures.latency.times_faster]
    known = [time for time in times if time]
    return min(known) if len(hashes) == 1 and len(known) == len(cards) else None


def group_students(members: Sequence[Member]) -> list[Student]:
    """The students of the runs, the most accurate first."""
    groups: dict[str, list[Member]] = defaultdict(list)
    settings = {}
    for member in members:
        flat = read_settings(member)
        record = member.record
        inputs = [flat, record.cache.get("identity"), record.exported and record.exported.int8]
        pruned = None if record.pruned is None else record.pruned.model_dump()
        key = json.dumps([*inputs, pruned], sort_keys=True, default=str)
        groups[key].append(member)
        settings[key] = flat
    names, teacher_ms = _names(list(groups.values())), find_teacher_ms(members)
    students = []
    for (key, group), name in zip(groups.items(), names, strict=True):
        group.sort(key=lambda member: (member.record.seed, str(member.path)))
        chosen, how = _choose(group)
        students.append(Student(name, group, settings[key], chosen, how, teacher_ms))
    return sorted(students, key=lambda student: (-student.accuracy, student.milliseconds, student.name))


def _choose(group: Sequence[Member]) -> tuple[Member, str]:
    """The run that did best in validation, which the test rows have no part in; or else the middle one."""
    if len(group) == 1:
        return group[0], ""
    for key, sign in (("accuracy", 1), ("loss", -1)):
        scores = [member.record.validation[key] for member in group if key in member.record.validation]
        if len(scores) == len(group):
            return group[
                max(range(len(group)), key=[sign * score for score in scores].__getitem__)
            ], "the best in validation"
    ordered = sorted(group, key=lambda member: member.kept.card.figures.accuracy)
    return ordered[(len(group) - 1) // 2], "the middle one by accuracy"


# ---------------------------------------------------------------------------------------------- settings and names


def read_settings(member: Member) -> dict[str, Any]:
    """What a run was trained with, but for its seed: options.json where it is there, or else what run.json says."""
    record = member.record
    options: Any = None
    path = member.path / "options.json"
    try:
        if path.stat().st_size <= _LARGEST_OPTIONS:
            options = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        pass
    if not isinstance(options, dict):
        names = ("student", "options", "losses", "temperature", "phases")
        options = {name: getattr(record, name) for name in names}
    if record.exported is not None:
        options = {**options, "exported": "int8" if record.exported.int8 else "float32"}
    if record.pruned is not None and "prune" not in options:
        options = {**options, "prune": record.pruned.model_dump(exclude_none=True)}
    kept = {name: value for name, value in options.items() if name not in _NO_SETTING}
    # a run that goes on from another one's seed 1, or was exported from it, belongs to the same student
    plain = re.sub(rf"seed([-_=]?){record.seed}(?!\d)", r"seed\1*", json.dumps(kept, ensure_ascii=False))
    return _flat(json.loads(plain))


def _flat(value: dict[str, Any], under: str = "", depth: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item and depth < 4:
            found |= _flat(item, f"{under}{key}.", depth + 1)
        elif item not in (None, {}, []):
            found[f"{under}{key}"] = item if isinstance(item, int | float | str | bool) else json.dumps(item)
    return found


def _names(groups: Sequence[Sequence[Member]]) -> list[str]:
    """A name for each student: its folder's without the seed; with the folder above, where two would be the same."""
    for parts in (1, 2, 3):
        names = [_without_seed(group[0], parts) for group in groups]
        if len(set(names)) == len(names):
            return names
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = f"{name} ({seen[name]})" if seen[name] > 1 else name
    return names


def _without_seed(member: Member, parts: int) -> str:
    name = "/".join(Path(os_path(member.path)).parts[-parts:])
    shorter = re.sub(rf"[-_., ]*\bseed[-_=]?{member.record.seed}(?!\d)", "", name).strip("-_., ")
    return shorter or name


def os_path(path: Path) -> str:
    """The path as a name has it: a run given as '.' is called by its folder's name."""
    return str(path.resolve())


# ---------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Held:
    """A student held against the best one, on the rows that both answered."""

    student: Student
    test: PairedTest
    p: float  # by Holm's method, for all the comparisons of the report

    @property
    def as_good(self) -> bool:
        """Whether nothing tells them apart: which is not to say that they are the same."""
        return self.p >= ALPHA


def hold_against_best(students: Sequence[Student]) -> list[Held]:
    """Each student but the first against the first: their chosen runs, by McNemar's exact test.

    Of many comparisons some come out by chance; Holm (1979) keeps the chance of any such one below `ALPHA`.
    """
    best = students[0]
    tests = [mcnemar(s.chosen.right, best.chosen.right, against=best.name) for s in students[1:]]
    adjusted: dict[int, float] = {}
    least = 0.0
    for rank, number in enumerate(sorted(range(len(tests)), key=lambda i: tests[i].p)):
        least = max(least, min(1.0, (len(tests) - rank) * tests[number].p))
        adjusted[number] = least
    return [Held(student, test, adjusted[i]) for i, (student, test) in enumerate(zip(students[1:], tests, strict=True))]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of points (cost, gain) the numbers of those that no other beats in one without losing in the other, by cost."""
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[number][1] > points[front[-1]][1]:
            front.append(number)
    return front
