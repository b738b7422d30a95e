"""Two students together: each is drawn to the other alone, and without a coupling is as it would be by itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from softlabels import joint as joint_module
from softlabels.cache import Cache, open_cache
from softlabels.config import Couple, DumpOptions, JointOptions, StudentOptions, build_options
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError, StudentError
from softlabels.evaluate import evaluate
from softlabels.joint import couple, train_joint
from softlabels.losses.soft_targets import kl
from softlabels.runs import load_run, read_record
from softlabels.train import train_student
from softlabels.types import Example, Signals
from tests.models import LABEL_NAMES, TEXTS, save_model, save_teacher, tiny_classifier, tiny_tokenizer

TRANSFORMER = {"layers": 1, "hidden_size": 16, "heads": 4}
LAYERS: list[dict[str, Any]] = [
    {"loss": "hidden_mse", "map": "final", "project": "linear"},
    {"loss": "value_relation", "map": "final", "weight": 0.5},
]


def student(**changes: Any) -> dict[str, Any]:
    usual = {"student": "transformer", "options": TRANSFORMER, "losses": {"kl": 1}, "epochs": 2, "lr": 5e-3}
    return usual | {"batch_size": 16} | changes


def options(how: dict[str, Any] | None = None, **local: Any) -> JointOptions:
    """'global' on the teacher's distribution, 'local' on its layers alone unless `local` says otherwise."""
    students = {"global": student(), "local": student(losses=LAYERS) | local}
    return build_options(JointOptions, {"students": students, "couple": how or {}}, where="test")


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a teacher's logits and last layer, and the teacher; every third row has no label."""
    folder = tmp_path_factory.mktemp("joint")
    teacher = save_teacher(folder / "teacher")
    rows = [Example(str(i), text, None, name if i % 3 else None) for i, (text, name) in enumerate(TEXTS)]
    corpus = Corpus("made", None, rows, list(LABEL_NAMES))
    captures = ["logits", "hidden:2", "qkv:2"]
    dump(corpus, teacher=str(teacher), out=folder / "cache", options=DumpOptions(capture=captures))
    return folder


@pytest.fixture
def cache(place: Path) -> Cache:
    return open_cache(place / "cache")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------- coupling


def signals(*shape: int, seed: int) -> Signals:
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return Signals({"logits": logits}, torch.ones(shape[0], 1), torch.zeros(shape[0], dtype=torch.long))


def test_the_coupling_moves_its_own_student_alone() -> None:
    mine, other = signals(5, 3, seed=0), signals(5, 3, seed=1)
    couple(torch.zeros(()), mine, other, Couple(kl=1, l2=0.5), progress=0).backward()
    assert other.logits.grad is None
    assert mine.logits.grad is not None and mine.logits.grad.abs().min() > 0


def test_the_coupling_is_the_formula() -> None:
    mine, other = signals(6, 4, seed=2), signals(6, 4, seed=3)
    how = Couple(kl="0:2", l2=0.25, temperature="3")
    z, y = mine.logits.detach().double().numpy(), other.logits.detach().double().numpy()

    def log_softmax(values: np.ndarray) -> np.ndarray:
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    q, p = log_softmax(z / 3), log_softmax(y / 3)
    mutual, pull = 9 * (np.exp(p) * (p - q)).sum(1).mean(), np.square(z - y).sum(1).mean()
    for progress, weight in ((0.0, 0.0), (0.5, 1.0), (1.0, 2.0)):
        found = couple(torch.tensor(1.0), mine, other, how, progress=progress).item()
        assert found == pytest.approx(1 + weight * mutual + 0.25 * pull, rel=1e-5)
    one = torch.tensor(1.0)
    assert couple(one, mine, other, Couple(kl=0, l2=0), progress=0.5) is one


# ------------------------------------------------------------------------------------------------------ the training


@pytest.mark.parametrize("kind", ["transformer", "bilstm"])
def test_without_a_coupling_each_is_as_if_alone(cache: Cache, tmp_path: Path, kind: str) -> None:
    small = {"embedding_dim": 8, "hidden_size": 8, "fc_size": 8}
    local: dict[str, Any] = {"losses": [*LAYERS, {"loss": "kl"}]}
    if kind == "bilstm":
        local = {"student": "bilstm", "options": small, "losses": {"mse_logits": 1.0}}
    chosen = options({"kl": 0}, **local)
    train_joint(cache, out=tmp_path / "joint", options=chosen, cpu=True)
    for name in ("global", "local"):
        train_student(cache, out=tmp_path / name, options=chosen.students[name], cpu=True)
        assert same(tmp_path / "joint" / name, tmp_path / name), name
        alone, joint = read_record(tmp_path / name), read_record(tmp_path / "joint" / name)
        assert alone.history == joint.history and alone.best_epoch == joint.best_epoch
        assert joint.together["with"] == ["local" if name == "global" else "global"] and not alone.together


