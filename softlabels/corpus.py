"""Corpora: what the user names on the command line -> rows with id, text (or a pair) and label.

In: a .jsonl, .csv, .tsv, .parquet, .arrow or .txt file; a folder with one such file a split, or one that the datasets
library's `save_to_disk` wrote, or of a folder of images a class; a Hugging Face dataset (`glue/sst2`, `owner/name`,
`name:config`, or any of these after `hf:`); `builtin:docstrings`. Out: a `Corpus`. Whatever is wrong with the input is
one CorpusError that says where.

A format gives a `Table`, a table gives rows; columns, ids, texts and labels are judged in one place for all
formats, so the same rows make the same corpus whatever file they come in.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from softlabels.errors import CorpusError
from softlabels.images import find_class_folders, image_fault, need_pillow
from softlabels.labels import READ_LABELS, read_words
from softlabels.types import IMAGES, LANGUAGE_MODELS, NO_LABEL, SEQ2SEQ, Example, Label, Task

if TYPE_CHECKING:
    import pyarrow as pa

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
SPLIT_NAMES = {  # as found -> as the command line and the ids have it
    **{name: "dev" for name in ("dev", "validation", "valid", "val")},
    **{name: "unlabeled" for name in ("unlabeled", "unlabelled", "unsupervised")},
    **{name: name for name in ("train", "test")},
}
DEFAULT_SPLIT = "train"
NO_LABEL_TEXTS = {"", "NaN", "nan", "null", "NULL"}  # how files without types write that a row has no label

_SHOWN = 5  # at most so many bad rows, labels or columns are listed in a message


@dataclass(frozen=True)
class Corpus:
    """The rows of one source, in order.

    `label_names` are the classes in the order of their indices, None where no row has a label. Labels are all
    integers or all strings.
    """

    source: str  # as the user named it
    split: str | None  # "train", "train+unlabeled"; None for a single file
    examples: list[Example]
    label_names: list[str] | None

    @cached_property
    def hash(self) -> str:
        """xxh3-128 (hex) over every row's id, text, text_b and label, words or target, in order."""
        hasher = xxhash.xxh3_128()
        for row in self.examples:
            # as JSON, no two rows look alike: None is not "None", and 1 is not "1"
            more = [part for part in (row.words, row.target) if part is not None]
            parts = [row.id, row.text, row.text_b, row.label, *more]
            hasher.update(json.dumps(parts, ensure_ascii=False).encode())
        return hasher.hexdigest()


