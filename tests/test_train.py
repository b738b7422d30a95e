"""Training from a cache: it learns, follows its seed, resumes to the same result, and never asks for the teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from softlabels import train as train_module
from softlabels.cache import Cache, open_cache
from softlabels.config import DumpOptions, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError, CorpusError, SoftlabelsError, StudentError
from softlabels.runs import load_run
from softlabels.train import train_student
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

SMALL: dict[str, dict[str, Any]] = {
    "bilstm": {"embedding_dim": 16, "hidden_size": 12, "fc_size": 10},
    "lstm_attention": {"embedding_dim": 16, "hidden_size": 12, "layers": 2},
    "word_average": {"embedding_dim": 16, "hidden_size": 12, "fc_size": 10},
    "transformer": {"layers": 1, "hidden_size": 16, "heads": 2},
}


def options(student: str = "bilstm", **changes: Any) -> StudentOptions:
    usual = {
        "student": student,
        "options": SMALL.get(student, {}),
        "losses": {"kl": 0.7, "ce": 0.3},
        "epochs": 3,
        "lr": 5e-3,
    }
    return StudentOptions.model_validate(usual | {"batch_size": 8} | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache whose teacher is gone: every third row has no label."""
    folder = tmp_path_factory.mktemp("train")
    teacher = _decided(save_teacher(folder / "teacher"))
    rows = [Example(str(i), text, None, name if i % 3 else None) for i, (text, name) in enumerate(TEXTS)]
    for name, chosen in (("cache", rows), ("unlabelled", [Example(e.id, e.text) for e in rows])):
        corpus = Corpus("made", None, chosen, list(LABEL_NAMES))
        dump(corpus, teacher=str(teacher), out=folder / name, options=DumpOptions(shard_rows=16))
    one_class = [Example(e.id, e.text, None, "food" if e.label else None) for e in rows]
    dump(Corpus("made", None, one_class, ["food"]), teacher=str(teacher), out=folder / "one-class")
    hidden = DumpOptions(capture=["hidden:1"], text=False)
    dump(Corpus("made", None, rows, list(LABEL_NAMES)), teacher=str(teacher), out=folder / "hidden", options=hidden)
    shutil.rmtree(teacher)
    return folder


def _decided(teacher: Path) -> Path:
    """The same teacher with wider weights: an untrained one says nearly the same of every text."""
    state = {name: value * 4 for name, value in load_file(teacher / "model.safetensors").items()}
    save_file(state, teacher / "model.safetensors", metadata={"format": "pt"})
    return teacher


@pytest.fixture
def cache(place: Path) -> Cache:
    return open_cache(place / "cache")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("student", ["bilstm", "lstm_attention", "word_average", "transformer"])
def test_a_student_learns_the_labels_it_is_given(cache: Cache, tmp_path: Path, student: str) -> None:
    chosen = options(student, losses={"ce": 1}, epochs=40, lr=2e-2, validation=0.0)
    report = train_student(cache, out=tmp_path / "run", options=chosen, cpu=True)
    labelled = [row for row in range(len(TEXTS)) if row % 3]
    assert (report.rows, report.labelled) == (len(labelled), len(labelled))
    run = load_run(tmp_path / "run")
    logits = run.logits([Example(str(row), TEXTS[row][0]) for row in labelled])
    wanted = [run.label_names.index(TEXTS[row][1]) for row in labelled]
    assert (logits.argmax(1) == np.array(wanted)).mean() > 0.9


def test_a_student_comes_near_its_teacher_on_unlabelled_rows(place: Path, tmp_path: Path) -> None:
    cache = open_cache(place / "unlabelled")
    chosen = options(losses={"mse_logits": 1}, epochs=40, lr=2e-2, validation=0.0)
    train_student(cache, out=tmp_path / "run", options=chosen, cpu=True)
    teacher = cache.column("logits")
    got = load_run(tmp_path / "run").logits([Example(str(i), text) for i, (text, _) in enumerate(TEXTS)])
    spread = np.square(teacher - teacher.mean(0)).sum(1).mean()
    assert np.square(got - teacher).sum(1).mean() < 0.2 * spread


