"""Mutated caches, thousands of them: `python -m tests.cache.fuzz FIRST COUNT PROGRESS` in a process of its own.

Seed by seed a small cache of every kind and codec gets one of its files changed, and everything is read from it. It
must read, in the right shapes, or end in a CacheError. The seed goes to the file PROGRESS before each trial, so that
whoever started this process knows which one killed it; memory is limited, so that a hostile size is a finding too.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softlabels.cache.files import write_file
from softlabels.cache.format import EXAMPLES, MANIFEST, RECEIPT, to_json
from softlabels.cache.head import OutputHead, save_head
from softlabels.cache.reader import Cache, open_cache
from softlabels.cache.settings import folder_receipt
from softlabels.cache.verify import verify_cache
from softlabels.cache.vocab import PACKED, STATES, open_vocab
from softlabels.cache.vocab_codec import pack, to_plain
from softlabels.errors import CacheError
from softlabels.progress import quiet
from softlabels.truncated import TruncatedLogits, truncate
from softlabels.types import LANGUAGE_MODELS, NO_LABEL
from tests.cache.made import VOCABULARY, rows_of, write_cache

LENGTHS = [3, 6, 2, 5]
SHARD_ROWS = 2
FIELDS: dict[str, dict[str, Any]] = {
    "logits": {"kind": "row", "type": "float32", "width": 2},
    "hidden.01@cls": {"kind": "row", "type": "int8", "width": 4},
    "hidden.01": {"kind": "token", "type": "float16", "width": 4},
    "hidden.02": {"kind": "token", "type": "int8", "width": 4},
    "attention.01": {"kind": "pair", "type": "bfloat16", "width": 2, "heads": 2},
}
MEMORY = 1 << 30  # bytes of address space beside what the process has when it begins
NUMBERS = [0, 1, -1, 7, 8, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**47, 2**62, -(2**63)]
JSON_VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**400, 2**63, 2**48, 1e308, "", "x" * 5000, "../../etc/passwd", "/etc/passwd",
    "\x00", "examples", "é" * 9, [], {}, [[]], [1] * 5000, {"a": {"b": []}}, "0" * 32, "f" * 24, [2, 2], [1, 3], "int8",
]  # fmt: skip


def base(folder: Path) -> dict[str, bytes]:
    """Make the cache in `folder`; its files."""
    rng = np.random.default_rng(0)
    shapes: dict[str, Callable[[int, int], tuple[int, ...]]] = {
        "row": lambda width, length: (width,),
        "token": lambda width, length: (length, width),
        "pair": lambda width, length: (width, length, length),
    }
    values = {
        name: [rng.standard_normal(shapes[spec["kind"]](spec["width"], n)).astype(np.float32) for n in LENGTHS]
        for name, spec in FIELDS.items()
    }
    write_cache(folder, rows_of(LENGTHS), FIELDS, values, shard_rows=SHARD_ROWS)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def base_language(folder: Path) -> dict[str, bytes]:
    """Make a language model's cache in `folder`, its vocabulary kept in every form; its files."""
    rows = [
        replace(row, label=NO_LABEL, labels=np.append(row.input_ids[1:], NO_LABEL).astype(np.int32))
        for row in rows_of(LENGTHS)
    ]
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(torch.randn(VOCABULARY, 4, generator=generator), torch.randn(VOCABULARY, generator=generator))
    values: dict[str, list[np.ndarray]] = {}
    for length in LENGTHS:
        states = torch.randn(length - 1, 4, generator=generator)
        kept = truncate(head(states), k=3, samples=2, generator=generator)
        parts = {f"vocab_{name}": part for name, part in to_plain(kept).items()}
        parts |= {PACKED: pack(kept), STATES: states.numpy()}
        for name, part in parts.items():
            values.setdefault(name, []).append(part.astype(np.int32) if part.dtype == np.uint16 else part)
    types = {"vocab_ids": "uint16", "vocab_sampled_ids": "uint16", PACKED: "uint8"}
    fields = {
        name: {
            "kind": "target",
            "type": types.get(name, str(parts[0].dtype)),
            "width": parts[0].shape[1],
            "form": {STATES: "exact", PACKED: "topk=3,samples=2,packed"}.get(name, "topk=3,samples=2"),
        }
        for name, parts in values.items()
    }
    write_cache(folder, rows, fields, values, shard_rows=SHARD_ROWS, task="causal-lm")
    (folder / "teacher").mkdir()
    save_head(folder, head)
    write_file(folder / RECEIPT, to_json(folder_receipt(folder, (folder / MANIFEST).read_bytes())))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_vocabulary(cache: Cache, rows: np.ndarray) -> None:
    """The logits of a language model's cache, from each of its forms."""
    for left_out in ([], [STATES], [STATES, "vocab_ids"]):
        other = open_cache(cache.path)
        other.fields = {name: spec for name, spec in other.fields.items() if name not in left_out}
        vocab = open_vocab(other)
        batch = other.batch(rows, vocab.fields)
        found = vocab(batch.teacher)
        count = int((batch.tokens.labels != NO_LABEL).sum())
        if isinstance(found, TruncatedLogits):
            assert len(found.ids) == count and (not count or int(found.ids.max()) < vocab.vocab_size)
        else:
            assert found.shape == (count, vocab.vocab_size)


