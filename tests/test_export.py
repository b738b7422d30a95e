"""Exported students say what PyTorch says, on rows of any length; damage, and what no export can be, is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedModel

from softlabels import export as export_module
from softlabels.cache import open_cache
from softlabels.cache.files import hash_file
from softlabels.cli import main
from softlabels.config import DumpOptions, PruneOptions, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError, StudentError
from softlabels.export import export
from softlabels.prune import prune
from softlabels.runs import load_run, save_run
from softlabels.students import exported
from softlabels.train import train_student
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

LSTM = {"embedding_dim": 16, "hidden_size": 12}
BERT = {"layers": 2, "hidden_size": 32, "heads": 4}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bilstm": ("bilstm", LSTM),
    "bilstm-deep": ("bilstm", LSTM | {"layers": 2}),
    "lstm-attention": ("lstm_attention", LSTM),
    "lstm-attention-both-ways": ("lstm_attention", LSTM | {"bidirectional": True}),
    "word-average": ("word_average", LSTM),
    "bert": ("transformer", BERT),
    "distilbert": ("transformer", BERT | {"model_type": "distilbert"}),
    "roberta": ("transformer", BERT | {"model_type": "roberta"}),
    "mobilebert": ("transformer", {"preset": "mobilebert", "layers": 1}),
}
LONG = " ".join(text for text, _ in TEXTS)
ROWS = [Example(str(i), text, None, name) for i, (text, name) in enumerate(TEXTS)]
# of all lengths, one that is cut, one of a single token that nobody knows, and an empty one
ASKED = [*ROWS[:9], Example("long", LONG), Example("odd", "ß"), Example("none", "")]
PAIRS = [Example(str(i), ROWS[i].text, ROWS[-i].text, ROWS[i].label) for i in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of single texts, one of pairs, and a trained run of each student."""
    folder = tmp_path_factory.mktemp("export")
    teacher = str(save_teacher(folder / "teacher"))
    for name, rows in (("cache", ROWS), ("pairs", PAIRS)):
        dump(Corpus("made", None, rows, LABEL_NAMES), teacher=teacher, out=folder / name, options=DumpOptions())
    for name, (student, options) in STUDENTS.items():
        train(folder / "cache", folder / name, student, options)
    train(folder / "pairs", folder / "bilstm-pairs", "bilstm", LSTM)
    train(folder / "pairs", folder / "bert-pairs", "transformer", BERT)
    return folder


def train(cache: Path, out: Path, student: str, options: dict[str, Any], **changes: Any) -> Path:
    values = {"student": student, "options": options, "losses": {"ce": 1}, "epochs": 1, "lr": 2e-2, "batch_size": 32}
    train_student(open_cache(cache), out=out, options=StudentOptions.model_validate(values | changes), cpu=True)
    if student == "transformer":  # so small a one says the same of every text, unless its weights are made larger
        run = load_run(out)
        assert isinstance(run.student, PreTrainedModel)
        with torch.no_grad():
            for parameter in run.student.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
        save_run(out, run.student, run.record, tokenizer=run.tokenizer)
    return out


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    """The BiLSTM, exported."""
    export(place / "bilstm", out=place / "small")
    return place / "small"


@pytest.mark.parametrize("name", STUDENTS)
def test_logits_are_those_of_pytorch(place: Path, tmp_path: Path, name: str) -> None:
    report = export(place / name, out=tmp_path / "onnx")
    theirs, ours = load_run(place / name), load_run(tmp_path / "onnx")
    for batch_size in (64, 1, 5):  # all lengths in a batch; each by itself
        np.testing.assert_allclose(
            ours.logits(ASKED, batch_size=batch_size), theirs.logits(ASKED), atol=1e-4, rtol=1e-4
        )
    assert np.ptp(theirs.logits(ASKED), axis=0).max() > 0.01  # they do tell texts apart
    assert report.difference < 1e-4 * max(1, np.abs(theirs.logits(ASKED)).max())
    assert ours.parameters == theirs.parameters == report.parameters
    assert ours.size_on_disk == report.bytes == sum((tmp_path / "onnx" / file).stat().st_size for file in files(ours))


def files(run: Any) -> list[str]:
    return list(run.record.files)


