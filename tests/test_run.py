"""A recipe from corpus to table; what hasn't changed is skipped, what was interrupted goes on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from softlabels.cache import open_cache
from softlabels.cache.format import read_manifest
from softlabels.cli import _guarded
from softlabels.errors import ConfigError, CorpusError, SoftlabelsError, StudentError, TeacherError
from softlabels.foresight import check_recipe
from softlabels.recipes import Recipe, read_recipe, recipes_folder
from softlabels.run import RunResult, run_recipe
from softlabels.running import students as student_stages
from softlabels.runs import read_record
from softlabels.tables import recipe_table
from tests.models import TEXTS, save_model, save_teacher, tiny_classifier, tiny_tokenizer

STAGES = [
    "teacher",
    "cache",
    "cache-test",
    *(
        f"{verb}-linear-{kind}-seed{seed}"
        for kind in ("soft", "hard")
        for seed in (0, 1)
        for verb in ("train", "evaluate")
    ),
    *(f"{verb}-small-{kind}-seed0" for kind in ("soft", "hard") for verb in ("train", "evaluate")),
    *(f"{verb}-annealed-soft-seed0" for verb in ("train", "evaluate")),
]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


pytestmark = pytest.mark.usefixtures("quick")


def small(**changes: Any) -> dict[str, Any]:
    options = {"embedding_dim": 8, "hidden_size": 8, "fc_size": 8}
    common = {"student": "bilstm", "options": options, "losses": {"kl": 1}, "epochs": 1, "batch_size": 16}
    return common | {"name": "small"} | changes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with splits, a model to fine-tune, recipe.yaml of both, and its finished run in `done`."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "corpus").mkdir()
    write_csv(folder / "corpus" / "train.csv", TEXTS[:30])
    write_csv(folder / "corpus" / "unlabeled.csv", [(text, "") for text, _ in TEXTS[30:50]])
    write_csv(folder / "corpus" / "test.csv", TEXTS[45:])
    tokenizer = tiny_tokenizer()
    save_model(folder / "base", tiny_classifier(tokenizer).bert, tokenizer)
    recipe = {
        "name": "tiny",
        "corpus": {"source": str(folder / "corpus"), "train": "train", "transfer": "train+unlabeled", "test": "test"},
        "teacher": {"model": str(folder / "base"), "train": {"epochs": 2, "lr": 3e-3, "batch_size": 8}},
        "students": [
            {"name": "linear", "student": "linear", "losses": {"mse_logits": 1}, "seeds": [0, 1]},
            small(),
            small(name="annealed", temperature="5:1", hard_twin=False),
        ],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(read_recipe(str(folder / "recipe.yaml")), out=folder / "done", cpu=True)
    return folder


@pytest.fixture
def done(place: Path, tmp_path: Path) -> Path:
    """A copy of the finished run: its folder may be changed."""
    return Path(shutil.copytree(place / "done", tmp_path / "done"))


def recipe_of(place: Path, *changes: str) -> Recipe:
    return read_recipe(str(place / "recipe.yaml"), changes=list(changes))


def again(place: Path, out: Path, *changes: str) -> tuple[RunResult, list[str]]:
    """Run the recipe in `out`; what it found, and the stages that were not skipped."""
    said: list[str] = []
    result = run_recipe(recipe_of(place, *changes), out=out, say=said.append, cpu=True)
    return result, [line.removesuffix(" …") for line in said]


# ----------------------------------------------------------------------------------------------------------- results


def test_the_table_is_what_the_stages_found(place: Path) -> None:
    out = place / "done"
    results = json.loads((out / "results.json").read_text())
    assert results["skipped"] == 0 and {path.stem for path in (out / "stages").iterdir()} == set(STAGES)

    def found(stage: str) -> dict[str, Any]:
        return json.loads((out / "stages" / f"{stage}.json").read_text())["result"]

    linear, small_row, annealed = results["rows"]
    assert [row["student"] for row in results["rows"]] == ["linear", "small", "annealed"]
    assert (linear["seeds"], small_row["seeds"]) == (2, 1)
    for row, kind, key in ((linear, "soft", "accuracy_soft"), (linear, "hard", "accuracy_hard")):
        each = [found(f"evaluate-linear-{kind}-seed{seed}")["accuracy"] for seed in (0, 1)]
        assert row[key] == pytest.approx(sum(each) / 2)
    one = found("evaluate-small-soft-seed0")
    assert small_row["accuracy_soft"] == one["accuracy"] and small_row["macro_f1_soft"] == one["macro_f1"]
    assert small_row["agreement"] == one["fidelity"]["agreement"] and small_row["parameters"] == one["parameters"]
    assert small_row["train_seconds"] == found("train-small-soft-seed0")["seconds"] > 0
    assert annealed["accuracy_hard"] is None and annealed["macro_f1_hard"] is None
    assert results["teacher_accuracy"] == one["fidelity"]["teacher_accuracy"]
    assert results["teacher_seconds"] == pytest.approx(found("teacher")["seconds"] + found("cache")["seconds"])
    assert (results["cache_rows"], one["rows"]) == (50, 15)
    assert found("train-small-soft-seed0")["rows"] == 45 and found("train-small-hard-seed0")["rows"] == 27
    record = read_record(out / "students" / "annealed-soft-seed0")
    assert (record.temperature, record.losses) == ("5:1", {"kl": 1})
    assert read_record(out / "students" / "small-hard-seed0").losses == {"ce": 1}


def test_the_table_for_people(place: Path) -> None:
    result, _ = again(place, place / "done")
    table = recipe_table(result)
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["linear", "small", "annealed"]
    assert "(2 seeds)" in lines[2] and "–" in lines[4] and "over 50 rows" in table
    row = {"times_faster": None, "macro_f1_hard": None}
    untimed = [type(result.rows[0])(**({f: getattr(r, f) for f in r.__slots__} | row)) for r in result.rows]
    changed = {f: getattr(result, f) for f in result.__slots__} | {"rows": untimed, "teacher_ms": None}
    assert "can't be timed" in recipe_table(RunResult(**changed))


# ------------------------------------------------------------------------------------------------- what is done again


def test_a_second_run_skips_every_stage(place: Path, done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.name != "results.json"}
    result, ran = again(place, done)
    assert (ran, result.skipped) == ([], len(STAGES))
    after = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.name != "results.json"}
    assert {path for path in before if before[path] != after[path]} <= {done}
    first = json.loads((place / "done" / "results.json").read_text())
    assert {k: v for k, v in result.to_dict().items() if k not in ("skipped", "out")} == {
        k: v for k, v in first.items() if k not in ("skipped", "out")
    }


def test_a_changed_student_alone_is_trained_again(place: Path, done: Path) -> None:
    result, ran = again(place, done, "students.small.lr=5e-3")
    kinds = ("soft", "hard")
    assert ran == [f"{verb}-small-{kind}-seed0" for kind in kinds for verb in ("train", "evaluate")]
    assert result.skipped == len(STAGES) - 4
    assert again(place, done, "students.small.lr=5e-3")[1] == []
    assert len(again(place, done)[1]) == 4  # and back


def test_a_stage_whose_folder_is_gone_is_done_again(place: Path, done: Path) -> None:
    files = read_record(done / "students" / "small-soft-seed0").files
    shutil.rmtree(done / "students" / "small-soft-seed0")
    assert again(place, done)[1] == ["train-small-soft-seed0"]
    assert read_record(done / "students" / "small-soft-seed0").files == files
    shutil.rmtree(done / "cache")
    assert again(place, done)[1] == ["cache"]


def test_a_changed_test_corpus_is_seen(place: Path, done: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "other.csv", TEXTS[40:])
    shutil.rmtree(done / "cache-test")
    _, ran = again(place, done, "corpus.test=null", f"corpus.test_source={tmp_path / 'other.csv'}")
    assert ran == [stage for stage in STAGES if stage == "cache-test" or stage.startswith("evaluate-")]


def test_what_cost_much_is_never_replaced_unasked(place: Path, done: Path) -> None:
    for change, kind, told in (
        ("teacher.train.epochs=1", TeacherError, "differs in epochs"),
        ("dump.max_length=8", SoftlabelsError, "max_length was 64 and is now 8"),
    ):
        with pytest.raises(kind, match=told):
            again(place, done, change)
    assert again(place, done)[1] == []


# ----------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, OSError])
def test_an_interrupted_recipe_goes_on(
    place: Path, done: Path, monkeypatch: pytest.MonkeyPatch, stopped: type[BaseException]
) -> None:
    """In the second student, after its first epoch."""
    change = ["students.small.epochs=3", "students.small.lr=4e-3"]
    whole, ran = again(place, done, *change)
    wanted = read_record(done / "students" / "small-soft-seed0").files
    out = Path(shutil.copytree(place / "done", done.parent / "interrupted"))
    real, calls = student_stages.train_student, []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        import softlabels.train as train

        calls.append(named["out"].name)
        validate = train.validate

        def fail(*a: Any, **n: Any) -> Any:
            if (named["out"] / "checkpoint").exists():
                raise stopped(28, "No space left on device") if stopped is OSError else stopped
            return validate(*a, **n)

        with monkeypatch.context() as patch:
            patch.setattr(train, "validate", fail)
            return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(student_stages, "train_student", interrupted)
        with pytest.raises(stopped):
            again(place, out, *change)
    assert calls == ["small-soft-seed0"]
    assert (out / "students" / "small-soft-seed0" / "checkpoint").exists()
    result, then = again(place, out, *change)
    assert then == ran and read_record(out / "students" / "small-soft-seed0").files == wanted
    assert [row.accuracy_soft for row in result.rows] == [row.accuracy_soft for row in whole.rows]


def test_an_unfinished_student_of_other_options_is_replaced(place: Path, done: Path) -> None:
    run = done / "students" / "small-soft-seed0"
    (run / "run.json").unlink()
    (run / "checkpoint").mkdir()
    (run / "checkpoint" / "progress.json").write_text("{}")
    assert again(place, done, "students.small.lr=6e-3")[1][0] == "train-small-soft-seed0"
    assert not (run / "checkpoint").exists()


# ------------------------------------------------------------------------------------------------- other recipes


def test_a_teacher_that_is_ready_is_not_trained(place: Path, tmp_path: Path) -> None:
    save_teacher(tmp_path / "ready")
    changes = [f"teacher.model={tmp_path / 'ready'}", "teacher.train=null", "students.linear.seeds=[0]"]
    result, ran = again(place, tmp_path / "out", *changes)
    assert ran[:2] == ["cache", "cache-test"] and not (tmp_path / "out" / "teacher").exists()
    assert (
        result.teacher_seconds
        == json.loads((tmp_path / "out" / "stages" / "cache.json").read_text())["result"]["seconds"]
    )
    assert again(place, tmp_path / "out", *changes)[1] == []


def test_the_teacher_may_learn_from_fewer_rows(place: Path, tmp_path: Path) -> None:
    students = ["students=[{name: linear, student: linear, losses: {mse_logits: 1}}]"]
    result, _ = again(place, tmp_path / "out", "teacher.train.rows=12", "teacher.train.epochs=1", *students)
    report = json.loads((tmp_path / "out" / "teacher" / "teacher.json").read_text())["report"]
    assert report["train_rows"] + report["validation_rows"] == 12 and result.cache_rows == 50


def test_one_file_for_everything_and_another_to_test_on(place: Path, tmp_path: Path, capsys) -> None:
    write_csv(tmp_path / "rows.csv", TEXTS[:40])
    write_csv(tmp_path / "test.csv", TEXTS[40:])
    recipe = {
        "name": "files",
        "corpus": {"source": str(tmp_path / "rows.csv"), "test_source": str(tmp_path / "test.csv")},
        "teacher": {"model": str(place / "base"), "train": {"epochs": 1}},
        "students": [{"name": "linear", "student": "linear", "losses": {"mse_logits": 1}, "hard_twin": False}],
    }
    (tmp_path / "files.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["run", str(tmp_path / "files.yaml"), "--out", str(tmp_path / "out"), "--cpu"]
    assert _guarded([*arguments, "--json"], debug=False) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["cache_rows"] == 40 and json.loads(out)["skipped"] == 0
    assert next(line for line in err.splitlines() if line.endswith("…")) == "teacher …"
    assert _guarded([*arguments, "--set", "students.linear.seeds=[0, 1]"], debug=False) == 0
    out, err = capsys.readouterr()
    assert "linear (2 seeds)" in out and err.splitlines() == [
        "train-linear-soft-seed1 …",
        "evaluate-linear-soft-seed1 …",
    ]


def test_a_recipe_that_ships_is_found_by_its_name(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """quickstart itself, on this corpus and with this teacher; by default its folder is runs/quickstart."""
    assert (recipes_folder() / "quickstart.yaml").is_file()
    monkeypatch.chdir(tmp_path)
    changes = {
        "corpus.source": place / "corpus",
        "teacher.model": place / "base",
        "teacher.train": "{epochs: 1}",
        "dump": "{}",
        "students": "[{name: linear, student: linear, losses: {mse_logits: 1}}]",
    }
    settings = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    assert _guarded(["run", "quickstart", "--cpu", "--json", *settings], debug=False) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recipe"] == "quickstart" and (tmp_path / "runs" / "quickstart" / "results.json").is_file()
    assert _guarded(["demo", "--out", "runs/quickstart", "--cpu", "--json", *settings], debug=False) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 7


# -------------------------------------------------------------------------------------------------------- bad recipes


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        (["corpus.test=null"], ConfigError, "say what to test on"),
        (["corpus.test=dev"], CorpusError, "dev"),
        (["corpus.test=null", "corpus.test_source=nowhere.csv"], CorpusError, "no such file or folder: nowhere.csv"),
        (["corpus.test=unlabeled"], CorpusError, "no labelled row to score the students on"),
        (["corpus.train=unlabeled"], CorpusError, "no labelled row among"),
        (["corpus.source=nowhere"], CorpusError, "nowhere"),
        (["teacher.model=./nowhere"], TeacherError, "nowhere"),
        (["students.1.student=bilstn"], StudentError, "Did you mean 'bilstm'"),
        (["students.1.options={hiden_size: 8}"], StudentError, r"hiden_size.*Did you mean 'hidden_size'\?"),
        (["students.linear.options={ngrams: 2}"], StudentError, "ngrams"),
        (["students.linear.losses={kl: 1}"], ConfigError, "linear student is a regression"),
    ],
)
def test_a_fault_is_told_before_the_teacher_is_trained(
    place: Path, tmp_path: Path, changes: list[str], kind: type[SoftlabelsError], told: str
) -> None:
    with pytest.raises(kind, match=told):
        again(place, tmp_path / "out", *changes)
    assert not (tmp_path / "out" / "teacher").exists() and not (tmp_path / "out" / "stages").exists()


def test_labels_to_test_on_that_the_teacher_will_not_know(place: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "other.csv", [("a puck", "hockey"), ("soup", "food")])
    with pytest.raises(CorpusError, match="does not know label 'hockey'"):
        again(place, tmp_path / "out", "corpus.test=null", f"corpus.test_source={tmp_path / 'other.csv'}")
    assert not (tmp_path / "out" / "teacher").exists()


def test_a_folder_is_run_by_one_process_at_a_time(place: Path, tmp_path: Path) -> None:
    from softlabels.cache.files import lock

    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out"), pytest.raises(SoftlabelsError, match="being written by another process"):
        again(place, tmp_path / "out")


# ------------------------------------------------------------------------------------------ pretraining, augmentation


def test_students_are_pretrained_from_a_teacher_of_their_own(place: Path, tmp_path: Path) -> None:
    """TinyBERT's order: layers of the pretrained model, then of the tuned teacher, then its predictions."""
    sizes = {"layers": 1, "hidden_size": 16, "heads": 4}
    layers = [{"loss": "hidden_mse", "map": "final", "project": "linear"}, {"loss": "value_relation", "map": "final"}]
    common = {"student": "transformer", "batch_size": 16, "epochs": 1}
    recipe = yaml.safe_load((place / "recipe.yaml").read_text()) | {
        "dump": {"capture": ["logits", "hidden:2", "qkv:2"]},
        "augment": {"method": "deletion", "times": 1},
        "pretrain": {
            "corpus": {"source": str(place / "corpus"), "train": "unlabeled"},
            "teacher": {"model": str(place / "base")},
            "dump": {"capture": ["hidden:2", "qkv:2"]},
            "student": common | {"options": sizes, "phases": [{"name": "general", "losses": layers}]},
        },
        "students": [
            common
            | {
                "name": "tiny",
                "options": {"init_from": "pretrained"},
                "phases": [
                    {"name": "intermediate", "losses": layers},
                    {"name": "prediction", "losses": {"soft_cross_entropy": 1}},
                ],
            },
            common | {"name": "half", "options": {"init_from": "base", "layers": 1}, "losses": {"kl": 1}},
        ],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    said: list[str] = []
    result = run_recipe(read_recipe(str(file)), out=out, say=said.append, cpu=True)
    assert said[:4] == ["teacher …", "augment …", "cache …", "cache-test …"]
    assert said[4:6] == ["pretrain-cache …", "pretrain-student …"]
    assert 50 < result.cache_rows <= 100  # the rows, and samples of them
    general = read_record(out / "pretrain" / "student")
    assert general.task == "sentence-embedding" and general.losses == {"hidden_mse": 1.0, "value_relation": 1.0}
    soft, hard = (read_record(out / "students" / f"tiny-{kind}-seed0") for kind in ("soft", "hard"))
    assert soft.options == {"init_from": str(out / "pretrain" / "student")}
    assert hard.options == sizes and hard.losses == {"ce": 1.0}  # what was distilled is not the twin's
    assert read_record(out / "students" / "half-hard-seed0").options["init_from"] == str(place / "base")
    said.clear()
    assert run_recipe(read_recipe(str(file)), out=out, say=said.append, cpu=True).skipped == len(
        list((out / "stages").iterdir())
    )
    assert said == []


# ------------------------------------------------------------------------------------------- told before the teacher


LAYERED = "{name: layered, student: transformer, options: {layers: 1, hidden_size: 32, heads: 4}, phases: [PHASE]}"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (["{losses: [{loss: pkd, map: [[1, 1]]}]}"], "'layered': loss 'pkd' needs hidden.01@cls, .* hidden:1@cls"),
        (["{losses: [{loss: hidden_mse, map: uniform}]}", "dump.capture=['hidden:1']"], "add to its capture: hidden:2"),
        (["{losses: {kl: 1}}", "dump.capture=['hidden:9']"], "'layered': --capture hidden: the teacher has no layer 9"),
        (["{losses: [{loss: hidden_mse, map: [[2, 2]]}]}"], "the student has no layer 2; it has 0"),
        (["{losses: [{loss: hidden_mse, map: [[1]]}]}"], "no pair of a map"),
        (["{losses: [{loss: kl, options: {a: 1}}]}"], "has no option 'a'"),
        (["{losses: {kl: 1}, progressive: true}"], "'layered': phase 'train' is progressive: loss 'kl' has no layers"),
    ],
)
def test_what_the_dump_will_lack_is_told_before_the_teacher_is_trained(
    place: Path, tmp_path: Path, changes: list[str], fault: str
) -> None:
    phase, *rest = changes
    recipe = recipe_of(place, f"students.0={LAYERED.replace('PHASE', phase)}", *rest)
    with pytest.raises(SoftlabelsError, match=fault):
        run_recipe(recipe, out=tmp_path / "run", cpu=True)
    assert not (tmp_path / "run" / "teacher").exists()


