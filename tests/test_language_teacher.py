"""Language models that are trained here: they learn, on masks that move, and are teachers like any other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel, AutoModelForMaskedLM, BartConfig, BartModel, RobertaConfig, RobertaModel
from typer.testing import CliRunner

from softlabels.cache import open_cache
from softlabels.cache.verify import verify_cache
from softlabels.cache.vocab import open_vocab
from softlabels.cli import app
from softlabels.config import DumpOptions, TeacherTraining
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError, CorpusError, TeacherError
from softlabels.fine_tuning import METRICS
from softlabels.language_teacher import HELD_OUT, masking_of, prepare_texts, unmask
from softlabels.tasks import TaskLabels, mask_tokens, tokenize_task
from softlabels.teacher import TeacherOptions, load_teacher, train_teacher
from softlabels.tokens import pad_batch, tokenize
from softlabels.types import LANGUAGE_MODELS, NO_LABEL, Example
from tests.models import TEXTS, save_model, tiny_classifier, tiny_gpt2, tiny_tokenizer

QUICK: dict[str, Any] = {"epochs": 1, "lr": 3e-3, "batch_size": 8, "device": "cpu"}
MASKED = TeacherOptions(task="masked-lm", **QUICK)
CAUSAL = TeacherOptions(task="causal-lm", **QUICK)
HELD = slice(0, None, 5)  # of TEXTS


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def corpus(texts: list[str] | None = None, *, label: Any = None, source: str = "texts") -> Corpus:
    texts = [text for i, (text, _) in enumerate(TEXTS) if i % 5] if texts is None else texts
    return Corpus(source, None, [Example(str(i), text, None, label) for i, text in enumerate(texts)], None)


def later() -> Corpus:
    """Texts that are not in `corpus()`."""
    return corpus([text for text, _ in TEXTS[HELD]], source="later")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pretrained encoder without a head."""
    tokenizer = tiny_tokenizer()
    return str(save_model(tmp_path_factory.mktemp("bert"), tiny_classifier(tokenizer).bert, tokenizer))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = tiny_tokenizer(kind="bpe")
    return str(save_model(tmp_path_factory.mktemp("gpt"), tiny_gpt2(tokenizer).transformer, tokenizer))


def perplexity(folder: Path, options: TeacherOptions) -> float:
    """Of the teacher in `folder` on `later()`, text by text, every position computed, in float64."""
    teacher = load_teacher(str(folder), device="cpu")
    rows = tokenize_task(
        options.task,
        teacher.tokenizer,
        later().examples,
        max_length=64,
        labels=TaskLabels([NO_LABEL] * 12),
        masking=masking_of(options.seed, HELD_OUT),
    ).examples
    surprise, targets = 0.0, 0
    for row in rows:
        batch = pad_batch([row], pad_token_id=0)
        with torch.no_grad():
            logits = teacher.model(**batch.model_inputs()).logits[0].double()  # (L, V)
        for place, label in enumerate(batch.labels[0].tolist()):
            if label != NO_LABEL:
                surprise -= float(functional.log_softmax(logits[place], dim=-1)[label])
                targets += 1
    return math.exp(surprise / targets)


# ------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm"])
def test_perplexity_falls_and_is_what_a_plain_loop_says(task: Any, bert: str, gpt: str, tmp_path: Path) -> None:
    model = bert if task == "masked-lm" else gpt
    options = replace(MASKED, task=task, epochs=6)
    nothing = replace(options, epochs=1, lr=1e-12)
    before = train_teacher(corpus(), model=model, out=tmp_path / "before", options=nothing, validation=later())
    report = train_teacher(corpus(), model=model, out=tmp_path / "out", options=options, validation=later())
    assert before.best_score is not None and report.best_score is not None
    assert report.best_score < 0.6 * before.best_score
    assert before.best_score == pytest.approx(perplexity(tmp_path / "before", options), rel=0.02)
    assert report.best_score == pytest.approx(perplexity(tmp_path / "out", options), rel=0.02)
    assert (report.metric, report.label_names, report.train_rows, report.validation_rows) == ("perplexity", [], 48, 12)
    scores = [epoch.validation_score for epoch in report.epochs]
    assert report.best_score == min(score for score in scores if score is not None) == scores[report.best_epoch - 1]
    for epoch in report.epochs:
        assert epoch.validation_loss is not None and epoch.validation_score is not None
        assert epoch.validation_score == pytest.approx(math.exp(epoch.validation_loss))
    assert report.epochs[-1].train_loss < report.epochs[0].train_loss
    assert load_teacher(str(tmp_path / "out")).task == task


