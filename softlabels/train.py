"""STAGE 2: a cache comes in, a trained student goes out. The teacher is never loaded.

The loop is written out in `_train_epoch`: forward, losses, backward, step. Around it: which rows teach and which
validate, a checkpoint after every epoch, early stopping, and the run folder at the end.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from softlabels.cache import Cache
from softlabels.cache.loader import CacheLoader, LoadOptions
from softlabels.cache.vocab import open_vocab
from softlabels.captures.output_head import only_targets
from softlabels.checkpoint import Progress, best_weights, drop_checkpoint, restore, run_folder, save_checkpoint
from softlabels.config import StudentOptions, package_versions
from softlabels.corpus import Corpus, encode_labels
from softlabels.errors import CacheError, ConfigError, CorpusError, StudentError
from softlabels.losses import HARD
from softlabels.objective import Objective, build_objective
from softlabels.progress import progress
from softlabels.runs import RunRecord, save_run
from softlabels.students import LINEAR, StudentSpec, build_student, check_student, student_inputs
from softlabels.students.linear import LinearStudent, fit_linear
from softlabels.tokens import batches_by_length, pad_batch, tokenize
from softlabels.types import LANGUAGE_MODELS, NO_LABEL, Signals, TokenBatch, TokenizedExample


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

    Rows without a label contribute only the soft terms of `options.losses`; with hard terms alone only labelled rows
    are used. `validation`, labelled, picks the best epoch by accuracy; without it `options.validation` of the rows is
    held out and the objective on them decides. `resume` goes on after the last whole epoch, to the same result.
    """
    started = time.monotonic()
    out = Path(out)
    check_options(options)
    task = cache.manifest.teacher.task
    _check_task(cache, options, validation)
    vocab = open_vocab(cache) if task in LANGUAGE_MODELS and not set(options.losses) <= HARD else None
    objective = build_objective(options.losses, options.temperature, task=task, vocab=vocab)
    cache.require(objective.fields(), why=f"loss '{_first_soft(objective)}'")
    rows = _teaching_rows(cache, objective)
    split = _hold_out(rows, cache, options, validation)
    with run_folder(out, _configuration(cache, options, validation), resume=resume):
        train = _train_linear if options.student == LINEAR else _train_network
        outcome = train(cache, objective, options, split, out=out, cpu=cpu)
        record = RunRecord(
            student=options.student,
            options=options.options,
            label_names=cache.label_names,
            task=task,
            max_length=cache.manifest.dump.max_length,
            losses=options.losses,
            temperature=options.temperature,
            seed=options.seed,
            epochs_run=outcome.epochs,
            best_epoch=outcome.best_epoch,
            train_seconds=outcome.seconds,
            train_rows=len(split.train),
            labelled_rows=int((_labelled(cache)[split.train]).sum()),
            validation=outcome.validation,
            history=outcome.history,
            cache=_cache_card(cache),
            versions=package_versions("torch", "transformers", "scikit-learn"),
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
    if check_student(options.student) == LINEAR and set(options.losses) not in ({"mse_logits"}, {"ce"}):
        raise ConfigError(
            f"the linear student is a regression on the teacher's logits (--loss mse_logits) or on the labels "
            f"(--loss ce), one of them alone; not {', '.join(sorted(options.losses))}"
        )


# ------------------------------------------------------------------------------------------------------- the loop


def _train_epoch(
    student: PreTrainedModel,
    cache: Cache,
    objective: Objective,
    options: StudentOptions,
    split: _Split,
    *,
    tools: _Tools,
    state: Progress,
    update,
) -> float:
    """One pass over the training rows; the mean loss."""
    student.train()
    loader = cache.loader(
        split.train,
        objective.fields(),
        batch_size=options.batch_size,
        seed=options.seed,
        epoch=state.epoch,
        options=LoadOptions(reuse=True),  # a batch is done with when the next one is asked for
    )
    total = 0.0
    with closing(iter(loader)) as batches:  # its thread ends here, also when a step fails
        for batch in batches:
            batch = batch.to(tools.accelerator.device)
            student_says = _forward(student, batch.tokens, objective)
            teacher_says = objective.hear(batch.teacher)
            loss, parts = objective(student_says, teacher_says, progress=state.step / max(tools.steps - 1, 1))
            _refuse_divergence(loss, "the loss", options, state)
            tools.accelerator.backward(loss)
            tools.accelerator.clip_grad_norm_(student.parameters(), options.clip)
            tools.optimizer.step()
            tools.schedule.step()
            tools.optimizer.zero_grad()
            figures = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
            tools.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=state.step)
            state.step += 1
            total += figures["loss"]
            update(1, loss=figures["loss"])
    weights = torch.stack([parameter.detach().float().sum() for parameter in student.parameters()])
    _refuse_divergence(weights, "the student's weights", options, state)  # the last step's loss came before it
    return total / len(loader)


