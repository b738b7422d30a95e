"""STAGE 2: a cache comes in, a trained student goes out. The teacher is never loaded.

The loop is written out in `_train_epoch`: forward, losses, backward, step. Around it: a recipe's phases one after the
other, each with losses, an optimiser and a best epoch of its own; a checkpoint after every epoch, early stopping, and
the run folder at the end.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from softlabels.cache import Cache
from softlabels.cache.loader import LoadOptions
from softlabels.checkpoint import Progress, best_weights, drop_checkpoint, restore, save_checkpoint
from softlabels.config import StudentOptions
from softlabels.corpus import Corpus
from softlabels.phases import frozen
from softlabels.progress import progress
from softlabels.pruning import keep_zeros, prune_student
from softlabels.runs import Pruned, Run, merge_pruned, read_record, save_run
from softlabels.students import LINEAR, StudentSpec, build_student
from softlabels.students.linear import fit_linear
from softlabels.training.learner import (
    Learner,
    Stretch,
    forward,
    is_exhausted,
    make_learner,
    put_back,
    refuse_divergence,
    refuse_lost_weights,
    refuse_several,
    size,
    start_accelerator,
    steps_an_epoch,
    take_step,
    try_out,
)
from softlabels.training.preparing import (
    find_stretches,
    fit_to_cache,
    network_of,
    refuse_misfit,
    with_tokens,
)
from softlabels.training.processes import Processes, find_processes, first_talks, others_are_told, shared_run_folder
from softlabels.training.records import Outcome, TrainReport, make_record, make_report, outcome_of
from softlabels.training.validation import note_epoch, validate
from softlabels.types import Signals


def train_student(
    cache: Cache,
    *,
    out: Path,
    options: StudentOptions,
    validation: Corpus | None = None,
    resume: bool = False,
    cpu: bool = False,
) -> TrainReport:
    """Train one student from `cache` into the run folder `out`.

    Rows without a label contribute only the soft terms of a phase's losses; in a phase of hard terms alone only
    labelled rows are used. `validation`, labelled, picks the best epoch by accuracy; without it `options.validation` of
    the rows is held out and the objective on them decides. `resume` goes on after the last whole epoch, to the same
    result. What the cache cannot give is refused before a row of it is read.

    Under `accelerate launch` every process calls this with the same arguments, and `out` is a folder that all of them
    see. They divide each batch: `batch_size` is that of all together, and the result that of one process, to rounding
    (with dropout, whose draws are each process's own, as near as another seed). The first one writes.
    """
    started = time.monotonic()
    out = Path(out)
    processes = find_processes(cpu=cpu)
    spec, source = fit_to_cache(cache, options, out=out, validation=validation)
    stretches = find_stretches(cache, options, spec, validation=validation, source=source)
    configuration = _configuration(cache, options, validation)
    with others_are_told(processes), shared_run_folder(out, configuration, processes, resume=resume):
        if options.student == LINEAR:
            refuse_several(processes, "a linear student")
            outcome = _train_linear(cache, options, stretches[0])
        else:
            used = np.unique(np.concatenate([stretch.split.train for stretch in stretches]))
            spec = with_tokens(spec, cache, used)
            outcome = _train_network(cache, options, stretches, spec, source, processes, out=out, cpu=cpu)
        record = make_record(cache, options, stretches, outcome, source=source)
        processes.wait()  # until all have read the checkpoint, which goes now
        if processes.is_first:
            save_run(out, outcome.student, record, tokenizer=cache.tokenizer())
            drop_checkpoint(out)
        processes.wait()
    return make_report(out, record, seconds=time.monotonic() - started)


# ------------------------------------------------------------------------------------------------------- the loop


def _train_epoch(
    cache: Cache, stretch: Stretch, options: StudentOptions, *, learner: Learner, state: Progress, update
) -> float:
    """One pass over the training rows of a phase; the mean loss."""
    student, objective = learner.run.model, learner.objective
    student.train()
    loader = cache.loader(
        stretch.split.train,
        objective.fields,
        batch_size=size(stretch.phase.batch_size),
        seed=options.seed,
        epoch=state.epoch,
        window=options.window,
        options=LoadOptions(reuse=True),  # a batch is done with when the next one is asked for
    )
    total, mine = 0.0, learner.processes.part(loader)  # rows of each batch; all of them, where one process trains alone
    with closing(iter(mine)) as batches:  # its thread ends here, also when a step fails
        for rows, batch in zip(loader.batches, batches, strict=True):
            batch = batch.to(learner.accelerator.device)
            student_says = forward(learner.run, batch.tokens)
            teacher_says = objective.hear(batch.teacher)
            done = (state.step - state.phase_start) / max(learner.steps - 1, 1)
            with learner.processes.batch(len(rows)):
                loss, parts = objective(student_says, teacher_says, progress=done)
            take_step(learner, loss, clip=options.clip, phase=stretch.phase, state=state)
            figures = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
            figures = learner.processes.totals(figures)
            learner.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=state.step)
            state.step += 1
            total += figures["loss"]
            update(1, loss=figures["loss"])
    refuse_lost_weights(student, stretch.phase, state)
    return total / len(loader)


def _train_network(
    cache: Cache,
    options: StudentOptions,
    stretches: list[Stretch],
    spec: StudentSpec,
    source: Run | None,
    processes: Processes,
    *,
    out: Path,
    cpu: bool,
) -> Outcome:
    """Phase after phase; each starts from the weights of the best epoch of the one before."""
    set_seed(options.seed)
    student = build_student(options.student, spec) if source is None else network_of(source)
    refuse_misfit(student, cache)
    pruned = _prune(student, options, source)
    try_out(student, cache, stretches)
    attention = student.config._attn_implementation
    state = Progress.of(out)
    totals = [size(stretch.phase.epochs) * steps_an_epoch(stretch) for stretch in stretches]
    before = sum(totals[: state.phase])
    done = before + (state.epoch - state.phase_epoch) * steps_an_epoch(stretches[state.phase])
    processes.draw_apart(options.seed)
    with (
        first_talks(processes),
        progress(sum(totals), description=f"train {options.student}", unit="steps", done=done) as update,
    ):
        for number in range(state.phase, len(stretches)):
            if number > state.phase:
                student.load_state_dict(best_weights(out), strict=True)
                state.next_phase()
                set_seed(options.seed + number)
                processes.draw_apart(options.seed + number)
            with frozen(student, stretches[number].phase.freeze):
                accelerator = start_accelerator(out, cpu=cpu)
                learner = make_learner(student, cache, stretches[number], options, accelerator, processes)
                _train_phase(learner, cache, stretches[number], options, state, out=out, update=update)
            put_back(student, attention)
    student.load_state_dict(best_weights(out), strict=True)
    return outcome_of(student, state, pruned)


def _prune(student: PreTrainedModel, options: StudentOptions, source: Run | None) -> Pruned | None:
    """Zeros that were pruned before stay; `options.prune` adds some. What run.json will say of all of them."""
    pruned = None if source is None else source.record.pruned
    if options.prune is not None:
        heads = prune_student(student, options.prune)
        pruned = merge_pruned(pruned, options.prune, heads, "weights" if options.prune.heads is not None else None)
    if pruned is not None:
        keep_zeros(student)
    return pruned


def _train_phase(
    learner: Learner,
    cache: Cache,
    stretch: Stretch,
    options: StudentOptions,
    state: Progress,
    *,
    out: Path,
    update,
) -> None:
    """Epochs with validation, checkpoints and early stopping."""
    restore(out, learner.accelerator, state)
    while state.epoch - state.phase_epoch < size(stretch.phase.epochs) and not is_exhausted(state, options):
        began = time.monotonic()
        loss = _train_epoch(cache, stretch, options, learner=learner, state=state, update=update)
        scores = validate(cache, stretch, learner)
        refuse_divergence(torch.tensor(scores.get("loss", 0.0)), "the validation loss", stretch.phase, state)
        phase = {"phase": state.phase} if options.phases else {}
        note_epoch(state, scores, {**phase, "train/loss": loss})
        learner.accelerator.log(scores, step=state.step)
        state.seconds += time.monotonic() - began
        save_checkpoint(out, learner.run.model, learner.accelerator, state)
    for tracker in learner.accelerator.trackers:  # and not end_training, which would part the processes
        tracker.finish()
    learner.accelerator.free_memory()


# ---------------------------------------------------------------------------------------------------------- checks


def _configuration(cache: Cache, options: StudentOptions, validation: Corpus | None) -> dict[str, Any]:
    """What decides a run's result: two runs with the same one may share a folder."""
    evaluated = None if validation is None else validation.hash
    source = None if options.from_run is None else read_record(options.from_run).files
    return options.model_dump() | {"cache": cache.identity(), "eval": evaluated, "from_files": source}


# --------------------------------------------------------------------------------------------------------- linear


def _train_linear(cache: Cache, options: StudentOptions, stretch: Stretch) -> Outcome:
    """TF-IDF and a linear model on the texts of the cache: on the teacher's logits, or on the labels."""
    began = time.monotonic()
    texts, objective, split = cache.texts(), stretch.objective, stretch.split
    soft = objective.needs_teacher
    student = fit_linear(
        [texts[row][0] for row in split.train],
        num_labels=len(cache.label_names),
        logits=cache.column("logits")[split.train] if soft else None,
        labels=None if soft else cache.labels[split.train],
        pairs=[texts[row][1] for row in split.train],
        options=options.options,
    )
    seconds = time.monotonic() - began
    scores: dict[str, float] = {}
    if split.corpus:
        logits = student.logits([row.text for row in split.corpus], pairs=[row.text_b for row in split.corpus])
        scores["accuracy"] = float(np.mean(logits.argmax(1) == [row.label for row in split.corpus]))
    elif len(split.held_out):
        teacher = cache.signals(split.held_out, objective.fields)
        held_out = [texts[row] for row in split.held_out]
        logits = student.logits([text for text, _ in held_out], pairs=[pair for _, pair in held_out])
        own = Signals({"logits": torch.from_numpy(logits)}, teacher.mask, teacher.labels)
        scores["loss"] = objective(own, teacher, progress=1.0)[0].item()
    return Outcome(student, 1, None, scores, [], seconds)
