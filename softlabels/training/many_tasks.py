"""Tasks that share an encoder: whether they can, and how they come to."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn
from transformers import PreTrainedModel

from softlabels.cache import Cache
from softlabels.config import MultiTaskOptions, StudentOptions, suggest
from softlabels.corpus import Corpus
from softlabels.errors import CacheError, ConfigError
from softlabels.students import LINEAR, check_student
from softlabels.training.preparing import check_start

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HEAD = "classifier"  # of a recurrent student; of a transformer, all that is not its base model


def check_tasks(
    caches: Mapping[str, Cache], options: MultiTaskOptions, validation: Mapping[str, Corpus] | None
) -> None:
    """ConfigError or CacheError where these tasks can't be learned together."""
    if check_student(options.student) == LINEAR:
        raise ConfigError("the linear student has no encoder to share: take a transformer or a bilstm")
    check_start(options)
    if len(caches) < 2:
        have = f"there is only '{next(iter(caches))}'" if caches else "there is none"
        raise ConfigError(f"several tasks share an encoder, and {have}: give two or more, or use train-student")
    for name in caches:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"'{name}' is no name for a task: letters, digits, '.', '_' and '-', for its folder")
    _refuse_unknown(options.tasks, caches, "something of its own")
    if validation is not None:
        _refuse_unknown(validation, caches, "a validation corpus")
        if lacking := [name for name in caches if name not in validation]:
            raise ConfigError(
                f"task '{lacking[0]}' has no validation corpus, and others have: the tasks are weighed against each "
                f"other, so give one for every task, or for none"
            )
    _check_caches(caches)


def _refuse_unknown(named: Collection[str], caches: Mapping[str, Cache], where: str) -> None:
    for name in named:
        if name not in caches:
            raise ConfigError(
                f"{where} is said for a task '{name}', which has no cache: there are {', '.join(caches)}."
                f"{suggest(name, caches)}"
            )


def _check_caches(caches: Mapping[str, Cache]) -> None:
    """CacheError where a cache is of no classifier, or was not read with the first one's tokenizer."""
    (first, one), *others = caches.items()
    for name, cache in caches.items():
        task = cache.manifest.teacher.task
        if task != "sequence-classification":
            raise CacheError(
                f"task '{name}': several tasks are classified by one encoder, and the teacher of cache {cache.shown} "
                f"is for {task}"
            )
    for name, cache in others:
        if cache.manifest.tokenizer_hash != one.manifest.tokenizer_hash:
            raise CacheError(
                f"tasks '{first}' and '{name}' were read with different tokenizers, and one encoder reads for both: "
                f"{_difference(one, cache)}. Dump both with teachers tuned from one model"
            )


def _difference(one: Cache, other: Cache) -> str:
    """What tells the tokenizers of two caches apart."""
    mine, theirs = one.tokenizer(), other.tokenizer()
    if len(mine) != len(theirs):
        return f"{one.path} has {len(mine):,} tokens, {other.path} {len(theirs):,}"
    for role, token in mine.special_tokens_map.items():
        if token != theirs.special_tokens_map.get(role):
            return f"the {role} is {token} in {one.path}, {theirs.special_tokens_map.get(role)} in {other.path}"
    numbers = theirs.get_vocab()
    for token, number in sorted(mine.get_vocab().items(), key=lambda item: item[1]):
        if numbers.get(token) != number:
            return f"token {number} is '{token}' in {one.path} and not in {other.path}"
    return f"{other.path} has a special token more"


def task_options(options: MultiTaskOptions, task: str) -> StudentOptions:
    """The options of a student that learns this task alone, and otherwise as all of them."""
    phase = options.phase_of(task)
    values = {name: getattr(options, name) for name in StudentOptions.model_fields}
    return StudentOptions(**values | {"losses": phase.losses, "temperature": phase.temperature})


def share_encoder(students: Mapping[str, PreTrainedModel]) -> None:
    """Give every student the first one's encoder: all but the head, in which alone they were built to differ."""
    one, *others = students.values()
    for student in others:
        for part in _encoder_parts(one):
            mine, theirs = getattr(one, part), getattr(student, part)
            assert _shapes(mine) == _shapes(theirs), part
            setattr(student, part, mine)


def _encoder_parts(student: PreTrainedModel) -> list[str]:
    if student.base_model is not student:
        return [student.base_model_prefix]
    return [name for name, module in student.named_children() if name != _HEAD and _shapes(module)]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