def _refuse_divergence(values: torch.Tensor, what: str, options: StudentOptions, state: Progress) -> None:
    if not torch.isfinite(values).all():
        number = values[~torch.isfinite(values)].flatten()[0].item()
        raise StudentError(
            f"{what} became {number} in epoch {state.epoch + 1}, step {state.step}: give a smaller --lr than "
            f"{options.lr:g}"
        )


def _forward(student: PreTrainedModel, batch: TokenBatch, objective: Objective) -> Signals:
    """What the student says; a language model only at its targets, (T, V)."""
    targets = batch.labels != NO_LABEL if objective.language else None
    with only_targets(student, targets):
        logits = student(**student_inputs(student, batch)).logits.float()  # (B, C) or (T, V)
    return Signals({"logits": logits}, batch.attention_mask, batch.labels)


@dataclass(frozen=True, slots=True)
class _Tools:
    accelerator: Accelerator
    optimizer: Any
    schedule: Any
    steps: int  # of the whole training


@dataclass(frozen=True, slots=True)
class _Outcome:
    student: PreTrainedModel | LinearStudent
    epochs: int
    best_epoch: int | None
    validation: dict[str, float]
    history: list[dict[str, float]]
    seconds: float


def _train_network(
    cache: Cache, objective: Objective, options: StudentOptions, split: _Split, *, out: Path, cpu: bool
) -> _Outcome:
    """Epochs with validation, checkpoints and early stopping; the weights of the best epoch are kept."""
    set_seed(options.seed)
    student = build_student(options.student, _student_spec(cache, options, split))
    _refuse_misfit(student, cache)
    student, tools = _prepare(student, options, split, out=out, cpu=cpu)
    objective = objective.to(tools.accelerator.device)
    state = restore(out, tools.accelerator)
    done = state.epoch * (tools.steps // options.epochs)
    with progress(tools.steps, description=f"train {options.student}", unit="steps", done=done) as update:
        while state.epoch < options.epochs and not _is_exhausted(state, options):
            began = time.monotonic()
            loss = _train_epoch(student, cache, objective, options, split, tools=tools, state=state, update=update)
            scores = _validate(student, cache, objective, split, device=tools.accelerator.device)
            _refuse_divergence(torch.tensor(scores.get("loss", 0.0)), "the validation loss", options, state)
            state.epoch += 1
            state.history.append({"epoch": state.epoch, "train/loss": loss, **scores})
            tools.accelerator.log(scores, step=state.step)
            score = scores.get("accuracy", -scores["loss"] if "loss" in scores else float(state.epoch))
            if score > state.best_score:
                state.best_score, state.best_epoch = score, state.epoch
            state.seconds += time.monotonic() - began
            save_checkpoint(out, student, tools.accelerator, state)
    tools.accelerator.end_training()
    student.load_state_dict(best_weights(out), strict=True)
    student.eval()
    best = next(entry for entry in state.history if entry["epoch"] == state.best_epoch)
    validation = {name: value for name, value in best.items() if name not in ("epoch", "train/loss")}
    return _Outcome(student.cpu(), state.epoch, state.best_epoch, validation, state.history, state.seconds)


def _prepare(
    student: PreTrainedModel, options: StudentOptions, split: _Split, *, out: Path, cpu: bool
) -> tuple[PreTrainedModel, _Tools]:
    accelerator = Accelerator(
        cpu=cpu,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        dataloader_config=DataLoaderConfiguration(),
    )
    if accelerator.num_processes > 1:
        raise ConfigError("this version trains a student in one process: start it without `accelerate launch`")
    accelerator.init_trackers("tensorboard")
    steps = options.epochs * -(-len(split.train) // options.batch_size)
    decayed = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in student.parameters() if p.requires_grad and p.ndim <= 1]  # biases and norms
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=options.lr,
        fused=True,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, int(steps * options.warmup), steps)
    student, optimizer, schedule = accelerator.prepare(student, optimizer, schedule)
    return student, _Tools(accelerator, optimizer, schedule, steps)


