"""Parties of a federation: labelled rows come in, disjoint parts go out, in which classes are of uneven number.

The share of each class that a party gets is drawn from a Dirichlet distribution, as in Hsu et al. 2019
(arXiv:1909.06335) and in FedDF (Lin et al. 2020, section 4.1): a concentration of 100 gives all parties nearly the same
mix, one of 0.1 leaves most of a class with one party.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from softlabels.corpus import Corpus, check_trainable, encode_labels
from softlabels.errors import CorpusError
from softlabels.types import NO_LABEL

_TRIES = 200


def split_among_parties(corpus: Corpus, count: int, *, skew: float, seed: int, rows: int | None = None) -> list[Corpus]:
    """The labelled rows of `corpus` in `count` disjoint parts, each of `rows` at the most, in the corpus's order.

    Drawn again until every part has two classes and two rows of each, which training and its validation ask for;
    CorpusError where that is not to be had.
    """
    check_trainable(corpus)
    names = corpus.label_names or []
    labels = np.array(encode_labels(corpus.examples, names))
    rng = np.random.default_rng(seed)
    for _ in range(_TRIES):
        parts = [np.sort(part) for part in _draw(labels, len(names), count, skew=skew, rng=rng)]
        if rows is not None:
            parts = [np.sort(rng.permutation(part)[:rows]) for part in parts]
        if all(_is_enough(labels[part]) for part in parts):
            return [
                replace(corpus, examples=[corpus.examples[row] for row in part], split=f"part {number} of {count}")
                for number, part in enumerate(parts, start=1)
            ]
    raise CorpusError(
        f"corpus {corpus.source}: its {int((labels != NO_LABEL).sum()):,} labelled rows of {len(names)} classes can't "
        f"be split among {count} parties so that each has two classes: give fewer parties, a larger skew than {skew:g} "
        f"(it is a concentration: larger is more even), or more rows"
    )


def _draw(labels: np.ndarray, classes: int, count: int, *, skew: float, rng: np.random.Generator) -> list[np.ndarray]:
    parts: list[list[np.ndarray]] = [[] for _ in range(count)]
    for number in range(classes):
        rows = rng.permutation(np.flatnonzero(labels == number))
        shares = rng.dirichlet(np.full(count, skew))
        cuts = (np.cumsum(shares)[:-1] * len(rows)).round().astype(int)
        for part, chosen in zip(parts, np.split(rows, cuts), strict=True):
            part.append(chosen)
    return [np.concatenate(part) for part in parts]


def _is_enough(labels: np.ndarray) -> bool:
    counts = np.bincount(labels) if len(labels) else np.zeros(1, int)
    return int((counts >= 2).sum()) >= 2
