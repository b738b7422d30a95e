"""The dump against the live teacher, and against itself: killed and resumed, batched otherwise, extended later."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.cache import open_cache
from softlabels.cache.files import lock
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError, CorpusError, TeacherError
from softlabels.teacher import load_teacher
from softlabels.tokens import pad_batch, tokenize
from softlabels.types import Example
from tests.models import TEXTS, save_teacher

CAPTURES = ["logits", "hidden:0,2", "hidden:2@cls", "qkv:1", "attention:2"]


def corpus_of(examples: Sequence[Example]) -> Corpus:
    names = sorted({str(example.label) for example in examples if example.label is not None})
    return Corpus(source="made", split=None, examples=examples, label_names=names or None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rows = [Example(f"row-{i}", text, None, name if i % 3 else None) for i, (text, name) in enumerate(TEXTS)]
    return corpus_of(rows)


def options(**changes: Any) -> DumpOptions:
    usual = {"capture": CAPTURES, "shard_rows": 16, "batch_tokens": 128, "codec": "float32"}
    return DumpOptions.model_validate(usual | changes)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_cache_equals_the_live_teacher(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    report = dump(corpus, teacher=str(teacher), out=tmp_path / "cache", options=options())
    assert (report.rows, report.new_rows, report.truncated) == (len(corpus.examples), len(corpus.examples), 0)
    cache, live = open_cache(tmp_path / "cache"), load_teacher(str(teacher))
    live.model.set_attn_implementation("eager")
    assert cache.ids == [example.id for example in corpus.examples]
    tokens = tokenize(live.tokenizer, corpus.examples, max_length=64).examples
    for row in (0, 7, 16, 31, len(tokens) - 1):
        one = pad_batch([tokens[row]], pad_token_id=0)
        with torch.no_grad():
            wanted = live.model(**one.model_inputs(), output_hidden_states=True, output_attentions=True)
        got = cache.signals(np.array([row]), list(cache.fields))
        assert torch.equal(cache.tokens(np.array([row])).input_ids, one.input_ids)
        assert torch.allclose(got.logits, wanted.logits, atol=1e-5)
        assert torch.allclose(got.hidden(0), wanted.hidden_states[0], atol=1e-5)
        assert torch.allclose(got.hidden(2), wanted.hidden_states[2], atol=1e-5)
        assert torch.allclose(got.get("hidden.02@cls"), wanted.hidden_states[2][:, 0], atol=1e-5)
        assert torch.allclose(got.get("attention.02"), wanted.attentions[1], atol=1e-5)
        scores = got.query(1) @ got.key(1).transpose(-1, -2) / got.query(1).shape[-1] ** 0.5
        assert torch.allclose(scores.softmax(-1), wanted.attentions[0], atol=1e-5)


def test_labels_and_texts_are_kept(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    dump(corpus, teacher=str(teacher), out=tmp_path / "cache", options=options(capture=["logits"]))
    cache = open_cache(tmp_path / "cache")
    names = cache.label_names
    for example, label, text in zip(corpus.examples, cache.labels, cache.texts(), strict=True):
        assert text == (example.text, None)
        assert (names[label] if label >= 0 else None) == example.label


def test_two_dumps_are_the_same_bytes(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    for name in ("one", "two"):
        dump(corpus, teacher=str(teacher), out=tmp_path / name, options=options())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_finished_dump_is_left_alone(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    dump(corpus, teacher=str(teacher), out=out, options=options())
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert dump(corpus, teacher=str(teacher), out=out, options=options()).new_rows == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_field_added_later_touches_nothing_else(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    dump(corpus, teacher=str(teacher), out=out, options=options(capture=["logits"]))
    before = contents(out)
    dump(corpus, teacher=str(teacher), out=out, options=options(capture=["hidden:1"]))
    after = contents(out)
    assert {name: after[name] for name in before if name not in ("manifest.json", "receipt.json")} == {
        name: value for name, value in before.items() if name not in ("manifest.json", "receipt.json")
    }
    assert set(open_cache(out).fields) == {"logits", "hidden.01"}
    dump(corpus, teacher=str(teacher), out=tmp_path / "once", options=options(capture=["logits", "hidden:1"]))
    assert contents(tmp_path / "once") == after


def test_lost_shards_alone_are_done_again(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    dump(corpus, teacher=str(teacher), out=out, options=options())
    before = contents(out)
    (out / "logits" / "00001.json").unlink()
    (out / "hidden.02" / "00002.arrow").unlink()
    (out / "query.01" / ".tmp-00000.arrow").write_bytes(b"half")
    report = dump(corpus, teacher=str(teacher), out=out, options=options())
    assert report.new_rows == 32 and contents(out) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shard_rows": 8}, "dump.shard_rows was 16 and is now 8"),
        ({"max_length": 20}, "dump.max_length was 64 and is now 20"),
        ({"text": False}, "dump.text was True and is now False"),
        ({"codec": "float16"}, "field hidden.00 is there as float32"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(
    teacher: Path, corpus: Corpus, tmp_path: Path, change: dict, told: str
) -> None:
    dump(corpus, teacher=str(teacher), out=tmp_path / "cache", options=options())
    before = contents(tmp_path / "cache")
    with pytest.raises(CacheError, match=told):
        dump(corpus, teacher=str(teacher), out=tmp_path / "cache", options=options(**change))
    assert contents(tmp_path / "cache") == before


def test_another_teacher_or_corpus_is_refused(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    dump(corpus, teacher=str(teacher), out=tmp_path / "cache", options=options())
    other = save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(CacheError, match=r"teacher\.weights_hash"):
        dump(corpus, teacher=str(other), out=tmp_path / "cache", options=options())
    with pytest.raises(CacheError, match=r"corpus\.hash"):
        dump(corpus_of(corpus.examples[:-1]), teacher=str(teacher), out=tmp_path / "cache", options=options())


def test_a_folder_of_something_else_is_refused(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CacheError, match=r"no cache .*thesis\.txt"):
        dump(corpus, teacher=str(teacher), out=tmp_path, options=options())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_two_dumps_at_once_exclude_each_other(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(CacheError, match="another process"):
        dump(corpus, teacher=str(teacher), out=tmp_path, options=options())


def test_pairs_keep_their_token_types(teacher: Path, tmp_path: Path) -> None:
    rows = [Example(str(i), text, TEXTS[-i - 1][0], None) for i, (text, _) in enumerate(TEXTS[:10])]
    dump(corpus_of(rows), teacher=str(teacher), out=tmp_path / "cache", options=options())
    cache, live = open_cache(tmp_path / "cache"), load_teacher(str(teacher))
    batch = cache.tokens(np.arange(10))
    assert batch.token_type_ids is not None and set(batch.token_type_ids.unique().tolist()) == {0, 1}
    with torch.no_grad():
        logits = live.model(**batch.model_inputs()).logits
    assert torch.allclose(cache.signals(np.arange(10), ["logits"]).logits, logits, atol=1e-5)
    assert cache.texts()[3] == (rows[3].text, rows[3].text_b)


def test_long_texts_are_cut_and_counted(teacher: Path, tmp_path: Path) -> None:
    rows = [Example("short", "rain today"), Example("long", "rain and wind " * 100)]
    report = dump(corpus_of(rows), teacher=str(teacher), out=tmp_path / "cache", options=options())
    assert report.truncated == 1
    cache = open_cache(tmp_path / "cache")
    assert cache.manifest.corpus.truncated == 1 and cache.lengths.max() == 64


def test_float16_holds_its_precision(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    for codec in ("float32", "float16"):
        dump(
            corpus,
            teacher=str(teacher),
            out=tmp_path / codec,
            options=options(codec=codec, capture=["logits", "hidden:2"]),
        )
    rows = np.arange(20)
    exact, half = (
        open_cache(tmp_path / codec).signals(rows, ["logits", "hidden.02"]) for codec in ("float32", "float16")
    )
    assert torch.equal(exact.logits, half.logits)  # logits are float32 whatever the codec
    assert torch.allclose(exact.hidden(2), half.hidden(2), rtol=2**-11, atol=1e-7)


def spoil(teacher: Path, out: Path, change) -> Path:
    """A copy of the teacher with other weights."""
    live = load_teacher(str(teacher))
    with torch.no_grad():
        change(live.model)
    live.model.save_pretrained(out)
    live.tokenizer.save_pretrained(out)
    return out


def test_nan_logits_are_told_with_their_rows_and_keep_what_was_done(
    teacher: Path, corpus: Corpus, tmp_path: Path
) -> None:
    def change(model) -> None:
        word = load_teacher(str(teacher)).tokenizer("snow", add_special_tokens=False)["input_ids"][0]
        model.bert.embeddings.word_embeddings.weight[word] = torch.nan

    broken = spoil(teacher, tmp_path / "broken", change)
    ids = [example.id for example in corpus.examples if "snow" in example.text]
    assert ids, "the test texts need a row about snow"
    with pytest.raises(CacheError, match=r"NaN or infinite values in field 'logits' for example\(s\) .*row-"):
        dump(corpus, teacher=str(broken), out=tmp_path / "cache", options=options(capture=["logits"]))
    leftovers = [path for path in (tmp_path / "cache").rglob(".tmp-*")]
    assert leftovers == []


def test_values_beyond_float16_are_refused_not_stored_as_infinity(
    teacher: Path, corpus: Corpus, tmp_path: Path
) -> None:
    huge = spoil(teacher, tmp_path / "huge", lambda m: m.bert.encoder.layer[1].output.LayerNorm.weight.mul_(1e6))
    with pytest.raises(CacheError, match=r"beyond ±65504, which float16 cannot hold.*--codec float32"):
        dump(corpus, teacher=str(huge), out=tmp_path / "cache", options=options(codec="float16", capture=["hidden:2"]))
    dump(corpus, teacher=str(huge), out=tmp_path / "wide", options=options(capture=["hidden:2"]))


def test_faults_are_told_before_the_teacher_runs(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has 0 to 2"):
        dump(corpus, teacher=str(teacher), out=tmp_path / "a", options=options(capture=["hidden:9"]))
    with pytest.raises(ConfigError, match="at most 64"):
        dump(corpus, teacher=str(teacher), out=tmp_path / "b", options=options(max_length=500))
    with pytest.raises(CorpusError, match="no rows"):
        dump(corpus_of([]), teacher=str(teacher), out=tmp_path / "c", options=options())
    with pytest.raises(CorpusError, match="twice"):
        dump(corpus_of([corpus.examples[0]] * 2), teacher=str(teacher), out=tmp_path / "d", options=options())
    with pytest.raises(CorpusError, match="hockey"):
        rows = [Example("0", "a", None, "hockey")]
        dump(corpus_of(rows), teacher=str(teacher), out=tmp_path / "e", options=options())
    assert not any((tmp_path / name).exists() for name in "abcde")


def test_a_batch_budget_below_a_row_is_refused(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--batch-tokens 3 is below"):
        dump(corpus, teacher=str(teacher), out=tmp_path / "cache", options=options(batch_tokens=3))


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of many shapes, one row among them; Q, K and V are taken all the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    teacher = save_teacher(tmp_path / "teacher", layers=1)
    captures, few = ["logits", "hidden:all", "qkv:1"], corpus_of(corpus.examples[:33])
    for name in (False, True):
        given = options(capture=captures, compile=name)
        dump(few, teacher=str(teacher), out=tmp_path / str(name), options=given, device="cpu")
    plain, compiled = open_cache(tmp_path / "False"), open_cache(tmp_path / "True")
    rows = np.arange(len(plain))
    one, other = plain.signals(rows, list(plain.fields)), compiled.signals(rows, list(plain.fields))
    for field in plain.fields:
        assert torch.allclose(one.get(field), other.get(field), atol=1e-5), field


@pytest.mark.slow
def test_a_teacher_that_cannot_be_compiled_is_told(
    teacher: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(TeacherError, match="leave out --compile"):
        dump(corpus, teacher=str(teacher), out=tmp_path / "cache", options=options(compile=True), device="cpu")
    assert list((tmp_path / "cache").rglob(".tmp-*")) == []


KILLED = """
import sys, json
from softlabels.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow  # the durability tests kill dumps in every run
def test_a_killed_dump_goes_on_to_the_same_bytes(teacher: Path, corpus: Corpus, tmp_path: Path) -> None:
    """The real process, killed by SIGKILL at several moments, then let finish."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"id": e.id, "text": e.text, **({"label": e.label} if e.label else {})} for e in corpus.examples]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def command(out: Path) -> list[str]:
        arguments = ["dump", str(rows), "--teacher", str(teacher), "--out", str(out), "--shard-rows", "4", "--cpu"]
        return [sys.executable, "-c", KILLED, *arguments, "--capture", "logits", "--capture", "hidden:1,2"]

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment, capture_output=True)
    out, kills, shards = tmp_path / "killed", 0, len(corpus.examples) // 4
    for goal in (1, shards // 3, shards // 2, shards - 2):
        process = subprocess.Popen(command(out), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("logits/*.json"))) < goal:
            time.sleep(0.001)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 2, "the dump was too fast to be killed"
    subprocess.run(command(out), check=True, env=environment, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")
