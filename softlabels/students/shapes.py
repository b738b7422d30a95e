"""The shape of a transformer student: options and what the cache says in, a config of transformers out.

`read_shape` fills in the user's options from the preset they name (see `presets`), finds what the student starts from,
and makes the config.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import huggingface_hub.errors
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from softlabels.config import suggest
from softlabels.errors import StudentError
from softlabels.students import StudentSpec
from softlabels.students.presets import find_preset
from softlabels.students.starts import Start, find_renames, one_line, read_config, read_setting, read_start
from softlabels.tokens import OFFSET_POSITIONS
from softlabels.types import SEQ2SEQ, Task

_USUAL: dict[Task, str] = {"causal-lm": "gpt2", SEQ2SEQ: "t5"}
WIDTH_OF_A_HEAD = 64
SHORT_NAMES = {"layers": "num_hidden_layers", "heads": "num_attention_heads"}
FEED_FORWARD_NAMES = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim")  # of each
DECODER_SIZES = {"encoder_layers": "decoder_layers", "encoder_attention_heads": "decoder_attention_heads"}
DECODER_SIZES |= {"encoder_ffn_dim": "decoder_ffn_dim", "num_layers": "num_decoder_layers"}
POSITIONS = "max_position_embeddings"
SPECIAL_IDS = {"bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"}
# What a folder's config says and the new one works out; MobileBERT's width would go before the sizes it follows from
DERIVED = ("architectures", "true_hidden_size")
FROM_THE_CACHE = ("vocab_size", "pad_token_id", "num_labels", "id2label", "label2id")
OWN_OPTIONS = ("preset", "model_type", "config", "init_from", "init_layers", "init_head")
OF_THE_TEACHER = "teacher"  # heads: teacher


@dataclass(frozen=True, slots=True)
class Shape:
    """A student's config, and what it starts from."""

    config: PreTrainedConfig
    start: Start | None


def read_shape(spec: StudentSpec) -> Shape:
    """The shape that `spec` asks for; StudentError says what can't be."""
    options = _fill_in(spec)
    start = read_start(options)
    return Shape(_make_config(spec, options, start), start)


# ------------------------------------------------------------------------------------------------------- options


def _fill_in(spec: StudentSpec) -> dict[str, Any]:
    """The user's options and, where they say nothing, those of the preset; `heads: teacher` as a number."""
    options = dict(spec.options)
    if "preset" in options:
        preset = find_preset(options.pop("preset"))
        if "config" in options:
            raise StudentError("option 'preset' is already said by the config.json that 'config' names")
        theirs = dict(preset.options)
        starts = "init_from" in options
        if not starts:
            theirs.pop("init_layers", None)
        if starts and preset.as_wide_as_its_start:
            theirs = {name: theirs[name] for name in ("model_type", "layers", "init_layers")}
        if isinstance(options.get("init_layers"), list) and options["init_layers"]:
            theirs.pop("layers")  # as many as are named
        names = _common_names(options.get("model_type", theirs["model_type"]))
        taken = {names.get(name, name) for name in options}
        options |= {name: value for name, value in theirs.items() if names.get(name, name) not in taken}
    for name in ("heads", "num_attention_heads"):
        if options.get(name) == OF_THE_TEACHER:
            options[name] = _teacher_heads(spec)
    return options


