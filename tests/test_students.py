"""Students: shapes, padding, gradients, saving, options, a teacher's layers, and the linear student."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import FunctionTransformer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from softlabels.errors import StudentError
from softlabels.students import (
    STUDENT_NAMES,
    STUDENTS,
    StudentSpec,
    build_student,
    check_student,
    count_layers,
    load_student,
    student_inputs,
)
from softlabels.students.linear import ABSENT_CLASS_LOGIT, fit_linear, load_linear
from softlabels.students.recurrent import PaddedLSTM, every_state, last_state
from softlabels.types import NO_LABEL, TokenBatch

VOCABULARY, LONGEST = 120, 16
CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("bilstm", {"embedding_dim": 12, "hidden_size": 8, "fc_size": 10}),
    ("bilstm", {"embedding_dim": 12, "hidden_size": 8, "fc_size": 10, "layers": 2}),
    ("lstm_attention", {"embedding_dim": 12, "hidden_size": 8}),
    ("lstm_attention", {"embedding_dim": 12, "hidden_size": 8, "layers": 2, "bidirectional": True}),
    ("word_average", {"embedding_dim": 12, "hidden_size": 8, "fc_size": 10}),
    ("transformer", {"hidden_size": 16, "heads": 2}),
    ("transformer", {"hidden_size": 16, "heads": 2, "model_type": "roberta"}),
    ("transformer", {"hidden_size": 16, "heads": 2, "model_type": "distilbert", "intermediate_size": 20}),
]


def spec(**options: Any) -> StudentSpec:
    return StudentSpec(
        label_names=["no", "yes", "maybe"],
        vocab_size=VOCABULARY,
        pad_token_id=0,
        unk_token_id=1,
        max_length=LONGEST,
        used_ids=np.arange(1, 90, dtype=np.int32),
        teacher_config={"model_type": "bert", "type_vocab_size": 2},
        options=options,
    )


def build(kind: str, options: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return build_student(kind, spec(**options))


def batch(lengths: tuple[int, ...] = (16, 5, 1, 9), seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 110, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.arange(len(lengths)) % 3
    return TokenBatch(ids * mask, mask, torch.zeros_like(ids), labels)


def take(tokens: TokenBatch, rows: list[int], length: int) -> TokenBatch:
    types = tokens.token_type_ids
    assert types is not None
    return TokenBatch(
        tokens.input_ids[rows, :length],
        tokens.attention_mask[rows, :length],
        types[rows, :length],
        tokens.labels[rows],
    )


def answer(student: PreTrainedModel, tokens: TokenBatch) -> torch.Tensor:
    with torch.inference_mode():
        return student.eval()(**student_inputs(student, tokens)).logits


# -------------------------------------------------------------------------------------- every torch student


@pytest.mark.parametrize(("kind", "options"), CHOICES)
def test_logits_depend_neither_on_padding_nor_on_the_order_of_the_batch(kind, options):
    student, tokens = build(kind, options), batch()
    together = answer(student, tokens)
    assert together.shape == (4, 3)
    assert together.dtype == torch.float32
    for row, length in enumerate(tokens.attention_mask.sum(1).tolist()):
        alone = answer(student, take(tokens, [row], length))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    turned = answer(student, take(tokens, [3, 1, 0, 2], LONGEST))
    torch.testing.assert_close(turned, together[[3, 1, 0, 2]], rtol=0, atol=1e-5)
    noise = replace(tokens, input_ids=torch.where(tokens.attention_mask.bool(), tokens.input_ids, 77))
    if options.get("model_type") != "roberta":  # its positions count the tokens that are not padding
        torch.testing.assert_close(answer(student, noise), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), CHOICES)
def test_a_step_reaches_every_trained_parameter_and_lowers_the_loss(kind, options):
    student, tokens = build(kind, options), batch()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2)
    student.eval()  # no dropout: the loss must fall
    losses = []
    for _ in range(5):
        logits = student(**student_inputs(student, tokens)).logits
        loss = nn.functional.cross_entropy(logits, tokens.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    without = [name for name, value in student.named_parameters() if value.grad is None or not value.grad.any()]
    # a row's attention scores gain the same from a key's bias: softmax takes it out again; an LSTM that takes a single
    # step has no state to weigh
    idle = ("key.bias", "k_lin.bias", "weight_hh" if kind == "word_average" else "key.bias")
    assert [name for name in without if not any(part in name for part in idle)] == []
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("kind", "options"), CHOICES)
def test_a_saved_student_gives_the_same_logits(kind, options, tmp_path):
    student, tokens = build(kind, options), batch()
    student.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = load_student(kind, tmp_path)
    assert not again.training
    assert torch.equal(answer(again, tokens), answer(student, tokens))
    assert again.config.id2label == {0: "no", 1: "yes", 2: "maybe"}


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_seed_decides_the_weights(kind):
    first, same, other = (build(kind, {}, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(kind):
    with pytest.raises(StudentError, match=r"hiden_size.*Did you mean 'hidden_size'\?"):
        build(kind, {"hiden_size": 8})


@pytest.mark.parametrize("kind", STUDENT_NAMES)
def test_options_are_checked_without_a_student(kind):
    """And layers counted, of those that have some."""
    options = {"hidden_size": 24, "layers": 3, "heads": 2} if kind == "transformer" else {}
    assert count_layers(kind, spec(**options)) == (3 if kind == "transformer" else None)
    with pytest.raises(StudentError, match="hiden_size"):
        count_layers(kind, spec(**options, hiden_size=8))


def test_a_misspelt_student_is_refused_with_the_one_that_was_meant():
    with pytest.raises(StudentError, match="Did you mean 'bilstm'"):
        check_student("bilstn")
    assert [check_student(name) for name in STUDENT_NAMES] == [
        "bilstm",
        "lstm_attention",
        "transformer",
        "word_average",
        "linear",
    ]
    with pytest.raises(StudentError, match="fit_linear"):
        build("linear", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_names": ["only"]}, "at least two classes"),
        ({"used_ids": np.array([], dtype=np.int32)}, "no token"),
        ({"used_ids": np.array([5, VOCABULARY])}, "holds token id 120, but its tokenizer knows 120 tokens"),
    ],
)
def test_a_spec_that_no_student_can_fit_is_refused(change, message):
    with pytest.raises(StudentError, match=message):
        build_student("bilstm", replace(spec(), **change))


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_with_missing_weights_is_refused(kind, tmp_path):
    student = build(kind, {"hidden_size": 16})
    weights = {name: value for name, value in student.state_dict().items() if "classifier" not in name}
    student.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(StudentError, match=r"damaged.*classifier"):
        load_student(kind, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 not weights")
    with pytest.raises(StudentError, match="damaged"):
        load_student(kind, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(student.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle is not even opened
    with pytest.raises(StudentError, match="damaged"):
        load_student(kind, tmp_path)


# ------------------------------------------------------------------------------------------------ recurrent


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_lstm_says_what_pack_padded_sequence_says(bidirectional):
    torch.manual_seed(0)
    ours = PaddedLSTM(6, 5, layers=2, bidirectional=bidirectional, dropout=0.0)
    theirs = nn.LSTM(6, 5, num_layers=2, bidirectional=bidirectional, batch_first=True)
    for layer in range(2):
        for suffix, cells in (("", ours.forwards), ("_reverse", ours.backwards)):
            for name, value in cells[layer].named_parameters() if len(cells) else ():
                getattr(theirs, name.replace("l0", f"l{layer}") + suffix).data.copy_(value)
    lengths = torch.tensor([7, 1, 4])
    inputs = torch.randn(3, 7, 6)
    readings = ours(inputs, lengths)
    packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    outputs, (hidden, _) = theirs(packed)
    states = pad_packed_sequence(outputs, batch_first=True)[0]
    mask = torch.arange(7) < lengths[:, None]
    torch.testing.assert_close(every_state(readings, lengths)[mask], states[mask])
    expected = torch.cat([hidden[-2], hidden[-1]], -1) if bidirectional else hidden[-1]
    torch.testing.assert_close(last_state(readings, lengths), expected)


def test_a_recurrent_student_keeps_vectors_for_the_tokens_of_its_rows_only():
    student = build("bilstm", {"embedding_dim": 12})
    embedding: Any = student.get_submodule("embedding")
    assert embedding.vectors.weight.shape == (88 + 2, 12)  # ids 2 to 89, padding, unknown
    assert embedding.token_map.tolist()[:4] == [0, 1, 2, 3]  # [PAD], [UNK], and the first two words
    assert set(embedding.token_map.tolist()[90:]) == {1}
    assert not embedding.vectors.weight[:2].any()  # neither says anything before the training
    assert "embedding.token_map" not in dict(student.named_parameters())
    unseen = torch.tensor([[95, 100, 119]])
    assert torch.equal(embedding(unseen), embedding(torch.tensor([[1, 1, 1]])))


def test_a_pad_token_that_is_also_a_word_keeps_a_vector():
    """GPT-2 pads with its end-of-text token, which may be in the rows."""
    student = build_student("lstm_attention", replace(spec(), pad_token_id=50, unk_token_id=None))
    embedding: Any = student.get_submodule("embedding")
    assert embedding.token_map[50] > 1
    assert embedding.token_map[0] == 1


def test_a_token_map_that_points_nowhere_is_refused(tmp_path):
    student = build("bilstm", {"embedding_dim": 12})
    embedding: Any = student.get_submodule("embedding")
    embedding.token_map[3] = 5000
    student.save_pretrained(tmp_path)
    with pytest.raises(StudentError, match="token map points outside"):
        load_student("bilstm", tmp_path)


@pytest.mark.parametrize("kind", ["bilstm", "lstm_attention"])
@pytest.mark.parametrize("options", [{"dropout": 1.0}, {"layers": 0}, {"hidden_size": "wide"}])
def test_an_impossible_value_is_refused(kind, options):
    with pytest.raises(StudentError, match=f"student '{kind}': {next(iter(options))}: "):
        build(kind, options)


# ---------------------------------------------------------------------------------------------- transformer


def test_a_transformer_is_small_unless_told_otherwise():
    config = build("transformer", {}).config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 2, 128)
    assert (config.num_attention_heads, config.intermediate_size) == (2, 512)
    assert (config.vocab_size, config.max_position_embeddings, config.pad_token_id) == (
        VOCABULARY,
        LONGEST,
        0,
    )
    chosen = build("transformer", {"layers": 1, "hidden_size": 32, "heads": 4, "hidden_act": "relu"}).config
    assert (chosen.num_hidden_layers, chosen.hidden_size, chosen.num_attention_heads) == (1, 32, 4)
    assert (chosen.intermediate_size, chosen.hidden_act) == (128, "relu")


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "albert", "electra", "gpt2", "modernbert"])
def test_other_architectures_read_rows_of_full_length(kind):
    student = build("transformer", {"model_type": kind, "hidden_size": 16, "heads": 2})
    assert answer(student, batch((LONGEST, 3))).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "brt"}, r"no model_type 'brt'\. Did you mean 'bert'\?"),
        ({"model_type": "t5"}, "'t5' of these options can't read rows of 16 tokens"),
        ({"vocab_size": 5}, "'vocab_size' can't be chosen: it follows from the tokenizer"),
        ({"hidden_size": 100, "heads": 3}, "width of 100 can't be split into 3 heads"),
        ({"layers": "two"}, "num_hidden_layers"),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"max_position_embeddings": 8}, "up to 16 tokens.*at least 16; it has 8"),
        ({"model_type": "roberta", "max_position_embeddings": 16}, "at least 18; it has 16"),
        ({"heads": 2, "num_attention_heads": 4}, "given twice"),
        ({"init_layers": [1]}, "give its folder as 'init_from'"),
        ({"config": "/nowhere"}, "no file /nowhere/config.json"),
        ({"init_from": "/nowhere"}, "'init_from': /nowhere is no teacher's folder"),
    ],
)
def test_a_transformer_that_cannot_be_is_refused(options, message):
    with pytest.raises(StudentError, match=message):
        build("transformer", options)


def test_a_config_folder_is_built_as_it_says(tmp_path):
    config = BertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
    config.save_pretrained(tmp_path)
    student = build("transformer", {"config": str(tmp_path), "hidden_dropout_prob": 0.3})
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (24, 3)
    assert (student.config.max_position_embeddings, student.config.vocab_size) == (512, VOCABULARY)
    assert (student.config.hidden_dropout_prob, student.config.num_labels) == (0.3, 3)
    with pytest.raises(StudentError, match="already said"):
        build("transformer", {"config": str(tmp_path), "model_type": "bert"})
    settings = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "no-such"}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(StudentError, match="can't be used"):
        build("transformer", {"config": str(tmp_path)})


# ----------------------------------------------------------------------------------------- teacher's layers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple[BertForSequenceClassification, Path]:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY + 8,  # padded, as many are
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        id2label={0: "no", 1: "yes", 2: "maybe"},
    )
    model = BertForSequenceClassification(config).eval()
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    return model, folder


def test_a_student_of_all_the_teachers_layers_has_its_hidden_states(teacher):
    model, folder = teacher
    student: Any = build("transformer", {"init_from": str(folder), "init_layers": [1, 2, 3, 4]})
    tokens = batch()
    inputs = student_inputs(student, tokens)
    student.eval()
    torch.testing.assert_close(student.base_model(**inputs).last_hidden_state, model.bert(**inputs).last_hidden_state)
    assert not torch.equal(student.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"init_layers": [1, 3]}, [0, 2]),
        ({"init_layers": [4, 2, 2]}, [3, 1, 1]),
        ({"layers": 3}, [0, 1, 2]),
        ({}, [0, 1]),
    ],
)
def test_the_chosen_layers_are_copied(teacher, options, layers):
    model, folder = teacher
    student: Any = build("transformer", {"init_from": str(folder)} | options)
    assert student.config.num_hidden_layers == len(layers)
    assert student.config.intermediate_size == 24  # the teacher's, like every width
    for own, its in zip(student.bert.encoder.layer, layers, strict=True):
        theirs = model.bert.encoder.layer[its].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in own.state_dict().items())
    embeddings, theirs = student.bert.embeddings, model.bert.embeddings
    assert torch.equal(embeddings.word_embeddings.weight, theirs.word_embeddings.weight[:VOCABULARY])
    assert torch.equal(embeddings.position_embeddings.weight, theirs.position_embeddings.weight[:LONGEST])


def test_a_bare_teacher_in_several_files_gives_its_layers_too(teacher, tmp_path):
    model, _ = teacher
    model.bert.save_pretrained(tmp_path, max_shard_size="8kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    student: Any = build("transformer", {"init_from": str(tmp_path), "init_layers": [2]})
    own, theirs = student.bert.encoder.layer[0].state_dict(), model.bert.encoder.layer[1].state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_layers": [2, 5]}, r"no layer 5; it has layers 1 to 4"),
        ({"init_layers": [0]}, "numbered from 1; got 0"),
        ({"init_layers": "1,3"}, r"lists layers from 1, like \[1, 3\]; got '1,3'"),
        ({"init_layers": [1, 2], "layers": 3}, "3 layers can't start from the 2 layers"),
        ({"init_layers": [1], "hidden_size": 32}, r"has shape \[128, 16\], the student's \[120, 32\]"),
        ({"init_layers": [1], "intermediate_size": 30}, r"shape \[24, 16\], the student's \[30, 16\]"),
        (
            {"init_layers": [1], "max_position_embeddings": 100},
            r"shape \[64, 16\], the student's \[100, 16\]",
        ),
        ({"init_layers": [1], "model_type": "roberta"}, "'roberta' student can't start from .* is a 'bert'"),
    ],
)
def test_layers_that_do_not_fit_are_refused(teacher, options, message):
    with pytest.raises(StudentError, match=message):
        build("transformer", {"init_from": str(teacher[1])} | options)


def test_an_index_that_leads_out_of_the_teachers_folder_is_refused(teacher, tmp_path):
    model, _ = teacher
    model.save_pretrained(tmp_path / "a", max_shard_size="8kB")
    index = tmp_path / "a" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = dict.fromkeys(data["weight_map"], "../b/model.safetensors")
    index.write_text(json.dumps(data))
    with pytest.raises(StudentError, match="refused"):
        build("transformer", {"init_from": str(tmp_path / "a")})


def test_a_student_from_a_teachers_layers_loads_in_plain_transformers(teacher, tmp_path):
    student = build("transformer", {"init_from": str(teacher[1]), "init_layers": [1, 4]})
    student.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(answer(again, batch()), answer(student, batch()))


# --------------------------------------------------------------------------------------------------- linear

GOOD, BAD = (
    ["fine film", "a lovely fine story", "好看的电影"],
    ["dull film", "a poor dull story", "难看的电影"],
)
TEXTS = [f"{text} {number}" for number in range(10) for text in GOOD + BAD]
ANSWERS = np.array([0, 0, 0, 1, 1, 1] * 10)


def test_a_linear_student_learns_logits_and_labels():
    logits = np.where(ANSWERS[:, None] == np.arange(2), 2.0, -2.0)
    held_out = ["a fine day", "such a dull day", "好看", "难看"]
    for student in (
        fit_linear(TEXTS, num_labels=2, logits=logits),
        fit_linear(TEXTS, num_labels=2, labels=ANSWERS),
    ):
        found = student.logits(held_out)
        assert (found.dtype, found.shape) == (np.float32, (4, 2))
        assert found.argmax(1).tolist() == [0, 1, 0, 1]
    assert student.logits([]).shape == (0, 2)
    assert np.abs(fit_linear(TEXTS, num_labels=2, logits=logits).logits(TEXTS) - logits).mean() < 0.5


def test_unlabelled_rows_are_left_out_and_absent_classes_keep_their_column():
    labels = ANSWERS * 3  # classes 0 and 3 of 5
    student = fit_linear([*TEXTS, "unlabelled"], num_labels=5, labels=[*labels, NO_LABEL])
    same = fit_linear(TEXTS, num_labels=5, labels=labels)
    found = student.logits(TEXTS)
    assert np.array_equal(found, same.logits(TEXTS))
    assert found.shape == (60, 5)
    assert (found[:, [1, 2, 4]] == ABSENT_CLASS_LOGIT).all()
    assert (found.argmax(1) == labels).all()
    three = fit_linear(TEXTS, num_labels=4, labels=np.arange(60) % 3).logits(TEXTS)
    assert (three[:, 3] == ABSENT_CLASS_LOGIT).all()
    assert (three[:, :3] > ABSENT_CLASS_LOGIT / 2).all()


def test_a_linear_student_of_pairs_sees_what_the_second_text_adds():
    first = [f"the {word} sat" for word in ("cat", "dog", "cow", "hen")] * 8
    second = [text if row < 16 else f"{text} and sang" for row, text in enumerate(first)]
    labels = [0] * 16 + [1] * 16
    student = fit_linear(first, num_labels=2, labels=labels, pairs=second)
    assert student.paired
    found = student.logits(["the cat sat", "the cat sat"], pairs=["the cat sat", "the cat sat and sang"])
    assert found.argmax(1).tolist() == [0, 1]
    assert student.logits(["the cat sat"]).shape == (1, 2)  # a lone text is a pair whose second text is empty
    assert not fit_linear(TEXTS, num_labels=2, labels=ANSWERS, pairs=[None] * 60).paired


def test_a_saved_linear_student_gives_the_same_logits_and_holds_no_pickle(tmp_path):
    student = fit_linear(TEXTS, num_labels=2, labels=ANSWERS)
    student.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.skops"]
    assert skops.io.get_untrusted_types(file=tmp_path / "model.skops") == []
    with zipfile.ZipFile(tmp_path / "model.skops") as archive:
        for name in archive.namelist():
            assert name.endswith((".npy", ".json"))
            assert archive.read(name)[:6] in (b"\x93NUMPY", b'{\n  "_') or name == "schema.json"
            assert not archive.read(name).startswith(b"\x80")
    again = load_linear(tmp_path)
    assert np.array_equal(again.logits(TEXTS), student.logits(TEXTS))
    assert again.parameters == student.parameters


@pytest.mark.parametrize(
    "content",
    [
        FunctionTransformer(print),  # skops itself would ask to trust print
        Ridge(),  # skops would load this one without asking
        {"format": "softlabels-linear", "version": 1, "paired": Ridge()},
    ],
)
def test_a_file_with_anything_but_numbers_and_text_is_refused(content, tmp_path):
    skops.io.dump(content, tmp_path / "model.skops")
    with pytest.raises(StudentError, match=r"holds an object of type .* not written by softlabels"):
        load_linear(tmp_path)


def test_a_damaged_linear_student_is_refused(tmp_path):
    with pytest.raises(StudentError, match="damaged"):
        load_linear(tmp_path)
    student = fit_linear(TEXTS, num_labels=2, labels=ANSWERS)
    student.save(tmp_path)
    whole = (tmp_path / "model.skops").read_bytes()
    for data in (b"", b"\x80\x04.", whole[: len(whole) // 2]):
        (tmp_path / "model.skops").write_bytes(data)
        with pytest.raises(StudentError, match="damaged"):
            load_linear(tmp_path)
    for state in (
        {"format": "other"},
        [1, 2],
        {"format": "softlabels-linear", "version": 1, "vocabularies": []},
    ):
        skops.io.dump(state, tmp_path / "model.skops")
        with pytest.raises(StudentError, match="damaged"):
            load_linear(tmp_path)
    replace(student, weights=student.weights[1:]).save(tmp_path)
    with pytest.raises(StudentError, match="don't fit"):
        load_linear(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of them"),
        ({"logits": np.zeros((60, 2)), "labels": ANSWERS}, "give one of them"),
        ({"logits": np.zeros((59, 2))}, r"have shape \(59, 2\); 60 rows need \(60, 2\)"),
        ({"logits": np.full((60, 2), np.nan)}, "not all finite"),
        ({"labels": [NO_LABEL] * 60}, "no row to learn from"),
        ({"labels": [1] * 60}, "at least two classes"),
        ({"labels": ANSWERS, "options": {"alhpa": 1}}, "Did you mean 'alpha'"),
        ({"labels": ANSWERS, "options": {"char_ngrams": 0, "word_ngrams": 0}}, "needs features"),
    ],
)
def test_what_a_linear_student_cannot_learn_from_is_refused(given, message):
    with pytest.raises(StudentError, match=message):
        fit_linear(TEXTS, num_labels=2, **given)


def test_texts_that_share_nothing_are_refused():
    with pytest.raises(StudentError, match="min_df=1"):
        fit_linear(["ab", "cd", "ef"], num_labels=2, labels=[0, 1, 0], options={"char_ngrams": 0})
