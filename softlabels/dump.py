"""STAGE 1: a corpus and a teacher come in, a cache goes out. The only stage that runs the teacher.

Read a shard of rows, tokenise it, run the teacher over it in batches of similar length, take what was asked for, write
it in the corpus's order: `softlabels.engines` does these at once. Whole shards have receipts, so the same command again
goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from softlabels.cache.build import build_cache, check_rows, image_teacher_card, plan_manifest, teacher_card
from softlabels.cache.format import EXAMPLES, DumpCard, FieldSpec, Manifest, MaskingCard, TeacherCard
from softlabels.cache.info import clipped_values
from softlabels.cache.reader import capture_of
from softlabels.captures import TeacherRun, parse_captures, prepare
from softlabels.captures.forward import Request
from softlabels.captures.output_head import OutputHead, keep_head
from softlabels.config import DumpOptions, Masking
from softlabels.corpus import Corpus
from softlabels.engines.local import ShardTask, Steps, run_shards
from softlabels.errors import ConfigError, TeacherError
from softlabels.pixels import ImageReader, check_sequence
from softlabels.progress import progress
from softlabels.tasks import TaskLabels, encode_task_labels, mask_often, tokenize_task
from softlabels.teacher import Teacher, load_teacher
from softlabels.tokens import pad_batch, resolve_max_length
from softlabels.types import IMAGES, LANGUAGE_MODELS, Example, ImageBatch, Task, TokenBatch, TokenizedExample

_PROBE_WORDS = 4
_DEFAULT_CAPTURES: dict[Task, str] = {
    "sentence-embedding": "pooled",
    "masked-lm": "vocab:topk=64",
    "causal-lm": "vocab:topk=64",
}


@dataclass(frozen=True, slots=True)
class DumpReport:
    """What a dump did."""

    cache: Path
    rows: int
    new_rows: int  # that the teacher was run over this time
    truncated: int
    fields: list[str]
    seconds: float
    bytes: int
    batch_tokens: int  # in the end: less than was asked for where memory ran out
    clipped: dict[str, int]  # of the fields that had values beyond their type (--overflow clip): how many


def dump(
    corpus: Corpus,
    *,
    teacher: str,
    out: Path,
    options: DumpOptions | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> DumpReport:
    """Run `teacher` (a folder or a name) over `corpus` and keep what `options.capture` asks for in the cache `out`.

    An interrupted dump goes on with the same call; another configuration in the same folder is refused. A finished
    cache gets only the fields that it lacks.
    """
    started = time.monotonic()
    options = options or DumpOptions()
    out = Path(out)
    requests = parse_captures(options.capture)
    loaded = load_teacher(teacher, device=device, trust_remote_code=trust_remote_code, task=options.task)
    if not requests:
        requests = parse_captures([_DEFAULT_CAPTURES.get(loaded.task, "logits")])
    _check_captures(loaded.task, requests)
    if loaded.task == IMAGES and options.max_length is not None:
        raise ConfigError("--max-length: images have no length to be cut to")
    masking = options.masking if loaded.task == "masked-lm" else None
    if masking is not None:
        corpus = mask_often(corpus, masking)
    check_rows(corpus)
    labels = encode_task_labels(loaded.task, corpus.examples, loaded.label_names)
    probe: TokenBatch | ImageBatch
    if loaded.task == IMAGES:
        images = ImageReader(loaded.processor, loaded.model, first=corpus.examples[0])
        max_length, probe, vocab_size = images.length, images.probe, 0
    else:
        images, vocab_size = None, len(loaded.tokenizer)
        max_length = resolve_max_length(options.max_length, loaded.tokenizer, loaded.model.config)
        probe = _probe(corpus, loaded, max_length=max_length, masking=masking)
    run = prepare(loaded.model, requests, probe, vocab_size=vocab_size)
    with _precision(loaded, options):
        fields = run.fields(probe, codec=options.codec)
        if images is not None:
            check_sequence(fields, run.take(probe), length=images.length)
        manifest = _plan(corpus, loaded, options, fields=fields, max_length=max_length, labels=labels, masking=masking)
        head = _head(loaded, run, probe)
        with build_cache(out, manifest, tokenizer=loaded.reader, config=loaded.model.config, head=head) as build:
            missing = {shard: absent for shard in build.shards() if (absent := build.missing(shard))}
            lacking = {name for absent in missing.values() for name in absent} - {EXAMPLES} - fields.keys()
            if lacking:  # of an earlier command that wasn't finished, or removed by a repair
                earlier = parse_captures(sorted({capture_of(field, build.manifest.fields[field]) for field in lacking}))
                run = prepare(loaded.model, requests + earlier, probe, vocab_size=vocab_size)
            done = len(corpus.examples) - sum(len(_rows_of(corpus, options, shard)) for shard in missing)
            with progress(len(corpus.examples), description="dump", done=done) as update:
                tasks = (
                    ShardTask(
                        shard,
                        rows := _rows_of(corpus, options, shard),
                        labels.part(shard * options.shard_rows, shard * options.shard_rows + len(rows)),
                        absent,
                    )
                    for shard, absent in missing.items()
                )
                budget = run_shards(
                    _steps(loaded, run, max_length=max_length, masking=masking)
                    if images is None
                    else _image_steps(loaded, run, images),
                    build,
                    tasks,
                    overflow=options.overflow,
                    update=update,
                )
            final = build.finish()
    return DumpReport(
        cache=out,
        rows=len(corpus.examples),
        new_rows=len(corpus.examples) - done,
        truncated=final.corpus.truncated,
        fields=sorted(final.fields),
        seconds=time.monotonic() - started,
        bytes=sum(table.total for table in final.shards.values()),
        batch_tokens=budget,
        clipped=clipped_values(final),
    )


def _check_captures(task: Task, requests: Sequence[Request]) -> None:
    """ConfigError where logits are asked of a teacher that gives none, or too many of them."""
    if all(request.capture != "logits" for request in requests):
        return
    if task == "sentence-embedding":
        raise ConfigError("--capture logits: an embedding model gives none; capture pooled, or hidden:LAYERS@mean")
    if task in LANGUAGE_MODELS:
        raise ConfigError(
            f"--capture logits: a {task} gives as many as its vocabulary has tokens: capture vocab:topk=64 or "
            f"vocab:exact"
        )


def _probe(corpus: Corpus, teacher: Teacher, *, max_length: int, masking: Masking | None) -> TokenBatch:
    """A short row of a few words at least, so that there is something to attend to, and to predict."""
    wordy = [example for example in corpus.examples if len(example.text.split()) >= _PROBE_WORDS]
    chosen = min(wordy, key=lambda row: len(row.text)) if wordy else max(corpus.examples, key=lambda row: len(row.text))
    row = replace(chosen, label=None)
    labels = encode_task_labels(teacher.task, [row], teacher.label_names)
    tokens = tokenize_task(
        teacher.task, teacher.tokenizer, [row], max_length=max_length, labels=labels, masking=masking
    )
    return _batch(teacher, tokens.examples)


def _head(teacher: Teacher, run: TeacherRun, probe: TokenBatch | ImageBatch) -> OutputHead | None:
    """The teacher's output head, where logits are to be rebuilt from what it sees."""
    if all((request.capture, request.form) != ("vocab", "exact") for request in run.requests):
        return None
    seen = run.forward(probe)
    if seen.head_states is None or seen.logits is None:
        raise TeacherError(f"--capture vocab: a teacher for {teacher.task} has no vocabulary to speak of")
    return keep_head(teacher.model, seen.head_states, seen.logits, vocab_size=len(teacher.tokenizer))


