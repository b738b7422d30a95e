"""A cache, a student's options and a validation corpus, checked against each other before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as computed_once
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from softlabels.cache import Cache
from softlabels.config import ASSISTANT, BASE, PRETRAINED, TEACHER, Phase, StudentOptions
from softlabels.corpus import Corpus
from softlabels.errors import ConfigError, StudentError
from softlabels.objective import Objective, build_objective, teacher_layers
from softlabels.phases import write_out
from softlabels.runs import Run, load_run
from softlabels.students import LINEAR, StudentSpec, check_student, count_layers
from softlabels.teaching_rows import split_rows, teaching_rows
from softlabels.tokens import longest_input
from softlabels.training.learner import Stretch
from softlabels.types import LANGUAGE_MODELS


def check_options(options: StudentOptions) -> None:
    """StudentError or ConfigError for what no cache could make possible."""
    if options.from_run is not None and options.options:
        raise ConfigError(
            f"a student that is trained further is what it was: leave out the options {', '.join(options.options)}"
        )
    if options.prune is not None and options.prune.heads is not None and options.student != "transformer":
        raise StudentError(
            f"student '{options.student}' has no attention heads that can be pruned: give a magnitude instead"
        )
    if check_student(options.student) != LINEAR:
        return
    if options.prune is not None:
        raise ConfigError("the linear student is fitted in one go, and its weights can't be pruned: leave 'prune' out")
    if options.window is not None:
        raise ConfigError("the linear student is fitted in one go, on all rows: leave --window out")
    if options.phases:
        raise ConfigError("the linear student is fitted in one go: give it 'losses' and no 'phases'")
    if options.loss_names() not in ({"mse_logits"}, {"ce"}):
        raise ConfigError(
            f"the linear student is a regression on the teacher's logits (--loss mse_logits) or on the labels "
            f"(--loss ce), one of them alone; not {', '.join(sorted(options.loss_names()))}"
        )


def fit_to_cache(
    cache: Cache, options: StudentOptions, *, out: Path, validation: Corpus | None
) -> tuple[StudentSpec, Run | None]:
    """What the cache asks of the student, and the run that it starts from, if any; refuses what can't be of such."""
    check_options(options)
    check_start(options)
    check_task(cache, options, validation)
    return student_spec(cache, options), read_source(options, cache, out)


def check_start(options: StudentOptions) -> None:
    """ConfigError for a word that only a recipe's run can make a folder of."""
    start = options.options.get("init_from")
    if start in (BASE, TEACHER, PRETRAINED, ASSISTANT) and not Path(start).is_dir():
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
    tokenizer = computed_once(cache.tokenizer)  # asked many times for its special tokens, and loaded in 0.1 s
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
        mask_token_id=tokenizer().mask_token_id,
        tokenizer=tokenizer,
        decoder_start=None if cache.decoder_starts is None else int(cache.decoder_starts[0]),
    )


def with_tokens(spec: StudentSpec, cache: Cache, rows: np.ndarray) -> StudentSpec:
    """`spec` with the tokens of these training rows."""
    return replace(spec, used_ids=cache.used_ids(rows), sequences=lambda: cache.sequences(rows))


def read_source(options: StudentOptions, cache: Cache, out: Path) -> Run | None:
    """The run that is trained further; StudentError where it doesn't fit the cache."""
    if options.from_run is None:
        return None
    source = load_run(options.from_run)
    if out.resolve() == source.path.resolve():
        raise StudentError(f"--out {out} is the run that is trained further: give another folder")
    student = network_of(source)
    if options.student != source.record.student:
        raise StudentError(f"{source.path} is a {source.record.student} student, not a {options.student}")
    refuse_foreign(source, student, cache)
    return source


def refuse_foreign(run: Run, student: PreTrainedModel, cache: Cache) -> None:
    """StudentError where the `student` of a run can't read `cache`, or would answer something else of it."""
    if run.record.task != cache.manifest.teacher.task:
        raise StudentError(
            f"{run.path} is a {run.record.task} student, and the teacher of cache {cache.shown} is for "
            f"{cache.manifest.teacher.task}: give a cache of its own teacher"
        )
    if run.label_names != cache.label_names:
        raise StudentError(
            f"{run.path} has the classes {', '.join(run.label_names)}, cache {cache.shown} "
            f"{', '.join(cache.label_names)}: give a cache of its own teacher"
        )
    assert run.tokenizer is not None
    if run.tokenizer.get_vocab() != cache.tokenizer().get_vocab():
        raise StudentError(
            f"{run.path} reads other tokens than cache {cache.shown} holds: give a cache of a teacher with the same "
            f"tokenizer"
        )
    limit = longest_input(run.tokenizer, student.config)
    if cache.manifest.dump.max_length > limit:
        raise StudentError(
            f"{run.path} reads {limit} tokens at most, and rows of cache {cache.shown} have up to "
            f"{cache.manifest.dump.max_length}: dump it with --max-length {limit}"
        )


def network_of(source: Run) -> PreTrainedModel:
    """The torch student of a run; StudentError where it has none."""
    if not isinstance(source.student, PreTrainedModel):
        raise StudentError(f"{source.path} is a {source.kind} student, and only torch students are trained further")
    return source.student


def _layers(options: StudentOptions, spec: StudentSpec, source: Run | None) -> int | None:
    """How many layers with hidden states and attention the student has; None for one that has none."""
    if source is None:
        return count_layers(options.student, spec)
    layers = getattr(network_of(source).config, "num_hidden_layers", None)
    return layers if options.student == "transformer" else None


def find_aims(
    cache: Cache, options: StudentOptions, spec: StudentSpec, source: Run | None = None
) -> list[tuple[Phase, Objective]]:
    """The phases that `options` come to, each with its objective; nothing but the cache's manifest is read."""
    layers = _layers(options, spec, source)
    phases = write_out(options.all_phases(), student_layers=layers, teacher_layers=teacher_layers(cache))
    return [(phase, build_objective(phase, cache, student_layers=layers)) for phase in phases]


def find_stretches(
    cache: Cache,
    options: StudentOptions,
    spec: StudentSpec,
    *,
    validation: Corpus | None,
    source: Run | None = None,
) -> list[Stretch]:
    """The phases with their objectives and the rows that each of them sees."""
    aims = find_aims(cache, options, spec, source)
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
            f"the student gives {student.config.num_labels} classes, cache {cache.shown} has {len(cache.label_names)} "
            f"({', '.join(cache.label_names[:5])} …): build the student for this cache"
        )
