"""Language models, teacher to student: logits over a vocabulary in every form, and what is learned of them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertForMaskedLM, GPT2LMHeadModel

from softlabels import train
from softlabels.cache import Cache, open_cache
from softlabels.cache.concatenate import concatenate
from softlabels.cache.factors import FACTORS, save_factors
from softlabels.cache.head import HEAD
from softlabels.cache.verify import verify_cache
from softlabels.cache.vocab import Form, open_vocab, parse_form
from softlabels.captures.output_head import keep_head, only_targets
from softlabels.config import DumpOptions, Masking, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError, TeacherError
from softlabels.factors import fit_factors
from softlabels.fidelity import verify_live
from softlabels.losses import language
from softlabels.losses import vocab as losses
from softlabels.perplexity import evaluate_language_model
from softlabels.runs import load_run, save_run
from softlabels.tasks import mask_tokens, masking_rates
from softlabels.teacher import load_teacher
from softlabels.tokens import tokenize
from softlabels.train import train_student
from softlabels.truncated import TruncatedLogits, tail_mean_at, truncate
from softlabels.types import NO_LABEL, UNMASKED, Example, Signals, TokenBatch
from tests.models import TEXTS
from tests.test_tasks import save

KINDS = ["GPT2LMHeadModel", "BertForMaskedLM"]
FORMS = [
    "vocab:exact",
    "vocab:topk=16",
    "vocab:topk=16,samples=2",
    "vocab:topk=16,samples=4,packed",
    "vocab:topk=16,factors=8",
    "vocab:topk=16,samples=1,factors=8,packed",
]


def corpus_of(count: int) -> Corpus:
    rows = [Example(f"row-{i}", text) for i, (text, _) in enumerate(TEXTS[:count])]
    return Corpus(source="made", split=None, examples=rows, label_names=None)


@pytest.fixture(scope="module", params=KINDS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("teacher"), request.param)


def dumped(folder: Path, teacher: Path, capture: str, *, rows: int = 12, **options: Any) -> Cache:
    usual = {"capture": [capture], "shard_rows": 5, "codec": "float32"}
    dump(corpus_of(rows), teacher=str(teacher), out=folder, options=DumpOptions.model_validate(usual | options))
    assert verify_cache(folder).whole
    return open_cache(folder)


def live_logits(teacher: Path, tokens: TokenBatch) -> torch.Tensor:
    """(T, V) by the model as it is, every position computed."""
    loaded = load_teacher(str(teacher))
    with torch.no_grad():
        logits = loaded.model(**tokens.model_inputs()).logits
    return logits[tokens.labels != NO_LABEL][:, : len(loaded.tokenizer)]


@pytest.mark.parametrize("capture", FORMS)
def test_the_cache_equals_the_live_teacher(teacher: Path, tmp_path: Path, capture: str) -> None:
    cache = dumped(tmp_path, teacher, capture)
    vocab = open_vocab(cache)
    assert f"vocab:{vocab.form}" == capture
    batch = cache.batch([7, 0, 11], vocab.fields)
    wanted = live_logits(teacher, batch.tokens)
    assert cache.targets is not None and len(wanted) == cache.targets[[7, 0, 11]].sum()
    found = vocab(batch.teacher)
    if isinstance(found, torch.Tensor):
        assert torch.allclose(found, wanted, atol=1e-4)
        return
    best = truncate(wanted, k=16)
    off = 0.021 if vocab.form.packed else 0.01
    chosen = wanted.gather(1, found.ids)
    assert torch.allclose(found.values, chosen, atol=off) and torch.allclose(found.values, best.values, atol=off)
    assert torch.allclose(found.tail_logsumexp, best.tail_logsumexp, atol=0.05)
    assert found.samples == vocab.form.samples
    if found.samples:
        assert torch.allclose(found.sampled_values, wanted.gather(1, found.sampled_ids), atol=0.05)


def test_what_is_sampled_does_not_depend_on_the_batch(teacher: Path, tmp_path: Path) -> None:
    one = dumped(tmp_path / "a", teacher, FORMS[2])
    other = dumped(tmp_path / "b", teacher, FORMS[2], shard_rows=12, batch_tokens=64)
    rows = np.arange(12)
    field = "vocab_sampled_ids"
    assert torch.equal(one.batch(rows, [field]).teacher.get(field), other.batch(rows, [field]).teacher.get(field))


def test_columns_beyond_the_tokenizer_are_left_out(tmp_path: Path) -> None:
    """A model may have more rows in its head than the tokenizer has tokens."""
    folder = save(tmp_path / "t", "GPT2LMHeadModel")
    loaded = load_teacher(str(folder))
    size = len(loaded.tokenizer)
    padded = GPT2LMHeadModel.from_pretrained(folder)
    padded.resize_token_embeddings(size + 37)
    padded.save_pretrained(folder)
    for number, capture in enumerate(FORMS[:2]):
        cache = dumped(tmp_path / f"c{number}", folder, capture)
        vocab = open_vocab(cache)
        found = vocab(cache.batch([1, 2], vocab.fields).teacher)
        assert vocab.vocab_size == size
        assert (found.shape[1] if isinstance(found, torch.Tensor) else found.vocab_size) == size


def test_the_head_sees_only_targets(teacher: Path) -> None:
    model = load_teacher(str(teacher)).model
    ids = torch.randint(5, 50, (2, 7))
    targets = torch.zeros(2, 7, dtype=torch.bool)
    targets[0, 2] = targets[1, 5] = targets[1, 6] = True
    with torch.no_grad():
        whole = model(ids).logits
        with only_targets(model, targets) as seen:
            assert torch.allclose(model(ids).logits, whole[targets], atol=1e-5) and seen[0].shape[0] == 3
        assert torch.equal(model(ids).logits, whole)  # nothing stays behind


def test_logits_that_are_more_than_a_linear_map(teacher: Path) -> None:
    model = load_teacher(str(teacher)).model
    states, logits = torch.randn(4, 32), torch.randn(4, 300)
    with pytest.raises(TeacherError, match="does more to its logits"):
        keep_head(model, states, logits, vocab_size=100)


def test_forms() -> None:
    assert parse_form("exact") == Form() and str(parse_form("topk=8,samples=3,packed")) == "topk=8,samples=3,packed"
    assert parse_form("topk=8,packed,factors=4") == Form(8, packed=True, factors=4)
    with pytest.raises(ConfigError, match="257 factors of the tail: give 256 at the most"):
        parse_form("topk=8,factors=257")
    for text in ("", "topk", "topk=0", "topk=x", "top=3", "topk=3,topk=4", "exact,packed", "samples=2"):
        with pytest.raises(ConfigError, match="vocab:exact, vocab:topk=64"):
            parse_form(text)


def test_a_vocabulary_is_a_language_models(tmp_path: Path) -> None:
    folder = save(tmp_path / "t", "BertForSequenceClassification")
    with pytest.raises(TeacherError, match="no output head over a vocabulary"):
        dumped(tmp_path / "c", folder, "vocab:exact")


def test_a_lost_or_foreign_head(teacher: Path, tmp_path: Path) -> None:
    cache = dumped(tmp_path, teacher, "vocab:exact")
    path = tmp_path / "teacher" / HEAD
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert not verify_cache(tmp_path).whole
    with pytest.raises(CacheError, match="damaged"):
        open_vocab(cache)
    path.unlink()
    with pytest.raises(CacheError, match="is missing"):
        open_vocab(cache)
    path.write_bytes(whole)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"width": 32', '"width": 16'))
    with pytest.raises(CacheError, match=r"no head of|does not belong"):
        open_vocab(open_cache(tmp_path)), open_cache(tmp_path).batch([0], ["vocab_states"])


def test_factors_are_kept_once_and_used(teacher: Path, tmp_path: Path) -> None:
    """Those of the teacher's logits at the rows of the cache, so that its tails are expected nearly as they are."""
    cache = dumped(tmp_path, teacher, FORMS[4], rows=40)
    vocab = open_vocab(cache)
    batch = cache.batch([7, 0, 11], vocab.fields)
    kept, wanted = vocab(batch.teacher), live_logits(teacher, batch.tokens)
    assert isinstance(kept, TruncatedLogits) and kept.factors is not None and vocab.factors is kept.factors
    expected = kept.factors.expect(kept.ids, kept.values, tail_mean=tail_mean_at(kept, 2.0), temperature=2.0)
    even = torch.zeros_like(wanted).scatter(1, kept.ids, -math.inf)
    true = (wanted / 2).scatter(1, kept.ids, -math.inf).softmax(1)
    off, of_even = ((true - guess.softmax(1)).abs().sum(1).mean() for guess in (expected, even))
    assert off < 0.8 * of_even
    says = Signals({}, batch.tokens.attention_mask, batch.tokens.labels, kept)
    own = Signals({"logits": torch.randn(wanted.shape, generator=torch.Generator())}, says.mask, says.labels)
    by_name = losses.kl(own.logits, kept, temperature=2.0, tail="factors")
    assert torch.equal(language.kl(own, says, temperature=2.0), by_name)


