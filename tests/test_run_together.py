"""Recipes of students that train together, two on one task or one encoder on several; and their commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from softlabels.cache import open_cache
from softlabels.cli import _guarded
from softlabels.config import MultiTaskOptions, StudentOptions
from softlabels.errors import ConfigError
from softlabels.evaluate import evaluate
from softlabels.recipes import MultiTaskRecipe, Recipe, alone_options, read_experiment, read_recipe, recipes_folder
from softlabels.run import RunResult, run_recipe, run_tasks
from softlabels.runs import read_record
from softlabels.tables import recipe_table
from tests.models import TEXTS, save_model, tiny_classifier, tiny_tokenizer

SMALL = {"layers": 1, "hidden_size": 16, "heads": 4}
LAYERS = [{"loss": "hidden_mse", "map": "final", "project": "linear", "weight": 0.1}]


pytestmark = pytest.mark.usefixtures("quick")


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def teacher(place: Path) -> dict[str, Any]:
    return {"model": str(place / "base"), "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}}


def pair(place: Path, **changes: Any) -> dict[str, Any]:
    corpus = {"source": str(place / "subject"), "train": "train", "transfer": "train", "test": "test"}
    entry = {
        "name": "pair",
        "student": "transformer",
        "options": SMALL,
        "losses": {"kl": 1},
        "epochs": 1,
        "batch_size": 16,
        "joint": {"local": {"student": "transformer", "options": SMALL, "losses": LAYERS}, "couple": {"l2": 0.1}},
    }
    dump = {"capture": ["logits", "hidden:2"]}
    return {
        "name": "tiny",
        "corpus": corpus,
        "teacher": teacher(place),
        "dump": dump,
        "students": [entry | changes],
    }


def tasks(place: Path, **changes: Any) -> dict[str, Any]:
    entries = [
        {
            "name": name,
            "corpus": {"source": str(place / name), "train": "train", "test": "test"},
            "teacher": teacher(place),
            "dump": {"capture": ["logits"]},
        }
        for name in ("subject", "length")
    ]
    student = {"student": "transformer", "options": SMALL, "epochs": 1, "batch_size": 16}
    return {"name": "tiny-tasks", "tasks": entries, "student": student} | changes


def write(path: Path, recipe: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora with splits, a model to tune, and a finished run of a recipe of each kind."""
    folder = tmp_path_factory.mktemp("together")
    named = {"subject": TEXTS, "length": [(text, "long" if len(text) > 50 else "short") for text, _ in TEXTS]}
    for name, rows in named.items():
        (folder / name).mkdir()
        write_csv(folder / name / "train.csv", rows[:40])
        write_csv(folder / name / "test.csv", rows[40:])
    tokenizer = tiny_tokenizer()
    save_model(folder / "base", tiny_classifier(tokenizer).bert, tokenizer)
    other = tiny_tokenizer(vocab_size=90)
    save_model(folder / "other", tiny_classifier(other).bert, other)
    run_recipe(read_recipe(write(folder / "pair.yaml", pair(folder))), out=folder / "pair", cpu=True)
    several = read_experiment(write(folder / "tasks.yaml", tasks(folder)))
    assert isinstance(several, MultiTaskRecipe)
    run_tasks(several, out=folder / "tasks", cpu=True)
    return folder


def evaluations(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / "stages" / f"{stage}.json").read_text())["result"]


# ------------------------------------------------------------------------------------------------------------- pairs


