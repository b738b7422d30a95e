"""A cache against its teacher: right ones pass, quietly altered ones fail, other teachers are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from safetensors.torch import load_file, save_file

from softlabels.cache import open_cache
from softlabels.cache.format import (
    RECEIPT,
    ShardTable,
    load_receipt,
    read_manifest,
    receipt_file,
    shard_file,
    to_json,
)
from softlabels.cache.settings import folder_receipt
from softlabels.cache.verify import verify_cache
from softlabels.cli import _guarded
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, TeacherError
from softlabels.fidelity import Fidelity, verify_live
from softlabels.types import Example, Label
from tests.models import TEXTS
from tests.test_tasks import save

EVERYTHING = ["logits", "hidden:0-2", "hidden:2@cls", "hidden:1@mean", "qkv:1", "pooled"]
MAPS = ["attention:1", "attention:2@scores"]
FORMS = ["vocab:exact", "vocab:topk=16,samples=2"]


def dumped(folder: Path, teacher: Path, *, rows: int = 24, words: bool = False, **options: Any) -> Path:
    made = []
    for i, (text, _) in enumerate(TEXTS[:rows]):
        label: Label = tuple([0] * len(text.split())) if words else None
        made.append(Example(f"row-{i}", text, None, label, tuple(text.split()) if words else None))
    corpus = Corpus(source="made", split=None, examples=made, label_names=None)
    usual = {"shard_rows": 10, "batch_tokens": 128}
    dump(corpus, teacher=str(teacher), out=folder, options=DumpOptions.model_validate(usual | options), device="cpu")
    return folder


def check(cache: Path, teacher: Path, **options: Any) -> Fidelity:
    return verify_live(cache, teacher=str(teacher), device="cpu", **options)


def wrong(found: Fidelity) -> set[str]:
    return {part.field for part in found.fields if not part.within}


# ------------------------------------------------------------------------------------------------ caches that are right


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "int8"])
def test_a_right_cache_of_a_classifier(tmp_path: Path, codec: str) -> None:
    teacher = save(tmp_path / "t", "BertForSequenceClassification", num_labels=3)
    capture = EVERYTHING if codec == "int8" else EVERYTHING + MAPS
    cache = dumped(tmp_path / "c", teacher, capture=capture, codec=codec)
    found = check(cache, teacher, rows=15)
    assert found.within and found.rows == 15 and found.cache == cache
    assert {part.field for part in found.fields} == set(open_cache(cache).fields)
    by_name = {part.field: part for part in found.fields}
    hidden = by_name["hidden.02"]
    assert hidden.values == found.tokens * 32 and hidden.typical > 0.1
    least, most = {"float32": (0, 1e-5), "float16": (1e-5, 1e-3), "bfloat16": (1e-4, 1e-2), "int8": (1e-4, 0.1)}[codec]
    assert least <= hidden.relative_largest < most and hidden.relative_mean <= hidden.relative_largest
    assert by_name["logits"].largest < 1e-5 and all(part.noise_largest < 1e-4 for part in found.fields)
    if codec != "int8":
        scores = by_name["attention.02@scores"]
        assert scores.typical < 1e3  # masked ones don't count


@pytest.mark.parametrize(
    "kind, changes, capture",
    [
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, ["logits"]),
        ("BertForSequenceClassification", {"num_labels": 1}, ["logits", "hidden:1"]),
        ("BertForTokenClassification", {"num_labels": 3}, ["logits", "hidden:2"]),
        ("BertModel", {}, ["pooled", "hidden:all@mean"]),
        ("BertForMaskedLM", {}, [*FORMS, "hidden:1"]),
        ("BertForMaskedLM", {}, ["vocab:topk=16,samples=4,packed"]),
        ("GPT2LMHeadModel", {}, [*FORMS, *MAPS]),
        ("GPT2LMHeadModel", {}, ["vocab:topk=16,samples=4,packed"]),
    ],
)
def test_right_caches_of_other_tasks(tmp_path: Path, kind: str, changes: dict[str, Any], capture: list[str]) -> None:
    teacher = save(tmp_path / "t", kind, **changes)
    cache = dumped(tmp_path / "c", teacher, capture=capture, words="Token" in kind)
    found = check(cache, teacher)
    assert found.within, [part for part in found.fields if not part.within]
    assert found.rows == 24 and all(part.values for part in found.fields)
    if any("packed" in item for item in capture):
        assert [part.field for part in found.fields] == ["vocab_packed"] * 5
        assert found.fields[0].largest < 0.02


def test_half_precision_has_more_noise(tmp_path: Path) -> None:
    teacher = save(tmp_path / "t", "GPT2LMHeadModel")
    cache = dumped(tmp_path / "c", teacher, capture=["hidden:2", "vocab:topk=16"], dtype="bfloat16", codec="float32")
    found = check(cache, teacher)
    assert found.within
    assert max(part.noise_largest / part.typical for part in found.fields if part.typical) > 1e-4


def test_clipped_values_are_held_to_the_largest(tmp_path: Path) -> None:
    teacher = save(tmp_path / "t", "BertForSequenceClassification", num_labels=3)
    weights = load_file(teacher / "model.safetensors")
    weights["bert.embeddings.LayerNorm.weight"] *= 1e5
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    cache = dumped(tmp_path / "c", teacher, capture=["hidden:0"], overflow="clip")
    assert open_cache(cache).manifest.shards["hidden.00"].clipped
    assert check(cache, teacher).within


def test_the_same_seed_draws_the_same_rows(tmp_path: Path) -> None:
    teacher = save(tmp_path / "t", "BertForSequenceClassification", num_labels=3)
    cache = dumped(tmp_path / "c", teacher, capture=["logits"])
    figures = [check(cache, teacher, rows=7, seed=seed).fields[0] for seed in (1, 1, 2)]
    assert figures[0] == figures[1] != figures[2]


# ------------------------------------------------------------------------------------------- caches that were altered


def alter(cache: Path, field: str, kind: str, change: Callable[[np.ndarray], None], *, shard: int = 0) -> None:
    """Change stored values in place, and renew every checksum, so that `verify` finds nothing."""
    path = shard_file(cache, field, shard)
    data = bytearray(path.read_bytes())
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    values = table.column(0).chunk(0).values.buffers()[1]
    place = values.address - pa.py_buffer(data).address
    change(np.frombuffer(data, f"{kind}", values.size // np.dtype(kind).itemsize, place))
    path.write_bytes(data)
    digest = xxhash.xxh3_128(bytes(data)).hexdigest()
    receipt = load_receipt(cache, field, shard).model_copy(update={"xxh3_128": digest})
    receipt_file(cache, field, shard).write_bytes(to_json(receipt))
    manifest = read_manifest(cache)
    receipts = [load_receipt(cache, field, number) for number in range(len(manifest.shard_rows))]
    shards = manifest.shards | {field: ShardTable.of(receipts)}
    raw = to_json(manifest.model_copy(update={"shards": shards}))
    (cache / "manifest.json").write_bytes(raw)
    (cache / RECEIPT).write_bytes(to_json(folder_receipt(cache, raw)))
    assert verify_cache(cache).whole


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("t") / "t", "BertForSequenceClassification", num_labels=3)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("t") / "t", "GPT2LMHeadModel")


def set_to(value: float, place: int = 5) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] = value

    return change


def times(factor: float, place: int = 5) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] *= factor

    return change


@pytest.mark.parametrize(
    "field, kind, codec, change",
    [
        ("logits", "<f4", "float16", times(1.001, 2)),
        ("hidden.01", "<f2", "float16", times(1.01)),
        ("hidden.01", "<f4", "float32", times(1.001)),
        ("hidden.01", "<u2", "bfloat16", set_to(0x4040)),
        ("hidden.01", "i1", "int8", set_to(120)),
        ("hidden.02@cls", "<f2", "float16", times(-1.0)),
        ("pooled", "<f2", "float16", times(1.01)),
        ("query.01", "<f2", "float16", set_to(float("nan"))),
        ("attention.01", "<f2", "float16", times(1.01)),
        ("attention.01@scores", "<f2", "float16", set_to(-65504.0)),
    ],
)
def test_an_altered_value_is_found(
    classifier: Path, tmp_path: Path, field: str, kind: str, codec: str, change: Callable[[np.ndarray], None]
) -> None:
    capture = ["logits", "hidden:1", "hidden:2@cls", "pooled", "qkv:1"]
    if codec != "int8":
        capture += ["attention:1", "attention:1@scores"]
    cache = dumped(tmp_path / "c", classifier, capture=capture, codec=codec, rows=8)
    assert check(cache, classifier).within
    alter(cache, field, kind, change)
    found = check(cache, classifier)
    assert wrong(found) == {field} and not found.within
    (part,) = (part for part in found.fields if not part.within)
    assert part.worst_row == "row-0" and part.beyond_codec > part.allowed
    assert check(cache, classifier, fields=["hidden.01"]).within == (field != "hidden.01")


@pytest.mark.parametrize(
    "capture, field, kind, change, what",
    [
        ("vocab:exact", "vocab_states", "<f2", times(1.02), "values"),
        ("vocab:topk=16,samples=2", "vocab_level", "<f4", times(1.01, 0), "logits of the kept ids"),
        ("vocab:topk=16,samples=2", "vocab_values", "<f2", times(1.05, 15), "logits of the kept ids"),
        ("vocab:topk=16,samples=2", "vocab_ids", "<u2", set_to(0, 3), "logits of the kept ids"),
        ("vocab:topk=16,samples=2", "vocab_tail", "<f2", times(1.01, 1), "tail's log-sum-exp against the top's"),
        ("vocab:topk=16,samples=2", "vocab_tail", "<f2", times(1.01, 6), "tail's mean against the top's"),
        ("vocab:topk=16,samples=2", "vocab_sampled_values", "<f2", times(1.1, 1), "logits of the sampled ids"),
    ],
)
def test_altered_logits_over_a_vocabulary(
    language_model: Path,
    tmp_path: Path,
    capture: str,
    field: str,
    kind: str,
    change: Callable[[np.ndarray], None],
    what: str,
) -> None:
    cache = dumped(tmp_path / "c", language_model, capture=[capture], rows=6)
    assert check(cache, language_model).within
    alter(cache, field, kind, change)
    found = check(cache, language_model)
    assert what in {part.what for part in found.fields if not part.within}
    assert {part.worst_row for part in found.fields if not part.within} == {"row-0"}


def test_an_altered_head_is_found(language_model: Path, tmp_path: Path) -> None:
    cache = dumped(tmp_path / "c", language_model, capture=["vocab:exact"], rows=6)
    head = load_file(cache / "teacher" / "head.safetensors")
    head["weight"][7] *= 1.5
    save_file(head, cache / "teacher" / "head.safetensors")
    found = check(cache, language_model)
    assert [part.what for part in found.fields if not part.within] == ["logits"] and wrong(found) == {"vocab_states"}


# ---------------------------------------------------------------------------------------------------------- wrong input


def test_another_teacher_is_refused(classifier: Path, tmp_path: Path) -> None:
    cache = dumped(tmp_path / "c", classifier, capture=["logits"], rows=6)
    other = shutil.copytree(classifier, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-11}))
    with pytest.raises(TeacherError, match=r"not the teacher of cache .* is [0-9a-f]{32}, and .* is [0-9a-f]{32}"):
        check(cache, other)
    with pytest.raises(CacheError, match=r"--field needs hidden\.03"):
        check(cache, classifier, fields=["hidden.03"])


def test_the_command(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = dumped(tmp_path / "c", classifier, capture=["logits", "hidden:1"], rows=6)
    live = ["verify", str(cache), "--live", str(classifier), "--cpu"]
    assert _guarded([*live, "--json", "--rows", "3"], debug=False) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["within"] and told["rows"] == 3 and {part["field"] for part in told["fields"]} == {"logits", "hidden.01"}
    )
    alter(cache, "hidden.01", "<f2", set_to(9.0))
    assert _guarded(["verify", str(cache)], debug=False) == 0
    assert _guarded(live, debug=False) == 1
    assert "NOT what the teacher says: hidden.01" in capsys.readouterr().out
    assert _guarded([*live, "--field", "logits"], debug=False) == 0
    assert _guarded([*live, "--repair"], debug=False) == 2
    assert _guarded(["verify", str(cache), "--rows", "3"], debug=False) == 2
    assert _guarded(["verify", str(cache), "--live", str(tmp_path / "none"), "--cpu"], debug=False) == 2
