"""The linear student: TF-IDF of words and characters, and a linear map to the logits (scikit-learn).

Fitted to a teacher's logits it is a ridge regression with one output a class; to hard labels alone, a
logistic regression on the same features. It reads the text itself, without the teacher's tokenizer; runs of
characters serve languages that put no spaces between words.

It is saved by skops as plain numbers and text, and nothing else is accepted back: no class is named in the
file, so no code can hide there. (The fitted scikit-learn objects themselves would take 40 times as long to
load.)
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from softlabels.config import Strict, build_options
from softlabels.errors import ConfigError, StudentError
from softlabels.types import NO_LABEL

MODEL_FILE = "model.skops"
FORMAT, VERSION = "softlabels-linear", 1
ABSENT_CLASS_LOGIT = -1e4  # of a class that no training row has: never predicted, and exp() of it is 0
WORD_PATTERN = r"(?u)\b\w+\b"  # words of one letter too
ROWS_AT_ONCE = 4096  # when predicting


class LinearOptions(Strict):
    """What a user may choose. An n-gram counts where at least `min_df` texts have it."""

    word_ngrams: int = Field(default=2, ge=0, le=5)  # longest run of words; 0 for none
    char_ngrams: int = Field(default=4, ge=0, le=8)  # longest run of characters inside a word; 0 for none
    max_features: int = Field(default=25_000, ge=1)  # the most frequent ones, of words and of characters each
    min_df: int = Field(default=2, ge=1)
    alpha: float = Field(default=1.0, gt=0)  # ridge: strength of the penalty, to a teacher's logits
    c: float = Field(default=10.0, gt=0)  # logistic regression: inverse strength, to hard labels


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The n-grams of one kind, in the order of their columns, and the weight of each."""

    analyzer: Literal["word", "char_wb"]
    longest: int
    terms: list[str]
    idf: np.ndarray  # (F,) float32


