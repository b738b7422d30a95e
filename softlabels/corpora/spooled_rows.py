"""Rows in a file of `softlabels.corpora.spool` as a sequence, read a few thousand at a time."""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import xxhash

from softlabels.corpora.class_labels import Kind, in_kind
from softlabels.types import Example, Label

MOST_LABELS = 10_000  # distinct ones that are counted, or kept once they are parsed
_OPEN_BATCHES = 2  # whose rows are held: a shard may lie across two


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of kept rows."""

    bytes: int  # of the file
    ends: list[int]  # the number of the row behind each batch
    hash: str  # as `Corpus.hash`
    kind: Kind  # what the file's labels become
    label_names: list[str] | None
    labels: list[tuple[Label, int]] | None  # each distinct one, as it is handed out, and its rows; None: too many


class RowHash:
    """xxh3-128 (hex) over every row's id, text, text_b and label, words or target, in order."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()
        self._encode = json.JSONEncoder(ensure_ascii=False).encode

    def add(self, rows: Iterable[Example]) -> RowHash:
        """With these rows behind those before."""
        for row in rows:
            # as JSON, no two rows look alike: None is not "None", and 1 is not "1"
            parts = [row.id, row.text, row.text_b, row.label]
            parts += [part for part in (row.words, row.target) if part is not None]
            self._hasher.update(self._encode(parts).encode())
        return self

    def hexdigest(self) -> str:
        """Of all so far."""
        return self._hasher.hexdigest()


class SpooledRows(Sequence[Example]):
    """The rows of a kept corpus, read from its file as they are asked for; their ids are known to be unique.

    A slice is a list. Iterating reads a batch at a time; threads may share it, and to another process goes the path.
    """

    def __init__(self, path: Path, facts: Facts) -> None:
        import pyarrow as pa

        self.path, self.facts = path, facts
        # read, not mapped: of a mapped file every page that was looked at counts as this process's memory
        self._reader = pa.ipc.open_file(pa.OSFile(str(path)))
        self._open: OrderedDict[int, list[Example]] = OrderedDict()
        self._lock = threading.Lock()
        self._labels: dict[str, Label] = {}

    def __len__(self) -> int:
        return self.facts.ends[-1]

    def __iter__(self) -> Iterator[Example]:
        for number in range(len(self.facts.ends)):
            yield from self._read(number)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return self._slice(range(len(self))[index])
        place = range(len(self))[index]  # IndexError as of a list; and from the end
        number = bisect_right(self.facts.ends, place)
        return self._rows(number)[place - self._start(number)]

    def __eq__(self, other: object) -> bool:
        """Whether the rows are the same ones, of a list too."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[[Path, Facts], SpooledRows], tuple[Path, Facts]]:
        return SpooledRows, (self.path, self.facts)

    def _start(self, number: int) -> int:
        return self.facts.ends[number - 1] if number else 0

    def _slice(self, places: range) -> list[Example]:
        if places.step != 1:
            return [self[place] for place in places]
        found: list[Example] = []
        number = bisect_right(self.facts.ends, places.start)
        while len(found) < len(places):
            start = places.start + len(found) - self._start(number)
            found += self._rows(number)[start : start + len(places) - len(found)]
            number += 1
        return found

    def _rows(self, number: int) -> list[Example]:
        """A batch's rows; those of the last two are kept."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            rows = self._open[number] = self._read(number)
            if len(self._open) > _OPEN_BATCHES:
                self._open.popitem(last=False)
            return rows

    def _read(self, number: int) -> list[Example]:
        batch = self._reader.get_batch(number)
        ids, texts, seconds, labels, words, images, targets = (
            column.to_pylist() if column.null_count < len(column) else [None] * len(column) for column in batch.columns
        )
        tagged = [None if each is None else tuple(each) for each in words]
        rows = zip(ids, texts, seconds, map(self._label, labels), tagged, images, targets, strict=True)
        return [Example(*row) for row in rows]

    def _label(self, text: str | None) -> Label:
        if text is None:
            return None
        if text not in self._labels:
            if len(self._labels) > MOST_LABELS:
                self._labels.clear()
            self._labels[text] = in_kind(parse_label(text), self.facts.kind)
        return self._labels[text]


def parse_label(text: str) -> Label:
    """A label as the file has it."""
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value
