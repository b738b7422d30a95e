"""Shards through one teacher on one device: rows come in, whole shards of the cache go out.

    tokenise          a thread, a shard ahead; images are opened by threads of their own, a batch ahead
    batch, forward    the calling thread
    write             a thread behind it: copy off the device, range check, convert, put into place
    seal              a thread behind that, while the next shard is written: sync, hash, name, receipt; what an int8
                      field keeps back until its scales are measured

Whatever the size of a shard, at most `_ROOM` batches of values wait behind the one that the teacher works on. What
fails in one of the parts, and a Ctrl-C, ends all of them; whole shards are kept, of the others nothing stays.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch

from softlabels.cache.build import CacheBuild
from softlabels.cache.codec import Overflow
from softlabels.cache.format import EXAMPLES
from softlabels.cache.writer import FieldShard, join_hash
from softlabels.engines.beside import Ahead, Behind
from softlabels.engines.carry import Carried, Carrier
from softlabels.engines.memory import Trimmer, spared_by_the_collector
from softlabels.errors import TeacherError
from softlabels.progress import Update
from softlabels.tasks import TaskLabels
from softlabels.tokens import Tokenized, batches_by_length, count_row_targets, count_tokens
from softlabels.types import Example, ImageBatch, TokenBatch, TokenizedExample

_IDLE_SECONDS = 0.02
_ROOM = {"cpu": 1, "cuda": 3}  # a GPU is ahead of what it was told by some batches; elsewhere one is in work


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to be done: its rows as the corpus has them, and the fields that it lacks."""

    shard: int
    examples: Sequence[Example]
    labels: TaskLabels
    missing: Sequence[str]


@dataclass(frozen=True, slots=True)
class Whole:
    """A shard that is whole, and how much of it `update` was told."""

    shard: int
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Steps:
    """What a stage does with a shard on one device; the engine knows when, and never what it means."""

    tokenize: Callable[[ShardTask], Tokenized]  # called in a thread of its own
    pad: Callable[[Sequence[TokenizedExample]], TokenBatch | ImageBatch]  # on the CPU
    take: Callable[[Any], dict[str, torch.Tensor]]  # the forward pass and the captures: a field (B, …)
    device: torch.device
    expect: Callable[[Sequence[TokenizedExample]], None] = lambda rows: None  # told the rows of the next `pad` but one


def run_shards(
    steps: Steps,
    build: CacheBuild,
    tasks: Iterable[ShardTask],
    *,
    overflow: Overflow,
    update: Update,
    begin: Callable[[int], bool] = lambda shard: True,
    committed: Callable[[Whole], object] = lambda whole: None,
    stop: Callable[[], object] = lambda: None,
) -> int:
    """Do all `tasks`; the token budget in the end: below the manifest's where memory ran out.

    `tasks` is drawn from by the thread that tokenises, and may wait there until `stop` is called. `update` is called
    for every batch that is written, `begin` with every shard before its first batch, and the shard is left out where
    that says no, and `committed` with every shard that is whole, all in the calling thread. A shard is told to be whole
    after all of its batches, and perhaps some of the next one's.

    Out of memory, the batch is split and the budget halved for all that follow. How rows are batched shows in what the
    teacher gives by rounding alone (about 1e-6 of a float32 value), never in which row gets what; a cache dumped
    through an OOM equals another up to that. TeacherError names a row that alone does not fit.
    """
    shards = _Shards(build, overflow)

    def whole(told: Whole) -> None:
        behind.listen()  # its last batch first
        committed(told)

    seal = Behind(whole, room=1, name="softlabels-seal")
    room = _ROOM.get(steps.device.type, 1)
    trim = Trimmer()
    carrier = Carrier(steps.device, build.manifest.fields, slots=room + 1)
    made = ((task, steps.tokenize(task)) for task in tasks)
    gpu = torch.cuda.device(steps.device) if steps.device.type == "cuda" else nullcontext()  # pinned memory is its

    def listen() -> None:
        behind.listen()
        seal.listen()

    try:
        with (
            gpu,
            spared_by_the_collector() as passed,
            seal,
            Behind(lambda done: done.tell(update), room=room, name="softlabels-write") as behind,
            Ahead(made, name="softlabels-tokenize", idle=listen, stop=stop) as tokenized,
        ):
            teacher = _Teacher(steps, carrier, behind, asked=build.manifest.dump.batch_tokens)
            for task, rows in tokenized:
                if not begin(task.shard):
                    continue
                trim()
                first: list[Callable[[], Any]] = [partial(shards.begin, task, rows)]
                if set(task.missing) - {EXAMPLES}:
                    for batch in teacher.batches(rows.examples):
                        # with the first batch: a step of its own would take a batch's room
                        then = partial(shards.hand_over, task.shard) if batch.last else None
                        behind.give([*first, partial(shards.write, batch)], then=then)
                        first = []
                        del batch
                        seal.listen()
                else:
                    behind.give(first, then=partial(shards.hand_over, task.shard))
                seal.give([partial(shards.seal, task, rows, behind)])
                passed(len(rows.examples))
            behind.finish()
            seal.finish()
    finally:
        shards.discard()
    return teacher.budget


