"""What ties the rows of `examples` to the rest: token hashes recomputed from the tokens, the join from ids and them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash

from softlabels.cache.arrow import read_numbers
from softlabels.cache.format import Manifest, TeacherCard
from softlabels.cache.shards import count_targets, list_lengths
from softlabels.tokens import TARGET_FOLLOWS
from softlabels.types import IMAGES, NO_LABEL, SEQ2SEQ, TOKEN_LABELS, VECTOR_LABELS, Task


class Members:
    """The examples of a cache, shard by shard, held against the manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.lengths: dict[int, np.ndarray] = {}  # shard → (rows,) tokens, of the shards that were added
        self.targets: dict[int, np.ndarray] = {}  # the same, of targets, where the task has some
        self._hashes: dict[int, np.ndarray] = {}  # shard → (rows,) of their ids: 8 bytes a row, not the ids
        self._labelled = 0

    def add(self, table: pa.Table, shard: int) -> str | None:
        """Take in a checked shard of `examples`; what does not fit in it, or None."""
        tokens = list_lengths(table, "input_ids")
        self.lengths[shard] = tokens
        self._labelled += int(labelled_rows(table, self.manifest.teacher.task).sum())
        if self.manifest.teacher.task in TOKEN_LABELS:
            self.targets[shard] = count_targets(table)
        names = [name.encode() for name in table.column("id").to_pylist()]
        self._hashes[shard] = np.fromiter(map(xxhash.xxh3_64_intdigest, names), np.uint64, len(names))
        if int(tokens.sum()) != self.manifest.shard_tokens[shard]:
            return f"it has {int(tokens.sum())} tokens and not the {self.manifest.shard_tokens[shard]} of the manifest"
        stored = read_numbers(table.column("token_hash"))
        images = self.manifest.teacher.task == IMAGES  # whose pixels are not here to hash again
        hashes = stored if images else token_hashes(table, self.manifest.teacher)
        wrong = np.flatnonzero(hashes != stored)
        if len(wrong):
            name = names[wrong[0]].decode()
            return f"the token hash of '{name}' and {len(wrong) - 1} other row(s) isn't that of their tokens"
        join = xxhash.xxh3_128()
        for name, value in zip(names, hashes.tolist(), strict=True):
            join.update(name + b"\0" + value.to_bytes(8, "little"))
        if join.hexdigest() != self.manifest.join[32 * shard : 32 * shard + 32]:
            return "its ids and token hashes are not those of the manifest's `join`"
        return None

    def problems(self) -> list[str]:
        """What does not fit in all shards together, as far as they were added."""
        found, card = [], self.manifest.corpus
        if self._hashes:
            hashes = np.sort(np.concatenate(list(self._hashes.values())))
            doubled = hashes[1:][hashes[1:] == hashes[:-1]]
            if len(
                doubled
            ):  # 64 bits: two different ids with one hash come once in a thousand caches of a billion rows
                shards = [str(shard) for shard, part in self._hashes.items() if np.isin(doubled[0], part)]
                found.append(f"an id is there more than once, in shard {' and '.join(shards)}")
        by_row = self.manifest.teacher.task not in TOKEN_LABELS  # a tag may have been cut off with its word
        if by_row and len(self._hashes) == len(self.manifest.shard_rows) and self._labelled != card.labelled:
            found.append(f"{self._labelled} rows have a label, and not the {card.labelled} of the manifest")
        return found


def labelled_rows(table: pa.Table, task: Task) -> np.ndarray:
    """(rows,) bool: which rows of a whole shard have a label of their own, or numbers for labels."""
    if task not in VECTOR_LABELS:
        return read_numbers(table.column("label")) != NO_LABEL
    numbers = read_numbers(table.column("labels")).reshape(table.num_rows, -1)
    return ~np.isnan(numbers).any(axis=1)


def token_hashes(table: pa.Table, card: TeacherCard) -> np.ndarray:
    """(rows,) uint64: xxh3-64 over each row's tokens as int32, its token types and its target, where there are some."""
    none = memoryview(b"")
    ids = memoryview(read_numbers(table.column("input_ids")).astype("<i4").tobytes())
    kinds = memoryview(read_numbers(table.column("token_type_ids")).tobytes()) if card.token_types else none
    labels = memoryview(read_numbers(table.column("labels")).astype("<i4").tobytes()) if card.task == SEQ2SEQ else none
    ends = np.cumsum(list_lengths(table, "input_ids")).tolist()
    target_ends = np.cumsum(list_lengths(table, "labels")).tolist() if card.task == SEQ2SEQ else [0] * len(ends)
    hashes, start, target_start = np.zeros(len(ends), np.uint64), 0, 0
    for row, (end, target_end) in enumerate(zip(ends, target_ends, strict=True)):
        hasher = xxhash.xxh3_64(ids[4 * start : 4 * end])
        if card.token_types:
            hasher.update(kinds[start:end])
        if card.task == SEQ2SEQ:
            hasher.update(TARGET_FOLLOWS)
            hasher.update(labels[4 * target_start : 4 * target_end])
        hashes[row], start, target_start = hasher.intdigest(), end, target_end
    return hashes
