"""Rows in, token batches out: tokenise once, group by length, pad only inside a batch.

`tokenize` turns examples into `TokenizedExample`s as long as they are; `batches_by_length` says which of them go
through a model together; `pad_batch` makes the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from softlabels.errors import ConfigError
from softlabels.types import NO_LABEL, Example, TokenBatch, TokenizedExample

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LONGEST_DEFAULT = 512  # tokens; the default limit where a model would take more
TARGET_FOLLOWS = (-1).to_bytes(
    4, "little", signed=True
)  # no token's id: between text and target, where these are hashed


@dataclass(frozen=True, slots=True)
class Tokenized:
    """What `tokenize` returns: the examples, in order, and how many were cut to `max_length`."""

    examples: list[TokenizedExample]
    truncated: int


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    labels: Sequence[int] | None = None,
    targets: bool = False,
) -> Tokenized:
    """Tokenise `examples`, each cut to `max_length` tokens (special ones included), pairs longest first.

    `labels` are class indices (NO_LABEL for none), one an example; without them every row is unlabelled. With
    `targets` each target text is tokenised as its language is, cut to as many tokens, and becomes the row's `labels`.
    """
    if not examples:
        return Tokenized([], 0)
    pairs = [example.text_b or "" for example in examples] if any(e.text_b for e in examples) else None
    encoded = tokenizer(
        [example.text for example in examples],
        pairs,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
    )
    types = encoded.get("token_type_ids")
    cut = _which_were_cut(
        encoded,
        lambda: tokenizer([example.text for example in examples], pairs, truncation=False, padding=False),
        max_length,
    )
    wanted: list[np.ndarray | None] = [None] * len(examples)
    if targets:
        texts = [example.target or "" for example in examples]
        written = tokenizer(text_target=texts, truncation=True, max_length=max_length, padding=False)
        short = _which_were_cut(
            written, lambda: tokenizer(text_target=texts, truncation=False, padding=False), max_length
        )
        cut = [source or target for source, target in zip(cut, short, strict=True)]
        wanted = [np.asarray(ids, dtype=np.int32) for ids in written["input_ids"]]
    rows = [
        TokenizedExample(
            id=example.id,
            input_ids=np.asarray(encoded["input_ids"][i], dtype=np.int32),
            token_type_ids=None if types is None else np.asarray(types[i], dtype=np.uint8),
            label=NO_LABEL if labels is None else labels[i],
            text=example.text,
            text_b=example.text_b,
            labels=wanted[i],
            target=example.target,
        )
        for i, example in enumerate(examples)
    ]
    return Tokenized(rows, sum(cut))


def _which_were_cut(encoded: Any, whole: Callable[[], Any], max_length: int) -> list[bool]:
    """Of each row whether it was longer than `max_length`; `whole` tokenises all of them again, uncut."""
    if encoded.encodings is not None:  # a fast tokenizer says itself what it cut
        return [bool(encoding.overflowing) for encoding in encoded.encodings]
    return [len(ids) > max_length for ids in whole()["input_ids"]]


def token_hash(example: TokenizedExample) -> int:
    """xxh3-64 of a row's content, by which rows join; the cache format says of which bytes of it."""
    if example.content is not None:
        return example.content.hash()
    hasher = xxhash.xxh3_64(example.input_ids.astype("<i4").tobytes())
    if example.token_type_ids is not None:
        hasher.update(example.token_type_ids.tobytes())
    if example.decoder_start is not None and example.labels is not None:
        hasher.update(TARGET_FOLLOWS + example.labels.astype("<i4").tobytes())
    return hasher.intdigest()


def shift_right(labels: np.ndarray, starts: np.ndarray, *, out: np.ndarray, pad_token_id: int) -> None:
    """Fill `out` (B, M) with what a decoder reads: `starts` (B,), then `labels` (B, M) but the last, padding padded."""
    out[:, 0] = starts
    out[:, 1:] = labels[:, :-1]
    out[:, 1:][labels[:, :-1] == NO_LABEL] = pad_token_id


def count_row_targets(example: TokenizedExample) -> int:
    """How many tokens of a row are targets: have a label, or UNMASKED in its place."""
    labels = example.labels
    return 0 if labels is None or labels.dtype != np.int32 else int(np.count_nonzero(labels != NO_LABEL))


def count_tokens(example: TokenizedExample) -> int:
    """What a row counts for in a batch: its tokens, or those of its target text where these are more.

    Of an image as many as it has room for, where these are more.
    """
    tokens = len(example.input_ids)
    if example.decoder_start is not None:
        return max(tokens, count_row_targets(example))
    return tokens if example.content is None else max(tokens, example.content.tokens)


