"""What a teacher was made for: found from its configuration, and what follows for its class, its tokens and its labels.

A corpus's rows and a task come in; token rows with the labels that the cache format asks for go out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from softlabels.config import Masking
from softlabels.corpora.repeated import RepeatedRows
from softlabels.corpora.spooled_rows import SpooledRows
from softlabels.corpus import Corpus, encode_labels
from softlabels.errors import ConfigError, CorpusError, TeacherError
from softlabels.tokens import Tokenized, tokenize
from softlabels.types import (
    IMAGES,
    LANGUAGE_MODELS,
    NO_LABEL,
    SEQ2SEQ,
    TASKS,
    UNMASKED,
    VECTOR_LABELS,
    Example,
    Label,
    Task,
    TokenizedExample,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ROUNDS = 100  # of sharing out; each brings some more tokens to 1, and a few are enough
_AT_ONCE = 1 << 14  # rows of a streamed corpus whose labels are looked at together

# How the classes of transformers end, and the one that loads them. Of two that fit, the first.
_ENDINGS: tuple[tuple[str, Task], ...] = (
    ("ForSequenceClassification", "sequence-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForMaskedLM", "masked-lm"),
    ("ForPreTraining", "masked-lm"),
    ("ForCausalLM", "causal-lm"),
    ("ForConditionalGeneration", SEQ2SEQ),
    ("T5WithLMHeadModel", SEQ2SEQ),
    ("MarianMTModel", SEQ2SEQ),
    ("EncoderDecoderModel", SEQ2SEQ),
    ("ForImageClassification", "image-classification"),
    ("LMHeadModel", "causal-lm"),
    ("Model", "sentence-embedding"),
)
AUTO_CLASSES: dict[Task, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "multi-label-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
    "sentence-embedding": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
}


def find_task(config: PretrainedConfig, asked: str | None = None, *, where: object) -> Task:
    """The task of a teacher: `asked`, or what its config.json says; TeacherError where that is nothing known here."""
    if asked is not None:
        for task in TASKS:
            if task == asked:
                return _by_problem(config) if task == "sequence-classification" else task
        raise ConfigError(f"--task {asked}: there are {', '.join(TASKS)}")
    name = (config.architectures or [""])[0]
    for ending, task in _ENDINGS:
        if name.endswith(ending) and (task != SEQ2SEQ or config.is_encoder_decoder):  # others look at images, or listen
            return _by_problem(config) if task == "sequence-classification" else task
    if not name:
        return _by_problem(config)
    raise TeacherError(f"{where} is a {name}, which no task fits: {', '.join(TASKS)}. Name one with --task")


def _by_problem(config: PretrainedConfig) -> Task:
    """What a sequence classifier's `problem_type` says; one output is a regression."""
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return "multi-label-classification"
    if problem == "regression" or (problem is None and config.num_labels == 1):
        return "regression"
    return "sequence-classification"


# ------------------------------------------------------------------------------------------------------------ labels


@dataclass(frozen=True, slots=True)
class TaskLabels:
    """The labels of some rows as numbers: one class each, or vectors, or tags a word, as the task has them."""

    classes: list[int]  # NO_LABEL where the others hold the labels
    vectors: np.ndarray | None = None  # (N, C) float32
    tags: list[list[int] | None] | None = None  # a class a word
    rates: np.ndarray | None = None  # (V,) of a masked language model: see `mask_tokens`

    @property
    def labelled(self) -> int:
        """How many rows have a label."""
        if self.vectors is not None:
            return int((~np.isnan(self.vectors).any(axis=1)).sum())
        if self.tags is not None:
            return sum(tags is not None for tags in self.tags)
        return sum(label != NO_LABEL for label in self.classes)

    def part(self, start: int, stop: int) -> TaskLabels:
        """Those of rows `start` to `stop`."""
        return TaskLabels(
            self.classes[start:stop],
            None if self.vectors is None else self.vectors[start:stop],
            None if self.tags is None else self.tags[start:stop],
            self.rates,
        )


