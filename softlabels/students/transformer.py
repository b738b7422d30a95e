"""A small transformer of any architecture that transformers can build as a sequence classifier.

Of a language model's cache it is a language model: for masked-lm a BERT, for causal-lm a GPT-2, for seq2seq-lm a T5 by
default. `layers`, `heads` and `intermediate_size` of an encoder-decoder model are those of its encoder and, unless they
are named (`decoder_layers=1`), of its decoder too.

By default a BERT of 2 layers, 128 wide. Its options:

    preset              the sizes of a paper, see `presets`: distilbert, tinybert-4, minilm-6, mobilebert …
    layers hidden_size heads intermediate_size      `heads: teacher` takes as many as the cache's teacher has
    model_type          an architecture, and any attribute of its config
    config              a folder with a config.json, instead
    init_from           the folder of a teacher or of a finished run, to start from its weights (see `teacher_layers`)
    init_layers         which of its layers, numbered from 1, like [1, 3, 5]; `first` (so many as the student has),
                        `spread` (at equal distances), `all`, or `none` (its embeddings only). Without it: all layers
                        of a run, the first ones of a teacher
    init_head           true: the classifier too, which must have the same classes; false: not even a language model's

What it saves is an ordinary transformers model: to use it, softlabels need not be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from softlabels.errors import StudentError
from softlabels.students import StudentSpec, refuse_incomplete, student_inputs
from softlabels.students.shapes import read_shape, token_types
from softlabels.students.starts import one_line
from softlabels.students.teacher_layers import copy_start
from softlabels.tasks import find_task
from softlabels.types import LANGUAGE_MODELS, NO_LABEL, SEQ2SEQ, Task, TokenBatch

_KINDS: dict[Task, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
    SEQ2SEQ: AutoModelForSeq2SeqLM,
    "sentence-embedding": AutoModel,  # a bare encoder, which learns from layers
}


def build(spec: StudentSpec) -> PreTrainedModel:
    """A new transformer for `spec`, its head and whatever no teacher gave it at random."""
    shape = read_shape(spec)
    if shape.start is not None and spec.task == SEQ2SEQ:
        raise StudentError(
            "option 'init_from' is for models of one stack of layers so far: leave it out for seq2seq-lm"
        )
    try:
        student = _KINDS[spec.task].from_config(shape.config, trust_remote_code=False, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
        raise StudentError(f"a '{shape.config.model_type}' student can't be built: {one_line(error)}") from None
    _try_out(student, spec)
    if shape.start is not None:
        copy_start(shape.start, student)
    return student


def count_layers(spec: StudentSpec) -> int:
    """How many layers a transformer for `spec` has."""
    return read_shape(spec).config.num_hidden_layers


def load(folder: Path) -> PreTrainedModel:
    """The transformer saved in `folder`, in evaluation mode. StudentError for a folder that is damaged."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        student, info = _KINDS[find_task(config, where=folder)].from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise StudentError(f"the student in {folder} is damaged: {error}") from None
    refuse_incomplete(info, folder)
    return student.eval()


def _try_out(student: PreTrainedModel, spec: StudentSpec) -> None:
    """StudentError where the architecture can't read the cache's rows: better now than in the first step."""
    ids = torch.full((2, spec.max_length), int(spec.used_ids[0]))
    mask = torch.ones_like(ids)
    ids[1, 1:], mask[1, 1:] = spec.pad_token_id, 0
    was_training = student.training
    try:
        with torch.inference_mode():
            types = torch.full_like(ids, min(token_types(spec), 2) - 1)
            written = ids if spec.task == SEQ2SEQ else None
            batch = TokenBatch(ids, mask, types, torch.full((2,), NO_LABEL), written)
            wanted: tuple[int, ...] = (2, len(spec.label_names))
            if spec.task in LANGUAGE_MODELS:
                wanted = (2, spec.max_length, spec.vocab_size)
            elif spec.task == "sentence-embedding":
                wanted = (2, spec.max_length, student.config.hidden_size)
            output = student.eval()(**student_inputs(student, batch))
            shape = tuple(output[0].shape) if spec.task == "sentence-embedding" else tuple(output.logits.shape)
        fault = "" if shape == wanted else f"it gives {shape}"
    except Exception as error:  # each architecture fails in its own way
        fault = one_line(error)
    finally:
        student.train(was_training)
    if fault:
        raise StudentError(
            f"a '{student.config.model_type}' of these options can't read rows of {spec.max_length} tokens: {fault}"
        )
