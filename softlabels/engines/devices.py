"""Shards over several processes, one a device, each with a teacher of its own: as `local` does them, shared out here.

The process that was asked holds the cache's lock and the list of what is missing. Its workers ask for a shard when they
can begin with one, and get it over a pipe; so a slow one holds up no other, and a worker that dies has its shard done
by another. Each also gets a shard in advance, to tokenise it, while there are many; before it begins with one it asks
once more, for when nothing else is left another may have taken it. Workers end when the process that started them does.
"""

from __future__ import annotations

import multiprocessing
import pickle
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from softlabels.cache.build import CacheBuild
from softlabels.cache.codec import Overflow
from softlabels.children import end_all, end_with_parent, interrupts_held_back, portable
from softlabels.engines.local import ShardTask, Steps, run_shards
from softlabels.errors import ConfigError, TeacherError
from softlabels.progress import Update

OpenSteps = Callable[[str], AbstractContextManager[Steps]]  # with a device's name; pickled, and called in its process
_TRIES = 2  # of a shard in whose midst a worker died


def parse_devices(text: str) -> list[str]:
    """'2' (GPUs 0 and 1), 'cuda:0,cuda:1' or 'cpu,cpu' as a list; ConfigError for a device that isn't there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    have = f"this machine has {count} GPU(s)"
    if text.strip().isdigit():
        if not 1 <= int(text) <= count:
            raise ConfigError(f"--devices {text}: {have}; processes on the CPU are written as cpu,cpu")
        return [f"cuda:{number}" for number in range(int(text))]
    devices = [part.strip() for part in text.split(",")]
    for name in devices:
        gpu = re.fullmatch(r"cuda(?::(\d+))?", name)
        if gpu is None and name != "cpu":
            raise ConfigError(f"--devices {text}: '{name}' is no device; write 2, or cuda:0,cuda:1, or cpu,cpu")
        if gpu is not None and int(gpu[1] or 0) >= count:
            raise ConfigError(f"--devices {text}: there is no {name}; {have}")
    return devices


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the workers left."""

    batch_tokens: int  # the least token budget that one of them ended with
    lost: list[str]  # a line for each worker that died


def run_on_devices(
    devices: Sequence[str],
    open_steps: OpenSteps,
    build: CacheBuild,
    tasks: Sequence[ShardTask],
    *,
    overflow: Overflow,
    update: Update,
) -> Outcome:
    """Do all `tasks` on `devices`, a process each; to be called by the one that holds the lock of `build`.

    A task is taken from `tasks` when its turn has come, so they need not all be in memory.

    An error of a worker ends them all and is raised here. TeacherError where a shard had two workers die, or none is
    left. On the CPU the cores are shared among the processes; float32 values are the same bytes as from one process
    that computes with as many threads as each of them, and otherwise equal to rounding.
    """
    pool = _Pool(build, _Waiting(tasks), update)
    try:
        for device in devices:
            pool.start(device, open_steps, overflow, among=sum(torch.device(other).type == "cpu" for other in devices))
        pool.work()
        whole = True
    except BaseException:
        whole = False
        raise
    finally:
        pool.close()
        if not whole:
            build.sweep()  # of the workers, which are gone; this process has the lock
    return Outcome(min([*pool.budgets, build.manifest.dump.batch_tokens]), pool.lost)


# ---------------------------------------------------------------------------------------------- the one that shares out


@dataclass(eq=False, slots=True)
class _Worker:
    device: str
    process: SpawnProcess
    pipe: Connection
    turns: Connection  # by which it is told whether a shard is still its own
    claimed: list[ShardTask] = field(default_factory=list)  # being made whole, in work, and next
    begun: int | None = None  # the last shard that it began with
    asks: bool = False
    rows: int = 0  # told of shards that aren't whole, or less where one is known to be whole


class _Waiting:
    """Tasks that nobody has: those that were given back, and then all that were not yet taken."""

    def __init__(self, tasks: Sequence[ShardTask]) -> None:
        self.tasks, self.taken = tasks, 0
        self.back: deque[ShardTask] = deque()

    def __len__(self) -> int:
        return len(self.back) + len(self.tasks) - self.taken

    def take(self) -> ShardTask:
        if self.back:
            return self.back.popleft()
        self.taken += 1
        return self.tasks[self.taken - 1]