def read_all(folder: Path) -> None:
    """Everything that a reader offers, by rows in an order of its own; AssertionError for wrong shapes."""
    cache, rows = open_cache(folder), np.array([3, 0, 2, 1])
    rows = rows[rows < cache.rows]
    tokens = cache.tokens(rows)
    signals = cache.signals(rows, list(cache.fields))
    longest = tokens.input_ids.shape[1]
    for name, spec in cache.fields.items():
        value = signals.get(name)
        assert (spec.kind == "target" or value.shape[0] == len(rows)) and value.isnan().sum() >= 0
        if spec.kind == "target":
            assert value.shape[1] == spec.width
        elif spec.kind == "pair":
            assert value.shape == (len(rows), spec.width, longest, longest)
        elif spec.kind == "row":
            assert value.shape == (len(rows), spec.width) and cache.column(name).shape == (cache.rows, spec.width)
    assert int(tokens.input_ids.max()) < cache.manifest.teacher.vocab_size or not tokens.attention_mask.any()
    assert len(cache.ids) == len(cache.labels) == len(cache.token_hashes) == cache.rows
    assert sum(len(text) for text, _ in cache.texts()) >= 0 if cache.manifest.dump.text else True
    if cache.manifest.teacher.task in LANGUAGE_MODELS and cache.fields.keys() & {STATES, "vocab_ids", PACKED}:
        read_vocabulary(cache, rows)
    cache.used_ids(rows), cache.identity(), cache.teacher_config()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to three of its places changed."""
    new = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if len(new) < 16:
            break
        at = rng.randrange(len(new))
        match rng.randrange(9):
            case 0 | 1:
                new[at] ^= 1 << rng.randrange(8)
            case 2:
                new[at] = rng.choice([0, 1, 4, 8, 127, 128, 255])
            case 3 | 4:  # a number of 2, 4 or 8 bytes in its usual place: lengths and offsets lie there
                size, form = rng.choice([(2, "<H"), (4, "<I"), (8, "<Q")])
                at = at // size * size
                number = rng.choice([*NUMBERS, len(new), len(new) - 8, rng.randrange(len(new)), rng.getrandbits(64)])
                if at + size <= len(new):
                    struct.pack_into(form, new, at, number % 256**size)
            case 5:  # some of it over some other of it
                count, to = rng.randrange(1, 65), rng.randrange(len(new))
                piece = new[at : at + count]
                new[to : to + len(piece)] = piece[: len(new) - to]
            case 6:
                del new[at : at + rng.randrange(1, 65)]
            case 7:
                new[at:at] = rng.randbytes(rng.randrange(1, 33))
            case _:
                del new[at:]
    return bytes(new)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A value somewhere in it is another, or is gone, or has another name; or bytes of it change."""
    how = rng.randrange(10)
    if how == 0:
        return mutate(data, rng)
    if how == 1:
        return rng.choice(
            [b"", b"[" * 100_000, b'{"a":' * 50_000, b"nul", b"\xff\xfe", b"[1,2]", b'"x"', data[:-2], data * 2]
        )
    value = json.loads(data)
    place, key = value, rng.choice(sorted(value))
    while rng.random() < 0.6 and isinstance(place[key], dict | list) and place[key]:
        place = place[key]
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
    match rng.randrange(4):
        case 0 if isinstance(place, dict):
            place[rng.choice(["../x", "a", "", "logits", "x" * 999, "hidden.99"])] = place.pop(key)
        case 1:
            del place[key]
        case 2 if isinstance(place[key], int | str):
            old = place[key]
            place[key] = (
                old + rng.choice([-1, 1, 2**40])
                if isinstance(old, int)
                else mutate(old.encode(), rng).decode("latin-1")
            )
        case _:
            place[key] = rng.choice(JSON_VALUES)
    return json.dumps(value).encode()


