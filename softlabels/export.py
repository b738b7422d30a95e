"""A run comes in, the same student in ONNX goes out, in float32 or int8, as a run that needs no torch.

The graph takes padded batches of any size and length, and gives the logits that PyTorch gives: that is checked before
anything is written. It is made by torch's TorchScript exporter, whose LSTM nodes ONNX Runtime can quantise; of the
newer one's decomposed graphs it quantises less (a BiLSTM: 1.04 times faster, against 2.7).

int8 is dynamic quantisation: matrices and LSTMs get 8-bit weights with a scale for each output (with one scale for all,
the logits of two of MiniLM's layers were 4 times further off), tables of word vectors one scale, and what goes into a
product is scaled as it comes, batch by batch. Weights take 7 of the 8 bits: processors without VNNI add products of 8
bits up in 16, where they overflow (on such a one, a BiLSTM's logits were 5 times further off without this).
"""

from __future__ import annotations

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabels.errors import StudentError
from softlabels.heads import remove_zero_heads
from softlabels.runs import Run, load_run, refuse_occupied, save_run
from softlabels.students import student_batch
from softlabels.students.exported import (
    ExportCard,
    InputName,
    OnnxFiles,
    OnnxStudent,
    import_for_export,
    open_session,
    refuse_elsewhere,
)
from softlabels.tokens import tokenize
from softlabels.types import NO_LABEL, Example, TokenBatch

TOLERANCE = 1e-4  # of logits, or of the largest of them where that is above 1
_OPSET = 17
_LARGEST = 2_000_000_000  # bytes; a protobuf can't have more than 2 GiB
_SHAPES = ((3, 7), (1, 1), (1, 5), (4, 33), (2, 0))  # (B, L) of the batches of the check; 0: the longest allowed


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export gave."""

    run: Path
    file: str
    bytes: int  # of the folder's files
    parameters: int
    nonzero: int
    removed_heads: int
    difference: float  # the largest between PyTorch's logits and the file's, on random batches


def export(run: Path, *, out: Path, int8: bool = False) -> ExportReport:
    """Write the student of the run folder `run` as ONNX into the run folder `out`, quantised if `int8`.

    StudentError for a student that can't be exported, a graph that doesn't give PyTorch's logits (within TOLERANCE; an
    int8 one only has to give finite ones), and where the extra `export` is not installed.
    """
    for name in ("onnx", "onnxruntime"):
        import_for_export(name)
    out, source = Path(out), load_run(run)
    if out.resolve() == Path(run).resolve():
        raise StudentError(f"--out {out} is the run that is exported: give another folder")
    refuse_occupied(out)
    model = _exportable(source)
    small, removed = _without_zero_heads(model, source)
    plain = _trace(small, _inputs(source, model), _batch(model, source, *_SHAPES[0]))
    name = "model.int8.onnx" if int8 else "model.onnx"
    card = ExportCard(
        file="model.int8.onnx" if int8 else "model.onnx",
        int8=int8,
        inputs=_inputs_of(plain),
        pad_token_id=_pad_token_id(source),
        truncation_side="left" if getattr(source.tokenizer, "truncation_side", "right") == "left" else "right",
        parameters=sum(parameter.numel() for parameter in small.parameters()),
        nonzero=sum(int(torch.count_nonzero(parameter)) for parameter in small.parameters()),
        removed_heads=removed,
        from_run=str(run),
        from_files=source.record.files,
    )
    difference = _check(plain, model, source, card, "float32")
    file = _quantise(plain) if int8 else plain
    if int8:
        difference = _check(file, model, source, card, "int8")
    assert source.tokenizer is not None
    save_run(
        out,
        OnnxFiles(name, file, source.tokenizer.backend_tokenizer),
        source.record.model_copy(update={"exported": card}),
    )
    size = load_run(out).size_on_disk
    return ExportReport(out, name, size, card.parameters, card.nonzero, removed, difference)


def _exportable(source: Run) -> PreTrainedModel:
    """The run's student; StudentError where it can't be exported."""
    path, student = source.path, source.student
    if isinstance(student, OnnxStudent):
        raise StudentError(f"{path} is a {source.kind} student already: export the run that it came from")
    if not isinstance(student, PreTrainedModel):
        raise StudentError(
            f"{path} is a {source.kind} student, which is no network: softlabels predict and evaluate run it without "
            f"torch as it is"
        )
    if source.record.task != "sequence-classification":
        raise StudentError(f"{path} is a {source.record.task} student, and export writes classifiers of texts only")
    if getattr(source.tokenizer, "backend_tokenizer", None) is None:
        raise StudentError(
            f"{path} reads with a tokenizer that has no tokenizer.json, which an exported student needs: take a "
            f"teacher with a fast tokenizer"
        )
    return student


def _inputs(source: Run, model: PreTrainedModel) -> list[InputName]:
    """What the student takes: token types only where the tokenizer tells them."""
    assert source.tokenizer is not None
    row = tokenize(source.tokenizer, [Example("0", "a", "b")], max_length=source.record.max_length).examples[0]
    batch = student_batch(model, _batch(model, source, *_SHAPES[0]))
    typed = row.token_type_ids is not None and batch.token_type_ids is not None
    return ["input_ids", "attention_mask", "token_type_ids"] if typed else ["input_ids", "attention_mask"]


def _inputs_of(file: bytes) -> list[Any]:
    """What the graph takes: the exporter leaves out what no logit depends on."""
    import onnx

    return [value.name for value in onnx.load_from_string(file).graph.input]


def _pad_token_id(source: Run) -> int:
    number = getattr(source.tokenizer, "pad_token_id", None)
    assert isinstance(number, int)  # load_tokenizer sees to it
    return number


# ----------------------------------------------------------------------------------------------------------- the graph


class _Logits(nn.Module):
    """The student as a function from tensors, in order, to logits."""

    def __init__(self, student: nn.Module, names: list[InputName]) -> None:
        super().__init__()
        self.student, self.names = student, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.student(**dict(zip(self.names, tensors, strict=True))).logits


def _trace(student: PreTrainedModel, names: list[InputName], batch: TokenBatch) -> bytes:
    """The graph of `student`, (B, L) int64 each to logits (B, C)."""
    buffer: Any = io.BytesIO()  # the exporter's types know only paths
    axes = {name: {0: "batch", 1: "tokens"} for name in names} | {"logits": {0: "batch"}}
    tensors = tuple(batch.model_inputs()[name] for name in names)
    try:
        with _quiet():
            torch.onnx.export(
                _Logits(student, names).eval(),
                tensors,
                buffer,
                input_names=list(names),
                output_names=["logits"],
                dynamic_axes=axes,
                opset_version=_OPSET,
                dynamo=False,
            )
    except Exception as error:  # the exporter fails in as many ways as there are architectures
        said = " ".join(str(error).split())
        kind = student.config.model_type
        raise StudentError(f"a '{kind}' student can't be written as ONNX: {said[:300]}") from None
    if buffer.tell() > _LARGEST:
        raise StudentError(f"the student takes {buffer.tell():,} bytes, and an ONNX file at most {_LARGEST:,}")
    return _plain_names(buffer.getvalue())


def _plain_names(model: bytes) -> bytes:
    """The same graph, its nodes' names and notes left out: nothing that is run, and one might look like a location."""
    import onnx

    graph = onnx.load_from_string(model)
    for node in graph.graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
    plain = graph.SerializeToString()
    refuse_elsewhere(plain, "the exported graph")
    return plain


