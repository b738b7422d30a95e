"""Reading shuffled batches: the cache against a hand-written gather from numpy memmaps, and against its peers.

Run it:  make bench      or  python -m tests.bench.bench_cache [--small] [--only w1,w2,w3,write,cold] [--folder DIR]

W1   20,000 rows, mean length 40, float16 hidden states of 4 layers, L x 384 each, logits and ids; batches of 32
W2  200,000 rows of ids and 3 logits; batches of 256
W3    4,000 rows of 512 tokens x top 32 (16-bit ids and float16); batches of 8

Every contestant gives the same padded tensors, which is checked before the clock runs: input_ids and mask (int64, zero
in the padding) and the fields as they are stored. They take turns, batch lists in common, all from a warm page cache;
a figure is the median of 5 rounds. Peers take turns with the gather and the cache one after the other, so that never
more than three copies of the data want memory. The gather has a flat file a column, offsets in memory, one slice
assignment a row into a buffer that is used again, and zeros only the padding. The cache uses its buffers again too.
Cold: the files are dropped from the page cache (POSIX_FADV_DONTNEED), and a fresh process reads; from /proc/self/io
comes what it read from the disk. W3's ids are a bfloat16 field read as stored: the same 16 bits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softlabels.cache import open_cache
from softlabels.cache.build import CacheBuild
from softlabels.cache.files import write_file
from softlabels.cache.format import MANIFEST, Manifest, to_json
from softlabels.cache.gather import Buffers
from softlabels.cache.loader import CacheLoader, LoadOptions
from softlabels.cache.writer import FieldShard, join_hash, write_examples
from softlabels.types import NO_LABEL, TokenizedExample

ROUNDS = 5
Tensors = dict[str, torch.Tensor]
Read = Callable[[np.ndarray], Tensors]


@dataclass(frozen=True)
class Column:
    """A field of the data: `kind` as in the cache, `element` as numpy stores it, `type` as the cache calls it."""

    kind: str
    type: str
    width: int
    element: str


@dataclass(frozen=True)
class Work:
    """One workload."""

    name: str
    rows: int
    batch: int
    batches: int  # a round of the fast ones
    lengths: np.ndarray
    columns: dict[str, Column]
    shard_rows: int
    ids: np.ndarray  # flat, uint16
    offsets: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", np.concatenate([[0], np.cumsum(self.lengths)]))

    def values(self, name: str, row: int) -> np.ndarray:
        """A row of a column: (width,) or (L, width). Made from a block of random numbers, so never held as a whole."""
        column, block = self.columns[name], _block(self.columns[name])
        count = column.width * (1 if column.kind == "row" else int(self.lengths[row]))
        start = (row * 7919 + 104729 * (sorted(self.columns).index(name) + 1)) % (len(block) - count)
        return block[start : start + count]

    def batch_rows(self, seed: int, count: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.choice(self.rows, self.batch, replace=False) for _ in range(count)]


_blocks: dict[str, np.ndarray] = {}


def _block(column: Column) -> np.ndarray:
    if column.element not in _blocks:
        rng = np.random.default_rng(5)
        drawn = rng.standard_normal(4 << 20)
        made = rng.integers(0, 30_000, 4 << 20) if column.element == "<u2" else drawn
        _blocks[column.element] = made.astype(column.element)
    return _blocks[column.element]


def workload(name: str, *, small: bool) -> Work:
    rng, part = np.random.default_rng(0), 20 if small else 1
    if name == "w1":
        rows = 20_000 // part
        lengths = np.clip(np.round(rng.lognormal(3.55, 0.5, rows)), 4, 128).astype(np.int64)
        columns = {f"hidden.{layer:02d}": Column("token", "float16", 384, "<f2") for layer in (3, 6, 9, 12)}
        columns["logits"] = Column("row", "float32", 3, "<f4")
        batch, batches, shard_rows = 32, 200 // (4 if small else 1), 4096
    elif name == "w2":
        rows = 200_000 // part
        lengths = np.clip(np.round(rng.lognormal(3.55, 0.5, rows)), 4, 128).astype(np.int64)
        columns = {"logits": Column("row", "float32", 3, "<f4")}
        batch, batches, shard_rows = 256, 200 // (4 if small else 1), 4096
    else:
        rows = 4_000 // part
        lengths = np.full(rows, 512)
        columns = {
            "topk_ids": Column("token", "bfloat16", 32, "<u2"),
            "topk_logits": Column("token", "float16", 32, "<f2"),
        }
        batch, batches, shard_rows = 8, 400 // (4 if small else 1), 4096
    ids = rng.integers(1, 30_000, int(lengths.sum())).astype(np.uint16)
    return Work(name, rows, batch, batches, lengths, columns, shard_rows, ids)


# ------------------------------------------------------------------------------------------------------- the cache


def write_ours(work: Work, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    fields = {name: {"kind": c.kind, "type": c.type, "width": c.width} for name, c in work.columns.items()}
    build = CacheBuild(folder, _manifest(work, fields))
    for shard in build.shards():
        rows = range(shard * work.shard_rows, min((shard + 1) * work.shard_rows, work.rows))
        examples = [
            TokenizedExample(f"{row}", work.ids[work.offsets[row] : work.offsets[row + 1]], None, NO_LABEL, "", None)
            for row in rows
        ]
        write_examples(folder, examples, shard=shard, vocab_size=30_000, token_types=False, text=False)
        for name, spec in build.manifest.fields.items():
            writer = FieldShard(folder, name, spec, shard=shard, tokens=work.lengths[rows.start : rows.stop])
            for place, row in enumerate(rows):
                writer.put(place, work.values(name, row))
            writer.commit(join_hash(examples))
    write_file(folder / MANIFEST, to_json(build.manifest))
    build.finish()


def _manifest(work: Work, fields: dict[str, Any]) -> Manifest:
    teacher: dict[str, Any] = {
        "name": "made",
        "weights_hash": "0",
        "task": "sequence-classification",
        "label_names": ["a", "b", "c"],
    }
    teacher |= {"vocab_size": 30_000, "pad_token_id": 0, "unk_token_id": 1, "token_types": False}
    dump: dict[str, Any] = {
        "max_length": 512,
        "shard_rows": work.shard_rows,
        "batch_tokens": 8192,
        "dtype": "float32",
        "text": False,
    }
    return Manifest.model_validate(
        {
            "format": "softlabels-cache",
            "version": 1,
            "complete": False,
            "teacher": teacher,
            "tokenizer_hash": "0",
            "corpus": {"source": "made", "split": None, "hash": "0", "rows": work.rows, "labelled": 0},
            "dump": dump,
            "fields": fields,
            "shard_rows": [],
            "shard_tokens": [],
            "join": "",
            "shards": {},
            "versions": {},
        }
    )


def ours(work: Work, folder: Path, *, threads: int = 1, as_stored: bool = True, fresh: bool = False) -> Read:
    cache, out, names = open_cache(folder), Buffers(), list(work.columns)

    def read(rows: np.ndarray) -> Tensors:
        torch.set_num_threads(threads)
        batch = cache.batch(rows, names, out=None if fresh else out, as_stored=as_stored)
        return {"input_ids": batch.tokens.input_ids, "mask": batch.tokens.attention_mask, **batch.teacher.fields}

    return read


# ---------------------------------------------------------------------------------------------------- by hand


def write_gather(work: Work, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    work.ids.tofile(folder / "ids")
    for name in work.columns:
        with open(folder / name, "wb") as file:
            for row in range(work.rows):
                file.write(work.values(name, row).data)
            file.flush()
            os.fsync(file.fileno())


def gather(work: Work, folder: Path) -> Read:
    """One slice assignment a row and column, padding zeroed, buffers used again."""
    ids_of = np.memmap(folder / "ids", np.uint16, "r")
    maps = {n: np.memmap(folder / n, c.element, "r").reshape(-1, c.width) for n, c in work.columns.items()}
    flat = {name: np.empty(work.batch * 512 * (column.width if column.kind == "token" else 1), column.element)
            for name, column in work.columns.items()}  # fmt: skip
    ids_flat, mask_flat = np.empty(work.batch * 512, np.int64), np.empty(work.batch * 512, np.int64)

    def read(rows: np.ndarray) -> Tensors:
        lengths, starts = work.lengths[rows].tolist(), work.offsets[rows].tolist()
        longest, size = max(lengths), len(rows)
        ids = ids_flat[: size * longest].reshape(size, longest)
        mask = mask_flat[: size * longest].reshape(size, longest)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            ids[i, :length] = ids_of[start : start + length]
            ids[i, length:] = 0
        mask[...] = np.arange(longest) < work.lengths[rows, None]
        given = {"input_ids": torch.from_numpy(ids), "mask": torch.from_numpy(mask)}
        for name, column in work.columns.items():
            values = maps[name]
            if column.kind == "row":
                given[name] = torch.from_numpy(values[rows])
                continue
            out = flat[name][: size * longest * column.width].reshape(size, longest, column.width)
            for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                out[i, :length] = values[start : start + length]
                if length < longest:
                    out[i, length:] = 0
            given[name] = _tensor(out)
        return given

    return read


def _tensor(values: np.ndarray) -> torch.Tensor:
    """uint16 ids come as bfloat16 from the cache: the same bits."""
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def pad(work: Work, rows: np.ndarray, get: Callable[[str, int], Any]) -> Tensors:
    """What peers need around their reading: `get(column, i)` gives the values of the i-th of `rows`."""
    lengths = work.lengths[rows].tolist()
    longest = max(lengths)
    given = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.int64),
        "mask": torch.from_numpy((np.arange(longest) < work.lengths[rows, None]).astype(np.int64)),
    }
    for i, length in enumerate(lengths):
        given["input_ids"][i, :length] = torch.as_tensor(get("ids", i).astype(np.int64))
    for name, column in work.columns.items():
        token = column.kind == "token"
        shape = (len(rows), longest, column.width) if token else (len(rows), column.width)
        out = np.zeros(shape, column.element)
        for i, length in enumerate(lengths):
            values = get(name, i)
            if token:
                out[i, :length] = np.asarray(values).reshape(length, column.width)
            else:
                out[i] = values
        given[name] = _tensor(out)
    return given


def row_of(work: Work, row: int) -> dict[str, np.ndarray]:
    parts = {name: work.values(name, row) for name in work.columns}
    return {"ids": work.ids[work.offsets[row] : work.offsets[row + 1]], **parts}


def span(work: Work, name: str, row: int) -> slice:
    """Where a row lies in its column's flat values."""
    if name != "ids" and work.columns[name].kind == "row":
        return slice(row * work.columns[name].width, (row + 1) * work.columns[name].width)
    width = 1 if name == "ids" else work.columns[name].width
    return slice(int(work.offsets[row]) * width, int(work.offsets[row + 1]) * width)


