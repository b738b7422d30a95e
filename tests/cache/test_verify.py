"""`verify` names every fault, and `--repair` with the same dump command ends in the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from softlabels.cache.files import lock
from softlabels.cache.format import MANIFEST, RECEIPT, read_manifest
from softlabels.cache.verify import Verdict, verify_cache
from softlabels.cli import _guarded
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError
from softlabels.progress import quiet
from softlabels.types import Example
from tests.cache.made import rows_of, write_cache
from tests.cache.test_durability import contents
from tests.models import LABEL_NAMES, TEXTS, save_teacher, tiny_tokenizer

FIELDS = ["hidden.01", "logits"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, and `cache` that was dumped from it: 4 shards of 2 fields."""
    folder = tmp_path_factory.mktemp("verify")
    save_teacher(folder / "teacher")
    dump_again(folder, folder / "cache")
    dump_again(folder, folder / "other", texts=TEXTS[20:36])
    return folder


def dump_again(source: Path, out: Path, *, texts: list[tuple[str, str]] = TEXTS[:16]) -> int:
    """The dump command that made the cache; how many rows it ran the teacher over."""
    rows = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(texts)]
    corpus = Corpus(source="made", split=None, examples=rows, label_names=LABEL_NAMES)
    options = DumpOptions.model_validate({"capture": ["logits", "hidden:1"], "shard_rows": 4, "codec": "float16"})
    with quiet():
        return dump(corpus, teacher=str(source / "teacher"), out=out, options=options).new_rows


@pytest.fixture
def cache(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source / "cache", tmp_path / "cache"))


def check(cache: Path, **options) -> Verdict:
    with quiet():
        return verify_cache(cache, **options)


def found(verdict: Verdict) -> set[tuple[str | None, int | None, str]]:
    return {(fault.field, fault.shard, fault.kind) for fault in verdict.faults}


