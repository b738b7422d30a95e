"""A corpus, a teacher and options come in; what a dump of them would cost goes out, before it is paid.

All is found on a sample: some rows are tokenised, a few batches of them go through the teacher, and nothing is written
but empty files in a temporary folder, laid out by the cache's own writer, whose sizes are the cache's.

The sample is spread over the corpus by the length of the text: rows of a sorted corpus at even distances. Its mean of
tokens and of their squares (maps) was off by 0.2 and 0.5 % on SST-2 with 2,000 rows, by 1.6 and 5.2 % with 200; a
random sample of 200 is off by 3.5 % of the tokens on average. Looking at more costs their tokenisation alone: the
teacher is timed on three batches, whatever the sample.

**After how many students a cache has paid for itself.** A teacher pass over the corpus takes F seconds, the dump's with
its captures D. Without a cache every student of E epochs costs E·F; with it, all students together cost D, and reading
next to nothing. So the cache has paid after the first D / F epochs, and after ⌈D / (E·F)⌉ students. D is hardly more
than F, so that this is one student, unless a corpus is masked several times: then D is a pass over all maskings, F over
one. What the choice is worth is therefore told too: E·F, the teacher's time that every further student saves. F is that
of the bare model; a loop that takes hidden states or maps from it pays more.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from softlabels.cache.build import check_rows, image_teacher_card, teacher_card
from softlabels.cache.factors import factors_size
from softlabels.cache.format import EXAMPLES, FieldSpec
from softlabels.cache.vocab import parse_form
from softlabels.cache.writer import FieldShard, examples_batch, examples_schema, labels_type
from softlabels.captures import TeacherRun, parse_captures, prepare
from softlabels.captures.choose import choose_captures
from softlabels.captures.output_head import keep_head, only_targets
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.errors import ConfigError, TeacherError
from softlabels.pixels import ImageReader, check_sequence
from softlabels.progress import progress
from softlabels.tasks import encode_task_labels, mask_often, tokenize_task
from softlabels.teacher import Teacher, at_precision, load_teacher
from softlabels.tokens import batches_by_length, count_row_targets, count_tokens, pad_batch, resolve_max_length
from softlabels.types import IMAGES, LANGUAGE_MODELS, NO_LABEL, SEQ2SEQ, ImageBatch, TokenBatch, TokenizedExample

TEMPERATURES, TOPS = (1.0, 2.0, 4.0, 8.0), (16, 32, 64, 128)
_TIMED = 3  # batches, at even distances from the longest to the shortest
_PROBE_TOKENS = 6
_MASS_TARGETS, _MASS_AT_ONCE = 2048, 128  # tokens that the kept mass is measured at
_RECEIPT = 250  # bytes of a receipt, and of a shard in the manifest


@dataclass(frozen=True, slots=True)
class Speed:
    """The teacher on this machine, one pass over the whole corpus."""

    device: str
    rows_per_second: float  # the bare model
    rows_per_second_captured: float  # with the captures; writing goes on behind it
    rows_opened_per_second: float | None  # images: ahead of the teacher, which waits where this is less; None of texts
    seconds: float
    seconds_captured: float


@dataclass(frozen=True, slots=True)
class Maps:
    """Two ways to keep the attention of `layers`: bytes of the whole corpus."""

    layers: list[int]
    query_key_bytes: int | None  # None: the model's attention cannot be tapped
    map_bytes: int | None  # None: nor does it give maps


@dataclass(frozen=True, slots=True)
class Payback:
    """When the cache has cost less than asking the teacher anew; see the module."""

    epochs: int  # of any students
    students: int
    epochs_each: int  # E
    seconds_each: float  # E·F: what a student's epochs would cost in teacher time


@dataclass(frozen=True, slots=True)
class Disk:
    """Room where the cache would go."""

    place: str
    free_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a dump would cost."""

    teacher: str
    task: str
    rows: int  # of the cache: a masked language model's are the corpus's times the maskings
    sampled: int
    tokens: int  # of the whole corpus, from the sample
    truncated: float  # share of the sampled rows that are cut
    fields: dict[str, int]  # bytes of each, `examples` too
    bytes: int  # of all of them and what goes with them: receipts, and vocab's output head or factors
    speed: Speed
    maps: Maps | None  # None: no attention is asked for
    kept_mass: dict[int, dict[float, float]] | None  # of language models: k → T → probability inside the top k
    disk: Disk
    payback: Payback


