"""Whether a cache is whole: every file hashed, every shard's structure, and that all belong together.

A folder comes in, a `Verdict` goes out that names each fault: the field, the shard, what is wrong. With `repair`, what
is proven bad is removed and the cache marked unfinished, so that the dump command that made it writes just that again.

Receipts and receipt.json are not needed for reading, and a copy of some fields may lack them: that is told as a note.
Where they are there, they must agree with the manifest.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from softlabels.cache.build import requeue, tokenizer_hash
from softlabels.cache.files import hash_handle, lock, temporary_files
from softlabels.cache.format import (
    EXAMPLES,
    MANIFEST,
    MANIFEST_LIMIT,
    RECEIPT,
    RECEIPT_LIMIT,
    FolderReceipt,
    Manifest,
    Receipt,
    load_folder_receipt,
    load_receipt,
    read_manifest,
    receipt_file,
    shard_file,
    to_json,
)
from softlabels.cache.inside import open_inside, read_inside
from softlabels.cache.licence import FACTS
from softlabels.cache.members import Members
from softlabels.cache.quick import wrong_sizes
from softlabels.cache.settings import FOLDERS, folder_receipt, load_tokenizer, read_processor_hash
from softlabels.cache.shards import check_lengths, open_shard
from softlabels.cache.signing import SIGNATURE, SUMS, signature_faults
from softlabels.errors import CacheError, ConfigError
from softlabels.progress import Update, progress
from softlabels.types import IMAGES

Kind = Literal[
    "unfinished",  # the dump that wrote the cache has not ended
    "missing",  # a shard's file isn't there
    "cut",  # a file has not as many bytes as it must have
    "changed",  # the bytes are not those that were written
    "swapped",  # the file is another shard of this cache
    "foreign",  # of another cache, or a file that the manifest doesn't know
    "structure",  # the bytes are as the manifest says, but no shard of this format
    "join",  # ids, token hashes and tokens don't fit each other, or the manifest
    "receipt",  # a receipt is damaged, or says other than the manifest
    "manifest",  # the manifest, or the files of tokenizer/ and teacher/
    "signature",  # nobody who was named vouches for these bytes
]
BESIDE = ("README.md", FACTS, SUMS, SIGNATURE)  # what is said of a cache, and no part of it
_THREADS = 2  # that hash: one waits for the disk while the other computes
_AHEAD = 4  # files that are hashed before their turn


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    field: str | None  # None: it is of the whole cache
    shard: int | None
    kind: Kind
    message: str
    remove: tuple[str, ...] = ()  # files, by their paths inside the cache, that are proven bad: what `repair` removes


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify_cache` found."""

    cache: Path
    fields: list[str]  # that were looked at
    shards: int  # files that were hashed
    bytes: int
    seconds: float
    faults: list[Fault]
    notes: list[str]  # what is no fault, but worth knowing
    removed: list[str] = field(default_factory=list)  # by `repair`
    quick: bool = False  # no shard was read

    @property
    def whole(self) -> bool:
        return not self.faults


def verify_cache(
    path: str | Path,
    *,
    fields: Sequence[str] | None = None,
    repair: bool = False,
    signers: Sequence[str] | None = None,
    quick: bool = False,
) -> Verdict:
    """Check the cache at `path`: all of it, or only `fields` and `examples`.

    Reads every byte once; with `quick` no shard, and tells whether all are there and as long as they must be.
    CacheError where there is no cache, or while it is being written. With `repair`, the files that are proven bad are
    removed, and the dump that made the cache has to be given again. With `signers` (fingerprints of keys, see
    `softlabels.cache.signing`) it is a fault where none of them vouches for every byte of it; all is read twice.
    """
    if repair and signers is not None:
        raise ConfigError("a repair changes what was signed: give --signer to a verify without --repair")
    if quick and signers is not None:
        raise ConfigError("a signature is of every byte, and --quick reads none: give --signer to a verify without it")
    started, folder = time.monotonic(), Path(path)
    if not folder.is_dir():
        read_manifest(folder)  # says so
    with lock(folder, shared=not repair):
        check = _Check(folder)
        check.run(fields, quick=quick)
        if signers is not None and check.manifest is not None and check.manifest.complete:
            wrong = list(signature_faults(folder, check.manifest, signers, check.fields))
            for line in wrong:
                check.fault("signature", line)
            if not wrong:
                check.notes.append(f"signed, every byte, by {' or '.join(signers)}")
        removed = _repair(check) if repair else []
    return Verdict(
        cache=folder,
        fields=check.fields,
        shards=check.hashed,
        bytes=check.bytes,
        seconds=time.monotonic() - started,
        faults=check.faults,
        notes=check.notes,
        removed=removed,
        quick=quick,
    )


