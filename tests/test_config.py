"""Options and recipes: what is accepted, and that a fault is told with what to do instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from softlabels.config import (
    Schedule,
    StudentOptions,
    build_options,
    losses,
    parse_losses,
    parse_options,
    parse_temperature,
    suggest,
)
from softlabels.errors import ConfigError
from softlabels.layer_maps import GROUP_MAPS, MAPS
from softlabels.losses import LAYER_LOSSES, LOSSES, PENALTIES
from softlabels.recipes import FederatedRecipe, MultiTaskRecipe, Recipe, read_experiment, read_recipe, recipes_folder

RECIPE = """
name: small
corpus: {source: texts.csv, test_source: test.csv}
teacher: {model: somewhere, train: {lr: 1e-4}}
students:
  - {name: first, student: bilstm, losses: {kl: 0.7, ce: 0.3}, temperature: "5:1", options: {dropout: 1e-1}}
  - {name: second, student: linear, losses: {mse_logits: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def test_the_list_of_losses_is_the_one_of_the_losses() -> None:
    assert (tuple(LOSSES), tuple(LAYER_LOSSES)) == (losses.LOSSES, losses.LAYER_LOSSES)
    assert tuple(PENALTIES) == losses.PENALTIES
    assert (tuple(MAPS), tuple(GROUP_MAPS)) == (losses.MAPS, losses.GROUP_MAPS)


@pytest.mark.parametrize(
    ("text", "progress", "value"),
    [
        ("3", 0.0, 3.0),
        ("3", 1.0, 3.0),
        ("5:1", 0.0, 5.0),
        ("5:1", 0.5, 3.0),
        ("5:1", 1.0, 1.0),
        ("5:1:cosine", 0.25, 5 - 4 * (1 - 0.5**0.5) / 2),
        ("5:1:cosine", 0.5, 3.0),
        ("5:1:step", 0.49, 5.0),
        ("5:1:step", 0.5, 1.0),
        ("0.5", 7.0, 0.5),
    ],
)
def test_temperature_follows_its_schedule(text: str, progress: float, value: float) -> None:
    schedule = parse_temperature(text)
    assert isinstance(schedule, Schedule) and schedule.at(progress) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "hot", "5:", "5:1:cosin", "5:1:linear:2", ""])
def test_a_temperature_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        parse_temperature(text)


def test_a_misspelt_shape_is_corrected() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        parse_temperature("5:1:cosin")


def test_losses_and_their_faults() -> None:
    assert parse_losses(["kl=0.7", "ce=0.3"]) == {"kl": 0.7, "ce": 0.3}
    assert parse_losses(["ce"]) == {"ce": 1.0}
    for wrong, told in [
        (["kl=much"], "not a number"),
        (["kl=0"], "above 0"),
        (["kl=-1"], "above 0"),
        (["kl=nan"], "above 0"),
        (["kl", "kl=2"], "twice"),
        (["mse_logit=1"], "Did you mean 'mse_logits'"),
        ([], "no loss"),
    ]:
        with pytest.raises(ConfigError, match=told):
            parse_losses(wrong)


def test_options_are_read_as_yaml_and_1e4_is_a_number() -> None:
    got = parse_options(["layers=2", "lr=1e-4", "name=x", "deep=true", "init_layers=[1, 3]", "empty="])
    assert got == {"layers": 2, "lr": 1e-4, "name": "x", "deep": True, "init_layers": [1, 3], "empty": None}
    words = {"a": "5:1", "b": "2020-13-45", "c": "1_000", "d": "0x10", "e": "007"}  # what YAML 1.1 takes for numbers
    assert parse_options([f"{key}={value}" for key, value in words.items()]) == words
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_options(["layers"])
    with pytest.raises(ConfigError, match="twice"):
        parse_options(["a=1", "a=2"])


def test_a_recipe_is_read_and_changed(recipe: Path) -> None:
    plain = read_recipe(str(recipe))
    assert plain.teacher.train is not None and plain.teacher.train.lr == 1e-4
    assert plain.students[0].options == {"dropout": 0.1}
    changed = read_recipe(
        str(recipe),
        changes=["students.second.seeds=[1,2]", "students.0.lr=3e-4", "dump.max_length=32", "teacher.train.epochs=1"],
    )
    assert changed.students[1].seeds == [1, 2] and changed.students[0].lr == 3e-4
    assert changed.dump.max_length == 32 and changed.teacher.train is not None and changed.teacher.train.epochs == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("students.third.lr=1", "no entry 'third'"),
        ("students.0.learning_rate=1", "unknown key 'learning_rate'"),
        ("students.0.epoch=1", "Did you mean 'epochs'"),
        ("name.x=1", "single value|nothing below"),
        ("students.0.losses={klm: 1}", "Did you mean 'kl'"),
        ("students.0.temperature=0", "above 0"),
        ("students.1.name=first", "two students"),
        ("students.0.name=../escape", "name"),
        ("students=[]", "students"),
    ],
)
def test_a_change_that_cannot_be_is_refused(recipe: Path, change: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_recipe(str(recipe), changes=[change])


def test_a_schedule_needs_no_quotes(recipe: Path) -> None:
    """YAML 1.1 reads 5:1 as 301, in base 60."""
    recipe.write_text(RECIPE.replace('"5:1"', "5:1"))
    assert read_recipe(str(recipe)).students[0].temperature == "5:1"
    changed = read_recipe(str(recipe), changes=["students.first.temperature=7:1"])
    assert changed.students[0].temperature == "7:1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1: 2\n", "unknown key '1'"),
        ("name: &a [*a]\n", "name: Input should be a valid string"),
        ("students: &a [*a]\n", "students"),
        (f"name: {'[' * 500}", "nested too deeply"),
        ("name: 2020-13-45\n", "corpus: Field required"),
    ],
)
def test_yaml_that_is_no_recipe_is_told(tmp_path: Path, text: str, told: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)) as fault:
        read_recipe(str(bad))
    assert str(bad) in str(fault.value)


