"""The format, pinned: golden/ is a cache of every kind and codec, and the code must write it again byte for byte.

Below it, a reader of golden/ that was written from the words of cache/format.py alone and imports nothing of
softlabels: if the bytes part from the words, it fails. A wanted change of format gets another version number, and
golden/ is written anew by `python -m tests.cache.test_golden`.
"""

from __future__ import annotations

import base64
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = [2, 3, 1]
SHARD_ROWS = 2
FIELDS: dict[str, dict[str, Any]] = {
    "logits": {"kind": "row", "type": "float32", "width": 2, "heads": None},
    "hidden.01@cls": {"kind": "row", "type": "float16", "width": 4, "heads": None},
    "hidden.02@cls": {"kind": "row", "type": "bfloat16", "width": 4, "heads": None},
    "hidden.03@cls": {"kind": "row", "type": "int8", "width": 4, "heads": None},
    "hidden.00": {"kind": "token", "type": "float32", "width": 4, "heads": None},
    "query.01": {"kind": "token", "type": "float16", "width": 4, "heads": 2},
    "hidden.02": {"kind": "token", "type": "bfloat16", "width": 4, "heads": None},
    "hidden.03": {"kind": "token", "type": "int8", "width": 4, "heads": None},
    "attention.00": {"kind": "pair", "type": "float32", "width": 2, "heads": 2},
    "attention.01": {"kind": "pair", "type": "float16", "width": 2, "heads": 2},
    "attention.02": {"kind": "pair", "type": "bfloat16", "width": 2, "heads": 2},
}


def shape_of(spec: dict[str, Any], length: int) -> tuple[int, ...]:
    width = spec["width"]
    return {"row": (width,), "token": (length, width), "pair": (width, length, length)}[spec["kind"]]


def values_of(field: str, row: int) -> np.ndarray:
    """What goes in: sixteenths from -3 to 3, which every type but int8 holds exactly."""
    shape = shape_of(FIELDS[field], LENGTHS[row])
    start = 31 * list(FIELDS).index(field) + 17 * row
    return np.array([(start + 13 * k) % 97 - 48 for k in range(np.prod(shape))], np.float32).reshape(shape) / 16


def write_golden(folder: Path) -> None:
    from tests.cache.made import rows_of, write_cache

    values = {field: [values_of(field, row) for row in range(len(LENGTHS))] for field in FIELDS}
    write_cache(folder, rows_of(LENGTHS), FIELDS, values, shard_rows=SHARD_ROWS)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_cache_is_written_byte_for_byte(tmp_path: Path) -> None:
    write_golden(tmp_path)
    new, old = files_of(tmp_path), files_of(GOLDEN)
    assert sorted(new) == sorted(old)
    changed = [name for name in old if new[name] != old[name]]
    assert not changed, (
        "the format has changed: undo that, or give it another version (or pyarrow writes otherwise now)"
    )


def test_a_manifest_and_a_receipt_in_full() -> None:
    """So that a change shows in review as text, and not as a binary file that differs."""
    assert (GOLDEN / "logits" / "00001.json").read_text() == (
        "{\n"
        ' "bytes": 818,\n'
        ' "clipped": 0,\n'
        ' "join": "359a89b37f44e4f37fa41307ded1c3fb",\n'
        ' "rows": 1,\n'
        ' "tokens": 1,\n'
        ' "truncated": 0,\n'
        ' "xxh3_128": "75771e241addc29626fd9f3829ba2e33"\n'
        "}\n"
    )
    lines = (GOLDEN / "manifest.json").read_text().splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        f' "{key}"'
        for key in (
            "complete",
            "corpus",
            "dump",
            "fields",
            "format",
            "join",
            "shard_rows",
            "shard_tokens",
            "shards",
            "teacher",
            "tokenizer_hash",
            "version",
            "versions",
        )
    ]


def test_one_shard_in_full() -> None:
    assert (GOLDEN / "logits" / "00001.arrow").read_bytes().hex() == LOGITS_1


def test_no_file_says_which_library_wrote_it() -> None:
    for name, data in files_of(GOLDEN).items():
        assert pa.__version__.encode() not in data and b"pyarrow" not in data, name
    assert sum(map(len, files_of(GOLDEN).values())) < 32_000


