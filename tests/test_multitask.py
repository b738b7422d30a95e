"""Several tasks with one encoder: which is drawn how often, what they share, and what can't be learned together."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)

from softlabels import multitask as multitask_module
from softlabels.cache import Cache, open_cache
from softlabels.config import DumpOptions, MultiTaskOptions, build_options
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError, SoftlabelsError
from softlabels.evaluate import evaluate
from softlabels.multitask import draw_tasks, train_multitask
from softlabels.predict import predict
from softlabels.runs import load_run, read_record
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_model, save_teacher, tiny_classifier, tiny_tokenizer

SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"layers": 1, "hidden_size": 16, "heads": 4},
    "bilstm": {"embedding_dim": 16, "hidden_size": 12, "fc_size": 10},
    "lstm_attention": {"embedding_dim": 16, "hidden_size": 12, "layers": 1},
}
LONG = [Example(str(i), text, None, "long" if len(text) > 50 else "short") for i, (text, _) in enumerate(TEXTS[:30])]


def options(student: str = "transformer", **changes: Any) -> MultiTaskOptions:
    usual = {"student": student, "options": SMALL[student], "epochs": 2, "lr": 5e-3, "batch_size": 8}
    return build_options(MultiTaskOptions, usual | changes, where="test")


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of two tasks on the same tokens: the subject of 60 texts, and the length of 30."""
    folder = tmp_path_factory.mktemp("tasks")
    captures = DumpOptions(capture=["logits", "hidden:2", "qkv:2"])
    teacher = save_teacher(folder / "teacher")
    rows = [Example(str(i), text, None, name if i % 3 else None) for i, (text, name) in enumerate(TEXTS)]
    dump(Corpus("made", None, rows, list(LABEL_NAMES)), teacher=str(teacher), out=folder / "subject", options=captures)
    other = save_teacher(folder / "other", label_names=["long", "short"], seed=5)
    dump(Corpus("made", None, LONG, ["long", "short"]), teacher=str(other), out=folder / "length", options=captures)
    return folder


@pytest.fixture
def caches(place: Path) -> dict[str, Cache]:
    return {name: open_cache(place / name) for name in ("subject", "length")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_tasks_are_drawn_by_their_size_to_a_power(power: float) -> None:
    sizes, steps = {"large": 10_000, "middle": 2_000, "small": 50}, 20_000
    drawn = Counter(draw_tasks(sizes, power=power, steps=steps, seed=3, epoch=1))
    weights = np.array(list(sizes.values())) ** power
    expected = weights / weights.sum()
    off = np.array([drawn[name] for name in sizes]) / steps - expected
    assert (np.abs(off) < 4 * np.sqrt(expected * (1 - expected) / steps) + 1e-9).all()


def test_draws_follow_from_seed_and_epoch() -> None:
    sizes = {"a": 30, "b": 20}
    first = draw_tasks(sizes, power=0.75, steps=50, seed=0, epoch=0)
    assert first == draw_tasks(sizes, power=0.75, steps=50, seed=0, epoch=0)
    assert first != draw_tasks(sizes, power=0.75, steps=50, seed=0, epoch=1)
    assert first != draw_tasks(sizes, power=0.75, steps=50, seed=1, epoch=0)


def test_a_task_goes_on_where_it_stopped(caches: dict[str, Cache]) -> None:
    """Over all epochs every row of a task comes once in each of its passes."""
    chosen = options(validation=0.0)
    tasks = multitask_module._prepare_tasks(caches, chosen, {})
    draws = multitask_module._Draws(tasks, chosen)
    for name, cache in caches.items():
        rows = [row for epoch in range(6) for batch in draws.loader(name, epoch).batches for row in batch.tolist()]
        passes = [Counter(rows[start : start + cache.rows]) for start in range(0, len(rows), cache.rows)]
        assert len(passes) > 1 and all(one == Counter(range(cache.rows)) for one in passes[:-1])
        assert max(passes[-1].values()) == 1


# ------------------------------------------------------------------------------------------------------ the training


@pytest.mark.parametrize("student", list(SMALL))
def test_the_encoder_is_the_same_in_every_task(caches: dict[str, Cache], tmp_path: Path, student: str) -> None:
    reports = train_multitask(caches, out=tmp_path / "run", options=options(student, epochs=1), cpu=True)
    one, other = (weights(tmp_path / "run" / name) for name in caches)
    heads = {name for name in one if name.startswith("classifier.")}
    assert heads and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one.keys() - heads)
    assert {name: report.rows for name, report in reports.items()} == {"subject": 54, "length": 27}
    assert predict(tmp_path / "run" / "length", ["Rain."])[0].label in ("long", "short")
    found = evaluate(tmp_path / "run" / "subject", Corpus("t", None, [Example("0", "x", None, "food")], None))
    assert list(found.classes) == LABEL_NAMES


