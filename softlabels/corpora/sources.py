"""What a corpus's name stands for: the files or data sets of its splits, found but not yet read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softlabels.corpora.arrow_files import dataset_bytes, dataset_source
from softlabels.corpora.files import READERS, read_source
from softlabels.corpora.hub import is_hub_name, load_hub
from softlabels.corpora.tables import Source, column_source, first_line, list_some
from softlabels.errors import CorpusError
from softlabels.images import find_class_folders

SPLIT_NAMES = {  # as found -> as the command line and the ids have it
    **{name: "dev" for name in ("dev", "validation", "valid", "val")},
    **{name: "unlabeled" for name in ("unlabeled", "unlabelled", "unsupervised")},
    **{name: name for name in ("train", "test")},
}
DEFAULT_SPLIT = "train"


def parse_split(split: str) -> list[str]:
    """'train+validation' -> ['train', 'dev']."""
    names = [SPLIT_NAMES.get(name.strip().casefold(), name.strip()) for name in split.split("+")]
    if "" in names or len(set(names)) < len(names):
        raise CorpusError(f"--split {split}: name one split, or different ones with + between them")
    return names


# a name that ends so means a file, if one of a format that is not read here
_OTHER_SUFFIX = re.compile(r"\.(json|ndjson|feather|xlsx?|xml|yaml|pkl|npy|gz|bz2|xz|zst|zip|tar)", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One split of a corpus, or all of one that has none."""

    split: str | None
    bytes: int  # that it has on disk; 0 of what is made in memory
    place: str  # where it lies
    state: list[Any]  # what changes with its rows
    read: Callable[[int | None, int | None], Source]  # the first so many rows; so many at a time

    def open(self, *, limit: int | None = None, chunk: int | None = None) -> Source:
        """Its first `limit` rows, in memory, or a `chunk` of them at a time."""
        return replace(self.read(limit, chunk), split=self.split)


def find_parts(source: str, splits: list[str] | None, *, images: bool = False) -> list[Part]:
    """One part for a single file, else one for each split asked for. `images`: a folder may have one a class."""
    if source.startswith("builtin:"):
        return _open_builtin(source, splits)
    path = Path(source).expanduser()
    if path.is_file():
        if splits is not None:
            raise CorpusError(
                f"corpus {source} is a single file and has no splits: leave --split {'+'.join(splits)} out"
            )
        return [_file_part(path, None)]
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, splits)
    if path.is_dir() and images and not any(_split_of(place) for place in path.iterdir()):
        return _open_class_folders(path, splits)
    if path.is_dir():
        files = _find_split_files(path)
        return [_file_part(files[split], split) for split in _pick_splits(source, splits, list(files))]
    if path.exists():
        raise CorpusError(f"corpus {source} is neither a file nor a folder")
    if _looks_like_path(source):
        raise CorpusError(_no_such_file(path, source))
    return _dataset_parts(load_hub(source, hint="" if "/" in source else _did_you_mean(path, source)), source, splits)


def _file_part(path: Path, split: str | None) -> Part:
    facts = path.stat()
    state = [facts.st_size, facts.st_mtime_ns, facts.st_ino]
    return Part(
        split,
        facts.st_size,
        str(path.resolve()),
        state,
        lambda limit, chunk: read_source(path, limit=limit, chunk=chunk),
    )


def _dataset_part(dataset: Any, where: str, split: str | None) -> Part:
    return Part(
        split,
        dataset_bytes(dataset),
        where,
        [dataset._fingerprint, len(dataset)],
        lambda limit, chunk: dataset_source(dataset, where=where, limit=limit, chunk=chunk),
    )


def _dataset_parts(dataset: dict[str, Any], source: str, splits: list[str] | None) -> list[Part]:
    found = {SPLIT_NAMES.get(str(name).casefold(), str(name)): name for name in dataset}
    return [
        _dataset_part(dataset[found[split]], f"corpus {source}, split '{split}'", split)
        for split in _pick_splits(source, splits, list(found))
    ]


def _memory_part(source: Source) -> Part:
    def read(limit: int | None, chunk: int | None) -> Source:
        if limit is None:
            return source
        columns = {name: source.column(name)[:limit] for name in source.names}
        return replace(column_source(columns, where=source.where), folder=source.folder)

    return Part(source.split, 0, source.where, [], read)


