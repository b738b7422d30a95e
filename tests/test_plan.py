"""What a plan says of a dump, against the dump."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.cache import open_cache
from softlabels.cli import _guarded
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError, CorpusError, SoftlabelsError, TeacherError
from softlabels.plan import Plan, plan_dump
from softlabels.teacher import load_teacher
from softlabels.types import Example
from tests.models import TEXTS
from tests.test_tasks import save

CAPTURES = ["logits", "hidden:0-2", "hidden:2@mean", "qkv:1", "attention:1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("t") / "t", "BertForSequenceClassification", num_labels=3)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("t") / "t", "GPT2LMHeadModel")


def corpus_of(count: int) -> Corpus:
    """Rows of one to four sentences, the long ones last: a sample of the first would mislead."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        sentences = rng.choice(len(TEXTS), size=1 + 4 * i // count, replace=False)
        rows.append(Example(f"row-{i}", " ".join(TEXTS[number][0] for number in sentences)))
    return Corpus(source="made", split=None, examples=rows, label_names=None)


def plan(corpus: Corpus, teacher: Path, *, sample: int = 2000, epochs: int = 10, **options: Any) -> Plan:
    made = DumpOptions.model_validate({"shard_rows": 64} | options)
    return plan_dump(corpus, teacher=str(teacher), options=made, sample=sample, epochs=epochs, device="cpu")


def real_sizes(corpus: Corpus, teacher: Path, out: Path, **options: Any) -> dict[str, int]:
    made = DumpOptions.model_validate({"shard_rows": 64} | options)
    dump(corpus, teacher=str(teacher), out=out, options=made, device="cpu")
    return {name: table.total for name, table in open_cache(out).manifest.shards.items()}


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_bytes_are_those_of_the_dump(teacher: Path, tmp_path: Path, codec: str) -> None:
    capture = CAPTURES if codec != "int8" else CAPTURES[:-1]
    corpus = corpus_of(300)
    found = plan(corpus, teacher, sample=100, capture=capture, codec=codec)
    real = real_sizes(corpus, teacher, tmp_path / "c", capture=capture, codec=codec)
    assert found.fields.keys() == real.keys() and (found.rows, found.sampled) == (300, 100)
    for name, size in real.items():
        assert found.fields[name] == pytest.approx(size, rel=0.03), name
    on_disk = sum(path.stat().st_size for path in (tmp_path / "c").rglob("*") if path.parent.name in found.fields)
    assert found.bytes == pytest.approx(on_disk, rel=0.03)
    assert found.tokens == pytest.approx(open_cache(tmp_path / "c").lengths.sum(), rel=0.03)


@pytest.mark.parametrize(
    "capture", ["vocab:exact", "vocab:topk=16,samples=2", "vocab:topk=16,samples=2,packed", "vocab:topk=16,factors=8"]
)
def test_bytes_of_language_models(language_model: Path, tmp_path: Path, capture: str) -> None:
    corpus = corpus_of(120)
    found = plan(corpus, language_model, sample=50, capture=[capture])
    real = real_sizes(corpus, language_model, tmp_path / "c", capture=[capture])
    assert {name: pytest.approx(size, rel=0.03) for name, size in real.items()} == found.fields
    beside = sum(path.stat().st_size for path in (tmp_path / "c" / "teacher").glob("*.safetensors"))  # head, factors
    assert (beside > 0) == ("exact" in capture or "factors" in capture)
    assert found.bytes - sum(found.fields.values()) == pytest.approx(beside, abs=5000)  # receipts


def test_bytes_of_maskings(tmp_path: Path) -> None:
    folder = save(tmp_path / "t", "BertForMaskedLM")
    options: dict[str, Any] = {"capture": ["vocab:topk=16"], "masking": {"times": 3}}
    found = plan(corpus_of(40), folder, **options)
    real = real_sizes(corpus_of(40), folder, tmp_path / "c", **options)
    assert found.rows == 120 and found.sampled == 120 and found.fields == real  # every row was looked at


def test_a_plan_of_every_row_is_exact(teacher: Path, tmp_path: Path) -> None:
    found = plan(corpus_of(90), teacher, capture=CAPTURES)
    assert found.fields == real_sizes(corpus_of(90), teacher, tmp_path / "c", capture=CAPTURES)


