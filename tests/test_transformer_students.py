"""Transformer students: presets, DistilBERT from BERT and RoBERTa, heads, MobileBERT, and starting from a run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from softlabels.captures import parse_captures, prepare
from softlabels.captures.output_head import keep_head, only_targets
from softlabels.errors import StudentError, TeacherError
from softlabels.runs import RunRecord, save_run
from softlabels.students import StudentSpec, build_student, load_student, student_inputs
from softlabels.students.presets import PRESETS
from softlabels.students.shapes import read_shape
from softlabels.students.starts import spread_layers
from softlabels.types import MASKED, TokenBatch
from tests.models import tiny_tokenizer

VOCABULARY, LONGEST = 60, 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY + 4,  # padded, as many are
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # wide, so that layers differ and token types count
    "hidden_act": "gelu_new",
    "pad_token_id": 0,
}
# its head has this activation whatever the config says; a DistilBERT's norms have this epsilon, not RoBERTa's 1e-5
ROBERTA: dict[str, Any] = {"type_vocab_size": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
MOBILE: dict[str, Any] = {  # MobileBERT's knobs, all of them smaller
    "layers": 3,
    "hidden_size": 32,
    "embedding_size": 8,
    "intra_bottleneck_size": 16,
    "intermediate_size": 20,
}


def spec(task: Any = "sequence-classification", **options: Any) -> StudentSpec:
    return StudentSpec(
        label_names=["no", "yes", "maybe"] if task == "sequence-classification" else [],
        vocab_size=VOCABULARY,
        pad_token_id=0,
        unk_token_id=1,
        max_length=LONGEST,
        used_ids=np.arange(1, VOCABULARY, dtype=np.int32),
        teacher_config={"model_type": "bert", "type_vocab_size": 2, "num_attention_heads": 4},
        options=options,
        task=task,
    )


def build(task: Any = "sequence-classification", **options: Any) -> Any:
    torch.manual_seed(0)
    return build_student("transformer", spec(task, **options))


def batch(*, types: int = 0) -> TokenBatch:
    """Ragged rows of single texts, every token of the type `types`."""
    lengths = torch.tensor([12, 5, 9])
    ids = torch.randint(2, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < lengths[:, None]).long()
    return TokenBatch(ids * mask, mask, torch.full_like(ids, types), torch.tensor([0, 1, 2]))


def hidden_states(model: PreTrainedModel, tokens: TokenBatch) -> list[Tensor]:
    """Those of every layer at the real tokens, the embedding output first: (N, D) each."""
    with torch.inference_mode():
        output = model.eval().base_model(**student_inputs(model, tokens), output_hidden_states=True)
    return [states[tokens.attention_mask.bool()] for states in output.hidden_states]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(1)
    model = BertForMaskedLM(BertConfig(**SIZES)).eval()
    nn.init.normal_(model.cls.predictions.bias)  # 0 at first, in which nothing could be seen
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(2)
    model = RobertaForMaskedLM(RobertaConfig(**SIZES | ROBERTA)).eval()
    nn.init.normal_(model.lm_head.bias)
    folder = tmp_path_factory.mktemp("roberta")
    model.save_pretrained(folder)
    return model, folder


# ------------------------------------------------------------------------------------------- DistilBERT from a BERT


def test_a_distilbert_of_all_layers_has_its_teachers_hidden_states_and_logits(bert):
    model, folder = bert
    student = build("masked-lm", model_type="distilbert", init_from=str(folder), init_layers="all")
    assert type(student).__name__ == "DistilBertForMaskedLM"
    assert (student.config.activation, student.config.n_heads) == ("gelu_new", 2)
    for own, theirs in zip(hidden_states(student, batch()), hidden_states(model, batch()), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)
    with torch.inference_mode():
        own = student(**student_inputs(student, batch())).logits
        theirs = model(**batch().model_inputs()).logits[..., :VOCABULARY]
    real = batch().attention_mask.bool()
    torch.testing.assert_close(own[real], theirs[real], rtol=0, atol=1e-4)


def test_what_a_distilbert_cannot_have_is_the_second_texts_type(bert):
    model, folder = bert
    student = build(model_type="distilbert", init_from=str(folder), init_layers="all")
    first, second = batch(), batch(types=1)
    own, theirs = hidden_states(student, first)[0], hidden_states(model, first)[0]
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)
    assert torch.equal(hidden_states(student, second)[0], own)
    assert not torch.allclose(hidden_states(model, second)[0], theirs, atol=0.1)


def test_a_distilbert_from_a_roberta_counts_positions_as_it_does(roberta):
    model, folder = roberta
    torch.manual_seed(0)
    wanted = spec("masked-lm", preset="distilbert", layers=4, init_from=str(folder))
    student = build_student("transformer", wanted)
    assert student.config.model_type == "distilbert"
    for own, theirs in zip(hidden_states(student, batch()), hidden_states(model, batch()), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)
    with torch.inference_mode():
        own = student(**student_inputs(student, batch())).logits
        theirs = model(**batch().model_inputs()).logits[..., :VOCABULARY]
    real = batch().attention_mask.bool()
    torch.testing.assert_close(own[real], theirs[real], rtol=0, atol=1e-4)


def test_the_preset_takes_half_the_layers_at_equal_distances_and_the_teachers_widths(bert):
    assert spread_layers(12, 6) == [1, 3, 5, 8, 10, 12]  # the paper's code: 0, 2, 4, 7, 9, 11
    assert spread_layers(24, 6) == [1, 6, 10, 15, 19, 24]
    assert (spread_layers(4, 2), spread_layers(4, 4), spread_layers(4, 1)) == ([1, 4], [1, 2, 3, 4], [1])
    model, folder = bert
    student = build(preset="distilbert", layers=2, init_from=str(folder))
    assert (student.config.dim, student.config.hidden_dim, student.config.n_layers) == (16, 24, 2)
    for own, layer in zip(student.distilbert.transformer.layer, (0, 3), strict=True):
        theirs = model.bert.encoder.layer[layer]
        assert torch.equal(own.attention.k_lin.weight, theirs.attention.self.key.weight)
        assert torch.equal(own.ffn.lin1.bias, theirs.intermediate.dense.bias)
        assert torch.equal(own.output_layer_norm.weight, theirs.output.LayerNorm.weight)
    named = build(preset="distilbert", init_from=str(folder), init_layers=[2, 4, 1])
    assert named.config.n_layers == 3
    theirs = model.bert.encoder.layer[3].attention.output.dense.weight
    assert torch.equal(named.distilbert.transformer.layer[1].attention.out_lin.weight, theirs)


def test_names_of_berts_first_file_are_understood(bert, tmp_path):
    model, folder = bert
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    assert any("gamma" in name for name in old)
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    student = build("masked-lm", init_from=str(tmp_path), init_layers="all")
    theirs = dict(model.named_parameters())
    for name, value in student.named_parameters():
        assert torch.equal(value, theirs[name][tuple(map(slice, value.shape))]), name


@pytest.mark.parametrize(("kind", "known"), [("bert", 40), ("roberta", 38)])
def test_rows_longer_than_what_the_start_can_read_are_refused(kind, known, request):
    _, folder = request.getfixturevalue(kind)
    longer = replace(spec(preset="distilbert", layers=2, init_from=str(folder)), max_length=known)
    assert build_student("transformer", longer).config.max_position_embeddings == known
    with pytest.raises(StudentError, match=f"reads up to {known} tokens, .* may have {known + 1}: dump them with"):
        build_student("transformer", replace(longer, max_length=known + 1))


# ------------------------------------------------------------------------------------------------- a model's head


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_masked_language_model_starts_with_its_teachers_head(kind, request):
    model, folder = request.getfixturevalue(kind)
    kinds = {"type_vocab_size": model.config.type_vocab_size}
    wanted = replace(spec("masked-lm", init_from=str(folder), init_layers=[1, 2, 3, 4]), teacher_config=kinds)
    student: Any = build_student("transformer", wanted)
    with torch.inference_mode():
        own = student.eval()(**batch().model_inputs()).logits
        theirs = model(**batch().model_inputs()).logits[..., :VOCABULARY]
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-4)
    options = {"init_from": str(folder), "init_head": False}
    new: Any = build_student("transformer", replace(wanted, options=options))
    assert not new.get_output_embeddings().bias.any()
    assert theirs.std() > 1


def test_a_classifiers_head_is_copied_only_where_it_is_asked_for(tmp_path):
    names = {0: "no", 1: "yes", 2: "maybe"}
    torch.manual_seed(3)
    model: Any = BertForSequenceClassification(BertConfig(**SIZES, id2label=names)).eval()
    model.save_pretrained(tmp_path)
    student = build(init_from=str(tmp_path), init_layers="all", init_head=True)
    with torch.inference_mode():
        own, theirs = (each.eval()(**batch().model_inputs()).logits for each in (student, model))
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)
    without = build(init_from=str(tmp_path), init_layers="all")
    assert not torch.equal(without.classifier.weight, model.classifier.weight)
    other = replace(spec(init_from=str(tmp_path), init_head=True), label_names=["a", "b", "c"])
    with pytest.raises(StudentError, match="has the classes no, yes, maybe, the cache a, b, c"):
        build_student("transformer", other)


def test_a_classifier_gives_a_language_model_no_head(tmp_path):
    torch.manual_seed(3)
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    student = build("masked-lm", init_from=str(tmp_path))
    assert not student.cls.predictions.bias.any()
    with pytest.raises(StudentError, match=r"has no tensor 'cls\.predictions\.bias'"):
        build("masked-lm", init_from=str(tmp_path), init_head=True)


# ------------------------------------------------------------------------------------------- presets and heads


@pytest.mark.parametrize(
    ("preset", "millions", "sizes"),
    [
        ("distilbert", 66.4, (6, 768, 12, 3072)),  # 66 million in the paper
        ("tinybert-4", 14.4, (4, 312, 12, 1200)),  # 14.5
        ("tinybert-6", 67.0, (6, 768, 12, 3072)),  # 67.0
        ("minilm-6", 22.7, (6, 384, 12, 1536)),  # 22
        ("minilm-12", 33.4, (12, 384, 12, 1536)),  # 33
        ("mobilebert", 24.6, (24, 512, 4, 512)),  # 25.3 with its language model's head
        ("mobilebert-tiny", 15.5, (24, 512, 4, 512)),  # 15.1
        ("mobilebert-teacher", 332.0, (24, 512, 4, 4096)),  # 293: see presets
        ("bert-base", 109.5, (12, 768, 12, 3072)),  # 110
        ("bert-mini", 11.2, (4, 256, 4, 1024)),  # 11.3
    ],
)
def test_a_preset_has_the_sizes_of_its_paper(preset, millions, sizes):
    asked = replace(spec(preset=preset), vocab_size=30522, max_length=512)
    asked = replace(asked, teacher_config={"model_type": "distilbert", "n_heads": 12, "type_vocab_size": 2})
    config = read_shape(asked).config
    with torch.device("meta"):
        body = AutoModel.from_config(config)
    assert sum(value.numel() for value in body.parameters()) / 1e6 == pytest.approx(millions, abs=0.15)
    feed_forward = getattr(config, "hidden_dim", getattr(config, "intermediate_size", None))
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, feed_forward) == sizes


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_small(preset):
    small = {"layers": 2, "hidden_size": 32, "intermediate_size": 20}
    mobile = {"embedding_size": 8, "intra_bottleneck_size": 16} if "mobile" in preset else {}
    heads = {"heads": 4} if preset in ("bert-base", "distilbert") else {}
    for task in ("sequence-classification", "masked-lm"):
        student = build(task, preset=preset, **small, **mobile, **heads)
        assert student.config.num_hidden_layers == 2
        logits = student(**student_inputs(student, batch())).logits
        assert logits.shape == ((3, 3) if task == "sequence-classification" else (3, 12, VOCABULARY))


def test_a_preset_gives_way_under_any_name_of_an_option(tmp_path):
    assert build(preset="distilbert", dim=32, n_heads=2, n_layers=1, hidden_dim=8).config.hidden_dim == 8
    config = build(preset="tinybert-4", num_hidden_layers=1, hidden_size=32, num_attention_heads=8).config
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (1, 8, 1200)


def test_heads_are_the_teachers(tmp_path):
    assert build(preset="minilm-6", layers=1, hidden_size=32).config.num_attention_heads == 4
    assert build(heads="teacher", hidden_size=64).config.num_attention_heads == 4
    config = {"model_type": "distilbert", "n_heads": 8}
    student = build_student("transformer", replace(spec(heads="teacher", hidden_size=64), teacher_config=config))
    assert student.config.num_attention_heads == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "tinybert4"}, r"no preset 'tinybert4': there are .*Did you mean 'tinybert-4'\?"),
        ({"preset": ["mobilebert"]}, "no preset"),
        ({"preset": "minilm-6", "hidden_size": 30}, "30 can't be split into 4 heads: give hidden_size 28 or 32"),
        ({"model_type": "distilbert", "dim": 30, "heads": 7}, "give hidden_size 28 or 35"),
        (
            {"preset": "mobilebert", **MOBILE, "intra_bottleneck_size": 18},
            "18 can't be split into 4 heads: give intra_bottleneck_size 16 or 20",
        ),
        ({"preset": "tinybert-4", "config": "/nowhere"}, "already said by the config.json"),
        ({"hidden_dim": 8, "intermediate_size": 8, "model_type": "distilbert"}, "given twice"),
        ({"init_head": True}, "'init_head' is about a teacher's weights"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(options, message):
    with pytest.raises(StudentError, match=message):
        build(**options)


def test_a_teacher_of_unknown_heads_is_asked_for_a_number():
    with pytest.raises(StudentError, match="doesn't say how many heads the teacher has: give a number"):
        build_student("transformer", replace(spec(preset="tinybert-4"), teacher_config={}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_layers": "odd"}, "none of the words first, spread, all, none"),
        ({"init_layers": "spread", "layers": 5}, "5 layers can't be spread over a teacher of 4"),
        ({"init_layers": "all", "layers": 2}, "2 layers can't start from the 4 layers"),
        ({"init_head": "yes"}, "'init_head' is true or false"),
        ({"model_type": "mobilebert"}, "is a 'bert': give model_type: bert or distilbert"),
        ({"preset": "tinybert-4"}, r"has shape \[64, 16\], the student's \[60, 312\]"),
    ],
)
def test_a_start_that_cannot_be_is_refused(bert, options, message):
    with pytest.raises(StudentError, match=message):
        build(init_from=str(bert[1]), **options)


# ----------------------------------------------------------------------------------------------------- MobileBERT


def mobile(which: str, **options: Any) -> Any:
    return build(preset=which, **MOBILE | options)


def test_mobilebert_and_its_teacher_are_what_the_paper_says():
    student, teacher = mobile("mobilebert"), mobile("mobilebert-teacher", intra_bottleneck_size=64)
    assert (student.config.normalization_type, student.config.hidden_act) == ("no_norm", "relu")
    assert (teacher.config.normalization_type, teacher.config.hidden_act) == ("layer_norm", "gelu")
    own, theirs = student.mobilebert.encoder.layer[0], teacher.mobilebert.encoder.layer[0]
    assert (len(own.ffn), hasattr(theirs, "ffn")) == (3, False)  # of the four, three lie before the last
    assert own.attention.self.query.weight.shape == (16, 16)
    assert (theirs.attention.self.query.weight.shape, theirs.attention.self.value.weight.shape) == ((64, 64), (64, 32))
    assert student.mobilebert.embeddings.embedding_transformation.in_features == 24  # three tokens
    shapes = [[s.shape[1] for s in hidden_states(model, batch())] for model in (student, teacher)]
    assert shapes == [[32] * 4, [32] * 4]  # feature maps compare as they are


def test_a_mobilebert_takes_its_teachers_embeddings_and_classifier_and_no_layer(tmp_path):
    teacher = mobile("mobilebert-teacher", intra_bottleneck_size=64)
    nn.init.normal_(teacher.classifier.bias)
    teacher.save_pretrained(tmp_path)
    student = mobile("mobilebert", init_from=str(tmp_path), init_layers="none", init_head=True)
    assert (student.config.normalization_type, student.config.true_hidden_size) == ("no_norm", 16)
    own, theirs = student.state_dict(), teacher.state_dict()
    copied = {name for name in own.keys() & theirs if torch.equal(own[name], theirs[name])}
    assert {name for name in own if ".embeddings." in name or "classifier" in name} <= copied
    assert "mobilebert.encoder.layer.0.attention.self.value.weight" not in copied
    student.save_pretrained(tmp_path / "student")
    again = load_student("transformer", tmp_path / "student")
    assert torch.equal(again(**batch().model_inputs()).logits, student.eval()(**batch().model_inputs()).logits)


def test_a_mobilebert_language_model_predicts_at_its_targets_only(bert):
    student = build("masked-lm", preset="mobilebert", **MOBILE).eval()
    tokens, targets = batch(), torch.zeros(3, 12, dtype=torch.bool)
    targets[0, 3] = targets[2, 7] = True
    whole = student(**tokens.model_inputs()).logits
    with only_targets(student, targets) as seen:
        narrow = student(**tokens.model_inputs()).logits
    assert seen[0].shape == (2, 32)
    torch.testing.assert_close(narrow, whole[targets])
    with pytest.raises(TeacherError, match="capture vocab:topk=64 instead"):
        keep_head(student, seen[0], narrow, vocab_size=VOCABULARY)


# ------------------------------------------------------------------------- what the training loop takes of students


STUDENTS: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 32, "heads": 4, "layers": 3},
    "distilbert": {"preset": "distilbert", "hidden_size": 32, "heads": 4, "layers": 3, "intermediate_size": 20},
    "tinybert": {"preset": "tinybert-4", "hidden_size": 24, "layers": 3, "intermediate_size": 20},
    "mobilebert": {"preset": "mobilebert", **MOBILE},
    "mobilebert-teacher": {"preset": "mobilebert-teacher", **MOBILE | {"intra_bottleneck_size": 64}},
}


@pytest.mark.parametrize("task", ["sequence-classification", "masked-lm"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_a_students_signals_equal_eager_attention_and_have_gradients(kind, task):
    options = STUDENTS[kind] | {"initializer_range": 0.1}
    tokens = batch()
    eager = build(task, **options).eval()
    eager.set_attn_implementation("eager")
    inputs = student_inputs(eager, tokens)
    with torch.no_grad():
        wanted = eager(**inputs, output_hidden_states=True, output_attentions=True)
    student = build(task, **options).train()  # as a loop has it: it is probed without dropout all the same
    requests = parse_captures(["hidden:all", "qkv:all", "attention:all", "attention:all@scores"])
    run = prepare(student, requests, _Fitting(student, tokens))
    assert student.training
    assert (run.tapped, len(wanted.attentions)) == (True, 3)
    student.eval()
    signals = run.take(_Fitting(student, tokens), gradients=True)
    real = tokens.attention_mask.bool()
    pairs = real[:, None, :, None] & real[:, None, None, :]
    for layer, states in enumerate(wanted.hidden_states):
        torch.testing.assert_close(signals[f"hidden.{layer:02d}"][real], states[real], atol=1e-5, rtol=1e-4)
    for layer, maps in enumerate(wanted.attentions, start=1):
        where = pairs.expand_as(maps)
        name = f"attention.{layer:02d}"
        torch.testing.assert_close(signals[name][where], maps[where], atol=1e-5, rtol=0)
        torch.testing.assert_close(signals[f"{name}@scores"].softmax(-1)[where], maps[where], atol=1e-5, rtol=0)
        query, key = (
            signals[f"{part}.{layer:02d}"].unflatten(-1, (maps.shape[1], -1)).transpose(1, 2)
            for part in ("query", "key")
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        torch.testing.assert_close(scores[where], signals[f"{name}@scores"][where], atol=1e-4, rtol=1e-4)
        assert (signals[f"{name}@scores"][~pairs.expand_as(maps) & real[:, None, :, None]] == MASKED).all()
    for name, signal in signals.items():
        reached = torch.autograd.grad(
            signal[signal > MASKED].square().sum(), list(student.parameters()), retain_graph=True, allow_unused=True
        )
        assert any(value is not None and value.any() for value in reached), name


class _Fitting:
    """A batch without the token types that its model doesn't take."""

    def __init__(self, model: PreTrainedModel, tokens: TokenBatch) -> None:
        self.inputs, self.attention_mask = student_inputs(model, tokens), tokens.attention_mask

    def model_inputs(self) -> dict[str, Tensor]:
        return self.inputs


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_layerwise_loss_moves_all_that_lies_below(kind):
    """MSE of the last scores and hidden state: a step lowers it, and embeddings and every layer have a gradient."""
    student = build(**STUDENTS[kind] | {"initializer_range": 0.1}).eval()
    tokens = _Fitting(student, batch())
    run = prepare(student, parse_captures(["hidden:3", "attention:3@scores"]), tokens)
    targets = {name: torch.randn_like(value) for name, value in run.take(tokens).items()}
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        signals = run.take(tokens, gradients=True)
        loss = torch.stack(
            [(value - targets[name])[value > MASKED].square().mean() for name, value in signals.items()]
        ).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = [
        name for name, value in student.base_model.named_parameters() if value.grad is None or not value.grad.any()
    ]
    # a key's bias adds the same to all scores of a row's mean, not to each; poolers lie above what is compared
    assert [name for name in still if "pooler" not in name] == []


