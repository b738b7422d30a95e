"""The manifest: what it says comes back, what does not fit is refused, and its size does not make it slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from softlabels.cache.format import (
    MANIFEST,
    Manifest,
    Receipt,
    ShardTable,
    is_hex,
    read_manifest,
    read_receipt,
    to_json,
)
from softlabels.errors import CacheError
from tests.bench.bench_manifest import manifest_of, measure, write_manifest


def receipt(number: int) -> Receipt:
    return Receipt(rows=3, tokens=9, bytes=1000 + number, xxh3_128=f"{number:032x}", join="0" * 32, clipped=number)


def test_a_shard_table_gives_back_its_receipts() -> None:
    table = ShardTable.of([receipt(number) for number in range(300)])
    assert len(table) == 300
    assert [table.size(shard) for shard in (0, 1, 299)] == [1000, 1001, 1299]
    assert table.hash(299) == f"{299:032x}"
    assert table.total == sum(range(1000, 1300))
    assert table.clipped == sum(range(300))
    assert ShardTable.model_validate_json(table.model_dump_json()) == table
    huge = ShardTable.of([receipt(0).model_copy(update={"bytes": 2**48 - 1})])
    assert huge.size(0) == 2**48 - 1


@pytest.mark.parametrize(
    ("sizes", "hashes"),
    [
        ("0" * 12, "0" * 31),
        ("0" * 12, "0" * 64),
        ("0" * 11, "0" * 32),
        ("0" * 13, "0" * 32),
        ("0" * 12, "A" * 32),
        ("0" * 12, "g" * 32),
        ("0" * 12, "0" * 31 + "\n"),
        ("00000000000x", "0" * 32),
        ("0000 0000000", "0" * 32),
        ("0" * 11 + "٣", "0" * 32),  # a digit to Python's int, but not to the format
    ],
)
def test_a_shard_table_that_does_not_fit_is_refused(sizes: str, hashes: str) -> None:
    with pytest.raises(ValidationError, match="12 hex characters"):
        ShardTable(sizes=sizes, xxh3_128=hashes)


def test_only_lower_case_hex_is_hex() -> None:
    assert is_hex("") and is_hex("00ff")
    assert not any(is_hex(text) for text in ("0", "0x", "FF", "0 0", "ü0", "00\n"))


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = Manifest.model_validate(manifest_of(50, 3))
    (tmp_path / MANIFEST).write_bytes(to_json(manifest))
    assert read_manifest(tmp_path) == manifest
    assert (tmp_path / MANIFEST).read_bytes() == write_manifest(tmp_path, shards=50, fields=3).read_bytes()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "softlabels-cache"}', "\x00", "[" * 100_000])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CacheError, match="damaged"):
        read_manifest(tmp_path)


def test_logits_are_never_int8(tmp_path: Path) -> None:
    data = manifest_of(2, 2)
    data["fields"]["logits"]["type"] = "int8"
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CacheError, match="logits are never int8"):
        read_manifest(tmp_path)


def test_a_receipt_that_cannot_be_read_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / "logits").mkdir()
    path = tmp_path / "logits" / "00000.json"
    path.write_bytes(to_json(receipt(1)))
    assert read_receipt(tmp_path, "logits", 0) == receipt(1)
    for spoiled in ('{"bytes": 281474976710656}', "", '{"rows": -1}'):
        path.write_text(spoiled)
        assert read_receipt(tmp_path, "logits", 0) is None


@pytest.mark.slow  # `tests/bench/bench_scale.py` has more of it
def test_100_000_shards_of_20_fields_open_in_a_second_and_500_mb(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    for what in ("manifest", "cache"):
        runs = [measure(tmp_path, what) for _ in range(3)]
        best = min(run["seconds"] for run in runs)
        print(f"{what}: {best:.2f} s, {runs[0]['peak'] / 1e6:.0f} MB, {runs[0]['before'] / 1e6:.0f} MB of it imports")
        assert runs[0]["shards"] == 100_000 and runs[0]["size"] > 10**8
        assert best < 1.0
        assert runs[0]["peak"] - runs[0]["before"] < 250e6
        assert runs[0]["peak"] < 500e6 or what == "cache"  # what torch takes differs from build to build
