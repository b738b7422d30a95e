"""Shards over the workers of a Ray cluster, each with a teacher of its own: as `local` does them, on any machine.

The process that was asked holds the cache's lock and the list of what is missing, and sends each worker the rows of a
shard. A worker keeps `run_shards` going over what it is sent, so that its teacher never waits, and brings a shard that
is whole to the cache itself (`softlabels.cache.delivery`). It runs the versions that this process does, on the same
weights, or not at all: the bytes are those of a local dump.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from softlabels.cache.build import CacheBuild
from softlabels.cache.codec import Overflow
from softlabels.cache.delivery import Place
from softlabels.cache.format import EXAMPLES, Manifest
from softlabels.config import RayOptions, package_versions
from softlabels.engines.devices import OpenSteps
from softlabels.engines.local import ShardTask, Steps, Whole, run_shards
from softlabels.engines.ray_cluster import Room, connect
from softlabels.engines.ray_pool import GivenUp, Watch, run_items
from softlabels.errors import ConfigError, TeacherError
from softlabels.progress import Update
from softlabels.tasks import TaskLabels
from softlabels.types import Example

_DEPTH = 3  # shards at a worker: one is made whole, one is with the teacher and written, one is tokenised
_IDLE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ClusterOutcome:
    """What the workers left."""

    batch_tokens: int  # the least token budget that one of them ended with
    lost: list[str]  # a line for each worker that died
    given_up: list[str]  # a line for each shard that no worker could do


def run_on_ray(
    options: RayOptions,
    open_steps: OpenSteps,
    build: CacheBuild,
    place: Place,
    tasks: Iterable[ShardTask],
    *,
    total: int,
    overflow: Overflow,
    update: Update,
    delivered: Callable[[dict[str, bytes], int], object] = lambda receipts, shard: None,
) -> ClusterOutcome:
    """Do all `tasks`, `total` of them, on a Ray cluster; to be called by the one that holds the lock of `build`.

    `delivered` is told the receipts of each shard that is in the cache. float32 values are the same bytes as from one
    process that computes with as many threads as each worker has CPUs. Errors as `connect` and `run_items` have them.
    """
    budgets = [build.manifest.dump.batch_tokens]
    alive: dict[str, float] = {}

    def done(parcel: Parcel, result: ShardDone) -> None:
        task = parcel.task
        delivered(result.receipts, task.shard)
        budgets.append(result.budget or budgets[0])
        update(len(task.examples), tokens=float(result.tokens), **alive)

    def changed(workers: int, retries: int) -> None:
        alive.update({"workers": float(workers)} | ({"retries": float(retries)} if retries else {}))
        update(0, **alive)

    with connect(options) as room:
        plan = OpenShards(open_steps, build.manifest, place, overflow, room)
        watch: Watch[Parcel] = Watch(lambda parcel: f"shard {parcel.task.shard}", done, changed)
        report = run_items(map(Parcel, tasks), plan, room=room, total=total, depth=_DEPTH, watch=watch)
    given_up = [_words(one, build.manifest.dump.shard_rows) for one in report.given_up]
    return ClusterOutcome(min(budgets), report.lost, given_up)


def _words(one: GivenUp[Parcel], shard_rows: int) -> str:
    task, rows = one.item.task, one.item.task.examples
    first = task.shard * shard_rows
    return f"shard {task.shard} (rows {first} to {first + len(rows) - 1}: {rows[0].id} to {rows[-1].id}): {one.reason}"


@dataclass(frozen=True, slots=True)
class Parcel:
    """A shard's task as it travels: its rows by columns, a seventh of the work of so many objects."""

    task: ShardTask

    def __reduce__(self) -> tuple[Callable[..., Parcel], tuple[Any, ...]]:
        task = self.task
        columns = [[getattr(row, column.name) for row in task.examples] for column in fields(Example)]
        return _unpack, (task.shard, columns, task.labels, list(task.missing))


def _unpack(shard: int, columns: list[list[Any]], labels: TaskLabels, missing: list[str]) -> Parcel:
    return Parcel(ShardTask(shard, [Example(*row) for row in zip(*columns, strict=True)], labels, missing))


# ------------------------------------------------------------------------------------------------------------ a worker


@dataclass(frozen=True, slots=True)
class ShardDone:
    """What a worker says of a shard that is in the cache."""

    receipts: dict[str, bytes]  # by field
    tokens: int
    budget: int | None  # where it is less than was asked for


