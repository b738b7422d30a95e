"""Options of a teacher's training, and how a recipe calls what students start from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from softlabels.config.strict import Strict

TeachableTask = Literal["sequence-classification", "masked-lm", "causal-lm"]  # what a teacher can be trained for here


class TeacherTraining(Strict):
    """How the teacher is trained."""

    task: TeachableTask = "sequence-classification"
    epochs: int = Field(default=5, ge=1)
    lr: float = Field(default=5e-5, gt=0)
    batch_size: int = Field(default=32, ge=1)
    max_length: int | None = Field(default=None, ge=1)
    rows: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    from_scratch: bool = False  # random weights; the model is a preset's name or a folder with a config.json
    tokenizer: str | None = None  # with from_scratch: whose tokenizer; None: the model folder's
    options: dict[str, Any] = {}  # with from_scratch: sizes, as of the transformer student


# what a recipe's `init_from` may say beside a folder
BASE, TEACHER, PRETRAINED, ASSISTANT = "base", "teacher", "pretrained", "assistant"
