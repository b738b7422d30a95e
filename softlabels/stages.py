"""The stages of an experiment, remembered in its folder: one whose inputs haven't changed is not run again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softlabels.cache.files import write_file
from softlabels.config import fingerprint


@dataclass(frozen=True, slots=True)
class Made:
    """What a stage made: where it lies, a fingerprint of all that it follows from, and the seconds it took."""

    path: str
    key: str
    seconds: float
    found: dict[str, Any]


class Stages:
    """The folder of a recipe's run, and which of its stages are done."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self.out, self.say, self.skipped = out, say, 0

    def run(
        self, name: str, inputs: Any, work: Callable[[], dict[str, Any]], *, makes: Path | None = None
    ) -> dict[str, Any]:
        """The result of stage `name`: remembered where its inputs are the same and what it `makes` is there."""
        place, key = self.out / "stages" / f"{name}.json", fingerprint(inputs)
        before = _read_json(place)
        if before is not None and before.get("fingerprint") == key and (makes is None or makes.exists()):
            self.skipped += 1
            return before["result"]
        self.say(f"{name} …")
        started = time.monotonic()
        result = work()
        # an interrupted stage that went on later counts all of its time where it kept count itself
        result.setdefault("seconds", time.monotonic() - started)
        _write_json(place, {"fingerprint": key, "result": result})
        return result

    def finish(self, result: dict[str, Any]) -> None:
        """Keep what all stages gave together in results.json."""
        _write_json(self.out / "results.json", result)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_file(path, json.dumps(value, sort_keys=True, indent=1).encode())


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
