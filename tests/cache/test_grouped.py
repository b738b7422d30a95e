"""Shards that are written together are those that are written one by one, or none of them is there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.cache.arrow import read_numbers
from softlabels.cache.files import FileGroup, write_file
from softlabels.cache.format import FieldSpec, read_receipt, shard_file
from softlabels.cache.grouped import ShardGroup
from softlabels.cache.writer import FieldShard, encode_rows

SPECS = [FieldSpec(kind="row", type=kind, width=width) for kind in ("float32", "float16") for width in (1, 3, 77)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.type}-{spec.width}")
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_file_in_memory_is_the_writers(tmp_path: Path, spec: FieldSpec, rows: int) -> None:
    values = np.random.default_rng(rows).normal(size=(rows, spec.width)).astype(spec.type)
    tokens = np.arange(rows) + 2
    one = FieldShard(tmp_path / "one", "logits", spec, shard=7, tokens=tokens)
    one.put_run(0, values.reshape(-1), rows=rows)
    receipt = one.commit("0" * 32)
    data = encode_rows("logits", spec, 7, values)
    assert data.to_pybytes() == shard_file(tmp_path / "one", "logits", 7).read_bytes()
    with ShardGroup(tmp_path / "group") as group:
        group.put("logits", 7, data, rows=rows, tokens=int(tokens.sum()), join="0" * 32)
        assert read_receipt(tmp_path / "group", "logits", 7) is None  # not before the block ends
    assert read_receipt(tmp_path / "group", "logits", 7) == receipt
    assert shard_file(tmp_path / "group", "logits", 7).read_bytes() == data.to_pybytes()


def test_of_a_group_that_fails_nothing_stays(tmp_path: Path) -> None:
    def put(group: ShardGroup, shard: int) -> None:
        data = encode_rows("logits", SPECS[0], shard, np.ones((4, 1), np.float32))
        group.put("logits", shard, data, rows=4, tokens=8, join="0" * 32)

    with ShardGroup(tmp_path) as group:
        put(group, 0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "logits").iterdir()}
    with pytest.raises(KeyboardInterrupt), ShardGroup(tmp_path) as group:
        put(group, 1)
        put(group, 2)
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in (tmp_path / "logits").iterdir()} == before
    with pytest.raises(KeyboardInterrupt), ShardGroup(tmp_path) as group:
        put(group, 0)
        raise KeyboardInterrupt
    assert read_receipt(tmp_path, "logits", 0) is None  # it would speak of what was to be replaced
    assert {path.name for path in (tmp_path / "logits").iterdir()} == {"00000.arrow"}


def test_names_come_after_all_bytes_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(handle: int) -> None:
        told.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        real["fsync"](handle)

    def replace(source: Path, target: Path) -> None:
        told.append(f"name {Path(target).name}")
        real["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with FileGroup() as group:
        group.write(tmp_path / "a" / "x", b"1")
        group.write(tmp_path / "a" / "y", b"2")
    assert told == ["sync .tmp-x", "sync .tmp-y", "name x", "name y", "sync a"]


def test_a_full_disk_leaves_no_half_file_and_no_open_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_bytes(b"old")
    handles = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), FileGroup() as group:
        group.write(tmp_path / "a", b"new")
        group.write(tmp_path / "b", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}
    assert len(os.listdir("/proc/self/fd")) == handles


def test_numbers_are_pyarrows() -> None:
    for kind in (pa.int32(), pa.uint64(), pa.float16(), pa.float32(), pa.uint8()):
        whole = pa.array(np.arange(9).astype(kind.to_pandas_dtype()), kind)
        for part in (whole, whole.slice(3, 4), whole.slice(9), pa.array([], kind)):
            for column in (part, pa.chunked_array([part]), pa.chunked_array([part, whole])):
                assert not read_numbers(column).flags.writeable
                assert read_numbers(column).dtype == column.to_numpy().dtype
                assert np.array_equal(read_numbers(column), column.to_numpy())
        assert np.array_equal(read_numbers(pa.chunked_array([], kind)), np.empty(0))
    lists = pa.chunked_array([pa.array([[1, 2], [], [3]]), pa.array([[4]])])
    assert read_numbers(lists).tolist() == [1, 2, 3, 4]
    assert read_numbers(lists.slice(2)).tolist() == [3, 4]
    with pytest.raises(ValueError, match="nulls"):
        read_numbers(pa.array([1.0, None, 3.0]))


def test_values_of_another_kind_are_no_rows() -> None:
    with pytest.raises(ValueError, match=r"3 of float32 a row, not .* of float64"):
        encode_rows("logits", SPECS[1], 0, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"3 of float32 a row, not \(2,\)"):
        encode_rows("logits", SPECS[1], 0, np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="row field of int8"):
        encode_rows("logits", FieldSpec(kind="row", type="int8", width=3), 0, np.ones((2, 3), np.int8))


def test_a_link_in_the_place_of_a_draft_is_refused_once(tmp_path: Path) -> None:
    (tmp_path / ".tmp-x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        write_file(tmp_path / "x", b"1")
    write_file(tmp_path / "x", b"1")
    assert {path.name for path in tmp_path.iterdir()} == {"x"}


def test_where_giving_names_fails_no_draft_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"), FileGroup() as group:
        for name in "abc":
            group.write(tmp_path / name, name.encode())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"a"}
