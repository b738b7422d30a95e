"""The figures of a report, drawn by matplotlib. Each function gives an SVG element for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from softlabels.report.curves import Curve
from softlabels.report.students import Student, pareto_front
from softlabels.report.svg import INK, LINE, MUTED, PAPER, SERIES, WIDTH, page_style, plain, to_svg
from softlabels.scoring.figures import Calibration

MARKS = ["o", "s", "^", "D", "v", "P", "X", "h"]
_DASHES = ["-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (5, 1.2, 1, 1.2)), "-", (0, (5, 1.5)), (0, (2, 1.2)), "-"]
_LEAST_SPAN = 5.0  # points of accuracy that a curve's axis covers at least
_MOST_CELLS = 12  # classes whose confusions are written out; of more they are only coloured


@dataclass(frozen=True, slots=True)
class TeacherPoint:
    """The teacher in a scatter: what it costs, and its accuracy."""

    cost: float
    accuracy: float


def draw_scatter(
    name: str, students: Sequence[Student], cost: Callable[[Student], float], axis: str, *, teacher: TeacherPoint | None
) -> str:
    """Accuracy against a cost, both means over the seeds; bars are the intervals, the line is the Pareto front."""
    points = [(cost(student), 100 * student.accuracy) for student in students]
    front = pareto_front(points)
    tips = {}
    with page_style():
        figure = Figure(figsize=(WIDTH, 3.4))
        axes = figure.subplots()
        axes.plot([points[i][0] for i in front], [points[i][1] for i in front], color=SERIES[0], lw=1.4, zorder=2)
        for number, (student, (x, y)) in enumerate(zip(students, points, strict=True)):
            tips[f"tip{number}"] = f"{number + 1}. {student.name}: {y:.1f} %, {axis.split(',')[0]} {x:.3g}"
            about = student.found.intervals.get("accuracy")
            if about is not None:
                low, high = (100 * (bound - student.found.accuracy) + y for bound in (about.low, about.high))
                axes.plot([x, x], [low, high], color=SERIES[0], lw=1, alpha=0.35, zorder=2)
            on_front = number in front
            face, edge = (SERIES[0], PAPER) if on_front else (PAPER, SERIES[0])
            above = 3 + 0.5 * (1 - number / len(points))  # where they lie on one another, the better one is seen
            (dot,) = axes.plot([x], [y], "o", ms=15, mfc=face, mec=edge, mew=1.2, zorder=above)
            dot.set_gid(f"tip{number}")
            color = PAPER if on_front else SERIES[0]
            axes.annotate(
                str(number + 1), (x, y), ha="center", va="center_baseline", fontsize=8.5, color=color, zorder=above
            )
        if teacher is not None:
            y = 100 * teacher.accuracy
            (star,) = axes.plot([teacher.cost], [y], "*", ms=17, color=SERIES[1], zorder=5)
            star.set_gid("tipT")
            tips["tipT"] = f"teacher: {y:.1f} %, {teacher.cost:.3g}"
            axes.annotate(
                "teacher",
                (teacher.cost, y),
                (0, 11),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                color=SERIES[1],
            )
        costs = [x for x, _ in points] + ([teacher.cost] if teacher is not None else [])
        _log_axis(axes, costs)
        axes.margins(x=0.12, y=0.12)
        axes.set_xlabel(axis)
        axes.set_ylabel("accuracy, %")
        alt = f"Accuracy against {axis}. On the Pareto front, cheapest first: " + ", ".join(
            f"{i + 1} {students[i].name} ({points[i][0]:.3g}, {points[i][1]:.1f} %)" for i in front
        )
        return to_svg(figure, name, alt=alt, tips=tips)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values span much, with numbers that can be read."""
    low, high = min(values), max(values)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    if low <= 0 or high / low < 4:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    axes.set_xscale("log")
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [1, 2, 5] if high / low < 60 else [1, 3] if high / low < 1000 else [1]
    axes.xaxis.set_major_locator(FixedLocator([step * 10.0**power for power in powers for step in steps]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw_curve(name: str, curve: Curve) -> str:
    """Accuracy along one setting: lines are means over the seeds, bands their least and best."""
    with page_style():
        figure = Figure(figsize=(WIDTH, 3.2))
        axes = figure.subplots()
        for number, line in enumerate(curve.lines):
            x = [point.x for point in line.points]
            mean, low, high = (
                np.array([100 * getattr(p, key) for p in line.points]) for key in ("mean", "low", "high")
            )
            color = SERIES[number]
            axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
            axes.plot(x, mean, color=color, marker=MARKS[number], ms=6, ls=_DASHES[number], label=plain(line.name, 44))
        _span_at_least(axes, _LEAST_SPAN)
        values = sorted({point.x for line in curve.lines for point in line.points})
        if len(values) <= 6 and values[0] > 0 and values[-1] / values[0] >= 4:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        if len(values) <= 6:
            axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        axes.set_xlabel(plain(curve.label, 50))
        axes.set_ylabel("accuracy, %")
        if len(curve.lines) > 1:
            figure.legend(loc="outside lower left", fontsize=9, frameon=False, ncols=1)
            figure.set_size_inches(WIDTH, 3.2 + 0.2 * len(curve.lines))
        best = max((point for line in curve.lines for point in line.points), key=lambda point: point.mean)
        alt = f"Accuracy along {curve.label}: best {100 * best.mean:.1f} % at {best.x:g}"
        return to_svg(figure, name, alt=alt)


def _span_at_least(axes: Axes, span: float) -> None:
    """Widen a vertical axis of percents: a difference of a row or two shall not look like one of everything."""
    low, high = axes.get_ylim()
    if high - low < span:
        least = min(max((low + high - span) / 2, 0), 100 - span)
        axes.set_ylim(least, least + span)


@dataclass(frozen=True, slots=True)
class History:
    """A student's epochs: one line a seed."""

    name: str
    lines: list[list[tuple[float, float]]]  # (epoch, value)


def draw_training(name: str, histories: Sequence[History], label: str) -> str:
    """A value epoch by epoch; the first students in colours of their own, all others in grey."""
    with page_style():
        figure = Figure(figsize=(WIDTH, 3.0))
        axes = figure.subplots()
        for number, history in reversed(list(enumerate(histories))):
            color, alpha = (SERIES[number], 0.9) if number < len(SERIES) else (MUTED, 0.3)
            dash = _DASHES[number] if number < len(SERIES) else "-"
            for line in history.lines:
                epochs, values = zip(*line, strict=True)
                mark = MARKS[number % len(MARKS)] if len(line) < 12 else None
                axes.plot(epochs, values, color=color, ls=dash, lw=1.3, marker=mark, ms=3.5, alpha=alpha)
        seen = [value for history in histories for line in history.lines for _, value in line]
        if min(seen) > 0 and max(seen) > 30 * min(seen):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        return to_svg(figure, name, alt=f"{label}, epoch by epoch, of {len(histories)} students")


def draw_confusion(name: str, counts: np.ndarray, names: Sequence[str], whose: str) -> str:
    """Counts (C, C): of each label's rows (down) which class was said (across); a cell is as dark as its share."""
    classes = len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    small = classes <= _MOST_CELLS
    with page_style():
        side = WIDTH if classes > 6 else WIDTH * 0.9
        figure = Figure(figsize=(side, side * 0.92))
        axes = figure.subplots()
        axes.grid(False)
        axes.set_aspect("equal")
        axes.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5))
        if small:
            _write_cells(axes, counts, shares)
            axes.set_xticks(
                range(classes),
                [plain(n, 14) for n in names],
                rotation=0 if classes < 4 else 40,
                ha="center" if classes < 4 else "right",
                fontsize=9.5,
            )
            axes.set_yticks(range(classes), [plain(n, 14) for n in names], fontsize=9.5)
        else:
            picture = np.zeros((classes, classes, 4))  # red, green, blue, and as opaque as the share
            picture[..., :3] = np.where(np.eye(classes, dtype=bool)[..., None], (0.27, 0.47, 0.73), (0.93, 0.4, 0.3))
            picture[..., 3] = shares**0.6  # that the few are seen too
            axes.imshow(picture, interpolation="none", aspect="equal")
            ticks = list(range(0, classes, max(1, round(classes / 8))))
            axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
            axes.set_yticks(ticks, [str(tick + 1) for tick in ticks])
        number = "" if small else ", by number"
        axes.set_xlabel(f"said{number}")
        axes.set_ylabel(f"label{number}")
        right = int(np.trace(counts))
        alt = f"Confusion matrix of {whose}: {right:,} of {int(counts.sum()):,} rows right"
        return to_svg(figure, name, alt=alt)