@torch.no_grad()
def _validate(
    student: PreTrainedModel, cache: Cache, objective: Objective, split: _Split, *, device: torch.device
) -> dict[str, float]:
    """Accuracy on the validation corpus; or the objective, at its last temperature, on the held-out rows."""
    student.eval()
    if split.corpus:
        right = 0
        lengths = [len(example.input_ids) for example in split.corpus]
        for numbers in batches_by_length(lengths, batch_size=64):
            batch = pad_batch([split.corpus[i] for i in numbers], pad_token_id=cache.manifest.teacher.pad_token_id)
            batch = batch.to(device)
            right += int((_forward(student, batch, objective).logits.argmax(-1) == batch.labels).sum())
        return {"accuracy": right / len(split.corpus)}
    if not len(split.held_out):
        return {}
    total, weight = 0.0, 0
    rows = [split.held_out[numbers] for numbers in batches_by_length(cache.lengths[split.held_out], batch_size=64)]
    for held_out in CacheLoader(cache, rows, objective.fields(), LoadOptions(reuse=True)):
        moved = held_out.to(device)
        loss, _ = objective(_forward(student, moved.tokens, objective), objective.hear(moved.teacher), progress=1.0)
        count = int((moved.tokens.labels != NO_LABEL).sum()) if objective.language else len(moved.rows)
        total, weight = total + loss.item() * count, weight + count
    return {"loss": total / max(weight, 1)}


def _is_exhausted(state: Progress, options: StudentOptions) -> bool:
    return options.patience is not None and state.epoch - (state.best_epoch or 0) >= options.patience


# ------------------------------------------------------------------------------------------------- --------- rows


@dataclass(frozen=True, slots=True)
class _Split:
    train: np.ndarray  # row numbers of the cache
    held_out: np.ndarray
    corpus: list[TokenizedExample]  # of the validation corpus, empty without one


def _first_soft(objective: Objective) -> str:
    return next((name for name in objective.weights if objective.needs_teacher and name != "ce"), "ce")


def _teaching_rows(cache: Cache, objective: Objective) -> np.ndarray:
    if cache.rows < 2:
        raise CacheError(f"cache {cache.path} has one row only: there is nothing to learn from it. Dump more rows")
    labelled = np.flatnonzero(_labelled(cache))
    if objective.language:
        if not len(labelled):
            raise CacheError(f"no row of cache {cache.path} has a token to predict: dump longer texts")
        return labelled
    if objective.needs_labels and not len(labelled):
        raise CacheError(
            f"loss 'ce' needs labels; no row of cache {cache.path} has one. Leave --loss ce out, or dump labelled rows"
        )
    if objective.needs_teacher:
        return np.arange(cache.rows)
    if len(np.unique(cache.labels[labelled])) < 2:
        raise CacheError(
            f"the labelled rows of cache {cache.path} are all of one class: there is nothing to tell apart"
        )
    return labelled


def _labelled(cache: Cache) -> np.ndarray:
    """(N,) bool: rows with a class, or with tokens to predict."""
    return cache.labels != NO_LABEL if cache.targets is None else cache.targets > 0


