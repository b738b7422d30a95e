"""The loop that trains a teacher: a network and its rows in, the best epoch's weights and every epoch's figures out.

A classifier is asked for one thing of a row, its class; a language model for several of its tokens. Both are trained by
the mean cross entropy over all that a batch asks, and the epoch that answers best on the held-out rows is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from softlabels.captures.output_head import only_targets
from softlabels.config import TeachableTask, suggest
from softlabels.errors import ConfigError, TeacherError
from softlabels.progress import progress
from softlabels.tokens import Tokenized, batches_by_length, pad_batch, shuffled_batches
from softlabels.types import NO_LABEL, TokenBatch, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of language models the exponential of the validation loss, so that the lower is the better
METRICS: dict[TeachableTask, str] = {
    "sequence-classification": "accuracy",
    "masked-lm": "perplexity",
    "causal-lm": "perplexity",
}
_EVAL_ROWS = 64


@dataclass(frozen=True)
class TeacherOptions:
    """How a teacher is trained. The defaults are safe for BERT-base; MiniLM takes lr 1e-4 to 2e-4."""

    task: TeachableTask = "sequence-classification"
    epochs: int = 5
    lr: float = 5e-5
    batch_size: int = 32
    max_length: int | None = None  # tokens; None: what the model takes, at most 512
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    validation_fraction: float = 0.1  # of each class or of the texts, held out where no validation corpus is given
    seed: int = 0
    precision: Literal["fast", "bfloat16", "float32"] = "fast"  # see `_compute_precision`
    from_scratch: bool = False  # random weights: the model is a preset's name or a folder with a config.json
    tokenizer: str | None = None  # with from_scratch: whose tokenizer; None: the model folder's
    options: dict[str, Any] = field(default_factory=dict)  # with from_scratch: sizes, as of the transformer student
    trust_remote_code: bool = False
    device: str | None = None  # None: the GPU if there is one

    def __post_init__(self) -> None:
        tasks = get_args(TeachableTask)
        if self.task not in tasks:
            raise ConfigError(
                f"a teacher is trained here for {', '.join(tasks)}, not for '{self.task}'.{suggest(self.task, tasks)}"
            )
        faults = {
            "epochs": self.epochs < 1,
            "batch_size": self.batch_size < 1,
            "lr": not (math.isfinite(self.lr) and self.lr > 0),
            "warmup": not 0 <= self.warmup <= 1,
            "weight_decay": self.weight_decay < 0,
            "clip": not self.clip > 0,
            "validation_fraction": not 0 <= self.validation_fraction < 1,
            "seed": self.seed < 0,
            "precision": self.precision not in ("fast", "bfloat16", "float32"),
        }
        for name, wrong in faults.items():
            if wrong:
                raise ConfigError(f"{name} {getattr(self, name)} is out of range for training a teacher")
        if not self.from_scratch and (self.tokenizer is not None or self.options):
            raise ConfigError(
                "a tokenizer or options of the shape are for a teacher that starts from nothing: give --from-scratch, "
                "or leave them out"
            )


@dataclass(frozen=True)
class EpochFigures:
    """What one epoch came to. The validation figures are None where no row could be held out."""

    epoch: int  # from 1
    train_loss: float
    validation_loss: float | None
    validation_score: float | None  # see METRICS


@dataclass(frozen=True)
class Rows:
    """What there is to learn from, and what is held out; every row has labels."""

    train: list[TokenizedExample]
    held: list[TokenizedExample]
    truncated: int  # cut to max_length tokens
    max_length: int
    unlabelled: int = 0  # skipped
    short: int = 0  # skipped: of a language model, texts without a token to predict
    anew: Callable[[TokenizedExample, int], TokenizedExample] | None = None  # a row of `train` as an epoch sees it

    def of_epoch(self, numbers: np.ndarray, epoch: int) -> list[TokenizedExample]:
        """The rows `numbers` of `train` as `epoch` (from 1) sees them."""
        rows = [self.train[number] for number in numbers]
        return rows if self.anew is None else [self.anew(row, epoch) for row in rows]


def hold_out(labels: Sequence[int], *, fraction: float, seed: int) -> set[int]:
    """Row numbers to validate on: `fraction` of each class, at least one row of every class that has two."""
    if fraction == 0:
        return set()
    generator, classes, held = np.random.default_rng(seed), np.asarray(labels), []
    for label in np.unique(classes):
        rows = generator.permutation(np.flatnonzero(classes == label))
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held.extend(rows[:count].tolist())
    return set(held)


def divide_rows(found: Tokenized, theirs: Tokenized | None, options: TeacherOptions, *, max_length: int) -> Rows:
    """All of `found` to learn from and all of `theirs` held out, or where there is no such corpus some of `found`."""
    if theirs is not None:
        return Rows(found.examples, theirs.examples, found.truncated + theirs.truncated, max_length)
    labels = [row.label for row in found.examples]  # of a language model's rows all the same: one class
    held = hold_out(labels, fraction=options.validation_fraction, seed=options.seed)
    train = [row for number, row in enumerate(found.examples) if number not in held]
    return Rows(train, [found.examples[number] for number in sorted(held)], found.truncated, max_length)


def fit(
    network: PreTrainedModel, rows: Rows, pad_token_id: int, options: TeacherOptions
) -> tuple[list[EpochFigures], EpochFigures]:
    """Train `network`, and leave the best epoch's weights in it: every epoch's figures, and the best's.

    TeacherError where the loss or the gradient is no longer finite.
    """
    lengths = [len(row.input_ids) for row in rows.train]
    total = options.epochs * math.ceil(len(rows.train) / options.batch_size)
    optimizer, schedule = _optimizer(network, options, steps=total)
    epochs: list[EpochFigures] = []
    best: EpochFigures | None = None
    weights: dict[str, Tensor] = {}
    with progress(options.epochs * len(rows.train), description="teacher", unit="rows") as update:
        for epoch in range(1, options.epochs + 1):
            network.train()
            loss_sum = asked = 0.0
            seed = (options.seed, epoch)
            for numbers in shuffled_batches(lengths, batch_size=options.batch_size, rng=np.random.default_rng(seed)):
                batch = pad_batch(rows.of_epoch(numbers, epoch), pad_token_id=pad_token_id).to(network.device)
                loss = _step(network, batch, options, optimizer, schedule)
                count = int((batch.labels != NO_LABEL).sum())
                loss_sum, asked = loss_sum + loss * count, asked + count
                update(len(numbers), epoch=epoch, loss=loss)
            figures = _score(network, rows.held, pad_token_id, options, epoch, loss_sum / asked)
            epochs.append(figures)
            if best is None or _rank(figures, options.task) > _rank(best, options.task):
                best = figures
                if rows.held and epoch < options.epochs:
                    weights = {key: value.to("cpu", copy=True) for key, value in network.state_dict().items()}
    assert best is not None
    if best.epoch < options.epochs:
        network.load_state_dict(weights)
    return epochs, best


def _rank(figures: EpochFigures, task: TeachableTask) -> tuple[float, float, int]:
    """Larger is better: the accuracy, if it is one, then the lower loss; without validation, the later epoch."""
    if figures.validation_score is None or figures.validation_loss is None:
        return (0.0, 0.0, figures.epoch)
    accuracy = figures.validation_score if METRICS[task] == "accuracy" else 0.0  # a perplexity says what the loss says
    return (accuracy, -figures.validation_loss, -figures.epoch)


def _optimizer(
    network: PreTrainedModel, options: TeacherOptions, *, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, without decay on biases and norms; the rate rises linearly, then falls linearly to 0."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=True)
    warm = max(1, round(options.warmup * steps))

    def rate(step: int) -> float:
        return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


@contextmanager
def _compute_precision(options: TeacherOptions, device: torch.device) -> Iterator[None]:
    """How a forward and backward pass computes; the weights and the optimizer are float32 in any case.

    'fast' rounds the inputs of matrix products where the processor has units for that (bfloat16 on a CPU with
    AMX or AVX512-BF16, TF32 on a GPU) and is as 'float32' elsewhere. 'bfloat16' is autocast.
    """
    fast = options.precision == "fast" and (device.type == "cuda" or _cpu_has_bfloat16())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if fast else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _cpu_has_bfloat16() -> bool:
    # without such units torch would emulate bfloat16, slower than float32; torch has no public check yet
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


def _ask(network: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Logits (N, C) float32 and labels (N,): a row each, or of a language model a token each that has a label."""
    if batch.labels.ndim == 1:
        return network(**batch.model_inputs()).logits.float(), batch.labels
    targets = batch.labels != NO_LABEL  # (B, L)
    with only_targets(network, targets):
        return network(**batch.model_inputs()).logits.float(), batch.labels[targets]


