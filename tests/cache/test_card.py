"""The dataset card: what the Hub's own parser reads of it, what strangers' names can do to it, what is private."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard, metadata_load

from softlabels.cache.card import MARK, code, public_name, write_card
from softlabels.cache.format import Manifest, read_manifest
from softlabels.cache.info import describe, personal_data
from softlabels.cache.licence import FACTS, CardFacts, build_facts, keep_facts, read_facts
from softlabels.cache.verify import verify_cache
from softlabels.cli import _guarded
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError
from softlabels.types import Example
from tests.cache.made import rows_of, write_cache
from tests.models import LABEL_NAMES, TEXTS, save_teacher

pytestmark = pytest.mark.usefixtures("quick")
ROWS = 12


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dumped cache without texts, from a corpus and a teacher in folders that are nobody's business."""
    place = tmp_path_factory.mktemp("anna's secret folder")
    rows = [Example(f"r{i}", text, label=name) for i, (text, name) in enumerate(TEXTS[:ROWS])]
    corpus = Corpus(str(place / "patients.csv"), "train", rows, LABEL_NAMES)
    options = DumpOptions(capture=["logits", "hidden:1", "hidden:2@cls", "qkv:2"], shard_rows=5, text=False)
    dump(corpus, teacher=str(save_teacher(place / "judge")), out=place / "cache", options=options, device="cpu")
    return place / "cache"


def changed(manifest: Manifest, part: str, **values: Any) -> Manifest:
    card = getattr(manifest, part).model_copy(update=values)
    return manifest.model_copy(update={part: card})


def test_the_hub_reads_its_head(cache: Path, tmp_path: Path) -> None:
    facts = build_facts(license="CC-BY-4.0", teacher_license="apache-2.0", language="en, zh")
    text = write_card(read_manifest(cache), facts, url="hf://datasets/me/said")
    (tmp_path / "README.md").write_text(text)
    found = metadata_load(tmp_path / "README.md")
    assert found is not None
    assert (found["license"], found["language"], found["size_categories"]) == ("cc-by-4.0", ["en", "zh"], ["n<1K"])
    assert found["task_categories"] == ["text-classification"] and "license_name" not in found
    assert [config["config_name"] for config in found["configs"]] == ["examples", *sorted(read_manifest(cache).fields)]
    card = DatasetCard(text)
    assert card.data.to_dict()["configs"] == found["configs"] and card.text.strip().startswith("# What `judge` says")
    assert "softlabels pull hf://datasets/me/said cache --field logits" in card.text
    assert 'load_dataset("me/said", "logits", split="train")' in card.text
    assert "the teacher: `apache-2.0`" in card.text and "the corpus: not stated" in card.text
    assert write_card(read_manifest(cache), facts, url="hf://datasets/me/said") == text


@pytest.mark.parametrize(("rows", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**12, "10B<")])
def test_sizes(cache: Path, rows: int, size: str) -> None:
    assert f"- {size}" in write_card(changed(read_manifest(cache), "corpus", rows=rows))


def test_datasets_finds_each_field(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    assert _guarded(["card", str(cache), "--out", str(cache / "README.md")], debug=True) == 0
    try:
        for field, width in (("examples", 0), ("logits", 3), ("hidden.02@cls", 32)):
            given = datasets.load_dataset(str(cache), field, split="train", cache_dir=str(tmp_path))
            assert len(given) == ROWS and (field == "examples" or len(given[0][field]) == width)
        assert verify_cache(cache).notes == []  # README.md is no stranger
    finally:
        (cache / "README.md").unlink()


HOSTILE = [
    "x\n---\nlicense: mit\n---\n",
    "[click](javascript:alert(1)) <script>alert(1)</script>",
    "`` `</code>` <img src=x onerror=alert(1)> ``",
    "| a | b |\n# heading",
    "moc.live \u202e",
    "! &tag *a [b, c] {d: e} 'f \"g",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_names_of_strangers_stay_words(cache: Path, words: str) -> None:
    import markdown

    manifest = changed(read_manifest(cache), "corpus", source=words, split=words, hash=words)
    manifest = changed(manifest, "teacher", name=words, label_names=[words, "b", "c"])
    manifest = manifest.model_copy(update={"versions": {words: words}})
    text = write_card(manifest, CardFacts(license="x", teacher_license="y"))
    plain = DatasetCard(write_card(read_manifest(cache), CardFacts(license="x", teacher_license="y")))
    card = DatasetCard(text)
    assert card.data.to_dict()["license"] == "other" and card.data.to_dict().keys() == plain.data.to_dict().keys()
    assert card.text.count("\n") == plain.text.count("\n") and "\u202e" not in text
    html = markdown.markdown(card.text, extensions=["tables", "fenced_code"])
    assert not any(mark in html for mark in ("<script", "<img", "<a ", 'javascript:alert(1)"')), html


def test_code_spans() -> None:
    assert [code(text) for text in ("a", "a`b", "``", "", "a\n b")] == ["`a`", "``a`b``", "``` `` ```", "`–`", "`a b`"]
    assert len(code("x" * 5000)) < 250


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/srv/anna/patients.csv", "patients.csv"),
        ("~/x.csv", "x.csv"),
        ("../x/y.csv", "y.csv"),
        ("C:\\Users\\anna\\y.csv", "y.csv"),
        ("glue/sst2", "glue/sst2"),
        ("https://anna:secret@host/x.csv?X-Amz-Signature=1#k", "https://host/x.csv"),
        ("s3://key:se/cret@bucket/x", "s3://bucket/x"),
        ("https://t0ken@host/x.csv", "https://host/x.csv"),
        ("https://anna:" + 300 * "long" + "@host/x.csv", "https://host/x.csv"),
        ("sftp://anna@host/x.csv", "sftp://anna@host/x.csv"),
        ("hf://datasets/me/said@v:1/x", "hf://datasets/me/said@v:1/x"),
        ("/srv/anna/a.csv + /srv/anna/b.csv", "a.csv + b.csv"),
        ("http://[", "http://["),
        ("", ""),
    ],
)
def test_what_everyone_may_read_of_a_name(given: str, told: str) -> None:
    assert public_name(given) == told