def test_the_kept_mass(language_model: Path) -> None:
    corpus = corpus_of(20)
    found = plan(corpus, language_model, capture=["vocab:topk=16"])
    assert found.kept_mass is not None and list(found.kept_mass) == [16, 32, 64, 128]
    loaded = load_teacher(str(language_model), device="cpu")
    masses = []
    for example in corpus.examples:
        ids = torch.tensor([loaded.tokenizer(example.text, truncation=True, max_length=64).input_ids])
        logits = loaded.model(ids).logits[0, :-1].double()
        masses.append((logits / 2).softmax(-1).topk(32).values.sum(-1))
    assert found.kept_mass[32][2.0] == pytest.approx(float(torch.cat(masses).mean()), abs=1e-4)
    for k, bigger in ((16, 32), (32, 64), (64, 128)):
        assert all(found.kept_mass[k][t] < found.kept_mass[bigger][t] for t in (1.0, 2.0, 4.0, 8.0))
    assert plan(corpus, language_model, capture=["hidden:1"]).kept_mass is not None


def test_maps_and_what_they_are_weighed_against(teacher: Path) -> None:
    corpus = corpus_of(60)
    found = plan(corpus, teacher, capture=["qkv:1", "attention:2"])
    only = plan(corpus, teacher, capture=["qkv:1-2", "attention:1-2"])
    assert found.maps is not None and found.maps == only.maps and found.maps.layers == [1, 2]
    fields = only.fields
    assert found.maps.query_key_bytes == sum(fields[f"{part}.{n:02d}"] for part in ("query", "key") for n in (1, 2))
    assert found.maps.map_bytes == fields["attention.01"] + fields["attention.02"]
    assert plan(corpus, teacher, capture=["logits"]).maps is None


def test_time_and_when_it_has_paid(teacher: Path) -> None:
    found = plan(corpus_of(60), teacher, capture=["logits", "attention:1-2"], epochs=1)
    speed, paid = found.speed, found.payback
    assert speed.device == "cpu" and speed.rows_per_second > 0
    assert speed.seconds_captured == pytest.approx(60 / speed.rows_per_second_captured)
    ratio = speed.seconds_captured / speed.seconds
    assert paid.epochs == paid.students == int(np.ceil(ratio)) and paid.epochs_each == 1
    assert paid.seconds_each == pytest.approx(speed.seconds) and speed.rows_opened_per_second is None


@pytest.mark.parametrize(
    "options, error, told",
    [
        ({"capture": ["hidden:7"]}, ConfigError, "no layer 7; it has 0 to 2"),
        ({"capture": ["vocab:exact"]}, TeacherError, "no language model"),
        ({"batch_tokens": 8}, ConfigError, "--batch-tokens 8 is below the longest row"),
        ({"capture": ["attention:1"], "codec": "int8"}, ConfigError, "attention maps have none"),
        ({"task": "masked-lm"}, TeacherError, "no trained head"),
    ],
)
def test_what_the_dump_would_refuse(
    teacher: Path, options: dict[str, Any], error: type[SoftlabelsError], told: str
) -> None:
    with pytest.raises(error, match=told):
        plan(corpus_of(10), teacher, **options)
    with pytest.raises(CorpusError, match="has no rows"):
        plan(corpus_of(0), teacher)


def test_the_command(teacher: Path, language_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "x.csv"
    rows.write_text("text\n" + "\n".join(f'"{text}"' for text, _ in TEXTS[:20]) + "\n")
    command = ["plan", str(rows), "--teacher", str(teacher), "--out", str(tmp_path / "a" / "cache"), "--cpu"]
    assert _guarded([*command, "--json", "--capture", "qkv:1", "--rows-sample", "7"], debug=False) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["sampled"], told["disk"]["fits"]) == (20, 7, True) and told["maps"]["layers"] == [1]
    assert not (tmp_path / "a").exists()
    assert _guarded([*command, "--capture", "qkv:1", "--capture", "logits"], debug=False) == 0
    assert "paid for itself" in capsys.readouterr().out
    assert _guarded(["plan", str(rows), "--teacher", str(language_model), "--cpu"], debug=False) == 0
    assert "topk=128" in capsys.readouterr().out
    assert _guarded([*command, "--text", "nothing"], debug=False) == 2
