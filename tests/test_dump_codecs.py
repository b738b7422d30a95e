"""Every codec through a whole dump: what is stored, what is counted, and that stopping changes nothing."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from softlabels.cache import open_cache
from softlabels.cli import _guarded
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import DumpReport, dump
from softlabels.errors import CacheError, ConfigError
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

CAPTURES = ["logits", "hidden:0,2", "hidden:2@cls", "qkv:1"]
BOUNDS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3, "int8": 0.03}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def loud(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same teacher with embeddings of a hundred thousand: beyond float16, and normalised again a layer later."""
    folder = tmp_path_factory.mktemp("loud") / "teacher"
    shutil.copytree(teacher, folder)
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.mul_(1e5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rows = [Example(f"row-{i}", text, None, name) for i, (text, name) in enumerate(TEXTS[:40])]
    return Corpus(source="made", split=None, examples=rows, label_names=LABEL_NAMES)


def dump_with(teacher: Path, corpus: Corpus, out: Path, **changes) -> DumpReport:
    options = DumpOptions.model_validate({"capture": CAPTURES, "shard_rows": 16, "batch_tokens": 128} | changes)
    return dump(corpus, teacher=str(teacher), out=out, options=options, device="cpu")


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("codec", BOUNDS)
def test_each_codec_gives_back_what_the_teacher_said(teacher: Path, corpus: Corpus, tmp_path: Path, codec: str) -> None:
    dump_with(teacher, corpus, tmp_path / "exact", codec="float32")
    report = dump_with(teacher, corpus, tmp_path / codec, codec=codec)
    assert report.clipped == {}
    exact, cache = open_cache(tmp_path / "exact"), open_cache(tmp_path / codec)
    rows = np.arange(len(cache))
    wanted, got = exact.signals(rows, list(exact.fields)), cache.signals(rows, list(cache.fields))
    assert torch.equal(got.logits, wanted.logits)
    for field in cache.fields.keys() - {"logits"}:
        error = (got.get(field) - wanted.get(field)).norm() / wanted.get(field).norm()
        assert float(error) < BOUNDS[codec], field


def test_what_was_clipped_is_counted_over_stops_and_resumes(
    loud: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dump_with(loud, corpus, tmp_path / "whole", capture=["logits", "hidden:0,2"], overflow="clip")
    dump_with(loud, corpus, tmp_path / "exact", capture=["hidden:0"], codec="float32")
    states = open_cache(tmp_path / "exact").signals(np.arange(len(corpus.examples)), ["hidden.00"]).hidden(0)
    beyond = int((states.abs() > 65_504).sum())
    assert beyond > 100 and whole.clipped == {"hidden.00": beyond}
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("softlabels.cache.build.write_examples", stopping_after(1))
            with pytest.raises(KeyboardInterrupt):
                dump_with(loud, corpus, tmp_path / "broken", capture=["logits", "hidden:0,2"], overflow="clip")
    resumed = dump_with(loud, corpus, tmp_path / "broken", capture=["logits", "hidden:0,2"], overflow="clip")
    assert 0 < resumed.new_rows < resumed.rows
    assert resumed.clipped == whole.clipped
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def stopping_after(shards: int):
    """`write_examples` that lets so many shards begin, then behaves as Ctrl-C does."""
    from softlabels.cache.writer import write_examples

    begun: list[int] = []

    def write(*arguments, **named):
        if len(begun) == shards:
            raise KeyboardInterrupt
        begun.append(1)
        return write_examples(*arguments, **named)

    return write


def test_int8_is_the_same_bytes_after_a_stop(
    teacher: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump_with(teacher, corpus, tmp_path / "whole", codec="int8")
    with monkeypatch.context() as patch:
        patch.setattr("softlabels.cache.build.write_examples", stopping_after(2))
        with pytest.raises(KeyboardInterrupt):
            dump_with(teacher, corpus, tmp_path / "broken", codec="int8")
    dump_with(teacher, corpus, tmp_path / "broken", codec="int8")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_too_large_values_are_refused_and_clipping_may_go_on_from_there(
    loud: Path, corpus: Corpus, tmp_path: Path
) -> None:
    """`--overflow` is no part of what a cache is: where nothing is clipped, both give the same bytes."""
    with pytest.raises(CacheError, match=r"'hidden\.00' has values beyond ±65504.*--overflow clip"):
        dump_with(loud, corpus, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*.tmp*"))
    assert dump_with(loud, corpus, tmp_path / "cache", overflow="clip").clipped["hidden.00"] > 100


def test_maps_as_int8_are_refused_before_anything_is_written(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--codec int8.*attention maps.*qkv"):
        dump_with(teacher, corpus, tmp_path / "cache", capture=["logits", "attention:1"], codec="int8")
    assert not (tmp_path / "cache").exists()


def test_the_command_takes_them(loud: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text for text, _ in TEXTS[:10]) + "\n")
    command = f"dump {texts} --teacher {loud} --out {tmp_path / 'cache'} --capture hidden:0 --cpu"
    assert _guarded([*command.split(), "--codec", "float16"], debug=False) == 2
    assert "--overflow clip" in capsys.readouterr().err
    assert _guarded([*command.split(), "--codec", "float16", "--overflow", "clip"], debug=False) == 0
    said = capsys.readouterr()
    assert "values of hidden.00 were beyond what float16 holds and were clipped" in said.err
    assert _guarded(["info", str(tmp_path / "cache"), "--json"], debug=False) == 0
    assert '"clipped"' in capsys.readouterr().out
    assert _guarded([*command.split(), "--codec", "float8"], debug=False) == 2
    assert "codec" in capsys.readouterr().err
    assert _guarded([*command.split(), "--overflow", "wrap"], debug=False) == 2
