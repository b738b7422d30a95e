"""The files of a cache as other libraries read them, with the real libraries. golden/ has every kind and codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.dataset
import pytest

from softlabels.cache import open_cache
from softlabels.cache.writer import SCALE
from softlabels.errors import CacheError
from tests.cache.made import rows_of
from tests.cache.test_golden import FIELDS, GOLDEN, LENGTHS, values_of

FOLDERS = ["examples", *FIELDS]
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


def files_of(field: str) -> list[str]:
    return [str(path) for path in sorted((GOLDEN / field).glob("*.arrow"))]


def has_float16(field: str) -> bool:
    return field in FIELDS and FIELDS[field]["type"] == "float16"


def check(field: str, rows: list[dict[str, Any]]) -> None:
    """`rows`, as a library gives them, are those of the cache."""
    assert len(rows) == len(LENGTHS)
    if field == "examples":
        for row, example in zip(rows, rows_of(LENGTHS), strict=True):
            assert row["id"] == example.id and row["label"] == example.label and row["text"] == example.text
            assert list(row["input_ids"]) == example.input_ids.tolist()
            assert list(row["token_type_ids"]) == (
                example.token_type_ids.tolist() if example.token_type_ids is not None else []
            )
        return
    spec = FIELDS[field]
    for number, row in enumerate(rows):
        assert sorted(row) == sorted([field, SCALE] if spec["type"] == "int8" else [field])
        got = np.array(row[field], NUMPY[spec["type"]])
        wanted = values_of(field, number).reshape(-1)
        if spec["type"] == "bfloat16":  # its bits
            assert np.array_equal(got, (wanted.view(np.uint32) >> 16).astype(np.uint16))
        elif spec["type"] == "int8":
            assert np.size(row[SCALE]) * spec["width"] == len(wanted) == len(got)
        else:
            assert np.array_equal(got, wanted)


@pytest.mark.parametrize("field", FOLDERS)
def test_datasets(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset("arrow", data_files=files_of(field), cache_dir=str(tmp_path), split="train")
    check(field, list(loaded))


@pytest.mark.parametrize("field", FOLDERS)
def test_polars(field: str) -> None:
    check(field, polars.scan_ipc(files_of(field)).collect().to_dicts())
    check(field, polars.concat([polars.read_ipc(file) for file in files_of(field)]).to_dicts())


@pytest.mark.parametrize("field", FOLDERS)
def test_pandas(field: str) -> None:
    frames = [pandas.read_feather(file) for file in files_of(field)]
    check(field, pandas.concat(frames).to_dict("records"))


@pytest.mark.parametrize("field", FOLDERS)
@pytest.mark.parametrize("name", ["ipc", "arrow", "feather"])
def test_pyarrow_dataset(field: str, name: str) -> None:
    check(field, pyarrow.dataset.dataset(files_of(field), format=name).to_table().to_pylist())


@pytest.mark.parametrize("field", FOLDERS)
def test_duckdb_through_pyarrow(field: str) -> None:
    """DuckDB has no reader of Arrow files of its own; it queries pyarrow's datasets, and any with a float16 fails."""
    cache_files = pyarrow.dataset.dataset(files_of(field), format="ipc")
    connection = duckdb.connect()
    if has_float16(field):
        with pytest.raises(duckdb.NotImplementedException, match="Unsupported Internal Arrow Type"):
            connection.register("cache_files", cache_files)
        return
    connection.register("cache_files", cache_files)
    found = connection.sql("select * from cache_files")
    check(field, [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()])


def test_duckdb_joins_labels_and_logits() -> None:
    """The use of it: a question over labels and logits. Rows are in the same order in every field."""
    examples = pyarrow.dataset.dataset(files_of("examples"), format="ipc").to_table()
    logits = pyarrow.dataset.dataset(files_of("logits"), format="ipc").to_table()
    both = examples.append_column("logits", logits.column("logits"))
    connection = duckdb.connect()
    connection.register("both_tables", both)
    found = connection.sql("select id, logits[2] - logits[1] as margin from both_tables where label >= 0 order by id")
    margins = [values_of("logits", row)[1] - values_of("logits", row)[0] for row in (1, 2)]
    assert found.fetchall() == [("row1", margins[0]), ("row2", margins[1])]


# ---------------------------------------------------------------------------------------------------- to_datasets


def test_a_cache_becomes_a_dataset() -> None:
    cache = open_cache(GOLDEN)
    made = cache.to_datasets()
    assert made.num_rows == len(LENGTHS)
    assert set(made.column_names) == {*cache.table("examples", 0).schema.names, *FIELDS}
    check("examples", list(made))
    for field, spec in FIELDS.items():
        for row in range(len(LENGTHS)):
            wanted = values_of(field, row).reshape(-1)
            assert np.allclose(made[row][field], wanted, atol=0.05 if spec["type"] == "int8" else 0), field
    assert made.with_format("torch")[0]["logits"].tolist() == values_of("logits", 0).tolist()
    assert made.select([2, 0])["id"][:] == ["row2", "row0"]
    assert made.filter(lambda row: row["label"] >= 0, keep_in_memory=True)["id"][:] == ["row1", "row2"]


def test_only_the_fields_that_are_asked_for_are_opened() -> None:
    cache = open_cache(GOLDEN)
    made = cache.to_datasets(["logits"])
    assert "logits" in made.column_names and not {"hidden.00", "attention.00"} & set(made.column_names)
    assert {field for field, _ in cache._shards} == {"examples", "logits"}
    with pytest.raises(CacheError, match=r"to_datasets needs hidden\.09.*--capture hidden:9"):
        cache.to_datasets(["hidden.09"])


def test_a_dataset_is_the_mapped_file_itself() -> None:
    """Zero-copy: the buffers of the Dataset's columns have the addresses of the mapped shards."""

    def addresses(column: pa.ChunkedArray) -> list[int]:
        return [buffer.address for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None]

    cache = open_cache(GOLDEN)
    made = cache.to_datasets(["logits", "hidden.00", "query.01", "attention.01"])
    for name in ("id", "label", "input_ids", "text"):
        parts = [cache.table("examples", shard).column(name) for shard in (0, 1)]
        assert addresses(made.data.column(name)) == [at for part in parts for at in addresses(part)]
    for name in ("logits", "hidden.00", "query.01", "attention.01"):
        parts = [cache.table(name, shard).column(0) for shard in (0, 1)]
        assert addresses(made.data.column(name)) == [at for part in parts for at in addresses(part)]


def test_a_dataset_is_named_by_its_content() -> None:
    """What `map` caches by: the same cache and fields have the same fingerprint, other fields another."""
    cache = open_cache(GOLDEN)
    assert cache.to_datasets()._fingerprint == open_cache(GOLDEN).to_datasets()._fingerprint
    assert cache.to_datasets(["logits"])._fingerprint != cache.to_datasets(["hidden.00"])._fingerprint
