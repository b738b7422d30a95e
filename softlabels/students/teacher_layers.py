"""Start a transformer student from a teacher, or from another finished student: its embeddings and chosen layers.

The safetensors files are opened and only the tensors wanted are read: the teacher itself is never built. Copied are
its embeddings, the chosen layers, and what else the bare model has (a pooler, a last norm), and a language model's
head; a classifier stays new, unless `init_head` asks for the teacher's.

A DistilBERT starts from a BERT or RoBERTa too (see `renames`). It has no token types, so the vector of type 0 is added
to the vector of every position: for single texts the first layer's input is exactly the teacher's; the second text of a
pair loses its type. (DistilBERT's authors left the vector out.) RoBERTa's positions are counted from the pad token's
id on, and its norms have an epsilon of 1e-5 where DistilBERT's is fixed at 1e-12: hidden states agree to about 1e-5.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabels.errors import StudentError
from softlabels.students.renames import Renames, rename
from softlabels.students.starts import Start, TeacherWeights, find_renames
from softlabels.tokens import OFFSET_POSITIONS

_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # in BERT's own file


def copy_start(start: Start, student: PreTrainedModel) -> None:
    """Copy the teacher's embeddings, chosen layers and, as `start` says, its head into `student`, in float32.

    Every parameter of the student's bare model but a pooler must be there, of the same shape; only tables of tokens and
    positions may have more rows, which are left out.
    """
    source = _Source(start.teacher, find_renames(start.teacher, student.config.model_type))
    body = student.base_model
    stack = _layer_stack(body, student.config.num_hidden_layers)
    prefix = _teacher_prefix(source, student, stack)
    _check_layers(start, prefix + source.stack(stack))
    tables = {
        f"{name}.weight"
        for name, module in body.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(f"{stack}.")
    }
    with ExitStack() as files, torch.no_grad():
        source.files = files
        for name, parameter in body.named_parameters():
            if name.startswith(f"{stack}."):
                if start.layers:
                    parameter.copy_(source.read(prefix + source.of_layer(name, stack, start.layers), parameter))
            elif name in tables:
                parameter.copy_(source.read_table(prefix, name, parameter))
            elif "pooler" not in name or source.has(prefix + name):  # this teacher may have none
                parameter.copy_(source.read(prefix + name, parameter))
        _copy_head(start, source, student)


def _copy_head(start: Start, source: _Source, student: PreTrainedModel) -> None:
    """The head's parameters that the bare model doesn't share. Some of them have an entry a token."""
    if start.head is False or (start.head is None and student.get_output_embeddings() is None):
        return
    body = {id(parameter) for parameter in student.base_model.parameters()}
    head = {name: value for name, value in student.named_parameters() if id(value) not in body}
    theirs = {name: source.of_head(name) for name in head}
    if start.head is None and not all(source.has(name) for name in theirs.values()):
        return  # a teacher that is no language model
    if student.get_output_embeddings() is None and start.teacher.config.get("id2label") is not None:
        _check_classes(start.teacher, student)
    for name, parameter in head.items():
        parameter.copy_(source.read(theirs[name], parameter, an_entry_a_token=True))


def _check_classes(teacher: TeacherWeights, student: PreTrainedModel) -> None:
    named = {int(index): name for index, name in teacher.config["id2label"].items()}
    if named != student.config.id2label:
        raise StudentError(
            f"option 'init_head': {teacher.folder} has the classes {', '.join(map(str, named.values()))}, the cache "
            f"{', '.join((student.config.id2label or {}).values())}: leave init_head out"
        )


class _Source:
    """A teacher's tensors by the student's names, its files opened when they are first read."""

    files: ExitStack

    def __init__(self, teacher: TeacherWeights, renames: Renames | None) -> None:
        self.teacher, self.renames = teacher, renames
        self.opened: dict[Path, Any] = {}

    def stack(self, own: str) -> str:
        """The name of the list of layers, without prefix, with a full stop."""
        return f"{own if self.renames is None else self.renames.stack}."

    def of_layer(self, name: str, own: str, layers: list[int]) -> str:
        """The teacher's name of a parameter in a layer: student layer i is the teacher's layer layers[i]."""
        number, rest = name.removeprefix(f"{own}.").split(".", 1)
        if self.renames is not None:
            rest = rename(rest, self.renames.layer)
        return f"{self.stack(own)}{layers[int(number)] - 1}.{rest}"

    def of_head(self, name: str) -> str:
        return name if self.renames is None else rename(name, self.renames.head)

    def has(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def _stored_name(self, name: str) -> str | None:
        if name in self.teacher.files:
            return name
        for new, old in _OLD_NAMES.items():
            if name.endswith(new) and name.removesuffix(new) + old in self.teacher.files:
                return name.removesuffix(new) + old
        return None

    def read_table(self, prefix: str, name: str, parameter: Tensor) -> Tensor:
        """A table of tokens, positions or types; a DistilBERT's positions with the teacher's type 0 added."""
        positions = self.renames is not None and name == "embeddings.position_embeddings.weight"
        pad = self.teacher.config.get("pad_token_id")
        skipped = (pad or 0) + 1 if positions and self.teacher.model_type in OFFSET_POSITIONS else 0
        values = self.read(prefix + name, parameter, skipped=skipped, more_rows=True)
        types = f"{prefix}embeddings.token_type_embeddings.weight"
        if positions and self.has(types):
            return values + self.read(types, parameter[:1], more_rows=True)
        return values

    def read(
        self,
        name: str,
        parameter: Tensor,
        *,
        skipped: int = 0,
        more_rows: bool = False,
        an_entry_a_token: bool = False,
    ) -> Tensor:
        """The tensor `name` in the shape of `parameter`; StudentError says both shapes where they differ.

        `more_rows`: it may have more rows, of which the first `skipped` and the last are left out; `an_entry_a_token`:
        it may have more tokens.
        """
        stored = self._stored_name(name)
        if stored is None:
            raise StudentError(f"option 'init_from': {self.teacher.folder} has no tensor '{name}'")
        path = self.teacher.files[stored]
        if path not in self.opened:
            self.opened[path] = self.files.enter_context(_open_weights(path))
        tensor = self.opened[path].get_slice(stored)
        theirs, ours = list(tensor.get_shape()), list(parameter.shape)
        tokens = self.teacher.config.get("vocab_size")
        may_cut = [(more_rows and not d) or (an_entry_a_token and theirs[d] == tokens) for d in range(len(theirs))]
        needed = [size + skipped * (not d) for d, size in enumerate(ours)]
        if len(theirs) != len(ours) or not all(
            there == size or (cut and there > size) for there, size, cut in zip(theirs, needed, may_cut, strict=True)
        ):
            raise StudentError(
                f"option 'init_from': the teacher's '{name}' has shape {theirs}, the student's {needed}: "
                f"a student that starts from a teacher has its widths, and no more tokens and positions than it"
            )
        values = tensor[tuple(slice(size - own, size) for size, own in zip(needed, ours, strict=True))]
        return values.to(parameter.dtype)


def _layer_stack(body: nn.Module, layers: int) -> str:
    """The name of the list of layers inside the bare model: 'encoder.layer' for BERT, 'h' for GPT-2."""
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return name
    kind = type(body).__name__
    raise StudentError(f"option 'init_from': {kind} has no list of {layers} layers to copy a teacher's layers into")


def _teacher_prefix(source: _Source, student: PreTrainedModel, stack: str) -> str:
    """What comes before the bare model's names in the teacher's file: 'bert.' for a classifier, '' for a bare model."""
    own = student.base_model_prefix if source.renames is None else source.renames.prefix
    for prefix in ("", f"{own}."):
        if any(name.startswith(prefix + source.stack(stack)) for name in source.teacher.files):
            return prefix
    raise StudentError(
        f"option 'init_from': {source.teacher.folder} (a '{source.teacher.model_type}') has no tensors "
        f"'{source.stack(stack)}…', which a '{student.config.model_type}' student needs"
    )


def _check_layers(start: Start, stack: str) -> None:
    files = start.teacher.files
    numbers = (name.removeprefix(stack).split(".")[0] for name in files if name.startswith(stack))
    there = {int(number) + 1 for number in numbers if number.isdigit()}
    lacking = [layer for layer in start.layers if layer not in there]
    if lacking:
        raise StudentError(
            f"option 'init_layers': {start.teacher.folder} has no layer {', '.join(map(str, lacking))}; "
            f"it has layers {min(there)} to {max(there)}"
        )


def _open_weights(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StudentError(f"option 'init_from': {path} can't be read: {error}") from None
