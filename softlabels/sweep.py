"""Many students from caches: a space of options comes in; a run folder a trial, and one table of results, go out.

    softlabels.sweep(["cache"], out="sweep", axes={"temperature": [1, 2, 4], "losses.kl": [0.3, 0.7]},
                     fixed={"student": "bilstm"}, options=SweepOptions(seeds=[0, 1, 2]), validation=dev)

The folder is described in `softlabels.sweeping.outcomes`. Stopped, the same call goes on: trials that are done are
skipped, one in its midst goes on from its last epoch, failed ones are tried again.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from softlabels.cache import Cache
from softlabels.cache.combined import CombinedCache
from softlabels.cache.files import lock
from softlabels.config import CombineOptions, RayOptions
from softlabels.corpus import Corpus
from softlabels.errors import ConfigError, SoftlabelsError
from softlabels.progress import progress
from softlabels.students import check_student
from softlabels.sweeping.optuna_search import OptunaSearch
from softlabels.sweeping.outcomes import RESULTS, Ledger, Outcome
from softlabels.sweeping.pool import Runner, count_cores, run_here, run_in_processes
from softlabels.sweeping.space import (
    Changes,
    Choice,
    Point,
    Range,
    Space,
    SweepOptions,
    Trial,
    check_axis,
    check_space,
    count_points,
    find_points,
    trials_of,
)
from softlabels.sweeping.training import Setting, open_caches
from softlabels.teaching_rows import check_labelled
from softlabels.training.preparing import find_aims, fit_to_cache

_MOST_TRIED = 100  # points that are looked at before any is trained


@dataclass(frozen=True, slots=True)
class Group:
    """A point of the space over its seeds. `mean` and `spread` (sample standard deviation; None of one) by figure."""

    point: str
    changes: Changes
    trials: int  # that are done
    failed: int
    value: float | None  # the mean of the metric; None where all failed
    mean: dict[str, float]
    spread: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep found; `groups` are sorted, the best first."""

    out: str
    results: str  # the Parquet file
    metric: str
    keys: list[str]  # that were swept
    groups: list[Group]
    trials: list[Outcome]
    skipped: int  # that were done before
    seconds: float

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.trials if outcome.status == "failed"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return asdict(self)


def sweep(
    caches: Sequence[str | Path],
    *,
    out: str | Path,
    axes: Mapping[str, Sequence[Any] | Range],
    fixed: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    options: SweepOptions | None = None,
    validation: Corpus | None = None,
    test: Corpus | None = None,
    combining: CombineOptions | None = None,
    jobs: int | None = None,
    cpu: bool = False,
    runner: Runner | None = None,
    ray: RayOptions | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SweepResult:
    """Train a student for every point of `axes` and every seed, and hold them by a metric on `validation`.

    `axes` leads keys of StudentOptions (or paths, 'options.hidden_size', 'losses.kl') to the values that they take, or
    to a `Range`; `fixed` has those that all trials share, `recipe` the student that they start from. Without
    `validation` each trial holds rows of its cache out. `test` is scored too and chooses nothing.

    By default as many `jobs` as cores train at once on a CPU, each on its share of the threads, and one on a GPU;
    with `ray` the workers of a cluster train them, which see the folders under the same paths; `runner` may run trials
    elsewhere still. A trial that fails is told by `say` and has its error in the table; the others go on. What no
    trial can have is refused before the first one, as its training would refuse it; ConfigError where all failed.
    """
    started, folder = time.monotonic(), Path(out)
    options = options or SweepOptions()
    found = (
        Range(key, v.low, v.high, v.log) if isinstance(v, Range) else Choice(key, tuple(v)) for key, v in axes.items()
    )
    space = Space(tuple(check_axis(axis) for axis in found), dict(fixed or {}), recipe)
    check_space(space, options)
    for student in _students(space):
        check_student(student)  # a trial each would tell the same, later
    setting = Setting(folder, tuple(map(Path, caches)), combining or CombineOptions(), validation, test, cpu)
    cache = open_caches(setting)
    for line in cache.overlap() if isinstance(cache, CombinedCache) else []:
        say(line)
    metric = _choose_metric(options, space, cache, validation, test)
    if not folder.exists():  # of a sweep that goes on some may be done
        _refuse_hopeless(space, options, cache, setting)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder)
    with lock(folder):
        ledger.claim(_card(space, options, metric, cache, setting))
        book = _Book(ledger, space, options, metric, say)
        run = runner or (_on_cluster(ray) if ray else _choose_runner(jobs, book.total, cpu=cpu))
        with progress(book.total, description="sweep", unit="trials", done=book.count_done()) as update:
            try:
                run(setting, book.draw(), tell=book.hearing(update), tick=lambda: update(0))
            finally:
                ledger.write_results(book.known(), [axis.key for axis in space.axes])
    result = SweepResult(
        out=str(folder),
        results=str(folder / RESULTS),
        metric=metric,
        keys=[axis.key for axis in space.axes],
        groups=_group(book.outcomes, metric),
        trials=book.outcomes,
        skipped=book.skipped,
        seconds=time.monotonic() - started,
    )
    if len(result.failed) == len(result.trials):
        raise ConfigError(f"all {len(result.trials)} trials failed; the first of them: {result.failed[0].error}")
    return result


