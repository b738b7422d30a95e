"""Recipes: a YAML file that describes one experiment from corpus to student, as a checked `Recipe`.

Unknown keys are refused with the key that was probably meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from softlabels.config import (
    ASSISTANT,
    BASE,
    LAYER_LOSSES,
    PRETRAINED,
    TEACHER,
    AugmentOptions,
    CombineOptions,
    Couple,
    DumpOptions,
    JointOptions,
    LossTerm,
    MultiTaskOptions,
    PruneOptions,
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


class EnsembleTeacher(TeacherChoice):
    """One teacher of several; what they say together teaches the students.

    `corpus` is what it is trained on where that isn't the recipe's: the rows that a federated party keeps to itself.
    """

    weight: float = Field(default=1.0, gt=0)
    corpus: CorpusChoice | None = None


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


class JointChoice(Strict):
    """A second student, called 'local', that trains together with its entry's, then called 'global'."""

    local: StudentOptions  # what it leaves open of the training (epochs, lr, …) is as in the entry
    couple: Couple = Couple()
    alone: bool = True  # each student by itself, on the same losses, is trained beside


class StudentEntry(StudentOptions):
    """One student of a recipe; with `hard_twin`, the same student on hard labels alone is trained beside it.

    `compress` lists chains of steps, each starting from the trained student and each a row of a table of its own.
    With `joint` a second student trains together with it, and both are evaluated alone and averaged.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    hard_twin: bool = True
    hard_epochs: int | None = Field(default=None, ge=1)  # the twin sees fewer rows, and may need more epochs
    direct_twin: bool = False  # with assistants: the same student, from the teacher's own cache, beside it
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0], min_length=1)
    compress: list[Annotated[list[CompressStep], Field(min_length=1)]] = Field(default=[])
    joint: JointChoice | None = None

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
        return plain_options(self, {} if seed is None else {"seed": seed})

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


class Assistant(StudentOptions):
    """A model between the teacher and the students: it learns from the cache before it, and is dumped as the next.

    Teacher assistants (Mirzadeh et al. 2020, arXiv:1902.03393). A shape that is not given is MiniLM's (Wang et al.
    2020, section 3.4): as deep as the teacher, as wide as the first student that is a transformer.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    student: str = "transformer"
    dump: DumpOptions | None = None  # of its own cache; None: as the recipe's

    @field_validator("student")
    @classmethod
    def _dumpable(cls, value: str) -> str:
        if value != "transformer":
            raise ValueError(f"an assistant is dumped as a teacher is, so it must be a transformer; not {value}")
        return value


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
    'teacher', 'pretrained' (the student of `pretrain`), or 'assistant' (the last of the `assistants`).

    Of several `teachers` each labels the same rows, and `combine` says how that becomes one cache; `teacher` is then
    the first of them, whose tokens the students read.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    corpus: CorpusChoice
    teacher: TeacherChoice
    teachers: list[EnsembleTeacher] = Field(default=[])
    combine: CombineOptions = CombineOptions()  # how, of several teachers
    dump: DumpOptions = DumpOptions()
    augment: AugmentOptions | None = None  # what the teacher labels for the students is made larger first
    pretrain: Pretraining | None = None
    # each learns from the one before it, the first from the teacher; the students learn from the last
    assistants: list[Assistant] = Field(default=[])
    students: list[StudentEntry] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _first_teacher(cls, data: Any) -> Any:
        """What a recipe of several teachers says of the first one stands for `teacher` too."""
        if not isinstance(data, dict) or not isinstance(data.get("teachers"), list) or not data["teachers"]:
            return data
        if data.get("teacher") is not None:
            raise ValueError("a recipe has a 'teacher' or 'teachers': write the one among the others")
        first = data["teachers"][0]
        if not isinstance(first, dict):
            return data
        return data | {"teacher": {key: value for key, value in first.items() if key not in ("weight", "corpus")}}

    @model_validator(mode="after")
    def _ensemble(self) -> Recipe:
        if len(self.teachers) == 1:
            raise ValueError("'teachers' has one entry: call it 'teacher', or give it company")
        if not self.teachers and self.combine != CombineOptions():
            raise ValueError("'combine' is about several 'teachers', and this recipe has one")
        if self.teachers and self.dump.capture not in ([], ["logits"]):
            raise ValueError("of several teachers only logits are combined: leave other captures out of 'dump'")
        if self.combine.weights is not None:
            raise ValueError("combine.weights: say each teacher's 'weight' where the teacher is")
        if self.teachers:
            self.combine_options()
        return self

    def combine_options(self) -> CombineOptions:
        """How the caches of `teachers` are combined; ConfigError where their weights have no say in it."""
        weights = [teacher.weight for teacher in self.teachers]
        given = {} if len(set(weights)) == 1 else {"weights": weights}
        return build_options(CombineOptions, self.combine.model_dump(exclude_unset=True) | given, where="combine")

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
        hops = [assistant.name for assistant in self.assistants]
        if doubled := sorted({name for name in hops if hops.count(name) > 1 or name in names}):
            raise ValueError(f"two models are called '{doubled[0]}': give each assistant a name of its own")
        if self.assistants and self.assistants[0].options.get("init_from") == ASSISTANT:
            raise ValueError(f"assistant '{hops[0]}' can't start from '{ASSISTANT}': there is none before it")
        for student in self.students:
            if not hops and (student.direct_twin or student.options.get("init_from") == ASSISTANT):
                asked = "direct_twin" if student.direct_twin else f"init_from: {ASSISTANT}"
                raise ValueError(f"student '{student.name}' has {asked}, and the recipe has no 'assistants'")
            if student.direct_twin and student.options.get("init_from") == ASSISTANT:
                raise ValueError(
                    f"student '{student.name}' starts from '{ASSISTANT}', so it has no direct_twin: that knows the "
                    f"teacher alone"
                )
        starts = [(student.name, student.options) for student in self.students]
        starts += [(student.name, student.joint.local.options) for student in self.students if student.joint]
        starting = [name for name, options in starts if options.get("init_from") == PRETRAINED]
        if starting and self.pretrain is None:
            raise ValueError(f"student '{starting[0]}' starts from '{PRETRAINED}', and the recipe has no 'pretrain'")
        return self