def _teacher_heads(spec: StudentSpec) -> int:
    heads = read_setting(spec.teacher_config, "num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise StudentError("option 'heads': the cache doesn't say how many heads the teacher has: give a number")
    return heads


def _common_names(model_type: Any) -> dict[str, str]:
    """From what an option may be called to what most architectures call it."""
    names = dict(SHORT_NAMES)
    if model_type in CONFIG_MAPPING_NAMES:
        kind = CONFIG_MAPPING[model_type]
        names |= {own: common for common, own in kind.attribute_map.items()}
        names[_feed_forward(_attributes(kind))] = "intermediate_size"
    return names


# -------------------------------------------------------------------------------------------------- configuration


def _make_config(spec: StudentSpec, options: dict[str, Any], start: Start | None) -> PreTrainedConfig:
    """The student's config: a folder's, the teacher's where it gives layers, or a small new one; then the
    options, and over them what the cache says.
    """
    kind, settings = _first_settings(options, start, spec.task)
    chosen = _chosen_settings(kind, options)
    if not settings:
        settings = _small(kind, spec, chosen)
    if "num_hidden_layers" in chosen:
        settings.pop("layer_types", None)  # one entry a layer: to be made anew for the new number
    for name in DERIVED:
        settings.pop(name, None)
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
        raise StudentError(f"a '{kind.model_type}' can't have these options: {one_line(error)}") from None
    _check_heads(config)
    if start is not None:
        _check_positions(spec, start)
    if getattr(config, POSITIONS, needed) < needed:
        raise StudentError(
            f"the cache's rows have up to {spec.max_length} tokens, for which a '{kind.model_type}' needs "
            f"{POSITIONS} of at least {needed}; it has {getattr(config, POSITIONS)}"
        )
    return config


def _first_settings(
    options: dict[str, Any], start: Start | None, task: Task
) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """The class of the config, and what the options change: nothing yet for a student of a new shape."""
    if "config" in options and "model_type" in options:
        raise StudentError("option 'model_type' is already said by the config.json that 'config' names")
    if "config" in options:
        config = read_config(options["config"])
        return type(config), config.to_dict()
    own = None if start is None else start.teacher.config.get("model_type")
    model_type = options.get("model_type", own or _USUAL.get(task, "bert"))
    if model_type not in CONFIG_MAPPING_NAMES:
        near = suggest(str(model_type), CONFIG_MAPPING_NAMES)
        raise StudentError(f"transformers knows no model_type '{model_type}'.{near}")
    if start is None:
        return CONFIG_MAPPING[model_type], {}
    config = read_config(start.teacher.folder)
    names = find_renames(start.teacher, model_type)
    if names is None:
        return type(config), config.to_dict()
    return CONFIG_MAPPING[model_type], {own: getattr(config, theirs) for own, theirs in names.settings.items()}


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
    if not isinstance(heads, int) or heads < 1:
        raise StudentError(f"a width of {width} can't be split into {heads!r} heads")
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": 4 * width,
        "type_vocab_size": token_types(spec),
    }
    return {name: size for name, size in sizes.items() if name in known | {"intermediate_size"}}


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


def _check_positions(spec: StudentSpec, start: Start) -> None:
    """StudentError where rows may be longer than what the student starts from can read."""
    teacher = start.teacher
    known = read_setting(teacher.config, POSITIONS)
    if isinstance(known, int) and teacher.model_type in OFFSET_POSITIONS:
        known -= max(spec.pad_token_id, 1) + 1
    if isinstance(known, int) and 0 < known < spec.max_length:
        raise StudentError(
            f"option 'init_from': {teacher.folder} reads up to {known} tokens, the cache's rows may have "
            f"{spec.max_length}: dump them with --max-length {known}"
        )


def _check_heads(config: PreTrainedConfig) -> None:
    """StudentError where the width of a layer's attention is no multiple of its heads, with widths that are."""
    if hasattr(config, "head_dim"):
        return  # its heads are as wide as that says
    name = "intra_bottleneck_size" if getattr(config, "use_bottleneck", False) else "hidden_size"
    width, heads = getattr(config, name, None), getattr(config, "num_attention_heads", None)
    if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
        below = width - width % heads
        near = " or ".join(str(fits) for fits in (below, below + heads) if fits)
        raise StudentError(f"a width of {width} can't be split into {heads} heads: give {name} {near}")


def token_types(spec: StudentSpec) -> int:
    """How many token types the cache's rows may have: as many as its teacher knew."""
    types = spec.teacher_config.get("type_vocab_size")
    return types if isinstance(types, int) and types > 0 else 1


def _chosen_settings(kind: type[PreTrainedConfig], options: dict[str, Any]) -> dict[str, Any]:
    """The user's options under their common names; StudentError for what this architecture doesn't have."""
    known = _attributes(kind)
    common = _common_names(kind.model_type)
    chosen: dict[str, Any] = {}
    for option, value in options.items():
        if option in OWN_OPTIONS:
            continue
        if option in FROM_THE_CACHE:
            raise StudentError(f"option '{option}' can't be chosen: it follows from the tokenizer and the classes")
        name = common.get(option, option)
        if name not in known | {"intermediate_size"}:
            near = suggest(option, sorted({*known, *SHORT_NAMES, *OWN_OPTIONS}))
            raise StudentError(f"a '{kind.model_type}' has no option '{option}'.{near}")
        if name in chosen:
            raise StudentError(f"option '{option}' is given twice, under two names")
        chosen[name] = value
    return chosen


def _attributes(kind: type[PreTrainedConfig]) -> set[str]:
    """Every attribute of this architecture's config, under its own name and under the common one."""
    own = {field.name for field in dataclasses.fields(kind)}
    return (own | set(kind.attribute_map)) - {"transformers_version", "architectures", *FROM_THE_CACHE}


def _own_name(kind: type[PreTrainedConfig], name: str) -> str:
    """What this architecture calls it: DistilBERT's hidden_size is `dim`, its intermediate_size `hidden_dim`."""
    if name == "intermediate_size":
        return _feed_forward(_attributes(kind))
    return kind.attribute_map.get(name, name)


def _feed_forward(known: set[str]) -> str:
    return next((name for name in FEED_FORWARD_NAMES if name in known), "intermediate_size")
