"""What a sweep tries: keys of a student's options with lists or ranges of values come in, trials' options go out.

A key is one of `StudentOptions`, or a path into it: `temperature`, `lr`, `options.hidden_size`, `losses.kl`,
`phases.0.epochs`.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from softlabels.config import Strict, StudentOptions, build_options, fingerprint, parse_value, read_yaml
from softlabels.errors import ConfigError
from softlabels.recipes import set_key, student_of_recipe

METRICS = ("accuracy", "macro_f1", "agreement", "loss")
Changes = dict[str, Any]  # key: its value in one trial

_RANGE = re.compile(r"\s*([-+.\deE]+)\.\.([-+.\deE]+?)(:log)?\s*")
_LONGEST_NAME = 80
_MOST_LISTED = 100_000  # points of a grid that is shuffled; a larger one is drawn from
_SAID_BY_PHASES = {"epochs", "batch_size", "lr"}  # what is said here goes before what a recipe's phase says


@dataclass(frozen=True, slots=True)
class Choice:
    """A key, and the values that it takes."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """A key, and the numbers from `low` to `high` that it may take: evenly, or evenly in their logarithm.

    Whole numbers where both ends are.
    """

    key: str
    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Axis = Choice | Range


class SweepOptions(Strict):
    """How a space is searched, and what a trial is held by."""

    search: Literal["grid", "random", "optuna"] = "grid"
    points: int | None = Field(default=None, ge=1)  # of random and optuna: how many to try, each with all seeds
    search_seed: int = Field(default=0, ge=0, lt=2**32)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0], min_length=1)
    metric: str | None = None  # one of METRICS; None: accuracy with a validation corpus, agreement or loss without
    keep: int | None = Field(default=None, ge=1)  # run folders of so many of the best trials stay; None: all

    @model_validator(mode="after")
    def _fits(self) -> SweepOptions:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} has one twice")
        if self.metric is not None and self.metric not in METRICS:
            raise ValueError(f"no metric '{self.metric}': there are {', '.join(METRICS)}")
        if (self.search == "grid") != (self.points is None):
            raise ValueError("a grid is tried as a whole; of random and optuna say how many points")
        return self


@dataclass(frozen=True, slots=True)
class Space:
    """The axes of a sweep, and what all of its trials have in common."""

    axes: tuple[Axis, ...]
    fixed: Changes = field(default_factory=dict)
    recipe: str | None = None  # whose student is the base; `student` then names one of the recipe's

    def card(self) -> dict[str, Any]:
        """As plain data: two sweeps of the same space have the same card."""
        axes = {axis.key: list(axis.values) if isinstance(axis, Choice) else asdict(axis) for axis in self.axes}
        card: dict[str, Any] = {"axes": axes, "fixed": self.fixed, "recipe": self.recipe}
        if self.recipe is not None:  # what it says, too: the file may be another one the next time
            named = axes.get("student", [self.fixed.get("student")])
            said = {str(name): student_of_recipe(self.recipe, name) for name in named}
            card["recipe_students"] = {name: options.model_dump(mode="json") for name, options in said.items()}
        return card

    def options(self, changes: Mapping[str, Any], *, seed: int, trial: str) -> StudentOptions:
        """The options of one trial; ConfigError for keys or values that no trial can have."""
        given = {**self.fixed, **changes, "seed": seed}
        student = given.pop("student", None)
        if self.recipe is not None:
            data = student_of_recipe(self.recipe, student).model_dump(exclude_unset=True)
        elif student is None:
            raise ConfigError("say what to train: --student bilstm (or several: bilstm,linear), or --recipe NAME")
        else:
            data = {"student": student} | ({"losses": {"mse_logits": 1.0}} if student == "linear" else {})
        for phase in data.get("phases", []):
            for key in _SAID_BY_PHASES & given.keys():
                phase.pop(key, None)
        if not data.get("phases"):
            if lost := sorted(key for key in given if key.startswith("phases.")):
                raise ConfigError(
                    f"sweep, trial {trial}: '{lost[0]}' is of a phase, and this student has none: name the key itself "
                    f"('{lost[0].split('.', 2)[-1]}'), or start from a recipe that has phases (--recipe)"
                )
            data.setdefault("losses", copy.deepcopy(StudentOptions.model_fields["losses"].default))
        for key in sorted(given, key=lambda key: key.count(".")):  # `losses` before `losses.kl`
            set_key(data, key, copy.deepcopy(given[key]))
        return build_options(StudentOptions, data, where=f"sweep, trial {trial}")


@dataclass(frozen=True, slots=True)
class Point:
    """One place of the space; it is tried with every seed."""

    name: str
    changes: Changes


@dataclass(frozen=True, slots=True)
class Trial:
    """One student to train: picklable, and all that a process needs beside its `Setting`."""

    name: str  # of its folder
    point: Point
    options: StudentOptions


# ----------------------------------------------------------------------------------------------------- reading axes


def parse_axis(key: str, text: str) -> Axis:
    """'1,2,4' (YAML values) or '1e-4..1e-2:log' as an axis of `key`; ConfigError says what is wrong."""
    if (found := _RANGE.fullmatch(text)) is not None:
        low, high = parse_value(found[1]), parse_value(found[2])
        if all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high)):
            return check_axis(Range(key, low, high, found[3] is not None))
    try:
        values = read_yaml(f"[{text}]")
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"{key}={text}: write values separated by commas (1,2,4), or a range (0.1..0.9)") from None
    return check_axis(Choice(key, tuple(values)))


def check_axis(axis: Axis) -> Axis:
    """`axis` unchanged; ConfigError where there is nothing to choose from, or one value twice."""
    if isinstance(axis, Range):
        if not axis.low < axis.high:
            raise ConfigError(f"{axis.key}: the range {axis.low}..{axis.high} is empty: write the smaller end first")
        if axis.log and axis.low <= 0:
            raise ConfigError(f"{axis.key}: the range {axis.low}..{axis.high}:log begins at 0 or below")
        return axis
    if not axis.values:
        raise ConfigError(f"{axis.key} has no value: write some, separated by commas")
    seen: list[Any] = []
    for value in axis.values:
        if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in seen):
            raise ConfigError(f"{axis.key} has the value {value!r} twice")
        seen.append(value)
    return axis


def check_space(space: Space, options: SweepOptions) -> None:
    """ConfigError for axes that don't fit each other or the search; then for values that no trial can have."""
    keys = [axis.key for axis in space.axes] + list(space.fixed)
    if doubled := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"'{doubled[0]}' is given twice")
    if "seed" in keys:
        raise ConfigError("seeds are no axis of the space, for results are means over them: give --seeds 0,1,2")
    if not space.axes and len(options.seeds) == 1:
        raise ConfigError(
            "there is nothing to sweep: give several values, such as --temperature 1,2,4, or several --seeds"
        )
    if options.search == "grid" and (ranges := [axis.key for axis in space.axes if isinstance(axis, Range)]):
        raise ConfigError(f"'{ranges[0]}' is a range, which has no grid: list its values, or give --random or --optuna")
    if options.search != "grid" and not space.axes:
        raise ConfigError("there is nothing to search for: give several values, such as --temperature 1,2,4")
    for axis in space.axes:  # every value once, so that a typing error is told before the first training
        for value in axis.values if isinstance(axis, Choice) else (axis.low, axis.high):
            first = {other.key: other.values[0] if isinstance(other, Choice) else other.low for other in space.axes}
            space.options(first | {axis.key: value}, seed=0, trial=f"{axis.key}={value}")
    if not space.axes:
        space.options({}, seed=0, trial="seed-0")


