"""The life of a cache while it is dumped: begin or resume it, ask what is missing, finish it.

A folder is one cache from its first manifest on: a dump with another configuration is refused, saying what differs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

from softlabels.cache.factors import save_factors
from softlabels.cache.files import lock, sweep_temporary, sync_folder, write_file
from softlabels.cache.format import (
    EXAMPLES,
    FORMAT,
    MANIFEST,
    MANIFEST_LIMIT,
    RECEIPT,
    TEMPORARY,
    UNFINISHED,
    VERSION,
    CorpusCard,
    DumpCard,
    FieldSpec,
    Manifest,
    Receipt,
    ShardTable,
    TeacherCard,
    identity,
    read_manifest,
    receipt_file,
    shard_file,
    to_json,
)
from softlabels.cache.head import OutputHead, save_head
from softlabels.cache.info import clipped_values
from softlabels.cache.inside import open_inside, read_inside
from softlabels.cache.parts import Claim, Part, claim_shards, refuse_parts
from softlabels.cache.quick import unlisted_shards, whole_receipts
from softlabels.cache.settings import folder_receipt, hash_processor
from softlabels.cache.writer import labels_type, write_examples
from softlabels.config import package_versions
from softlabels.corpora.repeated import has_unique_ids
from softlabels.corpus import Corpus
from softlabels.errors import CacheError, CorpusError
from softlabels.factors import LogitFactors
from softlabels.pretrained import reset_tokenizer
from softlabels.tokens import Tokenized
from softlabels.types import IMAGES, SEQ2SEQ, Task

RECEIPTS_READ = 50_000  # so many receipts, 1.5 s, are read by a dump that begins; of more files only the names
Reader = PreTrainedTokenizerBase | BaseImageProcessor  # what a teacher reads its rows by


@dataclass(frozen=True, slots=True)
class CacheBuild:
    """A cache under construction, locked by this process; or, with a `claim`, some of its shards are."""

    folder: Path
    manifest: Manifest  # as it will be, without the shard table
    claim: Claim | None = None
    elsewhere: bool = False  # only receipts are here, of shards that lie behind a URL (softlabels.cache.store)

    def shards(self) -> range:
        """The shard numbers of the whole corpus."""
        size = self.manifest.dump.shard_rows
        return range((self.manifest.corpus.rows + size - 1) // size)

    def own_shards(self) -> range:
        """The shard numbers that this process is to write."""
        return self.shards() if self.claim is None else self.claim.shards

    def sweep(self) -> None:
        """Remove what was begun of them."""
        if self.claim is None:
            sweep_temporary(self.folder)
        else:
            self.claim.sweep(shared=False)

    def missing(self, shard: int) -> list[str]:
        """The fields, `examples` first, that have no whole file for `shard`."""
        return self.all_missing([shard]).get(shard, [])

    def all_missing(self, shards: Sequence[int]) -> dict[int, list[str]]:
        """`missing` of each of `shards` that lacks anything.

        Of many files only the names are looked at, for two million receipts take most of a minute: `finish` reads them
        anyway, and what is not whole then has to be dumped again.
        """
        fields = (EXAMPLES, *self.manifest.fields)
        if len(shards) * len(fields) > RECEIPTS_READ:
            return unlisted_shards(self.folder, fields, shards, receipts_alone=self.elsewhere)
        lacking: dict[int, list[str]] = {}
        for field in fields:
            for shard, receipt in zip(shards, self._whole_receipts_of(field, shards), strict=True):
                if receipt is None:
                    lacking.setdefault(shard, []).append(field)
        return dict(sorted(lacking.items()))

    def _whole_receipts_of(self, field: str, shards: Sequence[int]) -> Iterator[Receipt | None]:
        """The receipt of each shard that is as long as it says; None where it isn't, or there is none."""
        return whole_receipts(self.folder, field, shards, receipts_alone=self.elsewhere)

    def write_examples(self, shard: int, rows: Tokenized) -> None:
        """Write and commit one shard of `examples`, as the manifest says."""
        write_examples(
            self.folder,
            rows.examples,
            shard=shard,
            vocab_size=self.manifest.teacher.vocab_size,
            token_types=self.manifest.teacher.token_types,
            text=self.manifest.dump.text,
            labels=labels_type(self.manifest.teacher),
            targets=self.manifest.teacher.task == SEQ2SEQ,
            truncated=rows.truncated,
        )

    def finish_part(self) -> Manifest | None:
        """`finish` where all parts are done; None where others are still to come."""
        if self.claim is None:
            return self.finish()
        with self.claim.alone():
            now = read_manifest(self.folder)  # another part may have more fields
            fields = now.fields | self.manifest.fields
            build = replace(self, manifest=now.model_copy(update=UNFINISHED | {"fields": fields}))
            if build.all_missing(build.shards()):
                return None
            final = build.finish()
            self.claim.leave()
        return final

    def count_own(self) -> OwnShards:
        """What the receipts of this process's shards say of them."""
        truncated, size, clipped = 0, 0, Counter[str]()
        shards = self.own_shards()
        for field in (EXAMPLES, *self.manifest.fields):
            receipts = whole_receipts(self.folder, field, shards, receipts_alone=True)
            for shard, receipt in zip(shards, receipts, strict=True):
                if receipt is None:
                    path = receipt_file(self.folder, field, shard)
                    raise CacheError(f"{path} is gone or damaged: give the same command again")
                truncated, size = truncated + receipt.truncated, size + receipt.bytes
                clipped[field] += receipt.clipped
        return OwnShards(truncated, size, {field: count for field, count in sorted(clipped.items()) if count})

    def finish(self) -> Manifest:
        """Write the final manifest from the receipts, so that readers need nothing else."""
        examples, tables = self._read_receipts()
        corpus = self.manifest.corpus.model_copy(update={"truncated": sum(r.truncated for r in examples)})
        whole = self.manifest.model_dump() | {
            "complete": True,
            "corpus": corpus.model_dump(),
            "shard_rows": [receipt.rows for receipt in examples],
            "shard_tokens": [receipt.tokens for receipt in examples],
            "join": "".join(receipt.join for receipt in examples),
            "shards": {field: table.model_dump() for field, table in tables.items()},
        }
        final = Manifest.model_validate(whole)
        data = to_json(final)
        if _bytes_of(self.folder, MANIFEST) != data:  # nothing new: nothing is touched
            (self.folder / RECEIPT).unlink(missing_ok=True)  # at no moment it speaks of another manifest
            write_file(self.folder / MANIFEST, data)
        rest = to_json(folder_receipt(self.folder, data))
        if _bytes_of(self.folder, RECEIPT) != rest:
            write_file(self.folder / RECEIPT, rest)
        return final

    def _read_receipts(self) -> tuple[list[Receipt], dict[str, ShardTable]]:
        """The receipts of `examples`, and every field's table: two million receipts at once would take 2 GB.

        CacheError where shards are not whole, which a dump then redoes, or belong to other examples.
        """
        examples: list[Receipt] = []
        tables: dict[str, ShardTable] = {}
        broken: list[Path] = []
        foreign: list[Path] = []
        for field in (EXAMPLES, *self.manifest.fields):
            receipts: list[Receipt] = []
            for shard, receipt in enumerate(self._whole_receipts_of(field, self.shards())):
                if receipt is None:
                    broken.append(receipt_file(self.folder, field, shard))
                else:
                    receipts.append(receipt)
            examples = examples or receipts
            if not broken:
                pairs = enumerate(zip(receipts, examples, strict=True))
                foreign += [shard_file(self.folder, field, shard) for shard, (a, b) in pairs if a.join != b.join]
                tables[field] = ShardTable.of(receipts)
        self._refuse_broken(broken)
        if foreign:
            folder = foreign[0].parent
            raise CacheError(
                f"{foreign[0]} belongs to other examples than this cache's: delete the folder {folder} and dump the "
                f"field again"
            )
        return examples, tables

    def _refuse_broken(self, broken: Sequence[Path]) -> None:
        for path in broken:
            path.unlink(missing_ok=True)  # or a later claim, by the names alone, would take the shard for whole
        if broken:
            first = broken[0]
            count = "1 shard" if len(broken) == 1 else f"{len(broken)} shards"
            again = "the same command" if self.claim is None else "the command of every part"  # each writes its own
            raise CacheError(
                f"{self.folder} has {count} missing or not as written (the first is {first.parent.name}/{first.stem}): "
                f"give {again} again, to have them made anew"
            )


