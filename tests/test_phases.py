"""Phases: losses on layers through maps and projections, one after the other, resumed anywhere, layer by layer."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softlabels import train as train_module
from softlabels.cache import Cache, open_cache
from softlabels.cli import _guarded
from softlabels.config import LAYER_LOSSES, DumpOptions, Masking, Phase, Schedule, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError
from softlabels.layer_maps import map_layers
from softlabels.objective import build_objective, fill_in
from softlabels.phases import frozen, parameters_of, write_out
from softlabels.recipes import read_recipe
from softlabels.runs import load_run, read_record
from softlabels.train import train_student
from softlabels.types import Example, LayerPair
from tests.models import LABEL_NAMES, TEXTS, save_teacher
from tests.test_tasks import save

STUDENT = {"layers": 1, "hidden_size": 12, "heads": 4}  # the teacher: 2 layers, 32 wide, 4 heads
INTERMEDIATE: dict[str, Any] = {
    "name": "intermediate",
    "losses": [
        {"loss": "attention_scores_mse", "map": "uniform"},
        {"loss": "hidden_mse", "map": "uniform", "project": "linear", "project_lr": 2},
        {"loss": "hidden_mse", "map": "embeddings", "project": "tanh"},
    ],
    "epochs": 2,
}
LAYER: dict[str, Any] = {"loss": "hidden_mse", "map": "uniform"}
HEADS: dict[str, Any] = {"loss": "attention_kl", "map": "uniform"}
PREDICTION: dict[str, Any] = {"name": "prediction", "losses": {"soft_cross_entropy": 1}, "epochs": 2, "lr": 2e-3}


def options(*phases: dict[str, Any], **changes: Any) -> StudentOptions:
    usual = {"student": "transformer", "options": STUDENT, "phases": list(phases), "lr": 5e-3, "batch_size": 16}
    return StudentOptions.model_validate(usual | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of everything, one of logits alone, and their teacher."""
    folder = tmp_path_factory.mktemp("phases")
    teacher = save_teacher(folder / "teacher")
    rows = [Example(str(i), text, None, name if i % 3 else None) for i, (text, name) in enumerate(TEXTS)]
    corpus = Corpus("made", None, rows, list(LABEL_NAMES))
    captures = ["logits", "hidden:all", "qkv:all", "attention:2@scores"]
    dump(corpus, teacher=str(teacher), out=folder / "cache", options=DumpOptions(capture=captures))
    dump(corpus, teacher=str(teacher), out=folder / "logits")
    dump(corpus, teacher=str(teacher), out=folder / "cls", options=DumpOptions(capture=["logits", "hidden:1@cls"]))
    return folder


@pytest.fixture
def cache(place: Path) -> Cache:
    return open_cache(place / "cache")


# ---------------------------------------------------------------------------------------------------------- the maps


