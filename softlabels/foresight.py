"""A recipe comes in; what its students would fail at, once the teacher has been paid for, is told before.

Only configurations are read: of the models, what layers there are; of the recipe, which fields its dump will take.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softlabels.cache.build import tokenizer_hash
from softlabels.captures import parse_captures, resolve_layers
from softlabels.captures.choose import choose_captures
from softlabels.captures.forward import Request
from softlabels.config import ASSISTANT, BASE, PRETRAINED, TEACHER, DumpOptions, StudentOptions
from softlabels.errors import ConfigError, StudentError, TeacherError
from softlabels.losses import LAYER_LOSSES, NEEDS
from softlabels.objective import Term, fill_in, layers_of, refuse_lacking
from softlabels.phases import write_out
from softlabels.pretrained import load_tokenizer, resolve_pretrained
from softlabels.recipes import (
    Assistant,
    FederatedRecipe,
    MultiTaskRecipe,
    Pretraining,
    Recipe,
    TeacherChoice,
    plain_options,
)
from softlabels.students import StudentSpec, count_layers
from softlabels.students.shapes import read_shape
from softlabels.students.starts import read_setting
from softlabels.teacher import teacher_task
from softlabels.training.many_tasks import task_options
from softlabels.types import LANGUAGE_MODELS, Task, layer_field

# losses on hidden states that compare them value by value
_SAME_WIDTH = ("hidden_mse", "hidden_cosine", "pkd", "layer_output", "feature_map_mse", "gram")


def check_recipe(recipe: Recipe) -> None:
    """ConfigError or StudentError for a student whose losses ask for what its cache will not hold, or that can't be.

    What needs a teacher that is not here to be looked at, or that is made from nothing, is left to its own stage.
    """
    if recipe.pretrain is not None:
        first = recipe.pretrain
        with _naming("student 'pretrain'"):
            _check_student(first.student, _seen(first.teacher, first.dump), None)
    seen = _seen(recipe.teacher, recipe.dump)
    last = seen
    for assistant in recipe.assistants:
        with _naming(f"assistant '{assistant.name}'"):
            last = _check_assistant(assistant, recipe, last)
    for entry in recipe.students:
        with _naming(f"student '{entry.name}'"):
            _check_student(entry, last, recipe.pretrain)
            if entry.direct_twin:
                _check_student(entry, seen, recipe.pretrain)
            if entry.joint is not None:
                _check_student(entry.joint_options().students["local"], last, recipe.pretrain)


def check_federation(recipe: FederatedRecipe) -> None:
    """The same of the parties' student."""
    with _naming("student"):
        _check_student(recipe.student, _seen(recipe.teacher, recipe.dump), None)


def check_tasks_of_recipe(recipe: MultiTaskRecipe) -> None:
    """The same of a student of several tasks; and ConfigError where their teachers' tokenizers are not one."""
    for task in recipe.tasks:
        with _naming(f"student '{recipe.name}/{task.name}'"):
            _check_student(task_options(recipe.student, task.name), _seen(task.teacher, task.dump), None)
    folders = {task.name: _folder(task.teacher) for task in recipe.tasks}
    known = {name: tokenizer_hash(load_tokenizer(folder)) for name, folder in folders.items() if folder is not None}
    for name, mark in known.items():
        first = next(iter(known))
        if mark != known[first]:
            raise ConfigError(
                f"one encoder reads for all tasks, and the teachers of '{first}' and '{name}' have different "
                f"tokenizers ({folders[first]}, {folders[name]}): tune both from one model"
            )