class Parties(Strict):
    """How the labelled rows of a corpus are divided among the parties of a federation: see `softlabels.parties`."""

    count: int = Field(ge=2, le=1000)
    skew: float = Field(default=0.5, gt=0)  # concentration of the Dirichlet distribution: smaller is more uneven
    rows: int | None = Field(default=None, ge=4)  # labelled ones that each has, at the most
    seed: int = Field(default=0, ge=0, lt=2**32)


class FederatedCorpus(Strict):
    """What the parties hold of their own, what they have in common, and what all are tested on."""

    source: str
    train: str | None = None  # the split whose labelled rows are divided among the parties
    common: str | None = None  # the split that all know; its labels are not looked at
    common_source: str | None = None  # another file for that
    test: str | None = None
    test_source: str | None = None
    text: str | None = None
    label: str | None = None
    rows: int | None = Field(default=None, ge=1)  # of train and of common

    @model_validator(mode="after")
    def _says_what_is_common(self) -> FederatedCorpus:
        if self.common is None and self.common_source is None:
            raise ValueError("say what all parties know: common (a split) or common_source (a file)")
        if self.test is None and self.test_source is None:
            raise ValueError("say what to test on: test (a split) or test_source (a file)")
        return self


class FederatedRecipe(Strict):
    """Parties that tell each other logits on a common corpus, and nothing else: FedMD, FedDF.

    Every party trains a `teacher` on rows of its own and dumps its logits on the common corpus; the caches are
    combined, and every party's `student` learns from the consensus. With `revisit` it then goes on, on its own labels
    (FedMD's 'revisit'); of several `rounds` that is the party's teacher in the next.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    corpus: FederatedCorpus
    parties: Parties
    teacher: TeacherChoice
    dump: DumpOptions = DumpOptions()
    combine: CombineOptions = CombineOptions()
    student: StudentOptions
    hard_epochs: int | None = Field(default=None, ge=1)  # of the same student on the party's own labels alone
    revisit: TeacherTraining | None = None
    rounds: int = Field(default=1, ge=1, le=100)

    @model_validator(mode="after")
    def _fits(self) -> FederatedRecipe:
        if self.teacher.train is None:
            raise ValueError("each party trains a teacher on its own rows: say how with teacher.train")
        for name, training in (("teacher.train", self.teacher.train), ("revisit", self.revisit)):
            if training is not None and training.task != "sequence-classification":
                raise ValueError(f"{name}: parties agree on classes, so its task is sequence-classification")
        if self.dump.capture not in ([], ["logits"]):
            raise ValueError("parties tell each other logits alone: leave other captures out of 'dump'")
        if self.combine.keep or self.combine.choose == "label":
            raise ValueError(
                "the common rows have no labels, and no party's logits are handed on: leave out "
                "combine.keep and combine.choose: label"
            )
        if self.combine.weights is not None and len(self.combine.weights) != self.parties.count:
            raise ValueError(
                f"combine.weights has {len(self.combine.weights)} numbers for {self.parties.count} parties"
            )
        if self.student.options.get("init_from") in (TEACHER, PRETRAINED, ASSISTANT):
            raise ValueError(
                f"student: init_from: {self.student.options['init_from']} is no model that all parties have"
            )
        if "ce" in self.student.loss_names():
            raise ValueError(
                "the common rows have no labels: leave loss 'ce' out; 'revisit' is for a party's own labels"
            )
        if self.revisit is not None and self.student.student != "transformer":
            raise ValueError(
                f"'revisit' fine-tunes a student as a teacher is, so it must be a transformer; not "
                f"{self.student.student}"
            )
        if self.rounds > 1 and self.revisit is None:
            raise ValueError(
                "in a second round the parties' students teach, after some training on their own rows: say "
                "how with 'revisit'"
            )
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


Experiment = Recipe | FederatedRecipe | MultiTaskRecipe


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
    """The recipe `name` (a YAML file or a shipped name), after `KEY=VALUE` changes (`students.0.lr=1e-3`).

    ConfigError for a federation and for one of several tasks, which are no such recipes.
    """
    found = read_experiment(name, changes=changes)
    if isinstance(found, MultiTaskRecipe):
        raise ConfigError(
            f"recipe {found.name} has several tasks: softlabels run runs it, and train-multitask trains its student"
        )
    if isinstance(found, FederatedRecipe):
        raise ConfigError(f"recipe {found.name} is a federation of parties: softlabels run takes it")
    return found


def read_experiment(name: str, *, changes: Sequence[str] = ()) -> Experiment:
    """A recipe of whatever kind its keys say: `tasks` are several, `parties` are a federation."""
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
        set_key(data, key, value)
    kind: type[Strict] = MultiTaskRecipe if "tasks" in data else FederatedRecipe if "parties" in data else Recipe
    return build_options(kind, data, where=f"recipe {path}")


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
    return plain_options(entries[student], {})


def plain_options(entry: StudentOptions, changes: dict[str, Any]) -> StudentOptions:
    """The options of a recipe's entry without what only the recipe needs, and with `changes`."""
    return StudentOptions(**({key: getattr(entry, key) for key in StudentOptions.model_fields} | changes))


def on_labels_alone(student: StudentOptions, hard_epochs: int | None) -> dict[str, Any]:
    """What makes `student` its hard-label twin, in as many epochs as its phases have where none are given."""
    phases = student.all_phases()
    return {
        "losses": {"ce": 1.0},
        "temperature": "1",
        "phases": [],
        "epochs": hard_epochs or sum(phase.epochs or 0 for phase in phases),
        "lr": phases[-1].lr,  # the one at which it learns to answer
    }


def set_key(data: Any, key: str, value: Any) -> None:
    """Set `a.b.0.c` inside nested dicts and lists; students, phases and losses may be addressed by name."""
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
    names = [item.get("name", item.get("loss")) if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise ConfigError(
        f"--set {key}: no entry '{part}'; there are {', '.join(str(n) for n in names)} or 0 to {len(items) - 1}"
    )