def read_corpus(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    text: str | None = None,
    label: str | None = None,
    rows: int | None = None,
    task: Task = "sequence-classification",
) -> Corpus:
    """The rows of `source`; CorpusError where anything is missing, unreadable or of the wrong kind.

    `split` names one split or several ("train+unlabeled"); `text` the column or the two columns of the text
    ("premise,hypothesis") and `label` the label's, where their names are not the usual ones; `rows` takes the
    first so many. A row's id is its `id` column, or else its number, after the split's name where there are splits
    ("train/17").

    `task` says what a label is: a class; several classes, as a list or joined by commas (multi-label); a number or a
    list of them (regression); a tag for each of the words in `tokens`, both lists or joined by spaces (token
    classification); nothing that is looked for (language and embedding models). Of seq2seq-lm `label` is the column of
    the target text. Of image-classification a row is the path of an image, from the corpus's folder, in `image`, `path`
    or `file`; a folder of a folder a class does too.
    """
    source = os.fspath(source)
    if rows is not None and rows < 1:
        raise CorpusError(f"--rows {rows}: give at least 1")
    names = parse_split(split) if split is not None else None
    try:
        parts = _open_parts(source, names, limit=rows, images=task == IMAGES)
    except (OSError, RuntimeError) as error:  # RuntimeError: the '~' of no user
        raise CorpusError(f"corpus {source} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = [_read_part(part, text=text, label=label, task=task) for part in parts]
    ids = [row_id for part in found for row_id in part.ids][:rows]
    if not ids:
        raise CorpusError(f"corpus {source} has no rows")
    _check_ids(ids, source, joined=len(parts) > 1)
    class_names = next((part.class_names for part in found if part.class_names), None)
    labels = [value for part in found for value in part.labels][:rows]
    if class_names is None and task in ("sequence-classification", IMAGES):
        labels = _unify_labels(labels, source)
    words = (each for part in found for each in part.words)
    images = (each for part in found for each in part.images)
    targets = (each for part in found for each in part.targets)
    texts = (text for part in found for text in part.texts)
    seconds = (second for part in found for second in part.seconds)
    return Corpus(
        source=source,
        split=None if parts[0].split is None else "+".join(str(part.split) for part in parts),
        # `labels` may be the shortest: the first `rows`
        examples=[Example(*row) for row in zip(ids, texts, seconds, labels, words, images, targets, strict=False)],
        label_names=None if task == "regression" else _label_names(labels, class_names),
    )


def read_column(
    source: str | os.PathLike[str], name: str, *, option: str, split: str | None = None, rows: int | None = None
) -> list[Any]:
    """The values of one more column of `source`, row by row those of `read_corpus` with the same arguments.

    CorpusError where there is no such column; `option` is what the user named it with.
    """
    names = parse_split(split) if split is not None else None
    parts = _open_parts(os.fspath(source), names, limit=rows)
    return [value for part in parts for value in part.column(_need_column(part, name, option))][:rows]


def check_trainable(corpus: Corpus) -> None:
    """CorpusError unless a classifier can be trained on `corpus`: two labelled rows, of two classes."""
    labels = [row.label for row in corpus.examples if row.label is not None]
    where = f"corpus {corpus.source}" + (f", split '{corpus.split}'," if corpus.split else "")
    if len(labels) < 2:
        count = "no labelled row" if not labels else "only one labelled row"
        raise CorpusError(
            f"{where} has {count} among {len(corpus.examples)}: training needs at least two, of two classes"
        )
    if len(set(labels)) == 1:
        raise CorpusError(
            f"{where} has one class only: all {len(labels)} labelled rows are '{labels[0]}'. Training needs two or more"
        )


def encode_labels(examples: Sequence[Example], label_names: Sequence[str]) -> list[int]:
    """Each row's class index in `label_names`, NO_LABEL for a row without a label.

    A label is looked up by name, then by name whatever its case; an integer that is no name is an index,
    unless the names are integers themselves. CorpusError names the labels that are none of these.
    """
    names = [str(name) for name in label_names]
    index = {name: number for number, name in enumerate(names)}
    folded = [name.casefold() for name in names]
    for number, name in enumerate(folded):
        if folded.count(name) == 1:
            index.setdefault(name, number)
    if not all(_INTEGER.fullmatch(name) for name in names):
        for number in range(len(names)):
            index.setdefault(str(number), number)
    encoded, unknown = [], []
    for row in examples:
        name = str(row.label)
        number = NO_LABEL if row.label is None else index.get(name, index.get(name.casefold(), -1))
        encoded.append(number)
        if number == -1:
            unknown.append(row)
    if unknown:
        raise CorpusError(_unknown_labels(unknown, names))
    return encoded


def _unknown_labels(rows: list[Example], names: list[str]) -> str:
    """The message for labels a teacher does not know."""
    labels = _some(sorted({repr(str(row.label)) for row in rows}), "label")
    message = (
        f"the teacher does not know {labels} of {len(rows)} row{'s' if len(rows) > 1 else ''} "
        f"({_some([row.id for row in rows], 'id')}); it knows {', '.join(names)}."
    )
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return message + " These names are placeholders: give it the classes' names in id2label of its config.json."
    return message + " Rename the labels, or leave them empty for rows without one."


# -------------------------------------------------------------------------------------- tables and their rows


@dataclass(frozen=True)
class Table:
    """What every format is read into. `column` gives a column's values, None where a row has none."""

    where: str  # how messages call it
    names: list[str]  # of the columns
    rows: int
    column: Callable[[str], list[Any]]
    place: Callable[[int], str]  # row number -> "line 12" or "row 11"
    class_names: dict[str, list[str]] = field(default_factory=dict)  # of columns that hold class indices
    split: str | None = None
    folder: Path = Path()  # from which paths in it lead on


@dataclass(frozen=True)
class _Part:
    """The rows of one table, column by column; labels not yet of one type."""

    ids: list[str]
    texts: list[str]
    seconds: list[str | None]
    labels: list[Label]
    class_names: list[str] | None
    words: list[tuple[str, ...] | None]
    images: list[str | None]
    targets: list[str | None]


def _read_part(table: Table, *, text: str | None, label: str | None, task: Task) -> _Part:
    """Choose the columns of a table and check every value in them."""
    doubled = sorted({name for name in table.names if table.names.count(name) > 1})
    if doubled:
        raise CorpusError(f"{table.where} has the column '{doubled[0]}' twice: rename one of them")
    if task == "token-classification":
        text_columns = [_choose_words(table, text)]
        label_column = _choose_tags(table, label)
    elif task == IMAGES:
        text_columns = [_choose_images(table, text)]
        label_column = _choose_label(table, label, taken=text_columns)
    elif task == SEQ2SEQ:
        text_columns = [_choose_one(table, text, SOURCE_COLUMNS, "--text", "texts")]
        target_column = _choose_one(table, label, TARGET_COLUMNS, "--label", "the target texts")
        if target_column in text_columns:
            raise CorpusError(
                f"--label {target_column}: that is the text already: name the column with the target texts"
            )
        label_column = None
    else:
        text_columns = _choose_text(table, text)
        labelled = task not in (*LANGUAGE_MODELS, "sentence-embedding")
        label_column = _choose_label(table, label, taken=text_columns) if labelled else None
    id_column = _find_column(table, "id")
    if id_column is not None and id_column not in text_columns:
        ids = _own_ids(table, id_column)
    else:
        id_column = None
        ids = [f"{table.split}/{number}" if table.split else str(number) for number in range(table.rows)]
    columns = [table.column(name) for name in text_columns]
    words: list[tuple[str, ...] | None] = [None] * table.rows
    if task == "token-classification":
        words = [read_words(value, where=f"{table.where}, {table.place(row)}") for row, value in enumerate(columns[0])]
        columns = [[" ".join(each or ()) for each in words]]
    named = ids if id_column else None
    _check_texts(table, text_columns, columns, named, what="image" if task == IMAGES else "text")
    targets: list[str | None] = [None] * table.rows
    if task == SEQ2SEQ:
        targets = table.column(target_column)
        _check_texts(table, [target_column], [targets], named, what="target text")
    images: list[str | None] = [None] * table.rows
    if task == IMAGES:
        images = [str(table.folder / path) for path in columns[0]]
        faults = {row: fault for row, path in enumerate(images) if path and (fault := image_fault(Path(path)))}
        _refuse_rows(table, faults, named, what="image")
    class_names = table.class_names.get(label_column or "")
    values = table.column(label_column) if label_column else [None] * table.rows
    labels: list[Label]
    if task in READ_LABELS:
        read = READ_LABELS[task]
        labels = [
            read(value, names=class_names, words=words[row], where=f"{table.where}, {table.place(row)}")
            for row, value in enumerate(values)
        ]
    else:
        labels = [_clean_label(value, table, row, names=class_names) for row, value in enumerate(values)]
    seconds = columns[1] if len(columns) == 2 else [None] * table.rows
    return _Part(ids, columns[0], seconds, labels, class_names, words, images, targets)


def _find_column(table: Table, wanted: str) -> str | None:
    """The column called `wanted`, in whatever case; None where there is none."""
    if wanted in table.names:
        return wanted
    found = [name for name in table.names if name.strip().casefold() == wanted.casefold()]
    if len(found) > 1:
        raise CorpusError(f"{table.where} has the columns {' and '.join(map(repr, found))}: rename one of them")
    return found[0] if found else None


def _need_column(table: Table, wanted: str, option: str) -> str:
    found = _find_column(table, wanted)
    if found is None:
        raise CorpusError(f"{table.where} has no column '{wanted}' ({option}); it has {_some(table.names, 'column')}")
    return found


def _choose_text(table: Table, text: str | None) -> list[str]:
    """The one or two columns that hold the text."""
    if text is not None:
        wanted = [text] if _find_column(table, text) else [name.strip() for name in text.split(",")]
        if len(wanted) > 2 or "" in wanted:
            raise CorpusError(f"--text {text}: name one column, or two with a comma between them")
        if len(wanted) == 2 and wanted[0] == wanted[1]:
            raise CorpusError(f"--text {text}: a pair needs two different columns")
        return [_need_column(table, name, "--text") for name in wanted]
    choices: list[list[str]] = []
    for names in TEXT_COLUMNS:
        found = [column for name in names if (column := _find_column(table, name)) is not None]
        if len(found) == len(names) and not any(set(found) <= set(choice) for choice in choices):
            choices.append(found)
    if len(choices) > 1:
        listed = " or ".join(",".join(choice) for choice in choices)
        raise CorpusError(f"{table.where} could mean {listed}: name the text's column with --text")
    if choices:
        return choices[0]
    if _find_column(table, "tokens"):
        raise CorpusError(
            f"{table.where} has `tokens`, words for token classification, and this teacher labels whole texts: name a "
            f"column of texts with --text"
        )
    usual = ", ".join(",".join(names) for names in reversed(TEXT_COLUMNS))
    hint = ""
    if len(table.names) == 1 and (mark := re.search(r"[;\t|]", table.names[0])):
        hint = f" (are its columns separated by {mark.group()!r}? A .csv has commas, a .tsv tabs)"
    raise CorpusError(
        f"{table.where} has no column of texts under a usual name ({usual}); it has "
        f"{_some(table.names, 'column')}{hint}. Name it with --text; a .csv or .tsv needs a header, "
        f"a first line with the columns' names"
    )


def _choose_images(table: Table, text: str | None) -> str:
    """The column that holds paths of images."""
    need_pillow()
    return _choose_one(table, text, IMAGE_COLUMNS, "--text", "the paths of images")


def _choose_one(table: Table, wanted: str | None, usual: Sequence[str], option: str, what: str) -> str:
    """The column `wanted`, which the user named with `option`, or the one of a usual name."""
    if wanted is not None:
        return _need_column(table, wanted, option)
    found = [column for name in usual if (column := _find_column(table, name)) is not None]
    if len(found) > 1:
        raise CorpusError(f"{table.where} could mean {' or '.join(found)}: name the column with {what} by {option}")
    if not found:
        raise CorpusError(
            f"{table.where} has no {', '.join(usual)}, a column with {what}; it has "
            f"{_some(table.names, 'column')}. Name it with {option}"
        )
    return found[0]


def _choose_label(table: Table, label: str | None, *, taken: list[str]) -> str | None:
    """The column that holds the label; None where there is none."""
    if label is not None:
        return _need_column(table, label, "--label")
    found = (_find_column(table, name) for name in LABEL_COLUMNS)
    return next((column for column in found if column is not None and column not in taken), None)


def _choose_words(table: Table, text: str | None) -> str:
    """The column that holds lists of words."""
    if text is not None:
        return _need_column(table, text, "--text")
    found = [column for name in ("tokens", "words") if (column := _find_column(table, name)) is not None]
    if not found:
        raise CorpusError(
            f"{table.where} has no `tokens` or `words`, a column with the words that are tagged; it has "
            f"{_some(table.names, 'column')}. Name it with --text"
        )
    return found[0]


def _choose_tags(table: Table, label: str | None) -> str | None:
    """The column that holds a tag a word; None where there is none."""
    if label is not None:
        return _need_column(table, label, "--label")
    usual = ("tags", "ner_tags", "pos_tags", "labels")
    found = [column for name in usual if (column := _find_column(table, name)) is not None]
    if len(found) > 1:
        raise CorpusError(f"{table.where} could mean {' or '.join(found)}: name the tags' column with --label")
    return found[0] if found else None


def _own_ids(table: Table, column: str) -> list[str]:
    values = table.column(column)
    bad = [row for row, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, int | str)]
    bad += [row for row, value in enumerate(values) if isinstance(value, str) and not (value and _encodes(value))]
    if bad:
        raise CorpusError(
            f"{table.where} has rows whose '{column}' is neither a string nor an integer: "
            f"{_some([table.place(row) for row in sorted(bad)])}. Give every row an id, or rename the column"
        )
    return [str(value) for value in values]


