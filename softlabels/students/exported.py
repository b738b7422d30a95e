"""A student in ONNX: a file and a tokenizer come in, logits go out, by ONNX Runtime. Torch is not loaded.

    model.onnx or model.int8.onnx     input_ids, attention_mask (and token_type_ids) (B, L) int64 → logits (B, C)
    tokenizer.json                    as the `tokenizers` library writes and reads it

Such a file may come from anybody. ONNX Runtime runs no code from it, but a tensor of it may say that it lies in another
file, by any path: a file that has such a tensor is refused before it is opened. (A graph may still be made to use up
time and memory.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from softlabels.errors import StudentError
from softlabels.types import Example

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
InputName = Literal["input_ids", "attention_mask", "token_type_ids"]
_ELSEWHERE = b"location"  # the key under which a tensor names another file; a protobuf holds its strings as they are


class ExportCard(BaseModel):
    """What run.json says of an exported student, beside what it says of the run that it was exported from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: Literal["model.onnx", "model.int8.onnx"]
    int8: bool
    inputs: list[InputName]
    pad_token_id: int
    truncation_side: Literal["left", "right"] = "right"
    parameters: int  # of the student that was exported, but for heads that were removed
    nonzero: int
    removed_heads: int = 0
    from_run: str  # its folder, as it was given
    from_files: dict[str, str]  # its files' hashes


@dataclass(frozen=True, slots=True)
class OnnxFiles:
    """An exported student that is not on the disk yet."""

    name: str
    model: bytes
    tokenizer: Tokenizer

    def save(self, folder: Path) -> None:
        """Write both files."""
        (folder / self.name).write_bytes(self.model)
        self.tokenizer.save(str(folder / TOKENIZER))


@dataclass(frozen=True)
class OnnxStudent:
    """An exported student, ready to use on this machine's CPU."""

    model: bytes
    session: InferenceSession
    tokenizer: Tokenizer
    card: ExportCard

    def logits(self, examples: Sequence[Example], *, batch_size: int = 64) -> np.ndarray:
        """Logits (N, C) float32 of `examples`, in their order; rows of similar length go together."""
        if not examples:
            return np.zeros((0, self.classes), dtype=np.float32)
        rows = self._tokenize(examples)
        order = np.argsort([-len(row.ids) for row in rows], kind="stable")
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        found = [self.run(self._pad([rows[number] for number in batch])) for batch in batches]
        logits = np.concatenate(found)  # (N, C), in the order of `order`
        logits[order] = logits.copy()
        return logits

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Logits (B, C) float32 of padded `inputs` (B, L) int64; StudentError where the graph fails on them."""
        with _faults_told(self.card.file):
            (found,) = self.session.run(["logits"], {name: inputs[name] for name in self.card.inputs})
        logits = np.asarray(found, dtype=np.float32)
        if logits.shape != (len(inputs["input_ids"]), self.classes):
            raise StudentError(f"{self.card.file} gives logits {logits.shape} for {len(inputs['input_ids'])} rows")
        return logits

    @property
    def classes(self) -> int:
        """C, by the graph's own word."""
        return self.session.get_outputs()[0].shape[1]

    def with_threads(self, count: int) -> OnnxStudent:
        """The same student on so many threads of the CPU; by itself it takes a thread for each core."""
        return replace(self, session=open_session(self.model, self.card.file, threads=count))

    def _tokenize(self, examples: Sequence[Example]) -> list[Any]:
        """As `softlabels.tokens.tokenize` does it, cut to the run's length (see `load_exported`)."""
        if any(example.text_b for example in examples):
            return self.tokenizer.encode_batch([(example.text, example.text_b or "") for example in examples])
        return self.tokenizer.encode_batch([example.text for example in examples])

    def _pad(self, rows: Sequence[Any]) -> dict[str, np.ndarray]:
        """(B, L) int64 each, padded on the right."""
        shape = (len(rows), max(1, *(len(row.ids) for row in rows)))
        ids = np.full(shape, self.card.pad_token_id, dtype=np.int64)
        mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = row.ids
            types[number, : len(row.ids)] = row.type_ids
            mask[number, : len(row.ids)] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def load_exported(folder: Path, card: ExportCard, *, max_length: int, classes: int) -> OnnxStudent:
    """The exported student in `folder`; StudentError where a file of it can't be used, or ONNX Runtime isn't there."""
    from tokenizers import Tokenizer

    model = (folder / card.file).read_bytes()
    session = open_session(model, card.file)
    _check_signature(session, card, classes=classes, folder=folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length, strategy="longest_first", direction=card.truncation_side)
    except Exception as error:  # the library raises nothing narrower
        raise StudentError(f"run {folder} is damaged: {TOKENIZER} can't be used: {error}") from None
    return OnnxStudent(model, session, tokenizer, card)


def open_session(model: bytes, name: str, *, threads: int = 0) -> InferenceSession:
    """A session over the ONNX file's bytes, on the CPU, of `threads` threads (0: one for each core)."""
    runtime = import_for_export("onnxruntime")
    refuse_elsewhere(model, name)
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what fails is told by an error
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.load_model_format", "ONNX")  # its other format is for trusted files
    with _faults_told(name):
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def refuse_elsewhere(model: bytes, name: str) -> None:
    """StudentError where a tensor of the file lies, by its own word, in another one."""
    if _ELSEWHERE in model:
        raise StudentError(
            f"{name} names tensors that lie in other files, which an exported student never does: refused. Export it "
            f"again with softlabels export"
        )


def import_for_export(name: str) -> Any:
    """The module `name` of the extra `export`; StudentError says how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise StudentError(f"this needs {name}: pip install 'softlabels[export]'") from None


def _check_signature(session: InferenceSession, card: ExportCard, *, classes: int, folder: Path) -> None:
    inputs = {value.name: (value.type, len(value.shape)) for value in session.get_inputs()}
    outputs = {value.name: value.shape for value in session.get_outputs()}
    if inputs != {name: ("tensor(int64)", 2) for name in card.inputs} or list(outputs) != ["logits"]:
        raise StudentError(
            f"run {folder} is damaged: {card.file} takes {', '.join(inputs)} and gives {', '.join(outputs)}, which is "
            f"not what run.json says"
        )
    if len(outputs["logits"]) != 2 or outputs["logits"][1] != classes:
        raise StudentError(
            f"run {folder} is damaged: {card.file} gives logits {outputs['logits']}, run.json names {classes} classes"
        )


@contextmanager
def _faults_told(name: str) -> Iterator[None]:
    """What ONNX Runtime raises, as a StudentError: its errors have no common class of their own."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        raise StudentError(f"{name} can't be run by ONNX Runtime: {said[:300]}") from None
