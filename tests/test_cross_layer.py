"""Losses on several layers at once, as recipes have them: maps, projections, what a cache must hold, trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softlabels import train as train_module
from softlabels.cache import Cache, open_cache
from softlabels.config import DumpOptions, Phase, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError
from softlabels.foresight import check_recipe
from softlabels.layer_maps import map_groups, map_layers
from softlabels.losses.transport import LayerWeights
from softlabels.objective import build_objective, fill_in, layer_weights
from softlabels.phases import write_out
from softlabels.recipes import read_recipe
from softlabels.runs import load_run, read_record
from softlabels.train import train_student
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

STUDENT = {"layers": 2, "hidden_size": 12, "heads": 4}  # the teacher: 4 layers, 32 wide, 4 heads
PROJECTED: dict[str, Any] = {"project": "linear"}
EVERY: list[dict[str, Any]] = [
    {"loss": "kl"},
    {"loss": "alp", "map": "all", "depth": [1, 2], **PROJECTED},
    {"loss": "alp_tokens", "map": [[1, [0, 1]], [2, [2, 4]]], **PROJECTED, "share_projection": True},
    {"loss": "ckd", "map": "buckets", **PROJECTED},
    {"loss": "ckd_cls", "map": [[1, [1, 2, 3]], [2, [4]]], **PROJECTED},
    {"loss": "ckd_unit", "map": "buckets", **PROJECTED},
    {"loss": "emd", "map": "all", **PROJECTED, "options": {"update": True, "student_weights": [1, 2]}},
    {"loss": "emd_attention", "map": "all", "options": {"update": True}},
    {"loss": "layer_output", "map": "uniform", **PROJECTED},
    {"loss": "parameter_norm", "weight": 1e-4},
]


def options(*phases: dict[str, Any], **changes: Any) -> StudentOptions:
    usual = {"student": "transformer", "options": STUDENT, "phases": list(phases), "lr": 5e-3, "batch_size": 16}
    return StudentOptions.model_validate(usual | changes)


def phase(*losses: dict[str, Any], **changes: Any) -> Phase:
    return Phase.model_validate({"name": "a", "losses": list(losses)} | changes)


def terms(*losses: dict[str, Any], student: int = 2, teacher: int = 4):
    return fill_in(phase(*losses), "sequence-classification", student_layers=student, teacher_layers=lambda: teacher)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of everything, and one of logits and the states of [CLS]."""
    folder = tmp_path_factory.mktemp("cross-layer")
    teacher = save_teacher(folder / "teacher", layers=4)
    rows = [Example(str(i), text, None, name if i % 3 else None) for i, (text, name) in enumerate(TEXTS)]
    corpus = Corpus("made", None, rows, list(LABEL_NAMES))
    for name, captures in (("cache", ["hidden:all", "hidden:0", "qkv:all"]), ("cls", ["hidden:all@cls"])):
        chosen = DumpOptions(capture=["logits", *captures], codec="float32")
        dump(corpus, teacher=str(teacher), out=folder / name, options=chosen)
    return folder


@pytest.fixture
def cache(place: Path) -> Cache:
    return open_cache(place / "cache")


# ---------------------------------------------------------------------------------------------------------- the maps


def test_the_maps_of_several_layers() -> None:
    def groups(given: Any, student: int, teacher: int, **how: bool) -> list[Any]:
        found = map_groups(given, student=student, teacher=teacher, what="loss", **how)
        return [(group.student, group.teacher) for group in found]

    assert groups("all", 2, 3) == [((1,), (1, 2, 3)), ((2,), (1, 2, 3))]
    assert groups("all", 2, 3, together=True) == [((1, 2), (1, 2, 3))]
    assert groups("all", 3, 2) == [((layer,), (1, 2)) for layer in (1, 2, 3)]
    assert groups("buckets", 4, 12)[1] == ((2,), (4, 5, 6))  # CKD, regular combination
    assert groups([[1, [1, 2]], [2, [3, 4]]], 2, 4, cover=True) == [((1,), (1, 2)), ((2,), (3, 4))]
    assert groups([[2, [4, 0]]], 2, 4) == [((2,), (4, 0))]
    assert groups([[[0, 2], [0, 1, 4]]], 2, 4, together=True) == [((0, 2), (0, 1, 4))]


