"""A finished cache and its teacher come in; how far the cache is from the teacher goes out, field by field.

The teacher is run again on rows of the cache, from the tokens that the cache holds (of images from the files of the
corpus, whose pixels must hash to what the cache has), in batches of other rows and other sizes than the dump's. Batches
show in what a teacher gives by rounding, so it is run twice, in two batchings: what lies between the two is the noise,
and what lies between cache and teacher is judged by it.

**The rule.** A field is within its bounds where no value is farther from the live one than

    what its codec rounds that value by  +  4 · the largest noise of the field  +  2⁻¹⁷ · its largest live value

The codec's part is a value's own: nothing for float32, 2⁻¹¹ of the value for float16, 2⁻⁸ for bfloat16, half a step of
its vector for int8, and what `softlabels.cache.vocab_rounding` says for truncated logits. 4: the dump's batches are a
third batching, and the largest of many differences varies. 2⁻¹⁷ is 64 times the rounding of a float32 number, for two
batchings that happen to agree. Masked attention scores must be masked on both sides, and count for nothing else. Values
that the dump clipped are held to the type's largest.

Run it where the cache was dumped: between a GPU's and a CPU's float16 there is more than the noise of either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softlabels.cache import Cache, open_cache
from softlabels.cache.codec import LARGEST, rounding
from softlabels.cache.format import WHOLE, FieldSpec
from softlabels.cache.head import OutputHead
from softlabels.cache.reader import capture_of
from softlabels.cache.vocab import PACKED, STATES, VocabTeacher, open_vocabs
from softlabels.cache.vocab_packed import Packing
from softlabels.cache.vocab_rounding import packed_rounding, plain_rounding
from softlabels.cache.vocab_tail import against_top
from softlabels.captures import TeacherRun, parse_captures, prepare
from softlabels.corpus import Corpus
from softlabels.errors import CacheError, ConfigError, CorpusError, TeacherError
from softlabels.pixels import ImageReader
from softlabels.pretrained import hash_weights, resolve_pretrained
from softlabels.progress import progress
from softlabels.teacher import Teacher, at_precision, load_teacher
from softlabels.tokens import token_hash
from softlabels.truncated import TruncatedLogits, truncate
from softlabels.types import IMAGES, MASKED, ImageBatch, TokenBatch

_NOISE, _FLOOR = 4.0, 2.0**-17  # of the rule
_LARGEST_BATCH = {"first": 8, "second": 5}  # rows
_CHUNK_ROWS, _CHUNK_VALUES = 16, 1 << 25  # that are compared at a time, so that memory doesn't depend on --rows
_PROBE_TOKENS = 6
_EPSILON = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of what the teacher computes in
_VOCAB = "vocab"


@dataclass(frozen=True, slots=True)
class FieldFidelity:
    """How far one field is from the live teacher. Sizes are absolute; `relative_…` are shares of `typical`."""

    field: str
    what: str  # of it is compared
    type: str  # as it is stored
    values: int
    typical: float  # root mean square of the live values
    largest: float  # deviation of a stored value from the live one
    mean: float
    relative_largest: float
    relative_mean: float
    noise_largest: float  # deviation of a live value from the same in another batch
    noise_mean: float
    beyond_codec: float  # the most by which a value is farther off than its codec rounds it
    allowed: float  # for that, by the noise
    worst_row: str  # the id of the row where that is
    within: bool


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What `verify_live` found."""

    cache: Path
    teacher: str
    rows: int
    tokens: int
    seed: int
    seconds: float
    fields: list[FieldFidelity]

    @property
    def within(self) -> bool:
        return all(found.within for found in self.fields)