# ------------------------------------------------------------------------------------------------------------ peers


def h5py_file(work: Work, folder: Path) -> Read:
    """A flat dataset a column; a slice a row."""
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "data.h5", "w") as file:
        for name in ("ids", *work.columns):
            element = "<u2" if name == "ids" else work.columns[name].element
            values = file.create_dataset(name, (span(work, name, work.rows - 1).stop,), element)
            for first in range(0, work.rows, 1000):
                part = range(first, min(first + 1000, work.rows))
                rows = [row_of(work, row)[name] for row in part]
                values[span(work, name, part.start).start : span(work, name, part.stop - 1).stop] = np.concatenate(rows)
    opened = h5py.File(folder / "data.h5", "r")
    sets = {name: opened[name] for name in ("ids", *work.columns)}
    return lambda rows: pad(work, rows, lambda name, i: sets[name][span(work, name, int(rows[i]))])


def safetensors_files(work: Work, folder: Path) -> Read:
    """A file of 1,000 rows, a flat tensor a column; a slice a row."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for first in range(0, work.rows, 1000):
        part = [row_of(work, row) for row in range(first, min(first + 1000, work.rows))]
        path = folder / f"{first}.safetensors"
        save_file({name: np.concatenate([row[name] for row in part]) for name in part[0]}, path)
        files.append(safe_open(path, "np"))
    slices = [{name: file.get_slice(name) for name in ("ids", *work.columns)} for file in files]

    def get(name: str, row: int) -> np.ndarray:
        number, place = row // 1000, span(work, name, row)
        before = span(work, name, number * 1000).start
        return slices[number][name][place.start - before : place.stop - before]

    return lambda rows: pad(work, rows, lambda name, i: get(name, int(rows[i])))


def datasets_torch(work: Work, folder: Path) -> Read:
    """A list column of flat values a column, torch format, then padded."""
    import datasets
    import pyarrow as pa

    tables = []
    for first in range(0, work.rows, 1000):
        part = [row_of(work, row) for row in range(first, min(first + 1000, work.rows))]
        columns = {}
        for name in part[0]:
            ends = np.cumsum([0, *(len(row[name]) for row in part)]).astype(np.int32)
            columns[name] = pa.ListArray.from_arrays(ends, pa.array(np.concatenate([row[name] for row in part])))
        tables.append(pa.table(columns))
    datasets.disable_progress_bars()
    datasets.Dataset(pa.concat_tables(tables)).save_to_disk(str(folder))
    del tables
    loaded = datasets.load_from_disk(str(folder)).with_format("torch")

    def read(rows: np.ndarray) -> Tensors:
        found = loaded[rows.tolist()]
        return pad(work, rows, lambda name, i: np.asarray(found[name][i]))

    return read


def torch_files(work: Work, folder: Path) -> Read:
    """One torch.save file a row, in folders of 1,000."""
    for row in range(work.rows):
        path = folder / str(row // 1000) / f"{row}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: torch.from_numpy(v.copy()) for name, v in row_of(work, row).items()}, path)

    def read(rows: np.ndarray) -> Tensors:
        loaded = [torch.load(folder / str(row // 1000) / f"{row}.pt", weights_only=True) for row in rows.tolist()]
        return pad(work, rows, lambda name, i: loaded[i][name].numpy())

    return read


def streaming_files(work: Work, folder: Path) -> Read:
    """mosaicml-streaming's own files, read one by one on this machine; a column's values as bytes."""
    from streaming import LocalDataset, MDSWriter

    with MDSWriter(out=str(folder), columns={name: "bytes" for name in ("ids", *work.columns)}) as writer:
        for row in range(work.rows):
            writer.write({name: values.tobytes() for name, values in row_of(work, row).items()})
    opened = LocalDataset(str(folder))

    def read(rows: np.ndarray) -> Tensors:
        found = [opened[row] for row in rows.tolist()]
        return pad(work, rows, lambda name, i: np.frombuffer(found[i][name], element_of(work, name)))

    return read


def lance_table(work: Work, folder: Path) -> Read:
    """A list column of flat values a column, taken by row numbers; no dot is allowed in a name."""
    import lance
    import pyarrow as pa

    def batches() -> Any:
        for first in range(0, work.rows, 1000):
            part = [row_of(work, row) for row in range(first, min(first + 1000, work.rows))]
            columns = {}
            for name in part[0]:
                ends = np.cumsum([0, *(len(row[name]) for row in part)]).astype(np.int32)
                columns[name.replace(".", "_")] = pa.ListArray.from_arrays(
                    ends, pa.array(np.concatenate([row[name] for row in part]))
                )
            yield pa.RecordBatch.from_pydict(columns)

    first = next(batches())
    table = lance.write_dataset(pa.RecordBatchReader.from_batches(first.schema, batches()), str(folder))

    def read(rows: np.ndarray) -> Tensors:
        found = {name: column.combine_chunks() for name, column in zip(
            first.schema.names, table.take(rows.tolist()).columns, strict=True)}  # fmt: skip
        return pad(work, rows, lambda name, i: found[name.replace(".", "_")][i].values.to_numpy())

    return read


class WebDataset:
    """Tar files of 1,000 rows through a shuffle buffer. It gives other rows than those asked for: `rows` says which."""

    def __init__(self, work: Work, folder: Path) -> None:
        import webdataset

        self.work, self.rows = work, np.zeros(0, np.int64)
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for first in range(0, work.rows, 1000):
            files.append(str(folder / f"{first // 1000:05d}.tar"))
            with webdataset.TarWriter(files[-1]) as tar:
                for row in range(first, min(first + 1000, work.rows)):
                    parts = {f"{number}.bin": v.tobytes() for number, v in enumerate(row_of(work, row).values())}
                    tar.write({"__key__": f"{row:09d}", **parts})
        loaded = webdataset.WebDataset(files, shardshuffle=False, empty_check=False)
        self.samples = iter(loaded.repeat().shuffle(1000))

    def __call__(self, rows: np.ndarray) -> Tensors:
        found = [next(self.samples) for _ in rows]
        self.rows = np.array([int(sample["__key__"]) for sample in found])
        names = ["ids", *self.work.columns]
        return pad(self.work, self.rows, lambda name, i: np.frombuffer(
            found[i][f"{names.index(name)}.bin"], element_of(self.work, name)))  # fmt: skip


def element_of(work: Work, name: str) -> str:
    return "<u2" if name == "ids" else work.columns[name].element


PEERS: dict[str, tuple[str, Callable[[Work, Path], Read]]] = {
    "h5py": ("h5py", h5py_file),
    "safetensors, 1,000 rows a file": ("safetensors", safetensors_files),
    "datasets, torch format": ("datasets", datasets_torch),
    "mosaicml-streaming": ("streaming", streaming_files),
    "lance": ("lance", lance_table),
    "webdataset, shuffle buffer of 1,000": ("webdataset", WebDataset),
    "torch.save, a file a row": ("torch", torch_files),
}


def missing(module: str) -> str:
    """Why a peer cannot run here; empty where it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # a peer's own trouble with the versions that are here
        return f"cannot be imported ({type(error).__name__}: {error})"
    return ""


