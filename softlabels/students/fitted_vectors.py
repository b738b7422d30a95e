"""Word vectors fitted on the training rows where none are given: token sequences come in, a table comes out.

Singular vectors of the positive pointwise mutual information of words and their neighbours: Levy, Goldberg and Dagan
2015, 'Improving Distributional Similarity with Lessons Learned from Word Embeddings', with a window of 5 words to
either side weighed by 1/distance, context distribution smoothing of 0.75, and the square roots of the singular values.
The same rows give the same vectors: nothing is drawn but the SVD's first guess, from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.utils.extmath import randomized_svd

from softlabels.progress import progress
from softlabels.students.word_vectors import WordVectors

WINDOW = 5
SMOOTHING = 0.75
SPREAD = 0.4  # standard deviation of a value, like that of GloVe's: what the LSTM's first weights are made for
_CHUNK = 1 << 20  # words that are counted at once


def fit_word_vectors(sequences: Iterable[np.ndarray], *, rows: int, width: int) -> WordVectors:
    """(rows, width) from sequences of row numbers, each as a student reads a text.

    A row that has no neighbour in any of them has no vector. Fewer rows than `width` leave the last values at zero.
    """
    with progress(None, description="fit word vectors", unit="words") as update:
        counts = scipy.sparse.csr_array((rows, rows), dtype=np.float64)
        for words, texts in _chunks(sequences):
            counts = counts + _count_neighbours(words, texts, rows)
            update(len(words))
        information = _positive_information(counts + counts.T)
        found = np.diff(information.indptr) > 0
        vectors = np.zeros((rows, width), dtype=np.float32)
        kept = min(width, rows - 1)
        if found.any() and kept > 0:
            left, values, _ = randomized_svd(information, n_components=kept, n_iter=4, random_state=0)
            vectors[:, :kept] = left * np.sqrt(values)
            vectors[~found] = 0
            vectors *= SPREAD / max(float(vectors[found].std()), 1e-12)
    return WordVectors(vectors, found)


def _chunks(sequences: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Words one after the other, and which text each is of: about _CHUNK at a time."""
    parts: list[np.ndarray] = []
    size = 0
    for sequence in sequences:
        parts.append(sequence)
        size += len(sequence)
        if size >= _CHUNK:
            yield _join(parts)
            parts, size = [], 0
    if size:
        yield _join(parts)


def _join(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    texts = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return np.concatenate(parts).astype(np.int64), texts


def _count_neighbours(words: np.ndarray, texts: np.ndarray, rows: int) -> Any:
    """(rows, rows): how often a word has another to its right within the window, each weighed by 1/distance."""
    counts = scipy.sparse.csr_array((rows, rows), dtype=np.float64)
    for distance in range(1, WINDOW + 1):
        near = texts[:-distance] == texts[distance:]
        left, right = words[:-distance][near], words[distance:][near]
        weights = np.full(len(left), 1 / distance)
        counts = counts + scipy.sparse.coo_array((weights, (left, right)), (rows, rows)).tocsr()
    return counts


def _positive_information(counts: Any) -> Any:
    """max(0, log p(w, c) / (p(w) p(c)^0.75 / Σ p^0.75)) of a symmetric matrix of counts, sparse."""
    often = np.asarray(counts.sum(axis=1)).ravel()
    smooth = often**SMOOTHING
    smooth /= max(smooth.sum(), 1e-300)
    pairs = counts.tocoo()
    first, second = pairs.coords
    information = np.log(pairs.data / (often[first] * smooth[second]))
    positive = information > 0
    return scipy.sparse.csr_array((information[positive], (first[positive], second[positive])), counts.shape)
