"""Assistants between a teacher and its students: each hop a training from a cache and a dump."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from softlabels.cache import open_cache
from softlabels.errors import ConfigError, SoftlabelsError
from softlabels.foresight import check_recipe, shape_assistant
from softlabels.recipes import Recipe, read_recipe
from softlabels.run import run_recipe
from softlabels.runs import read_record
from tests.models import TEXTS, save_model, tiny_classifier, tiny_tokenizer

STUDENT: dict[str, Any] = {
    "name": "small",
    "student": "transformer",
    "options": {"layers": 1, "hidden_size": 8, "heads": 2, "intermediate_size": 16},
    "losses": {"kl": 1},
    "epochs": 1,
    "batch_size": 16,
}
HEADS = [{"loss": "attention_kl", "map": "final"}, {"loss": "kl"}]
WIDTH = [{"loss": "hidden_mse", "map": "final"}, {"loss": "kl"}]
WIDE = {"name": "middle", "options": {"hidden_size": 16, "heads": 2}, "losses": {"kl": 1}}
ALL = {"capture": ["logits", "hidden:all", "qkv:all"]}

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with splits and a model to fine-tune."""
    folder = tmp_path_factory.mktemp("assistants")
    (folder / "corpus").mkdir()
    for split, rows in (("train", TEXTS[:30]), ("test", TEXTS[45:])):
        with (folder / "corpus" / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    tokenizer = tiny_tokenizer()
    save_model(folder / "base", tiny_classifier(tokenizer).bert, tokenizer)
    return folder


def recipe_of(place: Path, **changes: Any) -> Recipe:
    recipe: dict[str, Any] = {
        "name": "tiny",
        "corpus": {"source": str(place / "corpus"), "train": "train", "test": "test"},
        "teacher": {"model": str(place / "base"), "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}},
        "assistants": [{"name": "middle", "losses": {"kl": 1}, "epochs": 1, "batch_size": 16}],
        "students": [STUDENT | {"direct_twin": True}],
    }
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return read_recipe(str(path))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_each_hop_learns_from_the_one_before(place: Path, tmp_path: Path) -> None:
    second = {"name": "last", "options": {"layers": 1, "hidden_size": 8, "heads": 2}, "losses": {"kl": 1}, "epochs": 1}
    hops = [{"name": "middle", "losses": {"kl": 1}, "epochs": 1}, second]
    starting = STUDENT | {"name": "started", "options": {"init_from": "assistant", "layers": 1}, "hard_twin": False}
    recipe = recipe_of(place, assistants=hops, students=[STUDENT | {"direct_twin": True}, starting])
    said: list[str] = []
    result = run_recipe(recipe, out=tmp_path / "run", say=said.append, cpu=True)
    out = tmp_path / "run"
    teacher, middle, last = (
        open_cache(folder)
        for folder in (out / "cache", *(out / "assistants" / n / "cache" for n in ("middle", "last")))
    )
    shape = config_of(out / "assistants" / "middle" / "student")
    teacher_config = config_of(out / "teacher")
    assert shape["num_hidden_layers"] == teacher_config["num_hidden_layers"] > 1
    assert (shape["hidden_size"], shape["num_attention_heads"], shape["intermediate_size"]) == (8, 2, 16)
    assert middle.ids == teacher.ids and (middle.token_hashes == teacher.token_hashes).all()
    assert middle.manifest.teacher.name.endswith("middle/student")

    def learned_from(run: Path) -> str:
        return read_record(run).cache["identity"]

    assert learned_from(out / "assistants" / "middle" / "student") == teacher.identity()
    assert learned_from(out / "assistants" / "last" / "student") == middle.identity()
    assert learned_from(out / "students" / "small-soft-seed0") == last.identity()
    assert learned_from(out / "students" / "small-hard-seed0") == last.identity()  # its labels are the corpus's
    assert learned_from(out / "students" / "small-direct-seed0") == teacher.identity()
    assert read_record(out / "students" / "started-soft-seed0").options["init_from"].endswith("last/student")
    rows = [row.student for row in result.rows]
    assert rows == ["assistant middle", "assistant last", "small", "small, from the teacher", "started"]
    assert result.teacher_seconds > sum(row.train_seconds for row in result.rows[:2])
    assert "assistant-middle …" in said and "assistants-middle-cache …" in said

    changed = [STUDENT | {"direct_twin": True, "epochs": 2}, starting]
    said.clear()
    run_recipe(recipe_of(place, assistants=hops, students=changed), out=out, say=said.append, cpu=True)
    assert {line.split("-")[1] for line in said} == {"small"}  # nothing above it again


def test_an_assistant_is_as_wide_as_a_student_that_starts_from_a_model() -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    teacher = {"model_type": "bert", "num_hidden_layers": 6, **sizes}
    wide = {"model_type": "bert", "hidden_size": 48, "heads": 4, "intermediate_size": 96, "layers": 6}
    plain = {key: STUDENT[key] for key in ("student", "options", "losses")}
    general = {"corpus": {"source": "b.csv"}, "teacher": {"model": "m"}, "student": plain}
    for start, shape in (
        ({"init_from": "base", "layers": 3}, wide),
        ({"init_from": "teacher", "init_layers": [1, 6]}, wide),
        ({"init_from": "pretrained", "layers": 2}, STUDENT["options"] | {"layers": 6}),
    ):
        recipe = Recipe.model_validate(
            {
                "name": "shapes",
                "corpus": {"source": "a.csv"},
                "teacher": {"model": "m"},
                "pretrain": general,
                "assistants": [{"name": "a"}],
                "students": [STUDENT | {"options": start}],
            }
        )
        assert shape_assistant(recipe.assistants[0], recipe, teacher) == shape


def test_an_assistant_in_the_shape_of_its_teacher_equals_it_in_depth_alone() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "shapes",
            "corpus": {"source": "a.csv"},
            "teacher": {"model": "m"},
            "assistants": [{"name": "a"}, {"name": "b", "options": {"layers": 3}}, {"name": "c"}],
            "students": [
                {"name": "r", "student": "bilstm"},
                STUDENT | {"options": {"preset": "tinybert-4", "layers": 2}},
            ],
        }
    )
    teacher = {"num_hidden_layers": 12}
    one, two, three = recipe.assistants
    assert shape_assistant(one, recipe, teacher) == {"preset": "tinybert-4", "layers": 12}
    assert shape_assistant(two, recipe, teacher) == {"preset": "tinybert-4", "layers": 3}
    own = three.model_copy(update={"options": {"hidden_size": 32}})
    assert shape_assistant(own, recipe, {"n_layer": 5}) == {"layers": 5, "hidden_size": 32}
    with pytest.raises(ConfigError, match="give option layers"):
        shape_assistant(one, recipe, {})
    started = recipe.model_copy(update={"students": [recipe.students[0]]})
    with pytest.raises(ConfigError, match="no student says how wide that is"):
        shape_assistant(one, started, teacher)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"assistants": [{"name": "a", "student": "bilstm"}]}, "must be a transformer; not bilstm"),
        ({"assistants": []}, "direct_twin, and the recipe has no 'assistants'"),
        ({"assistants": [], "students": [STUDENT | {"options": {"init_from": "assistant"}}]}, "init_from: assistant"),
        ({"assistants": [{"name": "a"}, {"name": "a"}]}, "two models are called 'a'"),
        ({"assistants": [{"name": "small"}]}, "two models are called 'small'"),
        ({"assistants": [{"name": "a", "options": {"init_from": "assistant"}}]}, "there is none before it"),
        (
            {"students": [STUDENT | {"options": {"init_from": "assistant"}, "direct_twin": True}]},
            "so it has no direct_twin",
        ),
    ],
)
def test_what_no_recipe_may_ask(place: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=fault):
        recipe_of(place, **changes)