# -------------------------------------------------------------------------------------------------------- the clock


def check_equal(work: Work, readers: dict[str, Read]) -> None:
    """All contestants give the same tensors."""
    rows = work.batch_rows(99, 1)[0]
    reference = next(iter(readers))
    for contestant, read in readers.items():
        given = {name: value.clone() for name, value in read(rows).items()}
        asked = read.rows if isinstance(read, WebDataset) else rows
        for name, other in readers[reference](asked).items():
            one = given[name]
            if one.dtype == torch.bfloat16 and other.dtype == torch.bfloat16:
                one, other = one.view(torch.int16), other.view(torch.int16)
            if not torch.equal(one, other.to(one.dtype)):
                raise AssertionError(f"{contestant} gives other values of {name} than {reference}")


def take_turns(work: Work, readers: dict[str, Read], slow: Sequence[str] = ()) -> dict[str, float]:
    """Median rows per second; contestants in `slow` read a tenth as many batches."""
    for name, read in readers.items():  # every page is mapped once before the clock runs
        for rows in np.array_split(np.arange(work.rows), max(work.rows // work.batch, 1)) if name not in slow else []:
            read(rows)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(ROUNDS):
        batches = work.batch_rows(turn, work.batches)
        names = list(readers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            mine = batches[: max(len(batches) // 10, 5)] if name in slow else batches
            readers[name](mine[0])
            started = time.perf_counter()
            for rows in mine:
                readers[name](rows)
            seconds[name].append((time.perf_counter() - started) / len(mine) / work.batch)
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


def table(title: str, speeds: dict[str, float], *, base: str, unit: str = "rows/s", scale: float = 1.0) -> None:
    print(f"\n{title}\n{'':<44}{unit:>12}{'ratio':>9}")
    for name, speed in speeds.items():
        print(f"{name:<44}{speed * scale:>12,.0f}{speed / speeds[base]:>9.3f}", flush=True)


def run_work(name: str, folder: Path, *, small: bool, peers: bool) -> None:
    work = workload(name, small=small)
    size = sum(work.values(c, 0).nbytes / max(work.lengths[0] if k.kind == "token" else 1, 1) * (
        work.lengths.sum() if k.kind == "token" else work.rows) for c, k in work.columns.items())  # fmt: skip
    print(
        f"\n{name.upper()}: {work.rows:,} rows, mean length {work.lengths.mean():.1f}, {size / 1e6:,.0f} MB of fields"
    )
    write_gather(work, folder / "gather")
    write_ours(work, folder / "ours")
    readers = {
        "gather by hand": gather(work, folder / "gather"),
        "cache, 1 thread": ours(work, folder / "ours"),
        "cache, 2 threads": ours(work, folder / "ours", threads=2),
        "cache, fresh memory a batch": ours(work, folder / "ours", fresh=True),
    }
    check_equal(work, readers)
    if name == "w1":
        readers["cache, float16 given as float32"] = ours(work, folder / "ours", as_stored=False)
        readers["  the same, 2 threads"] = ours(work, folder / "ours", as_stored=False, threads=2)
        write_int8(work, folder / "int8")
        readers["cache, int8 given as float32"] = ours(work, folder / "int8", as_stored=False)
        readers["  the same, 2 threads "] = ours(work, folder / "int8", as_stored=False, threads=2)
    speeds = take_turns(work, readers)
    table(f"{name.upper()}, warm", speeds, base="gather by hand")
    del readers
    shutil.rmtree(folder / "int8", ignore_errors=True)
    if not peers:
        return
    ratios = {}
    for peer, (module, make) in PEERS.items():
        if why := missing(module):
            print(f"{peer}: {why}")
            continue
        if name == "w2" and make is torch_files:
            continue  # 200,000 files of 200 bytes
        contestants = {
            "gather by hand": gather(work, folder / "gather"),
            "cache, 1 thread": ours(work, folder / "ours"),
            peer: make(work, folder / "peer"),
        }
        check_equal(work, contestants)
        ratios[peer] = take_turns(work, contestants, slow=[peer])
        del contestants
        shutil.rmtree(folder / "peer", ignore_errors=True)
    print(f"\n{name.upper()}, warm, peers\n{'':<44}{'rows/s':>12}{'ratio':>9}{'cache is':>12}")
    for peer, found in ratios.items():
        faster = found["cache, 1 thread"] / found[peer]
        print(f"{peer:<44}{found[peer]:>12,.0f}{found[peer] / found['gather by hand']:>9.4f}{faster:>11.1f}x")


def write_int8(work: Work, folder: Path) -> None:
    """The same data with int8 hidden states."""
    shutil.rmtree(folder, ignore_errors=True)
    fields = {
        name: {"kind": c.kind, "type": "int8" if c.kind == "token" else c.type, "width": c.width}
        for name, c in work.columns.items()
    }
    build = CacheBuild(folder, _manifest(work, fields))
    for shard in build.shards():
        rows = range(shard * work.shard_rows, min((shard + 1) * work.shard_rows, work.rows))
        examples = [
            TokenizedExample(f"{row}", work.ids[work.offsets[row] : work.offsets[row + 1]], None, NO_LABEL, "", None)
            for row in rows
        ]
        write_examples(folder, examples, shard=shard, vocab_size=30_000, token_types=False, text=False)
        lengths = work.lengths[rows.start : rows.stop]
        for name, spec in build.manifest.fields.items():
            writer = FieldShard(folder, name, spec, shard=shard, tokens=lengths)
            writer.channels = np.ones(spec.width, np.float32) if spec.type == "int8" else None
            for place, row in enumerate(rows):
                values = work.values(name, row)
                if spec.type == "int8":  # its bytes do for numbers: what is measured is the moving of them
                    bits, scales = values.view(np.int8)[: len(values)], np.full(lengths[place], 0.01, np.float32)
                    writer.put(place, bits, scales=scales)
                else:
                    writer.put(place, values)
            writer.commit(join_hash(examples))
    write_file(folder / MANIFEST, to_json(build.manifest))
    build.finish()


# ------------------------------------------------------------------------------------------------------------- cold


def drop(folder: Path) -> None:
    """Forget the files' pages; no process may have them mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def cold_child(contestant: str, folder: Path, seed: int, *, small: bool) -> None:
    """In a fresh process: seconds and bytes from the disk for some batches; what opening reads is not counted."""
    work = workload("w1", small=small)
    batches = work.batch_rows(seed, 40)
    if contestant == "gather":
        read = gather(work, folder / "gather")
        before, started = disk_bytes(), time.perf_counter()
        for rows in batches:
            read(rows)
    else:
        cache, names = open_cache(folder / "ours"), list(work.columns)
        cache.batch(np.arange(0, work.rows, work.shard_rows), names)  # opens the shards
        options = LoadOptions(prefetch=contestant == "loader", reuse=True, as_stored=True)
        before, started = disk_bytes(), time.perf_counter()
        for _ in CacheLoader(cache, batches, names, options):
            pass
    seconds, wanted = time.perf_counter() - started, 0
    for rows in batches:
        wanted += sum(work.values(name, row).nbytes for name in names_of(work) for row in rows.tolist())
    print(json.dumps({"speed": wanted / seconds, "read": (disk_bytes() - before) / wanted}))


def names_of(work: Work) -> list[str]:
    return list(work.columns)


def run_cold(folder: Path, *, small: bool) -> None:
    work = workload("w1", small=small)
    write_gather(work, folder / "gather")
    write_ours(work, folder / "ours")
    contestants = {"gather": "default mmap, by hand", "cache": "cache, no thread", "loader": "cache, prefetch thread"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for turn in range(ROUNDS):
        for name in contestants:
            drop(folder)
            command = [sys.executable, "-m", "tests.bench.bench_cache", "--cold-child", name, "--folder", str(folder)]
            command += ["--seed", str(turn)] + (["--small"] if small else [])
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout))
    middle = {n: {k: statistics.median(one[k] for one in runs) for k in runs[0]} for n, runs in found.items()}
    print(f"\nW1, cold\n{'':<44}{'MB/s':>12}{'ratio':>9}{'read/wanted':>13}")
    for name, words in contestants.items():
        speed, read = middle[name]["speed"], middle[name]["read"]
        print(f"{words:<44}{speed / 1e6:>12,.0f}{speed / middle['gather']['speed']:>9.2f}{read:>13.2f}")


# ---------------------------------------------------------------------------------------------------------- writing


def run_write(folder: Path, *, small: bool) -> None:
    work, count = workload("w1", small=small), 500 if small else 10_000
    folder.mkdir(parents=True, exist_ok=True)
    spec = _manifest(work, {"hidden.03": {"kind": "token", "type": "float16", "width": 384}}).fields["hidden.03"]
    rows = [work.values("hidden.03", row) for row in range(count)]
    size = sum(row.nbytes for row in rows)
    batches, lengths = [], work.lengths[:count]
    for first in range(0, count, 32):
        part = np.arange(first, min(first + 32, count))
        values = np.zeros((len(part), int(lengths[part].max()), 384), np.float32)
        for i, row in enumerate(part):
            values[i, : lengths[row]] = rows[row].reshape(-1, 384)
        batches.append((part, torch.from_numpy(values), [str(row) for row in part]))

    def plain() -> None:
        with open(folder / "plain", "wb", buffering=0) as file:
            for row in rows:
                file.write(row.data)
            os.fsync(file.fileno())

    def put() -> None:
        writer = FieldShard(folder, "hidden.03", spec, shard=0, tokens=lengths)
        for place, row in enumerate(rows):
            writer.put(place, row)
        writer.commit("0" * 32)

    def write() -> None:
        writer = FieldShard(folder, "hidden.03", spec, shard=0, tokens=lengths)
        for part, values, ids in batches:
            writer.write(part, values, ids=ids)
        writer.commit("0" * 32)

    ways = {
        "write + fsync": plain,
        "cache: put, fsync, hash, receipt": put,
        "cache: padded float32 batches, range checked": write,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS):
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for path in (folder / "plain", folder / "hidden.03" / "00000.arrow"):
                path.unlink(missing_ok=True)
            os.sync()
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
    speeds = {name: size / statistics.median(times) for name, times in seconds.items()}
    table(f"Writing {size / 1e6:,.0f} MB", speeds, base="write + fsync", unit="MB/s", scale=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a twentieth of the rows")
    parser.add_argument("--no-peers", action="store_true", help="only the gather and the cache")
    parser.add_argument("--only", default="cold,w1,w2,w3,write", help="some of them, with commas")
    parser.add_argument("--folder", type=Path, default=None, help="where the data go; deleted afterwards")
    parser.add_argument("--cold-child", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cold_child:
        cold_child(given.cold_child, given.folder, given.seed, small=given.small)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        for part in given.only.split(","):
            place = Path(name) / part
            if part in ("w1", "w2", "w3"):
                run_work(part, place, small=given.small, peers=not given.no_peers)
            else:
                {"cold": run_cold, "write": run_write}[part](place, small=given.small)
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