def test_the_best_epoch_is_the_one_of_the_lowest_perplexity(bert: str, tmp_path: Path) -> None:
    """A few texts learned by heart: what else there is becomes ever more surprising."""
    options = replace(MASKED, epochs=40, lr=1e-2)
    few = corpus(["Rain and fog are likely in the west tonight."] * 8)
    report = train_teacher(few, model=bert, out=tmp_path / "out", options=options, validation=later())
    scores = [epoch.validation_score or math.nan for epoch in report.epochs]
    assert report.best_epoch == 1 + int(np.argmin(scores)) < 40 and max(scores) > 1.5 * min(scores)
    assert report.best_score == pytest.approx(perplexity(tmp_path / "out", options), rel=0.02)


def test_a_language_model_goes_on_from_its_own_head(bert: str, tmp_path: Path) -> None:
    first = train_teacher(corpus(), model=bert, out=tmp_path / "a", options=replace(MASKED, epochs=5))
    still = replace(MASKED, lr=1e-12)
    second = train_teacher(corpus(), model=str(tmp_path / "a"), out=tmp_path / "b", options=still)
    assert second.best_score == pytest.approx(first.best_score, rel=1e-3)  # the same rows held out, the same masks
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert old.keys() == new.keys() and all(torch.allclose(old[key], new[key], atol=1e-6) for key in old)


def test_the_new_head_is_tied_to_the_embedding(bert: str, tmp_path: Path) -> None:
    train_teacher(corpus(), model=bert, out=tmp_path / "out", options=MASKED)
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert plain.config.architectures == ["BertForMaskedLM"]
    embedding = plain.get_input_embeddings().weight
    assert plain.get_output_embeddings().weight is embedding
    assert not torch.allclose(embedding, AutoModel.from_pretrained(bert).get_input_embeddings().weight)
    assert plain.get_output_embeddings().bias.abs().max() > 0  # trained, saved and found again


def test_a_bert_for_causal_lm_looks_back_only(bert: str, tmp_path: Path) -> None:
    train_teacher(corpus(), model=bert, out=tmp_path / "out", options=CAUSAL)
    teacher = load_teacher(str(tmp_path / "out"), device="cpu")
    assert teacher.task == "causal-lm" and type(teacher.model).__name__ == "BertLMHeadModel"
    ids = torch.randint(5, 60, (1, 9))
    other = ids.clone()
    other[0, 5:] = ids[0, 5:] + 1
    with torch.no_grad():
        one, two = teacher.model(ids).logits, teacher.model(other).logits
    assert torch.allclose(one[0, :5], two[0, :5], atol=1e-5) and not torch.allclose(one[0, 5:], two[0, 5:], atol=1e-2)


@pytest.mark.parametrize("options", [MASKED, CAUSAL])
def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    options: TeacherOptions, bert: str, tmp_path: Path
) -> None:
    hashes: list[str] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(hashes))  # the state of the world outside has no say
        report = train_teacher(corpus(), model=bert, out=tmp_path / name, options=replace(options, seed=seed))
        hashes.append(report.weights_hash)
    assert hashes[0] == hashes[1] != hashes[2]


# ---------------------------------------------------------------------------------------------------------- masks


def test_masks_move_with_the_epoch_and_the_seed_and_can_be_taken_off() -> None:
    tokenizer = tiny_tokenizer()
    (row,) = tokenize(tokenizer, [Example("a", " ".join(text for text, _ in TEXTS[:5]))], max_length=64).examples
    masked = [mask_tokens(row, tokenizer, masking_of(*which)) for which in ((0, 0), (0, 1), (0, 2), (1, 1), (0, 1))]
    places = [tuple(np.flatnonzero(each.labels != NO_LABEL)) for each in masked if each.labels is not None]
    assert len(set(places)) == 4 and places[1] == places[4]
    assert np.array_equal(masked[1].input_ids, masked[4].input_ids)
    for each in masked:
        assert np.array_equal(unmask(each).input_ids, row.input_ids)
        again = mask_tokens(unmask(each), tokenizer, masking_of(0, 1))
        assert np.array_equal(again.input_ids, masked[1].input_ids) and again.labels is not None
        assert masked[1].labels is not None and np.array_equal(again.labels, masked[1].labels)


