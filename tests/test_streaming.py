"""Corpora larger than memory: rows that go through a file are those that go through memory, and dumps are the same."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from softlabels.config import DumpOptions
from softlabels.corpora import spool, text_files
from softlabels.corpora.files import READERS
from softlabels.corpora.spooled_rows import SpooledRows
from softlabels.corpus import Corpus, read_corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, CorpusError
from softlabels.tasks import encode_corpus_labels, mask_often
from softlabels.tokens import Tokenized
from softlabels.types import Example, Task
from tests.models import LABEL_NAMES, TEXTS
from tests.models import save_teacher as save_classifier
from tests.test_corpus import PAIRS, SINGLES, write_rows
from tests.test_tasks import TAGS, save

ROWS: list[dict[str, object]] = [
    {"id": f"row-{number}", "text": text, "label": name} for number, (text, name) in enumerate(TEXTS[:11])
]


@pytest.fixture(autouse=True)
def few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Path:
    """Tables of three rows, and a folder of the test's own for what is kept."""
    monkeypatch.setattr(spool, "CHUNK_ROWS", 3)
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "corpora"


def streamed(source: Path, **options: Any) -> Corpus:
    """The corpus as if it were large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softlabels.corpus.SPOOL_BYTES", 0)
        corpus = read_corpus(source, **options)
    assert isinstance(corpus.examples, SpooledRows)
    return corpus


def unreadable(patch: pytest.MonkeyPatch) -> None:
    """From now on no source is opened."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the source was read again")

    patch.setattr("softlabels.corpora.sources.read_source", refuse)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def options_of(**changes: Any) -> DumpOptions:
    return DumpOptions.model_validate({"capture": ["logits"], "shard_rows": 4, "codec": "float32"} | changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("teacher") / "teacher", label_names=LABEL_NAMES)


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("suffix", list(READERS))
@pytest.mark.parametrize("rows", [SINGLES * 3, PAIRS * 4], ids=["singles", "pairs"])
def test_the_same_corpus_from_every_format(tmp_path: Path, suffix: str, rows: list[dict[str, object]]) -> None:
    named = [row | {"id": f"{number}"} for number, row in enumerate(rows)]
    if suffix == ".txt":
        named = [{"text": f"text {number}"} for number in range(7)]
    path = write_rows(tmp_path / f"x{suffix}", named)
    whole, parts = read_corpus(path), streamed(path)
    assert parts.examples == whole.examples
    assert (parts.hash, parts.label_names, parts.split) == (whole.hash, whole.label_names, whole.split)
    few = streamed(path, rows=5)
    assert few.examples == read_corpus(path, rows=5).examples
    assert few.hash == read_corpus(path, rows=5).hash


def test_rows_are_a_sequence(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    rows, wanted = streamed(path).examples, list(read_corpus(path).examples)
    assert len(rows) == 11
    assert [rows[number] for number in range(-11, 11)] == wanted * 2
    for part in (slice(0, 0), slice(2, 9), slice(-4, None), slice(None, None, 3), slice(9, 2, -2), slice(8, 99)):
        assert rows[part] == wanted[part]
    assert list(rows) == wanted
    assert rows != wanted[1:]
    with pytest.raises(IndexError):
        rows[11]
    assert pickle.loads(pickle.dumps(rows)) == wanted


def test_splits_and_data_sets(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": f"t{n}", "label": n % 2} for n in range(7)])
    write_rows(folder / "unlabeled.txt", [{"text": f"u{n}"} for n in range(5)])
    for rows in (None, 9, 7):
        whole = read_corpus(folder, split="train+unlabeled", rows=rows)
        parts = streamed(folder, split="train+unlabeled", rows=rows)
        assert parts.examples == whole.examples
        assert (parts.hash, parts.split, parts.label_names) == (whole.hash, "train+unlabeled", ["0", "1"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])})
    made = datasets.Dataset.from_dict(
        {"sentence": [f"s{n}" for n in range(8)], "label": [0, 1, -1, 1] * 2}, features=features
    )
    made.select(range(1, 8)).save_to_disk(str(tmp_path / "saved"))
    whole, parts = read_corpus(tmp_path / "saved"), streamed(tmp_path / "saved")
    assert parts.examples == whole.examples
    assert parts.label_names == whole.label_names == ["n", "p"]
    stream = tmp_path / "stream.arrow"
    table = pa.Table.from_pylist(SINGLES)
    with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert streamed(stream).examples == read_corpus(stream).examples