# ---------------------------------------------------------------------------------------------- saved and loaded


def record(**changes: Any) -> RunRecord:
    settings: dict[str, Any] = {
        "student": "transformer",
        "options": {},
        "label_names": [],
        "task": "masked-lm",
        "max_length": LONGEST,
        "losses": {"kl": 1.0},
        "temperature": "2",
        "seed": 0,
        "epochs_run": 1,
        "best_epoch": 1,
        "train_seconds": 1.0,
        "train_rows": 10,
        "labelled_rows": 0,
        "validation": {},
        "cache": {},
        "versions": {},
    }
    return RunRecord(**settings | changes)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_run_of_a_language_model_starts_a_classifier(kind, tmp_path):
    first = build("masked-lm", **STUDENTS[kind])
    with torch.no_grad():
        for value in first.parameters():
            value.add_(0.01 * torch.randn_like(value))  # as if it had learnt something
    save_run(tmp_path / "run", first, record(), tokenizer=tiny_tokenizer())
    second = build(init_from=str(tmp_path / "run"))  # without a word on layers: all of a run's
    assert second.config.num_hidden_layers == 3
    for own, theirs in zip(hidden_states(second, batch()), hidden_states(first, batch()), strict=True):
        assert torch.equal(own, theirs)
    same = build(init_from=str(tmp_path / "run"), **STUDENTS[kind])  # a recipe's second phase says the shape again
    assert same.config.to_dict() == second.config.to_dict()
    both = hidden_states(same, batch()), hidden_states(first, batch())
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def test_saved_students_load_without_softlabels(tmp_path):
    """In one fresh interpreter that refuses to import softlabels."""
    tokens, expected = batch(), {}
    for kind, options in STUDENTS.items():
        for task in ("sequence-classification", "masked-lm"):
            student = build(task, **options).eval()
            student.save_pretrained(tmp_path / task / kind)
            inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
            expected[f"{task}/{kind}"] = student(**inputs).logits.double().sum(-1).tolist()
    code = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'softlabels':
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
folder, given = sys.argv[1], json.loads(sys.argv[2])
inputs = {name: torch.tensor(value) for name, value in given['inputs'].items()}
kinds = {'sequence-classification': AutoModelForSequenceClassification, 'masked-lm': AutoModelForMaskedLM}
said = {}
for name in given['names']:
    model, info = kinds[name.split('/')[0]].from_pretrained(f'{folder}/{name}', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'], info
    said[name] = model.eval()(**inputs).logits.double().sum(-1).tolist()
assert not [name for name in sys.modules if name.startswith('softlabels')]
print(json.dumps(said))
"""
    given = {
        "inputs": {"input_ids": tokens.input_ids.tolist(), "attention_mask": tokens.attention_mask.tolist()},
        "names": list(expected),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), json.dumps(given)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.keys() == expected.keys()
    for name, logits in expected.items():
        np.testing.assert_allclose(said[name], logits, rtol=1e-6, atol=1e-6, err_msg=name)
