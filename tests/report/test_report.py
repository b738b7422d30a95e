"""A report says what its runs' evaluations say, of any number of runs and classes; texts in it stay texts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from softlabels.errors import ConfigError, StudentError
from softlabels.report import report
from softlabels.report.curves import find_curves
from softlabels.report.figures import _span_at_least
from softlabels.report.gather import find_runs, gather
from softlabels.report.students import group_students, hold_against_best, pareto_front
from softlabels.scoring.mcnemar import mcnemar
from tests.models import LABEL_NAMES
from tests.runs import by_words, kept_run, record

LABELS = np.random.default_rng(0).integers(0, 3, 90)


def answers(skill: float, seed: int = 1, labels: np.ndarray = LABELS, classes: int = 3) -> np.ndarray:
    """Logits (N, C) that are right the more often, the higher `skill` is."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += skill
    return logits.astype(np.float32)


TEACHER = answers(3.5, seed=9)


def make(
    folder: Path, name: str, skill: float, *, seed: int = 0, options: dict[str, Any] | None = None, **more: Any
) -> Path:
    """A run `name`, with what a training leaves in its options.json."""
    of = record("linear", seed=seed).model_copy(
        update={
            "history": [
                {"epoch": 1.0, "train/loss": 0.9, "accuracy": 0.5},
                {"epoch": 2.0, "train/loss": 0.4, "accuracy": 0.6},
            ],
            "validation": {"accuracy": 0.5 + 0.1 * seed},
        }
    )
    out = kept_run(folder / name, answers(skill, seed + 1), LABELS, **{"of": of, "teacher": TEACHER, **more})
    if options is not None:
        (out / "options.json").write_text(json.dumps(options | {"seed": seed}))
    return out


def members_of(folder: Path):
    return group_students(gather([folder], corpus=None).members)


# ----------------------------------------------------------------------------------------------------------- students


def test_seeds_are_one_student_and_validation_chooses_among_them(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make(tmp_path, f"good-seed{seed}", 3.0, seed=seed, options={"lr": 0.1, "losses": {"kl": 1.0}})
    make(tmp_path, "poor-seed0", 0.4, options={"lr": 0.2, "losses": {"kl": 1.0}})
    good, poor = members_of(tmp_path)
    assert (good.name, len(good.members), poor.name, len(poor.members)) == ("good", 3, "poor", 1)
    assert (good.chosen.record.seed, good.chosen_by) == (2, "the best in validation")  # whatever it did in the test
    accuracies = [member.kept.card.figures.accuracy for member in good.members]
    assert good.accuracy == pytest.approx(np.mean(accuracies))
    assert good.spread(lambda found: found.accuracy) == pytest.approx(np.std(accuracies, ddof=1))
    (held,) = hold_against_best([good, poor])
    rows = good.chosen.kept.rows
    right = rows.student.argmax(1) == LABELS
    assert held.test == mcnemar(poor.chosen.kept.rows.student.argmax(1) == LABELS, right, against="good")
    assert held.p == held.test.p < 0.05 and not held.as_good


def test_latencies_are_told_by_the_teacher_timed_beside_them(tmp_path: Path) -> None:
    """A busy hour slows both sides; without the teacher there is only what was measured."""
    make(tmp_path, "quiet", 3.0, ms=2.0, teacher_ms=20.0)
    make(tmp_path, "busy", 2.0, ms=6.0, teacher_ms=60.0, options={"lr": 1})
    make(tmp_path, "slow", 1.0, ms=8.0, teacher_ms=40.0, options={"lr": 2})
    assert {s.name: s.milliseconds for s in members_of(tmp_path)} == pytest.approx({"quiet": 2, "busy": 2, "slow": 4})
    make(tmp_path, "alone", 0.5, ms=9.0, teacher=None, options={"lr": 3})
    assert {s.name: s.milliseconds for s in members_of(tmp_path)} == {"quiet": 2, "busy": 6, "slow": 8, "alone": 9}


def test_holms_method(tmp_path: Path) -> None:
    """Against the step-down written out: p sorted, times how many are left, never falling."""
    for number, skill in enumerate([3.0, 2.4, 2.0, 1.2, 0.3]):
        make(tmp_path, f"s{number}", skill, options={"lr": number})
    held = hold_against_best(members_of(tmp_path))
    ordered = sorted(held, key=lambda item: item.test.p)
    wanted = [max(min(1.0, (4 - j) * ordered[j].test.p) for j in range(i + 1)) for i in range(4)]
    assert [item.p for item in ordered] == pytest.approx(wanted)


def test_the_pareto_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 12, (40, 2))]
    front = pareto_front(points)
    beaten = lambda a, b: b != a and b[0] <= a[0] and b[1] >= a[1]  # noqa: E731
    assert {points[i] for i in front} == {a for a in points if not any(beaten(a, b) for b in points)}
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_curves_join_what_differs_in_one_setting(tmp_path: Path) -> None:
    for temperature, lr, seed in product(("1", "2", "4"), (0.1, 0.2), (0, 1)):
        losses = {"kl": 0.5, "ce": 0.5}
        settings = {"temperature": temperature, "lr": lr, "losses": losses}
        make(tmp_path, f"t{temperature}-lr{lr}-seed{seed}", 1 + lr, seed=seed, options=settings)
    for share in (0.25, 1.0):
        losses = {"kl": share, "ce": 1 - share} if share < 1 else {"kl": share}
        make(tmp_path, f"w{share}", 1, options={"temperature": "1", "lr": 0.1, "losses": losses})
    students = members_of(tmp_path)
    curves = {curve.setting: curve for curve in find_curves(students)}
    assert set(curves) == {"temperature", "losses", "lr"}
    assert [[point.x for point in line.points] for line in curves["temperature"].lines] == [[1, 2, 4]] * 2
    assert {line.name for line in curves["temperature"].lines} == {"lr 0.1", "lr 0.2"}
    assert [[point.x for point in line.points] for line in curves["losses"].lines] == [[0.25, 0.5, 1.0]]
    assert curves["losses"].label == "share of kl in the loss"
    student = next(s for s in students if s.settings["temperature"] == "2" and s.settings["lr"] == 0.1)
    line = next(line for line in curves["temperature"].lines if line.name == "lr 0.1")
    values = [member.kept.card.figures.accuracy for member in student.members]
    assert (line.points[1].mean, line.points[1].low, line.points[1].high) == (
        pytest.approx(np.mean(values)),
        min(values),
        max(values),
    )