def _write_cells(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    size = 12 if len(counts) <= 4 else 9 if len(counts) <= 8 else 7
    for (row, column), count in np.ndenumerate(counts):
        color = SERIES[0] if row == column else SERIES[1]
        cell = Rectangle((column - 0.5, row - 0.5), 1, 1, fc=color, ec=LINE, alpha=None, lw=0)
        cell.set_alpha(0.75 * float(shares[row, column]))
        axes.add_patch(cell)
        text = f"{int(count):,}" + (f"\n{100 * shares[row, column]:.0f} %" if len(counts) <= 4 else "")
        axes.annotate(text, (column, row), ha="center", va="center", fontsize=size, color=INK)


def draw_reliability(name: str, found: Calibration, whose: str) -> str:
    """Accuracy against confidence, bin by bin (Guo et al. 2017, fig. 1); below, how many rows each bin has."""
    filled = [bar for bar in found.diagram if bar.rows]
    with page_style():
        figure = Figure(figsize=(WIDTH * 0.9, 3.6))
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot([0, 100], [0, 100], color=MUTED, lw=1, ls=(0, (3, 2)))
        for bar in filled:
            assert bar.accuracy is not None and bar.confidence is not None  # it has rows
            left, width = 100 * bar.lower, 100 * (bar.upper - bar.lower)
            axes.bar(left, 100 * bar.accuracy, width, align="edge", color=SERIES[0], alpha=0.35, ec=SERIES[0], lw=0.8)
            axes.plot([100 * bar.confidence] * 2, [100 * bar.accuracy, 100 * bar.confidence], color=SERIES[1], lw=2)
            below.bar(left, bar.rows, width, align="edge", color=MUTED, alpha=0.6, ec=MUTED, lw=0.5)
        lowest = min((100 * bar.lower for bar in filled), default=0.0)
        axes.set(xlim=(lowest, 100), ylim=(0, 100), ylabel="right, %")
        below.set(xlabel="confidence, %", ylabel="rows")
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        below.grid(axis="x", visible=False)
        alt = f"Reliability of {whose}: error {100 * found.ece:.1f} %, mean confidence {100 * found.confidence:.1f} %"
        return to_svg(figure, name, alt=alt)
