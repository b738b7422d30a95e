"""push and pull against real servers: S3, HTTP, SFTP; cut in the middle, at once, of parts, of strangers' bytes."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from softlabels.cache import open_cache, transfer, urls
from softlabels.cache.files import lock
from softlabels.cache.format import Manifest, ShardTable, read_manifest
from softlabels.cache.pull import plan_pull, pull
from softlabels.cache.push import push
from softlabels.cache.remote import named_folder, open_remote
from softlabels.cache.settings import folder_receipt
from softlabels.cache.urls import Place, hide, redact
from softlabels.cache.verify import verify_cache
from softlabels.cli import _guarded
from softlabels.errors import CacheError, ConfigError, SoftlabelsError
from tests.cache.made import rows_of, write_cache
from tests.models import tiny_tokenizer
from tests.servers import Proxy, http_server, proxy, s3_server, sftp_server, sshd

FIELDS = {
    "logits": {"kind": "row", "type": "float32", "width": 2},
    "hidden.03": {"kind": "token", "type": "float16", "width": 32},
    "hidden.06": {"kind": "token", "type": "float16", "width": 32},
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No progress, no credentials of this machine, and no local cache but the test's own."""
    monkeypatch.setenv("SOFTLABELS_QUIET", "1")
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "local"))
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def make_cache(
    folder: Path, *, fields: Sequence[str] = tuple(FIELDS), rows: int = 60, width: int = 32, seed: int = 0
) -> Manifest:
    """A whole cache with a real tokenizer."""
    examples = rows_of([5 + i % 7 for i in range(rows)])
    specs = {name: FIELDS[name] | ({"width": width} if name != "logits" else {}) for name in fields}
    values = {}
    for name in specs:
        rng = np.random.default_rng([seed, sorted(FIELDS).index(name)])
        shapes = [(2,) if name == "logits" else (len(row.input_ids), width) for row in examples]
        values[name] = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    manifest = write_cache(folder, examples, specs, values, shard_rows=10)
    tiny_tokenizer(vocab_size=100).save_pretrained(folder / "tokenizer")
    raw = (folder / "manifest.json").read_bytes()
    from softlabels.cache.build import tokenizer_hash
    from softlabels.cache.format import to_json
    from softlabels.cache.settings import load_tokenizer

    true = json.loads(raw) | {"tokenizer_hash": tokenizer_hash(load_tokenizer(folder))}
    manifest = Manifest.model_validate(true)
    (folder / "manifest.json").write_bytes(to_json(manifest))
    (folder / "receipt.json").write_bytes(to_json(folder_receipt(folder, to_json(manifest))))
    return manifest


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share") / "cache"
    make_cache(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_whole(folder: Path) -> None:
    verdict = verify_cache(folder)
    assert verdict.whole and not verdict.notes, (verdict.faults, verdict.notes)


# ---------------------------------------------------------------------------------------------------- the servers


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with s3_server() as port:
        yield port


@pytest.fixture
def bucket(s3_port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a bucket of this test's own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "THEKEYID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "THESECRETKEY")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    import boto3

    name = "b" + "".join(letter for letter in request.node.name.lower() if letter.isalnum())[:50]
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def counted(s3_port: int, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Proxy]]:
    """The same behind a proxy that counts."""
    with proxy(s3_port) as one:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{one.port}")
        yield bucket, one


def objects(url: str) -> dict[str, bytes]:
    import boto3

    name, store = url.removeprefix("s3://").partition("/")[0], boto3.resource("s3")
    return {one.key: one.get()["Body"].read() for one in store.Bucket(name).objects.all()}


# --------------------------------------------------------------------------------------------------- there and back


def test_a_whole_cache_by_s3(cache: Path, bucket: str, tmp_path: Path):
    sent = push(cache, f"{bucket}/some/where")
    came = pull(f"{bucket}/some/where", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(cache)
    assert_whole(tmp_path / "back")
    assert sent.sent_bytes == came.fetched_bytes == sum(t.total for t in read_manifest(cache).shards.values())
    assert push(tmp_path / "back", f"{bucket}/some/where").sent_files == 0  # what was pulled is the same cache
    assert pull(f"{bucket}/some/where", tmp_path / "back").fetched_files == 0


@pytest.mark.parametrize("compress", [False, True])
def test_a_whole_cache_by_a_folder_and_by_http(cache: Path, tmp_path: Path, compress: bool):
    report = push(cache, f"file://{tmp_path}/there", compress=compress)
    assert set(report.packed) == (set(FIELDS) if compress else set())
    with http_server(tmp_path) as port:
        pull(f"http://127.0.0.1:{port}/there", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(cache)
    with http_server(tmp_path, ranges=False) as port:
        pull(f"http://127.0.0.1:{port}/there", tmp_path / "again")
        assert contents(tmp_path / "again") == contents(cache)


def test_a_caches_folder_that_is_served_as_it_is(cache: Path, tmp_path: Path):
    with http_server(cache.parent) as port:
        url = f"http://127.0.0.1:{port}/{cache.name}"
        pull(url, tmp_path / "back")
        assert contents(tmp_path / "back") == contents(cache)
        with pytest.raises(ConfigError, match="can only be read"):
            push(cache, url)
    with pytest.raises(CacheError, match="copied there as it is"):
        push(cache, f"file://{tmp_path}/back")


needs_sshd = pytest.mark.skipif(sshd() is None, reason="this machine has no sshd (Debian: openssh-server)")


@needs_sshd
def test_a_whole_cache_by_sftp(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("paramiko")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with sftp_server(tmp_path / "home") as port:
        push(cache, f"sftp://127.0.0.1:{port}{tmp_path}/there", threads=3)
        pull(f"ssh://127.0.0.1:{port}{tmp_path}/there", tmp_path / "back", threads=3)
    assert contents(tmp_path / "back") == contents(cache)


@pytest.mark.slow
@needs_sshd
def test_sftp_cut_twenty_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("paramiko")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_cache(tmp_path / "cache", width=512)
    cut = cuts(20, least=15_000, most=60_000)
    with sftp_server(tmp_path / "home") as port:
        with proxy(port, cut) as way:
            push(tmp_path / "cache", f"sftp://127.0.0.1:{way.port}{tmp_path}/there", threads=3)
            assert way.cuts == 20
        with proxy(port, cut) as way:
            pull(f"sftp://127.0.0.1:{way.port}{tmp_path}/there", tmp_path / "back", threads=3)
            assert way.cuts == 20
    assert contents(tmp_path / "back") == contents(tmp_path / "cache")


def test_other_tools_read_what_was_pushed(cache: Path, tmp_path: Path):
    polars = pytest.importorskip("polars")
    push(cache, f"file://{tmp_path}/there", compress=False)
    (folder,) = (tmp_path / "there").glob("logits-*")
    table = polars.concat([polars.read_ipc(path) for path in sorted(folder.glob("*.arrow"))])
    np.testing.assert_array_equal(np.stack(table["logits"].to_numpy()), open_cache(cache).column("logits"))


# ------------------------------------------------------------------------------------------------------------ parts


def test_fields_are_added_and_only_their_bytes_travel(cache: Path, counted: tuple[str, Proxy], tmp_path: Path):
    url, way = counted
    manifest = read_manifest(cache)
    push(cache, url, fields=["logits"])
    assert list(open_remote(url).manifest.fields) == ["logits"]
    way.reset()
    push(cache, url, fields=["hidden"], layers=[6])
    sent = manifest.shards["hidden.06"].total
    assert sent < way.up < sent + 100_000
    assert list(open_remote(url).manifest.fields) == ["hidden.06", "logits"]
    pull(url, tmp_path / "part", fields=["logits"])
    assert_whole(tmp_path / "part")
    assert not (tmp_path / "part" / "hidden.06").exists()
    pull(url, tmp_path / "part", layers=[6])
    assert_whole(tmp_path / "part")
    assert sorted(read_manifest(tmp_path / "part").fields) == ["hidden.06", "logits"]


def test_pulling_logits_moves_only_their_bytes(counted: tuple[str, Proxy], tmp_path: Path):
    """Of a cache whose hidden states are more than 50 times as large, counted at the server, headers and all."""
    url, way = counted
    manifest = make_cache(tmp_path / "cache", width=1024)
    wanted = manifest.shards["logits"].total + manifest.shards["examples"].total
    assert manifest.shards["hidden.06"].total > 50 * manifest.shards["logits"].total
    push(tmp_path / "cache", url)
    way.reset()
    pull(url, tmp_path / "back", fields=["logits"])
    small = sum(path.stat().st_size for path in (tmp_path / "cache").glob("tokenizer/*")) + 2 * 6_000  # JSON
    assert wanted < way.down < wanted + small + 1_500 * 25  # what a response says of itself
    assert way.down < manifest.shards["hidden.06"].total / 3


def test_fields_that_are_not_there_are_refused(cache: Path, tmp_path: Path):
    push(cache, f"file://{tmp_path}/there")
    with pytest.raises(ConfigError, match="no field 'logitz'; it has hidden"):
        pull(f"file://{tmp_path}/there", tmp_path / "back", fields=["logitz"])
    with pytest.raises(ConfigError, match="layer 5"):
        push(cache, f"file://{tmp_path}/there", layers=[5])
    with pytest.raises(CacheError, match="no cache at"):
        pull(f"file://{tmp_path}/nowhere", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("span", [(0, 20), (13, 47), (10, 15), (None, 7), (59, None)])
def test_rows(cache: Path, tmp_path: Path, span: tuple[int | None, int | None]):
    push(cache, f"file://{tmp_path}/there")
    whole, numbers = open_cache(cache), list(range(60))[slice(*span)]
    report = pull(f"file://{tmp_path}/there", tmp_path / "part", fields=["logits"], rows=span)
    pull(f"file://{tmp_path}/there", tmp_path / "part", fields=["hidden.06"], rows=span)
    assert_whole(tmp_path / "part")
    part = open_cache(tmp_path / "part")
    assert part.ids == [whole.ids[number] for number in numbers] and report.rows == len(numbers)
    theirs, ours = (c.signals(r, ["logits", "hidden.06"]) for c, r in ((whole, numbers), (part, range(len(numbers)))))
    for name, values in ours.fields.items():
        assert (values == theirs.fields[name]).all()
    with pytest.raises(CacheError, match=r"corpus.hash"):
        pull(f"file://{tmp_path}/there", tmp_path / "part")
    remembered = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CacheError, match=r"part holds .*\[\d+:\d+\], and rows 20:30 of x\.csv are others"):
        pull(f"file://{tmp_path}/there", tmp_path / "part", rows=(20, 30))
    assert sorted(path.name for path in tmp_path.iterdir()) == remembered  # nothing travelled


def test_rows_that_have_no_place_are_refused_before_they_travel(cache: Path, tmp_path: Path):
    push(cache, f"file://{tmp_path}/there")
    make_cache(tmp_path / "other", fields=["logits"], rows=50)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.odt").write_bytes(b"years of work")
    for folder, words in (("other", "rows 0:20 of x.csv are others"), ("thesis", "not empty and no cache")):
        with pytest.raises(CacheError, match=words):
            pull(f"file://{tmp_path}/there", tmp_path / folder, rows=(0, 20))
        with pytest.raises(CacheError, match=words):
            plan_pull(f"file://{tmp_path}/there", tmp_path / folder, rows=(0, 20))
    assert not list(tmp_path.glob(".tmp-*"))
    drafts = tmp_path / ".tmp-pull-part"  # another pull of the same rows is at work there
    drafts.mkdir()
    with lock(drafts), pytest.raises(CacheError, match="is being written by another process"):
        pull(f"file://{tmp_path}/there", tmp_path / "part", rows=(0, 20))
    pull(f"file://{tmp_path}/there", tmp_path / "part", rows=(0, 20))
    assert not drafts.exists()
    assert_whole(tmp_path / "part")
    url, almost = f"file://{tmp_path}/there", (0, 59)  # in all shards, and yet not all rows
    pull(url, tmp_path / "almost", fields=["logits"], rows=almost)
    assert plan_pull(url, tmp_path / "almost", fields=["logits"], rows=almost).fetch_files == 12


def test_rows_travel_by_the_shards_they_lie_in(cache: Path, counted: tuple[str, Proxy], tmp_path: Path):
    url, manifest = counted[0], read_manifest(cache)
    push(cache, url)
    came = pull(url, tmp_path / "part", fields=["logits"], rows=(25, 41))
    tables = [manifest.shards[name] for name in ("examples", "logits")]
    assert came.fetched_bytes == sum(table.size(shard) for table in tables for shard in (2, 3, 4))
    with pytest.raises(ConfigError, match="0:60"):
        pull(url, tmp_path / "other", rows=(50, 70))


def test_a_plan_says_what_would_travel_and_writes_nothing(cache: Path, tmp_path: Path):
    url, manifest, back = f"file://{tmp_path}/there", read_manifest(cache), tmp_path / "back"
    push(cache, url)
    plan = plan_pull(url, back, fields=["logits"])
    names = ["examples", "logits"]
    assert plan.fetch_bytes == sum(manifest.shards[name].total for name in names) and plan.there_files == 0
    assert plan.rows == 60 and plan.fetch_files == 2 * len(manifest.shard_rows) and not back.exists()
    assert plan.fetch_bytes == pull(url, back, fields=["logits"]).fetched_bytes

    there = contents(back)
    (back / "logits" / "00003.arrow").write_bytes(b"cut")
    plan = plan_pull(url, back, fields=["logits", "hidden.06"])
    assert plan.fetch_bytes == manifest.shards["hidden.06"].total + manifest.shards["logits"].size(3)
    assert plan.there_bytes == sum(manifest.shards[name].total for name in names) - manifest.shards["logits"].size(3)
    there.pop("logits/00003.arrow")
    assert {name: value for name, value in contents(back).items() if name != "logits/00003.arrow"} == there

    part = plan_pull(url, tmp_path / "part", fields=["logits"], rows=(25, 41))
    assert part.fetch_bytes == pull(url, tmp_path / "part", fields=["logits"], rows=(25, 41)).fetched_bytes
    with pytest.raises(ConfigError, match="no field 'logitz'"):
        plan_pull(url, back, fields=["logitz"])
    with pytest.raises(CacheError, match="another cache"):
        make_cache(tmp_path / "other", rows=20)
        plan_pull(url, tmp_path / "other")


def test_a_plan_of_packed_fields_counts_what_travels(cache: Path, tmp_path: Path):
    url = f"file://{tmp_path}/there"
    push(cache, url, compress=True)
    assert plan_pull(url, tmp_path / "back").fetch_bytes == pull(url, tmp_path / "back").fetched_bytes


# ------------------------------------------------------------------------------------------- harm and interruption


def cuts(count: int, *, least: int, most: int) -> Callable[[int], int | None]:
    """How many bytes a connection lives for, until `count` were cut."""
    rng = np.random.default_rng(0)
    after = rng.integers(least, most, count).tolist()
    return lambda number: after[number] if number < count else None


@pytest.mark.parametrize("way_there", ["s3", "http"])
def test_connections_cut_twenty_times(
    way_there: str, bucket: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the middle of files that are larger than any connection lives."""
    make_cache(tmp_path / "cache", width=512)  # 85 kB a shard of hidden states
    if way_there == "s3":
        with proxy(s3_port, cuts(20, least=30_000, most=80_000)) as way:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{way.port}")
            push(tmp_path / "cache", bucket, threads=4)
            assert way.cuts == 20
        with proxy(s3_port, cuts(20, least=30_000, most=80_000)) as way:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{way.port}")
            pull(bucket, tmp_path / "back", threads=4)
            assert way.cuts == 20
    else:
        push(tmp_path / "cache", f"file://{tmp_path}/there")
        with http_server(tmp_path) as port, proxy(port, cuts(20, least=30_000, most=80_000)) as way:
            pull(f"http://127.0.0.1:{way.port}/there", tmp_path / "back", threads=4)
            assert way.cuts == 20
    assert contents(tmp_path / "back") == contents(tmp_path / "cache")


def test_what_was_interrupted_goes_on(counted: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A push and a pull that break off after some files: the second call moves the rest, and part of a file stays."""
    url, way = counted
    manifest = make_cache(tmp_path / "cache", width=512)
    total = sum(table.total for table in manifest.shards.values())
    seen: list[int] = []

    def stop_after(count: int):
        real = urls.Place.try_once
        seen.clear()

        def once(self, act, patience):
            seen.append(1)
            if len(seen) > count:
                raise KeyboardInterrupt
            return real(self, act, patience)

        return once

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(urls.Place, "try_once", stop_after(30))
        push(tmp_path / "cache", url, threads=1)
    with pytest.raises(CacheError, match="no cache at"):
        open_remote(url)  # nobody sees half a cache
    again = push(tmp_path / "cache", url)
    assert again.there_bytes > 0 and again.there_bytes + again.sent_bytes == total
    monkeypatch.setattr(transfer, "_FIRST", 30_000)
    monkeypatch.setattr(transfer, "_MOST", 30_000)
    parts, count = 0, 40
    while not parts:  # until it breaks off in the middle of a file
        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(urls.Place, "try_once", stop_after(count))
            pull(url, tmp_path / "back", threads=1)
        parts, count = sum(path.stat().st_size for path in (tmp_path / "back").glob("*/.tmp-*")), 8
    with pytest.raises(CacheError, match="unfinished"):
        open_cache(tmp_path / "back")
    way.reset()
    came = pull(url, tmp_path / "back")
    assert parts and came.there_bytes and came.fetched_bytes + came.there_bytes + parts == total
    assert contents(tmp_path / "back") == contents(tmp_path / "cache")


def test_what_differs_is_fetched_again(cache: Path, tmp_path: Path):
    url, back = f"file://{tmp_path}/there", tmp_path / "back"
    push(cache, url)
    pull(url, back)
    for name in ("hidden.06/00002.arrow", "tokenizer/tokenizer.json"):
        harmed = bytearray((back / name).read_bytes())
        harmed[len(harmed) // 2] ^= 1
        (back / name).write_bytes(harmed)
    (back / "logits" / "00001.arrow").unlink()
    assert pull(url, back).fetched_files == 3
    assert contents(back) == contents(cache)


def test_damage_at_the_place_is_told_and_mended(cache: Path, tmp_path: Path):
    url = f"file://{tmp_path}/there"
    push(cache, url)
    (path,) = (tmp_path / "there").glob("hidden.06-*/00003.arrow")
    harmed = bytearray(path.read_bytes())
    harmed[2000] ^= 1
    path.write_bytes(harmed)
    with pytest.raises(CacheError, match=r"00003.arrow is not the file that was pushed.*--check"):
        pull(url, tmp_path / "back")
    assert push(cache, url).sent_files == 0
    assert push(cache, url, check=True).sent_files == 1
    pull(url, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(cache)


def test_small_files_and_cards_that_are_damaged_are_mended_too(cache: Path, tmp_path: Path):
    url, there = f"file://{tmp_path}/there", tmp_path / "there"
    push(cache, url, fields=["logits", "hidden.06"], compress=True)
    whole = contents(there)
    (tokenizer,) = there.glob("tokenizer-*/tokenizer.json")
    tokenizer.write_bytes(tokenizer.read_bytes()[:-1] + b" ")
    with pytest.raises(CacheError, match=r"tokenizer.json is not the file that was pushed.*--check"):
        pull(url, tmp_path / "back")
    assert push(cache, url, fields=["logits"], check=True).sent_files == 1
    assert contents(there) == whole
    for name in ("examples-*/field.json", "hidden.06-*/field.json"):
        (card,) = there.glob(name)
        card.write_bytes(b"")  # as a power cut may leave it
        with pytest.raises(CacheError, match=r"field.json is damaged.*--check"):
            push(cache, url, fields=["hidden.06"])
        push(cache, url, fields=["hidden.06"], check=True)
        assert contents(there) == whole


def test_a_manifest_that_changed_in_a_folder_that_is_served_is_told(cache: Path, tmp_path: Path):
    """A pull wrote a receipt of what it had found, and verify called it whole."""
    make_cache(tmp_path / "there")
    path = tmp_path / "there" / "manifest.json"
    path.write_text(path.read_text().replace('["no", "yes"]', '["yes", "no"]'))
    with pytest.raises(CacheError, match=r"manifest.json is not the one that receipt.json beside it speaks of"):
        pull(f"file://{tmp_path}/there", tmp_path / "back")


def test_what_fails_leaves_no_half_there(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a full disk each try left its own."""

    def half(self: LocalFileSystem, source: str, target: str, **more: object) -> None:
        Path(target).write_bytes(b"half")
        raise PermissionError("no more than your quota")

    monkeypatch.setattr(LocalFileSystem, "put_file", half)
    with pytest.raises(CacheError, match="no more than your quota"):
        push(cache, f"file://{tmp_path}/there")
    assert contents(tmp_path / "there") == {}


def test_an_error_does_not_wait_for_each_of_the_others(monkeypatch: pytest.MonkeyPatch):
    release = threading.Event()

    def act(number: int) -> None:
        if number == 0:
            raise ValueError("the first one")
        release.wait(60)

    monkeypatch.setattr(transfer, "_FAREWELL", 0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match="the first one"):
        list(transfer.in_parallel(act, range(8), transfer.Traffic()))
    assert time.monotonic() - began < 3
    release.set()


def test_no_threads_are_one(cache: Path, tmp_path: Path):
    push(cache, f"file://{tmp_path}/there", fields=["logits"], threads=0)
    assert pull(f"file://{tmp_path}/there", tmp_path / "back", threads=0).fields == ["logits"]


def test_receipts_that_say_another_thing_are_written_again(cache: Path, tmp_path: Path):
    url, back = f"file://{tmp_path}/there", tmp_path / "back"
    push(cache, url)
    pull(url, back)
    for wrong in (b"no JSON", (back / "logits" / "00002.json").read_bytes()):
        (back / "logits" / "00001.json").write_bytes(wrong)
        assert pull(url, back).fetched_files == 0
        assert contents(back) == contents(cache)


def test_a_name_that_no_pull_would_take_is_not_pushed(tmp_path: Path):
    make_cache(tmp_path / "cache", fields=["logits"])
    (tmp_path / "cache" / "tokenizer" / ".DS_Store").write_bytes(b"of a Mac")
    (tmp_path / "cache" / "receipt.json").unlink()
    with pytest.raises(CacheError, match=r"cache has a file 'tokenizer/.DS_Store', which is none of a cache"):
        push(tmp_path / "cache", f"file://{tmp_path}/there")
    assert not (tmp_path / "there").exists()


def test_a_damaged_cache_is_not_pushed(cache: Path, tmp_path: Path):
    make_cache(tmp_path / "cache")
    path = tmp_path / "cache" / "logits" / "00001.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(CacheError, match=r"00001.arrow is not the file that was written"):
        push(tmp_path / "cache", f"file://{tmp_path}/there")
    with pytest.raises(CacheError, match="no cache at"):
        open_remote(f"file://{tmp_path}/there")


# ------------------------------------------------------------------------------------------------ several at once


def at_once(*acts: Callable[[], object]) -> list[BaseException | None]:
    """Run all at the same moment; what each of them raised."""
    barrier, found = threading.Barrier(len(acts)), [None] * len(acts)

    def run(number: int) -> None:
        barrier.wait()
        try:
            acts[number]()
        except SoftlabelsError as error:
            found[number] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(found)


def test_two_pushes_of_one_cache_at_once(cache: Path, bucket: str, tmp_path: Path):
    assert at_once(lambda: push(cache, bucket), lambda: push(cache, bucket)) == [None, None]
    pull(bucket, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(cache)


@pytest.mark.parametrize("turn", range(4))
def test_pushes_of_different_fields_at_once_end_in_all_of_them(cache: Path, tmp_path: Path, turn: int):
    url = f"file://{tmp_path}/there"
    assert at_once(*(lambda name=name: push(cache, url, fields=[name]) for name in FIELDS)) == [None] * 3
    pull(url, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(cache)


@pytest.mark.parametrize("turn", range(4))
def test_two_different_caches_at_once_leave_one_whole(cache: Path, tmp_path: Path, turn: int):
    """They even are of the same teacher and rows, with the same sizes: only their values differ."""
    make_cache(tmp_path / "other", seed=1)
    url = f"file://{tmp_path}/there"
    errors = at_once(lambda: push(cache, url), lambda: push(tmp_path / "other", url))
    assert None in errors
    pull(url, tmp_path / "back")
    assert_whole(tmp_path / "back")
    assert contents(tmp_path / "back") in (contents(cache), contents(tmp_path / "other"))
    for error in errors:
        assert error is None or "other values" in str(error)


def test_another_cache_is_refused(cache: Path, tmp_path: Path):
    make_cache(tmp_path / "values", seed=1)
    make_cache(tmp_path / "rows", rows=50)
    url = f"file://{tmp_path}/there"
    push(cache, url)
    before = contents(tmp_path / "there")
    with pytest.raises(CacheError, match=r"another cache: hidden.03 has other values; .*Push to another URL"):
        push(tmp_path / "values", url)
    with pytest.raises(CacheError, match=r"corpus.rows is 60 there and 50 here"):
        push(tmp_path / "rows", url)
    assert contents(tmp_path / "there") == before
    with pytest.raises(CacheError, match=r"corpus.rows is 60 there and 50 here.*choose another folder"):
        pull(url, tmp_path / "rows")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"not empty and no cache \(it holds letter.txt\)"):
        pull(url, tmp_path / "full")


# ---------------------------------------------------------------------------------------------- strangers and secrets


def test_a_strangers_paths_and_bytes_are_refused(cache: Path, tmp_path: Path):
    url = f"file://{tmp_path}/there"
    push(cache, url, compress=True)
    (card,) = (tmp_path / "there").glob("examples-*/field.json")
    good = card.read_text()
    evil = json.loads(good)
    evil["files"] = {"tokenizer/../../../evil.json": "0" * 32}
    card.write_text(json.dumps(evil))
    with pytest.raises(CacheError, match="none of a cache: refused"):
        pull(url, tmp_path / "back")
    card.write_text(good)
    for path in (tmp_path / "there").glob("logits-*/*.packed"):
        data = path.read_bytes()
        path.write_bytes(data[:30] + bytes(len(data) - 30))
    with pytest.raises(CacheError, match="is not the file that was pushed"):
        pull(url, tmp_path / "back")
    (tmp_path / "there" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CacheError, match="damaged"):
        pull(url, tmp_path / "back")
    assert not (tmp_path / "evil.json").exists()


def test_cards_and_sizes_that_do_not_fit_are_told(cache: Path, tmp_path: Path):
    """Each ended in a traceback."""
    url, there = f"file://{tmp_path}/there", tmp_path / "there"
    push(cache, url, fields=["logits"])
    (card,) = there.glob("logits-*/field.json")
    told = json.loads(card.read_text())
    card.write_text(json.dumps(told | {"packed": []}))
    with pytest.raises(CacheError, match="is not that of the manifest"):
        pull(url, tmp_path / "back")
    card.unlink()
    with pytest.raises(CacheError, match=r"lacks logits-\w+/field.json, which its manifest names"):
        pull(url, tmp_path / "back")
    manifest = json.loads((there / "manifest.json").read_text())
    manifest["shards"]["logits"]["sizes"] = "0" * 12 * 6
    (there / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"shards\.logits.*a shard has no bytes"):
        pull(url, tmp_path / "back")


def test_a_card_of_a_field_that_no_reader_takes_comes_into_no_manifest(cache: Path, tmp_path: Path):
    push(cache, f"file://{tmp_path}/there", fields=["logits"])
    (card,) = (tmp_path / "there").glob("logits-*/field.json")
    told = json.loads(card.read_text()) | {"field": "Logits"}
    folder = tmp_path / "there" / named_folder("Logits", ShardTable.model_validate(told["table"]))
    folder.mkdir()
    (folder / "field.json").write_text(json.dumps(told))
    push(cache, f"file://{tmp_path}/there", fields=["hidden.06"])
    assert sorted(open_remote(f"file://{tmp_path}/there").manifest.fields) == ["hidden.06", "logits"]


class _Endless(BaseHTTPRequestHandler):
    """Sends for as long as someone reads; or a few kB that unpack to a gigabyte."""

    bomb = b""

    def do_GET(self) -> None:
        packed = "packed" in self.path
        self.send_response(206 if "part" in self.path else 200)
        self.send_header("Content-Encoding", "gzip" if packed else "identity")
        self.end_headers()
        with suppress(OSError):
            for _ in range(1 if packed else 1000):
                self.wfile.write(self.bomb if packed else bytes(1_000_000))

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_no_more_is_read_than_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    """All that a web server sent was read into memory before it was found to be too long."""
    packer = zlib.compressobj(1, wbits=31)
    packed = [packer.compress(bytes(10_000_000)) for _ in range(40)]
    monkeypatch.setattr(_Endless, "bomb", b"".join([*packed, packer.flush()]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endless)
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("whole", "part", "packed"):
        place = Place(f"http://127.0.0.1:{server.server_address[1]}/{name}")
        with pytest.raises(CacheError, match="more than the 1,000 bytes"):
            place.read("manifest.json", limit=1000)
    server.shutdown()
    server.server_close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # kB


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://KEYKEY:SECRETS/with/slashes+@bucket/x", "s3://***@bucket/x"),
        ("sftp://anna:pass-word#SECRETS@host/x", "sftp://***@host/x"),
        ("sftp://anna:pass-word?SECRETS@host/x", "sftp://***@host/x"),
        ("https://host:8080/x?mail=anna@home", "https://host:8080/x?***"),
        ("https://[::1]:80/x@y", "https://[::1]:80/x@y"),
        ("hf://datasets/a/b@v:1/x", "hf://datasets/a/b@v:1/x"),
        ("https://anna:pass-word@host/x", "https://***@host/x"),
        ("https://t0ken-abc@host/x", "https://***@host/x"),
        ("https://host/x?X-Amz-Signature=abcdef", "https://host/x?***"),
        ("s3://KEYKEY:SECRETS@bucket/x", "s3://***@bucket/x"),
        ("sftp://anna@host/x", "sftp://anna@host/x"),
        ("sftp://anna:pass-word@host:22/x", "sftp://***@host:22/x"),
        ("s3://bucket/mail@home", "s3://bucket/mail@home"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str):
    assert redact(url) == shown
    secrets = [word for word in ("pass-word", "t0ken-abc", "abcdef", "KEYKEY", "SECRETS") if word in url]
    told = hide(f"GET {url}/manifest.json: 403 for {url} {' '.join(secrets)}", url)
    assert not any(secret in told for secret in secrets)


def test_credentials_in_a_url_go_to_the_server_alone(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with http_server(cache.parent) as port:
        url = f"http://anna:pass-word@127.0.0.1:{port}/{cache.name}?sig=S1GNATURE"
        report = pull(url, tmp_path / "back")
        opened = open_cache(url)
        opened.batch([0, 1], ["logits"])
        with pytest.raises(CacheError) as missing:
            pull(url.replace(cache.name, "nothing"), tmp_path / "no")
    with pytest.raises(CacheError) as dead:
        Place(url).read("manifest.json", limit=10)
    for key in ("pass-word", "pass-word/with/slashes"):
        with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID") as refused:
            push(cache, f"s3://KEYKEY:{key}@bucket/x")
    told = [
        *capfd.readouterr(),
        str(report),
        str(opened.shown),
        str(missing.value),
        str(dead.value),
        str(refused.value),
    ]
    told += [data.decode(errors="replace") for data in contents(tmp_path).values()]
    assert contents(tmp_path / "back") == contents(cache)
    assert not [text for text in told if "pass-word" in text or "S1GNATURE" in text]


def test_s3_credentials_are_nowhere(cache: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    push(cache, bucket)
    pull(bucket, tmp_path / "back")
    everything = [*contents(tmp_path).values(), *objects(bucket).values()]
    assert not [data for data in everything if b"THESECRETKEY" in data or b"THEKEYID" in data]
    with pytest.raises(CacheError, match=r"NoSuchBucket|bucket does not exist|no cache at") as error:
        pull("s3://there-is-no-such-bucket/x", tmp_path / "no")
    assert "THEKEYID" not in str(error.value)
    with pytest.raises(CacheError, match=r"there-is-no-such-bucket/x: .*does not exist.* Make it first"):
        push(cache, "s3://there-is-no-such-bucket/x")


def test_unknown_protocols_and_packages(cache: Path):
    with pytest.raises(ConfigError, match="no protocol 's4'"):
        push(cache, "s4://bucket/x")
    with pytest.raises(ConfigError, match=r"softlabels\[share\]"):
        push(cache, "lakefs://repository/main/x")
    with pytest.raises(ConfigError, match=r"s3://\[bucket/x is no URL"):
        push(cache, "s3://[bucket/x")


# ------------------------------------------------------------------------------------------------------ the commands


def test_the_commands(cache: Path, bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> tuple[int, str, str]:
        code = _guarded([str(argument) for argument in arguments], debug=False)
        told = capfd.readouterr()
        return code, told.out, told.err

    code, out, _ = run("push", cache, f"{bucket}/x", "--field", "logits", "--field", "hidden.06", "--json")
    assert code == 0 and json.loads(out)["fields"] == ["hidden.06", "logits"]
    code, out, _ = run("pull", f"{bucket}/x", tmp_path / "back", "--field", "logits", "--plan", "--json")
    planned = json.loads(out)
    assert code == 0 and planned["fields"] == ["logits"] and planned["fetch_bytes"] > 0
    assert not (tmp_path / "back").exists()
    code, out, _ = run("pull", f"{bucket}/x", tmp_path / "back", "--field", "logits", "--rows", "5:25")
    assert code == 0 and "rows           20" in out
    code, out, _ = run("info", f"{bucket}/x", "--json")
    assert code == 0 and sorted(json.loads(out)["fields"]) == ["hidden.06", "logits"]
    for arguments, words in (
        (("pull", f"{bucket}/x", tmp_path / "no", "--rows", "5-25"), "--rows 5-25: give two row numbers"),
        (("pull", f"{bucket}/x", tmp_path / "no", "--rows", "50:90"), "has the rows 0:60"),
        (("pull", f"{bucket}/nothing", tmp_path / "no"), "no cache at"),
        (("push", tmp_path / "no", f"{bucket}/x"), "no such folder"),
        (("push", cache, "s3://there-is-no-such-bucket/x"), "s3://there-is-no-such-bucket/x: "),
        (("push", cache, "cache-of-mine"), "is no URL"),
        (("pull", tmp_path / "no", tmp_path / "back"), "is no URL"),
    ):
        code, out, told = run(*arguments)
        assert code == 2 and not out and told.startswith("error: ") and words in told, told


def test_a_url_where_a_folder_is_needed(cache: Path, tmp_path: Path):
    with pytest.raises(CacheError, match=r"s3://\*\*\*@bucket/x is a URL, and a folder is needed.*pull"):
        verify_cache("s3://KEY:pass-word@bucket/x".replace("//", "/"))
    with pytest.raises(CacheError, match=r"^file:///no/cache is a URL"):
        verify_cache(Path("file:///no/cache"))
    with pytest.raises(CacheError, match=r"sftp://\*\*\*@127.0.0.1:9/x can't be reached"):
        pytest.importorskip("paramiko")
        pull("sftp://anna:pass-word@127.0.0.1:9/x", tmp_path / "no")