@dataclass(frozen=True, slots=True)
class OwnShards:
    """Of the shards that a process wrote, in all their fields."""

    truncated: int  # rows
    bytes: int
    clipped: dict[str, int]  # values, of the fields that have any


def count_all(manifest: Manifest) -> OwnShards:
    """The same of a finished cache, from its manifest alone."""
    size = sum(table.total for table in manifest.shards.values())
    return OwnShards(manifest.corpus.truncated, size, clipped_values(manifest))


def plan_manifest(
    corpus: Corpus,
    *,
    labelled: int,
    teacher: TeacherCard,
    tokenizer: Reader,
    dump: DumpCard,
    fields: dict[str, FieldSpec],
) -> Manifest:
    """The manifest as it stands before the first shard."""
    return Manifest(
        format=FORMAT,
        version=VERSION,
        complete=False,
        teacher=teacher,
        tokenizer_hash=reader_hash(tokenizer),
        corpus=CorpusCard(
            source=corpus.source,
            split=corpus.split,
            hash=corpus.hash,
            rows=len(corpus.examples),
            labelled=labelled,
        ),
        dump=dump,
        fields=fields,
        shard_rows=[],
        shard_tokens=[],
        join="",
        shards={},
        versions=package_versions("torch", "transformers", "tokenizers", "pyarrow", "numpy"),
    )


