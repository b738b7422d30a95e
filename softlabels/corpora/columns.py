"""Which columns of a source hold what, and whether every value in them will do: tables in, judged rows out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from softlabels.corpora.class_labels import clean_label, encodes
from softlabels.corpora.tables import Source, Table, list_some
from softlabels.errors import CorpusError
from softlabels.images import image_fault, need_pillow
from softlabels.labels import READ_LABELS, read_words
from softlabels.types import IMAGES, LANGUAGE_MODELS, SEQ2SEQ, Example, Label, Task

IMAGE_COLUMNS = ("image", "path", "file")
TEXT_COLUMNS = (  # pairs first: a question's `sentence` is half of a pair, not a text of its own
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")
SOURCE_COLUMNS = ("text", "source", "document", "article", "dialogue", "input")  # of what has a target text
TARGET_COLUMNS = ("target", "summary", "highlights", "output", "labels")
_SHOWN = 5  # bad rows in a message


@dataclass(frozen=True, slots=True)
class Columns:
    """What is read of a source."""

    texts: list[str]  # one, or the two of a pair; of words, or of paths of images
    label: str | None
    target: str | None
    id: str | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return list(dict.fromkeys(name for name in (*self.texts, self.label, self.target, self.id) if name is not None))


def choose_columns(source: Source, *, text: str | None, label: str | None, task: Task) -> Columns:
    """The columns of `source` that the user named, or that have usual names; CorpusError where that isn't clear."""
    doubled = sorted({name for name in source.names if source.names.count(name) > 1})
    if doubled:
        raise CorpusError(f"{source.where} has the column '{doubled[0]}' twice: rename one of them")
    label_column = target_column = None
    if task == "token-classification":
        text_columns = [_choose_words(source, text)]
        label_column = _choose_tags(source, label)
    elif task == IMAGES:
        text_columns = [_choose_images(source, text)]
        label_column = _choose_label(source, label, taken=text_columns)
    elif task == SEQ2SEQ:
        text_columns = [_choose_one(source, text, SOURCE_COLUMNS, "--text", "texts")]
        target_column = _choose_one(source, label, TARGET_COLUMNS, "--label", "the target texts")
        if target_column in text_columns:
            raise CorpusError(
                f"--label {target_column}: that is the text already: name the column with the target texts"
            )
    else:
        text_columns = _choose_text(source, text)
        if task not in (*LANGUAGE_MODELS, "sentence-embedding"):
            label_column = _choose_label(source, label, taken=text_columns)
    id_column = find_column(source, "id")
    return Columns(text_columns, label_column, target_column, None if id_column in text_columns else id_column)


def find_column(source: Source, wanted: str) -> str | None:
    """The column called `wanted`, in whatever case; None where there is none."""
    if wanted in source.names:
        return wanted
    found = [name for name in source.names if name.strip().casefold() == wanted.casefold()]
    if len(found) > 1:
        raise CorpusError(f"{source.where} has the columns {' and '.join(map(repr, found))}: rename one of them")
    return found[0] if found else None


def need_column(source: Source, wanted: str, option: str) -> str:
    found = find_column(source, wanted)
    if found is None:
        raise CorpusError(
            f"{source.where} has no column '{wanted}' ({option}); it has {list_some(source.names, 'column')}"
        )
    return found


def _choose_text(source: Source, text: str | None) -> list[str]:
    """The one or two columns that hold the text."""
    if text is not None:
        wanted = [text] if find_column(source, text) else [name.strip() for name in text.split(",")]
        if len(wanted) > 2 or "" in wanted:
            raise CorpusError(f"--text {text}: name one column, or two with a comma between them")
        if len(wanted) == 2 and wanted[0] == wanted[1]:
            raise CorpusError(f"--text {text}: a pair needs two different columns")
        return [need_column(source, name, "--text") for name in wanted]
    choices: list[list[str]] = []
    for names in TEXT_COLUMNS:
        found = [column for name in names if (column := find_column(source, name)) is not None]
        if len(found) == len(names) and not any(set(found) <= set(choice) for choice in choices):
            choices.append(found)
    if len(choices) > 1:
        listed = " or ".join(",".join(choice) for choice in choices)
        raise CorpusError(f"{source.where} could mean {listed}: name the text's column with --text")
    if choices:
        return choices[0]
    if find_column(source, "tokens"):
        raise CorpusError(
            f"{source.where} has `tokens`, words for token classification, and this teacher labels whole texts: name a "
            f"column of texts with --text"
        )
    usual = ", ".join(",".join(names) for names in reversed(TEXT_COLUMNS))
    hint = ""
    if len(source.names) == 1 and (mark := re.search(r"[;\t|]", source.names[0])):
        hint = f" (are its columns separated by {mark.group()!r}? A .csv has commas, a .tsv tabs)"
    raise CorpusError(
        f"{source.where} has no column of texts under a usual name ({usual}); it has "
        f"{list_some(source.names, 'column')}{hint}. Name it with --text; a .csv or .tsv needs a header, "
        f"a first line with the columns' names"
    )


