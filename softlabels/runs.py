"""The run: the folder that a training leaves, and the student that comes back out of it.

    run.json                     what was trained, how, on which cache, and the hash of every file below
    config.json model.safetensors    a torch student, as `save_pretrained` writes it; or model.skops (linear)
    tokenizer.json tokenizer_config.json …    the teacher's tokenizer, which a torch student reads with
    model.onnx or model.int8.onnx, tokenizer.json    an exported student instead, see `softlabels.students.exported`

run.json is written last: its existence means that the run is whole. Runs come from other people too, so
nothing here is a pickle, no code is loaded from a folder, and a file that isn't the one that was saved is
refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from softlabels.cache.files import hash_file, sync_folder, write_file
from softlabels.cache.format import TEMPORARY
from softlabels.config import PruneOptions, explain
from softlabels.errors import ConfigError, SoftlabelsError, StudentError
from softlabels.students.exported import TOKENIZER, ExportCard, OnnxFiles, OnnxStudent, load_exported
from softlabels.types import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from softlabels.students.linear import LinearStudent

RECORD = "run.json"
TOGETHER = "together.json"  # in the folder of students that trained together: the names of their runs
VERSION = 1


class Pruned(BaseModel):
    """What was set to zero; training the run further keeps every zero of its matrices."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    magnitude: float | None = None  # the share of the weights that was asked for
    heads: list[str] = []  # LAYER.HEAD, numbered from 1
    heads_by: str | None = None  # what they were chosen by: 'gradients' or 'weights'


def merge_pruned(before: Pruned | None, options: PruneOptions, heads: list[str], by: str | None) -> Pruned:
    """What run.json says of a pruning, and of one before it."""
    earlier = [] if before is None else before.heads
    return Pruned(
        magnitude=options.magnitude if options.magnitude is not None else before.magnitude if before else None,
        heads=[*earlier, *(head for head in heads if head not in earlier)],
        heads_by=by if by is not None or before is None else before.heads_by,
    )


class RunRecord(BaseModel):
    """run.json. `files` is filled in by `save_run`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")

    format: Literal["softlabels-run"] = "softlabels-run"
    version: int = VERSION
    student: str
    options: dict[str, Any]
    label_names: list[str]
    task: Task = "sequence-classification"
    max_length: int  # texts are cut to so many tokens
    losses: dict[str, float]
    temperature: str
    phases: list[dict[str, Any]] = []  # as the recipe has them; then `losses` and `temperature` are the last one's
    seed: int
    epochs_run: int
    best_epoch: int | None
    train_seconds: float
    train_rows: int
    labelled_rows: int
    validation: dict[str, float]
    history: list[dict[str, float]] = []  # one entry an epoch
    together: dict[str, Any] = {}  # with what other students or tasks it was trained, and how they were coupled
    cache: dict[str, Any]  # teacher's name, weights_hash, identity of the cache, and its path as given
    versions: dict[str, str]
    pruned: Pruned | None = None
    exported: ExportCard | None = None
    files: dict[str, str] = {}  # path inside the run: xxh3-128 (hex) of the file


@dataclass(frozen=True)
class Run:
    """A trained student, ready to use on this machine's CPU."""

    path: Path
    record: RunRecord
    student: PreTrainedModel | LinearStudent | OnnxStudent
    tokenizer: PreTrainedTokenizerBase | None  # None: the linear student and the exported one read the text themselves

    @property
    def label_names(self) -> list[str]:
        return self.record.label_names

    @property
    def kind(self) -> str:
        """'bilstm', 'transformer' …, or what it was exported as: 'bilstm in ONNX int8'."""
        card = self.record.exported
        return self.record.student if card is None else f"{self.record.student} in ONNX{' int8' if card.int8 else ''}"

    @property
    def parameters(self) -> int:
        """Numbers that were trained."""
        if self.record.exported is not None:
            return self.record.exported.parameters
        from softlabels.students.linear import LinearStudent

        assert not isinstance(self.student, OnnxStudent)
        if isinstance(self.student, LinearStudent):
            return self.student.parameters
        return sum(parameter.numel() for parameter in self.student.parameters())

    @property
    def nonzero(self) -> int:
        """Those of the numbers that are not zero; of an exported student, before it was."""
        if self.record.exported is not None:
            return self.record.exported.nonzero
        import torch

        if isinstance(self.student, torch.nn.Module):
            return sum(int(torch.count_nonzero(parameter)) for parameter in self.student.parameters())
        return self.parameters

    @property
    def size_on_disk(self) -> int:
        """Bytes that a user of the student must have: weights, config and tokenizer."""
        return sum((self.path / name).stat().st_size for name in self.record.files)

    def logits(self, examples: Sequence[Example], *, batch_size: int = 64) -> np.ndarray:
        """Logits (N, C) float32 of `examples`, in their order."""
        if isinstance(self.student, OnnxStudent):
            return self.student.logits(examples, batch_size=batch_size)
        from softlabels.students.linear import LinearStudent

        if isinstance(self.student, LinearStudent):
            return self.student.logits(
                [example.text for example in examples], pairs=[example.text_b for example in examples]
            )
        assert self.tokenizer is not None
        return _torch_logits(
            self.student, self.tokenizer, examples, max_length=self.record.max_length, batch_size=batch_size
        )


