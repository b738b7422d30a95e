"""A cache at a URL: how it lies there, and what it holds.

    manifest.json              a cache's manifest, byte for byte as in a folder; put last: where it is, all is
    logits-3f9a51c07d2e44b1/   a field, named by its values too
        field.json             put after all shards: what the folder holds (`FieldCard`), receipts and all
        00000.arrow …          the shards as in a folder, which other tools read as they are;
        00000.arrow.<size>.packed …   or packed for the way (planes.py), named by their size too
    examples-…/                likewise
    tokenizer-…/ teacher-…/ processor-…/   the small folders, each named by its content

Why folders are named by what is in them: no two pushes, whatever they push, ever write different bytes under one name.
So of two pushes at once, of one cache or of two, each has all its files there before it puts its manifest, and the
place holds one whole cache whichever manifest is put last. Two pushes of different fields of one cache end in both:
each puts its field.json first, then the manifest of all fields that it finds, and looks again (`publish_manifest`).
What the loser of two different caches left is in nobody's way. It needs no lock, no clock, and no more of a server than
that what was put is seen; and of an interrupted push, what is there with the right size is whole.

A cache's folder as it is, copied there by any tool or served by a web server, is read too: `Remote.named` is false.
Everything from there is a stranger's: JSON goes through pydantic, paths are checked, shards have the manifest's hashes.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from softlabels.cache.format import (
    EXAMPLES,
    FIELD_NAME,
    MANIFEST,
    MANIFEST_LIMIT,
    RECEIPT,
    SETTINGS_LIMIT,
    Count,
    FieldSpec,
    Hex128,
    Manifest,
    Positive,
    Receipt,
    ShardTable,
    identity,
    parse_folder_receipt,
    parse_manifest,
    shard_file,
    to_json,
)
from softlabels.cache.settings import FOLDERS
from softlabels.cache.transfer import RemoteFile
from softlabels.cache.urls import Place
from softlabels.config import fingerprint
from softlabels.errors import CacheError, ConfigError

CARD = "field.json"
PACKED = ".packed"
_SMALL = re.compile(r"(processor|teacher|tokenizer)(/[A-Za-z0-9_][A-Za-z0-9_.+ -]{0,100}){1,4}")
_MOST_FILES = 1000
_TRIES = 50  # at a manifest that other pushes change

SmallFiles = Annotated[dict[str, Hex128], Field(max_length=_MOST_FILES)]


class DamagedCard(CacheError):
    """A field.json that is none, or not that of the manifest: a push with `check` puts another there."""


class FieldCard(BaseModel):
    """field.json: one field of a cache at a URL, or its examples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["softlabels-field"]
    version: Literal[1]
    cache: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{24}$")]  # `base_of` the manifest
    field: str
    spec: FieldSpec | None  # None of examples
    table: ShardTable
    counted: list[Count]  # of every shard, rows cut or values clipped; empty where there are none
    files: SmallFiles  # path inside the cache → xxh3-128, of the small folders
    packed: list[Positive] | None  # bytes of every shard as it lies here; None where shards lie as they are


def base_of(manifest: Manifest) -> str:
    """One hash that two manifests share only if their fields are fields of the same rows."""
    table = manifest.shards[EXAMPLES]
    rows = [manifest.shard_rows, manifest.shard_tokens, manifest.join, table.sizes, table.xxh3_128]
    return fingerprint([identity(manifest), rows])


def folder_of(manifest: Manifest, field: str) -> str:
    """The folder of a field at a URL."""
    return named_folder(field, manifest.shards[field])


def named_folder(field: str, table: ShardTable) -> str:
    return f"{field}-{xxhash.xxh3_64((table.xxh3_128 + table.sizes).encode()).hexdigest()}"


def small_folders(files: dict[str, str]) -> dict[str, str]:
    """Where each small file lies at a URL, by its path inside the cache."""
    marks = {}
    for part in {name.split("/")[0] for name in files}:
        inside = sorted((name, value) for name, value in files.items() if name.split("/")[0] == part)
        marks[part] = f"{part}-{xxhash.xxh3_64(repr(inside).encode()).hexdigest()}"
    return {name: "/".join([marks[name.split("/")[0]], *name.split("/")[1:]]) for name in files}