@pytest.mark.parametrize(
    ("loss", "given", "fault"),
    [
        ("ckd", "uniform", r"its map is all or buckets, or \[\[1, \[1, 2\]\], "),
        ("emd", "buckets", r"its map is all, or \[\[\[1, 2\], \[1, 2, 3\]\]\]"),
        ("hidden_mse", "all", "compares pairs of layers: its map is uniform, .*; not 'all'"),
        ("ckd", [[1, [1, 2]]], "no bucket holds layer 3 of the teacher; .* cover: false"),
        ("ckd", [[1, [1, 2, 3]], [2, [3, 4]]], "two buckets hold layer 3 of the teacher; .* cover: false"),
        ("ckd", [[1, [1, 1, 2]], [2, [3, 4]]], "layer 1 of the teacher is in its map twice"),
        ("alp", [[1, [1, 2]], [1, [3, 4]]], "layer 1 of the student is in its map twice"),
        ("alp", [[1, []]], "with one layer or more on each side"),
        ("alp", [[1, 2]], r"\[1, 2\] is no entry of its map; write \[student's layer, \[teacher's layers\]\]"),
        ("alp", [[1, [5]]], "the teacher has no layer 5; it has 0 .* to 4"),
        ("alp", [[3, [1]]], "the student has no layer 3"),
        ("alp", [], "a map of 0 entries"),
        ("emd", [[[], [1, 2]]], "with one layer or more on each side"),
        ("emd", [[1, [1, 2]]], r"write \[\[student's layers\], \[teacher's layers\]\]"),
        ("emd", [[[1], [1]], [[2], [2]]], "a map of 2 entries; write one entry"),
    ],
)
def test_a_map_that_cannot_be_is_told(loss: str, given: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=f"phase 'a', loss '{loss}'.*{fault}"):
        terms({"loss": loss, "map": given})


def test_buckets_are_even_or_written_out() -> None:
    with pytest.raises(ConfigError, match=r"teacher 5, student 2: write the map out, such as \[\[1, \[1, 2\]\], \[2, "):
        terms({"loss": "ckd", "map": "buckets"}, teacher=5)
    # CKD's skip and overlap combinations
    free: list[tuple[Any, list[int]]] = [([[1, [1, 3]]], [1, 3]), ([[1, [1, 2]], [2, [2, 3]]], [1, 2, 3])]
    for written, layers in free:
        assert terms({"loss": "ckd", "map": written, "cover": False})[0].layers("teacher") == layers


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"student_weights": [1, 2, 3]}, "'student_weights' has 3 weights for the 2 layers of the student"),
        ({"teacher_weights": [1]}, "'teacher_weights' has 1 weights for the 4 layers of the teacher"),
        ({"teacher_weights": [1, -1, 1, 1]}, "a list of weights such as .*, none below 0 and one above"),
        ({"student_weights": [0, 0]}, "none below 0 and one above"),
        ({"student_weights": "1:2"}, "a list of weights"),
        ({"student_weights": [True, 1]}, "a list of weights"),
        ({"student_weights": [float("inf"), 1]}, "a list of weights"),
        ({"update": 1}, "true or false; not 1"),
        ({"weights": [1, 2]}, "has no option 'weights': it has student_weights, teacher_weights, update"),
    ],
)
def test_weights_that_do_not_fit_are_told(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=f"phase 'a', loss 'emd'.*{fault}"):
        terms({"loss": "emd", "map": "all", "options": given})


def test_weights_are_kept_where_a_transport_is() -> None:
    found = layer_weights(terms(*EVERY))
    assert found is not None and set(found) == {"emd", "emd_attention"}
    weights = found["emd"]
    assert isinstance(weights, LayerWeights)
    assert weights.student.tolist() == pytest.approx([1 / 3, 2 / 3]) and weights.teacher.shape == (4,)
    assert layer_weights(terms({"loss": "kl"})) is None


