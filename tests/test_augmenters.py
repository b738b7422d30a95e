"""New texts from given ones: each method does what its paper says, with its probabilities; words are cut and joined."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM

from softlabels.augmenters import METHODS, Source, build_augmenter
from softlabels.augmenters.distilled_bilstm import Unigrams, count_unigrams
from softlabels.augmenters.textbrewer import delete, long_disorder, short_disorder
from softlabels.augmenters.tinybert import MaskedModel, Neighbours, _load, whole_words
from softlabels.augmenters.words import Word, join_words, make_segmenter, place_words
from softlabels.config import AUGMENTATIONS, AugmentOptions
from softlabels.errors import ConfigError, TeacherError
from softlabels.teacher import load_teacher
from softlabels.word_vectors import read_word_vectors
from tests.models import TEXTS, save_model, tiny_tokenizer

MASK = "[MASK]"
LINES = [text for text, _ in TEXTS]


def near(count: int, of: int, probability: float) -> bool:
    """Whether `count` of `of` is within 5 standard deviations of its mean: a fixed seed is off once in a million."""
    return abs(count - of * probability) <= 5 * sqrt(of * probability * (1 - probability))


def words_of(text: str) -> list[Word]:
    return [Word(word) for word in text.split()]


def texts_of(words: list[Word]) -> list[str]:
    return [word.text for word in words]


def test_one_list_of_methods():
    assert tuple(METHODS) == AUGMENTATIONS


# ---------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's a well-known film, isn't it?", ["It", "'s", "a", "well-known", "film", ",", "is", "n't", "it", "?"]),
        ("it 's slow -- very slow ...", ["it", "'s", "slow", "--", "very", "slow", "..."]),
        (
            "They don\u2019t (ever) pay $3.50!!",
            ["They", "do", "n\u2019t", "(", "ever", ")", "pay", "$", "3", ".", "50", "!!"],
        ),
        ("a [MASK] film[MASK]", ["a", "[MASK]", "film", "[MASK]"]),
    ],
)
def test_english_words(text, words):
    found = make_segmenter(language="en", tagged=False, mask_token=MASK)(text)
    assert texts_of(found) == words
    assert join_words(found) == text


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_words_join_to_the_text_again(text):
    words = make_segmenter(language="en", tagged=False, mask_token=MASK)(text)
    joined, places = place_words(words)
    assert joined == join_words(words)
    assert [joined[start:end] for start, end in places] == texts_of(words)
    if not any(character >= "\u3400" for character in text):
        assert joined == text.strip()


def test_new_neighbours_do_not_merge():
    words = make_segmenter(language="en", tagged=False, mask_token=MASK)("Good (very) film")
    assert join_words(words[::-1]) == "film)very ( Good"
    assert join_words([Word("iPhone", ""), Word("13", ""), Word("\u62cd", "")]) == "iPhone 13\u62cd"
    assert join_words([Word("do", ""), Word("not", "")]) == "do not"


def test_parts_of_speech():
    pytest.importorskip("textblob")
    words = make_segmenter(language="auto", tagged=True, mask_token=MASK)("The cat doesn't like green soup.")
    tags = {word.text: word.tag for word in words}
    assert tags["The"] == "DT" and tags["cat"] == "NN" and tags["green"] == "JJ" and tags["n't"] == "RB"


@pytest.mark.parametrize("tagged", [False, True])
def test_chinese_words(tagged):
    pytest.importorskip("jieba")
    text = "我用iPhone 13拍了一部很好的电影，[MASK]很喜欢5G！"
    words = make_segmenter(language="auto", tagged=tagged, mask_token=MASK)(text)
    assert join_words(words) == text
    assert {"iPhone", "电影", MASK, "喜欢", "，"} <= set(texts_of(words))
    assert texts_of(words)[-2:] == ["5G", "！"]
    tags = {word.text: word.tag for word in words}
    assert (tags["电影"], tags["喜欢"]) == (("n", "v") if tagged else ("", ""))


def test_a_missing_package_is_named(monkeypatch):
    from softlabels.augmenters import words

    monkeypatch.setitem(sys.modules, "jieba", None)
    monkeypatch.setitem(sys.modules, "textblob.en", None)
    for name in ("_chinese_cutter", "_chinese_dictionary", "_english_tagger"):  # without what earlier tests loaded
        monkeypatch.setattr(words, name, getattr(words, name).__wrapped__)
    segment = make_segmenter(language="auto", tagged=True, mask_token=MASK)
    with pytest.raises(ConfigError, match=r"jieba, which is not installed .*softlabels\[augment\]"):
        segment("很好")
    with pytest.raises(ConfigError, match=r"TextBlob, which is not installed .*softlabels\[augment\].*--no-pos"):
        segment("very good")


# ------------------------------------------------------------------------------------------------- distilled-bilstm


def sampler(options: AugmentOptions, texts: list[list[Word]], row: list[Word], **source: Any) -> Any:
    return build_augmenter(options, Source(iter(texts), MASK, **source))([row])[0]


def test_probabilities_of_the_distilled_bilstm():
    """Masks 0.1, same tag 0.1, n-gram 0.25 of n uniform over 1 to 5."""
    row = [Word(f"w{number}", tag="even" if number % 2 == 0 else "odd") for number in range(40)]
    others = [[Word("new", tag=tag)] for tag in ("even", "odd")] * 100_000  # so that a draw is nearly always this
    sample = sampler(AugmentOptions(), [row, *others], row)
    rng, samples = Random(5), 8000
    made = [texts_of(sample(rng)) for _ in range(samples)]
    grams = [words for words in made if len(words) < len(row)]
    assert near(len(grams), samples, 0.25)
    for size in range(1, 6):
        assert near(sum(len(words) == size for words in grams), len(grams), 0.2)
    words = [word for each in made for word in each]
    assert near(words.count(MASK), len(words), 0.1)
    assert near(words.count("new"), len(words), 0.1)
    starts = Counter(int(words[0][1:]) for words in grams if words[0].startswith("w") and len(words) == 1)
    assert set(starts) == set(range(40))  # every place is as likely
    whole = [each for each in made if len(each) == len(row)]
    kept = [word for each in whole for word, old in zip(each, row, strict=True) if word == old.text]
    assert near(len(kept), 40 * len(whole), 0.8)


def test_words_are_drawn_by_frequency_within_their_part_of_speech():
    texts = [
        [Word("film", tag="NN")] * 6 + [Word("plot", tag="NN")] * 3 + [Word("star", tag="NN"), Word(MASK, tag="NN")]
    ]
    texts += [[Word("runs", tag="VBZ")] * 50]
    unigrams = count_unigrams(texts, mask_token=MASK)
    assert unigrams == Unigrams({"NN": ["film", "plot", "star"], "VBZ": ["runs"]}, {"NN": [6, 9, 10], "VBZ": [50]})
    rng, draws = Random(0), 20_000
    found = Counter(unigrams.draw(Word("star", "", "NN"), rng) for _ in range(draws))
    for word, probability in (("film", 0.6), ("plot", 0.3), ("star", 0.1)):
        assert near(found[Word(word, "", "NN")], draws, probability)
    assert unigrams.draw(Word("x", tag="unseen"), rng) == Word("x", tag="unseen")


def test_no_pos_draws_from_all_words():
    segment = make_segmenter(language="en", tagged=False, mask_token=MASK)
    rows = [segment(line) for line in LINES]
    sample = sampler(AugmentOptions(pos=False, mask_rate=0, pos_rate=1, ngram_rate=0), rows, rows[0])
    rng = Random(1)
    counts = Counter(word.text for words in rows for word in words)
    draws = [word.text for _ in range(1000) for word in sample(rng)]
    commonest, count = counts.most_common(1)[0]
    assert near(draws.count(commonest), len(draws), count / counts.total())
    assert set(draws) <= set(counts) and len(set(draws)) > 50


# ------------------------------------------------------------------------------------------------------- TextBrewer


def test_deletion():
    row = words_of(" ".join(map(str, range(20))))
    rng, samples = Random(2), 4000
    made = [delete(row, rng, rate=0.1) for _ in range(samples)]
    assert near(sum(20 - len(words) for words in made), 20 * samples, 0.1)
    assert all(a != b for words in made for a, b in pairwise(texts_of(words)))
    assert {tuple(delete(row[:2], rng, rate=1.0)) for _ in range(50)} == {(row[0],), (row[1],)}  # never nothing


def test_short_disorder():
    row = words_of("a b c d e")
    assert texts_of(short_disorder(row, Random(0), rate=1.0)) == ["b", "a", "d", "c", "e"]
    rng, samples = Random(3), 10_000
    made = [texts_of(short_disorder(row, rng, rate=0.1)) for _ in range(samples)]
    assert all(sorted(words) == ["a", "b", "c", "d", "e"] for words in made)
    assert near(sum(words[:2] == ["b", "a"] for words in made), samples, 0.1)
    assert near(sum(words[1:3] == ["c", "b"] for words in made), samples, 0.9 * 0.1)


def test_long_disorder():
    row = words_of("0 1 2 3 4 5 6 7 8 9 10")
    # the example of TextBrewer's documentation, which has lost the last word
    swapped = long_disorder(row, Random(0), rate=1.0, span=0.4)
    assert texts_of(swapped) == ["2", "3", "0", "1", "6", "7", "4", "5", "8", "9", "10"]
    assert long_disorder(row, Random(0), rate=1.0, span=20) == row  # too short for it
    assert texts_of(long_disorder(row, Random(0), rate=1.0, span=3)) == texts_of(
        long_disorder(row, Random(0), rate=1.0, span=4)
    )
    rng, samples = Random(4), 5000
    made = [texts_of(long_disorder(row[:4], rng, rate=0.1, span=4)) for _ in range(samples)]
    assert near(sum(words == ["2", "3", "0", "1"] for words in made), samples, 0.1)


# --------------------------------------------------------------------------------------------------------- TinyBERT


@pytest.fixture(scope="module")
def mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked language model with random weights."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("mlm"), BertForMaskedLM(config_for(len(tokenizer))), tokenizer)


def config_for(vocab_size: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random vectors for the words of TEXTS, and for two that its tokenizer cuts."""
    rng = np.random.default_rng(0)
    segment = make_segmenter(language="en", tagged=False, mask_token=MASK)
    words = sorted({word.text.lower() for line in LINES for word in segment(line)} | {"zebras", "quokkas"})
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    path.write_text("".join(f"{word} {' '.join(f'{x:.5f}' for x in rng.normal(size=8))}\n" for word in words))
    return path


