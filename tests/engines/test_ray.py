"""Dumps on a Ray cluster: the bytes of a local dump, whoever dies; here on this machine, its nodes simulated."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from softlabels.cache.files import lock
from softlabels.cli import _guarded
from softlabels.config import DumpOptions, RayOptions
from softlabels.corpus import Corpus
from softlabels.dump import DumpReport, dump
from softlabels.engines.ray_cluster import Room, connect
from softlabels.engines.ray_pool import OpenWorker, Report, Watch, run_items
from softlabels.errors import CacheError, ConfigError, TeacherError
from softlabels.teacher import load_teacher
from softlabels.types import Example
from tests.engines.pool_workers import open_doubles, open_elsewhere, open_first, open_never
from tests.engines.test_devices import contents
from tests.models import LABEL_NAMES, TEXTS, save_teacher
from tests.processes import command, environment

ROWS = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(TEXTS)]
PATIENCE = 240.0
WORKERS = 2

needs_ray = pytest.mark.skipif(
    not any((Path(folder) / "ray" / "__init__.py").is_file() for folder in sys.path),
    reason="Ray is not installed: pip install 'softlabels[ray]'",
)


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    """A cluster for all tests of this module: it takes four seconds to start. Dumps of this process use it too."""
    with connect(RayOptions(workers=WORKERS, gpus_per_worker=0)) as room:
        yield room


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As each worker has: other numbers of threads may round in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that a local dump makes."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    run(teacher, out, workers=None)
    return out


def run(
    teacher: Path, out: Path | str, *, workers: int | None = WORKERS, rows: list[Example] = ROWS, **changes: Any
) -> DumpReport:
    options = {"capture": ["logits", "hidden:1,2"], "shard_rows": 4, "codec": "float32"} | changes
    corpus = Corpus(source="made", split=None, examples=rows, label_names=LABEL_NAMES)
    ray = None if workers is None else RayOptions(workers=workers, gpus_per_worker=0, cpus_per_worker=0.5)
    given = DumpOptions.model_validate(options)
    return dump(corpus, teacher=str(teacher), out=out, options=given, ray=ray, device=None if ray else "cpu")


def await_(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------ the pool


def pool(room: Room, items: list[Any], open_worker: OpenWorker = open_doubles) -> tuple[dict[Any, int], Report[Any]]:
    results: dict[Any, int] = {}
    watch: Watch[Any] = Watch(lambda item: f"item {item}", results.__setitem__)
    return results, run_items(iter(items), open_worker, room=room, total=len(items), depth=3, watch=watch)


@needs_ray
def test_each_item_is_done_once_and_what_cannot_be_is_named(room: Room, tmp_path: Path) -> None:
    numbers = list(range(200))
    bad = ["die", "raise", "refuse this", f"once {tmp_path / 'mark'}"]
    results, report = pool(room, [*numbers[:20], *bad, *numbers[20:]])
    assert results == {number: 2 * number for number in numbers} | {bad[3]: -1}
    reasons = {one.item: one.reason for one in report.given_up}
    assert set(reasons) == set(bad[:3])
    assert reasons["refuse this"] == "refused this"  # an error of ours says it all
    assert re.fullmatch(r"its worker on \S+ died", reasons["die"])
    assert re.fullmatch(r"its worker on \S+ raised ValueError: no such thing as raise", reasons["raise"])
    # three times alone each, and at most once beside others
    assert 7 <= len(report.lost) <= 10 and any("in item die" in line for line in report.lost)


@pytest.mark.slow
@needs_ray
def test_what_no_other_try_could_mend_ends_the_pool(room: Room) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        pool(room, [1, 2, "full", *range(3, 50)])
    with pytest.raises(TeacherError, match=r"3 failed one after another, up to item refuse .: refused ."):
        pool(room, [f"refuse {number}" for number in range(9)])
    with pytest.raises(TeacherError, match=r"^the teacher was changed$"):
        pool(room, [1, 2, 3], open_elsewhere)
    with pytest.raises(TeacherError, match=r"workers died one after another before they could work; the last one died"):
        pool(room, [1, 2, 3], open_never)
    assert pool(room, [4])[0] == {4: 8}  # and the cluster is none the worse


@pytest.mark.slow
@needs_ray
def test_where_others_cannot_open_the_one_that_works_goes_on(room: Room, tmp_path: Path) -> None:
    opener = partial(open_first, tmp_path / "mark")
    results, report = pool(room, [1, "sleep 30", 2, 3], opener)
    assert results == {1: 2, "sleep 30": -2, 2: 4, 3: 6} and not report.given_up
    assert 6 <= len(report.lost) <= 8 and all(line.endswith("died before it could work") for line in report.lost)


@needs_ray
def test_what_is_given_up_is_told_at_once(room: Room) -> None:
    """Not with the report, which a pool that ends early has none to give."""
    told: list[str] = []
    watch: Watch[Any] = Watch(str, lambda item, result: None, given_up=lambda one: told.append(one.reason))
    with pytest.raises(TeacherError, match="3 failed one after another"):
        run_items(iter([f"refuse {n}" for n in range(9)]), open_doubles, room=room, total=9, depth=3, watch=watch)
    assert len(told) == 3 and all(reason.startswith("refused ") for reason in told)


@needs_ray
def test_a_local_cluster_listens_on_the_loopback_alone(room: Room) -> None:
    places: set[tuple[str, str]] = set()

    def look(item: int, result: int) -> None:  # while a worker lives
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                listening = [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
                places.update((process.name(), one.laddr.ip) for one in listening)

    run_items([1], open_doubles, room=room, total=1, depth=1, watch=Watch(str, look))
    assert {"raylet", "gcs_server", "ray::_Actor"} <= {name.partition(".")[0] for name, _ in places}
    assert [place for place in places if place[1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")] == []


# ------------------------------------------------------------------------------------------------------------ the dump


@needs_ray
def test_two_workers_give_the_bytes_of_a_local_dump(
    room: Room, teacher: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    report = run(teacher, tmp_path / "cache")
    assert (report.rows, report.new_rows, report.lost, report.batch_tokens) == (len(ROWS), len(ROWS), [], 8192)
    assert contents(tmp_path / "cache") == contents(whole)
    captured = capfd.readouterr()
    assert f"dump: {len(ROWS)}/{len(ROWS)} rows" in captured.err and "workers " in captured.err
    assert captured.out == ""
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert run(teacher, tmp_path / "cache").new_rows == 0  # at once, without a worker
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


@pytest.mark.slow
@needs_ray
def test_so_they_do_behind_a_url(room: Room, teacher: Path, whole: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/cache"
    assert run(teacher, url, workers=1, capture=["logits"]).cache == url
    stored = tmp_path / "store" / "cache"
    (stored / "logits" / "00003.json").unlink()  # as if killed before its receipt
    (stored / "logits" / "00005.arrow").write_bytes(b"half of it")
    assert run(teacher, url).new_rows == len(ROWS)  # two fields more, and what was lost of the first
    assert contents(stored) == contents(whole)


@pytest.mark.slow
@needs_ray
def test_a_shard_that_cannot_be_done_is_named_and_the_others_are_kept(room: Room, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher")
    live = load_teacher(str(folder))
    words: Any = live.model.get_input_embeddings()
    token = live.tokenizer.convert_tokens_to_ids("keeper")
    with torch.no_grad():
        words.weight[token] = float("nan")
    live.model.save_pretrained(folder)
    bad = next(number for number, row in enumerate(ROWS) if "keeper" in row.text)
    first = bad // 4 * 4
    told = rf"1 of 15 shards were given up.*shard {bad // 4} \(rows {first} to {first + 3}: row-{first} to .*row-{bad}"
    with pytest.raises(CacheError, match=re.compile(told, re.DOTALL)):
        run(folder, tmp_path / "cache", capture=["hidden:1"], codec="float16")
    names = sorted(path.name for path in (tmp_path / "cache" / "hidden.01").glob("*.json"))
    assert len(names) == 14 and f"{bad // 4:05d}.json" not in names
    assert list((tmp_path / "cache").rglob(".tmp-*")) == []
    with lock(tmp_path / "cache"):
        pass


def test_faults_of_the_command_line_are_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, teacher: Path
) -> None:
    given = ["dump", "no.csv", "--teacher", "none", "--out", str(tmp_path / "cache")]
    for more, told in (
        (["--engine", "rai"], "Did you mean 'ray'?"),
        (["--workers", "2"], "--workers is of a Ray cluster: add --engine ray"),
        (["--engine", "ray", "--devices", "cpu,cpu"], "not both"),
        (["--engine", "ray", "--cpu", "--gpus-per-worker", "1"], "not both"),
        (["--engine", "ray", "--gpus-per-worker", "1.5"], "a part of one, or whole ones"),
        (["--engine", "ray", "--address", "somewhere"], "write local, auto, ray://HOST:10001 or HOST:6379"),
    ):
        assert _guarded([*given, *more], debug=False) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--out s3://b/c: .* add --engine ray"):
        run(teacher, "s3://b/c", workers=None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'softlabels\[ray\]'"):
        run(teacher, tmp_path / "cache")


def test_nobody_at_an_address_is_told_at_once() -> None:
    pytest.importorskip("ray")
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        started = time.monotonic()
        with pytest.raises(ConfigError, match="no Ray cluster answers there"):
            _connect_alone(address)
        assert time.monotonic() - started < 20


def _connect_alone(address: str) -> None:
    """What `connect` does in a process that isn't connected."""
    from softlabels.engines.ray_cluster import _start

    _start(RayOptions(address=address))


