"""The space of a sweep: how axes are read, which points there are, and what options a trial gets."""

from __future__ import annotations

import re
from typing import Any

import pytest

from softlabels.errors import ConfigError
from softlabels.sweeping.space import (
    Axis,
    Choice,
    Range,
    Space,
    SweepOptions,
    check_axis,
    check_space,
    count_points,
    find_points,
    parse_axis,
    point_name,
    trials_of,
)

BILSTM = {"student": "bilstm"}


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("1,2,4", Choice("k", (1, 2, 4))),
        ("5:1, 3", Choice("k", ("5:1", 3))),
        ("5:1:cosine", Choice("k", ("5:1:cosine",))),
        ("bilstm,linear", Choice("k", ("bilstm", "linear"))),
        ("[1, 4],[2, 5]", Choice("k", ([1, 4], [2, 5]))),
        ("{kl: 1},{kl: 0.7, ce: 0.3}", Choice("k", ({"kl": 1}, {"kl": 0.7, "ce": 0.3}))),
        ("true,false", Choice("k", (True, False))),
        ("1e-4..1e-2:log", Range("k", 1e-4, 1e-2, log=True)),
        ("50..300", Range("k", 50, 300)),
        ("0.1..0.9", Range("k", 0.1, 0.9)),
        ("../vectors.txt", Choice("k", ("../vectors.txt",))),
    ],
)
def test_how_an_axis_is_read(text: str, axis: Axis) -> None:
    assert parse_axis("k", text) == axis


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "no value"), ("1,1.0", "1.0 twice"), ("3..1", "is empty"), ("0..1:log", "at 0 or below"), ("[1,", "commas")],
)
def test_an_axis_that_makes_no_sense_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"k.*{re.escape(told)}"):
        parse_axis("k", text)


def test_a_grid_is_every_combination_with_a_name_of_its_own() -> None:
    space = Space((Choice("temperature", (1, 4)), Choice("losses.kl", (0.3, 0.7))), BILSTM)
    points = list(find_points(space, SweepOptions()))
    assert [point.name for point in points] == [
        "temperature-1_kl-0.3",
        "temperature-1_kl-0.7",
        "temperature-4_kl-0.3",
        "temperature-4_kl-0.7",
    ]
    assert count_points(space, SweepOptions()) == 4
    trials = [trial for point in points for trial in trials_of(space, point, [0, 5])]
    assert len({trial.name for trial in trials}) == 8 and trials[1].name == "temperature-1_kl-0.3_seed-5"
    assert trials[7].options.model_dump() | {"seed": 0} == trials[6].options.model_dump()
    assert (trials[7].options.temperature, trials[7].options.losses, trials[7].options.seed) == (
        "4",
        {"kl": 0.7, "ce": 0.3},  # the weight of ce is the default one
        5,
    )


def test_names_fit_folders_and_differ() -> None:
    names = [point_name({"options.word_vectors": value}) for value in ("a/b", "a-b", "a b", "../a", "x" * 300)]
    assert len(set(names)) == 5 and all(re.fullmatch(r"[\w.+-]{1,90}", name) for name in names)
    assert point_name({"lr": 1, "phases.0.lr": 2}) == "lr-1_phases.0.lr-2"
    assert point_name({"student": "linear"}) == "linear" and point_name({}) == "all"


def test_random_points_are_the_same_ones_when_more_are_asked_for() -> None:
    sizes_and_temperatures = Range("options.hidden_size", 50, 300), Choice("temperature", (1, 2))
    space = Space((Range("lr", 1e-4, 1e-2, log=True), *sizes_and_temperatures), BILSTM)
    few, many = (list(find_points(space, SweepOptions(search="random", points=n))) for n in (5, 400))
    assert many[:5] == few and few != list(find_points(space, SweepOptions(search="random", points=5, search_seed=1)))
    rates = [point.changes["lr"] for point in many]
    sizes = [point.changes["options.hidden_size"] for point in many]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates) and all(isinstance(s, int) and 50 <= s <= 300 for s in sizes)
    assert 0.4 < sum(rate < 1e-3 for rate in rates) / 400 < 0.6  # half of the logarithm's range
    assert {point.changes["temperature"] for point in many} == {1, 2}
    assert max(sizes) - min(sizes) > 200