TASK_ROWS: list[tuple[Task, list[dict[str, Any]]]] = [
    ("token-classification", [{"tokens": ["Cook", f"onions{n}"], "tags": ["O", "B-food"]} for n in range(4)]),
    ("multi-label-classification", [{"text": f"t{n}", "labels": ["a", "b"][: n % 3]} for n in range(7)]),
    ("regression", [{"text": f"t{n}", "label": [0.1 * n, 1e-17] if n % 3 else None} for n in range(7)]),
    ("masked-lm", [{"text": f"t{n}", "label": 1} for n in range(7)]),
    ("seq2seq-lm", [{"source": f"t{n}", "target": f"u{n}"} for n in range(7)]),
    ("sentence-embedding", [{"text_a": f"t{n}", "text_b": f"u{n}"} for n in range(7)]),
]


@pytest.mark.parametrize("task, rows", TASK_ROWS, ids=[task for task, _ in TASK_ROWS])
def test_the_same_rows_for_every_task(tmp_path: Path, task: Task, rows: list[dict[str, Any]]) -> None:
    path = write_rows(tmp_path / "x.jsonl", rows)
    whole, parts = read_corpus(path, task=task), streamed(path, task=task)
    assert parts.examples == whole.examples
    assert (parts.hash, parts.label_names) == (whole.hash, whole.label_names)
    assert streamed(path, task=task).examples == whole.examples  # as it was kept


def test_the_same_rows_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(5):
        image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows: list[dict[str, object]] = [{"image": f"{number}.png", "label": "ab"[number % 2]} for number in range(5)]
    path = write_rows(tmp_path / "x.csv", rows)
    parts = streamed(path, task="image-classification")
    assert parts.examples == read_corpus(path, task="image-classification").examples
    (tmp_path / "4.png").unlink()
    (tmp_path / "x.csv").write_text((tmp_path / "x.csv").read_text() + "\n")
    with pytest.raises(CorpusError, match="1 row without a usable image: line 6: there is no file"):
        streamed(path, task="image-classification")


def test_images_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a corpus that was named from one folder serves a command that is started in another."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed: pip install 'softlabels[images]'")
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    image.new("RGB", (4, 4)).save(tmp_path / "here" / "a.png")
    write_rows(tmp_path / "here" / "x.jsonl", [{"image": "a.png", "label": "cat"}, {"image": "a.png", "label": "dog"}])
    for place, source in (("here", "x.jsonl"), ("there", "../here/x.jsonl")):
        monkeypatch.chdir(tmp_path / place)
        found = streamed(Path(source), task="image-classification").examples[0].image
        assert found is not None and Path(found).samefile(tmp_path / "here" / "a.png")


@pytest.mark.parametrize(
    "labels",
    [
        ["1", "0", 1, None, "2.0", 3],
        [1, 2, 3, None, "x", 1],
        ["a", "b", None, "c", "a", "b"],
        [None] * 6,
        [3, 2, 1, 0, 10, None],
    ],
)
def test_labels_become_one_type_across_tables(tmp_path: Path, labels: list[object]) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"text": "t", "label": label} for label in labels])
    whole, parts = read_corpus(path), streamed(path)
    assert [row.label for row in parts.examples] == [row.label for row in whole.examples]
    assert (parts.hash, parts.label_names) == (whole.hash, whole.label_names)


