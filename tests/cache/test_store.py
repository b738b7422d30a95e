"""A cache that is dumped to a URL: what is there already, what is told of it, and what fails on the way."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from softlabels.cache import urls
from softlabels.cache.delivery import StorePlace
from softlabels.cache.format import read_receipt
from softlabels.cache.push import push
from softlabels.cache.store import mirror
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError, SoftlabelsError
from softlabels.types import Example
from tests.cache.made import rows_of, write_cache

URLS = ["sftp://anna:geheim@127.0.0.1:1/cache", "nothing://anna:geheim@host/cache", "http://anna:geheim@127.0.0.1:1/c"]


@pytest.mark.parametrize("url", URLS)
def test_a_store_that_cannot_be_opened_is_named_without_its_password(url: str) -> None:
    with pytest.raises(SoftlabelsError) as told, mirror(url):
        pass
    assert "geheim" not in str(told.value) and url.split("@")[1].split("/")[0] in str(told.value)


def test_neither_says_a_dump_that_cannot_write_there() -> None:
    corpus = Corpus("made", None, [Example("0", "text")], None)
    with pytest.raises(SoftlabelsError, match=r"--out s3://\*\*\*@bucket/cache: only the workers of a Ray cluster"):
        dump(corpus, teacher="nobody", out="s3://key:geheim@bucket/cache", options=DumpOptions())


def test_a_lease_that_is_gone_is_told_without_the_urls_query() -> None:
    place = StorePlace("memory://store/cache?token=geheim", ".tmp-lease-x")
    with pytest.raises(SoftlabelsError) as told:
        place.check()
    assert "geheim" not in str(told.value) and "memory://store/cache" in str(told.value)


# ------------------------------------------------------------------------------------------------ what is there already


def make_cache(folder: Path) -> dict[str, bytes]:
    """A whole cache of 4 shards with one small file; its files."""
    fields = {"logits": {"kind": "row", "type": "float32", "width": 2}}
    values = {"logits": [np.array([i, -i], np.float32) for i in range(8)]}
    write_cache(folder, rows_of([3] * 8), fields, values, shard_rows=2)
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every third call of a store fails as a broken connection does; the names of those that did."""
    calls, failed, lock = [0], [], threading.Lock()

    def breaking(name: str) -> Any:
        real = getattr(LocalFileSystem, name)

        def call(self: Any, *given: Any, **more: Any) -> Any:
            with lock:
                calls[0] += 1
                broken = calls[0] % 3 == 1
            if broken:
                failed.append(name)
                raise ConnectionResetError("reset by peer")
            return real(self, *given, **more)

        return call

    for name in ("ls", "cat_file", "get_file", "put_file", "pipe_file", "rm_file", "makedirs"):
        monkeypatch.setattr(LocalFileSystem, name, breaking(name))
    monkeypatch.setattr(urls.time, "sleep", lambda seconds: None)
    yield failed


def test_a_broken_connection_is_tried_again_and_nothing_is_taken_for_missing(tmp_path: Path, cut: list[str]) -> None:
    """Once a listing that failed was one of an empty place: the dump began anew, over what was there."""
    whole = make_cache(tmp_path / "cache")
    with mirror(f"file://{tmp_path}/cache") as store:
        found = files(store.folder)
        assert found == {name: data for name, data in whole.items() if not name.endswith(".arrow")}
        scratch = tmp_path / "scratch"
        store.begin()
        for name in ("logits/00001.arrow", "logits/00001.json"):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(whole[name])
        (tmp_path / "cache" / "logits" / "00001.arrow").unlink()
        assert store.place.deliver(scratch, ["logits"], 1) == {"logits": whole["logits/00001.json"]}
        store.finish()
    assert files(tmp_path / "cache") == whole
    assert {"ls", "cat_file", "pipe_file"} <= set(cut)


def test_small_folders_of_a_dump_that_was_killed_before_its_manifest_are_not_believed(tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / "tokenizer").mkdir(parents=True)
    (there / "tokenizer" / "tokenizer.json").write_bytes(b'{"half')
    (there / "tokenizer" / "of-another.json").write_bytes(b"{}")
    with mirror(f"file://{there}") as store:
        assert files(store.folder) == {}
        make_cache(store.folder)
        (store.folder / "tokenizer").mkdir(exist_ok=True)
        (store.folder / "tokenizer" / "tokenizer.json").write_bytes(b'{"all"')  # as many bytes
        store.begin()
        store.finish()
    found = files(there)
    assert found["tokenizer/tokenizer.json"] == b'{"all"' and "tokenizer/of-another.json" not in found
    assert "manifest.json" in found and not [name for name in found if ".tmp-" in name]


def test_a_receipt_of_a_shard_that_is_not_whole_goes_and_so_do_halves(tmp_path: Path) -> None:
    there = tmp_path / "a[1]*"  # what a glob would take for a pattern
    make_cache(there)
    (there / "logits" / "00002.arrow").write_bytes(b"half")
    (there / "logits" / ".tmp-7f-00003.arrow").write_bytes(b"half")
    (there / ".tmp-lease-old").write_bytes(b"\n")
    with mirror(f"file://{there}") as store:
        assert read_receipt(store.folder, "logits", 1) is not None
        assert read_receipt(store.folder, "logits", 2) is None
        store.begin()
        assert not (there / "logits" / "00002.json").exists()  # or it would speak of the data that comes
        assert [name for name in files(there) if ".tmp-" in name] == [store.place.lease]
    assert not [name for name in files(there) if ".tmp-" in name]


def test_what_is_no_cache_or_was_pushed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.odt").write_bytes(b"years of work")
    words = r"not empty and no cache \(it holds thesis\.odt\)"
    with pytest.raises(CacheError, match=words), mirror(f"file://{tmp_path}/thesis"):
        pass
    make_cache(tmp_path / "cache")
    push(tmp_path / "cache", f"file://{tmp_path}/there")
    with pytest.raises(CacheError, match="was pushed there"), mirror(f"file://{tmp_path}/there"):
        pass
    with pytest.raises(ConfigError, match="can only be read"), mirror("https://127.0.0.1:9/x"):
        pass


def test_the_first_error_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease can't be taken back either where the connection is gone."""

    def refuse(self: Any, path: str) -> None:
        raise PermissionError("read-only by now")

    with pytest.raises(ValueError, match="of the dump"), mirror(f"file://{tmp_path}/there") as store:
        make_cache(store.folder)
        store.begin()
        monkeypatch.setattr(LocalFileSystem, "rm_file", refuse)
        raise ValueError("of the dump")


def test_folders_of_workers_that_come_at_once_are_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One was removed, or found locked, between its making and its lock."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "softlabels-dump-dead").mkdir()
    place, wrong = StorePlace("memory://store", ".tmp-lease-a"), []

    def come_and_go() -> None:
        for _ in range(60):
            try:
                with place.scratch() as folder:
                    (folder / "00000.arrow").write_bytes(b"data")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=come_and_go) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not list(tmp_path.iterdir())