def _rows_of(corpus: Corpus, options: DumpOptions, shard: int) -> list[Example]:
    return corpus.examples[shard * options.shard_rows : (shard + 1) * options.shard_rows]


def _steps(teacher: Teacher, run: TeacherRun, *, max_length: int, masking: Masking | None) -> Steps:
    """What the engine does with a shard: the task's part of it."""
    pad_token_id = _pad_id(teacher)  # asked for here: a thread of its own uses the tokenizer then
    return Steps(
        tokenize=lambda task: tokenize_task(
            teacher.task,
            teacher.tokenizer,
            task.examples,
            max_length=max_length,
            labels=task.labels,
            masking=masking,
        ),
        pad=lambda examples: pad_batch(examples, pad_token_id=pad_token_id),
        take=run.take,
        device=teacher.model.device,
    )


def _image_steps(teacher: Teacher, run: TeacherRun, images: ImageReader) -> Steps:
    return Steps(
        tokenize=lambda task: images.tokenize(task.examples, task.labels.classes),
        pad=images.batch,
        take=run.take,
        device=teacher.model.device,
        expect=images.expect,
    )


def _batch(teacher: Teacher, examples: Sequence[TokenizedExample]) -> TokenBatch:
    return pad_batch(examples, pad_token_id=_pad_id(teacher)).to(teacher.model.device)


def _pad_id(teacher: Teacher) -> int:
    return int(teacher.tokenizer.pad_token_id)


def _precision(teacher: Teacher, options: DumpOptions):
    """float32, or autocast to the precision asked for."""
    dtype = getattr(torch, options.dtype)
    return torch.autocast(teacher.model.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _plan(
    corpus: Corpus,
    teacher: Teacher,
    options: DumpOptions,
    *,
    fields: dict[str, FieldSpec],
    max_length: int,
    labels: TaskLabels,
    masking: Masking | None,
) -> Manifest:
    """The manifest as it stands before the first shard."""
    return plan_manifest(
        corpus,
        labelled=labels.labelled,
        teacher=_card(teacher),
        tokenizer=teacher.reader,
        dump=DumpCard(
            max_length=max_length,
            shard_rows=options.shard_rows,
            batch_tokens=options.batch_tokens,
            dtype=options.dtype,
            text=options.text and teacher.task != IMAGES,
            masking=None if masking is None else MaskingCard(**masking.model_dump()),
        ),
        fields=fields,
    )


def _card(teacher: Teacher) -> TeacherCard:
    if teacher.task == IMAGES:
        return image_teacher_card(name=teacher.name, weights_hash=teacher.weights_hash, label_names=teacher.label_names)
    return teacher_card(
        teacher.tokenizer,
        name=teacher.name,
        weights_hash=teacher.weights_hash,
        label_names=teacher.label_names,
        task=teacher.task,
    )
