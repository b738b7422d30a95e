"""What runs trials: here, one after the other, or in processes of this machine, each on its share of the cores.

A `Runner` draws trials when it has room for one, and tells what became of each. Nothing else of a sweep knows where
trials run, so that a cluster can be put in place of these.

Why processes and not stacked students: a BiLSTM's step is three quarters matrix products that fill a core already (32
rows of 15 words: 56 GFLOP/s, where one large product reaches 70 to 80). The same products and pointwise functions of 6
to 24 students, stacked by `bmm`, took 0.9 to 1.4 times as long a student, and torch has no batching rule for its LSTM.
Two threads of one student wait for each other at every one of these small products; two students, a thread each, don't.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from softlabels.children import end_all, end_with_parent, interrupts_held_back, portable
from softlabels.errors import SoftlabelsError
from softlabels.sweeping.outcomes import Outcome, failed
from softlabels.sweeping.space import Trial

TRIES = 2  # of a trial in whose midst a process died; the second one goes on from its last epoch
_TICK = 1.0  # seconds

Tell = Callable[[Trial, Outcome], None]


class Runner(Protocol):
    """Trains all of `trials`, drawn one by one, and tells the outcome of each in the calling thread."""

    def __call__(
        self, setting: Any, trials: Iterator[Trial], *, tell: Tell, tick: Callable[[], None] = lambda: None
    ) -> None: ...


def run_here(setting: Any, trials: Iterator[Trial], *, tell: Tell, tick: Callable[[], None] = lambda: None) -> None:
    """A `Runner`: one after the other in this process, with all of its threads."""
    from softlabels.sweeping.training import trainer

    with trainer(setting) as train:
        for trial in trials:
            tell(trial, train(trial))


def run_in_processes(jobs: int) -> Runner:
    """A `Runner` of so many processes, which share the machine's cores. They end when the one that started them does.

    A process that dies is replaced, and its trial tried once more.
    """

    def run(setting: Any, trials: Iterator[Trial], *, tell: Tell, tick: Callable[[], None] = lambda: None) -> None:
        pool = _Pool(setting, trials, jobs)
        try:
            pool.work(tell, tick)
        finally:
            pool.close()

    return run


def count_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False, slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    trial: Trial | None = None


class _Pool:
    def __init__(self, setting: Any, trials: Iterator[Trial], jobs: int) -> None:
        self.setting, self.trials, self.jobs = setting, trials, jobs
        self.again: deque[Trial] = deque()
        self.deaths: Counter[str] = Counter()
        self.workers: list[_Worker] = []
        # a fork of a process that has only imported: no seconds of importing torch for each, and its pages are shared
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(["softlabels.sweeping.training", "torch.utils.tensorboard"])

    def work(self, tell: Tell, tick: Callable[[], None]) -> None:
        while True:
            while len(self._busy()) < self.jobs and (trial := self._next()) is not None:
                self._give(trial)
            if not self._busy():
                return
            for pipe in wait([worker.pipe for worker in self._busy()], timeout=_TICK):
                self._listen(next(worker for worker in self.workers if worker.pipe is pipe), tell)
            tick()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.trial is not None]

    def _next(self) -> Trial | None:
        return self.again.popleft() if self.again else next(self.trials, None)

    def _give(self, trial: Trial) -> None:
        worker = next((worker for worker in self.workers if worker.trial is None), None) or self._start()
        worker.trial = trial
        with suppress(BrokenPipeError, ConnectionResetError):  # it died: the next thing heard of it is that
            worker.pipe.send(trial)

    def _start(self) -> _Worker:
        ours, theirs = self.context.Pipe()
        threads = max(count_cores() // self.jobs, 1)
        process = self.context.Process(target=_serve, args=(theirs, self.setting, threads), daemon=True)
        with interrupts_held_back():  # a Ctrl-C is for the process that hands out, which ends the others
            process.start()
            self.workers.append(_Worker(process, ours))
        theirs.close()  # so that the pipe ends with the worker
        return self.workers[-1]

    def _listen(self, worker: _Worker, tell: Tell) -> None:
        trial = worker.trial
        assert trial is not None
        try:
            said = worker.pipe.recv()
        except (EOFError, ConnectionResetError, pickle.UnpicklingError):
            self._bury(worker, trial, tell)
            return
        if isinstance(said, BaseException):
            raise said
        worker.trial = None
        tell(trial, said)

    def _bury(self, worker: _Worker, trial: Trial, tell: Tell) -> None:
        worker.process.join()
        self.workers.remove(worker)
        worker.pipe.close()
        code = worker.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self.deaths[trial.name] += 1
        if self.deaths[trial.name] < TRIES:
            self.again.append(trial)
            return
        error = f"its process {how}, {TRIES} times: memory may be too small for it beside {self.jobs - 1} other(s)"
        tell(trial, failed(trial, error))

    def close(self) -> None:
        end_all([worker.process for worker in self.workers])
        for worker in self.workers:
            worker.pipe.close()


# ------------------------------------------------------------------------------------------------------------ a worker


def _serve(pipe: Connection, setting: Any, threads: int) -> None:
    """What a process does: trials until the pipe ends."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # also of a fork server that was started before
    import torch
    from threadpoolctl import threadpool_limits

    from softlabels.sweeping.training import trainer

    torch.set_num_threads(threads)
    threadpool_limits(threads)  # numpy's and scipy's
    try:
        with trainer(setting) as train:
            while True:
                pipe.send(train(pipe.recv()))
    except (EOFError, BrokenPipeError):
        return
    except BaseException as error:
        pipe.send(portable(error, instead=SoftlabelsError(f"{type(error).__name__}: {error}")))
        sys.exit(1)
