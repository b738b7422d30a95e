"""The built-in corpus `builtin:docstrings`: tell which library a docstring is from.

In: the source files of the standard library and of six packages, as they lie on the user's machine. They are
parsed, never imported, so nothing of them runs. Out: `load_docstrings()`, the rows of the splits `train`,
`test` and `unlabeled`. data/README.md tells what the rows are; the constants below set the sizes.

Everything follows from the files' relative paths and contents: hashes order the files and the rows, so that
neither the folder the packages lie in, the locale, nor the order of a directory listing has a say.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from importlib import metadata
from pathlib import Path

from softlabels.errors import CorpusError
from softlabels.types import Example

PACKAGES = {  # label -> the package whose docstrings bear it; None is the standard library
    "numpy": "numpy",
    "pandas": "pandas",
    "python": None,
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "torch": "torch",
    "transformers": "transformers",
}
TRAIN_ROWS, TEST_ROWS = 1500, 2000  # over all classes, each in proportion to what it has
CLASS_ROWS = 2000  # most rows of a class over all splits; what test and train leave goes to `unlabeled`
LABELLED_FILE_ROWS = 12  # most rows of one file in train and test: few rows of many files say more about a library
SHORTEST, LONGEST = 25, 300  # characters of a text
NEUTRAL = "library"  # stands in a text where a library was named

_SPARE = 1.3  # how much more than CLASS_ROWS is read, as LABELLED_FILE_ROWS and shared texts cost some of it

_SKIPPED_FOLDERS = {  # tests, and code that is another project's
    *("test", "tests", "_tests", "_testing", "_test_common", "testing/_internal", "__pycache__"),
    *("_vendor", "_vendored", "vendored_templates", "externals", "_external", "extern", "third_party"),
    *("array_api_compat", "array_api_extra", "_uarray", "cobyqa", "pyprima"),
    # parts of the standard library that distributions package apart, or that later versions of Python drop
    *(
        "idlelib",
        "lib2to3",
        "tkinter",
        "turtledemo",
        "ensurepip",
        "distutils",
        "site-packages",
        "dist-packages",
    ),
}
_TEST_FILE = re.compile(r"(test_.*|.*_test|conftest)\.py")

_LIBRARY_NAME = re.compile(
    r"""scikits?[-_.\s]?learn | scikits? | sklearn | hugging[-_\s]?face | 🤗
      | [ci]?python(?:ic)? | numpy | scipy | pandas | pytorch | libtorch | torch | transformers
      | (?<![^\W_]) (?-i: np | pd | hf | HF) (?![^\W_])""",
    re.IGNORECASE | re.VERBOSE,
)
_DOUBLED_NEUTRAL = re.compile(rf"{NEUTRAL}(?:[\s/-]+{NEUTRAL})+")
_RULE = re.compile(r"[^\w\s]{3,}")  # a line of punctuation under or over a title
_BLOCKS = ("body", "orelse", "handlers", "finalbody")  # where a statement holds others
_SECTION = re.compile(  # a docstring that opens with one of these has no summary
    r"(args|arguments|attributes|examples?|inputs?|notes?|parameters?|raises|returns?|usage|yields)\s*:{0,2}",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """The texts of one source file, in the order of its lines."""

    label: str
    path: str  # with '/', and led by the package: numpy/linalg/_linalg.py, python/json/decoder.py
    texts: dict[int, str]  # line of the module, class or function -> text

    @property
    def examples(self) -> list[Example]:
        """The file's rows; an id says where the docstring stands."""
        return [Example(id=f"{self.path}:{line}", text=text, label=self.label) for line, text in self.texts.items()]


def load_docstrings() -> dict[str, list[Example]]:
    """`harvest_docstrings()`, kept in the user's cache folder, as it takes some seconds.

    What is kept goes by the versions of Python, the packages and this file; a damaged copy is made anew.
    """
    return load_kept("docstrings", harvest_docstrings, code=Path(__file__))