def _check_task(cache: Cache, options: StudentOptions, validation: Corpus | None) -> None:
    """ConfigError for what can't be learned from such a teacher, or not by such a student."""
    task = cache.manifest.teacher.task
    if task not in ("sequence-classification", *LANGUAGE_MODELS):
        raise ConfigError(
            f"train-student learns from classifiers of texts and from language models so far; the teacher of this "
            f"cache is for {task}. Was it fine-tuned with softlabels train-teacher?"
        )
    if task in LANGUAGE_MODELS and options.student != "transformer":
        raise ConfigError(f"student '{options.student}' can't be a {task}: give --student transformer")
    if task in LANGUAGE_MODELS and validation is not None:
        raise ConfigError("a language model's student is validated on held-out rows of its cache: leave --eval out")


def _hold_out(rows: np.ndarray, cache: Cache, options: StudentOptions, validation: Corpus | None) -> _Split:
    none = np.array([], dtype=np.int64)
    if validation is not None:
        labels = encode_labels(validation.examples, cache.label_names)
        kept = [
            (example, label) for example, label in zip(validation.examples, labels, strict=True) if label != NO_LABEL
        ]
        if not kept:
            raise CorpusError(
                f"validation corpus {validation.source} has no labelled row: leave --eval out, or label it"
            )
        tokens = tokenize(
            cache.tokenizer(),
            [example for example, _ in kept],
            max_length=cache.manifest.dump.max_length,
            labels=[label for _, label in kept],
        )
        return _Split(rows, none, tokens.examples)
    count = int(len(rows) * options.validation)
    order = np.random.default_rng(options.seed).permutation(rows)
    return _Split(np.sort(order[count:]), np.sort(order[:count]), [])


def _student_spec(cache: Cache, options: StudentOptions, split: _Split) -> StudentSpec:
    teacher = cache.manifest.teacher
    return StudentSpec(
        label_names=cache.label_names,
        vocab_size=teacher.vocab_size,
        pad_token_id=teacher.pad_token_id,
        unk_token_id=teacher.unk_token_id,
        max_length=cache.manifest.dump.max_length,
        used_ids=cache.used_ids(split.train),
        teacher_config=cache.teacher_config(),
        options=options.options,
        task=teacher.task,
        decoder_start=None if cache.decoder_starts is None else int(cache.decoder_starts[0]),
    )


def _refuse_misfit(student: PreTrainedModel, cache: Cache) -> None:
    if cache.manifest.teacher.task in LANGUAGE_MODELS:
        return  # it was tried out when it was built
    if student.config.num_labels != len(cache.label_names):
        raise StudentError(
            f"the student gives {student.config.num_labels} classes, cache {cache.path} has {len(cache.label_names)} "
            f"({', '.join(cache.label_names[:5])} …): build the student for this cache"
        )


def _configuration(cache: Cache, options: StudentOptions, validation: Corpus | None) -> dict[str, Any]:
    """What decides a run's result: two runs with the same one may share a folder."""
    evaluated = None if validation is None else validation.hash
    return options.model_dump() | {"cache": cache.identity(), "eval": evaluated}


def _cache_card(cache: Cache) -> dict[str, Any]:
    card = cache.manifest.teacher
    return {
        "path": str(cache.path),
        "teacher": card.name,
        "weights_hash": card.weights_hash,
        "identity": cache.identity(),
    }


# --------------------------------------------------------------------------------------------------------- linear


def _train_linear(
    cache: Cache, objective: Objective, options: StudentOptions, split: _Split, *, out: Path, cpu: bool
) -> _Outcome:
    """TF-IDF and a linear model on the texts of the cache: on the teacher's logits, or on the labels."""
    began = time.monotonic()
    texts = cache.texts()
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
        teacher = cache.signals(split.held_out, objective.fields())
        held_out = [texts[row] for row in split.held_out]
        logits = student.logits([text for text, _ in held_out], pairs=[pair for _, pair in held_out])
        own = Signals({"logits": torch.from_numpy(logits)}, teacher.mask, teacher.labels)
        scores["loss"] = objective(own, teacher, progress=1.0)[0].item()
    return _Outcome(student, 1, None, scores, [], seconds)
