"""Whatever stops a dump, the same command ends in the same bytes: kills, full disks, and every call that fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from softlabels.cache import build
from softlabels.cache.build import CacheBuild, build_cache, check_rows, plan_manifest, teacher_card
from softlabels.cache.format import (
    EXAMPLES,
    DumpCard,
    FieldSpec,
    Receipt,
    read_manifest,
    read_receipt,
    receipt_file,
    shard_file,
    to_json,
)
from softlabels.cache.quick import whole_receipts
from softlabels.cache.writer import FieldShard, join_hash, write_examples
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus, read_corpus
from softlabels.dump import DumpReport, dump
from softlabels.errors import CacheError
from softlabels.tokens import tokenize
from softlabels.types import Example
from tests.models import TEXTS, save_teacher, tiny_tokenizer
from tests.processes import Launcher, environment

KILLS = int(os.environ.get("SOFTLABELS_KILLS", "5"))


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def receipts_without_their_shard(folder: Path) -> list[str]:
    """Receipts that speak of a file which isn't there, or isn't so."""
    from softlabels.cache.files import hash_file

    wrong = []
    for path in folder.glob("*/[0-9]*.json"):
        file, facts = path.with_suffix(".arrow"), json.loads(path.read_text())
        if not file.exists() or (file.stat().st_size, hash_file(file)) != (facts["bytes"], facts["xxh3_128"]):
            wrong.append(str(path.relative_to(folder)))
    return wrong


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher` and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("durability")
    save_teacher(folder / "teacher")
    rows = [{"id": f"row-{i}", "text": text, "label": name} for i, (text, name) in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    started = Launcher(tmp_path_factory.mktemp("launcher"))
    yield started
    started.close()


def arguments(made: Path, out: Path) -> list[str]:
    captures = ["--capture", "logits", "--capture", "hidden:1,2", "--capture", "qkv:1"]
    where = ["dump", str(made / "rows.jsonl"), "--teacher", str(made / "teacher"), "--out", str(out)]
    return [*where, *captures, "--shard-rows", "4", "--cpu"]


@pytest.fixture(scope="module")
def whole(made: Path, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted dump."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    launcher.run(*arguments(made, out), cwd=made)  # once for nothing, so that what is timed later is warm
    shutil.rmtree(out)
    done = launcher.run(*arguments(made, out), cwd=made)
    assert done.code == 0, done.err
    return out


# ----------------------------------------------------------------------------------------------------------- kills


def kill_and_finish(made: Path, launcher: Launcher, whole: Path, out: Path, *, kills: int, seed: int) -> int:
    """Kill dumps into `out` at random moments until one ends by itself or `kills` are done, then finish; the kills."""
    rng, done = random.Random(seed), 0
    started = time.monotonic()
    launcher.run(*arguments(made, out.with_name("timed")), cwd=made)
    usual = time.monotonic() - started
    shutil.rmtree(out.with_name("timed"))
    while done < kills:
        moment = time.monotonic() + rng.uniform(0.02, 0.6 * usual)
        ended = launcher.run(
            *arguments(made, out),
            cwd=made,
            when=lambda moment=moment: time.monotonic() >= moment,  # type: ignore[misc]
            signals=[signal.SIGKILL],
        )
        done += ended.code == -signal.SIGKILL
        assert receipts_without_their_shard(out) == [] if out.exists() else True
        if ended.code == 0:
            assert contents(out) == contents(whole)
            shutil.rmtree(out)
    assert launcher.run(*arguments(made, out), cwd=made).code == 0
    assert contents(out) == contents(whole)
    return done


def test_killed_at_random_moments_the_cache_ends_in_the_same_bytes(
    made: Path, launcher: Launcher, whole: Path, tmp_path: Path
) -> None:
    assert kill_and_finish(made, launcher, whole, tmp_path / "cache", kills=KILLS, seed=1) >= KILLS


@pytest.mark.slow
def test_two_hundred_kills(made: Path, launcher: Launcher, whole: Path, tmp_path: Path) -> None:
    kills = sum(
        kill_and_finish(made, launcher, whole, tmp_path / f"cache-{seed}", kills=10, seed=100 + seed)
        for seed in range(20)
    )
    assert kills >= 200


# ------------------------------------------------------------------------------------------------------ full disks


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of `kilobytes`, and a function that makes it another size."""
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", place], capture_output=True)
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.decode().strip()}")

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}k", place], check=True, capture_output=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_told_and_with_more_room_the_same_command_ends_in_the_same_bytes(
    made: Path, launcher: Launcher, whole: Path, tmp_path: Path
) -> None:
    needed = sum(-(-path.stat().st_size // 4096) * 4 for path in whole.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", 40) as resize:
        out = tmp_path / "disk" / "cache"
        for share in (0.15, 0.4, 0.7, 0.97):
            resize(int(needed * share))
            done = launcher.run(*arguments(made, out), cwd=made)
            assert done.code == 2 and "disk is full" in done.err and "Traceback" not in done.err, (share, done)
            assert receipts_without_their_shard(out) == []
        resize(2 * needed)
        done = launcher.run(*arguments(made, out), cwd=made)
        assert done.code == 0, done.err
        assert contents(out) == contents(whole)


def test_a_limit_on_file_sizes_is_told(made: Path, launcher: Launcher, whole: Path, tmp_path: Path) -> None:
    for limit in (1_000, 2_500, 4_000):
        done = launcher.run(*arguments(made, tmp_path / "cache"), cwd=made, largest_file=limit)
        assert done.code == 2 and "ulimit" in done.err, (limit, done)
    assert launcher.run(*arguments(made, tmp_path / "cache"), cwd=made).code == 0
    assert contents(tmp_path / "cache") == contents(whole)


# ------------------------------------------------------------------------------------------ every call fails in turn

CALLS = ["open", "write", "pwrite", "ftruncate", "fsync", "replace", "mkdir", "close", "unlink"]


class Fail:
    """Counts the calls of os.… that a dump makes on its cache, and lets the `fatal`-th fail once with `code`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fatal: int, code: int) -> None:
        self.calls: list[str] = []
        self.fatal, self.code = fatal, code
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real(*args, **named)  # for reading: no part of this
            self.calls.append(name)
            if len(self.calls) - 1 == self.fatal:
                if name == "close":
                    real(*args, **named)  # the descriptor is gone, whatever it says
                if name in ("write", "pwrite") and len(args[1]) > 1:
                    real(args[0], args[1][: len(args[1]) // 2], *args[2:])  # half of it came through
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **named)

        return call


@dataclass(frozen=True)
class Small:
    """A dump without a model: two shards of made-up numbers, by the calls that `dump` makes."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast

    def run(self, out: Path) -> None:
        check_rows(self.corpus)
        tokenizer = self.tokenizer
        manifest = plan_manifest(
            self.corpus,
            labelled=len(self.corpus.examples),
            teacher=teacher_card(tokenizer, name="t", weights_hash="0", label_names=["a", "b"]),
            tokenizer=tokenizer,
            dump=DumpCard(max_length=16, shard_rows=2, batch_tokens=64, dtype="float32", text=True),
            fields={
                "logits": FieldSpec(kind="row", type="float32", width=2),
                "hidden.01": FieldSpec(kind="token", type="int8", width=4),
            },
        )
        with build_cache(out, manifest, tokenizer=tokenizer, config=None) as build:
            for shard in build.shards():
                rows = tokenize(tokenizer, self.corpus.examples[2 * shard : 2 * shard + 2], max_length=16).examples
                missing = build.missing(shard)
                if EXAMPLES in missing:
                    write_examples(out, rows, shard=shard, vocab_size=len(tokenizer), token_types=True, text=True)
                for field in [field for field in missing if field != EXAMPLES]:
                    self._write(out, field, build.manifest.fields[field], shard, rows)
            build.finish()

    def _write(self, out: Path, field: str, spec: FieldSpec, shard: int, rows: list) -> None:
        import torch

        tokens = np.array([len(row.input_ids) for row in rows])
        writer = FieldShard(out, field, spec, shard=shard, tokens=tokens)
        try:
            for row, length in enumerate(tokens.tolist()):
                shape = (1, 2) if spec.kind == "row" else (1, length, 4)
                writer.write(np.array([row]), torch.arange(int(np.prod(shape))).reshape(shape) / 7 + shard, ids=["x"])
            writer.commit(join_hash(rows))
        finally:
            writer.discard()


@pytest.fixture(scope="module")
def small() -> Small:
    rows = [Example(f"r{i}", text) for i, (text, _) in enumerate(TEXTS[:3])]
    return Small(Corpus(source="x", split=None, examples=rows, label_names=None), tiny_tokenizer())


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what is synced there takes no time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as place:
        yield Path(place)


@pytest.mark.parametrize("code", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)], ids=["ENOSPC", "EIO"])
def test_every_call_that_fails_is_told_and_the_next_run_ends_in_the_same_bytes(
    small: Small, quick: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with monkeypatch.context() as patched:
        calls = Fail(patched, -1, code).calls
        small.run(quick / "whole")
    wanted = contents(quick / "whole")
    assert len(calls) > 80 and {"write", "pwrite", "fsync", "replace"} <= set(calls)
    for fatal, name in enumerate(calls):
        out = quick / f"cache-{fatal}"
        told = None
        with monkeypatch.context() as patched:
            Fail(patched, fatal, code)
            try:
                small.run(out)
            except OSError as error:
                told = error.errno
        # a folder that is there already was only to be made sure of
        assert told == code or (name == "mkdir" and told is None and contents(out) == wanted), (fatal, name)
        assert receipts_without_their_shard(out) == [], (fatal, name)
        small.run(out)
        assert contents(out) == wanted, (fatal, name)
        shutil.rmtree(out)


# ---------------------------------------------------------------------------------- claims of very large caches


def test_many_shards_are_claimed_by_their_names_and_checked_at_the_end(
    made: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, teacher = tmp_path / "cache", str(made / "teacher")
    options = DumpOptions(capture=["logits", "hidden:1,2", "qkv:1"], shard_rows=4)

    def again() -> DumpReport:
        corpus = read_corpus(made / "rows.jsonl")
        return dump(corpus, teacher=teacher, out=out, options=options, device="cpu")

    again()
    fields = list(read_manifest(out).fields)
    monkeypatch.setattr(build, "RECEIPTS_READ", 0)
    for name in ("logits/00001.json", "hidden.02/00000.arrow", "examples/00001.json", "examples/00001.arrow"):
        (out / name).unlink()
    begun = CacheBuild(out, read_manifest(out))
    with monkeypatch.context() as patch:
        patch.delattr(build, "whole_receipts")  # none is read
        assert begun.all_missing([0, 1]) == {0: ["hidden.02"], 1: ["examples", "logits"]}
        assert begun.all_missing([0]) == {0: ["hidden.02"]}
        assert replace(begun, elsewhere=True).all_missing([0, 1]) == {1: ["examples", "logits"]}
        shutil.rmtree(out / fields[0])
        assert CacheBuild(out, read_manifest(out)).all_missing([1])[1].count(fields[0]) == 1
    again()
    assert shards_of(out) == shards_of(whole)

    (out / "logits" / "00000.arrow").write_bytes(b"cut")  # the names don't show it
    (out / "logits" / "00001.json").write_text("spoiled")
    with pytest.raises(CacheError, match=r"2 shards .*logits/00000\): give the same command again, to"):
        again()
    assert again().new_rows == 8 and shards_of(out) == shards_of(whole)


def test_receipts_by_the_million_are_read_as_strictly_as_one(tmp_path: Path) -> None:
    good = Receipt(rows=1, tokens=2, bytes=3, xxh3_128="a" * 32, join="b" * 32)
    (tmp_path / "logits").mkdir()
    for shard in range(12):
        receipt_file(tmp_path, "logits", shard).write_bytes(to_json(good))
        shard_file(tmp_path, "logits", shard).write_bytes(b"abc")
    spoiled = (b"", b"{}", to_json(good)[:-9], to_json(good).replace(b'"rows": 1', b'"rows": 0'), b" " * 70_000)
    for shard, data in enumerate(spoiled, start=1):
        receipt_file(tmp_path, "logits", shard).write_bytes(data)
    for shard in (6, 7, 8):
        receipt_file(tmp_path, "logits", shard).unlink()
    receipt_file(tmp_path, "logits", 7).symlink_to(receipt_file(tmp_path, "logits", 0))
    os.mkfifo(receipt_file(tmp_path, "logits", 8))
    shard_file(tmp_path, "logits", 9).write_bytes(b"ab")
    shard_file(tmp_path, "logits", 10).unlink()
    assert [read_receipt(tmp_path, "logits", shard) for shard in range(12)] == [good, *[None] * 8, good, good, good]
    assert list(whole_receipts(tmp_path, "logits", range(12))) == [good, *[None] * 10, good]
    alone = list(whole_receipts(tmp_path, "logits", [0, 8, 9, 10], receipts_alone=True))
    assert alone == [good, None, good, good]
    (tmp_path / "linked").symlink_to(tmp_path / "logits")
    for field in ("linked", "none"):
        assert list(whole_receipts(tmp_path, field, [0, 1])) == [None, None]


def shards_of(folder: Path) -> dict[str, str]:
    return {name: value for name, value in contents(folder).items() if name.endswith(".arrow")}


# ------------------------------------------------------------------------------------------------------------ locks


def test_two_processes_exclude_each_other_and_a_killed_one_does_not_block(
    made: Path, launcher: Launcher, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    out.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, os, time\nh = os.open({str(out)!r}, os.O_RDONLY)\nfcntl.flock(h, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\ntime.sleep(600)",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        done = launcher.run(*arguments(made, out), cwd=made)
        assert done.code == 2 and "written by another process" in done.err
        done = launcher.run("verify", out, cwd=made)
        assert done.code == 2 and "written by another process" in done.err
    finally:
        holder.kill()
        holder.wait()
    assert launcher.run(*arguments(made, out), cwd=made).code == 0
    assert contents(out) == contents(whole)


# ------------------------------------------------------------------------------------- fields of an earlier command


def test_a_later_command_ends_what_an_earlier_one_began(made: Path, tmp_path: Path) -> None:
    """`--capture logits` was killed; `--capture hidden:1` then gives both, and needs the logits' capture for it."""
    rows = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(TEXTS[:12])]
    corpus = Corpus(source="x", split=None, examples=rows, label_names=["food", "sport", "weather"])

    def run(*capture: str) -> None:
        options = DumpOptions.model_validate({"capture": list(capture), "shard_rows": 4})
        dump(corpus, teacher=str(made / "teacher"), out=tmp_path / "cache", options=options)

    run("logits", "hidden:1")
    before = contents(tmp_path / "cache")
    shard_file(tmp_path / "cache", "logits", 1).unlink()
    shard_file(tmp_path / "cache", "hidden.01", 2).unlink()
    run("hidden:1")
    assert contents(tmp_path / "cache") == before


# ----------------------------------------------------------------------------------------------------------- memory

GROWTH = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from softlabels.cache.format import FieldSpec
from softlabels.cache.writer import FieldShard
tokens = np.full(800, 128)
spec = FieldSpec(kind="token", type="float16", width=1536)
values = torch.ones(1, 128, 1536)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = FieldShard(Path(sys.argv[1]), "hidden.01", spec, shard=0, tokens=tokens[:4])
for row in range(4): small.write(np.array([row]), values, ids=["x"])
small.commit("0" * 32)
before = peak()
shard = FieldShard(Path(sys.argv[1]), "hidden.01", spec, shard=1, tokens=tokens)
for row in range(800): shard.write(np.array([row]), values, ids=["x"])
receipt = shard.commit("0" * 32)
print(receipt.bytes, peak() - before)
"""


def test_memory_holds_a_batch_and_not_a_shard(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)], env=environment(), capture_output=True, text=True, check=True
    )
    size, growth = map(int, done.stdout.split())
    assert size > 300_000_000 and growth < 50_000_000, (size, growth)