def test_candidates_of_a_masked_language_model(mlm):
    """The K most probable whole words where the word is one piece, by the model as it is."""
    segment = make_segmenter(language="en", tagged=False, mask_token=MASK)
    texts = [segment(line) for line in [*LINES[:6], "Stir the zebras slowly."]]
    model = _load(str(mlm), "cpu", False)
    found, several = model.predict(texts, count=15)
    teacher = load_teacher(str(mlm), task="masked-lm", device="cpu")
    tokenizer = teacher.tokenizer
    whole = [
        token
        for token in range(len(tokenizer))
        if token not in tokenizer.all_special_ids and not str(tokenizer.convert_ids_to_tokens(token)).startswith("##")
    ]
    for words, candidates, which in zip(texts, found, several, strict=True):
        for place, word in enumerate(words):
            assert which[place] == (word.text == "zebras")
            if which[place]:
                assert candidates[place] == []
                continue
            masked = [MASK if i == place else each.text for i, each in enumerate(words)]
            inputs = tokenizer(" ".join(masked), return_tensors="pt")
            with torch.no_grad():
                logits = teacher.model(**inputs).logits[0]
            (at,) = torch.nonzero(inputs["input_ids"][0] == tokenizer.mask_token_id).flatten().tolist()
            best = sorted(whole, key=(-logits[at]).tolist().__getitem__)[:15]
            assert candidates[place] == sorted(tokenizer.convert_ids_to_tokens(best))


