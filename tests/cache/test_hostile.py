"""A cache is someone else's file: whatever is in it, it reads or is refused, and nothing of it runs."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softlabels.cache.format import MANIFEST, Manifest, read_receipt, to_json
from softlabels.cache.reader import open_cache
from softlabels.cache.shards import wanted_schema
from softlabels.errors import CacheError
from tests.cache.fuzz import FIELDS, base, read_all, resize
from tests.models import tiny_tokenizer
from tests.processes import ROOT, environment

CACHES = int(os.environ.get("SOFTLABELS_FUZZ", "300"))
WORKERS = 2


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    base(tmp_path / "cache")
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------------------------ by the thousand


def test_mutated_caches_read_or_are_refused(tmp_path: Path) -> None:
    """In processes of their own, with limited memory: one that dies names the seed that killed it."""
    share = CACHES // WORKERS
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cache.fuzz", str(share * i), str(share), str(tmp_path / str(i))],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(WORKERS)
    ]
    outcomes = {"read": 0, "refused": 0}
    for i, process in enumerate(started):
        try:
            out, err = process.communicate(timeout=60 + CACHES / 10)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"seed {(tmp_path / str(i)).read_text()} does not end")
        assert process.returncode == 0, f"seed {(tmp_path / str(i)).read_text()} ({process.returncode}): {err[-3000:]}"
        for name, count in json.loads(out).items():
            outcomes[name] += count
    assert sum(outcomes.values()) == CACHES // WORKERS * WORKERS and min(outcomes.values()) > CACHES / 20


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def paths_of(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to every value in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in items for deeper in paths_of(item, (*path, key)))]


def replace(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replace(value[path[0]], path[1:], new)
    return copy


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return base(tmp_path_factory.mktemp("hostile") / "cache")


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), value=VALUES)
def test_any_value_anywhere_in_a_manifest_reads_or_is_refused(
    lasting: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    facts = json.loads(lasting[MANIFEST])
    path = data.draw(st.sampled_from(paths_of(facts)))
    folder = tmp_path_factory.getbasetemp() / "hypothesis"
    if not folder.exists():
        base(folder)
    (folder / MANIFEST).write_text(json.dumps(replace(facts, path, value)))
    try:
        read_all(folder)
    except CacheError as error:
        assert len(str(error)) < 5000


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), value=VALUES | st.binary())
def test_any_receipt_reads_or_counts_as_missing(
    lasting: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    facts = json.loads(lasting["logits/00000.json"])
    folder = tmp_path_factory.getbasetemp() / "receipts"
    (folder / "logits").mkdir(parents=True, exist_ok=True)
    path = data.draw(st.sampled_from(paths_of(facts)))
    raw = value if isinstance(value, bytes) else json.dumps(replace(facts, path, value)).encode()
    (folder / "logits" / "00000.json").write_bytes(raw)
    receipt = read_receipt(folder, "logits", 0)
    assert receipt is None or receipt.bytes > 0


# ------------------------------------------------------------------------------------------- files made to do harm


def put(cache: Path, name: str, data: bytes) -> None:
    """`data` as the file `name`, with a manifest that has its size."""
    (cache / name).write_bytes(data)
    (cache / MANIFEST).write_bytes(resize((cache / MANIFEST).read_bytes(), name, len(data)))


def write_table(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
        file.write_table(table)
    return sink.getvalue().to_pybytes()


def logits_table(cache: Path) -> pa.Table:
    return pa.ipc.open_file((cache / "logits" / "00000.arrow").read_bytes()).read_all()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_what_is_compressed_is_refused_unpacked(cache: Path, codec: str) -> None:
    data = bytearray(write_table(logits_table(cache), compression=codec))
    put(cache, "logits/00000.arrow", bytes(data))
    with pytest.raises(CacheError, match="compressed"):
        read_all(cache)


def test_a_bomb_is_refused_before_it_is_unpacked(cache: Path) -> None:
    """A thousand times its size in zeros: the rows fit the file that the manifest speaks of."""
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(50_000_000, np.float32)), 2)
    schema = logits_table(cache).schema
    bomb = write_table(pa.table([zeros.cast(schema.field(0).type)], schema=schema), compression="zstd")
    assert len(bomb) < 1_000_000
    put(cache, "logits/00000.arrow", bomb)
    before = pa.total_allocated_bytes()
    with pytest.raises(CacheError, match="compressed"):
        read_all(cache)
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_dictionaries_are_refused(cache: Path) -> None:
    table = pa.table({"logits": pa.array(["a", "b"]).dictionary_encode()})
    put(cache, "logits/00000.arrow", write_table(table.replace_schema_metadata(logits_table(cache).schema.metadata)))
    with pytest.raises(CacheError, match="dictionaries"):
        read_all(cache)


class Harm:
    """Pickled, it would write a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.place, "harm"))