def _open_saved(path: Path, splits: list[str] | None) -> list[Part]:
    """The parts of a folder that `save_to_disk` of the datasets library has written."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder fails in the library's own ways
        raise CorpusError(f"corpus {path} looks like a saved dataset but does not load: {first_line(error)}") from error
    if isinstance(saved, datasets.Dataset):
        if splits is not None:
            raise CorpusError(f"corpus {path} is a single dataset and has no splits: leave --split out")
        return [_dataset_part(saved, f"corpus {path}", None)]
    return _dataset_parts(dict(saved), str(path), splits)


def _pick_splits(source: str, asked: list[str] | None, there: list[str]) -> list[str]:
    """The splits asked for, by default `train`; CorpusError names those that exist."""
    for split in asked or [DEFAULT_SPLIT]:
        if split not in there:
            raise CorpusError(
                f"corpus {source} has no split '{split}'{'' if asked else ', the default'}; "
                f"it has {', '.join(there)}. Choose with --split"
            )
    return asked or [DEFAULT_SPLIT]


def _open_class_folders(path: Path, splits: list[str] | None) -> list[Part]:
    """The images of folders called like their classes, which may lie in folders called like splits."""
    inside = [place for place in sorted(path.iterdir()) if place.is_dir() and not place.name.startswith(".")]
    folders = {SPLIT_NAMES.get(place.name.casefold()): place for place in inside}
    chosen: list[tuple[str | None, Path]] = [(None, path)]
    if folders and None not in folders:  # else they are classes, one of them perhaps called train or test
        names = [split for split in folders if split is not None]
        if len(names) < len(inside):
            raise CorpusError(
                f"folder {path} holds a split twice, under two of its names: {list_some(inside)}. Keep one"
            )
        chosen = [(split, folders[split]) for split in _pick_splits(str(path), splits, names)]
    elif splits is not None:
        raise CorpusError(f"folder {path} has no folders called like splits: leave --split {'+'.join(splits)} out")
    parts = []
    for split, folder in chosen:
        classes = find_class_folders(folder)
        if not classes:
            raise CorpusError(
                f"folder {folder} holds no images in folders of their classes (such as cat/1.png), nor a file called "
                f"train, dev, test or unlabeled that names them, ending in {', '.join(READERS)}"
            )
        rows = [(name, place) for name, places in classes.items() for place in places]
        ids = [f"{folder.name}/{place}" if split else place for _, place in rows]
        columns = {"id": ids, "image": [place for _, place in rows], "label": [name for name, _ in rows]}
        found = column_source(columns, where=f"folder {folder}", split=split)
        parts.append(_memory_part(replace(found, folder=folder)))
    return parts


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
        there = list_some(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CorpusError(
            f"folder {folder} holds no split: a file called train, dev (or validation), test or unlabeled, "
            f"ending in {', '.join(READERS)}; it holds {there}"
        )
    return files


def _open_builtin(source: str, splits: list[str] | None) -> list[Part]:
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
    parts = []
    for split in _pick_splits(source, splits, list(harvest)):
        columns = {name: [getattr(row, name) for row in harvest[split]] for name in ("id", "text", "label")}
        parts.append(_memory_part(column_source(columns, where=f"corpus {source}, split '{split}'", split=split)))
    return parts


def _looks_like_path(source: str) -> bool:
    """Whether a name that isn't there was meant as a file or folder, and not as a dataset of the Hub."""
    if source.startswith("hf:"):
        return False
    path = Path(source).expanduser()
    return (
        not is_hub_name(source)
        or path.suffix.lower() in READERS
        or _OTHER_SUFFIX.fullmatch(path.suffix) is not None
        or (len(path.parts) > 1 and path.parent.is_dir())
    )


def _no_such_file(path: Path, source: str) -> str:
    message = f"no such file or folder: {source}"
    if not path.parent.is_dir():
        return f"{message} (nor is there a folder {path.parent})"
    message += _did_you_mean(path, source)
    if is_hub_name(source) and path.suffix not in READERS:
        message += f" (For the Hub's dataset of that name: hf:{source})"
    return message


def _did_you_mean(path: Path, source: str) -> str:
    """What in the same folder is called nearly so, as a sentence."""
    close = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), n=3)
    return f". Did you mean {' or '.join(str(Path(source).parent / name) for name in close)}?" if close else ""