def plan_dump(
    corpus: Corpus,
    *,
    teacher: str,
    options: DumpOptions | None = None,
    out: Path | None = None,
    sample: int = 2000,
    epochs: int = 10,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What `dump` of these would write and take, from `sample` rows. `epochs`: that a student trains.

    Raises what the dump would raise before its work starts: TeacherError, ConfigError or CorpusError.
    """
    options = options or DumpOptions()
    requests = parse_captures(options.capture)
    check_rows(corpus)
    loaded = load_teacher(teacher, device=device, trust_remote_code=trust_remote_code, task=options.task)
    if loaded.task == IMAGES and options.max_length is not None:
        raise ConfigError("--max-length: images have no length to be cut to")
    requests = choose_captures(requests, loaded.task)
    rows = _sample(corpus, loaded, options, count=sample)
    probe = rows.batch([rows.probe()]).to(loaded.model.device)
    vocab_size = 0 if loaded.task == IMAGES else len(loaded.tokenizer)
    before = loaded.model.config._attn_implementation
    with torch.inference_mode(), at_precision(loaded, options.dtype):
        run = prepare(loaded.model, requests, probe, vocab_size=vocab_size)
        specs = run.fields(probe, codec=options.codec)
        if rows.images is not None:
            check_sequence(specs, run.take(probe), length=rows.images.length)
        batches = rows.timed(options)  # a budget below a row is told here
        beside = _beside(rows, run, probe, options, fields=1 + len(specs))
        sizes = {EXAMPLES: _examples_size(rows, loaded, options)}
        sizes |= {name: _field_size(rows, name, spec, options) for name, spec in sorted(specs.items())}
        maps = _compare_maps(loaded, run, probe, rows, options)
        loaded.model.set_attn_implementation(before)
        again = partial(prepare, loaded.model, requests, probe, vocab_size=run.vocab_size)
        speed = _measure(loaded, again, rows, batches)
        mass = _kept_mass(loaded, rows) if loaded.task in LANGUAGE_MODELS else None
    total = sum(sizes.values()) + beside
    ratio = speed.seconds_captured / speed.seconds * rows.maskings
    return Plan(
        teacher=loaded.name,
        task=loaded.task,
        rows=rows.total,
        sampled=len(rows.examples),
        tokens=round(float(rows.lengths.mean()) * rows.total),
        truncated=rows.truncated / len(rows.examples),
        fields=sizes,
        bytes=total,
        speed=speed,
        maps=maps,
        kept_mass=mass,
        disk=_disk(out, total),
        payback=Payback(
            epochs=math.ceil(ratio),
            students=math.ceil(ratio / epochs),
            epochs_each=epochs,
            seconds_each=epochs * speed.seconds / rows.maskings,
        ),
    )


# --------------------------------------------------------------------------------------------------------- the sample


@dataclass(frozen=True, slots=True)
class _Sample:
    """Some rows that stand for `total`."""

    examples: list[TokenizedExample]
    total: int
    maskings: int
    truncated: int
    pad_token_id: int
    images: ImageReader | None = None

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(example.input_ids) for example in self.examples])

    @property
    def targets(self) -> np.ndarray:
        return np.array([count_row_targets(example) for example in self.examples])

    def probe(self) -> int:
        """A short row, of some tokens so that there is something to attend to."""
        wordy = np.flatnonzero(self.lengths >= _PROBE_TOKENS)
        return int(wordy[self.lengths[wordy].argmin()] if len(wordy) else self.lengths.argmax())

    def batch(self, numbers: Sequence[int] | np.ndarray) -> TokenBatch | ImageBatch:
        if self.images is not None:  # each is opened once, however often it comes
            once, places = np.unique(np.asarray(numbers), return_inverse=True)
            opened = self.images.batch([self.examples[number] for number in once])
            return ImageBatch(opened.pixel_values[places], opened.labels[places])
        return pad_batch([self.examples[number] for number in numbers], pad_token_id=self.pad_token_id)

    def shard(self, count: int) -> np.ndarray:
        """Row numbers of the sample for a shard of `count` rows: each as often as the others, but for one."""
        return np.arange(count) * len(self.examples) // count

    def timed(self, options: DumpOptions) -> list[np.ndarray]:
        """A shard's batches as the dump makes them, in the sample's row numbers."""
        numbers = self.shard(min(options.shard_rows, self.total))
        counts = np.array([count_tokens(example) for example in self.examples])
        parts = batches_by_length(counts[numbers], batch_tokens=options.batch_tokens)
        return [numbers[part] for part in parts]


def _sample(corpus: Corpus, teacher: Teacher, options: DumpOptions, *, count: int) -> _Sample:
    if teacher.task == IMAGES:
        return _image_sample(corpus, teacher, count=count)
    masking = options.masking if teacher.task == "masked-lm" else None
    if masking is not None:
        corpus = mask_often(corpus, masking)
    lengths = (len(row.text) + len(row.text_b or "") + len(row.target or "") for row in corpus.examples)
    sizes = np.fromiter(lengths, np.int64, len(corpus.examples))
    places = (np.arange(min(count, len(sizes))) + 0.5) * len(sizes) / min(count, len(sizes))
    chosen = np.sort(np.argsort(sizes, kind="stable")[places.astype(np.int64)])
    examples = [corpus.examples[number] for number in chosen.tolist()]
    tokens = tokenize_task(
        teacher.task,
        teacher.tokenizer,
        examples,
        max_length=resolve_max_length(options.max_length, teacher.tokenizer, teacher.model.config),
        labels=encode_task_labels(teacher.task, examples, teacher.label_names),
        masking=masking,
        model=teacher.model,
    )
    maskings = 1 if masking is None else masking.times
    return _Sample(
        tokens.examples, len(corpus.examples), maskings, tokens.truncated, int(teacher.tokenizer.pad_token_id)
    )


def _image_sample(corpus: Corpus, teacher: Teacher, *, count: int) -> _Sample:
    """Rows at even distances: all images are as large, once they are processed."""
    total = len(corpus.examples)
    places = np.arange(min(count, total)) * total // min(count, total)
    examples = [corpus.examples[number] for number in places.tolist()]
    images = ImageReader(teacher.processor, teacher.model, first=examples[0])
    labels = encode_task_labels(teacher.task, examples, teacher.label_names)
    return _Sample(images.tokenize(examples, labels.classes).examples, total, 1, 0, 0, images)


# -------------------------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True, slots=True)
class _Unopened:
    """What stands for an image where only its row's bytes are asked for."""

    tokens: int = 1

    def hash(self) -> int:
        return 0


def _over_shards(rows: _Sample, options: DumpOptions, size: Callable[[np.ndarray], int]) -> int:
    """Bytes of all shards, where `size` gives those of a shard with some rows of the sample."""
    if len(rows.examples) == rows.total:  # nothing is left out: the shards are the dump's
        starts = range(0, rows.total, options.shard_rows)
        return sum(size(np.arange(start, min(start + options.shard_rows, rows.total))) for start in starts)
    whole, rest = divmod(rows.total, options.shard_rows)
    total = whole * size(rows.shard(options.shard_rows)) if whole else 0
    return total + (size(rows.shard(rest)) if rest else 0)


def _field_size(rows: _Sample, field: str, spec: FieldSpec, options: DumpOptions) -> int:
    """Bytes of all shards of a field, by laying out files without values: they take no room."""

    def size(numbers: np.ndarray) -> int:
        with tempfile.TemporaryDirectory(prefix="softlabels-plan-") as folder:
            shard = FieldShard(
                Path(folder), field, spec, shard=0, tokens=rows.lengths[numbers], targets=rows.targets[numbers]
            )
            try:
                return shard.size
            finally:
                shard.discard()

    return _over_shards(rows, options, size)


def _examples_size(rows: _Sample, teacher: Teacher, options: DumpOptions) -> int:
    if rows.images is not None:
        card = image_teacher_card(name=teacher.name, weights_hash="", label_names=teacher.label_names)
        examples = [replace(row, content=_Unopened()) for row in rows.examples]
    else:
        examples = rows.examples
        card = teacher_card(
            teacher.tokenizer, name=teacher.name, weights_hash="", label_names=teacher.label_names, task=teacher.task
        )
    schema = examples_schema(
        0,
        vocab_size=card.vocab_size,
        token_types=card.token_types,
        text=options.text and rows.images is None,
        labels=labels_type(card),
        targets=card.task == SEQ2SEQ,
    )

    def size(numbers: np.ndarray) -> int:
        batch = examples_batch([examples[number] for number in numbers.tolist()], schema)
        counted = pa.MockOutputStream()
        with pa.ipc.new_file(counted, schema) as writer:
            writer.write_batch(batch)
        return counted.size()

    return _over_shards(rows, options, size)


def _beside(
    rows: _Sample, run: TeacherRun, probe: TokenBatch | ImageBatch, options: DumpOptions, *, fields: int
) -> int:
    """Receipts, the manifest's tables, and what vocab's fields are read with: factors of vocab:topk=…,factors=R, the
    output head of vocab:exact; TeacherError where it can't be kept.
    """
    forms = [parse_form(request.form) for request in run.requests if request.capture == "vocab"]
    small = math.ceil(rows.total / options.shard_rows) * fields * _RECEIPT
    if rank := max((form.factors for form in forms), default=0):
        small += factors_size(run.vocab_size, rank)
    if all(form.k for form in forms):
        return small
    seen = run.forward(probe)
    assert seen.head_states is not None and seen.logits is not None  # or `fields` had said so
    head = keep_head(run.model, seen.head_states, seen.logits, vocab_size=run.vocab_size)
    return small + 4 * (head.weight.numel() + (0 if head.bias is None else head.bias.numel()))


def _compare_maps(
    teacher: Teacher, run: TeacherRun, probe: TokenBatch | ImageBatch, rows: _Sample, options: DumpOptions
) -> Maps | None:
    """Q and K against maps, for the layers of which either is asked for."""
    layers = run.layers_of("qkv", "attention")
    if not layers:
        return None
    codec = "float16" if options.codec == "int8" else options.codec  # maps are never int8
    sizes: dict[str, int | None] = {"qkv": None, "attention": None}
    for capture in sizes:
        requests = parse_captures([f"{capture}:{','.join(map(str, layers))}"])
        try:
            specs = prepare(teacher.model, requests, probe).fields(
                probe, codec=codec if capture == "attention" else options.codec
            )
        except TeacherError:
            continue
        sizes[capture] = sum(
            _field_size(rows, name, spec, options) for name, spec in specs.items() if not name.startswith("value")
        )
    return Maps(layers, query_key_bytes=sizes["qkv"], map_bytes=sizes["attention"])


def _disk(out: Path | None, total: int) -> Disk:
    place = (out or Path()).absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    return Disk(str(place), free, fits=total <= free)


# --------------------------------------------------------------------------------------------------------------- time


def _measure(
    teacher: Teacher, prepared: Callable[[], TeacherRun], rows: _Sample, batches: Sequence[np.ndarray]
) -> Speed:
    """The bare model, then the same batches with the captures; each batch once before it is timed."""
    places = sorted({int((i + 0.5) * len(batches) / _TIMED) for i in range(_TIMED)})
    device = teacher.model.device
    started = time.perf_counter()
    inputs = [rows.batch(batches[place]).to(device) for place in places]
    opened = sum(len(np.unique(batches[place])) for place in places) / (time.perf_counter() - started)
    count = sum(len(numbers) for numbers in batches)

    with progress(4 * len(inputs), description="plan", unit="batches") as update:

        def seconds(take: Callable[[TokenBatch | ImageBatch], object]) -> float:
            spent = 0.0
            for batch, timed in itertools.product(inputs, (False, True)):
                started = time.perf_counter()
                take(batch)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                spent += (time.perf_counter() - started) * timed
                update(1)
            return spent / len(inputs) * len(batches)

        bare = count / seconds(lambda batch: teacher.model(**batch.model_inputs()))
        run = prepared()
        captured = count / seconds(run.take)
    return Speed(
        str(device),
        bare,
        captured,
        opened if rows.images is not None else None,
        rows.total / bare,
        rows.total / captured,
    )


# --------------------------------------------------------------------------------------------------------------- mass


def _kept_mass(teacher: Teacher, rows: _Sample) -> dict[int, dict[float, float]]:
    """The mean probability of the k largest of a target's logits, softmax(z / T), over targets of the sample."""
    size = len(teacher.tokenizer)
    tops = [k for k in TOPS if k < size]
    sums, seen = dict.fromkeys(itertools.product(tops, TEMPERATURES), 0.0), 0
    numbers = np.random.default_rng(0).permutation(len(rows.examples))
    for start in range(0, len(numbers), 8):
        batch = rows.batch(numbers[start : start + 8]).to(teacher.model.device)
        assert isinstance(batch, TokenBatch)
        targets = batch.labels != NO_LABEL
        with only_targets(teacher.model, targets):
            logits = teacher.model(**batch.model_inputs()).logits[:, :size]
        for part in logits.split(_MASS_AT_ONCE):
            z = part.float()
            best = z.topk(max(tops), dim=1).values
            for temperature in TEMPERATURES:
                whole = (z / temperature).logsumexp(dim=1, keepdim=True)
                inside = (best / temperature - whole).exp().cumsum(dim=1).sum(dim=0)
                for k in tops:
                    sums[k, temperature] += float(inside[k - 1])
        seen += len(logits)
        if seen >= _MASS_TARGETS:
            break
    return {k: {t: sums[k, t] / max(seen, 1) for t in TEMPERATURES} for k in tops}
