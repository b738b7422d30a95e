"""Batches: equal to the plain way through the tables for every kind, type and width; buffers, loaders, windows."""

from __future__ import annotations

import gc
import itertools
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from softlabels.cache import Cache, open_cache
from softlabels.cache.codec import decode
from softlabels.cache.format import FieldSpec, shard_file
from softlabels.cache.gather import Buffers
from softlabels.cache.loader import CacheBatch, CacheDataset, CacheLoader, LoadOptions
from softlabels.cache.writer import SCALE
from softlabels.errors import CacheError
from softlabels.tokens import windowed_batches
from tests.cache.made import rows_of, write_cache

LENGTHS = [3, 6, 2, 5, 4, 1, 7, 12, 1, 9]
SHARD_ROWS = 4
TYPES = ("float32", "float16", "bfloat16", "int8")
# of each kind and type a narrow and a wide field
FIELDS: dict[str, dict[str, Any]] = {
    **{f"row_{t}@n": {"kind": "row", "type": t, "width": 3} for t in TYPES},
    **{f"row_{t}@w": {"kind": "row", "type": t, "width": 2100} for t in TYPES},
    **{f"token_{t}@n": {"kind": "token", "type": t, "width": 4, "heads": 2} for t in TYPES},
    **{f"token_{t}@w": {"kind": "token", "type": t, "width": 700} for t in TYPES},
    **{f"pair_{t}@n": {"kind": "pair", "type": t, "width": 2, "heads": 2} for t in TYPES if t != "int8"},
}
FIELDS = {name.replace("float32", "a").replace("bfloat16", "c").replace("float16", "b").replace("int8", "d"): spec
          for name, spec in FIELDS.items()}  # fmt: skip


