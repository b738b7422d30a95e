"""STAGE 2, of two students: they learn from one cache together, and from each other.

'global' learns the teacher's output distribution, 'local' what lies below it (hidden states, attention); in fact each
learns by whatever losses it is given. Beside its own, each has the coupling's (Deep Mutual Learning, Zhang et al. 2018,
with a temperature, and an L2 pull beside):

    L_i = own_i + kl · T² · KL(p_j ‖ p_i) + l2 · ‖z_i − z_j‖²

p and z are probabilities at the coupling's temperature and logits; both are means over rows. j is detached: L_i moves i
alone. Both come from one forward pass a batch; the paper computes p_j anew after i has moved. A student without a loss
on logits of its own learns to answer from the other.

On held-out rows each is judged by its own losses: the coupling's have a target that moves, and grow while the other
comes to be sure. One without a loss on logits is judged by the other's on logits as well.

Both see the same batches. Each draws its dropout from random numbers of its own, so that without a coupling it comes
out as if it had been trained alone. Each is saved as it was in its own best epoch, in `out/global` and `out/local`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel

from softlabels.cache import Cache
from softlabels.cache.batches import CacheBatch
from softlabels.cache.loader import LoadOptions
from softlabels.checkpoint import (
    Progress,
    Standing,
    best_weights,
    drop_checkpoint,
    restore,
    run_folder,
    save_checkpoints,
)
from softlabels.config import JOINT_NAMES, Couple, JointOptions, StudentOptions, parse_schedule
from softlabels.corpus import Corpus
from softlabels.errors import ConfigError
from softlabels.losses import LOSSES
from softlabels.losses.soft_targets import kl, mse_logits
from softlabels.objective import Objective
from softlabels.phases import frozen
from softlabels.progress import progress
from softlabels.runs import TOGETHER, save_run, write_together
from softlabels.students import LINEAR, StudentSpec, build_student, check_student
from softlabels.teaching_rows import Split, split_rows, teaching_rows
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
from softlabels.training.preparing import check_start, check_task, find_aims, student_spec, with_tokens
from softlabels.training.processes import find_processes
from softlabels.training.records import TrainReport, make_record, make_report, outcome_of
from softlabels.training.streams import RandomStream
from softlabels.training.validation import find_accuracy, held_out_batches, note_epoch
from softlabels.types import Signals


def train_joint(
    cache: Cache,
    *,
    out: Path,
    options: JointOptions,
    validation: Corpus | None = None,
    resume: bool = False,
    cpu: bool = False,
) -> dict[str, TrainReport]:
    """Train two coupled students from `cache` into the run folders `out/global` and `out/local`.

    Rows, `validation` and `resume` are as for `train_student`; a row teaches both where it teaches one. Each student
    has a best epoch of its own. With `patience` the training stops when it has run out for both. Raises
    ConfigError for students that can't be coupled.
    """
    started = time.monotonic()
    out = Path(out)
    refuse_several(find_processes(cpu=cpu), "a pair of students")
    specs = {name: _check(name, cache, chosen, validation) for name, chosen in options.students.items()}
    stretches = _find_stretches(cache, options, specs, validation)
    _refuse_mute(stretches, options.couple)
    configuration = options.model_dump() | {
        "cache": cache.identity(),
        "eval": None if validation is None else validation.hash,
    }
    reports = {}
    with run_folder(out, configuration, resume=resume, receipt=TOGETHER):
        members = _train(cache, options, stretches, specs, out=out, cpu=cpu)
        for name, member in members.items():
            outcome = outcome_of(member.student, member.state)
            together = {"as": name, "with": [_PEERS[name]], "couple": options.couple.model_dump()}
            record = make_record(cache, options.students[name], [stretches[name]], outcome, together=together)
            save_run(out / name, outcome.student, record, tokenizer=cache.tokenizer())
            reports[name] = make_report(out / name, record, seconds=time.monotonic() - started)
        write_together(out, list(reports))
        drop_checkpoint(out)
    return reports


# ---------------------------------------------------------------------------------------------------------- coupling


def couple(own: Tensor, mine: Signals, other: Signals, how: Couple, *, progress: float) -> Tensor:
    """`own`, a student's loss, with what draws the student towards the other, whose logits get no gradient.

    `mine` and `other` are what the two say of the same rows, `progress` (0 to 1) how far the training is. A term that
    weighs nothing at the moment is not computed.
    """
    peer = replace(other, fields={"logits": other.logits.detach()})
    weights = {name: parse_schedule(getattr(how, name), what="weight").at(progress) for name in ("kl", "l2")}
    if weights["kl"]:
        temperature = parse_schedule(how.temperature, what="temperature").at(progress)
        own = own + weights["kl"] * kl(mine, peer, temperature=temperature)
    if weights["l2"]:
        own = own + weights["l2"] * mse_logits(mine, peer)
    return own


# ---------------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True, slots=True)
class _Member:
    """One of the two, and everything of its own."""

    student: PreTrainedModel
    stretch: Stretch
    learner: Learner
    state: Progress
    stream: RandomStream
    clip: float

    def says(self, batch: CacheBatch) -> Signals:
        """What the student says of `batch`, its dropout from its own random numbers."""
        with self.stream.flowing():
            return forward(self.learner.run, batch.tokens)


_PEERS = dict(zip(JOINT_NAMES, reversed(JOINT_NAMES), strict=True))


def _train_epoch(cache: Cache, options: JointOptions, members: Mapping[str, _Member], update) -> dict[str, float]:
    """One pass over the training rows, which both see; each student's mean loss."""
    first = members[JOINT_NAMES[0]]
    for member in members.values():
        member.student.train()
    loader = cache.loader(
        first.stretch.split.train,
        _fields(members),
        batch_size=size(first.stretch.phase.batch_size),
        seed=options.students[JOINT_NAMES[0]].seed,
        epoch=first.state.epoch,
        window=options.students[JOINT_NAMES[0]].window,
        options=LoadOptions(reuse=True),
    )
    totals = dict.fromkeys(members, 0.0)
    with closing(iter(loader)) as batches:
        for batch in batches:
            done = first.state.step / max(first.learner.steps - 1, 1)
            losses = _losses(members, batch.to(first.learner.accelerator.device), options.couple, progress=done)
            for name, member in members.items():
                take_step(
                    member.learner, losses[name], clip=member.clip, phase=member.stretch.phase, state=member.state
                )
                member.state.step += 1
                totals[name] += losses[name].item()
            figures = {f"train/{name}/loss": loss.item() for name, loss in losses.items()}
            first.learner.accelerator.log(figures, step=first.state.step)
            update(1, loss=sum(figures.values()))
    for member in members.values():
        refuse_lost_weights(member.student, member.stretch.phase, member.state)
    return {name: total / len(loader) for name, total in totals.items()}


