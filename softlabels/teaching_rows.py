"""Which rows of a cache teach a student, and which tell how well it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softlabels.cache import Cache
from softlabels.corpus import Corpus, encode_labels
from softlabels.errors import CacheError, CorpusError
from softlabels.objective import Objective
from softlabels.tokens import tokenize
from softlabels.types import NO_LABEL, TokenizedExample


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of one phase."""

    train: np.ndarray  # row numbers of the cache
    held_out: np.ndarray
    corpus: list[TokenizedExample]  # of the validation corpus, empty without one


def teaching_rows(cache: Cache, objective: Objective, *, first: int | None = None) -> np.ndarray:
    """The rows that have something to teach to `objective`, among the `first` so many of the cache where that is given.

    CacheError where there are none.
    """
    rows = _teaching_rows(cache, objective)
    kept = rows if first is None else rows[rows < first]
    if not len(kept):
        raise CacheError(
            f"none of the first {first:,} rows of cache {cache.shown} can teach this; the first that can is number "
            f"{rows[0] + 1:,}. Give more --rows"
        )
    return kept


def _teaching_rows(cache: Cache, objective: Objective) -> np.ndarray:
    if cache.rows < 2:
        raise CacheError(f"cache {cache.shown} has one row only: there is nothing to learn from it. Dump more rows")
    if objective.language:
        targets = np.flatnonzero(labelled_rows(cache))
        if not len(targets):
            raise CacheError(f"no row of cache {cache.shown} has a token to predict: dump longer texts")
        return targets
    labelled = np.flatnonzero(labelled_rows(cache)) if objective.needs_labels else np.array([], np.int64)
    if objective.needs_labels and not len(labelled):
        raise CacheError(
            f"loss 'ce' needs labels; no row of cache {cache.shown} has one. Leave --loss ce out, or dump labelled rows"
        )
    if objective.needs_teacher:
        return np.arange(cache.rows)
    if len(np.unique(cache.labels[labelled])) < 2:
        raise CacheError(
            f"the labelled rows of cache {cache.shown} are all of one class: there is nothing to tell apart"
        )
    return labelled


def labelled_rows(cache: Cache) -> np.ndarray:
    """(N,) bool: rows with a class, or with tokens to predict."""
    return cache.labels != NO_LABEL if cache.targets is None else cache.targets > 0


def split_rows(
    cache: Cache, rows: Sequence[np.ndarray], *, validation: Corpus | None, share: float, seed: int
) -> list[Split]:
    """The split of each phase, which sees `rows`: a row that is held out in one phase is held out in all.

    Nothing is held out where there is a `validation` corpus, whose rows without a label are left out.
    """
    if validation is not None:
        corpus = _tokenized(cache, validation)
        return [Split(phase, np.array([], dtype=np.int64), corpus) for phase in rows]
    every = np.unique(np.concatenate(rows))
    order = np.random.default_rng(seed).permutation(every)
    held_out = np.zeros(cache.rows, dtype=bool)
    held_out[order[: int(len(every) * share)]] = True
    splits = [Split(phase[~held_out[phase]], phase[held_out[phase]], []) for phase in rows]
    if not all(len(split.train) for split in splits):
        raise CacheError(
            f"all labelled rows of cache {cache.shown} are held out: give --eval, or a smaller --validation"
        )
    return splits


def check_labelled(cache: Cache, corpus: Corpus, name: str) -> None:
    """CorpusError where no row of `corpus`, given as `name`, has a label, or one has a label that no class is."""
    if all(label == NO_LABEL for label in encode_labels(corpus.examples, cache.label_names)):
        raise CorpusError(f"{name} {corpus.source} has no labelled row to score students on: leave it out, or label it")


def _tokenized(cache: Cache, validation: Corpus) -> list[TokenizedExample]:
    labels = encode_labels(validation.examples, cache.label_names)
    kept = [(example, label) for example, label in zip(validation.examples, labels, strict=True) if label != NO_LABEL]
    if not kept:
        raise CorpusError(f"validation corpus {validation.source} has no labelled row: leave --eval out, or label it")
    tokens = tokenize(
        cache.tokenizer(),
        [example for example, _ in kept],
        max_length=cache.manifest.dump.max_length,
        labels=[label for _, label in kept],
    )
    return tokens.examples
