"""Trials over a Ray cluster: a `Runner` whose workers are actors, each with its own reader and its share of a machine.

The sweep's folder and its caches must lie where every machine sees them, under the same path. A worker that dies is
replaced and its trial tried again, which goes on from its last epoch; one that keeps failing is a row with its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from softlabels.config import RayOptions
from softlabels.engines.ray_cluster import Room, connect
from softlabels.engines.ray_pool import Watch, run_items
from softlabels.errors import ConfigError
from softlabels.sweeping.outcomes import Outcome, failed
from softlabels.sweeping.pool import Runner, Tell
from softlabels.sweeping.space import Trial
from softlabels.sweeping.training import Setting, trainer


def run_on_cluster(options: RayOptions) -> Runner:
    """A `Runner` on the workers that `options` ask for. All trials are drawn at once."""

    def run(setting: Any, trials: Iterator[Trial], *, tell: Tell, tick: Callable[[], None] = lambda: None) -> None:
        waiting = list(trials)
        if not waiting:
            return
        watch: Watch[Trial] = Watch(
            lambda trial: f"trial {trial.name}",
            tell,
            changed=lambda workers, retries: tick(),
            given_up=lambda one: tell(one.item, failed(one.item, one.reason)),
        )
        with connect(options) as room:
            plan = open_trainer(setting, room)
            run_items(waiting, plan, room=room, total=len(waiting), depth=1, watch=watch)

    return run


def open_trainer(setting: Setting, room: Room) -> OpenTrainer:
    """How an actor becomes a worker, wherever it starts; without a share of a GPU it trains on the CPU."""
    caches = tuple(cache.resolve() for cache in setting.caches)
    # Ray hides no GPU from an actor that was promised none
    placed = replace(setting, out=setting.out.resolve(), caches=caches, cpu=setting.cpu or not room.gpus)
    return OpenTrainer(placed, threads=max(int(room.cpus), 1))


@dataclass(frozen=True)
class OpenTrainer:
    """What each actor is opened by."""

    setting: Setting
    threads: int

    def __call__(self) -> Trainer:
        import torch

        torch.set_num_threads(self.threads)
        if not self.setting.out.is_dir():
            raise ConfigError(
                f"a worker does not see {self.setting.out}: give --out, and the caches, on a disk that all machines "
                f"share, under the same path"
            )
        return Trainer(self.setting)


class Trainer:
    """A worker: one reader for all of its trials."""

    def __init__(self, setting: Setting) -> None:
        self._stack = ExitStack()
        self._train = self._stack.enter_context(trainer(setting))

    def do(self, item: Trial) -> Outcome:
        return self._train(item)