# ------------------------------------------------------------------------------------------------------- checking


@dataclass(slots=True)
class Counted:
    """Of a field's receipts."""

    receipts: int = 0
    truncated: int = 0
    clipped: int = 0


class _Check:
    """One pass over a cache, and what it found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest | None = None
        self.fields: list[str] = []
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.sums: dict[str, Counted] = {}
        self.hashed = self.bytes = 0

    def fault(
        self, kind: Kind, message: str, name: str | None = None, shard: int | None = None, *, remove: Sequence[str] = ()
    ) -> None:
        self.faults.append(Fault(name, shard, kind, message, tuple(remove)))

    def run(self, fields: Sequence[str] | None, *, quick: bool) -> None:
        try:
            self.manifest = manifest = read_manifest(self.folder)
        except CacheError as error:
            if not os.path.lexists(self.folder / MANIFEST):
                raise  # no cache at all
            self.fault("manifest", f"{error}. Copy {MANIFEST} again; nothing else can be checked without it")
            return
        unknown = set(fields or ()) - manifest.fields.keys()
        if unknown:
            raise CacheError(
                f"cache {self.folder} has no field {', '.join(sorted(unknown))}; it has {', '.join(manifest.fields)}"
            )
        self.fields = sorted(manifest.fields if fields is None else set(fields))
        self._check_leftovers(manifest, quick=quick)
        self._check_settings(manifest)
        if manifest.complete and quick:
            _check_sizes(self, manifest)
        elif manifest.complete:
            _check_shards(self, manifest)
        else:
            _check_begun(self, manifest)

    def _check_leftovers(self, manifest: Manifest, *, quick: bool) -> None:
        """Notes of what a stopped writer left; with `quick` beside the fields' folders only, which aren't listed."""
        found = temporary_files(self.folder, inside=not quick)
        left = [path.relative_to(self.folder).as_posix() for path in found]
        if left:
            self.notes.append(
                f"{len(left)} temporary file(s) of a dump that was stopped ({_some(left)}): the next dump removes them"
            )
        known = {MANIFEST, RECEIPT, EXAMPLES, *FOLDERS, *manifest.fields, *BESIDE}
        strange = sorted(name for name in os.listdir(self.folder) if name not in known and name not in left)
        if strange:
            self.notes.append(f"{_some(strange)}: not part of the cache")

    def _check_settings(self, manifest: Manifest) -> None:
        """The manifest itself, tokenizer/ and teacher/: by receipt.json, and the tokenizer by the manifest too."""
        try:
            now = folder_receipt(self.folder, read_inside(self.folder, MANIFEST, limit=MANIFEST_LIMIT)).files
            self._compare_settings(now, load_folder_receipt(self.folder))
        except FileNotFoundError:
            if manifest.complete:
                self.notes.append(f"{RECEIPT} is missing: {MANIFEST} and teacher/ can't be checked byte by byte")
        except CacheError as error:
            self.fault("manifest", str(error))
        images = manifest.teacher.task == IMAGES
        part, what = ("processor", "image processor") if images else ("tokenizer", "tokenizer")
        try:
            there = read_processor_hash(self.folder) if images else tokenizer_hash(load_tokenizer(self.folder))
        except CacheError as error:
            self.fault("manifest", str(error), remove=[part])
        else:
            if there != manifest.tokenizer_hash:
                self.fault("manifest", f"{part}/ is another {what} than the teacher's", remove=[part])

    def _compare_settings(self, now: dict[str, str], receipt: FolderReceipt) -> None:
        for name in sorted(now.keys() | receipt.files.keys()):
            remove = [] if name == MANIFEST else [name.split("/")[0]]
            if name not in receipt.files:
                self.fault("foreign", f"{name} was not there when the cache was finished", remove=remove)
            elif name not in now:
                self.fault("missing", f"{name} is missing", remove=remove)
            elif now[name] != receipt.files[name]:
                remedy = f": copy it again, with {RECEIPT}, from where the cache came from" if not remove else ""
                self.fault("manifest", f"{name} is not the file that was written{remedy}", remove=remove)


def _check_sizes(check: _Check, manifest: Manifest) -> None:
    """A finished cache, by the names and sizes of its files."""
    names = [EXAMPLES, *check.fields]
    for wrong in wrong_sizes(check.folder, manifest, names):
        file = _arrow(wrong.field, wrong.shard)
        kind: Kind = "missing" if wrong.bytes is None else "cut"
        is_there = "is missing" if wrong.bytes is None else f"has {wrong.bytes:,} bytes instead of {wrong.wanted:,}"
        check.fault(kind, f"{file} {is_there}", wrong.field, wrong.shard, remove=_files(wrong.field, wrong.shard))
    check.notes.append(f"names and sizes of {len(names) * len(manifest.shard_rows):,} files; no shard was read")


def _check_shards(check: _Check, manifest: Manifest) -> None:
    """A finished cache: every file against the manifest, every receipt too, and what the files hold."""
    names = [EXAMPLES, *check.fields]
    places = [(name, shard) for name in names for shard in range(len(manifest.shard_rows))]
    present = {name: _list_shards(check, manifest, name) for name in names}
    total = sum(manifest.shards[name].total for name in names if present[name] is not None)
    members, bare = Members(manifest), dict.fromkeys(names, 0)
    with progress(total, description="verify", unit="bytes") as update:
        for name, shard, found in _hash_all(check, places, present, update):
            if isinstance(found, CacheError):
                check.fault("foreign", str(found), name, shard, remove=_files(name, shard))
                continue
            whole = found is not None and _judge(check, manifest, name, shard, found)
            bare[name] += _compare_receipt(check, manifest, name, shard, whole=whole)
            if found is None and present[name] is not None:
                message = f"{shard_file(Path(name), '.', shard)} is missing"
                check.fault("missing", message, name, shard, remove=_files(name, shard))
            elif whole:
                _look_inside(check, manifest, name, shard, members)
    for name, count in bare.items():
        if count and present[name] is not None:
            check.notes.append(
                f"{count} shard(s) of {name} have no receipt: they can be read, but a later dump into this cache would "
                f"write them again"
            )
    _compare_sums(check, manifest)
    for problem in members.problems():
        check.fault("join", problem, EXAMPLES)


def _list_shards(check: _Check, manifest: Manifest, name: str) -> set[str] | None:
    """The file names in a field's folder; None, and a fault, where there is no folder."""
    place = check.folder / name
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        check.fault("foreign", f"{name} is a link or a file where a folder must be: put the folder itself there", name)
        return None
    if not place.exists():
        check.fault("missing", f"the folder of field {name} is missing: copy it, or verify other fields only", name)
        return None
    names, count = set(os.listdir(place)), len(manifest.shard_rows)
    known = {file.name for shard in range(count) for file in (_arrow(name, shard), _json(name, shard))}
    for stranger in sorted(names - known):
        if stranger.endswith((".arrow", ".json")) and not stranger.startswith("."):
            message = f"{name}/{stranger} is a shard that the manifest doesn't know, which has {count}"
            check.fault("foreign", message, name, remove=[f"{name}/{stranger}"])
        elif not stranger.startswith(".tmp-"):
            check.notes.append(f"{name}/{stranger}: not part of the cache")
    return names & known


