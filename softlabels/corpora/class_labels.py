"""Labels that are one class a row: a file's values come in, integers or strings go out, and the classes' names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from softlabels.corpora.tables import list_some
from softlabels.errors import CorpusError
from softlabels.types import Label

NO_LABEL_TEXTS = {"", "NaN", "nan", "null", "NULL"}  # how files without types write that a row has no label
INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_INTEGRAL = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0*)?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def clean_label(value: Any, *, names: list[str] | None, where: Callable[[], str]) -> int | str | None:
    """One value of a label's column as an integer, a string, or None for no label."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        value = value.strip()
        if not encodes(value):
            raise CorpusError(f"{where()}: the label has half of a surrogate pair")
        return None if value in NO_LABEL_TEXTS else value
    if isinstance(value, float):
        if not value.is_integer():
            raise CorpusError(_regression(f"{where()}: the label is {value}"))
        value = int(value)
    if not isinstance(value, int):  # a bool is one
        raise CorpusError(
            f"{where()}: the label is of type {type(value).__name__}; a row has one "
            f"label, an integer or a string (several labels a row are not supported by this version)"
        )
    if names is None:
        return int(value)
    if value == -1:  # how datasets marks a row without a label
        return None
    if not 0 <= value < len(names):
        raise CorpusError(f"{where()}: label {value} is none of its {len(names)} classes")
    return names[value]


def _regression(what: str) -> str:
    return f"{what}. Regression labels are not supported by this version: a label is a class"


Kind = Literal["as they are", "integers", "strings"]  # what labels are made, so that all are of one type


def find_kind(texts: Iterable[str], source: str) -> Kind:
    """What labels become of which these are the strings: integers if all read as such ("1", "1.0"), else strings."""
    texts = set(texts)
    if not texts:
        return "as they are"
    fractions = sorted(text for text in texts if _INTEGRAL.fullmatch(text) is None)
    if not fractions:
        return "integers"
    if all("." in text and _NUMBER.fullmatch(text) for text in fractions):
        raise CorpusError(_regression(f"corpus {source} has {list_some(fractions, 'label')}"))
    return "strings"


def in_kind(label: Label, kind: Kind) -> Label:
    """A label of that kind."""
    if kind == "integers" and isinstance(label, str):
        found = _INTEGRAL.fullmatch(label)
        assert found is not None  # or the kind would be another
        return int(found[1])
    return str(label) if kind == "strings" and label is not None else label


def name_labels(distinct: Iterable[int | str | float | None], class_names: list[str] | None) -> list[str] | None:
    """The classes in the order of their indices; None where no row has a label."""
    there = set(distinct) - {None}
    if not there:
        return None
    if class_names is not None:
        return list(class_names)
    return [
        str(value) for value in sorted(there, key=lambda value: (value if isinstance(value, int) else 0, str(value)))
    ]


def several(label: Label) -> tuple[int | str | float | None, ...]:
    """The classes of a row, of which it may have many."""
    return label if isinstance(label, tuple) else (label,)


def encodes(text: str) -> bool:
    """False for a string with half of a surrogate pair, which JSON can spell and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