def _check_ids(ids: list[str], source: str, *, joined: bool) -> None:
    if len(set(ids)) == len(ids):
        return
    doubled = [row_id for row_id, count in Counter(ids).items() if count > 1]
    remedy = "give each split's rows ids of their own, or use one split at a time" if joined else "make ids unique"
    raise CorpusError(
        f"corpus {source} has several rows under one id, by which rows are joined: {_some(doubled)}; {remedy}"
    )


def _encodes(text: str) -> bool:
    """False for a string with half of a surrogate pair, which JSON can spell and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_texts(table: Table, names: list[str], columns: list[list[Any]], ids: list[str] | None, *, what: str) -> None:
    """CorpusError unless every text is a string with something in it."""
    bad: dict[int, str] = {}
    for name, values in zip(names, columns, strict=True):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                fault = "is missing" if value is None else f"is of type {type(value).__name__}, not a string"
                if what == "image" and isinstance(value, dict | bytes):  # as datasets stores images
                    fault = "holds the image itself, not the path of its file"
            elif not value or value.isspace():
                fault = "is empty"
            elif not _encodes(value):
                fault = "has half of a surrogate pair"
            else:
                continue
            bad.setdefault(row, f"'{name}' {fault}")
    _refuse_rows(table, bad, ids, what=what)


def _refuse_rows(table: Table, bad: dict[int, str], ids: list[str] | None, *, what: str) -> None:
    """CorpusError where there are `bad` rows: their number, and what is wrong."""
    if bad:
        shown = [
            f"{table.place(row)}{f' (id {ids[row]!r})' if ids else ''}: {bad[row]}" for row in sorted(bad)[:_SHOWN]
        ]
        listed = "; ".join(shown + ["…"] * (len(bad) > _SHOWN))
        raise CorpusError(
            f"{table.where} has {len(bad)} row{'s' if len(bad) > 1 else ''} without a usable {what}: {listed}. "
            f"Mend or delete {'them' if len(bad) > 1 else 'it'}"
        )


# ----------------------------------------------------------------------------------------------------- labels

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_INTEGRAL = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0*)?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def _clean_label(value: Any, table: Table, row: int, *, names: list[str] | None) -> int | str | None:
    """One value of a label's column as an integer, a string, or None for no label."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        value = value.strip()
        if not _encodes(value):
            raise CorpusError(f"{table.where}, {table.place(row)}: the label has half of a surrogate pair")
        return None if value in NO_LABEL_TEXTS else value
    if isinstance(value, float):
        if not value.is_integer():
            raise CorpusError(_regression(f"{table.where}, {table.place(row)}: the label is {value}"))
        value = int(value)
    if not isinstance(value, int):  # a bool is one
        raise CorpusError(
            f"{table.where}, {table.place(row)}: the label is of type {type(value).__name__}; a row has one "
            f"label, an integer or a string (several labels a row are not supported by this version)"
        )
    if names is None:
        return int(value)
    if value == -1:  # how datasets marks a row without a label
        return None
    if not 0 <= value < len(names):
        raise CorpusError(f"{table.where}, {table.place(row)}: label {value} is none of its {len(names)} classes")
    return names[value]


