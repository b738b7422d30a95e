"""What holds of every loss on layers: its formula, its gradient, and that padding never counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from softlabels.errors import CacheError, ConfigError
from softlabels.losses import GROUP_LOSSES, LAYER_LOSSES, LOSSES, NEEDS, PAIR_LOSSES, PENALTIES, TWO_LAYERS, statistics
from softlabels.types import MASKED, LayerPair, Signals, layer_field
from tests.losses.ragged import LAYERS, causal, only, padded, side, with_field, with_junk
from tests.losses.references import REFERENCES, gram

FIELD = {"hidden_cls": "hidden.01", "hidden": "hidden.01", "query": "query.01", "key": "key.01", "value": "value.01"}
ENTROPIES = {"attention_ce", "attention_scores_ce"}  # not 0 between equals
ATTENTION = [name for name in PAIR_LOSSES if name.startswith("attention")]


def looked_at(name: str) -> str:
    """The field of the student's layer 1 that the loss is made from."""
    return FIELD.get(NEEDS[name][0], "attention.01@scores")


def test_each_has_a_reference_and_says_what_it_needs() -> None:
    assert set(REFERENCES) == set(PAIR_LOSSES)
    assert set(LAYER_LOSSES) == set(PAIR_LOSSES) | set(GROUP_LOSSES)
    assert set(NEEDS) == set(LOSSES) | set(LAYER_LOSSES) | set(PENALTIES)
    assert not set(LOSSES) & set(LAYER_LOSSES)
    for name in LAYER_LOSSES:
        (signal,) = NEEDS[name]
        assert callable(getattr(Signals, signal))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_equals_the_formula_in_float64(name: str) -> None:
    student, teacher = side(1), side(2)
    wanted = REFERENCES[name](student, teacher, LAYERS)
    assert wanted > 0
    assert PAIR_LOSSES[name](student, teacher, layers=LAYERS).item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("name", sorted(TWO_LAYERS))
def test_without_second_layers_the_first_are_taken_twice(name: str) -> None:
    student, teacher, layers = side(1), side(2), LayerPair(1, 2)
    got = PAIR_LOSSES[name](student, teacher, layers=layers).item()
    assert got == pytest.approx(REFERENCES[name](student, teacher, layers), rel=1e-10)
    assert got != pytest.approx(REFERENCES[name](student, teacher, LAYERS), rel=1e-3)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    student, teacher = (side(seed, lengths=(3, 0, 2)) for seed in (3, 4))
    field = looked_at(name)

    def loss(values: Tensor) -> Tensor:
        return PAIR_LOSSES[name](with_field(student, field, values), teacher, layers=LAYERS)

    values = student.get(field).clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (values,))
    (gradient,) = torch.autograd.grad(loss(values), values)
    assert gradient.abs().max() > 0
    at_padding = gradient - with_junk(field, gradient, student.mask, 0.0)
    assert at_padding.abs().max() == 0


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_equals_cost_nothing_but_their_entropy(name: str) -> None:
    student, layers = side(5), LayerPair(1, 1)
    values = student.get(looked_at(name)).clone().requires_grad_()
    loss = PAIR_LOSSES[name](with_field(student, looked_at(name), values), student, layers=layers)
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.abs().max() < 1e-12 or name == "feature_statistics"  # whose |x| has a kink there
    if name in ENTROPIES:
        assert loss.item() == pytest.approx(REFERENCES[name](student, student, layers), rel=1e-10)
    else:
        assert loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("junk", [1e4, float("nan")])
