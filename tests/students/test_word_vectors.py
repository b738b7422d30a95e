"""A student's word vectors: looked up in a file under the spellings of its tokens, or fitted on a corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from softlabels.errors import StudentError
from softlabels.students.fitted_vectors import SPREAD, fit_word_vectors
from softlabels.students.word_vectors import look_up_vectors, spell_tokens
from tests.models import tiny_tokenizer

WANTED = [[], ["rain"], ["##ing", "ing"], ["雨"], ["The", "the"], ["absent"]]
EXPECTED: list[list[float]] = [[0, 0, 0], [1, 2, 3], [0.5, -1e-3, 7], [4, 5, 6], [9, 9, 9], [0, 0, 0]]
LINES = ["rain 1 2 3", "ing 0.5 -1e-3 7", "雨 4 5 6", "the 9 9 9", "snow 1 1 1"]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_every_row_gets_the_vector_of_its_word(tmp_path):
    text = "\n".join(["5 3", *LINES, "rain 0 0 0"])  # a word twice
    got = look_up_vectors(write(tmp_path / "vectors.txt", text), WANTED)
    assert got.vectors.dtype == np.float32
    np.testing.assert_allclose(got.vectors, EXPECTED)
    assert got.found.tolist() == [False, True, True, True, True, False]
    assert got.share == pytest.approx(4 / 6)


def test_words_in_another_encoding_are_passed_over(tmp_path):
    strange = b"caf\xe9 1 1 1\n\xff\xfe 2 2 2\n" + "\n".join(LINES).encode()
    np.testing.assert_allclose(look_up_vectors(write(tmp_path / "v", strange), WANTED).vectors, EXPECTED)
    chinese = "\n".join(["雨 1 2 3", "雪 1 2 3"]).encode("gbk")
    with pytest.raises(StudentError, match=r"not one of the 1 tokens .* its 2 words.*UTF-8"):
        look_up_vectors(write(tmp_path / "v", chinese), [[], ["雨"]])


def test_a_file_with_none_of_the_words_or_a_broken_line_is_told(tmp_path):
    with pytest.raises(StudentError, match=r"not one of the 5 tokens .* its 1 words"):
        look_up_vectors(write(tmp_path / "v", "film 1 2\n"), WANTED)
    with pytest.raises(StudentError, match=r"line 2 \('rain 1 x 3 …'\) is broken: could not convert"):
        look_up_vectors(write(tmp_path / "v", "a 1 2 3\nrain 1 x 3\n"), WANTED)
    with pytest.raises(StudentError, match=r"vectors .*none can't be read: No such file"):
        look_up_vectors(tmp_path / "none", WANTED)


def test_the_token_itself_goes_before_its_text_and_that_before_lower_case(tmp_path):
    path = write(tmp_path / "v", "the 1 1\nThe 2 2\ning 3 3\n##ing 4 4\n")
    assert look_up_vectors(path, [["The", "the"], ["##ing", "ing"], ["ING", "ing"]]).vectors.tolist() == [
        [2, 2],
        [4, 4],
        [3, 3],
    ]


def test_how_tokens_are_spelt():
    pieces = tiny_tokenizer()
    ids = [pieces.vocab[token] for token in ("rain", "##x", "[MASK]")]
    assert spell_tokens(pieces, ids) == [["rain"], ["##x", "x"], ["[MASK]", "[mask]"]]
    bytes_ = tiny_tokenizer(kind="bpe")
    ids = [bytes_.vocab[token] for token in ("Ġthe", "The")]
    assert spell_tokens(bytes_, ids) == [["Ġthe", "the"], ["The", "the"]]


# ------------------------------------------------------------------------------------------------------- fitting


def sentences(count: int = 400) -> list[np.ndarray]:
    """'cat' (2) and 'dog' (3) have the same neighbours, 'sun' (4) and 'moon' (5) others; row 11 comes alone."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        animal = bool(rng.integers(2))
        subject = rng.choice([2, 3] if animal else [4, 5])
        around = rng.choice([6, 7, 8] if animal else [8, 9, 10], size=4)
        made.append(np.array([*around[:2], subject, *around[2:]], dtype=np.int32))
    return [*made, np.array([11], dtype=np.int32), np.array([], dtype=np.int32)]


def test_words_of_alike_contexts_are_near():
    fitted = fit_word_vectors(sentences(), rows=12, width=4)
    unit = fitted.vectors / np.maximum(np.linalg.norm(fitted.vectors, axis=1, keepdims=True), 1e-9)
    near = unit @ unit.T
    assert near[2, 3] > 0.9 and near[4, 5] > 0.9
    assert max(near[2, 4], near[2, 5], near[3, 4], near[3, 5]) < 0.5
    assert fitted.found.tolist() == [False, False, *[True] * 9, False]
    assert not fitted.vectors[~fitted.found].any()
    assert fitted.vectors[fitted.found].std() == pytest.approx(SPREAD, rel=1e-5)


def test_fitting_is_deterministic_and_counts_in_pieces(monkeypatch):
    first, second = (fit_word_vectors(sentences(), rows=12, width=4) for _ in range(2))
    assert np.array_equal(first.vectors, second.vectors)
    monkeypatch.setattr("softlabels.students.fitted_vectors._CHUNK", 50)
    np.testing.assert_allclose(fit_word_vectors(iter(sentences()), rows=12, width=4).vectors, first.vectors, atol=1e-5)


def test_few_words_leave_the_last_values_at_zero():
    fitted = fit_word_vectors(sentences(), rows=12, width=300)
    assert fitted.vectors.shape == (12, 300) and not fitted.vectors[:, 11:].any()
    nothing = fit_word_vectors([np.array([2])], rows=3, width=4)
    assert not nothing.found.any() and not nothing.vectors.any()
