"""A training step of the BiLSTM student: the price of a large vocabulary, of the cache, and of a teacher in the loop.

Run it:  make bench      or  python -m tests.bench.bench_step [--small] [--threads N]

Rows have 40 tokens in the mean: [CLS], words drawn evenly from the vocabulary (real text uses fewer different words a
batch, which is cheaper), [SEP]; and logits of 3 classes. Batches have 50 rows, as the Distilled BiLSTM's paper has it;
the student is that BiLSTM of 300-d vectors; the loss is MSE on the logits; the step is train_student's: forward, loss,
backward, clip, AdamW, schedule.

vocabulary   steps of a student with 30,000 word vectors against one with 1,000, on batches in memory. Beside them, for
             comparison, the 30,000 with dense gradients, as torch's own AdamW asks for
cache        steps fed by Cache.loader from shuffled shards against the same steps on the same batches in memory
teacher      the step fed by the cache against the same step after a forward pass of a teacher of BERT-base's shape
             (random weights, evaluation mode, no gradients) over the batch, which is what an uncached loop does

Contestants take turns, round by round; a figure is the median over rounds of a step's mean time in the round, a ratio
the median of the rounds' ratios. Beside it stands the ratio of CPU time, which other work on the machine moves less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, get_linear_schedule_with_warmup

from softlabels.cache import open_cache
from softlabels.cache.batches import CacheBatch
from softlabels.cache.loader import LoadOptions
from softlabels.config import Phase
from softlabels.objective import Objective, fill_in
from softlabels.optimizer import build_optimizer, clip_gradients
from softlabels.students import StudentSpec, build_student, student_inputs
from softlabels.students.recurrent import CompactEmbedding
from softlabels.types import Signals
from tests.bench.bench_cache import Column, Work, write_ours
from tests.models import tiny_tokenizer

VOCABULARY, FEW = 30_000, 1_000
BATCH = 50
CLS, SEP, FIRST_WORD = 2, 3, 5  # of `tiny_tokenizer`
LIMITS = {"vocabulary": 1.5, "cache": 1.1, "teacher": 30.0}  # the rest is for comparison
ROUNDS = 7


@dataclass(frozen=True)
class Trainer:
    """A student that is trained step by step."""

    student: PreTrainedModel
    step: Callable[[CacheBatch], float]


@dataclass(frozen=True)
class Cost:
    """Of a step, in seconds; on a busy machine the CPU time is the steadier figure."""

    wall: float
    cpu: float  # of all threads


def make_trainer(vocabulary: int, *, sparse: bool = True) -> Trainer:
    """A new student for token ids below `vocabulary`, and the step that train_student takes with it."""
    torch.manual_seed(0)
    used = np.arange(CLS, vocabulary)
    spec = StudentSpec(["a", "b", "c"], VOCABULARY, 0, 1, 512, used, {}, {}, tokenizer=tiny_tokenizer)
    student = build_student("bilstm", spec).train()
    for module in student.modules():
        if isinstance(module, CompactEmbedding):
            module.sparse_gradients = sparse
    optimizer = build_optimizer(student, lr=1e-3, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, 100, 100_000)
    phase = Phase(losses={"mse_logits": 1.0})
    terms = fill_in(phase, "sequence-classification", student_layers=None, teacher_layers=lambda: 0)
    objective = Objective(terms, ["logits"])

    def step(batch: CacheBatch) -> float:
        logits = student(**student_inputs(student, batch.tokens)).logits
        own = Signals({"logits": logits}, batch.tokens.attention_mask, batch.tokens.labels)
        loss, _ = objective(own, batch.teacher, progress=0.5)
        loss.backward()
        norm = clip_gradients(student.parameters(), 1.0)
        assert torch.isfinite(norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return Trainer(student, step)


def make_cache(folder: Path, *, batches: int, vocabulary: int) -> Path:
    rng = np.random.default_rng(1)
    lengths = np.clip(np.round(rng.lognormal(3.55, 0.5, BATCH * batches)), 4, 128).astype(np.int64)
    ids = rng.integers(FIRST_WORD, vocabulary, int(lengths.sum())).astype(np.uint16)
    ends = np.cumsum(lengths)
    ids[ends - lengths], ids[ends - 1] = CLS, SEP
    columns = {"logits": Column("row", "float32", 3, "<f4")}
    write_ours(Work("step", len(lengths), BATCH, 0, lengths, columns, 512, ids), folder)
    return folder


def load(folder: Path, *, reuse: bool) -> Iterable[CacheBatch]:
    cache = open_cache(folder)
    options = LoadOptions(reuse=reuse)
    return cache.loader(np.arange(len(cache)), ["logits"], batch_size=BATCH, seed=0, options=options)


def in_turns(contestants: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[Cost]]:
    """What a step costs each contestant in every round, which returns its number of steps; one round of warming up."""
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            steps = run()
            if turn:
                costs[name].append(Cost((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
    return costs


def tell(what: str, one: str, other: str, costs: dict[str, list[Cost]], *, least: bool = False) -> None:
    """The medians of both, and their ratio beside its limit."""
    pairs = list(zip(costs[one], costs[other], strict=True))
    ratio = statistics.median(a.wall / b.wall for a, b in pairs)
    of_cpu = statistics.median(a.cpu / b.cpu for a, b in pairs)
    limit = "no limit, for comparison"
    if what in LIMITS:
        good = ratio >= LIMITS[what] if least else ratio <= LIMITS[what]
        limit = f"{'at least' if least else 'at most'} {LIMITS[what]:g}x: {'ok' if good else 'MISSED'}"
    print(
        f"{what:<12}{show(one, costs):<36}{show(other, costs):<36}{ratio:>7.2f}x  {limit}  (of CPU time {of_cpu:.2f}x)"
    )


def show(name: str, costs: dict[str, list[Cost]]) -> str:
    return f"{name} {1000 * statistics.median(cost.wall for cost in costs[name]):,.1f} ms"


def over(trainer: Trainer, batches: Iterable[CacheBatch]) -> int:
    count = 0
    for batch in batches:
        trainer.step(batch)
        count += 1
    return count


def bench_vocabulary(place: Path, steps: int, rounds: int) -> None:
    contestants: dict[str, Callable[[], int]] = {}
    for title, vocabulary, sparse in (
        ("30,000 x 300", VOCABULARY, True),
        ("1,000 x 300", FEW, True),
        ("30,000 x 300 dense", VOCABULARY, False),
    ):
        folder = make_cache(place / title.replace(" ", "-"), batches=steps, vocabulary=vocabulary)
        batches, trainer = list(load(folder, reuse=False)), make_trainer(vocabulary, sparse=sparse)
        contestants[title] = partial(over, trainer, batches)
    costs = in_turns(contestants, rounds)
    tell("vocabulary", "30,000 x 300", "1,000 x 300", costs)
    tell("dense", "30,000 x 300 dense", "1,000 x 300", costs)


def bench_cache(place: Path, steps: int, rounds: int) -> None:
    folder = make_cache(place / "cache", batches=steps, vocabulary=VOCABULARY)
    trainer, batches = make_trainer(VOCABULARY), list(load(folder, reuse=False))
    contestants: dict[str, Callable[[], int]] = {
        "from the cache": lambda: over(trainer, load(folder, reuse=True)),
        "in memory": lambda: over(trainer, batches),
    }
    tell("cache", "from the cache", "in memory", in_turns(contestants, rounds))


def bench_teacher(place: Path, steps: int, rounds: int) -> None:
    """Both read the same few batches, all that a small cache has."""
    folder, trainer = make_cache(place / "few", batches=steps, vocabulary=VOCABULARY), make_trainer(VOCABULARY)
    teacher = BertForSequenceClassification(BertConfig(id2label={0: "a", 1: "b", 2: "c"})).eval()

    def asked() -> Iterator[CacheBatch]:
        for batch in load(folder, reuse=True):
            with torch.no_grad():
                logits = teacher(**batch.tokens.model_inputs()).logits
            told = Signals({"logits": logits}, batch.teacher.mask, batch.teacher.labels)
            yield CacheBatch(batch.rows, batch.tokens, told)

    contestants: dict[str, Callable[[], int]] = {
        "teacher in the loop": lambda: over(trainer, asked()),
        "from the cache": lambda: over(trainer, load(folder, reuse=True)),
    }
    tell("teacher", "teacher in the loop", "from the cache", in_turns(contestants, rounds), least=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a quarter of the steps")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    steps, rounds = (15, 3) if given.small else (60, ROUNDS)
    print(f"threads: {given.threads}; batches of {BATCH} rows; {steps} steps a round, {rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        bench_vocabulary(Path(name), steps, rounds)
        bench_cache(Path(name), steps, rounds)
        bench_teacher(Path(name), max(steps // 10, 3), max(rounds // 2, 1))


if __name__ == "__main__":
    main()