def test_the_students_of_a_pretraining_are_looked_at_too(place: Path, tmp_path: Path) -> None:
    """Also one that starts from it, whose layers are those of a student that isn't there yet."""
    general = "{losses: [{loss: hidden_mse, map: uniform}]}"
    base = f"{{model: {place / 'base'}}}"
    first = LAYERED.replace("name: layered, ", "").replace("PHASE", general)
    pretrain = f"pretrain={{corpus: {{source: {place / 'corpus'}}}, teacher: {base}, student: {first}}}"
    task = "{name: task, student: transformer, options: {init_from: pretrained}, phases: [PHASE]}"
    later = f"students.0={task.replace('PHASE', '{losses: [{loss: hidden_mse, map: [[2, 2]]}]}')}"
    for capture, fault in (
        ("'hidden:1'", "'pretrain': loss 'hidden_mse' needs hidden.02"),
        ("'hidden:2'", "'task': .*2"),
    ):
        recipe = recipe_of(place, pretrain, f"pretrain.dump.capture=[{capture}]", "dump.capture=['hidden:2']", later)
        with pytest.raises(SoftlabelsError, match=f"student {fault}"):
            run_recipe(recipe, out=tmp_path / "run", cpu=True)


def test_every_shipped_recipe_takes_what_its_students_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    layered = [path.stem for path in sorted(recipes_folder().glob("*.yaml")) if "map:" in path.read_text()]
    assert len(layered) >= 7
    for name in layered:
        check_recipe(read_recipe(name))


