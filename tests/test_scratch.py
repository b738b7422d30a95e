"""Teachers from nothing: a shape and a tokenizer are enough, and what is missing is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, RobertaConfig
from typer.testing import CliRunner

from softlabels.cli import app
from softlabels.config import TeacherTraining
from softlabels.corpus import Corpus
from softlabels.errors import ConfigError, TeacherError
from softlabels.scratch import build_blank, find_blank
from softlabels.students.presets import PRESETS
from softlabels.teacher import TeacherOptions, load_teacher, train_teacher
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher, tiny_tokenizer

SMALL: dict[str, Any] = {
    "layers": 2,
    "hidden_size": 32,
    "embedding_size": 16,
    "intra_bottleneck_size": 64,
    "intermediate_size": 64,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer and nothing else."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def corpus(rows: int = len(TEXTS)) -> Corpus:
    examples = [Example(str(i), text, None, label) for i, (text, label) in enumerate(TEXTS[:rows])]
    return Corpus("rows", None, examples, LABEL_NAMES)


def scratch(reader: str | None, **changes: Any) -> TeacherOptions:
    options = TeacherOptions(epochs=1, lr=2e-3, batch_size=8, device="cpu", from_scratch=True, tokenizer=reader)
    return replace(options, **changes)


def test_mobileberts_teacher_learns_from_nothing(reader, tmp_path):
    options = scratch(reader, epochs=12, options=SMALL, lr=3e-3)
    report = train_teacher(corpus(), model="mobilebert-teacher", out=tmp_path / "out", options=options)
    assert report.epochs[-1].train_loss < 0.5 * report.epochs[0].train_loss
    teacher = load_teacher(str(tmp_path / "out"), device="cpu")
    config = teacher.model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("mobilebert", 32, 2)
    assert (config.normalization_type, config.intra_bottleneck_size) == ("layer_norm", 64)
    assert (config.max_position_embeddings, config.vocab_size) == (512, len(tiny_tokenizer()))
    assert teacher.label_names == LABEL_NAMES
    assert train_teacher(corpus(), model="mobilebert-teacher", out=tmp_path / "out", options=options).reused
    for change in ({"options": SMALL | {"layers": 3}}, {"seed": 1}):
        with pytest.raises(TeacherError, match=r"holds a teacher that differs in (model|seed)"):
            train_teacher(
                corpus(), model="mobilebert-teacher", out=tmp_path / "out", options=replace(options, **change)
            )


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_a_folder_with_a_config_and_a_tokenizer_is_enough(kind, tmp_path):
    config = kind(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    config.save_pretrained(tmp_path / "shape")
    tiny_tokenizer().save_pretrained(tmp_path / "shape")
    plain = replace(scratch(None), from_scratch=False)
    with pytest.raises(TeacherError, match="no weights in safetensors: to start from random ones, give --from-scratch"):
        train_teacher(corpus(), model=str(tmp_path / "shape"), out=tmp_path / "out", options=plain)
    train_teacher(corpus(), model=str(tmp_path / "shape"), out=tmp_path / "out", options=scratch(None))
    teacher = load_teacher(str(tmp_path / "out"), device="cpu")
    assert (teacher.model.config.hidden_size, teacher.model.config.vocab_size) == (16, len(tiny_tokenizer()))
    assert teacher.model.config.max_position_embeddings == 512


def test_weights_that_are_there_are_not_looked_at(tmp_path):
    folder = save_teacher(tmp_path / "teacher", seed=5)
    torch.manual_seed(0)
    network: Any = build_blank(find_blank(str(folder), tokenizer=None, options={}), LABEL_NAMES)
    old: Any = load_teacher(str(folder), device="cpu").model
    assert network.config.hidden_size == old.config.hidden_size
    assert not torch.equal(
        network.bert.encoder.layer[0].output.dense.weight, old.bert.encoder.layer[0].output.dense.weight
    )


def test_the_identity_is_that_of_shape_and_tokenizer(reader, tmp_path):
    other = tiny_tokenizer()
    other.add_tokens(["one-more"])
    other.save_pretrained(tmp_path)
    same, again, larger, sized, named = (
        find_blank(model, tokenizer=tokenizer, options=options).identity
        for model, tokenizer, options in (
            ("bert-mini", reader, {}),
            ("bert-mini", reader, {}),
            ("bert-mini", str(tmp_path), {}),
            ("bert-mini", reader, {"layers": 1}),
            ("bert-tiny", reader, {}),
        )
    )
    assert same == again
    assert len({same, larger, sized, named}) == 4


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_teachers_shape_too(preset, reader):
    sizes = {key: value for key, value in SMALL.items() if "mobile" in preset or key in ("layers", "intermediate_size")}
    sizes |= {"hidden_size": 48}
    network = build_blank(find_blank(preset, tokenizer=reader, options=sizes), LABEL_NAMES)
    assert network.config.num_hidden_layers == 2
    assert network.config.id2label == dict(enumerate(LABEL_NAMES))
    if preset in ("tinybert-4", "minilm-6"):
        assert network.config.num_attention_heads == 12


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("mobilebert-techer", {}, r"is neither\. Did you mean 'mobilebert-teacher'\?"),
        ("/nowhere", {}, "needs a folder with a config.json, or one of bert-tiny"),
        ("bert-mini", {"tokenizer": None}, "'bert-mini' is a shape only: give --tokenizer"),
        (
            "bert-mini",
            {"options": {"layrs": 2}},
            r"--from-scratch: a 'bert' has no option 'layrs'\. Did you mean 'layers'",
        ),
        ("bert-mini", {"options": {"vocab_size": 2}}, "'vocab_size' can't be chosen"),
        ("bert-mini", {"options": {"hidden_size": 30}}, "30 can't be split into 4 heads: give hidden_size 28 or 32"),
        (
            "bert-mini",
            {"from_scratch": False, "tokenizer": None},
            "is a shape, not a trained model: give --from-scratch",
        ),
    ],
)
def test_what_cannot_be_a_beginning_is_refused(model, changes, message, reader, tmp_path):
    with pytest.raises(TeacherError, match=message):
        train_teacher(corpus(), model=model, out=tmp_path / "out", options=replace(scratch(reader), **changes))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_from_scratch_is_refused(reader):
    with pytest.raises(ConfigError, match="give --from-scratch, or leave them out"):
        replace(scratch(reader), from_scratch=False)


def test_recipes_say_it_too(reader):
    said = TeacherTraining.model_validate({"from_scratch": True, "tokenizer": reader, "options": {"layers": 2}})
    options = TeacherOptions(**said.model_dump(exclude={"rows"}))
    assert (options.from_scratch, options.tokenizer, options.options) == (True, reader, {"layers": 2})


def test_the_command_line(reader, tmp_path: Path):
    rows = "\n".join(f'"{text}",{label}' for text, label in TEXTS)
    (tmp_path / "train.csv").write_text(f"text,label\n{rows}\n")
    sizes = [part for size in ("layers=1", "hidden_size=16", "heads=2") for part in ("--option", size)]
    given = ["train-teacher", str(tmp_path / "train.csv"), "--model", "bert-tiny", "--tokenizer", reader, *sizes]
    more = ["--out", str(tmp_path / "out"), "--epochs", "1", "--cpu", "--json"]
    done = CliRunner().invoke(app, [*given, "--from-scratch", *more])
    assert done.exit_code == 0, done.output
    assert load_teacher(str(tmp_path / "out"), device="cpu").model.config.hidden_size == 16