# ------------------------------------------------------------------------------------------------------------ choices


def _students(space: Space) -> list[str]:
    """The kinds of students that are named; a recipe's have names of their own, which it has checked."""
    named = [axis.values for axis in space.axes if axis.key == "student" and isinstance(axis, Choice)]
    return [] if space.recipe else [*(named[0] if named else ()), *([space.fixed["student"]] if not named else [])]


def _refuse_hopeless(space: Space, options: SweepOptions, cache: Cache, setting: Setting) -> None:
    """Raise what the first trial would tell, where no trial can be for what its student or its losses ask.

    Where there are more trials than are looked at, or Optuna will choose, they must all tell the same.
    """
    if options.search == "optuna":
        options = options.model_copy(update={"search": "random", "points": _MOST_TRIED})
    told: list[SoftlabelsError] = []
    for point in itertools.islice(find_points(space, options), _MOST_TRIED):
        try:
            chosen = space.options(point.changes, seed=0, trial=point.name)
            spec, source = fit_to_cache(cache, chosen, out=setting.out, validation=setting.validation)
            find_aims(cache, chosen, spec, source)
            return
        except SoftlabelsError as error:
            told.append(error)
    if len(told) < _MOST_TRIED or len({str(error) for error in told}) == 1:
        raise told[0]


def _choose_metric(
    options: SweepOptions, space: Space, cache: Cache, validation: Corpus | None, test: Corpus | None
) -> str:
    """The metric by which trials are held; ConfigError where they have none, or none that compares them."""
    classes = cache.manifest.teacher.task == "sequence-classification"
    for corpus, name in ((validation, "--eval"), (test, "--test")):
        if corpus is not None:
            if not classes:
                raise ConfigError(f"{name} scores classes, and these students are no classifiers: leave it out")
            check_labelled(cache, corpus, name)
    usual = "accuracy" if validation is not None else "agreement" if classes else "loss"
    metric = options.metric or usual
    if metric == "loss":
        if validation is not None:
            raise ConfigError("the loss is that of held-out rows, and with --eval none are held out: leave one out")
        keys = [*(axis.key for axis in space.axes)]
        if moved := [key for key in keys if key.partition(".")[0] in ("losses", "temperature", "phases")]:
            raise ConfigError(
                f"trials that differ in '{moved[0]}' have losses that don't compare: "
                + ("take another metric" if classes else "sweep other keys")
            )
    elif not classes:
        raise ConfigError(f"metric '{metric}' is of classes, and these students are no classifiers: take loss")
    elif metric == "agreement" and validation is not None:
        raise ConfigError(
            "agreement is with the teacher on held-out rows of the cache: leave --eval out, or take accuracy"
        )
    return metric


def _choose_runner(jobs: int | None, trials: int, *, cpu: bool) -> Runner:
    import torch

    if jobs is None:
        jobs = 1 if torch.cuda.is_available() and not cpu else count_cores()
    return run_here if min(jobs, trials) == 1 else run_in_processes(min(jobs, trials))


def _on_cluster(options: RayOptions) -> Runner:
    from softlabels.sweeping.ray_runner import run_on_cluster

    return run_on_cluster(options)


def _card(space: Space, options: SweepOptions, metric: str, cache: Cache, setting: Setting) -> dict[str, Any]:
    """What decides the trials and their results. More points may be asked for later, and more or fewer runs kept."""
    return {
        **space.card(),
        **options.model_dump(exclude={"points", "keep", "metric"}),
        "metric": metric,
        "cache": cache.identity(),
        "eval": None if setting.validation is None else setting.validation.hash,
        "test": None if setting.test is None else setting.test.hash,
    }


# ------------------------------------------------------------------------------------------------------------- trials


