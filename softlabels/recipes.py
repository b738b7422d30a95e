"""Recipes: a YAML file that describes one experiment from corpus to student, as a checked `Recipe`.

Unknown keys are refused with the key that was probably meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from softlabels.config import (
    BASE,
    PRETRAINED,
    TEACHER,
    AugmentOptions,
    DumpOptions,
    PruneOptions,
    Strict,
    StudentOptions,
    TeacherTraining,
    build_options,
    parse_options,
    read_yaml,
    suggest,
)
from softlabels.errors import ConfigError


class CorpusChoice(Strict):
    """Which rows each stage of a recipe sees. A stage without a split of its own takes the whole source."""

    source: str
    train: str | None = None  # the split with labels that the teacher learns from
    transfer: str | None = None  # the split(s) the teacher labels for the students; by default `train`
    test: str | None = None
    test_source: str | None = None  # another file to test on
    text: str | None = None
    label: str | None = None
    rows: int | None = Field(default=None, ge=1)


class TeacherChoice(Strict):
    """The teacher: a pretrained model that is fine-tuned (`train`), or one that is ready."""

    model: str
    train: TeacherTraining | None = None


class Retraining(Strict):
    """What a training from the same cache, of a student that was trained before, does otherwise than the first one."""

    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0)


class CompressStep(Strict):
    """One of: `prune`, `retrain` (distil again, what was pruned stays zero), and `onnx` or `int8`, which come last."""

    prune: PruneOptions | None = None
    retrain: Retraining | None = None
    export: Literal["onnx", "int8"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_a_word(cls, value: Any) -> Any:
        if value == "retrain" or value == {"retrain": None}:
            return {"retrain": {}}
        return {"export": value} if value in ("onnx", "int8") else value

    @model_validator(mode="after")
    def _one_thing(self) -> CompressStep:
        if sum(part is not None for part in (self.prune, self.retrain, self.export)) != 1:
            raise ValueError("a step is one of {prune: {magnitude: 0.5}}, retrain, onnx and int8")
        return self

    def say(self) -> str:
        """In a few words: 'prune magnitude 0.5'."""
        if self.prune is not None:
            return f"prune {self.prune.say()}"
        return self.export or "retrain"


class StudentEntry(StudentOptions):
    """One student of a recipe; with `hard_twin`, the same student on hard labels alone is trained beside it.

    `compress` lists chains of steps, each starting from the trained student and each a row of a table of its own.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    hard_twin: bool = True
    hard_epochs: int | None = Field(default=None, ge=1)  # the twin sees fewer rows, and may need more epochs
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0], min_length=1)
    compress: list[Annotated[list[CompressStep], Field(min_length=1)]] = Field(default=[])

    @model_validator(mode="after")
    def _chains_can_be(self) -> StudentEntry:
        if self.compress and self.student == "linear":
            raise ValueError(f"student '{self.name}' is linear, and no network to compress: leave out 'compress'")
        for chain in self.compress:
            words = ", ".join(step.say() for step in chain)
            if any(step.export for step in chain[:-1]):
                raise ValueError(f"student '{self.name}': nothing can follow onnx or int8 in the steps '{words}'")
            if self.student != "transformer" and any(step.prune and step.prune.heads for step in chain):
                raise ValueError(
                    f"student '{self.name}' is a {self.student}, which has no attention heads: prune a magnitude "
                    f"instead"
                )
            if sum([step.say() for step in chain] == [step.say() for step in other] for other in self.compress) > 1:
                raise ValueError(f"student '{self.name}': the steps '{words}' are given twice")
        return self


class Pretraining(Strict):
    """An earlier distillation, from a cache of its own; the recipe's students start from its student.

    General distillation (TinyBERT), distillation of a language model (DistilBERT): a teacher that is not tuned to the
    task, and text of any kind.
    """

    corpus: CorpusChoice
    teacher: TeacherChoice
    dump: DumpOptions = DumpOptions()
    student: StudentOptions


