"""Corpora: every format gives the same rows, and every bad input one clear message."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softlabels.corpora.arrow_files import class_names_of, dataset_source
from softlabels.corpora.files import READERS
from softlabels.corpora.hub import hub_candidates
from softlabels.corpora.sources import parse_split
from softlabels.corpus import Corpus, check_trainable, encode_labels, read_corpus
from softlabels.errors import CorpusError
from softlabels.types import NO_LABEL, Example, Label

CORPORA = Path(os.environ.get("SOFTLABELS_CORPORA", Path(__file__).parents[1] / ".." / "shared" / "corpora"))

Rows = list[dict[str, object]]


def write_rows(path: Path, rows: Rows) -> Path:
    """`rows` in the format that the path's suffix names, as a common tool would write them."""
    names = list(rows[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{row['text']}\n" for row in rows), encoding="utf-8")
    else:
        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    return path


def fault(action: Callable[[], object]) -> str:
    """The message of the CorpusError that `action` raises: one line, however bad the input."""
    with pytest.raises(CorpusError) as caught:
        action()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def bad(tmp_path: Path, content: str | bytes, *, name: str = "x.jsonl", **options: object) -> str:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return fault(lambda: read_corpus(path, **options))  # type: ignore[arg-type]


def vars_of(row: Example) -> list[object]:
    return [row.id, row.text, row.text_b, row.label]


SINGLES: Rows = [
    {"id": "a", "text": "plain", "label": 1},
    {"id": "b", "text": 'he said "no", twice', "label": 0},
    {"id": "c", "text": "two\nlines, a\ttab", "label": None},
    {"id": "d", "text": "Grüße 世界 🤗 \u2028 end", "label": 1},
    {"id": "e", "text": " spaces kept ", "label": 2},
]
PAIRS: Rows = [
    {"premise": "It rains.", "hypothesis": "It's wet.", "label": "yes"},
    {"premise": "It's dry.", "hypothesis": "It rains.", "label": "no"},
]


# ---------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("rows", [SINGLES, PAIRS], ids=["singles", "pairs"])
def test_every_format_gives_the_same_corpus(tmp_path: Path, rows: Rows) -> None:
    formats = [suffix for suffix in READERS if suffix != ".txt"]
    corpora = [read_corpus(write_rows(tmp_path / f"rows{suffix}", rows)) for suffix in formats]
    table = pa.Table.from_pylist(rows)
    with (
        pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    corpora.append(read_corpus(tmp_path / "stream.arrow"))
    for corpus in corpora:
        assert corpus.examples == corpora[0].examples
        assert corpus.label_names == corpora[0].label_names
        assert corpus.hash == corpora[0].hash
        assert corpus.split is None


def test_rows_are_as_the_file_has_them(tmp_path: Path) -> None:
    corpus = read_corpus(write_rows(tmp_path / "x.csv", SINGLES))
    assert [vars_of(row) for row in corpus.examples] == [
        [row["id"], row["text"], None, row["label"]] for row in SINGLES
    ]
    assert corpus.label_names == ["0", "1", "2"]
    pairs = read_corpus(write_rows(tmp_path / "p.csv", PAIRS))
    assert pairs.examples[0] == Example("0", "It rains.", "It's wet.", "yes")
    assert pairs.label_names == ["no", "yes"]


def test_text_file_is_unlabelled(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffone \u2028 line\r\nanother  \n\n".encode())
    corpus = read_corpus(path)
    assert corpus.examples == [Example("0", "one \u2028 line"), Example("1", "another  ")]
    assert corpus.label_names is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(lambda text: text.strip()),
        min_size=1,
        max_size=6,
    )
)
def test_any_text_survives_any_format(tmp_path: Path, texts: list[str]) -> None:
    rows: Rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    for suffix in (".jsonl", ".csv", ".parquet", ".arrow"):
        corpus = read_corpus(write_rows(tmp_path / f"x{suffix}", rows))
        assert [row.text for row in corpus.examples] == texts


def test_byte_order_mark_and_a_huge_field(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    before = csv.field_size_limit()
    path.write_bytes(("\ufefftext,label\n" + "x" * 200_000 + ",1\n").encode())
    assert len(read_corpus(path).examples[0].text) == 200_000
    assert csv.field_size_limit() == before


def test_tsv_with_and_without_quoting(tmp_path: Path) -> None:
    path = tmp_path / "plain.tsv"
    path.write_text('sentence\tlabel\n"quoted" at first\t0\nhe said "hi\t1\n"open\t1\n')
    assert [row.text for row in read_corpus(path).examples] == ['"quoted" at first', 'he said "hi', '"open']
    path.write_text('sentence\tlabel\n"he said ""hi"""\t0\n"tab\there"\t1\n"two\nlines"\t1\n')
    assert [row.text for row in read_corpus(path).examples] == ['he said "hi"', "tab\there", "two\nlines"]
    # one text opens with a quotation mark, a later one ends with one: three rows, not one of three lines
    path.write_text('sentence\tlabel\n"now\t0\nthen\t1\never"\t0\n')
    assert [row.text for row in read_corpus(path).examples] == ['"now', "then", 'ever"']


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n\n')
    assert [row.id for row in read_corpus(path).examples] == ["0", "1"]


def test_first_rows_only(tmp_path: Path) -> None:
    for suffix in READERS:
        path = write_rows(tmp_path / f"x{suffix}", [{"text": f"t{n}", "label": n % 2} for n in range(9)])
        assert [row.text for row in read_corpus(path, rows=3).examples] == ["t0", "t1", "t2"]
        assert len(read_corpus(path, rows=100).examples) == 9
    assert "--rows 0" in fault(lambda: read_corpus(path, rows=0))


def test_hash_tells_what_rows_hold() -> None:
    def digest(*rows: Example) -> str:
        return Corpus("x", None, list(rows), None).hash

    base = Example("1", "a", "b", 1)
    others = [
        Example("2", "a", "b", 1),
        Example("1", "ab", None, 1),
        Example("1", "a", "b", "1"),
        Example("1", "a", "b", None),
        Example("1", "a", "b", "None"),
    ]
    assert len({digest(row) for row in [base, *others]}) == 6
    assert digest(base, others[0]) != digest(others[0], base)
    assert len(digest(base)) == 32


# ---------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "names",
    [
        "text",
        "sentence",
        "Text",
        "text_a,text_b",
        "sentence1,sentence2",
        "question,sentence",
        "QUESTION1,question2",
    ],
)
def test_usual_columns_are_recognised(tmp_path: Path, names: str) -> None:
    columns = names.split(",")
    rows: Rows = [{"other": "z", "Class": "c", **{name: f"t{n}" for n, name in enumerate(columns)}}]
    example = read_corpus(write_rows(tmp_path / "x.parquet", rows)).examples[0]
    assert (example.text, example.text_b) == ("t0", "t1" if len(columns) == 2 else None)
    assert example.label == "c"


def test_columns_by_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.csv", [{"body": "b", "a,b": "c", "title": "t", "stars": "4"}])
    assert read_corpus(path, text="body", label="stars").examples == [Example("0", "b", None, 4)]
    assert read_corpus(path, text="title,body").examples == [Example("0", "t", "b")]
    assert read_corpus(path, text="a,b").examples == [Example("0", "c")]
    message = fault(lambda: read_corpus(path, text="review"))
    assert "no column 'review' (--text)" in message
    assert "body, a,b, title, stars" in message
    assert "no column 'y' (--label)" in fault(lambda: read_corpus(path, text="body", label="y"))
    assert "name one column, or two" in fault(lambda: read_corpus(path, text="a,b,body"))


def test_bad_columns(tmp_path: Path) -> None:
    assert "has no column of texts" in bad(tmp_path, '{"txt": "a"}')
    assert "it has column txt" in bad(tmp_path, '{"txt": "a"}')
    assert "a header" in bad(tmp_path, "nice film,1\nbad film,0\n", name="x.csv")
    assert "separated by ';'" in bad(tmp_path, "text;label\na;1\n", name="x.csv")
    assert "column 'text' twice" in bad(tmp_path, "text,text\na,b\n", name="x.csv")
    assert "line 1" in bad(tmp_path, '{"text": "a", "text": "b"}')
    assert "'text' is there twice" in bad(tmp_path, '{"text": "a", "text": "b"}')
    assert "could mean premise,hypothesis or text" in bad(tmp_path, '{"text":"a","premise":"b","hypothesis":"c"}')
    assert "'Text' and 'TEXT'" in bad(tmp_path, '{"Text": "a", "TEXT": "b"}')
    doubled = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(doubled, tmp_path / "d.parquet")
    assert "column 'text' twice" in fault(lambda: read_corpus(tmp_path / "d.parquet"))


def test_token_classification_is_refused(tmp_path: Path) -> None:
    message = bad(tmp_path, '{"tokens": ["a"], "tags": ["O"]}')
    assert "words for token classification" in message


# -------------------------------------------------------------------------------------------------------- ids


def test_ids(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.csv", [{"ID": 7, "text": "a"}, {"ID": 8, "text": "b"}])
    assert [row.id for row in read_corpus(path).examples] == ["7", "8"]
    message = bad(tmp_path, '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}')
    assert "several rows under one id" in message
    assert ": 1;" in message
    assert "neither a string nor an integer: line 2" in bad(tmp_path, '{"id":1,"text":"a"}\n{"text":"b"}')


# ----------------------------------------------------------------------------------------------------- labels


def labels_of(tmp_path: Path, *values: object) -> list[Label]:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": "t", "label": value}) + "\n" for value in values))
    return [row.label for row in read_corpus(path).examples]


def test_labels_are_integers_strings_or_missing(tmp_path: Path) -> None:
    assert labels_of(tmp_path, 0, 1, None) == [0, 1, None]
    assert labels_of(tmp_path, 0.0, 2.0, float("nan")) == [0, 2, None]
    assert labels_of(tmp_path, True, False) == [1, 0]
    assert labels_of(tmp_path, "1", "0", "") == [1, 0, None]
    assert labels_of(tmp_path, "1.0", "0.0", "NaN", "null") == [1, 0, None, None]
    assert labels_of(tmp_path, "pos", " neg ", 3) == ["pos", "neg", "3"]
    assert labels_of(tmp_path, "01", "02") == ["01", "02"]
    assert labels_of(tmp_path, "none", "None") == ["none", "None"]
    assert all(type(label) is int for label in labels_of(tmp_path, True, 1.0, "1"))


def test_label_names_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.csv", [{"text": "t", "label": label} for label in (10, 9, 100, 9)])
    assert read_corpus(path).label_names == ["9", "10", "100"]


def test_bad_labels(tmp_path: Path) -> None:
    for content in ('{"text":"a","label":0.5}', '{"text":"a","label":"0.5"}', '{"text":"a","label":1e400}'):
        assert "Regression labels are not supported by this version" in bad(tmp_path, content)
    assert "Regression labels" in bad(tmp_path, "text,label\na,1\nb,3.75\n", name="x.csv")
    message = bad(tmp_path, '{"text":"a","label":1}\n{"text":"b","label":[0,1]}')
    assert "line 2: the label is of type list" in message
    assert "surrogate" in bad(tmp_path, '{"text":"a","label":"\\ud800"}')


def test_encode_labels() -> None:
    def encode(*labels: int | str | None, names: list[str]) -> list[int]:
        return encode_labels([Example(str(n), "t", None, label) for n, label in enumerate(labels)], names)

    assert encode("pos", "neg", None, names=["neg", "pos"]) == [1, 0, NO_LABEL]
    assert encode(1, "0", names=["neg", "pos"]) == [1, 0]
    assert encode("Pos", names=["NEG", "POS"]) == [1]
    assert encode(3, 1, names=["1", "2", "3"]) == [2, 0]
    assert encode(100, 102, names=["100", "102"]) == [0, 1]
    assert encode("a", "A", names=["A", "a"]) == [1, 0]
    message = fault(lambda: encode("pos", "meh", 7, names=["neg", "pos"]))
    assert "does not know labels '7', 'meh' of 2 rows (ids 1, 2); it knows neg, pos" in message
    # an integer that is no name is no index either where names are integers
    assert "does not know label '0'" in fault(lambda: encode(0, names=["1", "2"]))
    assert "does not know label '2'" in fault(lambda: encode(2, names=["neg", "pos"]))
    assert "does not know label '-1'" in fault(lambda: encode(-1, names=["neg", "pos"]))
    assert "id2label" in fault(lambda: encode("neg", names=["LABEL_0", "LABEL_1"]))
    assert "and 4 more" in fault(lambda: encode(*"cdefghijk", names=["a", "b"]))


def test_check_trainable() -> None:
    def corpus(*labels: int | None) -> Corpus:
        return Corpus("x", "train", [Example(str(n), "t", None, label) for n, label in enumerate(labels)], None)

    check_trainable(corpus(0, 1, None))
    assert "no labelled row among 2" in fault(lambda: check_trainable(corpus(None, None)))
    assert "only one labelled row" in fault(lambda: check_trainable(corpus(1, None)))
    assert "one class only: all 3 labelled rows are '1'" in fault(lambda: check_trainable(corpus(1, 1, 1, None)))


# -------------------------------------------------------------------------------------------------- bad input


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text\na\n")
    message = fault(lambda: read_corpus(tmp_path / "review.csv"))
    assert "no such file" in message
    assert f"Did you mean {tmp_path / 'reviews.csv'}?" in message
    assert "nor is there a folder" in fault(lambda: read_corpus(tmp_path / "gone" / "x.csv"))
    for name in ("./gone", "gone.jsonl", "gone.json", "a b", "~/no-such-file-here", "a/b/c", r"C:\x\y"):
        assert "no such file" in fault(lambda name=name: read_corpus(name))  # type: ignore[misc]


@pytest.mark.parametrize("suffix", list(READERS))
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    assert "is empty" in bad(tmp_path, "", name=f"x{suffix}")


def test_no_rows(tmp_path: Path) -> None:
    for name, content in (
        ("x.jsonl", "\n"),
        ("x.csv", "text,label\n"),
        ("x.txt", "\n \n"),
        ("x.tsv", "text\n"),
    ):
        assert "has no rows" in bad(tmp_path, content, name=name)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    assert "has no rows" in fault(lambda: read_corpus(tmp_path / "x.parquet"))


def test_unreadable_format(tmp_path: Path) -> None:
    assert "in no format that is read here: .jsonl, .csv" in bad(tmp_path, "[]", name="x.json")
    assert "cannot be read as Parquet" in bad(tmp_path, "not parquet at all", name="x.parquet")
    assert "cannot be read as Arrow" in bad(tmp_path, "not arrow at all", name="x.arrow")
    assert "cannot be read as Arrow" in bad(tmp_path, b"ARROW1\0\0 cut", name="x.arrow")
    whole = write_rows(tmp_path / "whole.parquet", SINGLES).read_bytes()
    assert "cannot be read as Parquet" in bad(tmp_path, whole[: len(whole) // 2], name="x.parquet")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
def test_invalid_utf8_gives_line_and_offset(tmp_path: Path, suffix: str) -> None:
    message = bad(tmp_path, b"text\nfine\ncaf\xe9\n", name=f"x{suffix}")
    assert f"x{suffix}, line 3: byte 0xe9 at offset 13 is not UTF-8" in message
    assert "looks like UTF-16" in bad(tmp_path, "text\nfine\n".encode("utf-16"), name=f"x{suffix}")


def test_bad_json_line(tmp_path: Path) -> None:
    assert "line 2 is not JSON" in bad(tmp_path, '{"text": "a"}\n{"text": \n')
    assert "line 2 is not a JSON object" in bad(tmp_path, '{"text": "a"}\n["b"]\n')
    assert "line 1 is not JSON" in bad(tmp_path, "[" * 100_000)


def test_ragged_rows_and_open_quotes(tmp_path: Path) -> None:
    message = bad(tmp_path, 'text,label\n"two\nlines",1\nthree, four,1\n', name="x.csv")
    assert "line 4: 3 fields where the first line names 2 columns" in message
    assert "line 3: 1 field where" in bad(tmp_path, "text\tlabel\na\t1\nb\n", name="x.tsv")
    assert "line 2: unexpected end of data" in bad(tmp_path, 'text,label\n"open,1\nb,0\n', name="x.csv")


def test_rows_without_a_usable_text(tmp_path: Path) -> None:
    rows = ['""', '"  "', "null", "3", '["a"]', '"\\ud800"', '"fine"']
    message = bad(tmp_path, "".join(f'{{"id": "r{n}", "text": {text}}}\n' for n, text in enumerate(rows)))
    assert "has 6 rows without a usable text" in message
    assert "line 1 (id 'r0'): 'text' is empty" in message
    assert "line 3 (id 'r2'): 'text' is missing" in message
    assert "line 4 (id 'r3'): 'text' is of type int, not a string" in message
    assert "r5" not in message  # five are listed
    assert "line 2: 'text_b' is missing" in bad(tmp_path, '{"text_a":"a","text_b":"b"}\n{"text_a":"a"}')
    assert "line 2: 'text' is empty" in bad(tmp_path, "a\n\nb\n", name="x.txt")
    write_rows(tmp_path / "x.parquet", [{"text": 1}, {"text": 2}])
    assert "row 0: 'text' is of type int" in fault(lambda: read_corpus(tmp_path / "x.parquet"))
    assert "surrogate" in bad(tmp_path, '{"text": "\\udc00 half"}')


def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}')
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    assert "Permission denied" in fault(lambda: read_corpus(path))


# ----------------------------------------------------------------------------------------------------- splits


def test_folder_of_splits(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    write_rows(tmp_path / "valid.csv", [{"text": "c", "label": 1}])
    write_rows(tmp_path / "Test.parquet", [{"text": "d", "label": 1}])
    write_rows(tmp_path / "unlabelled.txt", [{"text": "e"}, {"text": "f"}])
    (tmp_path / "README.md").write_text("not a split")
    train = read_corpus(tmp_path)
    assert train.split == "train"
    assert train.examples[1] == Example("train/1", "b", None, 0)
    dev = read_corpus(tmp_path, split="validation")
    assert dev.split == "dev"
    assert dev == read_corpus(tmp_path, split="dev")
    assert [row.id for row in dev.examples] == ["dev/0"]
    joined = read_corpus(tmp_path, split="train+unlabeled")
    assert joined.split == "train+unlabeled"
    assert [row.id for row in joined.examples] == ["train/0", "train/1", "unlabeled/0", "unlabeled/1"]
    assert [row.label for row in joined.examples] == [1, 0, None, None]
    assert joined.label_names == ["0", "1"]
    three = read_corpus(tmp_path, split="train+unlabeled", rows=3)
    assert [row.text for row in three.examples] == ["a", "b", "e"]
    assert read_corpus(tmp_path, split="test").examples[0].text == "d"


def test_bad_splits(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", [{"text": "a", "id": "1"}])
    assert "no split 'train', the default; it has test" in fault(lambda: read_corpus(tmp_path))
    assert "no split 'dev'; it has test" in fault(lambda: read_corpus(tmp_path, split="validation"))
    assert "different ones" in fault(lambda: read_corpus(tmp_path, split="test+test"))
    assert "different ones" in fault(lambda: read_corpus(tmp_path, split="dev+valid"))
    assert "different ones" in fault(lambda: read_corpus(tmp_path, split="test+"))
    message = fault(lambda: read_corpus(tmp_path / "test.jsonl", split="test"))
    assert "single file and has no splits: leave --split test out" in message
    write_rows(tmp_path / "dev.jsonl", [{"text": "b", "id": "1"}])
    assert "one split at a time" in fault(lambda: read_corpus(tmp_path, split="test+dev"))
    (tmp_path / "validation.txt").write_text("c")
    assert "'dev' twice, dev.jsonl and validation.txt" in fault(lambda: read_corpus(tmp_path, split="test"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no split" in fault(lambda: read_corpus(empty))
    assert parse_split("Train + validation") == ["train", "dev"]


def test_no_other_builtin() -> None:
    assert "there are builtin:docstrings and builtin:docstring-kinds" in fault(lambda: read_corpus("builtin:poems"))


# ---------------------------------------------------------------------------------------------------- the Hub

REVIEWS = {"sentence": ["fine film", "poor film", "no idea"], "label": [1, 0, -1], "idx": [0, 1, 2]}


def reviews(names: list[str]):  # -> datasets.Dataset
    import datasets

    features = {
        "sentence": datasets.Value("string"),
        "label": datasets.ClassLabel(names=names),
        "idx": datasets.Value("int32"),
    }
    return datasets.Dataset.from_dict(REVIEWS, features=datasets.Features(features))


def test_dataset_of_named_classes(tmp_path: Path) -> None:
    dataset = reviews(["bad", "good"])
    table = dataset_source(dataset, where="x")
    assert table.class_names == {"label": ["bad", "good"]}
    assert table.column("label") == [1, 0, -1]
    assert dataset_source(dataset.select([2, 0]), where="x", limit=1).column("sentence") == ["no idea"]
    # the same through files, which keep the names in their schema
    dataset.to_parquet(str(tmp_path / "x.parquet"))
    corpus = read_corpus(tmp_path / "x.parquet")
    assert [row.label for row in corpus.examples] == ["good", "bad", None]
    assert corpus.label_names == ["bad", "good"]
    assert encode_labels(corpus.examples, ["bad", "good"]) == [1, 0, NO_LABEL]
    assert encode_labels(corpus.examples, ["GOOD", "BAD"]) == [0, 1, NO_LABEL]
    reviews(["1 star", "5 stars", "unused"]).to_parquet(str(tmp_path / "x.parquet"))
    assert read_corpus(tmp_path / "x.parquet").label_names == ["1 star", "5 stars", "unused"]


def test_label_outside_its_classes() -> None:
    table = pa.table({"text": ["a"], "label": [5]})
    features = {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    assert class_names_of(table.replace_schema_metadata(metadata).schema) == {"label": ["x", "y"]}
    for odd in ("[]", "{", '{"info": 3}', '{"info": {"features": {"a": 1}}}'):
        assert class_names_of(table.replace_schema_metadata({"huggingface": odd}).schema) == {}


def test_label_outside_its_classes_in_a_file(tmp_path: Path) -> None:
    features = {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": ["a"], "label": [5]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "x.parquet")
    assert "row 0: label 5 is none of its 2 classes" in fault(lambda: read_corpus(tmp_path / "x.parquet"))


def test_what_a_hub_name_means() -> None:
    assert hub_candidates("glue/sst2") == [("glue", "sst2"), ("glue/sst2", None)]
    assert hub_candidates("owner/name") == [("owner/name", None), ("owner", "name")]
    assert hub_candidates("owner/name:config") == [("owner/name", "config")]
    assert hub_candidates("hf:imdb") == [("imdb", None)]
    assert "no Hub dataset's name" in fault(lambda: read_corpus("hf:a/b/c"))


def in_process(folder: Path, source: str, environment: dict[str, str]) -> str:
    """What reading `source` says in a process of its own, as datasets reads its settings when imported."""
    code = (
        "import json, sys, time\n"
        "import datasets\n"
        "from softlabels.corpus import read_corpus\n"
        "from softlabels.errors import CorpusError\n"
        "start = time.monotonic()\n"
        "try:\n"
        "    corpus = read_corpus(sys.argv[1], split='validation')\n"
        "    print(json.dumps([[row.id, row.text, row.label] for row in corpus.examples]))\n"
        "except CorpusError as error:\n"
        "    print(error)\n"
        "assert time.monotonic() - start < 8\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    paths = {"HF_HOME": str(folder / "hf"), "PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, "-c", code, source],
        cwd=folder,
        env={**kept, **paths, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_offline_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "glued").mkdir()
    message = in_process(tmp_path, "glue/sst2", {"HF_HUB_OFFLINE": "1"})
    assert "the Hub cannot be reached, and it was not downloaded before" in message
    # no setting says so, but nothing answers there
    message = in_process(tmp_path, "glue", {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "the Hub cannot be reached" in message
    assert "Did you mean glued?" in message


def test_downloaded_dataset_is_read_offline(tmp_path: Path) -> None:
    """glue/sst2 as datasets leaves it in its cache: builder glue, config sst2."""
    folder = tmp_path / "hf" / "datasets" / "glue" / "sst2" / "0.0.0" / "bcdcba79d07bc864"
    folder.mkdir(parents=True)
    (tmp_path / "glue").mkdir()  # a folder of that name is not taken for the dataset
    table = reviews(["negative", "positive"]).with_format("arrow")[:]
    with (
        pa.OSFile(str(folder / "glue-validation.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    info = {
        "builder_name": "parquet",
        "dataset_name": "glue",
        "config_name": "sst2",
        "features": {
            "sentence": {"dtype": "string", "_type": "Value"},
            "label": {"names": ["negative", "positive"], "_type": "ClassLabel"},
            "idx": {"dtype": "int32", "_type": "Value"},
        },
        "splits": {"validation": {"name": "validation", "num_examples": 3, "dataset_name": "glue"}},
        "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        rows = json.loads(in_process(tmp_path, "hf:glue/sst2", environment))
        assert rows[:2] == [["dev/0", "fine film", "positive"], ["dev/1", "poor film", "negative"]]
        assert rows[2] == ["dev/2", "no idea", None]


class _NoSuchRepository(BaseHTTPRequestHandler):
    """Answers as the Hub does for a dataset it doesn't have."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_dataset_the_hub_does_not_have(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _NoSuchRepository) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        message = in_process(tmp_path, "nobody/nothing", {"HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"})
        server.shutdown()
    assert "nor a dataset on the Hub that you can read" in message


# -------------------------------------------------------------------------------------------------- real data


def real(name: str) -> Path:
    path = CORPORA / name
    if not path.exists():
        pytest.skip(f"{path} is not here: set SOFTLABELS_CORPORA to the folder of test corpora")
    return path


def test_a_large_file_is_read() -> None:
    corpus = read_corpus(real("sst2/train.jsonl"))
    assert corpus.hash
    assert len(corpus.examples) == 67349
    assert corpus.label_names == ["0", "1"]


def test_real_pairs_and_chinese() -> None:
    rte = read_corpus(real("rte"), split="dev")
    assert len(rte.examples) == 277
    assert all(row.text_b for row in rte.examples)
    tnews = read_corpus(real("tnews"), split="train+unlabeled")
    assert tnews.label_names == [str(number) for number in range(15)]
    assert tnews.examples[-1].label is None
    assert "token classification" in fault(lambda: read_corpus(real("wnut17")))