def shape_assistant(assistant: Assistant, recipe: Recipe, teacher: dict[str, Any]) -> dict[str, Any]:
    """The options of an assistant of a `teacher` (its config.json): its own, over the rule's where they say no shape.

    The rule is MiniLM's: as deep as the teacher, and otherwise as the first student that is a transformer; one that
    starts from a model is as wide as that.
    """
    own = assistant.options
    if own.keys() & {"preset", "config", "init_from"}:
        return own
    models = [entry.options for entry in recipe.students if entry.student == "transformer"]
    shapes = [_without_start(model, recipe.teacher, recipe, teacher) for model in models]
    shapes = [shape for shape in shapes if shape and "config" not in shape]
    depth = layers_of(teacher)
    if not own.keys() & {"hidden_size", "d_model", "dim"} and not shapes:
        raise ConfigError(
            "it would be as wide as the recipe's first transformer, and no student says how wide that is: give its "
            "options, such as {layers: 6, hidden_size: 128}"
        )
    if not own.keys() & {"layers", "num_hidden_layers"} and depth is None:
        raise ConfigError("it would be as deep as its teacher, which does not say how deep that is: give option layers")
    shape = {} if own.keys() & {"hidden_size", "d_model", "dim"} else dict(shapes[0])
    for name in ("layers", "num_hidden_layers"):
        shape.pop(name, None)
    if not own.keys() & {"layers", "num_hidden_layers"}:
        shape["layers"] = depth
    return shape | own


def _without_start(
    options: dict[str, Any], teacher: TeacherChoice, recipe: Recipe, config: dict[str, Any]
) -> dict[str, Any]:
    """A student's `options` without what it starts from, and the sizes that it has from that written out.

    `teacher` is what BASE and TEACHER mean, `config` stands for its config.json where it is not here to be read.
    """
    own = {key: value for key, value in options.items() if not key.startswith("init_")}
    start = options.get("init_from")
    if start is None or start == ASSISTANT:
        return own
    if start == PRETRAINED:
        assert recipe.pretrain is not None  # Recipe asks for it
        first = recipe.pretrain
        return _without_start(first.student.options, first.teacher, recipe, config) | own
    folder = _folder(teacher) if start in (BASE, TEACHER) else Path(str(start))
    if folder is not None and (folder / "config.json").is_file():
        config = _read_config(folder)
    sizes = {name: read_setting(config, name) for name in ("model_type", "hidden_size", "intermediate_size")}
    sizes["heads"] = read_setting(config, "num_attention_heads")
    return {option: size for option, size in sizes.items() if size is not None} | own


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Faults inside name the model."""
    try:
        yield
    except (ConfigError, StudentError) as error:
        raise type(error)(f"{model}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known of a cache that is still to be dumped."""

    dump: DumpOptions
    config: dict[str, Any]  # the config.json of the teacher that it is dumped from
    task: Task
    folder: Path | None  # the first teacher's, or what it is tuned from; None of an assistant's


def _seen(teacher: TeacherChoice, dump: DumpOptions) -> _Seen | None:
    folder = _folder(teacher)
    if folder is None:
        return None
    config = _read_config(folder)
    task = teacher.train.task if teacher.train is not None else teacher_task(str(folder), dump.task)
    return _Seen(dump, config, task, folder)


def _check_assistant(assistant: Assistant, recipe: Recipe, seen: _Seen | None) -> _Seen | None:
    """The assistant as a student of what was `seen`; what will be seen of its own cache."""
    if seen is None:
        return None
    shaped = plain_options(assistant, {"options": shape_assistant(assistant, recipe, seen.config)})
    _check_student(shaped, seen, recipe.pretrain)
    shape = None if seen.folder is None else _shape(shaped, seen.folder, recipe.pretrain)
    if shape is None or shape.get("init_from") == ASSISTANT:
        return None
    config = read_shape(_spec(shape, seen.config, seen.task, seen.dump)).config
    return _Seen(assistant.dump or recipe.dump, config.to_dict(), seen.task, None)


def _check_student(options: StudentOptions, seen: _Seen | None, pretrain: Pretraining | None) -> None:
    if seen is None:
        return
    shape = _shape(options, seen.folder, pretrain)
    if shape is None:
        return
    dump, config, task, depth = seen.dump, seen.config, seen.task, layers_of(seen.config)
    spec = _spec(shape, config, task, dump)
    layers = count_layers(options.student, spec)
    own = None if layers is None else read_shape(spec).config.to_dict()
    requests = resolve_layers(choose_captures(parse_captures(dump.capture), task), layers=depth)
    for phase in write_out(options.all_phases(), student_layers=layers, teacher_layers=depth):
        terms = fill_in(phase, task, student_layers=layers, teacher_layers=lambda: _known(depth, seen.folder))
        if own is not None:
            _check_sizes(terms, own, config)
        refuse_lacking(terms, _fields(requests), config, language=task in LANGUAGE_MODELS)


