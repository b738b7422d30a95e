"""What an evaluation leaves in its run's folder, so that a report, or a test against another run, needs no model.

    evaluations/NAME.json     every figure, of which corpus, run and teacher; and the hash of NAME.arrow
    evaluations/NAME.arrow    a row for each row of the corpus: id, text, label, tokens, logits of student and teacher

NAME is the corpus's, and the beginning of its content's hash. NAME.json is written last. Both are read as what they
are, other people's: JSON through pydantic, Arrow checked before anything in it is followed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softlabels.cache.arrow import read_numbers, read_table
from softlabels.cache.files import hash_file, map_file, publish, temporary, write_file
from softlabels.config import explain, fingerprint
from softlabels.errors import CacheError, StudentError
from softlabels.runs import RunRecord
from softlabels.scoring.figures import Evaluation
from softlabels.types import NO_LABEL

FOLDER = "evaluations"
VERSION = 1
_LARGEST_JSON = 64 << 20  # bytes; thousands of classes stay far below
_MOST_CLASSES = 100_000


class TeacherCard(BaseModel):
    """Which teacher a student was held against, and the cache that said what it says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    weights_hash: str
    cache: str  # its identity


class KeptEvaluation(BaseModel):
    """NAME.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["softlabels-evaluation"] = "softlabels-evaluation"
    version: int = VERSION
    run: str  # a fingerprint of the run's files: an evaluation of weights that are no longer there is of no use
    corpus_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    corpus_rows: Annotated[int, Field(ge=1)]
    label_names: Annotated[list[str], Field(min_length=1, max_length=_MOST_CLASSES)]
    length_unit: Literal["tokens", "words"]
    teacher: TeacherCard | None
    versions: dict[str, str]
    rows_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # of NAME.arrow
    figures: Evaluation


@dataclass(frozen=True)
class KeptRows:
    """NAME.arrow: what was asked and what was answered, in the corpus's order."""

    ids: list[str]
    texts: list[str] | None  # a pair's two texts joined by a line feed; None where they were left out
    labels: np.ndarray  # (N,) int32, NO_LABEL where there is none
    lengths: np.ndarray  # (N,) int32, in the evaluation's `length_unit`
    student: np.ndarray  # (N, C) float32 logits
    teacher: np.ndarray | None  # (N, C) float32 logits; NaN in a row that it has said nothing of


@dataclass(frozen=True)
class Kept:
    """An evaluation that was kept."""

    path: Path  # NAME.json
    card: KeptEvaluation
    rows: KeptRows

    @property
    def name(self) -> str:
        return self.path.stem


def evaluation_name(source: str, split: str | None, corpus_hash: str) -> str:
    """A file's name for the evaluation on a corpus: 'test-4d839253', 'sst2-validation-0b1c2d3e'."""
    words = [Path(source.rstrip("/")).stem or source, *([split] if split else [])]
    plain = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(words)).strip("-")[:60] or "corpus"
    return f"{plain}-{corpus_hash[:8]}"


def run_fingerprint(record: RunRecord) -> str:
    """Of the files of a run: the same weights, tokenizer and configuration have the same one."""
    return fingerprint(record.files)


def is_current(card: KeptEvaluation, record: RunRecord, corpus_hash: str | None = None) -> bool:
    """Whether it is of the files that the run has now, and of the corpus with that hash."""
    return card.run == run_fingerprint(record) and corpus_hash in (None, card.corpus_hash)


