"""Word vectors that a recurrent student starts from: a file of them comes in, a table comes out.

The student's words are the teacher's tokens, one row of its table each. A token's vector is the file's for the token as
it is spelt ('##ing'), else for its text ('ing', without the tokenizer's marks), else for that in lower case; so a file
of vectors for words serves a tokenizer of word pieces as far as the pieces are words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from softlabels.errors import ConfigError, StudentError
from softlabels.word_vectors import open_word_vectors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class WordVectors:
    """A vector for each row of a student's table, where there is one."""

    vectors: np.ndarray  # (rows, width) float32, zeros where there is none
    found: np.ndarray  # (rows,) bool

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    @property
    def share(self) -> float:
        """Rows with a vector, of all."""
        return float(self.found.mean())


def spell_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[list[str]]:
    """The spellings under which a file may know each token, the best first."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    prefix = getattr(getattr(backend, "model", None), "continuing_subword_prefix", None) or ""
    spellings = []
    for number, token in zip(ids, cast(list[str], tokenizer.convert_ids_to_tokens(list(ids))), strict=True):
        text = tokenizer.decode([number], clean_up_tokenization_spaces=False)
        text = cast(str, text).strip().removeprefix(prefix) or token
        spellings.append(list(dict.fromkeys([token, text, text.lower()])))
    return spellings


def look_up_vectors(path: Path, spellings: Sequence[Sequence[str]]) -> WordVectors:
    """The vectors of `path` for rows that are spelt so, (rows, width of the file); `softlabels.word_vectors` reads it.

    Of two lines for one word the first counts. StudentError names the file and the line where it is broken, and says so
    where it has none of the words.
    """
    try:
        return _look_up(path, spellings)
    except ConfigError as error:
        # as for every option of a student; `softlabels run` takes a ConfigError of the training for another
        # configuration's unfinished run, and deletes that
        raise StudentError(str(error)) from None


def _look_up(path: Path, spellings: Sequence[Sequence[str]]) -> WordVectors:
    wanted: dict[str, list[tuple[int, int]]] = {}  # a spelling: its (row, rank)s
    for row, ways in enumerate(spellings):
        for rank, way in enumerate(ways):
            wanted.setdefault(way, []).append((row, rank))
    none = len(max(spellings, key=len, default=()))
    best = np.full(len(spellings), none)  # rank of the spelling found so far
    with open_word_vectors(path) as file:
        vectors = np.zeros((len(spellings), file.width), dtype=np.float32)
        for word, line in file:
            if word in wanted:
                values = file.values(line)
                for row, rank in wanted.pop(word):  # a later line for this word is passed over
                    if rank < best[row]:
                        vectors[row], best[row] = values, rank
        found = best < none
        file.update(0, found=float(found.mean()))
    if not found.any():
        tokens = sum(bool(ways) for ways in spellings)
        raise StudentError(
            f"word vectors {path}: not one of the {tokens:,} tokens of the training rows is among its "
            f"{file.count:,} words: are they of another language, or in another encoding than UTF-8?"
        )
    return WordVectors(vectors, found)
