"""Batches of similar length: every row once, budgets kept, the same everywhere; tokenisation counts its cuts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig

from softlabels.errors import ConfigError
from softlabels.tokens import (
    batches_by_length,
    longest_input,
    pad_batch,
    resolve_max_length,
    shuffled_batches,
    token_hash,
    tokenize,
)
from softlabels.types import NO_LABEL, Example

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@given(LENGTHS, st.integers(60, 300), st.integers(1, 20))
def test_every_row_is_in_one_batch_and_the_budget_is_kept(lengths: list[int], tokens: int, rows: int) -> None:
    batches = batches_by_length(lengths, batch_tokens=tokens, batch_size=rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    sizes = [[lengths[i] for i in batch] for batch in batches]
    assert all(len(size) * max(size) <= tokens and len(size) <= rows for size in sizes)
    flat = [length for size in sizes for length in size]
    assert flat == sorted(flat, reverse=True)


def test_a_budget_below_the_longest_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="below the longest row, 9 tokens"):
        batches_by_length([3, 9], batch_tokens=8)


@given(LENGTHS, st.integers(1, 16), st.integers(0, 5))
def test_a_shuffled_epoch_has_every_row_once_and_follows_its_seed(lengths: list[int], size: int, seed: int) -> None:
    first = shuffled_batches(lengths, batch_size=size, rng=np.random.default_rng(seed))
    again = shuffled_batches(lengths, batch_size=size, rng=np.random.default_rng(seed))
    assert sorted(np.concatenate(first).tolist()) == list(range(len(lengths)))
    assert len(first) == -(-len(lengths) // size)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_shuffled_batches_pad_little_and_differ_between_epochs() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 5000)
    epochs = [shuffled_batches(lengths, batch_size=32, rng=np.random.default_rng([0, e])) for e in (0, 1)]
    for batches in epochs:
        assert sum(len(b) * lengths[b].max() for b in batches) < 1.06 * lengths.sum()
    assert {tuple(sorted(b)) for b in epochs[0]}.isdisjoint({tuple(sorted(b)) for b in epochs[1]})


def test_tokens_are_as_long_as_the_text_and_cuts_are_counted(tokenizer) -> None:
    rows = [Example("0", "a b c"), Example("1", "a b c d e f g"), Example("2", "j")]
    got = tokenize(tokenizer, rows, max_length=6, labels=[1, NO_LABEL, 0])
    assert [example.input_ids.tolist() for example in got.examples] == [[2, 4, 5, 6, 3], [2, 4, 5, 6, 7, 3], [2, 13, 3]]
    assert got.truncated == 1
    assert [example.label for example in got.examples] == [1, NO_LABEL, 0]
    batch = pad_batch(got.examples, pad_token_id=0)
    assert batch.input_ids.tolist() == [[2, 4, 5, 6, 3, 0], [2, 4, 5, 6, 7, 3], [2, 13, 3, 0, 0, 0]]
    assert batch.attention_mask.sum(1).tolist() == [5, 6, 3]
    assert batch.model_inputs().keys() == {"input_ids", "attention_mask", "token_type_ids"}


def test_pairs_keep_token_types_and_are_cut_longest_first(tokenizer) -> None:
    got = tokenize(tokenizer, [Example("0", "a b c d e f", "j i"), Example("1", "a", None)], max_length=8)
    assert got.examples[0].input_ids.tolist() == [2, 4, 5, 6, 3, 13, 12, 3]
    assert got.examples[0].token_type_ids is not None
    assert got.examples[0].token_type_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert got.truncated == 1


def test_the_token_hash_follows_ids_and_types(tokenizer) -> None:
    single, pair = tokenize(tokenizer, [Example("0", "a"), Example("1", "a")], max_length=8).examples
    assert token_hash(single) == token_hash(pair)
    single.token_type_ids[1] = 1  # type: ignore[index]
    assert token_hash(single) != token_hash(pair)


def test_the_longest_input_is_what_model_and_tokenizer_take(tokenizer) -> None:
    assert longest_input(tokenizer, BertConfig(max_position_embeddings=64)) == 64
    assert longest_input(tokenizer, RobertaConfig(max_position_embeddings=66, pad_token_id=1)) == 64
    assert resolve_max_length(None, tokenizer, BertConfig(max_position_embeddings=4096)) == 512
    with pytest.raises(ConfigError, match="at most 64"):
        resolve_max_length(65, tokenizer, BertConfig(max_position_embeddings=64))
    with pytest.raises(ConfigError, match="at least 4"):
        resolve_max_length(3, tokenizer, BertConfig(max_position_embeddings=64))