def test_the_same_seed_gives_the_same_student_and_another_another(cache: Cache, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train_student(cache, out=tmp_path / name, options=options(seed=seed), cpu=True)
    assert same(tmp_path / "one", tmp_path / "two") and not same(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize("student", ["bilstm", "transformer"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_training_resumes_to_the_same_result(
    cache: Cache, tmp_path: Path, student: str, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(student, epochs=4, temperature="5:1:cosine")
    train_student(cache, out=tmp_path / "whole", options=chosen, cpu=True)
    real = train_module._train_epoch

    def interrupted(*arguments: Any, **named: Any) -> float:
        if named["state"].epoch == epoch:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(train_module, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_student(cache, out=tmp_path / "cut", options=chosen, cpu=True)
    monkeypatch.setattr(train_module, "_train_epoch", real)
    with pytest.raises(ConfigError, match="add --resume"):
        train_student(cache, out=tmp_path / "cut", options=chosen, cpu=True)
    with pytest.raises(ConfigError, match=r"lr was 0\.005 and is now 0\.001"):
        train_student(cache, out=tmp_path / "cut", options=options(student, epochs=4, lr=1e-3), resume=True, cpu=True)
    report = train_student(cache, out=tmp_path / "cut", options=chosen, resume=True, cpu=True)
    assert report.epochs == 4 and same(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut"))
    assert whole["history"] == cut["history"] and whole["best_epoch"] == cut["best_epoch"]
    assert not (tmp_path / "cut" / "checkpoint").exists()


def test_rows_without_a_label_teach_only_by_the_teacher(cache: Cache, tmp_path: Path) -> None:
    """What the labels of unlabelled rows would be has no say: ce alone trains on the labelled rows only."""
    soft = train_student(cache, out=tmp_path / "soft", options=options(validation=0.0), cpu=True)
    hard = train_student(cache, out=tmp_path / "hard", options=options(losses={"ce": 1}, validation=0.0), cpu=True)
    assert (soft.rows, soft.labelled, hard.rows, hard.labelled) == (60, 40, 40, 40)


def test_the_first_rows_alone_may_teach(cache: Cache, tmp_path: Path) -> None:
    report = train_student(cache, out=tmp_path / "run", options=options(rows=6, validation=0.0), cpu=True)
    assert report.rows == 6
    only_labels = options(losses={"ce": 1}, rows=5, validation=0.0)
    report = train_student(cache, out=tmp_path / "labels", options=only_labels, cpu=True)
    assert report.rows == 3  # of the first five, two have no label


def test_rows_are_shuffled_within_a_window(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softlabels.cache import reader

    seen: list[tuple[int, int]] = []
    real = reader.windowed_batches

    def record(lengths: Any, shards: Any, **how: Any) -> list[np.ndarray]:
        batches = real(lengths, shards, **how)
        seen.append((how["window"], sum(map(len, batches))))
        return batches

    monkeypatch.setattr(reader, "windowed_batches", record)
    chosen = options(epochs=2, window=2, validation=0.0)
    report = train_student(cache, out=tmp_path / "run", options=chosen, cpu=True)
    assert seen == [(2, report.rows)] * 2
    linear = StudentOptions(student="linear", losses={"mse_logits": 1.0}, window=2)
    with pytest.raises(ConfigError, match="leave --window out"):
        train_student(cache, out=tmp_path / "linear", options=linear, cpu=True)


def test_training_stops_early_and_keeps_the_best_epoch(cache: Cache, tmp_path: Path) -> None:
    chosen = options(epochs=60, lr=0.05, patience=2, losses={"ce": 1}, validation=0.3)
    report = train_student(cache, out=tmp_path / "run", options=chosen, cpu=True)
    history = load_run(tmp_path / "run").record.history
    losses = [entry["loss"] for entry in history]
    assert report.epochs < 60 and report.epochs == (report.best_epoch or 0) + 2
    assert report.validation["loss"] == min(losses)


def test_a_validation_corpus_decides_by_accuracy(cache: Cache, tmp_path: Path) -> None:
    validation = Corpus(
        "dev", None, [Example(str(i), *TEXTS[i][:1], None, TEXTS[i][1]) for i in range(12)], list(LABEL_NAMES)
    )
    report = train_student(cache, out=tmp_path / "run", options=options(epochs=6), validation=validation, cpu=True)
    history = load_run(tmp_path / "run").record.history
    assert report.rows == 60  # nothing is held out
    assert report.validation["accuracy"] == max(entry["accuracy"] for entry in history)


def test_figures_are_logged_for_tensorboard(cache: Cache, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_student(cache, out=tmp_path / "run", options=options(), cpu=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/kl", "train/ce", "loss"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/loss")) == 3 * 7  # 54 rows in batches of 8, three times


def test_the_linear_student_has_no_epochs(cache: Cache, tmp_path: Path) -> None:
    for name, losses in (("soft", {"mse_logits": 1}), ("hard", {"ce": 1})):
        report = train_student(cache, out=tmp_path / name, options=options("linear", losses=losses), cpu=True)
        assert report.validation.keys() == {"loss"}
    with pytest.raises(ConfigError, match="one of them alone; not kl"):
        train_student(cache, out=tmp_path / "kl", options=options("linear", losses={"kl": 1}), cpu=True)
    train_student(cache, out=tmp_path / "kl", options=options("linear", losses={"ce": 1}), cpu=True)  # and then it may


def test_what_the_cache_lacks_is_told(place: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], type[SoftlabelsError], str]] = [
        (
            "hidden",
            {},
            CacheError,
            r"loss 'kl' needs logits; cache .* holds hidden\.01\. Add it with: softlabels dump .* --capture logits",
        ),
        ("unlabelled", {"losses": {"ce": 1}}, CacheError, "needs labels"),
        ("unlabelled", {"losses": {"kl": 1, "ce": 1}}, CacheError, "needs labels"),
        ("one-class", {"losses": {"ce": 1}}, CacheError, "all of one class"),
        ("cache", {"student": "bilstn"}, StudentError, "Did you mean 'bilstm'"),
        ("cache", {"options": {"hiden_size": 3}}, StudentError, "Did you mean 'hidden_size'"),
        ("hidden", {"student": "linear", "losses": {"ce": 1}, "options": {}}, CacheError, "--no-text"),
    ]
    for name, changes, kind, told in cases:
        with pytest.raises(kind, match=told):
            train_student(open_cache(place / name), out=tmp_path / "run", options=options(**changes), cpu=True)
    # none of these binds the folder to its options
    train_student(open_cache(place / "cache"), out=tmp_path / "run", options=options(epochs=1), cpu=True)


def test_a_validation_corpus_must_fit(cache: Cache, tmp_path: Path) -> None:
    for rows, told in (([Example("0", "a")], "no labelled row"), ([Example("0", "a", None, "hockey")], "hockey")):
        corpus = Corpus("dev", None, rows, None)
        with pytest.raises(CorpusError, match=told):
            train_student(cache, out=tmp_path / "run", options=options(), validation=corpus, cpu=True)


def test_a_folder_in_use_is_refused(cache: Cache, tmp_path: Path) -> None:
    train_student(cache, out=tmp_path / "run", options=options(epochs=1), cpu=True)
    with pytest.raises(ConfigError, match="holds a finished run"):
        train_student(cache, out=tmp_path / "run", options=options(epochs=1), cpu=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty and no run"):
        train_student(cache, out=tmp_path / "mine", options=options(epochs=1), cpu=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        train_student(cache, out=tmp_path / "file", options=options(epochs=1), cpu=True)


def test_a_loss_that_is_no_number_is_told(cache: Cache, tmp_path: Path) -> None:
    chosen = options(lr=1e30, clip=1e30, losses={"mse_logits": 1}, epochs=20, warmup=0)
    with pytest.raises(StudentError, match="smaller --lr"):
        train_student(cache, out=tmp_path / "run", options=chosen, cpu=True)