def test_quotes_of_a_tsv_are_seen_over_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    for text in (
        'text\tlabel\n"two\nlines ""and"" more\n\n"\t0\nplain\t1\n"x"\t1\n',
        'text\tlabel\n"now\t0\nthen\t1\never"\t0\n',
        'text\tlabel\n"a"\t0\nb "quoted" c\t1\n',
        'text\tlabel\r\n"a\tb"\t0\r\nc\t1\r\n',
    ):
        path.write_text(text, newline="")
        assert streamed(path).examples == read_corpus(path).examples
        path.unlink()
    path.write_text('text\tlabel\n"two\nlines ""and"" more\n\n"\t0\n', newline="")
    assert read_corpus(path).examples == [Example("0", 'two\nlines "and" more\n\n', label=0)]


# ---------------------------------------------------------------------------------------------------------- faults

FAULTS = [
    ("x.jsonl", "".join(json.dumps({"id": f"r{n}", "text": "" if n % 2 else "t"}) + "\n" for n in range(20))),
    ("x.jsonl", "".join(json.dumps({"id": n if n < 7 else None, "text": "t"}) + "\n" for n in range(20))),
    ("x.jsonl", "".join(json.dumps({"id": n % 17, "text": "t"}) + "\n" for n in range(20))),
    ("x.jsonl", '{"text": "t"}\n' * 8 + '{"text": \n'),
    ("x.jsonl", '{"text": "t", "label": 1}\n' * 8 + '{"text": "t", "label": [0]}\n'),
    ("x.jsonl", '{"text": "t", "label": "1"}\n' * 8 + '{"text": "t", "label": "0.5"}\n'),
    ("x.jsonl", '{"text": "t"}\n' * 8 + '{"text": "t", "premise": "u", "hypothesis": "v"}\n'),
    ("x.jsonl", "\n\n"),
    ("x.csv", "text,label\n" + "t,1\n" * 8 + "t,1,2\n"),
    ("x.csv", "text,label\n" + "t,1\n" * 8 + '"t,1\n'),
    ("x.csv", "words,label\n" + "t,1\n" * 8),
    ("x.tsv", "text\tlabel\n" + "t\t1\n" * 8 + "t\n"),
    ("x.txt", "t\n" * 8 + "  \n" + "t\n"),
]


@pytest.mark.parametrize("name, text", FAULTS)
def test_the_same_words_for_the_same_fault(tmp_path: Path, name: str, text: str, few_at_a_time: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    told = []
    for read in (read_corpus, streamed):
        with pytest.raises(CorpusError) as caught:
            read(path)
        told.append(str(caught.value))
    assert told[0] == told[1]
    kept = list(few_at_a_time.iterdir())
    assert [place.suffix for place in kept] == [".lock"], "nothing is kept of a corpus that will not do"


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "t"}\n' * 8 + b'{"text": "caf\xe9"}\n')
    with pytest.raises(CorpusError, match="line 9: byte 0xe9 at offset 125 is not UTF-8"):
        streamed(path)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_LONGEST", 1 << 20)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "' + "t" * (2 << 20) + '"}')
    with pytest.raises(CorpusError, match="line 1 is longer than 1 MB"):
        streamed(path)
    path = tmp_path / "x.csv"
    path.write_text('text\n"open' + "t\n" * (1 << 20))
    with pytest.raises(CorpusError, match="line 2: field larger than field limit"):
        streamed(path)