@pytest.mark.parametrize("name", ["bilstm-pairs", "bert-pairs"])
def test_pairs_are_told_apart(place: Path, tmp_path: Path, name: str) -> None:
    export(place / name, out=tmp_path / "onnx")
    theirs, ours = load_run(place / name), load_run(tmp_path / "onnx")
    rows = [*PAIRS[:7], Example("long", LONG, LONG), Example("one", "rain")]
    np.testing.assert_allclose(ours.logits(rows), theirs.logits(rows), atol=1e-4, rtol=1e-4)
    turned = [Example("turned", PAIRS[1].text_b or "", PAIRS[1].text)]
    assert np.abs(ours.logits(turned) - ours.logits(PAIRS[1:2])).max() > 1e-4


@pytest.mark.parametrize("name", ["bilstm", "lstm-attention", "word-average", "bert"])
def test_int8_is_near_and_smaller(place: Path, tmp_path: Path, name: str) -> None:
    export(place / name, out=tmp_path / "plain")
    report = export(place / name, out=tmp_path / "int8", int8=True)
    theirs, ours = load_run(place / name), load_run(tmp_path / "int8")
    off = np.abs(ours.logits(ROWS) - theirs.logits(ROWS))
    assert 0 < off.mean() < 0.05 * np.ptp(theirs.logits(ROWS))
    assert (ours.logits(ROWS).argmax(1) == theirs.logits(ROWS).argmax(1)).mean() >= 0.95
    assert report.file == "model.int8.onnx" and ours.kind.endswith("in ONNX int8")
    operators = {node.op_type for node in onnx.load(tmp_path / "int8" / report.file).graph.node}
    assert operators & {"DynamicQuantizeLSTM", "MatMulInteger"} and "DequantizeLinear" in operators
    tables = [
        value
        for value in onnx.load(tmp_path / "int8" / report.file).graph.initializer
        if min(value.dims, default=0) > 1 < len(value.dims)
    ]
    wide = sum(int(np.prod(value.dims)) for value in tables if value.data_type == onnx.TensorProto.FLOAT)
    assert wide < 0.05 * sum(int(np.prod(value.dims)) for value in tables)  # nothing large was left in float32


def test_predict_and_evaluate_through_the_command_line(place: Path, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "\n".join(f'"{row.text}",{row.label}' for row in ROWS), encoding="utf-8")

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        assert left.value.code == 0
        return capsys.readouterr().out

    said = json.loads(call("export", place / "bert", "--out", tmp_path / "onnx", "--int8", "--json"))
    before = json.loads(call("evaluate", place / "bert", data, "--cache", place / "cache", "--json"))
    after = json.loads(call("evaluate", tmp_path / "onnx", data, "--cache", place / "cache", "--json"))
    assert after["rows"] == before["rows"] == len(ROWS) and after["fidelity"]["rows"] == len(ROWS)
    assert abs(after["accuracy"] - before["accuracy"]) <= 0.05
    assert after["bytes"] == said["bytes"] < before["bytes"] and after["parameters"] == before["parameters"]
    assert 0 < after["latency"]["ms"] < before["latency"]["ms"]
    lines = [json.loads(call("predict", run, ROWS[0].text, "--json")) for run in (place / "bert", tmp_path / "onnx")]
    assert lines[0]["label"] == lines[1]["label"]
    assert lines[0]["probability"] == pytest.approx(lines[1]["probability"], abs=0.05)


