"""The tap: it sees its own call of its own model, gradients flow through it, and its formulas are the written ones."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification, EncoderDecoderConfig, EncoderDecoderModel, PreTrainedModel

from softlabels.captures import parse_captures, prepare
from softlabels.captures.attention_tap import NAME, AttentionCall, Tap, tap
from softlabels.errors import ConfigError
from softlabels.types import MASKED
from tests.captures.architectures import batch_of, eager, model_of, real_tokens

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def tapped(kind: str = "bert", **changes) -> PreTrainedModel:
    model = model_of(kind, **changes)
    tap(model)
    return model


# --------------------------------------------------------------------------------------------------------- scope


@pytest.mark.parametrize("kind", ["bert", "t5", "gemma2"])
def test_a_tap_sees_only_its_own_call_of_its_own_model(kind: str) -> None:
    batch, first = batch_of(kind), model_of(kind)
    second = AutoModelForSequenceClassification.from_config(first.config).eval()  # made from one config object
    for mine, other in zip(first.modules(), second.modules(), strict=True):
        if "config" in mine.__dict__:
            other.__dict__["config"] = mine.__dict__["config"]  # and in every part of it, as careless code has it
    before = second.config._attn_implementation
    tap(first)
    sink = Tap()
    with torch.no_grad():
        wanted = first(**batch.model_inputs(), softlabels_tap=sink).logits
        seen = dict(sink.counts)
        assert seen["self"] == 3
        assert torch.equal(first(**batch.model_inputs()).logits, wanted)
        second(**batch.model_inputs())
        second(**batch.model_inputs(), softlabels_tap=Tap())
    assert sink.counts == seen
    parts = [module.config for module in second.modules() if "config" in module.__dict__]
    assert {config._attn_implementation for config in parts} == {before} != {NAME}


def test_two_tapped_models_do_not_mix() -> None:
    batch, models = batch_of(), [tapped(), tapped(seed=1)]
    sinks = [Tap(), Tap()]
    for model, sink in zip(models, sinks, strict=True):
        model(**batch.model_inputs(), softlabels_tap=sink)
    assert [len(sink.self_attention) for sink in sinks] == [3, 3]
    assert not torch.equal(sinks[0].self_attention[1].query, sinks[1].self_attention[1].query)


def test_a_copy_of_a_tapped_model_is_a_model_of_its_own() -> None:
    batch, model = batch_of(), tapped()
    twin, sink = copy.deepcopy(model), Tap()
    twin.set_attn_implementation("eager")
    model(**batch.model_inputs(), softlabels_tap=sink)
    assert len(sink.self_attention) == 3


def test_only_the_layers_asked_for_are_kept() -> None:
    sink = Tap(frozenset({3}))
    tapped()(**batch_of().model_inputs(), softlabels_tap=sink)
    assert sink.self_attention.keys() == {3} and sink.counts["self"] == 3


def test_tapping_twice_is_tapping_once() -> None:
    model, sink = tapped(), Tap()
    tap(model)
    model(**batch_of().model_inputs(), softlabels_tap=sink)
    assert sink.counts["self"] == 3


def test_a_tapped_model_saves_as_an_ordinary_one(tmp_path) -> None:
    batch, model = batch_of(), tapped()
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(**batch.model_inputs()).logits, model(**batch.model_inputs()).logits, atol=1e-6)


def test_a_tap_takes_one_forward_pass_of_the_model_itself() -> None:
    model, batch, sink = tapped(), batch_of(), Tap()
    model(**batch.model_inputs(), softlabels_tap=sink)
    with pytest.raises(ConfigError, match="one forward pass"):
        model(**batch.model_inputs(), softlabels_tap=sink)
    with pytest.raises(ConfigError, match="not to a part of it"):
        model.base_model(**batch.model_inputs(), softlabels_tap=Tap())


def test_a_pass_that_failed_closes_its_tap() -> None:
    sink = Tap()
    with pytest.raises(IndexError):
        tapped()(input_ids=torch.full((1, 3), 10_000), softlabels_tap=sink)
    assert sink.state == "closed"


# ----------------------------------------------------------------------------------------------- encoder-decoder


def test_an_encoder_decoder_has_three_kinds_of_attention() -> None:
    """What each layer sees equals eager attention's maps, and the captures take the encoder's."""
    for kind in ("t5", "bart"):
        batch = batch_of(kind)
        wanted, sink = eager(model_of(kind), batch), Tap()
        model = tapped(kind)
        with torch.no_grad():
            model(**batch.model_inputs(), softlabels_tap=sink)
        decoder_layers = len(wanted.decoder_attentions)
        assert (len(sink.self_attention), len(sink.decoder), len(sink.cross)) == (3, decoder_layers, decoder_layers)
        real = batch.attention_mask
        assert real is not None
        for calls, maps in (
            (sink.self_attention, wanted.encoder_attentions),
            (sink.decoder, wanted.decoder_attentions),
            (sink.cross, wanted.cross_attentions),
        ):
            for layer, call in calls.items():
                off = (call.probabilities() - maps[layer - 1]).abs() * real[:, None, :, None]
                assert off.max() < 1e-5


def test_a_decoder_made_from_an_encoders_parts_is_told_apart() -> None:
    parts = [model_of("bert", body=True).config for _ in range(2)]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    model = EncoderDecoderModel(config).eval()
    tap(model)
    batch, sink = batch_of(), Tap()
    ids = torch.full((3, 5), 7)
    model(**batch.model_inputs(), decoder_input_ids=ids, softlabels_tap=sink, decoder_softlabels_tap=sink)
    assert sink.counts == {"self": 3, "decoder": 3, "cross": 3}
    assert sink.cross[1].query.shape[2] == 5 and sink.cross[1].key.shape[2] == 9


# ----------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("what", ["query", "key", "value", "scores", "probabilities"])
@pytest.mark.parametrize("kind", ["bert", "gemma2", "t5"])
def test_gradients_flow_through_what_is_taken(kind: str, what: str) -> None:
    """The slope along the gradient of a weight of layer 1, of what layer 2 gives, is the difference quotient."""
    model, batch = tapped(kind), batch_of(kind)
    weight = next(p for name, p in model.named_parameters() if re.search(r"(query|q_proj|\.q)\.weight", name))

    def value() -> torch.Tensor:
        sink = Tap(frozenset({2}))
        model(**batch.model_inputs(), softlabels_tap=sink)
        taken = getattr(sink.self_attention[2], what)
        taken = taken() if callable(taken) else taken
        return torch.where(taken > MASKED / 2, taken, 0).double().square().sum()

    value().backward()
    gradient = weight.grad
    assert gradient is not None
    step = 0.002 * gradient / gradient.norm()
    with torch.no_grad():
        middle = weight.clone()
        high = (weight.copy_(middle + step), value())[1]
        low = (weight.copy_(middle - step), value())[1]
    assert (high - low).item() == pytest.approx(0.004 * gradient.norm().item(), rel=0.05)  # T5 is steep


def loss_of(model: PreTrainedModel, sink: Tap) -> torch.Tensor:
    output = model(**batch_of().model_inputs(), softlabels_tap=sink)
    call = sink.self_attention[3]
    return output.logits.square().sum() + call.probabilities().square().sum() + call.value.square().sum()


def test_checkpointed_layers_are_seen_once_and_keep_their_gradients() -> None:
    model, sink = tapped(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(), Tap()
    loss_of(model, sink).backward()
    wanted = model.get_parameter(QUERY).grad
    assert wanted is not None and bool(wanted.abs().sum() > 0)
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    sink = Tap()
    loss = loss_of(model, sink)
    before = dict(sink.self_attention)
    loss.backward()  # computes every layer again
    got = model.get_parameter(QUERY).grad
    assert got is not None and torch.allclose(got, wanted, atol=1e-6)
    assert sink.counts["self"] == 3
    assert all(sink.self_attention[layer] is call for layer, call in before.items())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused() -> None:
    model = tapped().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        model(**batch_of().model_inputs(), softlabels_tap=Tap())
    model(**batch_of().model_inputs())  # without a tap it is nobody's business
    with torch.no_grad():
        model(**batch_of().model_inputs(), softlabels_tap=Tap())  # nothing is computed again
    model.eval()(**batch_of().model_inputs(), softlabels_tap=Tap())


def test_a_run_gives_gradients_where_they_are_asked_for() -> None:
    batch, model = batch_of(), model_of("bert")
    run = prepare(model, parse_captures(["logits", "hidden:2", "qkv:3", "pooled", "hidden:1@mean"]), batch)
    assert not any(value.requires_grad for value in run.take(batch).values())
    assert all(value.requires_grad for value in run.take(batch, gradients=True).values())


def test_a_soft_cap_is_kept_where_nothing_is_taken() -> None:
    """SDPA refuses soft caps: a tapped model computes them itself, in training with dropout."""
    batch = batch_of("gemma2")
    wanted = eager(model_of("gemma2"), batch).logits
    model = tapped("gemma2", attention_dropout=0.5)
    assert torch.allclose(model(**batch.model_inputs()).logits, wanted, atol=1e-5)
    model.train()
    assert not torch.allclose(model(**batch.model_inputs()).logits, wanted, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ formulas


def reference(call: AttentionCall) -> torch.Tensor:
    """The scores from the formula, a pair at a time, in float64; -inf where a query may not look."""
    query, key = call.query.double(), call.key.double()
    rows, heads, queries, _ = query.shape
    scores = torch.full((rows, heads, queries, key.shape[2]), -math.inf, dtype=torch.float64)
    shape = scores.shape
    mask = None if call.mask is None else call.mask.expand(shape)
    bias = torch.zeros(shape) if call.position_bias is None else call.position_bias.expand(shape)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        if mask is not None and mask.dtype == torch.bool and not mask[b, h, i, j]:
            continue
        if mask is None and call.causal and j > i:
            continue
        shared = h // (heads // key.shape[1])  # the head of keys that these queries share
        score = float(query[b, h, i] @ key[b, shared, j]) * call.scaling
        if call.softcap is not None:
            score = call.softcap * math.tanh(score / call.softcap)
        score += float(bias[b, h, i, j])
        if mask is not None and mask.dtype != torch.bool:
            score += float(mask[b, h, i, j])
        scores[b, h, i, j] = score
    return scores


@pytest.mark.parametrize("masked", ["no", "boolean", "added", "added a head"])
@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"softcap": 1.5}, {"bias": True}, {"keys": 2}], ids=str)
def test_scores_and_probabilities_follow_the_formula(settings: dict, masked: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((2, 4, 3, 8), generator=generator)
    key, value = torch.randn((2, 2, settings.get("keys", 4), 3, 8), generator=generator)
    allowed = torch.ones((2, 1, 3, 3), dtype=torch.bool).tril()
    allowed[1, ..., 1] = False
    mask = {
        "no": None,
        "boolean": allowed,
        "added": torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min),
        "added a head": torch.randn((2, 4, 3, 3), generator=generator).masked_fill(~allowed, -math.inf),
    }[masked]
    bias = torch.randn((1, 4, 3, 3), generator=generator) if "bias" in settings else None
    causal = settings.get("causal", False) and mask is None
    softcap = settings.get("softcap")
    call = AttentionCall(query, key, value, mask, 0.4, causal=causal, position_bias=bias, softcap=softcap)
    wanted, scores = reference(call), call.scores()
    met = wanted > MASKED / 2
    assert torch.equal(scores > MASKED / 2, met)
    assert torch.allclose(scores[met].double(), wanted[met], atol=1e-5)
    assert set(scores[~met].tolist()) <= {MASKED}
    assert torch.allclose(call.probabilities().double(), wanted.softmax(-1), atol=1e-6)


def test_half_precision_is_widened_for_the_scores_under_autocast_too() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn((2, 1, 4, 6, 64), generator=generator).bfloat16() * 3
    call = AttentionCall(query, key, key, None, 0.125)
    with torch.autocast("cpu", torch.bfloat16):
        scores = call.scores()
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), reference(call), atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama", "gemma2", "t5", "bart", "modernbert"])
def test_a_tapped_model_runs_under_autocast(kind: str) -> None:
    batch = batch_of(kind)
    with torch.autocast("cpu", torch.bfloat16):
        run = prepare(model_of(kind), parse_captures(["attention:all", "attention:all@scores", "qkv:1"]), batch)
        assert run.tapped
        values = run.take(batch)
    exact = prepare(model_of(kind), parse_captures(["attention:1"]), batch).take(batch)
    assert all(value.isfinite().all() for value in values.values())
    off = (values["attention.01"] - exact["attention.01"]).abs().transpose(1, 2)[real_tokens(batch, 9)]
    assert off.max() < 0.1 and off.mean() < 0.01


def test_a_query_that_may_look_nowhere_is_finite() -> None:
    query = torch.randn(1, 1, 2, 4)
    call = AttentionCall(query, query, query, torch.zeros((1, 1, 2, 2), dtype=torch.bool), 0.5)
    assert torch.equal(call.probabilities(), torch.full((1, 1, 2, 2), 0.5))