@dataclass(slots=True)
class _Book:
    """Which trials there are, and what became of them so far."""

    ledger: Ledger
    space: Space
    options: SweepOptions
    metric: str
    say: Callable[[str], None]
    outcomes: list[Outcome] = field(default_factory=list)  # in the order in which they were told
    skipped: int = 0
    search: OptunaSearch | None = None
    numbers: dict[str, int] = field(default_factory=dict)  # of a search's points

    @property
    def total(self) -> int:
        return count_points(self.space, self.options) * len(self.options.seeds)

    @property
    def sign(self) -> int:
        """1 where more of the metric is better."""
        return -1 if self.metric == "loss" else 1

    def count_done(self) -> int:
        """Trials that an earlier call finished."""
        return sum(self.ledger.read(trial) is not None for trial in self._asked_for())

    def known(self) -> list[Outcome]:
        """What this call was told, and of the trials whose turn has not come what an earlier one left."""
        told = {outcome.trial for outcome in self.outcomes}
        earlier = (self.ledger.last(trial) for trial in self._asked_for() if trial.name not in told)
        return [*self.outcomes, *(outcome for outcome in earlier if outcome is not None)]

    def draw(self) -> Iterator[Trial]:
        """What is still to be trained, each as somebody is free to train it."""
        for point in self._ask() if self.options.search == "optuna" else find_points(self.space, self.options):
            for trial in self._trials(point):
                done = self.ledger.read(trial)
                if done is None:
                    yield trial
                else:
                    self.skipped += 1
                    self._note(done)

    def hearing(self, update) -> Callable[[Trial, Outcome], None]:
        def tell(trial: Trial, outcome: Outcome) -> None:
            self.ledger.write(outcome)
            if outcome.status == "failed":
                self.say(f"trial {outcome.trial} failed: {outcome.error}")
            self._note(outcome)
            best = self._ranked()[:1]
            update(1, **({f"best {self.metric}": best[0].value(self.metric)} if best else {}))

        return tell

    def _asked_for(self) -> Iterator[Trial]:
        """All trials; of a search that follows its results those of the points so far."""
        points = self.ledger.read_points() if self.options.search == "optuna" else find_points(self.space, self.options)
        return (trial for point in points for trial in self._trials(point))

    def _trials(self, point: Point) -> list[Trial]:
        return trials_of(self.space, point, self.options.seeds)

    def _ask(self) -> Iterator[Point]:
        self.search = OptunaSearch(self.space.axes, seed=self.options.search_seed, maximize=self.sign > 0)
        points = self.ledger.read_points()
        assert self.options.points is not None
        for number in range(self.options.points):
            known = points[number].changes if number < len(points) else None
            point = Point(f"optuna-{number:03}", self.search.ask(known))
            self.numbers[point.name] = number
            if known is None:
                points.append(point)
                self.ledger.write_points(points)  # before a trial of it has a folder
            yield point

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if self.search is not None:
            own = [other for other in self.outcomes if other.point == outcome.point]
            if len(own) == len(self.options.seeds):
                values = [other.value(self.metric) for other in own]
                whole = [value for value in values if value is not None]
                mean = statistics.mean(whole) if len(whole) == len(values) else None
                self.search.tell(self.numbers[outcome.point], mean)
        if self.options.keep is not None:
            for other in self._ranked()[self.options.keep :]:
                if other.run is not None:
                    self.outcomes[self.outcomes.index(other)] = self.ledger.drop_run(other)

    def _ranked(self) -> list[Outcome]:
        return _best_first([o for o in self.outcomes if o.status == "done"], lambda o: o.value(self.metric), self.sign)


def _best_first(items: list[Any], value: Callable[[Any], float | None], sign: int) -> list[Any]:
    """Sorted by their values; those without one last."""

    def place(item: Any) -> tuple[bool, float]:
        found = value(item)
        return found is None, 0.0 if found is None else -sign * found

    return sorted(items, key=place)


def _group(outcomes: list[Outcome], metric: str) -> list[Group]:
    """The outcomes by point, the best mean of the metric first."""
    groups = []
    for point in dict.fromkeys(outcome.point for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.point == point]
        done = [outcome for outcome in own if outcome.status == "done"]
        names = dict.fromkeys(name for outcome in done for name in outcome.figures)
        values = {name: [value for o in done if (value := o.value(name)) is not None] for name in names}
        mean = {name: statistics.mean(found) for name, found in values.items() if found}
        spread = {name: statistics.stdev(values[name]) if len(values[name]) > 1 else None for name in mean}
        groups.append(Group(point, own[0].changes, len(done), len(own) - len(done), mean.get(metric), mean, spread))
    return _best_first(groups, lambda group: group.value, -1 if metric == "loss" else 1)
