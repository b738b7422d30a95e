"""Knowledge distillation from precomputed teachers: run the teacher once, train students from its cache.

    import softlabels

    corpus = softlabels.read_corpus("reviews.csv")
    softlabels.dump(corpus, teacher="my-teacher", out="my-cache")
    cache = softlabels.open_cache("my-cache")
    softlabels.train_student(cache, out="runs/small", options=softlabels.StudentOptions(student="bilstm"))

Each name is imported when it is first used, so `import softlabels` costs nothing. Where a module and its main
function share a name (`dump`, `evaluate`, `sweep`), the module can be called: `softlabels.dump(...)` runs
`softlabels.dump.dump(...)`, whatever was imported before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect

__version__ = "0.1.0"

# public name -> the module that holds it
_PUBLIC = {
    "SoftlabelsError": "softlabels.errors",
    "read_recipe": "softlabels.recipes",
    "AugmentOptions": "softlabels.config",
    "DumpOptions": "softlabels.config",
    "StudentOptions": "softlabels.config",
    "JointOptions": "softlabels.config",
    "MultiTaskOptions": "softlabels.config",
    "read_corpus": "softlabels.corpus",
    "load_teacher": "softlabels.teacher",
    "train_teacher": "softlabels.teacher",
    "TeacherOptions": "softlabels.teacher",
    "read_column": "softlabels.corpus",
    "augment": "softlabels.augment",
    "dump": "softlabels.dump",
    "import_logits": "softlabels.imports",
    "ImportOptions": "softlabels.config",
    "open_cache": "softlabels.cache",
    "combine": "softlabels.cache.combine",
    "concatenate": "softlabels.cache.concatenate",
    "open_combined": "softlabels.cache.combined",
    "push": "softlabels.cache.push",
    "pull": "softlabels.cache.pull",
    "CombineOptions": "softlabels.config",
    "train_student": "softlabels.train",
    "train_joint": "softlabels.joint",
    "train_multitask": "softlabels.multitask",
    "sweep": "softlabels.sweep",
    "SweepOptions": "softlabels.sweeping.space",
    "load_run": "softlabels.runs",
    "evaluate": "softlabels.evaluate",
    "EvaluateOptions": "softlabels.config",
    "predict": "softlabels.predict",
    "export": "softlabels.export",
    "report": "softlabels.report",
    "prune": "softlabels.prune",
    "PruneOptions": "softlabels.config",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from softlabels.augment import augment as augment
    from softlabels.cache import open_cache as open_cache
    from softlabels.cache.combine import combine as combine
    from softlabels.cache.combined import open_combined as open_combined
    from softlabels.cache.concatenate import concatenate as concatenate
    from softlabels.cache.pull import pull as pull
    from softlabels.cache.push import push as push
    from softlabels.config import AugmentOptions as AugmentOptions
    from softlabels.config import CombineOptions as CombineOptions
    from softlabels.config import DumpOptions as DumpOptions
    from softlabels.config import EvaluateOptions as EvaluateOptions
    from softlabels.config import ImportOptions as ImportOptions
    from softlabels.config import JointOptions as JointOptions
    from softlabels.config import MultiTaskOptions as MultiTaskOptions
    from softlabels.config import PruneOptions as PruneOptions
    from softlabels.config import StudentOptions as StudentOptions
    from softlabels.corpus import read_column as read_column
    from softlabels.corpus import read_corpus as read_corpus
    from softlabels.dump import dump as dump
    from softlabels.errors import SoftlabelsError as SoftlabelsError
    from softlabels.evaluate import evaluate as evaluate
    from softlabels.export import export as export
    from softlabels.imports import import_logits as import_logits
    from softlabels.joint import train_joint as train_joint
    from softlabels.multitask import train_multitask as train_multitask
    from softlabels.predict import predict as predict
    from softlabels.prune import prune as prune
    from softlabels.recipes import read_recipe as read_recipe
    from softlabels.report import report as report
    from softlabels.runs import load_run as load_run
    from softlabels.sweep import sweep as sweep
    from softlabels.sweeping.space import SweepOptions as SweepOptions
    from softlabels.teacher import TeacherOptions as TeacherOptions
    from softlabels.teacher import load_teacher as load_teacher
    from softlabels.teacher import train_teacher as train_teacher
    from softlabels.train import train_student as train_student


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'softlabels' has no attribute '{name}'")
    module = import_module(_PUBLIC[name])
    if module.__name__ == f"{__name__}.{name}":
        return module
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


class _CallableModule(ModuleType):
    """A module that runs its function of the same name when it is called."""

    def _main(self) -> Callable[..., Any]:
        return vars(self)[self.__name__.rpartition(".")[2]]

    @property
    def __signature__(self) -> inspect.Signature:
        import inspect

        return inspect.signature(self._main())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._main()(*args, **kwargs)


class _Package(ModuleType):
    """This package. The import system binds a module to its package last: the moment to make it callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _PUBLIC.get(name) == value.__name__:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
