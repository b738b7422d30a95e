"""What became of trials: one small file each as they end, and all of them as one Parquet table.

sweep.json           the space and all that decides a trial's result: another sweep may not use the folder
points.json          what a search that follows its results has asked for, in its order
trials/NAME/         the run of a trial, an ordinary run folder
outcomes/NAME.json   what became of it: written when the run is whole, or when it failed
results.parquet      a row a trial
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softlabels.cache.files import write_file
from softlabels.errors import ConfigError
from softlabels.sweeping.space import Changes, Point, Trial

if TYPE_CHECKING:
    import pyarrow as pa

CARD, POINTS, TRIALS, OUTCOMES, RESULTS = "sweep.json", "points.json", "trials", "outcomes", "results.parquet"
FORMAT, VERSION = "softlabels-sweep", 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one trial. `figures` are its metrics, sizes and times, by name."""

    trial: str
    point: str
    seed: int
    changes: Changes
    status: Literal["done", "failed"]
    error: str | None = None
    figures: dict[str, float | int | None] = field(default_factory=dict)
    run: str | None = None  # its folder, inside the sweep's; None where it wasn't kept

    def value(self, metric: str) -> float | None:
        """Its `metric`; None where it failed or has none."""
        found = self.figures.get(metric)
        return float(found) if self.status == "done" and found is not None and math.isfinite(found) else None


def failed(trial: Trial, error: str) -> Outcome:
    """The outcome of a trial that can't be trained."""
    return Outcome(trial.name, trial.point.name, trial.options.seed, trial.point.changes, "failed", error)


class Ledger:
    """The folder of a sweep, as one process at a time writes it."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def claim(self, card: dict[str, Any]) -> None:
        """Make the folder this sweep's; ConfigError, with the keys that differ, where it is another's."""
        now = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **card}, default=str))
        path = self.out / CARD
        if not path.exists():
            if strangers := sorted(place.name for place in self.out.iterdir() if not place.name.startswith(".")):
                raise ConfigError(
                    f"{self.out} is not empty and no sweep (it holds {', '.join(strangers[:5])}): choose another --out"
                )
            write_file(path, json.dumps(now, indent=1).encode())
            return
        before = _read(path)
        if not isinstance(before, dict):
            raise ConfigError(f"{path} is damaged: delete {self.out}, or choose another --out")
        if differ := _differences(before, now):
            raise ConfigError(
                f"{self.out} holds another sweep: {'; '.join(differ)}. Choose another --out, or delete it"
            )

    def last(self, trial: Trial) -> Outcome | None:
        """What became of a trial when it was tried last; None where it never was to its end."""
        data = _read(self.out / OUTCOMES / f"{trial.name}.json")
        try:
            return Outcome(**data) if isinstance(data, dict) else None
        except TypeError:
            return None

    def read(self, trial: Trial) -> Outcome | None:
        """The outcome of a trial that is done; None where it is still to be trained, or failed and is tried again."""
        found = self.last(trial)
        if found is None or found.status != "done":
            return None
        return found if found.run is None or (self.out / found.run / "run.json").exists() else None

    def write(self, outcome: Outcome) -> None:
        data = json.dumps(asdict(outcome), default=str)
        write_file(self.out / OUTCOMES / f"{outcome.trial}.json", data.encode())

    def drop_run(self, outcome: Outcome) -> Outcome:
        """The same without its run folder; the outcome is written first, so that no kill makes it train again."""
        dropped = Outcome(**asdict(outcome) | {"run": None})
        self.write(dropped)
        shutil.rmtree(self.out / TRIALS / outcome.trial, ignore_errors=True)
        return dropped

    def read_points(self) -> list[Point]:
        data = _read(self.out / POINTS)
        return [Point(entry["name"], entry["changes"]) for entry in data] if isinstance(data, list) else []

    def write_points(self, points: Sequence[Point]) -> None:
        data = [{"name": point.name, "changes": point.changes} for point in points]
        write_file(self.out / POINTS, json.dumps(data, indent=1).encode())

    def write_results(self, outcomes: Sequence[Outcome], keys: Sequence[str]) -> Path:
        """results.parquet: a row a trial, in the order given."""
        import pyarrow as pa
        import pyarrow.parquet

        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(table_of(outcomes, keys), sink)
        write_file(self.out / RESULTS, memoryview(sink.getvalue()))
        return self.out / RESULTS


def table_of(outcomes: Sequence[Outcome], keys: Sequence[str]) -> pa.Table:
    """trial, point, seed, a column for each of `keys`, status, error, a column for each figure, run."""
    import pyarrow as pa

    figures = list(dict.fromkeys(name for outcome in outcomes for name in outcome.figures))
    columns: dict[str, pa.Array] = {
        "trial": pa.array([outcome.trial for outcome in outcomes], pa.string()),
        "point": pa.array([outcome.point for outcome in outcomes], pa.string()),
        "seed": pa.array([outcome.seed for outcome in outcomes], pa.int64()),
    }
    columns |= {key: _column([outcome.changes.get(key) for outcome in outcomes]) for key in keys}
    columns |= {
        "status": pa.array([outcome.status for outcome in outcomes], pa.string()),
        "error": pa.array([outcome.error for outcome in outcomes], pa.string()),
    }
    columns |= {name: _column([outcome.figures.get(name) for outcome in outcomes]) for name in figures}
    columns["run"] = pa.array([outcome.run for outcome in outcomes], pa.string())
    return pa.table(columns)


def _column(values: list[Any]) -> pa.Array:
    """Numbers as numbers where all are; otherwise text, JSON where a value is none itself."""
    import pyarrow as pa

    there = [value for value in values if value is not None]
    for kind, type_ in ((bool, pa.bool_()), (int, pa.int64()), ((int, float), pa.float64())):
        if there and all(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for value in there):
            return pa.array(values, type_)
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """'temperature was [1, 2] and is now [1, 2, 4]' for each key that differs; axes one by one."""
    found = []
    for key in dict.fromkeys([*now, *before]):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new)
        else:
            found.append(f"{key} was {json.dumps(old)} and is now {json.dumps(new)}")
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