# ----------------------------------------------------------------------------------------------------------- what dies


def receipts(out: Path) -> int:
    return len(list(out.glob("hidden.02/*.json")))


def actors(tree: psutil.Process) -> list[psutil.Process]:
    """The workers among the processes that `tree` has started, through Ray's."""
    found = []
    for process in tree.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::_Actor") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@needs_ray
@pytest.mark.slow
def test_twenty_random_kills_of_workers_leave_the_bytes_of_a_local_dump(
    room: Room, teacher: Path, tmp_path: Path
) -> None:
    rows = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(TEXTS * 8)]
    chance = random.Random(1)
    killed: list[int] = []
    out, over = tmp_path / "cache", threading.Event()

    def kill() -> None:
        while len(killed) < 20 and not over.is_set():
            before = receipts(out)
            while receipts(out) <= before and not over.is_set():
                time.sleep(0.01)
            time.sleep(chance.random() * 0.3)
            if alive := actors(psutil.Process()):
                victim = chance.choice(alive)
                victim.kill()
                killed.append(victim.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    report = run(teacher, out, rows=rows, shard_rows=1)
    over.set()
    killer.join()
    assert len(killed) == 20, "the dump was over too soon"
    assert len(report.lost) >= 18  # of those killed while the last shards came in, nobody asks any more
    run(teacher, tmp_path / "local", rows=rows, shard_rows=1, workers=None)
    assert contents(out) == contents(tmp_path / "local")


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    room: Room, teacher: Path, whole: Path, tmp_path: Path, workers: int
) -> None:
    run(teacher, tmp_path / "cache", workers=workers)
    assert contents(tmp_path / "cache") == contents(whole)


