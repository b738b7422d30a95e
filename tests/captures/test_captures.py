"""Captures against the model itself: what is taken equals what transformers' eager attention and outputs give."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from softlabels.captures import TeacherRun, parse_captures, prepare
from softlabels.captures.attention_tap import Tap, tap
from softlabels.errors import ConfigError, TeacherError
from softlabels.types import TokenBatch

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "bert": {},
    "roberta": {"max_position_embeddings": 66},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "camembert": {},
    "xlm-roberta": {},
    "ernie": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
}


def model_of(kind: str, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SMALL | ARCHITECTURES.get(kind, {}) | changes))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():  # wide weights, so that attention is far from uniform
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def batch_of(*, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = [9, 4, 7]
    ids = torch.randint(5, 50, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    return TokenBatch(ids * mask, mask, None, torch.full((3,), -100))


def eager(model: PreTrainedModel, batch: TokenBatch):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**batch.model_inputs(), output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_probabilities_hidden_states_and_logits_equal_the_models_own(kind: str) -> None:
    model, batch = model_of(kind), batch_of()
    wanted = eager(model_of(kind), batch)
    run = prepare(model, parse_captures(["logits", "hidden:all", "qkv:all", "attention:all"]), batch)
    assert run.tapped
    values = run.take(batch)
    assert torch.allclose(values["logits"], wanted.logits, atol=1e-5)
    for layer, states in enumerate(wanted.hidden_states):
        real = batch.attention_mask.bool()
        assert torch.allclose(values[f"hidden.{layer:02d}"][real], states[real], atol=1e-4, rtol=1e-4)
    for layer, maps in enumerate(wanted.attentions, start=1):
        got = values[f"attention.{layer:02d}"]
        for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
            assert torch.allclose(got[row, :, :length, :length], maps[row, :, :length, :length], atol=1e-5)


def test_stored_queries_and_keys_give_the_maps() -> None:
    model, batch = model_of("bert"), batch_of()
    run = prepare(model, parse_captures(["qkv:2", "attention:2"]), batch)
    values = run.take(batch)
    query, key = (values[f"{part}.02"].unflatten(2, (4, 8)).transpose(1, 2) for part in ("query", "key"))
    scores = query @ key.transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(batch.attention_mask[:, None, None, :] == 0, -torch.inf)
    assert torch.allclose(scores.softmax(-1), values["attention.02"], atol=1e-6)


def test_grouped_keys_are_stored_as_they_are() -> None:
    batch = batch_of()
    run = prepare(model_of("llama"), parse_captures(["qkv:1"]), batch)
    fields = run.fields(batch, codec="float16")
    assert (fields["query.01"].heads, fields["key.01"].heads, fields["value.01"].heads) == (4, 2, 2)
    assert run.take(batch)["key.01"].shape == (3, 9, 16)


def test_a_model_outside_the_interface_gives_maps_but_no_keys() -> None:
    batch = batch_of()
    wanted = eager(model_of("mpnet"), batch)
    run = prepare(model_of("mpnet"), parse_captures(["attention:3"]), batch)
    assert run.eager_maps and not run.tapped
    assert torch.allclose(run.take(batch)["attention.03"][0], wanted.attentions[2][0], atol=1e-5)
    with pytest.raises(TeacherError, match="capture attention:LAYERS"):
        prepare(model_of("mpnet"), parse_captures(["qkv:3"]), batch)


def test_a_tap_sees_only_its_own_call_of_its_own_model() -> None:
    batch, first, second = batch_of(), model_of("bert"), model_of("bert")
    second.config = first.config  # one config object for both, as careless code makes them
    tap(first)
    sink = Tap()
    with torch.no_grad():
        first(**batch.model_inputs(), softlabels_tap=sink)
        assert len(sink.calls) == 3
        first(**batch.model_inputs())
        second(**batch.model_inputs())
    assert len(sink.calls) == 3
    assert second.config._attn_implementation != "softlabels_tap"


def test_gradients_flow_through_what_is_taken() -> None:
    batch, model = batch_of(), model_of("bert")
    tap(model)
    sink = Tap()
    model(**batch.model_inputs(), softlabels_tap=sink)
    sink.calls[0].query.square().sum().backward()
    weight = model.get_parameter("bert.encoder.layer.0.attention.self.query.weight")
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


def test_first_token_states_are_rows() -> None:
    batch = batch_of()
    run = prepare(model_of("bert"), parse_captures(["hidden:0,3@cls", "hidden:3"]), batch)
    fields = run.fields(batch, codec="float32")
    assert {name: spec.kind for name, spec in fields.items()} == {
        "hidden.00@cls": "row",
        "hidden.03@cls": "row",
        "hidden.03": "token",
    }
    values = run.take(batch)
    assert torch.equal(values["hidden.03@cls"], values["hidden.03"][:, 0])


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("logit", "Did you mean 'logits'"),
        ("hidden", "say which layers"),
        ("hidden:", "say which layers"),
        ("hidden:x", "is no layer"),
        ("hidden:3-1", "empty range"),
        ("hidden:3@mean", "only hidden:LAYERS@cls"),
        ("qkv:3@cls", "only hidden:LAYERS@cls"),
        ("logits:3", "take no layers"),
    ],
)
def test_a_capture_that_cannot_be_is_refused(item: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_captures([item])


@pytest.mark.parametrize(
    ("item", "there"), [("hidden:4", "0 to 3"), ("qkv:0", "1 to 3"), ("attention:2-5", "4, 5; it has 1 to 3")]
)
def test_layers_that_are_not_there_are_named(item: str, there: str) -> None:
    with pytest.raises(ConfigError, match=there):
        prepare(model_of("bert"), parse_captures([item]), batch_of())


def test_the_same_capture_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_captures(["logits", "logits"])


def test_a_run_without_attention_is_not_tapped() -> None:
    run = prepare(model_of("bert"), parse_captures(["logits"]), batch_of())
    assert isinstance(run, TeacherRun) and not run.tapped and not run.hidden_states