def load_kept(name: str, harvest: Callable[[], dict[str, list[Example]]], *, code: Path) -> dict[str, list[Example]]:
    """`harvest()`, kept in the user's cache folder as `name`; `code` is the file that says how it is made."""
    kept = _kept_path(name, code=code)
    if kept is not None and (splits := _read_kept(kept)) is not None:
        return splits
    splits = harvest()
    if kept is not None:
        _write_kept(kept, splits)
    return splits


def harvest_docstrings() -> dict[str, list[Example]]:
    """The rows of every split, each in an order that mixes the classes.

    Raises CorpusError where a package is missing or holds too few docstrings.
    """
    sources = {label: read_sources(label, find_package(label)) for label in PACKAGES}
    return split_sources(drop_shared_texts(sources))


def find_package(label: str) -> Path:
    """The folder of a class's source files, found without importing anything."""
    package = PACKAGES[label]
    if package is None:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(
            f"builtin:docstrings is made of the docstrings of {', '.join(PACKAGES)}, but {label} is not "
            f"installed: pip install 'softlabels[demo]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def read_sources(label: str, folder: Path) -> list[SourceFile]:
    """Files of a class in the order of their paths' hashes, until there are enough texts; no text twice."""
    seen: set[str] = set()
    sources = []
    for path in sorted(_source_paths(label, folder), key=lambda path: _hash(label, path)):
        if len(seen) >= CLASS_ROWS * _SPARE:
            break
        texts = {}
        for line, text in read_texts((folder / path).read_bytes()).items():
            if (key := text_key(text)) not in seen:
                seen.add(key)
                texts[line] = text
        if texts:
            sources.append(SourceFile(label, f"{PACKAGES[label] or label}/{path}", texts))
    return sources


def _source_paths(label: str, folder: Path) -> Iterator[str]:
    """Paths relative to `folder`, with '/', of the source files that count; in no particular order."""
    for parent, folders, files in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not {name, f"{inside.name}/{name}"} & _SKIPPED_FOLDERS]
        for name in files:
            path = (inside / name).as_posix()
            if not name.endswith(".py") or _TEST_FILE.fullmatch(name) or not os.path.isfile(folder / path):
                continue
            # beside the modules, the standard library's folder holds what this machine's build left there
            if PACKAGES[label] is None and path.split("/")[0].removesuffix(".py") not in sys.stdlib_module_names:
                continue
            yield path


def read_texts(source: bytes) -> dict[int, str]:
    """Line -> text for every docstring of a source file that gives one; none if it doesn't parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as '\d' in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return {}
    texts = {}
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = clean_docstring(ast.get_docstring(node, clean=False) or "")
            if text is not None:
                texts[getattr(node, "lineno", 1)] = text
        for block in _BLOCKS:  # statements only: ast.walk would visit every name and number too
            pending += getattr(node, block, ())
    return dict(sorted(texts.items()))


def clean_docstring(docstring: str) -> str | None:
    """The first paragraph on one line, libraries' names replaced; None if too short, too long or none."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    lines = [line.strip() for line in paragraph.split("\n") if not _RULE.fullmatch(line.strip())]
    if not lines or _SECTION.fullmatch(lines[0]):
        return None
    text = _LIBRARY_NAME.sub(NEUTRAL, " ".join(" ".join(lines).split()))
    text = _DOUBLED_NEUTRAL.sub(NEUTRAL, text)
    return text if SHORTEST <= len(text) <= LONGEST else None


def text_key(text: str) -> str:
    """What two texts share that count as the same: letters and digits, case folded."""
    return re.sub(r"[\W_]+", "", text.casefold())


def drop_shared_texts(sources: dict[str, list[SourceFile]]) -> dict[str, list[SourceFile]]:
    """The same files without the texts found under two labels: such a text has no true label."""
    owners: dict[str, set[str]] = {}
    for label, files in sources.items():
        for file in files:
            for text in file.texts.values():
                owners.setdefault(text_key(text), set()).add(label)
    kept: dict[str, list[SourceFile]] = {}
    for label, files in sources.items():
        alone = [
            {line: text for line, text in file.texts.items() if len(owners[text_key(text)]) == 1} for file in files
        ]
        kept[label] = [SourceFile(label, file.path, texts) for file, texts in zip(files, alone, strict=True) if texts]
    return kept


