"""A teacher is loaded only whole and fitting; a fine-tuned one has learnt, and is its best epoch."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from softlabels.cache.files import lock
from softlabels.corpus import Corpus
from softlabels.errors import ConfigError, CorpusError, SoftlabelsError, TeacherError
from softlabels.fine_tuning import hold_out
from softlabels.pretrained import hash_weights
from softlabels.teacher import (
    TeacherOptions,
    load_teacher,
    train_teacher,
)
from softlabels.tokens import pad_batch, tokenize
from softlabels.types import Example
from tests.models import (
    LABEL_NAMES,
    TEXTS,
    save_model,
    save_teacher,
    tiny_classifier,
    tiny_gpt2,
    tiny_tokenizer,
)

QUICK = TeacherOptions(epochs=2, lr=2e-3, batch_size=8, device="cpu")
LEARN = TeacherOptions(epochs=20, lr=3e-3, batch_size=8, device="cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def corpus(rows=TEXTS, *, label_names=LABEL_NAMES, source="rows") -> Corpus:
    examples = [Example(str(index), text, None, label) for index, (text, label) in enumerate(rows)]
    return Corpus(source, None, examples, label_names)


def predict(folder: Path, texts: list[str]) -> torch.Tensor:
    """The logits (B, C) of the teacher in `folder`."""
    teacher = load_teacher(str(folder), device="cpu")
    rows = tokenize(teacher.tokenizer, [Example("", text) for text in texts], max_length=64).examples
    batch = pad_batch(rows, pad_token_id=teacher.tokenizer.pad_token_id)
    with torch.no_grad():
        return teacher.model(**batch.model_inputs()).logits


@pytest.fixture
def base(tmp_path):
    """A pretrained model without a head."""
    tokenizer = tiny_tokenizer()
    return save_model(tmp_path / "base", tiny_classifier(tokenizer).bert, tokenizer)


# ------------------------------------------------------------------------------------------------------- load


def test_a_teacher_is_frozen_and_says_what_it_saved(tmp_path):
    folder = save_teacher(tmp_path / "teacher", seed=3)
    teacher = load_teacher(str(folder), device="cpu")
    assert teacher.label_names == LABEL_NAMES
    assert teacher.weights_hash == hash_weights(folder)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    expected = tiny_classifier(tiny_tokenizer(), seed=3)
    ids = torch.tensor([[2, 10, 11, 3]])
    with torch.no_grad():
        assert torch.equal(teacher.model(ids).logits, expected(ids).logits)


def test_loading_asks_no_network(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    folder = save_teacher(tmp_path / "teacher")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_teacher(str(folder), device="cpu").label_names == LABEL_NAMES


def test_dtype(tmp_path):
    folder = save_model(tmp_path, tiny_classifier(tiny_tokenizer()).bfloat16())
    assert load_teacher(str(folder), device="cpu").model.dtype == torch.float32
    assert load_teacher(str(folder), device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_model_without_a_trained_head_is_refused(base):
    with pytest.raises(TeacherError, match=r"no trained classification head.*softlabels train-teacher"):
        load_teacher(str(base), task="sequence-classification")


def test_a_language_model_has_no_classification_head(tmp_path):
    tokenizer = tiny_tokenizer()
    model = BertForMaskedLM(tiny_classifier(tokenizer).config)
    with pytest.raises(TeacherError, match="no trained classification head"):
        load_teacher(str(save_model(tmp_path, model, tokenizer)), task="sequence-classification")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "x"}, "label2id": {"x": 0}}, "does not load for regression"),
        ({"id2label": {"0": "x"}, "problem_type": "single_label_classification"}, "is no model.s configuration"),
        ({"id2label": {"0": "x", "1": "x", "2": "y"}}, "a name of its own"),
        ({"id2label": {"0": "x", "2": "y", "7": "z"}}, "a name of its own"),
        ({"model_type": "nothing_known"}, "is no model's configuration"),
        ({"model_type": "vit"}, "does not load|not those of|no trained"),
        ({"hidden_size": 64}, "does not load"),
    ],
)
def test_models_that_cannot_teach(tmp_path, changes, message):
    folder = save_teacher(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(TeacherError, match=message):
        load_teacher(str(folder))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = save_teacher(tmp_path / "teacher")
    larger = tiny_tokenizer()
    assert len(larger) == json.loads((folder / "config.json").read_text())["vocab_size"]
    larger.add_tokens([f"word{index}" for index in range(5)])
    larger.save_pretrained(folder)
    with pytest.raises(TeacherError, match=r"has \d+ tokens, but the model's embedding only \d+"):
        load_teacher(str(folder))


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_cut_off_weights_are_refused(tmp_path, size):
    folder = save_teacher(tmp_path / "teacher")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:size])
    with pytest.raises(TeacherError, match="does not load"):
        load_teacher(str(folder))


def test_gpt2_classifies_right_padded_rows_as_it_does_single_ones(tmp_path):
    tokenizer = tiny_tokenizer(kind="bpe")
    folder = save_model(tmp_path / "gpt2", tiny_gpt2(tokenizer), tokenizer)
    texts = ["Snow turns to rain", "The soup needs a pinch of salt and a squeeze of lemon"]
    together = predict(folder, texts)
    alone = torch.cat([predict(folder, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


# ------------------------------------------------------------------------------------------------------ train


def test_training_beats_chance_and_the_folder_is_a_teacher(base, tmp_path):
    out = tmp_path / "runs" / "teacher"
    held = {index for index in range(len(TEXTS)) if index % 10 < 3}
    report = train_teacher(
        corpus([row for index, row in enumerate(TEXTS) if index not in held]),
        model=str(base),
        out=out,
        options=LEARN,
        validation=corpus([TEXTS[index] for index in sorted(held)]),
    )
    assert (report.train_rows, report.validation_rows, report.truncated_rows) == (42, 18, 0)
    assert report.best_score is not None and report.best_score > 0.5  # chance is a third
    assert report.epochs[-1].train_loss < 0.8 * report.epochs[0].train_loss
    teacher = load_teacher(str(out))
    assert teacher.label_names == report.label_names == LABEL_NAMES
    assert teacher.weights_hash == report.weights_hash
    guesses = predict(out, [TEXTS[index][0] for index in sorted(held)]).argmax(-1)
    truths = [LABEL_NAMES.index(TEXTS[index][1]) for index in sorted(held)]
    assert np.mean(guesses.numpy() == np.asarray(truths)) == pytest.approx(report.best_score)
    assert [path.name for path in out.parent.iterdir()] == ["teacher"]


def test_the_best_epoch_is_kept(base, tmp_path):
    """Validation labels that contradict the training: the more is learnt, the worse the score."""
    turned = [(text, LABEL_NAMES[(LABEL_NAMES.index(name) + 1) % 3]) for text, name in TEXTS]
    options = replace(LEARN, epochs=8)
    report = train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=options, validation=corpus(turned))
    ranks = [(epoch.validation_score, -(epoch.validation_loss or 0)) for epoch in report.epochs]
    assert report.best_epoch == 1 + ranks.index(max(ranks))
    assert report.best_epoch < 8
    logits = predict(tmp_path / "out", [text for text, _ in turned])
    truths = torch.tensor([LABEL_NAMES.index(name) for _, name in turned])
    best = report.epochs[report.best_epoch - 1]
    assert torch.nn.functional.cross_entropy(logits, truths).item() == pytest.approx(best.validation_loss, abs=1e-2)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(base, tmp_path):
    hashes: list[str] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(hashes))  # the state of the world outside has no say
        report = train_teacher(corpus(), model=str(base), out=tmp_path / name, options=replace(QUICK, seed=seed))
        hashes.append(report.weights_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_state_of_the_world_outside_is_left_alone(base, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_float32_matmul_precision() == "highest"


def test_unlabelled_rows_are_skipped_and_long_ones_counted(base, tmp_path):
    rows = [*TEXTS, ("nobody knows", None), (TEXTS[0][0] * 20, TEXTS[0][1]), (TEXTS[1][0] * 20, None)]
    report = train_teacher(corpus(rows), model=str(base), out=tmp_path / "out", options=QUICK)
    assert report.unlabelled_rows == 2
    assert report.truncated_rows == 1
    assert report.max_length == 64
    assert report.train_rows + report.validation_rows == 61


def test_a_head_of_another_size_is_replaced(tmp_path):
    base = save_teacher(tmp_path / "base", num_labels=7)
    report = train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)
    assert predict(tmp_path / "out", ["rain"]).shape == (1, 3)
    assert report.label_names == LABEL_NAMES


def test_a_body_of_another_size_is_not(tmp_path):
    base = save_teacher(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(TeacherError, match=r"another size than config.json says"):
        train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)


def test_weights_of_another_model_are_refused(tmp_path):
    base = save_teacher(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({f"other.{name}": value for name, value in weights.items()}, base / "model.safetensors")
    with pytest.raises(TeacherError, match="the weights are not those of a bert"):
        train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)


def test_gpt2_can_be_trained(tmp_path):
    tokenizer = tiny_tokenizer(kind="bpe")
    base = save_model(tmp_path / "base", tiny_gpt2(tokenizer), tokenizer)
    train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)
    assert load_teacher(str(tmp_path / "out")).model.config.pad_token_id == 0


def test_pairs(base, tmp_path):
    """Whether the second sentence is of the first one's class."""
    examples = [
        Example(str(index), text, TEXTS[(index + step) % 60][0], "same" if step == 3 else "other")
        for step in (3, 1)
        for index, (text, _) in enumerate(TEXTS)
    ]
    pairs = Corpus("pairs", None, examples, ["other", "same"])
    report = train_teacher(pairs, model=str(base), out=tmp_path / "out", options=QUICK)
    assert report.train_rows + report.validation_rows == 120
    assert load_teacher(str(tmp_path / "out")).label_names == ["other", "same"]


