"""A teacher from nothing: a shape and a tokenizer in, a classifier or language model with random weights out.

The shape is a preset of the transformer student (`mobilebert-teacher`, `bert-mini` …) or a folder with a config.json;
its sizes may be changed by that student's options. The vocabulary is the tokenizer's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from softlabels.config import TeachableTask, suggest
from softlabels.errors import StudentError, TeacherError
from softlabels.pretrained import load_tokenizer, resolve_pretrained
from softlabels.students import StudentSpec, build_student
from softlabels.students.presets import PRESETS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POSITIONS = 512  # of a preset, where the options don't say
_TRIED_TOKENS = 8  # how long the rows are that a new model is tried out on


@dataclass(frozen=True)
class Blank:
    """What a new model is made of."""

    shape: dict[str, Any]  # options of the transformer student
    tokenizer: PreTrainedTokenizerBase
    token_types: int
    identity: str  # xxh3-128 (hex) of the shape and the tokenizer


def find_blank(model: str, *, tokenizer: str | None, options: dict[str, Any]) -> Blank:
    """The preset or folder `model`, its shape changed by `options`, with the tokenizer of `tokenizer` or of `model`.

    TeacherError where there is no such shape, or no tokenizer. Weights in the folder are not looked at.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir() and model in PRESETS:
        if tokenizer is None:
            raise TeacherError(f"'{model}' is a shape only: give --tokenizer, a folder or a model's name")
        shape, config = {"preset": model, "max_position_embeddings": POSITIONS}, b""
    elif (folder / "config.json").is_file():
        shape, config = {"config": str(folder)}, (folder / "config.json").read_bytes()
    else:
        near = suggest(model, PRESETS)
        raise TeacherError(
            f"--from-scratch needs a folder with a config.json, or one of {', '.join(PRESETS)}; '{model}' is neither."
            f"{near}"
        )
    reader = _find_tokenizer(tokenizer or model)
    types = 2 if "token_type_ids" in reader.model_input_names else 1
    if config:
        types = _token_types(config, folder)
    vocabulary = sorted(reader.get_vocab().items())
    named = json.dumps([shape.get("preset"), options, vocabulary], sort_keys=True, default=str)
    return Blank(shape | options, reader, types, xxhash.xxh3_128_hexdigest(config + named.encode()))


def build_blank(
    blank: Blank, label_names: list[str], *, task: TeachableTask = "sequence-classification"
) -> PreTrainedModel:
    """A model of that shape for `task`, its weights from torch's generator; TeacherError says what can't be.

    A language model has no `label_names`.
    """
    tokenizer = blank.tokenizer
    assert isinstance(tokenizer.pad_token_id, int)
    spec = StudentSpec(
        label_names=label_names,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        unk_token_id=tokenizer.unk_token_id,
        max_length=_TRIED_TOKENS,
        used_ids=np.array([tokenizer.pad_token_id]),
        # 12 heads where a preset has as many as its teacher: so had the teachers of its paper
        teacher_config={"type_vocab_size": blank.token_types, "num_attention_heads": 12},
        options=blank.shape,
        task=task,
    )
    try:
        return build_student("transformer", spec)
    except StudentError as error:
        raise TeacherError(f"--from-scratch: {error}") from None


def _find_tokenizer(name: str) -> PreTrainedTokenizerBase:
    folder = Path(name).expanduser()
    return load_tokenizer(folder if folder.is_dir() else resolve_pretrained(name))


def _token_types(config: bytes, folder: Path) -> int:
    try:
        types = json.loads(config).get("type_vocab_size")
    except (ValueError, AttributeError) as error:
        raise TeacherError(f"{folder / 'config.json'} is no model's configuration: {error}") from None
    return types if isinstance(types, int) and types > 0 else 1
