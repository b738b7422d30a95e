"""Several processes, one a device: the same bytes as one, whoever dies; here they are processes on the CPU."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softlabels.cache.files import lock
from softlabels.cli import _guarded
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import DumpReport, dump
from softlabels.engines.devices import parse_devices
from softlabels.errors import CacheError, ConfigError, TeacherError
from softlabels.teacher import load_teacher
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher
from tests.processes import command, environment

ROWS = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(TEXTS * 5)]
PATIENCE = 120.0


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that one process makes, with one thread as each of the others has."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    run(teacher, out, devices=None)
    return out


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As each of two processes on two cores has: other numbers of threads may round in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(teacher: Path, out: Path, devices: list[str] | None = None, **changes: Any) -> DumpReport:
    options = {"capture": ["logits", "hidden:1,2", "qkv:2"], "shard_rows": 4, "codec": "float32"} | changes
    corpus = Corpus(source="made", split=None, examples=ROWS, label_names=LABEL_NAMES)
    given = DumpOptions.model_validate(options)
    return dump(
        corpus, teacher=str(teacher), out=out, options=given, devices=devices, device=None if devices else "cpu"
    )


def await_(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def test_two_processes_give_the_bytes_of_one(
    teacher: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    report = run(teacher, tmp_path / "cache", ["cpu", "cpu"])
    assert (report.rows, report.new_rows, report.lost, report.batch_tokens) == (len(ROWS), len(ROWS), [], 8192)
    assert contents(tmp_path / "cache") == contents(whole)
    assert multiprocessing.active_children() == []
    told = [line for line in capfd.readouterr().err.splitlines() if line]
    assert all(line.startswith("dump: ") for line in told) and f"{len(ROWS)}/{len(ROWS)} rows" in told[-1], told
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert run(teacher, tmp_path / "cache", ["cpu", "cpu"]).new_rows == 0  # at once, without a process
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


@pytest.mark.slow
def test_a_worker_that_dies_has_its_shard_done_by_another(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"

    def kill() -> None:
        await_(lambda: any(out.glob("logits/*.json")), "no shard was begun")
        pids.append(multiprocessing.active_children()[0].pid)
        os.kill(pids[0], signal.SIGKILL)

    pids: list[Any] = []
    killer = threading.Thread(target=kill)
    killer.start()
    report = run(teacher, out, ["cpu", "cpu"])
    killer.join()
    assert len(report.lost) == 1 and "the process on cpu was killed by signal 9" in report.lost[0]
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_a_slow_worker_holds_up_only_what_it_has_begun(teacher: Path, whole: Path, tmp_path: Path) -> None:
    """A shard that it writes and one that it computes, not one that it got in advance; here one stands still."""
    out, shards, waited = tmp_path / "cache", len(ROWS) // 4, []

    def stop() -> None:
        await_(lambda: any(out.glob("logits/*.json")), "no shard was begun")
        slow = multiprocessing.active_children()[0].pid or 0
        os.kill(slow, signal.SIGSTOP)
        try:
            await_(lambda: len(list(out.glob("value.02/*.json"))) >= shards - 2, "the rest waited for the slow one")
            waited.append(slow)
        finally:
            os.kill(slow, signal.SIGCONT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    report = run(teacher, out, ["cpu", "cpu"])
    stopper.join()
    assert len(waited) == 1 and report.lost == [] and report.new_rows == len(ROWS)
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_when_the_last_one_dies_it_is_told_and_the_same_call_goes_on(
    teacher: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"

    def kill() -> None:
        await_(lambda: any(out.glob("logits/*.json")), "no shard was begun")
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TeacherError, match=r"on cpu was killed by signal 9.*no other process is left"):
        run(teacher, out, ["cpu", "cpu"])
    killer.join()
    assert list(out.rglob(".tmp-*")) == [] and multiprocessing.active_children() == []
    run(teacher, out)
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_an_error_of_a_worker_ends_all_and_is_told_as_it_is(teacher: Path, tmp_path: Path) -> None:
    live = load_teacher(str(teacher))
    with torch.no_grad():
        dict(live.model.named_parameters())["bert.encoder.layer.1.output.LayerNorm.weight"].mul_(1e6)
    live.model.save_pretrained(tmp_path / "loud")
    live.tokenizer.save_pretrained(tmp_path / "loud")
    with pytest.raises(CacheError, match=r"beyond ±65504, which float16 cannot hold"):
        run(tmp_path / "loud", tmp_path / "cache", ["cpu", "cpu"], codec="float16")
    assert list((tmp_path / "cache").rglob(".tmp-*")) == [] and multiprocessing.active_children() == []


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them_and_a_ctrl_c_ends_all(
    teacher: Path, whole: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"id": row.id, "text": row.text, "label": row.label} for row in ROWS]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "cache"
    arguments = ["dump", rows, "--teacher", teacher, "--out", out, "--shard-rows", "4", "--codec", "float32"]
    captures = [word for one in ("logits", "hidden:1,2", "qkv:2") for word in ("--capture", one)]
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        done = len(list(out.glob("value.02/*.json")))
        process = subprocess.Popen(
            command(*arguments, *captures, "--devices", "cpu,cpu"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        await_(lambda done=done: len(list(out.glob("value.02/*.json"))) > done, "no shard came")
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal sends it: to the workers too
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code and "Traceback" not in err, err
        await_(lambda process=process: not _group_lives(process.pid), "a worker outlived its parent")
        with lock(out):
            assert number == signal.SIGKILL or list(out.rglob(".tmp-*")) == []
    assert len(list(out.glob("value.02/*.json"))) < len(ROWS) // 4, "the dump was too fast to be stopped"
    run(teacher, out)
    assert {name: mark for name, mark in contents(out).items() if "/0" in name} == {
        name: mark for name, mark in contents(whole).items() if "/0" in name
    }


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no device"),
        ("cpu,gpu", "'gpu' is no device; write 2, or cuda:0,cuda:1, or cpu,cpu"),
        ("0", "this machine has"),
        ("999", "this machine has"),
        ("cuda:999", "there is no cuda:999; this machine has"),
        ("cpu,meta", "'meta' is no device"),
    ],
)
def test_devices_that_are_not_there_are_told(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_devices(text)


def test_devices_are_told_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["dump", "no.csv", "--teacher", "none", "--out", str(tmp_path / "cache"), "--devices"]
    for devices, told in ((["999"], "this machine has"), (["cpu,cpu", "--cpu"], "not both")):
        assert _guarded([*given, *devices], debug=False) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_parsed_devices() -> None:
    assert parse_devices("cpu,cpu") == ["cpu", "cpu"] and parse_devices(" cpu ") == ["cpu"]