def _choose_images(source: Source, text: str | None) -> str:
    """The column that holds paths of images."""
    need_pillow()
    return _choose_one(source, text, IMAGE_COLUMNS, "--text", "the paths of images")


def _choose_one(source: Source, wanted: str | None, usual: Sequence[str], option: str, what: str) -> str:
    """The column `wanted`, which the user named with `option`, or the one of a usual name."""
    if wanted is not None:
        return need_column(source, wanted, option)
    found = [column for name in usual if (column := find_column(source, name)) is not None]
    if len(found) > 1:
        raise CorpusError(f"{source.where} could mean {' or '.join(found)}: name the column with {what} by {option}")
    if not found:
        raise CorpusError(
            f"{source.where} has no {', '.join(usual)}, a column with {what}; it has "
            f"{list_some(source.names, 'column')}. Name it with {option}"
        )
    return found[0]


def _choose_label(source: Source, label: str | None, *, taken: list[str]) -> str | None:
    """The column that holds the label; None where there is none."""
    if label is not None:
        return need_column(source, label, "--label")
    found = (find_column(source, name) for name in LABEL_COLUMNS)
    return next((column for column in found if column is not None and column not in taken), None)


def _choose_words(source: Source, text: str | None) -> str:
    """The column that holds lists of words."""
    if text is not None:
        return need_column(source, text, "--text")
    found = [column for name in ("tokens", "words") if (column := find_column(source, name)) is not None]
    if not found:
        raise CorpusError(
            f"{source.where} has no `tokens` or `words`, a column with the words that are tagged; it has "
            f"{list_some(source.names, 'column')}. Name it with --text"
        )
    return found[0]


def _choose_tags(source: Source, label: str | None) -> str | None:
    """The column that holds a tag a word; None where there is none."""
    if label is not None:
        return need_column(source, label, "--label")
    usual = ("tags", "ner_tags", "pos_tags", "labels")
    found = [column for name in usual if (column := find_column(source, name)) is not None]
    if len(found) > 1:
        raise CorpusError(f"{source.where} could mean {' or '.join(found)}: name the tags' column with --label")
    return found[0] if found else None


# --------------------------------------------------------------------------------------------------------- values


def judge_rows(source: Source, columns: Columns, task: Task) -> Iterator[list[Example]]:
    """The rows of `source`, a table at a time, labels not yet of one type; CorpusError, at the end, counts bad rows."""
    faults = [_Faults(), _Faults(), _Faults(), _Faults()]  # of ids, of texts, of targets, of images
    for table in source.chunks(columns.names):
        rows = _judge_table(_Judged(source, table, columns, task), faults)
        if rows is not None:
            yield rows
    ids, *rest = faults
    if ids.count:
        raise CorpusError(
            f"{source.where} has rows whose '{columns.id}' is neither a string nor an integer: {ids.listed(', ')}. "
            f"Give every row an id, or rename the column"
        )
    for found, what in zip(rest, ("image" if task == IMAGES else "text", "target text", "image"), strict=True):
        if found.count:
            raise CorpusError(
                f"{source.where} has {found.count} row{'s' if found.count > 1 else ''} without a usable {what}: "
                f"{found.listed('; ')}. Mend or delete {'them' if found.count > 1 else 'it'}"
            )