def test_a_text_longer_than_the_model_is_kept_where_it_has_no_room(mlm):
    model = _load(str(mlm), "cpu", False)
    (found,), _ = model.predict([words_of("bread " * 100)], count=3)
    assert [len(each) for each in found] == [3] * 62 + [0] * 38  # 64 tokens, two of them special


def test_nearest_words(vectors):
    words, matrix = read_word_vectors(vectors)
    near = Neighbours.read(str(vectors), limit=1000)
    found: list[list[list[str]]] = [[[], [], []]]
    near.fill(found, [[Word("Bread"), Word("nowhere"), Word("soup")]], [[True, True, False]], count=5)
    row = matrix[words.index("bread")].astype(np.float64)
    cosine = matrix @ row / np.linalg.norm(matrix, axis=1) / np.linalg.norm(row)
    cosine[words.index("bread")] = -2
    assert found == [[sorted(words[i] for i in np.argsort(-cosine)[:5]), [], []]]


def test_tinybert_replaces_words_with_their_probability(mlm, vectors):
    row = words_of("Stir the zebras slowly and add salt wombats")
    options = AugmentOptions(method="tinybert", mlm=str(mlm), word_vectors=str(vectors))
    sample = sampler(options, [], row, device="cpu")
    candidates = sample.keywords["candidates"]
    assert [len(each) for each in candidates] == [15, 15, 15, 15, 15, 15, 15, 0]  # no vector for the last
    assert set(candidates[2]) <= set(read_word_vectors(vectors)[0]) - {"zebras"}
    rng, samples = Random(7), 4000
    made = [sample(rng) for _ in range(samples)]
    for place in range(7):
        choices = {word.capitalize() for word in candidates[place]} if place == 0 else set(candidates[place])
        own = row[place].text
        changed = Counter(words[place].text for words in made if words[place].text != own)
        assert set(changed) == choices - {own}
        assert near(changed.total(), samples, 0.4 * len(choices - {own}) / len(choices))
    assert all(words[7] == row[7] for words in made)