def test_every_epoch_of_the_training_sees_other_masks_and_the_held_out_rows_the_same() -> None:
    tokenizer = tiny_tokenizer()
    rows, causal = (
        prepare_texts(corpus(), None, tokenizer, max_length=64, options=options) for options in (MASKED, CAUSAL)
    )
    numbers = np.arange(len(rows.train))
    whole = {row.id: row for row in tokenize(tokenizer, corpus().examples, max_length=64).examples}
    assert sorted(row.id for row in [*rows.train, *rows.held]) == sorted(whole) and len(rows.held) == 5
    for epoch in (1, 2):
        for row in rows.of_epoch(numbers, epoch):
            expected = mask_tokens(whole[row.id], tokenizer, masking_of(0, epoch))
            assert np.array_equal(row.input_ids, expected.input_ids)
    for row in rows.held:
        assert np.array_equal(row.input_ids, mask_tokens(whole[row.id], tokenizer, masking_of(0, 0)).input_ids)
    for row in [*causal.of_epoch(numbers, 2), *causal.held]:
        assert row.labels is not None and np.array_equal(row.input_ids, whole[row.id].input_ids)
        assert np.array_equal(row.labels, [*row.input_ids[1:], NO_LABEL])


def test_the_share_of_masks_is_berts() -> None:
    tokenizer = tiny_tokenizer()
    rows = tokenize(tokenizer, [Example(str(i), text) for i, (text, _) in enumerate(TEXTS)], max_length=64).examples
    chosen = hidden = kept = free = 0
    for epoch in range(1, 31):
        for row in rows:
            masked = mask_tokens(row, tokenizer, masking_of(0, epoch))
            assert masked.labels is not None
            at = masked.labels != NO_LABEL
            free += len(row.input_ids) - 2
            chosen += at.sum()
            hidden += (masked.input_ids[at] == tokenizer.mask_token_id).sum()
            kept += (masked.input_ids[at] == row.input_ids[at]).sum()
            assert np.array_equal(masked.input_ids[~at], row.input_ids[~at]) and not at[[0, -1]].any()
    assert chosen / free == pytest.approx(0.15, abs=0.02)
    assert hidden / chosen == pytest.approx(0.8, abs=0.03) and kept / chosen == pytest.approx(0.1, abs=0.03)


# ----------------------------------------------------------------------------------------------------------- texts


def test_texts_without_a_token_to_predict_are_left_out(bert: str, gpt: str, tmp_path: Path) -> None:
    texts = [text for text, _ in TEXTS[:20]]
    more = corpus([*texts[:7], "", *texts[7:], texts[0] * 20])
    report = train_teacher(more, model=bert, out=tmp_path / "a", options=MASKED)
    assert (report.short_rows, report.unlabelled_rows, report.truncated_rows) == (1, 0, 1)
    assert report.train_rows + report.validation_rows == 21 and report.validation_rows == 2
    one = corpus([*texts, "a", ""])  # a single byte has no next one
    report = train_teacher(one, model=gpt, out=tmp_path / "b", options=CAUSAL)
    assert (report.short_rows, report.train_rows + report.validation_rows) == (2, 20)
    for empty in (corpus(["", " "]), corpus(["a"])):
        with pytest.raises(CorpusError, match="corpus texts has no token to predict: give longer texts"):
            train_teacher(empty, model=gpt, out=tmp_path / "c", options=CAUSAL)
    with pytest.raises(CorpusError, match="corpus later has no token to predict"):
        nothing = corpus([""], source="later")
        train_teacher(corpus(), model=bert, out=tmp_path / "c", options=MASKED, validation=nothing)
    assert not (tmp_path / "c").exists()


def test_a_single_text_is_enough_and_the_last_epoch_is_kept(bert: str, tmp_path: Path) -> None:
    options = replace(MASKED, epochs=2)
    report = train_teacher(corpus([TEXTS[0][0]]), model=bert, out=tmp_path / "out", options=options)
    assert (report.train_rows, report.validation_rows, report.best_epoch, report.best_score) == (1, 0, 2, None)


def test_labels_are_not_looked_at(bert: str, tmp_path: Path) -> None:
    report = train_teacher(corpus(label="food"), model=bert, out=tmp_path / "out", options=MASKED)
    assert (report.label_names, report.unlabelled_rows) == ([], 0)


