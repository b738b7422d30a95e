"""STAGE 2: a cache comes in, a trained student goes out. The teacher is never loaded.

The loop is written out in `_train_epoch`: forward, losses, backward, step. Around it: a recipe's phases one after the
other, each with losses, an optimiser and a best epoch of its own; a checkpoint after every epoch, early stopping, and
the run folder at the end.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from torch import nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from softlabels.cache import Cache
from softlabels.cache.loader import CacheLoader, LoadOptions
from softlabels.captures import TeacherRun
from softlabels.captures.live import live_signals, prepare_student
from softlabels.checkpoint import Progress, best_weights, drop_checkpoint, restore, run_folder, save_checkpoint
from softlabels.config import ASSISTANT, BASE, PRETRAINED, TEACHER, Phase, StudentOptions, package_versions
from softlabels.corpus import Corpus
from softlabels.errors import ConfigError, StudentError
from softlabels.losses import CONCATENATED
from softlabels.objective import Objective, Term, build_objective, layer_weights, teacher_layers, teacher_width
from softlabels.optimizer import ParameterGroup, build_optimizer, clip_gradients
from softlabels.phases import frozen, parameters_of, write_out
from softlabels.progress import progress
from softlabels.projections import Projections, ProjectionSpec
from softlabels.pruning import keep_zeros, prune_student
from softlabels.runs import Pruned, Run, RunRecord, load_run, merge_pruned, read_record, save_run
from softlabels.students import LINEAR, StudentSpec, build_student, check_student, count_layers, student_batch
from softlabels.students.linear import LinearStudent, fit_linear
from softlabels.teaching_rows import Split, labelled_rows, split_rows, teaching_rows
from softlabels.tokens import batches_by_length, longest_input, pad_batch
from softlabels.types import LANGUAGE_MODELS, NO_LABEL, LayerGroup, Signals, TokenBatch


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training did."""

    run: Path
    rows: int
    labelled: int
    epochs: int
    best_epoch: int | None
    validation: dict[str, float]
    train_seconds: float  # in the training itself, resumed parts included
    seconds: float  # of this call


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A phase with what it was found to be for this cache and student."""

    phase: Phase
    objective: Objective
    split: Split


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
    """
    started = time.monotonic()
    out = Path(out)
    check_options(options)
    _check_start(options)
    task = cache.manifest.teacher.task
    _check_task(cache, options, validation)
    spec = _student_spec(cache, options)
    source = _read_source(options, cache, out)
    layers = _layers(options, spec, source)
    phases = write_out(options.all_phases(), student_layers=layers, teacher_layers=teacher_layers(cache))
    objectives = [build_objective(phase, cache, student_layers=layers) for phase in phases]
    splits = split_rows(
        cache,
        [teaching_rows(cache, objective, first=options.rows) for objective in objectives],
        validation=validation,
        share=options.validation,
        seed=options.seed,
    )
    stretches = [_Stretch(*parts) for parts in zip(phases, objectives, splits, strict=True)]
    with run_folder(out, _configuration(cache, options, validation), resume=resume):
        if options.student == LINEAR:
            outcome = _train_linear(cache, options, stretches[0])
        else:
            used = np.unique(np.concatenate([split.train for split in splits]))
            spec = replace(spec, used_ids=cache.used_ids(used), sequences=lambda: cache.sequences(used))
            outcome = _train_network(cache, options, stretches, spec, source, out=out, cpu=cpu)
        last = phases[-1]
        record = RunRecord(
            student=options.student,
            options=options.options if source is None else source.record.options,
            label_names=cache.label_names,
            task=task,
            max_length=cache.manifest.dump.max_length,
            losses={term.name: term.weight.end for term in objectives[-1].terms},
            temperature=last.temperature,
            phases=[phase.model_dump(exclude_defaults=True) for phase in options.phases],
            seed=options.seed,
            epochs_run=outcome.epochs,
            best_epoch=outcome.best_epoch,
            train_seconds=outcome.seconds,
            train_rows=max(len(split.train) for split in splits),
            labelled_rows=max(int(labelled_rows(cache)[split.train].sum()) for split in splits),
            validation=outcome.validation,
            history=outcome.history,
            cache=_cache_card(cache),
            versions=package_versions("torch", "transformers", "scikit-learn"),
            pruned=outcome.pruned,
        )
        save_run(out, outcome.student, record, tokenizer=cache.tokenizer())
        drop_checkpoint(out)
    return TrainReport(
        run=out,
        rows=record.train_rows,
        labelled=record.labelled_rows,
        epochs=record.epochs_run,
        best_epoch=record.best_epoch,
        validation=record.validation,
        train_seconds=record.train_seconds,
        seconds=time.monotonic() - started,
    )


