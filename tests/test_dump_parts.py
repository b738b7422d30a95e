"""`dump --part`: the bytes of one dump, from parts in one folder or in several, whoever comes first, whoever dies."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM

from softlabels.cache import build
from softlabels.cache import parts as module
from softlabels.cache.files import lock
from softlabels.cache.format import read_manifest
from softlabels.cache.parts import Part, claim_shards, parse_part, refuse_parts
from softlabels.cache.verify import verify_cache
from softlabels.cli import _guarded
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import DumpReport, dump
from softlabels.errors import CacheError, ConfigError
from softlabels.types import Example
from tests.engines.test_devices import contents
from tests.models import LABEL_NAMES, TEXTS, save_model, save_teacher, tiny_tokenizer
from tests.processes import environment

pytestmark = pytest.mark.usefixtures("quick")
ROWS = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(TEXTS[:40])]
PATIENCE = 300.0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def whole(teacher: Path, tmp_path: Path) -> Path:
    run(teacher, tmp_path / "whole")
    return tmp_path / "whole"


def run(teacher: Path, out: Path, part: str | None = None, **changes: Any) -> DumpReport:
    options = {"capture": ["logits", "hidden:1", "hidden:2@cls"], "shard_rows": 4, "max_length": 12} | changes
    corpus = Corpus("made", None, ROWS, LABEL_NAMES)
    given = DumpOptions.model_validate(options)
    asked = None if part is None else parse_part(part)
    return dump(corpus, teacher=str(teacher), out=out, options=given, device="cpu", part=asked)


# ------------------------------------------------------------------------------------------------------------ shares


@given(of=st.integers(1, 200), count=st.integers(0, 1000))
def test_each_shard_is_in_one_part(of: int, count: int) -> None:
    shares = [Part(number, of).shards(count) for number in range(1, of + 1)]
    assert [shard for share in shares for shard in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["0/8", "9/8", "x", "", "3", "3/", "/8", "1/0", "-1/8", "3/8/2", "1.5/8", "٣/٨"])
def test_parts_that_are_none(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"--part .*(write 3/8|there are parts 1/)"):
        parse_part(text)
    command = ["dump", "no.csv", "--teacher", "none", "--out", str(tmp_path / "cache"), f"--part={text}"]
    assert _guarded(command, debug=False) == 2 and "--part" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_parsed_parts() -> None:
    assert parse_part(" 3/8 ") == Part(3, 8) and str(Part(3, 8)) == "3/8" and parse_part("1/1") == Part(1, 1)


# ------------------------------------------------------------------------------------------------------- one folder


def test_parts_in_one_folder_make_the_cache_of_one_dump(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    reports = [run(teacher, out, part) for part in ("3/3", "1/3", "1/3", "2/3")]
    assert [(r.part, r.complete, r.rows, r.new_rows) for r in reports] == [
        ("3/3", False, 16, 16),
        ("1/3", False, 12, 12),
        ("1/3", False, 12, 0),
        ("2/3", True, 12, 12),
    ]
    assert contents(out) == contents(whole)
    one = run(teacher, tmp_path / "again")
    parts = [reports[0], reports[1], reports[3]]
    assert sum(report.bytes for report in parts) == one.bytes
    assert sum(report.truncated for report in parts) == one.truncated > 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(teacher, out, "1/5").complete  # nothing is left to do, whatever the number
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_a_dump_of_the_rest_completes_what_parts_began(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    run(teacher, out, "2/4")
    (out / "logits" / ".tmp-00009.arrow").write_bytes(b"left by a part that was killed")
    (out / ".tmp-manifest.json").write_bytes(b"also")
    run(teacher, out, "1/4")
    assert (out / "logits" / ".tmp-00009.arrow").exists()  # of another part, which may be at work
    assert run(teacher, out).complete and contents(out) == contents(whole)


def test_a_part_that_finds_anothers_files_damaged_says_who_makes_them_anew(
    teacher: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "RECEIPTS_READ", 0)  # as with very many files, of which only the names are looked at
    out = tmp_path / "cache"
    run(teacher, out, "1/2")
    (out / "logits" / "00000.json").write_text("spoiled")
    with pytest.raises(CacheError, match=r"1 shard missing .*logits/00000\): give the command of every part again"):
        run(teacher, out, "2/2")
    assert not run(teacher, out, "2/2").complete and run(teacher, out, "1/2").new_rows == 4
    assert contents(out) == contents(whole)


def test_more_parts_than_files(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    reports = [run(teacher, out, f"{number}/12") for number in range(1, 13)]
    assert sorted(report.rows for report in reports) == [0, 0, *[4] * 10]
    assert [report.complete for report in reports] == [False] * 11 + [True] and contents(out) == contents(whole)


def test_a_field_can_be_added_in_parts(teacher: Path, tmp_path: Path) -> None:
    run(teacher, tmp_path / "one", capture=["logits"])
    run(teacher, tmp_path / "one", capture=["qkv:2"])
    out = tmp_path / "cache"
    run(teacher, out, capture=["logits"])
    assert not run(teacher, out, "2/2", capture=["qkv:2"]).complete
    assert sorted(read_manifest(out).fields) == ["logits"] and verify_cache(out, fields=["logits"]).whole
    assert run(teacher, out, "1/2", capture=["qkv:2"]).complete
    assert contents(out) == contents(tmp_path / "one")


def test_other_settings_are_refused(teacher: Path, tmp_path: Path) -> None:
    run(teacher, tmp_path / "cache", "1/2")
    with pytest.raises(CacheError, match=r"another configuration: dump.max_length was 12 and is now 9"):
        run(teacher, tmp_path / "cache", "2/2", max_length=9)
    assert not read_manifest(tmp_path / "cache").complete


def test_who_writes_keeps_others_out(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    run(teacher, out, "1/2")
    with claim_shards(out, Part(2, 2).shards(10)):
        for part in ("2/2", "7/10"):
            with pytest.raises(
                CacheError, match=r"another process is dumping shards of .* it is given twice, or not all"
            ):
                run(teacher, out, part)
        with pytest.raises(CacheError, match="is being written by another process"):
            run(teacher, out)
        assert not run(teacher, out, "1/2").complete
        with pytest.raises(CacheError, match=r"by a `dump --part`, maybe on another machine"):
            refuse_parts(out)  # as another machine sees it, where the folder's own lock says nothing
    with lock(out), pytest.raises(CacheError, match="is being written by another process"):
        run(teacher, out, "2/2")
    assert run(teacher, out, "2/2").complete and contents(out) == contents(whole)


def test_a_file_system_without_locks_is_told(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refused(handle: int, what: int, *arguments: Any) -> Any:
        if what in (fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW):
            raise OSError(errno.ENOLCK, "No locks available")
        return real(handle, what, *arguments)

    monkeypatch.setattr(module.fcntl, "fcntl", refused)
    with pytest.raises(CacheError, match=r"has no locks.*an --out of its own.*combine --rows"):
        run(teacher, tmp_path / "cache", "1/2")


# ---------------------------------------------------------------------------------------------------- several folders


def test_folders_of_parts_become_the_cache_of_one_dump(teacher: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    names = [str(tmp_path / f"part-{number}") for number in (1, 2, 3)]
    for number, name in enumerate(names, start=1):
        assert not run(teacher, Path(name), f"{number}/3").complete
    command = ["combine", *reversed(names), "--rows", "--out", str(tmp_path / "out")]
    assert _guarded([*command, "--json"], debug=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["new_rows"], [share["rows"] for share in told["caches"]]) == (40, 40, [16, 12, 12])
    assert contents(tmp_path / "out") == contents(whole)
    assert _guarded([*command, "--json"], debug=True) == 0 and json.loads(capsys.readouterr().out)["new_rows"] == 0
    for left, told in ((names[:2], "4 of 10 shards .*: 6 to 9, of 4 rows"), (names[::2], "3 of 10 .*: 3 to 5,")):
        assert _guarded(["combine", *left, "--rows", "--out", str(tmp_path / "none")], debug=False) == 2
        assert told.split(" .*")[0] in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_the_parts_share_is_the_same(tmp_path: Path) -> None:
    """int8's scales are a file's own; factors and the output head are the teacher's and the whole corpus's."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **shape))
    teacher = save_model(tmp_path / "teacher", model, tokenizer)
    for options in (
        {"capture": ["vocab:exact"]},
        {"capture": ["vocab:topk=8,factors=4", "hidden:1"], "codec": "int8"},
    ):
        run(teacher, tmp_path / "whole", **options)
        for number in (1, 2, 3):
            run(teacher, tmp_path / f"part-{number}", f"{number}/3", **options)
            run(teacher, tmp_path / "shared", f"{number}/3", **options)
    places = [str(tmp_path / f"part-{number}") for number in (1, 2, 3)]
    assert _guarded(["combine", *places, "--rows", "--out", str(tmp_path / "out")], debug=True) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "shared") == contents(tmp_path / "whole")
    assert "teacher/factors.safetensors" in contents(tmp_path / "out")


