"""Corpora: what the user names on the command line -> rows with id, text (or a pair) and label.

In: a .jsonl, .csv, .tsv, .parquet, .arrow or .txt file; a folder with one such file a split, or one that the datasets
library's `save_to_disk` wrote, or of a folder of images a class; a Hugging Face dataset (`glue/sst2`, `owner/name`,
`name:config`, or any of these after `hf:`); `builtin:docstrings`. Out: a `Corpus`. Whatever is wrong with the input is
one CorpusError that says where.

`softlabels.corpora` has the parts: what a name stands for (sources), a format's tables (files), and the columns, ids,
texts and labels of all formats judged in one place (columns, class_labels), so the same rows make the same corpus
whatever file they come in. A large corpus is never in memory: its rows go through a file (spool).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from softlabels.corpora.class_labels import INTEGER, find_kind, in_kind, name_labels, several
from softlabels.corpora.columns import choose_columns, judge_rows, need_column
from softlabels.corpora.sources import find_parts, parse_split
from softlabels.corpora.spool import Wanted, refuse_doubled, spool_rows
from softlabels.corpora.spooled_rows import RowHash, SpooledRows
from softlabels.corpora.tables import list_some
from softlabels.errors import CorpusError
from softlabels.types import IMAGES, NO_LABEL, Example, Task

SPOOL_BYTES = 16 << 20  # a corpus of files that are as large together is streamed


@dataclass(frozen=True)
class Corpus:
    """The rows of one source, in order.

    `examples` is a list, or of a large corpus a sequence that reads rows from a file as they are asked for; a slice of
    it is a list. `label_names` are the classes in the order of their indices, None where no row has a label. Labels are
    all integers or all strings.
    """

    source: str  # as the user named it
    split: str | None  # "train", "train+unlabeled"; None for a single file
    examples: Sequence[Example]
    label_names: list[str] | None

    @cached_property
    def hash(self) -> str:
        """xxh3-128 (hex) over every row's id, text, text_b and label, words or target, in order."""
        if isinstance(self.examples, SpooledRows):
            return self.examples.facts.hash
        return RowHash().add(self.examples).hexdigest()


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
        parts = find_parts(source, names, images=task == IMAGES)
        wanted = Wanted(source, parts, text, label, rows, task)
        joined = None if parts[0].split is None else "+".join(str(part.split) for part in parts)
        if sum(part.bytes for part in parts) >= SPOOL_BYTES:
            kept = spool_rows(wanted)
            return Corpus(source, joined, kept, kept.facts.label_names)
        examples, label_names = _read(wanted)
    except (OSError, RuntimeError) as error:  # RuntimeError: the '~' of no user
        raise CorpusError(f"corpus {source} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return Corpus(source, joined, examples, label_names)


def _read(wanted: Wanted) -> tuple[list[Example], list[str] | None]:
    """The rows in memory, and the names of their classes."""
    sources = [part.open(limit=wanted.rows) for part in wanted.parts]
    columns = [choose_columns(each, text=wanted.text, label=wanted.label, task=wanted.task) for each in sources]
    examples: list[Example] = []
    for each, chosen in zip(sources, columns, strict=True):
        rows = [row for table in judge_rows(each, chosen, wanted.task) for row in table]
        if not rows:
            raise CorpusError(f"{each.where} has no rows")
        examples += rows
    examples = examples[: wanted.rows]
    refuse_doubled(Counter(row.id for row in examples), wanted.source, joined=len(sources) > 1)
    found = (each.class_names.get(chosen.label or "") for each, chosen in zip(sources, columns, strict=True))
    class_names = next((names for names in found if names), None)
    if class_names is None and wanted.task in ("sequence-classification", IMAGES):
        kind = find_kind((row.label for row in examples if isinstance(row.label, str)), wanted.source)
        if kind != "as they are":
            examples = [replace(row, label=in_kind(row.label, kind)) for row in examples]
    if wanted.task == "regression":
        return examples, None
    return examples, name_labels((each for row in examples for each in several(row.label)), class_names)


def read_column(
    source: str | os.PathLike[str], name: str, *, option: str, split: str | None = None, rows: int | None = None
) -> list[Any]:
    """The values of one more column of `source`, row by row those of `read_corpus` with the same arguments.

    CorpusError where there is no such column; `option` is what the user named it with.
    """
    names = parse_split(split) if split is not None else None
    sources = [part.open(limit=rows) for part in find_parts(os.fspath(source), names)]
    return [value for each in sources for value in each.column(need_column(each, name, option))][:rows]


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
    if not all(INTEGER.fullmatch(name) for name in names):
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
    labels = list_some(sorted({repr(str(row.label)) for row in rows}), "label")
    message = (
        f"the teacher does not know {labels} of {len(rows)} row{'s' if len(rows) > 1 else ''} "
        f"({list_some([row.id for row in rows], 'id')}); it knows {', '.join(names)}."
    )
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return message + " These names are placeholders: give it the classes' names in id2label of its config.json."
    return message + " Rename the labels, or leave them empty for rows without one."