def batches_by_length(
    lengths: Sequence[int] | np.ndarray, *, batch_tokens: int | None = None, batch_size: int | None = None
) -> list[np.ndarray]:
    """Row numbers grouped into batches of similar length, longest first.

    A batch holds at most `batch_size` rows and at most `batch_tokens` tokens, padding counted. Longest first, so
    that a batch too large for memory fails at the start and not after an hour. The sort is stable: the same lengths
    give the same batches on every machine.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if batch_tokens is not None and len(lengths) and batch_tokens < lengths.max():
        raise ConfigError(
            f"--batch-tokens {batch_tokens} is below the longest row, {lengths.max()} tokens: "
            f"give at least that many, or a smaller --max-length"
        )
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = len(order) - start
        if batch_tokens is not None:
            size = min(size, batch_tokens // max(int(lengths[order[start]]), 1))
        if batch_size is not None:
            size = min(size, batch_size)
        batches.append(order[start : start + size])
        start += size
    return batches


def shuffled_batches(
    lengths: Sequence[int] | np.ndarray, *, batch_size: int, rng: np.random.Generator, window: int = 50
) -> list[np.ndarray]:
    """Row numbers for one epoch of training: random, yet rows of a batch have similar lengths.

    The rows are shuffled, sorted by length only inside windows of `window` batches, and the batches shuffled again: a
    row can meet any other, and little is padded. Everything follows from `rng`.
    """
    lengths = np.asarray(lengths)
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), window * batch_size):
        chunk = order[start : start + window * batch_size]
        chunk[:] = chunk[np.argsort(lengths[chunk], kind="stable")]  # in place: batches are views of one array
        batches += [chunk[first : first + batch_size] for first in range(0, len(chunk), batch_size)]
    return [batches[number] for number in rng.permutation(len(batches))]


def windowed_batches(
    lengths: Sequence[int] | np.ndarray,
    shards: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    rng: np.random.Generator,
    window: int,
    group: int = 50,
) -> list[np.ndarray]:
    """`shuffled_batches` with rows of only about `window` of their `shards` at a time, for slow disks and short memory.

    The shards are put in random order round a circle, and every row is set back by a random part of `window` shards;
    then the rows are taken as they come. So every row comes once, rows of exactly `window` shards are mixed at any
    moment, the ends of the epoch included, and a row's place is uniform over `window` shards' worth of rows.

    How well it mixes: two rows of a batch are of different shards with a probability of at least 1 − 1/W, W being
    `window` (a full shuffle has 1 − 1/S of all S shards; W ≥ S is one), for shards of equal size with many rows.
    Which shards meet changes with every epoch: two shards share a window in an epoch with a probability of
    2·(W − 1) / (S − 1), at most 1. Lengths are grouped inside `group` batches, as in `shuffled_batches`, and only
    those batches are shuffled again, so a batch is never more than `group` batches from its place.
    """
    lengths, shards = np.asarray(lengths), np.asarray(shards)
    known, which = np.unique(shards, return_inverse=True)
    window = min(max(window, 1), len(known))
    place = rng.permutation(len(known))[which] + window * rng.random(len(which))
    order = np.argsort(place % len(known), kind="stable")
    batches = []
    for start in range(0, len(order), group * batch_size):
        chunk = order[start : start + group * batch_size]
        chunk[:] = chunk[np.argsort(lengths[chunk], kind="stable")]
        parts = [chunk[first : first + batch_size] for first in range(0, len(chunk), batch_size)]
        batches += [parts[number] for number in rng.permutation(len(parts))]
    return batches


def pad_batch(examples: Sequence[TokenizedExample], *, pad_token_id: int) -> TokenBatch:
    """Right-padded tensors of `examples`, as long as the longest of them."""
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    ids = np.full(shape, pad_token_id, dtype=np.int64)  # (B, L)
    mask = np.zeros(shape, dtype=np.int64)  # (B, L)
    has_types = examples[0].token_type_ids is not None
    types = np.zeros(shape, dtype=np.int64) if has_types else None  # (B, L)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = example.input_ids
        mask[row, :length] = 1
        if types is not None and example.token_type_ids is not None:
            types[row, :length] = example.token_type_ids
    if all(example.decoder_start is None for example in examples):
        labels, decoder = _pad_labels(examples, longest), None
    else:
        labels = _pad_labels(examples, max(count_row_targets(example) for example in examples))
        decoder = torch.empty_like(labels)  # (B, M)
        starts = np.array([example.decoder_start for example in examples], np.int64)
        shift_right(labels.numpy(), starts, out=decoder.numpy(), pad_token_id=pad_token_id)
    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        None if types is None else torch.from_numpy(types),
        labels,
        decoder,
    )


def longest_input(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """How many tokens the model takes: the least of what its tokenizer and its position table allow."""
    limits = [limit for limit in (tokenizer.model_max_length,) if limit < 1_000_000]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its kin number positions from pad_token_id + 1, so two rows of their table are never used
        offset = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
        limits.append(positions - offset)
    return min(limits) if limits else LONGEST_DEFAULT


def resolve_max_length(asked: int | None, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """`--max-length` checked against the model; by default the model's own limit, at most LONGEST_DEFAULT."""
    limit = longest_input(tokenizer, config)
    if asked is None:
        return min(limit, LONGEST_DEFAULT)
    if asked > limit:
        raise ConfigError(f"--max-length {asked} is more than this model takes: at most {limit}")
    if asked < 4:
        raise ConfigError(f"--max-length {asked} leaves no room for text beside the special tokens: at least 4")
    return asked


OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet", "longformer"}


def _pad_labels(examples: Sequence[TokenizedExample], longest: int) -> torch.Tensor:
    """(B,) a class, (B, C) numbers, or (B, `longest`) a label a token."""
    rows = [example.labels for example in examples if example.labels is not None]
    if not rows:
        return torch.tensor([example.label for example in examples], dtype=torch.int64)
    if rows[0].dtype == np.float32:
        return torch.from_numpy(np.stack(rows))
    labels = torch.full((len(rows), longest), NO_LABEL, dtype=torch.int64)
    for i, row in enumerate(rows):
        labels[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return labels
