"""A language model's student and a corpus come in; its perplexity, and how near it is to its teacher, go out.

Both are measured at the targets: the next tokens of a causal model, those of the target text of an encoder-decoder
model, the masked ones of a masked model (whose figure is often called pseudo-perplexity). The teacher's side comes from
a cache of the same corpus; where that has targets "all", the distance to the teacher is over all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from softlabels.cache import Cache
from softlabels.cache.vocab import VocabTeacher, open_vocab
from softlabels.captures.output_head import only_targets
from softlabels.config import Masking
from softlabels.corpus import Corpus
from softlabels.errors import CacheError, CorpusError, StudentError
from softlabels.losses import vocab as losses
from softlabels.runs import Run, load_run
from softlabels.students import student_inputs
from softlabels.tasks import encode_task_labels, mask_often, masking_rates, tokenize_task
from softlabels.tokens import batches_by_length, count_tokens, pad_batch, token_hash
from softlabels.truncated import TruncatedLogits
from softlabels.types import LANGUAGE_MODELS, NO_LABEL, UNMASKED, TokenizedExample

_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class LanguageFidelity:
    """How near a student is to its teacher at the targets of the rows that corpus and cache share."""

    targets: int
    kl: float  # mean KL(teacher ‖ student) at T = 1, in nats; of truncated logits with the tail as one bucket
    agreement: float  # share of targets with the same most likely token
    teacher_perplexity: float | None  # None where the cache doesn't hold the logits of every token


@dataclass(frozen=True, slots=True)
class LanguageEvaluation:
    """What `evaluate_language_model` found."""

    run: str
    corpus: str
    task: str
    rows: int
    targets: int
    perplexity: float  # exp of the mean −log q(token) over the targets
    fidelity: LanguageFidelity | None
    parameters: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return asdict(self)


def evaluate_language_model(run: Path, corpus: Corpus, *, cache: Cache | None = None) -> LanguageEvaluation:
    """Score the student in `run` on the texts of `corpus`; with a `cache` of it, against its teacher too.

    A masked model is asked for the tokens that the cache masked; without a cache, for 15 % of each text, the same ones
    every time. CacheError where corpus and cache share no row.
    """
    student = load_run(run)
    if student.record.task not in LANGUAGE_MODELS:
        raise StudentError(f"{run} is a {student.record.task} student, which has no perplexity")
    masking = Masking()
    if cache is not None and cache.manifest.dump.masking is not None:
        masking = Masking(**cache.manifest.dump.masking.model_dump() | {"targets": "masked"})
    rows = _tokenize(student, corpus, masking)
    if cache is not None and masking.smoothing and cache.rows != len(rows):
        raise CacheError(
            f"the masks of cache {cache.shown} follow from how often each token is in its corpus (--mask-smoothing), "
            f"which has {cache.rows:,} rows, and {corpus.source} comes to {len(rows):,}: give the one that was dumped"
        )
    places = _places(rows, cache, corpus) if cache is not None else None
    vocab = None if cache is None else open_vocab(cache)
    sums = _Sums()
    for numbers in batches_by_length([count_tokens(row) for row in rows], batch_tokens=_BATCH_TOKENS):
        _score(student, [rows[number] for number in numbers], sums)
    if cache is not None and vocab is not None and places is not None:
        lengths = np.maximum(cache.lengths, cache.targets if cache.targets is not None else 0)[places]
        for numbers in batches_by_length(lengths, batch_tokens=_BATCH_TOKENS):
            _compare(student, cache, vocab, places[numbers], sums)
    if not sums.targets:
        raise CorpusError(f"corpus {corpus.source} has no token to predict: give longer texts")
    return LanguageEvaluation(
        run=str(run),
        corpus=corpus.source if corpus.split is None else f"{corpus.source}:{corpus.split}",
        task=student.record.task,
        rows=len(rows),
        targets=sums.targets,
        perplexity=_perplexity(sums.surprise, sums.targets),
        fidelity=_fidelity(sums) if cache is not None else None,
        parameters=student.parameters,
        bytes=student.size_on_disk,
    )


@dataclass(slots=True)
class _Sums:
    """Sums over targets, in nats."""

    targets: int = 0
    surprise: float = 0.0
    shared: int = 0
    guessed: int = 0  # of the shared ones, those that have a label
    kl: float = 0.0
    agreed: int = 0
    teacher_surprise: float | None = 0.0


def _tokenize(student: Run, corpus: Corpus, masking: Masking) -> list[TokenizedExample]:
    task, rates = student.record.task, None
    assert student.tokenizer is not None and isinstance(student.student, PreTrainedModel)
    if task == "masked-lm":
        rates = masking_rates(corpus, student.tokenizer, masking, max_length=student.record.max_length)
        corpus = mask_often(corpus, masking)
    return tokenize_task(
        task,
        student.tokenizer,
        corpus.examples,
        max_length=student.record.max_length,
        labels=replace(encode_task_labels(task, corpus.examples, []), rates=rates),
        masking=masking,
        model=student.student,
    ).examples


def _places(rows: Sequence[TokenizedExample], cache: Cache, corpus: Corpus) -> np.ndarray:
    """Rows of the cache that are in the corpus: same id and same tokens."""
    theirs = {key: row for row, key in enumerate(zip(cache.ids, cache.token_hashes.tolist(), strict=True))}
    found = [theirs[key] for row in rows if (key := (row.id, token_hash(row))) in theirs]
    if not found:
        raise CacheError(
            f"no row of {corpus.source} is in cache {cache.path} (by id and tokens): dump this corpus with the "
            f"student's teacher and give that cache"
        )
    return np.array(found)


@torch.inference_mode()
def _logits(student: Run, tokens: Any) -> Tensor:
    """(T, V)"""
    assert isinstance(student.student, torch.nn.Module)
    with only_targets(student.student, tokens.labels != NO_LABEL):
        return student.student(**student_inputs(student.student, tokens)).logits.float()


def _score(student: Run, rows: Sequence[TokenizedExample], sums: _Sums) -> None:
    assert student.tokenizer is not None
    tokens = pad_batch(rows, pad_token_id=int(student.tokenizer.pad_token_id))
    labels = tokens.labels[tokens.labels != NO_LABEL]
    sums.targets += len(labels)
    sums.surprise += float(functional.cross_entropy(_logits(student, tokens), labels, reduction="sum"))


def _compare(student: Run, cache: Cache, vocab: VocabTeacher, rows: np.ndarray, sums: _Sums) -> None:
    batch = cache.batch(rows, vocab.fields)
    own, teacher = _logits(student, batch.tokens), vocab(batch.teacher)
    labels = batch.tokens.labels[batch.tokens.labels != NO_LABEL]
    sums.shared += len(labels)
    sums.guessed += int((labels != UNMASKED).sum())
    sums.kl += float(losses.kl(own, teacher, temperature=1.0)) * len(labels)
    if isinstance(teacher, TruncatedLogits):
        sums.agreed += int((own.argmax(1) == teacher.ids[:, 0]).sum())
        sums.teacher_surprise = None
    else:
        sums.agreed += int((own.argmax(1) == teacher.argmax(1)).sum())
        if sums.teacher_surprise is not None:
            surprise = functional.cross_entropy(teacher, labels, ignore_index=UNMASKED, reduction="sum")
            sums.teacher_surprise += float(surprise)


def _fidelity(sums: _Sums) -> LanguageFidelity:
    count = max(sums.shared, 1)
    surprise = sums.teacher_surprise
    return LanguageFidelity(
        targets=sums.shared,
        kl=sums.kl / count,
        agreement=sums.agreed / count,
        teacher_perplexity=None if surprise is None else _perplexity(surprise, max(sums.guessed, 1)),
    )


def _perplexity(surprise: float, targets: int) -> float:
    mean = surprise / targets
    return math.exp(mean) if mean < 700 else math.inf
