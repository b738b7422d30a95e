"""`combine --rows`: parts of one corpus become one cache, as one dump of it would have been."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.cache import concatenate as module
from softlabels.cache import open_cache
from softlabels.cache.concatenate import concatenate
from softlabels.cache.format import read_manifest
from softlabels.cache.grouped import ShardGroup
from softlabels.cache.verify import verify_cache
from softlabels.cli import _guarded
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError
from softlabels.fidelity import verify_live
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_model, save_teacher, tiny_tokenizer

EXAMPLES = [Example(f"r{i}", text, label=name if i % 5 else None) for i, (text, name) in enumerate(TEXTS[:40])]
PARTS = [(0, 11), (11, 27), (27, 40)]  # with 8 rows a file, none of them ends with a file
CAPTURES = ["logits", "hidden:1", "attention:1", "hidden:2@cls"]


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, what it says of the whole corpus, and of each part by itself."""
    folder = tmp_path_factory.mktemp("parts")
    save_teacher(folder / "teacher")
    dumped(folder, "whole", 0, 40)
    for number, (start, stop) in enumerate(PARTS):
        dumped(folder, f"part-{number}", start, stop)
    return folder


def dumped(place: Path, name: str, start: int, stop: int, **options: Any) -> Path:
    corpus = Corpus("texts.csv", None, EXAMPLES[start:stop], list(LABEL_NAMES))
    # a row a batch: what a teacher says of a row is then the same to the last bit, whatever rows are beside it
    chosen: dict[str, Any] = {"capture": CAPTURES, "shard_rows": 8, "batch_tokens": 14, "max_length": 14} | options
    dump(corpus, teacher=str(place / "teacher"), out=place / name, options=DumpOptions(**chosen), device="cpu")
    return place / name


def parts_of(place: Path) -> list[Path]:
    return [place / f"part-{number}" for number in range(len(PARTS))]


def test_the_files_are_those_of_one_dump(place: Path, tmp_path: Path) -> None:
    report = concatenate(parts_of(place), out=tmp_path / "out")
    one, whole = read_manifest(tmp_path / "out"), read_manifest(place / "whole")
    assert (report.rows, report.new_rows, report.how) == (40, 40, "rows")
    assert one.join == whole.join and one.shards == whole.shards and one.fields == whole.fields
    assert one.shard_rows == [8] * 5 and one.shard_tokens == whole.shard_tokens and one.teacher == whole.teacher
    assert whole.corpus.truncated > 0
    differ = {"hash"}
    assert one.corpus.model_dump(exclude=differ) == whole.corpus.model_dump(exclude=differ)
    verdict = verify_cache(tmp_path / "out")
    assert verdict.faults == [] and verdict.notes == []
    for path in (place / "whole").rglob("*.arrow"):
        assert (tmp_path / "out" / path.relative_to(place / "whole")).read_bytes() == path.read_bytes(), path
    assert one.combined is not None and [part.rows for part in one.combined.caches] == [11, 16, 13]


def test_the_teacher_says_the_same(place: Path, tmp_path: Path) -> None:
    concatenate(parts_of(place), out=tmp_path / "out")
    found = verify_live(tmp_path / "out", teacher=str(place / "teacher"), rows=10, seed=0, device="cpu")
    assert found.within and found.rows == 10


def test_parts_may_have_files_of_other_sizes(place: Path, tmp_path: Path) -> None:
    last = dumped(place, f"other-{tmp_path.name}", *PARTS[2], shard_rows=5)
    concatenate([*parts_of(place)[:2], last], out=tmp_path / "out")
    assert read_manifest(tmp_path / "out").shards == read_manifest(place / "whole").shards


def test_int8_goes_file_by_file(place: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"capture": ["hidden:1", "hidden:2@cls"], "codec": "int8"}
    parts = [dumped(tmp_path, name, *rows, **options) for name, rows in _with_teacher(place, tmp_path)]
    concatenate(parts, out=tmp_path / "out")
    wanted = [open_cache(part) for part in parts]
    cache, fields = open_cache(tmp_path / "out"), ["hidden.01", "hidden.02@cls"]
    for row, (part, own) in {0: (0, 0), 15: (0, 15), 16: (1, 0), 39: (1, 23)}.items():
        for field in fields:
            values = [c.signals([r], fields).get(field) for c, r in ((cache, row), (wanted[part], own))]
            assert torch.equal(*values)
    assert verify_cache(tmp_path / "out").faults == []
    odd = [dumped(tmp_path, name, *rows, **options) for name, rows in (("odd", (0, 11)), ("rest", (11, 20)))]
    with pytest.raises(CacheError, match=r"hidden.01, hidden.02@cls is int8.*a multiple of 8 rows.*--codec float16"):
        concatenate(odd, out=tmp_path / "refused")