def test_no_folder_of_the_machine_is_told(cache: Path) -> None:
    text = write_card(read_manifest(cache), url="/srv/anna/cache")
    assert "anna" not in text and "patients.csv" in text and "judge" in text


def test_what_is_private_is_told(cache: Path) -> None:
    lines = "\n".join(personal_data(read_manifest(cache)))
    assert "raw texts" not in lines and "token ids" in lines and "--no-text" in lines and "labels" in lines
    assert (
        "logits: what the teacher answers" in lines and "hidden.01, hidden.02@cls, key.02, query.02 and 1 more" in lines
    )
    manifest = changed(read_manifest(cache), "dump", text=True)
    assert "the raw texts" in personal_data(manifest)[0]
    assert describe(manifest)["may_carry_personal_data"] == personal_data(manifest)
    images = changed(changed(read_manifest(cache), "teacher", task="image-classification"), "corpus", labelled=0)
    lines = "\n".join(personal_data(images))
    assert "token ids" not in lines and "pixels" in lines and "labels" not in lines


def test_no_text_leaves_no_text(cache: Path) -> None:
    """Not in any file, under any encoding that one would write it in; words are in the tokenizer's list, of course."""
    texts = [text for text, _ in TEXTS[:ROWS]]
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes().lower()
        for text in texts:
            for part in (text, text[: len(text) // 2], text[len(text) // 2 :]):
                found = [coding for coding in ("utf-8", "utf-16-le") if part.strip().lower().encode(coding) in data]
                assert not found, (path, part)


def test_licences_are_kept_beside_the_manifest(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of([3, 2])
    values = {"logits": [np.zeros(2, np.float32)] * 2}
    write_cache(tmp_path, rows, {"logits": {"kind": "row", "type": "float32", "width": 2}}, values, shard_rows=2)
    before = (tmp_path / "manifest.json").read_bytes()
    assert _guarded(["card", str(tmp_path)], debug=True) == 0
    assert not (tmp_path / FACTS).exists() and "this cache: not stated" in capsys.readouterr().out
    command = ["card", str(tmp_path), "--license", "Our House Licence 1.0", "--name", "said | <b>"]
    assert _guarded(command, debug=True) == 0
    first = capsys.readouterr().out
    assert _guarded(["card", str(tmp_path)], debug=True) == 0
    assert capsys.readouterr().out == first
    head = DatasetCard(first).data.to_dict()
    assert (head["license"], head["license_name"]) == ("other", "our-house-licence-1.0")
    assert "# `said | <b>`" in first and "this cache: `Our House Licence 1.0`" in first
    keep_facts(tmp_path, CardFacts(corpus_license="mit"))
    assert read_facts(tmp_path).license == "Our House Licence 1.0" and read_facts(tmp_path).corpus_license == "mit"
    assert (tmp_path / "manifest.json").read_bytes() == before
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    assert _guarded(["card", str(tmp_path), "--out", str(readme)], debug=False) == 2
    assert "was not made by" in capsys.readouterr().err and readme.read_text() == "mine"
    readme.unlink()
    for _ in range(2):
        assert _guarded(["card", str(tmp_path), "--out", str(readme)], debug=True) == 0
    assert MARK in readme.read_text()


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"licence": "mit"}', b'{"license": "a\\nb"}', b"\xff"])
def test_a_damaged_card_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FACTS).write_bytes(data)
    with pytest.raises(CacheError, match=r"card.json is damaged: remove it"):
        read_facts(tmp_path)


def test_what_cannot_be_is_told(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (
        ({"language": "english"}, "--language english: give two or three small letters"),
        ({"language": ""}, "--language : give"),
        ({"license": " "}, "--license: give one line"),
        ({"teacher_license": "a\nb"}, "--teacher-license: give one line"),
    ):
        with pytest.raises(ConfigError, match=told):
            build_facts(**options)
    with pytest.raises(CacheError, match="the cache is unfinished"):
        write_card(read_manifest(cache).model_copy(update={"complete": False}))
    assert _guarded(["card", str(cache / "none")], debug=False) == 2
    assert "no cache at" in capsys.readouterr().err


def test_the_json_of_info(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["info", str(cache), "--json"], debug=True) == 0
    assert json.loads(capsys.readouterr().out)["may_carry_personal_data"]
    assert _guarded(["info", str(cache)], debug=True) == 0
    assert "may carry personal data:\n  examples: token ids" in capsys.readouterr().out