def _regression(what: str) -> str:
    return f"{what}. Regression labels are not supported by this version: a label is a class"


def _unify_labels(labels: list[Label], source: str) -> list[Label]:
    """Labels of one type: integers if all of them read as such ("1", "1.0"), else strings."""
    texts = {value for value in labels if isinstance(value, str)}
    if not texts:
        return labels
    numbers = {text: int(match[1]) for text in texts if (match := _INTEGRAL.fullmatch(text))}
    if len(numbers) == len(texts):
        return [numbers[value] if isinstance(value, str) else value for value in labels]
    fractions = sorted(text for text in texts if text not in numbers)
    if all("." in text and _NUMBER.fullmatch(text) for text in fractions):
        raise CorpusError(_regression(f"corpus {source} has {_some(fractions, 'label')}"))
    return [None if value is None else str(value) for value in labels]


def _label_names(labels: list[Label], class_names: list[str] | None) -> list[str] | None:
    distinct = {each for value in labels for each in (value if isinstance(value, tuple) else [value])} - {None}
    if not distinct:
        return None
    if class_names is not None:
        return list(class_names)
    return [
        str(value) for value in sorted(distinct, key=lambda value: (value if isinstance(value, int) else 0, str(value)))
    ]


# ----------------------------------------------------------------------------------------- sources and splits


