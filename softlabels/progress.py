"""How far a long step has come: counts come in, a bar or a few plain lines go out, always on stderr.

On a terminal one line is redrawn in place; elsewhere (a log, CI) a plain line appears at most every ten
seconds. Either way one plain line stays at the end. Nothing is shown under `quiet()`, or with
SOFTLABELS_QUIET=1 in the environment.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

PLAIN_SECONDS = 10.0  # between two plain lines
DRAW_SECONDS = 0.1  # between two redraws of the bar: an update costs next to nothing
PER_SECOND = (
    "tokens",
)  # figures that are counted like the unit and shown as a rate; any other is shown as it last was

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


class Update(Protocol):
    """`update(n, **figures)`: `n` more units are done. `tokens` is counted; other figures are shown as is."""

    def __call__(self, n: int, /, **figures: float) -> None: ...


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is shown."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def progress(total: int | None, *, description: str, unit: str = "rows", done: int = 0) -> Iterator[Update]:
    """Show how far `description` has come while the block runs; yields the `update` to call after each piece.

    `total` counts `unit`s and is None where it isn't known; `done` of them were there before (a resumed step)
    and count neither for the rate nor for the time left.
    """
    count = _Count(description, unit, total=total, before=done, done=done)
    if _quiet.get() or os.environ.get("SOFTLABELS_QUIET", "") not in ("", "0"):
        yield count.add
        return
    on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    with _bar(count) if on_terminal else _plain_lines(count) as update:
        yield update


@dataclass(slots=True)
class _Count:
    """What is done, and the words for it."""

    description: str
    unit: str
    total: int | None
    before: int
    done: int
    started: float = field(default_factory=lambda: time.monotonic())
    figures: dict[str, float] = field(default_factory=dict)

    def add(self, n: int, /, **figures: float) -> None:
        self.done += n
        for name, value in figures.items():
            self.figures[name] = self.figures.get(name, 0) + value if name in PER_SECOND else value

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def rate(self) -> float:
        """Units a second, of this call alone."""
        return (self.done - self.before) / self.seconds

    def amount(self) -> str:
        """'1,200/5,000 rows'."""
        return f"{self.done:,}/{self.total:,} {self.unit}" if self.total is not None else f"{self.done:,} {self.unit}"

    def speed(self) -> str:
        """'345 rows/s  41,000 tokens/s  loss 0.412'; empty before the first update."""
        if self.done == self.before:
            return ""
        words = [f"{_figure(self.rate)} {self.unit}/s"]
        for name, value in self.figures.items():
            rated = name in PER_SECOND
            words.append(f"{_figure(value / self.seconds)} {name}/s" if rated else f"{name} {_figure(value)}")
        return "  ".join(words)

    def left(self) -> str:
        """'1:05 left'; empty where it can't be told."""
        if self.total is None or self.rate <= 0:
            return ""
        return f"{_clock(max(self.total - self.done, 0) / self.rate)} left"

    def line(self, ending: str) -> str:
        """One plain line; `ending` is its last word on the time."""
        return "  ".join(part for part in (f"{self.description}: {self.amount()}", self.speed(), ending) if part)


def _figure(value: float) -> str:
    """Whole numbers and large ones with separators, others with three significant digits."""
    value = float(value)  # torch and numpy scalars come too
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 100 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    """'0:07', '12:30' or '1:02:03'."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


@contextmanager
def _plain_lines(count: _Count) -> Iterator[Update]:
    next_line = count.started + PLAIN_SECONDS

    def update(n: int, /, **figures: float) -> None:
        nonlocal next_line
        count.add(n, **figures)
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + PLAIN_SECONDS
            _write(count.line(count.left()))

    with _last_line(count, _write):
        yield update


def _write(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextmanager
def _last_line(count: _Count, write: Callable[[str], None]) -> Iterator[None]:
    """Whatever ends the block, say where it stood: 'in 1:05', or 'stopped after 1:05'."""
    ending = "stopped after"
    try:
        yield
        ending = "in"
    finally:
        write(count.line(f"{ending} {_clock(count.seconds)}"))


@contextmanager
def _bar(count: _Count) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    # transient: when the block ends, Ctrl-C included, rich clears the bar and shows the cursor again
    console = Console(stderr=True)
    words = Column(no_wrap=True, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[words]}", markup=False, table_column=words),
    )
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task(count.description, total=count.total, completed=count.done, words=count.amount())
    drawn = 0.0

    def update(n: int, /, **figures: float) -> None:
        nonlocal drawn
        count.add(n, **figures)
        if time.monotonic() - drawn >= DRAW_SECONDS:
            drawn = time.monotonic()
            words = "  ".join(part for part in (count.amount(), count.speed(), count.left()) if part)
            bar.update(task, completed=count.done, words=words, refresh=True)

    with (
        _last_line(count, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)),
        bar,
    ):
        bar.refresh()
        yield update