def verify_live(
    path: str | Path,
    *,
    teacher: str,
    rows: int = 200,
    seed: int = 0,
    fields: Sequence[str] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    corpus: Corpus | None = None,
) -> Fidelity:
    """Hold `rows` random rows of the cache at `path` against `teacher`, all of its fields or those of `fields`.

    A cache of images needs the `corpus` too, for it holds no pixels. CacheError where the cache is unfinished, damaged
    or lacks a field; TeacherError where `teacher` is another one than that of the manifest, by the hash of its weights;
    CorpusError where an image is not the one that was dumped.
    """
    started = time.monotonic()
    cache = open_cache(path)
    cache.require(fields or [], why="--field")
    if cache.manifest.teacher.task == IMAGES and corpus is None:
        raise CacheError(
            f"cache {path} is of images, and holds no pixels: give the corpus that was dumped with --corpus"
        )
    if cache.manifest.teacher.task != IMAGES and corpus is not None:
        raise ConfigError(f"--corpus is for caches of images: cache {path} holds the tokens that its teacher read")
    chosen = sorted(fields or cache.fields)
    if not chosen:
        raise CacheError(f"cache {path} holds no field that a teacher could be held against")
    live = _load(cache, teacher, device=device, trust_remote_code=trust_remote_code)
    rng = np.random.default_rng(seed)
    numbers = rng.choice(cache.rows, size=min(rows, cache.rows), replace=False)
    if corpus is not None:
        images = _Images(cache, live, corpus, numbers)
        work = _Comparison(cache, live, chosen, read=images.batch, probe=images.reader.probe)
    else:
        work = _Comparison(cache, live, chosen, read=cache.tokens, probe=_probe(cache, numbers))
    with (
        progress(len(numbers), description="verify") as update,
        torch.inference_mode(),
        at_precision(live, cache.manifest.dump.dtype),
    ):
        for chunk in _chunks(cache, numbers, chosen):
            work.compare(chunk, rng)
            update(len(chunk), tokens=float(cache.lengths[chunk].sum()))
    return Fidelity(
        cache=Path(path),
        teacher=teacher,
        rows=len(numbers),
        tokens=int(cache.lengths[numbers].sum()),
        seed=seed,
        seconds=time.monotonic() - started,
        fields=[sums.result() for sums in work.sums.values()],
    )


def _load(cache: Cache, name: str, *, device: str | None, trust_remote_code: bool) -> Teacher:
    card = cache.manifest.teacher
    found = hash_weights(resolve_pretrained(name, trust_remote_code=trust_remote_code))  # before it is loaded
    if found != card.weights_hash:
        raise TeacherError(
            f"{name} is not the teacher of cache {cache.path}: the hash of its weights and config.json is {found}, and "
            f"the manifest's, of a teacher called {card.name}, is {card.weights_hash}: give that one to --live"
        )
    return load_teacher(name, device=device, trust_remote_code=trust_remote_code, task=card.task)


def _probe(cache: Cache, rows: np.ndarray) -> TokenBatch:
    """A short row, but with something to attend to."""
    lengths = cache.lengths[rows]
    wordy = np.flatnonzero(lengths >= _PROBE_TOKENS)
    chosen = wordy[lengths[wordy].argmin()] if len(wordy) else lengths.argmax()
    return cache.tokens(rows[[chosen]])


class _Images:
    """The images of a corpus by the row numbers of a cache; CorpusError where some of `rows` are not in it."""

    def __init__(self, cache: Cache, teacher: Teacher, corpus: Corpus, rows: np.ndarray) -> None:
        self.cache, self.corpus = cache, corpus
        found = {example.id: example for example in corpus.examples}
        ids = cache.ids
        missing = [ids[row] for row in rows.tolist() if ids[row] not in found or found[ids[row]].image is None]
        if missing:
            raise CorpusError(
                f"corpus {corpus.source} has no image for {len(missing)} of {len(rows)} rows of cache {cache.path}, "
                f"such as '{missing[0]}': give the corpus that was dumped, with the same --split"
            )
        self.examples = {row: found[ids[row]] for row in rows.tolist()}
        self.reader = ImageReader(teacher.processor, teacher.model, first=self.examples[int(rows[0])])

    def batch(self, rows: np.ndarray) -> ImageBatch:
        """The pixels of `rows`; CorpusError where they are not those that were dumped."""
        examples = [self.examples[row] for row in rows.tolist()]
        images = self.reader.tokenize(examples, self.cache.labels[rows].tolist()).examples
        batch = self.reader.batch(images)
        for image, example, wanted in zip(images, examples, self.cache.token_hashes[rows].tolist(), strict=True):
            if token_hash(image) != wanted:
                raise CorpusError(
                    f"row '{example.id}': {example.image} is not the image that was dumped into {self.cache.path}, or "
                    f"another version of Pillow opens it in another way: its pixels have another hash"
                )
        return batch


