"""Limits met for real: 2³¹ values in a shard, and more shards than a process may have files open."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.cache.files import map_file, temporary
from softlabels.cache.format import LIST_LIMIT, FieldSpec
from softlabels.cache.writer import FieldShard
from tests.cache.made import rows_of, write_cache

WIDTH, LENGTH = 768, 512


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_a_shard_of_more_than_2_to_the_31_values(tmp_path: Path, codec: str) -> None:
    """4.3 GB of BERT-base's hidden states, of which only a few rows are written: the file is sparse."""
    rows = LIST_LIMIT // (WIDTH * LENGTH) + 3
    spec = FieldSpec.model_validate({"kind": "token", "type": codec, "width": WIDTH})
    shard = FieldShard(tmp_path, "hidden.01", spec, shard=0, tokens=np.full(rows, LENGTH))
    try:
        assert shard.bounds == [0, rows - 3, rows]
        for row in (0, rows - 4, rows - 3, rows - 1):  # at both sides of every edge
            values = np.full((LENGTH, WIDTH), row % 100, "<f2" if codec == "float16" else np.int8)
            values[-1, -1] = 1
            scales = np.full(LENGTH, row / 7, np.float32) if codec == "int8" else None
            shard.put(row, values, scales=scales)
        os.fsync(shard.handle)
        size = temporary(shard.path).stat()
        assert size.st_size == shard.size > 2**31 * shard._columns[0].element.itemsize
        assert size.st_blocks * 512 < 100e6, "the file is not sparse: this disk was about to be filled"
        file = pa.ipc.open_file(map_file(temporary(shard.path), shard.size))
        assert file.num_record_batches == 2
        table = file.read_all()
        table.validate(full=True)
        assert [len(chunk) for chunk in table.column(0).chunks] == [rows - 3, 3]
        for row in (0, rows - 4, rows - 3, rows - 1):
            got = table.column("hidden.01")[row].values.to_numpy()
            assert got.shape == (LENGTH * WIDTH,)
            assert got[-1] == 1 and (got[:-1] == row % 100).all()
            if codec == "int8":
                assert (table.column("scale")[row].values.to_numpy() == np.float32(row / 7)).all()
        untouched = table.column("hidden.01")[rows - 2].values.to_numpy()
        assert not untouched.any()
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.ENOSPC, errno.ENOMEM):
            pytest.skip(f"no file of 4.3 GB can be made or mapped here: {error}")
        raise
    finally:
        shard.discard()


_READ = """
import os, resource, sys
import numpy as np
from softlabels.cache import open_cache
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
cache = open_cache(sys.argv[1])
before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
rows = np.random.default_rng(0).permutation(len(cache))
for first in range(0, len(rows), 100):
    some = rows[first : first + 100]
    signals = cache.signals(some, ["logits"])
    assert signals.logits[:, 0].tolist() == some.tolist(), "rows are mixed up"
after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
print(after - before, len(cache._shards))
"""


def test_600_shards_are_read_with_256_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,200 files, for each shard has its examples too. All are mapped at the end, and none has a descriptor."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # made for this test alone; syncing would take most of it
    lengths = [1] * 600
    values = {"logits": [np.array([row, 0], np.float32) for row in range(600)]}
    fields = {"logits": {"kind": "row", "type": "float32", "width": 2}}
    write_cache(tmp_path, rows_of(lengths), fields, values, shard_rows=1)
    done = subprocess.run([sys.executable, "-c", _READ, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1200"]


def test_a_mapping_lives_as_long_as_what_is_read_from_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)) * 100)
    whole = map_file(path, 10_000)
    part = whole.slice(5000, 100)
    del whole
    path.unlink()
    assert part.to_pybytes() == bytes(range(100))
    del part
    with pytest.raises(FileNotFoundError):
        map_file(path, 10)
    path.write_bytes(b"")
    with pytest.raises(OSError):
        map_file(path, 0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_mappings_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "file-to-map"
    path.write_bytes(bytes(10_000))
    buffer = map_file(path, 10_000)
    assert "file-to-map" in Path("/proc/self/maps").read_text()
    view = np.frombuffer(buffer, np.uint8)
    del buffer
    assert "file-to-map" in Path("/proc/self/maps").read_text() and not view.any()
    del view
    assert "file-to-map" not in Path("/proc/self/maps").read_text()
