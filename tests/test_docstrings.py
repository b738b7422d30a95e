"""The built-in corpus: what the harvest promises, on this machine's own packages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softlabels import docstrings
from softlabels.corpus import check_trainable, read_corpus
from softlabels.docstrings import (
    CLASS_ROWS,
    PACKAGES,
    SourceFile,
    clean_docstring,
    drop_shared_texts,
    find_package,
    load_docstrings,
    read_sources,
    read_texts,
    share_out,
    split_sources,
    text_key,
)
from softlabels.errors import CorpusError
from softlabels.types import Example

ANY_NAME = re.compile(
    r"(?i:numpy|scipy|pandas|scikit|sklearn|torch|transformers|python|hugging.?face|\bhf\b)|\bnp\b|\bpd\b"
)

# harvested in a process of its own, under another hash seed, locale and working folder; prints what it made
ELSEWHERE = """
import hashlib, json, sys, time
from dataclasses import astuple
from softlabels.docstrings import harvest_docstrings
splits = harvest_docstrings()
rows = {split: [astuple(row)[:4] for row in rows] for split, rows in splits.items()}
print(json.dumps({
    "digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    "cpu_seconds": time.process_time(),
    "imported": sorted({"numpy", "torch", "transformers", "pandas", "sklearn"} & set(sys.modules)),
}))
"""


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory):
    """This process's harvest, and what the other process says of its own, made at the same time."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONHASHSEED": "1",
        "LC_ALL": "C",
    }
    other = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment,
        stdout=subprocess.PIPE,
    )
    splits = docstrings.harvest_docstrings()
    output, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    return splits, json.loads(output)


def file_of(example: Example) -> str:
    return example.id.rpartition(":")[0]


def test_sizes(harvest) -> None:
    splits, _ = harvest
    assert list(splits) == ["train", "unlabeled", "test"]
    assert len(splits["train"]) == 1500
    assert len(splits["test"]) == 2000
    assert 8_000 <= len(splits["unlabeled"]) <= 10_500
    for split in ("train", "test"):
        assert {row.label for row in splits[split]} == set(PACKAGES)
    assert {row.label for row in splits["unlabeled"]} == {None}
    folders = {package or "python": label for label, package in PACKAGES.items()}
    rows = [folders[row.id.split("/")[0]] for split in splits.values() for row in split]
    assert max(rows.count(label) for label in PACKAGES) <= CLASS_ROWS


def test_labels_are_the_libraries(harvest) -> None:
    splits, _ = harvest
    for row in splits["train"] + splits["test"]:
        assert row.id.split("/")[0] == (PACKAGES[row.label] or "python")


def test_no_file_and_no_text_is_in_two_splits(harvest) -> None:
    splits, _ = harvest
    files = [{file_of(row) for row in rows} for rows in splits.values()]
    texts = [{text_key(row.text) for row in rows} for rows in splits.values()]
    for sets in (files, texts):
        assert len(set.union(*sets)) == sum(map(len, sets))
    assert sum(map(len, texts)) == sum(map(len, splits.values()))  # nor twice in one
    ids = [row.id for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_texts(harvest) -> None:
    splits, _ = harvest
    for rows in splits.values():
        for row in rows:
            assert 25 <= len(row.text) <= 300
            assert row.text == " ".join(row.text.split())
            assert not ANY_NAME.search(row.text), row


def test_ids_say_where_a_text_stands(harvest) -> None:
    splits, _ = harvest
    for row in splits["train"][:50]:
        path, _, line = row.id.rpartition(":")
        folder = find_package(str(row.label))
        source = (folder / path.split("/", 1)[1]).read_bytes()
        assert read_texts(source)[int(line)] == row.text


def test_tests_and_vendored_code_are_left_out(harvest) -> None:
    splits, _ = harvest
    folders = {part for rows in splits.values() for row in rows for part in file_of(row).split("/")[:-1]}
    assert not folders & {"tests", "test", "_vendor", "externals", "site-packages", "cobyqa", "idlelib"}


def test_same_in_another_process_within_20_seconds(harvest) -> None:
    splits, elsewhere = harvest
    rows = {split: [[row.id, row.text, row.text_b, row.label] for row in rows] for split, rows in splits.items()}
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == elsewhere["digest"]
    assert elsewhere["cpu_seconds"] < 20  # of one core; the clock may show more where tests run beside it
    assert elsewhere["imported"] == []  # what is read is never run


def test_task_can_be_learned(harvest) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    splits, _ = harvest
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), MultinomialNB(alpha=0.1))
    model.fit([row.text for row in splits["train"]], [row.label for row in splits["train"]])
    accuracy = model.score([row.text for row in splits["test"]], [row.label for row in splits["test"]])
    assert 0.4 < accuracy < 0.8  # one class in seven is 0.14; above 0.8 the texts would give themselves away


def test_read_as_a_corpus_and_kept(harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits, _ = harvest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    kept = docstrings._kept_path()
    assert kept is not None
    assert tmp_path in kept.parents
    docstrings._write_kept(kept, splits)
    start = time.process_time()
    assert load_docstrings() == splits
    assert time.process_time() - start < 2
    corpus = read_corpus("builtin:docstrings")
    assert corpus.examples == splits["train"]
    assert corpus.split == "train"
    assert corpus.label_names == sorted(PACKAGES)
    check_trainable(corpus)
    joined = read_corpus("builtin:docstrings", split="train+unlabeled", rows=1600)
    assert joined.examples == splits["train"] + splits["unlabeled"][:100]
    assert read_corpus("builtin:docstrings", split="test").hash != corpus.hash
    with pytest.raises(CorpusError, match="no split 'dev'; it has train, unlabeled, test"):
        read_corpus("builtin:docstrings", split="dev")


def test_damaged_copy_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "kept.json"
    splits = {"train": [Example("a.py:1", "Text — of a docstring.", None, "numpy")], "test": []}
    assert docstrings._read_kept(path) is None
    docstrings._write_kept(path, splits)
    assert docstrings._read_kept(path) == splits
    assert [entry.name for entry in path.parent.iterdir()] == ["kept.json"]
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole.replace(b"numpy", b"scipy"), b"", b"no line", b"\xff\xfe"):
        path.write_bytes(damaged)
        assert docstrings._read_kept(path) is None
    (tmp_path / "file").write_text("")
    docstrings._write_kept(tmp_path / "file" / "kept.json", splits)  # can't be: no error either


