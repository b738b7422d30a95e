"""Workers for tests of the pool, in a module that other processes import: an item says what is to happen to it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from softlabels.errors import CacheError, TeacherError


class Doubles:
    """Twice a number; of a word what it says."""

    def do(self, item: int | str) -> int:
        if isinstance(item, int):
            return 2 * item
        word, _, rest = item.partition(" ")
        if word == "die":
            os._exit(3)
        if word == "refuse":
            raise CacheError(f"refused {rest}")
        if word == "full":
            raise OSError(28, "No space left on device", "/somewhere")
        if word == "sleep":
            time.sleep(float(rest))
            return -2
        if word == "once":  # dies the first time, and leaves a mark
            if Path(rest).exists():
                return -1
            Path(rest).touch()
            time.sleep(0.2)
            os._exit(3)
        raise ValueError(f"no such thing as {item}")


def open_doubles() -> Doubles:
    return Doubles()


def open_never() -> Doubles:
    os._exit(4)


def open_first(mark: Path) -> Doubles:
    """Only one process ever becomes a worker, as where all machines but one are broken."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        os._exit(4)
    return Doubles()


def open_elsewhere() -> Doubles:
    raise TeacherError("the teacher was changed")
