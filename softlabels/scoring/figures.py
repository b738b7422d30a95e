"""What an evaluation says, as it travels: from `evaluate` to people, to JSON in the run's folder, and to a report.

Every figure is checked when it is made, since what is read from a run's folder may come from anyone.
"""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(ge=0)]
MOST_BINS = 1000


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Bin:
    """One bar of a reliability diagram: rows whose probability lies in (lower, upper]; None where there is no row."""

    lower: Share
    upper: Share
    rows: Count
    confidence: Share | None  # their mean probability
    accuracy: Share | None

    def __post_init__(self) -> None:
        if (self.rows > 0) != (self.confidence is not None and self.accuracy is not None):
            raise ValueError("a bin has a confidence and an accuracy where it has rows")


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Calibration:
    """Of the most likely class, on labelled rows. `brier` is Σ over classes of (p − y)², from 0 to 2; `nll` in nats."""

    bins: Annotated[int, Field(ge=1, le=MOST_BINS)]
    ece: Share  # expected calibration error, bins of equal width (Guo et al. 2017)
    ece_equal_mass: Share  # the same with bins of as many rows each
    brier: Annotated[float, Field(ge=0, le=2)]
    nll: Positive | None  # None where a label has the probability 0
    confidence: Share  # the mean probability of what was said
    diagram: Annotated[list[Bin], Field(max_length=MOST_BINS)]


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Interval:
    """The middle `level` of what resampled rows gave."""

    low: Share
    high: Share
    level: Annotated[float, Field(gt=0, lt=1)]
    resamples: Annotated[int, Field(ge=1)]
    seed: int


@dataclass(frozen=True, slots=True, config=_CHECKED)
class PairedTest:
    """McNemar's test on the same labelled rows: is one side right more often than the other?

    `p` is the chance of so uneven a split of the rows that only one of the two has right, or a more uneven one, were
    either side as likely (two-sided, exact).
    """

    against: str
    rows: Count
    both: Count  # rows that both have right
    only_this: Count
    only_other: Count
    neither: Count
    difference: Annotated[float, Field(ge=-1, le=1)]  # of the accuracies: this one's less the other's
    p: Share


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Slice:
    """A part of the labelled rows: those of a length, or of a label."""

    by: Literal["length", "label"]
    name: str  # '5 to 12 tokens', or the class
    rows: Count
    accuracy: Share | None  # of a label's rows this is its recall; None where there is no row
    f1: Share | None  # macro-F1 over the classes that occur in the slice; of a label its own F1 in all rows
    agreement: Share | None  # with the teacher, on those of the rows that it has said something of
    teacher_accuracy: Share | None  # on the same


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Fidelity:
    """How near a student is to its teacher on the rows that corpus and cache share."""

    rows: Count
    agreement: Share  # share of rows with the same class
    kl: float  # mean KL(teacher ‖ student) at T = 1, in nats
    teacher_accuracy: Share | None  # None where no shared row has a label
    teacher_macro_f1: Share | None


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Latency:
    """Milliseconds for one text alone on one CPU thread, tokenisation included: the median over `texts` texts."""

    ms: Positive
    teacher_ms: Positive | None
    teacher_parameters: Count | None
    texts: Count
    machine: str = ""  # its processor: times of different ones can't be compared

    @property
    def times_faster(self) -> float | None:
        return None if self.teacher_ms is None or self.ms <= 0 else self.teacher_ms / self.ms


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Evaluation:
    """What `evaluate` found. `classes` maps a class to precision, recall, f1-score and support."""

    run: str
    corpus: str
    rows: Count  # with a label
    accuracy: Share
    macro_f1: Share
    classes: dict[str, dict[str, float]]
    averages: dict[str, dict[str, float]]
    fidelity: Fidelity | None
    parameters: Count
    nonzero: Count  # of the parameters; fewer where the student was pruned
    bytes: Count
    latency: Latency
    alone: dict[str, float] = field(default_factory=dict)  # of an average: each run's accuracy by itself
    calibration: Calibration | None = None
    teacher_calibration: Calibration | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)  # of accuracy, macro_f1, ece and agreement
    tests: list[PairedTest] = field(default_factory=list)  # against the teacher and other runs
    slices: list[Slice] = field(default_factory=list)
    kept: str | None = None  # the file in the run's folder that says all this

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return asdict(self) | {"times_faster": self.latency.times_faster}
