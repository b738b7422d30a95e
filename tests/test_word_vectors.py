"""Files of word vectors: the usual text formats, compression, words and lines that are odd, and broken files."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest

from softlabels.errors import ConfigError
from softlabels.word_vectors import open_word_vectors, read_word_vectors

LINES = ["rain 1 2 3", "ing 0.5 -1e-3 7", "雨 4 5 6", "the 9 9 9", "snow 1 1 1"]
VECTORS: dict[str, list[float]] = {
    "rain": [1, 2, 3],
    "ing": [0.5, -1e-3, 7],
    "雨": [4, 5, 6],
    "the": [9, 9, 9],
    "snow": [1, 1, 1],
}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def check_vectors(path: Path) -> list[str]:
    """Hold what is read to VECTORS; the words that are there beside those."""
    words, matrix = read_word_vectors(path)
    assert matrix.shape == (len(words), 3) and matrix.dtype == np.float32
    assert [word for word in words if word in VECTORS] == list(VECTORS)
    for word, values in VECTORS.items():
        np.testing.assert_allclose(matrix[words.index(word)], values)
    return [word for word in words if word not in VECTORS]


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("5 3\n" + "\n".join(LINES) + "\n", []),  # word2vec
        ("\n".join(LINES), []),  # GloVe, without a newline at the end
        ("5 3\n" + " \n".join(LINES) + " \n", []),  # fastText and Chinese-Word-Vectors end a line by a space
        ("\ufeff5 3\r\n" + "\r\n".join(LINES) + "\r\n\r\n", []),  # from Windows
        ("\n".join(LINES).replace(" ", "\t"), []),
        ("\n".join([". . . 7 7 7", "at name@domain.com 8 8 8", *LINES]), [". . .", "at name@domain.com"]),
        ("6 3\n" + "\n".join(["\u3000 1 1 1", " 2 2 2", *LINES]), ["\u3000", ""]),  # words that are spaces
        ("\n".join([*LINES, "rain 0 0 0"]), []),  # the first of two
    ],
    ids=["word2vec", "glove", "fasttext", "windows", "tabs", "spaces", "blank words", "a word twice"],
)
def test_the_usual_formats_are_read(tmp_path, text, others):
    assert check_vectors(write(tmp_path / "vectors.txt", text)) == others


def test_words_come_in_the_order_of_the_file(tmp_path):
    words, matrix = read_word_vectors(write(tmp_path / "v", "2 3\nfilm 1.0 2e0 3\nplot 4 5 6 \nfilm 9 9 9"))
    assert words == ["film", "plot"] and matrix.tolist() == [[1, 2, 3], [4, 5, 6]]
    words, _ = read_word_vectors(write(tmp_path / "v", "film 1 2 3\n. . . 4 5 6\n电影 7 8 9\n"))
    assert words == ["film", ". . .", "电影"]


@pytest.mark.parametrize("header", ["", "3 2\n"])
def test_a_limit_reads_the_first_lines_only(tmp_path, header):
    path = write(tmp_path / "v", header + "film 1 2\nplot 4 5\n" + "scene 1 x\n")
    assert read_word_vectors(path, limit=1)[0] == ["film"]
    assert read_word_vectors(path, limit=2)[0] == ["film", "plot"]
    with pytest.raises(ConfigError, match="could not convert"):
        read_word_vectors(path, limit=3)


def test_only_the_values_that_are_asked_for_are_looked_at(tmp_path):
    with open_word_vectors(write(tmp_path / "v", "2 3\nfilm x nan 3\nplot 4 5 6\n")) as file:
        assert file.width == 3
        found = {word: file.values(line).tolist() for word, line in file if word in {"plot", "x"}}
    assert found == {"plot": [4, 5, 6]} and file.count == 2


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_compressed_files_are_read_whatever_their_names(tmp_path, opener):
    text = "\n".join(LINES).encode()
    with opener(tmp_path / "vectors", "wb") as file:
        file.write(text)
    assert check_vectors(tmp_path / "vectors") == []
    whole = (tmp_path / "vectors").read_bytes()
    (tmp_path / "vectors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"vectors: it can't be read after line \d+"):
        read_word_vectors(tmp_path / "vectors")


def test_words_in_another_encoding_are_passed_over(tmp_path):
    strange = b"caf\xe9 1 1 1\n\xff\xfe 2 2 2\n" + "\n".join(LINES).encode()
    assert check_vectors(write(tmp_path / "v", strange)) == []
    chinese = "\n".join(["雨 1 2 3", "电影 1 2 3"]).encode("gbk")
    with pytest.raises(ConfigError, match=r"not one of its 2 words is in UTF-8"):
        read_word_vectors(write(tmp_path / "v", chinese))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("5 3\nrain 1 2\nsnow 1 2 3\n", r"line 2 \('rain 1 2 …'\) is broken: it has 2 values, its first line says 3"),
        ("a 1 2 3\nb 1 2 3\nrain 1 2\n", r"line 3 .* is broken: it has 2 values, others have 3"),
        ("film 1 2 3\nplot 4 5\n", r"line 2 .* is broken: it has 2 values, others have 3"),
        ("a 1 2 3\nrain 1 x 3\n", r"line 2 .* is broken: could not convert"),
        ("a 1 2 3\nrain 1 nan 3\n", r"line 2 .* no finite number"),
        ("film 1 2 nan\n", r"line 1 .* no finite number"),
        ("a 1 2 3\nrain 1 1e99 3\n", r"line 2 .* no finite number"),
        ("a 1 2 3\nb 1 2 3\nb" + " 1" * 40 + "\n", r"line 3 .* it has 40 values, others have 3"),
        ("", "no word vector: the file is empty"),
        ("2 3\n", "no word vector: nothing comes after its first line"),
        ("2 99999999\nrain 1 2\n", "99999999 values a word can't be"),
        ("rain\nsnow\n", "0 values a word can't be"),
        (b"2 3\nrain \0\0\0\0", r"no text file.*binary=False"),
        (b"rain \0\0\0\0 3", "no text file"),
        (b"2 3\n\xff\xfe\x00\n", "no text file"),
        (b"PK\x03\x04zip", "zip archive: unpack it"),
        ("rain 1 2 3\n" + "x" * (1 << 20), "line 2: it is longer than any vector"),
    ],
)
def test_a_broken_file_is_told_with_the_line(tmp_path, text, told):
    with pytest.raises(ConfigError, match=told):
        read_word_vectors(write(tmp_path / "v", text))


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"vectors .*none can't be read: No such file"):
        read_word_vectors(tmp_path / "none")
    with pytest.raises(ConfigError, match="can't be read"):
        read_word_vectors(tmp_path)
