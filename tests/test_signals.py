"""`Signals` serves attention and [CLS] states from whichever fields are there."""

from __future__ import annotations

import pytest
import torch

from softlabels.captures import parse_captures, prepare
from softlabels.errors import CacheError
from softlabels.types import MASKED, Signals, TokenBatch, layer_field
from tests.captures.architectures import batch_of, model_of

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
LABELS = torch.tensor([0, 1])


def signals(**fields: torch.Tensor) -> Signals:
    return Signals({name.replace("_", "."): value for name, value in fields.items()}, MASK, LABELS)


def test_cls_states_are_kept_alone_or_come_first() -> None:
    hidden = torch.randn(2, 3, 4)
    assert torch.equal(signals(hidden_06=hidden).hidden_cls(6), hidden[:, 0])
    both = Signals({"hidden.06": hidden, "hidden.06@cls": hidden[:, 1]}, MASK, LABELS)
    assert torch.equal(both.hidden_cls(6), hidden[:, 1])
    with pytest.raises(CacheError, match=r"asks for field 'hidden\.05', but these signals hold hidden\.06$"):
        signals(hidden_06=hidden).hidden_cls(5)


def test_scores_follow_from_queries_and_keys() -> None:
    query, key = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    got = signals(query_02=query, key_02=key).attention_scores(2)
    assert got.dtype == torch.float64
    for b in range(2):
        for h in range(4):
            for i in range(3):
                for j in range(3):
                    wanted = float(query[b, h, i] @ key[b, h, j]) / 5**0.5 if MASK[b, j] else MASKED
                    assert float(got[b, h, i, j]) == pytest.approx(wanted, rel=1e-12)


def test_grouped_keys_serve_several_queries_in_order() -> None:
    query, key = torch.randn(2, 6, 3, 5), torch.randn(2, 2, 3, 5)
    got = signals(query_01=query, key_01=key).attention_scores(1)
    repeated = signals(query_01=query, key_01=key.repeat_interleave(3, dim=1)).attention_scores(1)
    assert got.shape == (2, 6, 3, 3) and torch.allclose(got, repeated)
    with pytest.raises(CacheError, match="do not make one attention"):
        signals(query_01=query, key_01=torch.randn(2, 4, 3, 5)).attention_scores(1)


def test_half_precision_is_raised_before_the_product() -> None:
    query, key = torch.full((2, 1, 3, 4), 300.0).half(), torch.full((2, 1, 3, 4), 300.0).half()
    got = signals(query_01=query, key_01=key).attention_scores(1)
    assert got.dtype == torch.float32 and got[0, 0, 0, 0] == 180_000  # beyond float16


def test_what_says_masked_is_masked() -> None:
    scores = torch.zeros(2, 1, 3, 3)
    scores[0, 0, 0, 1:] = torch.tensor([float("-inf"), -65536.0])
    got = Signals({"attention.03@scores": scores}, MASK, LABELS).attention_scores(3)
    assert got[0, 0, 0].tolist() == [0, MASKED, MASKED] and got[1, 0, 0].tolist() == [0, MASKED, MASKED]


def test_probabilities_come_from_the_map_the_scores_or_queries_and_keys() -> None:
    query, key = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 5)
    from_parts = signals(query_01=query, key_01=key)
    scores = from_parts.attention_scores(1)
    wanted = scores.softmax(dim=-1)
    assert torch.equal(from_parts.attention_probs(1), wanted)
    assert torch.equal(Signals({"attention.01@scores": scores}, MASK, LABELS).attention_probs(1), wanted)
    assert torch.equal(signals(attention_01=wanted).attention_probs(1), wanted)
    assert from_parts.has_scores(1) and not signals(attention_01=wanted).has_scores(1)
    assert not signals(query_01=query).has_scores(1) and not from_parts.has_scores(2)


def test_what_is_missing_is_named() -> None:
    nothing = signals(query_01=torch.zeros(2, 2, 3, 5))
    with pytest.raises(
        CacheError, match=r"scores of layer 1: 'attention\.01@scores', or 'query\.01' and 'key\.01', but"
    ):
        nothing.attention_scores(1)
    with pytest.raises(CacheError, match=r"attention of layer 1: 'attention\.01', .*queries and keys.* hold query\.01"):
        nothing.attention_probs(1)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_captured_queries_and_keys_give_the_captured_scores(kind: str) -> None:
    batch = batch_of()
    assert isinstance(batch, TokenBatch)
    run = prepare(model_of(kind), parse_captures(["qkv:2", "attention:2@scores"]), batch)
    values = run.take(batch)
    heads = {}
    for part in ("query", "key"):
        name = layer_field(part, 2)
        wide = values[name]  # (B, L, H·K), heads outermost
        heads[name] = wide.unflatten(2, (values["attention.02@scores"].shape[1], -1)).transpose(1, 2)
    got = Signals(heads, batch.attention_mask, batch.labels).attention_scores(2)
    assert torch.allclose(got, values["attention.02@scores"], atol=1e-5)