class _Pool:
    """The workers, and what they have of the shards."""

    def __init__(self, build: CacheBuild, waiting: _Waiting, update: Update) -> None:
        self.build, self.waiting, self.update = build, waiting, update
        self.workers: list[_Worker] = []
        self.deaths: Counter[int] = Counter()
        self.budgets: list[int] = []
        self.lost: list[str] = []

    def start(self, device: str, open_steps: OpenSteps, overflow: Overflow, *, among: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        ours, theirs = context.Pipe()
        turns, their_turns = context.Pipe()
        threads = max(torch.get_num_threads() // among, 1) if torch.device(device).type == "cpu" else None
        process = context.Process(
            target=_serve,
            args=(theirs, their_turns, open_steps, device, self.build, overflow, threads),
            name=f"softlabels-{device}",
            daemon=True,
        )
        with interrupts_held_back():  # a Ctrl-C is for the process that shares out, which ends the others
            process.start()
            self.workers.append(_Worker(device, process, ours, turns))
        theirs.close()  # so that the pipe ends with the worker
        their_turns.close()

    def work(self) -> None:
        """Until all shards are whole."""
        while self.waiting or any(worker.claimed for worker in self.workers):
            self._listen()
            self._hand_out()
        for worker in self.workers:
            if worker.asks:
                _send(worker.pipe, None)
        while self.workers:  # each says what it ended with
            self._listen()

    def _listen(self) -> None:
        pipes = {worker.pipe: worker for worker in self.workers}
        for pipe in wait(list(pipes)):
            worker = pipes[pipe]  # type: ignore[index]  # only connections were given
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, ConnectionResetError, pickle.UnpicklingError):
                self._bury(worker)
                continue
            if kind == "error":
                raise value
            if kind == "end":
                self.budgets.append(value)
                self.workers.remove(worker)
                worker.process.join()
            elif kind == "ask":
                worker.asks = True
                if not self.waiting and not any(other.claimed for other in self.workers):
                    _send(worker.pipe, None)
            elif kind == "begin":
                own = any(task.shard == value for task in worker.claimed)
                worker.begun = value if own else worker.begun
                _send(worker.turns, own)
            elif kind == "whole":
                worker.claimed = [task for task in worker.claimed if task.shard != value.shard]
                worker.rows -= value.rows
            else:
                worker.rows += value[0]
                self.update(value[0], **value[1])

    def _hand_out(self) -> None:
        for worker in self.workers:
            ahead = len(self.waiting) > len(self.workers)  # a shard in advance, while enough are left for the others
            if worker.asks and self.waiting and (ahead or not worker.claimed):
                worker.claimed.append(self.waiting.take())
                worker.asks = False
                _send(worker.pipe, worker.claimed[-1])
            elif worker.asks and not worker.claimed and (task := self._take_back()) is not None:
                worker.claimed.append(task)
                worker.asks = False
                _send(worker.pipe, task)

    def _take_back(self) -> ShardTask | None:
        """A shard that another got in advance and has not begun."""
        for worker in self.workers:
            if len(worker.claimed) > 1 and worker.claimed[-1].shard != worker.begun:
                return worker.claimed.pop()
        return None

    def _bury(self, worker: _Worker) -> None:
        """A worker died: what it had goes back to the others."""
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self.workers.remove(worker)
        self.update(-worker.rows)
        claimed = [task.shard for task in worker.claimed]
        shard = worker.begun if worker.begun in claimed else next(iter(claimed), None)
        self.lost.append(f"the process on {worker.device} {how}" + ("" if shard is None else f" in shard {shard}"))
        if shard is not None:
            self.deaths[shard] += 1
            if self.deaths[shard] >= _TRIES:
                raise TeacherError(
                    f"shard {shard} ended {_TRIES} processes: {'; '.join(self.lost)}. Memory may be too small for its "
                    f"rows: give a smaller --batch-tokens. What was committed is kept"
                )
        if not self.workers and (self.waiting or worker.claimed):
            raise TeacherError(
                f"{'; '.join(self.lost)}, and no other process is left. What was committed is kept: give the same "
                f"command again to go on"
            )
        self.waiting.back.extendleft(reversed(worker.claimed))

    def close(self) -> None:
        end_all([worker.process for worker in self.workers])
        for worker in self.workers:
            worker.pipe.close()
            worker.turns.close()


def _send(pipe: Connection, value: ShardTask | bool | None) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # it died: the next thing heard of it is that
        pipe.send(value)


# ------------------------------------------------------------------------------------------------------------ a worker


def _serve(
    pipe: Connection,
    turns: Connection,
    open_steps: OpenSteps,
    device: str,
    build: CacheBuild,
    overflow: Overflow,
    threads: int | None,
) -> None:
    """What a worker does: shards until there are none."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    talking = threading.Lock()  # the thread that tokenises asks, the one that runs the teacher tells

    def tell(kind: str, value: Any) -> None:
        with talking:
            pipe.send((kind, value))

    stopped = threading.Event()

    def begin(shard: int) -> bool:
        tell("begin", shard)
        return turns.recv()

    def tasks() -> Iterator[ShardTask]:
        while True:
            tell("ask", None)
            while not pipe.poll(0.1):
                if stopped.is_set():
                    return
            task = pipe.recv()
            if task is None:
                return
            yield task

    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with open_steps(device) as steps:
            budget = run_shards(
                steps,
                build,
                tasks(),
                overflow=overflow,
                update=lambda rows, /, **figures: tell("rows", (rows, figures)),
                begin=begin,
                committed=lambda whole: tell("whole", whole),
                stop=stopped.set,
            )
        tell("end", budget)
    except BaseException as error:
        tell("error", portable(error, instead=RuntimeError(f"{type(error).__name__} on {device}: {error}")))
