"""Captures against the model itself: what is taken equals what transformers' eager attention and outputs give."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LongformerConfig, LongformerForSequenceClassification

from softlabels.captures import TeacherRun, parse_captures, prepare
from softlabels.errors import ConfigError, TeacherError
from softlabels.types import MASKED, Signals, TokenBatch
from tests.captures.architectures import BYPASSING, NORMALISED, SMALL, TAPPED, batch_of, eager, model_of, real_tokens

# ------------------------------------------------------------------------------------------- every architecture


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
@pytest.mark.parametrize("kind", [*TAPPED, *BYPASSING])
def test_probabilities_hidden_states_and_logits_equal_the_models_own(kind: str, ragged: bool) -> None:
    batch = batch_of(kind, ragged=ragged)
    wanted = eager(model_of(kind), batch)
    asked = ["hidden:all", "attention:all"] + ([] if kind == "t5-encoder" else ["logits"])
    run = prepare(model_of(kind), parse_captures(asked), batch)
    assert (run.tapped, run.eager_maps) == (kind in TAPPED, kind in BYPASSING)
    values = run.take(batch)
    if kind != "t5-encoder":
        assert torch.allclose(values["logits"], wanted.logits, atol=1e-5, rtol=1e-5)
    hidden_states = wanted.get("encoder_hidden_states", wanted.get("hidden_states"))
    maps = wanted.get("encoder_attentions", wanted.get("attentions"))
    assert (len(hidden_states), len(maps)) == (4, 3)
    real = real_tokens(batch, maps[0].shape[-1])
    pairs = (real[:, None, :, None] & real[:, None, None, :]).expand_as(maps[0])
    for layer, states in enumerate(hidden_states):
        assert torch.allclose(values[f"hidden.{layer:02d}"][real], states[real], atol=1e-5, rtol=1e-4)
    for layer, eager_maps in enumerate(maps, start=1):
        assert torch.allclose(values[f"attention.{layer:02d}"][pairs], eager_maps[pairs], atol=1e-5, rtol=0)
        assert eager_maps[pairs].std() > 0.01  # far from uniform, or this would show little


@pytest.mark.parametrize("kind", TAPPED)
def test_scores_are_those_that_eager_attention_puts_into_its_softmax(kind: str) -> None:
    """Up to a constant a query they are the logarithms of its maps, and masked where these are 0."""
    batch = batch_of(kind)
    maps = eager(model_of(kind), batch)
    maps = maps.get("encoder_attentions", maps.get("attentions"))
    values = prepare(model_of(kind), parse_captures(["attention:all@scores"]), batch).take(batch)
    rows, queries = real_tokens(batch, maps[0].shape[-1]).nonzero(as_tuple=True)
    for layer, eager_maps in enumerate(maps, start=1):
        scores = values[f"attention.{layer:02d}@scores"][rows, :, queries]  # (real queries, H, L)
        wanted = eager_maps[rows, :, queries]
        assert torch.equal(scores > MASKED / 2, wanted > 0)
        assert set(scores[wanted == 0].tolist()) <= {MASKED}
        off = scores.log_softmax(-1) - wanted.log()
        assert off[wanted > 1e-6].abs().max() < 1e-3


@pytest.mark.parametrize("kind", sorted({*TAPPED, *BYPASSING} - {"albert"}))  # whose layers are one module
def test_the_final_norm_of_the_last_hidden_state_is_where_the_documentation_says(kind: str) -> None:
    model, batch = model_of(kind), batch_of(kind)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3)
    raw: list[torch.Tensor | tuple[torch.Tensor]] = []
    layers[-1].register_forward_hook(lambda module, args, output: raw.append(output))
    last = prepare(model, parse_captures(["hidden:3"]), batch).take(batch)["hidden.03"]
    output = raw[0][0] if isinstance(raw[0], tuple) else raw[0]
    assert torch.allclose(output, last, atol=1e-4) == (kind not in NORMALISED)


# ----------------------------------------------------------------------------------------------------- attention


def test_stored_queries_and_keys_give_the_maps() -> None:
    batch = batch_of()
    run = prepare(model_of("bert"), parse_captures(["qkv:2", "attention:2"]), batch)
    values = run.take(batch)
    query, key = (values[f"{part}.02"].unflatten(2, (4, 8)).transpose(1, 2) for part in ("query", "key"))
    scores = query @ key.transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(real_tokens(batch, 9)[:, None, None, :].logical_not(), -torch.inf)
    assert torch.allclose(scores.softmax(-1), values["attention.02"], atol=1e-6)


def test_grouped_keys_are_stored_as_they_are_and_values_give_the_output() -> None:
    batch, model = batch_of(), model_of("llama")
    mixed: list[torch.Tensor] = []
    model.get_submodule("model.layers.0.self_attn.o_proj").register_forward_pre_hook(
        lambda module, args: mixed.append(args[0])
    )
    run = prepare(model, parse_captures(["qkv:1", "attention:1"]), batch)
    fields = run.fields(batch, codec="float16")
    assert (fields["query.01"].heads, fields["key.01"].heads, fields["value.01"].heads) == (4, 2, 2)
    values = run.take(batch)
    assert values["key.01"].shape == (3, 9, 16)
    value = values["value.01"].unflatten(2, (2, 8)).transpose(1, 2).repeat_interleave(2, dim=1)
    rebuilt = (values["attention.01"] @ value).transpose(1, 2).flatten(2)
    real = real_tokens(batch, 9)
    assert torch.allclose(rebuilt[real], mixed[-1][real], atol=1e-5)


def test_layers_of_one_model_have_windows_of_their_own() -> None:
    batch = batch_of("gemma2", ragged=False)
    run = prepare(model_of("gemma2"), parse_captures(["attention:1,2@scores"]), batch)
    values = run.take(batch)
    behind = torch.arange(9)[:, None] - torch.arange(9)  # query position - key position
    for field, met in (("attention.01@scores", (behind >= 0) & (behind < 4)), ("attention.02@scores", behind >= 0)):
        assert torch.equal(values[field] != MASKED, met.expand(3, 4, 9, 9))
        assert values[field][:, :, met].abs().max() <= 2.0  # the soft cap


def test_scores_and_probabilities_are_fields_of_their_own() -> None:
    batch = batch_of()
    run = prepare(model_of("bert"), parse_captures(["attention:3", "attention:3@scores"]), batch)
    fields = run.fields(batch, codec="float16")
    assert {name: (spec.kind, spec.width) for name, spec in fields.items()} == {
        "attention.03": ("pair", 4),
        "attention.03@scores": ("pair", 4),
    }
    values = run.take(batch)
    half = values["attention.03@scores"].half()  # every codec can hold what is masked
    assert half.isfinite().all()
    assert torch.allclose(half.float().softmax(-1), values["attention.03"], atol=2e-2)
    with pytest.raises(ConfigError, match="int8"):
        run.fields(batch, codec="int8")


def test_signals_mask_scores_and_give_probabilities_from_them() -> None:
    batch = batch_of()
    assert isinstance(batch, TokenBatch)
    run = prepare(model_of("bert"), parse_captures(["attention:3", "attention:3@scores"]), batch)
    values = run.take(batch)
    padded = values["attention.03@scores"].masked_fill(batch.attention_mask[:, None, None, :] == 0, 0.0)  # as read back
    signals = Signals({"attention.03@scores": padded}, batch.attention_mask, batch.labels)
    assert torch.equal(signals.attention_scores(3), values["attention.03@scores"])
    assert torch.allclose(signals.attention_probs(3), values["attention.03"], atol=1e-6)
    assert torch.equal(Signals(values, batch.attention_mask, batch.labels).attention_probs(3), values["attention.03"])


@pytest.mark.parametrize("kind", BYPASSING)
def test_a_model_outside_the_interface_says_what_it_can_give(kind: str) -> None:
    why = "sinks" if kind == "gpt_oss" else "bypasses"
    for capture, what in (("qkv:3", "Q, K and V"), ("attention:3@scores", "attention scores")):
        with pytest.raises(TeacherError, match=rf"{why}.*{what}.*capture attention:LAYERS"):
            prepare(model_of(kind), parse_captures([capture]), batch_of(kind))


def test_a_model_without_maps_says_so() -> None:
    """Longformer's maps are windows."""
    model = LongformerForSequenceClassification(LongformerConfig(**SMALL, attention_window=4)).eval()
    with pytest.raises(TeacherError, match="no map of every token"):
        prepare(model, parse_captures(["attention:1"]), batch_of())
    with pytest.raises(TeacherError, match="capture hidden:LAYERS instead"):
        prepare(model, parse_captures(["qkv:1"]), batch_of())


