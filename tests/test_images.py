"""Teachers of images: a cache that equals the live teacher, from files that stay where they are."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    PretrainedConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from softlabels.cache import Cache, open_cache
from softlabels.cache.verify import verify_cache
from softlabels.captures import TeacherRun
from softlabels.config import DumpOptions, StudentOptions
from softlabels.corpus import Corpus, read_corpus
from softlabels.dump import DumpReport, dump
from softlabels.errors import CacheError, ConfigError, CorpusError, TeacherError
from softlabels.fidelity import verify_live
from softlabels.pixels import ImageReader
from softlabels.plan import plan_dump
from softlabels.teacher import load_teacher
from softlabels.train import train_student
from softlabels.types import NO_LABEL, TokenizedExample

NAMES = ["cat", "dog", "owl"]
SIDE = 16


def save(folder: Path, kind: str = "vit", **changes: Any) -> Path:
    """A tiny random teacher of images of SIDE × SIDE pixels, with its image processor."""
    names: dict[str, Any] = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    body: dict[str, Any] = {"image_size": SIDE, "patch_size": 4, "initializer_range": 0.2}
    processor: Any = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    config: PretrainedConfig
    if kind == "vit":
        small: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        config = ViTConfig(**small, **body, **names)
    elif kind == "swin":
        config = SwinConfig(**body, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, **names)
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **names)
        processor = ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=1.0)
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config)
    with torch.no_grad():  # so that different images get clearly different logits
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    for key, value in changes.items():
        setattr(processor, key, value)
    processor.save_pretrained(folder)
    return folder


def paint(path: Path, seed: int, *, mode: str = "RGB", size: tuple[int, int] = (20, 24)) -> Path:
    """An image of large random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).convert(mode).save(path)
    return path


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], *rows])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images.csv and 11 images beside it, of several modes; row 4 has no label."""
    folder = tmp_path_factory.mktemp("images")
    modes = ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK"]
    names = [f"pixels/{i}.{'tif' if modes[i % 7] == 'CMYK' else 'png'}" for i in range(11)]
    for i, name in enumerate(names):
        paint(folder / name, i, mode=modes[i % 7], size=(17 + i, 30 - i))
    rows = [[name, "" if i == 4 else NAMES[i % 3]] for i, name in enumerate(names)]
    write_csv(folder / "images.csv", rows)
    save(folder / "vit")
    return folder


def corpus_of(folder: Path) -> Corpus:
    return read_corpus(folder / "images.csv", task="image-classification")


def dumped(out: Path, teacher: Path, corpus: Corpus, **options: Any) -> DumpReport:
    usual = {"capture": ["logits"], "shard_rows": 4, "codec": "float32", "batch_tokens": 60}
    return dump(corpus, teacher=str(teacher), out=out, options=DumpOptions.model_validate(usual | options))


def live(teacher: Path, corpus: Corpus, **wanted: Any) -> Any:
    """What the teacher says of all rows in one batch, each opened as plainly as can be."""
    loaded = load_teacher(str(teacher))
    images = [Image.open(row.image or "").convert("RGB") for row in corpus.examples]
    pixels = loaded.processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return pixels, loaded.model(pixel_values=pixels, output_hidden_states=True, **wanted)


def whole(out: Path) -> Cache:
    report = verify_cache(out)
    assert report.whole, report
    return open_cache(out)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_cache_of_a_vit_equals_the_live_teacher(folder: Path, tmp_path: Path) -> None:
    corpus, asked = corpus_of(folder), ["logits", "hidden:0-2", "hidden:2@cls", "hidden:1@mean", "qkv:2", "attention:2"]
    dumped(tmp_path / "c", folder / "vit", corpus, capture=asked)
    cache = whole(tmp_path / "c")
    pixels, wanted = live(folder / "vit", corpus)
    batch = cache.batch(np.arange(len(cache)), list(cache.fields))
    fields = batch.teacher.fields
    assert cache.lengths.tolist() == [1 + (SIDE // 4) ** 2] * 11
    assert wanted.logits.std(0).min() > 0.1
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(fields["logits"], wanted.logits, **close)
    for layer in range(3):
        torch.testing.assert_close(fields[f"hidden.{layer:02d}"], wanted.hidden_states[layer], **close)
    torch.testing.assert_close(fields["hidden.02@cls"], wanted.hidden_states[2][:, 0], **close)
    torch.testing.assert_close(fields["hidden.01@mean"], wanted.hidden_states[1].mean(1), **close)
    query, key = fields["query.02"], fields["key.02"]
    maps = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(maps, fields["attention.02"], atol=1e-5, rtol=1e-4)
    assert cache.labels.tolist() == [NO_LABEL if i == 4 else i % 3 for i in range(11)]
    assert cache.manifest.corpus.labelled == 10 and cache.label_names == NAMES
    assert cache.token_hashes.tolist() == [xxhash.xxh3_64_intdigest(row.numpy().tobytes()) for row in pixels]


def test_what_a_cache_of_images_holds(folder: Path, tmp_path: Path) -> None:
    """Neither pixels nor paths; the image processor instead of a tokenizer."""
    dumped(tmp_path / "c", folder / "vit", corpus_of(folder))
    cache = whole(tmp_path / "c")
    assert cache.table("examples", 0).column_names == ["id", "token_hash", "input_ids", "label"]
    assert not (tmp_path / "c" / "tokenizer").exists() and not cache.manifest.dump.text
    saved = json.loads((tmp_path / "c" / "processor" / "preprocessor_config.json").read_text())
    assert saved == json.loads((folder / "vit" / "preprocessor_config.json").read_text())
    card = cache.manifest.teacher
    assert (card.vocab_size, card.pad_token_id, card.unk_token_id, card.token_types) == (1, 0, None, False)
    for ask, told in ((cache.texts, "it holds no texts"), (cache.tokenizer, "no tokenizer, but an image processor")):
        with pytest.raises(CacheError, match=told):
            ask()
    (tmp_path / "c" / "processor" / "preprocessor_config.json").write_text('{"do_resize": false}')
    assert not verify_cache(tmp_path / "c").whole
    assert "another image processor" in str(verify_cache(tmp_path / "c"))
    verify_cache(tmp_path / "c", repair=True)
    dumped(tmp_path / "c", folder / "vit", corpus_of(folder))
    whole(tmp_path / "c")


def test_a_convolutional_teacher(folder: Path, tmp_path: Path) -> None:
    teacher, corpus = save(tmp_path / "resnet", "resnet"), corpus_of(folder)
    dumped(tmp_path / "c", teacher, corpus, capture=["logits", "pooled"])
    cache = whole(tmp_path / "c")
    pixels, wanted = live(teacher, corpus)
    assert cache.lengths.tolist() == [1] * 11
    torch.testing.assert_close(torch.from_numpy(cache.column("logits")), wanted.logits, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        pooled = load_teacher(str(teacher)).model.base_model(pixels).pooler_output.flatten(1)
    torch.testing.assert_close(torch.from_numpy(cache.column("pooled")), pooled, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="does not say how many layers"):
        dumped(tmp_path / "d", teacher, corpus, capture=["hidden:1"])


def test_a_teacher_whose_layers_have_several_lengths(folder: Path, tmp_path: Path) -> None:
    teacher, corpus = save(tmp_path / "swin", "swin"), corpus_of(folder)
    dumped(tmp_path / "c", teacher, corpus)
    assert whole(tmp_path / "c").lengths.tolist() == [1] * 11
    with pytest.raises(TeacherError, match=r"hidden\.01: the teacher has 4 places there.*Capture logits or pooled"):
        dumped(tmp_path / "d", teacher, corpus, capture=["hidden:1"])


def test_a_stopped_dump_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, asked = corpus_of(folder), ["logits", "hidden:2"]
    dumped(tmp_path / "whole", folder / "vit", corpus, capture=asked)
    take, calls = TeacherRun.take, 0

    def fails(self: TeacherRun, batch: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # of the probe, and of two batches a shard
            raise RuntimeError("stopped")
        return take(self, batch, **more)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="stopped"):
        patched.setattr(TeacherRun, "take", fails)
        dumped(tmp_path / "stopped", folder / "vit", corpus, capture=asked)
    assert not verify_cache(tmp_path / "stopped").whole
    report = dumped(tmp_path / "stopped", folder / "vit", corpus, capture=asked)
    assert 0 < report.new_rows < 11
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_field_that_is_added_joins_by_the_pixels(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "moved")
    dumped(tmp_path / "c", folder / "vit", corpus_of(folder))
    paint(copy / "pixels" / "0.png", 99)
    corpus = read_corpus(copy / "images.csv", task="image-classification")
    assert corpus.hash == corpus_of(folder).hash  # a corpus may be moved: only its own words count
    with pytest.raises(CacheError, match="belongs to other examples"):
        dumped(tmp_path / "c", folder / "vit", corpus, capture=["hidden:2@cls"])
    shutil.rmtree(tmp_path / "c" / "hidden.02@cls")
    dumped(tmp_path / "c", folder / "vit", corpus_of(folder), capture=["hidden:2@cls"])
    assert set(whole(tmp_path / "c").fields) == {"logits", "hidden.02@cls"}


def test_examples_alone_are_made_again(folder: Path, tmp_path: Path) -> None:
    dumped(tmp_path / "c", folder / "vit", corpus_of(folder))
    before = contents(tmp_path / "c")
    (tmp_path / "c" / "examples" / "00001.json").unlink()
    dumped(tmp_path / "c", folder / "vit", corpus_of(folder))
    assert contents(tmp_path / "c") == before


def test_pixels_are_held_for_two_batches_at_most(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most, rows = 0, 0, []
    read, batch = ImageReader.read, ImageReader.batch

    def counts(self: ImageReader, example: Any) -> np.ndarray:
        nonlocal held, most
        held += 1
        most = max(most, held)
        return read(self, example)

    def releases(self: ImageReader, batched: Sequence[TokenizedExample]) -> Any:
        nonlocal held
        made = batch(self, batched)
        held -= len(batched)
        rows.append(len(batched))
        return made

    monkeypatch.setattr(ImageReader, "read", counts)
    monkeypatch.setattr(ImageReader, "batch", releases)
    dumped(tmp_path / "c", folder / "vit", corpus_of(folder), batch_tokens=40, shard_rows=11)
    assert rows == [2, 2, 2, 2, 2, 1] and most <= 5  # the probe's and two batches


def test_batches_of_large_images_are_small(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a convolutional teacher is one place long, and counts by its pixels all the same."""
    teacher, rows = save(tmp_path / "resnet", "resnet", size={"shortest_edge": 64}), []
    batch = ImageReader.batch

    def counts(self: ImageReader, batched: Sequence[TokenizedExample]) -> Any:
        rows.append(len(batched))
        return batch(self, batched)

    monkeypatch.setattr(ImageReader, "batch", counts)
    dumped(tmp_path / "c", teacher, corpus_of(folder), batch_tokens=80, shard_rows=11)
    assert rows == [5, 5, 1]  # 64·64 pixels are 16 patches