@pytest.mark.parametrize(
    "name", ["arrow.py_extension_type", "pandas.period", "datasets.features.features.Array2DExtensionType"]
)
def test_extension_types_are_refused_before_they_are_built(cache: Path, tmp_path: Path, name: str) -> None:
    table = logits_table(cache)
    harm = pickle.dumps(Harm(tmp_path / "harm"))
    column = table.schema.field(0).with_metadata({"ARROW:extension:name": name, "ARROW:extension:metadata": harm})
    put(cache, "logits/00000.arrow", write_table(table.cast(pa.schema([column], metadata=table.schema.metadata))))
    with pytest.raises(CacheError, match="column metadata"):
        read_all(cache)
    assert not (tmp_path / "harm").exists()


def test_nested_columns_and_many_columns_are_refused(cache: Path) -> None:
    deep: pa.DataType = pa.int8()
    for _ in range(60):
        deep = pa.list_(deep)
    metadata = logits_table(cache).schema.metadata
    for table in (pa.table({"logits": pa.array([None], deep)}), pa.table({f"c{i}": [1] for i in range(5000)})):
        put(cache, "logits/00000.arrow", write_table(table.replace_schema_metadata(metadata)))
        with pytest.raises(CacheError, match="columns"):
            read_all(cache)


@pytest.mark.parametrize("value", [-1, 2**31 - 1, -(2**31), 25, 1000])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_offsets_that_lead_elsewhere_are_refused(cache: Path, value: int, place: int) -> None:
    path = cache / "hidden.01" / "00000.arrow"
    data, offsets = bytearray(path.read_bytes()), struct.pack("<3i", 0, 12, 36)  # rows of 3 and 6 tokens, width 4
    at = bytes(data).index(offsets)
    struct.pack_into("<i", data, at + 4 * place, value)
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"hidden\.01"):
        read_all(cache)


def test_texts_that_are_not_utf8_are_refused(cache: Path) -> None:
    path = cache / "examples" / "00000.arrow"
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(CacheError, match="UTF"):
        read_all(cache)


