"""What a student starts from: the options `init_from`, `init_layers` and `init_head` as a folder and its layers.

Nothing is copied here (see `teacher_layers`): what can't be is refused before a student is built.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.errors
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from softlabels.errors import SoftlabelsError, StudentError
from softlabels.pretrained import weight_files
from softlabels.students.renames import RENAMES, Renames

LAYER_WORDS = ("first", "spread", "all", "none")
RUN_RECORD = "run.json"  # what a finished run has, see `softlabels.runs`


@dataclass(frozen=True, slots=True)
class TeacherWeights:
    """A teacher's folder, its config.json, and the file of each of its tensors."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))


@dataclass(frozen=True, slots=True)
class Start:
    """What a student takes of a teacher."""

    teacher: TeacherWeights
    layers: list[int]  # numbered from 1; none: embeddings (and head) only
    head: bool | None  # None: a language model's head where the teacher has one


def open_teacher(folder: Path) -> TeacherWeights:
    """The teacher in `folder`, its weights still on the disk; StudentError for what isn't there."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = {name: path for path in weight_files(folder) for name in _tensor_names(path)}
    except (OSError, ValueError, SafetensorError, SoftlabelsError) as error:
        raise StudentError(f"option 'init_from': {folder} is no teacher's folder: {error}") from None
    if not files:
        raise StudentError(f"option 'init_from': {folder} is no teacher's folder: it has no model.safetensors")
    if not isinstance(config, dict):
        raise StudentError(f"option 'init_from': {folder / 'config.json'} holds no JSON object")
    return TeacherWeights(folder, config, files)


def read_setting(config: dict[str, Any], name: str) -> Any:
    """The setting that is commonly called `name` of a config.json, whatever its architecture calls it; or None."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES:
        name = CONFIG_MAPPING[kind].attribute_map.get(name, name)
    return config.get(name)


def find_renames(teacher: TeacherWeights, student: str) -> Renames | None:
    """How `teacher` calls what a `student` (a model_type) has; None where they are of one architecture."""
    if student == teacher.model_type:
        return None
    names = RENAMES.get((teacher.model_type, student))
    if names is None:
        others = [own for theirs, own in RENAMES if theirs == teacher.model_type]
        raise StudentError(
            f"a '{student}' student can't start from {teacher.folder}, which is a '{teacher.model_type}': give "
            f"model_type: {' or '.join([teacher.model_type, *others])}"
        )
    return names


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as weights:
        return list(weights.keys())


def read_start(options: dict[str, Any]) -> Start | None:
    """What `init_from` names, and the layers wanted of it; sets option `layers` to their number."""
    folder, layers, head = (options.get(name) for name in ("init_from", "init_layers", "init_head"))
    if folder is None:
        if layers is not None or head is not None:
            name = "init_layers" if layers is not None else "init_head"
            raise StudentError(f"option '{name}' is about a teacher's weights: give its folder as 'init_from'")
        return None
    if head is not None and not isinstance(head, bool):
        raise StudentError(f"option 'init_head' is true or false; got {head!r}")
    teacher = open_teacher(Path(str(folder)))
    asked = options.get("layers", options.get("num_hidden_layers"))
    if asked is None and "config" in options:
        asked = getattr(read_config(options["config"]), "num_hidden_layers", None)
    chosen = _choose_layers(layers, asked, teacher)
    if asked is not None and chosen and asked != len(chosen):
        raise StudentError(f"a student of {asked} layers can't start from the {len(chosen)} layers {chosen}")
    if chosen and "num_hidden_layers" not in options:
        options["layers"] = len(chosen)
    return Start(teacher, chosen, head)


def _choose_layers(wanted: Any, asked: Any, teacher: TeacherWeights) -> list[int]:
    """The teacher's layers, numbered from 1, for a student of `asked` layers (None: not said)."""
    if isinstance(wanted, list):
        return [_as_layer(layer) for layer in wanted]
    if wanted is None:  # all of a student that was trained before; of a teacher, the first two
        wanted = "all" if asked is None and (teacher.folder / RUN_RECORD).is_file() else "first"
    if wanted not in LAYER_WORDS:
        raise StudentError(
            f"option 'init_layers' lists layers from 1, like [1, 3]; got {wanted!r}, which is none of the words "
            f"{', '.join(LAYER_WORDS)} either"
        )
    if wanted == "none":
        return []
    if wanted == "first":
        return list(range(1, _as_layer(2 if asked is None else asked) + 1))
    depth = read_setting(teacher.config, "num_hidden_layers")
    if not isinstance(depth, int):
        raise StudentError(f"option 'init_layers': {teacher.folder / 'config.json'} says no number of layers")
    if wanted == "all":
        return list(range(1, depth + 1))
    return spread_layers(depth, _as_layer(max(1, depth // 2) if asked is None else asked))


def spread_layers(depth: int, count: int) -> list[int]:
    """`count` of `depth` layers at equal distances, the first and the last among them, numbered from 1.

    6 of 12 are 1, 3, 5, 8, 10, 12, as DistilBERT has them (its code: 0, 2, 4, 7, 9, 11).
    """
    if count > depth:
        raise StudentError(f"option 'init_layers': {count} layers can't be spread over a teacher of {depth}")
    if count == 1:
        return [1]
    return [1 + (2 * step * (depth - 1) + count - 1) // (2 * (count - 1)) for step in range(count)]  # half goes up


def _as_layer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise StudentError(f"layers are counted and numbered from 1; got {value!r}")
    return value


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The config.json in `folder`, without its code; StudentError where it can't be used."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise StudentError(f"there is no file {file}")
    try:
        config = AutoConfig.from_pretrained(Path(folder), local_files_only=True, trust_remote_code=False)
    except (huggingface_hub.errors.StrictDataclassError, OSError, ValueError, TypeError, KeyError) as error:
        raise StudentError(f"{file} can't be used: {one_line(error)}") from None
    return config


def one_line(error: Exception) -> str:
    """The error's text in one line."""
    return " ".join(str(error).split())