def test_an_assistant_that_does_not_fit_is_told_before_the_teacher_is_trained(place: Path, tmp_path: Path) -> None:
    layers = [{"loss": "value_relation", "map": "final"}]
    cases: list[tuple[dict[str, Any], str]] = [
        # the assistant's cache lacks what the student asks for
        ({"students": [STUDENT | {"losses": layers}], "dump": {"capture": ["logits"]}}, "student 'small'.*value"),
        (
            {
                "students": [STUDENT | {"losses": layers}],
                "dump": {"capture": ["logits", "qkv:all"]},
                "assistants": [{"name": "middle", "losses": {"kl": 1}, "dump": {"capture": ["logits"]}}],
            },
            "student 'small'.*value",
        ),
        # the assistant asks for what the teacher's cache lacks
        ({"assistants": [{"name": "middle", "losses": layers}]}, "assistant 'middle'.*value"),
        # a student with no width to give it
        ({"students": [STUDENT | {"student": "bilstm", "options": {}}]}, "assistant 'middle'.*how wide"),
        # losses that compare heads, or values, of which the models have other numbers
        (
            {"assistants": [{"name": "middle", "losses": HEADS}], "dump": ALL},
            "assistant 'middle'.*'attention_kl' needs",
        ),
        (
            {"students": [STUDENT | {"losses": WIDTH}], "assistants": [WIDE], "dump": ALL},
            "student 'small'.*project: lin",
        ),
        # its width is no multiple of its heads
        ({"assistants": [{"name": "middle", "options": {"heads": 3}}]}, "assistant 'middle'.*3 heads"),
    ]
    for changes, fault in cases:
        recipe = recipe_of(place, **changes)
        with pytest.raises(SoftlabelsError, match=fault):
            check_recipe(recipe)
        with pytest.raises(SoftlabelsError, match=fault):
            run_recipe(recipe, out=tmp_path / "run", cpu=True)
        assert not (tmp_path / "run" / "teacher").exists()


def test_the_shipped_recipe_follows_the_rule() -> None:
    recipe = read_recipe("assistant")
    (assistant,) = recipe.assistants
    options = recipe.students[0].options
    assert shape_assistant(assistant, recipe, {"num_hidden_layers": 6}) == options | {"layers": 6}
    check_recipe(recipe)