def check_options(options: StudentOptions) -> None:
    """StudentError or ConfigError for what no cache could make possible."""
    if options.from_run is not None and options.options:
        raise ConfigError(
            f"a student that is trained further is what it was: leave out the options {', '.join(options.options)}"
        )
    if options.prune is not None and options.prune.heads is not None and options.student != "transformer":
        raise StudentError(
            f"student '{options.student}' has no attention heads that can be pruned: give a magnitude instead"
        )
    if check_student(options.student) != LINEAR:
        return
    if options.prune is not None:
        raise ConfigError("the linear student is fitted in one go, and its weights can't be pruned: leave 'prune' out")
    if options.phases:
        raise ConfigError("the linear student is fitted in one go: give it 'losses' and no 'phases'")
    if options.loss_names() not in ({"mse_logits"}, {"ce"}):
        raise ConfigError(
            f"the linear student is a regression on the teacher's logits (--loss mse_logits) or on the labels "
            f"(--loss ce), one of them alone; not {', '.join(sorted(options.loss_names()))}"
        )


def _check_start(options: StudentOptions) -> None:
    """ConfigError for a word that only a recipe's run can make a folder of."""
    start = options.options.get("init_from")
    if start in (BASE, TEACHER, PRETRAINED, ASSISTANT) and not Path(start).is_dir():
        raise ConfigError(
            f"init_from: '{start}' is a model that softlabels run knows, and a training by itself does not: give its "
            f"folder, --option init_from=DIR"
        )


# ------------------------------------------------------------------------------------------------------- the loop


def _train_epoch(
    cache: Cache, stretch: _Stretch, options: StudentOptions, *, tools: _Tools, state: Progress, update
) -> float:
    """One pass over the training rows of a phase; the mean loss."""
    student, objective = tools.run.model, tools.objective
    student.train()
    loader = cache.loader(
        stretch.split.train,
        objective.fields,
        batch_size=_size(stretch.phase.batch_size),
        seed=options.seed,
        epoch=state.epoch,
        options=LoadOptions(reuse=True),  # a batch is done with when the next one is asked for
    )
    total = 0.0
    with closing(iter(loader)) as batches:  # its thread ends here, also when a step fails
        for batch in batches:
            batch = batch.to(tools.accelerator.device)
            student_says = _forward(tools.run, batch.tokens)
            teacher_says = objective.hear(batch.teacher)
            done = (state.step - state.phase_start) / max(tools.steps - 1, 1)
            loss, parts = objective(student_says, teacher_says, progress=done)
            _refuse_divergence(loss, "the loss", stretch.phase, state)
            tools.accelerator.backward(loss)
            norm = clip_gradients(tools.parameters, options.clip)
            _refuse_divergence(norm, "the gradient's norm", stretch.phase, state)
            tools.optimizer.step()
            tools.schedule.step()
            tools.optimizer.zero_grad()
            figures = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
            tools.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=state.step)
            state.step += 1
            total += figures["loss"]
            update(1, loss=figures["loss"])
    weights = torch.stack([parameter.detach().float().sum() for parameter in student.parameters()])
    _refuse_divergence(weights, "the student's weights", stretch.phase, state)  # the last step's loss came before it
    return total / len(loader)


def _refuse_divergence(values: torch.Tensor, what: str, phase: Phase, state: Progress) -> None:
    if not torch.isfinite(values).all():
        number = values[~torch.isfinite(values)].flatten()[0].item()
        raise StudentError(
            f"{what} became {number} in epoch {state.epoch + 1}, step {state.step}: give a smaller --lr than "
            f"{phase.lr:g}"
        )


def _forward(run: TeacherRun, batch: TokenBatch) -> Signals:
    """What the student says; a language model only at its targets, (T, V)."""
    return live_signals(run, student_batch(run.model, batch))


@dataclass(frozen=True, slots=True)
class _Tools:
    run: TeacherRun  # the student, set up for what the losses look at
    objective: Objective  # with its projections, where the student is
    parameters: list[nn.Parameter]  # what learns, projections included
    accelerator: Accelerator
    optimizer: Any
    schedule: Any
    steps: int  # of the phase


@dataclass(frozen=True, slots=True)
class _Outcome:
    student: PreTrainedModel | LinearStudent
    epochs: int
    best_epoch: int | None
    validation: dict[str, float]
    history: list[dict[str, float]]
    seconds: float
    pruned: Pruned | None = None


