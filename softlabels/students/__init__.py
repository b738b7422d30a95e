"""The students: small models that are trained from a cache.

A `StudentSpec` (what the cache asks of any student) goes in, a transformers model comes out, its
`forward(input_ids, attention_mask, token_type_ids=None)` giving logits (B, C). To add a student, write a
module with `build` and `load` and add its line to `STUDENTS`. The linear student is no torch model: see
`linear.fit_linear`.

Nothing heavy is imported here, so that a student's name can be checked before torch is loaded.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from softlabels.config import Strict, build_options, suggest
from softlabels.errors import ConfigError, StudentError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from softlabels.types import Task, TokenBatch, TokenSequence

STUDENTS: dict[str, str] = {  # a student's name: the module that builds and loads it
    "bilstm": "softlabels.students.bilstm",
    "lstm_attention": "softlabels.students.lstm_attention",
    "transformer": "softlabels.students.transformer",
    "word_average": "softlabels.students.word_average",
}
LINEAR = "linear"  # fitted in one go by softlabels.students.linear, not trained by gradients
STUDENT_NAMES = (*STUDENTS, LINEAR)


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """What a new student must fit, read from the cache, and the options that its user chose."""

    label_names: list[str]
    vocab_size: int  # V, the length of the teacher's tokenizer
    pad_token_id: int
    unk_token_id: int | None
    max_length: int  # tokens of the longest row, special ones included
    used_ids: np.ndarray  # sorted distinct token ids of the training rows
    teacher_config: dict[str, Any]  # the teacher's config.json
    options: dict[str, Any]  # checked by the student that is built
    task: Task = "sequence-classification"
    mask_token_id: int | None = None  # what stands for a masked word in augmented texts
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None  # the teacher's, loaded when asked for
    sequences: Callable[[], Iterable[TokenSequence]] | None = None  # the training rows', read when asked for
    decoder_start: int | None = None  # what the teacher's decoder read first, of an encoder-decoder model


class StudentModule(Protocol):
    """What a student's module offers."""

    def read(self, spec: StudentSpec) -> object:
        """The options of `spec`, checked; one that has layers to look at has `count_layers` instead. Nothing is built.

        StudentError for what such a student doesn't take.
        """

    def build(self, spec: StudentSpec) -> PreTrainedModel:
        """A new model with random weights (torch's generator decides them)."""

    def load(self, folder: Path) -> PreTrainedModel:
        """The model that `save_pretrained` left in `folder`, in evaluation mode."""


def check_student(kind: str) -> str:
    """`kind` unchanged; StudentError for a name that no student has."""
    if kind not in STUDENT_NAMES:
        names = ", ".join(STUDENT_NAMES)
        raise StudentError(f"no student '{kind}': there are {names}.{suggest(kind, STUDENT_NAMES)}")
    return kind


def build_student(kind: str, spec: StudentSpec) -> PreTrainedModel:
    """A new student of this kind that fits `spec`; StudentError says what doesn't fit.

    Its weights come from torch's global generator: seed it first.
    """
    from softlabels.pretrained import quiet_transformers

    _check_spec(spec)
    with quiet_transformers():
        return _module(kind).build(spec)


def load_student(kind: str, folder: Path) -> PreTrainedModel:
    """The student of this kind that was saved in `folder`: safetensors only, no code from the folder."""
    from softlabels.pretrained import quiet_transformers

    with quiet_transformers():
        return _module(kind).load(folder)


def student_batch(model: PreTrainedModel, batch: TokenBatch) -> TokenBatch:
    """What `model` takes of `batch`: token types are left out where it has no use for them (DistilBERT)."""
    if batch.token_type_ids is None or "token_type_ids" in inspect.signature(model.forward).parameters:
        return batch
    return replace(batch, token_type_ids=None)


def student_inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Tensor]:
    """The keyword arguments of the model's forward for `batch`."""
    return student_batch(model, batch).model_inputs()


def count_layers(kind: str, spec: StudentSpec) -> int | None:
    """How many layers with hidden states and attention such a student would have; None for those that have none.

    Nothing is built. StudentError for options that don't fit.
    """
    if check_student(kind) == LINEAR:
        from softlabels.students.linear import read_linear_options

        read_linear_options(spec.options)
        return None
    module = _module(kind)
    if (count := getattr(module, "count_layers", None)) is not None:
        return count(spec)
    module.read(spec)
    return None


Options = TypeVar("Options", bound=Strict)


def read_options(model: type[Options], spec: StudentSpec, *, student: str) -> Options:
    """The user's options as `model`; StudentError for an unknown key or a value that cannot be."""
    try:
        return build_options(model, spec.options, where=f"student '{student}'")
    except ConfigError as error:
        raise StudentError(str(error)) from None


def refuse_incomplete(info: dict[str, Any], folder: Path) -> None:
    """StudentError where the weights in `folder` lack some: transformers would leave those at random.

    `info` is what `from_pretrained(output_loading_info=True)` says of the loading.
    """
    faulty = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if faulty:
        raise StudentError(f"the student in {folder} is damaged: its weights lack {', '.join(faulty[:3])}")


def _module(kind: str) -> StudentModule:
    if check_student(kind) == LINEAR:
        raise StudentError(
            "the linear student is no torch model: it is fitted by softlabels.students.linear.fit_linear"
        )
    return cast(StudentModule, importlib.import_module(STUDENTS[kind]))


def _check_spec(spec: StudentSpec) -> None:
    if spec.task == "sequence-classification" and len(spec.label_names) < 2:
        raise StudentError(f"a student needs at least two classes; the cache has {spec.label_names}")
    if len(spec.used_ids) == 0:
        raise StudentError("a student needs training rows; the cache has no token")
    largest = int(max(spec.used_ids[-1], spec.pad_token_id))
    if largest >= spec.vocab_size:
        raise StudentError(
            f"the cache holds token id {largest}, but its tokenizer knows {spec.vocab_size} tokens: "
            f"the tokenizer is not the one that the cache was dumped with"
        )
