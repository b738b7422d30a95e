"""Students on a GPU: the steps that they take on the CPU, by every kind of loss; and what was cut off goes on.

Dropout is off where CPU and GPU are held together, since each draws in its own way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softlabels import train as train_module
from softlabels.cache import Cache, open_cache
from softlabels.config import DumpOptions, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import DumpReport, dump
from softlabels.fidelity import verify_live
from softlabels.progress import quiet
from softlabels.runs import load_run
from softlabels.teacher import TeacherOptions, load_teacher, train_teacher
from softlabels.train import train_student
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher
from tests.test_tasks import save

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROWS = [Example(str(i), text, None, name if i % 3 else None) for i, (text, name) in enumerate(TEXTS)]
CORPUS = Corpus("made", None, ROWS, list(LABEL_NAMES))
RECURRENT = {"embedding_dim": 16, "hidden_size": 12, "dropout": 0.0}
TRANSFORMER = {
    "layers": 1,
    "hidden_size": 16,
    "heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SOFT = {"losses": {"kl": 0.7, "ce": 0.3}, "temperature": "5:1:cosine"}
LAYERS = {
    "losses": [
        {"loss": "kl"},
        {"loss": "hidden_mse", "map": "final", "project": "linear"},
        {"loss": "attention_kl", "map": "final"},
        {"loss": "value_relation", "map": "final"},
    ]
}
MANY_TO_MANY = {"losses": [{"loss": "alp", "map": "all", "project": "linear"}, {"loss": "ce"}]}
TRANSPORT = {
    "losses": [{"loss": "emd", "map": "all", "project": "linear", "options": {"update": True}}, {"loss": "ce"}]
}
STUDENTS: dict[str, dict[str, Any]] = {
    "bilstm": {"student": "bilstm", "options": RECURRENT} | SOFT,
    "lstm_attention": {"student": "lstm_attention", "options": RECURRENT} | SOFT,
    "word_average": {"student": "word_average", "options": RECURRENT, "losses": {"mse_logits": 1}},
    "transformer": {"student": "transformer", "options": TRANSFORMER} | SOFT,
    "layers": {"student": "transformer", "options": TRANSFORMER} | LAYERS,
    "alp": {"student": "transformer", "options": TRANSFORMER} | MANY_TO_MANY,
    "emd": {"student": "transformer", "options": TRANSFORMER} | TRANSPORT,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("train")
    options = DumpOptions(capture=["logits", "hidden:all", "qkv:all"], shard_rows=16, codec="float32")
    dump(CORPUS, teacher=str(save_teacher(folder / "teacher")), out=folder / "cache", options=options, device="cuda")
    return open_cache(folder / "cache")


@pytest.fixture(autouse=True)
def exact():
    """No TF32, which would hide what is meant to be compared; and no bars."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), quiet():
        yield


@contextmanager
def on_the_gpu() -> Iterator[None]:
    """What runs inside takes memory of the GPU, so it is where it is meant to be."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    yield
    assert torch.cuda.max_memory_allocated() > before


def chosen(name: str, **changes: Any) -> StudentOptions:
    usual = {"epochs": 3, "lr": 5e-3, "batch_size": 8}
    return StudentOptions.model_validate(usual | copy.deepcopy(STUDENTS[name]) | changes)


def largest_difference(one: Path, two: Path) -> float:
    first, second = (load_file(run / "model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_gpu_takes_the_steps_of_the_cpu(cache: Cache, tmp_path: Path, name: str) -> None:
    """To float32's rounding over 24 steps; Adam turns a gradient of rounding size into a step of a whole rate."""
    options = chosen(name, optimizer="sgd", lr=0.1)
    runs = [tmp_path / "one", tmp_path / "other"]
    train_student(cache, out=runs[0], options=options, cpu=True)
    with on_the_gpu():
        train_student(cache, out=runs[1], options=options)
    assert largest_difference(*runs) < 1e-3
    for one, two in zip(*(load_run(out).record.history for out in runs), strict=True):
        assert one.keys() == two.keys()
        assert all(abs(one[key] - two[key]) < 1e-2 for key in one if "seconds" not in key), (one, two)