@pytest.mark.parametrize(
    ("losses", "fault"),
    [
        ([{"loss": "parameter_norm"}], "phase 'a' has a penalty and no loss"),
        ([{"loss": "emd_attention", "map": "all", "project": "linear"}], "it has nothing to 'project'"),
        ([{"loss": "alp", "map": "all", "depth": [1]}], "1 weights for the 2 pairs"),
    ],
)
def test_a_term_that_does_not_fit_is_told(losses: list[dict[str, Any]], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        terms(*losses)


def test_a_penalty_has_no_layers() -> None:
    with pytest.raises(ValueError, match="'parameter_norm' is on the parameters: it has no 'map'"):
        phase({"loss": "kl"}, {"loss": "parameter_norm", "map": "all"})
    with pytest.raises(ValueError, match="say which with 'map'"):
        phase({"loss": "alp"})


# ------------------------------------------------------------------------------------------------- progressive transfer


def test_progressive_transfer_keeps_buckets_and_penalties() -> None:
    losses: list[dict[str, Any]] = [
        {"loss": "ckd", "map": "buckets", "depth": [1.0, 3.0]},
        {"loss": "parameter_norm", "weight": 0.1},
    ]
    written = write_out([phase(*losses, progressive=True)], student_layers=2, teacher_layers=4)
    assert [[term.loss for term in one.terms] for one in written] == [["ckd", "parameter_norm"]] * 2
    assert [one.terms[0].map for one in written] == [[[1, [1, 2]]], [[2, [3, 4]]]]
    for one, depth in zip(written, (1.0, 3.0), strict=True):
        term, _ = fill_in(one, "sequence-classification", student_layers=2, teacher_layers=lambda: 4)
        assert term.depth == (depth,)
    with pytest.raises(ConfigError, match="loss 'emd' looks at all layers at once: it can't be progressive"):
        write_out([phase({"loss": "emd", "map": "all"}, progressive=True)], student_layers=2, teacher_layers=4)
    with pytest.raises(ConfigError, match="no loss on layers"):
        write_out([phase({"loss": "parameter_norm"}, progressive=True)], student_layers=2, teacher_layers=4)


# ----------------------------------------------------------------------------------------------------- whole trainings


def test_a_training_resumes_to_the_same_result(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss at once; their projections and the layers' weights go on where they were."""
    every = options({"name": "all", "losses": EVERY, "epochs": 2})
    whole = tmp_path / "whole"
    train_student(cache, out=whole, options=every, cpu=True)

    save = train_module.save_checkpoint

    def stop(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "save_checkpoint", stop)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train_student(cache, out=out, options=every, cpu=True)
    monkeypatch.undo()
    kept = [load_file(file) for file in sorted((out / "checkpoint").glob("model*.safetensors"))]
    weights = next(held for held in kept if "emd.student" in held)
    assert weights["emd.student"].tolist() != pytest.approx([1 / 3, 2 / 3], rel=1e-3)  # they had moved
    assert weights["emd_attention.teacher"].sum().item() == pytest.approx(1)
    projections = next(held for held in kept if any(key.startswith("maps.") for key in held))
    shapes = {key.removeprefix("maps."): tuple(value.shape) for key, value in projections.items() if "weight" in key}
    assert shapes == {
        "alp:0.0.weight": (32, 12),
        "alp:1.0.weight": (32, 12),
        "alp_tokens.0.weight": (32, 12),
        "ckd:0.0.weight": (12, 64),
        "ckd:1.0.weight": (12, 64),
        "ckd_cls:0.0.weight": (12, 96),
        "ckd_cls:1.0.weight": (12, 32),
        "ckd_unit:0.0.weight": (64, 12),
        "ckd_unit:1.0.weight": (64, 12),
        "emd:0.0.weight": (32, 12),
        "emd:1.0.weight": (32, 12),
        "layer_output:0.0.weight": (32, 12),
        "layer_output:1.0.weight": (32, 12),
    }
    train_student(cache, out=out, options=every, resume=True, cpu=True)
    one, other = (load_file(run / "model.safetensors") for run in (whole, out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_record(whole).history == read_record(out).history
    assert all(name.startswith(("bert.", "classifier.")) for name in one)  # nothing of that is exported
    assert load_run(out).logits([Example("a", TEXTS[0][0])]).shape == (1, 3)


def test_the_projection_of_a_bucket_learns(cache: Cache, tmp_path: Path) -> None:
    """A frozen student's states are a linear map of the bucket's only as far as that map learns to be it."""
    losses = [{"loss": "ckd", "map": "buckets", **PROJECTED, "project_lr": 4}]
    ckd = {"name": "a", "losses": losses, "epochs": 10, "freeze": ["embeddings", "layers:1"]}
    train_student(cache, out=tmp_path / "run", options=options(ckd), cpu=True)
    history = read_record(tmp_path / "run").history
    assert history[-1]["train/loss"] < 0.5 * history[0]["train/loss"]


def test_states_of_cls_alone_are_enough(place: Path, tmp_path: Path) -> None:
    losses = [{"loss": "alp", "map": "all", **PROJECTED}, {"loss": "ckd_cls", "map": "buckets", **PROJECTED}]
    found = []
    for name in ("cache", "cls"):
        own = open_cache(place / name)
        train_student(own, out=tmp_path / name, options=options({"name": "a", "losses": losses, "epochs": 1}), cpu=True)
        found.append(read_record(tmp_path / name).history[0]["train/loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    wanted = [f"hidden.{layer:02d}@cls" for layer in (1, 2, 3, 4)]
    assert build_objective(phase(*losses), open_cache(place / "cls"), student_layers=2).fields == wanted
    assert wanted[0] not in open_cache(place / "cache").fields


def test_what_the_cache_lacks_is_told_with_all_its_layers(place: Path) -> None:
    cls = open_cache(place / "cls")
    with pytest.raises(CacheError, match=r"'emd' needs hidden.01 and 3 more.* --capture hidden:1,2,3,4$"):
        build_objective(phase({"loss": "emd", "map": "all"}), cls, student_layers=2)
    with pytest.raises(CacheError, match=r"'ckd' needs hidden.02 and 1 more.* --capture hidden:2,4$"):
        free = {"loss": "ckd", "map": [[1, [2, 4]]], "cover": False}
        build_objective(phase(free), cls, student_layers=2)
    assert not cls._shards  # no row was read for that


def test_the_norm_of_the_parameters_shrinks(cache: Cache, tmp_path: Path) -> None:
    norms = []
    for weight in (1e-6, 1.0):
        out = tmp_path / str(weight)
        losses = [{"loss": "kl"}, {"loss": "parameter_norm", "weight": weight}]
        train_student(cache, out=out, options=options({"name": "a", "losses": losses, "epochs": 3}), cpu=True)
        norms.append(sum(value.square().sum().item() for value in load_file(out / "model.safetensors").values()))
    assert norms[1] < 0.95 * norms[0]


def test_a_recurrent_student_has_a_norm_too_and_labels_need_no_teacher(cache: Cache, tmp_path: Path) -> None:
    """Its word vectors' gradients are sparse without the penalty, and dense with it."""
    losses = {"ce": 1.0, "parameter_norm": 1e-3}
    own = options(student="bilstm", options={"hidden_size": 8, "embedding_dim": 8}, losses=losses, epochs=1)
    report = train_student(cache, out=tmp_path / "run", options=own, cpu=True)
    assert report.labelled == report.rows > 0


def test_one_projection_is_for_one_width(cache: Cache, tmp_path: Path) -> None:
    uneven = {"loss": "ckd", "map": [[1, [1, 2, 3]], [2, [4]]], **PROJECTED, "share_projection": True}
    with pytest.raises(ConfigError, match="differ in width, so that one projection can't serve all"):
        train_student(cache, out=tmp_path / "run", options=options({"name": "a", "losses": [uneven]}), cpu=True)


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("alp-kd", {"ce", "kl", "alp"}),
        ("ckd", {"ce", "kl", "ckd"}),
        ("emd", {"kl", "emd", "emd_attention"}),
        ("taylor-fo", {"kl", "layer_output", "parameter_norm"}),
        ("progressive", {"kl", "hidden_mse", "attention_kl"}),
    ],
)
def test_the_recipes_are_what_they_say(name: str, losses: set[str]) -> None:
    recipe = read_recipe(name)
    assert set().union(*(student.loss_names() for student in recipe.students)) == losses
    check_recipe(recipe)  # their dumps take all that their losses look at


def test_pairs_of_layers_are_still_mapped_in_pairs() -> None:
    with pytest.raises(ConfigError, match="not 'buckets'"):
        map_layers("buckets", student=2, teacher=4, what="loss 'pkd'")