def test_labels_that_the_teacher_does_not_know(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    whole, parts = read_corpus(path).examples, streamed(path).examples
    known = encode_corpus_labels("sequence-classification", parts, LABEL_NAMES)
    assert known.labelled == 11
    assert known.part(2, 9) == encode_corpus_labels("sequence-classification", whole, LABEL_NAMES).part(2, 9)
    told = []
    for rows in (whole, parts):
        with pytest.raises(CorpusError) as caught:
            encode_corpus_labels("sequence-classification", rows, LABEL_NAMES[:2])
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert "does not know label 'weather' of" in told[0]


# ------------------------------------------------------------------------------------------------------- what is kept


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_at_a_time: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    first = streamed(path)
    assert (few_at_a_time.stat().st_mode & 0o777) == 0o700
    with pytest.MonkeyPatch.context() as patch:
        unreadable(patch)
        assert streamed(path).examples == first.examples
        assert streamed(path).hash == first.hash
        with pytest.raises(AssertionError, match="read again"):
            streamed(path, label="text", text="id")  # another question
    write_rows(path, ROWS[:5])  # another state: what was kept of the first goes
    assert len(streamed(path).examples) == 5
    assert len(list(few_at_a_time.glob("*.arrow"))) == 1
    assert list(first.examples)[7].id == "row-7", "who has the file open reads on"


def test_what_is_damaged_or_old_goes(tmp_path: Path, few_at_a_time: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    wanted = list(streamed(path).examples)
    (kept,) = few_at_a_time.glob("*.arrow")
    for damage in (
        lambda: os.truncate(kept, 700),
        lambda: kept.with_suffix(".json").write_text("{"),
        lambda: kept.with_suffix(".json").write_text("{}"),
        kept.with_suffix(".json").unlink,
    ):
        damage()
        assert streamed(path).examples == wanted
    os.utime(kept, (0, time.time() - 15 * 24 * 3600))
    (few_at_a_time / f".tmp-{kept.name}").write_text("of a command that was killed")
    other = write_rows(tmp_path / "y.jsonl", ROWS)
    streamed(other)
    assert not kept.exists() and not kept.with_suffix(".json").exists()
    streamed(path)
    assert not list(few_at_a_time.glob(".tmp-*"))


def test_what_is_kept_is_its_owners_alone(tmp_path: Path, few_at_a_time: Path) -> None:
    """In a folder that others read, and write, too."""
    few_at_a_time.mkdir(parents=True)
    few_at_a_time.chmod(0o777)
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    wanted = list(streamed(path).examples)
    kept = {place for place in few_at_a_time.iterdir() if place.suffix != ".lock"}
    assert len(kept) == 2 and {place.stat().st_mode & 0o777 for place in kept} == {0o600}
    if os.geteuid() == 0:  # only root may give files away
        for place in kept:
            os.chown(place, 65534, -1)
            assert streamed(path).examples == wanted
            assert {place.stat().st_uid for place in kept} == {0}, "what another one has put there is not believed"
    arrow = next(place for place in kept if place.suffix == ".arrow")
    arrow.with_suffix(".json").unlink()
    elsewhere = tmp_path / "elsewhere"
    (few_at_a_time / f".tmp-{arrow.name}").symlink_to(elsewhere)
    assert streamed(path).examples == wanted and not elsewhere.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "file"))
    with pytest.raises(CorpusError, match=r"cannot be kept in .*SOFTLABELS_CACHE"):
        streamed(write_rows(tmp_path / "x.jsonl", ROWS))


def test_small_corpora_keep_nothing(tmp_path: Path, few_at_a_time: Path) -> None:
    assert isinstance(read_corpus(write_rows(tmp_path / "x.jsonl", ROWS)).examples, list)
    assert not few_at_a_time.exists()


# ------------------------------------------------------------------------------------------------------------ dumps