@pytest.mark.parametrize("name", ["manifest.json", "examples/00000.arrow", "logits/00001.arrow", "logits", "examples"])
@pytest.mark.parametrize("kind", ["link", "pipe", "zero", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(cache: Path, tmp_path: Path, name: str, kind: str) -> None:
    place, real = cache / name, tmp_path / "elsewhere"
    place.rename(real)
    make: dict[str, Callable[[], None]] = {
        "link": lambda: place.symlink_to(real),
        "pipe": lambda: os.mkfifo(place),
        "zero": lambda: place.symlink_to("/dev/zero"),
        "folder": place.mkdir,
    }
    make[kind]()
    with pytest.raises(CacheError):
        read_all(cache)


def test_a_manifest_of_any_size_takes_bounded_memory(cache: Path) -> None:
    for raw in (
        b"[" * 5_000_000,
        b'{"fields": [' + b"1," * 3_000_000 + b"1]}",
        b'{"shard_rows": [' + b"-1," * 900_000 + b"1]}",
    ):
        (cache / MANIFEST).write_bytes(raw)
        with pytest.raises(CacheError):
            open_cache(cache)
    with open(cache / MANIFEST, "wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(CacheError, match="bytes"):
        open_cache(cache)


SHRINK = """
import os, sys, time
import numpy as np
from softlabels.cache import open_cache
from softlabels.errors import CacheError
cache = open_cache(sys.argv[1])
rows = np.arange(cache.rows)
cache.signals(rows, list(cache.fields)), cache.tokens(rows)
os.truncate(sys.argv[1] + "/" + sys.argv[2], int(sys.argv[3]))
time.sleep(0.1)
try:
    cache.signals(rows, list(cache.fields)), cache.tokens(rows), cache.ids, cache.texts()
except CacheError as error:
    print("told:", error)
"""


@pytest.mark.parametrize("name", ["hidden.01/00000.arrow", "examples/00001.arrow"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_file_that_shrinks_under_the_reader_is_told(cache: Path, name: str, size: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHRINK, str(cache), name, str(size)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and done.stdout.startswith("told:"), (done.returncode, done.stderr[-2000:])


# -------------------------------------------------------------------------------------------------- nothing is run


def test_no_module_of_the_cache_unpickles_evaluates_or_loads_code() -> None:
    banned = {"pickle", "marshal", "shelve", "importlib", "runpy", "joblib", "dill", "cloudpickle"}
    calls = {"eval", "exec", "compile", "__import__", "allow_pickle"}
    for path in sorted((ROOT / "softlabels" / "cache").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword):
                allowed = isinstance(node.value, ast.Constant) and node.value.value is False
                assert node.arg not in ("trust_remote_code", "allow_pickle") or allowed, path


def test_a_tokenizer_that_asks_for_code_is_refused(cache: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(cache / "tokenizer")
    assert open_cache(cache).tokenizer().get_vocab() == tokenizer.get_vocab()
    settings_file = cache / "tokenizer" / "tokenizer_config.json"
    usual = settings_file.read_text()
    asking = json.loads(usual) | {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    (cache / "tokenizer" / "mine.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\nclass Mine: pass\n")
    settings_file.write_text(json.dumps(asking))
    with pytest.raises(CacheError, match="may be code"):
        open_cache(cache).tokenizer()
    (cache / "tokenizer" / "mine.py").unlink()
    with pytest.raises(CacheError, match="auto_map"):
        open_cache(cache).tokenizer()
    settings_file.write_text(usual)
    (cache / "tokenizer" / "config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    with pytest.raises(CacheError, match="auto_map"):
        open_cache(cache).tokenizer()
    (cache / "tokenizer" / "config.json").unlink()
    for damage in ("[" * 100_000, "[]", "{", "null"):
        (cache / "tokenizer" / "tokenizer.json").write_text(damage)
        with pytest.raises(CacheError, match="tokenizer"):
            open_cache(cache).tokenizer()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("damage", [b"[" * 100_000, b"[]", b"{", b"\xff", b"7"])
def test_a_teachers_config_that_is_damaged_is_told(cache: Path, damage: bytes) -> None:
    (cache / "teacher").mkdir()
    (cache / "teacher" / "config.json").write_bytes(damage)
    with pytest.raises(CacheError, match=r"config\.json"):
        open_cache(cache).teacher_config()


def test_names_of_fields_lead_nowhere_else(cache: Path) -> None:
    for name in ("../logits", "/etc", "logits/..", "a\0b", "Logits", "examples", ".", "logits\n"):
        facts = json.loads((cache / MANIFEST).read_bytes())
        for part in ("fields", "shards"):
            facts[part][name] = facts[part].pop("logits")
        with pytest.raises(ValueError):
            Manifest.model_validate(facts)


def test_the_checks_know_every_kind_of_column(cache: Path) -> None:
    """What is checked here must be what is written: each field of the cache opens, and its schema is the wanted one."""
    opened = open_cache(cache)
    for name in ("examples", *FIELDS):
        schema = opened.table(name, 1).schema
        assert schema.equals(wanted_schema(opened.manifest, name, 1, schema, where=cache), check_metadata=True)
    assert to_json(opened.manifest) == (cache / MANIFEST).read_bytes()
