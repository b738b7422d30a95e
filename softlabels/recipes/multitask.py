"""A recipe of several tasks, which one encoder learns."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from softlabels.config import BASE, PRETRAINED, TEACHER, DumpOptions, MultiTaskOptions, Strict, refuse_doubled, suggest
from softlabels.recipes.parts import CorpusChoice, TeacherChoice


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
        refuse_doubled(names, "tasks")
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