def test_an_attention_of_its_own_is_not_misread() -> None:
    """A model that changes what its eager attention does with Q and K: the maps are taken, Q and K refused."""
    model, batch = model_of("bert"), batch_of()
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.register_forward_pre_hook(_sharper)
    run = prepare(model, parse_captures(["attention:1"]), batch)
    assert run.eager_maps
    with pytest.raises(TeacherError, match="no function of Q and K alone"):
        prepare(model, parse_captures(["qkv:1"]), batch)


def _sharper(module, args) -> None:
    module.scaling = 0.5 if module.config._attn_implementation == "eager" else 0.25


# ------------------------------------------------------------------------------------------------- states a row


def test_states_a_row_are_the_first_tokens_or_the_mean() -> None:
    batch = batch_of()
    run = prepare(model_of("bert"), parse_captures(["hidden:0,3@cls", "hidden:3@mean", "hidden:3"]), batch)
    fields = run.fields(batch, codec="float32")
    assert {name: spec.kind for name, spec in fields.items()} == {
        "hidden.00@cls": "row",
        "hidden.03@cls": "row",
        "hidden.03@mean": "row",
        "hidden.03": "token",
    }
    values = run.take(batch)
    assert torch.equal(values["hidden.03@cls"], values["hidden.03"][:, 0])
    for row, length in enumerate([9, 4, 7]):
        mean = values["hidden.03"][row, :length].double().mean(0)
        assert torch.allclose(values["hidden.03@mean"][row].double(), mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "albert", "ernie", "mobilebert"])
