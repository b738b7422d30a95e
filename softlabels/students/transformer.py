"""A small transformer of any architecture that transformers can build as a sequence classifier.

Of a language model's cache it is a language model: for masked-lm a BERT, for causal-lm a GPT-2, for seq2seq-lm a T5 by
default. `layers`, `heads` and `intermediate_size` of an encoder-decoder model are those of its encoder and, unless they
are named (`decoder_layers=1`), of its decoder too.

By default a BERT of 2 layers, 128 wide; its options are `layers`, `hidden_size`, `heads`,
`intermediate_size`, `model_type` and any attribute of that architecture's config; or `config`, a folder with
a config.json. With `init_from`, a teacher's folder, it starts from the teacher's embeddings and from its
layers `init_layers`, numbered from 1 (see `teacher_layers`). What it saves is an ordinary transformers
model: to use it, softlabels need not be installed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from softlabels.config import suggest
from softlabels.errors import StudentError
from softlabels.students import StudentSpec, refuse_incomplete, student_inputs
from softlabels.students.teacher_layers import TeacherWeights, copy_layers, open_teacher
from softlabels.tasks import find_task
from softlabels.tokens import OFFSET_POSITIONS
from softlabels.types import LANGUAGE_MODELS, NO_LABEL, SEQ2SEQ, Task, TokenBatch

_KINDS: dict[Task, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
    SEQ2SEQ: AutoModelForSeq2SeqLM,
}
_USUAL: dict[Task, str] = {"causal-lm": "gpt2", SEQ2SEQ: "t5"}
WIDTH_OF_A_HEAD = 64
SHORT_NAMES = {"layers": "num_hidden_layers", "heads": "num_attention_heads"}
FEED_FORWARD_NAMES = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim")  # of each
DECODER_SIZES = {"encoder_layers": "decoder_layers", "encoder_attention_heads": "decoder_attention_heads"}
DECODER_SIZES |= {"encoder_ffn_dim": "decoder_ffn_dim", "num_layers": "num_decoder_layers"}
POSITIONS = "max_position_embeddings"
SPECIAL_IDS = {"bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"}
FROM_THE_CACHE = ("vocab_size", "pad_token_id", "num_labels", "id2label", "label2id")
OWN_OPTIONS = ("model_type", "config", "init_from", "init_layers")


def build(spec: StudentSpec) -> PreTrainedModel:
    """A new transformer for `spec`, its head and whatever no teacher gave it at random."""
    options = dict(spec.options)
    teacher = _read_init(options)
    if teacher is not None and spec.task == SEQ2SEQ:
        raise StudentError(
            "option 'init_from' is for models of one stack of layers so far: leave it out for seq2seq-lm"
        )
    config = _make_config(spec, options, teacher)
    try:
        student = _KINDS[spec.task].from_config(config, trust_remote_code=False, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
        raise StudentError(f"a '{config.model_type}' student can't be built: {_one_line(error)}") from None
    _try_out(student, spec)
    if teacher is not None:
        copy_layers(teacher, student)
    return student


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
            types = torch.full_like(ids, min(_token_types(spec), 2) - 1)
            written = ids if spec.task == SEQ2SEQ else None
            batch = TokenBatch(ids, mask, types, torch.full((2,), NO_LABEL), written)
            wanted: tuple[int, ...] = (2, len(spec.label_names))
            if spec.task in LANGUAGE_MODELS:
                wanted = (2, spec.max_length, spec.vocab_size)
            shape = tuple(student.eval()(**student_inputs(student, batch)).logits.shape)
        fault = "" if shape == wanted else f"it gives {shape}"
    except Exception as error:  # each architecture fails in its own way
        fault = _one_line(error)
    finally:
        student.train(was_training)
    if fault:
        raise StudentError(
            f"a '{student.config.model_type}' of these options can't read rows of {spec.max_length} tokens: {fault}"
        )


# ------------------------------------------------------------------------------------------- configuration


def _read_init(options: dict[str, Any]) -> TeacherWeights | None:
    """The teacher that `init_from` names, the layers wanted of it; sets option `layers` to their number."""
    folder, layers = options.get("init_from"), options.get("init_layers")
    if folder is None:
        if layers is not None:
            raise StudentError("option 'init_layers' names layers of a teacher: give its folder as 'init_from'")
        return None
    asked = options.get("layers", options.get("num_hidden_layers"))
    if layers is None:
        if asked is None and "config" in options:
            asked = getattr(_read_config(options["config"]), "num_hidden_layers", None)
        layers = list(range(1, _as_layer(2 if asked is None else asked) + 1))
    elif not isinstance(layers, list) or not layers:
        raise StudentError(f"option 'init_layers' lists layers from 1, like [1, 3]; got {layers!r}")
    layers = [_as_layer(layer) for layer in layers]
    if asked is not None and asked != len(layers):
        raise StudentError(f"a student of {asked} layers can't start from the {len(layers)} layers {layers}")
    if "num_hidden_layers" not in options:
        options["layers"] = len(layers)
    return open_teacher(Path(str(folder)), layers=layers)


def _as_layer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise StudentError(f"layers are counted and numbered from 1; got {value!r}")
    return value


def _make_config(spec: StudentSpec, options: dict[str, Any], teacher: TeacherWeights | None) -> PreTrainedConfig:
    """The student's config: a folder's, the teacher's where it gives layers, or a small new one; then the
    options, and over them what the cache says.
    """
    kind, settings = _start(options, teacher, spec.task)
    chosen = _chosen_settings(kind, options)
    if not settings:
        settings = _small(kind, spec, chosen)
    if "num_hidden_layers" in chosen:
        settings.pop("layer_types", None)  # one entry a layer: to be made anew for the new number
    settings = {_own_name(kind, name): value for name, value in (settings | chosen).items()}
    settings |= {
        "vocab_size": spec.vocab_size,
        "pad_token_id": spec.pad_token_id,
        "problem_type": None,
    }
    if spec.label_names:
        settings["id2label"] = dict(enumerate(spec.label_names))
        settings["label2id"] = {name: index for index, name in enumerate(spec.label_names)}
    if spec.task == "causal-lm" and "is_decoder" in _attributes(kind):
        settings["is_decoder"] = True  # a BERT that looks back only
    for name in SPECIAL_IDS & _attributes(kind) - set(chosen):
        settings[name] = None  # the architecture's own tokenizer's, which is not the cache's
    if spec.task == SEQ2SEQ:
        settings |= {name: value for name, value in _writing(kind, spec, settings).items() if name not in chosen}
    # RoBERTa and its kin number positions from pad_token_id + 1: the first rows of their table are never used
    # (MPNet does so from 2, whatever the pad token)
    needed = spec.max_length + (max(spec.pad_token_id, 1) + 1 if kind.model_type in OFFSET_POSITIONS else 0)
    if POSITIONS in _attributes(kind) and POSITIONS not in chosen and "config" not in options:
        settings[_own_name(kind, POSITIONS)] = needed
    try:
        config = kind(**settings)
    except (huggingface_hub.errors.StrictDataclassError, TypeError, ValueError) as error:
        raise StudentError(f"a '{kind.model_type}' student can't have these options: {_one_line(error)}") from None
    if getattr(config, POSITIONS, needed) < needed:
        raise StudentError(
            f"the cache's rows have up to {spec.max_length} tokens, for which a '{kind.model_type}' needs "
            f"{POSITIONS} of at least {needed}; it has {getattr(config, POSITIONS)}"
        )
    return config


def _start(
    options: dict[str, Any], teacher: TeacherWeights | None, task: Task
) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """The class of the config, and what the options change: nothing yet for a student of a new shape."""
    if "config" in options and "model_type" in options:
        raise StudentError("option 'model_type' is already said by the config.json that 'config' names")
    if "config" in options:
        config = _read_config(options["config"])
        return type(config), config.to_dict()
    own = None if teacher is None else teacher.config.get("model_type")
    model_type = options.get("model_type", own or _USUAL.get(task, "bert"))
    if model_type not in CONFIG_MAPPING_NAMES:
        near = suggest(str(model_type), CONFIG_MAPPING_NAMES)
        raise StudentError(f"transformers knows no model_type '{model_type}'.{near}")
    if teacher is None:
        return CONFIG_MAPPING[model_type], {}
    if model_type != own:
        raise StudentError(f"a '{model_type}' student can't start from {teacher.folder}, which is a '{own}'")
    config = _read_config(teacher.folder)
    return type(config), config.to_dict()


def _read_config(folder: str | Path) -> PreTrainedConfig:
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise StudentError(f"there is no file {file}")
    try:
        config = AutoConfig.from_pretrained(Path(folder), local_files_only=True, trust_remote_code=False)
    except (huggingface_hub.errors.StrictDataclassError, OSError, ValueError, TypeError, KeyError) as error:
        raise StudentError(f"{file} can't be used: {_one_line(error)}") from None
    return config


def _small(kind: type[PreTrainedConfig], spec: StudentSpec, chosen: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a small student, where the user didn't choose them."""
    known = _attributes(kind)
    if not {"hidden_size", "num_hidden_layers", "num_attention_heads"} <= known:
        raise StudentError(f"a '{kind.model_type}' has no width, layers and heads to choose: give option 'config'")
    width = chosen.get("hidden_size", 128)
    if not isinstance(width, int) or width < 1:
        raise StudentError(f"option 'hidden_size' can't be {width!r}")
    most = max(1, width // WIDTH_OF_A_HEAD)
    heads = chosen.get("num_attention_heads", next(n for n in range(most, 0, -1) if width % n == 0))
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise StudentError(f"a width of {width} can't be split into {heads!r} heads")
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        _feed_forward(known): 4 * width,
        "type_vocab_size": _token_types(spec),
    }
    return {name: size for name, size in sizes.items() if name in known}


