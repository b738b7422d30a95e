"""Caches of several teachers come in, one cache of what they say together goes out.

Check that they fit, find the rows that all have, then shard by shard: read, mix, write. Caches with the same rows in
the same shards, as dumps of one corpus are, are read straight through; else rows are gathered from where they lie.
Rows of one teacher that lie in several caches are put together by `softlabels.cache.concatenate`.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash

from softlabels.cache.arrow import read_numbers
from softlabels.cache.build import CacheBuild, derive_cache
from softlabels.cache.codec import DTYPES, decode
from softlabels.cache.combined import LOGITS, CacheShare, Combination, open_several, plan_combination
from softlabels.cache.files import hash_handle
from softlabels.cache.format import EXAMPLES, FieldSpec, Manifest, read_receipt, shard_file
from softlabels.cache.grouped import ShardGroup
from softlabels.cache.inside import open_inside
from softlabels.cache.reader import Cache
from softlabels.cache.settings import settings_files
from softlabels.cache.shards import SMALL, expect_shard, list_lengths, load_shard, read_shard
from softlabels.cache.workers import forked, processes_for, threaded
from softlabels.cache.writer import FieldShard, encode_batches, encode_rows, metadata
from softlabels.config import CombineOptions, package_versions
from softlabels.errors import CacheError
from softlabels.progress import progress

_THREADS = 4  # shards at a time: while one waits for the disk to sync, another is mixed
_GROUPS = 2  # the same, of groups of small shards: with more threads each waits for the others' Python
_PROCESSES, _MANY = 4, 32  # of groups too, where so many small shards are to be written
_FILES, _BYTES = 64, 1 << 25  # of a group at most: they are open until it ends, and a Ctrl-C waits for each thread's
_AHEAD = 2  # shards that the disk is asked for before their turn
_AT_ONCE = 1 << 15  # numbers of each teacher that are mixed at a time, to be in the processor's cache


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What a combination did."""

    cache: Path
    how: str  # logits, probabilities, median, or rows
    choose: str | None
    rows: int
    new_rows: int  # that were written this time
    fields: list[str]
    caches: list[CacheShare]
    seconds: float
    bytes: int


def combine(caches: Sequence[str | Path], *, out: Path, options: CombineOptions | None = None) -> CombineReport:
    """Write what the teachers of `caches` say together, of the rows that all have, into the cache `out`.

    Rows, texts, labels and tokenizer are the first cache's; the fields are `logits` and, with `options.keep`, each
    teacher's own as `logits.01`, `logits.02`, … An interrupted combination goes on with the same call. CacheError where
    caches do not fit each other, ConfigError where options do not fit them, saying what differs.
    """
    started, options = time.monotonic(), options or CombineOptions()
    opened = open_several(caches)
    plan = plan_combination(opened, options)
    kept = [f"{LOGITS}.{number:02d}" for number in range(1, len(opened) + 1)] if options.keep else []
    manifest = new_manifest(plan.manifest({name: plan.spec for name in (LOGITS, *kept)}))
    # of the teacher only what it is like: a head or factors belong to fields that are not here
    files = [
        file for file in small_files(opened[0]) if not file.startswith("teacher/") or file == "teacher/config.json"
    ]
    with derive_cache(Path(out), manifest, source=opened[0].path, files=files) as build:
        writer = _Writer(plan, build)
        new_rows = write_shards(build, writer.write, together=writer.together, fork=writer.local)
        final = build.finish()
    return CombineReport(
        cache=Path(out),
        how=options.mean,
        choose=options.choose,
        rows=plan.join.rows,
        new_rows=new_rows,
        fields=sorted(final.fields),
        caches=plan.shares(),
        seconds=time.monotonic() - started,
        bytes=sum(table.total for table in final.shards.values()),
    )


# -------------------------------------------------------------------------------------------- shared with --rows


def new_manifest(manifest: Manifest) -> Manifest:
    """`manifest` with the packages that write now."""
    versions = package_versions("torch", "transformers", "tokenizers", "pyarrow", "numpy")
    return manifest.model_copy(update={"versions": versions})


def small_files(cache: Cache) -> list[str]:
    """The files of the cache's small folders, by their paths inside it."""
    return [name for part in ("processor", "teacher", "tokenizer") for name in settings_files(cache.path, part)]


