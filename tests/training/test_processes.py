"""Several processes that train one student, as `accelerate launch` starts them: as one process would, to rounding."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.runs import load_run
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher
from tests.processes import ROOT, environment
from tests.test_tasks import save
from tests.training.train_in_processes import CASES, train_case

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop")


def launch(*arguments: object, count: int, launcher: str = "torch.distributed.run") -> subprocess.CompletedProcess[str]:
    """`arguments` in so many processes of this machine, which talk over loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    how = {
        "torch.distributed.run": [f"--nproc_per_node={count}", f"--master_port={port}"],
        "accelerate.commands.launch": ["--multi_gpu", f"--num_processes={count}", f"--main_process_port={port}"],
    }
    command = [sys.executable, "-m", launcher, *how[launcher], *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def without_dropout(folder: Path) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {name: 0.0 for name in DROPOUTS if name in config}))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of everything of 41 rows, few labelled, one of a language model, and both teachers."""
    folder = tmp_path_factory.mktemp("processes")
    teacher = without_dropout(save_teacher(folder / "teacher"))
    rows = [Example(str(i), text, None, None if i % 4 else name) for i, (text, name) in enumerate(TEXTS)][:41]
    corpus = Corpus("made", None, rows, list(LABEL_NAMES))
    everything = DumpOptions(capture=["logits", "hidden:all", "qkv:all"], codec="float32", shard_rows=16)
    dump(corpus, teacher=str(teacher), out=folder / "cache", options=everything)
    language = without_dropout(save(folder / "language", "GPT2LMHeadModel"))
    bare = Corpus("made", None, [Example(row.id, row.text) for row in rows], None)
    words = DumpOptions(capture=["vocab:topk=16,samples=2"], codec="float32")
    dump(bare, teacher=str(language), out=folder / "language-cache", options=words)
    return folder


@pytest.fixture(scope="module")
def together(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes."""
    out = tmp_path_factory.mktemp("together")
    done = launch("-m", "tests.training.train_in_processes", place, out, count=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(place: Path, together: Path, tmp_path: Path, name: str) -> None:
    train_case(name, place, tmp_path / "alone")
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "alone", together / name))
    start = load_file(place / CASES[name]["options"]["init_from"] / "model.safetensors") if name != "rows" else {}
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5)
        assert key not in start or one[key].shape != start[key].shape or not torch.equal(one[key], start[key])
    records = [load_run(folder).record for folder in (tmp_path / "alone", together / name)]
    for own, shared in zip(records[0].history, records[1].history, strict=True):
        assert shared == pytest.approx(own, rel=1e-4)
    assert records[0].train_rows == records[1].train_rows and records[0].best_epoch == records[1].best_epoch
    assert not (together / name / "checkpoint").exists()


def test_they_go_on_after_a_stop(together: Path) -> None:
    one, two = (load_file(together / name / "model.safetensors") for name in ("layers", "resumed"))
    for key in one:
        assert torch.equal(one[key], two[key]), key


def test_gradients_of_unlike_parameters_are_added_by_place(together: Path) -> None:
    for rank in (0, 1):
        assert json.loads((together / f"sums-{rank}.json").read_text()) == [[1.0, 1.0], [2.0, 2.0], None]


def test_when_one_ends_the_others_do_and_say_so(together: Path) -> None:
    told = [(together / f"told-{rank}.txt").read_text() for rank in (0, 1)]
    assert "process 1 of 2 cannot go on: another one has ended" in told[0]
    assert "checkpoint of epoch 1 can't be written" in told[1] and "No space left on device" in told[1]


@pytest.mark.slow
def test_the_command_under_accelerate(place: Path, tmp_path: Path) -> None:
    train = ["train-student", place / "cache", "--student", "bilstm", "--loss", "kl=1", "--epochs", "1", "--cpu"]
    done = launch(
        "-m", "softlabels", *train, "--out", tmp_path / "run", "--json", count=2, launcher="accelerate.commands.launch"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)  # of one process: the other says nothing
    assert report["rows"] == 37 and load_run(tmp_path / "run").record.train_rows == 37
    assert done.stderr.count("train bilstm: 2/2 steps") == 1


@pytest.mark.slow
def test_what_takes_one_process_is_told(place: Path, tmp_path: Path) -> None:
    train = ["train-student", place / "cache", "--student", "linear", "--cpu", "--out", tmp_path / "run"]
    done = launch("-m", "softlabels", *train, count=2)
    assert done.returncode != 0
    assert "a linear student is trained in one process, and this is one of 2" in done.stderr