def split_sources(sources: dict[str, list[SourceFile]]) -> dict[str, list[Example]]:
    """Deal each class's files out, in order: first to `test`, then to `train`, the rest to `unlabeled`.

    A file goes to one split only. What the last file of a split holds beyond the split's size is dropped.
    """
    splits: dict[str, list[Example]] = {"train": [], "unlabeled": [], "test": []}
    sizes = {label: min(CLASS_ROWS, sum(len(file.texts) for file in sources[label])) for label in sorted(sources)}
    test, train = share_out(TEST_ROWS, sizes), share_out(TRAIN_ROWS, sizes)
    for label in sizes:
        files = iter(sources[label])
        for split, quota in (("test", test[label]), ("train", train[label])):
            rows = _take_files(files, quota, file_rows=LABELLED_FILE_ROWS)
            if len(rows) < quota:
                raise CorpusError(
                    f"builtin:docstrings finds too few docstrings of {label}: {len(rows)} of the {quota} "
                    f"rows of split '{split}'. Are its source files (.py) installed?"
                )
            splits[split] += rows
        rest = _take_files(files, CLASS_ROWS - test[label] - train[label], file_rows=CLASS_ROWS)
        splits["unlabeled"] += [replace(row, label=None) for row in rest]
    return {split: sorted(rows, key=lambda row: _hash(row.id, row.text)) for split, rows in splits.items()}


def share_out(rows: int, sizes: dict[str, int]) -> dict[str, int]:
    """`rows` over the classes in proportion to `sizes`; the largest remainders get one more, to add up."""
    total = sum(sizes.values()) or 1
    shares = {label: rows * size // total for label, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda label: (-(rows * sizes[label] % total), label))
    for label in by_remainder[: rows - sum(shares.values())]:
        shares[label] += 1
    return shares


def _take_files(files: Iterator[SourceFile], quota: int, *, file_rows: int) -> list[Example]:
    """Rows of the next files, at most `file_rows` of each, until there are `quota` or the files run out."""
    rows: list[Example] = []
    while len(rows) < quota and (file := next(files, None)) is not None:
        rows += sorted(file.examples, key=lambda row: _hash(row.text))[:file_rows]
    return rows[:quota]


def _kept_path(name: str = "docstrings", *, code: Path = Path(__file__)) -> Path | None:
    """Where this machine's harvest is kept; None where a package has no version, or the user no home."""
    facts = [
        sys.version,
        *(hashlib.sha256(file.read_bytes()).hexdigest() for file in dict.fromkeys([Path(__file__), code])),
    ]
    try:
        for label, package in PACKAGES.items():
            facts += [label, str(find_package(label)), "" if package is None else metadata.version(label)]
        windows = sys.platform == "win32"
        base = os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME")
        folder = Path(base) if base else Path.home() / (".cache" if not windows else "AppData/Local")
    except (metadata.PackageNotFoundError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder / "softlabels" / f"{name}-{_hash(*facts).hex()[:16]}.json"


def _read_kept(path: Path) -> dict[str, list[Example]] | None:
    """The splits kept at `path`; None where there are none, or not the ones that were written."""
    try:
        checksum, body = path.read_text(encoding="utf-8").split("\n", 1)
        if checksum != _hash(body).hex():
            return None
        return {split: [Example(*row) for row in rows] for split, rows in json.loads(body).items()}
    except (OSError, ValueError):
        return None


def _write_kept(path: Path, splits: dict[str, list[Example]]) -> None:
    """Keep the splits for next time; a folder that can't be written only costs that time."""
    body = json.dumps({split: [astuple(row) for row in rows] for split, rows in splits.items()})
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(f"{_hash(body).hex()}\n{body}", encoding="utf-8")
        os.replace(temporary, path)  # two commands may harvest at once: each writes a whole file
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _hash(*parts: str) -> bytes:
    """Orders files and rows in a way that has nothing to do with their names, the same everywhere."""
    return hashlib.sha256("\0".join(parts).encode()).digest()
