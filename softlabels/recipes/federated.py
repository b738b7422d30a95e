"""A recipe of parties, who tell each other logits and nothing else."""

from __future__ import annotations

from pydantic import Field, model_validator

from softlabels.config import (
    ASSISTANT,
    LAYER_LOSSES,
    PRETRAINED,
    TEACHER,
    CombineOptions,
    DumpOptions,
    Strict,
    StudentOptions,
    TeacherTraining,
)
from softlabels.recipes.parts import TeacherChoice


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
    (FedMD's 'revisit'); of several `rounds` that is the party's teacher in the next, and where its student starts.
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
        if self.student.student == "linear":
            raise ValueError("the common rows come without texts, which a linear student reads: take another student")
        if layered := sorted(self.student.loss_names() & set(LAYER_LOSSES)):
            raise ValueError(f"parties tell each other logits alone, and loss '{layered[0]}' looks at layers")
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
