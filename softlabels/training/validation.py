"""How well a student does after an epoch: on a validation corpus, or by its objective on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from softlabels.cache import Cache
from softlabels.cache.batches import CacheBatch
from softlabels.cache.loader import CacheLoader, LoadOptions
from softlabels.checkpoint import Progress
from softlabels.teaching_rows import Split
from softlabels.tokens import batches_by_length, pad_batch
from softlabels.training.learner import Learner, Stretch, forward
from softlabels.training.processes import Processes
from softlabels.types import NO_LABEL


@torch.no_grad()
def validate(cache: Cache, stretch: Stretch, learner: Learner) -> dict[str, float]:
    """Accuracy on the validation corpus; or the objective, as at the end of the phase, on the held-out rows.

    A batch of a language model counts by its targets, also for losses that are means over the masked ones alone.
    """
    objective, split = learner.objective, stretch.split
    learner.run.model.eval()
    if split.corpus:
        if not objective.on_logits:
            return {}  # the student does not answer yet
        return {"accuracy": find_accuracy(cache, split, learner)}
    if not len(split.held_out):
        return {}
    total, weight = 0.0, 0
    for batch in held_out_batches(cache, split, objective.fields, learner.processes):
        moved = batch.to(learner.accelerator.device)
        loss, _ = objective(forward(learner.run, moved.tokens), objective.hear(moved.teacher), progress=1.0)
        count = int((moved.tokens.labels != NO_LABEL).sum()) if objective.language else len(moved.rows)
        total, weight = total + loss.item() * count, weight + count
    sums = learner.processes.totals({"loss": total, "weight": float(weight)})
    return {"loss": sums["loss"] / max(sums["weight"], 1)}


def find_accuracy(cache: Cache, split: Split, learner: Learner) -> float:
    """The share of the validation corpus that the student, in evaluation mode, is right on."""
    right = 0
    lengths = [len(example.input_ids) for example in split.corpus]
    for numbers in learner.processes.some_of(batches_by_length(lengths, batch_size=64)):
        batch = pad_batch([split.corpus[i] for i in numbers], pad_token_id=cache.manifest.teacher.pad_token_id)
        batch = batch.to(learner.accelerator.device)
        right += int((forward(learner.run, batch).logits.argmax(-1) == batch.labels).sum())
    return int(learner.processes.totals({"right": float(right)})["right"]) / len(split.corpus)


def held_out_batches(
    cache: Cache, split: Split, fields: list[str], processes: Processes | None = None
) -> Iterator[CacheBatch]:
    """The held-out rows, or this process's share of them; each batch is good until the next one is asked for."""
    rows = [split.held_out[numbers] for numbers in batches_by_length(cache.lengths[split.held_out], batch_size=64)]
    mine = rows if processes is None else processes.some_of(rows)
    return iter(CacheLoader(cache, mine, fields, LoadOptions(reuse=True)))


def note_epoch(state: Progress, scores: dict[str, float], entry: dict[str, float]) -> None:
    """An epoch is over: its `scores` choose the best one, and `entry` leads its line of the history."""
    state.epoch += 1
    state.history.append({"epoch": state.epoch, **entry, **scores})
    score = scores.get("accuracy", -scores["loss"] if "loss" in scores else float(state.epoch))
    if score > state.best_score:
        state.best_score, state.best_epoch = score, state.epoch
