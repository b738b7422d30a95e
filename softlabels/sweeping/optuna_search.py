"""A search that follows its results: Optuna's tree-structured Parzen estimator over the axes of a sweep.

Its number i follows from the points before it that are told, and from `seed` + i, so that a sweep that went on after a
kill asks for the same as one that was never stopped (with one job: with more, from which were told by then).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softlabels.errors import ConfigError
from softlabels.sweeping.space import Axis, Changes, Choice


class OptunaSearch:
    """Asks for one point after the other, and is told what each was worth (None: it failed)."""

    def __init__(self, axes: Sequence[Axis], *, seed: int, maximize: bool) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError("--optuna needs optuna: pip install 'softlabels[sweep]', or give --random") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self.axes, self.seed = axes, seed
        self.study = optuna.create_study(direction="maximize" if maximize else "minimize")
        self.asked: list[Any] = []

    def ask(self, known: Changes | None = None) -> Changes:
        """The next point; where it was asked for before, by a sweep that goes on now, that one."""
        number = len(self.asked)
        self.study.sampler = self._optuna.samplers.TPESampler(seed=self.seed + number)
        if known is not None:
            self.study.enqueue_trial({axis.key: self._inside(axis, known[axis.key]) for axis in self.axes})
        self.asked.append(self.study.ask())
        changes = {axis.key: self._suggest(self.asked[-1], axis) for axis in self.axes}
        return changes if known is None else known

    def tell(self, number: int, value: float | None) -> None:
        """Point `number` was worth so much."""
        state = self._optuna.trial.TrialState
        if value is None:
            self.study.tell(self.asked[number], state=state.FAIL)
        else:
            self.study.tell(self.asked[number], value)

    def _suggest(self, trial: Any, axis: Axis) -> Any:
        if isinstance(axis, Choice):  # by their places: Optuna takes numbers and words only
            return axis.values[trial.suggest_categorical(axis.key, list(range(len(axis.values))))]
        if axis.whole:
            return trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log)
        # not rounded: what a sweep that goes on tells Optuna again must be what it chose
        return trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)

    def _inside(self, axis: Axis, value: Any) -> Any:
        return list(axis.values).index(value) if isinstance(axis, Choice) else value