def parse_split(split: str) -> list[str]:
    """'train+validation' -> ['train', 'dev']."""
    names = [SPLIT_NAMES.get(name.strip().casefold(), name.strip()) for name in split.split("+")]
    if "" in names or len(set(names)) < len(names):
        raise CorpusError(f"--split {split}: name one split, or different ones with + between them")
    return names


def _open_parts(source: str, splits: list[str] | None, *, limit: int | None, images: bool = False) -> list[Table]:
    """One table for a single file, else one for each split asked for. `images`: a folder may have one a class."""
    if source.startswith("builtin:"):
        return _open_builtin(source, splits)
    path = Path(source).expanduser()
    if path.is_file():
        if splits is not None:
            raise CorpusError(
                f"corpus {source} is a single file and has no splits: leave --split {'+'.join(splits)} out"
            )
        return [read_table(path, limit=limit)]
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, splits, limit=limit)
    if path.is_dir() and images and not any(_split_of(place) for place in path.iterdir()):
        return _open_class_folders(path, splits, limit=limit)
    if path.is_dir():
        files = _find_split_files(path)
        return [
            _in_split(read_table(files[split], limit=limit), split)
            for split in _pick_splits(source, splits, list(files))
        ]
    if path.exists():
        raise CorpusError(f"corpus {source} is neither a file nor a folder")
    if _looks_like_path(source):
        raise CorpusError(_no_such_file(path, source))
    dataset = _load_hub(source)
    found = {SPLIT_NAMES.get(name.casefold(), name): name for name in dataset}
    return [
        _in_split(
            dataset_table(dataset[found[split]], where=f"corpus {source}, split '{split}'", limit=limit),
            split,
        )
        for split in _pick_splits(source, splits, list(found))
    ]


