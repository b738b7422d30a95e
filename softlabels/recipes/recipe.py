"""A recipe of one task: from corpus and teachers to students."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from softlabels.config import (
    ASSISTANT,
    BASE,
    PRETRAINED,
    TEACHER,
    AugmentOptions,
    CombineOptions,
    DumpOptions,
    Strict,
    build_options,
    refuse_doubled,
)
from softlabels.recipes.parts import Assistant, CorpusChoice, EnsembleTeacher, Pretraining, StudentEntry, TeacherChoice


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
        refuse_doubled(names, "students")
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
        refuse_doubled([*names, *hops], "models", each="each assistant")
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