def test_the_same_dump_gives_the_same_factors(teacher: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        dumped(tmp_path / name, teacher, FORMS[4])
    one, other = ((tmp_path / name / "teacher" / FACTORS).read_bytes() for name in ("a", "b"))
    assert one == other
    dumped(tmp_path / "b", teacher, FORMS[4])  # again, into the finished cache
    assert (tmp_path / "b" / "teacher" / FACTORS).read_bytes() == one


def test_factors_that_float16_cannot_hold(tmp_path: Path) -> None:
    wild = fit_factors(torch.randn(9, 30, generator=torch.Generator()) * 1e6, rank=4)
    with pytest.raises(CacheError, match="float16 holds 65,504"):
        save_factors(tmp_path, wild)
    assert not list(tmp_path.iterdir())


def test_lost_damaged_or_foreign_factors(teacher: Path, tmp_path: Path) -> None:
    cache = dumped(tmp_path, teacher, FORMS[4])
    path = tmp_path / "teacher" / FACTORS
    whole = path.read_bytes()
    for damage in (whole[:-10], whole + b" " * (1 << 21), b"", save_tensors({"mean": torch.zeros(3)})):
        path.write_bytes(damage)
        assert not verify_cache(tmp_path).whole
        with pytest.raises(CacheError, match=r"damaged|refused"):
            open_vocab(cache)
    parts = load_tensors(whole)
    path.write_bytes(save_tensors(parts | {"noise": -parts["noise"]}))
    with pytest.raises(CacheError, match="not above 0"):
        open_vocab(cache)
    for foreign in ({"mean": parts["mean"][:-1].clone()}, {"loadings": torch.zeros(len(parts["mean"]), 9).half()}):
        path.write_bytes(save_tensors(parts | foreign))
        with pytest.raises(CacheError, match="of another teacher"):
            open_vocab(cache)
    path.unlink()
    with pytest.raises(CacheError, match="is missing"):
        open_vocab(cache)


# --------------------------------------------------------------------------------------------------------- students


def test_losses_are_those_of_the_full_logits(teacher: Path, tmp_path: Path) -> None:
    """Of exact logits to the letter; of k = V − 1, where the tail is one token, as nearly."""
    exact = dumped(tmp_path / "a", teacher, "vocab:exact")
    size = exact.manifest.teacher.vocab_size
    nearly = dumped(tmp_path / "b", teacher, f"vocab:topk={size - 1}")
    results = []
    for cache in (exact, nearly):
        vocab = open_vocab(cache)
        batch = cache.batch([3, 4], vocab.fields)
        says = Signals({}, batch.tokens.attention_mask, batch.tokens.labels, vocab(batch.teacher))
        generator = torch.Generator().manual_seed(0)
        count = int((batch.tokens.labels != NO_LABEL).sum())
        own = Signals({"logits": torch.randn(count, size, generator=generator)}, says.mask, says.labels)
        losses = (language.kl, language.reverse_kl, language.soft_cross_entropy)
        results.append([float(loss(own, says, temperature=2.0)) for loss in losses])
        p = (live_logits(teacher, batch.tokens).double() / 2).log_softmax(1)
        q = (own.logits.double() / 2).log_softmax(1)
        kl, reverse = ((p.exp() * (p - q)).sum(1).mean() * 4).item(), ((q.exp() * (q - p)).sum(1).mean() * 4).item()
        cross = -(p.exp() * q).sum(1).mean().item()
        assert results[-1] == pytest.approx([kl, reverse, cross], rel=2e-3)


@pytest.mark.parametrize("capture", [FORMS[0], FORMS[1], FORMS[3], FORMS[4]])
def test_a_student_learns_the_language(teacher: Path, tmp_path: Path, capture: str) -> None:
    cache = dumped(tmp_path / "cache", teacher, capture, rows=40, shard_rows=64)
    options = StudentOptions(
        student="transformer",
        options={"layers": 1, "hidden_size": 32, "heads": 4},
        losses={"kl": 1.0},
        temperature="2",
        epochs=6,
        batch_size=8,
        lr=1e-2,
    )
    report = train_student(cache, out=tmp_path / "run", options=options, cpu=True)
    run = load_run(tmp_path / "run")
    losses = [entry["train/loss"] for entry in run.record.history]
    assert losses[-1] < 0.7 * losses[0] and report.validation["loss"] < losses[0]
    causal = run.record.task == "causal-lm"
    plain = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_pretrained(tmp_path / "run")
    batch = cache.batch([0, 1], [])
    assert isinstance(run.student, torch.nn.Module)
    with torch.no_grad():
        one, other = plain(**_inputs(plain, batch.tokens)).logits, run.student(**_inputs(plain, batch.tokens)).logits
    assert torch.allclose(one, other, atol=1e-5) and type(plain) is type(run.student)
    assert isinstance(plain, GPT2LMHeadModel if causal else BertForMaskedLM)


def _inputs(model: Any, tokens: TokenBatch) -> dict[str, torch.Tensor]:
    from softlabels.students import student_inputs

    return student_inputs(model, tokens)


def test_tokens_alone_teach_too(teacher: Path, tmp_path: Path) -> None:
    cache = dumped(tmp_path / "cache", teacher, "hidden:1", rows=30)
    options = StudentOptions(
        student="transformer",
        options={"layers": 1, "hidden_size": 32, "heads": 4, "model_type": "roberta"},
        losses={"ce": 1.0},
        epochs=2,
        lr=1e-2,
    )
    if cache.manifest.teacher.task == "causal-lm":
        options = options.model_copy(update={"options": {**options.options, "model_type": "gpt2"}})
    report = train_student(cache, out=tmp_path / "run", options=options, cpu=True)
    assert math.isfinite(report.validation["loss"])
    with pytest.raises(CacheError, match=r"needs vocab_ids; cache .* Dump it with --capture vocab:topk=64"):
        soft = options.model_copy(update={"losses": {"kl": 1.0}})
        train_student(cache, out=tmp_path / "soft", options=soft, cpu=True)


def test_students_that_are_no_language_models(teacher: Path, tmp_path: Path) -> None:
    cache = dumped(tmp_path / "cache", teacher, FORMS[1])
    with pytest.raises(ConfigError, match="give --student transformer"):
        train_student(cache, out=tmp_path / "run", options=StudentOptions(student="bilstm"), cpu=True)
    with pytest.raises(ConfigError, match="needs all logits"):
        options = StudentOptions(student="transformer", losses={"mse_logits": 1.0}, epochs=1)
        train_student(cache, out=tmp_path / "other", options=options, cpu=True)


@pytest.mark.parametrize("capture", ["vocab:exact", "vocab:topk=16,samples=2", "vocab:topk=16,factors=8,packed"])
def test_a_masked_teacher_that_speaks_of_every_token(tmp_path: Path, capture: str) -> None:
    """The tokens masked are the same; KL is over all, special ones too, and cross entropy over those alone."""
    teacher = save(tmp_path / "teacher", "BertForMaskedLM")
    masked = dumped(tmp_path / "masked", teacher, capture, masking={"seed": 3})
    every = dumped(tmp_path / "every", teacher, capture, masking={"seed": 3, "targets": "all"})
    assert masked.token_hashes.tolist() == every.token_hashes.tolist()
    assert every.targets is not None and every.targets.tolist() == every.lengths.tolist()
    assert masked.targets is not None
    assert '"targets"' not in (tmp_path / "masked" / "manifest.json").read_text()
    assert verify_live(tmp_path / "every", teacher=str(teacher), device="cpu").within
    rows = list(range(every.rows))
    vocab = open_vocab(every)
    batch, few = every.batch(rows, vocab.fields), masked.batch(rows, [])
    labels = batch.tokens.labels
    assert torch.equal(torch.where(labels == UNMASKED, NO_LABEL, labels), few.tokens.labels)
    assert torch.equal(labels != NO_LABEL, batch.tokens.attention_mask == 1)
    live = live_logits(teacher, batch.tokens)  # at all tokens
    student = Signals({"logits": live.double() / 2}, batch.tokens.attention_mask, labels)
    hard = [
        -torch.log_softmax(row, -1)[label]
        for row, label in zip(student.logits, labels[labels != NO_LABEL], strict=True)
        if label >= 0
    ]
    assert len(hard) == masked.targets.sum() < len(live)
    assert language.ce(student, student).item() == pytest.approx(float(torch.stack(hard).mean()), rel=1e-9)
    if capture == "vocab:exact":
        p, q = (torch.softmax(logits, -1) for logits in (live.double() / 2, student.logits / 2))
        kl = 4 * (p * (p.log() - q.log())).sum(-1).mean()  # T = 2
        heard = Signals({}, batch.tokens.attention_mask, labels, vocab(batch.teacher))
        assert language.kl(student, heard, temperature=2.0).item() == pytest.approx(float(kl), rel=1e-4)
    losses = {"kl": 5.0, "ce": 2.0}
    options = StudentOptions(student="transformer", losses=losses, epochs=2, lr=3e-3, options={"layers": 1})
    train_student(every, out=tmp_path / "run", options=options, cpu=True)
    found = evaluate_language_model(tmp_path / "run", corpus_of(12), cache=every)
    assert found.targets == masked.targets.sum() and found.fidelity is not None
    assert found.fidelity.targets == len(live) and found.fidelity.kl > 0
    if capture == "vocab:exact":
        surprise = [
            -torch.log_softmax(row.double(), -1)[label]
            for row, label in zip(live, labels[labels != NO_LABEL], strict=True)
            if label >= 0
        ]
        wanted = math.exp(float(torch.stack(surprise).mean()))
        assert found.fidelity.teacher_perplexity == pytest.approx(wanted, rel=1e-3)


def test_rare_tokens_are_masked_more_often(tmp_path: Path) -> None:
    """∝ count^-0.7, in the whole as many; whatever shard a row is in, and again when a student is scored."""
    teacher, masking = save(tmp_path / "teacher", "BertForMaskedLM"), {"smoothing": 0.7, "times": 3}
    tokenizer = load_teacher(str(teacher)).tokenizer
    texts = [" ".join(text for text, _ in TEXTS[start : start + 5]) for start in range(0, 60, 5)]  # none without a mask
    corpus = Corpus("made", None, [Example(str(i), text) for i, text in enumerate(texts)], None)
    rates = masking_rates(corpus, tokenizer, Masking(smoothing=0.7), max_length=64)
    rows = tokenize(tokenizer, corpus.examples, max_length=64).examples
    counts = Counter(number for row in rows for number in row.input_ids.tolist())
    for number in tokenizer.all_special_ids:
        del counts[number]
    assert rates is not None and rates.max() <= 1
    assert sum(count * rates[number] for number, count in counts.items()) == pytest.approx(0.15 * counts.total())
    ratios = [rates[number] / count**-0.7 for number, count in counts.items() if rates[number] < 1]
    assert ratios == pytest.approx([ratios[0]] * len(ratios)) and len(ratios) > 50
    high = masking_rates(corpus, tokenizer, Masking(smoothing=1.0, rate=0.6), max_length=64)
    assert high is not None and (high == 1).any()  # and yet as many as asked
    assert sum(count * high[number] for number, count in counts.items()) == pytest.approx(0.6 * counts.total())
    masked: Counter[int] = Counter()
    for seed in range(200):
        for row in rows:
            labels = mask_tokens(row, tokenizer, Masking(smoothing=0.7, seed=seed), rates).labels
            assert labels is not None
            masked.update(labels[labels != NO_LABEL].tolist())
    common = [number for number, _ in counts.most_common(5)]
    rare = [number for number, count in counts.items() if count == 1]
    for group in (common, rare):
        wanted = 200 * sum(counts[number] * rates[number] for number in group)
        assert sum(masked[number] for number in group) == pytest.approx(wanted, rel=0.05)
    cache = dumped(tmp_path / "cache", teacher, "vocab:topk=16", masking=masking)
    other = dumped(tmp_path / "other", teacher, "vocab:topk=16", masking=masking, shard_rows=7)
    plain = dumped(tmp_path / "plain", teacher, "vocab:topk=16", masking={"times": 3})
    assert cache.token_hashes.tolist() == other.token_hashes.tolist() != plain.token_hashes.tolist()
    assert '"smoothing"' not in (tmp_path / "plain" / "manifest.json").read_text()
    options = StudentOptions(student="transformer", losses={"kl": 1.0}, epochs=1, options={"layers": 1})
    train_student(cache, out=tmp_path / "run", options=options, cpu=True)
    found = evaluate_language_model(tmp_path / "run", corpus_of(12), cache=cache)
    assert cache.targets is not None and found.fidelity is not None
    assert found.fidelity.targets == found.targets == cache.targets.sum()
    with pytest.raises(CacheError, match="give the one that was dumped"):
        evaluate_language_model(tmp_path / "run", corpus_of(11), cache=cache)
    with pytest.raises(CacheError, match="in parts with --part"):
        concatenate([tmp_path / "cache", tmp_path / "other"], out=tmp_path / "both")


def test_truncated_logits_have_their_own_place() -> None:
    """Signals carry them beside the fields, from device to device."""
    kept = truncate(torch.randn(3, 20), k=4)
    moved = Signals({}, torch.ones(1, 3), torch.zeros(1, 3), kept).to("cpu")
    assert isinstance(moved.vocabulary, TruncatedLogits) and torch.equal(moved.vocabulary.ids, kept.ids)
    with pytest.raises(CacheError, match="hold none"):
        _ = Signals({}, torch.ones(1, 3), torch.zeros(1, 3)).vocabulary


# ------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("capture", FORMS[:2])
def test_perplexity_and_distance_to_the_teacher(teacher: Path, tmp_path: Path, capture: str) -> None:
    """The teacher itself as the student: no distance, and its own perplexity by a plain loop."""
    cache = dumped(tmp_path / "cache", teacher, capture, masking={"seed": 3, "times": 2})
    options = StudentOptions(student="transformer", losses={"ce": 1.0}, epochs=1, options={"layers": 1})
    train_student(cache, out=tmp_path / "run", options=options, cpu=True)
    record = load_run(tmp_path / "run").record
    save_run(tmp_path / "twin", load_teacher(str(teacher)).model, record, tokenizer=cache.tokenizer())
    found = evaluate_language_model(tmp_path / "twin", corpus_of(12), cache=cache)
    surprise = 0.0
    for row in range(cache.rows):
        tokens = cache.tokens([row])
        labels = tokens.labels[tokens.labels != NO_LABEL]
        surprise += float(torch.nn.functional.cross_entropy(live_logits(teacher, tokens), labels, reduction="sum"))
    assert cache.targets is not None and found.targets == cache.targets.sum()
    assert found.perplexity == pytest.approx(math.exp(surprise / found.targets), rel=1e-4)
    assert found.fidelity is not None and found.fidelity.targets == found.targets
    assert abs(found.fidelity.kl) < 1e-4 and found.fidelity.agreement > 0.99
    exact = capture == "vocab:exact"
    assert found.fidelity.teacher_perplexity == (pytest.approx(found.perplexity, rel=1e-3) if exact else None)
    other = evaluate_language_model(tmp_path / "run", corpus_of(12), cache=cache)
    assert other.fidelity is not None and other.fidelity.kl > 0.01
    assert evaluate_language_model(tmp_path / "run", corpus_of(12)).fidelity is None
    with pytest.raises(CacheError, match="no row of made"):
        strange = [Example(f"x{i}", text) for i, (text, _) in enumerate(TEXTS[:2])]
        corpus = Corpus(source="made", split=None, examples=strange, label_names=None)
        evaluate_language_model(tmp_path / "run", corpus, cache=cache)


def test_an_interrupted_training_resumes_to_the_same_weights(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output head shares its weights with the embedding, in checkpoints too."""
    cache = dumped(tmp_path / "cache", teacher, FORMS[1])
    options = StudentOptions(student="transformer", losses={"kl": 1.0}, epochs=3, options={"layers": 1}, batch_size=4)
    train_student(cache, out=tmp_path / "whole", options=options, cpu=True)
    real = train._train_epoch

    def interrupted(*arguments: Any, **named: Any) -> float:
        if named["state"].epoch == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(train, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_student(cache, out=tmp_path / "cut", options=options, cpu=True)
    monkeypatch.setattr(train, "_train_epoch", real)
    train_student(cache, out=tmp_path / "cut", options=options, resume=True, cpu=True)
    one, other = (load_run(tmp_path / name).student for name in ("whole", "cut"))
    assert isinstance(one, torch.nn.Module) and isinstance(other, torch.nn.Module)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