def _open_saved(path: Path, splits: list[str] | None, *, limit: int | None) -> list[Table]:
    """The tables of a folder that `save_to_disk` of the datasets library has written."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder fails in the library's own ways
        raise CorpusError(
            f"corpus {path} looks like a saved dataset but does not load: {_first_line(error)}"
        ) from error
    if isinstance(saved, datasets.Dataset):
        if splits is not None:
            raise CorpusError(f"corpus {path} is a single dataset and has no splits: leave --split out")
        return [dataset_table(saved, where=f"corpus {path}", limit=limit)]
    found = {SPLIT_NAMES.get(str(name).casefold(), str(name)): name for name in saved}
    return [
        _in_split(dataset_table(saved[found[split]], where=f"corpus {path}, split '{split}'", limit=limit), split)
        for split in _pick_splits(str(path), splits, list(found))
    ]


def _in_split(table: Table, split: str) -> Table:
    return replace(table, split=split)


def _pick_splits(source: str, asked: list[str] | None, there: list[str]) -> list[str]:
    """The splits asked for, by default `train`; CorpusError names those that exist."""
    for split in asked or [DEFAULT_SPLIT]:
        if split not in there:
            raise CorpusError(
                f"corpus {source} has no split '{split}'{'' if asked else ', the default'}; "
                f"it has {', '.join(there)}. Choose with --split"
            )
    return asked or [DEFAULT_SPLIT]


def _open_class_folders(path: Path, splits: list[str] | None, *, limit: int | None) -> list[Table]:
    """The images of folders called like their classes, which may lie in folders called like splits."""
    inside = [place for place in sorted(path.iterdir()) if place.is_dir() and not place.name.startswith(".")]
    folders = {SPLIT_NAMES.get(place.name.casefold()): place for place in inside}
    chosen: list[tuple[str | None, Path]] = [(None, path)]
    if folders and None not in folders:  # else they are classes, one of them perhaps called train or test
        names = [split for split in folders if split is not None]
        if len(names) < len(inside):
            raise CorpusError(f"folder {path} holds a split twice, under two of its names: {_some(inside)}. Keep one")
        chosen = [(split, folders[split]) for split in _pick_splits(str(path), splits, names)]
    elif splits is not None:
        raise CorpusError(f"folder {path} has no folders called like splits: leave --split {'+'.join(splits)} out")
    tables = []
    for split, folder in chosen:
        classes = find_class_folders(folder)
        if not classes:
            raise CorpusError(
                f"folder {folder} holds no images in folders of their classes (such as cat/1.png), nor a file called "
                f"train, dev, test or unlabeled that names them, ending in {', '.join(READERS)}"
            )
        rows = [(name, place) for name, places in classes.items() for place in places][:limit]
        ids = [f"{folder.name}/{place}" if split else place for _, place in rows]
        columns = {"id": ids, "image": [place for _, place in rows], "label": [name for name, _ in rows]}
        table = _column_table(columns, where=f"folder {folder}", split=split)
        tables.append(replace(table, folder=folder))
    return tables


def _split_of(path: Path) -> str | None:
    """Which split a file of a corpus is; None for any other."""
    return SPLIT_NAMES.get(path.stem.casefold()) if path.suffix.lower() in READERS and path.is_file() else None


def _find_split_files(folder: Path) -> dict[str, Path]:
    """split -> its file in a folder."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = _split_of(path)
        if split is None:
            continue
        if split in files:
            raise CorpusError(
                f"folder {folder} holds split '{split}' twice, {files[split].name} and {path.name}: keep one"
            )
        files[split] = path
    if not files:
        there = _some(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CorpusError(
            f"folder {folder} holds no split: a file called train, dev (or validation), test or unlabeled, "
            f"ending in {', '.join(READERS)}; it holds {there}"
        )
    return files


def _open_builtin(source: str, splits: list[str] | None) -> list[Table]:
    if source == "builtin:docstrings":
        from softlabels.docstrings import load_docstrings as load
    elif source == "builtin:docstring-kinds":
        from softlabels.docstring_kinds import load_docstring_kinds as load
    else:
        raise CorpusError(
            f"no built-in corpus is called '{source.removeprefix('builtin:')}': there are builtin:docstrings and "
            f"builtin:docstring-kinds"
        )
    harvest = load()
    tables = []
    for split in _pick_splits(source, splits, list(harvest)):
        columns = {name: [getattr(row, name) for row in harvest[split]] for name in ("id", "text", "label")}
        tables.append(_column_table(columns, where=f"corpus {source}, split '{split}'", split=split))
    return tables


def _looks_like_path(source: str) -> bool:
    """Whether a name that isn't there was meant as a file or folder, and not as a dataset of the Hub."""
    if source.startswith("hf:"):
        return False
    path = Path(source).expanduser()
    return (
        _HUB_NAME.fullmatch(source) is None
        or path.suffix.lower() in READERS
        or _OTHER_SUFFIX.fullmatch(path.suffix) is not None
        or (len(path.parts) > 1 and path.parent.is_dir())
    )


def _no_such_file(path: Path, source: str) -> str:
    message = f"no such file or folder: {source}"
    if not path.parent.is_dir():
        return f"{message} (nor is there a folder {path.parent})"
    message += _did_you_mean(path, source)
    if _HUB_NAME.fullmatch(source) and path.suffix not in READERS:
        message += f" (For the Hub's dataset of that name: hf:{source})"
    return message


def _did_you_mean(path: Path, source: str) -> str:
    """What in the same folder is called nearly so, as a sentence."""
    close = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), n=3)
    return f". Did you mean {' or '.join(str(Path(source).parent / name) for name in close)}?" if close else ""


# ------------------------------------------------------------------------------------------------------ files

# a name that ends so means a file, if one of a format that is not read here
_OTHER_SUFFIX = re.compile(r"\.(json|ndjson|feather|xlsx?|xml|yaml|pkl|npy|gz|bz2|xz|zst|zip|tar)", re.IGNORECASE)


def read_table(path: Path, *, limit: int | None = None) -> Table:
    """The first `limit` rows of one file, by its suffix."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise CorpusError(f"corpus {path} is in no format that is read here: {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise CorpusError(f"corpus {path} is empty")
    table = reader(path, limit)
    if not table.rows:
        raise CorpusError(f"corpus {path} has no rows")
    return replace(table, folder=path.parent)


def _read_text(path: Path) -> str:
    """The file's text; CorpusError gives the line and the offset of the first byte that isn't UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        utf16 = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise CorpusError(
            f"corpus {path}, line {line}: byte {data[error.start]:#04x} at offset {error.start} is not "
            f"UTF-8{utf16}. Save the file as UTF-8"
        ) from error