def _quantise(model: bytes) -> bytes:
    """`model` with 8-bit weights; see the module."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "model.int8.onnx"
        graph = onnx.load_from_string(model)
        for number, node in enumerate(graph.graph.node):  # the quantiser tells nodes apart by their names
            node.name = f"{node.op_type}_{number}"
        quantize_dynamic(graph, file, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
        return _plain_names(file.read_bytes())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantiser's advice to their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _without_zero_heads(model: PreTrainedModel, source: Run) -> tuple[PreTrainedModel, int]:
    """The student without heads that were pruned, and how many; itself where its architecture can't go without."""
    small = copy.deepcopy(model)
    removed = remove_zero_heads(small)
    if not removed:
        return model, 0
    batch = _batch(model, source, *_SHAPES[0])
    try:
        names = _inputs(source, model)
        if torch.allclose(_answer(small, batch, names), _answer(model, batch, names), atol=TOLERANCE, rtol=TOLERANCE):
            return small, removed
    except RuntimeError:  # shapes that its code has no room for
        pass
    return model, 0


# ------------------------------------------------------------------------------------------------------------ the check


def _check(file: bytes, model: PreTrainedModel, source: Run, card: ExportCard, kind: str) -> float:
    """The largest difference to PyTorch's logits on ragged batches of random tokens; StudentError where too large."""
    assert source.tokenizer is not None
    student = OnnxStudent(file, open_session(file, f"the {kind} graph"), source.tokenizer.backend_tokenizer, card)
    worst = 0.0
    for size, length in _SHAPES:
        batch = _batch(model, source, size, length)
        theirs = _answer(model, batch, card.inputs).numpy()
        arrays = {name: tensor.numpy() for name, tensor in batch.model_inputs().items()}
        ours = student.run(arrays)
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            raise StudentError(f"the {kind} graph gives {ours.shape}, or numbers that are not finite: not written")
        off = float(np.abs(ours - theirs).max())
        worst, allowed = max(worst, off), TOLERANCE * max(1.0, float(np.abs(theirs).max()))
        if kind == "float32" and off > allowed:
            raise StudentError(
                f"the ONNX graph of this '{model.config.model_type}' gives logits {off:.2g} from PyTorch's on a "
                f"batch of {size} rows and {batch.input_ids.shape[1]} tokens, and {allowed:.2g} is allowed: not written"
            )
    return worst


def _batch(model: PreTrainedModel, source: Run, size: int, length: int) -> TokenBatch:
    """Rows of random tokens, the first of `length` (0: the run's longest), the others shorter."""
    longest = source.record.max_length
    length = longest if length == 0 else min(length, longest)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, length + 1, size)
    lengths[0] = length
    inside = np.arange(length) < lengths[:, None]  # (B, L)
    ids = np.where(inside, rng.integers(0, model.config.vocab_size, (size, length)), _pad_token_id(source))
    types = np.where(inside, np.arange(length) >= lengths[:, None] // 2, 0)
    known = getattr(model.config, "type_vocab_size", 2)
    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(inside.astype(np.int64)),
        torch.from_numpy((types % known if known else types * 0).astype(np.int64)),
        torch.full((size,), NO_LABEL),
    )


@torch.no_grad()
def _answer(student: PreTrainedModel, batch: TokenBatch, names: list[InputName]) -> Tensor:
    """Logits (B, C) of PyTorch, from the tensors called `names`."""
    tensors = batch.model_inputs()
    return student(**{name: tensors[name] for name in names}).logits.float()
