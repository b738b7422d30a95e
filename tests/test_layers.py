"""Imports go one way: cli → run → stages → parts → types, errors. Stages never import each other.

And what a plain `softlabels --help` imports stays light.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "softlabels"

# Each module or folder of softlabels/, by place; `run` is a recipe's stages in turn. A new one gets a line.
LAYERS = {
    "cli": ["__main__", "cli", "commands", "tables"],
    "run": ["federated", "run", "running", "compression", "sweep", "sweeping"],  # a sweep trains and scores
    "stage": [
        "augment",
        "plan",
        "dump",
        "fidelity",
        "imports",
        "train",
        "joint",
        "multitask",
        "evaluate",
        "predict",
        "prune",
        "export",
        "report",
    ],
    "part": [
        "augmenters",
        "averages",
        "cache",
        "captures",
        "checkpoint",
        "children",  # processes of this one
        "config",
        "corpora",
        "corpus",
        "docstring_kinds",
        "docstrings",
        "engines",
        "evaluations",  # what is kept of them in a run's folder
        "fine_tuning",
        "foresight",  # of a recipe, before its stages
        "heads",
        "images",
        "labels",
        "lacking",  # what a cache lacks for a recipe
        "layer_maps",
        "language_teacher",
        "losses",
        "objective",
        "once",
        "optimizer",
        "parties",
        "perplexity",
        "phases",
        "pixels",
        "pretrained",
        "progress",
        "projections",
        "pruning",
        "recipes",
        "runs",
        "scoring",
        "scratch",
        "stages",  # what a recipe's run remembers of them
        "students",
        "tasks",
        "teaching_rows",
        "teacher",  # fine-tuned by a command of its own, and a part of dump
        "tokens",
        "training",  # what the trainers share
        "word_vectors",
    ],
    "base": ["errors", "factors", "truncated", "types"],
}
MAY_IMPORT = {
    "cli": {"cli", "run", "stage", "part", "base"},
    "run": {"run", "stage", "part", "base"},
    "stage": {"part", "base"},
    "part": {"part", "base"},
    "base": {"base"},
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

HEAVY = {"torch", "transformers", "datasets", "sklearn", "pandas", "pyarrow", "accelerate", "scipy"}
HEAVY |= {"matplotlib", "jinja2"}


def modules() -> list[str]:
    """The modules and folders of the package that hold code, without the package's own `__init__`."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    return sorted(folders | {path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"})


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Each module of softlabels that `module` imports, in functions and for types too, and where it does."""
    folder = PACKAGE / module
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]
    for file in files:
        package = ("softlabels", *file.relative_to(PACKAGE).parent.parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in imported(node, package):
                    if name != module:
                        yield name, f"softlabels/{file.relative_to(PACKAGE)}:{node.lineno}"


def imported(node: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> Iterator[str]:
    """`softlabels.cache.reader` → `cache`, for each name that is imported by a file of `package`."""
    if isinstance(node, ast.Import):
        paths = [alias.name.split(".") for alias in node.names]
    else:
        start = [*package[: len(package) - node.level + 1]] if node.level else []
        module = start + (node.module.split(".") if node.module else [])
        paths = [[*module, alias.name] for alias in node.names] if module == ["softlabels"] else [module]
    for path in paths:
        if path[0] == "softlabels" and len(path) > 1 and path[1] in LAYER_OF | dict.fromkeys(modules()):
            yield path[1]


def test_every_module_has_a_layer():
    assert sorted(set(modules()) - set(LAYER_OF)) == [], "no line in LAYERS"
    assert sorted(set(LAYER_OF) - set(modules())) == [], "a line in LAYERS for nothing"


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module):
    layer = LAYER_OF[module]
    wrong = [
        f"{place}: {layer} '{module}' imports {LAYER_OF[name]} '{name}'"
        for name, place in imports(module)
        if LAYER_OF[name] not in MAY_IMPORT[layer]
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others():
    graph = {module: {name for name, _ in imports(module)} for module in modules()}
    while leaves := [module for module, names in graph.items() if not names & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}, "these import each other in a circle, or what does"


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("import softlabels.cache.reader", ["softlabels"], ["cache"]),
        ("from softlabels import dump as stage, __version__", ["softlabels"], ["dump"]),
        ("from softlabels.cache.format import read_manifest", ["softlabels"], ["cache"]),
        ("from ..errors import CacheError", ["softlabels", "cache"], ["errors"]),
        ("from .reader import Cache", ["softlabels", "cache"], ["cache"]),
        ("from . import types", ["softlabels"], ["types"]),
        ("import os, torch", ["softlabels"], []),
    ],
)
def test_how_imports_are_read(source, package, found):
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.Import | ast.ImportFrom)
    assert list(imported(node, tuple(package))) == found


@pytest.mark.parametrize(
    "module",
    [
        "softlabels",
        "softlabels.errors",
        "softlabels.config",
        "softlabels.recipes",
        "softlabels.cli",
        "softlabels.tables",
        "softlabels.commands.sweep",
    ],
)
def test_light_imports(module):
    """In a fresh interpreter; `import softlabels` doesn't even bring numpy."""
    heavy = HEAVY | {"numpy"} if module == "softlabels" else HEAVY
    script = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
