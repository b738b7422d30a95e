"""Word vectors that a recurrent student starts from: a file of them comes in, or the training rows; a table comes out.

The student's words are the teacher's tokens, one row of its table each. A token's vector is the file's for the token as
it is spelt ('##ing'), else for its text ('ing', without the tokenizer's marks), else for that in lower case; so a file
of vectors for words serves a tokenizer of word pieces as far as the pieces are words.

Files are text, a word and its values a line, separated by single spaces or tabs: word2vec's and fastText's .vec
(whose first line counts the words and the values), GloVe's (which has none), Chinese-Word-Vectors'; plain or
compressed by gzip, bzip2 or xz. A word may hold spaces. Words are compared as bytes of UTF-8: one in another encoding
is passed over. The first of two lines for one word counts. Every line's length is checked, and the values of the words
that are wanted.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import mode
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from softlabels.errors import StudentError
from softlabels.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDEST = 4096  # values of a vector
_LONGEST_LINE = 1 << 20  # bytes
_MOST_SPACES = 16  # in a word; more are two lines that have become one
_HEAD = 100  # lines that tell the width where the first doesn't
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_UPDATE = 10_000  # lines between two updates of the progress


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


def read_word_vectors(path: Path, spellings: Sequence[Sequence[str]]) -> WordVectors:
    """The vectors of `path` for rows that are spelt so, (rows, width of the file); see the module for what it reads.

    StudentError names the file and the line where it is broken, and says so where it has none of the words.
    """
    wanted: dict[bytes, list[tuple[int, int]]] = {}  # a spelling: its (row, rank)s
    for row, ways in enumerate(spellings):
        for rank, way in enumerate(ways):
            wanted.setdefault(way.encode("utf-8", "surrogatepass"), []).append((row, rank))
    best = np.full(len(spellings), len(max(spellings, key=len, default=())))  # rank of the spelling found so far
    count = 0
    with _open(path) as file:
        lines = _Lines(path, file)
        vectors = np.zeros((len(spellings), lines.width), dtype=np.float32)
        with progress(None, description=f"read {path.name}", unit="vectors") as update:
            for count, (word, where) in enumerate(lines, start=1):
                if word in wanted:
                    values = lines.values(where)
                    for row, rank in wanted.pop(word):  # a later line for this word is passed over
                        if rank < best[row]:
                            vectors[row], best[row] = values, rank
                if count % _UPDATE == 0:
                    update(_UPDATE)
            known = np.array([best[row] < len(ways) for row, ways in enumerate(spellings)])
            update(count % _UPDATE, found=float(known.mean()))
    if not known.any():
        raise StudentError(
            f"word vectors {path}: not one of the {len(spellings):,} tokens of the training rows is among its "
            f"{count:,} words: are they of another language, or in another encoding than UTF-8?"
        )
    return WordVectors(vectors, known)


@dataclass(frozen=True, slots=True)
class _Line:
    number: int  # from 1
    text: bytes  # without what ends it


class _Lines:
    """The lines of a file of word vectors: iterating gives each word and its line."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._said_by = "its first line says"
        rest = self._read(file)
        head = list(islice(rest, _HEAD))
        if not head:
            raise StudentError(f"word vectors {path}: the file is empty")
        if any(b"\0" in line.text for line in head):
            raise StudentError(f"word vectors {path}: this is no text file: save them in word2vec's text format")
        first = head[0].text.split()
        if len(first) == 2 and all(field.isdigit() for field in first):
            self.width = int(first[1])
            head = head[1:]
        else:
            # of lines with words that hold spaces there are few
            self.width, self._said_by = mode(sorted(line.text.count(b" ") for line in head)), "others have"
        if not 1 <= self.width <= WIDEST:
            raise StudentError(
                f"word vectors {path}: {self.width} values a word can't be: a line is a word and 1 to {WIDEST} numbers"
            )
        self._lines: Iterable[_Line] = chain(head, rest)

    def __iter__(self) -> Iterator[tuple[bytes, _Line]]:
        for line in self._lines:
            spaces = line.text.count(b" ")
            if spaces == self.width:
                yield line.text[: line.text.index(b" ")], line
            elif self.width < spaces <= self.width + _MOST_SPACES:
                yield line.text.rsplit(b" ", self.width)[0], line
            else:
                raise self._broken(line, f"it has {spaces} values, {self._said_by} {self.width}")

    def values(self, line: _Line) -> np.ndarray:
        """(width,) float32: the values of a line."""
        fields = line.text.rsplit(b" ", self.width)[1:]
        try:
            with np.errstate(over="ignore"):
                values = np.array([float(field) for field in fields], dtype=np.float32)
        except ValueError as error:
            raise self._broken(line, str(error)) from None
        if not np.isfinite(values).all():
            raise self._broken(line, "a value is no finite number of 32 bits")
        return values

    def _read(self, file: IO[bytes]) -> Iterator[_Line]:
        """Each line that isn't blank; tabs become spaces."""
        number = 0
        try:
            while text := file.readline(_LONGEST_LINE):
                number += 1
                if len(text) == _LONGEST_LINE:
                    raise StudentError(f"word vectors {self._path}, line {number}: it is longer than any vector")
                text = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
                text = text.rstrip(b" \t\r\n").replace(b"\t", b" ")
                if text:
                    yield _Line(number, text)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise StudentError(f"word vectors {self._path}: it can't be read after line {number}: {error}") from None

    def _broken(self, line: _Line, fault: str) -> StudentError:
        start = line.text[:40].decode("utf-8", "replace")
        return StudentError(f"word vectors {self._path}, line {line.number} ('{start} …') is broken: {fault}")


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked; told by how it begins, not by its name."""
    try:
        with path.open("rb") as file:
            begins = file.read(8)
        if begins.startswith(b"PK\x03\x04"):
            raise StudentError(f"word vectors {path}: this is a zip archive: unpack it, and name the file in it")
        for magic, opener in _OPENERS.items():
            if begins.startswith(magic):
                return cast(IO[bytes], opener(path, "rb"))
        return path.open("rb")
    except OSError as error:
        raise StudentError(f"word vectors {path} can't be read: {error.strerror or error}") from None