@dataclass(frozen=True, slots=True)
class LaterLabels:
    """The labels of rows that aren't in memory: encoded a part at a time."""

    task: Task
    examples: Sequence[Example]
    label_names: Sequence[str]
    labelled: int  # how many rows have a label
    rates: np.ndarray | None = None  # (V,) of a masked language model: see `mask_tokens`

    def part(self, start: int, stop: int) -> TaskLabels:
        """Those of rows `start` to `stop`."""
        part = encode_task_labels(self.task, self.examples[start:stop], self.label_names)
        return replace(part, rates=self.rates)


def encode_corpus_labels(
    task: Task, examples: Sequence[Example], label_names: Sequence[str]
) -> TaskLabels | LaterLabels:
    """As `encode_task_labels`, which checks all rows; but of a streamed corpus no label is kept in memory."""
    if isinstance(examples, list):
        return encode_task_labels(task, examples, label_names)
    facts = examples.facts if isinstance(examples, SpooledRows) else None
    if facts is not None and facts.labels is not None and task in ("sequence-classification", IMAGES):
        distinct = [Example("", "", label=label) for label, _ in facts.labels]
        with suppress(CorpusError):  # one is unknown: all rows are looked at, to name those that have it
            encode_labels(distinct, label_names)
            return LaterLabels(task, examples, label_names, sum(count for _, count in facts.labels))
    parts = (examples[start : start + _AT_ONCE] for start in range(0, len(examples), _AT_ONCE))
    labelled = sum(encode_task_labels(task, part, label_names).labelled for part in parts)
    return LaterLabels(task, examples, label_names, labelled)


def encode_task_labels(task: Task, examples: Sequence[Example], label_names: Sequence[str]) -> TaskLabels:
    """The rows' labels for a teacher of these `label_names`; CorpusError names those that it doesn't know."""
    none = [NO_LABEL] * len(examples)
    if task == IMAGES and (missing := [example.id for example in examples if example.image is None]):
        raise CorpusError(f"row '{missing[0]}' has no image, which a teacher for {task} looks at")
    if task == SEQ2SEQ and (missing := [example.id for example in examples if not example.target]):
        raise CorpusError(f"row '{missing[0]}' has no target text, which a teacher for {task} is held to")
    if task in ("sequence-classification", IMAGES):
        return TaskLabels(encode_labels(examples, label_names))
    if task in VECTOR_LABELS:
        return TaskLabels(none, vectors=_vectors(task, examples, label_names))
    if task == "token-classification":
        missing = [example.id for example in examples if example.words is None]
        if missing:
            raise CorpusError(f"row '{missing[0]}' has no words, which a teacher for {task} tags")
        return TaskLabels(none, tags=_indices(examples, label_names))
    return TaskLabels(none)


def _indices(examples: Sequence[Example], label_names: Sequence[str]) -> list[list[int] | None]:
    """Of each row the indices of its several labels."""
    flat = [Example(row.id, row.text, label=item) for row in examples for item in _several(row.label)]
    numbers = iter(encode_labels(flat, label_names))
    return [None if row.label is None else [next(numbers) for _ in _several(row.label)] for row in examples]


def _several(label: Label) -> Sequence[int | str | float]:
    return label if isinstance(label, tuple) else [] if label is None else [label]


def _vectors(task: Task, examples: Sequence[Example], label_names: Sequence[str]) -> np.ndarray:
    """(N, C) float32: 1 for each class of a multi-label row, or the numbers of regression; NaN in rows without."""
    out = np.full((len(examples), len(label_names)), np.nan, np.float32)
    if task == "multi-label-classification":
        for row, classes in enumerate(_indices(examples, label_names)):
            if classes is not None:
                out[row] = 0
                out[row, classes] = 1
        return out
    for row, example in enumerate(examples):
        if example.label is not None:
            numbers = _several(example.label)
            if len(numbers) != len(label_names):
                raise CorpusError(
                    f"row '{example.id}' has {len(numbers)} numbers for the teacher's {len(label_names)} outputs"
                )
            out[row] = numbers
    return out


