"""Items are worked on by threads or forked processes: in order, with errors that get home, and nobody stays behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from softlabels.cache.workers import forked, processes_for, threaded
from softlabels.errors import CacheError
from tests.processes import ROOT, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")

WAYS = {"threads": partial(threaded, count=2, name="test"), "processes": partial(forked, count=2)}


@pytest.fixture(params=WAYS)
def run(request: pytest.FixtureRequest) -> Any:
    def over(function: Any, items: Any) -> AbstractContextManager[Iterator[Any]]:
        return WAYS[request.param](function, items)

    return over


def test_results_come_in_the_order_of_the_items(run: Any) -> None:
    secret = object()  # no process could be sent it

    def late(item: int) -> tuple[int, bool]:
        time.sleep(0.05 if item % 2 else 0)
        return item * item, secret is not None

    with run(late, range(8)) as results:
        assert list(results) == [(item * item, True) for item in range(8)]


def test_an_error_gets_home_and_what_was_not_begun_is_left(run: Any, tmp_path: Path) -> None:
    def fail(item: int) -> int:
        if item == 3:
            raise CacheError("cache x has NaN: leave it out")
        time.sleep(0.02)
        (tmp_path / str(item)).touch()
        return item

    with pytest.raises(CacheError, match="cache x has NaN: leave it out"), run(fail, range(200)) as results:
        for _ in results:
            pass
    assert {"0", "1", "2"} <= set(os.listdir(tmp_path)) and len(os.listdir(tmp_path)) <= 8
    with pytest.raises(ZeroDivisionError), run(lambda item: item, range(3)) as results:
        raise ZeroDivisionError


class Unsendable(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("a lock")
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("error", "told"),
    [(Unsendable("salt", "pepper"), "Unsendable: salt and pepper"), (Unpicklable(), "Unpicklable: a lock")],
)
def test_errors_that_cannot_travel_are_told_all_the_same(error: Exception, told: str) -> None:
    def fail(item: int) -> int:
        raise error

    with pytest.raises(CacheError, match=told), forked(fail, range(4), 2) as results:
        list(results)


def test_where_no_process_can_be_forked_none_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.fork, [0]

    def fork() -> int:
        count[0] += 1
        if count[0] == 3:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real()

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(OSError, match="temporarily unavailable"), forked(str, range(4), 4) as results:
        list(results)
    assert count == [3] and multiprocessing.active_children() == []


def test_a_process_that_dies_is_told() -> None:
    def die(item: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return item

    told = pytest.raises(CacheError, match="has died, as one does that is killed for its memory: start it again")
    with told, forked(die, range(4), 2) as results:
        list(results)


def test_torch_computes_after_its_threads_were_left_behind() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = torch.randn(300, 2000, generator=torch.Generator().manual_seed(0))
        wanted = (values @ values.T).logsumexp(1)  # large enough for both threads

        def compute(item: int) -> tuple[float, int]:
            found = (values @ values.T).logsumexp(1)
            return float((found - wanted).abs().max()), torch.get_num_threads()

        with forked(compute, range(4), 2) as results:
            assert all(off < 1e-2 and threads == 1 for off, threads in results)
    finally:
        torch.set_num_threads(before)


def test_where_this_process_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert (processes_for(2), processes_for(8)) == (2, 6)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(processes_for(8)))
    thread.start()
    thread.join()
    assert found == [1]
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
        assert processes_for(8) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        assert processes_for(8) == 1
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes_for(8) == 1


_SLOW = """
import os, sys, time
from softlabels.cache.workers import forked

def work(item):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    time.sleep(0.3)
    return item

try:
    with forked(work, range(1000), 2) as results:
        list(results)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nobody_stays_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Killed, or by a Ctrl-C, which a terminal sends to all of them: within a moment, and without a word."""
    place, told = tmp_path / "pids", tmp_path / "told"
    place.mkdir()
    with (
        told.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-c", _SLOW, str(place)], cwd=ROOT, env=environment(), stderr=file, start_new_session=True
        ) as process,
    ):
        assert _until(lambda: len(os.listdir(place)) == 2, seconds=60)
        children = [int(name) for name in os.listdir(place)]
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)
        assert process.wait(20) == (130 if number == signal.SIGINT else -9)
        assert _until(lambda: not any(map(_runs, children)), seconds=20)
    assert told.read_text() == ""


def _runs(process: int) -> bool:
    """Not so one that has ended, and that nobody has asked for its end."""
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def _until(condition: Any, *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False