@dataclass(frozen=True, slots=True)
class _Done:
    """What the writing thread tells of a batch."""

    rows: int
    tokens: int
    budget: int | None  # where it is less than was asked for

    def tell(self, update: Update) -> None:
        halved = {} if self.budget is None else {"batch tokens": float(self.budget)}
        update(self.rows, tokens=float(self.tokens), **halved)


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch that the teacher has answered."""

    numbers: np.ndarray  # of its rows in the shard
    ids: list[str]
    values: Carried
    done: _Done
    last: bool  # of the shard


class _Teacher:
    """Batches of a shard through the forward pass, as large as memory allows."""

    def __init__(self, steps: Steps, carrier: Carrier, behind: Behind, *, asked: int) -> None:
        self.steps, self.carrier, self.behind = steps, carrier, behind
        self.asked = self.budget = asked

    def batches(self, examples: Sequence[TokenizedExample]) -> Iterator[_Batch]:
        """The shard's rows, longest first, with their values."""
        lengths = np.array([count_tokens(example) for example in examples])
        waiting = self._split(np.arange(len(examples)), lengths)
        while waiting:
            numbers = waiting.popleft()
            batch = [examples[number] for number in numbers]
            if waiting:
                self.steps.expect([examples[number] for number in waiting[0]])
            values = self._try(batch)
            if values is None:
                self._halve(batch)
                waiting = self._split(np.sort(np.concatenate([numbers, *waiting])), lengths)
                continue
            budget = self.budget if self.budget < self.asked else None
            done = _Done(len(numbers), sum(len(example.input_ids) for example in batch), budget)
            yield _Batch(numbers, [example.id for example in batch], values, done, last=not waiting)
            del values

    def _split(self, numbers: np.ndarray, lengths: np.ndarray) -> deque[np.ndarray]:
        budget = self.budget
        if budget < self.asked and len(numbers):  # what memory allows; a row alone is tried all the same
            budget = max(budget, int(lengths[numbers].max()))
        return deque(numbers[part] for part in batches_by_length(lengths[numbers], batch_tokens=budget))

    def _try(self, batch: Sequence[TokenizedExample]) -> Carried | None:
        """The batch's values; None where memory ran out."""
        try:
            inputs = _send(self.steps.pad(batch), self.steps.device)
            return self.carrier.leave(self.steps.take(inputs))
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
        return None  # not in the except block, which holds on to the forward pass's memory

    def _halve(self, batch: Sequence[TokenizedExample]) -> None:
        longest = max(count_tokens(example) for example in batch)
        if len(batch) == 1:
            raise TeacherError(
                f"memory ran out on {self.steps.device} for example {batch[0].id} alone, of {longest} tokens: give a "
                f"smaller --max-length, fewer captures, --dtype bfloat16, or a device with more memory"
            )
        self.budget = max(len(batch) * longest // 2, longest)
        self.behind.finish()  # the batches that wait hold memory of the device
        gc.collect()
        if self.steps.device.type == "cuda":
            torch.cuda.empty_cache()


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory, or the computer's, was too small."""
    signs = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def _send(batch: TokenBatch | ImageBatch, device: torch.device) -> TokenBatch | ImageBatch:
    """The batch on the device; the calling thread does not wait for what a GPU is doing."""
    if device.type != "cuda":
        return batch.to(device)
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    sent = {
        name: tensor.pin_memory().to(device, non_blocking=True)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    return replace(batch, **sent)


class _Shards:
    """The files of one shard after the other: the writing thread begins and fills them, the sealing one ends them."""

    def __init__(self, build: CacheBuild, overflow: Overflow) -> None:
        self.build, self.overflow = build, overflow
        self._open: list[FieldShard] = []  # all that aren't whole
        self._writers: dict[str, FieldShard] = {}  # of the shard that is written
        self._written: SimpleQueue[tuple[int, dict[str, FieldShard]]] = SimpleQueue()

    def begin(self, task: ShardTask, rows: Tokenized) -> None:
        lengths = np.array([len(example.input_ids) for example in rows.examples])
        targets = np.array([count_row_targets(example) for example in rows.examples])
        for field in task.missing:
            if field != EXAMPLES:
                writer = FieldShard(
                    self.build.folder,
                    field,
                    self.build.manifest.fields[field],
                    shard=task.shard,
                    tokens=lengths,
                    targets=targets,
                    overflow=self.overflow,
                )
                self._writers[field] = writer
                self._open.append(writer)

    def write(self, batch: _Batch) -> _Done:
        batch.values.write(self._writers, batch.numbers, ids=batch.ids)
        return batch.done

    def hand_over(self, shard: int) -> None:
        """The shard has all its values."""
        writers, self._writers = self._writers, {}
        self._written.put((shard, writers))

    def seal(self, task: ShardTask, rows: Tokenized, behind: Behind) -> Whole | None:
        """Wait for what `behind` writes of the shard, then make it whole; None where it never has all its values.

        What an image holds is known by then, for it was opened.
        """
        written = self._await(behind)
        if written is None:
            return None
        shard, writers = written
        assert shard == task.shard
        if EXAMPLES in task.missing:
            self.build.write_examples(task.shard, rows)
        join = join_hash(rows.examples) if writers else ""
        for writer in writers.values():
            writer.commit(join)
            self._open.remove(writer)
        if not writers:
            return Whole(shard, 0, 0)
        return Whole(shard, len(rows.examples), sum(len(example.input_ids) for example in rows.examples))

    def _await(self, behind: Behind) -> tuple[int, dict[str, FieldShard]] | None:
        while True:
            ended = behind.ended  # asked first: what it handed over is there by then
            try:
                return self._written.get(timeout=_IDLE_SECONDS)
            except Empty:
                if ended:
                    return None

    def discard(self) -> None:
        """Forget what isn't whole."""
        for writer in list(self._open):
            writer.discard()
