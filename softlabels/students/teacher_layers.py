"""Start a transformer student from some of its teacher's layers.

The teacher's safetensors files are opened and only the tensors wanted are read: the teacher itself is never
built. Copied are its embeddings, the chosen layers, and what else the bare model has (a pooler, a last
norm); the classifier stays new.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabels.errors import SoftlabelsError, StudentError
from softlabels.pretrained import weight_files


@dataclass(frozen=True, slots=True)
class TeacherWeights:
    """A teacher's folder, which of its layers are wanted (numbered from 1), and the file of each of its
    tensors.
    """

    folder: Path
    layers: list[int]
    config: dict[str, Any]
    files: dict[str, Path]


def open_teacher(folder: Path, *, layers: list[int]) -> TeacherWeights:
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
    return TeacherWeights(folder, layers, config, files)


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as weights:
        return list(weights.keys())


def copy_layers(teacher: TeacherWeights, student: PreTrainedModel) -> None:
    """Copy the teacher's embeddings and chosen layers into `student`, in float32.

    Every parameter of the student's embeddings and layers must be there, of the same shape; only tables of
    tokens and positions may have more rows, which are left out.
    """
    body = student.base_model
    stack = _layer_stack(body, len(teacher.layers))
    prefix = _teacher_prefix(teacher, student, stack)
    _check_layers(teacher, f"{prefix}{stack}.")
    tables = {
        f"{name}.weight"
        for name, module in body.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(f"{stack}.")
    }
    with ExitStack() as files, torch.no_grad():
        opened: dict[Path, Any] = {}
        for name, parameter in body.named_parameters():
            source = prefix + _teacher_name(name, stack, teacher.layers)
            if source not in teacher.files:
                if name.startswith(f"{stack}.") or name in tables:
                    raise StudentError(f"option 'init_from': {teacher.folder} has no tensor '{source}'")
                continue  # a pooler that this teacher doesn't have
            path = teacher.files[source]
            if path not in opened:
                opened[path] = files.enter_context(_open_weights(path))
            parameter.copy_(_read_tensor(opened[path], source, parameter, rows_may_differ=name in tables))


def _layer_stack(body: nn.Module, layers: int) -> str:
    """The name of the list of layers inside the bare model: 'encoder.layer' for BERT, 'h' for GPT-2."""
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return name
    kind = type(body).__name__
    raise StudentError(f"option 'init_from': {kind} has no list of {layers} layers to copy a teacher's layers into")


def _teacher_prefix(teacher: TeacherWeights, student: PreTrainedModel, stack: str) -> str:
    """What comes before the bare model's names in the teacher's file: 'bert.' for a classifier, '' for a
    bare model.
    """
    for prefix in ("", f"{student.base_model_prefix}."):
        if any(name.startswith(f"{prefix}{stack}.") for name in teacher.files):
            return prefix
    kind, own = teacher.config.get("model_type"), student.config.model_type
    raise StudentError(
        f"option 'init_from': {teacher.folder} (a '{kind}') has no tensors '{stack}.…', which a '{own}' student needs"
    )


def _check_layers(teacher: TeacherWeights, stack: str) -> None:
    numbers = (name.removeprefix(stack).split(".")[0] for name in teacher.files if name.startswith(stack))
    there = {int(number) + 1 for number in numbers if number.isdigit()}
    lacking = [layer for layer in teacher.layers if layer not in there]
    if lacking:
        raise StudentError(
            f"option 'init_layers': {teacher.folder} has no layer {', '.join(map(str, lacking))}; "
            f"it has layers {min(there)} to {max(there)}"
        )


def _teacher_name(name: str, stack: str, layers: list[int]) -> str:
    """The teacher's name of the student's parameter: student layer i is the teacher's layer layers[i]."""
    if not name.startswith(f"{stack}."):
        return name
    number, rest = name.removeprefix(f"{stack}.").split(".", 1)
    return f"{stack}.{layers[int(number)] - 1}.{rest}"


def _open_weights(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StudentError(f"option 'init_from': {path} can't be read: {error}") from None


def _read_tensor(weights: Any, name: str, parameter: Tensor, *, rows_may_differ: bool) -> Tensor:
    """The tensor `name`, as many rows of it as the student has; StudentError says both shapes where they
    differ.
    """
    stored = weights.get_slice(name)
    theirs, ours = list(stored.get_shape()), list(parameter.shape)
    longer = rows_may_differ and theirs[1:] == ours[1:] and theirs[0] >= ours[0]
    if theirs != ours and not longer:
        raise StudentError(
            f"option 'init_from': the teacher's '{name}' has shape {theirs}, the student's {ours}: "
            f"a student that starts from a teacher has its widths, and no more tokens and positions than it"
        )
    return stored[: ours[0]].to(parameter.dtype) if longer else weights.get_tensor(name).to(parameter.dtype)