def some_fields(manifest: Manifest, fields: Sequence[str]) -> Manifest:
    """The manifest of the same cache with these fields alone."""
    return manifest.model_copy(
        update={
            "fields": {name: manifest.fields[name] for name in sorted(fields)},
            "shards": {name: manifest.shards[name] for name in sorted({EXAMPLES, *fields})},
        }
    )


def with_fields(manifest: Manifest, fields: dict[str, tuple[FieldSpec, ShardTable]]) -> Manifest:
    """The manifest with more fields; those that it has stay as they are."""
    specs = {name: spec for name, (spec, _) in fields.items()} | manifest.fields
    tables = {name: table for name, (_, table) in fields.items()} | manifest.shards
    return manifest.model_copy(update={"fields": dict(sorted(specs.items())), "shards": dict(sorted(tables.items()))})


def refuse_another(here: Manifest, there: Manifest, *, where: str, remedy: str) -> None:
    """CacheError, saying what differs, where two manifests are of different caches or a field has other values."""
    one, two = identity(there), identity(here)
    differ = [f"{key} is {one.get(key)!r} there and {two.get(key)!r} here" for key in one if one[key] != two.get(key)]
    differ += [f"{key} is only here" for key in two.keys() - one.keys()]
    if not differ and here.complete and there.complete and base_of(here) != base_of(there):
        differ = ["the ids, tokens or texts of its rows are others"]
    for name in sorted(here.fields.keys() & there.fields.keys()):
        if here.fields[name] != there.fields[name]:
            differ.append(f"{name} is {there.fields[name].type} there and {here.fields[name].type} here")
        elif here.complete and there.complete and here.shards[name] != there.shards[name]:
            differ.append(f"{name} has other values")
    if differ:
        raise CacheError(f"{where} holds another cache: {'; '.join(differ)[:800]}. {remedy}")


# ----------------------------------------------------------------------------------------------------- choosing


def choose_fields(
    manifest: Manifest, fields: Sequence[str] | None, layers: Sequence[int] | None, *, where: str
) -> list[str]:
    """The fields that are meant: names, kinds ('hidden': of every layer) or patterns ('query.*'); of these `layers`.

    `layers` alone mean every field of them; fields without a layer stay only if they are named. ConfigError where
    there is no such field.
    """
    known = sorted(manifest.fields)
    if fields is None and layers is None:
        return known
    chosen: set[str] = set()
    for wanted in fields if fields is not None else ["*.*"]:
        found = {
            name
            for name in known
            if name == wanted or name.partition(".")[0] == wanted or fnmatch.fnmatchcase(name, wanted)
        }
        if not found:
            have = ", ".join(known) or "no field"
            raise ConfigError(f"{where} has no field '{wanted}'; it has {have}")
        chosen |= found
    if layers is not None:
        kept = {name for name in chosen if _layer_of(name) is None or _layer_of(name) in layers}
        lacking = [str(layer) for layer in layers if layer not in {_layer_of(name) for name in kept}]
        if lacking:
            raise ConfigError(f"{where} has no such field of layer {', '.join(lacking)}; it has {', '.join(known)}")
        chosen = kept
    return sorted(chosen)


def _layer_of(field: str) -> int | None:
    found = re.search(r"\.(\d+)", field)
    return None if found is None else int(found[1])