def teacher_card(
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    weights_hash: str,
    label_names: list[str],
    task: Task = "sequence-classification",
) -> TeacherCard:
    """Who spoke, and how it read."""
    return TeacherCard(
        name=name,
        weights_hash=weights_hash,
        task=task,
        label_names=label_names,
        vocab_size=len(tokenizer),
        pad_token_id=int(tokenizer.pad_token_id),
        unk_token_id=tokenizer.unk_token_id,
        token_types="token_type_ids" in tokenizer.model_input_names,
    )


def image_teacher_card(*, name: str, weights_hash: str, label_names: list[str]) -> TeacherCard:
    """Who spoke, of a teacher that has no vocabulary."""
    return TeacherCard(
        name=name,
        weights_hash=weights_hash,
        task=IMAGES,
        label_names=label_names,
        vocab_size=1,
        pad_token_id=0,
        unk_token_id=None,
        token_types=False,
    )


def _bytes_of(folder: Path, name: str) -> bytes | None:
    try:
        return read_inside(folder, name, limit=MANIFEST_LIMIT)
    except FileNotFoundError:
        return None


def requeue(folder: Path, manifest: Manifest) -> None:
    """Make a finished cache an unfinished one: the dump that made it then does what has no receipt."""
    (folder / RECEIPT).unlink(missing_ok=True)
    write_file(folder / MANIFEST, to_json(manifest.model_copy(update=UNFINISHED)))


@contextmanager
def build_cache(
    folder: Path,
    manifest: Manifest,
    *,
    tokenizer: Reader,
    config: PretrainedConfig | None,
    head: OutputHead | None = None,
    factors: LogitFactors | None = None,
    part: Part | None = None,
) -> Iterator[CacheBuild]:
    """Begin the cache in `folder`, or go on with it; locked until the block ends. No `config`: no teacher/ in it.

    `head` is the teacher's output head, for `vocab:exact`; `factors` are for `vocab:topk=K,factors=R`. With a `part`
    only its shards are this process's to write, and others may write other parts into the same folder.
    """

    def save() -> None:
        if config is not None and not (folder / "teacher").is_dir():
            _save_folder(folder / "teacher", config)
        if head is not None:
            save_head(folder, head)
        if factors is not None:
            save_factors(folder, factors)
        if isinstance(tokenizer, BaseImageProcessor):
            if not (folder / "processor").is_dir():
                _save_folder(folder / "processor", tokenizer)
        elif not (folder / "tokenizer").is_dir():
            reset_tokenizer(tokenizer)  # or what was tokenised before would be in its file
            _save_folder(folder / "tokenizer", tokenizer)

    with _begin(folder, manifest, save, part) as build:
        yield build


@contextmanager
def derive_cache(folder: Path, manifest: Manifest, *, source: Path, files: Sequence[str]) -> Iterator[CacheBuild]:
    """Begin the cache in `folder`, or go on with it, its small folders from the cache at `source`: `files` of them."""

    def save() -> None:
        for part in sorted({name.split("/")[0] for name in files}):
            if not (folder / part).is_dir():
                inside = [name for name in files if name.split("/")[0] == part]
                _save_folder(folder / part, _Copies(source, inside))

    with _begin(folder, manifest, save) as build:
        yield build


@contextmanager
def _begin(
    folder: Path, manifest: Manifest, save: Callable[[], None], part: Part | None = None
) -> Iterator[CacheBuild]:
    """The cache in `folder`, or a part of it, locked and swept; what was there before does not contradict `manifest`.

    `save` writes the small folders; the first manifest comes after them. A finished cache's stays until `finish`.
    """
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    if part is None:
        with lock(folder):
            refuse_parts(folder)
            yield _begun(CacheBuild(folder, manifest), save)
        return
    with claim_shards(folder, part.shards(len(CacheBuild(folder, manifest).shards()))) as claim:
        with claim.alone():
            build = _begun(CacheBuild(folder, manifest, claim), save)
        yield build


