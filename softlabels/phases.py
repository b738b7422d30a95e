"""What a training's phases come to for one student: progressive ones written out, and what learns how fast."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softlabels.config import LAYER_LOSSES, PENALTIES, LossTerm, Phase, suggest
from softlabels.errors import ConfigError
from softlabels.objective import map_term
from softlabels.types import LayerGroup, LayerPair

_EMBEDDINGS = re.compile(r"embed|wte$|wpe$")
_LAYERS = re.compile(r"layers:(\d+)(?:-(\d+))?")


# ---------------------------------------------------------------------------------------------- progressive transfer


def write_out(phases: Sequence[Phase], *, student_layers: int | None, teacher_layers: int | None) -> list[Phase]:
    """`phases`, each progressive one as a phase for every layer of its maps, from the lowest up.

    In the phase of layer i only the losses on that layer are left, and penalties; all below it is frozen, or learns at
    the multiple that `progressive` is (MobileBERT's progressive knowledge transfer: Sun et al. 2020, section 3.3).
    """
    written: list[Phase] = []
    for phase in phases:
        if not phase.progressive:
            written.append(phase)
            continue
        if student_layers is None or teacher_layers is None:
            who = "this student has" if student_layers is None else "the teacher's config in the cache tells of"
            raise ConfigError(f"phase '{phase.name}' is progressive, and {who} no layers to go through")
        written += _by_layer(phase, student_layers, teacher_layers)
    return written


def _by_layer(phase: Phase, student_layers: int, teacher_layers: int) -> Iterator[Phase]:
    mapped: list[tuple[LossTerm, tuple[LayerPair | LayerGroup, ...]]] = []
    penalties = [term for term in phase.terms if term.loss in PENALTIES]
    for term in phase.terms:
        if term in penalties:
            continue
        if term.loss not in LAYER_LOSSES:
            raise ConfigError(f"phase '{phase.name}' is progressive: loss '{term.loss}' has no layers, leave it out")
        what = f"phase '{phase.name}', loss '{term.loss}'"
        mapped.append((term, map_term(term, student=student_layers, teacher=teacher_layers, what=what)))
        if any(isinstance(pair, LayerGroup) and len(pair.student) > 1 for pair in mapped[-1][1]):
            raise ConfigError(f"{what} looks at all layers at once: it can't be progressive, leave it out")
    if not mapped:
        raise ConfigError(f"phase '{phase.name}' is progressive and has no loss on layers: give it one")
    layers = sorted({_own(pair) for _, pairs in mapped for pair in pairs})
    for layer in layers:
        terms = []
        for term, pairs in mapped:
            kept = [index for index, pair in enumerate(pairs) if _own(pair) == layer]
            depth = [term.depth[index] for index in kept] if isinstance(term.depth, list) else term.depth
            if kept:
                update = {"map": [_entry(pairs[index]) for index in kept], "depth": depth, "cover": False}
                terms.append(term.model_copy(update=update))
        terms += penalties
        below = [*(["embeddings"] if layer > 0 else []), *([f"layers:1-{layer - 1}"] if layer > 1 else [])]
        rest: dict[str, Any] = {"freeze": [*phase.freeze, *below]}
        if not isinstance(phase.progressive, bool):
            rest = {"slow": phase.slow | dict.fromkeys(below, phase.progressive)}
        yield phase.model_copy(update={"name": f"{phase.name}-{layer}", "losses": terms, "progressive": False, **rest})


def _own(pair: LayerPair | LayerGroup) -> int:
    """The student's layer whose phase it is."""
    return pair.student[0] if isinstance(pair, LayerGroup) else pair.student


def _entry(pair: LayerPair | LayerGroup) -> list:
    if isinstance(pair, LayerGroup):
        return [pair.student[0], list(pair.teacher)]
    if pair.then is None:
        return [pair.student, pair.teacher]
    return [[pair.student, pair.then.student], [pair.teacher, pair.then.teacher]]


# ------------------------------------------------------------------------------------------------ parts of a student


def parameters_of(student: PreTrainedModel, part: str) -> list[str]:
    """The names of the parameters of a part: 'embeddings', 'layers:1-3', 'head', or the start of their names.

    ConfigError where the student has no such part.
    """
    names = [name for name, _ in student.named_parameters()]
    body = {f"{_body_name(student)}{name}" for name, _ in student.base_model.named_parameters()}
    stack = _stack_of_layers(student)
    parts = {
        "embeddings": [name for name in names if any(_EMBEDDINGS.match(piece) for piece in name.split("."))],
        "head": [name for name in names if name not in body],
    }
    if match := _LAYERS.fullmatch(part):
        wanted = range(int(match[1]), int(match[2] or match[1]) + 1)
        there = wanted and wanted[0] >= 1 and wanted[-1] <= len(stack)
        starts = tuple(f"{stack[layer - 1]}." for layer in wanted) if there else ()
        found = [name for name in names if name.startswith(starts)] if starts else []
    else:
        found = parts.get(part) or [name for name in names if name == part or name.startswith(f"{part}.")]
    if not found:
        known = sorted({".".join(name.split(".")[:2]) for name in names} | {name for name in parts if parts[name]})
        known += [f"layers:1-{len(stack)}"] if stack else []
        raise ConfigError(f"the student has no part '{part}': there are {', '.join(known)}.{suggest(part, known)}")
    return found


def _body_name(student: PreTrainedModel) -> str:
    return "" if student.base_model is student else f"{student.base_model_prefix}."


def _stack_of_layers(student: PreTrainedModel) -> list[str]:
    """The names of the layers, lowest first: the first list of modules that is as long as the config says."""
    count = getattr(student.config, "num_hidden_layers", None)
    for name, module in student.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{name}.{index}" for index in range(count)]
    return []


@contextmanager
def frozen(student: PreTrainedModel, parts: Sequence[str]) -> Iterator[None]:
    """`student` with the parameters of `parts` held still; afterwards all learn again that did before."""
    parameters = dict(student.named_parameters())
    chosen = {name for part in parts for name in parameters_of(student, part)}
    held = [parameters[name] for name in sorted(chosen) if parameters[name].requires_grad]
    if len(held) == sum(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"freezing {', '.join(parts)} leaves the student nothing to learn with")
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
