"""Caches at a URL read without pulling them: the same rows and students, in bounded room."""

from __future__ import annotations

import os
import pickle
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.cache import open_cache, stream, transfer
from softlabels.cache.format import shard_file
from softlabels.cache.push import push
from softlabels.cache.remote import open_remote
from softlabels.cache.stream import ShardStore, open_store, parse_size
from softlabels.cache.transfer import RemoteFile
from softlabels.cache.urls import Place
from softlabels.corpus import read_corpus
from softlabels.errors import CacheError, ConfigError
from tests.cache.made import rows_of, write_cache
from tests.models import TEXTS, save_teacher
from tests.servers import http_server, proxy

FIELDS = ["logits", "hidden.06"]


@pytest.fixture(autouse=True)
def own_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTLABELS_QUIET", "1")
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "local"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 shards of 50 rows, 47 kB all fields together."""
    folder, rng = tmp_path_factory.mktemp("stream") / "cache", np.random.default_rng(0)
    rows = rows_of([3 + i % 7 for i in range(1000)])
    specs = {
        "logits": {"kind": "row", "type": "float32", "width": 2},
        "hidden.06": {"kind": "token", "type": "float16", "width": 48},
    }
    values = {
        "logits": [rng.normal(size=2).astype(np.float32) for _ in rows],
        "hidden.06": [rng.normal(size=(len(row.input_ids), 48)).astype(np.float32) for row in rows],
    }
    write_cache(folder, rows, specs, values, shard_rows=50)
    return folder


def room(tmp_path: Path) -> int:
    """Bytes in the local cache."""
    total = 0
    for path in (tmp_path / "local").rglob("*"):
        with suppress(FileNotFoundError):  # it went just now
            total += path.stat().st_size if path.is_file() else 0
    return total


def test_rows_are_the_same_and_fetched_once(cache: Path, tmp_path: Path):
    push(cache, f"file://{tmp_path}/there", compress=True)
    with http_server(tmp_path) as port, proxy(port) as way:
        url = f"http://127.0.0.1:{way.port}/there"
        there, here = open_cache(url), open_cache(cache)
        assert way.down < 30_000  # to open it costs the manifest
        for epoch in range(2):
            batches = [
                each.loader(np.arange(1000), FIELDS, batch_size=16, seed=3, epoch=epoch) for each in (there, here)
            ]
            for one, two in zip(*batches, strict=True):
                assert (one.rows == two.rows).all() and (one.tokens.input_ids == two.tokens.input_ids).all()
                assert all((one.teacher.fields[name] == two.teacher.fields[name]).all() for name in FIELDS)
        way.reset()
        again = pickle.loads(pickle.dumps(open_cache(url)))
        assert (again.column("logits") == here.column("logits")).all() and again.ids == here.ids
        assert way.down < 30_000
        assert there.shown == url


def test_only_what_is_read_is_fetched(cache: Path, tmp_path: Path):
    push(cache, f"file://{tmp_path}/there")
    there = open_cache(f"file://{tmp_path}/there")
    there.batch([0, 1, 125], ["logits"])
    mark = next((tmp_path / "local" / "shards").iterdir())
    assert sorted(path.name for path in (mark / "logits").glob("*.arrow")) == ["00000.arrow", "00002.arrow"]
    assert not (mark / "hidden.06").exists()


def test_room_stays_bounded(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Of a cache of twice the room: an epoch fetches each shard about once, and rows come from all over it."""
    push(cache, f"file://{tmp_path}/there")
    here, limit, fetched = open_cache(cache), 350_000, []

    def download(place, file, target, *, traffic):
        fetched.append(file.name)
        return transfer.download(place, file, target, traffic=traffic)

    monkeypatch.setattr(stream, "download", download)
    assert sum(table.total for table in here.manifest.shards.values()) > 2 * limit
    there, seen, most = open_cache(f"file://{tmp_path}/there", cache_size=limit), [], 0
    for epoch in range(2):
        for batch in there.loader(np.arange(1000), FIELDS, batch_size=8, seed=0, epoch=epoch):
            wanted = here.batch(batch.rows, FIELDS)
            assert all((batch.teacher.fields[name] == wanted.teacher.fields[name]).all() for name in FIELDS)
            seen += batch.rows.tolist()
            most = max(most, room(tmp_path))
    assert sorted(seen) == sorted([*range(1000)] * 2)
    assert most <= limit
    assert len(fetched) <= 20 + 1.3 * 2 * 60  # lengths first, then 20 shards of three fields an epoch
    assert capfd.readouterr().err.count("shuffled within") == 1  # said once
    with pytest.raises(CacheError, match=r"no room for two shards.*--cache-size"):
        open_cache(f"file://{tmp_path}/there", cache_size=70_000).loader(np.arange(1000), FIELDS, batch_size=8, seed=0)