def _arrow(name: str, shard: int) -> Path:
    return shard_file(Path(), name, shard)


def _json(name: str, shard: int) -> Path:
    return receipt_file(Path(), name, shard)


def _files(name: str, shard: int) -> list[str]:
    return [_arrow(name, shard).as_posix(), _json(name, shard).as_posix()]


@dataclass(frozen=True, slots=True)
class _Found:
    """A shard's file as it is."""

    bytes: int
    xxh3_128: str


def _hash_all(
    check: _Check,
    places: Sequence[tuple[str, int]],
    present: dict[str, set[str] | None],
    update: Update,
) -> Iterator[tuple[str, int, _Found | CacheError | None]]:
    """Every place in order with what lies there, hashed by threads a few files ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[tuple[str, int, Future[_Found | CacheError | None]]] = deque()
        todo = iter(places)
        try:
            while True:
                while len(waiting) < _AHEAD and (place := next(todo, None)) is not None:
                    name, shard = place
                    there = _arrow(name, shard).name in (present[name] or ())
                    waiting.append((*place, pool.submit(_hash_shard, check.folder, name, shard, there)))
                if not waiting:
                    return
                name, shard, future = waiting.popleft()
                found = future.result()
                if isinstance(found, _Found):
                    check.hashed += 1
                    check.bytes += found.bytes
                    update(found.bytes)
                yield name, shard, found
        finally:
            pool.shutdown(cancel_futures=True)


def _hash_shard(folder: Path, name: str, shard: int, there: bool) -> _Found | CacheError | None:
    if not there:
        return None
    try:
        handle = open_inside(folder, name, _arrow(name, shard).name)
    except FileNotFoundError:
        return None
    except CacheError as error:
        return error
    try:
        return _Found(os.fstat(handle).st_size, hash_handle(handle))
    finally:
        os.close(handle)


def _judge(check: _Check, manifest: Manifest, name: str, shard: int, found: _Found) -> bool:
    """Whether the file is the one of the manifest; else a fault that says what it is instead."""
    table = manifest.shards[name]
    if found.xxh3_128 == table.hash(shard) and found.bytes == table.size(shard):
        return True
    file, wanted = _arrow(name, shard).as_posix(), table.size(shard)
    receipt = _receipt_or_none(check.folder, name, shard)
    if receipt is not None and (receipt.bytes, receipt.xxh3_128) == (found.bytes, found.xxh3_128):
        message = f"{file} is as its receipt says, but {MANIFEST} says otherwise: one of the two is of another cache"
        check.fault("foreign", message, name, shard, remove=_files(name, shard))
        return False
    other, says = _whose(manifest, found), _says(check.folder, name, shard)
    kind: Kind = "changed"
    message = f"{file} is not what was written: bits of it have changed, or it is of another cache"
    if other is not None:
        kind, message = "swapped", f"{file} has the bytes of {_arrow(*other).as_posix()}: files were swapped or copied"
    elif says is not None and says != (name, shard):
        kind = "foreign"
        message = f"{file} says of itself that it is shard {says[1]} of {says[0]}: it is of another cache"
    elif found.bytes != wanted:
        kind, message = "cut", f"{file} has {found.bytes:,} bytes instead of {wanted:,}"
    check.fault(kind, message, name, shard, remove=_files(name, shard))
    return False


def _whose(manifest: Manifest, found: _Found) -> tuple[str, int] | None:
    """The place in this cache that the bytes belong to."""
    for name, table in manifest.shards.items():
        at = table.xxh3_128.find(found.xxh3_128)
        while at >= 0:
            if at % 32 == 0:
                return name, at // 32
            at = table.xxh3_128.find(found.xxh3_128, at + 1)
    return None


def _says(folder: Path, name: str, shard: int) -> tuple[str, int] | None:
    """What the file's own metadata call it, read from its first bytes; None where they can't be told."""
    with suppress(CacheError, OSError):
        handle = open_inside(folder, name, _arrow(name, shard).name)
        try:
            head = os.pread(handle, 1 << 16, 0)
        finally:
            os.close(handle)
        told = re.search(rb'"field": "([a-z0-9_.@]{1,60})", "shard": ([0-9]{1,12}),', head)
        if told:
            return told[1].decode(), int(told[2])
    return None


def _receipt_or_none(folder: Path, name: str, shard: int) -> Receipt | None:
    with suppress(CacheError, OSError):
        return load_receipt(folder, name, shard)
    return None


def _compare_receipt(check: _Check, manifest: Manifest, name: str, shard: int, *, whole: bool) -> bool:
    """Tell a receipt that is damaged or says other than the manifest; whether there is none."""
    file = _json(name, shard).as_posix()
    try:
        receipt = load_receipt(check.folder, name, shard)
        if to_json(receipt) != read_inside(check.folder, name, Path(file).name, limit=RECEIPT_LIMIT):
            raise CacheError(f"{file} is not as it was written")
    except FileNotFoundError:
        return True
    except (CacheError, OSError) as error:
        check.fault("receipt", str(error), name, shard, remove=[file])
        return False
    table = manifest.shards[name]
    facts = {
        "rows": (receipt.rows, manifest.shard_rows[shard]),
        "tokens": (receipt.tokens, manifest.shard_tokens[shard]),
        "bytes": (receipt.bytes, table.size(shard)),
        "xxh3_128": (receipt.xxh3_128, table.hash(shard)),
        "join": (receipt.join, manifest.join[32 * shard : 32 * shard + 32]),
    }
    sums = check.sums.setdefault(name, Counted())
    sums.receipts, sums.truncated, sums.clipped = (
        sums.receipts + 1,
        sums.truncated + receipt.truncated,
        sums.clipped + receipt.clipped,
    )
    differ = [f"{key} {said} and not {wanted}" for key, (said, wanted) in facts.items() if said != wanted]
    if differ:
        # the file of a shard that is whole proves the receipt wrong; else the shard goes anyway
        check.fault("receipt", f"{file} says {', '.join(differ)}", name, shard, remove=[file] if whole else [])
    return False


def _compare_sums(check: _Check, manifest: Manifest) -> None:
    """What the manifest has only the sum of, where all receipts are there."""
    for name, sums in check.sums.items():
        if sums.receipts == len(manifest.shard_rows):
            truncated = manifest.corpus.truncated if name == EXAMPLES else 0
            if (sums.truncated, sums.clipped) != (truncated, manifest.shards[name].clipped):
                message = f"the receipts of {name} count other truncated rows or clipped values than {MANIFEST}"
                check.fault("receipt", message, name)


def _look_inside(check: _Check, manifest: Manifest, name: str, shard: int, members: Members) -> None:
    """The structure of a shard whose bytes are right, and what ties it to the others."""
    try:
        table = open_shard(check.folder, manifest, name, shard)
        if name != EXAMPLES:
            if shard in members.lengths:
                tokens, targets = members.lengths[shard], members.targets.get(shard)
                check_lengths(table, name, manifest.fields[name], tokens, targets, where=_arrow(name, shard))
            return
        problem = members.add(table, shard)
    except CacheError as error:
        check.fault("structure", str(error), name, shard, remove=_files(name, shard))
        return
    if problem is not None:
        message = f"{_arrow(name, shard).as_posix()}: {problem}"
        check.fault("join", message, name, shard, remove=_files(name, shard))


def _check_begun(check: _Check, manifest: Manifest) -> None:
    """An unfinished cache: what has a receipt against it, and how much is still to come."""
    count = -(-manifest.corpus.rows // manifest.dump.shard_rows)
    names, missing = [EXAMPLES, *check.fields], 0
    with progress(None, description="verify", unit="bytes") as update:
        for name in names:
            for shard in range(min(count, 10_000_000)):
                receipt = _receipt_or_none(check.folder, name, shard)
                if receipt is None:
                    missing += 1
                    continue
                found = _hash_shard(check.folder, name, shard, True)
                if isinstance(found, _Found):
                    check.hashed += 1
                    check.bytes += found.bytes
                    update(found.bytes)
                    if (found.bytes, found.xxh3_128) == (receipt.bytes, receipt.xxh3_128):
                        continue
                file = _arrow(name, shard).as_posix()
                check.fault(
                    "missing" if found is None else "changed",
                    f"{file} is missing" if found is None else f"{file} is not the file that its receipt speaks of",
                    name,
                    shard,
                    remove=_files(name, shard),
                )
    message = f"the cache is unfinished: {missing} of {len(names) * count} shards are still to come"
    check.fault("unfinished", f"{message}. Give the dump command that began it again")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ------------------------------------------------------------------------------------------------------- repairing


def _repair(check: _Check) -> list[str]:
    """Remove what is proven bad and mark the cache unfinished; what was removed, by paths inside the cache."""
    if check.manifest is None or not check.faults:
        return []
    removed = []
    for name in sorted({name for fault in check.faults for name in fault.remove}):
        path = check.folder / name
        if not os.path.lexists(path) or path.parent.is_symlink():
            continue
        if path.is_dir() and not path.is_symlink():
            if name not in FOLDERS:
                continue  # a folder in the place of a file is not of our making: it stays, and stays told
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(name)
    if check.manifest.complete:
        requeue(check.folder, check.manifest)
    return removed