@pytest.mark.parametrize(
    ("name", "student", "teacher", "pairs"),
    [
        ("uniform", 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),  # TinyBERT: g(m) = 3m
        ("uniform", 6, 12, [(m, 2 * m) for m in range(1, 7)]),
        ("skip", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),  # BERT-PKD, section 3.2
        ("skip", 6, 24, [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20)]),
        ("last", 6, 12, [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]),
        ("final", 4, 12, [(4, 12)]),
        ("same", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("embeddings", 4, 12, [(0, 0)]),
        ([[1, 2], [4, 12]], 4, 12, [(1, 2), (4, 12)]),
    ],
)
def test_the_maps_are_the_papers(name: Any, student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    found = map_layers(name, student=student, teacher=teacher, what="loss")
    assert [(pair.student, pair.teacher) for pair in found] == pairs


def test_a_map_of_two_layers_a_side() -> None:
    assert map_layers([[[1, 2], [3, 6]]], student=2, teacher=6, what="loss") == [LayerPair(1, 3, LayerPair(2, 6))]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("unifrom", "Did you mean 'uniform'"),
        ("uniform", "a multiple of the student's; teacher 7, student 2"),
        ("same", "as many layers on both sides"),
        ([[1, 8]], "the teacher has no layer 8; it has 0 .* to 7"),
        ([[3, 1]], "the student has no layer 3"),
        ([[1]], "is no pair of a map"),
        ([], "empty map"),
    ],
)
def test_a_map_that_cannot_be_is_told(given: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        map_layers(given, student=2, teacher=7, what="loss 'pkd'")


# ------------------------------------------------------------------------------------------------------ the training


def test_phases_follow_each_other_and_projections_stay_behind(cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = train_student(cache, out=out, options=options(INTERMEDIATE, PREDICTION), cpu=True)
    record = read_record(out)
    assert report.epochs == 4 and report.best_epoch in (3, 4)
    assert [entry["phase"] for entry in record.history] == [0, 0, 1, 1]
    assert record.history[1]["train/loss"] < record.history[0]["train/loss"]  # it comes nearer to the teacher's layers
    assert record.losses == {"soft_cross_entropy": 1.0} and [phase["name"] for phase in record.phases] == [
        "intermediate",
        "prediction",
    ]
    names = load_file(out / "model.safetensors").keys()
    assert all(name.startswith(("bert.", "classifier.")) for name in names)
    settings = json.loads((out / "config.json").read_text())
    assert "softlabels_tap" not in str(settings)
    assert load_run(out).logits([Example("a", TEXTS[0][0])]).shape == (1, 3)


def test_the_loss_on_layers_is_what_the_student_learns_from(cache: Cache, tmp_path: Path) -> None:
    """After transfer alone its hidden states are nearer to a linear map of the teacher's than an untrained one's."""
    wide = {"layers": 2, "hidden_size": 32, "heads": 4}
    transfer = {"name": "transfer", "losses": [{"loss": "hidden_mse", "map": "same"}], "epochs": 12}

    def distance(run: Path) -> float:
        student: Any = load_run(run).student
        batch = cache.batch(range(24), ["hidden.02"])
        with torch.no_grad():
            own = student(**batch.tokens.model_inputs(), output_hidden_states=True).hidden_states[2]
        mask = batch.tokens.attention_mask[..., None]
        return float(((own - batch.teacher.hidden(2)).square() * mask).sum() / mask.sum())

    train_student(cache, out=tmp_path / "near", options=options(transfer, options=wide), cpu=True)
    hard = options(losses={"ce": 1}, options=wide, epochs=1)
    train_student(cache, out=tmp_path / "far", options=hard, cpu=True)
    assert distance(tmp_path / "near") < 0.5 * distance(tmp_path / "far")


@pytest.mark.parametrize("kills", [1, 2, 3, 4])
def test_a_training_resumes_in_any_phase_to_the_same_result(
    cache: Cache, tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after so many epochs: inside the first phase, between the two, inside the second, at the end."""
    phases = options(INTERMEDIATE, PREDICTION)
    whole = tmp_path / "whole"
    train_student(cache, out=whole, options=phases, cpu=True)

    saved, save = 0, train_module.save_checkpoint

    def stop(*args: Any) -> None:
        nonlocal saved
        save(*args)
        saved += 1
        if saved == kills:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "save_checkpoint", stop)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train_student(cache, out=out, options=phases, cpu=True)
    monkeypatch.undo()
    train_student(cache, out=out, options=phases, resume=True, cpu=True)
    one, other = (load_file(run / "model.safetensors") for run in (whole, out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_record(whole).history == read_record(out).history


def test_a_phase_of_hard_labels_sees_labelled_rows_alone(cache: Cache, tmp_path: Path) -> None:
    hard = {"name": "tuning", "losses": {"ce": 1}, "epochs": 1}
    report = train_student(cache, out=tmp_path / "run", options=options(PREDICTION, hard, validation=0), cpu=True)
    assert report.rows == len(TEXTS) and report.labelled == sum(1 for i in range(len(TEXTS)) if i % 3)


def test_progressive_transfer_goes_up_layer_by_layer() -> None:
    losses = [
        {"loss": "feature_map_mse", "map": "same", "depth": [1.0, 2.0, 3.0]},
        {"loss": "attention_kl", "map": "same"},
    ]
    phase = Phase.model_validate({"name": "transfer", "losses": losses, "progressive": True, "freeze": ["head"]})
    written = write_out([phase], student_layers=3, teacher_layers=3)
    assert [one.name for one in written] == ["transfer-1", "transfer-2", "transfer-3"]
    assert [one.freeze for one in written] == [
        ["head", "embeddings"],
        ["head", "embeddings", "layers:1-1"],
        ["head", "embeddings", "layers:1-2"],
    ]
    assert [one.terms[0].depth for one in written] == [[1.0], [2.0], [3.0]]
    assert [term.map for term in written[1].terms] == [[[2, 2]], [[2, 2]]]
    slow = write_out([phase.model_copy(update={"progressive": 0.1})], student_layers=3, teacher_layers=3)
    assert slow[2].slow == {"embeddings": 0.1, "layers:1-2": 0.1} and slow[2].freeze == ["head"]


def test_what_is_frozen_does_not_move(cache: Cache, tmp_path: Path) -> None:
    wide = {"layers": 2, "hidden_size": 32, "heads": 4}
    losses = [{"loss": "hidden_mse", "map": "same"}]
    first = {"name": "a", "losses": losses, "epochs": 1, "freeze": ["layers:2"]}
    second = {"name": "b", "losses": losses, "epochs": 1, "freeze": ["embeddings", "layers:1"]}
    runs = {}
    for name, phases in (("one", [first]), ("two", [first, second])):
        train_student(cache, out=tmp_path / name, options=options(*phases, options=wide), cpu=True)
        runs[name] = load_file(tmp_path / name / "model.safetensors")
    moved = {name for name in runs["one"] if not torch.equal(runs["one"][name], runs["two"][name])}
    assert moved and all(".layer.1." in name for name in moved)


def test_slow_parts_move_less(cache: Cache, tmp_path: Path) -> None:
    phase = {"name": "a", "losses": {"kl": 1}, "epochs": 1, "slow": {"embeddings": 1e-4}, "warmup": 0.0}
    runs = {}
    for name, changes in (("slow", phase), ("fast", phase | {"slow": {}})):
        train_student(cache, out=tmp_path / name, options=options(changes), cpu=True)
        runs[name] = load_file(tmp_path / name / "model.safetensors")
    key = "bert.embeddings.word_embeddings.weight"
    held = tmp_path / "held"
    train_student(cache, out=held, options=options(phase | {"slow": {}, "freeze": ["embeddings"]}), cpu=True)
    start = load_file(held / "model.safetensors")[key]
    assert 0 < (runs["slow"][key] - start).abs().max() < 0.01 * (runs["fast"][key] - start).abs().max()


def test_parts_of_a_student(cache: Cache, tmp_path: Path) -> None:
    train_student(cache, out=tmp_path / "run", options=options(PREDICTION), cpu=True)
    student: Any = load_run(tmp_path / "run").student
    names = {name for name, _ in student.named_parameters()}
    parts = [parameters_of(student, part) for part in ("embeddings", "layers:1", "head", "bert.pooler")]
    assert sorted(name for part in parts for name in part) == sorted(names)
    with pytest.raises(ConfigError, match=r"no part 'embedings'.*Did you mean 'embeddings'"):
        parameters_of(student, "embedings")
    with pytest.raises(ConfigError, match="nothing to learn with"), frozen(student, ["bert", "head"]):
        pass


# ------------------------------------------------------------------------------------------------------- what is told


def test_what_the_cache_lacks_comes_with_the_command_that_adds_it(place: Path, tmp_path: Path) -> None:
    cache = open_cache(place / "logits")
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    with pytest.raises(CacheError) as told:
        train_student(cache, out=tmp_path / "run", options=options(INTERMEDIATE, PREDICTION), cpu=True)
    command = f"softlabels dump made --teacher {place / 'teacher'} --out {cache.path} --max-length"
    assert command in str(told.value)
    assert "--capture attention:2@scores --capture hidden:0,2" in str(told.value)
    assert "loss 'attention_scores_mse' needs attention.02@scores and 2 more" in str(told.value)
    assert not cache._shards and not (tmp_path / "run").exists()  # no row was read for that


def test_cls_states_come_from_either_form(place: Path, tmp_path: Path) -> None:
    wide = {"layers": 2, "hidden_size": 32, "heads": 4}
    phase = {"name": "pkd", "losses": [{"loss": "kl"}, {"loss": "pkd", "map": "skip", "depth": "mean"}], "epochs": 1}
    found = []
    for name in ("cache", "cls"):
        out = tmp_path / name
        train_student(open_cache(place / name), out=out, options=options(phase, options=wide), cpu=True)
        found.append(read_record(out).history[0]["train/loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"losses": [{"loss": "hidden_mse"}]}, "say which with 'map'"),
        ({"losses": [{"loss": "kl", "map": "uniform"}]}, "is on logits: it has no 'map'"),
        ({"losses": [{"loss": "hidden_mse", "map": "uniform", "weight": 0}]}, "must be above 0"),
        ({"losses": []}, "no loss is given"),
        ({"losses": [{"loss": "hiden_mse", "map": "uniform"}]}, "Did you mean 'hidden_mse'"),
    ],
)
def test_a_phase_that_cannot_be_is_told(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=fault):
        Phase.model_validate({"name": "a"} | changes)


@pytest.mark.parametrize(
    ("losses", "fault"),
    [
        ([{"loss": "dkd", "options": {"gamma": 1}}], "has no option 'gamma': it has alpha, beta"),
        ([{"loss": "hidden_mse", "map": "uniform"}], "32"),  # widths differ, and nothing projects
        ([{"loss": "hidden_mse", "map": "uniform", "depth": [1, 2]}], "2 weights for the 1 pairs"),
        ([{"loss": "pkd", "map": [[[0, 1], [0, 2]]]}], "two a side are for gram, nst"),
        ([{"loss": "attention_kl", "map": "uniform", "project": "linear"}], "nothing to 'project'"),
    ],
)
def test_a_loss_that_does_not_fit_is_told(cache: Cache, tmp_path: Path, losses: list[Any], fault: str) -> None:
    phase = {"name": "a", "losses": losses, "epochs": 1}
    with pytest.raises(ConfigError, match=fault):
        train_student(cache, out=tmp_path / "run", options=options(phase), cpu=True)


@pytest.mark.parametrize(
    ("phases", "fault"),
    [
        ([{"losses": {"kl": 1}, "freeze": ["layers:1-9"]}], "no part 'layers:1-9'.*layers:1-1"),
        ([{"losses": {"kl": 1}, "slow": {"embeddings": 0.1, "bert": 0.2}}], "'embeddings' and 'bert' of 'slow' both"),
        ([{"losses": [{"loss": "kl", "temperature": "9"}, HEADS]}], "the student has 2 heads, the teacher 4"),
        ([{"losses": [{"loss": "annealing_mse"}], "temperature": "9:1"}], "it must be 1 to max_temperature"),
        ([{"losses": [LAYER], "freeze": ["embeddings", "layers:1"]}], "phase 'b': all that its losses look at is fro"),
    ],
)
def test_what_a_later_phase_cannot_do_is_told_before_the_first(
    cache: Cache, tmp_path: Path, phases: list[dict[str, Any]], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "_train_phase", pytest.fail)
    later = [PREDICTION, *({"name": "b", "epochs": 1} | phase for phase in phases)]
    sizes = {"layers": 1, "hidden_size": 32, "heads": 2}
    with pytest.raises(ConfigError, match=fault):
        train_student(cache, out=tmp_path / "run", options=options(*later, options=sizes), cpu=True)


@pytest.mark.parametrize(
    ("loss", "given", "fault"),
    [
        ("value_relation", {"relation_heads": "4"}, "a whole number; not '4'"),
        ("value_relation", {"relation_heads": 2.0}, "a whole number; not 2.0"),
        ("value_relation", {"relation_heads": True}, "a whole number; not True"),
        ("attention_mse", {"heads": "men"}, "one of each, mean; not 'men'"),
        ("pkd", {"mean_over_width": "yes"}, "true or false; not 'yes'"),
        ("jsd", {"beta": [1]}, "a number, or a schedule such as '0:1'; not"),
        ("jsd", {"beta": True}, "a number, or a schedule such as '0:1'; not True"),
        ("dkd", {"alpha": "x"}, "alpha' 'x' is not a number"),
    ],
)
def test_an_option_of_the_wrong_kind_is_told(loss: str, given: dict[str, Any], fault: str) -> None:
    layers = {"map": "final"} if loss in LAYER_LOSSES else {}
    phase = Phase.model_validate({"name": "a", "losses": [{"loss": loss, "options": given} | layers]})
    with pytest.raises(ConfigError, match=f"phase 'a', loss '{loss}', option '.*{fault}"):
        fill_in(phase, "sequence-classification", student_layers=1, teacher_layers=lambda: 2)


def test_whole_numbers_words_and_schedules_stay_options() -> None:
    losses = [
        {"loss": "value_relation", "map": "final", "options": {"relation_heads": 4}},
        {"loss": "attention_mse", "map": "final", "options": {"heads": "mean"}},
        {"loss": "teacher_annealing", "options": {"share": "0:1"}},
    ]
    phase = Phase.model_validate({"losses": losses})
    terms = fill_in(phase, "sequence-classification", student_layers=1, teacher_layers=lambda: 2)
    assert [term.options for term in terms] == [{"relation_heads": 4}, {"heads": "mean"}, {"share": Schedule(0, 1)}]


def test_a_projection_is_for_hidden_states_whatever_stands_beside(cache: Cache) -> None:
    """The term beside it looks at hidden states: that is no use to this one."""
    losses = [LAYER | {"project": "linear"}, {"loss": "attention_kl", "map": "uniform", "project": "linear"}]
    with pytest.raises(ConfigError, match="'attention_kl' looks at no hidden states"):
        build_objective(Phase.model_validate({"losses": losses}), cache, student_layers=1)


def test_hard_labels_have_no_temperature_to_adapt(cache: Cache, tmp_path: Path) -> None:
    """flsw looks at the teacher's logits, and a phase of hard labels doesn't read them."""
    found = []
    for temperature in ("flsw:4", "1"):
        phase = {"name": "a", "losses": {"ce": 1}, "temperature": temperature, "epochs": 1}
        train_student(cache, out=tmp_path / temperature[0], options=options(phase), cpu=True)
        found.append(read_record(tmp_path / temperature[0]).history)
    assert found[0] == found[1]


def test_annealing_mse_takes_one_temperature_for_all_rows(cache: Cache) -> None:
    phase = Phase.model_validate({"losses": [{"loss": "annealing_mse"}], "temperature": "flsw:4"})
    with pytest.raises(ConfigError, match="has one temperature for all rows"):
        build_objective(phase, cache, student_layers=None)


def test_a_word_that_only_a_recipe_knows_is_no_start(cache: Cache, tmp_path: Path) -> None:
    started = options(losses={"kl": 1}, options={"init_from": "pretrained"})
    with pytest.raises(ConfigError, match="init_from: 'pretrained' is a model that softlabels run knows"):
        train_student(cache, out=tmp_path / "run", options=started, cpu=True)


def test_the_command_that_adds_a_field_goes_on_with_the_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are the cache's: with others the dump would be refused."""
    monkeypatch.setenv("SOFTLABELS_QUIET", "1")
    corpus = tmp_path / "my texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text, "label": name}) + "\n" for text, name in TEXTS[:12]))
    command = f"dump '{corpus}' --teacher {place / 'teacher'} --out {tmp_path / 'cache'} --shard-rows 5 --no-text"
    assert _guarded([*shlex.split(command), "--max-length", "9", "--cpu"], debug=True) == 0
    with pytest.raises(CacheError) as told:
        phase = Phase.model_validate({"losses": [LAYER]})
        build_objective(phase, open_cache(tmp_path / "cache"), student_layers=1)
    assert _guarded(shlex.split(str(told.value).partition("Add it with: softlabels ")[2]), debug=True) == 0
    assert build_objective(phase, open_cache(tmp_path / "cache"), student_layers=1).fields == ["hidden.02"]


def test_a_masked_language_model_teaches_as_distilbert_has_it(tmp_path: Path) -> None:
    """5·KL + 2·MLM + cosine, half the layers, from a cache of two maskings; then the command for what that lacks."""
    teacher = save(tmp_path / "teacher", "BertForMaskedLM")
    rows = [Example(str(i), text) for i, (text, _) in enumerate(TEXTS[:30])]
    settings = DumpOptions(capture=["vocab:exact", "hidden:2"], masking=Masking(times=2, smoothing=0.7, targets="all"))
    dump(Corpus("made", None, rows, None), teacher=str(teacher), out=tmp_path / "cache", options=settings)
    cache = open_cache(tmp_path / "cache")
    recipe = read_recipe("distilbert").pretrain
    assert recipe is not None
    half = {"preset": "distilbert", "init_from": str(teacher), "init_layers": [1]}
    student = recipe.student.model_copy(update={"options": half, "batch_size": 16})
    train_student(cache, out=tmp_path / "run", options=student, cpu=True)
    record = read_record(tmp_path / "run")
    assert record.task == "masked-lm" and record.losses == {"kl": 5, "ce": 2, "hidden_cosine": 1}
    assert record.history[1]["train/loss"] < record.history[0]["train/loss"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["architectures"] == ["DistilBertForMaskedLM"]
    lacking = options({"name": "a", "losses": [{"loss": "value_relation", "map": "final"}]})
    with pytest.raises(
        CacheError,
        match=r"--task masked-lm --max-length .* --maskings 2 --mask-smoothing 0\.7 --mask-targets all --capture qkv:2",
    ):
        train_student(cache, out=tmp_path / "no", options=lacking, cpu=True)


def test_a_student_without_layers_is_told(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none to look at: take a transformer"):
        train_student(
            cache, out=tmp_path / "run", options=options(INTERMEDIATE, student="bilstm", options={}), cpu=True
        )


def test_weights_and_options_move_with_the_phase(cache: Cache, tmp_path: Path) -> None:
    """Annealing-KD: an integer temperature down to 1, then hard labels; and a weight that grows from nothing."""
    anneal = {
        "name": "anneal",
        "losses": [{"loss": "annealing_mse", "options": {"max_temperature": 4}}, {"loss": "ce", "weight": "0:1"}],
        "temperature": "4:1:integer",
        "epochs": 4,
    }
    shares = {"name": "bam", "losses": [{"loss": "teacher_annealing", "options": {"share": "0:1"}}], "epochs": 2}
    report = train_student(cache, out=tmp_path / "run", options=options(anneal, shares), cpu=True)
    assert report.epochs == 6 and read_record(tmp_path / "run").temperature == "1"


def test_an_encoder_without_a_head_teaches_its_layers(place: Path, tmp_path: Path) -> None:
    """General distillation: the teacher isn't tuned to a task, and another student starts from this one."""
    rows = [Example(str(i), text) for i, (text, _) in enumerate(TEXTS)]
    captures = DumpOptions(capture=["hidden:2", "qkv:2"], task="sentence-embedding")
    dump(Corpus("made", None, rows, None), teacher=str(place / "teacher"), out=tmp_path / "cache", options=captures)
    general = {
        "name": "general",
        "losses": [
            {"loss": "attention_kl", "map": "final"},
            {"loss": "value_relation", "map": "final"},
            {"loss": "hidden_mse", "map": "final", "project": "linear"},
        ],
        "epochs": 2,
    }
    train_student(open_cache(tmp_path / "cache"), out=tmp_path / "general", options=options(general), cpu=True)
    assert read_record(tmp_path / "general").task == "sentence-embedding"
    started = options(losses={"kl": 1}, epochs=1, options={"init_from": str(tmp_path / "general"), "layers": 1})
    train_student(open_cache(place / "cache"), out=tmp_path / "task", options=started, cpu=True)
    with pytest.raises(ConfigError, match="is on logits, and the teacher of this cache has none"):
        train_student(open_cache(tmp_path / "cache"), out=tmp_path / "no", options=options(losses={"kl": 1}), cpu=True)
