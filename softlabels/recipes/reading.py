"""Recipes as they lie in files: found, changed by `--set`, read and checked; and the options that they hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from softlabels.config import (
    JointOptions,
    MultiTaskOptions,
    Strict,
    StudentOptions,
    build_options,
    parse_options,
    read_yaml,
    suggest,
)
from softlabels.errors import ConfigError
from softlabels.recipes.federated import FederatedRecipe
from softlabels.recipes.multitask import MultiTaskRecipe
from softlabels.recipes.parts import plain_options
from softlabels.recipes.recipe import Recipe

Experiment = Recipe | FederatedRecipe | MultiTaskRecipe


def recipes_folder() -> Path:
    """Where the recipes lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "pipeline"
    return inside if inside.is_dir() else package.parent / "pipeline"


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of a recipe that ships with softlabels."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipes_folder() / f"{name}.yaml"
    if re.fullmatch(r"[\w.-]+", name) and shipped.is_file():
        return shipped
    names = sorted(recipe.stem for recipe in recipes_folder().glob("*.yaml"))
    raise ConfigError(f"no recipe '{name}': neither a file nor one of {', '.join(names)}.{suggest(name, names)}")


def read_recipe(name: str, *, changes: Sequence[str] = ()) -> Recipe:
    """The recipe `name` (a YAML file or a shipped name), after `KEY=VALUE` changes (`students.0.lr=1e-3`).

    ConfigError for a federation and for one of several tasks, which are no such recipes.
    """
    found = read_experiment(name, changes=changes)
    if isinstance(found, MultiTaskRecipe):
        raise ConfigError(
            f"recipe {found.name} has several tasks: softlabels run runs it, and train-multitask trains its student"
        )
    if isinstance(found, FederatedRecipe):
        raise ConfigError(f"recipe {found.name} is a federation of parties: softlabels run takes it")
    return found


def read_experiment(name: str, *, changes: Sequence[str] = ()) -> Experiment:
    """A recipe of whatever kind its keys say: `tasks` are several, `parties` are a federation."""
    path = find_recipe(name)
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"recipe {path} is nested too deeply") from None
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    for key, value in parse_options(changes).items():
        set_key(data, key, value)
    kind: type[Strict] = MultiTaskRecipe if "tasks" in data else FederatedRecipe if "parties" in data else Recipe
    return build_options(kind, data, where=f"recipe {path}")


def joint_of_recipe(name: str, student: str | None, *, changes: Sequence[str] = (), seed: int | None) -> JointOptions:
    """The two students of a recipe's entry that has `joint`: the one called `student`, or the only one."""
    recipe = read_recipe(name, changes=changes)
    pairs = {entry.name: entry for entry in recipe.students if entry.joint is not None}
    if not pairs:
        raise ConfigError(f"recipe {recipe.name} has no students that train together: give an entry of it 'joint'")
    if student is None and len(pairs) == 1:
        student = next(iter(pairs))
    if student not in pairs:
        asked = "say which with --student" if student is None else f"'{student}' is not one of them"
        raise ConfigError(f"recipe {recipe.name}: {asked}: students that train together are {', '.join(pairs)}")
    return pairs[student].joint_options(seed=seed)


def tasks_of_recipe(name: str) -> MultiTaskOptions:
    """How a recipe of several tasks trains its student."""
    found = read_experiment(name)
    if not isinstance(found, MultiTaskRecipe):
        raise ConfigError(f"recipe {found.name} is of one task: train-student trains its students")
    return found.student


def student_of_recipe(name: str, student: str | None) -> StudentOptions:
    """How a recipe trains its student called `student`, its only one where None; 'pretrain' is the one before them."""
    recipe = read_recipe(name)
    entries: dict[str, StudentOptions] = {entry.name: entry for entry in recipe.students}
    if recipe.pretrain is not None:
        entries.setdefault("pretrain", recipe.pretrain.student)
    if student is None and len(recipe.students) == 1:
        student = recipe.students[0].name
    if student not in entries:
        asked = "say which of its students with --student" if student is None else f"it has no student '{student}'"
        raise ConfigError(
            f"recipe {recipe.name}: {asked}: there are {', '.join(entries)}.{suggest(student or '', entries)}"
        )
    return plain_options(entries[student], {})


def set_key(data: Any, key: str, value: Any) -> None:
    """Set `a.b.0.c` inside nested dicts and lists; students, phases and losses may be addressed by name."""
    *parents, last = key.split(".")
    for part in parents:
        data = _child(data, part, key)
    if isinstance(data, list):
        data[_position(data, last, key)] = value
    elif isinstance(data, dict):
        data[last] = value
    else:
        raise ConfigError(f"--set {key}: there is nothing below '{parents[-1]}' to set")


def _child(data: Any, part: str, key: str) -> Any:
    if isinstance(data, list):
        return data[_position(data, part, key)]
    if not isinstance(data, dict):
        raise ConfigError(f"--set {key}: '{part}' lies below a single value")
    return data.setdefault(part, {})


def _position(items: list, part: str, key: str) -> int:
    names = [item.get("name", item.get("loss")) if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise ConfigError(
        f"--set {key}: no entry '{part}'; there are {', '.join(str(n) for n in names)} or 0 to {len(items) - 1}"
    )