def _torch_logits(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    batch_size: int,
) -> np.ndarray:
    import torch

    from softlabels.students import student_inputs
    from softlabels.tokens import batches_by_length, pad_batch, tokenize

    rows = tokenize(tokenizer, examples, max_length=max_length).examples
    found = np.zeros((len(rows), student.config.num_labels or 0), dtype=np.float32)  # (N, C)
    with torch.inference_mode():
        for batch in batches_by_length([len(row.input_ids) for row in rows], batch_size=batch_size):
            tokens = pad_batch([rows[row] for row in batch], pad_token_id=_pad_token_id(tokenizer))
            found[batch] = student(**student_inputs(student, tokens)).logits.float().numpy()
    return found


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    number = tokenizer.pad_token_id
    assert isinstance(number, int)  # load_tokenizer sees to it
    return number


# ------------------------------------------------------------------------------------------------- writing


def save_run(
    out: Path,
    student: PreTrainedModel | LinearStudent | OnnxFiles,
    record: RunRecord,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write the run `out`: its files under temporary names, renamed when they are on the disk, run.json
    last.

    A kill leaves no run.json, or a whole run. The linear student reads the text itself and is saved without
    the tokenizer; an exported one brings its own.
    """
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f"{TEMPORARY}run"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        _write_files(draft, student, tokenizer)
        files = {name: _hash_on_disk(draft / name) for name in _names_in(draft)}
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    (out / RECORD).unlink(missing_ok=True)  # from here on, an older run in this folder is no more
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / name, out / name)
        sync_folder((out / name).parent)
    whole = record.model_copy(update={"files": files})
    write_file(out / RECORD, whole.model_dump_json(indent=1).encode())
    shutil.rmtree(draft, ignore_errors=True)  # until here it says whose files these are: see refuse_occupied


def refuse_occupied(out: Path) -> None:
    """ConfigError where `out` is a file, or a folder with anything in it but what a killed `save_run` left."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder")
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if RECORD in held:
        raise ConfigError(f"{out} holds a finished run: choose another --out, or delete it")
    if held and f"{TEMPORARY}run" not in held:
        raise ConfigError(f"{out} is not empty and no run (it holds {', '.join(held[:5])}): choose another --out")


def write_together(out: Path, runs: Sequence[str]) -> None:
    """The runs of these names, in folders of `out`, are whole: the last file of a training of several."""
    data = {"format": "softlabels-together", "version": VERSION, "runs": list(runs)}
    write_file(out / TOGETHER, json.dumps(data, indent=1).encode())


