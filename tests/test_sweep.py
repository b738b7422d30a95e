"""A sweep: each trial is what the same training gives by itself; it goes on after a stop; what fails is alone in it."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from softlabels.cache import open_cache
from softlabels.config import CombineOptions, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError, CorpusError, StudentError
from softlabels.evaluate import evaluate
from softlabels.runs import load_run
from softlabels.sweep import SweepResult, sweep
from softlabels.sweeping import training
from softlabels.sweeping.optuna_search import OptunaSearch
from softlabels.sweeping.outcomes import Ledger
from softlabels.sweeping.pool import run_here, run_in_processes
from softlabels.sweeping.space import Axis, Changes, Choice, Range, SweepOptions
from softlabels.train import train_student
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

SMALL = {"embedding_dim": 16, "hidden_size": 12, "fc_size": 10}
FIXED: dict[str, Any] = {"student": "bilstm", "options": SMALL, "epochs": 1, "lr": 5e-3, "batch_size": 16}
PKD = [{"losses": [{"loss": "pkd", "map": [[1, 1]]}]}]
AXES: dict[str, Any] = {"temperature": [1, 2, 4]}

pytestmark = pytest.mark.usefixtures("quick")


def rows(chosen: range) -> list[Example]:
    return [Example(str(i), TEXTS[i][0], None, TEXTS[i][1]) for i in chosen]


DEV = Corpus("dev", None, rows(range(0, len(TEXTS), 3)), list(LABEL_NAMES))
TEST = Corpus("test", None, rows(range(1, len(TEXTS), 3)), list(LABEL_NAMES))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    teacher = save_teacher(folder / "teacher")
    state = {name: value * 4 for name, value in load_file(teacher / "model.safetensors").items()}
    save_file(state, teacher / "model.safetensors", metadata={"format": "pt"})  # else it says the same of every text
    corpus = Corpus("made", None, rows(range(len(TEXTS))), list(LABEL_NAMES))
    dump(corpus, teacher=str(teacher), out=folder / "cache")
    return folder / "cache"


def swept(cache: Path, out: Path, **changes: Any) -> SweepResult:
    given: dict[str, Any] = {"axes": AXES, "fixed": FIXED, "validation": DEV, "cpu": True, "runner": run_here}
    options = SweepOptions(**changes.pop("options", {}))
    return sweep([cache], out=out, options=options, **(given | changes))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def table(result: SweepResult) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(result.results).to_pylist()


def test_each_trial_is_what_a_training_by_itself_gives(cache: Path, tmp_path: Path) -> None:
    """Bit for bit, with word vectors that all trials share; and its figures are those of `evaluate`."""
    vectors = FIXED | {"options": SMALL | {"word_vectors": "fit"}}
    axes = {"temperature": [1, 4], "losses.kl": [0.3, 0.7]}
    result = swept(cache, tmp_path / "sweep", axes=axes, fixed=vectors, test=TEST)
    assert len(result.trials) == 4 and not result.failed
    for temperature, kl, seed in ((4, 0.3, 0), (1, 0.7, 0)):
        name = f"temperature-{temperature}_kl-{kl}_seed-{seed}"
        alone = StudentOptions(**vectors, temperature=str(temperature), losses={"kl": kl, "ce": 0.3}, seed=seed)
        train_student(open_cache(cache), out=tmp_path / name, options=alone, validation=DEV, cpu=True)
        assert same(tmp_path / name, tmp_path / "sweep" / "trials" / name)
        row = next(row for row in table(result) if row["trial"] == name)
        assert (row["temperature"], row["losses.kl"], row["seed"], row["status"]) == (temperature, kl, seed, "done")
        for corpus, prefix in ((DEV, ""), (TEST, "test_")):
            found = evaluate(tmp_path / name, corpus)
            assert (row[f"{prefix}accuracy"], row[f"{prefix}macro_f1"]) == (found.accuracy, found.macro_f1)


def test_points_are_sorted_by_their_mean_over_seeds(cache: Path, tmp_path: Path) -> None:
    result = swept(cache, tmp_path / "sweep", options={"seeds": [0, 1], "metric": "macro_f1"})
    assert result.metric == "macro_f1" and [group.trials for group in result.groups] == [2] * 3
    for group in result.groups:
        own = [row["macro_f1"] for row in table(result) if row["point"] == group.point]
        assert group.value == statistics.mean(own) and group.spread["macro_f1"] == statistics.stdev(own)
    values = [group.value for group in result.groups if group.value is not None]
    assert values == sorted(values, reverse=True) and len(values) == 3


def test_a_trial_that_fails_is_a_row_with_its_error(cache: Path, tmp_path: Path) -> None:
    """One student has no such option, and one diverges; the others are trained."""
    said: list[str] = []
    axes = {"student": ["bilstm", "transformer"], "lr": [5e-3, 1e30]}
    fixed = {key: value for key, value in FIXED.items() if key not in ("student", "lr")}
    fixed |= {"losses": {"mse_logits": 1}, "clip": 1e30, "warmup": 0.0, "epochs": 3}
    result = swept(cache, tmp_path / "sweep", axes=axes, fixed=fixed, say=said.append)
    found = {row["trial"]: row for row in table(result)}
    assert [name for name, row in found.items() if row["status"] == "done"] == ["bilstm_lr-0.005_seed-0"]
    assert "smaller --lr" in found["bilstm_lr-1e+30_seed-0"]["error"]
    assert "embedding_dim" in found["transformer_lr-0.005_seed-0"]["error"] and len(said) == 3
    assert result.groups[0].point == "bilstm_lr-0.005" and result.groups[-1].value is None
    with pytest.raises(ConfigError, match=r"all 2 trials failed; the first of them: .*smaller --lr"):
        swept(cache, tmp_path / "none", axes={"lr": [1e30, 2e30]}, fixed=fixed | {"student": "bilstm"})


def test_a_stopped_sweep_goes_on_to_the_same_results(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the midst of the last trial: two rows are there; then only what is left is trained."""
    whole = swept(cache, tmp_path / "whole")
    real, calls = training.train_student, []

    def stops(*arguments: Any, **named: Any) -> Any:
        calls.append(named["out"].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(training, "train_student", stops)
    with pytest.raises(KeyboardInterrupt):
        swept(cache, tmp_path / "cut")
    assert pyarrow.parquet.read_table(tmp_path / "cut" / "results.parquet").num_rows == 2
    result = swept(cache, tmp_path / "cut")
    assert result.skipped == 2 and len(calls) == 4 and len(set(calls)) == 3
    assert [group.value for group in result.groups] == [group.value for group in whole.groups]
    assert all(same(tmp_path / "whole" / str(o.run), tmp_path / "cut" / str(o.run)) for o in result.trials)
    (tmp_path / "cut" / "outcomes" / f"{calls[0]}.json").unlink()  # killed between a run and its outcome
    assert swept(cache, tmp_path / "cut").skipped == 2 and len(calls) == 4


def test_stopped_again_it_keeps_the_rows_of_trials_whose_turn_has_not_come(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = swept(cache, tmp_path / "sweep").trials
    spoiled = replace(first, status="failed", error="diverged", figures={}, run=None)
    Ledger(tmp_path / "sweep").write(spoiled)

    def stops(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    shutil.rmtree(tmp_path / "sweep" / str(first.run))
    monkeypatch.setattr(training, "train_student", stops)
    with pytest.raises(KeyboardInterrupt):
        swept(cache, tmp_path / "sweep")
    found = pyarrow.parquet.read_table(tmp_path / "sweep" / "results.parquet").to_pylist()
    assert [(row["trial"], row["error"], row.get("accuracy")) for row in found] == [
        (first.trial, "diverged", None),
        *((other.trial, None, other.figures["accuracy"]) for other in others),
    ]


def test_a_recipe_that_says_something_else_now_is_another_sweep(cache: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    student = {"name": "small", **FIXED, "losses": {"kl": 1}}
    data = {
        "name": "made",
        "corpus": {"source": "builtin:docstrings", "train": "train", "test": "test"},
        "teacher": {"model": "none"},
        "dump": {"capture": ["logits"]},
        "students": [student],
    }
    recipe.write_text(json.dumps(data))
    given: dict[str, Any] = {"axes": {"temperature": [1, 4]}, "fixed": {}, "recipe": str(recipe)}
    swept(cache, tmp_path / "sweep", **given)
    assert swept(cache, tmp_path / "sweep", **given).skipped == 2
    recipe.write_text(json.dumps(data | {"students": [student | {"epochs": 3}]}))
    with pytest.raises(ConfigError, match="another sweep: epochs was 1 and is now 3"):
        swept(cache, tmp_path / "sweep", **given)


def test_another_sweep_is_refused_with_what_differs(cache: Path, tmp_path: Path) -> None:
    swept(cache, tmp_path / "sweep", axes={"temperature": [1, 4]})
    with pytest.raises(ConfigError, match=r"another sweep: temperature was \[1, 4\] and is now \[1, 2\]"):
        swept(cache, tmp_path / "sweep", axes={"temperature": [1, 2]})
    with pytest.raises(ConfigError, match="epochs was 1 and is now 3"):
        swept(cache, tmp_path / "sweep", axes={"temperature": [1, 4]}, fixed=FIXED | {"epochs": 3})
    with pytest.raises(ConfigError, match="test was null and is now"):
        swept(cache, tmp_path / "sweep", axes={"temperature": [1, 4]}, test=TEST)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"not empty and no sweep \(it holds thesis.txt\)"):
        swept(cache, tmp_path / "mine")


def test_random_points_may_become_more(cache: Path, tmp_path: Path) -> None:
    fixed = {key: value for key, value in FIXED.items() if key != "lr"}
    given: dict[str, Any] = {"axes": {"lr": Range("lr", 1e-4, 1e-2, log=True)}, "fixed": fixed}
    few = swept(cache, tmp_path / "sweep", options={"search": "random", "points": 2}, **given)
    more = swept(cache, tmp_path / "sweep", options={"search": "random", "points": 3}, **given)
    assert more.skipped == 2 and more.trials[:2] == few.trials and len(more.trials) == 3


def test_without_a_validation_corpus_rows_are_held_out(cache: Path, tmp_path: Path) -> None:
    result = swept(cache, tmp_path / "sweep", validation=None, fixed=FIXED | {"validation": 0.3})
    assert result.metric == "agreement" and all(0 <= row["agreement"] <= 1 for row in table(result))
    held_out = open_cache(cache).texts()
    row = table(result)[0]
    run = load_run(tmp_path / "sweep" / row["run"])
    split = training.find_stretches(
        open_cache(cache),
        StudentOptions(**FIXED, validation=0.3),
        training.student_spec(open_cache(cache), StudentOptions(**FIXED)),
        validation=None,
    )[0].split
    said = run.logits([Example(str(i), held_out[i][0]) for i in split.held_out]).argmax(1)
    teacher = open_cache(cache).column("logits")[split.held_out].argmax(1)
    assert row["agreement"] == (said == teacher).mean() and len(split.held_out) == int(0.3 * len(TEXTS))
    linear = swept(
        cache, tmp_path / "linear", validation=None, fixed={"student": "linear"}, axes={}, options={"seeds": [0, 1]}
    )
    assert all(row["agreement"] > 0.3 for row in table(linear))


@pytest.mark.parametrize(
    ("changes", "told", "kind"),
    [
        ({"options": {"metric": "loss"}, "validation": None}, "'temperature' have losses that don't", ConfigError),
        ({"options": {"metric": "agreement"}}, "leave --eval out", ConfigError),
        ({"options": {"metric": "loss"}}, "none are held out", ConfigError),
        ({"axes": {"student": ["bilstm", "bilstn"]}, "fixed": {}}, "Did you mean 'bilstm'", StudentError),
        ({"axes": {"options.hiden_size": [8, 16]}}, r"hiden_size.*Did you mean 'hidden_size'", StudentError),
        (
            {"axes": {"options.hiden_size": Range("", 8, 16)}, "options": {"search": "optuna", "points": 2}},
            "hiden_size",
            StudentError,
        ),
        ({"fixed": FIXED | {"student": "transformer"}}, "embedding_dim", StudentError),
        ({"fixed": {"student": "linear", "options": {"ngrams": 2}}, "axes": {"lr": [1, 2]}}, "ngrams", StudentError),
        (
            {"axes": {"rows": [10, 20]}, "fixed": {"student": "transformer", "phases": PKD}},
            "hidden.01@cls",
            CacheError,
        ),
        ({"test": Corpus("test", None, [Example("0", "a")], None)}, "--test test has no labelled row", CorpusError),
        ({"validation": Corpus("dev", None, [Example("0", "a", None, "hockey")], None)}, "hockey", CorpusError),
    ],
)
def test_what_no_trial_can_have_is_refused_before_the_first_trial(
    cache: Path, tmp_path: Path, changes: dict[str, Any], told: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=told):
        swept(cache, tmp_path / "sweep", **changes)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_of_which_some_trials_can_be_is_not_refused(cache: Path, tmp_path: Path) -> None:
    """The ends of the range are no widths of four heads, and those between them may be."""
    fixed = {"student": "transformer", "options": {"layers": 1, "heads": 4}, "epochs": 1, "rows": 10}
    axes = {"options.hidden_size": Range("", 9, 31)}
    result = swept(
        cache,
        tmp_path / "sweep",
        axes=axes,
        fixed=fixed,
        options={"search": "random", "points": 12},
        say=lambda line: None,
    )
    told = [row["error"] for row in table(result)]
    assert None in told and any(error is not None and "4 heads" in error for error in told)


def test_the_runs_of_the_best_alone_may_be_kept(cache: Path, tmp_path: Path) -> None:
    result = swept(cache, tmp_path / "sweep", options={"keep": 1})
    kept = [row for row in table(result) if row["run"] is not None]
    assert len(table(result)) == 3 and len(kept) == 1
    assert kept[0]["accuracy"] == max(row["accuracy"] for row in table(result))
    assert [path.name for path in (tmp_path / "sweep" / "trials").iterdir()] == [kept[0]["trial"]]
    assert swept(cache, tmp_path / "sweep", options={"keep": 1}).skipped == 3


def test_processes_give_the_same_and_one_that_dies_is_replaced(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first outcome a process that works is killed with SIGKILL."""
    killed: list[int] = []

    def killing(setting: Any, trials: Any, *, tell: Any, tick: Any) -> None:
        def tell_and_kill(trial: Any, outcome: Any) -> None:
            tell(trial, outcome)
            if not killed:
                killed.append(multiprocessing.active_children()[0].pid or 0)
                os.kill(killed[0], signal.SIGKILL)

        run_in_processes(2)(setting, trials, tell=tell_and_kill, tick=tick)

    here = swept(cache, tmp_path / "here")
    there = swept(cache, tmp_path / "there", runner=killing)
    assert killed and not there.failed and len(there.trials) == 3
    assert {o.trial: o.figures["accuracy"] for o in here.trials} == {
        o.trial: o.figures["accuracy"] for o in there.trials
    }
    assert all(same(tmp_path / "here" / str(o.run), tmp_path / "there" / str(o.run)) for o in here.trials)
    assert multiprocessing.active_children() == []


def test_optuna_goes_on_where_it_was(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed: pip install 'softlabels[sweep]'")
    axes = {"lr": Range("lr", 1e-4, 1e-1, log=True), "losses": [{"kl": 1}, {"ce": 1}], "batch_size": Range("", 4, 16)}
    fixed = {key: value for key, value in FIXED.items() if key not in ("lr", "batch_size")}
    given: dict[str, Any] = {"axes": axes, "fixed": fixed}
    whole = swept(cache, tmp_path / "whole", options={"search": "optuna", "points": 3}, **given)
    swept(cache, tmp_path / "cut", options={"search": "optuna", "points": 2}, **given)
    cut = swept(cache, tmp_path / "cut", options={"search": "optuna", "points": 3}, **given)
    assert cut.skipped == 2 and [o.changes for o in cut.trials] == [o.changes for o in whole.trials]
    assert json.loads((tmp_path / "cut" / "points.json").read_text())[2] == {
        "name": "optuna-002",
        "changes": whole.trials[2].changes,
    }


def test_optuna_finds_more_than_chance_and_the_same_after_a_stop() -> None:
    """On a curve with one top, at lr 1e-3 under the third choice."""
    pytest.importorskip("optuna", reason="optuna is not installed: pip install 'softlabels[sweep]'")
    axes: list[Axis] = [Range("lr", 1e-6, 1.0, log=True), Choice("losses", ({"kl": 1}, {"ce": 1}, {"jsd": 1}))]

    def worth(changes: Changes) -> float:
        return -abs(math.log10(changes["lr"]) + 3) - (0 if "jsd" in changes["losses"] else 2)

    def ask(count: int, known: list[Changes]) -> list[Changes]:
        search, asked = OptunaSearch(axes, seed=3, maximize=True), []
        for number in range(count):
            asked.append(search.ask(known[number] if number < len(known) else None))
            search.tell(number, None if number == 5 else worth(asked[-1]))
        return asked

    whole = ask(40, [])
    assert ask(40, whole[:25]) == whole
    values = [worth(changes) for changes in whole]
    assert statistics.mean(values[-15:]) > statistics.mean(values[:10]) + 1 and max(values) > -0.2


def test_one_sweep_a_folder_at_a_time(cache: Path, tmp_path: Path) -> None:
    def meanwhile(setting: Any, trials: Any, *, tell: Any, tick: Any) -> None:
        with pytest.raises(CacheError, match="is being written by another process"):
            swept(cache, tmp_path / "sweep")
        run_here(setting, trials, tell=tell, tick=tick)

    assert len(swept(cache, tmp_path / "sweep", runner=meanwhile, combining=CombineOptions()).trials) == 3
