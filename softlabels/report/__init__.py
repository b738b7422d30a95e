"""STAGE 3: runs come in, one HTML page goes out, which shows which student to ship.

Read the runs and what `evaluate` kept of them, make students of runs that differ in their seed alone, hold each against
the best one, draw, write. The page is one file that asks for nothing: styles, drawings and the few lines of script that
sort its table are in it, and its Content-Security-Policy forbids every request. It is the same, byte for byte, for the
same runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softlabels.cache.files import write_file
from softlabels.errors import ConfigError, SoftlabelsError
from softlabels.progress import progress
from softlabels.report.gather import gather


@dataclass(frozen=True, slots=True)
class ReportResult:
    """What a report says first, and what it could not show."""

    out: Path
    bytes: int
    corpus: str  # the evaluation's name
    rows: int  # labelled
    runs: int
    students: int
    ship: Path  # the run to ship
    accuracy: float  # its
    as_good: list[str]  # students that nothing tells apart from it
    left_out: dict[str, str]  # run -> why it isn't shown

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return asdict(self) | {"out": str(self.out), "ship": str(self.ship)}


def report(
    runs: Sequence[Path], *, out: Path, title: str | None = None, corpus: str | None = None, differing: int = 20
) -> ReportResult:
    """Write the page `out` about `runs`, each a run's folder or a folder with runs beneath it.

    `corpus` names the evaluation, where the runs have several; `differing` rows are shown in which student and teacher
    differ most. StudentError or ConfigError where no run can be shown, or where they don't belong together.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SoftlabelsError(f"report needs {error.name}: pip install 'softlabels[report]'") from None
    from softlabels.report.page import describe, render
    from softlabels.report.students import group_students, hold_against_best

    if not runs:
        raise ConfigError("report needs runs: name their folders, or one with runs beneath it")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file, such as {out / 'report.html'}")
    with progress(None, description="read", unit="runs") as update:
        found = gather(list(map(Path, runs)), corpus=corpus, update=update)
    students = group_students(found.members)
    held = hold_against_best(students)
    page = describe(found, students, held, title=title, differing=differing)
    text = render(page).encode()
    write_file(out, text)
    best = students[0]
    return ReportResult(
        out=out,
        bytes=len(text),
        corpus=found.evaluation,
        rows=best.found.rows,
        runs=len(found.members),
        students=len(students),
        ship=best.chosen.path,
        accuracy=best.found.accuracy,
        as_good=[item.student.name for item in held if item.as_good],
        left_out={str(item.path): item.why for item in found.left_out},
    )
