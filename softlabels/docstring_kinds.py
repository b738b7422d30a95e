"""A second task on the built-in corpus, `builtin:docstring-kinds`: tell what a docstring documents.

The rows are those of `builtin:docstrings`, split for split; the label is not the library but the kind of thing that the
docstring stands in: a module, a class, a function or a method. It is read off the source files that the rows' ids name.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from softlabels.docstrings import PACKAGES, find_package, load_docstrings, load_kept
from softlabels.types import Example

KINDS = ("class", "function", "method", "module")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def load_docstring_kinds() -> dict[str, list[Example]]:
    """The splits of `load_docstrings()`, the labelled ones labelled by kind; kept as those are."""
    return load_kept("docstring-kinds", harvest_kinds, code=Path(__file__))


def harvest_kinds() -> dict[str, list[Example]]:
    """The same from the source files: only those of labelled rows are parsed."""
    splits = load_docstrings()
    kinds = _find_kinds({_file_of(row) for rows in splits.values() for row in rows if row.label is not None})
    return {
        split: [row if row.label is None else replace(row, label=kinds[row.id]) for row in rows]
        for split, rows in splits.items()
    }


def read_kinds(source: bytes) -> dict[int, str]:
    """Line -> kind, for the module and for every class, function and method of a source file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes such as '\d' in other people's strings
        tree = ast.parse(source)
    kinds = {1: "module"}
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef):
                kinds[node.lineno] = "class"
            elif isinstance(node, _FUNCTIONS):
                kinds[node.lineno] = "method" if isinstance(parent, ast.ClassDef) else "function"
    return kinds


def _find_kinds(files: Iterable[str]) -> dict[str, str]:
    """Row id -> kind, for every row that a docstring of these files can be."""
    folders = {package or label: find_package(label) for label, package in PACKAGES.items()}
    kinds = {}
    for file in files:
        package, _, path = file.partition("/")
        for line, kind in read_kinds((Path(folders[package]) / path).read_bytes()).items():
            kinds[f"{file}:{line}"] = kind
    return kinds


def _file_of(row: Example) -> str:
    return row.id.rpartition(":")[0]