def made_cache(folder: Path, *, limit: int = 2**31 - 1) -> Cache:
    rng, rows = np.random.default_rng(3), rows_of(LENGTHS)
    shapes = {"row": lambda w, n: (w,), "token": lambda w, n: (n, w), "pair": lambda w, n: (w, n, n)}
    values = {
        name: [rng.standard_normal(shapes[spec["kind"]](spec["width"], n)).astype(np.float32) for n in LENGTHS]
        for name, spec in FIELDS.items()
    }
    write_cache(folder, rows, FIELDS, values, shard_rows=SHARD_ROWS, limit=limit)
    return open_cache(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return made_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def split_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same with several record batches a shard."""
    cache = made_cache(tmp_path_factory.mktemp("split"), limit=9000)
    assert max(cache.table("token_a@w", s).column(0).num_chunks for s in range(3)) > 1
    return cache


def plainly(cache: Cache, field: str, row: int) -> torch.Tensor:
    """A row's values through Arrow scalars and the codec alone."""
    spec: FieldSpec = cache.fields[field]
    shard, place = divmod(row, SHARD_ROWS)
    table, length = cache.table(field, shard), LENGTHS[row]
    stored = table.column(field)[place].values.to_numpy().copy()
    shape = {"row": (1, spec.width), "token": (1, length, spec.width), "pair": (1, spec.width, length, length)}
    if spec.type != "int8":
        return decode(stored.reshape(shape[spec.kind]), spec)[0]
    scale = table.column(SCALE)[place]
    scales = np.array([scale.as_py()], np.float32) if spec.kind == "row" else scale.values.to_numpy()[None].copy()
    channels = cache.channels_of(field, shard)[None]
    return decode(stored.reshape(shape[spec.kind]), spec, scales=scales, channels=channels)[0]


def check(cache: Cache, batch: CacheBatch, fields: list[str]) -> None:
    """Every value of the batch is the row's, and all else is padding."""
    longest = max(LENGTHS[row] for row in batch.rows)
    for i, row in enumerate(batch.rows.tolist()):
        length, example = LENGTHS[row], rows_of(LENGTHS)[row]
        assert batch.tokens.input_ids[i].tolist() == example.input_ids.tolist() + [0] * (longest - length)
        assert batch.tokens.attention_mask[i].tolist() == [1] * length + [0] * (longest - length)
        assert batch.tokens.token_type_ids is not None and example.token_type_ids is not None
        assert batch.tokens.token_type_ids[i].tolist() == example.token_type_ids.tolist() + [0] * (longest - length)
        assert batch.tokens.labels[i] == batch.teacher.labels[i] == example.label
        for field in fields:
            spec, got, wanted = cache.fields[field], batch.teacher.get(field)[i].float(), plainly(cache, field, row)
            if spec.kind == "token":
                if spec.heads:
                    got = got.transpose(0, 1).flatten(1)  # (H, L, K) → (L, H·K)
                assert torch.equal(got[:length], wanted) and not got[length:].any()
            elif spec.kind == "pair":
                assert torch.equal(got[:, :length, :length], wanted)
                assert not got[:, length:].any() and not got[:, :, length:].any()
            else:
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize("rows", [[6, 0, 4, 4, 2, 9], [5], [8, 5], [7, 1, 0], list(range(10))])
def test_every_kind_and_type_equals_the_plain_way(
    cache: Cache, split_cache: Cache, rows: list[int], as_stored: bool
) -> None:
    for one in (cache, split_cache):
        batch = one.batch(rows, list(FIELDS), as_stored=as_stored)
        check(one, batch, list(FIELDS))
        for field in FIELDS:
            stored = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(FIELDS[field]["type"], torch.float32)
            assert batch.teacher.get(field).dtype == (stored if as_stored else torch.float32)


def test_rows_too_wide_for_one_gather(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softlabels.cache.gather._WIDEST", 3)
    for rows in ([6, 0, 4, 4, 2, 9], [5, 5]):
        check(cache, cache.batch(rows, list(FIELDS)), list(FIELDS))


def test_tokens_and_signals_are_the_parts_of_a_batch(cache: Cache) -> None:
    rows = np.array([1, 7, 3])
    batch, tokens, signals = cache.batch(rows, ["token_b@w"]), cache.tokens(rows), cache.signals(rows, ["token_b@w"])
    assert torch.equal(batch.tokens.input_ids, tokens.input_ids) and torch.equal(batch.tokens.labels, tokens.labels)
    assert torch.equal(batch.teacher.get("token_b@w"), signals.get("token_b@w"))
    assert torch.equal(signals.mask, tokens.attention_mask)


def test_buffers_used_again_leak_nothing_into_padding(cache: Cache, split_cache: Cache) -> None:
    for one, as_stored in itertools.product((cache, split_cache), (False, True)):
        out, seen = Buffers(), set()
        for rows in ([7, 9], [7, 5, 8], [0, 5, 2, 8, 4, 1], [8], [9, 8, 7], [5, 8]):
            batch = one.batch(rows, list(FIELDS), out=out, as_stored=as_stored)
            check(one, batch, list(FIELDS))
            seen.add(batch.teacher.get("token_a@w").data_ptr())
        assert len(seen) <= 4  # most batches lie in the memory of the one before


def test_memory_first_used_in_inference_mode_can_be_used_outside(cache: Cache) -> None:
    out = Buffers()
    with torch.inference_mode():
        cache.batch([0, 1], list(FIELDS), out=out)
    found, wanted = cache.batch([0, 2], list(FIELDS), out=out), cache.batch([0, 2], list(FIELDS))
    assert all(torch.equal(found.teacher.get(name), wanted.teacher.get(name)) for name in FIELDS)


def test_rows_that_are_not_there(cache: Cache) -> None:
    for rows in ([10], [-1, 2]):
        with pytest.raises(IndexError, match="rows 0 to 9"):
            cache.batch(rows, [])
    with pytest.raises(ValueError, match="at least one row"):
        cache.batch([], [])


def test_only_what_is_asked_for_is_opened(tmp_path: Path) -> None:
    cache = made_cache(tmp_path)
    cache.batch([0, 9], ["token_b@w"])
    assert {field for field, _ in cache._shards} == {"examples", "token_b@w"}
    assert sorted(shard for field, shard in cache._shards if field == "token_b@w") == [0, 2]


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_cache(tmp_path)
    monkeypatch.setattr("softlabels.cache.reader._OPEN_SHARDS", 2)
    cache = open_cache(tmp_path)
    assert not cache.reader.steady
    for rows in ([0, 9, 4], [8, 1, 5], [3, 7, 9]):
        batch = cache.batch(rows, ["token_b@w", "row_a@n", "token_d@w"])
        check(cache, batch, ["token_b@w", "row_a@n", "token_d@w"])
        assert len(cache._shards) <= 2


@pytest.mark.parametrize("ask", ["once", "always"])
def test_reading_ahead_changes_no_value(
    split_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """Where pages are asked for row by row, rows once asked for are not asked for again, if all fit into memory."""
    monkeypatch.setattr("softlabels.cache.places._SMALL", 0)
    monkeypatch.setattr("softlabels.cache.batches.BatchReader._ask", lambda self, field: ask)
    asked: list[int] = []
    monkeypatch.setattr("softlabels.cache.places.want_pages", lambda address, size: asked.append(len(address)))
    cache = open_cache(split_cache.path)
    fields = ["token_b@w", "pair_a@n"]
    for rows in ([0, 9, 4], [8, 1, 4], [0, 9, 4]):
        check(cache, cache.batch(rows, fields), fields)
    assert asked == ([3, 3, 2, 2] if ask == "once" else [3, 3, 3, 3, 3, 3])
    asked.clear()
    loaded = CacheLoader(cache, [np.array([2, 3]), np.array([5, 6])], fields, LoadOptions())
    for batch in loaded:
        check(cache, batch, fields)
    assert asked == [2, 2, 2, 2]  # each batch once, ahead


def test_the_mapping_is_shared(cache: Cache) -> None:
    """Readers in several processes use one copy of the file, the page cache's."""
    cache.batch([0], ["token_b@w"])
    name = str(shard_file(cache.path, "token_b@w", 0))
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(name)]
    assert lines and all(line.split()[1] == "r--s" for line in lines)


# ------------------------------------------------------------------------------------------------------------ loaders


def no_threads_left() -> bool:
    for _ in range(100):
        if not any(thread.name == "softlabels-prefetch" for thread in threading.enumerate()):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("reuse", [False, True])
def test_prefetching_changes_nothing(cache: Cache, reuse: bool) -> None:
    fields, rows = ["token_b@w", "row_a@n", "token_d@n"], np.arange(10)
    plain = list(cache.loader(rows, fields, batch_size=2, seed=1, epoch=2, options=LoadOptions(prefetch=False)))
    loader = cache.loader(rows, fields, batch_size=2, seed=1, epoch=2, options=LoadOptions(reuse=reuse))
    assert len(loader) == 5
    for _ in range(2):
        for one, other in zip(plain, loader, strict=True):
            assert one.rows.tolist() == other.rows.tolist()
            check(cache, other, fields)
    assert sorted(row for batch in plain for row in batch.rows) == list(range(10))
    assert no_threads_left()
    others = [batch.rows.tolist() for batch in cache.loader(rows, [], batch_size=2, seed=1, epoch=3)]
    assert others != [batch.rows.tolist() for batch in plain]


def test_an_error_reaches_the_consumer(cache: Cache, tmp_path: Path) -> None:
    cache = made_cache(tmp_path)
    file = shard_file(tmp_path, "token_b@w", 2)
    file.write_bytes(file.read_bytes()[:-1])
    batches = [np.array([0]), np.array([1]), np.array([9])]
    for prefetch in (True, False):
        loader = CacheLoader(cache, batches, ["token_b@w"], LoadOptions(prefetch=prefetch))
        with pytest.raises(CacheError, match=r"00002\.arrow has"):
            list(loader)
    assert no_threads_left()


def test_a_consumer_that_stops_early_leaves_no_thread(cache: Cache) -> None:
    batches = [np.array([i % 10]) for i in range(200)]
    for taken in (0, 1, 5):
        iterator = iter(CacheLoader(cache, batches, ["token_b@w"], LoadOptions(reuse=True)))
        for _ in range(taken):
            next(iterator)
        del iterator
        gc.collect()
        assert no_threads_left()
    for batch in CacheLoader(cache, batches, ["token_b@w"], LoadOptions()):
        if batch.rows[0] == 3:
            break
    del batch
    assert no_threads_left()


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_dataloader_asks_for_whole_batches(cache: Cache, workers: int) -> None:
    fields = ["token_b@w", "row_a@n"]
    dataset = CacheDataset(cache, fields, rows=[9, 8, 7, 6, 5])
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=CacheDataset.collate)
    batches = list(loader)
    assert [batch.rows.tolist() for batch in batches] == [[9, 8], [7, 6], [5]]
    for batch in batches:
        check(cache, batch, fields)
    check(cache, dataset[1], fields)
    assert len(dataset) == 5 and dataset[1].rows.tolist() == [8]


def test_a_cache_goes_to_another_process_as_its_path(cache: Cache) -> None:
    other = pickle.loads(pickle.dumps(cache))
    assert other.path == cache.path and not other._shards
    check(cache, other.batch([3, 1], ["token_c@w"]), ["token_c@w"])


# ------------------------------------------------------------------------------------------------------------ windows


def test_windows_cover_every_row_once_and_mix_as_they_say() -> None:
    rng, shards, window, batch = np.random.default_rng(0), 20, 5, 32
    which = np.repeat(np.arange(shards), 8000)
    lengths = rng.integers(1, 60, len(which))
    batches = windowed_batches(lengths, which, batch_size=batch, rng=rng, window=window)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(which)))
    assert all(len(part) == batch for part in batches)
    same = [(np.mean(which[part][:, None] == which[part]) * batch - 1) / (batch - 1) for part in batches]
    assert 0.9 / window < np.mean(same) < 1.02 / window
    # 50 batches of 32 are a fifth of a shard's rows: where the window moves on meanwhile, one shard more is seen
    spans = [len(set(which[np.concatenate(batches[i : i + 50])])) for i in range(0, len(batches), 50)]
    assert window <= max(spans) <= window + 1
    padded = sum(len(part) * lengths[part].max() for part in batches)
    assert padded < 1.1 * lengths.sum()


def test_a_window_of_all_shards_is_a_full_shuffle() -> None:
    which = np.repeat(np.arange(10), 1000)
    rng = np.random.default_rng(1)
    batches = windowed_batches(np.ones(len(which)), which, batch_size=20, rng=rng, window=99)
    same = [np.mean(which[part][:, None] == which[part]) - 1 / 20 for part in batches]
    assert np.mean(same) * 20 / 19 == pytest.approx(1 / 10, rel=0.1)


def test_a_loader_with_a_window(cache: Cache) -> None:
    rows = np.array([0, 2, 3, 5, 8, 9])
    batches = list(cache.loader(rows, ["row_a@n"], batch_size=4, seed=0, window=1))
    assert sorted(row for batch in batches for row in batch.rows) == rows.tolist()
    again = list(cache.loader(rows, ["row_a@n"], batch_size=4, seed=0, window=1))
    assert [batch.rows.tolist() for batch in batches] == [batch.rows.tolist() for batch in again]
