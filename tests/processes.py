"""`softlabels` in processes of its own: as a user starts it, and a quick way to start it many times.

A `Launcher` is a process that has imported everything and forks a child for every command: a real process with its
own signals, limits and exit code, but without the seconds that importing torch takes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE = 180.0  # seconds for one command, on a busy machine

_SERVER = """
import gc, json, os, resource, signal, sys
import accelerate, skops.io, sklearn.linear_model, sklearn.feature_extraction.text, torch.utils.tensorboard
import transformers.models.bert.modeling_bert
import softlabels.run, softlabels.students.bilstm, softlabels.students.linear, softlabels.students.transformer
from softlabels.cli import main
gc.collect()
gc.freeze()  # what the children never write to they need not copy
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        for number, (name, flags) in enumerate([("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY)]):
            os.dup2(os.open(request[name], flags), number)
        if request["largest_file"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
        main(request["arguments"])
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a command left. `code` is negative where a signal killed it."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as the one JSON value that it must be."""
        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=_refuse)


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def environment() -> dict[str, str]:
    """One thread a process: models this small gain nothing from more."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


def command(*arguments: object) -> list[str]:
    """The command line as the installed `softlabels` runs it."""
    return [sys.executable, "-m", "softlabels", *map(str, arguments)]


def softlabels(*arguments: object, cwd: Path, given: str | None = None) -> Finished:
    """Run `softlabels` in a new Python; `given` is its standard input."""
    done = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), input=given, capture_output=True, text=True, timeout=PATIENCE
    )
    return Finished(done.returncode, done.stdout, done.stderr)


class Launcher:
    """Starts commands without importing anything again; one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of the files that a child reads and writes: in, out and err
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # a Ctrl-C at pytest's terminal is not for it
        )
        assert self._answer() == "ready"

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(PATIENCE)

    def run(
        self,
        *arguments: object,
        cwd: Path,
        given: str = "",
        out: str | None = None,
        largest_file: int | None = None,
        when: Callable[[], bool] | None = None,
        signals: Sequence[signal.Signals] = (),
    ) -> Finished:
        """Run `softlabels` with `arguments`; `signals` are sent as soon as `when()` is true.

        `out` is where standard output goes instead of to the result; no file may become larger than `largest_file`.
        """
        places = {name: self.folder / name for name in ("in", "out", "err")}
        for name, place in places.items():
            place.write_text(given if name == "in" else "")
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "largest_file": largest_file,
        } | {name: str(place) for name, place in places.items()}
        if out is not None:
            request["out"] = out
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        child = int(self._answer())
        if when is not None:
            _signal(child, when, signals)
        code = int(self._answer())
        return Finished(code, places["out"].read_text(), places["err"].read_text())

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()


def _signal(child: int, when: Callable[[], bool], signals: Sequence[signal.Signals]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not when():
        if time.monotonic() > deadline or _is_over(child):
            return
        time.sleep(0.001)
    for number in signals:
        try:
            os.kill(child, number)
        except ProcessLookupError:
            return
        time.sleep(0.01)


def _is_over(child: int) -> bool:
    """Whether the process is gone, or only waits to be asked for its exit code."""
    try:
        return Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