@pytest.mark.slow
def test_a_local_student_learns_to_answer_from_the_other(cache: Cache, tmp_path: Path) -> None:
    """Its head sees neither a label nor the teacher's logits, but the other's distribution, and comes to be right."""
    changes = {"epochs": 25, "lr": 2e-2, "batch_size": 8, "validation": 0.0}
    small = {"embedding_dim": 16, "hidden_size": 12, "fc_size": 10}
    students = {
        "global": student(student="bilstm", options=small, losses={"ce": 1}, **changes),
        "local": student(losses=[LAYERS[0] | {"weight": 0.1}], **changes),
    }
    chosen = build_options(JointOptions, {"students": students}, where="test")
    train_joint(cache, out=tmp_path / "run", options=chosen, cpu=True)
    labelled = [row for row in range(len(TEXTS)) if row % 3]
    wanted = np.array([LABEL_NAMES.index(TEXTS[row][1]) for row in labelled])
    for name in ("global", "local"):
        logits = load_run(tmp_path / "run" / name).logits([Example(str(row), TEXTS[row][0]) for row in labelled])
        assert (logits.argmax(1) == wanted).mean() > 0.85, name


def test_held_out_rows_judge_by_losses_whose_target_stands_still(cache: Cache, tmp_path: Path) -> None:
    """Not by the coupling; and who has no loss on logits by the other's, so that its answers count."""
    chosen = options({"kl": 3, "l2": 1})
    reports = train_joint(cache, out=tmp_path / "run", options=chosen, cpu=True)
    held_out = np.random.default_rng(0).permutation(cache.rows)[: cache.rows // 10]
    teacher = cache.signals(held_out, ["logits"])
    examples = [Example(str(row), TEXTS[row][0]) for row in held_out]
    for name in ("global", "local"):
        own = replace(teacher, fields={"logits": torch.from_numpy(load_run(tmp_path / "run" / name).logits(examples))})
        answers = kl(own, teacher, temperature=1.0).item()
        found = reports[name].validation["loss"]
        assert found == pytest.approx(answers, rel=1e-4) if name == "global" else found > answers


@pytest.mark.parametrize("kills", [1, 2])
def test_an_interrupted_pair_resumes_to_the_same_result(
    cache: Cache, tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options({"kl": "0:1", "l2": 0.1})
    train_joint(cache, out=tmp_path / "whole", options=chosen, cpu=True)
    saved, save = 0, joint_module.save_checkpoints

    def stop(*args: Any) -> None:
        nonlocal saved
        save(*args)
        saved += 1
        if saved == kills:
            raise KeyboardInterrupt

    monkeypatch.setattr(joint_module, "save_checkpoints", stop)
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train_joint(cache, out=out, options=chosen, cpu=True)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="add --resume"):
        train_joint(cache, out=out, options=chosen, cpu=True)
    with pytest.raises(ConfigError, match="couple was"):
        train_joint(cache, out=out, options=options({"kl": 1}), resume=True, cpu=True)
    train_joint(cache, out=out, options=chosen, resume=True, cpu=True)
    for name in ("global", "local"):
        assert same(tmp_path / "whole" / name, out / name)
        assert read_record(tmp_path / "whole" / name).history == read_record(out / name).history
    assert not (out / "checkpoint").exists()
    with pytest.raises(ConfigError, match="holds a finished run"):
        train_joint(cache, out=out, options=chosen, resume=True, cpu=True)


def test_a_validation_corpus_chooses_by_accuracy(cache: Cache, tmp_path: Path) -> None:
    dev = Corpus("dev", None, [Example(str(i), text, None, name) for i, (text, name) in enumerate(TEXTS[:12])], None)
    reports = train_joint(cache, out=tmp_path / "run", options=options(), validation=dev, cpu=True)
    assert all(set(report.validation) == {"accuracy"} for report in reports.values())
    assert reports["local"].rows == len(TEXTS)


# ---------------------------------------------------------------------------------------------------------- averages


def test_both_are_evaluated_alone_and_averaged(cache: Cache, tmp_path: Path) -> None:
    train_joint(cache, out=tmp_path / "run", options=options(), cpu=True)
    runs = [tmp_path / "run" / name for name in ("global", "local")]
    rows = [Example(str(i), text, None, name) for i, (text, name) in enumerate(TEXTS)]
    corpus = Corpus("test", None, rows, list(LABEL_NAMES))
    found = evaluate(runs[0], corpus, cache=cache, others=[runs[1]])
    alone = [torch.from_numpy(load_run(run).logits(rows)).softmax(-1) for run in runs]
    answers = ((alone[0] + alone[1]) / 2).argmax(-1)
    wanted = torch.tensor([LABEL_NAMES.index(name) for _, name in TEXTS])
    assert found.accuracy == pytest.approx((answers == wanted).double().mean().item())
    each = [evaluate(run, corpus, cache=cache) for run in runs]
    assert found.parameters == sum(one.parameters for one in each) and found.bytes == sum(one.bytes for one in each)
    assert found.alone == {str(run): one.accuracy for run, one in zip(runs, each, strict=True)}
    assert found.fidelity is not None and each[0].fidelity is not None and each[0].alone == {}
    with pytest.raises(StudentError, match=r"holds runs that trained together: .*global.*local"):
        evaluate(tmp_path / "run", corpus)


def test_runs_of_other_classes_are_not_averaged(place: Path, cache: Cache, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_model(tmp_path / "two", tiny_classifier(tokenizer, num_labels=2), tokenizer)
    two = [Example(str(i), text) for i, (text, _) in enumerate(TEXTS)]
    dump(Corpus("made", None, two, None), teacher=str(tmp_path / "two"), out=tmp_path / "cache")
    small = StudentOptions.model_validate(student(epochs=1))
    train_student(open_cache(tmp_path / "cache"), out=tmp_path / "b", options=small, cpu=True)
    train_student(cache, out=tmp_path / "a", options=small, cpu=True)
    corpus = Corpus("test", None, [Example("0", TEXTS[0][0], None, TEXTS[0][1])], list(LABEL_NAMES))
    with pytest.raises(StudentError, match=r"can't be averaged: .*b.* has the classes LABEL_0, LABEL_1; .*food, sport"):
        evaluate(tmp_path / "a", corpus, others=[tmp_path / "b"])


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"students": {"global": student()}}, "two students train together, called global and local; there are global"),
        (
            {"students": {"global": student(), "local": student(seed=1)}},
            "the same batches, so 'seed' must be one for both: it is 0 for global and 1 for local",
        ),
        ({"students": {"global": student(), "local": student(batch_size=8)}}, "'batch_size' must be one for both"),
        (
            {
                "students": {
                    "global": student(),
                    "local": {
                        "student": "transformer",
                        "phases": [{"name": "a", "losses": LAYERS}, {"name": "b", "losses": {"kl": 1}}],
                    },
                }
            },
            "student 'local' has several phases",
        ),
        (
            {"students": {"global": student(), "local": student(from_run="x")}},
            "student 'local' of two can't have 'from_",
        ),
        ({"students": {"global": student(prune={"magnitude": 0.5}), "local": student()}}, "can't have 'prune'"),
        ({"couple": {"kl": -1}}, "a weight is 0 or more; not -1"),
        ({"couple": {"temperature": "flsw:4"}}, "one temperature for all rows"),
        ({"couple": {"mse": 1}}, "unknown key 'mse'; it takes kl, l2, temperature"),
    ],
)
def test_what_cannot_be_a_pair_is_told(changes: dict[str, Any], told: str) -> None:
    usual = {"students": {"global": student(), "local": student(losses=LAYERS)}}
    with pytest.raises(ConfigError, match=told):
        build_options(JointOptions, usual | changes, where="test")