# -------------------------------------------------------------------------------------------- the parts alone


def test_clean_docstring() -> None:
    assert clean_docstring("\n    Return the\n      sum   of all.\n\n    More.\n    ") is None  # 22 characters
    assert (
        clean_docstring("Return the\n      sum   of all the things.\n\n    More.")
        == "Return the sum of all the things."
    )
    assert clean_docstring("====\nThe title of this module\n====\n\nMore.") is None
    assert clean_docstring("=====\nThe title of this module here\n=====\n") == "The title of this module here"
    assert clean_docstring("Parameters\n----------\nx : array_like, the thing that is") is None
    assert clean_docstring("Args:\n    x: the thing that is given to it") is None
    assert clean_docstring("Returns the number of rows there are.") == "Returns the number of rows there are."
    assert clean_docstring("x" * 301) is None
    assert clean_docstring("x" * 300) == "x" * 300
    assert clean_docstring("") is None


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Convert a NumPy array to a torch.Tensor.", "Convert a library array to a library.Tensor."),
        (
            "Takes an `np.ndarray` or pd.Series as it is.",
            "Takes an `library.ndarray` or library.Series as it is.",
        ),
        ("The scikit-learn API of sklearn estimators.", "The library API of library estimators."),
        ("Load 🤗 Transformers models in PyTorch here.", "Load library models in library here."),
        (
            "Whether is_torch_available in CPython or IPython.",
            "Whether is_library_available in library or library.",
        ),
        ("An input to the transformer block, jnp-like.", "An input to the transformer block, jnp-like."),
    ],
)
def test_library_names_are_replaced(text: str, clean: str) -> None:
    assert clean_docstring(text) == clean


def test_read_texts_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    source = f'''"""The docstring of this module."""
open({str(mark)!r}, "w").close()
if True:
    class A:
        """The docstring of this class."""
        @property
        def f(self):
            """The docstring of this method."""
            async def g():
                """The docstring of an inner one."""
        text = "not the docstring of anything"
'''
    assert read_texts(source.encode()) == {
        1: "The docstring of this module.",
        4: "The docstring of this class.",
        7: "The docstring of this method.",
        9: "The docstring of an inner one.",
    }
    assert not mark.exists()
    assert read_texts(b"def broken(:") == {}
    assert read_texts(b"\0") == {}
    assert read_texts("# -*- coding: latin-1 -*-\n'''The café of this module.'''".encode("latin-1")) == {}
    latin = "# -*- coding: latin-1 -*-\n'''The best café of this module.'''"
    assert read_texts(latin.encode("latin-1")) == {1: "The best café of this module."}


def test_read_sources_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    names = [
        "a.py",
        "b/__init__.py",
        "b/c.py",
        "b/tests/d.py",
        "b/test_e.py",
        "_vendor/f.py",
        "testing/_internal/g.py",
    ]
    made = {}
    for top, order in (("one", names), ("two", names[::-1])):
        for name in order:
            path = tmp_path / top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'"""What there is to say about {name} here."""\n')
        made[top] = read_sources("numpy", tmp_path / top)
    assert made["one"] == made["two"]
    assert {file.path for file in made["one"]} == {"numpy/a.py", "numpy/b/__init__.py", "numpy/b/c.py"}


def test_text_of_two_libraries_is_dropped() -> None:
    one = SourceFile("numpy", "numpy/a.py", {1: "Return the shape.", 2: "Only here."})
    two = SourceFile("scipy", "scipy/a.py", {1: "return the SHAPE"})
    assert drop_shared_texts({"numpy": [one], "scipy": [two]}) == {
        "numpy": [SourceFile("numpy", "numpy/a.py", {2: "Only here."})],
        "scipy": [],
    }


def test_split_sources_keeps_files_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "TRAIN_ROWS", 10)
    monkeypatch.setattr(docstrings, "TEST_ROWS", 7)
    sources = {
        label: [
            SourceFile(
                label,
                f"{label}/{number}.py",
                {line: f"{label} {number} {line}" for line in range(1 + number % 4)},
            )
            for number in range(30)
        ]
        for label in ("x", "y", "z")
    }
    splits = split_sources(sources)
    assert (len(splits["train"]), len(splits["test"])) == (10, 7)
    files = [{file_of(row) for row in rows} for rows in splits.values()]
    assert len(set.union(*files)) == sum(map(len, files))
    with pytest.raises(CorpusError, match="too few docstrings of z"):
        split_sources({**sources, "z": [SourceFile("z", "z/0.py", {line: f"z {line}" for line in range(40)})]})


def test_shares_add_up() -> None:
    assert share_out(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert share_out(1500, {"a": 2000, "b": 1200}) == {"a": 938, "b": 562}
    assert share_out(5, {"a": 0, "b": 7}) == {"a": 0, "b": 5}


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "pandas", "a_package_that_is_not_there")
    with pytest.raises(CorpusError, match=r"pandas is not installed: pip install 'softlabels\[demo\]'"):
        find_package("pandas")