def test_tinybert_with_one_source_of_words(mlm, vectors):
    row = words_of("zebras and bread")
    only_model = sampler(AugmentOptions(method="tinybert", mlm=str(mlm), candidates=4), [], row, device="cpu")
    assert [len(each) for each in only_model.keywords["candidates"]] == [0, 4, 4]
    only_vectors = sampler(AugmentOptions(method="tinybert", word_vectors=str(vectors)), [], row)
    assert [len(each) for each in only_vectors.keywords["candidates"]] == [15, 15, 15]


def test_a_byte_level_tokenizer(tmp_path):
    """A word after a space, and the same at the start, where its pieces are others."""
    tokenizer = tiny_tokenizer(kind="bpe")
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    words = whole_words(tokenizer)
    pieces = dict(zip(words, tokenizer.convert_ids_to_tokens(list(range(len(words)))), strict=True))
    assert pieces["bread"] == "Ġbread" and not {"<|endoftext|>", "<mask>"} & set(words)
    save_model(tmp_path / "mlm", BertForMaskedLM(config_for(len(tokenizer))), tokenizer)
    model = _load(str(tmp_path / "mlm"), "cpu", False)
    ((_, bread, comma, zebras),), (several,) = model.predict([words_of("bread bread , zebras")], count=5)
    assert [len(each) for each in (bread, comma, zebras)] == [5, 5, 0]
    assert several == [True, False, False, True]


def test_a_language_model_without_a_mask_token(tmp_path, mlm):
    model = BertForMaskedLM.from_pretrained(mlm)
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    save_model(tmp_path / "bare", model, tokenizer)
    with pytest.raises(TeacherError, match="no mask token"):
        _load(str(tmp_path / "bare"), "cpu", False)
    assert isinstance(_load(str(mlm), "cpu", False), MaskedModel)