# --------------------------------------------------------------------------------------------------- several teachers


ENSEMBLE = {
    "name": "three",
    "combine": {"mean": "probabilities"},
    "students": [
        {"name": "linear", "student": "linear", "losses": {"mse_logits": 1}},
        small(name="last", hard_twin=False, options={"embedding_dim": 8, "hidden_size": 8, "fc_size": 8}),
    ],
}


def ensemble_of(place: Path, folder: Path) -> dict[str, Any]:
    """Two teachers of one corpus, the second on fewer rows, and a party with rows and an order of labels of its own."""
    write_csv(folder / "own.csv", list(reversed(TEXTS[:24])))
    train = {"epochs": 1, "lr": 3e-3, "batch_size": 8}
    model = str(place / "base")
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    return ENSEMBLE | {
        "corpus": recipe["corpus"],
        "teachers": [
            {"model": model, "train": train, "weight": 2},
            {"model": model, "train": train | {"seed": 1, "rows": 12}},
            {"model": model, "train": train | {"seed": 2}, "corpus": {"source": str(folder / "own.csv")}},
        ],
    }


def test_several_teachers_make_one_cache(place: Path, tmp_path: Path, capsys) -> None:
    file, out = tmp_path / "three.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(ensemble_of(place, tmp_path)))
    assert _guarded(["run", str(file), "--out", str(out), "--cpu"], debug=True) == 0
    table, said = capsys.readouterr()
    stages = [line.removesuffix(" …") for line in said.splitlines() if line.endswith("…")]
    each = [f"teacher-{n}-{stage}" for n in (1, 2, 3) for stage in ("teacher", "cache", "cache-test")]
    assert stages[:11] == [*each, "cache", "cache-test"]
    results = json.loads((out / "results.json").read_text())
    manifest = read_manifest(out / "cache")
    assert manifest.combined is not None and manifest.combined.how == "probabilities"
    assert [part.weight for part in manifest.combined.caches] == [0.5, 0.25, 0.25]
    assert results["cache_rows"] == 50 and len(results["teacher_accuracies"]) == 3
    report = json.loads((out / "teacher-2" / "teacher" / "teacher.json").read_text())["report"]
    assert report["train_rows"] + report["validation_rows"] == 12
    test = open_cache(out / "cache-test")
    consensus = float((test.column("logits").argmax(1) == test.labels).mean())
    assert results["teacher_accuracy"] == pytest.approx(consensus)
    paid = {path.stem: json.loads(path.read_text())["result"]["seconds"] for path in (out / "stages").iterdir()}
    dumped = sum(paid[f"teacher-{n}-{stage}"] for n in (1, 2, 3) for stage in ("teacher", "cache"))
    assert results["teacher_seconds"] == pytest.approx(dumped + paid["cache"])
    assert "what 3 say together; each by itself: " in table
    assert run_recipe(read_recipe(str(file)), out=out, cpu=True).skipped == len(paid)
    again: list[str] = []
    changed = read_recipe(str(file), changes=["combine={choose: label}", "teachers.1.weight=3"])
    run_recipe(changed, out=out, say=again.append, cpu=True)
    assert again[:2] == ["cache …", "cache-test …"] and "teacher-1-cache …" not in again
    cards = [read_manifest(out / name).combined for name in ("cache", "cache-test")]
    assert [card.choose for card in cards if card is not None] == ["label", None]  # no look at the test's answers


