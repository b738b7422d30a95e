"""Runs: what save_run leaves comes back whole, or is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softlabels.errors import StudentError
from softlabels.runs import Run, RunRecord, load_run, read_record, save_run
from softlabels.students import StudentSpec, build_student
from softlabels.students.linear import fit_linear
from softlabels.types import Example

TEXTS = [
    "a fine film",
    "a dull film with a poor story and no end in sight",
    "story",
    "a fine story well told",
    "no",
    "the end",
    "a poor film",
]
LABELS = ["bad", "good", "so-so"]
KINDS: dict[str, dict[str, Any]] = {
    "bilstm": {"embedding_dim": 12, "hidden_size": 8, "fc_size": 10},
    "lstm_attention": {"embedding_dim": 12, "hidden_size": 8},
    "transformer": {"hidden_size": 16, "heads": 2},
    "linear": {"min_df": 1},
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words of TEXTS, in BERT's form: [CLS] a [SEP] b [SEP]."""
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def record(student: str, **changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "student": student,
        "options": KINDS[student],
        "label_names": LABELS,
        "max_length": 8,
        "losses": {"kl": 0.7, "ce": 0.3},
        "temperature": "5:1",
        "seed": 0,
        "epochs_run": 2,
        "best_epoch": 1,
        "train_seconds": 1.5,
        "train_rows": 7,
        "labelled_rows": 3,
        "validation": {"accuracy": 0.5, "loss": float("nan")},
        "cache": {"path": "caches/tiny", "teacher": "teacher", "weights_hash": "00"},
        "versions": {"torch": "2"},
    }
    return RunRecord(**(values | changes))


def build(kind: str) -> Any:
    if kind == "linear":
        logits = np.random.default_rng(0).normal(size=(len(TEXTS), 3))
        return fit_linear(TEXTS, num_labels=3, logits=logits, options=KINDS[kind])
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    spec = StudentSpec(
        label_names=LABELS,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        unk_token_id=1,
        max_length=8,
        used_ids=np.arange(1, len(tokenizer)),
        teacher_config={"type_vocab_size": 2},
        options=KINDS[kind],
    )
    return build_student(kind, spec).eval()


def save(kind: str, out: Path) -> Any:
    student = build(kind)
    save_run(out, student, record(kind), tokenizer=tiny_tokenizer())
    return student


def examples(*, pairs: bool = False) -> list[Example]:
    second = reversed(TEXTS) if pairs else [None] * len(TEXTS)
    return [Example(str(row), text, other) for row, (text, other) in enumerate(zip(TEXTS, second, strict=True))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [False, True])
def test_logits_depend_neither_on_the_batch_size_nor_on_the_order(kind, pairs, tmp_path):
    save(kind, tmp_path / "run")
    run = load_run(tmp_path / "run")
    rows = examples(pairs=pairs)
    found = run.logits(rows)
    assert (found.shape, found.dtype) == ((len(rows), 3), np.float32)
    np.testing.assert_allclose(run.logits(rows, batch_size=1), found, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run.logits(rows, batch_size=2), found, rtol=0, atol=1e-5)
    turned = run.logits([rows[row] for row in (6, 0, 3)])
    np.testing.assert_allclose(turned, found[[6, 0, 3]], rtol=0, atol=1e-5)
    assert run.logits([]).shape == (0, 3)
    assert len(np.unique(found, axis=0)) > 4  # it does tell rows apart


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_comes_back_as_it_was_saved(kind, tmp_path):
    student = save(kind, tmp_path)
    run = load_run(str(tmp_path))
    assert isinstance(run, Run)
    assert run.label_names == LABELS
    assert run.record.model_copy(update={"files": {}, "validation": {}}) == record(kind, validation={})
    assert np.isnan(run.record.validation["loss"])
    on_disk = {path.name for path in tmp_path.iterdir()}
    assert on_disk == {"run.json", *run.record.files}  # no temporary file stays
    assert run.size_on_disk == sum((tmp_path / name).stat().st_size for name in on_disk - {"run.json"})
    if kind == "linear":
        assert on_disk == {"run.json", "model.skops"}
        assert np.array_equal(run.logits(examples()), student.logits(TEXTS))
        assert run.parameters == student.parameters
        return
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= on_disk
    assert run.parameters == sum(value.numel() for value in student.parameters())
    ids = tiny_tokenizer()(TEXTS[0], return_tensors="pt")
    with torch.inference_mode():
        expected = student(**ids).logits
    np.testing.assert_allclose(run.logits(examples()[:1]), expected.numpy(), rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXTS)["input_ids"] == tiny_tokenizer()(TEXTS)["input_ids"]