def test_another_dump_takes_the_lease_of_workers_that_outlived_theirs(tmp_path: Path) -> None:
    from softlabels.cache.delivery import FolderPlace, StorePlace

    folder = FolderPlace(tmp_path, ".tmp-lease-a")
    folder.begin()
    folder.check()
    folder.end([])
    store = StorePlace(f"file://{tmp_path}", ".tmp-lease-b")
    store.begin()
    store.check()
    StorePlace(f"file://{tmp_path}", ".tmp-lease-c").begin()
    for place in (folder, store):
        with pytest.raises(CacheError, match="another"):
            place.deliver(tmp_path, ["logits"], 0)


def _take_scratch(places: int) -> int:
    """How many folders were this process's own, and stayed."""
    from softlabels.cache.delivery import StorePlace

    whole = 0
    for _ in range(places):
        with StorePlace("file:///nowhere", "lease").scratch() as folder:
            (folder / "shard").write_bytes(b"half")
            whole += (folder / "shard").exists()
        assert not folder.exists()
    return whole


def test_workers_that_start_together_leave_each_others_scratch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sweeps what dead ones left on its machine, while others make theirs."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "softlabels-dump-dead").mkdir()
    with ThreadPoolExecutor(8) as threads:  # to the locks as good as processes
        assert list(threads.map(_take_scratch, [100] * 8)) == [100] * 8
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def write_rows(path: Path) -> Path:
    examples = [{"id": f"row-{i}", "text": text, "label": name} for i, (text, name) in enumerate(TEXTS * 4)]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def started(rows: Path, teacher: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    given = ["dump", rows, "--teacher", teacher, "--out", out, "--shard-rows", "2", "--codec", "float32"]
    captures = [word for one in ("logits", "hidden:1,2") for word in ("--capture", one)]
    return subprocess.Popen(
        command(*given, *captures, *more),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


@needs_ray
@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_and_a_ctrl_c_leaves_whole_shards(
    teacher: Path, tmp_path: Path, rows: Path
) -> None:
    """Five kills, then a Ctrl-C as a terminal sends it, then to the end."""
    out, chance = tmp_path / "cache", random.Random(2)
    for number in [signal.SIGKILL] * 5 + [signal.SIGINT]:
        before = receipts(out)
        process = started(rows, teacher, out, "--engine", "ray", "--workers", "2")
        await_(lambda before=before: receipts(out) > before, "no shard came")  # type: ignore[misc]
        time.sleep(chance.random() * 0.2)
        family = psutil.Process(process.pid).children(recursive=True)
        assert any(one.name() == "raylet" for one in family)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.kill()
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in err, err
        if number == signal.SIGKILL:  # Ray's two agents first try to tell the dead head of it, for about a minute
            family = [one for one in family if not name(one).endswith("Agent")]
        await_(lambda family=family: not any(map(alive, family)), "a process outlived its parent")  # type: ignore[misc]
        with lock(out):
            assert number == signal.SIGKILL or list(out.rglob(".tmp-*")) == []
    assert receipts(out) < len(TEXTS) * 4 // 2, "the dump was too fast to be stopped"
    process = started(rows, teacher, out, "--engine", "ray", "--workers", "2", "--json")
    told, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert json.loads(told)["new_rows"] < len(TEXTS) * 4
    local = started(rows, teacher, tmp_path / "local", "--cpu")
    local.communicate(timeout=PATIENCE)
    assert contents(out) == contents(tmp_path / "local")


def name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