def test_a_difference_of_one_row_does_not_fill_an_axis() -> None:
    for values, bounds in (
        ((50.67, 51.0), (48.3, 53.3)),
        ((0.0, 0.3), (0.0, 5.0)),
        ((99.9, 100.0), (95.0, 100.0)),
        ((40.0, 60.0), None),
    ):
        axes = Figure().subplots()
        axes.plot([1, 4], values)
        before = axes.get_ylim()
        _span_at_least(axes, 5.0)
        assert axes.get_ylim() == pytest.approx(bounds or before, abs=0.1)


# ---------------------------------------------------------------------------------------------- what is refused


def test_runs_without_an_evaluation(tmp_path: Path) -> None:
    by_words(tmp_path / "bare", {"the": [0.0, 1.0, 0.0]})
    with pytest.raises(StudentError, match=r"softlabels evaluate RUN CORPUS --cache CACHE`, of a sweep to each"):
        report([tmp_path], out=tmp_path / "r.html")
    make(tmp_path, "full", 2.0)
    found = report([tmp_path], out=tmp_path / "r.html")
    assert found.runs == 1 and "softlabels evaluate RUN test.jsonl" in found.left_out[str(tmp_path / "bare")]
    assert "softlabels evaluate RUN test.jsonl" in (tmp_path / "r.html").read_text()


