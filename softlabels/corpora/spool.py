"""Rows of a corpus that may be larger than memory: judged once, kept in a private file, read a few at a time.

    KEY.arrow   an Arrow IPC file of id, text, text_b, label (as JSON), words, image, target; a batch for each table
    KEY.json    what was found out on the way; written last: with it the file is whole

They lie in $SOFTLABELS_CACHE/corpora, by default ~/.cache/softlabels/corpora. Their owner alone may read them, whatever
folder that is, and those of another owner are not believed. The key says what was read and how, and the size, the time
and the inode of each file, so that a resumed command reads nothing again and a changed file is read anew. What nobody
has used for two weeks is removed by the next command that keeps a corpus.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from softlabels.corpora.class_labels import Kind, find_kind, in_kind, name_labels, several
from softlabels.corpora.columns import Columns, choose_columns, judge_rows
from softlabels.corpora.sources import Part
from softlabels.corpora.spooled_rows import MOST_LABELS, Facts, RowHash, SpooledRows, parse_label
from softlabels.corpora.tables import CHUNK_ROWS, Source, list_some
from softlabels.errors import CorpusError
from softlabels.progress import progress
from softlabels.types import IMAGES, Example, Label, Task

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 2  # 1 had images by paths as they were given
KEEP_DAYS = 14  # after its last use
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for, as `read_corpus` has it."""

    source: str
    parts: list[Part]
    text: str | None
    label: str | None
    rows: int | None
    task: Task

    def stem(self) -> tuple[str, str]:
        """(what is read and how, in which state it is), hashed: the two halves of the key."""
        places = [[part.place, part.split] for part in self.parts]
        how = [FORMAT, places, self.text, self.label, self.rows, self.task]
        states = [part.state for part in self.parts]
        return xxhash.xxh3_64_hexdigest(json.dumps(how).encode()), xxhash.xxh3_64_hexdigest(json.dumps(states).encode())


def spool_rows(wanted: Wanted) -> SpooledRows:
    """The rows that are wanted, from the file of an earlier command, or judged and kept now."""
    folder = _folder()
    what, state = wanted.stem()
    path = folder / f"{what}-{state}.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / f"{what}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # several parts of a dump may begin at once: one reads, the others wait
            found = _find(path)
            if found is None:
                _clean(folder, what)
                found = _keep(path, wanted)
    except OSError as error:
        raise CorpusError(
            f"corpus {wanted.source} is large, and its rows cannot be kept in {folder}: {error.strerror or error}. "
            f"Name another folder in the environment variable SOFTLABELS_CACHE"
        ) from error
    return found


def _folder() -> Path:
    base = os.environ.get("SOFTLABELS_CACHE")
    if base:
        return Path(base).expanduser() / "corpora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softlabels" / "corpora"


def _find(path: Path) -> SpooledRows | None:
    """The rows kept at `path`; None where there are none, or not the ones that were written."""
    about = path.with_suffix(".json")
    try:
        found = json.loads(about.read_text())
        labels = found["labels"]
        found["labels"] = labels and [(tuple(x) if isinstance(x, list) else x, count) for x, count in labels]
        facts = Facts(**found)
        status = path.lstat()
        if status.st_size != facts.bytes or not {status.st_uid, about.lstat().st_uid} <= {os.geteuid()}:
            return None
        os.utime(path)  # it is in use
        return SpooledRows(path, facts)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _clean(folder: Path, what: str) -> None:
    """Remove what was not used for long, and what was read so from a file that has changed since."""
    oldest = time.time() - KEEP_DAYS * 24 * 3600
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another command was faster
            if path.lstat().st_mtime < oldest or (path.name.startswith(f"{what}-") and path.suffix == ".arrow"):
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)
            elif path.name.startswith(_TEMPORARY + what):
                path.unlink()  # of a command that was killed: the lock is ours


def _keep(path: Path, wanted: Wanted) -> SpooledRows:
    draft = path.with_name(_TEMPORARY + path.name)
    try:
        facts = _write(draft, wanted)
        os.replace(draft, path)
        about = path.with_suffix(".json")
        with open(draft, "w", opener=_private) as file:
            file.write(json.dumps(asdict(facts)))
        os.replace(draft, about)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return SpooledRows(path, facts)