@pytest.mark.parametrize("name", STUDENTS)
def test_what_was_cut_off_goes_on(cache: Cache, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout: the GPU's own generator is put back too."""
    kept = STUDENTS[name]["options"]
    off = {key: 0.2 for key in kept if "dropout" in key}
    options = chosen(name, options=kept | off, optimizer="sgd", lr=0.1)
    with on_the_gpu():
        train_student(cache, out=tmp_path / "whole", options=options)
    real = train_module._train_epoch

    def interrupted(*arguments: Any, **named: Any) -> float:
        if named["state"].epoch == 1:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(train_module, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_student(cache, out=tmp_path / "cut", options=options)
    monkeypatch.setattr(train_module, "_train_epoch", real)
    torch.rand(7, device="cuda")  # another user of the generator
    train_student(cache, out=tmp_path / "cut", options=options, resume=True)
    assert largest_difference(tmp_path / "whole", tmp_path / "cut") < 1e-3


def test_a_teacher_learns_and_its_student_after_it(tmp_path: Path) -> None:
    """All of it on the GPU, scored on the CPU."""
    save_teacher(tmp_path / "base")
    labelled = Corpus(
        "made", None, [Example(str(i), text, None, name) for i, (text, name) in enumerate(TEXTS)], list(LABEL_NAMES)
    )
    options = TeacherOptions(epochs=12, lr=3e-3, batch_size=8, device="cuda")
    report = train_teacher(labelled, model=str(tmp_path / "base"), out=tmp_path / "teacher", options=options)
    assert report.best_score is not None and report.best_score > 0.6
    assert load_teacher(str(tmp_path / "teacher"), device="cpu").model.device.type == "cpu"
    dump(CORPUS, teacher=str(tmp_path / "teacher"), out=tmp_path / "cache", options=DumpOptions(), device="cuda")
    student = chosen("bilstm", losses={"mse_logits": 1}, temperature="1", epochs=40, lr=2e-2, validation=0.0)
    train_student(open_cache(tmp_path / "cache"), out=tmp_path / "run", options=student)
    logits = load_run(tmp_path / "run").logits(ROWS)
    teacher = open_cache(tmp_path / "cache").column("logits")
    assert (logits.argmax(1) == teacher.argmax(1)).mean() > 0.8


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_language_model_and_its_student(tmp_path: Path, kind: str) -> None:
    teacher = save(tmp_path / "teacher", kind)
    options = DumpOptions(capture=["vocab:topk=16,samples=2"], shard_rows=16, codec="float32")
    dump(CORPUS, teacher=str(teacher), out=tmp_path / "first", options=options, device="cpu")
    dump(CORPUS, teacher=str(teacher), out=tmp_path / "second", options=options, device="cuda")
    assert verify_live(tmp_path / "first", teacher=str(teacher), device="cuda").within
    student = StudentOptions.model_validate(
        {
            "student": "transformer",
            "options": {"layers": 1, "hidden_size": 16, "heads": 2},
            "losses": {"kl": 1},
            "epochs": 3,
            "batch_size": 8,
        }
    )
    train_student(open_cache(tmp_path / "second"), out=tmp_path / "run", options=student)
    history = load_run(tmp_path / "run").record.history
    assert history[-1]["train/loss"] < history[0]["train/loss"]


def test_what_does_not_fit_the_gpu_is_done_in_halves(tmp_path: Path) -> None:
    """A real shortage: the process may have little more of the GPU than the model and some rows take."""
    teacher = save_teacher(tmp_path / "teacher", hidden=512, heads=8)
    rows = [Example(str(i), " ".join([text] * 5), None, name) for i, (text, name) in enumerate(TEXTS * 20)]
    corpus = Corpus("made", None, rows, list(LABEL_NAMES))
    options = DumpOptions(capture=["logits", "hidden:all"], shard_rows=600, batch_tokens=32768, codec="float32")
    dump(corpus, teacher=str(teacher), out=tmp_path / "free", options=options, device="cuda")
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 250e6) / whole)
        report: DumpReport = dump(corpus, teacher=str(teacher), out=tmp_path / "narrow", options=options, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert report.batch_tokens < 32768
    one, two = open_cache(tmp_path / "free"), open_cache(tmp_path / "narrow")
    assert abs(one.column("logits") - two.column("logits")).max() < 1e-3