def _check_sizes(terms: Sequence[Term], student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """ConfigError where a loss compares heads, or values of hidden states, of which the models have other numbers."""
    heads = "num_attention_heads"
    for term in (term for term in terms if term.loss in LAYER_LOSSES):
        (need,) = NEEDS[term.loss]
        takes = inspect.signature(LAYER_LOSSES[term.loss]).parameters
        by_head = "heads" in takes and term.options.get("heads", takes["heads"].default) == "each"
        by_head |= need == "query" and "relation_heads" not in term.options
        by_group = need in ("key", "value") and "relation_heads" not in term.options
        by_value = term.loss in _SAME_WIDTH and term.project is None
        for wanted, setting, option, way_out in (
            (by_head, heads, "heads", "give it as many (option heads: teacher)"),
            (by_group, "num_key_value_heads", "heads of keys and values", "give it as many"),
            (by_value, "hidden_size", "hidden_size", "give the loss project: linear"),
        ):
            mine, theirs = (read_setting(config, setting) for config in (student, teacher))
            if wanted and by_group:  # where they are not grouped there is one for each query
                mine, theirs = mine or read_setting(student, heads), theirs or read_setting(teacher, heads)
            if wanted and mine is not None and theirs is not None and mine != theirs:
                raise ConfigError(
                    f"loss '{term.loss}' needs the same {option} on both sides, and the student has {mine}, its "
                    f"teacher {theirs}: {way_out}"
                )


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _folder(teacher: TeacherChoice) -> Path | None:
    """The folder of the teacher or of what it is tuned from; None where there is none to look at."""
    if teacher.train is not None and teacher.train.from_scratch:
        return None
    try:
        return resolve_pretrained(teacher.model)
    except TeacherError:
        return None


def _shape(options: StudentOptions, teacher: Path | None, pretrain: Pretraining | None) -> dict[str, Any] | None:
    """The options that a student has its layers from, `init_from` a folder that is there; None where none is."""
    own = options.options
    start = own.get("init_from")
    if start == ASSISTANT:
        return None
    if start in (BASE, TEACHER):  # a tuned teacher has the layers of what it was tuned from
        return None if teacher is None else own | {"init_from": str(teacher)}
    if start != PRETRAINED:
        return own
    assert pretrain is not None  # Recipe asks for it
    before = _folder(pretrain.teacher)
    first = None if before is None else _shape(pretrain.student, before, None)
    if first is None:
        return None
    own = {name: value for name, value in own.items() if not name.startswith("init_")}
    if "layers" in own or "num_hidden_layers" in own:
        first = {name: value for name, value in first.items() if not name.startswith("init_")}
    return first | own


def _spec(shape: dict[str, Any], config: dict[str, Any], task: Task, dump: DumpOptions) -> StudentSpec:
    """As the cache will say it, where that decides how many layers there are."""
    return StudentSpec(
        label_names=[],
        vocab_size=config.get("vocab_size") or 2,
        pad_token_id=0,
        unk_token_id=None,
        max_length=dump.max_length or 1,
        used_ids=np.array([], dtype=np.int64),
        teacher_config=config,
        options=shape,
        task=task,
    )


def _known(depth: int | None, folder: Path | None) -> int:
    if depth is None:
        where = "the assistant" if folder is None else folder / "config.json"
        raise ConfigError(f"{where} does not say how many layers the teacher has")
    return depth


def _fields(requests: list[Request]) -> set[str]:
    """The fields that a dump of `requests` gives."""
    found: set[str] = set()
    for request in requests:
        for kind in ("query", "key", "value") if request.capture == "qkv" else (request.capture,):
            form = f"@{request.form}" if request.form else ""
            names = [layer_field(kind, layer) + form for layer in request.layers or ()]
            found.update(names or [kind])
    return found