def test_predict_needs_no_torch(small: Path) -> None:
    """Nor transformers: an exported student starts at once."""
    script = (
        "import sys; from softlabels.predict import predict; from pathlib import Path; "
        f"print(predict(Path({str(small)!r}), ['rain and wind', 'a cup of tea'])[0].label); "
        "print(sorted({'torch', 'transformers', 'sklearn', 'onnx'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    label, modules = done.stdout.splitlines()
    assert label in LABEL_NAMES and modules == "[]"


def test_heads_that_were_pruned_leave_the_graph(place: Path, tmp_path: Path) -> None:
    for name in ("bert", "distilbert"):
        prune(place / name, out=tmp_path / name, options=PruneOptions(heads=0.5))
        report = export(tmp_path / name, out=tmp_path / f"{name}-onnx")
        theirs, ours = load_run(tmp_path / name), load_run(tmp_path / f"{name}-onnx")
        np.testing.assert_allclose(ours.logits(ASKED), theirs.logits(ASKED), atol=1e-4, rtol=1e-4)
        assert report.removed_heads == 4
        a_head = 4 * 8 * 32 + 3 * 8  # four matrices, three biases
        assert ours.parameters == theirs.parameters - 4 * a_head
        whole = export(place / name, out=tmp_path / f"{name}-whole")
        assert whole.bytes - report.bytes == pytest.approx(4 * 4 * a_head, rel=0.1)


def test_batches_and_threads_change_nothing(small: Path) -> None:
    run = load_run(small)
    assert isinstance(run.student, exported.OnnxStudent)
    one = run.student.with_threads(1)
    np.testing.assert_allclose(one.logits(ROWS), run.logits(ROWS), atol=1e-6)
    assert run.logits([]).shape == (0, 3)


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(StudentError) as told:
        export(*arguments, **options)
    return str(told.value)


def test_what_is_not_exported(place: Path, tmp_path: Path, small: Path) -> None:
    linear = train(place / "cache", tmp_path / "linear", "linear", {"min_df": 1}, losses={"mse_logits": 1})
    assert "no network" in refused(linear, out=tmp_path / "out")
    assert "export the run that it came from" in refused(small, out=tmp_path / "out")
    assert "give another folder" in refused(place / "bert", out=place / "bert")
    with pytest.raises(ConfigError, match="holds a finished run"):
        export(place / "bert", out=place / "bilstm")
    assert load_run(place / "bilstm").kind == "bilstm"
    assert load_run(place / "bert").parameters  # which is as it was
    assert "there is no run folder" in refused(tmp_path / "nowhere", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_says_something_else_is_not_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = export_module.__dict__["_trace"]

    def off(student: PreTrainedModel, *rest: Any) -> bytes:
        with torch.no_grad():
            student.get_parameter("classifier.bias").add_(0.01)
        made = trace(student, *rest)
        with torch.no_grad():
            student.get_parameter("classifier.bias").sub_(0.01)
        return made

    monkeypatch.setitem(export_module.__dict__, "_trace", off)
    assert "logits 0.01 from PyTorch's" in refused(place / "bilstm", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_extra(
    place: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert f"needs {missing}: pip install 'softlabels[export]'" in refused(place / "bert", out=tmp_path / "out")
    if missing == "onnxruntime":
        with pytest.raises(StudentError, match=r"pip install 'softlabels\[export\]'"):
            load_run(small)
    else:
        assert load_run(small).logits(ROWS[:1]).shape == (1, 3)


def test_damage_is_refused(small: Path, tmp_path: Path) -> None:
    def copy(name: str, file: str, content: bytes | None, *, hashed: bool) -> Path:
        """The exported run with another `file`; `hashed`: whose hash run.json has, as its maker would see to."""
        folder = Path(shutil.copytree(small, tmp_path / name))
        if content is None:
            (folder / file).unlink()
            return folder
        (folder / file).write_bytes(content)
        record = json.loads((folder / "run.json").read_text())
        record["files"][file] = hash_file(folder / file) if hashed else record["files"][file]
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    model = (small / "model.onnx").read_bytes()
    graph = onnx.load_from_string(model)
    outside = graph.graph.initializer.add(name="secret", data_type=onnx.TensorProto.UINT8, dims=[5])
    outside.data_location = onnx.TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../secret")
    for name, file, content, hashed, told in (
        ("gone", "model.onnx", None, False, "model.onnx is missing"),
        ("flipped", "model.onnx", model[:-1] + bytes([model[-1] ^ 1]), False, "is not the file that was saved"),
        ("cut", "model.onnx", model[: len(model) // 2], True, "can't be run by ONNX Runtime"),
        ("outside", "model.onnx", graph.SerializeToString(), True, "lie in other files"),
        ("tokenizer", "tokenizer.json", b"{}", True, "tokenizer.json can't be used"),
    ):
        with pytest.raises(StudentError, match=told):
            load_run(copy(name, file, content, hashed=hashed))
    other = Path(shutil.copytree(small, tmp_path / "classes"))
    record = json.loads((other / "run.json").read_text()) | {"label_names": ["a", "b"]}
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(StudentError, match=r"run\.json names 2 classes"):
        load_run(other)
