"""The command line as it is used: a whole pipeline, and everything a user can get wrong on the way.

Whatever is wrong costs one clear message on stderr, exit code 2 (130 for Ctrl-C), and nothing that was there before.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softlabels.cache.files import lock
from softlabels.cli import _guarded, app
from softlabels.corpus import read_corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError
from softlabels.runs import read_record
from softlabels.teacher import TeacherOptions, train_teacher
from tests.models import TEXTS, save_model, save_teacher, tiny_classifier, tiny_tokenizer
from tests.processes import PATIENCE, ROOT, Finished, Launcher, command, environment, softlabels

COMMANDS = [made.name or made.callback.__name__ for made in app.registered_commands if made.callback]
SMALL = ["--option", "embedding_dim=16", "--option", "hidden_size=12", "--option", "fc_size=10"]
BILSTM = ["--student", "bilstm", *SMALL, "--epochs", "2", "--cpu"]
TINY = ["--student", "transformer", "--option", "layers=1", "--option", "hidden_size=16", "--epochs", "2", "--cpu"]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def contents(folder: Path) -> dict[str, str]:
    """Every file of `folder` and its hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("launcher"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Path:
    """train.csv, test.csv, base, teacher, cache (of train.csv), cache-test, hidden (no logits), and the run bilstm."""
    folder = tmp_path_factory.mktemp("place")
    write_csv(folder / "train.csv", [(text, name if i % 3 else "") for i, (text, name) in enumerate(TEXTS)])
    write_csv(folder / "test.csv", TEXTS[1::2])
    tokenizer = tiny_tokenizer()
    save_model(folder / "base", tiny_classifier(tokenizer).bert, tokenizer)
    teacher = save_teacher(folder / "teacher")
    wide = {name: value * 4 for name, value in load_file(teacher / "model.safetensors").items()}
    save_file(wide, teacher / "model.safetensors", metadata={"format": "pt"})  # else it says the same of every text
    for corpus, out, capture in (
        ("train.csv", "cache", "logits"),
        ("test.csv", "cache-test", "logits"),
        ("train.csv", "hidden", "hidden:1"),
    ):
        done = launcher.run("dump", corpus, "--teacher", "teacher", "--out", out, "--capture", capture, cwd=folder)
        assert done.code == 0, done.err
    assert launcher.run("train-student", "cache", "--out", "bilstm", *BILSTM, cwd=folder).code == 0
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; progress is not shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOFTLABELS_QUIET", "1")
    return tmp_path


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run a command line in this process."""

    def run(*arguments: object) -> Finished:
        capfd.readouterr()
        code = _guarded([str(argument) for argument in arguments], debug=False)
        return Finished(code, *capfd.readouterr())

    return run


@pytest.fixture
def refuse(call: Callable[..., Finished]) -> Callable[..., None]:
    """Run a command line that must fail with one message, in which `told` is found."""

    def run(*arguments: object, told: str) -> None:
        done = call(*arguments)
        assert (done.code, done.out) == (2, ""), done
        assert done.err.startswith("error: ") and done.err.count("error:") == 1, done.err
        assert "Traceback" not in done.err and re.search(told, done.err), done.err

    return run


# ----------------------------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_a_whole_pipeline_through_the_real_command_line(tmp_path: Path) -> None:
    """Each command in a Python of its own. The teacher is gone before a student is trained."""
    write_csv(tmp_path / "train.csv", [(text, name if i < 48 else "") for i, (text, name) in enumerate(TEXTS)])
    write_csv(tmp_path / "test.csv", TEXTS[::4])
    tokenizer = tiny_tokenizer()
    save_model(tmp_path / "base", tiny_classifier(tokenizer).bert, tokenizer)

    def run(*arguments: object, given: str | None = None) -> Finished:
        done = softlabels(*arguments, cwd=tmp_path, given=given)
        assert done.code == 0 and "Traceback" not in done.err, done
        return done

    training = ["--epochs", 3, "--lr", "3e-3", "--batch-size", 8, "--cpu", "--json"]
    report = run("train-teacher", "train.csv", "--model", "base", "--out", "teacher", *training).json()
    assert (report["train_rows"] + report["validation_rows"], report["unlabelled_rows"]) == (48, 12)
    captures = ["--capture", "logits", "--capture", "hidden:1,2", "--capture", "qkv:2"]
    report = run("dump", "train.csv", "--teacher", "teacher", "--out", "cache", *captures, "--cpu", "--json").json()
    assert report["fields"] == ["hidden.01", "hidden.02", "key.02", "logits", "query.02", "value.02"]
    assert (report["rows"], report["new_rows"], report["truncated"]) == (60, 60, 0)
    run("dump", "test.csv", "--teacher", "teacher", "--out", "cache-test", "--cpu")
    shutil.rmtree(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "base")

    facts = run("info", "cache", "--json").json()
    assert (facts["rows"], facts["labelled"], facts["classes"]) == (60, 48, ["food", "sport", "weather"])
    annealed = ["--loss", "kl=1", "--temperature", "5:1", "--json"]
    report = run("train-student", "cache", "--out", "runs/bilstm", *BILSTM, *annealed).json()
    assert (report["rows"], report["epochs"]) == (54, 2)
    run("train-student", "cache", "--student", "linear", "--out", "runs/linear", "--cpu")
    found = run("evaluate", "runs/linear", "test.csv", "--cache", "cache-test", "--json").json()
    assert (found["rows"], found["fidelity"]["rows"]) == (15, 15) and found["times_faster"] > 0
    lines = run("predict", "runs/bilstm", "-", "--json", given="rain in the north\nthe goal\n").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["rain in the north", "the goal"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bilstm-hard", [*BILSTM, "--loss", "ce=1"]),
        pytest.param(
            "attention",
            ["--student", "lstm_attention", *SMALL[:4], "--epochs", "2", "--cpu", "--temperature", "3"],
            marks=pytest.mark.slow,
        ),
        ("transformer-soft", [*TINY, "--loss", "kl=1", "--temperature", "5:1:cosine"]),
        pytest.param(
            "transformer-hard",
            [*TINY, "--loss", "ce=1", "--eval", "{place}/test.csv", "--patience", "1"],
            marks=pytest.mark.slow,
        ),
        ("linear-soft", ["--student", "linear", "--cpu"]),
        ("linear-hard", ["--student", "linear", "--loss", "ce=1", "--eval", "{place}/test.csv"]),
    ],
)
def test_every_student_from_soft_and_from_hard_labels(
    place: Path, here: Path, launcher: Launcher, name: str, arguments: list[str]
) -> None:
    given = [argument.format(place=place) for argument in arguments]
    report = launcher.run("train-student", place / "cache", "--out", name, *given, "--json", cwd=here).json()
    labelled = sum(1 for i in range(len(TEXTS)) if i % 3)
    held_out = 0 if "--eval" in given else (labelled if "ce=1" in given else len(TEXTS)) // 10
    assert report["rows"] == (labelled if "ce=1" in given else len(TEXTS)) - held_out
    assert set(report["validation"]) == ({"accuracy"} if "--eval" in given else {"loss"})
    found = launcher.run(
        "evaluate", name, place / "test.csv", "--cache", place / "cache-test", "--json", cwd=here
    ).json()
    assert found["rows"] == found["fidelity"]["rows"] == 30 and 0 <= found["accuracy"] <= 1
    assert set(found["classes"]) == {"food", "sport", "weather"} and found["fidelity"]["kl"] >= 0
    said = launcher.run("predict", name, "rain", "a goal\tthe match", cwd=here)
    assert [line.split("\t")[0] in found["classes"] for line in said.out.splitlines()] == [True, True]


def test_what_is_printed_for_people(place: Path, here: Path, call: Callable[..., Finished]) -> None:
    said = call("info", place / "cache")
    assert (
        said.code == 0
        and re.search(r"^rows +60$", said.out, re.M)
        and re.search(r"^logits +row +float32", said.out, re.M)
    )
    said = call("evaluate", place / "bilstm", place / "test.csv", "--cache", place / "cache-test")
    assert said.code == 0 and said.err == ""
    assert re.search(r"^weather +\d\.\d{3} +\d\.\d{3} +\d\.\d{3} +10 +\d\.\d{3}$", said.out, re.M), said.out
    for fact in ("accuracy", "agreement with the teacher", "KL to the teacher", "times faster than the teacher"):
        assert re.search(rf"^{fact} +[\d.]+( |$)", said.out, re.M), said.out
    assert call("evaluate", place / "bilstm", place / "test.csv", "--rows", 4).code == 0


def test_a_finished_dump_and_a_finished_teacher_are_found_again(
    place: Path, here: Path, call: Callable[..., Finished]
) -> None:
    dumping = ["dump", place / "train.csv", "--teacher", place / "teacher", "--out", "cache", "--cpu", "--json"]
    assert [call(*dumping).json()["new_rows"] for _ in range(2)] == [60, 0]
    training = ["train-teacher", place / "test.csv", "--model", place / "base", "--out", "teacher", "--epochs", 1]
    first, second = [call(*training, "--cpu", "--json").json() for _ in range(2)]
    assert (first["reused"], second["reused"]) == (False, True)
    assert first["weights_hash"] == second["weights_hash"]


# ------------------------------------------------------------------------------------------- light and well-behaved

LIGHT = """
import sys
from softlabels.cli import _guarded
for words in {lines}:
    print("CODE", _guarded(words, debug=False), flush=True)
heavy = {{"torch", "transformers", "datasets", "sklearn", "pandas", "pyarrow", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_usage_errors_are_light_and_every_help_has_an_example() -> None:
    helps = [["--help"], *([name, "--help"] for name in COMMANDS)]
    wrong = [
        ["dump"],
        ["nonsense"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--epochs", "0"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--epochs", "many"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--temperature", "0"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--temperature", "5:1:sine"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--lr", "nan"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--lr", "inf"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--lr", "-1"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--seed", str(2**32)],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--loss", "kk=1"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--loss", "kl=-1"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--loss", "kl=nan"],
        ["train-student", "cache", "--student", "bilstm", "--out", "x", "--option", "layers"],
        ["train-teacher", "train.csv", "--model", "base", "--out", "x", "--lr", "nan"],
        ["dump", "train.csv", "--teacher", "t", "--out", "x", "--dtype", "float8"],
        ["dump", "train.csv", "--teacher", "t", "--out", "x", "--codec", "int4"],
        ["dump", "train.csv", "--teacher", "t", "--out", "x", "--rows", "0"],
        ["run", "no-such-recipe"],
        ["run", "quickstart", "--set", "studnets.0.lr=1"],
        ["predict", "run", " "],
        ["predict", "run", "a text\t"],
    ]
    script = LIGHT.format(lines=helps + wrong)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    *pages, _ = re.split(r"CODE \d\n", done.stdout.split("CODE 2")[0])
    assert re.findall(r"CODE (\d)", done.stdout) == ["0"] * len(helps) + ["2"] * len(wrong)
    assert len(pages) == len(helps) and all(name in pages[0] for name in COMMANDS)
    for name, page in zip(COMMANDS, pages[1:], strict=True):
        assert re.search(rf"Examples?: +softlabels {name}\b", page), page
        examples = page[page.rindex("Example") :].rstrip().splitlines()  # each on one line, whole
        assert all(
            re.match(r"(Examples?:)? +([A-Za-z0-9 ]+:  )?(softlabels|ssh-keygen|accelerate) ", line)
            for line in examples
        ), page
    assert done.stderr.count("error:") == len(wrong) and "Traceback" not in done.stderr


def test_usage_errors_say_what_and_where(refuse: Callable[..., None]) -> None:
    student = ["train-student", "cache", "--student", "bilstm", "--out", "x"]
    refuse("dump", told=r"(?s)Missing argument 'CORPUS'.*softlabels dump --help")
    refuse("nonsense", told="No such command 'nonsense'")
    refuse(*student, "--epochs", 0, told="--epochs")
    refuse(*student, "--lr", "nan", told="lr: Input should be")
    refuse(*student, "--lr", "inf", told="lr: Input should be a finite number")
    refuse(*student, "--temperature", 0, told="temperature '0' must be above 0")
    refuse(*student, "--seed", 2**32, told="seed: Input should be less than")
    refuse("run", "quikstart", told="no recipe 'quikstart'.* Did you mean 'quickstart'")


def test_debug_shows_where_and_the_exit_codes_are_those_of_the_process(tmp_path: Path, launcher: Launcher) -> None:
    done = launcher.run("info", "nowhere", cwd=tmp_path)
    assert (done.code, done.out) == (2, "") and done.err.startswith("error: no cache at nowhere")
    done = launcher.run("--debug", "info", "nowhere", cwd=tmp_path)
    assert done.code == 1 and "Traceback" in done.err and "CacheError" in done.err
    assert launcher.run("--version", cwd=tmp_path).out.startswith("softlabels ")


def test_standard_streams_that_are_closed_full_or_narrow(place: Path, launcher: Launcher) -> None:
    def shell(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script], cwd=place, env=environment(), capture_output=True, text=True, timeout=PATIENCE
        )

    for arguments in (["info", "cache"], ["info", "cache", "--json"], ["--help"]):
        full = launcher.run(*arguments, cwd=place, out="/dev/full")
        assert full.code == 2 and full.err.count("\n") == 1 and "disk is full" in full.err
    done = shell(f"{' '.join(command('--version'))} >&-")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"{' '.join(command('--help'))} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"{' '.join(command('predict', 'bilstm', '-'))} <&-")
    assert done.returncode == 2 and "no standard input" in done.stderr and "Traceback" not in done.stderr
    done = shell(f"PYTHONIOENCODING=latin-1 {' '.join(command('predict', 'bilstm', '天气'))}")
    assert done.returncode == 0 and r"\u5929\u6c14" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------- bad corpora

BAD_CORPORA: list[tuple[str, bytes | None, str]] = [
    ("missing.csv", None, "no such file or folder: missing.csv"),
    ("empty.csv", b"", "has no rows|is empty"),
    ("header.csv", b"text,label\n", "has no rows"),
    ("columns.csv", b"a,b\n1,2\n", "no column of texts"),
    ("doubled.csv", b"text,text,label\na,b,food\n", "column 'text' twice"),
    ("latin.csv", "text,label\ncaf\xe9,food\n".encode("latin-1"), "UTF-8"),
    ("blank.csv", b"text,label\nsoup,food\n  ,sport\n", "'text' is (empty|missing)"),
    ("typed.jsonl", b'{"text": "soup", "label": "food"}\n{"text": 5, "label": "sport"}\n', "type int, not a string"),
    ("broken.jsonl", b'{"text": "soup"\n', "line 1"),
    ("ids.jsonl", b'{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "under one id"),
    ("what.xyz", b"?", "xyz"),
]


@pytest.mark.parametrize(("name", "data", "told"), BAD_CORPORA, ids=[case[0] for case in BAD_CORPORA])
def test_a_bad_corpus_is_refused_by_every_command(
    place: Path, here: Path, refuse: Callable[..., None], name: str, data: bytes | None, told: str
) -> None:
    if data is not None:
        Path(name).write_bytes(data)
    refuse("dump", name, "--teacher", place / "teacher", "--out", "cache", told=told)
    refuse("train-teacher", name, "--model", place / "base", "--out", "teacher", told=told)
    refuse("evaluate", place / "bilstm", name, told=told)
    refuse("train-student", place / "cache", *BILSTM, "--out", "run", "--eval", name, told=told)
    assert {path.name for path in here.iterdir()} <= {name}


def test_columns_that_are_not_there(place: Path, here: Path, refuse: Callable[..., None]) -> None:
    common = ["--teacher", place / "teacher", "--out", "cache"]
    refuse("dump", place / "train.csv", *common, "--text", "sentence", told="no column 'sentence'")
    refuse("dump", place / "train.csv", *common, "--label", "class", told="no column 'class'")
    refuse("dump", place / "train.csv", *common, "--text", "text,text", told="two different columns")
    refuse("dump", place / "train.csv", *common, "--split", "dev", told="split")
    assert not any(here.iterdir())


def test_too_few_rows_or_classes(place: Path, here: Path, refuse: Callable[..., None], call: Any) -> None:
    write_csv(here / "one.csv", [("soup", "food")])
    write_csv(here / "same.csv", [("soup", "food"), ("bread", "food")])
    write_csv(here / "bare.csv", [("soup", ""), ("bread", "")])
    training = ["--model", place / "base", "--out", "teacher"]
    refuse("train-teacher", "one.csv", *training, told="only one labelled row")
    refuse("train-teacher", "same.csv", *training, told="one class only")
    refuse("train-teacher", "bare.csv", *training, told="no labelled row")
    for name in ("one", "same", "bare"):  # a corpus to be labelled by the teacher may be any of these
        assert call("dump", f"{name}.csv", "--teacher", place / "teacher", "--out", name).code == 0
    refuse("train-student", "one", *BILSTM, "--out", "run", told="one row only")
    refuse("train-student", "one", "--student", "linear", "--out", "run", told="one row only")
    refuse("train-student", "same", *BILSTM, "--loss", "ce=1", "--out", "run", told="all of one class")
    refuse("train-student", "bare", *BILSTM, "--loss", "ce=1", "--out", "run", told="needs labels")
    refuse("train-student", "bare", *BILSTM, "--out", "run", told="needs labels.* Leave --loss ce out")
    refuse("evaluate", place / "bilstm", "bare.csv", told="no labelled row")
    assert not Path("run").exists() and not Path("teacher").exists()


def test_labels_the_teacher_does_not_know(place: Path, here: Path, refuse: Callable[..., None]) -> None:
    write_csv(here / "hockey.csv", [("soup", "food"), ("a puck", "hockey"), ("ice", "hockey")])
    told = r"does not know labels? 'hockey' of 2 rows .*it knows food, sport, weather"
    refuse("dump", "hockey.csv", "--teacher", place / "teacher", "--out", "cache", told=told)
    refuse("evaluate", place / "bilstm", "hockey.csv", told=told)
    refuse("train-student", place / "cache", *BILSTM, "--out", "run", "--eval", "hockey.csv", told=told)
    refuse(
        *("train-teacher", place / "test.csv", "--model", place / "base", "--out", "teacher"),
        *("--eval", "hockey.csv"),
        told="hockey",
    )
    assert {path.name for path in here.iterdir()} == {"hockey.csv"}


def test_a_text_longer_than_the_model_is_cut_counted_and_said(place: Path, here: Path, call: Any) -> None:
    write_csv(
        here / "long.csv", [("soup " * 200, "food"), ("a goal", "sport"), ("rain", "weather"), ("snow", "weather")]
    )
    done = call("dump", "long.csv", "--teacher", place / "teacher", "--out", "cache", "--json")
    assert done.json()["truncated"] == 1 and "1 of 4 texts were longer than the teacher takes" in done.err
    assert call("info", "cache", "--json").json()["truncated"] == 1
    training = ["--model", place / "base", "--out", "teacher", "--epochs", 1, "--cpu", "--json"]
    assert call("train-teacher", "long.csv", *training).json()["truncated_rows"] == 1
    assert call("evaluate", place / "bilstm", "long.csv", "--json").json()["rows"] == 4
    assert call("predict", place / "bilstm", "rain " * 500).code == 0


# ----------------------------------------------------------------------------- bad teachers, caches, students, folders


def test_a_teacher_with_nan_logits_is_told_with_its_rows(place: Path, here: Path, refuse: Any) -> None:
    shutil.copytree(place / "teacher", "broken")
    weights = load_file("broken/model.safetensors")
    vocabulary = json.loads(Path("broken/tokenizer.json").read_text())["model"]["vocab"]
    weights["bert.embeddings.word_embeddings.weight"][vocabulary["snow"]] = torch.nan
    save_file(weights, "broken/model.safetensors", metadata={"format": "pt"})
    snowy = [str(i) for i, (text, _) in enumerate(TEXTS) if "snow" in text.lower()]
    dumping = ["dump", place / "train.csv", "--teacher", "broken", "--out", "cache"]
    refuse(*dumping, told=rf"NaN or infinite values in field 'logits' for example\(s\) .*\b{snowy[0]}\b")
    refuse(*dumping, "--shard-rows", 16, told="another configuration: dump.shard_rows was 4096 and is now 16")


def test_what_is_no_teacher(place: Path, here: Path, refuse: Any) -> None:
    train = ["dump", place / "train.csv", "--out", "cache"]
    refuse(*train, "--teacher", "nowhere/at-all", told="nowhere/at-all")
    refuse(*train, "--teacher", place / "base", "--capture", "logits", told="no trained classification head")
    refuse(*train, "--teacher", place / "base", "--task", "sequence-classification", told="softlabels train-teacher")
    refuse(*train, "--teacher", place / "teacher" / "config.json", told="is a file: give the folder")
    refuse(*train, "--teacher", place / "cache", told="cache")
    refuse(*train, "--teacher", place / "teacher", "--capture", "hidden:9", told="it has 0 to 2")
    refuse(*train, "--teacher", place / "teacher", "--capture", "hiden:1", told="Did you mean 'hidden'")
    refuse(*train, "--teacher", place / "teacher", "--max-length", 1000, told="at most 64")
    refuse(*("train-teacher", place / "test.csv", "--model", place / "train.csv", "--out", "teacher"), told="is a file")
    assert not any(here.iterdir())


def test_a_gpu_where_there_is_none(place: Path, here: Path) -> None:
    """The command line never asks for one by name; a caller of the library may."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    corpus = read_corpus(place / "test.csv")
    with pytest.raises(ConfigError, match="no GPU that torch can use"):
        dump(corpus, teacher=str(place / "teacher"), out=here / "cache", device="cuda")
    options = TeacherOptions(device="cuda")
    with pytest.raises(ConfigError, match="no GPU that torch can use"):
        train_teacher(corpus, model=str(place / "base"), out=here / "teacher", options=options)
    assert not any(here.iterdir())


def test_what_is_no_cache(place: Path, here: Path, refuse: Any, call: Any) -> None:
    refuse("info", "nowhere", told="no cache at nowhere")
    refuse("info", place / "train.csv", told="train.csv")
    refuse("info", place / "bilstm", told="is not a cache")
    for name, told in (
        ("nowhere", "no cache at"),
        (place / "train.csv", "train.csv"),
        (place / "bilstm", "not a cache"),
    ):
        refuse("train-student", name, *BILSTM, "--out", "run", told=told)
        refuse("evaluate", place / "bilstm", place / "test.csv", "--cache", name, told=told)
    shutil.copytree(place / "cache", "cut")
    shard = Path("cut/logits/00000.arrow")
    shard.write_bytes(shard.read_bytes()[:-40])
    refuse("train-student", "cut", *BILSTM, "--out", "run", told="00000.arrow has .* bytes")
    shard.unlink()
    refuse("train-student", "cut", *BILSTM, "--out", "run", told="lacks 00000.arrow of field 'logits'")
    manifest = json.loads(Path("cut/manifest.json").read_text())
    Path("cut/manifest.json").write_text("{")
    refuse("info", "cut", told="manifest.json is damaged")
    unfinished = {"complete": False, "shard_rows": [], "shard_tokens": [], "join": "", "shards": {}}
    Path("cut/manifest.json").write_text(json.dumps(manifest | unfinished))
    refuse("train-student", "cut", *BILSTM, "--out", "run", told="is unfinished: give the same")
    assert call("info", "cut").code == 0
    assert not Path("run").exists() or not (Path("run") / "checkpoint").exists()


def test_a_cache_without_the_field_a_loss_needs(place: Path, here: Path, refuse: Any) -> None:
    for loss in ("kl", "mse_logits", "soft_cross_entropy"):
        told = rf"loss '{loss}' needs logits; cache .*hidden holds hidden\.01\. Add it with: .*--capture logits"
        refuse("train-student", place / "hidden", *BILSTM, "--loss", loss, "--out", "run", told=told)
    refuse("train-student", place / "hidden", "--student", "linear", "--out", "run", told="needs logits")
    refuse("evaluate", place / "bilstm", place / "train.csv", "--cache", place / "hidden", told="fidelity needs logits")
    assert not any(here.iterdir())


def test_a_student_that_does_not_fit(place: Path, here: Path, refuse: Any, call: Any) -> None:
    train = ["train-student", place / "cache", "--out", "run", "--cpu", "--epochs", 1]
    refuse(*train, "--student", "bilstn", told="no student 'bilstn'.* Did you mean 'bilstm'")
    refuse(*train, "--student", "bilstm", "--option", "hiden_size=3", told="Did you mean 'hidden_size'")
    refuse(*train, "--student", "linear", "--option", "layers=2", told="unknown key 'layers'")
    refuse(*train, "--student", "linear", "--loss", "kl", told="linear student is a regression")
    refuse(
        *train,
        "--student",
        "transformer",
        "--option",
        "vocab_size=9",
        told="it follows from the tokenizer and the classes",
    )
    start = ["--student", "transformer", "--option", f"init_from={place / 'teacher'}"]
    refuse(*train, *start, "--option", "hidden_size=16", told="16|width|size")
    refuse(*train, *start, "--option", "init_layers=[9]", told="9")
    refuse(*train, "--student", "transformer", "--option", "init_from=nowhere", told="nowhere")
    refuse(*train, "--student", "transformer", "--option", f"config={place}", told="config.json")
    refuse(*train, "--student", "transformer", "--option", "max_position_embeddings=4", told="max_position_embeddings")
    refuse(*train, "--student", "bilstm", *SMALL, "--lr", "1e30", told="smaller --lr than 1e")
    assert call(*train, *start, "--option", "layers=1").code == 0  # no failure above bound the folder


def test_an_output_folder_in_use(place: Path, here: Path, refuse: Any, call: Any) -> None:
    for name in ("cache", "bilstm", "teacher"):
        shutil.copytree(place / name, name)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    Path("file").write_text("a file")
    before = contents(here)
    dumping = ["dump", place / "train.csv", "--teacher", place / "teacher"]
    refuse(*dumping, "--out", "cache", "--max-length", 8, told="max_length was 64 and is now 8")
    refuse("dump", place / "test.csv", *dumping[2:], "--out", "cache", told="corpus.* was .* and is now")
    refuse(*dumping, "--out", "cache", "--no-text", told="text was True and is now False")
    training = ["train-student", place / "cache", *BILSTM]
    refuse(*training, "--out", "bilstm", told="holds a finished run")
    teaching = ["train-teacher", place / "test.csv", "--model", place / "base", "--epochs", 1, "--cpu"]
    refuse(*teaching, "--out", "teacher", told="no teacher of this softlabels")
    for name, told in (
        ("mine", "thesis.txt|already there"),
        ("file", "file"),
        ("file/below", "file"),
        ("cache", "not empty|finished|another|already"),
    ):
        refuse(*training, "--out", name, told=told)
        refuse(*teaching, "--out", name, told=told)
        if name != "cache":
            refuse(*dumping, "--out", name, told=told)
    refuse(*dumping, "--out", "bilstm", told="is not empty and no cache")
    refuse("run", "quickstart", "--out", "file", told="file")
    assert contents(here) == before
    assert call(*teaching, "--out", "new").code == 0
    refuse(*teaching[:-3], "--epochs", 2, "--cpu", "--out", "new", told="differs in epochs")


def test_an_unfinished_run_of_another_configuration(place: Path, here: Path, launcher: Launcher, refuse: Any) -> None:
    train = ["train-student", place / "cache", *BILSTM, "--out", here / "run"]
    first = here / "run" / "checkpoint" / "progress.json"
    done = launcher.run(*train, cwd=here, when=first.exists, signals=[signal.SIGKILL])
    assert done.code == -signal.SIGKILL
    before = contents(here)
    refuse(*train, told="holds an unfinished run: add --resume")
    refuse(*train, "--lr", "1e-2", "--resume", told="another configuration: lr was 0.001 and is now 0.01")
    assert contents(here) == before


def test_a_folder_that_another_process_writes(place: Path, here: Path, refuse: Any) -> None:
    Path("out").mkdir()
    with lock(Path("out")):
        for arguments in (
            ["dump", place / "train.csv", "--teacher", place / "teacher"],
            ["train-student", place / "cache", *BILSTM],
            ["run", "quickstart", "--set", f"corpus.source={place / 'train.csv'}"],
        ):
            refuse(*arguments, "--out", "out", told="out is being written by another process")
    assert not any(Path("out").iterdir())


def test_what_is_no_run(place: Path, here: Path, refuse: Any) -> None:
    shutil.copytree(place / "bilstm", "damaged")
    Path("damaged/config.json").write_text("{}")
    for name, told in (
        ("nowhere", "no run folder nowhere"),
        (place / "train.csv", "no run folder"),
        (place / "cache", "is a cache, not a run"),
        (place, "holds no finished run"),
        ("damaged", "config.json is not the file that was saved"),
    ):
        refuse("predict", name, "a text", told=told)
        refuse("evaluate", name, place / "test.csv", told=told)


def test_evaluate_with_a_cache_of_another_corpus(place: Path, here: Path, refuse: Any, call: Any) -> None:
    write_csv(here / "other.csv", [("quite another text", "food"), ("and one more", "sport")])
    refuse("evaluate", place / "bilstm", "other.csv", "--cache", place / "cache-test", told="no row of other.csv is in")
    names = ["food", "weather", "sport"]
    save_teacher(here / "turned", label_names=names)
    assert call("dump", place / "test.csv", "--teacher", "turned", "--out", "cache").code == 0
    refuse(
        "evaluate",
        place / "bilstm",
        place / "test.csv",
        "--cache",
        "cache",
        told="has the classes .*'weather', 'sport'",
    )


def test_texts_to_predict(
    place: Path, here: Path, launcher: Launcher, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(given: str) -> list[str]:
        done = launcher.run("predict", place / "bilstm", "-", "--json", cwd=here, given=given)
        assert done.code == 0, done.err
        return [json.loads(line)["text"] for line in done.out.removesuffix("\n").split("\n")]

    assert predict("rain\r\na\u2028goal\x0b\n\ufeffsoup") == ["rain", "a\u2028goal\x0b", "\ufeffsoup"]
    assert predict("\ufeffrain\n") == ["rain"]  # the mark with which some editors begin a file
    for given, told in (
        (b"", "needs texts, none of them empty"),
        (b"\n", "needs texts, none of them empty"),
        (b"rain\n\nsoup\n", "needs texts, none of them empty"),
        (b"rain\t \n", "needs texts, none of them empty"),
        (b"rain\ncaf\xe9\n", r"not UTF-8 \(byte 8\)"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        refuse("predict", place / "bilstm", "-", told=told)
    refuse("predict", place / "bilstm", "\udcff", told="not UTF-8")
    refuse("predict", place / "bilstm", told="Missing argument")


# ----------------------------------------------------------------------------------------- a machine that says no


@pytest.fixture
def foreign(place: Path) -> Iterator[Path]:
    """A folder in which this process may not write, nor read `secret.csv`: it belongs to root, or is closed."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    for name in ("cache", "teacher", "base", "bilstm"):
        shutil.copytree(place / name, folder / name)
    shutil.copy(place / "test.csv", folder)
    shutil.copy(place / "test.csv", folder / "secret.csv")
    (folder / "secret.csv").chmod(0)
    (folder / "cache" / "logits" / "00000.arrow").chmod(0)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_permission_denied(foreign: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTLABELS_QUIET", "1")
    monkeypatch.chdir(foreign)
    told = "(?i)permission"
    refuse("dump", "secret.csv", "--teacher", "teacher", "--out", "new", told=told)
    refuse("dump", "test.csv", "--teacher", "teacher", "--out", "new", told=told)
    refuse("train-teacher", "test.csv", "--model", "base", "--out", "new", "--epochs", 1, told=told)
    refuse("train-student", "cache", *BILSTM, "--out", "new", told=told)
    refuse("evaluate", "bilstm", "secret.csv", told=told)
    refuse("run", "quickstart", "--out", "new", told=told)


def finish_dump(launcher: Launcher, place: Path, out: Path, **limits: Any) -> Finished:
    captures = ["--capture", "logits", "--capture", "hidden:all", "--shard-rows", 8]
    return launcher.run(
        "dump", place / "train.csv", "--teacher", place / "teacher", "--out", out, *captures, cwd=place, **limits
    )


def tidy(done: Finished, *, told: str) -> bool:
    """One message, exit code 2, and no traceback."""
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err, done
    assert len(re.findall("^error:", done.err, re.M)) == 1 and re.search(told, done.err), done.err
    return True


@pytest.fixture(scope="module")
def whole_dump(launcher: Launcher, place: Path) -> dict[str, str]:
    """What `finish_dump` leaves when nothing goes wrong."""
    assert finish_dump(launcher, place, place / "whole").code == 0
    return contents(place / "whole")


FULL = "disk is full|larger than is allowed|No space left|File too large"


@pytest.mark.parametrize("most", [300, 5000])
def test_files_that_may_not_grow(
    place: Path, tmp_path: Path, launcher: Launcher, whole_dump: dict[str, str], most: int
) -> None:
    """The system refuses to write on, wherever that is; with room again the same commands finish."""
    assert tidy(finish_dump(launcher, place, tmp_path / "cache", largest_file=most), told=FULL)
    assert finish_dump(launcher, place, tmp_path / "cache").code == 0
    train = ["train-student", place / "cache", *BILSTM, "--out", tmp_path / "run", "--resume"]
    assert tidy(launcher.run(*train, cwd=place, largest_file=most), told=f"({FULL}).*")
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert launcher.run(*train, cwd=place).code == 0
    teach = ["train-teacher", place / "test.csv", "--model", place / "base", "--out", tmp_path / "t", "--epochs", 1]
    assert tidy(launcher.run(*teach, "--cpu", cwd=place, largest_file=most), told=FULL)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "run"}
    assert contents(tmp_path / "cache") == whole_dump
    assert read_record(tmp_path / "run").files == read_record(place / "bilstm").files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A real file system of a given size; skips where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        subprocess.run(["umount", str(folder)], capture_output=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if made.returncode:
            pytest.skip(f"no small disk can be mounted here: {made.stderr.decode().strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here")
    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_full_disk_loses_nothing(
    place: Path,
    launcher: Launcher,
    whole_dump: dict[str, str],
    small_disk: Callable[[str], Path],
) -> None:
    disk = small_disk("1000k")
    (disk / "ballast").write_bytes(bytes(750_000))
    assert tidy(finish_dump(launcher, place, disk / "cache"), told="the disk is full.* make room")
    done = len(list((disk / "cache").glob("logits/*.json")))
    assert done > 0, "nothing was committed before the disk was full"
    (disk / "ballast").unlink()
    again = finish_dump(launcher, place, disk / "cache")
    assert again.code == 0 and re.search(rf"^new rows +{60 - 8 * done}$", again.out, re.M), again
    assert contents(disk / "cache") == whole_dump


@pytest.mark.parametrize("size", ["40k", "120k", "180k", "260k"])
def test_a_disk_that_fills_while_a_student_is_trained(
    place: Path, launcher: Launcher, small_disk: Callable[[str], Path], size: str
) -> None:
    """Also during the second checkpoint, when the first one is there: training goes on from it."""
    disk = small_disk(size)
    train = ["train-student", place / "cache", *BILSTM, "--out", disk / "run", "--resume"]
    assert tidy(launcher.run(*train, cwd=place), told="can't be written to .* MB free|disk is full|No space left")
    assert not list(disk.glob("run/.tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    assert launcher.run(*train, cwd=place).code == 0
    assert read_record(disk / "run").files == read_record(place / "bilstm").files


# ---------------------------------------------------------------------------------------------------------- Ctrl-C


def stopped(done: Finished) -> None:
    """One line says that it was stopped, and nothing looks like a fault."""
    assert done.code == 130, done
    assert "Traceback" not in done.err and "Exception ignored" not in done.err and "error" not in done.err, done.err
    told = "^stopped. What was committed is kept: give the same command again( with --resume)? to go on$"
    assert len(re.findall(told, done.err, re.M)) == 1, done.err


@pytest.mark.parametrize("library", ["numpy", "libtorch", "pyarrow"])
def test_ctrl_c_while_libraries_are_imported(place: Path, tmp_path: Path, library: str) -> None:
    process = subprocess.Popen(
        command("dump", place / "train.csv", "--teacher", place / "teacher", "--out", tmp_path / "cache"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and not re.search(library, maps.read_text()):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    stopped(Finished(process.returncode, out, err))


def test_ctrl_c_before_the_command_line_is_there() -> None:
    script = """
import os, signal, sys
class Early:
    def find_spec(name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Early)
from softlabels.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("shards", [0, 1, 4, 7])
def test_ctrl_c_during_a_dump(
    place: Path, tmp_path: Path, launcher: Launcher, whole_dump: dict[str, str], shards: int
) -> None:
    """Pressed again and again, too."""
    out = tmp_path / "cache"

    def there() -> bool:
        return out.exists() and len(list(out.glob("logits/*.json"))) >= shards

    done = finish_dump(launcher, place, out, when=there, signals=[signal.SIGINT] * (1 + shards))
    stopped(done)
    assert finish_dump(launcher, place, out).code == 0
    assert contents(out) == whole_dump


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("options.json", signal.SIGINT),
        ("tensorboard", signal.SIGINT),
        (".tmp-checkpoint/model.safetensors", signal.SIGINT),
        (".tmp-checkpoint/model.safetensors", signal.SIGKILL),
        ("checkpoint/progress.json", signal.SIGINT),
        (".tmp-run", signal.SIGINT),
        (".tmp-run", signal.SIGKILL),
    ],
)
def test_a_training_that_is_stopped_goes_on_to_the_same_student(
    place: Path, tmp_path: Path, launcher: Launcher, moment: str, number: signal.Signals
) -> None:
    train = ["train-student", place / "cache", *BILSTM, "--out", tmp_path / "run", "--resume"]
    done = launcher.run(*train, cwd=place, when=(tmp_path / "run" / moment).exists, signals=[number])
    if done.code == 0:
        pytest.skip("the training was over before the signal came")
    if number == signal.SIGINT:
        stopped(done)
    was_whole = (tmp_path / "run" / "run.json").exists()  # the signal came after the last file
    assert launcher.run(*train, cwd=place).code == (2 if was_whole else 0)
    assert read_record(tmp_path / "run").files == read_record(place / "bilstm").files
    left = {path.name for path in (place / "bilstm").iterdir()} - {"evaluations"}  # of what other tests asked of it
    assert {path.name for path in (tmp_path / "run").iterdir()} == left


def test_ctrl_c_while_a_teacher_is_trained_leaves_nothing_half(place: Path, tmp_path: Path, launcher: Launcher) -> None:
    teach = ["train-teacher", place / "test.csv", "--model", place / "base", "--out", tmp_path / "t", "--epochs", 3]
    begun = time.monotonic()
    done = launcher.run(
        *teach, "--cpu", cwd=place, when=lambda: time.monotonic() > begun + 0.3, signals=[signal.SIGINT]
    )
    if done.code == 0:
        pytest.skip("the training was over before the signal came")
    stopped(done)
    assert not any(tmp_path.iterdir())
    assert launcher.run(*teach, "--cpu", cwd=place).code == 0


def test_ctrl_c_at_the_very_end_does_not_garble_it(place: Path, tmp_path: Path, launcher: Launcher) -> None:
    written = launcher.folder / "out"
    done = launcher.run(
        "info",
        place / "cache",
        "--json",
        cwd=tmp_path,
        when=lambda: written.stat().st_size > 0,
        signals=[signal.SIGINT] * 3,
    )
    assert done.code in (0, 130) and "Traceback" not in done.err and "Exception" not in done.err