def _begun(build: CacheBuild, save: Callable[[], None]) -> CacheBuild:
    folder, manifest = build.folder, build.manifest
    previous = _previous_of(folder, manifest)
    if previous is not None:
        manifest = previous.model_copy(update=UNFINISHED | {"fields": previous.fields | manifest.fields})
    if build.claim is None:
        build.sweep()
    else:
        build.claim.sweep(shared=True)
    save()
    if previous is None or not previous.complete:
        write_file(folder / MANIFEST, to_json(manifest))
    return replace(build, manifest=manifest)


def refuse_another(folder: Path, manifest: Manifest) -> None:
    """CacheError where `folder` holds what a cache of `manifest` can't be begun or gone on with in; nothing is made."""
    if folder.is_dir():
        _previous_of(folder, manifest)


def _previous_of(folder: Path, manifest: Manifest) -> Manifest | None:
    """The manifest that a cache of `manifest` goes on from, None where it begins; CacheError: it can do neither."""
    _refuse_links(folder)
    previous = _previous(folder)
    if previous is not None:
        _refuse_differences(folder, previous, manifest)
    return previous


def _refuse_links(folder: Path) -> None:
    """A link in someone else's cache could have the dump write, and its sweep remove, in any folder of this machine."""
    for path in folder.iterdir():
        if path.is_symlink():
            raise CacheError(f"{path} is a link, and a dump follows none: put the real folder in its place")


def _previous(folder: Path) -> Manifest | None:
    if (folder / MANIFEST).exists():
        return read_manifest(folder)
    strangers = [path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY)]
    if set(strangers) - {
        "teacher",
        "tokenizer",
        "processor",
    }:  # a dump that was killed before its first manifest leaves at most these
        raise CacheError(
            f"{folder} is not empty and no cache (it holds {', '.join(sorted(strangers)[:5])}): choose another --out"
        )
    return None


def _refuse_differences(folder: Path, previous: Manifest, manifest: Manifest) -> None:
    before, now = identity(previous), identity(manifest)
    differences = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    for field in manifest.fields.keys() & previous.fields.keys():
        if previous.fields[field] != manifest.fields[field]:
            differences.append(f"field {field} is there as {previous.fields[field].type}")
    if differences:
        raise CacheError(
            f"{folder} holds a cache of another configuration: {'; '.join(differences)}. Choose another --out, "
            f"or repeat the first command"
        )


@dataclass(frozen=True, slots=True)
class _Copies:
    """Files of another cache, to be saved into a folder as transformers saves its own."""

    source: Path
    files: Sequence[str]  # of one of its small folders, by their paths inside the cache

    def save_pretrained(self, folder: Path) -> None:
        for name in self.files:
            parts = name.split("/")
            place = folder.joinpath(*parts[1:])
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(open_inside(self.source, *parts), "rb") as taken, place.open("xb") as made:
                shutil.copyfileobj(taken, made)


def _save_folder(path: Path, part: PretrainedConfig | Reader | _Copies) -> None:
    """A folder that transformers writes, whole or not there."""
    draft = path.with_name(TEMPORARY + path.name)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        part.save_pretrained(draft)
        for place, _, names in os.walk(draft):
            for name in names:
                _sync_file(Path(place, name))
            sync_folder(Path(place))
        os.replace(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reader_hash(reader: Reader) -> str:
    """What stands in a manifest as `tokenizer_hash`."""
    if isinstance(reader, BaseImageProcessor):
        return hash_processor(json.loads(reader.to_json_string()))
    return tokenizer_hash(reader)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """xxh3-128 over the whole vocabulary and the special tokens: equal tokenizers give equal ids."""
    hasher = xxhash.xxh3_128()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        hasher.update(f"{number}\t{token}\n".encode())
    hasher.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    return hasher.hexdigest()


def check_rows(corpus: Corpus) -> None:
    """CorpusError where there is nothing to keep, or rows could not be told apart."""
    if not corpus.examples:
        raise CorpusError(f"corpus {corpus.source} has no rows")
    if has_unique_ids(corpus.examples):
        return
    seen: set[str] = set()
    for example in corpus.examples:
        if example.id in seen:
            raise CorpusError(
                f"corpus {corpus.source} has the id '{example.id}' twice: rows are joined by id, make them unique"
            )
        seen.add(example.id)
