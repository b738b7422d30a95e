"""`softlabels import`: logits that a teacher gave elsewhere become a cache, whatever file they lie in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from softlabels.cache import open_cache
from softlabels.cache.build import CacheBuild
from softlabels.cache.format import read_manifest
from softlabels.cli import _guarded
from softlabels.config import ImportOptions, StudentOptions
from softlabels.corpus import read_column, read_corpus
from softlabels.errors import CacheError, CorpusError, TeacherError
from softlabels.imports import import_logits
from softlabels.train import train_student
from tests.models import LABEL_NAMES, TEXTS, tiny_tokenizer

ROWS = 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Texts with the logits of a teacher that is mostly right; every fourth row has no label."""
    generator = np.random.default_rng(0)
    rows = []
    for number, (text, name) in enumerate(TEXTS[:ROWS]):
        logits = generator.normal(size=3) + 3 * np.eye(3)[LABEL_NAMES.index(name)]
        exact = np.exp(logits) / np.exp(logits).sum()
        label = name if number % 4 else None
        rows.append({"id": f"r{number}", "text": text, "label": label, "scores": logits.tolist(), "p": exact.tolist()})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=["jsonl", "parquet", "parquet-float16", "arrow", "csv", "saved", "saved-splits"])
def source(request: pytest.FixtureRequest, tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = request.param
    if kind == "jsonl":
        return write_jsonl(tmp_path / "rows.jsonl", rows)
    if kind == "csv":
        lines = ["id,text,label,scores,p"]
        for row in rows:
            quoted = [json.dumps(row[name]) for name in ("scores", "p")]
            lines.append(f'{row["id"]},"{row["text"]}",{row["label"] or ""},"{quoted[0]}","{quoted[1]}"')
        (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
        return tmp_path / "rows.csv"
    table = pa.Table.from_pylist(rows)
    if kind == "parquet-float16":
        table = table.set_column(3, "scores", table.column("scores").cast(pa.list_(pa.float16())))
    if kind.startswith("parquet"):
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"
    if kind == "arrow":
        with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
            writer.write_table(table)
        return tmp_path / "rows.arrow"
    made = datasets.Dataset(table)
    datasets.disable_progress_bars()
    if kind == "saved":
        made.save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"
    datasets.DatasetDict({"train": made, "test": made.select(range(5))}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_every_format_becomes_the_same_cache(source: Path, rows, tokenizer: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "cache"
    command = (
        f"import {source} --out {out} --logits scores --tokenizer {tokenizer} --shard-rows 8 --json --teacher-name GPT"
    )
    assert _guarded([*command.split(), "--label-names", ",".join(LABEL_NAMES)], debug=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == report["new_rows"] == ROWS and report["accuracy"] > 0.8
    cache = open_cache(out)
    tolerance = 1e-2 if "float16" in str(source) or source.name == "rows.parquet" else 1e-6
    assert np.allclose(cache.column("logits"), [row["scores"] for row in rows], atol=tolerance)
    assert cache.ids == [row["id"] for row in rows]
    assert [text for text, _ in cache.texts()] == [row["text"] for row in rows]
    wanted = [LABEL_NAMES.index(row["label"]) if row["label"] else -100 for row in rows]
    assert cache.labels.tolist() == wanted
    assert cache.label_names == LABEL_NAMES and cache.manifest.teacher.name == "GPT"
    assert len(cache.manifest.shard_rows) == 4
    assert cache.teacher_config() == {} and not (out / "teacher").exists()
    assert len(cache.tokenizer()) == cache.manifest.teacher.vocab_size


def imported(rows: list[dict[str, Any]], folder: Path, tokenizer: str, *, column: str = "scores", **changes: Any):
    corpus = read_corpus(write_jsonl(folder / "rows.jsonl", rows))
    values = read_column(folder / "rows.jsonl", column, option="--logits")
    options = ImportOptions.model_validate({"label_names": LABEL_NAMES, "shard_rows": 8} | changes)
    return import_logits(
        corpus, values, tokenizer=tokenizer, out=folder / "cache", probabilities=column == "p", options=options
    )


def test_probabilities_are_exact_at_every_temperature(rows, tokenizer: str, tmp_path: Path) -> None:
    imported(rows, tmp_path, tokenizer, column="p")
    stored = torch.from_numpy(open_cache(tmp_path / "cache").column("logits")).double()
    logits = torch.tensor([row["scores"] for row in rows], dtype=torch.float64)
    for temperature in (1, 2, 5, 20):
        assert torch.allclose((stored / temperature).softmax(1), (logits / temperature).softmax(1), atol=1e-6)


def test_probabilities_of_zero_are_counted(rows, tokenizer: str, tmp_path: Path) -> None:
    sure = [{**row, "p": [0.0, 1.0, 0.0]} for row in rows[:4]] + rows[4:]
    assert imported(sure, tmp_path, tokenizer, column="p").zeros == 8
    logits = torch.from_numpy(open_cache(tmp_path / "cache").column("logits"))
    assert torch.isfinite(logits).all()
    assert torch.allclose(logits[:4].softmax(1), torch.tensor([0.0, 1.0, 0.0]))


def test_a_student_learns_from_it(rows, tokenizer: str, tmp_path: Path) -> None:
    imported(rows, tmp_path, tokenizer)
    options = StudentOptions(student="bilstm", epochs=1, batch_size=8, options={"embedding_dim": 16, "hidden_size": 16})
    train_student(open_cache(tmp_path / "cache"), out=tmp_path / "run", options=options, cpu=True)
    assert (tmp_path / "run" / "config.json").is_file()


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_interrupted_import_goes_on_to_the_same_bytes(
    rows, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    imported(rows, tmp_path / "whole", tokenizer)
    missing = CacheBuild.missing
    with monkeypatch.context() as patch:

        def stop_at_two(self: CacheBuild, shard: int) -> list[str]:
            if shard == 2:
                raise KeyboardInterrupt
            return missing(self, shard)

        patch.setattr(CacheBuild, "missing", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            imported(rows, tmp_path / "broken", tokenizer)
    assert not read_manifest(tmp_path / "broken" / "cache").complete
    report = imported(rows, tmp_path / "broken", tokenizer)
    assert report.new_rows == ROWS - 16
    whole, broken = contents(tmp_path / "whole" / "cache"), contents(tmp_path / "broken" / "cache")
    assert {name for name in whole if whole[name] != broken[name]} == {"manifest.json"}  # it names its source
    assert imported(rows, tmp_path / "broken", tokenizer).new_rows == 0
    assert contents(tmp_path / "broken" / "cache") == broken


def test_other_logits_in_the_same_folder_are_refused(rows, tokenizer: str, tmp_path: Path) -> None:
    imported(rows, tmp_path, tokenizer)
    with pytest.raises(CacheError, match=r"another configuration.*weights_hash"):
        imported([{**row, "scores": [1.0, 2.0, 3.0]} for row in rows], tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scores": [1.0, 2.0]}, r"1 of 30 rows have another number of logits than the 3 of most rows \(id r4\)"),
        ({"scores": [1.0, float("nan"), 2.0]}, r"NaN, infinite or too large logits \(id r4\)"),
        ({"scores": [1.0, 1e39, 2.0]}, r"NaN, infinite or too large logits \(id r4\)"),
        ({"scores": [1.0, "two", 2.0]}, r"no list of numbers as logits \(id r4\)"),
        ({"scores": [True, False, True]}, r"no list of numbers as logits \(id r4\)"),
        ({"scores": None}, r"no list of numbers as logits \(id r4\)"),
        ({"scores": 1.5}, r"no list of numbers as logits \(id r4\)"),
        ({"scores": "[1, 2"}, r"no list of numbers as logits \(id r4\)"),
        ({"label": "drama"}, r"does not know label 'drama'"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, tokenizer: str, tmp_path: Path, change, told: str) -> None:
    with pytest.raises(CorpusError, match=told):
        imported([{**row, **change} if row["id"] == "r4" else row for row in rows], tmp_path, tokenizer)
    assert not (tmp_path / "cache").exists()


def test_logits_are_not_taken_for_probabilities(rows, tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"below zero \(are they logits"):
        imported([{**row, "p": row["scores"]} for row in rows], tmp_path, tokenizer, column="p")
    with pytest.raises(CorpusError, match=r"do not add up to 1"):
        imported([{**row, "p": [1.0, 2.0, 3.0]} for row in rows], tmp_path, tokenizer, column="p")


def test_the_order_of_the_classes_is_never_guessed(rows, tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"--label-names.*Its labels are food, sport, weather"):
        imported(rows, tmp_path, tokenizer, label_names=None)
    with pytest.raises(CorpusError, match=r"names 2 classes.*3 logits"):
        imported(rows, tmp_path, tokenizer, label_names=["a", "b"])
    unlabelled = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    with pytest.raises(CorpusError, match=r"order of their logits: give them with --label-names"):
        imported(unlabelled, tmp_path, tokenizer, label_names=None)
    numbered = [{**row, "label": number % 3} for number, row in enumerate(rows)]
    imported(numbered, tmp_path, tokenizer, label_names=None)  # numbers are positions: nothing to guess
    assert open_cache(tmp_path / "cache").label_names == ["0", "1", "2"]


def test_a_tokenizer_that_is_missing_is_told(rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TeacherError, match=r"the tokenizer in .*empty does not load"):
        imported(rows, tmp_path, str(tmp_path / "empty"))
    with pytest.raises(TeacherError, match="no model folder /nowhere"):
        imported(rows, tmp_path, "/nowhere/at all")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--logits", "score"], "has no column 'score' (--logits); it has columns id, text, label, scores, p"),
        ([], "either --logits COLUMN or --probabilities COLUMN"),
        (["--logits", "scores", "--probabilities", "p"], "either --logits COLUMN or --probabilities COLUMN"),
        (["--logits", "scores", "--label-names", "a"], "two classes or more"),
        (["--logits", "scores", "--label-names", "a,a,b"], "all different"),
        (["--logits", "scores", "--split", "test"], "is a single file and has no splits"),
    ],
)
def test_wrong_commands_are_one_message(rows, tokenizer: str, tmp_path: Path, capsys, more, told: str) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    command = ["import", str(source), "--out", str(tmp_path / "cache"), "--tokenizer", tokenizer, *more]
    assert _guarded(command, debug=False) == 2
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said
    assert not (tmp_path / "cache").exists()