@dataclass(frozen=True, slots=True)
class OpenShards:
    """How a process of the cluster becomes a worker."""

    open_steps: OpenSteps
    manifest: Manifest
    place: Place
    overflow: Overflow
    room: Room

    def __call__(self) -> ShardWorker:
        self._check_versions()
        self.place.check()
        device = "cpu"
        if self.room.gpus:
            device = "cuda"
            if not torch.cuda.is_available():
                raise TeacherError("Ray gave a worker a GPU, and torch there sees none: install a torch for CUDA there")
        return ShardWorker(self, device)

    def _check_versions(self) -> None:
        """What stands in the manifest must be true of every worker."""
        said = self.manifest.versions
        here = package_versions(*(name for name in said if name != "softlabels"))
        if different := [f"{name} {here[name]} (not {said[name]})" for name in said if here[name] != said[name]]:
            raise ConfigError(
                f"{platform.node()} has {', '.join(different)}: install the same versions on every machine of the "
                f"cluster, or go on where this cache was begun"
            )


class ShardWorker:
    """Takes shards in several threads, does them in one, delivers them in another."""

    def __init__(self, plan: OpenShards, device: str) -> None:
        self.plan, self.device = plan, device
        self._sent: SimpleQueue[ShardTask] = SimpleQueue()
        self._at_work: dict[int, _Work] = {}
        self._lock = threading.Lock()
        opened: Future[None] = Future()
        threading.Thread(target=self._serve, args=(opened,), name="softlabels-shards", daemon=True).start()
        opened.result()

    def do(self, parcel: Parcel) -> ShardDone:
        """Returns when the shard is in the cache."""
        task = parcel.task
        work = _Work(task)
        with self._lock:
            self._at_work[task.shard] = work
            self._sent.put(task)
        return work.result.result()

    def _serve(self, opened: Future[None]) -> None:
        """One thread from the first to the last: autocast and the number of threads are a thread's own."""
        torch.set_num_threads(max(int(self.plan.room.cpus), 1))
        with ExitStack() as stack:
            try:
                scratch = stack.enter_context(self.plan.place.scratch())
                steps = stack.enter_context(self.plan.open_steps(self.device))
                deliver = stack.enter_context(ThreadPoolExecutor(1, "softlabels-deliver"))
            except BaseException as error:
                opened.set_exception(error)
                return
            opened.set_result(None)
            while True:  # the process is ended by who started it
                try:
                    self._run(steps, scratch, deliver)
                except BaseException as error:
                    self._fail(error)

    def _run(self, steps: Steps, scratch: Path, deliver: ThreadPoolExecutor) -> None:
        stopped = threading.Event()
        budget = None

        def update(rows: int, /, **figures: float) -> None:
            nonlocal budget
            if "batch tokens" in figures:
                budget = int(figures["batch tokens"])

        def committed(whole: Whole) -> None:
            with self._lock:
                work = self._at_work.pop(whole.shard)
            deliver.submit(self._deliver, work, scratch, whole.tokens, budget)

        build = CacheBuild(scratch, self.plan.manifest)
        run_shards(
            steps,
            build,
            self._draw(stopped),
            overflow=self.plan.overflow,
            update=update,
            committed=committed,
            stop=stopped.set,
        )

    def _draw(self, stopped: threading.Event) -> Iterator[ShardTask]:
        while not stopped.is_set():
            try:
                yield self._sent.get(timeout=_IDLE_SECONDS)
            except Empty:
                continue

    def _deliver(self, work: _Work, scratch: Path, tokens: int, budget: int | None) -> None:
        names = sorted(work.task.missing, key=lambda name: name != EXAMPLES)  # `examples` first
        try:
            receipts = self.plan.place.deliver(scratch, names, work.task.shard)
            work.result.set_result(ShardDone(receipts, tokens, budget))
        except BaseException as error:
            work.result.set_exception(error)

    def _fail(self, error: BaseException) -> None:
        """Whatever was at work is so no longer: which of it was at fault, the one that sent it finds out."""
        with self._lock:
            works, self._at_work = list(self._at_work.values()), {}
            while not self._sent.empty():
                self._sent.get()
        for work in works:
            work.result.set_exception(error)


@dataclass(eq=False, slots=True)
class _Work:
    task: ShardTask
    result: Future[ShardDone] = field(default_factory=Future)