def test_the_table_of_a_pair_has_each_and_their_average(place: Path) -> None:
    out = place / "pair"
    rows = {row["student"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert list(rows) == ["pair/global", "pair/local", "pair/average"]
    for name in ("global", "local", "average"):
        row = rows[f"pair/{name}"]
        assert row["accuracy_soft"] == evaluations(out, f"evaluate-pair-joint-seed0-{name}")["accuracy"]
        assert row["accuracy_alone"] == evaluations(out, f"evaluate-pair-seed0-{name}")["accuracy"]
        assert row["accuracy_hard"] is None and row["teacher_accuracy"] is None
    assert rows["pair/average"]["parameters"] == rows["pair/global"]["parameters"] + rows["pair/local"]["parameters"]
    assert read_record(out / "students" / "pair-joint-seed0" / "local").losses == {"hidden_mse": 0.1}
    assert read_record(out / "students" / "pair-local-seed0").losses == {"hidden_mse": 0.1, "kl": 1.0}
    assert read_record(out / "students" / "pair-global-seed0").losses == {"kl": 1.0}


def test_a_second_run_of_a_pair_skips_all(place: Path) -> None:
    said: list[str] = []
    result = run_recipe(read_recipe(str(place / "pair.yaml")), out=place / "pair", say=said.append, cpu=True)
    assert said == [] and result.skipped == 3 + 1 + 3 + 2 + 3
    table = recipe_table(result)
    assert "acc alone" in table and "acc hard" not in table and "by itself, on the same losses" in table


def test_a_pairs_recipe_trains_from_a_cache_too(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["train-joint", str(place / "pair" / "cache"), "--recipe", str(place / "pair.yaml"), "--cpu"]
    arguments += ["--out", str(tmp_path / "run"), "--set", "students.pair.joint.couple.kl=0.5", "--json"]
    assert _guarded(arguments, debug=True) == 0
    reports = json.loads(capsys.readouterr().out)
    assert list(reports) == ["global", "local"] and reports["local"]["epochs"] == 1
    runs = [str(tmp_path / "run" / name) for name in reports]
    couple = read_record(runs[0]).together["couple"]
    assert couple == {"kl": 0.5, "l2": 0.1, "temperature": "1"}
    test = str(place / "subject" / "test.csv")
    assert _guarded(["evaluate", runs[0], test, "--with", runs[1]], debug=True) == 0
    alone = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy alone"))
    assert all(f"{run} 0." in alone for run in runs)


def test_alone_a_mute_student_learns_to_answer_from_the_teacher(place: Path) -> None:
    for couple, added in (
        ({"kl": 0.5, "temperature": "2"}, {"loss": "kl", "weight": 0.5, "temperature": "2"}),
        ({"kl": "1:0", "l2": 0.25}, {"loss": "mse_logits", "weight": 0.25}),
    ):
        recipe = pair(place)
        recipe["students"][0]["joint"]["couple"] = couple
        options = Recipe.model_validate(recipe).students[0].joint_options(seed=3)
        local, found = alone_options(options, "local"), alone_options(options, "global")
        assert found == options.students["global"] and local.seed == 3
        *own, last = local.all_phases()[0].terms
        assert own == options.students["local"].all_phases()[0].terms
        assert last.model_dump(exclude_unset=True) == added
    recipe["students"][0]["joint"]["local"]["losses"].append({"loss": "parameter_norm", "weight": 1e-6})
    options = Recipe.model_validate(recipe).students[0].joint_options(seed=3)
    assert alone_options(options, "local").all_phases()[0].terms[-1].loss == "mse_logits"  # a penalty teaches no answer


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hard_twin": True}, "students that train together have no hard twin"),
        ({"compress": [["int8"]]}, "students that train together can't have 'compress'"),
        ({"direct_twin": True}, "can't have 'direct_twin'"),
        ({"hard_epochs": 3}, "no hard twin"),
        ({"joint": {"local": {"student": "transformer"}}}, "joint.local: say what it learns from with 'losses'"),
        (
            {"joint": {"local": {"student": "bilstm", "losses": {"kl": 1}, "epochs": 3}}},
            "joint: .*'epochs' must be one for both: it is 1 for global and 3 for local",
        ),
        (
            {"joint": {"local": {"student": "transformer", "options": {"init_from": "pretrained"}, "losses": LAYERS}}},
            "the recipe has no 'pretrain'",
        ),
    ],
)
def test_a_pair_that_cannot_be_is_told(place: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_recipe(write(tmp_path / "recipe.yaml", pair(place, **changes)))


def test_what_a_pair_lacks_is_told_before_the_teacher(place: Path, tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "recipe.yaml", pair(place) | {"dump": {"capture": ["logits"]}}))
    with pytest.raises(ConfigError, match=r"student 'pair': loss 'hidden_mse' needs hidden\.02"):
        run_recipe(recipe, out=tmp_path / "out", cpu=True)
    assert not (tmp_path / "out" / "teacher").exists()


# ------------------------------------------------------------------------------------------------------------- tasks


def test_the_table_of_several_tasks_has_a_row_each(place: Path) -> None:
    out = place / "tasks"
    result = json.loads((out / "results.json").read_text())
    assert [row["student"] for row in result["rows"]] == ["subject", "length"]
    for row in result["rows"]:
        name = row["student"]
        found = evaluations(out, f"evaluate-{name}-seed0")
        assert row["accuracy_soft"] == found["accuracy"]
        assert row["accuracy_alone"] == evaluations(out, f"evaluate-{name}-alone-seed0")["accuracy"]
        assert row["teacher_accuracy"] == found["fidelity"]["teacher_accuracy"]
        together, alone = (
            read_record(out / "students" / "seed0" / name),
            read_record(out / "students" / f"{name}-alone-seed0"),
        )
        assert together.losses == alone.losses == {"teacher_annealing": 1.0} and together.together["as"] == name
    assert result["cache_rows"] == 80


def test_a_second_run_of_several_tasks_skips_all_and_a_change_only_the_students(place: Path) -> None:
    def again(*changes: str) -> tuple[RunResult, list[str]]:
        said: list[str] = []
        recipe = read_experiment(str(place / "tasks.yaml"), changes=changes)
        assert isinstance(recipe, MultiTaskRecipe)
        return run_tasks(recipe, out=place / "tasks", say=said.append, cpu=True), said

    result, said = again()
    assert said == [] and result.skipped == 2 * 3 + 1 + 2 + 2 * 2
    _, said = again("student.power=1", "alone=false")
    assert said == ["train-seed0 …", "evaluate-subject-seed0 …", "evaluate-length-seed0 …"]
    assert len(recipe_table(result).splitlines()) > 4


def test_tasks_train_from_caches_too(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = [f"--task={name}={place / 'tasks' / f'task-{name}' / 'cache'}" for name in ("subject", "length")]
    common = ["train-multitask", *given, "--cpu", "--json"]
    by_hand = ["--student", "bilstm", "--option", "hidden_size=8", "--epochs", "1", "--power", "0.5", "--loss", "kl"]
    assert _guarded([*common, *by_hand, "--out", str(tmp_path / "a")], debug=True) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["subject", "length"]
    assert read_record(tmp_path / "a" / "length").together == {"as": "length", "with": ["subject"], "power": 0.5}
    by_recipe = ["--recipe", str(place / "tasks.yaml"), "--lr", "1e-4"]
    assert _guarded([*common, *by_recipe, "--out", str(tmp_path / "b")], debug=True) == 0
    assert read_record(tmp_path / "b" / "subject").losses == {"teacher_annealing": 1.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": []}, "tasks"),
        ({"student": {"student": "transformer", "tasks": {"lenth": {}}}}, "student.tasks speaks of 'lenth'.*'length'"),
        ({"student": {"student": "transformer", "options": {"init_from": "teacher"}}}, "can't start from 'teacher'"),
    ],
)
def test_tasks_that_cannot_be_are_told(place: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_experiment(write(tmp_path / "recipe.yaml", tasks(place, **changes)))


def test_teachers_of_two_tokenizers_are_told_before_they_are_tuned(place: Path, tmp_path: Path) -> None:
    recipe = tasks(place)
    recipe["tasks"][1]["teacher"] = teacher(place) | {"model": str(place / "other")}
    found = read_experiment(write(tmp_path / "recipe.yaml", recipe))
    assert isinstance(found, MultiTaskRecipe)
    with pytest.raises(ConfigError, match="teachers of 'subject' and 'length' have different tokenizers"):
        run_tasks(found, out=tmp_path / "out", cpu=True)
    recipe["student"]["options"] = {"init_from": "base"}
    with pytest.raises(ConfigError, match="tuned from several models"):
        read_experiment(write(tmp_path / "recipe.yaml", recipe))


def test_the_one_kind_of_recipe_is_not_the_other(place: Path) -> None:
    with pytest.raises(ConfigError, match="recipe tiny-tasks has several tasks"):
        read_recipe(str(place / "tasks.yaml"))
    out = ["--out", str(place / "none"), "--cpu"]
    assert _guarded(["train-multitask", "--task", "a=b", "--recipe", str(place / "pair.yaml"), *out], debug=False) == 2
    assert _guarded(["train-joint", "cache", "--recipe", "hinton", *out], debug=False) == 2
    assert _guarded(["train-multitask", "--task", "a=b", *out], debug=False) == 2


def test_the_shipped_recipes_are_of_their_kind() -> None:
    joint = read_experiment(str(recipes_folder() / "joint.yaml"))
    several = read_experiment(str(recipes_folder() / "multitask.yaml"))
    assert isinstance(joint, Recipe) and joint.students[0].joint is not None
    assert isinstance(several, MultiTaskRecipe) and [task.name for task in several.tasks] == ["library", "kind"]
    assert issubclass(MultiTaskOptions, StudentOptions) and several.student.power == 0.75


def test_a_run_of_a_pair_evaluates_by_hand_as_in_the_table(place: Path) -> None:
    from softlabels.corpus import read_corpus

    runs = [place / "pair" / "students" / "pair-joint-seed0" / name for name in ("global", "local")]
    corpus = read_corpus(str(place / "subject"), split="test")
    found = evaluate(runs[0], corpus, cache=open_cache(place / "pair" / "cache-test"), others=runs[1:])
    stage = evaluations(place / "pair", "evaluate-pair-joint-seed0-average")
    assert (found.accuracy, list(found.alone.values())) == (stage["accuracy"], list(stage["alone"].values()))
