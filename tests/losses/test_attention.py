"""Losses on attention and relations: their options, and every way in which a map can be had."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from softlabels.errors import ConfigError
from softlabels.losses.attention import (
    attention_ce,
    attention_kl,
    attention_mse,
    attention_scores_ce,
    attention_scores_mse,
)
from softlabels.losses.hidden import pkd
from softlabels.losses.relations import key_relation, query_relation, value_relation
from softlabels.losses.statistics import feature_statistics
from softlabels.types import LayerPair
from tests.losses.ragged import LAYERS, causal, only, side, with_field, with_maps
from tests.losses.references import REFERENCES

MAPS: dict[str, Any] = {"attention_mse": attention_mse, "attention_kl": attention_kl, "attention_ce": attention_ce}
SCORES: dict[str, Any] = {"attention_scores_mse": attention_scores_mse, "attention_scores_ce": attention_scores_ce}
RELATIONS = {"query_relation": query_relation, "key_relation": key_relation, "value_relation": value_relation}


@pytest.mark.parametrize("name", [*MAPS, *SCORES])
def test_means_over_heads_compare_models_of_any_heads(name: str) -> None:
    student, teacher = side(1, heads=3), side(2, heads=2)
    loss = (MAPS | SCORES)[name]
    wanted = REFERENCES[name](student, teacher, LAYERS, mean_heads=True)
    assert loss(student, teacher, layers=LAYERS, heads="mean").item() == pytest.approx(wanted, rel=1e-10)
    student = side(1, heads=2)
    wanted = REFERENCES[name](student, teacher, LAYERS, mean_heads=False)
    assert loss(student, teacher, layers=LAYERS, heads="each").item() == pytest.approx(wanted, rel=1e-10)
    with pytest.raises(ConfigError, match="heads is 'sum', and there are 'each' and 'mean'"):
        loss(student, teacher, layers=LAYERS, heads="sum")


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("heads", ["each", "mean"])
def test_a_stored_map_serves_as_well_as_its_scores(name: str, heads: str) -> None:
    student, teacher = causal(side(3)), causal(side(4))
    wanted = MAPS[name](student, teacher, layers=LAYERS, heads=heads).item()
    stored = with_maps(teacher, LAYERS.teacher)
    assert MAPS[name](student, stored, layers=LAYERS, heads=heads).item() == pytest.approx(wanted, rel=1e-9)
    live = with_maps(student, LAYERS.student)
    assert MAPS[name](live, stored, layers=LAYERS, heads=heads).item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", MAPS)
def test_the_gradient_of_a_stored_map_is_that_of_the_loss(name: str) -> None:
    student = with_maps(side(5, lengths=(3, 0, 2)), 1)
    teacher = with_maps(side(6, lengths=(3, 0, 2)), 2)
    maps = student.get("attention.01").clamp(min=0.05).requires_grad_()  # away from the kink at 1e-30

    def loss(values: torch.Tensor) -> torch.Tensor:
        return MAPS[name](with_field(student, "attention.01", values), teacher, layers=LAYERS)

    assert torch.autograd.gradcheck(loss, (maps,))


@pytest.mark.parametrize("name", [*MAPS, *SCORES])
def test_queries_and_keys_serve_as_well_as_scores(name: str) -> None:
    student, teacher = side(7), side(8)
    loss, layer = (MAPS | SCORES)[name], LAYERS.teacher
    query, key = teacher.query(layer), teacher.key(layer)
    scores = query @ key.transpose(-1, -2) / math.sqrt(3)
    wanted = loss(
        student, only(with_field(teacher, "attention.02@scores", scores), "attention.02@scores"), layers=LAYERS
    )
    got = loss(student, only(teacher, "query.02", "key.02"), layers=LAYERS)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_a_map_that_gives_nothing_where_the_student_looks_is_finite() -> None:
    student, teacher = causal(side(9)), with_maps(side(10), 2)
    scores = student.get("attention.01@scores").clone().requires_grad_()
    for loss in MAPS.values():
        value = loss(with_field(student, "attention.01@scores", scores), teacher, layers=LAYERS)
        value.backward()
        back = loss(with_maps(student, 1), replace(side(10), fields=side(10).fields), layers=LAYERS)
        assert bool(value.isfinite()) and bool(back.isfinite())
    assert scores.grad is not None and bool(scores.grad.isfinite().all())


def test_causal_pairs_are_left_out_of_the_mean_of_scores() -> None:
    """Of a text of length n there are n(n+1)/2 pairs, not n²."""
    student, teacher = causal(side(11, lengths=(3,))), causal(side(11, lengths=(3,)))
    moved = {name: torch.where(values > -1e4, values + 2, values) for name, values in student.fields.items()}
    loss = attention_scores_mse(replace(student, fields=moved), teacher, layers=LayerPair(1, 1))
    assert loss.item() == pytest.approx(4, rel=1e-12)


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("relation_heads", [1, 2, 3, 6])
def test_relation_heads_cut_any_two_models_alike(name: str, relation_heads: int) -> None:
    student, teacher = side(12, heads=3, head_width=2), side(13, heads=2, head_width=6)  # 6 and 12 wide
    wanted = REFERENCES[name](student, teacher, LAYERS, relation_heads=relation_heads)
    got = RELATIONS[name](student, teacher, layers=LAYERS, relation_heads=relation_heads)
    assert got.item() == pytest.approx(wanted, rel=1e-10)


def test_own_heads_may_differ_in_width() -> None:
    student, teacher = side(14, head_width=2), side(15, head_width=5)
    for name, loss in RELATIONS.items():
        wanted = REFERENCES[name](student, teacher, LAYERS)
        assert loss(student, teacher, layers=LAYERS).item() == pytest.approx(wanted, rel=1e-10)
        cut_as_they_are = loss(student, teacher, layers=LAYERS, relation_heads=2)
        assert cut_as_they_are.item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("relation_heads", [0, -1, 4])
def test_relation_heads_that_divide_nothing_are_refused(relation_heads: int) -> None:
    with pytest.raises(ConfigError, match=r"doesn't divide the student's width 6 \(2 heads of 3\)"):
        value_relation(side(1), side(2), layers=LAYERS, relation_heads=relation_heads)


def test_options_of_losses_on_hidden_states() -> None:
    student, teacher = side(16), side(17)
    paper = pkd(student, teacher, layers=LAYERS).item()
    assert pkd(student, teacher, layers=LAYERS, mean_over_width=True).item() == pytest.approx(paper / 6, rel=1e-12)
    rows = {"hidden.01@cls": student.hidden(1)[:, 0]}
    assert pkd(replace(student, fields=rows), teacher, layers=LAYERS).item() == paper

    def statistics(mean: float, variance: float) -> float:
        return feature_statistics(student, teacher, layers=LAYERS, mean_weight=mean, variance_weight=variance).item()

    assert statistics(5000, 5) == pytest.approx(5000 * statistics(1, 0) + 5 * statistics(0, 1), rel=1e-12)