def _losses(members: Mapping[str, _Member], batch: CacheBatch, how: Couple, *, progress: float) -> dict[str, Tensor]:
    """Each student's own loss and what the other draws it to, from one forward pass of each."""
    says = {name: member.says(batch) for name, member in members.items()}
    losses = {}
    for name, member in members.items():
        own, _ = member.learner.objective(says[name], batch.teacher, progress=progress)
        losses[name] = couple(own, says[name], says[_PEERS[name]], how, progress=progress)
    return losses


@torch.no_grad()
def _validate(cache: Cache, members: Mapping[str, _Member]) -> dict[str, dict[str, float]]:
    """Each student's accuracy on the validation corpus; or on held-out rows the losses that judge it, as at the end."""
    for member in members.values():
        member.student.eval()
    split = next(iter(members.values())).stretch.split
    if split.corpus:
        return {name: {"accuracy": find_accuracy(cache, split, member.learner)} for name, member in members.items()}
    if not len(split.held_out):
        return {name: {} for name in members}
    judges = {name: _judge(member, members[_PEERS[name]]) for name, member in members.items()}
    totals = dict.fromkeys(members, 0.0)
    for batch in held_out_batches(cache, split, _fields(members)):
        moved = batch.to(next(iter(members.values())).learner.accelerator.device)
        for name, member in members.items():
            loss, _ = judges[name](member.says(moved), moved.teacher, progress=1.0)
            totals[name] += loss.item() * len(moved.rows)
    return {name: {"loss": total / len(split.held_out)} for name, total in totals.items()}


def _judge(member: _Member, peer: _Member) -> Objective:
    """What tells how well a student does: its own losses and, where none of them is on logits, the other's that are."""
    own = member.learner.objective
    if own.on_logits:
        return own
    return replace(own, terms=(*own.terms, *(term for term in peer.learner.objective.terms if term.loss in LOSSES)))


def _fields(members: Mapping[str, _Member]) -> list[str]:
    return sorted({field for member in members.values() for field in member.learner.objective.fields})