def _private(path: str, flags: int) -> int:
    """For `open`: a file that nobody else may read, and no link to one."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


@dataclass(slots=True)
class _Seen:
    """What is gathered while rows go by; a few bytes a row at most."""

    hash: RowHash = field(default_factory=RowHash)
    ends: list[int] = field(default_factory=list)
    ids: array[int] | None = None  # xxh3-64 of each, where they might not be unique
    labels: Counter[str] | None = field(default_factory=Counter)  # as JSON
    classes: bool = True  # whether labels are; else they may be as many as the rows
    distinct: set[int | str | float | None] = field(default_factory=set)

    @property
    def rows(self) -> int:
        return self.ends[-1] if self.ends else 0

    def add(self, rows: list[Example], labels: list[str | None]) -> None:
        self.hash.add(rows)
        self.ends.append(self.rows + len(rows))
        if self.ids is not None:
            self.ids.extend(xxhash.xxh3_64_intdigest(row.id.encode()) for row in rows)
        if self.classes:
            self.distinct.update(each for row in rows if row.label is not None for each in several(row.label))
        if self.labels is not None:
            self.labels.update(label for label in labels if label is not None)
            if len(self.labels) > MOST_LABELS:
                self.labels = None


def _write(path: Path, wanted: Wanted) -> Facts:
    """Judge all rows and write them to `path`; synced."""
    import pyarrow as pa

    with _reading(wanted):
        sources = [part.open(limit=wanted.rows, chunk=CHUNK_ROWS) for part in wanted.parts]
    columns = [choose_columns(each, text=wanted.text, label=wanted.label, task=wanted.task) for each in sources]
    ids = array("Q") if any(each.id for each in columns) else None
    seen = _Seen(ids=ids, classes=wanted.task != "regression")
    types = {name: pa.string() for name in ("id", "text", "text_b", "label", "words", "image", "target")}
    schema = pa.schema(types | {"words": pa.list_(pa.string())})
    with (
        progress(wanted.rows, description=f"reading {wanted.source}") as update,
        open(path, "wb", opener=_private) as file,
    ):
        with pa.ipc.new_file(file, schema) as writer:
            for rows in _judged(sources, columns, wanted):
                labels = [None if row.label is None else json.dumps(row.label) for row in rows]
                writer.write_batch(_batch(rows, labels, schema))
                seen.add(rows, labels)
                update(len(rows))
        file.flush()
        os.fsync(file.fileno())
    class_names = _class_names(sources, columns)
    kind: Kind = "as they are"
    if class_names is None and wanted.task in ("sequence-classification", IMAGES):
        kind = find_kind((each for each in seen.distinct if isinstance(each, str)), wanted.source)
    facts = _facts(path, seen, kind, None if wanted.task == "regression" else class_names, wanted)
    if seen.ids is not None:
        _check_ids(path, facts, seen.ids, wanted)
    return facts


def _facts(path: Path, seen: _Seen, kind: Kind, class_names: list[str] | None, wanted: Wanted) -> Facts:
    distinct = {in_kind(each, kind) for each in seen.distinct}
    names = None if wanted.task == "regression" else name_labels(distinct, class_names)  # type: ignore[arg-type]
    labels = None
    if seen.labels is not None:
        counts: Counter[Label] = Counter()
        for text, count in seen.labels.items():
            counts[in_kind(parse_label(text), kind)] += count
        labels = list(counts.items())
    found = Facts(path.stat().st_size, seen.ends, seen.hash.hexdigest(), kind, names, labels)
    changed = kind == "integers" or (kind == "strings" and any(not isinstance(each, str) for each in seen.distinct))
    if changed:  # the hash is over labels of one type, which only now is known
        digest = RowHash().add(SpooledRows(path, found)).hexdigest()
        return Facts(found.bytes, found.ends, digest, kind, names, labels)
    return found


def _judged(sources: Sequence[Source], columns: Sequence[Columns], wanted: Wanted) -> Iterator[list[Example]]:
    """The rows of all parts, the first `wanted.rows` of them."""
    left = wanted.rows
    for source, chosen in zip(sources, columns, strict=True):
        there = False
        with _reading(wanted):
            for rows in judge_rows(source, chosen, wanted.task):
                there = True
                yield rows[:left]
                left = None if left is None else left - len(rows[:left])
                if left == 0:
                    return
        if not there:
            raise CorpusError(f"{source.where} has no rows")


@contextlib.contextmanager
def _reading(wanted: Wanted) -> Iterator[None]:
    """CorpusError where the source itself fails, and not the folder with what is kept."""
    try:
        yield
    except OSError as error:
        raise CorpusError(f"corpus {wanted.source} cannot be read: {error.strerror or error}") from error


def _class_names(sources: Sequence[Source], columns: Sequence[Columns]) -> list[str] | None:
    found = (each.class_names.get(chosen.label) for each, chosen in zip(sources, columns, strict=True) if chosen.label)
    return next((names for names in found if names), None)


def _batch(rows: list[Example], labels: list[str | None], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    columns: list[list[Any]] = [
        [row.id for row in rows],
        [row.text for row in rows],
        [row.text_b for row in rows],
        labels,
        [row.words for row in rows],
        [row.image for row in rows],
        [row.target for row in rows],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _check_ids(path: Path, facts: Facts, hashes: array[int], wanted: Wanted) -> None:
    """CorpusError where two rows have one id; only rows whose ids' hashes meet are compared."""
    import numpy as np

    ordered = np.frombuffer(hashes, np.uint64)
    ordered.sort()  # in place: 8 bytes a row are enough
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not twice:
        return
    met = (row.id for row in SpooledRows(path, facts) if xxhash.xxh3_64_intdigest(row.id.encode()) in twice)
    refuse_doubled(Counter(met), wanted.source, joined=len(wanted.parts) > 1)


def refuse_doubled(ids: Counter[str], source: str, *, joined: bool) -> None:
    """CorpusError where one of these is there more than once."""
    doubled = [row_id for row_id, count in ids.items() if count > 1]
    if doubled:
        remedy = "give each split's rows ids of their own, or use one split at a time" if joined else "make ids unique"
        raise CorpusError(
            f"corpus {source} has several rows under one id, by which rows are joined: {list_some(doubled)}; {remedy}"
        )