def test_a_whole_cache_has_no_fault_and_is_left_alone(cache: Path, source: Path) -> None:
    before = contents(cache)
    verdict = check(cache)
    assert verdict.whole and verdict.notes == [] and verdict.fields == FIELDS
    assert verdict.shards == 12 and verdict.bytes == sum(p.stat().st_size for p in cache.rglob("*.arrow"))
    assert check(cache, repair=True).removed == [] and contents(cache) == before


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    at = len(data) // 2 if at is None else at
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def swap(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def link(path: Path) -> None:
    target = path.with_name("00009.moved")
    path.rename(target)
    path.symlink_to(target)


FAULTS: dict[str, tuple[Callable[[Path, Path], object], set[tuple[str | None, int | None, str]]]] = {
    "flipped": (lambda cache, other: flip(cache / "logits/00001.arrow"), {("logits", 1, "changed")}),
    "cut": (lambda cache, other: cut(cache / "hidden.01/00002.arrow"), {("hidden.01", 2, "cut")}),
    "missing": (lambda cache, other: (cache / "hidden.01/00000.arrow").unlink(), {("hidden.01", 0, "missing")}),
    "lost examples": (lambda cache, other: (cache / "examples/00001.arrow").unlink(), {("examples", 1, "missing")}),
    "flipped examples": (lambda cache, other: flip(cache / "examples/00003.arrow"), {("examples", 3, "changed")}),
    "swapped": (
        lambda cache, other: swap(cache / "logits/00000.arrow", cache / "logits/00001.arrow"),
        {("logits", 0, "swapped"), ("logits", 1, "swapped")},
    ),
    "duplicated": (
        lambda cache, other: shutil.copy(cache / "logits/00000.arrow", cache / "logits/00003.arrow"),
        {("logits", 3, "swapped")},
    ),
    "of another field": (
        lambda cache, other: shutil.copy(cache / "logits/00000.arrow", cache / "hidden.01/00000.arrow"),
        {("hidden.01", 0, "swapped")},
    ),
    "foreign": (
        lambda cache, other: shutil.copy(other / "hidden.01/00001.arrow", cache / "hidden.01/00002.arrow"),
        {("hidden.01", 2, "foreign")},
    ),
    "foreign of one size": (
        lambda cache, other: shutil.copy(other / "logits/00001.arrow", cache / "logits/00002.arrow"),
        {("logits", 2, "foreign")},
    ),
    "foreign with its receipt": (
        lambda cache, other: [
            shutil.copy(other / f"logits/00001.{end}", cache / f"logits/00001.{end}") for end in ("arrow", "json")
        ],
        {("logits", 1, "foreign"), ("logits", 1, "receipt")},
    ),
    "beyond the last": (
        lambda cache, other: shutil.copy(other / "logits/00001.arrow", cache / "logits/00004.arrow"),
        {("logits", None, "foreign")},
    ),
    "a receipt of another": (
        lambda cache, other: swap(cache / "logits/00000.json", cache / "logits/00001.json"),
        {("logits", 0, "receipt"), ("logits", 1, "receipt")},
    ),
    "a damaged receipt": (lambda cache, other: cut(cache / "examples/00000.json"), {("examples", 0, "receipt")}),
    "a link": (
        lambda cache, other: link(cache / "logits/00002.arrow"),
        {("logits", 2, "foreign")},
    ),
    "a damaged tokenizer": (lambda cache, other: cut(cache / "tokenizer/tokenizer.json"), {(None, None, "manifest")}),
    "another teacher": (lambda cache, other: flip(cache / "teacher/config.json", 3), {(None, None, "manifest")}),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_and_repaired_to_the_same_bytes(cache: Path, source: Path, case: str) -> None:
    before = contents(cache)
    damage, wanted = FAULTS[case]
    damage(cache, source / "other")
    verdict = check(cache)
    assert found(verdict) == wanted and not verdict.whole, verdict.faults
    repaired = check(cache, repair=True)
    assert found(repaired) == wanted and not read_manifest(cache).complete
    assert {name for fault in repaired.faults for name in fault.remove} >= set(repaired.removed) != set()
    kept = contents(cache)
    assert all(kept[name] == before[name] for name in kept if name in before and name != MANIFEST)
    rows = dump_again(source, cache)
    assert rows <= 4 * len({fault.shard for fault in verdict.faults})
    (cache / "logits" / "00009.moved").unlink(missing_ok=True)
    assert contents(cache) == before and check(cache).whole


def test_every_flipped_bit_anywhere_is_found(cache: Path) -> None:
    """A bit in each file of the cache; the receipts and receipt.json are files too."""
    rng, files = random.Random(3), sorted(path for path in cache.rglob("*") if path.is_file())
    for path in files:
        data = path.read_bytes()
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        verdict = check(cache)
        assert not verdict.whole, (path, at)
        if path.suffix == ".arrow":
            assert [(fault.field, fault.shard) for fault in verdict.faults] == [(path.parent.name, int(path.stem))]
        path.write_bytes(data)
    assert check(cache).whole


def test_a_manifest_that_cannot_be_read_is_told_and_not_repaired(cache: Path) -> None:
    before = contents(cache)
    (cache / MANIFEST).write_bytes(b"{")
    assert found(check(cache, repair=True)) == {(None, None, "manifest")}
    assert {**contents(cache), MANIFEST: before[MANIFEST]} == before


def test_a_wrong_entry_in_the_manifest_is_told(cache: Path, source: Path) -> None:
    before = contents(cache)
    facts = json.loads((cache / MANIFEST).read_text())
    for key, kind in (("xxh3_128", "foreign"), ("join", "join")):
        spoilt = json.loads(json.dumps(facts))
        if key == "join":
            spoilt["join"] = "0" * 32 + spoilt["join"][32:]
        else:
            spoilt["shards"]["logits"][key] = "0" * 32 + spoilt["shards"]["logits"][key][32:]
        (cache / MANIFEST).write_text(json.dumps(spoilt))
        assert kind in {fault.kind for fault in check(cache).faults}
    check(cache, repair=True)
    dump_again(source, cache)
    assert contents(cache) == before


def test_a_copy_of_some_fields_without_receipts_is_whole_for_what_it_has(cache: Path) -> None:
    shutil.rmtree(cache / "hidden.01")
    for receipt in [*cache.glob("*/0*.json"), cache / RECEIPT]:
        receipt.unlink()
    assert found(check(cache)) == {("hidden.01", None, "missing")}
    verdict = check(cache, fields=["logits"])
    assert verdict.whole and len(verdict.notes) == 3, verdict
    assert any("no receipt" in note for note in verdict.notes)
    with pytest.raises(CacheError, match=r"has no field hidden\.09"):
        check(cache, fields=["hidden.09"])


def test_leftovers_and_strangers_are_told(cache: Path) -> None:
    (cache / "logits" / ".tmp-00001.arrow").write_bytes(b"half")
    (cache / "notes.txt").write_text("mine")
    verdict = check(cache)
    assert verdict.whole and len(verdict.notes) == 2
    assert "temporary" in verdict.notes[0] and "notes.txt" in verdict.notes[1]


def test_a_cache_that_is_being_written_is_not_half_verified(cache: Path) -> None:
    with lock(cache), pytest.raises(CacheError, match="written by another process"):
        check(cache)
    with lock(cache, shared=True):  # two may look at a time, but nothing may be repaired under a reader's feet
        assert check(cache).whole
        with pytest.raises(CacheError, match="verify"):
            check(cache, repair=True)


def test_an_unfinished_cache_is_checked_as_far_as_it_goes(cache: Path, source: Path) -> None:
    before = contents(cache)
    (cache / "logits" / "00003.arrow").unlink()
    check(cache, repair=True)
    assert found(check(cache)) == {(None, None, "unfinished")}
    flip(cache / "hidden.01" / "00001.arrow")
    assert found(check(cache, repair=True)) == {(None, None, "unfinished"), ("hidden.01", 1, "changed")}
    assert dump_again(source, cache) == 8 and contents(cache) == before


# ------------------------------------------------------- files that are as their own manifest says, and yet wrong

LENGTHS = [3, 6, 2, 5]


def made(folder: Path, *, ids: list[str] | None = None, hashes: bool = True) -> Path:
    """A cache by hand, with a tokenizer; its writer may give rows the same id, or wrong token hashes."""
    from dataclasses import replace

    rows = rows_of(LENGTHS)
    rows = [replace(row, id=name) for row, name in zip(rows, ids or [row.id for row in rows], strict=True)]
    values = {"logits": [np.ones(2, np.float32) for _ in LENGTHS]}
    write_cache(folder, rows, {"logits": {"kind": "row", "type": "float32", "width": 2}}, values, shard_rows=2)
    return folder


def faults_of(folder: Path) -> set[tuple[str | None, int | None, str]]:
    """Without those of the tokenizer, which caches by hand lack."""
    return {fault for fault in found(check(folder)) if fault[2] != "manifest"}


def test_an_id_that_is_there_twice_is_told(tmp_path: Path) -> None:
    assert faults_of(made(tmp_path / "right")) == set()
    assert faults_of(made(tmp_path / "twice", ids=["a", "b", "a", "c"])) == {("examples", None, "join")}


def test_token_hashes_that_are_not_those_of_the_tokens_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softlabels.cache import writer

    monkeypatch.setitem(writer._VALUES, "token_hash", lambda example: 7)
    monkeypatch.setattr(writer, "token_hash", lambda example: 7)
    assert faults_of(made(tmp_path / "cache")) == {("examples", 0, "join"), ("examples", 1, "join")}


def test_another_tokenizer_is_told(cache: Path) -> None:
    shutil.rmtree(cache / "tokenizer")
    tiny_tokenizer(["entirely different words"]).save_pretrained(cache / "tokenizer")
    (cache / RECEIPT).unlink()
    assert found(check(cache)) == {(None, None, "manifest")}


# ------------------------------------------------------------------------------------------------ at the command line


def test_the_command_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["verify", str(cache)], debug=False) == 0
    assert "whole" in capsys.readouterr().out
    flip(cache / "logits" / "00001.arrow")
    assert _guarded(["verify", str(cache), "--json"], debug=False) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["whole"] is False and told["faults"][0]["field"] == "logits" and told["faults"][0]["shard"] == 1
    assert _guarded(["verify", str(cache)], debug=False) == 2
    out = capsys.readouterr().out
    assert "logits/00001.arrow" in out and "--repair" in out
    assert _guarded(["verify", str(cache), "--repair"], debug=False) == 2
    assert "dump command" in capsys.readouterr().out
    assert _guarded(["verify", str(cache / "nowhere")], debug=False) == 2
    assert "no cache at" in capsys.readouterr().err
    assert not os.path.exists(cache / "nowhere")


def test_quickly_names_and_sizes(cache: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["verify", str(cache), "--quick"], debug=False) == 0
    assert "all there" in capsys.readouterr().out
    flip(cache / "logits" / "00001.arrow")  # as long as before: that is for a verify without --quick
    verdict = check(cache, quick=True)
    assert verdict.whole and verdict.quick and verdict.shards == verdict.bytes == 0
    cut(cache / "hidden.01" / "00002.arrow")
    (cache / "examples" / "00000.arrow").unlink()
    link(cache / "logits" / "00002.arrow")
    wanted = {("hidden.01", 2, "cut"), ("examples", 0, "missing"), ("logits", 2, "missing")}
    assert found(check(cache, quick=True)) == wanted
    assert found(check(cache, quick=True, fields=["logits"])) == {("examples", 0, "missing"), ("logits", 2, "missing")}
    shutil.rmtree(cache / "hidden.01")
    assert _guarded(["verify", str(cache), "--quick", "--json"], debug=False) == 2
    told = json.loads(capsys.readouterr().out)
    assert {(fault["field"], fault["kind"]) for fault in told["faults"]} >= {("hidden.01", "missing")}
    assert _guarded(["verify", str(cache), "--quick", "--live", "nobody"], debug=False) == 2
    assert "give --quick to a verify without it" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--quick reads none"):
        check(cache, quick=True, signers=["SHA256:x"])
