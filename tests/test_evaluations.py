"""What an evaluation leaves in its run's folder is read back as it was, and refused where it was tampered with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from softlabels.cache.files import hash_file
from softlabels.config import EvaluateOptions
from softlabels.errors import StudentError
from softlabels.evaluate import evaluate
from softlabels.evaluations import evaluation_name, kept_names, read_kept, run_fingerprint
from softlabels.runs import load_run, read_record
from softlabels.types import NO_LABEL
from tests.runs import ROWS, Taught, by_words, corpus_of, make_taught


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    return make_taught(tmp_path_factory.mktemp("taught"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return by_words(tmp_path / "run", {"the": [2.0, -1.0, 0.5], "rain": [-3.0, 0.0, 4.0], "goal": [0.0, 1.0, 0.0]})


def test_what_is_kept_is_what_was_found(run: Path, taught: Taught) -> None:
    found = evaluate(run, corpus_of(ROWS[:30]), cache=taught.cache)
    (name,) = kept_names(run)
    assert name == evaluation_name("made", None, corpus_of(ROWS[:30]).hash) and found.kept is not None
    kept = read_kept(run, name)
    assert kept.card.figures == found and Path(found.kept) == kept.path
    assert kept.card.run == run_fingerprint(read_record(run))
    assert kept.card.teacher is not None and kept.card.teacher.cache == taught.cache.identity()
    rows = kept.rows
    assert rows.ids == [row.id for row in ROWS[:30]] and rows.texts == [row.text for row in ROWS[:30]]
    assert np.array_equal(rows.student, load_run(run).logits(ROWS[:30]))
    assert rows.teacher is not None and np.array_equal(rows.teacher, taught.cache.column("logits")[:30])
    assert rows.labels.tolist() == [
        NO_LABEL if row.label is None else kept.card.label_names.index(str(row.label)) for row in ROWS[:30]
    ]
    assert rows.lengths.tolist() == taught.cache.lengths[:30].tolist()


def test_without_texts_and_without_a_teacher(run: Path) -> None:
    evaluate(run, corpus_of(ROWS), options=EvaluateOptions(texts=False, resamples=0))
    (name,) = kept_names(run)
    kept = read_kept(run, name)
    assert kept.rows.texts is None and kept.rows.teacher is None and kept.card.teacher is None
    assert kept.card.length_unit == "words"
    assert all(ROWS[0].text.encode() not in path.read_bytes() for path in kept.path.parent.iterdir())


def test_nothing_is_kept_where_nothing_should_be(run: Path, taught: Taught) -> None:
    assert evaluate(run, corpus_of(ROWS), options=EvaluateOptions(keep=False)).kept is None
    assert evaluate(run, corpus_of(ROWS), others=[taught.twin]).kept is None
    assert kept_names(run) == [] and not (run / "evaluations").exists()


def test_a_folder_that_cannot_be_written_to_is_no_failure(run: Path) -> None:
    (run / "evaluations").write_text("a file where a folder should be")
    told: list[str] = []
    found = evaluate(run, corpus_of(ROWS), say=told.append)
    assert found.kept is None and found.rows > 0
    assert len(told) == 1 and "is not kept" in told[0] and str(run) in told[0]


@pytest.mark.parametrize(
    ("source", "split", "name"),
    [
        ("/data/test.jsonl", None, "test-01234567"),
        ("glue/sst2", "validation", "sst2-validation-01234567"),
        ("builtin:docstrings", "test", "builtin-docstrings-test-01234567"),
        ("../../etc/", "a/../b", "etc-a-b-01234567"),
        ("日本", None, "corpus-01234567"),
    ],
)
def test_names_are_plain(source, split, name) -> None:
    assert evaluation_name(source, split, "0123456789abcdef") == name


# ---------------------------------------------------------------------------------------------------------- tampering


@pytest.fixture
def kept(run: Path, taught: Taught) -> Path:
    found = evaluate(run, corpus_of(ROWS), cache=taught.cache, options=EvaluateOptions(resamples=10))
    assert found.kept is not None
    return Path(found.kept)


def change(path: Path, edit: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(version=2), "format version 2; this softlabels reads up to 1"),
        (lambda data: data.update(surprise=1), "surprise"),
        (lambda data: data["figures"].update(accuracy=1.5), "figures.accuracy"),
        (lambda data: data["figures"].update(accuracy="1"), "figures.accuracy"),
        (lambda data: data["figures"].update(accuracy=float("nan")), "accuracy"),
        (lambda data: data["figures"]["calibration"].update(bins=10**9), "bins"),
        (lambda data: data["figures"]["latency"].update(ms=-1.0), "ms"),
        (lambda data: data["label_names"].append("more"), "other classes"),
        (lambda data: data.update(corpus_rows=3), "not those of"),
        (lambda data: data.update(rows_hash="0" * 32), "not the file that was written"),
        (lambda data: data.update(teacher=None), "damaged"),
    ],
)
def test_a_changed_card_is_refused(run: Path, kept: Path, edit, message) -> None:
    change(kept, edit)
    with pytest.raises(StudentError, match=message):
        read_kept(run, kept.stem)


def test_changed_rows_are_refused(run: Path, kept: Path) -> None:
    arrow = kept.with_suffix(".arrow")
    whole = arrow.read_bytes()
    for harmed in (b"", whole[: len(whole) // 2], b"ARROW1" + bytes(400), whole[:-30] + bytes(30)):
        arrow.write_bytes(harmed)
        with pytest.raises(StudentError, match="not the file that was written"):
            read_kept(run, kept.stem)
        change(kept, lambda data: data.update(rows_hash=hash_file(arrow)))  # who tampers can hash too
        with pytest.raises(StudentError, match="can't be read"):
            read_kept(run, kept.stem)
        change(kept, lambda data: data.update(rows_hash="0" * 32))
    for harmed in (b"", b"[" * 100_000, b"{}", b"\xff"):
        kept.write_bytes(harmed)
        with pytest.raises(StudentError, match=kept.name):
            read_kept(run, kept.stem)