@dataclass(frozen=True)
class LinearStudent:
    """Logits = features @ weights + bias. Columns are the cache's classes, whichever of them were seen."""

    vocabularies: list[Vocabulary]
    paired: bool  # the rows are pairs: see `_features`
    weights: np.ndarray  # (F, C) float32
    bias: np.ndarray  # (C,) float32

    @property
    def parameters(self) -> int:
        """Numbers that were fitted: weights, biases, and one inverse document frequency a term."""
        return self.weights.size + self.bias.size + sum(len(part.terms) for part in self.vocabularies)

    @cached_property
    def _vectorizers(self) -> list[Any]:
        return [_vectorizer(part) for part in self.vocabularies]

    def logits(self, texts: Sequence[str], *, pairs: Sequence[str | None] | None = None) -> np.ndarray:
        """Logits (N, C) float32 of `texts`, or of pairs where `pairs` holds each row's second text."""
        found = [np.zeros((0, len(self.bias)), dtype=np.float32)]
        for start in range(0, len(texts), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            second = pairs[rows] if pairs is not None else None
            features = _features(self._vectorizers, texts[rows], second, paired=self.paired)
            found.append(np.asarray(features @ self.weights, dtype=np.float32) + self.bias)
        return np.concatenate(found)

    def save(self, folder: Path) -> None:
        """Write model.skops into `folder`, which exists."""
        import skops.io

        state = {
            "format": FORMAT,
            "version": VERSION,
            "paired": self.paired,
            "vocabularies": [
                {
                    "analyzer": part.analyzer,
                    "longest": part.longest,
                    "terms": "\n".join(part.terms),  # no term has white space but single blanks
                    "idf": part.idf,
                }
                for part in self.vocabularies
            ],
            "weights": self.weights,
            "bias": self.bias,
        }
        skops.io.dump(state, folder / MODEL_FILE, compression=zipfile.ZIP_DEFLATED)


def fit_linear(
    texts: Sequence[str],
    *,
    num_labels: int,
    logits: np.ndarray | None = None,
    labels: Sequence[int] | np.ndarray | None = None,
    pairs: Sequence[str | None] | None = None,
    options: dict[str, Any] | None = None,
) -> LinearStudent:
    """Fit to the teacher's `logits` (N, C), or to `labels` (N,) alone; exactly one of them is given.

    Rows whose label is NO_LABEL are left out. With labels, a class that no row has gets the logit
    ABSENT_CLASS_LOGIT everywhere. The same rows give the same student; there is no seed.
    """
    chosen = read_linear_options(options or {})
    if (logits is None) == (labels is None):
        raise StudentError("the linear student learns from the teacher's logits or from labels: give one of them")
    if labels is not None:
        labels = np.asarray(labels)
        rows = np.flatnonzero(labels != NO_LABEL).tolist()
        labels = labels[rows]
        texts = [texts[row] for row in rows]
        pairs = [pairs[row] for row in rows] if pairs is not None else None
    if not texts:
        raise StudentError("the linear student has no row to learn from")
    paired = pairs is not None and any(pairs)
    vocabularies = _fit_vocabularies([*texts, *(pair or "" for pair in pairs)] if paired and pairs else texts, chosen)
    features = _features([_vectorizer(part) for part in vocabularies], texts, pairs, paired=paired)
    if logits is not None:
        weights, bias = _fit_logits(features, _check_logits(logits, len(texts), num_labels), chosen)
    else:
        assert isinstance(labels, np.ndarray)
        weights, bias = _fit_labels(features, labels, num_labels, chosen)
    return LinearStudent(vocabularies, paired, weights, bias)


def read_linear_options(options: dict[str, Any]) -> LinearOptions:
    """The user's options checked; StudentError for an unknown key or a value that cannot be."""
    try:
        chosen = build_options(LinearOptions, options, where="student 'linear'")
    except ConfigError as error:
        raise StudentError(str(error)) from None
    if not chosen.word_ngrams and not chosen.char_ngrams:
        raise StudentError("student 'linear' needs features: word_ngrams or char_ngrams above 0")
    return chosen


def load_linear(folder: Path) -> LinearStudent:
    """The student in `folder`. StudentError where the file is damaged or holds more than numbers and text."""
    import skops.io

    path = folder / MODEL_FILE
    try:
        # an object of any class but the plain ones is refused, also those that skops itself would trust
        state = skops.io.loads(_only_plain(path.read_bytes(), path), trusted=[])
        return _from_state(state)
    except StudentError:
        raise
    except Exception as error:  # a damaged zip, schema or array fails in a dozen ways inside skops
        raise StudentError(f"the student in {path} is damaged: {error}") from None


# ------------------------------------------------------------------------------------------------ features


def _fit_vocabularies(texts: Sequence[str], options: LinearOptions) -> list[Vocabulary]:
    wanted: list[tuple[Literal["word", "char_wb"], int]] = [
        ("word", options.word_ngrams),
        ("char_wb", options.char_ngrams),
    ]
    found = [_fit_vocabulary(texts, analyzer, longest, options) for analyzer, longest in wanted if longest]
    vocabularies = [part for part in found if part is not None]
    if not vocabularies:
        raise StudentError(
            f"the linear student finds no word or character run that {options.min_df} texts share: "
            f"give it more rows, or option min_df=1"
        )
    return vocabularies


def _fit_vocabulary(
    texts: Sequence[str], analyzer: Literal["word", "char_wb"], longest: int, options: LinearOptions
) -> Vocabulary | None:
    """The terms of `texts` and their weights; None where there are none, like words in a text without
    spaces.
    """
    vectorizer = _vectorizer(Vocabulary(analyzer, longest, [], np.zeros(0, dtype=np.float32)))
    vectorizer.set_params(min_df=min(options.min_df, len(texts)), max_features=options.max_features)
    try:
        vectorizer.fit(texts)
    except ValueError as error:
        if "empty vocabulary" in str(error) or "no terms remain" in str(error):
            return None
        raise
    return Vocabulary(analyzer, longest, vectorizer.get_feature_names_out().tolist(), vectorizer.idf_)


def _vectorizer(part: Vocabulary) -> Any:
    """scikit-learn's vectorizer with this vocabulary; still to be fitted where it has none."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer=part.analyzer,
        ngram_range=(1, part.longest),
        token_pattern=WORD_PATTERN if part.analyzer == "word" else None,
        sublinear_tf=True,
        dtype=np.float32,
        vocabulary={term: column for column, term in enumerate(part.terms)} if part.terms else None,
    )
    if part.terms:
        vectorizer.idf_ = part.idf
    return vectorizer


def _features(
    vectorizers: list[Any], texts: Sequence[str], pairs: Sequence[str | None] | None, *, paired: bool
) -> sparse.csr_matrix:
    """TF-IDF (N, F) float32. A pair gives three parts: the first text, the second, and of the second only
    what the first doesn't have, which is what a linear model can't see by itself.
    """

    def transform(rows: Sequence[str]) -> sparse.csr_matrix:
        return sparse.hstack([vectorizer.transform(rows) for vectorizer in vectorizers]).tocsr()

    first = transform(texts)
    if not paired:
        return first
    second = transform([pair or "" for pair in pairs] if pairs is not None else [""] * len(texts))
    new = second - second.multiply(first > 0)
    return sparse.hstack([first, second, new]).tocsr()


# ------------------------------------------------------------------------------------------------- fitting


def _check_logits(logits: np.ndarray, rows: int, num_labels: int) -> np.ndarray:
    if logits.shape != (rows, num_labels):
        raise StudentError(f"the teacher's logits have shape {logits.shape}; {rows} rows need ({rows}, {num_labels})")
    if not np.isfinite(logits).all():
        raise StudentError("the teacher's logits are not all finite: no student can learn from them")
    return logits.astype(np.float32)


def _fit_logits(
    features: sparse.csr_matrix, logits: np.ndarray, options: LinearOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, C) and bias (C,) that come closest to the teacher's logits (N, C)."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=options.alpha, solver="sparse_cg", tol=1e-3).fit(features, logits)
    return np.ascontiguousarray(model.coef_.T, dtype=np.float32), model.intercept_.astype(np.float32)


def _fit_labels(
    features: sparse.csr_matrix, labels: np.ndarray, num_labels: int, options: LinearOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, C) and bias (C,) of a logistic regression to the labels (N,)."""
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(labels)
    if len(classes) < 2:
        raise StudentError("the linear student needs rows of at least two classes to learn from labels")
    model = LogisticRegression(C=options.c, tol=1e-3, max_iter=1000).fit(features, labels)
    weights = np.zeros((features.shape[1], num_labels), dtype=np.float32)
    bias = np.full(num_labels, ABSENT_CLASS_LOGIT, dtype=np.float32)
    if len(classes) == 2:  # scikit-learn keeps the second class's half; the first one's logit is 0
        weights[:, classes[1]], bias[classes] = model.coef_[0], [0, model.intercept_[0]]
    else:
        weights[:, classes], bias[classes] = model.coef_.T, model.intercept_
    return weights, bias


# ------------------------------------------------------------------------------------------------- reading


PLAIN = {  # all that `LinearStudent.save` writes: module, class, and what skops reads it with
    ("builtins", "dict", "DictNode"),
    ("builtins", "list", "ListNode"),
    ("builtins", "str", "JsonNode"),  # as skops writes a number or a text
    ("builtins", "str", "TypeNode"),
    ("numpy", "ndarray", "NdArrayNode"),
}


def _only_plain(data: bytes, path: Path) -> bytes:
    """`data` unchanged if its schema names plain types only: checked before skops imports or builds
    anything.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        schema = json.loads(archive.read("schema.json"))
    nodes = [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if "__class__" in node or "__loader__" in node:
                kind = tuple(str(node.get(key)) for key in ("__module__", "__class__", "__loader__"))
                if kind not in PLAIN:
                    raise StudentError(
                        f"{path} holds an object of type {kind[0]}.{kind[1]}, as no softlabels student has: "
                        f"it was not written by softlabels, and is not loaded"
                    )
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)
    return data


def _from_state(state: Any) -> LinearStudent:
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(f"it is no {FORMAT} of version {VERSION}")
    vocabularies = [
        Vocabulary(part["analyzer"], part["longest"], part["terms"].split("\n"), _floats(part["idf"], 1))
        for part in state["vocabularies"]
    ]
    weights, bias = _floats(state["weights"], 2), _floats(state["bias"], 1)
    terms = sum(len(part.terms) for part in vocabularies)
    if weights.shape != (terms * (3 if state["paired"] else 1), len(bias)):
        raise ValueError(f"weights of shape {weights.shape} don't fit {terms} terms and {len(bias)} classes")
    for part in vocabularies:
        if part.analyzer not in ("word", "char_wb") or not isinstance(part.longest, int):
            raise ValueError("a vocabulary of an unknown kind")
        if len(set(part.terms)) != len(part.terms) or len(part.idf) != len(part.terms):
            raise ValueError("a vocabulary whose terms and weights differ in number")
    return LinearStudent(vocabularies, bool(state["paired"]), weights, bias)


def _floats(array: Any, dimensions: int) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != dimensions:
        raise ValueError(f"an array of float32 with {dimensions} dimensions is missing")
    return array