STARTED = "{student: transformer, options: {init_from: pretrained}}"
PRETRAIN = f"pretrain={{corpus: {{source: a}}, teacher: {{model: b}}, student: {STARTED}}}"
TERM = {"loss": "hidden_mse", "map": "uniform"}


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([TERM | {"map": 5}], "losses.0.map: a map is one of uniform, .* not 5"),
        ([TERM | {"map": "uniforn"}], "losses.0.map: no map 'uniforn'.* Did you mean 'uniform'"),
        ([TERM | {"depth": []}], "losses.0.depth: depth is sum, mean, or a weight for each pair"),
        ([TERM | {"depth": [1, -1]}], "none below 0"),
        ([TERM | {"weight": "a:b"}], "weight 'a:b' is not a number: write a number"),
        ([TERM | {"options": [1]}], "losses.0.options: Input should be a valid dictionary"),
        ([TERM | {"share_projection": True}], "'share_projection' is about a projection: give 'project'"),
        ([TERM | {"project_lr": 2}], "'project_lr' is about a projection"),
        ([{"loss": "kl", "weight": "1:0"}], "every weight ends at 0"),
        ({"kl": "much"}, "losses.kl: Input should be a valid number"),
        ("kl", "losses: Input should be a valid dictionary"),
    ],
)
def test_a_fault_in_the_losses_is_told_once_and_in_its_place(losses: Any, told: str) -> None:
    values = {"student": "transformer", "phases": [{"name": "a", "losses": losses}]}
    with pytest.raises(ConfigError, match=f"^recipe r: .*{told}") as fault:
        build_options(StudentOptions, values, where="recipe r")
    assert "dict[" not in str(fault.value) and "list[" not in str(fault.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"slow": {"embeddings": -1}}, "slow.embeddings: Input should be greater than 0"),
        ({"progressive": -0.5}, "a multiple of the learning rate under 1; not -0.5"),
        ({"progressive": 2}, "under 1; not 2"),
    ],
)
def test_rates_that_cannot_be_are_told(changes: dict[str, Any], told: str) -> None:
    values = {"student": "transformer", "phases": [{"losses": [TERM]} | changes]}
    with pytest.raises(ConfigError, match=told):
        build_options(StudentOptions, values, where="recipe r")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([PRETRAIN], "which is itself"),
        (["students.first.options={init_from: base}", "teacher.train.from_scratch=true"], "made from nothing"),
        (["students.first.options={init_from: teacher}", "teacher.train.from_scratch=true"], "hard_twin: false"),
        (["students.first.seeds=[-1]"], "seeds.0"),
        (["students.²=1"], "no entry '²'"),
    ],
)
def test_starts_and_seeds_that_cannot_be_are_told(recipe: Path, changes: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_recipe(str(recipe), changes=changes)


def test_faults_of_a_recipe_file_name_the_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_recipe(str(bad))
    bad.write_text("- a list")
    with pytest.raises(ConfigError, match="must be a mapping"):
        read_recipe(str(bad))
    bad.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_recipe(str(bad))
    with pytest.raises(ConfigError, match="Did you mean 'quickstart'"):
        read_recipe("quikstart")


def test_every_shipped_recipe_is_valid() -> None:
    recipes = sorted(recipes_folder().glob("*.yaml"))
    assert [path.stem for path in recipes if path.stem == "quickstart"]
    for path in recipes:
        assert isinstance(read_experiment(path.stem), Recipe | FederatedRecipe | MultiTaskRecipe)


def test_faults_of_options_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        build_options(StudentOptions, {"student": "bilstm", "epochs": 0, "lr": -1}, where="train-student")
    assert "epochs" in str(caught.value) and "lr" in str(caught.value) and str(caught.value).startswith("train-student")


def test_suggest_is_silent_where_nothing_is_near() -> None:
    assert suggest("xyzzy", ["kl", "ce"]) == ""
