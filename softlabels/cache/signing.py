"""Who vouches for a cache: SHA256SUMS lists the SHA-256 of all its files, SHA256SUMS.sig is a signature of that list.

The manifest's own hashes (xxh3) find damage, but who wants to can make another file of the same hash; so the signature
is of a list of cryptographic ones, and binds every byte. Both files are what others check too, without softlabels:

    sha256sum --check SHA256SUMS
    ssh-keygen -Y verify -f ALLOWED_SIGNERS -I WHO -n softlabels-cache -s SHA256SUMS.sig < SHA256SUMS

Listed are the manifest, receipt.json, tokenizer/, processor/, teacher/, every shard and receipt, and card.json where it
is there; not README.md, which is made from these. Lines are sorted by path: 64 hex digits, two spaces, the path. What
changes the manifest, such as a field that is added, or fields that are left out of a copy, needs a new signature.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softlabels.cache.files import lock, write_file
from softlabels.cache.format import EXAMPLES, MANIFEST, MANIFEST_LIMIT, RECEIPT, Manifest, receipt_file, shard_file
from softlabels.cache.inside import open_inside, read_inside
from softlabels.cache.licence import FACTS
from softlabels.cache.settings import FOLDERS, settings_files
from softlabels.cache.sshsig import SignatureFault, check, sign
from softlabels.errors import CacheError
from softlabels.progress import progress

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
_LIMIT = 1 << 16  # bytes of a signature
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_@.+-][A-Za-z0-9_@.+ -]*(?:/[A-Za-z0-9_@.+-][A-Za-z0-9_@.+ -]*)*)")
_RECEIPT = re.compile(r"[^/]+/[0-9]{5,}\.json")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class SignReport:
    """What `sign_cache` signed."""

    cache: Path
    signer: str  # the key's fingerprint
    files: int
    bytes: int


def sign_cache(folder: Path, manifest: Manifest, key: Ed25519PrivateKey) -> SignReport:
    """Write SHA256SUMS and its signature into the finished cache at `folder`, over those that are there.

    CacheError where a file is missing, or has a name that no checker reads: what is signed is the whole of it. Whether
    the files are as they were written is for `verify_cache` to say, before.
    """
    if not manifest.complete:
        raise CacheError(f"{folder} is unfinished: give the dump command that began it again, and sign what it made")
    with lock(folder, shared=True):
        lines, total = [], 0
        names = cache_files(folder, manifest)
        with progress(len(names), description="sign", unit="files") as update:
            for name in names:
                try:
                    digest, size = _digest(folder, name)
                except FileNotFoundError:
                    raise CacheError(f"{folder / name} is missing: sign the cache where it is whole") from None
                lines.append(f"{digest}  {name}\n")
                total += size
                update(1)
    message = "".join(lines).encode()
    try:
        _listed(message)
    except ValueError as error:
        raise CacheError(f"{folder} has a file whose name no list can hold: {error}. Remove it, or rename it") from None
    armoured = sign(message, key)
    signer = check(message, armoured)
    (folder / SIGNATURE).unlink(missing_ok=True)  # at no moment it speaks of another list
    write_file(folder / SUMS, message)
    write_file(folder / SIGNATURE, armoured)
    return SignReport(folder, signer.fingerprint, len(lines), total)


def cache_files(folder: Path, manifest: Manifest, fields: Sequence[str] | None = None) -> list[str]:
    """The paths inside a cache that a signature covers, sorted; of shards those of `fields` and `examples`."""
    names = [MANIFEST, *(name for name in (RECEIPT, FACTS) if os.path.lexists(folder / name))]
    names += [name for part in FOLDERS for name in settings_files(folder, part)]
    for field in (EXAMPLES, *(manifest.fields if fields is None else fields)):
        there = set(os.listdir(folder / field)) if (folder / field).is_dir() else set()
        for shard in range(len(manifest.shard_rows)):
            receipt = receipt_file(Path(), field, shard)
            names += [
                shard_file(Path(), field, shard).as_posix(),
                *([receipt.as_posix()] if receipt.name in there else []),
            ]
    return sorted(names)


def signature_faults(folder: Path, manifest: Manifest, signers: Sequence[str], fields: Sequence[str]) -> Iterator[str]:
    """What is wrong with the signature of the cache at `folder`, one line each: nothing where one of `signers` (their
    fingerprints) vouches for every byte of `fields`, `examples` and what else the cache consists of."""
    try:
        message = read_inside(folder, SUMS, limit=MANIFEST_LIMIT)
        key = check(message, read_inside(folder, SIGNATURE, limit=_LIMIT))
    except FileNotFoundError as error:
        yield (
            f"the cache is not signed: {Path(error.filename).name} is missing. Who made it signs it (softlabels sign); "
            f"a signature comes with a pull of all fields and rows, not of some"
        )
        return
    except SignatureFault as error:
        yield f"{SIGNATURE} is no signature of {SUMS}: {error}"
        return
    if key.fingerprint not in signers:
        yield f"{SIGNATURE} is of another key than was asked for: of {key.fingerprint}"
        return
    try:
        listed = _listed(message)
    except ValueError as error:
        yield f"{SUMS} is signed, and yet no list of files: {error}"
        return
    wanted = cache_files(folder, manifest, fields)
    spare = {RECEIPT, *(name for name in listed if _RECEIPT.fullmatch(name))}  # nobody needs them for reading
    others = {field for field in manifest.fields if field not in fields}
    gone = sorted(name for name in listed.keys() - set(wanted) - spare if name.split("/")[0] not in others)
    for name in gone:
        yield f"{name} was signed, and is not there" + (_LATER if name.endswith(".arrow") else "")
    with progress(len(wanted), description="verify the signature", unit="files") as update:
        for name in wanted:
            problem = _problem(folder, name, listed.get(name))
            if problem is not None:
                yield problem
            update(1)


_LATER = ": where fields were added, or left out of this copy, since it was signed, it needs a new signature"


def is_of(sums: bytes, manifest: bytes) -> bool:
    """Whether a SHA256SUMS is of the cache with these bytes as its manifest."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode() in sums


def _problem(folder: Path, name: str, wanted: str | None) -> str | None:
    if wanted is None:
        return f"{name} is not in the signed list" + _LATER
    try:
        found, _ = _digest(folder, name)
    except FileNotFoundError:
        return f"{name} was signed, and is missing"
    except CacheError as error:
        return str(error)
    if found != wanted:
        return f"{name} is not the file that was signed" + (_LATER if name in (MANIFEST, RECEIPT) else "")
    return None


def _listed(message: bytes) -> dict[str, str]:
    """Path → SHA-256."""
    listed: dict[str, str] = {}
    for line in message.decode().splitlines():
        found = _LINE.fullmatch(line)
        if found is None or ".." in found[2].split("/") or found[2] in listed:
            raise ValueError(f"the line {line[:100]!r}")
        listed[found[2]] = found[1]
    return listed


def _digest(folder: Path, name: str) -> tuple[str, int]:
    """SHA-256 and size of a file of the cache; CacheError for a link."""
    handle = open_inside(folder, *name.split("/"))
    with open(handle, "rb", buffering=0) as file:
        hasher, size, view = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
        while count := file.readinto(view):
            hasher.update(view[:count])
            size += count
    return hasher.hexdigest(), size