# ------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, slots=True)
class Remote:
    """A whole cache at a URL."""

    place: Place
    manifest: Manifest
    named: bool  # folders are named by their content: it was pushed; False: a cache's folder as it is

    def card(self, field: str) -> FieldCard | None:
        """What a pushed field's folder holds, None of a cache that was not pushed; CacheError: gone or damaged."""
        if not self.named:
            return None
        try:
            return read_card(self.place, self.manifest, field)
        except FileNotFoundError:
            name = f"{folder_of(self.manifest, field)}/{CARD}"
            raise CacheError(
                f"{self.place.shown} lacks {name}, which its manifest names: have the cache pushed again"
            ) from None

    def small_files(self, cards: Sequence[FieldCard | None]) -> dict[str, tuple[str, str]]:
        """Of each small file of the cache, where it lies and its hash."""
        if not self.named:
            files = _read_folder_receipt(self.place)
            if files is None:
                raise CacheError(
                    f"{self.place.shown} has no {RECEIPT}, which names the files of its tokenizer: copy the whole "
                    f"cache there, or use `softlabels push`"
                )
            files.pop(MANIFEST, None)
            return {name: (name, value) for name, value in checked_files(files, self.place.shown).items()}
        found: dict[str, tuple[str, str]] = {}
        for card in cards:  # the first ones win: examples come first
            if card is not None:
                places = small_folders(checked_files(card.files, self.place.shown))
                found = {name: (places[name], value) for name, value in card.files.items()} | found
        return found

    def shard(self, field: str, shard: int, card: FieldCard | None) -> RemoteFile:
        """Where a shard lies, and what it must become."""
        table = self.manifest.shards[field]
        name = f"{folder_of(self.manifest, field) if self.named else field}/{shard_file_name(shard)}"
        size = table.size(shard)
        if card is None or card.packed is None:
            return RemoteFile(name, size, table.hash(shard))
        name = packed_name(name, card.packed[shard])
        return RemoteFile(name, card.packed[shard], table.hash(shard), packed=True, unpacked=size)

    def shard_size(self, field: str, shard: int, card: FieldCard | None) -> int:
        """The bytes of a shard as it lies there."""
        if card is None or card.packed is None:
            return self.manifest.shards[field].size(shard)
        return card.packed[shard]

    def receipt(self, field: str, shard: int, card: FieldCard | None) -> Receipt:
        """The receipt that belongs to a shard."""
        total = self.manifest.corpus.truncated if field == EXAMPLES else self.manifest.shards[field].clipped
        count = card.counted[shard] if card is not None and card.counted else 0
        if card is None and total:
            count = total if shard == 0 else 0  # which shards they are in is not worth a file each
        return make_receipt(self.manifest, field, shard, counted=count)


def shard_file_name(shard: int) -> str:
    return shard_file(Path(), "", shard).name


def packed_name(name: str, size: int) -> str:
    """The name of a packed shard: another zstd may pack it to other bytes, and either unpacks to the shard."""
    return f"{name}.{size:x}{PACKED}"


def make_receipt(manifest: Manifest, field: str, shard: int, *, counted: int) -> Receipt:
    """The receipt of a shard of a whole cache; the manifest has all of it but what is counted."""
    table = manifest.shards[field]
    return Receipt(
        rows=manifest.shard_rows[shard],
        tokens=manifest.shard_tokens[shard],
        bytes=table.size(shard),
        xxh3_128=table.hash(shard),
        join=manifest.join[32 * shard : 32 * shard + 32],
        truncated=counted if field == EXAMPLES else 0,
        clipped=0 if field == EXAMPLES else counted,
    )


def checked_files(files: dict[str, str], where: str) -> dict[str, str]:
    """`files`; CacheError where one of those that `where` has would not lie in a cache's small folders."""
    for name in files:
        if not _SMALL.fullmatch(name) or ".." in name:
            raise CacheError(f"{where} has a file {name[:100]!r}, which is none of a cache: refused. Have it removed")
    if len(files) > _MOST_FILES:
        raise CacheError(f"{where} has more than {_MOST_FILES} files of a tokenizer: refused")
    return files


def open_remote(url: str) -> Remote:
    """The whole cache at `url`; CacheError where there is none. Costs two or three small files."""
    place = Place(url)
    manifest = read_remote_manifest(place)
    if manifest is None:
        raise CacheError(
            f"no cache at {place.shown}: there is no {MANIFEST}. Is the URL right, and has a push to it ended?"
        )
    try:
        read_card(place, manifest, EXAMPLES)
    except FileNotFoundError:
        _check_manifest(place, manifest)
        return Remote(place, manifest, named=False)
    return Remote(place, manifest, named=True)


def _read_folder_receipt(place: Place) -> dict[str, str] | None:
    """Path inside the cache → xxh3-128, as receipt.json of a cache's folder says; None where it is not there."""
    try:
        raw = place.read(RECEIPT, limit=SETTINGS_LIMIT)
    except FileNotFoundError:
        return None
    return dict(parse_folder_receipt(raw, f"{place.shown}/{RECEIPT}").files)