# ------------------------------------------------------------------------------------------------------------ tokens


def mask_often(corpus: Corpus, masking: Masking) -> Corpus:
    """`corpus` with `masking.times` copies of every row, each to be masked in its own way; ids 'x#0', 'x#1', …"""
    if masking.times == 1:
        return corpus
    rows: Sequence[Example] = RepeatedRows(corpus.examples, masking.times)
    return replace(corpus, examples=rows if isinstance(corpus.examples, SpooledRows) else list(rows))


def tokenize_task(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    labels: TaskLabels,
    masking: Masking | None = None,
    model: PreTrainedModel | None = None,
) -> Tokenized:
    """Tokenise `examples`, each at most `max_length` tokens, with the labels that a teacher for `task` has.

    Words that have tags are cut at words; a word's tag is that of its first piece. A language model's labels are the
    tokens themselves: hidden ones as `masking` says, the next ones, or those of the target text. What stands before
    that is the `model`'s to say, which only seq2seq-lm needs.
    """
    if task == "token-classification":
        return _tokenize_words(tokenizer, examples, max_length=max_length, tags=labels.tags or [])
    tokenized = tokenize(tokenizer, examples, max_length=max_length, labels=labels.classes, targets=task == SEQ2SEQ)
    rows = tokenized.examples
    if labels.vectors is not None:
        rows = [replace(row, labels=vector) for row, vector in zip(rows, labels.vectors, strict=True)]
    elif task == "causal-lm":
        rows = [replace(row, labels=np.append(row.input_ids[1:], NO_LABEL).astype(np.int32)) for row in rows]
    elif task == "masked-lm":
        rows = [mask_tokens(row, tokenizer, masking or Masking(), labels.rates) for row in rows]
    elif task == SEQ2SEQ:
        assert model is not None
        rows = [replace(row, decoder_start=_decoder_start(model, row, len(tokenizer))) for row in rows]
    return Tokenized(rows, tokenized.truncated)


def _decoder_start(model: PreTrainedModel, row: TokenizedExample, vocab_size: int) -> int:
    """What the decoder of `model` reads before the labels of `row`: by its own shift, which for mBART is a language.

    CorpusError where the target is empty, TeacherError where the model does not shift by one.
    """
    assert row.labels is not None
    if not len(row.labels):
        raise CorpusError(f"row '{row.id}': no token comes of its target text '{row.target}'")
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    start = getattr(model.config, "decoder_start_token_id", None)
    if shift is not None:  # M2M100 and its kin have none: they do it inside
        try:
            shifted = shift(labels=torch.from_numpy(row.labels.astype(np.int64))[None])[0].tolist()
        except (ValueError, TypeError, RuntimeError):  # its config names no start
            shifted = []
        start = shifted[0] if shifted and shifted[1:] == row.labels[:-1].tolist() else None
    if start is None or not 0 <= start < vocab_size:
        raise TeacherError(
            f"{type(model).__name__} does not say which token of the tokenizer's its decoder begins with: set "
            f'"decoder_start_token_id" in its config.json'
        )
    return int(start)


def masking_rates(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, masking: Masking, *, max_length: int
) -> np.ndarray | None:
    """(V,) how likely each token is masked: ∝ count^-smoothing and at most 1, of the corpus's tokens `rate` on average.

    As DistilBERT chooses (Sanh et al. 2019), whose code draws just so many of a batch's tokens, and counts a token that
    never comes once. None without smoothing: then all are masked alike.
    """
    if not masking.smoothing:
        return None
    counts = np.zeros(len(tokenizer), np.int64)
    for start in range(0, len(corpus.examples), _AT_ONCE):
        rows = tokenize(tokenizer, corpus.examples[start : start + _AT_ONCE], max_length=max_length).examples
        counts += np.bincount(np.concatenate([row.input_ids for row in rows]), minlength=len(counts))
    counts[tokenizer.all_special_ids] = 0
    rates = np.maximum(counts, 1) ** -masking.smoothing / 2  # below 1, and scaled at once
    for _ in range(_ROUNDS):  # what is cut off at 1 is shared out among the others
        free = np.where(rates < 1, rates * counts, 0).sum()
        wanted = masking.rate * counts.sum() - counts[rates >= 1].sum()
        if free > 0 and wanted > 0:
            rates = np.where(rates < 1, rates * (wanted / free), 1)
    return np.minimum(rates, 1)


