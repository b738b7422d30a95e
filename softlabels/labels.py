"""Labels that are not one class a row: a value of a corpus's file comes in, an `Example.label` goes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from softlabels.errors import CorpusError
from softlabels.types import Label, Task


def read_words(value: Any, *, where: str) -> tuple[str, ...] | None:
    """A list of words, or one string with spaces between them; None where the row has none."""
    if value is None:
        return None
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word.strip() for word in words):
        raise CorpusError(
            f"{where}: words are a list of strings, none of them empty, or one string with spaces between"
        )
    return tuple(words)


def read_tags(value: Any, *, names: list[str] | None, words: tuple[str, ...] | None, where: str) -> Label:
    """A tag a word, as a list or as one string with spaces between; None where the row has none."""
    items = _items(value, separator=None)
    if items is None:
        return None
    if len(items) != len(words or ()):
        raise CorpusError(f"{where}: it has {len(items)} tags for {len(words or ())} words")
    return tuple(_class(item, names, where) for item in items)


def read_classes(value: Any, *, names: list[str] | None, words: tuple[str, ...] | None, where: str) -> Label:
    """The classes of a row, as a list or as one string with commas between; None where it is not labelled."""
    items = _items(value, separator=",")
    return None if items is None else tuple(_class(item, names, where) for item in items)


def read_numbers(value: Any, *, names: list[str] | None, words: tuple[str, ...] | None, where: str) -> Label:
    """A number, or a list of them; None where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    found = []
    for item in value if isinstance(value, list | tuple) else [value]:
        try:
            number = float(item)
        except (TypeError, ValueError):
            raise CorpusError(f"{where}: this teacher's labels are numbers, and {item!r} is none") from None
        if math.isnan(number) and not isinstance(value, list | tuple):
            return None
        if not math.isfinite(number):
            raise CorpusError(f"{where}: the label is {item!r}; labels are finite numbers")
        found.append(number)
    return tuple(found)


READ_LABELS: Mapping[Task, Callable[..., Label]] = {
    "token-classification": read_tags,
    "multi-label-classification": read_classes,
    "regression": read_numbers,
}


def _items(value: Any, *, separator: str | None) -> list[Any] | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return [item.strip() for item in value.split(separator) if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _class(item: Any, names: list[str] | None, where: str) -> int | str:
    """A class by name or by number; by name where the file knows the classes' names."""
    if isinstance(item, str):
        return item
    if isinstance(item, bool) or not isinstance(item, int):
        raise CorpusError(f"{where}: a label is of type {type(item).__name__}, neither an integer nor a string")
    if names is None:
        return item
    if not 0 <= item < len(names):
        raise CorpusError(f"{where}: label {item} is none of its {len(names)} classes")
    return names[item]
