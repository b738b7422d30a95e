"""A student of a recipe after its training: pruned, trained again from the same cache, written as ONNX, each scored.

A recipe's student lists chains of steps (`compress`), each of which starts from the trained student; what two chains
begin with in common is made once. Every chain is a row of a table, whose first row is the student as it was distilled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from softlabels.cache import open_cache
from softlabels.config import StudentOptions, fingerprint
from softlabels.export import export
from softlabels.prune import prune
from softlabels.recipes import CompressStep
from softlabels.students.exported import import_for_export


@dataclass(frozen=True, slots=True)
class CompressedRow:
    """One chain of steps; figures are means over the student's seeds."""

    student: str
    steps: str
    parameters: int
    nonzero: int
    bytes: int
    accuracy: float
    macro_f1: float
    agreement: float
    ms: float
    times_faster: float  # than the student as it was distilled
    seconds: float  # of the steps


@dataclass(frozen=True, slots=True)
class Distilled:
    """A trained student, and a fingerprint of all that it follows from."""

    run: Path
    key: str
    options: StudentOptions


class Stage(Protocol):
    """Does a stage's work unless it is done."""

    def __call__(
        self, name: str, inputs: Any, work: Callable[[], dict[str, Any]], *, makes: Path | None = None
    ) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What the steps are done with."""

    stage: Stage
    train: Callable[[Path, StudentOptions], dict[str, Any]]
    evaluate: Callable[[Path], dict[str, Any]]
    cache: Path
    test_key: str  # of what is evaluated on


def check_chains(chains: Sequence[Sequence[CompressStep]]) -> None:
    """StudentError where the chains need the extra `export`, and it is not there."""
    if any(step.export for chain in chains for step in chain):
        for name in ("onnx", "onnxruntime"):
            import_for_export(name)


def compress(student: Distilled, chains: Sequence[Sequence[CompressStep]], tools: Tools) -> list[dict[str, Any]]:
    """The evaluation of what each chain makes of `student`, with the `seconds` of its steps."""
    found = []
    for chain in chains:
        now, seconds = student, 0.0
        for step in chain:
            now, took = _take(step, now, tools)
            seconds += took
        name = f"evaluate-{now.run.name}"
        scores = tools.stage(name, [now.key, tools.test_key], lambda run=now.run: tools.evaluate(run))  # type: ignore[misc]
        found.append(scores | {"steps_seconds": seconds})
    return found


def _take(step: CompressStep, before: Distilled, tools: Tools) -> tuple[Distilled, float]:
    """What `step` makes of the student, and the seconds it took."""
    run = before.run.with_name(f"{before.run.name}+{step.say().replace(', ', '-').replace(' ', '-')}")
    options = _options_again(step, before)
    key = fingerprint([before.key, step.model_dump(), options.model_dump()])

    def work() -> dict[str, Any]:
        if step.retrain is None:
            shutil.rmtree(run, ignore_errors=True)  # of other inputs
        if step.prune is not None:
            cache = open_cache(tools.cache) if step.prune.heads is not None else None
            prune(before.run, out=run, options=step.prune, cache=cache)
            return {}
        if step.export is not None:
            export(before.run, out=run, int8=step.export == "int8")
            return {}
        return tools.train(run, options)

    result = tools.stage(run.name, key, work, makes=run / "run.json")
    return Distilled(run, key, before.options), result["seconds"]


def _options_again(step: CompressStep, before: Distilled) -> StudentOptions:
    """As the student was trained before, in its last phase where it had several, but for what the step says."""
    changes: dict[str, Any] = {"options": {}, "prune": None, "from_run": str(before.run)}
    changes["phases"] = before.options.phases[-1:]
    if step.retrain is not None:
        said = step.retrain.model_dump(exclude_none=True)
        changes |= said
        changes["phases"] = [phase.model_copy(update=said) for phase in changes["phases"]]
    return before.options.model_copy(update=changes)


def tabulate(
    student: str,
    chains: Sequence[Sequence[CompressStep]],
    plain: Sequence[dict[str, Any]],
    found: Sequence[Sequence[dict[str, Any]]],
) -> list[CompressedRow]:
    """Rows from evaluations, one a seed: of the distilled student (`plain`), and of what the chains made (`found`)."""
    names = ["distil", *(", ".join(["distil", *(step.say() for step in chain)]) for chain in chains)]
    columns = [plain, *([scores[index] for scores in found] for index in range(len(chains)))]
    usual = mean(scores["latency"]["ms"] for scores in plain)
    rows = []
    for name, scores in zip(names, columns, strict=True):
        ms = mean(item["latency"]["ms"] for item in scores)
        rows.append(
            CompressedRow(
                student=student,
                steps=name,
                parameters=scores[0]["parameters"],
                nonzero=round(mean(item["nonzero"] for item in scores)),
                bytes=round(mean(item["bytes"] for item in scores)),
                accuracy=mean(item["accuracy"] for item in scores),
                macro_f1=mean(item["macro_f1"] for item in scores),
                agreement=mean(item["fidelity"]["agreement"] for item in scores),
                ms=ms,
                times_faster=usual / ms,
                seconds=mean(item.get("steps_seconds", 0.0) for item in scores),
            )
        )
    return rows
