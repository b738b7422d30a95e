"""STAGE 1: a corpus and a teacher come in, a cache goes out. The only stage that runs the teacher.

Read a shard of rows, tokenise it, run the teacher over it in batches of similar length, take what was asked for, write
it in the corpus's order: `softlabels.engines` does these at once. Whole shards have receipts, so the same command again
goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  # before torch, which swallows a Ctrl-C while it imports numpy itself
import torch

from softlabels.cache.build import (
    CacheBuild,
    build_cache,
    check_rows,
    count_all,
    image_teacher_card,
    plan_manifest,
    teacher_card,
)
from softlabels.cache.codec import Overflow
from softlabels.cache.delivery import FolderPlace, new_lease
from softlabels.cache.format import EXAMPLES, DumpCard, FieldSpec, Manifest, MaskingCard, TeacherCard
from softlabels.cache.parts import Part
from softlabels.cache.reader import capture_of
from softlabels.cache.store import Store, mirror
from softlabels.cache.urls import is_url, redact
from softlabels.cache.vocab import parse_form
from softlabels.captures import TeacherRun, parse_captures, prepare
from softlabels.captures.choose import choose_captures
from softlabels.captures.factors import sample_factors
from softlabels.captures.forward import Request
from softlabels.captures.output_head import OutputHead, keep_head
from softlabels.config import DumpOptions, Masking, RayOptions
from softlabels.corpus import Corpus
from softlabels.engines.devices import Outcome, run_on_devices
from softlabels.engines.local import ShardTask, Steps, run_shards
from softlabels.errors import CacheError, ConfigError, TeacherError
from softlabels.factors import LogitFactors
from softlabels.pixels import ImageReader, check_sequence
from softlabels.progress import Update, progress
from softlabels.tasks import (
    LaterLabels,
    TaskLabels,
    encode_corpus_labels,
    encode_task_labels,
    mask_often,
    masking_rates,
    tokenize_task,
)
from softlabels.teacher import Teacher, at_precision, load_teacher
from softlabels.tokens import batches_by_length, count_row_targets, pad_batch, resolve_max_length
from softlabels.types import IMAGES, Example, ImageBatch, TokenBatch, TokenizedExample

_PROBE_WORDS = 4
_SHOWN = 10  # shards that were given up
_TRIED_ROWS = 1000
_FACTOR_ROWS, _FACTOR_BATCH = 256, 2048  # rows whose logits are looked at for factors, and tokens at a time


@dataclass(frozen=True, slots=True)
class DumpReport:
    """What a dump did."""

    cache: Path | str  # a folder, or a URL without anything secret
    part: str | None  # '3/8': all that follows is of this part
    complete: bool  # the cache; where not, other parts are still to come
    rows: int
    new_rows: int  # that the teacher was run over this time
    truncated: int
    fields: list[str]
    seconds: float
    bytes: int
    batch_tokens: int  # in the end: less than was asked for where memory ran out
    lost: list[str]  # a line for each process that died on a device or a cluster; its shards were done by another
    clipped: dict[str, int]  # of the fields that had values beyond their type (--overflow clip): how many


def dump(
    corpus: Corpus,
    *,
    teacher: str,
    out: Path | str,
    options: DumpOptions | None = None,
    device: str | None = None,
    devices: Sequence[str] | None = None,
    ray: RayOptions | None = None,
    trust_remote_code: bool = False,
    part: Part | None = None,
) -> DumpReport:
    """Run `teacher` (a folder or a name) over `corpus` and keep what `options.capture` asks for in the cache `out`.

    An interrupted dump goes on with the same call; another configuration in the same folder is refused. A finished
    cache gets only the fields that it lacks. With several `devices` ('cuda:0', 'cuda:1') each gets a process of its own
    (a script that calls this needs `if __name__ == "__main__":`); this one only plans, on the CPU, and shares out.

    With a `part` only its shards are dumped, of the same corpus. Other parts may be dumped at the same time into the
    same `out`, or into others, which `combine --rows` puts together; either way the bytes are those of one dump.

    With `ray` the shards are done by the workers of a Ray cluster, and `out` may be a URL that fsspec knows (s3://…),
    to which they bring them. A shard that none of them can do is left out: CacheError names it, the others are kept.
    """
    started = time.monotonic()
    options = options or DumpOptions()
    if ray is None and is_url(out):
        raise ConfigError(
            f"--out {redact(str(out))}: only the workers of a Ray cluster write to a URL: add --engine ray"
        )
    if ray is not None and part is not None:
        raise ConfigError("a Ray cluster shares the shards out itself: give --part to machines without --engine ray")
    requests = parse_captures(options.capture)
    check_rows(corpus)
    if devices is not None and len(devices) == 1:
        device, devices = devices[0], None
    loaded = load_teacher(
        teacher, device="cpu" if devices or ray else device, trust_remote_code=trust_remote_code, task=options.task
    )
    requests = choose_captures(requests, loaded.task)
    if loaded.task == IMAGES and options.max_length is not None:
        raise ConfigError("--max-length: images have no length to be cut to")
    masking, once = _masking(loaded, options), corpus
    if masking is not None:
        corpus = mask_often(corpus, masking)
    labels = encode_corpus_labels(loaded.task, corpus.examples, loaded.label_names)
    first = corpus.examples[0] if loaded.task == IMAGES else _first_to_try(corpus)
    way = _open_way(loaded, first, options)
    run = prepare(loaded.model, requests, way.probe, vocab_size=way.vocab_size)
    with at_precision(loaded, options.dtype):
        fields = run.fields(way.probe, codec=options.codec)
        if way.images is not None:
            check_sequence(fields, run.take(way.probe), length=way.images.length)
        manifest = _plan(
            corpus, loaded, options, fields=fields, max_length=way.max_length, labels=labels, masking=masking
        )
        head = _head(loaded, run, way.probe)
        factors = _factors(corpus, loaded, run, options, max_length=way.max_length)
        with (
            _open_out(out) as (folder, store),
            build_cache(
                folder,
                manifest,
                tokenizer=loaded.reader,
                config=loaded.model.config,
                head=head,
                factors=factors,
                part=part,
            ) as begun,
        ):
            build = replace(begun, elsewhere=store is not None)
            total = sum(len(_rows_of(corpus, options, shard)) for shard in build.own_shards())
            missing = build.all_missing(build.own_shards())
            lacking = {name for absent in missing.values() for name in absent} - {EXAMPLES} - fields.keys()
            if lacking:  # of an earlier command that wasn't finished, or removed by a repair
                earlier = parse_captures(sorted({capture_of(field, build.manifest.fields[field]) for field in lacking}))
                run = prepare(loaded.model, requests + earlier, way.probe, vocab_size=way.vocab_size)
            done = total - sum(len(_rows_of(corpus, options, shard)) for shard in missing)
            if missing and masking is not None:
                rates = masking_rates(once, loaded.tokenizer, masking, max_length=way.max_length)
                labels = replace(labels, rates=rates)
            with progress(total, description="dump" if part is None else f"dump {part}", done=done) as update:
                tasks = _Tasks(corpus, labels, options, list(missing.items()))
                again = _Again(_anywhere(teacher), trust_remote_code, loaded.weights_hash, run.requests, first, options)
                if ray is not None and missing:
                    outcome = _run_on_ray(
                        ray, again, build, store, tasks, total=len(missing), overflow=options.overflow, update=update
                    )
                elif devices and missing:
                    outcome = run_on_devices(devices, again, build, tasks, overflow=options.overflow, update=update)
                else:
                    steps = _steps(loaded, run, options, way)
                    outcome = Outcome(run_shards(steps, build, tasks, overflow=options.overflow, update=update), [])
            final = build.finish_part()
            own = build.count_own() if part is not None or final is None else count_all(final)
            if store is not None:
                store.finish()
    return DumpReport(
        cache=redact(str(out)) if is_url(out) else Path(out),
        part=None if part is None else str(part),
        complete=final is not None,
        rows=total,
        new_rows=total - done,
        truncated=own.truncated,
        fields=sorted(build.manifest.fields),
        seconds=time.monotonic() - started,
        bytes=own.bytes,
        batch_tokens=outcome.batch_tokens,
        lost=outcome.lost,
        clipped=own.clipped,
    )


def _anywhere(teacher: str) -> str:
    """Its name for processes that start in other folders."""
    folder = Path(teacher).expanduser()
    return str(folder.resolve()) if folder.is_dir() else teacher


@contextmanager
def _open_out(out: Path | str) -> Iterator[tuple[Path, Store | None]]:
    """The folder to build the cache in, and what it stands for where that is a URL."""
    if not is_url(out):
        yield Path(out), None
        return
    with mirror(str(out)) as store:
        yield store.folder, store


def _run_on_ray(
    ray: RayOptions,
    again: _Again,
    build: CacheBuild,
    store: Store | None,
    tasks: Iterable[ShardTask],
    *,
    total: int,
    overflow: Overflow,
    update: Update,
) -> Outcome:
    """CacheError, once the rest is done, where shards had to be given up."""
    from softlabels.engines.ray_shards import run_on_ray

    here = FolderPlace(build.folder.resolve(), new_lease())
    (store or here).begin()
    try:
        outcome = run_on_ray(
            ray,
            again,
            build,
            here if store is None else store.place,
            tasks,
            total=total,
            overflow=overflow,
            update=update,
            delivered=(lambda receipts, shard: None) if store is None else store.keep,
        )
    finally:
        here.end([EXAMPLES, *build.manifest.fields])
        build.sweep()  # of the workers, which are gone
    if outcome.given_up:
        shown = "".join(f"\n  {line}" for line in outcome.given_up[:_SHOWN])
        more = len(outcome.given_up) - _SHOWN
        raise CacheError(
            f"{len(outcome.given_up)} of {total} shards were given up, the others are kept:{shown}"
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nThe same command tries them again"
        )
    return Outcome(outcome.batch_tokens, outcome.lost)


def _first_to_try(corpus: Corpus) -> Example:
    """A short row, of some words so that there is something to attend to and to predict; without its label.

    One of the first thousand: which one it is shows in nothing that is kept.
    """
    rows = corpus.examples[:_TRIED_ROWS]
    wordy = [example for example in rows if len(example.text.split()) >= _PROBE_WORDS]
    chosen = min(wordy, key=lambda row: len(row.text)) if wordy else max(rows, key=lambda row: len(row.text))
    return replace(chosen, label=None)


@dataclass(frozen=True, slots=True)
class _Way:
    """How rows reach a teacher."""

    probe: TokenBatch | ImageBatch  # a row on its device
    max_length: int
    vocab_size: int
    images: ImageReader | None


def _open_way(teacher: Teacher, row: Example, options: DumpOptions) -> _Way:
    """The same for every process, from a `row` to try it on."""
    if teacher.task == IMAGES:
        images = ImageReader(teacher.processor, teacher.model, first=row)
        return _Way(images.probe, images.length, 0, images)
    max_length = resolve_max_length(options.max_length, teacher.tokenizer, teacher.model.config)
    return _Way(_probe(row, teacher, options, max_length=max_length), max_length, len(teacher.tokenizer), None)


def _probe(row: Example, teacher: Teacher, options: DumpOptions, *, max_length: int) -> TokenBatch:
    labels = encode_task_labels(teacher.task, [row], teacher.label_names)
    tokens = tokenize_task(
        teacher.task,
        teacher.tokenizer,
        [row],
        max_length=max_length,
        labels=labels,
        masking=_masking(teacher, options),
        model=teacher.model,
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


def _factors(
    corpus: Corpus, teacher: Teacher, run: TeacherRun, options: DumpOptions, *, max_length: int
) -> LogitFactors | None:
    """The factors of the teacher's logits on some rows, always the same ones, where a capture asks for them."""
    rank = max((parse_form(request.form).factors for request in run.requests if request.capture == "vocab"), default=0)
    if not rank:
        return None
    step = -(-len(corpus.examples) // _FACTOR_ROWS)
    chosen = [replace(row, label=None) for row in corpus.examples[::step]]
    labels = encode_task_labels(teacher.task, chosen, teacher.label_names)
    masking = _masking(teacher, options)
    tokens = tokenize_task(
        teacher.task,
        teacher.tokenizer,
        chosen,
        max_length=max_length,
        labels=labels,
        masking=masking,
        model=teacher.model,
    ).examples
    parts = batches_by_length([len(row.input_ids) for row in tokens], batch_tokens=_FACTOR_BATCH)
    batches = (_batch(teacher, [tokens[number] for number in part]) for part in parts)
    return sample_factors(run, batches, targets=sum(map(count_row_targets, tokens)), rank=rank)


def _rows_of(corpus: Corpus, options: DumpOptions, shard: int) -> range:
    """The numbers of a shard's rows."""
    return range(len(corpus.examples))[shard * options.shard_rows : (shard + 1) * options.shard_rows]


@dataclass(frozen=True, slots=True)
class _Tasks(Sequence[ShardTask]):
    """What is to be done; the rows of a shard are read when its turn has come."""

    corpus: Corpus
    labels: TaskLabels | LaterLabels
    options: DumpOptions
    missing: list[tuple[int, list[str]]]

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, index: Any) -> Any:  # an int, of which the Sequence makes the rest
        shard, absent = self.missing[index]
        rows = _rows_of(self.corpus, self.options, shard)
        labels = self.labels.part(rows.start, rows.stop)
        return ShardTask(shard, self.corpus.examples[rows.start : rows.stop], labels, absent)


def _masking(teacher: Teacher, options: DumpOptions) -> Masking | None:
    return options.masking if teacher.task == "masked-lm" else None


def _steps(teacher: Teacher, run: TeacherRun, options: DumpOptions, way: _Way) -> Steps:
    """What the engine does with a shard: the task's part of it."""
    take = _compiled(run) if options.compile else run.take
    if (images := way.images) is not None:
        return Steps(
            tokenize=lambda task: images.tokenize(task.examples, task.labels.classes),
            pad=images.batch,
            take=take,
            device=teacher.model.device,
            expect=images.expect,
        )
    pad_token_id = _pad_id(teacher)  # asked for here: a thread of its own uses the tokenizer then
    return Steps(
        tokenize=lambda task: tokenize_task(
            teacher.task,
            teacher.tokenizer,
            task.examples,
            max_length=way.max_length,
            labels=task.labels,
            masking=_masking(teacher, options),
            model=teacher.model,
        ),
        pad=lambda examples: pad_batch(examples, pad_token_id=pad_token_id),
        take=take,
        device=teacher.model.device,
    )


def _compiled(run: TeacherRun) -> Callable[[TokenBatch | ImageBatch], dict[str, torch.Tensor]]:
    """`run.take` through torch.compile, for any number of rows and tokens; TeacherError where it can't be compiled."""
    from torch._dynamo.exc import TorchDynamoException

    model: Any = torch.compile(run.model, dynamic=True)
    compiled = replace(run, model=model)

    def take(batch: TokenBatch | ImageBatch) -> dict[str, torch.Tensor]:
        try:
            return compiled.take(batch)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            raise TeacherError(
                f"torch.compile cannot compile {type(run.model).__name__} here: leave out --compile. It said: {reason}"
            ) from error

    return take


@dataclass(frozen=True, slots=True)
class _Again:
    """How the process of another device comes by the same steps: it loads the same teacher."""

    teacher: str
    trust_remote_code: bool
    weights_hash: str
    requests: list[Request]
    first: Example  # to try it on
    options: DumpOptions

    @contextmanager
    def __call__(self, device: str) -> Iterator[Steps]:
        loaded = load_teacher(
            self.teacher, device=device, trust_remote_code=self.trust_remote_code, task=self.options.task
        )
        if loaded.weights_hash != self.weights_hash:
            raise TeacherError(f"the teacher {self.teacher} was changed while the dump began: give the command again")
        way = _open_way(loaded, self.first, self.options)
        run = prepare(loaded.model, self.requests, way.probe, vocab_size=way.vocab_size)
        with at_precision(loaded, self.options.dtype):
            yield _steps(loaded, run, self.options, way)


def _batch(teacher: Teacher, examples: Sequence[TokenizedExample]) -> TokenBatch:
    return pad_batch(examples, pad_token_id=_pad_id(teacher)).to(teacher.model.device)


def _pad_id(teacher: Teacher) -> int:
    return int(teacher.tokenizer.pad_token_id)


def _plan(
    corpus: Corpus,
    teacher: Teacher,
    options: DumpOptions,
    *,
    fields: dict[str, FieldSpec],
    max_length: int,
    labels: TaskLabels | LaterLabels,
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