def resize(manifest: bytes, name: str, size: int) -> bytes:
    """The manifest of someone who gives the right sizes with the wrong files."""
    facts = json.loads(manifest)
    field, file = name.split("/")
    shard = int(file[:5])
    sizes = facts["shards"][field]["sizes"]
    facts["shards"][field]["sizes"] = f"{sizes[: 12 * shard]}{size:012x}{sizes[12 * shard + 12 :]}"
    return json.dumps(facts).encode()


def odd_file(path: Path, rng: random.Random) -> None:
    """Something that is no file in the place of one."""
    path.unlink()
    match rng.randrange(6):
        case 0:
            path.symlink_to("/etc/passwd")
        case 1:
            path.symlink_to(path.with_name("00001.arrow"))
        case 2:
            os.mkfifo(path)
        case 3:
            path.mkdir()
        case 4:
            path.symlink_to("/dev/zero")
        case _:
            path.symlink_to(path.parent / ".." / ".." / "elsewhere")


class Trials:
    """The cache on disk, and back to what it was after each trial."""

    def __init__(self, folder: Path, make: Callable[[Path], dict[str, bytes]] = base) -> None:
        self.folder = folder
        self.files = make(folder)
        self.arrows = sorted(name for name in self.files if name.endswith(".arrow"))
        self.outcomes: Counter[str] = Counter()

    def trial(self, seed: int) -> None:
        """One mutated cache. Whatever is raised but CacheError is a finding."""
        rng = random.Random(seed)
        changed = self._change(rng)
        try:
            read_all(self.folder)
            self.outcomes["read"] += 1
        except CacheError:
            self.outcomes["refused"] += 1
        same = all(self._bytes(name) == self.files[name] for name in changed)
        if seed % 20 == 0:
            with quiet():
                verdict = verify_cache(self.folder)
            told = [fault for fault in verdict.faults if not fault.message.startswith("the tokenizer in")]  # has none
            assert same or told, f"verify finds nothing wrong with {changed}"
        for name in changed:
            self._restore(name)

    def _change(self, rng: random.Random) -> list[str]:
        how = rng.random()
        if how < 0.12:
            self._put(MANIFEST, mutate_json(self.files[MANIFEST], rng))
            return [MANIFEST]
        if how < 0.15:
            name = rng.choice([name for name in self.files if name.endswith(".json") and name != MANIFEST])
            self._put(name, mutate_json(self.files[name], rng))
            return [name]
        name = rng.choice(self.arrows)
        if how < 0.17:
            odd_file(self.folder / name, rng)
            return [name]
        data = self.files[rng.choice(self.arrows)] if how < 0.19 else mutate(self.files[name], rng)
        self._put(name, data)
        if len(data) == len(self.files[name]) or rng.random() < 0.1:
            return [name]
        self._put(MANIFEST, resize(self.files[MANIFEST], name, len(data)))
        return [name, MANIFEST]

    def _put(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def _bytes(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() and not path.is_symlink() else None

    def _restore(self, name: str) -> None:
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.is_symlink() or not path.is_file():
            path.unlink(missing_ok=True)
        path.write_bytes(self.files[name])


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(first: int, count: int, progress: Path) -> None:
    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    place = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
    try:
        both = [Trials(Path(place) / "cache"), Trials(Path(place) / "language", base_language)]
        for trials in both:
            read_all(trials.folder)
            with quiet():
                verify_cache(trials.folder)  # so that all that is ever imported is there before memory is limited
        limit_memory()
        mark = os.open(progress, os.O_WRONLY | os.O_CREAT, 0o644)
        for seed in range(first, first + count):
            os.pwrite(mark, f"{seed:>12}".encode(), 0)
            both[seed % 3 == 0].trial(seed)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(both[0].outcomes + both[1].outcomes))


if __name__ == "__main__":
    assert EXAMPLES not in FIELDS
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