def test_softlabels_reads_it() -> None:
    from softlabels.cache import open_cache

    cache = open_cache(GOLDEN)
    signals = cache.signals(np.arange(len(LENGTHS)), list(FIELDS))
    for field, spec in FIELDS.items():
        for row, length in enumerate(LENGTHS):
            got, wanted = signals.get(field)[row].numpy(), values_of(field, row)
            if spec["kind"] == "token":
                got = got.swapaxes(0, 1).reshape(-1, 4) if spec["heads"] else got
                got = got[:length]
            elif spec["kind"] == "pair":
                got = got[:, :length, :length]
            assert np.allclose(got, wanted, atol=0.05) if spec["type"] == "int8" else np.array_equal(got, wanted), field


# ------------------------------------------------------------------------------- another reader, from the words alone


def numbers(kind: str, count: int, data: bytes) -> list[float]:
    """`count` little-endian numbers; the struct module knows float16 as e."""
    return list(struct.unpack(f"<{count}{kind}", data))


class Independent:
    """Reads a cache with json, struct, base64, xxhash and pyarrow's IPC reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert (self.manifest["format"], self.manifest["version"], self.manifest["complete"]) == (
            "softlabels-cache",
            1,
            True,
        )

    def table(self, field: str, shard: int) -> pa.Table:
        """A shard, after everything that the format says of its file is checked."""
        data = (self.folder / field / f"{shard:05d}.arrow").read_bytes()
        receipt = json.loads((self.folder / field / f"{shard:05d}.json").read_text())
        table = pa.ipc.open_file(data).read_all()
        digest = xxhash.xxh3_128(data).hexdigest()
        shards, join = self.manifest["shards"][field], self.manifest["join"]
        assert int(shards["sizes"][12 * shard : 12 * shard + 12], 16) == receipt["bytes"] == len(data)
        assert shards["xxh3_128"][32 * shard : 32 * shard + 32] == receipt["xxh3_128"] == digest
        assert join[32 * shard : 32 * shard + 32] == receipt["join"]
        assert self.manifest["shard_rows"][shard] == receipt["rows"] == table.num_rows
        assert self.manifest["shard_tokens"][shard] == receipt["tokens"]
        facts = json.loads(table.schema.metadata[b"softlabels"])
        assert (facts["field"], facts["shard"], facts["version"]) == (field, shard, 1)
        assert not any(column.nullable for column in table.schema)
        assert not any(column.null_count for column in table.columns)
        return table

    def examples(self) -> list[dict[str, Any]]:
        rows = []
        for shard in range(len(self.manifest["shard_rows"])):
            table = self.table("examples", shard)
            join = xxhash.xxh3_128()
            for row in table.to_pylist():
                ids, types = row["input_ids"], row["token_type_ids"]
                hashed = xxhash.xxh3_64(struct.pack(f"<{len(ids)}i", *ids) + bytes(types)).intdigest()
                assert row["token_hash"] == hashed
                join.update(row["id"].encode() + b"\0" + struct.pack("<Q", hashed))
                rows.append(row)
            assert json.loads((self.folder / "examples" / f"{shard:05d}.json").read_text())["join"] == join.hexdigest()
        return rows

    def values(self, field: str) -> list[list[float]]:
        """The flat values of every row of a field."""
        spec, rows = self.manifest["fields"][field], []
        for shard in range(len(self.manifest["shard_rows"])):
            table = self.table(field, shard)
            column = table.column(field).combine_chunks()
            column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            element = {"float32": "float", "float16": "halffloat", "bfloat16": "uint16", "int8": "int8"}[spec["type"]]
            assert str(column.type.value_type) == element and column.type.value_field.name == "item"
            assert pa.types.is_fixed_size_list(column.type) == (spec["kind"] == "row")
            assert table.schema.names == ([field, "scale"] if spec["type"] == "int8" else [field])
            for i in range(len(column)):
                scale = table.column("scale")[i].as_py() if spec["type"] == "int8" else None
                rows.append(
                    self.decode(spec, column[i].values, scale, json.loads(table.schema.metadata[b"softlabels"]))
                )
        return rows

    def decode(self, spec: dict[str, Any], stored: pa.Array, scale: Any, facts: dict[str, Any]) -> list[float]:
        size = stored.type.bit_width // 8
        data = stored.buffers()[1].to_pybytes()[stored.offset * size : (stored.offset + len(stored)) * size]
        if spec["type"] == "float32":
            return numbers("f", len(stored), data)
        if spec["type"] == "float16":
            return numbers("e", len(stored), data)
        if spec["type"] == "bfloat16":
            halves = struct.unpack(f"<{len(stored)}H", data)
            return numbers("f", len(stored), struct.pack(f"<{len(stored)}I", *(half << 16 for half in halves)))
        width = spec["width"]
        channels = numbers("f", width, base64.b64decode(facts["channels"]))
        scales = [scale] if spec["kind"] == "row" else scale
        quantised = struct.unpack(f"<{len(stored)}b", data)
        assert len(scales) * width == len(stored) and -128 not in quantised
        return [q * scales[k // width] * channels[k % width] for k, q in enumerate(quantised)]


def test_the_words_are_enough_to_read_the_examples() -> None:
    reader = Independent(GOLDEN)
    assert reader.examples() == [
        {
            "id": f"row{i}",
            "token_hash": reader.examples()[i]["token_hash"],
            "input_ids": [(7 * i + 3 * k) % 100 for k in range(length)],
            "token_type_ids": [k % 2 for k in range(length)],
            "label": -100 if i % 3 == 0 else i % 2,
            "text": f"text {i} – é",
            "text_b": "other" if i == 2 else "",
        }
        for i, length in enumerate(LENGTHS)
    ]
    assert str(reader.table("examples", 0).schema.field("input_ids").type) == "list<item: uint16 not null>"


@pytest.mark.parametrize("field", FIELDS)
def test_the_words_are_enough_to_read_a_field(field: str) -> None:
    reader = Independent(GOLDEN)
    assert reader.manifest["fields"][field] == FIELDS[field]
    rows = reader.values(field)
    assert len(rows) == len(LENGTHS)
    for row, got in enumerate(rows):
        wanted = values_of(field, row).flatten().tolist()
        if FIELDS[field]["type"] == "int8":
            assert got == pytest.approx(wanted, abs=0.05)
        else:
            assert got == wanted


LOGITS_1 = (  # the floats are 60bf 80bd: -0.875 and -0.0625
    "4152524f57310000ffffffff180100001000000000000a000e000600050008000a000000000104001000000000000a000c0000000400"
    "08000a0000006800000004000000010000000c00000008000c0004000800080000003c000000040000002d0000007b226669656c6422"
    "3a20226c6f67697473222c20227368617264223a20312c202276657273696f6e223a20317d0000000a000000736f66746c6162656c73"
    "00000100000004000000c8ffffff000000101400000024000000040000000100000030000000060000006c6f67697473000000000600"
    "080004000600000002000000100014000800000007000c00000010001000000000000003100000001c00000004000000000000000400"
    "00006974656d0000060008000600060000000000010000000000ffffffffa800000014000000000000000c0016000600050008000c00"
    "0c0000000003040018000000080000000000000000000a0018000c00040008000a0000004c0000001000000001000000000000000000"
    "000003000000000000000000000000000000000000000000000000000000000000000000000000000000000000000800000000000000"
    "00000000020000000100000000000000000000000000000002000000000000000000000000000000000060bf000080bdffffffff0000"
    "0000100000000c001400060008000c0010000c000000000004003c0000002800000004000000010000002801000000000000b0000000"
    "000000000800000000000000000000000000000000000a000c000000040008000a0000006800000004000000010000000c0000000800"
    "0c0004000800080000003c000000040000002d0000007b226669656c64223a20226c6f67697473222c20227368617264223a20312c20"
    "2276657273696f6e223a20317d0000000a000000736f66746c6162656c7300000100000004000000c8ffffff00000010140000002400"
    "0000040000000100000030000000060000006c6f67697473000000000600080004000600000002000000100014000800000007000c00"
    "000010001000000000000003100000001c0000000400000000000000040000006974656d000006000800060006000000000001004001"
    "00004152524f5731"
)


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write_golden(GOLDEN)
