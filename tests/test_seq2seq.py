"""Encoder-decoder models, teacher to student: teacher-forced logits at every token of the target text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from softlabels.cache import Cache, open_cache
from softlabels.cache.verify import verify_cache
from softlabels.cache.vocab import open_vocab
from softlabels.config import DumpOptions, StudentOptions
from softlabels.corpus import Corpus, read_corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError, CorpusError, StudentError, TeacherError
from softlabels.fidelity import verify_live
from softlabels.perplexity import evaluate_language_model
from softlabels.plan import plan_dump
from softlabels.runs import load_run, save_run
from softlabels.tasks import encode_task_labels, find_task, tokenize_task
from softlabels.teacher import load_teacher, teacher_task
from softlabels.tokens import token_hash, tokenize
from softlabels.train import train_student
from softlabels.truncated import TruncatedLogits, truncate
from softlabels.types import NO_LABEL, SEQ2SEQ, Example
from tests.models import TEXTS, save_model, tiny_tokenizer

_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.1,
}


def model_of(kind: str, size: int) -> PreTrainedModel:
    """A tiny random one for a vocabulary of `size`, of which 0 is the pad token and 3 the end."""
    ids: dict[str, Any] = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    if kind == "t5":
        ids["decoder_start_token_id"] = 0
        return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **ids))
    if kind == "mbart":  # its decoder begins with the last token of the target, which is the language
        return MBartForConditionalGeneration(MBartConfig(**ids, **_BART))
    model = BartForConditionalGeneration(BartConfig(decoder_start_token_id=3, forced_eos_token_id=3, **ids, **_BART))
    torch.nn.init.normal_(model.final_logits_bias)  # as Marian's: it is part of what the head says
    return model


@pytest.fixture(scope="module", params=["t5", "bart", "mbart"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp(request.param), request.param)


def save_teacher(folder: Path, kind: str) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return save_model(folder, model_of(kind, len(tokenizer)), tokenizer)


def corpus_of(count: int) -> Corpus:
    """Rows of unlike lengths on both sides; some targets are longer than their texts."""
    texts = [text for text, _ in TEXTS]
    rows = [
        Example(
            f"row-{i}", " ".join(texts[i : i + 1 + i % 3]), target=" ".join(texts[20 - i].split()[: 2 + 3 * (i % 4)])
        )
        for i in range(count)
    ]
    return Corpus(source="made", split=None, examples=rows, label_names=None)


def dumped(folder: Path, teacher: Path, *captures: str, rows: int = 12, **options: Any) -> Cache:
    usual = {"capture": list(captures), "shard_rows": 5, "codec": "float32"}
    dump(corpus_of(rows), teacher=str(teacher), out=folder, options=DumpOptions.model_validate(usual | options))
    verdict = verify_cache(folder)
    assert verdict.whole, verdict.faults
    return open_cache(folder)


def forced_logits(teacher: Path, row: Example) -> torch.Tensor:
    """(M, V) of one row alone, by the model's own way from labels to logits."""
    loaded = load_teacher(str(teacher))
    text = loaded.tokenizer([row.text], return_tensors="pt")
    labels = loaded.tokenizer(text_target=[row.target], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return loaded.model(**text, labels=labels).logits[0]


@pytest.mark.parametrize("capture", ["vocab:exact", "vocab:topk=16", "vocab:topk=16,samples=4,packed"])
def test_the_cache_equals_the_forced_teacher(teacher: Path, tmp_path: Path, capture: str) -> None:
    more = ["qkv:1"] if capture == "vocab:exact" else []  # taken through the attention interface, decoder and all
    cache = dumped(tmp_path, teacher, capture, *more)
    assert cache.manifest.teacher.task == SEQ2SEQ
    vocab, rows = open_vocab(cache), [7, 0, 11, 2]
    batch = cache.batch(rows, vocab.fields)
    wanted = torch.cat([forced_logits(teacher, corpus_of(12).examples[row]) for row in rows])
    assert len(wanted) == int((batch.tokens.labels != NO_LABEL).sum())
    found = vocab(batch.teacher)
    if isinstance(found, torch.Tensor):
        assert torch.allclose(found, wanted, atol=1e-5)
        return
    assert isinstance(found, TruncatedLogits)
    best, off = truncate(wanted, k=16), 0.021 if vocab.form.packed else 2e-3
    assert torch.allclose(found.values, wanted.gather(1, found.ids), atol=off)
    assert torch.allclose(found.values, best.values, atol=off)
    assert torch.allclose(found.tail_logsumexp, best.tail_logsumexp, atol=0.05)


def test_what_the_decoder_reads_is_the_targets_shifted_once(teacher: Path, tmp_path: Path) -> None:
    cache, loaded = dumped(tmp_path, teacher, "vocab:topk=16"), load_teacher(str(teacher))
    batch = cache.tokens(range(12))
    shift: Any = loaded.model.prepare_decoder_input_ids_from_labels
    assert batch.decoder_input_ids is not None and batch.decoder_input_ids.shape == batch.labels.shape
    ends = {len(set((batch.labels != NO_LABEL).sum(1).tolist())), len(set(cache.lengths.tolist()))}
    assert min(ends) > 3, "rows of one length would show nothing"
    assert torch.equal(batch.decoder_input_ids, shift(labels=batch.labels))
    mask = batch.labels != NO_LABEL
    for row, example in enumerate(corpus_of(12).examples):
        target = loaded.tokenizer(text_target=example.target)["input_ids"]
        assert batch.labels[row][mask[row]].tolist() == target  # the first token too, and the end
    assert cache.targets is not None and cache.targets.tolist() == mask.sum(1).tolist()


def test_neither_batches_nor_shards_show(teacher: Path, tmp_path: Path) -> None:
    one = dumped(tmp_path / "a", teacher, "vocab:exact", "hidden:1")
    other = dumped(tmp_path / "b", teacher, "vocab:exact", "hidden:1", shard_rows=12, batch_tokens=60)
    rows = np.arange(12)
    for field in ("vocab_states", "hidden.01"):
        a, b = (cache.batch(rows, [field]).teacher.get(field) for cache in (one, other))
        assert torch.allclose(a, b, atol=1e-5)
    assert one.token_hashes.tolist() == other.token_hashes.tolist()


def test_layers_are_the_encoders(teacher: Path, tmp_path: Path) -> None:
    cache = dumped(tmp_path, teacher, "hidden:2", "qkv:1", "attention:2", rows=6)
    loaded = load_teacher(str(teacher))
    text = loaded.tokenizer([corpus_of(6).examples[3].text], return_tensors="pt")
    with torch.no_grad():
        states = loaded.model.get_encoder()(**text, output_hidden_states=True).hidden_states
    batch = cache.batch([3], ["hidden.02", "attention.02"])
    assert torch.allclose(batch.teacher.hidden(2), states[2], atol=1e-5)
    length = int(cache.lengths[3])
    assert batch.teacher.attention_probs(2).shape == (1, 4, length, length)
    with pytest.raises(ConfigError, match="no layer 3; it has 0 to 2"):
        dumped(tmp_path / "x", teacher, "hidden:3")
    with pytest.raises(ConfigError, match="capture vocab:topk=64"):
        dumped(tmp_path / "y", teacher, "logits")


def test_rows_join_by_text_and_target(teacher: Path) -> None:
    loaded = load_teacher(str(teacher))
    rows = [("Cook the onions", "golden sauce"), ("Cook the onions", "sauce"), ("Cook the", "onions golden sauce")]
    examples = [Example(str(i), text, target=target) for i, (text, target) in enumerate(rows)]
    labels = encode_task_labels(SEQ2SEQ, examples, [])
    found = tokenize_task(SEQ2SEQ, loaded.tokenizer, examples, max_length=64, labels=labels, model=loaded.model)
    plain = tokenize(loaded.tokenizer, examples, max_length=64)
    assert len({token_hash(row) for row in (*found.examples, *plain.examples)}) == 5  # two texts are the same


def test_a_live_check(teacher: Path, tmp_path: Path) -> None:
    dumped(tmp_path, teacher, "vocab:topk=8,samples=2", "vocab:exact", "hidden:1", codec="float16")
    found = verify_live(tmp_path, teacher=str(teacher), rows=12)
    assert found.within, [part for part in found.fields if not part.within]
    assert {part.field for part in found.fields} >= {"vocab_values", "vocab_tail", "vocab_states", "hidden.01"}


@pytest.mark.slow
def test_two_processes_write_the_same_rows(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "t", "mbart")
    dump(
        corpus_of(12),
        teacher=str(teacher),
        out=tmp_path / "two",
        options=DumpOptions(capture=["vocab:topk=8"], shard_rows=5, codec="float32"),
        devices=["cpu", "cpu"],
    )
    one, two = dumped(tmp_path / "one", teacher, "vocab:topk=8"), open_cache(tmp_path / "two")
    assert one.manifest.join == two.manifest.join
    found, wanted = (cache.batch(range(12), ["vocab_values"]).teacher.get("vocab_values") for cache in (two, one))
    assert torch.allclose(found, wanted, atol=1e-3)


def test_damage_is_told(tmp_path: Path) -> None:
    cache = dumped(tmp_path / "c", save_teacher(tmp_path / "t", "bart"), "vocab:topk=8")
    path = cache.path / "examples" / "00001.arrow"
    whole = path.read_bytes()
    labels = whole.rfind(cache.tokens([5]).labels[0, :3].numpy().astype("<i4").tobytes())
    starts = whole.rfind(np.full(5, 3, "<i4").tobytes())  # of the shard's five rows
    assert 0 < labels < starts
    for at, number in ((labels, NO_LABEL), (labels, -7), (labels, 5000), (starts, -1), (starts, 5000)):
        data = bytearray(whole)
        data[at : at + 4] = np.array([number], "<i4").tobytes()
        path.write_bytes(data)
        assert [fault.kind for fault in verify_cache(cache.path).faults] == ["changed"]
        with pytest.raises(CacheError, match=r"target texts with tokens that are none|token labels that are neither"):
            open_cache(cache.path).tokens([5])


def test_a_plan(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", "bart")
    for capture in (["vocab:topk=16"], ["vocab:exact"]):
        options = DumpOptions(capture=capture, shard_rows=5)
        plan = plan_dump(corpus_of(12), teacher=str(teacher), options=options, out=tmp_path)
        dump(corpus_of(12), teacher=str(teacher), out=tmp_path / capture[0], options=options)
        tables = open_cache(tmp_path / capture[0]).manifest.shards
        assert {name: table.total for name, table in tables.items()} == plan.fields
        assert plan.kept_mass is not None and 0 < plan.kept_mass[16][1.0] < 1 and plan.task == SEQ2SEQ


# ---------------------------------------------------------------------------------------------------------- students


@pytest.mark.parametrize("taught_by, kind", [("t5", "t5"), ("mbart", "bart")])
def test_a_student_learns_to_write(tmp_path: Path, taught_by: str, kind: str) -> None:
    teacher = save_teacher(tmp_path / "teacher", taught_by)
    cache = dumped(tmp_path / "cache", teacher, "vocab:topk=16", rows=20, shard_rows=64)
    options = StudentOptions(
        student="transformer",
        options={"layers": 1, "hidden_size": 32, "heads": 4, "model_type": kind},
        losses={"kl": 0.9, "ce": 0.1},
        temperature="2",
        epochs=6,
        batch_size=4,
        lr=1e-2,
    )
    report = train_student(cache, out=tmp_path / "run", options=options, cpu=True)
    run = load_run(tmp_path / "run")
    assert isinstance(run.student, PreTrainedModel) and run.student.config.model_type == kind
    losses = [entry["train/loss"] for entry in run.record.history]
    assert losses[-1] < 0.8 * losses[0] and report.validation["loss"] < losses[0]
    assert cache.decoder_starts is not None
    assert run.student.config.decoder_start_token_id == cache.decoder_starts[0]
    generate: Any = run.student.generate
    assert run.tokenizer is not None
    written = generate(**run.tokenizer(["Cook the"], return_tensors="pt"), max_new_tokens=5)
    assert written[0, 0] == cache.decoder_starts[0] and written.shape[1] > 1
    own = run.student.config
    assert getattr(own, "decoder_layers", getattr(own, "num_decoder_layers", 0)) == 1


def test_perplexity_and_distance_to_the_teacher(tmp_path: Path) -> None:
    """The teacher itself as the student: no distance, and its own perplexity by a plain loop."""
    teacher = save_teacher(tmp_path / "teacher", "bart")
    cache = dumped(tmp_path / "cache", teacher, "vocab:exact")
    options = StudentOptions(student="transformer", losses={"ce": 1.0}, epochs=1, options={"layers": 1})
    train_student(cache, out=tmp_path / "run", options=options, cpu=True)
    record = load_run(tmp_path / "run").record
    save_run(tmp_path / "twin", load_teacher(str(teacher)).model, record, tokenizer=cache.tokenizer())
    found = evaluate_language_model(tmp_path / "twin", corpus_of(12), cache=cache)
    surprise = 0.0
    for row, example in enumerate(corpus_of(12).examples):
        labels = cache.tokens([row]).labels[0]
        surprise += float(torch.nn.functional.cross_entropy(forced_logits(teacher, example), labels, reduction="sum"))
    assert cache.targets is not None and found.targets == cache.targets.sum()
    assert found.perplexity == pytest.approx(math.exp(surprise / found.targets), rel=1e-4)
    assert found.fidelity is not None and found.fidelity.targets == found.targets
    assert abs(found.fidelity.kl) < 1e-5 and found.fidelity.agreement == 1
    assert found.fidelity.teacher_perplexity == pytest.approx(found.perplexity, rel=1e-4)
    other = evaluate_language_model(tmp_path / "run", corpus_of(12), cache=cache)
    assert other.fidelity is not None and other.fidelity.kl > 0.01


def test_students_that_cannot_be(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", "t5")
    cache = dumped(tmp_path / "cache", teacher, "vocab:topk=8")
    for name, options, told in (
        ("bilstm", {}, "can't be a seq2seq-lm"),
        ("transformer", {"model_type": "bert"}, "can't be built|can't read"),
        ("transformer", {"init_from": str(teacher), "init_layers": [1]}, "init_from"),
    ):
        with pytest.raises((ConfigError, StudentError), match=told):
            train_student(
                cache, out=tmp_path / "run", options=StudentOptions(student=name, options=options, epochs=1), cpu=True
            )


# ----------------------------------------------------------------------------------------------------------- corpora


def rows_in(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_and_targets_are_found(tmp_path: Path) -> None:
    for source, target in (("text", "target"), ("document", "summary"), ("article", "highlights")):
        corpus = read_corpus(rows_in(tmp_path / "x.jsonl", {source: "a b", target: "c"}), task=SEQ2SEQ)
        assert [(row.text, row.target, row.label) for row in corpus.examples] == [("a b", "c", None)]
    path = rows_in(tmp_path / "y.jsonl", {"en": "a", "de": "b", "text": "x", "target": "y"})
    corpus = read_corpus(path, task=SEQ2SEQ, text="en", label="de")
    assert (corpus.examples[0].text, corpus.examples[0].target) == ("a", "b")
    assert corpus.hash != read_corpus(path, task=SEQ2SEQ, text="en").hash


@pytest.mark.parametrize(
    "row, told",
    [
        ({"text": "a"}, "no target, summary, .* Name it with --label"),
        ({"target": "a"}, "no text, source, .* Name it with --text"),
        ({"text": "a", "target": None}, "without a usable target text: line 1: 'target' is missing"),
        ({"text": "a", "target": " "}, "'target' is empty"),
        ({"text": "a", "document": "b", "target": "c"}, "could mean text or document"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    with pytest.raises(CorpusError, match=told):
        read_corpus(rows_in(tmp_path / "x.jsonl", row), task=SEQ2SEQ)


def test_what_no_encoder_decoder_takes(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "t", "t5")
    assert teacher_task(str(folder)) == SEQ2SEQ
    plain = Corpus("made", None, [Example("0", "a b c d")], None)
    with pytest.raises(CorpusError, match="row '0' has no target text"):
        dump(plain, teacher=str(folder), out=tmp_path / "c")
    with pytest.raises(TeacherError, match="which no task fits"):
        find_task(T5Config(architectures=["LlavaForConditionalGeneration"], is_encoder_decoder=False), where="x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    with pytest.raises(TeacherError, match="decoder_start_token_id"):
        dump(corpus_of(3), teacher=str(folder), out=tmp_path / "d")


def test_texts_and_targets_are_cut_and_counted(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "t", "bart")
    long = " ".join(["rain"] * 30)
    rows = [Example("a", long, target="rain"), Example("b", "rain", target=long), Example("c", long, target=long)]
    corpus = Corpus("made", None, [*rows, Example("d", "rain and wind today", target="wind")], None)
    report = dump(corpus, teacher=str(folder), out=tmp_path / "c", options=DumpOptions(max_length=16))
    cache = open_cache(tmp_path / "c")
    assert report.truncated == 3 and cache.targets is not None
    whole = len(load_teacher(str(folder)).tokenizer("rain and wind today")["input_ids"])
    assert cache.lengths.tolist() == [16, 3, 16, whole] and cache.targets.tolist() == [3, 16, 16, 3]
    texts = [value for shard in [cache.table("examples", 0)] for value in shard.column("target").to_pylist()]
    assert texts == ["rain", long, long, "wind"]