def _train_network(
    cache: Cache,
    options: StudentOptions,
    stretches: list[_Stretch],
    spec: StudentSpec,
    source: Run | None,
    *,
    out: Path,
    cpu: bool,
) -> _Outcome:
    """Phase after phase; each starts from the weights of the best epoch of the one before."""
    set_seed(options.seed)
    student = build_student(options.student, spec) if source is None else _network_of(source)
    _refuse_misfit(student, cache)
    pruned = _prune(student, options, source)
    _try_out(student, cache, stretches)
    attention = student.config._attn_implementation
    state = Progress.of(out)
    totals = [_size(stretch.phase.epochs) * _steps_an_epoch(stretch) for stretch in stretches]
    before = sum(totals[: state.phase])
    done = before + (state.epoch - state.phase_epoch) * _steps_an_epoch(stretches[state.phase])
    with progress(sum(totals), description=f"train {options.student}", unit="steps", done=done) as update:
        for number in range(state.phase, len(stretches)):
            if number > state.phase:
                student.load_state_dict(best_weights(out), strict=True)
                state.next_phase()
                set_seed(options.seed + number)
            with frozen(student, stretches[number].phase.freeze):
                _train_phase(student, cache, stretches[number], options, state, out=out, cpu=cpu, update=update)
            _put_back(student, attention)
    student.load_state_dict(best_weights(out), strict=True)
    student.eval()
    best = next(entry for entry in state.history if entry["epoch"] == state.best_epoch)
    validation = {name: value for name, value in best.items() if name not in ("epoch", "phase", "train/loss")}
    return _Outcome(student.cpu(), state.epoch, state.best_epoch, validation, state.history, state.seconds, pruned)


def _prune(student: PreTrainedModel, options: StudentOptions, source: Run | None) -> Pruned | None:
    """Zeros that were pruned before stay; `options.prune` adds some. What run.json will say of all of them."""
    pruned = None if source is None else source.record.pruned
    if options.prune is not None:
        heads = prune_student(student, options.prune)
        pruned = merge_pruned(pruned, options.prune, heads, "weights" if options.prune.heads is not None else None)
    if pruned is not None:
        keep_zeros(student)
    return pruned


def _try_out(student: PreTrainedModel, cache: Cache, stretches: list[_Stretch]) -> None:
    """Every phase on two rows: what can't be learned is told before the first one, not after the hours it takes."""
    attention, was_training = student.config._attn_implementation, student.training
    for stretch in stretches:
        batch = cache.batch(stretch.split.train[:2], stretch.objective.fields)
        with frozen(student, stretch.phase.freeze), torch.random.fork_rng(devices=[]):
            run, objective = _set_up(student.eval(), stretch, cache, batch.tokens)
            _groups(student, stretch.phase, objective)
            says, hears = _forward(run, batch.tokens), objective.hear(batch.teacher)
            losses = [objective(says, hears, progress=end)[0] for end in (0.0, 1.0)]
        if not all(loss.requires_grad for loss in losses):
            raise ConfigError(
                f"phase '{stretch.phase.name}': all that its losses look at is frozen, so nothing learns: freeze less "
                f"than {', '.join(stretch.phase.freeze)}"
            )
        _put_back(student, attention)
    student.train(was_training)


def _put_back(student: PreTrainedModel, attention: str) -> None:
    """The student's own attention; losses on it may have put another in its place."""
    if student.config._attn_implementation != attention:
        student.set_attn_implementation(attention)


def _train_phase(
    student: PreTrainedModel,
    cache: Cache,
    stretch: _Stretch,
    options: StudentOptions,
    state: Progress,
    *,
    out: Path,
    cpu: bool,
    update,
) -> None:
    """Epochs with validation, checkpoints and early stopping."""
    tools = _prepare(student, cache, stretch, options, out=out, cpu=cpu)
    restore(out, tools.accelerator, state)
    while state.epoch - state.phase_epoch < _size(stretch.phase.epochs) and not _is_exhausted(state, options):
        began = time.monotonic()
        loss = _train_epoch(cache, stretch, options, tools=tools, state=state, update=update)
        scores = _validate(cache, stretch, tools)
        _refuse_divergence(torch.tensor(scores.get("loss", 0.0)), "the validation loss", stretch.phase, state)
        state.epoch += 1
        phase = {"phase": state.phase} if options.phases else {}
        state.history.append({"epoch": state.epoch, **phase, "train/loss": loss, **scores})
        tools.accelerator.log(scores, step=state.step)
        score = scores.get("accuracy", -scores["loss"] if "loss" in scores else float(state.epoch))
        if score > state.best_score:
            state.best_score, state.best_epoch = score, state.epoch
        state.seconds += time.monotonic() - began
        save_checkpoint(out, student, tools.accelerator, state)
    tools.accelerator.end_training()
    tools.accelerator.free_memory()