@pytest.mark.slow
def test_every_task_is_learned(caches: dict[str, Cache], tmp_path: Path) -> None:
    chosen = options(losses={"ce": 1}, epochs=40, lr=2e-2, validation=0.0)
    train_multitask(caches, out=tmp_path / "run", options=chosen, cpu=True)
    labelled = [Example(str(i), text, None, name) for i, (text, name) in enumerate(TEXTS) if i % 3]
    for name, rows in (("subject", labelled), ("length", LONG)):
        assert evaluate(tmp_path / "run" / name, Corpus(name, None, rows, None)).accuracy > 0.9, name
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "length")
    assert plain.config.label2id == {"long": 0, "short": 1}


@pytest.mark.parametrize("kills", [1, 2])
def test_interrupted_tasks_resume_to_the_same_result(
    caches: dict[str, Cache], tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[dict[str, Any]] = [{"loss": "kl"}, {"loss": "hidden_mse", "map": "final", "project": "linear"}]
    layers += [{"loss": "emd", "map": [[[1, 2], [2]]], "project": "linear", "options": {"update": True}}]
    shape = SMALL["transformer"] | {"layers": 2}
    chosen = options(epochs=3, options=shape, tasks={"length": {"losses": layers, "temperature": "2"}})
    train_multitask(caches, out=tmp_path / "whole", options=chosen, cpu=True)
    saved, save = 0, multitask_module.save_checkpoint

    def stop(*args: Any) -> None:
        nonlocal saved
        save(*args)
        saved += 1
        if saved == kills:
            raise KeyboardInterrupt

    monkeypatch.setattr(multitask_module, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train_multitask(caches, out=tmp_path / "cut", options=chosen, cpu=True)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="power was"):
        train_multitask(caches, out=tmp_path / "cut", options=options(epochs=3, power=1), resume=True, cpu=True)
    train_multitask(caches, out=tmp_path / "cut", options=chosen, resume=True, cpu=True)
    for name in caches:
        one, other = weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
        record = read_record(tmp_path / "cut" / name)
        assert record.history == read_record(tmp_path / "whole" / name).history
    assert (record.temperature, set(record.losses)) == ("2", {"kl", "hidden_mse", "emd"})
    assert record.together == {"as": "length", "with": ["subject"], "power": 0.75}
    assert json.loads((tmp_path / "cut" / "together.json").read_text())["runs"] == ["subject", "length"]


def test_losses_on_attention_see_the_shared_encoder(caches: dict[str, Cache], tmp_path: Path) -> None:
    losses = [{"loss": "kl"}, {"loss": "value_relation", "map": "final"}]
    train_multitask(caches, out=tmp_path / "run", options=options(losses=losses, epochs=1), cpu=True)
    rows = [Example(str(i), text) for i, (text, _) in enumerate(TEXTS[:8])]
    for name in caches:
        run = load_run(tmp_path / "run" / name)
        assert isinstance(run.student, PreTrainedModel) and run.student.config._attn_implementation == "sdpa"
        assert np.isfinite(run.logits(rows)).all()


def test_the_best_epoch_is_that_of_all_tasks(caches: dict[str, Cache], tmp_path: Path) -> None:
    subject = [Example(str(i), text, None, name) for i, (text, name) in enumerate(TEXTS[:9])]
    dev = {"subject": Corpus("s", None, subject, None), "length": Corpus("l", None, LONG[:10], None)}
    reports = train_multitask(caches, out=tmp_path / "run", options=options(), validation=dev, cpu=True)
    history = read_record(tmp_path / "run" / "subject").history
    for entry in history:
        assert entry["accuracy"] == pytest.approx((entry["subject/accuracy"] + entry["length/accuracy"]) / 2)
    best = max(history, key=lambda entry: (entry["accuracy"], -entry["epoch"]))
    assert {report.best_epoch for report in reports.values()} == {best["epoch"]}
    assert reports["length"].validation == {"accuracy": best["length/accuracy"]}


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_learned_together_is_told(place: Path, caches: dict[str, Cache], tmp_path: Path) -> None:
    rows = [Example(str(i), text) for i, (text, _) in enumerate(TEXTS)]
    corpus = Corpus("made", None, rows, None)
    few = tiny_tokenizer(vocab_size=90)
    save_model(tmp_path / "few", tiny_classifier(few), few)
    shuffled = tiny_tokenizer([text for text, _ in TEXTS[:-1]] + ["snow turns to rain as zebras rise tomorrow."])
    save_model(tmp_path / "shuffled", tiny_classifier(shuffled), shuffled)
    save_model(tmp_path / "encoder", tiny_classifier(tiny_tokenizer()).bert)
    for name in ("few", "shuffled"):
        dump(corpus, teacher=str(tmp_path / name), out=tmp_path / f"{name}-cache")
    bare = DumpOptions(capture=["hidden:2"], task="sentence-embedding")
    dump(corpus, teacher=str(tmp_path / "encoder"), out=tmp_path / "encoder-cache", options=bare)
    one = caches["subject"]
    dev = Corpus("dev", None, [Example("0", "x", None, "food")], None)
    cases: list[tuple[dict[str, Cache], dict[str, Any], dict[str, Corpus] | None, type[SoftlabelsError], str]] = [
        ({"subject": one}, {}, None, ConfigError, "there is only 'subject': give two or more, or use train-student"),
        ({}, {}, None, ConfigError, "there is none"),
        ({"a/b": one, "c": one}, {}, None, ConfigError, "'a/b' is no name for a task"),
        (
            caches,
            {"tasks": {"lenght": {"losses": {"kl": 1}}}},
            None,
            ConfigError,
            "said for a task 'lenght', which has no cache: there are subject, length. Did you mean 'length'",
        ),
        (caches, {}, {"size": dev}, ConfigError, "a validation corpus is said for a task 'size'"),
        (caches, {}, {"subject": dev}, ConfigError, "task 'length' has no validation corpus, and others have"),
        (
            {"subject": one, "few": open_cache(tmp_path / "few-cache")},
            {},
            None,
            CacheError,
            r"'subject' and 'few' were read with different tokenizers.*subject has \d+ tokens, .*few-cache 90",
        ),
        (
            {"subject": one, "shuffled": open_cache(tmp_path / "shuffled-cache")},
            {},
            None,
            CacheError,
            r"different tokenizers.*Dump both with teachers tuned from one model",
        ),
        (
            {"subject": one, "bare": open_cache(tmp_path / "encoder-cache")},
            {},
            None,
            CacheError,
            "task 'bare': .* is for sentence-embedding",
        ),
        (caches, {"losses": [{"loss": "pkd", "map": [[1, 1]]}]}, None, CacheError, "hidden.01"),
    ]
    for given, changes, validation, kind, told in cases:
        with pytest.raises(kind, match=told):
            train_multitask(given, out=tmp_path / "run", options=options(**changes), validation=validation, cpu=True)
    linear = build_options(MultiTaskOptions, {"student": "linear"}, where="test")
    with pytest.raises(ConfigError, match="no encoder to share"):
        train_multitask(caches, out=tmp_path / "run", options=linear, cpu=True)


@pytest.mark.parametrize("student", ["transformer", "bilstm"])
def test_pairs_and_texts_share_an_encoder(place: Path, caches: dict[str, Cache], tmp_path: Path, student: str) -> None:
    pairs = [Example(str(i), text, TEXTS[i - 1][0]) for i, (text, _) in enumerate(TEXTS[:20])]
    dump(Corpus("made", None, pairs, None), teacher=str(place / "other"), out=tmp_path / "pairs")
    mixed = {"subject": caches["subject"], "pairs": open_cache(tmp_path / "pairs")}
    train_multitask(mixed, out=tmp_path / "run", options=options(student, epochs=1), cpu=True)
    run = load_run(tmp_path / "run" / "pairs")
    one, other = run.logits([Example("0", TEXTS[0][0], TEXTS[1][0]), Example("1", TEXTS[0][0], TEXTS[2][0])])
    assert not np.allclose(one, other)  # the second text counts
    assert load_run(tmp_path / "run" / "subject").logits([Example("0", TEXTS[0][0])]).shape == (1, 3)


def test_token_types_that_the_first_teacher_does_not_know(place: Path, tmp_path: Path) -> None:
    """DistilBERT's config has none, and pairs of the second task have two."""
    tokenizer = tiny_tokenizer()
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=16, n_heads=2, n_layers=1, hidden_dim=16, max_position_embeddings=64
    )
    save_model(tmp_path / "teacher", DistilBertForSequenceClassification(config), tokenizer)
    texts = [Example(str(i), text) for i, (text, _) in enumerate(TEXTS[:20])]
    dump(Corpus("made", None, texts, None), teacher=str(tmp_path / "teacher"), out=tmp_path / "texts")
    pairs = [Example(str(i), text, TEXTS[i - 1][0]) for i, (text, _) in enumerate(TEXTS[:20])]
    dump(Corpus("made", None, pairs, None), teacher=str(place / "other"), out=tmp_path / "pairs")
    mixed = {name: open_cache(tmp_path / name) for name in ("texts", "pairs")}
    train_multitask(mixed, out=tmp_path / "run", options=options(epochs=1, losses={"kl": 1}), cpu=True)
    assert json.loads((tmp_path / "run" / "texts" / "config.json").read_text())["type_vocab_size"] == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"phases": [{"losses": {"kl": 1}}]}, "several tasks train in one phase"),
        ({"power": 2}, "power"),
        ({"prune": {"magnitude": 0.5}}, "a student of several tasks can't have 'prune'"),
        ({"from_run": "runs/a"}, "can't have 'from_run'"),
        ({"window": 2}, "can't have 'window'"),
        ({"rows": 10}, "'rows' would cut every task"),
        ({"tasks": {"a": {"loss": {"kl": 1}}}}, "unknown key 'loss'.*Did you mean 'losses'"),
    ],
)
def test_options_that_cannot_be_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        options(**changes)