def test_folders_that_are_not_parts_of_one_dump(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    run(teacher, tmp_path / "a", "1/2")
    for name, changes, told in (
        ("b", {"max_length": 9}, "dump.max_length is 12 and 9"),
        ("c", {"capture": ["logits"]}, "field hidden.01 is"),
        ("d", {"codec": "float32"}, "field hidden.01 is"),
    ):
        run(teacher, tmp_path / name, "2/2", **changes)
        command = ["combine", str(tmp_path / "a"), str(tmp_path / name), "--rows", "--out", str(tmp_path / "out")]
        assert _guarded(command, debug=False) == 2
        assert f"not parts of one dump: {told}" in capsys.readouterr().err
    run(teacher, tmp_path / "e", "2/2")
    path = tmp_path / "e" / "logits" / "00007.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    command = ["combine", str(tmp_path / "a"), str(tmp_path / "e"), "--rows", "--out", str(tmp_path / "out")]
    assert _guarded(command, debug=False) == 2
    assert "e/logits/00007.arrow is not the file that its receipt speaks of" in capsys.readouterr().err
    assert verify_cache(tmp_path / "e", repair=True).removed == ["logits/00007.arrow", "logits/00007.json"]
    run(teacher, tmp_path / "e", "2/2")
    assert _guarded(command, debug=True) == 0 and verify_cache(tmp_path / "out").whole


# ----------------------------------------------------------------------------------------- processes, at the same time

_SERVER = """
import gc, json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch, transformers.models.bert.modeling_bert, softlabels.dump
from softlabels.cache.format import read_manifest
from softlabels.cli import main
torch.set_num_threads(1)
rows, teacher, place, parts, rounds, kills = sys.argv[1:3] + [Path(sys.argv[3])] + list(map(int, sys.argv[4:]))
command = ["dump", rows, "--teacher", teacher, "--shard-rows", "4", "--cpu", "--capture", "logits"]
gc.collect(); gc.freeze()

def start(out, number):
    child = os.fork()
    if not child:
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1); os.dup2(log, 2)
        main([*command, "--out", str(out), "--part", f"{number}/{parts}"])
    return child

for round in range(rounds):
    out, alive, killed, codes, pick = place / f"{round}", {}, 0, [], random.Random(round)
    begun = time.monotonic()
    for number in range(1, parts + 1):
        alive[start(out, number)] = number
    while alive:
        if killed < kills:
            time.sleep(pick.uniform(0, 0.3))
            os.kill(pick.choice(list(alive)), signal.SIGKILL)
            killed += 1
        child, status = os.wait()
        number, code = alive.pop(child), os.waitstatus_to_exitcode(status)
        codes.append(code)
        if code == -signal.SIGKILL:
            alive[start(out, number)] = number  # as Slurm requeues a job
    print(json.dumps({"codes": codes, "killed": codes.count(-9), "complete": read_manifest(out).complete}), flush=True)
"""


def play(teacher: Path, place: Path, *, parts: int, rounds: int, kills: int) -> list[dict[str, Any]]:
    """Rounds of a new folder, all parts at once, some of them killed and begun again; what each round came to."""
    rows = place / "rows.jsonl"
    lines = [{"id": row.id, "text": row.text, "label": row.label} for row in ROWS]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = map(str, (parts, rounds, kills))
    done = subprocess.run(
        [sys.executable, "-c", _SERVER, str(rows), str(teacher), str(place), *numbers],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    log = (place / "log").read_text() if (place / "log").exists() else ""
    assert done.returncode == 0, done.stderr + log
    assert "Traceback" not in log and "error" not in log, log
    return [json.loads(line) for line in done.stdout.splitlines()]


def one_dump(teacher: Path, place: Path) -> dict[str, str]:
    command = ["dump", str(place / "rows.jsonl"), "--teacher", str(teacher), "--shard-rows", "4", "--cpu"]
    assert _guarded([*command, "--out", str(place / "one")], debug=True) == 0
    return contents(place / "one")


@pytest.mark.slow
def test_processes_that_begin_at_the_same_moment(teacher: Path, tmp_path: Path) -> None:
    results = play(teacher, tmp_path, parts=3, rounds=3, kills=0)
    assert all(result["codes"] == [0] * 3 and result["complete"] for result in results)
    wanted = one_dump(teacher, tmp_path)
    for number in range(len(results)):
        assert contents(tmp_path / str(number)) == wanted


@pytest.mark.slow
def test_processes_that_are_killed(teacher: Path, tmp_path: Path) -> None:
    results = play(teacher, tmp_path, parts=4, rounds=12, kills=5)
    assert all(set(result["codes"]) <= {0, -9} and result["complete"] for result in results)
    assert sum(result["killed"] for result in results) >= 30
    wanted = one_dump(teacher, tmp_path)
    for number in range(len(results)):
        assert contents(tmp_path / str(number)) == wanted


def test_the_lock_file_of_a_complete_cache_is_gone(teacher: Path, tmp_path: Path) -> None:
    """Also where the last two end side by side: who leaves first sees the other, who leaves last sees nobody."""
    run(teacher, tmp_path / "cache")
    for _ in range(3):
        with claim_shards(tmp_path / "cache", range(0, 2)) as one:
            with claim_shards(tmp_path / "cache", range(2, 4)) as two:
                with two.alone():
                    two.leave()
                assert (tmp_path / "cache" / ".tmp-parts").exists()
            with one.alone():
                one.leave()
            assert not (tmp_path / "cache" / ".tmp-parts").exists()
            with claim_shards(tmp_path / "cache", range(0, 2)):  # a new file, for whoever comes now
                pass
    (tmp_path / "cache" / ".tmp-parts").unlink()
    assert verify_cache(tmp_path / "cache").notes == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), claim_shards(tmp_path, range(1)):
        pass
    assert not (tmp_path / "elsewhere").exists()