def write_shards(
    build: CacheBuild,
    write: Callable[[int, Sequence[str], ShardGroup], None],
    *,
    together: int = 1,
    fork: bool = False,
    description: str = "combine",
) -> int:
    """Call `write(shard, missing fields, group)` for each shard that misses some; the rows that they have.

    Some at a time; what is put into the group is committed with that of up to `together` shards, which one thread
    writes, or with `fork` one process, where there are many. What else `write` writes it commits itself.
    """
    size, total = build.manifest.dump.shard_rows, build.manifest.corpus.rows
    missing = build.all_missing(build.shards())
    rows = {shard: min(size, total - shard * size) for shard in missing}
    new = sum(rows.values())
    shards = list(missing)
    processes = processes_for(_PROCESSES) if fork and together > 1 and len(shards) >= _MANY else 1
    threads = _THREADS if together == 1 else _GROUPS
    together = min(together, max(1, -(-len(shards) // max(processes, threads))))
    groups = [shards[at : at + together] for at in range(0, len(shards), together)]

    def write_group(group: Sequence[int]) -> int:
        with ShardGroup(build.folder) as files:
            for shard in group:
                write(shard, missing[shard], files)
        return sum(rows[shard] for shard in group)

    workers = (
        forked(write_group, groups, processes)
        if processes > 1
        else threaded(write_group, groups, threads, name="combine")
    )
    with workers as counts, progress(total, description=description, done=total - new) as update:
        for count in counts:
            update(count)
    return new


def open_whole(cache: Cache, field: str, shard: int) -> pa.Table:
    """The checked table of a shard whose bytes are those that were written; CacheError where they are not."""
    return read_shard(load_whole(cache, field, shard), cache.path, cache.manifest, field, shard)


def load_whole(cache: Cache, field: str, shard: int) -> pa.Buffer:
    """The bytes of a shard, hashed; CacheError where they are not those that were written."""
    cache.have(field, shard)
    data = load_shard(cache.path, cache.manifest, field, shard)
    if xxhash.xxh3_128(data).hexdigest() != cache.manifest.shards[field].hash(shard):
        raise damaged(cache, field, shard)
    return data


def damaged(cache: Cache, field: str, shard: int) -> CacheError:
    return CacheError(
        f"{shard_file(cache.path, field, shard)} is not the file that was written: `softlabels verify {cache.path}` "
        f"lists all that is damaged. Copy it again from where the cache came from"
    )


def write_tables(group: ShardGroup, tables: Sequence[pa.Table], shard: int, *, join: str, truncated: int) -> None:
    """Write a shard of `examples` whose rows are those of `tables`, one after the other."""
    whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables]).combine_chunks()
    whole = whole.replace_schema_metadata(metadata(EXAMPLES, shard))
    data = encode_batches(whole.to_batches(), whole.schema)
    group.put(
        EXAMPLES,
        shard,
        data,
        rows=whole.num_rows,
        tokens=count_tokens(whole),
        join=join,
        truncated=truncated,
    )


def count_tokens(examples: pa.Table) -> int:
    """How many tokens the rows of a shard of `examples`, or of a part of it, have."""
    return sum(len(chunk.flatten()) for chunk in examples.column("input_ids").chunks)


def join_of(tables: Sequence[pa.Table]) -> str:
    """The `join` of a shard of `examples` whose rows are those of `tables`: see the format."""
    hasher = xxhash.xxh3_128()
    for table in tables:
        for batch in table.select(["id", "token_hash"]).to_batches():
            hashes = read_numbers(batch.column("token_hash"))
            wide = pa.FixedSizeBinaryArray.from_buffers(pa.binary(8), len(hashes), [None, pa.py_buffer(hashes)])
            names = batch.column("id").cast(pa.large_binary())
            rows = pc.binary_join_element_wise(names, wide.cast(pa.large_binary()), pa.scalar(b"\0", pa.large_binary()))
            ends = np.frombuffer(rows.buffers()[1], "<i8")[rows.offset : rows.offset + len(rows) + 1]
            hasher.update(memoryview(rows.buffers()[2])[ends[0] : ends[-1]])
    return hasher.hexdigest()


def counted(cache: Cache, field: str) -> list[int]:
    """Of each shard what its receipt counts: rows cut to the max_length of `examples`, of others values clipped.

    Where a receipt is lost, only the sum is known: the first shard has it.
    """
    manifest, shards = cache.manifest, range(len(cache.manifest.shard_rows))
    total = manifest.corpus.truncated if field == EXAMPLES else manifest.shards[field].clipped
    if not total:
        return [0] * len(shards)
    receipts = [read_receipt(cache.path, field, shard) for shard in shards]
    known = [receipt.truncated + receipt.clipped for receipt in receipts if receipt is not None]
    return known if len(known) == len(shards) and sum(known) == total else [total] + [0] * (len(shards) - 1)


@contextmanager
def field_shard(
    build: CacheBuild, field: str, shard: int, tokens: np.ndarray, targets: np.ndarray | None = None
) -> Iterator[FieldShard]:
    """A shard of a field to be written and committed inside the block; where that fails, nothing of it stays."""
    spec = build.manifest.fields[field]
    writer = FieldShard(build.folder, field, spec, shard=shard, tokens=tokens, targets=targets)
    try:
        yield writer
    finally:
        writer.discard()


# --------------------------------------------------------------------------------------------------------- mixing


class _Writer:
    """Writes the shards of a combination."""

    def __init__(self, plan: Combination, build: CacheBuild) -> None:
        self.plan, self.build = plan, build
        self.first = plan.caches[0]
        self.whole = plan.join.kept is None  # every shard has the rows of the first cache's
        self.local = all(cache.store is None for cache in plan.caches)  # connections outlive no fork
        self.by_label = plan.mixing.options.choose == "label"
        self.cut = counted(self.first, EXAMPLES)
        self._one_by_one = threading.Lock()  # gathers from caches whose shards are opened on the way
        anything = bool(build.all_missing(build.shards()))
        gathered = [cache for number, cache in enumerate(plan.caches) if anything and not self._straight(number)]
        for cache in gathered:
            _check_hashes(cache, LOGITS)
        size = 4 * plan.spec.width * build.manifest.dump.shard_rows
        self.small = plan.spec.kind == "row" and size <= SMALL  # whether a shard of logits has few bytes
        fields = 1 + len(build.manifest.fields)
        self.together = max(1, min(_FILES // fields, _BYTES // (size * fields))) if self.small else 1

    def write(self, shard: int, missing: Sequence[str], group: ShardGroup) -> None:
        size = self.build.manifest.dump.shard_rows
        rows = np.arange(shard * size, min((shard + 1) * size, self.plan.join.rows))
        if (coming := shard + _AHEAD) in self.build.shards():
            self._expect(coming, examples=EXAMPLES in missing)
        if self.whole:
            join = self.first.manifest.join[32 * shard : 32 * shard + 32]
            tables = self._copy_examples(shard, join, group if EXAMPLES in missing else None)
        else:
            tables = self._gather_examples(rows)
            join = join_of(tables)
            if EXAMPLES in missing:
                self._write_examples(tables, shard, join, group)
        fields = [field for field in missing if field != EXAMPLES]
        if not fields:
            return
        pattern = _Pattern()
        said = [self._said(number, shard, rows, pattern) for number in range(len(self.plan.caches))]
        for field in fields:
            values = self._mixed(said, tables) if field == LOGITS else said[int(field[7:]) - 1]
            if self.small:
                tokens = self.first.manifest.shard_tokens[shard] if self.whole else sum(map(count_tokens, tables))
                data = encode_rows(field, self.plan.spec, shard, values.numpy())
                group.put(field, shard, data, rows=len(rows), tokens=tokens, join=join)
                continue
            lengths = np.concatenate([list_lengths(table, "input_ids") for table in tables])
            with field_shard(self.build, field, shard, lengths) as writer:
                writer.put_run(0, values.numpy().reshape(-1), rows=len(lengths))
                writer.commit(join)

    def _straight(self, number: int) -> bool:
        """Whether a cache has the shards of the result."""
        return self.whole and (number == 0 or self.plan.join.matched[number - 1].aligned)

    def _expect(self, shard: int, *, examples: bool) -> None:
        if self.whole and examples:
            expect_shard(self.first.path, self.first.manifest, EXAMPLES, shard)
        for number, cache in enumerate(self.plan.caches):
            if self._straight(number):
                expect_shard(cache.path, cache.manifest, LOGITS, shard)

    def _copy_examples(self, shard: int, join: str, group: ShardGroup | None) -> list[pa.Table]:
        """A shard of the first cache as it is, into `group` where one is given; none where nothing is asked of it."""
        if group is None and self.small and not self.by_label:
            return []
        manifest, data = self.first.manifest, load_whole(self.first, EXAMPLES, shard)
        table = read_shard(data, self.first.path, manifest, EXAMPLES, shard)
        if group is not None:
            group.put(
                EXAMPLES,
                shard,
                data,
                rows=len(table),
                tokens=manifest.shard_tokens[shard],
                join=join,
                truncated=self.cut[shard],
                checksum=manifest.shards[EXAMPLES].hash(shard),
            )
        return [table]

    def _gather_examples(self, rows: np.ndarray) -> list[pa.Table]:
        own, size = self.plan.join.rows_of(0, rows), self.first.manifest.dump.shard_rows
        return [
            open_whole(self.first, EXAMPLES, source).take(own[own // size == source] % size)
            for source in np.unique(own // size).tolist()
        ]

    def _write_examples(self, tables: Sequence[pa.Table], shard: int, join: str, group: ShardGroup) -> None:
        longest = self.first.manifest.dump.max_length
        cut = sum(int((list_lengths(table, "input_ids") >= longest).sum()) for table in tables)
        # which rows were cut is not kept; those that were are as long as can be
        write_tables(group, tables, shard, join=join, truncated=min(cut, sum(self.cut)))

    def _labels(self, tables: Sequence[pa.Table]) -> torch.Tensor:
        """(V,) the class of every row, or of every token where teachers speak of tokens."""
        if self.plan.spec.kind == "row":
            parts = [read_numbers(table.column("label")) for table in tables]
        else:
            parts = [read_numbers(table.column("labels")) for table in tables]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def _said(self, number: int, shard: int, rows: np.ndarray, pattern: _Pattern) -> torch.Tensor:
        """(V, C) float32: what a teacher says of the rows of a shard, or of their tokens, classes in order."""
        plan, cache = self.plan, self.plan.caches[number]
        if self._straight(number):
            stored = pattern.read(cache, shard).reshape(-1, plan.spec.width)
            values = plan.mixing.align(number, decode(stored, cache.fields[LOGITS]))
        else:
            with self._one_by_one:
                values = plan.read(number, rows)
                if values.ndim == 3:
                    lengths = cache.lengths[plan.join.rows_of(number, rows)]
                    values = values[torch.arange(values.shape[1]) < torch.from_numpy(lengths)[:, None]]
        # what is no number makes both extremes so
        if values.numel() and not all(math.isfinite(extreme) for extreme in values.aminmax()):
            raise CacheError(f"cache {cache.path} has NaN or infinite logits: its teacher is broken. Leave it out")
        return values.contiguous()

    def _mixed(self, said: Sequence[torch.Tensor], tables: Sequence[pa.Table]) -> torch.Tensor:
        labels = self._labels(tables) if self.by_label else None
        mixed = torch.empty_like(said[0])
        step = max(1, _AT_ONCE // self.plan.spec.width)
        for at in range(0, len(mixed), step):
            part = slice(at, at + step)
            said_here = [values[part] for values in said]
            mixed[part] = self.plan.mixing.mix(said_here, None if labels is None else labels[part])
        return mixed


class _Pattern:
    """The logits of one shard of several caches, whose files are mostly the same but for the values.

    A file that has, outside of the values, the very bytes of one that was checked has its values at the same place: to
    see that takes a tenth of the time that the checks take, which for files of 50 kB is most of all time.
    """

    def __init__(self) -> None:
        self.around: tuple[bytes, bytes] | None = None  # the values of the file that was checked
        self.spec: FieldSpec | None = None

    def read(self, cache: Cache, shard: int) -> np.ndarray:
        """All stored values of the shard, one after the other."""
        data, spec = load_whole(cache, LOGITS, shard), cache.fields[LOGITS]
        if self.around is not None and self.spec == spec:
            before, behind = self.around
            view, stop = memoryview(data).cast("B"), len(data) - len(behind)
            if len(before) < stop and view[: len(before)] == before and view[stop:] == behind:
                stored = np.frombuffer(view[len(before) : stop], DTYPES[spec.type])
                return stored if stored.flags.writeable else stored.copy()  # torch takes nothing that can't be written
        chunks = read_shard(data, cache.path, cache.manifest, LOGITS, shard).column(0).chunks
        parts = [read_numbers(chunk) for chunk in chunks]
        if len(parts) == 1 and parts[0].size and self.around is None:
            start = parts[0].__array_interface__["data"][0] - data.address
            view = memoryview(data).cast("B")
            self.around, self.spec = (bytes(view[:start]), bytes(view[start + parts[0].nbytes :])), spec
        return np.concatenate(parts)


def _check_hashes(cache: Cache, field: str) -> None:
    """CacheError where a shard of a field is not the file that was written."""
    for shard in range(len(cache.manifest.shard_rows)):
        handle = open_inside(cache.path, field, shard_file(Path(), field, shard).name)
        try:
            if hash_handle(handle) != cache.manifest.shards[field].hash(shard):
                raise damaged(cache, field, shard)
        finally:
            os.close(handle)
