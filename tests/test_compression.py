"""Students distilled, pruned, distilled again and quantised: every chain is a row, and nothing is made twice."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from softlabels.config import build_options
from softlabels.errors import ConfigError, StudentError
from softlabels.recipes import Recipe
from softlabels.run import RunResult, run_recipe
from softlabels.runs import load_run, read_record
from softlabels.tables import recipe_table
from tests.models import TEXTS, save_teacher

HALF = {"prune": {"magnitude": 0.5}}
AGAIN = {"retrain": {"epochs": 1, "lr": 1e-3}}
BILSTM: dict[str, Any] = {
    "name": "small",
    "student": "bilstm",
    "options": {"embedding_dim": 8, "hidden_size": 8, "fc_size": 8},
    "losses": {"kl": 1},
    "epochs": 1,
    "hard_twin": False,
    "seeds": [0, 1],
    "compress": [["int8"], [HALF], [HALF, AGAIN, "int8"]],
}
BERT: dict[str, Any] = {
    "name": "first",  # pruned, then distilled
    "student": "transformer",
    "options": {"init_from": "teacher", "layers": 2},
    "prune": {"heads": 0.5},
    "losses": {"kl": 1},
    "phases": [],
    "epochs": 1,
    "hard_twin": False,
    "compress": [["onnx"], ["retrain"]],
}


def recipe_of(place: Path, *students: dict[str, Any]) -> Recipe:
    corpus = {"source": str(place / "corpus"), "train": "train", "test": "test"}
    data = {"name": "tiny", "corpus": corpus, "teacher": {"model": str(place / "teacher")}, "students": list(students)}
    return build_options(Recipe, data, where="recipe")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compression")
    (folder / "corpus").mkdir()
    for name, rows in (("train", TEXTS[:45]), ("test", TEXTS[45:])):
        with (folder / "corpus" / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    save_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> RunResult:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_recipe(recipe_of(place, BILSTM, BERT), out=place / "out", cpu=True)
    finally:
        torch.set_num_threads(threads)


def test_every_chain_is_a_row(place: Path, done: RunResult) -> None:
    assert [(row.student, row.steps) for row in done.compressed] == [
        ("small", "distil"),
        ("small", "distil, int8"),
        ("small", "distil, prune magnitude 0.5"),
        ("small", "distil, prune magnitude 0.5, retrain, int8"),
        ("first", "distil"),
        ("first", "distil, onnx"),
        ("first", "distil, retrain"),
    ]
    plain, int8, pruned, both, first, onnx, retrained = done.compressed
    assert plain.accuracy == done.rows[0].accuracy_soft and plain.bytes == done.rows[0].bytes
    exported = [load_run(place / "out" / "students" / f"small-soft-seed{seed}+int8") for seed in (0, 1)]
    assert int8.bytes == round(sum(run.size_on_disk for run in exported) / 2)
    assert int8.nonzero == plain.nonzero and plain.times_faster == 1.0
    assert both.nonzero <= pruned.nonzero == pytest.approx(plain.nonzero / 2, rel=0.1)
    assert both.seconds > pruned.seconds and plain.seconds == 0.0
    assert onnx.parameters < first.parameters == retrained.parameters  # its heads left the graph
    table = recipe_table(done)
    assert "distil, prune magnitude 0.5, retrain, int8" in table and "times" not in table.split("Faster")[1]
    assert json.loads((place / "out" / "results.json").read_text())["compressed"][1]["steps"] == "distil, int8"


def test_the_runs_are_what_the_rows_say(place: Path, done: RunResult) -> None:
    students = place / "out" / "students"
    prefix = "small-soft-seed1+prune-magnitude-0.5"
    pruned, again = load_run(students / prefix), load_run(students / f"{prefix}+retrain")
    assert again.record.pruned == pruned.record.pruned and again.record.epochs_run == 1
    assert again.record.options == pruned.record.options == BILSTM["options"]
    exported = read_record(students / f"{prefix}+retrain+int8").exported
    assert exported is not None and exported.from_files == again.record.files
    first = read_record(students / "first-soft-seed0").pruned
    assert first is not None and len(first.heads) == 4
    assert read_record(students / "first-soft-seed0+retrain").pruned == first


def test_nothing_is_made_twice(place: Path, done: RunResult) -> None:
    said: list[str] = []
    run_recipe(recipe_of(place, BILSTM, BERT), out=place / "out", say=said.append, cpu=True)
    assert said == []
    more = BILSTM | {"compress": [*BILSTM["compress"], [HALF, "onnx"]]}
    run_recipe(recipe_of(place, more, BERT), out=place / "out", say=said.append, cpu=True)
    new = "small-soft-seed{}+prune-magnitude-0.5+onnx"
    assert said == [f"{verb}{new.format(seed)} …" for seed in (0, 1) for verb in ("", "evaluate-")]


@pytest.mark.parametrize(
    ("compress", "told"),
    [
        ([["int8", HALF]], "nothing can follow onnx or int8 in the steps 'int8, prune magnitude 0.5'"),
        ([["int8"], ["int8"]], "the steps 'int8' are given twice"),
        ([["int4"]], "compress"),
        ([[{"prune": {"magnitude": 0.5}, "export": "int8"}]], "a step is one of"),
        ([[{"prune": {"magnitude": 1}}]], "would prune the student to nothing"),
        ([[{"prune": {"heads": 0.5}}]], "is a bilstm, which has no attention heads: prune a magnitude instead"),
        ([[]], "at least 1 item"),
    ],
)
def test_chains_that_cannot_be(place: Path, compress: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipe_of(place, BILSTM | {"compress": compress})


def test_linear_has_nothing_to_compress(place: Path) -> None:
    with pytest.raises(ConfigError, match="no network to compress"):
        recipe_of(place, BILSTM | {"student": "linear", "losses": {"mse_logits": 1}, "options": {}})


def test_a_missing_extra_is_told_before_anything_is_trained(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(StudentError, match=r"pip install 'softlabels\[export\]'"):
        run_recipe(recipe_of(place, BILSTM), out=tmp_path / "out", cpu=True)
    assert not (tmp_path / "out" / "cache").exists()