def test_an_evaluation_of_other_weights_is_not_shown(tmp_path: Path) -> None:
    make(tmp_path, "full", 2.0)
    old = make(tmp_path, "old", 2.0)
    data = json.loads((old / "run.json").read_text())
    data["files"]["model.skops"] = "0" * 32
    (old / "run.json").write_text(json.dumps(data))
    assert "weights that it no longer has" in report([tmp_path], out=tmp_path / "r.html").left_out[str(old)]


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    make(tmp_path, "one", 2.0)
    make(tmp_path, "two", 2.0, corpus="other.jsonl")
    with pytest.raises(ConfigError, match=r"several corpora: .*Choose one with --corpus NAME"):
        report([tmp_path], out=tmp_path / "r.html")
    assert report([tmp_path], out=tmp_path / "r.html", corpus="other").students == 1
    with pytest.raises(ConfigError, match="--corpus nothing names none"):
        report([tmp_path], out=tmp_path / "r.html", corpus="nothing")
    with pytest.raises(StudentError, match="there is no folder"):
        report([tmp_path / "missing"], out=tmp_path / "r.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudentError, match="no finished run"):
        report([tmp_path / "empty"], out=tmp_path / "r.html")
    with pytest.raises(ConfigError, match="is a folder"):
        report([tmp_path], out=tmp_path)
    of = record("linear", label_names=["x", "y", "z"])
    kept_run(tmp_path / "three", answers(1), LABELS, of=of, corpus="other.jsonl")
    with pytest.raises(ConfigError, match="has the classes"):
        report([tmp_path], out=tmp_path / "r.html", corpus="other")


def test_a_run_is_found_once(tmp_path: Path) -> None:
    run = make(tmp_path / "trials", "one", 2.0)
    assert find_runs([tmp_path, tmp_path / "trials", run]) == [run]


# ------------------------------------------------------------------------------------------------------------ the page


class Tags(HTMLParser):
    """Every element of a page, and the ids of its SVGs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def check_page(text: str) -> Tags:
    """Nothing in the page leads out of it, runs but its own script, or has an id twice."""
    found = Tags(text)
    assert sum(tag == "script" for tag, _ in found.tags) == 1
    assert not {tag for tag, _ in found.tags} & {"img", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    policy = next(
        a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none';") and "http" not in policy
    return found


def test_one_run_and_the_same_page_again(tmp_path: Path) -> None:
    run = make(tmp_path, "one", 2.0)
    first = report([run], out=tmp_path / "a.html", title="One")
    report([run], out=tmp_path / "b.html", title="One")
    text = (tmp_path / "a.html").read_text()
    assert text == (tmp_path / "b.html").read_text()
    assert (first.runs, first.students, first.ship, first.as_good) == (1, 1, run, [])
    check_page(text)
    accuracy = 100 * float((answers(2.0).argmax(1) == LABELS).mean())
    assert first.accuracy == pytest.approx(accuracy / 100) and f"<strong>{accuracy:.1f}</strong>" in text


@pytest.mark.slow
def test_forty_runs(tmp_path: Path) -> None:
    for number in range(40):
        make(tmp_path, f"s{number // 2}-seed{number % 2}", 0.1 * number, seed=number % 2, options={"x": number // 2})
    found = report([tmp_path], out=tmp_path / "r.html")
    assert (found.runs, found.students) == (40, 20) and found.bytes < 1_500_000
    check_page((tmp_path / "r.html").read_text())


def test_many_classes(tmp_path: Path) -> None:
    labels = np.random.default_rng(3).integers(0, 77, 400)
    of = record("linear", label_names=[f"intent number {i}" for i in range(77)])
    student, teacher = answers(3, 1, labels, 77), answers(5, 2, labels, 77)
    kept_run(tmp_path / "banking", student, labels, teacher=teacher, of=of)
    report([tmp_path / "banking"], out=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    check_page(text)
    assert "The classes by number" in text and len(text) < 600_000


OWN = "document.title='owned'"
HOSTILE = f'</script></style><script>{OWN}</script><img src=x onerror="{OWN}">$x^2$\x00\x0b'


def make_hostile(folder: Path) -> Path:
    """Names, classes and texts that would do something, were they anything but text."""
    of = record("linear", label_names=[HOSTILE, "b\u202e", "<b>c</b>"]).model_copy(
        update={"temperature": HOSTILE, "losses": {HOSTILE: 1.0}, "cache": {"teacher": HOSTILE, "path": HOSTILE}}
    )
    name = HOSTILE.replace("/", "-").replace("\x00", "")[:80]
    return kept_run(
        folder / name,
        answers(2),
        LABELS,
        teacher=TEACHER,
        of=of,
        texts=[HOSTILE + "<svg onload=x>"] * 90,
        corpus="<i>.txt",
    )


def test_texts_and_names_stay_text(tmp_path: Path) -> None:
    report([make_hostile(tmp_path)], out=tmp_path / "r.html", title=HOSTILE)
    text = (tmp_path / "r.html").read_text()
    found = check_page(text)
    assert "b" not in {tag for tag, _ in found.tags} and "&lt;script&gt;" in text


def test_without_texts_and_without_a_teacher(tmp_path: Path) -> None:
    text = "a sentence that is nobody's business"
    make(tmp_path, "told", 2.0, texts=[text] * 90)
    report([tmp_path / "told"], out=tmp_path / "r.html")
    assert text.replace("'", "&#39;") in (tmp_path / "r.html").read_text()
    report([tmp_path / "told"], out=tmp_path / "r.html", differing=0)
    assert "sentence that" not in (tmp_path / "r.html").read_text()
    make(tmp_path, "alone", 2.0, teacher=None)
    report([tmp_path / "alone"], out=tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    check_page(page)
    assert "evaluated without a cache" in page and "differ most</h2>" not in page
    assert LABEL_NAMES[0] in page