# -------------------------------------------------------------------------------------------------------- searching


def count_points(space: Space, options: SweepOptions) -> int:
    """How many points are tried."""
    size = _grid_size(space)
    if options.points is None:
        assert size is not None
        return size
    return options.points if size is None or options.search == "optuna" else min(options.points, size)


def find_points(space: Space, options: SweepOptions) -> Iterator[Point]:
    """The points of a grid or of a random search, always the same ones in the same order."""
    size = _grid_size(space)
    if options.search == "grid":
        values = (axis.values for axis in space.axes if isinstance(axis, Choice))
        for chosen in itertools.product(*values):
            changes = {axis.key: value for axis, value in zip(space.axes, chosen, strict=True)}
            yield Point(point_name(changes), changes)
        return
    order: list[int] | None = None
    if size is not None and size <= _MOST_LISTED:
        order = list(range(size))
        random.Random(options.search_seed).shuffle(order)
    for number in range(count_points(space, options)):
        if order is None:
            dice = random.Random(f"{options.search_seed}-{number}")
            changes = {axis.key: _draw(axis, dice) for axis in space.axes}
        else:
            changes = _from_grid(space, order[number])
        yield Point(f"random-{number:03}", changes)


def _grid_size(space: Space) -> int | None:
    """None where an axis is a range."""
    sizes = [len(axis.values) if isinstance(axis, Choice) else 0 for axis in space.axes]
    return math.prod(sizes) or None


def _from_grid(space: Space, number: int) -> Changes:
    changes: Changes = {}
    for axis in space.axes:
        assert isinstance(axis, Choice)
        number, index = divmod(number, len(axis.values))
        changes[axis.key] = axis.values[index]
    return changes


def _draw(axis: Axis, dice: random.Random) -> Any:
    if isinstance(axis, Choice):
        return dice.choice(axis.values)
    if axis.whole and not axis.log:
        return dice.randint(int(axis.low), int(axis.high))
    low, high = (math.log(axis.low), math.log(axis.high)) if axis.log else (axis.low, axis.high)
    value = dice.uniform(low, high)
    return _round_into(axis, math.exp(value) if axis.log else value)


def _round_into(axis: Range, value: float) -> float:
    """`value` to four digits, or whole, and not beyond the range."""
    rounded = round(value) if axis.whole else float(f"{value:.4g}")
    return min(max(rounded, axis.low), axis.high)


# ------------------------------------------------------------------------------------------------------------ names


def point_name(changes: Changes) -> str:
    """'temperature-2_kl-0.3': readable, and fit for a folder; with a fingerprint where that loses something."""
    lasts = [key.rpartition(".")[2] for key in changes]
    words = []
    for (key, value), last in zip(changes.items(), lasts, strict=True):
        label = key if lasts.count(last) > 1 else last
        words.append(str(value) if key == "student" else f"{label}-{value}")
    plain = "_".join(words) or "all"
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", plain)[:_LONGEST_NAME].strip("-.")
    return name if name == plain else f"{name}-{fingerprint(changes)[:6]}"


def trials_of(space: Space, point: Point, seeds: Sequence[int]) -> list[Trial]:
    """The trials of a point, one a seed."""
    names = [f"{point.name}_seed-{seed}" if point.name != "all" else f"seed-{seed}" for seed in seeds]
    return [
        Trial(name, point, space.options(point.changes, seed=seed, trial=name))
        for name, seed in zip(names, seeds, strict=True)
    ]
