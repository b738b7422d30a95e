"""A cache, a student's options and a validation corpus, checked against each other before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from softlabels.cache import Cache
from softlabels.config import BASE, PRETRAINED, TEACHER, Phase, StudentOptions
from softlabels.corpus import Corpus
from softlabels.errors import ConfigError, StudentError
from softlabels.objective import Objective, build_objective, teacher_layers
from softlabels.phases import write_out
from softlabels.students import LINEAR, StudentSpec, check_student, count_layers
from softlabels.teaching_rows import split_rows, teaching_rows
from softlabels.training.learner import Stretch
from softlabels.types import LANGUAGE_MODELS


def check_options(options: StudentOptions) -> None:
    """StudentError or ConfigError for what no cache could make possible."""
    if check_student(options.student) != LINEAR:
        return
    if options.phases:
        raise ConfigError("the linear student is fitted in one go: give it 'losses' and no 'phases'")
    if options.loss_names() not in ({"mse_logits"}, {"ce"}):
        raise ConfigError(
            f"the linear student is a regression on the teacher's logits (--loss mse_logits) or on the labels "
            f"(--loss ce), one of them alone; not {', '.join(sorted(options.loss_names()))}"
        )


def check_start(options: StudentOptions) -> None:
    """ConfigError for a word that only a recipe's run can make a folder of."""
    start = options.options.get("init_from")
    if start in (BASE, TEACHER, PRETRAINED) and not Path(start).is_dir():
        raise ConfigError(
            f"init_from: '{start}' is a model that softlabels run knows, and a training by itself does not: give its "
            f"folder, --option init_from=DIR"
        )


def check_task(cache: Cache, options: StudentOptions, validation: Corpus | None) -> None:
    """ConfigError for what can't be learned from such a teacher, or not by such a student."""
    task = cache.manifest.teacher.task
    if task not in ("sequence-classification", "sentence-embedding", *LANGUAGE_MODELS):
        raise ConfigError(
            f"train-student learns from classifiers and encoders of texts and from language models so far; the teacher "
            f"of this cache is for {task}. Was it fine-tuned with softlabels train-teacher?"
        )
    if task != "sequence-classification" and options.student != "transformer":
        raise ConfigError(f"student '{options.student}' can't be a {task}: give --student transformer")
    if task != "sequence-classification" and validation is not None:
        raise ConfigError(f"the student of a {task} is validated on held-out rows of its cache: leave --eval out")


def student_spec(cache: Cache, options: StudentOptions) -> StudentSpec:
    """What the cache asks of any student; the tokens of its training rows are filled in when they are read."""
    teacher = cache.manifest.teacher
    return StudentSpec(
        label_names=cache.label_names,
        vocab_size=teacher.vocab_size,
        pad_token_id=teacher.pad_token_id,
        unk_token_id=teacher.unk_token_id,
        max_length=cache.manifest.dump.max_length,
        used_ids=np.array([], dtype=np.int64),
        teacher_config=cache.teacher_config(),
        options=options.options,
        task=teacher.task,
        mask_token_id=cache.tokenizer().mask_token_id,
        tokenizer=cache.tokenizer,
        decoder_start=None if cache.decoder_starts is None else int(cache.decoder_starts[0]),
    )


def with_tokens(spec: StudentSpec, cache: Cache, rows: np.ndarray) -> StudentSpec:
    """`spec` with the tokens of these training rows."""
    return replace(spec, used_ids=cache.used_ids(rows), sequences=lambda: cache.sequences(rows))


def find_aims(cache: Cache, options: StudentOptions, spec: StudentSpec) -> list[tuple[Phase, Objective]]:
    """The phases that `options` come to, each with its objective; nothing but the cache's manifest is read."""
    layers = None if options.student == LINEAR else count_layers(options.student, spec)
    phases = write_out(options.all_phases(), student_layers=layers, teacher_layers=teacher_layers(cache))
    return [(phase, build_objective(phase, cache, student_layers=layers)) for phase in phases]


def find_stretches(
    cache: Cache, options: StudentOptions, spec: StudentSpec, *, validation: Corpus | None
) -> list[Stretch]:
    """The phases with their objectives and the rows that each of them sees."""
    aims = find_aims(cache, options, spec)
    splits = split_rows(
        cache,
        [teaching_rows(cache, objective, first=options.rows) for _, objective in aims],
        validation=validation,
        share=options.validation,
        seed=options.seed,
    )
    return [Stretch(phase, objective, split) for (phase, objective), split in zip(aims, splits, strict=True)]


def refuse_misfit(student: PreTrainedModel, cache: Cache) -> None:
    """StudentError where the student's classes are not the cache's."""
    if cache.manifest.teacher.task != "sequence-classification":
        return  # it was tried out when it was built
    if student.config.num_labels != len(cache.label_names):
        raise StudentError(
            f"the student gives {student.config.num_labels} classes, cache {cache.path} has {len(cache.label_names)} "
            f"({', '.join(cache.label_names[:5])} …): build the student for this cache"
        )