def test_what_cannot_be_coupled_is_told(place: Path, cache: Cache, tmp_path: Path) -> None:
    linear: dict[str, Any] = {"student": "linear", "options": {}, "losses": {"mse_logits": 1.0}}
    mute = build_options(
        JointOptions, {"students": {name: student(losses=LAYERS) for name in ("global", "local")}}, where="test"
    )
    cases: list[tuple[JointOptions, type[Exception], str]] = [
        (options(**linear), ConfigError, "student 'local' is linear, which is fitted in one go"),
        (options({"kl": "1:0"}), ConfigError, "student 'local' has no loss on logits, and nothing that couples it"),
        (mute, ConfigError, "neither student has a loss on logits"),
        (options(student="bilstn"), StudentError, "Did you mean 'bilstm'"),
    ]
    for chosen, kind, told in cases:
        with pytest.raises(kind, match=told):
            train_joint(cache, out=tmp_path / "run", options=chosen, cpu=True)
    encoder = tmp_path / "encoder"
    save_model(encoder, tiny_classifier(tiny_tokenizer()).bert)
    rows = [Example(str(i), text) for i, (text, _) in enumerate(TEXTS)]
    dump(
        Corpus("made", None, rows, None),
        teacher=str(encoder),
        out=tmp_path / "bare",
        options=DumpOptions(capture=["hidden:2"], task="sentence-embedding"),
    )
    with pytest.raises(ConfigError, match=r"coupled by their classes, and the teacher of cache .* is for sentence-emb"):
        train_joint(open_cache(tmp_path / "bare"), out=tmp_path / "run", options=options(), cpu=True)
    assert not (tmp_path / "run" / "together.json").exists()


def test_what_trained_together_is_named(cache: Cache, tmp_path: Path) -> None:
    train_joint(cache, out=tmp_path / "run", options=options(), cpu=True)
    assert json.loads((tmp_path / "run" / "together.json").read_text())["runs"] == ["global", "local"]
    shutil.rmtree(tmp_path / "run" / "local")
    assert load_run(tmp_path / "run" / "global").record.together["as"] == "global"
