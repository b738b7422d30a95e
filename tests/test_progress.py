"""Progress says the truth on a terminal and in a log, never on stdout, and leaves the terminal clean."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from softlabels import progress as module
from softlabels.progress import progress, quiet

ROOT = Path(__file__).parents[1]


def test_plain_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress(5000, description="dump", done=1000) as update:
        for second in range(1, 26):
            now[0] = float(second)
            update(100, tokens=4000, loss=1 / second)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "dump: 2,000/5,000 rows  100 rows/s  4,000 tokens/s  loss 0.1  0:30 left",
        "dump: 3,000/5,000 rows  100 rows/s  4,000 tokens/s  loss 0.05  0:20 left",
        "dump: 3,500/5,000 rows  100 rows/s  4,000 tokens/s  loss 0.04  in 0:25",
    ]


def test_an_interrupted_step_says_where_it_stopped(capsys):
    with pytest.raises(KeyboardInterrupt), progress(None, description="read [x]", unit="files") as update:
        update(3)
        raise KeyboardInterrupt
    line = capsys.readouterr().err
    assert line.startswith("read [x]: 3 files  ") and line.endswith("stopped after 0:00\n")


def test_quiet(capsys, monkeypatch):
    with quiet(), progress(3, description="silent") as update:
        update(3, loss=0.5)
    monkeypatch.setenv("SOFTLABELS_QUIET", "1")
    with progress(3, description="silent") as update:
        update(3, loss=0.5)
    assert capsys.readouterr() == ("", "")


SCRIPT = """
import sys, time
from softlabels.progress import progress
with progress(1000, description="dump") as update:
    update(400, tokens=10)
    if "wait" in sys.argv:
        print("ready", flush=True)
        time.sleep(30)
"""


@pytest.mark.parametrize("interrupted", [False, True])
def test_on_a_terminal(interrupted):
    """A bar is drawn on stderr; at the end it is cleared, the cursor is back and one plain line stays."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *(["wait"] if interrupted else [])],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "SOFTLABELS_QUIET": ""},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
    )
    os.close(follower)
    if interrupted:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
    shown = _read(leader)
    rest, _ = child.communicate(timeout=30)
    assert rest == ""
    assert "400/1,000 rows" in shown and "━" in shown
    hidden, back = "\x1b[?25l", "\x1b[?25h"
    assert shown.rindex(back) > shown.rindex(hidden)
    line = shown[shown.rindex(back) :].split("Traceback")[0].strip()
    assert line.endswith("stopped after 0:00" if interrupted else "in 0:00")
    assert "━" not in line


def _read(leader: int) -> str:
    pieces: list[bytes] = []
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # Linux's way of saying that the other side is closed
            piece = b""
        if not piece:
            os.close(leader)
            return b"".join(pieces).decode()
        pieces.append(piece)