def test_too_few_rows_to_validate_on(base, tmp_path):
    options = replace(QUICK, epochs=3, validation_fraction=0.1)
    report = train_teacher(corpus(TEXTS[:3]), model=str(base), out=tmp_path / "out", options=options)
    assert (report.train_rows, report.validation_rows) == (3, 0)
    assert (report.best_epoch, report.best_score) == (3, None)


# ------------------------------------------------------------------------------------------------------ parts


def test_hold_out_is_stratified():
    labels = [0] * 50 + [1] * 20 + [2] * 3 + [3]
    held = hold_out(labels, fraction=0.1, seed=0)
    counts = np.bincount([labels[index] for index in held], minlength=4)
    assert counts.tolist() == [5, 2, 1, 0]
    assert held == hold_out(labels, fraction=0.1, seed=0) != hold_out(labels, fraction=0.1, seed=1)
    assert hold_out(labels, fraction=0, seed=0) == set()
    assert len(hold_out([0, 0, 1, 1], fraction=0.9, seed=0)) == 2  # each class keeps a row to learn from


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0},
        {"lr": float("nan")},
        {"batch_size": 0},
        {"validation_fraction": 1},
        {"seed": -1},
    ],
)
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TeacherOptions(**wrong)


# ------------------------------------------------------------------------------------ out, whole or not there