def test_what_is_damaged_there_is_never_read(cache: Path, tmp_path: Path):
    push(cache, f"file://{tmp_path}/there")
    (path,) = (tmp_path / "there").glob("logits-*/00001.arrow")
    harmed = bytearray(path.read_bytes())
    harmed[-300] ^= 1
    path.write_bytes(harmed)
    there = open_cache(f"file://{tmp_path}/there")
    there.batch([0], ["logits"])
    with pytest.raises(CacheError, match=r"00001.arrow is not the file that was pushed"):
        there.batch([50], ["logits"])


def test_a_student_from_a_url_is_the_one_from_the_folder(tmp_path: Path, quick: None):
    """Bit for bit."""
    teacher = save_teacher(tmp_path / "teacher")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for text, _ in TEXTS[:40]))
    options = softlabels.DumpOptions(capture=["logits"], shard_rows=8)
    softlabels.dump(read_corpus(str(corpus)), teacher=str(teacher), out=tmp_path / "cache", options=options)
    push(tmp_path / "cache", f"file://{tmp_path}/there")
    student = softlabels.StudentOptions(
        student="bilstm", epochs=1, losses={"kl": 1.0}, options={"hidden_size": 8, "embedding_dim": 8}
    )
    for name, where in (("here", tmp_path / "cache"), ("url", f"file://{tmp_path}/there")):
        softlabels.train_student(open_cache(where), out=tmp_path / name, options=student, cpu=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "url")]
    assert weights[0] == weights[1]


def test_what_two_processes_want_comes_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    push(cache, f"file://{tmp_path}/there", compress=True)
    stores, fetched = [open_store(open_remote(f"file://{tmp_path}/there")) for _ in range(3)], []
    fetch, together = transfer._fetch, threading.Barrier(3)

    def slow(place: Place, file: RemoteFile, *rest: Any) -> str:
        fetched.append(file.name)
        time.sleep(0.3)
        return fetch(place, file, *rest)

    def want(store: ShardStore) -> None:
        together.wait()
        store.fetch("hidden.06", 3)

    monkeypatch.setattr(transfer, "_fetch", slow)
    threads = [threading.Thread(target=want, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    came = shard_file(stores[0].folder, "hidden.06", 3)
    assert came.read_bytes() == shard_file(cache, "hidden.06", 3).read_bytes()
    assert not list((tmp_path / "local").rglob(".tmp-*"))


def test_what_is_asked_for_as_the_last_worker_leaves_is_not_forgotten(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A worker that has waited in vain leaves; what came between its being counted and its leaving had nobody."""
    push(cache, f"file://{tmp_path}/there")
    monkeypatch.setattr(stream, "_THREADS", 1)
    store = open_store(open_remote(f"file://{tmp_path}/there"))
    store.ahead([("logits", 1)])

    class Slow:
        def __init__(self, queue: Any) -> None:
            self.queue, self.get, self.empty = queue, queue.get, queue.empty

        def put(self, key: tuple[str, int]) -> None:
            time.sleep(1.3)
            self.queue.put(key)

    store.fetch("logits", 1)
    monkeypatch.setattr(store, "_waiting", Slow(store._waiting))
    store.ahead([("logits", 2)])
    came = threading.Thread(target=store.fetch, args=("logits", 2), daemon=True)
    came.start()
    came.join(20)
    assert not came.is_alive()


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("500 mb", 5 * 10**8), ("1.5g", 15 * 10**8), ("7", 7)]
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "10 parsecs", "0", "9" * 400 + "GB"])
def test_no_sizes(text: str):
    with pytest.raises(ConfigError, match="such as 20GB"):
        parse_size(text)


def test_the_environment_says_where_and_how_much(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    push(cache, f"file://{tmp_path}/there")
    monkeypatch.setenv("SOFTLABELS_CACHE_SIZE", "30kB")
    there = open_cache(f"file://{tmp_path}/there")
    assert there.store is not None and there.store.limit == 30_000
    assert str(there.path).startswith(os.environ["SOFTLABELS_CACHE"])