def test_random_points_of_a_finite_space_come_once_each() -> None:
    space = Space((Choice("temperature", (1, 2, 3)), Choice("lr", (0.1, 0.2))), BILSTM)
    options = SweepOptions(search="random", points=50)
    points = [tuple(point.changes.values()) for point in find_points(space, options)]
    assert count_points(space, options) == 6 == len(points) == len(set(points))


def options_of(space: Space, **changes: Any) -> Any:
    return space.options(changes, seed=0, trial="x")


def test_a_recipe_is_the_base() -> None:
    space = Space((Choice("temperature", (1, 2)),), {}, recipe="hinton")
    found = options_of(space, temperature=2)
    assert (found.student, found.epochs, found.batch_size, found.temperature) == ("bilstm", 3, 64, "2")
    assert found.options == {"word_vectors": "fit"} and found.losses == {"kl": 0.7, "ce": 0.3}
    phased = Space((), {}, recipe="pkd-skip")
    before, after = options_of(phased), options_of(phased, epochs=7)
    assert {phase.epochs for phase in after.all_phases()} == {7} != {phase.epochs for phase in before.all_phases()}


def test_losses_that_are_terms_are_reached_by_their_names() -> None:
    terms: list[dict[str, Any]] = [{"loss": "kl", "weight": 0.5}, {"loss": "ce"}]
    space = Space((), {"student": "bilstm", "losses": terms})
    found = options_of(space, **{"losses.kl.weight": 0.9})
    assert [term.weight for term in found.losses] == [0.9, 1.0] and terms[0]["weight"] == 0.5


def test_the_linear_student_has_the_losses_that_it_can_have() -> None:
    assert options_of(Space((), {}), student="linear").losses == {"mse_logits": 1.0}
    assert options_of(Space((), {"losses": {"ce": 1.0}}), student="linear").losses == {"ce": 1.0}


@pytest.mark.parametrize(
    ("axes", "fixed", "options", "told"),
    [
        ((), BILSTM, {}, "nothing to sweep"),
        ((Choice("seed", (1, 2)),), BILSTM, {}, "give --seeds"),
        ((Choice("temperature", (1, 2)),), {}, {}, "say what to train"),
        ((Choice("temperatur", (1, 2)),), BILSTM, {}, "unknown key 'temperatur'.*Did you mean 'temperature'"),
        ((Choice("temperature", (1, -2)),), BILSTM, {}, "temperature=-2: .*above 0"),
        ((Choice("losses.kll", (1, 2)),), BILSTM, {}, "no loss 'kll'.*Did you mean 'kl'"),
        ((Choice("phases.0.lr", (1, 2)),), BILSTM, {}, r"'phases.0.lr' is of a phase.*\('lr'\)"),
        ((Choice("lr.x", (1, 2)),), BILSTM | {"lr": 1}, {}, "below"),
        ((Choice("lr", (1, 2)),), BILSTM | {"lr": 1}, {}, "'lr' is given twice"),
        ((Range("lr", 0.1, 1),), BILSTM, {}, "which has no grid"),
        ((Range("lr", -1, 1),), BILSTM, {"search": "random", "points": 3}, "lr=-1: lr"),
        ((Choice("temperature", (1, 2)),), {}, {"recipe": "hintn"}, "no recipe 'hintn'"),
    ],
)
def test_what_no_trial_can_have_is_told_before_the_first(
    axes: tuple[Axis, ...], fixed: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    options = dict(options)
    space = Space(axes, fixed, options.pop("recipe", None))
    with pytest.raises(ConfigError, match=told):
        check_space(space, SweepOptions(**options))


def test_seeds_alone_are_a_sweep() -> None:
    check_space(Space((), BILSTM), SweepOptions(seeds=[0, 1]))
    (point,) = find_points(Space((), BILSTM), SweepOptions(seeds=[0, 1]))
    assert [trial.name for trial in trials_of(Space((), BILSTM), point, [0, 1])] == ["seed-0", "seed-1"]


def test_axes_are_checked_however_they_come() -> None:
    with pytest.raises(ConfigError, match="has no value"):
        check_axis(Choice("lr", ()))
