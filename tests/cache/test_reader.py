"""The reader gives back what was put, padded; and refuses what does not fit before it follows an offset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from softlabels.cache.build import CacheBuild
from softlabels.cache.files import write_file
from softlabels.cache.format import MANIFEST, Manifest, shard_file, to_json
from softlabels.cache.reader import Cache, capture_of, open_cache
from softlabels.cache.writer import FieldShard, join_hash, write_examples
from softlabels.errors import CacheError
from softlabels.types import NO_LABEL, TokenizedExample

LENGTHS = [3, 6, 2, 5, 4, 1, 7]
SHARD_ROWS = 3
FIELDS = {
    "logits": {"kind": "row", "type": "float32", "width": 2},
    "hidden.01": {"kind": "token", "type": "float16", "width": 4},
    "query.01": {"kind": "token", "type": "float32", "width": 4, "heads": 2},
    "attention.01": {"kind": "pair", "type": "float32", "width": 2, "heads": 2},
}


def manifest() -> Manifest:
    return Manifest.model_validate(
        {
            "format": "softlabels-cache",
            "version": 1,
            "complete": False,
            "teacher": {
                "name": "t",
                "weights_hash": "0",
                "task": "sequence-classification",
                "label_names": ["no", "yes"],
                "vocab_size": 100,
                "pad_token_id": 0,
                "unk_token_id": 1,
                "token_types": True,
            },
            "tokenizer_hash": "0",
            "corpus": {"source": "x.csv", "split": None, "hash": "0", "rows": len(LENGTHS), "labelled": 4},
            "dump": {"max_length": 8, "shard_rows": SHARD_ROWS, "batch_tokens": 64, "dtype": "float32", "text": True},
            "fields": FIELDS,
            "shard_rows": [],
            "shard_tokens": [],
            "join": "",
            "shards": {},
            "versions": {},
        }
    )


def examples() -> list[TokenizedExample]:
    rng = np.random.default_rng(1)
    return [
        TokenizedExample(
            f"row{i}",
            rng.integers(2, 100, length).astype(np.int32),
            rng.integers(0, 2, length).astype(np.uint8),
            i % 2 if i < 4 else NO_LABEL,
            f"text {i}",
            "other" if i == 2 else None,
        )
        for i, length in enumerate(LENGTHS)
    ]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    """A small cache written by hand, and the values that went in."""
    rng, values = np.random.default_rng(2), {}
    build = CacheBuild(tmp_path, manifest())
    for field, spec in build.manifest.fields.items():
        kind = np.float16 if spec.type == "float16" else np.float32
        values[field] = [
            rng.standard_normal(int(spec.values(np.array([length]))[0])).astype(kind) for length in LENGTHS
        ]
    for shard in build.shards():
        rows = examples()[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        write_examples(tmp_path, rows, shard=shard, vocab_size=100, token_types=True, text=True)
        tokens = np.array([len(row.input_ids) for row in rows])
        for field, spec in build.manifest.fields.items():
            writer = FieldShard(tmp_path, field, spec, shard=shard, tokens=tokens)
            for row in range(len(rows)):
                writer.put(row, values[field][shard * SHARD_ROWS + row])
            writer.commit(join_hash(rows))
    write_file(tmp_path / MANIFEST, to_json(build.manifest))
    build.finish()
    return tmp_path, values


def test_batches_hold_what_was_put_and_zero_padding(made) -> None:
    path, values = made
    cache, rows = open_cache(path), np.array([6, 0, 4, 4, 2])
    batch, signals = cache.tokens(rows), cache.signals(rows, list(FIELDS))
    assert signals.logits.dtype == torch.float32
    for i, row in enumerate(rows):
        length, example = LENGTHS[row], examples()[row]
        assert batch.input_ids[i].tolist() == example.input_ids.tolist() + [0] * (7 - length)
        assert batch.attention_mask[i].tolist() == [1] * length + [0] * (7 - length)
        assert batch.token_type_ids is not None
        assert batch.token_type_ids[i, :length].tolist() == example.token_type_ids.tolist()
        assert batch.labels[i].item() == example.label
        assert torch.equal(signals.logits[i], torch.from_numpy(values["logits"][row]))
        hidden = torch.from_numpy(values["hidden.01"][row].reshape(length, 4)).float()
        assert torch.equal(signals.hidden(1)[i, :length], hidden) and not signals.hidden(1)[i, length:].any()
        query = torch.from_numpy(values["query.01"][row].reshape(length, 2, 2)).transpose(0, 1)  # (H, L, K)
        assert torch.equal(signals.query(1)[i, :, :length], query) and not signals.query(1)[i, :, length:].any()
        maps = torch.from_numpy(values["attention.01"][row].reshape(2, length, length))
        assert torch.equal(signals.get("attention.01")[i, :, :length, :length], maps)
        assert not signals.get("attention.01")[i, :, length:].any()


def test_whole_columns(made) -> None:
    path, values = made
    cache = open_cache(path)
    assert cache.lengths.tolist() == LENGTHS and len(cache) == 7
    assert cache.labels.tolist() == [0, 1, 0, 1, NO_LABEL, NO_LABEL, NO_LABEL]
    assert cache.ids == [f"row{i}" for i in range(7)]
    assert cache.texts()[1:3] == [("text 1", None), ("text 2", "other")]
    assert np.array_equal(cache.column("logits"), np.stack(values["logits"]))
    assert cache.used_ids(np.array([5])).tolist() == examples()[5].input_ids.tolist()


def test_opening_costs_the_manifest_alone(made) -> None:
    path, _ = made
    for folder in FIELDS:
        for file in (path / folder).iterdir():
            file.unlink()
    assert open_cache(path).rows == 7


def test_shards_are_let_go(made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softlabels.cache.reader._OPEN_SHARDS", 2)
    path, values = made
    cache = open_cache(path)
    for row in (0, 6, 3, 1, 5, 2, 4):
        got = cache.signals(np.array([row]), ["hidden.01", "logits"])
        assert torch.equal(got.logits[0], torch.from_numpy(values["logits"][row]))
        assert torch.equal(got.hidden(1)[0].flatten(), torch.from_numpy(values["hidden.01"][row]).float())
    assert len(cache._shards) <= 2


def test_a_field_that_is_not_there_is_told_with_its_capture(made) -> None:
    with pytest.raises(CacheError, match=r"needs value\.03; cache .* holds attention\.01.* --capture qkv:3"):
        open_cache(made[0]).require(["value.03"], why="loss 'x'")
    assert capture_of("hidden.06@cls") == "hidden:6@cls" and capture_of("logits") == "logits"


def spoil_manifest(path: Path, change) -> None:
    data = json.loads((path / MANIFEST).read_text())
    change(data)
    (path / MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.update(complete=False), "unfinished"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d.update(more=1), "more"),
        (lambda d: d["fields"].update({"../../etc": d["fields"].pop("logits")}), "no field name"),
        (lambda d: d["shard_rows"].append(1), "rows do not add up"),
        (lambda d: d["shards"].pop("logits"), "shards"),
        (lambda d: d["shards"]["logits"].update(xxh3_128="00"), "32 hex"),
        (lambda d: d["corpus"].update(rows=-1), "rows"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(made, change, told: str) -> None:
    spoil_manifest(made[0], change)
    with pytest.raises(CacheError, match=told):
        open_cache(made[0])


def test_no_cache_at_all(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such folder"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(CacheError, match="is not a cache"):
        open_cache(tmp_path)


def read_everything(path: Path) -> None:
    cache = open_cache(path)
    cache.signals(np.arange(7), list(FIELDS))
    cache.tokens(np.arange(7))


def test_damaged_shards_are_told(made) -> None:
    path, _ = made
    file = shard_file(path, "hidden.01", 1)
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(CacheError, match="bytes"):
        read_everything(path)
    file.write_bytes(whole[:64] + b"\xff" * (len(whole) - 64))
    with pytest.raises(CacheError, match="damaged"):
        read_everything(path)
    file.unlink()
    with pytest.raises(CacheError, match=r"lacks 00001\.arrow"):
        read_everything(path)


def test_a_swapped_or_foreign_shard_is_told(made) -> None:
    path, _ = made
    first, second = (shard_file(path, "logits", shard) for shard in (0, 1))
    one, two = first.read_bytes(), second.read_bytes()
    assert len(one) == len(two)
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(CacheError, match="does not have the columns"):  # its metadata says another shard
        open_cache(path).column("logits")


def test_rows_with_other_lengths_are_told(made) -> None:
    path, _ = made
    cache = open_cache(path)
    rows = examples()[:SHARD_ROWS][::-1]  # the same number of tokens, in another order
    writer = FieldShard(
        path, "hidden.01", cache.fields["hidden.01"], shard=0, tokens=np.array([len(r.input_ids) for r in rows])
    )
    for row, example in enumerate(rows):
        writer.put(row, np.zeros(4 * len(example.input_ids), np.float16))
    writer.commit(join_hash(rows))
    with pytest.raises(CacheError, match="row lengths differ"):
        Cache(path, cache.manifest).signals(np.array([0]), ["hidden.01"])
