"""Evaluation tells the truth: scikit-learn's figures, and a student that is its teacher agrees with it wholly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import classification_report

from softlabels.cache import Cache, open_cache
from softlabels.config import DumpOptions, EvaluateOptions
from softlabels.dump import dump
from softlabels.errors import CacheError, CorpusError, StudentError
from softlabels.evaluate import evaluate
from softlabels.evaluations import read_card
from softlabels.predict import predict
from softlabels.runs import load_run
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher
from tests.runs import ROWS, by_words, corpus_of, make_taught, record


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its cache of ROWS, and `twin`: a run whose student is that very teacher."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_taught(folder)
    return folder


@pytest.fixture
def cache(place: Path) -> Cache:
    return open_cache(place / "cache")


@pytest.fixture(scope="module")
def by_word(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, list[float]], list[str]], Path]:
    """A run that gives a text the logits of the one word in it that it knows: predictions made by hand."""

    def make(logits: dict[str, list[float]], label_names: list[str]) -> Path:
        return by_words(tmp_path_factory.mktemp("by-word") / "run", logits, record("linear", label_names=label_names))

    return make


# ----------------------------------------------------------------------------------------------------------- quality


def test_figures_are_those_of_scikit_learn(by_word) -> None:
    names = ["accuracy", "b", "macro avg", "never"]  # names of its report among them, and a class without a row
    words = {name: [5.0 * (i == j) for j in range(4)] for i, name in enumerate(["one", "two", "three", "four"])}
    run = by_word(words, names)
    truth = [0, 0, 0, 1, 1, 2, 2, 2, 2, 1]
    said = [0, 1, 0, 1, 2, 2, 2, 0, 2, 1]
    spoken = sorted(words, key=lambda word: int(np.argmax(words[word])))
    rows = [Example(str(i), spoken[s], None, names[t]) for i, (t, s) in enumerate(zip(truth, said, strict=True))]
    found = evaluate(run, corpus_of(rows, names))
    wanted = classification_report(
        truth,
        said,
        labels=range(4),
        target_names=["c0", "c1", "c2", "c3"],
        output_dict=True,
        zero_division=0.0,
    )
    assert found.accuracy == pytest.approx(np.mean(np.array(truth) == np.array(said)))
    assert list(found.classes) == names
    for i, name in enumerate(names):
        assert found.classes[name] == pytest.approx(wanted[f"c{i}"])
    assert found.averages == {name: pytest.approx(wanted[name]) for name in ("macro avg", "weighted avg")}
    assert found.macro_f1 == found.averages["macro avg"]["f1-score"]
    assert (found.rows, found.fidelity, found.latency.teacher_ms, found.latency.times_faster) == (10, None, None, None)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["classes"]["never"]["support"] == 0


def test_rows_without_a_label_count_for_fidelity_only(place: Path, cache: Cache) -> None:
    labelled = [row for row in ROWS if row.label is not None]
    all_rows = evaluate(place / "twin", corpus_of(ROWS), cache=cache)
    some_rows = evaluate(place / "twin", corpus_of(labelled), cache=cache)
    assert all_rows.rows == some_rows.rows == len(labelled) == sum(s["support"] for s in all_rows.classes.values())
    assert all_rows.accuracy == some_rows.accuracy
    assert all_rows.fidelity is not None and some_rows.fidelity is not None
    assert (all_rows.fidelity.rows, some_rows.fidelity.rows) == (len(ROWS), len(labelled))
    bare = [Example(row.id, row.text) for row in ROWS]
    with pytest.raises(CorpusError, match="no labelled row to score against"):
        evaluate(place / "twin", corpus_of(bare), cache=cache)


# ---------------------------------------------------------------------------------------------------------- fidelity


def test_a_student_that_is_its_teacher(place: Path, cache: Cache) -> None:
    found = evaluate(place / "twin", corpus_of(ROWS), cache=cache)
    assert found.fidelity is not None
    assert found.fidelity.agreement == 1.0 and 0 <= found.fidelity.kl < 1e-9
    assert found.fidelity.teacher_accuracy == found.accuracy
    assert found.fidelity.teacher_macro_f1 == pytest.approx(found.macro_f1)
    assert found.parameters == sum(
        value.numel() for value in load_file(place / "teacher" / "model.safetensors").values()
    )
    files = set((place / "twin").iterdir()) - {place / "twin" / "run.json", place / "twin" / "evaluations"}
    assert found.bytes == sum(file.stat().st_size for file in files)


def test_kl_and_agreement_equal_a_reference(place: Path, cache: Cache, by_word) -> None:
    words = {"the": [2.0, -1.0, 0.5], "rain": [-3.0, 0.0, 4.0], "goal": [0.0, 1.0, 0.0]}
    run = by_word(words, LABEL_NAMES)
    found = evaluate(run, corpus_of(ROWS), cache=cache).fidelity
    assert found is not None
    own = load_run(run).logits(ROWS).astype(np.float64)
    total, same = 0.0, 0
    for teacher, student in zip(cache.column("logits").astype(np.float64), own, strict=True):
        p, q = np.exp(teacher) / np.exp(teacher).sum(), np.exp(student) / np.exp(student).sum()
        total += float((p * np.log(p / q)).sum())
        same += int(teacher.argmax() == student.argmax())
    assert found.kl == pytest.approx(total / len(ROWS), rel=1e-9) and found.kl > 0.01
    assert found.agreement == pytest.approx(same / len(ROWS)) and 0 < found.agreement < 1


def test_corpus_and_cache_may_overlap_in_part(place: Path, cache: Cache) -> None:
    others = [Example("new", "a text that no cache has", None, "food")]
    edited = [Example(ROWS[1].id, "another text under a known id", None, "sport")]
    found = evaluate(place / "twin", corpus_of([*others, *ROWS[5:15], *edited]), cache=cache).fidelity
    assert found is not None and (found.rows, found.agreement) == (10, 1.0)
    with pytest.raises(CacheError, match="no row of made is in cache"):
        evaluate(place / "twin", corpus_of(others + edited), cache=cache)
    alone = evaluate(place / "twin", corpus_of([*ROWS[:1], *others]), cache=cache).fidelity
    assert alone is not None and (alone.rows, alone.teacher_accuracy, alone.teacher_macro_f1) == (1, None, None)


def test_intervals_tests_and_slices_come_with_it(place: Path, cache: Cache, by_word) -> None:
    """Against references: the figures themselves lie in their intervals, and a student is as good as itself."""
    run = by_word({"the": [2.0, -1.0, 0.5], "rain": [-3.0, 0.0, 4.0], "goal": [0.0, 1.0, 0.0]}, LABEL_NAMES)
    options = EvaluateOptions(resamples=100, level=0.9, bins=5)
    found = evaluate(run, corpus_of(ROWS), cache=cache, against=[place / "twin", run], options=options)
    assert found.fidelity is not None and found.calibration is not None and found.teacher_calibration is not None
    figures = {"accuracy": found.accuracy, "macro_f1": found.macro_f1, "agreement": found.fidelity.agreement}
    for name, value in figures.items():
        assert found.intervals[name].low <= value <= found.intervals[name].high, name
    assert set(found.intervals) == {*figures, "ece"} and found.intervals["ece"].level == 0.9
    assert (found.calibration.bins, len(found.calibration.diagram)) == (5, 5)
    assert [part.rows for part in found.slices if part.by == "label"] == [
        int(found.classes[name]["support"]) for name in LABEL_NAMES
    ]
    assert sum(part.rows for part in found.slices if part.by == "length") == found.rows
    teacher, twin, itself = found.tests
    assert teacher.against == "teacher" and twin.against == str(place / "twin")
    assert (teacher.p, teacher.only_this, teacher.only_other) == (
        twin.p,
        twin.only_this,
        twin.only_other,
    )  # it's its twin
    assert teacher.difference == pytest.approx(found.accuracy - (found.fidelity.teacher_accuracy or 0))
    assert (itself.p, itself.only_this, itself.only_other) == (1.0, 0, 0)


def test_another_run_is_asked_anew_where_what_it_kept_is_of_no_use(place: Path, by_word) -> None:
    run = by_word({"the": [2.0, -1.0, 0.5], "rain": [-3.0, 0.0, 4.0]}, LABEL_NAMES)
    other = by_word({"the": [0.0, 1.0, 0.0], "goal": [0.0, 1.0, 0.0]}, LABEL_NAMES)
    options = EvaluateOptions(resamples=0)
    fresh = evaluate(run, corpus_of(ROWS), against=[other], options=options).tests
    kept = evaluate(other, corpus_of(ROWS), options=options).kept
    assert kept is not None and evaluate(run, corpus_of(ROWS), against=[other], options=options).tests == fresh
    stale = Path(kept).read_text().replace(read_card(other, Path(kept).stem).run, "of other weights")
    Path(kept).write_text(stale)
    Path(kept).with_suffix(".arrow").unlink()
    assert evaluate(run, corpus_of(ROWS), against=[other], options=options).tests == fresh
    strange = by_word({"the": [1.0, 0.0]}, ["yes", "no"])
    with pytest.raises(StudentError, match="has the classes yes, no, and not food, sport, weather"):
        evaluate(run, corpus_of(ROWS), against=[strange], options=options)


def test_rows_are_joined_by_id_whatever_their_order(place: Path, cache: Cache) -> None:
    turned = evaluate(place / "twin", corpus_of(ROWS[::-1]), cache=cache)
    assert turned.fidelity is not None and turned.fidelity.agreement == 1.0 and turned.fidelity.kl < 1e-9


def test_another_order_of_the_labels_is_refused(place: Path, tmp_path: Path) -> None:
    other = save_teacher(tmp_path / "other", label_names=["sport", "food", "weather"])
    dump(corpus_of(ROWS), teacher=str(other), out=tmp_path / "cache")
    with pytest.raises(CacheError, match=r"has the classes \['sport', 'food', 'weather'\], the student \['food'"):
        evaluate(place / "twin", corpus_of(ROWS), cache=open_cache(tmp_path / "cache"))


def test_a_cache_without_logits_is_refused(place: Path, tmp_path: Path) -> None:
    options = DumpOptions(capture=["hidden:1"])
    dump(corpus_of(ROWS), teacher=str(place / "teacher"), out=tmp_path / "cache", options=options)
    with pytest.raises(CacheError, match="fidelity needs logits"):
        evaluate(place / "twin", corpus_of(ROWS), cache=open_cache(tmp_path / "cache"))


# ----------------------------------------------------------------------------------------------------------- latency


def test_both_latencies_are_measured_without_the_teacher(place: Path, tmp_path: Path, by_word) -> None:
    shutil.copytree(place / "cache", tmp_path / "cache")  # alone: nothing of the teacher is beside it
    cache = open_cache(tmp_path / "cache")
    threads = torch.get_num_threads()
    found = evaluate(by_word({"the": [1.0, 0, 0], "rain": [0, 0, 1.0]}, LABEL_NAMES), corpus_of(ROWS), cache=cache)
    latency = found.latency
    assert latency.ms > 0 and latency.teacher_ms is not None and latency.teacher_ms > 0
    assert latency.times_faster == pytest.approx(latency.teacher_ms / latency.ms)
    assert latency.teacher_parameters == evaluate(place / "twin", corpus_of(ROWS)).parameters
    assert latency.texts == sum(row.label is not None for row in ROWS)
    assert torch.get_num_threads() == threads
    one = evaluate(place / "twin", corpus_of(ROWS[1:2]), cache=cache)
    assert one.latency.texts == 1 and one.latency.ms > 0


def test_a_teacher_that_can_only_be_built_with_its_own_code_is_not_timed(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "cache", tmp_path / "cache")
    place_of_config = tmp_path / "cache" / "teacher" / "config.json"
    config = json.loads(place_of_config.read_text()) | {"model_type": "unheard-of"}
    place_of_config.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "code.Config"}}))
    found = evaluate(place / "twin", corpus_of(ROWS), cache=open_cache(tmp_path / "cache"))
    assert found.fidelity is not None and found.fidelity.agreement == 1.0
    assert (found.latency.teacher_ms, found.latency.times_faster) == (None, None)


# ----------------------------------------------------------------------------------------------------------- predict


def test_predictions_are_softmax_of_the_students_logits(place: Path) -> None:
    texts = [text for text, _ in TEXTS[:7]]
    found = predict(place / "twin", [*texts, (texts[0], texts[1])])
    logits = load_run(place / "twin").logits([*map(lambda t: Example("", t), texts), Example("", texts[0], texts[1])])
    wanted = torch.from_numpy(logits).softmax(-1).numpy()
    assert [p.text for p in found] == [*texts, texts[0]]
    for prediction, row in zip(found, wanted, strict=True):
        assert list(prediction.probabilities) == LABEL_NAMES
        assert list(prediction.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert prediction.label == LABEL_NAMES[row.argmax()] and prediction.probability == max(
            prediction.probabilities.values()
        )
    assert found[0].probabilities != found[-1].probabilities  # the second text of the pair was read
