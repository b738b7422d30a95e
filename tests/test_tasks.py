"""Teachers for every task: what a corpus's labels become, and a cache that equals the live teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from transformers import BertConfig, GPT2Config, PretrainedConfig

from softlabels.cache import Cache, open_cache
from softlabels.cache.verify import verify_cache
from softlabels.config import DumpOptions, Masking
from softlabels.corpus import Corpus, read_corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError, CorpusError, SoftlabelsError, TeacherError
from softlabels.tasks import align_tags, find_task, mask_tokens, tokenize_task
from softlabels.teacher import load_teacher
from softlabels.types import NO_LABEL, Task
from tests.models import TEXTS, tiny_tokenizer

TAGS = ["O", "B-food", "B-place"]


def save(folder: Path, kind: str, **changes: Any) -> Path:
    """A tiny random BERT or GPT-2 of the class `kind`, with its tokenizer."""
    gpt = kind.startswith("GPT2")
    tokenizer = tiny_tokenizer(kind="bpe" if gpt else "wordpiece")
    torch.manual_seed(0)
    if gpt:
        config: PretrainedConfig = GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1, **changes
        )
    else:
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.1,
            **changes,
        )
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dumped(folder: Path, teacher: Path, corpus: Corpus, **options: Any) -> Cache:
    usual = {"capture": ["logits"], "shard_rows": 4, "codec": "float32"}
    dump(corpus, teacher=str(teacher), out=folder, options=DumpOptions.model_validate(usual | options))
    assert verify_cache(folder).whole
    return open_cache(folder)


@pytest.mark.parametrize(
    "kind, changes, task",
    [
        ("BertForSequenceClassification", {"num_labels": 3}, "sequence-classification"),
        ("BertForSequenceClassification", {"num_labels": 1}, "regression"),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, "multi-label-classification"),
        ("BertForTokenClassification", {"num_labels": 3}, "token-classification"),
        ("BertForMaskedLM", {}, "masked-lm"),
        ("BertForPreTraining", {}, "masked-lm"),
        ("GPT2LMHeadModel", {}, "causal-lm"),
        ("BertModel", {}, "sentence-embedding"),
    ],
)
def test_the_task_is_read_from_the_config(tmp_path: Path, kind: str, changes: dict[str, Any], task: Task) -> None:
    teacher = load_teacher(str(save(tmp_path, kind, **changes)))
    assert teacher.task == task
    assert len(teacher.label_names) == (teacher.model.config.num_labels if "class" in task or "reg" in task else 0)


def test_tasks_that_do_not_fit(tmp_path: Path) -> None:
    folder = save(tmp_path, "BertForSequenceClassification")
    with pytest.raises(TeacherError, match="no trained head for masked-lm"):
        load_teacher(str(folder), task="masked-lm")
    with pytest.raises(ConfigError, match="--task tagging: there are sequence-classification"):
        load_teacher(str(folder), task="tagging")
    config = BertConfig(architectures=["BertForQuestionAnswering"])
    with pytest.raises(TeacherError, match="BertForQuestionAnswering, which no task fits"):
        find_task(config, where="x")


# ------------------------------------------------------------------------------------------------ labels that are read


def test_tags_of_words(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"tokens": ["Cook", "onions"], "tags": ["O", "B-food"]},
        {"tokens": "In the kitchen", "tags": "O O B-place"},
        {"tokens": ["No", "tags"]},
    ]
    corpus = read_corpus(write_rows(tmp_path / "x.jsonl", rows), task="token-classification")
    assert [row.words for row in corpus.examples] == [("Cook", "onions"), ("In", "the", "kitchen"), ("No", "tags")]
    assert [row.label for row in corpus.examples] == [("O", "B-food"), ("O", "O", "B-place"), None]
    assert corpus.label_names == ["B-food", "B-place", "O"] and corpus.examples[1].text == "In the kitchen"
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=TAGS))}
    )
    saved = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[2, 0]]}, features=features)
    saved.to_parquet(tmp_path / "x.parquet")
    assert read_corpus(tmp_path / "x.parquet", task="token-classification").examples[0].label == ("B-place", "O")


@pytest.mark.parametrize(
    "task, row, told",
    [
        ("token-classification", {"tokens": ["a", "b"], "tags": ["O"]}, "row|line.*it has 1 tags for 2 words"),
        ("token-classification", {"tokens": ["a", ""], "tags": ["O", "O"]}, "none of them empty"),
        ("token-classification", {"tokens": ["a"], "tags": [1.5]}, "neither an integer nor a string"),
        ("token-classification", {"text": "a"}, "no `tokens` or `words`"),
        ("token-classification", {"tokens": ["a"], "tags": ["O"], "pos_tags": ["X"]}, "tags or pos_tags"),
        ("regression", {"text": "a", "label": "warm"}, "labels are numbers"),
        ("regression", {"text": "a", "label": [1, "inf"]}, "finite numbers"),
    ],
)
def test_labels_that_cannot_be_read(tmp_path: Path, task: Task, row: dict[str, Any], told: str) -> None:
    with pytest.raises(CorpusError, match=told):
        read_corpus(write_rows(tmp_path / "x.jsonl", [row]), task=task)


def test_several_classes_and_numbers(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": ["x", "y"]},
        {"text": "b", "label": "y, z"},
        {"text": "c"},
        {"text": "d", "label": []},
    ]
    corpus = read_corpus(write_rows(tmp_path / "x.jsonl", rows), task="multi-label-classification")
    assert [row.label for row in corpus.examples] == [("x", "y"), ("y", "z"), None, ()]
    assert corpus.label_names == ["x", "y", "z"]
    rows = [{"text": "a", "label": 1.5}, {"text": "b", "label": "-2"}, {"text": "c", "label": None}]
    corpus = read_corpus(write_rows(tmp_path / "y.jsonl", rows), task="regression")
    assert [row.label for row in corpus.examples] == [(1.5,), (-2.0,), None] and corpus.label_names is None


def test_language_models_look_for_no_label(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": {"of": "no kind"}}])
    assert read_corpus(path, task="causal-lm").examples[0].label is None


# ------------------------------------------------------------------------------------------------ caches of each task


def test_token_classification(tmp_path: Path) -> None:
    teacher = save(tmp_path / "t", "BertForTokenClassification", id2label=dict(enumerate(TAGS)))
    rows: list[dict[str, Any]] = [
        {"tokens": text.split(), "tags": ["B-food" if word in ("butter", "bread") else "O" for word in text.split()]}
        for text, _ in TEXTS[:9]
    ]
    rows[3].pop("tags")
    corpus = read_corpus(write_rows(tmp_path / "x.jsonl", rows), task="token-classification")
    cache = dumped(tmp_path / "cache", teacher, corpus)
    assert cache.manifest.teacher.task == "token-classification" and cache.manifest.corpus.labelled == 8
    live = load_teacher(str(teacher))
    numbers = np.array([0, 3, 8])
    batch = cache.batch(numbers, ["logits"])
    with torch.no_grad():
        wanted = live.model(**batch.tokens.model_inputs()).logits
    inside = batch.tokens.attention_mask.bool()
    assert torch.allclose(batch.teacher.logits[inside], wanted[inside], atol=1e-5)
    assert batch.tokens.labels.shape == batch.tokens.input_ids.shape and (batch.tokens.labels[1] == NO_LABEL).all()
    for i in (0, 2):
        words = corpus.examples[numbers[i]].words or ()
        encoded = live.tokenizer(list(words), is_split_into_words=True)
        firsts = [encoded.word_ids().index(number) for number in range(len(words))]
        tags = [TAGS.index(str(tag)) for tag in rows[numbers[i]]["tags"]]
        assert batch.tokens.labels[i, firsts].tolist() == tags
        assert (batch.tokens.labels[i] != NO_LABEL).sum() == len(words)


def test_pieces_of_a_word_have_one_tag() -> None:
    assert align_tags([5, 6], [None, 0, 0, 1, None]).tolist() == [NO_LABEL, 5, NO_LABEL, 6, NO_LABEL]
    assert align_tags(None, [None, 0, 1]).tolist() == [NO_LABEL] * 3


@pytest.mark.parametrize("task", ["multi-label-classification", "regression"])
def test_labels_of_several_numbers(tmp_path: Path, task: Task) -> None:
    names = ["food", "sport", "weather"]
    problem = "regression" if task == "regression" else "multi_label_classification"
    teacher = save(
        tmp_path / "t", "BertForSequenceClassification", id2label=dict(enumerate(names)), problem_type=problem
    )
    given: list[Any] = [["food", "weather"], None, [], "sport", ["2"]]
    wanted = [[1, 0, 1], [np.nan] * 3, [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    if task == "regression":
        given = wanted = [[0.5, -1, 2], [np.nan] * 3, [0, 0, 0], [1e9, 1, 1], [3, 2, 1]]
        given = [given[0], None, *given[2:]]
    rows = [{"text": text, "label": label} for (text, _), label in zip(TEXTS, given, strict=False)]
    corpus = read_corpus(write_rows(tmp_path / "x.jsonl", rows), task=task)
    cache = dumped(tmp_path / "cache", teacher, corpus)
    assert cache.manifest.corpus.labelled == 4 and cache.manifest.teacher.label_names == names
    batch = cache.batch([4, 1, 0, 3, 2], ["logits"])
    assert batch.tokens.labels.dtype == torch.float32
    order = np.array(wanted, np.float32)[[4, 1, 0, 3, 2]]
    np.testing.assert_array_equal(batch.tokens.labels.numpy(), order)
    with torch.no_grad():
        live = load_teacher(str(teacher)).model(**batch.tokens.model_inputs()).logits
    assert torch.allclose(batch.teacher.logits, live, atol=1e-5)
    if task == "regression":
        rows[0]["label"] = [1.0]
        short = read_corpus(write_rows(tmp_path / "y.jsonl", rows), task=task)
        with pytest.raises(CorpusError, match="has 1 numbers for the teacher's 3 outputs"):
            dumped(tmp_path / "short", teacher, short)


def test_sentence_embeddings(tmp_path: Path) -> None:
    teacher = save(tmp_path / "t", "BertModel")
    corpus = read_corpus(write_rows(tmp_path / "x.jsonl", [{"text": text} for text, _ in TEXTS[:6]]))
    cache = dumped(tmp_path / "cache", teacher, corpus, capture=["hidden:2@cls"])
    batch = cache.batch([5, 0], ["hidden.02@cls"])
    with torch.no_grad():
        live = load_teacher(str(teacher)).model(**batch.tokens.model_inputs()).last_hidden_state[:, 0]
    assert torch.allclose(batch.teacher.get("hidden.02@cls"), live, atol=1e-5)
    with pytest.raises(ConfigError, match="train-teacher, and dump the folder that it writes; or capture pooled"):
        dumped(tmp_path / "other", teacher, corpus, capture=["logits"])


def test_an_untrained_pooler_is_left_out(tmp_path: Path) -> None:
    config = load_teacher(str(save(tmp_path / "t", "BertModel"))).model.config
    assert isinstance(config, BertConfig)
    model = transformers.BertModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "t")
    assert load_teacher(str(tmp_path / "t")).model.pooler is None


def test_causal_language_models_learn_the_next_token(tmp_path: Path) -> None:
    teacher = save(tmp_path / "t", "GPT2LMHeadModel")
    corpus = read_corpus(write_rows(tmp_path / "x.jsonl", [{"text": text} for text, _ in TEXTS[:6]]), task="causal-lm")
    cache = dumped(tmp_path / "cache", teacher, corpus, capture=["hidden:2"])
    batch = cache.batch([2, 4], [])
    for i, row in enumerate((2, 4)):
        length = int(cache.lengths[row])
        ids, labels = batch.tokens.input_ids[i].tolist(), batch.tokens.labels[i].tolist()
        assert labels == [*ids[1:length], *[NO_LABEL] * (len(ids) - length + 1)]
        assert cache.targets is not None and cache.targets[row] == length - 1
    with pytest.raises(ConfigError, match="as many as its vocabulary"):
        dumped(tmp_path / "other", teacher, corpus, capture=["logits"])


def test_masked_language_models(tmp_path: Path) -> None:
    teacher = save(tmp_path / "t", "BertForMaskedLM")
    corpus = read_corpus(write_rows(tmp_path / "x.jsonl", [{"text": text} for text, _ in TEXTS[:6]]), task="masked-lm")
    masking = {"times": 3, "seed": 7}
    cache = dumped(tmp_path / "cache", teacher, corpus, capture=["hidden:2"], masking=masking)
    other = dumped(tmp_path / "other", teacher, corpus, capture=["hidden:2"], masking=masking, shard_rows=5)
    assert cache.rows == 18 and cache.ids[:4] == ["0#0", "0#1", "0#2", "1#0"]
    assert cache.manifest.dump.masking is not None and cache.manifest.dump.masking.times == 3
    assert cache.token_hashes.tolist() == other.token_hashes.tolist()  # whatever shard a row is in
    assert len(set(cache.token_hashes[:3].tolist())) > 1
    live = load_teacher(str(teacher))
    plain = tokenize_task(
        "causal-lm", live.tokenizer, corpus.examples, max_length=64, labels=_none(len(corpus.examples))
    ).examples
    for row in range(cache.rows):
        batch = cache.batch([row], [])
        ids, labels, whole = batch.tokens.input_ids[0], batch.tokens.labels[0], plain[row // 3].input_ids
        chosen = labels != NO_LABEL
        assert chosen.any() and torch.equal(torch.where(chosen, labels, ids), torch.from_numpy(whole).long())
    with pytest.raises(SoftlabelsError, match=r"dump\.masking was"):
        dumped(tmp_path / "cache", teacher, corpus, capture=["hidden:2"], masking={"times": 3, "seed": 8})


def _none(count: int) -> Any:
    from softlabels.tasks import TaskLabels

    return TaskLabels([NO_LABEL] * count)


def test_masking_hides_the_share_that_it_says() -> None:
    """80 % masks, 10 % other tokens, 10 % unchanged, of 15 %; never a special token."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.cls_token_id, *list(range(5, 55)), tokenizer.sep_token_id]
    from softlabels.types import TokenizedExample

    counts = np.zeros(4)
    for number in range(400):
        row = TokenizedExample(str(number), np.array(ids, np.int32), None, NO_LABEL, "", None)
        masked = mask_tokens(row, tokenizer, Masking(rate=0.3))
        assert masked.labels is not None and masked.labels[0] == masked.labels[-1] == NO_LABEL
        chosen = masked.labels != NO_LABEL
        assert np.array_equal(masked.input_ids[~chosen], row.input_ids[~chosen])
        kept = masked.input_ids[chosen] == row.input_ids[chosen]
        hidden = masked.input_ids[chosen] == tokenizer.mask_token_id
        counts += [chosen.sum(), hidden.sum(), kept.sum(), (~kept & ~hidden).sum()]
    assert counts[0] / (400 * 50) == pytest.approx(0.3, abs=0.02)
    np.testing.assert_allclose(counts[1:] / counts[0], [0.8, 0.1, 0.1], atol=0.02)


def test_a_row_with_nothing_to_predict(tmp_path: Path) -> None:
    """One token has no next one: its shard holds no target at all."""
    teacher = save(tmp_path / "t", "GPT2LMHeadModel")
    corpus = read_corpus(write_rows(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}]), task="causal-lm")
    cache = dumped(tmp_path / "cache", teacher, corpus, capture=["hidden:1"])
    assert cache.targets is not None and cache.targets.tolist() == [0, 0]
