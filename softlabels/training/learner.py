"""One student as it learns: set up for what its losses look at, with projections, an optimiser and its schedule.

In: a student, a cache, and a phase with what it was found to be (a `Stretch`). Out: a `Learner`, which `take_step`
moves. The loops are the trainers' own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import Tensor, nn
from transformers import PreTrainedModel, get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

from softlabels.cache import Cache
from softlabels.captures import TeacherRun
from softlabels.captures.live import live_signals, prepare_student
from softlabels.checkpoint import Progress
from softlabels.config import Phase, StudentOptions
from softlabels.errors import ConfigError, StudentError
from softlabels.losses import CONCATENATED, WIDENED
from softlabels.objective import Objective, Term, layer_weights, teacher_width
from softlabels.optimizer import ParameterGroup, build_optimizer, clip_gradients
from softlabels.phases import frozen, parameters_of
from softlabels.projections import Projections, ProjectionSpec
from softlabels.students import student_batch
from softlabels.teaching_rows import Split
from softlabels.training.processes import Processes, find_processes
from softlabels.types import LayerGroup, Signals, TokenBatch


@dataclass(frozen=True, slots=True)
class Stretch:
    """A phase with what it was found to be for this cache and student."""

    phase: Phase
    objective: Objective
    split: Split


@dataclass(frozen=True, slots=True)
class Learner:
    """A student in a phase of its training, and what moves it."""

    run: TeacherRun  # the student, set up for what the losses look at
    objective: Objective  # with its projections, where the student is
    accelerator: Accelerator
    optimizer: Any
    schedule: Any
    steps: int  # of the phase
    processes: Processes  # that train it together

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What learns, projections included."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def start_accelerator(out: Path, *, cpu: bool) -> Accelerator:
    """Where to train, with TensorBoard's log in `out`."""
    accelerator = Accelerator(
        cpu=cpu,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        # a batch is divided among processes, and not multiplied by them: the schedule counts it as one step
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    if (kind := accelerator.distributed_type.value) in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise ConfigError(
            f"a student is whole in each process and is not divided by {kind}: start it with accelerate launch "
            f"--multi_gpu, or --cpu, and --num_processes"
        )
    accelerator.init_trackers("tensorboard")
    return accelerator


def refuse_several(processes: Processes, what: str) -> None:
    """ConfigError for what is trained by one process only."""
    if processes.count > 1:
        raise ConfigError(
            f"{what} is trained in one process, and this is one of {processes.count}: start it without `accelerate "
            f"launch`"
        )


def make_learner(
    student: PreTrainedModel,
    cache: Cache,
    stretch: Stretch,
    options: StudentOptions,
    accelerator: Accelerator,
    processes: Processes | None = None,
) -> Learner:
    """`student` moved to the accelerator's device and ready to take the steps of a phase."""
    processes = processes or find_processes(cpu=accelerator.device.type == "cpu")
    steps = size(stretch.phase.epochs) * steps_an_epoch(stretch)
    student = student.to(accelerator.device)
    probe = cache.tokens(stretch.split.train[:2]).to(accelerator.device)
    run, objective = set_up(student, stretch, cache, probe)
    objective = objective.to(accelerator.device)
    groups = find_groups(student, stretch.phase, objective)
    tools = make_optimizer(student, stretch.phase, options, groups, steps=steps)
    # kept in checkpoints: the student, and what is no part of it
    modules = [student, *objective.modules()]
    for module in modules:  # not wrapped for several processes: gradients are added up in `take_step`
        accelerator.prepare_model(module.to(accelerator.device), evaluation_mode=True)
    processes.start_alike(modules)
    optimizer, schedule = accelerator.prepare(*tools)
    return Learner(run, objective, accelerator, optimizer, schedule, steps, processes)


def make_optimizer(
    student: nn.Module, phase: Phase, options: StudentOptions, groups: list[ParameterGroup], *, steps: int
) -> tuple[Any, Any]:
    """The optimiser of a phase, and its schedule over so many steps: up in the warm-up, then down to 0 or level."""
    optimizer = build_optimizer(
        student, name=options.optimizer, lr=size(phase.lr), weight_decay=size(phase.weight_decay), groups=groups
    )
    warmup = int(steps * size(phase.warmup))
    if phase.decay == "none":
        return optimizer, get_constant_schedule_with_warmup(optimizer, warmup)
    return optimizer, get_linear_schedule_with_warmup(optimizer, warmup, steps)


def take_step(learner: Learner, loss: Tensor, *, clip: float, phase: Phase, state: Progress) -> None:
    """Backward, clipped to a norm of `clip`, and one step; StudentError where a number is not finite any more."""
    refuse_divergence(loss, "the loss", phase, state)
    learner.accelerator.backward(loss)
    learner.processes.add_gradients(learner.parameters)
    norm = clip_gradients(learner.parameters, clip)
    refuse_divergence(norm, "the gradient's norm", phase, state)
    learner.optimizer.step()
    learner.schedule.step()
    learner.optimizer.zero_grad()


def try_out(student: PreTrainedModel, cache: Cache, stretches: list[Stretch]) -> None:
    """Every phase on two rows: what can't be learned is told before the first one, not after the hours it takes."""
    attention, was_training = student.config._attn_implementation, student.training
    for stretch in stretches:
        batch = cache.batch(stretch.split.train[:2], stretch.objective.fields)
        with frozen(student, stretch.phase.freeze), torch.random.fork_rng(devices=[]):
            run, objective = set_up(student.eval(), stretch, cache, batch.tokens)
            find_groups(student, stretch.phase, objective)
            says, hears = forward(run, batch.tokens), objective.hear(batch.teacher)
            losses = [objective(says, hears, progress=end)[0] for end in (0.0, 1.0)]
        if not all(loss.requires_grad for loss in losses):
            raise ConfigError(
                f"phase '{stretch.phase.name}': all that its losses look at is frozen, so nothing learns: freeze less "
                f"than {', '.join(stretch.phase.freeze)}"
            )
        put_back(student, attention)
    student.train(was_training)


def put_back(student: PreTrainedModel, attention: str) -> None:
    """The student's own attention; losses on it may have put another in its place."""
    if student.config._attn_implementation != attention:
        student.set_attn_implementation(attention)


def set_up(student: PreTrainedModel, stretch: Stretch, cache: Cache, probe: TokenBatch) -> tuple[TeacherRun, Objective]:
    """The student ready to give what the losses of a phase look at, and the objective with all that it has beside."""
    objective, tokens = stretch.objective, student_batch(student, probe)
    run = prepare_student(student, objective.looks_at(), tokens, language=objective.language)
    projections = _make_projections(stretch.phase, objective, cache, run, probe)
    balances, parameters = layer_weights(objective.terms), tuple(student.parameters())
    return run, replace(objective, projections=projections, balances=balances, parameters=parameters)


def _make_projections(
    phase: Phase, objective: Objective, cache: Cache, run: TeacherRun, probe: TokenBatch
) -> Projections | None:
    """The projections that the phase asks for, between the widths of the student's hidden states and the teacher's."""
    wanted = [(term, own) for term, own in zip(phase.terms, objective.terms, strict=True) if term.project is not None]
    if not wanted:
        return None
    with torch.no_grad():
        says = forward(run, probe)
    specs = []
    for term, own in wanted:
        assert term.project is not None
        widths = _widths(own, says, cache)
        if term.share_projection and len(set(widths)) > 1:
            raise ConfigError(
                f"phase '{phase.name}', loss '{term.loss}': the layers of its map differ in width, so that one "
                f"projection can't serve all: leave 'share_projection' out"
            )
        specs.append(
            ProjectionSpec(own.name, term.project, widths, shared=term.share_projection, lr_scale=term.project_lr)
        )
    return Projections(specs)


def _widths(term: Term, says: Signals, cache: Cache) -> tuple[tuple[int, int], ...]:
    """What comes into each projection of `term` and goes out: the student's states, or a bucket of the teacher's."""
    widths: list[tuple[int, int]] = []
    for pair in term.pairs:
        group = pair if isinstance(pair, LayerGroup) else LayerGroup((pair.student,), (pair.teacher,))
        ours = [says.hidden(layer).shape[-1] for layer in group.student]
        theirs = [teacher_width(cache, layer) for layer in group.teacher]
        if term.loss in CONCATENATED:
            joined = sum(theirs)
            widths.append((ours[0], joined) if term.loss in WIDENED else (joined, ours[0]))
        else:
            widths += [(width, theirs[0]) for width in ours]
    return tuple(widths)


def find_groups(student: PreTrainedModel, phase: Phase, objective: Objective) -> list[ParameterGroup]:
    """What learns at another rate than the phase's: slow parts of the student, and projections, which are not in it."""
    parameters = dict(student.named_parameters())
    parts = {part: parameters_of(student, part) for part in phase.slow}
    for (one, names), (other, more) in combinations(parts.items(), 2):
        if common := set(names) & set(more):
            raise ConfigError(f"phase '{phase.name}': '{one}' and '{other}' of 'slow' both hold {min(common)}")
    groups = [ParameterGroup([parameters[name] for name in parts[part]], scale) for part, scale in phase.slow.items()]
    projections = objective.projections
    if projections is not None:
        groups += [
            ParameterGroup(projections.of(name), lr_scale=spec.lr_scale) for name, spec in projections.specs.items()
        ]
    return groups


def forward(run: TeacherRun, batch: TokenBatch) -> Signals:
    """What the student says; a language model only at its targets, (T, V)."""
    return live_signals(run, student_batch(run.model, batch))


def refuse_divergence(values: Tensor, what: str, phase: Phase, state: Progress) -> None:
    """StudentError where one of `values` is not finite."""
    if not torch.isfinite(values).all():
        number = values[~torch.isfinite(values)].flatten()[0].item()
        raise StudentError(
            f"{what} became {number} in epoch {state.epoch + 1}, step {state.step}: give a smaller --lr than "
            f"{phase.lr:g}"
        )


def refuse_lost_weights(student: nn.Module, phase: Phase, state: Progress) -> None:
    """After an epoch: the last step's loss was computed before it."""
    weights = torch.stack([parameter.detach().float().sum() for parameter in student.parameters()])
    refuse_divergence(weights, "the student's weights", phase, state)


def is_exhausted(state: Progress, options: StudentOptions) -> bool:
    """Whether `options.patience` has run out."""
    return options.patience is not None and state.epoch - max(state.best_epoch or 0, state.phase_epoch) >= (
        options.patience
    )


def steps_an_epoch(stretch: Stretch) -> int:
    """Batches of the phase's training rows."""
    return -(-len(stretch.split.train) // size(stretch.phase.batch_size))


def size(value: Any) -> Any:
    """A setting of a phase in which nothing is left open."""
    assert value is not None
    return value