def mask_tokens(
    row: TokenizedExample, tokenizer: PreTrainedTokenizerBase, masking: Masking, rates: np.ndarray | None = None
) -> TokenizedExample:
    """`row` with a share of its tokens hidden, and what they were as `labels`.

    As BERT does (Devlin et al. 2019, section 3.1): of the chosen tokens 80 % become the mask token, 10 % a random one,
    10 % stay. At least one is chosen where there is any but special ones. All follows from `masking.seed` and the id.
    A token is chosen with the probability `masking.rate`, or its own of `rates` (V,).
    With `masking.targets` "all" the other tokens, special ones too, are targets without a label: UNMASKED.
    """
    rng = np.random.default_rng([masking.seed, xxhash.xxh3_64_intdigest(row.id.encode())])
    special = tokenizer.get_special_tokens_mask(row.input_ids.tolist(), already_has_special_tokens=True)
    free = np.flatnonzero(np.array(special) == 0)
    draws = rng.random(len(free))
    if rates is not None:
        draws *= masking.rate / rates[row.input_ids[free]]
    chosen = free[draws < masking.rate]
    if not len(chosen) and len(free):
        chosen = free[[int(draws.argmin())]]
    other = UNMASKED if masking.targets == "all" else NO_LABEL
    labels, ids, kind = np.full(len(row.input_ids), other, np.int32), row.input_ids.copy(), rng.random(len(chosen))
    labels[chosen] = ids[chosen]
    ids[chosen[kind < 0.8]] = tokenizer.mask_token_id
    others = chosen[(kind >= 0.8) & (kind < 0.9)]
    ids[others] = rng.integers(0, len(tokenizer), len(others))
    return replace(row, input_ids=ids, labels=labels)


def check_tokenizer(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """TeacherError where a tokenizer lacks what `task` needs."""
    if task == "masked-lm" and tokenizer.mask_token_id is None:
        raise TeacherError("this tokenizer has no mask token, so nothing can be masked: try --task causal-lm")
    if task == "token-classification" and not tokenizer.is_fast:
        raise TeacherError("token classification needs a fast tokenizer, which knows what word a token is of")


def _tokenize_words(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    tags: Sequence[list[int] | None],
) -> Tokenized:
    words = [list(example.words or ()) for example in examples]
    try:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, padding=False)
    except AssertionError as error:  # byte-level tokenizers: a word in the middle needs a space before it
        raise TeacherError(
            f"this tokenizer does not take words: {error}. Save it with add_prefix_space set to true"
        ) from None
    types, rows = encoded.get("token_type_ids"), []
    for i, example in enumerate(examples):
        ids = np.asarray(encoded["input_ids"][i], dtype=np.int32)
        kinds = None if types is None else np.asarray(types[i], dtype=np.uint8)
        labels = align_tags(tags[i], encoded.word_ids(i))
        rows.append(TokenizedExample(example.id, ids, kinds, NO_LABEL, example.text, None, labels))
    return Tokenized(rows, sum(bool(encoding.overflowing) for encoding in encoded.encodings or []))


def align_tags(tags: Sequence[int] | None, words: Sequence[int | None]) -> np.ndarray:
    """(L,) int32: the tag of each token that begins a word, NO_LABEL elsewhere. `words`: each token's word, or None."""
    labels, before = np.full(len(words), NO_LABEL, np.int32), None
    for place, word in enumerate(words):
        if tags is not None and word is not None and word != before:
            labels[place] = tags[word]
        before = word
    return labels


def has_label_names(task: Task) -> bool:
    """Whether a teacher for `task` has classes or targets with names."""
    return task not in (*LANGUAGE_MODELS, "sentence-embedding")
