"""A file of any format that is read here: a path comes in, a `Source` of columns and rows goes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from softlabels.corpora.arrow_files import read_arrow, read_parquet
from softlabels.corpora.tables import Source
from softlabels.corpora.text_files import read_csv, read_jsonl, read_tsv, read_txt
from softlabels.errors import CorpusError

READERS: dict[str, Callable[[Path, int | None, int | None], Source]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_txt,
}


def read_source(path: Path, *, limit: int | None = None, chunk: int | None = None) -> Source:
    """The first `limit` rows of a file, by its suffix; in memory as one table, or with a `chunk` so many at a time."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise CorpusError(f"corpus {path} is in no format that is read here: {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise CorpusError(f"corpus {path} is empty")
    return reader(path, limit, chunk)
