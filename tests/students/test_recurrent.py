"""The Distilled BiLSTM held to a plain loop, pairs, kinds of word vectors, and the mean-vector BiLSTM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softlabels.cache import open_cache
from softlabels.config import DumpOptions, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import StudentError
from softlabels.optimizer import build_optimizer
from softlabels.runs import load_run
from softlabels.students import StudentSpec, build_student, load_student, student_inputs
from softlabels.students.recurrent import CompactEmbedding
from softlabels.students.texts import find_pairs, gather_words
from softlabels.tokens import pad_batch, tokenize
from softlabels.train import train_student
from softlabels.types import Example, TokenBatch, TokenSequence
from tests.models import LABEL_NAMES, TEXTS, save_teacher, tiny_tokenizer

SMALL: dict[str, Any] = {"embedding_dim": 6, "hidden_size": 5, "fc_size": 7}
SINGLES = [Example(str(i), text) for i, (text, _) in enumerate(TEXTS[:12])]
PAIRS = [Example(str(i), TEXTS[i][0], TEXTS[i + 1][0]) for i in range(12)]


def roberta_like() -> PreTrainedTokenizerBase:
    """<s> a </s></s> b </s>, no token types: the tiny tokenizer with RoBERTa's frame."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    frame = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2), trim_offsets=False, add_prefix_space=False)
    tokenizer.backend_tokenizer.post_processor = frame
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def spec_for(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **options: Any
) -> tuple[StudentSpec, TokenBatch]:
    """What a cache of `examples` asks of a student, and the examples as a batch."""
    rows = tokenize(tokenizer, examples, max_length=64).examples
    sequences: Callable = lambda: (TokenSequence(row.input_ids, row.token_type_ids) for row in rows)  # noqa: E731
    spec = StudentSpec(
        label_names=list(LABEL_NAMES),
        vocab_size=len(tokenizer),
        pad_token_id=0,
        mask_token_id=tokenizer.mask_token_id,
        unk_token_id=1,
        max_length=64,
        used_ids=np.unique(np.concatenate([row.input_ids for row in rows])),
        teacher_config={},
        options=options,
        tokenizer=lambda: tokenizer,
        sequences=sequences,
    )
    return spec, pad_batch(rows, pad_token_id=0)


