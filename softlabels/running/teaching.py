"""The stages of a recipe up to its caches: teachers, augmentation, dumps, and several caches as one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from softlabels.augment import augment
from softlabels.cache import open_cache
from softlabels.cache.combine import combine
from softlabels.config import AugmentOptions, CombineOptions, DumpOptions, fingerprint
from softlabels.corpus import read_corpus
from softlabels.dump import dump
from softlabels.evaluate import score_teacher
from softlabels.recipes import Recipe, TeacherChoice
from softlabels.running.corpora import Corpora
from softlabels.stages import Made, Stages
from softlabels.teacher import TeacherOptions, train_teacher


def _state_of(model: str) -> Any:
    """What shows that the files of a local model have changed; None for a name."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def make_teacher(choice: TeacherChoice, stages: Stages, corpora: Corpora, *, cpu: bool, under: str = "") -> Made:
    """The teacher: as it is, or fine-tuned."""
    if choice.train is None:
        return Made(choice.model, fingerprint([choice.model, _state_of(choice.model)]), 0.0, {})
    key = fingerprint([choice.model_dump(), _state_of(choice.model), corpora.key("train")])
    out = stages.out / under / "teacher"
    options = TeacherOptions(**choice.train.model_dump(exclude={"rows"}), device="cpu" if cpu else None)

    def work() -> dict[str, Any]:
        report = train_teacher(corpora.read("train"), model=choice.model, out=out, options=options)
        return {"seconds": report.seconds}

    found = stages.run(stage_name(under, "teacher"), key, work, makes=out / "config.json")
    return Made(str(out), key, found["seconds"], found)


def make_cache(
    options: DumpOptions,
    stages: Stages,
    name: str,
    corpora: Corpora,
    use: str,
    *,
    teacher: Made,
    cpu: bool,
    under: str = "",
) -> Made:
    """The cache `name` of a corpus ('transfer' or 'test'), in the folder `under` of the run's."""
    out = stages.out / under / name
    key = fingerprint([teacher.key, corpora.key(use), options.model_dump()])

    def work() -> dict[str, Any]:
        report = dump(corpora.read(use), teacher=teacher.path, out=out, options=options, device="cpu" if cpu else None)
        return {"rows": report.rows, "bytes": report.bytes, "truncated": report.truncated}

    found = stages.run(stage_name(under, name), key, work, makes=out / "manifest.json")
    return Made(str(out), key, found["seconds"], found)


@dataclass(frozen=True, slots=True)
class Taught:
    """One of several teachers, and what it said."""

    teacher: Made
    cache: Made
    test: Made


def own_corpora(recipe: Recipe, number: int, corpora: Corpora) -> Corpora:
    """What one of several teachers is trained on: of the recipe's corpus its own rows, or a corpus of its own."""
    choice = recipe.teachers[number]
    if choice.corpus is None and choice.train == recipe.teacher.train:
        return corpora
    return Corpora(choice.corpus or recipe.corpus, choice)


def other_teacher(recipe: Recipe, number: int, stages: Stages, corpora: Corpora, *, cpu: bool) -> Taught:
    """Of several teachers one that is not the first: it says of the same rows what it thinks."""
    entry, under = recipe.teachers[number], f"teacher-{number + 1}"
    choice = TeacherChoice(model=entry.model, train=entry.train)  # a teacher of another weight is the same one
    teacher = make_teacher(choice, stages, own_corpora(recipe, number, corpora), cpu=cpu, under=under)
    dumped = partial(make_cache, recipe.dump, stages, teacher=teacher, cpu=cpu, under=under)
    return Taught(teacher, dumped("cache", corpora, "transfer"), dumped("cache-test", corpora, "test"))


def combine_caches(recipe: Recipe, stages: Stages, taught_by: list[Taught]) -> tuple[Made, Made]:
    """The caches of what all teachers say together: of the transfer rows, and of the test's."""
    options = recipe.combine_options()

    def combined(name: str, parts: list[Made], options: CombineOptions) -> Made:
        out, key = stages.out / name, fingerprint([options.model_dump(), *(part.key for part in parts)])

        def work() -> dict[str, Any]:
            shutil.rmtree(out, ignore_errors=True)  # of other inputs: it is made again in a moment
            report = combine([part.path for part in parts], out=out, options=options)
            return {"rows": report.rows, "bytes": report.bytes}

        found = stages.run(name, key, work, makes=out / "manifest.json")
        return Made(str(out), key, found["seconds"], found)

    blind = options  # a teacher that is chosen by the label of a test row would have looked at the answer
    if options.choose == "label":
        blind = options.model_copy(update={"choose": None})
    return (
        combined("cache", [each.cache for each in taught_by], options),
        combined("cache-test", [each.test for each in taught_by], blind),
    )


def accuracy_of(cache: Path) -> float | None:
    """The teacher's on the rows of its cache; None where they have no labels."""
    scores = score_teacher(open_cache(cache))
    return None if scores is None else scores["accuracy"]


def augment_corpus(options: AugmentOptions, stages: Stages, corpora: Corpora, teacher: Made, *, cpu: bool) -> None:
    """A larger transfer set takes the place of the recipe's."""
    file = stages.out / "augmented.jsonl"

    def work() -> dict[str, Any]:
        file.unlink(missing_ok=True)  # of other inputs
        report = augment(
            corpora.read("transfer"), out=file, options=options, teacher=teacher.path, device="cpu" if cpu else None
        )
        return {"rows": report.rows}

    stages.run("augment", [teacher.key, corpora.key("transfer"), options.model_dump()], work, makes=file)
    corpora.put("transfer", read_corpus(file))


def stage_name(under: str, name: str) -> str:
    """What a stage is called whose outputs lie in the folder `under`."""
    return f"{under}-{name}".replace("/", "-") if under else name