def test_a_dump_has_the_same_bytes(tmp_path: Path, teacher: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    options = options_of(capture=["logits", "hidden:1"], shard_rows=4)
    dump(read_corpus(path), teacher=str(teacher), out=tmp_path / "whole", options=options, device="cpu")
    dump(streamed(path), teacher=str(teacher), out=tmp_path / "parts", options=options, device="cpu")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


TASK_TEACHERS: list[tuple[str, dict[str, Any], Task, list[dict[str, Any]], dict[str, Any]]] = [
    ("BertForMaskedLM", {}, "masked-lm", ROWS, {"capture": ["vocab:topk=4"], "masking": {"times": 2}}),
    (
        "BertForTokenClassification",
        {"id2label": dict(enumerate(TAGS))},
        "token-classification",
        [{"tokens": ["Cook", f"onions {n}"], "tags": ["O", "B-food"] if n % 2 else None} for n in range(6)],
        {},
    ),
    (
        "BertForSequenceClassification",
        {"num_labels": 1},
        "regression",
        [{"text": f"a text {n}", "label": n / 3 if n % 2 else None} for n in range(6)],
        {},
    ),
]


@pytest.mark.parametrize("kind, changes, task, rows, options", TASK_TEACHERS, ids=[each[0] for each in TASK_TEACHERS])
def test_a_dump_of_every_task_has_the_same_bytes(
    tmp_path: Path,
    kind: str,
    changes: dict[str, Any],
    task: Task,
    rows: Sequence[dict[str, Any]],
    options: dict[str, Any],
) -> None:
    teacher = str(save(tmp_path / "teacher", kind, **changes))
    path = write_rows(tmp_path / "x.jsonl", list(rows))
    chosen = options_of(**options)
    for corpus, out in ((read_corpus(path, task=task), "whole"), (streamed(path, task=task), "parts")):
        dump(corpus, teacher=teacher, out=tmp_path / out, options=chosen, device="cpu")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_copies_to_be_masked(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    masking = options_of(masking={"times": 3}).masking
    whole, parts = (mask_often(corpus, masking) for corpus in (read_corpus(path), streamed(path)))
    assert list(parts.examples) == whole.examples
    assert not isinstance(parts.examples, list)
    assert parts.examples[5:19:2] == whole.examples[5:19:2]
    assert parts.hash == whole.hash


def test_a_stopped_dump_reads_nothing_again(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    dump(streamed(path), teacher=str(teacher), out=tmp_path / "whole", options=options_of(), device="cpu")

    class Stopped(Exception):
        pass

    from softlabels.cache.build import CacheBuild

    real = CacheBuild.write_examples

    def stop(build: CacheBuild, shard: int, rows: Tokenized) -> None:
        if shard == 1:
            raise Stopped
        real(build, shard, rows)

    with monkeypatch.context() as patch:
        patch.setattr(CacheBuild, "write_examples", stop)
        with pytest.raises(Stopped):
            dump(streamed(path), teacher=str(teacher), out=tmp_path / "parts", options=options_of(), device="cpu")
    with monkeypatch.context() as patch:
        unreadable(patch)
        batches: list[int] = []
        real_read = SpooledRows._read

        def counted(rows: SpooledRows, number: int) -> list[Example]:
            batches.append(number)
            return real_read(rows, number)

        patch.setattr(SpooledRows, "_read", counted)
        report = dump(streamed(path), teacher=str(teacher), out=tmp_path / "parts", options=options_of(), device="cpu")
    assert (report.rows, report.new_rows) == (11, 7)
    # the probe looks at the first thousand, which are all here; then the rows of what is missing, each batch once
    assert batches == [0, 1, 2, 3, 1, 2, 3]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_source_that_changed_is_refused(tmp_path: Path, teacher: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    dump(streamed(path), teacher=str(teacher), out=tmp_path / "cache", options=options_of(), device="cpu")
    changed = [row | {"text": "another"} if row["id"] == "row-9" else row for row in ROWS]
    write_rows(path, changed)
    with pytest.raises(CacheError, match="holds a cache of another configuration"):
        dump(streamed(path), teacher=str(teacher), out=tmp_path / "cache", options=options_of(), device="cpu")


@pytest.mark.slow
def test_two_processes_share_the_rows_out(tmp_path: Path, teacher: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    dump(read_corpus(path), teacher=str(teacher), out=tmp_path / "whole", options=options_of(), device="cpu")
    devices = ["cpu", "cpu"]
    dump(streamed(path), teacher=str(teacher), out=tmp_path / "parts", options=options_of(), devices=devices)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