def keep_evaluation(run: Path, name: str, card: KeptEvaluation, rows: KeptRows) -> Path:
    """Write both files into the folder of `run`, NAME.json last; the path of that one."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    place = folder / f"{name}.json"
    place.unlink(missing_ok=True)  # an older one's rows are about to go
    table = _to_table(rows)
    draft = temporary(folder / f"{name}.arrow")
    try:
        with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        whole = card.model_copy(update={"rows_hash": hash_file(draft)})
        publish(folder / f"{name}.arrow")
    finally:
        draft.unlink(missing_ok=True)
    write_file(place, whole.model_dump_json(indent=1).encode())
    return place


def kept_names(run: Path) -> list[str]:
    """The names of the evaluations in the folder of `run`."""
    return sorted(path.stem for path in (run / FOLDER).glob("*.json"))


def read_card(run: Path, name: str) -> KeptEvaluation:
    """NAME.json alone; StudentError says what is wrong with it."""
    path = run / FOLDER / f"{name}.json"
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise StudentError(f"{path} is larger than any evaluation: refused")
        raw = path.read_bytes()
        data = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise StudentError(f"{path} can't be read: {error}. Evaluate the run again") from None
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise StudentError(f"{path} has format version {version}; this softlabels reads up to {VERSION}")
    try:
        card = KeptEvaluation.model_validate_json(raw)
    except ValidationError as error:
        raise StudentError(f"{explain(error, where=str(path))}. Evaluate the run again") from None
    if list(card.figures.classes) != card.label_names:
        raise StudentError(f"{path} is damaged: its figures are of other classes. Evaluate the run again")
    return card


def read_kept(run: Path, name: str) -> Kept:
    """The evaluation NAME of `run`, its rows too; StudentError says what is wrong with it."""
    card = read_card(run, name)
    path = run / FOLDER / f"{name}.arrow"
    try:
        if hash_file(path) != card.rows_hash:
            raise StudentError(f"{path} is not the file that was written with {name}.json: evaluate the run again")
        rows = _read_rows(path, card)
    except (OSError, CacheError) as error:
        raise StudentError(f"{path} can't be read: {error}. Evaluate the run again") from None
    return Kept(run / FOLDER / f"{name}.json", card, rows)


# ------------------------------------------------------------------------------------------------------------ Arrow


def _schema(classes: int, *, texts: bool, teacher: bool) -> pa.Schema:
    logits = pa.list_(pa.float32(), classes)
    fields = [("id", pa.string()), *([("text", pa.string())] if texts else [])]
    fields += [("label", pa.int32()), ("length", pa.int32()), ("student", logits)]
    return pa.schema([*fields, *([("teacher", logits)] if teacher else [])])


def _to_table(rows: KeptRows) -> pa.Table:
    classes = rows.student.shape[1]
    schema = _schema(classes, texts=rows.texts is not None, teacher=rows.teacher is not None)
    plain = {"id": rows.ids, "text": rows.texts, "label": rows.labels, "length": rows.lengths}
    columns = {name: pa.array(values, schema.field(name).type) for name, values in plain.items() if values is not None}
    for side, logits in (("student", rows.student), ("teacher", rows.teacher)):
        if logits is not None:
            flat = pa.array(np.ascontiguousarray(logits, dtype=np.float32).ravel())
            columns[side] = pa.FixedSizeListArray.from_arrays(flat, classes)
    return pa.table([columns[field.name] for field in schema], schema=schema)


def _read_rows(path: Path, card: KeptEvaluation) -> KeptRows:
    classes = len(card.label_names)

    def wanted(found: pa.Schema) -> pa.Schema:
        return _schema(classes, texts="text" in found.names, teacher=card.teacher is not None)

    table = read_table(map_file(path, path.stat().st_size), wanted, where=path)
    labels = read_numbers(table["label"])
    if table.num_rows != card.corpus_rows or ((labels != NO_LABEL) & ((labels < 0) | (labels >= classes))).any():
        raise StudentError(f"{path} is damaged: its rows are not those of {path.stem}.json. Evaluate the run again")
    return KeptRows(
        ids=table["id"].to_pylist(),
        texts=table["text"].to_pylist() if "text" in table.column_names else None,
        labels=labels,
        lengths=read_numbers(table["length"]),
        student=_logits(table["student"], classes),
        teacher=_logits(table["teacher"], classes) if card.teacher is not None else None,
    )


def _logits(column: pa.ChunkedArray, classes: int) -> np.ndarray:
    """(N, C) float32."""
    return read_numbers(column).reshape(-1, classes)
