"""Losses on several layers at once: their formulas, their gradients, what flows where, and that padding is nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from softlabels.errors import CacheError, ConfigError
from softlabels.losses import CONCATENATED, GROUP_LOSSES, NEEDS, TRANSPORT, WIDENED
from softlabels.losses.penalties import parameter_norm
from softlabels.losses.transport import LayerWeights, emd, solve_transport
from softlabels.types import LayerGroup, LayerPair, Signals, layer_field
from tests.losses.ragged import only, padded, side, with_field, with_junk
from tests.losses.references import Vector, attention_scores_mse, dot, hidden_mse, mean, softmax, states

ONE, ALL = LayerGroup((1,), (0, 1, 2)), LayerGroup((1, 2), (0, 1, 2))


def joined(width: int = 6) -> nn.Linear:
    """A bucket of three layers to the student's width."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Linear(18, width, dtype=torch.float64).requires_grad_(False)


def bucket_map(name: str, width: int = 6) -> nn.Linear:
    """The map of `name` between a student of `width` and a bucket of three layers."""
    if name not in WIDENED:
        return joined(width)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Linear(width, 18, dtype=torch.float64).requires_grad_(False)


def call(name: str, student: Signals, teacher: Signals) -> Tensor:
    loss: Callable[..., Tensor] = GROUP_LOSSES[name]
    if name in CONCATENATED:
        dtype = torch.promote_types(student.get("hidden.01").dtype, torch.float32)
        return loss(
            student, teacher, layers=ONE, combine=bucket_map(name, student.get("hidden.01").shape[-1]).to(dtype)
        )
    return loss(student, teacher, layers=ALL if name in TRANSPORT else ONE)


def looked_at(name: str) -> str:
    return "attention.01@scores" if name == "emd_attention" else "hidden.01"


# ----------------------------------------------------------------------------------------------- once more, and slowly


def mixture_distance(own: Vector, theirs: list[Vector]) -> float:
    weights = softmax([dot(own, other) for other in theirs])
    mixture = [math.fsum(w * x for w, x in zip(weights, column, strict=True)) for column in zip(*theirs, strict=True)]
    return mean([(a - b) ** 2 for a, b in zip(own, mixture, strict=True)])


def bucket_distance(own: Vector, theirs: list[Vector]) -> float:
    linear, bucket = joined(len(own)), [value for other in theirs for value in other]
    told = [dot(row, bucket) + bias for row, bias in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)]
    return mean([(a - b) ** 2 for a, b in zip(own, told, strict=True)])


def unit_distance(own: Vector, theirs: list[Vector]) -> float:
    linear, bucket = bucket_map("ckd_unit", len(own)), [value for other in theirs for value in other]
    told = [dot(row, own) + bias for row, bias in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)]
    (ours, ours_long), (there, there_long) = ((side, math.sqrt(dot(side, side))) for side in (told, bucket))
    return math.fsum((a / ours_long - b / there_long) ** 2 for a, b in zip(ours, there, strict=True))


def over_texts(distance: Callable[[Vector, list[Vector]], float], student: Signals, teacher: Signals, *, cls: bool):
    """The mean of `distance` of layer 1's states to the teacher's three, over [CLS] of each text or over all tokens."""
    found = []
    ours, theirs = states(student, 1), [states(teacher, layer) for layer in (0, 1, 2)]
    for number, text in enumerate(ours):
        for token in range(1 if cls else len(text)):
            found.append(distance(text[token], [layer[number][token] for layer in theirs]))
    return mean(found)