# ------------------------------------------------------------------------------------------------- what is refused


def test_models_that_cannot_be_trained_so(bert: str, gpt: str, tmp_path: Path) -> None:
    def refuse(model: str, options: TeacherOptions, told: str) -> None:
        with pytest.raises(TeacherError, match=told):
            train_teacher(corpus(), model=model, out=tmp_path / "out", options=options)

    refuse(gpt, MASKED, "no mask token, so nothing can be masked: try --task causal-lm")
    scratch = replace(MASKED, from_scratch=True, tokenizer=gpt)
    refuse("bert-tiny", scratch, "no mask token, so nothing can be masked: try --task causal-lm")
    size = len(tiny_tokenizer())
    small = BartConfig(vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=64)
    bart = save_model(tmp_path / "bart", BartModel(small), tiny_tokenizer())
    refuse(str(bart), MASKED, "is a bart, an encoder with a decoder")
    weights = load_file(Path(bert) / "model.safetensors")
    lost = "encoder.layer.0.output.dense.bias"
    torn = save_model(tmp_path / "torn", AutoModel.from_pretrained(bert), tiny_tokenizer())
    kept = {name: value for name, value in weights.items() if name != lost}
    save_file(kept, torn / "model.safetensors", metadata={"format": "pt"})
    refuse(str(torn), MASKED, f"are not whole: they lack bert.{lost}")
    refuse(bert, replace(MASKED, lr=1e30, epochs=5), "broke down at step|validation loss is")
    assert not (tmp_path / "out").exists()


def test_tasks_that_are_none() -> None:
    said = (
        r"trained here for sequence-classification, masked-lm, causal-lm, not for 'maskedlm'. Did you mean 'masked-lm'"
    )
    with pytest.raises(ConfigError, match=said):
        replace(MASKED, task="maskedlm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not for 'token-classification'"):
        replace(MASKED, task="token-classification")  # type: ignore[arg-type]
    assert {task for task, metric in METRICS.items() if metric == "perplexity"} <= set(LANGUAGE_MODELS)


def test_recipes_say_it_too() -> None:
    said = TeacherTraining.model_validate({"task": "masked-lm", "epochs": 2})
    assert TeacherOptions(**said.model_dump(exclude={"rows"})).task == "masked-lm"
    assert TeacherOptions(**TeacherTraining().model_dump(exclude={"rows"})).task == "sequence-classification"


# --------------------------------------------------------------------------------------------------- the folder


