"""Shards: what is put in any order comes out in the corpus's order, whole files only, and the schema is pinned."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.cache.files import hash_file, lock, sweep_temporary, write_file
from softlabels.cache.format import FieldSpec, read_receipt, shard_file
from softlabels.cache.writer import FieldShard, batch_bounds, examples_batch, examples_schema, join_hash, write_examples
from softlabels.errors import CacheError
from softlabels.types import NO_LABEL, TokenizedExample

TOKENS = np.array([3, 1, 7, 2, 5])
JOIN = "0" * 32
JOIN_OF_A_AND_B = "389883059ab3652a3b0fe620545e90b4"  # from the format's words, with struct and xxhash alone


def example(name: str, ids: list[int], label: int = NO_LABEL) -> TokenizedExample:
    return TokenizedExample(name, np.array(ids, np.int32), np.zeros(len(ids), np.uint8), label, f"text of {name}", None)


def values_of(spec: FieldSpec, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    kind = "<f2" if spec.type == "float16" else "<f4"
    return [rng.standard_normal(count).astype(kind) for count in spec.values(np.array(TOKENS)).tolist()]


@pytest.mark.parametrize("kind", ["row", "token", "pair"])
@pytest.mark.parametrize("type_", ["float16", "float32"])
@pytest.mark.parametrize("limit", [2**31 - 1, 200])  # the second needs several record batches
def test_rows_put_in_any_order_come_out_in_order(tmp_path: Path, kind: str, type_: str, limit: int) -> None:
    spec = FieldSpec.model_validate({"kind": kind, "type": type_, "width": 4})
    values = values_of(spec)
    writer = FieldShard(tmp_path, "hidden.01", spec, shard=3, tokens=TOKENS, limit=limit)
    for row in (4, 0, 2, 1, 3):
        writer.put(row, values[row])
    receipt = writer.commit(JOIN)
    path = shard_file(tmp_path, "hidden.01", 3)
    assert receipt == read_receipt(tmp_path, "hidden.01", 3)
    assert (receipt.rows, receipt.tokens, receipt.bytes) == (5, 18, path.stat().st_size)
    assert receipt.xxh3_128 == hash_file(path)
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    table.validate(full=True)
    assert table.column("hidden.01").null_count == 0
    for row, wanted in enumerate(values):
        assert np.array_equal(table.column(0)[row].values.to_numpy(), wanted)


def test_the_file_is_the_one_that_pyarrow_writes(tmp_path: Path) -> None:
    """The hole in the layout changes nothing: the bytes equal those of writing the whole table at once."""
    spec = FieldSpec(kind="token", type="float16", width=4)
    values = values_of(spec)
    writer = FieldShard(tmp_path, "hidden.01", spec, shard=0, tokens=TOKENS)
    for row in (4, 0, 2, 1, 3):
        writer.put(row, values[row])
    writer.commit(JOIN)
    from softlabels.cache.writer import field_schema

    schema = field_schema("hidden.01", spec, 0)
    offsets = pa.array(np.concatenate([[0], np.cumsum(TOKENS * 4)]).astype(np.int32))
    column = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values)), type=schema.field(0).type)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as whole:
        whole.write_batch(pa.record_batch([column], schema=schema))
    assert shard_file(tmp_path, "hidden.01", 0).read_bytes() == sink.getvalue().to_pybytes()


def test_record_batches_stay_below_the_limit_of_a_list() -> None:
    assert batch_bounds(np.array([5, 5, 5]), limit=10) == [0, 2, 3]
    assert batch_bounds(np.array([10, 10]), limit=10) == [0, 1, 2]
    assert batch_bounds(np.array([2**30, 2**30 - 1, 1])) == [0, 2, 3]
    assert batch_bounds(np.array([2**30, 2**30 - 1])) == [0, 2]
    with pytest.raises(CacheError, match="max-length"):
        batch_bounds(np.array([1, 11]), limit=10)


def test_a_discarded_shard_leaves_nothing(tmp_path: Path) -> None:
    spec = FieldSpec(kind="row", type="float32", width=3)
    writer = FieldShard(tmp_path, "logits", spec, shard=0, tokens=TOKENS)
    writer.put(0, np.zeros(3, np.float32))
    writer.discard()
    assert list((tmp_path / "logits").iterdir()) == []


def test_a_row_that_was_forgotten_is_no_whole_shard(tmp_path: Path) -> None:
    writer = FieldShard(tmp_path, "logits", FieldSpec(kind="row", type="float32", width=3), shard=0, tokens=TOKENS)
    writer.put(0, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="4 rows"):
        writer.commit(JOIN)
    writer.discard()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "file"
    write_file(place, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(place, b"new")
    assert place.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_examples_have_the_columns_of_the_format(tmp_path: Path) -> None:
    rows = [example("a", [101, 7, 102], 1), example("b", [101, 102])]
    narrow = examples_batch(rows, examples_schema(0, vocab_size=65_536, token_types=True, text=True))
    assert str(narrow.schema.remove_metadata()) == (
        "id: string not null\n"
        "token_hash: uint64 not null\n"
        "input_ids: list<item: uint16 not null> not null\n"
        "  child 0, item: uint16 not null\n"
        "token_type_ids: list<item: uint8 not null> not null\n"
        "  child 0, item: uint8 not null\n"
        "label: int32 not null\n"
        "text: string not null\n"
        "text_b: string not null"
    )
    wide = examples_batch(rows, examples_schema(0, vocab_size=65_537, token_types=False, text=False))
    assert wide.schema.names == ["id", "token_hash", "input_ids", "label"]
    assert wide.schema.field("input_ids").type.value_type == pa.int32()
    receipt = write_examples(tmp_path, rows, shard=0, vocab_size=100, token_types=True, text=True, truncated=1)
    assert receipt == read_receipt(tmp_path, "examples", 0) and receipt.truncated == 1


def test_the_join_follows_ids_and_tokens() -> None:
    rows = [example("a", [1, 2]), example("b", [3])]
    assert join_hash(rows) == JOIN_OF_A_AND_B
    assert join_hash(rows) != join_hash(rows[::-1])
    assert join_hash(rows) != join_hash([example("a", [1, 2]), example("c", [3])])
    assert join_hash(rows) != join_hash([example("a", [1, 2]), example("b", [4])])


def test_two_writers_exclude_each_other_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(CacheError, match="another process"), lock(tmp_path):
        raise AssertionError("both hold the lock")
    child = os.fork()
    if not child:  # takes the lock and dies with it
        with lock(tmp_path):
            os._exit(0)
    os.waitpid(child, 0)
    with lock(tmp_path):
        pass


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "logits").mkdir()
    (tmp_path / "logits" / ".tmp-00000.arrow").write_bytes(b"half")
    (tmp_path / ".tmp-tokenizer").mkdir()
    (tmp_path / ".tmp-tokenizer" / "x").write_bytes(b"half")
    (tmp_path / "logits" / "00001.arrow").write_bytes(b"whole")
    sweep_temporary(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["logits", "logits/00001.arrow"]