def assert_nothing_left(out: Path) -> None:
    assert not out.exists()
    assert [path for path in out.parent.iterdir() if out.name in path.name] == []


def test_a_training_that_breaks_down_says_so_and_leaves_nothing(base, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TeacherError, match=r"broke down at step \d+.*lower --lr than 1e\+30"):
        train_teacher(corpus(), model=str(base), out=out, options=replace(QUICK, lr=1e30, epochs=5))
    assert_nothing_left(out)


def test_a_model_with_nan_weights_breaks_down_at_the_first_step(base, tmp_path):
    weights = load_file(base / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="broke down at step 1"):
        train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)


def test_ctrl_c_leaves_nothing(base, tmp_path):
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=replace(QUICK, epochs=100_000))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert_nothing_left(tmp_path / "out")


def test_what_a_killed_training_left_is_cleared(base, tmp_path):
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_two_trainings_into_one_folder_do_not_meet(base, tmp_path):
    busy = tmp_path / ".out.unfinished"
    busy.mkdir()
    with lock(busy), pytest.raises(SoftlabelsError, match="written by another process"):
        train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)
    assert busy.exists()


def test_a_full_disk_leaves_nothing(base, tmp_path):
    """A limit on the size of a file stands for the disk: writing stops in the middle of the weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(TeacherError, match="could not be written"):
            train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=replace(QUICK, epochs=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_nothing_left(tmp_path / "out")


def test_the_same_training_again_is_not_done_twice(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    first = train_teacher(corpus(), model=str(base), out=out, options=QUICK)
    changed = (out / "model.safetensors").stat().st_mtime_ns
    again = train_teacher(corpus(), model=str(base), out=out, options=QUICK)
    assert again == replace(first, reused=True)
    assert (out / "model.safetensors").stat().st_mtime_ns == changed


def test_another_training_into_the_same_folder_is_refused(base, tmp_path):
    out = tmp_path / "out"
    train_teacher(corpus(), model=str(base), out=out, options=QUICK)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(TeacherError, match=r"differs in lr, seed: choose another --out"):
        train_teacher(corpus(), model=str(base), out=out, options=replace(QUICK, lr=1e-3, seed=1))
    with pytest.raises(TeacherError, match=r"differs in corpus: choose another --out"):
        train_teacher(corpus(TEXTS[:30]), model=str(base), out=out, options=QUICK)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "model.safetensors").write_bytes(b"")
    with pytest.raises(TeacherError, match=r"were changed since"):
        train_teacher(corpus(), model=str(base), out=out, options=QUICK)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "softlabels-teacher"}'])
def test_a_folder_of_something_else_is_refused(base, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    if content is not None:
        (out / "teacher.json").write_text(content)
    with pytest.raises(TeacherError, match="no teacher of this softlabels: choose another --out"):
        train_teacher(corpus(), model=str(base), out=out, options=QUICK)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way(base, tmp_path):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "teacher"):
        with pytest.raises(TeacherError, match=r"choose another --out|could not be written"):
            train_teacher(corpus(), model=str(base), out=out, options=QUICK)


def test_corpora_that_cannot_train(base, tmp_path):
    def train(rows, **options):
        return train_teacher(rows, model=str(base), out=tmp_path / "out", options=QUICK, **options)

    with pytest.raises(CorpusError):
        train(corpus([(text, "food") for text, _ in TEXTS], label_names=["food"]))
    with pytest.raises(CorpusError):
        train(corpus([(text, None) for text, _ in TEXTS], label_names=None))
    with pytest.raises(CorpusError, match="music"):
        train(corpus(), validation=corpus([("a song", "music")], label_names=["music"]))
    with pytest.raises(TeacherError, match="validation corpus later has no labelled row"):
        train(corpus(), validation=corpus([("a song", None)], label_names=None, source="later"))
    assert not (tmp_path / "out").exists()


def test_what_teacher_json_says(base, tmp_path):
    report = train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)
    saved = json.loads((tmp_path / "out" / "teacher.json").read_text())
    assert saved["format"] == "softlabels-teacher" and saved["version"] == 1
    assert saved["model"] == str(base)
    assert saved["corpus"] == {"source": "rows", "split": None, "hash": corpus().hash}
    assert saved["configuration"]["lr"] == QUICK.lr
    assert saved["report"]["weights_hash"] == report.weights_hash == hash_weights(tmp_path / "out")
    assert len(saved["report"]["epochs"]) == 2


def test_the_teacher_outlives_its_origin(base, tmp_path):
    train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)
    shutil.rmtree(base)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert predict(moved, ["rain"]).isfinite().all()


def test_a_bare_model_of_another_kind_can_be_trained(tmp_path):
    """No pooler in the checkpoint: it is initialised along with the head."""
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    base = save_model(tmp_path / "base", BertModel(config, add_pooling_layer=False), tokenizer)
    train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=QUICK)
    assert load_teacher(str(tmp_path / "out")).label_names == LABEL_NAMES
