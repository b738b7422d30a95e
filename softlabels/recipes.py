"""Recipes: a YAML file that describes one experiment from corpus to student, as a checked `Recipe`.

Unknown keys are refused with the key that was probably meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from softlabels.config import (
    BASE,
    LAYER_LOSSES,
    PRETRAINED,
    TEACHER,
    AugmentOptions,
    Couple,
    DumpOptions,
    JointOptions,
    LossTerm,
    MultiTaskOptions,
    Strict,
    StudentOptions,
    TeacherTraining,
    build_options,
    explain,
    parse_options,
    parse_schedule,
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


class JointChoice(Strict):
    """A second student, called 'local', that trains together with its entry's, then called 'global'."""

    local: StudentOptions  # what it leaves open of the training (epochs, lr, …) is as in the entry
    couple: Couple = Couple()
    alone: bool = True  # each student by itself, on the same losses, is trained beside


class StudentEntry(StudentOptions):
    """One student of a recipe; with `hard_twin`, the same student on hard labels alone is trained beside it.

    With `joint` a second student trains together with it, and both are evaluated alone and averaged.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    hard_twin: bool = True
    hard_epochs: int | None = Field(default=None, ge=1)  # the twin sees fewer rows, and may need more epochs
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0], min_length=1)
    joint: JointChoice | None = None

    @model_validator(mode="after")
    def _pair(self) -> StudentEntry:
        if self.joint is None:
            return self
        if (self.hard_twin and "hard_twin" in self.model_fields_set) or self.hard_epochs is not None:
            raise ValueError("students that train together have no hard twin: 'joint.alone' trains each by itself")
        if not {"losses", "phases"} & self.joint.local.model_fields_set:
            raise ValueError("joint.local: say what it learns from with 'losses'")
        try:
            self.joint_options()
        except ValidationError as error:
            raise ValueError(explain(error, where="joint")) from None
        return self

    def student_options(self, *, seed: int | None = None) -> StudentOptions:
        """The entry's student by itself."""
        values = {name: getattr(self, name) for name in StudentOptions.model_fields}
        return StudentOptions(**values | ({} if seed is None else {"seed": seed}))

    def joint_options(self, *, seed: int | None = None) -> JointOptions:
        """The two students of `joint`."""
        assert self.joint is not None
        own = self.student_options(seed=seed)
        said = {name: getattr(self.joint.local, name) for name in self.joint.local.model_fields_set}
        of_its_own = ("student", "options", "losses", "temperature", "phases")
        shared = {name: getattr(own, name) for name in StudentOptions.model_fields if name not in of_its_own}
        return JointOptions(
            students={"global": own, "local": StudentOptions(**shared | said)}, couple=self.joint.couple
        )


def alone_options(options: JointOptions, name: str) -> StudentOptions:
    """A student of two by itself, on the same losses.

    One that the other alone would teach to answer learns that from the teacher's logits instead, by the coupling's
    weight: the plainest training that gives it a head.
    """
    student = options.students[name]
    phase, how = student.all_phases()[0], options.couple
    if any(term.loss not in LAYER_LOSSES for term in phase.terms):
        return student
    if parse_schedule(how.kl, what="weight").end > 0:
        head = LossTerm(loss="kl", weight=how.kl, temperature=how.temperature)
    else:
        head = LossTerm(loss="mse_logits", weight=how.l2)
    losses = [*phase.terms, head]
    if student.phases:
        return student.model_copy(update={"phases": [student.phases[0].model_copy(update={"losses": losses})]})
    return student.model_copy(update={"losses": losses})


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
        starts = [(student.name, student.options) for student in self.students]
        starts += [(student.name, student.joint.local.options) for student in self.students if student.joint]
        starting = [name for name, options in starts if options.get("init_from") == PRETRAINED]
        if starting and self.pretrain is None:
            raise ValueError(f"student '{starting[0]}' starts from '{PRETRAINED}', and the recipe has no 'pretrain'")
        return self


class TaskEntry(Strict):
    """One task of several: its corpus, its teacher, and what is dumped of it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    corpus: CorpusChoice
    teacher: TeacherChoice
    dump: DumpOptions = DumpOptions()


class MultiTaskRecipe(Strict):
    """An experiment of several tasks, whose students share one encoder.

    The student's option `init_from` may be a folder, or 'base', the model that all teachers were tuned from.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    tasks: list[TaskEntry] = Field(min_length=2)
    student: MultiTaskOptions
    alone: bool = True  # a student for each task by itself, on the same losses, is trained beside
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0], min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> MultiTaskRecipe:
        names = [task.name for task in self.tasks]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two tasks are called '{doubled[0]}': give each a name of its own")
        for name in self.student.tasks:
            if name not in names:
                raise ValueError(
                    f"student.tasks speaks of '{name}': there are {', '.join(names)}.{suggest(name, names)}"
                )
        start = self.student.options.get("init_from")
        if start in (TEACHER, PRETRAINED):
            raise ValueError(f"a student of several tasks can't start from '{start}': name a folder, or '{BASE}'")
        if start == BASE and len({task.teacher.model for task in self.tasks}) > 1:
            raise ValueError(
                f"the student starts from '{BASE}', and the tasks' teachers were tuned from several models"
            )
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
    found = read_experiment(name, changes=changes)
    if isinstance(found, MultiTaskRecipe):
        raise ConfigError(
            f"recipe {found.name} has several tasks: softlabels run runs it, and train-multitask trains its student"
        )
    return found


def read_experiment(name: str, *, changes: Sequence[str] = ()) -> Recipe | MultiTaskRecipe:
    """The same of one task, or of several: a recipe that has `tasks`."""
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
    return build_options(MultiTaskRecipe if "tasks" in data else Recipe, data, where=f"recipe {path}")


def joint_of_recipe(name: str, student: str | None, *, changes: Sequence[str] = (), seed: int | None) -> JointOptions:
    """The two students of a recipe's entry that has `joint`: the one called `student`, or the only one."""
    recipe = read_recipe(name, changes=changes)
    pairs = {entry.name: entry for entry in recipe.students if entry.joint is not None}
    if not pairs:
        raise ConfigError(f"recipe {recipe.name} has no students that train together: give an entry of it 'joint'")
    if student is None and len(pairs) == 1:
        student = next(iter(pairs))
    if student not in pairs:
        asked = "say which with --student" if student is None else f"'{student}' is not one of them"
        raise ConfigError(f"recipe {recipe.name}: {asked}: students that train together are {', '.join(pairs)}")
    return pairs[student].joint_options(seed=seed)


def tasks_of_recipe(name: str) -> MultiTaskOptions:
    """How a recipe of several tasks trains its student."""
    found = read_experiment(name)
    if not isinstance(found, MultiTaskRecipe):
        raise ConfigError(f"recipe {found.name} is of one task: train-student trains its students")
    return found.student


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