def _prepare(
    student: PreTrainedModel, cache: Cache, stretch: _Stretch, options: StudentOptions, *, out: Path, cpu: bool
) -> _Tools:
    phase = stretch.phase
    accelerator = Accelerator(
        cpu=cpu,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        dataloader_config=DataLoaderConfiguration(),
    )
    if accelerator.num_processes > 1:
        raise ConfigError("this version trains a student in one process: start it without `accelerate launch`")
    accelerator.init_trackers("tensorboard")
    steps = _size(phase.epochs) * _steps_an_epoch(stretch)
    student = student.to(accelerator.device)
    probe = cache.tokens(stretch.split.train[:2]).to(accelerator.device)
    run, objective = _set_up(student, stretch, cache, probe)
    objective, projections = objective.to(accelerator.device), objective.projections
    optimizer: Any = build_optimizer(
        student,
        name=options.optimizer,
        lr=_size(phase.lr),
        weight_decay=_size(phase.weight_decay),
        groups=_groups(student, phase, objective),
    )
    schedule: Any = get_linear_schedule_with_warmup(optimizer, int(steps * _size(phase.warmup)), steps)
    student, optimizer, schedule = accelerator.prepare(student, optimizer, schedule)
    for beside in (projections, objective.balances):  # kept in checkpoints, and no part of the student
        if beside is not None:
            accelerator.prepare(beside.to(accelerator.device))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return _Tools(run, objective, parameters, accelerator, optimizer, schedule, steps)


def _set_up(
    student: PreTrainedModel, stretch: _Stretch, cache: Cache, probe: TokenBatch
) -> tuple[TeacherRun, Objective]:
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
        says = _forward(run, probe)
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
            widths.append((sum(theirs), ours[0]))
        else:
            widths += [(width, theirs[0]) for width in ours]
    return tuple(widths)


def _groups(student: PreTrainedModel, phase: Phase, objective: Objective) -> list[ParameterGroup]:
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


@torch.no_grad()
def _validate(cache: Cache, stretch: _Stretch, tools: _Tools) -> dict[str, float]:
    """Accuracy on the validation corpus; or the objective, as at the end of the phase, on the held-out rows."""
    student, objective, split = tools.run.model, tools.objective, stretch.split
    device = tools.accelerator.device
    student.eval()
    if split.corpus:
        if not objective.on_logits:
            return {}  # the student does not answer yet
        right = 0
        lengths = [len(example.input_ids) for example in split.corpus]
        for numbers in batches_by_length(lengths, batch_size=64):
            batch = pad_batch([split.corpus[i] for i in numbers], pad_token_id=cache.manifest.teacher.pad_token_id)
            batch = batch.to(device)
            right += int((_forward(tools.run, batch).logits.argmax(-1) == batch.labels).sum())
        return {"accuracy": right / len(split.corpus)}
    if not len(split.held_out):
        return {}
    total, weight = 0.0, 0
    rows = [split.held_out[numbers] for numbers in batches_by_length(cache.lengths[split.held_out], batch_size=64)]
    for held_out in CacheLoader(cache, rows, objective.fields, LoadOptions(reuse=True)):
        moved = held_out.to(device)
        loss, _ = objective(_forward(tools.run, moved.tokens), objective.hear(moved.teacher), progress=1.0)
        count = int((moved.tokens.labels != NO_LABEL).sum()) if objective.language else len(moved.rows)
        total, weight = total + loss.item() * count, weight + count
    return {"loss": total / max(weight, 1)}


def _is_exhausted(state: Progress, options: StudentOptions) -> bool:
    return options.patience is not None and state.epoch - max(state.best_epoch or 0, state.phase_epoch) >= (
        options.patience
    )