def _check_manifest(place: Place, manifest: Manifest) -> None:
    """CacheError where the manifest of a cache's folder is not the one that was written: a pull would vouch for it."""
    files = _read_folder_receipt(place)
    if files is not None and files.get(MANIFEST) != xxhash.xxh3_128(to_json(manifest)).hexdigest():
        raise CacheError(
            f"{place.shown}/{MANIFEST} is not the one that {RECEIPT} beside it speaks of: have the cache copied again"
        )


def read_remote_manifest(place: Place) -> Manifest | None:
    """The manifest at a place; None where there is none; CacheError where it is of an unfinished cache."""
    try:
        raw = place.read(MANIFEST, limit=MANIFEST_LIMIT)
    except FileNotFoundError:
        return None
    manifest = parse_manifest(raw, f"{place.shown}/{MANIFEST}")
    if not manifest.complete:
        raise CacheError(f"{place.shown} holds an unfinished cache: finish its dump, and push or copy it then")
    return manifest


def read_card(place: Place, manifest: Manifest, field: str) -> FieldCard:
    """field.json of a field of `manifest`; FileNotFoundError where there is none, DamagedCard where it is another's."""
    folder, count = folder_of(manifest, field), len(manifest.shard_rows)
    card = _read_card(place, folder)
    fits = card.field == field and card.table == manifest.shards[field] and len(card.counted) in (0, count)
    fits = fits and (card.packed is None or len(card.packed) == count)
    if not fits or card.cache != base_of(manifest):
        raise DamagedCard(
            f"{place.shown}/{folder}/{CARD} is not that of the manifest: have the cache pushed again with --check"
        )
    return card


def _read_card(place: Place, folder: str) -> FieldCard:
    name = f"{folder}/{CARD}"
    raw = place.read(name, limit=MANIFEST_LIMIT)
    try:
        return FieldCard.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        spot = ".".join(str(part) for part in first["loc"])
        words = f"{place.shown}/{name} is damaged or of another version: {spot}: {first['msg']}"[:1000]
        raise DamagedCard(f"{words}. Have the cache pushed again with --check, which puts another there") from None


# --------------------------------------------------------------------------------------------------- publishing


def publish_manifest(place: Place, mine: Manifest) -> Manifest:
    """Put the manifest of `mine` and of all fields of the same cache that others have put; what is there in the end.

    Whoever puts a manifest looks afterwards whether a field came meanwhile, and whether it is still his: of the last
    manifest put, whoever put it saw all fields that were there, and any field that came later is followed by another.
    CacheError where another push put a different cache there.
    """
    for _ in range(_TRIES):
        there = read_remote_manifest(place)
        if there is not None:
            remedy = "Another push put it there meanwhile; nothing of it was overwritten. Push to another URL"
            refuse_another(mine, there, where=place.shown, remedy=remedy)
        whole = with_fields(there or mine, _fields_there(place, there or mine) | _fields_of(mine))
        if there is not None and to_json(whole) == to_json(there):
            return there
        place.put_bytes(MANIFEST, to_json(whole))
    raise CacheError(f"{place.shown}: other pushes change its {MANIFEST} all the time. Give the same command again")


def _fields_of(manifest: Manifest) -> dict[str, tuple[FieldSpec, ShardTable]]:
    return {name: (spec, manifest.shards[name]) for name, spec in manifest.fields.items()}


def _fields_there(place: Place, manifest: Manifest) -> dict[str, tuple[FieldSpec, ShardTable]]:
    """The fields of the same cache that are whole at a place, whether a manifest names them or not."""
    known = {folder_of(manifest, field) for field in manifest.shards}
    base, count, found = base_of(manifest), len(manifest.shard_rows), {}
    for folder in sorted(place.list("")):
        small = folder.partition("-")[0] in FOLDERS
        if folder in known or small or not re.fullmatch(r".+-[0-9a-f]{16}", folder):
            continue
        try:
            card = _read_card(place, folder)
        except (FileNotFoundError, CacheError):
            continue  # not whole, or nothing of ours
        fits = FIELD_NAME.fullmatch(card.field) and len(card.table) == count  # or no reader would take the manifest
        if fits and card.cache == base and card.spec is not None and named_folder(card.field, card.table) == folder:
            found[card.field] = (card.spec, card.table)
    return found