class Recipe(Strict):
    """One experiment, from corpus to students.

    A student's option `init_from` may be a folder, or 'base' (the pretrained model that the teacher was tuned from),
    'teacher', or 'pretrained' (the student of `pretrain`).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    corpus: CorpusChoice
    teacher: TeacherChoice
    dump: DumpOptions = DumpOptions()
    augment: AugmentOptions | None = None  # what the teacher labels for the students is made larger first
    pretrain: Pretraining | None = None
    students: list[StudentEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [student.name for student in self.students]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two students are called '{doubled[0]}': give each a name of its own")
        if self.pretrain is not None and self.pretrain.student.options.get("init_from") == PRETRAINED:
            raise ValueError(f"the student of 'pretrain' can't start from '{PRETRAINED}', which is itself")
        for student in self.students:
            start, blank = student.options.get("init_from"), self.teacher.train and self.teacher.train.from_scratch
            if blank and start == BASE:
                raise ValueError(
                    f"student '{student.name}' starts from '{BASE}', and this teacher is made from nothing"
                )
            if blank and start == TEACHER and student.hard_twin:
                raise ValueError(
                    f"the twin of student '{student.name}' would start from what the teacher was tuned from, which is "
                    f"nothing: give it hard_twin: false"
                )
        starting = [student.name for student in self.students if student.options.get("init_from") == PRETRAINED]
        if starting and self.pretrain is None:
            raise ValueError(f"student '{starting[0]}' starts from '{PRETRAINED}', and the recipe has no 'pretrain'")
        return self


def recipes_folder() -> Path:
    """Where the recipes lie: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "pipeline"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "pipeline"


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of a recipe that ships with softlabels."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipes_folder() / f"{name}.yaml"
    if re.fullmatch(r"[\w.-]+", name) and shipped.is_file():
        return shipped
    names = sorted(recipe.stem for recipe in recipes_folder().glob("*.yaml"))
    raise ConfigError(f"no recipe '{name}': neither a file nor one of {', '.join(names)}.{suggest(name, names)}")


def read_recipe(name: str, *, changes: Sequence[str] = ()) -> Recipe:
    """The recipe `name` (a YAML file or a shipped name), after `KEY=VALUE` changes (`students.0.lr=1e-3`)."""
    path = find_recipe(name)
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"recipe {path} is nested too deeply") from None
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    for key, value in parse_options(changes).items():
        _set(data, key, value)
    return build_options(Recipe, data, where=f"recipe {path}")


def student_of_recipe(name: str, student: str | None) -> StudentOptions:
    """How a recipe trains its student called `student`, its only one where None; 'pretrain' is the one before them."""
    recipe = read_recipe(name)
    entries: dict[str, StudentOptions] = {entry.name: entry for entry in recipe.students}
    if recipe.pretrain is not None:
        entries.setdefault("pretrain", recipe.pretrain.student)
    if student is None and len(recipe.students) == 1:
        student = recipe.students[0].name
    if student not in entries:
        asked = "say which of its students with --student" if student is None else f"it has no student '{student}'"
        raise ConfigError(
            f"recipe {recipe.name}: {asked}: there are {', '.join(entries)}.{suggest(student or '', entries)}"
        )
    chosen = entries[student]
    return StudentOptions(**{key: getattr(chosen, key) for key in StudentOptions.model_fields})


def _set(data: Any, key: str, value: Any) -> None:
    """Set `a.b.0.c` inside nested dicts and lists; students may be addressed by name."""
    *parents, last = key.split(".")
    for part in parents:
        data = _child(data, part, key)
    if isinstance(data, list):
        data[_position(data, last, key)] = value
    elif isinstance(data, dict):
        data[last] = value
    else:
        raise ConfigError(f"--set {key}: there is nothing below '{parents[-1]}' to set")


def _child(data: Any, part: str, key: str) -> Any:
    if isinstance(data, list):
        return data[_position(data, part, key)]
    if not isinstance(data, dict):
        raise ConfigError(f"--set {key}: '{part}' lies below a single value")
    return data.setdefault(part, {})


def _position(items: list, part: str, key: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise ConfigError(
        f"--set {key}: no entry '{part}'; there are {', '.join(str(n) for n in names)} or 0 to {len(items) - 1}"
    )