def _steps_an_epoch(stretch: _Stretch) -> int:
    return -(-len(stretch.split.train) // _size(stretch.phase.batch_size))


def _size(value: Any) -> Any:
    """A setting of a phase in which nothing is left open."""
    assert value is not None
    return value


# ---------------------------------------------------------------------------------------------------------- checks


def _check_task(cache: Cache, options: StudentOptions, validation: Corpus | None) -> None:
    """ConfigError for what can't be learned from such a teacher, or not by such a student."""
    task = cache.manifest.teacher.task
    if task not in ("sequence-classification", "sentence-embedding", *LANGUAGE_MODELS):
        raise ConfigError(
            f"train-student learns from classifiers and encoders of texts and from language models so far; the teacher "
            f"of this cache is for {task}. Was it fine-tuned with softlabels train-teacher?"
        )
    if task != "sequence-classification" and options.student != "transformer":
        raise ConfigError(f"student '{options.student}' can't be a {task}: give --student transformer")
    if task != "sequence-classification" and validation is not None:
        raise ConfigError(f"the student of a {task} is validated on held-out rows of its cache: leave --eval out")


def _read_source(options: StudentOptions, cache: Cache, out: Path) -> Run | None:
    """The run that is trained further; StudentError where it doesn't fit the cache."""
    if options.from_run is None:
        return None
    source = load_run(options.from_run)
    if out.resolve() == source.path.resolve():
        raise StudentError(f"--out {out} is the run that is trained further: give another folder")
    student = _network_of(source)
    if options.student != source.record.student:
        raise StudentError(f"{source.path} is a {source.record.student} student, not a {options.student}")
    if source.label_names != cache.label_names:
        raise StudentError(
            f"{source.path} has the classes {', '.join(source.label_names)}, cache {cache.path} "
            f"{', '.join(cache.label_names)}: train it further from a cache of its own teacher"
        )
    assert source.tokenizer is not None
    if source.tokenizer.get_vocab() != cache.tokenizer().get_vocab():
        raise StudentError(
            f"{source.path} reads other tokens than cache {cache.path} holds: train it further from a cache of a "
            f"teacher with the same tokenizer"
        )
    limit = longest_input(source.tokenizer, student.config)
    if cache.manifest.dump.max_length > limit:
        raise StudentError(
            f"{source.path} reads {limit} tokens at most, and rows of cache {cache.path} have up to "
            f"{cache.manifest.dump.max_length}: dump it with --max-length {limit}"
        )
    return source


def _network_of(source: Run) -> PreTrainedModel:
    if not isinstance(source.student, PreTrainedModel):
        raise StudentError(f"{source.path} is a {source.kind} student, and only torch students are trained further")
    return source.student


def _layers(options: StudentOptions, spec: StudentSpec, source: Run | None) -> int | None:
    """How many layers with hidden states and attention the student has; None for one that has none."""
    if options.student == LINEAR:
        return None
    if source is None:
        return count_layers(options.student, spec)
    layers = getattr(_network_of(source).config, "num_hidden_layers", None)
    return layers if options.student == "transformer" else None


def _student_spec(cache: Cache, options: StudentOptions) -> StudentSpec:
    """What the cache asks of any student; the tokens of its training rows are filled in when they are read."""
    teacher = cache.manifest.teacher
    return StudentSpec(
        label_names=cache.label_names,
        vocab_size=teacher.vocab_size,
        pad_token_id=teacher.pad_token_id,
        unk_token_id=teacher.unk_token_id,
        max_length=cache.manifest.dump.max_length,
        used_ids=np.array([], dtype=np.int64),
        teacher_config=cache.teacher_config(),
        options=options.options,
        task=teacher.task,
        mask_token_id=cache.tokenizer().mask_token_id,
        tokenizer=cache.tokenizer,
        decoder_start=None if cache.decoder_starts is None else int(cache.decoder_starts[0]),
    )


def _refuse_misfit(student: PreTrainedModel, cache: Cache) -> None:
    if cache.manifest.teacher.task != "sequence-classification":
        return  # it was tried out when it was built
    if student.config.num_labels != len(cache.label_names):
        raise StudentError(
            f"the student gives {student.config.num_labels} classes, cache {cache.path} has {len(cache.label_names)} "
            f"({', '.join(cache.label_names[:5])} …): build the student for this cache"
        )


def _configuration(cache: Cache, options: StudentOptions, validation: Corpus | None) -> dict[str, Any]:
    """What decides a run's result: two runs with the same one may share a folder."""
    evaluated = None if validation is None else validation.hash
    source = None if options.from_run is None else read_record(options.from_run).files
    return options.model_dump() | {"cache": cache.identity(), "eval": evaluated, "from_files": source}


def _cache_card(cache: Cache) -> dict[str, Any]:
    card = cache.manifest.teacher
    return {
        "path": str(cache.path),
        "teacher": card.name,
        "weights_hash": card.weights_hash,
        "identity": cache.identity(),
    }


# --------------------------------------------------------------------------------------------------------- linear


def _train_linear(cache: Cache, options: StudentOptions, stretch: _Stretch) -> _Outcome:
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
    return _Outcome(student, 1, None, scores, [], seconds)