def test_parties_with_corpora_of_their_own_need_no_label_in_common(place: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "own.csv", TEXTS[:30])
    party: dict[str, Any] = {"model": str(place / "base"), "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}}
    party["corpus"] = {"source": str(tmp_path / "own.csv")}
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    file = tmp_path / "parties.yaml"
    bare = recipe["corpus"] | {"train": "unlabeled", "transfer": "unlabeled"}
    students = [{"name": "linear", "student": "linear", "losses": {"mse_logits": 1}, "hard_twin": False}]
    file.write_text(yaml.safe_dump(ENSEMBLE | {"corpus": bare, "teachers": [party, party], "students": students}))
    result = run_recipe(read_recipe(str(file)), out=tmp_path / "out", cpu=True)
    assert result.rows[0].accuracy_soft is not None
    with pytest.raises(CorpusError, match="no labelled row among"):
        alone = {key: value for key, value in party.items() if key != "corpus"}
        file.write_text(yaml.safe_dump(ENSEMBLE | {"corpus": bare, "teachers": [alone, party], "students": students}))
        run_recipe(read_recipe(str(file)), out=tmp_path / "other", cpu=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"teacher": {"model": "x"}}, "a 'teacher' or 'teachers'"),
        ({"teachers": [{"model": "x"}]}, "'teachers' has one entry"),
        ({"teachers": [{"model": "x", "wait": 1}, {"model": "y"}]}, "unknown key 'wait'.*Did you mean 'weight'"),
        ({"teachers": [{"model": "x", "weight": 0}, {"model": "y"}]}, "greater than 0"),
        ({"combine": {"mean": "median"}}, "a median has no weights"),
        ({"combine": {"weights": [1, 2, 3]}}, "say each teacher's 'weight' where the teacher is"),
        ({"dump": {"capture": ["logits", "hidden:1"]}}, "only logits are combined"),
        ({"teachers": [], "teacher": {"model": "x"}}, "'combine' is about several 'teachers'"),
    ],
)
def test_several_teachers_that_cannot_be(place: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    file = tmp_path / "three.yaml"
    file.write_text(yaml.safe_dump(ensemble_of(place, tmp_path) | change))
    with pytest.raises(ConfigError, match=told):
        read_recipe(str(file))


def test_a_teacher_of_several_that_is_missing_is_told_first(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "three.yaml"
    file.write_text(yaml.safe_dump(ensemble_of(place, tmp_path)))
    with pytest.raises(TeacherError, match="nowhere"):
        run_recipe(read_recipe(str(file), changes=["teachers.2.model=./nowhere"]), out=tmp_path / "out", cpu=True)
    assert not (tmp_path / "out" / "stages").exists()