def test_a_broken_image_names_its_row(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "pixels" / "7.png"
    path.write_bytes(path.read_bytes()[:60])  # the header is whole
    corpus = read_corpus(copy / "images.csv", task="image-classification")
    with pytest.raises(CorpusError, match=r"row '7': the image .*7\.png cannot be read"):
        dumped(tmp_path / "c", folder / "vit", corpus)


def test_images_that_cannot_be_used_are_told_before_work(tmp_path: Path) -> None:
    paint(tmp_path / "good.png", 1)
    (tmp_path / "words.png").write_text("no image")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    rows = [["good.png", "cat"], ["gone.png", "cat"], ["words.png", "cat"], ["deep.png", "cat"]]
    path = write_csv(tmp_path / "x.csv", rows)
    with pytest.raises(CorpusError) as caught:
        read_corpus(path, task="image-classification")
    told = str(caught.value)
    assert "3 rows without a usable image" in told and "good.png" not in told
    for words in ("line 3: there is no file", "line 4: cannot identify image", "line 5: ", "more than 8 bits"):
        assert words in told
    (tmp_path / "y.csv").write_text("picture,label\ngood.png,cat\n")
    with pytest.raises(CorpusError, match=r"has no image, path, file.*it has columns picture, label.*--text"):
        read_corpus(tmp_path / "y.csv", task="image-classification")
    assert read_corpus(tmp_path / "y.csv", task="image-classification", text="picture").examples[0].label == "cat"


def test_folders_of_classes(folder: Path, tmp_path: Path) -> None:
    for i, place in enumerate(["train/owl/a", "train/cat/b", "train/cat/c", "test/dog/a"]):
        paint(tmp_path / "x" / f"{place}.png", i)
    (tmp_path / "x" / "train" / "cat" / "notes.txt").write_text("none of the images")
    corpus = read_corpus(tmp_path / "x", task="image-classification")
    assert [(row.id, row.label) for row in corpus.examples] == [
        ("train/cat/b.png", "cat"),
        ("train/cat/c.png", "cat"),
        ("train/owl/a.png", "owl"),
    ]
    both = read_corpus(tmp_path / "x", split="train+test", task="image-classification")
    assert len(both.examples) == 4 and both.split == "train+test"
    flat = read_corpus(tmp_path / "x" / "train", task="image-classification")
    assert [row.id for row in flat.examples] == ["cat/b.png", "cat/c.png", "owl/a.png"] and flat.split is None
    with pytest.raises(CorpusError, match="no folders called like splits: leave --split test out"):
        read_corpus(tmp_path / "x" / "train", split="test", task="image-classification")
    with pytest.raises(CorpusError, match="no images in folders of their classes"):
        read_corpus(tmp_path / "x" / "train" / "cat", task="image-classification")
    dumped(tmp_path / "c", folder / "vit", both)
    assert whole(tmp_path / "c").ids == [row.id for row in both.examples]


def test_images_and_options_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    corpus, out = corpus_of(folder), tmp_path / "c"
    with pytest.raises(ConfigError, match="--max-length: images have no length"):
        dumped(out, folder / "vit", corpus, max_length=8)
    with pytest.raises(TeacherError, match="vocab"):
        dumped(out, folder / "vit", corpus, capture=["vocab:topk=4"])
    with pytest.raises(TeacherError, match="no pooler"):
        dumped(out, folder / "vit", corpus, capture=["pooled"])
    with pytest.raises(CorpusError, match="row '0' has no image"):
        dumped(out, folder / "vit", read_corpus(folder / "images.csv", text="image"))
    assert not out.exists()
    bare = shutil.copytree(folder / "vit", tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(TeacherError, match=r"no image processor \(preprocessor_config"):
        dumped(out, bare, corpus)
    loose = save(tmp_path / "loose", do_resize=False)
    with pytest.raises(TeacherError, match=r"does not take pixels of the shape \(3, 30, 17\)"):
        dumped(out, loose, corpus)
    loose = save(tmp_path / "resnet", "resnet", do_resize=False)
    with pytest.raises(TeacherError, match=r"row '1'.*shape \(3, 29, 18\).*and \(3, 30, 17\) of the first"):
        dumped(out, loose, corpus)


def test_students_of_images_come_later(folder: Path, tmp_path: Path) -> None:
    dumped(tmp_path / "c", folder / "vit", corpus_of(folder))
    with pytest.raises(ConfigError, match="the teacher of this cache is for image-classification"):
        train_student(open_cache(tmp_path / "c"), out=tmp_path / "run", options=StudentOptions(student="bilstm"))


def test_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for ask in (lambda: corpus_of(folder), lambda: load_teacher(str(folder / "vit"))):
        with pytest.raises(ConfigError, match=r"Pillow, which is not installed: pip install 'softlabels\[images\]'"):
            ask()


def test_memory_that_runs_out_opens_the_images_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumped(tmp_path / "easy", folder / "vit", corpus_of(folder), batch_tokens=34)
    take = TeacherRun.take

    def short(self: TeacherRun, batch: Any, **more: Any) -> Any:
        if len(batch.labels) > 2:
            raise torch.OutOfMemoryError("no room")
        return take(self, batch, **more)

    monkeypatch.setattr(TeacherRun, "take", short)
    report = dumped(tmp_path / "c", folder / "vit", corpus_of(folder), batch_tokens=68)
    assert report.batch_tokens < 68
    easy, hard = open_cache(tmp_path / "easy"), whole(tmp_path / "c")
    np.testing.assert_allclose(hard.column("logits"), easy.column("logits"), atol=1e-5)
    assert hard.token_hashes.tolist() == easy.token_hashes.tolist()


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from softlabels.cli import app

    command = ["dump", str(folder / "images.csv"), "--teacher", str(folder / "vit"), "--out", str(tmp_path / "c")]
    done = CliRunner().invoke(app, [*command, "--cpu"])
    assert done.exit_code == 0, done.output
    assert whole(tmp_path / "c").rows == 11
    command = ["verify", str(tmp_path / "c"), "--live", str(folder / "vit"), "--corpus", str(folder / "images.csv")]
    done = CliRunner().invoke(app, [*command, "--cpu"])
    assert done.exit_code == 0 and "every field is what its teacher says" in done.output
    command = ["plan", str(folder / "images.csv"), "--teacher", str(folder / "vit"), "--cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "images opened" in done.output


# ------------------------------------------------------------------------------ what is done with a corpus, and a cache


@pytest.mark.parametrize("captures", [["logits"], ["logits", "hidden:1", "qkv:1", "attention:2"]])
def test_a_plan_says_what_the_dump_takes(folder: Path, tmp_path: Path, captures: list[str]) -> None:
    corpus = corpus_of(folder)
    options = DumpOptions(capture=captures, shard_rows=4, batch_tokens=60)
    plan = plan_dump(corpus, teacher=str(folder / "vit"), options=options, out=tmp_path)
    dumped(tmp_path / "c", folder / "vit", corpus, capture=captures, codec="float16")
    tables = open_cache(tmp_path / "c").manifest.shards
    assert {name: table.total for name, table in tables.items()} == plan.fields
    assert plan.task == "image-classification" and plan.rows == 11 and plan.kept_mass is None
    assert plan.speed.rows_opened_per_second is not None and plan.speed.rows_opened_per_second > 0
    few = plan_dump(corpus, teacher=str(folder / "vit"), options=options, out=tmp_path, sample=3)  # each comes often
    assert few.sampled == 3 and few.fields["logits"] == plan.fields["logits"]
    with pytest.raises(ConfigError, match="--max-length: images have no length"):
        plan_dump(corpus, teacher=str(folder / "vit"), options=DumpOptions(max_length=8), out=tmp_path)


def test_a_live_check_opens_the_images_again(folder: Path, tmp_path: Path) -> None:
    corpus, vit = corpus_of(folder), str(folder / "vit")
    dumped(tmp_path / "c", folder / "vit", corpus, capture=["logits", "hidden:2", "qkv:1", "hidden:1@mean"])
    found = verify_live(tmp_path / "c", teacher=vit, corpus=corpus, rows=9)
    assert found.within and found.rows == 9, [part for part in found.fields if not part.within]
    assert {part.field for part in found.fields} >= {"logits", "hidden.02", "query.01", "hidden.01@mean"}
    with pytest.raises(CacheError, match="give the corpus that was dumped with --corpus"):
        verify_live(tmp_path / "c", teacher=vit)
    part = Corpus("part", None, corpus.examples[:3], corpus.label_names)
    with pytest.raises(CorpusError, match="no image for 8 of 11 rows"):
        verify_live(tmp_path / "c", teacher=vit, corpus=part)
    mixed = [replace(row, image=corpus.examples[i - 1].image) for i, row in enumerate(corpus.examples)]
    with pytest.raises(CorpusError, match="is not the image that was dumped"):
        verify_live(tmp_path / "c", teacher=vit, corpus=replace(corpus, examples=mixed))


def test_a_live_check_finds_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    """The teacher is the manifest's, but some logits of the cache are another's."""
    corpus = corpus_of(folder)
    dumped(tmp_path / "c", folder / "vit", corpus)
    path = tmp_path / "c" / "logits" / "00001.arrow"
    data = bytearray(path.read_bytes())
    wanted = open_cache(tmp_path / "c").column("logits")[5]
    at = data.find(wanted.tobytes())
    data[at : at + 4] = (wanted[:1] + 0.01).tobytes()
    path.write_bytes(data)
    found = verify_live(tmp_path / "c", teacher=str(folder / "vit"), corpus=corpus)
    assert [(part.field, part.within, part.worst_row) for part in found.fields] == [("logits", False, "5")]


@pytest.mark.slow
def test_two_processes_open_the_same_images(folder: Path, tmp_path: Path) -> None:
    corpus, options = corpus_of(folder), DumpOptions(capture=["logits", "hidden:2"], shard_rows=4, codec="float32")
    dump(corpus, teacher=str(folder / "vit"), out=tmp_path / "two", options=options, devices=["cpu", "cpu"])
    dumped(tmp_path / "one", folder / "vit", corpus, capture=["logits", "hidden:2"])
    one, two = open_cache(tmp_path / "one"), open_cache(tmp_path / "two")
    assert one.manifest.join == two.manifest.join
    assert np.allclose(one.column("logits"), two.column("logits"), atol=1e-5)
    assert verify_cache(tmp_path / "two").whole
