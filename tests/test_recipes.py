"""Every shipped recipe, run as it lies but for its corpora and pretrained models, which are small ones made here."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from softlabels.cli import _guarded
from softlabels.recipes import recipes_folder
from tests.models import TEXTS, save_model, tiny_classifier, tiny_tokenizer

RECIPES = sorted(path.stem for path in recipes_folder().glob("*.yaml"))

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora of one text, with labels of their own, and an encoder with MiniLM's layers and heads."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, label_of in (("library", lambda row: row[1]), ("kind", lambda row: ["short", "long"][len(row[0]) > 50])):
        (folder / name).mkdir()
        splits = {"train": TEXTS[:36], "unlabeled": [(text, "") for text, _ in TEXTS[36:50]], "test": TEXTS[50:]}
        for split, rows in splits.items():
            with (folder / name / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                labelled = [(row[0], label_of(row) if row[1] else "") for row in rows]
                csv.writer(file).writerows([("text", "label"), *labelled])
    tokenizer = tiny_tokenizer(max_length=128)
    encoder = tiny_classifier(tokenizer, layers=6, hidden=48, heads=12).bert
    save_model(folder / "base", encoder, tokenizer)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs(place: Path, tmp_path: Path, name: str) -> None:
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    for theirs, ours in (
        ("builtin:docstring-kinds", place / "kind"),
        ("builtin:docstrings", place / "library"),
        ("all-MiniLM-L6-v2", place / "base"),
    ):
        text = text.replace(theirs, str(ours))
    assert "builtin:" not in text
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(text, encoding="utf-8")
    assert _guarded(["run", str(file), "--out", str(out), "--cpu"], debug=True) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows
    for row in rows:
        scores = [value for key, value in row.items() if key.startswith("accuracy") and value is not None]
        assert scores and all(0 <= value <= 1 for value in scores), row