def transported(cost: Callable[[Signals, Signals, LayerPair], float], student: Signals, teacher: Signals) -> float:
    """Uniform weights, two layers to three: cut into sixths, the best assignment of three copies to two copies."""
    costs = [[cost(student, teacher, LayerPair(i, j)) for j in (0, 1, 2)] for i in (1, 2)]
    plans = permutations(range(6))
    return min(math.fsum(costs[copy // 3][place // 2] for copy, place in enumerate(plan)) / 6 for plan in plans)


REFERENCES: dict[str, Callable[[Signals, Signals], float]] = {
    "alp": lambda s, t: over_texts(mixture_distance, s, t, cls=True),
    "alp_tokens": lambda s, t: over_texts(mixture_distance, s, t, cls=False),
    "ckd": lambda s, t: over_texts(bucket_distance, s, t, cls=False),
    "ckd_cls": lambda s, t: over_texts(bucket_distance, s, t, cls=True),
    "ckd_unit": lambda s, t: over_texts(unit_distance, s, t, cls=False),
    "emd": lambda s, t: transported(hidden_mse, s, t),
    "emd_attention": lambda s, t: transported(attention_scores_mse, s, t),
}


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_equals_the_formula_in_float64(name: str) -> None:
    assert set(REFERENCES) == set(GROUP_LOSSES)
    student, teacher = side(1), side(2)
    wanted = REFERENCES[name](student, teacher)
    assert wanted > 0
    # layers' weights are kept in float32
    assert call(name, student, teacher).item() == pytest.approx(wanted, rel=1e-7 if name in TRANSPORT else 1e-10)


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    student, teacher = (side(seed, lengths=(3, 0, 2)) for seed in (3, 4))
    field = looked_at(name)

    def loss(values: Tensor) -> Tensor:
        return call(name, with_field(student, field, values), teacher)

    values = student.get(field).clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (values,))
    (gradient,) = torch.autograd.grad(loss(values), values)
    assert gradient.abs().max() > 0
    at_padding = gradient - with_junk(field, gradient, student.mask, 0.0)
    assert at_padding.abs().max() == 0


@pytest.mark.parametrize("name", GROUP_LOSSES)
@pytest.mark.parametrize("junk", [1e4, float("nan")])
def test_more_padding_changes_nothing(name: str, junk: float) -> None:
    student, teacher, field = side(6), side(7), looked_at(name)
    wanted = call(name, student, teacher).item()
    more = padded(student, junk=junk)
    values = more.get(field).requires_grad_()
    loss = call(name, with_field(more, field, values), padded(teacher, junk=junk))
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_nothing_but_padding_costs_nothing(name: str) -> None:
    student, teacher = (replace(both, mask=torch.zeros_like(both.mask)) for both in (side(8), side(9)))
    values = student.get(looked_at(name)).clone().requires_grad_()
    loss = call(name, with_field(student, looked_at(name), values), teacher)
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize("name", GROUP_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lower_precision_is_raised_to_float32(name: str, dtype: torch.dtype) -> None:
    narrow, exact = [], []
    for signals in (side(12), side(13)):
        narrow.append(replace(signals, fields={k: v.to(dtype) for k, v in signals.fields.items()}))
        exact.append(replace(signals, fields={k: v.to(dtype).double() for k, v in signals.fields.items()}))
    got = call(name, *narrow)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(call(name, *exact).item(), rel=2e-5)


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_nothing_else_is_looked_at(name: str) -> None:
    """So that a cache needs no more than NEEDS says."""
    student, teacher = side(1), side(2)
    kind, suffix = ("attention", "@scores") if name == "emd_attention" else ("hidden", "")
    names = [layer_field(kind, layer) + suffix for layer in (0, 1, 2)]
    wanted = call(name, student, teacher).item()
    assert call(name, student, only(teacher, *names)).item() == wanted
    if NEEDS[name] == ("hidden_cls",):
        rows = {f"hidden.{layer:02d}@cls": teacher.hidden(layer)[:, 0] for layer in (0, 1, 2)}
        assert call(name, student, replace(teacher, fields=rows)).item() == wanted
    with pytest.raises(CacheError, match=r"a loss asks for .*hold logits"):
        call(name, student, replace(teacher, fields={"logits": torch.zeros(4, 2)}))


# -------------------------------------------------------------------------------------------------- attention to layers


@pytest.mark.parametrize("name", ["alp", "alp_tokens"])
def test_equals_cost_nothing_where_all_layers_agree(name: str) -> None:
    teacher = side(5)
    same = replace(teacher, fields={f"hidden.{layer:02d}": teacher.hidden(1) for layer in (0, 1, 2)})
    assert call(name, same, same).item() == pytest.approx(0, abs=1e-12)
    alone: Callable[..., Tensor] = GROUP_LOSSES[name]
    assert alone(teacher, teacher, layers=LayerGroup((1,), (1,))).item() == pytest.approx(0, abs=1e-12)


def test_the_layer_that_is_most_alike_weighs_most() -> None:
    student, teacher = side(1), side(2)
    loud = with_field(teacher, "hidden.02", 1000 * student.hidden(1))
    near = GROUP_LOSSES["alp"](student, loud, layers=LayerGroup((1,), (2,)))
    assert GROUP_LOSSES["alp"](student, loud, layers=ONE).item() == pytest.approx(near.item(), rel=1e-9)


def test_a_bucket_that_is_joined_as_the_student_has_it_costs_nothing() -> None:
    teacher = side(2)
    told = joined()(torch.cat([teacher.hidden(layer) for layer in (0, 1, 2)], dim=-1))
    for name in sorted(CONCATENATED - WIDENED):
        assert call(name, with_field(side(1), "hidden.01", told), teacher).item() == pytest.approx(0, abs=1e-12)


def test_a_student_that_tells_the_bucket_costs_nothing_however_loudly() -> None:
    student, widen = side(1), bucket_map("ckd_unit")
    parts = (7 * widen(student.hidden(1))).split(6, dim=-1)
    teacher = replace(side(2), fields={f"hidden.{layer:02d}": part for layer, part in enumerate(parts)})
    assert call("ckd_unit", student, teacher).item() == pytest.approx(0, abs=1e-12)
    quiet = with_field(student, "hidden.01", torch.zeros_like(student.hidden(1)))
    assert call("ckd_unit", quiet, teacher).item() > 0.1


@pytest.mark.parametrize("name", [name for name in GROUP_LOSSES if name != "emd_attention"])
def test_another_width_asks_for_a_projection(name: str) -> None:
    plain: Callable[..., Tensor] = GROUP_LOSSES[name]
    with pytest.raises(ConfigError, match=rf"'{name}' on layer 1 .* 4 wide, the teacher's \d+; give the term a `proj"):
        plain(side(1, width=4), side(2), layers=ALL if name in TRANSPORT else ONE)


def test_other_heads_are_refused_with_the_way_out() -> None:
    student, teacher = side(1, heads=3), side(2)
    with pytest.raises(ConfigError, match=r"'emd_attention' .* has 3 heads, the teacher 2; .*heads: mean"):
        call("emd_attention", student, teacher)
    attention: Callable[..., Tensor] = GROUP_LOSSES["emd_attention"]
    assert attention(student, teacher, layers=ALL, heads="mean").item() > 0


# ------------------------------------------------------------------------------------------------------------ transport


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (4, 1), (2, 3), (3, 6), (4, 6), (6, 6), (12, 24)])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_the_flow_is_the_cheapest(rows: int, columns: int, scale: float) -> None:
    """Uniform weights, cut into as many copies as it takes: an assignment, which another algorithm solves."""
    costs = np.random.default_rng(rows * columns).random((rows, columns)) * scale
    flow = solve_transport(costs, np.ones(rows), np.ones(columns))
    assert flow.min() >= 0
    assert np.allclose(flow.sum(1), 1 / rows) and np.allclose(flow.sum(0), 1 / columns)
    pieces = math.lcm(rows, columns)
    copies = np.repeat(np.repeat(costs, pieces // rows, axis=0), pieces // columns, axis=1)
    best = copies[linear_sum_assignment(copies)].sum() / pieces
    assert (flow * costs).sum() == pytest.approx(best, rel=1e-9)
    assert (flow > 0).sum() <= rows + columns - 1 or rows == 1 or columns == 1


def test_the_flow_of_uneven_weights_is_the_cheapest() -> None:
    """Weights 1/6, 5/6 against 1/2, 1/3, 1/6, in sixths."""
    costs = np.random.default_rng(0).random((2, 3))
    weights = ([Fraction(1, 6), Fraction(5, 6)], [Fraction(3, 6), Fraction(2, 6), Fraction(1, 6)])
    flow = solve_transport(costs, *(np.array([float(share) for share in side]) for side in weights))
    rows, columns = ([i for i, share in enumerate(side) for _ in range(int(share * 6))] for side in weights)
    best = min(sum(costs[i, j] for i, j in zip(rows, order, strict=True)) for order in permutations(columns)) / 6
    assert (flow * costs).sum() == pytest.approx(best, rel=1e-12)


def test_a_flow_where_all_is_equal_or_nothing_is_a_number() -> None:
    even = solve_transport(np.full((2, 2), 3.0), np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    assert even.tolist() == [[0.125, 0.125], [0.375, 0.375]]
    assert np.isfinite(solve_transport(np.array([[np.nan, 1.0], [np.inf, 0.0]]), np.ones(2), np.ones(2))).all()
    gone = with_field(side(1), "hidden.01", torch.full_like(side(1).hidden(1), float("nan")))
    assert bool(emd(gone, side(2), layers=ALL).isnan())  # which the training tells


def test_a_student_that_is_its_teacher_has_nothing_to_carry() -> None:
    teacher = side(5)
    layers = LayerGroup((0, 1, 2), (0, 1, 2))
    for name in sorted(TRANSPORT):
        same: Callable[..., Tensor] = GROUP_LOSSES[name]
        assert same(teacher, teacher, layers=layers).item() == pytest.approx(0, abs=1e-12)
        turned = LayerGroup((2, 0, 1), (0, 1, 2))  # in whatever order
        assert same(teacher, teacher, layers=turned).item() == pytest.approx(0, abs=1e-12)


def test_a_layer_without_weight_takes_no_part() -> None:
    student, teacher = side(1), side(2)
    some = emd(student, teacher, layers=ALL, student_weights=[0, 2], teacher_weights=[1, 0, 1])
    alone = emd(student, teacher, layers=LayerGroup((2,), (0, 2)))
    assert some.item() == pytest.approx(alone.item(), rel=1e-7)
    lone = hidden_mse(student, teacher, LayerPair(2, 0)) + hidden_mse(student, teacher, LayerPair(2, 2))
    assert alone.item() == pytest.approx(lone / 2, rel=1e-7)


def test_weights_move_to_the_layers_that_cost_least() -> None:
    """C_i = Σj flow · cost / weight; the new weight is 1/C_i, scaled: written out from the flow."""
    student, teacher = side(1), side(2)
    weights = LayerWeights(ALL, [1, 3], None, update=True)
    assert weights.student.tolist() == [0.25, 0.75]
    costs = np.array([[hidden_mse(student, teacher, LayerPair(i, j)) for j in (0, 1, 2)] for i in (1, 2)])
    flow = solve_transport(costs, np.array([0.25, 0.75]), np.ones(3))
    loss = emd(student, teacher, layers=ALL, weights=weights)
    assert loss.item() == pytest.approx((flow * costs).sum(), rel=1e-6)
    for got, sums, before in (
        (weights.student, (flow * costs).sum(1), [0.25, 0.75]),
        (weights.teacher, (flow * costs).sum(0), [1 / 3] * 3),
    ):
        inverse = [before[i] / float(paid) for i, paid in enumerate(sums)]
        assert got.tolist() == pytest.approx([value / sum(inverse) for value in inverse], rel=1e-5)


def test_weights_stay_while_a_student_is_validated_and_without_update() -> None:
    student, teacher = side(1), side(2)
    still, moving = LayerWeights(ALL), LayerWeights(ALL, update=True)
    emd(student, teacher, layers=ALL, weights=still)
    with torch.no_grad():
        emd(student, teacher, layers=ALL, weights=moving)
    for weights in (still, moving):
        assert weights.student.tolist() == [0.5, 0.5] and weights.teacher.tolist() == pytest.approx([1 / 3] * 3)
    masked = [replace(both, mask=torch.zeros_like(both.mask)) for both in (student, teacher)]
    emd(*masked, layers=ALL, weights=moving)  # nothing was carried
    assert moving.student.tolist() == [0.5, 0.5]


def test_a_layer_that_costs_nothing_keeps_the_others_alive() -> None:
    teacher = side(5)
    weights = LayerWeights(LayerGroup((1, 2), (1, 2)), update=True)
    half = with_field(side(1), "hidden.01", teacher.hidden(1))
    for _ in range(3):
        emd(half, teacher, layers=LayerGroup((1, 2), (1, 2)), weights=weights)
    for side_weights in (weights.student, weights.teacher):
        assert side_weights.sum().item() == pytest.approx(1) and bool((side_weights > 0).all())
        assert side_weights[0] > side_weights[1]


# ------------------------------------------------------------------------------------------------------------ penalties


def test_the_norm_is_of_what_learns() -> None:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    whole = [value for parameter in layer.parameters() for value in parameter.flatten().tolist()]
    assert parameter_norm(layer.parameters()).item() == pytest.approx(0.5 * sum(x * x for x in whole), rel=1e-12)
    matrix = sum(x * x for x in layer.weight.flatten().tolist()) / 2
    assert parameter_norm(layer.parameters(), of="matrices").item() == pytest.approx(matrix, rel=1e-12)
    layer.bias.requires_grad_(False)
    loss = parameter_norm(layer.parameters())
    assert loss.item() == pytest.approx(matrix, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, layer.weight)
    assert torch.equal(gradient, layer.weight)
    assert torch.autograd.gradcheck(lambda theta: parameter_norm([theta]), (layer.weight,))
    assert parameter_norm([]).item() == 0
