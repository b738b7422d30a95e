"""What recipes of every kind are made of: corpora, teachers, students and what becomes of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from softlabels.config import (
    LAYER_LOSSES,
    PENALTIES,
    Couple,
    DumpOptions,
    JointOptions,
    LossTerm,
    PruneOptions,
    Strict,
    StudentOptions,
    TeacherTraining,
    explain,
    parse_schedule,
)


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
        for key in ("compress", "direct_twin"):
            if getattr(self, key):
                raise ValueError(f"students that train together can't have '{key}', which is for one by itself")
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
    if any(term.loss not in (*LAYER_LOSSES, *PENALTIES) for term in phase.terms):
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
