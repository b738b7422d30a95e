"""Word vectors from the usual text formats: word2vec and fastText (.vec, with a header line), GloVe (without one).

A file comes in, its words and a matrix of one row a word go out. Files of Chinese-Word-Vectors are of the first kind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np

from softlabels.errors import ConfigError


def read_word_vectors(
    path: str | os.PathLike[str], words: Set[str] | None = None, *, limit: int | None = None
) -> tuple[list[str], np.ndarray]:
    """The file's words, in its order, and their vectors (N, D) float32; of a word that is there twice the first.

    `words`: only these. `limit`: look at the file's first so many words only, which are the most frequent ones. A word
    may hold spaces (GloVe 840B): the last D fields are the vector. ConfigError names the line that is wrong.
    """
    path = Path(path)
    found: dict[str, np.ndarray] = {}
    try:
        for word, vector in _rows(path, words, limit):
            found.setdefault(word, vector)
    except OSError as error:
        raise ConfigError(f"word vectors {path} cannot be read: {error.strerror or error}") from None
    if not found:
        which = "none of the words that are asked for" if words is not None else "no word vector"
        raise ConfigError(f"word vectors {path} has {which}: is it the right file?")
    return list(found), np.stack(list(found.values()))


def _rows(path: Path, words: Set[str] | None, limit: int | None) -> Iterator[tuple[str, np.ndarray]]:
    width = None
    seen = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if seen == limit:
                return
            try:
                fields = raw.decode("utf-8").rstrip().split(" ")
            except UnicodeDecodeError:
                raise ConfigError(
                    f"word vectors {path}, line {number} is not UTF-8: give a text file (word2vec's .bin is none; "
                    f"gensim's save_word2vec_format(..., binary=False) converts it)"
                ) from None
            if number == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):
                width = int(fields[1])  # the header: how many words, how wide
                continue
            width = len(fields) - 1 if width is None else width
            if width < 1 or len(fields) <= width:
                raise ConfigError(
                    f"word vectors {path}, line {number}: {len(fields) - 1} numbers after the word, not {width}"
                )
            seen += 1
            word = " ".join(fields[:-width])
            if words is None or word in words:
                yield word, _vector(fields[-width:], f"word vectors {path}, line {number}")


def _vector(fields: list[str], where: str) -> np.ndarray:
    try:
        vector = np.array(fields, dtype=np.float32)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}. A line is a word and its numbers, with spaces between") from None
    if not np.isfinite(vector).all():
        raise ConfigError(f"{where}: a number is not finite")
    return vector
