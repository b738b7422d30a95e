"""Files of word vectors: a file comes in, its words and their values go out, a line at a time or as one matrix.

Files are text, a word and its values a line, separated by single spaces or tabs: word2vec's and fastText's .vec
(whose first line counts the words and the values), GloVe's (which has none), Chinese-Word-Vectors'; plain or
compressed by gzip, bzip2 or xz. A word may hold spaces (GloVe 840B). One that is not UTF-8 is passed over. Every line's
length is checked, and the values that are asked for.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import mode
from typing import IO, Any, cast

import numpy as np

from softlabels.errors import ConfigError
from softlabels.progress import Update, progress

WIDEST = 4096  # values of a vector
_LONGEST_LINE = 1 << 20  # bytes
_MOST_SPACES = 16  # in a word; more are two lines that have become one
_HEAD = 100  # lines that tell the width where the first doesn't
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_UPDATE = 10_000  # lines between two updates of the progress


def read_word_vectors(path: str | os.PathLike[str], *, limit: int | None = None) -> tuple[list[str], np.ndarray]:
    """The file's words, in its order, and their vectors (N, D) float32; of a word that is there twice the first.

    `limit`: of the file's first so many lines only, which are its most frequent words. ConfigError names the line that
    is wrong, and says so where no word is left.
    """
    found: dict[str, np.ndarray] = {}
    with open_word_vectors(path, limit=limit) as file:
        for word, line in file:
            if word not in found:
                found[word] = file.values(line)
    if not found:
        raise ConfigError(f"word vectors {path}: not one of its {file.count:,} words is in UTF-8: convert the file")
    return list(found), np.stack(list(found.values()))


@contextmanager
def open_word_vectors(path: str | os.PathLike[str], *, limit: int | None = None) -> Iterator[WordVectorFile]:
    """The words of `path`, or of its first `limit` lines, to be read once, with a progress bar while the block runs.

    ConfigError for a file that can't be read or holds no word vectors, here; for a line that is broken, on the way.
    """
    path = Path(path)
    with _open(path) as file:
        vectors = WordVectorFile(path, file, limit=limit)
        with progress(None, description=f"read {path.name}", unit="vectors") as vectors.update:
            yield vectors


@dataclass(frozen=True, slots=True)
class Line:
    """A word and its values as they are in the file."""

    number: int  # from 1
    text: bytes  # without what ends it; tabs are spaces


class WordVectorFile:
    """An open file: iterating gives each word and its line, of which `values` makes the vector."""

    width: int  # D, values of a vector
    count: int  # words so far, those that are not UTF-8 included
    update: Update  # of the progress, to show a figure beside it: set before the file is iterated

    def __init__(self, path: Path, file: IO[bytes], *, limit: int | None) -> None:
        self.count = 0
        self._path = path
        self._said_by = "its first line says"
        rest = self._read(file)
        head = list(islice(rest, _HEAD))
        if not head:
            raise ConfigError(f"word vectors {path} has no word vector: the file is empty")
        if any(b"\0" in line.text for line in head):
            raise ConfigError(
                f"word vectors {path}: this is no text file: save them in word2vec's text format (its .bin is none; "
                f"gensim's save_word2vec_format(..., binary=False) writes one)"
            )
        first = head[0].text.split()
        if len(first) == 2 and all(field.isdigit() for field in first):
            self.width = int(first[1])
            head = head[1:]
        else:
            # of lines with words that hold spaces there are few; where two widths are as frequent, the first counts
            self.width, self._said_by = mode(line.text.count(b" ") for line in head), "others have"
        if not 1 <= self.width <= WIDEST:
            raise ConfigError(
                f"word vectors {path}: {self.width} values a word can't be: a line is a word and 1 to {WIDEST} numbers"
            )
        if not head:
            raise ConfigError(f"word vectors {path} has no word vector: nothing comes after its first line")
        self._lines: Iterable[Line] = islice(chain(head, rest), limit)

    def __iter__(self) -> Iterator[tuple[str, Line]]:
        for line in self._lines:
            word = self._word(line)
            self.count += 1
            if self.count % _UPDATE == 0:
                self.update(_UPDATE)
            try:
                text = word.decode("utf-8")
            except UnicodeDecodeError:
                continue
            yield text, line
        self.update(self.count % _UPDATE)

    def values(self, line: Line) -> np.ndarray:
        """(D,) float32; ConfigError where one is no finite number."""
        fields = line.text.rsplit(b" ", self.width)[1:]
        try:
            with np.errstate(over="ignore"):
                values = np.array([float(field) for field in fields], dtype=np.float32)
        except ValueError as error:
            raise self._broken(line, str(error)) from None
        if not np.isfinite(values).all():
            raise self._broken(line, "a value is no finite number of 32 bits")
        return values

    def _word(self, line: Line) -> bytes:
        spaces = line.text.count(b" ")
        if spaces == self.width:
            return line.text[: line.text.index(b" ")]
        if self.width < spaces <= self.width + _MOST_SPACES:
            return line.text.rsplit(b" ", self.width)[0]
        raise self._broken(line, f"it has {spaces} values, {self._said_by} {self.width}")

    def _read(self, file: IO[bytes]) -> Iterator[Line]:
        """Each line that isn't blank; tabs become spaces."""
        number = 0
        try:
            while text := file.readline(_LONGEST_LINE):
                number += 1
                if len(text) == _LONGEST_LINE:
                    raise ConfigError(f"word vectors {self._path}, line {number}: it is longer than any vector")
                text = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
                text = text.rstrip(b" \t\r\n").replace(b"\t", b" ")
                if text:
                    yield Line(number, text)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ConfigError(f"word vectors {self._path}: it can't be read after line {number}: {error}") from None

    def _broken(self, line: Line, fault: str) -> ConfigError:
        start = line.text[:40].decode("utf-8", "replace")
        return ConfigError(f"word vectors {self._path}, line {line.number} ('{start} …') is broken: {fault}")


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked; told by how it begins, not by its name."""
    try:
        with path.open("rb") as file:
            begins = file.read(8)
        if begins.startswith(b"PK\x03\x04"):
            raise ConfigError(f"word vectors {path}: this is a zip archive: unpack it, and name the file in it")
        for magic, opener in _OPENERS.items():
            if begins.startswith(magic):
                return cast(IO[bytes], opener(path, "rb"))
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"word vectors {path} can't be read: {error.strerror or error}") from None