def _column_table(columns: dict[str, list[Any]], *, where: str, split: str | None = None) -> Table:
    rows = len(next(iter(columns.values()), []))
    return Table(where, list(columns), rows, columns.__getitem__, "row {}".format, split=split)


def _read_jsonl(path: Path, limit: int | None) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    decoder = json.JSONDecoder(object_pairs_hook=_object_of_pairs)
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # not splitlines: texts may hold U+2028
        if not line or line.isspace():
            continue
        try:
            row = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            fault = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise CorpusError(f"corpus {path}, line {number} is not JSON as expected: {fault}") from error
        if not isinstance(row, dict):
            raise CorpusError(f'corpus {path}, line {number} is not a JSON object such as {{"text": "…", "label": 0}}')
        rows.append(row)
        lines.append(number)
        if len(rows) == limit:
            break
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(
        f"corpus {path}",
        names,
        len(rows),
        lambda name: [row.get(name) for row in rows],
        lambda row: f"line {lines[row]}",
    )


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json.loads alone would keep the last of two values under one name, in silence."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the column '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return row


def _read_txt(path: Path, limit: int | None) -> Table:
    texts = [line.removesuffix("\r") for line in _read_text(path).split("\n")]
    while texts and not texts[-1].strip():  # blank lines at the end are no rows; between texts they are bad ones
        texts.pop()
    texts = texts[:limit]
    return Table(f"corpus {path}", ["text"], len(texts), lambda _: texts, lambda row: f"line {row + 1}")


def _read_csv(path: Path, limit: int | None) -> Table:
    return _parse_delimited(path, _read_text(path), delimiter=",", quoted=True, limit=limit)


def _read_tsv(path: Path, limit: int | None) -> Table:
    """Tab-separated, with quotes around fields as spreadsheets and pandas write them, or without such a rule.

    In the second kind a quotation mark is a character like any other. A file is of the first kind if every
    field with a quotation mark is wholly quoted, unless that puts line breaks into fields without need.
    """
    text = _read_text(path)
    if '"' not in text:
        return _parse_delimited(path, text, delimiter="\t", quoted=False, limit=limit)
    tables: dict[bool, Table] = {}
    for quoted in (True, False):
        with contextlib.suppress(CorpusError):
            tables[quoted] = _parse_delimited(path, text, delimiter="\t", quoted=quoted, limit=limit)
    if len(tables) == 2:
        same_lines = all(table.rows for table in tables.values()) and tables[True].place(-1) == tables[False].place(-1)
        return tables[same_lines and _QUOTED_TSV.fullmatch(text) is not None]
    for table in tables.values():
        return table
    return _parse_delimited(path, text, delimiter="\t", quoted=_QUOTED_TSV.fullmatch(text) is not None, limit=limit)


# possessive (++, *+), as a file is millions of fields long
_QUOTED_TSV = re.compile(r'(?:(?:"(?:[^"]|"")*+"|[^"\t\r\n]*+)(?:[\t\r\n]|\Z))*+')


def _parse_delimited(path: Path, text: str, *, delimiter: str, quoted: bool, limit: int | None) -> Table:
    """Rows of as many fields as the first line has names."""
    rows: list[list[str]] = []
    lines: list[int] = []
    names: list[str] | None = None
    for line, row in _csv_rows(path, text, delimiter=delimiter, quoted=quoted):
        if names is None:
            names = row
            continue
        if len(row) != len(names):
            raise CorpusError(
                f"corpus {path}, line {line}: {len(row)} field{'s' if len(row) != 1 else ''} where the first "
                f"line names {len(names)} column{'s' if len(names) != 1 else ''}. Quote texts that hold the "
                f"separator or a line break"
            )
        rows.append(row)
        lines.append(line)
        if len(rows) == limit:
            break
    header = names or []
    return Table(
        f"corpus {path}",
        header,
        len(rows),
        lambda name: [row[header.index(name)] for row in rows],
        lambda row: f"line {lines[row]}",
    )


def _csv_rows(path: Path, text: str, *, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of every row that isn't blank."""
    limit = csv.field_size_limit(min(len(text) + 1, 2**31 - 1))  # the default refuses a text of 128 kB
    start = 1
    try:
        lines = io.StringIO(text, newline="")
        if quoted:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        else:
            reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise CorpusError(
            f"corpus {path}, line {start}: {error} (is a quotation mark left open or not doubled?)"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, limit: int | None) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return arrow_table(pq.ParquetFile(path).read(), where=f"corpus {path}", limit=limit)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"corpus {path} cannot be read as Parquet: {_first_line(error)}") from error