def test_more_padding_changes_nothing(name: str, junk: float) -> None:
    student, teacher, field = side(6), side(7), looked_at(name)
    wanted = PAIR_LOSSES[name](student, teacher, layers=LAYERS).item()
    more = padded(student, junk=junk)
    values = more.get(field).requires_grad_()
    loss = PAIR_LOSSES[name](with_field(more, field, values), padded(teacher, junk=junk), layers=LAYERS)
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_nothing_but_padding_costs_nothing(name: str) -> None:
    student, teacher = side(8), side(9)
    student, teacher = (replace(both, mask=torch.zeros_like(both.mask)) for both in (student, teacher))
    values = student.get(looked_at(name)).clone().requires_grad_()
    loss = PAIR_LOSSES[name](with_field(student, looked_at(name), values), teacher, layers=LAYERS)
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("masked", [-65536.0, float("-inf"), torch.finfo(torch.float64).min])
def test_masked_pairs_are_finite_however_they_are_marked(name: str, masked: float) -> None:
    """Later tokens are masked on both sides. bfloat16 rounds MASKED to -65536; live models have -inf or finfo.min."""
    student, teacher = causal(side(10)), causal(side(11))
    wanted = REFERENCES[name](student, teacher, LAYERS)
    marked = replace(student, fields={k: v.masked_fill(v == MASKED, masked) for k, v in student.fields.items()})
    values = marked.get("attention.01@scores").clone().requires_grad_()
    loss = PAIR_LOSSES[name](with_field(marked, "attention.01@scores", values), teacher, layers=LAYERS)
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == pytest.approx(wanted, rel=1e-10)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", ATTENTION)
def test_a_mask_on_one_side_alone_stays_finite(name: str) -> None:
    for student, teacher in ((causal(side(10)), side(11)), (side(10), causal(side(11)))):
        values = student.get("attention.01@scores").clone().requires_grad_()
        loss = PAIR_LOSSES[name](with_field(student, "attention.01@scores", values), teacher, layers=LAYERS)
        (gradient,) = torch.autograd.grad(loss, values)
        assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_raised_to_float32(name: str, dtype: torch.dtype) -> None:
    narrow, exact = {}, {}
    for key, signals in (("student", side(12)), ("teacher", side(13))):
        narrow[key] = replace(signals, fields={k: v.to(dtype) for k, v in signals.fields.items()})
        exact[key] = replace(signals, fields={k: v.to(dtype).double() for k, v in signals.fields.items()})
    got = PAIR_LOSSES[name](narrow["student"], narrow["teacher"], layers=LAYERS)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(
        PAIR_LOSSES[name](exact["student"], exact["teacher"], layers=LAYERS).item(), rel=2e-5
    )


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "pkd", "feature_map_mse", "gram"])
def test_another_width_asks_for_a_projection(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' on layer 1 .* 4 wide, the teacher's 6; give the term a `project`"):
        PAIR_LOSSES[name](side(1, width=4), side(2), layers=LayerPair(1, 2))


@pytest.mark.parametrize("name", ["feature_statistics", "nst"])
def test_some_need_no_projection(name: str) -> None:
    student, teacher = side(1, width=4), side(2)
    wanted = REFERENCES[name](student, teacher, LAYERS)
    assert PAIR_LOSSES[name](student, teacher, layers=LAYERS).item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_other_tokens_are_refused(name: str) -> None:
    if name == "pkd":
        student, teacher = side(1, lengths=(4, 2)), side(2, lengths=(4, 2, 3))
    else:
        student, teacher = side(1, lengths=(4, 2)), side(2, lengths=(3, 2))
    with pytest.raises(ConfigError, match=f"'{name}' .* must be of the same texts"):
        PAIR_LOSSES[name](student, teacher, layers=LAYERS)


@pytest.mark.parametrize("name", [*ATTENTION, "query_relation", "key_relation", "value_relation"])
def test_other_heads_are_refused_with_the_way_out(name: str) -> None:
    options = {} if name != "attention_scores_ce" else {"heads": "each"}
    way = "relation_heads" if name.endswith("relation") else "heads: mean"
    with pytest.raises(ConfigError, match=f"'{name}' .* has 3 heads, the teacher 2; .*{way}"):
        PAIR_LOSSES[name](side(1, heads=3), side(2), layers=LAYERS, **options)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(CacheError, match=r"a loss asks for .*hold logits"):
        PAIR_LOSSES[name](side(1), replace(side(2), fields={"logits": torch.zeros(4, 2)}), layers=LAYERS)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_nothing_else_is_looked_at(name: str) -> None:
    """So that a cache needs no more than NEEDS says."""
    student, teacher = side(1), side(2)
    kind = looked_at(name).partition(".")[0]
    suffix = "@scores" if kind == "attention" else ""
    names = [layer_field(kind, layer) + suffix for layer in ((1, 2) if name in TWO_LAYERS else (2,))]
    wanted = PAIR_LOSSES[name](student, teacher, layers=LAYERS).item()
    assert PAIR_LOSSES[name](student, only(teacher, *names), layers=LAYERS).item() == wanted


def test_gram_by_way_of_tokens_is_gram_by_way_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of fewer tokens than half the channels take another way: its value, its gradient, and near equality."""
    student, teacher = side(1, width=24), side(2, width=24)
    near = replace(teacher, fields={k: v + 1e-4 * student.fields[k] for k, v in teacher.fields.items()})
    for ours, theirs in ((student, teacher), (near, teacher), (teacher, teacher)):
        found = []
        for fewer in (statistics._FEWER, 10**9):
            monkeypatch.setattr(statistics, "_FEWER", fewer)
            values = ours.get("hidden.01").clone().requires_grad_()
            loss = statistics.gram(with_field(ours, "hidden.01", values), theirs, layers=LAYERS)
            (gradient,) = torch.autograd.grad(loss, values)
            found.append((loss.item(), gradient))
            monkeypatch.undo()
        assert found[0][0] == pytest.approx(gram(ours, theirs, LAYERS), rel=1e-8, abs=1e-15)
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-8, abs=1e-15)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-7, atol=1e-14)
    single = [replace(s, fields={k: v.float() for k, v in s.fields.items()}) for s in (near, teacher)]
    assert statistics.gram(*single, layers=LAYERS).item() == pytest.approx(gram(near, teacher, LAYERS), rel=1e-2)