def _with_teacher(place: Path, folder: Path) -> list[tuple[str, tuple[int, int]]]:
    shutil.copytree(place / "teacher", folder / "teacher")
    return [("a", (0, 16)), ("b", (16, 40))]


def test_a_killed_call_goes_on_to_the_same_bytes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.PieceWriter.write

    def killed(self, shard: int, missing: Sequence[str], group: ShardGroup) -> None:
        if shard == 2:
            raise KeyboardInterrupt
        real(self, shard, missing, group)

    with monkeypatch.context() as patch:
        patch.setattr(module.PieceWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            concatenate(parts_of(place), out=tmp_path / "out")
    assert 0 < concatenate(parts_of(place), out=tmp_path / "out").new_rows < 40
    assert read_manifest(tmp_path / "out").shards == read_manifest(place / "whole").shards
    assert concatenate(parts_of(place), out=tmp_path / "out").new_rows == 0
    with pytest.raises(CacheError, match="another configuration"):
        concatenate(parts_of(place)[:2], out=tmp_path / "out")


def test_what_differs_is_refused(place: Path, tmp_path: Path) -> None:
    first, second, _ = parts_of(place)
    (_, rows), _ = _with_teacher(place, tmp_path)
    assert rows == (0, 16)
    save_teacher(tmp_path / "strange" / "teacher", seed=7)
    for other, told in (
        (dumped(tmp_path, "length", 11, 20, max_length=9), "max_length is 14 and 9"),
        (dumped(tmp_path, "text", 11, 20, text=False), "text is True and False"),
        (dumped(tmp_path, "fields", 11, 20, capture=["logits"]), "field attention.01 is pair float16 4 and not there"),
        (
            dumped(tmp_path, "codec", 11, 20, codec="float32"),
            "hidden.01 is token float16 32 and token float32 32",
        ),
        (dumped(tmp_path / "strange", "cache", 11, 20), "the teacher's weights is .*combined without --rows"),
        (dumped(tmp_path, "again", 8, 20), r"3 ids are in more than one cache, such as 'r\d+' in .*part-0 and .*again"),
    ):
        with pytest.raises(CacheError, match=told):
            concatenate([first, other], out=tmp_path / "out")
    damaged = Path(shutil.copytree(second, tmp_path / "damaged"))
    (damaged / "hidden.01" / "00001.arrow").write_bytes((second / "hidden.01" / "00000.arrow").read_bytes())
    with pytest.raises(CacheError, match=r"damaged/hidden.01/00001.arrow"):
        concatenate([first, damaged], out=tmp_path / "out")


def test_targets_and_their_head(tmp_path: Path) -> None:
    """A language model's fields have a value a target, and the output head beside them."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    save_model(tmp_path / "teacher", BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)), tokenizer)
    for name, rows in (("whole", (0, 20)), ("a", (0, 7)), ("b", (7, 20))):
        dumped(tmp_path, name, *rows, capture=["vocab:exact"])
    concatenate([tmp_path / "a", tmp_path / "b"], out=tmp_path / "out")
    one, whole = open_cache(tmp_path / "out"), open_cache(tmp_path / "whole")
    assert verify_cache(tmp_path / "out").faults == [] and one.manifest.join != ""
    assert (tmp_path / "out" / "teacher" / "head.safetensors").is_file()
    field = next(iter(whole.fields))
    parts = [open_cache(tmp_path / name) for name in "ab"]
    wanted = torch.cat([part.signals(range(part.rows), [field]).get(field) for part in parts])
    assert torch.equal(one.signals(range(one.rows), [field]).get(field), wanted) and len(wanted)
    assert one.rows == whole.rows and np.array_equal(one.ids, whole.ids)


def test_the_command(place: Path, tmp_path: Path, capsys) -> None:
    names = [str(path) for path in parts_of(place)]
    command = ["combine", *names, "--rows", "--out", str(tmp_path / "out")]
    assert _guarded([*command, "--json"], debug=True) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 40
    assert _guarded(command, debug=True) == 0
    said = capsys.readouterr().out
    assert "part-1" in said and "16" in said and "new rows" in said
    assert _guarded(["info", str(tmp_path / "out"), "--json"], debug=True) == 0
    assert json.loads(capsys.readouterr().out)["combined"]["how"] == "rows"