@dataclass(slots=True)
class _Faults:
    """Bad rows of a source: how many, and the first of them."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, lines: list[str]) -> None:
        self.count += len(lines)
        self.shown += lines[: _SHOWN - len(self.shown)]

    def listed(self, mark: str) -> str:
        if mark == ", ":
            more = f" and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
            return mark.join(self.shown) + more
        return mark.join(self.shown + ["…"] * (self.count > _SHOWN))


@dataclass(frozen=True, slots=True)
class _Judged:
    """A table that is looked at."""

    source: Source
    table: Table
    columns: Columns
    task: Task

    def where(self, row: int) -> str:
        return f"{self.source.where}, {self.table.place(row)}"

    def lines(self, bad: dict[int, str], ids: list[str] | None) -> list[str]:
        """What is wrong with these rows."""
        return [f"{self.table.place(row)}{f' (id {ids[row]!r})' if ids else ''}: {bad[row]}" for row in sorted(bad)]


def _judge_table(seen: _Judged, faults: list[_Faults]) -> list[Example] | None:
    """The rows of a table; None where it, or one before, has rows that will not do, and only these are looked for."""
    source, table, columns = seen.source, seen.table, seen.columns
    ids = [f"{source.split}/{n}" if source.split else str(n) for n in range(table.first, table.first + table.rows)]
    if columns.id is not None:
        ids, bad = _own_ids(table, columns.id)
        faults[0].add([table.place(row) for row in bad])
        if faults[0].count:
            return None
    named = ids if columns.id else None
    values = [table.column(name) for name in columns.texts]
    words: list[tuple[str, ...] | None] = [None] * table.rows
    if seen.task == "token-classification":
        words = [read_words(value, where=seen.where(row)) for row, value in enumerate(values[0])]
        values = [[" ".join(each or ()) for each in words]]
    what = "image" if seen.task == IMAGES else "text"
    faults[1].add(seen.lines(_bad_texts(columns.texts, values, what=what), named))
    if faults[1].count:
        return None
    targets: list[str | None] = [None] * table.rows
    if columns.target is not None:
        targets = table.column(columns.target)
        faults[2].add(seen.lines(_bad_texts([columns.target], [targets], what="target text"), named))
    images: list[str | None] = [None] * table.rows
    if seen.task == IMAGES:
        folder = source.folder.absolute()  # for workers, and later commands, that start in other folders
        images = [str(folder / path) for path in values[0]]
        found = {row: fault for row, path in enumerate(images) if path and (fault := image_fault(Path(path)))}
        faults[3].add(seen.lines(found, named))
    if any(each.count for each in faults):
        return None
    seconds = values[1] if len(values) == 2 else [None] * table.rows
    rows = zip(ids, values[0], seconds, _labels(seen, words), words, images, targets, strict=True)
    return [Example(*row) for row in rows]


def _labels(seen: _Judged, words: list[tuple[str, ...] | None]) -> list[Label]:
    column, names = seen.columns.label, seen.source.class_names.get(seen.columns.label or "")
    values = seen.table.column(column) if column else [None] * seen.table.rows
    if seen.task in READ_LABELS:
        read = READ_LABELS[seen.task]
        return [read(value, names=names, words=words[row], where=seen.where(row)) for row, value in enumerate(values)]
    return [clean_label(value, names=names, where=partial(seen.where, row)) for row, value in enumerate(values)]


def _own_ids(table: Table, column: str) -> tuple[list[str], list[int]]:
    """The ids, and the rows whose is none."""
    values = table.column(column)
    bad = [row for row, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, int | str)]
    bad += [row for row, value in enumerate(values) if isinstance(value, str) and not (value and encodes(value))]
    return [str(value) for value in values], sorted(bad)


def _bad_texts(names: list[str], columns: list[list[Any]], *, what: str) -> dict[int, str]:
    """Row → what is wrong, of texts that are no string with something in it."""
    bad: dict[int, str] = {}
    for name, values in zip(names, columns, strict=True):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                fault = "is missing" if value is None else f"is of type {type(value).__name__}, not a string"
                if what == "image" and isinstance(value, dict | bytes):  # as datasets stores images
                    fault = "holds the image itself, not the path of its file"
            elif not value or value.isspace():
                fault = "is empty"
            elif not encodes(value):
                fault = "has half of a surrogate pair"
            else:
                continue
            bad.setdefault(row, f"'{name}' {fault}")
    return bad