def test_pooled_is_what_the_head_reads(kind: str) -> None:
    batch, model = batch_of(), model_of(kind)
    run = prepare(model, parse_captures(["pooled", "logits"]), batch)
    assert run.fields(batch, codec="float16")["pooled"].kind == "row"
    values = run.take(batch)
    assert torch.allclose(model.get_submodule("classifier")(values["pooled"]), values["logits"], atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5-encoder"])
def test_pooled_of_a_model_without_a_head_is_the_mean(kind: str) -> None:
    batch = batch_of()
    run = prepare(model_of(kind, body=True), parse_captures(["pooled", "hidden:3", "hidden:3@mean"]), batch)
    values = run.take(batch)
    assert torch.equal(values["pooled"], values["hidden.03@mean"])
    first = prepare(model_of(kind, body=True), parse_captures(["pooled"]), batch, pooling="cls").take(batch)
    assert torch.allclose(first["pooled"], values["hidden.03"][:, 0], atol=1e-6)


def test_a_model_without_a_pooler_or_a_head_says_so() -> None:
    batch = batch_of()
    with pytest.raises(TeacherError, match="no pooler: capture hidden:LAYER@cls"):
        prepare(model_of("roberta"), parse_captures(["pooled"]), batch).fields(batch, codec="float32")
    with pytest.raises(TeacherError, match=r"no head.*capture pooled"):
        prepare(model_of("bert", body=True), parse_captures(["logits"]), batch).fields(batch, codec="float32")


# --------------------------------------------------------------------------------------------------- the request


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("logit", "Did you mean 'logits'"),
        ("hidden", "say which layers"),
        ("hidden:", "say which layers"),
        ("hidden:@cls", "say which layers"),
        ("hidden:x", "is no layer"),
        ("hidden:3-1", "empty range"),
        ("hidden:3@max", "hidden:LAYERS@cls, hidden:LAYERS@mean"),
        ("hidden:3@", "behind an @"),
        ("qkv:3@cls", "behind an @ there are"),
        ("attention:3@cls", "attention:LAYERS@scores"),
        ("logits:3", "takes no layers"),
        ("pooled:3", "takes no layers"),
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
    assert isinstance(run, TeacherRun) and not run.tapped and not run.wants("hidden")