def _chunks(cache: Cache, rows: np.ndarray, fields: Sequence[str]) -> Iterator[np.ndarray]:
    """Rows that are compared at a time: as many as memory has room for, but two at least where there are."""
    targets = cache.targets[rows] if cache.targets is not None else None
    sizes = np.zeros(len(rows), np.int64)
    for name in fields:
        sizes += cache.fields[name].values(cache.lengths[rows], targets)
    if targets is not None and any(name.startswith("vocab_") for name in fields):
        sizes += targets * cache.manifest.teacher.vocab_size
    start = 0
    while start < len(rows):
        fitting = int(np.searchsorted(np.cumsum(sizes[start:]), _CHUNK_VALUES))
        stop = start + min(max(fitting, 2), _CHUNK_ROWS)
        yield rows[start:stop]
        start = stop


# ------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True, slots=True)
class _Quantity:
    """One kind of number of one row, as it is stored and as the teacher gives it in two batches; float32 or float64."""

    field: str
    what: str
    stored: Tensor
    live: Tensor
    other: Tensor
    rounding: Tensor  # by the codec


class _Comparison:
    """The rows of a cache against its teacher."""

    def __init__(
        self,
        cache: Cache,
        teacher: Teacher,
        fields: Sequence[str],
        *,
        read: Callable[[np.ndarray], TokenBatch | ImageBatch],
        probe: TokenBatch | ImageBatch,
    ) -> None:
        self.cache, self.device, self.read = cache, teacher.model.device, read
        self.fields = [name for name in fields if cache.fields[name].type not in WHOLE and not _of_topk(name)]
        asked = any(name.startswith("vocab_") for name in fields)
        self.vocabs = [vocab for vocab in open_vocabs(cache) if asked and set(vocab.fields) & set(fields)]
        names = [*self.fields, *(name for vocab in self.vocabs for name in vocab.fields)]
        captures = sorted({capture_of(name, cache.fields[name]) for name in names})
        size = cache.manifest.teacher.vocab_size
        run = prepare(teacher.model, parse_captures(captures), probe.to(self.device), vocab_size=size)
        self.run = run
        kept = [r for r in run.requests if r.capture != "vocab" or r.form == "exact"]
        self.taken = TeacherRun(run.model, kept, run.tapped, run.eager_maps, run.pooling, run.vocab_size)
        self.sums = {(name, "values"): _Sums(name, "values", cache.fields[name].type) for name in self.fields}

    def compare(self, rows: np.ndarray, rng: np.random.Generator) -> None:
        first = self._live(rows, rng, largest=_LARGEST_BATCH["first"])
        second = self._live(rows, rng, largest=_LARGEST_BATCH["second"])
        for row in rows.tolist():
            for quantity in self._quantities(row, first[row], second[row]):
                key = (quantity.field, quantity.what)
                if key not in self.sums:
                    kind = self.cache.fields[quantity.field].type
                    self.sums[key] = _Sums(quantity.field, quantity.what, kind)
                self.sums[key].add(quantity, row=self._id(row))

    def _id(self, row: int) -> str:
        return self.cache.ids[row]

    def _live(self, rows: np.ndarray, rng: np.random.Generator, *, largest: int) -> dict[int, dict[str, Tensor]]:
        """By row what the teacher gives, in batches of random neighbours and sizes, no larger than the dump's."""
        order, found = rng.permutation(rows), {}
        longest = self.cache.lengths[rows].max()
        if self.cache.targets is not None:
            longest = max(longest, self.cache.targets[rows].max())  # of a decoder, which may write more than is read
        room = max(1, self.cache.manifest.dump.batch_tokens // int(longest))
        while len(order):
            size = int(rng.integers(1, min(largest, room) + 1))
            batch, order = order[:size], order[size:]
            for row, values in zip(batch.tolist(), self._run(batch), strict=True):
                found[row] = values
        return found

    def _run(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        """Of each row the values of `fields` without padding, and its logits over the vocabulary."""
        forward = self.run.forward(self.read(rows).to(self.device))
        values = self.taken.values(forward)
        lengths = self.cache.lengths[rows].tolist()
        targets = self.cache.targets[rows].tolist() if self.cache.targets is not None else [0] * len(rows)
        parts = {name: _split(values[name], self.cache.fields[name], lengths, targets) for name in self.fields}
        if self.vocabs:
            assert forward.logits is not None
            logits = forward.logits[:, : self.run.vocab_size].float().cpu()
            parts[_VOCAB] = list(logits.split(targets))
        return [{name: rows[i] for name, rows in parts.items()} for i in range(len(rows))]

    def _quantities(self, row: int, live: dict[str, Tensor], other: dict[str, Tensor]) -> Iterator[_Quantity]:
        signals = self.cache.signals([row], [*self.fields, *(n for v in self.vocabs for n in v.fields)])
        for name in self.fields:
            spec = self.cache.fields[name]
            stored = signals.get(name)
            if spec.kind == "token" and spec.heads:
                stored = stored.transpose(1, 2).flatten(2)
            stored = stored if spec.kind == "target" else stored[0]
            values, again = live[name], other[name]
            if self.cache.manifest.shards[name].clipped:
                most = LARGEST[spec.type]
                values, again = values.clamp(-most, most), again.clamp(-most, most)
            channels = None
            if spec.type == "int8":
                channels = self.cache.channels_of(name, row // self.cache.manifest.dump.shard_rows)
            yield _Quantity(name, "values", stored, values, again, rounding(values, spec, channels=channels))
        for vocab in self.vocabs:
            if len(live[_VOCAB]):
                exact = None
                if vocab.head is not None:
                    exact = _Exact(vocab.head, self.cache.fields[STATES], self.cache.manifest.dump.dtype)
                yield from _vocabulary(vocab, vocab(signals), signals.fields, live[_VOCAB], other[_VOCAB], exact=exact)


def _of_topk(name: str) -> bool:
    return name.startswith("vocab_") and name != STATES


def _split(values: Tensor, spec: FieldSpec, lengths: Sequence[int], targets: Sequence[int]) -> list[Tensor]:
    """A padded batch (B, …), or targets (T, W), as float32 rows without padding, on the CPU."""
    values = values.float().cpu()
    if spec.kind == "target":
        return list(values.split(list(targets)))
    if spec.kind == "row":
        return list(values)
    if spec.kind == "token":
        return [row[:length] for row, length in zip(values, lengths, strict=True)]
    return [row[:, :length, :length] for row, length in zip(values, lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class _Exact:
    """How logits are rebuilt from states."""

    head: OutputHead
    spec: FieldSpec  # of the states
    dtype: str  # that the teacher computes in

    def rounding(self, states: Tensor, logits: Tensor) -> Tensor:
        """(T, V) the most by which the rounding of `states` moves `logits`, and that of a head in half precision."""
        by_states = rounding(states, self.spec) @ self.head.weight.abs().T
        return by_states + 2 * _EPSILON[self.dtype] * logits.abs()


def _vocabulary(
    vocab: VocabTeacher,
    stored: Tensor | TruncatedLogits,
    fields: dict[str, Tensor],
    live: Tensor,
    other: Tensor,
    *,
    exact: _Exact | None,
) -> Iterator[_Quantity]:
    """What is known of the logits (T, V) of a row: all of them, or the top's, the tail's weight and means, samples."""
    if isinstance(stored, Tensor):
        assert exact is not None
        yield _Quantity(STATES, "logits", stored, live, other, exact.rounding(fields[STATES], live))
        return
    if vocab.form.packed:
        packing = Packing(vocab.vocab_size, vocab.form.k, vocab.form.samples)
        bound = packed_rounding(stored, fields[PACKED].numpy(), packing)
        names = dict.fromkeys(("values", "tail", "samples"), PACKED)
    else:
        bound = plain_rounding(stored)
        names = {"values": "vocab_values", "tail": "vocab_tail", "samples": "vocab_sampled_values"}
    one, two = (truncate(logits, k=vocab.form.k) for logits in (live, other))
    at = [logits.gather(1, stored.ids) for logits in (live, other)]
    yield _Quantity(names["values"], "logits of the kept ids", stored.values, at[0], at[1], bound.values)
    yield _Quantity(names["values"], "largest logits", stored.values, one.values, two.values, bound.values)
    odds, first, second = against_top(stored), against_top(one), against_top(two)
    limits = bound.odds_range
    yield _Quantity(
        names["tail"],
        "tail's log-sum-exp against the top's",
        odds[0],
        first[0].clamp(*limits),
        second[0].clamp(*limits),
        bound.odds,
    )
    yield _Quantity(names["tail"], "tail's mean against the top's", odds[1], first[1], second[1], bound.slopes)
    if stored.samples:
        at = [logits.gather(1, stored.sampled_ids) for logits in (live, other)]
        yield _Quantity(
            names["samples"], "logits of the sampled ids", stored.sampled_values, at[0], at[1], bound.samples
        )


@dataclass(slots=True)
class _Sums:
    """What is kept of a quantity while the rows go by."""

    field: str
    what: str
    type: str
    values: int = 0
    squares: float = 0.0
    largest_live: float = 0.0
    largest: float = 0.0
    total: float = 0.0
    noise_largest: float = 0.0
    noise_total: float = 0.0
    beyond: float = -math.inf
    worst_row: str = ""

    def add(self, quantity: _Quantity, *, row: str) -> None:
        stored, live, other = (part.double() for part in (quantity.stored, quantity.live, quantity.other))
        if not bool((live.isfinite() & other.isfinite()).all()):
            raise TeacherError(
                f"the teacher gives NaN or infinite values in '{self.field}' for example {row}: its weights, its "
                f"precision or this machine are broken"
            )
        counts = torch.ones_like(live, dtype=torch.bool)
        if quantity.field.endswith("@scores"):
            counts = ~((stored < MASKED / 2) & (live < MASKED / 2) & (other < MASKED / 2))
        if not bool(counts.any()):
            return
        off, noise = ((part - live).abs().nan_to_num(nan=math.inf, posinf=math.inf)[counts] for part in (stored, other))
        beyond = float((off - quantity.rounding.expand_as(live)[counts]).max())
        if beyond > self.beyond:
            self.beyond, self.worst_row = beyond, row
        live = live[counts]
        self.values += live.numel()
        self.squares += float(live.square().sum())
        self.largest_live = max(self.largest_live, float(live.abs().max()))
        self.largest, self.total = max(self.largest, float(off.max())), self.total + float(off.sum())
        self.noise_largest = max(self.noise_largest, float(noise.max()))
        self.noise_total += float(noise.sum())

    def result(self) -> FieldFidelity:
        count = max(self.values, 1)
        typical = math.sqrt(self.squares / count)
        allowed = _NOISE * self.noise_largest + _FLOOR * self.largest_live
        beyond = max(self.beyond, 0.0)
        return FieldFidelity(
            field=self.field,
            what=self.what,
            type=self.type,
            values=self.values,
            typical=typical,
            largest=self.largest,
            mean=self.total / count,
            relative_largest=self.largest / typical if typical else self.largest,
            relative_mean=self.total / count / typical if typical else self.total / count,
            noise_largest=self.noise_largest,
            noise_mean=self.noise_total / count,
            beyond_codec=beyond,
            allowed=allowed,
            worst_row=self.worst_row,
            within=beyond <= allowed,
        )