def _writing(kind: type[PreTrainedConfig], spec: StudentSpec, settings: dict[str, Any]) -> dict[str, Any]:
    """What the decoder begins and ends with, and its sizes where only the encoder's are said."""
    ids = {"decoder_start_token_id": spec.decoder_start, "eos_token_id": spec.teacher_config.get("eos_token_id")}
    own = {field.name for field in dataclasses.fields(kind)}
    sizes = {
        decoder: settings[encoder]
        for encoder, decoder in DECODER_SIZES.items()
        if decoder in own and encoder in settings and decoder not in settings
    }
    return ids | ({"forced_eos_token_id": None} if "forced_eos_token_id" in own else {}) | sizes


def _token_types(spec: StudentSpec) -> int:
    """How many token types the cache's rows may have: as many as its teacher knew."""
    types = spec.teacher_config.get("type_vocab_size")
    return types if isinstance(types, int) and types > 0 else 1


def _chosen_settings(kind: type[PreTrainedConfig], options: dict[str, Any]) -> dict[str, Any]:
    """The user's options under the config's names; StudentError for what this architecture doesn't have."""
    known = _attributes(kind)
    chosen: dict[str, Any] = {}
    for option, value in options.items():
        if option in OWN_OPTIONS:
            continue
        if option in FROM_THE_CACHE:
            raise StudentError(f"option '{option}' can't be chosen: it comes from the cache")
        name = SHORT_NAMES.get(option, option)
        if name == "intermediate_size":
            name = _feed_forward(known)
        if name not in known:
            near = suggest(option, sorted({*known, *SHORT_NAMES, *OWN_OPTIONS}))
            raise StudentError(f"a '{kind.model_type}' student has no option '{option}'.{near}")
        if name in chosen:
            raise StudentError(f"option '{option}' is given twice, under two names")
        chosen[name] = value
    return chosen


def _attributes(kind: type[PreTrainedConfig]) -> set[str]:
    """Every attribute of this architecture's config, under its own name and under the common one."""
    own = {field.name for field in dataclasses.fields(kind)}
    return (own | set(kind.attribute_map)) - {"transformers_version", "architectures", *FROM_THE_CACHE}


def _own_name(kind: type[PreTrainedConfig], name: str) -> str:
    return kind.attribute_map.get(name, name)  # DistilBERT's hidden_size is called dim


def _feed_forward(known: set[str]) -> str:
    return next((name for name in FEED_FORWARD_NAMES if name in known), "intermediate_size")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