def _train(
    cache: Cache,
    options: JointOptions,
    stretches: Mapping[str, Stretch],
    specs: Mapping[str, StudentSpec],
    *,
    out: Path,
    cpu: bool,
) -> dict[str, _Member]:
    """Both students as they were in their best epochs, and how their training went."""
    accelerator = start_accelerator(out, cpu=cpu)
    with ExitStack() as held:
        members = {
            name: _make_member(
                options.students[name], cache, stretches[name], specs[name], accelerator, Progress.of(out, name), held
            )
            for name in JOINT_NAMES
        }
        first = members[JOINT_NAMES[0]]
        restore(out, accelerator, first.state)
        an_epoch = steps_an_epoch(first.stretch)
        done = first.state.epoch * an_epoch
        with progress(first.learner.steps, description="train two students", unit="steps", done=done) as update:
            while first.state.epoch < size(first.stretch.phase.epochs) and not _are_exhausted(members, options):
                began = time.monotonic()
                losses = _train_epoch(cache, options, members, update)
                scores = _validate(cache, members)
                for name, member in members.items():
                    worth = torch.tensor(scores[name].get("loss", 0.0))
                    refuse_divergence(worth, "the validation loss", member.stretch.phase, member.state)
                    note_epoch(member.state, scores[name], {"train/loss": losses[name]})
                    member.state.seconds += time.monotonic() - began
                figures = {f"{name}/{key}": value for name, found in scores.items() for key, value in found.items()}
                accelerator.log(figures, step=first.state.step)
                save_checkpoints(
                    out, {name: Standing(member.student, member.state) for name, member in members.items()}, accelerator
                )
        accelerator.end_training()
        accelerator.free_memory()
    for name, member in members.items():
        member.student.load_state_dict(best_weights(out, name), strict=True)
    return members


def _make_member(
    options: StudentOptions,
    cache: Cache,
    stretch: Stretch,
    spec: StudentSpec,
    accelerator: Accelerator,
    state: Progress,
    held: ExitStack,
) -> _Member:
    """A new student, set up as it would be alone; what is frozen learns again when `held` closes."""
    stream = RandomStream()
    with stream.flowing():
        set_seed(options.seed)
        student = build_student(options.student, with_tokens(spec, cache, stretch.split.train))
        try_out(student, cache, [stretch])
        held.callback(put_back, student, student.config._attn_implementation)
        held.enter_context(frozen(student, stretch.phase.freeze))
        learner = make_learner(student, cache, stretch, options, accelerator)
    accelerator.register_for_checkpointing(stream)
    return _Member(student, stretch, learner, state, stream, options.clip)


def _are_exhausted(members: Mapping[str, _Member], options: JointOptions) -> bool:
    return all(is_exhausted(member.state, options.students[name]) for name, member in members.items())


# ---------------------------------------------------------------------------------------------------------- checks


def _check(name: str, cache: Cache, options: StudentOptions, validation: Corpus | None) -> StudentSpec:
    """What the cache asks of a student; ConfigError for one that can't be coupled."""
    if check_student(options.student) == LINEAR:
        raise ConfigError(
            f"student '{name}' is linear, which is fitted in one go: take students that are trained by gradients"
        )
    check_start(options)
    task = cache.manifest.teacher.task
    if task != "sequence-classification":
        raise ConfigError(
            f"two students are coupled by their classes, and the teacher of cache {cache.path} is for {task}: train "
            f"each by itself with softlabels train-student"
        )
    check_task(cache, options, validation)
    return student_spec(cache, options)


def _find_stretches(
    cache: Cache, options: JointOptions, specs: Mapping[str, StudentSpec], validation: Corpus | None
) -> dict[str, Stretch]:
    """The one phase of each student; both see the rows that teach either."""
    aims = {name: find_aims(cache, options.students[name], specs[name])[0] for name in JOINT_NAMES}
    first = options.students[JOINT_NAMES[0]]
    rows = [teaching_rows(cache, objective, first=first.rows) for _, objective in aims.values()]
    split: Split = split_rows(
        cache,
        [np.unique(np.concatenate(rows))],
        validation=validation,
        share=first.validation,
        seed=first.seed,
    )[0]
    return {name: Stretch(phase, objective, split) for name, (phase, objective) in aims.items()}


def _refuse_mute(stretches: Mapping[str, Stretch], how: Couple) -> None:
    """ConfigError where a student would never learn to answer."""
    mute = [name for name, stretch in stretches.items() if not stretch.objective.on_logits]
    if len(mute) == len(stretches):
        raise ConfigError("neither student has a loss on logits, so none learns to answer: give one of them kl or ce")
    if mute and not how.teaches:
        raise ConfigError(
            f"student '{mute[0]}' has no loss on logits, and nothing that couples it to the other in the end: its "
            f"head would stay as it is. Give it kl or ce, or couple.kl a weight"
        )
