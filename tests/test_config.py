"""Options and recipes: what is accepted, and that a fault is told with what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from softlabels import config
from softlabels.config import (
    Recipe,
    Schedule,
    StudentOptions,
    build_options,
    parse_losses,
    parse_options,
    parse_temperature,
    read_recipe,
    suggest,
)
from softlabels.errors import ConfigError
from softlabels.losses import LAYER_LOSSES, LOSSES

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
    assert (tuple(LOSSES), tuple(LAYER_LOSSES)) == (config.LOSSES, config.LAYER_LOSSES)


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
    recipes = sorted(config.recipes_folder().glob("*.yaml"))
    assert [path.stem for path in recipes if path.stem == "quickstart"]
    for path in recipes:
        assert isinstance(read_recipe(path.stem), Recipe)


def test_faults_of_options_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        build_options(StudentOptions, {"student": "bilstm", "epochs": 0, "lr": -1}, where="train-student")
    assert "epochs" in str(caught.value) and "lr" in str(caught.value) and str(caught.value).startswith("train-student")


def test_suggest_is_silent_where_nothing_is_near() -> None:
    assert suggest("xyzzy", ["kl", "ce"]) == ""
