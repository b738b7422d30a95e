"""What a docstring documents, read off the source file that a row's id names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from softlabels import docstring_kinds
from softlabels.corpus import read_corpus
from softlabels.docstring_kinds import KINDS, harvest_kinds, read_kinds
from softlabels.docstrings import find_package, load_docstrings, read_texts
from softlabels.types import Example

SOURCE = b'''"""A module that says what it is for."""
class Thing:
    """A thing that has a method and a class inside."""
    @property
    def size(self):
        """Return how large the thing is in metres."""
        def inner():
            """Add up what there is inside of the thing."""
    class Part:
        """A part of the thing that is a class itself."""
if True:
    async def wait():
        """Wait until the thing is there to be used."""
'''


def test_kinds_are_read_where_docstrings_stand() -> None:
    kinds = read_kinds(SOURCE)
    assert [kinds[line] for line in read_texts(SOURCE)] == [
        "module",
        "class",
        "method",
        "function",
        "class",
        "function",
    ]


def test_rows_keep_everything_but_their_label(monkeypatch: pytest.MonkeyPatch) -> None:
    file = find_package("python") / "json" / "decoder.py"
    texts = read_texts(file.read_bytes())
    rows = [Example(f"python/json/decoder.py:{line}", text, None, "python") for line, text in texts.items()]
    splits = {"train": rows, "unlabeled": [Example("gone/from/here.py:1", "No one reads this file.")]}
    monkeypatch.setattr(docstring_kinds, "load_docstrings", lambda: splits)
    found = harvest_kinds()
    assert found["unlabeled"] == splits["unlabeled"]
    assert [(row.id, row.text) for row in found["train"]] == [(row.id, row.text) for row in rows]
    labels = {row.id: row.label for row in found["train"]}
    assert labels["python/json/decoder.py:1"] == "module" and set(labels.values()) == {"module", "class", "method"}


@pytest.mark.slow
def test_the_corpus_has_the_rows_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for split in ("train", "test"):
        corpus = read_corpus("builtin:docstring-kinds", split=split)
        assert [row.id for row in corpus.examples] == [row.id for row in load_docstrings()[split]]
        counts = Counter(row.label for row in corpus.examples)
        assert set(counts) == set(KINDS) and min(counts.values()) > 0.05 * len(corpus.examples)
    assert {path.name.rpartition("-")[0] for path in (tmp_path / "softlabels").iterdir()} == {
        "docstrings",
        "docstring-kinds",
    }
