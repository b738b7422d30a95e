"""A run comes in, the same student with zeros in its weights goes out, as a run of its own.

`train_student` with `from_run` trains it further and keeps the zeros; `softlabels export` takes zeroed heads out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from softlabels.cache import Cache
from softlabels.config import PruneOptions
from softlabels.errors import StudentError
from softlabels.heads import HeadScores
from softlabels.pruning import count_nonzero, prune_student
from softlabels.runs import Run, load_run, merge_pruned, refuse_occupied, save_run
from softlabels.students import student_inputs
from softlabels.training.preparing import network_of, refuse_foreign

IMPORTANCE_ROWS = 1024  # of the cache, at most, from which heads are weighed
_BATCH = 32


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a pruning did."""

    run: Path
    parameters: int
    nonzero: int
    zeros: float  # the share of the parameters that is zero now
    heads: list[str]  # that are zero now: LAYER.HEAD, numbered from 1
    heads_by: str | None  # what they were chosen by: 'gradients' or 'weights'


def prune(run: Path, *, out: Path, options: PruneOptions, cache: Cache | None = None) -> PruneReport:
    """Prune the student of the run folder `run` into the run folder `out`.

    Heads are chosen by what they do to the distance to the teacher (soft cross-entropy at T = 1) on rows of `cache`, or
    by their weights without one. StudentError or CacheError where nothing would be left, nothing would change, or the
    student has no heads.
    """
    out, before = Path(out), load_run(run)
    if out.resolve() == Path(run).resolve():
        raise StudentError(f"--out {out} is the run that is pruned: give another folder")
    refuse_occupied(out)
    student = before.student
    if not isinstance(student, torch.nn.Module):
        raise StudentError(
            f"{run} is a {before.kind} student, and only torch students are pruned"
            + (": prune the run that it was exported from" if before.record.exported else "")
        )
    importance = None
    if options.heads is not None and cache is not None:
        importance = weigh_by_gradients(before, cache)
    heads = prune_student(student, options, importance=importance)
    by = None if options.heads is None else "weights" if importance is None else "gradients"
    card = merge_pruned(before.record.pruned, options, heads, by)
    record = before.record.model_copy(update={"pruned": card})
    save_run(out, student, record, tokenizer=before.tokenizer)
    nonzero = count_nonzero(student)
    return PruneReport(out, before.parameters, nonzero, 1 - nonzero / before.parameters, card.heads, card.heads_by)


def weigh_by_gradients(run: Run, cache: Cache, *, rows: int = IMPORTANCE_ROWS) -> torch.Tensor:
    """(layers, heads): what the student's heads do on the first `rows` of `cache`: see `softlabels.heads`."""
    student = network_of(run)
    refuse_foreign(run, student, cache)
    cache.require(["logits"], why="weighing heads")
    scores = HeadScores(student)
    numbers = torch.arange(min(rows, cache.rows)).numpy()
    with scores.watch(), torch.enable_grad():
        for start in range(0, len(numbers), _BATCH):
            batch = cache.batch(numbers[start : start + _BATCH], ["logits"])
            says = student(**student_inputs(student, batch.tokens)).logits.log_softmax(-1)  # (B, C)
            loss = -(batch.teacher.logits.softmax(-1) * says).sum()
            torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    return scores.importance()