def _step(
    network: PreTrainedModel,
    batch: TokenBatch,
    options: TeacherOptions,
    optimizer: torch.optim.AdamW,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> float:
    """One step of the optimizer; the batch's mean loss. A step that is not finite is never taken."""
    with _compute_precision(options, network.device):
        loss = functional.cross_entropy(*_ask(network, batch))
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise TeacherError(
            f"the teacher's training broke down at step {schedule.last_epoch + 1}: the loss is "
            f"{loss.item():.3g}, the gradient's norm {norm.item():.3g}; try a lower --lr than {options.lr:g}"
        )
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    return loss.item()


@torch.no_grad()
def _score(
    network: PreTrainedModel,
    rows: list[TokenizedExample],
    pad_token_id: int,
    options: TeacherOptions,
    epoch: int,
    train_loss: float,
) -> EpochFigures:
    """The epoch's figures on the held-out `rows`."""
    if not rows:
        return EpochFigures(epoch, train_loss, None, None)
    network.eval()
    accuracy = METRICS[options.task] == "accuracy"
    # logits over a vocabulary fill the memory: of a language model no more of them than in training
    size = _EVAL_ROWS if accuracy else options.batch_size
    loss = right = asked = 0.0
    for indices in batches_by_length([len(row.input_ids) for row in rows], batch_size=size):
        batch = pad_batch([rows[index] for index in indices], pad_token_id=pad_token_id).to(network.device)
        with _compute_precision(options, network.device):
            logits, labels = _ask(network, batch)
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        asked += len(labels)
    mean = loss / asked
    if not (math.isfinite(mean) and (accuracy or mean < 700)):  # e⁷⁰⁰ is about the largest number there is
        raise TeacherError(f"after epoch {epoch} the validation loss is {mean}; try a lower --lr than {options.lr:g}")
    return EpochFigures(epoch, train_loss, mean, right / asked if accuracy else math.exp(mean))