def _read_arrow(path: Path, limit: int | None) -> Table:
    """An Arrow IPC file, or the stream format, which datasets saves under the same suffix."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            return arrow_table(reader.read_all(), where=f"corpus {path}", limit=limit)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"corpus {path} cannot be read as Arrow: {_first_line(error)}") from error


def arrow_table(table: pa.Table, *, where: str, limit: int | None = None) -> Table:
    """An Arrow table's rows; classes' names are taken from the metadata that datasets leaves in a schema."""
    metadata = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    class_names = {}
    with contextlib.suppress(ValueError, LookupError, AttributeError, TypeError):  # anyone may write metadata
        for name, feature in json.loads(metadata)["info"]["features"].items():
            if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
                feature = feature["feature"]  # of each item of a list
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
                class_names[name] = [str(label) for label in feature["names"]]
    kept = table if limit is None else table.slice(0, limit)

    def column(name: str) -> list[Any]:
        try:
            return kept.column(name).to_pylist()
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where}: column '{name}' is not UTF-8: {error}") from error

    return Table(where, table.column_names, kept.num_rows, column, "row {}".format, class_names)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _some(items: Sequence[object], noun: str = "") -> str:
    """'column a', 'columns a, b', 'a, b, c, d, e and 7 more'."""
    listed = ", ".join(str(item) for item in items[:_SHOWN])
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{noun}{'s' if len(items) != 1 else ''} {listed}{more}" if noun else listed + more


READERS: dict[str, Callable[[Path, int | None], Table]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
}


# --------------------------------------------------------------------------------------- the Hugging Face Hub

_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(?::[\w.-]+)?", re.ASCII)


def hub_candidates(name: str) -> list[tuple[str, str | None]]:
    """(dataset, config) pairs a name may mean, likelier first: `glue/sst2` is config sst2 of glue.

    The collections of _COLLECTIONS have no owner: what stands before the slash is the dataset itself.
    """
    repo, _, config = name.removeprefix("hf:").partition(":")
    if config:
        return [(repo, config)]
    owner, _, rest = repo.partition("/")
    if not rest:
        return [(repo, None)]
    both: list[tuple[str, str | None]] = [(repo, None), (owner, rest)]
    return both[::-1] if owner in _COLLECTIONS else both


_COLLECTIONS = {"glue", "super_glue", "clue", "tweet_eval", "xtreme", "xglue", "paws-x", "xnli"}


def _load_hub(source: str) -> dict[str, Any]:
    """split -> datasets.Dataset, from the Hub, or where it can't be reached from earlier downloads."""
    name = source.removeprefix("hf:")
    if _HUB_NAME.fullmatch(name) is None:
        raise CorpusError(f"corpus {source}: '{name}' is no Hub dataset's name (glue/sst2, owner/name, name:config)")
    import datasets

    hint = _did_you_mean(Path(source), source) if "/" not in source else ""
    reached = True
    faults = []
    for repo, config in hub_candidates(name):
        known = _hub_has(repo)
        reached = reached and known is not None
        if known is False:
            continue
        try:
            with _hub_offline(known is None):
                # with its address, as a folder of that name in the working directory would go first
                return dict(datasets.load_dataset(f"hf://datasets/{repo}", config))
        except Exception as error:  # whatever HTTP, the disk, a parser or a configuration gives
            if known:
                raise CorpusError(f"the Hub's dataset {repo} cannot be loaded: {_first_line(error)}") from error
            if isinstance(error, ValueError):  # it was downloaded before, under other configurations
                faults.append(" ".join(str(error).split()))
    what = f"corpus {source}: there is no file or folder of that name"
    if not reached:
        fault = f": {faults[0]}" if faults else ""
        raise CorpusError(f"{what}, the Hub cannot be reached, and it was not downloaded before{fault}{hint}")
    raise CorpusError(f"{what}, nor a dataset on the Hub that you can read (private ones need `hf auth login`){hint}")


def _hub_has(repo: str) -> bool | None:
    """Whether the Hub has a dataset; None where it cannot be reached.

    One request: load_dataset, left to itself offline, tries for half a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(repo, timeout=10)
    except (RepositoryNotFoundError, HFValidationError):
        return False
    except Exception:  # the HTTP library's own errors, which change with its versions
        return None
    return True


@contextlib.contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """While open, datasets looks only at what was downloaded before."""
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def dataset_table(dataset: Any, *, where: str, limit: int | None = None) -> Table:
    """The rows of one split, a datasets.Dataset, with the names of its classes."""
    kept = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
    table = arrow_table(kept.with_format("arrow")[:], where=where)
    features = {name: getattr(feature, "feature", feature) for name, feature in dataset.features.items()}
    class_names = {name: feature.names for name, feature in features.items() if getattr(feature, "names", None)}
    return replace(table, class_names=class_names)