def test_the_same_training_again_is_not_done_twice_and_another_is_refused(bert: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = train_teacher(corpus(), model=bert, out=out, options=MASKED)
    changed = (out / "model.safetensors").stat().st_mtime_ns
    assert train_teacher(corpus(), model=bert, out=out, options=MASKED) == replace(first, reused=True)
    assert (out / "model.safetensors").stat().st_mtime_ns == changed
    for options, told in ((CAUSAL, "differs in task:"), (replace(MASKED, seed=1), "differs in seed:")):
        with pytest.raises(TeacherError, match=told):
            train_teacher(corpus(), model=bert, out=out, options=options)
    saved = json.loads((out / "teacher.json").read_text())
    assert (saved["configuration"]["task"], saved["report"]["metric"]) == ("masked-lm", "perplexity")


def test_a_classifier_of_an_earlier_softlabels_still_counts(bert: str, tmp_path: Path) -> None:
    """Its teacher.json says neither a task nor how many texts were too short."""
    rows = Corpus("rows", None, [Example(str(i), text, None, label) for i, (text, label) in enumerate(TEXTS)], None)
    rows = replace(rows, label_names=["food", "sport", "weather"])
    options = replace(MASKED, task="sequence-classification")
    first = train_teacher(rows, model=bert, out=tmp_path / "out", options=options)
    path = tmp_path / "out" / "teacher.json"
    saved = json.loads(path.read_text())
    del saved["configuration"]["task"], saved["report"]["short_rows"]
    path.write_text(json.dumps(saved))
    assert train_teacher(rows, model=bert, out=tmp_path / "out", options=options) == replace(first, reused=True)
    with pytest.raises(TeacherError, match=r"differs in .*task"):
        train_teacher(rows, model=bert, out=tmp_path / "out", options=MASKED)


# ------------------------------------------------------------------------------------------------- as a teacher


@pytest.mark.parametrize("options", [MASKED, CAUSAL])
def test_what_is_trained_can_be_dumped(options: TeacherOptions, bert: str, gpt: str, tmp_path: Path) -> None:
    model = bert if options.task == "masked-lm" else gpt
    train_teacher(corpus(), model=model, out=tmp_path / "out", options=options)
    asked = DumpOptions(capture=["vocab:exact", "hidden:1,2"], codec="float32", shard_rows=5)
    dump(later(), teacher=str(tmp_path / "out"), out=tmp_path / "cache", options=asked)
    assert verify_cache(tmp_path / "cache").whole
    cache = open_cache(tmp_path / "cache")
    assert (cache.manifest.teacher.task, cache.rows) == (options.task, 12)
    vocab = open_vocab(cache)
    batch = cache.batch([3, 9], [*vocab.fields, "hidden.02"])
    teacher = load_teacher(str(tmp_path / "out"), device="cpu")
    with torch.no_grad():
        live = teacher.model(**batch.tokens.model_inputs(), output_hidden_states=True)
    found, wanted = vocab(batch.teacher), live.logits[batch.tokens.labels != NO_LABEL]
    assert isinstance(found, torch.Tensor) and torch.allclose(found, wanted, atol=1e-4)
    real = batch.tokens.attention_mask.bool()
    assert torch.allclose(batch.teacher.hidden(2)[real], live.hidden_states[2][real], atol=1e-4)


@pytest.mark.parametrize("shape", ["bert-tiny", "distilbert", "mobilebert", "roberta"])
def test_from_scratch(shape: str, bert: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 1, "hidden_size": 32, "heads": 4, "intermediate_size": 64}
    if shape == "mobilebert":
        sizes |= {"embedding_size": 16, "intra_bottleneck_size": 32}
    name = shape
    if shape == "roberta":  # a folder with a config.json, of positions that begin behind the pad token
        RobertaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4).save_pretrained(tmp_path / "shape")
        name = str(tmp_path / "shape")
    options = replace(MASKED, from_scratch=True, tokenizer=bert, options=sizes, epochs=2)
    report = train_teacher(corpus(), model=name, out=tmp_path / "out", options=options, validation=later())
    assert report.epochs[1].train_loss < report.epochs[0].train_loss
    assert report.best_score == pytest.approx(perplexity(tmp_path / "out", options), rel=0.02)
    assert train_teacher(corpus(), model=name, out=tmp_path / "out", options=options, validation=later()).reused
    model = load_teacher(str(tmp_path / "out")).model
    assert model.config.model_type == shape.removesuffix("-tiny") and "MaskedLM" in type(model).__name__


def test_a_roberta_body_gets_a_head(bert: str, tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
        pad_token_id=0,
        type_vocab_size=2,
    )
    torch.manual_seed(0)
    base = save_model(tmp_path / "base", RobertaModel(config, add_pooling_layer=False), tiny_tokenizer())
    report = train_teacher(corpus(), model=str(base), out=tmp_path / "out", options=MASKED, validation=later())
    assert report.best_score == pytest.approx(perplexity(tmp_path / "out", MASKED), rel=0.02)


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_line(bert: str, tmp_path: Path) -> None:
    rows = [{"text": text, "label": [1.5, i]} for i, (text, _) in enumerate(TEXTS)]  # no label that a classifier takes
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "later.txt").write_text("".join(f"{text}\n" for text, _ in TEXTS[HELD]))
    given = ["train-teacher", str(tmp_path / "rows.jsonl"), "--model", bert, "--out", str(tmp_path / "out"), "--cpu"]
    more = ["--task", "masked-lm", "--epochs", "1", "--rows", "40", "--eval", str(tmp_path / "later.txt")]
    runner = CliRunner()
    done = runner.invoke(app, [*given, *more, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["metric"], report["train_rows"], report["validation_rows"]) == ("perplexity", 40, 12)
    assert report["best_score"] == pytest.approx(math.exp(report["epochs"][0]["validation_loss"]))
    said = runner.invoke(app, [*given, *more])
    assert said.exit_code == 0 and f"{report['best_score']:.4g}" in said.stdout and "perplexity" in said.stdout
    with pytest.raises(ConfigError, match=r"train-teacher: task: .*'masked-lm' or 'causal-lm'"):
        runner.invoke(app, [*given, "--task", "masked"], catch_exceptions=False)