def test_no_file_of_a_run_is_a_pickle(tmp_path):
    for kind in KINDS:
        save(kind, tmp_path / kind)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".skops", ".txt", ".jinja"}
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80"]


def test_texts_are_cut_to_the_length_of_the_training(tmp_path):
    save("bilstm", tmp_path)
    run = load_run(tmp_path)
    longer = run.logits([Example("0", "a fine film " * 50)])
    cut = run.logits([Example("0", "a fine film a fine film")])  # 8 tokens with [CLS] and [SEP]
    np.testing.assert_allclose(longer, cut, rtol=0, atol=1e-6)


def test_a_kill_while_saving_leaves_no_run(tmp_path, monkeypatch):
    save("linear", tmp_path)
    assert load_run(tmp_path)

    def killed(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr("softlabels.runs.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save("bilstm", tmp_path)
    with pytest.raises(StudentError, match=r"no finished run: it has no run\.json.*--resume"):
        load_run(tmp_path)
    monkeypatch.undo()
    save("bilstm", tmp_path)
    assert load_run(tmp_path).record.student == "bilstm"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_a_torch_student_is_not_saved_without_its_tokenizer(tmp_path):
    with pytest.raises(StudentError, match="tokenizer"):
        save_run(tmp_path, build("bilstm"), record("bilstm"))
    assert list(tmp_path.iterdir()) == []


def change(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps(data))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(StudentError, match="no run folder"):
        load_run(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(StudentError, match="no run folder"):
        load_run(tmp_path / "file")
    (tmp_path / "cache").mkdir()
    with pytest.raises(StudentError, match="no finished run"):
        load_run(tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    with pytest.raises(StudentError, match="is a cache, not a run"):
        load_run(tmp_path / "cache")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 2}, "format version 2; this softlabels reads up to 1"),
        ({"format": "other"}, r"run\.json is damaged: run\.json: format"),
        ({"seed": "zero"}, r"run\.json is damaged: run\.json: seed"),
        ({"surprise": 1}, r"run\.json is damaged: run\.json: surprise"),
        ({"student": "bilstn"}, "no student 'bilstn'.*Did you mean 'bilstm'"),
        ({"files": {}}, "names no files"),
        ({"files": {"../other/weights": "00"}}, "not inside the run: refused"),
        ({"files": {"/etc/passwd": "00"}}, "not inside the run: refused"),
        ({"files": {"gone.json": "00"}}, r"incomplete: gone\.json is missing"),
        ({"label_names": ["a", "b"]}, "gives 3 logits, .* names 2 classes"),
    ],
)
@pytest.mark.parametrize("kind", ["bilstm", "linear"])
def test_a_record_that_was_tampered_with_is_refused(kind, values, message, tmp_path):
    save(kind, tmp_path)
    change(tmp_path / "run.json", **values)
    with pytest.raises(StudentError, match=message):
        load_run(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_record_is_refused(text, tmp_path):
    save("linear", tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StudentError, match="damaged"):
        read_record(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_any_file_that_changed_is_refused(kind, tmp_path):
    save(kind, tmp_path / "whole")
    for name in read_record(tmp_path / "whole").files:
        run = tmp_path / name
        shutil.copytree(tmp_path / "whole", run)
        data = bytearray((run / name).read_bytes())
        data[len(data) // 2] ^= 1
        (run / name).write_bytes(data)
        with pytest.raises(StudentError, match=f"{name} is not the file that was saved"):
            load_run(run)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "values", [{"auto_map": {"AutoConfig": "evil.Evil"}}, {"attn_implementation": "someone/kernels"}]
)
def test_a_run_that_asks_for_code_is_refused(name, values, tmp_path):
    save("transformer", tmp_path)
    change(tmp_path / name, **values)
    from softlabels.cache.files import hash_file

    files = read_record(tmp_path).files | {name: hash_file(tmp_path / name)}  # whoever tampers mends the hash
    change(tmp_path / "run.json", files=files)
    with pytest.raises(StudentError, match="asks for code"):
        load_run(tmp_path)