def _write_files(
    folder: Path, student: PreTrainedModel | LinearStudent | OnnxFiles, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if isinstance(student, OnnxFiles):
        student.save(folder)
        return
    from safetensors import SafetensorError

    from softlabels.pretrained import quiet_transformers
    from softlabels.students.linear import LinearStudent

    if isinstance(student, LinearStudent):
        student.save(folder)
        return
    if tokenizer is None:
        raise StudentError("a torch student is saved with the tokenizer that it reads with: give save_run one")
    with quiet_transformers():
        try:
            student.save_pretrained(folder)
        except SafetensorError as error:  # what a full disk looks like from there
            raise StudentError(f"the student's weights can't be written to {folder.parent}: {error}") from None
        tokenizer.save_pretrained(folder)


def _names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _hash_on_disk(path: Path) -> str:
    """The file's hash, once its bytes are safely on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    return hash_file(path)


# ------------------------------------------------------------------------------------------------- reading


def read_record(path: str | Path) -> RunRecord:
    """run.json of the run in folder `path`, without loading the student. StudentError says what is wrong."""
    folder = Path(path)
    if not folder.is_dir():
        raise StudentError(f"there is no run folder {folder}")
    if not (folder / RECORD).is_file():
        if (folder / "manifest.json").is_file():
            raise StudentError(f"{folder} is a cache, not a run: train a student from it with train-student")
        if (folder / TOGETHER).is_file():
            runs = sorted(str(path.parent) for path in folder.glob(f"*/{RECORD}"))
            raise StudentError(f"{folder} is no run, but holds runs that trained together: {', '.join(runs)}")
        raise StudentError(
            f"{folder} holds no finished run: it has no {RECORD}. "
            f"If a training was stopped there, give the same command again with --resume"
        )
    try:
        data = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudentError(f"{folder / RECORD} is damaged: {error}") from None
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise StudentError(f"{folder} is a run of format version {version}; this softlabels reads up to {VERSION}")
    try:
        record = RunRecord.model_validate(data)
    except ValidationError as error:
        raise StudentError(f"{folder / RECORD} is damaged: {explain(error, where=RECORD)}") from None
    for name in record.files:
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
            raise StudentError(f"{folder / RECORD} names the file '{name}', which is not inside the run: refused")
    return record


def load_run(path: str | Path) -> Run:
    """The run in folder `path`, its files checked against run.json; StudentError says what is wrong.

    Only safetensors, skops and ONNX are read, and no code from the folder is run.
    """
    folder = Path(path)
    record = read_record(folder)
    _check_files(folder, record)
    if record.exported is not None:
        return Run(folder, record, _load_exported(folder, record, record.exported), None)
    from softlabels.students import LINEAR, check_student, load_student

    if check_student(record.student) == LINEAR:
        return Run(folder, record, _load_linear(folder, record), None)
    _refuse_code(folder)
    from softlabels.pretrained import load_tokenizer

    student = load_student(record.student, folder)
    try:
        tokenizer = load_tokenizer(folder)
    except SoftlabelsError as error:
        raise StudentError(f"run {folder} is damaged: {error}") from None
    if record.task == "sequence-classification" and student.config.num_labels != len(record.label_names):
        raise StudentError(
            f"run {folder} is damaged: its student gives {student.config.num_labels} logits, "
            f"{RECORD} names {len(record.label_names)} classes"
        )
    return Run(folder, record, student, tokenizer)


def _load_linear(folder: Path, record: RunRecord) -> LinearStudent:
    from softlabels.students.linear import load_linear

    student = load_linear(folder)
    if len(student.bias) != len(record.label_names):
        raise StudentError(
            f"run {folder} is damaged: its student gives {len(student.bias)} logits, "
            f"{RECORD} names {len(record.label_names)} classes"
        )
    return student


def _load_exported(folder: Path, record: RunRecord, card: ExportCard) -> OnnxStudent:
    lacking = sorted({card.file, TOKENIZER} - record.files.keys())
    if lacking:
        raise StudentError(f"{folder / RECORD} is damaged: it names no {lacking[0]}, which an exported student has")
    return load_exported(folder, card, max_length=record.max_length, classes=len(record.label_names))


def _check_files(folder: Path, record: RunRecord) -> None:
    if not record.files:
        raise StudentError(f"{folder / RECORD} is damaged: it names no files")
    for name, expected in record.files.items():
        if not (folder / name).is_file():
            raise StudentError(f"run {folder} is incomplete: {name} is missing; copy the run again")
        if hash_file(folder / name) != expected:
            raise StudentError(f"run {folder} is damaged: {name} is not the file that was saved; copy the run again")


def _refuse_code(folder: Path) -> None:
    """StudentError where a config asks for code of its own, or for one that a hub would have to send."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StudentError(f"run {folder} is damaged: {name} can't be read: {error}") from None
        if not isinstance(settings, dict):
            raise StudentError(f"run {folder} is damaged: {name} is no JSON object")
        attention = settings.get("attn_implementation", settings.get("_attn_implementation"))
        if "auto_map" in settings or (attention is not None and "/" in str(attention)):
            raise StudentError(f"run {folder}: {name} asks for code to be loaded, which a run never needs: refused")