def build(spec: StudentSpec, kind: str = "bilstm", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_student(kind, spec)


@torch.no_grad()
def answer(student: PreTrainedModel, tokens: TokenBatch) -> Tensor:
    return student.eval()(**student_inputs(student, tokens)).logits


def read_alone(vectors: Tensor, cell: Any) -> Tensor:
    """The last state of an LSTM over (L, width), step by step as Hochreiter and Schmidhuber's gates have it."""
    state = memory = torch.zeros(cell.hidden_size)
    for vector in vectors:
        gates = cell.weight_ih_l0 @ vector + cell.bias_ih_l0 + cell.weight_hh_l0 @ state + cell.bias_hh_l0
        into, keep, new, out = gates.chunk(4)
        memory = keep.sigmoid() * memory + into.sigmoid() * new.tanh()
        state = out.sigmoid() * memory.tanh()
    return state


@torch.no_grad()
def by_hand(student: Any, texts: list[list[int]]) -> Tensor:
    """Logits of one example, from the description: `texts` are the token ids of its one or two texts, words only."""
    read = []
    for text in texts:
        vectors = student.embedding(torch.tensor([text]))[0]  # (L, width)
        ahead, back = student.lstm.forwards[0], student.lstm.backwards[0]
        read.append(torch.cat([read_alone(vectors, ahead), read_alone(vectors.flip(0), back)]))
    one, two = read[0], read[-1]
    features = torch.cat([one, two, one * two, (one - two).abs()]) if len(texts) == 2 else one
    return student.classifier(student.fc(features).relu())


def words(tokenizer: PreTrainedTokenizerBase, text: str | None) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------------------------------- the Distilled BiLSTM


@pytest.mark.parametrize("examples", [SINGLES, PAIRS], ids=["singles", "pairs"])
@pytest.mark.parametrize("make", [tiny_tokenizer, roberta_like], ids=["token types", "separators"])
def test_the_bilstm_says_what_a_loop_written_from_its_description_says(make, examples):
    tokenizer = make()
    spec, tokens = spec_for(tokenizer, examples, **SMALL)
    student = build(spec)
    paired = examples is PAIRS
    assert student.fc.in_features == (40 if paired else 10)
    got = answer(student, tokens)
    for row, example in enumerate(examples):
        texts = [words(tokenizer, text) for text in (example.text, example.text_b)[: 1 + paired]]
        torch.testing.assert_close(got[row], by_hand(student, texts), rtol=0, atol=1e-5)


def test_the_papers_sizes_are_the_defaults():
    spec, _ = spec_for(tiny_tokenizer(), SINGLES)
    student = build(spec)
    assert (student.embedding.width, student.lstm.width, student.fc.out_features) == (300, 300, 200)
    assert student.config.dropout == 0.1 and len(student.lstm.forwards) == 1
    assert build(replace(spec, options={"vectors": "multichannel", "word_vectors": "fit"})).embedding.width == 600


@pytest.mark.parametrize("make", [tiny_tokenizer, roberta_like], ids=["token types", "separators"])
def test_logits_of_pairs_depend_neither_on_padding_nor_on_the_batch(make):
    tokenizer = make()
    spec, tokens = spec_for(tokenizer, PAIRS, **SMALL)
    student = build(spec)
    together = answer(student, tokens)
    for row, example in enumerate(PAIRS):
        _, alone = spec_for(tokenizer, [example])
        torch.testing.assert_close(answer(student, alone)[0], together[row], rtol=0, atol=1e-5)


def test_a_student_of_pairs_reads_a_single_text_as_a_pair_with_an_empty_one():
    tokenizer = tiny_tokenizer()
    spec, _ = spec_for(tokenizer, PAIRS, **SMALL)
    student = build(spec)
    _, single = spec_for(tokenizer, [SINGLES[0]])
    _, empty = spec_for(tokenizer, [Example("0", SINGLES[0].text, ""), PAIRS[1]])
    assert int(empty.attention_mask[0].sum()) == int(single.attention_mask.sum()) + 1  # a second [SEP]
    expected = answer(student, single)[0]
    torch.testing.assert_close(answer(student, empty)[0], expected)
    read = by_hand(student, [words(tokenizer, SINGLES[0].text)] * 2)  # not this one: its second text isn't empty
    assert not torch.allclose(expected, read, atol=1e-4)
    with torch.no_grad():
        one = student._encode(gather_words(*words_alone(student, words(tokenizer, SINGLES[0].text))))[0]
        features = torch.cat([one, 0 * one, 0 * one, one.abs()])
        torch.testing.assert_close(expected, student.classifier(student.fc(features).relu()), rtol=0, atol=1e-5)


def words_alone(student: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    rows = student.embedding.find_rows(torch.tensor([ids]))
    return rows, torch.ones_like(rows, dtype=torch.bool)


def test_special_tokens_are_no_words():
    tokenizer = tiny_tokenizer()
    spec, _ = spec_for(tokenizer, SINGLES, **SMALL)
    token_map = build(spec).embedding.token_map
    assert token_map[:5].tolist() == [0, 1, 0, 0, 1]  # [PAD] [UNK] [CLS] [SEP] [MASK]
    with_masks = [Example("0", "the [MASK] rain"), *SINGLES]  # as augmentation leaves them
    for kind in ("bilstm", "word_average"):
        spec, tokens = spec_for(tokenizer, with_masks, **SMALL)
        student = build(spec, kind)
        assert student.embedding.token_map[4] == 1  # unknown, and not left out
        whole = answer(student, tokens)[0]
        without = replace(tokens, attention_mask=tokens.attention_mask * (tokens.input_ids != 4))
        assert not torch.allclose(answer(student, without)[0], whole)


@pytest.mark.parametrize(
    ("make", "examples", "found"),
    [
        (tiny_tokenizer, SINGLES, None),
        (tiny_tokenizer, [*SINGLES, PAIRS[0]], "token_types"),
        (roberta_like, SINGLES, None),
        (roberta_like, PAIRS, "separators"),
        (roberta_like, [Example("0", "rain [SEP] wind"), *SINGLES], None),
        (lambda: tiny_tokenizer(kind="bpe"), PAIRS, None),
    ],
)
def test_how_pairs_are_told(make, examples, found):
    spec, _ = spec_for(make(), examples)
    assert find_pairs(spec) == found


def test_words_move_to_the_left_in_their_order():
    rows = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    chosen = torch.tensor([[False, True, False, True], [True, True, True, False], [False] * 4])
    texts = gather_words(rows, chosen)
    assert texts.rows.tolist() == [[6, 8, 0], [5, 6, 7], [0, 0, 0]]
    assert texts.lengths.tolist() == [2, 3, 0]


# ----------------------------------------------------------------------------------------------- word vectors


def step(student: Any, tokens: TokenBatch) -> None:
    optimizer = build_optimizer(student, lr=1e-2, weight_decay=0.1)
    student.train()
    nn.functional.cross_entropy(student(**student_inputs(student, tokens)).logits, torch.arange(12) % 3).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["bilstm", "word_average", "lstm_attention"])
@pytest.mark.parametrize("vectors", ["tuned", "static", "multichannel"])
def test_static_vectors_stay_and_tuned_ones_move_and_all_are_saved(kind, vectors, tmp_path: Path):
    chosen = {"embedding_dim": 6, "hidden_size": 5, "vectors": vectors, "word_vectors": "fit"}
    spec, tokens = spec_for(tiny_tokenizer(), SINGLES, **chosen)
    student = build(spec, kind)
    embedding: CompactEmbedding = student.embedding
    channels = {name: value.clone() for name, value in embedding.state_dict().items() if name != "token_map"}
    assert (
        list(channels)
        == {
            "tuned": ["vectors.weight"],
            "static": ["static"],
            "multichannel": ["static", "vectors.weight"],
        }[vectors]
    )
    first, *others = channels.values()
    assert all(torch.equal(first, other) for other in others)  # both start from what is given
    assert not first[:2].any() and first[2:].any(1).all()  # padding and unknown words say nothing
    assert ("embedding.vectors.weight" in dict(student.named_parameters())) == (vectors != "static")
    step(student, tokens)
    for name, value in embedding.state_dict().items():
        if name != "token_map":
            assert torch.equal(value, channels[name]) == (name == "static")
    student.save_pretrained(tmp_path)
    again = load_student(kind, tmp_path)
    assert torch.equal(answer(again, tokens), answer(student, tokens))
    assert again.config.word_vectors == "fit" and again.config.word_vectors_found > 0.9
    if vectors != "tuned":
        kept = {name: value for name, value in student.state_dict().items() if name != "embedding.static"}
        student.save_pretrained(tmp_path, state_dict=kept)
        with pytest.raises(StudentError, match=r"damaged.*embedding\.static"):
            load_student(kind, tmp_path)


def test_vectors_that_were_never_given_are_not_kept():
    spec, _ = spec_for(tiny_tokenizer(), SINGLES, vectors="static")
    with pytest.raises(StudentError, match=r"'vectors: static'.*give some by option 'word_vectors'"):
        build(spec)


def test_a_file_gives_its_vectors_and_its_width(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    (tmp_path / "glove.txt").write_text("rain 1 2 3\n##s 4 5 6\nthe 3 2 1\n")
    spec, _ = spec_for(tokenizer, SINGLES, word_vectors=str(tmp_path / "glove.txt"))
    student = build(spec)
    assert student.config.embedding_dim == 3 and student.config.word_vectors == "glove.txt"
    weights, token_map = student.embedding.vectors.weight, student.embedding.token_map
    rain, other = tokenizer.vocab["rain"], tokenizer.vocab["salt"]
    assert weights[token_map[rain]].tolist() == [1, 2, 3]
    assert weights[token_map[other]].any()  # at random
    with pytest.raises(StudentError, match=r"'embedding_dim' is 5, the word vectors in .* have 3 values"):
        build(replace(spec, options=spec.options | {"embedding_dim": 5}))


def test_gradients_are_sparse_in_training_only():
    spec, tokens = spec_for(tiny_tokenizer(), SINGLES, **SMALL)
    student = build(spec)
    for training in (True, False):
        student.train(training).zero_grad()
        student(**student_inputs(student, tokens)).logits.sum().backward()
        assert student.embedding.vectors.weight.grad.is_sparse == training
    assert not student.embedding.vectors.weight.grad[0].any()


# --------------------------------------------------------------------------------------------- the mean vector


def test_the_mean_vector_is_that_of_the_words(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    spec, tokens = spec_for(tokenizer, SINGLES, **SMALL)
    student = build(spec, "word_average")
    got = answer(student, tokens)
    for row, example in enumerate(SINGLES):
        with torch.no_grad():
            mean = student.embedding(torch.tensor([words(tokenizer, example.text)]))[0].mean(0, keepdim=True)
            both = [read_alone(mean, cell[0]) for cell in (student.lstm.forwards, student.lstm.backwards)]
            expected = student.classifier(student.fc(torch.cat(both)).relu())
        torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-5)
    assert build(replace(spec, options={}), "word_average").lstm.width == 2 * 256


# -------------------------------------------------------------------------------------------- from cache to run


def test_pairs_from_a_cache_to_a_run_that_predicts(tmp_path: Path):
    """The whole way: dump pairs, train with Adadelta on fitted vectors, load, and predict pairs and single texts."""
    rows = [Example(str(i), text, TEXTS[(i * 7) % 60][0], name) for i, (text, name) in enumerate(TEXTS)]
    teacher = save_teacher(tmp_path / "teacher")
    corpus = Corpus("made", None, rows, list(LABEL_NAMES))
    dump(corpus, teacher=str(teacher), out=tmp_path / "cache", options=DumpOptions(shard_rows=16))
    chosen = StudentOptions(
        student="bilstm",
        options=SMALL | {"vectors": "multichannel", "word_vectors": "fit", "dropout": 0.0},
        losses={"ce": 1.0},
        optimizer="adadelta",
        lr=1.0,
        weight_decay=0.0,
        epochs=25,
        batch_size=10,
        validation=0.0,
    )
    train_student(open_cache(tmp_path / "cache"), out=tmp_path / "run", options=chosen, cpu=True)
    run = load_run(tmp_path / "run")
    assert run.student.config.pairs == "token_types"  # type: ignore[union-attr]
    logits = run.logits(rows)
    assert np.mean(logits.argmax(1) == [LABEL_NAMES.index(str(row.label)) for row in rows]) > 0.9
    single = run.logits([Example("0", "It rains."), Example("1", "Salt the soup.")])
    assert single.shape == (2, 3) and np.isfinite(single).all()
    mixed = run.logits([Example("0", "It rains."), rows[0]])
    np.testing.assert_allclose(mixed[0], single[0], atol=1e-5)
